"""A supervised stage before reinforcement learning: imitate demonstrations until a loss threshold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.configurable import configurable
from unified_rl.errors import ConfigError
from unified_rl.instantiate import check_type
from unified_rl.learning_rate import LearningRate
from unified_rl.protocols import Demonstrates, Imitates, Normalizes, PlansUpdates, Stateful
from unified_rl.ranges import Count, NonNegative, Positive, Share, UnitInterval, Whole, ranged
from unified_rl.rollout.demonstrations import SEEN, style_option
from unified_rl.training.checkpoint import intact_checkpoint
from unified_rl.training.restoring import policy_state


class Imitator(Protocol):
    """An agent with a supervised optimiser step."""

    @property
    def policy(self) -> Imitates:
        """What is trained."""
        ...

    def step(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """One step on demonstrations; metrics with ``loss/nll``."""
        ...


MakeAgent: TypeAlias = Callable[..., Imitator]
"""From a learning rate, and as keywords the schedule's settings."""
Report: TypeAlias = Callable[[int, int, int, float, float | None], None]
"""``(stage, update, budget, loss, threshold)``."""


@configurable
@ranged("warm_start")
class WarmStart:
    """Stages of imitation on the environment's own demonstrations, or the policy of an earlier run.

    Reinforcement learning only sharpens what a policy can already sample, so a stage ends on a loss threshold rather
    than on a step count.

    Args:
        stages: each a mapping with optional keys ``style`` (passed to the environment's ``demonstrations``),
            ``until_loss`` (smoothed loss at which the stage ends), ``updates`` (optimiser steps; with ``until_loss``
            the most that are made, and reaching them is an error), ``lr``, and ``lr_schedule``, ``warmup_ratio`` and
            ``warmup_steps`` over those updates, see :class:`~unified_rl.learning_rate.LearningRate`.
        batch_size: demonstrations of one optimiser step.
        lr: learning rate of stages that name none.
        dataset: demonstrations drawn once and reused (None draws fresh ones every step). A policy that standardises
            observations takes its moments from them, or from several thousand fresh ones.
        smoothing: share of the old value in the smoothed loss.
        ema: of the weights of each stage, as of :class:`~unified_rl.agents.behavior_cloning.BehaviorCloning`; the
            averaged ones are what goes on.
        run: a run folder whose policy is loaded instead; ``stages`` are then skipped.

    Raises:
        ConfigError: a stage with an unknown key, or with neither ``until_loss`` nor ``updates``.
    """

    KEYS: ClassVar[dict[str, Any]] = {
        "style": str | None, "until_loss": Positive | None, "updates": Whole | None, "lr": NonNegative | None,
        "lr_schedule": str | dict[str, Any] | None, "warmup_ratio": UnitInterval | None, "warmup_steps": Whole | None,
    }  # fmt: skip
    SCHEDULE: ClassVar[tuple[str, ...]] = ("lr_schedule", "warmup_ratio", "warmup_steps")

    def __init__(
        self,
        stages: list[dict[str, Any]] | None = None,
        batch_size: Count = 256,
        lr: NonNegative = 1e-3,
        dataset: Count | None = None,
        smoothing: Share = 0.95,
        ema: Share | None = None,
        run: str | None = None,
    ) -> None:
        self.stages = [dict(stage) for stage in stages or []]
        self.batch_size, self.lr, self.dataset, self.smoothing, self.run = batch_size, lr, dataset, smoothing, run
        self.ema = ema
        self.check_settings({"stages": self.stages})

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> None:
        """Refuses stages that cannot be run, when a run is composed.

        Raises:
            ConfigError: a stage with an unknown key or a value outside its range, or without an end.
        """
        for number, stage in enumerate(settings.get("stages") or ()):
            where = f"warm_start.stages[{number}]"
            unknown = [key for key in stage if key not in cls.KEYS]
            if unknown:
                raise ConfigError(f"{where} has unknown keys {unknown}; known: {', '.join(cls.KEYS)}")
            for key, value in stage.items():
                check_type(value, cls.KEYS[key], f"{where}.{key}")
            if stage.get("until_loss") is None and stage.get("updates") is None:
                raise ConfigError(f"{where} needs until_loss or updates")
            cls._check_schedule(stage, where)

    @classmethod
    def _check_schedule(cls, stage: Mapping[str, Any], where: str) -> None:
        """Refuses a schedule that cannot be made, or one of a stage whose length nobody knows."""
        given = cls.schedule_of(stage)
        rate = LearningRate(
            1.0,
            given.get("lr_schedule", "constant"),
            given.get("warmup_steps", 0),
            given.get("warmup_ratio", 0.0),
            where,
        )
        if rate.moves and stage.get("updates") is None:
            raise ConfigError(f"{rate.at} follows the length of the stage: set {where}.updates, the most that are made")
        if rate.moves:
            rate.plan(stage["updates"])

    @classmethod
    def schedule_of(cls, stage: Mapping[str, Any]) -> dict[str, Any]:
        """What a stage says of its learning rate's schedule."""
        return {key: stage[key] for key in cls.SCHEDULE if stage.get(key) is not None}

    def load_policy(self, policy: Stateful) -> None:
        """Loads the policy of :attr:`run`, of its newest intact checkpoint.

        Raises:
            CheckpointError: no such run, or no intact checkpoint in it.
            ConfigError: the run's policy has another shape.
        """
        assert self.run is not None
        weights = policy_state(intact_checkpoint(Path(self.run), replay=False)[1], self.run)
        try:
            policy.load_state_dict(weights)
        except (RuntimeError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ConfigError(
                f"the policy of {self.run} does not fit this one: {str(error).splitlines()[0]}"
            ) from error

    def fit(
        self, env: Demonstrates, make_agent: MakeAgent, demonstration_generator: torch.Generator, report: Report
    ) -> None:
        """Runs the stages.

        Args:
            env: with demonstrations.
            make_agent: ``lr -> BehaviorCloning`` over the policy to train, with a stage's schedule where it has one.
            demonstration_generator: stream of the demonstrations.
            report: called with ``(stage, update, budget, loss, threshold)`` after every step.

        Raises:
            ConfigError: a stage used up its updates above its threshold.
        """
        for number, stage in enumerate(self.stages):
            lr = stage.get("lr")
            schedule = self.schedule_of(stage)
            average = {} if self.ema is None else {"ema": self.ema}
            agent = make_agent(self.lr if lr is None else lr, **schedule, **average)
            if schedule and isinstance(agent, PlansUpdates):
                agent.plan_updates(stage["updates"])
            self._run_stage(number, stage, env, agent, demonstration_generator, report)

    def _run_stage(
        self,
        number: int,
        stage: dict[str, Any],
        env: Demonstrates,
        agent: Imitator,
        stream: torch.Generator,
        report: Report,
    ) -> None:
        style, threshold, budget = stage.get("style"), stage.get("until_loss"), stage.get("updates")
        budget = 20_000 if budget is None else budget
        options = style_option(env, style, f"warm_start.stages[{number}].style")
        pool = env.demonstrations(self.dataset, stream, **options) if self.dataset else None
        smooth = math.nan
        for update in range(1, budget + 1):
            if pool is None:
                batch = env.demonstrations(self.batch_size, stream, **options)
            else:
                batch = pool[torch.randint(len(pool), (self.batch_size,), generator=stream)]
            if (number, update) == (0, 1) and isinstance(agent.policy, Normalizes):
                seen = batch if pool is None else pool
                if pool is None and len(batch) < SEEN:  # one batch says little; the stream of the batches does not move
                    seen = env.demonstrations(SEEN, stream.clone_state(), **options)
                agent.policy.update_normalizer(seen["observation"])
            loss = float(agent.step(batch)["loss/nll"])
            smooth = loss if math.isnan(smooth) else self.smoothing * smooth + (1 - self.smoothing) * loss
            report(number, update, budget, smooth, threshold)
            if threshold is not None and smooth <= threshold:
                return
        if threshold is not None:
            raise ConfigError(
                f"warm start stage {number} ended at loss {smooth:.4f} after {budget} updates, above until_loss="
                f"{threshold}; raise its updates or its lr, or loosen the threshold"
            )
