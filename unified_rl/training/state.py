"""Nested state to and from safetensors plus JSON: no pickle anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unified_rl.errors import DamageError
from unified_rl.shard import in_pieces
from unified_rl.training.stored import Stored, found_pieces, stored_in

_TENSOR, _ARRAY, _TUPLE, _INT_KEYS = "__tensor__", "__array__", "__tuple__", "__int_keys__"
_PIECES = "__pieces__"
LAZY = "/agent/"
"""Begins the paths of tensors that :func:`load_state` may leave in their files: of models and optimisers."""


Held: TypeAlias = dict[Any, str]
"""Paths of tensors that are packed already, by the memory that they show."""


def pack(value: Any, tensors: dict[str, Tensor], path: str = "", held: Held | None = None) -> Any:
    """The JSON side of ``value``; tensors and arrays move into ``tensors`` under their path.

    Tensors that show the same memory, such as tied weights, are stored once, under the path of the first. Those of
    which each process holds a piece move there as they are.

    Raises:
        TypeError: a value that is neither plain nor a tensor; the message names its path.
    """
    held = {} if held is None else held
    if in_pieces(value):
        own = value.to_local()
        place = (own.data_ptr(), own.dtype, value.shape)
        if own.numel() and place in held:
            return {_PIECES: held[place]}
        held[place] = path
        tensors[path] = value.detach()
        return {_PIECES: path}
    if isinstance(value, Tensor):
        memory = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() and memory in held:
            return {_TENSOR: held[memory]}
        held[memory] = path
        tensors[path] = value.detach().to("cpu").clone().contiguous()
        return {_TENSOR: path}
    if isinstance(value, np.ndarray):
        tensors[path] = torch.from_numpy(np.array(value, copy=True, order="C"))
        return {_ARRAY: path}
    if isinstance(value, dict):
        packed = {str(k): pack(v, tensors, f"{path}/{k}", held) for k, v in value.items()}
        return {_INT_KEYS: packed} if value and all(isinstance(k, int) for k in value) else packed
    if isinstance(value, tuple):
        return {_TUPLE: [pack(v, tensors, f"{path}/{i}", held) for i, v in enumerate(value)]}
    if isinstance(value, list):
        return [pack(v, tensors, f"{path}/{i}", held) for i, v in enumerate(value)]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"state{path} is a {type(value).__name__}, which a checkpoint cannot hold")


def unpack(value: Any, tensors: Mapping[str, Any], given: set[str] | None = None) -> Any:
    """The inverse of :func:`pack`; of what was stored once for several places, each gets its own."""
    given = set() if given is None else given
    if isinstance(value, list):
        return [unpack(v, tensors, given) for v in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        name = value[_TENSOR]
        found = tensors[name].clone() if name in given and isinstance(tensors[name], Tensor) else tensors[name]
        given.add(name)
        return found
    if _PIECES in value:
        return unpack({_TENSOR: value[_PIECES]}, tensors, given)
    if _ARRAY in value:
        held = tensors[value[_ARRAY]]
        return (held.whole() if isinstance(held, Stored) else held).numpy()
    if _TUPLE in value:
        return tuple(unpack(v, tensors, given) for v in value[_TUPLE])
    if _INT_KEYS in value:
        return {int(k): unpack(v, tensors, given) for k, v in value[_INT_KEYS].items()}
    return {k: unpack(v, tensors, given) for k, v in value.items()}


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes ``state.json`` and ``state.safetensors`` into ``folder``; pieces are written by those who hold them.

    Raises:
        OSError, SafetensorError: when the disk is full or the folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    packed = pack(state, tensors)
    save_file({name: x for name, x in tensors.items() if not in_pieces(x)}, folder / "state.safetensors")
    (folder / "state.json").write_text(json.dumps(packed))


def load_state(folder: Path, whole: bool = True) -> dict[str, Any]:
    """Reads what :func:`save_state` wrote.

    Args:
        folder: of the checkpoint.
        whole: False leaves the tensors of the agent in their files, as
            :class:`~unified_rl.training.stored.Stored`.

    Raises:
        DamageError: a missing or damaged file; the message names it.
    """
    try:
        packed = json.loads((folder / "state.json").read_text())
        file = folder / "state.safetensors"
        tensors: dict[str, Any] = {}
        if whole:  # own, aligned memory: results depend on it
            tensors |= {key: value.clone() for key, value in load_file(file).items()}
        else:
            found = {key: Stored([piece]) for key, piece in stored_in(file).items()}
            tensors |= {key: x if key.startswith(LAZY) else x.whole() for key, x in found.items()}
        tensors |= {key: x.whole() if whole else x for key, x in found_pieces(folder).items()}
        out: dict[str, Any] = unpack(packed, tensors)
        if not isinstance(out, dict):
            raise TypeError("no object of names and values")
        return out
    except (OSError, SafetensorError, LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise DamageError(f"{folder} is damaged ({error})") from error
