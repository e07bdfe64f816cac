"""First steps of a collection's own answers, each worth what the policy makes of it in several tries."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.configurable import configurable
from unified_rl.protocols import LanguageEnv, LanguagePolicy
from unified_rl.ranges import Count, Fraction, ranged
from unified_rl.rollout.sources.base import Joining, Request, cut, require_one_turn
from unified_rl.units import Source, row_return


@configurable
@ranged()
class Steps(Joining):
    """The first step of every own answer, with the mean return of what was said behind it. After ReARTeR, 2501.07861.

    The answer itself is the first try; the policy says the others. Rows hold prompt and step, the log-probs that the
    step was sampled with, and as reward that Monte-Carlo value; source OFFLINE.

    Args:
        branches: tries of every step; 1 is the answer alone, whose return is then the step's.
        share: of an answer that is its step, a token at least; a whole answer cannot be tried again.
    """

    judges_itself = True
    """Its rows have one reward, which is not the environment's."""

    def __init__(self, branches: Count = 4, share: Fraction = 0.5) -> None:
        super().__init__(1, 0)
        self.branches, self.share = branches, share

    def check(self, env: LanguageEnv, policy: LanguagePolicy, setting: str) -> None:
        """Refuses a task of several turns."""
        require_one_turn(env, setting)

    def check_group(self, group_size: int, setting: str) -> None:
        """Takes notice of the group size: there is a step for each answer."""
        self.per_group = group_size

    def rows(self, request: Request) -> TensorDict:
        """``[P * G]``."""
        own = request.own
        mask, length = own["mask"], own["mask"].sum(-1)
        size = (self.share * length).long().clamp(min=1)
        step = mask & (mask.cumsum(-1) <= size.unsqueeze(-1))
        value, again = row_return(own), (size < length).nonzero().squeeze(-1)
        if self.branches > 1 and len(again):
            at = again.repeat_interleave(self.branches - 1)
            problems = [request.problems[row // self.per_group] for row in at.tolist()]
            begun = self._begun(request, step)
            prefixes = [begun[row] for row in at.tolist()]
            tried = request.say(problems, own["group"][at], Source.OFFLINE, prefixes=prefixes)
            tries = torch.ones_like(value).index_add(0, at, torch.ones(len(at)))
            value = value.index_add(0, at, row_return(tried)) / tries
        return cut(request, step, value)

    def _begun(self, request: Request, step: Tensor) -> list[list[int]]:
        """Each answer up to the end of its step, what it began with included."""
        starts = [len(problem["prompt"]) for problem in request.problems for _ in range(self.per_group)]
        stops = (step * torch.arange(1, step.shape[1] + 1)).amax(-1).tolist()
        known = zip(request.own["tokens"].tolist(), starts, stops, strict=True)
        return [ids[start:stop] for ids, start, stop in known]
