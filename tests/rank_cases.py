"""Processes that find one another, for tests: forked, so that nothing is imported anew."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess


@contextmanager
def forked(world: int, work: Callable[[int], int], seconds: float) -> Iterator[list[BaseProcess]]:
    """Forked processes that end with the exit code ``work(rank)``; at the end of the block they are waited for.

    Args:
        world: how many.
        work: finds the environment variables of ``unified-rl launch``.
        seconds: after which they are killed.

    Raises:
        AssertionError: one of them had to be.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}

    def one(rank: int) -> None:
        os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
        code = work(rank)
        sys.stdout.flush()
        os._exit(code)

    context = multiprocessing.get_context("fork")
    children: list[BaseProcess] = [context.Process(target=one, args=(rank,)) for rank in range(world)]
    for child in children:
        child.start()
    try:
        yield children
        for child in children:
            child.join(seconds)
        assert not any(child.is_alive() for child in children), "a process hangs"
    finally:
        for child in children:
            child.kill()
            child.join()
