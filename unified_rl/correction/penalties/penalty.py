"""Penalties: regularisers that stand beside the policy term and are never multiplied by its weights.

Each maps ``x = log_prob - anchor_log_prob [B, N]`` (0 where masked) to a penalty a unit and its derivative by ``x``,
both ``[B, N]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unified_rl.correction.lookup import bind
from unified_rl.correction.penalties.selection import SELECTIONS
from unified_rl.correction.view import ANCHORS, View, difference, passing, safe, share
from unified_rl.errors import ConfigError, RecordError
from unified_rl.instantiate import nearest
from unified_rl.ranges import Name


def k1(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x``: with the anchor ``none``, the log-likelihood itself."""
    return x, torch.ones_like(x)


def k2(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x^2 / 2``."""
    return 0.5 * x.square(), x


def k3(x: Tensor) -> tuple[Tensor, Tensor]:
    """``exp(-x) + x - 1``: unbiased for KL(current || anchor) on fresh samples, never negative."""
    slope = (-x).expm1_().neg_()
    return x - slope, slope


def k3_plus(x: Tensor) -> tuple[Tensor, Tensor]:
    """The value of k3 with the gradient of k2."""
    return k3(x)[0], x


def absolute(x: Tensor) -> tuple[Tensor, Tensor]:
    """``|x|``."""
    return x.abs(), x.sign()


PENALTIES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "k3_plus": k3_plus,
    "abs": absolute,
}

DEFAULTS: dict[str, Any] = {
    "anchor": "reference",
    "coefficient": 1.0,
    "statistic": None,
    "select": None,
    "importance": False,
    "weight": None,
}
"""Settings of every penalty beside those of its function."""

TYPES: dict[str, Any] = {
    "anchor": str,
    "coefficient": float,
    "statistic": str | None,
    "select": str | Mapping[str, Any] | None,
    "importance": bool,
    "weight": Name | None,
}
"""Their types."""


def _entry(view: View, name: str) -> Tensor:
    """An entry ``[B]`` of the record as ``[B, 1]``.

    Raises:
        RecordError: there is none.
    """
    found: Tensor | None = view.batch.get(name, None)
    if found is None:
        raise RecordError(f"a penalty is weighed by {name!r}, which the record lacks; define agent.columns.{name}")
    return found.unsqueeze(-1)


class Penalty:
    """One penalty of a correction: a function of the log-ratio to an anchor, and what it is multiplied by.

    Settings: ``anchor`` (reference by default; ``none`` for the log-prob itself; ``mixture`` for what the kernel's
    companion found), ``coefficient``, ``statistic`` (a name in the statistics, multiplied on), ``select`` (a rule of
    :data:`SELECTIONS`), ``importance`` (multiply by the differentiable ratio to the behavior policy), ``weight`` (an
    entry ``[B]`` of the record, which multiplies a row's).
    """

    def __init__(
        self, node: str | Mapping[str, Any], where: str = "correction.penalty", further: Sequence[str] = ()
    ) -> None:
        self.value, given = bind(node, PENALTIES, where, TYPES)
        given = {**DEFAULTS, **given}
        self.anchor: str = given["anchor"]
        known = [*ANCHORS, *further, "none", "mixture"]
        if self.anchor not in known:
            raise ConfigError(f"{where}.anchor {self.anchor!r} is unknown; {nearest(self.anchor, known)}")
        self.coefficient: float = given["coefficient"]
        self.statistic: str | None = given["statistic"]
        self.importance: bool = given["importance"]
        self.weight: str | None = given["weight"]
        select = given["select"]
        self.select = None if select is None else bind(select, SELECTIONS, f"{where}.select")[0]

    @property
    def anchors(self) -> set[str]:
        """Anchors whose log-probs the batch must hold."""
        return ({self.anchor} - {"none", "mixture"}) | ({"behavior"} if self.importance else set())

    def __call__(self, view: View, ok: Tensor, chosen: str) -> tuple[Tensor, Tensor]:
        """The penalty's part of the loss, scalar, and its derivative by the log-probs, ``[B, N]``.

        ``ok [B, N]`` says which units take part; ``chosen`` names the carried selection in the statistics.
        """
        x, mask = self._argument(view)
        mask = mask if mask is ok else mask & ok
        if self.select is not None:
            mask = mask & view.stats[chosen]
        value, slope = self.value(x)
        if self.anchor != "none":
            slope = slope * passing(x, mask)
        if self.importance:
            d, finite_too = view.compared("behavior")
            mask = mask & finite_too
            ratio = d.exp()
            slope = (slope + value * passing(d, mask)) * ratio
            value = value * ratio
        scale = view.row("coefficient") * self.coefficient
        if self.statistic is not None:
            scale = scale * view.row(self.statistic)
        if self.weight is not None:
            scale = scale * _entry(view, self.weight)
        scale = share(mask, x.dtype) * scale
        return (value * scale).sum(), slope * scale

    def _argument(self, view: View) -> tuple[Tensor, Tensor]:
        """The log-ratio to the anchor and where it is finite."""
        if self.anchor == "none":
            return view.log_prob.nan_to_num(0.0, 0.0, 0.0), view.mask & (view.log_prob.abs() < torch.inf)
        if self.anchor == "mixture":
            return safe(difference(view.raw_log_prob, view.stats["mixture_log_prob"]), view.mask)
        return view.compared(self.anchor)
