"""From settings to the terms of a policy-gradient loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from unified_rl.correction.lookup import as_rule, bind
from unified_rl.errors import ConfigError
from unified_rl.instantiate import nearest
from unified_rl.objectives.divergence import DivergenceTerm
from unified_rl.objectives.objective import Term
from unified_rl.objectives.preference import PreferenceTerm
from unified_rl.objectives.terms import EntropyTerm, NllTerm, PolicyGradientTerm, ValueTerm

Node = Mapping[str, Any]
ANCHOR = "teacher"
TERMS: dict[str, type[Term]] = {
    "policy_gradient": PolicyGradientTerm,
    "value": ValueTerm,
    "entropy": EntropyTerm,
    "nll": NllTerm,
    "divergence": DivergenceTerm,
    "preference": PreferenceTerm,
}


def term_nodes(
    given: Mapping[str, Any] | None, value_coef: float | None, value_clip: float | None, entropy_coef: float
) -> dict[str, dict[str, Any]]:
    """The terms by name: those of the agent's own settings, and what ``agent.objectives`` adds, changes or takes out.

    Raises:
        ConfigError: a loss without a term, or of an unknown kind.
    """
    nodes: dict[str, Any] = {"policy": {"name": "policy_gradient"}}
    if value_coef is not None:
        nodes["value"] = {"name": "value", "coefficient": value_coef, "clip": value_clip}
    if entropy_coef:
        nodes["entropy"] = {"name": "entropy", "coefficient": entropy_coef}
    for name, node in (given or {}).items():
        nodes[name] = None if node is None else {**(nodes.get(name) or {}), **as_rule_or_change(node, nodes.get(name))}
    nodes = {name: node for name, node in nodes.items() if node is not None}
    if not nodes:
        raise ConfigError("agent.objectives leaves no term in the loss")
    for name, node in nodes.items():
        if node["name"] not in TERMS:
            raise ConfigError(
                f"agent.objectives.{name}.name {node['name']!r} is unknown; {nearest(node['name'], TERMS)}"
            )
    return nodes


def as_rule_or_change(node: Any, old: Node | None) -> dict[str, Any]:
    """A node that has a name, or only changes settings of one that has."""
    return dict(node) if old is not None and isinstance(node, Mapping) else as_rule(node, "an objective")


def anchors_of(nodes: Mapping[str, Node]) -> tuple[frozenset[str], frozenset[str]]:
    """Anchors whose log-probs, and whose whole distributions, the terms compare with."""
    log_probs = frozenset().union(*(TERMS[node["name"]].anchors for node in nodes.values()))
    policies = frozenset(node.get("anchor", ANCHOR) for node in nodes.values() if node["name"] == "divergence")
    return log_probs, policies


def make_term(name: str, node: Node, agent: Any) -> Term:
    """The term that a node describes, given the parts of an agent that it works on."""
    parts: dict[str, Callable[[], tuple[Any, ...]]] = {
        "policy_gradient": lambda: (agent.correction, agent.wrapper, agent.anchors),
        "value": lambda: (lambda rows: agent.baseline.values(rows)[0],),
        "entropy": lambda: (agent.policy,),
        "divergence": lambda: (agent.anchors.policies[node.get("anchor", ANCHOR)], name),
    }
    made, _ = bind(node, TERMS, f"agent.objectives.{name}", ["anchor"])
    return made(*parts.get(node["name"], tuple)())
