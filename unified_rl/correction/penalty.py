"""Penalties: regularisers that stand beside the policy term and are never multiplied by its weights.

Each maps ``x = log_prob - anchor_log_prob [B, N]`` (differentiable, 0 where masked) to a penalty a unit, ``[B, N]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.correction.select import SELECTIONS
from unified_rl.correction.specs import bind, nearest
from unified_rl.correction.view import ANCHORS, anchor_log_prob, difference, finite, masked, safe
from unified_rl.errors import ConfigError


def k1(x: Tensor) -> Tensor:
    """``x``: with the anchor ``none``, the log-likelihood itself."""
    return x


def k2(x: Tensor) -> Tensor:
    """``x^2 / 2``."""
    return 0.5 * x.square()


def k3(x: Tensor) -> Tensor:
    """``exp(-x) + x - 1``: unbiased for KL(current || anchor) on fresh samples, never negative."""
    return (-x).exp() + x - 1


def k3_plus(x: Tensor) -> Tensor:
    """The value of k3 with the gradient of k2."""
    gradient = k2(x)
    return gradient + (k3(x) - gradient).detach()


def absolute(x: Tensor) -> Tensor:
    """``|x|``."""
    return x.abs()


PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3, "k3_plus": k3_plus, "abs": absolute}

DEFAULTS: dict[str, Any] = {
    "anchor": "reference",
    "coefficient": 1.0,
    "statistic": None,
    "select": None,
    "importance": False,
}
"""Settings of every penalty beside those of its function."""


class Penalty:
    """One penalty of a correction: a function of the log-ratio to an anchor, and what it is multiplied by.

    Settings: ``anchor`` (reference by default; ``none`` for the log-prob itself; ``mixture`` for what the kernel's
    companion found), ``coefficient``, ``statistic`` (a name in the statistics, multiplied on), ``select`` (a rule of
    :data:`SELECTIONS`), ``importance`` (multiply by the differentiable ratio to the behavior policy).
    """

    def __init__(self, node: str | Mapping[str, Any]) -> None:
        self.value, given = bind(node, PENALTIES, "penalty", DEFAULTS)
        given = {**DEFAULTS, **given}
        self.anchor: str = given["anchor"]
        known = [*ANCHORS, "none", "mixture"]
        if self.anchor not in known:
            raise ConfigError(f"unknown anchor {self.anchor!r} of a penalty; {nearest(self.anchor, known)}")
        self.coefficient = float(given["coefficient"])
        self.statistic: str | None = given["statistic"]
        self.importance = bool(given["importance"])
        select = given["select"]
        self.select = None if select is None else bind(select, SELECTIONS, "selection")[0]

    @property
    def anchors(self) -> set[str]:
        """Anchors whose log-probs the batch must hold."""
        return ({self.anchor} - {"none", "mixture"}) | ({"behavior"} if self.importance else set())

    def __call__(
        self, log_prob: Tensor, batch: TensorDictBase, stats: TensorDictBase, ok: Tensor, chosen: str, shared: str
    ) -> Tensor:
        """The penalty's part of the loss, scalar.

        ``chosen`` names the carried selection in the statistics; where the anchor is ``shared`` with the kernel, ``ok``
        already knows which units are finite.
        """
        if self.anchor == "none":
            x = log_prob
        elif self.anchor == "mixture":
            x = difference(log_prob, stats["mixture_log_prob"])
        else:
            x = difference(log_prob, anchor_log_prob(batch, self.anchor))
        mask = ok if self.anchor == shared else ok & finite(x.detach())
        if self.select is not None:
            mask = mask & stats[chosen]
        value = self.value(masked(mask, x) if self.anchor == "none" else safe(x, mask))
        if self.importance:
            d = difference(log_prob, anchor_log_prob(batch, "behavior"))
            value = value * safe(d, mask & finite(d.detach())).exp()
        scale = stats["coefficient"].unsqueeze(-1) * self.coefficient
        if self.statistic is not None:
            scale = scale * stats[self.statistic].unsqueeze(-1)
        return (value * scale).sum()  # every penalty is 0 at 0, which is what stands where masked
