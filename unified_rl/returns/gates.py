"""Gates: bool columns that say which rows a term reads, from the outcomes of episodes and of their groups."""

from __future__ import annotations

from collections.abc import Callable

from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.returns.groups import Groups
from unified_rl.units import Source, row_return


def success_at_most(record: TensorDictBase, *, count: int = 0, threshold: float = 0.5) -> Tensor:
    """Rows ``[B]`` of groups with at most ``count`` own rows of return above ``threshold``. HPT: 0 or 2."""
    own = record["source"] <= int(Source.OFFLINE)
    won = Groups.of(record).sum(((row_return(record) > threshold) & own).float())
    return won <= count


def own_or_unsolved(record: TensorDictBase, *, threshold: float = 0.5) -> Tensor:
    """Own rows ``[B]``, and those of others where no own row of the group returns more than ``threshold``. DaGRPO."""
    own = record["source"] <= int(Source.OFFLINE)
    out: Tensor = own | success_at_most(record, count=0, threshold=threshold)
    return out


def ended(record: TensorDictBase) -> Tensor:
    """Rows ``[B]`` in which an episode ends: at a valid step that is terminated or truncated.

    In a simulation a row is a piece of an episode, and what was cut off says little of how the episode came out.
    """
    out: Tensor = ((record["terminated"] | record["truncated"]) & record["step_mask"]).any(-1)
    return out


GATES: dict[str, Callable[..., Tensor]] = {
    "success_at_most": success_at_most,
    "own_or_unsolved": own_or_unsolved,
    "ended": ended,
}
