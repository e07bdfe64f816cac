"""The filtered old policy that improbable tokens are held to."""

from __future__ import annotations

from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.correction import Correction
from unified_rl.errors import ConfigError
from unified_rl.interventions.base import Wrapper
from unified_rl.policies.sampling import keep_min_p, token_log_prob
from unified_rl.protocols import ShowsLogits, Trainable
from unified_rl.ranges import UnitInterval


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

    def __init__(
        self, policy: Trainable, correction: Correction, *, p_min: UnitInterval = 0.02, relative: bool = True
    ) -> None:
        super().__init__(policy, correction)
        if not isinstance(policy, ShowsLogits):
            raise ConfigError(
                f"correction {correction.name} filters a categorical distribution, and {type(policy).__name__} shows "
                "no logits; use correction=ppo"
            )
        self.shown, self.p_min, self.relative = policy, p_min, relative

    def annotate(self, part: TensorDictBase) -> dict[str, Tensor]:
        """``proxy_log_prob`` and, from the same pass, ``proximal_log_prob``, both ``[B, N]``."""

        def reader(logits: Tensor, token: Tensor) -> tuple[Tensor, ...]:
            kept = keep_min_p(logits, self.p_min, self.relative)
            return token_log_prob(kept, token), token_log_prob(logits, token)

        proxy, proximal = self.shown.read_logits(part, reader)
        return {"proxy_log_prob": proxy, "proximal_log_prob": proximal}
