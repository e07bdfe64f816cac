"""Rules whose numbers may move: each is a constant, a schedule over the run, or a controller that follows a metric."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tensordict import TensorDictBase

from unified_rl.correction.lookup import Table, as_rule, bind, settings_of
from unified_rl.errors import ConfigError
from unified_rl.instantiate import check_type
from unified_rl.objectives.coefficients import Observed, coefficient
from unified_rl.returns.groups import lone
from unified_rl.returns.readings import Read


class Moving:
    """A rule of a table with its settings, of which numbers may be given as a schedule or a controller.

    A rule may declare what it reads beside the record, as attributes of its function: ``anchors``, names of policies
    whose log-probs it wants, ``reads``, ``(**settings) -> {column: (logits [n, V], token [n]) -> [n]}``, and
    ``columns``, ``(**settings) -> [name]``, further entries of the record that it needs, and ``states``, whether it
    wants the last hidden state of every unit, :data:`~unified_rl.returns.readings.STATES`, and ``compares``,
    ``(**settings) -> bool``, whether it is about rows of one group, and ``misfit``, ``(widths, **settings) -> str``,
    what is wrong with settings beside entries of so many numbers a row, or None.

    Args:
        node: a name, or a mapping with ``name`` and settings; a mapping in place of a number, in a list too, is a
            coefficient, see :func:`~unified_rl.objectives.coefficients.coefficient`.
        table: the known rules.
        where: the full name of the setting.

    Raises:
        ConfigError: an unknown rule or setting, or one of the wrong type or range, under its full name.
    """

    def __init__(self, node: str | Mapping[str, Any], table: Table, where: str) -> None:
        rule = as_rule(node, where)
        self.where = where
        self.schedules = {key: coefficient(value, f"{where}.{key}") for key, value in _moving(rule).items()}
        self.given = {key: rule[key] for key in dict.fromkeys(key.partition(".")[0] for key in self.schedules)}
        self.rule, _ = bind({**rule, **self._present(0.0, 0)} if self.schedules else node, table, where)
        known = settings_of(self.rule.func)
        self.hints = {key: known[key].hint for key in self.given}
        self.defaults = {key: parameter.default for key, parameter in known.items()}
        self.anchors: tuple[str, ...] = getattr(self.rule.func, "anchors", ())
        self.states: bool = getattr(self.rule.func, "states", False)

    @property
    def settings(self) -> dict[str, Any]:
        """The present settings, defaults included."""
        return {**self.defaults, **self.rule.keywords}

    @property
    def reads(self) -> dict[str, Read]:
        """Columns ``[B, N]`` that it wants of every unit's distribution under the present weights."""
        declared = getattr(self.rule.func, "reads", None)
        return {} if declared is None else declared(**self.settings)

    @property
    def columns(self) -> list[str]:
        """Entries of the record that it needs beside those that every record has."""
        declared = getattr(self.rule.func, "columns", None)
        return [] if declared is None else declared(**self.settings)

    def check_widths(self, widths: Mapping[str, int]) -> None:
        """Looks at how many numbers rows have in entries, as far as that is known before any are collected.

        Raises:
            ConfigError: a setting does not fit them.
        """
        declared = getattr(self.rule.func, "misfit", None)
        told = None if declared is None else declared(widths, **self.settings)
        if told is not None:
            raise ConfigError(f"{self.where} {told}")

    @property
    def compares(self) -> bool:
        """Whether it does nothing where every row is alone in its group."""
        declared = getattr(self.rule.func, "compares", None)
        return declared is not None and bool(declared(**self.settings))

    def check_groups(self, record: TensorDictBase) -> None:
        """Looks for groups, where the rule compares their rows.

        Raises:
            ConfigError: every row is alone in its group.
        """
        if self.compares and lone(record["group"]):
            other = f", or set {self.where}.over=batch" if "over" in self.settings else ""
            raise ConfigError(
                f"{self.where} compares rows of one group, and every row is alone in its own: sample several rows a "
                f"prompt (rollout.group_size) or start (rollout.starts){other}"
            )

    @property
    def metrics(self) -> set[str]:
        """Names of the metrics that its controllers follow."""
        return {name for schedule in self._observed.values() for name in schedule.metrics}

    def start(self, progress: float, update: int) -> None:
        """At the start of an update: sets what moves.

        Raises:
            ConfigError: a value outside the setting's range.
        """
        for key, value in self._present(progress, update).items():
            self.rule.keywords[key] = check_type(value, self.hints[key], f"{self.where}.{key}")

    def _present(self, progress: float, update: int) -> dict[str, Any]:
        """The settings that move, as they are now."""
        now = {key: schedule(progress, update) for key, schedule in self.schedules.items()}
        return {
            key: [now.get(f"{key}.{at}", one) for at, one in enumerate(value)] if isinstance(value, list) else now[key]
            for key, value in self.given.items()
        }

    def __call__(self, *arguments: Any) -> Any:
        """The rule under the present settings."""
        return self.rule(*arguments)

    def finish(self, metrics: Mapping[str, Any], reported: Collection[str] = ()) -> None:
        """At the end of an update: controllers see its metrics."""
        for schedule in self._observed.values():
            schedule.observe(metrics, reported)

    def state_dict(self) -> dict[str, Any]:
        """Of the controllers."""
        return {key: schedule.state_dict() for key, schedule in self._observed.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        for key, schedule in self._observed.items():
            schedule.load_state_dict(state[key])

    @property
    def _observed(self) -> dict[str, Observed]:
        return {key: schedule for key, schedule in self.schedules.items() if isinstance(schedule, Observed)}


def _moving(rule: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The settings that are given as a coefficient, by name; those in a list as ``name.place``."""
    found = {key: value for key, value in rule.items() if isinstance(value, Mapping)}
    lists = {key: value for key, value in rule.items() if isinstance(value, list)}
    inside = {f"{k}.{at}": one for k, v in lists.items() for at, one in enumerate(v) if isinstance(one, Mapping)}
    return {**found, **inside}
