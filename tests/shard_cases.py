"""Several processes of one run, as threads of a test: they exchange tensors and wait for one another."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from unified_rl.objectives.forward import Forward
from unified_rl.objectives.objective import Scored
from unified_rl.shard import Shard, in_pieces

for kind, name in ((Scored, "log_prob"), (Forward, "_found"), (Forward, "nll")):
    vars(kind)[name].lock = nullcontext()  # Python 3.11 computes one such property at a time, and ranks wait in it

SECONDS = 10.0
"""After which a process that another waits for counts as having taken another branch."""


class Meeting:
    """Where the ranks of one world lay their tensors down."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.barrier = threading.Barrier(world, timeout=SECONDS)
        self.places: list[Any] = [None] * world
        self.messages = 0


class ThreadShard(Shard):
    """A rank that is a thread."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        super().__init__(rank, meeting.world)
        self.meeting = meeting

    def all_gather(self, x: Tensor) -> list[Tensor]:
        self.meeting.places[self.rank] = x.detach().clone()
        self.meeting.barrier.wait()
        found = [place.clone() for place in self.meeting.places]
        assert len({(place.shape, place.dtype) for place in found}) == 1, "tensors of several shapes or kinds"
        self.meeting.messages += self.rank == 0
        self.meeting.barrier.wait()
        return found

    def all_reduce(self, x: Tensor) -> None:
        x.copy_(torch.stack(self.all_gather(x)).sum(0))


def full(x: Tensor) -> Tensor:
    """A tensor whole, where processes hold pieces of it; all must ask."""
    found: Tensor = x.full_tensor() if in_pieces(x) else x  # type: ignore[operator]
    return found.detach().clone()


class Told:
    """What an update of an agent leaves behind: every step's gradients, the weights and the metrics, whole."""

    def __init__(self, agent: Any, replay: Any) -> None:
        self.gradients: list[Tensor] = []
        step = agent.optimizer.step

        def spy(loss: Tensor) -> Tensor:
            found = [torch.zeros_like(p) if p.grad is None else p.grad for p in agent.optimizer.parameters]
            self.gradients.append(torch.cat([full(x).flatten() for x in found]))
            return step(loss)

        agent.optimizer.step = spy
        self.metrics = {key: float(value) for key, value in agent.update(replay, 0.25).items()}
        self.weights = torch.cat([full(p).flatten() for p in agent.optimizer.parameters])
        self.order = agent.generator.get_state()


def on_ranks(world: int, work: Callable[[Shard], Any]) -> list[Any]:
    """What ``work(shard)`` returns on every rank.

    Raises:
        Exception: what a rank raised, the first one's that did not merely wait for another.
    """
    meeting, results, errors = Meeting(world), [None] * world, [None] * world

    def one(rank: int) -> None:
        try:
            results[rank] = work(ThreadShard(rank, meeting))
        except BaseException as error:
            errors[rank] = error  # type: ignore[call-overload]
            meeting.barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    raised = [error for error in errors if error is not None]
    for error in [*(e for e in raised if not isinstance(e, threading.BrokenBarrierError)), *raised][:1]:
        raise error
    return results
