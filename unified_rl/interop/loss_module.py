"""Our policy loss as a TorchRL ``LossModule``."""

from __future__ import annotations

from typing import cast

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch
from torch import nn
from torchrl.objectives import LossModule

from unified_rl.correction import Correction
from unified_rl.protocols import Scores


class CorrectedPolicyLoss(LossModule):
    """The corrected policy-gradient loss for TorchRL training scripts.

    Args:
        actor_network: any policy of :mod:`unified_rl.policies`.
        correction: a correction, for example ``load_correction("cispo")``.

    The input is a record of :mod:`unified_rl.units` with ``advantage``; the output holds ``loss_objective`` and the
    correction's metrics.
    """

    actor_network: nn.Module

    def __init__(self, actor_network: nn.Module, correction: Correction) -> None:
        super().__init__()
        self.actor_network = actor_network
        self.correction = correction
        self.in_keys = ["behavior_log_prob", "mask", "step_index", "reward", "advantage"]
        self.out_keys = ["loss_objective"]

    @dispatch  # type: ignore[untyped-decorator]  # TorchRL's own
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """The loss of one record; ``loss_objective`` carries the gradient."""
        scored = cast(Scores, self.actor_network).log_prob(tensordict)  # a module, for TorchRL
        out = self.correction(scored.log_prob, tensordict)
        metrics = {key.replace("/", "_"): value.detach() for key, value in out.metrics.items()}
        return TensorDict({"loss_objective": out.loss, **metrics}, batch_size=[])
