"""How a run is put together: one discount, one number of simulations, parts from outside, names of folders."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from unified_rl.config import compose, resolve_defaults
from unified_rl.errors import ConfigError
from unified_rl.policies.gaussian import GaussianPolicy
from unified_rl.replay import Replay, Uniform, read_rows
from unified_rl.rollout import ControlRollout, DemonstrationRollout
from unified_rl.training.build import Job
from unified_rl.training.provenance import run_folder
from unified_rl.training.run import evaluate_run, train
from unified_rl.training.warm_start import WarmStart

COMMON = ["progress=false", "eval_episodes=2", "eval_every=0", "seed=3"]
SMALL = ["rollout.num_envs=2", "rollout.horizon=8", "agent.minibatch=16", "agent.epochs=1"]
TASKS = ["env=two_route", "env=inverted_pendulum env.chunk=4"]


def job(*overrides: str, allow: tuple[str, ...] = ()) -> Job:
    return Job(resolve_defaults(compose([*COMMON, *overrides], allow=allow), allow=allow), allow)


# ------------------------------------------------------------------------------------------------ one discount


@pytest.mark.parametrize("task", TASKS)
def test_chunk_rollout_and_records_have_the_agents_discount(task: str, tmp_path: Path) -> None:
    built = job(*task.split(), "agent=ppo", "agent.gamma=0.5", *SMALL)
    assert built.env._gamma == 0.5 and built.make_trainer(tmp_path).rollout.gamma == 0.5


def test_rewards_inside_a_chunk_and_the_bootstrap_agree(tmp_path: Path) -> None:
    overrides = ["env=inverted_pendulum", "env.chunk=4", "agent=sac", "agent.gamma=0.5", "rollout.random_steps=0"]
    rollout = job(*overrides).make_trainer(tmp_path).rollout
    row = next(row for row in (rollout.collect(0)[0] for _ in range(20)) if not bool(row["terminated"].any()))
    assert float(row["reward"]) == pytest.approx(1.875) and float(row["discount"]) == pytest.approx(0.5**4)


def test_recorded_rows_carry_the_discount_of_their_run(tmp_path: Path) -> None:
    run = ["env=inverted_pendulum", "agent=ppo", "agent.gamma=0.9", *SMALL, "steps=16", f"run_dir={tmp_path / 'run'}"]
    folder = train(resolve_defaults(compose([*COMMON, *run])))
    evaluate_run(str(folder), episodes=2, record=str(tmp_path / "rows"))
    assert torch.equal(read_rows(tmp_path / "rows")["discount"].unique(), torch.tensor([0.9]))


@pytest.mark.parametrize(("recipe", "setting"), [("iql", "rollout.data"), ("rlpd", "replay.data")])
def test_rows_recorded_under_another_discount_are_refused(recipe: str, setting: str, tmp_path: Path) -> None:
    recorded = ["env=inverted_pendulum", "env.chunk=4", "agent=sac", "agent.gamma=0.9", "rollout.horizon=8"]
    replay = Replay(8, sampler=Uniform())
    replay.extend(job(*recorded).make_rollout().collect(0)[0].flatten())
    replay.dumps(tmp_path / "rows")
    assert float(replay.sample(1)["discount"]) < 0.95  # a power of 0.9
    run = ["env=inverted_pendulum", "env.chunk=4", f"recipe={recipe}", f"{setting}={tmp_path / 'rows'}"]
    with pytest.raises(ConfigError, match=rf"{setting} were recorded under another discount.*agent.gamma=0.99"):
        job(*run).make_trainer(tmp_path)
    job(*run, "agent.gamma=0.9").make_trainer(tmp_path)


def test_observations_are_standardised_by_the_whole_data_set(tmp_path: Path) -> None:
    observation = torch.zeros(100, 4)
    observation[0] = 1.0
    replay = Replay(100, sampler=Uniform())
    replay.extend({"observation": observation, "action": torch.zeros(100, 1)})
    replay.dumps(tmp_path / "rows")
    run = ["env=inverted_pendulum", "agent=behavior_cloning", f"rollout.data={tmp_path / 'rows'}", "rollout.rows=2"]
    built = job(*run, "policy.normalize_observation=true")
    built.make_trainer(tmp_path).rollout.collect(0)
    assert built.policy.normalizer.mean.tolist() == pytest.approx([0.01] * 4)


@pytest.mark.parametrize("given", [["agent.gamma=0.9"], []])
def test_a_second_discount_is_refused_by_name(given: list[str]) -> None:
    agent = given[0].removeprefix("agent.gamma=") if given else "0.99"
    with pytest.raises(ConfigError, match=rf"env.gamma=0.8 and agent.gamma={agent} differ.*leave env.gamma out"):
        job("env=two_route", "agent=ppo", "env.gamma=0.8", *given)
    same = job("env=two_route", "agent=ppo", f"env.gamma={agent}", *given)
    assert same.env._gamma == same.gamma == float(agent)


def test_a_discount_above_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"agent\.gamma=1\.5 must lie in \[0, 1\]"):
        job("env=two_route", "agent=sac", "agent.gamma=1.5")


def test_an_agent_with_another_discount_than_it_was_configured_with_is_refused(tmp_path: Path) -> None:
    built = job("env=inverted_pendulum", "agent=ppo", *SMALL)
    built.gamma = 0.5
    with pytest.raises(ConfigError, match=r"the agent's discount is 0.99.*set agent.gamma=0.99"):
        built.make_trainer(tmp_path)


# ------------------------------------------------------------------------------------------------ sizes and switches


def test_the_number_of_simulations_decides_or_is_refused() -> None:
    assert job("env=inverted_pendulum", "agent=ppo", "rollout.num_envs=3").env.num_envs == 3
    env = job("env=inverted_pendulum", "agent=ppo", "rollout.num_envs=2").env
    policy, stream = GaussianPolicy(**env.policy_inputs()), torch.Generator()
    assert ControlRollout(env, policy, 0.99, stream).rows == 2
    with pytest.raises(ConfigError, match=r"rollout.num_envs=16, but the environment has 2 .* set rollout.num_envs=2"):
        ControlRollout(env, policy, 0.99, stream, num_envs=16)


def test_the_identity_check_can_be_switched_off(tmp_path: Path) -> None:
    for checks in (True, False):
        trainer = job("env=inverted_pendulum", "agent=ppo", *SMALL, f"identity_check={checks}").make_trainer(tmp_path)
        rows, _ = trainer.rollout.collect(0)
        rows["behavior_log_prob"] -= 0.5
        trainer.replay.extend(rows)
        if checks:
            with pytest.raises(ConfigError, match="fresh data should have log-ratio 0"):
                trainer.agent.update(trainer.replay)
        else:
            assert "identity/max_log_ratio" not in trainer.agent.update(trainer.replay)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rollout.horizon=0", "rollout.horizon=0 must be at least 1"),
        ("rollout.staleness=-1", "rollout.staleness=-1 must be at least 0"),
        ("steps=0", "steps=0 must be at least 1"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(override: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        job("env=inverted_pendulum", "agent=ppo", override).make_trainer(tmp_path)


# ------------------------------------------------------------------------------------------------ parts from outside


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package of a user: renamed subclasses of the library's own parts, and an agent that takes little."""
    (tmp_path / "my_parts.py").write_text(
        textwrap.dedent("""
        from typing import Any
        import torch
        from unified_rl.replay import Fresh
        from unified_rl.rollout import ControlRollout, DemonstrationRollout


        class Demos(DemonstrationRollout):
            pass


        class Arm(ControlRollout):
            pass


        class Line(Fresh):
            pass


        class Counter:
            gamma = 0.99

            def __init__(self, policy: Any, rows: int) -> None:
                self.policy, self.rows, self.version, self.drawn = policy, rows, 0, []

            def update(self, replay: Any, progress: float = 0.0) -> dict:
                self.drawn.append(len(replay.sample(None)))
                self.version += 1
                return {}

            def state_dict(self) -> dict:
                return {"policy": dict(self.policy.state_dict()), "version": self.version}

            def load_state_dict(self, state: dict) -> None:
                self.version = state["version"]
        """)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "my_parts"
    sys.modules.pop("my_parts", None)


def test_renamed_subclasses_of_the_librarys_own_parts_work(outside: str, tmp_path: Path) -> None:
    clone = ["env=two_route", "agent=behavior_cloning", "rollout._target_=my_parts.Demos", "rollout.rows=64"]
    cfg = compose([*COMMON, *clone, "steps=128", f"run_dir={tmp_path / 'clone'}"], allow=[outside])
    train(cfg, [outside])
    arm = ["env=inverted_pendulum", "agent=ppo", *SMALL, "rollout._target_=my_parts.Arm"]
    line = ["replay.sampler._target_=my_parts.Line", "rollout.staleness=1"]
    trainer = job(*arm, *line, "steps=64", allow=(outside,)).make_trainer(tmp_path)
    assert trainer.replay.lanes == 2 and trainer.replay.capacity == 32  # a queue by what it says, not by its name
    trainer.run()


def test_a_part_is_given_only_what_its_signature_takes(outside: str, tmp_path: Path) -> None:
    overrides = ["env=inverted_pendulum", "agent=ppo", "rollout.num_envs=2", "rollout.horizon=8", "steps=32"]
    cfg = compose([*COMMON, *overrides], allow=[outside])
    cfg["agent"] = {"_target_": "my_parts.Counter"}
    with pytest.raises(ConfigError, match=r"correction=ppo would be of no effect: agent=\w+ takes none"):
        Job(cfg, [outside])
    trainer = Job({**cfg, "correction": None}, [outside]).make_trainer(tmp_path)
    trainer.run()
    assert trainer.agent.rows == 2 and trainer.agent.drawn == [16, 16]
    assert DemonstrationRollout.__init__.__code__.co_varnames[:8].count("gamma") == 0


# ------------------------------------------------------------------------------------------------ folders


def test_a_runs_name_holds_its_choices_and_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    cfg = compose(["env=half_cheetah", "agent=ppo", "correction=tis", f"runs={tmp_path}"])
    first, second = run_folder(cfg), run_folder(cfg)
    assert first != second and first.name.startswith("half_cheetah-ppo-tis-seed0-")
    sac = run_folder(compose(["env=half_cheetah", "agent=sac", "seed=4", f"runs={tmp_path}"]))
    assert sac.name.startswith("half_cheetah-sac-seed4-")  # no correction, so none is named
    assert run_folder({**cfg, "name": "mine"}) == tmp_path / "mine"
    bare: dict[str, Any] = {"env": {"_target_": "a.Walk"}, "agent": {"_target_": "b.Mine"}, "runs": str(tmp_path)}
    assert run_folder(bare).name.startswith("walk-mine-seed0-")


def test_a_named_after_its_choices_run_trains(tmp_path: Path) -> None:
    cfg = compose([*COMMON, "env=inverted_pendulum", "agent=ppo", *SMALL, "steps=16", f"runs={tmp_path}"])
    assert (train(cfg) / "metrics.jsonl").is_file()


# ------------------------------------------------------------------------------------------------ warm start


def test_a_warm_start_takes_zero_at_its_word() -> None:
    steps: list[float] = []

    class Agent:
        policy = None

        def __init__(self, lr: float) -> None:
            self.lr = lr

        def step(self, batch: Any) -> dict[str, float]:
            steps.append(self.lr)
            if len(steps) > 5:
                raise AssertionError("more updates than were asked for")
            return {"loss/nll": 1.0}

    class Task:
        def demonstrations(self, count: int, stream: Any) -> list[int]:
            return [0] * count

    stages = [{"updates": 2, "lr": 0.0}, {"updates": 0}, {"updates": 1}]
    WarmStart(stages, lr=0.5).fit(Task(), Agent, torch.Generator(), lambda *progress: None)
    assert steps == [0.0, 0.0, 0.5]
