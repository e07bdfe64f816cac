"""How a policy's log-probs are computed in an update, and the check that they are those of its own samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.errors import ConfigError
from unified_rl.objectives.rows import Rows
from unified_rl.protocols import HasTolerance, Scores

FRESH_ROWS = Rows.of("online", "rows")
"""What the policy sampled in this run: rows that were recorded may be of another policy, whatever their version."""


def scoring(
    policy: Scores, compiled: bool, cuda_graph: bool, device: torch.device
) -> Callable[[TensorDictBase], Tensor]:
    """``rows -> log_prob [B, N]``: as the policy has it, compiled, or replayed from CUDA graphs.

    Raises:
        ConfigError: CUDA graphs without a CUDA device.
    """
    if cuda_graph and device.type != "cuda":
        raise ConfigError("agent.cuda_graph needs device=cuda")
    if not (compiled or cuda_graph):
        return lambda rows: policy.log_prob(rows).log_prob  # looked up at each pass: see learner=fsdp
    score = torch.compile(policy.log_prob, mode="reduce-overhead" if cuda_graph else None)
    return lambda rows: score(rows).log_prob


def identity_check(policy: Scores, record: TensorDictBase, version: int, score: Callable[[], Tensor]) -> dict[str, Any]:
    """Units sampled by the weights of ``version`` must have ratio 1 under them.

    The tolerance is 0.01, or the policy's own ``log_ratio_tolerance`` where its arithmetic is coarser.

    Args:
        policy: whose samples they are.
        record: the rows; those of others, and rows that were recorded or replayed, are not looked at.
        version: of the present weights.
        score: the rows' log-probs ``[B, N]``.

    Raises:
        ConfigError: they do not; then the policy's ``sample`` and ``log_prob`` disagree.
    """
    fresh = FRESH_ROWS.within(record)["mask"] & (record["policy_version"] == version)
    if not bool(fresh.any()) or version > 0:
        return {}
    with torch.no_grad():
        log_prob = score()
    gap = torch.where(fresh, log_prob - record["behavior_log_prob"], 0.0).abs().max()
    tolerance = policy.log_ratio_tolerance if isinstance(policy, HasTolerance) else 1e-2
    if not bool(gap <= tolerance):
        raise ConfigError(
            f"fresh data should have log-ratio 0, but the largest is {float(gap):.3g}: the policy's sample() and "
            "log_prob() disagree (temperature, truncation, std floor or dtype)"
        )
    return {"identity/max_log_ratio": gap}
