"""Folders of rows: written once, with a few words on where they come from, and cut into episodes when they are read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.errors import CheckpointError, ConfigError
from unified_rl.files import write_atomically
from unified_rl.instantiate import locate, parameters, with_defaults
from unified_rl.replay import Replay, Uniform, read_rows
from unified_rl.replay.persist import no_rows
from unified_rl.rollout.environment import make_environment

ABOUT = "dataset.json"
"""Where a set comes from; for people, and for warnings: what rows are is in the rows."""


def check_new(folder: str | os.PathLike[str]) -> Path:
    """Refuses a folder that holds something.

    Raises:
        ConfigError: it does, or it is a file.
    """
    path = Path(folder)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ConfigError(f"{path} exists and is not empty: name a new folder for the rows")
    return path


def write_set(folder: Path, rows: TensorDict, about: Mapping[str, Any]) -> None:
    """Writes ``[N]`` rows as a replay that runs train on.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    replay = Replay(len(rows), sampler=Uniform())
    replay.extend(rows)
    replay.dumps(folder)
    write_atomically(folder / ABOUT, json.dumps(dict(about), indent=1) + "\n")


def read_set(folder: str | os.PathLike[str]) -> TensorDict:
    """The rows ``[N]`` of a folder, simulation after simulation, each in the order of its steps.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    other = no_rows(folder)
    if other is not None:
        raise CheckpointError(f"{os.fspath(folder)} {other}")
    rows = read_rows(folder)
    return rows if rows.ndim == 1 else rows.transpose(0, 1).reshape(-1)


def read_robot_set(folder: str | os.PathLike[str]) -> TensorDict:
    """As :func:`read_set`.

    Raises:
        ConfigError: rows of a language task.
    """
    rows = read_set(folder)
    if "tokens" in rows.keys():
        raise ConfigError(f"{folder} holds {len(rows)} conversations of a language task: unified-rl data is of robots")
    return rows


def read_about(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What was written beside the rows; nothing where nothing was, or cannot be read."""
    try:
        found = json.loads((Path(folder) / ABOUT).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def env_names(words: Mapping[str, Any], allow: Sequence[str] = (), config_dirs: Sequence[str] = ()) -> dict[str, str]:
    """:func:`names_of` the environment of ``{"env": NAME, "env.KEY": VALUE}``."""
    from unified_rl.config import compose

    return names_of(compose(dict(words), config_dirs=config_dirs, allow=allow)["env"], allow)


def names_of(node: Mapping[str, Any], allow: Sequence[str] = ()) -> dict[str, str]:
    """What an environment is: its class, and settings that are names; sizes and weights may be the run's own."""
    return {key: value for key, value in with_defaults(node, allow).items() if isinstance(value, str)}


def unlike(ours: Mapping[str, str], theirs: Mapping[str, str]) -> tuple[str, str] | None:
    """In what two environments differ, in words for each; None where they do not. A file may lie elsewhere by now."""
    last = [{key: os.path.basename(value) for key, value in one.items()} for one in (ours, theirs)]
    keys = [key for key in sorted({*ours, *theirs}) if last[0].get(key) != last[1].get(key)]
    if not keys:
        return None
    first, second = (" ".join(f"{key}={one.get(key, 'null')}" for key in keys) for one in (ours, theirs))
    return first, second


def env_of_set(folder: str | os.PathLike[str]) -> dict[str, str] | None:
    """The environment that a set says it was recorded in, or None."""
    found = read_about(folder).get("env")
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        return None
    return dict(found)


@dataclass
class Episodes:
    """Where the episodes of a set lie.

    Attributes:
        first: ``[E]`` their first rows.
        last: ``[E]`` their last ones.
        whole: ``[E]`` whether the last one says that the episode ended, and the first one, where that is told, that it
            began.
    """

    first: Tensor
    last: Tensor
    whole: Tensor

    @classmethod
    def of(cls, rows: TensorDict) -> Episodes:
        """By the rows' ``episode``; without it by their ends."""
        count = len(rows)
        ended = torch.zeros(count, dtype=torch.bool)
        for key in ("terminated", "truncated"):
            if key in rows.keys():
                ended |= rows[key].reshape(count)
        last = ended.clone()
        if "episode" in rows.keys():
            ids = rows["episode"].reshape(count)
            last = torch.zeros(count, dtype=torch.bool)
            last[:-1] = ids[1:] != ids[:-1]
        last[-1] = True
        ends = last.nonzero().flatten()
        first = torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1] + 1])
        begun = rows["step"].reshape(count)[first] == 0 if "step" in rows.keys() else torch.ones(len(first)).bool()
        return cls(first, ends, ended[ends] & begun)

    @property
    def length(self) -> Tensor:
        """``[E]`` steps."""
        return self.last - self.first + 1

    def sums(self, column: Tensor) -> Tensor:
        """``[E]`` float64: the sum of a column over each episode."""
        total = torch.cat([torch.zeros(1, dtype=torch.float64), column.double().reshape(-1).cumsum(0)])
        return total[self.last + 1] - total[self.first]


def make_control_env(
    words: Mapping[str, Any],
    allow: Sequence[str],
    num_envs: int,
    seed: int,
    command: str,
    config_dirs: Sequence[str] = (),
) -> Any:
    """The environment of ``{"env": NAME, "env.KEY": VALUE}``.

    Raises:
        ConfigError: words of another group, none of them, or an environment of language.
    """
    from unified_rl.config import compose

    if "env" not in words:
        raise ConfigError(f"{command} needs an environment, for example env=half_cheetah")
    return built(compose(dict(words), config_dirs=config_dirs, allow=allow)["env"], allow, num_envs, seed, command)


def built(
    node: Mapping[str, Any], allow: Sequence[str], num_envs: int, seed: int, command: str, gamma: float | None = None
) -> Any:
    """The environment of a node of a configuration, with what its settings put around it.

    Args:
        node: of the group ``env``.
        allow: packages that configuration may build.
        num_envs: simulations.
        seed: of them.
        command: for errors.
        gamma: discount of a step, within what is executed at once; None is the environment's default.

    Raises:
        ConfigError: it cannot be made, or is one of language.
    """
    from unified_rl.config import build

    target = locate(node["_target_"], allow, "env")
    if getattr(target, "domain", None) == "language":
        raise ConfigError(f"env is of language, and {command} is of robots")
    taken, _ = parameters(target, allow)
    wanted = {"num_envs": num_envs, "seed": seed, **({} if gamma is None else {"gamma": gamma})}
    given = {key: value for key, value in wanted.items() if key in taken}
    env = make_environment(
        node,
        taken,
        lambda own: build(own, allow=allow, setting="env", **given),
        num_envs=num_envs,
        seed=seed,
        gamma=gamma,
        allow=allow,
    )
    if env.domain != "control":
        raise ConfigError(f"env is of {env.domain}, and {command} is of robots")
    return env
