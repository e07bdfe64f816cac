"""Copies in other processes: the same results, one error for what goes wrong there, and nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unified_rl.envs.control import ActionChunk, FrameStack, GymnasiumEnv
from unified_rl.errors import ConfigError, EnvError, NonFiniteError
from unified_rl.instantiate import allowing
from unified_rl.interop.guard import step_env

SHOP = '''
import gymnasium, numpy as np, os, time
class Eye(gymnasium.Env):
    """Sees a picture and a number; ends at random, so that chunks end at different times."""
    observation_space = gymnasium.spaces.Dict(
        picture=gymnasium.spaces.Box(0, 255, (9, 8, 3), np.uint8), place=gymnasium.spaces.Box(-9, 9, (2,)))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))
    metadata = {"render_modes": ["rgb_array"], "render_fps": 12}
    def __init__(self, fault=None, render_mode=None):
        self.fault, self.render_mode = fault, render_mode
    def seen(self):
        return {"picture": self.np_random.integers(0, 256, (9, 8, 3), np.uint8),
                "place": np.array([self.sum, self.count], np.float32)}
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.sum = self.count = 0.0
        return self.seen(), {}
    def step(self, action):
        print("stepping")  # what environments print disturbs nobody
        self.sum += float(action[0])
        self.count += 1
        if self.count == 3 and self.fault == "raise": raise RuntimeError("joint 3 is broken")
        if self.count == 3 and self.fault == "die": os._exit(7)
        if self.count == 3 and self.fault == "kill": os.kill(os.getpid(), 9)
        if self.count == 3 and self.fault == "hang": time.sleep(60)
        if self.count == 3 and self.fault == "nan": self.sum = float("nan")
        if self.count == 3 and self.fault == "shape": return {"picture": 1}, 0.0, False, False, {}
        end = bool(self.np_random.random() < 0.3) and self.count > 3
        return self.seen(), self.sum, end, self.count >= 9, {"is_success": self.sum > 0, "depth": self.count}
    def render(self): return np.full((4, 6, 3), self.count, np.uint8)
'''


@pytest.fixture(scope="module", autouse=True)
def shop(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("shop")
    (folder / "shop_of_eyes.py").write_text(SHOP)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


def made(workers: int, **more: Any) -> Any:
    with allowing(["shop_of_eyes"]):
        return GymnasiumEnv(make="shop_of_eyes:Eye", workers=workers, **more)


def test_results_are_bit_for_bit_those_of_one_process() -> None:
    envs = [ActionChunk(FrameStack(made(workers, num_envs=5, seed=3), 2), 3, 0.9) for workers in (0, 2)]
    generator, states = torch.Generator().manual_seed(0), []
    try:
        assert all(isinstance(env, ActionChunk) and env.max_steps == 334 for env in envs)
        assert torch.equal(envs[0].current_observation(), envs[1].current_observation())
        executed = set()
        for number in range(8):
            action = 2 * torch.rand(5, 3, generator=generator) - 1
            here, there = (env.step_batch(action) for env in envs)
            for a, b in zip(here[:6], there[:6], strict=True):
                assert torch.equal(a, b)
            assert here.observation.dtype == torch.uint8 and here.observation.shape == (5, 2 * (8 + 216))
            assert here.info.keys() == there.info.keys()
            assert all(
                torch.equal(value.nan_to_num(-1), there.info[key].nan_to_num(-1)) for key, value in here.info.items()
            )
            executed |= set(here.executed.tolist())
            if number == 4:
                states = [env.state_dict() for env in envs]
        assert executed == {1, 2, 3}, "some chunks were cut by an end, and the rest stood still"
        assert envs[1].resumable() is True
        ends = [env.current_observation() for env in envs]
        for env, state in zip(envs, reversed(states), strict=True):  # each takes up where the other was
            env.load_state_dict(state)
        assert torch.equal(envs[0].current_observation(), envs[1].current_observation())
        assert not torch.equal(ends[0], envs[0].current_observation())
        assert torch.equal(*(env.step_batch(action).observation for env in envs))
    finally:
        for env in envs:
            env.close()


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("raise", EnvError, r"shop_of_eyes:Eye \(simulation 0\) raised in step 3: RuntimeError: joint 3 is broken$"),
        (
            "die",
            EnvError,
            r"process 0 of env.workers ended \(exit code 7\) with the simulations \[0, 1\] of shop_of_eyes:Eye",
        ),
        ("kill", EnvError, r"process 0 of env.workers ended \(signal SIGKILL\)"),
        ("hang", EnvError, r"raised in step 3: TimeoutError: it has not returned after 1 s"),
        (
            "nan",
            NonFiniteError,
            r"shop_of_eyes:Eye \(simulation 0\) returned an observation with a NaN or infinity from step 3",
        ),
        ("shape", EnvError, r"observation\[place\]={'picture': 1} \(dict\) from step 3; a dictionary with 'place'"),
    ],
)
def test_what_goes_wrong_in_a_process_is_one_line_and_ends_all(fault: str, error: type[Exception], words: str) -> None:
    env = made(2, num_envs=3, step_seconds=1.0, make_kwargs={"fault": fault})
    processes = [worker.process for worker in env._pool.workers]
    with pytest.raises(error, match=words) as caught:
        for number in range(1, 4):
            step_env(env, torch.zeros(3, 1), number)
    assert "\n" not in str(caught.value)
    begun = time.monotonic()
    env.close()
    assert all(process.poll() is not None for process in processes) and time.monotonic() - begun < 5


def test_what_cannot_be_made_there_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"env.workers makes copies in other processes, by name: give env.id, or env.m"
    ):
        GymnasiumEnv(make=lambda: made(0)._pool.copies[0].env, workers=2)
    with pytest.raises(ConfigError, match=r"env.workers sends env.make_kwargs to other processes, as plain data"):
        GymnasiumEnv("Pendulum-v1", workers=1, make_kwargs={"g": np.float32(9.0)})
    env = made(4, num_envs=2, make_kwargs={"render_mode": "rgb_array"})
    try:
        assert len(env._pool.workers) == 2, "no more processes than copies"
        env.step_batch(torch.zeros(2, 1))
        assert env.frames_per_second == 12 and np.array_equal(env.render_lane(1), np.full((4, 6, 3), 1, np.uint8))
    finally:
        env.close()


SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without it
sys.path.insert(0, sys.argv[1])
from unified_rl.envs.control.gymnasium_copy import Source
from unified_rl.envs.control.gymnasium_pool import Workers, shapes_of
assert "torch" not in sys.modules, "a worker would import it too, and be slow to start and large"
source = Source(None, "shop_of_eyes:Eye", allow=("shop_of_eyes",))
workers = Workers(source, 2, 2, shapes_of(source.copy(0)))
print(*[worker.process.pid for worker in workers.workers], flush=True)
workers.reset([0, 1], [0, 1])
while sys.argv[2] != "end":
    workers.step([0, 1], [1, 1])
"""


@pytest.mark.parametrize("how", ["end", "SIGINT", "SIGKILL"])
def test_no_process_is_left_behind(shop: Path, how: str) -> None:
    script = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(shop), how], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert script.stdout is not None
    workers = list(map(int, script.stdout.readline().split()))
    assert len(workers) == 2
    if how != "end":
        time.sleep(0.1)
        script.send_signal(getattr(signal, how))
    code = script.wait(30)
    assert (code == 0) == (how == "end")
    end = time.monotonic() + 10
    while any(map(_alive, workers)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(_alive, workers))


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[:1]
    except (ProcessLookupError, FileNotFoundError):
        return False
