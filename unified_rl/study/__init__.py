"""Studies: grids of runs, their statistics and the report.

Names are imported when they are first used, since worker processes need no figures. The comparison itself is
:func:`unified_rl.study.compare.compare`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from unified_rl.study.grid import Study

if TYPE_CHECKING:
    from unified_rl.study.compare import StudyError
    from unified_rl.study.plot import plot_runs
    from unified_rl.study.report import write_report
    from unified_rl.study.statistics import (
        Interval,
        iqm,
        paired_difference,
        performance_profile,
        probability_of_improvement,
        stratified_bootstrap,
    )

__all__ = [
    "Interval",
    "Study",
    "StudyError",
    "iqm",
    "paired_difference",
    "performance_profile",
    "plot_runs",
    "probability_of_improvement",
    "stratified_bootstrap",
    "write_report",
]

_ROOMS = {"StudyError": "compare", "plot_runs": "plot", "write_report": "report"}


def __getattr__(name: str) -> Any:
    """Imports a public name from the module that holds it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_ROOMS.get(name, 'statistics')}"), name)
    globals()[name] = value
    return value
