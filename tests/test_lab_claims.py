"""What theory says about off-policy corrections, checked by summing over every trajectory in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from unified_rl.correction import Correction
from unified_rl.correction.levels import CLAMP
from unified_rl.returns import retrace, vtrace
from unified_rl.returns.ope import Episodes, doubly_robust
from unified_rl.study.lab.drift import Drift, ascent, situations
from unified_rl.study.lab.exact import Moments, exact_moments, row_moments
from unified_rl.study.lab.measure import measure
from unified_rl.study.lab.plan import make_plan
from unified_rl.study.lab.policies import POLICIES, Policy, shared, tabular
from unified_rl.study.lab.problems import PROBLEMS, Problem, corridor, token_tree
from unified_rl.study.lab.record import coefficients, record, row_scale
from unified_rl.study.lab.scene import Scene
from unified_rl.study.lab.values import (
    expected_return,
    row_probability,
    unit_log_prob,
    values,
)

PAIRS = list(itertools.product(("tokens", "tokens_steps", "corridor"), POLICIES))
GROUP = 8


@cache
def scenes(problem_name: str, policy_name: str) -> list[Scene]:
    """A problem with drift by noise at KL 0.1 and 1, and by lag at KL 1, without the situation of no drift."""
    problem = PROBLEMS[problem_name]()
    policy = POLICIES[policy_name](problem)
    path = ascent(problem, policy, steps=16)
    drifts = situations(problem, policy, path, noise=(0.1, 1.0), lags=(16,))
    return [Scene(problem, policy, drift) for drift in drifts[1:]]


def moments(name: str, advantage: str, scene: Scene) -> Moments:
    return exact_moments(make_plan(name, advantage, binary=scene.problem.binary), scene, GROUP)


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------------------------------- importance ratios


@pytest.mark.parametrize(("problem_name", "policy_name"), PAIRS)
def test_the_sequence_ratio_is_unbiased(problem_name: str, policy_name: str) -> None:
    found = scenes(problem_name, policy_name)
    assert [round(scene.drift.kl, 1) for scene in found] == [0.1, 1.0, 1.0]
    for scene in found:
        ratio = scene.unit_log_probs["current"] - scene.unit_log_probs["behavior"]
        assert float(ratio.sum(-1).abs().max()) < CLAMP
        same(moments("sequence_is", "critic", scene).mean, scene.truth)


@pytest.mark.parametrize("policy_name", POLICIES)
def test_with_rewards_against_their_group_the_sequence_ratio_is_unbiased_up_to_a_factor(policy_name: str) -> None:
    """A row's own reward is in its baseline, which takes a share 1/G of the gradient away."""
    for scene in scenes("tokens", policy_name):
        same(moments("sequence_is", "group", scene).mean, (1 - 1 / GROUP) * scene.truth)


def drifted(problem: Problem, policy: Policy, current: Tensor, behavior: Tensor) -> Scene:
    names = ("behavior", "proximal", "average", "reference", "proxy", "teacher")
    return Scene(problem, policy, Drift("noise", 0.0, 0.0, dict.fromkeys(names, behavior) | {"current": current}, 2))


def test_the_clamp_of_log_ratios_biases_the_sequence_ratio_once_it_is_met() -> None:
    tree = token_tree(vocabulary=3, horizon=2)
    policy = tabular(tree)
    table = policy.log_table(policy.initial(0))
    behavior = table.clone()
    behavior[0, 3] = -30.0  # the current policy chooses this token often, the behavior policy almost never
    scene = drifted(tree, policy, table, behavior.log_softmax(-1))
    found = moments("sequence_is", "critic", scene).mean
    assert float((found - scene.truth).norm()) > 0.1 * float(scene.truth.norm())


@pytest.mark.parametrize(("problem_name", "policy_name"), PAIRS)
def test_the_per_decision_ratio_is_unbiased_with_a_reward_a_step(problem_name: str, policy_name: str) -> None:
    for scene in scenes(problem_name, policy_name):
        same(moments("per_decision_is", "critic", scene).mean, scene.truth)


@pytest.mark.parametrize(("problem_name", "policy_name"), PAIRS)
def test_the_prefix_ratio_is_unbiased_with_the_true_advantage(problem_name: str, policy_name: str) -> None:
    for scene in scenes(problem_name, policy_name):
        same(moments("prefix_is", "critic", scene).mean, scene.truth)


@pytest.mark.parametrize("policy_name", POLICIES)
def test_the_prefix_ratio_is_biased_with_an_outcome_advantage(policy_name: str) -> None:
    for scene in scenes("tokens", policy_name):
        assert measure(moments("prefix_is", "group", scene), scene.truth).free_bias2 > 1e-5


@pytest.mark.parametrize(("problem_name", "policy_name"), PAIRS)
def test_the_unit_ratio_is_biased_even_with_the_true_advantage(problem_name: str, policy_name: str) -> None:
    for scene in scenes(problem_name, policy_name):
        found = measure(moments("importance_sampling", "critic", scene), scene.truth)
        assert found.bias2 > 1e-5 * found.true_norm**2


