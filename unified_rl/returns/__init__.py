"""One backward scan for every value target, group baselines, off-policy evaluation."""

from unified_rl.returns.groups import Groups, group_advantage, stratified_advantage
from unified_rl.returns.ope import (
    Episodes,
    Estimate,
    doubly_robust,
    importance_sampling,
    per_decision,
    weighted_importance_sampling,
    weighted_per_decision,
)
from unified_rl.returns.scan import gae, retrace, vtrace
from unified_rl.returns.targets import (
    action_value_target,
    corrected_td_lambda,
    cut_bootstrap,
    expected_sarsa,
    monte_carlo,
    n_step,
    td_lambda,
    to_segments,
    tree_backup,
)
from unified_rl.returns.tracker import SuccessTracker

__all__ = [
    "Episodes",
    "Estimate",
    "Groups",
    "SuccessTracker",
    "action_value_target",
    "corrected_td_lambda",
    "cut_bootstrap",
    "doubly_robust",
    "expected_sarsa",
    "gae",
    "group_advantage",
    "importance_sampling",
    "monte_carlo",
    "n_step",
    "per_decision",
    "retrace",
    "stratified_advantage",
    "td_lambda",
    "to_segments",
    "tree_backup",
    "vtrace",
    "weighted_importance_sampling",
    "weighted_per_decision",
]
