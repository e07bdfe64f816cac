"""Coefficients of terms: constants, schedules over a run, and controllers that follow a metric."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from unified_rl.correction.lookup import bind
from unified_rl.errors import ConfigError
from unified_rl.instantiate import nearest
from unified_rl.objectives.unsettled import Unsettled
from unified_rl.ranges import (
    AtLeastOne,
    Count,
    Fraction,
    NonNegative,
    Positive,
    Seed,
    Share,
    UnitInterval,
    Whole,
    ordered,
    ranged,
)

Coefficient = Callable[[float, int], float]
"""``(progress in [0, 1], update number) -> value``."""


DOUBLING = math.log(2)


@runtime_checkable
class Controller(Protocol):
    """A coefficient with a state, moved by a metric of the updates before.

    One that follows several has them all in a further attribute, ``metrics: tuple[str, ...]``.
    """

    metric: str

    def __call__(self, progress: float, update: int) -> float:
        """The present value."""
        ...

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """Takes in the metrics of an update."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a bit-exact continuation needs."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores it."""
        ...


@dataclass(frozen=True)
class Constant:
    """The same value always."""

    value: float

    def __call__(self, progress: float, update: int) -> float:
        """The value."""
        return self.value


@dataclass(frozen=True, kw_only=True)
class Linear:
    """From ``start`` to ``end`` over the run."""

    start: float
    end: float = 0.0

    def __call__(self, progress: float, update: int) -> float:
        """The value at this progress."""
        return self.start + (self.end - self.start) * progress


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """From ``start`` to ``end`` over the run, along half a cosine (SGDR, 1608.03983, without restarts)."""

    start: float
    end: float = 0.0

    def __call__(self, progress: float, update: int) -> float:
        """The value at this progress."""
        return half_cosine(self.start, self.end, progress)


@ranged()
@dataclass(frozen=True, kw_only=True)
class Exponential:
    """``start`` times ``decay`` to the number of the update, not below ``floor``."""

    start: float
    decay: Fraction
    floor: float = 0.0

    def __call__(self, progress: float, update: int) -> float:
        """The value at this update."""
        return max(self.floor, self.start * self.decay**update)


@ranged()
@dataclass(frozen=True, kw_only=True)
class WarmupCosine:
    """Linear to ``peak`` over ``warmup`` updates, a cosine to ``valley`` over ``decay``, then constant.

    CHORD, 2508.11408.
    """

    peak: float
    valley: float
    warmup: Whole = 200
    decay: Count = 400

    def __call__(self, progress: float, update: int) -> float:
        """The value at this update."""
        if update < self.warmup:
            return self.peak * update / self.warmup
        share = min(1.0, (update - self.warmup) / self.decay)
        return half_cosine(self.peak, self.valley, share)


@ranged()
@dataclass(frozen=True, kw_only=True)
class Steps:
    """``values[i]`` from update ``at[i - 1]`` to ``at[i]``: one value more than boundaries."""

    at: tuple[Whole, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        _require(len(self.values) == len(self.at) + 1, "values", list(self.values), "hold one more entry than at")
        _require(list(self.at) == sorted(self.at), "at", list(self.at), "increase")

    def __call__(self, progress: float, update: int) -> float:
        """The value at this update."""
        return self.values[sum(update >= boundary for boundary in self.at)]


@ranged()
@dataclass(frozen=True, kw_only=True)
class Sometimes:
    """``value`` in a share of the updates, drawn by their number, and 0 in the others. InK-GRPO, 2601.18129."""

    value: float
    probability: UnitInterval = 0.5
    seed: Seed = 0

    def __call__(self, progress: float, update: int) -> float:
        """The value at this update."""
        drawn = random.Random(f"{self.seed}/{update}").random()  # a stream of its own, the same after a resume
        return self.value if drawn < self.probability else 0.0


@ordered("low", "high")
@ranged()
class ProportionalIntegral:
    """Moves a coefficient so that a metric comes to a target: ``base + gain e + integral sum(e)``. EntroPIC.

    ``e = target - metric`` of the update before; the value stays within the bounds.

    Args:
        metric: a name in the run's metrics.
        target: its wanted value.
        base: the value where the error is 0.
        gain: of the last error.
        integral: of the sum of all errors.
        low, high: bounds.
        windup: bound of the sum's size, so that a bound of the value that was long held is left at once; None is none.

    Raises:
        ConfigError: a setting out of its range; :func:`coefficient` also refuses ``low`` above ``high``.
    """

    def __init__(
        self,
        *,
        metric: str,
        target: float,
        base: float = 0.0,
        gain: float = 1.0,
        integral: float = 0.0,
        low: float = 0.0,
        high: float = 1.0,
        windup: Positive | None = None,
    ) -> None:
        self.metric, self.target, self.base, self.gain, self.integral = metric, target, base, gain, integral
        self.low, self.high, self.windup = low, high, math.inf if windup is None else windup
        self.error = self.sum = 0.0

    def __call__(self, progress: float, update: int) -> float:
        """The present value."""
        return min(self.high, max(self.low, self.base + self.gain * self.error + self.integral * self.sum))

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """Takes in the metrics of an update, which hold the metric."""
        self.error = self.target - float(metrics[self.metric])
        self.sum = min(self.windup, max(-self.windup, self.sum + self.error))

    def state_dict(self) -> dict[str, Any]:
        """The last error and the sum of all."""
        return {"error": self.error, "sum": self.sum}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.error, self.sum = state["error"], state["sum"]


@ranged()
class Dual:
    """A multiplier that grows while a metric is above its limit: ``log c += rate * sign(metric - limit)``.

    The adaptive coefficient of "Proximal Policy Optimization Algorithms" (1707.06347, section 4) doubles and halves: a
    ``rate`` of log 2, with a factor of ``slack`` around the limit within which nothing moves.

    Args:
        metric: a name in the run's metrics.
        limit: above 0.
        start: first value, above 0.
        rate: step of the logarithm.
        slack: at least 1.

    Raises:
        ConfigError: a setting out of its range.
    """

    def __init__(
        self,
        *,
        metric: str,
        limit: Positive,
        start: Positive = 1.0,
        rate: NonNegative = DOUBLING,
        slack: AtLeastOne = 1.5,
    ) -> None:
        self.metric, self.limit, self.rate, self.slack = metric, limit, rate, slack
        self.value = start

    def __call__(self, progress: float, update: int) -> float:
        """The present value."""
        return self.value

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """Takes in the metrics of an update, which hold the metric."""
        found = float(metrics[self.metric])
        up, down = found > self.limit * self.slack, found < self.limit / self.slack
        self.value *= math.exp(self.rate * (int(up) - int(down)))

    def state_dict(self) -> dict[str, Any]:
        """The value."""
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores it."""
        self.value = state["value"]


