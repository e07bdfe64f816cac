"""Entropy regularisers of chosen units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from unified_rl.correction.view import share
from unified_rl.objectives.forward import Forward, Reader
from unified_rl.objectives.metrics import Metrics
from unified_rl.objectives.supervised import DistributionTerm, highest
from unified_rl.policies.sampling import entropy_of, keep_top_p
from unified_rl.ranges import Fraction, UnitInterval


class SelectiveEntropyTerm(DistributionTerm):
    """Entropy of the nucleus at each row's most uncertain units, held at what it was at first. SIREN, 2509.25133.

    ``(H - anchor)^2`` a row, a mean over rows: ``H`` is the mean over the row's ``peaks`` of the entropy of its most
    probable tokens, renormalised; the anchor is the mean of ``H`` in the run's first update, which has no such loss.

    Args:
        name, rows, coefficient: see :class:`~unified_rl.objectives.objective.Term`.
        top_p: probability that the nucleus reaches.
        peaks: share of a row's units, those of highest entropy; at least one.
    """

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
