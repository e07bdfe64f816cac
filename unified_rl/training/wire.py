"""Nested state of plain values and tensors as two pieces of bytes, for other processes of the same run: no pickle."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from unified_rl.errors import PeerError
from unified_rl.training.state import pack, unpack

ALIGNED = 64
"""Bytes: every tensor begins at a multiple, so that it can be looked at in place."""
DTYPES = {
    str(dtype): dtype
    for dtype in (
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
        torch.float16, torch.bfloat16, torch.float32, torch.float64,
    )
}  # fmt: skip


def encode(value: Any) -> tuple[Tensor, Tensor]:
    """A header, JSON that names every tensor's place, shape and dtype, and the tensors' bytes; both ``[n]`` uint8.

    Raises:
        TypeError: a value that is neither plain nor a tensor; the message names its path.
    """
    tensors: dict[str, Tensor] = {}
    tree, table, at = pack(value, tensors), {}, 0
    for name, tensor in tensors.items():
        table[name] = [str(tensor.dtype), list(tensor.shape), at]
        at += -(-tensor.numel() * tensor.element_size() // ALIGNED) * ALIGNED
    data = torch.zeros(at, dtype=torch.uint8)
    for name, tensor in tensors.items():
        if tensor.numel():
            flat = tensor.reshape(-1).view(torch.uint8)
            data[table[name][2] :][: flat.numel()] = flat
    header = json.dumps({"tree": tree, "tensors": table}).encode()
    return torch.frombuffer(bytearray(header), dtype=torch.uint8), data


def decode(header: Tensor, data: Tensor) -> Any:
    """The inverse of :func:`encode`; every tensor has memory of its own.

    Raises:
        PeerError: bytes that :func:`encode` did not make.
    """
    try:
        told = json.loads(bytes(header.numpy()))
        tensors = {name: _tensor(data, *place) for name, place in told["tensors"].items()}
        return unpack(told["tree"], tensors)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise PeerError(f"another process sent what cannot be read ({error})") from error


def _tensor(data: Tensor, dtype: str, shape: list[int], at: int) -> Tensor:
    out = torch.empty(shape, dtype=DTYPES[dtype])
    size = out.numel() * out.element_size()
    if size:
        out.view(-1).view(torch.uint8).copy_(data[at : at + size])
    return out
