"""What a method does outside its loss: one small object, called where it acts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from unified_rl.correction import Correction
from unified_rl.optimizer import Optimizer
from unified_rl.protocols import Trainable, domain_of
from unified_rl.ranges import enforce
from unified_rl.shard import ALONE, Shard
from unified_rl.units import EXPERTS

Metrics = dict[str, Any]
Plain = Callable[[TensorDictBase], Tensor]
"""The policy's own scoring: a batch to log-probs ``[B, N]``."""


def sampled(batch: TensorDictBase) -> Tensor:
    """Rows ``[B]`` that hold units and whose behavior probability is known: those that no demonstrator wrote."""
    own = batch["mask"].any(-1)
    out: Tensor = (
        own & ~torch.isin(batch["source"], batch["source"].new_tensor(EXPERTS)) if "source" in batch.keys() else own
    )
    return out


class Wrapper:
    """Does nothing; methods override the hooks they need. An agent calls them in this order.

    ``start`` at the beginning of an update; ``annotate`` for what must be fixed before the first optimiser step;
    ``row_weight`` for a group baseline; then for every optimiser step ``around``, and inside it ``score`` and ``watch``
    for every micro-batch; ``finish`` after the last step.

    Args:
        policy: the policy that is trained.
        correction: its correction; the wrapper's settings are the rest of the preset's ``wrapper`` node.

    Attributes:
        whole_rows: minibatches must hold whole rows, never single steps.
        rescores: ``score`` is not the policy's own, so compiling that would be of no use.
        anchors: names of the policies whose log-probs ``{name}_log_prob [B, N]`` it reads from the rows.
        sync_every: updates after which the reference becomes the present policy; None leaves it as it was at first.
        shard: of the processes that divide the rows among them: ``annotate``, ``score`` and ``watch`` see this one's
            rows alone, all other hooks the whole batch.
        shares: a class of the user's own says so where it is right then: what it sums up in ``score`` and ``watch`` it
            adds up over ``shard``.
        reads_weights: it looks at whole weights or their gradients, which are in pieces under ``learner=fsdp``.
    """

    shard: Shard = ALONE
    shares = False
    reads_weights = False

    whole_rows = False
    rescores = False
    anchors: frozenset[str] = frozenset()
    sync_every: int | None = None

    reports: tuple[str, ...] = ()
    """Names of the metrics of :meth:`around` and :meth:`finish`, and ``loss/wrapper`` with a penalty."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        enforce(cls, "correction.wrapper")

    def __init__(self, policy: Trainable, correction: Correction) -> None:
        self.policy, self.correction = policy, correction
        self.language = domain_of(policy) == "language"

    def modules(self) -> dict[str, tuple[nn.Module, float]]:
        """Further weights to train, by name, each with its own learning rate."""
        return {}

    def attach(self, optimizer: Optimizer) -> None:
        """Gives the wrapper the optimiser that it acts on."""
        self.optimizer = optimizer

    def start(self, progress: float) -> None:
        """Called at the start of an update with the share of the run that is done."""

    def annotate(self, part: TensorDictBase) -> dict[str, Tensor]:
        """Further keys of a chunk of rows, computed without gradient at the start of the update."""
        return {}

    def row_weight(self, record: TensorDictBase) -> Tensor | None:
        """Weights ``[B]`` of a weighted group baseline; None leaves them to the agent."""
        return None

    def score(self, part: TensorDictBase, plain: Plain) -> tuple[Tensor, Tensor | None]:
        """Log-probs ``[B, N]`` of a micro-batch, and a penalty a unit ``[B, N]`` or None.

        Both with gradient. The penalty is reduced as the correction reduces its own.
        """
        return plain(part), None

    def watch(self, log_prob: Tensor, part: TensorDictBase, stats: TensorDictBase, weight: Tensor) -> None:
        """Sees a micro-batch before its backward pass: ``weight [B, N]`` is the coefficient of each unit's score."""

    def around(self, step: Callable[[], Metrics], batch: TensorDictBase) -> Metrics:
        """Takes the optimiser step of a minibatch, by calling ``step`` (gradient and step) as often as it likes."""
        return step()

    def finish(self, batches: Sequence[TensorDictBase]) -> Metrics:
        """Called after the last optimiser step of an update, with all its rows in batches."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a bit-exact continuation needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
