"""Weights, gradients and moments of which each process holds a piece: FSDP2, ``torch.distributed.fsdp.fully_shard``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Along

from unified_rl.policies.causal_lm import CausalLM
from unified_rl.policies.pretrained import trunk_states
from unified_rl.policies.token_critic import TokenCritic
from unified_rl.training.stored import Stored

ENTRIES = ("log_prob", "log_prob_and_entropy", "nll", "read_logits", "unit_states", "trunk")
"""Methods by which a pass enters a policy: weights are gathered in front of them."""


def cut(module: CausalLM | TokenCritic, mesh: DeviceMesh) -> None:
    """Cuts the weights of a model along their first dimension, a piece for each process; gradients are added up.

    A pass gathers one layer at a time, and what is no layer's (embedding, last norm, output layer) for the whole pass.

    Args:
        module: is changed in place. It may be entered by :data:`ENTRIES` alone, by all processes alike.
        mesh: of the processes, one dimension.
    """
    if isinstance(module, CausalLM):
        module.share_prompts = False  # whether it pays depends on the rows, and each pass is a message
        module.trunk = MethodType(_trunk, module)
    for layer in _layers(module.model):
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for one in _cut_modules(module):
        one.set_gradient_divide_factor(1.0)  # coefficients divide by the whole batch already
        one.set_force_sum_reduction_for_comms(True)
        one.set_reduce_scatter_unused_params(True)
    for name in ENTRIES if isinstance(module, CausalLM) else ("values",):
        register_fsdp_forward_method(module, name)
    # terms make new tensors of what passes return, and change none in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)


def _trunk(policy: CausalLM, tokens: Tensor) -> Tensor:
    """Last hidden states ``[B, N, d]``."""
    return trunk_states(policy.model, tokens)


def _layers(model: Any) -> list[nn.Module]:
    """The decoder's layers: of the lists of modules that are as long as it is deep the outermost."""
    if model is None:
        return []
    depth = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    found = [x for x in model.modules() if isinstance(x, nn.ModuleList) and len(x) == depth]
    return list(found[0]) if found else []


def _cut_modules(module: nn.Module) -> Iterator[Any]:
    return (one for one in module.modules() if isinstance(one, FSDPModule))


def put_together(critic: Any, policy: Any) -> None:
    """Lets a critic of tokens read the shared trunk of a policy whose weights are in pieces."""
    if isinstance(critic, TokenCritic) and critic.model is None:
        critic.states = policy.trunk


def release(modules: Sequence[nn.Module]) -> None:
    """Gives up the weights of others that the last pass gathered: the next one gathers the newest."""
    for module in modules:
        for one in _cut_modules(module):
            one.reshard()


# ---------------------------------------------------------------------------------------------- gradients


def clip(parameters: Sequence[Tensor], bound: float) -> Tensor:
    """As ``clip_grad_norm_``, over gradients some of which are in pieces; a message.

    Returns:
        The norm of the whole gradient before, a plain scalar.
    """
    found = [x.grad for x in parameters if x.grad is not None]
    own = [x.to_local() for x in found if isinstance(x, DTensor)]
    alike = [x for x in found if not isinstance(x, DTensor)]
    square = _square(own, parameters[0].device)
    dist.all_reduce(square)
    norm = (square + _square(alike, square.device)).sqrt()
    scale = bound / (float(norm) + 1e-6)
    if scale < 1.0:
        torch._foreach_mul_([*own, *alike], scale)
    return norm.float()


def _square(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    held = [x for x in tensors if x.numel()]
    if not held:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(held)).double().square().sum()


# ---------------------------------------------------------------------------------------------- state


def bounds(rows: int, rank: int, world: int) -> tuple[int, int]:
    """Which of so many rows a process holds, as ``torch.chunk`` cuts them."""
    size = -(-rows // world)
    return min(rank * size, rows), min((rank + 1) * size, rows)


def own_piece(x: DTensor) -> tuple[Tensor, int]:
    """This process's rows of a tensor, and the first one's number."""
    mesh = x.device_mesh
    begin, end = bounds(x.shape[0], mesh.get_local_rank(), mesh.size())
    local = x.to_local()
    assert len(local) == end - begin, "another cut than torch.chunk's"
    return local, begin


def piece_of(whole: Tensor | Stored, like: DTensor) -> DTensor:
    """This process's piece of a tensor that is whole, or in files, placed as another is.

    Raises:
        ValueError: it has another shape.
    """
    if tuple(whole.shape) != tuple(like.shape):
        raise ValueError(f"a tensor of shape {tuple(whole.shape)} is wanted as {tuple(like.shape)}")
    mesh = like.device_mesh
    begin, end = bounds(like.shape[0], mesh.get_local_rank(), mesh.size())
    rows = whole.part(begin, end) if isinstance(whole, Stored) else whole[begin:end].clone()
    return placed(rows.to(device=like.to_local().device, dtype=like.dtype), like)


def placed(rows: Tensor, like: DTensor) -> DTensor:
    """This process's rows as a piece of a tensor that is cut as another is."""
    shape, stride = torch.Size(like.shape), like.stride()
    return DTensor.from_local(rows, like.device_mesh, [Along(0)], run_check=False, shape=shape, stride=stride)


def fitted(state: Any, own: Any, parameters: Sequence[Tensor]) -> Any:
    """An agent's saved state as this process holds it: its pieces of what is in pieces here, the rest whole.

    Args:
        state: nested, with whole tensors and :class:`Stored` ones.
        own: the present state of the agent.
        parameters: of its optimiser, in order: moments of a weight are cut as it is.

    Raises:
        ValueError: a tensor has another shape here.
    """
    return _fitted(state, own, parameters, ())


def _fitted(state: Any, own: Any, parameters: Sequence[Tensor], path: tuple[str, ...]) -> Any:
    if isinstance(state, Mapping):
        named = own if isinstance(own, Mapping) else {}
        return {k: _fitted(v, named.get(k), parameters, (*path, str(k))) for k, v in state.items()}
    if isinstance(state, list | tuple):
        held = own if isinstance(own, list | tuple) and len(own) == len(state) else [None] * len(state)
        made = [_fitted(v, held[i], parameters, (*path, str(i))) for i, v in enumerate(state)]
        return type(state)(made)
    if not isinstance(state, Tensor | Stored):
        return state
    like = own
    if path[:3] == ("optimizer", "adam", "state"):
        weight: Any = parameters[int(path[3])]
        like = weight if tuple(weight.shape) == tuple(state.shape) else None
    if isinstance(like, DTensor):
        return piece_of(state, like)
    return state.whole() if isinstance(state, Stored) else state


def plain(state: Any) -> Any:
    """A state without what is in pieces, which :func:`merged` fills in again from another's own."""
    if isinstance(state, Mapping):
        return {k: plain(v) for k, v in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(plain(v) for v in state)
    return HERE if isinstance(state, DTensor) else state


HERE = "\npiece"
"""Stands for a tensor that is in pieces."""


def merged(state: Any, own: Any) -> Any:
    """The state that :func:`plain` made of another process's, with the own pieces."""
    if isinstance(state, Mapping):
        return {k: merged(v, own.get(k) if isinstance(own, Mapping) else None) for k, v in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(merged(v, x) for v, x in zip(state, own, strict=True)) if state else state
    return own if isinstance(state, str) and state == HERE else state
