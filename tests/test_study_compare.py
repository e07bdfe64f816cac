"""Studies end to end over a stand-in trainer: order, failures, interruption, resumption, results."""

from __future__ import annotations

import csv
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from unified_rl.errors import CheckpointError, ConfigError
from unified_rl.study.compare import StudyError, compare
from unified_rl.study.display import StudyDisplay, last_row
from unified_rl.study.grid import Job
from unified_rl.study.workers import Schedule, run_jobs

TRAINER = textwrap.dedent(
    """
    import json, os, time
    from pathlib import Path

    def train(cfg, allow=(), progress=True):
        folder = Path(cfg["run_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "calls", "a") as handle:
            handle.write(f"{os.getpid()} {time.monotonic()}\\n")
        (folder / "meta.json").write_text(json.dumps({"status": "running"}))
        if cfg.get("die") and not (folder / "died").exists():
            if cfg["die"] == "once":
                (folder / "died").touch()
            os._exit(9)
        if cfg.get("fail"):
            raise ValueError("loss is NaN")
        time.sleep(cfg.get("sleep", 0))
        rows = [{"update": u, "steps": 10 * u, "wall_seconds": u, "eval/score": float(u + cfg["seed"])} for u in (0, 4)]
        rows[1:1] = [{"update": u, "steps": 10 * u, "wall_seconds": u, "ess/unit": 0.1 * u} for u in (1, 2, 3)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
        (folder / "meta.json").write_text(json.dumps({"status": "finished"}))
        return folder
    """
)


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in, in a module that worker processes can import."""
    module = tmp_path / "modules"
    module.mkdir()
    (module / "stand_in_trainer.py").write_text(TRAINER)
    monkeypatch.syspath_prepend(str(module))
    return import_module("stand_in_trainer").train


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the report out where a test is about the runs."""
    import_module("unified_rl.study.compare")
    monkeypatch.setattr(sys.modules["unified_rl.study.compare"], "write_report", lambda *args, **kwargs: "none")


def compose(overrides: list[str]) -> dict[str, Any]:
    values = dict(o.split("=", 1) for o in overrides)
    start = {"stages": []} if "warm_start" in values else None
    cfg = {"steps": int(values.get("steps", 40)), "seed": int(values["seed"]), "warm_start": start, "all": values}
    cfg["fail"] = values.get("correction") == "broken" or (values.get("bad_start") and cfg["steps"] == 0)
    return cfg


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    node = {"name": "demo", "folder": str(folder), "domains": {"control": ["env=x"]}, "corrections": ["ppo", "tis"]}
    return {"study": {**node, "workers": 0, **changes}}


def calls(folder: Path) -> dict[str, int]:
    return {path.parent.name[:-9]: len(path.read_text().splitlines()) for path in folder.glob("runs/*/calls")}


