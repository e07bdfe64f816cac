"""The batched environments themselves: checkpoints, chunks, seeds, threads, bad numbers, TorchRL."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("RL_LOGGING_LEVEL", "ERROR")

import mujoco
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.envs.utils import check_env_specs

from unified_rl.envs.control import (
    ActionChunk,
    BatchedMujocoEnv,
    ControlEnvBase,
    FrameStack,
    GymnasiumEnv,
    TwoRouteEnv,
    make_mujoco,
)
from unified_rl.envs.control.tasks import HalfCheetah, quiet_deprecations
from unified_rl.errors import CheckpointError, ConfigError, NonFiniteError
from unified_rl.protocols import ControlEnv, Demonstrates, StepResult


def actions(env: ControlEnvBase, steps: int, seed: int = 0) -> Tensor:
    inputs, generator = env.policy_inputs(), torch.Generator().manual_seed(seed)
    low, high = torch.tensor(inputs["action_low"]), torch.tensor(inputs["action_high"])
    return low + (high - low) * torch.rand(steps, env.num_envs, len(low), generator=generator)


def same(first: StepResult, second: StepResult) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first[:6], second[:6], strict=True))


@pytest.mark.parametrize("name", ["Ant-v5", "Humanoid-v5", "Pusher-v5", "HalfCheetah-v5"])
def test_a_restored_simulation_in_contact_continues_bit_for_bit(name: str) -> None:
    env = make_mujoco(name, 3, seed=1)
    plan = actions(env, 100)
    for action in plan[:60]:
        env.step_batch(action)
    assert isinstance(env, BatchedMujocoEnv)
    assert sum(data.ncon for data in env.simulations.data) > 0
    state = env.state_dict()
    expected = [env.step_batch(action) for action in plan[60:]]
    other = make_mujoco(name, 3, seed=77)
    other.load_state_dict(state)
    for action, step in zip(plan[60:], expected, strict=True):
        assert same(other.step_batch(action), step)
    assert torch.equal(other.current_observation(), env.current_observation())


def test_a_restored_two_route_task_remembers_its_route_and_its_stream() -> None:
    env = TwoRouteEnv(4, seed=2)
    plan = torch.cat((env.demonstrations(300).get("action")[:200].reshape(50, 4, 8), actions(env, 10)))
    for action in plan[:9]:
        env.step_batch(action)
    state = env.state_dict()
    expected = [env.step_batch(action) for action in plan[9:]]
    other = TwoRouteEnv(4, seed=3)
    other.load_state_dict(state)
    for action, step in zip(plan[9:], expected, strict=True):
        again = other.step_batch(action)
        assert same(again, step) and torch.equal(again.info["route"], step.info["route"])


def test_a_saved_state_survives_torch_save_without_pickled_objects(tmp_path) -> None:  # type: ignore[no-untyped-def]
    env = make_mujoco("HalfCheetah-v5", 2)
    torch.save(env.state_dict(), tmp_path / "env.pt")
    env.load_state_dict(torch.load(tmp_path / "env.pt", weights_only=True))
    with pytest.raises(CheckpointError, match="num_envs"):
        make_mujoco("HalfCheetah-v5", 3).load_state_dict(env.state_dict())


def test_the_seed_alone_decides_start_states_and_threads_change_nothing() -> None:
    first, second = make_mujoco("Hopper-v5", 5, seed=3), make_mujoco("Hopper-v5", 5, seed=4, threads=2)
    start = first.reset_batch(seed=11)
    assert torch.equal(start, second.reset_batch(seed=11))
    assert not torch.equal(start, first.reset_batch()) and second.reset_batch() is not None
    assert len({tuple(row.tolist()) for row in start}) == 5
    for action in actions(first, 80):
        assert same(first.step_batch(action), second.step_batch(action))
    second.close()


def test_results_of_one_step_are_not_overwritten_by_the_next() -> None:
    env = make_mujoco("InvertedPendulum-v5", 4)
    plan = actions(env, 30)
    kept = [env.step_batch(action) for action in plan]
    copies = [[t.clone() for t in step[:6]] for step in kept]
    for action in plan:
        env.step_batch(action)
    assert any(bool(step.terminated.any()) for step in kept)
    assert all(
        torch.equal(a, b) for step, copy in zip(kept, copies, strict=True) for a, b in zip(step, copy, strict=False)
    )


def test_time_limits_truncate_lane_by_lane_and_reset_only_those() -> None:
    env = make_mujoco("HalfCheetah-v5", 2, options={"max_steps": 5})
    assert isinstance(env, BatchedMujocoEnv) and env.max_steps == 5
    plan = actions(env, 7)
    for action in plan[:2]:
        env.step_batch(action)
    env.restart(torch.tensor([False, True]))
    seen = [env.step_batch(action) for action in plan[2:]]
    assert [step.truncated.tolist() for step in seen] == [[False] * 2] * 2 + [[True, False]] + [
        [False] * 2,
        [False, True],
    ]
    cut = seen[2]
    assert torch.equal(cut.observation[1], cut.next_observation[1])
    assert not torch.equal(cut.observation[0], cut.next_observation[0])
    assert not bool(cut.terminated.any())


def test_bad_names_and_options_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'HalfCheetah-v5'"):
        make_mujoco("HalfCheeta-v5")
    with pytest.raises(ConfigError, match=r"did you mean 'ctrl_cost_weight'"):
        make_mujoco("Ant-v5", options={"ctrl_cost": 1.0})
    with pytest.raises(ConfigError, match="num_envs=0 must be at least 1"):
        make_mujoco("Ant-v5", 0)


def test_only_environments_with_an_expert_demonstrate_chunked_or_not() -> None:
    route, bare = TwoRouteEnv(2), make_mujoco("InvertedPendulum-v5", 2)
    assert isinstance(route, Demonstrates) and isinstance(ActionChunk(route, 2), Demonstrates)
    assert not isinstance(bare, Demonstrates) and not isinstance(ActionChunk(bare, 2), Demonstrates)


def test_numbers_that_are_not_finite_stop_the_step_and_name_the_simulation() -> None:
    env = make_mujoco("HalfCheetah-v5", 3)
    assert isinstance(env, BatchedMujocoEnv)
    plan = actions(env, 5)
    for action in plan:
        env.step_batch(action)
    bad = plan[0].clone()
    bad[2, 1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"action of simulation 2 .* step 5"):
        env.step_batch(bad)
    env.simulations.data[1].qvel[3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"observation of simulation 1 .* step 6"):
        env.step_batch(plan[0])


def test_a_chunk_is_its_actions_one_by_one_with_discounted_reward() -> None:
    chunked, single = (
        make_mujoco("HalfCheetah-v5", 2, seed=1, chunk=3, gamma=0.9),
        make_mujoco("HalfCheetah-v5", 2, seed=1),
    )
    assert isinstance(chunked, ActionChunk) and chunked.max_steps == 334
    plan = actions(chunked, 4)
    for action in plan:
        step = chunked.step_batch(action)
        parts = [single.step_batch(part) for part in action.reshape(2, 3, 6).unbind(1)]
        expected = sum(0.9**i * part.reward for i, part in enumerate(parts))
        torch.testing.assert_close(step.reward, expected)
        assert torch.equal(step.next_observation, parts[-1].next_observation)
        assert step.executed.tolist() == [3, 3]


def test_a_chunk_stops_where_the_episode_ends_inside_it() -> None:
    options = {"max_steps": 7}
    chunked = make_mujoco("HalfCheetah-v5", 2, seed=1, chunk=4, gamma=1.0, options=options)
    single = make_mujoco("HalfCheetah-v5", 2, seed=1, options=options)
    plan = actions(chunked, 2)
    first, second = (chunked.step_batch(action) for action in plan)
    parts = [single.step_batch(part) for action in plan for part in action.reshape(2, 4, 6).unbind(1)]
    assert first.executed.tolist() == [4, 4] and second.executed.tolist() == [3, 3]
    assert bool(second.truncated.all()) and not bool(first.truncated.any())
    torch.testing.assert_close(second.reward, sum(part.reward for part in parts[4:7]))
    assert torch.equal(second.next_observation, parts[6].next_observation)
    assert torch.equal(second.observation, parts[6].observation)


def test_an_ended_lane_stands_still_while_the_others_finish_their_chunk() -> None:
    chunked = make_mujoco("InvertedPendulum-v5", 2, seed=0, chunk=12, gamma=1.0)
    single = make_mujoco("InvertedPendulum-v5", 2, seed=0)
    push = torch.zeros(2, 12)
    push[0] = 3.0
    step = chunked.step_batch(push)
    ends = 0
    while True:
        part = single.step_batch(torch.tensor([[3.0], [0.0]]))
        ends += 1
        if bool(part.terminated[0]):
            break
    assert step.terminated.tolist() == [True, False] and step.executed.tolist() == [ends, 12]
    assert step.reward.tolist() == [ends - 1, 12]
    assert torch.equal(step.next_observation[0], part.next_observation[0])
    assert float(step.observation[0].abs().max()) <= 0.01


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_mujoco("Hopper-v5", 3),
        lambda: TwoRouteEnv(2),
        lambda: GymnasiumEnv("Pendulum-v1", 2),
        lambda: GymnasiumEnv("CartPole-v1", 2),
    ],
    ids=["hopper", "two_route", "pendulum", "cartpole"],
)
def test_every_environment_meets_both_contracts(make) -> None:  # type: ignore[no-untyped-def]
    env = make()
    assert isinstance(env, ControlEnv)
    check_env_specs(env, seed=0)
    observation = env.reset_batch(seed=1)
    assert observation.shape == (env.num_envs, env.policy_inputs()["observation_dim"])
    assert observation.dtype == torch.float32 and torch.equal(observation, env.current_observation())


def test_a_torchrl_collector_resets_only_ended_lanes_and_keeps_true_successors() -> None:
    env = make_mujoco("Hopper-v5", 4, seed=0)
    generator = torch.Generator().manual_seed(0)
    policy = TensorDictModule(
        lambda o: 2 * torch.rand(o.shape[0], 3, generator=generator) - 1, in_keys=["observation"], out_keys=["action"]
    )
    collector = Collector(env, policy, frames_per_batch=4 * 60, total_frames=4 * 120)
    batches = [batch.clone() for batch in collector]
    data = TensorDict.cat(batches, dim=1) if isinstance(batches[0], TensorDict) else torch.cat(batches, 1)
    assert data.batch_size == (4, 120)
    done = data["next", "done"].squeeze(-1)
    assert int(done.sum()) >= 8
    now, following = data["observation"][:, 1:], data["next", "observation"][:, :-1]
    running = ~done[:, :-1]
    assert torch.equal(now[running], following[running])
    start = torch.from_numpy(np.concatenate((env.model.qpos0[1:], np.zeros(6)))).float()
    assert float((now[~running] - start).abs().max()) < 0.006
    assert float((following[~running] - start).abs().max(1).values.min()) > 0.05
    collector.shutdown()


def test_loading_a_task_prints_nothing_and_leaves_no_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """MuJoCo's own deprecation notice about gymnasium's HalfCheetah would come at every load."""
    monkeypatch.chdir(tmp_path)
    HalfCheetah().load_model()
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())
    assert mujoco.get_mju_user_warning() is None


def test_other_warnings_of_mujoco_are_heard(recwarn: pytest.WarningsRecorder) -> None:
    with quiet_deprecations():
        say = mujoco.get_mju_user_warning()
        say("compiler attribute 'settotalmass' is deprecated and will be removed")
        say("the solver diverged")
    assert [str(w.message) for w in recwarn] == ["MuJoCo: the solver diverged"]


def test_a_history_is_that_of_single_steps_and_goes_on_bit_for_bit() -> None:
    plain = make_mujoco("InvertedPendulum-v5", 3, seed=2)
    stacked = FrameStack(make_mujoco("InvertedPendulum-v5", 3, seed=2), 3)
    reference = FrameStack(GymnasiumEnv("InvertedPendulum-v5", 3, seed=2), 3)
    assert stacked.space.observation.shape == reference.space.observation.shape == (12,)
    generator, ends = torch.Generator().manual_seed(0), 0
    seen = [plain.current_observation()] * 3
    assert torch.equal(stacked.current_observation(), torch.cat(seen, 1))
    for number in range(40):
        action = 6 * torch.rand(3, 1, generator=generator) - 3
        one, many = plain.step_batch(action), stacked.step_batch(action)
        last = torch.cat([*seen[1:], one.next_observation], 1)
        assert torch.equal(many.next_observation, last) and torch.equal(many.reward, one.reward)
        ended = (one.terminated | one.truncated).unsqueeze(-1)
        ends += int(ended.sum())
        seen = [torch.where(ended, one.observation, row) for row in (*seen[1:], one.next_observation)]
        assert torch.equal(many.observation, torch.cat(seen, 1))
        if number == 20:
            state = stacked.state_dict()
    assert ends > 2
    again = FrameStack(make_mujoco("InvertedPendulum-v5", 3, seed=9), 3)
    again.load_state_dict(state)
    assert torch.equal(again.current_observation(), state["seen"].flatten(1))
    chunked = ActionChunk(FrameStack(make_mujoco("InvertedPendulum-v5", 3, seed=2), 2), 2)
    first = chunked.current_observation()
    step = chunked.step_batch(torch.zeros(3, 2))
    assert step.next_observation.shape == (3, 8) and not torch.equal(step.next_observation[:, :4], first[:, 4:])
