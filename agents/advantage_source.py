"""Where a policy gradient's advantages come from, and what is refused because nothing could be learnt from them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from tensordict import TensorDictBase

from unified_rl.agents.credits import CREDITS
from unified_rl.agents.rules import Rules
from unified_rl.correction import Correction
from unified_rl.correction.lookup import as_rule, bind
from unified_rl.correction.requirements import advantage_needs_group, without_groups
from unified_rl.errors import ConfigError
from unified_rl.instantiate import nearest
from unified_rl.objectives.objective import Term
from unified_rl.objectives.rows import Rows
from unified_rl.objectives.terms import OWN_ROWS
from unified_rl.ranges import shown

CREDIT_OF = {"step_advantage": "step", "cut_bootstrap": "cut"}
"""The credit that a preset asks for by the name of its ``wrapper``."""


NAMES_COLUMN = ("reward", "group", "given", "stratum", "weight")
"""Settings of ``correction.advantage`` that name an entry of the record."""


Credit = str | Mapping[str, Any]


def choose_credit(
    correction: Correction, advantage: str, credit: Credit | None, *, language: bool
) -> tuple[bool, Credit]:
    """Whether a critic is used, and what its advantages are given to.

    Args:
        correction: may want a credit of its own.
        advantage: auto, critic or group.
        credit: a name of :data:`~unified_rl.agents.credits.CREDITS`, or a mapping with its settings; None for the
            correction's.
        language: whether the policy is a language model.

    Raises:
        ConfigError: an unknown name or setting, credit without a critic, or one of answers in control.
    """
    if advantage not in ("auto", "critic", "group"):
        raise ConfigError(f"agent.advantage is {advantage!r}; it is one of auto, critic, group")
    check_credit(credit)
    name = correction.wrapper.get("name", "")
    chosen = credit or CREDIT_OF.get(name)
    wanted = None if chosen is None else as_rule(chosen, "agent.credit")["name"]
    critic = wants_critic(advantage, credit, name, language=language)
    if wanted is not None and not critic:
        raise ConfigError(
            f"correction {correction.name} with credit {wanted!r} takes its advantages from a critic; set "
            "agent.advantage=critic, or use correction=grpo for groups"
        )
    if wanted == "cut" and not language:
        raise ConfigError(
            f"correction {correction.name} is about answers that were cut by a token budget, whose successor nobody "
            "knows; control records hold it: use correction=ppo"
        )
    if wanted == "hierarchical" and not language:
        raise ConfigError(
            "agent.credit hierarchical reads the subgoals that an answer sets itself by marker texts, and actions have "
            "none: use agent.credit=unit"
        )
    return critic, wanted or "unit" if chosen is None or len(as_rule(chosen, "agent.credit")) == 1 else chosen


def check_credit(credit: Credit | None) -> None:
    """Refuses a credit that is unknown.

    Raises:
        ConfigError: names what there is, or the wrong setting.
    """
    if credit is None:
        return
    name = as_rule(credit, "agent.credit")["name"]
    if name not in CREDITS:
        where = "agent.credit" if isinstance(credit, str) else "agent.credit.name"
        raise ConfigError(f"{where} {shown(name)} is unknown; it is one of {', '.join(CREDITS)}")
    bind(credit, CREDITS, "agent.credit")


def heads_of(credit: Credit) -> int:
    """Values that a critic gives every unit."""
    return int(getattr(CREDITS[as_rule(credit, "agent.credit")["name"]], "heads", 1))


def wants_critic(advantage: str, credit: Credit | None, wrapper: str, *, language: bool) -> bool:
    """Whether advantages come from a critic; ``wrapper`` is the name that the correction's node gives."""
    wanted = credit or CREDIT_OF.get(wrapper)
    return advantage == "critic" or (advantage == "auto" and (not language or wanted is not None))


