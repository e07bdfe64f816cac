"""Damaged files: each flipped bit, cut, emptied or missing file is one error that names it, or is gone back from."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.points import Points, failing
from safetensors import SafetensorError

import unified_rl as ur
from unified_rl import cli, files
from unified_rl.config import compose
from unified_rl.errors import CheckpointError, ConfigError, DamageError, UnifiedRLError
from unified_rl.files import MANIFEST, Manifest, read_sealed, write_sealed
from unified_rl.replay import Priority, Replay, Uniform, read_rows
from unified_rl.replay.journal import Journal
from unified_rl.training import checkpoint as checkpoint_module
from unified_rl.training import state as state_module
from unified_rl.training.checkpoint import checkpoints, intact_checkpoint, latest_checkpoint, write_checkpoint
from unified_rl.training.metrics import MetricLog, read_metrics
from unified_rl.training.run import Job, record_dataset, resume, stored_config, train
from unified_rl.training.verify import verify_folder

COMMON = ["progress=false", "eval_every=0", "eval_episodes=2"]
CONTROL = [
    "env=inverted_pendulum",  # an update a step
    "agent=sac",
    "policy.hidden=[8]",
    "agent.critic_hidden=[8]",
    "agent.learning_starts=8",
    "agent.batch_size=8",
    "rollout.random_steps=8",
    "steps=24",
    "checkpoint_every=8",
    "log_every=8",
]
LANGUAGE = [
    "env=chain_mod",
    "env.modulus=5",
    "env.terms=3",
    "policy=causal_lm_tiny",
    "policy.config.hidden_size=16",
    "policy.config.num_hidden_layers=1",
    "agent=policy_gradient",
    "correction=ppo",
    "rollout.prompts=4",
    "rollout.group_size=4",
    "rollout.staleness=1",
    "steps=64",
    "checkpoint_every=16",
    "log_every=16",
]
CAPACITY, LANES = 96, 2


def content(first: int, slots: int) -> dict[str, torch.Tensor]:
    """Rows whose every number says which row it belongs to; narrow leaves, wide ones, and one without numpy."""
    x = torch.arange(first, first + slots * LANES).view(slots, LANES) + 1
    return {
        "x": x,
        "flag": x % 3 == 0,
        "half": x.to(torch.bfloat16)[..., None].expand(slots, LANES, 3).contiguous(),
        "wide": x[..., None] * 1_000 + torch.arange(7.0),
    }


def mapped(path: Path) -> Replay:
    return Replay(CAPACITY, lanes=LANES, sampler=Priority(), storage="memmap", path=str(path), seed=3)


def act(replay: Replay) -> None:
    """A write, a draw, and new priorities."""
    replay.extend(content(replay.write_count, 1 + replay.write_count % 5))
    batch = replay.sample(9)
    replay.update_priority(batch["index"], batch["x"] % 7 + 0.5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of each domain, a saved replay, the folder of a memory-mapped one, and a recorded dataset."""
    folder = tmp_path_factory.mktemp("whole")
    for name, overrides in (("control", CONTROL), ("language", LANGUAGE)):
        train(compose([*COMMON, *overrides, f"run_dir={folder / name}"]))
    replay = mapped(folder / "mapped")
    for _ in range(60):  # wraps
        act(replay)
    replay.dumps(folder / "saved")
    replay.close()
    record_dataset(Job(stored_config(folder / "control")), folder / "dataset", batches=1)
    return folder


KINDS = ("control", "language", "saved", "mapped", "dataset")


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Callable[[str], Path]:
    def make(kind: str) -> Path:
        return Path(shutil.copytree(whole / kind, tmp_path / kind))

    return make


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def name_in(file: Path, error: BaseException) -> bool:
    return file.name in str(error)


def contents(folder: Path) -> dict[str, Any]:
    """What a memory-mapped replay holds."""
    replay = mapped(folder)
    state = replay.state_dict()
    replay.close()
    return state


def unharmed(folder: Path, state: dict[str, Any]) -> bool:
    """Whether the replay is what it was, the changed byte belonging to no live row."""
    found = contents(folder)
    return found["meta"] == state["meta"] and all(
        torch.equal(found[key], value) for key, value in state.items() if key != "meta"
    )


