"""Wrappers that move a setting of the correction with the progress of the run."""

from __future__ import annotations

from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.correction import Correction
from unified_rl.errors import ConfigError
from unified_rl.interventions.base import Plain, Wrapper
from unified_rl.interventions.distribution import old_distribution
from unified_rl.protocols import Trainable
from unified_rl.ranges import Count, NonNegative, Positive


def linear(start: float, end: float, progress: float) -> float:
    """From ``start`` at progress 0 to ``end`` at 1."""
    return start + (end - start) * progress


class AnnealLevel(Wrapper):
    """The level's ``p`` goes linearly from ``p_start`` to ``p_end`` over the run. HölderPO, 2605.12058.

    Raises:
        ConfigError: the correction's level has no ``p``.
    """

    def __init__(self, policy: Trainable, correction: Correction, *, p_start: float = 2.0, p_end: float = -2.0) -> None:
        super().__init__(policy, correction)
        if "p" not in correction.level_settings:
            raise ConfigError(
                f"correction.wrapper anneal_level moves the p of a level, and correction.level={correction.level_name} "
                "has none: set correction.level=hoelder, or use correction=hoelder"
            )
        self.p_start, self.p_end = p_start, p_end

    def start(self, progress: float) -> None:
        """Sets p."""
        self.correction.set_level(p=linear(self.p_start, self.p_end, progress))


class SyncReference(Wrapper):
    """The reference becomes the present policy after every ``every`` updates. Humanline, 2509.24207.

    Raises:
        ConfigError: ``every`` below 1.
    """

    def __init__(self, policy: Trainable, correction: Correction, *, every: Count = 4) -> None:
        super().__init__(policy, correction)
        self.sync_every = every


class AnnealPenalty(Wrapper):
    """``coefficient / t`` times the KL to the policy at the start of the update, t annealed linearly. MDPO, 2005.09814.

    The KL is the full one where the policy shows its distributions (logits, normals), and then replaces the sample
    estimate that is the preset's own penalty; else that penalty is annealed. :attr:`full` says which.

    Args:
        policy, correction: see :class:`Wrapper`.
        start, end: of the step size t.
        floor: least t.
        coefficient: of the full KL.
        top_k: tokens of a categorical that are kept one by one; above the vocabulary's size the KL is exact.
    """

    reports = ("loss/wrapper",)

    def __init__(
        self,
        policy: Trainable,
        correction: Correction,
        *,
        start: NonNegative = 1.0,
        end: NonNegative = 0.0,
        floor: Positive = 0.01,
        coefficient: NonNegative = 1.0,
        top_k: Count = 64,
    ) -> None:
        super().__init__(policy, correction)
        self.first, self.last, self.floor, self.coefficient = start, end, floor, coefficient
        self.old = old_distribution(policy, top_k)
        self.rescores = self.full
        self.inverse = 1.0
        self.sampled = correction.penalty_coefficients

    @property
    def full(self) -> bool:
        """Whether the KL is over whole distributions rather than estimated from the samples."""
        return self.old is not None

    def start(self, progress: float) -> None:
        """Sets the coefficient."""
        self.inverse = 1.0 / max(linear(self.first, self.last, progress), self.floor)
        scale = 0.0 if self.full else self.inverse
        self.correction.set_penalty_coefficients([scale * c for c in self.sampled])

    def annotate(self, part: TensorDictBase) -> dict[str, Tensor]:
        """The distributions at the start of the update."""
        return {} if self.old is None else self.old.store(part)

    def score(self, part: TensorDictBase, plain: Plain) -> tuple[Tensor, Tensor | None]:
        """Log-probs and the weighted KL."""
        if self.old is None:
            return plain(part), None
        log_prob, kl = self.old.divergence(part)
        return log_prob, self.coefficient * self.inverse * kl
