"""Baselines: learned values of environment steps (control) or tokens (language), and a row's group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from unified_rl.agents.return_scale import ReturnScale, RewardScale
from unified_rl.objectives.rows import Rows
from unified_rl.policies.critics import ValueCritic
from unified_rl.policies.encoder import image_features
from unified_rl.policies.normalizer import RunningNormalizer, seen_by
from unified_rl.policies.token_critic import TokenCritic
from unified_rl.protocols import (
    ControlPolicy,
    KeepsSeen,
    LanguagePolicy,
    Normalizes,
    Trainable,
    is_language,
    layout_of,
    standardises,
)
from unified_rl.returns import SuccessTracker, compared_reward, gae, record_advantage, segment_ends, to_segments, vtrace
from unified_rl.returns.gates import ended
from unified_rl.shard import ALONE, Shard
from unified_rl.units import Steps


class StateBaseline:
    """``V(s)`` per environment step; the true successor is bootstrapped at truncations.

    Attributes:
        shard: of the processes that divide the passes of :meth:`scan_inputs` among them.
    """

    shard: Shard = ALONE

    def __init__(self, policy: ControlPolicy, hidden: tuple[int, ...], seed: int) -> None:
        own = standardises(policy)
        features = image_features(policy)
        self.module = ValueCritic(policy.space, hidden, normalize_observation=own, image_features=features, seed=seed)
        follow_moments(self.module, policy)
        self.rewards: RewardScale | None = None
        self.returns: ReturnScale | None = None

    def scale(self, rewards: bool, returns: bool) -> None:
        """Learns from scaled rewards, and of standardised targets, where that is asked for."""
        self.rewards = RewardScale() if rewards else None
        self.returns = ReturnScale(self.module.output) if returns else None

    def values(self, record: TensorDictBase) -> tuple[Tensor, Tensor]:
        """``[B, T]`` outputs (values, unless returns are scaled), with gradient, and the mask of steps that count."""
        seen = record.get(seen_by(self.module), None)
        values = self.module(record["observation"]) if seen is None else self.module.of_seen(seen)
        return values, record["step_mask"]

    def scan_inputs(self, record: TensorDictBase) -> dict[str, Tensor]:
        """Arguments of :func:`~unified_rl.returns.gae` per step, ``[B, T]``; the log-ratio where it is known."""
        value = self.shard.divided(record, lambda rows: self.module(rows["observation"]))
        after = self.shard.divided(record, lambda rows: self.module(rows["next_observation"]))
        inputs = {
            "reward": record["reward"] if self.rewards is None else self.rewards(record["reward"]),
            "value": value if self.returns is None else self.returns.value(value),
            "next_value": after if self.returns is None else self.returns.value(after),
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

    Attributes:
        shard: of the processes that divide the passes of the scans' inputs among them.
    """

    shard: Shard = ALONE

    def __init__(self, policy: LanguagePolicy, config: dict[str, Any] | None, seed: int, heads: int = 1) -> None:
        trunk = policy if config is None else None
        self.module = TokenCritic(
            policy.tokenizer, policy.max_length, config=config, trunk=trunk, seed=seed, heads=heads
        )
        self.tokenizer = policy.tokenizer

    def values(self, record: TensorDictBase) -> tuple[Tensor, Tensor]:
        """``[B, N]`` values (``[B, N, H]`` of H heads), with gradient, and the mask of sampled tokens."""
        return self.module.values(record), record["mask"]

    def scan_inputs(self, record: TensorDictBase) -> dict[str, Tensor]:
        """Arguments of :func:`~unified_rl.returns.gae` per token, ``[B, N]``; the log-ratio where it is known."""
        inputs = token_scan(record, self.shard.divided(record, self.module.values))
        if "proximal_log_prob" in record.keys():
            inputs["log_ratio"] = record["proximal_log_prob"] - record["behavior_log_prob"]
        return inputs

    def step_scan_inputs(self, record: TensorDictBase) -> dict[str, Tensor]:
        """The same per turn, ``[B, T]``: a turn's value is that of the context in which it begins."""
        turns = record["reward"].shape[1]
        value = self.shard.divided(record, self.module.values)
        _, first, said = to_segments(torch.zeros_like(value), value, record["step_index"], record["mask"], turns)
        last = said & (said.flip(1).cumsum(1).flip(1) == 1)
        inputs = {
            "reward": record["reward"],
            "value": first,
            "next_value": torch.where(last, first, torch.cat([first[:, 1:], first[:, -1:]], 1)),
            "terminated": record["terminated"] & said,
            "done": last,
            "gamma": record["discount"],
            "mask": said,
        }
        if "proximal_log_prob" in record.keys():
            inputs["log_ratio"] = Steps.of(record).sum(record["proximal_log_prob"] - record["behavior_log_prob"])
        return inputs


