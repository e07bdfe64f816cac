"""A batch spread over several processes gets the gradient of the whole: ranks are threads that sum at a barrier."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from correction_cases import three_turns
from tensordict import TensorDict
from torch import Tensor

from unified_rl.correction import Correction, correction_names, load_correction, process_total
from unified_rl.correction.internal.distributed import Total, crossing, identity

NAMES = correction_names()
SHARES = (slice(0, 8), slice(8, 12), slice(12, 24), slice(24, 28))
"""Rows of each rank: whole groups of 4, unequal numbers; the last rank's rows are all padding."""
# settings under which the small batch below has something to select or to reject
CHANGED: dict[str, dict[str, Any]] = {
    "clip_cov": {"kernel.fraction": 0.05, "kernel.cov_low": 0.0},
    "kl_cov": {"penalty.0.select.fraction": 0.05},
    "lp_reg": {"kernel.fraction": 0.2},
    "red_drop": {"thin.surplus": 0.4},
    "geo_reject": {"reject.0.low": 0.8, "reject.0.high": 1.25},
    "geo_reject_token_tis": {"reject.0.low": 0.8, "reject.0.high": 1.25},
    **{f"{k}_reject": {"reject.0.high": 0.1} for k in ("k1_mean", "k2_mean", "k3")},
}


def run_ranks(work: Callable[[int, Total], Any]) -> list[Any]:
    """Runs ``work(rank, total)`` on every rank at once; ``total`` sums over the ranks."""
    slots: list[Tensor] = [torch.empty(0)] * len(SHARES)
    out: list[Any] = [None] * len(SHARES)
    barrier = threading.Barrier(len(SHARES))

    def run(rank: int) -> None:
        def total(x: Tensor) -> Tensor:
            slots[rank] = x
            barrier.wait(20)
            everywhere = torch.stack(slots).sum(0)
            barrier.wait(20)
            return everywhere

        try:
            out[rank] = work(rank, total)
        except BaseException as error:
            barrier.abort()
            out[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(SHARES))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in out:
        if isinstance(result, BaseException):
            raise result
    return out


def make() -> tuple[Tensor, TensorDict]:
    g = torch.Generator().manual_seed(5)
    rows, width = SHARES[-1].stop, 9
    current = -0.05 - 3 * torch.rand(rows, width, generator=g, dtype=torch.float64)
    items: dict[str, Tensor] = {
        f"{name}_log_prob": current + 0.3 * torch.randn(rows, width, generator=g, dtype=torch.float64)
        for name in ("behavior", "proximal", "reference", "proxy", "teacher")
    }
    batch = three_turns(items, g, hidden=0.25)
    batch["mask"][SHARES[-1]] = False
    return current, batch


def gradient(correction: Correction, log_prob: Tensor, batch: TensorDict) -> Tensor:
    leaf = log_prob.clone().requires_grad_()
    correction(leaf, batch).loss.backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("name", NAMES)
def test_ranks_together_give_the_gradient_of_the_whole_batch(name: str) -> None:
    log_prob, batch = make()
    denominator = "original" if len(name) % 2 else "kept"  # either, whatever the preset's own

    def build() -> Correction:
        return load_correction(name, denominator=denominator, **CHANGED.get(name, {}))

    def work(rank: int, total: Total) -> Tensor:
        correction = build()
        correction.total = total
        return gradient(correction, log_prob[SHARES[rank]], batch[SHARES[rank]])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = gradient(build(), log_prob, batch)
        parts = torch.cat(run_ranks(work))
    assert whole.abs().sum() > 0
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["ppo", "tis", "bapo", "geo_reject", "vespo"])
def test_every_rank_reports_the_diagnostics_of_the_whole_batch(name: str) -> None:
    log_prob, batch = make()

    def build() -> Correction:
        return load_correction(name, **CHANGED.get(name, {}))

    def work(rank: int, total: Total) -> dict[str, Tensor]:
        correction = build()
        correction.total = total
        return correction.diagnostics(log_prob[SHARES[rank]], batch[SHARES[rank]], version=3)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = build().diagnostics(log_prob, batch, version=3)
        reports = run_ranks(work)
    for report in reports:
        assert report.keys() == whole.keys()
        for key, value in whole.items():
            assert float(report[key]) == pytest.approx(float(value), rel=1e-6), key


