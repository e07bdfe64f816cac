"""Trust regions on whole distributions: projection, fix-up, annealed KL, and how old distributions are kept."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from agent_cases import (
    BOUNDS,
    HORIZON,
    LANES,
    close,
    control_agent,
    filled,
    gaussian,
    gradients,
    language,
    language_agent,
    nudge,
    stream,
    transitions,
)
from torch import Tensor
from torch.distributions import Categorical, Normal, kl_divergence

from unified_rl.agents.policy_gradient import PolicyGradient
from unified_rl.correction import load_correction
from unified_rl.errors import ConfigError
from unified_rl.interventions.distribution import (
    OldCategorical,
    OldNormal,
    categorical_kl,
    normal_kl,
    parts_log_prob,
    support_of,
)
from unified_rl.interventions.projection import project
from unified_rl.interventions.schedule import AnnealPenalty
from unified_rl.policies.autoregressive import AutoregressivePolicy
from unified_rl.policies.flow import FlowPolicy


def pairs(rows: int = 6, width: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Log-probs of two categoricals a row, float64."""
    draws = 1.5 * torch.randn(2, rows, width, generator=stream(seed), dtype=torch.float64)
    return tuple(draws.log_softmax(-1))  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------- old distributions


def test_parts_are_a_partition_that_holds_the_sampled_token_first() -> None:
    logits = torch.randn(4, 9, generator=stream(), dtype=torch.float64)
    token = logits.argmin(-1)  # the least probable one is no member of any top 3
    support = support_of(logits, token, 3)
    assert torch.equal(support[:, 0], token)
    parts = parts_log_prob(logits, support)
    assert parts.shape == (4, 4)
    torch.testing.assert_close(parts.exp().sum(-1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(parts[:, 0], Categorical(logits=logits).log_prob(token))
    top = logits.softmax(-1).topk(2, -1).values
    torch.testing.assert_close(parts[:, 1:3].exp(), top)


def test_the_divergence_of_parts_is_exact_with_every_token_and_below_it_with_few() -> None:
    new, old = pairs(8, 12)
    token = torch.arange(8)
    exact = kl_divergence(Categorical(logits=new), Categorical(logits=old))
    for size in (12, 40, 3):
        support = support_of(old, token, size)
        kl = categorical_kl(parts_log_prob(new, support), parts_log_prob(old, support))
        if size == 3:
            assert bool((kl < exact).all()) and bool((kl > 0).all())
        else:
            torch.testing.assert_close(kl, exact)


def test_a_support_that_was_left_costs_a_finite_divergence_and_gradient() -> None:
    old = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]])
    new = torch.tensor([[0.0, 0.0, 0.0, -torch.inf]], requires_grad=True)
    support = support_of(old, torch.tensor([0]), 2)
    kl = categorical_kl(parts_log_prob(new, support), parts_log_prob(old, support))
    kl.sum().backward()
    assert 20.0 < float(kl) < 100.0
    assert new.grad is not None and bool(torch.isfinite(new.grad).all())


def test_the_divergence_of_normals_is_torchs() -> None:
    a, b, c, d = torch.randn(4, 7, generator=stream(), dtype=torch.float64)
    want = kl_divergence(Normal(a, b.exp()), Normal(c, d.exp()))
    torch.testing.assert_close(normal_kl(a, b, c, d), want)


@pytest.mark.parametrize("kind", ["gaussian", "per_dimension", "flow", "bins", "language"])
def test_a_policys_divergence_from_its_stored_self_matches_the_distributions(kind: str) -> None:
    """0 at once; after a move, the mean log-ratio under fresh noise agrees with it where it can be drawn."""
    if kind == "language":
        policy, record = language()
        old: Any = OldCategorical(policy, 64)
    else:
        policy = {
            "gaussian": lambda: gaussian(),
            "per_dimension": lambda: gaussian(per_dimension=True),
            "flow": lambda: FlowPolicy(**BOUNDS, hidden=(8,), steps=3),
            "bins": lambda: AutoregressivePolicy(**BOUNDS, hidden=(8,), bins=5),
        }[kind]()
        agent = PolicyGradient(policy, load_correction("gspo"), stream(), rows=LANES, length=HORIZON)
        record = agent._draw(filled(transitions(policy), LANES))
        old = OldCategorical(policy, 64) if kind == "bins" else OldNormal(policy)
    with torch.no_grad():
        record.update(old.store(record))
        log_prob, kl = old.divergence(record)
        torch.testing.assert_close(log_prob, policy.log_prob(record).log_prob, atol=1e-5, rtol=1e-5)
        assert float(kl.abs().max()) < 1e-5
        before = copy.deepcopy(policy)
        nudge(policy, 0.1)
        kl = old.divergence(record)[1]
    assert kl.shape == record["mask"].shape
    torch.testing.assert_close(
        kl[record["mask"]], exact_kl(policy, before, record)[record["mask"]], atol=1e-5, rtol=1e-4
    )


