"""How far off-policy a batch is, and what the correction did about it. The same names in both domains.

Every number is that of the whole batch, also where the batch is spread over processes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unified_rl.correction.internal.distributed import Total, crossing, identity
from unified_rl.correction.levels import CLAMP
from unified_rl.correction.view import View, anchor_log_prob, difference, masked, safe, share

QUANTILES = (0.05, 0.5, 0.95)
MAX_QUANTILE_UNITS = 1_000_000
DIAGNOSTICS = (
    *(f"ess/{name}{end}" for name in ("unit", "sequence", "processed") for end in ("", "_count")),
    *("kl/k1", "kl/k2", "kl/k3", "drift", "chi2", "chi2/sequence", "weight/mean", "weight/max"),
    *(f"ratio/{n}" for n in ("mean", "clamped", "max", "min", "processed_max", "q05", "q50", "q95", "tail_index")),
    *(f"{kind}/fraction{side}" for kind in ("reject", "clip") for side in ("", "_positive", "_negative")),
    *("reject/rows", "reject/nonfinite", "mask/fraction", "mask/units", "staleness/mean", "staleness/max"),
)
"""Every name that :func:`diagnose` gives, now and then."""
FLAT_TAIL = 1e6
"""The tail index where the tail is flat or too few values are there."""


def effective_sample_size(weight: Tensor, valid: Tensor, total: Total = identity) -> tuple[Tensor, Tensor]:
    """``(sum w)^2 / sum w^2`` over ``valid``, as a fraction of the count and as a count; 0 where all weights are."""
    w = masked(valid, weight.expand_as(valid))
    first, second, count = total(torch.stack([w.sum(), w.square().sum(), valid.sum().to(w.dtype)]))
    size = first.square() / second.clamp(min=torch.finfo(w.dtype).tiny)
    return size / count.clamp(min=1), size


def diagnose(
    view: View,
    ok: Tensor,
    kernel: Tensor,
    outer: Tensor | None,
    version: int | None,
    *,
    truncating: bool,
    total: Total = identity,
) -> dict[str, Tensor]:
    """Scalar tensors that describe a batch, without gradient.

    Names: ``ess/unit``, ``ess/sequence`` (fractions) and ``..._count`` of the raw ratio current/behavior,
    ``ess/processed`` of the weights after the correction; ``kl/k1..k3`` of behavior from current; ``chi2`` and
    ``chi2/sequence``; ``ratio/max, min, mean, q05, q50, q95``; ``ratio/processed_max``; ``drift`` (mean
    absolute log-ratio); ``ratio/tail_index`` (see :func:`tail_index`);
    ``ratio/clamped`` (share of log-ratios beyond the safety clamp); ``clip/fraction``, ``_positive``
    and ``_negative`` (by sign of A: weight bounded, or 0); ``mask/fraction``; ``reject/fraction``, ``_positive``,
    ``_negative``, ``reject/rows``, ``reject/nonfinite``; ``weight/mean`` and ``weight/max`` (outer weights);
    ``staleness/mean`` and ``staleness/max`` where the version is given. With no valid unit, every ratio is 0.
    """
    mask, batch = view.batch["mask"], view.batch
    raw = difference(view.log_prob, anchor_log_prob(batch, "behavior"))
    d, valid = safe(raw, mask)
    ratio, members = d.exp(), share(valid, d.dtype)
    sums, rows = d.sum(-1).clamp(-CLAMP, CLAMP), valid.any(-1)
    processed = (kernel if outer is None else kernel * outer).expand_as(mask)
    out: dict[str, Tensor] = {}
    for name, weight, taken in (
        ("ess/unit", ratio, valid),
        ("ess/sequence", sums.exp(), rows),
        ("ess/processed", processed, valid & ok),
    ):
        out[name], out[f"{name}_count"] = effective_sample_size(weight, taken, total)
    means = {
        "kl/k1": -d,
        "kl/k2": 0.5 * d.square(),
        "kl/k3": d.expm1() - d,
        "drift": d.abs(),
        "chi2": ratio.square() - 1,
        "ratio/mean": ratio,
        "ratio/clamped": (raw.abs() > CLAMP).to(d.dtype),
    }
    if outer is not None:
        means["weight/mean"] = outer.expand_as(mask)
    shares = {name: ((x * members).sum(), valid.sum()) for name, x in means.items()}
    shares["chi2/sequence"] = (((2 * sums).exp() - 1) * share(rows, d.dtype)).sum(), rows.sum()
    shares.update(_shares(view, ok, kernel, truncating))
    shares.update(_staleness(view, version))
    out.update(_divided(shares, total))
    out["mask/units"] = total(mask.sum()).float()
    values = ratio[valid]
    out["ratio/max"], out["ratio/min"] = largest(values, total), -largest(-values, total)
    out["ratio/processed_max"] = largest(processed[valid & ok], total)
    if outer is not None:
        out["weight/max"] = largest(outer.expand_as(mask)[valid], total)
    if "staleness/mean" in out:
        sampled = batch["policy_version"]
        out["staleness/max"] = largest((version - sampled)[mask & (sampled >= 0)].float(), total)
    out.update(_quantiles(values, total))
    out["ratio/tail_index"] = tail_index(values, total=total)
    return out


def _divided(shares: dict[str, tuple[Tensor, Tensor]], total: Total) -> dict[str, Tensor]:
    """Each sum over its count, all summed across processes at once; 0 where the count is."""
    pairs = torch.stack([torch.stack([part.double(), count.double()]) for part, count in shares.values()])
    parts, counts = total(pairs).unbind(-1)
    return dict(zip(shares, (parts / counts.clamp(min=1)).float().unbind(0), strict=True))


def largest(values: Tensor, total: Total = identity) -> Tensor:
    """The largest of ``values [n]`` over all processes; 0 where there are none."""
    if total is identity:
        return values.amax() if values.numel() else values.new_zeros(())
    found = -crossing(-values, 0, total)
    return torch.where(found == -torch.inf, 0.0, found)


def tail_index(values: Tensor, share: float = 0.05, total: Total = identity) -> Tensor:
    """Hill's estimate of the tail index of positive ``values [n]`` from their largest ``share``.

    Below 2 the weights have no finite variance. ``1e6`` where the tail is flat or too few values are there. Source: A
    Simple General Approach to Inference About the Tail of a Distribution (Hill, Annals of Statistics, 1975).
    """
    count = int(share * int(total(torch.tensor(values.numel(), device=values.device))))
    if count < 1:
        return values.new_full((), FLAT_TAIL)
    edge = -crossing(-values, count, total)
    beyond = total((values[values > edge] / edge).log().sum())
    return 1.0 / (beyond / count).clamp(min=1 / FLAT_TAIL)


def _quantiles(values: Tensor, total: Total) -> dict[str, Tensor]:
    """Order statistics of the ratios of all valid units; of an even subset where there are very many."""

    def everywhere(x: Tensor) -> int:
        return int(total(torch.tensor(x.numel(), device=x.device)))

    values = values[:: everywhere(values) // MAX_QUANTILE_UNITS + 1]
    last = everywhere(values) - 1
    names = {q: f"ratio/q{round(100 * q):02d}" for q in QUANTILES}
    if last < 0:
        return {name: values.new_zeros(()) for name in names.values()}
    return {name: crossing(values, round(q * last), total) for q, name in names.items()}


def _shares(view: View, ok: Tensor, kernel: Tensor, truncating: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Clipped and rejected units by the sign of A, and rows that lost every unit; each with the count it is out of."""
    mask = view.batch["mask"]
    clipped = kernel == 0
    if truncating:
        clipped = clipped | ((kernel - view.ratio).abs() > 1e-6 * view.ratio)
    clipped, rejected, rows = clipped & view.mask, mask & ~ok, mask.any(-1)
    out = {
        "reject/fraction": (rejected.sum(), mask.sum()),
        "clip/fraction": (clipped.sum(), mask.sum()),
        "reject/rows": ((rows & ~ok.any(-1)).sum(), rows.sum()),
        "reject/nonfinite": ((mask & ~view.mask).sum(), mask.sum()),
        "mask/fraction": (mask.sum(), torch.ones_like(mask).sum()),
    }
    for name, side in (("positive", view.advantage > 0), ("negative", view.advantage < 0)):
        count = (mask & side).sum()
        out[f"clip/fraction_{name}"] = (clipped & side).sum(), count
        out[f"reject/fraction_{name}"] = (rejected & side).sum(), count
    return out


def _staleness(view: View, version: int | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Summed age in learner updates, over masked-in units that some policy sampled (of a version from 0 on)."""
    age = view.batch.get("policy_version", None)
    if version is None or age is None:
        return {}
    mask = view.batch["mask"] & (age >= 0)
    return {"staleness/mean": ((version - age).masked_fill(~mask, 0).sum(), mask.sum())}
