"""What can be done with a run: train it, resume it, evaluate it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml

from unified_rl.errors import CheckpointError
from unified_rl.training.build import Job
from unified_rl.training.checkpoint import latest_checkpoint, lock_run, read_checkpoint, write_json
from unified_rl.training.dataset import record_dataset
from unified_rl.training.display import Display
from unified_rl.training.provenance import provenance, read_config, run_folder, status


def train(cfg: dict[str, Any], allow: Sequence[str] = (), *, progress: bool | None = None) -> Path:
    """Trains one run to its budget.

    Args:
        cfg: composed configuration.
        allow: prefixes that configuration may build beside ``unified_rl.``.
        progress: show a progress display; by default as the configuration says.

    Returns:
        The run folder: ``config.yaml``, ``meta.json``, ``metrics.csv``, ``metrics.jsonl``, ``tensorboard/`` and
        ``checkpoints/``.

    Raises:
        CheckpointError: the folder is in use, or holds a run already.
    """
    folder = run_folder(cfg)
    with lock_run(folder):
        unfinished = (folder / "meta.json").exists() and (folder / "metrics.jsonl").exists()  # else it never began
        if unfinished and not cfg.get("resume_existing"):
            raise CheckpointError(
                f"{folder} holds a run already; continue it with 'unified-rl train resume={folder}' "
                "or choose another name="
            )
        if not unfinished:
            (folder / "config.yaml").write_text(yaml.safe_dump(cfg, sort_keys=False))
            write_json(folder / "meta.json", {**provenance(cfg), "status": "running"})
        elif json.loads((folder / "meta.json").read_text()).get("status") == "finished":
            return folder
        _train_in(folder, cfg, allow, progress)
    return folder


def resume(run: str, steps: int | None = None, allow: Sequence[str] = (), *, progress: bool | None = None) -> Path:
    """Continues a run from its last checkpoint, to ``steps`` if given.

    Raises:
        CheckpointError: no such run, or it is in use.
    """
    folder = Path(run)
    cfg = read_config(folder)
    with lock_run(folder):
        if steps is not None:
            cfg["steps"] = steps
            (folder / "config.yaml").write_text(yaml.safe_dump(cfg, sort_keys=False))
        _train_in(folder, cfg, allow, progress)
    return folder


def _train_in(folder: Path, cfg: dict[str, Any], allow: Sequence[str], progress: bool | None) -> None:
    shown = cfg.get("progress", True) if progress is None else progress
    display = Display(folder.name, int(cfg.get("steps", 100_000))) if shown else None
    with display or nullcontext(), status(folder):
        job = Job(cfg, allow)
        found = sorted((folder / "checkpoints").glob("step_*"))
        if found:
            trainer = job.make_trainer(folder, display.update if display else None)
            trainer.load_state_dict(read_checkpoint(found[-1]), found[-1])
        else:
            job.warm_start(display.warm_start if display else lambda *args: None)
            trainer = job.make_trainer(folder, display.update if display else None)
        trainer.run()


def restored(
    run: str, checkpoint: str | int | None = None, allow: Sequence[str] = (), changed: Mapping[str, Any] | None = None
) -> Job:
    """A run built again, with its policy as a checkpoint left it.

    Args:
        run: the run folder.
        checkpoint: the number of updates behind it, or its folder; by default the newest.
        allow: prefixes that configuration may build.
        changed: settings that replace the run's own.

    Raises:
        CheckpointError: no such run or checkpoint, or a run that only a script can build again.
    """
    folder = Path(run)
    job = Job({**read_config(folder), **(changed or {})}, allow)
    if isinstance(checkpoint, int):
        path = folder / "checkpoints" / f"step_{checkpoint:012d}"
    else:
        path = latest_checkpoint(folder) if checkpoint is None else Path(checkpoint)
    job.policy = load_policy(job, read_checkpoint(path))
    return job


def evaluated(
    run: str, episodes: int | None = None, allow: Sequence[str] = (), record: str | None = None
) -> tuple[dict[str, float], int | None]:
    """Evaluates the newest checkpoint of a run on held-out problems or seeds.

    Args:
        run: the run folder.
        episodes: episodes or prompts, by default as the run's evaluation.
        allow: prefixes that configuration may build.
        record: folder to write the evaluated policy's rows to, as a replay that other runs can train on.

    Returns:
        The metrics, and how many rows were recorded, if any.
    """
    job = restored(run, None, allow, {} if episodes is None else {"eval_episodes": episodes})
    metrics = job.evaluate()
    return metrics, None if record is None else record_dataset(job, Path(record))


def evaluate_run(
    run: str, episodes: int | None = None, allow: Sequence[str] = (), record: str | None = None
) -> dict[str, float]:
    """As :func:`evaluated`, and prints the result; returns the metrics."""
    metrics, recorded = evaluated(run, episodes, allow, record)
    for key, value in metrics.items():
        print(f"{key:28s} {value:.4f}")
    if recorded is not None:
        print(f"{'recorded rows':28s} {recorded}")
    return metrics


def load_policy(job: Job, state: dict[str, Any]) -> Any:
    """The policy of a checkpoint, in the job's device."""
    if not job.collects:
        job.make_trainer(Path(job.cfg.get("run_dir") or "."))  # such agents bring their own policy
    job.policy.load_state_dict(state["agent"]["policy"])
    return job.policy
