"""Workers as Ray actors. Ray is imported when they are started.

Ray serialises with pickle: whoever reaches a cluster's ports runs code on it, so it belongs into a trusted network.
What this file sends and takes is plain values and NumPy arrays; what runs is the installed package.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from unified_rl import __version__
from unified_rl.errors import ConfigError, RolloutError
from unified_rl.rollout.tickets import Collected, WorkerLostError
from unified_rl.rollout.weights import Flat
from unified_rl.stopping import SIGNALS, stopping
from unified_rl.training.collector import Collector, collected, valued

if TYPE_CHECKING:
    from unified_rl.training.engine import RayEngine

ANSWERS_WITHIN = 5.0
"""Seconds in which a cluster's address takes a connection."""
GRACE = 1.0
"""Seconds that workers have to end what they started."""


class RayCluster:
    """See :class:`~unified_rl.rollout.tickets.Cluster`.

    Args:
        engine: its settings.
        settings: of :func:`~unified_rl.training.engine.worker_settings`.
        pack: gives the policy's weights.

    Attributes:
        actors: the workers.
        told: what each said when it began: ``version`` and ``torch``, ``host`` and ``pid``.
    """

    def __init__(self, engine: RayEngine, settings: Mapping[str, Any], pack: Callable[[], Flat]) -> None:
        self.engine, self.settings, self.pack = engine, dict(settings), pack
        self.actors: list[Any] = []
        self.told: dict[int, dict[str, Any]] = {}
        self._ray: Any = None
        self._owns = False

    # ------------------------------------------------------------------ beginning

    def open(self) -> None:
        """Joins or starts a Ray cluster, and the workers in it, all at once.

        Raises:
            ConfigError: no Ray, no answer from the address, a cluster too small, or a worker that cannot begin.
        """
        if self.actors:
            return
        self.engine.check_installed()
        import ray

        self._ray = ray
        try:
            if not ray.is_initialized():
                self._join()
                self._owns = True
            self._check_room()
            self.actors = [self._actor() for _ in range(self.engine.workers)]
            pending = [self._begin(worker) for worker in range(self.engine.workers)]
            for worker, one in enumerate(pending):
                self._begun(worker, one)
        except BaseException:
            self.close()
            raise

    def _join(self) -> None:
        engine = self.engine
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
        if engine.address is None:
            # logical ones, so that Ray does not hold workers back that the user asked for
            options |= {"address": "local", "num_cpus": max(1, -(-engine.workers * engine.num_cpus // 1))}
        else:
            _check_address(engine.address)
            options = {**options, "address": engine.address}
            options.pop("include_dashboard")
        with _own_signals():
            try:
                self._ray.init(**options)
            except (ConnectionError, OSError, RuntimeError, ValueError) as error:
                said = " ".join(str(error).split())
                if engine.address is None:
                    raise ConfigError(f"engine=ray cannot start Ray on this machine: {said}") from error
                raise ConfigError(
                    f"engine.address={engine.address} is no Ray cluster that this machine belongs to ({said}): start "
                    "one with 'ray start --head', join it here with 'ray start --address=HOST:PORT', or leave "
                    "engine.address out"
                ) from error

    def _check_room(self) -> None:
        """Raises ConfigError for more actors than the cluster has room for: they would wait for ever."""
        found, engine = self._ray.cluster_resources(), self.engine
        for kind, each in (("CPU", engine.num_cpus), ("GPU", engine.num_gpus)):
            if each * engine.workers > found.get(kind, 0.0):
                raise ConfigError(
                    f"engine.workers={engine.workers} with engine.num_{kind.lower()}s={each:g} take "
                    f"{each * engine.workers:g} {kind}s, and the Ray cluster has {found.get(kind, 0.0):g}: lower one "
                    "of them"
                )

    def _actor(self) -> Any:
        engine = self.engine
        environment = {"env_vars": {**engine.env_vars}}  # what is set in this process now does not reach an actor
        options = {"num_cpus": engine.num_cpus, "num_gpus": engine.num_gpus, "max_restarts": 0, "max_task_retries": 0}
        if not engine.in_flight:
            return self._ray.remote(**options, runtime_env=environment)(Collector).remote()

        # beside a collection, in a thread of its own; without, everything is done in the actor's main thread
        def swap(self: Collector, version: int, flat: Flat) -> None:  # Ray marks the function itself
            Collector.swap(self, version, flat)

        aside = self._ray.method(concurrency_group="weights")(swap)
        kind = type("SwappingCollector", (Collector,), {"swap": aside, "__module__": Collector.__module__})
        groups = {"weights": 1}
        return self._ray.remote(**options, runtime_env=environment, concurrency_groups=groups)(kind).remote()

    def _begin(self, worker: int) -> Any:
        return self.actors[worker].ask.remote("begin", {**self.settings, "worker": worker})

    def _begun(self, worker: int, pending: Any) -> None:
        """Waits for a worker that was told to begin.

        Raises:
            ConfigError: it cannot import the package, or has another version of it.
        """
        try:
            told = self._value(pending, f"worker {worker}")
        except WorkerLostError as error:
            raise ConfigError(
                f"worker {worker} did not start ({error}): unified-rl {__version__} must be installed in the Python of "
                "every machine of the Ray cluster ('pip install'; a folder on its path is not enough)"
            ) from error
        if told["version"] != __version__:
            raise ConfigError(
                f"worker {worker} on {told['host']} has unified-rl {told['version']}, and this run {__version__}: "
                "install the same version on every machine"
            )
        self.told[worker] = told

    def replace(self, worker: int) -> None:
        """A new actor for a lost one."""
        self._kill(self.actors[worker])
        self.actors[worker] = self._actor()
        self.told[worker] = self._value(self._begin(worker), f"worker {worker}")

    def restore(self, worker: int, state: dict[str, Any], restart: int | None) -> None:
        """As of the protocol."""
        self._value(self.actors[worker].ask.remote("restore", state, restart), f"worker {worker}")

    # ------------------------------------------------------------------ tickets

    def put(self, version: int) -> Any:
        """One copy in the object store, which every machine fetches once."""
        return self._ray.put(tuple(self.pack()))

    def submit(self, worker: int, version: int, weights: Any) -> Any:
        """As of the protocol."""
        return self.actors[worker].ask.remote("collect", version, weights)

    def swap(self, worker: int, version: int, weights: Any) -> None:
        """As of the protocol."""
        self.actors[worker].swap.remote(version, weights)

    def result(self, pending: Any, ticket: int, worker: int) -> Collected:
        """As of the protocol."""
        return collected(self._value(pending, f"worker {worker}, batch {ticket}"))

    def first(self, pending: Sequence[Any]) -> int:
        """As of the protocol."""
        with _interrupted_as_told():
            done, _ = self._ray.wait(list(pending), num_returns=1)
        return list(pending).index(done[0])

    def is_done(self, pending: Any) -> bool:
        """As of the protocol."""
        return bool(self._ray.wait([pending], timeout=0)[0])

    def _value(self, pending: Any, who: str) -> Any:
        lost = self._ray.exceptions
        gone = (lost.RayActorError, lost.ObjectLostError, lost.OwnerDiedError, lost.NodeDiedError,
                lost.WorkerCrashedError, lost.OutOfMemoryError, lost.LocalRayletDiedError)  # fmt: skip
        try:
            with _interrupted_as_told():
                answer = self._ray.get(pending)
        except gone as error:
            raise WorkerLostError(_first_line(error)) from error
        except lost.RayError as error:
            raise RolloutError(f"{who}: {_first_line(error)}") from error
        return valued(answer, who)

    # ------------------------------------------------------------------ ending

    def close(self) -> None:
        """Lets workers end what they started, then ends them; and Ray, where this started or joined it."""
        if self._ray is None:
            return
        actors, self.actors = self.actors, []
        ray, self._ray = self._ray, None
        with _own_signals(), suppress(Exception):  # whatever is left dies with Ray
            if ray.is_initialized():
                ray.wait([actor.ask.remote("end") for actor in actors], num_returns=len(actors), timeout=GRACE)
                for actor in actors:
                    ray.kill(actor)
        if self._owns:
            self._owns = False
            with _own_signals(), suppress(Exception):
                ray.shutdown()

    def _kill(self, actor: Any) -> None:
        with suppress(Exception):
            self._ray.kill(actor)


def _check_address(address: str) -> None:
    """Refuses an address where nothing listens, which Ray would wait for.

    Raises:
        ConfigError: says so.
    """
    host, _, port = address.rpartition(":")
    if not host:  # auto
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWERS_WITHIN).close()
    except OSError as error:
        raise ConfigError(
            f"engine.address={address} does not answer ({error}): start a cluster with 'ray start --head' and give the "
            "address that it prints, or leave engine.address out"
        ) from error


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keeps the handlers of signals: Ray sets some when it starts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)


@contextmanager
def _interrupted_as_told() -> Iterator[None]:
    """Around waiting in Ray, which makes a plain KeyboardInterrupt of whatever a signal's handler raises."""
    try:
        yield
    except KeyboardInterrupt:
        with stopping() as stop:
            if stop.requested:
                raise stop.error() from None
        raise


def _first_line(error: BaseException) -> str:
    """What happened, without Ray's advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
