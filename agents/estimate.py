"""What is fixed before the first optimiser step: which rows count, what they are compared with, their advantages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.agents.baselines import CREDITS, Baseline, GroupBaseline
from unified_rl.correction.lookup import bind
from unified_rl.objectives.objective import Objective
from unified_rl.returns.gates import GATES
from unified_rl.returns.groups import Groups
from unified_rl.returns.maps import MAPS
from unified_rl.units import row_return


class CriticAdvantage:
    """Advantages and value targets from a critic; see :data:`~unified_rl.agents.baselines.CREDITS`."""

    def __init__(self, baseline: Baseline, credit: str, lam: float, off_policy: bool, normalize: bool) -> None:
        self.baseline, self.credit = baseline, CREDITS[credit]
        self.settings = (lam, off_policy, normalize)

    def __call__(self, record: TensorDict, log_prob: Callable[[], Tensor], weight: Tensor | None) -> Tensor:
        """Writes ``advantage``, ``value``, ``value_target`` and ``value_mask``; returns the first."""
        self.credit(record, self.baseline, *self.settings)
        return record["advantage"]

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the critic is the agent's."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class Estimate:
    """Drops, gates, anchors, advantages, maps: in this order, on the joined rows of one update.

    Args:
        policy, anchors, wrapper, objective: of the agent.
        advantage: ``(record, log_prob, weight) -> [B, T] or [B, N]``.
        drop_equal_groups: leave out rows of groups whose rewards are all equal.
        gates: bool columns by name.
        maps: of the advantages, in order.
    """

    def __init__(
        self,
        policy: Any,
        anchors: Any,
        wrapper: Any,
        objective: Objective,
        advantage: GroupBaseline | CriticAdvantage,
        drop_equal_groups: bool = False,
        gates: Mapping[str, Any] | None = None,
        maps: Sequence[Any] | None = None,
    ) -> None:
        self.policy, self.anchors, self.wrapper, self.objective = policy, anchors, wrapper, objective
        self.groups, self.drop_equal_groups = advantage, drop_equal_groups
        self.gates = {name: bind(node, GATES, "gate")[0] for name, node in (gates or {}).items()}
        self.maps = [bind(node, MAPS, "map")[0] for node in maps or ()]

    @torch.no_grad()
    def __call__(self, record: TensorDict, version: int, metrics: dict[str, Any]) -> TensorDict:
        """The rows that count, annotated."""
        total = row_return(record)
        metrics["train/reward"] = total.mean()
        if self.drop_equal_groups:
            groups = Groups.of(record)
            kept = groups.extreme(total, "amax") > groups.extreme(total, "amin")
            metrics["train/groups_kept"] = kept.float().mean()
            record = record[kept]
        for name, gate in self.gates.items() if len(record) else ():
            record[name] = gate(record)
        record = self._read_by_some_term(record)
        if not len(record):
            return record
        self.anchors.annotate(record, version)
        score = partial(self.anchors.chunked, self.policy, record)
        weight = self.wrapper.row_weight(record) if isinstance(self.groups, GroupBaseline) else None
        record["advantage"] = self.groups(record, score, weight)
        for reshape in self.maps:
            record["advantage"] = reshape(record, record["advantage"])
        metrics["train/zero_advantage"] = (record["advantage"] == 0).float().mean()
        return record

    def _read_by_some_term(self, record: TensorDict) -> TensorDict:
        """Without the rows that no term reads."""
        chosen = [term.rows for term in self.objective.active.values()]
        if any(rows.every for rows in chosen):
            return record
        if not chosen:  # every coefficient is 0 in this update
            return record[:0]
        return record[torch.stack([rows.of_record(record) for rows in chosen]).any(0)]

    def state_dict(self) -> dict[str, Any]:
        """Of the advantage."""
        return self.groups.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.groups.load_state_dict(state)
