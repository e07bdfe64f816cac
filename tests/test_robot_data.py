"""``unified-rl data``: files of others become rows, what does not fit is told with row numbers, and sets are made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

import unified_rl as ur
from unified_rl import cli
from unified_rl.errors import ConfigError, DataError, UnifiedRLError
from unified_rl.recordings.checking import check_rows, random_action
from unified_rl.recordings.columns import Options, transitions
from unified_rl.recordings.importing import FORMATS, import_data
from unified_rl.recordings.making import mixed
from unified_rl.replay import Replay, Uniform, read_rows
from unified_rl.spaces import Box, Discrete, MultiDiscrete, Space

OBSERVATION = np.arange(14, dtype=np.float64).reshape(7, 2)
ACTION = np.linspace(-1.0, 1.0, 7)[:, None]
REWARD = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
ENDS = {"terminals": np.array([0, 0, 1, 0, 0, 0, 0], bool), "timeouts": np.array([0, 0, 0, 0, 0, 1, 0], bool)}
FLAT = {"observations": OBSERVATION, "actions": ACTION, "rewards": REWARD}


def npz(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "demos.npz", **arrays)
    return folder / "demos.npz"


def read(format: str, path: Path, **options: Any) -> tuple[TensorDict, list[str]]:
    chosen = Options.of(options)
    return transitions(FORMATS[format](path, chosen), str(path), chosen.dones)


def told(rows: TensorDict, key: str) -> list[Any]:
    out: list[Any] = rows[key].int().tolist() if rows[key].dtype == torch.bool else rows[key].tolist()
    return out


# ------------------------------------------------------------------------------------------------ NumPy


def test_d4rl_arrays_become_transitions(tmp_path: Path) -> None:
    rows, notes = read(
        "npz", npz(tmp_path, **FLAT, **ENDS, **{"infos/action_log_probs": -REWARD, "infos/qpos": REWARD})
    )
    assert told(rows, "reward") == [1, 2, 3, 4, 5], "the steps that were cut (5, 6) have no next observation"
    assert told(rows, "observation") == OBSERVATION[:5].tolist()
    assert told(rows, "next_observation") == OBSERVATION[[1, 2, 2, 4, 5]].tolist()
    assert told(rows, "terminated") == [0, 0, 1, 0, 0] and told(rows, "truncated") == [0, 0, 0, 0, 1]
    assert told(rows, "episode") == told(rows, "group") == [0, 0, 0, 1, 1] and told(rows, "step") == [0, 1, 2, 0, 1]
    assert told(rows, "behavior_log_prob") == [[-1], [-2], [-3], [-4], [-5]]
    dtypes = {
        key: rows[key].dtype for key in ("observation", "next_observation", "action", "reward", "behavior_log_prob")
    }
    assert set(dtypes.values()) == {torch.float32} and rows["source"].dtype == rows["step"].dtype == torch.int64
    assert any("infos/qpos" in note for note in notes) and any("left out 2 last step(s)" in note for note in notes)


def test_stored_next_observations_lose_no_step(tmp_path: Path) -> None:
    rows, _ = read("npz", npz(tmp_path, **FLAT, **ENDS, next_observations=OBSERVATION + 2))
    assert len(rows) == 7 and told(rows, "next_observation") == (OBSERVATION + 2).tolist()
    assert told(rows, "truncated") == [0, 0, 0, 0, 0, 1, 0], "the file stops there, which is no end"
    assert told(rows, "episode") == [0, 0, 0, 1, 1, 1, 2]


def test_without_rewards_every_step_is_for_imitation(tmp_path: Path) -> None:
    rows, _ = read("npz", npz(tmp_path, obs=OBSERVATION, acts=ACTION, dones=ENDS["timeouts"]))
    assert len(rows) == 7 and "next_observation" not in rows.keys() and "reward" not in rows.keys()


@pytest.mark.parametrize(
    ("arrays", "terminated", "truncated", "episode"),
    [
        ({"dones": [0, 0, 1, 0, 0, 1, 0], "timeouts": [0, 0, 0, 0, 0, 1, 0]}, [2], [5], [0, 0, 0, 1, 1, 1, 2]),
        ({"terminated": [0, 0, 1, 0, 0, 0, 0], "dones": [0, 0, 1, 0, 0, 1, 0]}, [2], [5], [0, 0, 0, 1, 1, 1, 2]),
        ({"dones": [0, 0, 1, 0, 0, 0, 0]}, [2], [], [0, 0, 0, 1, 1, 1, 1]),
        ({"episode_starts": [1, 0, 0, 1, 0, 0, 0]}, [], [2], [0, 0, 0, 1, 1, 1, 1]),
        ({"episode_ids": [4, 4, 4, 9, 9, 9, 9]}, [], [2, 6], [0, 0, 0, 1, 1, 1, 1]),
        ({"episode_lengths": [3, 4], "terminals": [0, 0, 1, 0, 0, 0, 0]}, [2], [6], [0, 0, 0, 1, 1, 1, 1]),
        ({"is_last": [0, 0, 1, 0, 0, 0, 1], "terminals": [0, 0, 1, 0, 0, 0, 0]}, [2], [6], [0, 0, 0, 1, 1, 1, 1]),
    ],
)
def test_every_way_to_say_where_episodes_end(
    arrays: dict[str, list[int]], terminated: list[int], truncated: list[int], episode: list[int], tmp_path: Path
) -> None:
    given = {key: np.array(value) for key, value in arrays.items()}
    rows, _ = read("npz", npz(tmp_path, **FLAT, **given, next_obs=OBSERVATION + 2))
    assert rows["terminated"].nonzero().flatten().tolist() == terminated
    assert rows["truncated"].nonzero().flatten().tolist() == truncated
    assert told(rows, "episode") == episode


def test_what_dones_mean_is_told_and_can_be_said(tmp_path: Path) -> None:
    path = npz(tmp_path, **FLAT, dones=ENDS["terminals"], next_observations=OBSERVATION + 2)
    rows, notes = read("npz", path)
    assert int(rows["terminated"].sum()) == 1 and any("dones=truncated" in note for note in notes)
    rows, notes = read("npz", path, dones="truncated")
    assert int(rows["terminated"].sum()) == 0 and told(rows, "truncated") == [0, 0, 1, 0, 0, 0, 0]


def test_trajectories_of_imitation_have_one_observation_more(tmp_path: Path) -> None:
    given = {"obs": np.arange(18.0).reshape(9, 2), "acts": ACTION, "rews": REWARD, "terminal": np.array([True, False])}
    rows, _ = read("npz", npz(tmp_path, **given, indices=np.array([3]), infos=np.array([{}, {}], dtype=object)))
    assert told(rows, "observation") == given["obs"][[0, 1, 2, 4, 5, 6, 7]].tolist()
    assert told(rows, "next_observation") == given["obs"][[1, 2, 3, 5, 6, 7, 8]].tolist()
    assert told(rows, "terminated") == [0, 0, 1, 0, 0, 0, 0] and told(rows, "truncated") == [0, 0, 0, 0, 0, 0, 1]


def test_simulations_side_by_side_and_one_behind_another_are_the_same(tmp_path: Path) -> None:
    lanes = {"observations": OBSERVATION[:6].reshape(2, 3, 2).swapaxes(0, 1)}
    lanes |= {"actions": ACTION[:6].reshape(2, 3, 1).swapaxes(0, 1)}
    lanes |= {"rewards": REWARD[:6].reshape(2, 3).T, "dones": np.zeros((3, 2), bool)}
    rows, _ = read("npz", npz(tmp_path, **lanes, next_observations=lanes["observations"] + 2))
    assert told(rows, "observation") == OBSERVATION[:6].tolist() and told(rows, "episode") == [0, 0, 0, 1, 1, 1]
    assert told(rows, "reward") == REWARD[:6].tolist()


def test_unmarked_ends_are_found_where_steps_do_not_follow(tmp_path: Path) -> None:
    after = OBSERVATION + 2
    after[3] = 100.0
    rows, notes = read("npz", npz(tmp_path, **FLAT, next_observations=after))
    assert told(rows, "episode") == [0, 0, 0, 0, 1, 1, 1] and any("no ends are marked: 1" in note for note in notes)


def test_folders_and_named_fields_of_npy(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    for name, values in {**FLAT, **ENDS}.items():
        np.save(tmp_path / "parts" / f"{name}.npy", values)
    one = np.zeros(7, dtype=[("obs", "f8", 2), ("action", "f4", 1), ("reward", "f8"), ("done", "?")])
    one["obs"], one["action"], one["reward"], one["done"] = OBSERVATION, ACTION, REWARD, ENDS["terminals"]
    np.save(tmp_path / "one.npy", one)
    assert told(read("npz", tmp_path / "parts")[0], "reward") == [1, 2, 3, 4, 5]
    assert told(read("npz", tmp_path / "one.npy")[0], "reward") == [1, 2, 3, 4, 5, 6]


def test_columns_are_chosen_joined_and_whole_numbers_stay(tmp_path: Path) -> None:
    path = npz(tmp_path, joints=OBSERVATION, goal=REWARD, torque=np.arange(7), rewards=REWARD, dones=ENDS["terminals"])
    rows, _ = read("npz", path, observation=["goal", "joints"], action="torque")
    assert told(rows, "observation")[1] == [2.0, 2.0, 3.0] and rows["action"].dtype == torch.int64


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (
            {"actions": ACTION},
            "holds actions, and none of observations, observation, obs: say which .* observation=NAME",
        ),
        ({"obs": OBSERVATION, "acts": ACTION[:5], "rews": REWARD}, "observation has 7 rows, and action 5|reward has 7"),
        ({"obs": OBSERVATION, "acts": np.array(["a"] * 7)}, "column 'acts' holds <U1, which are no numbers"),
        ({"obs": OBSERVATION[:0], "acts": ACTION[:0]}, "holds no steps"),
        ({**FLAT, "episode_ids": np.arange(7)}, "only episodes of one step that were cut"),
        (
            {"obs": np.array([{}] * 7, dtype=object), "acts": ACTION},
            "column 'obs' can only be read by pickle.* refused",
        ),
        (
            {"obs": OBSERVATION, "acts": ACTION, "episode_lengths": np.array([3, 3])},
            "episodes end at step 6, and there are 7",
        ),
    ],
)
def test_arrays_that_are_no_data_set_are_one_line(arrays: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read("npz", npz(tmp_path, **arrays))
    assert "\n" not in str(caught.value)


MARKED = {**FLAT, "next_observations": OBSERVATION + 2}


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({**FLAT, "actions": np.float64(3)}, "column 'actions' is a single number"),
        ({**MARKED, "terminals": np.where(ENDS["terminals"], 1.0, np.nan)}, r"terminated is \[nan\] in row 0 \(6 of 7"),
        ({**MARKED, "dones": np.array([0, 0, 7, 0, 0, 0, 0])}, r"done is \[7\] in row 2 \(1 of 7 are so\): 0 or 1"),
        ({**MARKED, "episode_ids": np.array([0, 0, 0, np.nan, 1, 1, 1])}, r"episode is \[nan\] in row 3"),
        ({**MARKED, "rewards": np.ones((7, 3))}, "reward has 3 entries a step"),
        ({**FLAT, "next_observations": np.ones((7, 3))}, "next_observation has 3 entries, and observation 2"),
        ({**FLAT, "timeouts": np.array([0, 1, 1, 1, 1, 1, 1])}, "6 of 7 steps are cut off alone|5 of 7 steps"),
        ({**MARKED, "episode_ids": np.array([0, 1, 0, 1, 0, 1, 0])}, r"come back after others \(row 2\), and no ends"),
    ],
)
def test_columns_that_say_nothing_are_refused_with_their_row(
    arrays: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read("npz", npz(tmp_path, **arrays))
    assert "\n" not in str(caught.value)


def test_episodes_that_lie_between_one_another_are_put_in_order(tmp_path: Path) -> None:
    ids, ends = np.array([0, 1, 0, 1, 0, 1, 1]), np.array([0, 0, 0, 0, 1, 0, 1], bool)
    rows, notes = read("npz", npz(tmp_path, **FLAT, episode_ids=ids, terminals=ends))
    assert told(rows, "reward") == [1, 3, 5, 2, 4, 6, 7] and told(rows, "episode") == [0, 0, 0, 1, 1, 1, 1]
    assert told(rows, "next_observation")[0] == OBSERVATION[2].tolist()
    assert any("2 episodes lay between one another" in note for note in notes)
    again = {"episode_ids": np.array([0, 0, 1, 1, 0, 0, 1]), "terminals": np.array([0, 1, 0, 1, 0, 1, 0], bool)}
    rows, _ = read("npz", npz(tmp_path, **MARKED, **again))
    assert told(rows, "episode") == [0, 0, 1, 1, 2, 2, 3], "a number that comes back behind an end is another episode"


def test_two_arms_are_joined_to_one_action(tmp_path: Path) -> None:
    path = npz(tmp_path, observations=OBSERVATION, left=ACTION, right=-ACTION)
    rows, _ = read("npz", path, action=["left", "right"])
    assert torch.equal(rows["action"], torch.from_numpy(np.hstack([ACTION, -ACTION]).astype(np.float32)))
    with pytest.raises(ConfigError, match=r"reward=\['left', 'right'\] must be one column; observation, next_obs"):
        read("npz", path, reward=["left", "right"])


@pytest.mark.parametrize(
    ("format", "word", "expected"),
    [
        ("npz", "obs=x", "takes no obs=; did you mean 'observation'?"),
        ("npz", "rewards=x", "takes no rewards=; did you mean 'reward'?"),
        ("npz", "mask=train", "data import npz takes no mask="),
        ("minari", "reward=x", "data import minari takes no reward="),
        ("lerobot", "mask=train", "data import lerobot takes no mask="),
    ],
)
def test_an_option_that_a_format_does_not_read_is_refused(
    format: str, word: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["data", "import", format, str(npz(tmp_path, **FLAT)), str(tmp_path / "out"), word]) == 2
    assert expected in capsys.readouterr().err


def test_nothing_is_unpickled_and_nothing_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "dict.npy", np.array({"obs": 1}, dtype=object), allow_pickle=True)  # type: ignore[call-overload]
    (tmp_path / "buffer.pkl").write_bytes(b"\x80\x04N.")
    (tmp_path / "plain.npz").write_text("no archive")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    good = npz(tmp_path, **FLAT, **ENDS)
    nan = np.where(REWARD == 3, np.nan, REWARD)
    np.savez(tmp_path / "nan.npz", **{**FLAT, **ENDS, "rewards": nan})
    cases = {
        ("npz", tmp_path / "dict.npy", tmp_path / "out"): "only be read by pickle, which runs what it reads",
        ("npz", tmp_path / "buffer.pkl", tmp_path / "out"): "only be read by pickle",
        ("npz", tmp_path / "plain.npz", tmp_path / "out"): "plain.npz is no NumPy file",
        ("npz", tmp_path / "nowhere.npz", tmp_path / "out"): "there is no",
        ("npz", tmp_path / "nan.npz", tmp_path / "out"): "rewards of .* are not finite: row 2 (of 5)",
        ("npz", good, tmp_path / "full"): "exists and is not empty",
        ("npy", good, tmp_path / "out"): "did you mean 'npz'",
        ("npz", good, tmp_path / "out", "observatoin=x"): "did you mean 'observation'",
        ("npz", good, tmp_path / "out", "dones=never"): "terminated or truncated",
        ("npz", good, tmp_path / "out", "reward=rewrads"): "did you mean 'rewards'",
        ("npz", good): "2 of 3 words: unified-rl data import FORMAT PATH FOLDER",
    }
    for words, expected in cases.items():
        assert cli.main(["data", "import", *map(str, words)]) == 2, words
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(part in error for part in expected.split(".*")[-1:]), error
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ libraries


def demonstration(group: Any, steps: int, first: float, images: bool = False, after: bool = True) -> None:
    values = first + np.arange(steps + 1.0)
    for place, at in (("obs", slice(0, -1)), ("next_obs", slice(1, None))):
        if place == "obs" or after:
            group[f"{place}/eef"] = np.stack([values[at], -values[at]], 1)
            group[f"{place}/arm"] = values[at][:, None]
    if images:
        group["obs/camera"] = np.zeros((steps, 4, 4, 3), np.uint8)
    group["actions"] = np.zeros((steps, 2))
    group["rewards"], group["dones"] = np.arange(steps) == steps - 1, np.arange(steps) == steps - 1


def test_robomimic_demonstrations(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for number, steps in ((10, 2), (2, 3)):
            demonstration(file.create_group(f"data/demo_{number}"), steps, 10.0 * number, images=True)
        file["mask/train"] = np.array([b"demo_10"])
    rows, notes = read("hdf5", tmp_path / "a.hdf5")
    assert told(rows, "observation")[:2] == [[20, 20, -20], [21, 21, -21]], "arm before eef, demo_2 before demo_10"
    assert told(rows, "next_observation")[2] == [23, 23, -23] and told(rows, "episode") == [0, 0, 0, 1, 1]
    assert told(rows, "terminated") == [0, 0, 1, 0, 1]
    assert any("is arm, eef, in this order" in n for n in notes) and any("images: camera" in n for n in notes)
    rows, _ = read("hdf5", tmp_path / "a.hdf5", observation=["eef"], mask="train")
    assert told(rows, "observation") == [[100, -100], [101, -101]]
    for options, words in (
        ({"observation": ["eff"]}, "did you mean 'eef'"),
        ({"mask": "trian"}, "did you mean 'train'"),
    ):
        with pytest.raises(DataError, match=words):
            read("hdf5", tmp_path / "a.hdf5", **options)


def test_flat_hdf5_is_d4rl_and_reads_no_other_file(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "d4rl.hdf5", "w") as file:
        for name, values in {**FLAT, **ENDS, "infos/action_log_probs": REWARD}.items():
            file[name] = values
    rows, _ = read("hdf5", tmp_path / "d4rl.hdf5")
    assert told(rows, "reward") == [1, 2, 3, 4, 5] and told(rows, "behavior_log_prob")[0] == [1.0]
    with h5py.File(tmp_path / "links.hdf5", "w") as file:
        file["observations"] = h5py.ExternalLink(str(tmp_path / "d4rl.hdf5"), "/observations")
        file["actions"] = ACTION
    with pytest.raises(DataError, match="holds actions, and none of observations"):
        read("hdf5", tmp_path / "links.hdf5")
    with h5py.File(tmp_path / "virtual.hdf5", "w") as file:
        layout = h5py.VirtualLayout((7, 2), "f8")
        layout[:] = h5py.VirtualSource(str(tmp_path / "d4rl.hdf5"), "observations", (7, 2))
        file.create_virtual_dataset("observations", layout)
    with pytest.raises(DataError, match="observations lies in another file"):
        read("hdf5", tmp_path / "virtual.hdf5")
    (tmp_path / "text.hdf5").write_text("no")
    with pytest.raises(DataError, match="cannot be read as HDF5"):
        read("hdf5", tmp_path / "text.hdf5")


def test_a_folder_of_hdf5_files_is_an_episode_a_file(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    for number, steps in ((10, 2), (2, 3)):
        with h5py.File(tmp_path / f"episode_{number}.hdf5", "w") as file:
            file["observations/qpos"] = np.full((steps, 2), number)
            file["observations/effort"] = np.full((steps, 1), -number)
            file["observations/images/top"] = np.zeros((steps, 4, 4, 3), np.uint8)
            file["action"] = np.zeros((steps, 2))
    rows, notes = read("hdf5", tmp_path)
    assert told(rows, "observation") == [[-2, 2, 2]] * 3 + [[-10, 10, 10]] * 2
    assert told(rows, "episode") == [0, 0, 0, 1, 1]
    assert any("is observations/effort, observations/qpos, in this order" in note for note in notes)
    assert any("2 files, an episode each" in note for note in notes)
    assert read("hdf5", tmp_path, observation=["observations/qpos"])[0]["observation"].shape == (5, 2)
    with h5py.File(tmp_path / "episode_3.hdf5", "w") as file:
        file["observations/qpos"], file["action"] = np.zeros((2, 3)), np.zeros((2, 2))
    with pytest.raises(DataError, match="holds other columns than episode_2"):
        read("hdf5", tmp_path)
    with pytest.raises(DataError, match=r"is of shape \[3\] in episode 1, and of shape \[2\] in episode 0"):
        read("hdf5", tmp_path, observation=["observations/qpos"])
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"holds no \.hdf5 or \.h5 files"):
        read("hdf5", tmp_path / "none")


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for number in range(3):
            demonstration(file.create_group(f"data/demo_{number}"), 3, 0.0)
    parquet = next(lerobot(tmp_path / "lerobot", "v3.0").rglob("*.parquet"))
    stream, refused = np.random.default_rng(0), {"hdf5": 0, "lerobot": 0}
    for format, path, place in (("hdf5", tmp_path / "a.hdf5", None), ("lerobot", tmp_path / "lerobot", parquet)):
        inner = place or path
        whole = inner.read_bytes()
        for _ in range(40):
            damaged = np.frombuffer(whole, np.uint8).copy()
            damaged[stream.integers(len(damaged), size=30)] = stream.integers(256, size=30)
            inner.write_bytes(damaged.tobytes())
            try:
                read(format, path)
            except UnifiedRLError as error:
                refused[format] += 1
                assert "\n" not in str(error) and str(path) in str(error)
    assert min(refused.values()) > 5, refused


def minari_set(folder: Path, **spaces: Any) -> Path:
    """A Minari folder of two episodes, written by Minari."""
    pytest.importorskip("h5py")
    minari = pytest.importorskip("minari")
    from minari.data_collector.episode_buffer import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage

    (folder / "data").mkdir()
    storage = MinariStorage.new(folder / "data", **spaces)
    episodes = []
    for number, steps in enumerate((2, 3)):
        values = np.arange(steps + 1.0, dtype=np.float32) + 10 * number
        last = np.arange(steps) == steps - 1
        episodes.append(
            EpisodeBuffer(
                id=number,
                observations={"place": np.stack([values, -values], 1), "mode": np.arange(steps + 1) % 3},
                actions=np.arange(steps) + 5,
                rewards=np.ones(steps),
                terminations=last & (number == 0),
                truncations=last & (number == 1),
                infos={"success": np.append(False, last)},
            )
        )
    storage.update_episodes(episodes)
    storage.update_metadata({"dataset_id": "test/set-v0", "minari_version": minari.__version__})
    return folder


def test_minari_folders(tmp_path: Path) -> None:
    spaces = pytest.importorskip("gymnasium").spaces
    inside = {"place": spaces.Box(-np.inf, np.inf, (2,), np.float32), "mode": spaces.Discrete(3)}
    folder = minari_set(tmp_path, observation_space=spaces.Dict(inside), action_space=spaces.Discrete(4, start=5))
    rows, _ = read("minari", folder)
    flat = spaces.utils.flatten(spaces.Dict(inside), {"mode": 1, "place": np.array([1.0, -1.0], np.float32)})
    assert told(rows, "observation")[1] == flat.tolist() and told(rows, "next_observation")[0] == flat.tolist()
    assert told(rows, "action") == [[0], [1], [0], [1], [2]], "choices are counted from 0"
    assert told(rows, "terminated") == [0, 1, 0, 0, 0] and told(rows, "truncated") == [0, 0, 0, 0, 1]
    assert told(rows, "success") == [0, 1, 0, 0, 1] and told(rows, "episode") == [0, 0, 1, 1, 1]
    assert read("minari", folder / "data", observation=["place"])[0]["observation"].shape == (5, 2)
    path = folder / "data" / "metadata.json"
    meta = json.loads(path.read_text())
    spec = json.dumps({"id": "x-v0", "entry_point": "os:system"})
    for changed, words in (
        ({"observation_space": None, "env_spec": spec}, "would have to import an environment"),
        ({"minari_version": "99.0"}, r"written by Minari 99\.0"),
    ):
        path.write_text(json.dumps({**meta, **changed}))
        with pytest.raises(DataError, match=words):
            read("minari", folder)
    with pytest.raises(DataError, match="is no Minari data set"):
        read("minari", tmp_path / "nowhere")


def lerobot(folder: Path, version: str, frames: int = 5) -> Path:
    """A LeRobot folder of two episodes: a file each in version 2, one file in version 3."""
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet as parquet

    table = {
        "observation.state": [[float(k), float(-k)] for k in range(5)],
        "action": [[0.1 * k, 0.2 * k] for k in range(5)],
        "next.reward": [0.0, 1.0, 0.0, 0.0, 1.0],
        "next.done": [False, True, False, False, True],
        "next.success": [False, True, False, False, False],
        "episode_index": [0, 0, 1, 1, 1],
        "frame_index": [0, 1, 0, 1, 2],
    }
    places = {"v2.1": {"chunk-000/episode_000001": slice(2, 5), "chunk-000/episode_000000": slice(0, 2)}}
    for name, at in places.get(version, {"chunk-000/file-000": slice(None, None, -1)}).items():
        path = folder / "data" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.table({key: values[at] for key, values in table.items()}), path)
    features: dict[str, Any] = {key: {"dtype": "float32"} for key in table}
    features["observation.images.top"] = {"dtype": "video"}
    (folder / "meta").mkdir()
    (folder / "meta" / "info.json").write_text(
        json.dumps({"codebase_version": version, "total_frames": frames, "features": features})
    )
    return folder


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_lerobot_folders(version: str, tmp_path: Path) -> None:
    rows, notes = read("lerobot", lerobot(tmp_path, version))
    assert told(rows, "observation") == [[k, -k] for k in range(5)] and told(rows, "episode") == [0, 0, 1, 1, 1]
    assert told(rows, "reward") == [0, 1, 0, 0, 1] and told(rows, "terminated") == [0, 1, 0, 0, 1]
    assert told(rows, "next_observation")[2] == [3.0, -3.0] and told(rows, "success") == [0, 1, 0, 0, 0]
    assert any("observation.images.top" in note for note in notes)
    assert read("lerobot", tmp_path, observation=["action"])[0]["observation"].shape == (5, 2)


@pytest.mark.parametrize(
    ("version", "frames", "words"),
    [("v1.6", 5, "format v1.6; versions 2 and 3"), ("v3.0", 9, "incomplete: .* 9 frames, its Parquet files hold 5")],
)
def test_lerobot_folders_that_are_not_whole_are_refused(version: str, frames: int, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        read("lerobot", lerobot(tmp_path, version, frames))


@pytest.mark.parametrize(("format", "package"), [("hdf5", "h5py"), ("minari", "minari"), ("lerobot", "pyarrow")])
def test_a_library_that_is_missing_is_named(
    format: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ConfigError, match=r"needs .*: pip install 'unified-rl\["):
        FORMATS[format](tmp_path, Options())


# ------------------------------------------------------------------------------------------------ use


@pytest.fixture(scope="module")
def hopping(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of random steps of a pendulum on a cart, and the same steps as an ``.npz`` of somebody else."""
    folder = tmp_path_factory.mktemp("steps")
    ur.data("make", "inverted_pendulum", "random", folder / "rows", steps=160, seed=1)
    rows = read_rows(folder / "rows")
    columns = {"observations": "observation", "actions": "action", "rewards": "reward", "terminals": "terminated",
               "next_observations": "next_observation", "episode_ids": "episode"}  # fmt: skip
    np.savez(folder / "demos.npz", **{name: rows[key].numpy() for name, key in columns.items()})
    return folder / "rows", folder / "demos.npz"


