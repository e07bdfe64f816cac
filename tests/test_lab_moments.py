"""The lab's problems, values and moments against independent computations."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from unified_rl.correction import load_correction
from unified_rl.returns import group_advantage
from unified_rl.study.lab.drift import Drift, ascent, filtered, noisy, situations, teacher
from unified_rl.study.lab.exact import binomial, exact_moments, row_moments
from unified_rl.study.lab.measure import measure
from unified_rl.study.lab.plan import GROUP, ROW, SAMPLED_BATCH, SAMPLED_GROUP, Plan, make_plan
from unified_rl.study.lab.policies import POLICIES, Policy, shared, tabular
from unified_rl.study.lab.problems import PROBLEMS, Problem, corridor, token_tree
from unified_rl.study.lab.record import coefficients, record
from unified_rl.study.lab.sampled import sampled_moments
from unified_rl.study.lab.scene import Scene
from unified_rl.study.lab.values import (
    divergence,
    expected_return,
    row_probability,
    scatter,
    true_advantage,
    true_gradient,
    unit_log_prob,
    values,
)


def every_pair() -> list[tuple[str, str]]:
    return list(itertools.product(PROBLEMS, POLICIES))


def scene_of(problem: Problem, policy: Policy, kl: float = 0.3) -> Scene:
    """Noise on the policy at the end of a short ascent."""
    path = ascent(problem, policy, steps=8)
    return Scene(problem, policy, situations(problem, policy, path, noise=[kl], lags=[])[1])


def row_jacobian(problem: Problem, policy: Policy, theta: Tensor) -> Tensor:
    """Gradient of every unit's log-probability by automatic differentiation, ``[B, N, P]``."""
    return torch.autograd.functional.jacobian(
        lambda x: unit_log_prob(problem, policy.log_table(x)), theta, vectorize=True
    ).flatten(2)


def test_the_tree_lists_every_answer_once() -> None:
    tree = token_tree()
    assert tree.mask.shape == (1365, 5) and tree.states == 341
    answers = {tuple(a[m].tolist()) for a, m in zip(tree.action, tree.mask, strict=True)}
    assert len(answers) == 1365
    right = {tuple(a[m].tolist()) for a, m, r in zip(tree.action, tree.mask, tree.returns, strict=True) if r == 1}
    assert (1, 2, 0) in right and (3, 0) in right
    assert right == {a for a in answers if a[-1] == 0 and len(a) > 1 and sum(a) % 3 == 0}


def test_states_of_the_tree_are_the_tokens_so_far() -> None:
    tree = token_tree(vocabulary=2, horizon=3)
    seen: dict[int, tuple[int, ...]] = {}
    for action, state, mask in zip(tree.action.tolist(), tree.state.tolist(), tree.mask.tolist(), strict=True):
        for t in range(3):
            if mask[t]:
                assert seen.setdefault(state[t], tuple(action[:t])) == tuple(action[:t])
    assert len(seen) == tree.states == 7 and len(set(seen.values())) == 7


@pytest.mark.parametrize(("problem_name", "policy_name"), every_pair())
def test_probabilities_sum_to_one_and_the_gradient_is_that_of_automatic_differentiation(
    problem_name: str, policy_name: str
) -> None:
    problem = PROBLEMS[problem_name]()
    policy = POLICIES[policy_name](problem)
    theta = policy.initial(3).requires_grad_()
    table = policy.log_table(theta)
    assert float(row_probability(problem, table.detach()).sum()) == pytest.approx(1.0, abs=1e-12)
    (expected,) = torch.autograd.grad(expected_return(problem, table), theta)
    torch.testing.assert_close(true_gradient(problem, policy, table.detach()), expected, rtol=1e-9, atol=1e-13)