@pytest.mark.parametrize("name", ["m2po", "clip_cov", "kl_cov", "lp_reg", "bapo", "p3o", "normalized_tis"])
def test_a_rank_alone_would_have_chosen_otherwise(name: str) -> None:
    """The batch above is one on which the sums matter: the mean of the ranks' own gradients is another one."""
    log_prob, batch = make()
    correction = load_correction(name, **CHANGED.get(name, {}))
    whole = gradient(correction, log_prob, batch)
    alone = torch.cat([gradient(correction, log_prob[s], batch[s]) for s in SHARES[:-1]])
    units = batch["mask"].sum()
    share = torch.cat([batch["mask"][s].sum().expand(s.stop - s.start) / units for s in SHARES[:-1]])
    part = whole[: SHARES[-1].start]
    assert float((alone * share[:, None] - part).norm() / part.norm()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kth_smallest_of_values_on_several_ranks(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    values = torch.randn(28, 40, generator=g, dtype=torch.float64).to(dtype)
    values[:, ::4] = values[3, 4]  # equal values on every rank
    values[5, :3] = torch.tensor([0.0, -0.0, math.inf])
    ordered = sorted(values[: SHARES[-1].start].flatten().tolist())

    def work(rank: int, total: Total) -> list[float]:
        mine = values[SHARES[rank]].flatten()
        mine = mine[:0] if rank == 3 else mine
        return [float(crossing(mine, k, total)) for k in (0, 1, 300, 500, len(ordered) - 1, len(ordered))]

    expected = [ordered[k] for k in (0, 1, 300, 500, len(ordered) - 1)] + [math.inf]
    for found in run_ranks(work):
        assert found == expected
    everything = values[: SHARES[-1].start].flatten()
    assert [float(crossing(everything, k, identity)) for k in (0, 1, 300, 500, len(ordered) - 1)] == expected[:-1]


def test_weighted_crossing_by_hand_and_on_several_ranks() -> None:
    """Values 1, 2, 3, 4 that weigh themselves: the running weights are 1, 3, 6, 10."""
    values = torch.tensor([4.0, 1.0, 3.0, 2.0])
    for allowance, expected in ((0.5, 1.0), (1.0, 2.0), (3.5, 3.0), (6.0, 4.0), (10.0, math.inf)):
        assert float(crossing(values, allowance, identity, torch.Tensor.double)) == expected
        found = run_ranks(
            lambda rank, total, a=allowance: crossing(values[rank : rank + 1], a, total, lambda v: v.double())
        )
        assert [float(x) for x in found] == [expected] * 4


def test_equal_log_ratios_leave_the_budget_together_whatever_their_order() -> None:
    """Three harmful units of squares 1, 1 and 0.01 under a budget of 0.4: one of the equal two would not fit."""
    log_prob = torch.tensor([[-1.0, -1.0, -1.0]], dtype=torch.float64)
    behavior = log_prob - torch.tensor([[1.0, 1.0, 0.1]], dtype=torch.float64)
    record = TensorDict(
        {
            "behavior_log_prob": behavior,
            "mask": torch.ones(1, 3, dtype=torch.bool),
            "step_index": torch.zeros(1, 3, dtype=torch.int64),
            "reward": torch.zeros(1, 1),
            "advantage": torch.ones(1),
        },
        batch_size=[1],
    )
    m2po = Correction(kernel={"name": "m2_mask", "budget": 0.4})
    assert m2po.prepare(log_prob, record)["m2_keep"].tolist() == [[False, False, True]]
    m2po = Correction(kernel={"name": "m2_mask", "budget": 0.68})  # the mean of all three is 0.67
    assert m2po.prepare(log_prob, record)["m2_keep"].tolist() == [[True, True, True]]


def _worker(rank: int, folder: str) -> None:
    """One of two processes: its half of the batch through ``torch.distributed``, its gradients to a file."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    log_prob, batch = make()
    mine = slice(0, 12) if rank == 0 else slice(12, 28)
    gradients = []
    for name in PROCESS_NAMES:
        correction = load_correction(name, **CHANGED.get(name, {}))
        correction.total = process_total()
        gradients.append(gradient(correction, log_prob[mine], batch[mine]))
    torch.save(torch.stack(gradients), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


PROCESS_NAMES = ("ppo", "m2po", "clip_cov", "kl_cov", "lp_reg", "bapo", "p4o", "red_drop", "normalized_tis")


def test_two_processes_over_gloo_give_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    parts = torch.cat([torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)], 1)
    log_prob, batch = make()
    for name, got in zip(PROCESS_NAMES, parts, strict=True):
        whole = gradient(load_correction(name, **CHANGED.get(name, {})), log_prob, batch)
        torch.testing.assert_close(got, whole, rtol=1e-9, atol=1e-12, msg=name)
