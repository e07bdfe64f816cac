"""Kills short programs with SIGKILL, lets them go on, and compares what is left with an undisturbed one.

    python -m tests.faults.kill --kills 1000 --out kills.csv
    python -m tests.faults.kill --kills 200 --scenarios language,replay --minutes 5 --processes 2
    python -m tests.faults.kill --kills 200 --errors 1          # disks that fail, in place of kills

Half of the kills come at a moment spread evenly over the program's time, half at a fault point of
:mod:`tests.faults.points`, taken in turn from all of them. What goes on after a kill is killed again, in the same way,
up to three times. Of a program with processes of its own, any of them may be the one that is killed, at any moment.
With ``--errors`` a share of the fault points raise what a full, a read-only or a broken disk raises, once or from then
on; the program must then end with an error of the library's own, or let it pass, and is started again. Exit code 0
where no result differs.
"""

from __future__ import annotations

import argparse
import csv
import errno
import gc
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing import Process, SimpleQueue
from pathlib import Path
from typing import Any

from .points import Points, Shared, failing
from .scenarios import Scenario, differences, forget, scenarios

AGAIN = 0.5
"""Share of continuations that are killed too."""
MOST = 4
REFUSED = 2
"""Exit code of a child that ended with an error of the library."""
DISKS = (errno.ENOSPC, errno.EROFS, errno.EIO)
LIMIT = 300.0
"""Seconds after which a child that was not meant to be killed counts as hanging."""


@dataclass
class Trial:
    """One program, killed at least once and brought to its end."""

    scenario: str
    number: int
    kills: int = 0
    by_time: int = 0
    by_point: int = 0
    errors: int = 0
    places: list[str] = field(default_factory=list)
    seconds: float = 0.0
    problem: str = ""


@dataclass
class Reference:
    """The undisturbed program: its result, how long it takes, and how many fault points it meets."""

    result: Any
    seconds: float
    points: int


def preload() -> None:
    """Imports everything once, so that a fork can begin at once."""
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
    import gymnasium
    import mujoco
    import torch
    import transformers
    from torch.utils import tensorboard

    torch.set_num_threads(1)
    del gymnasium, mujoco, tensorboard, transformers
    import logging

    logging.disable(logging.WARNING)


def child(go: Callable[[], None], log: Path, points: Points | None = None) -> int:
    """Forks a process that does something and ends; its output goes to a file.

    Its code is :data:`REFUSED` for an error of the library.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        if points is None:
            go()
        else:
            with points:
                go()
        code = 0
    except BaseException as error:
        traceback.print_exc()
        ours = any(base.__name__ == "UnifiedRLError" for base in type(error).__mro__)
        code = REFUSED if ours else 1
    finally:
        os._exit(code)


def wait(pid: int, seconds: float) -> int | None:
    """The exit code of a child (negative: the signal that ended it), or None when the time is over."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.002)


