"""Own answers that state how sure they are, with what their group shows in its place."""

from __future__ import annotations

import torch
from tensordict import TensorDict

from unified_rl.configurable import configurable
from unified_rl.errors import ConfigError
from unified_rl.protocols import LanguageEnv, LanguagePolicy, StatesConfidence
from unified_rl.ranges import UnitInterval, ranged
from unified_rl.rollout.sources.base import Request
from unified_rl.rollout.sources.mended import Answers, FromOwn
from unified_rl.units import COUNTED, Source


@configurable
@ranged()
class Calibrated(FromOwn):
    """Every own answer again, the confidence that it states overwritten by the share of its group that is right. CaOPD.

    2604.16830. As many tokens; whatever else an answer says is untouched, and so is one that states no confidence. With
    ``rollout.privileged`` the solution that a teacher sees states the same share. Source EXPERT: the log-probs are
    nobody's. Conversations that are left out of updates are left out here.

    Args:
        of: share of the groups whose confidence is overwritten, drawn; the others are as they were said.
        threshold: return above which an answer is right.
    """

    def __init__(self, of: UnitInterval = 1.0, threshold: float = 0.5) -> None:
        super().__init__(1, 0)
        self.of, self.threshold = of, threshold

    def check(self, env: LanguageEnv, policy: LanguagePolicy, setting: str) -> None:
        """Refuses a task of several turns, or whose answers state no confidence."""
        super().check(env, policy, setting)
        states_confidence(env, setting)

    def check_group(self, group_size: int, setting: str) -> None:
        """Refuses groups of one answer, which show nothing between 0 and 1."""
        if group_size < 2:
            raise ConfigError(
                f"{setting} measures how sure to be by the share of a group that is right, and "
                f"rollout.group_size={group_size} shows 0 or 1 alone: raise it"
            )
        self.per_group = group_size

    def rows(self, request: Request) -> TensorDict | None:
        """A row for each own one, in its group."""
        env = states_confidence(request.env, "rollout.sources")
        answers, size = Answers(request, self.threshold), request.reward.shape[1]
        drawn = torch.randperm(len(request.problems), generator=request.generator)
        shown = answers.right.double().mean(-1).tolist()
        share = {int(n): shown[n] for n in drawn[: round(self.of * len(drawn))]}
        said = list(answers.whole)
        if COUNTED in request.own.keys():
            said = [ids if kept else [] for ids, kept in zip(said, request.own[COUNTED].tolist(), strict=True)]
        said = [self._restated(env, ids, share.get(row // size)) for row, ids in enumerate(said)]
        problems = [problem for problem in request.problems for _ in range(size)]
        rows = request.recite(problems, said, request.groups.repeat_interleave(size), Source.EXPERT)
        if rows is not None and "privileged_tokens" in rows.keys():
            of_group = {group: share.get(n) for n, group in enumerate(request.groups.tolist())}
            self._tell(env, rows, [of_group[group] for group in rows["group"].tolist()])
        return rows

    def _tell(self, env: StatesConfidence, rows: TensorDict, shares: list[float | None]) -> None:
        """Overwrites the confidence of the solution that stands between prompt and answer."""
        first = rows["mask"].int().argmax(-1).tolist()
        last = rows["privileged_mask"].int().argmax(-1).tolist()
        for tokens, start, stop, share in zip(rows["privileged_tokens"], first, last, shares, strict=True):
            tokens[start:stop] = torch.tensor(self._restated(env, tokens[start:stop].tolist(), share))

    @staticmethod
    def _restated(env: StatesConfidence, ids: list[int], share: float | None) -> list[int]:
        return ids if share is None or not ids else env.restate(ids, share) or ids


def states_confidence(env: LanguageEnv, setting: str) -> StatesConfidence:
    """The task, whose answers state how sure they are.

    Raises:
        ConfigError: they do not.
    """
    if not isinstance(env, StatesConfidence):
        raise ConfigError(
            f"{setting} overwrites the confidence that answers state, and {type(env).__name__} knows of none: use "
            "env=chain_mod env.confidence=true, or give your task states_confidence and a method restate()"
        )
    if not env.states_confidence:
        raise ConfigError(
            f"{setting} overwrites the confidence that answers state, and those of {type(env).__name__} state none: "
            "set env.confidence=true"
        )
    return env
