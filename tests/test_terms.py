"""Terms of a loss: entropy, likelihood, maps and terms of the user's own, and what is refused by its full name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from agent_cases import BOUNDS, LANES, close, control_agent, filled, gaussian, gradients, nudge, stream, transitions
from tensordict import TensorDict
from term_cases import DISTILL, agent_of, both_splits, dense, joined, want

from unified_rl.agents.loss import TERMS
from unified_rl.correction import load_correction
from unified_rl.errors import ConfigError
from unified_rl.objectives import value_loss
from unified_rl.objectives.forward import Forward
from unified_rl.objectives.objective import Scored, Term
from unified_rl.policies.diffusion import DiffusionPolicy
from unified_rl.policies.flow import FlowPolicy
from unified_rl.policies.sampling import Sampling
from unified_rl.rollout.sources import Demonstrations


def test_maps_reach_the_gradient() -> None:
    policy, rows = joined()
    plain = gradients(agent_of(copy.deepcopy(policy), rows), filled(rows, 1))
    maps = [{"name": "sign", "positive": 0.5, "negative": 0.5}]
    half = gradients(agent_of(copy.deepcopy(policy), rows, maps=maps), filled(rows, 1))
    close(half, {name: 0.5 * g for name, g in plain.items()})


def test_a_language_model_has_an_entropy_bonus() -> None:
    """The sampling distribution's entropy a sampled token, in chunks of the vocabulary's logits."""
    policy, rows = joined()
    nudge(policy, 0.02)
    policy.sampling = Sampling(temperature=0.7)
    rows = rows.clone()
    with torch.no_grad():
        rows["behavior_log_prob"] = policy.log_prob(rows).log_prob
    plain = gradients(agent_of(copy.deepcopy(policy), rows), filled(rows, 1))
    logits = policy.model(input_ids=rows["tokens"]).logits.float()[:, :-1] / 0.7
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    mask = rows["mask"][:, 1:]
    agent = agent_of(policy, rows)
    bonus = want(agent, (entropy * mask).sum() / mask.sum())
    for chunk in (0, 4):
        policy.logit_chunk = chunk
        got = both_splits(policy, rows, entropy_coef=0.3)
        close(got, {name: plain[name] - 0.3 * bonus[name] for name in plain})


def test_entropy_of_a_language_model_is_logged_in_nats_a_token() -> None:
    policy, rows = joined()
    _, entropy = policy.log_prob_and_entropy(rows)
    expected = float((entropy * rows["mask"]).sum() / rows["mask"].sum())
    for micro_batch in (None, 5):
        agent = agent_of(copy.deepcopy(policy), rows, entropy_coef=0.01, micro_batch=micro_batch)
        assert float(agent.update(filled(rows, 1))["policy/entropy"]) == pytest.approx(expected, abs=1e-5)


def test_a_term_of_coefficient_0_costs_nothing() -> None:
    policy, rows = joined()
    objectives = {"imitate": {"name": "nll", "coefficient": 0.0}, "distill": {**DISTILL, "coefficient": 0.0}}
    agent = agent_of(copy.deepcopy(policy), rows, objectives=objectives)
    agent.anchors["reference"].policy.unit_states = None  # would raise if anything asked
    metrics = agent.update(filled(rows, 1))
    assert agent.objective.readers == [] and "loss/imitate" not in metrics
    plain = agent_of(policy, rows)
    plain.update(filled(rows, 1))
    for a, b in zip(agent.optimizer.parameters, plain.optimizer.parameters, strict=True):
        assert torch.equal(a, b)


def test_an_update_of_which_every_coefficient_is_0_is_skipped() -> None:
    policy, rows = joined()
    agent = agent_of(policy, rows, objectives={"policy": {"coefficient": {"name": "linear", "start": 0.0, "end": 1.0}}})
    agent.update(filled(rows, 1), progress=0.0)
    assert agent.version == 1 and agent.optimizer.steps == 0
    agent.update(filled(rows, 1), progress=0.5)
    assert agent.version == 2 and agent.optimizer.steps == 1


def test_likelihood_of_a_flow_policy_is_averaged_over_the_entries_of_a_step() -> None:
    policy = FlowPolicy(**BOUNDS, hidden=(8,), seed=3)
    rows = transitions(policy)
    objectives = {"policy": None, "value": None, "imitate": {"name": "nll", "rows": "own"}}
    agent = control_agent(copy.deepcopy(policy), objectives=objectives, shuffle_steps=False)
    metrics = agent.update(filled(rows, LANES))
    with torch.no_grad():
        many = torch.stack([policy.nll(rows, stream(i)).mean() for i in range(64)])
    assert abs(float(metrics["loss/imitate"]) - float(many.mean())) < 4 * float(many.std())


def test_an_expert_row_has_no_weight_on_the_divergence_from_the_sampler() -> None:
    """Its behavior log-prob stands at 0, which says nothing: target_kl must not see it."""
    policy, rows = joined(demonstrations=Demonstrations(per_group=1))
    correction = load_correction("luffy", advantage={"baseline": "mean", "scale": "none"})
    metrics = agent_of(policy, rows, correction).update(filled(rows, 1))
    assert float(metrics["update/kl"]) < 1e-6


class Magnitude(Term):
    """A user's own: half the mean square of the log-probs."""

    def __init__(self, name: str, *, scale: float = 1.0, coefficient: Any = 1.0) -> None:
        super().__init__(name, None, coefficient)
        self.scale = scale

    def prepare(self, batch: TensorDict, scored: Scored) -> TensorDict:
        count = batch["mask"].sum().expand(len(batch))
        return TensorDict({"count": count}, batch_size=[len(batch)])

    def loss(self, forward: Forward, rows: TensorDict, stats: Any) -> Any:
        value = 0.5 * self.scale * (forward.log_prob * rows["mask"]).square().sum() / stats["count"][0]
        return value, {f"loss/{self.name}": value.detach()}


