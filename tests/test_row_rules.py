"""Maps and filters of advantages: each against numbers worked out by hand, and their moving settings in an agent."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from agent_cases import filled
from tensordict import TensorDict
from term_cases import agent_of, dense, joined

from unified_rl.errors import ConfigError
from unified_rl.objectives.moving import Moving
from unified_rl.returns import filters, maps


def record(**items: Any) -> TensorDict:
    """Four rows of two groups, six units at most, one step each."""
    mask = torch.arange(6) < torch.tensor([[6], [2], [4], [3]])
    given = {
        "mask": mask,
        "step_index": torch.zeros(4, 6, dtype=torch.int64),
        "reward": torch.tensor([[1.0], [0.0], [1.0], [0.0]]),
        "truncated": torch.zeros(4, 1, dtype=torch.bool),
        "step_mask": torch.ones(4, 1, dtype=torch.bool),
        "group": torch.tensor([0, 0, 1, 1]),
        **items,
    }
    return TensorDict(given, batch_size=[4])


A = torch.tensor([[1.0], [-1.0], [0.5], [-0.5]])


def test_a_group_whose_longest_right_answer_is_not_longer_than_its_wrong_ones_counts_less() -> None:
    lengths = torch.arange(6) < torch.tensor([[3], [4], [4], [4]])  # 3 < 4: less; 4 is not above 4: less
    assert maps.long_success(record(mask=lengths), A).flatten().tolist() == pytest.approx([0.1, -0.1, 0.05, -0.05])
    assert maps.long_success(record(), A).equal(A)  # 6 > 2 and 4 > 3
    cut = torch.tensor([[False], [True], [False], [True]])  # cut wrong answers do not count: nothing is as long
    assert maps.long_success(record(mask=lengths, truncated=cut), A).equal(A)
    nobody = maps.long_success(record(reward=torch.zeros(4, 1)), A)
    torch.testing.assert_close(nobody, 0.1 * A)


def test_a_wrong_answer_counts_more_by_how_much_longer_it_is_than_right_ones() -> None:
    lengths = torch.arange(6) < torch.tensor([[2], [6], [4], [3]])
    got = maps.overlong_failure(record(mask=lengths), A, base=2.0)
    assert got.flatten().tolist() == pytest.approx([1.0, -(2 - 2.0**-4), 0.5, -0.5])  # 6 - 2 = 4; 3 is no longer than 4
    alone = maps.overlong_failure(record(mask=lengths, reward=torch.zeros(4, 1)), A, base=2.0)
    assert alone.equal(A)  # without a right answer nothing is overlong
    far = maps.overlong_failure(record(mask=lengths), A, base=1e6)
    assert float(far[1]) == pytest.approx(-2.0)


def test_units_of_little_entropy_are_left_out() -> None:
    nats = torch.tensor([0.5, 1.0, 1.5, 0.9, 2.0, 0.0]).expand(4, 6)
    kept = filters.entropy_above(record(entropy=nats), A, above=1.0)
    assert kept.tolist()[0] == [False, True, True, False, True, False]
    assert kept.tolist()[1] == [False, True, False, False, False, False]  # two units long
    assert filters.entropy_above(record(entropy=nats), A, above=0.0).equal(record()["mask"])


def test_a_tilt_strengthens_one_sign_and_weakens_the_other() -> None:
    assert maps.tilted(record(), A, share=0.25).flatten().tolist() == [1.25, -0.75, 0.625, -0.375]
    assert maps.tilted(record(), A, share=-1.0).flatten().tolist() == [0.0, -2.0, 0.0, -1.0]
    likely = record(behavior_log_prob=torch.tensor([0.9, 0.1, 0.9, 0.1, 0.9, 0.1]).log().expand(4, 6))
    got = maps.tilted(likely, A, share=0.25, probability=0.5)
    assert got[1].tolist() == [-0.75, -1.0, -0.75, -1.0, -0.75, -1.0]


def test_a_mixture_with_the_tempered_policy_has_its_written_out_value() -> None:
    lp = torch.tensor([0.5, 0.25, 0.125, 0.5, 0.25, 0.125]).log().expand(4, 6)
    given = {"read_log_prob": lp, "hot_log_prob": lp + math.log(2.0), "cold_log_prob": lp - math.log(2.0)}
    rows = record(entropy=torch.full((4, 6), 0.46), **given)  # below the target: the hot one, of weight 2
    x = 0.04 / 0.5  # half of the answers are right
    share = x / (1 + x)
    got = maps.retempered(rows, A, target=0.5)
    expected = torch.tensor([(1 - share) * 1.0 + share * 2.0, -(1 - share)])
    torch.testing.assert_close(got[:2, 0], expected)
    far = maps.retempered(
        record(entropy=torch.full((4, 6), 3.0), **given), A, target=0.5
    )  # the cold one, x = 0.1 / 0.5
    share = 0.2 / 1.2
    torch.testing.assert_close(far[0, 0], torch.tensor((1 - share) + share * 0.5))
    exact = maps.retempered(record(entropy=torch.full((4, 6), 0.5), **given), A, target=0.5)
    torch.testing.assert_close(exact, A.expand(4, 6))
    nobody = maps.retempered(record(entropy=torch.zeros(4, 6), reward=torch.zeros(4, 1), **given), A)
    torch.testing.assert_close(nobody, A.expand(4, 6))  # no right answer: nothing is divided by 0


def test_a_failure_counts_less_where_hardly_anybody_succeeds() -> None:
    rows = record(reward=torch.tensor([[1.0], [0.0], [0.0], [0.0]]))  # half of the one group, none of the other
    got = maps.forgiven_failure(rows, A, base=0.4, slope=0.8)
    assert got.flatten().tolist() == pytest.approx([1.0, -0.8, 0.5, -0.2])  # 0.4 + 0.8 / 2, and 0.4
    everybody = record(reward=torch.ones(4, 1))
    assert maps.forgiven_failure(everybody, A, base=0.5, slope=0.5).equal(A)
    assert maps.forgiven_failure(rows, A, base=0.9, slope=9.0)[1] == -1.0  # at most 1


def test_what_is_missed_more_often_counts_more_and_the_size_of_an_update_stays() -> None:
    rows = record(reward=torch.tensor([[1.0], [0.0], [0.0], [0.0]]), label=torch.tensor([7, 7, 7, 8]))
    by_group = maps.by_difficulty(rows, torch.ones(4, 1), group=1.0)  # 1.5 and 2 over their mean 1.75
    assert by_group.flatten().tolist() == pytest.approx([6 / 7, 6 / 7, 8 / 7, 8 / 7])
    by_label = maps.by_difficulty(rows, torch.ones(4, 1), group=0.0, label=3.0)  # two of three, and the one: 3, 3, 3, 4
    assert by_label.flatten().tolist() == pytest.approx([12 / 13] * 3 + [16 / 13])
    assert maps.by_difficulty(rows, A, group=0.0).equal(A)


def test_a_group_that_agrees_is_compared_with_other_prompts() -> None:
    rows = record(reward=torch.tensor([[1.0], [0.0], [1.0], [1.0]]), answer=torch.tensor([5, 6, 5, 5]))
    got = maps.consistent(rows, A, sharpness=1e4, middle=0.5)  # entropies 1 and 0: all of the one, none of the other
    third = 0.25 / math.sqrt(0.125)  # shares 1/2 and 1: the second is 1/4 above the mean, of spread sqrt(1/8)
    assert got.flatten().tolist() == pytest.approx([1.0, -1.0, third, third], rel=1e-5)
    half = maps.consistent(rows, A, sharpness=0.0)  # w = 1/2 whatever the entropy
    assert half.flatten().tolist() == pytest.approx(
        [0.5 - third / 2, -0.5 - third / 2, 0.25 + third / 2, -0.25 + third / 2], rel=1e-4
    )
    alone = rows.clone()
    alone["group"] = torch.zeros(4, dtype=torch.int64)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)  # three of four agree
    local = 1 / (1 + math.exp(-5.0 * (entropy - 0.5)))
    torch.testing.assert_close(maps.consistent(alone, A), local * A)  # one prompt has no other
    thirds = rows[:1].expand(21).clone()  # seven prompts of which a third is right: nothing to tell apart
    thirds["group"] = torch.arange(7).repeat_interleave(3)
    thirds["reward"] = torch.tensor([1.0, 0.0, 0.0]).repeat(7).unsqueeze(-1)
    assert maps.consistent(thirds, torch.zeros(21, 1)).abs().max() == 0.0  # exactly, not what rounding left


def test_negative_tokens_count_by_what_positive_ones_do_not_span() -> None:
    a, b = torch.tensor([2.0, -2.0, 0.0, 0.0]), torch.tensor([-2.0, 2.0, 0.0, 0.0])
    c = torch.tensor([0.0, 0.0, 2.0, -2.0])  # across the only direction, a - b, that right answers go
    states = torch.zeros(4, 6, 4)
    states[0, :4] = torch.stack([a, b, a, b])
    states[1, :2] = torch.stack([a, c])
    states[3] = c
    rows = record(mask=torch.arange(6) < torch.tensor([[4], [2], [4], [3]]), unit_states=states)
    got = maps.residual(rows, A, positive=0.5, least=0.2, low=0.0, high=1.0)
    assert got[0, :4].tolist() == [0.5] * 4
    assert got[1, :2].tolist() == pytest.approx([-0.2, -1.0])
    assert got[3, :3].tolist() == pytest.approx([-0.5 * 0.6] * 3)  # all alike: half of the way
    assert maps.residual(rows, A, positive=0.5, least=0.2, fewest=5)[1, :2].tolist() == [-1.0, -1.0]
    unmixed = maps.residual(rows, -A.abs(), least=0.2)
    assert unmixed.equal(-A.abs().expand(4, 6))  # nothing is right, so nothing is shared


def test_hidden_states_that_a_map_reads_are_the_policys_and_do_not_stay() -> None:
    policy, rows = joined()
    agent = agent_of(policy, rows, maps=[{"name": "residual", "fewest": 2}], micro_batch=5)
    drawn = agent._draw(filled(rows, 1))
    with torch.no_grad():
        want = policy.unit_states(drawn)
    torch.testing.assert_close(agent.anchors.states(drawn), want, atol=1e-5, rtol=1e-4)
    kept = agent.estimate(drawn, 0, {})
    assert "unit_states" not in kept.keys() and kept["advantage"].shape == kept["mask"].shape
    assert len(kept["advantage"][kept["mask"] & (kept["advantage"] < 0)].unique()) > 8  # each token has its own


def test_units_earn_by_what_the_solution_has_around_their_places() -> None:
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[:, 2:6] = True  # two tokens of a prompt, four of an answer
    solution = torch.tensor([5, 6, 7])
    tokens = torch.tensor([[1, 2, 5, 6, 9, 9], [1, 2, 5, 9, 9, 9], [1, 2, 9, 9, 9, 9], [1, 2, 9, 9, 9, 9]])
    shown = torch.cat([tokens[:, :2], solution.expand(4, 3), tokens[:, 2:]], 1)
    told = torch.arange(9).expand(4, 9) >= 5
    rows = record(mask=mask, tokens=tokens, privileged_tokens=shown, privileged_mask=told)
    plain = maps.matched(rows, A, window=1)  # rewards 1 1 0 0 and 1 0 0 0, less their means 1, 1/2, 0, 0
    assert plain[0].tolist() == [0.0, 0.0, 0.0, 0.5, 0.0, 0.0] and plain[1].tolist() == [0.0, 0.0, 0.0, -0.5, 0.0, 0.0]
    wide = maps.matched(rows, A, window=3)  # 2/3 2/3 1/3 0 and 1/3 1/3 0 0
    assert wide[0, 2:].tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 6, 0.0])
    assert maps.matched(rows, A, share=0.0).equal(A.expand(4, 6))
    half = maps.matched(rows, A, window=1, share=0.5)
    assert half[0, 2:].tolist() == [0.5, 0.75, 0.5, 0.5]


def test_runs_of_equal_marks_are_thoughts_of_one_reward() -> None:
    marks = torch.tensor([[1, 1, -1, -1, -1, 0], [-1, -1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0], [-1, -1, -1, 0, 0, 0]])
    rows = record(marks=marks)
    got = maps.thoughts(rows, A, share=1.0)  # of the first group 1, -1/2, 0 and -1/2: mean 0, variance 1.5 / 3
    root = math.sqrt(0.5)
    assert got[0].tolist() == pytest.approx([1 / root] * 2 + [-0.5 / root] * 3 + [0.0], abs=1e-5)
    assert got[1, :2].tolist() == pytest.approx([-0.5 / root] * 2, abs=1e-5)
    z = 0.75 / math.sqrt(2 * 0.75**2)  # of the second 1 and -1/2: the outcome itself, so GRPO
    assert got[2, :4].tolist() == pytest.approx([z] * 4, abs=1e-5) and float(got[3, 0]) == pytest.approx(-z, abs=1e-5)
    harsh = maps.thoughts(rows, A, share=1.0, mercy=0.0)
    assert float(harsh[2, 0]) == pytest.approx(z, abs=1e-5)  # two values stay two values
    assert maps.thoughts(rows, A, share=0.0).equal(A.expand(4, 6))
    wrong = {"marks": -torch.ones(4, 6), "group": torch.zeros(4, dtype=torch.int64)}
    for one in (0.3, 0.7):  # all thoughts alike: exactly 0, not what rounding left of the mean
        assert maps.thoughts(record(**wrong), A, share=1.0, mercy=one).abs().max() == 0.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"maps": ["long_success"]}, r"agent\.maps\[0\] compares rows of one group"),
        ({"objectives": {"p": {"name": "preference", "anchor": "none"}}}, r"objectives\.p compares rows of one group"),
        ({"objectives": {"d": {"name": "divergence", "anchor": "self", "pass_rate": {}}}}, r"d\.pass_rate is a share"),
        ({"reward_model": "learnt"}, r"agent\.reward_model compares rows of one group"),
    ],
)
def test_rows_that_do_not_count_may_leave_one_of_every_group(options: dict[str, Any], words: str) -> None:
    policy, rows = joined()
    agent = agent_of(policy, rows, "grpo", **options)
    agent.checked = True
    alone = rows.clone()
    alone["group"] = torch.arange(12)
    with pytest.raises(ConfigError, match=words):
        agent.update(filled(alone, 1))
    rows["counted"] = torch.arange(12) % 4 == 0
    agent.update(filled(rows, 1))


def test_the_chain_task_marks_totals_and_the_answer() -> None:
    from unified_rl.envs.language import ChainMod

    env = ChainMod(modulus=10, terms=3)
    ids = env.codec.encode(["4,6>6", ">6", "4,5>5", "4,6,6>1"])
    marked = [env.marks({"totals": [4, 6]}, [one])[0] for one in ids]
    assert marked == [[1, 1, 1, 1, 1], [0, 1], [1, 1, -1, -1, -1], [1, 1, 1, 1, -1, -1, -1]]


def test_a_policy_without_hidden_states_is_refused_by_name() -> None:
    from run_cases import CONTROL, merged
    from test_nonsense import stage

    found = stage(tuple(merged(CONTROL, ["agent=ppo"])), "agent.maps=[residual]", None)  # type: ignore[arg-type]
    assert "agent.maps[0]" in found and "policy=causal_lm" in found


def test_a_map_without_its_column_is_refused_by_name() -> None:
    from run_cases import LANGUAGE, merged
    from test_nonsense import stage

    grpo = tuple(merged(LANGUAGE, ["correction=grpo"]))
    for change in ("rollout.columns={mine: marks}", "rollout.columns={scores: [correct, marks]}"):
        found = stage(grpo, change, None)  # type: ignore[arg-type]
        assert "rollout.columns." in found and "set rollout.columns.marks=marks" in found
    other = ("env=countdown", "policy=causal_lm_tiny", "correction=grpo")
    found = stage(other, "rollout.columns={marks: marks}", None)  # type: ignore[arg-type]
    assert "Countdown" in found and "marks()" in found
    found = stage(grpo, "agent.maps=[consistent]", None)  # type: ignore[arg-type]
    assert "agent.maps[0]" in found and "rollout.columns.answer" in found


def test_columns_that_a_map_reads_are_of_the_present_distribution() -> None:
    """And the weight of DCPO has mean 1 under it."""
    policy, rows = joined()
    agent = agent_of(policy, rows)
    drawn = agent._draw(filled(rows, 1))
    wanted = maps.retempered.reads(hot=1.2, cold=0.8)  # type: ignore[attr-defined]
    found = agent.anchors.read(drawn, wanted)
    with torch.no_grad():
        full, lp = dense(policy, drawn)
    mask = drawn["mask"]
    hot = (full / 1.2).log_softmax(-1)
    got = (found["hot_log_prob"] - found["read_log_prob"])[mask]
    want = (hot - full).gather(-1, drawn["tokens"].unsqueeze(-1)).squeeze(-1)[mask]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["read_log_prob"][mask], lp[mask], atol=1e-5, rtol=1e-4)
    entropy = -(full.exp() * full).sum(-1)
    torch.testing.assert_close(found["entropy"][mask], entropy[mask], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close((full.exp() * (hot - full).exp()).sum(-1)[mask], torch.ones(int(mask.sum())))


# ---------------------------------------------------------------------------------------------- filters


def rows_of(values: list[float], groups: list[int]) -> tuple[TensorDict, torch.Tensor]:
    n = len(values)
    items = {"mask": torch.ones(n, 2, dtype=torch.bool), "group": torch.tensor(groups), "reward": torch.zeros(n, 1)}
    items["step_index"] = torch.zeros(n, 2, dtype=torch.int64)
    return TensorDict(items, batch_size=[n]), torch.tensor(values)[:, None]


def test_the_rows_of_largest_advantage_are_kept() -> None:
    rows, advantage = rows_of([0.1, -3.0, 0.2, 0.3, 5.0, -0.1, 4.0, 0.0], [7, 7, 7, 7, 2, 2, 2, 2])
    by_group = filters.largest_advantage(rows, advantage, keep=0.5)
    assert by_group.nonzero().flatten().tolist() == [1, 3, 4, 6]
    by_batch = filters.largest_advantage(rows, advantage, keep=0.375, over="batch")
    assert by_batch.nonzero().flatten().tolist() == [1, 4, 6]
    assert bool(filters.largest_advantage(rows, advantage, keep=1.0).all())
    flat = filters.largest_advantage(rows, torch.ones(8, 1), keep=0.5)
    assert flat.nonzero().flatten().tolist() == [0, 1, 4, 5]  # of equal ones the earlier
    assert int(filters.largest_advantage(rows, advantage, keep=0.1).sum()) == 2  # one of each group at least


@pytest.mark.parametrize("choose", [filters.largest_advantage, filters.widest_spread])
def test_what_stands_behind_the_end_of_a_row_chooses_no_row(choose: Any) -> None:
    rows, _ = rows_of([0.0] * 4, [0] * 4)
    rows["mask"][:2, 1] = False
    units = torch.tensor([[0.1, 9.0], [0.2, -9.0], [3.0, 3.0], [-2.0, -2.0]])
    assert choose(rows, units, keep=0.5).tolist() == [False, False, True, True]


@pytest.mark.parametrize("keep", [0.25, 0.4, 0.6, 0.8, 1.0])
def test_the_rows_of_widest_spread_are_those_that_trying_all_subsets_finds(keep: float) -> None:
    torch.manual_seed(0)
    values = torch.randn(15).tolist()
    groups = [3] * 6 + [1] * 5 + [9] * 4
    rows, advantage = rows_of(values, groups)
    kept = filters.widest_spread(rows, advantage, keep=keep)
    for group in set(groups):
        at = [i for i, g in enumerate(groups) if g == group]
        size = max(1, int(keep * len(at) + 1e-6))
        best = max(float(torch.tensor([values[i] for i in some]).double().var(correction=0))
                   for some in itertools.combinations(at, size))  # fmt: skip
        chosen = [i for i in at if kept[i]]
        assert len(chosen) == size
        assert float(torch.tensor([values[i] for i in chosen]).double().var(correction=0)) == pytest.approx(best)
    whole = filters.widest_spread(rows, advantage, keep=keep, over="batch")
    assert int(whole.sum()) == int(keep * 15 + 1e-6)


def test_groups_whose_rewards_are_what_the_policy_finds_likely_are_kept() -> None:
    rows, advantage = rows_of([0.0] * 9, [4, 4, 4, 1, 1, 1, 2, 2, 2])
    rows["reward"] = torch.tensor([1.0, 2, 3, 0, 1, 0, 1, 1, 1])[:, None]
    rows["behavior_log_prob"] = torch.tensor([-3.0, -2, -1, -1, -2, -2, -9, -8, -7])[:, None].expand(9, 2).clone()
    rows["behavior_log_prob"][0, 1], rows["mask"][0, 1] = 7.0, False  # the mean is of the row's own units
    # correlations 1, -1/2 (gaps (-1/3, 2/3, -1/3) and (2/3, -1/3, -1/3)), and none of equal rewards: 0
    for least, kept in {0.0: [4, 1, 2], 0.25: [4, 1, 2], 0.3: [4, 2], 0.5: [4, 2], 0.6: [4], 1.0: [4]}.items():
        found = filters.seamless(rows, advantage, least=least)
        assert [g for g in (4, 1, 2) if bool(found[rows["group"] == g].all())] == kept
        assert int(found.sum()) == 3 * len(kept)


def test_the_units_of_largest_advantage_times_entropy_are_kept() -> None:
    rows, advantage = rows_of([1.0, -2.0, 0.0], [0, 0, 0])
    rows["entropy"] = torch.tensor([[1.0, 3.0], [1.0, 0.2], [9.0, 9.0]])  # scores 1, 3, 2, 0.4, 0, 0
    rows["mask"][0, 1] = False  # 1, 2, 0.4, 0, 0 are left
    kept = filters.uncertain_units(rows, advantage, keep=0.4)
    assert kept.tolist() == [[True, False], [True, False], [False, False]]
    assert filters.uncertain_units(rows, advantage, keep=1.0).equal(rows["mask"])


# ---------------------------------------------------------------------------------------------- in an agent


def annotated(agent: Any, rows: TensorDict) -> TensorDict:
    agent.checked = True
    agent.estimate.start(0.0, agent.version)
    return agent._annotate(agent._draw(filled(rows, 1)), {})


def test_filters_take_rows_and_units_out_after_the_statistics() -> None:
    policy, rows = joined()
    whole = annotated(agent_of(policy, rows), rows)
    kept = annotated(agent_of(policy, rows, filters=[{"name": "largest_advantage", "keep": 0.5}]), rows)
    size = whole["advantage"].abs().flatten()
    expected = [r for g in range(3) for r in sorted(range(4 * g, 4 * g + 4), key=lambda r: -size[r])[:2]]
    assert kept["advantage"].flatten().tolist() == whole["advantage"].flatten()[sorted(expected)].tolist()
    some = annotated(agent_of(policy, rows, filters=[{"name": "uncertain_units", "keep": 0.25}]), rows)
    units = int(whole["mask"].sum())
    assert int(some["mask"].sum()) == math.ceil(0.25 * units)


def test_a_number_of_a_rule_may_follow_a_schedule_and_a_controller_that_resumes() -> None:
    policy, rows = joined()
    entropy = {"name": "proportional_integral", "metric": "policy/entropy", "target": 0.1, "gain": -0.1, "low": -1.0}
    options = {
        "objectives": {"entropy": {"name": "entropy", "coefficient": 0.0}},
        "maps": [{"name": "tilted", "share": entropy}],
        "filters": [{"name": "largest_advantage", "keep": {"name": "linear", "start": 0.5, "end": 1.0}}],
    }
    agent = agent_of(copy.deepcopy(policy), rows, **options)
    found = agent.update(filled(rows, 1), progress=0.0)
    assert found["train/kept"] < 0.75 and found["policy/entropy"] > 1.0
    again = agent_of(copy.deepcopy(policy), rows, **options)
    again.load_state_dict(copy.deepcopy(agent.state_dict()))
    for one in (agent, again):
        one.estimate.start(1.0, 1)
        assert one.estimate.rules.maps[0].settings["share"] == pytest.approx(
            -0.1 * (0.1 - float(found["policy/entropy"]))
        )
        assert one.estimate.rules.filters[0].settings["keep"] == 1.0
        one.update(filled(rows, 1), progress=1.0)
    for a, b in zip(agent.policy.parameters(), again.policy.parameters(), strict=True):
        assert a.equal(b)


def test_two_rules_of_one_kind_each_see_the_columns_of_their_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, rows = joined()
    agent = agent_of(copy.deepcopy(policy), rows, maps=[{"name": "retempered", "hot": hot} for hot in (1.2, 3.0)])
    seen: list[torch.Tensor] = []
    call = Moving.__call__

    def watched(rule: Moving, *given: Any) -> Any:
        seen.append(given[0]["hot_log_prob"].clone())
        return call(rule, *given)

    monkeypatch.setattr(Moving, "__call__", watched)
    agent.update(filled(rows, 1))
    alone = agent_of(policy, rows, maps=[{"name": "retempered", "hot": 1.2}])
    alone.update(filled(rows, 1))
    assert len(seen) == 3 and torch.equal(seen[0], seen[2]) and not torch.allclose(seen[0], seen[1])


def test_a_term_is_watched_where_only_a_map_follows_it() -> None:
    policy, rows = joined()
    objectives = {"entropy": {"name": "entropy", "coefficient": 0.0}}
    assert "policy/entropy" not in agent_of(policy, rows, objectives=objectives).update(filled(rows, 1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"filters": ["largest_advantag"]}, r"agent\.filters\[0\] 'largest_advantag' is unknown; did you mean"),
        ({"filters": [{"name": "largest_advantage", "keep": 0.0}]}, r"agent\.filters\[0\]\.keep=0\.0 must"),
        (
            {"filters": [{"name": "widest_spread", "keep": {"name": "linear", "start": 2.0}}]},
            r"agent\.filters\[0\]\.keep=2\.0 must",
        ),
        (
            {"maps": [{"name": "tilted", "share": {"name": "liner"}}]},
            r"agent\.maps\[0\]\.share\.name 'liner' is unknown",
        ),
        (
            {"maps": [{"name": "tilted", "share": {"name": "logistic", "metric": "policy/entropi", "high": 1.0}}]},
            r"agent\.maps\[0\]\.share\.metric 'policy/entropi' is reported by no part",
        ),
    ],
)
def test_bad_rules_are_refused_under_their_full_names(options: Any, words: str) -> None:
    policy, rows = joined()
    with pytest.raises(ConfigError, match=words):
        agent_of(policy, rows, **options).update(filled(rows, 1))


def test_a_rule_that_reads_distributions_is_refused_without_any() -> None:
    from agent_cases import control_agent, gaussian

    with pytest.raises(ConfigError, match=r"agent\.maps\[0\] reads the distribution of every unit, and Gaussian"):
        control_agent(gaussian(), maps=["retempered"])
