"""Ranges are said once, at the annotation, and hold in a configuration, in a rule and in a constructor."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from annotated_types import Gt, Interval
from run_cases import CONTROL, LANGUAGE, merged

from unified_rl import ranges
from unified_rl.config import compose, group_options, resolve_defaults
from unified_rl.correction import load_correction
from unified_rl.correction.kernels.unit import PPO
from unified_rl.errors import ConfigError
from unified_rl.instantiate import REQUIRED, check_type, locate, parameters
from unified_rl.machine import cores, memory, readable, require_cores, require_disk, require_memory
from unified_rl.objectives.coefficients import Dual
from unified_rl.policies.gaussian import GaussianPolicy
from unified_rl.replay import Priority, Replay, Uniform
from unified_rl.study.grid import Study
from unified_rl.training.run import Job
from unified_rl.training.settings import TrainSettings

INSIDE: list[tuple[Any, list[Any], list[Any]]] = [
    # annotation, values inside, values outside
    (ranges.Positive, [1e-300, 1, 1e30], [0, -1, math.nan, math.inf, -math.inf]),
    (ranges.NonNegative, [0, 0.0, 1e30], [-1e-300, math.nan, math.inf]),
    (ranges.UnitInterval, [0, 1, 0.5], [-0.1, 1.1, math.nan, math.inf]),
    (ranges.Fraction, [1, 0.1], [0, 1.1, math.nan]),
    (ranges.Share, [0, 0.999], [1, -0.1, math.nan]),
    (ranges.OpenUnit, [0.5], [0, 1, math.nan]),
    (ranges.Count, [1, 3.0, 2**63 - 1], [0, -1, 2**63, 1e30]),
    (ranges.Whole, [0, 2**63 - 1], [-1, 2**63]),
    (ranges.Extended, [math.inf, -math.inf, 0], [math.nan]),
    (ranges.Float32, [0, -1, 1e30, -3e38], [1e39, -1e300, math.nan, math.inf]),
    (ranges.Bound, [0, math.inf], [-1, -math.inf, math.nan]),
    (ranges.Radius, [0.1, math.inf], [0, -1, math.nan]),
    (float, [0, -1e30], [math.nan, math.inf, -math.inf]),
    (int, [0, -5], [2**63, -(2**63) - 1]),
    (ranges.Positive | None, [None, 2], [0, math.nan]),
    (tuple[ranges.Count, ...], [[], [1, 2]], [[1, 0], [2**63]]),
    (dict[str, ranges.NonNegative], [{"a": 0}], [{"a": -1}]),
]


@pytest.mark.parametrize(("hint", "inside", "outside"), INSIDE, ids=str)
def test_a_value_is_inside_or_refused_by_its_full_name(hint: Any, inside: list[Any], outside: list[Any]) -> None:
    for value in inside:
        check_type(value, hint, "agent.lr")
    for value in outside:
        with pytest.raises(ConfigError, match=r"^agent\.lr\S*=\S+ must "):
            check_type(value, hint, "agent.lr")


@pytest.mark.parametrize("hint", [ranges.Positive, ranges.Count, float, int, ranges.Positive | None])
@pytest.mark.parametrize("value", [True, "abc", [], {}])
def test_a_bool_or_a_text_is_no_number(hint: Any, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^x is .*; it must be a (whole )?number"):
        check_type(value, hint, "x")


def test_messages_say_where_a_value_must_lie() -> None:
    def message(value: Any, hint: Any) -> str:
        with pytest.raises(ConfigError) as error:
            check_type(value, hint, "agent.lr")
        return str(error.value)

    assert message(-0.001, Annotated[float, Gt(0)]) == "agent.lr=-0.001 must be above 0"
    assert message(2, ranges.UnitInterval) == "agent.lr=2.0 must lie in [0, 1]"
    assert message(math.nan, float) == "agent.lr=nan must be finite"
    assert message([3, 0], tuple[ranges.Count, ...]) == "agent.lr[1]=0 must be at least 1"
    assert message("x" * 5000, ranges.Count).count("x") < 100, "long texts are cut"


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (ranges.UnitInterval, "a number in [0, 1]"),
        (ranges.Count | None, "a whole number of at least 1 or null"),
        (Literal["a", "b"], "one of 'a', 'b'"),
        (list[str | dict[str, Any]], "a list, each item a text or a mapping"),
        (tuple[float, float], "a list of 2: a number, a number"),
        (bool, "true or false"),
        (Annotated[int, Interval(ge=2, le=6)], "a whole number in [2, 6]"),
    ],
)
def test_types_are_words(hint: Any, words: str) -> None:
    assert ranges.words(hint) == words


def test_every_default_lies_in_its_own_range() -> None:
    seen: set[str] = set()

    def walk(node: Any) -> None:
        if isinstance(node, dict) and isinstance(node.get("_target_"), str) and node["_target_"] not in seen:
            seen.add(node["_target_"])
            for name, parameter in parameters(locate(node["_target_"]))[0].items():
                if parameter.default is not REQUIRED and parameter.default is not None:
                    check_type(parameter.default, parameter.hint, f"{node['_target_']}.{name}")
        for value in node.values() if isinstance(node, dict) else ():
            walk(value)

    for group in ("env", "policy", "agent", "replay", "rollout", "warm_start"):
        for name in group_options()[group]:
            needs = {"gymnasium": ["env.id=Pendulum-v1"], "jsonl": ["env.path=x"], "causal_lm_path": ["policy.path=x"],
                     "from_run": ["warm_start.run=x"], "stored": ["rollout.data=x"],
                     "custom": ["env._target_=unified_rl.envs.control.GymnasiumEnv", "env.id=Pendulum-v1"],
                     "mjcf": ["env.path=x", "env.reward=unified_rl.replay.Uniform"]}.get(name, [])  # fmt: skip
            walk(compose([f"{group}={name}", *needs]))
    for name, parameter in parameters(TrainSettings)[0].items():
        if parameter.default is not None:
            check_type(parameter.default, parameter.hint, name)
    assert len(seen) > 25


# ---------------------------------------------------------------------------------------------- in Python, no run

CALLS: list[tuple[Callable[[], Any], str]] = [
    (lambda: PPO(clip_low=-1.0), "clip_low=-1.0 must be above 0"),
    (lambda: load_correction("dapo", **{"kernel.clip_high": -1.0}), "correction.kernel.clip_high=-1.0 must be above 0"),
    (lambda: load_correction("dapo", horizon=0), "correction.horizon=0.0 must be above 0"),
    (lambda: load_correction("geo_reject", **{"reject.0.low": 3.0}), "must not lie above correction.reject.0.high"),
    (lambda: GaussianPolicy(3, 2, [-1, -1], [1, 1], hidden=(-4,)), "policy.hidden[0]=-4 must be at least 1"),
    (lambda: Replay(0, sampler=Uniform()), "replay.capacity=0 must be at least 1"),
    (lambda: Priority(alpha=-1.0), "alpha=-1.0 must be at least 0"),
    (lambda: Priority(-1.0), "alpha=-1.0 must be at least 0"),
    (lambda: Dual(metric="x", limit=0.0), "limit=0.0 must be above 0"),
    (lambda: TrainSettings(steps=-5), "steps=-5 must be at least 0"),
    (lambda: TrainSettings(seed=math.nan), "seed=nan"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "words"), CALLS, ids=[words for _, words in CALLS])
def test_a_constructor_called_from_python_refuses_the_same(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        call()
    assert words in str(error.value)


def test_a_decorated_class_looks_as_it_was_written() -> None:
    assert list(inspect.signature(Priority).parameters) == ["alpha", "beta", "beta_draws", "eps"]
    with pytest.raises(TypeError, match="unexpected keyword"):
        Priority(gamma=1.0)  # type: ignore[call-arg]


def test_a_study_checks_every_variant_before_the_first_run(tmp_path: Path) -> None:
    from unified_rl.study.compare import compare

    node = {
        "name": "s", "folder": str(tmp_path / "s"), "workers": 0, "seeds": [1], "domains": {"a": list(CONTROL[:2])},
        "corrections": ["ppo", {"bad": ["correction=ppo", "correction.kernel.clip_high=-1"]}],
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"a-bad-.*correction\.kernel\.clip_high=-1\.0 must be above 0"):
        compare({"study": node}, progress=False, train=lambda *a, **k: pytest.fail("a run began"))
    with pytest.raises(ConfigError, match=r"study\.seeds\[0\]=-1 must be at least 0"):
        Study.from_config({"study": {**node, "seeds": [-1]}})


# ---------------------------------------------------------------------------------------------- against other settings


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (merged(CONTROL, ["policy=flow", "policy.std_min=0.5", "policy.std_max=0.1"]), ["std_min=0.5", "std_max=0.1"]),
        (merged(CONTROL, ["policy=flow", "policy.trained_steps=9"]), ["trained_steps=9", "steps=5"]),
        (merged(CONTROL, ["policy.log_std_low=3"]), ["log_std_low=3", "log_std_high=2"]),
        (merged(LANGUAGE, ["policy.config.num_attention_heads=3"]), ["num_attention_heads=3", "hidden_size=16"]),
        (merged(CONTROL, ["agent=actor_critic", "agent.aggregate=least_of"]), ["members=2", "agent.critics=2"]),
        (merged(CONTROL, ["replay=group", "replay.sampler.size=2"]), ["replay.sampler.size", "share no group"]),
        (merged(CONTROL, ["replay=mixture"]), ["'demonstration'", "replay=uniform"]),
        (merged(CONTROL, ["correction=nft"]), ["alone in its own", "rollout.group_size"]),
        (
            merged(LANGUAGE, ["recipe=dpo", "rollout.group_size=1"]),
            ["agent.objectives.prefer compares rows of one group", "rollout.group_size", "within=batch"],
        ),
        (
            merged(
                LANGUAGE,
                [
                    "correction=reinforce",
                    "rollout.group_size=1",
                    "agent.objectives={policy: null, near: {name: sampled_divergence, tilt: 1.0}}",
                ],
            ),
            ["agent.objectives.near.tilt weighs a row", "rollout.group_size"],
        ),
        (
            merged(LANGUAGE, ["recipe=tree_rl", "rollout.context=null", "agent.maps=null"]),
            ["rollout.columns.begun names 'begun'", "rollout.context", "null takes out all"],
        ),
        (merged(LANGUAGE, ["correction=luffy"]), ["learns from demonstrations", "correction=dapo"]),
        (["env=chain_mod", "agent=ppo", "rollout=control"], ["rollout=control", "env=chain_mod", "rollout=language"]),
        (["env=two_route", "agent=sb3_sac", "replay=fresh"], ["replay=fresh", "agent=sb3_sac"]),
        (["env=two_route", "agent=sac", "replay=fresh"], ["replay=fresh", "agent=sac"]),
        (merged(LANGUAGE, ["agent.gates={failed: success_at_most}"]), ["agent.gates.failed", "take it out"]),
        (
            merged(LANGUAGE, ["agent.gates={failed: success_at_most}", "agent.objectives.policy.rows.unless=faild"]),
            ["agent.objectives.policy.rows", "'faild'", "did you mean 'failed'"],
        ),
        (merged(LANGUAGE, ["correction.advantage={reward: scoers}"]), ["correction.advantage.reward", "'scoers'"]),
    ],
)
def test_settings_that_exclude_each_other_are_named_before_the_first_step(
    overrides: list[str], keys: list[str], tmp_path: Path
) -> None:
    allow = ("run_cases",)
    with pytest.raises(ConfigError) as error:
        Job(resolve_defaults(compose(["progress=false", *overrides], allow=allow), allow=allow), allow).make_trainer(
            tmp_path
        )
    assert all(key in str(error.value) for key in keys), error.value
    assert "\n" not in str(error.value)


def test_what_comes_after_a_warm_start_refuses_before_it(tmp_path: Path) -> None:
    stage = ["warm_start=demonstrations", "warm_start.dataset=8", "warm_start.stages=[{updates: 1}]"]
    job = Job(compose(["progress=false", *CONTROL, *stage, "replay=segment", "replay.sampler.length=5"]))
    before = {name: w.clone() for name, w in job.policy.state_dict().items()}
    with pytest.raises(ConfigError, match=r"replay=segment .*agent=policy_gradient"):
        job.warm_start(lambda *unused: pytest.fail("an update was made"))
    assert all(torch.equal(w, before[name]) for name, w in job.policy.state_dict().items())


def test_a_rehearsal_changes_nothing_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = ["warm_start=demonstrations", "warm_start.dataset=8", "warm_start.batch_size=4"]
    words = ["progress=false", *CONTROL, *stage, "warm_start.stages=[{updates: 1}]", "steps=64", "eval_episodes=1"]

    def weights() -> dict[str, Any]:
        job = Job(compose(words))
        job.warm_start(lambda *unused: None)
        trainer = job.make_trainer(tmp_path)
        trainer.update()
        return {name: w.clone() for name, w in trainer.agent.policy.state_dict().items()}

    rehearsed = weights()
    monkeypatch.setattr(Job, "_rehearse", lambda self: None)
    assert all(torch.equal(w, rehearsed[name]) for name, w in weights().items())


# ---------------------------------------------------------------------------------------------- against the machine


def test_estimates_are_compared_with_what_there_is(tmp_path: Path) -> None:
    require_memory(1000, "x")
    require_disk(1000, tmp_path / "not" / "there", "x")
    require_cores(cores(), "threads")
    with pytest.raises(ConfigError, match=r"^replay would take 4e\+03 EB at least, and this machine has \S+ [GT]B$"):
        require_memory(4e21, "replay")
    with pytest.raises(ConfigError, match="disk"):
        require_disk(1e21, tmp_path / "there", "x")
    with pytest.raises(ConfigError, match=r"threads=100000 is far above .*cores"):
        require_cores(100_000, "threads")
    assert memory() > 1e8
    assert [readable(x) for x in (12, 3_400, 25.3e9)] == ["12 bytes", "3.4 kB", "25.3 GB"]
