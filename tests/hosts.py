"""A cluster of two hosts: network namespaces of this machine, joined by a pair of virtual cards. Needs root and Ray.

    python tests/hosts.py

Each has addresses, ports and a loopback of its own, so that nothing is reached but over the card between them. Ray is
started on both as docs/scale.md says, and asks for the token of its cluster. The run on the first host, whose workers
live on the second, must be the run without workers, bit for bit; afterwards a host with another token must not get in,
and a run whose second host is cut off the network for good must go on with a host that joins.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from ticket_cases import differences, read_rows, timeless

from unified_rl.training.checkpoint import checkpoints, read_checkpoint

PORT = 6391
BASE = ("env=two_route", "policy=gaussian", "policy.hidden=[8]", "agent=ppo", "agent.critic_hidden=[8]", "updates=12",
        "rollout.num_envs=4", "rollout.horizon=8", "eval_episodes=4", "progress=false", "log_every=1", "eval_every=0",
        "logger=[]", "rollout.staleness=1")  # fmt: skip


def ip(*words: str) -> str:
    """Runs ``ip``."""
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@contextmanager
def hosts(*names: str) -> Iterator[None]:
    """Namespaces, each with one card, at 10.77.0.1, .2, ... on a bridge; their processes end with them."""
    bridge = "urlbridge"
    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("link", "set", bridge, "up")
        for number, name in enumerate(names):
            ip("netns", "add", name)
            ip("link", "add", f"url{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"url{number}", "master", bridge)
            ip("link", "set", f"url{number}", "up")
            ip("-n", name, "address", "add", f"10.77.0.{number + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for number, name in enumerate(names):
            with suppress(subprocess.CalledProcessError):
                ip("link", "del", f"url{number}")
            with suppress(subprocess.CalledProcessError):
                for pid in ip("netns", "pids", name).split():
                    with suppress(ProcessLookupError):
                        os.kill(int(pid), 9)
                ip("netns", "del", name)
        with suppress(subprocess.CalledProcessError):
            ip("link", "del", bridge)


def inside(name: str, ray: dict[str, str], *command: str) -> subprocess.Popen[str]:
    """Starts a command on a host; ``ray`` are environment variables of the cluster: its token and temporary folder."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", **ray}
    return subprocess.Popen(["ip", "netns", "exec", name, *command], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip


def node(name: str, number: int, ray: dict[str, str], cpus: int) -> subprocess.Popen[str]:
    """Starts Ray on a host: the first is the head."""
    mine = f"--node-ip-address=10.77.0.{number}"
    head = ["--head", f"--port={PORT}", "--include-dashboard=false"]
    joins = head if number == 1 else [f"--address=10.77.0.1:{PORT}"]
    return inside(name, ray, sys.executable, "-m", "ray.scripts.scripts", "start", *joins, mine, f"--num-cpus={cpus}",
                  "--block", "--disable-usage-stats", "--object-store-memory=100000000")  # fmt: skip


def wait_for(name: str, ray: dict[str, str], count: int, seconds: float = 60.0) -> None:
    """Until the cluster has so many nodes alive."""
    asked = (f"import ray; ray.init(address='10.77.0.1:{PORT}', logging_level='error', log_to_driver=False); "
             f"print(sum(n['Alive'] for n in ray.nodes()))")  # fmt: skip
    end = time.monotonic() + seconds
    said = ""
    while time.monotonic() < end:
        said = inside(name, ray, sys.executable, "-c", asked).communicate(timeout=seconds)[0]
        if said.strip().splitlines()[-1:] == [str(count)]:
            return
        time.sleep(1.0)
    raise SystemExit(f"the cluster has not {count} nodes: {said[-500:]}")


def train(name: str, ray: dict[str, str], folder: Path, *more: str) -> subprocess.Popen[str]:
    """Starts a run on a host."""
    words = dict(word.split("=", 1) for word in (*BASE, f"run_dir={folder}", *more))
    command = [sys.executable, "-m", "unified_rl.cli", "train", *(f"{key}={value}" for key, value in words.items())]
    return inside(name, ray, *command)


def equal(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same agent and rows."""
    left, right = (read_checkpoint(checkpoints(run / "checkpoints")[-1])["agent"] for run in (one, other))
    rows = [timeless(read_rows(run / "metrics.jsonl")) for run in (one, other)]
    return differences(left, right) == [] and rows[0] == rows[1]


def main() -> None:
    """Runs and says what happened."""
    names = ("url-learner", "url-worker", "url-third")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="url", ignore_cleanup_errors=True))
        ray = {"RAY_AUTH_TOKEN": "a" * 64, "RAY_TMPDIR": place}  # so that no other cluster of this machine is found
        stack.enter_context(hosts(*names))
        alone = subprocess.run([sys.executable, "-m", "unified_rl.cli", "train", *BASE, f"run_dir={folder / 'alone'}"],
                               capture_output=True, text=True, check=False)  # fmt: skip
        assert alone.returncode == 0, alone.stderr
        node(names[0], 1, ray, cpus=0)
        wait_for(names[0], ray, 1)
        node(names[1], 2, ray, cpus=1)
        wait_for(names[0], ray, 2)
        there = ("engine=ray", "engine.address=auto")
        began = time.monotonic()
        process = train(names[0], ray, folder / "two", *there)
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 0, said
        print(f"two hosts: {time.monotonic() - began:.0f} s, equal to the run without workers: "
              f"{equal(folder / 'alone', folder / 'two')}", flush=True)  # fmt: skip
        stranger = node(names[2], 3, {**ray, "RAY_AUTH_TOKEN": "b" * 64}, cpus=1)
        try:
            said = stranger.communicate(timeout=60)[0]
        except subprocess.TimeoutExpired:
            stranger.kill()
            said = "it still tries after 60 s"
        wait_for(names[0], ray, 2)
        lines = [line.strip() for line in said.splitlines() if "oken" in line or "UNAUTH" in line.upper()]
        print(f"a host with another token is not let in: {(lines or [said.strip()[-200:]])[-1][:200]}", flush=True)

        whole = train(names[0], ray, folder / "whole", "updates=400")
        assert whole.wait(timeout=300) == 0
        process = train(names[0], ray, folder / "cut", *there, "updates=400")
        record = folder / "cut" / "metrics.jsonl"
        while not record.exists() or len(record.read_text().splitlines()) < 20:
            time.sleep(0.2)
            assert process.poll() is None, process.communicate()[0]
        ip("link", "set", "url1", "down")
        cut = time.monotonic()
        node(names[2], 3, ray, cpus=1)
        said = process.communicate(timeout=400)[0]
        print(f"a host that is cut off the network: the run ended with code {process.returncode} "
              f"{time.monotonic() - cut:.0f} s later, equal to the run without workers: "
              f"{equal(folder / 'whole', folder / 'cut')}", flush=True)  # fmt: skip
        print("\n".join(line for line in said.splitlines() if "was lost" in line), flush=True)


if __name__ == "__main__":
    main()
