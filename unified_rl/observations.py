"""How an observation of any shape lies in one row, so that rollouts, replays and policies carry one tensor for all.

Numbers lie in a row as float32, in the order of Gymnasium's ``flatten``. Where an observation holds images the row is
of bytes: first those of the numbers, then the images', a byte a pixel. Nothing is rounded, and an image takes no more
room than it has. Imports torch only where rows are tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from unified_rl.spaces import Box, DictSpace, Discrete, Image, MultiBinary, MultiDiscrete, Part, TupleSpace

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Array = NDArray[Any]
NUMBERS = "biuf"
"""Kinds of NumPy dtypes that are real numbers."""
FLOAT = 4
"""Bytes of a float32."""


class MisfitError(ValueError):
    """A value that its space does not hold.

    Attributes:
        where: the path of the entry inside the observation, empty where it has none.
        value: the entry.
        expected: what was to be there.
    """

    def __init__(self, where: str, value: Any, expected: str) -> None:
        super().__init__(f"{where or 'observation'}: {expected} is expected")
        self.where, self.value, self.expected = where, value, expected


@dataclass(frozen=True)
class Leaf:
    """An entry without entries of its own.

    Attributes:
        path: keys and places that lead to it.
        part: its space.
    """

    path: tuple[str | int, ...]
    part: Part

    @property
    def name(self) -> str:
        """For error messages, for example ``camera[0]``; empty of an observation that is one entry."""
        first, *rest = self.path or ("",)
        return str(first) + "".join(f"[{one}]" for one in rest)

    def of(self, value: Any) -> Any:
        """The entry of an observation.

        Raises:
            MisfitError: the observation has no such entry.
        """
        for step in self.path:
            if isinstance(step, str):
                if not isinstance(value, Mapping) or step not in value:
                    raise MisfitError(self.name, value, f"a dictionary with {step!r}")
                value = value[step]
            else:
                if not isinstance(value, tuple | list) or step >= len(value):
                    raise MisfitError(self.name, value, f"a tuple with an entry {step}")
                value = value[step]
        return value

    @property
    def expects(self) -> str:
        """What stands here, in words."""
        if isinstance(self.part, Image):
            return self.part.describe()
        if isinstance(self.part, Discrete):
            return self.part.describe()
        size = "x".join(map(str, self.part.shape)) or "()"
        return f"an array of shape {size} of real numbers"


class Layout:
    """The rows of an observation space.

    Args:
        part: the space.

    Attributes:
        numbers: entries that are no images.
        images: entries that are.
        vector: how many numbers a row holds, each choice among n as n of them.
        width: entries of a row: numbers, or bytes where there are images.
    """

    def __init__(self, part: Part) -> None:
        self.part = part
        leaves = list(_leaves(part, ()))
        self.numbers = [leaf for leaf in leaves if not isinstance(leaf.part, Image)]
        self.images = [leaf for leaf in leaves if isinstance(leaf.part, Image)]
        self.vector = sum(leaf.part.width for leaf in self.numbers)
        pixels = sum(leaf.part.width for leaf in self.images)
        self.width = FLOAT * self.vector + pixels if self.images else self.vector

    @property
    def dtype(self) -> torch.dtype:
        """Of rows: uint8 with images, else float32."""
        import torch

        return torch.uint8 if self.images else torch.float32

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        return self.width if self.images else FLOAT * self.width

    @cached_property
    def plain(self) -> tuple[int, ...] | None:
        """The shape of an observation that is one array of numbers; None of others."""
        single = len(self.numbers) == 1 and not self.images and not self.numbers[0].path
        return self.numbers[0].part.shape if single and isinstance(self.numbers[0].part, Box) else None

    def pack(self, value: Any, lead: tuple[int, ...] = ()) -> Array:
        """The rows ``[*lead, width]`` of observations, each entry of which has ``lead`` in front of its shape.

        Raises:
            MisfitError: an entry is missing, or of another shape or kind.
        """
        numbers = [_numbers(leaf, value, lead) for leaf in self.numbers]
        vector = numbers[0] if len(numbers) == 1 else np.concatenate([np.zeros((*lead, 0), np.float32), *numbers], -1)
        if not self.images:
            return vector
        pictures = [_pixels(leaf, value, lead) for leaf in self.images]
        return np.concatenate([np.ascontiguousarray(vector).view(np.uint8), *pictures], -1)

    def lead_of(self, value: Any) -> tuple[int, ...]:
        """The batch dimensions of observations, as their first entry has them.

        Raises:
            MisfitError: that entry is missing, or has fewer dimensions than its space.
        """
        leaf = (self.numbers + self.images)[0]
        found, shape = _array(leaf, leaf.of(value)), leaf.part.shape
        if found.ndim < len(shape):
            raise MisfitError(leaf.name, found, leaf.expects)
        return tuple(found.shape[: found.ndim - len(shape)])

    def unpack(self, rows: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Numbers ``[..., vector]`` float32 and images ``[..., C, H, W]`` uint8 of rows ``[..., width]``."""
        if not self.images:
            return rows, []
        import torch

        at = FLOAT * self.vector
        numbers = (
            rows[..., :at].contiguous().view(torch.float32) if at else rows.new_zeros((*rows.shape[:-1], 0)).float()
        )
        pictures = []
        for leaf in self.images:
            assert isinstance(leaf.part, Image)
            pictures.append(_planes(rows[..., at : at + leaf.part.width], leaf.part))
            at += leaf.part.width
        return numbers, pictures

    def stack(self, rows: Tensor) -> Tensor:
        """Rows ``[..., n, width]`` of n observations as one row ``[..., n * width]`` of :func:`stacked`."""
        import torch

        size = FLOAT if self.images else 1
        widths = [size * leaf.part.width for leaf in self.numbers] + [leaf.part.width for leaf in self.images]
        if len(widths) == 1:
            return rows.flatten(-2)
        return torch.cat([entry.flatten(-2) for entry in rows.split(widths, -1)], -1)

    def finite(self, rows: Array) -> bool:
        """Whether the numbers of rows are finite; pixels always are."""
        if self.images:
            rows = np.ascontiguousarray(rows[..., : FLOAT * self.vector]).view(np.float32)
        return math.isfinite(np.add.reduce(rows, axis=None)) or bool(np.isfinite(rows).all())


