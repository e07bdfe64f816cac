"""The two ends of the loss: the advantage of each unit, and the weighted score."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.correction.view import masked
from unified_rl.errors import RecordError
from unified_rl.units import Steps


class KnownGradient(torch.autograd.Function):
    """A value whose derivative by the log-probs is already known, in one operation each way.

    ``KnownGradient.apply(log_prob, value, slope)`` is ``value``, a scalar or of the shape of ``log_prob``; backwards,
    the log-probs get ``slope`` times what comes in. They may be anything where the slope is 0.
    """

    if TYPE_CHECKING:  # torch declares it without types

        @classmethod
        def apply(cls, log_prob: Tensor, value: Tensor, slope: Tensor) -> Tensor:
            """``value``, with the gradient ``slope``."""
            raise NotImplementedError

    @staticmethod
    def forward(ctx: Any, log_prob: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        ctx.dtype = log_prob.dtype
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return (slope * gradient).to(ctx.dtype), None, None


def unit_advantage(batch: TensorDictBase, mask: Tensor, count: Tensor, dtype: torch.dtype, *, optional: bool) -> Tensor:
    """The advantage of each unit ``[B, N]``, from one a row, a step or a unit; 0 where masked, or one a row.

    ``count [B]`` is the number of masked-in units: what stands in a row without any does not count.
    """
    advantage: Tensor | None = batch.get("advantage", None)
    if advantage is None:
        if optional:
            return torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        raise RecordError(
            "the batch has no advantage: set it with group_advantage, gae or vtrace of unified_rl.returns"
        )
    advantage = advantage.detach().to(dtype)
    if advantage.shape == mask.shape:
        return masked(mask, advantage)
    if advantage.shape == mask.shape[:1]:
        return advantage.masked_fill(count == 0, 0.0).unsqueeze(-1).expand(mask.shape)
    if advantage.shape == batch["reward"].shape:
        return masked(mask, Steps.of(batch).broadcast(advantage))
    raise RecordError(
        f"advantage has shape {tuple(advantage.shape)}; expected one a row {tuple(mask.shape[:1])}, a step "
        f"{tuple(batch['reward'].shape)} or a unit {tuple(mask.shape)}"
    )
