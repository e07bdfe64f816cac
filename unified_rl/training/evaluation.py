"""Held-out evaluation, the same names in both domains: ``eval/score`` is what curves and tables show."""

from __future__ import annotations

import torch
from torch import Tensor

from unified_rl.interop.guard import reset_env, step_env
from unified_rl.protocols import ControlEnv, HoldsOutAnswers, LanguageEnv, LanguagePolicy, Samples
from unified_rl.rollout.conversation import converse, mean_reward, means
from unified_rl.units import trim_units

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


def evaluate_language(
    env: LanguageEnv, policy: LanguagePolicy, count: int, seed: int, at_once: int | None = None
) -> dict[str, float]:
    """Held-out prompts, answered once by sampling and once greedily.

    Args:
        env: the task.
        policy: the language model.
        count: prompts; of a finite pool every problem is asked equally often, or once more.
        seed: of prompts and tokens.
        at_once: conversations that are sampled together; :data:`AT_ONCE` by default.

    Returns:
        ``eval/score`` and ``eval/reward`` (mean reward of sampled answers), ``eval/accuracy`` (share of them that the
        task calls correct, whatever their reward), both also of the most likely answers as ``_greedy``,
        ``eval/length`` (sampled tokens a conversation), ``eval/truncated``, and the task's further numbers, those of
        reward functions as ``eval/rewards/NAME``. A task that does not say what is correct has no accuracy.
    """
    problems = env.problems(count, torch.Generator().manual_seed(seed), "eval")
    generator = torch.Generator(device=policy.device).manual_seed(seed)
    size = AT_ONCE if at_once is None else at_once
    talk, info = converse(env, policy, problems, generator, at_once=size)
    best, best_info = converse(env, policy, problems, None, greedy=True, at_once=size)
    reward = mean_reward(talk, info)
    out = {"score": reward, "reward": reward, "reward_greedy": mean_reward(best, best_info)}
    if "correct" in info:
        out |= {"accuracy": info["correct"].mean(), "accuracy_greedy": best_info["correct"].mean()}
    out |= means({key: value for key, value in info.items() if key not in ("correct", "truncated", "counted")})
    out |= {"length": talk.mask.sum(-1).float().mean(), "truncated": talk.truncated.any(-1).float().mean()}
    return {f"eval/{key}": float(value) for key, value in out.items()}


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
