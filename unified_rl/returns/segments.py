"""Credit over segments (turns, steps, subgoals) by the same scan as over units.

A segment is a run of units that counts as one decision: its reward is the (discounted) sum of theirs, its value that of
its first unit, its discount the product of theirs. Sources: StepPO (2604.18401) for turns; hierarchical estimates after
Sutton, Precup and Singh, Between MDPs and Semi-MDPs (1999).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unified_rl.errors import RecordError
from unified_rl.returns.scan import Trajectory, gae


@dataclass(frozen=True)
class Segments:
    """Units gathered into segments.

    Attributes:
        reward, value, discount: ``[B, S]`` float; reward summed, value of the first unit, product of discounts.
        terminated, done: ``[B, S]`` bool, of any unit.
        last_next_value: ``[B, S]``, the successor's value at the last unit.
        valid: ``[B, S]`` bool, which segments hold a unit; empty ones are transparent to the scans.
        segment, mask: ``[B, N]``, where the units went.
    """

    reward: Tensor
    value: Tensor
    discount: Tensor
    terminated: Tensor
    done: Tensor
    last_next_value: Tensor
    valid: Tensor
    segment: Tensor
    mask: Tensor

    @classmethod
    def of(
        cls,
        reward: Tensor,
        value: Tensor,
        next_value: Tensor,
        terminated: Tensor,
        done: Tensor,
        segment: Tensor,
        mask: Tensor,
        number: int,
        gamma: float | Tensor = 1.0,
    ) -> Segments:
        """Gathers units.

        Args:
            reward, value, next_value: ``[B, N]`` float; anything where masked.
            terminated, done: ``[B, N]`` bool.
            segment: ``[B, N]`` int64, non-decreasing in a row, below ``number``.
            mask: ``[B, N]`` bool.
            number: segments a row, S.
            gamma: discount from one unit to the next; a float or ``[B, N]``.

        Raises:
            RecordError: shapes disagree, or an episode ends inside a segment.
        """
        for name, x in (("value", value), ("segment", segment), ("mask", mask), ("done", done)):
            if x.shape != reward.shape:
                raise RecordError(f"{name} has shape {tuple(x.shape)}, but reward has {tuple(reward.shape)}")
        first, last = segment_ends(segment, mask, number)
        done = (done | terminated) & mask
        if bool((done & ~last).any()):
            raise RecordError("an episode ends inside a segment: number segments anew in every episode")
        reward = reward.detach() if reward.dtype == torch.float64 else reward.detach().float()
        step = torch.as_tensor(gamma, dtype=reward.dtype, device=reward.device).expand_as(reward)
        log_step = torch.where(mask, step, 1.0).clamp(min=1e-30).log()
        before = log_step.cumsum(1) - log_step  # log discount from the row's start
        start = _sum(before, segment, first, number)
        inside = (before - start.gather(1, segment)).exp()

        def total(x: Tensor, where: Tensor) -> Tensor:
            return _sum(x.detach().to(reward.dtype), segment, where, number)

        return cls(
            reward=total(inside * reward, mask),
            value=total(value, first),
            discount=total(log_step, mask).exp(),
            terminated=total(terminated, last) > 0,
            done=total(done, last) > 0,
            last_next_value=total(next_value, last),
            valid=total(torch.ones_like(reward), mask) > 0,
            segment=segment,
            mask=mask,
        )

    def spread(self, x: Tensor) -> Tensor:
        """``x [B, S]`` for every unit of each segment, ``[B, N]``; 0 where masked."""
        return torch.where(self.mask, x.gather(1, self.segment), 0.0)

    def gae(self, lam: float) -> tuple[Tensor, Tensor]:
        """Advantage and value target of every segment, ``[B, S]``; a segment's successor is the next one's value."""
        return gae(self.reward, self.value, self.next_value, self.terminated, self.done, self.discount, lam, self.valid)

    @property
    def next_value(self) -> Tensor:
        """Value of the next segment's first unit; that of the true successor where the episode or the row ends."""
        path = Trajectory(self.reward, self.terminated, self.done, 1.0, self.valid)
        return torch.where(self.final, self.last_next_value, path.ahead(self.value))

    @property
    def final(self) -> Tensor:
        """Segments behind which the episode or the row ends, ``[B, S]`` bool."""
        path = Trajectory(self.reward, self.terminated, self.done, 1.0, self.valid)
        return self.done | (path.following == self.valid.shape[1])


