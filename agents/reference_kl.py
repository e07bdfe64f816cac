"""The KL divergence to a reference policy as one setting: in the loss, or taken from the rewards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.correction import Correction
from unified_rl.correction.penalties.penalty import PENALTIES
from unified_rl.correction.view import difference, safe
from unified_rl.errors import ConfigError
from unified_rl.objectives.terms import OWN_ROWS
from unified_rl.units import Steps


class ReferenceKl:
    """``coefficient`` times an estimate of KL(policy || reference) a unit.

    In the loss it is a penalty of the correction and follows the present weights. In the reward it is of the policy
    that sampled, so only rows whose sampler is known have it; a token critic's tokens are rewarded one by one,
    everybody else's units step by step. On fresh samples k1 in the reward and k2 in the loss have the gradient of the
    KL; k3 in the loss, GRPO's choice, has it to first order; the gradient of k1 in the loss is 0 on average. John
    Schulman, "Approximating KL Divergence"; "Rethinking KL Regularization in RLHF", arXiv:2510.01555.

    Args:
        coefficient: 0 switches it off.
        place: ``loss`` or ``reward``; None is loss.
        estimator: ``k1``, ``k2`` or ``k3``; None is k3 in the loss and k1 in the reward.

    Raises:
        ConfigError: a place or an estimator without a coefficient.
    """

    def __init__(self, coefficient: float, place: str | None = None, estimator: str | None = None) -> None:
        for key, value in (("kl_in", place), ("kl_estimator", estimator)):
            if value is not None and not coefficient:
                raise ConfigError(
                    f"agent.{key}={value} is about the KL to the reference, whose weight is 0: set agent.kl"
                )
        self.coefficient = coefficient
        self.rewarded = bool(coefficient) and place == "reward"
        self.name = estimator or ("k1" if self.rewarded else "k3")

    @property
    def anchors(self) -> dict[str, str]:
        """Policies whose log-probs the rows must hold, and the setting that asks."""
        return {"reference": "agent.kl"} if self.coefficient else {}

    def in_loss(self, correction: Correction) -> Correction:
        """The correction with the penalty, where it stands in the loss.

        Raises:
            ConfigError: the correction penalises the distance to the reference itself, or anneals its penalties.
        """
        if not self.coefficient:
            return correction
        if any(penalty.anchor == "reference" for penalty in correction.penalties):
            raise ConfigError(
                f"agent.kl={self.coefficient} and a penalty of correction {correction.name} are both about the "
                "reference: set agent.kl=0, or correction.penalty=null"
            )
        if self.rewarded and correction.advantage.get("reward") is not None:
            raise ConfigError(
                f"agent.kl_in=reward changes the rewards, and correction.advantage.reward="
                f"{correction.advantage['reward']} reads columns instead of them: set agent.kl_in=loss"
            )
        if self.rewarded:
            return correction
        if correction.wrapper.get("name") == "anneal_penalty":
            raise ConfigError(
                f"correction {correction.name} anneals every penalty, that of agent.kl={self.coefficient} too: set "
                "agent.kl_in=reward"
            )
        return correction.with_penalty(
            {"name": self.name, "anchor": "reference", "coefficient": float(self.coefficient)}
        )

    def __call__(self, record: TensorDict, metrics: dict[str, Any], tokens: bool) -> None:
        """Reports the estimate a unit, ``kl/reference``, and takes it from the rewards where it stands there.

        Args:
            record: holds ``reference_log_prob``.
            metrics: of the update.
            tokens: write ``unit_reward [B, N]`` for a critic of tokens, instead of changing ``reward [B, T]``.
        """
        if not self.coefficient:
            return
        known = record["mask"] & OWN_ROWS.of_record(record).unsqueeze(-1)
        x, known = safe(difference(record["behavior_log_prob"], record["reference_log_prob"]), known)
        kl = torch.where(known, PENALTIES[self.name](x)[0], 0.0)
        metrics["kl/reference"] = kl.sum() / known.sum().clamp(min=1)
        if not self.rewarded:
            return
        taken: Tensor = -self.coefficient * kl
        if tokens:
            record["unit_reward"] = taken
        else:
            record["reward"] = record["reward"] + Steps.of(record).sum(taken)


def check_kl(settings: Mapping[str, Any]) -> None:
    """Refuses a place or an estimator of a KL that is switched off, when a run is composed."""
    ReferenceKl(settings.get("kl") or 0.0, settings.get("kl_in"), settings.get("kl_estimator"))
