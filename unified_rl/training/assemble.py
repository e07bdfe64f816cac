"""A run from parts in a script: objects, classes, and options of the configuration groups, in any mixture."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from unified_rl import __version__
from unified_rl.config import build, compose, flatten, resolve_defaults, shipped_choices
from unified_rl.errors import CheckpointError, ConfigError
from unified_rl.instantiate import check_value, is_node, locate, parameters
from unified_rl.protocols import HasDiscount, Stateful
from unified_rl.replay import Replay, Sampler
from unified_rl.rollout import as_environment
from unified_rl.settling import suggest_rates
from unified_rl.training.checkpoint import FOLDER, checkpoints, intact_checkpoint, lock_run
from unified_rl.training.learner import refuse_alone
from unified_rl.training.provenance import CONFIG, META, check_run, meta_text, write_run
from unified_rl.training.run import Job
from unified_rl.training.seeding import derive
from unified_rl.training.trainer import Trainer
from unified_rl.training.verbs import restore
from unified_rl.wrapping import split, wrap

Part = Any
"""An option of the group, settings (with ``name`` for another option, or ``_target_``), a class, or an object."""
GROUPS = ("env", "policy", "agent", "correction", "replay", "rollout", "warm_start", "recipe")
STAND_INS = {"control": "two_route", "language": "chain_mod"}
"""Environments whose file chooses rollout and policy of their domain, for one that has no file."""


class Assembled:
    """A run of assembled parts, see :func:`assemble`.

    Attributes:
        folder: where metrics and checkpoints go, or None.
        config: the configuration; objects stand in it as they were given.
        env, policy, agent, rollout, replay: the parts.
    """

    def __init__(self, job: Job, trainer: Any, objects: Sequence[str]) -> None:
        self.trainer, self.config, self.folder, self.objects = trainer, job.cfg, trainer.folder, list(objects)
        self._close = job.close
        self.env, self.policy, self.agent = job.env, job.policy, trainer.agent
        self.rollout, self.replay = trainer.rollout, trainer.replay

    @property
    def steps(self) -> int:
        """Environment steps, or sampled conversations, behind the updates so far."""
        return int(self.trainer.steps)

    def update(self) -> dict[str, float]:
        """Collects rows and trains once; nothing is logged, evaluated or saved.

        Returns:
            The metrics of this collection and this update.

        Raises:
            ConfigError: the budget ``steps`` is used up.
        """
        if self.trainer.updates >= self.trainer.planned:
            raise ConfigError(f"the budget of steps={self.trainer.settings.steps} is used up; assemble with more")
        self.trainer.update()
        return dict(self.trainer.means.pop())

    def run(self) -> list[dict[str, Any]]:
        """Trains until the budget is used; evaluates, logs and (with a folder) saves at the intervals of the settings.

        Returns:
            The logged rows, in order: ``update``, ``steps``, ``wall_seconds`` and metrics such as ``eval/score``.

        Raises:
            CheckpointError: another process uses the folder.
            NonFiniteError: a NaN; a checkpoint from before it exists.
            KeyboardInterrupt: after a checkpoint was written.
        """
        with lock_run(self.folder) if self.folder else nullcontext():
            self._describe("running")
            try:
                self.trainer.run()
            except BaseException as error:
                self._describe("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
                raise
            finally:
                self._close()
            self._describe("finished")
        return list(self.trainer.log.rows)

    def evaluate(self) -> dict[str, float]:
        """Held-out evaluation of the policy as it is, ``eval/score`` and others; training is not disturbed."""
        return dict(self.trainer.evaluate())

    def save(self) -> Path:
        """Writes a checkpoint.

        Raises:
            ConfigError: there is no folder.
            CheckpointError: the disk is full.
        """
        if self.folder is None:
            raise ConfigError("there is no folder to save to; assemble with folder=...")
        self._describe("running")
        return Path(self.trainer.save())

    def close(self) -> None:
        """Ends the processes of a run that is not :meth:`run` to its end: workers, and those of reward functions."""
        self._close()

    def _describe(self, status: str) -> None:
        """``config.yaml`` and ``meta.json``, which names the parts that no configuration can build again."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        meta = {"unified_rl": __version__, "seed": self.config["seed"], "assembled": self.objects, "status": status}
        config = yaml.safe_dump(_named(self.config), sort_keys=False)
        write_run(self.folder, {CONFIG: config, META: meta_text(meta)}, ended=status != "running")


