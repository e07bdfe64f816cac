"""What a kernel may look at."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.correction.levels import CLAMP, Layout
from unified_rl.errors import ConfigError, RecordError
from unified_rl.units import HOW_TO_GET_BEHAVIOR

ANCHORS = {
    "behavior": "behavior_log_prob",
    "proximal": "proximal_log_prob",
    "reference": "reference_log_prob",
    "proxy": "proxy_log_prob",
    "teacher": "teacher_log_prob",
}
"""Anchor names and the record keys that hold their log-probs; the anchor ``none`` has no denominator."""

HOW_TO_GET = {
    "behavior": HOW_TO_GET_BEHAVIOR,
    "proximal": "score the batch with a proximal policy (a snapshot at the start of the update, an average of the "
    "weights, or interpolation by version), or set anchor=behavior to do without",
    "reference": "score the batch with the frozen reference policy",
    "proxy": "score the batch with the filtered old policy (drop improbable tokens, renormalise)",
    "teacher": "score the batch with the teacher policy",
}


BEYOND = 1e30
"""Larger than any score of a unit that counts, and still finite."""


def anchor_log_prob(batch: TensorDictBase, anchor: str) -> Tensor:
    """The log-probs of an anchor, ``[B, N]``.

    Raises:
        ConfigError: the anchor is unknown.
        RecordError: the batch lacks them (the message says which anchor it is and how to get them), or their shape is
            not that of the mask.
    """
    key = ANCHORS.get(anchor, f"{anchor}_log_prob")
    value: Tensor | None = batch.get(key, None)
    if value is None and anchor not in ANCHORS:
        known = ", ".join(ANCHORS)
        raise ConfigError(f"unknown anchor {anchor!r}: the batch has no {key}; known: none, {known}")
    if value is None:
        raise RecordError(
            f"this correction compares with the {anchor} policy, but the batch has no {key}: {HOW_TO_GET[anchor]}"
        )
    if value.shape != batch["mask"].shape:
        raise RecordError(f"{key} has shape {tuple(value.shape)}, but the mask is {tuple(batch['mask'].shape)}")
    return value


def difference(a: Tensor, b: Tensor) -> Tensor:
    """``a - b`` in at least float32."""
    return a - b if a.dtype in (torch.float32, torch.float64) else a.float() - b.float()


def share(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """1 where the mask is True, else 0; on a CPU this and a product take a fifth of ``masked_fill``'s time or less."""
    return mask.view(torch.uint8).to(dtype)


