"""The begin of own answers, gone on from by another model: it earns what the other makes of it."""

from __future__ import annotations

import torch
from tensordict import TensorDict

from unified_rl.configurable import configurable
from unified_rl.protocols import LanguageEnv, LanguagePolicy
from unified_rl.ranges import Count, Positive, UnitInterval, ranged
from unified_rl.rollout.sources.base import Request, cut
from unified_rl.rollout.sources.experts import Model
from unified_rl.rollout.sources.mended import Answers, FromOwn
from unified_rl.units import Source, row_return


@configurable
@ranged()
class Described(FromOwn):
    """Each own answer's begin, a description, with the mean return of what another model says behind it. SOPHIA.

    Descriptions of a prompt are a group of their own, of source OFFLINE, and hold nothing behind the description. What
    the other model said and was right joins too, of source EXPERT, the description masked out. After 2507.16814.

    Args:
        folder: of the other model, as of :class:`~unified_rl.rollout.sources.experts.Model`.
        chains: of the other model behind each description.
        share: of an answer that is its description; 0 leaves the whole answer to the other model.
        temperature: of its sampling.
        threshold: return above which an answer is right.
    """

    group_size = 1
    judges_itself = True
    """Its descriptions have one reward, which is not the environment's of them."""

    def __init__(
        self,
        folder: str,
        chains: Count = 4,
        share: UnitInterval = 0.5,
        temperature: Positive = 1.0,
        threshold: float = 0.5,
    ) -> None:
        super().__init__(1, 0)
        self.other = Model(folder, per_group=1, temperature=temperature)
        self.chains, self.share, self.threshold = chains, share, threshold

    def check(self, env: LanguageEnv, policy: LanguagePolicy, setting: str) -> None:
        """Loads the other model; refuses a task of several turns."""
        super().check(env, policy, setting)
        self.other.check(env, policy, setting)

    def check_group(self, group_size: int, setting: str) -> None:
        """Any size will do; it is noted."""
        self.group_size = group_size

    def most(self, prompts: int) -> int:
        """Rows of a collection at most."""
        return prompts * self.group_size * (1 + self.chains)

    def rows(self, request: Request) -> TensorDict | None:
        """Descriptions, and the right chains."""
        answers = Answers(request, self.threshold)
        room = request.env.max_turn_tokens - 1
        begins = [answers.bare(row) for row in range(len(request.own))]
        begins = [ids[: min(int(self.share * len(ids)), room)] for ids in begins]
        each = [row for row in range(len(begins)) for _ in range(self.chains)]
        problems = [request.problems[row // answers.group_size] for row in each]
        groups = request.own["group"][each]
        prefixes = [begins[row] for row in each]
        chains = request.judge(self.other.speaker(request), problems, groups, Source.EXPERT, prefixes=prefixes)
        chains["behavior_log_prob"] = torch.zeros_like(chains["behavior_log_prob"])
        total = row_return(chains)
        described = self._described(request, begins, total.reshape(-1, self.chains).mean(-1), answers.group_size)
        return torch.cat([described, chains[total > self.threshold]])  # type: ignore[return-value]

    @staticmethod
    def _described(request: Request, begins: list[list[int]], worth: torch.Tensor, group_size: int) -> TensorDict:
        """The rows of the descriptions that say something."""
        mask = request.own["mask"]
        starts = torch.tensor([len(problem["prompt"]) for problem in request.problems]).repeat_interleave(group_size)
        stops = starts + torch.tensor([len(ids) for ids in begins])
        rows = cut(request, mask & (torch.arange(mask.shape[1]) < stops[:, None]), worth)
        rows["group"] = request.new_groups(len(request.problems)).repeat_interleave(group_size)
        return rows[rows["mask"].any(-1)]
