"""Value-based actor-critics: a critic target, a list of actor terms, and where a state value is used its loss.

SAC, TD3, TD3+BC, IQL, AWR, RLPD and their relatives are this agent with other parts and another replay.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unified_rl.agents.sac import KEYS, prepare_batch
from unified_rl.correction.lookup import bind
from unified_rl.errors import ConfigError, NonFiniteError
from unified_rl.objectives.coefficients import coefficient
from unified_rl.objectives.offline_value import ACTORS, AGGREGATES, TARGETS, VALUES
from unified_rl.objectives.transitions import Loss, Networks, Transitions
from unified_rl.policies.critics import QEnsemble, ValueCritic
from unified_rl.replay import Replay

Node = str | Mapping[str, Any]


class ActorCritic:
    """One gradient step: value, critic, actor and entropy weight, each with its own optimiser, then the slow copy.

    Args:
        policy: any policy with ``nll``, and with ``rsample`` where a part draws fresh actions.
        generator: stream of the noise.
        rows, length: of one collection; they set how many gradient steps are due after it.
        correction: unused.
        target: of the critic, a name of :data:`TARGETS` or a mapping.
        aggregate: of the members in the target, a name of :data:`AGGREGATES`.
        value: loss of a state value, a name of :data:`VALUES`; None uses none.
        actor: terms of the actor's loss by name; each a mapping with ``name`` in :data:`ACTORS`, its settings and
            ``coefficient`` (a number or a schedule).
        lr, batch_size, updates_per_step, learning_starts, gamma, tau, critics, critic_hidden, layer_norm, alpha,
            tune_alpha, target_entropy, policy_delay: as of :class:`~unified_rl.agents.sac.SAC`.

    Raises:
        ConfigError: an unknown part, or one that the policy cannot support.
    """

    def __init__(
        self,
        policy: Any,
        generator: torch.Generator,
        rows: int,
        length: int | None = None,
        correction: Any = None,
        target: str | dict[str, Any] = "soft",
        aggregate: str | dict[str, Any] = "least",
        value: str | dict[str, Any] | None = None,
        actor: dict[str, Any] | None = None,
        lr: float = 3e-4,
        batch_size: int = 256,
        updates_per_step: float = 1.0,
        learning_starts: int = 1000,
        gamma: float = 0.99,
        tau: float = 0.005,
        critics: int = 2,
        critic_hidden: tuple[int, ...] = (256, 256),
        layer_norm: bool = False,
        alpha: float = 1.0,
        tune_alpha: bool = True,
        target_entropy: float | None = None,
        policy_delay: int = 1,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        self.policy, self.generator, self.gamma, self.tau = policy, generator, gamma, tau
        self.rows = rows * (length or 1)
        self.batch_size, self.updates_per_step, self.learning_starts = batch_size, updates_per_step, learning_starts
        self.policy_delay, self.device = policy_delay, torch.device(device)
        pool, _ = bind(aggregate, AGGREGATES, "agent.aggregate")
        made, _ = bind(target, TARGETS, "agent.target")
        self.critic_target = lambda t: made(t, pool)
        self.value_loss: Loss | None = None if value is None else bind(value, VALUES, "agent.value")[0]
        self.actor: dict[str, tuple[Loss, Any]] = {}
        for name, node in (actor or {"policy": {"name": "pathwise"}}).items():
            term, extra = bind(node, ACTORS, f"agent.actor.{name}", ["coefficient"])
            self.actor[name] = term, coefficient(extra.get("coefficient", 1.0))
        self._refuse(target, tune_alpha)
        sizes = (policy.observation_dim, policy.action_dim)
        bounds = {"action_low": policy.action_low.tolist(), "action_high": policy.action_high.tolist()}
        critic = QEnsemble(*sizes, critics, critic_hidden, layer_norm=layer_norm, seed=seed, **bounds).to(self.device)
        state = None if value is None else ValueCritic(sizes[0], critic_hidden, activation="relu", seed=seed + 1)
        self.nets = Networks(
            policy,
            critic,
            copy.deepcopy(critic).requires_grad_(False),
            None if state is None else state.to(self.device),
            torch.tensor(math.log(alpha), device=self.device, requires_grad=tune_alpha),
        )
        self.target_entropy = -float(policy.action_dim) if target_entropy is None else target_entropy
        self.parameters: dict[str, list[Tensor]] = {"critic": list(critic.parameters())}
        if state is not None:
            self.parameters["value"] = list(state.parameters())
        self.parameters["actor"] = [p for p in policy.parameters() if p.requires_grad]
        if tune_alpha:
            self.parameters["alpha"] = [self.nets.log_alpha]
        self.adam = {name: torch.optim.Adam(p, lr=lr, fused=True) for name, p in self.parameters.items()}
        self.progress = 0.0
        self.version = self.gradient_steps = 0
        self._due = 0.0

    def _refuse(self, target: Node, tune_alpha: bool) -> None:
        names = {getattr(term, "func", term).__name__ for term, _ in self.actor.values()}
        draws = names & {"pathwise", "squared"} or "state_value" not in str(target)
        if draws and not hasattr(self.policy, "rsample"):
            raise ConfigError(
                f"agent.target or agent.actor draws fresh actions with gradient, and {type(self.policy).__name__} has "
                "no rsample; use policy=tanh_gaussian, or agent.target=state_value with an actor of name weighted"
            )
        if tune_alpha and "pathwise" not in names:
            raise ConfigError("agent.tune_alpha tunes the entropy of pathwise actors; set agent.tune_alpha=false")

    # ------------------------------------------------------------------ one gradient step

    def gradient_step(self, batch: dict[str, Tensor], noise: Tensor) -> dict[str, Tensor]:
        """Every phase once; ``batch`` and ``noise`` as of :class:`Transitions`."""
        metrics: dict[str, Tensor] = {}
        if self.value_loss is not None:
            metrics |= self._phase("value", batch, noise, self.value_loss)
        metrics |= self._phase("critic", batch, noise, self.critic_loss)
        if self.gradient_steps % self.policy_delay == 0:
            metrics |= self._phase("actor", batch, noise, self.actor_loss)
            if "alpha" in self.adam:
                self.nets.log_alpha.grad = metrics["policy/entropy"] - self.target_entropy
                self.adam["alpha"].step()
        target, critic = list(self.nets.target.parameters()), self.parameters["critic"]
        torch._foreach_lerp_(target, critic, self.tau)
        return metrics

    def _phase(self, name: str, batch: dict[str, Tensor], noise: Tensor, loss: Loss) -> dict[str, Tensor]:
        t = Transitions(batch, self.nets, noise, self.generator)
        value = loss(t)
        self.adam[name].zero_grad(set_to_none=True)
        torch.autograd.backward(value, inputs=self.parameters[name])
        self.adam[name].step()
        return {f"loss/{name}": value.detach(), **t.metrics}

    def critic_loss(self, t: Transitions) -> Tensor:
        """Half the mean squared error of every member against the target, summed over members."""
        with torch.no_grad():
            target = self.critic_target(t)
        error = t.nets.critic(t.batch["observation"], t.batch["action"]) - target
        return 0.5 * error.square().mean(-1).sum()

    def actor_loss(self, t: Transitions) -> Tensor:
        """The sum of the actor's terms."""
        total: Any = 0.0
        for term, schedule in self.actor.values():
            scale = schedule(self.progress, self.version)
            if scale:
                total = total + (term(t) if scale == 1.0 else scale * term(t))
        return total

    # ------------------------------------------------------------------ the trainer's interface

    def update(self, replay: Replay, progress: float = 0.0) -> dict[str, Any]:
        """The gradient steps that are due after one collection."""
        self.progress = progress
        if replay.write_count < self.learning_starts:
            return {}
        self._due += self.updates_per_step * self.rows
        metrics: dict[str, Any] = {}
        while self._due >= 1.0:
            batch = prepare_batch(replay.sample(self.batch_size, keys=KEYS, version=self.version), self.device)
            shape = (2, self.batch_size, self.policy.action_dim)
            noise = torch.randn(shape, generator=self.generator, device=self.device)
            self.gradient_steps += 1
            metrics = self.gradient_step(batch, noise)
            self._due -= 1.0
        for name, value in metrics.items():
            if not math.isfinite(float(value)):
                raise NonFiniteError(f"{name} is {float(value)} at gradient step {self.gradient_steps}")
        self.version += 1
        return metrics

    def _modules(self) -> dict[str, Any]:
        nets = {"policy": self.policy, "critic": self.nets.critic, "target": self.nets.target, "value": self.nets.value}
        return {name: module for name, module in nets.items() if module is not None}

    def state_dict(self) -> dict[str, Any]:
        """Networks, optimisers, entropy weight, stream and counters."""
        return {
            **{name: dict(module.state_dict()) for name, module in self._modules().items()},
            "log_alpha": self.nets.log_alpha.detach(),
            "adam": {name: adam.state_dict() for name, adam in self.adam.items()},
            "generator": self.generator.get_state(),
            "counters": [self.version, self.gradient_steps, self._due],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        for name, module in self._modules().items():
            module.load_state_dict(state[name])
        with torch.no_grad():
            self.nets.log_alpha.copy_(state["log_alpha"])
        for name, adam in self.adam.items():
            adam.load_state_dict(state["adam"][name])
        self.generator.set_state(state["generator"])
        self.version, self.gradient_steps, self._due = state["counters"]
