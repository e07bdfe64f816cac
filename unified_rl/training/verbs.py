"""What can be done with a run: train it, resume it, evaluate it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from unified_rl.errors import (
    CheckpointError,
    ConfigError,
    DamageError,
    DataError,
    EnvError,
    PeerError,
    RestoreError,
    RolloutError,
    UnifiedRLError,
)
from unified_rl.files import MANIFEST, Manifest, clear_aside
from unified_rl.settling import BUDGETS, keep_one_budget
from unified_rl.stopping import StopSignal, raising, say
from unified_rl.training.build import Job
from unified_rl.training.checkpoint import (
    BEST,
    EXTENSION,
    FOLDER,
    adopt,
    checkpoint_name,
    checkpoints,
    intact_checkpoint,
    lock_run,
    read_checkpoint,
    remove_checkpoint,
    wrote_checkpoint,
)
from unified_rl.training.display import make_display
from unified_rl.training.failures import foreign, forget_report, write_report
from unified_rl.training.learner import as_launched
from unified_rl.training.metrics import RECORD, read_metrics
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
    stored_config,
    write_run,
)
from unified_rl.training.ranks import Launched, Ranks, ranks_of
from unified_rl.training.restoring import policy_state, restoring
from unified_rl.training.seeding import derive
from unified_rl.training.trainer import Trainer

RESUME_ENV = ("exact", "restart")
Found: TypeAlias = tuple[Path, dict[str, Any]]
"""A checkpoint's folder and state."""


def train(
    cfg: dict[str, Any], allow: Sequence[str] = (), *, progress: bool | None = None, callbacks: Sequence[Any] = ()
) -> Path:
    """Trains one run to its budget.

    Args:
        cfg: composed configuration.
        allow: prefixes that configuration may build beside ``unified_rl.``.
        progress: show a progress display; by default as the configuration says.
        callbacks: objects, see :mod:`unified_rl.training.callbacks`; they come behind those of the configuration.

    Returns:
        The run folder: ``config.yaml``, ``meta.json``, ``metrics.jsonl``, ``checkpoints/``, what the loggers write
        (``metrics.csv`` and ``tensorboard/`` by default), of language runs ``samples.jsonl``, and ``best/`` where
        ``keep_best`` names a metric.

    Raises:
        CheckpointError: the folder is in use, holds a run already, or cannot be written.
        RolloutError: the environment or a reward raised; the traceback is in ``error.txt``.
        Interrupted: a signal; the last whole update is saved.
    """
    with ranks_of(cfg, allow) as ranks:
        if isinstance(ranks, Launched) and not ranks.leads:
            return _follow(ranks, allow)
        return _train_new(cfg, allow, progress, callbacks, ranks)


def _follow(ranks: Launched, allow: Sequence[str]) -> Path:
    """Trains along with process 0, which collects the rows, keeps the run's folder and says what happens.

    Returns:
        No run folder: where nothing is written.
    """
    with raising():
        cfg = ranks.told()
        if cfg is not None:
            job, trainer = _built_alike(cfg, ranks, allow)
            ranks.start(trainer, None)
            try:
                trainer.run()
            finally:
                job.close()
    return Path(os.devnull)


def _built_alike(cfg: dict[str, Any], ranks: Launched, allow: Sequence[str]) -> tuple[Job, Trainer]:
    """The parts of a run that process 0 has built already.

    Raises:
        PeerError: this process cannot build them; says why that may be.
    """
    try:
        job = Job(ranks.own(cfg), allow)
        job.ranks = ranks
        return job, job.make_trainer(None)
    except (CheckpointError, ConfigError, DataError) as error:
        raise type(error)(
            f"{error}. Process 0 builds the same run without this error: every process reads models and data itself, "
            "so they must lie under one path on every machine, best on a disk that all share"
        ) from error