Baseline: TypeAlias = StateBaseline | TokenBaseline


def make_baseline(
    policy: Trainable, hidden: tuple[int, ...], config: dict[str, Any] | None, seed: int, heads: int = 1
) -> Baseline:
    """A baseline for the domain: over tokens with a critic of that ``config``, or over states with these widths.

    Args:
        policy: of the domain.
        hidden: widths of a critic of states.
        config: of the transformer of a critic of tokens; None shares the policy's.
        seed: of fresh weights.
        heads: values of every token.
    """
    if is_language(policy):
        return TokenBaseline(policy, config, seed, heads)
    return StateBaseline(cast(ControlPolicy, policy), hidden, seed)


def follow_moments(critic: ValueCritic, policy: Trainable) -> None:
    """Gives a new critic the moments of a policy whose own are fixed: those of a clone.

    Others are of the same observations anyway. A critic's own would move, and its values with them, at every update.
    """
    theirs, own = getattr(policy, "normalizer", None), critic.normalizer
    if isinstance(theirs, RunningNormalizer) and isinstance(own, RunningNormalizer) and bool(theirs.frozen):
        own.load_state_dict(theirs.state_dict())


def update_moments(record: TensorDictBase, policy: Trainable, baseline: Baseline | None) -> None:
    """Adds the observations of a control record to the moments that policy and critic standardise them by."""
    seen = record["observation"][record["step_mask"]]
    for module in (policy, baseline.module if baseline is not None else None):
        if isinstance(module, Normalizes):
            module.update_normalizer(seen)


def keep_seen(rows: TensorDictBase, policy: Trainable, baseline: Baseline | None) -> None:
    """Writes into control rows what policy and critic see of their observations through all steps of an update."""
    for module in (policy, baseline.module if baseline is not None else None):
        if isinstance(module, KeepsSeen):
            module.keep_seen(rows)


def last_units(record: TensorDictBase) -> Tensor:
    """Column of the last masked-in unit of every step, ``[B, T]``; -1 where a step has none."""
    mask = record["mask"]
    column = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    place = torch.where(mask, column, -1)
    empty = torch.full(record["reward"].shape, -1, dtype=torch.int64, device=mask.device)
    return empty.scatter_reduce(1, record["step_index"], place, "amax")


def token_scan(record: TensorDictBase, value: Tensor) -> dict[str, Tensor]:
    """Arguments of :func:`~unified_rl.returns.gae` per token, ``[B, N]``, with these values ``[B, N]``."""
    mask = record["mask"]
    column = torch.arange(mask.shape[1], device=mask.device)
    last = last_units(record)
    said = last >= 0
    place = last.clamp(min=0)
    zeros = torch.zeros_like(value)
    reward = zeros.scatter_add(1, place, torch.where(said, record["reward"], 0.0))
    if "unit_reward" in record.keys():
        reward = reward + record["unit_reward"]
    discount = torch.where(said, record["discount"], 1.0)
    gamma = torch.ones_like(value).scatter_reduce(1, place, discount, "prod")
    end = (column == last.amax(-1, keepdim=True)) & mask
    over = (record["terminated"] & said).any(-1, keepdim=True)
    following = torch.cat([value[:, 1:], value[:, -1:]], 1)
    return {
        "reward": reward,
        "value": value,
        "next_value": torch.where(end, value, following),
        "terminated": end & over,
        "done": end,
        "gamma": gamma,
        "mask": mask,
    }


def critic_advantage(record: TensorDict, baseline: Baseline, lam: float, off_policy: bool, normalize: bool) -> None:
    """Writes ``advantage``, ``value_target``, ``value`` and ``value_mask`` by GAE or (``off_policy``) V-trace.

    Shapes are the baseline's: ``[B, T]`` for steps, ``[B, N]`` for tokens.
    """
    scan = baseline.scan_inputs(record)
    record["advantage"], record["value_target"] = _scanned(scan, lam, off_policy, normalize)
    record["value"], record["value_mask"] = scan["value"], scan["mask"]
    if isinstance(baseline, StateBaseline) and baseline.returns is not None:
        baseline.returns.observe(record["value_target"][record["value_mask"]])
        for key in ("value", "value_target"):
            record[key] = baseline.returns.output(record[key])


