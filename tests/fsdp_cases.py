"""Forked processes that hold models in pieces, for tests: each does the same work and tells what it found."""

from __future__ import annotations

import json
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rank_cases import forked

SECONDS = 300.0


def in_processes(world: int, folder: Path, work: Callable[[Any], Any]) -> list[Any]:
    """What ``work(ranks)`` returns in each process, as JSON has it.

    Raises:
        AssertionError: one raised, or did not end; shows its traceback.
    """
    folder.mkdir(exist_ok=True)

    def one(rank: int) -> int:
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
        return 0

    hang = ""
    try:
        with forked(world, one, SECONDS):
            pass
    except AssertionError as error:
        hang = str(error)
    told = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    errors = [one["error"] for one in told if "error" in one]
    assert not errors and not hang and len(told) == world, "\n".join(errors) or hang or "a process wrote nothing"
    return [one["found"] for one in told]
