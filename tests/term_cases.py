"""Rows of several sources, written-out losses, and agents with terms, shared by several test files."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from agent_cases import TINY, close, filled, gradients, stream
from tensordict import TensorDict
from torch import Tensor

from unified_rl.agents.policy_gradient import PolicyGradient
from unified_rl.correction import load_correction
from unified_rl.envs.language import ChainMod
from unified_rl.envs.language.verdict import Verdict
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.rollout import LanguageRollout

DISTILL: dict[str, Any] = {"name": "divergence", "kind": "reverse_kl", "anchor": "reference"}


class Easy(ChainMod):
    """Any answer with two different digits among its last three letters counts: some groups fail, some do not."""

    def _judge(self, problem: dict[str, Any], text: str, turn: int) -> Verdict:
        right = len({c for c in text[-3:] if c.isdigit()}) >= 2
        return Verdict(reward=float(right), correct=right)

    def respond(self, problems: Any, turns: Any, finished: Any) -> Any:
        return super().respond(problems, turns, torch.ones_like(finished))


def joined(seed: int = 0, **sources: Any) -> tuple[CausalLM, TensorDict]:
    env = ChainMod(modulus=5, terms=3)
    policy = CausalLM(**env.policy_inputs(), config=TINY, seed=1)
    rollout = LanguageRollout(
        env, policy, 1.0, stream(seed), stream(seed + 1), prompts=3, group_size=4, sources=sources
    )
    rows, _ = rollout.collect(0)
    own = rows["source"] == 0
    rows["reward"][own] = torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0])[:, None]
    return policy, rows


def dense(policy: CausalLM, rows: TensorDict) -> tuple[Tensor, Tensor]:
    """Log-probs of the whole vocabulary ``[B, N, V]``, shifted to the token they predict, and of the tokens."""
    logits = policy.model(input_ids=rows["tokens"]).logits.float()
    full = F.pad(logits.log_softmax(-1)[:, :-1], (0, 0, 1, 0))
    return full, full.gather(-1, rows["tokens"].unsqueeze(-1)).squeeze(-1)


def want(agent: PolicyGradient, loss: Tensor) -> dict[str, Tensor]:
    names = [name for name, _ in agent.optimizer.named]
    return dict(zip(names, torch.autograd.grad(loss, agent.optimizer.parameters), strict=True))


def agent_of(policy: Any, rows: TensorDict, correction: Any = "grpo", **options: Any) -> PolicyGradient:
    made = load_correction(correction) if isinstance(correction, str) else correction
    return PolicyGradient(policy, made, stream(), rows=len(rows), max_grad_norm=None, **options)


def both_splits(policy: Any, rows: TensorDict, correction: str = "grpo", prepare: Any = None, **options: Any) -> Any:
    """The gradient of the whole batch, checked against micro-batches of 5 rows."""
    found = []
    for micro_batch in (None, 5):
        agent = agent_of(copy.deepcopy(policy), rows, correction, micro_batch=micro_batch, **options)
        if prepare is not None:
            prepare(agent)
        found.append(gradients(agent, filled(rows, 1)))
    close(found[1], found[0])
    return found[0]
