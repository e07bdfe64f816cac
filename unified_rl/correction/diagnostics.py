"""How far off-policy a batch is, and what the correction did about it. The same names in both domains."""

from __future__ import annotations

import torch
from torch import Tensor

from unified_rl.correction.levels import CLAMP
from unified_rl.correction.view import View, anchor_log_prob, difference, masked, safe

QUANTILES = (0.05, 0.5, 0.95)
MAX_QUANTILE_UNITS = 1_000_000


def effective_sample_size(weight: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """``(sum w)^2 / sum w^2`` over ``valid``, as a fraction of the count and as a count; 0 where all weights are."""
    w = masked(valid, weight)
    count = w.sum().square() / w.square().sum().clamp(min=torch.finfo(w.dtype).tiny)
    return count / valid.sum().clamp(min=1), count


def diagnose(
    view: View, ok: Tensor, kernel: Tensor, outer: Tensor | None, version: int | None, *, truncating: bool
) -> dict[str, Tensor]:
    """Scalar tensors that describe a batch, without gradient.

    Names: ``ess/unit``, ``ess/sequence`` (fractions) and ``..._count`` of the raw ratio current/behavior,
    ``ess/processed`` of the weights after the correction; ``kl/k1..k3`` of behavior from current; ``chi2`` and
    ``chi2/sequence``; ``ratio/max, min, mean, q05, q50, q95``; ``ratio/processed_max``; ``drift`` (mean
    absolute log-ratio); ``ratio/tail_index`` (see :func:`tail_index`);
    ``ratio/clamped`` (share of log-ratios beyond the safety clamp); ``clip/fraction``, ``_positive``
    and ``_negative`` (by sign of A: weight bounded, or 0); ``mask/fraction``; ``reject/fraction``, ``_positive``,
    ``_negative``, ``reject/rows``, ``reject/nonfinite``; ``weight/mean`` and ``weight/max`` (outer weights);
    ``staleness/mean`` and ``staleness/max`` where the version is given.
    """
    mask, batch = view.batch["mask"], view.batch
    d = difference(view.log_prob, anchor_log_prob(batch, "behavior"))
    raw, (d, valid) = d, safe(d, mask)
    ratio, units = d.exp(), valid.sum().clamp(min=1)
    sums, rows = d.sum(-1).clamp(-CLAMP, CLAMP), valid.any(-1)
    total = kernel if outer is None else kernel * outer
    out: dict[str, Tensor] = {}
    for name, weight, members in (
        ("ess/unit", ratio, valid),
        ("ess/sequence", sums.exp(), rows),
        ("ess/processed", total, valid & ok),
    ):
        out[name], out[f"{name}_count"] = effective_sample_size(weight, members)
    out["kl/k1"] = -d.sum() / units
    out["kl/k2"] = 0.5 * d.square().sum() / units
    out["kl/k3"] = (d.expm1() - d).sum() / units
    out["drift"] = d.abs().sum() / units
    out["chi2"] = _mean(ratio.square(), valid) - 1
    out["chi2/sequence"] = _mean((2 * sums).exp(), rows) - 1
    out["ratio/mean"] = _mean(ratio, valid)
    out["ratio/max"] = masked(valid, ratio).amax()
    out["ratio/min"] = torch.where(valid, ratio, torch.inf).amin()
    out["ratio/processed_max"] = masked(valid & ok, total).amax()
    out["ratio/clamped"] = (valid & (raw.abs() > CLAMP)).sum() / units
    out.update(_quantiles(ratio, valid))
    out["ratio/tail_index"] = tail_index(ratio[valid])
    out.update(_shares(view, ok, kernel, truncating))
    out["mask/fraction"] = mask.float().mean()
    out["mask/units"] = mask.sum().float()
    out["reject/nonfinite"] = (mask & ~view.mask).sum() / mask.sum().clamp(min=1)
    if outer is not None:
        out["weight/mean"] = _mean(outer, valid)
        out["weight/max"] = masked(valid, outer).amax()
    out.update(_staleness(view, version))
    return out


def _mean(x: Tensor, valid: Tensor) -> Tensor:
    return masked(valid, x).sum() / valid.sum().clamp(min=1)


def tail_index(values: Tensor, share: float = 0.05) -> Tensor:
    """Hill's estimate of the tail index of positive ``values [n]`` from their largest ``share``.

    Below 2 the weights have no finite variance. ``1e6`` where the tail is flat or too few values are there. Source: A
    Simple General Approach to Inference About the Tail of a Distribution (Hill, Annals of Statistics, 1975).
    """
    count = int(share * values.numel())
    if count < 1:
        return values.new_full((), 1e6)
    top = values.topk(count + 1).values.log()
    return 1.0 / (top[:-1] - top[-1]).mean().clamp(min=1e-6)


def _quantiles(ratio: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Quantiles of the valid ratios by ``kthvalue``; of an even subset where there are very many."""
    values = ratio[valid]
    if values.numel() == 0:
        return {f"ratio/q{round(100 * q):02d}": ratio.new_ones(()) for q in QUANTILES}
    values = values[:: values.numel() // MAX_QUANTILE_UNITS + 1]
    last = values.numel() - 1
    return {f"ratio/q{round(100 * q):02d}": values.kthvalue(round(q * last) + 1).values for q in QUANTILES}


def _shares(view: View, ok: Tensor, kernel: Tensor, truncating: bool) -> dict[str, Tensor]:
    """Clipped and rejected shares by the sign of A, and the share of rows that lost every unit."""
    mask = view.batch["mask"]
    clipped = kernel == 0
    if truncating:
        clipped = clipped | ((kernel - view.ratio).abs() > 1e-6 * view.ratio)
    clipped, rejected = clipped & view.mask, mask & ~ok
    rows = mask.any(-1)
    out = {
        "reject/fraction": rejected.sum() / mask.sum().clamp(min=1),
        "clip/fraction": (clipped & mask).sum() / mask.sum().clamp(min=1),
        "reject/rows": (rows & ~ok.any(-1)).sum() / rows.sum().clamp(min=1),
    }
    for name, side in (("positive", view.advantage > 0), ("negative", view.advantage < 0)):
        members = mask & side
        count = members.sum().clamp(min=1)
        out[f"clip/fraction_{name}"] = (clipped & members).sum() / count
        out[f"reject/fraction_{name}"] = (rejected & members).sum() / count
    return out


def _staleness(view: View, version: int | None) -> dict[str, Tensor]:
    """Mean and largest age in learner updates, over masked-in units."""
    age = view.batch.get("policy_version", None)
    if version is None or age is None:
        return {}
    mask = view.batch["mask"]
    lag = torch.where(mask, version - age, 0)
    return {"staleness/mean": lag.sum() / mask.sum().clamp(min=1), "staleness/max": lag.amax().float()}
