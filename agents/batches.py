"""From a replay to the optimiser batches of an update: which rows, cut into steps or not, in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.correction import Correction
from unified_rl.correction.requirements import needs_whole_rows
from unified_rl.errors import ConfigError
from unified_rl.interventions import Wrapper
from unified_rl.objectives.objective import Term
from unified_rl.ranges import Count, UpperBound, ranged
from unified_rl.replay import Replay
from unified_rl.training.metrics import to_floats
from unified_rl.units import record_from_steps, split_episodes, trim_units, validate_record

SCANNED_ONLY = ("next_observation", "terminated", "truncated", "discount", "episode", "index")
"""Keys that advantages needed and optimiser steps do not: minibatches leave them out."""


def mean_of(values: Sequence[Any]) -> Any:
    """Mean of scalars, tensors or not, with one operation for all and without a look at any."""
    if not all(isinstance(value, Tensor) for value in values):
        return sum(values) / len(values)
    return torch.stack([value.detach() for value in values]).mean(dtype=torch.float64)


class Draw:
    """The rows of one update, as a valid record.

    Args:
        rows: how many, where the replay is no queue; a queue gives what one collection wrote.
        length: steps of a control row; None for language.
        language, discrete: what the policy's units are.
        whole_rows: rows end with their episode (control), because a method looks at more than single steps.
        device: where the record goes.
    """

    def __init__(
        self, rows: int, length: int | None, language: bool, discrete: bool, whole_rows: bool, device: torch.device
    ) -> None:
        self.rows, self.length, self.device = rows, length, device
        self.language, self.discrete, self.whole_rows = language, discrete, whole_rows

    def __call__(self, replay: Replay, version: int) -> TensorDict:
        """Draws for the learner's version.

        Raises:
            RecordError: rows that are no record.
        """
        count = None if replay.sampler.queue else self.rows  # of a queue: what one collection wrote
        batch = replay.sample(count, length=self.length, version=version).to(self.device)
        if not self.language and self.whole_rows:
            batch = split_episodes(batch)
        record = batch if self.language else record_from_steps(batch)
        validate_record(record, current_version=version, discrete=self.discrete)
        return trim_units(record, int(record["token_mask"].sum(-1).max())) if self.language else record


@ranged("agent")
class Batches:
    """Epochs of optimiser batches over annotated rows.

    Args:
        generator: stream of the order.
        epochs: passes over the rows.
        minibatch: rows of one optimiser step; None takes all.
        target_kl: no further epoch after one whose last step met an ``update/kl`` above this.

    Raises:
        ConfigError: no epoch, or no row.
    """

    def __init__(
        self,
        generator: torch.Generator,
        epochs: Count = 1,
        minibatch: Count | None = None,
        target_kl: UpperBound | None = None,
    ) -> None:
        self.generator, self.epochs, self.minibatch, self.target_kl = generator, epochs, minibatch, target_kl

    def run(
        self, rows: TensorDict, step: Callable[[TensorDict], dict[str, Any]], whole_groups: bool = False
    ) -> dict[str, float]:
        """Calls ``step`` with every optimiser batch; returns the means of the metrics that it returns."""
        found: dict[str, list[Any]] = {}
        for _ in range(self.epochs):
            for batch in self.epoch(rows, whole_groups):
                metrics = step(batch)
                for key, value in metrics.items():
                    found.setdefault(key, []).append(value)
            if self.target_kl is not None and float(metrics.get("update/kl", 0.0)) > self.target_kl:
                break
        return to_floats({key: mean_of(values) for key, values in found.items()})

    def size(self, rows: TensorDict) -> int:
        """Rows of one optimiser batch."""
        return min(self.minibatch or len(rows), len(rows))

    def epoch(self, rows: TensorDict, whole_groups: bool = False) -> Sequence[TensorDict]:
        """All rows in random order, cut into pieces: one gather an epoch costs less than one a piece."""
        size = self.size(rows)
        if size == len(rows):
            return [rows]
        if whole_groups:
            order = shuffled_groups(rows["group"], size, self.generator)
        else:
            order = torch.randperm(len(rows), generator=self.generator, device=rows.device)
        columns = {key: x.index_select(0, order).split(size) for key, x in rows.items() if key not in SCANNED_ONLY}
        sizes = [min(size, len(rows) - start) for start in range(0, len(rows), size)]
        return [
            TensorDict._new_unsafe({key: pieces[i] for key, pieces in columns.items()}, torch.Size([n]), rows.device)
            for i, n in enumerate(sizes)
        ]  # checking what was cut from one record costs as much as cutting it


def shuffled_groups(group: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Row numbers ``[B]`` with whole groups in random order.

    Raises:
        ConfigError: pieces of ``size`` rows would cut a group.
    """
    ids, index, counts = torch.unique(group, return_inverse=True, return_counts=True)
    rows = int(counts[0])
    if bool((counts != rows).any()) or size % rows:
        raise ConfigError(
            f"agent.minibatch={size} cuts groups that a term of the loss needs whole ({rows} rows each): set it to a "
            "multiple of their size, or to null"
        )
    rank = torch.randperm(len(ids), generator=generator, device=group.device)
    return rank[index].sort(stable=True).indices


def choose_steps(
    wanted: bool | None, possible: bool, correction: Correction, wrapper: Wrapper, terms: Iterable[Term]
) -> bool:
    """Whether optimiser batches are of single steps instead of rows.

    Args:
        wanted: the setting; None does so wherever it can be done.
        possible: advantages are of single steps, in control.
        correction, wrapper, terms: may look at whole rows or groups.

    Raises:
        ConfigError: it is wanted and cannot be done.
    """
    terms = list(terms)
    groups = [term.where for term in terms if term.whole_groups]
    rows = [term.where for term in terms if term.whole_rows]
    whole = needs_whole_rows(correction) or wrapper.whole_rows
    may_split = possible and not whole and not groups and not rows
    if wanted and groups:
        raise ConfigError(f"agent.shuffle_steps cuts groups that {groups[0]} needs whole; set it to false")
    if wanted and rows:
        raise ConfigError(f"agent.shuffle_steps cuts rows that {rows[0]} needs whole; set it to false")
    if wanted and not may_split:
        level = correction.level_name
        raise ConfigError(
            f"agent.shuffle_steps cuts rows that correction {correction.name} (level {level!r}) needs whole"
        )
    return may_split if wanted is None else wanted
