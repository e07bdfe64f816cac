"""Small records with given log-ratios, and the weights that a correction gives them."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.correction import Correction


def record(log_ratio: Tensor, advantage: Tensor, **extra: Tensor) -> tuple[Tensor, TensorDict]:
    """A record whose current log-probs lie ``log_ratio`` above those of behavior, proximal and reference alike."""
    rows, width = log_ratio.shape
    current = torch.full_like(log_ratio, -2.0)
    behind = current - log_ratio
    items = {
        "behavior_log_prob": behind,
        "proximal_log_prob": behind.clone(),
        "reference_log_prob": behind.clone(),
        "mask": torch.ones(rows, width, dtype=torch.bool),
        "step_index": torch.arange(width).expand(rows, width).contiguous(),
        "reward": torch.zeros(rows, width, dtype=log_ratio.dtype),
        "advantage": advantage,
        "group": torch.zeros(rows, dtype=torch.int64),
        "policy_version": torch.zeros(rows, width, dtype=torch.int64),
    }
    return current, TensorDict({**items, **extra}, batch_size=[rows])


def ratios(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64).log()


def weights(correction: Correction, log_ratio: Tensor, advantage: float = 1.0) -> list[float]:
    """The kernel's weights of one row: the total coefficient without reduction and advantage."""
    current, batch = record(log_ratio, torch.full((log_ratio.shape[0],), advantage, dtype=torch.float64))
    out = correction(current, batch)
    return (out.weight * log_ratio.numel() / advantage).flatten().tolist()


def drifted(seed: int = 0, rows: int = 4, width: int = 6, size: float = 0.3) -> tuple[Tensor, TensorDict]:
    g = torch.Generator().manual_seed(seed)
    log_ratio = size * torch.randn(rows, width, generator=g, dtype=torch.float64)
    return record(log_ratio, torch.randn(rows, generator=g, dtype=torch.float64))


def three_turns(log_probs: dict[str, Tensor], g: torch.Generator, hidden: float) -> TensorDict:
    """A record around log-probs ``[B, N]``: groups of four rows, three turns, an outcome of 0 or 1, a share masked."""
    rows, width = next(iter(log_probs.values())).shape
    items = {**log_probs, "mask": torch.rand(rows, width, generator=g) > hidden}
    items["step_index"] = (torch.arange(width) * 3 // width).expand(rows, -1).contiguous()
    items["reward"] = torch.zeros(rows, 3, dtype=torch.float64)
    items["reward"][:, -1] = (torch.rand(rows, generator=g) > 0.5).double()
    items["advantage"] = torch.randn(rows, generator=g, dtype=torch.float64)
    items["group"] = torch.arange(rows) // 4
    items["source"] = torch.arange(rows) % 3
    items["policy_version"] = torch.zeros(rows, width, dtype=torch.int64)
    return TensorDict(items, batch_size=[rows])
