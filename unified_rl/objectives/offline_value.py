"""Critic targets, critic losses, state-value losses and actor losses as pure functions of a batch of transitions.

Each table holds functions of :class:`~unified_rl.objectives.transitions.Transitions`; keyword-only parameters are their
settings. What a function needs beside the batch it declares by :func:`~unified_rl.objectives.transitions.needs`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unified_rl.objectives.transitions import Transitions, needs
from unified_rl.ranges import Count, NonNegative, OpenUnit, UpperBound

# ------------------------------------------------------------------ from the ensemble's members to one value


def least(q: Tensor, t: Transitions) -> Tensor:
    """The smallest member."""
    return q.amin(0)


def mean(q: Tensor, t: Transitions) -> Tensor:
    """The mean member."""
    return q.mean(0)


@needs("members")
def least_of(q: Tensor, t: Transitions, *, members: Count = 2) -> Tensor:
    """The smallest of a random subset of members, one subset a gradient step. REDQ, 2101.05982; RLPD, 2302.02948."""
    if members >= len(q):
        return q.amin(0)
    return q.index_select(0, t.batch["members"][:members]).amin(0)


AGGREGATES: dict[str, Callable[..., Tensor]] = {"least": least, "mean": mean, "least_of": least_of}

# ------------------------------------------------------------------ targets of the critic, [B], without gradient


def bootstrapped(t: Transitions, following: Tensor) -> Tensor:
    """``r + gamma (1 - terminated) following``; what follows a terminal state is never read, be it NaN or infinite."""
    scale = t.batch["bootstrap"]
    return torch.addcmul(t.batch["reward"], scale, torch.where(scale == 0, torch.zeros_like(scale), following))


@needs("rsample", "entropy")
def soft(t: Transitions, *, entropy: bool = True) -> Tensor:
    """``r + gamma (Q'(s', a') - alpha log pi(a'|s'))``. SAC, 1812.05905; RLPD may leave the entropy out."""
    action, log_prob = t.following
    following = t.aggregate(t.nets.target(t.batch["next_observation"], action), t)
    return bootstrapped(t, following - t.alpha * log_prob if entropy else following)


@needs("value")
def state_value(t: Transitions) -> Tensor:
    """``r + gamma V(s')``. IQL, 2110.06169."""
    assert t.nets.value is not None
    return bootstrapped(t, t.nets.value(t.batch["next_observation"]))


@needs("rsample")
def smoothed(t: Transitions, *, std: NonNegative = 0.2, bound: NonNegative = 0.5) -> Tensor:
    """``r + gamma Q'(s', mean(s') + clipped noise)``; ``std`` and ``bound`` in units of the action's half range.

    TD3, 1802.09477, but the mean is the policy's own: there is no slow copy of the policy.
    """
    policy = t.nets.policy
    action, _ = policy.rsample(t.batch["next_observation"], noise=torch.zeros_like(t.noise[0]))
    action = policy.to_env(policy.from_env(action) + (std * t.noise[0]).clamp(-bound, bound))
    return bootstrapped(t, t.aggregate(t.nets.target(t.batch["next_observation"], action), t))


TARGETS: dict[str, Callable[..., Tensor]] = {"soft": soft, "state_value": state_value, "smoothed": smoothed}

# ------------------------------------------------------------------ losses of the critic


def squared_error(t: Transitions) -> Tensor:
    """Half the mean squared error, summed over members; rows are weighed by their ``priority_weight``, if any."""
    square, weight = t.td_error.square(), t.batch.get("priority_weight")
    return 0.5 * (square if weight is None else weight * square).mean(-1).sum()


@needs("rsample")
def conservative(t: Transitions) -> Tensor:
    """``E Q(s, a~pi) - Q(s, a)``, summed over members: CQL, 2006.04779, equation 2 with the policy as its mu."""
    with torch.no_grad():
        action, _ = t.fresh
    out: Tensor = (t.nets.critic(t.batch["observation"], action) - t.q).mean(-1).sum()
    return out


CRITICS: dict[str, Callable[..., Tensor]] = {"squared_error": squared_error, "conservative": conservative}

# ------------------------------------------------------------------ losses of a state value


def expectile(t: Transitions, *, tau: OpenUnit = 0.7) -> Tensor:
    """``|tau - 1(d < 0)| d^2`` of ``d = Q'(s, a) - V(s)``; one half is half the mean squared error. IQL, 2110.06169."""
    d = t.stored_q - t.value
    return (torch.where(d < 0, 1 - tau, tau) * d.square()).mean()


VALUES: dict[str, Callable[..., Tensor]] = {"expectile": expectile}

# ------------------------------------------------------------------ losses of the actor


@needs("rsample", "entropy")
def pathwise(
    t: Transitions, *, entropy: bool = True, normalize: bool = False, noisy: bool = True, mean: bool = False
) -> Tensor:
    """``alpha log pi - Q`` at a fresh action. SAC, 1812.05905.

    Args:
        t: the transitions.
        entropy: the first summand.
        normalize: divide Q by its mean size (TD3+BC).
        noisy: sample the action; else take the policy's mean (TD3).
        mean: Q is the mean of the ensemble's members (REDQ, RLPD), else the smallest.
    """
    if noisy:
        action, log_prob = t.fresh
    else:
        action, log_prob = t.nets.policy.rsample(t.batch["observation"], noise=torch.zeros_like(t.noise[1]))
    if entropy:
        t.metrics["policy/entropy"] = -log_prob.detach().mean()
    q = t.nets.critic(t.batch["observation"], action)
    value = q.mean(0) if mean else q.amin(0)
    if normalize:
        value = value / t.average(value.detach().abs()).clamp(min=1e-6)
    out: Tensor = (t.alpha * log_prob - value).mean() if entropy else -value.mean()
    return out


@needs("nll")
def imitate(t: Transitions) -> Tensor:
    """The policy's own supervised loss of the stored actions."""
    return t.nll.mean()


@needs("rsample")
def squared(t: Transitions) -> Tensor:
    """Mean squared distance of the policy's mean from the stored action, in units of the half range. TD3+BC."""
    policy = t.nets.policy
    action, _ = policy.rsample(t.batch["observation"], noise=torch.zeros_like(t.noise[1]))
    out: Tensor = (policy.from_env(action) - policy.from_env(t.batch["action"])).square().mean()
    return out


@needs("nll", "advantage")
def weighted(t: Transitions, *, beta: NonNegative = 3.0, largest: UpperBound = 100.0) -> Tensor:
    """Supervised loss weighted by ``min(exp(beta A), largest)``; beta 0 is imitation.

    IQL, 2110.06169, where the agent has a state value; else AWAC, 2006.09359, whose baseline is Q at a fresh action.
    """
    weight = (beta * t.advantage).exp().clamp(max=largest)
    t.metrics["policy/weight"] = weight.mean()
    return (weight * t.nll).mean()


ACTORS: dict[str, Callable[..., Tensor]] = {
    "pathwise": pathwise,
    "imitate": imitate,
    "squared": squared,
    "weighted": weighted,
}
