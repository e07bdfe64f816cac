"""Coefficients of terms: schedules against written-out values, controllers that follow a metric, and bad settings."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from agent_cases import filled
from term_cases import agent_of, joined

from unified_rl.errors import ConfigError
from unified_rl.objectives.coefficients import coefficient


@pytest.mark.parametrize(
    ("node", "at", "value"),
    [
        (0.3, (0.7, 9), 0.3),
        ({"name": "linear", "start": 1.0, "end": 0.2}, (0.25, 9), 0.8),
        ({"name": "linear", "start": 1.0, "complement": True}, (0.25, 9), 0.25),
        ({"name": "cosine", "start": 1.0, "end": 0.0}, (0.5, 9), 0.5),
        ({"name": "cosine", "start": 1.0, "end": 0.0}, (0.25, 9), 0.5 * (1 + math.cos(math.pi / 4))),
        ({"name": "exponential", "start": 2.0, "decay": 0.5}, (0.0, 3), 0.25),
        ({"name": "exponential", "start": 2.0, "decay": 0.5, "floor": 0.5}, (0.0, 3), 0.5),
        ({"name": "warmup_cosine", "peak": 0.5, "valley": 0.1, "warmup": 10, "decay": 20}, (0.0, 5), 0.25),
        ({"name": "warmup_cosine", "peak": 0.5, "valley": 0.1, "warmup": 10, "decay": 20}, (0.0, 20), 0.3),
        ({"name": "warmup_cosine", "peak": 0.5, "valley": 0.1, "warmup": 10, "decay": 20}, (0.0, 999), 0.1),
        ({"name": "warmup_cosine", "peak": 0.5, "valley": 0.1, "warmup": 0, "decay": 1}, (0.0, 0), 0.5),
        ({"name": "steps", "at": [3, 5], "values": [1.0, 0.5, 0.1]}, (0.0, 2), 1.0),
        ({"name": "steps", "at": [3, 5], "values": [1.0, 0.5, 0.1]}, (0.0, 3), 0.5),
        ({"name": "steps", "at": [3, 5], "values": [1.0, 0.5, 0.1]}, (0.0, 9), 0.1),
    ],
)
def test_a_schedule_has_its_written_out_value(node: Any, at: tuple[float, int], value: float) -> None:
    assert coefficient(node)(*at) == pytest.approx(value)


def test_what_counts_sometimes_does_so_in_a_share_of_the_updates_whenever_they_are_asked() -> None:
    one = coefficient({"name": "sometimes", "value": 0.1, "probability": 0.6})
    found = [one(0.0, update) for update in range(1000)]
    assert set(found) == {0.0, 0.1} and found.count(0.1) == pytest.approx(600, abs=50)
    assert [one(0.9, update) for update in reversed(range(1000))] == found[::-1]
    assert [coefficient({"name": "sometimes", "value": 0.1, "probability": p})(0.0, 7) for p in (0.0, 1.0)] == [
        0.0,
        0.1,
    ]


def test_a_dual_multiplier_doubles_above_its_limit_and_halves_below() -> None:
    one = coefficient({"name": "dual", "metric": "update/kl", "limit": 0.1, "start": 1.0})
    values = []
    for found in (0.2, 0.2, 0.1, 0.01):
        one.observe({"update/kl": found})
        values.append(one(0.0, 0))
    assert values == pytest.approx([2.0, 4.0, 4.0, 2.0])


PI = {"name": "proportional_integral", "metric": "train/reward", "target": 1.0, "gain": 0.1, "integral": 0.05}


@pytest.mark.parametrize("complement", [False, True])
def test_a_controller_moves_its_coefficient_and_survives_a_checkpoint(complement: bool) -> None:
    policy, rows = joined()
    objectives = {"policy": {"coefficient": {**PI, "base": 0.2, "complement": complement}}}
    agent = agent_of(policy, rows, objectives=objectives)
    agent.update(filled(rows, 1))
    error = 1.0 - float(rows["reward"].sum(-1).mean())
    want = 0.2 + 0.15 * error
    again = agent_of(copy.deepcopy(policy), rows, objectives=objectives)
    again.load_state_dict(agent.state_dict())
    for one in (agent, again):
        one.objective.start(0.0, 1)
        assert one.objective.terms["policy"].coefficient == pytest.approx(1.0 - want if complement else want)
    assert agent.objective.state_dict() == again.objective.state_dict()


def test_a_controller_of_a_terms_own_metric_comes_back_from_0() -> None:
    """At a coefficient of 0 the entropy is still measured, or it could never rise again; the gradient is untouched."""
    policy, rows = joined()
    node = {"name": "proportional_integral", "metric": "policy/entropy", "target": 9.0, "base": 0.0, "gain": 0.01}
    agent = agent_of(copy.deepcopy(policy), rows, objectives={"entropy": {"name": "entropy", "coefficient": node}})
    plain = agent_of(policy, rows)
    metrics = agent.update(filled(rows, 1))
    plain.update(filled(rows, 1))
    for a, b in zip(agent.optimizer.parameters, plain.optimizer.parameters, strict=True):
        assert a.equal(b)
    agent.objective.start(0.0, 1)
    found = 0.01 * (9.0 - float(metrics["policy/entropy"]))
    assert agent.objective.terms["entropy"].coefficient == pytest.approx(-found) and found > 0.01


def test_the_integral_of_a_control_is_bounded_and_removes_the_error_that_proportion_leaves() -> None:
    """The plant ``entropy = 1 + u / 2`` comes to the target under an integral, and stays off it under a gain alone."""

    def settled(**gains: Any) -> float:
        control = coefficient({**PI, "metric": "m", "target": 2.0, "low": -9.0, "high": 9.0, **gains})
        for _ in range(400):
            found = 1.0 + 0.5 * control(0.0, 0)
            control.observe({"m": found})
        return found

    assert settled(gain=1.0, integral=0.0) == pytest.approx(1.0 + 0.5 * 1.0 / 1.5)
    assert settled(gain=1.0, integral=0.1) == pytest.approx(2.0)
    bounded = coefficient({**PI, "metric": "m", "gain": 0.0, "integral": 0.05, "windup": 2.0})
    for _ in range(9):
        bounded.observe({"m": 0.0})
    assert bounded(0.0, 0) == pytest.approx(0.05 * 2.0)


def test_a_logistic_coefficient_follows_its_curve() -> None:
    one = coefficient({"name": "logistic", "metric": "m", "low": 0.1, "high": 0.5, "middle": 0.5, "width": 0.1})
    assert one(0.0, 0) == pytest.approx(0.1 + 0.4 / (1 + math.exp(5.0)))  # nothing seen yet counts as 0
    for found, want in ((0.5, 0.3), (0.6, 0.1 + 0.4 / (1 + math.exp(-1.0))), (1e6, 0.5), (-1e6, 0.1)):
        one.observe({"m": found})
        assert one(0.0, 0) == pytest.approx(want)


def test_a_kl_counts_above_a_threshold_that_follows_the_reward() -> None:
    """Written out: averages from 0 and from the first reward, the PID control, the gate of the entropy, warm-up."""
    gains = {"proportional": 0.3, "integral": 0.01, "derivative": 0.05}
    one = coefficient({"name": "kl_threshold", "metric": "kl", "warmup": 1, **gains})
    assert one(0.0, 0) == 0.0
    seen = [(4.0, 0.3, 0.0), (5.0, 0.9, 1.0), (9.0, 7.0, 0.5)]
    kl = average = total = before = 0.0
    for number, (found, nats, reward) in enumerate(seen):
        one.observe({"kl": found, "policy/entropy": nats, "train/reward": reward})
        kl = 0.9 * kl + 0.1 * found
        newer = reward if number == 0 else 0.95 * average + 0.05 * reward
        error = (newer - average if number else 0.0) - 0.001
        total += error
        change = error - before if number else 0.0
        threshold = min(0.6, max(0.1, 0.3 + 0.3 * error + 0.01 * total + 0.05 * change))  # warm-up ends with the first
        average, before = newer, error
        assert one(0.0, 0) == pytest.approx(0.2 * (kl - threshold) * max(0.5, 2.0 / (nats + 0.1)))
    assert kl > threshold and max(0.5, 2.0 / (7.0 + 0.1)) == 0.5
    again = coefficient({"name": "kl_threshold", "metric": "kl", "warmup": 1, **gains})
    again.load_state_dict(copy.deepcopy(one.state_dict()))
    for each in (one, again):
        each.observe({"kl": 1.0, "policy/entropy": 1.0, "train/reward": 0.7})
    assert one(0.0, 0) == again(0.0, 0)
    calm = coefficient({"name": "kl_threshold", "metric": "kl", "warmup": 9})
    calm.observe({"kl": 4.4, "policy/entropy": 1.0, "train/reward": 0.0})
    assert calm(0.0, 0) == 0.0, "0.44 is below 1.5 times the threshold while warming up"


def test_a_metric_that_no_part_reports_is_refused_at_its_first_observation() -> None:
    policy, rows = joined()
    agent = agent_of(
        policy, rows, objectives={"policy": {"coefficient": {**PI, "metric": "train/rewrad", "base": 1.0}}}
    )
    words = r"agent\.objectives\.policy\.coefficient\.metric 'train/rewrad' is .*did you mean 'train/reward'"
    with pytest.raises(ConfigError, match=words):
        agent.update(filled(rows, 1))


def test_a_metric_that_an_update_without_rows_lacks_is_waited_for() -> None:
    policy, rows = joined()
    rows["reward"][:] = 1.0
    node = {**PI, "metric": "update/kl", "base": 1.0}
    agent = agent_of(policy, rows, objectives={"policy": {"coefficient": node}}, drop_equal_groups=True)
    agent.update(filled(rows, 1))
    assert agent.optimizer.steps == 0 and agent.objective.state_dict()["policy"]["seen"] is False


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"name": "liner", "start": 1.0}, r"c\.name 'liner' is unknown; did you mean 'linear'"),
        ({"name": "linear"}, "c 'linear' needs start"),
        ({"name": "linear", "strat": 1.0, "start": 0.0}, "c 'linear' has no field 'strat'; did you mean 'start'"),
        ({"name": "linear", "start": "high"}, "c.start is 'high'; it must be a number"),
        ({"name": "warmup_cosine", "peak": 1.0, "valley": 0.0, "decay": 0}, "c.decay=0 must be at least 1"),
        (
            {"name": "warmup_cosine", "peak": 1.0, "valley": 0.0, "warmup": 0.5},
            "c.warmup is 0.5; it must be a whole number",
        ),
        ({"name": "exponential", "start": 1.0, "decay": 1.5}, r"c.decay=1.5 must lie in \(0, 1\]"),
        ({"name": "steps", "at": [3], "values": [1.0]}, "c.values must hold one more entry than at"),
        ({"name": "steps", "at": [5, 3], "values": [1.0, 2.0, 3.0]}, "c.at must increase"),
        ({**PI, "low": 2.0, "high": 1.0}, "c.low=2.0 must not lie above c.high=1.0"),
        ({"name": "dual", "metric": "m", "limit": 0.0}, "c.limit=0.0 must be above 0"),
        ({"name": "logistic", "metric": "m", "high": 1.0, "width": 0.0}, "c.width=0.0 must be above 0"),
        ({"name": "kl_threshold", "metric": "m", "low": 0.7}, "c.low=0.7 must not lie above c.high=0.6"),
        (None, "c is None; it must be a finite number"),
        (True, "c is True; it must be a finite number"),
        (float("inf"), "c is inf; it must be a finite number"),
        ([1.0], r"c needs a name, got \[1.0\]"),
    ],
)
def test_a_bad_coefficient_is_refused_by_its_full_name(node: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=f"^{words}"):
        coefficient(node, "c")


def test_a_metric_that_nobody_reports_is_named_by_the_setting_that_asks_for_it() -> None:
    made = coefficient({"name": "kl_threshold", "metric": "kl", "entropy": "policy/entropi"}, "c")
    with pytest.raises(ConfigError, match=r"^c\.entropy 'policy/entropi' is reported by no part"):
        made.observe({"kl": 0.1, "policy/entropy": 1.0, "train/reward": 0.0, "loss/policy": 0.0})


def test_two_terms_with_one_node_do_not_share_a_state() -> None:
    a, b = coefficient(PI), coefficient(PI)
    a.observe({"train/reward": 0.0})
    assert a(0.0, 0) == pytest.approx(0.15) and b(0.0, 0) == 0.0
