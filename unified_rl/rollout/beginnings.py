"""What answers begin with: a part of a solution, another problem's draft, an answer of before, a forced token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.configurable import configurable
from unified_rl.errors import ConfigError
from unified_rl.protocols import LanguageEnv, LanguagePolicy, require_hints, require_solutions
from unified_rl.ranges import Count, Extended, OpenUnit, UnitInterval, ranged
from unified_rl.replay.pool import AnswerPool
from unified_rl.rollout.conversation import Problems
from unified_rl.rollout.sources.base import require_one_turn
from unified_rl.rollout.whispered import Advice, part_of
from unified_rl.units import NOBODY, Source, row_return


class Start(NamedTuple):
    """What one answer begins with.

    Attributes:
        tokens: ids, none where it begins by itself.
        log_probs: of the tokens under who said them; the loss is over them then. None: they are context, masked out.
        versions: of the policies that said them, :data:`NOBODY` where none did; None is the present one.
        over: nothing is left to say.
        shown: ids that the policy sees behind the prompt and the row does not hold.
        advised: which advice that was, see :data:`~unified_rl.rollout.rows.ADVISED`.
    """

    tokens: list[int]
    log_probs: list[float] | None = None
    versions: list[int] | None = None
    over: bool = False
    shown: Sequence[int] = ()
    advised: int = 0

    @property
    def helps(self) -> bool:
        """Whether the answer behind it is not what the policy says by itself."""
        return bool(self.shown) or (bool(self.tokens) and self.log_probs is None)


NOTHING = Start([])


class Asked(NamedTuple):
    """What a beginning is told.

    Attributes:
        env: the task.
        problems: ``B``, of every conversation.
        group_size: conversations of a prompt, consecutive.
        generator: the stream of beginnings.
        score: ``rows -> [n, N]``: log-probs of rows under the present policy.
    """

    env: LanguageEnv
    problems: Problems
    group_size: int
    generator: torch.Generator
    score: Callable[[TensorDict], Tensor]

    @property
    def prompts(self) -> Problems:
        """One problem a group."""
        return self.problems[:: self.group_size]


@runtime_checkable
class Beginning(Protocol):
    """Says what the answers of a collection begin with."""

    def check(self, env: LanguageEnv, policy: LanguagePolicy, setting: str) -> None:
        """Refuses a task that it cannot serve, before the first step.

        Raises:
            ConfigError: the task lacks what is needed.
        """
        ...

    def begin(self, asked: Asked) -> list[Start]:
        """A start for each conversation."""
        ...

    def observe(self, rows: TensorDict, prompts: Problems) -> None:
        """Takes notice of a collection's own rows ``[B]``, and of the problem of each group."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a bit-exact continuation needs beside the stream."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        ...


