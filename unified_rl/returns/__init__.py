"""One backward scan for every value target, group baselines, off-policy evaluation."""

from unified_rl.returns.groups import group_advantage
from unified_rl.returns.scan import gae, retrace, vtrace

__all__ = ["gae", "group_advantage", "retrace", "vtrace"]
