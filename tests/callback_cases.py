"""Callbacks of the tests: a module of its own, since paths name it."""

from __future__ import annotations

from typing import Any

import torch

import unified_rl as ur

CALLS: list[tuple[Any, ...]] = []


class Notes(ur.Callback):
    """Notes what it is called with."""

    def __init__(self, word: str = "") -> None:
        self.word, self.updates = word, 0

    def on_run_begin(self, trainer: Any) -> None:
        CALLS.append(("begin", trainer.updates, self.word))

    def on_rollout_end(self, trainer: Any, rows: Any, metrics: Any) -> None:
        CALLS.append(("rollout", trainer.updates, rows.numel(), sorted(metrics)[:1]))

    def on_update_end(self, trainer: Any, metrics: Any) -> None:
        self.updates += 1
        CALLS.append(("update", trainer.updates, "loss/total" in metrics))

    def on_evaluation_end(self, trainer: Any, metrics: Any) -> None:
        CALLS.append(("evaluation", trainer.updates, "eval/score" in metrics))

    def on_run_end(self, trainer: Any) -> None:
        CALLS.append(("end", trainer.updates, self.updates))

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "tensor": torch.tensor([self.updates])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert int(state["tensor"]) == state["updates"]
        self.updates = state["updates"]


class Early:
    """Stops at an update, in one of the ways."""

    def __init__(self, hook: str = "on_update_end", update: int = 3) -> None:
        self.update = update

        def stops(trainer: Any, *given: Any) -> bool:
            return trainer.updates != self.update

        setattr(self, hook, stops)


class Asks:
    """Asks the trainer."""

    def on_evaluation_end(self, trainer: Any, metrics: Any) -> None:
        trainer.stop("it is good enough")


class Fails:
    """Raises at an update."""

    def on_update_end(self, trainer: Any, metrics: Any) -> None:
        if trainer.updates == 2:
            raise ValueError("no such thing")


class Nothing:
    """Has no hook."""
