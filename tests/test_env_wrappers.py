"""env.frame_stack, env.action_repeat and env.chunk around any control environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array
from gymnasium.wrappers import FrameStackObservation
from run_cases import ALLOW
from tensordict import TensorDict

import unified_rl as ur
from unified_rl.config import build, compose
from unified_rl.envs.control import ActionChunk, ActionRepeat, FrameStack, GymnasiumEnv
from unified_rl.errors import ConfigError
from unified_rl.interop.gymnasium_vector import GymnasiumVectorEnv
from unified_rl.observations import layout_of, stacked
from unified_rl.protocols import Demonstrates
from unified_rl.replay import Replay, Uniform
from unified_rl.rollout.control import ControlRollout
from unified_rl.rollout.windows import fitted_windows, refuse_single_steps, sizes_of
from unified_rl.spaces import part_from_gymnasium
from unified_rl.wrapping import Wrapping, wrap

SMALL: dict[str, Any] = {
    "env": "pendulum",
    "agent": "ppo",
    "policy.hidden": [8],
    "agent.critic_hidden": [8],
    "rollout.num_envs": 2,
    "rollout.horizon": 8,
    "eval_episodes": 2,
    "eval_every": 0,
}


def pendulum(count: int = 2, limit: int = 7) -> GymnasiumEnv:
    return GymnasiumEnv("Pendulum-v1", num_envs=count, max_episode_steps=limit)


def test_a_history_is_that_of_gymnasium() -> None:
    env = FrameStack(pendulum(1), 3)
    theirs = FrameStackObservation(pendulum(1)._pool.copies[0].env, 3)
    assert env.space.observation.shape == (9,)
    env.reset_batch(seed=4)
    first, _ = theirs.reset(seed=int(env.inner._seeds[0]))
    torch.testing.assert_close(env.current_observation()[0], torch.as_tensor(first).flatten())
    for t in range(6):
        action = torch.tensor([[0.3 * t - 1.0]])
        step = env.step_batch(action)
        seen, reward, *_ = theirs.step(action[0].numpy())
        torch.testing.assert_close(step.next_observation[0], torch.as_tensor(seen).flatten())
        assert float(step.reward[0]) == pytest.approx(float(reward), rel=1e-5)


def test_histories_stand_still_with_their_simulation_and_begin_anew() -> None:
    env = FrameStack(pendulum(), 2)
    env.reset_batch(seed=0)
    before = env.current_observation()
    env.advance(torch.zeros(2, 1), torch.tensor([True, False]))
    after = env.current_observation()
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[0, :3], before[0, 3:]) and not torch.equal(after[0, 3:], before[0, 3:])
    fresh = env.restart(torch.tensor([True, False]))
    assert torch.equal(fresh[0, :3], fresh[0, 3:]) and torch.equal(env.current_observation()[1], before[1])
    assert torch.equal(env.current_observation()[0], fresh[0])
    state = env.state_dict()
    env.step_batch(torch.ones(2, 1))
    moved = env.current_observation()
    env.load_state_dict(state)
    env.step_batch(torch.ones(2, 1))
    assert torch.equal(env.current_observation(), moved)


def test_a_repeated_action_is_a_chunk_of_equal_ones_cut_at_the_end() -> None:
    repeat, plain = ActionRepeat(pendulum(), 3, gamma=0.9), pendulum()
    repeat.reset_batch(seed=1), plain.reset_batch(seed=1)
    for executed in (3, 3, 1):  # seven steps an episode
        step = repeat.advance(torch.tensor([[0.5], [-1.0]]))
        singles = [plain.advance(torch.tensor([[0.5], [-1.0]])) for _ in range(executed)]
        reward = sum(0.9**i * one.reward for i, one in enumerate(singles))
        torch.testing.assert_close(step.reward, reward)
        torch.testing.assert_close(step.plain_reward, sum(one.reward for one in singles))
        assert torch.equal(step.next_observation, singles[-1].next_observation)
        assert step.executed.tolist() == [executed] * 2
    assert step.truncated.all() and repeat.max_steps == 3 and repeat.steps_per_action == 3


def test_a_run_says_them_of_its_environment() -> None:
    options = {"env.action_repeat": 2, "env.frame_stack": 3, "env.chunk": 2, "agent.gamma": 0.9}
    run = ur.assemble(**{**SMALL, **options}, steps=128)
    chunk = run.env
    assert isinstance(chunk, ActionChunk) and isinstance(chunk.inner, FrameStack)
    assert isinstance(chunk.inner.inner, ActionRepeat)
    assert chunk.gamma == chunk.inner.inner.gamma == 0.9
    assert run.policy.observation_dim == 9 and run.policy.action_dim == 2
    rows = run.run()
    assert run.steps == 128 and rows[-1]["eval/length"] == 200  # both in steps of the environment inside
    made = ur.make_env("pendulum", frame_stack=2, num_envs=3)
    assert made.current_observation().shape == (3, 6)


class Shown(GymnasiumEnv):
    """With an expert of single steps."""

    def demonstrations(self, count: int, generator: torch.Generator) -> TensorDict:
        return TensorDict({"observation": torch.zeros(count, 3), "action": torch.zeros(count, 1)}, batch_size=[count])


def test_an_expert_of_single_steps_is_none_of_histories_and_plans() -> None:
    env = Shown("Pendulum-v1")
    assert isinstance(env, Demonstrates)
    for option in ("action_repeat", "frame_stack", "chunk"):
        around = wrap(env, Wrapping(**{option: 2}), build, 0.9)
        assert not isinstance(around, Demonstrates) and around.inner is env


@pytest.mark.parametrize("option", ["env.action_repeat", "env.frame_stack", "env.chunk"])
def test_a_run_in_one_is_resumed_bit_for_bit(option: str, tmp_path: Path) -> None:
    settings = {**SMALL, option: 2}
    whole = ur.assemble(**settings, updates=4, folder=tmp_path / "whole")
    whole.run()
    first = ur.assemble(**settings, updates=4, folder=tmp_path / "part")
    for _ in range(2):
        first.update()
    first.save()
    again = ur.assemble(**settings, updates=4, folder=tmp_path / "part", resume_existing=True)
    again.update(), again.update()
    for a, b in zip(whole.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["env=chain_mod", "env.frame_stack=2"], "frame_stack"),
        (["env=pendulum", "agent=ppo", "env.frame_stack=0"], r"env\.frame_stack"),
        (["env=pendulum", "agent=ppo", "env.frame_stak=2"], "frame_stack"),
    ],
)
def test_what_does_not_fit_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(overrides, allow=ALLOW)


class Seen(gymnasium.Env[Any, Any]):
    """A reward of one a step, for four steps; shows what it is asked to."""

    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))

    def __init__(self, shown: str = "vector") -> None:
        vector = gymnasium.spaces.Box(-1.0, 1.0, (2,))
        image = gymnasium.spaces.Box(0, 255, (8, 8, 3), np.uint8)
        mixed = gymnasium.spaces.Dict({"arm": vector, "eye": image, "leg": vector})
        kinds = {"vector": vector, "dictionary": gymnasium.spaces.Dict({"arm": vector}), "image": image, "mixed": mixed}
        self.observation_space = kinds[shown]

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        return self.observation_space.sample(), 1.0, False, False, {}


def test_a_chunk_of_repeated_actions_discounts_every_step() -> None:
    inner = GymnasiumEnv(make=Seen, num_envs=1, max_episode_steps=8)
    env = wrap(inner, Wrapping(action_repeat=2, chunk=2), build, 0.5)
    policy = build({"_target_": "unified_rl.policies.GaussianPolicy", "hidden": [4]}, **env.policy_inputs())
    g = torch.Generator().manual_seed(0)
    rows, _ = ControlRollout(env, policy, horizon=1, gamma=0.5, generator=g).collect(0)
    assert float(rows["reward"]) == 1.0 + 0.5 + 0.25 + 0.125 and float(rows["discount"]) == 0.5**4
    assert float(env.advance(torch.zeros(1, 2)).plain_reward) == 4.0
    env = wrap(GymnasiumEnv(make=Seen, num_envs=1), Wrapping(chunk=3), build, 0.5)
    assert float(env.advance(torch.zeros(1, 3)).reward) == 1.75


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Steps of a pendulum, of one step each (also with its discount) and of rows that tell of several."""
    g, n = torch.Generator().manual_seed(0), 40
    rows = {
        "observation": torch.randn(n, 3, generator=g),
        "action": torch.zeros(n, 1),
        "episode": torch.arange(n) // 20,
    }
    rows |= {"next_observation": rows["observation"], "reward": torch.ones(n), "step": torch.arange(n) % 20}
    rows |= {key: torch.zeros(n, dtype=torch.bool) for key in ("terminated", "truncated")}
    found = {}
    cut = torch.full((n,), 0.99**4)
    cut[19::20], ends = 0.99**2, torch.arange(n) % 20 == 19  # an episode ended within a decision
    for name, more in (
        ("single", {}),
        ("told", {"discount": torch.full((n,), 0.99)}),
        ("several", {"discount": torch.full((n,), 0.99**2)}),
        ("four", {"discount": cut, "truncated": ends}),
    ):
        replay = Replay(n, sampler=Uniform())
        replay.extend({**rows, **more})
        found[name] = str(tmp_path_factory.mktemp("rows") / name)
        replay.dumps(found[name])
    return found


