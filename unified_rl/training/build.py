"""From a configuration to the parts of a run: who is built first, and what each part is told."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from unified_rl.config import build, check_run
from unified_rl.devices import device_of
from unified_rl.errors import ConfigError
from unified_rl.instantiate import REQUIRED, Parameter, is_node, locate, parameters
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.policies.pretrained import tokenizer_folder
from unified_rl.protocols import (
    ChecksIdentity,
    ChecksReplay,
    Demonstrates,
    EndsPretraining,
    Goals,
    HasGoals,
    HasPools,
    HasSplits,
    KeepsVersions,
    PlansUpdates,
    Rewarded,
)
from unified_rl.replay import HindsightReplay, WithDataset
from unified_rl.rollout import ControlRollout, LanguageRollout
from unified_rl.rollout.environment import make_environment
from unified_rl.rollout.feed import LocalFeed
from unified_rl.rollout.tickets import TicketFeed
from unified_rl.rollout.windows import executed_steps, fitted_windows, refuse_single_steps
from unified_rl.spaces import Space
from unified_rl.stopping import say
from unified_rl.training.best import Watch
from unified_rl.training.budget import open_budget, steps_of
from unified_rl.training.callbacks import Callbacks, make_callbacks
from unified_rl.training.engine import RayEngine, check_engine
from unified_rl.training.evaluation import (
    Scores,
    evaluate_control,
    evaluate_imitation,
    evaluate_language,
    held_out_loss,
)
from unified_rl.training.learner import refuse_alone
from unified_rl.training.limits import check_machine, check_model_folder, check_replay_memory, check_rows, row_size
from unified_rl.training.loggers import Logger, make_loggers
from unified_rl.training.memory_plan import (
    MemoryPlan,
    evaluated_rows,
    generation_batch_for,
    memory_plan,
    micro_batch_for,
    prefill_of,
)
from unified_rl.training.metric_names import MetricNames, names_of
from unified_rl.training.ranks import Ranks
from unified_rl.training.samples import SampleBook
from unified_rl.training.sampling_servers import check_sampling, check_servers
from unified_rl.training.seeding import derive, generator, scoped
from unified_rl.training.settings import TrainSettings, check_eval_sampling
from unified_rl.training.trainer import Trainer
from unified_rl.training.written import check_rollout
from unified_rl.units import Source

NODES = ("env", "policy", "agent", "correction", "replay", "rollout", "warm_start", "learner", "engine")
DISCOUNTS = {"control": 0.99, "language": 1.0}
"""Of agents whose ``gamma`` is None."""
SIMULATIONS = 16
"""Simulations of a control run whose configuration names no number, where the environment can make any."""


class Job:
    """Everything a run is made of, built from its configuration.

    A part is given only what its signature takes, so nobody carries parameters that it does not use. The discount is
    the agent's: environment (rewards inside a chunk) and rollout get ``agent.gamma``, and another value in one of
    their nodes is refused.

    Args:
        cfg: a composed configuration: nodes of :data:`NODES` and the scalars of
            :class:`~unified_rl.training.settings.TrainSettings`.
        allow: prefixes beside ``unified_rl.`` that configuration may build.
        objects: callbacks that are objects already.
        worker: which one of the run's workers this builds the rollout of. The first draws from the streams of a run
            without workers, each further one from its own.

    Attributes:
        found_rows: what becomes of rows that ``replay.path`` holds already: ``refuse`` (a new run), ``drop`` (a run
            that begins once more) or ``keep`` (one that goes on from a checkpoint).
        ranks: the processes that train the run.

    Raises:
        ConfigError: parts that do not fit together.
    """

    def __init__(
        self, cfg: dict[str, Any], allow: Sequence[str] = (), objects: Sequence[Any] = (), worker: int = 0
    ) -> None:
        self._begin(cfg, allow, objects, worker)
        check_model_folder(self.cfg["policy"].get("path"))
        self.policy = make_policy(self.cfg, self.env.policy_inputs(), self.allow).to(self.device)
        if isinstance(self.policy, CausalLM):
            self.policy.sample_as(check_servers(self.policy.engine, self.engine, worker))
        node = self.cfg.get("correction")
        self.correction = build(node, allow=self.allow, setting="correction") if node else None

    def _begin(self, cfg: dict[str, Any], allow: Sequence[str], objects: Sequence[Any], worker: int = 0) -> None:
        """Settings and environment."""
        cfg = check_run(cfg, allow)
        self.cfg, self.allow = cfg, list(allow)
        self._suffix = f"/{worker}" if worker else ""
        self.feed: TicketFeed | None = None
        self.found_rows: Literal["refuse", "drop", "keep"] = "refuse"
        self.ranks = Ranks()
        self.settings = _settings_of(cfg)
        if self.settings.steps == 0 and not cfg.get("warm_start"):
            raise ConfigError("steps=0 must be at least 1, or the run needs a warm_start to make")
        self._objects = list(objects)
        self.device = device_of(self.settings.device)
        self.seed = self.settings.seed
        self.collects = bool(cfg.get("rollout"))
        self._refuse_missing()
        self._check_machine()
        torch.set_num_threads(self.settings.threads)
        given = self._default("agent", "gamma")
        self._refuse_gammas(given)
        self._env_options: dict[str, Any] = {} if given is None else {"gamma": given}
        self._env_options |= self._tokenizer_of_model()
        self.rewards = self._rewards()
        self.env = self._environment("env", self._num_envs())
        self._check_domains()
        self.engine = self._engine()
        self._settle_budget()
        self.language = self.env.domain == "language"
        if not self.language and self.settings.eval_episodes == 0:
            raise ConfigError(
                "eval_episodes=0 must be at least 1 in control, where nothing need be held out for it (eval_every=0 "
                "evaluates at the end alone); language runs may do without"
            )
        self.gamma: float = DISCOUNTS[self.env.domain] if given is None else given
        self.book: SampleBook | None = None
        if self.language and self.settings.samples_rows:
            self.book = SampleBook(self.env, self.settings.samples_rows, self.seed)
        if not self.language and self.settings.eval_sampling:
            raise ConfigError("eval_sampling is of language models' answers, and this run is of control: leave it out")
        self.scores: Scores | None = None
        self._names: MetricNames | None = None
        self.eval_env: Any = None
        self.held_out: Any = None
        self._waiting: tuple[Any, Any] | None = None
        self.memory: MemoryPlan | None = None
        self.fits: Callable[[MemoryPlan], None] = MemoryPlan.require
        self.row_size = row_size(self.env.policy_inputs())

    @cached_property
    def loggers(self) -> list[Logger]:
        """Where metrics go. Evaluating a run makes none."""
        return make_loggers(self.settings.logger, self.allow)

    @cached_property
    def callbacks(self) -> Callbacks:
        """Of the configuration, and behind them ``objects``. Evaluating a run makes none."""
        return make_callbacks(self.settings.callbacks, self._objects, self.allow)

    def _engine(self) -> RayEngine | None:
        """Raises ConfigError where the node describes another kind of part."""
        node = self.cfg.get("engine")
        found = build(node, allow=self.allow, setting="engine") if node else None
        if found is not None and not isinstance(found, RayEngine):
            raise ConfigError(
                f"engine is a {type(found).__name__}, which collects nothing; use engine=ray or engine=local"
            )
        return found

    def _settle_budget(self) -> None:
        """The steps that ``epochs`` or ``updates`` come to, where the configuration does not say them.

        Raises:
            ConfigError: the run has no such thing, or ``steps`` is another number.
        """
        name = open_budget(self.cfg)
        if name is not None:
            self.cfg = {**self.cfg, "steps": self._steps_of(name)}
            self.settings = _settings_of(self.cfg)

    def _steps_of(self, name: str) -> int:
        target = locate(self.cfg["rollout"]["_target_"], self.allow) if self.collects else None
        return steps_of(name, self.cfg[name], self.env, target, self._default)

    def _check_budget(self) -> None:
        """Raises ConfigError where a script gives ``steps`` beside epochs or updates that come to another number."""
        for name in ("epochs", "updates"):
            if self.cfg.get(name) is not None and self.found_rows != "keep":
                found = self._steps_of(name)
                if found != self.settings.steps:
                    raise ConfigError(
                        f"{name}={self.cfg[name]} comes to {found} steps, and steps={self.settings.steps} says how "
                        "long the run is too: give one of them"
                    )

    def tell_null_control(self) -> None:
        """Says so where nothing will be learnt: meant as a control, but a long run for a slip of the pen."""
        if self.settings.steps and self._default("agent", "lr") == 0:
            say("agent.lr=0: the policy learns nothing (a null control); leave agent.lr out, or raise it, to train")

    def watchers(self) -> tuple[list[Logger], Callbacks]:
        """Both, made before anything is spent, so that what is missing is told then.

        Raises:
            ConfigError: a package that is not installed, or a class that is not allowed or not found.
        """
        if self.engine is not None:
            self.engine.check_installed()
        return self.loggers, self.callbacks

    # ------------------------------------------------------------------ what the configuration says

    def _parameters(self, node: Mapping[str, Any]) -> tuple[dict[str, Parameter], bool]:
        return parameters(locate(node["_target_"], self.allow), self.allow)

    def _default(self, group: str, key: str) -> Any:
        """What the node of a group says, or the signature of its target; None where neither says anything."""
        node = self.cfg.get(group)
        if not node:
            return None
        known, _ = self._parameters(node)
        default = known[key].default if key in known else None
        return node.get(key, None if default is REQUIRED else default)

    def _tokenizer_of_model(self) -> dict[str, str]:
        """The model folder as the task's ``tokenizer``, where the folder holds one and the task names none."""
        folder, named = (self.cfg.get("policy") or {}).get("path"), (self.cfg.get("env") or {}).get("tokenizer")
        found = tokenizer_folder(folder) if isinstance(folder, str) and named is None else None
        return {} if found is None else {"tokenizer": found}

    def _refuse_gammas(self, gamma: float | None) -> None:
        """Raises ConfigError where a node of another group holds a discount that is not the agent's."""
        gamma = DISCOUNTS["control"] if gamma is None else gamma  # language tasks and rollouts have no other
        for group in ("env", "rollout"):
            other = (self.cfg.get(group) or {}).get("gamma")
            if other is not None and other != gamma:
                raise ConfigError(
                    f"{group}.gamma={other} and agent.gamma={gamma} differ, but a run has one discount: leave "
                    f"{group}.gamma out and set agent.gamma"
                )

    def _refuse_missing(self) -> None:
        """Raises ConfigError where a group is none that the agent needs, or one that it does not take."""
        needed, takes_any = self._parameters(self.cfg["agent"])
        correction = needed.get("correction")
        agent = self._agent_name
        if self.collects and correction and correction.default is REQUIRED and not self.cfg.get("correction"):
            raise ConfigError(
                f"correction=none, but agent={agent} needs one; choose it with correction=NAME "
                "(correction=reinforce corrects nothing)"
            )
        if correction is None and not takes_any and self.cfg.get("correction"):
            raise ConfigError(
                f"correction={self.cfg['correction'].get('name')} would be of no effect: agent={agent} takes none; use "
                "correction=none, or agent=policy_gradient"
            )
        if not self.collects and self.cfg.get("replay") and "replay" not in needed and not takes_any:
            name = (self.cfg.get("choices") or {}).get("replay") or self.cfg["replay"]["_target_"]
            raise ConfigError(
                f"replay={name} would be of no effect: agent={agent} keeps rows of its own; use replay=none"
            )
        if self.collects and not self.cfg.get("replay"):
            raise ConfigError(
                f"replay=none, but agent={agent} learns from rows that a rollout collects; choose replay=fresh or "
                "replay=uniform"
            )

    def _check_domains(self) -> None:
        """Raises ConfigError for a rollout of the other domain than the environment's."""
        node = self.cfg.get("rollout")
        domain = getattr(locate(node["_target_"], self.allow), "domain", None) if node else None
        if isinstance(domain, str) and domain != self.env.domain:
            choices = self.cfg.get("choices") or {}
            raise ConfigError(
                f"rollout={choices.get('rollout')} collects in {domain} environments, and env={choices.get('env')} is "
                f"of {self.env.domain}: use rollout={self.env.domain} with an agent of that domain"
                + (" (agent=policy_gradient)" if self.env.domain == "language" else " (agent=ppo, agent=sac)")
            )

    def _check_machine(self) -> None:
        """Raises ConfigError for more threads or simulations than this machine can hold."""
        node = self.cfg.get("env")
        domain = getattr(locate(node["_target_"], self.allow), "domain", None) if node else None
        control = None if domain is None else domain == "control"
        check_machine(self.settings.threads, self.settings.eval_episodes, self._num_envs(), self._default, control)

    def _num_envs(self) -> int:
        given = self._default("rollout" if self.collects else "agent", "num_envs")
        return int(given or (SIMULATIONS if self.collects else 1))

    def _integer(self, name: str) -> int:
        return derive(self.seed, name) % 2**31

    # ------------------------------------------------------------------ building

    def build(self, node: Mapping[str, Any], setting: str, **offered: Any) -> Any:
        """The object of the node ``setting``, given what its signature takes of what is offered."""
        taken, takes_any = self._parameters(node)
        given = {key: value for key, value in offered.items() if takes_any or key in taken}
        return build(dict(node), allow=self.allow, setting=setting, **given)

    def _environment(self, stream: str, num_envs: int) -> Any:
        node = self.cfg.get("env")
        if not node:
            raise ConfigError("this run has no environment; choose one with env=NAME")
        taken, _ = self._parameters(node)
        sizes = {key: value for key, value in self._env_options.items() if key in taken}
        if "tokenizer" in sizes:
            node = {key: value for key, value in node.items() if key != "tokenizer"}
        domain = getattr(locate(node["_target_"], self.allow), "domain", None)
        seed = self._integer(stream if domain == "language" else f"{stream}{self._suffix}")  # of a task: its data
        env = make_environment(
            node,
            taken,
            lambda own: self.build(own, "env", seed=seed, num_envs=num_envs, **sizes),
            num_envs=num_envs,
            seed=seed,
            gamma=self._default("agent", "gamma"),
            allow=self.allow,
        )
        return self.rewarded(env)

    def rewarded(self, env: Any) -> Any:
        """An environment with the reward functions of the run, where it has any.

        Raises:
            ConfigError: there are some, and the environment is no token task.
        """
        if self.rewards is not None:
            if not isinstance(env, Rewarded):
                raise ConfigError(
                    f"reward=... rewards answers of token tasks derived from unified_rl.envs.language.LanguageTask, "
                    f"and env={(self.cfg.get('choices') or {}).get('env')} ({type(env).__name__}) is none"
                )
            env.reward_with(self.rewards)
        return env

    def _rewards(self) -> Any:
        """The reward functions of the run; None where the task's own verifier is the reward.

        Raises:
            ConfigError: a function that cannot be had, or settings of functions where there is none.
        """
        settings = self.settings
        options = {
            "weights": settings.reward_weights,
            "workers": settings.reward_workers,
            "seconds": settings.reward_seconds,
            "retries": settings.reward_retries,
            "errors": settings.reward_errors,
        }
        if settings.reward is None:
            plain = TrainSettings()
            for name, value in options.items():
                if value != getattr(plain, f"reward_{name}"):
                    raise ConfigError(f"reward_{name} would be of no effect: this run has no reward=[...]")
            return None
        functions = settings.reward if isinstance(settings.reward, list) else [settings.reward]
        node = {"_target_": "unified_rl.envs.language.rewards.Rewards", "functions": functions, **options}
        return build(node, allow=self.allow, setting="reward")

    def close(self) -> None:
        """Ends the run's workers, and processes of its reward functions, which start again where one is called."""
        if self.feed is not None:
            self.feed.close()
        if self.rewards is not None:
            self.rewards.close()
        policy = getattr(self, "policy", None)
        if isinstance(policy, CausalLM) and policy.sampler is not None:
            policy.sampler.close()

    def make_trainer(self, folder: Path | None, display: Any = None) -> Trainer:
        """Agent, rollout and replay around the policy as it is now (after any warm start)."""
        self._check_budget()
        if not self.ranks.parallel:
            refuse_alone(self.cfg)
        if not self.collects:
            check_engine(self.engine, self._agent_name, None, None, self.cfg)
            if isinstance(self.policy, CausalLM):
                check_sampling(self.policy.engine, self.engine, None)
            return self._trainer(folder, self.collecting_agent(), None, None, display)
        rollout, agent, replay = self._collecting(self.ranks.trained(self.policy))
        self._waiting = None
        self.ranks.place(agent, self.policy)
        return self._trainer(folder, agent, self._feed(rollout), replay, display)

    def _feed(self, rollout: Any) -> LocalFeed | TicketFeed:
        """Collects in this process, or in the engine's workers, each of which builds a rollout like this one."""
        if self.engine is None:
            return LocalFeed(rollout)
        if self.feed is None:
            self.feed = self.engine.make_feed(self.cfg, self.allow, self.policy, rollout)
        return self.feed

    def collecting_agent(self) -> Any:
        """An agent that collects by itself, whose policy becomes the job's."""
        agent = self._agent(self.policy, env=self.env, budget=self.settings.steps)
        self.policy = agent.policy
        return agent

    def _trainer(self, folder: Path | None, agent: Any, feed: Any, replay: Any, display: Any) -> Trainer:
        if feed is None:
            self._check_metrics(agent, None)
        trainer = Trainer(
            self.settings,
            folder,
            agent,
            feed,
            replay,
            self.evaluate,
            display,
            samples=self.book,
            answered=lambda: None if self.scores is None else self.scores.shown,
            callbacks=self.callbacks,
            loggers=self.loggers,
            config=self.cfg,
            space=space_of(self.env),
            ranks=self.ranks,
        )
        trainer.watch.names = self._names
        return trainer

    def _check_metrics(self, agent: Any, rollout: Any) -> None:
        """Raises ConfigError where ``keep_best`` or ``early_stopping`` waits for a metric that will not come.

        A run that goes on is not refused: what it has waited for in vain, it says at its end.
        """
        if (self.settings.keep_best is None and self.settings.early_stopping is None) or self.found_rows == "keep":
            return
        samples = (self.settings.eval_sampling or {}).get("samples", 1)
        callbacks = self.callbacks.members
        self._names = names_of(self.env, agent, rollout, callbacks, samples, self._imitates)
        if self.engine is not None:
            self._names = dataclasses.replace(self._names, known=self._names.known | self.engine.metrics)
        Watch(self.settings).check(self._names)

    def _check_late_metrics(self) -> None:
        """As :meth:`_check_metrics`, for names that an evaluation tells: one is made before a warm start is."""
        if self._names is None or not self._names.late or self.settings.eval_episodes == 0:
            return
        watch = Watch(self.settings)
        if any(one is not None and one.metric not in self._names.known for one in (watch.best, watch.stopper)):
            watch.names = self._names
            watch.see(self.evaluate(), 0, evaluated=True)

    def _collecting(self, policy: Any) -> tuple[Any, Any, Any]:
        """Rollout, agent and replay, checked against one another; what a rehearsal made is taken up."""
        self._check_problems()
        rollout, replay = self._waiting or (self.make_rollout(), None)
        self.held_out = getattr(rollout, "held_out", None)
        check_rows(self.row_size, rollout.rows, rollout.length, self._default)
        agent = self._agent(
            policy,
            **self._micro_batch(policy, rollout.rows),
            correction=self.correction,
            generator=generator(self.seed, "agent", self.device),
            rows=rollout.rows,
            length=rollout.length,
            device=str(self.device),
        )
        if isinstance(agent, PlansUpdates):
            agent.plan_updates(math.ceil(self.settings.steps / rollout.steps_per_collect))
        if isinstance(agent, KeepsVersions):
            agent.keep_versions(rollout.staleness)
        self._check_random_steps(rollout, agent)
        replay = self._replay(rollout.rows, rollout.length) if replay is None else replay
        if not self.language:
            if isinstance(replay, WithDataset):  # before they are given a discount
                refuse_single_steps(replay.stored, self.env, f"replay.data={self.cfg['replay']['data']}")
            discounted(getattr(rollout, "pool", None), "rollout.data", self.gamma)
            discounted(getattr(replay, "stored", None), "replay.data", self.gamma)
            if isinstance(replay, WithDataset):
                space = Space.of(self.env.policy_inputs())
                where = f"replay.data={self.cfg['replay']['data']}"
                replay.stored = fitted_windows(replay.stored, self.env, space, where)
        if isinstance(replay, HindsightReplay):
            replay.goals = self._goals()
        if isinstance(agent, ChecksReplay):
            agent.option = self._agent_name
            agent.check_replay(replay)
        check_engine(self.engine, self._agent_name, rollout, replay, self.cfg)
        if isinstance(self.policy, CausalLM):
            check_sampling(self.policy.engine, self.engine, rollout)
        self._check_metrics(agent, rollout)
        self.memory = memory_plan(policy, agent, rollout, self.env, self._evaluated_rows(), self.row_size)
        if self.memory is not None:
            self.fits(self.ranks.part_of(self.memory))
        refuse_idle_terms(agent, rollout, replay)
        check_rollout(agent, rollout, replay)
        return rollout, agent, replay

    def _goals(self) -> Goals:
        """Of the environment.

        Raises:
            ConfigError: it has none, or decides for several steps at once.
        """
        found = self.env.goals if isinstance(self.env, HasGoals) else None
        if found is None:
            raise ConfigError(
                "replay=her needs observations with achieved_goal and desired_goal (env=gymnasium env.flatten=true), "
                "compute_reward (or env=point_maze env.reward=sparse), and none of env.frame_stack, env.action_repeat, "
                f"env.chunk; {type(self.env).__name__} "
                "shows no such goals: use replay=uniform"
            )
        return found

    @property
    def _imitates(self) -> bool:
        """Whether the agent learns what it is shown, so that rows need no reward."""
        return "correction" not in self._parameters(self.cfg["agent"])[0]

    def _check_problems(self) -> None:
        """Raises ConfigError where a split that the run needs is empty, DataError where it cannot be judged."""
        if isinstance(self.env, HasSplits):
            if not self._imitates:
                self.env.require("train", judged=True)
            if self.settings.eval_episodes != 0:
                self.env.require("eval", judged=not self._imitates)

    def _rehearse(self) -> None:
        """Builds what comes after a warm start, so that it refuses before one is made; the agent's policy is a copy."""
        if self.collects:
            rollout, _, replay = self._collecting(copy.deepcopy(self.policy))
            self._waiting = rollout, replay
            self._check_late_metrics()
            self._feed(rollout).open()

    @property
    def _agent_name(self) -> str:
        """What the user called the agent."""
        return str((self.cfg.get("choices") or {}).get("agent") or self.cfg["agent"]["_target_"])

    def _check_random_steps(self, rollout: Any, agent: Any) -> None:
        """Raises ConfigError where actions drawn at random would be taken for the policy's own samples."""
        if getattr(rollout, "random_steps", 0) and getattr(agent, "rescores", False):
            raise ConfigError(
                f"rollout.random_steps={rollout.random_steps}, but agent={self._agent_name} learns from the policy's "
                "own samples alone: set it to 0, or use agent=sac"
            )

    def _agent(self, policy: Any, **offered: Any) -> Any:
        agent = self.build(self.cfg["agent"], "agent", policy=policy, seed=self._integer("agent"), **offered)
        if self.collects and agent.gamma != self.gamma:
            raise ConfigError(
                f"the agent's discount is {agent.gamma}, environment and rollout were made for {self.gamma}: "
                f"set agent.gamma={agent.gamma}"
            )
        if not self.settings.identity_check and isinstance(agent, ChecksIdentity):
            agent.verify_identity = False
        self.ranks.enlist(agent, self._agent_name)
        return agent

    def _micro_batch(self, policy: Any, rows: int) -> dict[str, int]:
        """``micro_batch`` for an agent of a language model, where nobody sets it and memory asks for one."""
        takes = "micro_batch" in self._parameters(self.cfg["agent"])[0]
        if not takes or not isinstance(policy, CausalLM) or self._default("agent", "micro_batch") is not None:
            return {}
        batch = self._default("agent", "batch_size") or self._default("agent", "minibatch") or rows
        found = micro_batch_for(policy, min(batch, rows), self.env.max_length)
        return {} if found is None else {"micro_batch": found}

    def make_rollout(self) -> Any:
        """The rollout, with streams of its own. It says ``rows`` and ``length``: of one collection, of a row."""
        rollout = self._made_rollout()
        samples = isinstance(rollout, LanguageRollout) and isinstance(self.policy, CausalLM)
        if samples and rollout.generation_batch is None:
            sizes = (rollout.steps_per_collect, self.env.max_length, rollout.group_size)
            rollout.generation_batch = generation_batch_for(self.policy, *sizes, prompt=prefill_of(self.env))
        return rollout

    def stream(self, name: str) -> torch.Generator:
        """The stream of a run without workers, on the CPU."""
        return generator(self.seed, name)

    def _made_rollout(self) -> Any:
        drawn = {"problem_generator": generator(self.seed, f"problems{self._suffix}")} if self.language else {}
        return self.build(
            self.cfg["rollout"],
            "rollout",
            env=self.env,
            policy=self.policy,
            gamma=self.gamma,
            device=str(self.device),
            generator=generator(self.seed, f"rollout{self._suffix}", self.device),
            streams=lambda name: generator(self.seed, f"{name}{self._suffix}"),
            **drawn,
        )

    def _replay(self, rows: int, length: int | None) -> Any:
        """The replay; a queue is as large as what can wait in it, since batches wait in the feed."""
        node = dict(self.cfg["replay"])
        sampler = build(node.pop("sampler"), allow=self.allow, setting="replay.sampler")
        if sampler.queue:
            node["capacity"] = 2 * rows * (length or 1)
        if "capacity" in node:
            storage, path = (self._default("replay", key) for key in ("storage", "path"))
            check_replay_memory(self.row_size, node["capacity"], storage, path)
        lanes = 1 if length is None else rows
        fixed: dict[str, Any] = {"cut": False}  # agents mind themselves where episodes end, and lose nothing
        if "discount" in self._parameters(node)[0]:
            fixed["discount"] = self.gamma
        seed = self._integer("replay")
        given: dict[str, Any] = {"sampler": sampler, "lanes": lanes, "seed": seed, **fixed}
        replay = build(node, allow=self.allow, setting="replay", **given)
        if getattr(replay, "write_count", 0) and self.found_rows != "keep":
            if self.found_rows == "refuse":
                replay.close()
                raise ConfigError(
                    f"replay.path={node.get('path')} holds {replay.write_count} rows of an earlier run, and this run "
                    "would begin with them: choose another folder, or remove this one"
                )
            replay.empty(seed)
        return replay

    def evaluate(self, intervals: bool = False) -> Scores:
        """Held-out evaluation with streams of its own, the same at every call."""
        seed = self._integer("evaluation")
        if self.settings.eval_episodes == 0:
            raise ConfigError("this run has eval_episodes=0; say how many prompts or episodes with --episodes N")
        if self.eval_env is None:
            self.eval_env = self._evaluation_env()
        count = self.episodes
        if self.language:
            told = evaluate_imitation(self.eval_env, self.policy, count) if self._imitates else {}
            unjudged = "eval" in getattr(self.eval_env, "unjudged", {})
            if told and unjudged and getattr(self.eval_env, "compares", True):
                self.scores = Scores({"eval/score": -told["eval/nll"], **told})
                return self.scores  # free text: nothing tells right from wrong
            sampling = check_eval_sampling(self.settings.eval_sampling or {})
            self.scores = evaluate_language(
                self.eval_env,
                self.policy,
                count,
                seed,
                self._evaluated_rows(),
                samples=sampling.pop("samples", 1),
                sampling=sampling,
                keep=() if self.book is None else self.book.of_prompts(count),
                intervals=intervals,
            )
            self.scores.update(told)
            self.scores.held_out = self._held_out(self.eval_env)
            return self.scores
        stream = generator(self.seed, "evaluation", self.device)
        greedy, device = self.settings.eval_deterministic, str(self.device)
        with torch.random.fork_rng(devices=[]):  # TorchRL's set_seed seeds the global stream, which training may use
            played = evaluate_control(self.eval_env, self.policy, seed, stream, greedy, device, count)
        loss = {} if self.held_out is None else held_out_loss(self.policy, self.held_out, seed)
        return Scores({**played, **loss})

    @property
    def episodes(self) -> int:
        """Episodes or prompts of an evaluation: of a finite set all, or so many that each is asked equally often.

        Raises:
            ConfigError: ``all`` of a task that makes problems without end.
        """
        wanted, env = self.settings.eval_episodes, self.env if self.eval_env is None else self.eval_env
        there = self._held_out(env)
        if wanted != "all":
            return wanted // there * there if 0 < there < wanted else wanted
        if not isinstance(env, HasPools):
            raise ConfigError(
                f"eval_episodes=all asks every held-out prompt, and {type(env).__name__} makes new ones without end: "
                "set a number of them"
            )
        return there

    @staticmethod
    def _held_out(env: Any) -> int:
        """Held-out problems of a finite set; 0 of one without end."""
        return env.pool_sizes()["eval"] if isinstance(env, HasPools) else 0

    def evaluation_env(self) -> Any:
        """Made anew."""
        return self._environment("evaluation", 1 if self.language else self._copies(self.episodes))

    def _evaluation_env(self) -> Any:
        """An environment of its own; a task whose files were gone through shares what was found in them."""
        if isinstance(self.env, HasSplits):
            return self.env.twin()
        return self.evaluation_env()

    def _evaluated_rows(self) -> int:
        """Conversations of an evaluation that are sampled together: as the rollout's, or as many as memory holds."""
        given = self._default("rollout", "generation_batch")
        samples = (self.settings.eval_sampling or {}).get("samples", 1)
        rows = evaluated_rows(self.episodes * samples, given)
        if given is None and isinstance(self.policy, CausalLM) and rows:
            return generation_batch_for(self.policy, rows, self.env.max_length, prompt=prefill_of(self.env)) or rows
        return rows

    def _copies(self, episodes: int) -> int:
        """Simulations for evaluation: one an episode in batches of our own, else no more than a run trains in."""
        target = locate(self.cfg["env"]["_target_"], self.allow)
        ours = (target.__module__ or "").startswith("unified_rl.") and not getattr(target, "costly_copies", False)
        return episodes if ours else min(episodes, max(SIMULATIONS, self._num_envs()))

    def warm_start(self, report: Callable[..., None]) -> None:
        """Runs the warm start that the configuration names, if any."""
        node = self.cfg.get("warm_start")
        if not node:
            return
        self._imitate(build(node, allow=self.allow, setting="warm_start"), report)
        if not self._imitates and isinstance(self.policy, EndsPretraining):
            self.policy.end_pretraining()  # as the agent will, so that the policy is the one that it begins with

    def _imitate(self, stage: Any, report: Callable[..., None]) -> None:
        if stage.run is not None:
            self._rehearse()
            stage.load_policy(self.policy)
            return
        if not isinstance(self.env, Demonstrates):
            raise ConfigError(
                f"the warm start imitates, and {type(self.env).__name__} has no demonstrations: set warm_start=none, "
                "or warm_start=from_run with the folder of a trained run"
            )

        self._rehearse()

        def make_agent(lr: float, **schedule: Any) -> Any:
            target = {"_target_": "unified_rl.agents.behavior_cloning.BehaviorCloning", "lr": lr, **schedule}
            stream = generator(self.seed, "warm_start_loss", self.device)
            chunk = None
            if isinstance(self.policy, CausalLM):
                chunk = micro_batch_for(self.policy, stage.batch_size, self.env.max_length)
            given = {"rows": stage.batch_size, "device": str(self.device), "micro_batch": chunk}
            return build(target, policy=self.policy, generator=stream, **given)

        stage.fit(self.env, make_agent, generator(self.seed, "demonstrations"), report)


