"""What a run's rollout will write, known before it is asked for any row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from unified_rl.errors import ConfigError
from unified_rl.instantiate import is_ours
from unified_rl.protocols import ChecksWritten
from unified_rl.replay import Group, HindsightReplay, Replay, WithDataset
from unified_rl.replay.fit import check_written
from unified_rl.rollout import ControlRollout, DemonstrationRollout, LanguageRollout, StoredRollout
from unified_rl.rollout.curriculum import EXPECTED
from unified_rl.rollout.demonstrations import KEYS
from unified_rl.rollout.sources import (
    Assimilated,
    Calibrated,
    Coached,
    Demonstrations,
    Described,
    Edited,
    Experience,
    ExpertFile,
    Judgements,
    Model,
    Pool,
    Recorded,
    Recoveries,
    Replays,
    Revised,
    Shortened,
    Steps,
    Windows,
)
from unified_rl.units import COUNTED, Source

SHARED = ("mask", "behavior_log_prob", "step_index", "policy_version", "reward", "step_mask", "terminated", "truncated",
          "discount", "episode", "group", "source")  # fmt: skip
"""Columns of every record."""
OF_DOMAIN = {
    "language": ("tokens", "token_mask", "prompt_id"),
    "control": ("observation", "next_observation", "action"),
}
STORED = (Assimilated, Experience, Pool, Recorded, Replays, Windows)
"""Sources of this library whose rows were sampled by weights of before."""
WRITES: dict[type, tuple[Source, ...]] = {
    **dict.fromkeys((*STORED, Coached, Edited, Judgements, Recoveries, Steps), (Source.OFFLINE,)),
    **dict.fromkeys((Calibrated, ExpertFile, Model, Revised, Shortened), (Source.EXPERT,)),
    Demonstrations: (Source.DEMONSTRATION,),
    Described: (Source.OFFLINE, Source.EXPERT),
}
"""What the sources of this library write."""


class Written(NamedTuple):
    """Rows that a rollout will write.

    Attributes:
        sources: who made them.
        group_size: the most that share a group; of a simulation whose starts are told apart all pieces of episodes,
            of one step at least, of a collection.
        columns: what they hold, and how many numbers of a row the configuration joined in it; 0 where none.
        stored: some were sampled by weights of before, whatever the staleness.
    """

    sources: set[int]
    group_size: int
    columns: Mapping[str, int]
    stored: bool = False


def written(rollout: Any) -> Written | None:
    """The rows of a rollout of this library; None for one of the user's own, which may write anything."""
    if type(rollout) is ControlRollout:
        started = rollout.starts is not None
        columns = dict.fromkeys((*SHARED, *OF_DOMAIN["control"], *(("prompt_id",) if started else ())), 0)
        return Written({int(Source.ONLINE)}, rollout.rows * rollout.length if started else 1, columns)
    if type(rollout) is LanguageRollout and all(type(source) in WRITES for source in rollout.sources.values()):
        sources: list[Any] = list(rollout.sources.values())
        made = {int(one) for source in sources for one in WRITES[type(source)]}
        joined = sum(max(1, source.most(1)) for source in sources if getattr(source, "joins", True))
        alone = [source.most(rollout.prompts) for source in sources if not getattr(source, "joins", True)]
        stored = any(isinstance(source, STORED) for source in sources)
        shown = ("privileged_tokens", "privileged_mask") if rollout.builder.privileged is not None else ()
        counted = (COUNTED,) if rollout.builder.counts else ()
        expected = (EXPECTED,) if rollout.curriculum is not None else ()
        columns = dict.fromkeys((*SHARED, *OF_DOMAIN["language"], *counted, *shown, *expected), 0)
        columns |= {name: 0 if isinstance(of, str) else len(of) for name, of in rollout.builder.columns.items()}
        return Written({int(Source.ONLINE), *made}, max(rollout.group_size + joined, *alone, 1), columns, stored)
    if type(rollout) is DemonstrationRollout:
        return Written({int(Source.DEMONSTRATION)}, 1, dict.fromkeys((*KEYS[rollout.domain], "source"), 0))
    return None


def check_rollout(agent: Any, rollout: Any, replay: Any) -> None:
    """Refuses rows that the replay's sampler waits for in vain, or that the agent would learn nothing from.

    Raises:
        ConfigError: names the setting and what works.
    """
    if isinstance(rollout, ControlRollout) and rollout.starts is not None:
        _check_starts(agent, replay)
    found = written(rollout)
    if found is None:
        if isinstance(rollout, StoredRollout):
            check_written(replay, {int(Source.OFFLINE)}, None, ())
        return
    check_written(replay, found.sources, found.group_size, found.columns)
    if isinstance(agent, ChecksWritten):
        stored = replay.stored if isinstance(replay, WithDataset) else None
        more = set() if stored is None or "source" not in stored.keys() else set(stored["source"].unique().tolist())
        stored_too = found.stored or int(Source.OFFLINE) in more
        agent.check_written(found.sources | more, found.group_size, found.columns, stored_too)


def _check_starts(agent: Any, replay: Any) -> None:
    """Refuses ``rollout.starts`` where nothing could compare rows by them, or where rows no longer say how they began.

    Raises:
        ConfigError: names the setting and what works.
    """
    if isinstance(replay, HindsightReplay):
        raise ConfigError(
            "replay=her exchanges goals when rows are drawn, which then no longer begin as rollout.starts says: leave "
            "rollout.starts out"
        )
    if isinstance(replay, Replay) and isinstance(replay.sampler, Group):
        raise ConfigError(
            "replay=group draws so many stored rows of a group, and those of a simulation are steps, most of them of "
            "one episode: use replay=fresh or replay=uniform with rollout.starts"
        )
    if is_ours(agent) and not isinstance(agent, ChecksWritten):
        name = getattr(agent, "option", type(agent).__name__)
        raise ConfigError(
            f"rollout.starts says which rows are compared with each other, and agent={name} compares none: leave it "
            "out, or use agent=policy_gradient agent.advantage=group"
        )