RUN = ["env=inverted_pendulum", "progress=false", "eval_episodes=1", "eval_every=0", "threads=1", "policy.hidden=[8]"]
OFFLINE = ["agent.critic_hidden=[8]", "agent.batch_size=16", "agent.learning_starts=16"]


def test_an_imported_folder_is_all_that_agents_need(hopping: tuple[Path, Path], tmp_path: Path) -> None:
    """No ``discount`` column: a run gives one-step transitions its own, and an offline agent learns from them."""
    data = tmp_path / "rows"
    ur.data("import", "npz", hopping[1], data, env="inverted_pendulum")
    assert "discount" not in read_rows(data).keys()
    stored = [f"rollout.data={data}", "rollout.rows=16", "steps=32"]
    for name, words in {
        "bc": ["agent=behavior_cloning", *stored],
        "iql": ["recipe=iql", *stored, *OFFLINE, "agent.updates_per_step=0.25", "agent.gamma=0.9"],
        "td3_bc": ["recipe=td3_bc", *stored, *OFFLINE, "agent.updates_per_step=0.25"],
        "rlpd": ["recipe=rlpd", f"replay.data={data}", "steps=20", "rollout.random_steps=4", *OFFLINE],
    }.items():
        run = ur.train([*RUN, *words, f"run_dir={tmp_path / name}"])
        assert any(key.startswith("loss/") for key in run.metrics()[-1]), name


