"""The policy's own answers with a solution in view, for prompts that it does not solve by itself."""

from __future__ import annotations

import torch
from tensordict import TensorDict

from unified_rl.configurable import configurable
from unified_rl.protocols import LanguageEnv, LanguagePolicy
from unified_rl.ranges import Count, Fraction, UnitInterval, ranged
from unified_rl.rollout.sources.base import Joining, Request, require_one_turn
from unified_rl.rollout.sources.stored import Pool
from unified_rl.rollout.whispered import Advice
from unified_rl.units import Source, row_return


@configurable
@ranged()
class Coached(Joining):
    """The policy's answers with a part of the solution in view, which join the groups of weak prompts. RGR-GRPO.

    Rows hold the bare prompt and the log-probs that their tokens were sampled with, behind what was in view, so that a
    correction weighs them as what they are; source OFFLINE. 2511.12344.

    Args:
        per_group: answers to a weak prompt.
        below: mean return of a group under which its prompt is weak.
        share: of the solution that is shown.
        style: of the solution.
        text: what is shown in its place.
    """

    def __init__(
        self,
        per_group: Count = 1,
        below: UnitInterval = 0.5,
        share: Fraction = 0.5,
        style: str | None = None,
        text: str | None = None,
    ) -> None:
        super().__init__(per_group, 0)
        self.below, self.advice = below, Advice(share, style, text)

    def check(self, env: LanguageEnv, policy: LanguagePolicy, setting: str) -> None:
        """Refuses a task of several turns, one without solutions, and a text that fills the budget."""
        require_one_turn(env, setting)
        self.advice.check(env, setting)

    def rows(self, request: Request) -> TensorDict | None:
        """Answers to the weak prompts."""
        weak = (request.reward.mean(-1) < self.below).nonzero().flatten().repeat_interleave(self.per_group)
        return coached(request, weak, self.advice)


def coached(request: Request, at: torch.Tensor, advice: Advice) -> TensorDict | None:
    """An answer with advice in view to each of the prompts ``at [n]``; None where there is none."""
    if not len(at):
        return None
    problems = [request.problems[number] for number in at.tolist()]
    return request.say(problems, request.groups[at], Source.OFFLINE, shown=advice.of(request.env, problems))


@configurable
@ranged()
class Assimilated(Pool):
    """Where every answer to a prompt fails, the policy's latest right one to it joins. BEPA, 2601.05787.

    Where there is none, the policy tries again with a part of the solution in view, as if it were a plan; what of that
    is right is kept like an answer of its own, with the log-probs that it was sampled with, and joins.

    Args:
        tries: with the plan in view.
        share: of the solution that makes the plan.
        style: of the solution.
        prompts: remembered; the one longest unseen is forgotten first.
        at_least: return of a right answer.
    """

    def __init__(
        self,
        tries: Count = 1,
        share: Fraction = 0.5,
        style: str | None = None,
        prompts: Count = 4096,
        at_least: float = 0.5,
    ) -> None:
        super().__init__(1, 1, prompts, "newest", at_least, "failed")
        self.tries, self.advice, self.right = tries, Advice(share, style, None), at_least

    def check(self, env: LanguageEnv, policy: LanguagePolicy, setting: str) -> None:
        """Refuses a task without solutions, or of several turns."""
        require_one_turn(env, setting)
        self.advice.check(env, setting)

    def rows(self, request: Request) -> TensorDict | None:
        """The kept answers to the prompts that nobody solved; new ones where there are none."""
        failed = (request.reward <= 0).all(-1).nonzero().flatten()
        known = [request.problems[at]["prompt_id"] in self._answers for at in failed.tolist()]
        unknown = failed[~torch.tensor(known, dtype=torch.bool)]
        tried = coached(request, unknown.repeat_interleave(self.tries), self.advice)
        if tried is not None:
            for at in (row_return(tried) >= self.right).nonzero().flatten().tolist():
                self._take(int(tried["prompt_id"][at]), tried[at : at + 1].clone())
        return super().rows(request)
