"""The one transition rule of flow and diffusion policies: a chain of Gaussian steps from noise to action.

``x_0 ~ N(0, I)``, ``x_{k+1} ~ N(mean_k(x_k, s), std_k(x_k, s))``, and the action is ``x_K`` clipped to its bounds. The
stored log-prob has one entry a step, so a ratio of two chains is an exact importance weight: its expectation given
the action is the ratio of the marginals. The start's density is the same for every weight and is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, ClassVar

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.nn import functional as F

from unified_rl.errors import ConfigError
from unified_rl.policies.base import Policy, draw_normal, normal_log_prob
from unified_rl.policies.networks import Activation, check_widths, linear, mlp, seeded, time_features
from unified_rl.ranges import Count, Seed, ranged
from unified_rl.spaces import Space

TIME_FEATURES = 8
GUESSES, NEIGHBOURS = 32, 8
"""Starts that a deterministic action is chosen from, and how many ends near one make it dense."""


class ChainNetwork(nn.Module):
    """An MLP of observation, chain state and time, in which what does not change along the chain is computed once.

    Args:
        observation_dim: width ``d``.
        action_dim: width ``a`` of the chain state.
        outputs: width of the output.
        hidden: widths of the hidden layers, at least one.
        activation: a name in :data:`unified_rl.policies.networks.ACTIVATIONS`.
    """

    def __init__(
        self, observation_dim: int, action_dim: int, outputs: int, hidden: Sequence[int], activation: str
    ) -> None:
        super().__init__()
        if not hidden:
            raise ConfigError("policy.hidden=[] leaves a flow or diffusion policy no layer; give at least one width")
        self.sizes = [observation_dim, action_dim, TIME_FEATURES]
        check_widths(sum(self.sizes), hidden, "policy.hidden")
        self.first = linear(sum(self.sizes), hidden[0], gain=2**0.5)
        # the trunk begins with an activation: its first linear layer is the one above, taken apart
        self.rest = mlp(hidden[0], hidden, outputs, activation=activation, orthogonal=True)[1:]

    def condition(self, observation: Tensor) -> Tensor:
        """The observation's share of the first layer: ``[M, d]`` to ``[M, H]``."""
        return F.linear(observation, self.first.weight[:, : self.sizes[0]], self.first.bias)

    def clock(self, time: Tensor) -> Tensor:
        """The time's share of the first layer: ``[...]`` in [0, 1] to ``[..., H]``."""
        return F.linear(time_features(time, TIME_FEATURES), self.first.weight[:, -TIME_FEATURES:])

    def forward(self, condition: Tensor, state: Tensor, clock: Tensor) -> Tensor:
        """Output ``[..., outputs]`` for ``state [..., a]`` and broadcastable condition and clock ``[..., H]``."""
        weight = self.first.weight[:, self.sizes[0] : -TIME_FEATURES]
        output: Tensor = self.rest(F.linear(state, weight) + condition + clock)
        return output


