"""Any TorchRL ``EnvBase`` as a control environment of ours."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import Categorical, MultiCategorical, MultiOneHot, OneHot, TensorSpec
from torchrl.data.tensor_specs import ContinuousBox
from torchrl.envs import EnvBase

from unified_rl.configurable import configurable
from unified_rl.errors import ConfigError, EnvError, RestoreError
from unified_rl.interop.deadline import seconds_of
from unified_rl.interop.gymnasium_vector import from_gymnasium
from unified_rl.interop.words import OWN_NAMES, describe, one_line
from unified_rl.protocols import ControlEnv, LanguageEnv, StepResult
from unified_rl.spaces import Box, Discrete, MultiDiscrete, Part, PolicyInputs, Space


@configurable
class TorchRLControlEnv:
    """Steps a TorchRL environment through its own API, with auto-reset and true final observations.

    Args:
        env: batch size ``[]`` or ``[K]``, with a flat ``observation`` and an action that is a vector or discrete
            choices (categorical or one-hot, one or several).
        max_steps: length after which evaluation gives up on an episode that does not end.

    Raises:
        ConfigError: the environment has another layout; the message says which.
    """

    domain = "control"

    def __init__(self, env: EnvBase, max_steps: int = 1000) -> None:
        if len(env.batch_size) > 1:
            raise ConfigError(
                f"the environment has batch size {tuple(env.batch_size)}; one dimension at most is supported"
            )
        if "observation" not in env.observation_spec.keys():
            keys = ", ".join(map(str, env.observation_spec.keys()))
            raise ConfigError(
                f"the environment has no 'observation' ({keys}); append a CatTensors transform that makes it"
            )
        self.env, self.max_steps, self.name = env, max_steps, type(env).__name__
        self.step_seconds = seconds_of(env)
        if "action" not in env.full_action_spec.keys():
            keys = ", ".join(map(str, env.full_action_spec.keys()))
            raise ConfigError(f"the environment has no 'action' ({keys}); append a RenameTransform that makes it")
        self._spec = env.full_action_spec["action"]
        self.space = Space(
            Box((env.observation_spec["observation"].shape[-1],)), _action_part(self._spec, len(env.batch_size))
        )
        self.num_envs = env.batch_size[0] if len(env.batch_size) else 1
        self._current: TensorDictBase | None = None
        self._count = 0

    def policy_inputs(self) -> dict[str, Any]:
        """What a policy's constructor takes: ``space``."""
        return PolicyInputs(self.space)

    def seed(self, seed: int) -> None:
        """Restarts the environment's random streams by its own ``set_seed``."""
        try:
            self.env.set_seed(seed)
        except (Exception, SystemExit) as error:
            raise EnvError(f"{self.name} raised in set_seed: {one_line(error)}") from error

    def reset_batch(self, seed: int | None = None) -> Tensor:
        """Resets; ``[K, d]`` float32.

        Raises:
            EnvError: it raised, or its observation is missing or of another size.
        """
        if seed is not None:
            self.seed(seed)
        self._current, self._count = self._reset(), 0
        return self._observation(self._current, "reset")

    def _reset(self) -> TensorDictBase:
        try:
            return self.env.reset()
        except (Exception, SystemExit) as error:
            raise EnvError(f"{self.name} raised in reset: {one_line(error)}") from error

    def step_batch(self, action: Tensor) -> StepResult:
        """Steps and resets the simulations that ended.

        Scalars of ``info`` entries and of single numbers a simulation beside the observation (``success``) are told
        where episodes end.

        Raises:
            EnvError: it raised, or an entry of its answer is missing, of another size or no number.
        """
        if self._current is None:
            self.reset_batch()
        assert self._current is not None
        self._count += 1
        where = f"step {self._count}"
        self._current["action"] = self._encode(action)
        try:
            stepped, following = self.env.step_and_maybe_reset(self._current)
        except (Exception, SystemExit) as error:
            raise EnvError(f"{self.name} raised in {where}: {one_line(error)}") from error
        self._current = following
        after = stepped["next"]
        ones = torch.ones(self.num_envs, dtype=torch.int64)
        terminated = self._column(after, "terminated", where).bool()
        truncated = self._column(after, "truncated", where).bool() if "truncated" in after.keys() else ~ones.bool()
        terminated |= self._column(after, "done", where).bool() & ~truncated  # it was reset, whatever the others say
        return StepResult(
            observation=self._observation(following, where),
            reward=self._column(after, "reward", where).float(),
            terminated=terminated,
            truncated=truncated,
            next_observation=self._observation(after, where),
            executed=ones,
            info=self._told(after),
        )

    def _column(self, after: TensorDictBase, key: str, where: str) -> Tensor:
        """One number a simulation, ``[K]``."""
        value = after.get(key, None)
        if not isinstance(value, Tensor) or value.numel() != self.num_envs or value.is_complex():
            raise EnvError(
                f"{self.name} returned {key}={describe(value)} from {where}; one number a simulation is expected "
                f"({self.num_envs})"
            )
        return value.reshape(self.num_envs).clone()

    def _told(self, after: TensorDictBase) -> dict[str, Tensor]:
        """Every single number a simulation that is neither reward nor flag, ``is_success`` as ``success`` too."""
        told: dict[str, Tensor] = {}
        for key, value in after.items(include_nested=True, leaves_only=True):
            name = key if isinstance(key, str) else key[-1]
            single = isinstance(value, Tensor) and value.numel() == self.num_envs and not value.is_complex()
            if single and name not in OWN_KEYS and not name.startswith("_"):
                told[name] = value.reshape(self.num_envs).float()
        if "is_success" in told:
            told.setdefault("success", told["is_success"])
        return told

    def _encode(self, action: Tensor) -> Tensor:
        """Actions ``[K, a]`` as the environment's spec has them: numbers inside the bounds, choices, or one-hot."""
        spec, choices = self._spec, self.space.action.choices
        if choices is None:
            values = self.space.action.cast(action.detach().reshape(self.num_envs, -1).numpy())
            return torch.from_numpy(values).reshape(spec.shape)
        chosen = action.reshape(self.num_envs, len(choices)).long()
        if isinstance(spec, OneHot | MultiOneHot):
            columns = zip(chosen.unbind(-1), choices, strict=True)
            chosen = torch.cat([torch.nn.functional.one_hot(column, count) for column, count in columns], -1)
        return chosen.reshape(spec.shape).to(spec.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: an ``EnvBase`` offers no exact restore, see :meth:`load_state_dict`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises RestoreError: transitions from the stored observation on would never have happened."""
        raise RestoreError("a TorchRL environment offers no way to put it back to where it was")

    def resumable(self) -> str | bool:
        """Why a run in it cannot be resumed bit for bit."""
        return "a TorchRL environment offers no way to put it back to where it was"

    def close(self) -> None:
        """Closes the environment."""
        self.env.close()

    def _observation(self, td: TensorDictBase, where: str) -> Tensor:
        value, width = td.get("observation", None), self.space.observation_dim
        if not isinstance(value, Tensor) or value.numel() != self.num_envs * width or value.is_complex():
            raise EnvError(
                f"{self.name} returned observation={describe(value)} from {where}; {self.num_envs} x {width} numbers "
                "are expected"
            )
        out: Tensor = value.reshape(self.num_envs, width).float().clone()
        return out


OWN_KEYS = OWN_NAMES | {
    "observation", "action", "reward", "done", "terminated", "truncated", "step_count", "is_init", "pixels",
}  # fmt: skip
"""Entries that are no infos, and metrics that an info must not replace."""


def _action_part(spec: TensorSpec, batch_dims: int) -> Part:
    """The action space of one simulation.

    Raises:
        ConfigError: a kind of spec that is neither a vector nor choices.
    """
    if isinstance(spec, MultiCategorical | MultiOneHot):
        return MultiDiscrete(tuple(int(box.n) for box in spec.space))
    if isinstance(spec, Categorical | OneHot):  # binary specs are categorical ones
        entries = 1 if isinstance(spec, OneHot) else math.prod(spec.shape[batch_dims:])
        return Discrete(int(spec.space.n)) if entries == 1 else MultiDiscrete((int(spec.space.n),) * entries)
    if isinstance(spec.space, ContinuousBox) and len(spec.shape):
        most = torch.finfo(spec.dtype).max if spec.dtype.is_floating_point else torch.iinfo(spec.dtype).max
        low, high = (bound.reshape(-1, spec.shape[-1])[0] for bound in (spec.space.low, spec.space.high))
        lower = tuple(x if abs(x) < most else -math.inf for x in low.tolist())
        upper = tuple(x if abs(x) < most else math.inf for x in high.tolist())
        return Box((spec.shape[-1],), str(spec.dtype).removeprefix("torch."), lower, upper)
    raise ConfigError(f"the environment acts in a {type(spec).__name__}; a vector and discrete choices are supported")


def as_environment(
    env: object, again: Callable[[], Any] | None = None, num_envs: int = 1, seed: int = 0
) -> ControlEnv | LanguageEnv:
    """The environment itself where it speaks our protocol, else an adapter over one of TorchRL's or Gymnasium's.

    Args:
        env: the environment.
        again: makes another one like it, for copies of a ``gymnasium.Env``.
        num_envs: how many copies of that there are to be.
        seed: of their episodes.

    Raises:
        ConfigError: none of these.
    """
    if isinstance(env, ControlEnv | LanguageEnv):
        return env
    if isinstance(env, EnvBase):
        return TorchRLControlEnv(env)
    kind = type(env)
    if any(cls.__module__.partition(".")[0] == "gymnasium" for cls in kind.__mro__):
        found = from_gymnasium(env, again, num_envs, seed)
        if found is not None:
            return found
    if any(cls.__module__.partition(".")[0] == "gym" for cls in kind.__mro__):
        raise ConfigError(
            f"{kind.__name__} is an environment of gym, which Gymnasium has taken over: wrap it by shimmy"
        )
    raise ConfigError(
        f"{kind.__name__} is neither a ControlEnv, a LanguageEnv, a TorchRL EnvBase nor an environment of Gymnasium"
    )
