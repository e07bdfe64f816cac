"""Wrappers around the optimiser step: its size, its direction, where it starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.correction import Correction
from unified_rl.errors import ConfigError
from unified_rl.interventions.base import Metrics, Wrapper, sampled
from unified_rl.optimizer import Optimizer
from unified_rl.protocols import ShowsLogits, Trainable
from unified_rl.ranges import NonNegative, Positive, Share, TwoOrMore, UnitInterval, Whole


def row_log_weight(record: TensorDictBase) -> Tensor:
    """Log of proximal over behavior probability of each whole row, ``[B]``; nothing is clamped."""
    d = record["proximal_log_prob"] - record["behavior_log_prob"]
    return torch.where(record["mask"], d, 0.0).sum(-1)


def log_ess_fraction(log_weight: Tensor) -> Tensor:
    """Log of ``(sum w)^2 / (B sum w^2)`` for ``log w [B]``; scalar, between ``-log B`` and 0."""
    return 2 * log_weight.logsumexp(0) - (2 * log_weight).logsumexp(0) - math.log(max(len(log_weight), 1))


def score_norm_proxy(logits: Tensor, token: Tensor) -> Tensor:
    """``1 - 2 p_token + sum_v p_v^2``: squared norm of the score in the logits, ``[n]``."""
    p = logits.softmax(-1)
    return 1 - 2 * p.gather(-1, token.unsqueeze(-1)).squeeze(-1) + p.square().sum(-1)


class ScoreNormBaseline(Wrapper):
    """A group baseline that weighs its rows by ``w^2 * |score|^2``: of all baselines the one of least variance.

    ``w`` is the row's proximal over behavior probability, and ``|score|^2`` the squared norm of the score taken in the
    logits. Without a group baseline in the correction it does nothing.

    Args:
        policy, correction: see :class:`Wrapper`.
        length_normalized: divide the weight of a row by its squared length.

    Raises:
        ConfigError: a group baseline is wanted, and the policy shows no logits or is of control.
    """

    whole_rows = True
    anchors = frozenset({"proximal"})

    def __init__(self, policy: Trainable, correction: Correction, *, length_normalized: bool = False) -> None:
        super().__init__(policy, correction)
        self.length_normalized = length_normalized
        self.baseline = bool(correction.advantage)
        if self.baseline and not self.language:
            raise ConfigError(
                f"the baseline of correction {correction.name} is over groups of rows that share a prompt, which "
                "control rows do not; use correction=sequence_tis, or set correction.advantage=null to keep the "
                "learning rate's scale with a critic's advantages"
            )
        if self.baseline and not isinstance(policy, ShowsLogits):
            raise ConfigError(
                f"the baseline of correction {correction.name} reads logits, and {type(policy).__name__} shows none; "
                "use correction=sequence_tis"
            )
        self.shown = policy if isinstance(policy, ShowsLogits) else None

    def annotate(self, part: TensorDictBase) -> dict[str, Tensor]:
        """``score_norm [B]``: the summed proxy of each row."""
        if not self.baseline or self.shown is None:
            return {}
        (norm,) = self.shown.read_logits(part, lambda logits, token: (score_norm_proxy(logits, token),))
        return {"score_norm": norm.sum(-1)}

    def row_weight(self, record: TensorDictBase) -> Tensor | None:
        """``w^2 * |score|^2`` of each row, up to a factor, ``[B]``; None without a group baseline."""
        if not self.baseline:
            return None
        log_weight = row_log_weight(record)
        weight = (2 * (log_weight - log_weight.amax())).exp() * record["score_norm"]
        out: Tensor | None = weight / record["mask"].sum(-1).clamp(min=1).square() if self.length_normalized else weight
        return out


class EssLearningRate(ScoreNormBaseline):
    """The learning rate of a step times a power of its rows' effective sample size, and the matching group baseline.

    ``lr * min(1, ESS / target)^power`` with the ESS fraction of the untruncated row weights proximal/behavior. VCPO,
    2602.17616.

    Args:
        policy, correction, length_normalized: see :class:`ScoreNormBaseline`.
        power: 0.5 is the square root, 1 linear.
        target: ESS fraction at which the learning rate is the full one.

    Raises:
        ConfigError: a group baseline is wanted, and the policy shows no logits.
    """

    reports = ("wrapper/lr_scale", "wrapper/row_ess")

    def __init__(
        self,
        policy: Trainable,
        correction: Correction,
        *,
        power: NonNegative = 0.5,
        target: Positive = 1.0,
        length_normalized: bool = False,
    ) -> None:
        super().__init__(policy, correction, length_normalized=length_normalized)
        self.power, self.target = power, target

    def around(self, step: Callable[[], Metrics], batch: TensorDictBase) -> Metrics:
        """One step at the scaled learning rate, which is restored."""
        ess = log_ess_fraction(row_log_weight(batch)[sampled(batch)])
        scale = self.shard.first(float(((ess - math.log(self.target)) * self.power).exp().clamp(max=1.0)))
        with self.optimizer.scaled_lr(scale):
            metrics = step()
        return {**metrics, "wrapper/lr_scale": scale, "wrapper/row_ess": ess.exp()}


def signal_share(mean: float, square: float, decay: float, steps: int) -> float:
    """``|g|^2 / (|g|^2 + Var)`` of gradients of mean g, from averages that started at 0; between 0 and 1.

    Args:
        mean: squared norm of the moving average of the gradient.
        square: moving average of its squared norm.
        decay: of both.
        steps: gradients that they hold; one gradient tells no variance, and counts as signal.
    """
    held = 1.0 - decay**steps
    own = (1 - decay) * (1 + decay**steps) / ((1 + decay) * held)  # share of the variance that the average keeps
    if own >= 1.0 or square == 0.0:
        return 1.0
    ratio = mean / (square * held)
    return min(1.0, max(0.0, (ratio - own) / (1.0 - own)))


class SnrLearningRate(ScoreNormBaseline):
    """The learning rate of a step times the share of signal in its gradient, and the baseline of least variance.

    ``lr * |g|^2 / (|g|^2 + Var)`` of the policy, from moving averages over steps, see :func:`signal_share`. OBLR-PO,
    2511.23310 (this form of the rate is our reading of an abstract).

    Args:
        policy, correction, length_normalized: see :class:`ScoreNormBaseline`.
        decay: of the averages; 0 leaves the rate as it is.
        least: below which the factor never falls.

    Raises:
        ConfigError: see :class:`ScoreNormBaseline`.
    """

    reports = ("wrapper/lr_scale",)
    reads_weights = True

    def __init__(
        self,
        policy: Trainable,
        correction: Correction,
        *,
        decay: Share = 0.9,
        least: UnitInterval = 0.0,
        length_normalized: bool = False,
    ) -> None:
        super().__init__(policy, correction, length_normalized=length_normalized)
        self.decay, self.least = decay, least
        self.mean: dict[str, Tensor] = {}
        self.square, self.steps, self.scale = 0.0, 0, 1.0

    def attach(self, optimizer: Optimizer) -> None:
        """Looks at the gradient between the bound on its norm and the step."""
        super().attach(optimizer)
        self.parameters = {name: p for name, p in optimizer.named if name.startswith("policy.")}
        optimizer.after_clip = self._look

    @torch.no_grad()
    def _look(self, shrunk: float) -> None:
        """Takes in a gradient, which ``shrunk`` has already been applied to, and scales the rate of this step."""
        found = {name: p.grad / max(shrunk, 1e-12) for name, p in self.parameters.items() if p.grad is not None}
        for name, gradient in found.items():
            self.mean.setdefault(name, torch.zeros_like(gradient)).lerp_(gradient, 1 - self.decay)
        self.square = self.decay * self.square + (1 - self.decay) * float(_norm(list(found.values()))) ** 2
        self.steps += 1
        share = signal_share(float(_norm(list(self.mean.values()))) ** 2, self.square, self.decay, self.steps)
        self.scale = max(self.least, share)
        self.stack.enter_context(self.optimizer.scaled_lr(self.scale))

    def around(self, step: Callable[[], Metrics], batch: TensorDictBase) -> Metrics:
        """One step at a learning rate that is known once its gradient is, and restored."""
        with ExitStack() as self.stack:
            metrics = step()
        return {**metrics, "wrapper/lr_scale": self.scale}

    def state_dict(self) -> dict[str, Any]:
        """The averages, and how many gradients they hold."""
        return {"mean": dict(self.mean), "square": self.square, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores them."""
        self.mean = {name: x.to(self.parameters[name].device) for name, x in state["mean"].items()}
        self.square, self.steps = float(state["square"]), int(state["steps"])


