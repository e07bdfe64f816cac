"""How the lab treats a preset: which advantage it gets, whether its mean is an exact sum, what its bias is for."""

from __future__ import annotations

from dataclasses import dataclass

from unified_rl.correction import Correction, load_correction
from unified_rl.correction.requirements import looks_at_batch

ROW, GROUP, SAMPLED_GROUP, SAMPLED_BATCH = "exact", "exact over groups", "sampled groups", "sampled batches"
"""Routes: by summing over trajectories, over groups of them too, or by seeded Monte Carlo over groups or batches."""

OUTSIDE = {
    "project_categorical": "it projects the policy's whole distribution in the forward pass; its loss alone is plain "
    "importance sampling",
    "layer_noise": "it perturbs the layers of a network, and these policies have none",
}
"""Wrappers without which nothing of the method is left, and why the lab has none."""

GROUPWISE_BASELINES = ("mean", "leave_one_out", "max", "none", "soft")


@dataclass(frozen=True)
class Plan:
    """How one preset is treated.

    Attributes:
        name: the preset.
        correction: it.
        advantage: ``group`` (rewards against their group), ``critic`` (the true Q - V), ``reward`` (each unit's own) or
            ``own`` (the kernel computes it).
        route: one of ROW, GROUP, SAMPLED_GROUP and SAMPLED_BATCH.
        intent: ``trust region``, ``regulariser`` or ``other objective`` where the bias is wanted, else empty.
        note: what the lab leaves out.
        reason: why it is not applicable; empty where it is.
    """

    name: str
    correction: Correction
    advantage: str
    route: str
    intent: str
    note: str = ""
    reason: str = ""


def make_plan(name: str, advantage: str, *, binary: bool) -> Plan:
    """The plan of a preset.

    Args:
        name: of the preset.
        advantage: ``group`` or ``critic``.
        binary: whether the problem's returns are 0 or 1.

    Raises:
        ConfigError: an unknown preset (names the nearest).
    """
    correction = load_correction(name)
    wrapper = correction.wrapper.get("name")
    mine = _advantage(correction, advantage)
    note = _note(correction, mine, wrapper)
    reason = OUTSIDE.get(str(wrapper), "")
    if correction.kernel.traits.binary_rewards and not binary:
        reason = "it splits answers into right and wrong and needs rewards of 0 or 1"
    return Plan(name, correction, mine, _route(correction, mine, binary), _intent(correction), note, reason)


def _note(correction: Correction, advantage: str, wrapper: str | None) -> str:
    """What differs from the method as published, or from the setting."""
    notes = {
        f"its loss alone: {wrapper} acts outside it": wrapper is not None,
        "no demonstrations here: its rule for the policy's own rows": correction.kernel.traits.demonstrations
        is not None,
        "its reference follows the policy: here it is the proximal policy": follows_policy(correction),
        "it computes its own advantage": advantage == "own",
        "each unit's reward is its advantage": advantage == "reward",
    }
    return "; ".join(note for note, holds in notes.items() if holds)


def follows_policy(correction: Correction) -> bool:
    """Whether the correction's reference is no fixed policy but one that is synced with the current."""
    return correction.anchor == "reference" and correction.kernel.traits.purpose != "regulariser"


def _advantage(correction: Correction, asked: str) -> str:
    if correction.kernel.traits.own_advantage:
        return "own"
    if correction.attached and correction.level_name == "prefix":
        return "reward"
    return asked


def _route(correction: Correction, advantage: str, binary: bool) -> str:
    if looks_at_batch(correction):
        return SAMPLED_BATCH
    traits = correction.kernel.traits
    if correction.thin_name is not None or (traits.groups is not None and not traits.binary_rewards):
        return SAMPLED_GROUP
    if traits.groups is not None:
        return GROUP
    if advantage != "group":
        return ROW
    settings = correction.advantage
    if settings.get("scale", "none") in ("batch", "whiten"):
        return SAMPLED_BATCH
    groupwise = settings.get("baseline", "mean") in GROUPWISE_BASELINES
    return GROUP if groupwise and binary else SAMPLED_GROUP


def _intent(correction: Correction) -> str:
    """What the bias is for: bounding the step, another objective, or nothing."""
    if correction.rules.reject or correction.pre_name is not None:
        return "trust region"
    return correction.kernel.traits.purpose or ("regulariser" if correction.penalties else "")
