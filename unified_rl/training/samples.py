"""Conversations of a run as a reader wants them: what was asked, what was answered, and what it earned."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.errors import CheckpointError, ConfigError
from unified_rl.files import check_listed
from unified_rl.protocols import LanguageEnv
from unified_rl.rollout.conversation import SCORES, Told
from unified_rl.training.growing import Row, parse
from unified_rl.training.seeding import generator
from unified_rl.units import Source

FILE = "samples.jsonl"
LONGEST = 20_000
"""Characters of a prompt or an answer that are kept; of longer ones the middle is left out."""
REFERENCES = ("reference", "answer", "solution", "target", "value", "secret")
"""Entries of a problem that say what is right, the first that it has."""
ORDERS = ("best", "worst", "random", "latest")


class Details(NamedTuple):
    """What a row of a collection was, beyond what the record holds.

    Attributes:
        row: its place in the collection.
        reference: what is right, where the task says so.
        rewards: the task's own numbers of the conversation.
    """

    row: int
    reference: str | None
    rewards: dict[str, float]


def chosen(count: int, rows: int, seed: int, name: str) -> list[int]:
    """Places of ``count`` of ``rows`` rows, drawn by the run's seed and a name, in order."""
    order = torch.randperm(rows, generator=generator(seed, name))[:count]
    return sorted(order.tolist())


def reference_of(problem: Mapping[str, Any]) -> str | None:
    """What is right for a problem, as text; None where it does not say."""
    for key in REFERENCES:
        if isinstance(problem.get(key), str | int | float):
            return str(problem[key])
    return None


def numbers_of(info: Mapping[str, Tensor], row: int) -> dict[str, float]:
    """The task's numbers of one conversation, those of reward functions by the functions' names.

    ``truncated`` is not among them, which a sample has of its own; NaN stands where a function gave nothing.
    """
    left_out = ("truncated", "counted", "scored")
    return {
        key.removeprefix(SCORES): float(value[row])
        for key, value in info.items()
        if key not in left_out and not (key.startswith(SCORES) and key.endswith("_none"))
    }


class SampleBook:
    """Makes the rows of ``samples.jsonl``.

    Args:
        env: the task, whose tokenizer spells the tokens.
        count: rows at a time.
        seed: of the run; which conversations are written follows from it and the update.
    """

    def __init__(self, env: LanguageEnv, count: int, seed: int) -> None:
        self.tokenizer, self.count, self.seed = env.tokenizer, count, seed

    def of_collection(self, told: Told, first: int) -> list[list[Any]]:
        """:class:`Details` of some conversations, as plain lists that a checkpoint can hold.

        Args:
            told: the conversations of a collection.
            first: the episode of the first one.
        """
        talk, info = told
        places = chosen(self.count, len(talk.problems), self.seed, f"samples/episode/{first}")
        return [[row, reference_of(talk.problems[row]), numbers_of(info, row)] for row in places]

    def of_update(
        self, taken: TensorDictBase, known: Sequence[Sequence[Any]], trained: TensorDictBase | None, update: int
    ) -> list[Row]:
        """Conversations of one update.

        Args:
            taken: the rows of the collection that it took.
            known: :class:`Details` of some of them.
            trained: the rows that it trained on, with ``advantage``; None of an agent that does not show them.
            update: its number.

        Returns:
            The rows of ``known``, each with its advantage where it was trained on; where none of them was (a replay
            drew others, or their rollout tells no details), rows that were.
        """
        place = {} if trained is None else {int(e): i for i, e in enumerate(_episodes(trained))}
        episodes = _episodes(taken)
        found = [Details(*one) for one in known]
        if trained is not None and len(trained) and not any(int(episodes[d.row]) in place for d in found):
            picked = chosen(self.count, len(trained), self.seed, f"samples/{update}")
            return [self._row(trained, i, Details(i, None, {}), _advantage(trained, i)) for i in picked]
        out = []
        for one in found:
            at = place.get(int(episodes[one.row]))
            advantage = None if at is None or trained is None else _advantage(trained, at)
            out.append(self._row(taken, one.row, one, advantage))
        return out

    def _row(self, rows: TensorDictBase, at: int, details: Details, advantage: float | None) -> Row:
        mask, real = rows["mask"][at], rows["token_mask"][at]
        tokens = rows["tokens"][at][real].tolist()
        begin = int(mask.int().argmax()) if bool(mask.any()) else len(tokens)
        said = rows["policy_version"][at][mask]
        return {
            "split": "train",
            "prompt_id": int(rows["prompt_id"][at]),
            "prompt": self.spell(tokens[:begin]),
            "answer": self.spell(tokens[begin:]),
            "reference": details.reference,
            "reward": float(rows["reward"][at].sum()),
            "rewards": details.rewards,
            "advantage": advantage,
            "truncated": bool(rows["truncated"][at].any()),
            "tokens": int(mask.sum()),
            "policy_version": int(said[-1]) if len(said) else None,
            "source": Source(int(rows["source"][at])).name.lower() if "source" in rows.keys() else "online",
        }

    def of_prompts(self, count: int) -> list[int]:
        """Which of so many held-out prompts are written, the same ones every time."""
        return chosen(self.count, count, self.seed, "samples/evaluation")

    def of_evaluation(self, told: Told, version: int) -> list[Row]:
        """Conversations of an evaluation by the policy of a version."""
        talk, info = told
        return [self._answered(talk, info, at, version) for at in range(len(talk.problems))]

    def _answered(self, talk: Any, info: Mapping[str, Tensor], at: int, version: int) -> Row:
        problem = talk.problems[at]
        tokens = talk.tokens[at, : int(talk.length[at])].tolist()
        begin = len(problem["prompt"])
        return {
            "split": "eval",
            "prompt_id": int(problem["prompt_id"]),
            "prompt": self.spell(tokens[:begin]),
            "answer": self.spell(tokens[begin:]),
            "reference": reference_of(problem),
            "reward": float(talk.reward[at].sum()),
            "rewards": numbers_of(info, at),
            "advantage": None,
            "truncated": bool(talk.truncated[at].any()),
            "tokens": int(talk.mask[at].sum()),
            "policy_version": version,
            "source": "online",
        }

    def spell(self, tokens: Sequence[int]) -> str:
        """Their text with special tokens, the middle left out of a long one."""
        text = str(self.tokenizer.decode(list(tokens), skip_special_tokens=False))
        if len(text) <= LONGEST:
            return text
        half = LONGEST // 2
        return f"{text[:half]} [... {len(text) - 2 * half} characters left out ...] {text[-half:]}"


