"""What workers can collect, what they are told, and what is refused before anything is started. No Ray here."""

from __future__ import annotations

import importlib.util
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from run_cases import CONTROL, LANGUAGE
from tensordict import TensorDict
from ticket_cases import job_of, made

import unified_rl as ur
from unified_rl.config import compose
from unified_rl.errors import ConfigError
from unified_rl.training import ray_cluster
from unified_rl.training.collector import Collector, valued
from unified_rl.training.engine import RayEngine, worker_settings
from unified_rl.training.run import Job, train

SHORT = ("updates=2", "eval_episodes=4", "progress=false")
RAY = "engine=ray"


def refusal(*overrides: str, allow: tuple[str, ...] = ("run_cases", "test_engine")) -> str:
    """The error of a run that is put together, whatever its workers would live in."""
    with pytest.raises(ConfigError) as raised:
        job_of(compose([*overrides, "progress=false"], allow=allow), allow=allow).make_trainer(Path("nowhere"))
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["env=pendulum", "agent=sb3_ppo", RAY], ["agent=sb3_ppo steps its environment itself", "engine=local"]),
        (["env=two_route", "agent=behavior_cloning", RAY], ["rollout=demonstrations", "engine=local"]),
        ([*LANGUAGE[:6], "agent=sft", RAY], ["rollout=demonstrations", "engine=local"]),
        (
            [*CONTROL, "agent=ppo", RAY, "engine.workers=4", "rollout.staleness=1"],
            ["at most 2 batch(es)", "2 worker(s) would always wait", "rollout.staleness=3", "engine.workers=2"],
        ),
        (
            ["env=point_maze", "agent=sac", "replay=her", "env.reward=sparse", RAY, "engine.workers=2",
             "rollout.staleness=1"],
            ["replay=her", "engine.workers=1", "replay=uniform"],
        ),
        (
            [*CONTROL, "agent=ppo", "rollout._target_=test_engine.OwnRollout", RAY, "engine.workers=2",
             "rollout.staleness=1"],
            ["OwnRollout has no number_from(first)", "engine.workers=1"],
        ),
        ([*CONTROL, "agent=ppo", RAY, "engine._target_=unified_rl.replay.Uniform"], ["engine is a Uniform", RAY]),
        ([*CONTROL, "agent=ppo", RAY, "engine.in_flight=true"], ["GaussianPolicy", "leave it out"]),
        ([*LANGUAGE, RAY, "engine.in_flight=true"], ["rollout.staleness=0", "rollout.staleness=1 or more"]),
        (
            [*CONTROL, "agent=ppo", RAY, "engine.order=periodic"],
            ["engine.order=periodic shares out the prompts", "ControlRollout", "engine.order=ticket"],
        ),
        ([*LANGUAGE, RAY, "engine.order=periodic", "rollout.staleness=1"], ["no effect", "rollout.staleness=0"]),
        ([*LANGUAGE, RAY, "engine.order=periodic", "engine.workers=5"], ["share out rollout.prompts=4"]),
        (
            [*LANGUAGE, RAY, "engine.order=periodic", "engine.workers=2",
             "rollout.sources={shown: {_target_: unified_rl.rollout.sources.Demonstrations, rows: 4}}"],
            ["would join the rows of rollout.sources (shown)", "engine.workers=1"],
        ),
        (
            [*LANGUAGE, "recipe=vade", RAY, "engine.order=periodic", "engine.workers=2"],
            ["rollout.curriculum", "engine.order=ticket"],
        ),
        ([*CONTROL, "agent=ppo", RAY, "keep_best=engine/wait_second"], ["keep_best", "engine/wait_seconds"]),
    ],
)  # fmt: skip
def test_what_workers_cannot_collect_is_refused_with_what_works(overrides: list[str], words: list[str]) -> None:
    text = refusal(*overrides)
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("engine.address=somewhere", "engine.address='somewhere' is no HOST:PORT"),
        ("engine.address='ray://head:10001'", "must be started on a machine of the cluster"),
        ("engine.address='head:0'", "is no HOST:PORT"),
        ("engine.num_gpus=1.5", "engine.num_gpus=1.5 must be a part of one, or a whole number"),
        ("engine.workers=0", "engine.workers=0 must be at least 1"),
        ("engine.order=random", "engine.order"),
        ("engine.worker=2", "did you mean 'workers'"),
    ],
)
def test_nonsense_is_refused_when_the_run_is_composed(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        compose([*CONTROL, RAY, override])
    assert words in str(raised.value)


def test_settings_of_workers_need_the_engine() -> None:
    with pytest.raises(ConfigError, match="engine has no keys here; choose an option first: engine="):
        compose([*CONTROL, "engine.workers=2"])


def test_without_ray_a_run_is_refused_before_anything_is_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "ray" else found(name, *more))
    stages = ("warm_start=demonstrations", "warm_start.stages=[{updates: 1}]")
    with pytest.raises(ConfigError, match=r"engine=ray needs Ray: pip install 'unified-rl\[ray\]', or use"):
        train(compose([*CONTROL, "agent=ppo", *SHORT, *stages, RAY, f"run_dir={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()


def test_a_script_that_gives_objects_or_classes_is_told_to_name_them() -> None:
    env = ur.make_env("two_route", num_envs=2, seed=0)
    with pytest.raises(ConfigError, match=r"engine=ray builds the run in every worker.*env came as objects"):
        ur.assemble(env, agent="ppo", engine="ray", steps=64)
    with pytest.raises(ConfigError, match="reward came as objects or classes of this script"):
        ur.assemble("chain_mod", reward=lambda **row: 1.0, engine="ray", steps=64)


class OwnRollout:
    """A rollout of the user's own, which numbers its episodes as it likes."""

    domain, length, staleness, steps = "control", None, 1, 0

    def __init__(self, env: Any, policy: Any, staleness: int = 0, num_envs: int = 4, horizon: int = 8) -> None:
        self.rows = self.steps_per_collect = horizon * num_envs
        self.staleness, self.length = staleness, horizon

    def collect(self, version: int) -> tuple[TensorDict, dict[str, float]]:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


def test_workers_share_random_steps_and_settled_sizes_and_sample_where_they_may() -> None:
    cfg = compose([*CONTROL, "agent=sac", "rollout.random_steps=10", "callbacks=[]", RAY])
    job = Job(cfg)
    given = worker_settings(cfg, ["mine"], job.make_rollout(), 3)
    assert given["cfg"]["rollout"]["random_steps"] == 4 and cfg["rollout"]["random_steps"] == 10
    assert given["cfg"]["device"] == "cpu" and not {"callbacks", "engine", "warm_start"} & {*given["cfg"]}
    assert given["allow"] == ["mine"] and given["workers"] == 3 and given["generation_batch"] is None
    wide = {**cfg, "device": "cuda"}
    assert worker_settings(wide, [], job.make_rollout(), 1, on_gpu=True)["cfg"]["device"] == "cuda"

    talk = Job(compose([*LANGUAGE], allow=["run_cases"]), ["run_cases"]).make_rollout()
    talk.generation_batch = 8  # as the memory of this machine may have asked for
    told = worker_settings(compose([*LANGUAGE], allow=["run_cases"]), ["run_cases"], talk, 1)
    actor = Collector()
    valued(actor.ask("begin", {**told, "worker": 0}), "worker 0")
    assert actor.rollout.generation_batch == 8


def test_an_error_of_a_worker_is_ours_with_its_name_and_the_trace_behind_it() -> None:
    answer = Collector().ask("begin", {"worker": 0, "workers": 1, "folder": "/", "path": [], "allow": [],
                                       "cfg": {"agent": None, "policy": None}, "generation_batch": None,
                                       "in_flight": False, "parts": False})  # fmt: skip
    with pytest.raises(ConfigError, match=r"^worker 3: this run has no policy") as raised:
        valued(answer, "worker 3")
    assert "In the worker:\nTraceback" in raised.value.__notes__[0]


def test_an_address_where_nothing_listens_is_refused_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"engine.address={address} does not answer.*ray start --head"):
            ray_cluster._check_address(address)
        taken.listen()
        ray_cluster._check_address(address)


def test_handlers_of_signals_stay_ours() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with ray_cluster._own_signals():
        signal.signal(signal.SIGTERM, lambda *given: None)
    assert signal.getsignal(signal.SIGTERM) is before


class Lost:
    """In place of ``ray.exceptions``: as many names as a cluster catches."""

    class RayError(Exception): ...

    class RayActorError(RayError): ...

    class ObjectLostError(RayError): ...

    class OwnerDiedError(RayError): ...

    class NodeDiedError(RayError): ...

    class WorkerCrashedError(RayError): ...

    class OutOfMemoryError(RayError): ...

    class LocalRayletDiedError(RayError): ...


@pytest.mark.parametrize("name", [name for name in vars(Lost) if name.endswith("Error") and name != "RayError"])
def test_a_lost_actor_object_or_node_is_a_lost_worker_and_anything_else_an_error(name: str) -> None:
    class Ray:
        exceptions = Lost

        def get(self, pending: Any) -> Any:
            raise pending

    cluster = ray_cluster.RayCluster(RayEngine(), {}, lambda: None)  # type: ignore[arg-type, return-value]
    cluster._ray = Ray()
    with pytest.raises(ray_cluster.WorkerLostError, match=r"^gone$"):
        cluster.result(getattr(Lost, name)("gone\nAdvice."), 3, 1)
    with pytest.raises(ur.errors.RolloutError, match=r"^worker 1, batch 3: odd$"):
        cluster.result(Lost.RayError("odd\nAdvice."), 3, 1)


def test_epochs_of_workers_together_are_told(tmp_path: Path) -> None:
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(f'{{"prompt": "{n}+1=", "answer": "{n + 1}"}}\n' for n in range(8)))
    task = ("env=jsonl", f"env.path={file}", "env.held_out=0.5", "env.max_turn_tokens=4", "rollout.prompts=2",
            "rollout.group_size=2", "policy=causal_lm_tiny", "policy.config.num_hidden_layers=1")  # fmt: skip
    once = ("updates=4", "eval_episodes=0", "progress=false", "log_every=1", "logger=[]")
    shared = (RAY, "engine.workers=2", "rollout.staleness=1")
    epochs = [row["rollout/epoch"] for row in made(compose([*task, *once, *shared]), tmp_path / "run")[1]]
    alone = [row["rollout/epoch"] for row in made(compose([*task, *once]), tmp_path / "alone")[1]]
    assert alone[3] == 4 * alone[0] and epochs == [2 * alone[0]] * 2 + [2 * alone[1]] * 2


def test_weights_are_those_of_the_version_and_sent_once(tmp_path: Path) -> None:
    cfg = compose([*CONTROL, "agent=ppo", *SHORT, "logger=[]", RAY, "rollout.staleness=1"])
    job = job_of(cfg)
    trainer = job.make_trainer(tmp_path)
    feed = trainer.feed
    sent: list[int] = []
    put = feed.cluster.put  # type: ignore[union-attr]
    feed.cluster.put = lambda version: (sent.append(version), put(version))[1]  # type: ignore[union-attr]
    trainer.run()
    assert sent == [0]  # both batches begin before the first update is made
