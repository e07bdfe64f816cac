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
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

from unified_rl.files import clear_aside
from unified_rl.study.grid import Job
from unified_rl.training.failures import write_report

Train = Callable[..., Any]
"""``train(cfg, allow, progress=False)``: trains one run to completion in its ``run_dir``."""

Watch = Callable[[Sequence[Job], int], None]
"""Called every now and then with the jobs under way and the number that ended."""

THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def status_of(folder: Path) -> str:
    """The status in a run folder's ``meta.json``; ``missing`` without one."""
    try:
        return str(json.loads((folder / "meta.json").read_text()).get("status", "missing"))
    except (OSError, ValueError, AttributeError):
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
    """Which jobs wait, which are under way, which failed. A job whose process dies runs once more."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        finished = [job for job in jobs if status_of(job.folder) == "finished"]
        for job in finished:
            clear_aside(job.folder)  # nothing is written there any more that would
        self.done = {job.slug for job in finished}
        self.waiting = [job for job in jobs if job.slug not in self.done]
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
        found = [j for j in self.waiting if j.needs is None or j.needs in self.done][:room]
        self.waiting = [j for j in self.waiting if j not in found]
        return found

    def finish(self, job: Job, error: str | None) -> None:
        """Files the outcome of a job."""
        if error is None:
            self.done.add(job.slug)
        else:
            self.failed[job.slug] = error

    def lost(self, job: Job, log: Path) -> None:
        """The worker process of this job died before the job ended."""
        if job.slug in self.retried:
            self.failed[job.slug] = f"its worker process died twice (out of memory?); see {log}"
        else:
            self.retried.add(job.slug)
            self.waiting.append(job)


def execute(job: Job, allow: Sequence[str], train: Train | None) -> str | None:
    """Trains one run; returns None, or one line about what went wrong (its traceback is in ``error.txt``)."""
    if status_of(job.folder) == "finished":
        return None
    train = train or _default_train()
    try:
        train(job.cfg, allow, progress=False)
        status = status_of(job.folder)
        return None if status == "finished" else f"ended with status {status}"
    except Exception as error:
        job.folder.mkdir(parents=True, exist_ok=True)
        write_report(job.folder, error)
        return f"{type(error).__name__}: {error}"


def _default_train() -> Train:
    from unified_rl.training.run import train

    return train


def _run_inline(schedule: Schedule, allow: Sequence[str], train: Train | None, watch: Watch) -> None:
    while ready := schedule.ready():
        for job in ready:
            watch([job], schedule.ended)
            schedule.finish(job, execute(job, allow, train))
            watch([], schedule.ended)


class Worker:
    """A process that trains one job after another; its pipe carries jobs in and outcomes back."""

    def __init__(self, log: Path, allow: Sequence[str], train: Train | None) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, str(log), tuple(allow), train))
        self.process.start()
        theirs.close()
        self.job: Job | None = None

    def assign(self, job: Job) -> None:
        """Hands over a job; a worker that has died meanwhile shows it in :meth:`died`."""
        self.job = job
        with contextlib.suppress(OSError):
            self.connection.send(job)

    def died(self) -> bool:
        """Whether the process ended without having answered."""
        return not self.process.is_alive() and not self.answered()

    def answered(self) -> bool:
        """Whether an outcome, or the end of the pipe, can be read."""
        try:
            return self.connection.poll()
        except OSError:
            return False

    def outcome(self) -> str | None:
        """The answer about the job. Raises EOFError or OSError where the process died instead."""
        out: str | None = self.connection.recv()
        return out

    def interrupt(self) -> None:
        """Asks the run under way to checkpoint and end."""
        with contextlib.suppress(OSError, ValueError):
            os.kill(self.process.pid or 0, signal.SIGINT)

    def close(self) -> None:
        """Waits for the process to end; it does when its pipe closes."""
        self.connection.close()
        self.process.join()


def _run_pool(
    schedule: Schedule,
    workers: int,
    folder: Path,
    allow: Sequence[str],
    train: Train | None,
    watch: Watch,
    poll_seconds: float,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "workers.log"
    idle: list[Worker] = []
    busy: list[Worker] = []
    try:
        while True:
            for job in schedule.ready(workers - len(busy)):
                worker = idle.pop() if idle else Worker(log, allow, train)
                worker.assign(job)
                busy.append(worker)
            if not busy:
                return
            wait_for([worker.connection for worker in busy], poll_seconds)
            for worker in [w for w in busy if w.answered() or w.died()]:
                busy.remove(worker)
                idle += _collect(worker, schedule, log)
            watch([worker.job for worker in busy if worker.job is not None], schedule.ended)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            what = "the runs under way write their checkpoints; the same command goes on with them"
            print(f"\nstopping: {what}", file=sys.stderr)
        for worker in busy:  # else closing them would wait for whole runs
            worker.interrupt()
        raise
    finally:
        for worker in idle + busy:
            worker.close()


def _collect(worker: Worker, schedule: Schedule, log: Path) -> list[Worker]:
    """Files what came of a worker's job; returns the worker where it can take another."""
    job = worker.job
    assert job is not None
    worker.job = None
    try:
        schedule.finish(job, worker.outcome())
        return [worker]
    except (EOFError, OSError):
        worker.close()
        schedule.lost(job, log)
        return []


def _serve(connection: Connection, log: str, allow: Sequence[str], train: Train | None) -> None:
    """A worker's life: own process group (Ctrl-C reaches it through the parent, once), output to a file, jobs."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background may have ignored it
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    threading.Thread(target=_follow_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            connection.send(execute(connection.recv(), allow, train))


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
