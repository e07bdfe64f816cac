"""Settings against one another and against the machine, before anything is built, collected or trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from unified_rl.errors import ConfigError
from unified_rl.machine import require_cores, require_disk, require_memory
from unified_rl.observations import layout_of
from unified_rl.policies.adapters import base_folder, is_adapter_folder

SIMULATION = 20_000
"""Bytes of the smallest simulation that an environment of this library keeps."""
Read = Any
"""``(group, key) -> value``: what the configuration says, or the default of the signature that takes it; else None."""


def check_machine(
    threads: int, episodes: int | Literal["all"], num_envs: int, read: Read, control: bool | None
) -> None:
    """Threads against cores, and simulations against memory.

    Args:
        threads: of torch.
        episodes: of one evaluation; control makes a simulation of each.
        num_envs: simulations of the rollout.
        read: see :data:`Read`.
        control: whether the run is of control; None where nobody knows yet.

    Raises:
        ConfigError: names the setting, what it asks for and what there is.
    """
    require_cores(threads, "threads")
    require_cores(read("env", "threads") or 1, "env.threads")
    if control is not False:
        require_memory(SIMULATION * num_envs, f"rollout.num_envs={num_envs} simulations")
    if control and episodes == "all":
        raise ConfigError("eval_episodes=all asks every held-out prompt, and control has none: set a number")
    if control and isinstance(episodes, int):
        require_memory(SIMULATION * episodes, f"eval_episodes={episodes} simulations of the evaluation")


def check_model_folder(path: Any) -> None:
    """The weights in a model folder, or in that of an adapter's base model, against the memory, before they are read.

    Raises:
        ConfigError: gives the size of the files and what there is.
    """
    if isinstance(path, str) and is_adapter_folder(path):
        path = base_folder(path)
    files = list(Path(path).glob("*.safetensors")) if isinstance(path, str) and Path(path).is_dir() else []
    require_memory(sum(file.stat().st_size for file in files), f"the weights in policy.path={path}")


def row_size(inputs: Mapping[str, Any]) -> int:
    """Bytes of one stored row at least, from what an environment gives to its policy; 0 where that says nothing.

    A control row is a transition: two observations, the action, and some 40 bytes of numbers and flags. A language row
    is a padded conversation with, at every position, a token (8), log-prob (4), step (8), version (8) and two flags.
    """
    if "max_length" in inputs:
        return 30 * int(inputs["max_length"])
    if "space" not in inputs:
        return 0
    space = inputs["space"]
    return int(2 * layout_of(space.observation).row_bytes + 4 * space.action.width + 40)


def check_rows(size: int, rows: int, length: int | None, read: Read) -> None:
    """Rows of a collection, of a batch and of the replay against memory or disk.

    Args:
        size: bytes of a row, see :func:`row_size`.
        rows: of a collection.
        length: steps of a row.
        read: see :data:`Read`.

    Raises:
        ConfigError: names the settings, and gives the estimate and what the machine has.
    """
    staleness = read("rollout", "staleness") or 0
    sizes = ", ".join(
        f"rollout.{key}={read('rollout', key)}"
        for key in ("num_envs", "horizon", "prompts", "group_size", "rows", "staleness")
        if read("rollout", key)
    )
    require_memory(size * rows * (length or 1) * (staleness + 1), f"the rows that wait for the agent ({sizes})")
    batch = read("agent", "batch_size")
    if batch:
        require_memory(size * batch, f"agent.batch_size={batch} rows of {size} bytes")


def check_replay_memory(size: int, capacity: int, storage: Any, path: Any) -> None:
    """A replay's rows against the memory, or the disk that its files are on.

    Raises:
        ConfigError: gives the estimate and what there is.
    """
    what = f"replay.capacity={capacity} rows of {size} bytes"
    if storage == "memmap":
        require_disk(size * capacity, Path(path or "."), what)
    else:
        require_memory(size * capacity, what)
