"""Demonstrations as a source of rows: an environment's own expert, or rows that some agent recorded."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.configurable import configurable
from unified_rl.errors import ConfigError
from unified_rl.policies.base import Policy
from unified_rl.policies.normalizer import MOMENTS
from unified_rl.protocols import ControlEnv, Demonstrates, HasSpace, LanguageEnv, Normalizes, Trainable, domain_of
from unified_rl.ranges import Count, Share, ranged
from unified_rl.replay import read_rows
from unified_rl.rollout.language import epoch_of
from unified_rl.rollout.windows import fitted_windows, held_out, refuse_single_steps
from unified_rl.spaces import Space
from unified_rl.units import Source

KEYS = {"control": ("observation", "action"), "language": ("tokens", "token_mask", "mask")}

SEEN = 4096
"""Demonstrations of an expert without end that moments are taken of."""
TRANSITION = ("reward", "next_observation", "terminated")
"""What offline agents learn from beside these."""


def style_option(env: Any, style: str | None, where: str) -> dict[str, str]:
    """The keyword arguments of an environment's ``demonstrations``: its style, if one is asked for.

    Args:
        env: the environment.
        style: of the demonstrations; None is the environment's own default.
        where: the full name of the setting that holds ``style``.

    Raises:
        ConfigError: the environment's demonstrations have no style.
    """
    if style is None:
        return {}
    taken = inspect.signature(env.demonstrations).parameters.values()
    if not any(p.name == "style" or p.kind is p.VAR_KEYWORD for p in taken):
        raise ConfigError(f"{where}={style}, but demonstrations of {type(env).__name__} have no style; leave it out")
    return {"style": style}


@configurable
@ranged("rollout")
class DemonstrationRollout:
    """Hands supervised rows to the replay, for behaviour cloning and supervised fine-tuning.

    A policy that standardises observations takes its moments from the whole of ``data``, or from several
    thousand of an environment's own.

    Args:
        env: the environment, with ``demonstrations(count, generator)`` unless ``data`` is given.
        policy: the policy to be trained.
        generator: the stream that rows are drawn from.
        problem_generator: the stream that a language task's demonstrations are drawn from.
        rows: rows of one call of :meth:`collect`.
        data: folder of recorded rows (``unified-rl evaluate RUN --record FOLDER``); else the environment's own.
        style: passed to the demonstrations of a language task.
        validation: share of the episodes of ``data`` that are held out; evaluation tells their loss, ``eval/nll``.
        streams: named streams of the run; without them the first stream of seed 0 chooses what is held out.

    Attributes:
        rows: rows of one collection.
        length: None; they are single rows.
        held_out: what ``validation`` keeps from training, or None.

    Raises:
        CheckpointError: ``data`` is missing or damaged.
        ConfigError: its rows are of another domain, or do not fit the environment
            (:func:`~unified_rl.rollout.recorded.fitted`), or ``style`` where there is none.
    """

    staleness = 0
    whole = False
    """Keep every recorded key, not only what supervised losses read."""
    source = Source.DEMONSTRATION

    def __init__(
        self,
        env: ControlEnv | LanguageEnv,
        policy: Trainable,
        generator: torch.Generator,
        problem_generator: torch.Generator | None = None,
        rows: Count = 256,
        data: str | None = None,
        style: str | None = None,
        validation: Share = 0.0,
        streams: Callable[[str], torch.Generator] | None = None,
    ) -> None:
        self.env, self.policy, self.generator = env, policy, problem_generator or generator
        self.domain, self.steps = domain_of(env), 0
        self.rows, self.length, self.steps_per_collect = rows, None, rows
        if style is not None and data is not None:
            raise ConfigError(
                f"rollout.style={style} is of an environment's own demonstrations; leave rollout.data out"
            )
        if validation and (data is None or self.domain == "language"):
            raise ConfigError(
                f"rollout.validation={validation} holds out episodes of a robot's rollout.data: leave it out"
                + ("" if self.domain == "control" else " (env.held_out is for tasks of tokens)")
            )
        if validation and self.whole:
            raise ConfigError("rollout.validation is of imitation, and this run learns from rewards: leave it out")
        self.pool = None if data is None else self._read(data)
        self.held_out: TensorDict | None = None
        if validation and self.pool is not None:
            stream = torch.Generator().manual_seed(0) if streams is None else streams("validation")
            self.pool, self.held_out = held_out(self.pool, validation, stream, f"rollout.data={data}")
        if self.pool is not None and not self.whole:
            self.pool = self.pool.select(*KEYS[self.domain])
        self.expert = env if isinstance(env, Demonstrates) else None
        self.normalizes = policy if isinstance(policy, Normalizes) else None
        if self.pool is None and self.expert is None:
            raise ConfigError(
                f"{type(env).__name__} has no scripted expert to imitate; set rollout.data to a folder of rows"
            )
        self.options = style_option(env, style, "rollout.style")
        if self.pool is None and self.domain == "language" and self.expert is not None:  # is there one that fits?
            self.expert.demonstrations(1, torch.Generator().manual_seed(0), **self.options)

    def _read(self, data: str) -> TensorDict:
        rows = read_rows(data, "rollout.data")
        rows = rows.reshape(rows.numel())
        missing = [key for key in KEYS[self.domain] if key not in rows.keys()]
        if missing:
            raise ConfigError(f"the rows of rollout.data={data} lack {', '.join(missing)}: they are of another domain")
        lacking = [key for key in TRANSITION if self.whole and key not in rows.keys()]
        if lacking:
            raise ConfigError(
                f"an offline agent learns from {', '.join(lacking)}, which the rows of rollout.data={data} lack; "
                "record whole transitions with 'unified-rl evaluate RUN --record FOLDER', or imitate with "
                "agent=behavior_cloning"
            )
        if self.domain == "control":
            refuse_single_steps(rows, self.env, f"rollout.data={data}")
            rows, space = rows.exclude(MOMENTS), self._space()  # of the policy that recorded them
            rows = rows if self.whole else rows.select(*KEYS["control"], "episode", "step", strict=False)
            rows = fitted_windows(rows, self.env, space, f"rollout.data={data}")
        return rows

    def _space(self) -> Space:
        if isinstance(self.env, ControlEnv):
            return Space.of(self.env.policy_inputs())
        assert isinstance(self.policy, HasSpace)
        return self.policy.space

    def collect(self, version: int) -> tuple[TensorDict, dict[str, float]]:
        """``[rows]`` demonstrations, source :attr:`~unified_rl.units.Source.DEMONSTRATION`.

        Of a task that counts its epochs also ``rollout/epoch``.
        """
        count = self.steps_per_collect
        if self.pool is not None:
            rows = self.pool[torch.randint(len(self.pool), (count,), generator=self.generator)]
        else:
            assert self.expert is not None
            rows = self.expert.demonstrations(count, self.generator, **self.options).select(*KEYS[self.domain])
        metrics = epoch_of(self.env, self.generator)
        rows["source"] = torch.full((count,), int(self.source))
        if self.steps == 0 and self.normalizes is not None:
            self._standardise(self.normalizes)
        self.steps += count
        return rows, metrics

    def _standardise(self, policy: Normalizes) -> None:
        """Moments of the whole data set, since a batch misses what is rare in it; pre-trained weights keep theirs."""
        if float(getattr(getattr(policy, "normalizer", None), "count", 0.0)) > 0:
            return
        policy.update_normalizer(self._all_observations().to(self.policy.device))
        if self.whole and isinstance(policy, Policy):  # learners of whole transitions would move them by every batch
            policy.freeze_moments()

    def _all_observations(self) -> Tensor:
        """Of the data set; of an expert without end :data:`SEEN`, and the stream of the rows does not move."""
        if self.pool is not None:
            parts = [self.pool] if self.held_out is None else [self.pool, self.held_out]
            return torch.cat([part["observation"] for part in parts])
        assert self.expert is not None
        stream = torch.Generator()
        stream.set_state(self.generator.get_state())
        seen: Tensor = self.expert.demonstrations(max(SEEN, self.rows), stream, **self.options)["observation"]
        return seen

    def state_dict(self) -> dict[str, Any]:
        """The stream and the count, and what a token task keeps of the problems that it showed."""
        shown = {"env": self.env.state_dict()} if self.domain == "language" else {}
        return {"generator": self.generator.get_state(), "steps": self.steps, **shown}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.generator.set_state(state["generator"])
        self.steps = state["steps"]
        if "env" in state:
            self.env.load_state_dict(state["env"])

    def restart(self, state: dict[str, Any], seed: int) -> None:
        """Goes on behind :meth:`state_dict` with a stream from ``seed``."""
        self.generator.manual_seed(seed)
        self.steps = state["steps"]


@configurable
class StoredRollout(DemonstrationRollout):
    """Recorded transitions with their rewards, ``rows`` a collection, for offline reinforcement learning."""

    whole = True
    source = Source.OFFLINE