def step_advantage(record: TensorDict, baseline: Baseline, lam: float, off_policy: bool, normalize: bool) -> None:
    """As :func:`critic_advantage` over whole turns: one advantage a turn, ``[B, T]``, which all its tokens share.

    The value is learnt at the first token of each turn, and standardising counts every turn once. Environment steps are
    steps already. StepPO, 2604.18401.
    """
    if isinstance(baseline, StateBaseline):
        critic_advantage(record, baseline, lam, off_policy, normalize)
        return
    scan = baseline.step_scan_inputs(record)
    record["advantage"], target = _scanned(scan, lam, off_policy, normalize)
    record["value_mask"], _ = segment_ends(record["step_index"], record["mask"], record["reward"].shape[1])
    record["value_target"] = target.gather(1, record["step_index"])
    record["value"] = scan["value"].gather(1, record["step_index"])


def cut_advantage(record: TensorDict, baseline: Baseline, lam: float, off_policy: bool, normalize: bool) -> None:
    """As :func:`critic_advantage`, but the value is learnt from finished answers alone.

    An answer cut by its budget bootstraps from its last value (the token scan always does that), which is no target for
    that value. T-PPO, 2506.15050.
    """
    critic_advantage(record, baseline, lam, off_policy, normalize)
    finished = (record["terminated"] & (last_units(record) >= 0)).any(-1, keepdim=True)
    record["value_mask"] = record["value_mask"] & finished


def _scanned(scan: Mapping[str, Any], lam: float, off_policy: bool, normalize: bool) -> tuple[Tensor, Tensor]:
    """Advantage and value target of scan inputs."""
    inputs = dict(scan)
    log_ratio = inputs.pop("log_ratio", None)
    if off_policy:
        assert log_ratio is not None
        advantage, target = vtrace(log_ratio=log_ratio, lam=lam, **inputs)
    else:
        advantage, target = gae(lam=lam, **inputs)
    return standardise(advantage, scan["mask"]) if normalize else advantage, target


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


class GroupBaseline:
    """Advantages of rows against their groups, as a correction's ``advantage`` settings say.

    Args:
        settings: see :func:`unified_rl.returns.record_advantage`. With ``baseline: tracker`` a
            :class:`~unified_rl.returns.SuccessTracker` takes the place of the group; it forgets by how far a row's
            policy has drifted from its sampler. In a simulation it follows starts (``rollout.starts``), and a row is a
            piece of an episode: only rows in which one ends are compared with it and counted, the others have no
            advantage. ``rows`` says over which rows the statistics are taken.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)
        self.rows = Rows.of(self.settings.pop("rows", None), "correction.advantage.rows")
        self.tracker = SuccessTracker() if self.settings.get("baseline") == "tracker" else None

    def __call__(self, record: TensorDictBase, log_prob: Callable[[], Tensor], weight: Tensor | None) -> Tensor:
        """The same advantage for every step of a row, ``[B, T]``.

        Args:
            record: the rows.
            log_prob: scores them with the present weights, ``[B, N]``; only a tracker asks.
            weight: ``[B]`` of a weighted baseline, in place of the rows' units.
        """
        pieces = self.tracker is not None and layout_of(record) == "control"
        if self.rows.every and not pieces:
            return self._over_all(record, log_prob, weight)
        chosen = self.rows.of_record(record)
        return self._over_some(chosen & ended(record) if pieces else chosen, record, log_prob, weight)

    def _over_some(
        self, chosen: Tensor, record: TensorDictBase, log_prob: Callable[[], Tensor], weight: Tensor | None
    ) -> Tensor:
        """Statistics over the chosen rows ``[B]``; the others have no advantage."""
        advantage = torch.zeros_like(record["reward"])
        if bool(chosen.any()):
            some = None if weight is None else weight[chosen]
            advantage[chosen] = self._over_all(record[chosen], lambda: log_prob()[chosen], some)
        return advantage

    def _over_all(self, record: TensorDictBase, log_prob: Callable[[], Tensor], weight: Tensor | None) -> Tensor:
        settings = self.settings
        if weight is not None and settings.get("baseline") == "weighted":
            record["row_weight"], settings = weight, {**settings, "weight": "row_weight"}
        advantage = record_advantage(record, settings, self.tracker)
        if self.tracker is not None:
            gap = torch.where(record["mask"], log_prob() - record["behavior_log_prob"], 0.0).abs()
            drift = gap.sum(-1) / record["mask"].sum(-1).clamp(min=1)
            self.tracker.update(record["prompt_id"], compared_reward(record, settings), drift)
        return advantage[:, None].expand_as(record["reward"]).contiguous()

    def state_dict(self) -> dict[str, Any]:
        """The tracker's counts, if any."""
        return {} if self.tracker is None else self.tracker.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        if self.tracker is not None:
            self.tracker.load_state_dict(state)
