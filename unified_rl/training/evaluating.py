"""``unified-rl evaluate``: a run, one of its checkpoints, or a model's folder, on its own problems or others."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

from unified_rl.config import Override, compose, parse_overrides, resolve_defaults
from unified_rl.errors import CheckpointError, ConfigError
from unified_rl.files import replacing
from unified_rl.instantiate import check_value, locate, nearest, parameters
from unified_rl.policies.sampling import Sampling
from unified_rl.protocols import HasPools
from unified_rl.spaces import Space
from unified_rl.stopping import say
from unified_rl.training.build import Job
from unified_rl.training.checkpoint import BEST, FOLDER
from unified_rl.training.dataset import check_rows, record_dataset
from unified_rl.training.evaluation import Scores
from unified_rl.training.growing import plain
from unified_rl.training.provenance import CONFIG, read_config
from unified_rl.training.settings import TrainSettings, check_eval_sampling
from unified_rl.training.verbs import restored

MODEL = ("config.json", "adapter_config.json")
"""What a model's folder holds, one of them."""
SAMPLING = ("samples", *(field.name for field in dataclasses.fields(Sampling) if field.name != "vocabulary"))
REWARDS = tuple(field.name for field in dataclasses.fields(TrainSettings) if field.name.startswith("reward"))
SETTINGS = ("seed", "device", "threads", *REWARDS)
FAULTS = ("eval/scorer_error", "eval/reward_errors")
"""Shares that are 0 where all is well, and are shown only where something is not; files hold them always."""
BATCH = "rollout.generation_batch"
Episodes: TypeAlias = int | str | None
"""How many, or ``all``; None leaves it to the run, or to the file."""
Words = Sequence[str] | Mapping[str, Any]
"""``["env.path=FILE", "samples=16"]``, or a mapping of the same."""


@dataclasses.dataclass
class Asked:
    """What the words of an evaluation ask for.

    Attributes:
        sampling: as ``eval_sampling``.
        settings: of the run.
        env, policy: keys of the two groups, ``env`` itself among them.
        batch: conversations at a time; None as the run has it.
    """

    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    env: dict[str, Any] = dataclasses.field(default_factory=dict)
    policy: dict[str, Any] = dataclasses.field(default_factory=dict)
    batch: int | None = None

    @classmethod
    def of(cls, words: Words) -> Asked:
        """Sorts them.

        Raises:
            ConfigError: a word that means nothing here (names the nearest), or a value out of its range.
        """
        out = cls()
        for word in parse_overrides(words):
            out._take(word)
        try:
            out.sampling = check_eval_sampling(out.sampling)
        except ConfigError as error:
            raise ConfigError(str(error).replace("eval_sampling.", "")) from error
        return out

    def _take(self, word: Override) -> None:
        group = word.key.split(".")[0]
        if word.key in SAMPLING:
            self.sampling[word.key] = word.value
        elif word.key in SETTINGS:
            self.settings[word.key] = word.value
        elif word.key == BATCH:
            self.batch = word.value
        elif group == "env":
            self.env[word.key] = word.value
        elif group == "policy" and word.key != "policy":
            self.policy[word.key] = word.value
        else:
            near = nearest(word.key, [*SAMPLING, *SETTINGS, BATCH, "env", "policy"])
            raise ConfigError(f"evaluate takes no {word.key}=; {near}")


def job_of(where: str, checkpoint: str | int | None, asked: Asked, episodes: Episodes, allow: Sequence[str]) -> Job:
    """What evaluates a run, a checkpoint's folder or a model's folder.

    Raises:
        ConfigError: settings that do not fit, or a model's folder without a task.
        CheckpointError: there is nothing to evaluate.
    """
    folder, settings = Path(where), dict(asked.settings)
    if episodes is not None:
        settings["eval_episodes"] = episodes
    if asked.sampling:
        settings["eval_sampling"] = asked.sampling
    if (folder / CONFIG).is_file() or not any((folder / name).is_file() for name in MODEL):
        if (folder / "state.json").is_file() and folder.parent.name in (FOLDER, BEST) and checkpoint is None:
            folder, checkpoint = folder.parents[1], str(folder)
        return _job_of_run(folder, checkpoint, asked, settings, allow)
    if checkpoint is not None:
        raise ConfigError(f"--checkpoint {checkpoint} chooses one of a run, and {folder} is a model's folder")
    return _job_of_model(folder, asked, settings, allow)


def _job_of_model(folder: Path, asked: Asked, settings: dict[str, Any], allow: Sequence[str]) -> Job:
    if "env" not in asked.env:
        raise ConfigError(
            f"{folder} is a model's folder, which has no task of its own: add one, for example env=jsonl env.path=FILE"
        )
    given = {"policy": "causal_lm", "policy.path": str(folder), **asked.env, **asked.policy, **settings}
    if asked.batch is not None:
        given[BATCH] = asked.batch
    composed = compose(given, allow=allow)
    composed["env"] = _whole_file(composed["env"], asked.env, allow)
    cfg = resolve_defaults(composed, allow=allow)
    domains = [getattr(locate(cfg[g]["_target_"], allow, g), "domain", None) for g in ("env", "rollout") if cfg.get(g)]
    if "control" in domains:
        raise ConfigError(f"env={asked.env['env']} is of control, and {folder} is a language model's folder")
    return Job(cfg, allow)


