"""Groups of answers of before: of any time and by their return, or of the last collections as they were."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from unified_rl.configurable import configurable
from unified_rl.errors import ConfigError
from unified_rl.protocols import LanguageEnv, LanguagePolicy
from unified_rl.ranges import Count, Fraction, Share, UpperBound, ranged
from unified_rl.replay.pool import AnswerPool
from unified_rl.rollout.feed import pack_rows, unpack_rows
from unified_rl.rollout.sources.base import Request
from unified_rl.units import COUNTED, Source, row_return


class _Groups:
    """What both share: groups that join as many fresh ones, marked OFFLINE, with their log-probs and versions."""

    group_size = 1
    joins = False

    def check(self, env: LanguageEnv, policy: LanguagePolicy, setting: str) -> None:
        """Every task has prompts."""

    def check_group(self, group_size: int, setting: str) -> None:
        """Refuses groups of one, of which nothing is compared; notes the size.

        Raises:
            ConfigError: names what works.
        """
        if group_size < 2:
            raise ConfigError(
                f"{setting} brings groups of answers to one prompt, and rollout.group_size=1 has none: sample several, "
                "or use replay=mixture"
            )
        self.group_size = group_size

    def groups(self, prompts: int) -> int:
        """Groups that join so many fresh ones."""
        raise NotImplementedError

    def most(self, prompts: int) -> int:
        """Their rows."""
        return self.groups(prompts) * self.group_size


def own_rows(rows: TensorDict) -> TensorDict:
    """The policy's own answers of a collection that take part in updates."""
    own = rows["source"] == int(Source.ONLINE)
    return rows[own & rows[COUNTED]] if COUNTED in rows.keys() else rows[own]


@configurable
@ranged()
class Replays(_Groups):
    """Of every draw of a group, a share is fresh, and the others are kept answers to one prompt, good ones first. TBA.

    A prompt is drawn like any other, and as many of its answers as a group has, one after the other in proportion to
    ``exp(return / temperature)``. No text is kept twice. 2503.18929.

    Args:
        recent: share of the groups that are fresh, as far as the pool has others.
        temperature: of the draw; infinity draws any alike.
        answers: kept of each prompt, the newest.
        prompts: kept; the one that came first leaves first.
    """

    judged_apart = True
    """A group holds answers that were judged at several times."""

    def __init__(
        self, recent: Fraction = 0.95, temperature: UpperBound = 1.0, answers: Count = 64, prompts: Count = 4096
    ) -> None:
        self.recent, self.temperature = recent, temperature
        self.answers, self.prompts = answers, prompts
        self.pool = AnswerPool(prompts, answers, 1)

    def groups(self, prompts: int) -> int:
        """So many that ``recent`` of all are fresh."""
        return round(prompts * (1.0 - self.recent) / self.recent)

    def rows(self, request: Request) -> TensorDict | None:
        """Groups of kept answers."""
        count = self.groups(len(request.problems))
        if not count or self.pool.rows is None:
            return None
        rng = np.random.default_rng(int(torch.randint(2**62, (), generator=request.generator)))
        total = row_return(self.pool.rows).double().numpy().reshape(-1, self.answers)
        places = self.pool.draw(count, [1.0], rng).tolist()
        drawn = [self.pool.likely(at, self.group_size, total[at], self.temperature, rng) for at in places]
        drawn = [slots for slots in drawn if len(slots) > 1]  # of one answer nothing is compared
        if not drawn:
            return None
        rows = self.pool.read(np.concatenate(drawn))
        sizes = torch.tensor([len(slots) for slots in drawn])
        rows["group"] = request.new_groups(len(drawn)).repeat_interleave(sizes)
        return rows.set("source", torch.full_like(rows["source"], int(Source.OFFLINE)))

    def observe(self, rows: TensorDict) -> None:
        """Takes in the collection's own answers."""
        own = own_rows(rows)
        for number in own["prompt_id"].unique().tolist():
            self.pool.put(number, None, 0, own[own["prompt_id"] == number])

    def state_dict(self) -> dict[str, Any]:
        """The pool."""
        return {"pool": self.pool.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.pool.load_state_dict(state["pool"])


@configurable
@ranged()
class Windows(_Groups):
    """A share of every update are whole groups of the last collections, up to some update. ReMix, 2507.06892.

    Args:
        share: of the groups of an update.
        windows: collections of before that they are drawn from.
        until: updates behind which everything is fresh; None replays to the end.
    """

    def __init__(self, share: Share = 0.4, windows: Count = 2, until: Count | None = None) -> None:
        self.share, self.windows, self.until = share, windows, until
        self._kept: list[TensorDict] = []

    def groups(self, prompts: int) -> int:
        """So many that they are the share of all."""
        return round(prompts * self.share / (1.0 - self.share))

    def rows(self, request: Request) -> TensorDict | None:
        """Groups of the last collections, with new numbers."""
        count = self.groups(len(request.problems))
        if not count or not self._kept or (self.until is not None and request.version >= self.until):
            return None
        kept: TensorDict = torch.cat(self._kept)  # type: ignore[assignment]
        numbers = kept["group"].unique()
        if not len(numbers):  # no answer of theirs took part
            return None
        drawn = numbers[torch.randperm(len(numbers), generator=request.generator)[:count]]
        place = (kept["group"][:, None] == drawn).int()
        rows = kept[place.any(-1)].clone()
        rows["group"] = request.new_groups(len(drawn))[place[place.any(-1)].argmax(-1)]
        return rows.set("source", torch.full_like(rows["source"], int(Source.OFFLINE)))

    def observe(self, rows: TensorDict) -> None:
        """Keeps the last collections."""
        self._kept = [*self._kept, own_rows(rows).clone()][-self.windows :]

    def state_dict(self) -> dict[str, Any]:
        """Their rows."""
        return {"kept": [pack_rows(rows) for rows in self._kept]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self._kept = [unpack_rows(rows) for rows in state["kept"]]
