"""Columns of rows: each against numbers worked out by hand, and what reads them in an agent."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from agent_cases import TINY, close, filled, gradients, nudge, stream
from run_cases import CONTROL, LANGUAGE, merged
from term_cases import Easy, agent_of, both_splits, dense, joined, want
from test_nonsense import stage
from test_row_rules import record

from unified_rl.agents.estimate import Estimate
from unified_rl.agents.rules import make_rules
from unified_rl.correction import load_correction
from unified_rl.errors import ConfigError, RecordError
from unified_rl.objectives.coefficients import coefficient
from unified_rl.objectives.moving import Moving
from unified_rl.objectives.objective import Parts
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.returns import columns, filters, gates
from unified_rl.returns.columns import COLUMNS
from unified_rl.rollout import LanguageRollout
from unified_rl.rollout.conversation import converse
from unified_rl.units import Source, numbered

SCORES = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])


def test_a_rubric_is_the_weighted_share_of_what_is_met_and_pitfalls_stop_at_zero() -> None:
    rows = record(scores=SCORES)
    met = columns.rubric(rows, weights=[3.0, 1.0])
    assert met.tolist() == [0.75, 1.0, 0.25, 0.0]  # all met is 1
    pitfall = columns.rubric(rows, weights=[2.0, -1.0])
    assert pitfall.tolist() == [1.0, 0.5, 0.0, 0.0]  # divided by 2, what a right answer can earn
    assert columns.rubric(rows, weights=[2.0, -1.0], clamp=False).tolist() == [1.0, 0.5, -0.5, 0.0]
    apart = record(a=SCORES[:, 0], b=SCORES[:, 1].long())
    assert columns.rubric(apart, of=["a", "b"]).tolist() == [0.5, 1.0, 0.5, 0.0]
    with pytest.raises(ConfigError, match="3 weights for 2 criteria"):
        columns.rubric(rows, weights=[1.0, 1.0, 1.0])
    with pytest.raises(ConfigError, match="a weight above 0"):
        columns.rubric(rows, weights=[-1.0, 0.0])


def test_one_criterion_of_several() -> None:
    rows = record(scores=SCORES)
    assert columns.criterion(rows, at=1).tolist() == [0.0, 1.0, 1.0, 0.0]
    assert columns.criterion(rows, at=1, complement=True).tolist() == [1.0, 0.0, 0.0, 1.0]
    with pytest.raises(ConfigError, match="at=2"):
        columns.criterion(rows, at=2)


def test_the_bent_reward_is_continuous_rising_and_has_its_written_out_values() -> None:
    rows = record(reward=torch.tensor([[1.0], [0.0], [0.8], [0.3]]))
    low = lambda gap: 0.8 - math.expm1(gap) / math.expm1(1.0)  # noqa: E731
    expected = [0.8 + 0.01 * math.log(1.2), low(0.8), 0.8, low(0.5)]
    assert columns.bent(rows).tolist() == pytest.approx(expected)
    grid = torch.linspace(0, 1, 101)[:, None]
    many = columns.bent(rows[:1].expand(101).clone().set("reward", grid))
    assert bool((many.diff() > 0).all()) and float(many.diff().max()) < 0.03


def test_a_teachers_mark_is_a_tenth_of_its_mean_log_prob() -> None:
    lp = torch.tensor([-1.2, -4.9, -9.0, -0.1])[:, None].expand(4, 6)  # 7.6, 0.2, below 0, 9.8 of ten
    rows = record(teacher_log_prob=lp)
    assert columns.spoken(rows).tolist() == pytest.approx([7 / 9, 0.0, 0.0, 1.0])
    half = columns.spoken(rows, share=0.5)  # and half of the returns 1, 0, 1, 0
    assert half.tolist() == pytest.approx([7 / 18 + 0.5, 0.0, 0.5, 0.5])


def test_a_rank_among_a_references_answers_is_tilted() -> None:
    source = torch.tensor([Source.ONLINE, Source.EXPERT, Source.ONLINE, Source.EXPERT], dtype=torch.int64)
    rows = record(reward=torch.tensor([[0.6], [0.2], [0.5], [0.5]]), source=source, group=torch.tensor([0, 0, 0, 0]))
    assert columns.calibrated(rows, tilt=0.0).tolist() == [1.0, 0.25, 0.75, 0.75]  # above both; equal counts half
    got = columns.calibrated(rows, tilt=2.0)
    wanted = [math.expm1(2.0 * c) / math.expm1(2.0) for c in (1.0, 0.25, 0.75, 0.75)]
    assert got.tolist() == pytest.approx(wanted)
    assert columns.calibrated(rows, tilt=-2.0)[2] > 0.75  # the worst of many: low ranks differ most
    cubed = rows.clone()
    cubed["reward"] = rows["reward"] ** 3  # a rising transform of rewards changes no rank
    assert columns.calibrated(cubed, tilt=2.0).equal(got)
    with pytest.raises(RecordError, match=r"unified_rl\.rollout\.sources\.Model"):
        columns.calibrated(record(source=source.clone().zero_()))


def test_ranks_under_the_reference_itself_are_uniform() -> None:
    g = torch.Generator().manual_seed(0)
    n = 2000
    rows = record()[:1].expand(n).clone()
    rows["reward"] = torch.rand(n, 1, generator=g)
    rows["group"] = torch.zeros(n, dtype=torch.int64)
    rows["source"] = torch.where(torch.arange(n) % 2 == 0, int(Source.ONLINE), int(Source.EXPERT))
    rank = columns.calibrated(rows, tilt=0.0)[::2]
    assert float(rank.mean()) == pytest.approx(0.5, abs=0.03) and float(rank.var()) == pytest.approx(1 / 12, abs=0.01)


def test_right_answers_of_mixed_groups_are_held_less() -> None:
    rows = record(reward=torch.tensor([[1.0], [0.0], [1.0], [1.0]]))
    half = 1 - math.exp(-math.e / 2)
    assert columns.loosened(rows).tolist() == pytest.approx([half, 1.0, 1.0, 1.0])  # all right keeps 1
    rare = [float(columns.loosened(record(reward=torch.tensor([[1.0], [0.0], [0.0], [0.0]]),
                                          group=torch.zeros(4, dtype=torch.int64)))[0]), half]  # fmt: skip
    assert rare == sorted(rare)  # the harder, the less


def test_an_alarm_that_is_missed_costs_more_than_a_false_one() -> None:
    two, three = numbered("2"), numbered("3")
    given = {"reward": torch.tensor([[1.0], [0.0], [0.0], [0.0]])}
    rows = record(**given, label=torch.tensor([three, three, two, two]), answer=torch.tensor([three, two, three, -1]))
    cost = columns.class_costs(rows, alarm=["3", "4"], hit=2.0, miss=-1.0, false_alarm=-0.5)
    assert cost.tolist() == [2.0, -1.0, -0.5, 0.0]  # hit, miss, false alarm, another mistake
    plain = columns.class_costs(rows, alarm=["3"], hit=1.0, miss=0.0, false_alarm=0.0)
    assert plain.tolist() == [1.0, 0.0, 0.0, 0.0]


def test_distinct_right_answers_earn_more_and_wrong_ones_nothing() -> None:
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12], [1, 2, 3, 4, 5, 6]])
    given = {"tokens": tokens, "mask": torch.ones(4, 6, dtype=torch.bool), "group": torch.zeros(4, dtype=torch.int64)}
    rows = record(**given, reward=torch.tensor([[1.0], [1.0], [1.0], [0.0]]))
    assert columns.distinct(rows, bonus=0.1).tolist() == pytest.approx([1.05, 1.05, 1.1, 0.0])  # alike 1 and 0; 0 and 0
    share = columns.distinct_share(rows, temperature=0.5)
    e = math.e
    assert share.tolist() == pytest.approx([3 * e / (2 * e + e**2)] * 2 + [3 * e**2 / (2 * e + e**2), 0.0])
    lone = record(**given, reward=torch.tensor([[1.0], [0.0], [0.0], [0.0]]))
    assert columns.distinct(lone, bonus=0.1).tolist() == [1.0, 0.0, 0.0, 0.0]
    alike = record(**{**given, "tokens": tokens[:1].expand(4, 6)}, reward=torch.ones(4, 1))
    torch.testing.assert_close(columns.distinct_share(alike), torch.ones(4))


def test_likeness_is_to_what_somebody_else_answered() -> None:
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12], [1, 2, 3, 4, 5, 6]])
    source = torch.tensor([Source.ONLINE, Source.DEMONSTRATION, Source.ONLINE, Source.ONLINE], dtype=torch.int64)
    group = torch.tensor([0, 0, 0, 1])
    rows = record(tokens=tokens, mask=torch.ones(4, 6, dtype=torch.bool), source=source, group=group)
    assert columns.likeness(rows).tolist() == pytest.approx([1.0, 1.0, 0.0, 0.0])  # the last has nobody beside it
    rows["source"][2:] = int(Source.OFFLINE)  # an own answer of before is nobody else's
    assert columns.likeness(rows).tolist() == pytest.approx([1.0, 1.0, 0.0, 0.0])


def test_answers_are_alike_by_what_they_sampled_and_in_which_order() -> None:
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6], [9, 9, 3, 4, 5, 6], [1, 2, 6, 5, 4, 3], [1, 2, 7, 8, 9, 10]])
    mask = torch.tensor([False, False, True, True, True, True]).expand(4, 6)  # behind a prompt
    source = torch.tensor([Source.DEMONSTRATION, *[Source.ONLINE] * 3], dtype=torch.int64)
    rows = record(tokens=tokens, mask=mask, source=source, group=torch.zeros(4, dtype=torch.int64))
    assert columns.likeness(rows).tolist() == pytest.approx([1.0, 1.0, 4 / 7, 0.0])  # four tokens, not three pairs


def test_rows_that_no_counterpart_is_told_apart_from_are_left_out() -> None:
    group = torch.tensor([0, 0, 0, 1])
    rows = record(
        reward=torch.tensor([[1.0], [0.0], [0.0], [0.0]]), score=torch.tensor([0.9, 0.85, 0.3, 0.5]), group=group
    )
    kept = filters.distinct_pairs(rows, torch.ones(4, 1), least=0.1)
    assert kept.tolist() == [True, False, True, True]  # 0.05 from the right one; 0.6; no counterpart at all
    assert filters.distinct_pairs(rows, torch.ones(4, 1), least=0.0).all()


def test_rows_of_others_are_read_where_nobody_solved_the_prompt() -> None:
    source = torch.tensor([Source.ONLINE, Source.DEMONSTRATION, Source.ONLINE, Source.DEMONSTRATION], dtype=torch.int64)
    rows = record(reward=torch.tensor([[1.0], [1.0], [0.0], [1.0]]), source=source)
    assert gates.own_or_unsolved(rows).tolist() == [True, False, True, True]
    assert gates.own_or_unsolved(rows, threshold=-1.0).tolist() == [True, False, True, False]


def test_a_horizon_takes_the_first_units_of_every_row() -> None:
    kept = filters.first_units(record(), torch.ones(4, 1), share=0.5)
    assert kept.sum(-1).tolist() == [3, 1, 2, 2] and bool(kept[:, 0].all())  # of 6, 2, 4, 3, rounded up
    assert filters.first_units(record(), torch.ones(4, 1), share=1.0).equal(record()["mask"])


def test_a_weight_grows_where_an_objective_is_missed_or_moves() -> None:
    made = coefficient({"name": "unsettled", "metric": "m", "window": 2, "temperature": 0.5}, "c")
    assert made(0.0, 0) == pytest.approx(math.exp(2.0))  # nothing is known: as if wholly missed
    made.observe({"m": 1.0})
    assert made(0.0, 1) == pytest.approx(1.0)  # met
    made.observe({"m": 0.5})
    assert made(0.0, 2) == pytest.approx(math.exp((1 - 0.75 + 0.25) / 0.5))
    again = coefficient({"name": "unsettled", "metric": "m", "window": 2, "temperature": 0.5}, "c")
    again.load_state_dict(made.state_dict())
    for one in (made, again):
        one.observe({"m": 0.5})  # the first has left the window
    assert made(0.0, 3) == again(0.0, 3) == pytest.approx(math.exp(0.5 / 0.5))


def test_numbers_in_a_list_may_move_each_by_itself() -> None:
    node = {"name": "rubric", "weights": [{"name": "linear", "start": 1.0, "end": 3.0}, 2.0]}
    rule = Moving(node, COLUMNS, "agent.columns.x")
    rule.start(0.5, 3)
    assert rule.settings["weights"] == [2.0, 2.0]
    bad = {"name": "rubric", "weights": [{"name": "linear", "start": "x"}]}
    with pytest.raises(ConfigError, match=r"agent\.columns\.x\.weights\.0\.start"):
        Moving(bad, COLUMNS, "agent.columns.x")


def test_the_advantage_is_of_the_column_that_it_names() -> None:
    policy, rows = joined()
    nudge(policy, 0.02)
    rows["scores"] = torch.stack([torch.rand(12, generator=torch.Generator().manual_seed(1)), torch.zeros(12)], -1)
    reward = {"baseline": "mean", "scale": "none", "reward": "mixed"}
    node = {"mixed": {"name": "rubric", "weights": [2.0, 1.0]}}
    got = both_splits(policy, rows, load_correction("grpo", advantage=reward), columns=node)
    plain = copy.deepcopy(rows)
    plain["reward"] = (rows["scores"][:, :1] * 2.0) / 3.0
    grpo = agent_of(
        copy.deepcopy(policy), plain, load_correction("grpo", advantage={"baseline": "mean", "scale": "none"})
    )
    close(got, gradients(grpo, filled(plain, 1)))


def test_a_penalty_weighs_rows_by_a_column() -> None:
    policy, rows = joined()
    reference = copy.deepcopy(policy)
    penalty = [{"name": "k2", "anchor": "reference", "coefficient": 0.5, "weight": "near"}]
    correction = load_correction("grpo", penalty=penalty)
    columns_node = {"near": {"name": "loosened", "steepness": 2.0}}
    none = {"objectives": None, "columns": columns_node}

    def moved(agent: Any) -> None:
        nudge(agent.policy, 0.05)

    got = both_splits(policy, rows, correction, moved, **none)
    agent = agent_of(policy, rows, correction, **none)
    nudge(policy, 0.05)
    _, lp = dense(policy, rows)
    with torch.no_grad():
        _, start = dense(reference, rows)
    reward, mask = rows["reward"].sum(-1), rows["mask"]
    groups = [rows["group"] == g for g in rows["group"]]
    rate = torch.stack([reward[g].mean() for g in groups])
    spread = torch.stack([reward[g].std() for g in groups])
    a = torch.where(spread > 0, (reward - rate) / (spread + 1e-6), 0.0)[:, None]
    weight = torch.where((reward > 0.5) & (rate < 1), 1 - (-2.0 * rate).exp(), 1.0)[:, None]
    ratio = torch.where(mask, lp - rows["behavior_log_prob"], 0.0).exp()
    ppo = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
    each = -ppo + 0.5 * weight * 0.5 * torch.where(mask, lp - start, 0.0).square()
    loss = ((each * mask).sum(-1) / mask.sum(-1)).mean()
    close(got, want(agent, loss))


def test_the_entropy_of_rows_is_weighed_by_a_column() -> None:
    policy, rows = joined()
    rows["share"] = torch.rand(12, generator=torch.Generator().manual_seed(2))
    term = {"spread": {"name": "weighed_entropy", "weight": "share", "coefficient": 0.7}}
    got = both_splits(policy, rows, objectives={"policy": None, **term})
    agent = agent_of(policy, rows, objectives={"policy": None, **term})
    full, _ = dense(policy, rows)
    mask = rows["mask"]
    entropy = -(full.exp() * full).sum(-1) * mask
    close(got, want(agent, -0.7 * (rows["share"] * entropy.sum(-1) / mask.sum(-1)).mean()))


def test_rows_know_what_the_most_likely_answer_earns_and_nothing_else_is_drawn_differently() -> None:
    env = Easy(modulus=5, terms=3)
    policy = CausalLM(**env.policy_inputs(), config=TINY, seed=1)

    def collected(**options: Any) -> Any:
        rollout = LanguageRollout(env, policy, 1.0, stream(0), stream(1), prompts=6, group_size=2, **options)
        return rollout.collect(0)

    plain, _ = collected()
    rows, metrics = collected(columns={"best": "greedy", "exact": ["greedy"]})
    assert torch.equal(plain["tokens"], rows["tokens"])
    problems = env.problems(6, stream(1), "train")
    told, _ = converse(env, policy, problems, None, greedy=True)
    earned = told.reward.sum(-1)
    assert 0 < float(earned.mean()) < 1 and metrics["rollout/greedy"] == float(earned.mean())
    assert torch.equal(rows["best"], earned.long().repeat_interleave(2))
    assert torch.equal(rows["exact"][:, 0], earned.repeat_interleave(2))


def test_where_every_most_likely_answer_is_right_nothing_is_learnt() -> None:
    policy, rows = joined()
    objectives = {"policy": {"rows": {"source": "own", "unless": "greedy"}}}
    rows["greedy"] = torch.ones(12, dtype=torch.int64)
    agent = agent_of(policy, rows, objectives=objectives)
    agent.update(filled(rows, 1))
    assert agent.optimizer.steps == 0
    rows["greedy"][:4] = 0
    agent.update(filled(rows, 1))
    assert agent.optimizer.steps == 1


GRPO = tuple(merged(LANGUAGE, ["correction=grpo"]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("agent.columns={x: rubrik}", ["agent.columns.x", "did you mean 'rubric'"]),
        ("agent.columns={x: {name: bent, trun: 0.5}}", ["agent.columns.x", "did you mean 'turn'"]),
        ("agent.columns={x: bent}", ["agent.columns.x", "nothing reads it"]),
        ("agent.columns={x: {name: rubric, of: [y]}, y: bent}", ["agent.columns.x", "agent.columns.y before it"]),
        ("agent.columns={advantage: bent}", ["agent.columns.advantage", "choose another name"]),
        ("agent.columns={old_log_prob: bent}", ["agent.columns.old_log_prob", "choose another name"]),
        ("agent.gates={value: success_at_most}", ["agent.gates.value", "choose another name"]),
        ("rollout.columns={advantage: correct}", ["rollout.columns.advantage", "choose another name"]),
        (
            "agent.columns={x: {name: rubric, of: [group, source], weights: [1.0]}}",
            ["agent.columns.x has 1 weights for 2 criteria"],
        ),
        ("correction.advantage.reward=mixd", ["correction.advantage.reward", "agent.columns.mixd"]),
        ("correction.penalty=[{name: k2, weight: near}]", ["correction.penalty.0.weight", "agent.columns.near"]),
        (
            "agent.objectives.s={name: weighed_entropy, weight: share}",
            ["agent.objectives.s.weight", "agent.columns.share"],
        ),
    ],
)
def test_columns_that_nothing_writes_or_reads_are_refused_by_name(change: str, words: list[str]) -> None:
    found = stage(GRPO, change, None)  # type: ignore[arg-type]
    assert found and all(word in found for word in words), found


@pytest.mark.parametrize(
    ("column", "told"),
    [
        ({"name": "rubric", "weights": [1.0, 2.0, 3.0]}, "agent.columns.x has 3 weights for 2 criteria"),
        ({"name": "criterion", "at": 2}, "agent.columns.x has at=2, and scores holds 2 scores a row"),
        ({"name": "rubric", "weights": [1.0, 2.0]}, ""),
        ({"name": "criterion", "at": 1}, ""),
    ],
)
def test_a_column_of_other_scores_than_rows_will_have_is_refused_before_any(column: dict[str, Any], told: str) -> None:
    words = merged(GRPO, ["rollout.columns={scores: [correct, truncated]}", "correction.advantage.reward=x"])
    node = ", ".join(f"{key}: {value}" for key, value in column.items())
    assert stage(words, f"agent.columns={{x: {{{node}}}}}", None) == told  # type: ignore[arg-type]


@pytest.mark.parametrize("node", ["likeness", "distinct"])
def test_control_has_no_texts_to_compare(node: str) -> None:
    words = merged(CONTROL, ["correction=grpo", "agent.advantage=critic"])
    found = stage(words, f"agent.columns={{x: {node}}}", None)  # type: ignore[arg-type]
    assert "agent.columns.x compares texts" in found and "rollout.columns" not in found, found


def test_a_name_under_which_a_rule_reads_is_taken_where_it_does() -> None:
    assert list(make_rules({"columns": {"entropy": "bent"}}).columns) == ["entropy"]
    with pytest.raises(ConfigError, match=r"agent\.columns\.entropy: the update itself writes 'entropy'"):
        make_rules({"columns": {"entropy": "bent"}, "filters": ["entropy_above"]})
    with pytest.raises(ConfigError, match=r"agent\.columns\.x and agent\.gates\.x are one entry"):
        make_rules({"columns": {"x": "bent"}, "gates": {"x": "success_at_most"}})


@pytest.mark.parametrize("rows", [{"when": "x"}, {"unless": "x"}])
def test_a_column_by_which_rows_are_chosen_is_read(rows: dict[str, Any]) -> None:
    policy, record = joined()
    agent = agent_of(policy, record, objectives={"policy": {"rows": rows}}, columns={"x": "bent"})
    agent.check_written([0], 4, list(record.keys()))


def test_columns_see_the_rewards_of_a_model() -> None:
    policy, rows = joined()
    agent = agent_of(policy, rows, "reinforce", columns={"x": "bent"}, reward_model="reversed")
    seen: list[Any] = []
    agent.watch = seen.append
    agent.update(filled(rows, 1))
    assert float(seen[0]["reward"].sum(-1).max()) < 0.0  # log-probs, where the task gives 0 and 1
    torch.testing.assert_close(seen[0]["x"], columns.bent(seen[0]))


def test_columns_of_late_columns_are_late() -> None:
    nodes = {"mark": "spoken", "sum": {"name": "rubric", "of": ["mark"]}, "own": "bent"}
    policy, rows = joined()
    agent = agent_of(policy, rows)
    parts = Parts(policy, agent.correction, agent.wrapper, agent.anchors)
    assert Estimate(parts, agent.objective, agent.estimate.groups, rules=make_rules({"columns": nodes})).late == {
        "mark",
        "sum",
    }


@pytest.mark.parametrize("term", [{"name": "preference", "order": "x"}, {"name": "triage", "old": "x"}])
def test_a_column_by_which_a_term_orders_rows_is_read(term: dict[str, Any]) -> None:
    policy, rows = joined()
    agent = agent_of(policy, rows, objectives={"prefer": {**term, "anchor": "none"}}, columns={"x": "bent"})
    agent.check_written([0], 4, list(rows.keys()))


def test_a_column_that_the_record_has_is_not_overwritten() -> None:
    policy, rows = joined()
    reward = load_correction("grpo", advantage={"baseline": "mean", "reward": "prompt_id"})
    with pytest.raises(ConfigError, match=r"agent\.columns\.prompt_id would overwrite"):
        agent_of(policy, rows, reward, columns={"prompt_id": "bent"}).update(filled(rows, 1))
