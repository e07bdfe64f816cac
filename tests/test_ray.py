"""Real Ray actors (``make scale``): equal to the run without them, whoever is killed, and nothing is left behind."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from run_cases import CONTROL, LANGUAGE, merged
from test_resume import cut_run
from ticket_cases import ALLOW, differences, made, read_rows, timeless

from unified_rl.config import compose
from unified_rl.errors import CheckpointError, ConfigError, EnvError
from unified_rl.training.checkpoint import checkpoints, read_checkpoint
from unified_rl.training.run import resume, train

pytestmark = pytest.mark.skipif(
    not os.environ.get("UNIFIED_RL_SCALE") or importlib.util.find_spec("ray") is None,
    reason="starts Ray, which is slow: make scale",
)
TESTS = str(Path(__file__).parent)
RUN = (
    "updates=6",
    "eval_episodes=4",
    "progress=false",
    "log_every=1",
    "eval_every=0",
    "logger=[]",
    "keep_checkpoints=99",
)
DOMAINS = {
    "control": (*CONTROL, "env._target_=ray_cases.UnsteadyRoute", "agent=ppo", "agent.epochs=2",
                "policy.normalize_observation=true", *RUN),
    "language": (*(w for w in LANGUAGE if "_target_" not in w), "env._target_=ray_cases.UnsteadyChain",
                 "correction=dapo", *RUN),
}  # fmt: skip


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:9", r"engine.address=127.0.0.1:9 does not answer"),
        ("auto", "is no Ray cluster that this machine belongs to"),
    ],
)
def test_an_address_without_a_cluster_is_refused(address: str, words: str, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "unified_rl.cli", "train", "--allow", "ray_cases", "--allow", "run_cases",
        *DOMAINS["control"], f"run_dir={tmp_path / 'run'}", "engine=ray", f"engine.address='{address}'",
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"PYTHONPATH": TESTS, "RAY_TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert words in done.stderr and not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """One Ray for all runs of this process that do not start their own."""
    import ray

    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
    yield ray
    ray.shutdown()


def trained(domain: str, folder: Path, *more: str, callbacks: Sequence[Any] = ()) -> Path:
    cfg = compose([*DOMAINS[domain], f"run_dir={folder}", *more], allow=ALLOW)
    return train(cfg, ALLOW, callbacks=callbacks)


def state_of(run: Path) -> dict[str, Any]:
    return read_checkpoint(checkpoints(run / "checkpoints")[-1])


def assert_equal(one: Path, other: Path, feed: bool = True) -> None:
    left, right = state_of(one), state_of(other)
    assert left["updates"] == right["updates"] == 6
    assert differences(left["agent"], right["agent"]) == []
    if feed:
        assert differences(left["feed"], right["feed"]) == []
    rows = [timeless(read_rows(run / "metrics.jsonl")) for run in (one, other)]
    assert rows[0] == rows[1] and len(rows[0]) == 7


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("bound", [0, 2])
def test_one_actor_is_the_run_without_bit_for_bit(ray: Any, domain: str, bound: int, tmp_path: Path) -> None:
    given = f"rollout.staleness={bound}"
    here = trained(domain, tmp_path / "here", given)
    there = trained(domain, tmp_path / "there", given, "engine=ray")
    assert_equal(here, there, feed=False)


class Kills:
    """After some updates, ends an actor: by Ray, by its number in the system."""

    def __init__(self) -> None:
        self.killed: list[str] = []

    def on_update_end(self, trainer: Any, metrics: Any) -> None:
        import ray

        actors = trainer.feed.cluster.actors
        if trainer.updates == 1:
            ray.kill(actors[0])
            self.killed.append("ray.kill")
        if trainer.updates == 2:
            os.kill(trainer.feed.cluster.told[1]["pid"], signal.SIGKILL)
            self.killed.append("SIGKILL")


@pytest.mark.parametrize("domain", DOMAINS)
def test_killed_and_slow_actors_and_resuming_change_nothing(ray: Any, domain: str, tmp_path: Path) -> None:
    given = ("rollout.staleness=2", "engine=ray", "engine.workers=2")
    calm = tmp_path / "calm"
    made(compose([*DOMAINS[domain], *given], allow=ALLOW), calm)  # by workers that live in this process
    files = tmp_path / "files"
    files.mkdir()
    (files / ("exit-12" if domain == "control" else "exit-2")).touch()
    rough = f"engine.env_vars={{RAY_CASES_FOLDER: '{files}', RAY_CASES_DELAY: '0.05'}}"
    kills = Kills()
    shaken = trained(domain, tmp_path / "shaken", *given, rough, callbacks=[kills])
    assert kills.killed == ["ray.kill", "SIGKILL"] and not list(files.iterdir())
    assert read_rows(shaken / "metrics.jsonl")[-1]["engine/lost_workers"] >= 3
    assert_equal(calm, shaken)

    cut = checkpoints(shaken / "checkpoints")[1]
    assert len(read_checkpoint(cut)["feed"]["waiting"]) == 2
    resume(str(shaken), allow=ALLOW, checkpoint=int(cut.name.split("_")[-1]))
    assert_equal(calm, shaken)


@pytest.mark.parametrize("name", ["periodic_asynchrony", "llama_rl"])
def test_a_recipe_with_workers_resumes_bit_for_bit(ray: Any, name: str, tmp_path: Path) -> None:
    """Of those with an order: of the rest no two runs are alike, whatever is resumed."""
    words = [word for word in DOMAINS["language"] if not word.startswith("correction=")]
    whole = train(compose([*words, f"recipe={name}", f"run_dir={tmp_path / 'whole'}"], allow=ALLOW), ALLOW)
    cut_run(whole, tmp_path / "part", checkpoints(whole / "checkpoints")[1])
    resume(str(tmp_path / "part"), allow=ALLOW)
    assert_equal(whole, tmp_path / "part")


def test_an_error_in_an_actor_is_one_line_that_names_worker_and_batch(ray: Any, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    (files / "raise-12").touch()
    with pytest.raises(EnvError) as raised:
        trained("control", tmp_path / "run", "engine=ray", "rollout.staleness=1", "engine.workers=2",
                f"engine.env_vars={{RAY_CASES_FOLDER: '{files}'}}")  # fmt: skip
    text = str(raised.value)
    assert "\n" not in text and "ray_cases.py" in text
    assert "worker " in text and ", batch " in text and "the gripper is stuck" in text
    assert "in stumble" in (tmp_path / "run" / "error.txt").read_text()


def test_by_completion_a_run_ends_too(ray: Any, tmp_path: Path) -> None:
    run = trained("control", tmp_path / "run", "engine=ray", "rollout.staleness=2", "engine.workers=2",
                  "engine.order=completion", "engine.env_vars={RAY_CASES_DELAY: '0.02'}")  # fmt: skip
    state = state_of(run)
    assert state["updates"] == 6 and state["feed"]["admitted"] == 6


WITHOUT = """
import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name == "unified_rl":
            raise ModuleNotFoundError("No module named 'unified_rl'", name="unified_rl")
