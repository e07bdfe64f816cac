"""What is killed: short programs that write files, how they go on, and how two results are compared."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

COMMON = ("progress=false", "eval_episodes=1", "seed=3", "keep_checkpoints=2", "threads=1")
LANGUAGE = (
    "env=chain_mod", "env.modulus=5", "env.terms=2", "env.max_turn_tokens=6", "policy=causal_lm_tiny",
    "policy.config.hidden_size=16", "policy.config.num_attention_heads=2", "policy.config.num_hidden_layers=1",
    "policy.config.intermediate_size=32", "rollout.prompts=2", "rollout.group_size=4", "agent=policy_gradient",
    "correction=decoupled_ppo", "steps=72", "log_every=8", "eval_every=32", "checkpoint_every=16",
    "samples_every=8", "samples_rows=2", "keep_best=eval/length",
)  # fmt: skip
SAC = (
    "agent=sac", "agent.learning_starts=8", "agent.batch_size=8", "rollout.random_steps=8", "rollout.horizon=1",
    "policy.hidden=[16]", "agent.critic_hidden=[16]", "replay.capacity=1000", "steps=40", "log_every=5",
    "eval_every=20", "checkpoint_every=10",
)  # fmt: skip
PPO = (
    "agent=ppo", "correction=tis", "policy.hidden=[16]", "agent.critic_hidden=[16]", "rollout.num_envs=2",
    "rollout.horizon=8", "agent.minibatch=8", "agent.epochs=2", "steps=112", "log_every=16", "eval_every=0",
    "checkpoint_every=32",
)  # fmt: skip
FLOW = (
    "env=two_route", "policy=flow", "policy.hidden=[16]", "agent=policy_gradient", "agent.critic_hidden=[16]",
    "correction=ppo", "warm_start=demonstrations", "warm_start.stages=[{{updates: 5}}]",
    "warm_start.batch_size=32", "rollout.num_envs=4",
    "rollout.horizon=4", "agent.minibatch=8", "agent.epochs=1", "steps=96", "log_every=16", "eval_every=48",
    "checkpoint_every=32",
)  # fmt: skip
RUNS: dict[str, tuple[str, ...]] = {
    "language": LANGUAGE,
    "language_stale3": (*LANGUAGE, "rollout.staleness=3"),
    "pendulum_sac": ("env=pendulum", *SAC),
    "gymnasium_sac": ("env=gymnasium", "env.id=Pendulum-v1", *SAC),
    "half_cheetah_ppo": ("env=half_cheetah", *PPO, "rollout.staleness=1"),
    "half_cheetah_sac": ("env=half_cheetah", *(text for text in SAC if text != "eval_every=20"), "eval_every=0"),
    "flow_warm_start": FLOW,
    "cloning": (
        "env=two_route", "policy=flow", "policy.hidden=[16]", "agent=behavior_cloning", "rollout.rows=16",
        "steps=160", "log_every=16", "eval_every=64", "checkpoint_every=48",
    ),
    "fine_tuning": (*LANGUAGE[:9], "agent=sft", "rollout.rows=8", *LANGUAGE[-7:]),
    "memory_mapped_sac": ("env=pendulum", *SAC, "replay.storage=memmap", "replay.path={folder}/rows"),
}  # fmt: skip
EXTENDED = RUNS["language_stale3"]
STUDY = (
    "env=two_route", "policy=gaussian", "policy.hidden=[8]", "agent=policy_gradient", "agent.critic_hidden=[8]",
    "rollout.num_envs=2", "rollout.horizon=4", "agent.minibatch=4", "agent.epochs=1", "steps=32", "log_every=8",
    "eval_every=16", "eval_episodes=2", "checkpoint_every=16", "threads=1",
)  # fmt: skip


@dataclass(frozen=True)
class Scenario:
    """A program.

    Attributes:
        name: of the scenario.
        go: begins or goes on in a folder, whatever is in it; ends when the work is done.
        result: what the work left behind, for comparison.
        prepare: made once, beside the folders, before anything is killed.
        whole: another program with the same result, to compare with.
        spawns: it works in processes of its own, each of which may be killed as well.
    """

    name: str
    go: Callable[[Path], None]
    result: Callable[[Path], Any]
    prepare: Callable[[Path], None] = lambda place: None
    whole: Callable[[Path], None] | None = None
    spawns: bool = False


def scenarios() -> dict[str, Scenario]:
    """All of them, by name."""
    found = [Scenario(name, _run(overrides), run_result) for name, overrides in RUNS.items()]
    found += [
        Scenario("extended", _extended, run_result, whole=_run(EXTENDED)),
        Scenario("study", _study, study_result),
        Scenario("study_workers", partial(_study, workers=2), study_result, spawns=True),
        Scenario("recording", _recording, lambda folder: rows_result(folder / "recorded"), _train_source),
        Scenario("replay", _replay, lambda folder: rows_result(folder / "saved")),
    ]
    return {scenario.name: scenario for scenario in found}


# ---------------------------------------------------------------------------------------------------------- programs


def _run(overrides: Sequence[str]) -> Callable[[Path], None]:
    def go(folder: Path) -> None:
        train_or_resume([text.format(folder=folder) for text in (*COMMON, *overrides)], folder / "run")

    if "{folder}/rows" not in "".join(overrides):
        go.warm = lambda: composed(tuple(text.format() for text in (*COMMON, *overrides)))  # type: ignore[attr-defined]
    return go


def train_or_resume(overrides: Sequence[str], run: Path, steps: int | None = None) -> None:
    """What a user does: the command, and when it was cut off, ``resume=`` where there is a run, else it again."""
    from unified_rl.training.run import resume, train

    if (run / "config.yaml").exists() and (run / "metrics.jsonl").exists():
        resume(str(run), steps)
    else:
        cfg = composed(tuple(overrides))
        train({**cfg, "run_dir": str(run)})


@cache
def composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    """A resolved configuration; the process that forks the others makes it once."""
    from unified_rl.config import compose, resolve_defaults

    return resolve_defaults(compose(list(overrides)))


def _extended(folder: Path) -> None:
    """A finished run of half the budget, extended: what is left behind is that of a whole one."""
    run = folder / "run"
    if not (folder / "half_done").exists():
        train_or_resume([*COMMON, *(text for text in EXTENDED if text != "steps=72"), "steps=40"], run)
        (folder / "half_done").touch()
    train_or_resume([], run, steps=72)


def _study(folder: Path, workers: int = 0) -> None:
    """A grid of two runs, in this process or in others, and its report."""
    from unified_rl.study.compare import compare

    node = {"name": "s", "folder": str(folder / "study"), "domains": {"control": list(STUDY)}, "workers": workers}
    compare({"study": {**node, "corrections": ["ppo", "tis"], "seeds": [1]}}, progress=False)


def _recording(folder: Path) -> None:
    """Rows of a trained policy, as ``unified-rl evaluate RUN --record FOLDER`` writes them."""
    from unified_rl.training.run import evaluated

    if not (folder / "recorded" / "replay.json").exists():
        evaluated(str(folder.parent / "source" / "run"), record=str(folder / "recorded"))


def _train_source(place: Path) -> None:
    _run(("env=pendulum", *SAC))(place / "source")


def _replay(folder: Path) -> None:
    """Writes and draws of a memory-mapped replay, each of which commits, and a save of it in the end."""
    from unified_rl.replay import Priority, Replay

    replay = Replay(60, sampler=Priority(), storage="memmap", path=str(folder / "live"), seed=5)
    while replay.write_count < 200:
        first, count = replay.write_count, 1 + replay.write_count * 7 % 6
        x = torch.arange(first, first + count)
        replay.extend({"x": x, "wide": (x[:, None] * 1_000 + torch.arange(8)).double(), "policy_version": x // 10})
    replay.dumps(folder / "saved")
    replay.close()


# --------------------------------------------------------------------------------------------------------- comparison


def run_result(folder: Path) -> dict[str, Any]:
    """Everything that a finished run is: final state, replay, every row of metrics, and no litter."""
    from unified_rl.training.checkpoint import checkpoints, read_checkpoint

    run = folder / "run"
    if (run / "extension").is_dir():
        assert checkpoints(run / "extension"), "an extension that holds nothing"
    last = checkpoints(run / "checkpoints")[-1]
    state = read_checkpoint(last)
    state.pop("elapsed")
    return {
        "checkpoint": last.name,
        "state": state,
        "replay": rows_result(last / "replay"),
        "metrics": metrics_of(run),
        "samples": (run / "samples.jsonl").read_text() if (run / "samples.jsonl").exists() else None,
        "best": [path.name for path in checkpoints(run / "best")],
        "status": json.loads((run / "meta.json").read_text())["status"],
        "litter": litter(run),
    }


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """Rows without the clock; the CSV must hold the same."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    with open(run / "metrics.csv", newline="") as handle:
        table = [int(row["update"]) for row in csv.DictReader(handle)]
    assert table == [row["update"] for row in rows], "the CSV has other rows than the record"
    return [{k: v for k, v in row.items() if k != "wall_seconds"} for row in rows]


