"""Soft Actor-Critic (arXiv:1801.01290, arXiv:1812.05905) from the shared replay."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from unified_rl.errors import ConfigError, NonFiniteError
from unified_rl.policies.critics import QEnsemble
from unified_rl.replay import Replay

KEYS = ("observation", "action", "reward", "discount", "terminated", "next_observation")


class SAC:
    """Twin soft critics, a reparameterised actor and an entropy weight that is tuned to a target.

    ``y = r + gamma (1 - terminated) (min_j Q'_j(s', a') - alpha log pi(a'|s'))``, critics by half the mean squared
    error, actor by ``mean(alpha log pi - min_j Q_j)``, ``log alpha`` by ``-log alpha (log pi + H)``. No importance
    ratio enters: the next action is drawn afresh.

    Args:
        policy: a policy with ``rsample`` (:class:`unified_rl.policies.gaussian.GaussianPolicy` with ``squash``).
        generator: stream of the reparameterisation noise.
        rows: transitions of one collection; sets how many updates are due after it.
        length: unused (transitions are drawn one by one).
        correction: unused (fresh next actions need none).
        lr: learning rate of actor, critics and entropy weight.
        batch_size: transitions of one gradient step.
        updates_per_step: gradient steps per environment step.
        learning_starts: environment steps before the first gradient step.
        gamma: discount of a step.
        tau: share of the critic in its target per gradient step.
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
        ConfigError: a policy that cannot be reparameterised, or a graph without CUDA.
    """

    def __init__(
        self,
        policy: Any,
        generator: torch.Generator,
        rows: int,
        length: int | None = None,
        correction: Any = None,
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
        compile: bool = False,
        cuda_graph: bool = False,
        seed: int = 0,
    ) -> None:
        if not hasattr(policy, "rsample"):
            raise ConfigError(
                f"agent=sac needs a reparameterised policy; use policy=tanh_gaussian, not {type(policy).__name__}"
            )
        if cuda_graph and torch.device(device).type != "cuda":
            raise ConfigError("agent.cuda_graph needs device=cuda")
        self.policy, self.generator = policy, generator
        self.batch_size, self.updates_per_step, self.learning_starts = batch_size, updates_per_step, learning_starts
        self.rows = rows * (length or 1)
        self.gamma, self.tau, self.policy_delay, self.tune_alpha = gamma, tau, policy_delay, tune_alpha
        self.device = torch.device(device)
        self.critic = QEnsemble(
            policy.observation_dim,
            policy.action_dim,
            num=critics,
            hidden=critic_hidden,
            layer_norm=layer_norm,
            action_low=policy.action_low.tolist(),
            action_high=policy.action_high.tolist(),
            stacked=self.device.type == "cuda",
            seed=seed,
        ).to(self.device)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = torch.tensor(math.log(alpha), device=self.device, requires_grad=tune_alpha)
        self.target_entropy = -float(policy.action_dim) if target_entropy is None else target_entropy
        self.actor_parameters = [p for p in policy.parameters() if p.requires_grad]
        self.critic_parameters: list[Tensor] = list(self.critic.parameters())
        self.target_parameters: list[Tensor] = list(self.target.parameters())
        on_gpu: dict[str, Any] = {"fused": True, "capturable": self.device.type == "cuda"}
        self.actor_adam = torch.optim.Adam(self.actor_parameters, lr=lr, **on_gpu)
        self.critic_adam = torch.optim.Adam(self.critic_parameters, lr=lr, **on_gpu)
        self.alpha_adam = torch.optim.Adam([self.log_alpha], lr=lr, **on_gpu) if tune_alpha else None
        self._critic_loss: Callable[..., Tensor] = torch.compile(self.critic_loss) if compile else self.critic_loss
        self._actor_loss: Callable[..., Any] = torch.compile(self.actor_loss) if compile else self.actor_loss
        self.graph = GraphedStep(self) if cuda_graph else None
        self.version = 0
        self.gradient_steps = 0
        self._due = 0.0

    # ------------------------------------------------------------------ losses

    def critic_loss(self, batch: dict[str, Tensor], noise: Tensor, alpha: Tensor) -> Tensor:
        """Half the mean squared error of every critic against the soft target, summed over critics."""
        with torch.no_grad():
            action, log_prob = self.policy.rsample(batch["next_observation"], noise=noise)
            following = self.target(batch["next_observation"], action).amin(0) - alpha * log_prob
            target = torch.addcmul(batch["reward"], batch["bootstrap"], following)
        error = self.critic(batch["observation"], batch["action"]) - target
        return 0.5 * error.square().mean(-1).sum()

    def actor_loss(self, batch: dict[str, Tensor], noise: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """``mean(alpha log pi - min_j Q_j)`` and the mean log-prob."""
        action, log_prob = self.policy.rsample(batch["observation"], noise=noise)
        value = self.critic(batch["observation"], action).amin(0)
        return (alpha * log_prob - value).mean(), log_prob.detach().mean()

    def gradient_step(self, batch: dict[str, Tensor], noise: Tensor, update_actor: bool) -> dict[str, Tensor]:
        """One step of critics, targets and (where due) actor and entropy weight.

        Args:
            batch: ``observation``, ``action``, ``next_observation`` ``[B, .]``, ``reward`` and ``bootstrap`` ``[B]``.
            noise: ``[2, B, a]`` standard normal.
            update_actor: whether the actor's step is due.
        """
        alpha = self.log_alpha.detach().exp()
        loss = self._critic_loss(batch, noise[0], alpha)
        self.critic_adam.zero_grad(set_to_none=True)
        loss.backward()
        self.critic_adam.step()
        metrics = {"loss/critic": loss.detach(), "policy/alpha": alpha}
        if update_actor:
            metrics |= self._actor_step(batch, noise[1], alpha)
        torch._foreach_lerp_(self.target_parameters, self.critic_parameters, self.tau)
        return metrics

    def _actor_step(self, batch: dict[str, Tensor], noise: Tensor, alpha: Tensor) -> dict[str, Tensor]:
        loss, log_prob = self._actor_loss(batch, noise, alpha)
        self.actor_adam.zero_grad(set_to_none=True)
        torch.autograd.backward(loss, inputs=self.actor_parameters)
        self.actor_adam.step()
        if self.alpha_adam is not None:
            self.log_alpha.grad = -(log_prob + self.target_entropy)
            self.alpha_adam.step()
        return {"loss/policy": loss.detach(), "policy/entropy": -log_prob}

    # ------------------------------------------------------------------ the trainer's interface

    def update(self, replay: Replay, progress: float = 0.0) -> dict[str, Any]:
        """The gradient steps that are due after one collection."""
        if replay.write_count < self.learning_starts:
            return {}
        self._due += self.updates_per_step * self.rows
        metrics: dict[str, Any] = {}
        while self._due >= 1.0:
            metrics = self._train_once(replay)
            self._due -= 1.0
        self._refuse_non_finite(metrics)
        self.version += 1
        return metrics

    def _train_once(self, replay: Replay) -> dict[str, Tensor]:
        batch = prepare_batch(replay.sample(self.batch_size, keys=KEYS, version=self.version), self.device)
        shape = (2, self.batch_size, self.policy.action_dim)
        noise = torch.randn(shape, generator=self.generator, device=self.device)
        self.gradient_steps += 1
        update_actor = self.gradient_steps % self.policy_delay == 0
        if self.graph is not None:
            return self.graph(batch, noise, update_actor)
        return self.gradient_step(batch, noise, update_actor)

    def _refuse_non_finite(self, metrics: dict[str, Any]) -> None:
        """One look a collection: a NaN in a loss means the parameters are lost since the last checkpoint."""
        for name, value in metrics.items():
            if not math.isfinite(float(value)):
                raise NonFiniteError(
                    f"{name} is {float(value)} at gradient step {self.gradient_steps}: resume from the last checkpoint "
                    "with a lower agent.lr, or look for extreme rewards"
                )

    def state_dict(self) -> dict[str, Any]:
        """Networks, optimisers, entropy weight, stream and counters."""
        return {
            "policy": dict(self.policy.state_dict()),
            "critic": dict(self.critic.state_dict()),
            "target": dict(self.target.state_dict()),
            "log_alpha": self.log_alpha.detach(),
            "actor_adam": self.actor_adam.state_dict(),
            "critic_adam": self.critic_adam.state_dict(),
            "alpha_adam": self.alpha_adam.state_dict() if self.alpha_adam is not None else None,
            "generator": self.generator.get_state(),
            "version": self.version,
            "gradient_steps": self.gradient_steps,
            "due": self._due,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        modules: dict[str, nn.Module] = {"policy": self.policy, "critic": self.critic, "target": self.target}
        for name, module in modules.items():
            module.load_state_dict(state[name])
        with torch.no_grad():
            self.log_alpha.copy_(state["log_alpha"])
        self.actor_adam.load_state_dict(state["actor_adam"])
        self.critic_adam.load_state_dict(state["critic_adam"])
        if self.alpha_adam is not None:
            self.alpha_adam.load_state_dict(state["alpha_adam"])
        self.generator.set_state(state["generator"])
        self.version, self.gradient_steps, self._due = state["version"], state["gradient_steps"], state["due"]


def prepare_batch(sample: TensorDictBase, device: torch.device) -> dict[str, Tensor]:
    """A replay sample as the tensors that a gradient step reads; ``bootstrap`` is ``discount * (1 - terminated)``."""
    batch = {key: sample[key].to(device, non_blocking=True) for key in KEYS}
    batch["bootstrap"] = batch.pop("discount") * (~batch.pop("terminated")).to(torch.float32)
    return batch


class GraphedStep:
    """One gradient step captured in a CUDA graph: inputs are copied into fixed buffers and the graph is replayed."""

    WARMUP = 3

    def __init__(self, agent: SAC) -> None:
        self.agent = agent
        self.inputs: tuple[dict[str, Tensor], Tensor] | None = None
        self.graphs: dict[bool, tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]] = {}
        self.calls = 0

    def __call__(self, batch: dict[str, Tensor], noise: Tensor, update_actor: bool) -> dict[str, Tensor]:
        """Runs eagerly on a side stream for the first calls, then captures, then replays."""
        self.calls += 1
        if self.calls <= self.WARMUP * max(1, self.agent.policy_delay):
            return self._warm(batch, noise, update_actor)
        if self.inputs is None:
            self.inputs = ({k: v.clone() for k, v in batch.items()}, noise.clone())
        for key, value in batch.items():
            self.inputs[0][key].copy_(value)
        self.inputs[1].copy_(noise)
        if update_actor not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                metrics = self.agent.gradient_step(*self.inputs, update_actor)
            self.graphs[update_actor] = (graph, metrics)
        graph, metrics = self.graphs[update_actor]
        graph.replay()
        return metrics

    def _warm(self, batch: dict[str, Tensor], noise: Tensor, update_actor: bool) -> dict[str, Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            metrics = self.agent.gradient_step(batch, noise, update_actor)
        torch.cuda.current_stream().wait_stream(stream)
        return metrics
