"""The processes of one run, as one of them sees them: process 0 collects, writes and speaks; all of them train.

What process 0 does by itself takes as long as it takes, so the others look for a word of it in the store that they
share, and enter a message only when it is about to. A process that ends by an error leaves its reason there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from unified_rl.errors import ConfigError, PeerError, UnifiedRLError
from unified_rl.instantiate import build
from unified_rl.launching import PARENT, launched, local
from unified_rl.protocols import SharesPasses
from unified_rl.rollout.control import STEPS
from unified_rl.rollout.feed import Batch, pack_rows, unpack_rows
from unified_rl.shard import ALONE, Shard
from unified_rl.stopping import Interrupted, StopSignal
from unified_rl.training.learner import FullyShard, check_learner, own_device
from unified_rl.training.wire import decode, encode

if TYPE_CHECKING:
    from unified_rl.training.memory_plan import MemoryPlan
    from unified_rl.training.trainer import Trainer

OVER = "over"
"""Of the store: how the first process that ended did so."""
READY, BYE = "ready", "bye"
"""Begin the words of a process that stands where process 0 is, and of one that ends."""
JOINING = 600.0
"""Seconds in which all processes must have begun: imports on a busy machine take their time."""
GLANCE = 0.2
"""Seconds between two looks whether the run is over, of a process that waits for another's word."""
LATE, PAUSES = 0.02, (0.0005, 0.02)
"""It asks again after this part of the time that it has waited; least and most seconds of that."""
REASON = 3.0
"""Seconds that a process which lost another looks for the reason."""
ORPHANED = (1.0, 30.0, 120.0)
"""Seconds between two looks for the launcher, from its end to a second signal, and to the kill."""


