"""Supervised losses beside plain likelihood, and entropy at chosen units: against what is written out."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from agent_cases import close, control_agent, filled, gaussian, gradients, nudge
from term_cases import agent_of, both_splits, dense, joined, want
from torch import Tensor

from unified_rl.agents.loss import make_terms
from unified_rl.agents.policy_gradient import PolicyGradient
from unified_rl.errors import ConfigError
from unified_rl.objectives.supervised import highest
from unified_rl.objectives.terms import NLL_WEIGHTS
from unified_rl.rollout.sources import Demonstrations


def setting() -> tuple[Any, Any, Any, Tensor, Tensor, Tensor, Tensor]:
    """A policy, its reference, rows, log-probs of all tokens of both, of what was said, where demonstrations are."""
    policy, rows = joined(shown=Demonstrations(rows=6))
    reference = copy.deepcopy(policy).requires_grad_(False)
    nudge(policy, 0.1)
    s, lp = dense(policy, rows)
    with torch.no_grad():
        t, _ = dense(reference, rows)
    mask = rows["mask"] & (rows["source"] == 2).unsqueeze(-1)
    assert int(mask.any(-1).sum()) == 6 < len(rows)
    return policy, reference, rows, s, t, lp, mask


def got(policy: Any, reference: Any, rows: Any, node: dict[str, Any]) -> Any:
    def with_reference(agent: PolicyGradient) -> None:
        if "reference" in agent.anchors:
            agent.anchors["reference"].policy.load_state_dict(reference.state_dict())
        agent.checked = True

    return both_splits(policy, rows, "reinforce", with_reference, objectives={"policy": None, "imitate": node})


def top(x: Tensor, mask: Tensor, portion: float) -> Tensor:
    """The largest of every row, one by one."""
    out = torch.zeros_like(mask)
    for row in range(len(x)):
        at = mask[row].nonzero().flatten()
        best = x[row, at].argsort(descending=True)[: math.floor(portion * len(at) + 1e-6)]
        out[row, at[best]] = True
    return out


@pytest.mark.parametrize("by", ["union", "intersection", "entropy", "kl"])
def test_masked_tokens_are_regularised_and_the_others_imitated(by: str) -> None:
    policy, reference, rows, s, t, lp, mask = setting()
    node = {"name": "selective_nll", "portion": 0.4, "by": by, "entropy_coef": 0.3, "kl_coef": 0.2}
    found = got(policy, reference, rows, node)
    entropy = -(s.exp() * s).sum(-1) / math.log(s.shape[-1])
    kl = (s.exp() * (s - t)).sum(-1)
    high = top(entropy.detach(), mask, 0.4), top(kl.detach(), mask, 0.4)
    left_out = {"union": high[0] | high[1], "intersection": high[0] & high[1], "entropy": high[0], "kl": high[1]}[by]
    assert 0 < int(left_out.sum()) < int(mask.sum())
    loss = torch.where(left_out, 0.2 * kl - 0.3 * entropy, -lp)
    close(found, want(agent_of(policy, rows), (loss * mask).sum() / mask.sum()))


def test_logits_are_action_values_with_a_temporal_difference() -> None:
    policy, reference, rows, _, _, lp, mask = setting()
    found = got(policy, reference, rows, {"name": "soft_q", "td_coef": 0.03, "gamma": 0.9})
    logits = policy.model(input_ids=rows["tokens"]).logits.float()
    before = torch.cat([torch.zeros_like(logits[:, :1]), logits[:, :-1]], 1)  # that predict each token
    q = before.gather(-1, rows["tokens"].unsqueeze(-1)).squeeze(-1)
    v = before.logsumexp(-1)
    total = 0.0
    for row in mask.any(-1).nonzero().flatten().tolist():
        at = mask[row].nonzero().flatten().tolist()
        for here, following in zip(at, [*at[1:], None], strict=True):
            value = 0.0 if following is None else v[row, following]
            total = total + 0.03 * (q[row, here] - 0.9 * value).square() - lp[row, here]
    close(found, want(agent_of(policy, rows), total / mask.sum()), atol=3e-6)


def test_a_suffix_weighs_what_follows_by_its_ratio_to_who_wrote_it() -> None:
    policy, reference, rows, _, _, lp, mask = setting()
    stream = torch.Generator().manual_seed(1)
    rows["behavior_log_prob"] = (lp.detach() + torch.randn(lp.shape, generator=stream)).clamp(max=0) * rows["mask"]
    rows["source"] = torch.where(rows["source"] == 2, 3, rows["source"])  # an expert that told its log-probs
    node = {"name": "nll", "rows": "expert", "weight": {"name": "suffix_ratio", "gamma": 0.8, "cap": 1.5}}
    found = got(policy, reference, rows, node)
    weight = torch.zeros_like(lp)
    d = (lp.detach() - rows["behavior_log_prob"]) * mask
    for row in mask.any(-1).nonzero().flatten().tolist():
        at = mask[row].nonzero().flatten().tolist()
        for here in at:
            after = sum(0.8 ** (u - here) * float(d[row, u]) for u in at if u > here)
            weight[row, here] = min(math.exp(after), 1.5)
    assert 0.0 < float(weight[mask].min()) < 1.0 and float(weight.max()) == 1.5
    close(found, want(agent_of(policy, rows), (-lp * weight * mask).sum() / mask.sum()))


def test_one_token_rollouts_are_likelihood_weighted_by_probability_in_expectation() -> None:
    logits = torch.tensor([0.4, -1.0, 0.7], dtype=torch.float64, requires_grad=True)
    log_prob, beta, label = logits.log_softmax(0), -0.1, 1
    reward = torch.where(torch.arange(3) == label, 1.0, beta)
    sampled = -(log_prob.detach().exp() * reward * log_prob).sum()
    weight = NLL_WEIGHTS["probability"](log_prob.detach()[label], None)
    (one,) = torch.autograd.grad(sampled, logits, retain_graph=True)
    (other,) = torch.autograd.grad(-(1 - beta) * weight * log_prob[label], logits)
    torch.testing.assert_close(one, other)


def test_the_target_of_self_distillation_is_a_mixture() -> None:
    """Its cross-entropy and the sum of likelihood and forward KL differ by a constant."""
    logits = torch.tensor([0.4, -1.0, 0.7], dtype=torch.float64, requires_grad=True)
    log_prob, earlier = logits.log_softmax(0), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    target = 0.7 * torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64) + 0.3 * earlier
    (one,) = torch.autograd.grad(-(target * log_prob).sum(), logits, retain_graph=True)
    written = -0.7 * log_prob[1] + 0.3 * (earlier * (earlier.log() - log_prob)).sum()
    (other,) = torch.autograd.grad(written, logits)
    torch.testing.assert_close(one, other)


def test_the_largest_entries_of_every_row() -> None:
    x = torch.tensor([[5.0, 1.0, 3.0, 9.0], [2.0, 2.0, 1.0, 0.0]])
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    assert highest(x, mask, 0.5).tolist() == [[True, False, False, False], [True, True, False, False]]
    assert highest(x, mask, 0.0, least=1).tolist() == [[True, False, False, False], [True, False, False, False]]
    assert not bool(highest(x, mask, 0.0).any())


@pytest.mark.parametrize(("top_p", "peaks"), [(0.6, 0.3), (1.0, 1.0)])
def test_the_entropy_of_the_nucleus_is_held_at_the_peaks_of_each_row(top_p: float, peaks: float) -> None:
    policy, _, rows, s, _, _, _ = setting()
    node = {"name": "selective_entropy", "top_p": top_p, "peaks": peaks, "coefficient": 1.0}

    def with_level(agent: PolicyGradient) -> None:
        agent.objective.terms["hold"].level = 0.5
        agent.checked = True

    found = both_splits(policy, rows, "reinforce", with_level, objectives={"policy": None, "hold": node})
    order = s.detach().exp().sort(-1, descending=True)
    before = order.values.cumsum(-1) - order.values
    kept = torch.zeros_like(s, dtype=torch.bool).scatter(-1, order.indices, before < top_p)
    inside = s.masked_fill(~kept, -1e9).log_softmax(-1)
    nucleus = -(inside.exp() * inside).sum(-1)
    entropy = -(s.exp() * s).sum(-1).detach()
    peak = top(entropy, rows["mask"], peaks)
    for row in range(len(rows)):
        if not bool(peak[row].any()):
            at = rows["mask"][row].nonzero().flatten()
            peak[row, at[entropy[row, at].argmax()]] = True
    mean = (nucleus * peak).sum(-1) / peak.sum(-1)
    close(found, want(agent_of(policy, rows), (mean - 0.5).square().mean()))


def test_the_first_update_sets_the_level_and_a_continuation_keeps_it() -> None:
    policy, _, rows, *_ = setting()
    objectives = {"policy": None, "hold": {"name": "selective_entropy", "coefficient": 1.0}}

    def make(**options: Any) -> PolicyGradient:
        agent = agent_of(copy.deepcopy(policy), rows, "reinforce", objectives=objectives, lr=1e-2, **options)
        agent.checked = True
        return agent

    agent = make()
    metrics = agent.update(filled(rows, 1))
    level = agent.objective.terms["hold"].level
    assert float(metrics["loss/total"]) == 0.0 and level == pytest.approx(float(metrics["hold/entropy"]))
    split = make(micro_batch=5)
    split.update(filled(rows, 1))
    assert split.objective.terms["hold"].level == pytest.approx(level, abs=1e-5)
    nudge(agent.policy, 0.05)
    again = make()
    again.load_state_dict(copy.deepcopy(agent.state_dict()))
    one, other = (x.update(filled(rows, 1)) for x in (agent, again))
    assert float(one["loss/total"]) > 0.0 and float(one["loss/total"]) == float(other["loss/total"])
    assert again.objective.terms["hold"].level == level
    assert gradients(agent, filled(rows, 1)).keys() == gradients(again, filled(rows, 1)).keys()


@pytest.mark.parametrize("near", [0.2, -0.3])
def test_rewards_of_labels_rivals_and_others_are_a_policy_gradient_of_one_step(near: float) -> None:
    policy, reference, rows, s, _, _, mask = setting()
    found = got(policy, reference, rows, {"name": "rank_aware", "beta": -0.5, "top_k": 3, "near": near, "far": -0.3})
    p, label = s.detach().exp(), torch.nn.functional.one_hot(rows["tokens"], s.shape[-1]).bool()
    rivals = p.masked_fill(label, -1.0).topk(3, -1).indices
    reward = torch.full_like(p, -0.3).scatter(-1, rivals, near)
    reward = torch.where(label, p.sqrt() / p, reward)  # p^-beta / p
    loss = -(p * reward * s).sum(-1)
    close(found, want(agent_of(policy, rows), (loss * mask).sum() / mask.sum()))


def test_what_a_supervised_loss_cannot_have_is_refused_by_name() -> None:
    policy, _, rows, *_ = setting()
    shown = {"policy": None, "imitate": {"name": "nll", "weight": "suffix_ratio"}}
    agent = agent_of(policy, rows, "reinforce", objectives=shown)
    agent.checked = True
    with pytest.raises(ConfigError, match=r"imitate\.weight=suffix_ratio divides by .*imitate\.rows=offline"):
        agent.update(filled(rows, 1))
    for name in ("soft_q", "rank_aware", "selective_entropy", "selective_nll"):
        with pytest.raises(ConfigError, match=r"objectives\.d reads the logits of every unit, and GaussianPolicy has"):
            control_agent(gaussian(), objectives={"d": {"name": name}})
    for node, words in (
        ({"name": "selective_nll", "by": "both"}, r"d\.by"),
        ({"name": "rank_aware", "top_k": 0}, r"top_k=0"),
        ({"name": "selective_nll", "portion": 1.5}, r"portion=1\.5"),
        ({"name": "nll", "weight": {"name": "suffix_ratio", "gama": 1.0}}, "has no field 'gama'"),
        ({"name": "nll", "weight": "suffix"}, r"d\.weight 'suffix' is unknown"),
        ({"name": "selective_entropy", "top_p": 0.0}, r"top_p=0\.0"),
    ):
        with pytest.raises(ConfigError, match=words):
            make_terms({"policy": None, "d": node}, None, None, 0.0)