# ------------------------------------------------------------------------------------------- every file


def test_everything_whole_is_found_whole(whole: Path) -> None:
    lines = [line for kind in KINDS for line in verify_folder(whole / kind)]
    assert sum("step_" in line for line in lines) == 5 and all(line.startswith("intact: ") for line in lines)


def test_none_of_500_flipped_bits_is_silent(copy: Callable[[str], Path]) -> None:
    rng = random.Random(7)
    folders = {kind: copy(kind) for kind in KINDS}
    state = contents(folders["mapped"])
    found = {kind: files_of(folder) for kind, folder in folders.items()}
    unowned = 0
    for number in range(500):
        kind = KINDS[number % len(KINDS)]
        file = rng.choice(found[kind])
        data = file.read_bytes()
        flipped = bytearray(data)
        at = rng.randrange(len(data))
        flipped[at] ^= 1 << rng.randrange(8)
        file.write_bytes(flipped)
        try:
            verify_folder(folders[kind])
        except DamageError as error:
            assert name_in(file, error), (file, at, error)
        else:
            assert kind == "mapped" and unharmed(folders[kind], state), (file, at)
            unowned += 1
        file.write_bytes(data)
    assert unowned < 60  # of 100: most of the bytes of a ring belong to live rows, most of its journal is padding
    for folder in folders.values():
        verify_folder(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_cut_zeroed_emptied_and_missing_files_are_named(kind: str, copy: Callable[[str], Path]) -> None:
    folder = copy(kind)
    state = contents(folder) if kind == "mapped" else {}
    for file in files_of(folder):
        data = file.read_bytes()
        tail = len(data) - max(1, len(data) // 3)
        for damaged in (data[:-1], data[:tail], data[:tail] + bytes(len(data) - tail), b"", None):
            if damaged == data:
                continue
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            try:
                verify_folder(folder)
            except DamageError as error:
                assert name_in(file, error), (file, error)
            else:
                assert kind == "mapped" and damaged is not None and unharmed(folder, state), file
            file.write_bytes(data)
    verify_folder(folder)


# ------------------------------------------------------------------------------------------- the readers


def flip(file: Path, at: float = 0.6) -> None:
    data = bytearray(file.read_bytes())
    data[int(at * len(data))] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["state.json", "state.safetensors", MANIFEST])
def test_readers_of_a_run_go_back_to_the_newest_intact_checkpoint_and_say_so(
    name: str, copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy("control")
    older, newer = checkpoints(run / "checkpoints")
    want = ur.load_policy(run, 16).state_dict()
    flip(newer / name)
    (run / "checkpoints" / "step_zzz").mkdir()
    (run / "checkpoints" / ".writing_000000000099").mkdir()

    def says(read: Callable[[], Any]) -> Any:
        capsys.readouterr()
        value = read()
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and name in said and f"going back to {older}" in said
        return value

    policy = says(lambda: ur.load_policy(run))
    assert all(torch.equal(value, want[key]) for key, value in policy.state_dict().items())
    says(lambda: ur.evaluate(run, episodes=1))
    warm = compose([*COMMON, *CONTROL, "warm_start=from_run", f"warm_start.run={run}"])
    says(lambda: Job(warm).warm_start(lambda *unused: None))
    with pytest.raises(DamageError, match=r"step_0+24"):
        ur.load_policy(run, 24)
    flip(older / name)
    for read in (lambda: ur.load_policy(run), lambda: resume(str(run)), lambda: ur.evaluate(run)):
        with pytest.raises(DamageError, match=r"no checkpoint of .* is intact"):
            read()


def test_a_damaged_replay_of_a_checkpoint_stops_resume_alone(
    copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy("control")
    flip(next((latest_checkpoint(run) / "replay").glob("rows-*")))
    ur.load_policy(run)  # which needs no rows
    assert capsys.readouterr().err == ""
    resume(str(run))
    assert "rows-" in capsys.readouterr().err


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if not any(word in k for word in ("time", "second", "speed"))}


def test_a_run_resumed_from_an_older_checkpoint_ends_as_it_had(
    copy: Callable[[str], Path], whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy("control")
    older, newer = checkpoints(run / "checkpoints")
    assert cli.main(["train", f"resume={run}", "--checkpoint", "16"]) == 0
    assert "set_aside_step_000000000024" in capsys.readouterr().err
    assert (run / "checkpoints" / f"set_aside_{newer.name}").is_dir()
    states = [intact_checkpoint(folder)[1]["agent"]["policy"] for folder in (run, whole / "control")]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items() if torch.is_tensor(value))
    rows = [list(map(untimed, read_metrics(folder / "metrics.jsonl"))) for folder in (run, whole / "control")]
    assert rows[0] == rows[1]
    verify_folder(run)
    assert cli.main(["train", f"resume={run}", "--checkpoint", "17"]) == 2
    assert "no checkpoint 17; it holds 16, 24" in capsys.readouterr().err
    assert cli.main(["evaluate", str(run), "--checkpoint", str(older)]) == 0
    assert cli.main(["train", *COMMON, *CONTROL, "--checkpoint", "16"]) == 2


def test_a_checkpoint_of_elsewhere_is_none_to_go_on_from(
    copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy("control")
    older = checkpoints(run / "checkpoints")[0]
    other = shutil.copytree(older, run.parent / older.name)
    assert cli.main(["train", f"resume={run}", "--checkpoint", str(other)]) == 2
    assert f"{other} is not a checkpoint of the run {run}" in capsys.readouterr().err


def test_a_later_checkpoint_does_not_shadow_one_that_was_gone_back_to(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (100, 200, 300):
        write_checkpoint(folder, step, {"x": step}, keep=9)
    with pytest.raises(KeyboardInterrupt), cut_before_rename(1, folder):
        checkpoint_module.set_aside_newer(folder, 100)
    assert [path.name for path in checkpoints(folder)] == ["step_000000000100", "step_000000000200"]
    checkpoint_module.set_aside_newer(folder, 100)
    write_checkpoint(folder, 150, {"x": 150}, keep=9)
    assert intact_checkpoint(tmp_path)[1]["x"] == 150
    write_checkpoint(folder, 200, {"x": 201}, keep=9)
    checkpoint_module.set_aside_newer(folder, 150)
    assert {path.name for path in folder.glob("set_aside*")} == {
        "set_aside_step_000000000200",
        "set_aside_step_000000000200-2",
        "set_aside_step_000000000300",
    }


def test_a_removed_checkpoint_is_told_and_all_of_them_removed_is_an_error(
    copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy("control")
    older, newer = checkpoints(run / "checkpoints")
    shutil.rmtree(newer)
    ur.load_policy(run)
    assert f"{newer} is missing; going back to {older}" in capsys.readouterr().err
    shutil.rmtree(older)
    for read in (lambda: resume(str(run)), lambda: ur.evaluate(run)):
        with pytest.raises(DamageError, match="holds no checkpoint"):
            read()
    assert len(read_metrics(run / "metrics.jsonl")) == 4  # nothing was trained anew


@pytest.mark.parametrize("name", ["config.yaml", "meta.json", "metrics.jsonl", "metrics.csv", MANIFEST])
def test_a_changed_file_of_a_run_is_refused_until_it_is_accepted(
    name: str, copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy("control")
    whole = (run / name).read_bytes()
    flip(run / name)
    assert cli.main(["train", f"resume={run}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and name in error and f"unified-rl verify {run} --accept" in error
    assert cli.main(["verify", str(run)]) == 2
    (run / name).write_bytes(whole)
    if name == "config.yaml":
        (run / name).write_bytes(whole.replace(b"log_every: 8", b"log_every: 4"))
        assert cli.main(["evaluate", str(run)]) == 2
    assert cli.main(["verify", str(run), "--accept"]) == 0
    assert cli.main(["train", f"resume={run}"]) == 0


def test_a_study_a_dataset_and_a_table_name_the_damaged_file(copy: Callable[[str], Path], tmp_path: Path) -> None:
    from unified_rl.study.plot import load_run
    from unified_rl.study.table import export

    run, dataset, saved = copy("control"), copy("dataset"), copy("saved")
    flip(run / "metrics.csv")
    with pytest.raises(DamageError, match=r"metrics\.csv"):
        export([run], tmp_path / "out")
    flip(run / "metrics.jsonl")
    with pytest.raises(DamageError, match=r"metrics\.jsonl"):
        load_run(run, "agent")
    flip(dataset / "replay.json")
    with pytest.raises(DamageError, match=r"replay\.json"):
        read_rows(dataset)
    meta = read_sealed(saved / "replay.json")
    for name in ("../outside.safetensors", "/etc/passwd", ""):
        write_sealed(saved / "replay.json", {**meta, "rows": name})
        with pytest.raises(CheckpointError, match="no file of a replay"):
            read_rows(saved)
    with pytest.raises(ConfigError, match="holds no run"):
        verify_folder(tmp_path / "out")


# ------------------------------------------------------------------------------------------- writers


@contextmanager
def cut_before_rename(number: int, folder: Path | None = None) -> Iterator[list[Path]]:
    """Interrupted at a rename, counted from 0, of all or of those into a folder; yields the targets so far."""
    real, targets = os.replace, []

    def cut(source: Any, target: Any) -> None:
        if folder is None or Path(target).parent == folder:
            targets.append(Path(target))
            if len(targets) > number:
                raise KeyboardInterrupt
        real(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", cut)
        yield targets


class Disk:
    """What would be there after a failure of the machine: files that were flushed, and folders whose names were."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.flushed: set[Path] = set()
        self.renamed: set[Path] = set()
        self.lost: list[Path] = []
        self._fsync, self._replace = os.fsync, os.replace
        patch.setattr(os, "fsync", self.fsync)
        patch.setattr(os, "replace", self.replace)

    def fsync(self, handle: int) -> None:
        self._fsync(handle)
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        self.flushed.add(path)
        self.renamed.discard(path)

    def replace(self, source: Path, target: Path) -> None:
        inside = [source, *source.rglob("*")]
        self.lost += [path for path in inside if path not in self.flushed]
        self._replace(source, target)
        self.flushed |= {target / path.relative_to(source) for path in inside}
        self.flushed.discard(target.parent)
        self.renamed.add(target.parent)


def write_and_set_aside(folder: Path) -> None:
    write_checkpoint(folder, 1, {"x": torch.ones(2)})
    checkpoint_module.set_aside_newer(folder, 0)


def write_replay(folder: Path) -> None:
    replay = Replay(CAPACITY, lanes=LANES, sampler=Uniform())
    replay.extend(content(0, 3))
    write_checkpoint(folder, 1, {"x": torch.ones(2)}, replay)


@pytest.mark.parametrize(
    "write",
    [lambda folder: files.write_atomically(folder / "a", "x"), write_and_set_aside, write_replay],
    ids=["file", "checkpoint", "replay"],
)
def test_what_is_renamed_was_flushed_and_the_names_of_its_folder_are_after(
    write: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    write(tmp_path)
    assert tmp_path in disk.flushed and not disk.lost and not disk.renamed


def test_rows_of_metrics_are_flushed_before_the_manifest_lists_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = MetricLog(tmp_path)
    log.write(1, 8, 0.1, {"loss": 1.0})
    log.close()
    disk = Disk(monkeypatch)
    with suppress(KeyboardInterrupt), cut_before_rename(0):
        log.record("step_000000000001")
    assert tmp_path / "metrics.jsonl" in disk.flushed


def test_a_folder_agrees_with_its_manifest_wherever_a_replacement_stops(tmp_path: Path) -> None:
    Manifest(tmp_path).replace({"a": "one", "b": "one"})
    for stop in range(8):
        with suppress(KeyboardInterrupt), cut_before_rename(stop) as calls:
            Manifest.read(tmp_path).replace({"a": f"two {stop}", "b": f"three {stop}"})
        manifest = Manifest.read(tmp_path)
        manifest.check()
        assert all(len(entries) <= 2 for entries in manifest.files.values())
        assert not list(tmp_path.glob(".writing*"))
        if len(calls) == stop:
            break
    assert stop == 4 and (tmp_path / "a").read_text() == "two 4"
    Manifest.read(tmp_path).replace({"a": "x"})
    assert [len(entries) for entries in Manifest.read(tmp_path).files.values()] == [1, 1]
    (tmp_path / "a").write_text("y")
    with pytest.raises(DamageError):
        Manifest.read(tmp_path).check()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../outside", "", "."])
def test_a_manifest_lists_files_of_its_folder_alone(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "outside").write_text("mine")
    whole = {"size": 4, "sha256": files.digest(tmp_path / "outside")}
    write_sealed(folder / MANIFEST, {"files": {name: [whole]}, "notes": {}})
    with pytest.raises(DamageError, match=f"lists {name!r}, which is no file of its folder"):
        Manifest.read(folder)
    for listed in (3, [], {"a": 3}, {"a": []}, {"a": [{"size": 4}]}):
        write_sealed(folder / MANIFEST, {"files": listed or [1], "notes": {}})
        with pytest.raises(DamageError, match=MANIFEST):
            Manifest.read(folder)


def test_a_checkpoint_that_is_replaced_is_there_under_either_name(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    write_checkpoint(folder, 7, {"x": 1})
    with pytest.raises(KeyboardInterrupt), cut_before_rename(1, folder):
        write_checkpoint(folder, 7, {"x": 2})
    assert intact_checkpoint(tmp_path)[1]["x"] == 1
    write_checkpoint(folder, 8, {"x": 3})
    assert [path.name for path in sorted(folder.iterdir())] == ["step_000000000007", "step_000000000008"]


def test_a_disk_that_fills_up_inside_safetensors_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "checkpoints", 1, {"x": torch.ones(2)})

    def full(*unused: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(state_module, "save_file", full)
    with pytest.raises(CheckpointError, match="earlier checkpoints are intact"):
        write_checkpoint(tmp_path / "checkpoints", 2, {"x": torch.ones(2)})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000000000001"]


@pytest.mark.parametrize("place", ["/proc/nowhere", "/dev/null"])
def test_folders_that_cannot_be_are_one_clear_error(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    for setting in (f"run_dir={place}", f"runs={place}"):
        assert cli.main(["train", *COMMON, *CONTROL, setting]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and place in error
    with pytest.raises(CheckpointError, match=place):
        Replay(8, sampler=Uniform(), storage="memmap", path=place)


def test_no_rewrite_leaves_a_file_empty_in_between(copy: Callable[[str], Path]) -> None:
    """A resume that dies at any rename leaves the history whole."""
    run = copy("control")
    before = len(read_metrics(run / "metrics.jsonl"))
    for stop in range(6):
        with pytest.raises(KeyboardInterrupt), cut_before_rename(stop):
            resume(str(run), steps=32)
        verify_folder(run)
        assert len(read_metrics(run / "metrics.jsonl")) >= before
    resume(str(run), steps=32)
    assert len(read_metrics(run / "metrics.jsonl")) > before


# ------------------------------------------------------------------------------------------- memory-mapped rows


def test_a_live_replay_is_verified_on_demand(tmp_path: Path) -> None:
    replay = mapped(tmp_path)
    for _ in range(12):
        act(replay)
    replay.verify()
    position = int(replay.sample(1)["index"])
    for file, size in (("rows/x.memmap", 8), ("columns/use_count.bin", 4), ("columns/weight.bin", 8)):
        data = bytearray((tmp_path / file).read_bytes())
        data[position * size] ^= 64
        with open(tmp_path / file, "r+b") as handle:
            handle.write(data)
        with pytest.raises(DamageError, match=Path(file).name):
            replay.verify()
        data[position * size] ^= 64
        with open(tmp_path / file, "r+b") as handle:
            handle.write(data)
    replay.verify()
    Replay(8, sampler=Uniform()).verify()  # in memory: nothing to compare


@pytest.mark.parametrize("stays", [False, True])
def test_a_disk_that_fails_at_any_point_of_a_replay_is_one_clear_error(stays: bool, tmp_path: Path) -> None:
    def work(folder: Path) -> None:
        for rows in (5, 40):  # made, and opened again
            with closing(Replay(60, sampler=Priority(), storage="memmap", path=str(folder / "live"), seed=5)) as replay:
                while replay.write_count < rows:
                    replay.extend({"x": torch.arange(3)})
                    batch = replay.sample(2)
                    replay.update_priority(batch["index"], torch.ones(2))
                replay.verify()
        replay.dumps(folder / "saved")

    (tmp_path / "all").mkdir()
    with Points(tmp_path / "all") as points:
        work(tmp_path / "all")
    assert points.count > 60
    for number in range(points.count):
        folder = tmp_path / str(number)
        folder.mkdir()
        with Points(folder, number, failing(errno.ENOSPC), stays=stays):
            try:
                work(folder)
            except UnifiedRLError as error:
                assert str(folder) in str(error)
        work(folder)  # nothing was lost that a second try would miss


def test_a_kill_at_any_line_never_makes_whole_data_look_damaged(tmp_path: Path) -> None:
    replay = mapped(tmp_path / "live")
    for _ in range(25):
        act(replay)
    taken: list[Path] = []
    for snapshot in lines_of(lambda: act(replay), tmp_path / "live", tmp_path / "snapshots"):
        taken.append(snapshot)
        low = replay.write_count
        opened = mapped(snapshot)  # compares everything
        state = opened.state_dict()
        live = min(opened.write_count, CAPACITY)
        want = content(opened.write_count - live, live // LANES)
        assert all(torch.equal(state[f"row.{key}"], value.flatten(0, 1)) for key, value in want.items())
        assert low - 10 <= opened.write_count <= low
        opened.close()
        shutil.rmtree(snapshot)
    assert len(taken) > 60


def lines_of(run: Callable[[], None], folder: Path, out: Path) -> Iterator[Path]:
    """Copies of a folder before every line that the replay's modules run."""
    room = str(Path(sys.modules["unified_rl.replay.store"].__file__ or "").parent)
    places: dict[tuple[str, int], int] = {}

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(room):
            return None
        if event == "line":
            sys.settrace(None)
            place = (frame.f_code.co_filename, frame.f_lineno)
            if places.setdefault(place, 0) < 1:
                shutil.copytree(folder, out / str(len(list(out.iterdir())) if out.exists() else 0))
            places[place] += 1
            sys.settrace(trace)
        return trace

    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(None)
    yield from sorted(out.iterdir())


def test_names_of_files_stay_in_their_folder_and_types_are_types(copy: Callable[[str], Path]) -> None:
    folder = copy("mapped")
    meta = read_sealed(folder / "replay.json")
    (folder.parent / "outside.memmap").write_bytes(b"secret")
    for schema in ({"../../outside": [[1], "uint8"]}, {"x": [[], "load"]}, {"x": "nonsense"}, []):
        write_sealed(folder / "replay.json", {**meta, "schema": schema})
        with pytest.raises(ur.UnifiedRLError):
            mapped(folder)
    assert (folder.parent / "outside.memmap").read_bytes() == b"secret"


def test_rows_that_no_checkpoint_holds_stay_in_their_folder(tmp_path: Path) -> None:
    task = [text for text in CONTROL if text != "steps=24"]
    rows = ["replay.storage=memmap", f"replay.path={tmp_path / 'rows'}", "checkpoint_replay=false"]
    run = train(compose([*COMMON, *task, *rows, "steps=16", f"run_dir={tmp_path / 'run'}"]))
    resume(str(run), steps=24)
    assert Journal.open(tmp_path / "rows" / "journal.bin").payload["written"] == 24


def test_rows_of_an_earlier_run_are_refused_and_dropped_by_one_that_begins_again(tmp_path: Path) -> None:
    overrides = [*COMMON, *CONTROL, "replay.storage=memmap", f"replay.path={tmp_path / 'rows'}"]
    first = train(compose([*overrides, f"run_dir={tmp_path / 'one'}"]))
    with pytest.raises(ConfigError, match=r"replay\.path=.* holds 24 rows of an earlier run"):
        train(compose([*overrides, f"run_dir={tmp_path / 'two'}"]))
    shutil.rmtree(first / "checkpoints")
    manifest = Manifest.read(first)
    manifest.notes = {}  # as a kill before the first checkpoint leaves it
    manifest.write()
    final = json.loads((first / "metrics.jsonl").read_text().splitlines()[-1])
    resume(str(first))
    again = json.loads((first / "metrics.jsonl").read_text().splitlines()[-1])
    assert untimed(final) == untimed(again)
