"""Optimal transport between the distributions of a block of units and another policy's of the same block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.errors import ConfigError
from unified_rl.objectives.forward import Forward, Reader
from unified_rl.objectives.objective import Parts
from unified_rl.objectives.supervised import DistributionTerm
from unified_rl.protocols import ShowsLogits
from unified_rl.ranges import Count, Positive

UNITS_AT_ONCE = 128
"""Units whose distributions are held together while plans are made."""


class TransportTerm(DistributionTerm):
    """``sum_j P_ij |s_i - t_j|`` of every unit: what it costs to carry a block's distributions to the other policy's.

    ``P`` are the Sinkhorn iterates of ``exp(-cost / smoothing)`` between ``block`` units of a row, one after the other,
    without gradient, so that batches may be split; ``s`` and ``t`` are probabilities at ``temperature``. SinKD,
    2402.17110, where the block is the batch.

    Args:
        name, rows, coefficient, reduce: see :class:`~unified_rl.objectives.supervised.DistributionTerm`.
        anchor: name of the other policy.
        block: units that are carried together; 1 compares each with its own.
        temperature: of both.
        smoothing: of the plan.
        iterations: of alternating normalisation.
    """

    scores = False

    def __init__(
        self,
        name: str,
        *,
        anchor: str = "teacher",
        block: Count = 8,
        temperature: Positive = 2.0,
        smoothing: Positive = 0.1,
        iterations: Count = 20,
        reduce: str = "token-mean",
        rows: Any = None,
        coefficient: float | Mapping[str, Any] = 1.0,
    ) -> None:
        super().__init__(name, rows, coefficient, reduce)
        self.anchor, self.block, self.temperature = anchor, block, temperature
        self.smoothing, self.iterations = smoothing, iterations
        self.distributions = frozenset({anchor, "self"})
        self.readers = (Reader(name, self._read, self._plans),)

    def attach(self, parts: Parts) -> None:
        """Takes the other policy, and the own one as it is.

        Raises:
            ConfigError: one of them shows no logits.
        """
        super().attach(parts)
        self.other, self.own = parts.anchors[self.anchor], parts.anchors["self"]
        if not isinstance(self.other.policy, ShowsLogits):
            raise ConfigError(f"{self.where} reads logits, and agent.anchors.{self.anchor} shows none")

    def _probabilities(self, logits: Tensor) -> Tensor:
        return (logits / self.temperature).softmax(-1)

    def _plans(self, rows: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Every unit's row of its block's plan, and where the block's units lie, ``[B, N, block]`` each."""
        mask = rows["mask"]
        width, count = mask.shape[1], mask.sum(-1, keepdim=True)
        self._states = self.other.states(rows).flatten(0, 1)
        own = self.own.states(rows).flatten(0, 1)
        packed = (~mask).long().argsort(dim=-1, stable=True)  # columns of units first
        blocks = -(-width // self.block)
        place = torch.arange(blocks * self.block, device=mask.device).view(1, blocks, self.block)
        column = packed.gather(1, place.clamp(max=width - 1).expand(len(mask), -1, -1).flatten(1)).view(
            len(mask), blocks, -1
        )
        real = place < count.unsqueeze(-1)
        at = column + width * torch.arange(len(mask), device=mask.device)[:, None, None]
        used = real.any(-1)
        plan = torch.zeros(*real.shape, self.block, device=mask.device)
        few = max(1, UNITS_AT_ONCE // self.block)
        parts = [self._plan(own, a, r) for a, r in zip(at[used].split(few), real[used].split(few), strict=True)]
        if parts:
            plan[used] = torch.cat(parts)
        flat_plan = torch.zeros(mask.numel(), self.block, device=mask.device)
        flat_at = torch.zeros(mask.numel(), self.block, dtype=torch.int64, device=mask.device)
        flat_plan[at[real]] = plan[real]
        flat_at[at[real]] = at.unsqueeze(-2).expand(*at.shape, self.block)[real]
        return flat_plan.view(*mask.shape, self.block), flat_at.view(*mask.shape, self.block)

    def _plan(self, own: Tensor, at: Tensor, real: Tensor) -> Tensor:
        """Plans ``[n, block, block]`` of the units at places ``at [n, block]``, 0 where they are not ``real``."""
        flat = at.flatten()
        logits = (self.own.logits(own[flat]), self.other.logits(self._states[flat]))
        s, t = (self._probabilities(x).view(*at.shape, -1) for x in logits)
        kernel = (-torch.cdist(s, t, p=1.0) / self.smoothing).exp() * (real[:, :, None] & real[:, None])
        for _ in range(self.iterations):
            kernel = kernel / kernel.sum(2, keepdim=True).clamp(min=1e-30)
            kernel = kernel / kernel.sum(1, keepdim=True).clamp(min=1e-30)
        return kernel

    def _read(self, logits: Tensor, token: Tensor, plan: Tensor, at: Tensor) -> Tensor:
        s = self._probabilities(logits)
        with torch.no_grad():
            value, slope = torch.zeros_like(s[:, 0]), torch.zeros_like(s)
            for mate in range(self.block):
                gap = s - self._probabilities(self.other.logits(self._states[at[:, mate]]))
                value += plan[:, mate] * gap.abs().sum(-1)
                slope += plan[:, mate, None] * gap.sign()
        score = (s * slope).sum(-1)
        return score - score.detach() + value

    def units(self, forward: Forward, mask: Tensor) -> Tensor:
        """As the pass read it."""
        return forward.read(self.name)
