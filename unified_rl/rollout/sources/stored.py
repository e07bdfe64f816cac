"""Answers that were sampled before: in this run, or in another one."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict

from unified_rl.configurable import configurable
from unified_rl.errors import ConfigError
from unified_rl.protocols import LanguageEnv, LanguagePolicy
from unified_rl.ranges import Count, Whole, ranged
from unified_rl.replay import read_rows
from unified_rl.rollout.feed import pack_rows, unpack_rows
from unified_rl.rollout.sources.base import Joining, Request
from unified_rl.units import COUNTED, Source


@configurable
@ranged()
class Pool:
    """Own earlier answers, which join the groups of the same prompts again; source OFFLINE.

    Rows keep their log-probs and versions, so that a correction weighs them as what they are. ExGRPO, 2510.02245,
    and its relatives replay such answers.

    Args:
        per_group: answers that join the group of a prompt at most.
        size: answers kept of each prompt.
        prompts: prompts remembered; the one longest unseen is forgotten first.
        keep: ``best`` (largest return, newer first among equals) or ``newest``.
        at_least: return that an answer needs to be kept; None keeps any.
        when: ``always``, or ``failed``: where no answer of the collection has a positive return.

    Raises:
        ConfigError: a number below 1, or an unknown name.
    """

    def __init__(
        self,
        per_group: Count = 1,
        size: Count = 4,
        prompts: Count = 4096,
        keep: str = "best",
        at_least: float | None = None,
        when: str = "always",
    ) -> None:
        for name, chosen, known in (("keep", keep, ("best", "newest")), ("when", when, ("always", "failed"))):
            if chosen not in known:
                raise ConfigError(f"a pool's {name}={chosen} is unknown; choose {' or '.join(known)}")
        self.per_group, self.size, self.prompts = per_group, size, prompts
        self.keep, self.at_least, self.when = keep, at_least, when
        self._answers: dict[int, list[TensorDict]] = {}

    def check(self, env: LanguageEnv, policy: LanguagePolicy, setting: str) -> None:
        """Every task has prompts."""

    def most(self, prompts: int) -> int:
        """Rows of a collection at most."""
        return prompts * self.per_group

    def rows(self, request: Request) -> TensorDict | None:
        """Kept answers to the collection's prompts, with the groups of now."""
        found = []
        failed = (request.reward <= 0).all(-1).tolist()
        for problem, group, lost in zip(request.problems, request.groups.tolist(), failed, strict=True):
            if lost or self.when == "always":
                for row in self._answers.get(problem["prompt_id"], [])[: self.per_group]:
                    again = row.clone()
                    again["group"] = torch.full_like(row["group"], group)
                    again["source"] = torch.full_like(row["source"], int(Source.OFFLINE))
                    found.append(again)
        return torch.cat(found) if found else None

    def observe(self, rows: TensorDict) -> None:
        """Takes in the collection's own answers."""
        total = rows["reward"].sum(-1)
        wanted = rows["source"] == int(Source.ONLINE)
        if COUNTED in rows.keys():
            wanted &= rows[COUNTED]
        if self.at_least is not None:
            wanted &= total >= self.at_least
        for at in wanted.nonzero().flatten().tolist():
            self._take(int(rows["prompt_id"][at]), rows[at : at + 1].clone())
        while len(self._answers) > self.prompts:
            del self._answers[next(iter(self._answers))]

    def _take(self, prompt: int, row: TensorDict) -> None:
        kept = [row, *self._answers.pop(prompt, [])]  # newest first; sorting is stable
        if self.keep == "best":
            kept.sort(key=lambda one: -float(one["reward"].sum()))
        self._answers[prompt] = kept[: self.size]

    def state_dict(self) -> dict[str, Any]:
        """Every kept row, in order."""
        rows = [row for kept in self._answers.values() for row in kept]
        return {"rows": pack_rows(torch.cat(rows)) if rows else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self._answers = {}
        if state["rows"] is None:
            return
        for row in unpack_rows(state["rows"]).split(1):
            self._answers.setdefault(int(row["prompt_id"]), []).append(row.clone())


@configurable
@ranged()
class Recorded(Joining):
    """Rows that another run recorded, with their rewards and log-probs; source OFFLINE.

    Args:
        data: folder of rows (``unified-rl evaluate RUN --record FOLDER``) of the same task and record width.
        per_group: recorded answers to each prompt of the collection, at most; they join its group.
        rows: instead: whole recorded groups drawn at random, at most so many rows. Their versions are written as 0:
            another run's weights have no number here.

    Raises:
        CheckpointError: ``data`` is missing or damaged.
        ConfigError: not exactly one of ``per_group`` and ``rows``.
    """

    def __init__(self, data: str, per_group: Whole = 0, rows: Whole = 0) -> None:
        super().__init__(per_group, rows)
        self.data = data
        stored = read_rows(data)
        self.stored = stored.reshape(stored.numel())

    def check(self, env: LanguageEnv, policy: LanguagePolicy, setting: str) -> None:
        """Refuses rows of another width, and groups that are larger than a batch.

        Raises:
            ConfigError: either.
        """
        width = self.stored["tokens"].shape[-1] if "tokens" in self.stored.keys() else None
        if width != env.max_length:
            held = "no tokens" if width is None else f"rows of {width} tokens"
            raise ConfigError(f"{setting}.data={self.data} holds {held}; the task's records have {env.max_length}")
        self._places: dict[int, list[int]] = {}
        key = "prompt_id" if self.joins else "group"
        for at, name in enumerate(self.stored[key].tolist()):
            self._places.setdefault(name, []).append(at)
        smallest = min(map(len, self._places.values()))
        if not self.joins and smallest > self.batch:
            raise ConfigError(f"{setting}.rows={self.batch} is less than one recorded group of {smallest} rows")

    def rows(self, request: Request) -> TensorDict | None:
        """Recorded answers to the collection's prompts, or whole groups."""
        at, group = self._answers(request) if self.joins else self._groups(request)
        if not at:
            return None
        rows = self.stored[torch.tensor(at)].clone()
        rows["group"] = torch.tensor(group, dtype=torch.int64)
        rows["source"] = torch.full_like(rows["source"], int(Source.OFFLINE))
        rows["policy_version"] = torch.zeros_like(rows["policy_version"])
        return rows

    def _answers(self, request: Request) -> tuple[list[int], list[int]]:
        at, group = [], []
        for problem, number in zip(request.problems, request.groups.tolist(), strict=True):
            found = self._places.get(problem["prompt_id"], [])[: self.per_group]
            at += found
            group += [number] * len(found)
        return at, group

    def _groups(self, request: Request) -> tuple[list[int], list[int]]:
        places = list(self._places.values())
        at: list[int] = []
        group: list[int] = []
        for index in torch.randperm(len(places), generator=request.generator).tolist():
            if len(at) + len(places[index]) <= self.batch:
                at += places[index]
                group += [int(request.new_groups(1))] * len(places[index])
        return at, group
