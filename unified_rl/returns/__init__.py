"""One backward scan for every value target, group baselines, off-policy evaluation."""

from unified_rl.returns.emphasis import (
    TruncatedScores,
    emphatic_weights,
    truncated_scores,
    within_trust_region,
)
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
from unified_rl.returns.record import compared_reward, record_advantage
from unified_rl.returns.scan import gae, retrace, vtrace
from unified_rl.returns.segments import Segments, hierarchical_gae, segment_ends, segment_gae, to_segments
from unified_rl.returns.targets import (
    action_based_target,
    action_value_target,
    corrected_td_lambda,
    cut_bootstrap,
    expected_sarsa,
    monte_carlo,
    n_step,
    q_lambda,
    td_lambda,
    tree_backup,
)
from unified_rl.returns.tracker import SuccessTracker

__all__ = [
    "Episodes",
    "Estimate",
    "Groups",
    "Segments",
    "SuccessTracker",
    "TruncatedScores",
    "action_based_target",
    "action_value_target",
    "compared_reward",
    "corrected_td_lambda",
    "cut_bootstrap",
    "doubly_robust",
    "emphatic_weights",
    "expected_sarsa",
    "gae",
    "group_advantage",
    "hierarchical_gae",
    "importance_sampling",
    "monte_carlo",
    "n_step",
    "per_decision",
    "q_lambda",
    "record_advantage",
    "retrace",
    "segment_ends",
    "segment_gae",
    "stratified_advantage",
    "td_lambda",
    "to_segments",
    "tree_backup",
    "truncated_scores",
    "vtrace",
    "weighted_importance_sampling",
    "weighted_per_decision",
    "within_trust_region",
]
