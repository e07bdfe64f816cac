"""No preset makes a temporary larger than the batch, nor holds many of them at once."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unified_rl.correction import correction_names, load_correction

ROWS, WIDTH = 32, 64
UNIT = 4 * ROWS * WIDTH
"""Bytes of one float32 tensor of the batch's shape."""


class Meter(TorchDispatchMode):
    """Counts the bytes of the storages that operations create: the largest, and the most alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.alive = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in inputs:
                self._count(x.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.alive += size
        self.largest, self.peak = max(self.largest, size), max(self.peak, self.alive)

        def freed() -> None:
            self.known.discard(key)
            self.alive -= size

        weakref.finalize(storage, freed)


def make() -> tuple[Tensor, TensorDict]:
    g = torch.Generator().manual_seed(0)
    current = -0.1 - 3 * torch.rand(ROWS, WIDTH, generator=g)
    items = {
        f"{name}_log_prob": current + 0.3 * torch.randn(ROWS, WIDTH, generator=g)
        for name in ("behavior", "proximal", "reference", "proxy", "teacher")
    }
    items["mask"] = torch.rand(ROWS, WIDTH, generator=g) > 0.3
    items["step_index"] = (torch.arange(WIDTH) * 4 // WIDTH).expand(ROWS, WIDTH).contiguous()
    items["reward"] = torch.zeros(ROWS, 4)
    items["reward"][:, -1] = (torch.rand(ROWS, generator=g) > 0.5).float()
    items["advantage"] = torch.randn(ROWS, generator=g)
    items["group"] = torch.arange(ROWS) // 4
    items["source"] = torch.arange(ROWS) % 3
    items["policy_version"] = torch.zeros(ROWS, WIDTH, dtype=torch.int64)
    return current.requires_grad_(), TensorDict(items, batch_size=[ROWS])


def test_the_meter_sees_a_large_temporary_and_its_release() -> None:
    meter = Meter()
    with meter:
        x = torch.zeros(100, dtype=torch.float64)
        for _ in range(3):
            y = x[:, None] * x
            del y
    assert meter.largest == 80_000
    assert meter.peak == 80_800


@pytest.mark.parametrize("name", correction_names())
def test_temporaries_are_a_small_constant_times_the_batch(name: str) -> None:
    log_prob, batch = make()
    correction = load_correction(name)
    meter = Meter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with meter:
            correction(log_prob, batch).loss.backward()
    assert meter.largest <= 2 * UNIT  # an int64 a unit
    assert meter.peak <= 16 * UNIT
