"""One backward scan for every value target.

Shapes are ``[B, T]``. A step's successor is bootstrapped unless it ``terminated`` and its trace runs on unless it is
``done``; the value behind a terminated step is never read, be it NaN or infinite. Steps masked out are transparent:
nothing in them reaches anything (NaN included), traces pass over them, and the step before a gap bootstraps from the
value of the next step inside the mask. Everything is detached.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from unified_rl.errors import RecordError

BLOCK = 32
"""Columns that the blocked scan handles one by one; longer rows are cut."""

CLAMP = 20.0
"""Log-ratios are clamped to plus or minus this before ``exp``."""


def backward_scan(start: Tensor, decay: Tensor) -> Tensor:
    """``e_t = start_t + decay_t * e_{t+1}`` with 0 beyond the end, ``[B, T]``."""
    if start.device.type != "cpu":
        return _scan_doubling(start, decay)
    if start.shape[-1] >= 2 * BLOCK and bool((decay <= 1).all()):  # products of larger ones could overflow
        return _scan_blocks(start, decay)
    return _scan_loop(start, decay)


def _scan_loop(start: Tensor, decay: Tensor) -> Tensor:
    """Time-major loop over NumPy rows: a third of a microsecond an operation, no temporaries."""
    out = start.t().clone(memory_format=torch.contiguous_format).numpy()
    factor = decay.t().contiguous().numpy()
    work = np.empty_like(out[0]) if len(out) else out
    for following, current, scale in zip(out[:0:-1], out[-2::-1], factor[-2::-1], strict=True):
        np.multiply(following, scale, out=work)
        np.add(current, work, out=current)
    return torch.from_numpy(out).t()


def _scan_blocks(start: Tensor, decay: Tensor) -> Tensor:
    """The same with the row cut into blocks that are scanned together, then joined: fewer and longer operations."""
    rows, width = start.shape
    pad = -width % BLOCK
    if pad:
        start, decay = torch.nn.functional.pad(start, (0, pad)), torch.nn.functional.pad(decay, (0, pad))
    number = (width + pad) // BLOCK
    # [BLOCK, rows, number]: the position inside a block first
    out = start.view(rows, number, BLOCK).permute(2, 0, 1).clone(memory_format=torch.contiguous_format).numpy()
    reach = decay.view(rows, number, BLOCK).permute(2, 0, 1).clone(memory_format=torch.contiguous_format).numpy()
    work = np.empty_like(out[0])
    for t in range(BLOCK - 2, -1, -1):
        np.multiply(reach[t], out[t + 1], out=work)
        out[t] += work
        reach[t] *= reach[t + 1]
    for n in range(number - 2, -1, -1):  # what comes in from the block behind
        out[0, :, n] += reach[0, :, n] * out[0, :, n + 1]
    out[1:, :, :-1] += reach[1:, :, :-1] * out[0, :, 1:]
    return torch.from_numpy(out).permute(1, 2, 0).reshape(rows, width + pad)[:, :width]


def _scan_doubling(start: Tensor, decay: Tensor) -> Tensor:
    """The same in ``log2 T`` passes over the whole tensor."""
    out, factor, reach = start.clone(), decay.clone(), 1
    while reach < out.shape[-1]:
        head = factor[..., :-reach]
        out = torch.cat([out[..., :-reach] + head * out[..., reach:], out[..., -reach:]], -1)
        factor = torch.cat([head * factor[..., reach:], torch.zeros_like(factor[..., -reach:])], -1)
        reach *= 2
    return out


def shifted(x: Tensor) -> Tensor:
    """The next column's entry, 0 beyond the end."""
    return torch.cat([x[..., 1:], torch.zeros_like(x[..., :1])], -1)