sys.meta_path.insert(0, Without())
"""
"""Of a machine where the package is not installed."""


def answers_of(folder: Path, *more: str) -> list[tuple[int, list[int]]]:
    """Of a run whose answers take longer than updates: the update that took each, and the versions of its tokens."""
    found: list[tuple[int, list[int]]] = []

    class Rows:
        def on_rollout_end(self, trainer: Any, rows: Any, metrics: Any) -> None:
            told = zip(rows["policy_version"], rows["mask"], strict=True)
            found.extend((trainer.updates, version[mask].tolist()) for version, mask in told)

    # a checkpoint waits for the batches under way, so none is written before the end
    given = ("engine=ray", "rollout.staleness=2", "engine.workers=2", "updates=12", "checkpoint_every=1000000")
    words = merged(DOMAINS["language"], [*given, "policy._target_=ray_cases.SlowLM", f"run_dir={folder}", *more])
    train(compose([*words], allow=ALLOW), ALLOW, callbacks=[Rows()])
    return found


def test_weights_in_flight_reach_answers_that_are_sampled_and_every_token_knows_its_version(
    ray: Any, tmp_path: Path
) -> None:
    still = answers_of(tmp_path / "still")
    assert all(len(set(row)) == 1 for _, row in still)  # without, an answer has one version
    flying = answers_of(tmp_path / "flying", "engine.in_flight=true")
    assert all(row == sorted(row) and update - 2 <= row[0] and row[-1] <= update for update, row in flying)
    assert sum(len(set(row)) > 1 for _, row in flying) > len(flying) // 4

    def lag(answers: list[tuple[int, list[int]]]) -> float:
        tokens = [update - version for update, row in answers for version in row]
        return sum(tokens) / len(tokens)

    assert lag(flying) < lag(still) - 0.2, (lag(flying), lag(still))


def test_what_cannot_begin_is_refused_with_one_line(ray: Any, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    with pytest.raises(ConfigError, match=r"worker 0 did not start .*unified-rl .* must be installed in the Python of"):
        trained("control", tmp_path / "a", "engine=ray", f"engine.env_vars={{PYTHONPATH: '{tmp_path}'}}")
    assert not (tmp_path / "a").exists()
    with pytest.raises(ConfigError, match=r"engine.workers=9 with engine.num_cpus=1 take 9 CPUs, and .* has 8"):
        trained("control", tmp_path / "a", "engine=ray", "engine.workers=9", "rollout.staleness=8")
    with pytest.raises(ConfigError, match=r"take 1 GPUs, and the Ray cluster has 0"):
        trained("control", tmp_path / "a", "engine=ray", "engine.num_gpus=1")


def test_a_run_does_not_go_on_with_another_engine_or_number_of_workers(ray: Any, tmp_path: Path) -> None:
    class Stops:
        def on_update_end(self, trainer: Any, metrics: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained("control", tmp_path / "run", "engine=ray", callbacks=[Stops()])
    changed = {
        "engine=local": "resume it with the same engine",
        "engine=ray engine.workers=2 rollout.staleness=1": "resume it with engine.workers=1",
    }
    for words, fault in changed.items():
        with pytest.raises(CheckpointError, match=fault):
            trained("control", tmp_path / "run", "resume_existing=true", *words.split())


# ------------------------------------------------------------------------------------------- own processes


def descendants(pid: int) -> set[int]:
    """Numbers of all processes below one."""
    below: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            below.setdefault(int(fields[1]), []).append(int(entry.name))
    found, left = set(), [pid]
    while left:
        left += (children := below.get(left.pop(), []))
        found |= set(children)
    return found


def alive(pids: set[int]) -> list[str]:
    out = []
    for pid in pids:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            continue
        if stat.rpartition(")")[2].split()[0] != "Z":
            out.append(stat[:60])
    return out


ENDS = {"success": 0, "error": 2, "SIGTERM": 143, "SIGINT to all": 130, "SIGTERM twice, a worker hangs": 143}
"""How a run ends, and its exit code."""


@pytest.mark.parametrize("end", ENDS)
def test_no_process_is_left(end: str, tmp_path: Path) -> None:
    files, record = tmp_path / "files", tmp_path / "run" / "metrics.jsonl"
    files.mkdir()
    if end not in ("success", "SIGTERM", "SIGINT to all"):
        (files / ("raise-30" if end == "error" else "hang-30")).touch()
    workers = 1 if "hangs" in end else 2
    command = [
        sys.executable, "-m", "unified_rl.cli", "train", "--allow", "ray_cases", "--allow", "run_cases",
        *(w for w in DOMAINS["control"] if "updates" not in w), f"run_dir={tmp_path / 'run'}",
        f"updates={3 if end == 'success' else 5000}", "engine=ray", f"engine.workers={workers}",
        f"rollout.staleness={workers - 1}", f"engine.env_vars={{RAY_CASES_FOLDER: '{files}'}}",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": TESTS}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, cwd=tmp_path,
    )  # fmt: skip
    seen: set[int] = set()
    began, sent = time.monotonic(), 0

    def is_time() -> bool:
        if "hangs" in end:
            return not any(files.iterdir()) and sent < 2
        return end.startswith("SIG") and not sent and record.exists() and len(record.read_text().splitlines()) > 3

    while process.poll() is None and time.monotonic() < began + 120:
        seen |= descendants(process.pid)
        if is_time():
            sent += 1
            time.sleep(0.5)
            if "all" in end:
                os.killpg(process.pid, signal.SIGINT)
            else:
                process.terminate()
        time.sleep(0.1)
    out, err = process.communicate(timeout=10)
    assert process.returncode == ENDS[end], err
    assert len(seen) > 3
    if end == "error":
        assert err.count("\n") == 1 and "worker " in err and "the gripper is stuck" in err
    if end.startswith("SIG"):
        assert "go on with 'unified-rl train resume=" in out
    deadline = time.monotonic() + 15
    while alive(seen) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert alive(seen) == []
