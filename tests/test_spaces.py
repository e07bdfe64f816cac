"""The description of observations and actions: every kind of space, in and out, and what policies make of it."""

from __future__ import annotations

import math
import sys
import types
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from tensordict import TensorDict

from unified_rl.errors import ConfigError
from unified_rl.policies.autoregressive import AutoregressivePolicy
from unified_rl.policies.base import Policy
from unified_rl.policies.critics import QEnsemble, ValueCritic
from unified_rl.policies.diffusion import DiffusionPolicy
from unified_rl.policies.flow import FlowPolicy
from unified_rl.policies.gaussian import GaussianPolicy
from unified_rl.spaces import (
    Box,
    DictSpace,
    Discrete,
    Image,
    MultiBinary,
    MultiDiscrete,
    Part,
    PolicyInputs,
    Space,
    TupleSpace,
    part_from_gymnasium,
)

INF = math.inf
PIXELS = spaces.Box(0, 255, (8, 6, 3), np.uint8)
GOAL = {name: spaces.Box(-1, 1, (2,), np.float64) for name in ("observation", "achieved_goal", "desired_goal")}
KINDS: dict[str, tuple[gymnasium.Space, Part, str]] = {  # type: ignore[type-arg]
    "vector": (spaces.Box(-1, 1, (3,)), Box((3,), low=-1.0, high=1.0), "a vector of 3 float32 in [-1, 1]"),
    "float64": (
        spaces.Box(np.array([-0.1, -0.7]), np.array([0.1, 0.7]), dtype=np.float64),
        Box((2,), "float64", (-0.1, -0.7), (0.1, 0.7)),
        "a vector of 2 float64 with bounds an entry",
    ),
    "half-bounded": (
        spaces.Box(0, np.inf, (2,), np.float64),
        Box((2,), "float64", 0.0, INF),
        "a vector of 2 float64 in [0, inf)",
    ),
    "unbounded": (spaces.Box(-np.inf, np.inf, (4,)), Box((4,)), "a vector of 4 float32"),
    "matrix": (spaces.Box(-2, 2, (2, 3)), Box((2, 3), low=-2.0, high=2.0), "an array of 2 x 3 float32 in [-2, 2]"),
    "scalar": (spaces.Box(-2, 2, ()), Box((), low=-2.0, high=2.0), "an array of one float32 in [-2, 2]"),
    "integers": (
        spaces.Box(np.array([0, -5]), np.array([9, 5]), dtype=np.int16),
        Box((2,), "int16", (0, -5), (9, 5)),
        "a vector of 2 int16 with bounds an entry",
    ),
    "image": (PIXELS, Image((8, 6, 3)), "an image of 8 x 6 x 3 uint8, channels last"),
    "channels first": (
        spaces.Box(0, 255, (4, 8, 6), np.uint8),
        Image((4, 8, 6), channels_first=True),
        "an image of 4 x 8 x 6 uint8, channels first",
    ),
    "discrete": (spaces.Discrete(4), Discrete(4), "one of 4 choices (0 to 3)"),
    "discrete from 5": (spaces.Discrete(3, start=5), Discrete(3, 5), "one of 3 choices (5 to 7)"),
    "multi-discrete": (
        spaces.MultiDiscrete([3, 4], start=[0, 2]),
        MultiDiscrete((3, 4), (0, 2)),
        "2 choices among 3 and 4",
    ),
    "grid of choices": (
        spaces.MultiDiscrete([[2, 3], [4, 5]]),
        MultiDiscrete((2, 3, 4, 5), shape=(2, 2)),
        "4 choices among 2, 3, 4 and 5",
    ),
    "multi-binary": (spaces.MultiBinary(3), MultiBinary((3,)), "3 binary choices"),
    "binary grid": (spaces.MultiBinary([2, 3]), MultiBinary((2, 3)), "6 binary choices"),
    "goal": (
        spaces.Dict(GOAL),
        DictSpace(
            tuple((k, Box((2,), "float64", -1.0, 1.0)) for k in ("achieved_goal", "desired_goal", "observation"))
        ),
        "a goal dictionary of achieved_goal (a vector of 2 float64 in [-1, 1]), desired_goal (a vector of 2 float64 in "
        "[-1, 1]) and observation (a vector of 2 float64 in [-1, 1])",
    ),
    "nested": (
        spaces.Dict(a=spaces.Tuple((spaces.Discrete(2), PIXELS)), b=spaces.MultiBinary(1)),
        DictSpace((("a", TupleSpace((Discrete(2), Image((8, 6, 3))))), ("b", MultiBinary((1,))))),
        "a dictionary of a (a tuple of (one of 2 choices (0 to 1)) and (an image of 8 x 6 x 3 uint8, channels last)) "
        "and b (1 binary choices)",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_space_comes_from_gymnasium_and_goes_back_without_loss(kind: str) -> None:
    theirs, ours, words = KINDS[kind]
    part = part_from_gymnasium(theirs)
    assert part == ours and hash(part) == hash(ours)
    assert part.to_gymnasium() == theirs
    assert part.width == spaces.flatdim(theirs)
    assert part.describe() == words
    if theirs.shape is not None and theirs.dtype is not None:
        assert (part.shape, np.dtype(part.dtype)) == (theirs.shape, theirs.dtype)


def test_a_space_keeps_float64_bounds_exactly_and_equal_spaces_are_equal() -> None:
    box = part_from_gymnasium(KINDS["float64"][0])
    assert isinstance(box, Box) and box.low_array.dtype == np.float64 and box.low_array.tolist() == [-0.1, -0.7]
    assert Box((3,), low=(1.0, 1.0, 1.0)) == Box((3,), low=1.0) != Box((3,), low=(1.0, 1.0, 0.0))
    assert Space.from_gymnasium(*Space(Box((2,)), Discrete(3, 1)).to_gymnasium()) == Space(Box((2,)), Discrete(3, 1))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Box((2,), low=(0.0,)), "low of a box needs 2 entries, got 1"),
        (lambda: Box((2,), low=1.0, high=0.0), "low <= high"),
        (lambda: Discrete(0), "at least one choice"),
        (lambda: MultiDiscrete((2, 0)), "at least one choice"),
        (lambda: MultiDiscrete((2, 3), (1,)), "as many entries"),
        (lambda: Space.flat(3), "num_actions"),
        (lambda: Space.flat(3, 2, [0.0], [1.0, 1.0]), "action_low and action_high need 2 entries"),
        (lambda: Space.of({"tokenizer": None}), "no space and no observation_dim"),
        (lambda: part_from_gymnasium(spaces.Graph(spaces.Discrete(2), None)), "a Graph space has no fixed width"),
        (lambda: part_from_gymnasium(spaces.Sequence(spaces.Discrete(2))), "a Sequence space has no fixed width"),
    ],
)
def test_spaces_that_cannot_be_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_sizes_and_a_space_are_two_forms_of_the_same() -> None:
    sizes = {"observation_dim": 4, "action_dim": 2, "action_low": [-1.0, 0.0], "action_high": [1.0, 3.0]}
    space = Space(Box((4,)), Box((2,), low=(-1.0, 0.0), high=(1.0, 3.0)))
    assert Space.flat(**sizes) == Space.of(sizes) == Space.of(PolicyInputs(space)) == space  # type: ignore[arg-type]
    assert space.sizes() == sizes
    inputs = PolicyInputs(space)
    assert {**inputs} == {"space": space} and inputs["action_high"] == [1.0, 3.0]
    assert inputs.get("num_actions") is None and inputs.get("action_dim") == 2
    with pytest.raises(KeyError):
        inputs["num_actions"]


