"""Data sets with images in their observations: made, imported, checked, shown and trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

import unified_rl as ur
from unified_rl.envs.control import GymnasiumEnv
from unified_rl.errors import ConfigError, DataError
from unified_rl.instantiate import allowing
from unified_rl.recordings.columns import joined
from unified_rl.replay import read_rows
from unified_rl.rollout.recorded import faults

SHAPE = (12, 10, 3)
CAMERA = spaces.Box(0, 255, SHAPE, np.uint8)
SPACES = {"camera": CAMERA, "both": spaces.Dict(camera=CAMERA, joints=spaces.Box(-2, 2, (3,)))}
SMALL = [
    "progress=false",
    "updates=2",
    "eval_every=0",
    "eval_episodes=1",
    "policy.hidden=[8]",
    "policy.image_features=8",
]
CRITIC = ["agent.critic_hidden=[8]", "agent.batch_size=8", "agent.learning_starts=8", "rollout.rows=16"]


class Lamp(gymnasium.Env):  # type: ignore[type-arg]
    """Four steps in front of a lamp whose brightness is the joints' mean; acting against it pays."""

    action_space = spaces.Box(-1, 1, (2,))

    def __init__(self, kind: str = "camera") -> None:
        self.kind, self.observation_space = kind, SPACES[kind]

    def _seen(self) -> Any:
        joints = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        picture = np.full(SHAPE, 128 + 100 * joints.mean(), np.uint8)
        picture[0] = self.np_random.integers(0, 255, SHAPE[1:])
        return picture if self.kind == "camera" else {"camera": picture, "joints": joints}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.count = 0
        return self._seen(), {}

    def step(self, action: Any) -> Any:
        self.count += 1
        return self._seen(), float(-action.sum()), False, self.count == 4, {}


def env(kind: str) -> dict[str, Any]:
    made = {"env.make": "test_image_data:Lamp", "env.make_kwargs.kind": kind, "env.max_episode_steps": 4}
    return {"env": "gymnasium", **made}


def recorded(path: Path, kind: str, episodes: int = 5) -> dict[str, np.ndarray]:
    """A file of somebody who stepped the environment, with next observations."""
    lamp, columns = Lamp(kind), []
    stream = np.random.default_rng(0)
    for number in range(episodes):
        seen, _ = lamp.reset(seed=number)
        for step in range(4):
            action = stream.uniform(-1, 1, 2).astype(np.float32)
            after, reward, *_ = lamp.step(action)
            parts = {"camera": seen, "next_camera": after}
            if kind == "both":
                parts = {f"{pre}{key}": one[key] for pre, one in (("", seen), ("next_", after)) for key in one}
            columns.append(
                {**parts, "actions": action, "rewards": reward, "timeouts": step == 3, "episode_ids": number}
            )
            seen = after
    arrays = {key: np.stack([one[key] for one in columns]) for key in columns[0]}
    np.savez(path, **arrays)
    return arrays


def words(kind: str) -> list[str]:
    return [f"{key}={value}" for key, value in env(kind).items()]


COLUMNS = {"camera": ["camera"], "both": ["joints", "camera"]}


