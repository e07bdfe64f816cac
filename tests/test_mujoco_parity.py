"""Batched MuJoCo tasks against Gymnasium's own v5 environments, state for state."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch

from unified_rl.envs.control import TASKS, BatchedMujocoEnv, make_mujoco
from unified_rl.envs.control.locomotion import Ant
from unified_rl.envs.control.simulation import Array, Frame
from unified_rl.envs.control.tasks import HalfCheetah, Outcome, Scene, Task
from unified_rl.protocols import StepResult

LANES, STEPS = 2, 200
ENDING = {"Hopper-v5", "Walker2d-v5", "Humanoid-v5", "InvertedPendulum-v5", "InvertedDoublePendulum-v5"}
TIMED = {"Reacher-v5": 50, "Pusher-v5": 100}


def copy_start(env: BatchedMujocoEnv, lane: int, reference: gymnasium.Env) -> None:
    data = reference.unwrapped.data
    env.restart_at(np.array([lane]), data.qpos[None].copy(), data.qvel[None].copy())


@pytest.mark.parametrize("name", list(TASKS))
def test_two_hundred_steps_equal_gymnasium(name: str) -> None:
    env = make_mujoco(name, LANES, seed=5)
    assert isinstance(env, BatchedMujocoEnv)
    references = [gymnasium.make(name) for _ in range(LANES)]
    inputs, rng = env.policy_inputs(), np.random.default_rng(0)
    assert inputs["action_low"] == references[0].action_space.low.tolist()
    assert inputs["action_high"] == references[0].action_space.high.tolist()
    for lane, reference in enumerate(references):
        first, _ = reference.reset(seed=lane)
        copy_start(env, lane, reference)
        np.testing.assert_array_equal(env.observation64[lane], first)
    ends = {"terminated": 0, "truncated": 0}
    for _ in range(STEPS):
        # a little beyond the bounds too: neither side may clip before the control cost
        action = 1.1 * rng.uniform(inputs["action_low"], inputs["action_high"], (LANES, inputs["action_dim"]))
        action = action.astype(np.float32)
        ours = env.advance(torch.from_numpy(action))
        exact = env.observation64.copy()
        for lane, reference in enumerate(references):
            observation, reward, terminated, truncated, _ = reference.step(action[lane].astype(np.float64))
            np.testing.assert_array_equal(exact[lane], observation)
            assert float(ours.reward[lane]) == pytest.approx(float(reward), rel=1e-6, abs=1e-6)
            assert bool(ours.terminated[lane]) == terminated
            assert bool(ours.truncated[lane]) == truncated
            ends["terminated"] += terminated
            ends["truncated"] += truncated
            if terminated or truncated:
                reference.reset()
                copy_start(env, lane, reference)
    assert ends["terminated"] > 0 if name in ENDING else ends["terminated"] == 0 or name == "Ant-v5"
    assert ends["truncated"] == LANES * (STEPS // TIMED[name]) if name in TIMED else ends["truncated"] == 0


@pytest.mark.parametrize("name", list(TASKS))
def test_start_states_have_the_spread_of_gymnasiums(name: str) -> None:
    count = 400
    env = make_mujoco(name, count, seed=1)
    reference = gymnasium.make(name)
    rows = []
    for seed in range(count):
        reference.reset(seed=seed)
        data = reference.unwrapped.data
        rows.append(np.concatenate((data.qpos, data.qvel)))
    theirs = np.stack(rows)
    assert isinstance(env, BatchedMujocoEnv)
    ours = np.stack([np.concatenate((data.qpos, data.qvel)) for data in env.simulations.data])
    spread = theirs.std(0) + 1e-12
    np.testing.assert_allclose(ours.mean(0), theirs.mean(0), atol=float(6 * spread.max() / count**0.5))
    np.testing.assert_allclose(ours.std(0) / spread, np.where(spread > 1e-11, 1.0, ours.std(0) / spread), rtol=0.25)
    low, high = theirs.min(0) - 0.2 * spread - 1e-9, theirs.max(0) + 0.2 * spread + 1e-9
    inside = ((ours >= low) & (ours <= high)).mean()
    assert inside > 0.98


def test_an_unhealthy_end_keeps_the_final_observation_and_shows_the_new_start() -> None:
    env = make_mujoco("Hopper-v5", 3, seed=0)
    assert isinstance(env, BatchedMujocoEnv)
    reference = gymnasium.make("Hopper-v5")
    env.reset_batch()
    reference.reset(seed=9)
    copy_start(env, 1, reference)
    action = torch.tensor([[0.0, 0.0, 0.0], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0]])
    for _ in range(200):
        step = env.step_batch(action)
        final, _, terminated, _, _ = reference.step(action[1].double().numpy())
        torch.testing.assert_close(step.next_observation[1], torch.from_numpy(final).float(), rtol=0, atol=0)
        if terminated:
            break
        assert torch.equal(step.observation[1], step.next_observation[1])
    assert step.terminated.tolist() == [False, True, False]
    assert torch.equal(step.observation[[0, 2]], step.next_observation[[0, 2]])
    assert not torch.allclose(step.observation[1], step.next_observation[1], atol=0.05)
    assert float((step.observation[1] - torch.tensor(env.model.qpos0[1:].tolist() + [0.0] * 6)).abs().max()) < 0.01


def test_a_task_of_ones_own_is_asked_for_what_it_changes() -> None:
    """What a task shares between observation, outcome and memory is left out where a subclass has its own of one."""

    class Paid(Ant):
        def outcome(self, scene: Scene, frame: Frame, memory: Array, action: Array) -> Outcome:
            return super().outcome(scene, frame, memory, action)._replace(reward=np.full(len(action), 7.0))

    class Blind(Ant):
        def observe(self, frame: Frame) -> Array:
            return 0.0 * super().observe(frame)

    class Far(HalfCheetah):
        def memory(self, scene: Scene, frame: Frame) -> Array:
            return 2.0 * super().memory(scene, frame)

    def second(task: Task) -> StepResult:
        env = BatchedMujocoEnv(task, 2, seed=3)
        env.step_batch(torch.zeros(2, env.space.action_dim))
        return env.step_batch(torch.ones(2, env.space.action_dim))

    plain, cheetah = second(Ant()), second(HalfCheetah())
    assert second(Paid()).reward.tolist() == [7.0, 7.0] and plain.reward.tolist() != [7.0, 7.0]
    assert not second(Blind()).next_observation.any() and plain.next_observation.any()
    cost = 0.1 * 6
    torch.testing.assert_close(second(Far()).reward + cost, 2 * (cheetah.reward + cost))