def safe(d: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Log-ratios fit for ``exp`` and where they count: 0 where masked or not finite, then clamped; both ``[B, N]``."""
    if all_finite(d):
        return (d * share(mask, d.dtype)).clamp_(-CLAMP, CLAMP), mask
    valid = mask & (d.abs() < torch.inf)
    return d.nan_to_num(0.0, 0.0, 0.0).mul_(share(valid, d.dtype)).clamp_(-CLAMP, CLAMP), valid


def all_finite(x: Tensor) -> bool:
    """Whether a tensor on the CPU is finite throughout, as its sum tells; elsewhere False, so that nothing waits."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return math.isfinite(float(x.sum()))


def masked(mask: Tensor, x: Tensor, fill: float = 0.0) -> Tensor:
    """``x`` in at least float32, ``fill`` (finite) where masked, whatever stands there."""
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    if not all_finite(x):
        return x.masked_fill(~mask, fill)
    kept = share(mask, x.dtype)
    return x * kept if fill == 0.0 else torch.add(x * kept, 1 - kept, alpha=fill)


def only(mask: Tensor, x: Tensor) -> Tensor:
    """``x``, which is finite everywhere, and 0 where masked."""
    return x * share(mask, x.dtype)


def passing(d: Tensor, mask: Tensor) -> Tensor:
    """1 where a :func:`safe` log-ratio follows the log-prob, 0 where it is masked or clamped, ``[B, N]``."""
    if d.device.type == "cpu" and not torch.compiler.is_compiling() and d.numel():
        low, high = d.aminmax()
        if max(-float(low), float(high)) < CLAMP:
            return share(mask, d.dtype)
    return share(mask & (d.abs() < CLAMP), d.dtype)


def narrow(x: Tensor) -> Tensor:
    """``[B, 1]`` of a tensor ``[B, N]`` that repeats one number a row; any other tensor itself."""
    return x[..., :1] if x.ndim and x.stride(-1) == 0 else x


def sum_all(x: Tensor) -> Tensor:
    """Sum of ``x [B, N]``: over rows in its own precision, then in float64."""
    return x.sum(-1).sum(dtype=torch.float64)


@dataclass
class View:
    """The detached quantities that a kernel turns into weights.

    Attributes:
        log_ratio: ``[B, N]`` float, log-ratio to the kernel's anchor at the chosen level.
        unit_log_ratio: ``[B, N]`` float, the same before the level.
        raw_log_prob: ``[B, N]``, of the current policy; anything where masked.
        advantage: ``[B, N]`` float; finite where masked.
        layout: the mask (``layout.mask [B, N]``), counts, positions and steps.
        batch: the record.
        stats: what ``prepare`` found (so far), one entry a row.
        anchor: of the log-ratios.
    """

    log_ratio: Tensor
    unit_log_ratio: Tensor
    raw_log_prob: Tensor
    advantage: Tensor
    layout: Layout
    batch: TensorDictBase
    stats: TensorDictBase | dict[str, Tensor]
    anchor: str
    _compared: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def mask(self) -> Tensor:
        """Masked-in units with finite log-probs, ``[B, N]`` bool."""
        return self.layout.mask

    @cached_property
    def log_prob(self) -> Tensor:
        """Of the current policy, 0 where masked, ``[B, N]``."""
        return masked(self.mask, self.raw_log_prob)

    @cached_property
    def ratio(self) -> Tensor:
        """``exp(log_ratio)``, ``[B, N]``."""
        return narrow(self.log_ratio).exp().expand_as(self.log_ratio)

    @cached_property
    def up(self) -> Tensor:
        """Whether A > 0, bool: ``[B, N]``, or ``[B, 1]`` where a row has one advantage."""
        return narrow(self.advantage) > 0

    def zeroed(self, above: Tensor, below: Tensor) -> Tensor:
        """The ratio, but 0 where ``above`` on units of A > 0 and where ``below`` on the others, ``[B, N]``."""
        return only(~((self.up & above) | (below & ~self.up)), self.ratio)

    def against(self, anchor: str) -> Tensor:
        """Unit log-ratio of the current policy to an anchor, ``[B, N]``, 0 where masked or not finite, clamped."""
        return self.compared(anchor)[0]

    def compared(self, anchor: str) -> tuple[Tensor, Tensor]:
        """Unit log-ratio to an anchor as of :meth:`against`, and where it is masked in and finite, ``[B, N]`` bool."""
        if anchor == self.anchor:
            return self.unit_log_ratio, self.mask
        if anchor not in self._compared:
            d = difference(self.raw_log_prob, anchor_log_prob(self.batch, anchor))
            self._compared[anchor] = safe(d, self.mask)
        return self._compared[anchor]

    def at(self, row: Tensor, column: Tensor) -> View:
        """Some of the units, as a view of shape ``[n]`` for kernels that look at each unit alone."""
        parts = (self.log_ratio, self.unit_log_ratio, self.raw_log_prob, self.advantage)
        d, unit, log_prob, advantage = (x[row, column] for x in parts)
        layout = Layout(self.mask[row, column], self.batch)
        return View(d, unit, log_prob, advantage, layout, self.batch, self.stats, self.anchor)

    def row(self, key: str) -> Tensor:
        """A statistic of ``prepare`` as ``[B, 1]``."""
        return self.stats[key].unsqueeze(-1)