def _train_new(
    cfg: dict[str, Any], allow: Sequence[str], progress: bool | None, callbacks: Sequence[Any], ranks: Ranks
) -> Path:
    folder = run_folder(cfg)
    with _leaving_nothing(folder) as warmed, raising() as stop, lock_run(folder):
        begun = has_begun(folder)
        if begun and not cfg.get("resume_existing"):
            raise CheckpointError(
                f"{folder} holds a run already; continue it with 'unified-rl train resume={folder}', choose another "
                "run_dir= (or name=), or remove the folder"
            )
        if not begun:
            meta = meta_text({**provenance(cfg), "status": "running"})
            write_run(folder, {CONFIG: yaml.safe_dump(cfg, sort_keys=False), META: meta})
        elif read_meta(folder).get("status") == "finished":
            clear_aside(folder)
            return folder
        else:
            check_run(folder)
        found = _start(folder, whole=not ranks.reads_pieces)
        options: dict[str, Any] = {"fresh": not begun, "callbacks": callbacks, "warmed": warmed}
        _train_in(folder, cfg, allow, progress, stop, found, ranks=ranks, **options)
    return folder


OF_START = (CONFIG, META, MANIFEST, RECORD, ".lock")
"""Files that a run has before anything of it was made."""


@contextmanager
def _leaving_nothing(folder: Path) -> Iterator[list[int]]:
    """Removes the folder of a run that is refused before anything was spent, where nothing was in it before.

    Yields:
        A list that holds the stages of a warm start once they begin: they are spent though no file shows it.
    """
    held, warmed = folder.is_dir() and any(folder.iterdir()), list[int]()
    try:
        yield warmed
    except (ConfigError, DataError):
        if not held and not warmed and not is_spent(folder):
            with suppress(OSError):
                for path in folder.iterdir():
                    path.unlink()
                folder.rmdir()
        raise


def is_spent(folder: Path) -> bool:
    """Whether a run folder holds more than the files of a start, or a row of metrics."""
    if any(path.name not in OF_START for path in folder.glob("*")):
        return True
    record = folder / RECORD
    return record.is_file() and record.stat().st_size > 0


def resume(
    run: str,
    steps: int | None = None,
    allow: Sequence[str] = (),
    *,
    epochs: float | None = None,
    updates: int | None = None,
    checkpoint: str | int | None = None,
    progress: bool | None = None,
    resume_env: str | None = None,
    callbacks: Sequence[Any] = (),
    learner: str | None = None,
) -> Path:
    """Continues a run from its newest intact checkpoint, or from the chosen one, to another budget if given.

    Later checkpoints are renamed to ``set_aside_step_...``, and rows of metrics behind it are made again.

    Args:
        run: the run folder.
        steps: a new budget. The longer run is the one that had this budget from the start, but for what follows a
            budget (annealed rates, schedules, intervals that are not set).
        epochs, updates: a new budget, said in one of these.
        allow: prefixes that configuration may build.
        checkpoint: the number of updates behind it, its name, or ``best``; it must be one of the run's own.
        progress: show a progress display; by default as the configuration says.
        resume_env: ``exact`` puts the environment back to where it was, or refuses; ``restart`` begins new episodes;
            by default the first where it is possible, else the second, and says so.
        callbacks: objects, as when the run began: they are no part of its configuration.
        learner: of several processes, ``data_parallel`` or ``fsdp``; by default the run's own.

    Raises:
        RestoreError: the environment cannot be put back, and ``resume_env`` is ``exact``.
        CheckpointError: no such run or checkpoint, or it is in use.
        DamageError: a file of the run, the chosen checkpoint, or every checkpoint is damaged; nothing has changed then.
    """
    if resume_env not in (None, *RESUME_ENV):
        raise ConfigError(f"resume_env={resume_env} must be one of {', '.join(RESUME_ENV)}")
    folder = Path(run)
    cfg = _with_budget(read_config(folder), {"steps": steps, "epochs": epochs, "updates": updates})
    cfg = as_launched(cfg, learner)  # a run goes on in as many processes as there are
    with ranks_of(cfg, allow) as ranks:
        if isinstance(ranks, Launched) and not ranks.leads:
            return _follow(ranks, allow)
        with raising() as stop, lock_run(folder):
            check_run(folder)
            found = _start(folder, checkpoint, whole=not ranks.reads_pieces)
            _train_in(folder, cfg, allow, progress, stop, found, resume_env, callbacks=callbacks, ranks=ranks)
    return folder


