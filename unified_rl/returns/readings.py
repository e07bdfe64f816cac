"""What rules of rows may read from every unit's distribution under the weights at the start of an update."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from unified_rl.policies.sampling import entropy_of, token_log_prob

Read = Callable[[Tensor, Tensor], Tensor]
"""``(logits [n, V], token [n]) -> [n]``; what it gives is kept as a column ``[B, N]``."""

STATES = "unit_states"
"""Entry ``[B, N, h]`` of the record, while rules look at it that want the units' last hidden states."""


def entropy(logits: Tensor, token: Tensor) -> Tensor:
    """Entropy in nats of the sampling distribution, ``[n]``."""
    return entropy_of(logits)


def log_prob(logits: Tensor, token: Tensor) -> Tensor:
    """Log-prob of the token, ``[n]``."""
    return token_log_prob(logits, token)


def log_prob_at(temperature: float) -> Read:
    """Log-prob of the token where the distribution is tempered once more."""
    return lambda logits, token: token_log_prob(logits / temperature, token)
