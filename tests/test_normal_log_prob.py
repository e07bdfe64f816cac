"""The log-density whose derivatives are written out, against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unified_rl.policies.base import NormalLogProb, normal_log_prob


@pytest.mark.parametrize("own_std", [False, True])
def test_written_derivatives_are_those_of_autograd_to_the_last_digit(own_std: bool) -> None:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    x, slope = normal(300, 5), normal(300, 1)
    mean, log_std = normal(300, 5).requires_grad_(), (0.3 * normal(*(300, 5) if own_std else (5,))).requires_grad_()
    mine = NormalLogProb.apply(x, mean, log_std)
    theirs = normal_log_prob(x, mean, log_std).sum(-1, keepdim=True)
    assert torch.equal(mine, theirs)
    for one, other in zip(*(torch.autograd.grad(y, [mean, log_std], slope) for y in (mine, theirs)), strict=True):
        assert torch.equal(one, other) and one.abs().sum() > 0
