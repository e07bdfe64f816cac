"""The sampling transform: how logits become the distribution that tokens are drawn from.

Generation and re-scoring share it, so that a log-prob is always the one of the distribution that really sampled
(temperature, then top-k, then top-p, each renormalised).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from unified_rl.ranges import Fraction, Positive, Whole, ranged


@ranged()
@dataclass(frozen=True)
class Sampling:
    """Temperature, top-k and nucleus (top-p) truncation, applied in this order.

    Attributes:
        temperature: divides the logits; above 0.
        top_k: keeps the ``top_k`` largest logits (ties with the last one stay too); 0 keeps all.
        top_p: keeps the smallest set of tokens whose probability reaches ``top_p``; 1 keeps all. "The Curious Case of
            Neural Text Degeneration", arXiv:1904.09751.
        vocabulary: ids below this one exist; an output layer padded beyond it loses the rest. 0 keeps all.

    Raises:
        ConfigError: a value out of range.
    """

    temperature: Positive = 1.0
    top_k: Whole = 0
    top_p: Fraction = 1.0
    vocabulary: Whole = 0

    @property
    def truncates(self) -> bool:
        """True where some tokens get probability 0."""
        return self.top_k > 0 or self.top_p < 1

    def logits(self, logits: Tensor) -> Tensor:
        """Transformed float32 logits ``[..., V]``, ids beyond the vocabulary cut off; ``-inf`` outside the support."""
        if 0 < self.vocabulary < logits.shape[-1]:
            logits = logits[..., : self.vocabulary]
        logits = logits.float()
        if self.temperature != 1:
            logits = logits / self.temperature
        if self.top_k:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p < 1:
            logits = keep_top_p(logits, self.top_p)
        return logits


NO_TRUNCATION = Sampling()
"""The model's own distribution: temperature 1, every token kept."""


@runtime_checkable
class HasSampling(Protocol):
    """A categorical policy that says how it turns logits into the distribution that it samples and scores."""

    sampling: Sampling


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """``-inf`` below the k-th largest of ``logits [..., V]``."""
    if k >= logits.shape[-1]:
        return logits
    least = logits.detach().topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < least, float("-inf"))


def keep_min_p(logits: Tensor, p: float, relative: bool = True) -> Tensor:
    """``-inf`` below a probability of ``p``, as a share of the largest one where ``relative``; at least one stays."""
    log_prob = logits.log_softmax(-1)
    top = log_prob.amax(-1, keepdim=True)
    threshold = torch.full_like(top, p).log() + (top if relative else 0.0)
    return logits.masked_fill((log_prob < threshold) & (log_prob < top), float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """``-inf`` outside the smallest set of tokens whose probability reaches ``p``; at least one token stays."""
    ordered, index = logits.detach().sort(dim=-1, descending=True, stable=True)
    probability = ordered.softmax(-1)
    before = probability.cumsum(-1) - probability  # mass of the strictly better tokens
    drop = torch.empty_like(before, dtype=torch.bool).scatter_(-1, index, before >= p)
    return logits.masked_fill(drop, float("-inf"))


def token_log_prob(logits: Tensor, token: Tensor) -> Tensor:
    """Log-probability of ``token [...]`` under transformed ``logits [..., V]``."""
    return logits.gather(-1, token.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def entropy_of(logits: Tensor) -> Tensor:
    """Entropy in nats of the distribution of transformed ``logits [..., V]``; tokens outside the support add 0."""
    log_prob = logits.log_softmax(-1)
    return -(log_prob.exp() * log_prob.masked_fill(log_prob == float("-inf"), 0.0)).sum(-1)


def draw(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One token a row, ``[...]`` int64, from transformed ``logits [..., V]``: the Gumbel-max trick, one pass."""
    noise = torch.empty_like(logits).exponential_(generator=generator).clamp_min_(1e-30).log_()
    return (logits - noise).argmax(-1)
