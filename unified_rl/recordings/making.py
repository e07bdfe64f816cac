"""``unified-rl data make ENV KIND FOLDER``: sets of one's own, by a random or a trained policy, or shares of others."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.errors import ConfigError
from unified_rl.instantiate import with_defaults
from unified_rl.protocols import StepResult
from unified_rl.recordings.checking import random_action
from unified_rl.recordings.files import (
    ABOUT,
    Episodes,
    built,
    check_new,
    env_names,
    env_of_set,
    make_control_env,
    names_of,
    read_robot_set,
    unlike,
    write_set,
)
from unified_rl.rollout import ControlRollout
from unified_rl.rollout.recorded import fitted
from unified_rl.spaces import Space
from unified_rl.units import Source

KINDS = ("random", "medium", "expert", "mixed")
LANES = 16
"""Simulations that are stepped together at most."""
HORIZON = 256
GAMMA = 0.99
"""The discount within a decision of several steps, where neither a run nor ``env.gamma`` says another."""
STEPS = 100_000
COLUMNS = (
    "observation",
    "action",
    "reward",
    "next_observation",
    "terminated",
    "truncated",
    "behavior_log_prob",
    "episode",
    "group",
    "policy_version",
    "source",
    "success",
)
"""Columns that every policy's steps have."""


class Recorder(ControlRollout):
    """Collects with a column ``success``, float32 and NaN in steps of which the environment does not tell it."""

    def _transition(self, observation: Tensor, sample: Mapping[str, Tensor], result: StepResult) -> dict[str, Tensor]:
        told = result.info.get("success", torch.full_like(result.reward, torch.nan))
        return {**super()._transition(observation, sample, result), "success": told.float()}


class RandomPolicy:
    """Acts uniformly over the bounds or choices of a space."""

    def __init__(self, space: Space) -> None:
        self.space = space

    def sample(
        self, observation: Tensor, generator: torch.Generator | None = None, deterministic: bool = False
    ) -> TensorDict:
        """``action [K, a]`` and ``behavior_log_prob [K, 1]``."""
        stream = generator if generator is not None else torch.Generator()
        return TensorDict(random_action(self.space, len(observation), stream), batch_size=[len(observation)])


def make_data(
    env: str,
    kind: str,
    folder: str | os.PathLike[str],
    *,
    steps: int | None = None,
    policy: str | os.PathLike[str] | None = None,
    checkpoint: str | int | None = None,
    parts: Mapping[str, float] | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    allow: Sequence[str] = (),
    config_dirs: Sequence[str] = (),
) -> TensorDict:
    """Writes rows of an environment.

    Args:
        env: its name.
        kind: ``random``; ``medium`` or ``expert``, steps of the policy of a run as it samples; ``mixed``, whole
            episodes of other sets up to their shares.
        folder: is made.
        steps: rows; 100,000 by default, of ``mixed`` as many as the parts allow.
        policy: the run.
        checkpoint: of it, by default the newest.
        parts: folders of ``mixed`` with their shares, which add up to 1.
        settings: of the environment, ``{"env.KEY": VALUE}``.
        seed: of every stream.
        allow: packages that configuration may build.
        config_dirs: folders with options of your own.

    Returns:
        The rows ``[N]``.

    Raises:
        ConfigError: what does not go together (says what works), or parts of another environment.
        CheckpointError: there is no such run.
    """
    from unified_rl.config import compose

    if kind not in KINDS:
        raise ConfigError(f"data make knows no kind {kind!r}: {', '.join(KINDS)}")
    if steps is not None and steps < 1:
        raise ConfigError(f"--steps {steps} must be at least 1")
    _go_together(kind, policy, checkpoint, parts)
    target = check_new(folder)
    chosen = "".join(f" {key}={value}" for key, value in sorted((settings or {}).items()))
    about: dict[str, Any] = {"made": f"data make {env} {kind}{chosen}", "seed": seed}
    words = {"env": env, **(settings or {})}
    about["env"] = env_names(words, allow, config_dirs)
    if kind == "mixed":
        assert parts is not None
        _of_one(parts, about["env"])
        space = Space.of(make_control_env(words, allow, 1, seed, "data make", config_dirs).policy_inputs())
        rows = mixed(parts, space, steps, seed)
        about["parts"] = dict(parts)
    elif kind == "random":
        count = steps or STEPS
        made = make_control_env(words, allow, lanes(count), seed, "data make", config_dirs)
        rows = rolled(made, RandomPolicy(Space.of(made.policy_inputs())), count, seed, words.get("env.gamma", GAMMA))
    else:
        assert policy is not None
        node = compose(words, config_dirs=config_dirs, allow=allow)["env"]
        rows, folder_of_run, about["env"] = _by_run(
            words, node, os.fspath(policy), checkpoint, steps or STEPS, seed, allow
        )
        about["policy"], about["checkpoint"] = folder_of_run, checkpoint
    episodes = Episodes.of(rows)
    if bool(episodes.whole.any()):
        about["return"] = float(episodes.sums(rows["reward"])[episodes.whole].mean())
    write_set(target, rows, about)
    return rows