def check_unread(
    use_critic: bool,
    language: bool,
    *,
    critic_config: Mapping[str, Any] | None,
    drop_equal_groups: bool,
    baseline: str | None = None,
) -> None:
    """Refuses settings that the chosen advantages would leave unread.

    Args:
        use_critic: whether advantages come from a critic.
        language: whether the policy is a language model.
        critic_config: model of a critic of tokens.
        drop_equal_groups: whether groups without a gradient are left out.
        baseline: of ``correction.advantage``.

    Raises:
        ConfigError: a token critic's model without a token critic, or a filter of groups or a tracker where a critic is
            used.
    """
    if baseline == "tracker" and use_critic:
        raise ConfigError(
            "correction.advantage.baseline=tracker compares a row with the success rate of its prompt or start, and "
            "these advantages come from a critic: set agent.advantage=group"
        )
    if critic_config is not None and not use_critic:
        raise ConfigError("agent.critic_config is the model of a critic, and there is none: set agent.advantage=critic")
    if critic_config is not None and not language:
        raise ConfigError(
            "agent.critic_config is the model of a critic of tokens, and this one is of states: leave it out, and set "
            "agent.critic_hidden to the widths of its layers"
        )
    if drop_equal_groups and use_critic:
        raise ConfigError(
            "agent.drop_equal_groups leaves out groups without a gradient, and a critic's advantages have one in every "
            "row: set it to false, or set agent.advantage=group"
        )


def check_rows(record: TensorDictBase, terms: Mapping[str, Term], correction: Correction, use_critic: bool) -> None:
    """Refuses the rows of a first update from which the policy gradient would learn nothing.

    Raises:
        ConfigError: rows alone in their groups, or without the sources that the correction is about.
    """
    if "policy" not in terms:
        return
    check_groups(OWN_ROWS.chosen(record), correction, use_critic)
    rows = terms["policy"].rows
    if not rows.gates:  # gates open later
        correction.check_sources(rows.chosen(record))


def check_groups(record: TensorDictBase, correction: Correction, use_critic: bool) -> None:
    """Refuses rows that are all alone in their groups where advantages are relative to the group: all would be 0.

    Raises:
        ConfigError: they are; says what to set instead.
    """
    if len(record["group"].unique()) == len(record):
        refuse_lone(correction, use_critic)


def refuse_lone(correction: Correction, use_critic: bool) -> None:
    """Refuses rows of which none shares its group with another, where advantages are relative to the group.

    Raises:
        ConfigError: says what to set instead.
    """
    inside = without_groups(correction)
    outside = not correction.kernel.traits.own_advantage and not use_critic
    if not inside and not (outside and advantage_needs_group(correction)):
        return
    instead = f"correction={inside}" if inside else "agent.advantage=critic"
    raise ConfigError(
        f"correction {correction.name} measures a row against the others of its group, and every row is alone in its "
        f"own, so nothing would be learnt: sample several rows a prompt (rollout.group_size) or reset state "
        f"(rollout.starts), or use {instead}"
    )


def refuse_uncompared(terms: Mapping[str, Term], rules: Rules, correction: Correction, modelled: bool) -> None:
    """Refuses groups in a simulation where advantages come from a critic and nothing else could compare rows.

    Args:
        terms: of the loss.
        rules: of the rows of an update.
        correction: its kernel may make advantages of its own.
        modelled: rewards come from a model.

    Raises:
        ConfigError: says what to set instead.
    """
    compared = bool(rules.moving or rules.gates or modelled) or any(term.whole_groups for term in terms.values())
    if not (compared or correction.kernel.traits.own_advantage or without_groups(correction)):
        raise ConfigError(
            "rollout.starts says which rows are compared with each other, and nothing compares any: a critic values "
            "every step by itself; set agent.advantage=group, or leave rollout.starts out"
        )


def gates_read(terms: Mapping[str, Term], correction: Correction) -> dict[str, str]:
    """The bool columns by which rows are chosen, and the setting that names each."""
    chosen = {f"{term.where}.rows": term.rows for term in terms.values()}
    chosen["correction.advantage.rows"] = Rows.of(correction.advantage.get("rows"), "correction.advantage.rows")
    return {gate: where for where, rows in reversed(chosen.items()) for gate in rows.gates}


