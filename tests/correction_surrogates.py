"""Published surrogates of every preset, written out plainly in torch, and a batch to differentiate them on."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.returns import group_advantage

B, N, G = 8, 9, 4


def make_batch(seed: int = 0, drift: float = 0.3, lag: float = 0.2) -> TensorDict:
    """Eight rows in two groups, three turns each, with holes and padding in the mask; float64."""
    g = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(B, N, generator=g, dtype=torch.float64)

    current = -1.2 - 2 * torch.rand(B, N, generator=g, dtype=torch.float64)
    mask = torch.rand(B, N, generator=g) > 0.25
    mask[:, 0] = True
    mask[3, 5:] = False
    proximal = current + drift * normal()
    reward = torch.tensor([0, 1, 1, 0, 1, 0, 0, 0], dtype=torch.float64)
    return TensorDict(
        {
            "current": current,
            "proximal_log_prob": proximal,
            "behavior_log_prob": proximal + lag * normal(),
            "reference_log_prob": current + drift * normal(),
            "proxy_log_prob": current + normal(),
            "teacher_log_prob": current + normal(),
            "mask": mask,
            "step_index": (torch.arange(N) // 3).expand(B, N).contiguous(),
            "reward": torch.stack([torch.zeros(B), torch.zeros(B), reward], -1).double(),
            "policy_version": torch.zeros(B, N, dtype=torch.int64),
            "group": torch.arange(B) // G,
            "source": torch.tensor([0, 2, 0, 3, 0, 0, 2, 0]),
            "advantage": group_advantage(reward + 0.3 * torch.arange(B) / B, torch.arange(B) // G, scale="std"),
        },
        batch_size=[B],
    )


def problem(batch: TensorDict, lp: Tensor) -> SimpleNamespace:
    """The quantities of a surrogate, named as in papers."""
    m = batch["mask"].double()
    a = batch["advantage"]
    return SimpleNamespace(
        lp=lp,
        mu=batch["behavior_log_prob"],
        prox=batch["proximal_log_prob"],
        ref=batch["reference_log_prob"],
        proxy=batch["proxy_log_prob"],
        teacher=batch["teacher_log_prob"],
        m=m,
        a=(a[:, None] if a.ndim == 1 else a).expand(B, N),
        r=batch["reward"].sum(-1),
        gid=batch["group"],
        turn=batch["step_index"],
        source=batch["source"],
        length=m.sum(-1, keepdim=True),
    )


def token_mean(x: Tensor, p: Any) -> Tensor:
    return (x * p.m).sum() / p.m.sum()


def row_mean(x: Tensor, p: Any) -> Tensor:
    return ((x * p.m).sum(-1) / p.m.sum(-1)).mean()


def clipped(ratio: Tensor, a: Tensor, low: float, high: float, dual: float | None = None) -> Tensor:
    loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - low, 1 + high))
    return loss if dual is None else torch.where(a < 0, torch.minimum(loss, -a * dual), loss)


def log_clipped(d: Tensor, a: Tensor, low: Tensor, high: Tensor, dual: Tensor) -> Tensor:
    loss = torch.maximum(-a * d.exp(), -a * torch.minimum(torch.maximum(d, -low), high).exp())
    return torch.where(a < 0, torch.minimum(loss, -a * dual.exp()), loss)


def straight_through(level: Tensor, lp: Tensor) -> Tensor:
    return level.detach() + lp - lp.detach()


def prefix(d: Tensor, p: Any) -> Tensor:
    return torch.stack([torch.stack([(d * p.m)[b, : t + 1].sum() for t in range(N)]) for b in range(B)])


def decoupled(p: Any, weight: Tensor, keep: Tensor | float = 1.0, low: float = 0.2, high: float = 0.2) -> Tensor:
    return token_mean(keep * weight * clipped((p.lp - p.prox).exp(), p.a, low, high), p)


def mismatch(p: Any) -> Tensor:
    return (p.prox - p.mu).exp()


def rows(x: Tensor, p: Any) -> Tensor:
    return (x * p.m).sum(-1, keepdim=True)


def reject(statistic: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    return lambda p: decoupled(p, torch.ones(B, N), statistic(p).double())


def divergence(estimator: str, over: str, high: float) -> Callable[[Any], Tensor]:
    def keep(p: Any) -> Tensor:
        d = p.prox - p.mu
        stat = {"k1": d if over != "max" else d.abs(), "k2": d**2 / 2, "k3": d.exp() - 1 - d}[estimator]
        stat = stat.where(p.m > 0, 0.0)
        whole = {
            "unit": stat,
            "sum": rows(stat, p),
            "mean": rows(stat, p) / p.length,
            "max": stat.max(-1, keepdim=True).values,
        }[over]
        return (whole.abs() <= high) * torch.ones(B, N)

    return reject(keep)


def turn_ppo(p: Any) -> Tensor:
    level = torch.zeros(B, N, dtype=torch.float64)
    for b in range(B):
        for t in range(3):
            member = (p.turn[b] == t) & (p.m[b] > 0)
            if member.any():
                level[b, p.turn[b] == t] = (p.lp - p.mu)[b][member].mean().detach()
    return token_mean(clipped(straight_through(level, p.lp).exp(), p.a, 0.2, 0.2), p)


def gmpo(p: Any) -> Tensor:
    s = p.a.sign()
    d = p.lp - p.mu
    d = s * torch.minimum(s * d, s * d.clamp(-0.4, 0.4))
    return (-p.a[:, 0] * (rows(d, p) / p.length).squeeze(-1).exp()).mean()


def hoelder(p: Any) -> Tensor:
    ratio = (p.lp - p.mu).exp()
    mean = ((rows(ratio**2, p) / p.length) ** 0.5).squeeze(-1)
    return clipped(mean, p.a[:, 0], 0.2, 0.2).mean()


def ctpo(p: Any) -> Tensor:
    d = straight_through(prefix(p.lp - p.prox, p), p.lp)
    t = p.m.cumsum(-1).clamp(min=1) ** 0.5
    w = rows(p.prox - p.mu, p).exp().clamp(max=5.0)
    return token_mean(w * log_clipped(d, p.a, 0.025 * t, 0.05 * t, 0.05 * t), p)


def minpro(p: Any) -> Tensor:
    d = (p.lp - p.mu).detach()
    level = d.clone()
    for b in range(B):
        smallest = None
        for t in range(N):
            if p.m[b, t] > 0:
                level[b, t] = d[b, t] + (0.0 if smallest is None else smallest)
                smallest = d[b, t] if smallest is None else min(smallest, d[b, t])
    return token_mean(-level.exp().clamp(0, 2) * p.a * p.lp, p)


def dppo(p: Any, kind: str, bound: float) -> Tensor:
    new, old = p.lp.detach().exp(), p.mu.exp()
    if kind == "tv":
        valid = torch.where(p.a > 0, new - old <= bound, new - old >= -bound)
    else:
        kl = old * (old / new).log() + (1 - old) * ((1 - old + 1e-8) / (1 - new + 1e-8)).log()
        valid = torch.where(p.a > 0, (kl <= bound) | (new <= old), (kl <= bound) | (new >= old))
    return token_mean(-p.a * (p.lp - p.mu).exp().detach().clamp(max=20) * p.lp * valid, p)


def p3o(p: Any) -> Tensor:
    ratio = (p.lp - p.mu).exp().detach()
    w = ratio[p.m > 0]
    ess = w.sum() ** 2 / (len(w) * (w**2).sum())
    x = p.lp - p.mu
    return token_mean(-ratio.clamp(max=float(ess)) * p.lp * p.a + (1 - ess) * ((-x).exp() + x - 1), p)


def p4o(p: Any) -> Tensor:
    def ess(other: Tensor) -> Tensor:
        w = (p.lp - other).exp().detach()[p.m > 0]
        return w.sum() ** 2 / (len(w) * (w**2).sum())

    b, q = ess(p.mu), ess(p.prox)
    e = torch.minimum(b, q)
    mixture = (((1 - b) * p.mu.exp() + (1 - q) * p.prox.exp()) / (2 - b - q)).log()
    x = p.lp - mixture
    ratio = (p.lp - p.mu).exp().detach().clamp(max=float(e))
    return token_mean(-ratio * p.lp * p.a + (1 - e) * ((-x).exp() + x - 1), p)


def m2po(p: Any) -> Tensor:
    d = (p.lp - p.mu).detach()
    harmful = [(b, t) for b in range(B) for t in range(N) if p.m[b, t] > 0 and p.a[b, t] * d[b, t] > 0]
    harmful.sort(key=lambda i: float(d[i] ** 2))
    while harmful and sum(float(d[i] ** 2) for i in harmful) / len(harmful) > 0.04:
        d[harmful.pop()] = torch.inf
    keep = torch.isfinite(d)
    return token_mean(-p.a * (p.lp - p.mu).exp() * keep, p)


def bapo(p: Any) -> Tensor:
    ratio = (p.lp - p.mu).exp()
    r, up, live = ratio.detach(), p.a >= 0, p.m > 0
    low, high = 0.6, 1.2

    def enough() -> bool:
        positive = (r * p.a)[up & live & (r <= high)].sum()
        negative = (r * p.a.abs())[~up & live & (r >= low)].sum()
        return bool(positive >= 1.0 * negative)

    while not enough() and low < 0.8 - 1e-9:
        low = min(0.8, low + 0.05)
    while not enough() and high < 2.0 - 1e-9:
        high = min(2.0, high + 0.05)
    return token_mean(clipped(ratio, p.a, 1 - low, high - 1, 3.0), p)


def humanline(p: Any) -> Tensor:
    d = p.lp - p.ref
    x = p.lp - p.ref
    policy = clipped(d.clamp(-1.0, 1.5).exp(), p.a, 0.2, 0.2)
    return token_mean(policy + 0.01 * ((-x).exp() + x - 1), p)


def luffy(p: Any) -> Tensor:
    shown = ((p.source == 2) | (p.source == 3))[:, None]
    shaped = -p.a * p.lp.exp() / (p.lp.exp() + 0.1)
    return token_mean(torch.where(shown, shaped, clipped((p.lp - p.mu).exp(), p.a, 0.2, 0.2)), p)


def nft(p: Any) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for b in range(B):
        q = float(p.r[p.gid == p.gid[b]].mean())
        if not 0 < q < 1:
            continue
        log_ratio = p.lp[b] - p.mu[b]
        if p.r[b] > 0:
            term = -log_ratio
        else:
            x = (1 - q * log_ratio.exp()) / (1 - q)
            x = x + (x.clamp(min=1.0) - x).detach()
            term = -x.log()
        total = total + (1 - q) * (term * p.m[b]).sum()
    return total / 1000


def lp_reg(p: Any) -> Tensor:
    lp = p.lp.detach()
    threshold = lp[p.m > 0].sort().values[int(0.2 * p.m.sum()) - 1]
    chosen = (p.a < 0) & (lp <= threshold) & (lp < p.proxy) & (p.m > 0)
    assert chosen.any()
    ratio = (p.lp - p.mu).exp()
    x = p.lp - p.proxy
    return token_mean(torch.where(chosen, -p.a * ratio + (-x).exp() + x - 1, clipped(ratio, p.a, 1.0, 9.0)), p)


def group_mean(x: Tensor, p: Any) -> Tensor:
    return torch.stack([x[p.gid == g].mean() for g in p.gid])


def tba(p: Any, beta: float = 0.01) -> Tensor:
    s, s_ref = rows(p.lp, p).squeeze(-1), rows(p.ref, p).squeeze(-1)
    log_z = group_mean((p.r / beta - (s - s_ref)).detach(), p)
    return ((log_z + s - s_ref - p.r / beta) ** 2).mean()


def gvpo(p: Any, beta: float = 0.1) -> Tensor:
    x = beta * rows(p.lp - p.mu, p).squeeze(-1)
    return (0.5 * ((x - group_mean(x.detach(), p)) - (p.r - group_mean(p.r, p))) ** 2).sum() / (G - 1)


def copg(p: Any, beta: float = 0.1) -> Tensor:
    s = rows(p.lp, p).squeeze(-1)
    delta = (p.r - beta * (s - rows(p.ref, p).squeeze(-1))).detach()
    pairs = [(i, j) for i in range(B) for j in range(i) if p.gid[i] == p.gid[j]]
    return torch.stack([-(delta[i] - delta[j]) * (s[i] - s[j]) for i, j in pairs]).sum()


def flowrl(p: Any) -> Tensor:
    s, ref = rows(p.lp, p).squeeze(-1) / p.length.squeeze(-1), rows(p.ref, p).squeeze(-1) / p.length.squeeze(-1)
    log_z = group_mean((p.r - (s - ref)).detach(), p)
    w = rows(p.lp - p.mu, p).squeeze(-1).exp().detach().clamp(max=10.0)
    return 0.5 * (w * (log_z + s - p.r - ref) ** 2).mean()


def kl_cov(p: Any) -> Tensor:
    live = p.m > 0
    lp = p.lp.detach()
    cov = (p.a - p.a[live].mean()) * (lp - lp[live].mean())
    top = (
        cov.where(live, torch.tensor(-torch.inf, dtype=torch.float64))
        >= cov[live].sort(descending=True).values[int(0.05 * live.sum()) - 1]
    )
    return token_mean(-p.a * (p.lp - p.mu).exp() + (p.lp - p.mu).abs() * top, p)


def remix(p: Any) -> Tensor:
    ratio, centre = (p.lp - p.mu).exp(), (p.prox - p.mu).exp()
    surrogate = torch.minimum(ratio * p.a, torch.minimum(torch.maximum(ratio, centre - 0.2), centre + 0.2) * p.a)
    x, y = p.lp - p.ref, p.lp - p.prox
    return token_mean(-surrogate + 0.005 * ((-x).exp() + x - 1) + 0.005 * ((-y).exp() + y - 1), p)


def erpd(p: Any) -> Tensor:
    signal = p.teacher - p.ref
    a = signal - signal[p.m > 0].mean()
    return token_mean(clipped((p.lp - p.mu).exp(), a, 0.2, 0.2), p)


def rec_ring(p: Any) -> Tensor:
    r = (p.lp - p.mu).exp().detach()
    keep = ((r >= 0.8) & (r <= 1.2)) | ((p.a >= 0) & (r <= 0.4)) | ((p.a <= 0) & (r >= 3.0))
    return token_mean(-r * keep * p.a * p.lp, p)


def vespo(p: Any) -> Tensor:
    log_w = rows(p.lp - p.mu, p).detach()
    k, lam = torch.where(p.a >= 0, 2.0, 3.0), torch.where(p.a >= 0, 3.0, 2.0)
    return token_mean(-(lam + k * log_w - lam * log_w.exp()).exp() * p.a * p.lp, p)


def sapo(p: Any) -> Tensor:
    tau = 1.05 - 0.05 * (p.a > 0).double()
    return row_mean(-p.a * (4 / tau) * (tau * ((p.lp - p.mu).exp() - 1)).sigmoid(), p)


def mdpo(p: Any) -> Tensor:
    ratio = (p.lp - p.mu).exp()
    return token_mean(-ratio * p.a + ratio * (p.lp - p.mu), p)


def ppo(low: float, high: float, reduce: Callable[..., Tensor] = token_mean) -> Callable[[Any], Tensor]:
    return lambda p: reduce(clipped((p.lp - p.mu).exp(), p.a, low, high), p)


def opsm(p: Any) -> Tensor:
    keep = (p.a >= 0) | (rows(p.mu - p.lp.detach(), p) / p.length <= 1e-4)
    assert not keep.all()
    return token_mean(keep * clipped((p.lp - p.mu).exp(), p.a, 0.2, 0.2), p)


def gspo(p: Any) -> Tensor:
    s = (rows(p.lp - p.mu, p) / p.length).exp()
    return clipped(s.squeeze(-1), p.a[:, 0], 3e-4, 4e-4).mean()


SURROGATES: dict[str, Callable[[Any], Tensor]] = {
    "reinforce": lambda p: token_mean(-p.a * p.lp, p),
    "importance_sampling": lambda p: token_mean(-p.a * (p.lp - p.mu).exp(), p),
    "sequence_is": lambda p: -(rows(p.lp - p.mu, p).squeeze(-1).exp() * p.a[:, 0]).sum() / p.m.sum(),
    "prefix_is": lambda p: token_mean(-prefix(p.lp - p.mu, p).exp().detach() * p.a * p.lp, p),
    "per_decision_is": lambda p: -(prefix(p.lp - p.mu, p).exp() * p.a * p.m).sum(-1).mean(),
    "ppo": ppo(0.2, 0.2),
    "dual_clip_ppo": lambda p: token_mean(clipped((p.lp - p.mu).exp(), p.a, 0.2, 0.2, 1.3), p),
    "grpo": ppo(0.2, 0.2, row_mean),
    "dr_grpo": lambda p: (clipped((p.lp - p.mu).exp(), p.a, 0.2, 0.2) * p.m).sum() / (B * 128),
    "dapo": ppo(0.2, 0.28),
    "kl_cov": kl_cov,
    "decoupled_ppo": lambda p: decoupled(p, mismatch(p).clamp(max=1.1)),
    "ppo_ewma": lambda p: decoupled(p, mismatch(p)),
    "a3po": lambda p: decoupled(p, mismatch(p)),
    "decoupled_snapshot": lambda p: decoupled(p, mismatch(p)),
    "minirl": lambda p: decoupled(p, mismatch(p), low=0.2, high=0.27) * p.m.sum() / 1000,
    "tis": lambda p: decoupled(p, mismatch(p).clamp(max=1.1)),
    "cis": lambda p: decoupled(p, mismatch(p).clamp(0.9, 1.1)),
    "icepop": lambda p: decoupled(p, mismatch(p) * ((mismatch(p) >= 0.8) & (mismatch(p) <= 1.1))),
    "normalized_tis": lambda p: decoupled(p, mismatch(p).clamp(max=2.0) / token_mean(mismatch(p).clamp(max=2.0), p)),
    "sequence_tis": lambda p: decoupled(p, rows(p.prox - p.mu, p).exp().clamp(max=1.1)),
    "sequence_mask": lambda p: decoupled(
        p, rows(p.prox - p.mu, p).exp().where(rows(p.prox - p.mu, p).exp() <= 1.1, 0.0)
    ),
    "veto": reject(lambda p: ~((mismatch(p) < 0.7) & (p.m > 0)).any(-1, keepdim=True) * torch.ones(B, N)),
    "geo_reject": reject(lambda p: ((rows(p.prox - p.mu, p) / p.length).exp() - 1.0).abs().le(0.05) * torch.ones(B, N)),
    "geo_reject_token_tis": lambda p: decoupled(
        p, mismatch(p).clamp(max=1.1), ((rows(p.prox - p.mu, p) / p.length).exp() - 1.0).abs().le(0.05).double()
    ),
    "k3_reject": divergence("k3", "mean", 0.02),
    "k1_unit_reject": divergence("k1", "unit", 0.15),
    "k2_unit_reject": divergence("k2", "unit", 0.02),
    "k3_unit_reject": divergence("k3", "unit", 0.02),
    "k1_sum_reject": divergence("k1", "sum", 0.4),
    "k2_sum_reject": divergence("k2", "sum", 0.12),
    "k3_sum_reject": divergence("k3", "sum", 0.12),
    "k1_mean_reject": divergence("k1", "mean", 0.05),
    "k2_mean_reject": divergence("k2", "mean", 0.02),
    "k1_max_reject": divergence("k1", "max", 0.4),
    "k2_max_reject": divergence("k2", "max", 0.08),
    "k3_max_reject": divergence("k3", "max", 0.08),
    "opsm": opsm,
    "dppo_tv": lambda p: dppo(p, "tv", 0.05),
    "dppo_kl": lambda p: dppo(p, "kl", 0.02),
    "gspo": gspo,
    "gmpo": gmpo,
    "hoelder": hoelder,
    "ctpo": ctpo,
    "minpro": minpro,
    "turn_ppo": turn_ppo,
    "st_ppo": turn_ppo,
    "s_ppo": ppo(0.2, 0.2),
    "steppo": ppo(0.2, 0.2),
    "alp": ppo(0.5, 3.0),
    "cispo": lambda p: token_mean(-p.a * (p.lp - p.mu).exp().clamp(max=1.2).detach() * p.lp, p),
    "dispo": lambda p: token_mean(
        -p.a
        * p.lp
        * torch.where(p.a > 0, (p.lp - p.mu).exp().clamp(0.8, 1.2), (p.lp - p.mu).exp().clamp(0, 2)).detach(),
        p,
    ),
    "topr": lambda p: token_mean(
        -p.a * p.lp * torch.where(p.a > 0, 1.0, (p.lp - p.mu).exp().clamp(max=1.0)).detach(), p
    ),
    "rec_one_side": ppo(0.2, 0.2),
    "rec_two_side": lambda p: token_mean(
        -p.a * (p.lp - p.mu).exp() * (((p.lp - p.mu).exp() - 1).abs() <= 0.2).detach(), p
    ),
    "rec_ring": rec_ring,
    "opmd": lambda p: token_mean(-p.a * p.lp + 0.05 * (p.lp - p.mu) ** 2, p),
    "dro": lambda p: token_mean(-(p.a * p.lp - 0.5 * 0.1 * (p.lp - p.mu) ** 2), p),
    "asymre": lambda p: token_mean(-p.a * p.lp, p),
    "red_weight": lambda p: token_mean(-p.a.exp() * p.a * p.lp, p),
    "sppo": lambda p: token_mean(
        -p.a * (p.lp - p.mu) * (((p.lp - p.mu).exp() <= 1.3) & ((p.lp - p.mu).exp() >= 1 / 1.3)), p
    ),
    "sapo": sapo,
    "vespo": vespo,
    "p3o": p3o,
    "p4o": p4o,
    "m2po": m2po,
    "bapo": bapo,
    "humanline": humanline,
    "luffy": luffy,
    "nft": nft,
    "aipo": lambda p: token_mean(-p.a * (p.lp - p.mu).exp().clamp(max=1.2).detach() * p.lp, p) * p.m.sum() / 1000,
    "lp_reg": lp_reg,
    "tba": tba,
    "gvpo": gvpo,
    "copg": copg,
    "flowrl": flowrl,
    "opo": lambda p: token_mean(-p.a * p.lp, p),
    "vcpo": lambda p: row_mean(-p.a * (p.lp - p.prox).exp() * rows(p.prox - p.mu, p).exp().clamp(max=1.1), p),
    "sfpo": ppo(0.2, 0.2),
    "t_ppo": ppo(0.2, 0.2),
    "remix": remix,
    "erpd": erpd,
    "troll": lambda p: row_mean(-p.a * (p.lp - p.mu).exp(), p),
    "fixpo": lambda p: token_mean(-p.a * (p.lp - p.mu).exp(), p),
    "mdpo": mdpo,
}

# bounds tight enough that each rule acts on some units of the batch and not on all
OVERRIDES: dict[str, dict[str, Any]] = {
    "dual_clip_ppo": {"kernel.dual_clip": 1.3},
    "kl_cov": {"penalty.0.select.fraction": 0.05},
    "decoupled_ppo": {"mismatch.0.high": 1.1},
    "tis": {"mismatch.0.high": 1.1},
    "cis": {"mismatch.0.low": 0.9, "mismatch.0.high": 1.1},
    "icepop": {"mismatch.0.low": 0.8, "mismatch.0.high": 1.1},
    "sequence_tis": {"mismatch.0.high": 1.1},
    "sequence_mask": {"mismatch.0.high": 1.1},
    "veto": {"reject.0.low": 0.7},
    "geo_reject": {"reject.0.low": 0.95, "reject.0.high": 1.05},
    "geo_reject_token_tis": {"reject.0.low": 0.95, "reject.0.high": 1.05, "mismatch.0.high": 1.1},
    "k3_reject": {"reject.0.high": 0.02},
    "k1_unit_reject": {"reject.0.high": 0.15},
    "k2_unit_reject": {"reject.0.high": 0.02},
    "k3_unit_reject": {"reject.0.high": 0.02},
    "k1_sum_reject": {"reject.0.high": 0.4},
    "k2_sum_reject": {"reject.0.high": 0.12},
    "k3_sum_reject": {"reject.0.high": 0.12},
    "k1_mean_reject": {"reject.0.high": 0.05},
    "k2_mean_reject": {"reject.0.high": 0.02},
    "k1_max_reject": {"reject.0.high": 0.4},
    "k2_max_reject": {"reject.0.high": 0.08},
    "k3_max_reject": {"reject.0.high": 0.08},
    "dppo_tv": {"kernel.low": 0.05, "kernel.high": 0.05},
    "dppo_kl": {"kernel.low": 0.02, "kernel.high": 0.02},
    "aipo": {"kernel.high": 1.2},
    "lp_reg": {"kernel.fraction": 0.2},
    "vcpo": {"mismatch.0.high": 1.1},
}
