"""Rows that others made, joined with a language rollout's own: demonstrations in groups, or as a batch of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from unified_rl.errors import ConfigError
from unified_rl.policies.generation import Generation
from unified_rl.units import Source

Problems = list[dict[str, Any]]


class Recited:
    """A policy that says given answers; their probability under whoever wrote them is unknown, and written as 1."""

    def __init__(self, answers: Sequence[Sequence[int]], pad_id: int) -> None:
        self.answers, self.pad_id = answers, pad_id

    def generate(self, prompts: Any, *, max_new_tokens: int, **unused: Any) -> Generation:
        """The answers, as if sampled with log-prob 0."""
        length = torch.tensor([len(answer) for answer in self.answers])
        tokens = torch.full((len(self.answers), max_new_tokens), self.pad_id)
        for row, answer in zip(tokens, self.answers, strict=True):
            row[: len(answer)] = torch.tensor(answer)
        return Generation(tokens, torch.zeros(tokens.shape), length, torch.ones(len(length), dtype=torch.bool))


class RowSource(Protocol):
    """Problems and answers to add to a collection.

    Attributes:
        source: written to the rows.
        joins: rows belong to the groups of the collection's prompts; else each is a group of its own.
    """

    source: Source
    joins: bool

    def count(self, prompts: int) -> int:
        """Rows for a collection of so many prompts."""
        ...

    def rows(self, env: Any, problems: Problems, generator: torch.Generator) -> tuple[Problems, list[list[int]]]:
        """Problems and answers, ``count`` each; those that join come prompt by prompt."""
        ...


class Demonstrations:
    """The environment's own solutions.

    Args:
        per_group: of each prompt of the collection; they join its group.
        rows: instead: of problems drawn for them, as a batch of their own.
        style: passed to the task.

    Raises:
        ConfigError: not exactly one of ``per_group`` and ``rows``.
    """

    source = Source.DEMONSTRATION

    def __init__(self, per_group: int = 0, rows: int = 0, style: str | None = None) -> None:
        if (per_group > 0) == (rows > 0):
            raise ConfigError("a source of demonstrations needs exactly one of per_group and rows")
        self.per_group, self.batch, self.style = per_group, rows, style
        self.joins = per_group > 0

    def count(self, prompts: int) -> int:
        """Rows for a collection."""
        return self.batch or prompts * self.per_group

    def rows(self, env: Any, problems: Problems, generator: torch.Generator) -> tuple[Problems, list[list[int]]]:
        """Problems and the task's solutions."""
        if not self.joins:
            problems = env.problems(self.batch, generator, "train")
        else:
            problems = [problem for problem in problems for _ in range(self.per_group)]
        return problems, env.solve(problems, self.style)


class Hints:
    """Where every answer to a prompt failed, samples again after a growing share of the solution. GHPO.

    The shown tokens are context: masked out, so the loss is over what the policy said after them.

    Args:
        shares: of the solution, tried in this order until an answer succeeds.
        style: of the solution.
    """

    def __init__(self, shares: tuple[float, ...] = (0.25, 0.5, 0.75), style: str | None = None) -> None:
        self.shares, self.style = shares, style

    def __call__(
        self, env: Any, problems: Problems, group_size: int, told: Any, generate: Any, draw: Any
    ) -> dict[str, float]:
        """Replaces conversations in ``told``.

        Args:
            env: the task.
            problems: of every conversation.
            group_size: conversations of a prompt, consecutive.
            told: the conversations so far, and the environment's numbers of each.
            generate: ``(problems, prefixes) -> told``: the rollout, told what each answer begins with.
            draw: ``count -> problems``, other ones.
        """
        talk = told[0]
        first = failed = self._failed(talk, group_size)
        for share in self.shares:
            if not len(failed):
                break
            chosen = [problems[row] for row in failed.tolist()]
            solutions = env.solve(chosen, self.style)
            prefixes = [ids[: int(share * (len(ids) - 1))] for ids in solutions]
            put(told, failed, generate(chosen, prefixes))
            failed = self._failed(talk, group_size)
        rows = len(problems)
        return {"rollout/hinted": len(first) / rows, "rollout/unsolved": len(failed) / rows}

    @staticmethod
    def _failed(talk: Any, group_size: int) -> Tensor:
        won = (talk.reward.sum(-1).reshape(-1, group_size) > 0).any(-1)
        return (~won).repeat_interleave(group_size).nonzero().squeeze(-1)


class Refill:
    """Groups whose rewards are all equal make room for other prompts', as often as ``tries``. DAPO's dynamic sampling.

    Row counts stay; what is still equal in the end is left to the agent (``agent.drop_equal_groups``).
    """

    def __init__(self, tries: int = 3) -> None:
        self.tries = tries

    def __call__(
        self, env: Any, problems: Problems, group_size: int, told: Any, generate: Any, draw: Any
    ) -> dict[str, float]:
        """As of :class:`Hints`; ``problems`` are replaced in place."""
        sampled = 0
        equal = self._equal(told[0], group_size)
        for _ in range(self.tries):
            if not len(equal):
                break
            other = [problem for problem in draw(len(equal) // group_size) for _ in range(group_size)]
            put(told, equal, generate(other, [[] for _ in other]))
            for row, problem in zip(equal.tolist(), other, strict=True):
                problems[row] = problem
            sampled += len(equal)
            equal = self._equal(told[0], group_size)
        return {"rollout/refilled": sampled / len(problems), "rollout/equal": len(equal) / len(problems)}

    @staticmethod
    def _equal(talk: Any, group_size: int) -> Tensor:
        total = talk.reward.sum(-1).reshape(-1, group_size)
        return (total.amax(-1) == total.amin(-1)).repeat_interleave(group_size).nonzero().squeeze(-1)


def put(told: Any, rows: Tensor, others: Any) -> None:
    """Puts other conversations, and the environment's numbers of them, in the place of ``rows``."""
    told[0].replace(rows, others[0])
    for key, value in others[1].items():
        told[1][key][rows] = value
