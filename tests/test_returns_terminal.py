"""What stands behind a terminal state (NaN, infinities) reaches no value, advantage, target, estimate or gradient."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

import unified_rl.returns as returns
from unified_rl.objectives.offline_value import TARGETS
from unified_rl.objectives.transitions import Networks, Transitions, prepare_batch
from unified_rl.replay.nstep import nstep_transitions
from unified_rl.returns import (
    Episodes,
    Segments,
    action_based_target,
    action_value_target,
    corrected_td_lambda,
    cut_bootstrap,
    doubly_robust,
    emphatic_weights,
    expected_sarsa,
    gae,
    hierarchical_gae,
    monte_carlo,
    n_step,
    q_lambda,
    retrace,
    segment_gae,
    td_lambda,
    tree_backup,
    vtrace,
)

POISON = (float("nan"), float("inf"), -float("inf"))
ROWS, WIDTH = 4, 9


class Data:
    """Rows with both kinds of ends; ``following`` is what each step's successor is worth, ``poison`` behind ends."""

    def __init__(self, poison: float | None, masked: bool) -> None:
        g = torch.Generator().manual_seed(3)
        self.reward, self.value, self.following, self.other = torch.randn(4, ROWS, WIDTH, generator=g).double()
        self.log_ratio = 0.3 * torch.randn(ROWS, WIDTH, generator=g).double()
        self.log_prob = -torch.rand(ROWS, WIDTH, generator=g).double()
        self.terminated = torch.rand(ROWS, WIDTH, generator=g) < 0.3
        self.terminated[0, -1] = True
        self.done = self.terminated | (torch.rand(ROWS, WIDTH, generator=g) < 0.2)
        self.done[:, -1] = True
        self.mask = torch.rand(ROWS, WIDTH, generator=g) > 0.3 if masked else None
        self.whole = torch.ones(ROWS, WIDTH, dtype=torch.bool)
        self.segment = torch.arange(WIDTH).expand(ROWS, WIDTH).contiguous()
        self.ends = (self.terminated, self.done, 0.9)
        if poison is not None:
            self.following = self.following.masked_fill(self.terminated, poison)


def _segments(d: Data) -> tuple[Any, ...]:
    return (d.reward, d.value, d.following, d.terminated, d.done, d.segment, d.whole, WIDTH)


ESTIMATORS: dict[str, Callable[[Data], Any]] = {
    "gae": lambda d: gae(d.reward, d.value, d.following, *d.ends, 0.8, d.mask),
    "gae with a discount a step": lambda d: gae(
        d.reward, d.value, d.following, d.terminated, d.done, torch.full_like(d.reward, 0.9), 0.8, d.mask
    ),
    "td_lambda": lambda d: td_lambda(d.reward, d.value, d.following, *d.ends, 0.8, d.mask),
    "vtrace": lambda d: vtrace(d.reward, d.value, d.following, d.terminated, d.done, d.log_ratio, 0.9, mask=d.mask),
    "leaky vtrace": lambda d: vtrace(
        d.reward, d.value, d.following, d.terminated, d.done, d.log_ratio, 0.9, mask=d.mask, alpha=0.5
    ),
    "n_step": lambda d: n_step(d.reward, d.value, d.following, *d.ends, 3, d.mask),
    "n_step under ratios": lambda d: n_step(d.reward, d.value, d.following, *d.ends, 3, d.mask, d.log_ratio),
    "corrected_td_lambda": lambda d: corrected_td_lambda(
        d.reward, d.value, d.following, d.terminated, d.done, d.log_ratio, 0.9, 0.8, d.mask
    ),
    "cut_bootstrap": lambda d: gae(
        d.reward, d.value, cut_bootstrap(d.value, d.following, d.terminated, d.done), *d.ends, 0.8, d.mask
    ),
    "retrace": lambda d: retrace(d.reward, d.value, d.following, d.terminated, d.done, d.log_ratio, 0.9, mask=d.mask),
    "action_value_target": lambda d: action_value_target(d.reward, d.value, d.following, *d.ends, 0.7, d.mask),
    "expected_sarsa": lambda d: expected_sarsa(d.reward, d.following, d.terminated, 0.9, d.mask),
    "tree_backup": lambda d: tree_backup(
        d.reward, d.value, d.following, d.terminated, d.done, d.log_prob, 0.9, mask=d.mask
    ),
    "q_lambda": lambda d: q_lambda(d.reward, d.value, d.following, *d.ends, 0.8, mask=d.mask),
    "action_based_target": lambda d: action_based_target(
        d.reward, d.value, d.following, d.terminated, d.done, d.log_prob, d.log_ratio, 0.9, mask=d.mask
    ),
    "segment_gae": lambda d: segment_gae(*_segments(d), 0.9, 0.8),
    "hierarchical_gae": lambda d: hierarchical_gae(d.reward, d.value, d.other, *_segments(d)[2:], 0.9),
    "Segments.gae": lambda d: Segments.of(*_segments(d), 0.9).gae(0.8),
}
WITHOUT_SUCCESSORS = {
    "monte_carlo": lambda d: monte_carlo(d.reward, *d.ends, d.mask),
    "emphatic_weights": lambda d: emphatic_weights(d.log_ratio, d.done, 0.9, mask=d.mask),
    "doubly_robust": lambda d: doubly_robust(Episodes(d.reward, d.log_ratio, 0.9, d.mask), d.value, d.other).value,
}