def workers_of(pid: int) -> list[int]:
    """The processes that a study under way trains in."""
    with suppress(OSError):
        children = [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    return []


def undisturbed(scenario: Scenario, place: Path) -> Reference:
    """Runs a program to its end in a child, and reads what it left.

    Raises:
        RuntimeError: it failed; the message has its output.
    """
    getattr(scenario.go, "warm", lambda: None)()
    gc.freeze()  # so that children share these pages
    folder, shared = place / "reference", Shared()
    folder.mkdir(parents=True)
    _finish(lambda: scenario.prepare(place), place)
    start = time.monotonic()
    _finish(lambda: scenario.go(folder), place, Points(folder, shared=shared))
    seconds, result = time.monotonic() - start, scenario.result(folder)
    if scenario.whole is not None:
        other = place / "whole"
        other.mkdir()
        whole = scenario.whole
        _finish(lambda: whole(other), place)
        found = differences(scenario.result(other), result)
        if found:
            raise RuntimeError(f"{scenario.name} differs from the whole program before any kill: {found[:5]}")
    return Reference(result, seconds, shared.count)


def _finish(go: Callable[[], None], place: Path, points: Points | None = None) -> None:
    code = wait(child(go, place / "log", points), LIMIT)
    if code != 0:
        raise RuntimeError(f"{place.name} ended with {code}: {(place / 'log').read_text()[-2000:]}")


class Plan:
    """When the next kill comes: moments and points of a program in turn, evenly spread whatever their number."""

    def __init__(self, reference: Reference, seed: int) -> None:
        self.reference, self.random = reference, random.Random(seed)
        self.again, self.timed = AGAIN, 0.5
        self._points: Iterator[int] = iter(())
        self._times = 0

    def moment(self) -> float:
        """Seconds: the golden ratio's multiples fill the program's time evenly."""
        self._times += 1
        return (self._times * 0.6180339887498949 + 0.31) % 1.0 * self.reference.seconds * 1.05

    def point(self) -> int:
        """Every point once before any comes twice."""
        for number in self._points:
            return number
        order = list(range(self.reference.points))
        self.random.shuffle(order)
        self._points = iter(order)
        return next(self._points)


def trial(scenario: Scenario, reference: Reference, plan: Plan, place: Path, number: int, errors: float = 0.0) -> Trial:
    """Disturbs a program, brings it to its end, and compares."""
    out, folder, log = Trial(scenario.name, number), place / f"trial{number}", place / f"log{number}"
    folder.mkdir(parents=True)
    start = time.monotonic()
    share = 1.0  # of a continuation's time and points in which it is disturbed
    while not out.problem:
        done = out.kills + out.errors
        disturb = done == 0 or (done < MOST and plan.random.random() < plan.again)
        if _attempt(scenario, folder, log, plan, out, share, disturb, errors) == 0:
            break
        share = plan.random.random()
    if not out.problem:
        try:
            out.problem = "; ".join(differences(reference.result, scenario.result(folder))[:5])
        except Exception as error:
            out.problem = f"the result cannot be read: {type(error).__name__}: {error}"
    out.seconds = round(time.monotonic() - start, 2)
    if out.problem:
        out.problem += f" [after {out.places}, kept in {folder}]"
    else:
        forget(folder)
        log.unlink(missing_ok=True)
    return out


def _attempt(
    scenario: Scenario, folder: Path, log: Path, plan: Plan, out: Trial, share: float, disturb: bool, errors: float
) -> int | None:
    """One process; counts in ``out`` what was done to it, or says there what went wrong."""
    draw, shared = plan.random.random, Shared()
    fails = disturb and draw() < errors
    by_point = fails or (disturb and not scenario.spawns and draw() >= plan.timed)
    points = Points(folder, int(plan.point() * share) if by_point else None, shared=shared)
    if fails:
        points.act, points.stays = failing(plan.random.choice(DISKS)), draw() < 0.5
    pid = child(lambda: scenario.go(folder), log, points)
    timed = disturb and not by_point
    code = wait(pid, plan.moment() * share if timed else LIMIT)
    if code is None:
        victim = plan.random.choice([pid, *workers_of(pid)]) if timed and scenario.spawns else pid
        os.kill(victim, signal.SIGKILL)
        code = wait(pid, LIMIT)
        if not timed or code is None:
            os.kill(pid, signal.SIGKILL)
            out.problem = f"did not end within {LIMIT:.0f} s after {shared.label}"
            return code
        if victim != pid:
            out.kills, out.by_time = out.kills + 1, out.by_time + 1
            out.places.append("time, a worker")
    if code == -signal.SIGKILL:
        out.kills += 1
        out.by_point += by_point
        out.by_time += not by_point
        out.places.append(shared.label if by_point else f"time, behind {shared.label or 'nothing'}")
    elif fails and code in (0, REFUSED):
        out.errors += 1
        out.places.append(f"error {shared.label}")
        code = REFUSED  # what a program let pass, such as an old checkpoint that stays, its next start makes good
    elif code != 0:
        out.problem = f"ended with {code}: {log.read_text()[-900:]}"
    return code


def kill_scenario(
    scenario: Scenario, kills: int, place: Path, seed: int, seconds: float, errors: float = 0.0
) -> Iterator[Trial]:
    """Trials of one scenario until there were enough kills and errors, or the time is over."""
    until = time.monotonic() + seconds
    reference = undisturbed(scenario, place)
    plan, done, number = Plan(reference, seed), 0, 0
    while done < kills and (done == 0 or time.monotonic() < until):
        one = trial(scenario, reference, plan, place, number, errors)
        done, number = done + one.kills + one.errors, number + 1
        yield one


def _work(names: Any, out: Any, each: int, place: Path, seed: int, seconds: float, errors: float) -> None:
    """A process that takes scenarios from a queue and puts trials into another."""
    preload()
    known = scenarios()
    while (name := names.get()) is not None:
        try:
            for one in kill_scenario(known[name], each, place / name, seed, seconds, errors):
                out.put(one)
        except Exception as error:
            out.put(Trial(name, -1, problem=f"{type(error).__name__}: {error}"))
    out.put(None)


def run(
    names: list[str], kills: int, processes: int, minutes: float, seed: int, place: Path, errors: float = 0.0
) -> Iterator[Trial]:
    """All trials, as they end."""
    queue: SimpleQueue[Any] = SimpleQueue()
    found: SimpleQueue[Any] = SimpleQueue()
    for name in [*names, *[None] * processes]:
        queue.put(name)
    seconds = 60.0 * minutes * processes / len(names)  # each scenario has its share
    each = -(-kills // len(names))
    workers = [Process(target=_work, args=(queue, found, each, place, seed, seconds, errors)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    ended = 0
    while ended < processes:
        one = found.get()
        ended += one is None
        if one is not None:
            yield one
    for worker in workers:
        worker.join()


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="in all, spread over the scenarios")
    parser.add_argument("--scenarios", help=f"some of {', '.join(scenarios())}; by default all")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop about then, whatever was reached")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--errors", type=float, default=0.0, help="share of the faults that are errors of the disk")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--out", type=Path, help="a CSV with a line for each scenario and kind of place")
    parser.add_argument("--place", type=Path, help="where the runs are made; failed ones stay there")
    arguments = parser.parse_args(argv)
    names = arguments.scenarios.split(",") if arguments.scenarios else list(scenarios())
    place = arguments.place or Path(tempfile.mkdtemp(prefix="kills"))
    trials: list[Trial] = []
    print(f"seed {arguments.seed}, in {place}", flush=True)
    a = arguments
    for one in run(names, a.kills, a.processes, a.minutes, a.seed, place, a.errors):
        trials.append(one)
        if one.problem:
            print(f"\nDIFFERENT {asdict(one)}", flush=True)
        kills, errors, bad = (sum(map(f, trials)) for f in (lambda t: t.kills, lambda t: t.errors, _is_bad))
        print(f"\r{kills} kills, {errors} errors, {len(trials)} programs, {bad} different", end="", flush=True)
        if a.out:
            write(a.out, trials)  # each time, so that a stop in the middle keeps the figures
    print()
    return int(any(t.problem for t in trials) or not trials)


def _is_bad(trial: Trial) -> bool:
    return bool(trial.problem)


def write(path: Path, trials: list[Trial]) -> None:
    """A line a scenario: programs, kills, how many at which kind of place, how many results differ."""
    kinds = sorted({_kind(place) for t in trials for place in t.places})
    with open(path, "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["scenario", "programs", "kills", "by_time", "by_point", "errors", "different", *kinds])
        for name in dict.fromkeys(t.scenario for t in trials):
            mine = [t for t in trials if t.scenario == name]
            where = Counter(_kind(place) for t in mine for place in t.places)
            sums = [sum(getattr(t, key) for t in mine) for key in ("kills", "by_time", "by_point", "errors")]
            writer.writerow([name, len(mine), *sums, sum(bool(t.problem) for t in mine), *(where[k] for k in kinds)])


def _kind(place: str) -> str:
    return "time" if place.startswith("time") else f"{place.split()[0]} {place.split()[-1]}"


if __name__ == "__main__":
    sys.exit(main())