def test_a_term_of_the_users_own_adds_up_over_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TERMS, "magnitude", Magnitude)
    policy, rows = joined()
    objectives = {"policy": None, "own": {"name": "magnitude", "scale": 2.0}}
    got = both_splits(policy, rows, objectives=objectives)
    agent = agent_of(policy, rows)
    _, lp = dense(policy, rows)
    close(got, want(agent, (lp * rows["mask"]).square().sum() / rows["mask"].sum()))


REFUSED = [
    ({"imitate": "nl"}, r"agent\.objectives\.imitate\.name 'nl' is unknown; did you mean 'nll'"),
    (
        {"imitate": {"name": "nll", "wieght": "none"}},
        r"objectives\.imitate 'nll' has no field 'wieght'; did you mean 'weight'",
    ),
    (
        {"imitate": {"name": "nll", "weight": "uncertian"}},
        r"agent\.objectives\.imitate\.weight 'uncertian' is unknown; did you mean 'uncertain'",
    ),
    (
        {"imitate": {"name": "nll", "reduce": "token-mena"}},
        r"agent\.objectives\.imitate\.reduce .*did you mean 'token-mean'",
    ),
    (
        {"imitate": {"name": "nll", "rows": "demonstratoin"}},
        r"agent\.objectives\.imitate\.rows\.source .*did you mean 'demonstration'",
    ),
    (
        {"imitate": {"name": "nll", "rows": {"sorce": "own"}}},
        r"agent\.objectives\.imitate\.rows has no field 'sorce'; did you mean 'source'",
    ),
    (
        {"imitate": {"name": "nll", "coefficient": "much"}},
        r"agent\.objectives\.imitate\.coefficient is 'much'; it must be a number",
    ),
    (
        {"imitate": {"name": "nll", "coefficient": float("nan")}},
        r"agent\.objectives\.imitate\.coefficient=nan must be finite",
    ),
    ({"imitate": {"weight": "none"}}, r"agent\.objectives\.imitate needs a name, one of policy_gradient"),
    ({"d": {"name": "divergence", "kind": "jds"}}, r"agent\.objectives\.d\.kind 'jds' is unknown; did you mean 'jsd'"),
    (
        {"d": {"name": "divergence", "kind": {"name": "jsd", "bta": 0.1}}},
        r"agent\.objectives\.d\.kind 'jsd' has no field 'bta'; did you mean 'beta'",
    ),
    (
        {"d": {"name": "divergence", "kind": {"name": "jsd", "beta": "half"}}},
        r"agent\.objectives\.d\.kind\.beta is 'half'; it must be a number",
    ),
    ({"d": {"name": "divergence", "top_k": "all"}}, r"agent\.objectives\.d\.top_k is 'all'; it must be a whole number"),
    ({"p": {"name": "preference", "link": "dpp"}}, r"agent\.objectives\.p\.link 'dpp' is unknown; did you mean 'dpo'"),
    ({"p": {"name": "preference", "pairs": "best_wrost"}}, r"agent\.objectives\.p\.pairs .*did you mean 'best_worst'"),
    (
        {"value": {"name": "value"}},
        r"agent\.objectives\.value trains a critic, and this agent has none: set agent\.advantage=critic",
    ),
    ({"policy": None}, r"agent\.objectives leaves no term"),
]