class ClipBiasScale(Wrapper):
    """The gradient divided by ``max(1, |C| / s)``: C is what clipping took from it, s its own running norm.

    S-PPO and ST-PPO, 2511.20718 (the normaliser is our reading of an abstract). The policy's gradient alone is scaled,
    after the bound on its norm.

    Args:
        policy, correction: see :class:`Wrapper`.
        decay: of the running norm; 0 takes the present step's.
    """

    reports = ("wrapper/gradient_scale",)
    reads_weights = True

    def __init__(self, policy: Trainable, correction: Correction, *, decay: Share = 0.99) -> None:
        super().__init__(policy, correction)
        self.decay = decay
        self.unclipped = correction.with_kernel("ratio")
        self.running = 0.0
        self.removed: Sequence[Tensor] | None = None
        self.scale = 1.0

    def attach(self, optimizer: Optimizer) -> None:
        """Scales between the bound on the gradient's norm and the step."""
        super().attach(optimizer)
        self.parameters = [p for name, p in optimizer.named if name.startswith("policy.")]
        optimizer.after_clip = self._scale

    def watch(self, log_prob: Tensor, part: TensorDictBase, stats: TensorDictBase, weight: Tensor) -> None:
        """Adds the micro-batch's share of C; a second backward pass, where anything was clipped."""
        lost = self.unclipped.loss(log_prob.detach(), part, stats).weight - weight
        if not bool(lost.any()):
            return
        clipped = (lost * torch.where(lost == 0, 0.0, log_prob)).sum()
        found = torch.autograd.grad(clipped, self.parameters, retain_graph=True, materialize_grads=True)
        self.removed = list(found) if self.removed is None else torch._foreach_add(list(self.removed), list(found))

    def _scale(self, shrunk: float) -> None:
        """``shrunk`` is the factor that the bound on the norm has already applied."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = float(_norm(gradients)) / max(shrunk, 1e-12)
        self.running = self.decay * self.running + (1 - self.decay) * norm if self.running else norm
        found: Sequence[Tensor | None] = [None] * len(self.parameters) if self.removed is None else self.removed
        removed, self.removed = [x for x in self.shard.summed(found, self.parameters) if x is not None], None
        size = float(_norm(removed)) if removed else 0.0
        self.scale = 1.0 / max(1.0, size / max(self.running, 1e-12))
        if self.scale < 1.0:
            torch._foreach_mul_(gradients, self.scale)

    def around(self, step: Callable[[], Metrics], batch: TensorDictBase) -> Metrics:
        """One step; says by how much it was scaled."""
        return {**step(), "wrapper/gradient_scale": self.scale}

    def state_dict(self) -> dict[str, Any]:
        """The running norm."""
        return {"running": self.running}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores it."""
        self.running = float(state["running"])


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    out: Tensor = torch.stack([x.norm() for x in tensors]).norm()
    return out