def test_results_hold_a_row_for_each_run_and_evaluation_with_the_nearest_diagnostics(
    tmp_path: Path, train: Any, no_figures: None
) -> None:
    compare(config(tmp_path / "s", seeds=[1, 2]), train=train, compose=compose, progress=False)
    with open(tmp_path / "s" / "results.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 2 * 2 * 2
    assert list(rows[0])[:7] == ["domain", "correction", "staleness", "seed", "update", "steps", "score"]
    last = rows[-1]
    assert [last[k] for k in ("correction", "seed", "update", "steps", "score")] == ["tis", "2", "4", "40", "6"]
    assert (rows[0]["ess/unit"], last["ess/unit"]) == ("0.1", "0.3")  # logged at updates 1 and 3
    with open(tmp_path / "s" / "training.csv", newline="") as handle:
        logged = list(csv.DictReader(handle))
    mine = [row for row in logged if (row["correction"], row["seed"]) == ("tis", "2")]
    assert [(row["update"], row["ess/unit"], row["eval/score"]) for row in mine] == [
        ("0", "", "2"), ("1", "0.1", ""), ("2", "0.2", ""), ("3", "0.3", ""), ("4", "", "6"),
    ]  # fmt: skip
    with open(tmp_path / "s" / "summary.csv", newline="") as handle:
        cell = next(csv.DictReader(handle))
    assert (cell["seeds"], cell["start"], cell["final_iqm"], cell["ess/unit"]) == ("2", "1.5", "5.5", "0.2")


def test_a_restarted_study_runs_nothing_that_finished(tmp_path: Path, train: Any, no_figures: None) -> None:
    folder = tmp_path / "s"
    compare(config(folder), train=train, compose=compose, progress=False)
    slug = next(p for p in (folder / "runs").iterdir() if "tis" in p.name)
    (slug / "meta.json").write_text(json.dumps({"status": "interrupted"}))
    (left,) = [p / ".writing-MANIFEST.json" for p in (folder / "runs").iterdir() if "ppo" in p.name]
    left.touch()  # by a process that was killed when all but a rename was done
    compare(config(folder), train=train, compose=compose, progress=False)
    assert calls(folder) == {"control-ppo-staleness0-seed1": 1, "control-tis-staleness0-seed1": 2}
    assert not left.exists()


def test_one_failed_run_is_named_and_costs_no_other(tmp_path: Path, train: Any) -> None:
    folder = tmp_path / "s"
    study = config(folder, corrections=["broken", "ppo"])
    with pytest.raises(StudyError, match=r"1 of 2 runs failed(.|\n)*control-broken-.*ValueError: loss is NaN"):
        compare(study, train=train, compose=compose, progress=False)
    assert "loss is NaN" in next((folder / "runs").glob("control-broken*/error.txt")).read_text()
    assert "control,ppo,0,1,4,40,5" in (folder / "results.csv").read_text()
    assert "1 runs failed" in (folder / "report.html").read_text()


def test_a_failed_warm_start_fails_the_runs_that_need_it_alone(tmp_path: Path, train: Any, no_figures: None) -> None:
    domains = {"a": ["env=x", "warm_start=yes", "bad_start=1"], "b": ["env=x", "warm_start=yes"]}
    with pytest.raises(StudyError) as error:
        compare(config(tmp_path / "s", domains=domains), train=train, compose=compose, progress=False)
    assert "3 of 6 runs failed" in str(error.value) and "warm start a-start-seed1" in str(error.value)
    assert set(calls(tmp_path / "s")) == {
        "a-start-seed1",
        "b-start-seed1",
        *(f"b-{c}-staleness0-seed1" for c in ("ppo", "tis")),
    }


def test_workers_start_runs_after_their_warm_start_and_outlive_a_dead_process(tmp_path: Path, train: Any) -> None:
    """One pool for everything: order, a process that dies once, one that always dies."""

    def job(slug: str, needs: str | None = None, **cfg: Any) -> Job:
        folder = tmp_path / "runs" / slug
        return Job(slug, folder, {"seed": 1, "run_dir": str(folder), **cfg}, {}, needs)

    jobs = [job("run", "start"), job("start"), job("unlucky", die="once"), job("fatal", die="always")]
    before = dict(os.environ)
    failed = run_jobs(jobs, workers=2, folder=tmp_path, train=train, poll_seconds=0.1)
    assert set(failed) == {"fatal"} and "died twice" in failed["fatal"]
    times = {j.slug: [float(line.split()[1]) for line in (j.folder / "calls").read_text().splitlines()] for j in jobs}
    assert times["run"][-1] > times["start"][0]
    assert len(times["fatal"]) == 2 and len(times["unlucky"]) == 2
    pids = {line.split()[0] for j in jobs for line in (j.folder / "calls").read_text().splitlines()}
    assert str(os.getpid()) not in pids
    assert dict(os.environ) == before


def test_what_breaks_the_study_itself_interrupts_the_runs_under_way(tmp_path: Path, train: Any) -> None:
    """Else the study would wait for whole runs before it said what is wrong."""
    jobs = [Job(slug, tmp_path / slug, {"seed": 1, "run_dir": str(tmp_path / slug), "sleep": 60}, {}) for slug in "ab"]

    def watch(running: Sequence[Job], ended: int) -> None:
        if all((tmp_path / job.slug / "calls").exists() for job in jobs):
            raise OSError("the display is gone")

    with pytest.raises(OSError, match="display"):
        run_jobs(jobs, workers=2, folder=tmp_path, train=train, watch=watch, poll_seconds=0.05)
    assert not any((tmp_path / job.slug / "metrics.jsonl").exists() for job in jobs)


def test_ctrl_c_leaves_finished_runs_and_the_next_start_goes_on(tmp_path: Path, train: Any, no_figures: None) -> None:
    folder, made = tmp_path / "s", []

    def stopping(cfg: dict[str, Any], allow: Sequence[str] = (), progress: bool = True) -> Path:
        if made:
            raise KeyboardInterrupt
        made.append(cfg["run_dir"])
        return Path(train(cfg, allow, progress))

    with pytest.raises(KeyboardInterrupt):
        compare(config(folder), train=stopping, compose=compose, progress=False)
    compare(config(folder), train=train, compose=compose, progress=False)
    assert set(calls(folder).values()) == {1}


def test_a_bad_cell_stops_the_study_before_any_training(tmp_path: Path, train: Any) -> None:
    def refusing(overrides: list[str]) -> dict[str, Any]:
        if "correction=tis" in overrides:
            raise ConfigError("correction has no option 'tis'")
        return compose(overrides)

    with pytest.raises(ConfigError, match="control-tis-staleness0-seed1: correction has no option"):
        compare(config(tmp_path / "s"), train=train, compose=refusing, progress=False)
    assert not (tmp_path / "s").exists()


def test_a_study_in_use_is_refused(tmp_path: Path, train: Any) -> None:
    from unified_rl.training.checkpoint import lock_run

    (tmp_path / "s").mkdir()
    with lock_run(tmp_path / "s"), pytest.raises(CheckpointError, match="in use"):
        compare(config(tmp_path / "s"), train=train, compose=compose, progress=False)


def test_the_display_reads_progress_from_the_runs_own_metrics(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"steps": 10, "eval/score": 0.25}\n{"steps": 20}\n{"steps": 3')
    assert last_row(tmp_path / "metrics.jsonl") == {"steps": 20, "eval/score": 0.25}
    assert last_row(tmp_path / "missing") == {}
    job = Job("control-ppo-abc", tmp_path, {"steps": 40}, {})
    with StudyDisplay("demo", [job], shown=False) as display:
        display.update([job], 0)
        task = display.progress.tasks[-1]
        assert (task.completed, task.total, task.fields["note"]) == (20, 40, "score 0.25")
        display.update([], 1)
        assert [t.completed for t in display.progress.tasks] == [1]


def test_a_schedule_hands_out_as_many_jobs_as_there_are_free_workers(tmp_path: Path) -> None:
    jobs = [Job(slug, tmp_path / slug, {}, {}) for slug in ("a", "b", "c")]
    schedule = Schedule(jobs)
    assert (schedule.ready(2), schedule.ready(0), schedule.ready(1)) == (jobs[:2], [], jobs[2:])


def test_a_job_whose_process_dies_runs_once_more_and_costs_no_other(tmp_path: Path) -> None:
    jobs = [Job(slug, tmp_path / slug, {}, {}) for slug in ("a", "b")]
    schedule = Schedule(jobs)
    assert schedule.ready() == jobs
    schedule.lost(jobs[0], tmp_path / "log")
    assert schedule.ready() == [jobs[0]] and not schedule.failed
    schedule.lost(jobs[0], tmp_path / "log")
    assert schedule.ready() == [] and "died twice" in schedule.failed["a"]
    schedule.finish(jobs[1], None)
    assert schedule.ended == 2


def test_a_real_study_imitates_once_a_seed_and_its_null_control_stays_where_it_began(
    tmp_path: Path, no_figures: None
) -> None:
    """With the real trainer: a warm start of no steps, runs that load it, and no change at learning rate 0."""
    study = {
        "name": "tiny",
        "folder": str(tmp_path / "tiny"),
        "workers": 0,
        "domains": {
            "control": [
                "env=two_route",
                "policy=flow",
                "warm_start=demonstrations",
                "warm_start.stages=[{updates: 5, lr: 3.0e-3}]",
                "rollout.num_envs=4",
                "rollout.horizon=4",
                "steps=256",
            ]
        },
        "corrections": [{"null": ["correction=ppo", "agent.lr=0.0"]}, "tis"],
        "staleness": [2],
        "overrides": [
            "agent=policy_gradient",
            "eval_episodes=4",
            "eval_every=256",
            "log_every=64",
            "checkpoint_every=0",
        ],
    }
    folder = compare({"study": study}, progress=False)
    rows = list(csv.DictReader((folder / "results.csv").open()))
    scores = {(row["correction"], row["update"]): float(row["score"]) for row in rows}
    assert scores["null", "4"] == scores["null", "0"] == scores["tis", "0"] != scores["tis", "4"]
    assert max(float(row["kl/k3"]) for row in rows if row["correction"] == "null" and row["kl/k3"]) < 1e-9
