"""Held-out evaluation, the same names in both domains: ``eval/score`` is what curves and tables show."""

from __future__ import annotations

import torch
from torch import Tensor

from unified_rl.protocols import ControlEnv, LanguageEnv, LanguagePolicy, Samples
from unified_rl.rollout.conversation import converse


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


def evaluate_language(env: LanguageEnv, policy: LanguagePolicy, count: int, seed: int) -> dict[str, float]:
    """Held-out prompts, answered once by sampling and once greedily.

    Returns:
        ``eval/score`` and ``eval/accuracy`` (mean reward of sampled answers), ``eval/accuracy_greedy``,
        ``eval/length`` (sampled tokens a conversation), ``eval/truncated``.
    """
    problems = env.problems(count, torch.Generator().manual_seed(seed), "eval")
    generator = torch.Generator(device=policy.device).manual_seed(seed)
    talk, _ = converse(env, policy, problems, generator)
    best, _ = converse(env, policy, problems, None, greedy=True)
    accuracy = talk.reward.sum(-1).mean()
    out = {
        "score": accuracy,
        "accuracy": accuracy,
        "accuracy_greedy": best.reward.sum(-1).mean(),
        "length": talk.mask.sum(-1).float().mean(),
        "truncated": talk.truncated.any(-1).float().mean(),
    }
    return {f"eval/{key}": float(value) for key, value in out.items()}
