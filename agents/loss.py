"""From settings to the terms of a policy-gradient loss, and what is refused because it does not go together."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from unified_rl.agents.rules import Rules
from unified_rl.correction.lookup import as_rule, bind
from unified_rl.errors import ConfigError
from unified_rl.objectives.divergence import DivergenceTerm
from unified_rl.objectives.entropy import SelectiveEntropyTerm, WeighedEntropyTerm
from unified_rl.objectives.equivalence import EquivalenceTerm
from unified_rl.objectives.margin import MarginTerm
from unified_rl.objectives.moving import Moving
from unified_rl.objectives.objective import Objective, Parts, Term
from unified_rl.objectives.other_views import OtherViewsTerm
from unified_rl.objectives.preference import KtoTerm, PreferenceTerm, SetPreferenceTerm
from unified_rl.objectives.records import RecordGradients
from unified_rl.objectives.sampled import SampledDivergenceTerm
from unified_rl.objectives.supervised import RankAwareTerm, SelectiveNllTerm, SoftQTerm
from unified_rl.objectives.terms import EntropyTerm, NllTerm, PolicyGradientTerm, ValueTerm
from unified_rl.objectives.transport import TransportTerm
from unified_rl.objectives.triage import TriageTerm
from unified_rl.policies.sampling import HasSampling
from unified_rl.protocols import Trainable, standardises

Node = Mapping[str, Any]
TERMS: dict[str, type[Term]] = {
    "policy_gradient": PolicyGradientTerm,
    "value": ValueTerm,
    "entropy": EntropyTerm,
    "nll": NllTerm,
    "divergence": DivergenceTerm,
    "sampled_divergence": SampledDivergenceTerm,
    "preference": PreferenceTerm,
    "set_preference": SetPreferenceTerm,
    "equivalence": EquivalenceTerm,
    "kto": KtoTerm,
    "triage": TriageTerm,
    "selective_nll": SelectiveNllTerm,
    "rank_aware": RankAwareTerm,
    "transport": TransportTerm,
    "soft_q": SoftQTerm,
    "selective_entropy": SelectiveEntropyTerm,
    "weighed_entropy": WeighedEntropyTerm,
    "margin": MarginTerm,
    "other_views": OtherViewsTerm,
}
"""Terms by name; a subclass of :class:`~unified_rl.objectives.objective.Term` may also be named by its dotted path."""


def term_nodes(
    given: Mapping[str, Any] | None, value_coef: float | None, value_clip: float | None, entropy_coef: float
) -> dict[str, Node]:
    """The terms by name: those of the agent's own settings, and what ``agent.objectives`` adds, changes or takes out.

    Raises:
        ConfigError: a loss without a term, or a term without a kind.
    """
    nodes: dict[str, Any] = {"policy": {"name": "policy_gradient"}}
    if value_coef is not None:
        nodes["value"] = {"name": "value", "coefficient": value_coef, "clip": value_clip}
    if entropy_coef:
        nodes["entropy"] = {"name": "entropy", "coefficient": entropy_coef}
    for name, node in (given or {}).items():
        nodes[name] = None if node is None else _changed(nodes, name, node)
    nodes = {name: node for name, node in nodes.items() if node is not None}
    if not nodes:
        raise ConfigError("agent.objectives leaves no term in the loss")
    return nodes


def _changed(nodes: Mapping[str, Any], name: str, node: Any) -> Node:
    """A node that has a name, or only changes settings of one that has."""
    old, where = nodes.get(name), f"agent.objectives.{name}"
    if old is not None and isinstance(node, Mapping) and node.get("name", old["name"]) == old["name"]:
        return {**old, **node}
    if not isinstance(node, str | Mapping) or (isinstance(node, Mapping) and "name" not in node):
        close = difflib.get_close_matches(name, [*nodes, "value", "entropy"], 1)
        hint = f"did you mean agent.objectives.{close[0]}?" if close else f"it is none of {', '.join(nodes)}"
        raise ConfigError(f"{where} needs a name, one of {', '.join(TERMS)}; got {node!r} ({hint})")
    return as_rule(node, where)


def make_terms(
    given: Mapping[str, Any] | None, value_coef: float | None, value_clip: float | None, entropy_coef: float
) -> dict[str, Term]:
    """The terms by name, not yet attached to an agent; the arguments are those of :func:`term_nodes`.

    Raises:
        ConfigError: an unknown kind or setting, under the setting's full name, or something that is no term.
    """
    terms = {}
    for name, node in term_nodes(given, value_coef, value_clip, entropy_coef).items():
        term = bind(node, TERMS, f"agent.objectives.{name}")[0](name)
        if not isinstance(term, Term):
            raise ConfigError(f"agent.objectives.{name}: {type(term).__name__} is no subclass of Term")
        terms[name] = term
    return terms


def make_records(node: Node | None) -> RecordGradients | None:
    """What ``agent.per_record`` describes.

    Raises:
        ConfigError: an unknown or a wrong setting, under its full name.
    """
    if node is None:
        return None
    made: RecordGradients = bind({"name": "each", **node}, {"each": RecordGradients}, "agent.per_record")[0]()
    return made


def attached_records(
    node: Node | None, policy: Trainable, objective: Objective, rules: Rules, dropped: bool, split: bool
) -> RecordGradients | None:
    """What ``agent.per_record`` describes, beside the terms whose gradients it joins; None without it.

    Args:
        node: of the configuration.
        policy: that is trained.
        objective: the terms of the loss.
        rules: of the rows of an update.
        dropped: rows are left out by their groups.
        split: optimiser batches are of single steps.

    Raises:
        ConfigError: a wrong setting, or something that would let one record move the gradients of others.
    """
    objective.records = records = make_records(node)
    if records is None:
        return None
    records.check(objective.terms.values())
    compared = {"filters": rules.filters, "gates": rules.gates, "drop_equal_groups": dropped}
    given = [name for name, value in compared.items() if value]
    if given:
        raise ConfigError(f"agent.per_record bounds the gradient of each record, and agent.{given[0]} compares records")
    if split:
        raise ConfigError(
            "agent.per_record bounds the gradient of each row, and minibatches are of single steps: set "
            "agent.shuffle_steps=false"
        )
    if standardises(policy):
        raise ConfigError(
            "agent.per_record bounds the gradient of each record, and policy.normalize_observation learns from all of "
            "them without a bound: set it to false"
        )
    return records


def anchors_of(terms: Iterable[Term], rules: Iterable[Moving]) -> tuple[dict[str, str], dict[str, str]]:
    """Anchors whose log-probs, and whose whole distributions, are compared with; and the setting that does so."""
    log_probs = {anchor: term.where for term in terms for anchor in sorted(term.anchors)}
    for rule in rules:
        log_probs |= {anchor: rule.where for anchor in rule.anchors if anchor not in log_probs}
    return log_probs, {anchor: term.where for term in terms for anchor in sorted(term.distributions)}


def refuse_memory(policy: Trainable, distributions: Mapping[str, str]) -> None:
    """Refuses to compare whole distributions that depend on what came before: they are made from hidden states alone.

    Args:
        policy: that is trained.
        distributions: names of policies whose distributions are compared with, and the setting that does so.

    Raises:
        ConfigError: names both settings.
    """
    if distributions and isinstance(policy, HasSampling) and policy.sampling.remembers:
        raise ConfigError(
            f"{next(iter(distributions.values()))} compares whole distributions, which policy.repetition_penalty="
            f"{policy.sampling.repetition_penalty} makes depend on every earlier token: set "
            "policy.repetition_penalty=1, or use a penalty of the correction"
        )


def attach(terms: Mapping[str, Term], parts: Parts, *, compiled: bool, target_kl: float | None) -> None:
    """Gives every term the agent's parts, and refuses what excludes each other.

    Args:
        terms: by name.
        parts: of the agent.
        compiled: the policy's scoring function is compiled.
        target_kl: ends the epochs of an update.

    Raises:
        ConfigError: names the settings and what works.
    """
    for term in terms.values():
        term.attach(parts)
    readers = [term.where for term in terms.values() if term.readers]
    name, own = parts.correction.name, parts.correction.wrapper.get("name")
    if compiled and parts.wrapper.rescores:
        raise ConfigError(
            f"correction {name} scores units in its own way; set agent.compile and agent.cuda_graph to false"
        )
    if readers and parts.wrapper.rescores:
        raise ConfigError(
            f"{readers[0]} reads whole distributions in the policy's own pass, and correction {name} scores units in a "
            f"way of its own ({own}): take the term out, use correction=ppo, or set correction.wrapper=null"
        )
    if readers and compiled:
        raise ConfigError(
            f"{readers[0]} reads whole distributions, in a pass that is not compiled: set agent.compile and "
            "agent.cuda_graph to false"
        )
    if target_kl is not None and not any("update/kl" in term.reports for term in terms.values()):
        raise ConfigError(
            "agent.target_kl looks at update/kl, which the policy gradient reports, and agent.objectives holds none: "
            "set agent.target_kl=null"
        )
