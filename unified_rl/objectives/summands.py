"""A loss as a named list of pure functions, each with a coefficient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from unified_rl.correction.lookup import bind
from unified_rl.errors import ConfigError
from unified_rl.objectives.coefficients import Observed, coefficient
from unified_rl.objectives.transitions import Transitions
from unified_rl.protocols import Stateful

Scales = tuple[float, ...]


class Summands:
    """The terms of one phase's loss.

    Args:
        nodes: by name; a name of ``table``, or a mapping with ``name``, settings and ``coefficient`` (a number or a
            schedule, 1 by default). None takes an entry out.
        table: the known functions of :class:`Transitions`.
        where: the setting's full name, for errors.

    Raises:
        ConfigError: an unknown name or setting, no term, or coefficients that are all 0.
    """

    def __init__(self, nodes: Mapping[str, Any], table: Mapping[str, Callable[..., Tensor]], where: str) -> None:
        self.terms: dict[str, partial[Any]] = {}
        self.schedules: dict[str, Any] = {}
        self.changing: list[str] = []
        """Names of the terms whose coefficient is not a constant."""
        for name, node in nodes.items():
            if node is None:
                continue
            term, extra = bind(node, table, f"{where}.{name}", ["coefficient"])
            weight = extra.get("coefficient", 1.0)
            if not isinstance(weight, (int, float)):
                self.changing.append(name)
            self.terms[name], self.schedules[name] = term, coefficient(weight, f"{where}.{name}.coefficient")
        if not self.terms:
            raise ConfigError(f"{where} leaves no term in the loss")
        if not self.changing and not any(self.scales(0.0, 0)):
            raise ConfigError(f"{where}: every coefficient is 0, so nothing would be learnt")

    def scales(self, progress: float, update: int) -> Scales:
        """The present coefficients, in the order of the terms."""
        return tuple(float(schedule(progress, update)) for schedule in self.schedules.values())

    def loss(self, t: Transitions, scales: Scales) -> Tensor:
        """Their weighted sum; terms of coefficient 0 are not computed, and 1 costs no product."""
        total: Tensor | None = None
        for term, scale in zip(self.terms.values(), scales, strict=True):
            if scale:
                part = term(t) if scale == 1.0 else scale * term(t)
                total = part if total is None else total + part
        assert total is not None
        return total

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """Tells controllers what an update measured."""
        for schedule in self.schedules.values():
            if isinstance(schedule, Observed):
                schedule.observe(metrics)

    def state_dict(self) -> dict[str, Any]:
        """Of the controllers."""
        return {name: s.state_dict() for name, s in self.schedules.items() if isinstance(s, Stateful)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        for name, saved in state.items():
            self.schedules[name].load_state_dict(saved)
