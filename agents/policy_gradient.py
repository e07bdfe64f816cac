"""Policy gradient for any policy that has log-probabilities, in either domain, from fresh or replayed rows.

PPO, GRPO, DAPO, V-trace actor-critics and their relatives are this agent with another correction, baseline and replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from unified_rl.agents.advantage_source import CREDIT_OF, check_groups, choose_credit
from unified_rl.agents.anchors import PROVIDERS, Anchors
from unified_rl.agents.baselines import Baseline, GroupBaseline, make_baseline
from unified_rl.agents.estimate import CriticAdvantage, Estimate
from unified_rl.agents.loss import anchors_of, make_term, term_nodes
from unified_rl.correction import Correction
from unified_rl.correction.requirements import needs_whole_rows
from unified_rl.errors import ConfigError
from unified_rl.interventions import WRAPPERS, make_wrapper
from unified_rl.objectives.objective import Objective
from unified_rl.objectives.rows import Rows
from unified_rl.optimizer import Optimizer
from unified_rl.replay import Replay
from unified_rl.replay.fit import check_replay
from unified_rl.training.metrics import Means
from unified_rl.units import record_from_steps, split_episodes, split_steps, trim_units, validate_record

OWN_ROWS = Rows("own")
SCANNED_ONLY = ("next_observation", "terminated", "truncated", "discount", "episode", "index")
"""Keys that advantages needed and optimiser steps do not: minibatches leave them out."""


class PolicyGradient:
    """One update: draw rows, compute advantages, then epochs of minibatches through the correction.

    Args:
        policy: any policy.
        correction: what multiplies the score function (see :mod:`unified_rl.correction`).
        generator: stream of the minibatch order.
        rows: rows of one update (by default what one collection yields).
        length: steps of a control row (the rollout's horizon); None for language.
        lr: learning rate of policy and critic.
        epochs: passes over the rows of an update.
        minibatch: rows (or steps, see ``shuffle_steps``) of one optimiser step; None takes all.
        micro_batch: rows of one forward pass; gradients accumulate to the same gradient.
        advantage: ``critic`` (GAE, or V-trace with ``off_policy_targets``), ``group`` (the return against its
            group), or ``auto``: critic for control, group for language unless the correction wants a critic.
        credit: what a critic's advantage is for: ``unit``, ``step`` (one for all tokens of a turn) or ``cut`` (units,
            the value learnt from finished answers alone); None is what the correction wants, else ``unit``.
        teacher: folder of the policy to learn from (a run of this library, or a language model), for corrections that
            use one.
        gamma: discount of a step; None is 0.99 for control and 1 for language.
        lam: trace parameter of GAE and V-trace.
        off_policy_targets: value targets and advantages by V-trace from the current policy's ratios.
        value_coef: weight of the value loss.
        value_clip: bound of the value's move, see :func:`unified_rl.objectives.value_loss`.
        critic_hidden: widths of the value network (control).
        critic_config: model configuration of the token critic's own transformer (language); None puts a linear head
            on the policy's own features.
        entropy_coef: weight of the policy's entropy; needs a policy with ``entropy``.
        normalize_advantage: standardise advantages over the rows of an update.
        drop_equal_groups: leave out rows of groups whose rewards are all equal (DAPO's filter; they have no
            gradient, but they count in the denominators unless dropped).
        max_grad_norm: bound of the gradient norm.
        target_kl: stop the epochs of an update where the KL estimate k3 to the behaviour policy exceeds this.
        anneal_lr: decay the learning rate linearly to 0 over the run.
        shuffle_steps: minibatches of single steps instead of whole rows; None does so for control where the
            correction's level allows it.
        adam_eps: Adam's denominator offset.
        weight_decay: decoupled weight decay.
        device: where updates run.
        compile: compile the policy's scoring function with ``torch.compile``.
        cuda_graph: compile it so that its forward and backward passes are replayed from CUDA graphs (mode
            ``reduce-overhead``); needs a CUDA device, and minibatches of one size to be of use.
        objectives: terms of the loss by name, beside or instead of ``policy``, ``value`` and ``entropy``; null takes
            one out. See :data:`unified_rl.agents.loss.TERMS`.
        maps: of the advantages, in order, see :data:`unified_rl.returns.maps.MAPS`.
        gates: bool columns by name, see :data:`unified_rl.returns.gates.GATES`, for the ``rows`` of terms.

    Raises:
        ConfigError: settings that do not fit the policy.
    """

    def __init__(
        self,
        policy: Any,
        correction: Correction,
        generator: torch.Generator,
        rows: int,
        length: int | None = None,
        lr: float = 3e-4,
        epochs: int = 1,
        minibatch: int | None = None,
        micro_batch: int | None = None,
        advantage: str = "auto",
        credit: str | None = None,
        teacher: str | None = None,
        gamma: float | None = None,
        lam: float = 0.95,
        off_policy_targets: bool = False,
        value_coef: float = 0.5,
        value_clip: float | None = None,
        critic_hidden: tuple[int, ...] = (64, 64),
        critic_config: dict[str, Any] | None = None,
        entropy_coef: float = 0.0,
        normalize_advantage: bool | None = None,
        drop_equal_groups: bool = False,
        max_grad_norm: float | None = 1.0,
        target_kl: float | None = None,
        anneal_lr: bool = False,
        shuffle_steps: bool | None = None,
        adam_eps: float = 1e-8,
        weight_decay: float = 0.0,
        device: str = "cpu",
        compile: bool = False,
        cuda_graph: bool = False,
        objectives: dict[str, Any] | None = None,
        gates: dict[str, Any] | None = None,
        maps: list[str | dict[str, Any]] | None = None,
        seed: int = 0,
    ) -> None:
        self.language = hasattr(policy, "generate")
        self.discrete = self.language or getattr(policy, "supports_discrete", False)
        correction.check_domain(discrete=self.discrete)
        correction.require_support(wrappers=[*WRAPPERS, *CREDIT_OF], providers=PROVIDERS)
        self.use_critic, self.credit = choose_credit(correction, advantage, credit, language=self.language)
        self.policy, self.correction, self.generator = policy, correction, generator
        if not self.language:
            policy.end_pretraining()
        self.rows, self.length = rows, length
        self.epochs, self.minibatch, self.micro_batch = epochs, minibatch, micro_batch
        self.gamma = gamma if gamma is not None else (1.0 if self.language else 0.99)
        self.entropy_coef = entropy_coef
        whiten = self.use_critic and bool(correction.wrapper.get("whiten", True))
        self.normalize_advantage = whiten if normalize_advantage is None else normalize_advantage
        self.target_kl = target_kl
        self.lr, self.anneal_lr = lr, anneal_lr
        self.wrapper = make_wrapper(policy, correction)
        self.shuffle_steps = self._may_split() if shuffle_steps is None else shuffle_steps
        self._refuse(compiled=compile or cuda_graph)
        self.device = torch.device(device)
        self.baseline: Baseline | None = None
        modules: dict[str, nn.Module] = {"policy": policy}
        if self.use_critic:
            self.baseline = make_baseline(policy, self.language, critic_hidden, critic_config, seed)
            modules["critic"] = self.baseline.module.to(self.device)
        self.optimizer = Optimizer(
            modules,
            lr,
            weight_decay=weight_decay,
            eps=adam_eps,
            max_grad_norm=max_grad_norm,
            extra=self.wrapper.modules(),
        )
        self.wrapper.attach(self.optimizer)
        nodes = term_nodes(objectives, value_coef if self.use_critic else None, value_clip, entropy_coef)
        wanted = anchors_of(nodes)
        self.anchors = Anchors(policy, correction, self.wrapper, teacher, micro_batch, off_policy_targets, *wanted)
        self._score = _scoring(policy, compile, cuda_graph, self.device)
        terms = {name: make_term(name, node, self) for name, node in nodes.items()}
        score = lambda rows: self.wrapper.score(rows, self._plain)  # noqa: E731
        self.objective = Objective(policy, terms, score, generator)
        groups = GroupBaseline(correction.advantage)
        source: Any = groups
        if self.baseline is not None:
            source = CriticAdvantage(self.baseline, self.credit, lam, off_policy_targets, self.normalize_advantage)
        drop = drop_equal_groups and not self.use_critic
        self.estimate = Estimate(policy, self.anchors, self.wrapper, self.objective, source, drop, gates, maps)
        self.version = 0
        self.checked = False

    def _refuse(self, *, compiled: bool) -> None:
        """Raises ConfigError for settings that contradict the correction or the policy."""
        name, policy = self.correction.name, self.policy
        if self.shuffle_steps and not self._may_split():
            level = self.correction.level_name
            raise ConfigError(f"agent.shuffle_steps cuts rows that correction {name} (level {level!r}) needs whole")
        if self.entropy_coef and not hasattr(policy, "entropy"):
            raise ConfigError(f"agent.entropy_coef needs a policy with an entropy; {type(policy).__name__} has none")
        if compiled and self.wrapper.rescores:
            raise ConfigError(
                f"correction {name} scores units in its own way; set agent.compile and agent.cuda_graph to false"
            )

    def _may_split(self) -> bool:
        by_step = not needs_whole_rows(self.correction) and not self.wrapper.whole_rows
        return not self.language and by_step and self.use_critic

    # ------------------------------------------------------------------ one update

    def update(self, replay: Replay, progress: float = 0.0) -> dict[str, Any]:
        """Trains on one batch of rows from the replay.

        Args:
            replay: where the rows come from.
            progress: share of the run that is done, for whatever is annealed.

        Returns:
            Metrics, scalar tensors or floats.
        """
        if self.anneal_lr:
            self.optimizer.set_lr(self.lr * (1.0 - progress))
        self.wrapper.start(progress)
        self.objective.start(progress, self.version)
        if not self.checked:
            self.check_replay(replay)
        record = self._draw(replay)
        metrics: dict[str, Any] = {}
        if not self.checked:
            if "policy" in self.objective.terms:
                check_groups(OWN_ROWS.chosen(record), self.correction, self.use_critic)
                self.correction.check_sources(self.objective.terms["policy"].rows.ungated.chosen(record))
            metrics = self.identity_check(record)
        record = self._annotate(record, metrics)
        trained = len(record) > 0
        if trained:
            metrics |= self._optimize(split_steps(record) if self.shuffle_steps else record)
            if not self.language:
                self._update_normalizers(record)
        self.version += 1
        if trained:
            self.anchors.update(self.version)
        self.objective.finish(metrics)
        return metrics

    def check_replay(self, replay: Replay) -> None:
        """Refuses a replay that this agent cannot use.

        Raises:
            ConfigError: by name, with what works instead.
        """
        check_replay(replay, "policy_gradient", length=self.length)

    def _draw(self, replay: Replay) -> TensorDict:
        batch = replay.sample(self.rows, length=self.length, version=self.version).to(self.device)
        if not self.language and not self.shuffle_steps:
            batch = split_episodes(batch)
        record = batch if self.language else record_from_steps(batch)
        validate_record(record, current_version=self.version, discrete=self.discrete)
        if self.language:
            record = trim_units(record, int(record["token_mask"].sum(-1).max()))
        return record

    def identity_check(self, record: TensorDictBase) -> dict[str, Any]:
        """On the first update: units sampled by the current weights must have ratio 1.

        The tolerance is 0.01, or the policy's own ``log_ratio_tolerance`` where its arithmetic is coarser.

        Raises:
            ConfigError: they do not; then the policy's ``sample`` and ``log_prob`` disagree.
        """
        fresh = OWN_ROWS.within(record)["mask"] & (record["policy_version"] == self.version)
        self.checked = True
        if not bool(fresh.any()) or self.version > 0:
            return {}
        with torch.no_grad():
            log_prob = self.anchors.chunked(self.policy, record)
        gap = torch.where(fresh, log_prob - record["behavior_log_prob"], 0.0).abs().max()
        if not bool(gap <= getattr(self.policy, "log_ratio_tolerance", 1e-2)):
            raise ConfigError(
                f"fresh data should have log-ratio 0, but the largest is {float(gap):.3g}: the policy's sample() and "
                "log_prob() disagree (temperature, truncation, std floor or dtype)"
            )
        return {"identity/max_log_ratio": gap}

    def _annotate(self, record: TensorDict, metrics: dict[str, Any]) -> TensorDict:
        return self.estimate(record, self.version, metrics)

    # ------------------------------------------------------------------ optimiser steps

    def _optimize(self, rows: TensorDict) -> dict[str, Any]:
        means = Means()
        size = min(self.minibatch or len(rows), len(rows))
        for _ in range(self.epochs):
            for batch in self._minibatches(rows, size):
                metrics = self.wrapper.around(partial(self._step, batch), batch)
                means.add(metrics)
            if self.target_kl is not None and float(metrics["update/kl"]) > self.target_kl:
                break
        finished = self.wrapper.finish(rows.split(self.micro_batch or size))
        first = self.objective.terms["policy"].first if "policy" in self.objective.terms else {}
        return {**means.pop(), **first, **finished}

    def _minibatches(self, rows: TensorDict, size: int) -> Sequence[TensorDict]:
        """All rows in random order, cut into pieces of ``size``: one gather an epoch costs less than one a piece."""
        if size == len(rows):
            return [rows]
        if any(term.whole_groups for term in self.objective.active.values()):
            order = shuffled_groups(rows["group"], size, self.generator)
        else:
            order = torch.randperm(len(rows), generator=self.generator, device=self.device)
        return rows.exclude(*SCANNED_ONLY)[order].split(size)

    def _step(self, batch: TensorDict) -> dict[str, Any]:
        """One gradient and one optimiser step."""
        self.optimizer.zero_grad()
        means = Means()
        total = self.objective.backward(batch, self.micro_batch, means)
        norm = self.optimizer.step(total)
        return {**means.pop_tensors(), "loss/total": total, "grad/norm": norm}

    def _plain(self, part: TensorDictBase) -> Tensor:
        return self._score(part).log_prob

    def _update_normalizers(self, record: TensorDict) -> None:
        seen = record["observation"][record["step_mask"]]
        for module in (self.policy, self.baseline.module if self.baseline is not None else None):
            update: Any = getattr(module, "update_normalizer", None)
            if update is not None:
                update(seen)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-exact continuation needs beside the replay and the rollout."""
        return {
            "policy": dict(self.policy.state_dict()),
            "critic": dict(self.baseline.module.state_dict()) if self.baseline is not None else None,
            **self.anchors.state_dict(),
            "wrapper": self.wrapper.state_dict(),
            "groups": self.estimate.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "version": self.version,
            "checked": self.checked,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.policy.load_state_dict(state["policy"])
        if self.baseline is not None:
            self.baseline.module.load_state_dict(state["critic"])
        self.anchors.load_state_dict(state)
        self.wrapper.load_state_dict(state.get("wrapper", {}))  # older checkpoints have none
        self.estimate.load_state_dict(state.get("groups", {}))
        self.objective.load_state_dict(state.get("objective", {}))
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.version, self.checked = state["version"], state["checked"]


def shuffled_groups(group: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Row numbers ``[B]`` with whole groups in random order.

    Raises:
        ConfigError: pieces of ``size`` rows would cut a group.
    """
    ids, index = torch.unique(group, return_inverse=True)
    rows = len(group) // len(ids)
    if rows * len(ids) != len(group) or size % rows:
        raise ConfigError(f"agent.minibatch={size} cuts groups that a term of the loss needs whole ({rows} rows each)")
    rank = torch.randperm(len(ids), generator=generator, device=group.device)
    return rank[index].sort(stable=True).indices


def _scoring(policy: Any, compiled: bool, cuda_graph: bool, device: torch.device) -> Any:
    """The policy's ``log_prob``, as it is, compiled, or replayed from CUDA graphs."""
    if cuda_graph and device.type != "cuda":
        raise ConfigError("agent.cuda_graph needs device=cuda")
    if cuda_graph:
        return torch.compile(policy.log_prob, mode="reduce-overhead")
    return torch.compile(policy.log_prob) if compiled else policy.log_prob
