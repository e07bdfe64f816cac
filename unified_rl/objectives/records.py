"""Gradients of single records, each bounded in norm and their sum blurred: differentially private learning."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from unified_rl.errors import ConfigError
from unified_rl.objectives.coefficients import Observed
from unified_rl.objectives.metrics import Metrics
from unified_rl.objectives.objective import Term
from unified_rl.ranges import NonNegative, UpperBound, ranged

REPORTS = ("records/norm", "records/clipped")


@ranged("agent.per_record")
class RecordGradients:
    """``(sum_i clip(g_i, C) + N(0, s^2 C^2)) / B`` in place of the gradient of ``B`` records. DP-SGD, 1607.00133.

    A record is a row, and its loss ``g_i`` is of it alone, with denominators of its own. What this costs in privacy is
    not accounted for.

    Args:
        clip: ``C``, the bound of a record's gradient norm; infinity is none.
        noise: ``s``; 0 adds none.

    Raises:
        ConfigError: noise in proportion to a bound that is none.
    """

    def __init__(self, *, clip: UpperBound = 1.0, noise: NonNegative = 0.0) -> None:
        if noise and math.isinf(clip):
            raise ConfigError("agent.per_record.noise is in proportion to agent.per_record.clip: set a finite clip")
        self.clip, self.noise = clip, noise
        self.generator: torch.Generator | None = None
        self.parameters: Sequence[Tensor] = ()

    def attach(self, parameters: Sequence[Tensor], generator: torch.Generator) -> None:
        """Gives it the weights, and the stream of its noise."""
        self.parameters, self.generator = parameters, generator

    def start(self) -> None:
        """Before the first record of a batch."""
        self._sums: list[Tensor | None] = [None] * len(self.parameters)
        self._norms: list[Tensor] = []

    def take(self) -> None:
        """Takes in the gradients of one record, and drops them from the weights."""
        gradients = [weight.grad for weight in self.parameters]
        found = [gradient for gradient in gradients if gradient is not None]
        norm = torch.nn.utils.get_total_norm(found) if found else torch.zeros(())
        scale = (self.clip / norm.clamp(min=1e-12)).clamp(max=1.0)
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                bounded, sum_ = gradient * scale, self._sums[index]
                self._sums[index] = bounded if sum_ is None else sum_.add_(bounded)
                self.parameters[index].grad = None
        self._norms.append(norm)

    def finish(self) -> Metrics:
        """Writes the blurred mean into the weights' gradients; metrics."""
        count, deviation = len(self._norms), self.noise * self.clip if self.noise else 0.0
        for weight, sum_ in zip(self.parameters, self._sums, strict=True):
            total = torch.zeros_like(weight) if sum_ is None else sum_
            if deviation:
                draw = torch.empty_like(weight, device="cpu").normal_(0.0, deviation, generator=self.generator)
                total = total + draw.to(weight.device)
            elif sum_ is None:
                continue
            weight.grad = total / count
        norms = torch.stack(self._norms)
        return {"records/norm": norms.mean(), "records/clipped": (norms > self.clip).float().mean()}

    def check(self, terms: Iterable[Term]) -> None:
        """Refuses terms that look at several records, since one would then move the gradients of others.

        Raises:
            ConfigError: names the term.
        """
        for term in terms:
            if term.couples_rows or term.whole_groups:
                raise ConfigError(
                    f"agent.per_record bounds the gradient of each record, and {term.where} compares records: use "
                    "terms of single rows (nll, divergence, entropy, ...) and take it out (null)"
                )
            if isinstance(term.schedule, Observed):
                raise ConfigError(
                    f"{term.where}.coefficient follows a metric of all records, which agent.per_record does not blur: "
                    "set a number or a schedule"
                )

    def state_dict(self) -> dict[str, Any]:
        """The stream."""
        assert self.generator is not None
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        assert self.generator is not None
        self.generator.set_state(state["generator"])