def _job_of_run(
    run: Path, checkpoint: str | int | None, asked: Asked, settings: dict[str, Any], allow: Sequence[str]
) -> Job:
    if asked.policy:
        raise ConfigError(f"{next(iter(asked.policy))}= is of a model's folder; a run's policy is as it was trained")
    if not (run / CONFIG).is_file() and run.is_dir():
        raise CheckpointError(
            f"{run} is not a run folder (it holds no {CONFIG}), nor a model's (no {' or '.join(MODEL)})"
        )
    if asked.sampling:
        settings["eval_sampling"] = {**(read_config(run).get("eval_sampling") or {}), **asked.sampling}
    if asked.batch is not None:
        settings["rollout"] = {**(read_config(run).get("rollout") or {}), "generation_batch": asked.batch}
    job = restored(str(run), checkpoint, allow, settings)
    if asked.env:
        _other_env(job, asked.env)
    return job


def _other_env(job: Job, keys: Mapping[str, Any]) -> None:
    """Makes the job evaluate in another environment, or in its own with other settings.

    Raises:
        ConfigError: the policy cannot act in it.
    """
    own, node = job.env, _env_node(job, keys)
    job.cfg = {**job.cfg, "env": node}
    with TemporaryDirectory() as place:
        taken = parameters(locate(node["_target_"], job.allow), job.allow)[0]
        if node.get("tokenizer") is not None:
            job._env_options = {key: value for key, value in job._env_options.items() if key != "tokenizer"}
        elif job.language and "tokenizer" in taken and "tokenizer" not in job._env_options:
            own.tokenizer.save_pretrained(place)  # the policy knows no other
            job._env_options = {**job._env_options, "tokenizer": place}
        job.eval_env = job.evaluation_env()
    _check_same(own, job.eval_env)
    if job.language:
        _check_length(job.policy, job.eval_env.max_length)


def _env_node(job: Job, keys: Mapping[str, Any]) -> dict[str, Any]:
    if "env" in keys:
        return _whole_file(dict(compose(dict(keys), allow=job.allow)["env"] or {}), keys, job.allow)
    node = copy.deepcopy(job.cfg["env"])
    for key, value in keys.items():
        *path, last = key.split(".")[1:]
        inner = node
        for part in path:
            inner = inner.setdefault(part, {}) if isinstance(inner, dict) else {}
        inner[last] = value
    return dict(check_value(_whole_file(node, keys, job.allow), "env", job.allow))


def _whole_file(node: dict[str, Any], keys: Mapping[str, Any], allow: Sequence[str]) -> dict[str, Any]:
    """A file that is named for an evaluation is evaluated whole, unless the words say what of it is held out."""
    path, own = keys.get("env.path"), {"env.eval_path", "env.held_out"} & keys.keys()
    if path is None or own or "eval_path" not in parameters(locate(node["_target_"], allow, "env"), allow)[0]:
        return node
    return {**node, "eval_path": path}


def _check_length(policy: Any, length: int) -> None:
    model = getattr(policy, "model", None)
    longest = None if model is None else getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and longest < length:
        raise ConfigError(
            f"env: conversations have up to {length} tokens, and the run's model takes {longest}; lower "
            "env.max_prompt_length or env.max_turn_tokens"
        )


def _check_same(own: Any, other: Any) -> None:
    if own.domain != other.domain:
        raise ConfigError(f"env: the run is of {own.domain}, and this environment of {other.domain}")
    if own.domain == "language":
        if own.tokenizer.get_vocab() != other.tokenizer.get_vocab():
            raise ConfigError(
                "env: its tokenizer is not the one that the run's policy was trained with; set env.tokenizer to it"
            )
        return
    sizes = [Space.of(env.policy_inputs()) for env in (own, other)]
    shown = [f"{s.observation_dim} observations and {s.action.width} actions" for s in sizes]
    if shown[0] != shown[1]:
        raise ConfigError(f"env: the run's policy has {shown[0]}, and this environment {shown[1]}")


