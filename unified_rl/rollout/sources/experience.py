"""Own right answers to prompts that are sometimes solved, which come again with a fresh group."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.configurable import configurable
from unified_rl.errors import ConfigError
from unified_rl.policies.sampling import entropy_of
from unified_rl.protocols import LanguageEnv, LanguagePolicy, ShowsLogits
from unified_rl.ranges import Count, Positive, Share, UnitInterval, ranged
from unified_rl.replay.pool import AnswerPool, IntArray
from unified_rl.rollout.conversation import Problems
from unified_rl.rollout.sources.base import Request
from unified_rl.units import COUNTED, Source, row_return

AT_ONCE = 64
"""Rows whose entropy is read together."""


@configurable
@ranged()
class Experience:
    """Prompts of a pool take part of each collection, and one stored answer joins the fresh group of each. ExGRPO.

    Kept are right answers of groups in which not all are right; a prompt that all answers solve leaves. Prompts are
    drawn by how many of ``G`` answers were right when they were last tried, with weights ``exp(-(k - G / 2)^2 / (2
    deviation^2))``. Rows keep their log-probs and versions, source OFFLINE. "ExGRPO: Learning to Reason from
    Experience", 2510.02245.

    Args:
        share: of a collection's prompts that come from the pool, as far as it has them; 0 keeps everything fresh.
        answers: kept of each prompt, the newest.
        prompts: kept; the one that came first leaves first.
        deviation: of the weights of success counts.
        start: share of right answers in a collection after which the pool is used.
        pick: the stored answer of a prompt: ``entropy`` is the one whose tokens have the lowest mean entropy under
            the present policy; ``newest``; ``random``.
        threshold: return above which an answer is right.
    """

    per_group = 1

    def __init__(
        self,
        share: Share = 0.5,
        answers: Count = 8,
        prompts: Count = 65536,
        deviation: Positive = 1.0,
        start: UnitInterval = 0.35,
        pick: Literal["entropy", "newest", "random"] = "entropy",
        threshold: float = 0.5,
    ) -> None:
        self.share, self.answers, self.prompts, self.deviation = share, answers, prompts, deviation
        self.start, self.pick, self.threshold = start, pick, threshold
        self.open = False
        self.pool: AnswerPool | None = None
        self._drawn: IntArray = np.zeros(0, dtype=np.int64)
        self._problems: dict[int, Any] = {}

    def check(self, env: LanguageEnv, policy: LanguagePolicy, setting: str) -> None:
        """Refuses a policy whose entropy nobody can read, where that is what answers are picked by.

        Raises:
            ConfigError: names what works.
        """
        self.policy = policy
        if self.pick == "entropy" and not isinstance(policy, ShowsLogits):
            raise ConfigError(
                f"{setting}.pick=entropy reads the entropy of answers, which {type(policy).__name__} does not tell; "
                f"set {setting}.pick=newest"
            )

    def check_group(self, group_size: int, setting: str) -> None:
        """Refuses groups of one, of which none is right in part; notes the size, of which the pool's levels are.

        Raises:
            ConfigError: names the source that works.
        """
        if group_size == 1:
            raise ConfigError(
                f"{setting} keeps prompts that some answers solve and others do not, and rollout.group_size=1 has "
                "none: sample several, or use unified_rl.rollout.sources.Pool"
            )
        self.group_size = group_size

    def most(self, prompts: int) -> int:
        """One a prompt that comes again."""
        return round(self.share * prompts)

    def problems(self, count: int, generator: torch.Generator) -> Problems:
        """Prompts of the pool for a collection of ``count``, ``share`` of them at most."""
        self._drawn = np.zeros(0, dtype=np.int64)
        if self.pool is None or not self.open or not (wanted := round(self.share * count)):
            return []
        level = np.arange(self.pool.levels)
        weights = np.exp(-((level - self.pool.levels / 2) ** 2) / (2 * self.deviation**2))
        self._drawn = self.pool.draw(wanted, np.where(level > 0, weights, 0.0), _stream(generator))
        return [self.pool.problems[place] for place in self._drawn.tolist()]

    def rows(self, request: Request) -> TensorDict | None:
        """A stored answer to each prompt that came from the pool, with its group of now."""
        self._problems = {problem["prompt_id"]: problem for problem in request.problems}
        pool = self.pool
        if pool is None or not len(self._drawn):
            return None
        numbers = [problem["prompt_id"] for problem in request.problems]
        group_of = dict(zip(numbers, request.groups.tolist(), strict=True))  # of the last: other sources bring some too
        drawn = self._drawn[[number in group_of for number in pool.numbers[self._drawn].tolist()]]
        if not len(drawn):  # a context may have taken prompts away
            return None
        rows = pool.read(self._picked(pool, drawn, request.generator))
        rows["group"] = torch.tensor([group_of[number] for number in pool.numbers[drawn].tolist()])
        rows["source"] = torch.full_like(rows["source"], int(Source.OFFLINE))
        return rows

    def _picked(self, pool: AnswerPool, places: IntArray, generator: torch.Generator) -> IntArray:
        """One slot of each place."""
        if self.pick == "newest":
            return pool.newest(places)
        slots, filled = pool.slots(places)
        score = np.full(slots.shape, np.inf)
        score[filled] = (
            _stream(generator).random(int(filled.sum()))
            if self.pick == "random"
            else self._entropy(pool, slots[filled])
        )
        found: IntArray = slots[np.arange(len(places)), score.argmin(1)]
        return found

    def _entropy(self, pool: AnswerPool, slots: IntArray) -> Any:
        """Mean over tokens ``[n]`` under the present policy."""
        assert pool.rows is not None and isinstance(self.policy, ShowsLogits)
        stored = pool.rows.select("tokens", "token_mask", "mask")[torch.from_numpy(slots)]
        found = []
        for part in stored.split(AT_ONCE):
            batch = part.to(self.policy.device)
            (entropy,) = self.policy.read_logits(batch, _entropies)
            found.append(entropy.sum(-1) / batch["mask"].sum(-1).clamp(min=1))
        return torch.cat(found).double().cpu().numpy()

    def observe(self, rows: TensorDict) -> None:
        """Keeps right answers of groups that are right in part; counts how many were right."""
        own = rows[rows["source"] == int(Source.ONLINE)]
        if COUNTED in own.keys():
            own = own[own[COUNTED]]
        if not len(own):
            return
        right = row_return(own) > self.threshold
        self.open = self.open or float(right.float().mean()) > self.start
        for group in own["group"].unique().tolist():
            at = (own["group"] == group).nonzero().squeeze(-1)
            self._take(own[at], right[at])

    def _take(self, rows: TensorDict, right: Tensor) -> None:
        """One group."""
        number, count = int(rows["prompt_id"][0]), int(right.sum())
        if self.pool is None:
            self.pool = AnswerPool(self.prompts, self.answers, self.group_size)
        level = min(count, self.pool.levels - 1)
        if count == len(rows):
            self.pool.drop(number)
        elif count and number in self._problems:
            self.pool.put(number, self._problems[number], level, rows[right])

    def state_dict(self) -> dict[str, Any]:
        """The pool, and whether it is used yet."""
        pool = None if self.pool is None else {"levels": self.pool.levels, **self.pool.state_dict()}
        return {"open": self.open, "pool": pool}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.open, self.pool = state["open"], None
        if state["pool"] is not None:
            self.pool = AnswerPool(self.prompts, self.answers, state["pool"]["levels"])
            self.pool.load_state_dict(state["pool"])


def _entropies(logits: Tensor, token: Tensor) -> tuple[Tensor]:
    return (entropy_of(logits),)


def _stream(generator: torch.Generator) -> np.random.Generator:
    return np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
