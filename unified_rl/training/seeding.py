"""One seed, many named streams. Nothing in the library draws from the global generators."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive(seed: int, name: str) -> int:
    """A 63-bit seed for the stream ``name``; different names give unrelated streams."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, name: str, device: str | torch.device = "cpu") -> torch.Generator:
    """A torch generator for the stream ``name``."""
    return torch.Generator(device=device).manual_seed(derive(seed, name))


@contextmanager
def scoped(seed: int, name: str) -> Iterator[None]:
    """Weight initialisation under a seed of its own; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, name))
        yield