def test_values_of_the_walk_are_those_of_backward_induction() -> None:
    walk, length, horizon, slip = corridor(), 6, 5, 0.15
    table = tabular(walk).log_table(tabular(walk).initial(1))
    p, v = table.exp(), torch.zeros(horizon + 1, length, dtype=torch.float64)
    q = torch.zeros(horizon, length, 2, dtype=torch.float64)
    for t in range(horizon - 1, -1, -1):
        for s, a in itertools.product(range(1, length - 1), range(2)):
            for slipped, chance in ((0, 1 - slip), (1, slip)):
                to = s + (1 if a ^ slipped else -1)
                ends = to in (0, length - 1)
                paid = -0.02 + (1.0 if to == length - 1 else 0.3 if to == 0 else 0.0)
                q[t, s, a] += chance * (paid + (0.0 if ends else float(v[t + 1, to])))
        v[t] = (p * q[t]).sum(-1)
    found_v, found_q = values(walk, table)
    reached = walk.node[walk.mask].unique()
    torch.testing.assert_close(found_v[reached], v[:-1].flatten()[reached], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found_q[reached], q.flatten(0, 1)[reached], rtol=1e-12, atol=1e-14)
    assert float(expected_return(walk, table)) == pytest.approx(float(v[0, 2]), abs=1e-13)


def test_noise_reaches_the_wanted_divergence() -> None:
    tree = token_tree()
    table = tabular(tree).log_table(tabular(tree).initial(0))
    for kl, behavior in zip((0.01, 0.3, 1.0), noisy(tree, table, (0.01, 0.3, 1.0)), strict=True):
        p, q = row_probability(tree, behavior), row_probability(tree, table)
        assert float((p * (p / q).log()).sum()) == pytest.approx(kl, rel=1e-5)


def test_lag_climbs_and_its_whole_length_is_the_wanted_divergence() -> None:
    walk = corridor()
    path = ascent(walk, shared(walk), steps=16, kl=0.5)
    assert bool((expected_return(walk, path.table).diff() > 0).all())
    assert divergence(walk, path.table[0], path.table[-1]) == pytest.approx(0.5, rel=2e-2)


