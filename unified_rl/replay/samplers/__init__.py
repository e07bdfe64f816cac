"""All samplers under one roof."""

from unified_rl.replay.samplers.base import Draw, Sampler
from unified_rl.replay.samplers.grouped import Buckets, Group
from unified_rl.replay.samplers.mixture import BySource, Mixture
from unified_rl.replay.samplers.order import Fresh, Recency, Segment, Uniform, WithoutReplacement
from unified_rl.replay.samplers.staleness import StalenessBounded
from unified_rl.replay.samplers.weighted import Priority, Softmax

__all__ = [
    "Buckets",
    "BySource",
    "Draw",
    "Fresh",
    "Group",
    "Mixture",
    "Priority",
    "Recency",
    "Sampler",
    "Segment",
    "Softmax",
    "StalenessBounded",
    "Uniform",
    "WithoutReplacement",
]
