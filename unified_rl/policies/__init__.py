"""Policies and critics of every class; anything with sample, log_prob and nll."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unified_rl.lazy import lazy

if TYPE_CHECKING:
    from unified_rl.policies.autoregressive import AutoregressivePolicy
    from unified_rl.policies.base import Policy
    from unified_rl.policies.causal_lm import CausalLM
    from unified_rl.policies.critics import QEnsemble, ValueCritic
    from unified_rl.policies.diffusion import DiffusionPolicy
    from unified_rl.policies.flow import FlowPolicy
    from unified_rl.policies.gaussian import GaussianPolicy
    from unified_rl.policies.token_critic import TokenCritic

__all__ = [
    "AutoregressivePolicy",
    "CausalLM",
    "DiffusionPolicy",
    "FlowPolicy",
    "GaussianPolicy",
    "Policy",
    "QEnsemble",
    "TokenCritic",
    "ValueCritic",
]

_FILES = {
    "AutoregressivePolicy": "autoregressive",
    "CausalLM": "causal_lm",
    "DiffusionPolicy": "diffusion",
    "FlowPolicy": "flow",
    "GaussianPolicy": "gaussian",
    "Policy": "base",
    "QEnsemble": "critics",
    "TokenCritic": "token_critic",
    "ValueCritic": "critics",
}

__getattr__, __dir__ = lazy(__name__, {name: f"{__name__}.{file}" for name, file in _FILES.items()})