@pytest.mark.parametrize("option", ["rollout.data", "replay.data"])
def test_single_steps_are_no_rows_of_repeated_actions(option: str, folders: dict[str, str]) -> None:
    parts: dict[str, Any] = {"agent": "behavior_cloning", "policy": "gaussian", "policy.hidden": [8]}
    if option == "replay.data":
        parts = {"recipe": "rlpd", "policy.hidden": [8], "agent.critic_hidden": [8]}
    settings = {"env": "pendulum", "eval_episodes": 1, "updates": 1, **parts}

    def run(name: str, repeat: int) -> Any:
        made = ur.assemble(**settings, **{"env.action_repeat": repeat, option: folders[name]})
        return made.rollout if option == "rollout.data" else made.replay

    with pytest.raises(ConfigError, match=rf"{option}=.*holds single steps, and env\.action_repeat=2 .*repeat=1, or"):
        run("single", 2)
    with pytest.raises(ConfigError, match=rf"{option}=.*holds single steps, and env\.action_repeat=2 .*repeat=1, or"):
        run("told", 2)
    with pytest.raises(ConfigError, match=rf"{option}=.*holds rows of 4 steps, and env\.action_repeat=2 .*repeat=4, "):
        run("four", 2)
    run("single", 1), run("told", 1), run("several", 2), run("four", 4)
    undiscounted = TensorDict({"action": torch.zeros(4, 1), "discount": torch.ones(4)}, [4])
    refuse_single_steps(undiscounted, ActionRepeat(pendulum(), 2, 1.0), "powers of 1 tell nothing")
    repeated = ActionRepeat(pendulum(), 2)
    assert sizes_of(repeated) == (1, 1) and sizes_of(ActionChunk(FrameStack(repeated, 3), 4)) == (3, 4)


