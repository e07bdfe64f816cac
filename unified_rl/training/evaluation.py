"""Held-out evaluation, the same names in both domains: ``eval/score`` is what curves and tables show."""

from __future__ import annotations

import torch
from torch import Tensor

from unified_rl.protocols import ControlEnv, LanguageEnv, LanguagePolicy, Samples
from unified_rl.rollout.conversation import converse

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
) -> dict[str, float]:
    """One episode in each of ``env.num_envs`` simulations, reset with ``seed``.

    Returns:
        ``eval/score`` and ``eval/return`` (mean undiscounted return), ``eval/return_std``, ``eval/length``, and the
        environment's own such as ``eval/success``.
    """
    observation = env.reset_batch(seed)
    alive = torch.ones(env.num_envs, dtype=torch.bool)
    total = torch.zeros(env.num_envs, dtype=torch.float64)
    length = torch.zeros(env.num_envs)
    last: dict[str, Tensor] = {}
    for _ in range(env.max_steps):
        sample = policy.sample(observation.to(device), generator=generator, deterministic=deterministic)
        result = env.step_batch(sample["action"].to("cpu"))
        total += torch.where(alive, result.reward.double(), 0.0)
        length += torch.where(alive, result.executed, 0)
        ended = alive & (result.terminated | result.truncated)
        for key, value in result.info.items():
            last[key] = torch.where(ended, value.float(), last.get(key, torch.zeros(env.num_envs)))
        alive &= ~ended
        observation = result.observation
        if not bool(alive.any()):
            break
    out = {"return": total.mean(), "return_std": total.std(correction=0), "length": length.mean()}
    out |= {key: value.mean() for key, value in last.items()}
    return {"eval/score": float(total.mean()), **{f"eval/{key}": float(value) for key, value in out.items()}}


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
        ``eval/length`` (sampled tokens a conversation), ``eval/truncated``, and the task's further numbers. A task that
        does not say what is correct has no accuracy.
    """
    problems = env.problems(count, torch.Generator().manual_seed(seed), "eval")
    generator = torch.Generator(device=policy.device).manual_seed(seed)
    size = AT_ONCE if at_once is None else at_once
    talk, info = converse(env, policy, problems, generator, at_once=size)
    best, best_info = converse(env, policy, problems, None, greedy=True, at_once=size)
    reward = talk.reward.sum(-1).mean()
    out = {"score": reward, "reward": reward, "reward_greedy": best.reward.sum(-1).mean()}
    if "correct" in info:
        out |= {"accuracy": info["correct"].mean(), "accuracy_greedy": best_info["correct"].mean()}
    out |= {key: value.mean() for key, value in info.items() if key not in ("correct", "truncated")}
    out |= {"length": talk.mask.sum(-1).float().mean(), "truncated": talk.truncated.any(-1).float().mean()}
    return {f"eval/{key}": float(value) for key, value in out.items()}