def _go_together(kind: str, policy: Any, checkpoint: Any, parts: Any) -> None:
    if kind in ("medium", "expert"):
        if policy is None:
            raise ConfigError(
                f"data make ENV {kind} records a trained policy: train one (unified-rl train env=ENV agent=sac "
                "keep_best=eval/return) and name it with --policy RUN [--checkpoint STEP]"
            )
    elif policy is not None or checkpoint is not None:
        raise ConfigError(f"--policy and --checkpoint are of medium and expert, and {kind} takes none")
    if (kind == "mixed") != bool(parts):
        raise ConfigError(
            "--part FOLDER=SHARE is of data make ENV mixed, which needs it once for every set that is mixed"
        )


def lanes(steps: int) -> int:
    """Simulations that share so many steps equally."""
    return max(count for count in range(1, LANES + 1) if steps % count == 0)


@torch.no_grad()
def rolled(env: Any, policy: Any, steps: int, seed: int, gamma: float = GAMMA) -> TensorDict:
    """``[steps]`` rows, simulation after simulation; the last episode of each may be cut."""
    several = int(getattr(env, "steps_per_action", 1)) > 1  # rewards are sums under a discount, which the rows keep
    rollout = Recorder(env, policy, gamma, torch.Generator().manual_seed(seed))
    rollout.noise = None  # log-probs are then of each step for itself, as whoever weighs episodes by them takes them
    columns = (*COLUMNS, "discount") if several else COLUMNS
    each, found = steps // env.num_envs, []
    for done in range(0, each, HORIZON):
        rollout.horizon = min(HORIZON, each - done)
        found.append(rollout.collect(version=0)[0].select(*columns))
    rows: TensorDict = torch.cat(found).transpose(0, 1).reshape(-1)
    rows["source"] = torch.full_like(rows["source"], int(Source.OFFLINE))
    success = rows.pop("success")
    if not bool(success.isnan().all()):
        rows["success"] = success > 0
    return numbered(rows)


def numbered(rows: TensorDict) -> TensorDict:
    """Rows with ``step`` and with episodes that are counted from 0 in their order."""
    episodes = Episodes.of(rows)
    count = torch.repeat_interleave(torch.arange(len(episodes.first)), episodes.length)
    rows["step"] = torch.arange(len(rows)) - episodes.first[count]
    rows["episode"], rows["group"] = count, count.clone()
    return rows


