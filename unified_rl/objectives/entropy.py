"""Entropy regularisers of chosen units."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from unified_rl.correction.view import share
from unified_rl.errors import ConfigError
from unified_rl.instantiate import nearest
from unified_rl.objectives.forward import Forward, Reader
from unified_rl.objectives.metrics import Metrics
from unified_rl.objectives.objective import Scored
from unified_rl.objectives.supervised import DistributionTerm, highest
from unified_rl.objectives.terms import EntropyTerm
from unified_rl.policies.sampling import entropy_of, keep_top_p
from unified_rl.ranges import Fraction, Name, UnitInterval


class SelectiveEntropyTerm(DistributionTerm):
    """Entropy of the nucleus at each row's most uncertain units, held at what it was at first. SIREN, 2509.25133.

    ``(H - anchor)^2`` a row, a mean over rows: ``H`` is the mean over the row's ``peaks`` of the entropy of its most
    probable tokens, renormalised; the anchor is the mean of ``H`` in the run's first update, which has no such loss.

    Args:
        name, rows, coefficient: see :class:`~unified_rl.objectives.objective.Term`.
        top_p: probability that the nucleus reaches.
        peaks: share of a row's units, those of highest entropy; at least one.
    """

    scores = False
    couples_rows = True  # the first update's mean is held

    def __init__(
        self,
        name: str,
        *,
        top_p: Fraction = 0.8,
        peaks: UnitInterval = 0.2,
        rows: Any = None,
        coefficient: float | Mapping[str, Any] = 0.01,
    ) -> None:
        super().__init__(name, rows, coefficient, "sequence-mean-token-sum")
        self.top_p, self.peaks = top_p, peaks
        self.level: float | None = None
        self.reports = frozenset({f"loss/{name}", f"{name}/entropy"})
        self.readers = (
            Reader(f"{name}/nucleus", lambda logits, token: entropy_of(keep_top_p(logits, top_p))),
            Reader(f"{name}/entropy", lambda logits, token: entropy_of(logits.detach())),
        )

    def loss(self, forward: Forward, rows: TensorDict, stats: TensorDictBase) -> tuple[Tensor, Metrics]:
        """The mean over rows of the squared distance."""
        mask = self.rows.within(rows)["mask"]
        found, whole = (forward.read(f"{self.name}/{key}") for key in ("nucleus", "entropy"))
        peak = highest(whole, mask, self.peaks, least=1)
        mean = (found * share(peak, found.dtype)).sum(-1) / peak.sum(-1).clamp(min=1)
        scale = stats["coefficient"] * mask.any(-1)
        value = ((mean - (mean.detach() if self.level is None else self.level)).square() * scale).sum()
        shown = {f"loss/{self.name}": value.detach(), f"{self.name}/entropy": (mean.detach() * scale).sum()}
        return value, shown

    def finish(self, metrics: Metrics, reported: frozenset[str] = frozenset()) -> None:
        """Takes the first update's entropy as the anchor."""
        super().finish(metrics, reported)
        if self.level is None and f"{self.name}/entropy" in metrics:
            self.level = float(metrics[f"{self.name}/entropy"])

    def state_dict(self) -> dict[str, Any]:
        """The anchor, beside the coefficient's state."""
        return {**super().state_dict(), "level": self.level}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.level = state["level"]
        super().load_state_dict({key: value for key, value in state.items() if key != "level"})


class WeighedEntropyTerm(EntropyTerm):
    """The entropy of rows by a weight of each, as a bonus: ``sum_i w_i mean_t H_it`` over the number of rows. DSDR.

    Length says nothing: every row's entropy is a mean over its units. 2602.19895.

    Args:
        name, rows, coefficient: see :class:`~unified_rl.objectives.objective.Term`; the coefficient counts negatively.
        weight: entry ``[B]`` of the record.
    """

    couples_rows = True  # a weight may be made of other rows

    def __init__(
        self,
        name: str,
        *,
        weight: Name,
        rows: Any = None,
        coefficient: float | Mapping[str, Any] = 0.001,
    ) -> None:
        super().__init__(name, rows=rows, coefficient=coefficient)
        self.weight, self.columns = weight, frozenset({weight})
        self.reports = frozenset({f"loss/{name}"})

    def check_columns(self, columns: Collection[str]) -> None:
        """Looks for the weight.

        Raises:
            ConfigError: nothing writes it.
        """
        if self.weight not in columns:
            raise ConfigError(
                f"{self.where}.weight names {self.weight!r}, which is no column of the rows; "
                f"{nearest(self.weight, columns)}: define agent.columns.{self.weight}"
            )

    def prepare(self, batch: TensorDict, scored: Scored) -> TensorDictBase:
        """``coefficient [B]`` of every unit of a row."""
        mask = self._counted(batch)
        rows = mask.any(-1).sum().clamp(min=1)
        coefficient = batch[self.weight].float() / mask.sum(-1).clamp(min=1) / rows
        return TensorDict({"coefficient": coefficient}, batch_size=[len(batch)])

    def loss(self, forward: Forward, rows: TensorDict, stats: TensorDictBase) -> tuple[Tensor, Metrics]:
        """The micro-batch's share."""
        scale = share(self._counted(rows), torch.float32) * stats["coefficient"].unsqueeze(-1)
        value = (self.entropy(forward, rows) * scale).sum()
        return value, {f"loss/{self.name}": value.detach()}
