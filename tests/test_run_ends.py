"""However a run ends early, one line says so, the last whole update is saved, and going on gives the whole run."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from faults.points import Points
from faults.scenarios import differences, litter, metrics_of, rows_result
from run_cases import LANGUAGE, EasyChain, remembered

from unified_rl import cli
from unified_rl.agents.behavior_cloning import BehaviorCloning
from unified_rl.config import compose, resolve_defaults
from unified_rl.errors import CheckpointError, NonFiniteError, RestoreError, RolloutError, UnifiedRLError
from unified_rl.rollout import feed
from unified_rl.training import trainer as loop
from unified_rl.training.checkpoint import checkpoints, read_checkpoint
from unified_rl.training.metrics import MetricLog
from unified_rl.training.run import Job, resume, train

PPO = [
    "env=gymnasium", "env.id=Line-v0", "agent=ppo", "policy.hidden=[8]", "agent.critic_hidden=[8]", "agent.epochs=1",
    "rollout.num_envs=2", "rollout.horizon=8", "agent.minibatch=8", "steps=128", "eval_every=64", "log_every=16",
    "eval_episodes=2", "checkpoint_every=48", "progress=false", "seed=4",
]  # fmt: skip


class Line(gymnasium.Env[Any, Any]):
    """Be near the origin. ``hook`` is called with the steps of the training copies so far; what it returns replaces
    the answer to a step."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
    hook: ClassVar[Callable[[int], Any]] = staticmethod(lambda steps: None)
    steps: ClassVar[int] = 0
    made: ClassVar[int] = 0

    def __init__(self) -> None:
        Line.made += 1
        self.trains = Line.made <= 2  # those of evaluation are made later

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.place = self.np_random.normal(size=2)
        return self.place.astype(np.float32), {}

    def step(self, action: Any) -> Any:
        answer = None
        if self.trains:
            Line.steps += 1
            answer = Line.hook(Line.steps)
        self.place = self.place * 0.9 + 0.3 * float(action[0]) + self.np_random.normal(size=2) * 0.1
        return answer or (self.place.astype(np.float32), -float(np.abs(self.place[0])), False, False, {})


gymnasium.register("Line-v0", entry_point=Line, max_episode_steps=12)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """A new start of the counters, and no hook."""
    Line.hook, Line.steps, Line.made = staticmethod(lambda steps: None), 0, 0
    with remembered(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed, "GRACE", 60.0)  # a machine that stops for a moment is not what is tested
        yield
    Line.hook = staticmethod(lambda steps: None)


def at(step: int, act: Callable[[], Any]) -> None:
    """Lets the environment do something at a step of the training copies."""
    Line.hook = staticmethod(lambda steps: act() if steps == step else None)


def send(*numbers: int) -> Callable[[], None]:
    return lambda: [os.kill(os.getpid(), number) for number in numbers] and None  # type: ignore[func-returns-value]


def fail(error: Exception) -> Callable[[], None]:
    def raised() -> None:
        raise error

    return raised


def again() -> None:
    """As a new process would find the environment."""
    Line.hook, Line.steps, Line.made = staticmethod(lambda steps: None), 0, 0


def final(run: Path) -> dict[str, Any]:
    last = checkpoints(run / "checkpoints")[-1]
    state = read_checkpoint(last)
    state.pop("elapsed")
    return {"state": state, "replay": rows_result(last / "replay"), "metrics": metrics_of(run), "litter": litter(run)}


def status(run: Path) -> str:
    return str(json.loads((run / "meta.json").read_text())["status"])


def saved(run: Path) -> int:
    return int(read_checkpoint(checkpoints(run / "checkpoints")[-1])["updates"])


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """The hang-up signal has its default action, also where the tests were started to outlive their terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The undisturbed run."""
    again()
    return final(train(resolve_defaults(compose([*PPO, f"run_dir={tmp_path_factory.mktemp('whole') / 'run'}"]))))