@torch.no_grad()
def exact_kl(policy: Any, before: Any, record: Any) -> Tensor:
    """KL(policy || before) of every unit by torch.distributions."""
    if hasattr(policy, "normals"):
        new, old = (Normal(m, s.exp()) for m, s in (p.normals(record) for p in (policy, before)))
        return kl_divergence(new, old).sum(-1)
    if isinstance(policy, AutoregressivePolicy):
        flat = policy._flatten(record)
        new, old = (Categorical(logits=p._logits(flat[0], flat[1]["action_bins"])) for p in (policy, before))
        return kl_divergence(new, old).reshape(record["mask"].shape)
    logits = [p.model(input_ids=record["tokens"]).logits[:, :-1] for p in (policy, before)]
    kl = kl_divergence(Categorical(logits=logits[0]), Categorical(logits=logits[1]))
    return torch.nn.functional.pad(kl, (1, 0))


def test_chunks_of_logits_give_the_numbers_and_gradients_of_the_whole() -> None:
    found = []
    for chunk in (0, 7):
        policy, rows = language()
        rows.update({key: x.detach() for key, x in OldCategorical(policy, 6).store(rows).items()})
        policy.logit_chunk = chunk
        nudge(policy, 0.1)
        log_prob, kl = OldCategorical(policy, 6).divergence(rows)
        (kl.sum() + log_prob.square().sum()).backward()
        found.append([log_prob, kl, *(p.grad for p in policy.parameters())])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------- TROLL


def test_inside_the_ball_the_projection_is_the_identity_and_outside_it_lies_on_the_sphere() -> None:
    new, old = pairs(40)
    kl = categorical_kl(new, old)
    bound = float(kl.median())
    projected, eta = project(new, old, bound)
    inside = kl <= bound
    assert torch.equal(projected[inside], new[inside]) and bool((eta[inside] == 0).all())
    outside = categorical_kl(projected, old)[~inside]
    torch.testing.assert_close(outside, torch.full_like(outside, bound), atol=1e-10, rtol=0.0)
    assert bool((eta[~inside] > 0).all())
    torch.testing.assert_close(projected.exp().sum(-1), torch.ones(40, dtype=torch.float64))


def test_in_single_precision_the_bound_holds_to_1e_6() -> None:
    new, old = (x.float() for x in pairs(200, 64))
    projected, _ = project(new, old, 0.05)
    kl = categorical_kl(projected, old)
    outside = categorical_kl(new, old) > 0.05
    assert bool(outside.any())
    torch.testing.assert_close(kl[outside], torch.full_like(kl[outside], 0.05), atol=1e-6, rtol=0.0)


def test_of_two_outcomes_the_projection_is_the_root_of_the_binary_divergence() -> None:
    """On two outcomes the sphere is one probability, found here by plain bisection."""
    q, p, bound = 0.3, 0.9, 0.1
    low, high = q, 1.0 - 1e-12
    for _ in range(200):
        middle = (low + high) / 2
        kl = middle * math.log(middle / q) + (1 - middle) * math.log((1 - middle) / (1 - q))
        low, high = (middle, high) if kl <= bound else (low, middle)
    log_p = torch.tensor([[p, 1 - p]], dtype=torch.float64).log()
    log_q = torch.tensor([[q, 1 - q]], dtype=torch.float64).log()
    assert float(project(log_p, log_q, bound)[0][0, 0].exp()) == pytest.approx(low, abs=1e-9)