@pytest.mark.parametrize("problem_name", ["tokens", "tokens_steps", "tokens_graded"])
def test_where_no_state_comes_twice_the_prefix_ratio_of_a_table_varies_no_more_than_the_sequence_ratio(
    problem_name: str,
) -> None:
    """Scores of different states are orthogonal then, and each term alone gains by leaving out later ratios."""
    for scene in scenes(problem_name, "tabular"):
        assert moments("prefix_is", "critic", scene).variance < moments("sequence_is", "critic", scene).variance


def test_where_states_come_twice_the_prefix_ratio_of_a_table_can_vary_more() -> None:
    """A counterexample: on the walk a state is met again, and the terms of a row are correlated."""
    walk = corridor()
    policy = tabular(walk)
    current = policy.log_table(2 * policy.initial(24))
    noise = torch.randn(current.shape, generator=torch.Generator().manual_seed(2400)).double()
    scene = drifted(walk, policy, current, (current + 0.2 * noise).log_softmax(-1))
    prefix, sequence = moments("prefix_is", "critic", scene), moments("sequence_is", "critic", scene)
    same(prefix.mean, sequence.mean)
    assert prefix.variance > 1.005 * sequence.variance


# -------------------------------------------------------------------------------- no drift: everything is REINFORCE

LEVELS: list[Any] = [
    "unit", "step", "step_sum", "sequence", "geometric", "prefix", "prefix_geometric", "min_prefix",
    {"name": "hoelder", "p": 2.0}, {"name": "hoelder", "p": -1.0},
]  # fmt: skip
KERNELS = ["ratio", "ppo", "clipped", "band", "ring", "sign_clamp", "tapered", "soft_gate", "gamma_density",
           "tv_mask", "kl_mask", "log_clip", "centered_ppo", "ess_cap", "ess_cap_mixed", "m2_mask",
           "searched_ppo"]  # fmt: skip


@cache
def fresh() -> tuple[Problem, Policy, Drift]:
    """The tree without drift."""
    tree = token_tree(vocabulary=3, horizon=4)
    policy = shared(tree)
    return tree, policy, situations(tree, policy, ascent(tree, policy, steps=2, kl=0.1), noise=(), lags=())[0]


def without_drift(correction: Correction, *, outcome: bool = True) -> tuple[Moments, Tensor]:
    """Moments with the return as every unit's advantage, and the coefficients."""
    tree, policy, drift = fresh()
    tree = replace(tree, outcome=outcome)
    scene = Scene(tree, policy, drift)
    by_policy = scene.log_probs(correction)
    advantage = tree.returns[:, None].expand_as(tree.reward)
    batch = record(
        tree, torch.arange(len(tree.mask)), by_policy, advantage, torch.zeros(len(tree.mask), dtype=torch.int64)
    )
    found = coefficients(correction, by_policy["current"], batch, row_scale(correction, tree, scene.probability))
    return row_moments(scene, found), found


def assert_reinforce(correction: Correction, *, outcome: bool = True) -> None:
    plain, _ = without_drift(Correction(kernel="constant", reduce=correction.reduce), outcome=outcome)
    found, _ = without_drift(correction, outcome=outcome)
    assert float(plain.mean.norm()) > 1e-3
    same(found.mean, plain.mean)
    assert found.variance == pytest.approx(plain.variance, rel=1e-9)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_without_drift_straight_through_kernels_with_weight_one_are_reinforce(level: Any, kernel: str) -> None:
    for outcome in (True, False):
        assert_reinforce(Correction(level=level, kernel=kernel), outcome=outcome)


@pytest.mark.parametrize("reduce", ["token-mean", "sequence-mean-token-mean"])
@pytest.mark.parametrize("level", ["unit", "step", "geometric", *LEVELS[-2:]], ids=str)
def test_without_drift_attached_means_over_a_row_are_reinforce_with_one_advantage_a_row(
    level: Any, reduce: str
) -> None:
    assert_reinforce(Correction(level=level, kernel="ppo", attached=True, reduce=reduce))


def test_without_drift_an_attached_sum_counts_every_unit_of_the_row_and_an_attached_prefix_those_from_here_on() -> None:
    """So these two are not REINFORCE: their coefficients are its own times a count."""
    tree, _, _ = fresh()
    _, plain = without_drift(Correction(kernel="constant"))
    length = tree.mask.sum(-1, keepdim=True)
    later = tree.mask.flip(-1).cumsum(-1).flip(-1)
    same(without_drift(Correction(level="sequence", kernel="ratio", attached=True))[1], plain * length)
    same(without_drift(Correction(level="prefix", kernel="ratio", attached=True))[1], plain * later)


# ------------------------------------------------------------------------------------------- values of a policy


@cache
def walk() -> tuple[Problem, Tensor, Tensor]:
    """The walk, a target and a behavior policy."""
    problem = corridor()
    policy = tabular(problem)
    return problem, policy.log_table(policy.initial(0)), policy.log_table(policy.initial(7))


