"""What a source of rows is, and what it is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.errors import ConfigError
from unified_rl.policies.generation import Generation
from unified_rl.protocols import LanguageEnv, LanguagePolicy
from unified_rl.rollout.conversation import Problems
from unified_rl.rollout.rows import REWARDS
from unified_rl.units import COUNTED, Source


class Recited:
    """A policy that says given answers.

    Args:
        answers: token ids.
        pad_id: of the tokenizer.
        log_probs: of these tokens under whoever wrote them; where they are unknown, they are written as 0.
    """

    def __init__(
        self, answers: Sequence[Sequence[int]], pad_id: int, log_probs: Sequence[Sequence[float]] | None = None
    ) -> None:
        self.answers, self.pad_id, self.log_probs = answers, pad_id, log_probs
        self._at = 0

    def generate(self, prompts: Sequence[Any], *, max_new_tokens: int, **unused: Any) -> Generation:
        """The answers in their order, as if sampled; so many at a call as there are prompts."""
        rows = slice(self._at, self._at + len(prompts))
        self._at = rows.stop
        answers = self.answers[rows]
        length = torch.tensor([len(answer) for answer in answers])
        tokens = torch.full((len(answers), max_new_tokens), self.pad_id)
        log_prob = torch.zeros(tokens.shape)
        for row, answer in zip(tokens, answers, strict=True):
            row[: len(answer)] = torch.tensor(answer)
        for row, known in zip(log_prob, () if self.log_probs is None else self.log_probs[rows], strict=False):
            row[: len(known)] = torch.tensor(known)
        return Generation(tokens, log_prob, length, torch.ones(len(length), dtype=torch.bool))


class Say(Protocol):
    """The policy that collects, with a stream of the source's own."""

    def __call__(
        self,
        problems: Problems,
        groups: Tensor | None,
        source: Source,
        prefixes: Sequence[list[int]] | None = None,
        shown: Sequence[Sequence[int]] | None = None,
    ) -> TensorDict:
        """Its answers as rows ``[B]``, judged by the environment.

        Args:
            problems: ``B``.
            groups: as of ``judge``.
            source: of the rows.
            prefixes: what answers begin with, masked out.
            shown: what it sees behind each prompt and rows do not hold; log-probs stay those that answers were sampled
                with, and the units' version is -1: the policy that sees the bare prompt did not sample them.
        """
        ...


class Request(NamedTuple):
    """What a source is told of a collection of ``P`` prompts and ``G`` answers each.

    Attributes:
        env: the task.
        problems: ``P``.
        groups: ``[P]`` int64, the group of each prompt's rows.
        reward: ``[P, G]`` float32, the return of each own answer.
        version: of the policy.
        generator: the source's own stream, so that a source never changes which prompts are drawn.
        judge: ``(policy, problems, groups, source, prefixes=None) -> rows``: lets a policy answer, and the environment
            judge it. ``groups`` is ``[B]`` int64, or None for a new group each; ``prefixes`` are what answers begin
            with, masked out.
        new_groups: ``count -> [count]`` int64.
        own: the rows of the policy's own answers, ``[P * G]``, those of a prompt consecutive.
        say: the policy itself, see :class:`Say`.
        score: ``rows -> [n, N]``: log-probs of rows under the present policy.
    """

    env: LanguageEnv
    problems: Problems
    groups: Tensor
    reward: Tensor
    version: int
    generator: torch.Generator
    judge: Callable[..., TensorDict]
    new_groups: Callable[[int], Tensor]
    own: TensorDict
    say: Say
    score: Callable[[TensorDict], Tensor]

    def recite(
        self,
        problems: Problems,
        answers: Sequence[Sequence[int]],
        groups: Tensor | None,
        source: Source,
        log_probs: Sequence[Sequence[float]] | None = None,
        prefixes: Sequence[list[int]] | None = None,
    ) -> TensorDict | None:
        """Rows ``[B]`` of given answers (token ids), as the environment judges them; those that fit its budget.

        Answers that are empty, or with what they begin with longer than a turn, are left out; None where none is left.
        Log-probs that are not given are written as 0.
        """
        begun = prefixes or [[] for _ in answers]
        most = self.env.max_turn_tokens
        kept = [row for row, answer in enumerate(answers) if 0 < len(answer) <= most - len(begun[row])]
        if not kept:
            return None
        known = None if log_probs is None else [log_probs[row] for row in kept]
        said = Recited([answers[row] for row in kept], self.env.tokenizer.pad_token_id, known)
        after = None if prefixes is None else [prefixes[row] for row in kept]
        own = None if groups is None else groups[kept]
        return self.judge(said, [problems[row] for row in kept], own, source, prefixes=after)

    def present(self, rows: TensorDict) -> TensorDict:
        """Rows with the log-probs of the present policy, as if it had said them: their ratio begins at 1."""
        known = self.score(rows).to(torch.float32)
        return rows.set("behavior_log_prob", torch.where(rows["mask"], known, 0.0))


