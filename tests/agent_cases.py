"""Small policies, rows and agents that several test files share."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.agents.policy_gradient import PolicyGradient
from unified_rl.correction import load_correction
from unified_rl.envs.language import ChainMod
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.policies.gaussian import GaussianPolicy
from unified_rl.replay import Fresh, Replay
from unified_rl.rollout import LanguageRollout

BOUNDS: dict[str, Any] = {"observation_dim": 3, "action_dim": 2, "action_low": [-1.0] * 2, "action_high": [1.0] * 2}
TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
LANES, HORIZON = 4, 8


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(**options: Any) -> GaussianPolicy:
    return GaussianPolicy(**BOUNDS, hidden=(8,), seed=3, **options)


def transitions(policy: Any, seed: int = 0) -> TensorDict:
    """``[HORIZON, LANES]`` transitions with an episode end inside every lane, terminated and truncated in turn."""
    g = stream(seed)
    observation = torch.randn(HORIZON + 1, LANES, 3, generator=g)
    sample = policy.sample(observation[:-1].reshape(-1, 3), generator=g)
    ended = torch.zeros(HORIZON, LANES, dtype=torch.bool)
    ended[[2, 3, 4, 5], range(LANES)] = True
    even = torch.arange(LANES) % 2 == 0
    episode = torch.arange(LANES) + LANES * (torch.arange(HORIZON)[:, None] > torch.tensor([2, 3, 4, 5])).long()
    items = {
        "observation": observation[:-1],
        **{key: value.reshape(HORIZON, LANES, *value.shape[1:]) for key, value in sample.items()},
        "reward": torch.randn(HORIZON, LANES, generator=g),
        "terminated": ended & even,
        "truncated": ended & ~even,
        "next_observation": torch.randn(HORIZON, LANES, 3, generator=g),
        "discount": torch.full((HORIZON, LANES), 0.9),
        "policy_version": torch.zeros(HORIZON, LANES, dtype=torch.int64),
        "episode": episode,
        "group": episode,
        "source": torch.zeros(HORIZON, LANES, dtype=torch.int64),
    }
    items["next_observation"][:-1] = torch.where(
        ended[:-1, :, None], items["next_observation"][:-1], observation[1:HORIZON]
    )
    return TensorDict(items, batch_size=[HORIZON, LANES])


def control_agent(policy: Any, correction: Any = "ppo", **options: Any) -> PolicyGradient:
    settings = {"max_grad_norm": None, "critic_hidden": (8,), **options}
    made = load_correction(correction) if isinstance(correction, str) else correction
    return PolicyGradient(policy, made, stream(), rows=LANES, length=HORIZON, **settings)


def filled(rows: TensorDict, lanes: int) -> Replay:
    replay = Replay(1024, lanes=lanes, sampler=Fresh(), cut=False)
    replay.extend(rows)
    return replay


def nudge(policy: Any, scale: float = 0.1) -> None:
    """Moves the weights, so that ratios differ from 1 and some are clipped."""
    g = stream(9)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=g)


def gradients(agent: PolicyGradient, replay: Replay) -> dict[str, Tensor]:
    """The gradients that the first optimiser step of an update meets."""
    caught: dict[str, Tensor] = {}
    step = agent.optimizer.step

    def spy(loss: Tensor) -> Tensor:
        if not caught:
            caught.update({name: p.grad.clone() for name, p in agent.optimizer.named if p.grad is not None})
        return step(loss)

    agent.optimizer.step = spy  # type: ignore[method-assign]
    agent.checked = True
    agent.update(replay)
    return caught


def close(got: dict[str, Tensor], want: dict[str, Tensor], atol: float = 1e-6) -> None:
    assert got.keys() == want.keys() and any(float(g.abs().max()) > 1e-3 for g in want.values())
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def language(seed: int = 0) -> tuple[CausalLM, TensorDict]:
    """A tiny model and the rows it sampled, with rewards that differ within groups."""
    env = ChainMod(modulus=5, terms=3)
    policy = CausalLM(**env.policy_inputs(), config=TINY, seed=1)
    rollout = LanguageRollout(env, policy, 1.0, stream(seed), stream(seed + 1), prompts=3, group_size=4)
    rows, _ = rollout.collect(0)
    rows["reward"] = torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0])[:, None]
    return policy, rows


def language_agent(policy: Any, rows: TensorDict, correction: str = "dapo", **options: Any) -> PolicyGradient:
    settings = {"max_grad_norm": None, **options}
    return PolicyGradient(policy, load_correction(correction), stream(), rows=len(rows), **settings)