@ranged("policy")
class ChainPolicy(Policy):
    """Base of flow and diffusion policies; one unit a denoising step.

    Subclasses give the rule of one step (:meth:`_kernel`), its noiseless form (:meth:`_noiseless`) and a supervised
    loss. Chain states are in coordinates where the action bounds are -1 and 1, and are stored unclipped.

    Args:
        space: the environment's; or sizes and bounds, as of :class:`~unified_rl.policies.base.Policy`.
        sizes: the rest of those.
        steps: ``K``, steps of the chain.
        trained_steps: ``K'``; from :meth:`end_pretraining` on the first ``K - K'`` steps are run by a frozen copy of
            the network and are part of the start's distribution, so there are ``K'`` units and the stored chain begins
            after them. None trains all. "Diffusion Policy Policy Optimization" (arXiv:2409.00588).
        mean_over_dims: log-probs are means over the action's dimensions instead of sums, as in that paper. Ratios
            are then no importance weights (``exact`` is False).
        zero_start: deterministic use starts from 0 instead of from drawn noise: one action per observation, which may
            lie between two modes. Without it :meth:`deterministic_action` takes the densest of several noises' actions.
        hidden: widths of the hidden layers.
        activation: a name in :data:`unified_rl.policies.networks.ACTIVATIONS`.
        seed: of the initial weights.
        shared: further arguments of :class:`~unified_rl.policies.base.Policy`.

    Raises:
        ConfigError: discrete or unbounded actions, or numbers of steps that do not fit.
    """

    rescoring_keys = ("chain",)
    outputs: ClassVar[int] = 1
    """Numbers that the network gives for every entry of the action."""
    starts: Tensor
    """``[G, a]``, the noises that :meth:`deterministic_action` starts from."""
    times: Tensor
    prefix_frozen: Tensor

    def __init__(
        self,
        space: Space | int | None = None,
        *sizes: Any,
        steps: Count,
        trained_steps: Count | None = None,
        mean_over_dims: bool = False,
        zero_start: bool = False,
        hidden: Sequence[Count] = (128, 128, 128),
        activation: Activation = "relu",
        seed: Seed = 0,
        **shared: Any,
    ) -> None:
        super().__init__(space, *sizes, seed=seed, **shared)
        if (trained_steps or steps) > steps:
            raise ConfigError(f"policy.trained_steps={trained_steps} must not lie above policy.steps={steps}")
        if not self.bounded:
            raise ConfigError(
                f"{type(self).__name__} needs finite action bounds to scale actions to [-1, 1]; use "
                "policy=gaussian, or bound them in the environment"
            )
        self.steps = steps
        self.num_units = trained_steps or steps
        self.mean_over_dims, self.zero_start = mean_over_dims, zero_start
        self.exact = not mean_over_dims
        drawn = torch.randn(GUESSES, self.action_dim, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("starts", torch.zeros(1, self.action_dim) if zero_start else drawn, persistent=False)
        self.register_buffer("times", torch.arange(steps) / steps, persistent=False)
        with seeded(seed):
            outputs = self.outputs * self.action_dim
            self.network = ChainNetwork(self.observation_dim, self.action_dim, outputs, hidden, activation)
        self.frozen: ChainNetwork | None = None
        if trained_steps is not None and trained_steps < steps:
            if self.encoder is not None:
                raise ConfigError(
                    "policy.trained_steps freezes the first steps, and the encoder of images that they see is still "
                    "learnt: leave it out"
                )
            self.frozen = deepcopy(self.network).requires_grad_(False)
            self.register_buffer("prefix_frozen", torch.tensor(False))
            self.register_load_state_dict_pre_hook(_fill_frozen)

    # --- what a subclass implements ------------------------------------------------------------------------------

    def _kernel(self, output: Tensor, state: Tensor, index: Tensor | int) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation ``[..., a]`` of the state after ``state [..., a]``.

        ``output [..., outputs]`` is the network's; ``index`` is the step, or a slice's worth of steps ``[K']`` for
        states ``[M, K', a]``.
        """
        raise NotImplementedError

    def _noiseless(self, output: Tensor, state: Tensor, index: Tensor | int) -> Tensor:
        """The state after ``state [..., a]`` in deterministic use."""
        raise NotImplementedError

    # --- shared --------------------------------------------------------------------------------------------------

    def end_pretraining(self) -> None:
        """Fixes the moments, and makes the present weights those of the frozen first steps."""
        super().end_pretraining()
        if self.frozen is not None and not bool(self.prefix_frozen):
            self.frozen.load_state_dict(self.network.state_dict())
            self.prefix_frozen.fill_(True)

    def integrate(self, observation: Tensor, start: Tensor) -> Tensor:
        """The noiseless map from ``start [M, a]`` to a normalised action ``[M, a]``, with gradients.

        ``observation [M, d]`` is raw. Not clipped.
        """
        return self._run(self.normalize(observation), [start], deterministic=True)[0][:, -1]

    def _networks(self) -> list[ChainNetwork]:
        if self.frozen is None or not bool(self.prefix_frozen):
            return [self.network] * self.steps
        frozen = self.steps - self.num_units
        return [self.network if k >= frozen else self.frozen for k in range(self.steps)]

    def _run(self, observation: Tensor, noise: Sequence[Tensor], deterministic: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the chain from ``noise[0]`` with noises ``noise[1:]``.

        Returns the states ``[M, K'+1, a]`` from the first trained step on, and the means and log standard deviations
        ``[M, K', a]`` of the trained steps (meaningless in deterministic use).
        """
        networks = self._networks()
        conditions = {id(net): net.condition(observation) for net in networks}
        clocks = {id(net): net.clock(self.times) for net in networks}
        state, states, means, log_stds = noise[0], [noise[0]], [], []
        for k, net in enumerate(networks):
            output = net(conditions[id(net)], state, clocks[id(net)][k])
            if deterministic:
                state = mean = log_std = self._noiseless(output, state, k)
            else:
                mean, log_std = self._kernel(output, state, k)
                log_std = log_std.expand_as(mean)
                state = torch.addcmul(mean, log_std.exp(), noise[k + 1])
            states.append(state)
            means.append(mean)
            log_stds.append(log_std)
        first = self.steps - self.num_units
        return torch.stack(states[first:], 1), torch.stack(means[first:], 1), torch.stack(log_stds[first:], 1)

    def _sample(self, observation: Tensor, generator: torch.Generator, deterministic: bool) -> dict[str, Tensor]:
        shape = (observation.shape[0], self.action_dim)
        noise = draw_normal((1 if deterministic else self.steps + 1, *shape), observation, generator)
        if deterministic and self.zero_start:
            noise = torch.zeros_like(noise)
        chain, mean, log_std = self._run(observation, noise.unbind(0), deterministic)
        if deterministic:
            log_prob = mean.new_full(mean.shape[:-1], torch.nan)
        else:
            log_prob = self._reduce(normal_log_prob(chain[:, 1:], mean, log_std))
        return {"action": self.to_env(chain[:, -1]), "chain": chain, "behavior_log_prob": log_prob}

    def _deterministic_action(self, observation: Tensor) -> Tensor:
        """The noiseless end of the start around which most ends lie: the densest of :data:`GUESSES` actions.

        One start for good would be one mode at best, and somewhere between the modes at worst, at every observation.
        """
        rows, guesses = observation.shape[0], len(self.starts)
        seen = observation.unsqueeze(1).expand(-1, guesses, -1).reshape(rows * guesses, -1)
        start = self.starts.unsqueeze(0).expand(rows, -1, -1).reshape(rows * guesses, -1)
        ends = self._run(seen, [start], deterministic=True)[0][:, -1].clamp(-1, 1).reshape(rows, guesses, -1)
        gaps = (ends.unsqueeze(2) - ends.unsqueeze(1)).square().sum(-1)
        crowded = gaps.topk(min(NEIGHBOURS + 1, guesses), largest=False).values.sum(-1)
        densest = crowded.argmin(-1).reshape(rows, 1, 1).expand(-1, 1, self.action_dim)
        return self.to_env(ends.gather(1, densest).squeeze(1))

    def transitions(self, observation: Tensor, chain: Tensor) -> tuple[Tensor, Tensor]:
        """Means and log standard deviations ``[M, K', a]`` of all stored transitions, in one pass of the network.

        ``observation [M, d]`` is already normalised, ``chain [M, K'+1, a]``.
        """
        index = torch.arange(self.steps - self.num_units, self.steps, device=chain.device)
        state = chain[:, :-1]
        output = self.network(
            self.network.condition(observation).unsqueeze(1), state, self.network.clock(self.times[index])
        )
        mean, log_std = self._kernel(output, state, index)
        return mean, log_std.expand_as(mean)

    def normals(self, batch: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation ``[B, N, a]`` of every stored transition, given the state before it."""
        observation, stored = self._flatten(batch)
        mean, log_std = self.transitions(observation, stored["chain"])
        shape = (batch["observation"].shape[0], -1, self.action_dim)
        return mean.reshape(shape), log_std.reshape(shape)

    def _log_prob(self, observation: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        chain = stored["chain"]
        mean, log_std = self.transitions(observation, chain)
        return self._reduce(normal_log_prob(chain[:, 1:], mean, log_std))

    def _reduce(self, per_dimension: Tensor) -> Tensor:
        return per_dimension.mean(-1) if self.mean_over_dims else per_dimension.sum(-1)


def _fill_frozen(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Weights saved by a policy without frozen steps become the frozen ones too (pre-train, then fine-tune)."""
    start = f"{prefix}network."
    state.setdefault(f"{prefix}prefix_frozen", torch.tensor(f"{prefix}frozen.first.weight" in state))
    for key in [key for key in state if key.startswith(start)]:
        state.setdefault(f"{prefix}frozen.{key[len(start) :]}", state[key])
