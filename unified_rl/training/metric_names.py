"""Which metrics a run will log, known beforehand, so that a misspelt one is refused before anything is spent."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from unified_rl.instantiate import nearest
from unified_rl.protocols import CountsEpochs, NamesMetrics, ReportsColumns, Votes
from unified_rl.rollout import ControlRollout, DemonstrationRollout, LanguageRollout
from unified_rl.rollout.conversation import SCORES
from unified_rl.training.evaluation import powers

EVAL_LANGUAGE = ("score", "reward", "reward_greedy", "length", "truncated")
EVAL_CONTROL = ("score", "return", "return_std", "length")
REWARDS = ("reward", "reward_p10", "reward_p50", "reward_p90")
ROLLOUT_LANGUAGE = (*REWARDS, "entropy_estimate", "length", "turns", "truncated")
ROLLOUT_CONTROL = ("return", "length", "episodes")


@dataclass(frozen=True)
class MetricNames:
    """Names of a run's metrics.

    Attributes:
        known: those that may come, at some update.
        open: families (what stands before ``/``) of which nobody can know the rest; ``*`` stands for every family that
            :attr:`known` does not have.
        late: families that the first evaluation completes: the environment tells its numbers at the end of an episode.
    """

    known: frozenset[str]
    open: frozenset[str] = frozenset()
    late: frozenset[str] = frozenset()

    def fault(self, metric: str) -> str:
        """What is wrong with a metric that somebody waits for; empty where it may come."""
        family = metric.split("/")[0]
        alike = [name for name in self.known if name.split("/")[0] == family]
        if metric in self.known or family in self.open | self.late or ("*" in self.open and not alike):
            return ""
        return f"is no metric of this run; {nearest(metric, close(metric, self.known) or alike or self.known)}"

    def completed(self, evaluated: Iterable[str]) -> MetricNames:
        """With what an evaluation gave: rollouts tell the same of their episodes."""
        found = {name.removeprefix("eval/") for name in evaluated if name.startswith("eval/")}
        return MetricNames(self.known | {f"{family}/{name}" for family in self.late for name in found}, self.open)


def close(metric: str, known: Iterable[str]) -> list[str]:
    """Names that a metric may be a misspelling of."""
    return difflib.get_close_matches(metric, sorted(known), n=1)


def names_of(
    env: Any, agent: Any, rollout: Any, callbacks: Iterable[Any], samples: int = 1, imitates: bool = False
) -> MetricNames:
    """The metrics of a run.

    Args:
        env: the environment; a token task tells what it reports, one of control at the end of an episode.
        agent: tells them as ``metric_names``; of another agent every family but ``eval`` and ``rollout`` is open.
        rollout: None where the agent collects by itself.
        callbacks: what each names as its ``metrics`` is a metric of the run.
        samples: sampled answers to each prompt of an evaluation.
        imitates: whether the agent learns from what it is shown.
    """
    named = agent.metric_names if isinstance(agent, NamesMetrics) else None
    tells = isinstance(env, ReportsColumns)
    own = _of_columns(env) if tells else set()
    known = {f"eval/{name}" for name in _evaluated(env, own, samples, imitates)}
    known |= {"eval/nll"} if getattr(rollout, "held_out", None) is not None else set()
    known |= {f"rollout/{name}" for name in _collected(env, own, rollout)} | {*(named or ())}
    known |= {str(name) for callback in callbacks for name in getattr(callback, "metrics", ())}
    unknown = [family for family, opened in (("*", named is None), ("rollout", not _is_known(rollout))) if opened]
    return MetricNames(frozenset(known), frozenset(unknown), frozenset(() if tells else ("eval", "rollout")))


def _evaluated(env: Any, own: set[str], samples: int, imitates: bool) -> set[str]:
    """Without ``eval/``."""
    if env.domain == "control":
        return {*EVAL_CONTROL}
    out = {*EVAL_LANGUAGE, *(own - {"correct"}), *(("nll",) if imitates else ())}
    if "correct" not in own or "eval" in getattr(env, "unjudged", {}):
        return out
    out |= {"accuracy", "accuracy_greedy"}
    if samples > 1:
        out |= {f"pass_at_{k}" for k in powers(samples)}
        out |= {f"maj_at_{samples}", "maj_ties"} if isinstance(env, Votes) else set()
    return out


def _of_columns(env: ReportsColumns) -> set[str]:
    """Means of a task's own numbers; of reward functions also the spread."""
    own = {name for name in env.columns if name not in ("truncated", "counted")}
    return own | {f"{name}_std" for name in own if name.startswith(SCORES) and not name.endswith("_none")}


def _is_known(rollout: Any) -> bool:
    """Whether the names of a rollout's metrics are known, but for the environment's own."""
    if type(rollout) is LanguageRollout:
        return rollout.context is None or hasattr(rollout.context, "metrics")
    return rollout is None or isinstance(rollout, ControlRollout | DemonstrationRollout)


def _collected(env: Any, own: set[str], rollout: Any) -> set[str]:
    """Without ``rollout/``."""
    epochs = {"epoch"} if isinstance(env, CountsEpochs) else set()
    if isinstance(rollout, DemonstrationRollout):
        return epochs
    if env.domain == "control":
        return {*ROLLOUT_CONTROL, *({"starts"} if getattr(rollout, "starts", None) is not None else ())}
    if not isinstance(rollout, LanguageRollout):
        return {*ROLLOUT_LANGUAGE, *own}
    joined = {f"joined/{name}" for name in rollout.sources}
    context = set() if rollout.context is None else {"resampled", *getattr(rollout.context, "metrics", ())}
    context |= set() if rollout.curriculum is None else {*rollout.curriculum.metrics}
    context |= set() if rollout.beginning is None else {"begun", "begun_tokens"}
    context |= {"greedy"} & rollout.builder.wanted
    return {*ROLLOUT_LANGUAGE, *own, *epochs, *joined, *context, *({"counted"} & {*getattr(env, "columns", ())})}
