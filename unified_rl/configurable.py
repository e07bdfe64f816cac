"""The mark of what a configuration may build of this package: ``_target_`` names what is marked, or nothing.

A configuration often comes from somebody else, in a run folder or a file of options, and most public functions of a
package write files, load them or start work. So a part says where it is defined that it may be built from a file::

    @configurable
    class HalfNewest(Sampler): ...

The mark is the object's own: subclasses, methods and other names for what surrounds it are not marked with it. Classes
of other packages need no mark; the command line allows them with ``--allow``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Part = TypeVar("Part", bound=Callable[..., Any])

_MARKED: dict[int, Callable[..., Any]] = {}
"""By identity: nothing that merely compares equal to a part passes for it."""


def configurable(part: Part) -> Part:
    """Lets configuration build ``part``, a class or function whose whole effect is the object that it returns."""
    _MARKED[id(part)] = part
    return part


def is_configurable(found: object) -> bool:
    """Whether ``found`` itself is marked."""
    return _MARKED.get(id(found)) is found


def marked() -> list[Callable[..., Any]]:
    """Every marked object of the modules that have been imported."""
    return list(_MARKED.values())
