"""The record: what a batch of experience is, in either domain.

A **unit** is the smallest thing a policy samples and can put a log-probability on (a token, a denoising step, an action
dimension, a whole Gaussian action). A **step** is one exchange with the environment. A **row** is a trajectory or a
piece of one. A **group** is the set of rows that share a prompt or a reset state.

A batch is a :class:`~tensordict.TensorDict` of ``B`` rows, each with ``N`` units in time order and ``T`` steps. Keys
are flat, log-probs are float32, masks are bool, indices are int64 (see :data:`UNIT_KEYS` and :data:`STEP_KEYS`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from unified_rl.errors import RecordError

UNIT_KEYS: dict[str, torch.dtype] = {
    "behavior_log_prob": torch.float32,
    "proximal_log_prob": torch.float32,
    "reference_log_prob": torch.float32,
    "mask": torch.bool,
    "step_index": torch.int64,
    "policy_version": torch.int64,
}
"""Keys of shape ``[B, N]`` and their dtypes."""

STEP_KEYS: dict[str, torch.dtype] = {
    "reward": torch.float32,
    "discount": torch.float32,
    "step_mask": torch.bool,
    "terminated": torch.bool,
    "truncated": torch.bool,
    "episode": torch.int64,
}
"""Keys of shape ``[B, T]`` and their dtypes."""

ROW_KEYS: dict[str, torch.dtype] = {"group": torch.int64, "source": torch.int64, "prompt_id": torch.int64}
"""Keys of shape ``[B]`` and their dtypes. ``prompt_id`` says what a row begins with: a prompt, or a reset state."""

COUNTED = "counted"
"""Optional key ``[B]`` bool: rows where it is False take part in no update, no group and no denominator."""

NOBODY = -1
"""The ``policy_version`` of units that no version of the policy sampled by itself."""

MARKS = "marks"
"""Optional key ``[B, N]`` int64: 1 on units of a right part of an answer, -1 of a wrong one, 0 elsewhere."""

REQUIRED_KEYS = ("behavior_log_prob", "mask", "step_index", "reward", "policy_version")
"""What every record holds, whatever the domain."""

HOW_TO_GET_BEHAVIOR = "store what the sampler reported when it acted; it can not be recomputed later"
"""For errors about missing behavior log-probs."""


class Source(IntEnum):
    """Where a row came from."""

    ONLINE = 0
    OFFLINE = 1
    DEMONSTRATION = 2
    EXPERT = 3
    INTERVENTION = 4


EXPERTS = (Source.DEMONSTRATION, Source.EXPERT)
"""Rows that somebody else wrote, of whose probability nobody knows."""


@dataclass(frozen=True)
class UnitLogProb:
    """Log-probabilities of the units of a batch.

    Attributes:
        log_prob: ``[B, N]`` float, with gradient unless computed without one.
        mask: ``[B, N]`` bool, the policy's own learnable units.
        exact: False where the ratio of two such log-probs is not an exact importance weight of the executed action
            (for example one stochastic step before a deterministic suffix); long replay and off-policy evaluation
            then refuse it.
    """

    log_prob: Tensor
    mask: Tensor
    exact: bool = True


class Steps:
    """Reduces units to steps and broadcasts steps back to units.

    Args:
        step_index: ``[B, N]`` int64, non-decreasing within a row; padding repeats the last index.
        mask: ``[B, N]`` bool; only masked-in units take part in reductions.
        num_steps: ``T``, taken from the shape of the reward, never from ``step_index.max() + 1``.
        units_per_step: ``K`` where every step has exactly K consecutive units (then everything is a reshape).

    Raises:
        RecordError: if ``units_per_step * num_steps`` is not ``N``, or shapes disagree.
    """

    def __init__(self, step_index: Tensor, mask: Tensor, num_steps: int, units_per_step: int | None = None) -> None:
        if step_index.shape != mask.shape:
            raise RecordError(f"step_index {tuple(step_index.shape)} and mask {tuple(mask.shape)} differ in shape")
        if units_per_step is not None and units_per_step * num_steps != step_index.shape[-1]:
            raise RecordError(
                f"{num_steps} steps of {units_per_step} units are not the {step_index.shape[-1]} units of this batch"
            )
        self.step_index = step_index
        self.mask = mask
        self.num_steps = num_steps
        self.units_per_step = units_per_step

    @classmethod
    def of(cls, batch: TensorDictBase) -> Steps:
        """The steps of a record (uses the keys ``step_index``, ``mask`` and ``reward``)."""
        num_steps = batch["reward"].shape[-1]
        width = batch["step_index"].shape[-1]
        regular = width == num_steps  # the cheap case that needs no look at the values: one unit a step
        if regular:
            regular = bool((batch["step_index"] == torch.arange(num_steps, device=batch["step_index"].device)).all())
        return cls(batch["step_index"], batch["mask"], num_steps, 1 if regular else None)

    def sum(self, x: Tensor) -> Tensor:
        """Sum of ``x [B, N]`` over the masked-in units of each step, ``[B, T]``; masked units may hold NaN."""
        kept = torch.where(self.mask, x, torch.zeros_like(x))
        if self.units_per_step is not None:
            return kept.reshape(*kept.shape[:-1], self.num_steps, self.units_per_step).sum(-1)
        out = kept.new_zeros(*kept.shape[:-1], self.num_steps)
        return out.scatter_add(-1, self.step_index, kept)

    def count(self) -> Tensor:
        """Number of masked-in units of each step, ``[B, T]`` float32."""
        return self.sum(torch.ones_like(self.mask, dtype=torch.float32))

    def mean(self, x: Tensor) -> Tensor:
        """Mean of ``x [B, N]`` over the masked-in units of each step, ``[B, T]``; 0 where a step has none."""
        return self.sum(x) / self.count().clamp(min=1).to(x.dtype)

    def broadcast(self, y: Tensor) -> Tensor:
        """Each unit's step value: ``y [B, T]`` to ``[B, N]``. Units outside the mask get a value too."""
        if self.units_per_step is not None:
            return y.repeat_interleave(self.units_per_step, -1) if self.units_per_step > 1 else y
        return y.gather(-1, self.step_index)