def _with_budget(cfg: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A run's configuration, with another budget where one is given."""
    given = {key: value for key, value in given.items() if value is not None}
    if not given:
        return cfg
    keep_one_budget({**given}, given)
    return {**{key: value for key, value in cfg.items() if key not in BUDGETS}, **given}


def _tell_done(folder: Path, found: Found | None, steps: int) -> None:
    made = 0 if found is None else found[1].get("steps", 0)
    if made >= steps:
        say(f"{folder} has made {made:,} steps already, so nothing is left up to steps={steps:,}")


def has_begun(folder: Path) -> bool:
    """Whether a folder holds a run of which something would be lost: a checkpoint, or a logged update.

    One that was refused before its first update has at most the evaluation that comes before it.
    """
    if not (folder / META).exists():
        return False
    if checkpoints(folder / FOLDER) or wrote_checkpoint(folder):
        return True
    manifest = Manifest.find(folder)
    if not (folder / RECORD).exists():
        return manifest is not None and RECORD in manifest.files
    return any(row.get("update", 0) > 0 for row in read_metrics(folder / RECORD))


def _start(folder: Path, choice: str | int | None = None, whole: bool = True) -> Found | None:
    """The checkpoint that a run goes on from, or None where it has not written any."""
    if choice is None and not checkpoints(folder / FOLDER) and not wrote_checkpoint(folder):
        return None
    path, state = intact_checkpoint(folder, choice, whole=whole)
    if path.parent.resolve() == (folder / BEST).resolve():
        path = adopt(path, folder / FOLDER)
    if path.resolve() not in [own.resolve() for own in checkpoints(folder / FOLDER)]:
        raise CheckpointError(f"{path} is not a checkpoint of the run {folder}; a run goes on from one of its own")
    if read_meta(folder).get("status") == "running":
        say(f"{folder} was cut off, its process ended without a word; it goes on from update {state['updates']}")
    return path, state


def _train_in(
    folder: Path,
    cfg: dict[str, Any],
    allow: Sequence[str],
    progress: bool | None,
    stop: StopSignal,
    found: Found | None,
    resume_env: str | None = None,
    fresh: bool = False,
    callbacks: Sequence[Any] = (),
    warmed: list[int] | None = None,
    ranks: Ranks | None = None,
) -> None:
    ranks = ranks or Ranks()
    shown = cfg.get("progress", True) if progress is None else progress
    display = make_display(folder.name) if shown else None
    try:
        with status(folder), display or nullcontext():
            forget_report(folder)
            ranks.tell(cfg)
            job = Job(ranks.own(cfg), allow, callbacks)
            job.ranks = ranks
            with closing(job):
                _write_budget(folder, cfg, job, found)
                if display is not None:
                    display.steps = job.settings.steps
                job.watchers()
                job.tell_null_control()
                if not fresh:
                    job.found_rows = "drop" if found is None else "keep"
                if found is None:
                    _tell_new_start(folder)
                    with foreign("the warm start"):
                        job.warm_start(_reporting(display, [] if warmed is None else warmed))
                trainer = job.make_trainer(folder, display.update if display else None)
                if found is not None:
                    restore(trainer, folder, found, resume_env)
                ranks.start(trainer, None if found is None else folder / FOLDER / checkpoint_name(trainer.updates))
                if display is not None:
                    display.follow(trainer)
                trainer.run()
    except (RolloutError, EnvError, PeerError) as error:
        write_report(folder, error)
        raise
    except Exception as error:
        if stop.requested and not isinstance(error, UnifiedRLError):
            raise stop.error() from error  # what a signal became inside a library
        raise


def _reporting(display: Any, warmed: list[int]) -> Callable[..., None]:
    """Shows the steps of a warm start, and notes its stages."""

    def report(stage: int, *given: Any) -> None:
        if stage not in warmed:
            warmed.append(stage)
        if display is not None:
            display.warm_start(stage, *given)

    return report


def _write_budget(folder: Path, cfg: Mapping[str, Any], job: Job, found: Found | None) -> None:
    """Writes the configuration anew where its budget is another one, or only known now."""
    stored = stored_config(folder)
    budget = {name: cfg.get(name) for name in BUDGETS} | {"steps": job.settings.steps}
    if {name: stored.get(name) for name in BUDGETS} == budget:
        return
    if found is not None:
        _tell_done(folder, found, job.settings.steps)
    write_run(folder, {CONFIG: yaml.safe_dump({**stored, **budget}, sort_keys=False)})


def _tell_new_start(folder: Path) -> None:
    if made := len(read_metrics(folder / RECORD)):
        say(f"{folder} was cut off before its first checkpoint: it begins again, and makes {made} row(s) anew")


def restore(trainer: Trainer, folder: Path, found: Found, resume_env: str | None = None) -> None:
    """Puts a trainer where a checkpoint of its run is.

    States near the end of a smaller budget lack rows that this run collects by then, see
    :meth:`~unified_rl.training.trainer.Trainer.cut_short`; the one before them is taken, and they are removed.

    Raises:
        RestoreError: the environment cannot be put back, and ``resume_env`` is ``exact``.
    """
    path, state = found
    if _cut_short(trainer, path, state):
        path, state = _before_the_end(trainer, folder, path) or found
        if _cut_short(trainer, path, state):
            say(
                f"{folder} was made for a smaller budget and keeps no state from before its end: the next rows are "
                "fresher than rollout.staleness says, else the run goes on as it was"
            )
    restart = derive(trainer.settings.seed, f"restart/{state['updates']}") % 2**31
    if resume_env == "restart":
        say(f"{folder} goes on from update {state['updates']} with new episodes")
        trainer.load_state_dict(state, path, restart)
        return
    try:
        trainer.load_state_dict(state, path)
    except RestoreError as error:
        if resume_env == "exact":
            raise
        say(f"{folder} goes on from update {state['updates']} with new episodes, not bit for bit: {error}")
        trainer.load_state_dict(state, path, restart)


def _cut_short(trainer: Trainer, path: Path, state: dict[str, Any]) -> bool:
    with restoring(path):
        return trainer.cut_short(state)


def _before_the_end(trainer: Trainer, folder: Path, newest: Path) -> Found | None:
    """The newest state that this trainer would have passed through, made the newest checkpoint of the run."""
    own = [path for path in checkpoints(folder / FOLDER) if path.name <= newest.name]
    for path in sorted([*own, *checkpoints(folder / EXTENSION)], key=lambda path: path.name, reverse=True):
        try:
            state = read_checkpoint(path)
        except DamageError:
            continue
        if _cut_short(trainer, path, state):
            continue
        target = folder / FOLDER / path.name
        if path != target:  # one of that name may have been half removed by a process that was killed
            if target.exists():
                remove_checkpoint(target)
            os.replace(path, target)
        for later in [one for one in own if one.name > target.name]:
            remove_checkpoint(later)
        return target, state
    return None


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
    path, state = intact_checkpoint(folder, checkpoint, replay=False)
    job = Job({**cfg, **(changed or {})}, allow)
    job.policy = load_policy(job, state, path)
    return job


def load_policy(job: Job, state: dict[str, Any], where: str | Path = "the checkpoint") -> Any:
    """The policy of a checkpoint, in the job's device; ``where`` names it in errors."""
    if not job.collects:
        job.collecting_agent()  # such agents bring their own policy
    with restoring(where):
        job.policy.load_state_dict(policy_state(state, where))
    return job.policy