def command(run: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    """Exit code and standard error of a run of the command line."""
    capsys.readouterr()
    code = cli.main(["train", *PPO, *more, f"run_dir={run}"])
    return code, capsys.readouterr().err


def check_it_goes_on(run: Path, whole: dict[str, Any]) -> None:
    again()
    resume(str(run))
    assert differences(final(run), whole) == []
    assert status(run) == "finished"


# ----------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_ends_a_run_after_the_update_under_way(
    number: int, tmp_path: Path, whole: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    at(84, send(number))  # in the sixth collection
    assert command(run, capsys) == (128 + number, "unified-rl: interrupted\n")
    assert (status(run), saved(run)) == ("interrupted", 6)
    check_it_goes_on(run, whole)


def test_a_run_that_shall_outlive_its_terminal_does(
    tmp_path: Path, whole: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    at(84, send(signal.SIGHUP))
    assert command(tmp_path / "run", capsys) == (0, "")
    assert differences(final(tmp_path / "run"), whole) == []


@pytest.mark.parametrize("signals", [2, 4])
def test_further_signals_end_a_collection_at_once_and_the_last_update_is_saved_as_it_was(
    signals: int, tmp_path: Path, whole: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    at(84, send(*[signal.SIGINT] * signals))
    assert command(run, capsys) == (130, "unified-rl: interrupted\n")
    assert (status(run), saved(run)) == ("interrupted", 5)
    check_it_goes_on(run, whole)


def test_a_hanging_environment_is_left_at_the_second_signal(
    tmp_path: Path, whole: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"

    def hang() -> None:
        for delay in (0.1, 0.3):
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGTERM)).start()
        time.sleep(60)

    at(84, hang)
    begun = time.monotonic()
    assert command(run, capsys) == (143, "unified-rl: interrupted\n")
    assert time.monotonic() - begun < 30 and saved(run) == 5
    check_it_goes_on(run, whole)


@pytest.mark.parametrize("place", ["evaluate", "save_state", "update", "make_trainer"])
@pytest.mark.parametrize("signals", [1, 2])
def test_signals_at_every_stage_are_one_line_and_lose_nothing(
    place: str,
    signals: int,
    tmp_path: Path,
    whole: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from unified_rl.agents.policy_gradient import PolicyGradient
    from unified_rl.training import checkpoint

    owner = {"evaluate": Job, "make_trainer": Job, "save_state": checkpoint, "update": PolicyGradient}[place]
    real, calls = getattr(owner, place), [0]

    def noisy(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == (1 if place == "make_trainer" else 2):
            send(*[signal.SIGINT] * signals)()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, place, noisy)
    run = tmp_path / "run"
    assert command(run, capsys) == (130, "unified-rl: interrupted\n")
    assert status(run) == "interrupted"
    monkeypatch.undo()
    check_it_goes_on(run, whole)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at the maps of a process")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_imports_is_one_line_and_leaves_no_folder(number: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [sys.executable, "-m", "unified_rl.cli", "train", *PPO, f"run_dir={run}"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        maps, end = Path(f"/proc/{process.pid}/maps"), time.monotonic() + 60
        while "libtorch" not in maps.read_text() and time.monotonic() < end:
            time.sleep(0.005)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (128 + number, "unified-rl: interrupted\n")
    assert not run.exists()


FLOW = ["env=two_route", "policy=flow", "policy.hidden=[8]", "agent=policy_gradient", "agent.critic_hidden=[8]"]
FLOW += ["warm_start=demonstrations", "warm_start.stages=[{updates: 20}]", "warm_start.batch_size=16", "seed=1"]
FLOW += ["rollout.num_envs=2", "rollout.horizon=4", "correction=ppo", "steps=32", "eval_episodes=1", "progress=false"]


@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_during_the_warm_start_is_one_line_and_the_same_command_begins_again(
    signals: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    once = train(resolve_defaults(compose([*FLOW, f"run_dir={tmp_path / 'once'}"])))
    real, calls = BehaviorCloning.step, [0]

    def noisy(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 7:
            send(*[signal.SIGTERM] * signals)()
        return real(*args, **kwargs)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(BehaviorCloning, "step", noisy)
        assert cli.main(["train", *FLOW, f"run_dir={run}"]) == 143
    assert capsys.readouterr().err == "unified-rl: interrupted\n" and calls[0] < 20
    assert cli.main(["train", *FLOW, f"run_dir={run}", "resume_existing=true"]) == 0
    assert differences(final(run), final(once)) == []


def test_what_a_kill_behind_the_last_checkpoint_leaves_is_cleared_when_the_run_is_resumed(
    tmp_path: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from unified_rl.training import checkpoint

    class Killed(BaseException):
        """In place of a kill."""

    def die(path: Path) -> None:
        raise Killed

    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):  # the first that is dropped, when the last is written
        patch.setattr(checkpoint, "remove_checkpoint", die)
        train(resolve_defaults(compose([*PPO, f"run_dir={run}"])))
    assert saved(run) == 8
    os.replace(run / "checkpoints" / checkpoint.checkpoint_name(3), run / "checkpoints" / ".writing_half_removed")
    check_it_goes_on(run, whole)


# ------------------------------------------------------------------------------------------- the environment's faults


def test_an_environment_that_raises_is_one_line_with_its_place_and_the_last_update_is_saved(
    tmp_path: Path, whole: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    at(84, fail(ZeroDivisionError("the arm\nis gone")))
    code, error = command(run, capsys)
    assert code == 2 and error.count("\n") == 1
    assert "raised in step 6: ZeroDivisionError: the arm is gone (" in error
    assert "test_run_ends.py:" in error and ", in raised)" in error
    assert f"update 5 is saved, go on with 'unified-rl train resume={run}'" in error
    assert "Traceback" in (run / "error.txt").read_text() and status(run) == "failed"
    check_it_goes_on(run, whole)
    assert not (run / "error.txt").exists()


@pytest.mark.parametrize(
    "answer",
    [
        lambda: (np.full(2, np.nan, np.float32), 0.0, False, False, {}),
        lambda: (np.zeros(2, np.float32), float("inf"), False, False, {}),
        lambda: (np.zeros(2, np.float32), None, False, False, {}),
        lambda: (np.zeros(3, np.float32), 0.0, False, False, {}),
        lambda: (np.zeros(2, np.float32), 0.0, False, {}),
        lambda: 1,
    ],
    ids=["nan", "infinite", "none", "shape", "four", "number"],
)
def test_nonsense_from_an_environment_costs_the_collection_alone(
    answer: Callable[[], Any], tmp_path: Path, whole: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    at(84, answer)
    code, error = command(run, capsys)
    assert code == 2 and error.count("\n") == 1, error
    assert saved(run) == 5
    check_it_goes_on(run, whole)


def test_a_reward_function_that_raises_is_told_likewise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls, real = tmp_path / "run", [0], EasyChain._judge

    def judge(self: Any, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 90:
            raise KeyError("answer")
        return real(self, *args)

    monkeypatch.setattr(EasyChain, "_judge", judge)
    task = [*LANGUAGE, "agent=policy_gradient", "steps=128", "eval_every=0", "eval_episodes=4", "progress=false"]
    with pytest.raises(RolloutError, match=r"raised KeyError: 'answer' \(.*test_run_ends.py:"):
        train(compose([*task, f"run_dir={run}"], allow=["run_cases"]), ["run_cases"])
    assert saved(run) > 0 and status(run) == "failed"


def test_weights_that_are_lost_are_not_saved(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    trainer = Job(compose(PPO)).make_trainer(tmp_path / "run")
    update = trainer.agent.update

    def poison(*args: Any) -> Any:
        out = update(*args)
        if trainer.agent.version == 5:
            next(trainer.agent.policy.parameters()).data.fill_(float("nan"))
        return out

    trainer.agent.update = poison
    with pytest.raises(NonFiniteError, match=r"update 3 is saved"):
        trainer.run()
    assert saved(tmp_path / "run") == 3


def test_a_state_that_was_not_kept_begins_new_episodes_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "SHARE", 0.0)
    monkeypatch.setattr(feed, "GRACE", 0.0)  # too dear from the second collection on
    run = tmp_path / "run"
    at(84, fail(ValueError("no")))
    assert command(run, capsys)[0] == 2 and saved(run) == 5
    again()
    with pytest.raises(RestoreError, match="was not kept"):
        resume(str(run), resume_env="exact")
    resume(str(run))
    assert "goes on from update 5 with new episodes, not bit for bit" in capsys.readouterr().err
    assert [row["update"] for row in metrics_of(run)] == list(range(9))


# ----------------------------------------------------------------------------------------------- disks and folders


@pytest.mark.parametrize(
    ("label", "code"),
    [
        ("open metrics.jsonl before", errno.EROFS),
        ("write metrics.jsonl torn", errno.ENOSPC),
        ("open .writing-MANIFEST.json before", errno.ENOSPC),
        ("save state.safetensors torn", errno.ENOSPC),
        ("write state.json torn", errno.EIO),
        ("replace step_000000000003 before", errno.EIO),
        ("open .writing-meta.json before", errno.ENOSPC),
        ("mkdir .writing_000000000003 before", errno.EROFS),
    ],
)
def test_a_disk_that_fails_is_one_error_and_costs_nothing_that_was_saved(
    label: str, code: int, tmp_path: Path, whole: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run, met = tmp_path / "run", []

    def here(found: str) -> bool:
        after = Line.steps > 40 or label.startswith(("replace", "mkdir"))
        met.append(found == label and after)
        return any(met)  # and from then on nothing can be written

    def full() -> None:
        raise OSError(code, os.strerror(code), str(run))

    with Points(tmp_path, here, full):
        result, error = command(run, capsys)
    assert any(met), "the fault point was never met"
    assert result == 2 and error.count("\n") == 1 and os.strerror(code) in error, error
    again()
    resume(str(run))
    assert differences(final(run), whole) == []


def test_a_run_whose_last_row_could_not_be_written_ends_as_if_it_had(
    tmp_path: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = MetricLog.write

    def failing(log: MetricLog, update: int, *rest: Any) -> None:
        write(log, update, *rest)
        if update == whole["metrics"][-1]["update"]:
            raise CheckpointError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(MetricLog, "write", failing)
        with pytest.raises(CheckpointError, match="the disk is full"):
            train(resolve_defaults(compose([*PPO, f"run_dir={tmp_path / 'run'}"])))
    for _ in range(2):  # the second one has nothing to do
        resume(str(tmp_path / "run"))
        assert differences(final(tmp_path / "run"), whole) == []


def test_a_folder_that_cannot_be_made_or_written_is_one_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "run", tmp_path / "file"):
        code, error = command(place, capsys)
        assert code == 2 and error.count("\n") == 1 and str(place) in error


def test_a_removed_run_folder_is_one_error_and_stays_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    at(60, lambda: shutil.rmtree(run))
    code, error = command(run, capsys)
    assert (
        code == 2 and error == f"unified-rl: the run folder {run} was removed or replaced while the run was going on\n"
    )
    assert not run.exists()


def test_a_clock_that_jumps_back_changes_nothing(
    tmp_path: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(2_000_000_000, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    run = train(resolve_defaults(compose([*PPO, f"run_dir={tmp_path / 'run'}"])))
    assert differences(final(run), whole) == []
    seconds = [json.loads(line)["wall_seconds"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert seconds == sorted(seconds) and seconds[0] >= 0


# --------------------------------------------------------------------------------------------------------- going on


def cut_off(run: Path, monkeypatch: pytest.MonkeyPatch, before: str) -> None:
    """A run whose process vanishes in front of a function of the trainer."""

    class Vanished(BaseException):
        pass

    def vanish(*args: Any, **kwargs: Any) -> None:
        monkeypatch.setattr(loop.Trainer, "_rescue", lambda self, error: None)
        raise Vanished

    with pytest.raises(Vanished), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, before, vanish)
        train(resolve_defaults(compose([*PPO, f"run_dir={run}"])))
    monkeypatch.undo()
    meta = json.loads((run / "meta.json").read_text())
    from unified_rl.training.provenance import META, meta_text, write_run

    write_run(run, {META: meta_text({**meta, "status": "running"})})


@pytest.mark.parametrize("before", ["save", "_write"])
def test_a_run_killed_before_its_first_checkpoint_logs_no_row_twice(
    before: str,
    tmp_path: Path,
    whole: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    cut_off(run, monkeypatch, before)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4
    check_it_goes_on(run, whole)
    assert (
        "was cut off before its first checkpoint: it begins again, and makes 4 row(s) anew" in capsys.readouterr().err
    )


def test_a_run_whose_checkpoints_were_removed_is_refused(tmp_path: Path) -> None:
    run = train(resolve_defaults(compose([*PPO, f"run_dir={tmp_path / 'run'}"])))
    shutil.rmtree(run / "checkpoints")
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"is missing; put it back, or start a new run"):
        resume(str(run))
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_run_that_was_cut_off_says_so(
    tmp_path: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(loop.Trainer, "_rescue", lambda self, error: None)  # what os._exit leaves
    at(84, fail(RuntimeError()))
    command(run, capsys)
    monkeypatch.undo()
    from unified_rl.training.provenance import META, meta_text, write_run

    write_run(run, {META: meta_text({**json.loads((run / "meta.json").read_text()), "status": "running"})})
    check_it_goes_on(run, whole)
    assert "was cut off, its process ended without a word; it goes on from update 3" in capsys.readouterr().err


@pytest.mark.parametrize(("staleness", "half"), [(0, 80), (1, 48), (3, 80), (20, 48)])
def test_an_extended_run_is_the_whole_one(staleness: int, half: int, tmp_path: Path) -> None:
    task = [*PPO, f"rollout.staleness={staleness}", "log_every=32"]
    task = [text for text in task if text != "log_every=16"]
    for name, steps in (("whole", 128), ("parts", half)):
        again()
        own = [text for text in task if not text.startswith("steps=")]
        cfg = resolve_defaults(compose([*own, f"steps={steps}", f"run_dir={tmp_path / name}"]))
        train(cfg)
    assert read_checkpoint(checkpoints(tmp_path / "parts" / "checkpoints")[-1])["feed"]["rollout"]["steps"] == half
    again()
    resume(str(tmp_path / "parts"), steps=128)
    assert differences(final(tmp_path / "parts"), final(tmp_path / "whole")) == []


def test_an_extension_without_its_state_says_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(resolve_defaults(compose([*PPO, "rollout.staleness=2", f"run_dir={tmp_path / 'run'}"])))
    shutil.rmtree(run / "extension")
    for path in checkpoints(run / "checkpoints")[:-1]:
        shutil.rmtree(path)
    again()
    resume(str(run), steps=160)
    assert "keeps no state from before its end" in capsys.readouterr().err
    assert metrics_of(run)[-1]["steps"] == 160


# ------------------------------------------------------------------------------------------ environments with a will


def test_a_run_that_no_seed_determines_says_so_at_its_first_checkpoint_and_goes_on_with_new_episodes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng()
    Line.hook = staticmethod(lambda steps: (noise.random(2, dtype=np.float32), 0.0, False, False, {}))
    run = tmp_path / "run"
    code, error = command(run, capsys)
    assert code == 0 and error.count("can be resumed with new episodes only, not bit for bit") == 1
    with pytest.raises(RestoreError, match="not deterministic given its seed"):
        resume(str(run), steps=160, resume_env="exact")
    resume(str(run), steps=160)
    assert "goes on from update 8 with new episodes" in capsys.readouterr().err
    state = read_checkpoint(checkpoints(run / "checkpoints")[-1])
    assert state["updates"] == 10 and state["feed"]["rollout"]["steps"] == 160


def test_a_run_that_no_seed_determines_says_so_long_before_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise, made = np.random.default_rng(), iter(range(40))

    def answer(steps: int) -> Any:
        if next(made, None) is None:
            raise ValueError("no")
        return noise.random(2, dtype=np.float32), 0.0, False, False, {}

    Line.hook = staticmethod(answer)
    code, error = command(tmp_path / "run", capsys)
    assert code == 2 and "can be resumed with new episodes only" in error and "raised in step" in error


def test_restart_is_a_choice_and_another_word_is_refused(
    tmp_path: Path, whole: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    at(84, send(signal.SIGINT))
    assert command(run, capsys)[0] == 130
    for words in (["resume_env=maybe"], ["resume_env=restart"]):
        again()
        code = cli.main(["train", f"resume={run}", *words])
        error = capsys.readouterr().err
        assert (code, error.count("\n")) == ((2, 1) if words == ["resume_env=maybe"] else (0, 1))
    assert "goes on from update 6 with new episodes" in error
    found = final(run)
    assert [row["update"] for row in found["metrics"]] == list(range(9))
    assert found["state"]["feed"]["rollout"]["next_episode"] > whole["state"]["feed"]["rollout"]["next_episode"]


def test_errors_of_the_library_itself_are_not_taken_for_the_environments() -> None:
    from unified_rl.training.failures import foreign

    with pytest.raises(UnifiedRLError, match=r"^as it was$"), foreign("collecting rows"):
        raise CheckpointError("as it was")
    with pytest.raises(RolloutError, match=r"failed: TypeError"), foreign("collecting rows"):
        torch.zeros(1) + "x"  # type: ignore[operator]
