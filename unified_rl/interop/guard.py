"""Calls into an environment, which is somebody else's code: what it raises or returns wrongly becomes one error."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from unified_rl.errors import EnvError, NonFiniteError, UnifiedRLError
from unified_rl.interop.deadline import deadline, seconds_of
from unified_rl.interop.words import describe, one_line
from unified_rl.observations import layout_of
from unified_rl.protocols import ControlEnv, StepResult
from unified_rl.spaces import Space


def name_of(env: object) -> str:
    """What error messages call an environment: its ``name``, where it has one, else its class."""
    name = getattr(env, "name", None)
    return name if isinstance(name, str) and name else type(env).__name__


def reset_env(env: ControlEnv, seed: int | None = None) -> Tensor:
    """``env.reset_batch(seed)``, checked; ``[K, d]`` float32.

    Raises:
        EnvError: it raised, returned something else than such a tensor, or not within its ``step_seconds``.
        NonFiniteError: an observation with a NaN or infinity.
    """
    try:
        with deadline(seconds_of(env)):
            observation = env.reset_batch(seed)
    except UnifiedRLError:
        raise
    except (Exception, SystemExit) as error:
        raise EnvError(f"{name_of(env)} raised in reset: {one_line(error)}") from error
    _check_tensor(env, "reset", "observation", observation, row_dtype(env), 2)
    check_finite(env, "reset", {"observation": observation})
    return observation


def step_env(env: ControlEnv, action: Tensor, number: int, vouched: bool = False) -> StepResult:
    """``env.step_batch(action)``, checked.

    Args:
        env: the environment.
        action: ``[K, a]``.
        number: of the call since the environment was made or reset, for errors.
        vouched: nothing needs a look: the environment is ours to the last line, comes to an end, and refuses what is
            not finite itself.

    Raises:
        EnvError: it raised, returned something else than a :class:`~unified_rl.protocols.StepResult`, or not within
            its ``step_seconds`` (600 where it has none; None is without a limit).
        NonFiniteError: a NaN or infinity in observation or reward.
    """
    try:
        if vouched:
            return env.step_batch(action)
        with deadline(seconds_of(env)):
            result = env.step_batch(action)
    except UnifiedRLError:
        raise
    except (Exception, SystemExit) as error:
        raise EnvError(f"{name_of(env)} raised in step {number}: {one_line(error)}") from error
    if not isinstance(result, StepResult):
        raise EnvError(f"{name_of(env)} returned {describe(result)} from step {number}; a StepResult is expected")
    where = f"step {number}"
    for field, dtype, dims in FIELDS:
        wanted = row_dtype(env) if dtype is None else dtype
        _check_tensor(env, where, field, getattr(result, field), wanted, dims)
    if not isinstance(result.info, dict):
        raise EnvError(f"{name_of(env)} returned info={describe(result.info)} from {where}; a dict is expected")
    check_finite(env, where, {"observation": result.next_observation, "reward": result.reward})
    return result


def is_vouched(env: object) -> bool:
    """Whether an environment says that no code of a user's runs in its steps, and none was put in their place."""
    return getattr(env, "vouched", False) is True and not {"step_batch", "advance"} & vars(env).keys()


def row_dtype(env: object) -> torch.dtype:
    """Of an environment's observations: uint8 where its space holds images, else float32."""
    space = getattr(env, "space", None)
    return layout_of(space.observation).dtype if isinstance(space, Space) else torch.float32


FIELDS: tuple[tuple[str, torch.dtype | None, int], ...] = (
    ("observation", None, 2),
    ("reward", torch.float32, 1),
    ("terminated", torch.bool, 1),
    ("truncated", torch.bool, 1),
    ("next_observation", None, 2),
    ("executed", torch.int64, 1),
)
"""What a step returns: name, dtype (None: that of rows), and dimensions, the first of which counts simulations."""


def _check_tensor(env: ControlEnv, where: str, field: str, value: Any, dtype: torch.dtype, dims: int) -> None:
    fits = isinstance(value, Tensor) and value.dtype == dtype and value.ndim == dims
    if fits and len(value) == env.num_envs:
        return
    size = f"[{env.num_envs}, d]" if dims == 2 else f"[{env.num_envs}]"
    kind = str(dtype).removeprefix("torch.")
    raise EnvError(
        f"{name_of(env)} returned {field}={describe(value)} from {where}; a tensor {size} of {kind} is expected"
    )


def check_finite(env: object, where: str, values: dict[str, Tensor]) -> None:
    """One look at the sum of everything; only a sum that is not finite is looked into.

    Raises:
        NonFiniteError: a NaN or infinity; names the simulation.
    """
    if math.isfinite(sum(float(value.sum()) for value in values.values())):
        return
    for name, value in values.items():
        finite = torch.isfinite(value).reshape(len(value), -1).all(-1)
        if bool(finite.all()):
            continue
        lane = int((~finite).nonzero()[0])
        raise NonFiniteError(
            f"{name_of(env)} returned {name}={describe(value[lane])} from {where}, simulation {lane}: it is not "
            "finite; check the environment, or lower the learning rate or the action bounds"
        )