CONTINUOUS = (GaussianPolicy, FlowPolicy, DiffusionPolicy, AutoregressivePolicy)


@pytest.mark.parametrize("kind", CONTINUOUS)
def test_policies_take_a_space_or_its_sizes_and_are_then_the_same(kind: type[Policy]) -> None:
    space = Space(Box((4,)), Box((2,), low=(-1.0, 0.5), high=(1.0, 0.75)))
    sizes = space.sizes()
    made = [
        kind(space, hidden=(8,)),  # type: ignore[call-arg]
        kind(space=space, hidden=(8,)),  # type: ignore[call-arg]
        kind(4, 2, [-1.0, 0.5], [1.0, 0.75], hidden=(8,)),  # type: ignore[call-arg]
        kind(**sizes, hidden=(8,)),
    ]
    observation = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    samples = [policy.sample(observation, torch.Generator().manual_seed(1)) for policy in made]
    assert all(policy.space == space and policy.domain == "control" for policy in made)
    assert all(bool((sample == samples[0]).all()) for sample in samples[1:])


@pytest.mark.parametrize(
    ("arguments", "keywords", "words"),
    [
        ((), {}, "GaussianPolicy needs a space: env.space, or observation_dim"),
        ((Space.flat(3, 1, [0], [1]),), {"action_dim": 1}, "was given a space, and action_dim as well"),
        ((3, 1, [0.0], [1.0]), {"observation_dim": 3}, "first, once"),
        ((True,), {"num_actions": 2}, "takes a Space or observation_dim first"),
        ((3,), {"action_dim": 1}, "needs action_dim, action_low and action_high, or num_actions"),
    ],
)
def test_both_forms_at_once_or_neither_are_refused(arguments: Any, keywords: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        GaussianPolicy(*arguments, **keywords)


ACT = spaces.Box(-1, 1, (2,))


@pytest.mark.parametrize(
    ("observation", "action", "words"),
    [
        (ACT, spaces.Discrete(4), "discrete ones, one of 4 choices.*policy=autoregressive"),
        (ACT, spaces.MultiDiscrete([2, 3]), "discrete ones, 2 choices among 2 and 3; use policy=autoregressive"),
        (ACT, spaces.MultiBinary(2), "2 binary choices; use policy=autoregressive"),
        (ACT, spaces.Box(0, 10**9, (1,), np.int64), "cannot act in a vector of 1 int64"),
        (ACT, spaces.Dict(a=ACT), r"cannot act in a dictionary of a .*\(policy=autoregressive\)"),
    ],
)
def test_what_a_policy_cannot_take_is_named_with_what_works(observation: Any, action: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        GaussianPolicy(Space.from_gymnasium(observation, action))


@pytest.mark.parametrize(
    ("action", "counts"),
    [
        (MultiDiscrete((3, 5, 2), (1, 0, 4)), (3, 5, 2)),
        (MultiBinary((2, 2)), (2, 2, 2, 2)),
        (Box((2,), "int16", (-1, 0), (1, 4)), (3, 5)),
    ],
)
def test_several_choices_are_sampled_scored_and_imitated_inside_their_counts(
    action: Part, counts: tuple[int, ...]
) -> None:
    policy = AutoregressivePolicy(Space(Box((3,)), action), hidden=(16,), seed=1)
    observation = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
    sample = policy.sample(observation, torch.Generator().manual_seed(1)).set("observation", observation)
    chosen = sample["action"]
    assert chosen.dtype == torch.int64 and chosen.shape == (4000, len(counts))
    assert tuple((chosen.amax(0) + 1).tolist()) == counts and int(chosen.amin()) == 0
    torch.testing.assert_close(policy.log_prob(sample).log_prob, sample["behavior_log_prob"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(policy.nll(sample), -sample["behavior_log_prob"], atol=1e-5, rtol=1e-5)
    entropy = policy.entropy(sample)
    assert bool((entropy <= torch.tensor(counts).float().log() + 1e-5).all()) and bool((entropy > 0).all())


def test_probabilities_of_a_multi_discrete_policy_sum_to_one_over_its_actions() -> None:
    policy = AutoregressivePolicy(Space(Box((2,)), MultiDiscrete((2, 4, 3))), hidden=(8,), seed=2)
    actions = torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(3))
    batch = TensorDict({"observation": torch.ones(24, 2), "action": actions}, [24])
    assert float(policy.log_prob(batch).log_prob.detach().sum(-1).exp().sum()) == pytest.approx(1.0, abs=1e-5)


def test_critics_take_the_same_space_as_the_policy() -> None:
    space = Space(Box((3,)), Box((2,), low=(0.0, -4.0), high=(1.0, 4.0)))
    observation, action = torch.randn(6, 3), torch.rand(6, 2)
    by_space = QEnsemble(space, num=3, hidden=(8,))
    by_sizes = QEnsemble(3, 2, 3, (8,), action_low=[0.0, -4.0], action_high=[1.0, 4.0])
    assert torch.equal(by_space(observation, action), by_sizes(observation, action))
    assert torch.equal(ValueCritic(space, (8,))(observation), ValueCritic(3, (8,))(observation))
    with pytest.raises(ConfigError, match="one of 4 choices"):
        QEnsemble(Space(Box((3,)), Discrete(4)))
    with pytest.raises(ConfigError, match="action_dim"):
        QEnsemble(3)


FINGERPRINTS = {
    "gaussian": (79.0846, -272.5551),
    "gaussian-per-dimension": (79.0846, -272.5551),
    "tanh-gaussian": (83.5252, -272.5609),
    "flow": (2.3403, 771.6138),
    "flow-last-two": (2.3403, 316.5678),
    "flow-mean": (2.3403, 257.2046),
    "diffusion": (16.7611, -658.2148),
    "diffusion-last-three": (16.7611, 299.4093),
    "tokens": (93.9524, -583.7424),
    "tokens-cold-nucleus": (105.7024, -524.8703),
    "discrete": (132.0, -101.7944),
}
"""Sums of ``action`` and ``behavior_log_prob`` of 64 samples, computed before policies had spaces."""


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_weights_and_samples_of_a_seed_are_those_from_before_there_were_spaces(name: str) -> None:
    from test_policies_contract import MAKERS

    observation = torch.randn(64, 4, generator=torch.Generator().manual_seed(2)) * 2
    sample = MAKERS[name]().sample(observation, torch.Generator().manual_seed(3))
    found = [float(sample[key].double().sum()) for key in ("action", "behavior_log_prob")]
    assert found == pytest.approx(FINGERPRINTS[name], rel=1e-4, abs=1e-3)


def test_a_policy_of_older_code_is_given_sizes_where_its_constructor_takes_no_space(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from unified_rl.config import compose
    from unified_rl.training.run import Job

    class Old(GaussianPolicy):
        def __init__(
            self,
            observation_dim: int,
            action_dim: int,
            action_low: list[float],
            action_high: list[float],
            seed: int = 0,
        ) -> None:
            super().__init__(observation_dim, action_dim, action_low, action_high, seed=seed)

    module = types.ModuleType("older_code")
    module.Old, Old.__module__ = Old, "older_code"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "older_code", module)
    cfg = compose(["env=inverted_pendulum", "agent=ppo"])
    cfg["policy"] = {"_target_": "older_code.Old"}
    job = Job(cfg, allow=["older_code"])
    assert type(job.policy) is Old and job.policy.space == job.env.space