class Ranks:
    """A run in this process alone.

    Attributes:
        leads: whether this process collects, evaluates, writes and speaks.
        parallel: whether it was launched to train with others.
        shard: of the processes that divide the passes.
        command: what a run is gone on with.
        reads_pieces: every process reads what it holds of a checkpoint by itself.
    """

    leads = True
    parallel = reads_pieces = False
    command = "unified-rl train"
    shard: Shard = ALONE

    def own(self, cfg: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration of this process."""
        return dict(cfg)

    def enlist(self, agent: Any, name: str) -> None:
        """Divides the passes of an agent."""

    def part_of(self, plan: MemoryPlan) -> MemoryPlan:
        """A plan of memory with what is free for this process."""
        return plan

    def trained(self, policy: Any) -> Any:
        """The policy that an agent gets, for the one that samples."""
        return policy

    def place(self, agent: Any, policy: Any) -> None:
        """Puts an agent's weights where they belong; ``policy`` samples."""

    def updating(self) -> AbstractContextManager[None]:
        """Around an agent's update."""
        return nullcontext()

    def updated(self, agent: Any) -> None:
        """Gives the policy that samples the newest weights."""

    def write(self, aside: Path, state: dict[str, Any]) -> None:
        """Writes into the folder of a checkpoint what processes hold in pieces."""

    def load(self, agent: Any, state: Any, folder: Path) -> None:
        """Puts an agent where a checkpoint is."""
        agent.load_state_dict(state)

    def serve(self, error: BaseException | None = None) -> None:
        """Others than process 0, behind the last update or an error: helps it to save."""

    def tell(self, cfg: Mapping[str, Any]) -> None:
        """Gives the others the run's configuration."""

    def start(self, trainer: Trainer, checkpoint: Path | None) -> None:
        """Puts every process where process 0 is."""

    def taken(self, take: Callable[[], Batch]) -> Batch:
        """The next batch."""
        return take()

    def agree(self, stop: StopSignal, trainer: Trainer) -> None:
        """At the end of an update: whether the run goes on.

        Raises:
            Interrupted: a signal came, to whichever process.
        """
        if stop.requested:
            raise stop.error()


class ProcessShard(Shard):
    """A rank that is a process of ``torch.distributed``; tensors on a CPU go by gloo, others by NCCL.

    Args:
        lost: turns what a message raises into an error that says who is gone.
    """

    def __init__(self, rank: int, world: int, lost: Callable[[Exception], BaseException]) -> None:
        super().__init__(rank, world)
        self._lost = lost

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Around a message: where it fails, the error says who is gone."""
        try:
            yield
        except RuntimeError as error:
            raise self._lost(error) from error

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """As of :class:`Shard`."""
        x = x.contiguous()
        found = [torch.empty_like(x) for _ in range(self.world)]
        with self.sending():
            dist.all_gather(found, x)
        return found

    def all_reduce(self, x: Tensor) -> None:
        """As of :class:`Shard`."""
        with self.sending():
            dist.all_reduce(x)

    def broadcast(self, x: Tensor) -> None:
        """Replaces ``x`` by that of process 0."""
        with self.sending():
            dist.broadcast(x, 0)


class Launched(Ranks):
    """A run in several processes, by what ``unified-rl launch`` or ``torchrun`` says in the environment.

    Args:
        timeout: see :class:`~unified_rl.training.learner.DataParallel`.
        device: of the run.

    Raises:
        PeerError: not all of them came.
    """

    parallel = True
    shard_class: type[ProcessShard] = ProcessShard

    def __init__(self, timeout: float, device: str) -> None:
        found = launched()
        assert found is not None
        rank, world = found
        self.leads, self.timeout = rank == 0, timeout
        self.command = f"unified-rl launch --processes {world} train"
        if device == "cuda":
            torch.cuda.set_device(own_device(device))
        try:
            self.store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=JOINING)))
            backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
            given: dict[str, Any] = {"timeout": timedelta(seconds=timeout), "rank": rank, "world_size": world}
            dist.init_process_group(backend, store=dist.PrefixStore("group", self.store), **given)
        except (RuntimeError, ValueError) as error:
            told = " ".join(str(error).split())[:200]
            if "EADDRINUSE" in told or "already in use" in told:
                port = os.environ.get("MASTER_PORT", "")
                raise PeerError(
                    f"port {port} of this machine is in use, and process 0 of this run needs it for the others to find "
                    "it: set MASTER_PORT (torchrun --master-port) to a free one; unified-rl launch looks for one itself"
                ) from error
            raise PeerError(f"the {world} processes of this run could not find one another: {told}") from error
        self.shard: ProcessShard = self.shard_class(rank, world, self.lost)
        self._turn = 0
        if not self.leads:
            warnings.simplefilter("ignore")  # process 0 shows the same ones
        if PARENT in os.environ:
            threading.Thread(target=_follow_parent, args=(int(os.environ[PARENT]),), daemon=True).start()

    # ------------------------------------------------------------------ the store

    def end(self, error: BaseException | None) -> None:
        """Leaves word that this process ends, and by what; the first word stands."""
        told: dict[str, Any] = {"rank": self.shard.rank, "error": None}
        if isinstance(error, Interrupted):
            told["number"] = error.number
        if error is not None:
            expected = isinstance(error, UnifiedRLError | KeyboardInterrupt)
            told["error"] = str(error) if expected else f"{type(error).__name__}: {' '.join(str(error).split())}"
            told["traceback"] = "" if expected else "".join(traceback.format_exception(error))
        with suppress(RuntimeError, ValueError):
            if not self.store.check([OVER]):
                self.store.set(OVER, json.dumps(told))
            if not isinstance(error, PeerError):  # else somebody is gone, who reads nothing
                self._part()
        if error is None:
            with suppress(RuntimeError, ValueError):
                dist.destroy_process_group()

    def _part(self) -> None:
        """Process 0, which keeps the store, waits for the others to have read it."""
        if not self.leads:
            self.store.set(f"{BYE}/{self.shard.rank}", "")
            return
        keys = [f"{BYE}/{rank}" for rank in range(1, self.shard.world)]
        until = time.monotonic() + REASON
        while keys and not self.store.check(keys) and time.monotonic() < until:
            time.sleep(0.01)

    def _over(self) -> dict[str, Any] | None:
        """How another process ended, if one did."""
        try:
            return dict(json.loads(self.store.get(OVER))) if self.store.check([OVER]) else None
        except (RuntimeError, ValueError) as error:
            raise PeerError("process 0 of this run is gone") from error

    def _wait(self, key: str) -> bool:
        """Waits until a key is there; False where the run is over instead, and nothing was wrong.

        It asks, rather than letting the store wait: that writes two lines to standard error whenever its time is up.
        """
        began = looked = time.monotonic()
        while True:
            try:
                if self.store.check([key]):
                    return True
            except RuntimeError as error:
                raise PeerError("process 0 of this run is gone") from error
            now = time.monotonic()
            if now - looked >= GLANCE:
                looked, told = now, self._over()
                if told is not None:
                    if told["error"] is None:
                        return False
                    raise self._ended(told)
            time.sleep(min(max(LATE * (now - began), PAUSES[0]), PAUSES[1]))

    def lost(self, error: Exception) -> BaseException:
        """Why a message failed."""
        until = time.monotonic() + REASON
        while time.monotonic() < until:
            try:
                told = self._over()
            except PeerError as gone:
                return gone
            if told is not None and told["rank"] != self.shard.rank:
                return self._ended(told)
            time.sleep(0.05)
        if "imed out" in str(error):
            return PeerError(
                f"another process of this run did not answer within learner.timeout={self.timeout:g} seconds, or took "
                "another branch"
            )
        return PeerError("another process of this run is gone: it was killed, or ran out of memory")

    def _ended(self, told: Mapping[str, Any]) -> BaseException:
        if "number" in told:
            return Interrupted(int(told["number"]))
        error = PeerError(f"process {told['rank']} of this run failed: {told['error'] or 'it ended before the others'}")
        if told.get("traceback"):
            error.add_note(str(told["traceback"]))
        return error

    def announced(self) -> bool:
        """Process 0 says that it is about to send, and the others wait for that; False where the run is over.

        Until then they do what it asks for.
        """
        if self.leads:
            self._say("")
            return True
        while True:
            self._turn += 1
            key = f"turn/{self._turn}"
            if not self._wait(key):
                return False
            told = self.store.get(key).decode()
            if not told:
                return True
            if not self.heard(told):
                return True

    def ask(self, job: Mapping[str, Any]) -> None:
        """Process 0 lets the others do something in place of the message that it would send next."""
        self._say(json.dumps(job))

    def heard(self, told: str) -> bool:
        """Does what :meth:`ask` says, and ends in a message, so that all have heard; False where nothing follows."""
        raise PeerError(f"process 0 of this run asks for what learner=data_parallel does not do: {told[:80]}")

    def _say(self, what: str) -> None:
        self._turn += 1
        key = f"turn/{self._turn}"
        told = self._over()
        if told is not None:
            raise self._ended(told)
        try:
            self.store.set(key, what)
            if self._turn > 2:
                self.store.delete_key(f"turn/{self._turn - 2}")
        except RuntimeError as error:
            raise self.lost(error) from error

    def _sent(self, value: Any) -> Any:
        """What process 0 sends, everywhere; others give None."""
        header, data = encode(value) if self.leads else (torch.zeros(0), torch.zeros(0))
        sizes = torch.tensor([len(header), len(data)])
        self.shard.broadcast(sizes)
        if not self.leads:
            header, data = (torch.zeros(int(n), dtype=torch.uint8) for n in sizes)
        self.shard.broadcast(header)
        if len(data):
            self.shard.broadcast(data)
        return value if self.leads else decode(header, data)

    # ------------------------------------------------------------------ a run

    def own(self, cfg: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration of this process: a device of its own; others than 0 keep no record and collect nothing."""
        cfg = {**cfg, "device": own_device(str(cfg.get("device", "cpu")))}
        if self.leads:
            return cfg
        silent = {"logger": (), "callbacks": (), "keep_best": None, "early_stopping": None, "samples_rows": 0}
        return {**cfg, **silent, "progress": False, "warm_start": None, "engine": None}

    def enlist(self, agent: Any, name: str) -> None:
        """Divides the passes of an agent.

        Raises:
            ConfigError: it cannot.
        """
        if not isinstance(agent, SharesPasses):
            raise ConfigError(
                f"learner=data_parallel divides the passes of policy_gradient, ppo, behavior_cloning, sft, sac and "
                f"actor_critic, and agent={name} is none of them: set learner=single"
            )
        agent.share(self.shard)

    def part_of(self, plan: MemoryPlan) -> MemoryPlan:
        """A plan of memory with what is free for this process: main memory is shared by those of one machine."""
        own = plan.free is None or plan.device.startswith("cuda")
        return plan if own else dataclasses.replace(plan, free=(plan.free or 0) // local()[1])

    def tell(self, cfg: Mapping[str, Any]) -> None:
        """Gives the others the run's configuration."""
        self.announced()
        self._sent(dict(cfg))

    def told(self) -> dict[str, Any] | None:
        """The run's configuration; None where process 0 has nothing to do."""
        return dict(self._sent(None)) if self.announced() else None

    def start(self, trainer: Trainer, checkpoint: Path | None) -> None:
        """Gives the others the agent's state and the counters; rows they read from the checkpoint themselves."""
        rows = None
        if checkpoint is not None and trainer.replay is not None and (checkpoint / "replay").exists():
            rows = str(checkpoint / "replay")
        keys = ("updates", "_steps", "planned", "stopped")
        state: dict[str, Any] = {key: getattr(trainer, key) for key in keys} if self.leads else {}
        if not self.announced():
            raise PeerError("process 0 of this run ended before it began")
        found = self._sent({"agent": self.state_for(trainer.agent), "rows": rows, **state} if self.leads else None)
        if self.leads:
            for rank in range(1, self.shard.world):
                self._wait(f"{READY}/{rank}")
            self.updated(trainer.agent)
            return
        self.take_over(trainer.agent, found["agent"])
        if found["rows"] is not None:
            assert trainer.replay is not None
            trainer.replay.loads(Path(found["rows"]))
        for key in keys:
            setattr(trainer, key, found[key])
        self.store.set(f"{READY}/{self.shard.rank}", "")
        self.updated(trainer.agent)

    def state_for(self, agent: Any) -> Any:
        """The agent's state as the others take it over."""
        return agent.state_dict()

    def take_over(self, agent: Any, state: Any) -> None:
        """Takes over process 0's state."""
        agent.load_state_dict(state)

    def digest(self, agent: Any) -> int:
        """Of what all processes hold alike at the end of an update."""
        return digest(agent.weights())

    def taken(self, take: Callable[[], Batch]) -> Batch:
        """The batch that process 0 takes, everywhere; metrics of the collection are its own."""
        batch = take() if self.leads else None
        self.announced()
        if batch is None:
            found = self._sent(None)
            return unpack_rows(found["rows"]), found["metrics"]
        rows, metrics = batch
        kept = {key: metrics[key] for key in (STEPS,) if key in metrics}
        self._sent({"rows": pack_rows(rows), "metrics": kept})
        return rows, metrics

    def agree(self, stop: StopSignal, trainer: Trainer) -> None:
        """At the end of an update: whether the run goes on, and whether all hold the same weights.

        Raises:
            Interrupted: a signal came, to whichever process.
            PeerError: another process ended.
        """
        if not self.announced():
            raise PeerError("process 0 of this run ended before the others")
        mine = [
            stop.number if stop.requested else 0,
            bool(trainer.stopped),
            trainer.updates,
            self.digest(trainer.agent),
        ]
        found = torch.stack(self.shard.all_gather(torch.tensor(mine, dtype=torch.int64)))
        if int(found[:, 0].amax()):
            raise Interrupted(int(found[:, 0].amax()))
        if bool((found[:, 2] != found[0, 2]).any()):
            raise PeerError(f"the processes of this run stand at different updates, {found[:, 2].tolist()}")
        if bool(found[0, 1]):
            trainer.stop("process 0 ends the run")
        if bool((found[:, 3] != found[0, 3]).any()):
            # rounding differs with how memory is aligned, and a callback may have changed weights: process 0's stand
            state = self._sent(self.state_for(trainer.agent) if self.leads else None)
            if not self.leads:
                self.take_over(trainer.agent, state)


def digest(tensors: Iterable[Tensor]) -> int:
    """The sum of the bits of tensors, as whole numbers; equal ones have the same."""
    total = torch.zeros((), dtype=torch.int64)
    for x in tensors:
        flat = x.detach().contiguous().reshape(-1)
        bits = {4: torch.int32, 8: torch.int64, 2: torch.int16}.get(flat.element_size(), torch.uint8)
        total = total + flat.view(bits).sum(dtype=torch.int64).cpu()
    return int(total)


@contextmanager
def ranks_of(cfg: Mapping[str, Any], allow: Sequence[str] = ()) -> Iterator[Ranks]:
    """The processes that train a run, which end together.

    Args:
        cfg: the run's configuration.
        allow: prefixes that configuration may build.

    Raises:
        ConfigError: the configuration does not fit how this process was started.
        PeerError: another process did not come, or is gone.
    """
    check_learner(cfg)
    if launched() is None:
        yield Ranks()
        return
    learner = build(cfg["learner"], allow=allow, setting="learner")
    kind: type[Launched] = Launched
    if isinstance(learner, FullyShard):
        from unified_rl.training.fully_sharded import FullySharded  # what it builds on takes seconds to import

        kind = FullySharded
    found = kind(learner.timeout, str(cfg.get("device", "cpu")))
    try:
        yield found
    except BaseException as error:
        found.end(error)
        raise
    found.end(None)


def _follow_parent(parent: int) -> None:
    """Ends this process when the one that launched it is gone: by signals, so that the update before it is saved."""
    while os.getppid() == parent:
        time.sleep(ORPHANED[0])
    for number, pause in ((signal.SIGTERM, ORPHANED[1]), (signal.SIGTERM, ORPHANED[2]), (signal.SIGKILL, 0.0)):
        os.kill(os.getpid(), number)
        time.sleep(pause)