def assemble(
    env: Part,
    policy: Part = None,
    *,
    agent: Part = None,
    correction: Part = None,
    replay: Part = None,
    rollout: Part = None,
    warm_start: Part = None,
    recipe: Part = None,
    eval_env: Any = None,
    steps: int | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    allow: Sequence[str] = (),
    config_dirs: Sequence[str] = (),
    callbacks: Sequence[Any] = (),
    **settings: Any,
) -> Assembled:
    """Puts a run together without a configuration file.

    A part is the name of an option (``"ppo"``), a mapping of settings (``{"name": "ppo", "lr": 1e-3}``; without a name
    those of the default option; with ``_target_`` those of a class or its dotted path), a class, or an object. None is
    what the environment, agent and recipe bring along. Classes and objects need no ``allow``. Lanes, capacity, streams,
    the discount and the rows of an update follow from the parts, as in ``unified-rl train``; the same settings and seed
    train to the same weights.

    Args:
        env: the task. An object is given the run's seed; a control object fixes ``num_envs``.
        policy: what acts and is trained; an object fits the environment already.
        agent: the algorithm.
        correction: the off-policy correction, a preset or a :class:`~unified_rl.correction.Correction`.
        replay: a replay, or a sampler object for a replay of its own.
        rollout: how rows are collected: a name, settings or a class.
        warm_start: supervised stages; they run here, before this returns.
        recipe: a published system, see ``unified-rl train --help``.
        eval_env: a control object for evaluation; by default an object ``env`` is put back to where it was.
        steps: budget of environment steps or conversations (100,000); ``epochs=`` or ``updates=`` say it otherwise.
        seed: the one seed.
        folder: for metrics and checkpoints; None keeps the metrics in memory. With ``resume_existing=True`` a folder
            that holds a run is continued from its last checkpoint.
        allow: packages beside this one that dotted paths may name.
        config_dirs: folders with options of your own.
        callbacks: objects or classes with hooks, see :class:`~unified_rl.training.callbacks.Callback`.
        settings: the scalars of :class:`~unified_rl.training.settings.TrainSettings`, such as ``eval_episodes``,
            ``reward`` (also functions themselves), ``engine`` (``"ray"``, where no part is an object or class of the
            script), and dotted settings of a part that is an option: ``**{"agent.lr": 1e-3}``.

    Returns:
        The run, not yet trained.

    Raises:
        ConfigError: parts that do not fit together; the message names the setting.
        CheckpointError: the folder holds a run already.
    """
    parts = dict(zip(GROUPS, (env, policy, agent, correction, replay, rollout, warm_start, recipe), strict=True))
    if _is_object(rollout):
        raise ConfigError(
            "rollout takes a name, settings or a class, since the run gives it its policy and its streams"
        )
    parts["env"] = _environment(env, seed)
    cfg, objects = _configuration(
        parts, {**settings, **({} if steps is None else {"steps": steps}), "seed": seed}, allow, config_dirs
    )
    refuse_alone(cfg)
    _refuse_objects(cfg, objects)
    target = None if folder is None else Path(folder)
    holds = target is not None and bool(checkpoints(target / FOLDER))
    if holds and not cfg["resume_existing"]:
        raise CheckpointError(f"{target} holds a run already; choose another folder, or set resume_existing=True")
    found = None
    if holds and target is not None:
        check_run(target)
        found = intact_checkpoint(target)
    job = Job(cfg, allow, callbacks)
    try:
        job.watchers()
        job.tell_null_control()
        job.found_rows = "refuse" if found is None else "keep"
        if found is None:
            job.warm_start(lambda *progress: None)
        trainer = job.make_trainer(target)  # type: ignore[arg-type]
        _check_parts(parts, job, trainer)
        if eval_env is not None:
            job.eval_env = job.rewarded(as_environment(eval_env))
        elif _is_object(env) and job.env.domain == "control":
            trainer.evaluate = _undisturbed(job.env, job.evaluate)
        if found is not None:
            assert target is not None
            restore(trainer, target, found)
    except BaseException:
        job.close()
        raise
    return Assembled(job, trainer, objects)


def make_env(name: str, *, allow: Sequence[str] = (), config_dirs: Sequence[str] = (), **settings: Any) -> Any:
    """An environment of the library by the name of its option, ``make_env("two_route", num_envs=4, seed=1)``.

    Args:
        name: an option of group ``env``.
        allow: packages beside this one that its file may name.
        config_dirs: folders with options of your own.
        settings: of the environment.

    Raises:
        ConfigError: an unknown name or setting (names the nearest).
    """
    cfg = compose({"env": name, **{f"env.{key}": value for key, value in settings.items()}}, allow=allow,
                  config_dirs=config_dirs)  # fmt: skip
    taken = parameters(locate(cfg["env"]["_target_"], allow), allow)[0]
    wrapping, node = split(cfg["env"], taken)
    return wrap(build(node, allow=allow), wrapping, partial(build, allow=allow, setting="env"), cfg["env"].get("gamma"))


# ---------------------------------------------------------------------------------------------- parts


def _is_object(part: Part) -> bool:
    return not (part is None or isinstance(part, str | Mapping | type))


def _environment(env: Part, seed: int) -> Part:
    """An environment object, a control one started as a built one would be; anything else as it is."""
    if not _is_object(env):
        return env
    env = as_environment(env)
    if env.domain == "control":
        env.reset_batch(derive(seed, "env") % 2**31)
    return env


