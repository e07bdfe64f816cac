"""Linear layers and root-mean-square norms of a scoring pass on a CPU, with backward passes written out.

Autograd's backward pass of such a norm makes a dozen tensors of the size of the states where three will do, and
oneDNN's float32 products run some tenth faster than the plain ones. Layers are exchanged inside one ``with`` block, and
only those whose class says what they compute; the same ones whether or not gradients are wanted, weights are frozen or
layers recomputed in the backward pass, so that all of these give the same log-probs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from unified_rl.policies.lean_step import FAMILIES
from unified_rl.policies.packed_weights import LEAST_WEIGHTS, can_pack, product

Forward = Callable[..., Tensor]
LEAST_ROWS = 256
"""For fewer rows the model's own layers are as fast."""


@contextmanager
def fused_layers(model: Any, rows: int | None = None) -> Iterator[None]:
    """Exchanges what can be exchanged in float32 on a CPU; elsewhere nothing.

    Args:
        model: of transformers. One that recomputes its layers stays as it is, unless by :func:`recomputing`, since its
            backward pass runs after the block.
        rows: of states, at most; too few to be worth it leave the model as it is. None does not know.
    """
    exchanged = []
    worth = rows is None or rows >= LEAST_ROWS
    try:
        for module, own in _exchangeable(model) if worth else ():
            module.forward = functools.partial(own, module)
            exchanged.append(module)
        yield
    finally:
        for module in exchanged:
            del module.forward


def recomputing(model: Any) -> dict[str, Any]:
    """Arguments of gradient checkpointing under which layers are recomputed as they were computed, exchanged."""
    model.recomputes_fused = True
    # the other way of torch gives nothing a gradient where the embedding is frozen
    return {"use_reentrant": False, "context_fn": lambda: (nullcontext(), fused_layers(model))}


def _exchangeable(model: Any) -> list[tuple[Any, Forward]]:
    if (
        model.device.type != "cpu"
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or not can_pack()
    ):
        return []
    modules = list(model.modules())
    recomputed = any(getattr(module, "gradient_checkpointing", False) for module in modules)
    if recomputed and not getattr(model, "recomputes_fused", False):
        return []
    pairs = ((module, _own(module)) for module in modules if "forward" not in vars(module))
    return [(module, own) for module, own in pairs if own is not None]


def _own(module: Any) -> Forward | None:
    """What stands in for the forward pass of a module, or None."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dtype != torch.float32:
        return None
    if type(module) is nn.Linear:
        return _linear if weight.numel() >= LEAST_WEIGHTS else None
    return _norm if (type(module).__module__, type(module).__name__) in _NORMS else None


_NORMS = {(f"transformers.models.{kind}.modeling_{kind}", f"{name}RMSNorm") for kind, name in FAMILIES.items()}


def _linear(layer: nn.Linear, states: Tensor) -> Tensor:
    if states.numel() < LEAST_ROWS * states.shape[-1] or states.dtype != torch.float32:
        return linear(states, layer.weight, layer.bias)
    out: Tensor = _Linear.apply(states, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
    return out


def _norm(norm: Any, states: Tensor) -> Tensor:
    if states.numel() < LEAST_ROWS * states.shape[-1] or states.dtype != torch.float32:
        return type(norm).forward(norm, states)  # type: ignore[no-any-return]
    out: Tensor = _Norm.apply(states, norm.weight, norm.variance_epsilon)  # type: ignore[no-untyped-call]
    return out


class _Linear(torch.autograd.Function):
    """``states [..., in]`` to ``[..., out]``."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(states, weight)
        return product(states, weight, bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        into = product(grad.contiguous(), weight.t().contiguous()) if ctx.needs_input_grad[0] else None
        own = rows.t() @ states.reshape(-1, states.shape[-1]) if ctx.needs_input_grad[1] else None
        return into, own, rows.sum(0) if ctx.needs_input_grad[2] else None


class _Norm(torch.autograd.Function):
    """``weight * states / sqrt(mean(states ** 2) + eps)`` over the last dimension."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, eps: float) -> Tensor:
        square: Tensor = torch.linalg.vector_norm(states, 2, -1, True).square_()
        scale = square.div_(states.shape[-1]).add_(eps).rsqrt_()
        unit = states * scale
        ctx.save_for_backward(unit, scale, weight)
        out: Tensor = unit * weight
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        unit, scale, weight = ctx.saved_tensors
        share = grad * unit
        along = (share @ weight).unsqueeze_(-1).div_(unit.shape[-1])
        into = (grad * weight).addcmul_(unit, along, value=-1).mul_(scale)
        return into, share.reshape(-1, share.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None, None
