"""The other policies that a batch is compared with, and what is computed from them before the first optimiser step."""

from __future__ import annotations

import copy
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from unified_rl.agents.teacher import load_teacher
from unified_rl.correction import Correction
from unified_rl.correction.proximal import MovingAverage, interpolated
from unified_rl.errors import ConfigError
from unified_rl.interventions import Wrapper
from unified_rl.policies.normalizer import MOMENTS

PROVIDERS = ("snapshot", "average", "interpolated")
"""Where the proximal policy of a decoupled correction comes from."""


class Anchors:
    """Reference, proximal and teacher policies of a correction.

    Args:
        policy: the policy that is trained.
        correction: says which anchors it needs and how the proximal policy is made.
        wrapper: adds its own keys in the same pass.
        teacher: folder of the teacher, see :func:`~unified_rl.agents.teacher.load_teacher`.
        micro_batch: rows of one forward pass; None takes all.
        log_probs: anchors whose log-probs terms of the loss need beside the correction.
        policies: anchors whose whole distributions they need.
        proximal: store proximal log-probs although the correction does not ask for them.

    Raises:
        ConfigError: a teacher is needed and none is given, or the other way round.
    """

    def __init__(
        self,
        policy: Any,
        correction: Correction,
        wrapper: Wrapper,
        teacher: str | None = None,
        micro_batch: int | None = None,
        proximal: bool = False,
        log_probs: frozenset[str] = frozenset(),
        policies: frozenset[str] = frozenset(),
    ) -> None:
        def needs(name: str) -> bool:
            return correction.needs(name) or name in log_probs

        if (needs("teacher") or "teacher" in policies) != (teacher is not None):
            raise ConfigError(
                f"correction {correction.name} learns from a teacher: set agent.teacher to the folder of a run of this "
                "library (or of a language model)"
                if teacher is None
                else f"agent.teacher is set, but correction {correction.name} uses no teacher; try correction=erpd"
            )
        self.policy, self.wrapper, self.micro_batch = policy, wrapper, micro_batch
        self.provider = correction.proximal.get("provider", "snapshot")
        self.needs_proximal = needs("proximal") or proximal
        self.scored = [name for name in ("reference", "teacher") if needs(name)]
        self.placeholder = self.provider == "interpolated" and not proximal  # set anew at every optimiser step
        kept = needs("reference") or "reference" in policies
        self.reference = _same_inputs(copy.deepcopy(policy).requires_grad_(False), policy) if kept else None
        self.teacher = None if teacher is None else load_teacher(teacher, policy)
        self.average: MovingAverage | None = None
        if self.provider == "average":
            self.average = MovingAverage(policy, float(correction.proximal.get("decay", 0.9)))
            _same_inputs(self.average.module, policy)

    @property
    def policies(self) -> dict[str, Any]:
        """Policies by anchor name; ``self`` are the weights that are trained, as they are at each step."""
        return {"reference": self.reference, "teacher": self.teacher, "self": self.policy}

    def annotate(self, record: TensorDict, version: int) -> None:
        """Writes the log-probs ``[B, N]`` of the anchors, and the wrapper's keys, into the record."""
        extra = self._wrapper_keys(record)
        if self.needs_proximal:
            extra["proximal_log_prob"] = self._proximal(record, version, extra.get("proximal_log_prob"))
        else:
            extra.pop("proximal_log_prob", None)
        if "reference" in self.scored:
            extra["reference_log_prob"] = self.chunked(self.reference, record)
        if "teacher" in self.scored:  # it standardises observations by moments of its own
            extra["teacher_log_prob"] = self.chunked(self.teacher, record.exclude(MOMENTS))
        record.update(extra)

    def _wrapper_keys(self, record: TensorDict) -> dict[str, Tensor]:
        parts = [self.wrapper.annotate(part) for part in record.split(self.micro_batch or len(record))]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def _proximal(self, record: TensorDict, version: int, scored: Tensor | None) -> Tensor:
        """Log-probs at the start of the update; those of fresh rows are the behavior's, without a forward pass."""
        if self.average is not None:
            return self.chunked(self.average.module, record)
        if self.placeholder or not bool((record["policy_version"] != version).any()):
            return record["behavior_log_prob"].clone()
        return self.chunked(self.policy, record) if scored is None else scored

    def chunked(self, policy: Any, record: TensorDict) -> Tensor:
        """Log-probs ``[B, N]`` of a policy without gradient, a micro-batch at a time."""
        size = self.micro_batch or len(record)
        return torch.cat([policy.log_prob(part).log_prob.detach() for part in record.split(size)])

    def interpolate(self, batch: TensorDictBase, log_prob: Tensor, version: int) -> None:
        """Sets the proximal policy between behavior and current by age, where the correction wants that."""
        if self.provider == "interpolated":
            batch["proximal_log_prob"] = interpolated(
                log_prob, batch["behavior_log_prob"], batch["policy_version"], version
            )

    def update(self, version: int) -> None:
        """After an update, whose number is ``version``: the average and the reference follow where they should."""
        if self.average is not None:
            self.average.update(self.policy)
        every = self.wrapper.sync_every
        if self.reference is not None and every is not None and version % every == 0:
            self.reference.load_state_dict(self.policy.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Weights of the reference and of the moving average; a teacher is read again from its folder."""
        average = self.average
        return {
            "reference": None if self.reference is None else dict(self.reference.state_dict()),
            "average": None
            if average is None
            else {"module": dict(average.module.state_dict()), "weight": average.weight},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        if self.reference is not None:
            self.reference.load_state_dict(state["reference"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"]["module"])
            self.average.weight = state["average"]["weight"]


def _same_inputs(other: Any, policy: Any) -> Any:
    """An older version of a policy, made to standardise observations as the policy does: only its weights are older."""
    if getattr(policy, "normalizer", None) is not None:
        other.normalizer = policy.normalizer
    return other
