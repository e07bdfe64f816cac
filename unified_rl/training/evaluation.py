"""Held-out evaluation, the same names in both domains: ``eval/score`` is what curves and tables show."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.errors import ConfigError
from unified_rl.interop.guard import reset_env, step_env
from unified_rl.policies.base import Policy
from unified_rl.policies.sampling import HasSampling
from unified_rl.protocols import (
    ControlEnv,
    Generates,
    HoldsOutAnswers,
    LanguageEnv,
    LanguagePolicy,
    Samples,
    Trainable,
    Votes,
)
from unified_rl.rollout.conversation import COLUMNS, SCORES, Problems, Told, converse, joined, means
from unified_rl.units import trim_units

Array = NDArray[np.float64]

LOSS_ROWS = 4096
"""Recorded rows of one forward pass."""

AT_ONCE = 256
"""Conversations of an evaluation that are sampled together where nobody says how many fit."""


@torch.no_grad()
def evaluate_control(
    env: ControlEnv,
    policy: Samples,
    seed: int,
    generator: torch.Generator,
    deterministic: bool = True,
    device: str = "cpu",
    episodes: int | None = None,
) -> dict[str, float]:
    """Whole episodes from fresh resets, the first with ``seed``.

    Simulations that are fewer than the episodes play several in turn, all of them one before any starts the next: who
    ends sooner plays no more than the others, so short episodes weigh no more than long ones.

    Args:
        env: its simulations play together.
        policy: samples the actions.
        seed: of the first reset.
        generator: the stream of a policy that is not deterministic.
        deterministic: leave the policy's sampling noise out.
        device: of the policy.
        episodes: how many; one a simulation by default.

    Returns:
        ``eval/score`` and ``eval/return`` (mean undiscounted return), ``eval/return_std``, ``eval/length``
        (environment steps), and the environment's own such as ``eval/success``, over those episodes that tell it.

    Raises:
        EnvError: the environment raised, or returned what is no step.
        NonFiniteError: a NaN or infinity in an observation or a reward.
    """
    episodes = env.num_envs if episodes is None else episodes
    rounds: list[dict[str, Tensor]] = []
    fresh: Tensor | None = None
    for done in range(0, episodes, env.num_envs):
        observation = reset_env(env, seed if done == 0 else None) if fresh is None else fresh
        played, fresh = _play_round(env, policy, observation, generator, deterministic, device)
        rounds.append({key: value[: episodes - done] for key, value in played.items()})
    told = {key: torch.cat([r[key] for r in rounds if key in r]) for key in dict.fromkeys(k for r in rounds for k in r)}
    total = told["return"]
    out = {"score": total.mean(), "return": total.mean(), "return_std": total.std(correction=0)}
    out |= {key: value.nanmean() for key, value in told.items() if key not in out and not bool(value.isnan().all())}
    return {f"eval/{key}": float(value) for key, value in out.items()}


def _play_round(
    env: ControlEnv,
    policy: Samples,
    observation: Tensor,
    generator: torch.Generator,
    deterministic: bool,
    device: str,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """One episode in every simulation, at most ``env.max_steps`` decisions long.

    Returns:
        Its numbers ``[K]``; and the first observations of the next episodes where all of them begin just now, so that
        nobody's environment is reset twice.
    """
    alive = torch.ones(env.num_envs, dtype=torch.bool)
    total = torch.zeros(env.num_envs, dtype=torch.float64)
    length = torch.zeros(env.num_envs, dtype=torch.float64)
    told: dict[str, Tensor] = {}
    fresh = None
    for number in range(1, env.max_steps + 1):
        sample = policy.sample(observation.to(device), generator=generator, deterministic=deterministic)
        result = step_env(env, sample["action"].to("cpu"), number)
        total += torch.where(alive, result.plain_reward.double(), 0.0)
        length += torch.where(alive, result.executed, 0)
        ended = alive & (result.terminated | result.truncated)
        over = ended if number < env.max_steps else alive  # given up: what it told last is how it ended
        for key, value in result.info.items():
            told[key] = torch.where(over, value.double(), told.get(key, torch.full_like(total, torch.nan)))
        alive &= ~ended
        observation = result.observation
        if not bool(alive.any()):
            fresh = observation if bool((result.terminated | result.truncated).all()) else None
            break
    return {**told, "return": total, "length": length}, fresh


class Scores(dict[str, float]):
    """Metrics of an evaluation, with what they rest on.

    Attributes:
        intervals: metric to the ends of its 95 % interval, where it has one (one prompt has none).
        method: how the intervals were made, a line of text.
        samples: sampled answers to each prompt; 0 of control.
        held_out: problems that there are to ask; 0 where they have no end.
        problems: what became of each prompt: ``prompt_id``, ``reward`` (mean), and ``correct`` (count of ``samples``).
        shown: the conversations that were asked for, or None.
    """

    def __init__(self, metrics: Mapping[str, float] | None = None) -> None:
        super().__init__(metrics or {})
        self.intervals: dict[str, tuple[float, float]] = {}
        self.method = ""
        self.samples = self.held_out = 0
        self.problems: list[dict[str, Any]] = []
        self.shown: Told | None = None


def evaluate_language(
    env: LanguageEnv,
    policy: LanguagePolicy,
    count: int,
    seed: int,
    at_once: int | None = None,
    *,
    samples: int = 1,
    sampling: Mapping[str, Any] | None = None,
    keep: Sequence[int] = (),
    intervals: bool = False,
) -> Scores:
    """Held-out prompts, answered ``samples`` times by sampling and once greedily.

    Args:
        env: the task.
        policy: the language model.
        count: prompts; of a finite pool every problem is asked equally often, or once more.
        seed: of prompts and tokens; the same seed and ``at_once`` give the same answers.
        at_once: conversations that are sampled together; :data:`AT_ONCE` by default. Nothing but numbers is kept of
            the others meanwhile.
        samples: sampled answers to each prompt.
        sampling: fields of :class:`~unified_rl.policies.sampling.Sampling` in place of the policy's own.
        keep: prompts, by their number, whose first sampled conversation is handed back.
        intervals: also compute intervals.

    Returns:
        ``eval/score`` and ``eval/reward`` (mean reward of sampled answers), ``eval/accuracy`` (share of them that the
        task calls correct, whatever their reward: avg@k), both also of the most likely answers as ``_greedy``,
        ``eval/length`` (sampled tokens a conversation), ``eval/truncated``, and the task's further numbers. A task that
        does not say what is correct has no accuracy. With several samples also ``eval/pass_at_K`` (the unbiased
        estimate, "Evaluating Large Language Models Trained on Code", arXiv:2107.03374) for powers of two up to
        ``samples``, and of tasks that say what an answer says ``eval/maj_at_K`` (majority vote over ``samples``
        answers; who says nothing does not vote, and tied answers count by the share of them that is correct) with
        ``eval/maj_ties``, the share of prompts whose vote was tied.

    Raises:
        ConfigError: ``sampling`` for a policy that has none.
    """
    problems = env.problems(count, torch.Generator().manual_seed(seed), "eval")
    size = AT_ONCE if at_once is None else at_once
    with sampling_as(policy, sampling or {}):
        generator = torch.Generator(device=policy.device).manual_seed(seed)
        tally = ask(env, policy, problems, generator, samples, size, keep)
        best = ask(env, policy, problems, None, 1, size)
    out = Scores(metrics_of(tally, best))
    out.samples, out.shown = samples, tally.kept()
    out.problems = tally.by_problem(problems)
    if intervals:
        add_intervals(out, tally, best, [problem["prompt_id"] for problem in problems])
    return out


@contextmanager
def sampling_as(policy: Any, changes: Mapping[str, Any]) -> Iterator[None]:
    """Within it, the policy samples with changed settings.

    Raises:
        ConfigError: the policy has no such settings.
    """
    if not changes:
        yield
        return
    if not isinstance(policy, HasSampling):
        raise ConfigError(
            f"eval_sampling.{next(iter(changes))} needs a policy with temperature and truncation; "
            f"{type(policy).__name__} has none: leave it out"
        )
    own = policy.sampling
    policy.sampling = dataclasses.replace(own, **changes)
    try:
        yield
    finally:
        policy.sampling = own


class Tally:
    """What is kept of ``P`` prompts' answers, ``k`` to each: a few numbers of every one.

    Attributes:
        reward, length, truncated: ``[P, k]``.
        info: the task's numbers, each ``[P, k]``.
        votes: what each answer says, ``[P][k]``; None of a task that does not tell.
    """

    def __init__(self, prompts: int, samples: int, votes: bool) -> None:
        shape = (prompts, samples)
        self.reward, self.length, self.truncated = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)
        self.info: dict[str, Tensor] = {}
        self.votes: list[list[str | None]] | None = [[None] * samples for _ in range(prompts)] if votes else None
        self._kept: list[Told] = []

    def add(self, told: Told, first: int, column: int, width: int, env: Any, keep: Collection[int]) -> None:
        """Counts answers to the prompts from ``first`` on, ``width`` to each, as those from ``column`` on."""
        talk, info = told
        prompts = len(talk.problems) // width
        at = (slice(first, first + prompts), slice(column, column + width))
        numbers = {"reward": talk.reward.sum(-1), "length": talk.mask.sum(-1), "truncated": talk.truncated.any(-1)}
        for name, value in numbers.items():
            getattr(self, name)[at] = value.float().view(prompts, width)
        for name, value in info.items():
            empty = math.nan if name.startswith(SCORES) else 0.0
            self.info.setdefault(name, torch.full_like(self.reward, empty))[at] = value.float().view(prompts, width)
        if self.votes is not None:
            for row, (problem, said) in enumerate(zip(talk.problems, talk.said, strict=True)):
                self.votes[first + row // width][column + row % width] = env.vote(problem, said)
        wanted = [row for row in range(0, len(talk.problems), width) if column == 0 and first + row // width in keep]
        if wanted:
            self._kept.append(picked(told, torch.tensor(wanted)))

    def kept(self) -> Told | None:
        """The conversations that were to be kept."""
        return joined(self._kept) if self._kept else None

    def mean_reward(self) -> Tensor:
        """The mean reward of the answers that have one, a scalar; 0 where none has."""
        if "scored" not in self.info:
            return self.reward.mean()
        scored = self.info["scored"] > 0
        return self.reward[scored].sum() / scored.sum().clamp(min=1)

    def rewards(self) -> Array:
        """The mean reward of each prompt's answers that have one, ``[P]``; NaN where none has."""
        if "scored" not in self.info:
            return _mean(self.reward)
        return _mean(self.reward.masked_fill(self.info["scored"] <= 0, math.nan), given=True)

    @property
    def correct(self) -> Tensor | None:
        """``[P, k]``, what the task calls correct."""
        return self.info.get("correct")

    def by_problem(self, problems: Problems) -> list[dict[str, Any]]:
        """A line of numbers for each prompt."""
        lines = [
            {"prompt_id": problem["prompt_id"], "reward": reward}
            for problem, reward in zip(problems, self.rewards().tolist(), strict=True)
        ]
        if self.correct is not None:
            for line, count in zip(lines, self.correct.sum(1).tolist(), strict=True):
                line["correct"] = int(count)
        return lines