def at_next(problem: Problem, x: Tensor) -> Tensor:
    """Each step's successor's value; 0 where the episode ends."""
    following = torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], -1)
    alive = torch.cat([problem.mask[:, 1:], torch.zeros_like(problem.mask[:, :1])], -1)
    return following.masked_fill(~alive, 0.0)


def average(problem: Problem, behavior: Tensor, target: Tensor, index: Tensor, number: int) -> Tensor:
    """Expected target of each state (or state and action) under the behavior policy, ``[number]``."""
    p = row_probability(problem, behavior)[:, None].expand_as(target)[problem.mask]
    where = index[problem.mask]
    total = torch.zeros(number, dtype=torch.float64).index_add(0, where, p * target[problem.mask])
    return total / torch.zeros(number, dtype=torch.float64).index_add(0, where, p).clamp(min=1e-300)


def last_step(problem: Problem) -> Tensor:
    return problem.mask & (problem.mask.cumsum(-1) == problem.mask.sum(-1, keepdim=True))


def fixed_point(step: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Where repeated evaluation of expected targets ends, within as many passes as an episode has steps and one."""
    for _ in range(6):
        start = step(start)
    return start


@pytest.mark.parametrize("c_bar", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("rho_bar", [0.5, 1.0, 2.0, math.inf])
@pytest.mark.parametrize("lam", [0.7, 1.0])
def test_vtrace_ends_at_the_values_of_the_policy_proportional_to_the_truncated_target(
    rho_bar: float, c_bar: float, lam: float
) -> None:
    problem, target, behavior = walk()
    log_ratio = unit_log_prob(problem, target) - unit_log_prob(problem, behavior)
    ends = last_step(problem)

    def step(v: Tensor) -> Tensor:
        value = v[problem.node]
        _, found = vtrace(problem.reward, value, at_next(problem, value), ends, ends, log_ratio, 1.0, lam=lam,
                          rho_bar=rho_bar, c_bar=min(c_bar, rho_bar), mask=problem.mask)  # fmt: skip
        return average(problem, behavior, found, problem.node, problem.nodes)

    truncated = torch.minimum(behavior + math.log(rho_bar), target).log_softmax(-1) if rho_bar < math.inf else target
    expected, _ = values(problem, truncated)
    reached = problem.node[problem.mask].unique()
    # truncation shrinks each backup, so the fixed point is met in the limit: more passes than an episode has steps
    v = torch.zeros(problem.nodes, dtype=torch.float64)
    for _ in range(200):
        v = step(v)
    same(v[reached], expected[reached])
    same(step(expected)[reached], expected[reached])
    if rho_bar < 1:
        assert float((expected - values(problem, target)[0])[reached].abs().max()) > 1e-3


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_retrace_ends_at_the_action_values_of_the_target(lam: float) -> None:
    problem, target, behavior = walk()
    log_ratio = unit_log_prob(problem, target) - unit_log_prob(problem, behavior)
    ends, pair = last_step(problem), problem.node * 2 + problem.action
    p = target.exp()[torch.arange(problem.nodes) % problem.states]

    def step(q: Tensor) -> Tensor:
        table = q.view(-1, 2)
        expected = (p * table).sum(-1)[problem.node]
        found = retrace(problem.reward, q[pair], at_next(problem, expected), ends, ends, log_ratio, 1.0, lam,
                        problem.mask)  # fmt: skip
        return average(problem, behavior, found, pair, 2 * problem.nodes)

    reached = pair[problem.mask].unique()
    exact = values(problem, target)[1].flatten()
    same(fixed_point(step, torch.zeros(2 * problem.nodes, dtype=torch.float64))[reached], exact[reached])


def doubly_robust_mean(log_ratio: Tensor, q: Tensor) -> float:
    """Expectation of the estimate over the behavior policy's episodes, each handed to the estimator alone."""
    problem, target, behavior = walk()
    p = target.exp()[torch.arange(problem.nodes) % problem.states]
    taken, expected = q[problem.node, problem.action], (p * q).sum(-1)[problem.node]
    total = 0.0
    for b, weight in enumerate(row_probability(problem, behavior).tolist()):
        part = slice(b, b + 1)
        episodes = Episodes(problem.reward[part], log_ratio[part], 1.0, problem.mask[part])
        total += weight * float(doubly_robust(episodes, taken[part], expected[part]).value)
    return total


def test_doubly_robust_evaluation_is_unbiased_if_the_ratios_or_the_values_are_right() -> None:
    problem, target, behavior = walk()
    g = torch.Generator().manual_seed(0)
    right = unit_log_prob(problem, target) - unit_log_prob(problem, behavior)
    wrong = right + 0.5 * torch.randn(problem.states, 2, generator=g).double()[problem.state, problem.action]
    exact, poor = values(problem, target)[1], torch.randn(problem.nodes, 2, generator=g).double()
    expected = float(expected_return(problem, target))
    assert doubly_robust_mean(right, poor) == pytest.approx(expected, abs=1e-12)
    assert doubly_robust_mean(wrong, exact) == pytest.approx(expected, abs=1e-12)
    assert abs(doubly_robust_mean(wrong, poor) - expected) > 0.05
