"""Whole runs: build everything from a configuration, train, resume, evaluate."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from unified_rl import __version__
from unified_rl.config import build
from unified_rl.errors import CheckpointError, ConfigError
from unified_rl.instantiate import locate, parameters
from unified_rl.rollout import as_environment
from unified_rl.training.checkpoint import latest_checkpoint, lock_run, read_checkpoint, write_json
from unified_rl.training.display import Display
from unified_rl.training.evaluation import evaluate_control, evaluate_language
from unified_rl.training.seeding import derive, generator, scoped
from unified_rl.training.settings import TrainSettings
from unified_rl.training.trainer import Trainer

NODES = ("env", "policy", "agent", "correction", "replay", "rollout", "warm_start")
PACKAGES = ("torch", "tensordict", "torchrl", "transformers", "gymnasium", "mujoco", "stable-baselines3", "numpy")


class Job:
    """Everything a run is made of, built from its configuration.

    Args:
        cfg: a composed configuration: nodes of :data:`NODES` and the scalars of
            :class:`~unified_rl.training.settings.TrainSettings`.
        allow: prefixes beside ``unified_rl.`` that configuration may build.

    Raises:
        ConfigError: parts that do not fit together.
    """

    def __init__(self, cfg: dict[str, Any], allow: Sequence[str] = ()) -> None:
        self.cfg, self.allow = cfg, list(allow)
        names = {field.name for field in dataclasses.fields(TrainSettings)}
        self.settings = TrainSettings(**{k: v for k, v in cfg.items() if k in names})
        self.device = _device(self.settings.device)
        torch.set_num_threads(self.settings.threads)
        self.seed = self.settings.seed
        rollout = dict(cfg.get("rollout") or {})
        self.collects = bool(rollout)
        sizes = {"num_envs": rollout.get("num_envs", 16) if rollout else cfg["agent"].get("num_envs", 1)}
        self.env = self._environment("env", **sizes)
        self.language = self.env.domain == "language"
        self.eval_env: Any = None
        with scoped(self.seed, "policy"):
            inputs = self.env.policy_inputs()
            self.policy = build(cfg["policy"], allow=self.allow, seed=self._integer("policy"), **inputs)
        self.policy = self.policy.to(self.device)
        node = cfg.get("correction")
        self.correction = build(node, allow=self.allow) if node else None

    def _integer(self, name: str) -> int:
        return derive(self.seed, name) % 2**31

    def _environment(self, stream: str, **sizes: Any) -> Any:
        node = self.cfg.get("env")
        if not node:
            raise ConfigError("this run has no environment; choose one with env=NAME")
        taken, takes_any = parameters(locate(node["_target_"], self.allow), self.allow)
        sizes = {key: value for key, value in sizes.items() if takes_any or key in taken}
        return as_environment(build(node, allow=self.allow, seed=self._integer(stream), **sizes))

    def make_trainer(self, folder: Path, display: Any = None) -> Trainer:
        """Agent, rollout and replay around the policy as it is now (after any warm start)."""
        agent_node, device = dict(self.cfg["agent"]), str(self.device)
        if not self.collects:
            agent = build(agent_node, allow=self.allow, policy=self.policy, env=self.env, seed=self._integer("agent"))
            self.policy = agent.policy
            return Trainer(self.settings, folder, agent, None, None, self.evaluate, display)
        rollout_node = dict(self.cfg["rollout"])
        rows, length = _sizes(rollout_node, self.language)
        agent = build(
            agent_node,
            allow=self.allow,
            policy=self.policy,
            correction=self.correction,
            generator=generator(self.seed, "agent", self.device),
            rows=rows,
            length=length,
            device=device,
            seed=self._integer("agent"),
        )
        streams = {"generator": generator(self.seed, "rollout", self.device)}
        if self.language:
            streams["problem_generator"] = generator(self.seed, "problems")
        rollout = build(
            rollout_node,
            allow=self.allow,
            env=self.env,
            policy=self.policy,
            gamma=agent.gamma,
            device=device,
            **streams,
        )
        replay = self._replay(rollout, rows, length)
        return Trainer(self.settings, folder, agent, rollout, replay, self.evaluate, display)

    def _replay(self, rollout: Any, rows: int, length: int | None) -> Any:
        node = dict(self.cfg["replay"])
        lanes = 1 if length is None else rows
        per_collect = rows * (length or 1)
        needed = per_collect * (rollout.staleness + 2)
        if "Fresh" in str((node.get("sampler") or {}).get("_target_", "")):
            node["capacity"] = needed  # a queue holds what waits and no more
        extra = {"lanes": lanes, "seed": self._integer("replay"), "cut": False}  # agents mind where episodes end
        return build(node, allow=self.allow, **extra)

    def evaluate(self) -> dict[str, float]:
        """Held-out evaluation with streams of its own, the same at every call."""
        seed = self._integer("evaluation")
        count = self.settings.eval_episodes
        if self.eval_env is None:
            self.eval_env = self._environment("evaluation", num_envs=count)
        if self.language:
            return evaluate_language(self.eval_env, self.policy, count, seed)
        stream = generator(self.seed, "evaluation", self.device)
        return evaluate_control(
            self.eval_env, self.policy, seed, stream, self.settings.eval_deterministic, str(self.device)
        )

    def warm_start(self, report: Callable[..., None]) -> None:
        """Runs the warm start that the configuration names, if any."""
        node = self.cfg.get("warm_start")
        if not node:
            return
        stage = build(node, allow=self.allow)
        if stage.run is not None:
            stage.load_policy(self.policy)
            return

        def make_agent(lr: float) -> Any:
            target = {"_target_": "unified_rl.agents.behavior_cloning.BehaviorCloning", "lr": lr}
            stream = generator(self.seed, "warm_start_loss", self.device)
            return build(target, policy=self.policy, generator=stream, rows=stage.batch_size, device=str(self.device))

        stage.fit(self.env, make_agent, generator(self.seed, "demonstrations"), report)


def _sizes(rollout: dict[str, Any], language: bool) -> tuple[int, int | None]:
    """Rows of one collection, and steps of a control row."""
    import inspect

    from unified_rl.rollout import ControlRollout, DemonstrationRollout, LanguageRollout

    if str(rollout["_target_"]).endswith((DemonstrationRollout.__name__, "StoredRollout")):
        return int(rollout.get("rows", inspect.signature(DemonstrationRollout).parameters["rows"].default)), None
    signature = inspect.signature(LanguageRollout if language else ControlRollout)
    value = {name: rollout.get(name, p.default) for name, p in signature.parameters.items()}
    if language:
        prompts = int(value["prompts"])
        joined = sum(build(node).count(prompts) for node in (value["sources"] or {}).values())
        return prompts * int(value["group_size"]) + joined, None
    return int(value["num_envs"]), int(value["horizon"])


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name} is not a device; use cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={name}, but torch {torch.__version__} sees no CUDA device; use device=cpu")
    return device


# ---------------------------------------------------------------------- verbs


def train(cfg: dict[str, Any], allow: Sequence[str] = (), *, progress: bool | None = None) -> Path:
    """Trains one run to its budget.

    Args:
        cfg: composed configuration.
        allow: prefixes that configuration may build beside ``unified_rl.``.
        progress: show a progress display; by default as the configuration says.

    Returns:
        The run folder: ``config.yaml``, ``meta.json``, ``metrics.csv``, ``metrics.jsonl``, ``tensorboard/`` and
        ``checkpoints/``.

    Raises:
        CheckpointError: the folder is in use, or holds a run already.
    """
    folder = run_folder(cfg)
    with lock_run(folder):
        unfinished = (folder / "meta.json").exists() and (folder / "metrics.jsonl").exists()  # else it never began
        if unfinished and not cfg.get("resume_existing"):
            raise CheckpointError(
                f"{folder} holds a run already; continue it with 'unified-rl train resume={folder}' "
                "or choose another name="
            )
        if not unfinished:
            (folder / "config.yaml").write_text(yaml.safe_dump(cfg, sort_keys=False))
            write_json(folder / "meta.json", {**_provenance(cfg), "status": "running"})
        elif json.loads((folder / "meta.json").read_text()).get("status") == "finished":
            return folder
        _train_in(folder, cfg, allow, progress)
    return folder


def resume(run: str, steps: int | None = None, allow: Sequence[str] = (), *, progress: bool | None = None) -> Path:
    """Continues a run from its last checkpoint, to ``steps`` if given.

    Raises:
        CheckpointError: no such run, or it is in use.
    """
    folder = Path(run)
    cfg = read_config(folder)
    with lock_run(folder):
        if steps is not None:
            cfg["steps"] = steps
            (folder / "config.yaml").write_text(yaml.safe_dump(cfg, sort_keys=False))
        _train_in(folder, cfg, allow, progress)
    return folder


def _train_in(folder: Path, cfg: dict[str, Any], allow: Sequence[str], progress: bool | None) -> None:
    shown = cfg.get("progress", True) if progress is None else progress
    display = Display(folder.name, int(cfg.get("steps", 100_000))) if shown else None
    with display or nullcontext(), _status(folder):
        job = Job(cfg, allow)
        found = sorted((folder / "checkpoints").glob("step_*"))
        if found:
            trainer = job.make_trainer(folder, display.update if display else None)
            trainer.load_state_dict(read_checkpoint(found[-1]), found[-1])
        else:
            job.warm_start(display.warm_start if display else lambda *args: None)
            trainer = job.make_trainer(folder, display.update if display else None)
        trainer.run()


def evaluate_run(
    run: str, episodes: int | None = None, allow: Sequence[str] = (), record: str | None = None
) -> dict[str, float]:
    """Evaluates the newest checkpoint of a run on held-out problems or seeds, and prints the result.

    Args:
        run: the run folder.
        episodes: episodes or prompts, by default as the run's evaluation.
        allow: prefixes that configuration may build.
        record: folder to write the evaluated policy's rows to, as a replay that other runs can train on.
    """
    folder = Path(run)
    cfg = read_config(folder)
    if episodes is not None:
        cfg["eval_episodes"] = episodes
    job = Job(cfg, allow)
    state = read_checkpoint(latest_checkpoint(folder))
    job.policy = load_policy(job, state)
    metrics = job.evaluate()
    for key, value in metrics.items():
        print(f"{key:28s} {value:.4f}")
    if record is not None:
        count = record_dataset(job, Path(record))
        print(f"{'recorded rows':28s} {count}")
    return metrics


def load_policy(job: Job, state: dict[str, Any]) -> Any:
    """The policy of a checkpoint, in the job's device."""
    if not job.collects:
        job.make_trainer(Path(job.cfg.get("run_dir") or "."))  # such agents bring their own policy
    job.policy.load_state_dict(state["agent"]["policy"])
    return job.policy


