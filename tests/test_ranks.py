"""Runs of two processes: the weights and rows of one, one checkpoint and one line at the end, nobody left over."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_cases import forked
from run_cases import LANGUAGE, recorded, remembered

from unified_rl import cli, launching
from unified_rl.agents.policy_gradient import PolicyGradient
from unified_rl.errors import ConfigError, PeerError
from unified_rl.objectives.objective import Objective
from unified_rl.rollout import LanguageRollout
from unified_rl.training.checkpoint import FOLDER, checkpoints
from unified_rl.training.metrics import read_metrics
from unified_rl.training.state import load_state
from unified_rl.training.wire import decode, encode

QUIET = ["progress=false", "logger=[]", "eval_episodes=4", "eval_every=0", "log_every=1"]
WORDS = [*LANGUAGE, *QUIET, "agent=policy_gradient", "correction=dapo", "agent.epochs=2", "agent.minibatch=6",
         "agent.micro_batch=4", "rollout.staleness=1", "checkpoint_every=0", "--allow", "run_cases"]  # fmt: skip
CONTROL = ["env=two_route", "policy=gaussian", "policy.hidden=[8]", "agent=ppo", "agent.critic_hidden=[8]", *QUIET,
           "agent.epochs=3", "agent.minibatch=12", "agent.micro_batch=5", "rollout.num_envs=4", "rollout.horizon=8",
           "rollout.staleness=1"]  # fmt: skip
TEACHING = ["env=chain_mod", "policy=causal_lm_tiny", *(w for w in LANGUAGE if w.startswith("policy.config")), *QUIET,
            "agent=sft", "rollout=demonstrations", "rollout.rows=14", "agent.micro_batch=3"]  # fmt: skip
VALUED = ["env=two_route", "agent=sac", "policy.hidden=[8]", "agent.critic_hidden=[8]", *QUIET, "replay=priority",
          "agent.batch_size=15", "agent.learning_starts=32", "agent.updates_per_step=0.1", "rollout.num_envs=4",
          "rollout.horizon=8", "rollout.random_steps=32", "replay.capacity=512"]  # fmt: skip
LOGGED = ("loss/", "update/", "clip/", "reject/", "train/", "rollout/", "grad/", "eval/", "policy/", "ess/", "agent/")
WAIT = 60.0


@contextmanager
def processes(world: int, words: Sequence[str], folder: Path, before: Callable[[int], None] = int) -> Iterator[Any]:
    """Forked processes, as ``unified-rl launch`` would start them, that run a command; they are waited for."""
    folder.mkdir(exist_ok=True)

    def one(rank: int) -> int:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        before(rank)
        return cli.main(list(words))

    with forked(world, one, WAIT) as children:
        yield children


def together(words: Sequence[str], folder: Path, before: Callable[[int], None] = int, world: int = 2) -> list[int]:
    """Runs a command in so many processes; returns their exit codes."""
    with processes(world, words, folder, before) as children:
        pass
    return [child.exitcode for child in children]


def alone(words: Sequence[str]) -> None:
    with remembered():
        assert cli.main(list(words)) == 0


def said(folder: Path) -> str:
    """What all processes wrote to standard error."""
    return "".join(path.read_text() for path in sorted(folder.glob("err*")))


def weights(run: Path) -> torch.Tensor:
    state = load_state(checkpoints(run / FOLDER)[-1])["agent"]
    parts = [*state["policy"].values(), *(state.get("critic") or {}).values(), *(state.get("target") or {}).values()]
    return torch.cat([x.double().flatten() for x in parts])


def same(one: Path, other: Path) -> None:
    """Weights to 1e-6, and every logged row's metrics to 1e-5."""
    assert float((weights(one) - weights(other)).abs().max()) <= 1e-6
    rows, others = read_metrics(one / "metrics.jsonl"), read_metrics(other / "metrics.jsonl")
    assert len(rows) == len(others) > 1
    for row, found in zip(rows, others, strict=True):
        assert row.keys() == found.keys() and row["steps"] == found["steps"]
        for key in (key for key in row if key.startswith(LOGGED)):
            assert found[key] == pytest.approx(row[key], rel=1e-5, abs=1e-6), (row["update"], key)


