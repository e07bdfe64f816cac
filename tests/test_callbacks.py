"""Callbacks: five hooks, stops, errors by name, and what they keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from callback_cases import CALLS, Asks, Early, Fails, Nothing
from run_cases import ALLOW, CONTROL, LANGUAGE, composed

import unified_rl as ur
from unified_rl.errors import ConfigError, RolloutError
from unified_rl.training.checkpoint import latest_checkpoint, read_checkpoint
from unified_rl.training.run import resume, train
from unified_rl.training.verbs import restored

HERE = "callback_cases"
SMALL = (*CONTROL, "steps=768", "eval_every=256", "log_every=128", "checkpoint_every=256", "eval_episodes=2")
"""Six updates."""


def updates_of(run: Path) -> list[int]:
    return [row["update"] for row in ur.Run(run).metrics()]


def test_five_hooks_are_called_in_order_by_dotted_path(tmp_path: Path) -> None:
    CALLS.clear()
    words = [*SMALL, f"run_dir={tmp_path / 'run'}", "callbacks=[callback_cases:Notes]"]
    train(composed_with(words), (*ALLOW, HERE))
    assert CALLS[:4] == [("begin", 0, ""), ("evaluation", 0, True), ("rollout", 0, 32, ["rollout/steps"]),
                         ("update", 1, True)]  # fmt: skip
    assert [call[0] for call in CALLS].count("rollout") == 6
    assert [call[1] for call in CALLS if call[0] == "evaluation"] == [0, 2, 4, 6]
    assert CALLS[-1] == ("end", 6, 6)


def composed_with(words: list[str]) -> dict[str, Any]:
    allow = (*ALLOW, HERE)
    return ur.compose(["progress=false", *words], allow=allow)


def test_what_a_callback_keeps_goes_on_in_a_resumed_run(tmp_path: Path) -> None:
    CALLS.clear()
    one = ur.train(
        [*SMALL, "callbacks=callback_cases:Notes", f"run_dir={tmp_path / 'one'}", "progress=false"],
        allow=["callback_cases"],
    )
    assert one.config["callbacks"] == "callback_cases:Notes" and one.metrics()
    node = "callbacks={_target_: callback_cases.Notes, word: hello}"
    whole = train(composed_with([*SMALL, node, f"run_dir={tmp_path / 'whole'}"]), (*ALLOW, HERE))
    words = [*(w for w in SMALL if not w.startswith("steps=")), "steps=384", node, f"run_dir={tmp_path / 'part'}"]
    part = train(composed_with(words), (*ALLOW, HERE))
    resume(str(part), steps=768, allow=(*ALLOW, HERE))
    assert CALLS[-1] == ("end", 6, 6) and ("begin", 3, "hello") in CALLS
    one, other = (read_checkpoint(latest_checkpoint(run)) for run in (whole, part))
    assert one["callbacks"]["0"]["updates"] == other["callbacks"]["0"]["updates"] == 6
    assert all(torch.equal(w, other["agent"]["policy"][k]) for k, w in one["agent"]["policy"].items())


@pytest.mark.parametrize(
    ("hook", "last"), [("on_update_end", 3), ("on_rollout_end", 4), ("on_evaluation_end", 4), ("on_run_begin", 0)]
)
def test_a_hook_that_returns_false_ends_the_run_with_an_evaluation_and_a_checkpoint(
    tmp_path: Path, hook: str, last: int, capsys: pytest.CaptureFixture[str]
) -> None:
    at = {"on_evaluation_end": 4, "on_run_begin": 0}.get(hook, 3)
    run = ur.train([*SMALL, "progress=false", f"run_dir={tmp_path / 'run'}"], callbacks=[Early(hook, at)])
    assert updates_of(run)[-1] == last and "eval/score" in run.metrics()[-1]
    assert int(latest_checkpoint(run.folder).name.removeprefix("step_")) == last
    assert f"ends at update {last} of 6: the callback callback_cases.Early.{hook}" in capsys.readouterr().err


def test_a_stopped_run_stays_so_until_it_is_given_more_steps(tmp_path: Path) -> None:
    run = ur.train([*SMALL, "progress=false", f"run_dir={tmp_path / 'run'}"], callbacks=[Early()])
    assert updates_of(run.resume())[-1] == 3
    assert updates_of(run.resume(steps=1024))[-1] == 8


def test_a_callback_may_ask_the_trainer_and_assembled_runs_take_objects() -> None:
    job = ur.assemble("two_route", {"name": "gaussian", "hidden": [8]}, agent={"name": "ppo", "critic_hidden": [8]},
                      rollout={"num_envs": 4, "horizon": 8}, steps=768, eval_episodes=2, callbacks=[Asks()],
                      eval_every=256)  # fmt: skip
    job.run()
    assert job.trainer.updates == 0 and job.trainer.stopped == "it is good enough"


def test_an_error_names_callback_hook_and_line_and_loses_no_update(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(RolloutError) as error:
        ur.train([*SMALL, "progress=false", f"run_dir={folder}"], callbacks=[Fails()])
    said = str(error.value)
    assert "callback callback_cases.Fails.on_update_end failed: ValueError: no such thing" in said
    assert "callback_cases.py:" in said and "update 2 is saved" in said
    assert updates_of(ur.resume(folder))[-1] == 6


@pytest.mark.parametrize(
    ("callbacks", "allow", "said"),
    [
        ("[callback_cases:Notes]", (), "outside the allowed packages"),
        ("[callback_cases:Notse]", (HERE,), "did you mean 'Notes'"),
        ("[{_target_: callback_cases.Notes, wrd: x}]", (HERE,), "did you mean 'word'"),
        ("[3]", (HERE,), r"callbacks\[0\] is 3"),
    ],
)
def test_what_is_no_callback_is_refused_when_a_run_is_composed(callbacks: str, allow: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ur.compose([*SMALL, f"callbacks={callbacks}"], allow=allow)


def test_evaluating_a_run_makes_none_of_its_callbacks(tmp_path: Path) -> None:
    words = [*SMALL, f"run_dir={tmp_path / 'run'}", "callbacks=[callback_cases:Notes]"]
    run = train(composed_with(words), (*ALLOW, HERE))
    CALLS.clear()
    assert ur.evaluate(run, episodes=2, allow=ALLOW)["eval/score"] is not None and not CALLS  # HERE is not allowed


def test_loading_a_policy_of_an_agent_that_collects_by_itself_makes_no_watchers(tmp_path: Path) -> None:
    words = ["env=two_route", "agent=sb3_ppo", "steps=64", "eval_episodes=2"]
    run = train(composed([*words, f"run_dir={tmp_path / 'run'}"]))
    job = restored(str(run), allow=ALLOW, changed={"logger": ["wandb"], "callbacks": ["callback_cases:Notes"]})
    assert not {"loggers", "callbacks"} & vars(job).keys() and job.evaluate()["eval/score"] is not None


def test_an_object_without_a_hook_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has none of the hooks"):
        ur.train([*SMALL, "progress=false", f"run_dir={tmp_path / 'run'}"], callbacks=[Nothing()])


def test_callbacks_see_the_rows_of_language_runs(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Rows:
        def on_rollout_end(self, trainer: Any, rows: Any, metrics: Any) -> None:
            seen.append((rows["tokens"].shape[0], "samples" in metrics))

    words = [*LANGUAGE, "steps=32", "eval_episodes=2", f"run_dir={tmp_path / 'run'}"]
    train(composed(words), ALLOW, callbacks=[Rows])
    assert seen == [(16, False), (16, False)]