def test_a_run_refuses_with_the_words_of_the_check(
    hopping: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    degrees = dict(np.load(hopping[1]))
    degrees["actions"] = 57.0 * degrees["actions"]
    np.savez(tmp_path / "demos.npz", **degrees)
    words = ["data", "import", "npz", str(tmp_path / "demos.npz"), str(tmp_path / "rows")]
    assert cli.main([*words, "env=inverted_pendulum"]) == 2
    error = capsys.readouterr().err
    assert "% of the actions" in error and "(nothing was written)" in error and not (tmp_path / "rows").exists()
    assert cli.main(words) == 0, "without an environment nobody knows"
    assert cli.main(["data", "check", str(tmp_path / "rows"), "env=inverted_pendulum"]) == 1
    out = capsys.readouterr().out
    (line,) = [line.removeprefix("error: ") for line in out.splitlines() if line.startswith("error: ")]
    told = line.replace(str(tmp_path / "rows"), "")
    for setting, choice in (("rollout.data", "recipe=iql"), ("replay.data", "recipe=rlpd")):
        run = [*RUN, choice, f"{setting}={tmp_path / 'rows'}", f"run_dir={tmp_path / setting}"]
        assert cli.main(["train", *run]) == 2
        assert told in capsys.readouterr().err.replace(f"{setting}={tmp_path / 'rows'}", "")


def test_what_is_no_folder_of_rows_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("minari/data/metadata.json", "lerobot/meta/info.json", "run/config.yaml"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "demos.npz").write_bytes(b"PK")
    for name, expected in (
        ("minari", "is a data set of Minari: 'unified-rl data import minari"),
        ("lerobot", "is a data set of LeRobot"),
        ("run", "is a run: 'unified-rl evaluate"),
        ("demos.npz", "is a file, but rows are read from a folder"),
        ("nowhere", "does not exist; 'unified-rl data import'"),
    ):
        for words in (["data", "show", str(tmp_path / name)], ["train", *RUN, "agent=behavior_cloning",
                      f"rollout.data={tmp_path / name}", f"run_dir={tmp_path / 'out'}"]):  # fmt: skip
            assert cli.main(words) == 2
            error = capsys.readouterr().err
            assert expected in error and error.count("\n") == 1, (words, error)


def test_rows_without_rewards_are_refused_before_an_offline_run(
    hopping: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "rows", read_rows(hopping[0]).exclude("reward", "next_observation"))
    for setting, recipe in (("rollout.data", "iql"), ("replay.data", "rlpd")):
        run = [*RUN, f"recipe={recipe}", f"{setting}={tmp_path / 'rows'}", f"run_dir={tmp_path / recipe}"]
        assert cli.main(["train", *run, *OFFLINE]) == 2
        error = capsys.readouterr().err
        assert "reward, " in error and "lack" in error and error.count("\n") == 1, "nothing was evaluated"
        assert not (tmp_path / recipe).exists()


def test_a_set_that_fits_has_exit_code_0(hopping: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "check", str(hopping[0]), "env=inverted_pendulum", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] and {one["level"] for one in told["findings"]} <= {"note"}
    assert cli.main(["data", "check", str(hopping[0]), "env=hopper"]) == 1
    out = capsys.readouterr().out
    assert "observations of 4 entries, but the environment's have 11" in out and "actions of 1 entries" in out
    for words, expected in (
        (["check", str(hopping[0])], "needs an environment, for example env=half_cheetah"),
        (["check", str(hopping[0]), "env=chain_mod"], "of language"),
        (["check", str(hopping[0]), "env=hopper", "sed=1"], "takes no sed="),
        (["chekc", str(hopping[0])], "did you mean 'check'"),
        (["show", str(hopping[0]), "--steps", "4"], "data show takes no --steps"),
        ([], "data does nothing"),
    ):
        assert cli.main(["data", *words]) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1


class Plain:
    """An environment of two numbers, of which a check needs random steps alone."""

    domain, num_envs, max_steps, name = "control", 4, 5, "Plain"

    def __init__(self) -> None:
        self.stream = torch.Generator().manual_seed(0)

    def policy_inputs(self) -> dict[str, Any]:
        return {"space": Space.flat(2, 1, [-1.0], [1.0])}

    def reset_batch(self, seed: int | None = None) -> torch.Tensor:
        return torch.randn(4, 2, generator=self.stream)

    def step_batch(self, action: torch.Tensor) -> ur.StepResult:
        flag, after = torch.zeros(4, dtype=torch.bool), self.reset_batch()
        return ur.StepResult(after, action[:, 0], flag, flag, after, torch.ones(4, dtype=torch.int64), {})


def plain(n: int = 20, **changed: Any) -> TensorDict:
    """Rows of four episodes that fit, but for what is changed."""
    stream = torch.Generator().manual_seed(1)
    observation, step = torch.randn(n, 2, generator=stream), torch.arange(n)
    columns = {
        "observation": observation,
        "next_observation": torch.roll(observation, -1, 0),
        "action": torch.rand(n, 1, generator=stream) * 2 - 1,
        "reward": torch.rand(n, generator=stream),
        "terminated": torch.zeros(n, dtype=torch.bool),
        "truncated": step % 5 == 4,
        "episode": step // 5,
    }
    columns |= {key: change(columns) for key, change in changed.items()}
    return TensorDict({key: value for key, value in columns.items() if value is not None}, batch_size=[n])


@pytest.mark.parametrize(
    ("changed", "level", "words"),
    [
        ({"action": lambda c: None}, "error", "has no column action"),
        ({"reward": lambda c: torch.full((20,), torch.nan)}, "error", r"rewards of .* rows 0, 1, 2, 3, 4 \.\.\."),
        ({"next_observation": lambda c: c["observation"]}, "error", "in 100 % of the steps .* shifted"),
        (
            {"next_observation": lambda c: torch.roll(c["observation"], -1, 0).index_fill(0, torch.tensor([7]), 9.0)},
            "warning",
            r"in 6.25 % of the steps inside episodes .*: row 7 \(of 20\)",
        ),
        ({"action": lambda c: c["action"].index_fill(0, torch.tensor([3]), 1.5)}, "warning", r"5 % .* row 3 \(of 20\)"),
        ({"action": lambda c: torch.zeros(20, 1)}, "warning", "the same action in every row, in entries 0"),
        ({"reward": lambda c: torch.zeros(20)}, "warning", "every reward is 0"),
        ({"reward": lambda c: 100 * c["reward"]}, "warning", "rewards reach"),
        ({"observation": lambda c: 57 * c["observation"], "next_observation": lambda c: 57 * c["next_observation"]},
         "warning", "observation entry 1 spreads .* times wider .* other units"),
        ({"truncated": lambda c: c["truncated"] | (torch.arange(20) == 6)}, "warning", r"inside an episode: row 6 "),
        ({"episode": lambda c: torch.zeros(20, dtype=torch.int64)}, "warning", "environment's 5 steps begin at row 0 "),
        ({"terminated": lambda c: c["truncated"], "truncated": lambda c: c["truncated"] & False}, "warning",
         "import again with dones=truncated"),
        ({"truncated": lambda c: c["truncated"] & (torch.arange(20) < 18)}, "note", "1 of 4 episodes stop"),
        ({"next_observation": lambda c: None, "reward": lambda c: None}, "note",
         "no reward, next_observation: .*=behavior_cloning alone"),
        ({"reward": lambda c: c["reward"].double()}, "note", "reward is float64 and is used as float32"),
    ],
)  # fmt: skip
def test_each_thing_that_a_check_sees(changed: dict[str, Callable[..., Any]], level: str, words: str) -> None:
    import re

    assert [str(one) for one in check_rows(plain(), Plain(), "set")] == []
    alive = check_rows(plain(reward=lambda c: torch.ones(20), terminated=lambda c: torch.arange(20) == 3), Plain(), "")
    assert not any("every reward" in one.text for one in alive), "one for every step until it falls tells something"
    found = check_rows(plain(**changed), Plain(), "set")
    assert any(one.level == level and re.search(words, one.text) for one in found), [str(one) for one in found]
    assert all("\n" not in one.text for one in found)


# ------------------------------------------------------------------------------------------------ show and make


def save(folder: Path, rows: TensorDict) -> Path:
    replay = Replay(len(rows), sampler=Uniform())
    replay.extend(rows)
    replay.dumps(folder)
    return folder


def test_what_a_set_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    success = torch.arange(20) == 9
    ended = (torch.arange(20) % 5 == 4) & (torch.arange(20) < 18)
    rows = plain(reward=lambda c: torch.arange(20.0), success=lambda c: success, truncated=lambda c: ended)
    folder = save(tmp_path / "rows", rows)
    told = ur.data("show", folder, out=tmp_path / "returns.png")
    assert told["episodes"] == {"whole": 3, "cut": 1, "terminated": 0, "truncated": 3} and told["rows"] == 20
    assert told["returns"]["mean"] == 35.0 and told["returns"]["std"] == 25.0, "0..4, 5..9 and 10..14; the last is cut"
    assert told["returns"]["quantiles"]["0"] == 10.0 and told["returns"]["quantiles"]["0.5"] == 35.0
    assert told["lengths"]["mean"] == 5.0 and told["success"] == pytest.approx(1 / 3)
    entry = told["entries"]["observation"][1]
    assert entry["max"] == pytest.approx(float(rows["observation"][:, 1].max()))
    assert (tmp_path / "returns.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["data", "show", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "20 rows, 3 whole episodes and 1 cut ones" in out and "success  33.3 % of the whole episodes" in out
    assert cli.main(["data", "show", str(folder), "--out", "a.pdf"]) == 2 and "end in .png" in capsys.readouterr().err


def test_lanes_of_a_recorded_replay_are_read_one_behind_another(tmp_path: Path) -> None:
    replay = Replay(20, lanes=2, sampler=Uniform())
    rows = plain(reward=lambda c: torch.arange(20.0))
    replay.extend(rows.reshape(2, 10).transpose(0, 1))
    replay.dumps(tmp_path / "rows")
    told = ur.data("show", tmp_path / "rows")
    assert told["episodes"]["whole"] == 4 and told["returns"]["quantiles"]["0"] == 10.0


def test_random_steps_have_the_density_that_they_were_drawn_from() -> None:
    space = Space.flat(3, 2, [-1.0, -3.0], [1.0, 3.0])
    drawn = random_action(space, 4000, torch.Generator().manual_seed(0))
    low, high = drawn["action"].aminmax(dim=0)
    assert low.tolist() == pytest.approx([-1, -3], abs=0.01) and high.tolist() == pytest.approx([1, 3], abs=0.01)
    assert drawn["behavior_log_prob"][0].tolist() == pytest.approx([-np.log(12.0)])
    choices = random_action(Space(Box((3,)), MultiDiscrete((2, 5))), 400, torch.Generator().manual_seed(0))
    assert choices["action"].amax(0).tolist() == [1, 4] and choices["action"].dtype == torch.int64
    assert choices["behavior_log_prob"][0].tolist() == pytest.approx([-np.log(10.0)])
    half = random_action(Space(Box((3,)), Box((1,), low=0.0)), 400, torch.Generator().manual_seed(0))
    assert float(half["action"].min()) >= 0.0 and bool(half["behavior_log_prob"].isfinite().all())
    assert random_action(Space(Box((3,)), Discrete(3, start=1)), 9, torch.Generator())["action"].shape == (9, 1)


def test_sets_are_made_by_random_and_trained_policies_and_mixed(
    hopping: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = read_rows(hopping[0])
    assert len(rows) == 160 and "discount" not in rows.keys()
    inside = torch.roll(rows["episode"], -1) == rows["episode"]
    inside[-1] = False
    after = torch.roll(rows["observation"], -1, 0)
    assert torch.equal(rows["next_observation"][inside], after[inside]), "one simulation behind another"
    again = ur.data("make", "inverted_pendulum", "random", tmp_path / "again", steps=160, seed=1)
    assert torch.equal(read_rows(tmp_path / "again")["action"], rows["action"]) and again["about"]["seed"] == 1
    run = ur.train([*RUN, "agent=behavior_cloning", f"rollout.data={hopping[0]}", "rollout.rows=16", "steps=16",
                    f"run_dir={tmp_path / 'run'}"])  # fmt: skip
    told = ur.data("make", "inverted_pendulum", "expert", tmp_path / "expert", steps=48, policy=run, checkpoint=1)
    assert told["rows"] == 48 and told["about"]["policy"] == str(run) and told["about"]["checkpoint"] == 1
    assert told["about"]["return"] == pytest.approx(told["returns"]["mean"])
    parts = {str(hopping[0]): 0.75, str(tmp_path / "expert"): 0.25}
    told = ur.data("make", "inverted_pendulum", "mixed", tmp_path / "mixed", parts=parts, steps=100)
    mix, expert = read_rows(tmp_path / "mixed"), read_rows(tmp_path / "expert")
    known = {tuple(row) for row in rows["observation"].tolist()}
    assert sum(tuple(row) in known for row in mix["observation"].tolist()) == 75 and len(mix) == 100
    assert {tuple(row) for row in mix["observation"][75:].tolist()} <= {
        tuple(r) for r in expert["observation"].tolist()
    }
    assert ur.data("check", tmp_path / "mixed", env="inverted_pendulum")["fits"]
    made = ["data", "make", "inverted_pendulum"]
    out = str(tmp_path / "no")
    for words, expected in (
        (["expert", out], "--policy RUN"),
        (["medium", out, "--policy", str(tmp_path / "none")], "none"),
        (["random", out, "--policy", str(run)], "random takes none"),
        (["random", out, "--part", f"{hopping[0]}=1"], "mixed"),
        (["mixed", out], "--part FOLDER=SHARE"),
        (["mixed", out, "--part", f"{hopping[0]}=0.5"], "add up to 1"),
        (["mixed", out, "--part", str(hopping[0])], "must be FOLDER=SHARE"),
        (["mixed", out, "--part", f"{hopping[0]}=1", "--steps", "161"], "at most 160"),
        (["best", out], "no kind 'best': random, medium, expert, mixed"),
        (["random", out, "seed=-1"], "seed=-1"),
        (["random", out, "--steps", "0"], "--steps 0"),
        (["random", str(hopping[0])], "not empty"),
    ):
        assert cli.main([*made, *words]) == 2, words
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1, error
    assert cli.main(["data", "make", "hopper", "medium", out, "--steps", "4", "--policy", str(run)]) == 2
    assert "was trained in _target_=" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_parts_of_another_environment_are_not_mixed(tmp_path: Path) -> None:
    folder = save(tmp_path / "rows", plain())
    with pytest.raises(ConfigError, match=r"--part .* holds observations of 2 entries"):
        mixed({str(folder): 1.0}, Space.flat(3, 1, [-1.0], [1.0]), None, 0)


def test_rows_of_a_language_task_are_none_of_robots(tmp_path: Path) -> None:
    folder = save(tmp_path / "rows", TensorDict({"tokens": torch.zeros(4, 3, dtype=torch.int64)}, batch_size=[4]))
    for words in (("show", folder), ("check", folder)):
        with pytest.raises(UnifiedRLError, match="4 conversations of a language task"):
            ur.data(*words, env="hopper") if words[0] == "check" else ur.data(*words)


def test_import_from_python_returns_rows_and_notes(tmp_path: Path) -> None:
    rows, notes, found = import_data("npz", npz(tmp_path, **FLAT, **ENDS), tmp_path / "rows")
    saved = read_rows(tmp_path / "rows")
    assert all(torch.equal(saved[key], value) for key, value in rows.items()) and found == [] and notes


def test_sets_of_decisions_keep_the_discount_of_the_run(tmp_path: Path) -> None:
    words = ["env=inverted_pendulum", "env.frame_stack=2", "env.chunk=2", "agent.gamma=0.5", "policy.hidden=[8]"]
    small = ["agent.critic_hidden=[8]", "rollout.num_envs=2", "rollout.horizon=8", "steps=32", "eval_episodes=1"]
    run = ur.train([*words, *small, "agent=ppo", "progress=false", f"run_dir={tmp_path / 'run'}"])
    settings: dict[str, Any] = {"env.frame_stack": 2, "env.chunk": 2}
    ur.data("make", "inverted_pendulum", "expert", tmp_path / "rows", policy=str(run), steps=32, **settings)
    rows = read_rows(tmp_path / "rows")
    assert rows["observation"].shape == (32, 8) and rows["action"].shape == (32, 2)
    assert set(rows["discount"].unique().tolist()) <= {0.25, 0.5} and 0.25 in rows["discount"]
    whole = (rows["discount"] == 0.25) & ~rows["terminated"]
    assert bool(whole.any()) and bool((rows["reward"][whole] == 1.5).all())
    assert ur.data("check", tmp_path / "rows", env="inverted_pendulum", **settings)["fits"]


def test_options_of_a_folder_of_ones_own_name_the_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "env").mkdir()
    base = "# @package _global_\ndefaults:\n  - inverted_pendulum\n  - _self_\nenv:\n  frame_stack: 2\n"
    (tmp_path / "env" / "mine.yaml").write_text(base)
    given = ["--config-dir", str(tmp_path), "mine", "random", str(tmp_path / "rows"), "--steps", "32"]
    assert cli.main(["data", "make", *given]) == 0, capsys.readouterr().err
    assert read_rows(tmp_path / "rows")["observation"].shape == (32, 8)
    assert cli.main(["data", "check", str(tmp_path / "rows"), "env=mine"]) == 2
    assert cli.main(["data", "check", str(tmp_path / "rows"), "env=mine", "--config-dir", str(tmp_path)]) == 0
