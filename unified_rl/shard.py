"""Which rows of a batch this process passes through the model, where several processes hold the same batch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
from tensordict import TensorDictBase
from torch import Tensor

BUCKET = 2**24
"""Numbers of the gradient that are summed in one message, so that no second copy of a large one is held."""
RowsT = TypeVar("RowsT", bound=TensorDictBase)


class Shard:
    """One of ``world`` processes that hold the same rows, weights and streams, and divide the passes over the model.

    Everything but the model's forward and backward passes is done on the whole batch by every process, so it comes out
    the same whatever it looks at: groups, statistics of the batch, its order. What a pass gives of a process's own rows
    is put together with what the others found (:meth:`gather`), and gradients are added up. This class is the only one
    of its world and sends nothing; a subclass has :meth:`all_gather` and :meth:`all_reduce`.

    Every method must be called by all processes alike, in the same order.

    Args:
        rank: number of this process, from 0.
        world: how many there are.
    """

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world
        self.in_step = False
        """Whether every pass over a model is a message too, so that all processes must make equally many."""
        self.names: list[str] = []
        """Of the sums that any process has had so far, the same everywhere."""
        self._held: dict[int, list[int]] = {}
        """Of lists of so many tensors: the places at which any process had one the last time."""

    # ------------------------------------------------------------------ what a subclass does

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """The processes' ``x``, which have one shape, by rank."""
        return [x]

    def all_reduce(self, x: Tensor) -> None:
        """Replaces ``x`` by the sum over the processes, the same bits everywhere."""

    # ------------------------------------------------------------------ rows

    def bounds(self, rows: int) -> list[int]:
        """Where the processes' shares of so many rows begin and end, ``world + 1`` numbers."""
        return [rows * k // self.world for k in range(self.world + 1)]

    def mine(self, rows: int) -> slice:
        """This process's share of so many rows; empty where there are fewer rows than processes and it has none."""
        at = self.bounds(rows)
        return slice(at[self.rank], at[self.rank + 1])

    def span(self, rows: int) -> slice:
        """Which of so many rows this process passes: :meth:`mine`, or the first where that is empty."""
        mine = self.mine(rows)
        return mine if mine.stop > mine.start else slice(0, 1)

    def passes(self, rows: int, size: int | None) -> int:
        """Over how many micro-batches of at most ``size`` rows this process's share of a batch is passed.

        Args:
            rows: of the batch.
            size: None takes all at once.
        """
        shares = [end - begin for begin, end in pairwise(self.bounds(rows))]
        largest = max(shares) if self.in_step else shares[self.rank]
        return -(-largest // size) if size else min(largest, 1)

    def parts(self, own: RowsT, rows: int, size: int | None) -> list[RowsT]:
        """This process's rows in micro-batches; in step with the others, as many as they have where its rows allow it.

        Args:
            own: :meth:`own` of a batch, or its :meth:`mine` rows.
            rows: of the batch.
            size: as of :meth:`passes`.
        """
        count = min(self.passes(rows, size), len(own))
        if self.in_step and count > 1:
            at = [len(own) * k // count for k in range(count + 1)]
            return [own[begin:end] for begin, end in pairwise(at)]
        return list(own.split(size or max(1, len(own))))

    def own(self, rows: RowsT) -> RowsT:
        """This process's rows; the first row where it has none, so that it makes the same passes."""
        if self.world == 1:
            return rows
        found: RowsT = rows[self.span(len(rows))]
        return found

    def gather(self, found: Tensor, rows: int) -> Tensor:
        """What the processes found of their :meth:`own` rows, ``[b, ...]`` each, as one ``[rows, ...]``."""
        if self.world == 1:
            return found
        at = self.bounds(rows)
        sizes = [end - begin for begin, end in pairwise(at)]
        part = found[: sizes[self.rank]].to(torch.uint8) if found.dtype == torch.bool else found[: sizes[self.rank]]
        whole = part.new_zeros(max(sizes), *part.shape[1:])
        whole[: len(part)] = part
        parts = self.all_gather(whole)
        joined = torch.cat([x[:size] for x, size in zip(parts, sizes, strict=True)])
        return joined.to(found.dtype)

    def divided(self, rows: RowsT, score: Callable[[RowsT], Tensor]) -> Tensor:
        """``score(rows)``, ``[rows, ...]``, a value a row and without gradient: each process scores its own."""
        return score(rows) if self.world == 1 else self.gather(score(self.own(rows)), len(rows))

    # ------------------------------------------------------------------ sums

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Adds up the gradients of the processes; a weight that has one nowhere keeps none."""
        if self.world == 1:
            return
        summed = self.summed([parameter.grad for parameter in parameters], parameters)
        for parameter, gradient in zip(parameters, summed, strict=True):
            parameter.grad = gradient

    def summed(self, tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
        """The sums of tensors in the shapes of ``like`` over the processes; None stands for zeros, unless it is all."""
        if self.world == 1 or not like:
            return list(tensors)
        agreed = self._held.get(len(like), list(range(len(like))))
        while True:
            out = self._summed(tensors, like, agreed)
            held = [i for i, x in enumerate(out) if x is not None]
            self._held[len(like)] = held
            if {*held} <= {*agreed}:
                return out
            agreed = held  # one came that none had before

    def _summed(self, tensors: Sequence[Tensor | None], like: Sequence[Tensor], agreed: Sequence[int]) -> Any:
        """The sums at the places that are agreed; elsewhere True where any process has a tensor."""
        flags = torch.tensor([float(x is not None) for x in tensors], device=like[0].device)
        out: list[Any] = [None] * len(like)
        for number, places in enumerate(list(_buckets(agreed, like)) or [[]]):
            pieces = [like[i].new_zeros(like[i].numel()) if (x := tensors[i]) is None else x.detach() for i in places]
            pieces += [flags.to(pieces[0].dtype if pieces else flags.dtype)] if number == 0 else []
            flat = torch.cat([x.reshape(-1) for x in pieces])
            self.all_reduce(flat)
            sizes = [like[i].numel() for i in places]
            if number == 0:
                flags = flat[sum(sizes) :]
            for i, piece in zip(places, flat[: sum(sizes)].split(sizes), strict=True):
                out[i] = piece.view(like[i].shape)
        found = flags.tolist()
        return [(True if x is None else x) if found[i] else None for i, x in enumerate(out)]

    def sums(self, values: Mapping[str, Any], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Scalars added up by name, float64; one that a process lacks counts there as nothing.

        Names are exchanged when one is new, and agreed from then on: a step costs one message.
        """
        if self.world == 1:
            return {name: torch.as_tensor(value) for name, value in values.items()}
        while True:
            count = len(self.names)
            vector = torch.zeros(2 * count + 1, dtype=torch.float64, device=device)
            for place, name in enumerate(self.names):
                if name in values:
                    vector[place], vector[count + place] = torch.as_tensor(values[name]).detach(), 1.0
            vector[-1] = float(not values.keys() <= set(self.names))
            self.all_reduce(vector)
            held = vector[count:].tolist()
            if not held[-1]:
                return {name: vector[i] for i, name in enumerate(self.names) if held[i]}
            told = self.texts(json.dumps(sorted(values)), device)
            self.names = sorted({*self.names, *(name for text in told for name in json.loads(text))})

    def texts(self, text: str, device: torch.device | str = "cpu") -> list[str]:
        """The processes' texts, by rank."""
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(device)
        sizes = [int(n) for n in self.all_gather(torch.tensor([len(data)], device=device))]
        padded = data.new_zeros(max(sizes))
        padded[: len(data)] = data
        found = self.all_gather(padded)
        return [bytes(x[:size].tolist()).decode() for x, size in zip(found, sizes, strict=True)]

    # ------------------------------------------------------------------ decisions

    def largest(self, x: Tensor) -> Tensor:
        """The largest of the processes' scalars."""
        return x if self.world == 1 else torch.stack(self.all_gather(x)).amax(0)

    def first(self, value: float) -> float:
        """The number that process 0 found: what is computed everywhere may differ in its last bit, a decision not."""
        if self.world == 1:
            return value
        return float(self.all_gather(torch.tensor([value], dtype=torch.float64))[0])

    def stream(self, generator: torch.Generator, update: int) -> torch.Generator:
        """A stream of this process alone, for noise inside a pass; the given one goes on alike in every process.

        It follows from the given stream's seed, the update and the rank, so a run that goes on needs no state of it.
        """
        mixed = (generator.initial_seed() + 1_000_003 * (update + 1) + 7_919 * (self.rank + 1)) % 2**63
        return torch.Generator(generator.device).manual_seed(mixed)


def in_pieces(x: Any) -> bool:
    """Whether a tensor is one process's piece of a larger one, a ``DTensor`` (whose module takes seconds to import)."""
    return hasattr(x, "to_local")


def local(x: Any) -> Any:
    """What this process holds of a tensor: all of it, or its piece."""
    return x.to_local() if in_pieces(x) else x


ALONE = Shard()
"""The only process of a run."""


def _buckets(places: Iterable[int], like: Sequence[Tensor]) -> Iterator[list[int]]:
    """Consecutive places whose tensors have one dtype and device and together at most :data:`BUCKET` numbers."""
    bucket: list[int] = []
    size = 0
    for place in places:
        x = like[place]
        other = bucket and (like[bucket[0]].dtype, like[bucket[0]].device) != (x.dtype, x.device)
        if bucket and (other or size + x.numel() > BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(place)
        size += x.numel()
    if bucket:
        yield bucket
