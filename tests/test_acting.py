"""A loaded policy is called with an observation and gives what the environment takes, without the environment."""

from __future__ import annotations

import sys
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

import unified_rl as ur
from unified_rl.errors import NonFiniteError, RecordError
from unified_rl.policies.acting import Actor, InSpace
from unified_rl.policies.autoregressive import AutoregressivePolicy
from unified_rl.policies.base import Policy
from unified_rl.policies.diffusion import DiffusionPolicy
from unified_rl.policies.flow import FlowPolicy
from unified_rl.policies.gaussian import GaussianPolicy
from unified_rl.spaces import Box, DictSpace, Discrete, Image, MultiBinary, MultiDiscrete, Space, TupleSpace
from unified_rl.training import loading
from unified_rl.training.run import train

SPACES = [
    Space(Box((3,), "float64"), Box((2,), "float64", (-0.1, -3.0), (0.1, 1.0))),
    Space(Box((3,)), Discrete(4, start=5)),
    Space(Box((3,)), MultiDiscrete((2, 3, 4), (1, 0, -2))),
    Space(Box((3,)), MultiBinary((2, 2))),
    Space(Box((3,)), Box((2,), "int16", -3, (2, 4))),
    Space(Box((3,)), Box((4, 2), "float32", -1.0, 2.0)),
]