def make_policy(cfg: Mapping[str, Any], inputs: Mapping[str, Any], allow: Sequence[str] = ()) -> Any:
    """The policy that a run begins with.

    Args:
        cfg: the run's configuration.
        inputs: what the environment gives to policies: its space, of which a class that takes sizes and bounds gets
            those.
        allow: prefixes that configuration may build.

    Raises:
        ConfigError: a policy that cannot be built, or that cannot act in the space.
    """
    node: Any = cfg.get("policy")
    seed = cfg.get("seed", 0)
    if not is_node(node):
        raise ConfigError(f"policy is {str(node)[:80]}; it must describe a part, with _target_ and its settings")
    taken, takes_any = parameters(locate(node["_target_"], allow), allow)
    if "space" in inputs and not (takes_any or "space" in taken):
        inputs = inputs["space"].sizes()
    with scoped(seed, "policy"):
        return build(node, allow=allow, setting="policy", seed=derive(seed, "policy") % 2**31, **inputs)


def space_of(env: Any) -> Space | None:
    """What a policy in it sees and does; None of language, and of an environment that says more than a space."""
    try:
        return Space.of(env.policy_inputs()) if env.domain == "control" else None
    except (ConfigError, TypeError):
        return None


def with_steps(cfg: dict[str, Any], allow: Sequence[str] = ()) -> dict[str, Any]:
    """A composed configuration with the ``steps`` that its ``epochs`` or ``updates`` come to; makes its environment."""
    if open_budget(cfg) is None:
        return cfg
    job = Job.__new__(Job)
    job._begin(cfg, allow, ())
    job.close()
    return {**cfg, "steps": job.settings.steps}


