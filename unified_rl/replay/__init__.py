"""The one replay: schema, storage, samplers, sum tree, staleness index, mixing."""

from unified_rl.replay.basic import Fresh, Recency, Segment, Uniform, WithoutReplacement
from unified_rl.replay.buffer import Replay
from unified_rl.replay.ingest import from_collector
from unified_rl.replay.sampler import Draw, Sampler

__all__ = [
    "Draw",
    "Fresh",
    "Recency",
    "Replay",
    "Sampler",
    "Segment",
    "Uniform",
    "WithoutReplacement",
    "from_collector",
]