@lru_cache(maxsize=256)
def layout_of(part: Part) -> Layout:
    """The rows of an observation space."""
    return Layout(part)


def stacked(part: Part, count: int) -> Part:
    """The space of the newest ``count`` observations together, oldest first; its rows are :meth:`Layout.stack`'s.

    An array of numbers becomes a vector. Otherwise every entry has ``count`` in front of its shape, as in Gymnasium's
    ``FrameStackObservation``; where it holds several images already, ``count`` times as many.
    """
    return _stacked(part, count, (count * part.width,)) if isinstance(part, Box) else _stacked(part, count)


def _stacked(part: Part, count: int, shape: tuple[int, ...] | None = None) -> Part:
    shape = (count, *part.shape) if shape is None else shape
    match part:
        case DictSpace():
            return DictSpace(tuple((name, _stacked(one, count)) for name, one in part.parts))
        case TupleSpace():
            return TupleSpace(tuple(_stacked(one, count) for one in part.parts))
        case Image():
            several = (count * shape[1], *shape[2:]) if len(part.shape) == 4 else shape
            return Image(several, part.channels_first or len(part.shape) == 2)
        case Discrete():
            return MultiDiscrete((part.n,) * count, (part.start,) * count)
        case MultiDiscrete():
            return MultiDiscrete(part.counts * count, part.start * count, shape, part.dtype)
        case MultiBinary():
            return MultiBinary(shape)
    assert isinstance(part, Box)
    low, high = (tuple(bound.ravel().tolist()) * count for bound in (part.low_array, part.high_array))
    return Box(shape, part.dtype, low, high)


def _leaves(part: Part, path: tuple[str | int, ...]) -> Iterator[Leaf]:
    inner: Sequence[tuple[str | int, Part]] = ()
    if isinstance(part, DictSpace):
        inner = part.parts
    elif isinstance(part, TupleSpace):
        inner = list(enumerate(part.parts))
    else:
        yield Leaf(path, part)
    for step, one in inner:
        yield from _leaves(one, (*path, step))


def _array(leaf: Leaf, value: Any) -> Array:
    try:
        found = np.asarray(value)
    except (ValueError, TypeError, RuntimeError):  # ragged, or an object that is no array
        found = np.asarray(None)
    if found.dtype.kind not in NUMBERS:
        raise MisfitError(leaf.name, value, leaf.expects)
    return found


def _numbers(leaf: Leaf, value: Any, lead: tuple[int, ...]) -> Array:
    """One entry as ``[*lead, w]`` float32; choices among n as n numbers."""
    entry, part = leaf.of(value), leaf.part
    found = _array(leaf, entry)
    if found.shape != (*lead, *part.shape):
        raise MisfitError(leaf.name, entry, leaf.expects)
    if isinstance(part, Discrete | MultiDiscrete):
        starts = (part.start,) if isinstance(part, Discrete) else part.start
        flat, counts = found.reshape(*lead, -1), part.choices
        shown = [_one_hot(leaf, flat[..., at] - starts[at], count) for at, count in enumerate(counts)]
        return np.concatenate(shown, -1)
    if not isinstance(part, Box | MultiBinary):
        raise MisfitError(leaf.name, entry, part.describe())
    return found.astype(np.float32, copy=False).reshape(*lead, -1)


def _one_hot(leaf: Leaf, chosen: Array, count: int) -> Array:
    places = np.arange(count)
    shown = (chosen[..., None] == places).astype(np.float32)
    if not bool((shown.sum(-1) == 1).all()):
        raise MisfitError(leaf.name, chosen, leaf.part.describe())
    return shown


def _pixels(leaf: Leaf, value: Any, lead: tuple[int, ...]) -> Array:
    entry = leaf.of(value)
    found = _array(leaf, entry)
    if found.dtype != np.uint8 or found.shape != (*lead, *leaf.part.shape):
        raise MisfitError(leaf.name, entry, leaf.expects)
    return found.reshape(*lead, -1)


def _planes(pixels: Tensor, image: Image) -> Tensor:
    """Bytes ``[..., n]`` as ``[..., C, H, W]``; a history of images has the channels of all."""
    picture = pixels.reshape(*pixels.shape[:-1], *image.shape)
    if len(image.shape) == 2:
        return picture.unsqueeze(-3)
    if not image.channels_first:
        picture = picture.movedim(-1, -3)
    return picture.flatten(-4, -3) if len(image.shape) == 4 else picture
