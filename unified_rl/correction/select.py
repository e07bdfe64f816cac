"""Selections: which units a penalty is for, chosen on the whole batch and carried in its statistics."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unified_rl.correction.batch_kernels import covariance
from unified_rl.correction.view import View


def negative(view: View) -> Tensor:
    """Units of negative advantage, ``[B, N]`` bool."""
    return view.mask & (view.advantage < 0)


def positive(view: View) -> Tensor:
    """Units of positive advantage, ``[B, N]`` bool."""
    return view.mask & (view.advantage > 0)


def selected(view: View) -> Tensor:
    """The units that the kernel's own companion chose."""
    return view.stats["selected"]


def top_covariance(view: View, *, fraction: float = 2e-4) -> Tensor:
    """The units of highest covariance of advantage and log-prob; at least one."""
    cov = torch.where(view.mask, covariance(view, lambda x: x), -torch.inf)
    number = min(max(1, int(fraction * int(view.mask.sum()))), cov.numel())
    top = cov.flatten().topk(number).indices
    chosen = torch.zeros(cov.numel(), dtype=torch.bool, device=cov.device).index_fill(0, top, True)
    return chosen.view_as(cov) & view.mask


SELECTIONS: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (negative, positive, selected, top_covariance)}
