"""The other value targets: rows of the table of ``(rho, c)`` rules over the same scan. Shapes ``[B, T]``, detached.

Arguments not described are those of :func:`unified_rl.returns.gae` and :func:`unified_rl.returns.vtrace`. Sources:
Sutton and Barto (2nd edition), Precup, Sutton and Singh (2000), Munos et al. (1606.02647), Jiang and Li (1511.03722).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unified_rl.errors import ConfigError
from unified_rl.returns.scan import Trajectory, action_value_scan, gae, value_scan


def td_lambda(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: float | Tensor,
    lam: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Lambda-returns: targets for ``value``. ``lam=0`` is TD(0), ``lam=1`` Monte Carlo with a bootstrapped end."""
    return gae(reward, value, next_value, terminated, done, gamma, lam, mask)[1]


def monte_carlo(
    reward: Tensor, terminated: Tensor, done: Tensor, gamma: float | Tensor, mask: Tensor | None = None
) -> Tensor:
    """Discounted sums of rewards until the episode's end or the slice's, without any bootstrap."""
    zero = torch.zeros_like(reward)
    return gae(reward, zero, zero, terminated, done, gamma, 1.0, mask)[1]


def n_step(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: float | Tensor,
    n: int,
    mask: Tensor | None = None,
    log_ratio: Tensor | None = None,
) -> Tensor:
    """Targets of ``n`` rewards and a bootstrap; with ``log_ratio``, each TD error under the ratios up to it.

    Steps inside the mask are counted.

    Raises:
        ConfigError: n below 1.
    """
    if n < 1:
        raise ConfigError(f"n_step needs n of at least 1, got {n}")
    path = Trajectory(reward, terminated, done, gamma, mask)
    ratio = torch.ones_like(path.reward) if log_ratio is None else path.ratio(log_ratio)
    delta = path.reward + path.bootstrap * path.successor(value, next_value) - path.clean(value)
    error = torch.zeros_like(delta)
    for _ in range(n):  # one more reward a pass
        error = ratio * (delta + path.trace * path.ahead(error))
    return path.masked(path.clean(value) + error)[0]


def corrected_td_lambda(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    done: Tensor,
    log_ratio: Tensor,
    gamma: float | Tensor,
    lam: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Importance-corrected TD(lambda); ``lam=1`` is recursive doubly robust, with zero values per-decision IS."""
    path = Trajectory(reward, terminated, done, gamma, mask)
    ratio = path.ratio(log_ratio)
    target = value_scan(path, value, path.successor(value, next_value), ratio, lam * ratio)[1]
    return path.masked(target)[0]


def action_value_target(
    reward: Tensor,
    q: Tensor,
    next_expected_q: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: float | Tensor,
    coefficient: Tensor | float,
    mask: Tensor | None = None,
) -> Tensor:
    """Targets for ``q`` under any trace coefficient ``c [B, T]``.

    0 is expected SARSA, ``ratio`` plain importance sampling; the functions below are the other rows of the table.
    """
    path = Trajectory(reward, terminated, done, gamma, mask)
    c = coefficient if not isinstance(coefficient, Tensor) else path.clean(coefficient)
    return action_value_scan(path, q, next_expected_q, c)


def expected_sarsa(
    reward: Tensor,
    next_expected_q: Tensor,
    terminated: Tensor,
    gamma: float | Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """One-step targets ``r + gamma (1 - terminated) EQ'``."""
    zero = torch.zeros_like(reward)
    return action_value_target(reward, zero, next_expected_q, terminated, terminated, gamma, 0.0, mask)


def tree_backup(
    reward: Tensor,
    q: Tensor,
    next_expected_q: Tensor,
    terminated: Tensor,
    done: Tensor,
    log_prob: Tensor,
    gamma: float | Tensor,
    lam: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """TB(lambda): the trace is the target policy's own probability of the action, ``log_prob [B, T]``; no ratio."""
    c = lam * log_prob.detach().exp()
    return action_value_target(reward, q, next_expected_q, terminated, done, gamma, c, mask)


def q_lambda(
    reward: Tensor,
    q: Tensor,
    next_expected_q: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: float | Tensor,
    lam: float,
    greedy: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Q(lambda) without a ratio: Harutyunyan et al., 1602.04951; with ``greedy``, Watkins (1989).

    Peng's is :func:`td_lambda` with the largest action values as values.

    Args:
        q: ``[B, T]``, Q of the taken action.
        next_expected_q: ``[B, T]``, at the true successor: the expectation under the target policy, or (Watkins) the
            largest Q.
        greedy: ``[B, T]`` bool, whether the action was the greedy one; the trace is cut before any other.
    """
    c = lam if greedy is None else lam * greedy.to(torch.float32 if reward.dtype != torch.float64 else torch.float64)
    return action_value_target(reward, q, next_expected_q, terminated, done, gamma, c, mask)


def action_based_target(
    reward: Tensor,
    q: Tensor,
    next_expected_q: Tensor,
    terminated: Tensor,
    done: Tensor,
    log_prob: Tensor,
    log_ratio: Tensor,
    gamma: float | Tensor,
    psi: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """ABTD: the trace is ``min(psi * pi(a), ratio, 1)``. Multi-step Off-policy Learning Without IS Ratios, 1702.03006.

    ``psi=1`` is tree backup, and infinity Retrace(1) (form from memory).
    """
    c = torch.minimum((log_prob.detach() + math.log(psi)).exp(), log_ratio.detach().clamp(max=0.0).exp())
    return action_value_target(reward, q, next_expected_q, terminated, done, gamma, c, mask)


def cut_bootstrap(value: Tensor, next_value: Tensor, terminated: Tensor, done: Tensor) -> Tensor:
    """Successor values in which a cut (done, not terminated) bootstraps from the value before it: EGAE, 2506.15050."""
    return torch.where(done & ~terminated, value, next_value).detach()