@pytest.mark.parametrize(("objectives", "words"), REFUSED)
def test_a_bad_term_is_refused_under_its_full_name(objectives: Any, words: str) -> None:
    policy, rows = joined()
    with pytest.raises(ConfigError, match=words):
        agent_of(policy, rows, objectives=objectives)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"gates": {"failed": "succes_at_most"}},
            r"agent\.gates\.failed 'succes_at_most' is unknown; did you mean 'success_at_most'",
        ),
        (
            {"gates": {"failed": {"name": "success_at_most", "cuont": 1}}},
            r"agent\.gates\.failed .*did you mean 'count'",
        ),
        ({"maps": ["sgin"]}, r"agent\.maps\[0\] 'sgin' is unknown; did you mean 'sign'"),
        ({"maps": ["sign", {"name": "sign", "positve": 1.0}]}, r"agent\.maps\[1\] .*did you mean 'positive'"),
        ({"epochs": 0}, r"agent\.epochs=0 must be at least 1"),
        ({"minibatch": 0}, r"agent\.minibatch=0 must be at least 1"),
        (
            {"target_kl": 0.1, "objectives": {"policy": None, "d": DISTILL}},
            r"agent\.target_kl looks at update/kl.*agent\.target_kl=null",
        ),
    ],
)
def test_bad_gates_maps_and_batches_are_refused_under_their_full_names(options: Any, words: str) -> None:
    policy, rows = joined()
    with pytest.raises(ConfigError, match=words):
        agent_of(policy, rows, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"objectives": {"policy": {"rows": {"unless": "faild"}}}, "gates": {"failed": "success_at_most"}},
            r"agent\.objectives\.policy\.rows chooses by 'faild', .*did you mean 'failed'",
        ),
        ({"gates": {"reward": "success_at_most"}}, r"agent\.gates\.reward would overwrite the record's own column"),
    ],
)
def test_columns_that_do_not_fit_are_refused_before_the_first_step(options: Any, words: str) -> None:
    policy, rows = joined()
    agent = agent_of(policy, rows, **options)
    with pytest.raises(ConfigError, match=words):
        agent.update(filled(rows, 1))
    assert agent.optimizer.steps == 0


def test_weights_of_probabilities_are_refused_for_densities() -> None:
    with pytest.raises(ConfigError, match=r"imitate\.weight=uncertain is a function of probabilities.*GaussianPolicy"):
        control_agent(gaussian(), objectives={"imitate": {"name": "nll", "weight": "uncertain"}})


def test_a_policy_without_an_entropy_is_told_what_works() -> None:
    with pytest.raises(
        ConfigError, match=r"agent\.entropy_coef needs .*DiffusionPolicy has none: set agent\.entropy_coef=0"
    ):
        control_agent(DiffusionPolicy(**BOUNDS), entropy_coef=0.1)


def test_a_pass_that_is_first_read_without_gradient_still_has_one() -> None:
    policy, rows = joined()
    forward = Forward(policy, rows, lambda part: (policy.log_prob(part).log_prob, None))
    with torch.no_grad():
        assert forward.log_prob.requires_grad
    with torch.no_grad():
        inside = Forward(policy, rows, lambda part: (policy.log_prob(part).log_prob, None))
    assert not inside.log_prob.requires_grad


def test_the_clipped_value_loss_takes_the_larger_error_and_is_half_the_square() -> None:
    value = torch.tensor([1.0, 1.0, 0.2, 5.0], requires_grad=True)
    old, target = torch.tensor([0.0, 0.0, 0.0, float("nan")]), torch.tensor([2.0, 0.0, 3.0, float("nan")])
    mask = torch.tensor([True, True, True, False])
    loss = value_loss(value, target, mask, old, 0.5)
    loss.backward()
    # clipped to 0.5: 1.5^2 > 1^2 counts and has no gradient; 1^2 > 0.5^2 counts as it is; within the bound both agree
    assert float(loss.detach()) == pytest.approx(0.5 * (1.5**2 + 1.0**2 + 2.8**2) / 3)
    assert value.grad is not None and value.grad.tolist() == pytest.approx([0.0, 1 / 3, -2.8 / 3, 0.0])