def _episodes(rows: TensorDictBase) -> list[int]:
    episode = rows["episode"]
    out: list[int] = (episode if episode.dim() == 1 else episode[:, 0]).tolist()
    return out


def _advantage(rows: TensorDictBase, at: int) -> float | None:
    """The mean advantage over the row's own tokens; None where the update made none."""
    if "advantage" not in rows.keys():
        return None
    value = rows["advantage"][at]
    if value.dim() and value.shape == rows["mask"][at].shape:
        mask = rows["mask"][at]
        return float(value[mask].mean()) if bool(mask.any()) else None
    return float(value.float().mean())


# ------------------------------------------------------------------------------------------------------- reading


def read_samples(run: Path) -> list[Row]:
    """The written conversations of a run, in order.

    Raises:
        CheckpointError: no such run, or one that wrote none.
        DamageError: the run's manifest lists the file, and it is missing or altered.
    """
    path = run / FILE
    if not run.is_dir():
        raise CheckpointError(f"there is no run folder {run}")
    check_listed(path)
    if not path.is_file():
        raise CheckpointError(
            f"{run} holds no {FILE}: runs of language tasks write it at every evaluation, unless samples_rows=0"
        )
    return [row for row in parse(path.read_bytes())[0] if isinstance(row, dict)]


def select(
    rows: Sequence[Row],
    order: str = "latest",
    *,
    count: int | None = 5,
    prompt: int | None = None,
    split: str | None = None,
    seed: int = 0,
) -> list[Row]:
    """Some of a run's conversations.

    Args:
        rows: as :func:`read_samples` gives them.
        order: ``latest`` (of the last update that wrote any), ``best`` and ``worst`` by reward (equal ones: the latest
            first), or ``random``.
        count: how many; None gives all.
        prompt: those of one ``prompt_id`` alone, in the order of their updates unless ``order`` says otherwise.
        split: ``train`` or ``eval``.
        seed: of ``random``.

    Raises:
        ConfigError: an unknown order or split, or nothing is left.
    """
    if order not in ORDERS:
        raise ConfigError(f"order={order!r} is none of {', '.join(ORDERS)}")
    if split not in (None, "train", "eval"):
        raise ConfigError(f"split={split!r} must be train or eval")
    found = [row for row in rows if split in (None, row.get("split"))]
    if prompt is not None:
        found = [row for row in found if row.get("prompt_id") == prompt]
    if not found:
        what = "conversation" if split is None else f"{split} conversation"
        raise ConfigError(f"the run wrote no {what}" + ("" if prompt is None else f" of prompt {prompt}"))
    if order == "random":
        found = random.Random(seed).sample(found, len(found))
    elif order in ("best", "worst"):
        sign = -1.0 if order == "best" else 1.0
        found = sorted(found, key=lambda row: (sign * (row.get("reward") or 0.0), -row["update"]))
    elif prompt is None:
        last = found[-1]["update"]
        found = [row for row in found if row["update"] == last]
    return found[:count]
