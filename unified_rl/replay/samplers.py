"""All samplers under one roof."""

from unified_rl.replay.basic import Fresh, Recency, Segment, Uniform, WithoutReplacement
from unified_rl.replay.grouped import Buckets, Group
from unified_rl.replay.mixing import BySource, Mixture
from unified_rl.replay.sampler import Draw, Sampler
from unified_rl.replay.staleness import StalenessBounded
from unified_rl.replay.weighted import Priority, Softmax

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