def test_nothing_on_the_ball_is_nearer_to_the_network() -> None:
    new, old = pairs(1, 4)
    bound = 0.2 * float(categorical_kl(new, old))
    projected, _ = project(new, old, bound)
    best = float(categorical_kl(projected, new))
    others = (projected + 0.02 * torch.randn(20_000, 4, generator=stream(1), dtype=torch.float64)).log_softmax(-1)
    allowed = categorical_kl(others, old.expand_as(others)) <= bound
    assert int(allowed.sum()) > 1000
    assert float(categorical_kl(others, new.expand_as(others))[allowed].min()) > best


def test_a_vanishing_ball_leaves_the_old_policy() -> None:
    new, old = pairs(20)
    projected, _ = project(new, old, 1e-12)
    torch.testing.assert_close(projected, old, atol=1e-5, rtol=0.0)


def test_the_gradient_is_that_of_finite_differences() -> None:
    new, old = pairs(6)
    bound = 0.4 * float(categorical_kl(new, old).median())
    assert int((categorical_kl(new, old) > bound).sum()) > 0
    logits = new.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: project(x.log_softmax(-1), old, bound)[0], logits, eps=1e-6, atol=1e-6)


def test_a_wide_ball_trains_as_the_loss_alone_and_a_tiny_one_holds_ratios_at_one() -> None:
    policy, rows = language()
    rows["policy_version"] -= 1
    nudge(policy, 0.05)

    def agent_of(**overrides: Any) -> PolicyGradient:
        made = load_correction("troll", **overrides)
        agent = PolicyGradient(copy.deepcopy(policy), made, stream(), rows=len(rows), max_grad_norm=None, lr=1e-2)
        agent.checked = True
        return agent

    wide = gradients(agent_of(**{"wrapper.bound": 1e6}), filled(rows, 1))
    close(wide, gradients(agent_of(wrapper=None), filled(rows, 1)), atol=1e-5)
    agent = agent_of(**{"wrapper.bound": 1e-6})
    agent.batches.epochs = 3
    seen: list[Tensor] = []
    loss = agent.correction.loss

    def spy(log_prob: Tensor, part: Any, stats: Any) -> Any:
        seen.append(torch.where(part["mask"], log_prob - part["old_parts_log_prob"][..., 0], 0.0).abs().max().detach())
        return loss(log_prob, part, stats)

    agent.correction.loss = spy  # type: ignore[method-assign]
    metrics = agent.update(filled(rows, 1))
    with torch.no_grad():
        moved = (agent.policy.log_prob(rows).log_prob - policy.log_prob(rows).log_prob).abs().max()
    assert max(map(float, seen)) < 0.02 and float(moved) > 0.2
    assert float(metrics["loss/wrapper"]) > 1e-3  # the network moved and is pulled back


def test_a_density_cannot_be_projected() -> None:
    with pytest.raises(ConfigError, match=r"projects a categorical(.|\n)*fixpo"):
        control_agent(gaussian(), "troll")
    policy = AutoregressivePolicy(**BOUNDS, hidden=(8,), bins=5)
    metrics = control_agent(policy, "troll", epochs=3, lr=1e-2).update(filled(transitions(policy), LANES))
    assert math.isfinite(float(metrics["loss/wrapper"]))


# ------------------------------------------------------------------------------------------- FixPO


def fixpo(policy: Any, rows: int, **options: Any) -> PolicyGradient:
    wrapper = {f"wrapper.{key}": options.pop(key) for key in list(options) if key in ("bound", "max_steps", "initial")}
    settings = {"max_grad_norm": None, **options}
    return PolicyGradient(policy, load_correction("fixpo", **wrapper), stream(), rows=rows, **settings)


@pytest.mark.parametrize("max_steps", [200, 0])
def test_after_an_update_no_state_is_further_than_the_bound(max_steps: int) -> None:
    policy = gaussian()
    before, rows = copy.deepcopy(policy), transitions(policy)
    agent = fixpo(policy, LANES, length=HORIZON, lr=3e-2, epochs=10, bound=0.01, initial=0.0, max_steps=max_steps)
    metrics = agent.update(filled(rows, LANES))
    kl = exact_kl(policy, before, rows)
    assert float(kl.max()) <= 0.01 * (1 + 1e-4)
    assert float(metrics["wrapper/kl_max"]) == pytest.approx(float(kl.max()), rel=1e-3)
    assert not torch.equal(next(policy.parameters()), next(before.parameters()))
    if max_steps:
        assert 1 <= metrics["wrapper/fix_up_steps"] <= max_steps
    else:
        assert metrics["wrapper/fix_up_steps"] == 0 and metrics["wrapper/pulled_back"] >= 1


