"""Rows beside a demonstration of their prompt: the margin term and the mixture weight, against written-out values."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from agent_cases import close, filled, gradients
from tensordict import TensorDict
from term_cases import agent_of, both_splits, dense, joined, want

from unified_rl.correction import load_correction
from unified_rl.objectives.margin import expert_log_prob
from unified_rl.rollout.sources import Demonstrations

TERM = {"name": "margin", "coefficient": 0.3, "reduce": "token-mean", "slope": 0.25}


def test_a_demonstration_is_compared_place_by_place() -> None:
    """Two groups; the second has no demonstration. Rows begin at different columns."""
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 0], [0, 1, 1, 0]], dtype=torch.bool)
    rows = TensorDict(
        {"mask": mask, "group": torch.tensor([5, 5, 8, 5]), "source": torch.tensor([0, 2, 0, 0])}, batch_size=[4]
    )
    log_prob = torch.tensor([[9.0, -1, -2, -3], [9, 9, -4, -5], [-6, -7, -8, 9], [9, -6, -7, 9]])
    found, compared = expert_log_prob(rows, log_prob)
    assert found.tolist() == [[0, -4, -5, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, -4, -5, 0]]
    assert compared.tolist() == [[False, True, True, False], [False] * 4, [False] * 4, [False, True, True, False]]


def test_the_margin_has_its_written_out_gradient() -> None:
    """``-z |A|`` a unit where the margin is violated, ``slope`` of it where it is met."""
    policy, rows = joined(demonstrations=Demonstrations(per_group=1))
    correction = load_correction("grpo", **{"advantage": {"baseline": "mean", "scale": "none", "rows": "own"}})
    options: dict[str, Any] = {"objectives": {"policy": {"rows": "own"}, "calibrate": TERM}}
    got = gradients(agent_of(copy.deepcopy(policy), rows, correction, **options), filled(rows, 1))
    plain = agent_of(copy.deepcopy(policy), rows, correction, objectives={"policy": {"rows": "own"}})
    base = gradients(plain, filled(rows, 1))
    agent = agent_of(policy, rows, correction, **options)
    record = agent._annotate(agent._draw(filled(rows, 1)), {})
    _, lp = dense(policy, record)
    expert, compared = expert_log_prob(record, lp.detach())
    assert 0 < int(compared.sum()) < int(record["mask"].sum())
    z = torch.where(record["reward"].sum(-1) > 0.5, 1.0, -1.0)[:, None]
    gap = -z * (lp - expert)
    size = record["advantage"][:, :1].abs()
    loss = (0.3 * size * torch.where(gap > 0, gap, 0.25 * gap) * compared).sum() / compared.sum()
    violated = (gap > 0) & compared & (size > 0)
    met = (gap < 0) & compared & (size > 0)
    assert bool(violated.any()) and bool(met.any())
    close({name: got[name] - base[name] for name in got}, want(agent, loss))


def test_a_margin_does_not_depend_on_micro_batches() -> None:
    policy, rows = joined(demonstrations=Demonstrations(per_group=1))
    correction = load_correction("grpo", **{"advantage": {"baseline": "mean", "scale": "none", "rows": "own"}})
    both_splits(policy, rows, correction, objectives={"policy": {"rows": "own"}, "calibrate": TERM})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("p", "q", "weight"), [(1.0, 1.0, 1.0), (0.5, 0.5, 0.8), (0.5, 0.0, 2.0), (0.2, 0.6, 0.4 / 1.4)]
)
def test_the_weight_of_a_demonstration_against_a_mixture(p: float, q: float, weight: float) -> None:
    """``2 p / (1.5 q + 0.5)``: 1 where both are certain, never above ``4 p``; then times ``(1 - p)^power``."""
    rows = TensorDict(
        {
            "mask": torch.ones(1, 1, dtype=torch.bool),
            "step_index": torch.zeros(1, 1, dtype=torch.int64),
            "reward": torch.ones(1, 1),
            "advantage": torch.ones(1, 1),
            "behavior_log_prob": torch.zeros(1, 1),
            "proximal_log_prob": torch.tensor([[max(q, 1e-30)]]).log(),
            "source": torch.tensor([2]),
        },
        batch_size=[1],
    )
    lp = torch.tensor([[p]]).log()
    for power in (0.0, 0.5):
        made = load_correction("grpo", kernel={"name": "demonstration_mixture", "power": power})
        out = made(lp.requires_grad_(), rows)
        assert float(out.weight) == pytest.approx(weight * (1 - p) ** power, rel=1e-5)
        assert weight <= 4 * p


def test_a_demonstration_is_scored_at_the_start_of_an_update() -> None:
    """Nobody knows its behavior probability, so that cannot stand for the policy's own, however new the row is."""
    policy, rows = joined(demonstrations=Demonstrations(per_group=1))
    agent = agent_of(policy, rows, load_correction("grpo", kernel={"name": "demonstration_mixture"}))
    record = agent._annotate(agent._draw(filled(rows, 1)), {})
    shown = record["source"] == 2
    with torch.no_grad():
        _, lp = dense(policy, record)
    mask = record["mask"] & shown[:, None]
    torch.testing.assert_close(record["proximal_log_prob"][mask], lp[mask], atol=1e-5, rtol=1e-4)
    assert bool((record["behavior_log_prob"][mask] == 0).all()) and float(lp[mask].max()) < -0.1
