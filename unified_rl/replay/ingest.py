"""What TorchRL's collectors write, in the layout of a transition."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.errors import RecordError

_LOG_PROBS = ("behavior_log_prob", "action_log_prob", "sample_log_prob")
_RENAMED = {*_LOG_PROBS, "policy_version", "reward", "done", "terminated", "truncated"}


def from_collector(
    batch: TensorDictBase, *, discount: float = 0.99, observation_key: str = "observation"
) -> dict[str, Tensor]:
    """Maps a collector's batch to transition keys; time stays where it is.

    Root keys that the step also rewrites (other observations, step counts) are dropped; root keys that it does not
    (the action and what the policy needs to score it again) are kept.

    Args:
        batch: batch size ``[...]`` with ``next`` nested below it, as TorchRL lays it out.
        discount: written to the key ``discount``; a collector does not know it.
        observation_key: name of the observation.

    Returns:
        Leaves ``[..., *]``: float64 stays float64. ``policy_version`` is the one under ``next``, which names the
        weights that acted (the root key lags one step); 0 where the collector tracks none.

    Raises:
        RecordError: if observation, reward or flags are missing, or only the late root ``policy_version`` is there.
    """
    following = batch.get("next", None)
    if following is None:
        raise RecordError("a collector's batch holds the step's outcome under 'next', and this one has no such key")
    for owner, key in ((batch, observation_key), (following, observation_key), (following, "reward")):
        if key not in owner.keys():
            raise RecordError(f"the collector's batch lacks {key!r}" + (" under 'next'" if owner is following else ""))
    lead = batch.batch_size
    out = {key: value for key, value in batch.items() if _own(key, value, following)}
    out["observation"], out["next_observation"] = batch[observation_key], following[observation_key]
    out["reward"] = following["reward"].reshape(lead)
    out["terminated"], out["truncated"] = _flags(following, lead)
    out["discount"] = torch.full_like(out["reward"], discount)
    zeros = torch.zeros(lead, dtype=torch.int64, device=out["reward"].device)
    out["policy_version"] = _version(batch, following, zeros)
    episode = batch.get(("collector", "traj_ids"), None)
    out["episode"] = zeros if episode is None else episode.reshape(lead).to(torch.int64)
    out["group"], out["source"] = out["episode"].clone(), zeros.clone()
    for key in _LOG_PROBS:
        if key in batch.keys():
            out["behavior_log_prob"] = batch[key].reshape(*lead, -1)
            break
    return out


def _own(key: str, value: object, following: TensorDictBase) -> bool:
    return isinstance(value, Tensor) and key not in following.keys() and key not in _RENAMED


def _flags(following: TensorDictBase, lead: torch.Size) -> tuple[Tensor, Tensor]:
    held = {key: following[key].reshape(lead) for key in ("done", "terminated", "truncated") if key in following.keys()}
    if "terminated" not in held:
        raise RecordError("the collector's batch lacks 'terminated' under 'next'; a bare 'done' cannot be bootstrapped")
    terminated = held["terminated"]
    if "truncated" in held:
        return terminated, held["truncated"]
    return terminated, held.get("done", terminated) & ~terminated


def _version(batch: TensorDictBase, following: TensorDictBase, zeros: Tensor) -> Tensor:
    if "policy_version" in following.keys():
        out: Tensor = following["policy_version"].reshape(zeros.shape).to(torch.int64)
        return out
    if "policy_version" in batch.keys():
        raise RecordError(
            "policy_version is at the batch's root only, where it lags one step; append torchrl's PolicyVersion to the "
            "environment's transforms so that it stands under 'next' too"
        )
    return zeros
