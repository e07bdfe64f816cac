"""Whole distributions, kept in little memory: what the policy was at the start of an update, and how far it went.

A categorical is kept as the log-probs of its most probable tokens, of the sampled token, and of all others together.
The KL divergence of two such partitions is exact where the support holds every token, else a lower bound. A Gaussian
unit keeps its mean and log standard deviation.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.protocols import ShowsLogits, ShowsNormals, Trainable, averages_dims, layout_of

FLOOR = -100.0
"""The least log-prob of a part of a distribution: tokens outside a truncated support keep finite divergences."""


def support_of(logits: Tensor, token: Tensor, size: int) -> Tensor:
    """The sampled token, then the most probable others: ids ``[n, min(size, V)]`` of ``logits [n, V]``."""
    forced = logits.detach().scatter(-1, token.unsqueeze(-1), torch.inf)
    return forced.topk(min(size, logits.shape[-1]), dim=-1).indices


def parts_log_prob(logits: Tensor, support: Tensor) -> Tensor:
    """Log-probs of the tokens of ``support [n, k]`` and, where others exist, of all others together.

    Returns:
        ``[n, k + 1]``, or ``[n, V]`` where the support is the whole vocabulary; not below :data:`FLOOR`.
    """
    least = logits.detach().amax(-1, keepdim=True) + 2 * FLOOR
    logits = torch.maximum(logits, least)
    total = logits.logsumexp(-1, keepdim=True)
    log_prob = logits.gather(-1, support) - total
    if support.shape[-1] < logits.shape[-1]:
        others = logits.scatter(-1, support, least.expand(support.shape))
        log_prob = torch.cat([log_prob, others.logsumexp(-1, keepdim=True) - total], -1)
    return log_prob.clamp(min=FLOOR)


def categorical_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``KL(p || q)`` over the last dimension."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def normal_kl(mean: Tensor, log_std: Tensor, old_mean: Tensor, old_log_std: Tensor) -> Tensor:
    """``KL(new || old)`` of Normals, elementwise."""
    spread = (2 * (log_std - old_log_std)).exp() + ((mean - old_mean) * (-old_log_std).exp()).square()
    return old_log_std - log_std + 0.5 * (spread - 1)


class OldCategorical:
    """The categoricals of a batch's units at the start of an update, ``top_k`` tokens each.

    Args:
        policy: whose they are.
        top_k: tokens that are kept one by one, the sampled one among them.
    """

    keys = ("old_support", "old_parts_log_prob")

    def __init__(self, policy: ShowsLogits, top_k: int) -> None:
        self.policy, self.top_k = policy, top_k

    def store(self, part: TensorDictBase) -> dict[str, Tensor]:
        """``old_support [B, N, k]`` int32 and ``old_parts_log_prob [B, N, k + 1]`` float32 (``[B, T, U, .]`` if steps
        may be shuffled).
        """

        def reader(logits: Tensor, token: Tensor) -> tuple[Tensor, ...]:
            support = support_of(logits, token, self.top_k)
            return support.int(), parts_log_prob(logits, support)

        found = self.policy.read_logits(part, reader)
        return {key: _by_step(x, part) for key, x in zip(self.keys, found, strict=True)}

    def read(self, batch: TensorDictBase, combine: Any) -> tuple[Tensor, ...]:
        """What ``combine(new [n, m], old [n, m]) -> tensors [n]`` makes of the parts, sampled token first."""

        def reader(logits: Tensor, token: Tensor, support: Tensor, old: Tensor) -> tuple[Tensor, ...]:
            out: tuple[Tensor, ...] = combine(parts_log_prob(logits, support.long()), old)
            return out

        return self.policy.read_logits(batch, reader, *(_by_unit(batch[key]) for key in self.keys))

    def divergence(self, batch: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Log-probs and ``KL(now || old)`` of every unit, ``[B, N]``, with gradient, in one forward pass."""
        log_prob, kl = self.read(batch, lambda new, old: (new[:, 0], categorical_kl(new, old)))
        return log_prob, kl


class OldNormal:
    """The Normals of a batch's units at the start of an update.

    Args:
        policy: whose they are; :meth:`divergence` also scores with it.
    """

    keys = ("old_mean", "old_log_std")

    def __init__(self, policy: ShowsNormals) -> None:
        self.policy: Any = policy  # no type says "Scores and ShowsNormals"
        self.averaged = averages_dims(policy)

    def store(self, part: TensorDictBase) -> dict[str, Tensor]:
        """``old_mean`` and ``old_log_std``, each ``[B, T, U, D]``."""
        return {key: _by_step(x, part) for key, x in zip(self.keys, self.policy.normals(part), strict=True)}

    def divergence(self, batch: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Log-probs and ``KL(now || old)`` of every unit, ``[B, N]``, with gradient."""
        kl = normal_kl(*self.policy.normals(batch), *(_by_unit(batch[key]) for key in self.keys))
        return self.policy.log_prob(batch).log_prob, kl.mean(-1) if self.averaged else kl.sum(-1)


Old: TypeAlias = OldCategorical | OldNormal


def old_distribution(policy: Trainable, top_k: int) -> Old | None:
    """How to keep this policy's distributions; None where it shows neither logits nor normals."""
    if isinstance(policy, ShowsLogits):
        return OldCategorical(policy, top_k)
    return OldNormal(policy) if isinstance(policy, ShowsNormals) else None


def _by_step(x: Tensor, part: TensorDictBase) -> Tensor:
    """``[B, N, .]`` as ``[B, T, U, .]`` where every step has U units, so that rows can be cut into steps."""
    return x if layout_of(part) == "language" else x.unflatten(1, (part["reward"].shape[1], -1))


def _by_unit(x: Tensor) -> Tensor:
    return x.flatten(1, 2) if x.ndim == 4 else x