MIXED = gymnasium.spaces.Dict(
    {
        "arm": gymnasium.spaces.Box(-1.0, 1.0, (2, 3)),
        "eye": gymnasium.spaces.Box(0, 255, (3, 10, 8), np.uint8),
        "grip": gymnasium.spaces.Discrete(3, start=2),
        "more": gymnasium.spaces.Tuple(
            (gymnasium.spaces.MultiDiscrete([2, 4]), gymnasium.spaces.MultiBinary(3), gymnasium.spaces.Box(0, 1, (2,)))
        ),
    }
)
KINDS: dict[str, gymnasium.Space[Any]] = {
    "image": gymnasium.spaces.Box(0, 255, (8, 9, 3), np.uint8),
    "gray": gymnasium.spaces.Box(0, 255, (8, 9), np.uint8),
    "several images": gymnasium.spaces.Box(0, 255, (2, 9, 8, 3), np.uint8),
    "choice": gymnasium.spaces.Discrete(4, start=1),
    "mixed": MIXED,
    "numbers": gymnasium.spaces.Dict({key: MIXED[key] for key in ("arm", "grip")}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_histories_of_everything_are_those_of_gymnasium(kind: str) -> None:
    space, count = KINDS[kind], 3
    space.seed(1)
    values = [space.sample() for _ in range(count)]
    one, many = layout_of(part_from_gymnasium(space)), layout_of(stacked(part_from_gymnasium(space), count))
    found = one.stack(torch.from_numpy(np.stack([one.pack(value) for value in values])))
    assert found.shape == (count * one.width,) == (many.width,) and found.dtype == many.dtype
    together = concatenate(batch_space(space, count), values, create_empty_array(space, count))
    if kind == "several images":
        together = np.concatenate(values)
    np.testing.assert_array_equal(found.numpy(), many.pack(together))


@pytest.mark.parametrize("shown", ["dictionary", "image", "mixed"])
def test_a_run_sees_histories_of_images_and_dictionaries(shown: str) -> None:
    node = {"env": "gymnasium", "env.id": None, "env.make": "test_env_wrappers:Seen", "env.make_kwargs.shown": shown}
    options = {"env.max_episode_steps": 8, "env.frame_stack": 3, "env.chunk": 2, "policy.image_features": 4}
    run = ur.assemble(**{**SMALL, **node, **options}, updates=2, allow=["test_env_wrappers"])
    one = layout_of(run.env.inner.inner.space.observation)
    before = one.stack(run.env.inner._seen)
    assert torch.equal(run.env.current_observation(), before)
    after = run.env.step_batch(torch.zeros(2, 2)).next_observation
    seen = run.env.inner._seen
    assert not torch.equal(seen[:, 2], seen[:, 1]) and torch.equal(after, one.stack(seen))
    assert run.policy.space.observation == stacked(one.part, 3)
    assert len(run.run()) > 0
    run.env.close()


@pytest.mark.parametrize("shown", ["vector", "image", "mixed"])
def test_single_steps_of_images_become_histories_too(shown: str) -> None:
    """What is cut from recorded rows is what the environment itself would have shown."""
    env = FrameStack(GymnasiumEnv(make=Seen, make_kwargs={"shown": shown}, num_envs=1, max_episode_steps=4), 3)
    env.reset_batch(seed=2)
    singles: dict[str, list[torch.Tensor]] = {"observation": [], "next_observation": []}
    histories: dict[str, list[torch.Tensor]] = {"observation": [], "next_observation": []}
    for _ in range(8):
        singles["observation"].append(env.inner.current_observation())
        histories["observation"].append(env.current_observation())
        step = env.advance(torch.zeros(1, 1))
        singles["next_observation"].append(env.inner.current_observation())
        histories["next_observation"].append(step.next_observation)
        if step.truncated.all():
            env.restart(step.truncated)
    times = {"episode": torch.arange(8) // 4, "step": torch.arange(8) % 4, "action": torch.zeros(8, 1)}
    rows = TensorDict({**times, **{key: torch.cat(value) for key, value in singles.items()}}, batch_size=[8])
    cut = fitted_windows(rows, env, env.space, "x")
    for key, value in histories.items():
        assert torch.equal(cut[key], torch.cat(value))


def test_a_vector_environment_is_sent_to_copies() -> None:
    env = GymnasiumVectorEnv(gymnasium.vector.SyncVectorEnv([Seen] * 2))
    with pytest.raises(ConfigError, match=r"env\.frame_stack needs .*GymnasiumVectorEnv is none: .*env\.make=") as told:
        wrap(env, Wrapping(frame_stack=2), build, None)
    assert "TorchRL" not in str(told.value)
    with pytest.raises(ConfigError, match="CatFrames"):
        wrap(object(), Wrapping(frame_stack=2), build, None)
