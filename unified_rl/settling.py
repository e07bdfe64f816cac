"""What a choice of one setting does to others: two ways of one thing, and defaults that follow the policy.

Both happen when a run is composed, so that the resolved configuration shows them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from unified_rl.errors import ConfigError
from unified_rl.instantiate import is_node, locate, parameters


def keep_one_way(config: dict[str, Any], given: Collection[str], allow: Sequence[str] = ()) -> None:
    """Where the user names one of several ways of one thing, those that came with the option's file go.

    A class says which they are: ``alternatives = (("path", "config"),)``.

    Args:
        config: a composed configuration, changed in place.
        given: the keys that the user gave a value.
        allow: prefixes beside ``unified_rl`` that ``_target_`` may name.

    Raises:
        ConfigError: the user names two ways.
    """
    for group, node in config.items():
        if not is_node(node):
            continue
        for ways in getattr(locate(node["_target_"], allow, group), "alternatives", ()):
            named = [way for way in ways if any(f"{key}.".startswith(f"{group}.{way}.") for key in given)]
            if len(named) > 1:
                names = " and ".join(f"{group}.{way}" for way in named)
                raise ConfigError(f"{names} are two ways to say where the {group} comes from: give one of them")
            for way in ways if named else ():
                if way not in named:
                    node.pop(way, None)


BUDGETS = ("steps", "epochs", "updates")
"""The ways to say how long a run is."""


def keep_one_budget(config: dict[str, Any], given: Collection[str]) -> None:
    """Leaves one of :data:`BUDGETS` in a configuration: the user's, where files name another.

    Args:
        config: a composed configuration, changed in place.
        given: the keys that the user gave a value.

    Raises:
        ConfigError: two are named.
    """
    mine = [name for name in BUDGETS if name in given]
    named = mine or [name for name in BUDGETS if config.get(name) is not None]
    if len(named) > 1:
        said = " and ".join(f"{name}={config[name]}" for name in named)
        raise ConfigError(f"{said} both say how long the run is: give one of them")
    for name in BUDGETS if named else ():
        if name not in named:
            config.pop(name, None)


def suggest_rates(
    config: dict[str, Any], given: Collection[str], shipped: Collection[str], allow: Sequence[str] = ()
) -> None:
    """Learning rates that nobody set become those that the policy suggests for its weights, if it suggests any.

    Args:
        config: a composed configuration, changed in place.
        given: the keys that the user gave a value.
        shipped: groups whose option is one of this library: rates in its file give way.
        allow: prefixes beside ``unified_rl`` that ``_target_`` may name.
    """
    policy: Any = config.get("policy")
    agent: Any = config.get("agent")
    stage: Any = config.get("warm_start")
    suggest = getattr(locate(policy["_target_"], allow, "policy"), "learning_rates", None) if is_node(policy) else None
    rates: Mapping[str, float] | None = suggest(policy) if suggest else None
    if not rates:
        return
    if is_node(agent) and "lr" not in agent and _takes_rate(agent, allow):
        supervised = getattr(locate(agent["_target_"], allow), "supervised", False)
        agent["lr"] = rates["supervised" if supervised else "reinforcement"]
    critic = getattr(locate(agent["_target_"], allow), "trains_critic", None) if is_node(agent) else None
    fresh = rates.get("fresh")
    if critic is not None and fresh and "critic_lr" not in agent and critic(agent, config.get("correction")):
        agent["critic_lr"] = fresh
    if is_node(stage) and "warm_start" in shipped and _takes_rate(stage, allow):
        for number, one in enumerate([] if "warm_start.stages" in given else stage.get("stages") or []):
            if f"warm_start.stages.{number}.lr" not in given:
                one.pop("lr", None)
        if "warm_start.lr" not in given:
            stage["lr"] = rates["supervised"]


def _takes_rate(node: Mapping[str, Any], allow: Sequence[str]) -> bool:
    return "lr" in parameters(locate(node["_target_"], allow), allow)[0]
