"""Any TorchRL ``EnvBase`` as a control environment of ours."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import Categorical
from torchrl.envs import EnvBase

from unified_rl.errors import ConfigError
from unified_rl.protocols import StepResult


class TorchRLControlEnv:
    """Steps a TorchRL environment through its own API, with auto-reset and true final observations.

    Args:
        env: batch size ``[]`` or ``[K]``, with a flat ``observation`` and a bounded continuous or a categorical action.
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
        self.env, self.max_steps = env, max_steps
        self.num_envs = env.batch_size[0] if len(env.batch_size) else 1
        self._current: TensorDictBase | None = None

    def policy_inputs(self) -> dict[str, Any]:
        """Sizes and bounds read from the specs."""
        dim = self.env.observation_spec["observation"].shape[-1]
        spec = self.env.full_action_spec["action"]
        if isinstance(spec, Categorical):
            return {"observation_dim": dim, "num_actions": int(spec.space.n)}
        low = spec.space.low.reshape(-1, spec.shape[-1])[0]
        high = spec.space.high.reshape(-1, spec.shape[-1])[0]
        return {
            "observation_dim": dim,
            "action_dim": spec.shape[-1],
            "action_low": low.tolist(),
            "action_high": high.tolist(),
        }

    def reset_batch(self, seed: int | None = None) -> Tensor:
        """Resets; ``[K, d]`` float32."""
        if seed is not None:
            self.env.set_seed(seed)
        self._current = self.env.reset()
        return self._observation(self._current)

    def step_batch(self, action: Tensor) -> StepResult:
        """Steps and resets the simulations that ended."""
        if self._current is None:
            self.reset_batch()
        assert self._current is not None
        spec = self.env.full_action_spec["action"]
        self._current["action"] = action.reshape(spec.shape).to(spec.dtype)
        stepped, following = self.env.step_and_maybe_reset(self._current)
        self._current = following
        after = stepped["next"]
        ones = torch.ones(self.num_envs, dtype=torch.int64)
        terminated = after["terminated"].reshape(self.num_envs).clone()
        truncated = after["truncated"].reshape(self.num_envs).clone() if "truncated" in after.keys() else ~ones.bool()
        return StepResult(
            observation=self._observation(following),
            reward=after["reward"].reshape(self.num_envs).float(),
            terminated=terminated,
            truncated=truncated,
            next_observation=self._observation(after),
            executed=ones,
            info={},
        )

    def state_dict(self) -> dict[str, Any]:
        """TorchRL environments carry no state that could be stored: see :meth:`load_state_dict`."""
        return {"resumable": False}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Starts new episodes: an ``EnvBase`` offers no exact restore."""
        self._current = self.env.reset()

    def close(self) -> None:
        """Closes the environment."""
        self.env.close()

    def _observation(self, td: TensorDictBase) -> Tensor:
        return td["observation"].reshape(self.num_envs, -1).float().clone()


def as_environment(env: Any) -> Any:
    """The environment itself where it speaks our protocol, else an adapter over an ``EnvBase``.

    Raises:
        ConfigError: neither.
    """
    if getattr(env, "domain", None) in ("control", "language"):
        return env
    if isinstance(env, EnvBase):
        return TorchRLControlEnv(env)
    raise ConfigError(f"{type(env).__name__} is neither a ControlEnv, a LanguageEnv nor a TorchRL EnvBase")
