"""Rows made of the collection's own answers: recoveries from errors, edits, revisions, shortened ones."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.configurable import configurable
from unified_rl.protocols import LanguageEnv, LanguagePolicy, require_solutions
from unified_rl.ranges import Count, OpenUnit, UnitInterval, Whole, ranged
from unified_rl.rollout.conversation import Problems
from unified_rl.rollout.sources.base import Joining, Request, require_one_turn
from unified_rl.rollout.whispered import followed, unended
from unified_rl.units import Source, row_return

SEPARATORS = ".!?;,>\n"
"""Characters that end a sentence."""


class Answers:
    """The own answers of a collection, as token ids without the token that ended them.

    Args:
        request: what a source is told.
        threshold: return above which an answer is right.
    """

    def __init__(self, request: Request, threshold: float) -> None:
        own = request.own
        self.group_size = request.reward.shape[1]
        self.total = row_return(own)
        self.right = (self.total > threshold).reshape(-1, self.group_size)
        self.env = request.env
        starts = [len(problem["prompt"]) for problem in request.problems]
        stops = own["token_mask"].sum(-1).tolist()
        rows = zip(own["tokens"].tolist(), stops, strict=True)
        self.whole: list[list[int]] = [ids[starts[at // self.group_size] : stop] for at, (ids, stop) in enumerate(rows)]

    def bare(self, row: int) -> list[int]:
        """An answer without its end."""
        return unended(self.whole[row], self.env)


class FromOwn(Joining):
    """What these sources share: one answer a turn, and nothing kept."""

    def check(self, env: LanguageEnv, policy: LanguagePolicy, setting: str) -> None:
        """Refuses a task of several turns."""
        require_one_turn(env, setting)


class Sentences:
    """Cuts token ids into sentences, which end with a token whose text ends with one of some characters."""

    def __init__(self, separators: str, tokenizer: Any) -> None:
        self.separators, self.tokenizer = tuple(separators), tokenizer
        self._closes: dict[int, bool] = {}

    def closes(self, token: int) -> bool:
        """Whether a token ends a sentence."""
        if token not in self._closes:
            self._closes[token] = self.tokenizer.decode([token]).endswith(self.separators)
        return self._closes[token]

    def of(self, ids: Sequence[int]) -> list[tuple[int, ...]]:
        """The sentences; the last may have no end."""
        out: list[tuple[int, ...]] = []
        start = 0
        for at, token in enumerate(ids, 1):
            if self.closes(token) or at == len(ids):
                out.append(tuple(ids[start:at]))
                start = at
        return out


@configurable
@ranged()
class Recoveries(FromOwn):
    """Failed answers become prompts: behind a part of one and a diagnosis the policy goes on several times.

    The recoveries from one error are a group of their own; what they begin with is masked out. Source OFFLINE, so that
    nobody takes them for answers to the bare prompt. Fission-GRPO, 2601.15625.

    Args:
        errors: failed answers of a collection that are gone on from at most, drawn among all.
        recoveries: from each.
        share: of a failed answer that stays.
        diagnosis: text behind it.
        threshold: return above which an answer is right.
    """

    def __init__(
        self,
        errors: Count = 8,
        recoveries: Count = 8,
        share: UnitInterval = 0.5,
        diagnosis: str = "",
        threshold: float = 0.5,
    ) -> None:
        super().__init__(0, errors * recoveries)
        self.errors, self.recoveries, self.share = errors, recoveries, share
        self.diagnosis, self.threshold = diagnosis, threshold

    def rows(self, request: Request) -> TensorDict | None:
        """Recoveries, in groups of their own."""
        answers = Answers(request, self.threshold)
        failed = (~answers.right).flatten().nonzero().flatten()
        drawn = failed[torch.randperm(len(failed), generator=request.generator)[: self.errors]].tolist()
        if not drawn:
            return None
        told: list[int] = request.env.tokenizer.encode(self.diagnosis, add_special_tokens=False)
        begun = [answers.bare(row) for row in drawn]
        room = request.env.max_turn_tokens - 1
        prefixes = [followed(ids[: int(self.share * len(ids))], told, room) for ids in begun]
        problems = [request.problems[row // answers.group_size] for row in drawn]
        groups = request.new_groups(len(drawn)).repeat_interleave(self.recoveries)
        each = [(p, b) for p, b in zip(problems, prefixes, strict=True) for _ in range(self.recoveries)]
        return request.say([p for p, _ in each], groups, Source.OFFLINE, prefixes=[b for _, b in each])


@configurable
@ranged()
class Edited(FromOwn):
    """A group's worst answer with some sentences replaced by the solution's, where that earns more. EditGRPO.

    2509.22812. Rows have the log-probs of the present policy, as if it had said them, and source OFFLINE.

    Args:
        edits: replaced, inserted or removed stretches of an answer, the first ones.
        separators: characters that end a sentence.
        style: of the solution.
    """

    def __init__(self, edits: Whole = 1, separators: str = SEPARATORS, style: str | None = None) -> None:
        super().__init__(1, 0)
        self.edits, self.separators, self.style = edits, separators, style

    def check(self, env: LanguageEnv, policy: LanguagePolicy, setting: str) -> None:
        """Refuses a task without solutions, or of several turns."""
        super().check(env, policy, setting)
        require_solutions(env, setting, self.style)
        self.sentences = Sentences(self.separators, env.tokenizer)

    def rows(self, request: Request) -> TensorDict | None:
        """The edited answers that earn more than they did."""
        answers = Answers(request, 0.0)
        worst = request.reward.argmin(-1)
        at = torch.arange(len(worst)) * answers.group_size + worst
        solver = require_solutions(request.env, "rollout.sources", self.style)
        solutions = solver.solve(request.problems, self.style)
        edited = [self._edited(answers.bare(row), ids) for row, ids in zip(at.tolist(), solutions, strict=True)]
        changed = [ids + solutions[n][-1:] if ids is not None else [] for n, ids in enumerate(edited)]
        rows = request.recite(request.problems, changed, request.groups, Source.OFFLINE)
        if rows is None:
            return None
        before = dict(zip(request.groups.tolist(), answers.total[at].tolist(), strict=True))
        better = row_return(rows) > torch.tensor([before[group] for group in rows["group"].tolist()])
        return request.present(rows[better]) if bool(better.any()) else None

    def _edited(self, ids: list[int], solution: list[int]) -> list[int] | None:
        """An answer after its first edits; None where there is nothing to edit."""
        own, other = self.sentences.of(ids), self.sentences.of(solution[:-1])
        out: list[int] = []
        left = self.edits
        for kind, a, b, c, d in SequenceMatcher(None, own, other, autojunk=False).get_opcodes():
            take = kind != "equal" and left > 0
            left -= take
            out += [token for sentence in (other[c:d] if take else own[a:b]) for token in sentence]
        return out if left < self.edits else None


@configurable
@ranged()
class Revised(FromOwn):
    """From a group's worst answer up to where it leaves its best (and shortest) one, through a thought, on to that.

    What was wrong is masked out; the thought and what follows are to be learnt. Source EXPERT: the log-probs are
    nobody's. Agent-R, 2501.11425.

    Args:
        thought: text that turns back.
        gap: of the returns of best and worst, above which a group gives a row.
        separators: characters that end a sentence; the first one that is wrong is kept whole.
    """

    def __init__(self, thought: str = "", gap: float = 0.5, separators: str = SEPARATORS) -> None:
        super().__init__(1, 0)
        self.thought, self.gap, self.separators = thought, gap, separators

    def check(self, env: LanguageEnv, policy: LanguagePolicy, setting: str) -> None:
        """Refuses a task of several turns."""
        super().check(env, policy, setting)
        self.sentences = Sentences(self.separators, env.tokenizer)

    def rows(self, request: Request) -> TensorDict | None:
        """One revision of each group with a gap, of those that fit."""
        answers, size = Answers(request, 0.0), request.reward.shape[1]
        worst = request.reward.argmin(-1)
        apart = (request.reward.amax(-1) - request.reward.amin(-1) > self.gap).nonzero().flatten().tolist()
        thought: list[int] = request.env.tokenizer.encode(self.thought, add_special_tokens=False)
        wrong, mended = [], []
        for group in apart:
            best = (request.reward[group] == request.reward[group].max()).nonzero().flatten() + group * size
            good = min((answers.whole[row] for row in best.tolist()), key=len)
            bad = answers.bare(group * size + int(worst[group]))
            same = next(
                (n for n, (a, b) in enumerate(zip(good, bad, strict=False)) if a != b), min(len(good), len(bad))
            )
            left = next((n + 1 for n in range(same, len(bad)) if self.sentences.closes(bad[n])), len(bad))
            wrong.append(bad[:left])
            mended.append(thought + good[same:])
        problems: Problems = [request.problems[group] for group in apart]
        groups: Tensor = request.groups[apart]
        return request.recite(problems, mended, groups, Source.EXPERT, prefixes=wrong) if apart else None


@configurable
@ranged()
class Shortened(FromOwn):
    """Each group's shortest right answer, shorter still where the policy gets on without its end. After 2505.18440.

    An answer is cut, and what the policy says behind the cut counts where it is right and the whole is shorter. Source
    EXPERT: the log-probs are nobody's.

    Args:
        shares: of an answer that stay, tried in this order until one will do; none leaves answers as they are.
        threshold: return above which an answer is right.
    """

    def __init__(self, shares: tuple[OpenUnit, ...] = (0.5, 0.75), threshold: float = 0.5) -> None:
        super().__init__(1, 0)
        self.shares, self.threshold = shares, threshold

    def rows(self, request: Request) -> TensorDict | None:
        """One answer of each group that has a right one."""
        answers = Answers(request, self.threshold)
        size = answers.group_size
        found: dict[int, list[int]] = {}
        for group, right in enumerate(answers.right.tolist()):
            own = [answers.whole[group * size + n] for n, one in enumerate(right) if one]
            if own:
                found[group] = min(own, key=len)
        open_ = list(found)
        for share in self.shares:
            open_ = self._cut(request, found, open_, share) if open_ else []
        problems, groups = [request.problems[group] for group in found], request.groups[list(found)]
        return request.recite(problems, list(found.values()), groups, Source.EXPERT) if found else None

    def _cut(self, request: Request, found: dict[int, list[int]], groups: list[int], share: float) -> list[int]:
        """Puts shorter answers in place; returns the groups that have none yet."""
        room = request.env.max_turn_tokens - 1
        kept = [found[group][: min(int(share * len(found[group])), room)] for group in groups]
        problems = [request.problems[group] for group in groups]
        rows = request.say(problems, request.groups[groups], Source.OFFLINE, prefixes=kept)
        right = (row_return(rows) > self.threshold).tolist()
        left = []
        known = zip(rows["tokens"].tolist(), rows["token_mask"].sum(-1).tolist(), strict=True)
        said = [ids[len(problem["prompt"]) : stop] for problem, (ids, stop) in zip(problems, known, strict=True)]
        for n, (group, ids) in enumerate(zip(groups, said, strict=True)):
            if right[n] and len(ids) < len(found[group]):
                found[group] = ids
            else:
                left.append(group)
        return left
