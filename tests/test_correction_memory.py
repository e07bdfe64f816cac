"""No preset makes a temporary larger than the batch, nor holds many of them at once."""

from __future__ import annotations

import warnings

import pytest
import torch
from memory_meter import Meter
from tensordict import TensorDict
from torch import Tensor

from unified_rl.correction import correction_names, load_correction

SHAPES = ((32, 64), (4, 16_384))
"""Rows and tokens: whatever grows faster than their product shows in one of the two."""


def make(rows: int, width: int) -> tuple[Tensor, TensorDict]:
    g = torch.Generator().manual_seed(0)
    current = -0.1 - 3 * torch.rand(rows, width, generator=g)
    items = {
        f"{name}_log_prob": current + 0.3 * torch.randn(rows, width, generator=g)
        for name in ("behavior", "proximal", "reference", "proxy", "teacher")
    }
    items["mask"] = torch.rand(rows, width, generator=g) > 0.3
    items["step_index"] = (torch.arange(width) * 4 // width).expand(rows, width).contiguous()
    items["reward"] = torch.zeros(rows, 4)
    items["reward"][:, -1] = (torch.rand(rows, generator=g) > 0.5).float()
    items["advantage"] = torch.randn(rows, generator=g)
    items["group"] = torch.arange(rows) // 4
    items["source"] = torch.arange(rows) % 3
    items["policy_version"] = torch.zeros(rows, width, dtype=torch.int64)
    return current.requires_grad_(), TensorDict(items, batch_size=[rows])


def test_the_meter_sees_a_large_temporary_and_its_release() -> None:
    meter = Meter()
    with meter:
        x = torch.zeros(100, dtype=torch.float64)
        for _ in range(3):
            y = x[:, None] * x
            del y
    assert meter.largest == 80_000
    assert meter.peak == 80_800


@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("name", correction_names())
def test_temporaries_are_a_small_constant_times_the_batch(name: str, rows: int, width: int) -> None:
    log_prob, batch = make(rows, width)
    correction = load_correction(name)
    meter = Meter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with meter:
            correction(log_prob, batch).loss.backward()
    one = 4 * rows * width  # bytes of one float32 tensor of the batch's shape
    assert meter.largest <= 2 * one  # an int64 a unit
    assert meter.peak <= 16 * one
