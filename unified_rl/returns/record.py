"""Group advantages straight from a record, with every choice a plain value that a configuration can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_type_hints

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.errors import ConfigError, RecordError
from unified_rl.ranges import Name
from unified_rl.returns.groups import group_advantage, stratified_advantage, summed
from unified_rl.returns.tracker import SuccessTracker
from unified_rl.units import row_return

PLAIN = (
    "baseline", "scale", "ddof", "eps", "singleton", "min_spread", "shift", "temperature", "reward_weights", "combine",
)  # fmt: skip
"""Settings that :func:`group_advantage` takes as they are."""

NAMED = ("reward", "group", "weight", "given", "stratum", "blend", "whiten_over")
"""Settings that name entries of the record, and those of strata and whitening."""

CHOICES: dict[str, Any] = {
    "baseline": Literal["mean", "leave_one_out", "max", "none", "weighted", "soft", "given", "tracker"],
    "scale": Literal["none", "std", "batch", "whiten"],
    "combine": Literal["sum_first", "normalize_first"],
    "whiten_over": Literal["rows", "units"],
    **dict.fromkeys(("reward", "group", "weight", "given", "stratum"), Name),
}
"""Types of the settings that are names; those of the numbers are :func:`group_advantage`'s."""


def setting_types() -> dict[str, Any]:
    """What may stand in each setting, see :func:`unified_rl.instantiate.check_type`."""
    hints = {**get_type_hints(stratified_advantage, include_extras=True)}
    hints |= get_type_hints(group_advantage, include_extras=True)
    return {key: CHOICES.get(key, hints.get(key, Any)) for key in (*PLAIN, *NAMED)}


def record_advantage(
    record: TensorDictBase, settings: Mapping[str, Any], tracker: SuccessTracker | None = None
) -> Tensor:
    """The advantage of every row against its group, ``[B]``, detached.

    Args:
        record: batch size ``[B]`` with ``mask [B, N]``, ``reward [B, T]``, ``group [B]``, and what the settings name.
        settings: those of :func:`group_advantage` (:data:`PLAIN`), and

            * ``reward``: an entry ``[B]`` or ``[B, K]`` (K rewards) instead of the summed ``reward``;
            * ``group``: an entry ``[B]`` int64 instead of ``group``, for example a compound of role and turn;
            * ``baseline: weighted`` with ``weight``: ``units`` (each row's number of units, OPO; the default) or an
              entry ``[B]``, for example squared score norms;
            * ``baseline: given`` with ``given``: an entry ``[B]``, for example the reward of a greedy answer;
            * ``baseline: tracker``: the tracked success rate of the row's ``prompt_id``, and no group (SPO); K rewards
              are summed first;
            * ``stratum``: an entry ``[B]`` int64, and ``blend``: strata within groups (Stratified GRPO);
            * ``whiten_over``: ``rows`` (the default) or ``units``, for ``scale`` of ``batch`` and ``whiten``.
        tracker: for ``baseline: tracker``; update it with :func:`compared_reward` after this call.

    Raises:
        ConfigError: an unknown setting, or ones that contradict each other.
        RecordError: the record lacks an entry that is named.
    """
    for key in settings:
        if key not in (*PLAIN, *NAMED):
            raise ConfigError(f"the advantage has no setting {key!r}; known: {', '.join((*PLAIN, *NAMED))}")
    plain: dict[str, Any] = {key: value for key, value in settings.items() if key in PLAIN}
    reward, group = _reward(record, settings), _entry(record, settings.get("group", "group"))
    if "stratum" in settings:
        return _stratified(record, reward, group, settings)
    baseline, units = settings.get("baseline", "mean"), record["mask"].sum(-1)
    if baseline == "tracker":
        if tracker is None:
            raise ConfigError("baseline=tracker needs a SuccessTracker; use baseline=mean where none is kept")
        if settings.get("combine", "sum_first") != "sum_first":
            raise ConfigError("correction.advantage.baseline=tracker counts one reward a row: leave combine out")
        plain["baseline"], plain["given"] = "given", tracker.value(_entry(record, "prompt_id"))
        group = torch.zeros_like(group)
    elif baseline == "given":
        plain["given"] = _entry(record, settings.get("given", "given"))
    elif baseline == "weighted":
        name = settings.get("weight", "units")
        plain["weight"] = units if name == "units" else _entry(record, name)
    over = settings.get("whiten_over", "rows")
    if over not in ("rows", "units"):
        raise ConfigError(f"whiten_over must be rows or units, got {over!r}")
    return group_advantage(reward, group, units=units if over == "units" else None, **plain)


def compared_reward(record: TensorDictBase, settings: Mapping[str, Any]) -> Tensor:
    """What a tracker compares and counts: the reward that the settings name, K of them summed, ``[B]``."""
    return summed(_reward(record, settings), record["group"], settings.get("reward_weights"))


def _reward(record: TensorDictBase, settings: Mapping[str, Any]) -> Tensor:
    """The named rewards, or each row's summed ``reward`` over valid steps."""
    return _entry(record, settings["reward"]) if "reward" in settings else row_return(record)


def _stratified(record: TensorDictBase, reward: Tensor, group: Tensor, settings: Mapping[str, Any]) -> Tensor:
    takes = {"stratum", "blend", "scale", "ddof", "reward", "group", "baseline"}
    if set(settings) - takes or settings.get("baseline", "mean") != "mean":
        raise ConfigError("stratum goes with baseline=mean and the settings blend, scale and ddof alone")
    chosen = {key: settings[key] for key in ("blend", "scale", "ddof") if key in settings}
    return stratified_advantage(reward, group, _entry(record, settings["stratum"]), **chosen)


def _entry(record: TensorDictBase, name: str) -> Tensor:
    value: Tensor | None = record.get(name, None)
    if value is None:
        held = ", ".join(sorted(map(str, record.keys())))
        raise RecordError(f"the advantage is set to use {name!r}, which the record lacks; it holds {held}")
    return value
