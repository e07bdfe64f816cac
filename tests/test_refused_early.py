"""Bad input is refused when a run is composed, or when its parts are made: before a step, before a warm start."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_cases import CONTROL, LANGUAGE, merged

from unified_rl.config import compose
from unified_rl.errors import ConfigError, UnifiedRLError
from unified_rl.training.run import Job

TERM = "agent.objectives.imitate"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ([f"{TERM}.name=nl"], [TERM, "'nl' is unknown", "did you mean 'nll'"]),
        ([f"{TERM}={{name: nll, wieght: probability}}"], [TERM, "'wieght'", "did you mean 'weight'"]),
        ([f"{TERM}={{name: nll, rows: demonstratio}}"], [f"{TERM}.rows.source", "did you mean 'demonstration'"]),
        ([f"{TERM}={{name: nll, rows: {{sorce: own}}}}"], [f"{TERM}.rows", "did you mean 'source'"]),
        ([f"{TERM}={{name: nll, coefficient: {{name: linaer, start: 1}}}}"], [f"{TERM}.coefficient", "'linear'"]),
        ([f"{TERM}={{name: divergence, kind: {{name: jds}}}}"], [f"{TERM}.kind", "did you mean 'jsd'"]),
        ([f"{TERM}={{name: divergence, anchor: refrence}}"], [TERM, "'refrence'", "did you mean 'reference'"]),
        (["agent.anchors={slow: {emma: 0.9}}"], ["agent.anchors.slow", "'emma'", "did you mean 'ema'"]),
        (["agent.anchors={slow: {ema: 2.0}}"], ["agent.anchors.slow.ema", "[0, 1)"]),
        (["agent.gates={failed: success_at_mots}"], ["agent.gates.failed", "did you mean 'success_at_most'"]),
        (["agent.maps=[{name: sign, positiv: 1.0}]"], ["agent.maps[0]", "did you mean 'positive'"]),
        (["correction.advantage={baselin: mean}"], ["correction.advantage", "did you mean 'baseline'"]),
        (["correction.advantage={rows: demonstratio}"], ["correction.advantage.rows.source", "'demonstration'"]),
        (["agent=actor_critic", "agent.target=sotf"], ["agent.target", "did you mean 'soft'"]),
        (["agent=actor_critic", "agent.actor={policy: pathwis}"], ["agent.actor.policy", "did you mean 'pathwise'"]),
        (["agent=actor_critic", "agent.value=expectile"], ["agent.value", "nothing reads it"]),
    ],
)
def test_composing_refuses_by_the_full_name_and_the_nearest(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        compose(overrides)
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


@pytest.mark.parametrize("recipe", ["gkd", "chord", "kdrl", "luffy"])
def test_what_a_user_completes_later_may_be_composed(recipe: str) -> None:
    assert compose([f"recipe={recipe}"])["choices"]["recipe"] == recipe


def refusal(tmp_path: Path, overrides: list[str]) -> str:
    """The line with which the parts of a run are refused; nothing is collected, nothing is trained."""
    with pytest.raises(UnifiedRLError) as error:
        Job(compose(["progress=false", *overrides], allow=("run_cases",)), ("run_cases",)).make_trainer(tmp_path)
    return str(error.value)


SUPERVISED = ["env=two_route", "agent=behavior_cloning", "rollout.rows=8"]


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (merged(LANGUAGE, ["correction=none"]), ["correction=none", "correction=reinforce"]),
        (merged(LANGUAGE, ["replay=none"]), ["replay=none", "replay=fresh"]),
        (merged(LANGUAGE, ["replay=segment"]), ["replay=segment", "single rows"]),
        (merged(LANGUAGE, ["replay=group", "replay.sampler.size=5"]), ["replay.sampler.size=5", "16 rows"]),
        (merged(LANGUAGE, ["agent.critic_config={model_type: llama}"]), ["agent.critic_config", "agent.advantage"]),
        (merged(CONTROL, ["agent.critic_config={model_type: llama}"]), ["agent.critic_config", "agent.critic_hidden"]),
        (merged(CONTROL, ["agent.drop_equal_groups=true"]), ["agent.drop_equal_groups", "agent.advantage=group"]),
        (merged(CONTROL, ["rollout.random_steps=8"]), ["rollout.random_steps=8", "agent=sac"]),
        (merged(CONTROL, ["replay.device=nowhere"]), ["replay.device=nowhere", "cuda"]),
        (merged(CONTROL, ["replay.path=here"]), ["replay.path=here", "replay.storage=memmap"]),
        (merged(CONTROL, ["replay.durable=true"]), ["replay.durable=true", "replay.storage=memmap"]),
        (merged(CONTROL, ["replay.discount=0.5"]), ["discount=0.5", "remove it"]),
        (
            merged(CONTROL, ["replay._target_=unified_rl.replay.WithDataset", "replay.data=nowhere"]),
            ["replay.data", "nowhere"],
        ),
        (merged(CONTROL, ["correction.wrapper={name: anneal_level}"]), ["anneal_level", "correction.level=hoelder"]),
        ([*SUPERVISED, "rollout.style=chain"], ["rollout.style=chain", "leave it out"]),
        ([*SUPERVISED, "rollout.style=chain", "rollout.data=rows"], ["rollout.style=chain", "rollout.data"]),
        ([*SUPERVISED, "rollout.data=nowhere"], ["rollout.data=nowhere does not exist"]),
        ([*SUPERVISED, "agent.updates=2"], ["agent.updates=2", "replay=fresh", "replay=uniform"]),
        ([*SUPERVISED, "agent.batch_size=0"], ["agent.batch_size=0", "at least 1"]),
        ([*SUPERVISED, "replay=group"], ["replay=group", "behavior_cloning"]),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_a_step(
    overrides: list[str], parts: list[str], tmp_path: Path
) -> None:
    message = refusal(tmp_path, overrides)
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_a_warm_start_refuses_a_style_where_there_is_none() -> None:
    stage = "warm_start.stages=[{style: chain, updates: 1}]"
    job = Job(compose(["progress=false", *CONTROL, "warm_start=demonstrations", stage]))
    with pytest.raises(ConfigError, match=r"warm_start\.stages\[0\]\.style=chain.*leave it out"):
        job.warm_start(lambda *unused: None)


def test_a_view_that_the_rows_lack_is_refused_by_name(tmp_path: Path) -> None:
    for node, parts in {
        "{name: divergence, anchor: self, view: privileged}": ["agent.objectives.imitate.view", "rollout.privileged"],
        "{name: divergence, anchor: self, view: privilegd}": ["did you mean 'privileged'"],
    }.items():
        words = [*LANGUAGE, f"{TERM}={node}"]
        message = refusal(tmp_path, words)
        assert all(part in message for part in parts), message


def test_rows_of_a_cloned_policy_are_recorded_with_the_discount_of_its_agent(tmp_path: Path) -> None:
    from unified_rl.replay import read_rows
    from unified_rl.training.dataset import record_dataset

    for chunk in (1, 4):
        small = [f"env.chunk={chunk}", "agent.gamma=0.5", "policy.hidden=[8]"]
        job = Job(compose(["progress=false", *SUPERVISED, *small]))
        record_dataset(job, tmp_path / f"rows{chunk}", batches=1)
        found = set(read_rows(tmp_path / f"rows{chunk}")["discount"].flatten().tolist())
        # a chunk that an episode's end cuts short has a lower power
        assert 0.5**chunk in found and found <= {0.5**steps for steps in range(1, chunk + 1)}


@pytest.mark.parametrize("agent", ["sac", "actor_critic", "behavior_cloning", "sb3_ppo"])
def test_a_correction_that_the_agent_does_not_take_is_refused(agent: str) -> None:
    base = ["env=two_route", f"agent={agent}", "progress=false"]
    Job(compose(base))
    with pytest.raises(ConfigError, match=f"correction=tis would be of no effect: agent={agent} takes none"):
        Job(compose([*base, "correction=tis"]))


def test_a_warm_start_without_demonstrations_is_refused() -> None:
    job = Job(compose(["env=inverted_pendulum", "agent=ppo", "warm_start=demonstrations"]))
    with pytest.raises(ConfigError, match=r"BatchedMujocoEnv has no demonstrations: set warm_start=none, or"):
        job.warm_start(lambda *args: None)


def test_a_term_of_rows_that_no_control_run_has_is_refused(tmp_path: Path) -> None:
    job = Job(compose(["env=two_route", "agent=ppo", "agent.objectives.imitate=nll"]))
    with pytest.raises(
        ConfigError, match=r"agent.objectives.imitate.rows=demonstration reads rows that this run never"
    ):
        job.make_trainer(tmp_path)
