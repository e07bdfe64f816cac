"""Maps of advantages: what reshapes them after the baseline, detached, ``(record, advantage [B, T]) -> [B, T]``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.errors import RecordError
from unified_rl.units import Steps


def sign(record: TensorDictBase, advantage: Tensor, *, positive: float = 1.0, negative: float = 1.0) -> Tensor:
    """Positive advantages times one number, the others times another: PSR (1, 0), NSR (0, 1), W-REINFORCE (0.1, 1)."""
    return advantage * torch.where(advantage > 0, positive, negative)


def overconfident(record: TensorDictBase, advantage: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Negative advantages times ``1 + alpha softplus(sum(lp - lp_reference))`` of their row. ACE.

    Raises:
        RecordError: the rows were not scored by the policy at the start of the update, and by the reference.
    """
    for name in overconfident.anchors:  # type: ignore[attr-defined]
        if f"{name}_log_prob" not in record.keys():
            raise RecordError(f"the map overconfident needs {name}_log_prob of the {name} policy")
    gap = Steps.of(record).sum(record["proximal_log_prob"] - record["reference_log_prob"]).sum(-1, keepdim=True)
    return advantage * torch.where(advantage < 0, 1 + alpha * torch.nn.functional.softplus(gap), 1.0)


overconfident.anchors = ("reference", "proximal")  # type: ignore[attr-defined]  # an agent scores them beforehand

MAPS: dict[str, Callable[..., Tensor]] = {"sign": sign, "overconfident": overconfident}
