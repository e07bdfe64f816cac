"""Putting a saved state into what a configuration built: what does not fit is one error, whoever wrote the file."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from unified_rl.errors import CheckpointError
from unified_rl.files import fitting
from unified_rl.optimizer import first_non_finite


def restoring(path: object) -> AbstractContextManager[None]:
    """Within it, a state that lacks something, or holds something else there, is an error about ``path``.

    Raises:
        CheckpointError: names ``path`` and what was wrong.
    """
    return fitting(f"{path} does not fit what its configuration describes")


def policy_state(state: Mapping[str, Any], path: object) -> dict[str, Any]:
    """The policy's part of a run's state: weights without a NaN or infinity.

    Raises:
        CheckpointError: there is none, or a weight is not finite.
    """
    with restoring(path):
        found: dict[str, Any] = state["agent"]["policy"]
        check_finite({name: value for name, value in found.items() if isinstance(value, Tensor)}, path)
    return found


def check_finite(weights: Mapping[str, Tensor], path: object) -> None:
    """Refuses weights that would make every output NaN.

    Raises:
        CheckpointError: names the first.
    """
    bad = first_non_finite((name, value) for name, value in weights.items() if value.is_floating_point())
    if bad is not None:
        raise CheckpointError(f"{path}: the weight {bad} holds a NaN or infinity; it was never trained, or is damaged")
