"""Action-value targets and gaps against sums written out from the definitions, one number at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unified_rl.returns import (
    action_based_target,
    gae,
    n_step,
    q_lambda,
    retrace,
    td_lambda,
    tree_backup,
)

B, T, GAMMA = 4, 9, 0.9


class Data:
    """Random rows of action values with both kinds of ends."""

    def __init__(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)

        def normal() -> Tensor:
            return torch.randn(B, T, generator=g, dtype=torch.float64)

        self.reward, self.q, self.expected, self.log_ratio = normal(), normal(), normal(), 0.7 * normal()
        self.log_prob = -normal().abs()
        self.done = torch.rand(B, T, generator=g) < 0.25
        self.terminated = self.done & (torch.rand(B, T, generator=g) < 0.5)
        self.greedy = torch.rand(B, T, generator=g) < 0.6

    @property
    def args(self) -> tuple[Tensor, ...]:
        return self.reward, self.q, self.expected, self.terminated, self.done


def forward_sum(d: Data, c: Tensor) -> Tensor:
    """``q_t + sum_k gamma^(k-t) c_{t+1} .. c_k delta_k`` over the rest of the episode: forwards, not by recursion."""
    out = torch.zeros(B, T, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            total, weight = float(d.q[b, t]), 1.0
            for k in range(t, T):
                if k > t:
                    weight *= GAMMA * float(c[b, k])
                ahead = 0.0 if d.terminated[b, k] else GAMMA * float(d.expected[b, k])
                total += weight * (float(d.reward[b, k]) + ahead - float(d.q[b, k]))
                if d.done[b, k]:
                    break
            out[b, t] = total
    return out


def test_every_trace_of_the_action_value_table_equals_the_forward_sum() -> None:
    d, lam = Data(0), 0.8
    ratio, pi = d.log_ratio.exp(), d.log_prob.exp()
    one = torch.ones_like(pi)
    cases = {
        "Harutyunyan": (q_lambda(*d.args, GAMMA, lam), lam * one),
        "Watkins": (q_lambda(*d.args, GAMMA, lam, d.greedy), lam * d.greedy.double()),
        "Retrace": (retrace(*d.args, d.log_ratio, GAMMA, lam), lam * ratio.clamp(max=1)),
        "Q-ret with c = 2": (retrace(*d.args, d.log_ratio, GAMMA, c_bar=2.0), ratio.clamp(max=2)),
        "tree backup": (tree_backup(*d.args, d.log_prob, GAMMA, lam), lam * pi),
        "ABTD": (
            action_based_target(*d.args, d.log_prob, d.log_ratio, GAMMA, 1.7),
            torch.stack([1.7 * pi, ratio, one]).amin(0),
        ),
    }
    for name, (got, c) in cases.items():
        torch.testing.assert_close(got, forward_sum(d, c), msg=name)


def test_action_based_traces_run_from_tree_backup_to_retrace() -> None:
    d = Data(1)
    d.log_ratio = torch.maximum(d.log_ratio, d.log_prob)  # a ratio is never below the target's own probability
    retraced = retrace(*d.args, d.log_ratio, GAMMA)
    torch.testing.assert_close(action_based_target(*d.args, d.log_prob, d.log_ratio, GAMMA, 1e12), retraced)
    torch.testing.assert_close(
        action_based_target(*d.args, d.log_prob, d.log_ratio, GAMMA, 1.0), tree_backup(*d.args, d.log_prob, GAMMA)
    )


def test_true_action_values_make_every_trace_return_them_in_a_deterministic_chain() -> None:
    """Three steps of reward 1, 2 and 4, one action in each: Q is 1 + 2 g + 4 g^2 and so on, whatever the trace."""
    reward = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    q = torch.tensor([[1 + 2 * GAMMA + 4 * GAMMA**2, 2 + 4 * GAMMA, 4.0]], dtype=torch.float64)
    following = torch.cat([q[:, 1:], torch.full((1, 1), 99.0, dtype=torch.float64)], 1)
    end = torch.tensor([[False, False, True]])
    for lam in (0.0, 0.5, 1.0):
        torch.testing.assert_close(q_lambda(reward, q, following, end, end, GAMMA, lam), q)


@pytest.mark.parametrize("n", [1, 2, 3, 20])
def test_n_step_counts_steps_inside_the_mask_and_passes_over_gaps(n: int) -> None:
    g = torch.Generator().manual_seed(2)
    width, where = 12, torch.tensor([0, 1, 4, 6, 7, 11])
    short = [torch.randn(3, len(where), generator=g, dtype=torch.float64) for _ in range(3)]
    done = torch.rand(3, len(where), generator=g) < 0.2
    short[2] = torch.where(done, short[2], torch.cat([short[1][:, 1:], short[2][:, -1:]], 1))
    log_ratio = 0.3 * torch.randn(3, len(where), generator=g, dtype=torch.float64)
    mask = torch.zeros(3, width, dtype=torch.bool)
    mask[:, where] = True

    def spread(x: Tensor, fill: float | bool) -> Tensor:
        return torch.full((3, width), fill, dtype=x.dtype).index_copy(1, where, x)

    wide = [spread(x, math.nan) for x in short]
    flags, flags_wide = (done & False, done), (spread(done & False, True), spread(done, True))
    want = n_step(*short, *flags, GAMMA, n, log_ratio=log_ratio)
    got = n_step(*wide, *flags_wide, GAMMA, n, mask, spread(log_ratio, math.nan))
    torch.testing.assert_close(got, spread(want, 0.0))


def test_n_step_by_its_own_sum() -> None:
    d = Data(3)
    value = d.q
    following = torch.where(d.done, d.expected, torch.cat([value[:, 1:], d.expected[:, -1:]], 1))
    got = n_step(d.reward, value, following, d.terminated, d.done, GAMMA, 3, log_ratio=d.log_ratio)
    for b in range(B):
        for t in range(T):
            total, weight = float(value[b, t]), 1.0
            for i in range(min(3, T - t)):
                k = t + i
                weight *= math.exp(float(d.log_ratio[b, k]))
                ahead = 0.0 if d.terminated[b, k] else GAMMA * float(following[b, k])
                total += GAMMA**i * weight * (float(d.reward[b, k]) + ahead - float(value[b, k]))
                if d.done[b, k]:
                    break
            assert float(got[b, t]) == pytest.approx(total)


def test_pengs_q_lambda_is_the_lambda_return_of_the_largest_action_values() -> None:
    """``G_t = r_t + g ((1 - lam) max Q(s_{t+1}) + lam G_{t+1})``, worked from the end."""
    reward = torch.tensor([[1.0, 0.0, 2.0]], dtype=torch.float64)
    largest = torch.tensor([[5.0, 3.0, 4.0]], dtype=torch.float64)
    end = torch.tensor([[False, False, True]])
    following = torch.tensor([[3.0, 4.0, 0.0]], dtype=torch.float64)
    got = td_lambda(reward, largest, following, end, end, 0.5, 0.4)
    third = 2.0
    second = 0.0 + 0.5 * (0.6 * 4.0 + 0.4 * third)
    first = 1.0 + 0.5 * (0.6 * 3.0 + 0.4 * second)
    assert got[0].tolist() == pytest.approx([first, second, third])


def test_whatever_stands_in_masked_steps_reaches_no_target() -> None:
    d = Data(4)
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) > 0.4
    results = []
    for junk in (0.0, math.nan, math.inf, -math.inf, 1e30):
        fill = [torch.where(mask, x, junk) for x in (d.reward, d.q, d.expected, d.log_ratio, d.log_prob)]
        reward, q, expected, log_ratio, log_prob = fill
        flags = [torch.where(mask, x, bool(junk)) for x in (d.terminated, d.done)]
        args = (reward, q, expected, *flags)
        results.append(
            [
                gae(*args, GAMMA, 0.7, mask)[0],
                n_step(*args, GAMMA, 2, mask, log_ratio),
                q_lambda(*args, GAMMA, 0.7, torch.where(mask, d.greedy, bool(junk)), mask),
                retrace(*args, log_ratio, GAMMA, mask=mask),
                tree_backup(*args, log_prob, GAMMA, mask=mask),
                action_based_target(*args, log_prob, log_ratio, GAMMA, 2.0, mask),
            ]
        )
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert torch.equal(got, want)
            assert bool((got[~mask] == 0).all())
