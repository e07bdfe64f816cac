"""What this machine has, and whether the identities that every run rests on hold here."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from unified_rl.config import compose
from unified_rl.errors import UnifiedRLError
from unified_rl.training.provenance import PACKAGES, version
from unified_rl.training.run import Job

SMALL_LANGUAGE = [
    "env=chain_mod",
    "policy=causal_lm_tiny",
    "agent=policy_gradient",
    "correction=ppo",
    "rollout.prompts=4",
    "rollout.group_size=4",
]
SMALL_CONTROL = [
    "env=half_cheetah",
    "policy=gaussian",
    "policy.normalize_observation=false",  # moments would move even where the learning rate is 0
    "agent=policy_gradient",
    "correction=ppo",
    "rollout.num_envs=4",
    "rollout.horizon=16",
]
COMMON = ["steps=64", "eval_episodes=4", "progress=false"]


def identity_ratio(overrides: list[str]) -> tuple[bool, str]:
    """Fresh data re-scored by the same weights has log-ratio 0."""
    trainer = _trainer(overrides)
    rows, _ = trainer.rollout.collect(0)
    trainer.replay.extend(rows)
    agent = trainer.agent
    with torch.no_grad():
        gap = agent.identity_check(agent._draw(trainer.replay))["identity/max_log_ratio"]
    return float(gap) < 1e-3, f"largest |log-ratio| {float(gap):.2e}"


def identity_update(overrides: list[str]) -> tuple[bool, str]:
    """An update with learning rate 0 leaves the policy and its evaluation as they were."""
    trainer = _trainer([*overrides, "agent.lr=0.0"])
    before = trainer.evaluate()
    weights = [p.detach().clone() for p in trainer.agent.policy.parameters()]
    rows, _ = trainer.rollout.collect(0)
    trainer.replay.extend(rows)
    metrics = trainer.agent.update(trainer.replay)
    same = all(torch.equal(a, b) for a, b in zip(weights, trainer.agent.policy.parameters(), strict=True))
    after = trainer.evaluate()
    clipped = max(float(metrics.get(f"clip/fraction_{sign}", 0.0)) for sign in ("positive", "negative"))
    return same and before == after and clipped == 0.0, f"score {before['eval/score']:.4f} = {after['eval/score']:.4f}"


def doctor() -> int:
    """Prints versions, devices, threads, renderer and the identity checks; returns 0 where all hold."""
    console = Console()
    table = Table("what", "found", title="unified-rl doctor")
    for name, value in facts().items():
        table.add_row(name, value)
    console.print(table)
    found = checks()
    table = Table("check", "domain", "result", "detail")
    for check in found:
        shown = "[green]holds" if check["holds"] else "[red]fails"
        table.add_row(check["check"], check["domain"], shown, check["detail"])
    console.print(table)
    return 0 if all(check["holds"] for check in found) else 1


def checks() -> list[dict[str, Any]]:
    """The identity checks of both domains: ``check``, ``domain``, ``holds`` and ``detail`` of each."""
    out = []
    for domain, overrides in (("language", SMALL_LANGUAGE), ("control", SMALL_CONTROL)):
        for title, check in (
            ("ratio 1 on fresh data", identity_ratio),
            ("learning rate 0 changes nothing", identity_update),
        ):
            good, detail = _run(check, [*overrides, *COMMON])
            out.append({"check": title, "domain": domain, "holds": good, "detail": detail})
    return out


def facts() -> dict[str, str]:
    """Versions, devices, threads and renderer."""
    out = {"python": platform.python_version()}
    out |= {name: version(name) or "not installed" for name in PACKAGES}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    out["CUDA devices"] = ", ".join(gpus) or "none"
    out["cores, torch threads"] = f"{os.cpu_count()}, {torch.get_num_threads()}"
    out["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "not set (PASSIVE is faster on shared cores)")
    out["renderer"] = os.environ.get("MUJOCO_GL", "not set (egl works without a display; glfw needs one)")
    return out


def _trainer(overrides: list[str]) -> Any:
    cfg = compose(overrides)
    return Job(cfg).make_trainer(Path(tempfile.gettempdir()))


def _run(check: Callable[[list[str]], tuple[bool, str]], overrides: list[str]) -> tuple[bool, str]:
    try:
        return check(overrides)
    except UnifiedRLError as error:
        return False, str(error)
