"""Tasks whose problems are a finite pool, generated once or read from a file when they are drawn."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from hashlib import blake2b
from itertools import islice
from os.path import realpath
from typing import Any, Protocol, Self, runtime_checkable
from weakref import WeakKeyDictionary

import numpy as np
import torch
from tensordict import TensorDict

from unified_rl.envs.language.base import LanguageTask, _hash
from unified_rl.envs.language.codec import Segment
from unified_rl.errors import CheckpointError, ConfigError, DataError
from unified_rl.rollout.epochs import Epochs

AT_ONCE = 1024
"""Problems that are measured together while a pool is gone through."""
Problem = dict[str, Any]


@runtime_checkable
class Takes(Protocol):
    """The problems of a file, which makes several of them at once.

    Attributes:
        place: of the file.
    """

    place: str

    def outlines(self) -> Iterator[Problem]:
        """Every problem with what a split needs: its text, ``record`` and ``fault``."""
        ...

    def take(self, numbers: Sequence[int]) -> list[Problem]:
        """Some of them, in the order of ``numbers``."""
        ...


class Side(Sequence[Problem]):
    """The problems of one side of a split, by their numbers in the whole.

    Args:
        problems: the whole.
        numbers: of this side's, int64.
    """

    def __init__(self, problems: Sequence[Problem], numbers: array[int]) -> None:
        self.problems, self.numbers = problems, np.frombuffer(numbers, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        return self.take(range(len(self))[index]) if isinstance(index, slice) else self.take([index])[0]

    def take(self, places: Sequence[int]) -> list[Problem]:
        """Those at some places, in the order of ``places``."""
        numbers = self.numbers[np.asarray(places, dtype=np.int64)].tolist()
        return self.problems.take(numbers) if isinstance(self.problems, Takes) else [self.problems[n] for n in numbers]

    def __iter__(self) -> Iterator[Problem]:
        for start in range(0, len(self), AT_ONCE):
            yield from self.take(range(start, min(start + AT_ONCE, len(self))))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Side) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


class PooledTask(LanguageTask):
    """Visits every training problem once an epoch, in a shuffled order, before any comes again.

    Each stream that problems are drawn with has epochs of its own, so that whoever else draws from the task changes
    nothing; they are drawn from the stream. Held-out problems are drawn without replacement within a call, and one
    that wants more than there is gets all equally often, or once more.

    A subclass calls :meth:`_fill` at the end of its constructor. Problems hold ``text`` and, where there is a correct
    answer to imitate, ``solution``; a ``fault`` says why answers cannot be judged.

    Attributes:
        drop_last: end an epoch with its last whole draw.
        compares: answers are compared with references, so a problem without one is refused where they are judged.
        unjudged: of each split that holds such problems, what is wrong with the first.
    """

    drop_last = False
    compares = True
    _digest: str
    """Of the training problems' questions in their order."""

    def _fill(self, problems: Sequence[Problem], held_out: Sequence[Problem] | None = None) -> None:
        """Splits ``problems`` by the hash of their prompts, or keeps those away that are in ``held_out``.

        Prompts over ``max_prompt_length`` are left out, with a warning that counts them. One pass over each sequence;
        the numbers of a side's problems are what is kept.

        Raises:
            ConfigError: no training problem is left, and none is held out by another file.
        """
        self.unjudged: dict[str, str] = {}
        self._epochs: WeakKeyDictionary[torch.Generator, dict[str, Epochs]] = WeakKeyDictionary()
        self._waiting: list[dict[str, Any]] = []
        self._shown: dict[str, Side] = {}
        train, evaluation, others = array("q"), array("q"), set()
        told: set[str] = set()
        if held_out is not None:
            for number, problem, fits in self._measured(held_out, told):
                others.add(_record(problem))
                if fits:
                    evaluation.append(number)
                    self._note_fault("eval", problem)
        hashes = array("Q")
        count = 0
        for number, problem, fits in self._measured(problems, told):
            count += 1
            away = self._belongs(problem) if held_out is None else _record(problem) in others
            if not fits or (away and held_out is not None):
                continue
            (evaluation if away else train).append(number)
            self._note_fault("eval" if away else "train", problem)
            if not away:
                hashes.append(_record(problem))
        self._hashes = np.frombuffer(hashes, dtype=np.uint64)
        self._digest = blake2b(self._hashes.tobytes(), digest_size=8).hexdigest()
        self._sorted: np.ndarray | None = None
        self._pools = {"train": Side(problems, train), "eval": Side(held_out or problems, evaluation)}
        if not train and not others:  # a file may hold out its own problems, where it is evaluated and nothing else
            raise ConfigError(
                f"no training problem is left of {count}; lower env.held_out or raise env.max_prompt_length="
                f"{self.max_prompt_length}"
            )

    def _note_fault(self, split: str, problem: Problem) -> None:
        if "fault" in problem:
            self.unjudged.setdefault(split, problem["fault"])

    def _measured(self, problems: Iterable[Problem], told: set[str]) -> Iterator[tuple[int, Problem, bool]]:
        """Number and problem, and whether the prompt fits; of each file one warning counts those that do not.

        Args:
            problems: all of a file, or a generated set.
            told: files that the warning was given of.
        """
        room = self.max_prompt_length - len(self.codec.prefix)
        number = long = 0
        waiting = problems.outlines() if isinstance(problems, Takes) else iter(problems)
        while batch := list(islice(waiting, AT_ONCE)):
            for problem, ids in zip(batch, self.codec.encode([problem["text"] for problem in batch]), strict=True):
                fits = len(ids) <= room
                long += not fits
                yield number, problem, fits
                number += 1
        place = problems.place if isinstance(problems, Takes) else ""
        if long and realpath(place) not in told:
            told.add(realpath(place))
            logging.getLogger(__name__).warning(
                "%d of %d prompts%s are longer than env.max_prompt_length=%d and are left out",
                long, number, place and f" of {place}", room,
            )  # fmt: skip

    def pool_sizes(self) -> dict[str, int]:
        """How many problems there are to train on, to evaluate on, and to imitate."""
        return {**{name: len(pool) for name, pool in self._pools.items()}, "demonstration": len(self._shows("train"))}

    def _shows(self, split: str) -> Side:
        """The problems of a split whose solution fits the budget; found when they are first wanted."""
        if split not in self._shown:
            side, numbers, at = self._pools[split], array("q"), 0
            while batch := side.take(range(at, min(at + AT_ONCE, len(side)))):
                solved = [place for place, problem in enumerate(batch, at) if problem.get("solution")]
                texts = [batch[place - at]["solution"] for place in solved]
                for place, ids in zip(solved, self.codec.encode(texts), strict=True):
                    if len(ids) < self.max_turn_tokens and self._whole_fits(batch[place - at]):
                        numbers.append(int(side.numbers[place]))
                at += len(batch)
            self._shown[split] = Side(side.problems, numbers)
        return self._shown[split]

    def _whole_fits(self, problem: Problem) -> bool:
        """Whether a conversation that is imitated in pieces fits a row; others do where prompt and solution do."""
        if "pieces" not in problem:
            return True
        ids = self.codec.encode([text for text, _ in problem["pieces"]])
        return len(self.codec.prefix) + sum(map(len, ids)) < self.max_length

    def find_problems(self, prompts: Sequence[str]) -> list[Problem | None]:
        """The training problem with each prompt, None where there is none (a held-out prompt, for example).

        A prompt is known by its question, or by its whole text as the template makes it.
        """
        places = [self._place_of(prompt) for prompt in prompts]
        lost = {prompts[row] for row, place in enumerate(places) if place is None}
        if lost:
            by_text = {p["text"]: place for place, p in enumerate(self._pools["train"]) if p["text"] in lost}
            places = [by_text.get(prompts[row]) if place is None else place for row, place in enumerate(places)]
        made = iter(self._prompted(self._pools["train"].take([p for p in places if p is not None]), "train"))
        return [None if place is None else next(made) for place in places]

    def _place_of(self, prompt: str) -> int | None:
        """Where in the training problems one of this question is."""
        if self._sorted is None:
            self._sorted = np.argsort(self._hashes, kind="stable")
        for question in self._records_of(prompt):
            key = np.uint64(_hash(question))
            at = int(np.searchsorted(self._hashes, key, sorter=self._sorted))
            if at < len(self._sorted) and self._hashes[self._sorted[at]] == key:
                return int(self._sorted[at])
        return None

    def _records_of(self, prompt: str) -> Sequence[str]:
        """The questions that a prompt which others give may be."""
        return (prompt,)

    def solve(self, problems: Sequence[Problem], style: str | None = None) -> list[list[int]]:
        """As of every task; empty where a problem holds no solution."""
        said = iter(super().solve([problem for problem in problems if problem.get("solution")], style))
        return [next(said) if problem.get("solution") else [] for problem in problems]

    def problems(self, count: int, generator: torch.Generator, split: str = "train") -> list[Problem]:
        """As of every task.

        Raises:
            DataError: the first problem of the split whose reference cannot be read, so answers cannot be judged.
        """
        self._check_split(split)
        self.require(split)
        return super().problems(count, generator, split)

    def require(self, split: str, judged: bool = True) -> None:
        """Refuses a split without problems, and one that cannot be judged where that is wanted."""
        if judged and self.compares and split in self.unjudged:
            raise DataError(self.unjudged[split] + UNJUDGED)
        if not self._pools[split] and split == "train":
            raise ConfigError(
                "no training problem is left: every one that fits env.max_prompt_length="
                f"{self.max_prompt_length} is in env.eval_path too; give another file"
            )
        if not self._pools[split]:
            raise ConfigError(
                f"the pool of {split} problems is empty; raise env.held_out, name a file of held-out problems "
                "(env.eval_path), or set eval_episodes=0"
            )

    def _draw(self, count: int, generator: torch.Generator, split: str) -> list[Problem]:
        self._check_split(split)
        pool = self._pools[split]
        if split == "train":
            return pool.take(self._visited(count, generator, split, len(pool)))
        rounds = -(-count // len(pool))
        order = torch.cat([torch.randperm(len(pool), generator=generator) for _ in range(rounds)])[:count]
        return pool.take(order.tolist())

    def _draw_demonstrated(self, count: int, generator: torch.Generator) -> list[Problem]:
        pool = self._shows("train")
        if not pool:
            problems = self._pools["train"].take(range(min(AT_ONCE, len(self._pools["train"]))))
            if not any(problem.get("solution") for problem in problems):
                raise ConfigError(_nothing_said(problems))
            raise ConfigError(
                "the pool of demonstration problems is empty: no solution fits env.max_turn_tokens="
                f"{self.max_turn_tokens}; raise it"
            )
        return pool.take(self._visited(count, generator, "demonstration", len(pool)))

    def held_out_demonstrations(self, count: int) -> TensorDict | None:
        """Supervised rows of the first ``count`` held-out problems with a solution that fits; None without any."""
        pool = self._shows("eval")[:count]
        if not pool:
            return None
        return self.codec.rows([self._imitated(problem, None) for problem in pool], self.max_length)

    def _demonstrate(self, problem: Problem, style: str | None) -> list[Segment]:
        return [Segment(problem["solution"], trained=True, end=True)]

    # Epochs

    def _visited(self, count: int, generator: torch.Generator, name: str, size: int) -> list[int]:
        known = self._epochs.get(generator)
        if known is None:
            known = self._epochs[generator] = self._adopted(generator)
        if name not in known:
            known[name] = Epochs(size, self.drop_last)
        return known[name].draw(count, generator)

    def epoch(self, generator: torch.Generator) -> float | None:
        """Epochs that were drawn with a stream, the one under way as the share that was visited; None without any."""
        known = self._epochs.get(generator)
        return max(one.passed for one in known.values()) if known else None

    def _adopted(self, generator: torch.Generator) -> dict[str, Epochs]:
        """The epochs of a checkpoint that were drawn with a stream in the state of this one."""
        state = generator.get_state()
        for number, waiting in enumerate(self._waiting):
            if torch.equal(waiting["stream"], state):
                del self._waiting[number]
                return {name: Epochs.restored(one, self.drop_last) for name, one in waiting["epochs"].items()}
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Beside that of every task, the epochs of each stream, known by the state of the stream."""
        epochs = [
            {"stream": stream.get_state(), "epochs": {name: one.state_dict() for name, one in known.items()}}
            for stream, known in self._epochs.items()
        ]
        return {**super().state_dict(), "epochs": [*epochs, *self._waiting], "questions": self._digest}

    def twin(self) -> Self:
        """The same task with streams of its own, for evaluation: its file is not gone through again."""
        out = copy(self)
        out._epochs, out._waiting = WeakKeyDictionary(), []
        out._shuffler = torch.Generator().manual_seed(self._shuffler.initial_seed())
        return out

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`; whoever draws with a stream in the state of one of these goes on with it.

        Raises:
            CheckpointError: the training problems are others than they were.
        """
        if state.get("questions", self._digest) != self._digest:
            raise CheckpointError(
                "the training problems are not those that the run began with: the file of env.path has changed; put it "
                "back, or go on with resume_env=restart"
            )
        super().load_state_dict(state)
        self._epochs.clear()
        self._waiting = list(state.get("epochs", ()))


UNJUDGED = (
    "; imitation needs no reference, but rollouts and evaluation compare answers with it: give one, or a reward that "
    "reads none"
)


def _nothing_said(problems: Sequence[Problem]) -> str:
    """Why there is nothing to imitate in problems without a solution, and what would mend that."""
    start, end = (
        "the pool of demonstration problems is empty: ",
        "imitate nothing (agent=policy_gradient warm_start=none)",
    )
    talk = next((problem["messages"] for problem in problems if problem.get("messages")), None)
    if talk is not None:
        return (
            f"{start}no conversation ends with what the assistant said (the first one ends with role "
            f"{talk[-1]['role']!r}), and no record has a completion; end each with a message of role 'assistant', put "
            f"what is to be said into a column completion, or {end}"
        )
    return (
        f"{start}no record holds what is to be imitated, a completion, an assistant's message or a solution; name its "
        f"column with env.solution_key, or {end}"
    )


def _record(problem: Problem) -> int:
    return _hash(str(problem.get("record", problem["text"])))
