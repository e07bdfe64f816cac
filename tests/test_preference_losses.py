"""Preference losses against autograd of what is written in their papers, for every split of the batch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agent_cases import HORIZON, LANES, close, control_agent, filled, gaussian, gradients, nudge, transitions
from tensordict import TensorDict
from term_cases import agent_of, both_splits, dense, joined, want
from torch import Tensor

from unified_rl.agents.loss import make_terms
from unified_rl.agents.policy_gradient import PolicyGradient
from unified_rl.errors import ConfigError
from unified_rl.objectives.pairs import best_deviant
from unified_rl.objectives.preference import KtoTerm, action_errors, error_shares
from unified_rl.units import Source, record_from_steps

REWARD = torch.tensor([1.0, 0, 0.5, 0.25, 1, 2, 0, 0, 0, 0, 0, 0])
"""Of three groups of four; the last has nothing to compare."""
PAIRS = [(0, 1), (5, 6)]
LOG2 = math.log(2)


def mean(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).mean()


def sets(h: Tensor, chosen: list[list[int]], all_of: list[list[int]], beta: float, deviation: float) -> Tensor:
    group_mean = REWARD.view(3, 4).mean(-1).repeat_interleave(4)
    weight = (deviation * (REWARD - group_mean).abs()).exp()
    found = []
    for good, every in zip(chosen, all_of, strict=True):
        mass = weight * (beta * h).exp()
        found.append(-(mass[good].sum() / mass[every].sum()).log())
    return mean(found)


def kto(h: Tensor) -> Tensor:
    z0, good = h.mean().detach().clamp(min=0), REWARD > 0.4
    gap = torch.where(good, 0.7 * (h - z0), 0.7 * (z0 - h))
    return (torch.where(good, 1.5, 0.5) * (1 - torch.sigmoid(gap))).mean()


def js(h: Tensor) -> Tensor:
    return 0.5 * (LOG2 - F.softplus(-h))


CASES: dict[str, tuple[dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "ipo": (
        {"name": "preference", "link": {"name": "ipo", "beta": 2.0}, "coefficient": 0.1},
        lambda h, s: 0.1 * mean([(h[w] - h[l] - 0.25).square() for w, l in PAIRS]),
    ),
    "nll": (
        {"name": "preference", "link": {"name": "dpo", "beta": 0.7}, "nll": 0.3},
        lambda h, s: mean([-F.logsigmoid(0.7 * (h[w] - h[l])) - 0.3 * s[w] for w, l in PAIRS]),
    ),
    "js": (
        {"name": "preference", "link": {"name": "dpo", "beta": 0.7}, "generator": "js"},
        lambda h, s: mean([-F.logsigmoid(0.7 * (js(h[w]) - js(h[l]))) for w, l in PAIRS]),
    ),
    "batch": (
        {"name": "preference", "link": {"name": "dpo", "beta": 0.7}, "within": "batch"},
        lambda h, s: -F.logsigmoid(0.7 * (h[5] - h[1])),
    ),
    "kto": (
        {"name": "kto", "beta": 0.7, "threshold": 0.4, "desirable": 1.5, "undesirable": 0.5},
        lambda h, s: kto(h),
    ),
    "equivalence": (
        {"name": "equivalence", "beta": 0.7, "threshold": 0.2, "coefficient": 0.1},
        lambda h, s: 0.1 * mean([(0.7 * (h[a] - h[b])).square() for a, b in [(0, 2), (0, 3), (2, 3), (4, 5)]]),
    ),
    "mpo": (
        {"name": "set_preference", "beta": 0.7, "deviation": 0.6},
        lambda h, s: sets(h, [[0, 2], [4, 5]], [[0, 1, 2, 3], [4, 5, 6, 7]], 0.7, 0.6),
    ),
    "ampo": (
        {"name": "set_preference", "chosen": "best", "negatives": 2, "beta": 0.7, "deviation": 0.0},
        lambda h, s: sets(h, [[0], [5]], [[0, 1, 3], [5, 6, 7]], 0.7, 0.0),
    ),
}  # fmt: skip


def setting(low: float | None = None, high: float | None = None) -> tuple[Any, Any, Tensor, Tensor, Tensor]:
    """A policy off its reference, rows, and of every row the written-out score, log-prob sum and number of units."""
    policy, rows = joined()
    rows["reward"] = REWARD[:, None].clone()
    reference = copy.deepcopy(policy)
    nudge(policy, 0.05)
    _, lp = dense(policy, rows)
    with torch.no_grad():
        _, ref = dense(reference, rows)
    gap = (lp - ref).clamp(-math.inf if low is None else low, math.inf if high is None else high) * rows["mask"]
    return (policy, reference), rows, gap.sum(-1), (lp * rows["mask"]).sum(-1), rows["mask"].sum(-1)


def got(policies: Any, rows: Any, node: dict[str, Any], **options: Any) -> Any:
    def with_reference(agent: PolicyGradient) -> None:
        if "reference" in agent.anchors:
            agent.anchors["reference"].policy.load_state_dict(policies[1].state_dict())

    objectives = {"policy": None, "prefer": node}
    return both_splits(policies[0], rows, "reinforce", with_reference, objectives=objectives, **options)


@pytest.mark.parametrize("case", CASES)
def test_a_loss_has_the_gradient_of_the_paper_for_every_split(case: str) -> None:
    policies, rows, h, s, _ = setting()
    node, written = CASES[case]
    assert float(h.detach().abs().min()) > 0.0
    close(got(policies, rows, node), want(agent_of(policies[0], rows), written(h, s)))


def test_bounds_hold_scores_and_leave_the_likelihood_alone() -> None:
    policies, rows, h, s, _ = setting(-0.01, 0.02)
    node = {"name": "preference", "link": {"name": "dpo", "beta": 0.7}, "nll": 0.3, "low": -0.01, "high": 0.02}
    loss = mean([-F.logsigmoid(0.7 * (h[w] - h[l])) - 0.3 * s[w] for w, l in PAIRS])
    close(got(policies, rows, node), want(agent_of(policies[0], rows), loss))


def test_scores_may_be_means_over_units() -> None:
    policies, rows, h, _, size = setting()
    node = {"name": "preference", "link": {"name": "ipo", "beta": 2.0}, "score": "mean"}
    h = h / size
    loss = mean([(h[w] - h[l] - 0.25).square() for w, l in PAIRS])
    close(got(policies, rows, node), want(agent_of(policies[0], rows), loss))


def test_scores_may_be_measured_from_two_policies_at_once() -> None:
    policies, rows, h, _, _ = setting()
    node = {"name": "preference", "link": {"name": "ipo", "beta": 2.0}, "anchor": {"reference": 0.3, "old": 0.7}}
    d = [0.3 * (h[w] - h[l]) - 0.25 for w, l in PAIRS]  # the policy is its own last iterate: its part has no value
    _, lp = dense(policies[0], rows)
    own = (lp * rows["mask"]).sum(-1)
    loss = mean([2 * value.detach() * (own[w] - own[l]) for value, (w, l) in zip(d, PAIRS, strict=True)])
    close(got(policies, rows, node), want(agent_of(policies[0], rows), loss))


def test_kto_at_the_reference_costs_a_half() -> None:
    _, rows, *_ = setting()
    policy, _ = joined()
    agent = agent_of(policy, rows, "reinforce", objectives={"policy": None, "p": {"name": "kto", "threshold": 0.4}})
    assert float(agent.update(filled(rows, 1))["loss/total"]) == pytest.approx(0.5, abs=1e-6)


def test_rows_at_the_mean_return_are_neither_good_nor_bad() -> None:
    _, rows, *_ = setting()
    policy, _ = joined()
    rows["reward"] = torch.full_like(rows["reward"], 0.1)
    agent = agent_of(policy, rows, "reinforce", objectives={"policy": None, "p": {"name": "kto"}})
    assert float(agent.update(filled(rows, 1))["loss/total"]) == 0.0


def test_rows_of_interventions_are_good_whatever_they_return() -> None:
    policies, rows, h, _, _ = setting()
    rows["source"][8] = int(Source.INTERVENTION)
    z0, good = h.mean().detach().clamp(min=0), (REWARD > 0.4).index_fill(0, torch.tensor([8]), True)
    loss = torch.sigmoid(torch.where(good, -0.7 * (h - z0), 0.7 * (h - z0))).mean()
    close(got(policies, rows, {"name": "kto", "beta": 0.7, "threshold": 0.4}), want(agent_of(policies[0], rows), loss))


def test_actions_that_the_policy_is_far_from_count_more_where_they_are_good() -> None:
    policy, rows = gaussian(), record_from_steps(transitions(gaussian()).transpose(0, 1).contiguous())
    rows["step_mask"][0, 2:], rows["mask"][0, 2:] = False, False
    rows["reward"] = torch.tensor([2.0, 0.0, 1.0, 0.0])[:, None].expand(-1, HORIZON).clone()
    best = policy.sample(rows["observation"], deterministic=True)["action"]
    rows["action"] = best + torch.tensor([1.0, 2.0, 0.0, 5.0])[:, None, None]  # errors of the rows
    torch.testing.assert_close(action_errors(policy, rows), torch.tensor([1.0, 2.0, 0.0, 5.0]))
    share = (torch.tensor([1.0, 2.0, 0.0, 5.0]) + 1e-4) / 8.0001
    torch.testing.assert_close(error_shares(torch.tensor([1.0, 2.0, 0.0, 5.0])), share)
    kept = torch.exp(-3.0 * share)
    weight = torch.tensor([1 - kept[0], kept[1], 1 - kept[2], kept[3]])
    term = KtoTerm("p", threshold=0.5, error_rate=3.0)
    term.attach(SimpleNamespace(policy=policy))  # type: ignore[arg-type]
    h = torch.tensor([0.3, -0.2, 0.1, 0.4])
    gap = 0.1 * (h - 0.15)
    half = torch.sigmoid(torch.where(torch.tensor([True, False, True, False]), -gap, gap))
    torch.testing.assert_close(term.compare(h, h, rows).value, (weight * half).mean())
    choices = TensorDict({**rows, "action": torch.zeros(4, HORIZON, 2, dtype=torch.int64)}, batch_size=[4])
    fixed = SimpleNamespace(sample=lambda o, deterministic: {"action": torch.tensor([0, 1]).expand(4, HORIZON, 2)})
    assert action_errors(fixed, choices).tolist() == [0.5] * 4  # type: ignore[arg-type]


def test_answers_have_no_distance() -> None:
    policy, rows = joined()
    objectives = {"policy": None, "p": {"name": "kto", "error_rate": 1.0}}
    with pytest.raises(ConfigError, match=r"p\.error_rate .*this policy says answers: set it to null"):
        agent_of(policy, rows, "reinforce", objectives=objectives)


def test_groups_without_a_difference_are_no_sets() -> None:
    _, rows, *_ = setting()
    policy, _ = joined()
    rows["reward"] = torch.full_like(rows["reward"], 0.1)
    agent = agent_of(policy, rows, "reinforce", objectives={"policy": None, "p": {"name": "set_preference"}})
    metrics = agent.update(filled(rows, 1))
    assert float(metrics["loss/total"]) == 0.0 and float(metrics["p/sets"]) == 0.0


def test_episodes_are_compared_within_the_batch_and_rows_stay_whole() -> None:
    policy = gaussian()
    rows = transitions(policy)
    for node in ({"name": "kto"}, {"name": "preference", "within": "batch"}):
        objectives = {"policy": None, "value": None, "prefer": node}
        agent = control_agent(copy.deepcopy(policy), objectives=objectives, advantage="group")
        assert not agent.shuffle_steps
        found = gradients(agent, filled(rows, LANES))
        assert max(float(g.abs().max()) for g in found.values()) > 1e-4
    with pytest.raises(ConfigError, match=r"shuffle_steps cuts rows that agent\.objectives\.prefer needs whole"):
        control_agent(policy, objectives={"prefer": {"name": "kto"}}, shuffle_steps=True)
    agent = control_agent(copy.deepcopy(policy), objectives={"prefer": {"name": "set_preference"}})
    with pytest.raises(ConfigError, match=r"every row is alone in its own.*agent\.objectives\.prefer\.within=batch"):
        agent.update(filled(rows, LANES))


def test_the_rejected_row_is_the_one_nearest_the_deviations() -> None:
    reward = torch.tensor([0.0, 4.0, 5.0, 6.0, 5.0, 1.0, 1.0])
    group = torch.tensor([3, 3, 3, 3, 3, 1, 1])
    # mean 4, std sqrt(22 / 5) = 2.098; two below is -0.195, so 0; half one below is 2.95, so 4
    assert [x.tolist() for x in best_deviant(reward, group)] == [[3], [0]]
    assert [x.tolist() for x in best_deviant(reward, group, deviations=-0.5)] == [[3], [1]]
    assert [x.tolist() for x in best_deviant(reward, group, deviations=9.0)] == [[], []]  # nothing is rejected


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"name": "kto", "anchor": {"none": 1.0}}, "anchor has no field 'none'"),
        ({"name": "kto", "anchor": {"reference": "much"}}, r"p\.anchor\.reference"),
        ({"name": "kto", "low": 1.0, "high": 0.0}, "low must not lie above high=0"),
        ({"name": "kto", "beta": 0.0}, "beta=0.0 must be above 0"),
        ({"name": "set_preference", "chosen": "worst"}, r"p\.chosen"),
        ({"name": "preference", "within": "row"}, r"p\.within"),
        ({"name": "preference", "generator": "chi2"}, r"generator 'chi2' is unknown; did you mean"),
    ],
)
def test_what_makes_no_loss_is_refused(node: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_terms({"policy": None, "p": node}, None, None, 0.0)
