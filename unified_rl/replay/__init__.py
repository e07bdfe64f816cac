"""The one replay: schema, storage, samplers, sum tree, staleness index, mixing."""

from unified_rl.replay.buffer import Replay
from unified_rl.replay.hindsight import HindsightReplay
from unified_rl.replay.ingest import from_collector
from unified_rl.replay.joined import WithDataset
from unified_rl.replay.nstep import nstep_transitions
from unified_rl.replay.persist import read_rows
from unified_rl.replay.samplers import (
    Buckets,
    BySource,
    Draw,
    Fresh,
    Group,
    Mixture,
    Priority,
    Recency,
    Sampler,
    Segment,
    Softmax,
    StalenessBounded,
    Uniform,
    WithoutReplacement,
)

__all__ = [
    "Buckets",
    "BySource",
    "Draw",
    "Fresh",
    "Group",
    "HindsightReplay",
    "Mixture",
    "Priority",
    "Recency",
    "Replay",
    "Sampler",
    "Segment",
    "Softmax",
    "StalenessBounded",
    "Uniform",
    "WithDataset",
    "WithoutReplacement",
    "from_collector",
    "nstep_transitions",
    "read_rows",
]
