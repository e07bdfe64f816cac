"""Learned baselines: a value for every environment step (control) or every token (language), one interface."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from unified_rl.objectives import value_loss
from unified_rl.policies.critics import ValueCritic
from unified_rl.policies.token_critic import TokenCritic
from unified_rl.returns import gae, vtrace
from unified_rl.units import Steps


class StateBaseline:
    """``V(s)`` per environment step; the true successor is bootstrapped at truncations."""

    mask_key = "step_mask"

    def __init__(self, policy: Any, hidden: tuple[int, ...], seed: int) -> None:
        normalize = getattr(policy, "normalizer", None) is not None
        self.module = ValueCritic(policy.observation_dim, hidden, normalize_observation=normalize, seed=seed)

    def values(self, record: TensorDictBase) -> tuple[Tensor, Tensor]:
        """``[B, T]`` values, with gradient, and the mask of steps that count."""
        return self.module(record["observation"]), record["step_mask"]

    def scan_inputs(self, record: TensorDictBase) -> dict[str, Tensor]:
        """Arguments of :func:`~unified_rl.returns.gae` per step, ``[B, T]``; the log-ratio where it is known."""
        inputs = {
            "reward": record["reward"],
            "value": self.module(record["observation"]),
            "next_value": self.module(record["next_observation"]),
            "terminated": record["terminated"],
            "done": record["terminated"] | record["truncated"] | _episode_ends(record),
            "gamma": record["discount"],
            "mask": record["step_mask"],
        }
        if "proximal_log_prob" in record.keys():
            inputs["log_ratio"] = Steps.of(record).sum(record["proximal_log_prob"] - record["behavior_log_prob"])
        return inputs


class TokenBaseline:
    """A value per token: the discount is 1 inside a turn, and a turn's reward falls on its last token.

    An answer cut by its budget bootstraps from the value before its last token ("Truncated Proximal Policy
    Optimization", arXiv:2506.15050).
    """

    mask_key = "mask"

    def __init__(self, policy: Any, config: dict[str, Any] | None, seed: int) -> None:
        trunk = {"trunk": policy} if config is None else {"config": config}
        self.module = TokenCritic(policy.tokenizer, policy.max_length, **trunk, seed=seed)

    def values(self, record: TensorDictBase) -> tuple[Tensor, Tensor]:
        """``[B, N]`` values, with gradient, and the mask of sampled tokens."""
        return self.module.values(record), record["mask"]

    def scan_inputs(self, record: TensorDictBase) -> dict[str, Tensor]:
        """Arguments of :func:`~unified_rl.returns.gae` per token, ``[B, N]``; the log-ratio where it is known."""
        mask, value = record["mask"], self.module.values(record)
        column = torch.arange(mask.shape[1], device=mask.device)
        last = last_units(record)
        said = last >= 0
        place = last.clamp(min=0)
        zeros = torch.zeros_like(value)
        reward = zeros.scatter_add(1, place, torch.where(said, record["reward"], 0.0))
        discount = torch.where(said, record["discount"], 1.0)
        gamma = torch.ones_like(value).scatter_reduce(1, place, discount, "prod")
        end = (column == last.amax(-1, keepdim=True)) & mask
        over = (record["terminated"] & said).any(-1, keepdim=True)
        following = torch.cat([value[:, 1:], value[:, -1:]], 1)
        inputs = {
            "reward": reward,
            "value": value,
            "next_value": torch.where(end, value, following),
            "terminated": end & over,
            "done": end,
            "gamma": gamma,
            "mask": mask,
        }
        if "proximal_log_prob" in record.keys():
            inputs["log_ratio"] = record["proximal_log_prob"] - record["behavior_log_prob"]
        return inputs


Baseline: TypeAlias = StateBaseline | TokenBaseline


def last_units(record: TensorDictBase) -> Tensor:
    """Column of the last masked-in unit of every step, ``[B, T]``; -1 where a step has none."""
    mask = record["mask"]
    column = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    place = torch.where(mask, column, -1)
    empty = torch.full(record["reward"].shape, -1, dtype=torch.int64, device=mask.device)
    return empty.scatter_reduce(1, record["step_index"], place, "amax")


def critic_advantage(record: TensorDict, baseline: Baseline, lam: float, off_policy: bool, normalize: bool) -> None:
    """Writes ``advantage``, ``value_target`` and ``value`` into the record, by GAE or (``off_policy``) V-trace.

    Shapes are the baseline's: ``[B, T]`` for steps, ``[B, N]`` for tokens.
    """
    scan: dict[str, Any] = dict(baseline.scan_inputs(record))
    log_ratio = scan.pop("log_ratio", None)
    if off_policy:
        assert log_ratio is not None
        advantage, target = vtrace(log_ratio=log_ratio, lam=lam, **scan)
    else:
        advantage, target = gae(lam=lam, **scan)
    record["advantage"] = standardise(advantage, scan["mask"]) if normalize else advantage
    record["value_target"], record["value"] = target, scan["value"]


def regression_loss(baseline: Baseline, part: TensorDictBase, clip: float | None) -> Tensor:
    """The value loss of a (micro-)batch that :func:`critic_advantage` has annotated."""
    value, mask = baseline.values(part)
    return value_loss(value, part["value_target"], mask, part["value"], clip)


def standardise(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` with mean 0 and standard deviation 1 over masked-in entries."""
    kept = x[mask]
    if kept.numel() < 2:
        return x
    return (x - kept.mean()) / (kept.std() + 1e-8)


def _episode_ends(record: TensorDictBase) -> Tensor:
    """Steps ``[B, T]`` after which the row goes on with another episode."""
    episode = record["episode"]
    ends = torch.zeros_like(episode, dtype=torch.bool)
    ends[:, :-1] = episode[:, 1:] != episode[:, :-1]
    return ends
