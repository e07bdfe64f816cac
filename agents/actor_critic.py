"""Value-based actor-critics: a critic target, a list of critic and actor terms, and where one is used a state value.

SAC, TD3, TD3+BC, IQL, AWAC, RLPD and their relatives are this agent with other parts and another replay; as it is, it
is Soft Actor-Critic (arXiv:1801.01290, arXiv:1812.05905).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.agents.graphed import GraphedStep
from unified_rl.agents.phases import Node, Phases
from unified_rl.configurable import configurable
from unified_rl.errors import ConfigError, NonFiniteError
from unified_rl.instantiate import is_ours
from unified_rl.learning_rate import LearningRate, check_learning
from unified_rl.objectives.summands import Scales
from unified_rl.objectives.transitions import KEYS, Networks, Transitions, prepare_batch
from unified_rl.optimizer import make_optimizer
from unified_rl.policies.base import Policy
from unified_rl.policies.critics import QEnsemble, ValueCritic
from unified_rl.policies.encoder import image_features
from unified_rl.policies.normalizer import RunningNormalizer
from unified_rl.protocols import BoxPolicy, standardises
from unified_rl.quick_adam import QuickAdam
from unified_rl.ranges import Count, Fraction, NonNegative, Positive, Seed, UnitInterval, Whole, ranged
from unified_rl.replay import Replay, nstep_transitions
from unified_rl.replay.fit import check_replay
from unified_rl.shard import ALONE, Shard

Metrics = dict[str, Tensor]
LABELS = {"value": "loss/value", "critic": "loss/critic", "actor": "loss/policy"}


@dataclass
class Phase:
    """A loss, the parameters that it moves, and their optimiser."""

    loss: Callable[..., tuple[Tensor, Metrics]]
    parameters: list[Tensor]
    adam: torch.optim.Optimizer
    move: QuickAdam
    through: bool = False
    """Whether gradients pass through networks of other phases, whose weights then get none."""

    def step(self, *inputs: Any, part: Part | None = None) -> tuple[Tensor, Metrics]:
        """One optimiser step; ``part`` says which rows of the batch the inputs are."""
        loss, metrics = self.loss(*inputs)
        for parameter in self.parameters:
            parameter.grad = None
        if part is None:
            torch.autograd.backward(loss, inputs=self.parameters if self.through else None)
        else:
            part.backward(loss, self.parameters, self.through)
        self.move.step()
        return loss.detach(), metrics


class Part:
    """Which rows of a batch this process passes through the networks, and what becomes of what it finds.

    Args:
        shard: of the processes that divide the batch.
        rows: of the whole batch.
    """

    def __init__(self, shard: Shard, rows: int) -> None:
        mine = shard.mine(rows)
        self.shard, self.rows, self.span = shard, rows, shard.span(rows)
        self.share = (mine.stop - mine.start) / rows
        """Of the rows that count: 0 where the first row is passed for company."""

    def batch(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """This process's rows; the order of an ensemble's members has none."""
        if self.shard.world == 1:
            return batch
        return {key: x if key == "members" else x[self.span] for key, x in batch.items()}

    def backward(self, loss: Tensor, parameters: Sequence[Tensor], through: bool) -> None:
        """The gradient of the mean over all rows, from the mean over this process's."""
        inputs = list(parameters) if through else None
        torch.autograd.backward(loss if self.shard.world == 1 else self.share * loss, inputs=inputs)
        self.shard.sum_gradients(parameters)

    def average(self, x: Tensor) -> Tensor:
        """The mean of ``[B]`` over all rows, without gradient."""
        if self.shard.world == 1:
            return x.mean()
        total: Tensor = self.share * x.detach().mean()
        self.shard.all_reduce(total)
        return total

    def metrics(self, found: Metrics, device: torch.device) -> Metrics:
        """Means over all rows of those over this process's, and ``td_error [B]`` of all rows."""
        if self.shard.world == 1:
            return found
        each = {key: x for key, x in found.items() if key == "td_error"}
        means = {key: self.share * x.double() for key, x in found.items() if key not in each}
        summed = {key: x.to(torch.float32) for key, x in self.shard.sums(means, device).items()}
        return {**summed, **{key: self.shard.gather(x, self.rows) for key, x in each.items()}}


