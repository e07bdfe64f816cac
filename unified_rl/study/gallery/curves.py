"""Weight curves: the coefficient of ``A grad log pi`` as a function of the log-ratio, measured from the loss itself.

Each point is a row of one unit, so all levels coincide. Where the weight depends on the rest of the batch, that rest is
fixed: three companions in the point's group, and for batch statistics 128 rows of small drift.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.correction.correction import Correction
from unified_rl.correction.requirements import looks_at_batch
from unified_rl.correction.view import ANCHORS
from unified_rl.units import Source

SPAN = 3.0
POINTS, FEW_POINTS = 301, 101
ANCHOR_PROBABILITY = 0.04
"""Probability of every anchor, for kernels that look at probabilities and not at ratios alone."""
REFERENCE_ROWS, REFERENCE_SPREAD = 128, 0.25


@dataclass(frozen=True)
class Curves:
    """Weights over a grid of log-ratios, ``[n]`` float64.

    Attributes:
        log_ratio: the grid.
        positive, negative: weight of the policy term for A > 0 and A < 0.
        positive_total, negative_total: the same with the gradient of the penalties added; None without penalties.
        outer: weight against the log-ratio proximal / behavior at an update's start; None without such rules.
    """

    log_ratio: Tensor
    positive: Tensor
    negative: Tensor
    positive_total: Tensor | None
    negative_total: Tensor | None
    outer: Tensor | None

    def lines(self) -> dict[str, Tensor]:
        """The curves there are, by name."""
        named = {
            "A > 0": self.positive,
            "A < 0": self.negative,
            "A > 0, with penalty": self.positive_total,
            "A < 0, with penalty": self.negative_total,
            "mismatch weight": self.outer,
        }
        return {name: line for name, line in named.items() if line is not None}

    def digest(self) -> str:
        """A short hash of the grid and the curves, rounded so that it is the same on every processor."""
        text = ";".join(f"{name}:{_rounded(y)}" for name, y in {"x": self.log_ratio, **self.lines()}.items())
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _rounded(values: Tensor) -> str:
    return ",".join(f"{round(v, 3) + 0.0:.3f}" for v in values.tolist())


def curves(config: Mapping[str, Any], span: float = SPAN) -> Curves:
    """The curves of a correction.

    Args:
        config: its fields, as in a preset's file. Thinning is left out: it decides who takes part, not how much.
        span: log-ratios from ``-span`` to ``span``.
    """
    config = {**config, "thin": None}
    policy = Correction.from_config({**config, "penalty": None})
    whole = Correction.from_config(config)
    batch = looks_at_batch(whole)
    grid = _grid(FEW_POINTS if batch else POINTS, span)
    sides = [_weights(policy, grid, sign, batch) for sign in (1.0, -1.0)]
    totals = [_weights(whole, grid, sign, batch) if config.get("penalty") else None for sign in (1.0, -1.0)]
    outer = _weights(policy, grid, 1.0, batch, moved="proximal") if _has_outer(config) else None
    return Curves(grid, sides[0], sides[1], totals[0], totals[1], outer)


def _has_outer(config: Mapping[str, Any]) -> bool:
    """Whether rules look at the ratio proximal / behavior."""
    return config.get("anchor") == "proximal" and bool(config.get("mismatch") or config.get("reject"))


def _grid(count: int, span: float) -> Tensor:
    """Evenly spaced, a little off center so that no point falls on a round threshold."""
    return (torch.arange(count, dtype=torch.float64) - (count - 1) / 2 + 0.13) * (2 * span / count)


def _weights(correction: Correction, grid: Tensor, sign: float, whole_batch: bool, moved: str = "current") -> Tensor:
    """Coefficient of the score over ``c A``, ``[n]``; over that at log-ratio 0 where the kernel makes its own A."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a rule may well reject every point of a picture
        own = correction.kernel.traits.own_advantage
        unit = _measured(correction, grid.new_zeros(1), sign, whole_batch, moved) if own else sign
        return _measured(correction, grid, sign, whole_batch, moved) / unit


def _measured(correction: Correction, grid: Tensor, sign: float, whole_batch: bool, moved: str) -> Tensor:
    if whole_batch:
        return torch.cat([_coefficient(correction, _batch(x, sign, moved, reference=True), 1) for x in grid.split(1)])
    return _coefficient(correction, _batch(grid, sign, moved, reference=False), len(grid))


def _coefficient(correction: Correction, batch: TensorDict, count: int) -> Tensor:
    """Minus the gradient of the first ``count`` rows' log-probs, over the reduction's coefficient."""
    log_prob = batch["current_log_prob"].clone().requires_grad_()
    stats = correction.prepare(log_prob.detach(), batch)
    (gradient,) = torch.autograd.grad(correction.loss(log_prob, batch, stats).loss, log_prob)
    out: Tensor = -gradient[:count, 0] / stats["coefficient"][:count]
    return out


def _batch(grid: Tensor, sign: float, moved: str, *, reference: bool) -> TensorDict:
    """Rows of one unit: the points, three companions of each at log-ratio 0, and perhaps the reference rows.

    ``moved`` is ``current`` (against all anchors) or ``proximal`` (current and proximal against the behavior policy).
    """
    n = len(grid)
    own = float(sign > 0)
    zero, ones = torch.zeros_like(grid), torch.ones_like(grid)
    drift = [grid, zero, zero, zero]
    reward = [ones * own, zero, ones, ones * (1 - own)]
    advantage = [ones * sign, -ones, ones, -ones * sign]
    group = [torch.arange(n)] * 4
    if reference:
        spread, signs = _reference()
        drift.append(spread)
        reward.append((signs > 0).double())
        advantage.append(signs)
        group.append(n + torch.arange(len(spread)) // 4)
    d, a = torch.cat(drift).unsqueeze(-1), torch.cat(advantage)
    base = torch.full_like(d, ANCHOR_PROBABILITY).log()
    keys = dict.fromkeys(ANCHORS.values(), base)
    if moved == "proximal":
        keys["proximal_log_prob"] = base + d
    keys["teacher_log_prob"] = keys["reference_log_prob"] + a.unsqueeze(-1)
    return TensorDict(
        {
            **keys,
            "current_log_prob": base + d,
            "mask": torch.ones_like(d, dtype=torch.bool),
            "step_index": torch.zeros_like(d, dtype=torch.int64),
            "reward": torch.cat(reward).unsqueeze(-1),
            "advantage": a,
            "group": torch.cat(group),
            "source": torch.full((len(d),), int(Source.DEMONSTRATION)),
        },
        batch_size=[len(d)],
    )


def _reference() -> tuple[Tensor, Tensor]:
    """Log-ratios at the quantiles of a normal distribution and alternating advantages, ``[128]`` each."""
    share = (torch.arange(REFERENCE_ROWS, dtype=torch.float64) + 0.5) / REFERENCE_ROWS
    signs = torch.where(torch.arange(REFERENCE_ROWS) % 2 == 0, 1.0, -1.0).double()
    return REFERENCE_SPREAD * torch.special.ndtri(share), signs
