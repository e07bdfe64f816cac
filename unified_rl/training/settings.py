"""The scalar settings of a run. Imports no torch, so that the command line can check keys at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from unified_rl.errors import ConfigError
from unified_rl.instantiate import allowed, check_type, nearest
from unified_rl.ranges import Count, Float32, Name, NonNegative, Positive, Seed, Whole, ranged

LOGGERS = ("tensorboard", "csv", "wandb", "trackio", "mlflow")
"""What metrics are written to by name, beside ``metrics.jsonl``."""
MODES = ("max", "min")


@ranged()
@dataclass
class TrainSettings:
    """Top-level keys of ``unified-rl train``.

    Attributes:
        steps: budget of environment steps (control; a chunk of actions counts as those it has) or sampled
            conversations (language); 0 makes the warm start alone.
        epochs: the budget as visits of each training prompt, in place of ``steps``; of runs with a finite set of them.
        updates: the budget as a number of updates, in place of ``steps``.
        seed: the one seed; every random stream is derived from it.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        threads: intra-op threads of torch.
        runs: folder that holds run folders.
        name: name of the run folder; by default made of env, agent, correction, seed and time.
        run_dir: the run folder itself, overriding ``runs`` and ``name``.
        resume_existing: continue an unfinished run that ``run_dir`` holds instead of refusing it.
        eval_every: steps between evaluations; by default a twentieth of ``steps``; 0 evaluates at the end only.
        eval_episodes: held-out episodes (control) or prompts (language) of one evaluation; 0 (language)
            evaluates nothing. ``all`` asks every held-out prompt of a finite set once; a number above theirs asks each
            equally often.
        eval_deterministic: control: evaluate the policy without its sampling noise.
        log_every: steps between logged rows; by default a two-hundredth of ``steps``.
        checkpoint_every: steps between checkpoints; by default a fifth of ``steps``; 0 keeps the final one only.
        keep_checkpoints: how many checkpoints stay on disk.
        checkpoint_replay: store the replay in checkpoints (needed for a bit-exact resume).
        reward: token tasks: functions that reward answers, in place of the task's own verifier (or beside it, as
            ``task``): names of shipped ones, ``module:function``, or mappings ``{name: ..., weight: ...}``; see
            :class:`unified_rl.envs.language.rewards.Rewards`.
        reward_weights: of each of them in the sum; 1 by default.
        reward_workers: processes that call them; 0 calls them in the run's own.
        reward_seconds: wall time of one call.
        reward_retries: further tries of a call that raised or hung.
        reward_errors: what becomes of a row on which a function fails: ``stop`` ends the run, ``skip`` leaves the row
            out of the update.
        identity_check: verify on the first update that fresh data has ratio 1.
        progress: show a progress bar at a terminal, and elsewhere a line on standard error for each logged row.
        samples_rows: language: conversations that are written to ``samples.jsonl`` at a time; 0 writes none.
        samples_every: language: steps between written conversations of training; those of every evaluation are written
            anyway. By default as ``eval_every``; 0 writes evaluations alone.
        logger: where metrics go beside ``metrics.jsonl``: ``tensorboard``, ``csv``, ``wandb``, ``trackio``, ``mlflow``,
            or the dotted path of a class with the methods of :class:`~unified_rl.training.loggers.Logger`.
        callbacks: dotted paths of classes with the hooks of :class:`~unified_rl.training.callbacks.Callback`, or
            mappings with ``_target_`` and arguments; one alone needs no list.
        keep_best: metric whose best checkpoint is kept, for example ``eval/accuracy``, or a mapping ``{metric, mode}``
            with ``mode`` max or min; by default min of losses, max of all others.
        early_stopping: mapping ``{metric, patience, min_delta, mode}``: the run ends after ``patience`` values of the
            metric (5) of which none was better than the best before by more than ``min_delta`` (0).
        eval_sampling: language: how evaluation samples, ``{samples, temperature, top_p, ...}``: answers to each prompt
            (1) and settings that replace the policy's own sampling.
    """

    steps: Whole = 100_000
    epochs: Positive | None = None
    updates: Count | None = None
    seed: Seed = 0
    device: str = "cpu"
    threads: Count = 1
    runs: Name = "runs"
    name: str | None = None
    run_dir: str | None = None
    resume_existing: bool = False
    eval_every: Whole | None = None
    eval_episodes: Whole | Literal["all"] = 64
    eval_deterministic: bool = True
    log_every: Count | None = None
    checkpoint_every: Whole | None = None
    keep_checkpoints: Count = 2
    checkpoint_replay: bool = True
    reward: list[Any] | str | dict[str, Any] | None = None
    reward_weights: list[Float32] | None = None
    reward_workers: Whole = 0
    reward_seconds: Positive = 600.0
    reward_retries: Whole = 1
    reward_errors: Literal["stop", "skip"] = "stop"
    identity_check: bool = True
    progress: bool = True
    samples_rows: Whole = 8
    samples_every: Whole | None = None
    logger: tuple[str, ...] | str = ("tensorboard", "csv")
    callbacks: tuple[Any, ...] | str | dict[str, Any] = ()
    keep_best: str | dict[str, Any] | None = None
    early_stopping: dict[str, Any] | None = None
    eval_sampling: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Fills the intervals that follow from ``steps``."""
        if self.eval_every is None:
            self.eval_every = max(1, self.steps // 20)
        if self.log_every is None:
            self.log_every = max(1, self.steps // 200)
        if self.checkpoint_every is None:
            self.checkpoint_every = max(1, self.steps // 5)
        if self.samples_every is None:
            self.samples_every = self.eval_every or max(1, self.steps // 20)
        check_logger(self.logger)
        self.logger = (self.logger,) if isinstance(self.logger, str) else self.logger
        self.callbacks = (self.callbacks,) if isinstance(self.callbacks, str | dict) else self.callbacks
        for name, check in (
            ("keep_best", check_keep_best),
            ("early_stopping", check_early_stopping),
            ("eval_sampling", check_eval_sampling),
        ):
            if getattr(self, name) is not None:
                self._refuse_unseen(name, check(getattr(self, name)))

    def _refuse_unseen(self, name: str, found: Mapping[str, Any]) -> None:
        """Raises ConfigError for a metric of an evaluation that is switched off."""
        metric = str(found.get("metric", ""))
        if self.eval_episodes == 0 and metric.startswith("eval/"):
            raise ConfigError(
                f"{name} watches {metric}, and eval_episodes=0 evaluates nothing: name a metric of training, such as "
                "rollout/reward, or raise eval_episodes"
            )


def check_logger(names: Sequence[str] | str) -> None:
    """Refuses a name that is no logger's, and one that is given twice.

    Raises:
        ConfigError: names the nearest.
    """
    names = (names,) if isinstance(names, str) else names
    for name in names:
        if name not in LOGGERS and "." not in name and ":" not in name:
            raise ConfigError(f"logger has no {name!r}; {nearest(name, LOGGERS)}")
        if list(names).count(name) > 1:
            raise ConfigError(f"logger names {name!r} twice; give it once")


def check_callbacks(nodes: Sequence[Any] | str | dict[str, Any]) -> None:
    """Finds every class that is named.

    Raises:
        ConfigError: a path outside the allowed packages, or one that leads nowhere.
    """
    from unified_rl.training.callbacks import check_nodes

    check_nodes([nodes] if isinstance(nodes, str | dict) else nodes, allowed())


def check_keep_best(value: str | Mapping[str, Any]) -> dict[str, Any]:
    """``metric`` and ``mode`` of ``keep_best``.

    Raises:
        ConfigError: another key, no metric, or a mode that is none.
    """
    given = {"metric": value} if isinstance(value, str) else dict(value)
    known = _known(given, ("metric", "mode"), "keep_best")
    return _checked({"metric": "", "mode": usual_mode(known), **known}, "keep_best")


def usual_mode(given: Mapping[str, Any]) -> str:
    """``min`` of losses, ``max`` of everything else, where nobody says it."""
    metric = str(given.get("metric", ""))
    return "min" if metric.startswith("loss/") or metric.endswith("/nll") else "max"


def check_early_stopping(value: Mapping[str, Any]) -> dict[str, Any]:
    """``metric``, ``patience``, ``min_delta`` and ``mode`` of ``early_stopping``.

    Raises:
        ConfigError: another key, no metric, or a value out of its range.
    """
    defaults = {"metric": "", "patience": 5, "min_delta": 0.0, "mode": usual_mode(value)}
    found = _checked({**defaults, **_known(value, defaults, "early_stopping")}, "early_stopping")
    found["patience"] = check_type(found["patience"], Count, "early_stopping.patience")
    found["min_delta"] = check_type(found["min_delta"], NonNegative, "early_stopping.min_delta")
    return found


def check_eval_sampling(value: Mapping[str, Any]) -> dict[str, Any]:
    """``samples`` of ``eval_sampling``, and the fields of :class:`~unified_rl.policies.sampling.Sampling` it replaces.

    Raises:
        ConfigError: an unknown key, or a value out of its range.
    """
    import dataclasses
    import typing

    from unified_rl.policies.sampling import Sampling  # torch is slow to import

    hints = typing.get_type_hints(Sampling, include_extras=True)
    own = [field.name for field in dataclasses.fields(Sampling) if field.name != "vocabulary"]
    found = _known(value, ("samples", *own), "eval_sampling")
    if found.get("temperature") == 0:
        raise ConfigError(
            "eval_sampling.temperature=0 is the most likely answer, which every evaluation gives as "
            "eval/reward_greedy and eval/accuracy_greedy: leave it out"
        )
    return {key: check_type(item, hints.get(key, Count), f"eval_sampling.{key}") for key, item in found.items()}


def _known(given: Mapping[str, Any], names: Iterable[str], where: str) -> dict[str, Any]:
    for key in given:
        if key not in names:
            raise ConfigError(f"{where} has no key {key!r}; {nearest(key, names)}")
    return dict(given)


def _checked(found: dict[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(found["metric"], str) or not found["metric"]:
        raise ConfigError(
            f"{where}.metric is {found['metric']!r}; name a metric, for example eval/score or eval/accuracy"
        )
    if found["mode"] not in MODES:
        raise ConfigError(f"{where}.mode is {found['mode']!r}; it must be max or min")
    return found
