"""Emphatic weights and ACER's two terms: limits, hand numbers and exact expectations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unified_rl.errors import ConfigError
from unified_rl.returns import emphatic_weights, truncated_scores, within_trust_region


def test_follow_on_trace_by_hand_starts_anew_after_an_end() -> None:
    log_ratio = torch.tensor([[2.0, 0.5, 4.0, 1.0]]).log()
    done = torch.tensor([[False, False, True, False]])
    interest = torch.tensor([[1.0, 3.0, 1.0, 2.0]])
    f = [1.0, 3 + 0.5 * 2 * 1.0, 1 + 0.5 * 0.5 * 4.0, 2.0]
    got = emphatic_weights(log_ratio, done, 0.5, 0.0, interest)
    assert got[0].tolist() == pytest.approx(f)
    mixed = emphatic_weights(log_ratio, done, 0.5, 0.25, interest)
    assert mixed[0].tolist() == pytest.approx(
        [0.25 * i + 0.75 * x for i, x in zip(interest[0].tolist(), f, strict=True)]
    )


def test_limits_of_the_emphasis() -> None:
    g = torch.Generator().manual_seed(0)
    log_ratio = torch.randn(3, 40, generator=g, dtype=torch.float64)
    never = torch.zeros(3, 40, dtype=torch.bool)
    ones = torch.ones_like(log_ratio)
    torch.testing.assert_close(emphatic_weights(log_ratio, never, 0.9, 1.0), ones)
    torch.testing.assert_close(emphatic_weights(log_ratio, never, 0.0, 0.3), ones)
    torch.testing.assert_close(emphatic_weights(0 * log_ratio, never, 0.5)[:, -1], 2 * ones[:, 0])  # i / (1 - gamma)


def test_masked_steps_are_transparent_to_the_emphasis() -> None:
    where = torch.tensor([0, 3, 4, 7])
    log_ratio, done = torch.randn(1, 4, dtype=torch.float64), torch.tensor([[False, False, True, False]])
    wide = torch.full((1, 9), math.nan, dtype=torch.float64).index_copy(1, where, log_ratio)
    mask = torch.zeros(1, 9, dtype=torch.bool)
    mask[:, where] = True
    flags = torch.ones(1, 9, dtype=torch.bool).index_copy(1, where, done)
    got = emphatic_weights(wide, flags, 0.8, 0.2, mask=mask)
    want = emphatic_weights(log_ratio, done, 0.8, 0.2)
    torch.testing.assert_close(got, torch.zeros_like(wide).index_copy(1, where, want))


def bandit() -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of target and behavior, and true action values, of one state with four actions, ``[4]``."""
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 4, generator=g, dtype=torch.float64).mul_(1.5).log_softmax(-1)
    return logits[0], logits[1], torch.randn(4, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("c", [0.0, 0.5, 1.0, 10.0, math.inf])
def test_truncation_with_correction_is_the_exact_policy_gradient_in_expectation(c: float) -> None:
    """Over the behavior's actions the two terms add up to ``pi(a) (Q(a) - V)``, wherever the ratio is truncated."""
    log_prob, behavior, q = bandit()
    rows = torch.arange(4).unsqueeze(1)

    def repeated(x: Tensor) -> Tensor:
        return x.expand(4, 1, 4)

    scores = truncated_scores(repeated(log_prob), repeated(behavior), rows, repeated(q), q.unsqueeze(1), c)
    chance = behavior.exp()
    expected = torch.diag(chance * scores.taken[:, 0]).sum(0) + (chance[:, None] * scores.every[:, 0]).sum(0)
    advantage = q - (log_prob.exp() * q).sum()
    torch.testing.assert_close(expected, log_prob.exp() * advantage)


def test_truncation_at_zero_needs_no_ratio_and_at_infinity_no_other_action() -> None:
    log_prob, behavior, q = bandit()
    args = (log_prob.view(1, 1, 4), behavior.view(1, 1, 4), torch.tensor([[2]]), q.view(1, 1, 4), q[2].view(1, 1))
    none, only = truncated_scores(*args, 0.0), truncated_scores(*args, math.inf)
    assert float(none.taken) == 0.0
    assert bool((only.every == 0).all())
    assert float(only.taken) == pytest.approx(math.exp(log_prob[2] - behavior[2]) * float(q[2] - log_prob.exp() @ q))
    with pytest.raises(ConfigError, match="cannot be negative"):
        truncated_scores(*args, -1.0)


def test_trust_region_step_leaves_small_steps_alone_and_meets_the_bound_otherwise() -> None:
    k = torch.tensor([[3.0, 4.0], [3.0, 4.0]], dtype=torch.float64)
    gradient = torch.tensor([[0.1, 0.1], [2.0, 1.0]], dtype=torch.float64)
    got = within_trust_region(gradient, k, 1.0)
    torch.testing.assert_close(got[0], gradient[0])
    torch.testing.assert_close(got[1], gradient[1] - (10 - 1) / 25 * k[1])
    assert float((k[1] * got[1]).sum()) == pytest.approx(1.0)
