"""All samplers under one roof."""

from unified_rl.replay.basic import Fresh, Recency, Segment, Uniform, WithoutReplacement
from unified_rl.replay.sampler import Draw, Sampler

__all__ = ["Draw", "Fresh", "Recency", "Sampler", "Segment", "Uniform", "WithoutReplacement"]
