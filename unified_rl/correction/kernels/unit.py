"""Kernels that look at each unit alone.

A surrogate ``f(ratio) * A`` has the gradient ``g(ratio) * A * grad log pi`` with ``g(ratio) = ratio * f'(ratio)``; that
``g`` is what stands here.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from unified_rl.correction.kernels.kernel import Kernel, Traits, by_name, clipped_formula, number
from unified_rl.correction.view import View, anchor_log_prob, masked, narrow, only, share
from unified_rl.ranges import Bound, NonNegative, Positive, Radius, UpperBound
from unified_rl.units import EXPERTS, Source


class Constant(Kernel):
    """Weight 1: REINFORCE."""

    name, formerly = "constant", "one"
    traits = Traits(holds_ratio=False, scores_experts=True, purpose="")

    def formula(self) -> str:
        """One."""
        return "1"

    def weight(self, view: View) -> Tensor:
        """Ones."""
        return torch.ones_like(view.log_ratio)


class Ratio(Kernel):
    """The ratio itself: plain importance sampling."""

    name, formerly = "ratio", "is"
    traits = Traits(purpose="")

    def formula(self) -> str:
        """The ratio."""
        return "r"

    def weight(self, view: View) -> Tensor:
        """The ratio."""
        return view.ratio


class PPO(Kernel):
    """The ratio, or 0 where it left ``[1 - clip_low, 1 + clip_high]`` in the direction that A pushes.

    ``dual_clip`` also zeroes A < 0 above that ratio. Proximal Policy Optimization Algorithms, 1707.06347; dual clip:
    Mastering Complex Control in MOBA Games with Deep Reinforcement Learning, 1912.09729.
    """

    name = "ppo"
    traits = Traits(truncates=True)
    clip_low: Radius = 0.2
    clip_high: Radius = 0.2
    dual_clip: UpperBound | None = None

    def formula(self) -> str:
        """The bounds, as ratios."""
        return clipped_formula(1 - self.clip_low, 1 + self.clip_high, self.dual_clip)

    def weight(self, view: View) -> Tensor:
        """The ratio inside the bounds."""
        return ppo(view, self.clip_low, self.clip_high, self.dual_clip)


def ppo(view: View, clip_low: float, clip_high: float, dual_clip: float | None = None) -> Tensor:
    """The weight of :class:`PPO`, ``[B, N]``."""
    return only(~outside(view, clip_low, clip_high, dual_clip), view.ratio)


def outside(view: View, clip_low: float, clip_high: float, dual_clip: float | None) -> Tensor:
    """Where :class:`PPO` clips, ``[B, N]`` bool."""
    below = view.ratio < 1 - clip_low
    if dual_clip is not None:
        below = below | (view.ratio > dual_clip)
    return (view.up & (view.ratio > 1 + clip_high)) | (below & ~view.up)


class Clipped(Kernel):
    """``clip(ratio, low, high)``: bounded weights that never lose their unit. CISPO, 2506.13585; AIPO, 2505.24034."""

    name, formerly = "clipped", "clamp"
    traits = Traits(truncates=True)
    ordered = (("low", "high"),)
    low: Bound = 0.0
    high: UpperBound = math.inf

    def formula(self) -> str:
        """The bounds."""
        return f"clip(r, {number(self.low)}, {number(self.high)})"

    def weight(self, view: View) -> Tensor:
        """The bounded ratio."""
        return view.ratio.clamp(self.low, self.high)


class Band(Kernel):
    """The ratio inside ``[low, high]``, else 0, whatever the sign of A; weight 1 inside where not ``weighted``.

    REC two-sided, 2509.24203; sPPO, 2108.05828 (bounds ``1 / (1 + eps)`` and ``1 + eps``, not weighted).
    """

    name = "band"
    traits = Traits(truncates=True)
    ordered = (("low", "high"),)
    low: Bound = 0.8
    high: UpperBound = 1.2
    weighted: bool = True

    def formula(self) -> str:
        """The bounds."""
        inside = "r" if self.weighted else "1"
        return f"{inside} where {number(self.low)} <= r <= {number(self.high)}, else 0"

    def weight(self, view: View) -> Tensor:
        """The ratio, or 1, inside."""
        return _inside((view.ratio >= self.low) & (view.ratio <= self.high), view, self.weighted)


class Ring(Kernel):
    """Inside ``[low, high]``, or far enough out on the side that A pulls back from. REC ring, 2509.24203."""

    name = "ring"
    traits = Traits(truncates=True)
    ordered = (("low", "high"), ("outer_low", "low"), ("high", "outer_high"))
    low: Bound = 0.8
    high: UpperBound = 1.2
    outer_low: Bound = 0.4
    outer_high: UpperBound = 3.0
    weighted: bool = True

    def formula(self) -> str:
        """Both pairs of bounds."""
        return (
            f"{'r' if self.weighted else '1'} where {number(self.low)} <= r <= {number(self.high)}, or A >= 0 and "
            f"r <= {number(self.outer_low)}, or A <= 0 and r >= {number(self.outer_high)}; else 0"
        )

    def weight(self, view: View) -> Tensor:
        """The ratio, or 1, where it counts."""
        ratio, a = view.ratio, narrow(view.advantage)
        inside = (ratio >= self.low) & (ratio <= self.high)
        back = ((a >= 0) & (ratio <= self.outer_low)) | ((a <= 0) & (ratio >= self.outer_high))
        return _inside(inside | back, view, self.weighted)


def _inside(inside: Tensor, view: View, weighted: bool) -> Tensor:
    return only(inside, view.ratio) if weighted else share(inside, view.ratio.dtype)


class SignClamp(Kernel):
    """``clip(ratio)`` with bounds chosen by the sign of A. DISPO, 2602.00983."""

    name = "sign_clamp"
    traits = Traits(truncates=True)
    ordered = (("low_positive", "high_positive"), ("low_negative", "high_negative"))
    low_positive: Bound = 0.8
    high_positive: UpperBound = 1.2
    low_negative: Bound = 0.0
    high_negative: UpperBound = 2.0

    def formula(self) -> str:
        """The bounds of both signs."""
        return (
            f"clip(r, {number(self.low_positive)}, {number(self.high_positive)}) for A > 0, "
            f"clip(r, {number(self.low_negative)}, {number(self.high_negative)}) otherwise"
        )

    def weight(self, view: View) -> Tensor:
        """The bounded ratio."""
        ratio = view.ratio
        positive = ratio.clamp(self.low_positive, self.high_positive)
        return torch.where(view.up, positive, ratio.clamp(self.low_negative, self.high_negative))


class Tapered(Kernel):
    """1 for A > 0, else ``clip(ratio, low, high)``. TOPR (Tapered Off-Policy REINFORCE), 2503.14286."""

    name, formerly = "tapered", "taper"
    ordered = (("low", "high"),)
    low: Bound = 0.0
    high: UpperBound = 1.0

    def formula(self) -> str:
        """The bounds."""
        return f"1 for A > 0, clip(r, {number(self.low)}, {number(self.high)}) otherwise"

    def weight(self, view: View) -> Tensor:
        """1 or the bounded ratio."""
        return view.ratio.clamp(self.low, self.high).masked_fill_(view.up, 1.0)


def _by_sign(up: Tensor, positive: float, negative: float, view: View) -> Tensor:
    """One of two settings for each unit, in the precision of the ratio."""
    return negative + (positive - negative) * up.to(view.ratio.dtype)


class SoftGate(Kernel):
    """``4 r s (1 - s)`` with ``s = sigmoid(tau (r - 1))``: a soft clip. SAPO, 2511.20347."""

    name, formerly = "soft_gate", "gate"
    tau_positive: NonNegative = 1.0
    tau_negative: NonNegative = 1.05

    def formula(self) -> str:
        """The temperatures."""
        return (
            f"4 r s (1 - s), s = sigmoid(tau (r - 1)), tau = {number(self.tau_positive)} for A > 0, "
            f"{number(self.tau_negative)} otherwise"
        )

    def weight(self, view: View) -> Tensor:
        """The soft gate."""
        tau = _by_sign(view.up, self.tau_positive, self.tau_negative, view)
        s = (tau * (view.ratio - 1)).sigmoid()
        return 4 * view.ratio * s * (1 - s)


class GammaDensity(Kernel):
    """``r^k exp(lam - lam r)``: peaks at ``k / lam`` and vanishes on both sides. VESPO, 2602.10693."""

    name, formerly = "gamma_density", "gamma"
    k_positive: NonNegative = 2.0
    lam_positive: NonNegative = 3.0
    k_negative: NonNegative = 3.0
    lam_negative: NonNegative = 2.0

    def formula(self) -> str:
        """The exponents of both signs."""
        return (
            f"r^k exp(lam - lam r), (k, lam) = ({number(self.k_positive)}, {number(self.lam_positive)}) for A >= 0, "
            f"({number(self.k_negative)}, {number(self.lam_negative)}) otherwise"
        )

    def weight(self, view: View) -> Tensor:
        """The density, 1 at ratio 1."""
        up = narrow(view.advantage) >= 0
        k = _by_sign(up, self.k_positive, self.k_negative, view)
        lam = _by_sign(up, self.lam_positive, self.lam_negative, view)
        return (lam + k * view.log_ratio - lam * view.ratio).exp()


class TVMask(Kernel):
    """``min(ratio, cap)``, or 0 where the probability itself moved too far the way A pushes. DPPO, 2602.04879."""

    name = "tv_mask"
    traits = Traits(truncates=True, probabilities="ppo")
    low: Radius = 0.2
    high: Radius = 0.2
    cap: UpperBound = 20.0

    def formula(self) -> str:
        """The bounds of the probability's move."""
        return (
            f"min(r, {number(self.cap)}), but 0 where A > 0 and p - q > {number(self.high)}, or A < 0 and "
            f"q - p > {number(self.low)} (p, q: the unit's probability now and under the anchor)"
        )

    def weight(self, view: View) -> Tensor:
        """The ratio where the probability stayed near."""
        moved = view.log_prob.exp() - (view.log_prob - view.unit_log_ratio).exp()
        bad = (view.up & (moved > self.high)) | (~view.up & (moved < -self.low))
        return only(~bad, view.ratio.clamp(max=self.cap))


