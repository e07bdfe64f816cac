"""Stable-Baselines3 algorithms as baselines, under our evaluation, logging and run folders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from unified_rl.configurable import configurable
from unified_rl.errors import CheckpointError, ConfigError
from unified_rl.interop.guard import reset_env, step_env
from unified_rl.policies.networks import activation_named
from unified_rl.protocols import ControlEnv, Domain, StepResult
from unified_rl.ranges import Count, Seed, UnitInterval, ranged
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
            self.steps = 0
            self.ended: list[dict[str, float]] = []
            self._return = torch.zeros(env.num_envs, dtype=torch.float64)
            self._length = torch.zeros(env.num_envs, dtype=torch.int64)
            self._calls = 0

        def reset(self) -> Any:
            """First observations."""
            return reset_env(env).numpy()

        def step_async(self, actions: np.ndarray) -> None:
            """Keeps the action for :meth:`step_wait`."""
            self._action = torch.from_numpy(np.asarray(actions)).reshape(env.num_envs, -1)

        def step_wait(self) -> Any:
            """Observations, rewards, dones and infos of one step."""
            assert self._action is not None
            self._calls += 1
            result = step_env(env, self._action, self._calls)
            self.steps += int(result.executed.sum())
            self._return += result.plain_reward
            self._length += result.executed
            done = result.terminated | result.truncated
            infos: list[dict[str, Any]] = [{} for _ in range(env.num_envs)]
            for lane in done.nonzero().flatten().tolist():
                infos[lane]["terminal_observation"] = result.next_observation[lane].numpy()
                infos[lane]["TimeLimit.truncated"] = bool(result.truncated[lane] & ~result.terminated[lane])
                infos[lane]["episode"] = self._end(lane, result)
            return result.observation.numpy().copy(), result.reward.numpy().copy(), done.numpy(), infos

        def _end(self, lane: int, result: StepResult) -> dict[str, float]:
            """Notes an episode that ended; its undiscounted return and its length as SB3 wants them."""
            told = {key: float(value[lane]) for key, value in result.info.items()}
            told |= {"return": float(self._return[lane]), "length": float(self._length[lane])}
            self.ended.append(told)
            self._return[lane], self._length[lane] = 0.0, 0
            return {"r": told["return"], "l": told["length"], "t": 0.0}

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
    """The policy of an SB3 model behind our ``sample``; no log-probs, so it is only evaluated and recorded.

    Args:
        model: the SB3 algorithm.
        moments: whose ``obs_rms`` standardises observations, SB3's ``VecNormalize``; None leaves them as they are.
    """

    domain: ClassVar[Domain] = "control"
    mean: Tensor
    var: Tensor

    def __init__(self, model: Any, moments: Any = None) -> None:
        super().__init__()
        self.network = model.policy
        self._model, self._moments = [model], [moments]  # in lists, so that torch does not look for parameters in them
        if moments is not None:
            self.register_buffer("mean", torch.from_numpy(moments.obs_rms.mean.copy()))
            self.register_buffer("var", torch.from_numpy(moments.obs_rms.var.copy()))

    def follow(self) -> None:
        """Takes the moments of what SB3 has seen so far."""
        (moments,) = self._moments
        if moments is not None:
            self.mean.copy_(torch.from_numpy(moments.obs_rms.mean))
            self.var.copy_(torch.from_numpy(moments.obs_rms.var))

    def standardized(self, observation: Tensor) -> Tensor:
        """Observations as the network takes them, clipped as ``VecNormalize`` clips them."""
        (moments,) = self._moments
        if moments is None:
            return observation
        scaled: Tensor = (observation - self.mean) / (self.var + moments.epsilon).sqrt()
        return scaled.clamp(-moments.clip_obs, moments.clip_obs).to(observation.dtype)

    @torch.no_grad()
    def sample(
        self, observation: Tensor, generator: torch.Generator | None = None, deterministic: bool = False
    ) -> TensorDict:
        """``action [B, a]`` of the model; ``behavior_log_prob`` is NaN because SB3 does not report it."""
        seen = self.standardized(observation.cpu()).numpy()
        action, _ = self._model[0].predict(seen, deterministic=deterministic)
        rows = len(observation)
        columns = {
            "action": torch.from_numpy(action).reshape(rows, -1),
            "behavior_log_prob": torch.full((rows, 1), torch.nan),
        }
        return TensorDict(columns, batch_size=[rows])


def _named(options: Mapping[str, Any]) -> dict[str, Any]:
    """SB3's keyword arguments, with the class of an activation where configuration has its name.

    Raises:
        ConfigError: no activation has that name.
    """
    inner = options.get("policy_kwargs")
    if not isinstance(inner, Mapping) or not isinstance(inner.get("activation_fn"), str):
        return dict(options)
    return {**options, "policy_kwargs": {**inner, "activation_fn": activation_named(inner["activation_fn"])}}


@configurable
@ranged("agent")
class SB3Agent:
    """One Stable-Baselines3 algorithm at its own defaults, trained in slices between our evaluations.

    Args:
        policy: unused; SB3 builds its own.
        env: our control environment with one simulation (SB3's default) or several.
        algorithm: one of :data:`ALGORITHMS`.
        num_envs: simulations (read by the trainer, which makes the environment).
        slice_steps: environment steps between two looks of our trainer; rounded up to whole rollouts (``n_steps`` in
            every simulation) of algorithms that collect those.
        gamma: discount.
        normalize: observations and rewards standardised by their running moments, SB3's ``VecNormalize`` (what
            rl-zoo's files call ``normalize``).
        options: further keyword arguments of the SB3 constructor; ``policy_kwargs.activation_fn`` is a name in
            :data:`unified_rl.policies.networks.ACTIVATIONS`.
        seed: SB3's seed.
        device: where SB3 trains.
        budget: the run's ``steps``: the last slice, and its last rollout, are cut so that no more are made. None: no
            limit.

    Attributes:
        steps_per_update: environment steps of a slice.

    Raises:
        ConfigError: an unknown algorithm, or an environment that is not a control environment.
    """

    def __init__(
        self,
        policy: object,
        env: object,
        algorithm: Literal["sac", "ppo", "td3", "a2c", "ddpg"] = "sac",
        num_envs: Count = 1,
        slice_steps: Count = 2000,
        gamma: UnitInterval = 0.99,
        normalize: bool = False,
        options: dict[str, Any] | None = None,
        seed: Seed = 0,
        device: str = "cpu",
        budget: int | None = None,
    ) -> None:
        import stable_baselines3
        from stable_baselines3.common.logger import Logger
        from stable_baselines3.common.vec_env import VecNormalize

        if algorithm not in ALGORITHMS:
            raise ConfigError(f"agent.algorithm={algorithm} is not one of {', '.join(ALGORITHMS)}")
        if not isinstance(env, ControlEnv) or env.domain != "control":
            raise ConfigError("Stable-Baselines3 agents need a control environment")
        if "tensorboard_log" in (options or {}):
            raise ConfigError("agent.options.tensorboard_log would write beside the run's folder; the run logs sb3/*")
        cls = getattr(stable_baselines3, algorithm.upper())
        self.env = env
        try:
            self._vec = make_vec_env(env)
            seen = VecNormalize(self._vec, gamma=gamma) if normalize else self._vec
            self.model = cls("MlpPolicy", seen, gamma=gamma, seed=seed, device=device, **_named(options or {}))
            self.model.set_logger(Logger(None, []))  # else SB3 leaves an empty folder among the temporary files
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise ConfigError(
                f"Stable-Baselines3's {algorithm} cannot be made: {' '.join(str(error).split())}"
            ) from error
        self.policy = SB3Policy(self.model, seen if normalize else None)
        self.gamma = gamma
        self._per_call = env.num_envs * int(getattr(env, "steps_per_action", 1))
        unit = self._per_call * self._horizon
        self.steps_per_update = -(-slice_steps // unit) * unit
        self.budget = budget
        self.version = 0
        self._started = False

    @property
    def _horizon(self) -> int:
        """Steps in every simulation of a rollout; 1 without rollouts, where SB3's ``n_steps`` is that of returns."""
        return int(self.model.n_steps) if hasattr(self.model, "rollout_buffer") else 1

    @property
    def steps(self) -> int:
        """Environment steps made so far: SB3's ``num_timesteps``, or all steps of chunks of actions."""
        return int(self._vec.steps)

    def update(self, replay: None = None, progress: float = 0.0) -> dict[str, Any]:
        """Trains for one slice of environment steps.

        Returns:
            SB3's own logged numbers under ``sb3/``, and ``rollout/return`` (undiscounted), ``rollout/length`` and the
            environment's own, over the episodes that ended in the slice, which ``rollout/episodes`` counts.
        """
        target = self.steps_per_update * (self.version + 1)
        target = target if self.budget is None else min(target, self.budget)
        calls = -(-target // self._per_call) - self.model.num_timesteps // self.env.num_envs
        for length in self._rollouts(calls):
            self._learn(length)
        self.policy.follow()
        self.version += 1
        logged = {
            f"sb3/{k}": float(v) for k, v in self.model.logger.name_to_value.items() if isinstance(v, int | float)
        }
        return logged | self._episode_means()

    def _rollouts(self, calls: int) -> list[int]:
        """Steps in every simulation, by call of SB3's ``learn``: whole rollouts, and then what is left."""
        rest = calls % self._horizon
        return [part for part in (calls - rest, rest) if part > 0]

    def _learn(self, calls: int) -> None:
        if calls < self._horizon:  # the last rollout of the budget; SB3 has no other way to make a shorter one
            self.model.n_steps = self.model.rollout_buffer.buffer_size = calls
        self.model.learn(calls * self.env.num_envs, reset_num_timesteps=not self._started, progress_bar=False)
        self._started = True

    def _episode_means(self) -> dict[str, float]:
        ended, self._vec.ended = self._vec.ended, []
        told = {key: [e[key] for e in ended if key in e] for key in dict.fromkeys(k for e in ended for k in e)}
        means = {f"rollout/{key}": float(np.nanmean(value)) for key, value in told.items() if not np.isnan(value).all()}
        return {**means, "rollout/episodes": float(len(ended))} if ended else {}

    def state_dict(self) -> dict[str, Any]:
        """Policy weights and counters; SB3's replay and random streams are not part of it."""
        return {"policy": dict(self.policy.state_dict()), "version": self.version}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stable-Baselines3 stores no exact state.

        Raises:
            CheckpointError: always; evaluate the run instead, or train it again.
        """
        raise CheckpointError("a Stable-Baselines3 run cannot be resumed exactly; train it again in one go")