class _Stateless:
    """Nothing is kept."""

    def observe(self, rows: TensorDict, prompts: Problems) -> None:
        """Nothing is kept."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing beside the stream."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


def some(count: int, share: float, generator: torch.Generator) -> list[bool]:
    """Which of ``count``: exactly ``round(share * count)`` of them, drawn."""
    chosen = torch.randperm(count, generator=generator) < round(share * count)
    found: list[bool] = chosen.tolist()
    return found


def each(starts: list[Start], group_size: int) -> list[Start]:
    """The start of every group, for all of its conversations."""
    return [start for start in starts for _ in range(group_size)]


@configurable
@ranged()
class Guided(_Stateless):
    """Some groups begin with a part of their problem's solution, the others with nothing. POPE, 2601.18779.

    The shown part is context: masked out, so the loss is over what the policy said after it.

    Args:
        share: of the solution.
        of: share of the groups that see it.
        style: of the solution.
    """

    def __init__(self, share: UnitInterval = 0.5, of: UnitInterval = 0.5, style: str | None = None) -> None:
        self.share, self.of, self.style = share, of, style

    def check(self, env: LanguageEnv, policy: LanguagePolicy, setting: str) -> None:
        """Refuses a task without solutions."""
        require_solutions(env, setting, self.style)

    def begin(self, asked: Asked) -> list[Start]:
        """The begin of the solution, or nothing, for whole groups."""
        solutions = require_solutions(asked.env, "rollout.beginning", self.style).solve(asked.prompts, self.style)
        shown = some(len(solutions), self.of, asked.generator)
        starts = [
            Start(part_of(ids, self.share, asked.env) if seen else [])
            for ids, seen in zip(solutions, shown, strict=True)
        ]
        return each(starts, asked.group_size)


@configurable
@ranged()
class Knowledge(_Stateless):
    """Some groups begin with what their problem's record holds as its hint, chosen beforehand. KnowRL, 2604.12627.

    It is context: the loss is over what the policy said after it.

    Args:
        column: of the record that holds the hint, a text or a list of texts; a task of this package may have its own.
        of: share of the groups that see it.
    """

    def __init__(self, column: str = "hint", of: UnitInterval = 1.0) -> None:
        self.column, self.of = column, of

    def check(self, env: LanguageEnv, policy: LanguagePolicy, setting: str) -> None:
        """Refuses a task without hints."""
        require_hints(env, setting, self.column)

    def begin(self, asked: Asked) -> list[Start]:
        """The hint, or nothing, for whole groups."""
        hints = require_hints(asked.env, "rollout.beginning", self.column).hints(asked.prompts, self.column)
        shown = some(len(hints), self.of, asked.generator)
        longest = asked.env.max_turn_tokens - 1
        return each(
            [Start(ids[:longest] if seen else []) for ids, seen in zip(hints, shown, strict=True)], asked.group_size
        )


@configurable
@ranged()
class Advised(_Stateless):
    """A part of every group is said with something in view that its rows do not hold. PolicyRollout, 2510.09474.

    So what only the shown text taught becomes what the bare prompt asks for. Log-probs are those of the policy that saw
    nothing: ratio 1, as where a trainer scores its rows again.

    Args:
        of: share of the answers of a group.
        text: what is shown, such as the written policy of an assistant; None shows a part of the solution.
        share: of the solution.
        style: of the solution.
        opposite: a text that the other answers of the group see; None shows them nothing.
    """

    def __init__(
        self,
        of: UnitInterval = 0.5,
        text: str | None = None,
        share: UnitInterval = 0.5,
        style: str | None = None,
        opposite: str | None = None,
    ) -> None:
        self.of, self.advice = of, Advice(share, style, text)
        self.opposite = None if opposite is None else Advice(share, style, opposite)

    def check(self, env: LanguageEnv, policy: LanguagePolicy, setting: str) -> None:
        """Refuses a task of several turns, one without solutions, and a text that fills the budget."""
        require_one_turn(env, setting)
        self.advice.check(env, setting)
        if self.opposite is not None:
            self.opposite.check(env, setting, "opposite")

    def begin(self, asked: Asked) -> list[Start]:
        """What the first answers of each group see, and the others."""
        first = round(self.of * asked.group_size)
        starts = []
        against = None if self.opposite is None else self.opposite.of(asked.env, asked.prompts)
        for number, shown in enumerate(self.advice.of(asked.env, asked.prompts)):
            other = NOTHING if against is None else Start([], shown=against[number], advised=-1)
            starts += [Start([], shown=shown, advised=1)] * first + [other] * (asked.group_size - first)
        return starts


@configurable
@ranged()
class Drafts(_Stateless):
    """Groups begin with the solution of another problem, which is a wrong draft for theirs. After 2605.17314.

    No prompt gets its own: drafts go round a circle of the collection's problems in a drawn order.

    Args:
        of: share of the groups that see one.
        style: of the solutions.
    """

    def __init__(self, of: UnitInterval = 1.0, style: str | None = None) -> None:
        self.of, self.style = of, style

    def check(self, env: LanguageEnv, policy: LanguagePolicy, setting: str) -> None:
        """Refuses a task without solutions."""
        require_solutions(env, setting, self.style)

    def begin(self, asked: Asked) -> list[Start]:
        """The solution of the next problem of the circle; nothing where that is the same prompt."""
        prompts = asked.prompts
        solutions = require_solutions(asked.env, "rollout.beginning", self.style).solve(prompts, self.style)
        order = torch.randperm(len(prompts), generator=asked.generator).tolist()
        shown = some(len(prompts), self.of, asked.generator)
        starts = [NOTHING] * len(prompts)
        for place, at in enumerate(order):
            other = order[(place + 1) % len(order)]
            if shown[at] and prompts[other]["prompt_id"] != prompts[at]["prompt_id"]:
                starts[at] = Start(part_of(solutions[other], 1.0, asked.env))
        return each(starts, asked.group_size)


@configurable
@ranged()
class Forced(_Stateless):
    """A part of every group begins with one token, at a probability that the rollout gave it. AdaptThink, 2505.13417.

    The token is trained on, with the log-prob ``log share``: it is chosen by a coin and not by the policy.

    Args:
        token: its text, such as the end of thinking; one token of the task's tokenizer.
        share: of the answers of a group.
    """

    def __init__(self, token: str, share: OpenUnit = 0.5) -> None:
        self.token, self.share = token, share

    def check(self, env: LanguageEnv, policy: LanguagePolicy, setting: str) -> None:
        """Refuses a text that is not one token.

        Raises:
            ConfigError: it is several, or none.
        """
        ids = env.tokenizer.encode(self.token, add_special_tokens=False)
        if len(ids) != 1:
            raise ConfigError(f"{setting}.token={self.token!r} is {len(ids)} tokens of the task's tokenizer; name one")
        self.id = int(ids[0])

    def begin(self, asked: Asked) -> list[Start]:
        """The token for the first answers of each group."""
        forced = round(self.share * asked.group_size)
        start = Start([self.id], [math.log(self.share)], [NOBODY])
        return [start if row % asked.group_size < forced else NOTHING for row in range(len(asked.problems))]


class _Remembering:
    """Keeps own answers by prompt."""

    KEPT = ("tokens", "token_mask", "mask", "behavior_log_prob", "policy_version")

    def __init__(self, prompts: int) -> None:
        self.prompts = prompts
        self.pool: AnswerPool | None = None

    def check(self, env: LanguageEnv, policy: LanguagePolicy, setting: str) -> None:
        """Refuses a task of several turns."""
        require_one_turn(env, setting)

    def wanted(self, rows: TensorDict) -> Tensor:
        """Which rows ``[B]`` are kept."""
        return torch.ones(len(rows), dtype=torch.bool)

    def size(self, group_size: int) -> int:
        """Answers kept of each prompt."""
        return 1

    def made(self, answers: int) -> AnswerPool:
        """An empty pool of so many answers to each prompt; of equal ones the last counts, as of others."""
        return AnswerPool(self.prompts, answers, 1, distinct=False)

    def stored(self, asked: Asked) -> list[TensorDict | None]:
        """The kept answers to each group's prompt, in the order of their slots; None where there are none."""
        if self.pool is None:
            return [None] * len(asked.prompts)
        places = [self.pool.place.get(problem["prompt_id"], -1) for problem in asked.prompts]
        slots, filled = self.pool.slots(np.array([max(place, 0) for place in places]))
        assert self.pool.rows is not None
        return [
            self.pool.rows[torch.from_numpy(own[there])] if place >= 0 else None
            for place, own, there in zip(places, slots, filled, strict=True)
        ]

    def observe(self, rows: TensorDict, prompts: Problems) -> None:
        """Keeps the newest of the wanted answers."""
        own = rows[self.wanted(rows) & (rows["source"] == int(Source.ONLINE))]
        if self.pool is None and len(own):
            self.pool = self.made(self.size(len(rows) // len(prompts)))
        for number in own["prompt_id"].unique().tolist():
            assert self.pool is not None
            self.pool.put(number, None, 0, own.select(*self.KEPT)[own["prompt_id"] == number])

    def state_dict(self) -> dict[str, Any]:
        """The answers."""
        return {"pool": None if self.pool is None else {"answers": self.pool.answers, **self.pool.state_dict()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.pool = None
        if state["pool"] is not None:
            self.pool = self.made(state["pool"]["answers"])
            self.pool.load_state_dict(state["pool"])


def answer_in(row: TensorDict, prompt: list[int]) -> tuple[list[int], slice]:
    """The tokens of a stored row behind its prompt, and the columns where they stand."""
    columns = slice(len(prompt), int(row["token_mask"].sum()))
    ids: list[int] = row["tokens"][columns].tolist()
    return ids, columns


@configurable
@ranged()
class OwnSuccess(_Remembering):
    """Groups begin with a part of the policy's own latest right answer to their prompt. PrefixRL, 2601.18795.

    It is context: the loss is over the continuation alone.

    Args:
        share: of the answer.
        of: share of the groups that see it, of those whose prompt has one.
        prompts: remembered; the one that came first is forgotten first.
        threshold: return above which an answer is right.
    """

    def __init__(
        self, share: UnitInterval = 0.5, of: UnitInterval = 0.5, prompts: Count = 65536, threshold: float = 0.5
    ) -> None:
        super().__init__(prompts)
        self.share, self.of, self.threshold = share, of, threshold

    def wanted(self, rows: TensorDict) -> Tensor:
        """Right answers."""
        return row_return(rows) > self.threshold

    def begin(self, asked: Asked) -> list[Start]:
        """The begin of the answer, or nothing, for whole groups."""
        shown = some(len(asked.prompts), self.of, asked.generator)
        starts = [NOTHING] * len(asked.prompts)
        for at, rows in enumerate(self.stored(asked)):
            if rows is not None and shown[at]:
                ids, _ = answer_in(rows[-1], asked.prompts[at]["prompt"])
                starts[at] = Start(part_of(ids, self.share, asked.env))
        return each(starts, asked.group_size)


@configurable
@ranged()
class Continued(_Remembering):
    """Some answers of a group go on behind a part of an answer that older weights gave. SOUP.

    That part keeps its log-probs and versions and is trained on, so its units are weighed against who said them.

    Args:
        share: of the stored answer.
        of: share of the answers of a group.
        prompts: remembered; the one that came first is forgotten first.
    """

    def __init__(self, share: UnitInterval = 0.5, of: UnitInterval = 0.5, prompts: Count = 65536) -> None:
        super().__init__(prompts)
        self.share, self.of = share, of

    def begin(self, asked: Asked) -> list[Start]:
        """The begin of the stored answer, for the first answers of a group."""
        starts = [NOTHING] * len(asked.problems)
        for at, rows in enumerate(self.stored(asked)):
            if rows is None:
                continue
            ids, columns = answer_in(rows[-1], asked.prompts[at]["prompt"])
            count = len(part_of(ids, self.share, asked.env))
            log_probs = rows["behavior_log_prob"][-1, columns].tolist()
            versions = rows["policy_version"][-1, columns].tolist()
            first = at * asked.group_size
            for row in range(first, first + round(self.of * asked.group_size)):
                starts[row] = Start(ids[:count], log_probs[:count], versions[:count])
        return starts


@configurable
@ranged()
class Verified(_Remembering):
    """Answers of before are kept up to the first token that the present policy rejects. SPEC-RL, 2509.23232.

    A token stays where ``log u <= log-prob now - log-prob then + lenience``. What stays is written with its present
    log-probs, as the release has it, whose scheme is exact only where nothing is rejected; the rest is sampled.

    Args:
        lenience: 0 is speculative acceptance, more keeps more, minus infinity nothing.
        prompts: remembered; the one that came first is forgotten first.
    """

    def __init__(self, lenience: Extended = 0.5, prompts: Count = 65536) -> None:
        super().__init__(prompts)
        self.lenience = lenience

    def size(self, group_size: int) -> int:
        """One for each answer of a group."""
        return group_size

    def begin(self, asked: Asked) -> list[Start]:
        """What stays of the stored answer with the number of each answer in its group."""
        found = self.stored(asked)
        there = [rows[: asked.group_size] for rows in found if rows is not None]
        if not there:
            return [NOTHING] * len(asked.problems)
        stored: TensorDict = torch.cat(there)  # type: ignore[assignment]
        now, mask = asked.score(stored), stored["mask"]
        dice = torch.rand(mask.shape, generator=asked.generator, dtype=torch.float64).log()
        refused = (dice > (now - stored["behavior_log_prob"]).double() + self.lenience) & mask
        first = torch.where(refused.any(-1), refused.int().argmax(-1), mask.shape[1]).tolist()
        stops, said, known = (x.tolist() for x in (stored["token_mask"].sum(-1), stored["tokens"], now))
        starts = [NOTHING] * len(asked.problems)
        rows = iter(range(len(stored)))
        ends = set(asked.env.stop_ids)
        for at, own in enumerate(found):
            begin = len(asked.prompts[at]["prompt"])
            for number in range(0 if own is None else min(len(own), asked.group_size)):
                row = next(rows)
                kept = said[row][begin : min(first[row], stops[row])]
                over = bool(kept) and begin + len(kept) == stops[row] and kept[-1] in ends
                kept = kept if over else kept[: asked.env.max_turn_tokens - 1]
                log_probs = known[row][begin : begin + len(kept)]
                starts[at * asked.group_size + number] = Start(kept, log_probs, over=over)
        return starts
