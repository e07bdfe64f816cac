"""What methods do outside their loss: around the optimiser step, on whole distributions, with a run's progress."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from unified_rl.correction import Correction
from unified_rl.correction.lookup import bind
from unified_rl.interventions.base import Wrapper
from unified_rl.interventions.fix_up import FixUp
from unified_rl.interventions.noise import LayerNoise
from unified_rl.interventions.projection import ProjectCategorical
from unified_rl.interventions.proxy import MinPProxy
from unified_rl.interventions.schedule import AnnealLevel, AnnealPenalty, SyncReference
from unified_rl.interventions.steps import ClipBiasScale, EssLearningRate, Reposition, SnrLearningRate
from unified_rl.protocols import Trainable

__all__ = ["WRAPPERS", "Wrapper", "make_wrapper", "wrapper_class"]

WRAPPERS: dict[str, type[Wrapper]] = {
    "anneal_level": AnnealLevel,
    "anneal_penalty": AnnealPenalty,
    "clip_bias_scale": ClipBiasScale,
    "ess_learning_rate": EssLearningRate,
    "fix_up": FixUp,
    "layer_noise": LayerNoise,
    "min_p_proxy": MinPProxy,
    "project_categorical": ProjectCategorical,
    "reposition": Reposition,
    "snr_learning_rate": SnrLearningRate,
    "sync_reference": SyncReference,
}
"""By the name that a preset's ``wrapper`` node gives; its other entries are the constructor's keyword arguments."""


def make_wrapper(policy: Trainable, correction: Correction) -> Wrapper:
    """The wrapper that a correction asks for; one that does nothing where it asks for none of :data:`WRAPPERS`.

    Raises:
        ConfigError: a setting that the wrapper does not have, or a policy that it cannot work on.
    """
    made = wrapper_class(correction.wrapper)
    return Wrapper(policy, correction) if made is None else made(policy, correction)


def wrapper_class(node: Mapping[str, Any]) -> Callable[..., Wrapper] | None:
    """The class that a correction's ``wrapper`` node names, settings bound; None where nothing here acts on it.

    Raises:
        ConfigError: a setting that the wrapper does not have, or of the wrong type.
    """
    name = str(node.get("name"))  # further names are credits, which the agent acts on
    return bind(node, WRAPPERS, "correction.wrapper")[0] if name in WRAPPERS or "." in name else None
