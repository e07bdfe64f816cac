"""What every control policy promises, whatever its class."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs import GymEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from unified_rl.errors import ConfigError, RecordError
from unified_rl.policies.autoregressive import AutoregressivePolicy
from unified_rl.policies.base import Policy
from unified_rl.policies.diffusion import DiffusionPolicy
from unified_rl.policies.flow import FlowPolicy
from unified_rl.policies.gaussian import GaussianPolicy
from unified_rl.units import record_from_steps, validate_record

LOW, HIGH = [-1.0, -2.0, 0.5], [1.0, 4.0, 0.75]
SMALL = {"hidden": (32, 32)}
WIDE = {"squash": True, "state_dependent_std": True}

MAKERS: dict[str, Callable[..., Policy]] = {
    "gaussian": lambda **kw: GaussianPolicy(4, 3, LOW, HIGH, **SMALL, **kw),
    "gaussian-per-dimension": lambda **kw: GaussianPolicy(4, 3, LOW, HIGH, per_dimension=True, **SMALL, **kw),
    "tanh-gaussian": lambda **kw: GaussianPolicy(4, 3, LOW, HIGH, **WIDE, **SMALL, **kw),
    "flow": lambda **kw: FlowPolicy(4, 3, LOW, HIGH, **SMALL, **kw),
    "flow-last-two": lambda **kw: FlowPolicy(4, 3, LOW, HIGH, trained_steps=2, **SMALL, **kw),
    "flow-mean": lambda **kw: FlowPolicy(4, 3, LOW, HIGH, mean_over_dims=True, **SMALL, **kw),
    "diffusion": lambda **kw: DiffusionPolicy(4, 3, LOW, HIGH, steps=8, **SMALL, **kw),
    "diffusion-last-three": lambda **kw: DiffusionPolicy(4, 3, LOW, HIGH, steps=8, trained_steps=3, **SMALL, **kw),
    "tokens": lambda **kw: AutoregressivePolicy(4, 3, LOW, HIGH, **SMALL, **kw),
    "tokens-cold-nucleus": lambda **kw: AutoregressivePolicy(
        4, 3, LOW, HIGH, temperature=0.6, top_p=0.8, **SMALL, **kw
    ),
    "discrete": lambda **kw: AutoregressivePolicy(4, 1, [], [], num_actions=5, **SMALL, **kw),
}
UNITS = {
    "gaussian": 1,
    "gaussian-per-dimension": 3,
    "tanh-gaussian": 1,
    "flow": 5,
    "flow-last-two": 2,
    "flow-mean": 5,
    "diffusion": 8,
    "diffusion-last-three": 3,
    "tokens": 3,
    "tokens-cold-nucleus": 3,
    "discrete": 1,
}


@pytest.fixture(params=list(MAKERS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def stirred(name: str, **kwargs: object) -> Policy:
    """A policy whose weights are not the tame initial ones (zero biases hide mistakes)."""
    policy = MAKERS[name](**kwargs)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def observations(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 4, generator=torch.Generator().manual_seed(2))


def test_a_fresh_sample_scores_as_stored(name: str) -> None:
    policy = stirred(name)
    observation = observations(256)
    sample = policy.sample(observation, torch.Generator().manual_seed(3)).set("observation", observation)
    scored = policy.log_prob(sample)
    assert sample["behavior_log_prob"].shape == (256, UNITS[name])
    torch.testing.assert_close(scored.log_prob, sample["behavior_log_prob"], atol=1e-5, rtol=1e-5)
    assert scored.mask.all()
    again = copy.deepcopy(policy).log_prob(sample)
    assert torch.equal(again.log_prob, scored.log_prob)


def test_segments_score_as_their_steps_in_time_order(name: str) -> None:
    policy = stirred(name)
    observation = observations(6, 4)
    segment = policy.sample(observation, torch.Generator().manual_seed(3)).set("observation", observation)
    segment["reward"] = torch.zeros(6, 4)
    segment["policy_version"] = torch.zeros(6, 4, dtype=torch.int64)
    record = record_from_steps(segment)
    validate_record(record)
    scored = policy.log_prob(record)
    assert scored.log_prob.shape == (6, 4 * UNITS[name])
    torch.testing.assert_close(scored.log_prob, record["behavior_log_prob"], atol=1e-5, rtol=1e-5)
    single = policy.log_prob(segment[2, 1:2])  # row 2, step 1, alone
    width = UNITS[name]
    torch.testing.assert_close(scored.log_prob[2, width : 2 * width], single.log_prob[0], atol=1e-5, rtol=1e-5)


def test_steps_outside_the_mask_change_nothing_else(name: str) -> None:
    policy = stirred(name)
    observation = observations(5, 3)
    segment = policy.sample(observation, torch.Generator().manual_seed(3)).set("observation", observation)
    mask = torch.ones(5, 3, UNITS[name], dtype=torch.bool)
    mask[:, 1] = False
    segment["unit_mask"] = mask
    before = policy.log_prob(segment)
    segment["observation"][:, 1] += 3.0
    after = policy.log_prob(segment)
    assert torch.equal(before.mask, mask.reshape(5, -1))
    torch.testing.assert_close(before.log_prob[before.mask], after.log_prob[before.mask], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before.log_prob[~before.mask], after.log_prob[~before.mask])


def test_actions_keep_their_bounds_and_dtypes(name: str) -> None:
    policy = stirred(name)
    action = policy.sample(observations(500), torch.Generator().manual_seed(3))["action"]
    if name == "discrete":
        assert action.dtype == torch.int64 and action.shape == (500, 1)
        assert set(action.unique().tolist()) == set(range(5))
        return
    assert action.dtype == torch.float32 and action.shape == (500, 3)
    assert (action >= torch.tensor(LOW)).all() and (action <= torch.tensor(HIGH)).all()
    assert (action.std(0) > 0.05 * (torch.tensor(HIGH) - torch.tensor(LOW))).all()


def test_samples_depend_on_the_generator_alone(name: str) -> None:
    policy = stirred(name)
    observation = observations(16)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = policy.sample(observation, torch.Generator().manual_seed(5))
    second = policy.sample(observation, torch.Generator().manual_seed(5))
    other = policy.sample(observation, torch.Generator().manual_seed(6))
    assert (first == second).all()
    assert not torch.equal(first["behavior_log_prob"], other["behavior_log_prob"])
    batch = TensorDict({"observation": observation, "action": first["action"]}, [16])
    losses = [policy.nll(batch, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*losses)
    assert torch.equal(torch.get_rng_state(), state)


def test_initial_weights_depend_on_the_seed_alone(name: str) -> None:
    state = torch.get_rng_state()
    first, second, other = MAKERS[name](seed=1), MAKERS[name](seed=1), MAKERS[name](seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])
    assert any(not torch.equal(value, other.state_dict()[key]) for key, value in first.state_dict().items())


def test_gradients_reach_every_trained_parameter(name: str) -> None:
    policy = stirred(name)
    observation = observations(64)
    sample = policy.sample(observation, torch.Generator().manual_seed(3)).set("observation", observation)
    loss = policy.log_prob(sample).log_prob.square().sum() + policy.nll(sample, torch.Generator().manual_seed(4)).sum()
    loss.backward()
    for key, parameter in policy.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
            assert parameter.grad.abs().sum() > 0, key


def test_supervised_loss_has_a_row_per_row_and_entries_in_time_order(name: str) -> None:
    policy = stirred(name)
    observation = observations(6, 4)
    segment = policy.sample(observation, torch.Generator().manual_seed(3)).set("observation", observation)
    loss = policy.nll(segment.select("observation", "action"), torch.Generator().manual_seed(4))
    assert loss.shape[0] == 6 and loss.shape[1] % 4 == 0
    assert torch.isfinite(loss).all()
    if not isinstance(policy, FlowPolicy | DiffusionPolicy):  # those draw noise per batch
        torch.testing.assert_close(loss[3:5], policy.nll(segment[3:5]))


def test_deterministic_use_repeats_and_has_no_density(name: str) -> None:
    policy = stirred(name)
    observation = observations(8)
    first = policy.sample(observation, torch.Generator().manual_seed(1), deterministic=True)
    second = policy.sample(observation, torch.Generator().manual_seed(1), deterministic=True)
    assert torch.equal(first["action"], second["action"])
    assert first["behavior_log_prob"].isnan().all()
    assert set(first.keys()) == set(policy.out_keys)


def test_missing_stored_keys_are_named(name: str) -> None:
    policy = MAKERS[name]()
    observation = observations(3)
    with pytest.raises(RecordError, match=policy.rescoring_keys[0]):
        policy.log_prob(TensorDict({"observation": observation}, [3]))


def test_weights_travel_by_state_dict(name: str) -> None:
    policy, fresh = stirred(name, normalize_observation=True), MAKERS[name](normalize_observation=True, seed=9)
    policy.update_normalizer(5 + 3 * observations(100))
    fresh.load_state_dict(policy.state_dict())
    observation = observations(7)
    first = policy.sample(observation, torch.Generator().manual_seed(1))
    second = fresh.sample(observation, torch.Generator().manual_seed(1))
    assert (first == second).all()


def test_observations_are_normalised_in_sampling_and_scoring(name: str) -> None:
    plain, normal = stirred(name), stirred(name, normalize_observation=True)
    normal.load_state_dict(plain.state_dict(), strict=False)
    observation = 5 + 3 * observations(400)
    normal.update_normalizer(observation[:150])
    normal.update_normalizer(observation[150:])
    by_hand = (observation - observation.mean(0)) / observation.std(0, correction=0)
    expected = plain.sample(by_hand, torch.Generator().manual_seed(1))
    got = normal.sample(observation, torch.Generator().manual_seed(1)).set("observation", observation)
    torch.testing.assert_close(got["behavior_log_prob"], expected["behavior_log_prob"], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(normal.log_prob(got).log_prob, got["behavior_log_prob"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [GaussianPolicy, FlowPolicy, DiffusionPolicy, AutoregressivePolicy])
def test_a_torchrl_collector_runs_the_policy(kind: type[Policy]) -> None:
    env = GymEnv("Pendulum-v1")
    policy = kind(3, 1, [-2.0], [2.0], **SMALL)  # type: ignore[arg-type]
    collector = Collector(env, policy, frames_per_batch=24, total_frames=48)
    for data in collector:
        assert data["action"].shape == (24, 1) and data["behavior_log_prob"].shape == (24, policy.num_units)
        torch.testing.assert_close(policy.log_prob(data).log_prob, data["behavior_log_prob"], atol=1e-5, rtol=1e-5)
    collector.shutdown()


def test_forward_heeds_the_exploration_type() -> None:
    policy = stirred("gaussian")
    batch = TensorDict({"observation": observations(4)}, [4])
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        fixed = [policy(batch.clone())["action"] for _ in range(2)]
    with set_exploration_type(ExplorationType.RANDOM):
        drawn = [policy(batch.clone())["action"] for _ in range(2)]
    assert torch.equal(*fixed)
    assert not torch.equal(*drawn)


def test_the_owned_generator_is_settable() -> None:
    policy = stirred("flow")
    batch = TensorDict({"observation": observations(4)}, [4])
    policy.generator = torch.Generator().manual_seed(7)
    expected = policy.sample(batch["observation"], torch.Generator().manual_seed(7))
    assert torch.equal(policy(batch)["chain"], expected["chain"])


@pytest.mark.parametrize("kind", [GaussianPolicy, FlowPolicy, DiffusionPolicy])
def test_continuous_policies_refuse_discrete_actions(kind: type[Policy]) -> None:
    with pytest.raises(ConfigError, match="autoregressive"):
        kind(4, 1, [], [], num_actions=3)


@pytest.mark.parametrize("low,high", [([0.0], [1.0, 1.0]), ([0.0, 1.0], [1.0, 1.0])])
def test_bounds_that_do_not_fit_are_refused(low: list[float], high: list[float]) -> None:
    with pytest.raises(ConfigError, match="action_low"):
        GaussianPolicy(4, 2, low, high)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_policies_score_as_stored_on_a_gpu(name: str) -> None:
    policy = stirred(name).to("cuda")
    observation = observations(64).to("cuda")
    for device in ("cpu", "cuda"):
        sample = policy.sample(observation, torch.Generator(device).manual_seed(3)).set("observation", observation)
        scored = policy.log_prob(sample)
        torch.testing.assert_close(scored.log_prob, sample["behavior_log_prob"], atol=1e-4, rtol=1e-4)
        assert torch.isfinite(policy.nll(sample, torch.Generator(device).manual_seed(3))).all()


@pytest.mark.parametrize("name", MAKERS)
def test_numbers_of_another_precision_are_cast(name: str) -> None:
    """NumPy hands out float64, and a data set may hold integers."""
    policy = MAKERS[name](seed=1)
    single = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    for other in (single.double(), single.round().int()):
        found = policy.sample(other, torch.Generator().manual_seed(2))
        want = policy.sample(other.float(), torch.Generator().manual_seed(2))
        assert all(torch.equal(found[key], want[key]) for key in want.keys())
        rows, wide = want.clone(), want.clone()
        rows["observation"], wide["observation"] = other.float(), other
        if want["action"].is_floating_point():
            wide["action"] = want["action"].double()
        assert torch.equal(policy.log_prob(wide).log_prob, policy.log_prob(rows).log_prob)
        losses = [policy.nll(batch, torch.Generator().manual_seed(3)) for batch in (wide, rows)]
        assert torch.equal(*losses)


def test_a_locked_joint_is_named() -> None:
    with pytest.raises(ConfigError, match=r"action entry 1 of 3 lies between 2 and 2.*action_low must lie below"):
        GaussianPolicy(4, 3, [-1.0, 2.0, 0.0], [1.0, 2.0, 1.0])
