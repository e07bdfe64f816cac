"""The kernels by name, and what is known about each."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from unified_rl.correction.kernels import batch as batch_kernels
from unified_rl.correction.kernels import group as regression
from unified_rl.correction.kernels import unit as kernels

KERNELS: dict[str, Callable[..., Tensor]] = {
    "one": kernels.one,
    "is": kernels.importance,
    "ppo": kernels.ppo,
    "clamp": kernels.clamp,
    "band": kernels.band,
    "ring": kernels.ring,
    "sign_clamp": kernels.sign_clamp,
    "taper": kernels.taper,
    "gate": kernels.gate,
    "gamma": kernels.gamma,
    "tv_mask": kernels.tv_mask,
    "kl_mask": kernels.kl_mask,
    "log_clip": kernels.log_clip,
    "exp_advantage": kernels.exp_advantage,
    "shape": kernels.shape,
    "demonstration_shape": kernels.demonstration_shape,
    "centered_ppo": kernels.centered_ppo,
    "ess_cap": batch_kernels.ess_cap,
    "ess_cap_mixed": batch_kernels.ess_cap_mixed,
    "m2_mask": batch_kernels.m2_mask,
    "searched_ppo": batch_kernels.searched_ppo,
    "clip_cov": batch_kernels.clip_cov,
    "spared_ppo": batch_kernels.spared_ppo,
    "residual": regression.residual,
    "likelihood_pair": regression.likelihood_pair,
    "teacher_ppo": regression.teacher_ppo,
}
"""``kernel(view, *, settings) -> g [B, N]``."""

PREPARES: dict[str, Callable[..., dict[str, Tensor]]] = {
    "ess_cap": batch_kernels.ess_cap_prepare,
    "ess_cap_mixed": batch_kernels.ess_cap_mixed_prepare,
    "m2_mask": batch_kernels.m2_mask_prepare,
    "searched_ppo": batch_kernels.searched_ppo_prepare,
    "clip_cov": batch_kernels.clip_cov_prepare,
    "spared_ppo": batch_kernels.spared_ppo_prepare,
    "residual": regression.residual_prepare,
    "likelihood_pair": regression.likelihood_pair_prepare,
    "teacher_ppo": regression.teacher_ppo_prepare,
}
"""Companions that see the whole batch: ``prepare(view, total, *, same settings) -> statistics``."""

RATIO_FREE = {"one", "exp_advantage", "residual"}
"""Kernels without a ratio: with them a mismatch weight to the behavior policy counts nothing twice."""

TRUNCATING = {"ppo", "clamp", "band", "ring", "sign_clamp", "tv_mask", "kl_mask", "log_clip", "centered_ppo"} | {
    "ess_cap",
    "m2_mask",
    "searched_ppo",
    "clip_cov",
    "spared_ppo",
    "teacher_ppo",
}
"""Kernels that follow the ratio until a bound: there ``g != ratio`` means clipped; elsewhere only ``g == 0`` does."""

OWN_ADVANTAGE = {"residual", "likelihood_pair", "teacher_ppo"}
"""Kernels that compute the advantage themselves; the batch need not hold one."""

EXTRA_ANCHORS = {
    "centered_ppo": ("proximal",),
    "ess_cap_mixed": ("behavior", "proximal"),
    "spared_ppo": ("proxy",),
    "teacher_ppo": ("teacher", "reference"),
}
"""Log-probs a kernel reads beside its anchor's."""

NEEDS_PROBABILITIES = {
    "tv_mask": "ppo",
    "kl_mask": "ppo",
    "spared_ppo": "ppo",
    "demonstration_shape": "ppo",
    "shape": "importance_sampling",
}
"""Kernels that are only defined for probabilities of discrete units, and the nearest preset for densities."""
