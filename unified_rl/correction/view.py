"""What a kernel may look at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.correction.levels import CLAMP, Layout
from unified_rl.errors import ConfigError, RecordError

ANCHORS = {
    "behavior": "behavior_log_prob",
    "proximal": "proximal_log_prob",
    "reference": "reference_log_prob",
    "proxy": "proxy_log_prob",
    "teacher": "teacher_log_prob",
}
"""Anchor names and the record keys that hold their log-probs; the anchor ``none`` has no denominator."""

HOW_TO_GET = {
    "behavior": "store what the sampler reported when it acted; it can not be recomputed later",
    "proximal": "score the batch with a proximal policy (a snapshot at the start of the update, an average of the "
    "weights, or interpolation by version), or set anchor=behavior to do without",
    "reference": "score the batch with the frozen reference policy",
    "proxy": "score the batch with the filtered old policy (drop improbable tokens, renormalise)",
    "teacher": "score the batch with the teacher policy",
}


def anchor_log_prob(batch: TensorDictBase, anchor: str) -> Tensor:
    """The log-probs of an anchor, ``[B, N]``.

    Raises:
        ConfigError: the anchor is unknown.
        RecordError: the batch lacks them; the message says which anchor it is and how to get them.
    """
    key = ANCHORS.get(anchor)
    if key is None:
        raise ConfigError(f"unknown anchor {anchor!r}; known: none, {', '.join(ANCHORS)}")
    value = batch.get(key, None)
    if value is None:
        raise RecordError(
            f"this correction compares with the {anchor} policy, but the batch has no {key}: {HOW_TO_GET[anchor]}"
        )
    return value


def difference(a: Tensor, b: Tensor) -> Tensor:
    """``a - b`` in at least float32."""
    return a - b if a.dtype in (torch.float32, torch.float64) else a.float() - b.float()


def finite(d: Tensor) -> Tensor:
    """True where neither NaN nor infinite (cheaper than ``torch.isfinite`` on a CPU)."""
    return d.abs() < torch.inf


def safe(d: Tensor, mask: Tensor) -> Tensor:
    """Log-ratios fit for ``exp``: 0 where masked, then clamped."""
    return d.masked_fill(~mask, 0.0).clamp_(-CLAMP, CLAMP)  # on a CPU masked_fill takes a third of where's time


def masked(mask: Tensor, x: Tensor) -> Tensor:
    """``x`` in at least float32, 0 where masked; differentiable, and garbage there gets no gradient."""
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return x.masked_fill(~mask, 0.0)


@dataclass
class View:
    """The detached quantities that a kernel turns into weights.

    Attributes:
        log_ratio: ``[B, N]`` float, log-ratio to the kernel's anchor at the chosen level.
        unit_log_ratio: ``[B, N]`` float, the same before the level.
        log_prob: ``[B, N]`` float, of the current policy; 0 where masked.
        advantage: ``[B, N]`` float; anything where masked.
        layout: the mask (``layout.mask [B, N]``), counts, positions and steps.
        batch: the record.
        stats: what ``prepare`` found (so far), one entry a row.
        anchor: of the log-ratios.
    """

    log_ratio: Tensor
    unit_log_ratio: Tensor
    log_prob: Tensor
    advantage: Tensor
    layout: Layout
    batch: TensorDictBase
    stats: TensorDictBase | dict[str, Tensor]
    anchor: str

    @property
    def mask(self) -> Tensor:
        """Masked-in units with finite log-probs, ``[B, N]`` bool."""
        return self.layout.mask

    @cached_property
    def ratio(self) -> Tensor:
        """``exp(log_ratio)``, ``[B, N]``."""
        return self.log_ratio.exp()

    @cached_property
    def up(self) -> Tensor:
        """Whether A > 0, ``[B, N]`` bool."""
        return self.advantage > 0

    def zeroed(self, above: Tensor, below: Tensor) -> Tensor:
        """The ratio, but 0 where ``above`` on units of A > 0 and where ``below`` on the others, ``[B, N]``."""
        return self.ratio.masked_fill((self.up & above) | (below & ~self.up), 0.0)

    def against(self, anchor: str) -> Tensor:
        """Unit log-ratio of the current policy to an anchor, ``[B, N]``, 0 where masked, clamped."""
        if anchor == self.anchor:
            return self.unit_log_ratio
        d = difference(self.log_prob, anchor_log_prob(self.batch, anchor))
        return safe(d, self.mask & finite(d))

    def row(self, key: str) -> Tensor:
        """A statistic of ``prepare`` as ``[B, 1]``."""
        return self.stats[key].unsqueeze(-1)