def check_gates(gates: Mapping[str, Any] | None, terms: Mapping[str, Term], correction: Correction) -> None:
    """Refuses a gate that nothing reads.

    Raises:
        ConfigError: names it, and what reads gates.
    """
    read = gates_read(terms, correction)
    for name in gates or ():
        if name not in read:
            raise ConfigError(
                f"agent.gates.{name} is set, but no term is read through it: take it out, or name it in when or unless "
                f"of a term's rows (agent.objectives.NAME.rows.when={name})"
            )


def check_columns(terms: Mapping[str, Term], rules: Rules, correction: Correction, columns: Collection[str]) -> None:
    """Refuses a choice of rows by a column that is no gate and that no row will have, and rules that need another.

    Args:
        terms: of the loss.
        rules: of the rows of an update.
        correction: may name columns too.
        columns: that rows are collected with; a mapping says how many numbers a row has in them, 0 where one alone.

    Raises:
        ConfigError: names the setting and the nearest column, or a collected column that the update writes itself.
    """
    for name in columns:
        if name in rules.taken:
            raise ConfigError(
                f"rollout.columns.{name}: the update itself writes {name!r} into its rows; choose another name"
            )
    widths = {name: width for name, width in columns.items() if width} if isinstance(columns, Mapping) else {}
    for column in rules.columns.values():
        column.check_widths(widths)
    columns = [*columns, *rules.columns]
    known = [*rules.gates, *columns]
    for gate, where in gates_read(terms, correction).items():
        if gate not in known:
            raise ConfigError(
                f"{where} names {gate!r}, which is no gate and no column of the rows; {nearest(gate, known)}: define "
                f"agent.gates.{gate}, or rollout.columns.{gate}"
            )
    for term in terms.values():
        term.check_columns(columns)
    for rule in rules.moving:
        for name in rule.columns:
            if name in columns:
                continue
            if name == "tokens":
                raise ConfigError(f"{rule.where} compares texts, and the rows of this run hold none: take it out")
            fix = "rollout.privileged" if name.startswith("privileged_") else f"rollout.columns.{name}"
            raise ConfigError(
                f"{rule.where} needs {name!r}, which is no column of the rows; {nearest(name, columns)}: set {fix}"
            )
    for number, penalty in enumerate(correction.penalties):
        if penalty.weight is not None and penalty.weight not in columns:
            raise ConfigError(
                f"correction.penalty.{number}.weight names {penalty.weight!r}, which is no column of the rows; "
                f"{nearest(penalty.weight, columns)}: define agent.columns.{penalty.weight}"
            )
    if correction.advantage.get("baseline") == "tracker" and "prompt_id" not in columns:
        raise ConfigError(
            "correction.advantage.baseline=tracker follows the success rate of every prompt_id, and rows of this run "
            "have none: in a simulation tell starts apart, rollout.starts={_target_: unified_rl.rollout.starts.Starts}"
        )
    for key in NAMES_COLUMN:
        named = correction.advantage.get(key)
        if named is not None and named not in (*columns, "units"):
            raise ConfigError(
                f"correction.advantage.{key} names {named!r}, which is no column of the rows; "
                f"{nearest(named, columns)}: define rollout.columns.{named} or agent.columns.{named}"
            )


def check_written_columns(
    rules: Rules, terms: Mapping[str, Term], correction: Correction, routes: Iterable[str] = ()
) -> None:
    """Refuses a column of the agent's that nothing reads.

    Args:
        rules: of the rows of an update, the columns among them.
        terms: of the loss.
        correction: may name columns too.
        routes: columns by which teachers are chosen.

    Raises:
        ConfigError: names it, and what reads columns.
    """
    read = {correction.advantage.get(key) for key in NAMES_COLUMN}
    read |= {penalty.weight for penalty in correction.penalties} | {*gates_read(terms, correction), *routes}
    read = read.union(*(rule.columns for rule in rules.moving), *(term.columns for term in terms.values()))
    for name in rules.columns:
        if name not in read:
            raise ConfigError(
                f"agent.columns.{name} is set, but nothing reads it: take it out, or name it in "
                f"correction.advantage.reward, in a penalty's weight, or in what else reads columns"
            )
