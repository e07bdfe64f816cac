"""Subgoals that an answer sets itself by marker texts, and the advantages and values of their three levels. HiPER."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.returns.segments import Segments, hierarchical_gae, segment_ends

LOW, HIGH, TERM = range(3)
"""Values of what is done under a subgoal, of a subgoal, and of keeping or leaving one."""


class Markers(NamedTuple):
    """The token ids of the texts that leave a subgoal, keep it, and end its wording; empty ones do not occur."""

    switch: Sequence[int] = ()
    keep: Sequence[int] = ()
    act: Sequence[int] = ()


class Pieces(NamedTuple):
    """An answer in pieces, each a decision over the subgoal, its wording, and what is done for it; all may be missing.

    Attributes:
        piece: ``[B, N]`` int64, non-decreasing, of the last piece that has begun.
        number: of pieces a row, P.
        starts: ``[B, P]`` bool, pieces with which a subgoal begins.
        decision, wording, action: ``[B, N]`` bool, disjoint; together the sampled tokens.
    """

    piece: Tensor
    number: int
    starts: Tensor
    decision: Tensor
    wording: Tensor
    action: Tensor

    @classmethod
    def of(cls, record: TensorDictBase, markers: Markers) -> Pieces:
        """Cuts rows where a turn begins, and before every marker that switches or keeps.

        The first piece of a row, and those that switch, begin a subgoal. Its wording is what stands between the
        decision and a marker ``act``; a piece without that marker has none.
        """
        tokens, mask, turn = record["tokens"], record["mask"], record["step_index"]
        switch, keep, act = (_found(tokens, mask, turn, ids) for ids in markers)
        decision = _covered(switch, len(markers.switch)) | _covered(keep, len(markers.keep))
        first, _ = segment_ends(turn, mask, record["reward"].shape[1])
        begins = first | switch | keep
        index = (begins.cumsum(1) - 1).clamp(min=0)
        number = int(index.max()) + 1
        column = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        start = _earliest(column, (begins & (index == 0)) | switch, index, number)
        acts = _earliest(column, act, index, number).gather(1, index)
        wording = mask & ~decision & (column < acts) & (acts < mask.shape[1])
        return cls(index, number, start < mask.shape[1], decision, wording, mask & ~decision & ~wording)

    def heads(self, record: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Where each level's value is read, and which pieces get its advantage.

        Returns:
            ``[B, N, 3]`` bool, one token a piece at most: the first of its own tokens of the level, else the piece's
            first; of :data:`HIGH` in pieces that begin a subgoal, of :data:`TERM` in those with a decision. And
            ``[B, P, 3]`` bool, pieces with tokens to which the level's advantage belongs.
        """
        mask = record["mask"]
        column = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        first = _earliest(column, mask, self.piece, self.number)
        places, owning = [], []
        for own, counts in zip(self._owners(), (mask, self.starting, self.decision), strict=True):
            place = _earliest(column, own, self.piece, self.number)
            owning.append(place < mask.shape[1])
            at = torch.where(place < mask.shape[1], place, first).gather(1, self.piece)
            has = _earliest(column, counts, self.piece, self.number).gather(1, self.piece) < mask.shape[1]
            places.append(mask & (column == at) & has)
        return torch.stack(places, -1), torch.stack(owning, -1)

    @property
    def starting(self) -> Tensor:
        """Tokens of pieces that begin a subgoal, ``[B, N]`` bool."""
        return self.starts.gather(1, self.piece) & (self.decision | self.wording | self.action)

    def _owners(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens that get each level's advantage: actions, wordings that begin a subgoal, decisions."""
        return self.action, self.wording & self.starting, self.decision

    def spread(self, advantage: Tensor) -> Tensor:
        """``[B, P, 3]`` to the tokens that each level is about, ``[B, N]``; 0 elsewhere."""
        whole = advantage.gather(1, self.piece.unsqueeze(-1).expand(-1, -1, 3))
        own = torch.stack(self._owners(), -1)
        return torch.where(own, whole, torch.zeros_like(whole)).sum(-1)


def subgoal_gae(pieces: Pieces, value: Tensor, read: Tensor, units: Segments, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and value targets of three levels over pieces. HiPER's HAE.

    Low and high are those of :func:`~unified_rl.returns.hierarchical_gae` with pieces for units. What is decided earns
    the discounted return up to the next subgoal and that one's value. An episode that is cut goes on in the last
    piece's own value (of its subgoal for the high level).

    Args:
        pieces: of the rows.
        value: ``[B, N, 3]`` of the tokens.
        read: ``[B, N, 3]`` bool, where they are read, see :meth:`Pieces.heads`.
        units: the rows' tokens gathered into pieces.
        lam: trace parameter of both levels.

    Returns:
        ``[B, P, 3]`` both, in the order of :data:`LOW`, :data:`HIGH`, :data:`TERM`.
    """
    index = pieces.piece.unsqueeze(-1).expand(-1, -1, 3)
    shape = (len(value), pieces.number, 3)
    each = value.new_zeros(shape).scatter_add(1, index, torch.where(read, value, torch.zeros_like(value)))
    low, high, term = each.unbind(-1)
    subgoal = (pieces.starts.cumsum(1) - 1).clamp(min=0)
    place = torch.arange(pieces.number, device=value.device).expand_as(subgoal)
    own = high.gather(1, torch.where(pieces.starts, place, 0).cummax(1).values)  # of the subgoal that a piece is under
    rest = (own, units.terminated, units.done, subgoal, units.valid, pieces.number, units.discount)
    of_low, of_high = hierarchical_gae(units.reward, low, high, *rest, lam, lam, low_next_value=low)
    of_term, _ = hierarchical_gae(units.reward, term, high, *rest, 1.0, lam, low_next_value=low)
    advantage = torch.stack([of_low, of_high, of_term], -1)
    return advantage, advantage + each


def _found(tokens: Tensor, mask: Tensor, turn: Tensor, ids: Sequence[int]) -> Tensor:
    """Where a run of sampled tokens of one turn that are these begins, ``[B, N]`` bool."""
    width, size = tokens.shape[1], len(ids)
    out = torch.zeros_like(mask)
    if not 0 < size <= width:
        return out
    wanted = torch.tensor(ids, dtype=tokens.dtype, device=tokens.device)
    same = (tokens.unfold(1, size, 1) == wanted).all(-1) & mask.unfold(1, size, 1).all(-1)
    out[:, : width - size + 1] = same & (turn[:, : width - size + 1] == turn[:, size - 1 :])
    return out


def _covered(begins: Tensor, size: int) -> Tensor:
    """Tokens of the markers that begin there, ``[B, N]`` bool."""
    out = begins.clone()
    for shift in range(1, size):
        out[:, shift:] |= begins[:, :-shift]
    return out


def _earliest(column: Tensor, where: Tensor, index: Tensor, number: int) -> Tensor:
    """The first column of each piece at which a bool holds, ``[B, P]``; N where it nowhere does."""
    width = column.shape[1]
    empty = torch.full((len(column), number), width, dtype=torch.int64, device=column.device)
    return empty.scatter_reduce(1, index, torch.where(where, column, width), "amin")
