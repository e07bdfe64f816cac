"""Learning-rate schedules over gradient steps: those of transformers by name, any other by its dotted path."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from unified_rl.errors import ConfigError, UnifiedRLError
from unified_rl.instantiate import allowed, locate, nearest
from unified_rl.optimizer import optimizer_class
from unified_rl.ranges import shown

SCHEDULES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
)
"""Names of ``transformers.get_scheduler`` (``lr_scheduler_type`` of its Trainer and of TRL's)."""
TOTALS = ("num_training_steps", "total_steps", "T_max", "total_iters")
"""Parameters of a schedule that are the number of gradient steps of the run, where nobody sets them."""
TORCH = "torch.optim.lr_scheduler."

Node = str | Mapping[str, Any]


class LearningRate:
    """The learning rate of every gradient step of a run.

    The rate is a function of the number of gradient steps before it, so nothing but that number is kept: a resumed run
    goes on exactly. Rates are those that the schedule gives to an optimiser of learning rate ``lr``; as in
    transformers, a warm-up begins at 0.

    Args:
        lr: the rate that a schedule scales.
        schedule: a name of :data:`SCHEDULES`, a dotted path (``torch.optim.lr_scheduler:StepLR``; others under
            ``--allow``), or a mapping with ``name`` and the schedule's own settings.
        warmup_steps: gradient steps in which the rate rises linearly from 0.
        warmup_ratio: their share of the run, instead.
        where: the group of the settings, for errors.
        annealed: ``anneal_lr`` is set, which is a schedule of its own.

    Raises:
        ConfigError: an unknown schedule (names the nearest), wrong settings of one, two lengths of the warm-up,
            or two schedules.
    """

    def __init__(
        self,
        lr: float,
        schedule: Node = "constant",
        warmup_steps: int = 0,
        warmup_ratio: float = 0.0,
        where: str = "agent",
        annealed: bool = False,
    ) -> None:
        self.lr, self.where, self.at = lr, where, f"{where}.lr_schedule"
        node = {"name": schedule} if isinstance(schedule, str) else dict(schedule)
        if not isinstance(node.get("name"), str):
            raise ConfigError(f"{self.at} needs a name, got {shown(schedule)}; known: {', '.join(SCHEDULES)}")
        if warmup_steps and warmup_ratio:
            raise ConfigError(
                f"{where}.warmup_steps={warmup_steps} and {where}.warmup_ratio={warmup_ratio} both say how long the "
                "warm-up is; set one of them"
            )
        self.warmup_steps, self.warmup_ratio = warmup_steps, warmup_ratio
        self.warms_up = bool(warmup_steps or warmup_ratio)
        self.name: str = node.pop("name")
        if self.name == "constant" and self.warms_up:
            self.name = "constant_with_warmup"
        self.settings = node
        if self.settings and self.name.startswith("constant"):
            raise ConfigError(f"{self.at}={self.name} has no settings; take out {', '.join(self.settings)}")
        self.total: int | None = None
        self.per_update = 1
        self._made: tuple[Any, Any] | None = None
        self._step = 0
        if self.moves and annealed:
            raise ConfigError(
                f"{where}.anneal_lr and {self.at}={self.name} are two schedules of one rate: leave anneal_lr out "
                "(lr_schedule=linear falls to 0 too)"
            )
        if self.moves:
            self._build(100, 10 if self.warms_up else 0)  # what is wrong with the settings shows at once

    @property
    def moves(self) -> bool:
        """Whether the rate ever differs from ``lr``."""
        return self.name != "constant"

    def plan(self, updates: int, per_update: int = 1) -> None:
        """Says how long the run is.

        Args:
            updates: of the run.
            per_update: gradient steps of an update.

        Raises:
            ConfigError: the warm-up is longer than the run.
        """
        self.total, self.per_update, self._made = max(1, updates * per_update), per_update, None
        if self.warmup_steps > self.total:
            raise ConfigError(
                f"{self.where}.warmup_steps={self.warmup_steps} is more than the {self.total} gradient steps of the "
                f"run: set {self.where}.warmup_ratio to a share of it, or raise steps"
            )

    def of_update(self, update: int, step: int) -> float:
        """The rate of gradient step ``step`` of an update; an update that makes more than planned ends at its last."""
        return self(update * self.per_update + min(step, self.per_update - 1))

    def __call__(self, step: int) -> float:
        """The rate after ``step`` gradient steps.

        Raises:
            ConfigError: the schedule needs the length of the run, and :meth:`plan` was never called.
        """
        if not self.moves:
            return self.lr
        if self.total is None:
            raise ConfigError(
                f"{self.at}={self.name} follows the length of the run, which nobody has told: call "
                "plan_updates(updates) of the agent before its first update"
            )
        if self._made is None or step < self._step:
            warm = self.warmup_steps or math.ceil(self.total * self.warmup_ratio)
            self._made, self._step = self._build(self.total, warm), 0
        optimizer, scheduler = self._made
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the order of steps of an optimiser that trains nothing
            for _ in range(step - self._step):
                scheduler.step()
        self._step = step
        return float(optimizer.param_groups[0]["lr"])

    def _build(self, total: int, warm: int) -> tuple[Any, Any]:
        """An optimiser of nothing, and the schedule that moves its rate."""
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=self.lr, momentum=0.9)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return optimizer, self._scheduler(optimizer, total, warm)
        except UnifiedRLError:
            raise
        except Exception as error:  # each schedule checks its settings with errors of its own
            raise ConfigError(f"{self.at}: {self.name}: {' '.join(str(error).split())[:200]}") from error

    def _scheduler(self, optimizer: Any, total: int, warm: int) -> Any:
        name = self.name.replace(":", ".")
        if name in SCHEDULES:
            from transformers import get_scheduler

            settings = {"scheduler_specific_kwargs": dict(self.settings)} if self.settings else {}
            return get_scheduler(name, optimizer, num_warmup_steps=warm, num_training_steps=total, **settings)
        make = _located(name, self.at)
        known = inspect.signature(make).parameters
        for key in self.settings:
            if key not in known:
                raise ConfigError(f"{self.at} {self.name!r} has no setting {key!r}; {nearest(key, known)}")
        given = {key: total for key in TOTALS if key in known and _unset(known[key])}
        if "num_warmup_steps" in known:
            given["num_warmup_steps"] = warm
        elif self.warms_up:
            raise ConfigError(
                f"{self.at} {self.name!r} has no warm-up: set {self.where}.warmup_steps and warmup_ratio to 0, or use "
                "one of " + ", ".join(SCHEDULES)
            )
        found = make(optimizer, **{**given, **self.settings})
        if not isinstance(found, torch.optim.lr_scheduler.LRScheduler) or _needs_metric(found):
            raise ConfigError(
                f"{self.at} {self.name!r} must give a torch.optim.lr_scheduler.LRScheduler whose step() takes nothing; "
                "for example torch.optim.lr_scheduler:StepLR"
            )
        return found


