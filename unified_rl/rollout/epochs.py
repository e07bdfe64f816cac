"""The order in which a finite set is visited: every member once before any comes again."""

from __future__ import annotations

from typing import Any

import torch

from unified_rl.errors import ConfigError


class Epochs:
    """Shuffled passes over ``size`` members, one permutation an epoch, drawn from a stream as epochs begin.

    Args:
        size: members.
        drop_last: end an epoch with its last whole draw; else a draw takes the rest and the start of the next epoch.
    """

    def __init__(self, size: int, drop_last: bool = False) -> None:
        self.size, self.drop_last = size, drop_last
        self.number = self.at = 0
        self._begun: torch.Tensor | None = None
        self._order: torch.Tensor | None = None

    @property
    def passed(self) -> float:
        """Epochs so far, the one under way as the share that was visited."""
        return max(self.number - 1, 0) + self.at / self.size

    def draw(self, count: int, generator: torch.Generator) -> list[int]:
        """``count`` members.

        Raises:
            ConfigError: ``drop_last``, and an epoch has fewer.
        """
        if self.drop_last and count > self.size:
            raise ConfigError(
                f"env.drop_last=true, but {count} problems are drawn at once and there are {self.size}; set "
                "env.drop_last=false or draw fewer"
            )
        if self.drop_last and self.at + count > self.size:
            self.at = self.size
        out: list[int] = []
        while len(out) < count:
            if self._begun is None or self.at >= self.size:
                self._begin(generator)
            taken = self._permutation()[self.at : self.at + count - len(out)].tolist()
            self.at += len(taken)
            out += taken
        return out

    def _begin(self, generator: torch.Generator) -> None:
        self._begun = generator.get_state()
        self._order = torch.randperm(self.size, generator=generator)
        self.number, self.at = self.number + 1, 0

    def _permutation(self) -> torch.Tensor:
        """That of the epoch under way, which its stream's state gives again: it is not kept in checkpoints."""
        if self._order is None:
            assert self._begun is not None
            again = torch.Generator()
            again.set_state(self._begun)
            self._order = torch.randperm(self.size, generator=again)
        return self._order

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, and the stream's state when the epoch began."""
        return {"size": self.size, "number": self.number, "at": self.at, "begun": self._begun}

    @classmethod
    def restored(cls, state: dict[str, Any], drop_last: bool) -> Epochs:
        """Of :meth:`state_dict`."""
        out = cls(int(state["size"]), drop_last)
        out.number, out.at, out._begun = int(state["number"]), int(state["at"]), state["begun"]
        return out
