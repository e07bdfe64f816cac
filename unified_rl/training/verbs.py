"""What can be done with a run: train it, resume it, evaluate it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from unified_rl.errors import CheckpointError
from unified_rl.files import Manifest
from unified_rl.training.build import Job
from unified_rl.training.checkpoint import FOLDER, checkpoints, intact_checkpoint, lock_run, wrote_checkpoint
from unified_rl.training.dataset import record_dataset
from unified_rl.training.display import Display
from unified_rl.training.metrics import RECORD
from unified_rl.training.provenance import (
    CONFIG,
    META,
    check_run,
    meta_text,
    provenance,
    read_config,
    read_meta,
    run_folder,
    status,
    write_run,
)

Found: TypeAlias = tuple[Path, dict[str, Any]]
"""A checkpoint's folder and state."""


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
        begun = has_begun(folder)
        if begun and not cfg.get("resume_existing"):
            raise CheckpointError(
                f"{folder} holds a run already; continue it with 'unified-rl train resume={folder}' "
                "or choose another name="
            )
        if not begun:
            meta = meta_text({**provenance(cfg), "status": "running"})
            write_run(folder, {CONFIG: yaml.safe_dump(cfg, sort_keys=False), META: meta})
        elif read_meta(folder).get("status") == "finished":
            return folder
        else:
            check_run(folder)
        _train_in(folder, cfg, allow, progress, _start(folder), fresh=not begun)
    return folder


def resume(
    run: str,
    steps: int | None = None,
    allow: Sequence[str] = (),
    *,
    checkpoint: str | int | None = None,
    progress: bool | None = None,
) -> Path:
    """Continues a run from its newest intact checkpoint, or from the chosen one, to ``steps`` if given.

    Later checkpoints are renamed to ``set_aside_step_...``, and rows of metrics behind it are made again.

    Args:
        run: the run folder.
        steps: a new budget.
        allow: prefixes that configuration may build.
        checkpoint: the number of updates behind it, or its name; it must be one of the run's own.
        progress: show a progress display; by default as the configuration says.

    Raises:
        CheckpointError: no such run or checkpoint, or it is in use.
        DamageError: a file of the run, the chosen checkpoint, or every checkpoint is damaged; nothing has changed then.
    """
    folder = Path(run)
    cfg = read_config(folder)
    with lock_run(folder):
        check_run(folder)
        found = _start(folder, checkpoint)
        if steps is not None:
            cfg["steps"] = steps
            write_run(folder, {CONFIG: yaml.safe_dump(cfg, sort_keys=False)})
        _train_in(folder, cfg, allow, progress, found)
    return folder


def has_begun(folder: Path) -> bool:
    """Whether a folder holds a run that logged something."""
    if not (folder / META).exists():
        return False
    manifest = Manifest.find(folder)
    return (folder / RECORD).exists() or (manifest is not None and RECORD in manifest.files)


def _start(folder: Path, choice: str | int | None = None) -> Found | None:
    """The checkpoint that a run goes on from, or None where it has not written any."""
    if choice is None and not checkpoints(folder / FOLDER) and not wrote_checkpoint(folder):
        return None
    path, state = intact_checkpoint(folder, choice)
    if path.resolve() not in [own.resolve() for own in checkpoints(folder / FOLDER)]:
        raise CheckpointError(f"{path} is not a checkpoint of the run {folder}; a run goes on from one of its own")
    return path, state


def _train_in(
    folder: Path,
    cfg: dict[str, Any],
    allow: Sequence[str],
    progress: bool | None,
    found: Found | None,
    fresh: bool = False,
) -> None:
    shown = cfg.get("progress", True) if progress is None else progress
    display = Display(folder.name, int(cfg.get("steps", 100_000))) if shown else None
    with display or nullcontext(), status(folder):
        job = Job(cfg, allow)
        if not fresh:
            job.found_rows = "drop" if found is None else "keep"
        if found is not None:
            trainer = job.make_trainer(folder, display.update if display else None)
            trainer.load_state_dict(found[1], found[0])
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
        checkpoint: the number of updates behind it, its name, or its folder; by default the newest intact one.
        allow: prefixes that configuration may build.
        changed: settings that replace the run's own.

    Raises:
        CheckpointError: no such run or checkpoint, or a run that only a script can build again.
        DamageError: the chosen checkpoint, or every one, is damaged.
    """
    folder = Path(run)
    cfg = read_config(folder)
    _, state = intact_checkpoint(folder, checkpoint, replay=False)
    job = Job({**cfg, **(changed or {})}, allow)
    job.policy = load_policy(job, state)
    return job


def evaluated(
    run: str,
    episodes: int | None = None,
    allow: Sequence[str] = (),
    record: str | None = None,
    checkpoint: str | int | None = None,
) -> tuple[dict[str, float], int | None]:
    """Evaluates a checkpoint of a run on held-out problems or seeds.

    Args:
        run: the run folder.
        episodes: episodes or prompts, by default as the run's evaluation.
        allow: prefixes that configuration may build.
        record: folder to write the evaluated policy's rows to, as a replay that other runs can train on.
        checkpoint: the number of updates behind it, its name, or its folder; by default the newest intact one.

    Returns:
        The metrics, and how many rows were recorded, if any.
    """
    job = restored(run, checkpoint, allow, {} if episodes is None else {"eval_episodes": episodes})
    metrics = job.evaluate()
    return metrics, None if record is None else record_dataset(job, Path(record))


def evaluate_run(
    run: str,
    episodes: int | None = None,
    allow: Sequence[str] = (),
    record: str | None = None,
    checkpoint: str | int | None = None,
) -> dict[str, float]:
    """As :func:`evaluated`, and prints the result; returns the metrics."""
    metrics, recorded = evaluated(run, episodes, allow, record, checkpoint)
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
