"""Many small weights in one piece of memory, so that an optimiser step is a few operations and not some of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from unified_rl.quick_adam import KERNELS, QuickAdam

ALIGNED = 16
"""Numbers: every weight begins at 64 bytes, as if it were by itself, so that matrix products go and round as ever."""
MOST = 2**20
"""Weights; of more, arithmetic takes longer than what is saved, and a second copy of the gradient is not free."""
ZEROS = torch.zeros(ALIGNED)


class FlatWeights:
    """The weights of an optimiser, joined into one for each module and group, as far as they go together.

    The weights stay what they are to everybody else: parameters with a gradient of their own, now views of one piece
    of memory. The optimiser's groups hold the joined ones until :meth:`part`. A step is the same arithmetic; only the
    norm of the gradient is summed in another order.

    Args:
        optimizer: whose groups are joined in place, with the moments that it has.
        named: its weights, ``module.name`` and parameter.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        self.optimizer = optimizer
        role = {id(weight): name.split(".")[0] for name, weight in named}
        groups = [
            [list(own) for _, own in groupby(group["params"], lambda weight: role[id(weight)])]
            for group in optimizer.param_groups
        ]
        self.weights = [own for pieces in groups for own in pieces]
        self.every = [weight for own in self.weights for weight in own]
        sizes = [sum(_room(weight) for weight in own) for own in self.weights]
        values = torch.cat([piece for own in self.weights for piece in _padded(own, own)]).detach()
        self.gradient = torch.zeros_like(values)
        self.slices = list(self.gradient.split(sizes))
        self.flats = [nn.Parameter(piece) for piece in values.split(sizes)]
        for own, flat in zip(self.weights, self.flats, strict=True):
            for weight, piece in zip(own, _cut(flat.detach(), own), strict=True):
                weight.data = piece
        self.places = [weight.data_ptr() for weight in self.every]
        self._join_states()
        numbers = iter(self.flats)
        for group, pieces in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = [next(numbers) for _ in pieces]
        self._move = QuickAdam(optimizer)

    @staticmethod
    def possible(optimizer: torch.optim.Optimizer) -> bool:
        """Whether there is something to gain, and nothing that would be lost."""
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        plain = all(w.device.type == "cpu" and w.dtype == torch.float32 and w.is_contiguous() for w in weights)
        own = len({weight.data_ptr() for weight in weights}) == len(weights)
        fits = len(weights) >= 2 and sum(weight.numel() for weight in weights) <= MOST
        return type(optimizer) in KERNELS and plain and own and fits and _alike(optimizer)

    def gather(self) -> bool:
        """Copies the gradients of the weights together; False where that would be another step.

        It would where a weight has left the joined memory, or some weights of a module have a gradient and others none.
        """
        if [weight.data_ptr() for weight in self.every] != self.places:
            return False
        for own, flat, piece in zip(self.weights, self.flats, self.slices, strict=True):
            found = [weight.grad for weight in own if weight.grad is not None]
            if not found:
                flat.grad = None
                piece.zero_()
                continue
            if len(found) < len(own):
                return False
            torch.cat(_padded(found, own), out=piece)
            flat.grad = piece
        return True

    def clip(self, bound: float) -> Tensor:
        """Bounds the norm of the whole gradient as ``clip_grad_norm_``; returns what it was."""
        norm = torch.linalg.vector_norm(self.gradient)
        scale = bound / (float(norm) + 1e-6)  # on a CPU nothing waits for the number
        if scale < 1.0:
            self.gradient.mul_(scale)
        return norm

    def step(self) -> None:
        """A step of the optimiser."""
        self._move.step()

    def part(self) -> None:
        """Gives the optimiser the weights themselves back, each with its moments."""
        pieces = iter(self.weights)
        for group in self.optimizer.param_groups:
            group["params"] = [weight for _ in group["params"] for weight in next(pieces)]
        joined: dict[Tensor, dict[str, Tensor]] = {
            flat: self.optimizer.state.pop(flat) for flat in self.flats if flat in self.optimizer.state
        }
        self.optimizer.state.update(self.parted(joined))

    def parted(self, moments: Mapping[Tensor, dict[str, Tensor]]) -> dict[Tensor, dict[str, Tensor]]:
        """Moments of joined weights as those of the weights themselves; of others as they are."""
        found = {weight: dict(state) for weight, state in moments.items() if all(weight is not f for f in self.flats)}
        for own, flat in zip(self.weights, self.flats, strict=True):
            state = moments.get(flat, {})
            pieces = {key: _cut(x, own) for key, x in state.items() if x.shape == flat.shape}
            for number, weight in enumerate(own if state else ()):
                found[weight] = {k: (pieces[k][number] if k in pieces else x).clone() for k, x in state.items()}
        return found

    def _join_states(self) -> None:
        for own, flat in zip(self.weights, self.flats, strict=True):
            states = [self.optimizer.state.pop(weight, {}) for weight in own]
            if states[0]:
                self.optimizer.state[flat] = {
                    key: torch.cat(_padded([state[key] for state in states], own)) if x.shape == own[0].shape else x
                    for key, x in states[0].items()
                }


def _cut(flat: Tensor, own: Sequence[Tensor]) -> list[Tensor]:
    """Views of a joined tensor in the shapes of its parts."""
    pieces = flat.split([_room(weight) for weight in own])
    return [piece[: weight.numel()].view(weight.shape) for piece, weight in zip(pieces, own, strict=True)]


def _room(weight: Tensor) -> int:
    """Numbers that a weight takes, with what stands behind it."""
    return -(-weight.numel() // ALIGNED) * ALIGNED


def _padded(tensors: Sequence[Tensor], own: Sequence[Tensor]) -> list[Tensor]:
    """Tensors in the shapes of ``own``, flat, with zeros between them, for ``torch.cat``."""
    pieces: list[Tensor] = []
    for tensor, weight in zip(tensors, own, strict=True):
        pieces.append(tensor.reshape(-1))
        if empty := _room(weight) - weight.numel():
            pieces.append(ZEROS[:empty])
    return pieces


def _alike(optimizer: torch.optim.Optimizer) -> bool:
    """Whether every weight has taken as many steps as the others."""
    states: list[dict[str, Any]] = [
        optimizer.state.get(weight, {}) for group in optimizer.param_groups for weight in group["params"]
    ]
    return len({float(state["step"]) if "step" in state else 0.0 for state in states}) == 1