class KLMask(Kernel):
    """As ``tv_mask`` with the binary KL from the anchor, in the direction that A pushes. DPPO, 2602.04879."""

    name = "kl_mask"
    traits = Traits(truncates=True, probabilities="ppo")
    low: Radius = 0.05
    high: Radius = 0.05
    cap: UpperBound = 20.0

    def formula(self) -> str:
        """The bounds of the KL."""
        return (
            f"min(r, {number(self.cap)}), but 0 where A > 0, p > q and KL > {number(self.high)}, or A < 0, p < q and "
            f"KL > {number(self.low)} (KL between the two-outcome distributions q and p)"
        )

    def weight(self, view: View) -> Tensor:
        """The ratio where the KL is small."""
        tiny = 1e-8
        p, q = view.log_prob.exp(), (view.log_prob - view.unit_log_ratio).exp()
        kl = -q * view.unit_log_ratio + (1 - q) * ((1 - q + tiny) / (1 - p + tiny)).log()
        bad = (view.up & (p > q) & (kl > self.high)) | (~view.up & (p < q) & (kl > self.low))
        return only(~bad, view.ratio.clamp(max=self.cap))


class LogClip(Kernel):
    """PPO clipping of the log-ratio at ``-low t^power`` and ``high t^power``, t the unit's position in its row.

    For A < 0 also above ``dual t^power``. CTPO, 2605.07331.
    """

    name = "log_clip"
    traits = Traits(truncates=True)
    low: Radius = 0.025
    high: Radius = 0.05
    dual: Radius | None = 0.05
    power: NonNegative = 0.5

    def formula(self) -> str:
        """The bounds, as functions of the position."""
        wide = f"t^{number(self.power)}"
        return (
            f"r, but 0 where A > 0 and d > {number(self.high)} {wide}, or A < 0 and d < -{number(self.low)} {wide}"
            + ("" if self.dual is None else f" or d > {number(self.dual)} {wide}")
            + " (t: position in the row)"
        )

    def weight(self, view: View) -> Tensor:
        """The ratio inside the bounds."""
        wide = view.layout.position.to(view.log_ratio.dtype) ** self.power
        below = view.log_ratio < -self.low * wide
        bad = below if self.dual is None else below | (view.log_ratio > self.dual * wide)
        return view.zeroed(view.log_ratio > self.high * wide, bad)