def ask(
    env: LanguageEnv,
    policy: Generates,
    problems: Problems,
    generator: torch.Generator | None,
    samples: int,
    at_once: int,
    keep: Collection[int] = (),
) -> Tally:
    """Answers to every problem, at most ``at_once`` conversations together; greedy ones without a generator."""
    tally = Tally(len(problems), samples, votes=isinstance(env, Votes) and samples > 1)
    unknown = "eval" in getattr(env, "unjudged", {})  # reward functions judge: nobody knows what is correct
    for column in range(0, samples, at_once):
        width = min(at_once, samples - column)  # a group larger than what fits is asked in parts
        size = max(1, at_once // width)
        for first in range(0, len(problems), size):
            repeated = [problem for problem in problems[first : first + size] for _ in range(width)]
            told = converse(env, policy, repeated, generator, greedy=generator is None, group_size=width)
            if unknown:
                told[1].pop("correct", None)
            tally.add(told, first, column, width, env, keep)
    return tally


def picked(told: Told, rows: Tensor) -> Told:
    """Some conversations."""
    talk, info = told
    out = copy(talk)
    for name in (*COLUMNS, "length"):
        setattr(out, name, getattr(talk, name)[rows])
    out.problems = [talk.problems[row] for row in rows.tolist()]
    out.said = [talk.said[row] for row in rows.tolist()]
    return out, {key: value[rows] for key, value in info.items()}


def metrics_of(tally: Tally, best: Tally) -> dict[str, float]:
    """The metrics of sampled answers and of the most likely ones, see :func:`evaluate_language`."""
    reward = tally.mean_reward()
    out = {"score": reward, "reward": reward, "reward_greedy": best.mean_reward()}
    if tally.correct is not None and best.correct is not None:
        out |= {"accuracy": tally.correct.mean(), "accuracy_greedy": best.correct.mean()}
    out |= means({key: value for key, value in tally.info.items() if key not in ("correct", "truncated", "counted")})
    out |= {"length": tally.length.mean(), "truncated": tally.truncated.mean()}
    found = {f"eval/{key}": float(value) for key, value in out.items()}
    return found | {f"eval/{key}": float(np.mean(values)) for key, values in of_several(tally).items()}


def of_several(tally: Tally) -> dict[str, Array]:
    """Per-prompt values ``[P]`` of what needs several samples: ``pass_at_K``, ``maj_at_K``, ``maj_ties``."""
    correct, samples = tally.correct, tally.reward.shape[1]
    if correct is None or samples == 1:
        return {}
    counts = correct.round().long().sum(1).tolist()
    out = {f"pass_at_{k}": pass_at_k(samples, counts, k) for k in powers(samples)}
    if tally.votes is not None:
        voted = [majority(votes, row) for votes, row in zip(tally.votes, correct.tolist(), strict=True)]
        out |= {
            f"maj_at_{samples}": np.array([v for v, _ in voted]),
            "maj_ties": np.array([float(t) for _, t in voted]),
        }
    return out


def powers(samples: int) -> list[int]:
    """1, 2, 4, ... up to a number of samples, and that number."""
    return sorted({2**i for i in range(samples.bit_length()) if 2**i <= samples} | {samples})


def pass_at_k(samples: int, correct: Sequence[int], k: int) -> Array:
    """``1 - C(n - c, k) / C(n, k)`` of ``n`` samples of which ``c`` are correct: unbiased, arXiv:2107.03374.

    Args:
        samples: n.
        correct: c of every prompt, ``[P]``.
        k: at most n.
    """
    of = [1.0 - math.comb(samples - c, k) / math.comb(samples, k) for c in range(samples + 1)]
    return np.array([of[c] for c in correct])


def majority(votes: Sequence[str | None], correct: Sequence[float]) -> tuple[float, bool]:
    """Whether what most answers say is correct, and whether the vote was tied.

    Args:
        votes: what each answer says; None does not vote.
        correct: 1 for a correct answer, else 0.

    Returns:
        0 where nobody votes; of a tie, the mean over the tied answers. Answers that say the same can be judged
        differently (one was cut off): each counts by the share of them that is correct.
    """
    ballots: dict[str, list[float]] = {}
    for vote, right in zip(votes, correct, strict=True):
        if vote is not None:
            ballots.setdefault(vote, []).append(right)
    if not ballots:
        return 0.0, False
    most = max(map(len, ballots.values()))
    first = [float(np.mean(rights)) for rights in ballots.values() if len(rights) == most]
    return float(np.mean(first)), len(first) > 1


WILSON = "Wilson's interval over prompts"
BOOTSTRAP = "bootstrap over prompts (percentiles of 2,000 resamplings; Wilson's interval where all prompts are equal)"


def add_intervals(scores: Scores, tally: Tally, best: Tally, prompts: Sequence[int]) -> None:
    """Gives scores their 95 % intervals: prompts are what is drawn, so they are resampled and not their answers."""
    values: dict[str, Array] = {"score": tally.rewards(), "reward": tally.rewards()}
    values |= {"reward_greedy": best.rewards(), "length": _mean(tally.length), "truncated": _mean(tally.truncated)}
    if tally.correct is not None and best.correct is not None:
        values |= {"accuracy": _mean(tally.correct), "accuracy_greedy": _mean(best.correct)}
    values |= of_several(tally)
    values.pop("maj_ties", None)
    for key, value in values.items():
        given = ~np.isnan(value)  # prompts of which no answer has a reward
        asked = [prompt for prompt, has in zip(prompts, given, strict=True) if has]
        if len(set(asked)) > 1:
            scores.intervals[f"eval/{key}"] = interval(once(value[given], asked))
    repeated = len(set(prompts)) < len(prompts)
    scores.method = (
        BOOTSTRAP if tally.reward.shape[1] > 1 or repeated else f"{WILSON} of shares, of others a {BOOTSTRAP}"
    )


def once(values: Array, prompts: Sequence[int]) -> Array:
    """One value a prompt: those that were asked several times have their mean."""
    _, place = np.unique(np.array(prompts), return_inverse=True)
    return np.asarray(np.bincount(place, weights=values) / np.bincount(place), dtype=np.float64)


RESAMPLINGS = 2000


def interval(values: Array) -> tuple[float, float]:
    """95 % interval of the mean of ``[P]``: Wilson's where every value is 0 or 1, else a bootstrap (percentiles)."""
    from scipy.stats import binomtest

    if bool(np.isin(values, (0.0, 1.0)).all()):
        found = binomtest(int(values.sum()), len(values)).proportion_ci(method="wilson")
        return float(found.low), float(found.high)
    rng = np.random.default_rng(0)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLINGS)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _mean(values: Tensor, given: bool = False) -> Array:
    """The mean of each row; with ``given`` over the values that are not NaN."""
    values = values.double()
    return np.asarray((values.nanmean(1) if given else values.mean(1)).numpy(), dtype=np.float64)


