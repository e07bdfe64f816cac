"""How often the policy solves each prompt, from what it did before: counts, neighbours, a small network.

A tracker is asked before a collection's outcomes are taken in, so an estimate never contains the answer that it is
compared with. Prompts that were never seen have the estimate 0.5, or what the tracker has learnt of others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from unified_rl.errors import CheckpointError, RecordError
from unified_rl.ranges import Count, NonNegative, Positive, UnitInterval, Whole, ranged


class Prompts(NamedTuple):
    """Prompts of ``P`` problems.

    Attributes:
        number: ``[P]`` int64, what tells them apart (``prompt_id``).
        tokens: ``P`` lists of token ids.
    """

    number: Tensor
    tokens: list[list[int]]


class Outcomes(NamedTuple):
    """What came of ``P`` prompts.

    Attributes:
        successes, failures: ``[P]`` float64, sums of rewards from 0 to 1, and of 1 less them.
        rows: ``[P]`` rows of the record, the first answer to each.
        score: ``rows -> [n, N]``: log-probs of rows under the present policy.
    """

    successes: Tensor
    failures: Tensor
    rows: TensorDict
    score: Callable[[TensorDict], Tensor]

    @property
    def rate(self) -> Tensor:
        """``[P]`` float64; NaN where nothing counted."""
        return self.successes / (self.successes + self.failures)


def check_rewards(reward: Tensor) -> None:
    """Refuses rewards that are no success rates.

    Raises:
        RecordError: one lies below 0 or above 1.
    """
    if not bool(((reward >= 0) & (reward <= 1)).all()):
        raise RecordError(
            "a curriculum counts rewards from 0 to 1, and one lies outside; use such a reward, or "
            "rollout.curriculum=null"
        )


class Tracker:
    """What all trackers do; nothing is kept here."""

    def value(self, prompts: Prompts) -> Tensor:
        """The estimated success rate ``[P]`` float64, in [0, 1]."""
        raise NotImplementedError

    def drawn(self, prompts: Prompts, generator: torch.Generator) -> Tensor:
        """A rate ``[P]`` drawn from what is believed (Thompson); the estimate itself where there is no belief."""
        return self.value(prompts)

    def known(self, prompts: Prompts) -> float:
        """The share of prompts that were seen before."""
        return 0.0

    def learn(self, prompts: Prompts, outcomes: Outcomes) -> None:
        """Takes in a collection."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What a bit-exact continuation needs."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        raise NotImplementedError


