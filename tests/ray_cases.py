"""Tasks whose workers are slow, die, or fail, as files in a folder say; the folder is named in their environment."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import torch
from run_cases import EasyChain

from unified_rl.envs.control import TwoRouteEnv
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.policies.generation import Generation

FOLDER, DELAY = "RAY_CASES_FOLDER", "RAY_CASES_DELAY"


def stumble(calls: int) -> None:
    """Waits, and does what a file of the folder says for this call, or this process: the first who removes it."""
    if delay := float(os.environ.get(DELAY, 0)):
        time.sleep(random.random() * delay)
    folder = os.environ.get(FOLDER)
    told = (f"*-{calls}", f"*-pid{os.getpid()}")
    for path in [path for name in told for path in Path(folder).glob(name)] if folder else ():
        try:
            path.unlink()
        except FileNotFoundError:
            continue
        what = path.name.split("-")[0]
        if what == "exit":
            os._exit(3)
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "hang":
            time.sleep(10**6)
        if what == "raise":
            raise ValueError("the gripper\nis stuck")


class SlowLM(CausalLM):
    """Waits between tokens, so that weights change in between."""

    def generate(self, *given: Any, **options: Any) -> Any:
        refresh = self.refresh
        if refresh is not None:
            self.refresh = lambda: (refresh(), time.sleep(0.05))[0]
        try:
            return super().generate(*given, **options)
        finally:
            self.refresh = refresh
            if refresh is None:
                time.sleep(0.3)


class StillLM(CausalLM):
    """Draws the answers to each prompt from a stream of its own, so they do not depend on what is sampled beside it."""

    def generate(self, prompts: Any, *, generator: Any = None, **options: Any) -> Any:
        found = []
        for prompt in prompts:
            ids = [int(token) for token in prompt]
            stream = torch.Generator().manual_seed(sum(token * 31**place for place, token in enumerate(ids)) % 2**31)
            found.append(super().generate([prompt], generator=stream, **options))
        names = ("tokens", "log_prob", "length", "finished")
        return Generation(*(torch.cat([getattr(one, name) for one in found]) for name in names))


class UnsteadyRoute(TwoRouteEnv):
    """A control task."""

    calls = 0

    def step_batch(self, action: Any) -> Any:
        self.calls += 1
        stumble(self.calls)
        return super().step_batch(action)


class UnsteadyChain(EasyChain):
    """A language task."""

    calls = 0

    def respond(self, problems: Any, turns: Any, finished: Any) -> Any:
        self.calls += 1
        stumble(self.calls)
        return super().respond(problems, turns, finished)
