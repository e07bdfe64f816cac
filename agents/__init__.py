"""Agents: one short file a family; each composes core parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if not __name__.startswith("unified_rl."):
    raise ImportError(f"import this package as unified_rl.{__name__}, not as {__name__}; run 'make install' first")

from unified_rl.lazy import lazy

if TYPE_CHECKING:
    from unified_rl.agents.actor_critic import ActorCritic
    from unified_rl.agents.behavior_cloning import BehaviorCloning
    from unified_rl.agents.policy_gradient import PolicyGradient
    from unified_rl.agents.sb3 import SB3Agent

__all__ = ["ActorCritic", "BehaviorCloning", "PolicyGradient", "SB3Agent"]

_FILES = {
    "ActorCritic": "actor_critic",
    "BehaviorCloning": "behavior_cloning",
    "PolicyGradient": "policy_gradient",
    "SB3Agent": "sb3",
}

__getattr__, __dir__ = lazy(__name__, {name: f"{__name__}.{file}" for name, file in _FILES.items()})
