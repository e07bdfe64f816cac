"""Own answers that the policy is asked about: its verdict earns whether it agrees with the task's."""

from __future__ import annotations

from typing import Literal

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.configurable import configurable
from unified_rl.protocols import LanguageEnv, LanguagePolicy
from unified_rl.ranges import Count, Whole, ranged
from unified_rl.rollout.sources.base import Request, earning
from unified_rl.rollout.sources.mended import Answers, FromOwn
from unified_rl.rollout.verdicts import ASK, NO, SELF_JUDGED, YES, Question
from unified_rl.units import Source


@configurable
@ranged()
class Judgements(FromOwn):
    """Answers become prompts that ask about them, and the policy's verdicts are a group of their own. SPARK.

    The answer and the question begin the row and are masked out; a verdict earns 1 where it says what the task's
    verifier said. Source OFFLINE, so that nobody takes them for answers to the prompt. 2509.22624.

    Args:
        answers: of a collection that are asked about at most, drawn among all; of pairs, as many.
        verdicts: on each.
        kind: ``point`` asks whether an answer is right; ``pair`` whether the first of a right and a wrong one of the
            same group is, in an order that is drawn. Groups that are all right or all wrong give no pair.
        ask, yes, no: see :class:`~unified_rl.rollout.verdicts.Question`.
        threshold: return above which an answer is right.
    """

    judges_itself = True
    """Its rows have one reward, which is not the environment's."""

    def __init__(
        self,
        answers: Whole = 8,
        verdicts: Count = 8,
        kind: Literal["point", "pair"] = "point",
        ask: str = ASK,
        yes: str = YES,
        no: str = NO,
        threshold: float = 0.5,
    ) -> None:
        super().__init__(1, 0)
        self.joins = False
        self.answers, self.verdicts, self.kind = answers, verdicts, kind
        self.question, self.threshold = Question(ask, yes, no), threshold

    def check(self, env: LanguageEnv, policy: LanguagePolicy, setting: str) -> None:
        """As of :meth:`~unified_rl.rollout.verdicts.Question.check`."""
        self.question.check(env, setting, 1 if self.kind == "point" else 2)

    def most(self, prompts: int) -> int:
        """Rows of a collection at most."""
        return self.answers * self.verdicts

    def rows(self, request: Request) -> TensorDict | None:
        """Verdicts, in groups of their own."""
        own = Answers(request, self.threshold)
        asked = self._points(request, own) if self.kind == "point" else self._pairs(request, own)
        if not asked:
            return None
        begins = [self.question.about(request.env, [own.bare(row) for row in rows]) for rows, _ in asked]
        problems = [request.problems[rows[0] // own.group_size] for rows, _ in asked]
        groups = request.new_groups(len(asked)).repeat_interleave(self.verdicts)
        each = [n for n in range(len(asked)) for _ in range(self.verdicts)]
        found = request.say([problems[n] for n in each], groups, Source.OFFLINE, prefixes=[begins[n] for n in each])
        return self._rewarded(request, found, [asked[n][1] for n in each])

    def _points(self, request: Request, own: Answers) -> list[tuple[list[int], bool]]:
        """Answers by their number, and whether each is right."""
        right = own.right.flatten()
        known = self._verified(request).repeat_interleave(own.group_size).nonzero().flatten()
        drawn = known[torch.randperm(len(known), generator=request.generator)[: self.answers]].tolist()
        return [([row], bool(right[row])) for row in drawn]

    @staticmethod
    def _verified(request: Request) -> Tensor:
        """Groups ``[P]`` bool whose answers the task's verifier judged."""
        return torch.tensor([not problem.get(SELF_JUDGED, False) for problem in request.problems])

    def _pairs(self, request: Request, own: Answers) -> list[tuple[list[int], bool]]:
        """Two answers each, and whether the first is the right one."""
        mixed = (own.right.any(-1) & ~own.right.all(-1) & self._verified(request)).nonzero().flatten()
        drawn = mixed[torch.randperm(len(mixed), generator=request.generator)[: self.answers]].tolist()
        coins = (torch.rand(len(drawn), generator=request.generator) < 0.5).tolist()
        out = []
        for group, first in zip(drawn, coins, strict=True):
            pair = [int(x.int().argmax()) + group * own.group_size for x in (own.right[group], ~own.right[group])]
            out.append((pair if first else pair[::-1], first))
        return out

    def _rewarded(self, request: Request, rows: TensorDict, labels: list[bool]) -> TensorDict:
        """Rows with the reward of their verdicts."""
        mask = rows["mask"]
        said = [ids.tolist() for ids in rows["tokens"][mask].split(mask.sum(-1).tolist())]
        agreed = [self.question.verdict(request.env, ids) is label for ids, label in zip(said, labels, strict=True)]
        return earning(rows, torch.tensor(agreed), request.env)