def check_learning(settings: Mapping[str, Any], lr: float = 1e-3, where: str = "agent") -> None:
    """Refuses an optimiser or a schedule that cannot be made, when a run is composed.

    Args:
        settings: of the agent.
        lr: where they hold none.
        where: the agent's group.

    Raises:
        ConfigError: under the setting's full name.
    """
    optimizer_class(settings.get("optimizer") or "adamw", f"{where}.optimizer")
    steps, ratio = settings.get("warmup_steps") or 0, settings.get("warmup_ratio") or 0.0
    schedule, annealed = settings.get("lr_schedule") or "constant", bool(settings.get("anneal_lr"))
    LearningRate(settings.get("lr") or lr, schedule, steps, ratio, where, annealed)


def _unset(parameter: inspect.Parameter) -> bool:
    return parameter.default is inspect.Parameter.empty or parameter.default is None


def _needs_metric(scheduler: Any) -> bool:
    return isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)


def _located(name: str, where: str) -> Any:
    if "." not in name:
        raise ConfigError(f"{where} {shown(name)} is unknown; {nearest(name, SCHEDULES)}")
    if name.startswith(TORCH):
        found = getattr(torch.optim.lr_scheduler, name.removeprefix(TORCH), None)
        if not isinstance(found, type) or not issubclass(found, torch.optim.lr_scheduler.LRScheduler):
            known = [n for n in torch.optim.lr_scheduler.__all__ if n.endswith(("LR", "Restarts"))]
            raise ConfigError(f"{where} {shown(name)} is no schedule of torch; {nearest(name.split('.')[-1], known)}")
        return found
    return locate(name, allowed(), where, key="")
