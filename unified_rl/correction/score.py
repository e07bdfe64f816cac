"""The two ends of the loss: the advantage of each unit, and the weighted score."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.errors import RecordError
from unified_rl.units import Steps


class Score(torch.autograd.Function):
    """``-(weight * log_prob).sum()`` in one operation each way; log-probs under a weight of 0 may be anything."""

    @staticmethod
    def forward(ctx: Any, log_prob: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = log_prob.dtype
        return -(weight * log_prob.nan_to_num(0.0, 0.0, 0.0)).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return (weight * -gradient).to(ctx.dtype), None


def unit_advantage(batch: TensorDictBase, mask: Tensor, dtype: torch.dtype, *, optional: bool) -> Tensor:
    """The advantage of each unit ``[B, N]``, from one a row, a step or a unit."""
    advantage = batch.get("advantage", None)
    if advantage is None:
        if optional:
            return torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        raise RecordError(
            "the batch has no advantage: set it with group_advantage, gae or vtrace of unified_rl.returns"
        )
    advantage = advantage.detach().to(dtype)
    if advantage.shape == mask.shape:
        return advantage
    if advantage.shape == mask.shape[:1]:
        return advantage.unsqueeze(-1).expand(mask.shape)
    if advantage.shape == batch["reward"].shape:
        return Steps.of(batch).broadcast(advantage)
    raise RecordError(
        f"advantage has shape {tuple(advantage.shape)}; expected one a row {tuple(mask.shape[:1])}, a step "
        f"{tuple(batch['reward'].shape)} or a unit {tuple(mask.shape)}"
    )
