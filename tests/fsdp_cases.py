"""Forked processes that hold models in pieces, for tests: each does the same work and tells what it found."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SECONDS = 300.0


def full(x: Tensor) -> Tensor:
    """A tensor whole; all processes must ask."""
    found: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x  # type: ignore[operator]
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


def in_processes(world: int, folder: Path, work: Callable[[Any], Any]) -> list[Any]:
    """What ``work(ranks)`` returns in each process, as JSON has it.

    Raises:
        AssertionError: one raised, or did not end; shows its traceback.
    """
    folder.mkdir(exist_ok=True)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}

    def one(rank: int) -> None:
        os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
        from unified_rl.training.fully_sharded import FullySharded

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ranks = FullySharded(60.0, "cpu")
                told: Any = {"found": work(ranks)}
                ranks.end(None)
        except BaseException:
            told = {"error": traceback.format_exc()}
        (folder / f"{rank}.json").write_text(json.dumps(told))
        sys.stdout.flush()
        os._exit(0)

    context = multiprocessing.get_context("fork")
    children = [context.Process(target=one, args=(rank,)) for rank in range(world)]
    for child in children:
        child.start()
    for child in children:
        child.join(SECONDS)
    hang = [child for child in children if child.is_alive()]
    for child in hang:
        child.kill()
        child.join()
    told = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    errors = [one["error"] for one in told if "error" in one]
    assert not errors and not hang and len(told) == world, "\n".join(errors) or "a process hangs"
    return [one["found"] for one in told]
