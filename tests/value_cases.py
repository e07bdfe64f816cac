"""Small transitions, policies and agents that the tests of value-based agents share."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict

from unified_rl.agents.actor_critic import ActorCritic
from unified_rl.objectives.transitions import Transitions, prepare_batch
from unified_rl.policies.gaussian import GaussianPolicy
from unified_rl.replay import Replay, Uniform

BOUNDS: dict[str, Any] = {"observation_dim": 3, "action_dim": 2, "action_low": [-2.0, -2.0], "action_high": [2.0, 2.0]}
IQL: dict[str, Any] = {
    "target": "state_value",
    "value": "expectile",
    "actor": {"policy": "weighted"},
    "tune_alpha": False,
}


def squashed(**options: Any) -> GaussianPolicy:
    return GaussianPolicy(**BOUNDS, squash=True, state_dependent_std=True, hidden=(16,), **options)


def make(policy: Any = None, rows: int = 4, **options: Any) -> ActorCritic:
    settings = {"critic_hidden": (16,), "learning_starts": 8, "batch_size": 16, **options}
    return ActorCritic(policy or squashed(), torch.Generator().manual_seed(0), rows=rows, length=1, **settings)


def transitions(count: int = 32) -> TensorDict:
    g = torch.Generator().manual_seed(5)
    return TensorDict(
        {
            "observation": torch.randn(count, 3, generator=g),
            "action": torch.rand(count, 2, generator=g) * 4 - 2,
            "reward": torch.randn(count, generator=g),
            "discount": torch.full((count,), 0.9),
            "terminated": torch.rand(count, generator=g) < 0.3,
            "next_observation": torch.randn(count, 3, generator=g),
        },
        batch_size=[count],
    )


def filled(rows: TensorDict | None = None, sampler: Any = None, seed: int = 0, **options: Any) -> Replay:
    replay = Replay(64, sampler=sampler or Uniform(), seed=seed, **options)
    replay.extend(transitions() if rows is None else rows)
    return replay


def batch_of(agent: ActorCritic, alpha: float = 1.0, noise: torch.Tensor | None = None) -> Transitions:
    if noise is None:
        noise = torch.randn(2, 32, 2, generator=torch.Generator().manual_seed(1))
    batch = prepare_batch(transitions(), agent.device)
    return Transitions(batch, agent.nets, noise, torch.tensor(alpha), agent.phases_of.aggregate, agent.generator)


def weights(*modules: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for module in modules for p in module.parameters()])