def rows_result(folder: Path) -> dict[str, Any] | None:
    """A saved replay: its rows and its bookkeeping, without the random names of its files and what depends on them."""
    if not folder.is_dir():
        return None
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 1, f"{folder} holds {[f.name for f in files]}"
    book = json.loads((folder / "replay.json").read_text().replace(files[0].name, "rows"))
    return {"rows": load_file(files[0]), "book": {k: v for k, v in book.items() if "sha" not in k and k != "digest"}}


def study_result(folder: Path) -> dict[str, Any]:
    """Metrics of every run, and the tables."""
    study = folder / "study"
    runs = {run.name: metrics_of(run) for run in sorted((study / "runs").iterdir())}
    assert (study / "report.html").stat().st_size > 10_000
    return {"runs": runs, "results": (study / "results.csv").read_text(), "litter": litter(study)}


def litter(folder: Path) -> list[str]:
    """Files and folders that are only there while something is written."""
    names = [path.name for path in folder.rglob(".*") if path.name != ".lock"]
    return [*names, *(path.name for path in folder.rglob("*.writing"))]


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Places where two results are not the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
        if same and a.is_floating_point():
            a, b = a.nan_to_num(nan=7e30), b.nan_to_num(nan=7e30)
        return [] if same and torch.equal(a, b) else [path]
    if type(a) is not type(b):
        return [f"{path}: {type(a).__name__} and {type(b).__name__}"]
    if isinstance(a, dict):
        missing = [f"{path}/{key} is in one only" for key in a.keys() ^ b.keys()]
        return missing + [line for key in a.keys() & b.keys() for line in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{path}: {len(a)} and {len(b)} entries: {_short(a)} and {_short(b)}"]
        return [line for i, (x, y) in enumerate(zip(a, b, strict=True)) for line in differences(x, y, f"{path}/{i}")]
    return [] if a == b or (a != a and b != b) else [f"{path}: {a!r:.60} and {b!r:.60}"]


def _short(value: Sequence[Any]) -> str:
    return str([v.get("update", "?") if isinstance(v, dict) else v for v in value])[:200]


def forget(folder: Path) -> None:
    """Removes a folder."""
    shutil.rmtree(folder, ignore_errors=True)
