"""Whether an agent can use a replay: asked once, before its first gradient step."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from unified_rl.errors import ConfigError
from unified_rl.replay.buffer import Replay
from unified_rl.replay.hindsight import HindsightReplay
from unified_rl.replay.joined import WithDataset
from unified_rl.replay.samplers.base import Sampler
from unified_rl.replay.samplers.grouped import Group
from unified_rl.replay.samplers.mixture import BySource, Mixture
from unified_rl.replay.samplers.order import Fresh, Segment
from unified_rl.units import Source


def check_replay(
    replay: object,
    agent: str,
    *,
    keys: Sequence[str] = (),
    length: int | None = None,
    priorities: bool = False,
    reuses: bool = False,
    groups: bool = False,
    draws: int | None = None,
) -> None:
    """Refuses a replay whose sampler would be of no effect, or could not serve the agent's draws.

    Args:
        replay: a :class:`~unified_rl.replay.Replay`; its rows are looked at where it holds some.
        agent: the name of the agent's option.
        keys: columns that the agent reads.
        length: slots of the windows that the agent draws; None draws single rows.
        priorities: whether the agent renews priorities and weighs its loss by ``priority_weight``.
        reuses: whether the agent draws rows again and again.
        groups: whether the agent compares the rows of a group.
        draws: rows of one draw, where they are not those of one write.

    Raises:
        ConfigError: it does not fit; names the setting and what works.
    """
    if not isinstance(replay, Replay):  # one of the user's own knows itself what it gives
        return
    sampler = replay.sampler
    if sampler.takes_priority and not priorities:
        raise ConfigError(
            f"replay=priority draws rows by errors that agent={agent} does not measure: it would stay uniform; use "
            "replay=uniform, or agent=sac or agent=actor_critic"
        )
    if isinstance(sampler, Segment) and sampler.length != length:
        drawn = "single rows" if length is None else f"windows of {length} steps"
        instead = "replay=uniform with agent.n_step" if priorities else "replay=uniform"
        raise ConfigError(
            f"replay=segment draws windows of {sampler.length} steps, but agent={agent} learns from {drawn}; "
            f"use {instead}"
        )
    if isinstance(replay, WithDataset) and (length is not None or sampler.takes_priority):
        unfit = "priorities" if sampler.takes_priority else f"windows of {length} steps"
        raise ConfigError(
            f"replay.data adds single rows to every batch, which have no {unfit}; use agent=sac, agent.n_step=1 and "
            "replay.sampler=Uniform (recipe=rlpd), or leave replay.data out"
        )
    if isinstance(replay, HindsightReplay):
        _check_hindsight(replay, agent, length, reuses)
    if reuses and isinstance(sampler, Fresh):
        raise ConfigError(
            f"replay=fresh hands every row out once, but agent={agent} draws rows again and again; use replay=uniform "
            "or replay=priority"
        )
    if isinstance(sampler, Group):
        _check_group(replay, sampler, agent, groups, draws)
    _check_sources(replay, sampler)
    _check_keys(replay, agent, keys)


def _check_hindsight(replay: HindsightReplay, agent: str, length: int | None, reuses: bool) -> None:
    """Goals are exchanged in single transitions, for agents that look at nothing else."""
    if not reuses:
        raise ConfigError(
            f"replay=her exchanges goals, and agent={agent} learns from what its policy did for the goal that it saw: "
            "use agent=sac or agent=actor_critic"
        )
    if length is not None or replay.sampler.takes_priority:
        unfit = "priorities" if replay.sampler.takes_priority else f"windows of {length} steps (agent.n_step)"
        raise ConfigError(f"replay=her exchanges goals in single rows, which have no {unfit}: leave them out")


def _check_group(replay: Replay, sampler: Group, agent: str, groups: bool, draws: int | None) -> None:
    """Groups that the agent compares, of as many rows as the rollout samples."""
    if not groups:
        raise ConfigError(
            f"replay=group draws rows that share a group, which agent={agent} does not compare; use replay=uniform"
        )
    if draws is not None and draws % sampler.size:
        raise ConfigError(
            f"replay.sampler.size={sampler.size} does not divide the {draws} rows of an update; set it to "
            "rollout.group_size"
        )
    if len(replay) and not sampler.pending():
        raise ConfigError(
            f"replay.sampler.size={sampler.size}, but no {sampler.size} of the {len(replay)} collected rows share a "
            "group; set it to rollout.group_size"
        )


def check_written(
    replay: object, sources: Collection[int] | None, group_size: int | None, keys: Collection[str]
) -> None:
    """Refuses a sampler that would wait for rows which a rollout never writes, before any are collected.

    Args:
        replay: a :class:`~unified_rl.replay.Replay`.
        sources: of the rows that will be written; None where nobody knows.
        group_size: rows of a group at most; None where nobody knows.
        keys: columns that will be written; empty where nobody knows.

    Raises:
        ConfigError: names the setting and what works.
    """
    if not isinstance(replay, Replay):
        return
    sampler = replay.sampler
    for part in _drawn_from(sampler):
        if sources is not None and int(Source[part.source.upper()]) not in sources:
            raise _never_written(part)
    if isinstance(sampler, Group) and group_size is not None and sampler.size > group_size:
        held = "share no group" if group_size == 1 else f"come in groups of {group_size}"
        raise ConfigError(
            f"replay.sampler.size={sampler.size} waits for groups of so many rows, and those of this run {held}; use "
            "replay=uniform, or set it to rollout.group_size"
        )
    lacking = [key for key in sampler.keys if keys and key not in keys]
    if lacking:
        raise ConfigError(
            f"replay.sampler {type(sampler).__name__} needs {', '.join(lacking)}, which demonstrations do not have; "
            "use replay=uniform"
        )


def _drawn_from(sampler: Sampler) -> list[BySource]:
    """The parts of a sampler that need rows of one source."""
    if isinstance(sampler, Mixture):
        wanted = [] if sampler.share_missing else [p for name, p in sampler.parts.items() if sampler.quotas[name] > 0]
    else:
        wanted = [sampler]
    return [part for part in wanted if isinstance(part, BySource)]


def _never_written(part: BySource) -> ConfigError:
    return ConfigError(
        f"replay.sampler draws rows of source {part.source!r}, and this run's rollout writes none: use "
        "replay=uniform, a recipe that joins a second source (recipe=rlpd with replay.data=FOLDER), or set "
        "replay.sampler.share_missing=true"
    )


def _check_sources(replay: Replay, sampler: Sampler) -> None:
    """Rows of every source that a mixture draws from."""
    for part in _drawn_from(sampler):
        if len(replay) and not part.pending():
            raise _never_written(part)


def _check_keys(replay: Replay, agent: str, keys: Sequence[str]) -> None:
    """Columns of the collected rows, and of a data set beside them."""
    held = [] if replay.schema is None else [("rows", list(replay.schema.fields))]
    held += [("rows of replay.data", list(replay.stored.keys()))] if isinstance(replay, WithDataset) else []
    for name, columns in held:
        missing = [key for key in keys if key not in columns]
        if missing:
            raise ConfigError(
                f"agent={agent} learns from {', '.join(missing)}, which the {name} lack; record whole transitions with "
                "'unified-rl evaluate RUN --record FOLDER', or imitate with agent=behavior_cloning"
            )
