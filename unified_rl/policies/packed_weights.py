"""Weights in the layout that a CPU's matrix products want, for as long as one generation.

A decoding step multiplies a few rows by every weight of the model. Laid out once in oneDNN's blocks, a float32 product
of 32 rows runs at up to twice the rate of the plain one (the output layer of a large vocabulary most of all). These
copies live inside one ``with`` block, in which nobody trains: a changed weight cannot meet an old copy.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

LEAST_TOKENS = 16
"""Packing costs as much as some five steps save, so shorter generations go without."""
MOST_ROWS = 96
"""Plain products are as fast for more rows."""
LEAST_WEIGHTS = 2**14
"""Below it a call costs more than its arithmetic."""
MOST_BYTES = 2**32
"""No packed copy of a larger model."""


def packed_bytes(model: nn.Module, rows: int, tokens: int, device: str = "cpu", autocast: bool = False) -> int:
    """Bytes that :func:`packed_weights` would take for ``tokens`` steps of ``rows`` rows; 0 where it would not pack."""
    if not (can_pack() and device == "cpu" and tokens >= LEAST_TOKENS and 1 < rows <= MOST_ROWS):
        return 0
    size = sum(layer.weight.numel() * (2 if autocast else layer.weight.element_size()) for layer in _layers(model))
    return size if size <= MOST_BYTES else 0


def can_pack() -> bool:
    """Whether this build of torch and this machine have packed products."""
    usual = platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()
    return usual and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


@contextmanager
def packed_weights(model: nn.Module, rows: int, tokens: int) -> Iterator[None]:
    """Linear layers multiply by packed copies of their weights inside the block, where no gradient is wanted.

    Under autocast in bfloat16 the copies are bfloat16 (which autocast would otherwise make anew at every step where the
    weights are not trained, as under adapters).

    Args:
        model: whose :class:`torch.nn.Linear` layers are meant; subclasses stay as they are.
        rows: of a step.
        tokens: steps to come.
    """
    device = next(model.parameters()).device.type
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    layers = _layers(model) if packed_bytes(model, rows, tokens, device, autocast) else []
    if (autocast or any(x.weight.dtype == torch.bfloat16 for x in layers)) and not _has_bfloat16():
        layers = []
    packed = []
    try:
        for layer in layers:
            weight = layer.weight.detach().to(torch.bfloat16) if autocast else layer.weight.detach()
            layer.forward = functools.partial(_product, layer, pack(weight, rows), weight.dtype)
            packed.append(layer)
        yield
    finally:
        for layer in packed:
            del layer.forward


def _layers(model: nn.Module) -> list[Any]:
    return [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and "forward" not in vars(module)
        and module.weight.dtype in (torch.float32, torch.bfloat16)
        and module.weight.numel() >= LEAST_WEIGHTS
    ]


def pack(weight: Tensor, rows: int) -> Tensor:
    """A copy of ``weight [out, in]`` in oneDNN's blocks, for products of ``rows`` rows."""
    out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
    return out


def product(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """oneDNN's ``states [..., in]`` times ``weight [out, in]``, packed or plain, plus the bias; without a gradient."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(states, weight, bias, "none", [], "")
    return out


def _has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _product(layer: Any, packed: Tensor, dtype: torch.dtype, states: Tensor) -> Tensor:
    """``states [..., K]`` times the packed weight, plus the bias; the plain product where gradients are wanted."""
    if torch.is_grad_enabled():
        return linear(states, layer.weight, layer.bias)
    return product(states.to(dtype), packed, None if layer.bias is None else layer.bias.to(dtype))
