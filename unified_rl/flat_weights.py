"""Many small weights in one piece of memory, so that an optimiser step is a few operations and not some of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.adamw import adamw

MOST = 2**20
"""Weights; of more, arithmetic takes longer than what is saved, and a second copy of the gradient is not free."""
KINDS: dict[type[torch.optim.Optimizer], Callable[..., None]] = {torch.optim.Adam: adam, torch.optim.AdamW: adamw}
"""Optimisers that treat every number alike, whichever weight it belongs to."""


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
        sizes = [sum(weight.numel() for weight in own) for own in self.weights]
        values = torch.cat([weight.detach().reshape(-1) for weight in self.every])
        self.gradient = torch.zeros_like(values)
        self.slices = list(self.gradient.split(sizes))
        self.flats = [nn.Parameter(piece) for piece in values.split(sizes)]
        for own, flat in zip(self.weights, self.flats, strict=True):
            for weight, piece in zip(own, _cut(flat.detach(), own), strict=True):
                weight.data = piece
        self.places = [weight.data_ptr() for weight in self.every]
        self._join_states()
        self._plain = all(
            group["fused"] and not (group["amsgrad"] or group["maximize"]) for group in optimizer.param_groups
        )
        numbers = iter(self.flats)
        for group, pieces in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = [next(numbers) for _ in pieces]

    @staticmethod
    def possible(optimizer: torch.optim.Optimizer) -> bool:
        """Whether there is something to gain, and nothing that would be lost."""
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        plain = all(w.device.type == "cpu" and w.dtype == torch.float32 and w.is_contiguous() for w in weights)
        own = len({weight.data_ptr() for weight in weights}) == len(weights)
        fits = len(weights) >= 2 and sum(weight.numel() for weight in weights) <= MOST
        return type(optimizer) in KINDS and plain and own and fits and _alike(optimizer)

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
            torch.cat([gradient.reshape(-1) for gradient in found], out=piece)
            flat.grad = piece
        return True

    def clip(self, bound: float) -> Tensor:
        """Bounds the norm of the whole gradient as ``clip_grad_norm_``; returns what it was."""
        norm = torch.linalg.vector_norm(self.gradient)
        if bound != float("inf"):
            self.gradient.mul_((bound / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def step(self) -> None:
        """A step of the optimiser, by torch's own function for it; by its method where somebody listens to that."""
        listened = "step" in vars(self.optimizer) or self.optimizer._optimizer_step_pre_hooks
        if listened or self.optimizer._optimizer_step_post_hooks or not self._plain:
            self.optimizer.step()
            return
        for group in self.optimizer.param_groups:
            moved = [weight for weight in group["params"] if weight.grad is not None]
            states = [self.optimizer.state[weight] for weight in moved]
            if not all(states):  # torch makes them at the first step
                self.optimizer.step()
                return
            with torch.no_grad():
                KINDS[type(self.optimizer)](
                    moved,
                    [weight.grad for weight in moved],
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                    [],
                    [state["step"] for state in states],
                    fused=True,
                    amsgrad=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )

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
                    key: torch.cat([state[key].reshape(-1) for state in states]) if x.shape == own[0].shape else x
                    for key, x in states[0].items()
                }


def _cut(flat: Tensor, own: Sequence[Tensor]) -> list[Tensor]:
    """Views of a joined tensor in the shapes of its parts."""
    pieces = flat.split([weight.numel() for weight in own])
    return [piece.view(weight.shape) for piece, weight in zip(pieces, own, strict=True)]


def _alike(optimizer: torch.optim.Optimizer) -> bool:
    """Whether every weight has taken as many steps as the others."""
    states: list[dict[str, Any]] = [
        optimizer.state.get(weight, {}) for group in optimizer.param_groups for weight in group["params"]
    ]
    return len({float(state["step"]) if "step" in state else 0.0 for state in states}) == 1
