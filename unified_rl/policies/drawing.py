"""Samples of one rollout: a policy's ``sample`` step by step, with what no step needs left to the end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.nn import functional as F

from unified_rl.policies.base import Policy, normal_log_prob
from unified_rl.policies.gaussian import GaussianPolicy
from unified_rl.policies.normalizer import MOMENTS, RunningNormalizer
from unified_rl.protocols import Samples

Layer = Callable[[Tensor], Tensor]
OWN = (
    *("sample", "normalize", "_raw", "_real", "_sample", "_sampled", "_drawn", "_action", "_units"),
    *("mean_and_log_std", "_of_features", "to_env"),
)
"""Methods whose work :class:`GaussianDraws` does; a policy that changes one of them is asked itself."""


class Draws:
    """Calls ``policy.sample``, or another function like it.

    Args:
        sample: ``(observation [K, d], generator)`` to a sample ``[K]``, of weights that stay as they are for as long as
            this is used.
        generator: stream of the noise.
    """

    def __init__(self, sample: Callable[[Tensor, torch.Generator], TensorDictBase], generator: torch.Generator) -> None:
        self.sample, self.generator = sample, generator

    def __call__(self, observation: Tensor) -> dict[str, Tensor]:
        """Entries ``[K, ...]`` of a step, ``action [K, a]`` among them, for ``observation [K, d]``."""
        return dict(self.sample(observation, self.generator).items())

    def finish(self, rows: dict[str, Tensor]) -> None:
        """Makes of the entries ``[T, K, ...]`` of all steps those of the record, in place."""


class GaussianDraws(Draws):
    """A Gaussian policy's samples, the same numbers: layers without modules, log-probs of all steps at once."""

    def __init__(self, policy: GaussianPolicy, generator: torch.Generator) -> None:
        super().__init__(policy.sample, generator)
        self.policy = policy
        self._layers = [_plain(layer) for layer in (*policy.trunk, policy.head)]
        self._log_std: Tensor | None = None
        if not policy.state_dependent_std:
            self._log_std = policy.log_std.detach().clamp(policy.log_std_low, policy.log_std_high)
            self._std = self._log_std.exp()
        # adding 0 and multiplying by 1 would change nothing
        self._scales = bool((policy.action_middle != 0).any() or (policy.action_half != 1).any())
        moments = policy.normalizer
        self._moments = moments if isinstance(moments, RunningNormalizer) else None
        self._bare = policy.encoder is None and moments is None

    def _normalized(self, observation: Tensor) -> Tensor:
        moments = self._moments
        if moments is None or self.policy.encoder is not None or observation.dtype != torch.float32:
            return observation if self._bare else self.policy.normalize(self.policy._raw(observation))
        centred = torch.sub(observation, moments.mean_used)
        return centred.mul_(moments.scale_used).clamp_(-moments.limit, moments.limit)

    def __call__(self, observation: Tensor) -> dict[str, Tensor]:
        """``action``, ``raw_action`` and what the log-prob is computed from."""
        policy, x = self.policy, self._normalized(observation)
        for layer in self._layers:
            x = layer(x)
        out = {}
        if self._log_std is None:
            mean, log_std = x.chunk(2, dim=-1)
            out["log_std"] = log_std = log_std.clamp(policy.log_std_low, policy.log_std_high)
            std = log_std.exp()
        else:
            mean, std = x, self._std
        raw = torch.addcmul(mean, std, torch.randn(mean.shape, generator=self.generator))
        action = torch.tanh(raw) if policy.squash else raw
        if self._scales:
            action = torch.addcmul(policy.action_middle, policy.action_half, action)
        out["action"], out["raw_action"], out["mean"] = action.clamp(policy.action_low, policy.action_high), raw, mean
        return out

    def finish(self, rows: dict[str, Tensor]) -> None:
        """``behavior_log_prob``, and the number of the moments in use, in place of the means."""
        log_std = rows.pop("log_std") if self._log_std is None else self._log_std
        raw = rows["raw_action"]
        rows["behavior_log_prob"] = self.policy._units(normal_log_prob(raw, rows.pop("mean"), log_std))
        if self._moments is not None:
            rows[MOMENTS] = self._moments.used.expand(raw.shape[:-1]).clone()


def _plain(layer: nn.Module) -> Layer:
    """A layer without the calls around it, where nothing is hooked to it."""
    if layer._forward_hooks or layer._forward_pre_hooks:
        return layer
    if type(layer) is nn.Linear:
        return partial(F.linear, weight=layer.weight, bias=layer.bias)
    return {nn.Tanh: torch.tanh, nn.ReLU: torch.relu}.get(type(layer), layer)


def draws_of(policy: Samples, generator: torch.Generator) -> Draws:
    """The quickest way to a policy's samples that are those of its ``sample``."""
    if isinstance(policy, GaussianPolicy) and policy.device.type == generator.device.type == "cpu":
        unchanged = all(_owner(type(policy), name) in (Policy, GaussianPolicy) for name in OWN)
        float32 = policy.head.weight.dtype == torch.float32
        if unchanged and float32 and not policy.gsde and not any(name in vars(policy) for name in OWN):
            return GaussianDraws(policy, generator)
    return Draws(policy.sample, generator)


def _owner(found: type, name: str) -> type | None:
    return next((kind for kind in found.__mro__ if name in vars(kind)), None)