def _by_run(
    words: Mapping[str, Any],
    named: Mapping[str, Any],
    run: str,
    checkpoint: str | int | None,
    steps: int,
    seed: int,
    allow: Sequence[str],
) -> tuple[TensorDict, str, dict[str, str]]:
    """Steps of a run's policy in the run's own environment, which must be the ``named`` one."""
    from unified_rl.training.verbs import restored

    job = restored(run, checkpoint, allow, {"device": "cpu"})
    wanted, own = (with_defaults(node, allow) for node in (named, job.cfg["env"]))
    if names_of(own, allow) != names_of(wanted, allow):
        raise ConfigError(f"{run} was trained in {_said(own)}, and env={words['env']} is {_said(wanted)}")
    given = {key.removeprefix("env.").split(".")[0] for key in words if key != "env"}
    node = {**own, **{key: value for key, value in wanted.items() if key in given}}
    env = built(node, allow, lanes(steps), seed, "data make", job.gamma)
    if env.num_envs != lanes(steps):
        raise ConfigError(f"env={words['env']} makes {env.num_envs} simulations: choose --steps as a multiple of them")
    return rolled(env, job.policy.eval(), steps, seed, job.gamma), run, names_of(node, allow)


def _said(node: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in sorted(node.items()) if isinstance(value, str))


# ---------------------------------------------------------------------------------------------------- mixtures


def _of_one(parts: Mapping[str, float], wanted: Mapping[str, str]) -> None:
    """Refuses sets that say that they are of another environment; equal widths do not tell one maze from another."""
    for name in parts:
        found = env_of_set(name)
        apart = None if found is None else unlike(found, wanted)
        if apart is not None:
            raise ConfigError(f"--part {name} was recorded with {apart[0]} (its {ABOUT}), and env has {apart[1]}")


def mixed(parts: Mapping[str, float], space: Space, steps: int | None, seed: int) -> TensorDict:
    """Whole episodes of every set in random order, the last one cut where its share is reached.

    Raises:
        ConfigError: shares that do not add up to 1, a set that is too small for its own, or one of another environment.
    """
    if any(share <= 0 for share in parts.values()) or not math.isclose(sum(parts.values()), 1.0, abs_tol=1e-6):
        raise ConfigError(
            f"shares of --part must be above 0 and add up to 1, got {', '.join(map(str, parts.values()))}"
        )
    sets = {name: fitted(read_robot_set(name), space, f"--part {name}") for name in parts}
    most = min(int(len(rows) / parts[name] + 1e-6) for name, rows in sets.items())
    count = most if steps is None else steps
    if count > most:
        raise ConfigError(f"--steps {count} is more than the parts allow with these shares: at most {most}")
    keys = [key for key in next(iter(sets.values())).keys() if _alike(sets.values(), key)]
    stream, found, episodes, taken = torch.Generator().manual_seed(seed), [], 0, 0
    for at, (name, rows) in enumerate(sets.items()):
        quota = count - taken if at == len(sets) - 1 else round(parts[name] * count)
        drawn = numbered(_drawn(rows.select(*keys), min(quota, len(rows)), stream))
        drawn["episode"] += episodes
        drawn["group"] += episodes
        episodes, taken = int(drawn["episode"][-1]) + 1, taken + len(drawn)
        found.append(drawn)
    return torch.cat(found)


def _alike(sets: Any, key: str) -> bool:
    """Whether a column is in all sets, in one shape and dtype."""
    return len({(rows[key].shape[1:], rows[key].dtype) if key in rows.keys() else None for rows in sets}) == 1


def _drawn(rows: TensorDict, count: int, stream: torch.Generator) -> TensorDict:
    """The first rows of the episodes in random order."""
    episodes = Episodes.of(rows)
    order = torch.randperm(len(episodes.first), generator=stream)
    length = episodes.length[order]
    place = torch.repeat_interleave(order, length)
    offset = torch.arange(len(rows)) - torch.repeat_interleave(length.cumsum(0) - length, length)
    drawn: TensorDict = rows[(episodes.first[place] + offset)[:count]]
    drawn["episode"] = place[:count]  # two cut ones of one number may lie side by side now
    return drawn