class ExpAdvantage(Kernel):
    """``exp(A / temperature)``, without a ratio. RED-Weight, 2509.24203."""

    name = "exp_advantage"
    traits = Traits(holds_ratio=False, purpose="")
    temperature: Positive = 1.0

    def formula(self) -> str:
        """The exponential."""
        return "exp(A)" if self.temperature == 1 else f"exp(A / {number(self.temperature)})"

    def weight(self, view: View) -> Tensor:
        """The exponential."""
        return (narrow(view.advantage) / self.temperature).clamp(max=20.0).exp().expand_as(view.log_ratio)


class Shaped(Kernel):
    """``gamma r / (r + gamma)^2``: lifts units of low probability. LUFFY's policy shaping, 2504.14945."""

    name, formerly = "shaped", "shape"
    traits = Traits(probabilities="importance_sampling")
    gamma: Positive = 0.1

    def formula(self) -> str:
        """The shaping."""
        return f"c r / (r + c)^2, c = {number(self.gamma)}"

    def weight(self, view: View) -> Tensor:
        """The slope of ``r / (r + gamma)``, times the ratio."""
        return lifted(view.ratio, self.gamma)


def lifted(x: Tensor, gamma: float) -> Tensor:
    """``gamma x / (x + gamma)^2``, elementwise: the slope of ``x / (x + gamma)`` by ``log x``."""
    return gamma * x / (x + gamma).square()


