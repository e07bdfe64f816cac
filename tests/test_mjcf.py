"""A robot from an MJCF file and functions on batches: physics, what functions see, resuming, and refusals in a line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest
import torch
from mjcf_cases import CART

import unified_rl as ur
from unified_rl.config import compose
from unified_rl.envs.control import ActionChunk, make_mjcf
from unified_rl.errors import ConfigError, EnvError
from unified_rl.instantiate import allowing
from unified_rl.training.build import Job

RULES = """
import numpy as np
last = {}
def see(state):
    last["state"] = state
    return np.concatenate([state.joint("x"), state.sensor("speed"), state.site("mark")], axis=1)
def pay(state, action, before): return (state.qpos - before.qpos)[:, 0] - 0.1 * action[:, 0] ** 2
def far(state): return state.qpos[:, 0] > 0.02
def told(state, action): return {"success": far(state), "push": action[:, 0]}
def start(model, rng, count): return np.tile([[0.01, 0.5]], (count, 1)), np.zeros((count, 2))
def two(state): return np.zeros((len(state), 2))
def wishes(state, weather): return np.zeros(len(state))
def none(state): return None
def boom(state): return 1 // 0
def writes(state): state.qpos[:] = 0
def half(state): return np.full(len(state), 0.5)
def lists(state): return {"length": state.qpos[:, 0]}
def leg(state): return state.site("mork")[:, 0]
def only(model, rng, count): return np.zeros((count, 2))
"""
FUNCTIONS = {"observation": "see", "reward": "pay", "termination": "far", "metrics": "told", "initial": "start"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "rules_of_carts.py").write_text(RULES)
    (tmp_path / "cart.xml").write_text(CART.format(options="", ctrl='ctrlrange="-2 2"'))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(path: str = "cart.xml", **settings: Any) -> Any:
    given = {**FUNCTIONS, **{key: value for key, value in settings.items() if key in FUNCTIONS}}
    named = {key: f"rules_of_carts:{value}" for key, value in given.items() if value is not None}
    with allowing(["rules_of_carts"]):
        return make_mjcf(path, **{**settings, **named})


@pytest.mark.parametrize("integrator", ["Euler", "RK4", "implicitfast"])
def test_physics_are_mujocos_and_what_functions_see_is_of_one_moment(folder: Path, integrator: str) -> None:
    (folder / "cart.xml").write_text(CART.format(options=f'integrator="{integrator}"', ctrl='ctrlrange="-2 2"'))
    env = make(num_envs=3, frame_skip=3, termination=None)
    import rules_of_carts  # type: ignore[import-not-found]

    model, data = env.model, mujoco.MjData(env.model)
    data.qpos[:] = [0.01, 0.5]
    rng, before = np.random.default_rng(0), 0.01
    for _ in range(30):
        force = rng.uniform(-2, 2, (3, 1)).astype(np.float32)
        step = env.advance(torch.from_numpy(force))
        data.ctrl[:] = force[1]
        mujoco.mj_step(model, data, 3)
        assert np.array_equal(env.simulations.data[1].qpos, data.qpos)
        assert np.array_equal(env.simulations.data[1].qvel, data.qvel)
        seen = [data.qpos[0], data.qvel[0], 0.0, 0.0, data.qpos[0] + 0.5, 0.0, 0.0]
        np.testing.assert_allclose(step.observation[1], seen, atol=1e-6)
        assert float(step.reward[1]) == pytest.approx(data.qpos[0] - before - 0.1 * float(force[1, 0]) ** 2, abs=1e-6)
        state, before = rules_of_carts.last["state"], data.qpos[0]
        assert (len(state), state.dt, state.body("pole").shape) == (3, pytest.approx(0.06), (3, 3))
        assert np.array_equal(state.joint_velocity("hinge")[1], data.qvel[1:])
    assert not bool(step.terminated.any())


def test_ends_metrics_and_start_states_are_the_functions_own() -> None:
    env = make(num_envs=2, frame_skip=5, max_steps=7)
    np.testing.assert_allclose(env.current_observation()[:, 0], 0.01)
    step = env.step_batch(torch.tensor([[2.0], [-2.0]]))
    for _ in range(3):
        step = env.step_batch(torch.tensor([[2.0], [-2.0]]))
        if bool(step.terminated[0]):
            break
    assert step.terminated.tolist() == [True, False] and float(step.next_observation[0, 0]) > 0.02
    np.testing.assert_allclose(step.observation[0, 0], 0.01)
    assert step.info["success"].tolist() == [1.0, 0.0] and step.info["push"].tolist() == [2.0, -2.0]
    plain = make(observation=None, initial=None, termination=None, metrics=None, num_envs=4, reset_noise_scale=0.5)
    assert plain.space.observation_dim == 2 + 2 + 3
    assert 0.1 < float(plain.current_observation()[:, 0].abs().max()) <= 0.5
    named = {"path": "cart.xml", "reward": "rules_of_carts:pay", "chunk": 2}
    assert isinstance(ur.make_env("mjcf", allow=["rules_of_carts"], **named), ActionChunk)


def test_a_run_goes_on_bit_for_bit_and_tells_its_metrics(folder: Path) -> None:
    words = [
        "env=mjcf",
        "env.path=cart.xml",
        *(f"env.{key}=rules_of_carts:{value}" for key, value in FUNCTIONS.items()),
    ]
    words += ["env.max_steps=6", "env.frame_skip=5", "env.chunk=2", "agent=ppo", "policy.hidden=[8]", "eval_episodes=4"]
    words += ["agent.critic_hidden=[8]", "agent.minibatch=16", "agent.epochs=2", "rollout.num_envs=4", "seed=3"]
    words += ["rollout.horizon=8", "progress=false", "log_every=1", "checkpoint_every=64"]
    whole = ur.train([*words, "steps=192", "run_dir=whole"], allow=["rules_of_carts"])
    part = ur.train([*words, "steps=64", "run_dir=part"], allow=["rules_of_carts"])
    ur.resume(part, steps=192, allow=["rules_of_carts"])
    one, other = (ur.load_policy(str(run)).state_dict() for run in (whole, part))
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    rows = Path(str(whole), "metrics.csv").read_text()
    assert "eval/success" in rows and "rollout/push" in rows


def test_actuators_without_a_range_have_no_bounds(folder: Path) -> None:
    (folder / "free.xml").write_text(CART.format(options="", ctrl=""))
    action = make("free.xml").space.action
    assert (action.low, action.high) == (-np.inf, np.inf)
    assert (make().space.action.low, make().space.action.high) == (-2.0, 2.0)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"path": "robot.xml"}, ConfigError, "env.path=robot.xml: there is no such file"),
        ({"path": "rules_of_carts.py"}, ConfigError, "env.path=rules_of_carts.py is no model that MuJoCo reads"),
        ({"path": "still.xml"}, ConfigError, "env.path=still.xml has no actuators"),
        ({"reward": "pai"}, ConfigError, "env.reward 'rules_of_carts.pai': rules_of_carts has no 'pai'; did you mean"),
        (
            {"reward": "wishes"},
            ConfigError,
            "env.reward=rules_of_carts:wishes takes weather, which nobody gives it; it",
        ),
        ({"initial": "pay"}, ConfigError, "takes state, action, before, which nobody gives it; it may take model, rng"),
        ({"reward": "two"}, EnvError, r"env.reward \(rules_of_carts:two\) returned .* numbers of shape \[1\] are exp"),
        ({"reward": "none"}, EnvError, "returned None"),
        ({"reward": "boom"}, EnvError, r"env.reward \(rules_of_carts:boom\) raised ZeroDivisionError"),
        ({"reward": "writes"}, EnvError, "raised ValueError: .*read-only"),
        ({"reward": "leg"}, ConfigError, "the model has no site 'mork'; did you mean 'mark'"),
        ({"observation": "far"}, EnvError, r"env.observation .* numbers of shape \[1, d\] are expected"),
        ({"termination": "half"}, EnvError, "env.termination .* True or False a simulation is expected"),
        ({"metrics": "lists"}, EnvError, "env.metrics .* tells length, which a run measures"),
        ({"metrics": "far"}, EnvError, "env.metrics .* a dictionary of numbers by name is expected"),
        ({"initial": "only"}, EnvError, "env.initial .* positions and velocities are expected"),
    ],
)
def test_what_does_not_fit_is_one_line(
    folder: Path, settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    (folder / "still.xml").write_text("<mujoco><worldbody><body><joint/><geom size='1'/></body></worldbody></mujoco>")
    with pytest.raises(error, match=words) as caught:
        make(**{"path": "cart.xml", **settings})
    assert "\n" not in str(caught.value)


def test_functions_are_not_imported_where_nobody_allows_it() -> None:
    words = ["env=mjcf", "env.path=cart.xml", "env.reward=rules_of_carts:pay", "agent=ppo"]
    with pytest.raises(ConfigError, match=r"env.reward .rules_of_carts\.pay. is outside the allowed packages; start"):
        compose(words)
    with pytest.raises(ConfigError, match=r"env.reward .rules_of_carts\.pay. is outside the allowed packages"):
        Job(compose(words, allow=["rules_of_carts"]))


def test_the_example_arm_is_one_of_these(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(source / "examples" / "arm", folder / "arm")
    monkeypatch.syspath_prepend(folder / "arm")
    monkeypatch.chdir(folder / "arm")
    words = ["env=arm", "agent=ppo", "eval_episodes=4", "rollout.num_envs=2"]
    job = Job(compose(words, config_dirs=["."], allow=["arm_task"]), allow=["arm_task"])
    assert (job.env.space.observation_dim, job.env.space.action_dim) == (10, 2)
    scores = job.evaluate()
    assert {"eval/success", "eval/distance"} <= scores.keys() and scores["eval/length"] <= 50