class Levers(gymnasium.Env[Any, Any]):
    """Four levers numbered from 5; float64 observations."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gymnasium.spaces.Discrete(4, start=5)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        return self.np_random.normal(size=3), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action)
        return self.np_random.normal(size=3), float(action == 6), False, False, {}


def settled(policy: Policy) -> Policy:
    """Weights that are large enough to matter, and moments that are."""
    stream = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.4 * torch.randn(weight.shape, generator=stream)
    policy.update_normalizer(5 + 3 * torch.randn(64, policy.observation_dim, generator=stream))
    return policy.eval()


def made(space: Space) -> list[Policy]:
    """A policy of every class that takes the space."""
    kinds: list[tuple[Any, dict[str, Any]]] = [(AutoregressivePolicy, {"hidden": [8], "temperature": 2.0})]
    if space.action.choices is None:
        squashed = {"hidden": [8], "squash": True, "state_dependent_std": True}
        kinds += [(GaussianPolicy, {"hidden": [8]}), (GaussianPolicy, squashed),
                  (FlowPolicy, {"steps": 3, "hidden": [8]}),
                  (DiffusionPolicy, {"steps": 4, "trained_steps": 2, "hidden": [8]})]  # fmt: skip
    return [settled(kind(space, normalize_observation=True, seed=1, **options)) for kind, options in kinds]


@pytest.mark.parametrize("space", SPACES, ids=lambda space: space.action.describe())
def test_every_policy_gives_one_or_many_actions_of_the_space_in_the_kind_that_came(space: Space) -> None:
    action_space = space.action.to_gymnasium()
    rows = np.random.default_rng(0).normal(5, 3, (6, 3))
    for policy in made(space):
        batch = policy(rows)
        assert isinstance(batch, np.ndarray) and batch.dtype == np.dtype(space.action.dtype)
        assert batch.shape == (6, *space.action.shape) and all(action_space.contains(action) for action in batch)
        one = policy(rows[2])
        assert action_space.contains(one), type(one)
        np.testing.assert_allclose(one, batch[2], atol=1e-5)
        np.testing.assert_allclose(policy(rows.astype(np.float32)), batch, atol=1e-5)
        np.testing.assert_array_equal(policy(rows.tolist()), batch)
        tensor = policy(torch.from_numpy(rows))
        assert isinstance(tensor, torch.Tensor) and tensor.dtype == getattr(torch, space.action.dtype)
        np.testing.assert_array_equal(tensor.numpy(), batch)
        assert policy(torch.from_numpy(rows[0])).shape == space.action.shape
        assert policy(rows.reshape(2, 3, 3)).shape == (2, 3, *space.action.shape)
        none = policy(rows[:0])
        assert none.shape == (0, *space.action.shape) and none.dtype == batch.dtype
        shifted = np.array([policy(rows[:1] + shift) for shift in np.linspace(-9, 9, 41)])
        assert space.action.choices or shifted.std() > 0, "the observation matters"


def test_calls_are_deterministic_unless_asked_and_samples_come_from_a_seeded_stream() -> None:
    rows = np.random.default_rng(0).normal(5, 3, (6, 3)).astype(np.float32)
    for policy in made(SPACES[0]):
        state = policy.generator.get_state()
        assert np.array_equal(policy(rows), policy(rows)) and torch.equal(state, policy.generator.get_state())
        first, second = policy(rows, deterministic=False), policy(rows, deterministic=False)
        assert not np.array_equal(first, second)
        policy.generator.set_state(state)
        assert np.array_equal(policy(rows, deterministic=False), first)
        stream = torch.Generator().manual_seed(9)
        given = policy(rows, deterministic=False, generator=stream)
        assert np.array_equal(given, policy(rows, deterministic=False, generator=stream.manual_seed(9)))
        if not isinstance(policy, FlowPolicy | DiffusionPolicy):  # those of a sample start from noise of their own
            best = policy.sample(torch.from_numpy(rows), deterministic=True)["action"]
            assert torch.equal(policy.deterministic_action(torch.from_numpy(rows)), best)


def test_a_chain_takes_the_action_around_which_most_of_its_ends_lie() -> None:
    space, rows = SPACES[5], torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    policy = settled(FlowPolicy(space, steps=3, hidden=[8], seed=1))
    chosen = policy.deterministic_action(rows)
    for row, action in zip(rows, chosen, strict=True):
        ends = policy.integrate(row.expand(32, -1), policy.starts).detach().clamp(-1, 1)
        gaps = torch.cdist(ends, ends).square().sort().values[:, :9].sum(-1)
        assert torch.allclose(action, policy.to_env(ends[gaps.argmin()]), atol=1e-5)
    assert not torch.equal(FlowPolicy(space, seed=2).starts, FlowPolicy(space, seed=1).starts)
    assert "starts" not in policy.state_dict(), "they follow from the seed"
    zero = settled(FlowPolicy(space, steps=3, hidden=[8], zero_start=True, seed=1))
    expected = zero.to_env(zero.integrate(rows, torch.zeros(5, 8)))
    assert torch.allclose(zero.deterministic_action(rows), expected, atol=1e-5)


def test_of_two_modes_the_one_with_more_starts_is_kept() -> None:
    class Sided(FlowPolicy):
        """Goes to 0.8 from starts above -0.5, else to -0.8; close to the border it ends between."""

        def _noiseless(self, output: Any, state: Any, index: Any) -> Any:
            return 0.8 * torch.tanh(20 * (state + 0.5)) if index == 0 else state

    policy = Sided(Space(Box((3,)), Box((1,), low=-1.0, high=1.0)), steps=2, hidden=[8])
    assert ((policy.starts > -0.5).float().mean()) > 0.5
    assert torch.allclose(policy.deterministic_action(torch.zeros(2, 3)), torch.full((2, 1), 0.8), atol=1e-3)


@pytest.mark.parametrize("space", SPACES, ids=lambda space: space.action.describe())
def test_the_torch_form_of_an_action_space_is_that_of_numpy(space: Space) -> None:
    choices = space.action.choices
    count = space.action_dim
    stream = np.random.default_rng(1)
    flat = stream.normal(0, 4, (9, count)).astype(np.float32)
    if choices is not None:
        flat = stream.integers(0, choices, (9, count))
    np.testing.assert_array_equal(InSpace(space.action)(torch.from_numpy(flat)).numpy(), space.action.cast(flat))


def test_a_torchrl_user_keeps_the_tensordict_entry() -> None:
    policy = made(SPACES[0])[1]
    td = TensorDict({"observation": torch.zeros(4, 3)}, batch_size=[4])
    with set_exploration_type(ExplorationType.RANDOM):
        out = policy(td)
    assert out is td and bool(out["behavior_log_prob"].isfinite().all())
    assert torch.equal(policy(td, deterministic=True)["action"], policy.deterministic_action(torch.zeros(4, 3)))


def test_what_is_no_observation_is_one_line() -> None:
    policy = made(SPACES[0])[1]
    for wrong, message in (
        (np.zeros(4), r"shape \[4\], and this policy sees a vector of 3 float64: one of shape \[3\]"),
        (np.zeros((3, 2)), r"shape \[3, 2\]"),
        (0.5, r"shape \[\]"),
        ((np.zeros(3), {}), r"reset\(\) returns the observation and a dict of infos"),
        ({"observation": np.zeros(3)}, "is a dict that is no array of numbers"),
    ):
        with pytest.raises(RecordError, match=message):
            policy(wrong)
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        policy(np.array([0.0, np.nan, 0.0]))


def test_a_space_comes_back_from_plain_data() -> None:
    import json

    nested = DictSpace((("low", Box((2,), "float64", (0.0, -np.inf), np.inf)), ("camera", Image((3, 8, 8), True)),
                        ("both", TupleSpace((Discrete(3), MultiBinary((2,)))))))  # fmt: skip
    for space in [*SPACES, Space(nested, Box((2,), "int64", -3, 2))]:
        text = json.dumps(space.plain(), allow_nan=False)
        assert Space.from_plain(json.loads(text)) == space
    for wrong in (
        {},
        {"observation": {"kind": "os.system"}, "action": {"kind": "Box"}},
        {"observation": 1, "action": 2},
    ):
        with pytest.raises(ur.ConfigError, match="describes no space"):
            Space.from_plain(wrong)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    gymnasium.register("Levers-v0", entry_point=Levers, max_episode_steps=8)
    root = tmp_path_factory.mktemp("acting")
    common = ["progress=false", "eval_episodes=2", "rollout.num_envs=2", "rollout.horizon=8", "steps=32",
              "agent.critic_hidden=[8]", "policy.normalize_observation=true", "policy.hidden=[8]"]  # fmt: skip
    chosen = {
        "levers": ["env=gymnasium", "env.id=Levers-v0", "policy=autoregressive", "agent=ppo"],
        "route": ["env=two_route", "policy=flow", "policy.steps=2", "agent=ppo"],
    }
    made = {name: str(train(ur.compose([*common, *more, f"run_dir={root / name}"]))) for name, more in chosen.items()}
    del gymnasium.registry["Levers-v0"]
    return made


def test_a_run_s_policy_acts_where_its_environment_is_not(
    runs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("unified_rl.envs.control")]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises
    monkeypatch.setitem(sys.modules, "unified_rl.envs.control", None)
    levers = ur.load_policy(runs["levers"])
    assert isinstance(levers, AutoregressivePolicy) and not levers.training
    action = levers(np.zeros(3))
    assert isinstance(action, np.int64) and 5 <= action <= 8
    assert {*levers(np.zeros((64, 3)), deterministic=False).tolist()} == {5, 6, 7, 8}
    assert float(levers.normalizer.count) > 0, "its moments came with it"
    route = ur.Run(runs["route"]).policy()
    chunk = route(np.zeros(4))
    assert chunk.shape == (4, 2) and chunk.dtype == np.float32 and abs(chunk).max() <= 1
    drawn = route.sample(torch.zeros(5, 4)).set("observation", torch.zeros(5, 4))
    assert drawn["action"].shape == (5, 8) and route.log_prob(drawn).log_prob.shape == (5, 2)


def test_a_loaded_policy_is_the_one_that_was_trained(runs: dict[str, str]) -> None:
    from unified_rl.training.verbs import restored

    rows = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    theirs = restored(runs["route"], None, (), {"device": "cpu"}).policy.eval()
    ours = ur.load_policy(runs["route"])
    assert torch.equal(ours(rows).flatten(1), theirs.deterministic_action(rows))
    one, other = (p.sample(rows, generator=torch.Generator().manual_seed(1))["action"] for p in (ours, theirs))
    assert torch.equal(one, other)


def store_space(monkeypatch: pytest.MonkeyPatch, space: Any) -> None:
    """Checkpoints hold this space when they are read."""
    found = loading.intact_checkpoint

    def other(*arguments: Any, **options: Any) -> Any:
        path, state = found(*arguments, **options)
        return path, {**state, "space": space}

    monkeypatch.setattr(loading, "intact_checkpoint", other)


def test_a_checkpoint_without_a_space_builds_one_simulation(
    runs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from unified_rl.envs.control.simulation import Simulations

    counts, plain = [], Simulations.__init__

    def counted(self: Any, model: Any, count: int, *more: Any) -> None:
        counts.append(count)
        plain(self, model, count, *more)

    monkeypatch.setattr(Simulations, "__init__", counted)
    expected = ur.load_policy(runs["route"])(np.ones(4))
    assert counts == []
    store_space(monkeypatch, None)
    np.testing.assert_array_equal(ur.load_policy(runs["route"])(np.ones(4)), expected)
    assert counts == [1]


def test_a_stored_space_that_is_none_is_one_line(runs: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    store_space(monkeypatch, {"action": 3})
    with pytest.raises(ur.ConfigError, match="describes no space"):
        ur.load_policy(runs["route"])


def test_a_policy_of_another_class_acts_as_well() -> None:
    class Mine:
        domain = "control"

        def sample(self, observation: Any, generator: Any = None, deterministic: bool = False) -> Any:
            return TensorDict({"action": observation[:, :1].long().clamp(0, 3)}, batch_size=[len(observation)])

        def shout(self) -> str:
            return "here"

    actor = Actor(Mine(), SPACES[1])
    assert actor(np.array([2.0, 0, 0])) == 7 and actor(np.ones((2, 3))).tolist() == [6, 6]
    assert actor.shout() == "here" and actor(torch.zeros(3)).dtype == torch.int64
