"""The filtered old policy that improbable tokens are held to."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.correction import Correction
from unified_rl.errors import ConfigError
from unified_rl.objectives.wrappers.base import Wrapper
from unified_rl.policies.sampling import token_log_prob


def filtered_log_prob(logits: Tensor, token: Tensor, least: float, relative: bool) -> Tensor:
    """Log-probs ``[n]`` after tokens less probable than a threshold are dropped and the rest renormalised.

    Args:
        logits: ``[n, V]``.
        token: ``[n]``; ``-inf`` where it was dropped itself.
        least: the threshold, a probability.
        relative: as a share of the most probable token's.
    """
    log_prob = logits.log_softmax(-1)
    top = log_prob.amax(-1, keepdim=True)
    threshold = torch.full_like(top, least).log() + (top if relative else 0.0)
    kept = (log_prob >= threshold) | (log_prob == top)  # something always stays
    return token_log_prob(log_prob.masked_fill(~kept, -torch.inf), token)


class MinPProxy(Wrapper):
    """Stores ``proxy_log_prob``: the policy at the start of the update without its improbable tokens.

    Lp-Reg, 2510.03222.

    Args:
        policy, correction: see :class:`Wrapper`.
        p_min: tokens below this share of the most probable token's probability are dropped.
        relative: False makes ``p_min`` a probability itself.

    Raises:
        ConfigError: the policy has no categorical distribution.
    """

    def __init__(self, policy: Any, correction: Correction, *, p_min: float = 0.02, relative: bool = True) -> None:
        super().__init__(policy, correction)
        if not hasattr(policy, "read_logits"):
            raise ConfigError(
                f"correction {correction.name} filters a categorical distribution, and {type(policy).__name__} shows "
                "no logits; use correction=ppo"
            )
        self.p_min, self.relative = p_min, relative

    def annotate(self, part: TensorDictBase) -> dict[str, Tensor]:
        """``proxy_log_prob`` and, from the same pass, ``proximal_log_prob``, both ``[B, N]``."""

        def reader(logits: Tensor, token: Tensor) -> tuple[Tensor, ...]:
            return filtered_log_prob(logits, token, self.p_min, self.relative), token_log_prob(logits, token)

        proxy, proximal = self.policy.read_logits(part, reader)
        return {"proxy_log_prob": proxy, "proximal_log_prob": proximal}
