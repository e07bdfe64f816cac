"""Every sampler against a slow model of it: proportions by chi-square, indices by brute force, errors by message."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hydra.utils import instantiate
from scipy.stats import chisquare
from tensordict import TensorDict

from unified_rl.config import config_root
from unified_rl.errors import ConfigError, RecordError
from unified_rl.replay import (
    Buckets,
    Fresh,
    Group,
    Mixture,
    Priority,
    Recency,
    Replay,
    Sampler,
    Softmax,
    StalenessBounded,
    Uniform,
    WithoutReplacement,
    nstep_transitions,
)
from unified_rl.replay.sum_tree import SumTree

PRESETS = config_root() / "replay"


def numbers(first: int, count: int, **more: object) -> dict[str, torch.Tensor]:
    x = torch.arange(first, first + count)
    return {"x": x, **{key: torch.as_tensor(value) for key, value in more.items()}}


def holding(sampler: Sampler, count: int, capacity: int | None = None, **more: object) -> Replay:
    replay = Replay(capacity or count, sampler=sampler, seed=11)
    replay.extend(numbers(0, count, **more))
    return replay


def fits(drawn: torch.Tensor, probability: dict[int, float]) -> bool:
    """Whether draws follow a distribution (chi-square, fixed seeds)."""
    count = Counter(drawn.tolist())
    assert set(count) <= set(probability)
    seen = [count[key] for key in probability]
    total = sum(probability.values())
    expected = [p / total * len(drawn) for p in probability.values()]
    return seen == expected or chisquare(seen, expected).pvalue > 1e-4


@pytest.mark.parametrize("size", [1, 3, 100, 5000])
def test_sum_tree_draws_what_a_cumulated_sum_would(size: int) -> None:
    rng = np.random.default_rng(size)
    tree = SumTree(size)
    weights = np.zeros(size)
    for _ in range(20):
        at = rng.integers(0, size, 50)
        new = rng.random(50) * (rng.random(50) < 0.7)
        tree.set(at, new)
        weights[at] = new
        first, last = np.sort(rng.integers(0, size + 1, 2))
        if last > first:
            tree.fill(int(first), int(last), 0.25)
            weights[first:last] = 0.25
        if weights.sum() == 0:
            continue
        assert tree.total == pytest.approx(weights.sum())
        quantiles = np.sort(rng.random(300))
        drawn = tree.draw(quantiles)
        cumulated = weights.cumsum() / weights.sum()
        assert (weights[drawn] > 0).all()
        assert (quantiles >= cumulated[drawn] - weights[drawn] / weights.sum() - 1e-12).all()
        assert (quantiles <= cumulated[drawn] + 1e-12).all()


def test_sum_tree_never_draws_weight_zero_even_at_the_ends() -> None:
    tree = SumTree(10_000)
    tree.set(np.array([17, 5_000, 9_998]), np.array([1e-30, 1.0, 1e30]))
    ends = np.array([0.0, np.nextafter(0.0, 1.0), 0.5, np.nextafter(1.0, 0.0)])
    assert set(tree.draw(ends).tolist()) <= {17, 5_000, 9_998}
    with pytest.raises(RecordError, match="weight 0"):
        SumTree(10).draw(ends)


def test_priority_draws_in_proportion_and_weights_by_the_inverse() -> None:
    replay = holding(Priority(alpha=0.5, beta=1.0, eps=0.0), 6)
    priority = torch.tensor([0.0, 1.0, 4.0, 9.0, 16.0, 25.0])
    replay.update_priority(torch.arange(6), priority)
    batch = replay.sample(3_000)
    share = priority.sqrt() / priority.sqrt().sum()  # 0, 1/15, 2/15, ..., 5/15
    # stratified draws deviate by less than one from the expectation of each row
    counts = torch.bincount(batch["x"], minlength=6)
    assert bool(((counts - 3_000 * share).abs() < 1.001).all())
    expected = share[1] / share[batch["x"]]  # (n P) ** -1 over the largest, which belongs to row 1
    torch.testing.assert_close(batch["priority_weight"], expected)


def test_new_rows_get_the_largest_priority_and_old_ones_leave_with_their_slot() -> None:
    replay = holding(Priority(alpha=1.0, eps=0.0), 4)
    replay.update_priority(torch.arange(4), torch.tensor([0.0, 0.0, 7.0, 0.0]))
    replay.extend(numbers(100, 1))  # takes slot 0 with priority 7
    counts = torch.bincount(replay.sample(1_000)["index"], minlength=4).tolist()
    assert counts == [500, 0, 500, 0]
    replay.extend(numbers(101, 2))  # slots 1 and 2: the old 7 is gone, the new is 7 again
    assert torch.bincount(replay.sample(900)["index"], minlength=4).tolist() == [300, 300, 300, 0]


def test_priorities_of_windows_leave_out_the_starts_that_would_cross_the_newest_row() -> None:
    replay = holding(Priority(alpha=1.0, eps=0.0), 8)
    replay.update_priority(torch.arange(8), torch.arange(8).float())
    batch = replay.sample(1_500, length=4)
    assert torch.bincount(batch["x"][:, 0], minlength=8).tolist() == [0, 150, 300, 450, 600, 0, 0, 0]
    assert batch["priority_weight"].shape == (1_500, 4)
    after = replay.sample(2_800)  # the hidden weights are back
    assert torch.bincount(after["x"], minlength=8).tolist() == [0, 100, 200, 300, 400, 500, 600, 700]


def test_bad_priorities_are_refused_and_change_nothing() -> None:
    replay = holding(Priority(), 4)
    for bad in (float("nan"), float("inf"), -1.0):
        with pytest.raises(RecordError, match="finite and not negative"):
            replay.update_priority(torch.tensor([1]), torch.tensor([bad]))
    with pytest.raises(RecordError, match="differ in shape"):
        replay.update_priority(torch.tensor([1]), torch.ones(2))
    assert torch.bincount(replay.sample(400)["x"]).tolist() == [100] * 4
    with pytest.raises(ConfigError):
        Priority(beta=2.0)


def test_priority_in_memory_mapped_files_forgets_rows_that_left(tmp_path: Path) -> None:
    replay = Replay(16, sampler=Priority(alpha=1.0, eps=0.0), storage="memmap", path=str(tmp_path))
    for first in range(0, 45, 5):
        index = replay.extend(numbers(first, 5))
        replay.update_priority(index, torch.arange(first, first + 5).float())
        live = range(max(0, first + 5 - 16), first + 5)
        assert fits(replay.sample(400)["x"], {x: float(x) for x in live if x})


def test_without_replacement_passes_over_everything_once_an_epoch() -> None:
    replay = holding(WithoutReplacement(), 12)
    for _ in range(3):
        assert sorted(replay.sample(8)["x"].tolist() + replay.sample(4)["x"].tolist()) == list(range(12))
    first = replay.sample(8)["x"].tolist()
    replay.extend(numbers(12, 3))  # 0, 1, 2 leave; 12, 13, 14 wait for the next epoch
    rest = [x for x in range(3, 12) if x not in first]
    second = replay.sample(len(rest))["x"].tolist()
    assert sorted(second) == rest
    assert sorted(replay.sample(12)["x"].tolist()) == list(range(3, 15))


def test_recency_halves_with_each_half_life() -> None:
    replay = holding(Recency(half_life=2.0), 10, capacity=16)
    assert fits(replay.sample(4_000)["x"], {x: 0.5 ** ((9 - x) / 2) for x in range(10)})
    lanes = Replay(20, lanes=2, sampler=Recency(half_life=1.0), seed=1)
    lanes.extend({"x": torch.arange(20).view(10, 2)})
    assert fits(lanes.sample(4_000)["x"], {x: 0.5 ** (9 - x // 2) for x in range(20)})
    assert fits(lanes.sample(4_000, length=3)["x"][:, 0], {x: 0.5 ** (7 - x // 2) for x in range(16)})


def test_softmax_follows_the_stored_score_also_after_the_best_row_has_left() -> None:
    score = [0.0, 1.0, 2.0, 3.0]
    replay = holding(Softmax("score", temperature=2.0), 4, score=score)
    assert fits(replay.sample(4_000)["x"], {x: np.exp(x / 2) for x in range(4)})
    replay.extend(numbers(4, 1, score=[5_000.0]))
    assert set(replay.sample(100)["x"].tolist()) == {4}
    for first in range(5, 9):
        replay.extend(numbers(first, 1, score=[float(first)]))
    assert fits(replay.sample(4_000)["x"], {x: np.exp(x / 2) for x in range(5, 9)})
    replay.update_priority(torch.arange(4), torch.zeros(4))
    assert fits(replay.sample(4_000)["x"], dict.fromkeys(range(5, 9), 1.0))
    with pytest.raises(RecordError, match="score is not finite"):
        replay.extend(numbers(9, 1, score=[float("nan")]))
    assert replay.write_count == 9


@pytest.mark.parametrize("lanes", [1, 3])
def test_staleness_bound_equals_a_scan_over_all_rows_under_overwriting(lanes: int) -> None:
    rng = np.random.default_rng(lanes)
    replay = Replay(24 * lanes, lanes=lanes, sampler=StalenessBounded(max_lag=2), seed=2)
    current, written = 5, 0
    model: list[int] = []
    for _ in range(60):
        slots = int(rng.integers(1, 6))
        version = np.maximum(0, current - rng.integers(0, 5, (slots, lanes)))  # writers lag, out of order
        x = torch.arange(written, written + slots * lanes).view(slots, lanes)
        replay.extend(TensorDict({"x": x, "policy_version": torch.from_numpy(version)}, batch_size=[slots, lanes]))
        model += version.reshape(-1).tolist()
        written += slots * lanes
        current += int(rng.integers(0, 2))
        for length in (1, 3):
            live = range(max(0, written - 24 * lanes), written - (length - 1) * lanes)
            allowed = {x for x in live if model[x] >= current - 2}
            if not allowed:
                with pytest.raises(RecordError, match="no row is within max_lag=2"):
                    replay.sample(1, length=length, version=current)
                continue
            batch = replay.sample(600, length=length, version=current)
            assert fits(batch["x"][:, 0], dict.fromkeys(allowed, 1.0))


def test_units_that_no_policy_said_do_not_make_a_row_old() -> None:
    replay = Replay(16, sampler=StalenessBounded(max_lag=0), cut=False)
    said = torch.tensor([[-1, 3, 3], [-1, 2, 3], [-1, -1, -1]])
    replay.extend(TensorDict({"x": torch.arange(3), "policy_version": said, "mask": torch.ones(3, 3).bool()}, [3]))
    assert set(replay.sample(64, version=3)["x"].tolist()) == {0}


def test_staleness_bound_refuses_what_it_cannot_know() -> None:
    replay = Replay(8, sampler=StalenessBounded(1))
    replay.extend(numbers(0, 4, policy_version=[3, 3, 4, 4]))
    with pytest.raises(RecordError, match="consumer's version"):
        replay.sample(1)
    with pytest.raises(RecordError, match="of version 4, newer than its consumer's 3"):
        replay.sample(1, version=3)
    with pytest.raises(RecordError, match="newest of 4 rows is of version 4"):
        replay.sample(1, version=9)
    with pytest.raises(RecordError, match="needs policy_version"):
        Replay(8, sampler=StalenessBounded(1)).extend(numbers(0, 2))


def test_a_token_row_is_as_old_as_its_oldest_sampled_token() -> None:
    replay = Replay(8, sampler=StalenessBounded(1))
    version = torch.tensor([[0, 7, 8], [0, 8, 8], [9, 2, 9]])
    mask = torch.tensor([[False, True, True], [False, True, True], [False, True, True]])
    replay.extend({"x": torch.arange(3), "policy_version": version, "mask": mask})
    assert set(replay.sample(50, version=9)["x"].tolist()) == {1}
    assert set(replay.sample(50, version=9)["x"].tolist()) == {1}


def test_groups_come_whole_and_without_repetition() -> None:
    group = torch.tensor([5, 5, 5, 9, 9, 9, 2, 2, 2, 7, 7, 7])
    replay = holding(Group(3), 12, group=group)
    batch = replay.sample(12)
    assert sorted(batch["group"][::3].tolist()) == [2, 5, 7, 9]
    assert bool((batch["group"].view(4, 3) == batch["group"].view(4, 3)[:, :1]).all())
    assert sorted(batch["x"].tolist()) == list(range(12))
    replay.extend(numbers(12, 1, group=[11]))  # breaks group 5, and 11 is not complete yet
    assert sorted(set(replay.sample(9)["group"].tolist())) == [2, 7, 9]
    with pytest.raises(RecordError, match="4 groups of 3 were asked for; 3 complete"):
        replay.sample(12)
    with pytest.raises(RecordError, match="groups have 3 rows"):
        replay.sample(4)


def test_a_prompt_answered_again_gives_one_generation_at_a_time() -> None:
    replay = holding(Group(2), 7, group=torch.tensor([1, 1, 1, 4, 4, 1, 1]))
    seen = {tuple(replay.sample(2)["x"].tolist()) for _ in range(60)}
    assert seen == {(5, 6), (1, 2), (3, 4)}  # counted back from the newest row of each group


def test_buckets_are_chosen_by_weight_and_empty_ones_share_theirs() -> None:
    rate = [0.0, 0.1, 0.5, 0.5, 0.5, 0.5]
    replay = holding(Buckets("rate", edges=[0.25, 0.75], weights=[1.0, 2.0, 4.0]), 6, rate=rate)
    probability = {0: 1 / 6, 1: 1 / 6, **dict.fromkeys(range(2, 6), 1 / 6)}
    assert fits(replay.sample(3_000)["x"], probability)
    replay.extend(numbers(6, 1, rate=[0.9]))
    assert fits(replay.sample(7_000)["x"], {1: 1.0, **dict.fromkeys(range(2, 6), 0.5), 6: 4.0})
    with pytest.raises(ConfigError, match="ascending"):
        Buckets("rate", edges=[1.0, 0.0])


def test_mixture_keeps_its_quotas_over_sources() -> None:
    source = torch.tensor([0] * 9 + [2] * 3)
    replay = holding(Mixture({"online": 0.25, "demonstration": 0.75}), 12, source=source)
    for size, demonstrations in ((8, 6), (4, 3), (10, 7)):  # 7.5 goes to the first of the equal remainders
        drawn = replay.sample(size)["source"]
        assert int((drawn == 2).sum()) == demonstrations
    many = replay.sample(4_000)
    assert fits(many["x"], {**dict.fromkeys(range(9), 0.25 / 9), **dict.fromkeys(range(9, 12), 0.25)})
    replay.extend(numbers(12, 12, source=torch.zeros(12, dtype=torch.int64)))
    with pytest.raises(RecordError, match="none of the 12 rows comes from source demonstration"):
        replay.sample(4)
    with pytest.raises(ConfigError, match="no source 'demo'"):
        Mixture({"demo": 1.0})


def test_mixture_can_share_a_missing_part_and_combine_other_samplers() -> None:
    mixture = Mixture({"online": 0.5, "expert": 0.5}, share_missing=True)
    assert holding(mixture, 4, source=torch.zeros(4, dtype=torch.int64)).sample(6)["x"].shape == (6,)
    parts = {"new": Fresh(), "old": Priority(alpha=1.0, beta=1.0, eps=0.0)}
    replay = holding(Mixture({"new": 1.0, "old": 1.0}, parts), 6)
    replay.update_priority(torch.arange(6), torch.tensor([0.0, 0, 0, 0, 1, 3]))
    batch = replay.sample(8)
    assert batch["x"].tolist() == [0, 1, 2, 3, 4, 5, 5, 5]
    torch.testing.assert_close(batch["priority_weight"], torch.tensor([1.0] * 5 + [1 / 3] * 3))
    with pytest.raises(RecordError, match="3 fresh rows were asked for, but 2"):
        replay.sample(6)
    assert replay.sample(4)["x"][:2].tolist() == [4, 5]  # the failed draw consumed nothing


def test_nstep_transitions_stop_at_the_end_of_the_episode() -> None:
    reward = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    segment = TensorDict(
        {
            "observation": torch.arange(6.0).view(2, 3, 1),
            "next_observation": torch.arange(6.0).view(2, 3, 1) + 10,
            "action": torch.arange(6.0).view(2, 3, 1),
            "reward": reward,
            "step_mask": mask,
            "terminated": torch.tensor([[False, False, False], [False, True, False]]),
            "truncated": torch.zeros(2, 3, dtype=torch.bool),
            "discount": torch.tensor([[0.5, 0.25, 0.5], [0.5, 0.25, 0.5]]),
        },
        batch_size=[2, 3],
    )
    out = nstep_transitions(segment, 3, gamma=0.5)
    assert out["reward"].tolist() == [1 + 1 + 1, 1 + 1] and out["discount"].tolist() == [0.125, 0.25]
    assert out["next_observation"][:, 0].tolist() == [12.0, 14.0]
    assert out["observation"][:, 0].tolist() == [0.0, 3.0] and out["steps"].tolist() == [3, 2]
    assert out["terminated"].tolist() == [False, True]
    stored = nstep_transitions(segment, 2)
    assert stored["reward"].tolist() == [2.0, 2.0] and stored["discount"].tolist() == [0.125, 0.125]
    with pytest.raises(RecordError, match="4-step"):
        nstep_transitions(segment, 4)


def test_every_preset_builds_what_it_says() -> None:
    names = {"fresh", "uniform", "staleness", "priority", "segment", "group", "mixture"}
    assert {file.stem for file in PRESETS.glob("*.yaml")} >= names
    for name in names:
        replay = instantiate(yaml.safe_load((PRESETS / f"{name}.yaml").read_text())["replay"])
        assert isinstance(replay, Replay) and len(replay) == 0
    assert isinstance(Uniform(), Sampler)
