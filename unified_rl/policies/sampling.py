"""The sampling transform: how logits become the distribution that tokens are drawn from.

Generation and re-scoring share it, so that a log-prob is always the one of the distribution that really sampled
(repetition penalty, temperature, then top-k, top-p and min-p, each renormalised: the order of transformers).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from unified_rl.errors import ConfigError
from unified_rl.ranges import Fraction, Positive, Share, Whole, ranged

BLOCK = 256
"""Tokens whose probabilities are summed first, so that few cumulative sums are needed."""
NOISE_UP_TO = 512
"""Tokens for which a CPU draws noise."""
SEEN_AT_ONCE = 2**22
"""Ids of prefixes that are looked at together (32 MiB)."""


@ranged()
@dataclass(frozen=True)
class Sampling:
    """Repetition penalty, temperature, top-k, nucleus (top-p) and min-p truncation, applied in this order.

    Attributes:
        temperature: divides the logits; above 0.
        top_k: keeps the ``top_k`` largest logits (ties with the last one stay too); 0 keeps all.
        top_p: keeps the smallest set of tokens whose probability reaches ``top_p``; 1 keeps all. "The Curious Case of
            Neural Text Degeneration", arXiv:1904.09751.
        vocabulary: ids below this one exist; an output layer padded beyond it loses the rest. 0 keeps all.
        min_p: drops tokens whose probability is below this share of the most probable one's; 0 keeps all. "Turning Up
            the Heat: Min-p Sampling for Creative and Coherent LLM Outputs", arXiv:2407.01082.
        repetition_penalty: of tokens that stand in the prompt or in what was sampled so far: positive logits are
            divided by it, negative ones multiplied; 1 is none. CTRL, arXiv:1909.05858.

    Raises:
        ConfigError: a value out of range.
    """

    temperature: Positive = 1.0
    top_k: Whole = 0
    top_p: Fraction = 1.0
    vocabulary: Whole = 0
    min_p: Share = 0.0
    repetition_penalty: Positive = 1.0

    @property
    def truncates(self) -> bool:
        """True where some tokens get probability 0."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def remembers(self) -> bool:
        """True where the distribution depends on which tokens came before."""
        return self.repetition_penalty != 1

    @property
    def plain(self) -> bool:
        """True where it is the model's own distribution (over the ids that exist)."""
        return self.temperature == 1 and not self.truncates and not self.remembers

    def words(self, logits: Tensor) -> int:
        """``V`` of the transformed logits."""
        return min(self.vocabulary or logits.shape[-1], logits.shape[-1])

    def logits(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Transformed float32 logits ``[..., V]``, ids beyond the vocabulary cut off; ``-inf`` outside the support.

        Args:
            logits: of the model.
            seen: ``[..., V]`` bool, which ids came before; needed where :attr:`remembers`.

        Raises:
            ConfigError: a repetition penalty where nobody knows what came before.
        """
        if 0 < self.vocabulary < logits.shape[-1]:
            logits = logits[..., : self.vocabulary]
        logits = logits.float()
        if self.remembers:
            if seen is None:
                raise ConfigError(
                    f"policy.repetition_penalty={self.repetition_penalty} needs the tokens before each unit, which "
                    "what compares whole distributions does not have: set policy.repetition_penalty=1"
                )
            logits = penalise(logits, seen, self.repetition_penalty)
        if self.temperature != 1:
            logits = logits / self.temperature
        if self.top_k:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p < 1:
            logits = keep_top_p(logits, self.top_p)
        if self.min_p > 0:
            least = logits.detach().amax(-1, keepdim=True) + math.log(self.min_p)
            logits = logits.masked_fill(logits < least, float("-inf"))
        return logits


NO_TRUNCATION = Sampling()
"""The model's own distribution: temperature 1, every token kept."""


@runtime_checkable
class HasSampling(Protocol):
    """A categorical policy that says how it turns logits into the distribution that it samples and scores."""

    sampling: Sampling


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """``logits [..., V]`` of the ids ``seen [..., V]`` divided by the penalty where positive, else multiplied."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def seen_before(tokens: Tensor, row: Tensor, column: Tensor, words: int) -> Tensor:
    """Which ids stand in ``tokens [B, N]`` before each unit, ``[n, words]`` bool.

    Args:
        tokens: right-padded rows.
        row, column: ``[n]``, the units; no column is 0.
        words: ids there are.
    """
    seen = torch.zeros(len(row), words, dtype=torch.bool, device=tokens.device)
    width = int(column.max()) if len(column) else 1
    at = torch.arange(width, device=tokens.device)
    size = max(1, SEEN_AT_ONCE // width)
    for part, r, c in zip(seen.split(size), row.split(size), column.split(size), strict=True):
        ids = tokens[r, :width]
        part.scatter_(1, torch.where(at < c[:, None], ids, ids[:, :1]), True)  # the first one is always before
    return seen


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
    """One token a row, ``[...]`` int64, from transformed ``logits [..., V]``.

    By the Gumbel-max trick, one pass of noise; from a large vocabulary on a CPU, where the noise costs as much as a
    small model's step, by one number a row: the first token at which the cumulative probability passes it.
    """
    if logits.device.type != "cpu" or logits.shape[-1] <= NOISE_UP_TO:
        noise = torch.empty_like(logits).exponential_(generator=generator).clamp_min_(1e-30).log_()
        return (logits - noise).argmax(-1)
    probability = logits.softmax(-1)
    at = torch.rand(logits.shape[:-1], generator=generator, dtype=torch.float64)[..., None]
    words, whole = probability.shape[-1], probability.shape[-1] // BLOCK * BLOCK
    mass = probability[..., :whole].unflatten(-1, (-1, BLOCK)).sum(-1)
    block, inside = _first_past(torch.cat((mass, probability[..., whole:].sum(-1, keepdim=True)), -1), at)
    word = block * BLOCK + torch.arange(BLOCK)
    chosen = probability.gather(-1, word.clamp(max=words - 1)).masked_fill_(word >= words, 0.0)
    return word.gather(-1, _first_past(chosen, inside)[0])[..., 0].clamp(max=words - 1)


def _first_past(mass: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cumulative ``mass [..., n]`` passes a share ``at [..., 1]`` of it, and which share of that entry.

    Entries without mass are never chosen.
    """
    passed = mass.double().cumsum(-1)
    whole = passed[..., -1:]
    amount = (at.clamp(min=0) * whole).minimum(whole.nextafter(whole.new_zeros(())))
    index = torch.searchsorted(passed, amount, right=True).clamp_(max=mass.shape[-1] - 1)
    entry = mass.gather(-1, index).double()
    return index, 1 - (passed.gather(-1, index) - amount) / entry
