"""Tokens that two models choose together: one proposes or both are mixed, with the log-prob under what really sampled.

A chooser is ``(own, other) -> Chosen``: transformed logits ``[b, V]`` of the model that generates and of the one that
reads along (:class:`~unified_rl.policies.generation.Beside`), for the rows that are still alive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from unified_rl.policies.sampling import draw, token_log_prob

FOREIGN = -2
"""In place of the version of a token that the policy's weights did not sample by themselves."""
CORRECTED = -3
"""Likewise, of one that took the place of a token which the policy had proposed."""


class Chosen(NamedTuple):
    """The next token of every row.

    Attributes:
        token: ``[b]`` int64.
        log_prob: ``[b]``, under the mixture that sampled it.
        mark: ``[b]`` int64, 0 where the policy sampled by itself, else :data:`FOREIGN` or :data:`CORRECTED`.
    """

    token: Tensor
    log_prob: Tensor
    mark: Tensor


Chooser: TypeAlias = Callable[[Tensor, Tensor, torch.Generator | None], Chosen]
"""``(own, other, generator)``: logits ``[b, V]`` of both, and the stream of the model that generates."""


@dataclass(frozen=True)
class OutsideTopK:
    """Proposals of the own model, and draws of the other one in place of those that are not among its most probable.

    A token of the other's ``top_k`` has probability ``own + r other``, any other ``r other``, with the probability
    ``r`` of a proposal outside. Speculative Knowledge Distillation, 2410.11325.

    Args:
        top_k: at the size of the vocabulary every proposal stays, at 0 none does.
        generator: of the other's draws.
    """

    top_k: int
    generator: torch.Generator | None

    def __call__(self, own: Tensor, other: Tensor, generator: torch.Generator | None) -> Chosen:
        """As said."""
        proposed = draw(own, generator)
        if self.top_k >= own.shape[-1]:
            return Chosen(proposed, token_log_prob(own, proposed), torch.zeros_like(proposed))
        likely = torch.zeros_like(other, dtype=torch.bool).scatter(-1, other.topk(self.top_k, -1).indices, True)
        kept = likely.gather(-1, proposed[:, None])[:, 0]
        token = torch.where(kept, proposed, draw(other, self.generator))
        log_own = own.log_softmax(-1)
        outside = log_own.masked_fill(likely, -torch.inf).logsumexp(-1)
        inside = token_log_prob(own, token).masked_fill(~likely.gather(-1, token[:, None])[:, 0], -torch.inf)
        log_prob = torch.logaddexp(inside, outside + token_log_prob(other, token))
        return Chosen(token, log_prob, torch.where(kept, FOREIGN, CORRECTED))


@dataclass(frozen=True)
class Verified:
    """Proposals of the own model that the other accepts with probability ``min(1, other / own)``.

    In place of one that it refuses it draws from the normalised ``max(0, other - own)``, so what is said is distributed
    as the other model alone would say it. Fast Inference from Transformers via Speculative Decoding, 2211.17192.

    Args:
        generator: of acceptance, and of the other's draws.
    """

    generator: torch.Generator | None

    def __call__(self, own: Tensor, other: Tensor, generator: torch.Generator | None) -> Chosen:
        """As said."""
        proposed = draw(own, generator)
        p, q = own.softmax(-1), other.softmax(-1)
        uniform = torch.rand(proposed.shape, generator=self.generator, device=own.device)
        at = proposed[:, None]
        kept = uniform * p.gather(-1, at)[:, 0] < q.gather(-1, at)[:, 0]
        rest = (q - p).clamp(min=0.0)
        rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, q)  # where both are the same nothing is refused
        token = torch.where(kept, proposed, draw(rest.log(), self.generator))
        return Chosen(token, token_log_prob(other, token), torch.where(kept, FOREIGN, CORRECTED))


@dataclass(frozen=True)
class Drawn:
    """Each token is the own model's with probability ``share``, else the other's. MixSD, 2605.16865.

    Args:
        share: of the own model.
        generator: of who draws, and of the other's draws.
    """

    share: float
    generator: torch.Generator | None

    def __call__(self, own: Tensor, other: Tensor, generator: torch.Generator | None) -> Chosen:
        """As said."""
        mine = torch.rand(own.shape[:-1], generator=self.generator, device=own.device) < self.share
        token = torch.where(mine, draw(own, generator), draw(other, self.generator))
        shares = own.new_tensor([self.share, 1.0 - self.share]).log()
        log_prob = torch.logaddexp(shares[0] + token_log_prob(own, token), shares[1] + token_log_prob(other, token))
        return Chosen(token, log_prob, torch.full_like(token, FOREIGN))
