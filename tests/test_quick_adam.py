"""Adam's steps without the bookkeeping: the same bits as torch's own, whatever is done to the optimiser meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from unified_rl.quick_adam import QuickAdam

OPTIMIZERS: dict[str, Any] = {
    "fused": lambda p: torch.optim.Adam(p, 1e-2, fused=True),
    "decayed": lambda p: torch.optim.Adam(p, 1e-2, fused=True, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-4),
    "amsgrad": lambda p: torch.optim.Adam(p, 1e-2, fused=True, amsgrad=True),
    "plain": lambda p: torch.optim.Adam(p, 1e-2),
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
}


def train(kind: str, quick: bool) -> list[Tensor]:
    """Twelve steps, with another rate, a missing gradient, a restored state, a cleared one and a hook among them."""
    stream = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=stream, requires_grad=True) for shape in ((3, 4), (4,), ())]
    optimizer = OPTIMIZERS[kind](weights)
    step = QuickAdam(optimizer).step if quick else optimizer.step
    seen: list[int] = []
    for number in range(12):
        for index, weight in enumerate(weights):
            gradient = torch.randn(weight.shape, generator=stream)
            weight.grad = None if (number, index) == (4, 1) else gradient
        if number == 3:
            optimizer.param_groups[0]["lr"] = 0.1
        if number == 6:
            optimizer.load_state_dict(optimizer.state_dict())
        if number == 8:
            optimizer.state.clear()
        if number == 10:
            optimizer.register_step_post_hook(lambda *_: seen.append(0))
        step()
    assert len(seen) == 2
    states = [x for weight in weights for x in optimizer.state[weight].values() if isinstance(x, Tensor)]
    return [weight.detach() for weight in weights] + states


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_steps_are_those_of_the_optimiser(kind: str) -> None:
    pairs = zip(train(kind, True), train(kind, False), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_a_fused_adam_is_not_asked_after_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, calls = torch.ones(3, requires_grad=True), []
    optimizer = torch.optim.Adam([weight], 0.1, fused=True)
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (calls.append(0), step(self))[1])
    quick = QuickAdam(optimizer)
    for _ in range(4):
        weight.grad = torch.ones(3)
        quick.step()
    assert len(calls) == 1 and float(optimizer.state[weight]["step"]) == 4
