"""One setting for the KL to the reference: the same as the penalty by hand, or taken from the rewards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from agent_cases import TINY, close, filled, gradients, language, nudge, stream
from run_cases import LANGUAGE, composed, merged, run
from tensordict import TensorDict

import unified_rl as ur
from unified_rl.agents.baselines import TokenBaseline
from unified_rl.agents.policy_gradient import PolicyGradient
from unified_rl.correction import load_correction
from unified_rl.errors import ConfigError
from unified_rl.training.run import Job


@pytest.fixture(scope="module")
def moved() -> tuple[Any, Any, TensorDict]:
    """The reference, the policy that has moved from it, and rows that the policy sampled."""
    policy, rows = language()
    reference = copy.deepcopy(policy)
    nudge(reference, 0.05)
    return policy, reference, rows


def agent_of(moved: Any, correction: Any = "grpo", **options: Any) -> PolicyGradient:
    policy, reference, rows = moved
    made = load_correction(correction) if isinstance(correction, str) else correction
    agent = PolicyGradient(copy.deepcopy(policy), made, stream(), rows=len(rows), max_grad_norm=None, **options)
    agent.anchors.providers["reference"].policy.load_state_dict(reference.state_dict())
    return agent


def plain(moved: Any) -> PolicyGradient:
    """The agent without a reference."""
    return PolicyGradient(
        copy.deepcopy(moved[0]), load_correction("grpo"), stream(), rows=len(moved[2]), max_grad_norm=None
    )


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("micro_batch", [None, 5])
def test_it_is_the_penalty_that_one_would_set_by_hand(moved: Any, estimator: str, micro_batch: int | None) -> None:
    by_hand = load_correction("grpo", penalty=[{"name": estimator, "anchor": "reference", "coefficient": 0.7}])
    want = gradients(agent_of(moved, by_hand, micro_batch=micro_batch), filled(moved[2], 1))
    given = {"kl": 0.7, "kl_estimator": estimator, "micro_batch": micro_batch}
    got = gradients(agent_of(moved, **given), filled(moved[2], 1))
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    plain = PolicyGradient(
        copy.deepcopy(moved[0]), load_correction("grpo"), stream(), rows=len(moved[2]), max_grad_norm=None
    )
    without = gradients(plain, filled(moved[2], 1))
    assert any(not torch.allclose(got[name], without[name], atol=1e-4) for name in got)


def test_k3_in_the_loss_is_the_default() -> None:
    policy, rows = language()
    agent = PolicyGradient(policy, load_correction("grpo"), stream(), rows=len(rows), kl=0.1)
    (penalty,) = agent.correction.penalties
    assert penalty.value.func.__name__ == "k3" and penalty.coefficient == 0.1 and penalty.anchor == "reference"
    assert not load_correction("grpo").penalties  # the caller's correction stays as it is


def log_ratio(rows: TensorDict, reference: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.where(rows["mask"], rows["behavior_log_prob"] - reference.log_prob(rows).log_prob, 0.0)


def test_in_the_reward_it_changes_what_groups_compare(moved: Any) -> None:
    rows = moved[2]
    agent = agent_of(moved, kl=0.3, kl_in="reward")
    changed = rows.clone()
    changed["reward"] = rows["reward"] - 0.3 * log_ratio(rows, moved[1]).sum(-1, keepdim=True)
    want = gradients(plain(moved), filled(changed, 1))
    got = gradients(agent, filled(rows, 1))
    close(got, want)
    assert not agent.correction.penalties


def test_a_critic_of_tokens_sees_it_token_by_token(moved: Any) -> None:
    policy, reference, rows = moved
    agent = agent_of(moved, "ppo", kl=0.3, kl_in="reward", kl_estimator="k2", advantage="critic")
    metrics: dict[str, Any] = {}
    record = agent.estimate(rows.clone(), 0, metrics)
    kl = 0.5 * log_ratio(rows, reference).square()
    scan = agent.baseline.scan_inputs(record)
    plain = TokenBaseline(policy, None, 0).scan_inputs(rows)
    torch.testing.assert_close(scan["reward"], plain["reward"] - 0.3 * kl)
    assert torch.equal(record["reward"], rows["reward"])
    assert float(metrics["kl/reference"]) == pytest.approx(float(kl.sum() / rows["mask"].sum()), rel=1e-4)
    stepwise = agent_of(moved, "ppo", kl=0.3, kl_in="reward", advantage="critic", credit="step")
    record = stepwise.estimate(rows.clone(), 0, {})
    torch.testing.assert_close(
        record["reward"], rows["reward"] - 0.3 * log_ratio(rows, reference).sum(-1, keepdim=True)
    )


def test_rows_of_others_have_no_kl_in_their_reward(moved: Any) -> None:
    rows = moved[2].clone()
    rows["source"][:4] = int(ur.Source.DEMONSTRATION)
    agent = agent_of(moved, "reinforce", kl=0.3, kl_in="reward")
    record = rows.clone()
    agent.anchors.annotate(record, 0)
    agent.estimate.reference_kl(record, {}, False)
    assert torch.equal(record["reward"][:4], rows["reward"][:4])
    assert not torch.equal(record["reward"][4:], rows["reward"][4:])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"kl_in": "reward"},
            r"agent\.kl_in=reward is about the KL to the reference, whose weight is 0: set agent\.kl",
        ),
        ({"kl_estimator": "k1"}, r"agent\.kl_estimator=k1 is about .* set agent\.kl"),
        ({"kl": 0.1, "correction": "mdpo"}, r"agent\.kl=0\.1 .* (set agent\.kl_in=reward|set agent\.kl=0)"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, Any], message: str) -> None:
    policy, rows = language()
    correction = load_correction(settings.pop("correction", "grpo"))
    with pytest.raises(ConfigError, match=message):
        PolicyGradient(policy, correction, stream(), rows=len(rows), **settings)


def test_a_penalty_on_the_reference_by_hand_and_the_setting_are_one_too_many() -> None:
    overrides = [*LANGUAGE, "correction=grpo", "correction.penalty=[{name: k3}]", "agent.kl=0.1"]
    with pytest.raises(
        ConfigError, match=r"agent\.kl=0\.1 and a penalty of correction grpo are both about the reference"
    ):
        run(overrides)


# ---------------------------------------------------------------------------------------------- entropy


def test_the_entropy_bonus_of_a_language_model_is_its_entropy_s_gradient_in_chunks_too() -> None:
    policy, rows = language()
    policy.sampling = ur.CausalLM(policy.tokenizer, policy.max_length, config=TINY, temperature=0.7, top_p=0.9).sampling
    rows["behavior_log_prob"] = policy.log_prob(rows).log_prob.detach()
    rows["reward"][:] = 0.0  # nothing else has a gradient
    found = []
    for chunk in (0, 3):
        other = copy.deepcopy(policy)
        other.logit_chunk = chunk
        agent = PolicyGradient(
            other,
            load_correction("grpo"),
            stream(),
            rows=len(rows),
            max_grad_norm=None,
            entropy_coef=0.5,
            micro_batch=5,
        )
        found.append(gradients(agent, filled(rows, 1)))
    _, entropy = policy.log_prob_and_entropy(rows)
    (-0.5 * entropy.sum() / rows["mask"].sum()).backward()
    want = {f"policy.{name}": p.grad for name, p in policy.named_parameters() if p.grad is not None}
    close(found[0], want)
    close(found[1], want)


# ---------------------------------------------------------------------------------------------- PPO of tokens


def test_ppo_is_one_line_in_both_domains() -> None:
    job = Job(composed(["agent=ppo", *LANGUAGE, "steps=32"]), ("run_cases",))
    agent = job.make_trainer(None).agent
    assert isinstance(agent.baseline, TokenBaseline) and agent.estimate.groups.settings[0] == 1.0
    assert job.cfg["choices"]["rollout"] == "language" and job.cfg["choices"]["correction"] == "ppo"
    control = composed(["agent=ppo", "env=two_route"])
    assert control["rollout"]["horizon"] == 128 and control["choices"]["rollout"] == "control"
    assert (control["agent"]["epochs"], control["agent"]["minibatch"], control["agent"]["adam_eps"]) == (10, 256, 1e-5)
    assert (control["agent"]["max_grad_norm"], control["agent"]["lam"]) == (0.5, 0.95)
    own = composed(["agent=ppo", "env=chain_mod", "agent.epochs=4", "agent.advantage=group"])
    assert (own["agent"]["epochs"], own["agent"]["advantage"]) == (4, "group")


def test_ppo_of_tokens_learns_what_its_null_control_does_not() -> None:
    """The control learns from the rewards of other answers; 25 updates of 64 answers each."""
    right = {}
    for shuffled in (False, True):
        change = ("agent=ppo", "rollout.prompts=32", "rollout.group_size=2", "agent.lr=3e-3", "steps=1600")
        overrides = merged(LANGUAGE, change, (f"env.shuffle_rewards={shuffled}", "seed=1"))
        trainer = Job(composed(overrides), ("run_cases",)).make_trainer(None)  # type: ignore[arg-type]
        shares = []
        for _ in range(trainer.planned):
            trainer.update()
            shares.append(trainer.means.pop()["rollout/correct"])
        right[shuffled] = sum(shares[:4]) / 4, sum(shares[-4:]) / 4
    assert right[False][1] > right[False][0] + 0.2 and right[False][1] > right[True][1] + 0.2, right
