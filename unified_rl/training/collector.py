"""What a worker process holds: the rollout of a run, built from the run's own configuration, and how it is talked to.

Questions and answers are plain values and NumPy arrays. An error is an answer too: its kind, its one line, and the
traceback for the run's report.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import traceback
from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl import __version__, errors
from unified_rl.errors import CheckpointError, UnifiedRLError
from unified_rl.protocols import Opens, Restarts
from unified_rl.rollout.tickets import Collected
from unified_rl.rollout.weights import Flat, unpack_into
from unified_rl.training import state as states
from unified_rl.training.build import Job
from unified_rl.training.failures import foreign

APART = 2**40
"""Episodes and groups of one worker; those of the next are numbered from there on."""
EPOCH = "rollout/epoch"
Answer = dict[str, Any]


class Collector:
    """A rollout that is told what to do. Its constructor builds nothing, so that whatever fails is an answer."""

    def __init__(self) -> None:
        self.job: Job | None = None
        self.version: int | None = None
        self._newer: tuple[int, Flat] | None = None
        self._lock = threading.Lock()

    def ask(self, question: str, *given: Any) -> Answer:
        """Answers ``begin``, ``restore``, ``collect`` or ``end``.

        Returns:
            ``{"value": ...}``, or ``{"error": kind, "message": ..., "trace": ...}``.
        """
        try:
            with foreign("building the rollout" if question == "begin" else "collecting rows"):
                return {"value": getattr(self, f"_{question}")(*given)}
        except (UnifiedRLError, MemoryError) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            return {"error": type(error).__name__, "message": text, "trace": traceback.format_exc()}

    def _begin(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Builds the rollout.

        Args:
            settings: ``cfg`` and ``allow`` of :class:`~unified_rl.training.build.Job`, ``worker``, ``workers``,
                ``folder`` (where relative paths begin), ``path`` (of modules), ``in_flight``, ``parts`` (whether
                workers share out every batch), and what the run has settled: ``generation_batch``.
        """
        if os.path.isdir(settings["folder"]):
            os.chdir(settings["folder"])
        sys.path += [place for place in settings["path"] if place not in sys.path and os.path.isdir(place or ".")]
        worker = settings["worker"]
        self.workers, self.in_flight, self.parts = settings["workers"], settings["in_flight"], settings["parts"]
        self.job = Job(settings["cfg"], settings["allow"], worker=worker)
        self.rollout = self.job.make_rollout()
        if settings["generation_batch"] is not None:
            self.rollout.generation_batch = settings["generation_batch"][0]
        if self.in_flight:
            self.job.policy.refresh = self._refresh
        if worker:
            self.rollout.number_from(worker * APART)
        if self.parts:  # all draw the problems of a batch, and each takes its own
            self.rollout.share = (worker, self.workers)
            self.rollout.problem_generator = self.job.stream("problems")
        if isinstance(self.rollout, Opens):
            self.rollout.open()
        if self.job.book is not None and hasattr(self.rollout, "shows"):
            self.rollout.shows = self.job.book.of_collection
        return {"version": __version__, "torch": torch.__version__, "host": socket.gethostname(), "pid": os.getpid()}

    def _restore(self, packed: Mapping[str, Any], restart: int | None) -> None:
        state = unpack_state(packed)
        if restart is None:
            self.rollout.load_state_dict(state)
        elif isinstance(self.rollout, Restarts):
            self.rollout.restart(state, restart)
        else:
            raise CheckpointError(f"{type(self.rollout).__name__} cannot begin new episodes: it has no restart()")

    def _collect(self, version: int, flat: Flat) -> dict[str, Any]:
        assert self.job is not None
        if self.version is None or version > self.version or (version != self.version and not self.in_flight):
            self._load(version, flat)
        assert self.version is not None
        rows, metrics = self.rollout.collect(self.version)
        told = {key: float(value) if isinstance(value, Tensor) else value for key, value in metrics.items()}
        if EPOCH in told and not self.parts:  # the others go through the problems as well
            told[EPOCH] *= self.workers
        return {
            "rows": {key: value.numpy() for key, value in rows.items()},
            "shape": tuple(rows.batch_size),
            "metrics": told,
            "state": pack_state(self.rollout.state_dict()),
        }

    def _load(self, version: int, flat: Flat) -> None:
        assert self.job is not None
        unpack_into(self.job.policy, Flat(*flat))
        self.version = version

    def swap(self, version: int, flat: Flat) -> None:
        """Newer weights for a collection under way in another thread, from its next token on."""
        with self._lock:
            self._newer = (version, flat)

    def _refresh(self) -> int:
        """What the policy asks before every token."""
        with self._lock:
            newer, self._newer = self._newer, None
        if newer is not None and (self.version is None or newer[0] > self.version):
            self._load(*newer)
        assert self.version is not None
        return self.version

    def _end(self) -> None:
        """Ends processes of the run's reward functions and environments."""
        if self.job is not None:
            self.job.close()
            close = getattr(self.job.env, "close", None)
            if callable(close):
                close()


def pack_state(state: dict[str, Any]) -> dict[str, Any]:
    """Nested state as a JSON text and NumPy arrays, which a checkpoint holds as they are."""
    tensors: dict[str, Tensor] = {}
    return {"plain": json.dumps(states.pack(state, tensors)), "arrays": {k: v.numpy() for k, v in tensors.items()}}


def unpack_state(packed: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`pack_state`; its tensors are nobody else's."""
    tensors = {key: torch.from_numpy(array.copy()) for key, array in packed["arrays"].items()}
    return dict(states.unpack(json.loads(packed["plain"]), tensors))


def collected(value: Mapping[str, Any]) -> Collected:
    """A worker's answer to ``collect``, copied: arrays that come out of shared memory cannot be written to."""
    rows = {key: torch.from_numpy(array.copy()) for key, array in value["rows"].items()}
    state = {**value["state"], "arrays": {key: array.copy() for key, array in value["state"]["arrays"].items()}}
    return Collected((TensorDict(rows, batch_size=value["shape"]), dict(value["metrics"])), state)


def valued(answer: Answer, who: str) -> Any:
    """The value of an answer.

    Args:
        answer: of :meth:`Collector.ask`.
        who: answered, for the error's message.

    Raises:
        UnifiedRLError: of the kind that the worker met, its one line behind ``who``; the worker's traceback is a note.
    """
    if "error" not in answer:
        return answer["value"]
    kind = getattr(errors, answer["error"], errors.RolloutError)
    error = kind(f"{who}: {answer['message']}")
    error.add_note(f"In the worker:\n{answer['trace']}")
    raise error
