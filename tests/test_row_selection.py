"""A term over some rows sees nothing of the others, whatever the correction and however the batch is split."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from agent_cases import filled, gradients, nudge
from tensordict import TensorDict
from term_cases import agent_of, joined
from torch import Tensor

from unified_rl.correction import correction_names, load_correction
from unified_rl.rollout.sources import Demonstrations

OWN = {"policy": {"rows": "own"}, "hold": {"name": "nll", "coefficient": 1e-30}}
"""The second term keeps the demonstrations in the batch and moves nothing."""


@pytest.fixture(scope="module")
def mixed() -> tuple[Any, TensorDict]:
    """A policy that has moved, and three groups of four own rows and a demonstration each, in random order."""
    policy, rows = joined(demonstrations=Demonstrations(per_group=1))
    nudge(policy, 0.02)
    return policy, rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def gradient(name: str, policy: Any, rows: TensorDict, **options: Any) -> dict[str, Tensor]:
    made = load_correction(name, **{"wrapper.initial": 0.0} if name == "alp" else {})  # whose noise is a whole batch's
    made.advantage |= {"rows": "own"}
    teacher = {"teacher": {"ema": 0.5}} if made.needs("teacher") else None
    agent = agent_of(copy.deepcopy(policy), rows, made, anchors=teacher, **options)
    if teacher is not None:
        nudge(agent.anchors["teacher"].policy, 0.1)
    return gradients(agent, filled(rows, 1))


@pytest.mark.parametrize("name", correction_names())
def test_a_policy_gradient_on_own_rows_does_not_see_demonstrations(name: str, mixed: tuple[Any, TensorDict]) -> None:
    policy, rows = mixed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a rule that rejects everything says so
        want = gradient(name, policy, rows[rows["source"] == 0])
        found = [gradient(name, policy, rows, objectives=OWN, micro_batch=size) for size in (None, 4)]
    largest = max(float(g.abs().max()) for g in want.values())
    assert largest > 1e-3
    for got in found:
        assert got.keys() == want.keys()
        for key, value in want.items():
            torch.testing.assert_close(got[key], value, atol=1e-6 + 1e-5 * largest, rtol=1e-4)