def of_units(record: TensorDictBase, advantage: Tensor) -> Tensor:
    """Advantages of units ``[B, N]``, from those of steps ``[B, T]`` or of units."""
    return advantage if advantage.shape == record["mask"].shape else Steps.of(record).broadcast(advantage)


def numbered(text: str) -> int:
    """A number for a text, the same everywhere, for columns of a record; from 0."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") >> 1


def record_from_steps(segment: TensorDictBase) -> TensorDict:
    """Turns control segments of transitions into a record of units.

    Args:
        segment: batch size ``[B, T]`` of transitions, with ``behavior_log_prob [B, T, U]`` and optionally
            ``unit_mask [B, T, U]``, ``proximal_log_prob``, ``reference_log_prob``, ``step_mask [B, T]``,
            ``policy_version [B, T]``, ``group [B, T]``, ``source [B, T]``, ``prompt_id [B, T]``.

    Returns:
        A TensorDict of batch size ``[B]`` in which unit keys are ``[B, T * U]``, step keys stay ``[B, T]``, and
        ``group``, ``source`` and ``prompt_id`` become ``[B]`` (those of the first step).

    Raises:
        RecordError: if ``behavior_log_prob`` is missing or not ``[B, T, U]``.
    """
    log_prob = segment.get("behavior_log_prob", None)
    if log_prob is None:
        raise RecordError(f"the segment has no behavior_log_prob: {HOW_TO_GET_BEHAVIOR}")
    if log_prob.ndim != 3:
        raise RecordError(f"behavior_log_prob of a segment must be [B, T, U], got {tuple(log_prob.shape)}")
    rows, steps, units = log_prob.shape
    device = log_prob.device
    step_mask = segment.get("step_mask", None)
    if step_mask is None:
        step_mask = torch.ones(rows, steps, dtype=torch.bool, device=device)
    mask = step_mask.unsqueeze(-1).expand(rows, steps, units)
    unit_mask = segment.get("unit_mask", None)
    if unit_mask is not None:
        mask = mask & unit_mask
    items: dict[str, Any] = {k: v for k, v in segment.items() if k not in ("unit_mask", *ROW_KEYS)}
    for key in ("behavior_log_prob", "proximal_log_prob", "reference_log_prob"):
        if key in items:
            items[key] = items[key].reshape(rows, steps * units)
    items["mask"] = mask.reshape(rows, steps * units)
    items["step_mask"] = step_mask
    index = torch.arange(steps, device=device).repeat_interleave(units)
    items["step_index"] = index.expand(rows, -1)
    if "policy_version" in items:
        items["policy_version"] = items["policy_version"].repeat_interleave(units, -1)
    for key in ROW_KEYS:
        if key in segment.keys():
            items[key] = segment[key][:, 0]
    return TensorDict(items, batch_size=[rows], device=segment.device)


def validate_record(batch: TensorDictBase, *, current_version: int | None = None, discrete: bool = False) -> None:
    """Checks a record; raises one clear error that names the key and the row.

    Args:
        batch: batch size ``[B]``.
        current_version: the learner's version; a larger ``policy_version`` is an error.
        discrete: True where log-probs are of probabilities, not densities, and so cannot exceed 0.

    Raises:
        RecordError: a missing key, a wrong shape or dtype, a NaN log-prob on a masked-in unit, a version from the
            future, a decreasing step index, or a non-finite reward.
    """
    rows = batch.batch_size[0] if len(batch.batch_size) else -1
    missing = [key for key in REQUIRED_KEYS if key not in batch.keys()]
    if missing:
        held = ", ".join(sorted(map(str, batch.keys())))
        how = f" (behavior_log_prob: {HOW_TO_GET_BEHAVIOR})" if "behavior_log_prob" in missing else ""
        raise RecordError(f"the record lacks {', '.join(missing)}{how}; it holds {held}")
    width, steps = batch["mask"].shape[-1], batch["reward"].shape[-1]
    for table, shape in ((UNIT_KEYS, (rows, width)), (STEP_KEYS, (rows, steps)), (ROW_KEYS, (rows,))):
        for key, dtype in table.items():
            value = batch.get(key, None)
            if value is None:
                continue
            if tuple(value.shape) != shape:
                raise RecordError(f"{key} has shape {tuple(value.shape)}, expected {shape}")
            if value.dtype != dtype:
                raise RecordError(f"{key} has dtype {value.dtype}, expected {dtype}")
    mask, log_prob = batch["mask"], batch["behavior_log_prob"]
    _raise_at(mask & torch.isnan(log_prob), "behavior_log_prob is NaN on a masked-in unit")
    if discrete:
        _raise_at(mask & (log_prob > 1e-5), "behavior_log_prob is above 0, but the policy's units are discrete")
    _raise_at(batch["step_index"].diff(dim=-1) < 0, "step_index decreases within a row")
    if current_version is not None:
        _raise_at(mask & (batch["policy_version"] > current_version), f"policy_version is newer than {current_version}")
    step_mask = batch.get("step_mask", None)
    bad_reward = ~torch.isfinite(batch["reward"])
    _raise_at(bad_reward if step_mask is None else bad_reward & step_mask, "reward is not finite")


def _raise_at(bad: Tensor, message: str) -> None:
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        raise RecordError(f"{message} (row {row}, position {column}; {int(bad.sum())} in all)")


def row_return(record: TensorDictBase) -> Tensor:
    """Sum of the valid rewards of each row, ``[B]``; whatever stands in masked steps reaches nothing."""
    reward = record["reward"]
    mask = record.get("step_mask", None)
    return (reward if mask is None else torch.where(mask, reward, 0.0)).sum(-1)


def split_steps(record: TensorDictBase) -> TensorDict:
    """Every step of a control record as a row of its own, so that minibatches may shuffle steps.

    Only meaningful for corrections at the level of units or steps.

    Args:
        record: batch size ``[B]`` with ``T`` steps of ``U`` units each, every tensor ``[B]``, ``[B, T, ...]`` or
            ``[B, T * U]``.

    Returns:
        Batch size ``[B * T]``, one step of ``U`` units a row; what is ``[B]``, such as ``group``, is repeated.

    Raises:
        RecordError: steps that do not have the same number of units.
    """
    rows, steps = record["reward"].shape
    width = record["mask"].shape[-1]
    if width % steps:
        raise RecordError(f"{width} units are not a multiple of {steps} steps: rows cannot be split into steps")
    items: dict[str, Tensor] = {}
    for key, value in record.items():
        if value.ndim == 1:
            items[key] = value.repeat_interleave(steps)
        elif value.shape[1] == steps:
            items[key] = value.reshape(rows * steps, 1, *value.shape[2:])
        else:
            items[key] = value.reshape(rows * steps, width // steps)
    items["step_index"] = torch.zeros_like(items["step_index"])
    return TensorDict(items, batch_size=[rows * steps])


def split_episodes(segment: TensorDictBase) -> TensorDict:
    """Windows of transitions cut where the episode changes: every piece of an episode becomes a row of its own.

    Sequence- and prefix-level ratios would otherwise multiply across episodes.

    Args:
        segment: batch size ``[B, T]`` with ``episode [B, T]`` and optionally ``step_mask [B, T]``.

    Returns:
        Batch size ``[R, W]``: ``R`` pieces, padded at the end to the longest; ``step_mask [R, W]`` marks real steps,
        padding holds zeros (episode, group, start and version repeat the piece's first).
    """
    episode = segment["episode"]
    rows, steps = episode.shape
    step_mask = segment.get("step_mask", None)
    valid = torch.ones_like(episode, dtype=torch.bool) if step_mask is None else step_mask
    starts = torch.ones_like(valid)
    starts[:, 1:] = (episode[:, 1:] != episode[:, :-1]) | (valid[:, 1:] != valid[:, :-1])
    piece = starts.flatten().cumsum(0) - 1
    index = torch.arange(steps, device=episode.device).expand(rows, -1)
    position = (index - torch.where(starts, index, torch.zeros_like(index)).cummax(-1).values).flatten()
    kept = valid.flatten()
    piece = torch.unique(piece[kept], return_inverse=True)[1]
    position = position[kept]
    count, width = int(piece.max()) + 1 if len(piece) else 0, int(position.max()) + 1 if len(position) else 0
    items: dict[str, Tensor] = {}
    for key, value in segment.items():
        flat = value.flatten(0, 1)[kept]
        out = flat.new_zeros((count, width, *flat.shape[1:]))
        if key in ("episode", "policy_version", *ROW_KEYS):
            out[piece.flip(0)] = flat.flip(0)[:, None]  # the first step of a piece is written last
        out[piece, position] = flat
        items[key] = out
    mask = torch.zeros(count, width, dtype=torch.bool, device=episode.device)
    mask[piece, position] = True
    items["step_mask"] = mask
    return TensorDict(items, batch_size=[count, width])


def trim_units(record: TensorDictBase, width: int) -> TensorDict:
    """Cuts unit keys and tokens of a language record to ``width`` columns (what follows is padding)."""
    full = record["tokens"].shape[-1]
    keys = set(UNIT_KEYS) | {MARKS, "tokens", "token_mask", "advantage", "value", "value_target"}
    items = {
        key: value[:, :width] if key in keys and value.ndim > 1 and value.shape[1] == full else value
        for key, value in record.items()
    }
    return TensorDict(items, batch_size=record.batch_size)
