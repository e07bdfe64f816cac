"""Which class keeps which contract, and what cannot be guessed is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agent_cases import TINY
from tensordict import TensorDict

from unified_rl import protocols
from unified_rl.agents.behavior_cloning import BehaviorCloning
from unified_rl.correction import load_correction
from unified_rl.envs.control import GymnasiumEnv, TwoRouteEnv
from unified_rl.envs.language import ChainMod
from unified_rl.errors import ConfigError
from unified_rl.instantiate import check_value
from unified_rl.interventions import make_wrapper
from unified_rl.policies.autoregressive import AutoregressivePolicy
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.policies.diffusion import DiffusionPolicy
from unified_rl.policies.flow import FlowPolicy
from unified_rl.policies.gaussian import GaussianPolicy
from unified_rl.protocols import ControlEnv, Demonstrates, HasSpace, LanguageEnv, Rollout, Solves, domain_of, layout_of
from unified_rl.rollout import ControlRollout, DemonstrationRollout
from unified_rl.rollout.context import Hints
from unified_rl.rollout.sources import Pool
from unified_rl.spaces import Space

SPACE = Space.flat(3, 2, [-1.0] * 2, [1.0] * 2)
CONTROL = {"Samples", "Scores", "Imitates", "HasSpace", "Normalizes", "EndsPretraining", "Stateful"}
ABILITIES: dict[str, tuple[Any, set[str]]] = {
    "gaussian": (
        lambda: GaussianPolicy(SPACE),
        CONTROL | {"ShowsNormals", "Reparameterised", "HasEntropy"},
    ),
    "flow": (lambda: FlowPolicy(SPACE), CONTROL | {"ShowsNormals", "HasEntropy"}),
    "diffusion": (lambda: DiffusionPolicy(SPACE), CONTROL | {"ShowsNormals"}),
    "tokens": (lambda: AutoregressivePolicy(SPACE), CONTROL | {"ShowsLogits", "HasEntropy"}),
    "language": (
        lambda: CausalLM(**ChainMod().policy_inputs(), config=TINY),
        {"Scores", "Imitates", "Generates", "ShowsLogits", "UnitStates", "Stateful"},
    ),
}
ALL = {
    "Samples", "Generates", "Scores", "Imitates", "ShowsLogits", "ShowsNormals", "Reparameterised", "HasEntropy",
    "UnitStates", "HasSpace", "Normalizes", "EndsPretraining", "Stateful",
}  # fmt: skip


@pytest.mark.parametrize("name", ABILITIES)
def test_a_policy_has_the_abilities_that_its_class_promises_and_no_others(name: str) -> None:
    make, able = ABILITIES[name]
    policy = make()
    assert {ability for ability in ALL if isinstance(policy, getattr(protocols, ability))} == able
    assert domain_of(policy) == ("language" if name == "language" else "control")


def test_environments_rollouts_and_agents_keep_their_contracts() -> None:
    env, task, stream = TwoRouteEnv(), ChainMod(), torch.Generator()
    policy = GaussianPolicy(**env.policy_inputs())
    assert isinstance(env, ControlEnv) and isinstance(env, Demonstrates) and isinstance(env, HasSpace)
    assert not isinstance(env, LanguageEnv) and not isinstance(env, Solves)
    assert isinstance(task, LanguageEnv) and isinstance(task, Solves) and isinstance(task, Demonstrates)
    assert not isinstance(task, ControlEnv)
    assert isinstance(ControlRollout(env, policy, 0.99, stream), Rollout)
    assert isinstance(DemonstrationRollout(env, policy, 0.99, stream), Rollout)
    assert isinstance(BehaviorCloning(policy, generator=stream, rows=4), protocols.Agent)
    assert not isinstance(policy, protocols.Agent) and not isinstance(policy, Rollout)


def test_the_domain_is_told_and_not_guessed() -> None:
    class Mute:
        def generate(self, prompts: Any, *, max_new_tokens: int) -> None: ...

    with pytest.raises(ConfigError, match=r"Mute\.domain is None; set it to 'control' or 'language'"):
        domain_of(Mute())
    assert layout_of(TensorDict({"tokens": torch.zeros(2, 3)}, [2])) == "language"
    assert layout_of(TensorDict({"observation": torch.zeros(2, 3)}, [2])) == "control"


def test_random_first_steps_need_bounds_to_draw_from() -> None:
    class Wide(GymnasiumEnv):
        def policy_inputs(self) -> dict[str, Any]:
            return {"observation_dim": 3, "action_dim": 1, "action_low": [-1.0], "action_high": [float("inf")]}

    env, stream = Wide("Pendulum-v1"), torch.Generator()
    policy = GaussianPolicy(**env.policy_inputs())
    ControlRollout(env, policy, 0.99, stream)
    with pytest.raises(ConfigError, match=r"rollout\.random_steps"):
        ControlRollout(env, policy, 0.99, stream, random_steps=10)


@pytest.mark.parametrize("name", ABILITIES)
def test_whether_units_are_choices_is_told_by_the_policy(name: str) -> None:
    policy = ABILITIES[name][0]()
    assert protocols.is_discrete(policy) == (name in ("tokens", "language"))
    assert protocols.is_language(policy) == (name == "language")
    assert not protocols.standardises(policy) and not protocols.averages_dims(policy)


def test_settings_of_a_policy_are_seen_by_whoever_asks() -> None:
    assert protocols.standardises(GaussianPolicy(SPACE, normalize_observation=True))
    assert protocols.averages_dims(FlowPolicy(SPACE, mean_over_dims=True))


def test_a_policy_without_a_domain_trains_in_no_agent() -> None:
    class Bare:
        def log_prob(self, batch: Any) -> None: ...

    with pytest.raises(ConfigError, match=r"Bare\.domain is None; set it to 'control' or 'language'"):
        make_wrapper(Bare(), load_correction("ppo"))


def test_objects_of_a_script_fit_where_a_rollout_is_configured() -> None:
    node = {
        "_target_": "unified_rl.rollout.LanguageRollout",
        "context": Hints(),
        "sources": {"own": Pool(), "shown": {"_target_": "unified_rl.rollout.sources.Demonstrations", "per_group": 1}},
    }
    assert check_value(node, "rollout", [])["context"] is node["context"]
    with pytest.raises(ConfigError, match=r"rollout\.context is 3"):
        check_value({**node, "context": 3}, "rollout", [])
