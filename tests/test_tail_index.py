"""The tail index of importance ratios."""

import torch

from unified_rl.correction.diagnostics import tail_index


def test_tail_index_recovers_a_pareto_tail() -> None:
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for alpha in (1.5, 3.0):
        estimate = float(tail_index(uniform.pow(-1.0 / alpha)))
        assert abs(estimate - alpha) < 4 * alpha / (0.05 * 200_000) ** 0.5  # standard error alpha / sqrt(k)


def test_tail_index_of_equal_or_few_ratios_is_the_largest_value() -> None:
    assert float(tail_index(torch.ones(100))) > 9e5
    assert float(tail_index(torch.ones(3))) == 1e6