class _Counts(Tracker):
    """Beta counts of each prompt in one growing table."""

    prior = 0.5

    def __init__(self) -> None:
        self.place: dict[int, int] = {}
        self.table = torch.zeros(0, 2, dtype=torch.float64)

    def places(self, prompts: Prompts) -> Tensor:
        """Rows of the table ``[P]`` int64; -1 for prompts that it lacks."""
        return torch.tensor([self.place.get(n, -1) for n in prompts.number.tolist()], dtype=torch.int64)

    def counts(self, prompts: Prompts) -> Tensor:
        """``[P, 2]`` float64: successes and failures, the prior among them."""
        at = self.places(prompts)
        found = torch.full((len(at), 2), self.prior, dtype=torch.float64)
        found[at >= 0] = self.table[at[at >= 0]]
        return found

    def value(self, prompts: Prompts) -> Tensor:
        """Successes over all."""
        counts = self.counts(prompts)
        return counts[:, 0] / counts.sum(-1)

    def drawn(self, prompts: Prompts, generator: torch.Generator) -> Tensor:
        """From the Beta distribution of the counts."""
        stream = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        return torch.from_numpy(stream.beta(*self.counts(prompts).clamp(min=1e-6).T.numpy()))

    def known(self, prompts: Prompts) -> float:
        """The share in the table."""
        return float((self.places(prompts) >= 0).double().mean())

    def _settled(self, prompts: Prompts, start: float) -> Tensor:
        """Rows of the table ``[P]``, new ones filled with ``start``."""
        for number in prompts.number.tolist():
            self.place.setdefault(number, len(self.place))
        new = torch.full((len(self.place) - len(self.table), 2), start, dtype=torch.float64)
        self.table = torch.cat([self.table, new])
        return self.places(prompts)

    def state_dict(self) -> dict[str, Any]:
        """Numbers of prompts ``[n]`` and their counts ``[n, 2]``."""
        return {"prompt": torch.tensor(list(self.place), dtype=torch.int64), "counts": self.table.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.place = {number: at for at, number in enumerate(state["prompt"].tolist())}
        self.table = state["counts"].clone()


@ranged()
class DriftCounts(_Counts):
    """Counts that are forgotten by how far the policy has moved on the prompt's own last answer. SPO, 2509.13232.

    ``alpha <- rho alpha + successes``, ``beta <- rho beta + failures`` with ``rho = 2^(-D / half_life)`` within
    ``[low, high]``; ``D`` is the mean over tokens of ``|log-prob then - log-prob now|``. Counts begin at 0.5.

    Args:
        low, high: bounds of what is kept of the counts.
        half_life: drift in nats a token at which half is forgotten.
    """

    ordered = (("low", "high"),)
    KEPT = ("tokens", "token_mask", "mask", "behavior_log_prob")
    """Entries of the last answer."""

    def __init__(self, *, low: UnitInterval = 0.875, high: UnitInterval = 0.96, half_life: Positive = 0.06) -> None:
        super().__init__()
        self.low, self.high, self.half_life = low, high, half_life
        self.answers: TensorDict | None = None

    def learn(self, prompts: Prompts, outcomes: Outcomes) -> None:
        """Forgets and counts, and keeps the new answers in the place of the old ones."""
        before = self.places(prompts)
        drift = torch.zeros(len(before), dtype=torch.float64)
        seen = before >= 0
        if bool(seen.any()) and self.answers is not None:
            drift[seen] = self._drift(self.answers[before[seen]], outcomes.score)
        keep = torch.where(seen, (2.0 ** (-drift / self.half_life)).clamp(self.low, self.high), 1.0)
        at = self._settled(prompts, self.prior)
        self.table[at] = keep[:, None] * self.table[at] + torch.stack([outcomes.successes, outcomes.failures], -1)
        self._remember(outcomes.rows.select(*self.KEPT), at)

    @staticmethod
    def _drift(rows: TensorDict, score: Callable[[TensorDict], Tensor]) -> Tensor:
        mask: Tensor = rows["mask"]
        gap = torch.where(mask, score(rows) - rows["behavior_log_prob"], 0.0).abs().double()
        return gap.sum(-1) / mask.sum(-1).clamp(min=1)

    def _remember(self, rows: TensorDict, at: Tensor) -> None:
        size = len(self.table)
        if self.answers is None or len(self.answers) < size:
            grown = rows.new_zeros(2 * size)
            if self.answers is not None:
                grown[: len(self.answers)] = self.answers
            self.answers = grown
        self.answers[at] = rows

    def state_dict(self) -> dict[str, Any]:
        """Counts, and the last answer to each prompt."""
        kept = None if self.answers is None else self.answers[: len(self.table)]
        return {**super().state_dict(), "answers": None if kept is None else {k: v.clone() for k, v in kept.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        super().load_state_dict(state)
        kept = state["answers"]
        self.answers = None if kept is None else TensorDict(kept, batch_size=[len(self.table)]).clone()


@ranged()
class DecayedCounts(_Counts):
    """Counts that are forgotten faster where new outcomes come in than elsewhere. VADE, 2511.18902.

    At every collection the counts of its prompts are multiplied by ``fresh`` before the new ones are added, all others
    by ``rest``; the ``prior`` of either outcome is never forgotten. ``fresh = rest = 1`` counts everything, ``fresh=0``
    keeps the last outcomes alone.

    Args:
        fresh: what is kept of the counts of the collection's prompts.
        rest: of those of all other prompts.
        prior: imagined outcomes of each kind.
    """

    def __init__(self, *, fresh: UnitInterval = 0.9, rest: UnitInterval = 0.99, prior: Positive = 1.0) -> None:
        super().__init__()
        self.fresh, self.rest, self.prior = fresh, rest, prior

    def counts(self, prompts: Prompts) -> Tensor:
        """As they are kept, and the prior."""
        at = self.places(prompts)
        found = torch.zeros(len(at), 2, dtype=torch.float64)
        found[at >= 0] = self.table[at[at >= 0]]
        return found + self.prior

    def learn(self, prompts: Prompts, outcomes: Outcomes) -> None:
        """Forgets, then counts."""
        at = self._settled(prompts, 0.0)
        keep = torch.full((len(self.table), 1), self.rest, dtype=torch.float64)
        keep[at] = self.fresh
        self.table *= keep
        self.table.index_add_(0, at, torch.stack([outcomes.successes, outcomes.failures], -1))


def prompt_features(tokens: list[list[int]], size: int) -> Tensor:
    """Which tokens and pairs of neighbouring tokens a prompt holds, hashed: ``[P, size]`` float32 of length 1.

    A stand-in for a model's reading of a prompt: prompts that share words are close to each other.
    """
    width = max((len(ids) for ids in tokens), default=0) or 1
    ids = torch.zeros(len(tokens), width, dtype=torch.int64)
    for row, own in zip(ids, tokens, strict=True):
        row[: len(own)] = torch.tensor(own, dtype=torch.int64) + 1
    pairs = ids[:, :-1] * 1_000_003 + ids[:, 1:]
    at = torch.cat([ids * 2_654_435_761 % 2_147_483_647, pairs * 40_503 % 2_147_483_647], 1) % size
    real = torch.cat([ids > 0, ids[:, 1:] > 0], 1)
    counts = torch.zeros(len(tokens), size).scatter_add_(1, at, real.float())
    return nn.functional.normalize(counts, dim=-1)


@ranged()
class Neighbours(Tracker):
    """The success rate of a prompt from recent outcomes of prompts like it; nothing is trained.

    ``V(x) = (prior / 2 + sum k(x, x_i) r_i) / (prior + sum k(x, x_i))`` over the newest pairs of prompt and outcome,
    ``k = exp((cosine - 1) / width)`` of :func:`prompt_features`. The pairs are the policy's, so the estimate follows a
    policy that changes. After V_0, 2602.03584, where a trained model reads such pairs.

    Args:
        pairs: how many are remembered, the newest.
        width: of the kernel; where it is small only the same prompt counts.
        prior: imagined outcomes, half of them successes.
        features: width of the hashed features.
    """

    def __init__(
        self, *, pairs: Count = 4096, width: Positive = 0.1, prior: Positive = 1.0, features: Count = 1024
    ) -> None:
        self.pairs, self.width, self.prior, self.features = pairs, width, prior, features
        self.seen = torch.zeros(0, features)
        self.rates = torch.zeros(0, 2, dtype=torch.float64)
        self.numbers = torch.zeros(0, dtype=torch.int64)

    def value(self, prompts: Prompts) -> Tensor:
        """As above, weighted by how many answers each pair stands for."""
        apart = 1 - prompt_features(prompts.tokens, self.features) @ self.seen.T
        near = (-torch.where(apart < 1e-5, 0.0, apart) / self.width).double().exp()  # equal ones are, up to rounding
        found = near @ self.rates + self.prior / 2
        return found[:, 0] / found.sum(-1)

    def known(self, prompts: Prompts) -> float:
        """The share among the pairs."""
        return float(torch.isin(prompts.number, self.numbers).double().mean())

    def learn(self, prompts: Prompts, outcomes: Outcomes) -> None:
        """Adds the pairs, and forgets the oldest."""
        new = torch.stack([outcomes.successes, outcomes.failures], -1)
        self.seen = torch.cat([self.seen, prompt_features(prompts.tokens, self.features)])[-self.pairs :]
        self.rates = torch.cat([self.rates, new])[-self.pairs :]
        self.numbers = torch.cat([self.numbers, prompts.number])[-self.pairs :]

    def state_dict(self) -> dict[str, Any]:
        """The pairs."""
        return {"seen": self.seen.clone(), "rates": self.rates.clone(), "numbers": self.numbers.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        if state["seen"].shape[1] != self.features:
            raise CheckpointError(
                f"the checkpoint's prompts have {state['seen'].shape[1]} features, rollout.curriculum.tracker.features "
                f"is {self.features}: put it back"
            )
        self.seen, self.rates, self.numbers = (state[k].clone() for k in ("seen", "rates", "numbers"))


@ranged()
class Network(Tracker):
    """A small value network on prompts, trained on the mean reward of each as it comes in. PCL, 2510.01135.

    One hidden layer on :func:`prompt_features`, where the paper trains a language model with a head; squared error,
    Adam. Its first estimate is 0.5 everywhere.

    Args:
        hidden: width.
        features: width of the hashed features.
        lr: learning rate; 0 leaves every prompt at 0.5.
        steps: gradient steps on the prompts of a collection.
        seed: of the first weights.
    """

    def __init__(
        self,
        *,
        hidden: Count = 64,
        features: Count = 1024,
        lr: NonNegative = 0.01,
        steps: Count = 4,
        seed: Whole = 0,
    ) -> None:
        self.features, self.steps = features, steps
        stream = torch.Generator().manual_seed(seed)
        self.weights = [
            (torch.randn(features, hidden, generator=stream) / 4).requires_grad_(),
            torch.zeros(hidden, requires_grad=True),
            torch.zeros(hidden, requires_grad=True),
            torch.zeros((), requires_grad=True),
        ]
        self.optimizer = torch.optim.Adam(self.weights, lr=lr)
        self.numbers: set[int] = set()

    def _read(self, features: Tensor) -> Tensor:
        first, bias, last, offset = self.weights
        return ((features @ first + bias).tanh() @ last + offset).sigmoid()

    @torch.no_grad()
    def value(self, prompts: Prompts) -> Tensor:
        """What the network says."""
        return self._read(prompt_features(prompts.tokens, self.features)).double()

    def known(self, prompts: Prompts) -> float:
        """The share that it was trained on."""
        return sum(n in self.numbers for n in prompts.number.tolist()) / max(1, len(prompts.number))

    @torch.enable_grad()
    def learn(self, prompts: Prompts, outcomes: Outcomes) -> None:
        """A few steps towards the mean rewards; prompts without any that counts are left out."""
        counted = ~outcomes.rate.isnan()
        if bool(counted.any()):
            features, rate = prompt_features(prompts.tokens, self.features), outcomes.rate[counted]
            for _ in range(self.steps):
                error = self._read(features).double()[counted] - rate
                self.optimizer.zero_grad()
                error.square().mean().backward()
                self.optimizer.step()
        self.numbers.update(prompts.number.tolist())

    def state_dict(self) -> dict[str, Any]:
        """Weights, the optimiser, and which prompts were seen."""
        moments = [
            {k: v.clone() for k, v in self.optimizer.state[w].items()} if w in self.optimizer.state else None
            for w in self.weights
        ]
        numbers = torch.tensor(sorted(self.numbers), dtype=torch.int64)
        return {"weights": [w.detach().clone() for w in self.weights], "moments": moments, "numbers": numbers}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        for own, kept, moments in zip(self.weights, state["weights"], state["moments"], strict=True):
            if own.shape != kept.shape:
                raise CheckpointError(
                    f"the checkpoint's value network has a weight of {list(kept.shape)}, the run's one of "
                    f"{list(own.shape)}: put rollout.curriculum.tracker back"
                )
            own.copy_(kept)
            self.optimizer.state.pop(own, None)
            if moments is not None:
                self.optimizer.state[own] = {k: v.clone() for k, v in moments.items()}
        self.numbers = set(state["numbers"].tolist())


TRACKERS: dict[str, type[Tracker]] = {
    "drift": DriftCounts,
    "decayed": DecayedCounts,
    "neighbours": Neighbours,
    "network": Network,
}
