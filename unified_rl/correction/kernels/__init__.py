"""The kernels, by what they look at: a unit, the whole batch, a group."""

from unified_rl.correction.kernels import batch, group, unit
from unified_rl.correction.kernels.kernel import Kernel, Traits

__all__ = ["KERNELS", "Kernel", "Traits"]

KERNELS: dict[str, type[Kernel]] = {**unit.KERNELS, **batch.KERNELS, **group.KERNELS}
"""The kernels by the name that a configuration gives."""
