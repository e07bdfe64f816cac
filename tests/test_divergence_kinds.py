"""Kinds, targets and parts of divergences: hand-made numbers, dense autograd, and what a cut-off sum does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from agent_cases import LANES, close, control_agent, filled, gaussian, gradients, nudge, transitions
from term_cases import DISTILL, agent_of, both_splits, dense, joined, want

from unified_rl.agents.loss import make_terms
from unified_rl.agents.policy_gradient import PolicyGradient
from unified_rl.correction.generators import GENERATORS
from unified_rl.errors import ConfigError
from unified_rl.objectives.kinds import KINDS, parts, reverse_kl, reverse_kl_detached, veto
from unified_rl.rollout.sources import Demonstrations

S, T = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.1, 0.6, 0.3]]).log()
GENERATED = sorted({*KINDS} & {*GENERATORS})


@pytest.mark.parametrize("name", GENERATED)
def test_a_kind_is_the_divergence_of_its_generator(name: str) -> None:
    written = (T.exp() * GENERATORS[name]().value(S - T)).sum(-1)
    torch.testing.assert_close(KINDS[name](S, T), written, atol=1e-6, rtol=1e-5)
    assert float(KINDS[name](S, S)) == pytest.approx(0.0, abs=1e-6)


def test_some_of_them_by_hand() -> None:
    assert float(KINDS["tv"](S, T)) == pytest.approx(0.4)
    assert float(KINDS["pearson_chi2"](S, T)) == pytest.approx(0.16 / 0.1 + 0.09 / 0.6 + 0.01 / 0.3, rel=1e-5)
    assert float(KINDS["neyman_chi2"](S, T)) == pytest.approx(0.16 / 0.5 + 0.09 / 0.3 + 0.01 / 0.2, rel=1e-5)
    assert float(KINDS["hellinger"](S, T)) == pytest.approx(1 - 0.05**0.5 - 0.18**0.5 - 0.06**0.5, rel=1e-5)
    product = T.exp() * S.exp().sqrt()
    torch.testing.assert_close(veto(S, T, beta=0.5).exp(), product / product.sum())
    torch.testing.assert_close(veto(S, T, beta=0.0), T)


def slope(loss: Any, logits: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    x = logits.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(x, other).sum(), x)
    return found


def test_a_cut_off_sum_pushes_mass_out_and_the_detached_form_does_not() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 9, generator=generator)
    other, token = torch.randn(4, 9, generator=generator), torch.zeros(4, dtype=torch.int64)

    def of(kind: Any, rest: Any, k: int = 3) -> Any:
        return lambda x, y: kind(*parts(x, y, token, k, "student", rest))

    assert float(slope(of(reverse_kl, "drop"), logits, logits).abs().max()) > 1e-2
    for kind, rest in ((reverse_kl_detached, "drop"), (reverse_kl, "together"), (reverse_kl, "renormalise")):
        assert float(slope(of(kind, rest), logits, logits).abs().max()) < 1e-6
        assert float(slope(of(kind, rest), logits, other).abs().max()) > 1e-2
    whole = slope(lambda x, y: reverse_kl(x.log_softmax(-1), y.log_softmax(-1)), logits, other)
    for rest in ("together", "drop", "renormalise"):
        torch.testing.assert_close(slope(of(reverse_kl_detached, rest, 9), logits, other), whole, atol=1e-6, rtol=1e-4)


def test_the_parts_are_of_whom_they_are_asked_for() -> None:
    logits, other = torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    token = torch.tensor([1])
    s, t = logits.log_softmax(-1), other.log_softmax(-1)
    kept = parts(logits, other, token, 2, "student", "drop")
    torch.testing.assert_close(kept[0], s[:, [1, 0]])
    torch.testing.assert_close(kept[1], t[:, [1, 0]])
    kept = parts(logits, other, token, 2, "teacher", "renormalise")
    torch.testing.assert_close(kept[1], other[:, [1, 3]].log_softmax(-1))
    kept = parts(logits, other, token, 2, "teacher", "together")
    torch.testing.assert_close(kept[0][:, -1], s[:, [0, 2]].logsumexp(-1))


CASES: dict[str, dict[str, Any]] = {
    "tv": {"kind": "tv"},
    "alpha": {"kind": {"name": "alpha", "alpha": 0.3}},
    "chi2": {"kind": "pearson_chi2", "coefficient": 0.1},
    "veto": {"kind": "forward_kl", "target": {"name": "veto", "beta": 0.5}},
    "capped": {"kind": "reverse_kl", "importance_cap": 0.9},
    "paced": {"kind": "reverse_kl", "pass_rate": {"alpha": 1.0, "beta": 2.0}},
}


@pytest.mark.parametrize("case", CASES)
def test_a_divergence_has_the_gradient_of_the_dense_one_for_every_split(case: str) -> None:
    policy, rows = joined()
    teacher = copy.deepcopy(policy).requires_grad_(False)
    nudge(policy, 0.1)

    def with_teacher(agent: PolicyGradient) -> None:
        agent.anchors["reference"].policy.load_state_dict(teacher.state_dict())
        agent.checked = True

    objectives = {"policy": None, "distill": {"name": "divergence", "anchor": "reference", **CASES[case]}}
    got = both_splits(policy, rows, "reinforce", with_teacher, objectives=objectives)
    s, lp = dense(policy, rows)
    with torch.no_grad():
        t, _ = dense(teacher, rows)
    a, ones = 0.3, torch.ones_like(rows["mask"], dtype=torch.float32)
    target = (t + 0.5 * s.detach()).log_softmax(-1)
    ratio = (lp.detach() - rows["behavior_log_prob"]).exp().clamp(max=0.9)
    p = torch.tensor([0.25] * 4 + [0.5] * 4 + [0.0] * 4).unsqueeze(-1)
    kl = (s.exp() * (s - t)).sum(-1)
    value, weight = {
        "tv": ((s.exp() - t.exp()).abs().sum(-1) / 2, ones),
        "alpha": ((1 - (s.exp() ** (1 - a) * t.exp() ** a).sum(-1)) / (a * (1 - a)), ones),
        "chi2": (((s.exp() - t.exp()).square() / t.exp()).sum(-1), 0.1 * ones),
        "veto": ((target.exp() * (target - s)).sum(-1), ones),
        "capped": (kl, ratio),
        "paced": (kl, p * (1 - p).square() * ones),
    }[case]
    loss = (value * weight * rows["mask"]).sum() / rows["mask"].sum()
    close(got, want(agent_of(policy, rows), loss))


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"support": "student"}, r"d\.support and rest are of the parts that .*d\.top_k keeps"),
        ({"target": "vto"}, r"d\.target 'vto' is unknown"),
        ({"pass_rate": {"gamma": 1.0}}, "pass_rate.* has no field 'gamma'"),
        ({"pass_rate": {"alpha": -1.0}}, "alpha=-1.0 must be at least 0"),
        ({"importance_cap": 0.0}, "importance_cap=0.0 must be above 0"),
        ({"kind": {"name": "alpha", "alpha": 1.0}}, "alpha"),
    ],
)
def test_settings_that_make_no_divergence_are_refused(node: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_terms({"policy": None, "d": {**DISTILL, **node}}, None, None, 0.0)


def test_rows_alone_in_their_groups_have_no_pass_rate() -> None:
    policy, rows = joined()
    rows["group"] = torch.arange(len(rows))
    agent = agent_of(policy, rows, "reinforce", objectives={"policy": None, "d": {**DISTILL, "pass_rate": {}}})
    with pytest.raises(ConfigError, match=r"d\.pass_rate is a share of a group's rows.*d\.pass_rate=null"):
        agent.update(filled(rows, 1))
    with pytest.raises(ConfigError, match="view and target null"):
        control_agent(gaussian(), objectives={"d": {**DISTILL, "target": "veto"}})


# ---------------------------------------------------------------------------------------------- sampled ratios


@pytest.mark.parametrize("drawn", ["anchor", "policy"])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "js", "alpha"])
def test_a_sampled_divergence_has_the_gradient_of_its_own_formula(name: str, drawn: str) -> None:
    policy, rows = joined()
    other = copy.deepcopy(policy)
    nudge(policy, 0.1)
    node = {"name": "sampled_divergence", "generator": name, "anchor": "reference", "drawn": drawn}

    def with_reference(agent: PolicyGradient) -> None:
        agent.anchors["reference"].policy.load_state_dict(other.state_dict())

    got = both_splits(policy, rows, "reinforce", with_reference, objectives={"policy": None, "near": node})
    _, lp = dense(policy, rows)
    with torch.no_grad():
        _, ref = dense(other, rows)
    x, generator = lp - ref, GENERATORS[name]()
    if drawn == "anchor":
        u = x.exp()
        value = {
            "forward_kl": u - x - 1,
            "reverse_kl": u * x - u + 1,
            "js": 0.5 * (u * x - (u + 1) * ((u + 1) / 2).log()),
            "alpha": (u.sqrt() - 0.5 * u - 0.5) / (0.5 * -0.5),
        }[name]
    else:
        value = (generator.slope(x.detach()) - generator.slope(torch.zeros(()))) * lp
    close(got, want(agent_of(policy, rows), (value * rows["mask"]).sum() / rows["mask"].sum()))


def test_both_ways_of_sampling_have_the_gradient_of_the_whole_divergence() -> None:
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    log_pi, log_p = logits.log_softmax(0), torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64).log()
    for name in ("forward_kl", "js", "alpha"):
        generator = GENERATORS[name]()
        (whole,) = torch.autograd.grad((log_p.exp() * generator.value(log_pi - log_p)).sum(), logits, retain_graph=True)
        x = (log_pi - log_p).detach()
        by_unit = generator.slope(x) - generator.slope(torch.zeros((), dtype=torch.float64))
        for drawn, weight in (("anchor", log_p.exp() * x.exp()), ("policy", log_pi.detach().exp())):
            (found,) = torch.autograd.grad((weight * by_unit * log_pi).sum(), logits, retain_graph=True)
            torch.testing.assert_close(found, whole, atol=1e-12, rtol=1e-9, msg=drawn)


def test_a_tilt_weighs_rows_by_what_they_earned_beside_their_group() -> None:
    policy, rows = joined()
    other = copy.deepcopy(policy)
    nudge(policy, 0.1)
    node = {"name": "sampled_divergence", "anchor": "reference", "drawn": "policy", "tilt": 0.5}

    def with_reference(agent: PolicyGradient) -> None:
        agent.anchors["reference"].policy.load_state_dict(other.state_dict())

    got = both_splits(policy, rows, "reinforce", with_reference, objectives={"policy": None, "near": node})
    _, lp = dense(policy, rows)
    with torch.no_grad():
        _, ref = dense(other, rows)
    raw = (rows["reward"].sum(-1) / 0.5).exp()
    weight = (raw / raw.view(3, 4).mean(-1).repeat_interleave(4)).unsqueeze(-1)
    value = weight * (1 - (ref - lp.detach()).exp()) * lp
    close(got, want(agent_of(policy, rows), (value * rows["mask"]).sum() / rows["mask"].sum()))


def test_actions_are_compared_by_their_densities() -> None:
    policy = gaussian()
    rows = transitions(policy)
    other = copy.deepcopy(policy)
    nudge(other)
    node = {"name": "sampled_divergence", "anchor": "reference", "drawn": "policy"}
    agent = control_agent(copy.deepcopy(policy), objectives={"policy": None, "value": None, "near": node})
    agent.anchors["reference"].policy.load_state_dict(other.state_dict())
    assert agent.shuffle_steps
    found = gradients(agent, filled(rows, LANES))
    assert max(float(g.abs().max()) for g in found.values()) > 1e-4


def test_rows_that_cannot_be_weighed_or_compared_are_refused_before_the_first_step() -> None:
    policy, rows = joined(shown=Demonstrations(rows=2))
    agent = agent_of(policy, rows, "reinforce", objectives={"policy": None, "d": {"name": "sampled_divergence"}})
    with pytest.raises(ConfigError, match=r"nobody knows that of demonstrations: set .*\.d\.rows=offline or own"):
        agent.update(filled(rows, 1))
    agent = agent_of(policy, rows, "reinforce", objectives={"policy": None, "d": {**DISTILL, "importance_cap": 2.0}})
    with pytest.raises(ConfigError, match=r"d\.importance_cap bounds the ratio .* set agent\.objectives\.d\.rows=own"):
        agent.update(filled(rows, 1))
    node = {"name": "sampled_divergence", "anchor": "reference", "drawn": "policy", "tilt": 1.0}
    rows["group"] = torch.arange(len(rows))
    agent = agent_of(policy, rows, "reinforce", objectives={"policy": None, "d": node})
    with pytest.raises(ConfigError, match=r"d\.tilt weighs a row beside the others.*d\.tilt=null"):
        agent.update(filled(rows, 1))
    assert agent.optimizer.steps == 0


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"anchor": "behavior", "drawn": "policy"}, "anchor=behavior is no other policy than the one that drew"),
        ({"anchor": "none"}, "anchor=none is no other policy"),
        ({"generator": "kl"}, "generator 'kl' is unknown"),
        ({"tilt": 0.0}, "tilt=0.0 must be above 0"),
    ],
)
def test_settings_that_make_no_sampled_divergence_are_refused(node: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_terms({"policy": None, "d": {"name": "sampled_divergence", **node}}, None, None, 0.0)
