"""What is fixed before the first optimiser step: which rows count, what they are compared with, their advantages."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.agents.advantage_source import Credit
from unified_rl.agents.baselines import Baseline, GroupBaseline, TokenBaseline
from unified_rl.agents.credits import CREDITS, check_hierarchy
from unified_rl.agents.modelled_reward import ModelledReward
from unified_rl.agents.reference_kl import ReferenceKl
from unified_rl.agents.rules import Rules, make_rules
from unified_rl.correction import Correction
from unified_rl.correction.lookup import bind
from unified_rl.errors import ConfigError
from unified_rl.instantiate import nearest
from unified_rl.objectives.moving import Moving
from unified_rl.objectives.objective import Objective, Parts
from unified_rl.objectives.rows import Rows
from unified_rl.objectives.terms import OWN_ROWS
from unified_rl.protocols import ShowsLogits, UnitStates
from unified_rl.returns.groups import Groups
from unified_rl.returns.readings import STATES
from unified_rl.units import COUNTED, row_return


class CriticAdvantage:
    """Advantages and value targets from a critic; see :data:`~unified_rl.agents.credits.CREDITS`.

    Args:
        baseline: the critic.
        credit: a name of ``CREDITS``, or a mapping with its settings.
        lam, off_policy, normalize: see there.
        rows: whose advantages are estimated (and standardised together); the critic does not learn from the others.
    """

    def __init__(
        self, baseline: Baseline, credit: Credit, lam: float, off_policy: bool, normalize: bool, rows: Any = None
    ) -> None:
        self.baseline, self.credit = baseline, bind(credit, CREDITS, "agent.credit")[0]
        check_hierarchy(self.credit, baseline, off_policy)
        self.by_token = isinstance(baseline, TokenBaseline) and credit != "step"
        self.settings = (lam, off_policy, normalize)
        self.rows = Rows.of(rows, "correction.advantage.rows")

    def __call__(self, record: TensorDict, log_prob: Callable[[], Tensor], weight: Tensor | None) -> Tensor:
        """Writes ``advantage``, ``value``, ``value_target`` and ``value_mask``; returns the first."""
        if self.rows.every:
            self.credit(record, self.baseline, *self.settings)
            whole: Tensor = record["advantage"]
            return whole
        at = self.rows.numbers(record)
        some = record[at if len(at) else slice(0, 1)]
        self.credit(some, self.baseline, *self.settings)
        for key in ("advantage", "value", "value_target", "value_mask"):
            found = some[key][: len(at)]
            record[key] = found.new_zeros(len(record), *found.shape[1:]).index_copy(0, at, found)
        out: Tensor = record["advantage"]
        return out

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the critic is the agent's."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class Estimate:
    """Rewards of a model, columns, drops, gates, anchors, advantages, maps, filters: on the joined rows of one update.

    Columns that other policies' log-probs are read for come behind the anchors, and are of the rows that are left.

    Args:
        parts, objective: of the agent.
        advantage: ``(record, log_prob, weight) -> [B, T] or [B, N]``.
        drop_equal_groups: leave out rows of groups whose rewards are all equal.
        rules: the gates, the columns, the maps and the filters.
        reference_kl: reported, and taken from the rewards where it stands there.
        reward_model: gives the rewards in place of the environment.
    """

    def __init__(
        self,
        parts: Parts,
        objective: Objective,
        advantage: GroupBaseline | CriticAdvantage,
        drop_equal_groups: bool = False,
        rules: Rules | None = None,
        reference_kl: ReferenceKl | None = None,
        reward_model: ModelledReward | None = None,
    ) -> None:
        self.reward_model = reward_model
        self.policy, self.anchors, self.wrapper, self.objective = parts.policy, parts.anchors, parts.wrapper, objective
        self.groups = advantage
        self.drop_equal_groups = drop_equal_groups
        self.rules = rules or make_rules({})
        self.late = self.rules.late
        self.reference_kl = reference_kl or ReferenceKl(0.0)
        for rule in self.rules.moving:
            if rule.reads and not isinstance(self.policy, ShowsLogits):
                raise ConfigError(
                    f"{rule.where} reads the distribution of every unit, and {type(self.policy).__name__} shows none: "
                    "use a policy of tokens or of action bins (policy=autoregressive)"
                )
            if rule.states and not isinstance(self.policy, UnitStates):
                raise ConfigError(
                    f"{rule.where} reads the hidden state of every unit, and {type(self.policy).__name__} shows none: "
                    "use a language model (policy=causal_lm)"
                )

    @property
    def followed(self) -> set[str]:
        """Names of the metrics that controllers of columns, maps and filters follow."""
        return set().union(*(rule.metrics for rule in self.rules.moving))

    def start(self, progress: float, update: int) -> None:
        """At the start of an update: sets the numbers of columns, maps and filters that move."""
        for rule in self.rules.moving:
            rule.start(progress, update)

    def finish(self, metrics: Mapping[str, Any], reported: Collection[str]) -> None:
        """At the end of an update: controllers see its metrics."""
        for rule in self.rules.moving:
            rule.finish(metrics, reported)

    @property
    def reports(self) -> set[str]:
        """Names of the metrics that it adds."""
        kl = {"kl/reference"} if self.reference_kl.coefficient else set()
        kept = {"train/groups_kept"} if self.drop_equal_groups else set()
        kept |= {"train/kept"} if self.rules.filters else set()
        own = {f"train/column/{name}" for name in self.rules.columns}
        kept |= set() if self.reward_model is None else self.reward_model.reports
        return {"train/reward", "train/zero_advantage", "train/counted", *kl, *kept, *own}

    @torch.no_grad()
    def __call__(self, record: TensorDict, version: int, metrics: dict[str, Any]) -> TensorDict:
        """The rows that count, annotated."""
        self._check_groups(record)  # of all rows: what is left out may leave one of every group
        if COUNTED in record.keys():  # first of all: left-out rows are in no group, statistic or denominator
            counted = record[COUNTED]
            metrics["train/counted"] = counted.float().mean()
            record = record if bool(counted.all()) else record[counted]
            if not len(record):
                return record
        metrics["train/reward"] = self._own(record, row_return(record)).mean()
        if self.reward_model is not None:
            self.reward_model(record, version, metrics)
        self._write_columns(record, metrics, late=False)
        if self.drop_equal_groups:
            groups, total = Groups.of(record), row_return(record)
            kept = groups.extreme(total, "amax") > groups.extreme(total, "amin")
            metrics["train/groups_kept"] = kept.float().mean()
            record = record[kept]
        if len(record):
            self._open_gates(record)
            record = self._read_by_some_term(record)
        if not len(record):
            return record
        self.objective.check(record)
        self.anchors.annotate(record, version)
        self.reference_kl(record, metrics, getattr(self.groups, "by_token", False))
        self._write_columns(record, metrics, late=True)
        score = partial(self.anchors.chunked, self.policy, record)
        weight = self.wrapper.row_weight(record) if isinstance(self.groups, GroupBaseline) else None
        record["advantage"] = self.groups(record, score, weight)
        self._read(record, [*self.rules.maps, *self.rules.filters])
        if any(rule.states for rule in self.rules.moving):
            record[STATES] = self.anchors.states(record)
        for reshape in self.rules.maps:
            record["advantage"] = _fitting(_applied(reshape, record, record["advantage"]), record, reshape.where)
        metrics["train/zero_advantage"] = (record["advantage"] == 0).float().mean()
        kept = self._filtered(record, metrics) if self.rules.filters else record
        return kept.exclude(STATES) if STATES in kept.keys() else kept

    def _check_groups(self, record: TensorDict) -> None:
        """What compares rows of a group looks for groups."""
        self.objective.check_groups(record)
        if self.reward_model is not None:
            self.reward_model.check_groups(record)
        for rule in [*self.rules.maps, *self.rules.filters]:
            rule.check_groups(record)

    def _read(self, record: TensorDict, rules: Sequence[Moving]) -> None:
        """Writes what rules read from every unit's distribution, under names of their own."""
        columns = {f"{rule.where}.{name}": read for rule in rules for name, read in rule.reads.items()}
        if columns:
            record.update(self.anchors.read(record, columns))

    def _write_columns(self, record: TensorDict, metrics: dict[str, Any], *, late: bool) -> None:
        """Writes the columns that need other policies, or those that do not."""
        for name, rule in self.rules.columns.items():
            if (name in self.late) is not late:
                continue
            if name in record.keys():
                raise ConfigError(f"{rule.where} would overwrite the record's own column; choose another name")
            self._read(record, [rule])
            found = _applied(rule, record)
            if not found.dtype.is_floating_point or found.shape != record.batch_size:
                shape = f"{found.dtype} {tuple(found.shape)}"
                raise ConfigError(f"{rule.where} must give one float a row, [{len(record)}]; it gave {shape}")
            record[name] = found
            metrics[f"train/column/{name}"] = self._own(record, found).mean()

    def _filtered(self, record: TensorDict, metrics: dict[str, Any]) -> TensorDict:
        """The rows and the units that every filter in turn keeps."""
        units = record["mask"].sum()
        for keeps in self.rules.filters:
            kept = _applied(keeps, record, record["advantage"])
            if kept.dtype != torch.bool or kept.shape not in (record.batch_size, record["mask"].shape):
                shape = f"{kept.dtype} {tuple(kept.shape)}"
                raise ConfigError(f"{keeps.where} must give one bool a row or a unit; it gave {shape}")
            if kept.ndim == 1:
                record = record[kept]
            else:
                record["mask"] = record["mask"] & kept
            if not len(record):
                break
        metrics["train/kept"] = record["mask"].sum() / units.clamp(min=1)
        return record

    @staticmethod
    def _own(record: TensorDict, total: Tensor) -> Tensor:
        """Returns of the policy's own rows, ``[b]``; of all where there are none: what others did is no progress."""
        if "source" not in record.keys():
            return total
        own = OWN_ROWS.of_record(record)
        return total[own] if bool(own.any()) else total

    def _open_gates(self, record: TensorDict) -> None:
        """Writes the gates' columns, and finds every column by which a term chooses rows."""
        for name, gate in self.rules.gates.items():
            if name in record.keys():
                raise ConfigError(f"agent.gates.{name} would overwrite the record's own column; choose another name")
            found = gate(record)
            if found.dtype != torch.bool or found.shape != record.batch_size:
                shape = f"{found.dtype} {tuple(found.shape)}"
                raise ConfigError(f"agent.gates.{name} must give one bool a row, [{len(record)}]; it gave {shape}")
            record[name] = found
        for term in self.objective.terms.values():
            for name in term.rows.gates:
                if name not in record.keys():
                    near = nearest(name, self.rules.gates)
                    raise ConfigError(
                        f"{term.where}.rows chooses by {name!r}, which neither agent.gates nor the record has; {near}"
                    )

    def _read_by_some_term(self, record: TensorDict) -> TensorDict:
        """Without the rows that no term reads."""
        chosen = [term.rows for term in self.objective.active.values()]
        if any(rows.every for rows in chosen):
            return record
        if not chosen:  # every coefficient is 0 in this update
            return record[:0]
        return record[torch.stack([rows.of_record(record) for rows in chosen]).any(0)]

    def state_dict(self) -> dict[str, Any]:
        """Of the advantage, and of the controllers of columns, maps and filters."""
        rules = {rule.where: state for rule in self.rules.moving if (state := rule.state_dict())}
        return {**self.groups.state_dict(), **({"rules": rules} if rules else {})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.groups.load_state_dict(state)
        for rule in self.rules.moving:
            if rule.where in state.get("rules", {}):
                rule.load_state_dict(state["rules"][rule.where])


def _applied(rule: Moving, record: TensorDict, *advantage: Tensor) -> Tensor:
    """What a rule makes of the record, with the columns in place that were read under its own settings."""
    for name in rule.reads:
        record[name] = record.pop(f"{rule.where}.{name}")
    out: Tensor = rule(record, *advantage)
    return out


def _fitting(mapped: Tensor, record: TensorDict, where: str) -> Tensor:
    if mapped.shape not in (record["advantage"].shape, record["mask"].shape):
        shapes = f"{tuple(record['advantage'].shape)} into {tuple(mapped.shape)}"
        raise ConfigError(f"{where} must keep the advantage's shape, or give one a unit; it turned {shapes}")
    return mapped


def make_advantage(
    correction: Correction,
    baseline: Baseline | None,
    credit: Credit,
    lam: float,
    off_policy: bool,
    normalize: bool | None,
) -> GroupBaseline | CriticAdvantage:
    """Advantages from a critic where there is one, else of rows against their groups.

    Args:
        correction: says how groups are compared, and whether a critic's advantages are standardised.
        baseline: the critic.
        credit, lam, off_policy: see :class:`~unified_rl.agents.policy_gradient.PolicyGradient`.
        normalize: standardise over the rows of an update; None is what the correction wants.
    """
    if baseline is None:
        return GroupBaseline(correction.advantage)
    whiten = bool(correction.wrapper.get("whiten", True)) if normalize is None else normalize
    return CriticAdvantage(baseline, credit, lam, off_policy, whiten, correction.advantage.get("rows"))