def record_dataset(job: Job, folder: Path, batches: int = 8) -> int:
    """Rolls the job's policy out and writes the rows as a replay folder; returns how many."""
    from unified_rl.replay import Replay, Uniform
    from unified_rl.rollout import ControlRollout, LanguageRollout

    stream, gamma = generator(job.seed, "record", job.device), 1.0 if job.language else 0.99
    if job.language:
        rollout: Any = LanguageRollout(
            job.env, job.policy, gamma, stream, generator(job.seed, "record_problems"), device=str(job.device)
        )
    else:
        rollout = ControlRollout(job.env, job.policy, gamma, stream, horizon=256, device=str(job.device))
    lanes = 1 if job.language else job.env.num_envs
    replay = Replay(rollout.steps_per_collect * batches, lanes=lanes, sampler=Uniform())
    for _ in range(batches):
        replay.extend(rollout.collect(version=0)[0])
    replay.dumps(folder)
    return len(replay)


def run_folder(cfg: dict[str, Any]) -> Path:
    """The folder of a run: ``run_dir``, or ``runs/name``, or a name made of its choices and the time."""
    if cfg.get("run_dir"):
        return Path(cfg["run_dir"])
    name = cfg.get("name")
    if not name:
        parts = [str((cfg.get(node) or {}).get("_target_", "none")).rsplit(".", 1)[-1] for node in ("env", "agent")]
        name = "-".join([*parts, f"seed{cfg.get('seed', 0)}", time.strftime("%Y%m%d-%H%M%S")]).lower()
    return Path(cfg.get("runs") or "runs") / name


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved configuration of a run folder.

    Raises:
        CheckpointError: the folder is missing or is not a run.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a run folder: it holds no config.yaml")
    return yaml.safe_load(path.read_text())


@contextmanager
def _status(folder: Path) -> Any:
    """Keeps ``status`` in meta.json: running, finished, interrupted or failed (with the error)."""
    meta = json.loads((folder / "meta.json").read_text())
    write_json(folder / "meta.json", {**meta, "status": "running"})
    try:
        yield
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        write_json(folder / "meta.json", {**meta, "status": status, "error": f"{type(error).__name__}: {error}"})
        raise
    write_json(folder / "meta.json", {**{k: v for k, v in meta.items() if k != "error"}, "status": "finished"})


def _provenance(cfg: dict[str, Any]) -> dict[str, Any]:
    return {
        "unified_rl": __version__,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "seed": cfg.get("seed", 0),
        "git_revision": _git_revision(),
        "command": " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    try:
        out = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None if out.returncode == 0 else None
