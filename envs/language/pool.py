"""Tasks whose problems are a finite pool, read or generated once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from unified_rl.envs.language.base import LanguageTask
from unified_rl.envs.language.codec import Segment
from unified_rl.errors import ConfigError


class PooledTask(LanguageTask):
    """Draws without replacement within a call; one that wants more than there is gets all equally often, or once more.

    A subclass calls :meth:`_fill` at the end of its constructor. Problems hold ``text`` and, where there is a correct
    answer to imitate, ``solution``.
    """

    def _fill(self, problems: list[dict[str, Any]], held_out: list[dict[str, Any]] | None = None) -> None:
        """Splits ``problems`` by the hash of their prompts, or keeps those away that are in ``held_out``.

        Prompts over ``max_prompt_length`` are left out, with a warning that counts them; demonstrations are the
        training problems whose solution fits the budget.

        Raises:
            ConfigError: no training problem is left.
        """
        kept = self._fitting(problems)
        if held_out is None:
            chosen = [self._belongs(problem) for problem in kept]
            train = [problem for problem, out in zip(kept, chosen, strict=True) if not out]
            evaluation = [problem for problem, out in zip(kept, chosen, strict=True) if out]
        else:
            evaluation = self._fitting(held_out)
            records = {problem.get("record", problem["text"]) for problem in held_out}
            train = [problem for problem in kept if problem.get("record", problem["text"]) not in records]
        solved = [problem for problem in train if problem.get("solution")]
        lengths = map(len, self.codec.encode([problem["solution"] for problem in solved]))
        short = [p for p, length in zip(solved, lengths, strict=True) if length < self.max_turn_tokens]
        self._pools = {"train": train, "eval": evaluation, "demonstration": short}
        if not train:
            raise ConfigError(
                f"no training problem is left of {len(problems)}; lower env.held_out or raise env.max_prompt_length="
                f"{self.max_prompt_length}"
            )

    def pool_sizes(self) -> dict[str, int]:
        """How many problems there are to train on, to evaluate on, and to imitate."""
        return {name: len(pool) for name, pool in self._pools.items()}

    def find_problems(self, prompts: Sequence[str]) -> list[dict[str, Any] | None]:
        """The training problem with each prompt, None where there is none (a held-out prompt, for example)."""
        train = self._pools["train"]
        known = {problem[key]: problem for key in ("asked", "text") for problem in train if key in problem}
        found = [next((known[t] for t in self._texts_of(prompt) if t in known), None) for prompt in prompts]
        made = iter(self._prompted([problem for problem in found if problem is not None], "train"))
        return [None if problem is None else next(made) for problem in found]

    def _texts_of(self, prompt: str) -> Sequence[str]:
        """The texts that a problem may have which others call ``prompt``."""
        return (prompt,)

    def solve(self, problems: Sequence[dict[str, Any]], style: str | None = None) -> list[list[int]]:
        """As of every task; empty where a problem holds no solution."""
        said = iter(super().solve([problem for problem in problems if problem.get("solution")], style))
        return [next(said) if problem.get("solution") else [] for problem in problems]

    def _fitting(self, problems: list[dict[str, Any]]) -> list[dict[str, Any]]:
        ids = self.codec.encode([problem["text"] for problem in problems])
        room = self.max_prompt_length - len(self.codec.prefix)
        kept = [problem for problem, own in zip(problems, ids, strict=True) if len(own) <= room]
        if len(kept) < len(problems):
            logging.getLogger(__name__).warning(
                "%d of %d prompts are longer than env.max_prompt_length=%d and are left out",
                len(problems) - len(kept),
                len(problems),
                room,
            )
        return kept

    def _draw(self, count: int, generator: torch.Generator, split: str) -> list[dict[str, Any]]:
        self._check_split(split)
        return self._from_pool(count, generator, split, "raise env.held_out, or name a file of held-out problems")

    def _draw_demonstrated(self, count: int, generator: torch.Generator) -> list[dict[str, Any]]:
        return self._from_pool(
            count, generator, "demonstration", "no solution fits env.max_turn_tokens; raise it, or set warm_start=none"
        )

    def _from_pool(self, count: int, generator: torch.Generator, name: str, fix: str) -> list[dict[str, Any]]:
        pool = self._pools[name]
        if not pool:
            raise ConfigError(f"the pool of {name} problems is empty; {fix}")
        rounds = -(-count // len(pool))
        order = torch.cat([torch.randperm(len(pool), generator=generator) for _ in range(rounds)])[:count]
        return [pool[index] for index in order.tolist()]

    def _demonstrate(self, problem: dict[str, Any], style: str | None) -> list[Segment]:
        return [Segment(problem["solution"], trained=True, end=True)]
