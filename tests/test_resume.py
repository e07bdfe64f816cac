"""N steps equal k steps, a kill, a resume and N - k steps: bit for bit, replay included, in both domains."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from unified_rl.config import compose
from unified_rl.errors import CheckpointError, ConfigError
from unified_rl.training.checkpoint import checkpoints, read_checkpoint
from unified_rl.training.provenance import read_meta
from unified_rl.training.run import Job, resume, train
from unified_rl.training.verify import verify_folder

COMMON = ["progress=false", "eval_every=0", "eval_episodes=2", "keep_checkpoints=100", "seed=3"]
LANGUAGE = [
    "env=chain_mod",
    "env.modulus=5",
    "env.terms=3",
    "policy=causal_lm_tiny",
    "agent=policy_gradient",
    "correction=decoupled_ppo",
    "rollout.prompts=4",
    "rollout.group_size=4",
    "rollout.staleness=2",
]


def control(env: str, staleness: int = 1) -> list[str]:
    return [
        f"env={env}",
        "agent=ppo",
        "correction=tis",
        "agent.minibatch=16",
        "agent.epochs=2",
        "rollout.num_envs=2",
        "rollout.horizon=16",
        f"rollout.staleness={staleness}",
    ]


CASES = {
    "ant": ([*control("ant"), "steps=256", "checkpoint_every=64"]),
    "humanoid": ([*control("humanoid"), "steps=192", "checkpoint_every=64"]),
    "pusher": ([*control("pusher"), "steps=320", "checkpoint_every=64"]),
    "gsde": [
        *control("inverted_pendulum"),
        "policy=gaussian",
        "policy.gsde=true",
        "policy.gsde_every=5",
        "steps=256",
        "checkpoint_every=64",
    ],
    "sac_ant": [
        "env=ant",
        "agent=sac",
        "agent.learning_starts=20",
        "agent.batch_size=16",
        "rollout.random_steps=20",
        "policy.hidden=[16]",
        "agent.critic_hidden=[16]",
        "steps=60",
        "checkpoint_every=20",
    ],
    "language": ([*LANGUAGE, "steps=96", "checkpoint_every=16"]),
}


def config(name: str, folder: Path) -> dict[str, Any]:
    return compose([*COMMON, *CASES[name], f"run_dir={folder}"])


def equal(a: Any, b: Any, path: str = "") -> None:
    """Every tensor and value is the same, but for the clock."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(torch.nan_to_num(a.double()), torch.nan_to_num(b.double())), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            if key != "elapsed":
                equal(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            equal(x, y, f"{path}/{index}")
    else:
        assert a == b or (a != a and b != b), path


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "wall_seconds"} for row in rows]


@pytest.mark.parametrize("name", list(CASES))
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole = train(config(name, tmp_path / "whole"))
    saves = checkpoints(whole / "checkpoints")
    assert len(saves) >= 3
    final = read_checkpoint(saves[-1])
    for save in saves[:-1]:
        part = tmp_path / save.name
        cut_run(whole, part, save)
        resume(str(part))
        equal(final, read_checkpoint(checkpoints(part / "checkpoints")[-1]))
        same_files(saves[-1] / "replay", checkpoints(part / "checkpoints")[-1] / "replay")
        assert rows_of(part) == rows_of(whole)


def cut_run(whole: Path, part: Path, save: Path) -> None:
    """A copy of a run as a kill right after one of its checkpoints left it."""
    import shutil

    shutil.copytree(whole, part)
    for later in checkpoints(part / "checkpoints"):
        if later.name > save.name:
            shutil.rmtree(later)


def same_files(a: Path, b: Path) -> None:
    """Two saved replays hold the same rows and the same bookkeeping (their data files have random names)."""
    content = []
    for folder in (a, b):
        rows = list(folder.glob("rows-*.safetensors"))
        assert len(rows) == 1
        content.append((rows[0].read_bytes(), (folder / "replay.json").read_text().replace(rows[0].name, "rows")))
    assert content[0] == content[1]


def test_a_process_killed_at_any_moment_resumes_to_the_same_result(tmp_path: Path) -> None:
    whole = train(config("pusher", tmp_path / "whole"))
    killed = tmp_path / "killed"
    code = (
        "import sys; from unified_rl.config import compose; from unified_rl.training.run import train;"
        "train(compose(sys.argv[1:]))"
    )
    overrides = [*COMMON, *CASES["pusher"], f"run_dir={killed}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", code, *overrides], env=environment)
    deadline = time.monotonic() + 120
    while len(checkpoints(killed / "checkpoints")) < 2 and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert checkpoints(killed / "checkpoints")
    resume(str(killed))
    last = [checkpoints(run / "checkpoints")[-1] for run in (whole, killed)]
    equal(read_checkpoint(last[0]), read_checkpoint(last[1]))


def test_staleness_is_what_was_asked_for_and_budgets_are_equal(tmp_path: Path) -> None:
    lags: dict[int, list[int]] = {}
    for staleness in (0, 2):
        overrides = [*COMMON, *control("pusher", staleness), "steps=192"]
        trainer = Job(compose(overrides)).make_trainer(tmp_path / str(staleness))
        tmp_path.joinpath(str(staleness)).mkdir()
        draw, seen = trainer.agent._draw, []
        trainer.agent._draw = lambda replay, d=draw, s=seen, a=trainer.agent: _note(d(replay), s, a)  # type: ignore[method-assign,misc]
        trainer.run()
        lags[staleness] = seen
        assert trainer.feed.admitted == trainer.updates == 6 and trainer.rollout.steps == 192
    assert lags == {0: [0] * 6, 2: [0, 1, 2, 2, 2, 2]}


def _note(record: Any, seen: list[int], agent: Any) -> Any:
    lag = agent.version - record["policy_version"]
    assert lag.min() == lag.max()
    seen.append(int(lag.max()))
    return record


def test_a_finished_run_is_not_trained_again_and_a_taken_folder_is_refused(tmp_path: Path) -> None:
    cfg = config("pusher", tmp_path / "run")
    train(cfg)
    with pytest.raises(CheckpointError, match="holds a run already"):
        train(cfg)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    left = tmp_path / "run" / ".writing-MANIFEST.json"
    left.touch()  # by a process that was killed when all but a rename was done
    train({**cfg, "resume_existing": True})
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before and not left.exists()


def test_resume_goes_on_to_more_steps(tmp_path: Path) -> None:
    folder = train(config("pusher", tmp_path / "run"))
    resume(str(folder), steps=384)
    assert rows_of(folder)[-1]["steps"] == 384


def test_a_run_that_was_refused_before_its_first_update_is_begun_anew(tmp_path: Path) -> None:
    cfg = {**config("language", tmp_path / "run"), "keep_best": "eval/acuracy"}
    with pytest.raises(ConfigError, match="did you mean 'eval/accuracy'"):
        train(cfg)
    folder = train({**cfg, "keep_best": "eval/accuracy", "seed": 5})
    whole = train({**config("language", tmp_path / "whole"), "keep_best": "eval/accuracy", "seed": 5})
    assert [r["update"] for r in rows_of(folder)] == [r["update"] for r in rows_of(whole)]
    assert (folder / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    assert read_meta(folder)["status"] == "finished"
    verify_folder(str(folder))
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    steps = [event.step for event in events.Scalars("eval/score")]
    assert steps == sorted(set(steps))
