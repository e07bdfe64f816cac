"""Learnt noise on the hidden states of the policy while it is updated."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from unified_rl.correction import Correction
from unified_rl.errors import ConfigError
from unified_rl.interventions.base import Metrics, Plain, Wrapper
from unified_rl.policies.networks import ACTIVATIONS
from unified_rl.protocols import Trainable, is_language
from unified_rl.ranges import NonNegative, Seed

HIDDEN = tuple(kind for kind in ACTIVATIONS.values() if isinstance(kind, type))
"""Modules whose outputs are the hidden states of a control policy's networks."""


def hidden_layers(policy: Trainable) -> list[nn.Module]:
    """The modules that put out hidden states: a transformer's blocks, or the activations of an MLP."""
    if not is_language(policy):
        return [module for module in policy.modules() if isinstance(module, HIDDEN)]
    lists = [module for module in policy.model.base_model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=[]))


def in_backward() -> bool:
    """Whether a backward pass is under way, which computes checkpointed layers again."""
    return torch._C._current_graph_task_id() != -1


class LayerScales(nn.Module):
    """The logarithm of each layer's noise scale."""

    def __init__(self, layers: int, initial: float, device: torch.device) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((layers,), math.log(max(initial, 1e-30)), device=device))


class LayerNoise(Wrapper):
    """The kernel's numerator is a perturbed policy: ``h <- h + sigma_l * noise`` in every layer. ALP, 2603.19470.

    The sampler, and so the denominator, is not perturbed. The noise is a function of a seed, a count of scoring passes
    and the layer, so that layers that are computed again in the backward pass meet the same noise. Other passes, such
    as those of micro-batches or of several processes, meet other noise of the same size.

    Args:
        policy, correction: see :class:`Wrapper`.
        initial: first scale of every layer; 0 is no noise.
        learning_rate: of the scales' logarithms.
        seed: of the noise.

    Raises:
        ConfigError: the policy has no layers that are known to put out hidden states.
    """

    reports = ("wrapper/noise_scale",)
    rescores = True

    def __init__(
        self,
        policy: Trainable,
        correction: Correction,
        *,
        initial: NonNegative = 1e-6,
        learning_rate: NonNegative = 5e-4,
        seed: Seed = 0,
    ) -> None:
        super().__init__(policy, correction)
        layers = hidden_layers(policy)
        if not layers:
            raise ConfigError(
                f"correction {correction.name} perturbs hidden layers, and {type(policy).__name__} has none that are "
                "known; use correction=ppo"
            )
        self.learning_rate, self.seed, self.count = learning_rate, seed, 0
        self.active = self.kept = False
        self.scales = LayerScales(len(layers), initial, next(policy.parameters()).device)
        self.silent = initial == 0
        for index, layer in enumerate(layers):
            layer.register_forward_hook(self._hook(index))

    def modules(self) -> dict[str, tuple[nn.Module, float]]:
        """The scales."""
        return {"layer_noise": (self.scales, self.learning_rate)}

    def score(self, part: TensorDictBase, plain: Plain) -> tuple[Tensor, Tensor | None]:
        """Log-probs of the perturbed policy."""
        self.count += 1
        return self.perturbed(part, plain), None

    def perturbed(self, part: TensorDictBase, plain: Plain) -> Tensor:
        """Log-probs ``[B, N]`` under the noise of the present count."""
        self.active = not self.silent
        try:
            return plain(part)
        finally:
            self.active = False

    def around(self, step: Callable[[], Metrics], batch: TensorDictBase) -> Metrics:
        """One step; says how large the noise is."""
        self.kept = not self.silent  # also for layers that are computed again in the backward pass
        try:
            metrics = step()
        finally:
            self.kept = False
        return {**metrics, "wrapper/noise_scale": self.scales.log_scale.detach().exp().mean()}

    def _hook(self, index: int) -> Callable[..., Any]:
        def add(module: nn.Module, inputs: Any, output: Any) -> Any:
            if not self.active and not (self.kept and in_backward()):
                return output
            hidden = output[0] if isinstance(output, tuple) else output
            noisy = hidden + self.scales.log_scale[index].exp().to(hidden.dtype) * self._noise(hidden, index)
            return (noisy, *output[1:]) if isinstance(output, tuple) else noisy

        return add

    def _noise(self, hidden: Tensor, index: int) -> Tensor:
        rank = (self.shard.rank,) if self.shard.world > 1 else ()  # other rows, other noise
        mixed = hash((self.seed, self.count, index, *hidden.shape, *rank)) % 2**63
        generator = torch.Generator(hidden.device).manual_seed(mixed)
        return torch.randn(hidden.shape, generator=generator, device=hidden.device, dtype=hidden.dtype)

    def state_dict(self) -> dict[str, Any]:
        """The scales and the count of passes."""
        return {"scales": dict(self.scales.state_dict()), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores them."""
        self.scales.load_state_dict(state["scales"])
        self.count = int(state["count"])