def evaluated(
    run: str,
    episodes: Episodes = None,
    allow: Sequence[str] = (),
    record: str | None = None,
    checkpoint: str | int | None = None,
    rows: int | None = None,
    words: Words = (),
    out: str | None = None,
) -> tuple[Scores, int | None]:
    """Evaluates a run's checkpoint, or a model's folder, on held-out problems or seeds.

    Args:
        run: the run folder, the folder of a checkpoint, or a model's folder.
        episodes: episodes or prompts, or ``all`` held-out prompts; by default as the run's evaluation, and all of a
            file that ``words`` name.
        allow: prefixes that configuration may build.
        record: folder to write the evaluated policy's rows to, as a replay that other runs can train on: whole
            ``episodes`` where they are given.
        checkpoint: the number of updates behind it, its name, its folder or ``best``; by default the newest intact one.
        rows: how many rows, instead.
        words: another task (``env=NAME``, ``env.KEY=VALUE``), how answers are sampled (``samples=16``,
            ``temperature=0.6``, ``top_p=0.95``, ...), ``rollout.generation_batch``, ``seed``, ``device``, ``threads``.
        out: file to write the result to, ``.json`` or ``.csv``.

    Returns:
        The metrics, and how many rows were recorded, if any.
    """
    asked = Asked.of(words)
    if out is not None and Path(out).suffix not in (".json", ".csv"):
        raise ConfigError(f"--out {out} must end in .json or .csv")
    job = job_of(run, checkpoint, asked, episodes, allow)
    named = {"env.path", "env.eval_path"} & asked.env.keys()
    if episodes is None and named and isinstance(job.eval_env or job.env, HasPools):
        job.settings.eval_episodes = "all"  # of a file that is named
    if rows is not None and record is None:
        raise ConfigError(f"--rows {rows} says how much to record; add --record FOLDER")
    check_rows(job, rows)
    try:
        scores = job.evaluate(intervals=True)
        if out is not None:
            said = {word.key: word.value for word in parse_overrides(words)}
            write_scores(Path(out), scores, {"evaluated": str(run), "checkpoint": checkpoint, "words": said})
        wanted = job.episodes if isinstance(episodes, str) else episodes
        return scores, None if record is None else record_dataset(job, Path(record), rows=rows, episodes=wanted)
    finally:
        job.close()


def evaluate_run(
    run: str,
    episodes: Episodes = None,
    allow: Sequence[str] = (),
    record: str | None = None,
    checkpoint: str | int | None = None,
    rows: int | None = None,
    words: Words = (),
    out: str | None = None,
) -> Scores:
    """As :func:`evaluated`, and prints the result: a table at a terminal and where words ask for more, else lines."""
    scores, recorded = evaluated(run, episodes, allow, record, checkpoint, rows, words, out)
    if words or sys.stdout.isatty():
        print_table(run, scores)
    else:
        for key, value in shown(scores).items():
            print(f"{key:28s} {value:.4f}")
        if scores.held_out:
            say(f"asked {asked_of(scores)}")
    if recorded is not None:
        print(f"{'recorded rows':28s} {recorded}")
    return scores


def print_table(title: str, scores: Scores) -> None:
    """A table of metrics and intervals."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    for key, value in shown(scores).items():
        bounds = scores.intervals.get(key)
        interval = "" if bounds is None else f"[{bounds[0]:.4f}, {bounds[1]:.4f}]"
        table.add_row(_shown(key, scores.samples), f"{value:.4f}", interval)
    console = Console(markup=False, highlight=False)
    console.print(table)
    if scores.samples:
        asked = f"{asked_of(scores)}, {scores.samples} sampled answer(s) and the most likely one to each"
        console.print(f"{asked}; intervals: {scores.method}", soft_wrap=True)


def shown(scores: Mapping[str, float]) -> dict[str, float]:
    """What is printed: all but :data:`FAULTS` that are 0."""
    return {key: value for key, value in scores.items() if value or key not in FAULTS}


def asked_of(scores: Scores) -> str:
    """How many prompts were asked, and of how many."""
    count, different = len(scores.problems), len({problem["prompt_id"] for problem in scores.problems})
    if count == different and scores.held_out:
        return f"{count:,} of {scores.held_out:,} held-out prompts"
    of = f", of {scores.held_out:,} held out" if scores.held_out else ""
    return f"{count:,} prompts" if count == different else f"{count:,} prompts ({different:,} different ones){of}"


def _shown(key: str, samples: int) -> str:
    """A metric as people call it."""
    name = key.replace("pass_at_", "pass@").replace("maj_at_", "maj@")
    return f"{name} (avg@{samples})" if key == "eval/accuracy" and samples > 1 else name


def write_scores(path: Path, scores: Scores, about: Mapping[str, Any]) -> None:
    """Writes metrics and intervals: as CSV a line each, as JSON with what became of each prompt.

    Raises:
        CheckpointError: the file cannot be written.
    """
    none = (None, None)
    with replacing(path) as aside:
        if path.suffix == ".csv":
            with open(aside, "w", newline="") as handle:
                writer = csv.writer(handle)
                writer.writerow(["metric", "value", "low", "high"])
                writer.writerows([key, value, *scores.intervals.get(key, none)] for key, value in scores.items())
            return
        body = {
            **about,
            "metrics": dict(scores),
            "intervals": scores.intervals,
            "interval_method": scores.method,
            "samples": scores.samples,
            "held_out": scores.held_out,
            "problems": scores.problems,
        }
        aside.write_text(json.dumps(plain(body), indent=1, allow_nan=False) + "\n")