def _collects_slowly(rank: int) -> None:
    collect = LanguageRollout.collect

    def slow(self: LanguageRollout, *given: Any) -> Any:
        time.sleep(0.3)
        return collect(self, *given)

    LanguageRollout.collect = slow  # type: ignore[method-assign]


def test_a_run_of_two_processes_is_that_of_one_and_goes_on_in_either_number(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    alone(["train", *WORDS, "updates=4", f"run_dir={one}"])
    words = ["train", *WORDS, "updates=4", "learner=data_parallel", f"run_dir={two}"]
    assert together(words, tmp_path / "a", _collects_slowly) == [0, 0]  # and nobody who waits complains
    assert said(tmp_path / "a") == "" and (tmp_path / "a" / "out1").read_text() == ""
    same(one, two)
    assert (two / "samples.jsonl").is_file() and json.loads((two / "meta.json").read_text())["status"] == "finished"
    allow = ["--allow", "run_cases"]
    assert together(["train", f"resume={one}", "updates=7", *allow], tmp_path / "b") == [0, 0]
    alone(["train", f"resume={two}", "updates=7", *allow])
    same(one, two)
    whole = tmp_path / "whole"
    alone(["train", *WORDS, "updates=7", f"run_dir={whole}"])
    assert float((weights(one) - weights(whole)).abs().max()) <= 1e-6


def _drifts(rank: int) -> None:
    """Process 1 ends every update with other weights, as rounding or code of its own might make them."""
    update = PolicyGradient.update

    def drifting(self: Any, *given: Any) -> Any:
        metrics = update(self, *given)
        with torch.no_grad():
            for weight in self.optimizer.parameters if rank == 1 else ():
                weight += 1e-3
        return metrics

    PolicyGradient.update = drifting  # type: ignore[method-assign]


OTHERS = {"control": CONTROL, "supervised": TEACHING, "valued": VALUED}


@pytest.mark.parametrize("name", OTHERS)
def test_other_agents_of_two_processes_are_those_of_one(name: str, tmp_path: Path) -> None:
    """In control process 0's weights are taken over at the end of every update, since the others drift."""
    words = [*OTHERS[name], "updates=4"]
    one, two = tmp_path / "one", tmp_path / "two"
    alone(["train", *words, f"run_dir={one}"])
    before = _drifts if name == "control" else int
    assert together(["train", *words, "learner=data_parallel", f"run_dir={two}"], tmp_path / "told", before) == [0, 0]
    same(one, two)


def _loses_its_loss(rank: int) -> None:
    found, count = Objective._micro_batch, 0

    def lost(self: Any, *given: Any) -> Any:
        nonlocal count
        count += 1
        return found(self, *given) * (torch.nan if rank == 1 and count == 4 else 1.0)

    Objective._micro_batch = lost  # type: ignore[method-assign]


def test_a_loss_that_is_not_finite_in_one_process_stops_all_with_one_line(tmp_path: Path) -> None:
    words = ["train", *CONTROL, "updates=4", "learner=data_parallel", f"run_dir={tmp_path / 'run'}"]
    assert together(words, tmp_path / "told", _loses_its_loss) == [2, 2]
    text = said(tmp_path / "told")
    assert text.count("\n") == 1 and "the loss is nan at optimiser step" in text


def _fails_in_its_third_update(rank: int) -> None:
    update = PolicyGradient.update

    def failing(self: Any, *given: Any) -> Any:
        if rank == 1 and self.version == 2:
            raise RuntimeError("out of luck")
        return update(self, *given)

    PolicyGradient.update = failing  # type: ignore[method-assign]


def test_an_error_in_one_process_ends_all_with_its_reason(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["train", *CONTROL, "updates=9", "checkpoint_every=32", "learner=data_parallel", f"run_dir={run}"]
    codes = together(words, tmp_path / "told", _fails_in_its_third_update)
    assert codes[0] == 2 and codes[1] != 0
    lines = (tmp_path / "told" / "err0").read_text().splitlines()
    assert len(lines) == 1 and "process 1 of this run failed: RuntimeError: out of luck" in lines[0]
    assert "update 2 is saved, go on with 'unified-rl launch --processes 2 train resume=" in lines[0]
    assert "in failing" in (run / "error.txt").read_text()
    assert [path.name for path in checkpoints(run / FOLDER)][-1].endswith("2")


def _sleeps_in_its_third_update(rank: int) -> None:
    update = PolicyGradient.update

    def asleep(self: Any, *given: Any) -> Any:
        if rank == 1 and self.version == 2:
            time.sleep(4.0)
        return update(self, *given)

    PolicyGradient.update = asleep  # type: ignore[method-assign]


def test_a_process_that_does_not_answer_ends_the_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["train", *CONTROL, "updates=9", "learner=data_parallel", "learner.timeout=0.5", f"run_dir={run}"]
    assert together(words, tmp_path / "told", _sleeps_in_its_third_update)[0] == 2
    lines = (tmp_path / "told" / "err0").read_text().splitlines()
    assert len(lines) == 1 and "did not answer within learner.timeout=0.5 seconds" in lines[0]


def wait_for_rows(run: Path, count: int) -> None:
    until = time.monotonic() + WAIT
    while not (run / "metrics.jsonl").is_file() or len((run / "metrics.jsonl").read_text().splitlines()) < count:
        assert time.monotonic() < until, "no rows"
        time.sleep(0.02)


def test_a_signal_for_one_process_ends_all_behind_one_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["train", *CONTROL, "updates=100000", "checkpoint_every=0", "learner=data_parallel", f"run_dir={run}"]
    with processes(2, words, tmp_path / "told") as children:
        wait_for_rows(run, 3)
        os.kill(children[1].pid, signal.SIGTERM)
    assert [child.exitcode for child in children] == [143, 143]
    assert said(tmp_path / "told") == "unified-rl: interrupted\n" and len(checkpoints(run / FOLDER)) == 1
    assert "is saved" in (tmp_path / "told" / "out0").read_text()


def children_of(pid: int) -> list[int]:
    out = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(word) for word in out.stdout.split()]


def test_nobody_outlives_a_launcher_that_was_killed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [*CONTROL, "updates=100000", "checkpoint_every=0", "learner=data_parallel", f"run_dir={run}"]
    command = [sys.executable, "-m", "unified_rl.cli", "launch", "--processes", "2", "train", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as launcher:
        wait_for_rows(run, 2)
        children = children_of(launcher.pid)
        assert len(children) == 2
        launcher.kill()
        until = time.monotonic() + WAIT
        while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < until:
            time.sleep(0.05)
        assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    assert len(checkpoints(run / FOLDER)) == 1


# ---------------------------------------------------------------------------------------------- the launcher

SCRIPT = "import os, signal, sys, time; rank = int(os.environ['RANK']); "


@pytest.mark.parametrize(
    ("script", "code", "line"),
    [
        ("sys.exit(0 if os.environ['WORLD_SIZE'] == '3' else 9)", 0, ""),
        ("sys.exit(2 if rank == 0 else 0)", 2, ""),
        ("time.sleep(0 if rank == 1 else 30); sys.exit(2)", 143, "process 0 was ended by SIGTERM"),
        ("os.kill(os.getpid(), 9) if rank == 0 else time.sleep(30)", 137, "process 0 was ended by SIGKILL"),
        ("signal.signal(15, signal.SIG_IGN); time.sleep(0 if rank == 1 else 30); sys.exit(2)", 137, "by SIGKILL"),
    ],
)
def test_a_process_that_fails_takes_the_others_along(
    script: str, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launching, "COMMAND", (sys.executable, "-S", "-c", SCRIPT + script))
    monkeypatch.setattr(launching, "GRACE", (0.2, 0.2, 0.2))
    assert launching.launch(3, ["train"]) == code
    text = capsys.readouterr().err
    assert line in text and text.count("\n") == bool(line)


def test_what_a_launch_is_refused_for() -> None:
    for words, told in (
        (["compare"], "was given 'compare'"),
        ([], "was given nothing"),
        (["train", "--plan"], "--plan is of one process"),
        (["train", "-m", "seed=1,2"], "-m is of one process"),
    ):
        with pytest.raises(ConfigError, match=told):
            launching.launch(2, words)
    with pytest.raises(ConfigError, match="--processes 0"):
        launching.launch(0, ["train"])


@pytest.mark.parametrize(
    ("environ", "words", "told"),
    [
        ({}, ["learner=data_parallel"], "unified-rl launch --processes N train"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, [], "add learner=data_parallel"),
        ({"RANK": "5", "WORLD_SIZE": "2"}, ["learner=data_parallel"], "RANK=5"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, ["learner=data_parallel", "replay.storage=memmap", "replay.path=x"],
         "replay.storage=memory"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, ["learner=data_parallel", "device=cuda:0"], "device=cuda"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, ["learner=data_parallel", "steps=0"], "steps=0"),
    ],
)  # fmt: skip
def test_a_learner_and_a_start_that_do_not_fit_are_refused(
    environ: dict[str, str], words: list[str], told: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:  # fmt: skip
    for key, value in environ.items():
        monkeypatch.setenv(key, value)
    run = tmp_path / "run"
    assert cli.main(["train", *CONTROL, *words, f"run_dir={run}"]) == 2
    text = capsys.readouterr().err
    assert told in text and text.count("\n") == 1 and not run.exists()


def test_agents_that_cannot_divide_their_passes_are_refused_by_name(tmp_path: Path) -> None:
    pytest.importorskip("stable_baselines3")
    run = tmp_path / "run"
    words = ["train", "env=two_route", "agent=sb3_sac", "steps=64", "learner=data_parallel", f"run_dir={run}"]
    assert together(words, tmp_path / "told", world=1) == [2]
    assert "agent=sb3_sac is none of them: set learner=single" in said(tmp_path / "told") and not run.exists()


def test_a_port_that_is_taken_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for key, value in given.items():
            monkeypatch.setenv(key, value)
        run = tmp_path / "run"
        assert cli.main(["train", *CONTROL, "learner=data_parallel", f"run_dir={run}"]) == 2
    text = capsys.readouterr().err
    assert f"port {port} of this machine is in use" in text and "set MASTER_PORT" in text
    assert text.count("\n") == 1 and not run.exists()


def _stands_elsewhere(rank: int) -> None:
    if rank == 1:
        os.chdir("/")


def test_a_process_that_does_not_see_the_data_ends_all_with_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A relative path leads one of them nowhere, as a disk that another machine lacks would."""
    monkeypatch.chdir(tmp_path)
    recorded(tmp_path / "rows", [*CONTROL[:3], "agent=ppo", "rollout.num_envs=4", "rollout.horizon=8"])
    words = ["train", "env=two_route", "recipe=iql", "rollout.data=rows", "rollout.rows=32", *QUIET, "updates=2",
             "policy.hidden=[8]", "agent.critic_hidden=[8]", "learner=data_parallel", "run_dir=run"]  # fmt: skip
    codes = together(words, tmp_path / "told", _stands_elsewhere)
    assert codes[0] == 2 and codes[1] != 0
    lines = (tmp_path / "told" / "err0").read_text().splitlines()
    assert len(lines) == 1 and "process 1 of this run failed" in lines[0] and "rows" in lines[0]
    assert "under one path on every machine" in lines[0]


def test_an_assembled_run_is_of_one_process() -> None:
    import unified_rl as ur

    with pytest.raises(ConfigError, match="learner=data_parallel trains in several processes"):
        ur.assemble("two_route", agent="ppo", learner="data_parallel")


# ---------------------------------------------------------------------------------------------- what is sent


def test_state_arrives_as_it_was_sent() -> None:
    value = {
        "tensors": [torch.arange(6).view(2, 3), torch.zeros(0, 4), torch.tensor(True), torch.tensor(1.5).bfloat16()],
        "plain": (1, 2.5, None, "x", {3: "three"}),
    }
    found = decode(*encode(value))
    for got, want in zip(found["tensors"], value["tensors"], strict=True):
        assert torch.equal(got, want) and got.dtype == want.dtype
    assert found["plain"] == value["plain"]


def test_what_nobody_encoded_is_one_error() -> None:
    header, data = encode({"x": torch.zeros(4)})
    for wrong in ((header[:-5], data), (header, data[:3]), (torch.zeros(0, dtype=torch.uint8), data)):
        with pytest.raises(PeerError, match="cannot be read"):
            decode(*wrong)