class Reposition(Wrapper):
    """Fast steps on one minibatch, a partial return to where they began, and one more step. SFPO, 2510.04072.

    The optimiser's moments and step counts go back with the weights, so that ``alpha=0`` is one ordinary step and
    ``alpha=1`` is ``steps + 1`` of them under any optimiser. The switch: once the entropy's deviation from its recent
    mean reaches ``threshold`` standard deviations, alpha is 0 for good. The entropy is estimated from the sampled
    units' behavior log-probs.

    Args:
        policy, correction: see :class:`Wrapper`.
        steps: K, the fast steps.
        alpha: share of the way that is kept.
        window: minibatches over which the mean and deviation are taken.
        threshold: standard deviations that switch it off; None never does.
    """

    reports = ("wrapper/alpha",)

    def __init__(
        self,
        policy: Trainable,
        correction: Correction,
        *,
        steps: Whole = 3,
        alpha: UnitInterval = 0.8,
        window: TwoOrMore = 20,
        threshold: NonNegative | None = 3.0,
    ) -> None:
        super().__init__(policy, correction)
        self.steps, self.alpha, self.window, self.threshold = steps, alpha, window, threshold
        self.entropies: list[float] = []
        self.off = False

    def around(self, step: Callable[[], Metrics], batch: TensorDictBase) -> Metrics:
        """K steps, back by ``1 - alpha``, one step."""
        self._watch_entropy(batch)
        alpha = 0.0 if self.off else self.alpha
        if alpha > 0:
            weights = [p.detach().clone() for p in self.optimizer.parameters]
            moments = self.optimizer.moments()
            for _ in range(self.steps):
                step()
            with torch.no_grad():
                torch._foreach_lerp_(weights, [p.detach() for p in self.optimizer.parameters], alpha)
                for p, mixed in zip(self.optimizer.parameters, weights, strict=True):
                    p.copy_(mixed)
            self.optimizer.mix_moments(moments, alpha)
        return {**step(), "wrapper/alpha": alpha}

    def _watch_entropy(self, batch: TensorDictBase) -> None:
        mask = batch["mask"] & sampled(batch).unsqueeze(-1)
        entropy = float(-torch.where(mask, batch["behavior_log_prob"], 0.0).sum() / mask.sum().clamp(min=1))
        entropy = self.shard.first(entropy)  # a switch follows from it
        seen = torch.tensor(self.entropies, dtype=torch.float64)
        if self.threshold is not None and len(seen) == self.window:
            deviation = abs(entropy - float(seen.mean())) / max(float(seen.std()), 1e-8)
            self.off = self.off or deviation >= self.threshold
        self.entropies = [*self.entropies, entropy][-self.window :]

    def state_dict(self) -> dict[str, Any]:
        """Recent entropies, and whether the switch has fallen."""
        return {"entropies": list(self.entropies), "off": self.off}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores them."""
        self.entropies, self.off = [float(x) for x in state["entropies"]], bool(state["off"])