def _configuration(
    parts: Mapping[str, Part], settings: Mapping[str, Any], allow: Sequence[str], config_dirs: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """The composed configuration with objects and classes in it, and the groups that hold an object or a class."""
    own = {group: node for group, part in parts.items() if (node := _node(part)) is not None}
    chosen = {group: part for group, part in parts.items() if part is not None and group not in own}
    if "env" in own:
        chosen["env"] = STAND_INS[getattr(locate(own["env"]["_target_"], allow), "domain", None) or "control"]
    functions = settings.get("reward")  # functions themselves, which no file can say
    flat, env = flatten({**chosen, **{k: v for k, v in settings.items() if k != "reward"}}), parts["env"]
    if _is_object(env) and env.domain == "control" and "rollout" not in own:
        given = flat.setdefault("rollout.num_envs", env.num_envs)
        if given != env.num_envs:
            raise ConfigError(f"rollout.num_envs is {given}, but env has {env.num_envs} simulations; leave it out")
    cfg = compose(flat, config_dirs=config_dirs, allow=allow)
    if functions is not None:
        cfg["reward"] = functions
    for group, node in own.items():
        cfg[group] = check_value(node, group, allow)
        cfg["choices"][group] = getattr(node["_target_"], "__name__", str(node["_target_"]))
    suggest_rates(cfg, flat, shipped_choices(cfg) - set(own), allow)
    cfg = resolve_defaults(cfg, allow=allow)
    return cfg, [group for group, node in own.items() if not isinstance(node["_target_"], str)]


def _refuse_objects(cfg: Mapping[str, Any], objects: Sequence[str]) -> None:
    """Raises ConfigError for parts of a script in a run whose workers are to build them from its configuration."""
    reward = cfg.get("reward")
    rewards = reward if isinstance(reward, list | tuple) else [reward]
    told = [*objects, *(["reward"] if any(callable(one) for one in rewards) else [])]
    if cfg.get("engine") and told:
        raise ConfigError(
            f"engine=ray builds the run in every worker from its configuration, and {', '.join(told)} came as objects "
            "or classes of this script: name them (an option, or _target_ with the dotted path and allow=), or use "
            "engine=local"
        )


def _node(part: Part) -> dict[str, Any] | None:
    """The node of a part that no option describes."""
    if is_node(part):
        return dict(part)
    if isinstance(part, type):
        return {"_target_": part}
    if isinstance(part, Sampler):
        return {"_target_": Replay, "capacity": 1_000_000, "sampler": {"_target_": _always(part)}}
    if not _is_object(part):
        return None
    known: dict[str, Any] = {"sampler": {"_target_": _always(part.sampler)}} if isinstance(part, Replay) else {}
    known |= {"gamma": part.gamma} if isinstance(part, HasDiscount) and isinstance(part.gamma, float) else {}
    return {"_target_": _always(part), **known}


def _always(value: Any) -> Callable[..., Any]:
    """A target that gives the same object whatever the run passes to it."""

    def give(**arguments: Any) -> Any:
        return value

    give.__name__ = give.__qualname__ = type(value).__name__
    give.__module__ = type(value).__module__
    give.domain = getattr(value, "domain", None)  # type: ignore[attr-defined]
    give.learning_rates = lambda settings: getattr(value, "rates", None)  # type: ignore[attr-defined]
    return give


def _check_parts(parts: Mapping[str, Part], job: Job, trainer: Trainer) -> None:
    """Refuses objects that were made for another run than this one.

    Raises:
        ConfigError: another discount, an agent of another policy, or a replay of another layout.
    """
    env, agent = job.env, trainer.agent
    if isinstance(env, HasDiscount) and isinstance(agent, HasDiscount) and env.gamma != agent.gamma:
        raise ConfigError(f"env has gamma={env.gamma}, but the agent discounts by {agent.gamma}; make them equal")
    if _is_object(parts["agent"]) and agent.policy is not job.policy:
        raise ConfigError("the agent trains another policy than the one given; make both from the same object")
    replay = parts["replay"]
    if not isinstance(replay, Replay):
        return
    rollout = trainer.rollout
    lanes = 1 if rollout is None or rollout.length is None else rollout.rows
    if replay.ring.lanes != lanes:
        raise ConfigError(f"the replay has lanes={replay.ring.lanes}, but the rollout writes {lanes} lane(s)")
    if replay.cut:
        raise ConfigError(
            "the replay has cut=True, which masks all steps behind the first episode's end; make it with cut=False, "
            "or give its sampler alone, replay=SAMPLER"
        )


def _undisturbed(env: Stateful, evaluate: Callable[[], dict[str, float]]) -> Callable[[], dict[str, float]]:
    """Evaluation in the training environment, which goes on afterwards from where it was."""

    def evaluated() -> dict[str, float]:
        state = env.state_dict()
        try:
            return evaluate()
        finally:
            env.load_state_dict(state)

    return evaluated


def _named(value: Any) -> Any:
    """A configuration with dotted names in place of classes and objects, as YAML holds it."""
    if isinstance(value, Mapping):
        return {key: _named(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_named(item) for item in value]
    return f"{value.__module__}.{value.__qualname__}" if callable(value) else json.loads(json.dumps(value))
