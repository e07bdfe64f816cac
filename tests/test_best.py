"""The best checkpoint and early stopping, in both domains, on resume and when a run goes back."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import ALLOW, CONTROL, LANGUAGE, EasyChain, composed

import unified_rl as ur
from unified_rl import cli
from unified_rl.agents.policy_gradient import PolicyGradient
from unified_rl.errors import CheckpointError, ConfigError
from unified_rl.training.best import Best, Watch
from unified_rl.training.checkpoint import checkpoints, latest_checkpoint, read_checkpoint, step_of
from unified_rl.training.metric_names import names_of
from unified_rl.training.run import Job, resume, train
from unified_rl.training.settings import TrainSettings
from unified_rl.training.warm_start import WarmStart

UPDATE = {"control": 128, "language": 16}
"""Steps of one update."""


def common(domain: str, updates: int = 6, **every: int) -> list[str]:
    """A run of so many updates; how often it evaluates, logs and saves, in updates."""
    found = {"eval_every": 1, "log_every": 1, "checkpoint_every": 2, **every}
    steps = {key: UPDATE[domain] * value for key, value in {"steps": updates, **found}.items()}
    return [*(f"{key}={value}" for key, value in steps.items()), "eval_episodes=4", "keep_checkpoints=1"]


def scripted(monkeypatch: pytest.MonkeyPatch, scores: list[float]) -> None:
    """Evaluation gives these scores, one an update."""
    from unified_rl.training.build import Job, Scores

    def evaluate(self: Any, intervals: bool = False) -> Scores:
        trainer = self.trainer_of_test
        return Scores({"eval/score": scores[trainer.updates]})

    make = Job.make_trainer

    def make_trainer(self: Any, *given: Any, **options: Any) -> Any:
        self.trainer_of_test = make(self, *given, **options)
        return self.trainer_of_test

    monkeypatch.setattr(Job, "evaluate", evaluate)
    monkeypatch.setattr(Job, "make_trainer", make_trainer)


def best_of(run: Path) -> list[int]:
    return [step_of(path) for path in checkpoints(run / "best")]


def words(folder: Path, *more: str, updates: int = 6, **every: int) -> dict[str, Any]:
    """A control run."""
    given = [w for w in common("control", updates, **every) if w.split("=")[0] not in [m.split("=")[0] for m in more]]
    return composed([*CONTROL, *given, f"run_dir={folder}", *more])


SCORES = [0.1, 0.3, 0.2, 0.7, 0.7, 0.4, 0.6, 0.9, 0.1]


@pytest.mark.parametrize("base", [CONTROL, LANGUAGE], ids=["control", "language"])
def test_the_best_checkpoint_outlives_the_others_and_is_evaluated(
    base: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = common("control" if base is CONTROL else "language")
    with monkeypatch.context() as patch:
        scripted(patch, SCORES)
        cfg = composed([*base, *given, f"run_dir={tmp_path / 'run'}", "keep_best=eval/score"])
        run = train(cfg, ALLOW)
    assert best_of(run) == [3] and [step_of(p) for p in checkpoints(run / "checkpoints")] == [6]
    best = ur.load_policy(run, "best", allow=ALLOW)
    state = read_checkpoint(checkpoints(run / "best")[0])["agent"]["policy"]
    assert all(torch.equal(w, state[k]) for k, w in best.state_dict().items() if k in state)
    last = ur.load_policy(run, allow=ALLOW)
    assert not all(torch.equal(w, last.state_dict()[k]) for k, w in best.state_dict().items())
    assert ur.evaluate(run, checkpoint="best", allow=ALLOW) == ur.evaluate(checkpoints(run / "best")[0], allow=ALLOW)
    assert cli.main(["verify", str(run)]) == 0


def test_less_is_better_where_the_mode_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, SCORES)
    run = train(words(tmp_path / "run", "keep_best={metric: eval/score, mode: min}"))
    assert best_of(run) == [0]


def test_a_run_goes_on_from_its_best_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, SCORES)
    whole = train(words(tmp_path / "run", "keep_best=eval/score"))
    end = read_checkpoint(latest_checkpoint(whole))
    resume(str(whole), checkpoint="best")
    again = read_checkpoint(latest_checkpoint(whole))
    assert [row["update"] for row in ur.Run(whole).metrics()] == list(range(7)) and best_of(whole) == [3]
    assert all(torch.equal(w, again["agent"]["policy"][k]) for k, w in end["agent"]["policy"].items())
    with pytest.raises(CheckpointError, match="no best checkpoint"):
        resume(str(train(words(tmp_path / "plain"))), checkpoint="best")


@pytest.mark.parametrize("updates", [3, 4])
def test_an_extended_run_keeps_what_the_whole_run_keeps(
    updates: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, SCORES)
    more = ("keep_best=eval/score", "early_stopping={metric: eval/score, patience: 3}")
    whole = train(words(tmp_path / "whole", *more, eval_every=2))
    part = train(words(tmp_path / "part", *more, eval_every=2, updates=updates))
    assert best_of(part) == ([2, 3] if updates == 3 else [2, 4])  # a longer run evaluates not at update 3
    resume(str(part), steps=6 * UPDATE["control"])
    one, other = (read_checkpoint(latest_checkpoint(run)) for run in (whole, part))
    assert one["watch"] == other["watch"] and best_of(whole) == best_of(part) == [4]


def test_a_resumed_run_knows_its_best_and_its_patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [0.1, 0.9, 0.2, 0.3, 0.3, 0.3, 0.3])
    more = ("keep_best=eval/score", "early_stopping={metric: eval/score, patience: 4}", "keep_checkpoints=9")
    whole = train(words(tmp_path / "whole", *more, checkpoint_every=1))
    assert [row["update"] for row in ur.Run(whole).metrics()] == list(range(6)) and best_of(whole) == [1]
    for save in checkpoints(whole / "checkpoints")[:-1]:
        part = Path(shutil.copytree(whole, tmp_path / save.name))
        for later in checkpoints(part / "checkpoints"):
            if later.name > save.name:
                shutil.rmtree(later)
        resume(str(part))
        assert [row["update"] for row in ur.Run(part).metrics()] == list(range(6)) and best_of(part) == [1]
        assert read_checkpoint(latest_checkpoint(part))["watch"] == read_checkpoint(latest_checkpoint(whole))["watch"]


def test_early_stopping_says_why_and_the_run_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(monkeypatch, [0.1, 0.5, 0.505, 0.2, 0.3, 0.9, 0.9, 0.9])
    stopping = "early_stopping={metric: eval/score, patience: 2, min_delta: 0.01}"
    run = train(words(tmp_path / "run", stopping))
    assert [row["update"] for row in ur.Run(run).metrics()] == [0, 1, 2, 3]
    assert "2 values of eval/score were not better than 0.5 of update 1" in capsys.readouterr().err
    assert ur.Run(run).config["early_stopping"]["patience"] == 2
    assert ur.Run(run).resume(steps=7 * UPDATE["control"]).metrics()[-1]["update"] == 7


def test_a_best_checkpoint_that_is_gone_is_told_and_found_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(monkeypatch, SCORES)
    run = train(words(tmp_path / "run", "keep_best=eval/score"))
    shutil.rmtree(run / "best")
    resume(str(run), steps=8 * UPDATE["control"])
    assert "the best checkpoint, of update 3, is gone" in capsys.readouterr().err and best_of(run) == [7]


def test_values_that_are_not_finite_are_never_the_best() -> None:
    best = Best("x", "max", "keep_best")
    assert best.better({"x": math.nan}, 0) is False and best.value is None
    assert best.better({}, 1) is None and best.better({"x": -1.0}, 2) is True
    assert best.better({"x": math.inf}, 3) is False and best.update == 2


WARM = ("warm_start=demonstrations", "warm_start.stages=[{updates: 3}]", "warm_start.dataset=8")


@pytest.mark.parametrize(
    ("setting", "near"),
    [
        ("keep_best=eval/acuracy", "eval/accuracy"),
        ("early_stopping={metric: eval/pass_at_2}", "eval/"),
        ("keep_best=rollout/rewrad", "rollout/reward"),
        ("keep_best=loss/polcy", "loss/policy"),
        ("keep_best=loss/value", "loss/"),
        ("early_stopping={metric: kl/k8}", "kl/k"),
        ("keep_best=evl/score", "eval/score"),
    ],
)
def test_a_metric_that_a_run_will_not_have_is_refused_before_anything_is_spent(
    setting: str, near: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Job, "evaluate", lambda *given, **more: pytest.fail("the run evaluated"))
    monkeypatch.setattr(WarmStart, "fit", lambda *given: pytest.fail("the run made its warm start"))
    cfg = composed([*LANGUAGE, "steps=32", f"run_dir={tmp_path / 'run'}", *WARM, setting])
    with pytest.raises(ConfigError, match=rf"^{setting.split('=')[0]}.*is no metric of this run; .*{near}"):
        train(cfg, ALLOW)


@pytest.mark.parametrize(("metric", "near"), [("eval/sucess", "eval/success"), ("rollout/retrun", "rollout/return")])
def test_what_an_environment_tells_is_known_from_an_evaluation_before_the_warm_start(
    metric: str, near: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WarmStart, "fit", lambda *given: pytest.fail("the run made its warm start"))
    with pytest.raises(ConfigError, match=f"is no metric of this .*did you mean '{near}'"):
        train(words(tmp_path / "run", *WARM, f"keep_best={metric}"))
    with pytest.raises(ConfigError, match=f"is no metric of this .*did you mean '{near}'"):  # at the first evaluation
        train(words(tmp_path / "cold", f"keep_best={metric}"))
    assert [row["update"] for row in ur.Run(tmp_path / "cold").metrics()] == [0]


RUNS = [
    [*LANGUAGE, "reward=[task,repetition]"],
    [*LANGUAGE, "eval_sampling={samples: 3}", "agent=ppo", "agent.entropy_coef=0.01"],
    [*LANGUAGE, "agent.kl=0.01", "agent.drop_equal_groups=true", "correction=vcpo"],
    [*LANGUAGE, "rollout.context={_target_: unified_rl.rollout.context.Refill}", "correction=troll"],
    [*LANGUAGE, "recipe=chord"],
    [*LANGUAGE[:-2], "agent=sft", "rollout.rows=8"],
    [*CONTROL, "correction=fixpo", "agent.objectives={second: {name: policy_gradient}}"],
    [*CONTROL[:1], "agent=sac", "agent.learning_starts=0", "agent.critic_hidden=[8]", "rollout.num_envs=4"],
]


@pytest.mark.parametrize("given", RUNS, ids=lambda words: " ".join(words[-2:]))
def test_every_metric_of_a_run_is_known_before_it_begins(given: list[str], tmp_path: Path) -> None:
    job = Job(composed([*given, "eval_episodes=4", "keep_best=eval/score"]), ALLOW)
    trainer = job.make_trainer(tmp_path)
    names, logged = trainer.watch.names, set()
    trainer.planned, trainer.display = 2, lambda steps, metrics: logged.update(metrics)
    trainer.run()
    late = {name for name in logged if name.split("/")[0] in names.late}
    assert logged - late <= names.known and not names.open and "eval/score" in names.known
    assert late <= trainer.watch.names.known and not trainer.watch.names.late


def test_a_callback_names_a_metric_of_its_own(tmp_path: Path) -> None:
    class Mine(ur.Callback):
        metrics = ("mine/update",)

        def on_update_end(self, trainer: Any, metrics: dict[str, Any]) -> None:
            trainer.add_metrics({"mine/update": float(trainer.updates)})

    run = train(words(tmp_path / "run", "keep_best=mine/update"), callbacks=[Mine()])
    assert best_of(run)[-1] == 6 and ur.Run(run).metrics()[-1]["mine/update"] == 6.0
    Mine.metrics = ()
    with pytest.raises(ConfigError, match=r"keep_best=mine/update is no metric of this run.*attribute metrics"):
        train(words(tmp_path / "other", "keep_best=mine/update"), callbacks=[Mine()])


def test_agents_of_others_may_have_any_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Other(PolicyGradient):
        pass

    names = Job(composed([*CONTROL]), ALLOW).make_trainer(tmp_path).agent
    names.__class__ = Other
    assert names.metric_names is None
    found = names_of(EasyChain(modulus=5, terms=3), names, None, ())
    assert not found.fault("mine/x") and not found.fault("loss/mine") and "reward" in found.fault("rollout/rewrad")


def test_a_run_that_goes_on_with_a_metric_it_never_had_is_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Watch, "check", lambda *given: None)
        run = train(words(tmp_path / "run", "keep_best=rollout/retrun", updates=4))
    resume(str(run), steps=6 * UPDATE["control"])
    assert "keep_best=rollout/retrun was in no logged row" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("early_stopping={metric: eval/score, patiense: 3}", "did you mean 'patience'"),
        ("early_stopping={patience: 3}", "early_stopping.metric is ''"),
        ("early_stopping={metric: eval/score, patience: 0}", "early_stopping.patience=0 must be at least 1"),
        ("early_stopping={metric: eval/score, min_delta: -1}", "early_stopping.min_delta=-1.0"),
        ("keep_best={metric: eval/score, mode: maximum}", "must be max or min"),
        ("keep_best=7", "keep_best is 7"),
    ],
)
def test_wrong_settings_are_refused_when_a_run_is_composed(setting: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        composed([*CONTROL, setting])


@pytest.mark.parametrize("setting", ["keep_best=eval/score", "early_stopping={metric: eval/accuracy}"])
def test_a_metric_of_an_evaluation_that_is_off_is_refused(setting: str) -> None:
    with pytest.raises(
        ConfigError, match=f"^{setting.split('=')[0]} watches eval/.* eval_episodes=0 evaluates nothing"
    ):
        Job(composed([*LANGUAGE, "eval_episodes=0", setting]), ALLOW)
    assert Watch(TrainSettings(eval_episodes=0, early_stopping={"metric": "rollout/reward"})).stopper is not None


def test_a_watch_of_nothing_does_nothing() -> None:
    watch = Watch(TrainSettings())
    assert watch.see({"eval/score": 1.0}, 0, True) == (False, "")
