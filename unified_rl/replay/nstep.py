"""Multi-step transitions, made from windows at sample time."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from unified_rl.errors import ConfigError, RecordError


def nstep_transitions(segment: TensorDictBase, n: int, gamma: float | None = None) -> TensorDict:
    """Sums the rewards of up to ``n`` steps from the first step of each window.

    Over the ``m <= n`` steps up to the window's first episode end: ``reward = sum_i (prod_{j<i} d_j) r_i`` and
    ``discount = prod_{j<m} d_j``, so that ``reward + discount * (1 - terminated) * V(next_observation)`` is the n-step
    target. ``terminated``, ``truncated`` and ``next_observation`` are those of step m. Source: Learning to Predict by
    the Methods of Temporal Differences (Sutton, 1988), without importance weights.

    Args:
        segment: batch size ``[B, T]`` with ``step_mask``, as :meth:`Replay.sample` gives it; ``T >= n``.
        n: steps at most.
        gamma: discount of a step; the stored ``discount`` if None.

    Returns:
        Batch size ``[B]``: ``steps`` int64 is m, every other key is the first step's.

    Raises:
        RecordError: if the windows are shorter than ``n``.
    """
    if n < 1:
        raise ConfigError(f"n must be at least 1, got {n}")
    if segment.ndim != 2 or segment.shape[1] < n:
        raise RecordError(f"{n}-step transitions need windows [B, {n}], got {list(segment.shape)}")
    reward, mask = segment["reward"][:, :n], segment["step_mask"][:, :n] & _same_episode(segment)[:, :n]
    step = torch.full_like(reward, gamma) if gamma is not None else segment["discount"][:, :n]
    product = step.cumprod(1)
    weight = torch.cat([torch.ones_like(product[:, :1]), product[:, :-1]], 1)
    steps = mask.sum(1)
    last = steps - 1
    row = torch.arange(len(last), device=last.device)
    out = {key: value[:, 0] for key, value in segment.items() if key != "step_mask"}
    for key in ("terminated", "truncated", "next_observation"):
        if key in out:
            out[key] = segment[key][row, last]
    out["reward"] = torch.where(mask, reward * weight, torch.zeros_like(reward)).sum(1)
    out["discount"] = product[row, last]
    out["steps"] = steps
    return TensorDict(out, batch_size=[segment.shape[0]], device=segment.device)


def _same_episode(segment: TensorDictBase) -> Tensor:
    """``[B, T]`` bool: no step before ended an episode. A replay may give windows that run on, see ``cut``."""
    ended = segment["terminated"] | segment["truncated"]
    return (ended.cumsum(1) - ended.long()) == 0
