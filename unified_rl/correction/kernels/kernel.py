"""What a kernel is: one object that holds its settings, its formula, what is known about it, and its arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, dataclass_transform

from torch import Tensor

from unified_rl.correction.internal.distributed import Total
from unified_rl.correction.view import View
from unified_rl.ranges import enforce

Purpose = Literal["trust region", "other objective", "regulariser", ""]


@dataclass(frozen=True)
class Traits:
    """What the rest of the library has to know about a kernel.

    Attributes:
        holds_ratio: the weight holds the ratio to the anchor. Where it does not, a mismatch weight to the behavior
            policy counts nothing twice.
        truncates: it follows the ratio until a bound: there ``g != ratio`` means clipped; elsewhere only ``g == 0``
            does.
        own_advantage: it computes the advantage itself; the batch need not hold one.
        anchors: log-probs that it reads beside its anchor's.
        groups: it compares the outcomes of a group's rows; the nearest preset that does without.
        probabilities: it is defined for probabilities of discrete units alone; the nearest preset for densities.
        demonstrations: it has a rule of its own for rows that others wrote; the nearest preset without one.
        binary_rewards: it is defined for rewards of 0 and 1 alone.
        scores_experts: it has a weight for rows whose behavior probability nobody knows.
        purpose: what its bias is for: bounding the step, another objective, a pull to the anchor; empty where there is
            none, or only of the weight's variance.
    """

    holds_ratio: bool = True
    truncates: bool = False
    own_advantage: bool = False
    anchors: tuple[str, ...] = ()
    groups: str | None = None
    probabilities: str | None = None
    demonstrations: str | None = None
    binary_rewards: bool = False
    scores_experts: bool = False
    purpose: Purpose = "trust region"


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Kernel:
    """The weight of a unit's score as a function of the ratio and the advantage.

    Derive from it; annotated attributes are the settings, with their types and defaults (each subclass becomes a
    frozen dataclass). ``name`` is what a configuration calls it, ``formerly`` an older name that errors point from,
    ``traits`` what is known about it, ``ordered`` names its bounds.
    """

    name: ClassVar[str] = ""
    formerly: ClassVar[str] = ""
    traits: ClassVar[Traits] = Traits()
    ordered: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Pairs of settings of which the first must not lie above the second."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        dataclass(frozen=True, kw_only=True)(cls)
        enforce(cls)

    def weight(self, view: View) -> Tensor:
        """``g [B, N]``, detached; finite also where masked."""
        raise NotImplementedError(f"{type(self).__name__} has no weight")

    def prepare(self, view: View, total: Total) -> dict[str, Tensor]:
        """What is found once on the whole optimiser batch, ``{name: [B] or [B, N]}``; ``view.stats`` holds it later.

        Statistics slice with the batch, so that micro-batches give the gradient of the whole. ``total`` sums over the
        processes that share the batch.
        """
        return {}

    def formula(self) -> str:
        """The weight in plain mathematics: ``r`` the ratio, ``d`` its logarithm, ``A`` the advantage."""
        return (type(self).__doc__ or self.name).splitlines()[0].replace("``", "")

    @property
    def prepares(self) -> bool:
        """Whether it must see the whole optimiser batch before the first micro-batch."""
        return type(self).prepare is not Kernel.prepare

    @property
    def anchors(self) -> tuple[str, ...]:
        """Log-probs that it reads beside its anchor's, with these settings."""
        return self.traits.anchors

    @property
    def without_groups(self) -> str | None:
        """The nearest preset for rows without groups, where with these settings they would teach nothing."""
        return self.traits.groups


def by_name(*kernels: type[Kernel]) -> dict[str, type[Kernel]]:
    """A table of kernels."""
    return {kernel.name: kernel for kernel in kernels}


def number(x: float) -> str:
    """A number as one writes it."""
    return "inf" if math.isinf(x) else f"{x:g}"


def clipped_formula(low: float, high: float, dual: float | None) -> str:
    """The formula of a ratio that is clipped by the sign of the advantage."""
    below = f", or A < 0 and r < {number(low)}" if low > 0 else ""
    above = "" if dual is None else f", or A < 0 and r > {number(dual)}"
    return f"r, but 0 where A > 0 and r > {number(high)}{below}{above}"
