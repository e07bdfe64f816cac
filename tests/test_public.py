"""``import unified_rl as ur``: what it offers, what it costs, and that it does what the command line does."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import unified_rl as ur
from unified_rl import cli

SMALL = {"steps": 512, "seed": 3, "eval_episodes": 4}
SIZES = {"num_envs": 8, "horizon": 8}
TWO_ROUTE = ["env=two_route", "policy=gaussian", "correction=tis", "rollout.num_envs=8", "rollout.horizon=8"]
CHAIN: dict[str, Any] = {
    "policy": "causal_lm_tiny",
    "correction": "grpo",
    "rollout": {"prompts": 4, "group_size": 4},
    "warm_start": {"name": "chain_of_thought", "stages": [{"style": "mixture", "updates": 30, "lr": 3e-3}]},
}


def weights(policy: Any) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in policy.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.fixture(scope="module")
def robot(tmp_path_factory: pytest.TempPathFactory) -> ur.Run:
    """A finished run of the same settings as the assembled ones below."""
    overrides = [*TWO_ROUTE, *(f"{key}={value}" for key, value in SMALL.items())]
    return ur.train([*overrides, f"run_dir={tmp_path_factory.mktemp('robot') / 'run'}"], progress=False)


@pytest.fixture(scope="module")
def reasoner(tmp_path_factory: pytest.TempPathFactory) -> ur.Run:
    given = {"env": "chain_mod", "env.terms": 2, "env.modulus": 5, **CHAIN, **SMALL, "steps": 32}
    return ur.train({**given, "run_dir": str(tmp_path_factory.mktemp("reasoner") / "run")}, progress=False)


# ------------------------------------------------------------------------------------------- names


def test_importing_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, unified_rl, unified_rl.agents, unified_rl.envs, unified_rl.policies, unified_rl.commands\n"
        "dir(unified_rl), unified_rl.__all__, unified_rl.train, unified_rl.compose, unified_rl.ConfigError\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'hydra', 'numpy', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["unified_rl", "unified_rl.agents", "unified_rl.envs", "unified_rl.policies"])
def test_every_public_name_is_there_and_is_typed(package: str) -> None:
    module = sys.modules[package] if package in sys.modules else __import__(package, fromlist=["_"])
    tree = ast.parse(Path(str(module.__file__)).read_text())
    typed = {
        alias.name
        for block in tree.body
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    names = set(module.__all__) - {"__version__"}
    assert names == typed
    assert names <= set(dir(module))
    assert all(getattr(module, name).__doc__ for name in names)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="trian"):
        ur.trian  # noqa: B018


def test_every_command_has_its_twin_with_the_same_options() -> None:
    renamed = {"cfg": "compose", "json": "corrections", "write": "corrections", "words": "corrections"}
    for verb in cli.VERBS:
        twin = getattr(ur, verb)
        taken = twin.__code__.co_varnames[: twin.__code__.co_argcount + twin.__code__.co_kwonlyargcount]
        options = {action.dest for action in cli._parser(verb)._actions} - {"help", *renamed}
        missing = {o for o in options if o.removesuffix("s") not in {name.removesuffix("s") for name in taken}}
        elsewhere = {
            "corrections": {"out"},
            "train": {"checkpoint", "plan", "multirun", "workers"},
        }  # a picture's file; `resume`, `memory_plan`, `sweep`
        assert missing <= elsewhere.get(verb, set()), (verb, missing)


# ------------------------------------------------------------------------------------------- runs


def test_a_run_is_a_folder_with_metrics_and_a_policy(robot: ur.Run) -> None:
    rows = robot.metrics()
    assert [row["update"] for row in rows] == [0, 1, 2] and rows[-1]["steps"] == 512
    assert rows[-1]["eval/score"] == ur.evaluate(robot)["eval/score"] == robot.evaluate()["eval/score"]
    policy = robot.policy()
    assert not policy.training and policy.device.type == "cpu"
    assert policy.sample(torch.zeros(2, 4))["action"].shape == (2, 8)
    assert robot.config["choices"]["correction"] == "tis" and Path(robot) == robot.folder


def test_evaluating_prints_nothing_and_records(
    robot: ur.Run, reasoner: ur.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ur.evaluate(reasoner.folder, episodes=2, record=tmp_path / "rows").keys() >= {"eval/score"}
    assert capsys.readouterr().out == ""
    assert len(ur.read_rows(tmp_path / "rows")["reward"]) > 0
    assert cli.main(["evaluate", str(robot), "--episodes", "2"]) == 0
    assert "eval/score" in capsys.readouterr().out


def test_a_resumed_run_is_the_longer_run(robot: ur.Run, tmp_path: Path) -> None:
    common = [*TWO_ROUTE, "seed=3", "eval_episodes=4", "keep_checkpoints=9"]
    long = ur.train([*common, "steps=1024", f"run_dir={tmp_path / 'long'}"], progress=False)
    part = ur.train([*common, "steps=512", f"run_dir={tmp_path / 'part'}"], progress=False)
    assert ur.resume(part, 1024, progress=False).metrics()[-1]["steps"] == 1024
    assert equal(weights(part.policy()), weights(long.policy()))
    assert not equal(weights(part.policy(2)), weights(part.policy()))
    with pytest.raises(ur.CheckpointError, match="no checkpoint"):
        part.policy(99)


def test_a_language_policy_is_loaded_and_generates(reasoner: ur.Run) -> None:
    policy = ur.load_policy(reasoner.folder)
    prompt = torch.tensor([1, 2, 3])
    said = policy.generate([prompt], max_new_tokens=4, generator=torch.Generator().manual_seed(0))
    assert not policy.training and said.tokens.shape[0] == 1
    assert reasoner.metrics()[-1]["train/reward"] > 0.0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("env=two_route", "list of key=value"),
        (["env=two_rout"], "did you mean 'two_route'"),
        ({"env": "two_route", "agent.lrr": 1}, "did you mean 'lr'"),
        ({"env": "two_route", "agent": {"name": "ppo", "lrr": 1}}, "did you mean 'lr'"),
        ({"env": "two_route", "steps": "many"}, "steps is 'many'"),
        ({"env two": 1}, "is not a key"),
    ],
)
def test_bad_overrides_are_refused_before_anything_runs(overrides: Any, words: str) -> None:
    with pytest.raises(ur.ConfigError, match=words):
        ur.train(overrides)


def test_no_run_in_a_folder_is_one_clear_error(tmp_path: Path) -> None:
    for call in (ur.Run, ur.evaluate, ur.resume, ur.load_policy):
        with pytest.raises(ur.CheckpointError, match=r"not a run folder|no run folder"):
            call(tmp_path)


# ------------------------------------------------------------------------------------------- the other verbs


def test_a_study_by_name_by_overrides_and_composed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    from unified_rl.study import compare as module

    monkeypatch.setattr(module, "compare", lambda cfg, allow, **given: seen.append(cfg) or Path("study"))
    for given in ("quickstart", ["study=quickstart"], {"study": "quickstart"}, ur.compose(["study=quickstart"],
                  primary="compare")):  # fmt: skip
        assert ur.compare(given) == Path("study")
    assert all(cfg == seen[0] for cfg in seen) and seen[0]["study"]["name"] == "quickstart"


def test_the_lab_writes_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unified_rl.study.lab import run as module

    seen: list[Any] = []
    monkeypatch.setattr(module, "lab", lambda names, **given: seen.append((names, given)) or Path(given["out"]))
    assert ur.lab(["tis"], out=tmp_path, seeds=1, progress=False) == tmp_path
    assert seen == [(["tis"], {"out": str(tmp_path), "train": False, "seeds": 1, "shown": False})]


def test_corrections_are_listed_and_shown() -> None:
    listed = ur.corrections()
    assert {entry["name"] for entry in listed} == set(ur.correction_names())
    assert all(entry["summary"] for entry in listed)
    shown = ur.corrections("ppo", **{"kernel.clip_high": 0.4})
    assert shown["rule"]["kernel"]["clip_high"] == 0.4 and len(shown["curves"]["log_ratio"]) > 10
    with pytest.raises(ur.ConfigError, match="did you mean 'dapo'"):
        ur.corrections("dapa")


def test_the_doctor_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    from unified_rl.training import doctor as module

    monkeypatch.setattr(module, "_run", lambda check, overrides: ("env=chain_mod" in overrides, "detail"))
    found = ur.doctor()
    assert not found["healthy"] and found["facts"]["python"]
    assert {(check["domain"], check["holds"]) for check in found["checks"]} == {("language", True), ("control", False)}


# ------------------------------------------------------------------------------------------- assembled runs


def test_options_train_to_the_same_weights_as_the_command_line(robot: ur.Run) -> None:
    run = ur.assemble("two_route", "gaussian", correction="tis", rollout=SIZES, **SMALL)
    rows = run.run()
    assert equal(weights(run.policy), weights(robot.policy()))
    timeless = [{k: v for k, v in row.items() if k != "wall_seconds"} for row in rows]
    assert timeless == [{k: v for k, v in row.items() if k != "wall_seconds"} for row in robot.metrics()]


def test_objects_and_classes_train_to_the_same_weights(robot: ur.Run) -> None:
    env = ur.make_env("two_route", num_envs=8, seed=77)
    policy_of_the_run = ur.compose(TWO_ROUTE)["policy"]
    run = ur.assemble(
        env,
        {**policy_of_the_run, "_target_": ur.GaussianPolicy},
        agent=ur.PolicyGradient,
        correction=ur.load_correction("tis"),
        replay=ur.Fresh(),
        rollout={"horizon": 8},
        **SMALL,
    )
    run.run()
    assert equal(weights(run.policy), weights(robot.policy()))
    assert run.env is env


def test_evaluation_does_not_disturb_an_environment_object() -> None:
    def trained(times: int) -> dict[str, Tensor]:
        run = ur.assemble(ur.make_env("two_route", num_envs=8), correction="tis", rollout={"horizon": 8}, **SMALL)
        run.update()
        for _ in range(times):
            run.evaluate()
        run.update()
        return weights(run.policy)

    assert equal(trained(0), trained(3))


def test_a_reasoner_is_assembled_from_an_object(reasoner: ur.Run) -> None:
    from unified_rl.envs import ChainMod

    assert max(row.get("grad/norm", 0.0) for row in reasoner.metrics()) > 0  # else equal weights say nothing
    run = ur.assemble(ChainMod(modulus=5, terms=2), **CHAIN, **{**SMALL, "steps": 32})
    run.run()
    assert equal(weights(run.policy), weights(reasoner.policy()))


def test_an_agent_without_a_correction_and_a_sampler_object() -> None:
    run = ur.assemble(
        "inverted_pendulum", agent={"name": "sac", "learning_starts": 8}, replay=ur.Uniform(), steps=12, seed=1,
        rollout={"random_steps": 8}, eval_episodes=2, eval_every=0,
    )  # fmt: skip
    before = weights(run.policy)
    run.run()
    assert not equal(before, weights(run.policy)) and isinstance(run.replay.sampler, ur.Uniform)


def test_updates_by_hand_end_with_the_budget() -> None:
    run = ur.assemble("two_route", correction="tis", rollout=SIZES, **SMALL)
    assert run.update()["loss/total"] != run.update()["loss/total"] and run.steps == 512
    with pytest.raises(ur.ConfigError, match="steps=512 is used up"):
        run.update()


def test_a_folder_holds_the_run_and_is_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def assembled(folder: Path | None, **settings: Any) -> ur.Assembled:
        env = ur.make_env("two_route", num_envs=8)
        return ur.assemble(env, correction="tis", rollout={"horizon": 8}, folder=folder, **{**SMALL, **settings})

    whole = assembled(None, steps=1024)
    whole.run()
    half = assembled(tmp_path / "run")
    half.run()
    run = ur.Run(tmp_path / "run")
    assert run.metrics() == [{k: pytest.approx(v) for k, v in row.items()} for row in half.trainer.log.rows]
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["env"]["_target_"].endswith("TwoRouteEnv")
    with pytest.raises(ur.CheckpointError, match="resume_existing"):
        assembled(tmp_path / "run")
    for call in (ur.resume, ur.evaluate, ur.load_policy):
        with pytest.raises(ur.CheckpointError, match=r"objects of a script \(env\)"):
            call(run)
    for words in (["evaluate", str(run)], ["train", f"resume={run}"]):
        assert cli.main(words) == 2 and "objects of a script (env)" in capsys.readouterr().err
    rest = assembled(tmp_path / "run", steps=1024, resume_existing=True)
    rest.run()
    assert equal(weights(rest.policy), weights(whole.policy))


def test_a_run_of_options_alone_is_evaluated_like_any_other(tmp_path: Path) -> None:
    run = ur.assemble("two_route", correction="tis", rollout=SIZES, folder=tmp_path / "run", **SMALL)
    run.run()
    assert ur.evaluate(tmp_path / "run")["eval/score"] == run.evaluate()["eval/score"]
    assert equal(weights(ur.load_policy(tmp_path / "run")), weights(run.policy))


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"replay": "fersh"}, "did you mean 'fresh'"),
        ({"agent": {"name": "ppo", "lrr": 1}}, "did you mean 'lr'"),
        ({"agent": {"_target_": "somewhere.Agent"}}, "--allow somewhere"),
        ({"rollout": object()}, "a name, settings or a class"),
        ({"rollout": {"num_envs": 4}}, "num_envs"),
        ({"steps": "many"}, "steps is 'many'"),
        ({"epochs": 3}, "steps=512 and epochs=3 both say"),
        ({"epocs": 3}, "no group or key 'epocs'"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts: dict[str, Any], words: str) -> None:
    env = ur.make_env("two_route", num_envs=8)
    with pytest.raises(ur.ConfigError, match=words):
        ur.assemble(env, **{**SMALL, "correction": "tis", **parts})


def test_a_replay_of_another_layout_is_refused() -> None:
    for given, words in (({"lanes": 2}, "lanes=2"), ({"lanes": 8, "cut": True}, "cut=True")):
        with pytest.raises(ur.ConfigError, match=words):
            ur.assemble("two_route", rollout=SIZES, replay=ur.Replay(256, sampler=ur.Fresh(), **given), **SMALL)


def test_an_agent_of_another_policy_is_refused() -> None:
    env = ur.make_env("two_route", num_envs=8)
    policy, other = (ur.GaussianPolicy(**env.policy_inputs()) for _ in range(2))
    correction, stream = ur.load_correction("tis"), torch.Generator()
    agent = ur.PolicyGradient(other, correction, stream, rows=8, length=8)
    with pytest.raises(ur.ConfigError, match="another policy"):
        ur.assemble(env, policy, agent=agent, rollout={"horizon": 8}, **SMALL)


def test_two_discounts_are_refused() -> None:
    from unified_rl.envs import TwoRouteEnv

    with pytest.raises(ur.ConfigError, match=r"gamma=0\.9"):
        ur.assemble(TwoRouteEnv(8, gamma=0.9), rollout={"horizon": 8}, **SMALL)
    run = ur.assemble(TwoRouteEnv(8, gamma=0.9), agent={"gamma": 0.9}, rollout={"horizon": 8}, **SMALL)
    assert run.agent.gamma == run.rollout.gamma == 0.9


def test_make_env_names_the_nearest() -> None:
    assert ur.make_env("half_cheetah", num_envs=2).num_envs == 2
    with pytest.raises(ur.ConfigError, match="did you mean 'num_envs'"):
        ur.make_env("half_cheetah", num_env=2)