def _settings_of(cfg: Mapping[str, Any]) -> TrainSettings:
    names = {field.name for field in dataclasses.fields(TrainSettings)}
    return TrainSettings(**{k: v for k, v in cfg.items() if k in names})


def check_recorded_discount(rows: Any, setting: str, gamma: float) -> None:
    """Refuses rows that were recorded under another discount than the agent's: critics read the rows' own.

    Args:
        rows: with or without ``discount``, the power of the discount that a row's executed commands make; or None.
        setting: that names their folder.
        gamma: of the agent.

    Raises:
        ConfigError: a row's ``discount`` is no power of ``gamma``.
    """
    if rows is None or "discount" not in rows.keys():
        return
    found = rows["discount"].double().flatten().unique()
    wrong = found[executed_steps(found, gamma).isnan()]
    if len(wrong):
        raise ConfigError(
            f"the rows of {setting} were recorded under another discount, {float(wrong.max()):g}, and not under "
            f"agent.gamma={gamma}; set agent.gamma to theirs, or record rows of a run with this one"
        )


def discounted(rows: Any, setting: str, gamma: float) -> None:
    """Gives recorded transitions without a discount the agent's, of one step; refuses another than the agent's.

    Data sets of others have no such column: how the future counts is the learner's choice.

    Raises:
        ConfigError: as :func:`check_recorded_discount`.
    """
    check_recorded_discount(rows, setting, gamma)
    if rows is not None and "reward" in rows.keys() and "discount" not in rows.keys():
        rows["discount"] = torch.full(rows.batch_size, gamma)


def refuse_idle_terms(agent: Any, rollout: Any, replay: Any) -> None:
    """Refuses terms of the loss that would read nothing for the whole run: rows that others made, and nobody brings.

    Raises:
        ConfigError: names the first such term.
    """
    terms = getattr(getattr(agent, "objective", None), "terms", {})
    ours = isinstance(rollout, ControlRollout | LanguageRollout)  # a rollout of the user's own may mark its rows
    if not ours or getattr(rollout, "sources", {}) or isinstance(replay, WithDataset):
        return
    for term in terms.values():
        if term.rows.sources and Source.ONLINE not in term.rows.sources:
            names = ", ".join(Source(number).name.lower() for number in term.rows.sources)
            raise ConfigError(
                f"{term.where}.rows={names} reads rows that this run never has: add a source of them to "
                "rollout.sources (for example unified_rl.rollout.sources.Demonstrations), or choose other rows"
            )
