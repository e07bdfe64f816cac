"""What is sampled again inside one collection, and after which tokens: hints, and other prompts for decided ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from unified_rl.configurable import configurable
from unified_rl.protocols import LanguageEnv, require_solutions
from unified_rl.ranges import Count, OpenUnit, ranged
from unified_rl.rollout.conversation import Conversations, Problems, Told, ordered, put
from unified_rl.rollout.whispered import part_of
from unified_rl.units import COUNTED


class Generate(Protocol):
    """The policy, told what each answer begins with."""

    def __call__(
        self,
        problems: Problems,
        prefixes: list[list[int]],
        shown: Sequence[Sequence[int]] | None = None,
        scored: bool = True,
    ) -> Told:
        """Conversations.

        Args:
            problems: ``B``.
            prefixes: what each answer begins with, masked out.
            shown: what the policy sees behind each prompt and rows do not hold, whose log-probs are then those of the
                policy that saw nothing; None shows nothing.
            scored: False leaves the log-probs as sampled, of what becomes no row.
        """
        ...


Draw = Callable[[int], Problems]
"""``count -> problems``: other training problems."""


@runtime_checkable
class Context(Protocol):
    """Replaces conversations of a collection; their number stays."""

    def check(self, env: LanguageEnv, setting: str) -> None:
        """Refuses a task that it cannot serve, before the first step.

        Args:
            env: the task.
            setting: its name in the configuration, for the message.

        Raises:
            ConfigError: the task lacks what is needed.
        """
        ...

    def __call__(
        self, env: LanguageEnv, problems: Problems, group_size: int, told: Told, generate: Generate, draw: Draw
    ) -> dict[str, float]:
        """Replaces conversations in ``told``.

        Args:
            env: the task.
            problems: of every conversation; an entry may be replaced, for all rows of a group.
            group_size: conversations of a prompt, consecutive.
            told: the conversations so far, and the environment's numbers of each.
            generate: the rollout's own sampling.
            draw: other problems.

        Returns:
            Metrics.
        """
        ...


@configurable
@ranged()
class Hints:
    """Where every answer to a prompt failed, samples again after a growing share of the solution. GHPO.

    The shown tokens are context: masked out, so the loss is over what the policy said after them.

    Args:
        shares: of the solution, tried in this order until an answer succeeds.
        style: of the solution.
        keep: ``all`` of what is sampled takes the place of the group, or the ``solved`` answers alone that of as many
            failed ones.
    """

    metrics = ("hinted", "unsolved")
    """Names of what a call returns, behind ``rollout/``."""

    def __init__(
        self,
        shares: tuple[OpenUnit, ...] = (0.25, 0.5, 0.75),
        style: str | None = None,
        keep: Literal["all", "solved"] = "all",
    ) -> None:
        self.shares, self.style, self.keep = shares, style, keep

    def check(self, env: LanguageEnv, setting: str) -> None:
        """Refuses a task without solutions."""
        require_solutions(env, setting, self.style)

    def __call__(
        self, env: LanguageEnv, problems: Problems, group_size: int, told: Told, generate: Generate, draw: Draw
    ) -> dict[str, float]:
        """As of :class:`Context`."""
        solver = require_solutions(env, "rollout.context", self.style)

        def again(chosen: Problems, share: float) -> Told:
            return generate(chosen, [part_of(ids, share, env) for ids in solver.solve(chosen, self.style)])

        return until_solved(self.shares, problems, group_size, told, again, self.keep)


def until_solved(
    shares: Sequence[float],
    problems: Problems,
    group_size: int,
    told: Told,
    again: Callable[[Problems, float], Told],
    keep: Literal["all", "solved"] = "all",
) -> dict[str, float]:
    """Puts others in the place of the groups that failed, for one share of help after the other.

    Args:
        shares: tried in this order.
        problems: of every conversation.
        group_size: conversations of a group.
        told: the conversations, which are replaced in place.
        again: ``(problems of failed groups, share) -> told``.
        keep: of :class:`Hints`.

    Returns:
        The metrics of :class:`Hints`: shares of the conversations whose group failed at first, and to the end.
    """
    first = failed = failed_groups(told[0], group_size)
    for share in shares:
        if not len(failed):
            break
        found = again([problems[row] for row in failed.tolist()], share)
        put_some(told, failed, found, solved(found) if keep == "solved" else None)
        failed = failed_groups(told[0], group_size)
    rows = len(problems)
    return {"rollout/hinted": len(first) / rows, "rollout/unsolved": len(failed) / rows}


def failed_groups(talk: Conversations, group_size: int) -> Tensor:
    """Conversations ``[n]`` int64 of groups of which none has a positive return."""
    won = (talk.reward.sum(-1).reshape(-1, group_size) > 0).any(-1)
    return (~won).repeat_interleave(group_size).nonzero().squeeze(-1)


def solved(told: Told) -> Tensor:
    """Conversations ``[B]`` bool with a positive return."""
    return told[0].reward.sum(-1) > 0


def put_some(told: Told, rows: Tensor, others: Told, chosen: Tensor | None = None) -> None:
    """Puts those of other conversations that ``chosen [n]`` names, or all, in the place of theirs of ``rows [n]``."""
    if chosen is None or bool(chosen.all()):
        put(told, rows, others)
    elif bool(chosen.any()):
        put(told, rows[chosen], ordered(others, chosen.nonzero().squeeze(-1)))


@configurable
@ranged()
class Refill:
    """Groups whose rewards are all equal make room for other prompts', as often as ``tries``. DAPO's dynamic sampling.

    Row counts stay; what is still equal in the end is left to the agent (``agent.drop_equal_groups``).
    """

    metrics = ("refilled", "equal")
    """As of :class:`Hints`."""

    def __init__(self, tries: Count = 3) -> None:
        self.tries = tries

    def check(self, env: LanguageEnv, setting: str) -> None:
        """Every task can be drawn from."""

    def __call__(
        self, env: LanguageEnv, problems: Problems, group_size: int, told: Told, generate: Generate, draw: Draw
    ) -> dict[str, float]:
        """As of :class:`Context`; ``problems`` are replaced in place."""
        sampled = 0
        equal = self._equal(told, group_size)
        for _ in range(self.tries):
            if not len(equal):
                break
            other = [problem for problem in draw(len(equal) // group_size) for _ in range(group_size)]
            put(told, equal, generate(other, [[] for _ in other]))
            for row, problem in zip(equal.tolist(), other, strict=True):
                problems[row] = problem
            sampled += len(equal)
            equal = self._equal(told, group_size)
        return {"rollout/refilled": sampled / len(problems), "rollout/equal": len(equal) / len(problems)}

    @staticmethod
    def _equal(told: Told, group_size: int) -> Tensor:
        """Rows of groups with nothing to compare among the conversations that count."""
        talk, info = told
        total = talk.reward.sum(-1)
        counted = info.get(COUNTED, torch.ones_like(total)) > 0
        most = total.masked_fill(~counted, -torch.inf).reshape(-1, group_size).amax(-1)
        least = total.masked_fill(~counted, torch.inf).reshape(-1, group_size).amin(-1)
        return (most <= least).repeat_interleave(group_size).nonzero().squeeze(-1)