NLL_ROWS = 16
"""Supervised rows that are scored together in an evaluation."""


@torch.no_grad()
def evaluate_imitation(env: object, policy: LanguagePolicy, count: int) -> dict[str, float]:
    """How likely the policy finds held-out answers that were given.

    Args:
        env: the task; one that holds none is passed over.
        policy: the language model.
        count: problems; the same ones at every call.

    Returns:
        ``eval/nll``, nats a token of the answers, over all their tokens; empty where there are none.
    """
    rows = env.held_out_demonstrations(count) if isinstance(env, HoldsOutAnswers) else None
    if rows is None:
        return {}
    total = tokens = 0.0
    for batch in rows.split(NLL_ROWS):
        batch = trim_units(batch, int(batch["token_mask"].sum(-1).max())).to(policy.device)
        nll = policy.nll(batch)
        total += float(torch.where(batch["mask"], nll, 0.0).sum())
        tokens += float(batch["mask"].sum())
    return {"eval/nll": total / tokens}


@torch.no_grad()
def held_out_loss(policy: Trainable, rows: TensorDictBase, seed: int) -> dict[str, float]:
    """``eval/nll``, the mean supervised loss of a control policy over recorded rows that training never sees.

    Losses that draw noise (flow, diffusion) draw the same at every call, from ``seed``.
    """
    stream = torch.Generator().manual_seed(seed)
    total = count = 0.0
    for batch in rows.split(LOSS_ROWS):
        batch = batch.to(policy.device)
        nll = policy.nll(batch, stream) if isinstance(policy, Policy) else policy.nll(batch)
        total += float(nll.double().sum())
        count += nll.numel()
    return {"eval/nll": total / count}
