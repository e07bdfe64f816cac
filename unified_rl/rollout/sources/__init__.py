"""Rows that others made, joined with a language rollout's own: in its prompts' groups, or as a batch of their own."""

from unified_rl.rollout.sources.base import Recited, Request, RowSource
from unified_rl.rollout.sources.experience import Experience
from unified_rl.rollout.sources.experts import Demonstrations, ExpertFile, Model
from unified_rl.rollout.sources.stored import Pool, Recorded

__all__ = ["Demonstrations", "Experience", "ExpertFile", "Model", "Pool", "Recited", "Recorded", "Request", "RowSource"]
