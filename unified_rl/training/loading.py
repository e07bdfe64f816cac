"""A trained policy from its run's folder, without its environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from unified_rl.config import build
from unified_rl.errors import ConfigError
from unified_rl.policies.acting import Actor
from unified_rl.policies.base import Policy
from unified_rl.protocols import domain_of
from unified_rl.spaces import PolicyInputs, Space
from unified_rl.training.build import Job, make_policy, space_of
from unified_rl.training.checkpoint import intact_checkpoint
from unified_rl.training.provenance import read_config
from unified_rl.training.restoring import policy_state, restoring
from unified_rl.training.seeding import derive
from unified_rl.training.verbs import load_policy


def policy_of(run: str, checkpoint: str | int | None = None, allow: Sequence[str] = ()) -> Any:
    """The policy of a checkpoint, in evaluation mode on the CPU; one of control acts when it is called.

    A checkpoint of control holds the environment's space, so that no environment is made and no simulator imported;
    where it does not (an older run, an environment that tells policies more than its space), one simulation is.

    Args:
        run: the run folder.
        checkpoint: the number of updates behind it, its name, its folder or ``best``; by default the newest intact one.
        allow: prefixes that configuration may build.

    Raises:
        CheckpointError: no such run or checkpoint, or a run that only a script can build again.
    """
    folder = Path(run)
    cfg = {**read_config(folder), "device": "cpu"}
    policy: Any
    path, state = intact_checkpoint(folder, checkpoint, replay=False)
    if state.get("space") is not None:
        with restoring(path):
            space: Space | None = Space.from_plain(state["space"])
        assert space is not None
        policy = _without_environment(cfg, space, allow)
        with restoring(path):
            policy.load_state_dict(policy_state(state, path))
    else:
        job = Job(_single(cfg), allow)
        policy, space = load_policy(job, state, path), space_of(job.env)
    if isinstance(policy, nn.Module):
        policy.eval()
    if space is None or domain_of(policy) != "control":
        return policy
    if isinstance(policy, Policy):
        policy.acts_in = space
        return policy
    return Actor(policy, space)


def _without_environment(cfg: Mapping[str, Any], space: Space, allow: Sequence[str]) -> Any:
    policy = make_policy(cfg, PolicyInputs(space), allow)
    if cfg.get("rollout"):
        return policy
    seed = derive(cfg.get("seed", 0), "agent") % 2**31
    agent = build(cfg["agent"], allow=allow, setting="agent", policy=policy, env=Absent(space), seed=seed)
    return agent.policy  # an agent that collects by itself brings its own


def _single(cfg: dict[str, Any]) -> dict[str, Any]:
    """The same run with one simulation, where it says how many."""
    nodes = {name: cfg[name] for name in ("rollout", "agent") if "num_envs" in (cfg.get(name) or {})}
    return {**cfg, **{name: {**node, "num_envs": 1} for name, node in nodes.items()}}


class Absent:
    """Stands for an environment of which only the space is known."""

    domain, num_envs, max_steps = "control", 1, 1

    def __init__(self, space: Space) -> None:
        self.space = space

    def policy_inputs(self) -> dict[str, Any]:
        """``space``."""
        return PolicyInputs(self.space)

    def _refuse(self, *arguments: Any) -> NoReturn:
        raise ConfigError("a policy was loaded without its environment, which cannot be stepped")

    reset_batch = step_batch = state_dict = load_state_dict = _refuse
