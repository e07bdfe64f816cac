"""A loss as a list of named terms over one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from unified_rl.objectives.coefficients import Coefficient, coefficient
from unified_rl.objectives.forward import Forward, Reader
from unified_rl.objectives.rows import Rows

Metrics = dict[str, Any]


class Term:
    """One summand of a loss.

    ``prepare`` looks at the whole optimiser batch, without gradient, and owns the denominator; ``loss`` is of a
    micro-batch; those of all micro-batches add up, so every split gives the same gradient.

    Args:
        rows: which rows it reads, see :class:`~unified_rl.objectives.rows.Rows`.
        coefficient: a number or a schedule.

    Attributes:
        readers: what it takes from the shared pass beside log-probs.
        anchors: names of the policies that it compares with.
        whole_groups: optimiser batches must hold whole groups.
    """

    readers: tuple[Reader, ...] = ()
    anchors: frozenset[str] = frozenset()
    whole_groups = False
    needs_full_pass = False

    def __init__(self, rows: Any = None, coefficient_: float | Mapping[str, Any] = 1.0) -> None:
        self.rows = Rows.of(rows)
        self.schedule: Coefficient = coefficient(coefficient_)
        self.coefficient = 1.0

    def start(self, progress: float, update: int) -> None:
        """At the start of an update: sets the coefficient."""
        self.coefficient = self.schedule(progress, update)

    def prepare(self, batch: TensorDict, scored: Scored) -> TensorDictBase | None:
        """Statistics of batch size ``[B]`` that slice with the batch, or None where the term needs none."""
        return None

    def loss(self, forward: Forward, rows: TensorDict, stats: Any) -> tuple[Tensor, Metrics]:
        """The micro-batch's share of the term, a scalar, and metrics."""
        raise NotImplementedError

    def finish(self, metrics: Metrics) -> None:
        """At the end of an update: a controlled coefficient sees its metrics."""
        if hasattr(self.schedule, "observe"):
            self.schedule.observe(metrics)

    def state_dict(self) -> dict[str, Any]:
        """What a bit-exact continuation needs: a controller's state."""
        return self.schedule.state_dict() if hasattr(self.schedule, "state_dict") else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.schedule.load_state_dict(state)  # type: ignore[attr-defined]


class Scored:
    """The present log-probs of a whole optimiser batch ``[B, N]``, without gradient, computed if anything asks.

    Attributes:
        free: the batch is not split, so they come from the pass that the loss needs anyway.
    """

    def __init__(self, score: Callable[[], Tensor], free: bool) -> None:
        self._score, self.free = score, free

    @cached_property
    def log_prob(self) -> Tensor:
        """``[B, N]`` float32."""
        return self._score()


class Objective:
    """The terms of one loss.

    Args:
        policy: the policy that is trained.
        terms: by name, in order.
        score: ``rows -> (log_prob, penalty)``, the policy's own or a wrapper's.
        generator: for supervised losses that draw noise.
    """

    def __init__(
        self, policy: Any, terms: Mapping[str, Term], score: Any, generator: torch.Generator | None = None
    ) -> None:
        self.policy, self.terms, self.score, self.generator = policy, dict(terms), score, generator

    def start(self, progress: float, update: int) -> None:
        """At the start of an update: coefficients, and which terms count."""
        for term in self.terms.values():
            term.start(progress, update)
        self.active = {name: term for name, term in self.terms.items() if term.coefficient != 0.0}
        self.readers = [reader for term in self.active.values() for reader in term.readers]

    def backward(self, batch: TensorDict, micro_batch: int | None, means: Any) -> Tensor:
        """Accumulates the gradient of the whole optimiser batch; returns the loss, detached."""
        size = min(micro_batch or len(batch), len(batch))
        total = torch.zeros((), device=batch["mask"].device)
        if size == len(batch):
            forward = self._forward(batch)
            stats = self.prepare(batch, Scored(lambda: forward.log_prob.detach(), free=True))
            return total + self._micro_batch(forward, batch, stats, means)
        stats = self.prepare(batch, Scored(lambda: self._scored(batch, size), free=False))
        split = {name: None if s is None else s.split(size) for name, s in stats.items()}
        for index, rows in enumerate(batch.split(size)):
            here = {name: None if s is None else s[index] for name, s in split.items()}
            total = total + self._micro_batch(self._forward(rows), rows, here, means)
        return total

    def prepare(self, batch: TensorDict, scored: Scored) -> dict[str, Any]:
        """Every term's statistics of the whole optimiser batch."""
        with torch.no_grad():
            return {name: term.prepare(batch, scored) for name, term in self.active.items()}

    def _forward(self, rows: TensorDict) -> Forward:
        return Forward(self.policy, rows, self.score, self.readers, self.generator)

    @torch.no_grad()
    def _scored(self, batch: TensorDict, size: int) -> Tensor:
        return torch.cat([self._forward(rows).log_prob for rows in batch.split(size)])

    def _micro_batch(self, forward: Forward, rows: TensorDict, stats: dict[str, Any], means: Any) -> Tensor:
        loss: Any = None
        metrics: Metrics = {}
        for name, term in self.active.items():
            value, found = term.loss(forward, rows, stats[name])
            value = value if term.coefficient == 1.0 else term.coefficient * value
            loss = value if loss is None else loss + value
            metrics.update(found)
        loss.backward()
        means.add(metrics)
        return loss.detach()

    def finish(self, metrics: Metrics) -> None:
        """At the end of an update."""
        for term in self.terms.values():
            term.finish(metrics)

    def state_dict(self) -> dict[str, Any]:
        """The state of every term that has one."""
        return {name: state for name, term in self.terms.items() if (state := term.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        for name, own in state.items():
            self.terms[name].load_state_dict(own)
