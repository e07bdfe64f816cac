"""Problems small enough to list every trajectory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

END = 0
"""The token that ends an answer."""


@dataclass(frozen=True)
class Problem:
    """Every trajectory of a finite problem, one a row.

    Attributes:
        name: what it is called in tables.
        state: ``[B, N]`` int64, what the policy sees before each unit; 0 where masked.
        action: ``[B, N]`` int64, what it did; 0 where masked.
        mask: ``[B, N]`` bool.
        node: ``[B, N]`` int64, what exact values depend on: the state, and the time where that matters.
        reward: ``[B, N]`` float64, that of each unit; an outcome reward sits on the last unit.
        chance: ``[B]`` float64, log-probability of the environment's own random choices.
        states, actions, nodes: how many there are.
        outcome: True where a row is one step with one reward, as an answer is; False where every unit is a step.
    """

    name: str
    state: Tensor
    action: Tensor
    mask: Tensor
    node: Tensor
    reward: Tensor
    chance: Tensor
    states: int
    actions: int
    nodes: int
    outcome: bool

    @property
    def returns(self) -> Tensor:
        """Each row's summed reward, ``[B]``."""
        return self.reward.sum(-1)

    @property
    def to_go(self) -> Tensor:
        """Sum of the rewards from each unit on, ``[B, N]``."""
        return self.reward.flip(-1).cumsum(-1).flip(-1)

    @property
    def binary(self) -> bool:
        """Whether every return is 0 or 1."""
        return bool(((self.returns == 0) | (self.returns == 1)).all())


def token_tree(*, outcome: bool = True, graded: bool = False, vocabulary: int = 4, horizon: int = 5) -> Problem:
    """All answers of up to ``horizon`` tokens, of which one more than ``vocabulary`` ends the answer.

    Token ``a`` is worth ``a``. With ``outcome``, an answer is right (reward 1) if it ends by itself, is not empty and
    is worth a multiple of 3; otherwise each token earns 0.5 where the answer so far is worth a multiple of 3, and costs
    0.1 where it is not. ``graded`` pays a right answer the square of its length's share of the horizon, so that short
    right answers, which are found first, lead away from long ones.

    With the defaults there are 1365 answers and 341 states (the tokens so far).
    """
    digits = torch.arange((vocabulary + 1) ** horizon)
    powers = (vocabulary + 1) ** torch.arange(horizon - 1, -1, -1)
    action = digits[:, None] // powers % (vocabulary + 1)
    ended = (action == END).cumsum(-1) > 0
    mask = torch.cat([torch.ones_like(ended[:, :1]), ~ended[:, :-1]], -1)
    listed = ((action == END) | mask).all(-1)
    action, mask, ended = action[listed], mask[listed], ended[listed]
    state = _prefix_index(action, vocabulary).masked_fill(~mask, 0)
    worth = action.cumsum(-1)
    if outcome:
        right = ended[:, -1] & (worth[:, -1] > 0) & (worth[:, -1] % 3 == 0)
        last = mask & (mask.cumsum(-1) == mask.sum(-1, keepdim=True))
        share = mask.sum(-1, keepdim=True).double() / horizon
        reward = (last & right[:, None]).double() * (share.square() if graded else 1.0)
    else:
        earned = 0.6 * (worth % 3 == 0).double() - 0.1
        reward = earned.masked_fill(~mask | (action == END), 0.0)
    states = sum(vocabulary**d for d in range(horizon))
    return Problem(
        name="tokens_graded" if graded else "tokens" if outcome else "tokens_steps",
        state=state, action=action, mask=mask, node=state, reward=reward,
        chance=torch.zeros(len(action), dtype=torch.float64),
        states=states, actions=vocabulary + 1, nodes=states, outcome=outcome,
    )  # fmt: skip


def _prefix_index(action: Tensor, vocabulary: int) -> Tensor:
    """A number for the tokens before each unit, ``[B, N]``: shorter prefixes first, then in the order of digits."""
    columns, inside = [torch.zeros_like(action[:, 0])], torch.zeros_like(action[:, 0])
    first = 0
    for depth in range(1, action.shape[1]):
        inside = inside * vocabulary + (action[:, depth - 1] - 1)
        first += vocabulary ** (depth - 1)
        columns.append(first + inside)
    return torch.stack(columns, -1)


def corridor(*, length: int = 6, start: int = 2, horizon: int = 5, slip: float = 0.15) -> Problem:
    """A walk along a line: left or right, slipping the other way at times; the far end pays 1, the near end 0.3.

    An episode ends at either end or after ``horizon`` steps, each of which costs 0.02. Rows tell apart what the walker
    did and where it slipped; there are at most ``4 ** horizon``.
    """
    choice = torch.arange(4**horizon)[:, None] // 4 ** torch.arange(horizon - 1, -1, -1) % 4
    action, slipped = choice // 2, choice % 2
    move = torch.where(action ^ slipped == 1, 1, -1)
    place, alive, columns, masks = torch.full_like(choice[:, 0], start), torch.ones_like(choice[:, 0]).bool(), [], []
    reward = torch.zeros(choice.shape, dtype=torch.float64)
    for t in range(horizon):
        columns.append(place.masked_fill(~alive, 0))
        masks.append(alive)
        place = torch.where(alive, place + move[:, t], place)
        paid = 1.0 * (place == length - 1).double() + 0.3 * (place == 0).double() - 0.02
        reward[:, t] = paid.masked_fill(~alive, 0.0)
        alive = alive & (place > 0) & (place < length - 1)
    state, mask = torch.stack(columns, -1), torch.stack(masks, -1)
    listed = ((choice == 0) | mask).all(-1)
    odds = torch.tensor([math.log1p(-slip), math.log(slip)], dtype=torch.float64)
    luck = odds[slipped].masked_fill(~mask, 0.0)
    time = torch.arange(horizon)
    return Problem(
        name="corridor",
        state=state[listed], action=action[listed], mask=mask[listed],
        node=(state + time * length)[listed].masked_fill(~mask[listed], 0), reward=reward[listed],
        chance=luck.sum(-1)[listed],
        states=length, actions=2, nodes=length * horizon, outcome=False,
    )  # fmt: skip


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "tokens": token_tree,
    "tokens_steps": lambda: token_tree(outcome=False),
    "tokens_graded": lambda: token_tree(graded=True),
    "corridor": corridor,
}
"""The problems of the lab by name."""