@ranged()
class Logistic:
    """Between ``low`` and ``high`` along a logistic curve of a metric of the update before. FG-ExPO's weight of a KL.

    ``low + (high - low) / (1 + exp(-(metric - middle) / width))``; before any update the metric counts as ``first``.

    Args:
        metric: a name in the run's metrics.
        low, high: values far below and far above the middle.
        middle: of the curve.
        width: of the metric over which it rises.
        first: the metric before the first update.

    Raises:
        ConfigError: a setting out of its range.
    """

    def __init__(
        self,
        *,
        metric: str,
        high: float,
        low: float = 0.0,
        middle: float = 0.5,
        width: Positive = 0.1,
        first: float = 0.0,
    ) -> None:
        self.metric, self.low, self.high, self.middle, self.width = metric, low, high, middle, width
        self.seen = first

    def __call__(self, progress: float, update: int) -> float:
        """The present value."""
        x = (self.seen - self.middle) / self.width
        share = 0.5 * (1.0 + math.tanh(0.5 * x))  # the logistic function, which never overflows so
        return self.low + (self.high - self.low) * share

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """Takes in the metrics of an update, which hold the metric."""
        self.seen = float(metrics[self.metric])

    def state_dict(self) -> dict[str, Any]:
        """The metric as it was last."""
        return {"seen_metric": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores it."""
        self.seen = state["seen_metric"]


@ordered("low", "high")
@ranged()
class KlThreshold:
    """Coefficient of a KL divergence that is punished by its square above a threshold. SAFE.

    The penalty is ``scale * (kl - threshold)^2 * gate`` where the KL's moving average exceeds the threshold, so its
    gradient is that of the KL times ``2 scale (kl - threshold) gate``, the value here. The gate grows as the policy
    grows certain, ``max(floor, entropy_scale / (entropy + entropy_offset))``. The threshold follows the reward:
    ``clip((base + pid) * phase, low, high)``, a PID control of the rise of the reward's moving average above
    ``wanted_rise``; ``phase`` is ``warmup_factor`` in the first ``warmup`` updates and 1 later (the release tells
    further phases apart).

    Args:
        metric: the KL, a name in the run's metrics.
        entropy, reward: names of those.
        base, low, high: of the threshold.
        proportional, integral, derivative: gains of the control.
        wanted_rise: of the reward's average from one update to the next.
        windup: bound of the size of the integral.
        warmup, warmup_factor: see above.
        scale: of the penalty.
        entropy_scale, entropy_offset, floor: of the gate.
        decay, reward_decay: of the moving averages of the KL, which starts at 0, and of the reward.

    Raises:
        ConfigError: a setting out of its range; :func:`coefficient` also refuses ``low`` above ``high``.
    """

    def __init__(
        self,
        *,
        metric: str,
        entropy: str = "policy/entropy",
        reward: str = "train/reward",
        base: NonNegative = 0.3,
        low: NonNegative = 0.1,
        high: NonNegative = 0.6,
        proportional: float = 0.3,
        integral: float = 0.01,
        derivative: float = 0.05,
        wanted_rise: float = 0.001,
        windup: Positive = 1.0,
        warmup: Whole = 50,
        warmup_factor: Positive = 1.5,
        scale: NonNegative = 0.1,
        entropy_scale: NonNegative = 2.0,
        entropy_offset: Positive = 0.1,
        floor: NonNegative = 0.5,
        decay: Share = 0.9,
        reward_decay: Share = 0.95,
    ) -> None:
        self.metric, self.entropy, self.reward = metric, entropy, reward
        self.base, self.low, self.high = base, low, high
        self.gains, self.wanted_rise, self.windup = (proportional, integral, derivative), wanted_rise, windup
        self.warmup, self.warmup_factor, self.scale = warmup, warmup_factor, scale
        self.gate = floor, entropy_scale, entropy_offset
        self.decay, self.reward_decay = decay, reward_decay
        self.state: dict[str, float] = {"kl": 0.0, "nats": 0.0, "error": 0.0, "sum": 0.0, "pid": 0.0, "updates": 0}
        self.average: float | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        """The KL, the entropy and the reward."""
        return self.metric, self.entropy, self.reward

    @property
    def threshold(self) -> float:
        """Of the KL's moving average, at present."""
        phase = self.warmup_factor if self.state["updates"] < self.warmup else 1.0
        return min(self.high, max(self.low, (self.base + self.state["pid"]) * phase))

    def __call__(self, progress: float, update: int) -> float:
        """The present value; 0 at or below the threshold."""
        floor, scale, offset = self.gate
        gate = max(floor, scale / (max(self.state["nats"], 0.0) + offset))
        return 2.0 * self.scale * max(0.0, self.state["kl"] - self.threshold) * gate

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """Takes in the metrics of an update, which hold all three."""
        state = self.state
        kl, state["nats"], reward = (float(metrics[name]) for name in self.metrics)
        state["kl"] = self.decay * state["kl"] + (1 - self.decay) * kl
        before = reward if self.average is None else self.average
        self.average = self.reward_decay * before + (1 - self.reward_decay) * reward
        error = self.average - before - self.wanted_rise
        state["sum"] = min(self.windup, max(-self.windup, state["sum"] + error))
        proportional, integral, derivative = self.gains
        change = error - state["error"] if state["updates"] else 0.0
        state["pid"] = proportional * error + integral * state["sum"] + derivative * change
        state["error"], state["updates"] = error, state["updates"] + 1

    def state_dict(self) -> dict[str, Any]:
        """Averages, the control's memory, and the number of updates seen."""
        return {**self.state, "average": self.average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.state = {key: state[key] for key in self.state}
        self.average = state["average"]


class Complement:
    """One minus another coefficient."""

    def __init__(self, inner: Coefficient) -> None:
        self.inner = inner

    def __call__(self, progress: float, update: int) -> float:
        """The value."""
        return 1.0 - self.inner(progress, update)


class Observed:
    """A controller in a run: refuses a metric that the run does not report, and keeps what it needs to go on.

    A metric that was seen once may be missing later: an update whose rows are all dropped reports little.

    Args:
        controller: what follows the metric.
        where: the full name of its setting, for errors.
        complement: the value is one minus the controller's.
    """

    def __init__(self, controller: Controller, where: str, complement: bool = False) -> None:
        self.controller, self.where, self.complement, self.seen = controller, where, complement, False

    @property
    def metrics(self) -> tuple[str, ...]:
        """What it follows."""
        several: tuple[str, ...] | None = getattr(self.controller, "metrics", None)
        return (self.controller.metric,) if several is None else several

    def __call__(self, progress: float, update: int) -> float:
        """The present value."""
        value = self.controller(progress, update)
        return 1.0 - value if self.complement else value

    def observe(self, metrics: Mapping[str, Any], reported: Collection[str] = ()) -> None:
        """Takes in the metrics of an update.

        Args:
            metrics: by name.
            reported: names that parts of the run report now and then.

        Raises:
            ConfigError: a first update that took optimiser steps reported no such metric; names the nearest.
        """
        missing = [name for name in self.metrics if name not in metrics]
        if not missing:
            self.seen = True
            self.controller.observe(metrics)
        elif not self.seen and missing[0] not in reported and any(name.startswith("loss/") for name in metrics):
            near = nearest(missing[0], [*metrics, *reported])
            setting = next((key for key, value in vars(self.controller).items() if value == missing[0]), "metric")
            raise ConfigError(f"{self.where}.{setting} {missing[0]!r} is reported by no part of this run; {near}")

    def state_dict(self) -> dict[str, Any]:
        """Of the controller."""
        return {"seen": self.seen, **self.controller.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.seen = bool(state["seen"])
        self.controller.load_state_dict({key: value for key, value in state.items() if key != "seen"})


COEFFICIENTS: dict[str, Callable[..., Any]] = {
    "linear": Linear,
    "cosine": Cosine,
    "exponential": Exponential,
    "warmup_cosine": WarmupCosine,
    "steps": Steps,
    "sometimes": Sometimes,
    "proportional_integral": ProportionalIntegral,
    "dual": Dual,
    "logistic": Logistic,
    "kl_threshold": KlThreshold,
    "unsettled": Unsettled,
}
"""Schedules and controllers by name; their settings are keyword arguments."""


def coefficient(node: Any, where: str = "coefficient") -> Any:
    """A number, or a mapping with ``name`` (see :data:`COEFFICIENTS`); ``complement: true`` makes it one minus that.

    Raises:
        ConfigError: no finite number, an unknown name, or settings that do not fit; starts with ``where``.
    """
    if callable(node):
        return node
    if isinstance(node, bool) or (isinstance(node, int | float) and not math.isfinite(node)) or node is None:
        raise ConfigError(f"{where} is {node!r}; it must be a finite number, or a mapping with a name")
    if isinstance(node, int | float):
        return Constant(float(node))
    make, extra = bind(node, COEFFICIENTS, where, {"complement": bool})
    try:
        made = make()
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}") from error
    complement = extra.get("complement", False)
    if isinstance(made, Controller):
        return Observed(made, where, complement)
    return Complement(made) if complement else made


def half_cosine(start: float, end: float, share: float) -> float:
    """From ``start`` at share 0 to ``end`` at 1."""
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * share))


def _require(holds: bool, name: str, value: Any, what: str) -> None:
    if not holds:
        raise ConfigError(f"{name} must {what}, got {value}")
