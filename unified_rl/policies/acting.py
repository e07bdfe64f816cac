"""A policy outside training: an observation as a robot has it in, an action as its space has it out."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from tensordict import TensorDictBase
from torch import Tensor, nn

from unified_rl.errors import ConfigError, NonFiniteError, RecordError
from unified_rl.spaces import Box, Discrete, MultiDiscrete, Part, Space


@runtime_checkable
class HasBestAction(Protocol):
    """A policy whose deterministic action is a function of the observation alone."""

    def deterministic_action(self, observation: Tensor) -> Tensor:
        """``[M, d]`` raw to ``[M, a]``."""
        ...


class InSpace(nn.Module):
    """Flat actions ``[M, a]`` of a policy as values ``[M, *shape]`` of an action space: its dtype, bounds, numbering.

    As :meth:`unified_rl.spaces.Part.cast`, in torch: real actions are cast first and clipped to the bounds after it.

    Args:
        part: the action space.

    Raises:
        ConfigError: one that holds neither an array of numbers nor choices.
    """

    first: Tensor | None
    low: Tensor | None
    high: Tensor | None

    def __init__(self, part: Part) -> None:
        super().__init__()
        choices = part.choices
        if choices is None and not isinstance(part, Box):
            raise ConfigError(f"an action cannot be {part.describe()}: arrays of numbers and choices can")
        self.shape, self.dtype = part.shape, getattr(torch, part.dtype)
        first: Tensor | None = None
        low: Tensor | None = None
        high: Tensor | None = None
        if choices is not None:
            first = torch.tensor(_first(part, len(choices)), dtype=torch.int64)
        elif isinstance(part, Box):
            low = torch.tensor(part.low_array.ravel(), dtype=self.dtype)
            high = torch.tensor(part.high_array.ravel(), dtype=self.dtype)
        for name, value in (("first", first), ("low", low), ("high", high)):
            self.register_buffer(name, value, persistent=False)

    def forward(self, action: Tensor) -> Tensor:
        """``[M, a]`` to ``[M, *shape]``."""
        rows = action.shape[0]
        if self.first is not None:
            return (action.reshape(rows, -1).to(torch.int64) + self.first).to(self.dtype).reshape(rows, *self.shape)
        assert self.low is not None and self.high is not None
        cast = action.reshape(rows, -1).to(self.dtype)
        return torch.minimum(torch.maximum(cast, self.low), self.high).reshape(rows, *self.shape)


_in_space = lru_cache(maxsize=64)(InSpace)


def _first(part: Part, entries: int) -> list[int]:
    """The environment's number of each entry's first choice."""
    if isinstance(part, Discrete):
        return [part.start]
    if isinstance(part, MultiDiscrete):
        return list(part.start)
    return [int(low) for low in part.low_array.ravel()] if isinstance(part, Box) else [0] * entries


def act(
    policy: Any,
    space: Space,
    observation: ArrayLike | Tensor,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
) -> NDArray[Any] | Tensor:
    """The action of a policy, as the environment's action space has it.

    Args:
        policy: samples actions ``[M, a]``.
        space: of the environment.
        observation: one ``[d]`` or a batch ``[..., d]`` of any real dtype: a tensor, or what NumPy makes an array of.
        deterministic: the policy's best guess, a function of the observation alone where the policy has
            ``deterministic_action``; else a sample.
        generator: stream of samples; the policy's own seeded one if None.

    Returns:
        ``[*shape]`` or ``[..., *shape]`` in the action space's dtype: a tensor where a tensor came, else an array.

    Raises:
        RecordError: an observation of another width, or no numbers.
        NonFiniteError: a NaN or infinity in it.
    """
    given = observation if isinstance(observation, Tensor) else _tensor(observation, space.observation)
    wanted = space.observation.shape
    lead = given.shape[: given.ndim - len(wanted)]
    if given.ndim < len(wanted) or given.shape[len(lead) :] != wanted or given.is_complex():
        raise RecordError(
            f"the observation has shape {list(given.shape)}, and this policy sees {space.observation.describe()}: "
            f"one of shape {list(wanted)}, or several stacked before it"
        )
    weight = next(iter(policy.parameters()), torch.zeros(())) if isinstance(policy, nn.Module) else torch.zeros(())
    rows = given.to(weight.device, weight.dtype).reshape(-1, *wanted)
    if not bool(torch.isfinite(rows).all()):
        raise NonFiniteError("the observation holds a NaN or infinity; no action was chosen")
    if not len(rows):
        rows = rows.new_zeros(1, *wanted)  # of none there are none, in the shape and dtype of one
    with torch.no_grad():
        if deterministic and isinstance(policy, HasBestAction):
            chosen = policy.deterministic_action(rows)
        else:
            chosen = policy.sample(rows, generator=generator, deterministic=deterministic)["action"]
        action: Tensor = _in_space(space.action)(chosen.to("cpu"))
    action = action[: math.prod(lead)].reshape(lead + action.shape[1:])
    return action.to(given.device) if isinstance(observation, Tensor) else action.numpy()[()]


def _tensor(observation: ArrayLike, part: Part) -> Tensor:
    try:
        found = np.asarray(observation)
        kind = found.dtype.kind
    except (ValueError, TypeError):
        kind = "O"
    if kind not in "biuf":
        raise RecordError(
            f"the observation is a {type(observation).__name__} that is no array of numbers, and this policy sees "
            f"{part.describe()} (reset() returns the observation and a dict of infos: give the first)"
        )
    return torch.from_numpy(found.astype(np.float64 if found.dtype.itemsize > 4 else np.float32))


class Actor:
    """A policy of another class, called as ours are: ``actor(observation)`` acts, all else is the policy's own.

    Args:
        policy: samples actions.
        space: of the environment.
    """

    def __init__(self, policy: Any, space: Space) -> None:
        self.policy, self.space = policy, space

    def __call__(
        self,
        observation: ArrayLike | Tensor | TensorDictBase,
        *,
        deterministic: bool = True,
        generator: torch.Generator | None = None,
    ) -> Any:
        """See :func:`act`; a TensorDict goes to the policy itself."""
        if isinstance(observation, TensorDictBase):
            return self.policy(observation)
        return act(self.policy, self.space, observation, deterministic, generator)

    def __getattr__(self, name: str) -> Any:
        if name == "policy":
            raise AttributeError(name)
        return getattr(self.policy, name)
