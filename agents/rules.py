"""Rules of an update's rows: gates, columns, maps and filters, from settings and before there is a policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tensordict import TensorDict
from torch import Tensor

from unified_rl.correction.lookup import bind
from unified_rl.errors import ConfigError
from unified_rl.objectives.moving import Moving
from unified_rl.returns.columns import COLUMNS
from unified_rl.returns.filters import FILTERS
from unified_rl.returns.gates import GATES
from unified_rl.returns.maps import MAPS
from unified_rl.returns.readings import STATES

WRITTEN = frozenset({
    "advantage", "value", "value_target", "value_mask", "unit_reward", "score_norm", "old_support", "old_mean",
    "old_log_std", STATES,
})  # fmt: skip
"""Entries that the update itself writes, beside the log-probs of other policies, ``{name}_log_prob``."""


class Rules(NamedTuple):
    """What writes into the rows of an update, and chooses among them.

    Attributes:
        gates: bool columns by name.
        columns: numbers of rows by name.
        maps: of the advantages, in order.
        filters: by the advantages, in order.
    """

    gates: Mapping[str, Callable[[TensorDict], Tensor]]
    columns: Mapping[str, Moving]
    maps: Sequence[Moving]
    filters: Sequence[Moving]

    @property
    def moving(self) -> list[Moving]:
        """The columns, the maps and the filters, in their order."""
        return [*self.columns.values(), *self.maps, *self.filters]

    @property
    def late(self) -> set[str]:
        """Names of the columns that other policies' log-probs or distributions are read for; of their readers too."""
        late: set[str] = set()
        for name, rule in self.columns.items():
            if rule.anchors or rule.reads or late.intersection(rule.columns):
                late.add(name)
        return late

    @property
    def taken(self) -> set[str]:
        """Names of entries that the update writes, and that no row may come with."""
        return {*WRITTEN, *(name for rule in self.moving for name in rule.reads)}


def make_rules(settings: Mapping[str, Any]) -> Rules:
    """The rules that ``gates``, ``columns``, ``maps`` and ``filters`` of an agent describe.

    Raises:
        ConfigError: an unknown rule or setting, under its full name, a column that reads another before it is written,
            or a name that the update writes under.
    """
    maps, filters = (
        [Moving(node, table, f"agent.{key}[{number}]") for number, node in enumerate(settings.get(key) or ())]
        for key, table in (("maps", MAPS), ("filters", FILTERS))
    )
    gates = {name: bind(node, GATES, f"agent.gates.{name}")[0] for name, node in (settings.get("gates") or {}).items()}
    made = Rules(gates, _made_columns(settings.get("columns") or {}), maps, filters)
    for kind, names in (("gates", made.gates), ("columns", made.columns)):
        for name in names:
            if name in made.taken or name.endswith("_log_prob"):
                raise ConfigError(
                    f"agent.{kind}.{name}: the update itself writes {name!r} into its rows; choose another name"
                )
            if kind == "columns" and name in made.gates:
                raise ConfigError(f"agent.columns.{name} and agent.gates.{name} are one entry; choose another name")
    return made


def _made_columns(nodes: Mapping[str, Any]) -> dict[str, Moving]:
    """The columns by name.

    Raises:
        ConfigError: see :func:`make_rules`.
    """
    made: dict[str, Moving] = {}
    for name, node in nodes.items():
        made[name] = Moving(node, COLUMNS, f"agent.columns.{name}")
        made[name].check_widths({})
        early = [other for other in made[name].columns if other in nodes and (other == name or other not in made)]
        if early:
            raise ConfigError(
                f"agent.columns.{name} reads {early[0]!r}, and columns are written in their order: define "
                f"agent.columns.{early[0]} before it, under another name than its own"
            )
    return made