@pytest.mark.parametrize("kind", SPACES)
def test_images_are_imported_as_bytes_and_trained_on(kind: str, tmp_path: Path) -> None:
    arrays = recorded(tmp_path / "seen.npz", kind)
    options = {"observation": COLUMNS[kind], "next_observation": [f"next_{name}" for name in COLUMNS[kind]]}
    folder = tmp_path / "rows"
    given = {**options, **env(kind), "allow": ["test_image_data"]}
    told = ur.data("import", "npz", tmp_path / "seen.npz", folder, **given)
    assert told["rows"] == 20 and not [one for one in told["findings"] if one["level"] != "note"]
    rows = read_rows(folder)
    assert rows["observation"].dtype == rows["next_observation"].dtype == torch.uint8
    pictures = rows["observation"][:, -360:].reshape(20, *SHAPE)
    np.testing.assert_array_equal(pictures, arrays["camera"])
    if kind == "both":
        numbers = rows["observation"][:, :12].contiguous().view(torch.float32)
        np.testing.assert_array_equal(numbers, arrays["joints"])
    found = ur.data("check", folder, allow=["test_image_data"], **env(kind))
    assert found["fits"] and not [one for one in found["findings"] if one["level"] == "warning"]
    shown, bytes_ = ur.data("show", folder)["entries"]["observation"], rows["observation"].double()
    assert len(shown) == 1 and shown[0]["max"] == float(bytes_.max())
    assert shown[0]["mean"] == pytest.approx(float(bytes_.mean()))
    assert shown[0]["std"] == pytest.approx(float(bytes_.std(correction=0)))
    runs = {"bc": ["agent=behavior_cloning", "rollout.rows=16"], "iql": ["recipe=iql", *CRITIC]}
    for name, more in runs.items():
        run = [*words(kind), *more, *SMALL, f"rollout.data={folder}", f"run_dir={tmp_path / name}"]
        ur.train(run, allow=["test_image_data"])
        policy = ur.load_policy(tmp_path / name, allow=["test_image_data"])
        assert policy(SPACES[kind].sample()).shape == (2,)


def test_next_observations_follow_from_the_next_rows(tmp_path: Path) -> None:
    arrays = recorded(tmp_path / "seen.npz", "camera")
    kept = {key: arrays[key] for key in ("camera", "actions", "rewards", "timeouts", "episode_ids")}
    np.savez(tmp_path / "less.npz", **kept)
    told = ur.data("import", "npz", tmp_path / "less.npz", tmp_path / "rows", observation="camera")
    rows = read_rows(tmp_path / "rows")
    assert told["rows"] == 15 and rows["next_observation"].dtype == torch.uint8
    np.testing.assert_array_equal(
        rows["next_observation"].reshape(5, 3, *SHAPE), arrays["camera"].reshape(5, 4, *SHAPE)[:, 1:]
    )


def test_sets_are_made_of_what_an_environment_shows(tmp_path: Path) -> None:
    more = {"allow": ["test_image_data"], **{k: v for k, v in env("both").items() if k != "env"}}
    ur.data("make", "gymnasium", "random", tmp_path / "rows", steps=32, **more)
    assert read_rows(tmp_path / "rows")["observation"].dtype == torch.uint8
    found = ur.data("check", tmp_path / "rows", allow=["test_image_data"], **env("both"))
    assert found["fits"] and not [one for one in found["findings"] if one["level"] == "warning"]


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    arrays = recorded(tmp_path / "seen.npz", "both")
    np.savez(tmp_path / "bright.npz", **{**arrays, "camera": arrays["camera"] / np.float32(255)})
    given = {"observation": ["camera", "joints"], "allow": ["test_image_data"], **env("both")}
    with pytest.raises(ConfigError, match="entries"):
        ur.data("import", "npz", tmp_path / "bright.npz", tmp_path / "rows", **given)
    shifted = {**arrays, "next_camera": np.roll(arrays["camera"], 3, 0)}
    np.savez(tmp_path / "shifted.npz", **shifted)
    with pytest.raises(ConfigError, match="not that of the next row"):
        given["next_observation"] = ["next_camera", "next_joints"]
        ur.data("import", "npz", tmp_path / "shifted.npz", tmp_path / "rows", **given)
    with pytest.raises(DataError, match="not finite in row 1"):
        joined([np.array([[0.0], [np.nan]]), arrays["camera"][:2]])
    lost = read_rows(_made(arrays, tmp_path))
    lost["observation"][3, :4] = torch.tensor([0, 0, 192, 127], dtype=torch.uint8)  # a NaN
    with allowing(["test_image_data"]):
        made = GymnasiumEnv(make="test_image_data:Lamp", make_kwargs={"kind": "both"}, num_envs=1, max_episode_steps=4)
    assert any("not finite: row 3" in line for line in faults(lost, made.space, "rows"))


def _made(arrays: dict[str, np.ndarray], folder: Path) -> Path:
    ur.data("import", "npz", folder / "seen.npz", folder / "good", observation=["joints", "camera"])
    return folder / "good"
