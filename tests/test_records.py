"""Gradients of single records: bounded one by one, blurred, resumed, and what compares records refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from agent_cases import close, control_agent, filled, gaussian, gradients, nudge
from term_cases import agent_of, dense, joined, want

from unified_rl.errors import ConfigError
from unified_rl.shard import Shard

DISTILL: dict[str, Any] = {"policy": None, "distill": {"name": "divergence", "anchor": "reference"}}


def setting() -> tuple[Any, Any, list[torch.Tensor]]:
    """A policy off its reference, rows, and the loss of each row by itself."""
    policy, rows = joined()
    reference = copy.deepcopy(policy)
    nudge(policy, 0.1)
    s, _ = dense(policy, rows)
    with torch.no_grad():
        t, _ = dense(reference, rows)
    kl = (s.exp() * (s - t)).sum(-1) * rows["mask"]
    return (policy, reference), rows, list(kl.sum(-1) / rows["mask"].sum(-1))


def agent(policies: Any, rows: Any, node: dict[str, Any], **options: Any) -> Any:
    made = agent_of(copy.deepcopy(policies[0]), rows, "reinforce", objectives=DISTILL, per_record=node, **options)
    made.anchors["reference"].policy.load_state_dict(policies[1].state_dict())
    made.checked = True
    return made


@pytest.mark.parametrize("clip", [float("inf"), 3.5])
def test_every_row_has_a_bounded_gradient_of_its_own(clip: float) -> None:
    policies, rows, losses = setting()
    plain = agent_of(policies[0], rows)
    each = [want(plain, loss) if n + 1 == len(losses) else _kept(plain, loss) for n, loss in enumerate(losses)]
    norms = torch.stack([torch.stack([g.norm() for g in one.values()]).norm() for one in each])
    assert not clip < 9 or 0 < int((norms > clip).sum()) < len(norms)
    scale = (clip / norms).clamp(max=1.0)
    mean = {name: sum(k * one[name] for k, one in zip(scale, each, strict=True)) / len(rows) for name in each[0]}
    found = agent(policies, rows, {"clip": clip})
    metrics: dict[str, Any] = {}
    step = found._step
    found._step = lambda batch: metrics.update(step(batch)) or metrics  # type: ignore[func-returns-value]
    close(gradients(found, filled(rows, 1)), mean)
    assert float(metrics["records/norm"]) == pytest.approx(float(norms.mean()), rel=1e-4)
    assert float(metrics["records/clipped"]) == pytest.approx(float((norms > clip).float().mean()))
    assert float(metrics["loss/distill"]) == pytest.approx(float(torch.stack(losses).mean().detach()), rel=1e-4)


def _kept(plain: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names = [name for name, _ in plain.optimizer.named]
    return dict(zip(names, torch.autograd.grad(loss, plain.optimizer.parameters, retain_graph=True), strict=True))


def test_noise_has_the_deviation_of_the_bound_and_goes_on_where_it_stood() -> None:
    policies, rows, _ = setting()
    quiet, loud = (gradients(agent(policies, rows, {"clip": 0.05, "noise": s}), filled(rows, 1)) for s in (0.0, 2.0))
    noise = torch.cat([(loud[name] - quiet[name]).flatten() for name in quiet])
    assert float(noise.std()) == pytest.approx(2.0 * 0.05 / len(rows), rel=0.05)
    assert abs(float(noise.mean())) < 5 * 2.0 * 0.05 / len(rows) / len(noise) ** 0.5
    one, again = (agent(policies, rows, {"clip": 0.05, "noise": 2.0}) for _ in range(2))
    one.update(filled(rows, 1))
    again.load_state_dict(copy.deepcopy(one.state_dict()))
    one.update(filled(rows, 1)), again.update(filled(rows, 1))
    for a, b in zip(one.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objectives": {}}, r"objectives\.policy compares records: use terms of single rows"),
        ({"objectives": {"policy": None, "prefer": {"name": "preference"}}}, r"objectives\.prefer compares records"),
        (
            {"objectives": {"policy": None, "near": {**DISTILL["distill"], "pass_rate": {}}}},
            r"objectives\.near compares",
        ),
        ({"filters": ["uncertain_units"]}, r"agent\.filters compares records"),
        ({"drop_equal_groups": True}, r"agent\.drop_equal_groups compares records"),
        (
            {"objectives": {"policy": None, "spread": {"name": "weighed_entropy", "weight": "x"}}},
            r"objectives\.spread compares",
        ),
        ({"per_record": {"clip": 0.0}}, r"per_record.*clip=0\.0"),
        ({"per_record": {"clp": 1.0}}, "has no field 'clp'; did you mean 'clip'"),
        ({"per_record": {"clip": float("inf"), "noise": 1.0}}, r"per_record\.noise is in proportion to .*finite clip"),
    ],
)
def test_what_lets_one_record_move_the_gradients_of_others_is_refused(options: dict[str, Any], words: str) -> None:
    policy, rows = joined()
    with pytest.raises(ConfigError, match=words):
        agent_of(policy, rows, "reinforce", **{"objectives": DISTILL, "per_record": {"clip": 1.0}, **options})


def test_moments_of_observations_and_several_processes_are_refused_too() -> None:
    imitate = {"policy": None, "value": None, "near": {"name": "divergence", "anchor": "reference"}}
    for policy, words in ((gaussian(normalize_observation=True), "normalize_observation"), (gaussian(), "")):
        options: dict[str, Any] = {"objectives": imitate, "per_record": {"clip": 1.0}, "advantage": "group"}
        with pytest.raises(ConfigError, match=r"agent\.per_record .*set agent\.shuffle_steps=false"):
            control_agent(policy, "reinforce", **{**options, "advantage": "critic"})
        if words:
            with pytest.raises(ConfigError, match=words):
                control_agent(policy, "reinforce", **options)
        else:
            two = Shard()
            two.world = 2
            with pytest.raises(ConfigError, match=r"agent\.per_record .*learner=single"):
                control_agent(policy, "reinforce", **options).share(two)
