"""Studies: grids of runs, their statistics and the report."""

from unified_rl.study.compare import StudyError, compare
from unified_rl.study.grid import Study
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
    "compare",
    "iqm",
    "paired_difference",
    "performance_profile",
    "probability_of_improvement",
    "stratified_bootstrap",
    "write_report",
]
