"""Critic targets, critic losses and actor losses as pure functions of a batch of transitions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unified_rl.objectives.transitions import Transitions

# ------------------------------------------------------------------ what the ensemble's members are made into


def least(q: Tensor, t: Transitions) -> Tensor:
    """The smallest member."""
    return q.amin(0)


def mean(q: Tensor, t: Transitions) -> Tensor:
    """The mean member."""
    return q.mean(0)


def least_of(q: Tensor, t: Transitions, *, members: int = 2) -> Tensor:
    """The smallest of a random subset of members. REDQ; RLPD, 2302.02948."""
    if members >= len(q):
        return q.amin(0)
    chosen = torch.randperm(len(q), generator=t.generator, device=q.device)[:members]
    return q[chosen].amin(0)


AGGREGATES: dict[str, Callable[..., Tensor]] = {"least": least, "mean": mean, "least_of": least_of}

# ------------------------------------------------------------------ targets of the critic, [B], without gradient


def soft(t: Transitions, aggregate: Callable[..., Tensor], *, entropy: bool = True) -> Tensor:
    """``r + gamma (Q'(s', a') - alpha log pi(a'|s'))``. SAC; RLPD leaves the entropy out on sparse tasks."""
    action, log_prob = t.following
    following = aggregate(t.nets.target(t.batch["next_observation"], action), t)
    if entropy:
        following = following - t.alpha * log_prob
    return torch.addcmul(t.batch["reward"], t.batch["bootstrap"], following)


def state_value(t: Transitions, aggregate: Callable[..., Tensor]) -> Tensor:
    """``r + gamma V(s')``. IQL."""
    assert t.nets.value is not None
    return torch.addcmul(t.batch["reward"], t.batch["bootstrap"], t.nets.value(t.batch["next_observation"]))


def smoothed(t: Transitions, aggregate: Callable[..., Tensor], *, std: float = 0.2, bound: float = 0.5) -> Tensor:
    """``r + gamma Q'(s', mean(s') + clipped noise)``. TD3, 1802.09477; ``std`` in units of the action's half range."""
    policy = t.nets.policy
    action, _ = policy.rsample(t.batch["next_observation"], noise=torch.zeros_like(t.noise[0]))
    action = policy.to_env(policy.from_env(action) + (std * t.noise[0]).clamp(-bound, bound))
    return torch.addcmul(
        t.batch["reward"], t.batch["bootstrap"], aggregate(t.nets.target(t.batch["next_observation"], action), t)
    )


TARGETS: dict[str, Callable[..., Tensor]] = {"soft": soft, "state_value": state_value, "smoothed": smoothed}

# ------------------------------------------------------------------ losses of a state value


def expectile(t: Transitions, *, tau: float = 0.7) -> Tensor:
    """``|tau - 1(d < 0)| d^2`` of ``d = min Q'(s, a) - V(s)``; one half is half the mean squared error. IQL."""
    d = t.stored_q.amin(0) - t.value
    return (torch.where(d < 0, 1 - tau, tau) * d.square()).mean()


VALUES: dict[str, Callable[..., Tensor]] = {"expectile": expectile}

# ------------------------------------------------------------------ losses of the actor


def pathwise(t: Transitions, *, entropy: bool = True, normalize: bool = False, noisy: bool = True) -> Tensor:
    """``alpha log pi - min Q`` at a fresh action; ``normalize`` divides Q by its mean size (TD3+BC)."""
    if noisy:
        action, log_prob = t.fresh
    else:
        action, log_prob = t.nets.policy.rsample(t.batch["observation"], noise=torch.zeros_like(t.noise[1]))
    t.metrics["policy/entropy"] = -log_prob.detach().mean()
    value = t.nets.critic(t.batch["observation"], action).amin(0)
    if normalize:
        value = value / value.detach().abs().mean().clamp(min=1e-6)
    return (t.alpha * log_prob - value).mean() if entropy else -value.mean()


def imitate(t: Transitions) -> Tensor:
    """The policy's own supervised loss of the stored actions."""
    return t.nll.mean()


def squared(t: Transitions) -> Tensor:
    """Squared distance of the mean action from the stored one, in units of the half range (TD3+BC)."""
    policy = t.nets.policy
    action, _ = policy.rsample(t.batch["observation"], noise=torch.zeros_like(t.noise[1]))
    return (policy.from_env(action) - policy.from_env(t.batch["action"])).square().sum(-1).mean()


def weighted(t: Transitions, *, beta: float = 3.0, largest: float = 100.0) -> Tensor:
    """Supervised loss weighted by ``min(exp(beta A), largest)``. AWR, IQL; beta 0 is imitation."""
    weight = (beta * t.advantage).exp().clamp(max=largest)
    t.metrics["policy/weight"] = weight.mean()
    return (weight * t.nll).mean()


ACTORS: dict[str, Callable[..., Tensor]] = {
    "pathwise": pathwise,
    "imitate": imitate,
    "squared": squared,
    "weighted": weighted,
}
