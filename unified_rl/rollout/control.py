"""Batched control rollouts: K simulations, one policy call and one environment call a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.configurable import configurable
from unified_rl.errors import ConfigError, NonFiniteError
from unified_rl.interop.guard import is_vouched, reset_env, step_env
from unified_rl.policies.drawing import Draws, draws_of
from unified_rl.protocols import ControlEnv, Samples, StepResult
from unified_rl.ranges import Count, UnitInterval, Whole, ranged
from unified_rl.rollout.held_noise import HeldNoise
from unified_rl.rollout.speakers import ACTED, Actor, Acts
from unified_rl.rollout.starts import Starts
from unified_rl.spaces import Space
from unified_rl.units import NOBODY, Source

STEPS = "rollout/steps"
"""Environment steps that a collection made: ``steps_per_collect``, or fewer where episodes' ends cut chunks short."""

STARTS = "rollout/starts"
"""How many different starts the rows of a collection have, where ``rollout.starts`` tells them apart."""


@configurable
@ranged("rollout")
class ControlRollout:
    """Collects transitions ``[horizon, num_envs]`` with the current policy.

    Args:
        env: a :class:`~unified_rl.protocols.ControlEnv`.
        policy: samples the actions.
        gamma: discount of one control step; a chunk of h executed steps has discount ``gamma ** h``.
        generator: the stream that actions are drawn from.
        num_envs: simulations stepped together, as many as the environment has; None takes its number. A run makes an
            environment of this size.
        horizon: steps of one call of :meth:`collect`.
        staleness: how many updates old the policy is that sampled the rows of an update. That many collected batches
            wait in the trainer's feed, so rows carry the version that really acted.
        speaker: who acts in the policy's place, see :mod:`unified_rl.rollout.speakers`.
        random_steps: environment steps acted uniformly at random at the start (SAC-like agents). Their
            ``behavior_log_prob`` is that of the uniform density over the action box, and re-scoring data are the
            policy's own samples, so only agents that do not re-score may use this.
        starts: tells apart what episodes begin with. Every step then carries the number of its episode's start as
            ``prompt_id``, and as ``group`` in place of the episode's, so that rows of one start are compared with each
            other; None leaves every episode alone in its group.

    Attributes:
        rows: rows (windows of ``length`` steps) of one collection: one a simulation.
        length: steps of a row.
        noise: what the policy explores with for several steps (gSDE); None where every step draws for itself.

    Raises:
        ConfigError: ``num_envs`` is not the environment's, or ``horizon`` is below 1.
    """

    domain = "control"

    def __init__(
        self,
        env: ControlEnv,
        policy: Samples,
        gamma: UnitInterval,
        generator: torch.Generator,
        num_envs: Count | None = None,
        horizon: Count = 64,
        staleness: Whole = 0,
        random_steps: Whole = 0,
        speaker: Actor | None = None,
        starts: Starts | None = None,
        device: str = "cpu",
        streams: Callable[[str], torch.Generator] | None = None,
    ) -> None:
        self.env, self.policy, self.gamma, self.generator = env, policy, gamma, generator
        self.horizon, self.staleness, self.random_steps = horizon, staleness, random_steps
        if num_envs is not None and num_envs != env.num_envs:
            raise ConfigError(
                f"rollout.num_envs={num_envs}, but the environment has {env.num_envs} simulations; set "
                f"rollout.num_envs={env.num_envs}"
            )
        self.num_envs = env.num_envs
        self.rows, self.length = env.num_envs, horizon
        self.device = torch.device(device)
        self.steps_per_collect = horizon * env.num_envs * int(getattr(env, "steps_per_action", 1))
        self.steps, self._calls = 0, 0
        self._observation: Tensor | None = None
        self._episode = torch.arange(self.num_envs)
        self._next_episode = self.num_envs
        self._return = torch.zeros(self.num_envs, dtype=torch.float64)
        self._steps = torch.zeros(self.num_envs, dtype=torch.int64)
        self._vouched = False
        self._untold: list[StepResult] = []
        self._executed: tuple[Tensor | None, int] = (None, 0)
        self.noise = HeldNoise.of(policy, env.num_envs)
        self.speaker = speaker
        self._speaker_stream = torch.Generator().manual_seed(0) if streams is None else streams("speaker")
        if speaker is not None:
            self._check_speaker(speaker, policy)
        self.starts, self._start = starts, torch.zeros(self.num_envs, dtype=torch.int64)
        if starts is not None:
            starts.attach(env)
        bounds = Space.of(env.policy_inputs()).sizes()
        self._low, self._high = (torch.tensor(bounds[key]) for key in ("action_low", "action_high"))
        if random_steps and not bool(torch.isfinite(self._high - self._low).all()):
            raise ConfigError("rollout.random_steps draws from the action bounds, which are not finite; set it to 0")

    def number_from(self, first: int) -> None:
        """Numbers episodes from ``first`` on, before any is begun: workers of one run have numbers of their own."""
        self._episode = torch.arange(first, first + self.num_envs)
        self._next_episode = first + self.num_envs

    @torch.no_grad()
    def collect(self, version: int) -> tuple[TensorDict, dict[str, float]]:
        """Steps ``horizon`` times.

        Args:
            version: the policy's version, stamped on every row.

        Returns:
            Transitions of batch size ``[horizon, num_envs]`` and means over
            the episodes that ended: ``rollout/return`` (undiscounted), ``rollout/length`` (environment steps), and
            the environment's own such as ``rollout/success``; ``rollout/episodes`` counts them, and
            ``rollout/steps`` the environment steps that were made. With ``starts``, ``rollout/starts`` counts how
            many different ones the rows have.

        Raises:
            EnvError: the environment raised, or returned what is no step.
            NonFiniteError: a NaN or infinity in an action, observation or reward; names the simulation and the step.
        """
        if self._observation is None:
            self._observation = reset_env(self.env)
            self._begin(self._observation)
        before, ended = self.steps, list[dict[str, Tensor]]()
        steps: list[dict[str, Tensor]] = []
        self._vouched = is_vouched(self.env)
        uniform = self.steps < self.random_steps
        if self.noise is not None:
            draws = Draws(self.noise, self.generator)
        elif (acts := self._acts(version)) is not None:
            draws = Draws(acts, self.generator)
        else:
            draws = Draws(self.policy.sample, self.generator) if uniform else draws_of(self.policy, self.generator)
        try:
            for _ in range(self.horizon):
                self._calls += 1
                observation = self._observation
                sample = draws(observation.to(self.device))
                if uniform and self.steps < self.random_steps:
                    self._act_uniformly(sample)
                result = self._step(sample["action"].to("cpu"))
                steps.append(self._transition(observation, sample, result))
                finished = self._advance(result)
                if finished is not None:
                    ended.append(finished)
        finally:
            self._tell()
        rows = self._gather(steps, version)
        draws.finish(rows)
        batch = TensorDict({key: value.to("cpu") for key, value in rows.items()}, batch_size=rows["reward"].shape)
        metrics = {**_episode_means(ended), STEPS: float(self.steps - before)}
        if self.starts is not None:
            metrics[STARTS] = float(len(batch["prompt_id"].unique()))
        return batch, metrics

    def _begin(self, observation: Tensor) -> None:
        """Numbers the starts of all simulations, ``observation [K, w]``."""
        if self.starts is not None:
            self._start = self.starts.number(observation)

    def _check_speaker(self, speaker: Actor, policy: Samples) -> None:
        """Raises ConfigError where nobody else can act."""
        if not isinstance(speaker, Actor):
            raise ConfigError(
                f"rollout.speaker is {type(speaker).__name__}, which chooses tokens; in simulations use "
                "unified_rl.agents.speakers.Alternating"
            )
        if self.noise is not None or self.random_steps:
            name = "policy.gsde" if self.noise is not None else "rollout.random_steps"
            raise ConfigError(f"rollout.speaker says who acts, and {name} has a say in it too: leave one of them out")
        speaker.check_control(self.env, policy, "rollout.speaker")

    def _acts(self, version: int) -> Acts | None:
        return None if self.speaker is None else self.speaker.acts(self.policy, version, self._speaker_stream)

    def _act_uniformly(self, sample: dict[str, Tensor]) -> None:
        uniform = torch.rand(sample["action"].shape, generator=self.generator, device=self.device)
        low, high = self._low.to(self.device), self._high.to(self.device)
        sample["action"] = low + uniform * (high - low)
        density = -torch.log((high - low).clamp(min=1e-12)).sum()
        sample["behavior_log_prob"] = density.expand_as(sample["behavior_log_prob"]).clone()

    def _step(self, action: Tensor) -> StepResult:
        """An environment that is vouched for refuses what is not finite itself; others are not even asked."""
        if not self._vouched:
            self._check_action(action)
        try:
            return step_env(self.env, action, self._calls, self._vouched)
        except NonFiniteError:
            self._check_action(action)  # then it is the policy's
            raise

    def _transition(self, observation: Tensor, sample: Mapping[str, Tensor], result: StepResult) -> dict[str, Tensor]:
        """References to what a step made; environments and policies write to none of it again."""
        return {
            "observation": observation,
            **sample,
            "reward": result.reward,
            "terminated": result.terminated,
            "truncated": result.truncated,
            "next_observation": result.next_observation,
            "discount": result.executed,
            "episode": self._episode,
            **({} if self.starts is None else {"prompt_id": self._start}),
        }

    def _gather(self, steps: list[dict[str, Tensor]], version: int) -> dict[str, Tensor]:
        """The steps as ``[horizon, num_envs]`` columns: one copy a key, not one a key and step."""
        rows = {key: _stacked([step[key] for step in steps]) for key in steps[0]}
        rows["discount"] = self.gamma ** rows["discount"].to(torch.float32)
        shape = (self.horizon, self.num_envs)
        rows["group"] = rows["episode" if self.starts is None else "prompt_id"].clone()
        rows["policy_version"] = torch.full(shape, version, dtype=torch.int64)
        if ACTED in rows:
            rows["policy_version"].masked_fill_(rows.pop(ACTED).to("cpu"), NOBODY)
        rows["source"] = torch.full(shape, int(Source.ONLINE), dtype=torch.int64)
        return rows

    def _advance(self, result: StepResult) -> dict[str, Tensor] | None:
        """Goes on to the next step; what the episodes that ended came to, if any did."""
        executed, number = self._executed
        if result.executed is not executed:  # most environments give the same ones every time
            number = int(result.executed.sum())
            self._executed = (result.executed, number)
        self.steps += number
        self._observation = result.observation
        self._untold.append(result)
        if self.noise is not None:
            self.noise.advance(result.terminated | result.truncated)
        if self._vouched and result.observation is result.next_observation:
            return None
        done = result.terminated | result.truncated
        if not bool(done.any()):
            return None
        self._tell()
        count = int(done.sum())
        finished = {key: value[done].double() for key, value in result.info.items()}
        finished |= {"return": self._return[done].clone(), "length": self._steps[done].double()}
        self._episode = self._episode.clone()
        self._episode[done] = torch.arange(self._next_episode, self._next_episode + count)
        self._next_episode += count
        if self.starts is not None:
            self._start = self._start.clone()
            self._start[done] = self.starts.number(result.observation[done])
        self._return[done] = 0.0
        self._steps[done] = 0
        return finished

    def _tell(self) -> None:
        """Adds the steps since the last call to the returns and lengths of the running episodes."""
        if self._untold:
            rewards = torch.stack([result.plain_reward for result in self._untold]).double()
            self._return = torch.cat([self._return.unsqueeze(0), rewards]).cumsum(0)[-1].clone()
            self._steps = self._steps + _stacked([result.executed for result in self._untold]).sum(0)
            self._untold = []

    def _check_action(self, action: Tensor) -> None:
        if math.isfinite(float(action.sum())):
            return
        lane = int((~torch.isfinite(action).reshape(self.num_envs, -1).all(-1)).nonzero()[0])
        raise NonFiniteError(
            f"the policy's action is not finite (simulation {lane}, environment step {self.steps}); lower the "
            "learning rate or the action bounds"
        )

    def state_dict(self) -> dict[str, Any]:
        """Environment, episode bookkeeping, the action stream and what it drew."""
        return {
            "env": self.env.state_dict(),
            "observation": self._observation,
            "episode": self._episode,
            "next_episode": self._next_episode,
            "return": self._return,
            "length": self._steps,
            "steps": self.steps,
            "calls": self._calls,
            "generator": self.generator.get_state(),
            **({} if self.starts is None else {"start": self._start}),
            **({} if self.noise is None else {"noise": self.noise.state_dict()}),
            **({} if self.speaker is None else {"speaker": self._speaker_stream.get_state()}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`; nothing is recomputed."""
        self.env.load_state_dict(state["env"])
        self._observation = state["observation"]
        self._episode, self._next_episode = state["episode"], state["next_episode"]
        self._return, self._steps = state["return"], state["length"]
        self.steps, self._calls = state["steps"], state.get("calls", 0)
        self.generator.set_state(state["generator"])
        if self.starts is not None:
            self._start = state["start"]
        if self.noise is not None and "noise" in state:
            self.noise.load_state_dict(state["noise"])
        if self.speaker is not None and "speaker" in state:
            self._speaker_stream.set_state(state["speaker"])

    def restart(self, state: dict[str, Any], seed: int) -> None:
        """Goes on behind :meth:`state_dict` with new episodes in every simulation, and streams from ``seed``."""
        self._observation, self._calls = reset_env(self.env, seed), 0
        self._begin(self._observation)
        first = state["next_episode"]
        self._episode, self._next_episode = torch.arange(first, first + self.num_envs), first + self.num_envs
        self._return.zero_()
        self._steps.zero_()
        self.steps = state["steps"]
        self.generator.manual_seed(seed)
        self._speaker_stream.manual_seed(seed + 1)
        self.noise = HeldNoise.of(self.policy, self.num_envs)


def _stacked(steps: list[Tensor]) -> Tensor:
    """One after the other, ``[T, ...]``; cheap where all are the same object."""
    first = steps[0]
    if all(step is first for step in steps):
        return first.unsqueeze(0).repeat(len(steps), *[1] * first.ndim)
    return torch.stack(steps)


def _episode_means(ended: list[dict[str, Tensor]]) -> dict[str, float]:
    """Means over the episodes that ended, of every name over those that told it."""
    if not ended:
        return {}
    told = {key: torch.cat([e[key] for e in ended if key in e]) for key in dict.fromkeys(k for e in ended for k in e)}
    means = {f"rollout/{key}": float(value.nanmean()) for key, value in told.items() if not bool(value.isnan().all())}
    return {**means, "rollout/episodes": float(len(told["return"]))}
