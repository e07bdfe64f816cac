"""Answers kept by prompt: who comes in, who leaves, what is drawn and how often, and what a run keeps of it."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_cases import EasyChain, cached
from tensordict import TensorDict
from test_recipes import LANGUAGE, of
from test_sources import others, own, rollout

from unified_rl.correction import Correction
from unified_rl.errors import ConfigError
from unified_rl.replay.pool import AnswerPool
from unified_rl.rollout.sources import Experience
from unified_rl.units import Source


def answers(*marks: int) -> TensorDict:
    tokens = torch.tensor(marks)[:, None].expand(-1, 3).contiguous()
    return TensorDict({"tokens": tokens, "reward": tokens[:, :1].float()}, batch_size=[len(marks)])


def marks(pool: AnswerPool, number: int) -> list[int]:
    slots, filled = pool.slots(np.array([pool.place[number]]))
    assert pool.rows is not None
    return [int(pool.rows["tokens"][slot, 0]) for slot in slots[filled]]


def filled(prompts: int, per: int = 1, levels: int = 4) -> AnswerPool:
    pool = AnswerPool(prompts, per, levels)
    for number in range(prompts):
        pool.put(number, {"text": number}, 1 + number % (levels - 1), answers(number))
    return pool


# ------------------------------------------------------------------------------------------------ the pool


def test_the_newest_answers_of_a_prompt_stay_and_no_text_twice() -> None:
    pool = AnswerPool(prompts=4, answers=3, levels=4)
    pool.put(7, {}, 1, answers(1, 2))
    pool.put(7, {}, 2, answers(2, 3, 1))
    assert sorted(marks(pool, 7)) == [1, 2, 3] and pool.level_of(7) == 2
    pool.put(7, {}, 2, answers(4))
    assert sorted(marks(pool, 7)) == [2, 3, 4]
    (newest,) = pool.newest(np.array([pool.place[7]]))
    assert int(pool.read(np.array([newest]))["reward"]) == 4 and pool.uses[newest] == 1
    pool.put(7, {}, 2, answers(5))
    assert sorted(marks(pool, 7)) == [3, 4, 5] and pool.uses[pool.newest(np.array([pool.place[7]]))[0]] == 0


def test_prompts_leave_in_the_order_they_came_and_when_they_are_dropped() -> None:
    pool = filled(5)
    pool.put(2, {}, 3, answers(99))  # it is not newer for that
    pool.put(5, {}, 1, answers(5))
    pool.put(6, {}, 1, answers(6))
    assert set(pool.place) == {2, 3, 4, 5, 6} and len(pool) == 5
    pool.drop(3)
    pool.drop(33)
    assert set(pool.place) == {2, 4, 5, 6} and pool.level_of(3) is None
    pool.put(8, {}, 1, answers(8))
    pool.put(9, {}, 1, answers(9))
    assert set(pool.place) == {4, 5, 6, 8, 9}
    pool.put(10, {}, 1, answers(10))
    assert set(pool.place) == {5, 6, 8, 9, 10}  # 8 stands where 3 stood, and came later than 4
    pool.put(11, {}, 1, answers(11))
    pool.put(12, {}, 1, answers(12))
    assert set(pool.place) == {8, 9, 10, 11, 12}
    listed = [place for x, n in zip(pool.lists, pool.counts, strict=True) for place in x[:n].tolist()]
    assert sorted(listed) == sorted(pool.place.values())


def test_levels_are_drawn_by_weight_prompts_of_a_level_alike_and_nobody_twice() -> None:
    pool, rng = filled(300), np.random.default_rng(0)
    counts = np.zeros(300)
    for _ in range(400):
        drawn = pool.draw(12, [0.0, 1.0, 2.0, 1.0], rng)
        assert len(set(drawn.tolist())) == 12
        counts[pool.numbers[drawn]] += 1
    by_level = [counts[np.arange(300) % 3 == level].sum() / counts.sum() for level in range(3)]
    assert by_level == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    of_second = counts[np.arange(300) % 3 == 1]  # 24 times each in the mean, about 5 more or less
    assert of_second.mean() == pytest.approx(24, abs=1.5) and of_second.std() < 7


def test_what_a_level_cannot_give_falls_to_the_others() -> None:
    pool, rng = AnswerPool(10, 1, 4), np.random.default_rng(0)
    assert len(pool.draw(3, [1.0] * 4, rng)) == 0
    for number in range(6):
        pool.put(number, {}, 1 if number < 2 else 2, answers(number))
    assert len(pool.draw(5, [0.0, 1e9, 1.0, 0.0], rng)) == 5
    assert sorted(pool.numbers[pool.draw(9, [0.0, 1.0, 1.0, 1.0], rng)].tolist()) == list(range(6))
    assert sorted(pool.numbers[pool.draw(9, [0.0, 1.0, 0.0, 0.0], rng)].tolist()) == [0, 1]


def test_without_distinct_every_answer_has_the_slot_of_its_number_and_equal_ones_stay() -> None:
    pool = AnswerPool(prompts=2, answers=3, levels=1, distinct=False)
    pool.put(7, {}, 0, answers(1, 1, 2))
    assert marks(pool, 7) == [1, 1, 2]
    pool.put(7, {}, 0, answers(2, 1, 1, 3, 1, 3))
    assert marks(pool, 7) == [3, 1, 3]


def test_a_pool_goes_on_where_it_was() -> None:
    one = filled(40, per=2)
    for number in (3, 4, 5):
        one.drop(number)
    one.put(77, {"text": "x"}, 2, answers(77, 78))
    other = AnswerPool(40, 2, 4)
    other.load_state_dict(one.state_dict())
    for pool in (one, other):
        pool.put(78, {}, 3, answers(1))
        for number in range(80, 90):
            pool.put(number, {"text": number}, 1, answers(number, number + 1))
    assert other.place == one.place and other.problems == one.problems and other.free == one.free
    drawn = [pool.draw(20, [0.0, 1.0, 1.0, 1.0], np.random.default_rng(3)) for pool in (one, other)]
    assert (drawn[0] == drawn[1]).all()
    assert torch.equal(*(pool.read(pool.newest(d))["tokens"] for pool, d in zip((one, other), drawn, strict=True)))


# ------------------------------------------------------------------------------------------------ in a rollout

EASY = {"modulus": 5, "terms": 3, "max_turn_tokens": 6}


def test_partly_solved_prompts_come_again_with_a_right_answer_of_before() -> None:
    source = Experience(share=0.5, start=0.0)
    made = rollout(EasyChain(**EASY), prompts=6, sources={"experience": source})
    known: dict[int, dict[str, Any]] = {}
    for version in range(5):
        before = {} if source.pool is None else {n: int(source.pool.level[p]) for n, p in source.pool.place.items()}
        rows, metrics = made.collect(version)
        again = others(rows)
        assert len(again) == metrics["rollout/joined/experience"] == min(3, len(before))
        for row in again:
            number = int(row["prompt_id"])
            assert number in before and float(row["reward"].sum()) == 1.0 and int(row["source"]) == Source.OFFLINE
            fresh = own(rows)[own(rows)["group"] == row["group"]]
            assert bool((fresh["prompt_id"] == number).all()) and len(fresh) == 4
            stored = known[number][str(row["tokens"].tolist())]
            assert torch.equal(row["behavior_log_prob"], stored["behavior_log_prob"])
            assert torch.equal(row["policy_version"], stored["policy_version"])
        for group in own(rows)["group"].unique():
            fresh = own(rows)[own(rows)["group"] == group]
            won, number = int(fresh["reward"].sum()), int(fresh["prompt_id"][0])
            assert source.pool is not None
            if won == 4:
                assert source.pool.level_of(number) is None
            elif won:
                assert source.pool.level_of(number) == won
            for row in fresh:
                known.setdefault(number, {})[str(row["tokens"].tolist())] = row
    assert len(again) == 3


def test_two_pools_bring_prompts_and_answers_of_their_own() -> None:
    sources = {"one": Experience(share=0.34, start=0.0), "two": Experience(share=0.5, start=0.0, pick="newest")}
    made = rollout(EasyChain(**EASY), prompts=6, sources=sources)
    for version in range(4):
        full = all(source.pool is not None and len(source.pool) > 2 for source in sources.values())
        rows, metrics = made.collect(version)
        if full:
            assert [metrics[f"rollout/joined/{name}"] for name in sources] == [2.0, 2.0]
        for row in others(rows):
            fresh = own(rows)[own(rows)["group"] == row["group"]]
            assert bool((fresh["prompt_id"] == row["prompt_id"]).all())
    assert full


def test_the_surest_answer_under_the_present_policy_is_picked() -> None:
    source = Experience(share=0.5, start=0.0)
    made = rollout(EasyChain(**EASY), prompts=6, group_size=12, sources={"experience": source})
    made.collect(0)
    held = deepcopy(source.pool)
    several = 0
    for row in others(made.collect(1)[0]):
        assert held is not None and held.rows is not None
        slots, there = held.slots(np.array([held.place[int(row["prompt_id"])]]))
        stored = held.rows[torch.from_numpy(slots[there])]
        mean = made.policy.log_prob_and_entropy(stored)[1].sum(-1) / stored["mask"].sum(-1)
        assert torch.equal(stored["tokens"][mean.argmin()], row["tokens"])
        several += len(stored) > 1
    assert several > 1


def test_answers_that_do_not_count_are_neither_kept_nor_levels() -> None:
    source = Experience()
    rows, _ = rollout(EasyChain(**EASY), prompts=1, sources={"experience": source}).collect(0)
    number = int(rows["prompt_id"][0])
    source.pool = None
    rows["tokens"][:, -1] = torch.arange(4)  # four texts
    rows["reward"], rows["counted"] = (
        torch.tensor([[1.0], [1.0], [0.0], [0.0]]),
        torch.tensor([True, False, True, False]),
    )
    source.observe(rows)
    assert source.pool is not None and source.pool.levels == 4 and source.pool.level_of(number) == 1
    assert source.pool.rows is not None and source.pool.rows["tokens"][: source.pool.answers, -1].sum() == 0
    rows["reward"] = torch.tensor([[1.0], [0.0], [1.0], [0.0]])
    source.observe(rows)
    assert source.pool.level_of(number) is None  # all that count are right


def test_the_pool_waits_for_a_share_of_right_answers() -> None:
    source = Experience(share=0.5, start=0.99)
    made = rollout(EasyChain(**EASY), prompts=6, sources={"experience": source})
    assert all(made.collect(version)[1]["rollout/joined/experience"] == 0 for version in range(3))
    assert source.pool is not None and len(source.pool) > 0 and not source.open


def test_groups_of_one_and_unreadable_policies_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.sources\.x .*group_size=1.*sources\.Pool"):
        rollout(group_size=1, sources={"x": Experience()})
    with pytest.raises(ConfigError, match=r"rollout\.sources\.x\.pick=entropy .*pick=newest"):
        Experience().check(None, object(), "rollout.sources.x")  # type: ignore[arg-type]
    Experience(pick="newest").check(None, object(), "rollout.sources.x")  # type: ignore[arg-type]


def test_shaping_is_for_rows_of_replay_alone() -> None:
    batch = TensorDict(
        {
            "behavior_log_prob": torch.tensor([[0.5], [0.5]]).log(),
            "mask": torch.ones(2, 1, dtype=torch.bool),
            "advantage": torch.ones(2, 1),
            "step_index": torch.zeros(2, 1, dtype=torch.int64),
            "reward": torch.ones(2, 1),
            "source": torch.tensor([0, 1]),
        },
        batch_size=[2],
    )
    log_prob = torch.tensor([[0.4], [0.4]]).log().requires_grad_()
    kernel = {"name": "replay_shape", "gamma": 0.1, "clip_low": 1.0, "clip_high": 1e6}
    Correction(kernel=kernel, reduce="token-sum")(log_prob, batch).loss.backward()
    assert log_prob.grad is not None
    assert (-log_prob.grad).flatten().tolist() == pytest.approx([0.8, 0.1 * 0.8 / 0.9**2])  # r, and c r / (r + c)^2


def test_the_recipe_replays_in_its_second_update() -> None:
    assert cached(*of("exgrpo", {LANGUAGE: ""}, ["recipe=exgrpo"])).metrics["rollout/joined/experience"] > 0


def test_a_run_with_a_pool_resumes_bit_for_bit(tmp_path: Path) -> None:
    from run_cases import ALLOW
    from test_resume import COMMON, cut_run, equal, rows_of

    from unified_rl.config import compose, resolve_defaults
    from unified_rl.training.checkpoint import checkpoints, read_checkpoint
    from unified_rl.training.run import resume, train

    kept = [o for o in LANGUAGE if "group_size" not in o]
    overrides = [*COMMON, *kept, "recipe=exgrpo", "steps=84", "checkpoint_every=28", f"run_dir={tmp_path / 'whole'}"]
    whole = train(resolve_defaults(compose(overrides, allow=ALLOW), allow=ALLOW), allow=ALLOW)
    saves = checkpoints(whole / "checkpoints")
    assert sum(row.get("rollout/joined/experience", 0) for row in rows_of(whole)) > 1
    cut_run(whole, tmp_path / "part", saves[1])
    resume(str(tmp_path / "part"), allow=ALLOW)
    equal(read_checkpoint(saves[-1]), read_checkpoint(checkpoints(tmp_path / "part" / "checkpoints")[-1]))
    assert rows_of(tmp_path / "part") == rows_of(whole)
