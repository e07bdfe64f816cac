"""Autoregressive policies over action tokens: one categorical per action dimension, given the earlier ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from unified_rl.configurable import configurable
from unified_rl.errors import ConfigError
from unified_rl.policies.base import Policy
from unified_rl.policies.networks import Activation, activation_named, mlp, seeded, trunk_width
from unified_rl.policies.sampling import Sampling, draw, entropy_of, token_log_prob
from unified_rl.protocols import Reader
from unified_rl.ranges import Count, Fraction, Positive, Seed, TwoOrMore, ranged
from unified_rl.spaces import Space

CLOSED = -1e9
"""Logit of a choice that does not exist: finite, so that divergences of two such categoricals are."""


def to_bins(value: Tensor, bins: int) -> Tensor:
    """Bin ids int64 of values in [-1, 1] (clipped to it), ``bins`` of equal width; any shape."""
    return ((value + 1.0) * (0.5 * bins)).floor().clamp(0, bins - 1).to(torch.int64)


def from_bins(index: Tensor, bins: int) -> Tensor:
    """Centres float32 of bins: within ``1 / bins`` of every value that :func:`to_bins` puts there."""
    return (2.0 * index.to(torch.float32) + 1.0) / bins - 1.0


@configurable
@ranged("policy")
class AutoregressivePolicy(Policy):
    """Discretised actions, sampled one dimension after another; one unit a dimension.

    Dimension i's logits are an MLP of the observation, of i, and of the bins of the dimensions before i. In a space of
    choices (Discrete, MultiDiscrete, MultiBinary, a small integer Box) every entry is one unit, and ``action [.., U]``
    holds its choice as int64, counted from 0 wherever the space begins. Stored
    log-probs are those after temperature and top-p, and re-scoring applies the same transform; with top-p below 1 the
    two policies' supports differ, so ratios are no exact importance weights (``exact`` is False).

    Sources: per-dimension action tokens as in "RT-1" (arXiv:2212.06817) and "Discrete Sequential Prediction of
    Continuous Actions for Deep RL" (arXiv:1705.05035).

    Args:
        space: the environment's; or sizes and bounds, as of :class:`~unified_rl.policies.base.Policy`.
        sizes: the rest of those.
        bins: bins a dimension of a continuous action.
        temperature: divides the logits, in sampling and re-scoring; the supervised loss uses 1.
        top_p: share of probability that is kept, likewise.
        hidden: widths of the hidden layers over the observation.
        activation: a name in :data:`unified_rl.policies.networks.ACTIVATIONS`.
        seed: of the initial weights.
        shared: further arguments of :class:`~unified_rl.policies.base.Policy`.

    Raises:
        ConfigError: unbounded continuous actions, fewer than two bins, or a temperature or top-p out of range.
    """

    supports_discrete = True

    def __init__(
        self,
        space: Space | int | None = None,
        *sizes: Any,
        bins: TwoOrMore = 21,
        temperature: Positive = 1.0,
        top_p: Fraction = 1.0,
        hidden: Sequence[Count] = (128, 128),
        activation: Activation = "relu",
        seed: Seed = 0,
        **shared: Any,
    ) -> None:
        super().__init__(space, *sizes, seed=seed, **shared)
        counts = self.space.action.choices
        self.discrete = counts is not None
        self.bins = bins if counts is None else max(counts)
        if self.bins < 2:
            raise ConfigError(f"an autoregressive policy needs at least 2 bins or actions, got {self.bins}")
        if not self.discrete and not self.bounded:
            raise ConfigError("action bins need finite action bounds; use policy=gaussian, or bound them there")
        self.num_units = self.action_dim
        self._close(counts or ())
        self.sampling = Sampling(temperature=temperature, top_p=top_p)
        self.exact = not self.sampling.truncates
        self._build(hidden, activation, seed)

    def _keys(self) -> tuple[str, ...]:
        return ("action_bins",) if self.space.action.choices is None else ("action",)

    def _close(self, counts: Sequence[int]) -> None:
        """Where entries have fewer choices than others, the logits of those that do not exist are :data:`CLOSED`."""
        closed = torch.tensor([[choice >= count for choice in range(self.bins)] for count in counts])
        self.closed: Tensor | None
        self.register_buffer("closed", closed if bool(closed.any()) else None, persistent=False)

    def _build(self, hidden: Sequence[int], activation: str, seed: int) -> None:
        width = trunk_width(self.observation_dim, hidden)
        with seeded(seed):
            self.trunk = mlp(self.observation_dim, hidden, width, activation=activation)
            self.position: nn.Parameter | None = None
            self.embedding: nn.Embedding | None = None
            if self.num_units > 1:
                self.position = nn.Parameter(torch.randn(self.num_units, width) * 0.1)
                # bins of the last dimension condition nothing
                self.embedding = nn.Embedding((self.num_units - 1) * self.bins, width)
                nn.init.normal_(self.embedding.weight, std=self.num_units**-0.5)
            self.head = nn.Sequential(
                activation_named(activation)(), *mlp(width, (width,), self.bins, activation=activation)
            )

    # --- values and bins -----------------------------------------------------------------------------------------

    def bins_of(self, action: Tensor) -> Tensor:
        """Bin ids ``[M, U]`` int64 of actions ``[M, a]`` in the environment's coordinates."""
        if self.discrete:
            return action.reshape(-1, self.num_units).to(torch.int64)
        return to_bins(self.from_env(action), self.bins)

    def action_of(self, bins: Tensor) -> Tensor:
        """The inverse: bin centres ``[M, a]`` in the environment's coordinates (the ids themselves if discrete)."""
        return bins if self.discrete else self.to_env(from_bins(bins, self.bins))

    # --- logits --------------------------------------------------------------------------------------------------

    def _embed(self, bins: Tensor) -> Tensor:
        """Embeddings ``[M, n, H]`` of the first ``n <= U - 1`` dimensions' bins ``[M, n]``."""
        assert self.embedding is not None
        offset = torch.arange(bins.shape[-1], device=bins.device) * self.bins
        embedded: Tensor = self.embedding(bins + offset)
        return embedded

    def _logits(self, observation: Tensor, bins: Tensor) -> Tensor:
        """Untransformed logits ``[M, U, bins]`` of every dimension given the stored bins before it, in one pass."""
        context = self.trunk(observation).unsqueeze(1)
        if self.position is not None:
            earlier = self._embed(bins[:, :-1]).cumsum(1)
            context = context + self.position + nn.functional.pad(earlier, (0, 0, 1, 0))
        return self._open(self.head(context), self.closed)

    @staticmethod
    def _open(logits: Tensor, closed: Tensor | None) -> Tensor:
        return logits if closed is None else logits.masked_fill(closed, CLOSED)

    def _draw(self, logits: Tensor, generator: torch.Generator, deterministic: bool) -> Tensor:
        if deterministic:
            return logits.argmax(-1)
        return draw(logits.to(generator.device), generator).to(logits.device)

    def _deterministic_action(self, observation: Tensor) -> Tensor:
        return self.action_of(self._choose(observation, lambda logits: logits.argmax(-1)))

    def _sample(self, observation: Tensor, generator: torch.Generator, deterministic: bool) -> dict[str, Tensor]:
        log_probs: list[Tensor] = []

        def pick(logits: Tensor) -> Tensor:
            logits = self.sampling.logits(logits)
            chosen = self._draw(logits, generator, deterministic)
            log_probs.append(token_log_prob(logits, chosen))
            return chosen

        stored, log_prob = self._choose(observation, pick), torch.stack(log_probs, -1)
        if deterministic:
            log_prob = torch.full_like(log_prob, torch.nan)
        out = {"action": self.action_of(stored), "behavior_log_prob": log_prob}
        return out if self.discrete else out | {"action_bins": stored}

    def _choose(self, observation: Tensor, pick: Callable[[Tensor], Tensor]) -> Tensor:
        """Bins ``[M, U]``, one dimension after another, as ``pick`` chooses them from plain ``logits [M, V]``."""
        context = self.trunk(observation)
        earlier = torch.zeros_like(context)
        bins = []
        for i in range(self.num_units):
            given = context if self.position is None else context + self.position[i] + earlier
            bins.append(pick(self._open(self.head(given), None if self.closed is None else self.closed[i])))
            if self.embedding is not None and i + 1 < self.num_units:
                earlier = earlier + self.embedding(bins[-1] + i * self.bins)
        return torch.stack(bins, -1)

    def _stored_bins(self, stored: Mapping[str, Tensor]) -> Tensor:
        return stored[self.rescoring_keys[0]].reshape(-1, self.num_units).to(torch.int64)

    def _log_prob(self, observation: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        bins = self._stored_bins(stored)
        return token_log_prob(self.sampling.logits(self._logits(observation, bins)), bins)

    def read_logits(self, batch: TensorDictBase, reader: Reader, *extras: Tensor) -> tuple[Tensor, ...]:
        """What ``reader(logits [n, V], bin [n], *extras [n, ...])`` makes of every unit's distribution.

        ``extras`` are ``[B, N, ...]``; the results are ``[B, N, ...]``.
        """
        observation, stored = self._flatten(batch)
        bins = self._stored_bins(stored)
        logits = self.sampling.logits(self._logits(observation, bins))
        found = reader(logits.flatten(0, 1), bins.flatten(), *(extra.flatten(0, 1) for extra in extras))
        rows = batch["observation"].shape[0]
        return tuple(x.reshape(rows, -1, *x.shape[1:]) for x in found)

    def entropy(self, batch: TensorDictBase) -> Tensor:
        """Entropy ``[B, N]`` in nats of each dimension's sampling distribution given the stored earlier ones."""
        observation, stored = self._flatten(batch)
        logits = self.sampling.logits(self._logits(observation, self._stored_bins(stored)))
        return entropy_of(logits).reshape(batch["observation"].shape[0], -1)

    def _nll(self, observation: Tensor, action: Tensor, generator: torch.Generator) -> Tensor:
        """Cross-entropy ``[M, U]`` of each dimension's bin given the earlier ones, at temperature 1."""
        bins = self.bins_of(action)
        return -token_log_prob(self._logits(observation, bins), bins)