def segment_gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    done: Tensor,
    segment: Tensor,
    mask: Tensor,
    number: int,
    gamma: float | Tensor = 1.0,
    lam: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """GAE over segments, the same advantage for every unit of one. StepPO, 2604.18401.

    Args: those of :meth:`Segments.of` and the trace parameter.

    Returns:
        Advantage ``[B, N]`` (0 where masked) and the value target, which is for each segment's first unit and is
        repeated over it, ``[B, N]``.
    """
    segments = Segments.of(reward, value, next_value, terminated, done, segment, mask, number, gamma)
    advantage, target = segments.gae(lam)
    return segments.spread(advantage), segments.spread(target)


def hierarchical_gae(
    reward: Tensor,
    low_value: Tensor,
    high_value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    done: Tensor,
    segment: Tensor,
    mask: Tensor,
    number: int,
    gamma: float | Tensor = 1.0,
    low_lam: float = 0.95,
    high_lam: float = 0.95,
    low_next_value: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Two levels of credit: inside a segment (a subgoal) unit by unit, and between segments as a semi-MDP. HiPER's HAE.

    The low level's trace stops at the end of each segment, where it bootstraps from the next segment's high value.

    Args:
        low_value, high_value: ``[B, N]``; of the high values, those at the segments' first units count.
        next_value: ``[B, N]``, the high value of the true successor; used where an episode or the row ends.
        low_next_value: ``[B, N]``, the low level's there; None is the high one.

    The others are those of :meth:`Segments.of`.

    Returns:
        Low advantage of each unit, high advantage of its segment, both ``[B, N]``, 0 where masked.
    """
    segments = Segments.of(reward, high_value, next_value, terminated, done, segment, mask, number, gamma)
    high = segments.spread(segments.gae(high_lam)[0])
    _, last = segment_ends(segment, mask, number)
    inner = torch.cat([low_value[:, 1:], low_value[:, -1:]], 1)
    following = torch.where(last, segments.next_value.gather(1, segment).to(low_value.dtype), inner)
    if low_next_value is not None:
        following = torch.where(last & segments.final.gather(1, segment), low_next_value, following)
    low, _ = gae(reward, low_value, following, terminated, done | last, gamma, low_lam, mask)
    return low, high


def _sum(x: Tensor, segment: Tensor, where: Tensor, number: int) -> Tensor:
    """Sum of ``x [B, N]`` over the chosen units of each segment, ``[B, S]``."""
    return x.new_zeros(x.shape[0], number).scatter_add(1, segment, torch.where(where, x, 0.0).to(x.dtype))


def segment_ends(segment: Tensor, mask: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Which units are the first and the last masked-in ones of their segment, ``[B, N]`` bool."""
    count = torch.zeros(mask.shape[0], number, dtype=torch.int64, device=mask.device).scatter_add(
        1, segment, mask.long()
    )
    end = count.cumsum(1)
    place = mask.cumsum(1)
    return mask & (place == (end - count).gather(1, segment) + 1), mask & (place == end.gather(1, segment))


def to_segments(
    reward: Tensor, value: Tensor, segment: Tensor, mask: Tensor, number: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Units to segments without discount, to run any scan on whole segments.

    Args:
        reward, value: ``[B, N]``.
        segment: ``[B, N]`` int64, non-decreasing in a row.
        mask: ``[B, N]`` bool.
        number: segments a row, S.

    Returns:
        Summed rewards, the values at each segment's first unit, and which segments hold a unit, ``[B, S]``.
    """
    first, _ = segment_ends(segment, mask, number)
    ones = torch.ones_like(reward)
    valid = _sum(ones, segment, mask, number) > 0
    return _sum(reward, segment, mask, number), _sum(value, segment, first, number), valid