@configurable
@ranged("agent")
class ActorCritic:
    """One gradient step: value, critic, actor and entropy weight, each with its own optimiser, then the slow copy.

    With the default parts: ``y = r + gamma (1 - terminated) (min_j Q'_j(s', a') - alpha log pi(a'|s'))``, critics by
    half the mean squared error, actor by ``mean(alpha log pi - min_j Q_j)``, ``log alpha`` by ``-log alpha (log pi +
    H)``. No importance ratio enters: the next action is drawn afresh.

    Observations of a policy that standardises them are standardised in every network, by moments that move once a
    collection.

    Args:
        policy: any policy with ``nll``, and with ``rsample`` where a part draws fresh actions
            (:class:`unified_rl.policies.gaussian.GaussianPolicy`).
        generator: stream of the noise.
        rows, length: of one collection; they set how many gradient steps are due after it.
        target: of the critic, a name of :data:`~unified_rl.objectives.offline_value.TARGETS` or a mapping with ``name``
            and settings. Names may be dotted paths here and below.
        aggregate: from an ensemble's members to one value, in targets and advantages, of ``AGGREGATES``.
        value: loss of a state value, of ``VALUES``; None uses none.
        critic: terms of the critic's loss by name; each a name of ``CRITICS`` or a mapping with ``name``, settings and
            ``coefficient`` (a number or a schedule). None is the squared error alone.
        actor: terms of the actor's loss by name, likewise of ``ACTORS``. None is ``pathwise`` alone.
        n_step: rewards summed in front of the bootstrap, without importance weights.
        lr: learning rate of actor, critics, state value and entropy weight.
        lr_schedule, warmup_steps, warmup_ratio: how it moves over the gradient steps of the run, as of
            :class:`~unified_rl.agents.policy_gradient.PolicyGradient`.
        optimizer: of all of them, likewise.
        batch_size: transitions of one gradient step.
        updates_per_step: gradient steps per environment step.
        learning_starts: environment steps before the first gradient step.
        gamma: discount of a step.
        tau: share of the critic in its slow copy per gradient step.
        critics: members of the ensemble.
        critic_hidden: widths of a critic.
        layer_norm: LayerNorm in the critics.
        alpha: initial entropy weight, fixed if ``tune_alpha`` is off.
        tune_alpha: tune the entropy weight to the target entropy.
        target_entropy: by default minus the action's width.
        policy_delay: critic steps per actor step (the actor then makes one step, not several).
        device: where updates run.
        compile: compile the losses with ``torch.compile``.
        cuda_graph: capture one whole gradient step in a CUDA graph (needs a CUDA device).
        seed: of the critics' weights.

    Raises:
        ConfigError: an unknown part, one that the policy cannot support, or a setting that would be of no effect.
    """

    option = "actor_critic"
    """What the configuration calls it, for errors; a run sets its own choice."""

    shard: Shard = ALONE

    def __init__(
        self,
        policy: BoxPolicy,
        generator: torch.Generator,
        rows: Count,
        length: Count | None = None,
        target: str | dict[str, Any] = "soft",
        aggregate: str | dict[str, Any] = "least",
        value: str | dict[str, Any] | None = None,
        critic: dict[str, Any] | None = None,
        actor: dict[str, Any] | None = None,
        n_step: Count = 1,
        lr: NonNegative = 3e-4,
        lr_schedule: str | dict[str, Any] = "constant",
        warmup_steps: Whole = 0,
        warmup_ratio: UnitInterval = 0.0,
        optimizer: str | dict[str, Any] = "adam",
        batch_size: Count = 256,
        updates_per_step: Positive = 1.0,
        learning_starts: Whole = 1000,
        gamma: UnitInterval = 0.99,
        tau: Fraction = 0.005,
        critics: Count = 2,
        critic_hidden: tuple[Count, ...] = (256, 256),
        layer_norm: bool = False,
        alpha: NonNegative = 1.0,
        tune_alpha: bool = True,
        target_entropy: float | None = None,
        policy_delay: Count = 1,
        device: str = "cpu",
        compile: bool = False,
        cuda_graph: bool = False,
        seed: Seed = 0,
    ) -> None:
        if isinstance(policy, Policy):  # later moments would be another policy than the imitated one
            policy.freeze_moments()
        self.policy, self.generator, self.gamma, self.tau = policy, generator, gamma, tau
        self.rows, self.n_step, self.batch_size = rows * (length or 1), n_step, batch_size
        self.updates_per_step, self.learning_starts = updates_per_step, learning_starts
        self.policy_delay, self.device = policy_delay, torch.device(device)
        self.learning_rate = LearningRate(lr, lr_schedule, warmup_steps, warmup_ratio)
        self.phases_of = self._parts(target, aggregate, value, critic, actor)
        self.phases_of.check_members(critics)
        self.phases_of.check_alpha(alpha, tune_alpha, target_entropy)
        if cuda_graph and self.device.type != "cuda":
            raise ConfigError("agent.cuda_graph needs device=cuda")
        if cuda_graph:
            self.phases_of.check_graph(policy)
        if cuda_graph and self.learning_rate.moves:
            raise ConfigError(
                "agent.lr_schedule moves the rate between gradient steps, which a CUDA graph would not see; set "
                "agent.cuda_graph=false"
            )
        log_alpha = torch.tensor(math.log(alpha) if alpha else -math.inf, device=self.device, requires_grad=tune_alpha)
        shape: dict[str, Any] = {"critics": critics, "hidden": critic_hidden, "layer_norm": layer_norm, "seed": seed}
        self.nets = make_networks(policy, log_alpha, self.device, value is not None, **shape)
        self.slow_parameters: list[Tensor] = list(self.nets.target.parameters())
        self.target_entropy = -float(policy.action_dim) if target_entropy is None else target_entropy
        self.phases, self.alpha_adam = self._optimisers(lr, optimizer, compile, tune_alpha)
        self.alpha_move = None if self.alpha_adam is None else QuickAdam(self.alpha_adam)
        self.standardised = standardises(policy)
        self.draws_members = critics if self.phases_of.needing("members") else 0
        self.reads_alpha = bool(self.phases_of.needing("entropy"))
        self.extra: tuple[str, ...] = ()
        self.prioritised = self.checked = False
        self.scales: dict[str, Scales] = self.phases_of.scales(0.0, 0)
        self.inner_generator, self.part = generator, Part(ALONE, batch_size)
        """Noise that a policy's supervised loss draws, and the rows of the present step."""
        self.graph = GraphedStep(self.gradient_step, policy_delay) if cuda_graph else None
        self.version = self.gradient_steps = 0
        self._due = 0.0

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> None:
        """Refuses parts that no loss can be made of, when a run is composed: before a policy, before a warm start.

        Raises:
            ConfigError: an unknown part, a wrong setting of one, or a value that is missing or unread.
        """
        check_learning({"optimizer": "adam", **settings})
        keys = ("target", "aggregate", "value", "critic", "actor")
        given: dict[str, Any] = {"target": "soft", "aggregate": "least", **dict.fromkeys(keys[2:])}
        parts = make_phases(**given | {key: settings[key] for key in keys if key in settings})
        parts.check_members(settings.get("critics", 2))

    @property
    def metric_names(self) -> frozenset[str] | None:
        """What updates may report; None where a part of the user's own has names that nobody knows."""
        parts = self.phases_of.parts.values()
        if not is_ours(self) or not all(part.func.__module__.startswith("unified_rl.") for part in parts):
            return None
        entropy = {"policy/alpha", "policy/entropy"} if self.reads_alpha else set()
        weight = {"policy/weight"} if self.phases_of.needing("advantage") else set()
        return frozenset({LABELS[name] for name in self.phases_of.losses()} | entropy | weight | {"agent/lr"})

    def _parts(
        self,
        target: Node,
        aggregate: Node,
        value: Node | None,
        critic: Mapping[str, Any] | None,
        actor: Mapping[str, Any] | None,
    ) -> Phases:
        parts = make_phases(target, aggregate, value, critic, actor)
        parts.check_policy(self.policy)
        return parts

    def _optimisers(
        self, lr: float, kind: Node, compiled: bool, tune_alpha: bool
    ) -> tuple[dict[str, Phase], torch.optim.Optimizer | None]:
        """A phase for each loss, in the order of a gradient step, and an optimiser of the entropy weight if tuned."""
        nets, capturable = self.nets, self.device.type == "cuda"
        moved: dict[str, Any] = {"value": nets.value, "critic": nets.critic, "actor": self.policy}
        phases = {}
        for name in self.phases_of.losses():
            loss, parameters = self._loss(name), [p for p in moved[name].parameters() if p.requires_grad]
            loss = torch.compile(loss) if compiled else loss
            adam = make_optimizer(parameters, lr, kind, capturable)
            phases[name] = Phase(loss, parameters, adam, QuickAdam(adam), name == "actor")
        return phases, make_optimizer([nets.log_alpha], lr, kind, capturable) if tune_alpha else None

    def _loss(self, name: str) -> Callable[..., tuple[Tensor, Metrics]]:
        """A phase's loss as a function of tensors: ``(batch, noise, alpha, scales) -> (scalar, metrics)``."""
        loss = self.phases_of.losses()[name]

        def compute(batch: dict[str, Tensor], noise: Tensor, alpha: Tensor, scales: Scales) -> tuple[Tensor, Metrics]:
            t = Transitions(
                batch, self.nets, noise, alpha, self.phases_of.aggregate, self.inner_generator, self.part.average
            )
            value = loss(t, scales)
            if name == "critic" and self.prioritised:
                t.metrics["td_error"] = t.td_error.detach().abs().mean(0)
            return value, t.metrics

        return compute

    # ------------------------------------------------------------------ one gradient step

    def gradient_step(self, batch: dict[str, Tensor], noise: Tensor, update_actor: bool) -> Metrics:
        """Every phase once, then the slow copy of the critic.

        Args:
            batch: as of :class:`~unified_rl.objectives.transitions.Transitions`.
            noise: ``[2, B, a]`` standard normal.
            update_actor: whether the step of actor and entropy weight is due.

        Returns:
            Scalars, and ``td_error [B]`` where the replay takes priorities.
        """
        alpha = self.nets.log_alpha.detach().exp()
        metrics: Metrics = {}
        part = self.part = Part(self.shard, len(batch["reward"]))
        batch, noise = part.batch(batch), noise[:, part.span]
        for name, phase in self.phases.items():
            scales = self.scales.get(name, (1.0,))
            if (name != "actor" or update_actor) and any(scales):
                metrics[LABELS[name]], more = phase.step(batch, noise, alpha, scales, part=part)
                metrics |= more
        metrics = part.metrics(metrics, self.device)
        if self.reads_alpha:
            metrics["policy/alpha"] = alpha
        if update_actor and self.alpha_move is not None and "policy/entropy" in metrics:
            self.nets.log_alpha.grad = metrics["policy/entropy"] - self.target_entropy
            self.alpha_move.step()
        with torch.no_grad():  # else every step hangs one more node on the slow copy, for as long as a run lasts
            torch._foreach_lerp_(self.slow_parameters, self.phases["critic"].parameters, self.tau)
        return metrics

    # ------------------------------------------------------------------ the trainer's interface

    def share(self, shard: Shard) -> None:
        """Divides the passes over a batch among processes that draw the same one.

        The noise of actions is drawn for the whole batch and cut, so that it is one process's; what a policy's
        supervised loss draws comes from a stream of each process.

        Raises:
            ConfigError: a captured graph, or a part of the user's own that does not say it is right then.
        """
        if self.graph is not None:
            raise ConfigError("agent.cuda_graph captures a step of one process: set it to false, or learner=single")
        for name, part in self.phases_of.parts.items():
            if not (part.func.__module__.startswith("unified_rl.") or getattr(part.func, "shares", False)):
                raise ConfigError(
                    f"{name} is {part.func.__name__}, which does not say that it may see a share of the batch: set its "
                    "attribute shares=True where its loss is a mean over rows (Transitions.average is that over all), "
                    "or learner=single"
                )
        self.shard = shard

    def weights(self) -> list[Tensor]:
        """Weights and buffers of all networks, which are the same in every process."""
        modules = self._modules().values()
        return [*(x for m in modules for x in (*m.parameters(), *m.buffers())), self.nets.log_alpha]

    def update(self, replay: Replay, progress: float = 0.0) -> dict[str, Any]:
        """The gradient steps that are due after one collection.

        Raises:
            ConfigError: the replay does not fit (on the first call).
            NonFiniteError: a loss is not finite; looked at once a collection.
        """
        if not self.checked:
            self.check_replay(replay)
        if replay.write_count < self.learning_starts:
            return {}
        self.scales = self.phases_of.scales(progress, self.version)
        self._due += self.updates_per_step * self.rows
        metrics: dict[str, Any] = {}
        standardise = self.standardised
        while self._due >= 1.0:
            metrics = self._train_once(replay, standardise)
            standardise = False
            self._due -= 1.0
        self._refuse_non_finite(metrics)
        metrics["agent/lr"] = self.phases["critic"].adam.param_groups[0]["lr"]
        for summands in self.phases_of.sums.values():
            summands.observe(metrics)
        self.version += 1
        return metrics

    def check_replay(self, replay: Replay) -> None:
        """Refuses a replay that this agent cannot use.

        Raises:
            ConfigError: by name, with what works instead.
        """
        keys = (*KEYS, "truncated") if self.n_step > 1 else KEYS
        self.prioritised = replay.sampler.takes_priority
        self.extra = ("priority_weight",) if replay.sampler.weighs else ()
        length = self.n_step if self.n_step > 1 else None
        check_replay(replay, self.option, keys=keys, length=length, priorities=True, reuses=True)
        self.checked = replay.write_count > 0

    def plan_updates(self, updates: int) -> None:
        """Tells the learning rate's schedule how many updates the run has.

        Raises:
            ConfigError: its warm-up is longer than the gradient steps that they make.
        """
        trained = updates - max(0, -(-self.learning_starts // self.rows) - 1)
        self.learning_rate.plan(max(1, int(trained * self.updates_per_step * self.rows)))

    def _set_rate(self) -> None:
        """The rate of the gradient step that comes next."""
        if not self.learning_rate.moves:
            return
        last = (self.learning_rate.total or math.inf) - 1  # a replay that was full at once makes more steps
        rate = self.learning_rate(int(min(self.gradient_steps, last)))
        for group in [group for adam in self._adams().values() for group in adam.param_groups]:
            group["lr"] = rate

    def _train_once(self, replay: Replay, standardise: bool) -> Metrics:
        sample = self._draw(replay)
        batch = prepare_batch(sample, self.device, *self.extra)
        shape = (2, self.batch_size, self.policy.action_dim)
        noise = torch.randn(shape, generator=self.generator, device=self.device)
        if self.draws_members:
            batch["members"] = torch.randperm(self.draws_members, generator=self.generator, device=self.device)
        if standardise:
            self._update_normalizers(batch["observation"])
        self._set_rate()
        self.gradient_steps += 1
        if self.shard.world > 1:
            self.inner_generator = self.shard.stream(self.generator, self.gradient_steps)
        step = self.gradient_step if self.graph is None else self.graph
        metrics = step(batch, noise, self.gradient_steps % self.policy_delay == 0)
        if self.prioritised:
            metrics = dict(metrics)
            replay.update_priority(sample["index"], metrics.pop("td_error"))
        return metrics

    def _draw(self, replay: Replay) -> TensorDictBase:
        if self.n_step == 1:
            return replay.sample(self.batch_size, keys=KEYS, version=self.version)
        window = replay.sample(self.batch_size, length=self.n_step, version=self.version)
        if self.gradient_steps == 0:
            check_time_order(window)
        return nstep_transitions(window, self.n_step)

    def _update_normalizers(self, observation: Tensor) -> None:
        """Moves the moments of every network, which are the policy's own unless it has them in a form of its own."""
        shared = getattr(self.policy, "normalizer", None)
        for name, module in self._modules().items():
            if name == "policy" or module.normalizer is not shared:
                module.update_normalizer(observation)

    def _refuse_non_finite(self, metrics: dict[str, Any]) -> None:
        """One look a collection: a NaN in a loss means the parameters are lost since the last checkpoint."""
        for name, value in metrics.items():
            if not math.isfinite(float(value)):
                raise NonFiniteError(
                    f"{name} is {float(value)} at gradient step {self.gradient_steps}: resume from the last checkpoint "
                    "with a lower agent.lr, or look for extreme rewards"
                )

    # ------------------------------------------------------------------ state

    def _modules(self) -> dict[str, Any]:
        nets = {"policy": self.policy, "critic": self.nets.critic, "target": self.nets.target, "value": self.nets.value}
        return {name: module for name, module in nets.items() if module is not None}

    def _adams(self) -> dict[str, torch.optim.Optimizer]:
        adams = {name: phase.adam for name, phase in self.phases.items()}
        return adams if self.alpha_adam is None else {**adams, "alpha": self.alpha_adam}

    def state_dict(self) -> dict[str, Any]:
        """Networks, optimisers, entropy weight, controllers, stream and counters."""
        return {
            **{name: dict(module.state_dict()) for name, module in self._modules().items()},
            "log_alpha": self.nets.log_alpha.detach(),
            "adam": {name: adam.state_dict() for name, adam in self._adams().items()},
            "coefficients": {name: summands.state_dict() for name, summands in self.phases_of.sums.items()},
            "generator": self.generator.get_state(),
            "version": self.version,
            "gradient_steps": self.gradient_steps,
            "due": self._due,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        for name, module in self._modules().items():
            module.load_state_dict(state[name])
        with torch.no_grad():
            self.nets.log_alpha.copy_(state["log_alpha"])
        for name, adam in self._adams().items():
            adam.load_state_dict(state["adam"][name])
        for name, summands in self.phases_of.sums.items():
            summands.load_state_dict(state["coefficients"][name])
        self.generator.set_state(state["generator"])
        self.version, self.gradient_steps, self._due = state["version"], state["gradient_steps"], state["due"]


def make_phases(
    target: Node, aggregate: Node, value: Node | None, critic: Mapping[str, Any] | None, actor: Mapping[str, Any] | None
) -> Phases:
    """The losses of the agent's settings, those of critic and actor filled in where they are None.

    Raises:
        ConfigError: an unknown part, or a state value that is missing or that nothing reads.
    """
    parts = Phases(target, aggregate, value, critic or {"error": "squared_error"}, actor or {"policy": "pathwise"})
    parts.check_value()
    return parts


def make_networks(
    policy: BoxPolicy,
    log_alpha: Tensor,
    device: torch.device,
    state_value: bool,
    *,
    critics: int,
    hidden: tuple[int, ...],
    layer_norm: bool,
    seed: int,
) -> Networks:
    """The critic, its slow copy and, if asked for, a state value, for a policy's observations and actions."""
    standardised, features = standardises(policy), image_features(policy)
    critic = QEnsemble(
        policy.space,
        num=critics,
        hidden=hidden,
        layer_norm=layer_norm,
        stacked=device.type == "cuda",
        normalize_observation=standardised,
        image_features=features,
        seed=seed,
    ).to(device)
    value = None
    if state_value:
        value = ValueCritic(
            policy.space,
            hidden,
            activation="relu",
            normalize_observation=standardised,
            image_features=features,
            seed=seed + 1,
        ).to(device)
    nets = Networks(policy, critic, copy.deepcopy(critic).requires_grad_(False), value, log_alpha)
    moments = getattr(policy, "normalizer", None)
    if isinstance(moments, RunningNormalizer):  # one set for all: critics see what the policy sees
        for net in (nets.critic, nets.target, nets.value):
            if net is not None:
                net.normalizer = moments
    return nets


def check_time_order(window: TensorDictBase) -> None:
    """Refuses windows whose rows do not follow one another in time.

    Args:
        window: ``[B, T]`` with ``observation``, ``next_observation``, ``terminated``, ``truncated``.

    Raises:
        ConfigError: an observation is not the successor of the one before, though no episode ended between.
    """
    goes_on = ~(window["terminated"] | window["truncated"])[:, :-1]
    follows = (window["observation"][:, 1:] == window["next_observation"][:, :-1]).flatten(2).all(-1)
    if bool((goes_on & ~follows).any()):
        raise ConfigError(
            "agent.n_step needs rows in the order of time, and consecutive rows of this replay do not follow one "
            "another (rollout=stored shuffles them); set agent.n_step=1"
        )
