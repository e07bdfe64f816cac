"""Projection of each token's distribution into a KL ball around the old one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.correction import Correction
from unified_rl.errors import ConfigError
from unified_rl.interventions.base import Metrics, Plain, Wrapper
from unified_rl.interventions.distribution import OldCategorical, categorical_kl
from unified_rl.protocols import ShowsLogits, Trainable
from unified_rl.ranges import Count, NonNegative, Positive

ITERATIONS = 60


def tilt(log_p: Tensor, log_q: Tensor, share: Tensor) -> Tensor:
    """Log-probs of the distribution proportional to ``p^share q^(1 - share)``; ``share [n]``, the others ``[n, m]``."""
    return torch.lerp(log_q, log_p, share.unsqueeze(-1)).log_softmax(-1)


@torch.no_grad()
def solve_share(log_p: Tensor, log_q: Tensor, bound: float) -> Tensor:
    """The largest ``share`` in [0, 1] with ``KL(tilt || q) <= bound``, ``[n]``: Newton kept inside a bisection.

    ``share = 1 / (1 + eta)`` for the multiplier eta of the constraint; the divergence grows with it.
    """
    low = torch.zeros_like(log_p[:, 0])
    high, share = torch.ones_like(low), torch.ones_like(low)
    close = 100 * torch.finfo(log_p.dtype).eps * bound
    s = log_p - log_q
    for _ in range(ITERATIONS):
        log_pi = tilt(log_p, log_q, share)
        pi = log_pi.exp()
        gap = (pi * (log_pi - log_q)).sum(-1) - bound
        done = (gap.abs() <= close) | ((gap <= 0) & (share == 1))
        if bool(done.all()):
            break
        slope = share * (pi * (s - (pi * s).sum(-1, keepdim=True)).square()).sum(-1)
        low, high = torch.where(gap <= 0, share, low), torch.where(gap > 0, share, high)
        newton = share - gap / slope.clamp(min=1e-30)
        inside = (newton > low) & (newton < high)
        share = torch.where(done, share, torch.where(inside, newton, 0.5 * (low + high)))
    return share


def project(log_p: Tensor, log_q: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """``argmin_pi KL(pi || p)`` subject to ``KL(pi || q) <= bound``, with gradient in ``log_p``.

    Inside the ball it is p itself. Outside, the share solves ``KL = bound``; one Newton step from the solution, with
    the slope held fixed, has the derivative of the implicit function.

    Args:
        log_p, log_q: ``[n, m]`` normalised log-probs.
        bound: above 0.

    Returns:
        Log-probs ``[n, m]``, and the multiplier eta ``[n]`` (0 inside), detached.
    """
    within = categorical_kl(log_p.detach(), log_q) <= bound
    share = torch.where(within, 1.0, solve_share(log_p.detach(), log_q, bound))
    if log_p.requires_grad:
        fixed = tilt(log_p, log_q, share)
        pi = fixed.detach().exp()
        s = (log_p - log_q).detach()
        slope = share * (pi * (s - (pi * s).sum(-1, keepdim=True)).square()).sum(-1)
        gap = categorical_kl(fixed, log_q)
        moved = share - (gap - gap.detach()) / slope.clamp(min=1e-30)
        projected = tilt(log_p, log_q, torch.where(within, share, moved))
    else:
        projected = tilt(log_p, log_q, share)
    return torch.where(within.unsqueeze(-1), log_p, projected), (1.0 / share.clamp(min=1e-30) - 1.0).detach()


class ProjectCategorical(Wrapper):
    """The loss sees the projected policy; the network is drawn to it by ``regression * KL(network || projected)``.

    TROLL, 2510.03817 (from notes; the size of the ball was not seen). Each token's distribution is cut into its old
    ``top_k`` most probable tokens, the sampled one, and all others together, which the projection scales alike.

    Args:
        policy, correction: see :class:`Wrapper`.
        bound: radius of the ball, KL(projected || old).
        regression: weight of the pull of the network to the projected policy.
        top_k: tokens kept one by one, the sampled one among them; above the vocabulary's size nothing is merged.

    Raises:
        ConfigError: the policy has no categorical distribution.
    """

    reports = ("loss/wrapper", "wrapper/projected")
    rescores = True

    def __init__(
        self,
        policy: Trainable,
        correction: Correction,
        *,
        bound: Positive = 0.05,
        regression: NonNegative = 1.0,
        top_k: Count = 64,
    ) -> None:
        super().__init__(policy, correction)
        if not isinstance(policy, ShowsLogits):
            raise ConfigError(
                f"correction {correction.name} projects a categorical distribution, and {type(policy).__name__} shows "
                "no logits; use correction=fixpo for a trust region on any policy"
            )
        self.old, self.bound, self.regression = OldCategorical(policy, top_k), bound, regression
        self.outside: Tensor | int = 0
        self.met = 0

    def annotate(self, part: TensorDictBase) -> dict[str, Tensor]:
        """The old distributions."""
        return self.old.store(part)

    def score(self, part: TensorDictBase, plain: Plain) -> tuple[Tensor, Tensor | None]:
        """Projected log-probs, and the pull."""
        log_prob, pull = self.old.read(part, self._projected)
        return log_prob, self.regression * pull

    def around(self, step: Callable[[], Metrics], batch: TensorDictBase) -> Metrics:
        """One step; says which share of the units met by it lay outside the ball."""
        self.outside, self.met = 0, 0
        metrics = step()
        if self.shard.world > 1:
            mine = self.shard.mine(len(batch))  # one that has no row passes the first, which is another's
            met = {"outside": self.outside, "met": self.met} if mine.stop > mine.start else {}
            found = self.shard.sums(met, batch["mask"].device)
            return {**metrics, "wrapper/projected": found["outside"] / found["met"].clamp(min=1)}
        return {**metrics, "wrapper/projected": self.outside / max(1, self.met)}

    def _projected(self, new: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        projected, eta = project(new, old, self.bound)
        self.outside, self.met = self.outside + (eta > 0).sum(), self.met + len(eta)
        return projected[:, 0], categorical_kl(new, projected.detach())
