"""Where metrics go: by name, by dotted path, offline, going on in the same run, and never ending a run."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from logger_cases import SEEN
from run_cases import ALLOW, LANGUAGE

import unified_rl as ur
from unified_rl.errors import ConfigError
from unified_rl.training import loggers
from unified_rl.training.checkpoint import checkpoints
from unified_rl.training.loggers import Kept, MlflowLogger, TrackioLogger, read_notes
from unified_rl.training.metrics import MetricLog
from unified_rl.training.run import resume, train

HERE = (*ALLOW, "logger_cases")
SMALL = (*LANGUAGE, "steps=64", "eval_every=32", "log_every=16", "checkpoint_every=16", "eval_episodes=2",
         "samples_rows=2", "keep_checkpoints=9", "progress=false")  # fmt: skip


def needs(package: str) -> Any:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}")


def run_with(folder: Path, names: str) -> Path:
    return train(ur.compose([*SMALL, f"logger=[{names}]", f"run_dir={folder}"], allow=HERE), HERE)


def cut(run: Path, updates: int) -> None:
    """Leaves a run as a kill left it some time after the checkpoint of an update."""
    for later in checkpoints(run / "checkpoints"):
        if int(later.name.removeprefix("step_")) > updates:
            shutil.rmtree(later)


def test_the_record_alone_is_written_where_no_logger_is_wanted(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", "")
    names = {path.name for path in run.iterdir()}
    assert "metrics.jsonl" in names and not names & {"metrics.csv", "tensorboard", "loggers.json"}
    assert len(ur.Run(run).metrics()) == 5


def test_a_logger_of_ones_own_is_given_every_row_and_every_sample_once(tmp_path: Path) -> None:
    SEEN.clear()
    run = run_with(tmp_path / "run", "csv,logger_cases:Notes")
    logged = [what for kind, what in SEEN if kind == "log"]
    assert SEEN[0] == ("begin", []) and SEEN[-1] == ("end", None) and logged == [0, 1, 2, 3, 4]
    assert [what for kind, what in SEEN if kind == "samples"] == [
        ("eval", 0, 2), ("train", 2, 2), ("eval", 2, 2), ("train", 4, 2), ("eval", 4, 2)]  # fmt: skip
    cut(run, 2)
    SEEN.clear()
    resume(str(run), allow=HERE)
    assert SEEN[0] == ("begin", [0, 1, 2]) and not [1 for kind, _ in SEEN if kind in ("log", "samples")]
    assert [row["update"] for row in ur.Run(run).metrics()] == [0, 1, 2, 3, 4]
    SEEN.clear()
    resume(str(run), steps=96, allow=HERE)
    assert [what for kind, what in SEEN if kind == "log"] == [5, 6]


def test_what_was_handed_out_is_remembered_over_two_kills(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", "logger_cases:Notes")
    cut(run, 3)
    log = MetricLog(run, 3, loggers.make_loggers(["logger_cases:Notes"], HERE))
    log.close()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4 and read_notes(run)[0] == 4
    SEEN.clear()
    log = MetricLog(run, 1, loggers.make_loggers(["logger_cases:Notes"], HERE))
    for update in range(2, 7):
        log.write(update, 16 * update, 0.0, {"x": 1.0})
    assert [what for kind, what in SEEN if kind == "log"] == [5, 6]


def test_one_logger_may_be_named_without_a_list(tmp_path: Path) -> None:
    run = train(ur.compose([*SMALL, "logger=csv", f"run_dir={tmp_path / 'run'}"], allow=ALLOW), ALLOW)
    names = {path.name for path in run.iterdir()}
    assert "metrics.csv" in names and "tensorboard" not in names
    with pytest.raises(ConfigError, match="logger has no 'csw'; did you mean 'csv'"):
        train(ur.compose([*SMALL, "logger=csw", f"run_dir={tmp_path / 'none'}"], allow=ALLOW), ALLOW)


def test_a_budget_that_is_spent_already_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(ur.compose([*SMALL, "logger=csv", f"run_dir={tmp_path / 'run'}"], allow=ALLOW), ALLOW)
    capsys.readouterr()
    resume(str(run), 1, ALLOW)
    assert "steps already, so nothing is left up to steps=1" in capsys.readouterr().err


def test_a_logger_that_fails_is_one_line_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SEEN.clear()
    run = run_with(tmp_path / "run", "logger_cases:Breaks")
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "logger=logger_cases:Breaks failed" in error
    assert "ConnectionError: the server is gone" in error
    assert [what for kind, what in SEEN if kind == "log"] == [0, 1, 2] and len(ur.Run(run).metrics()) == 5


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("tensorbord", "did you mean 'tensorboard'"),
        ("csv,csv", "names 'csv' twice"),
        ("other_package.Logger", "outside the allowed packages"),
    ],
)
def test_what_is_no_logger_is_refused(names: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        run_with(tmp_path / "run", names)


def test_a_package_that_is_missing_is_one_line_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "PACKAGES", {"wandb": "no_such_package", "trackio": "trackio", "mlflow": "mlflow"})
    with pytest.raises(ConfigError, match=r"pip install 'unified-rl\[wandb\]'"):
        loggers.make_loggers(["wandb"])


@pytest.mark.parametrize("text", ["{", "[]", '{"handed": "x", "ids": {"wandb": "../../evil"}}', '{"handed": 3}'])
def test_notes_that_say_nothing_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "loggers.json").write_text(text)
    assert read_notes(tmp_path) == (-1, {})


# ------------------------------------------------------------------------------------- the three of others, offline

ROWS = [{"update": u, "steps": 8 * u, "wall_seconds": 0.1, "chi2": 0.5, "chi2/sequence": 1.0, "loss": float(u)}
        for u in range(4)]  # fmt: skip
SAMPLES = [{"update": 1, "steps": 8, "split": "eval", "prompt": "1+1=\x1b", "answer": "2", "reference": "2",
            "reward": 1.0, "rewards": {"correct": 1.0}, "advantage": None, "truncated": False, "policy_version": 1}
           ]  # fmt: skip


def given(log: Any, folder: Path, ids: dict[str, str], rows: list[dict[str, Any]]) -> None:
    log.begin(Kept(folder, [], -1, {"seed": 1, "choices": {"env": "x"}}, ids))
    for row in rows:
        log.log(row)
    log.samples(SAMPLES)
    log.end()


@needs("trackio")
def test_trackio_goes_on_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sqlite3

    where = os.environ.get("TRACKIO_DIR")
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)
    log, ids = TrackioLogger(), dict[str, str]()
    given(log, tmp_path, ids, ROWS[:2])
    given(TrackioLogger(), tmp_path, ids, ROWS[2:])
    folder = Path(where or os.environ["TRACKIO_DIR"])
    with sqlite3.connect(folder / "unified-rl.db") as base:
        found = base.execute("select step, metrics from metrics where run_name = ?", (tmp_path.name,)).fetchall()
    assert sorted(step for step, _ in found) == [0, 1, 2, 3]
    assert sorted(json.loads(metrics)["loss"] for _, metrics in found) == [0.0, 1.0, 2.0, 3.0]


@needs("mlflow")
def test_mlflow_goes_on_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    ids: dict[str, str] = {}
    given(MlflowLogger(), tmp_path, ids, ROWS[:2])
    given(MlflowLogger(), tmp_path, ids, ROWS[2:])
    client = MlflowClient(tracking_uri=loggers._local_store(tmp_path))
    history = client.get_metric_history(ids["mlflow"], "loss/value")
    assert [(one.step, one.value) for one in history] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]
    run = client.get_run(ids["mlflow"])
    assert run.info.status == "FINISHED" and run.data.params == {"env": "x"}
    assert run.data.metrics["chi2/sequence"] == 1.0
    (text,) = tmp_path.rglob("eval_00000001.md")
    assert "1+1=\\x1b" in text.read_text().replace("&#92;", "\\")


@needs("wandb")
def test_wandb_writes_into_the_run_folder_and_goes_on_under_the_same_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    run = run_with(tmp_path / "run", "wandb")
    assert "failed" not in capsys.readouterr().err
    ids = read_notes(run)[1]
    cut(run, 2)
    resume(str(run), allow=HERE)
    assert read_notes(run) == (4, ids) and len(ids["wandb"]) == 12
    parts = [part.name.rsplit("-", 1)[1] for part in (run / "wandb").glob("offline-run-*")]
    assert set(parts) == {ids["wandb"]} and list((run / "wandb").rglob("media/table/samples/*.json"))
    assert all(file.stat().st_size > 0 for file in (run / "wandb").rglob("*.wandb"))
