"""Runs the jobs of a study in long-lived processes: one torch import a worker, not one a run."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

from unified_rl.study.grid import Job

Train = Callable[..., Any]
"""``train(cfg, allow, progress=False)``: trains one run to completion in its ``run_dir``."""

Watch = Callable[[Sequence[Job], int], None]
"""Called every now and then with the jobs under way and the number that ended."""

THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def status_of(folder: Path) -> str:
    """The status in a run folder's ``meta.json``; ``missing`` without one."""
    try:
        return str(json.loads((folder / "meta.json").read_text()).get("status", "missing"))
    except (OSError, json.JSONDecodeError):
        return "missing"


def run_jobs(
    jobs: Sequence[Job],
    *,
    workers: int,
    folder: Path,
    allow: Sequence[str] = (),
    train: Train | None = None,
    watch: Watch = lambda running, ended: None,
    poll_seconds: float = 0.5,
) -> dict[str, str]:
    """Runs jobs, each after the one it needs; a failed one costs only those that need it.

    Args:
        jobs: the jobs; one whose folder is finished already is not run again.
        workers: processes; 0 trains in this one.
        folder: the study folder, for the list of runs under way and the workers' log.
        allow: prefixes that configuration may build beside ``unified_rl.``.
        train: the training function, by default that of ``unified_rl.training.run``; pickled when ``workers > 0``.
        watch: progress callback.
        poll_seconds: time between its calls.

    Returns:
        Slug to error message, for the jobs that failed.

    Raises:
        KeyboardInterrupt: after every run under way has written its checkpoint.
    """
    schedule = Schedule(jobs)
    watch([], schedule.ended)
    if workers == 0 or not schedule.waiting:
        _run_inline(schedule, allow, train, watch)
    else:
        with _threads_of_workers(), _interrupt_on_terminate():
            _run_pool(schedule, workers, folder, allow, train, watch, poll_seconds)
    return schedule.failed


class Schedule:
    """Which jobs wait, which are under way, which failed.

    Where a worker process dies, every job that was under way is a suspect; suspects run again one at a time, alone,
    so that a second death names the job that causes it.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.done = {job.slug for job in jobs if status_of(job.folder) == "finished"}
        self.waiting = [job for job in jobs if job.slug not in self.done]
        self.suspects: list[Job] = []
        self.running: set[str] = set()
        self.retried: set[str] = set()
        self.failed: dict[str, str] = {}

    @property
    def ended(self) -> int:
        """Jobs that need no more work."""
        return len(self.done) + len(self.failed)

    def ready(self, room: int | None = None) -> list[Job]:
        """Takes the jobs that can start now, ``room`` at most; those whose start failed fail with it."""
        for job in [j for j in self.waiting if j.needs in self.failed]:
            self.waiting.remove(job)
            self.failed[job.slug] = f"its warm start {job.needs} failed"
        if self.suspects:
            found = [] if self.running else [self.suspects.pop()]
        else:
            found = [j for j in self.waiting if j.needs is None or j.needs in self.done][:room]
            self.waiting = [j for j in self.waiting if j not in found]
        self.running |= {job.slug for job in found}
        return found

    def finish(self, job: Job, error: str | None) -> None:
        """Files the outcome of a job."""
        self.running.discard(job.slug)
        if error is None:
            self.done.add(job.slug)
        else:
            self.failed[job.slug] = error

    def lost(self, job: Job, under_way: bool, log: Path) -> None:
        """A worker process died before this job ended."""
        self.running.discard(job.slug)
        if not under_way:
            self.waiting.append(job)
        elif job.slug in self.retried:
            self.failed[job.slug] = f"its worker process died twice (out of memory?); see {log}"
        else:
            self.retried.add(job.slug)
            self.suspects.append(job)


def execute(job: Job, allow: Sequence[str], train: Train | None, marker: str | None = None) -> str | None:
    """Trains one run; returns None, or one line about what went wrong (its traceback is in ``error.txt``)."""
    if status_of(job.folder) == "finished":
        return None
    train = train or _default_train()
    if marker is not None:
        Path(marker).write_text(str(os.getpid()))
    try:
        train(job.cfg, allow, progress=False)
        status = status_of(job.folder)
        return None if status == "finished" else f"ended with status {status}"
    except Exception as error:
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / "error.txt").write_text(traceback.format_exc())
        return f"{type(error).__name__}: {error}"
    finally:
        if marker is not None:
            Path(marker).unlink(missing_ok=True)


def _default_train() -> Train:
    from unified_rl.training.run import train

    return train


def _run_inline(schedule: Schedule, allow: Sequence[str], train: Train | None, watch: Watch) -> None:
    while ready := schedule.ready():
        for job in ready:
            watch([job], schedule.ended)
            schedule.finish(job, execute(job, allow, train))
            watch([], schedule.ended)


def _run_pool(
    schedule: Schedule,
    workers: int,
    folder: Path,
    allow: Sequence[str],
    train: Train | None,
    watch: Watch,
    poll_seconds: float,
) -> None:
    log, markers = folder / "workers.log", folder / ".running"
    markers.mkdir(parents=True, exist_ok=True)
    while True:
        for left in markers.iterdir():
            left.unlink()
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(str(log),))
        pending: dict[Future[str | None], Job] = {}
        try:
            while True:
                for job in schedule.ready(workers - len(pending)):  # none waits inside the pool, where Ctrl-C misses it
                    pending[pool.submit(execute, job, allow, train, str(markers / job.slug))] = job
                if not pending:
                    return
                done, _ = wait(pending, timeout=poll_seconds, return_when=FIRST_COMPLETED)
                for future in done:
                    schedule.finish(pending[future], future.result())
                    del pending[future]
                watch([job for job in pending.values() if (markers / job.slug).exists()], schedule.ended)
        except BrokenProcessPool:
            running = {path.name for path in markers.iterdir()}
            for job in pending.values():
                schedule.lost(job, job.slug in running, log)
        except KeyboardInterrupt:
            _interrupt(markers)
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _interrupt(markers: Path) -> None:
    """Asks the runs under way to checkpoint and end."""
    print("\nstopping: the runs under way write their checkpoints; the same command goes on with them", file=sys.stderr)
    for path in markers.iterdir():
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(path.read_text()), signal.SIGINT)


def _start_worker(log: str) -> None:
    """Prepares a worker: own process group (Ctrl-C reaches it through the parent, once), output to a file."""
    os.setpgrp()
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    """Ends the worker when the parent is gone: first asks the run to checkpoint, then leaves."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)
        os._exit(1)


@contextlib.contextmanager
def _threads_of_workers() -> Iterator[None]:
    """One thread a worker unless the environment says otherwise; workers inherit it before they load a library."""
    added = [key for key in THREADS if key not in os.environ]
    os.environ.update({key: THREADS[key] for key in added})
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


@contextlib.contextmanager
def _interrupt_on_terminate() -> Iterator[None]:
    """SIGTERM stops a study as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)
