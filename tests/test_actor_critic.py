"""Prototype: value-based recipes as one composition."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_sac import BOUNDS, transitions

from unified_rl.agents.actor_critic import ActorCritic
from unified_rl.agents.sac import SAC
from unified_rl.errors import ConfigError
from unified_rl.objectives.offline_value import expectile, weighted
from unified_rl.objectives.transitions import Transitions
from unified_rl.policies.flow import FlowPolicy
from unified_rl.policies.gaussian import GaussianPolicy
from unified_rl.replay import Replay, Uniform


def policy_of() -> GaussianPolicy:
    return GaussianPolicy(**BOUNDS, squash=True, state_dependent_std=True, hidden=(16,))


def made(kind: Any = ActorCritic, policy: Any = None, **options: Any) -> Any:
    settings = {"critic_hidden": (16,), "learning_starts": 8, "batch_size": 16, **options}
    return kind(policy or policy_of(), torch.Generator().manual_seed(0), rows=4, length=1, **settings)


def filled() -> Replay:
    replay = Replay(64, sampler=Uniform())
    replay.extend(transitions())
    return replay


@pytest.mark.parametrize("options", [{}, {"critics": 3, "layer_norm": True, "policy_delay": 2}, {"tune_alpha": False}])
def test_the_default_parts_are_sac_bit_for_bit(options: dict[str, Any]) -> None:
    agents = [made(kind, **options) for kind in (SAC, ActorCritic)]
    for agent in agents:
        replay = filled()
        for _ in range(3):
            agent.update(replay)
    old, new = agents
    for a, b in ((old.policy, new.policy), (old.critic, new.nets.critic), (old.target, new.nets.target)):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert torch.equal(old.log_alpha, new.nets.log_alpha) and new.gradient_steps == 12


def batch_of(agent: ActorCritic) -> Transitions:
    from unified_rl.agents.sac import prepare_batch

    return Transitions(prepare_batch(transitions(), agent.device), agent.nets, torch.zeros(2, 32, 2), agent.generator)


def test_iql_s_expectile_of_one_half_is_the_squared_error_and_beta_0_is_imitation() -> None:
    agent = made(target="state_value", value="expectile", actor={"policy": "weighted"}, tune_alpha=False)
    t = batch_of(agent)
    d = t.stored_q.amin(0) - t.value
    torch.testing.assert_close(expectile(t, tau=0.5), 0.5 * d.square().mean())
    torch.testing.assert_close(weighted(t, beta=0.0), t.nll.mean())
    low, high = (float(expectile(t, tau=tau)) for tau in (0.1, 0.9))
    assert low != high


def test_iql_trains_a_flow_policy_by_its_own_likelihood_loss() -> None:
    policy = FlowPolicy(**BOUNDS, hidden=(8,), steps=3)
    agent = made(policy=policy, target="state_value", value="expectile", actor={"p": "weighted"}, tune_alpha=False)
    before = [p.detach().clone() for p in policy.parameters()]
    metrics = agent.update(filled())
    assert float(metrics["loss/value"]) > 0 and any(
        not torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True)
    )
    with pytest.raises(ConfigError, match="rsample"):
        made(policy=FlowPolicy(**BOUNDS, hidden=(8,), steps=3))


def test_a_state_survives_a_copy_bit_for_bit() -> None:
    options = {"target": "state_value", "value": "expectile", "actor": {"p": "weighted"}, "tune_alpha": False}
    agent, replay = made(**options), filled()
    agent.update(replay)
    state, rows = copy.deepcopy(agent.state_dict()), copy.deepcopy(replay)
    agent.update(replay)
    again = made(**options)
    again.load_state_dict(state)
    again.update(rows)
    assert all(torch.equal(a, b) for a, b in zip(agent.policy.parameters(), again.policy.parameters(), strict=True))