def tensors(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_what_follows_a_terminal_state_reaches_nothing(name: str, masked: bool) -> None:
    clean = tensors(ESTIMATORS[name](Data(None, masked)))
    for poison in POISON:
        found = tensors(ESTIMATORS[name](Data(poison, masked)))
        for a, b in zip(found, clean, strict=True):
            assert torch.equal(a, b), f"{name}: {poison} behind a terminal state"


@pytest.mark.parametrize("name", [n for n in ESTIMATORS if n != "expected_sarsa"])
def test_the_gradient_of_a_value_loss_is_that_of_clean_successors(name: str) -> None:
    def gradient(poison: float | None) -> Tensor:
        data = Data(poison, masked=False)
        data.value = data.value.requires_grad_(True)
        data.following.requires_grad_(True)
        target = tensors(ESTIMATORS[name](data))[-1]
        (data.value - target).square().sum().backward()
        assert data.value.grad is not None and data.following.grad is None
        return data.value.grad

    assert all(torch.equal(gradient(poison), gradient(None)) for poison in POISON)


def test_every_estimator_that_reads_successors_is_tested() -> None:
    from inspect import isfunction, signature

    names = [n for n in returns.__all__ if isfunction(getattr(returns, n))]
    reads = {n for n in names if {"next_value", "next_expected_q"} & set(signature(getattr(returns, n)).parameters)}
    assert reads <= set(ESTIMATORS) and "gae" in reads
    for estimator in WITHOUT_SUCCESSORS.values():  # these have no successor to read
        assert bool(torch.isfinite(estimator(Data(float("nan"), False))).all())


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("poison", POISON)
def test_targets_of_transitions_do_not_read_behind_a_terminal_state(name: str, poison: float) -> None:
    g = torch.Generator().manual_seed(0)
    terminated = torch.tensor([False, True, False, True, True])
    sample = TensorDict(
        {
            "observation": torch.randn(5, 2, generator=g),
            "action": torch.randn(5, 1, generator=g),
            "reward": torch.randn(5, generator=g),
            "discount": torch.full((5,), 0.9),
            "terminated": terminated,
            "next_observation": torch.randn(5, 2, generator=g),
        },
        [5],
    )

    def target(dirty: bool) -> Tensor:
        bad = terminated if dirty else torch.zeros(5, dtype=torch.bool)

        def spoilt(x: Tensor) -> Tensor:
            return x.masked_fill(bad, poison)

        identity = lambda x: x  # noqa: E731
        policy = SimpleNamespace(
            rsample=lambda obs, noise: (spoilt(obs.sum(-1))[:, None], spoilt(obs.sum(-1))),
            to_env=identity,
            from_env=identity,
        )
        value = lambda obs, action=0.0: spoilt(obs.sum(-1))  # noqa: E731
        nets = Networks(policy, value, lambda obs, action: value(obs)[None], value, torch.zeros(()))  # type: ignore[arg-type]
        batch = prepare_batch(sample, torch.device("cpu"))
        noise = torch.zeros(2, 5, 1)
        t = Transitions(batch, nets, noise, torch.tensor(0.1), lambda q, t: q.amin(0), torch.Generator())
        return TARGETS[name](t)

    found = target(dirty=True)
    assert torch.equal(found, target(dirty=False)) and torch.equal(found[terminated], sample["reward"][terminated])


def test_rewards_of_several_steps_end_at_a_terminal_state() -> None:
    nan = float("nan")
    segment = TensorDict(
        {
            "reward": torch.tensor([[1.0, 2.0, nan]]),
            "discount": torch.tensor([[0.5, 0.5, nan]]),
            "terminated": torch.tensor([[False, True, False]]),
            "truncated": torch.zeros(1, 3, dtype=torch.bool),
            "next_observation": torch.tensor([[[1.0], [nan], [nan]]]),
            "step_mask": torch.ones(1, 3, dtype=torch.bool),
        },
        [1, 3],
    )
    out = nstep_transitions(segment, 3)
    assert (
        out["reward"].tolist() == [2.0] and out["discount"].tolist() == [0.25] and out["terminated"].tolist() == [True]
    )
