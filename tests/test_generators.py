"""Generators of f-divergences: derivatives, textbook values, and limits."""

from __future__ import annotations

import math

import pytest
import torch

from unified_rl.correction.generators import GENERATORS, Alpha, Generator, Hellinger

GENERATED = {name: make() for name, make in GENERATORS.items()}
A, B = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.1, 0.6, 0.3]]).log()
P, Q = A.exp().squeeze(), B.exp().squeeze()
M = (P + Q) / 2
TEXTBOOK = {
    "reverse_kl": (P * (P / Q).log()).sum(),
    "forward_kl": (Q * (Q / P).log()).sum(),
    "js": ((P * (P / M).log()).sum() + (Q * (Q / M).log()).sum()) / 2,
    "pearson_chi2": ((P - Q).square() / Q).sum(),
    "neyman_chi2": ((P - Q).square() / P).sum(),
    "tv": (P - Q).abs().sum() / 2,
    "hellinger": 1 - (P * Q).sqrt().sum(),
    "alpha": 4 * (1 - (P * Q).sqrt().sum()),
}


def between(generator: Generator, log_pi: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    return (log_p.exp() * generator.value(log_pi - log_p)).sum(-1)


@pytest.mark.parametrize("name", GENERATED)
def test_a_generator_is_its_divergence(name: str) -> None:
    assert float(between(GENERATED[name], A, B)) == pytest.approx(float(TEXTBOOK[name]), abs=1e-6)
    assert float(GENERATED[name].value(torch.zeros(()))) == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("name", GENERATED)
def test_the_slope_is_the_derivative_by_the_ratio(name: str) -> None:
    x = torch.tensor([-1.3, -0.2, 0.4, 1.7], dtype=torch.float64, requires_grad=True)
    (by_log,) = torch.autograd.grad(GENERATED[name].value(x).sum(), x)
    torch.testing.assert_close(GENERATED[name].slope(x.detach()), by_log / x.detach().exp(), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("name", GENERATED)
def test_the_slope_is_the_gradient_of_the_divergence_under_the_policy(name: str) -> None:
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    log_p = torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64).log()
    log_pi = logits.log_softmax(0)
    (whole,) = torch.autograd.grad(between(GENERATED[name], log_pi[None], log_p[None]).sum(), logits, retain_graph=True)
    slope = GENERATED[name].slope((log_pi - log_p).detach())
    (sampled,) = torch.autograd.grad((log_pi.detach().exp() * slope * log_pi).sum(), logits)
    torch.testing.assert_close(sampled, whole, atol=1e-12, rtol=1e-9)


def test_alpha_lies_between_the_two_kls() -> None:
    for alpha, name in ((1e-4, "reverse_kl"), (1 - 1e-4, "forward_kl")):
        near = float(between(Alpha(alpha=alpha), A.double(), B.double()))
        assert near == pytest.approx(float(TEXTBOOK[name]), rel=1e-3)
    assert float(between(Alpha(alpha=0.5), A, B)) == pytest.approx(4 * float(between(Hellinger(), A, B)), rel=1e-5)


@pytest.mark.parametrize("name", GENERATED)
def test_ratios_without_bound_stay_finite(name: str) -> None:
    far = torch.tensor([-1e4, 1e4])
    assert bool(torch.isfinite(GENERATED[name].value(far)).all() and torch.isfinite(GENERATED[name].slope(far)).all())
    assert math.isfinite(float(between(GENERATED[name], torch.tensor([[0.0, -100.0]]), torch.tensor([[-100.0, 0.0]]))))
