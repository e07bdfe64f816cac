"""Checkpoints: exact round trips, atomic writes, clear refusals."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unified_rl.errors import CheckpointError
from unified_rl.files import MANIFEST, Manifest
from unified_rl.training import checkpoint as module
from unified_rl.training.checkpoint import checkpoints, latest_checkpoint, lock_run, read_checkpoint, write_checkpoint
from unified_rl.training.state import load_state, save_state

STATE: dict[str, Any] = {
    "tensor": torch.tensor([1.5, -2.0], dtype=torch.float64),
    "scalar": torch.tensor(3),
    "mask": torch.tensor([True, False]),
    "bytes": torch.Generator().manual_seed(3).get_state(),
    "array": np.arange(4, dtype=np.float32),
    "adam": {0: {"step": torch.tensor(2.0)}, 1: {}},
    "betas": (0.9, 0.999),
    "names": ["a", None, True, 1, 2.5],
    "rng": np.random.default_rng(1).bit_generator.state,
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b)) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_state_of_every_kind_comes_back_exactly(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 7, STATE)
    loaded = read_checkpoint(path)
    loaded.pop("format")
    assert same(STATE, loaded)


def test_an_object_that_would_need_pickle_is_refused_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="state/a/b is a object"):
        write_checkpoint(tmp_path, 1, {"a": {"b": object()}})


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        write_checkpoint(tmp_path, step, {"x": step}, keep=2)
    assert [read_checkpoint(p)["x"] for p in checkpoints(tmp_path)] == [3, 10]


def test_one_that_is_dropped_is_whole_under_its_name_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, 1, {"x": 1})

    def killed(path: Path, **options: Any) -> None:
        if path.exists() and (path / MANIFEST).exists():
            (path / MANIFEST).unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(module.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, 2, {"x": 2}, keep=1)
    monkeypatch.undo()
    assert [read_checkpoint(p)["x"] for p in checkpoints(tmp_path)] == [2]
    write_checkpoint(tmp_path, 3, {"x": 3}, keep=9)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step_000000000002", "step_000000000003"]


def test_a_full_disk_leaves_the_previous_checkpoint_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, 1, {"x": torch.ones(3)})

    def full(folder: Path, state: dict[str, Any]) -> None:
        (folder / "state.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_state", full)
    with pytest.raises(CheckpointError, match=r"No space left.*earlier checkpoints are intact"):
        write_checkpoint(tmp_path, 2, {"x": torch.zeros(3)})
    assert [p.name for p in tmp_path.iterdir()] == ["step_000000000001"]
    assert torch.equal(read_checkpoint(checkpoints(tmp_path)[-1])["x"], torch.ones(3))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_real_enospc_is_reported(tmp_path: Path) -> None:
    aside = tmp_path / ".writing_000000000002"
    original = Path.mkdir

    def mkdir(self: Path, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self == aside:
            (self / "state.json").symlink_to("/dev/full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "mkdir", mkdir)
        with pytest.raises(CheckpointError, match="intact"):
            write_checkpoint(tmp_path, 2, {"x": torch.zeros(3)})
    assert not aside.exists()


def test_damaged_missing_and_foreign_checkpoints_are_named(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "checkpoints", 1, {"x": torch.ones(3)})
    tensors = path / "state.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(path)
    tensors.unlink()
    with pytest.raises(CheckpointError, match=r"no state\.safetensors"):
        read_checkpoint(path)
    tensors.write_bytes(whole)
    packed = json.loads((path / "state.json").read_text())
    for other in (1, 99):  # 1: before batches that wait belonged to the feed
        (path / "state.json").write_text(json.dumps({**packed, "format": other}))
        Manifest.of(path, ["state.json", "state.safetensors"]).write()
        with pytest.raises(CheckpointError, match=f"format {other}, this version reads format 3"):
            read_checkpoint(path)
    (path / MANIFEST).unlink()  # as format 2 was
    with pytest.raises(CheckpointError, match="format 99, this version reads format 3"):
        read_checkpoint(path)
    (path / "state.json").write_text(json.dumps(packed))
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json cannot be read: it is missing"):
        read_checkpoint(path)
    with pytest.raises(CheckpointError, match="no run folder"):
        latest_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        latest_checkpoint(tmp_path / "empty")


def test_a_run_folder_in_use_is_refused(tmp_path: Path) -> None:
    with lock_run(tmp_path / "run"), pytest.raises(CheckpointError, match="in use"), lock_run(tmp_path / "run"):
        pass
    with lock_run(tmp_path / "run"):
        pass


def test_tensors_that_share_memory_are_stored_once_and_read_apart(tmp_path: Path) -> None:
    weight = torch.arange(1000, dtype=torch.float32)
    state = {"embedding": weight, "head": weight, "part": weight[:10], "other": weight.clone(), "empty": torch.zeros(0)}
    save_state(tmp_path, state)
    assert 8_000 < (tmp_path / "state.safetensors").stat().st_size < 9_000
    read = load_state(tmp_path)
    assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)
    read["head"][0] = -1.0
    assert float(read["embedding"][0]) == 0.0
