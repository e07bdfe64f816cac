"""Policy gradient for any policy that has log-probabilities, in either domain, from fresh or replayed rows.

PPO, GRPO, DAPO, V-trace actor-critics and their relatives are this agent with another correction, baseline and replay.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from unified_rl.agents.advantage_source import (
    CREDIT_OF,
    check_columns,
    check_credit,
    check_gates,
    check_rows,
    check_unread,
    check_written_columns,
    choose_credit,
    heads_of,
    refuse_lone,
    refuse_uncompared,
    wants_critic,
)
from unified_rl.agents.anchors import PROVIDERS, Anchors, check_anchors
from unified_rl.agents.baselines import Baseline, StateBaseline, keep_seen, make_baseline, update_moments
from unified_rl.agents.batches import Batches, Draw, choose_steps
from unified_rl.agents.estimate import Estimate, make_advantage
from unified_rl.agents.loss import anchors_of, attach, attached_records, make_records, make_terms, refuse_memory
from unified_rl.agents.providers import Routed
from unified_rl.agents.reference_kl import ReferenceKl, check_kl
from unified_rl.agents.return_scale import check_order, check_scales
from unified_rl.agents.reward_model import attached_reward_model, make_reward_model
from unified_rl.agents.rules import make_rules
from unified_rl.agents.scoring import identity_check, scoring
from unified_rl.configurable import configurable
from unified_rl.correction import Correction
from unified_rl.errors import ConfigError
from unified_rl.instantiate import is_ours
from unified_rl.interventions import WRAPPERS, make_wrapper
from unified_rl.learning_rate import LearningRate, check_learning
from unified_rl.objectives.objective import Objective, Parts
from unified_rl.objectives.records import REPORTS
from unified_rl.optimizer import Optimizer
from unified_rl.protocols import EndsPretraining, HasWeights, Trainable, domain_of, is_discrete
from unified_rl.ranges import Count, NonNegative, Seed, UnitInterval, UpperBound, Whole, ranged
from unified_rl.replay import Fresh, Replay, StalenessBounded
from unified_rl.replay.fit import check_replay
from unified_rl.shard import ALONE, Shard
from unified_rl.training.seeding import generator as generator_of
from unified_rl.units import Source, split_steps


@configurable
@ranged("agent")
class PolicyGradient:
    """One update: draw rows, compute advantages, then epochs of minibatches through the correction.

    Args:
        policy: any policy.
        correction: what multiplies the score function (see :mod:`unified_rl.correction`).
        generator: stream of the minibatch order.
        rows: rows of one update where the replay is no queue; a queue gives what one collection wrote.
        length: steps of a control row (the rollout's horizon); None for language.
        lr: learning rate of the policy, and of the critic without ``critic_lr``.
        critic_lr: learning rate of the critic, by the same schedule; None is ``lr``. A run gives the critic of a
            pretrained policy, whose weights are fresh, the rate of fresh weights (3e-4) where nobody sets it.
        lr_schedule: how the rate moves over the gradient steps of the run: ``constant``, ``linear``, ``cosine`` or
            another name of :data:`~unified_rl.learning_rate.SCHEDULES`, a dotted path, or a mapping with ``name`` and
            the schedule's own settings.
        warmup_steps: gradient steps in which the rate first rises from 0.
        warmup_ratio: their share of the run, instead.
        optimizer: ``adamw`` or another name of :data:`~unified_rl.optimizer.OPTIMIZERS`, a dotted path
            (``torch.optim:SGD``), or a mapping with ``name`` and the optimiser's own options.
        epochs: passes over the rows of an update.
        minibatch: rows (or steps, see ``shuffle_steps``) of one optimiser step; None takes all.
        micro_batch: rows of one forward pass; gradients accumulate to the same gradient.
        advantage: ``critic`` (GAE, or V-trace with ``off_policy_targets``), ``group`` (the return against its
            group), or ``auto``: critic for control, group for language unless the correction wants a critic.
        credit: what a critic's advantage is for: ``unit``, ``step`` (one for all tokens of a turn) or ``cut`` (units,
            the value learnt from finished answers alone), or a mapping ``{name: hierarchical, switch: TEXT, keep: TEXT,
            act: TEXT}`` (subgoals that an answer sets by these markers, see
            :func:`~unified_rl.agents.credits.hierarchical_advantage`); None is what the correction wants, else
            ``unit``.
        teacher: folder of the policy to learn from (a run of this library, or a language model), for what uses one;
            short for ``anchors={"teacher": {"folder": ...}}``.
        anchors: other policies by name, for what compares with them, see
            :func:`~unified_rl.agents.providers.make_provider`.
        gamma: discount of a step; None is 0.99 for control and 1 for language.
        lam: trace parameter of GAE and V-trace.
        off_policy_targets: value targets and advantages by V-trace from the current policy's ratios.
        value_coef: weight of the value loss, which is half the mean squared error.
        value_clip: bound of the value's move, see :func:`unified_rl.objectives.value_loss`.
        critic_hidden: widths of the value network (control).
        critic_config: model configuration of the token critic's own transformer (language); None puts a linear head
            on the policy's own features.
        entropy_coef: weight of the policy's entropy; needs a policy with ``entropy`` or ``read_logits``.
        kl: weight of the KL divergence to the reference, the policy at the start of the run
            (``anchors={"reference": ...}`` names another); 0 needs none.
        kl_in: ``loss`` adds it there, as ``correction.penalty`` does; ``reward`` takes it from the rewards of the units
            before advantages are computed. None is loss.
        kl_estimator: ``k1``, ``k2`` or ``k3`` of a unit's log-ratio, see :mod:`unified_rl.correction.penalties`; None
            is k3 in the loss and k1 in the reward.
        normalize_advantage: standardise advantages once an update, over all of its rows (not over each minibatch).
        normalize_reward: the critic learns rewards divided by the running standard deviation of the discounted return,
            clamped to 10 (``VecNormalize``); what is stored, logged and evaluated stays as it is. Control, rows once.
        normalize_return: the critic learns targets standardised by running moments, its values staying what they are
            where these move (PopArt); ``value_clip`` is then in their units. Control.
        drop_equal_groups: leave out rows of groups whose rewards are all equal (DAPO's filter; they have no
            gradient, but they count in the denominators unless dropped).
        max_grad_norm: bound of the gradient norm.
        target_kl: stop the epochs of an update where the KL estimate k3 to the behaviour policy exceeds this.
        anneal_lr: decay the learning rate linearly to 0 over the run, update by update (``lr_schedule=linear`` does so
            step by step).
        shuffle_steps: minibatches of single steps instead of whole rows; None does so for control where the
            correction's level allows it.
        adam_eps: Adam's denominator offset; optimisers without one do not read it.
        weight_decay: decay of matrices and embeddings, not of biases and norms; decoupled with AdamW.
        device: where updates run.
        compile: compile the policy's scoring function with ``torch.compile``.
        cuda_graph: compile it so that its forward and backward passes are replayed from CUDA graphs (mode
            ``reduce-overhead``); needs a CUDA device, and minibatches of one size to be of use.
        objectives: terms of the loss by name, beside or instead of ``policy``, ``value`` and ``entropy``; null takes
            one out. See :data:`unified_rl.agents.loss.TERMS`.
        maps: of the advantages, in order, see :data:`unified_rl.returns.maps.MAPS`; their numbers may be schedules and
            controllers.
        filters: which rows and units are learnt from, by their advantages, in order, see
            :data:`unified_rl.returns.filters.FILTERS`; their numbers may move too.
        per_record: ``{clip: C, noise: S}`` bounds the gradient norm of each row's loss and blurs their sum, see
            :class:`~unified_rl.objectives.records.RecordGradients`; for terms that look at single rows alone.
        gates: bool columns by name, see :data:`unified_rl.returns.gates.GATES`, for the ``rows`` of terms.
        columns: numbers of rows by name, see :data:`unified_rl.returns.columns.COLUMNS`: rewards for
            ``correction.advantage.reward``, weights for ``correction.penalty``; their settings may move too.
        reward_model: gives the rewards in place of the environment: ``learnt`` (from comparisons of the rows, along
            with the policy) or another name of :data:`unified_rl.agents.reward_model.REWARD_MODELS`, or a mapping.

    Raises:
        ConfigError: settings that do not fit the policy.
    """

    rescores = True
    """Rows must be the policy's own samples, whose log-probs it computes anew."""

    option = "policy_gradient"
    """What the configuration calls it, for errors; a run sets its own choice."""

    shard: Shard = ALONE

    def __init__(
        self,
        policy: Trainable,
        correction: Correction,
        generator: torch.Generator,
        rows: Count,
        length: Count | None = None,
        lr: NonNegative = 3e-4,
        critic_lr: NonNegative | None = None,
        lr_schedule: str | dict[str, Any] = "constant",
        warmup_steps: Whole = 0,
        warmup_ratio: UnitInterval = 0.0,
        optimizer: str | dict[str, Any] = "adamw",
        epochs: Count = 1,
        minibatch: Count | None = None,
        micro_batch: Count | None = None,
        advantage: Literal["auto", "critic", "group"] = "auto",
        credit: str | dict[str, Any] | None = None,
        teacher: str | None = None,
        anchors: dict[str, Any] | None = None,
        gamma: UnitInterval | None = None,
        lam: UnitInterval = 0.95,
        off_policy_targets: bool = False,
        value_coef: NonNegative = 0.5,
        value_clip: UpperBound | None = None,
        critic_hidden: tuple[Count, ...] = (64, 64),
        critic_config: dict[str, Any] | None = None,
        entropy_coef: float = 0.0,
        kl: NonNegative = 0.0,
        kl_in: Literal["loss", "reward"] | None = None,
        kl_estimator: Literal["k1", "k2", "k3"] | None = None,
        normalize_advantage: bool | None = None,
        normalize_reward: bool = False,
        normalize_return: bool = False,
        drop_equal_groups: bool = False,
        max_grad_norm: UpperBound | None = 1.0,
        target_kl: UpperBound | None = None,
        anneal_lr: bool = False,
        shuffle_steps: bool | None = None,
        adam_eps: NonNegative = 1e-8,
        weight_decay: NonNegative = 0.0,
        device: str = "cpu",
        compile: bool = False,
        cuda_graph: bool = False,
        objectives: dict[str, Any] | None = None,
        per_record: dict[str, Any] | None = None,
        gates: dict[str, Any] | None = None,
        maps: list[str | dict[str, Any]] | None = None,
        filters: list[str | dict[str, Any]] | None = None,
        columns: dict[str, str | dict[str, Any]] | None = None,
        reward_model: str | dict[str, Any] | None = None,
        seed: Seed = 0,
    ) -> None:
        self.language, discrete = domain_of(policy) == "language", is_discrete(policy)
        correction.check_domain(discrete=discrete)
        correction.require_support(wrappers=[*WRAPPERS, *CREDIT_OF], providers=PROVIDERS)
        reference_kl = ReferenceKl(kl, kl_in, kl_estimator)
        correction = reference_kl.in_loss(correction)
        self.use_critic, self.credit = choose_credit(correction, advantage, credit, language=self.language)
        check_unread(
            self.use_critic, self.language, critic_config=critic_config, drop_equal_groups=drop_equal_groups,
            baseline=correction.advantage.get("baseline"),
        )  # fmt: skip
        check_scales(normalize_reward, normalize_return, use_critic=self.use_critic, language=self.language)
        if critic_lr is not None and not self.use_critic:
            raise ConfigError("agent.critic_lr is of a critic, and there is none: set agent.advantage=critic")
        self.policy, self.correction, self.generator = policy, correction, generator
        if isinstance(policy, EndsPretraining):
            policy.end_pretraining()
        self.lr, self.anneal_lr, self.micro_batch, self.device = lr, anneal_lr, micro_batch, torch.device(device)
        schedule = partial(LearningRate, schedule=lr_schedule, warmup_steps=warmup_steps, warmup_ratio=warmup_ratio)
        self.learning_rate = schedule(lr, annealed=anneal_lr)
        self.critic_rate = None if critic_lr is None else schedule(critic_lr, annealed=anneal_lr)
        self.gamma = gamma if gamma is not None else (1.0 if self.language else 0.99)
        self.wrapper = make_wrapper(policy, correction)
        terms = make_terms(objectives, value_coef if self.use_critic else None, value_clip, entropy_coef)
        by_step = self.use_critic and not self.language
        self.shuffle_steps = choose_steps(shuffle_steps, by_step, correction, self.wrapper, terms.values())
        modules: dict[str, HasWeights] = {"policy": policy}
        self.baseline: Baseline | None = None
        if self.use_critic:
            self.baseline = make_baseline(policy, critic_hidden, critic_config, seed, heads_of(self.credit))
            if isinstance(self.baseline, StateBaseline):
                self.baseline.scale(normalize_reward, normalize_return)
            modules["critic"] = self.baseline.module.to(self.device)
        extra = self.wrapper.modules()
        options: dict[str, Any] = {"eps": adam_eps, "max_grad_norm": max_grad_norm, "extra": extra, "kind": optimizer}
        rates = None if critic_lr is None else {"critic": critic_lr}
        self.optimizer = Optimizer(modules, lr, weight_decay, rates=rates, **options)
        self.wrapper.attach(self.optimizer)
        rules = make_rules({"gates": gates, "columns": columns, "maps": maps, "filters": filters})
        needs = anchors_of(terms.values(), rules.moving)
        needs[0].update(reference_kl.anchors)
        refuse_memory(policy, needs[1])
        self.anchors = Anchors(
            policy, correction, self.wrapper, anchors, teacher, micro_batch, *needs, off_policy_targets
        )
        parts = Parts(policy, correction, self.wrapper, self.anchors, self.baseline)
        self.compiled = compile or cuda_graph
        attach(terms, parts, compiled=self.compiled, target_kl=target_kl)
        plain = scoring(policy, compile, cuda_graph, self.device)
        self.objective = Objective(policy, terms, lambda rows: self.wrapper.score(rows, plain), generator)
        self.reward_model = attached_reward_model(reward_model, parts, normalize_reward, micro_batch, seed)
        self.records = attached_records(
            per_record, policy, self.objective, rules, drop_equal_groups, self.shuffle_steps
        )
        if self.records is not None:
            self.records.attach(self.optimizer.parameters, generator_of(seed, "records"))
        source = make_advantage(correction, self.baseline, self.credit, lam, off_policy_targets, normalize_advantage)
        self.estimate = Estimate(
            parts, self.objective, source, drop_equal_groups, rules, reference_kl, self.reward_model
        )
        self.objective.follow(self.estimate.followed)
        self.draw = Draw(rows, length, self.language, discrete, not self.shuffle_steps, self.device)
        self.batches = Batches(generator, epochs, minibatch, target_kl)
        self.rows, self.length = rows, length
        self.version, self.checked, self.verify_identity = 0, False, True  # identity_check=false sets the last
        self.watch: Callable[[TensorDict], None] | None = None
        """Is shown the annotated rows of an update, see :class:`~unified_rl.protocols.ShowsRows`."""

    @classmethod
    def trains_critic(cls, settings: Mapping[str, Any], correction: Mapping[str, Any] | None) -> bool:
        """Whether these settings have a critic of tokens, known when a run is composed.

        Args:
            settings: of the agent, for a language model.
            correction: of the run.
        """
        name = ((correction or {}).get("wrapper") or {}).get("name", "")
        return wants_critic(settings.get("advantage") or "auto", settings.get("credit"), name, language=True)

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> None:
        """Refuses settings that no agent can be made of, when a run is composed: before a policy, before a warm start.

        Raises:
            ConfigError: an unknown term, gate, map, source or anchor, or a wrong setting of one; by its full name.
        """
        check_learning(settings)
        check_kl(settings)
        check_credit(settings.get("credit"))
        make_records(settings.get("per_record"))
        taken = {key: settings[key] for key in ("value_clip", "entropy_coef") if key in settings}
        terms = make_terms(settings.get("objectives"), 1.0, **{"value_clip": None, "entropy_coef": 0.0, **taken})
        if settings.get("critic_config") is not None:
            from unified_rl.policies.model_sizes import check_model_config  # transformers is slow to import

            check_model_config(settings["critic_config"], "agent.critic_config")
        if settings.get("reward_model") is not None:
            make_reward_model(settings["reward_model"])
        needs = anchors_of(terms.values(), make_rules(settings).moving)
        check_anchors(settings.get("anchors") or {}, {**needs[0], **needs[1]})

    @property
    def metric_names(self) -> frozenset[str] | None:
        """What updates may report; None where a part of the user's own has names that nobody knows."""
        terms = self.objective.terms.values()
        if not all(map(is_ours, (self, self.wrapper, *terms))):
            return None
        critic = set() if self.critic_rate is None else {"agent/critic_lr"}
        critic |= {f"train/{name}_std" for name in self._scales}
        critic |= set() if self.records is None else {*REPORTS}
        own = {*critic, "agent/lr", "loss/total", "grad/norm", "identity/max_log_ratio", *self.estimate.reports}
        return frozenset(own.union(self.wrapper.reports, *(term.metric_names for term in terms)))

    @property
    def _scales(self) -> dict[str, Any]:
        """Of rewards and returns, those that are used."""
        if not isinstance(self.baseline, StateBaseline):
            return {}
        found = {"reward": self.baseline.rewards, "return": self.baseline.returns}
        return {name: scale for name, scale in found.items() if scale is not None}

    def plan_updates(self, updates: int) -> None:
        """Tells the learning rate's schedule how many updates the run has.

        Raises:
            ConfigError: its warm-up is longer.
        """
        pieces = self.rows * (self.length or 1) if self.shuffle_steps else self.rows
        steps = self.batches.epochs * -(-pieces // (self.batches.minibatch or pieces))
        for rate in (self.learning_rate, self.critic_rate):
            if rate is not None:
                rate.plan(updates, steps)

    def update(self, replay: Replay, progress: float = 0.0) -> dict[str, Any]:
        """Trains on one batch of rows from the replay; returns metrics, scalar tensors or floats.

        ``progress`` is the share of the run that is done, for whatever is annealed.
        """
        if self.anneal_lr:
            self._set_rates(lambda rate: rate.lr * (1.0 - progress))
        self.wrapper.start(progress)
        self.objective.start(progress, self.version)
        self.anchors.begin(self.version)
        self.estimate.start(progress, self.version)
        metrics: dict[str, Any] = {}
        if not self.checked:
            self.check_replay(replay)
        record = self._draw(replay)
        if not self.checked:
            check_rows(record, self.objective.terms, self.correction, self.use_critic)
            metrics = self.identity_check(record)
        if "reward" in self._scales:
            self._scales["reward"].observe(record)
        record = self._annotate(record, metrics)
        metrics |= {f"train/{name}_std": scale.moments.std for name, scale in self._scales.items()}
        if self.watch is not None:
            self.watch(record)
        trained = len(record) > 0
        if trained:
            if not self.language:
                keep_seen(record, self.policy, self.baseline)
            metrics |= self._optimize(split_steps(record) if self.shuffle_steps else record)
            if not self.language:
                update_moments(record, policy=self.policy, baseline=self.baseline)
        metrics["agent/lr"] = self.optimizer.rate
        if self.critic_rate is not None:
            metrics["agent/critic_lr"] = self.optimizer.rate_of("critic")
        self.version += 1
        if trained:
            self.anchors.update(self.version)
        self.objective.finish(metrics)
        self.estimate.finish(metrics, self.objective.reported)
        return metrics

    def keep_versions(self, staleness: int) -> None:
        """Says how many updates old the rows of a collection may be: so many earlier weights are kept, if any are."""
        if self.anchors.versions is not None:
            self.anchors.versions.keep = staleness

    def _check_versions(self, replay: Replay) -> None:
        """Keeps the weights of as many versions as the replay may hand out rows of.

        Raises:
            ConfigError: it may hand out rows of any age.
        """
        sampler = getattr(replay, "sampler", None)
        if self.anchors.versions is None or isinstance(sampler, Fresh):
            return
        if not isinstance(sampler, StalenessBounded):
            raise ConfigError(
                f"correction {self.correction.name} scores rows by the weights that sampled them, and those of rows of "
                "any age, which this replay hands out, are not kept: use replay=fresh or replay=staleness, or "
                "correction=decoupled_ppo, which needs none"
            )
        self.anchors.versions.keep = sampler.max_lag

    def check_replay(self, replay: Replay) -> None:
        """Refuses a replay that this agent cannot use, by its name."""
        self._check_versions(replay)
        check_replay(replay, self.option, length=self.draw.length, groups=True, draws=self.draw.rows)
        if "reward" in self._scales:
            check_order(replay)

    def check_written(
        self, sources: Collection[int], group_size: int, columns: Collection[str], stored: bool = True
    ) -> None:
        """Refuses rows from which nothing would be learnt, or that lack a gate, before any are collected.

        Args:
            sources: of the rows that will be drawn.
            group_size: the most rows that share a group.
            columns: of the rows, beside the gates, see :func:`~unified_rl.agents.advantage_source.check_columns`.
            stored: some of source OFFLINE were sampled by weights of before.

        Raises:
            ConfigError: names the setting and what works.
        """
        if self.anchors.versions is not None and stored and int(Source.OFFLINE) in sources:
            raise ConfigError(
                f"correction {self.correction.name} scores rows by the weights that sampled them, and those of stored "
                "rows (source offline) are not kept: take out their source, or use correction=decoupled_ppo, which "
                "needs none"
            )
        terms, rules = self.objective.terms, self.estimate.rules
        self.anchors.check_columns({*columns, *rules.gates, *rules.columns})
        if self.reward_model is not None:
            self.reward_model.check_columns(columns)
            self.reward_model.check_sources(sources)
        check_columns(terms, rules, self.correction, columns)
        routes = [provider.by for provider in self.anchors.values() if isinstance(provider, Routed)]
        check_written_columns(rules, terms, self.correction, routes)
        check_gates(rules.gates, terms, self.correction)
        if group_size == 1:
            for term in self.objective.active.values():
                term.refuse_lone()
        elif self.use_critic and not self.language:
            refuse_uncompared(terms, rules, self.correction, self.reward_model is not None)
        if "policy" not in terms:
            return
        if group_size == 1:
            refuse_lone(self.correction, self.use_critic)
        rows = terms["policy"].rows
        if not rows.gates:  # gates open later
            self.correction.require_shown(sorted(sources if not rows.sources else set(rows.sources) & set(sources)))

    def share(self, shard: Shard) -> None:
        """Divides the passes over policy, critic and anchors among processes that are given the same rows.

        Raises:
            ConfigError: an intervention of the user's own that does not say it is right then, or processes that pass
                every policy in step and teachers of which each is asked of some rows alone.
        """
        if not (is_ours(self.wrapper) or self.wrapper.shares):
            raise ConfigError(
                f"correction.wrapper is {type(self.wrapper).__name__}, which does not say that it may see a share of "
                "the rows: set its attribute shares=True where it may, or learner=single"
            )
        if self.records is not None and shard.world > 1:
            raise ConfigError("agent.per_record takes rows one by one in one process: set learner=single")
        self.anchors.check_shard(shard)
        self.shard = self.anchors.shard = self.wrapper.shard = shard
        self.objective.share(shard)
        if self.baseline is not None:
            self.baseline.shard = shard

    def weights(self) -> list[Tensor]:
        """The weights that are trained, and the policy's buffers, which are the same in every process."""
        rewarding = [] if self.reward_model is None else self.reward_model.parameters()
        return [*self.optimizer.parameters, *self.policy.buffers(), *rewarding]

    def models(self) -> list[Any]:
        """The policy, its critic, and the other policies that rows are compared with."""
        critic = [] if self.baseline is None else [self.baseline.module]
        return [self.policy, *critic, *self.anchors.models()]

    def _draw(self, replay: Replay) -> TensorDict:
        return self.draw(replay, self.version)

    def identity_check(self, record: TensorDictBase) -> dict[str, Any]:
        """On the first update: units sampled by the current weights must have ratio 1, see :mod:`~.scoring`."""
        self.checked = True
        score = partial(self.anchors.chunked, self.policy, record)
        return identity_check(self.policy, record, self.version, score) if self.verify_identity else {}

    def _annotate(self, record: TensorDict, metrics: dict[str, Any]) -> TensorDict:
        return self.estimate(record, self.version, metrics)

    def _optimize(self, rows: TensorDict) -> dict[str, Any]:
        taken = 0

        def around(batch: TensorDict) -> dict[str, Any]:
            nonlocal taken
            if self.learning_rate.moves:
                step = taken
                self._set_rates(lambda rate: rate.of_update(self.version, step))
            taken += 1
            return self.wrapper.around(partial(self._step, batch), batch)

        means = self.batches.run(rows, around, self.objective.whole_groups)
        finished = self.wrapper.finish(rows.split(self.micro_batch or self.batches.size(rows)))
        return {**means, **self.objective.summary(), **finished}

    def _set_rates(self, present: Callable[[LearningRate], float]) -> None:
        """Moves the rates of policy and critic alike."""
        rates = None if self.critic_rate is None else {"critic": present(self.critic_rate)}
        self.optimizer.set_lr(present(self.learning_rate), rates)

    def _step(self, batch: TensorDict) -> dict[str, Any]:
        """One gradient and one optimiser step."""
        self.optimizer.zero_grad()
        total, metrics = self.objective.backward(batch, self.micro_batch)
        self.shard.sum_gradients(self.optimizer.parameters)
        return {**metrics, "loss/total": total, "grad/norm": self.optimizer.step(total)}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-exact continuation needs beside the replay and the rollout."""
        return {
            "policy": dict(self.policy.state_dict()),
            "critic": dict(self.baseline.module.state_dict()) if self.baseline is not None else None,
            "scales": {name: scale.state_dict() for name, scale in self._scales.items()},
            **self.anchors.state_dict(),
            "wrapper": self.wrapper.state_dict(),
            "groups": self.estimate.state_dict(),
            **({} if self.reward_model is None else {"reward_model": self.reward_model.state_dict()}),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "micro_batch": self.micro_batch,
            "generator": self.generator.get_state(),
            **({} if self.records is None else {"records": self.records.state_dict()}),
            "version": self.version,
            "checked": self.checked,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.policy.load_state_dict(state["policy"])
        if self.baseline is not None:
            self.baseline.module.load_state_dict(state["critic"])
        for name, scale in self._scales.items():
            scale.load_state_dict(state["scales"][name])
        self.anchors.load_state_dict(state)
        for part, key in ((self.wrapper, "wrapper"), (self.estimate, "groups"), (self.objective, "objective")):
            part.load_state_dict(state[key])
        if self.reward_model is not None:
            self.reward_model.load_state_dict(state["reward_model"])
            self.reward_model.micro_batch = state.get("micro_batch", self.micro_batch)
        self.optimizer.load_state_dict(state["optimizer"])
        # a run that chose its micro-batches by this machine's memory keeps them on another one
        self.micro_batch = self.anchors.micro_batch = state.get("micro_batch", self.micro_batch)
        self.generator.set_state(state["generator"])
        if self.records is not None:
            self.records.load_state_dict(state["records"])
        self.version, self.checked = state["version"], state["checked"]