class BySource(Kernel):
    """PPO, but a weight of its own on the rows of some sources; derive from it to say which rows, and what weight.

    Attributes:
        sources: whose rows have it; a record that names no source has none.
        of_rows: these rows, in the formula.
    """

    sources: ClassVar[tuple[Source, ...]] = EXPERTS
    of_rows: ClassVar[str] = "on demonstrations"
    clip_low: Radius = 0.2
    clip_high: Radius = 0.2

    def own(self) -> str:
        """The formula of :meth:`shaped`."""
        raise NotImplementedError

    def shaped(self, view: View) -> Tensor:
        """The weight on the rows of these sources, ``[B, N]``."""
        raise NotImplementedError

    def formula(self) -> str:
        """Both rules."""
        return f"{self.own()}, {self.of_rows}; elsewhere " + clipped_formula(
            1 - self.clip_low, 1 + self.clip_high, None
        )

    def weight(self, view: View) -> Tensor:
        """The one or the other, by the row's source."""
        source = view.batch.get("source", None)
        on_policy = ppo(view, self.clip_low, self.clip_high)
        if source is None:
            return on_policy
        theirs = torch.stack([source == own for own in self.sources]).any(0)
        return torch.where(theirs.unsqueeze(-1), self.shaped(view), on_policy)


class DemonstrationShape(BySource):
    """``shaped`` of the bare probability on demonstration and expert rows, PPO on all others. LUFFY, 2504.14945."""

    name = "demonstration_shape"
    traits = Traits(probabilities="ppo", demonstrations="dapo", scores_experts=True)
    gamma: Positive = 0.1

    def own(self) -> str:
        """The shaping."""
        return f"c p / (p + c)^2, c = {number(self.gamma)}, p = pi"

    def shaped(self, view: View) -> Tensor:
        """The slope of ``p / (p + gamma)``, times the probability."""
        return lifted(view.log_prob.exp(), self.gamma)


class DemonstrationMixture(BySource):
    """``2 p / (1.5 q + 0.5) (1 - p)^power`` on demonstration and expert rows, PPO on all others. RL-PLUS, 2508.00222.

    ``q`` is the probability at the start of the update: whoever wrote the row is taken for the mean of the policy then
    and of one that gives every unit an even chance of being certain, so the ratio is bounded by ``4 p``.
    """

    name = "demonstration_mixture"
    traits = Traits(probabilities="ppo", demonstrations="dapo", scores_experts=True, anchors=("proximal",))
    power: NonNegative = 0.5

    def own(self) -> str:
        """The mixture's ratio."""
        return f"2 p / (1.5 q + 0.5) (1 - p)^{number(self.power)}, p = pi, q = proximal"

    def shaped(self, view: View) -> Tensor:
        """The ratio to the mixture, less on what is certain."""
        p, q = view.log_prob.exp(), masked(view.mask, anchor_log_prob(view.batch, "proximal")).exp()
        return 2 * p / (1.5 * q + 0.5) * (1 - p).clamp(min=0.0).pow(self.power)


class ReplayShape(BySource):
    """``shaped`` of the ratio to their own sampler on rows of replay, PPO on all others. ExGRPO, 2510.02245."""

    name = "replay_shape"
    traits = Traits(probabilities="ppo")
    sources = (Source.OFFLINE,)
    of_rows = "on rows of replay"
    gamma: Positive = 0.1

    def own(self) -> str:
        """The shaping."""
        return f"c r / (r + c)^2, c = {number(self.gamma)}"

    def shaped(self, view: View) -> Tensor:
        """As of :class:`Shaped`."""
        return lifted(view.ratio, self.gamma)


class CenteredPPO(Kernel):
    """PPO on the ratio to each unit's own behavior policy, clipped around the proximal policy's ratio to it.

    ReMix, 2507.06892 (clip form recalled, not read).
    """

    name = "centered_ppo"
    traits = Traits(truncates=True, anchors=("proximal",))
    clip: Radius = 0.2

    def formula(self) -> str:
        """The bounds around the proximal policy."""
        clip = number(self.clip)
        return f"r, but 0 where A > 0 and r > m + {clip}, or A < 0 and r < m - {clip}, m = proximal / behavior"

    def weight(self, view: View) -> Tensor:
        """The ratio inside the bounds."""
        center = (view.unit_log_ratio - view.against("proximal")).exp()
        ratio = view.ratio
        return view.zeroed(ratio > center + self.clip, ratio < center - self.clip)


KERNELS = by_name(
    Constant,
    Ratio,
    PPO,
    Clipped,
    Band,
    Ring,
    SignClamp,
    Tapered,
    SoftGate,
    GammaDensity,
    TVMask,
    KLMask,
    LogClip,
    ExpAdvantage,
    Shaped,
    DemonstrationShape,
    DemonstrationMixture,
    ReplayShape,
    CenteredPPO,
)
