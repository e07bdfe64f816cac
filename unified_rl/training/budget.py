"""How long a run is: in ``steps``, or in ``epochs`` or ``updates``, which come to a number of steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from unified_rl.errors import ConfigError
from unified_rl.protocols import HasPools
from unified_rl.rollout import ControlRollout, DemonstrationRollout, LanguageRollout
from unified_rl.settling import BUDGETS

Default = Callable[[str, str], Any]
"""From a group and a key to what the configuration or the signature says."""


def open_budget(cfg: Mapping[str, Any]) -> str | None:
    """``epochs`` or ``updates`` where a configuration gives the one and does not know its steps yet, else None."""
    if cfg.get("steps") is not None:
        return None
    return next((name for name in BUDGETS if cfg.get(name) is not None), None)


def steps_of(name: str, amount: float, env: Any, target: Any, default: Default) -> int:
    """The steps that a number of epochs or updates comes to.

    Args:
        name: ``epochs`` or ``updates``.
        amount: how many.
        env: the environment.
        target: the class of the rollout; None where the agent collects by itself.
        default: settings of the rollout.

    Raises:
        ConfigError: nothing says how many steps an update has, or the run has no epochs; names what works.
    """
    per_update = _of_update(name, amount, env, target, default)
    if name == "updates":
        return int(amount) * per_update
    problems, drawn = _of_epoch(amount, env, target, default)
    if getattr(env, "drop_last", False):
        return math.ceil(round(amount * (problems // drawn), 6)) * per_update
    return math.ceil(round(amount * problems / drawn, 6)) * per_update


def _of_update(name: str, amount: float, env: Any, target: Any, default: Default) -> int:
    """Steps of one update."""
    if target is None:
        raise ConfigError(f"{name}={amount:g} needs a rollout, and this agent collects by itself: set steps")
    if issubclass(target, LanguageRollout):
        return int(default("rollout", "prompts") * default("rollout", "group_size"))
    if issubclass(target, DemonstrationRollout):
        return int(default("rollout", "rows"))
    if issubclass(target, ControlRollout):
        return int(default("rollout", "horizon") * env.num_envs * getattr(env, "steps_per_action", 1))
    raise ConfigError(f"{name}={amount:g}, but nobody knows how many steps {target.__name__} collects: set steps")


def _of_epoch(amount: float, env: Any, target: Any, default: Default) -> tuple[int, int]:
    """Problems of an epoch, and how many of them an update draws.

    Raises:
        ConfigError: the run has none.
    """
    instead = "set steps or updates"
    if env.domain == "control":
        raise ConfigError(f"epochs={amount:g} counts visits of training prompts, and control has none: {instead}")
    if not isinstance(env, HasPools):
        raise ConfigError(
            f"epochs={amount:g} counts visits of training prompts, and {type(env).__name__} makes new ones without "
            f"end: {instead}"
        )
    if issubclass(target, LanguageRollout):
        pool, drawn = "train", "prompts"
    elif default("rollout", "data") is None:
        pool, drawn = "demonstration", "rows"
    else:
        raise ConfigError(f"epochs={amount:g}, but rows of rollout.data are drawn at random: {instead}")
    return env.pool_sizes()[pool], int(default("rollout", drawn))