class Trajectory:
    """Rewards and flags made ready for a scan: floats, factors, and garbage in masked steps replaced by zeros.

    Args:
        reward: ``[B, T]``.
        terminated: ``[B, T]`` bool, cuts the bootstrap.
        done: ``[B, T]`` bool, cuts the trace (terminated, truncated or the end of a slice).
        gamma: a float, or ``[B, T]`` (``gamma ** h`` of a chunk of h steps).
        mask: ``[B, T]`` bool, or None for all True.

    Raises:
        RecordError: shapes disagree.
    """

    def __init__(
        self, reward: Tensor, terminated: Tensor, done: Tensor, gamma: float | Tensor, mask: Tensor | None
    ) -> None:
        for name, x in (("terminated", terminated), ("done", done), ("gamma", gamma), ("mask", mask)):
            if isinstance(x, Tensor) and x.ndim and x.shape != reward.shape:
                raise RecordError(f"{name} has shape {tuple(x.shape)}, but reward has {tuple(reward.shape)}")
        self.mask = mask
        self.reward = self.clean(reward)
        self.terminated, self.done = terminated, terminated | done
        discount = self.clean(gamma) if isinstance(gamma, Tensor) and gamma.ndim else gamma
        self.bootstrap = (
            discount * ~terminated if isinstance(discount, Tensor) else (~terminated).to(self.reward.dtype) * discount
        )
        self.trace = (
            discount * ~self.done if isinstance(discount, Tensor) else (~self.done).to(self.reward.dtype) * discount
        )

    def clean(self, x: Tensor) -> Tensor:
        """Detached, floating, and 0 in masked steps."""
        x = x.detach() if x.is_floating_point() and x.dtype.itemsize >= 4 else x.detach().float()
        return x if self.mask is None else x.masked_fill(~self.mask, 0.0)

    def after(self, next_value: Tensor) -> Tensor:
        """Successors' values, cleaned; 0 behind a terminated step, whatever stands there."""
        return self.clean(next_value).masked_fill(self.terminated, 0.0)

    def ratio(self, log_ratio: Tensor) -> Tensor:
        """``exp`` of the clamped log-ratio; 1 in masked steps."""
        return self.clean(log_ratio).clamp(-CLAMP, CLAMP).exp()

    @cached_property
    def following(self) -> Tensor:
        """Column of the next step inside the mask, ``T`` where there is none, ``[B, T]``."""
        width = self.reward.shape[-1]
        column = torch.arange(width, device=self.reward.device).expand_as(self.reward)
        here = column if self.mask is None else torch.where(self.mask, column, width)
        following = shifted(here.flip(-1).cummin(-1).values.flip(-1))
        following[..., -1] = width
        return following

    def ahead(self, x: Tensor) -> Tensor:
        """``x`` of the next step inside the mask, 0 where there is none, ``[B, T]``."""
        if self.mask is None:
            return shifted(x)
        width = x.shape[-1]
        return x.gather(-1, self.following.clamp(max=width - 1)).masked_fill(self.following == width, 0.0)

    def successor(self, value: Tensor, next_value: Tensor) -> Tensor:
        """Value of each step's successor: ``next_value``, but across a gap that of the next step inside the mask."""
        next_value = self.after(next_value)
        if self.mask is None:
            return next_value
        width = self.mask.shape[-1]
        gap = self.following > torch.arange(1, width + 1, device=self.mask.device)
        across = self.mask & gap & (self.following < width) & ~self.done
        return torch.where(across, self.ahead(self.clean(value)), next_value)

    def scan(self, start: Tensor, coefficient: Tensor | float) -> Tensor:
        """``e_t = start_t + gamma_t (1 - done_t) c_t e_{t+1}``, passing over masked steps."""
        decay = self.trace * coefficient
        if self.mask is not None:
            start, decay = start.masked_fill(~self.mask, 0.0), decay.masked_fill(~self.mask, 1.0)
        return backward_scan(start, decay)

    def masked(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The results, 0 in masked steps."""
        if self.mask is None:
            return tensors
        return tuple(x.masked_fill(~self.mask, 0.0) for x in tensors)


def value_scan(
    path: Trajectory, value: Tensor, next_value: Tensor, rho: Tensor | float, c: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """The state-value form ``e_t = rho_t delta_t + gamma (1 - done_t) c_t e_{t+1}``.

    Returns:
        ``(error, target, following)``: ``e``, ``V + e``, and ``e_{t+1}`` where the trace goes on (0 elsewhere).
    """
    value = path.clean(value)
    delta = path.reward + path.bootstrap * next_value - value
    error = path.scan(rho * delta, c)
    return error, value + error, shifted(error) * ~path.done


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: float | Tensor,
    lam: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, 1506.02438.

    Args:
        reward, value, next_value: ``[B, T]`` float; ``next_value`` is of the true successor.
        terminated, done: ``[B, T]`` bool.
        gamma: float or ``[B, T]``.
        lam: trace parameter.
        mask: ``[B, T]`` bool; masked steps are transparent and get 0.

    Returns:
        Advantage and value target (advantage + value), ``[B, T]``, detached.
    """
    path = Trajectory(reward, terminated, done, gamma, mask)
    error, target, _ = value_scan(path, value, path.successor(value, next_value), 1.0, lam)
    error, target = path.masked(error, target)
    return error, target


def vtrace(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    done: Tensor,
    log_ratio: Tensor,
    gamma: float | Tensor,
    lam: float = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
    pg_rho_bar: float = 1.0,
    mask: Tensor | None = None,
    alpha: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """V-trace, 1802.01561; with ``alpha`` below 1 the leaky mixture with plain ratios of 2002.12928.

    Args:
        log_ratio: ``[B, T]``, log of target over behavior probability of each step's whole action.
        rho_bar, c_bar, pg_rho_bar: truncation of the ratio in the error, the trace and the policy gradient.
        alpha: share of the truncated ratio; ``1 - alpha`` of the untruncated one.

    The other arguments are those of :func:`gae`.

    Returns:
        Advantage (already times the truncated ratio) and value target, ``[B, T]``, detached.
    """
    path = Trajectory(reward, terminated, done, gamma, mask)
    ratio = path.ratio(log_ratio)
    rho, c = ratio.clamp(max=rho_bar), ratio.clamp(max=c_bar)
    if alpha != 1.0:
        rho, c = torch.lerp(ratio, rho, alpha), torch.lerp(ratio, c, alpha)
    following_value = path.successor(value, next_value)
    _, target, following = value_scan(path, value, following_value, rho, lam * c)
    ahead = following_value + lam * following
    advantage = ratio.clamp(max=pg_rho_bar) * (path.reward + path.bootstrap * ahead - path.clean(value))
    advantage, target = path.masked(advantage, target)
    return advantage, target


def action_value_scan(path: Trajectory, q: Tensor, next_expected_q: Tensor, c: Tensor | float) -> Tensor:
    """``G_t = r + gamma (1-term) EQ' + gamma (1-done) c_{t+1} (G_{t+1} - q_{t+1})``, ``[B, T]``."""
    q = path.clean(q)
    delta = path.reward + path.bootstrap * path.after(next_expected_q) - q
    carried = path.scan(c * delta, c)
    (target,) = path.masked(q + delta + path.trace * shifted(carried))
    return target


def retrace(
    reward: Tensor,
    q: Tensor,
    next_expected_q: Tensor,
    terminated: Tensor,
    done: Tensor,
    log_ratio: Tensor,
    gamma: float | Tensor,
    lam: float = 1.0,
    mask: Tensor | None = None,
    c_bar: float = 1.0,
) -> Tensor:
    """Retrace(lambda) targets for action values, 1606.02647; ACER's Q-ret (1611.01224) is ``lam=1``.

    Args:
        c_bar: truncation of the ratio in the trace.
        q: ``[B, T]``, Q of the taken action.
        next_expected_q: ``[B, T]``, expected Q at the true successor under the target policy.

    The other arguments are those of :func:`vtrace`.

    Returns:
        Target for ``q``, ``[B, T]``, detached.
    """
    path = Trajectory(reward, terminated, done, gamma, mask)
    return action_value_scan(path, q, next_expected_q, lam * path.ratio(log_ratio).clamp(max=c_bar))
