"""Batched control rollouts: K simulations, one policy call and one environment call a step."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.errors import NonFiniteError
from unified_rl.rollout.protocols import ControlEnv
from unified_rl.units import Source


class ControlRollout:
    """Collects transitions ``[horizon, num_envs]`` with the current policy.

    Args:
        env: a :class:`~unified_rl.rollout.protocols.ControlEnv` of ``num_envs`` simulations.
        policy: anything with ``sample(observation, generator, deterministic)``.
        gamma: discount of one control step; a chunk of h executed steps has discount ``gamma ** h``.
        generator: the stream that actions are drawn from.
        num_envs: simulations stepped together.
        horizon: steps of one call of :meth:`collect`.
        staleness: how many updates old the policy is that sampled the rows of an update. The trainer keeps that many
            collected batches in the replay, so rows carry the version that really acted.
        random_steps: environment steps acted uniformly at random at the start (SAC-like agents). Their
            ``behavior_log_prob`` is that of the uniform density over the action box, and re-scoring data are the
            policy's own samples, so only agents that do not re-score may use this.
    """

    domain = "control"

    def __init__(
        self,
        env: ControlEnv,
        policy: Any,
        gamma: float,
        generator: torch.Generator,
        num_envs: int = 16,
        horizon: int = 64,
        staleness: int = 0,
        random_steps: int = 0,
        device: str = "cpu",
    ) -> None:
        self.env, self.policy, self.gamma, self.generator = env, policy, gamma, generator
        self.horizon, self.staleness, self.random_steps = horizon, staleness, random_steps
        self.num_envs = env.num_envs
        self.device = torch.device(device)
        self.steps_per_collect = horizon * env.num_envs
        self.steps = 0
        self._observation: Tensor | None = None
        self._episode = torch.arange(self.num_envs)
        self._next_episode = self.num_envs
        self._return = torch.zeros(self.num_envs, dtype=torch.float64)
        self._length = torch.zeros(self.num_envs, dtype=torch.int64)
        self._buffer: dict[str, Tensor] = {}
        bounds = env.policy_inputs()
        self._low = torch.as_tensor(bounds.get("action_low", [0.0]), dtype=torch.float32)
        self._high = torch.as_tensor(bounds.get("action_high", [0.0]), dtype=torch.float32)

    @torch.no_grad()
    def collect(self, version: int) -> tuple[TensorDict, dict[str, float]]:
        """Steps ``horizon`` times.

        Args:
            version: the policy's version, stamped on every row.

        Returns:
            Transitions of batch size ``[horizon, num_envs]`` (the buffer is reused by the next call) and means over
            the episodes that ended: ``rollout/return``, ``rollout/length``, and the environment's own such as
            ``rollout/success``.

        Raises:
            NonFiniteError: a NaN or infinity in an action, observation or reward; names the simulation and the step.
        """
        if self._observation is None:
            self._observation = self.env.reset_batch()
        ended: list[dict[str, Tensor]] = []
        for step in range(self.horizon):
            observation = self._observation
            sample = self._act(observation)
            action = sample["action"].to("cpu")
            self._check_finite("the policy's action", action)
            result = self.env.step_batch(action)
            self._check_finite("the environment's observation", result.next_observation)
            self._check_finite("the environment's reward", result.reward)
            self._write(step, observation, sample, result, version)
            finished = self._advance(result)
            if finished is not None:
                ended.append(finished)
        rows = TensorDict(self._buffer, batch_size=[self.horizon, self.num_envs])
        return rows, _episode_means(ended)

    def _act(self, observation: Tensor) -> TensorDict:
        sample = self.policy.sample(observation.to(self.device), generator=self.generator)
        if self.steps < self.random_steps:
            uniform = torch.rand(sample["action"].shape, generator=self.generator, device=self.device)
            low, high = self._low.to(self.device), self._high.to(self.device)
            sample["action"] = low + uniform * (high - low)
            density = -torch.log((high - low).clamp(min=1e-12)).sum()
            sample["behavior_log_prob"] = density.expand_as(sample["behavior_log_prob"]).clone()
        return sample

    def _write(self, step: int, observation: Tensor, sample: TensorDict, result: Any, version: int) -> None:
        items: dict[str, Tensor] = {
            "observation": observation,
            **dict(sample.items()),
            "reward": result.reward,
            "terminated": result.terminated,
            "truncated": result.truncated,
            "next_observation": result.next_observation,
            "discount": self.gamma ** result.executed.to(torch.float32),
            "episode": self._episode,
            "group": self._episode,
        }
        if not self._buffer:
            shape = (self.horizon, self.num_envs)
            self._buffer = {k: torch.empty(shape + v.shape[1:], dtype=v.dtype) for k, v in items.items()}
            self._buffer["policy_version"] = torch.empty(shape, dtype=torch.int64)
            self._buffer["source"] = torch.full(shape, int(Source.ONLINE), dtype=torch.int64)
        for key, value in items.items():
            self._buffer[key][step] = value
        if step == 0:
            self._buffer["policy_version"].fill_(version)

    def _advance(self, result: Any) -> dict[str, Tensor] | None:
        self.steps += self.num_envs
        self._observation = result.observation
        self._return += result.reward
        self._length += result.executed
        done = result.terminated | result.truncated
        if not bool(done.any()):
            return None
        count = int(done.sum())
        finished = {"return": self._return[done].clone(), "length": self._length[done].double()}
        finished |= {key: value[done].double() for key, value in result.info.items()}
        self._episode = self._episode.clone()
        self._episode[done] = torch.arange(self._next_episode, self._next_episode + count)
        self._next_episode += count
        self._return[done] = 0.0
        self._length[done] = 0
        return finished

    def _check_finite(self, name: str, value: Tensor) -> None:
        finite = torch.isfinite(value)
        if not bool(finite.all()):
            lane = int((~finite.reshape(self.num_envs, -1).all(-1)).nonzero()[0])
            raise NonFiniteError(
                f"{name} is not finite (simulation {lane}, environment step {self.steps}); "
                "check the environment, or lower the learning rate or the action bounds"
            )

    def state_dict(self) -> dict[str, Any]:
        """Environment, episode bookkeeping and the action stream."""
        return {
            "env": self.env.state_dict(),
            "observation": self._observation,
            "episode": self._episode,
            "next_episode": self._next_episode,
            "return": self._return,
            "length": self._length,
            "steps": self.steps,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`; nothing is recomputed."""
        self.env.load_state_dict(state["env"])
        self._observation = state["observation"]
        self._episode, self._next_episode = state["episode"], state["next_episode"]
        self._return, self._length = state["return"], state["length"]
        self.steps = state["steps"]
        self.generator.set_state(state["generator"])


def _episode_means(ended: list[dict[str, Tensor]]) -> dict[str, float]:
    if not ended:
        return {}
    return {f"rollout/{key}": float(torch.cat([e[key] for e in ended]).mean()) for key in ended[0]}
