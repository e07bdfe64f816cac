"""From rows that hold images to the features that every trunk network begins with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unified_rl.observations import Layout
from unified_rl.policies.networks import seeded

LARGE = 36
"""Pixels of the shorter side from which on the kernels of Nature-DQN fit."""
NATURE = ((32, 8, 4), (64, 4, 2), (64, 3, 1))
"""Channels, kernel and stride of "Human-level control through deep reinforcement learning" (Nature 518, 2015)."""
SMALL = ((32, 3, 1), (64, 3, 2), (64, 3, 1))
"""The same for smaller images, with a border of one pixel."""
USUAL_FEATURES = 256
"""Width of what an image becomes, unless another is asked for."""


class ImageEncoder(nn.Module):
    """One image to features: the convolutions of Nature-DQN, then a linear layer; ReLU behind each.

    Args:
        planes: channels, height and width.
        features: width of the result.
    """

    def __init__(self, planes: tuple[int, int, int], features: int) -> None:
        super().__init__()
        channels, height, width = planes
        large = min(height, width) >= LARGE
        layers: list[nn.Module] = []
        for out, kernel, stride in NATURE if large else SMALL:
            layers += [nn.Conv2d(channels, out, kernel, stride, padding=0 if large else kernel // 2), nn.ReLU()]
            channels = out
        self.convolutions = nn.Sequential(*layers)
        with torch.no_grad():
            flat = self.convolutions(torch.zeros(1, *planes)).numel()
        self.head = nn.Linear(flat, features)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.orthogonal_(module.weight, 2**0.5)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, planes: Tensor) -> Tensor:
        """``planes [M, C, H, W]`` uint8 to ``[M, features]``."""
        pixels = planes.to(self.head.weight.dtype) / 255.0
        features: Tensor = torch.relu(self.head(self.convolutions(pixels).flatten(1)))
        return features


class ObservationEncoder(nn.Module):
    """An observation with images to one vector: its numbers as they are, then the features of each image.

    Policies and critics put it before whatever network they have, so that all of them see images alike.

    Args:
        layout: of the observation's rows.
        features: of each image.
        seed: of the initial weights.

    Attributes:
        width: of the result.
        features: as given.
    """

    def __init__(self, layout: Layout, features: int, seed: int) -> None:
        super().__init__()
        self.features = features
        self.width = layout.vector + features * len(layout.images)
        with seeded(seed):
            self.images = nn.ModuleList(ImageEncoder(leaf.part.planes, features) for leaf in layout.images)  # type: ignore[attr-defined]

    def forward(self, numbers: Tensor, images: list[Tensor]) -> Tensor:
        """``numbers [..., v]``, standardised already, and images ``[..., C, H, W]`` uint8 to ``[..., width]``."""
        lead = numbers.shape[:-1]
        seen = [net(image.flatten(0, len(lead) - 1)) for net, image in zip(self.images, images, strict=True)]
        return torch.cat([numbers, *(one.reshape(*lead, -1) for one in seen)], -1)


def image_features(policy: object) -> int:
    """Width that ``policy`` gives an image, for critics beside it; the usual one if its encoder is another."""
    encoder = getattr(policy, "encoder", None)
    return encoder.features if isinstance(encoder, ObservationEncoder) else USUAL_FEATURES
