"""Bad input to a correction through the agent: one clear error, before any step is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from unified_rl import cli
from unified_rl.agents.policy_gradient import PolicyGradient
from unified_rl.correction import correction_names, load_correction
from unified_rl.correction.view import ANCHORS
from unified_rl.errors import ConfigError, RecordError
from unified_rl.policies.autoregressive import AutoregressivePolicy
from unified_rl.policies.gaussian import GaussianPolicy
from unified_rl.replay import Fresh, Replay

LANES, HORIZON = 2, 4
BOUNDS: dict[str, Any] = {"observation_dim": 3, "action_dim": 2, "action_low": [-1.0] * 2, "action_high": [1.0] * 2}


def rows_of(policy: Any) -> TensorDict:
    """``[HORIZON, LANES]`` transitions of one episode a lane, as the policy samples them."""
    g = torch.Generator().manual_seed(0)
    observation = torch.randn(HORIZON + 1, LANES, 3, generator=g)
    sample = policy.sample(observation[:-1].reshape(-1, 3), generator=g)
    ended = torch.zeros(HORIZON, LANES, dtype=torch.bool)
    ended[-1] = True
    lane = torch.arange(LANES).expand(HORIZON, LANES).contiguous()
    items = {
        **{key: value.reshape(HORIZON, LANES, *value.shape[1:]) for key, value in sample.items()},
        "observation": observation[:-1],
        "next_observation": observation[1:],
        "reward": torch.ones(HORIZON, LANES),
        "terminated": ended,
        "truncated": torch.zeros_like(ended),
        "discount": torch.ones(HORIZON, LANES),
        "policy_version": torch.zeros(HORIZON, LANES, dtype=torch.int64),
        "episode": lane,
        "group": lane,
        "source": torch.zeros_like(lane),
    }
    return TensorDict(items, batch_size=[HORIZON, LANES])


def refused(policy: Any, rows: TensorDict, correction: str = "ppo") -> str:
    """The error of an update, after which no weight has moved."""
    agent = PolicyGradient(
        policy,
        load_correction(correction),
        torch.Generator().manual_seed(0),
        rows=LANES,
        length=HORIZON,
        critic_hidden=(8,),
    )
    replay = Replay(64, lanes=LANES, sampler=Fresh(), cut=False)
    replay.extend(rows)
    before = {key: value.clone() for key, value in policy.state_dict().items()}
    with pytest.raises(RecordError) as caught:
        agent.update(replay)
    assert agent.version == 0
    assert all(torch.equal(value, before[key]) for key, value in policy.state_dict().items())
    return str(caught.value)


def changed(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[TensorDict], TensorDict]:
    return lambda rows: rows.set(key, change(rows[key]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows.exclude("behavior_log_prob"), "no behavior_log_prob: store what the sampler reported"),
        (changed("behavior_log_prob", lambda x: x[..., 0]), "behavior_log_prob of a segment must be [B, T, U]"),
        (changed("behavior_log_prob", lambda x: x * float("nan")), "behavior_log_prob is NaN on a masked-in unit"),
        (changed("policy_version", lambda x: x + 3), "policy_version is newer than 0 (row 0, position 0; 8 in all)"),
        (lambda rows: rows.exclude("policy_version"), "the record lacks policy_version"),
        (changed("reward", lambda x: x / 0.0), "reward is not finite"),
    ],
)
def test_a_bad_record_is_refused_before_a_step(change: Callable[[TensorDict], TensorDict], words: str) -> None:
    policy = GaussianPolicy(**BOUNDS, hidden=(8,), seed=3)
    assert words in refused(policy, change(rows_of(policy)))


def test_a_behavior_log_prob_above_zero_is_refused_for_discrete_units_and_fine_for_densities() -> None:
    bins = AutoregressivePolicy(**BOUNDS, hidden=(8,), seed=3)
    rows = changed("behavior_log_prob", lambda x: x.abs() + 0.1)(rows_of(bins))
    assert "behavior_log_prob is above 0, but the policy's units are discrete (row 0" in refused(bins, rows)
    density = GaussianPolicy(**BOUNDS, hidden=(8,), seed=3)
    with torch.no_grad():
        density.get_parameter("log_std").fill_(-3.0)
    rows = rows_of(density)
    assert float(rows["behavior_log_prob"].max()) > 0  # the same numbers are no mistake where they are densities
    agent = PolicyGradient(
        density,
        load_correction("ppo"),
        torch.Generator().manual_seed(0),
        rows=LANES,
        length=HORIZON,
        critic_hidden=(8,),
    )
    replay = Replay(64, lanes=LANES, sampler=Fresh(), cut=False)
    replay.extend(rows)
    agent.update(replay)
    assert agent.version == 1


def record(width: int = 3) -> TensorDict:
    lp = torch.full((2, width), -1.0)
    items = {**dict.fromkeys(ANCHORS.values(), lp), "mask": torch.ones(2, width, dtype=torch.bool)}
    items |= {"step_index": torch.zeros(2, width, dtype=torch.int64), "reward": torch.tensor([[0.0], [1.0]])}
    return TensorDict({**items, "advantage": torch.tensor([-1.0, 1.0]), "group": torch.zeros(2).long()}, [2])


NEEDED = [(n, a) for n in correction_names() for a in ANCHORS if load_correction(n).needs(a)]


@pytest.mark.parametrize(("name", "anchor"), NEEDED, ids=lambda x: x)
def test_whatever_log_prob_a_preset_needs_its_absence_is_named(name: str, anchor: str) -> None:
    """``needs`` is what the agent acts on, so it must say all, and the error must name the anchor and a remedy."""
    batch = record()
    load_correction(name)(torch.full((2, 3), -1.1), batch)
    del batch[ANCHORS[anchor]]
    with pytest.raises(RecordError, match=f"{anchor} policy, but the batch has no {anchor}_log_prob: .*(score|store)"):
        load_correction(name)(torch.full((2, 3), -1.1), batch)


@pytest.mark.parametrize("name", correction_names())
def test_log_probs_that_a_preset_does_not_need_may_be_absent(name: str) -> None:
    correction, batch = load_correction(name), record()
    for anchor, key in ANCHORS.items():
        if not correction.needs(anchor):
            del batch[key]
    assert torch.isfinite(correction(torch.full((2, 3), -1.1), batch).loss)


@pytest.mark.parametrize("key", list(ANCHORS.values()))
def test_log_probs_of_another_shape_are_named(key: str) -> None:
    anchor = next(a for a, k in ANCHORS.items() if k == key)
    name = next(n for n, a in NEEDED if a == anchor)
    batch = record()
    batch[key] = torch.full((2, 4), -1.0)
    with pytest.raises(RecordError, match=rf"{key} has shape \(2, 4\), but the mask is \(2, 3\)"):
        load_correction(name)(torch.full((2, 3), -1.1), batch)


def test_unknown_presets_and_fields_on_the_command_line_name_the_nearest(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(cli.DEBUG, raising=False)
    run = ["train", "env=pendulum", "agent=policy_gradient", "--cfg"]
    for override, words in (
        ("correction=vespoo", "did you mean 'vespo'"),
        ("correction.anchr=proximal", "did you mean 'anchor'"),
    ):
        assert cli.main([*run, "correction=ppo", override] if "." in override else [*run, override]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    with pytest.raises(ConfigError, match="no field 'clip_hihg'; did you mean 'clip_high'"):
        load_correction("ppo", **{"kernel.clip_hihg": 0.1})
