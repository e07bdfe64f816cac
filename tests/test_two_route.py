"""The two-route task: its rewards, its expert, its two modes."""

from __future__ import annotations

import pytest
import torch

from unified_rl.envs.control import TwoRouteEnv

FORWARD, SIDE = [1.0, 0.0], [0.0, 1.0]


def drive(env: TwoRouteEnv, plan: list[list[float]]) -> list:
    """Plays one command a decision in every simulation."""
    return [env.step_batch(torch.tensor([command]).expand(env.num_envs, 2)) for command in plan]


def around(side: float) -> list[list[float]]:
    return [[0.0, side]] * 11 + [FORWARD] * 33 + [[0.0, -side]] * 11


def test_the_reward_is_progress_less_time_plus_the_bonus_of_arriving() -> None:
    env = TwoRouteEnv(2, seed=3, chunk=1)
    start = env.reset_batch()
    steps = drive(env, around(1.0))
    end = next(i for i, step in enumerate(steps) if bool(step.terminated.any()))
    lane = int(steps[end].terminated.nonzero()[0])
    assert bool(steps[end].info["success"][lane])
    goal = torch.tensor([0.8, 0.0])
    first = (start[lane, :2] - goal).norm()
    last = (steps[end].next_observation[lane, :2] - goal).norm()
    assert float(last) < 0.1
    total = sum(float(step.reward[lane]) for step in steps[: end + 1])
    assert total == pytest.approx(float(first - last) - 0.02 * (end + 1) + 1.0, abs=1e-5)


@pytest.mark.parametrize("side", [1.0, -1.0])
def test_the_route_is_the_side_on_which_the_point_passes_and_the_left_may_pay_more(side: float) -> None:
    totals = []
    for bonus in (0.0, 0.7):
        env = TwoRouteEnv(1, seed=3, chunk=1, left_bonus=bonus)
        steps = drive(env, around(side))
        end = next(i for i, step in enumerate(steps) if bool(step.info["success"]))
        routes = [float(step.info["route"]) for step in steps[: end + 1]]
        passed = next(i for i, step in enumerate(steps) if float(step.next_observation[0, 0]) >= 0)
        assert routes == [0.0] * passed + [side] * (end + 1 - passed)
        totals.append(sum(float(step.reward) for step in steps[: end + 1]))
    assert totals[1] - totals[0] == pytest.approx(0.7 if side > 0 else 0.0, abs=1e-5)


def test_driving_straight_crashes_and_ends_with_its_penalty() -> None:
    env = TwoRouteEnv(1, chunk=1)
    steps = drive(env, [FORWARD] * 20)
    end = next(i for i, step in enumerate(steps) if bool(step.terminated))
    crash = steps[end]
    assert bool(crash.info["collision"]) and not bool(crash.info["success"])
    assert float(crash.next_observation[0, :2].norm()) < 0.351
    progress = float(steps[end - 1].next_observation[0, :2].sub(torch.tensor([0.8, 0.0])).norm())
    progress -= float(crash.next_observation[0, :2].sub(torch.tensor([0.8, 0.0])).norm())
    assert float(crash.reward) == pytest.approx(progress - 0.02 - 0.5, abs=1e-5)
    assert not bool(steps[end + 1].terminated)


def test_standing_still_is_truncated_after_sixteen_decisions() -> None:
    env = TwoRouteEnv(2)
    assert env.max_steps == 16
    flags = [bool(env.step_batch(torch.zeros(2, 8)).truncated.all()) for _ in range(33)]
    assert [i for i, flag in enumerate(flags, 1) if flag] == [16, 32]


def test_demonstrations_use_both_routes_and_replaying_the_experts_plan_always_succeeds() -> None:
    env = TwoRouteEnv(1, seed=0)
    data = env.demonstrations(4000, torch.Generator().manual_seed(0))
    again = env.demonstrations(4000, torch.Generator().manual_seed(0))
    assert torch.equal(data["action"], again["action"])
    assert data["observation"].shape == (4000, 4) and data["action"].shape == (4000, 8)
    assert float(data["action"].abs().max()) <= 1
    place = data["observation"][:, :2]
    assert float(place.norm(dim=1).min()) > 0.35, "the expert never touches the obstacle"
    beside = place[place[:, 0].abs() < 0.2]
    left = float((beside[:, 1] > 0).float().mean())
    assert 0.3 < left < 0.7
    # nearest-demonstration control: a policy that only copies the expert arrives nearly always
    runner, finished, arrived = TwoRouteEnv(20, seed=7), 0, 0
    observation = runner.reset_batch()
    for _ in range(32):
        nearest = torch.cdist(observation, data["observation"]).argmin(1)
        step = runner.step_batch(data["action"][nearest])
        ended = step.terminated | step.truncated
        finished, arrived = finished + int(ended.sum()), arrived + int(step.info["success"].sum())
        observation = step.observation
    assert finished >= 40 and arrived / finished > 0.9


def test_the_mean_of_the_two_modes_crashes() -> None:
    data = TwoRouteEnv(1).demonstrations(4000, torch.Generator().manual_seed(0))
    env = TwoRouteEnv(10, seed=5)
    observation = env.reset_batch()
    for _ in range(16):
        distance = torch.cdist(observation, data["observation"])
        weight = torch.softmax(-((distance / 0.1) ** 2), dim=1)
        step = env.step_batch(weight @ data["action"])
        ended = step.terminated | step.truncated
        observation = step.observation
        if bool(ended.any()):
            assert not bool(step.info["success"][ended].any())
            assert bool(step.info["collision"][ended].all())
            break
    else:
        pytest.fail("no episode ended")
