"""Answers kept by prompt, and prompts kept by how often they are solved: drawn without a look at the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor

IntArray = NDArray[np.int64]


class AnswerPool:
    """A bounded number of answers to a bounded number of prompts, which stand in levels.

    A prompt has a place, its answers the slots ``place * answers`` and on. Levels are lists that lose a prompt by
    putting their last in its place, so that a draw costs what it draws, however many there are.

    Args:
        prompts: kept at most; the one that came first leaves first.
        answers: kept of each at most; the newest.
        levels: of prompts, from 0.
        distinct: answers that a prompt has already are passed over; without, answer ``n`` of so many as are kept has
            slot ``n``.
    """

    def __init__(self, prompts: int, answers: int, levels: int, distinct: bool = True) -> None:
        self.prompts, self.answers, self.levels, self.distinct = prompts, answers, levels, distinct
        self.place: dict[int, int] = {}
        self.problems: list[Any] = []
        self.numbers = np.zeros(0, dtype=np.int64)
        self.level = np.zeros(0, dtype=np.int64)  # -1: nobody is there
        self.at = np.zeros(0, dtype=np.int64)
        self.written = np.zeros(0, dtype=np.int64)
        self.uses = np.zeros(0, dtype=np.int64)
        self.lists = [np.zeros(16, dtype=np.int64) for _ in range(levels)]
        self.counts = np.zeros(levels, dtype=np.int64)
        self.rows: TensorDict | None = None
        self.free: list[int] = []

    def __len__(self) -> int:
        """Prompts that are there."""
        return len(self.place)

    def put(self, number: int, problem: Any, level: int, rows: TensorDict) -> None:
        """Adds answers to a prompt, and moves it to a level.

        Args:
            number: of the prompt.
            problem: kept beside it, plain data.
            level: where it stands from now on.
            rows: ``[n]`` of the record, in time order.
        """
        place = self.place.get(number)
        if place is None:
            place = self._new_place(number, problem, rows)
        self._move(place, level)
        assert self.rows is not None
        first, written = place * self.answers, int(self.written[place])
        held = self.rows["tokens"][first : first + min(written, self.answers)]
        new = rows[_unlike(rows["tokens"], held)] if self.distinct else rows
        slots = first + (written + torch.arange(len(new)))[-self.answers :] % self.answers
        for key, column in self.rows.items():
            column[slots] = new[key][-self.answers :]
        self.uses[slots.numpy()], self.written[place] = 0, written + len(new)

    def drop(self, number: int) -> None:
        """Forgets a prompt; one that is not there is passed over."""
        place = self.place.pop(number, None)
        if place is not None:
            self._leave(place)
            self.level[place], self.written[place], self.problems[place] = -1, 0, None
            self.free.append(place)

    def level_of(self, number: int) -> int | None:
        """Where a prompt stands; None where it is not there."""
        place = self.place.get(number)
        return None if place is None else int(self.level[place])

    def draw(self, count: int, weights: Sequence[float] | NDArray[np.float64], rng: np.random.Generator) -> IntArray:
        """Places of different prompts ``[n]``, as many as there are up to ``count``.

        Each is of a level by its weight, and any of that level; what a level cannot give falls to the others.

        Args:
            count: wanted.
            weights: ``[levels]``; levels of weight 0 give nothing.
            rng: the stream.
        """
        weight = np.asarray(weights, dtype=np.float64)
        taken = np.zeros(self.levels, dtype=np.int64)
        while (left := count - int(taken.sum())) > 0:
            open_ = np.where(taken < self.counts, weight, 0.0)
            if not open_.sum() > 0:
                break
            taken = np.minimum(taken + rng.multinomial(left, open_ / open_.sum()), self.counts)
        found = [
            held[rng.choice(int(size), int(n), replace=False)]
            for held, size, n in zip(self.lists, self.counts, taken, strict=True)
            if n
        ]
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)

    def slots(self, places: IntArray) -> tuple[IntArray, NDArray[np.bool_]]:
        """Where the answers of places ``[n]`` are, ``[n, answers]``, and which of these are filled."""
        each = np.arange(self.answers)
        return places[:, None] * self.answers + each, each < np.minimum(self.written[places], self.answers)[:, None]

    def newest(self, places: IntArray) -> IntArray:
        """The slot of the latest answer of each place."""
        return places * self.answers + (self.written[places] - 1) % self.answers

    def likely(
        self, place: int, count: int, score: NDArray[np.float64], temperature: float, rng: np.random.Generator
    ) -> IntArray:
        """At most ``count`` different slots of a place, one by one in proportion to ``exp(score / temperature)``.

        Args:
            place: of the prompt.
            count: wanted.
            score: ``[answers]``, of its slots; those of slots that hold nothing are not looked at.
            temperature: above 0; infinity draws any alike.
            rng: the stream.
        """
        slots, filled = self.slots(np.array([place]))
        own = slots[0][filled[0]]
        keys = score[filled[0]] / temperature + rng.gumbel(size=len(own))
        found: IntArray = own[np.argsort(-keys, kind="stable")[:count]]
        return found

    def read(self, slots: IntArray) -> TensorDict:
        """Copies of the answers in slots ``[n]``; each has been used once more."""
        assert self.rows is not None
        np.add.at(self.uses, slots, 1)
        at = torch.from_numpy(np.ascontiguousarray(slots))
        return TensorDict({k: v.index_select(0, at) for k, v in self.rows.items()}, batch_size=[len(slots)])

    def _new_place(self, number: int, problem: Any, like: TensorDict) -> int:
        if len(self.place) >= self.prompts:
            self.drop(next(iter(self.place)))
        place = self.free.pop() if self.free else len(self.problems)
        if place == len(self.problems):
            self.problems.append(None)
            self._grow(place + 1, like)
        self.place[number], self.numbers[place], self.problems[place] = place, number, problem
        return place

    def _grow(self, size: int, like: TensorDict) -> None:
        if size <= len(self.numbers):
            return
        wanted = min(self.prompts, max(16, 2 * len(self.numbers)))
        more = wanted - len(self.numbers)
        self.numbers, self.at, self.written = (
            np.concatenate([x, np.zeros(more, dtype=np.int64)]) for x in (self.numbers, self.at, self.written)
        )
        self.level = np.concatenate([self.level, np.full(more, -1)])
        self.uses = np.concatenate([self.uses, np.zeros(more * self.answers, dtype=np.int64)])
        new = {k: v.new_zeros(more * self.answers, *v.shape[1:]) for k, v in like.items()}
        held = None if self.rows is None else dict(self.rows.items())
        grown = new if held is None else {k: torch.cat([held[k], v]) for k, v in new.items()}
        self.rows = TensorDict(grown, batch_size=[wanted * self.answers])

    def _move(self, place: int, level: int) -> None:
        if int(self.level[place]) == level:
            return
        self._leave(place)
        count = int(self.counts[level])
        if count == len(self.lists[level]):
            self.lists[level] = np.concatenate([self.lists[level], np.zeros(count, dtype=np.int64)])
        self.lists[level][count] = place
        self.level[place], self.at[place] = level, count
        self.counts[level] += 1

    def _leave(self, place: int) -> None:
        """Takes a place out of its level: the last of it moves up."""
        level = int(self.level[place])
        if level < 0:
            return
        last = int(self.lists[level][int(self.counts[level]) - 1])
        self.lists[level][int(self.at[place])], self.at[last] = last, self.at[place]
        self.counts[level] -= 1

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain values and tensors."""
        size = len(self.problems)
        kept = {} if self.rows is None else {k: v[: size * self.answers].clone() for k, v in self.rows.items()}
        arrays = {name: torch.from_numpy(getattr(self, name)[:size].copy()) for name in _BY_PLACE}
        lists = [torch.from_numpy(x[:n].copy()) for x, n in zip(self.lists, self.counts.tolist(), strict=True)]
        uses = torch.from_numpy(self.uses[: size * self.answers].copy())
        plain = {"problems": list(self.problems), "free": list(self.free), "known": list(self.place)}
        return {**plain, **arrays, "lists": lists, "uses": uses, "rows": kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        for name in _BY_PLACE:
            setattr(self, name, state[name].numpy().copy())
        self.problems, self.free = list(state["problems"]), list(state["free"])
        place_of: dict[int, int] = {
            int(n): at for at, (n, level) in enumerate(zip(self.numbers, self.level, strict=True)) if level >= 0
        }
        self.place = {number: place_of[number] for number in state["known"]}
        self.lists = [np.concatenate([x.numpy(), np.zeros(16, dtype=np.int64)]) for x in state["lists"]]
        self.counts = np.array([len(x) for x in state["lists"]], dtype=np.int64)
        self.uses = state["uses"].numpy().copy()
        rows: dict[str, Tensor] = {k: v.clone() for k, v in state["rows"].items()}
        self.rows = TensorDict(rows, batch_size=[len(self.uses)]) if rows else None


def _unlike(tokens: Tensor, held: Tensor) -> Tensor:
    """Rows ``[n]`` of ``tokens [n, N]`` that are none of ``held [m, N]``, and none that comes before them."""
    same = (tokens[:, None] == torch.cat([held, tokens])[None]).all(-1)
    earlier = torch.cat([torch.ones(len(tokens), len(held)), torch.ones(len(tokens), len(tokens)).tril(-1)], 1) > 0
    return ~(same & earlier).any(-1)


_BY_PLACE = ("numbers", "level", "at", "written")
"""Arrays with an entry for each place."""