@pytest.mark.parametrize("policy_name", POLICIES)
def test_row_moments_are_those_of_gradients_written_out_row_by_row(policy_name: str) -> None:
    walk = corridor()
    policy = POLICIES[policy_name](walk)
    theta = policy.initial(2)
    table = policy.log_table(theta)
    coefficient = torch.randn(walk.mask.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    coefficient = coefficient * walk.mask
    names = ("behavior", "proximal", "average", "reference", "proxy", "teacher")
    behavior = policy.log_table(policy.initial(5))
    scene = Scene(walk, policy, Drift("noise", 0.0, 0.0, dict.fromkeys(names, behavior) | {"current": table}, 2))
    rows = torch.einsum("bn,bnp->bp", coefficient, row_jacobian(walk, policy, theta))
    mean = scene.probability @ rows
    found = row_moments(scene, coefficient)
    torch.testing.assert_close(found.mean.flatten(), mean, rtol=1e-10, atol=1e-13)
    assert found.variance == pytest.approx(float(scene.probability @ (rows - mean).square().sum(-1)), rel=1e-10)


def test_scatter_leaves_masked_units_out() -> None:
    tree = token_tree(vocabulary=1, horizon=2)
    garbage = torch.where(tree.mask, 1.0, torch.nan).double()
    assert float(scatter(tree, garbage).sum()) == int(tree.mask.sum())


def test_binomial_probabilities() -> None:
    found = binomial(4, torch.tensor(0.3, dtype=torch.float64)).tolist()
    assert found == pytest.approx([math.comb(4, k) * 0.3**k * 0.7 ** (4 - k) for k in range(5)])


@pytest.mark.parametrize("name", ["ppo", "grpo", "dapo", "reinforce", "asymre", "red_weight", "nft", "topr", "opsm"])
@pytest.mark.parametrize("policy_name", POLICIES)
def test_group_moments_are_those_of_every_group_written_out(name: str, policy_name: str) -> None:
    """All 7 ** 3 groups of a tree with 7 answers, 3 of them right, each through the library's own batch code."""
    tree, size = token_tree(vocabulary=2, horizon=2), 3
    right = torch.tensor([0, 1, 0, 1, 0, 0, 1], dtype=torch.float64)
    tree = replace(tree, reward=torch.stack([torch.zeros_like(right), right], -1))
    policy = POLICIES[policy_name](tree)
    theta = policy.initial(4)
    table = policy.log_table(theta)
    behavior = policy.log_table(theta + 0.7 * policy.initial(9))
    drift = Drift("noise", 0.0, 0.0, dict.fromkeys(("proximal", "average", "reference", "proxy", "teacher"), behavior)
                  | {"current": table, "behavior": behavior}, 2)  # fmt: skip
    plan = make_plan(name, "group", binary=True)
    assert plan.route == GROUP
    found = exact_moments(plan, Scene(tree, policy, drift), size)
    p, length = row_probability(tree, behavior), tree.mask.sum(-1).double()
    jacobian = row_jacobian(tree, policy, theta)
    by_policy, each = Scene(tree, policy, drift).log_probs(plan.correction), []
    groups = torch.tensor(list(itertools.product(range(len(p)), repeat=size)))
    for rows in groups:
        ids = torch.zeros(size, dtype=torch.int64)
        advantage = group_advantage(tree.returns[rows], ids, **plan.correction.advantage)
        wide = {key: value[rows] for key, value in by_policy.items()}
        batch = record(tree, rows, wide, advantage[:, None].expand(size, 2), ids)
        mean_length = float(p @ length)
        scale = torch.full((size,), 1 / size, dtype=torch.float64)
        if plan.correction.reduce == "sequence-mean-token-mean":
            scale = scale * mean_length / length[rows]
        c = coefficients(plan.correction, wide["current"], batch, scale)
        each.append(torch.einsum("bn,bnp->p", c, jacobian[rows]))
    gradients, weight = torch.stack(each), p[groups].prod(-1)
    mean = weight @ gradients
    assert float(mean.norm()) > 1e-3
    torch.testing.assert_close(found.mean.flatten(), mean, rtol=1e-9, atol=1e-12)
    variance = size * float(weight @ (gradients - mean).square().sum(-1))
    assert found.variance == pytest.approx(variance, rel=1e-9)


def test_the_row_scale_is_what_the_reduction_divides_by_up_to_a_constant() -> None:
    tree = token_tree(vocabulary=3, horizon=3)
    scene = scene_of(tree, tabular(tree))
    by_constant = [exact_moments(make_plan(n, "critic", binary=True), scene, 8).mean
                   for n in ("ppo", "dr_grpo", "rec_one_side")]  # fmt: skip
    torch.testing.assert_close(by_constant[0], by_constant[1])
    by_length = exact_moments(make_plan("grpo", "critic", binary=True), scene, 8).mean
    assert float((by_length - by_constant[0]).abs().max()) > 1e-4


@pytest.mark.parametrize("name", ["ppo", "vespo", "gmpo", "importance_sampling"])
def test_sampling_finds_what_enumeration_finds(name: str) -> None:
    """Within three standard errors of the mean, and a twentieth of the variance."""
    tree = token_tree(vocabulary=3, horizon=3)
    policy = shared(tree)
    scene = scene_of(tree, policy, 0.03)
    exact_plan = make_plan(name, "group", binary=True)
    assert exact_plan.route == GROUP
    exact = exact_moments(exact_plan, scene, 8)
    plan = Plan(name, exact_plan.correction, "group", SAMPLED_GROUP, "")
    found = sampled_moments(plan, scene, group=8, rows=64, batches=2000)
    standard_error = math.sqrt(exact.variance / (64 * 2000))
    assert float((found.mean - exact.mean).norm()) < 3 * standard_error
    assert found.variance == pytest.approx(exact.variance, rel=0.05)
    assert found.square == pytest.approx(exact.square, abs=6 * standard_error * math.sqrt(exact.square))


def test_batches_one_by_one_equal_all_at_once_where_rows_do_not_look_at_each_other() -> None:
    tree = token_tree(vocabulary=3, horizon=3)
    policy = shared(tree)
    scene = scene_of(tree, policy)
    plans = [Plan("ppo", load_correction("ppo"), "critic", route, "") for route in (SAMPLED_GROUP, SAMPLED_BATCH)]
    means = [sampled_moments(p, scene, group=8, rows=32, batches=5).mean for p in plans]
    torch.testing.assert_close(means[0], means[1])


def test_the_error_is_the_least_expected_squared_error_over_learning_rates() -> None:
    tree = token_tree(vocabulary=3, horizon=3)
    policy = shared(tree)
    scene = scene_of(tree, policy)
    moments = exact_moments(make_plan("ppo", "critic", binary=True), scene, 8)
    found, rows = measure(moments, scene.truth), 16
    rates = torch.linspace(0, 20, 200001, dtype=torch.float64)
    second = float(moments.mean.square().sum()) + moments.variance / rows
    expected = (
        rates.square() * second - 2 * rates * float((moments.mean * scene.truth).sum())
    ) / scene.truth.square().sum() + 1
    assert found.error(rows) == pytest.approx(float(expected.min()), abs=1e-7)
    assert found.error(1e12) == pytest.approx(found.free_bias2, abs=1e-9)
    opposite = measure(exact_moments(make_plan("ppo", "critic", binary=True), scene, 8), -scene.truth)
    assert opposite.cosine < 0 and opposite.error(rows) == 1.0


def test_routes_of_presets() -> None:
    routes = {name: make_plan(name, "group", binary=True).route for name in ("ppo", "p3o", "nat_uniform", "opo", "tba")}
    assert routes == {
        "ppo": GROUP, "p3o": SAMPLED_BATCH, "nat_uniform": SAMPLED_GROUP, "opo": SAMPLED_GROUP, "tba": SAMPLED_GROUP,
    }  # fmt: skip
    assert make_plan("ppo", "critic", binary=False).route == ROW
    assert make_plan("per_decision_is", "critic", binary=False).advantage == "reward"
    assert "0 or 1" in make_plan("nft", "critic", binary=False).reason
    assert make_plan("troll", "critic", binary=False).reason


def test_the_true_advantage_has_mean_zero_in_every_state() -> None:
    tree = token_tree()
    table = tabular(tree).log_table(tabular(tree).initial(0))
    v, q = values(tree, table)
    torch.testing.assert_close((table.exp() * q).sum(-1), v, rtol=1e-10, atol=1e-14)
    weighted = row_probability(tree, table)[:, None] * true_advantage(tree, table)
    assert float(scatter(tree, weighted).sum(-1).abs().max()) < 1e-12


def test_the_filtered_proxy_drops_what_is_improbable_and_the_teacher_does_better() -> None:
    table = torch.tensor([[0.5, 0.495, 0.005], [0.9, 0.05, 0.05]], dtype=torch.float64).log()
    expected = [[0.5 / 0.995, 0.495 / 0.995, 0.0], [0.9, 0.05, 0.05]]
    torch.testing.assert_close(filtered(table).exp(), torch.tensor(expected, dtype=torch.float64))
    for problem in (token_tree(), corridor()):
        start = tabular(problem).log_table(tabular(problem).initial(0))
        assert float(expected_return(problem, teacher(problem, start))) > float(expected_return(problem, start)) + 0.05


def test_proximal_policies_are_those_that_presets_ask_for() -> None:
    tree = token_tree(vocabulary=3, horizon=3)
    policy = tabular(tree)
    path = ascent(tree, policy, steps=8)
    scene = Scene(tree, policy, situations(tree, policy, path, noise=[], lags=[4])[1])
    middle = unit_log_prob(tree, path.table[-3])
    torch.testing.assert_close(scene.log_probs(load_correction("decoupled_ppo"))["proximal"], middle)
    current, behavior = unit_log_prob(tree, path.table[-1]), unit_log_prob(tree, path.table[-5])
    a3po = scene.log_probs(load_correction("a3po"))["proximal"]
    torch.testing.assert_close(a3po, behavior + 0.75 * (current - behavior))  # (lag - 1) / lag
    weight = 0.9 ** torch.arange(8, -1, -1, dtype=torch.float64)
    averaged = policy.log_table((weight[:, None, None] * path.theta).sum(0) / weight.sum())
    torch.testing.assert_close(scene.log_probs(load_correction("ppo_ewma"))["proximal"], unit_log_prob(tree, averaged))
    torch.testing.assert_close(scene.log_probs(load_correction("humanline"))["reference"], middle)
    torch.testing.assert_close(scene.log_probs(load_correction("tba"))["reference"], unit_log_prob(tree, path.table[0]))
