"""Stable-Baselines3 algorithms as baselines, under our evaluation, logging and run folders."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from unified_rl.configurable import configurable
from unified_rl.errors import CheckpointError, ConfigError
from unified_rl.protocols import ControlEnv, Domain
from unified_rl.spaces import Space

ALGORITHMS = ("sac", "ppo", "td3", "a2c", "ddpg")


def make_vec_env(env: ControlEnv) -> Any:
    """Our batched environment as a Stable-Baselines3 ``VecEnv``.

    Final observations and time limits are passed on as SB3 expects them (``terminal_observation``,
    ``TimeLimit.truncated``), so that truncation is bootstrapped.
    """
    from stable_baselines3.common.vec_env import VecEnv

    class BatchedVecEnv(VecEnv):
        """Steps ``env`` once a call."""

        def __init__(self) -> None:
            observation, action = Space.of(env.policy_inputs()).as_policies_see_it().to_gymnasium()
            super().__init__(env.num_envs, observation, action)
            self._action: Tensor | None = None

        def reset(self) -> Any:
            """First observations."""
            return env.reset_batch().numpy()

        def step_async(self, actions: np.ndarray) -> None:
            """Keeps the action for :meth:`step_wait`."""
            self._action = torch.from_numpy(np.asarray(actions)).reshape(env.num_envs, -1)

        def step_wait(self) -> Any:
            """Observations, rewards, dones and infos of one step."""
            assert self._action is not None
            result = env.step_batch(self._action)
            done = result.terminated | result.truncated
            infos: list[dict[str, Any]] = [{} for _ in range(env.num_envs)]
            for lane in done.nonzero().flatten().tolist():
                infos[lane]["terminal_observation"] = result.next_observation[lane].numpy()
                infos[lane]["TimeLimit.truncated"] = bool(result.truncated[lane] & ~result.terminated[lane])
            return result.observation.numpy().copy(), result.reward.numpy().copy(), done.numpy(), infos

        def close(self) -> None:
            """The trainer owns the environment."""

        def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
            """Attributes of the batched environment, once a lane."""
            return [getattr(env, attr_name, None)] * env.num_envs

        def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
            """Not supported."""
            raise NotImplementedError

        def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
            """Not supported."""
            raise NotImplementedError

        def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
            """No wrappers."""
            return [False] * env.num_envs

    return BatchedVecEnv()


class SB3Policy(nn.Module):
    """The policy of an SB3 model behind our ``sample``; no log-probs, so it is only evaluated and recorded."""

    domain: ClassVar[Domain] = "control"

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.network = model.policy
        self._model = [model]  # in a list, so that torch does not look for parameters in it

    @torch.no_grad()
    def sample(
        self, observation: Tensor, generator: torch.Generator | None = None, deterministic: bool = False
    ) -> TensorDict:
        """``action [B, a]`` of the model; ``behavior_log_prob`` is NaN because SB3 does not report it."""
        action, _ = self._model[0].predict(observation.cpu().numpy(), deterministic=deterministic)
        rows = len(observation)
        columns = {
            "action": torch.from_numpy(action).reshape(rows, -1),
            "behavior_log_prob": torch.full((rows, 1), torch.nan),
        }
        return TensorDict(columns, batch_size=[rows])


@configurable
class SB3Agent:
    """One Stable-Baselines3 algorithm at its own defaults, trained in slices between our evaluations.

    Args:
        policy: unused; SB3 builds its own.
        env: our control environment with one simulation (SB3's default) or several.
        algorithm: one of :data:`ALGORITHMS`.
        num_envs: simulations (read by the trainer, which makes the environment).
        slice_steps: environment steps between two looks of our trainer.
        gamma: discount.
        options: further keyword arguments of the SB3 constructor.
        seed: SB3's seed.
        device: where SB3 trains.

    Raises:
        ConfigError: an unknown algorithm, or an environment that is not a control environment.
    """

    def __init__(
        self,
        policy: object,
        env: object,
        algorithm: str = "sac",
        num_envs: int = 1,
        slice_steps: int = 2000,
        gamma: float = 0.99,
        options: dict[str, Any] | None = None,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        import stable_baselines3

        if algorithm not in ALGORITHMS:
            raise ConfigError(f"agent.algorithm={algorithm} is not one of {', '.join(ALGORITHMS)}")
        if not isinstance(env, ControlEnv) or env.domain != "control":
            raise ConfigError("Stable-Baselines3 agents need a control environment")
        cls = getattr(stable_baselines3, algorithm.upper())
        self.env = env
        try:
            self.model = cls("MlpPolicy", make_vec_env(env), gamma=gamma, seed=seed, device=device, **(options or {}))
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise ConfigError(
                f"Stable-Baselines3's {algorithm} cannot be made: {' '.join(str(error).split())}"
            ) from error
        self.policy = SB3Policy(self.model)
        self.gamma = gamma
        self.steps_per_update = slice_steps
        self.version = 0
        self._started = False

    def update(self, replay: None = None, progress: float = 0.0) -> dict[str, Any]:
        """Trains for one slice of environment steps; returns SB3's own logged numbers under ``sb3/``."""
        target = self.steps_per_update * (self.version + 1) - self.model.num_timesteps
        if target > 0:
            self.model.learn(target, reset_num_timesteps=not self._started, progress_bar=False)
            self._started = True
        self.version += 1
        logged = dict(self.model.logger.name_to_value)
        episodes = [info["r"] for info in self.model.ep_info_buffer or []]
        return {f"sb3/{k}": float(v) for k, v in logged.items() if isinstance(v, int | float)} | (
            {"rollout/return": float(np.mean(episodes))} if episodes else {}
        )

    def state_dict(self) -> dict[str, Any]:
        """Policy weights and counters; SB3's replay and random streams are not part of it."""
        return {"policy": dict(self.policy.state_dict()), "version": self.version}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stable-Baselines3 stores no exact state.

        Raises:
            CheckpointError: always; evaluate the run instead, or train it again.
        """
        raise CheckpointError("a Stable-Baselines3 run cannot be resumed exactly; train it again in one go")
