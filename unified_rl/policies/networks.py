"""Small networks shared by the policies and critics: MLPs, their initialisation, activations by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from unified_rl.errors import ConfigError
from unified_rl.machine import require_memory

Activation = Literal["relu", "tanh", "silu", "gelu", "elu", "leaky_relu", "mish", "identity"]
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "elu": nn.ELU,
    "leaky_relu": nn.LeakyReLU,
    "mish": nn.Mish,
    "identity": nn.Identity,
}
"""Activation constructors by the name that a configuration uses."""


def activation_named(name: str) -> Callable[[], nn.Module]:
    """The activation constructor called ``name``.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in ACTIVATIONS:
        raise ConfigError(f"activation {name!r} is unknown; choose one of {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Weights made inside depend on ``seed`` only; the global random state is as it was afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def linear(inputs: int, outputs: int, *, gain: float | None = None) -> nn.Linear:
    """A linear layer; with ``gain``, orthogonal weights of that gain and zero bias, else PyTorch's initialisation."""
    layer = nn.Linear(inputs, outputs)
    if gain is not None:
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return layer


def run_layers(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """``x [..., i]`` through the layers in turn, ``[..., o]``; those without hooks directly, which is quicker."""
    for layer in layers:
        forwards, backwards = layer._forward_hooks or layer._forward_pre_hooks, layer._backward_hooks
        heard = forwards or backwards or layer._backward_pre_hooks
        x = layer(x) if heard else layer.forward(x)
    return x


class Layers(nn.Sequential):
    """As ``nn.Sequential``, by :func:`run_layers`."""

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., i]`` to ``[..., o]``."""
        return run_layers(self, x)


TRAINED = 16
"""Bytes of a float32 weight in training, with its gradient and Adam's two moments."""


def check_widths(inputs: int, hidden: Sequence[int], setting: str) -> None:
    """Refuses widths of which no network can be made.

    Raises:
        ConfigError: a width below 1, or weights that this machine cannot hold.
    """
    if any(width < 1 for width in (inputs, *hidden)):
        raise ConfigError(f"{setting}: network widths must be at least 1, got {(inputs, *hidden)}")
    weights = sum(below * above for below, above in pairwise((inputs, *hidden)))
    require_memory(TRAINED * weights, f"{setting}={list(hidden)} with {inputs} inputs")


def mlp(
    inputs: int,
    hidden: Sequence[int],
    outputs: int | None = None,
    *,
    activation: str = "relu",
    orthogonal: bool = False,
    output_gain: float = 1.0,
    layer_norm: bool = False,
    setting: str = "policy.hidden",
) -> nn.Sequential:
    """A multi-layer perceptron.

    Args:
        inputs: width of the input.
        hidden: widths of the hidden layers.
        outputs: width of the last linear layer; None leaves it out (the result is a trunk).
        activation: a name in :data:`ACTIVATIONS`.
        orthogonal: orthogonal weights of gain sqrt(2), zero biases; the last layer gets ``output_gain``.
        output_gain: gain of the last layer, used with ``orthogonal``.
        layer_norm: LayerNorm before every activation.
        setting: the full name of ``hidden``, for errors.

    Raises:
        ConfigError: an unknown activation or a width below 1.
    """
    check_widths(inputs, hidden, setting)
    make_activation = activation_named(activation)
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise((inputs, *hidden)):
        layers.append(linear(width_in, width_out, gain=2**0.5 if orthogonal else None))
        if layer_norm:
            layers.append(nn.LayerNorm(width_out))
        layers.append(make_activation())
    if outputs is not None:
        last = hidden[-1] if hidden else inputs
        layers.append(linear(last, outputs, gain=output_gain if orthogonal else None))
    return Layers(*layers)


def trunk_width(inputs: int, hidden: Sequence[int]) -> int:
    """Output width of an :func:`mlp` without a last layer."""
    return hidden[-1] if hidden else inputs


def time_features(time: Tensor, count: int) -> Tensor:
    """Sine and cosine features of a time in [0, 1]: ``time [...]`` to ``[..., count]`` (count even).

    Frequencies are pi times 1, 2, 4, ... so that the slowest is monotone over the unit interval.
    """
    frequency = torch.pi * 2.0 ** torch.arange(count // 2, device=time.device, dtype=time.dtype)
    angle = time.unsqueeze(-1) * frequency
    return torch.cat((angle.sin(), angle.cos()), dim=-1)
