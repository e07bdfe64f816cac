"""Any Gymnasium id through the vector adapter."""

from __future__ import annotations

from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from unified_rl.config import build
from unified_rl.envs.control import GymnasiumEnv
from unified_rl.errors import CheckpointError, ConfigError
from unified_rl.policies.autoregressive import AutoregressivePolicy
from unified_rl.policies.gaussian import GaussianPolicy
from unified_rl.spaces import Box


class Coin(gymnasium.Env):
    """Observes entropy that no seed determines."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):  # type: ignore[no-untyped-def]
        return np.random.default_rng().random(1, dtype=np.float32), {}

    def step(self, action):  # type: ignore[no-untyped-def]
        return np.random.default_rng().random(1, dtype=np.float32), 0.0, False, False, {}


@pytest.fixture
def coin() -> str:
    if "Coin-v0" not in gymnasium.registry:
        gymnasium.register("Coin-v0", entry_point=Coin)
    return "Coin-v0"


def test_cartpole_keeps_every_true_transition_across_ends() -> None:
    env = GymnasiumEnv("CartPole-v1", num_envs=3, seed=4)
    assert env.policy_inputs()["num_actions"] == 2
    references = [gymnasium.make("CartPole-v1") for _ in range(3)]
    for lane, reference in enumerate(references):
        reference.reset(seed=int(env.state_dict()["seeds"][lane]))
    generator, ends = torch.Generator().manual_seed(0), 0
    before = env.current_observation()
    for _ in range(120):
        action = torch.randint(2, (3, 1), generator=generator)
        step = env.step_batch(action)
        seeds = env.state_dict()["seeds"]
        for lane, reference in enumerate(references):
            observation, reward, terminated, truncated, _ = reference.step(int(action[lane]))
            assert torch.equal(step.next_observation[lane], torch.from_numpy(observation).float())
            assert (float(step.reward[lane]), bool(step.terminated[lane])) == (reward, terminated)
            if terminated or truncated:
                ends += 1
                observation, _ = reference.reset(seed=int(seeds[lane]))
            assert torch.equal(step.observation[lane], torch.from_numpy(observation).float())
        assert torch.equal(env.current_observation(), step.observation)
        assert not torch.equal(before, step.observation)
        before = step.observation
    assert ends >= 6


def test_pendulum_truncates_at_its_time_limit_in_every_copy() -> None:
    env = GymnasiumEnv("Pendulum-v1", num_envs=2, max_episode_steps=7)
    assert env.max_steps == 7
    assert env.space.action == Box((1,), low=-2.0, high=2.0)
    assert env.space.observation == Box((3,), low=(-1.0, -1.0, -8.0), high=(1.0, 1.0, 8.0))
    assert dict(**env.policy_inputs()) == {"space": env.space}
    flags = [env.step_batch(torch.zeros(2, 1)).truncated.tolist() for _ in range(15)]
    assert flags == [[True, True] if step % 7 == 0 else [False, False] for step in range(1, 16)]


@pytest.mark.parametrize("name", ["Pendulum-v1", "CartPole-v1"])
def test_a_restored_adapter_continues_bit_for_bit(name: str) -> None:
    env = GymnasiumEnv(name, num_envs=3, seed=1)
    generator = torch.Generator().manual_seed(2)
    actions = torch.randint(2, (90, 3, 1), generator=generator).float()
    for action in actions[:40]:
        env.step_batch(action)
    state = env.state_dict()
    expected = [env.step_batch(action) for action in actions[40:]]
    other = GymnasiumEnv(name, num_envs=3, seed=99)
    other.load_state_dict(state)
    for action, step in zip(actions[40:], expected, strict=True):
        again = other.step_batch(action)
        assert all(torch.equal(a, b) for a, b in zip(again[:6], step[:6], strict=True))


def test_an_environment_without_determinism_refuses_to_resume(coin: str) -> None:
    env = GymnasiumEnv(coin, max_episode_steps=5)
    env.step_batch(torch.zeros(1, 1))
    with pytest.raises(CheckpointError, match="not deterministic"):
        env.load_state_dict(env.state_dict())


def test_bad_ids_and_spaces_name_the_fix(coin: str) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'Pendulum-v1'"):
        GymnasiumEnv("Pendulun-v1")
    with pytest.raises(ConfigError, match="max_episode_steps"):
        GymnasiumEnv(coin)
    with pytest.raises(ConfigError, match=r"'Hall-v0'.*env\.id=PACKAGE:Hall-v0 and --allow PACKAGE"):
        GymnasiumEnv("Hall-v0")
    with pytest.raises(ConfigError, match="GymV26Environment-v0 imports whatever"):
        GymnasiumEnv("GymV26Environment-v0", make_kwargs={"env_id": "os:Evil-v0"})
    for flatten in (False, True):
        assert GymnasiumEnv("FrozenLake-v1", flatten=flatten).reset_batch().tolist() == [[1.0] + [0.0] * 15]


PACKAGE = """
import gymnasium, pathlib
pathlib.Path(__file__).with_name("ran").touch()
gymnasium.register("Corridor-v0", entry_point="gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=9)
"""


def test_a_package_is_imported_for_its_ids_only_where_it_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "corridor_package.py").write_text(PACKAGE)
    (tmp_path / "broken_package.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)

    def made(id: str, *allow: str) -> GymnasiumEnv:
        node = {"_target_": "unified_rl.envs.control.GymnasiumEnv", "id": id}
        out: GymnasiumEnv = build(node, allow=allow)
        return out

    for allow in ((), ("corridor",), ("corridor_package.inner",)):
        with pytest.raises(ConfigError, match=r"would import the package 'corridor_package'.*--allow corridor_package"):
            made("corridor_package:Corridor-v0", *allow)
    with pytest.raises(ConfigError, match="would import"):
        GymnasiumEnv("corridor_package:Corridor-v0")
    assert not (tmp_path / "ran").exists()
    assert made("corridor_package:Corridor-v0", "corridor_package").max_steps == 9
    assert made("corridor_package:Corridor-v0").max_steps == 9, "imported already"
    with pytest.raises(ConfigError, match=r"registers no environment 'Corridr-v0'.*did you mean 'Corridor-v0'"):
        made("corridor_package:Corridr-v0", "corridor_package")
    with pytest.raises(ConfigError, match=r"'broken_package' cannot be imported: ZeroDivisionError"):
        made("broken_package:Corridor-v0", "broken_package")
    with pytest.raises(ConfigError, match=r"'no_such_package' cannot be imported: ModuleNotFoundError"):
        made("no_such_package:Corridor-v0", "no_such_package")


class Strict(gymnasium.Env):
    """Asserts that its actions lie in its space, as many environments do, and keeps them."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, action: gymnasium.Space) -> None:  # type: ignore[type-arg]
        self.action_space, self.got = action, []  # type: ignore[var-annotated]

    def reset(self, *, seed=None, options=None):  # type: ignore[no-untyped-def]
        return np.zeros(2, np.float32), {}

    def step(self, action):  # type: ignore[no-untyped-def]
        assert self.action_space.contains(action), f"{action!r} {action.dtype}"
        self.got.append(np.array(action))
        return np.zeros(2, np.float32), 0.0, False, False, {}


def strict(action: gymnasium.Space, several: bool = True) -> GymnasiumEnv:  # type: ignore[type-arg]
    if "Strict-v0" not in gymnasium.registry:
        gymnasium.register("Strict-v0", entry_point=Strict, max_episode_steps=50)
    return GymnasiumEnv("Strict-v0", make_kwargs={"action": action}, several_choices=several)


def arrived(env: GymnasiumEnv) -> np.ndarray:  # type: ignore[type-arg]
    return np.array(env._pool.copies[0].env.unwrapped.got)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_actions_arrive_in_the_dtype_of_the_space_and_inside_its_bounds(dtype: type) -> None:
    low, high = np.array([-0.1, -0.7], dtype), np.array([0.1, np.inf], dtype)
    env = strict(gymnasium.spaces.Box(low, high, dtype=dtype))
    for action in ([[-0.1, -0.7]], [[0.1, 3.5]], [[-9.0, -9.0]]):  # float32 rounds -0.1 and -0.7 outward
        env.step_batch(torch.tensor(action))
    got = arrived(env)
    assert got.dtype == dtype and got[2].tolist() == low.tolist() and got[1, 1] == dtype(3.5)
    assert got[0].tolist() == [low[0], max(low[1], dtype(np.float32(-0.7)))]


def test_unbounded_and_multi_dimensional_actions_reach_the_environment() -> None:
    env = strict(gymnasium.spaces.Box(-np.inf, np.inf, (2, 3), np.float64))
    policy = GaussianPolicy(**env.policy_inputs())
    sample = policy.sample(env.current_observation(), torch.Generator().manual_seed(0))
    env.step_batch(sample["action"])
    assert arrived(env)[0].tolist() == sample["action"].double().reshape(2, 3).tolist()


def test_choices_are_counted_from_where_the_space_begins() -> None:
    for space, want in (
        (gymnasium.spaces.Discrete(3, start=5), 7),
        (gymnasium.spaces.Box(np.array([-2, 1]), np.array([0, 3]), dtype=np.int16), [0, 3]),
        (gymnasium.spaces.MultiDiscrete([3, 3], start=[1, -4]), [3, -2]),
        (gymnasium.spaces.MultiDiscrete([[3, 3]]), [[2, 2]]),
        (gymnasium.spaces.MultiBinary(2), [1, 1]),
    ):
        env = strict(space)
        policy = AutoregressivePolicy(env.space, hidden=(4,))
        assert policy.bins == 3 - isinstance(space, gymnasium.spaces.MultiBinary)
        env.step_batch(torch.full((1, policy.num_units), policy.bins - 1))
        assert arrived(env)[0].tolist() == want and arrived(env).dtype == space.dtype
        assert env.action_spec.is_in(policy.sample(env.current_observation())["action"])


def test_actions_that_no_policy_gives_are_refused_with_what_works(coin: str) -> None:
    both = gymnasium.spaces.Dict(a=gymnasium.spaces.Discrete(2))
    with pytest.raises(ConfigError, match=r"a dictionary of a \(one of 2 choices.*TransformAction"):
        strict(both)
    with pytest.raises(ConfigError, match="Text space has no fixed width"):
        strict(gymnasium.spaces.Text(5))
    with pytest.raises(ConfigError, match="say several_choices=True for policies that choose each entry"):
        strict(gymnasium.spaces.MultiBinary(2), several=False)