def test_the_bound_holds_for_every_context_of_a_language_model() -> None:
    policy, rows = language()
    before = copy.deepcopy(policy)
    agent = fixpo(policy, len(rows), lr=1e-2, epochs=4, minibatch=4, bound=0.02, initial=0.0)
    metrics = agent.update(filled(rows, 1))
    kl = exact_kl(policy, before, rows)[rows["mask"]]
    assert float(kl.max()) <= 0.02 * (1 + 1e-3)
    assert metrics["wrapper/fix_up_steps"] + metrics["wrapper/pulled_back"] >= 1


def test_inside_the_bound_nothing_is_fixed_up_and_the_penalty_shrinks() -> None:
    policy = gaussian()
    agent = fixpo(policy, LANES, length=HORIZON, lr=1e-5, bound=0.2)
    metrics = agent.update(filled(transitions(policy), LANES))
    assert metrics["wrapper/fix_up_steps"] == 0 and metrics["wrapper/pulled_back"] == 0
    assert agent.wrapper.beta == pytest.approx(1.0 - 0.01 * 0.2, abs=1e-5)  # KL was 0 when the gradient was taken
    agent.wrapper.beta = 1e-4
    agent.update(filled(transitions(policy), LANES))
    assert agent.wrapper.beta == 0.0  # never below


def test_a_policy_without_a_known_distribution_is_refused() -> None:
    class Bare:
        domain = "control"

        def log_prob(self, batch: Any) -> None: ...

    from unified_rl.interventions import make_wrapper

    with pytest.raises(ConfigError, match=r"neither read_logits nor normals; use correction=ppo"):
        make_wrapper(Bare(), load_correction("fixpo"))


# ------------------------------------------------------------------------------------------- MDPO


def test_the_first_inner_step_of_mdpo_is_that_of_reinforce() -> None:
    found = []
    for correction in ("mdpo", "reinforce"):
        policy = gaussian()
        found.append(gradients(control_agent(policy, correction), filled(transitions(policy), LANES)))
    close(*found)


def test_the_kl_is_the_full_one_over_the_annealed_step_size() -> None:
    policy, rows = language()
    agent = language_agent(policy, rows, "mdpo")
    wrapper = agent.wrapper
    assert isinstance(wrapper, AnnealPenalty) and wrapper.full
    before = copy.deepcopy(policy)
    with torch.no_grad():
        rows.update(wrapper.annotate(rows))
        nudge(policy, 0.05)
        for progress, factor in ((0.0, 1.0), (0.75, 4.0), (1.0, 100.0)):
            wrapper.start(progress)
            penalty = wrapper.score(rows, lambda part: part["behavior_log_prob"])[1]
            assert penalty is not None
            want = factor * exact_kl(policy, before, rows)[rows["mask"]]
            torch.testing.assert_close(penalty[rows["mask"]], want, atol=1e-4, rtol=1e-3)


def test_without_a_distribution_the_sample_estimate_is_annealed_instead() -> None:
    class Bare:
        domain = "control"

        def log_prob(self, batch: Any) -> None: ...

    correction = load_correction("mdpo")
    wrapper = AnnealPenalty(Bare(), correction)
    assert not wrapper.full
    log_ratio = torch.full((1, 1), 0.3, dtype=torch.float64)
    from tensordict import TensorDict

    batch = TensorDict(
        {
            "behavior_log_prob": torch.full((1, 1), -1.0, dtype=torch.float64),
            "mask": torch.ones(1, 1, dtype=torch.bool),
            "step_index": torch.zeros(1, 1, dtype=torch.int64),
            "reward": torch.zeros(1, 1),
            "advantage": torch.zeros(1, 1),
        },
        [1],
    )
    for progress, factor in ((0.0, 1.0), (0.75, 4.0)):
        wrapper.start(progress)
        out = correction(log_ratio - 1.0, batch)
        assert float(out.metrics["loss/penalty"]) == pytest.approx(factor * 0.3 * math.exp(0.3))