@runtime_checkable
class RowSource(Protocol):
    """Rows to add to a collection, as many as there are.

    An attribute ``joins = False`` says that all of them are in groups of their own, and none in those of the
    collection's prompts.
    """

    def check(self, env: LanguageEnv, policy: LanguagePolicy, setting: str) -> None:
        """Refuses what it cannot serve, before the first step.

        Args:
            env: the task.
            policy: the policy that is trained.
            setting: the source's name in the configuration, for messages.

        Raises:
            ConfigError: the task lacks what is needed.
        """
        ...

    def most(self, prompts: int) -> int:
        """Rows that a collection of so many prompts gets at most; the replay makes room for them."""
        ...

    def rows(self, request: Request) -> TensorDict | None:
        """Complete rows of the record ``[B]``, with the keys of the rollout's own; None where there are none."""
        ...

    def observe(self, rows: TensorDict) -> None:
        """Takes notice of a collection, ``[B]`` rows of all sources, after the rows of this one were asked for."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a bit-exact continuation needs beside the stream."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        ...


@runtime_checkable
class ChoosesPrompts(Protocol):
    """A source that brings prompts of its own, which take the last places of a collection."""

    def problems(self, count: int, generator: torch.Generator) -> Problems:
        """At most ``count`` problems, for a collection of so many."""
        ...


@runtime_checkable
class ChecksGroup(Protocol):
    """A source or a context that is of use with some group sizes alone."""

    def check_group(self, group_size: int, setting: str) -> None:
        """Raises ConfigError for another."""
        ...


@runtime_checkable
class ChecksSources(Protocol):
    """A context beside which some sources are of no use."""

    def check_sources(self, sources: Mapping[str, RowSource]) -> None:
        """Raises ConfigError for one of the run's ``sources``, by name."""
        ...


def earning(rows: TensorDict, worth: Tensor, env: LanguageEnv) -> TensorDict:
    """Rows of one turn with returns ``worth [B]`` in place of the environment's.

    They count, and where rows hold what one reward function gave, it gave that; of several the rollout refuses who
    rewards rows itself.
    """
    rows["reward"] = worth.to(rows["reward"].dtype).unsqueeze(-1)
    if REWARDS in rows.keys():
        (weight,) = getattr(env, "reward_weights", (1.0,))
        rows[REWARDS] = rows["reward"] / (weight or 1.0)
    if COUNTED in rows.keys():
        rows[COUNTED] = torch.ones(len(rows), dtype=torch.bool)
    return rows


def cut(request: Request, mask: Tensor, worth: Tensor) -> TensorDict:
    """Copies ``[B]`` of the own answers that end behind their first units, ``mask [B, N]``; source OFFLINE.

    Args:
        request: what a source is told, of a task of one turn.
        mask: the units that stay.
        worth: return of each, ``[B]``; an answer that does not count does not count here either.
    """
    own = request.own
    beyond = (own["mask"] & ~mask).cumsum(-1) > 0
    rows = earning(own.clone(), worth, request.env)
    rows["mask"], rows["token_mask"] = mask, own["token_mask"] & ~beyond
    rows["tokens"] = own["tokens"].masked_fill(beyond, request.env.tokenizer.pad_token_id)
    rows["behavior_log_prob"] = torch.where(mask, own["behavior_log_prob"], 0.0)
    rows["source"] = torch.full_like(own["source"], int(Source.OFFLINE))
    if COUNTED in own.keys():
        rows[COUNTED] = own[COUNTED]
    if "privileged_mask" in own.keys():  # the same units, in the same order
        seen = own["privileged_mask"]
        rows["privileged_mask"] = seen & (seen.cumsum(-1) <= mask.sum(-1, keepdim=True))
    return rows


class Joining:
    """What most sources share: so many rows to the group of each prompt, or a batch of their own; nothing kept."""

    def __init__(self, per_group: int, rows: int) -> None:
        if (per_group > 0) == (rows > 0):
            name = type(self).__name__
            raise ConfigError(f"{name} needs exactly one of per_group and rows, got {per_group} and {rows}")
        self.per_group, self.batch = per_group, rows
        self.joins = per_group > 0

    def most(self, prompts: int) -> int:
        """Rows of a collection."""
        return self.batch or prompts * self.per_group

    def repeated(self, request: Request) -> tuple[Problems, Tensor]:
        """The problems of the collection ``per_group`` times each, and the group of each."""
        problems = [problem for problem in request.problems for _ in range(self.per_group)]
        return problems, request.groups.repeat_interleave(self.per_group)

    def observe(self, rows: TensorDict) -> None:
        """Nothing is kept."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing beside the stream."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""


def require_one_turn(env: LanguageEnv, setting: str) -> None:
    """Raises ConfigError for a task of several turns."""
    if env.max_turns > 1:
        raise ConfigError(
            f"{setting} recites one answer to each prompt, and {type(env).__name__} has up to {env.max_turns} turns; "
            "use unified_rl.rollout.sources.Model or Pool"
        )


def check_rows(rows: TensorDict, own: TensorDict, setting: str) -> TensorDict:
    """Joined rows with the keys of the rollout's own.

    Raises:
        ConfigError: a key that is missing, or of another shape or dtype.
    """
    if COUNTED in own.keys() and COUNTED not in rows.keys():  # rows of runs that left none out
        rows[COUNTED] = torch.ones(len(rows), dtype=torch.bool)
    missing = sorted(own.keys() - rows.keys())
    if missing:
        raise ConfigError(f"the rows of {setting} lack {', '.join(missing)}, which the rollout's own have")
    for key, value in own.items():
        if rows[key].shape[1:] != value.shape[1:] or rows[key].dtype != value.dtype:
            raise ConfigError(
                f"{key} of {setting} is {list(rows[key].shape[1:])} {rows[key].dtype} a row, and the rollout's own is "
                f"{list(value.shape[1:])} {value.dtype}"
            )
    return rows.select(*own.keys())
