"""Which prompts are drawn: those among candidates that the policy solves sometimes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.configurable import configurable
from unified_rl.correction.lookup import bind
from unified_rl.errors import ConfigError
from unified_rl.ranges import Count, ranged
from unified_rl.returns.difficulty import DIFFICULTIES, draw_top, draw_weighted
from unified_rl.returns.trackers import TRACKERS, Outcomes, Prompts, Tracker, check_rewards
from unified_rl.rollout.conversation import Problems

EXPECTED = "expected"
"""Entry ``[B]`` float32 of the record: the success rate that was expected of a row's prompt before it was answered."""


def prompts_of(problems: Problems) -> Prompts:
    """What a tracker sees of problems."""
    return Prompts(torch.tensor([p["prompt_id"] for p in problems], dtype=torch.int64), [p["prompt"] for p in problems])


def prompts_in(rows: TensorDict) -> Prompts:
    """What a tracker sees of rows ``[B]``: the tokens before the first that was sampled."""
    before = (rows["mask"].cumsum(-1) == 0) & rows["token_mask"]
    tokens = zip(rows["tokens"].tolist(), before.sum(-1).tolist(), strict=True)
    return Prompts(rows["prompt_id"], [ids[:length] for ids, length in tokens])


@configurable
@ranged("rollout.curriculum")
class Curriculum:
    """Draws more prompts than are needed, and keeps those that are worth most. SPO, VADE, PCL, V_0, FG-ExPO.

    Rows hold what was expected of their prompt as :data:`EXPECTED`, for ``correction.advantage={baseline: given, given:
    expected}``. Only what the policy says by itself is counted: not behind a beginning that others gave, and before a
    context changes it. With workers each has a tracker of its own, of the prompts that it drew.

    Args:
        tracker: how often a prompt is solved, a name of :data:`~unified_rl.returns.trackers.TRACKERS` or a mapping
            with ``name`` and its settings.
        score: what that is worth, likewise of :data:`~unified_rl.returns.difficulty.DIFFICULTIES`.
        candidates: prompts that are drawn for each that is used; 1 chooses nothing.
        pick: ``sample`` in proportion to the worth, without replacement, so that a prompt of any worth may come; or
            ``top``.
        thompson: weigh a rate drawn from what the tracker believes, instead of its estimate.
    """

    metrics = ("expected", "known")
    """Names of what :meth:`told` returns, behind ``rollout/``."""

    def __init__(
        self,
        tracker: str | dict[str, Any] = "drift",
        score: str | dict[str, Any] = "deviation",
        candidates: Count = 4,
        pick: Literal["sample", "top"] = "sample",
        thompson: bool = False,
    ) -> None:
        self.check_settings({"tracker": tracker, "thompson": thompson})
        self.tracker: Tracker = bind(tracker, TRACKERS, "rollout.curriculum.tracker")[0]()
        self.score = bind(score, DIFFICULTIES, "rollout.curriculum.score")[0]
        self.candidates, self.pick, self.thompson = candidates, pick, thompson

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> None:
        """Refuses trackers and scores that do not exist, and rates drawn of none, when a run is composed.

        Raises:
            ConfigError: an unknown name or a wrong setting, by its full name; ``thompson`` with a tracker that has an
                estimate and no distribution.
        """
        if "score" in settings:
            bind(settings["score"], DIFFICULTIES, "rollout.curriculum.score")
        if "tracker" in settings:
            tracker = bind(settings["tracker"], TRACKERS, "rollout.curriculum.tracker")[0].func
            if settings.get("thompson") and tracker.drawn is Tracker.drawn:  # type: ignore[attr-defined]
                able = [name for name, kind in TRACKERS.items() if kind.drawn is not Tracker.drawn]
                raise ConfigError(
                    f"rollout.curriculum.thompson=true draws from what a tracker believes, and {tracker.__name__} has "
                    f"an estimate alone, so it would be of no effect: leave it out, or use rollout.curriculum.tracker="
                    f"{' or '.join(able)}"
                )

    def choose(self, draw: Callable[[int], Problems], count: int, stream: torch.Generator) -> Problems:
        """``count`` of ``candidates * count`` problems that ``draw`` gives, in the order in which they came.

        Args:
            draw: ``n -> n`` problems.
            count: wanted.
            stream: of the choice.
        """
        problems = draw(self.candidates * count)
        prompts = prompts_of(problems)
        rate = self.tracker.drawn(prompts, stream) if self.thompson else self.tracker.value(prompts)
        worth = self.score(rate)
        chosen = draw_top(worth, count) if self.pick == "top" else draw_weighted(worth, count, stream)
        return [problems[at] for at in chosen.tolist()]

    def expect(self, rows: TensorDict, problems: Problems | None = None) -> TensorDict:
        """Writes :data:`EXPECTED` into rows ``[B]``, in place.

        Args:
            rows: of the record.
            problems: ``P``, where rows answer these, ``B / P`` consecutive ones each, whatever they begin with. None
                reads the prompts from the rows.
        """
        if problems is None:
            return rows.set(EXPECTED, self.tracker.value(prompts_in(rows)).float())
        value = self.tracker.value(prompts_of(problems)).float()
        return rows.set(EXPECTED, value.repeat_interleave(len(rows) // len(problems)))

    def told(
        self, problems: Problems, reward: Tensor, counted: Tensor, rows: TensorDict, score: Callable[..., Tensor]
    ) -> dict[str, float]:
        """Takes in what came of a collection; returns metrics.

        Args:
            problems: ``P``.
            reward: ``[P, G]``, the return of every answer without help.
            counted: ``[P, G]`` bool, those that take part in updates.
            rows: ``[P]``, the first answer to each.
            score: ``rows -> [n, N]``: log-probs under the present policy.

        Raises:
            RecordError: a return below 0 or above 1.
        """
        check_rewards(reward[counted])
        prompts = prompts_of(problems)
        metrics = {
            "rollout/expected": float(self.tracker.value(prompts).mean()),
            "rollout/known": self.tracker.known(prompts),
        }
        won = torch.where(counted, reward, 0.0).double().sum(-1)
        self.tracker.learn(*_merged(prompts, Outcomes(won, counted.sum(-1).double() - won, rows, score)))
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """The tracker's."""
        return self.tracker.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.tracker.load_state_dict(state)


def _merged(prompts: Prompts, outcomes: Outcomes) -> tuple[Prompts, Outcomes]:
    """A prompt that was drawn twice, once; its rows are those of the first."""
    unique, at = torch.unique(prompts.number, return_inverse=True)
    if len(unique) == len(at):
        return prompts, outcomes
    first = torch.full((len(unique),), len(at)).scatter_reduce(0, at, torch.arange(len(at)), "amin")
    won, lost = (torch.zeros(len(unique), dtype=torch.float64).index_add(0, at, x) for x in outcomes[:2])
    once = Prompts(unique, [prompts.tokens[n] for n in first.tolist()])
    return once, Outcomes(won, lost, outcomes.rows[first], outcomes.score)
