"""Rows that others made, joined with a language rollout's own: in its prompts' groups, or as a batch of their own."""

from unified_rl.rollout.sources.base import Recited, Request, RowSource
from unified_rl.rollout.sources.branches import Steps
from unified_rl.rollout.sources.calibrated import Calibrated
from unified_rl.rollout.sources.coached import Assimilated, Coached
from unified_rl.rollout.sources.described import Described
from unified_rl.rollout.sources.experience import Experience
from unified_rl.rollout.sources.experts import Demonstrations, ExpertFile, Model
from unified_rl.rollout.sources.judged import Judgements
from unified_rl.rollout.sources.mended import Edited, Recoveries, Revised, Shortened
from unified_rl.rollout.sources.replays import Replays, Windows
from unified_rl.rollout.sources.stored import Pool, Recorded

__all__ = [
    "Assimilated",
    "Calibrated",
    "Coached",
    "Demonstrations",
    "Described",
    "Edited",
    "Experience",
    "ExpertFile",
    "Judgements",
    "Model",
    "Pool",
    "Recited",
    "Recorded",
    "Recoveries",
    "Replays",
    "Request",
    "Revised",
    "RowSource",
    "Shortened",
    "Steps",
    "Windows",
]
