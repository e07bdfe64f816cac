"""A model in the precision that samples."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from unified_rl.policies.adapters import merged

FLOAT8_MOST = 448.0
"""The largest number of float8_e4m3."""
STEPS = {"int8": 127, "int4": 7}
"""Whole numbers on each side of 0."""


def in_precision(model: Any, dtype: str, adapted: bool = False) -> Any:
    """A copy of a model that samples in another precision; the given one stays as it is.

    Args:
        model: a causal language model.
        dtype: ``float32`` or ``bfloat16`` compute in it. ``int8``, ``int4`` and ``float8`` (e4m3) round the weights
            of all linear layers but the output layer, one scale an output channel, and compute in the model's own
            dtype: what such weights do to the answers, and none of their speed.
        adapted: it has adapters, which are added into its weights.
    """
    whole = merged(model).to(model.dtype) if adapted else copy.deepcopy(model)
    whole.logit_shape = model.logit_shape
    whole.requires_grad_(False)
    whole.eval()
    if dtype in ("float32", "bfloat16"):
        return whole.to(getattr(torch, dtype))
    head = whole.get_output_embeddings()
    for module in whole.modules():
        if isinstance(module, nn.Linear) and module is not head:
            module.weight.data = rounded(module.weight.data, dtype)
    return whole


@torch.no_grad()
def rounded(weight: Tensor, dtype: str) -> Tensor:
    """``weight [out, in]`` as ``int8``, ``int4`` (symmetric) or ``float8`` would hold it, scaled a channel."""
    value = weight.float()
    most = value.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    if dtype in STEPS:
        scale = most / STEPS[dtype]
        return ((value / scale).round() * scale).to(weight.dtype)
    scale = most / FLOAT8_MOST
    return ((value / scale).to(torch.float8_e4m3fn).float() * scale).to(weight.dtype)
