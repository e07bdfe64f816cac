"""The common face of control environments: our batched protocol and TorchRL's ``EnvBase`` over two small methods."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, MultiCategorical, Unbounded
from torchrl.envs import EnvBase

from unified_rl.errors import NonFiniteError
from unified_rl.interop.deadline import seconds_of
from unified_rl.observations import layout_of
from unified_rl.protocols import StepResult, TellsResumable
from unified_rl.spaces import PolicyInputs, Space


class ControlEnvBase(EnvBase):
    """K simulations as one TorchRL environment of batch size ``[K]`` and as the native batched protocol.

    A subclass gives :meth:`advance`, :meth:`restart`, :meth:`seed_streams`, :meth:`state_dict` and
    :meth:`load_state_dict`. The native calls (:meth:`reset_batch`, :meth:`step_batch`) reset ended episodes themselves
    and always return the true final observation; the TorchRL calls leave resets to the caller, as TorchRL expects.

    Args:
        num_envs: K.
        space: of one simulation; observations are handed out as the rows of it (:mod:`unified_rl.observations`):
            float32 vectors of its width, or bytes where it holds images.
        max_steps: steps before an episode is truncated.
    """

    domain = "control"
    steps_per_action = 1
    """Environment steps of one action of the policy, at most."""

    def __init__(
        self,
        num_envs: int,
        space: Space,
        max_steps: int,
    ) -> None:
        super().__init__(device="cpu", batch_size=[num_envs])
        self.num_envs, self.space, self.max_steps = num_envs, space, max_steps
        self._make_specs()

    def _make_specs(self) -> None:
        count, choices = self.num_envs, self.space.action.choices
        rows = layout_of(self.space.observation)
        observation = Unbounded(shape=(count, rows.width), dtype=rows.dtype)
        self.observation_spec = Composite(observation=observation, shape=(count,))
        shape = (count, self.space.action_dim)
        if choices is None:
            sizes = self.space.sizes()
            low, high = (torch.tensor(sizes[key]).expand(shape) for key in ("action_low", "action_high"))
            self.action_spec = Bounded(low, high, shape=shape, dtype=torch.float32)
        elif len(choices) == 1:
            self.action_spec = Categorical(choices[0], shape=shape, dtype=torch.int64)
        else:
            self.action_spec = MultiCategorical(choices, shape=shape, dtype=torch.int64)
        self.reward_spec = Unbounded(shape=(count, 1), dtype=torch.float32)
        flags = {key: Categorical(2, shape=(count, 1), dtype=torch.bool) for key in ("done", "terminated", "truncated")}
        self.done_spec = Composite(flags, shape=(count,))

    @abstractmethod
    def advance(self, action: Tensor, running: Tensor | None = None) -> StepResult:
        """Steps the simulations ``running [K]`` bool (default: all) with ``action [K, a]`` and resets none.

        The result's ``observation`` is its ``next_observation``.
        """

    @abstractmethod
    def current_observation(self) -> Tensor:
        """What the policy sees now, ``[K, d]`` float32."""

    @abstractmethod
    def restart(self, ended: Tensor) -> Tensor:
        """Starts new episodes where ``ended [K]`` bool; returns their observations ``[n, d]`` float32 by lane."""

    @abstractmethod
    def seed_streams(self, seed: int) -> None:
        """Restarts the environment's random streams."""

    def policy_inputs(self) -> dict[str, Any]:
        """What a policy's constructor takes: ``space``."""
        return PolicyInputs(self.space)

    def reset_batch(self, seed: int | None = None) -> Tensor:
        """Starts a new episode in every simulation, after reseeding where a seed is given; ``[K, d]`` float32."""
        if seed is not None:
            self.seed_streams(seed)
        return self.restart(torch.ones(self.num_envs, dtype=torch.bool))

    def step_batch(self, action: Tensor) -> StepResult:
        """Steps every simulation with ``action [K, a]`` and resets those that ended.

        Raises:
            NonFiniteError: a NaN or infinity in the action, observation or reward; names the simulation and its step.
        """
        step = self.advance(action)
        ended = step.terminated | step.truncated
        if not bool(ended.any()):
            return step
        observation = step.next_observation.clone()
        observation[ended] = self.restart(ended)
        return step._replace(observation=observation)

    def _reset(self, tensordict: TensorDictBase | None, **kwargs: Any) -> TensorDict:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        ended = torch.ones(self.num_envs, dtype=torch.bool) if mask is None else mask.reshape(self.num_envs)
        rows = layout_of(self.space.observation)
        observation = torch.zeros(self.num_envs, rows.width, dtype=rows.dtype)
        if mask is not None and tensordict is not None and "observation" in tensordict.keys():
            observation = tensordict["observation"].clone()
        if ended.any():
            observation[ended] = self.restart(ended)
        return TensorDict({"observation": observation}, batch_size=self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        step = self.advance(tensordict["action"])
        terminated, truncated = (flag.unsqueeze(-1).clone() for flag in (step.terminated, step.truncated))
        out = {"observation": step.next_observation, "reward": step.reward.unsqueeze(-1)}
        out |= {"terminated": terminated, "truncated": truncated, "done": terminated | truncated}
        return TensorDict(out, batch_size=self.batch_size)

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self.seed_streams(seed)


class EnvWrapper(ControlEnvBase):
    """What is put around a control environment: does as the one inside, but for what a subclass says.

    Args:
        env: the one inside; its :meth:`advance` accepts a mask of running simulations.
        space: of what is shown and taken outside.
        steps: of the environment inside in one action, at most.
    """

    def __init__(self, env: ControlEnvBase, space: Space, steps: int = 1) -> None:
        super().__init__(env.num_envs, space, -(-env.max_steps // steps))
        self.inner, self.steps_per_action = env, steps * env.steps_per_action

    @property
    def step_seconds(self) -> float | None:
        """Time limit of a step: that of the environment inside, for each of its steps."""
        seconds = seconds_of(self.inner)
        return None if seconds is None else seconds * (self.steps_per_action // self.inner.steps_per_action)

    def current_observation(self) -> Tensor:
        """What the policy sees now, rows ``[K, w]``."""
        return self.inner.current_observation()

    def restart(self, ended: Tensor) -> Tensor:
        """Starts new episodes where ``ended [K]`` bool; the rows of their observations ``[n, w]``."""
        return self.inner.restart(ended)

    def seed_streams(self, seed: int) -> None:
        """Restarts the random streams of the environment inside."""
        self.inner.seed_streams(seed)

    def resumable(self) -> str | bool:
        """Whether the environment inside can continue its episodes bit for bit."""
        return self.inner.resumable() if isinstance(self.inner, TellsResumable) else True

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The state of the environment inside."""
        out: dict[str, Any] = self.inner.state_dict()
        return out

    def load_state_dict(self, state: dict[str, Any], *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Restores :meth:`state_dict`."""
        self.inner.load_state_dict(state)

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Closes the environment inside."""
        self.inner.close(raise_if_closed=False)
        super().close(raise_if_closed=False)


def raise_non_finite(name: str, value: Tensor, elapsed: Tensor, env: str | None = None) -> None:
    """Names the first simulation whose ``value [K, ...]`` is not finite, and its step ``elapsed [K]``.

    Args:
        name: of what is not finite.
        value: that is looked at.
        elapsed: steps of the running episodes.
        env: the name of an environment whose code is not ours.

    Raises:
        NonFiniteError: where there is such a simulation; nothing happens otherwise.
    """
    bad = ~torch.isfinite(value.reshape(len(value), -1)).all(dim=1)
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        whose = f"{env}: the" if env else "the"
        fix = "mend the environment" if env else "lower the action scale or look at the policy's output"
        raise NonFiniteError(
            f"{whose} {name} of simulation {index} is not finite at step {int(elapsed[index])} of its episode "
            f"({int(bad.sum())} of {len(bad)} simulations): {fix}"
        )
