"""What the command line does, from Python: one function for each command, and a run as an object."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from unified_rl.config import CHOICES, compose, flatten, resolve_defaults
from unified_rl.errors import CheckpointError, ConfigError, PeerError
from unified_rl.instantiate import allowing

if TYPE_CHECKING:
    from unified_rl.training.evaluation import Scores

Overrides: TypeAlias = Sequence[str] | Mapping[str, Any]
"""``["env=two_route", "agent.lr=1e-3"]``, a mapping of the same, or a composed configuration."""
RunLike: TypeAlias = "Run | str | os.PathLike[str]"
Checkpoint: TypeAlias = "str | int | os.PathLike[str]"
"""The number of updates behind a checkpoint, or its folder."""


class Run:
    """A run's folder, and what can be done with it.

    Args:
        folder: as ``unified-rl train`` prints it.
        allow: packages beside this one that its configuration names.

    Raises:
        CheckpointError: there is no run in the folder.
    """

    def __init__(self, folder: RunLike, allow: Sequence[str] = ()) -> None:
        self.folder, self.allow = Path(folder), list(allow)
        if not (self.folder / "config.yaml").is_file():
            raise CheckpointError(f"{self.folder} is not a run folder: it holds no config.yaml")

    def __fspath__(self) -> str:
        """The folder, so that a run stands wherever a path is taken."""
        return str(self.folder)

    def __str__(self) -> str:
        """The folder."""
        return str(self.folder)

    def __repr__(self) -> str:
        """``Run('runs/NAME')``."""
        return f"Run({str(self.folder)!r})"

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration."""
        from unified_rl.training.run import stored_config

        return stored_config(self.folder)

    def metrics(self) -> list[dict[str, Any]]:
        """The logged rows, in order: ``update``, ``steps``, ``wall_seconds`` and metrics such as ``eval/score``."""
        from unified_rl.training.metrics import read_metrics

        return read_metrics(self.folder / "metrics.jsonl")

    def samples(self, order: str = "latest", **options: Any) -> list[dict[str, Any]]:
        """Conversations that the run wrote down, see :func:`samples`."""
        return samples(self, order, **options)

    def policy(self, checkpoint: Checkpoint | None = None) -> Any:
        """The trained policy, see :func:`load_policy`."""
        return load_policy(self, checkpoint, allow=self.allow)

    def evaluate(
        self,
        *,
        checkpoint: Checkpoint | None = None,
        episodes: int | str | None = None,
        record: str | os.PathLike[str] | None = None,
        rows: int | None = None,
        video: str | os.PathLike[str] | None = None,
        plot: str | os.PathLike[str] | None = None,
        **overrides: Any,
    ) -> Scores:
        """Held-out evaluation, see :func:`evaluate`."""
        options: dict[str, Any] = {"episodes": episodes, "record": record, "rows": rows, "allow": self.allow}
        options |= {"video": video, "plot": plot}
        return evaluate(self, checkpoint=checkpoint, **options, **overrides)

    def export(
        self,
        folder: str | os.PathLike[str],
        *,
        checkpoint: Checkpoint | None = None,
        merge: bool = False,
        dtype: str | None = None,
    ) -> Path:
        """Writes the trained policy as a file, or a language model as a folder, see :func:`export`."""
        return export(self, folder, checkpoint=checkpoint, merge=merge, dtype=dtype, allow=self.allow)

    def resume(
        self,
        steps: int | None = None,
        *,
        epochs: float | None = None,
        updates: int | None = None,
        checkpoint: Checkpoint | None = None,
        progress: bool | None = None,
        resume_env: str | None = None,
        callbacks: Sequence[Any] = (),
    ) -> Run:
        """Goes on from the newest intact checkpoint or the chosen one, see :func:`resume`."""
        options: dict[str, Any] = {"checkpoint": checkpoint, "progress": progress, "resume_env": resume_env}
        options |= {"epochs": epochs, "updates": updates}
        return resume(self, steps, allow=self.allow, callbacks=callbacks, **options)


def train(
    overrides: Overrides = (),
    *,
    allow: Sequence[str] = (),
    config_dirs: Sequence[str] = (),
    progress: bool | None = None,
    callbacks: Sequence[Any] = (),
) -> Run:
    """Trains one run to its budget, as ``unified-rl train`` does.

    Args:
        overrides: ``["env=two_route", "agent.lr=1e-3"]``, or a mapping ``{"env": "two_route", "agent.lr": 1e-3}``
            (``{"agent": {"name": "ppo", "lr": 1e-3}}`` says the same by group), or what
            :func:`unified_rl.compose` returned.
        allow: packages beside this one that configuration may build.
        config_dirs: folders with options of your own.
        progress: show a progress display; by default as the configuration says.
        callbacks: objects (or classes) with hooks, see :class:`~unified_rl.training.callbacks.Callback`.

    Returns:
        The finished run.

    Raises:
        ConfigError: a misspelt key or option (names the nearest), or parts that do not fit together.
        CheckpointError: the folder is in use, or holds a run already.
    """
    from unified_rl.training.run import train as run

    overrides, allow = _by_name(overrides, allow)
    cfg = _composed(overrides, "train", allow, config_dirs)
    return Run(run(cfg, allow, progress=progress, callbacks=callbacks), allow)


def launch(
    overrides: Sequence[str], *, processes: int = 2, allow: Sequence[str] = (), config_dirs: Sequence[str] = ()
) -> Run:
    """Trains one run in several processes of this machine, as ``unified-rl launch`` does; they write to this terminal.

    Args:
        overrides: as of :func:`train`, in texts, with ``learner=data_parallel``; or ``["resume=RUN"]`` and what goes
            with it.
        processes: how many.
        allow, config_dirs: as of :func:`train`.

    Returns:
        The finished run.

    Raises:
        ConfigError: as of :func:`train`, before a process begins.
        PeerError: the processes ended otherwise; process 0 said why on standard error.
    """
    from unified_rl.launching import launch as run
    from unified_rl.training.provenance import run_folder

    found = next((text.partition("=")[2] for text in overrides if text.startswith("resume=")), None)
    words = list(overrides)
    if found is None:
        cfg = _composed(overrides, "train", allow, config_dirs)
        found = str(run_folder(cfg))
        quoted = found.replace("\\", "\\\\").replace("'", "\\'")
        words = [*(text for text in words if not text.startswith("run_dir=")), f"run_dir='{quoted}'"]
    options = [*(f"--allow={one}" for one in allow), *(f"--config-dir={one}" for one in config_dirs)]
    code = run(processes, ["train", *words, *options])
    if code != 0:
        raise PeerError(f"the launched run {found} ended with exit code {code}; process 0 said why on standard error")
    return Run(found, allow)


def memory_plan(overrides: Overrides = (), *, allow: Sequence[str] = (), config_dirs: Sequence[str] = ()) -> Any:
    """What a run will take in memory, as ``unified-rl train ... --plan`` prints it; nothing is trained.

    Args:
        overrides, allow, config_dirs: as of :func:`train`.

    Returns:
        A :class:`~unified_rl.training.memory_plan.MemoryPlan`: ``peak`` and ``needed`` in bytes, its parts, and a table
        as text; a line that says so for a policy that is no language model.

    Raises:
        ConfigError: parts that do not fit together. A run that does not fit is planned all the same.
    """
    from unified_rl.training.memory_plan import plan_run

    overrides, allow = _by_name(overrides, allow)
    return plan_run(_composed(overrides, "train", allow, config_dirs), allow)


def resume(
    run: RunLike,
    steps: int | None = None,
    *,
    epochs: float | None = None,
    updates: int | None = None,
    checkpoint: Checkpoint | None = None,
    allow: Sequence[str] = (),
    progress: bool | None = None,
    resume_env: str | None = None,
    callbacks: Sequence[Any] = (),
) -> Run:
    """Continues a run from its newest intact checkpoint, bit for bit as if it had never stopped.

    Args:
        run: its folder.
        steps, epochs, updates: a new budget, said in one of them; by default the run's own.
        checkpoint: go back to this one: the number of updates behind it, or ``best``. Later ones are renamed, and
            their rows of metrics are made again.
        allow: packages beside this one that its configuration names.
        progress: show a progress display; by default as the configuration says.
        resume_env: ``exact`` puts the environment back to where it was, or refuses; ``restart`` begins new episodes;
            by default the first where it is possible, else the second, with a line that says so.
        callbacks: objects (or classes), as in :func:`train`.

    Raises:
        CheckpointError: no such run, one that only a script can build again, or one in use; or a damaged file, which
            the message names.
    """
    from unified_rl.training.run import resume as continued

    at = _chosen(checkpoint)
    options: dict[str, Any] = {"checkpoint": at, "progress": progress, "resume_env": resume_env}
    options |= {"epochs": epochs, "updates": updates}
    return Run(continued(os.fspath(run), steps, allow, **options, callbacks=callbacks), allow)


def evaluate(
    run: RunLike,
    *,
    checkpoint: Checkpoint | None = None,
    episodes: int | str | None = None,
    record: str | os.PathLike[str] | None = None,
    rows: int | None = None,
    allow: Sequence[str] = (),
    out: str | os.PathLike[str] | None = None,
    video: str | os.PathLike[str] | None = None,
    plot: str | os.PathLike[str] | None = None,
    **overrides: Any,
) -> Scores:
    """Evaluates a checkpoint of a run, or a language model's folder, on held-out prompts or seeds; prints no metrics.

    Args:
        run: its folder.
        checkpoint: the number of updates behind it, its folder, or ``best``; by default the newest intact one.
        episodes: episodes or prompts, or ``"all"`` held-out prompts; by default as in the run, and all of a file that
            ``overrides`` name.
        record: also write the policy's rows to this folder, as a replay that other runs train on: whole ``episodes``
            where they are given, else 2,048 steps of every simulation.
        rows: how many rows, instead.
        allow: packages beside this one that its configuration names.
        out: also write the result to this file, ``.json`` or ``.csv``.
        video: also film the first episodes of a control run, at most nine beside one another, to this ``.mp4`` (extra
            ``video``) or ``.gif``, with step, return and success over each.
        plot: also draw their returns over time to this ``.png``, ``.svg`` or ``.pdf``.
        overrides: another task (``env="jsonl", **{"env.path": FILE}``, or ``env={"name": "jsonl", "path": FILE}``), how
            answers are sampled (``samples=16, temperature=0.6, top_p=0.95``), ``seed``, ``device``, and
            ``**{"rollout.generation_batch": 64}`` for the conversations that are sampled together.

    Returns:
        ``eval/score`` and what else the domain measures, see :mod:`unified_rl.training.evaluation`; a dictionary that
        also has ``intervals`` (95 %, of language), ``samples`` and ``problems``.

    Raises:
        CheckpointError: no such run, no such checkpoint, or none that is intact.
        ConfigError: an override that means nothing here, or an environment that the policy cannot act in.
    """
    from unified_rl.training.run import evaluated

    to, file, film, drawn = (None if path is None else os.fspath(path) for path in (record, out, video, plot))
    words, allow = _by_name(flatten(overrides), allow)
    return evaluated(os.fspath(run), episodes, allow, to, _chosen(checkpoint), rows, words, file, film, drawn)[0]


def samples(
    run: RunLike, order: str = "latest", *, count: int | None = 5, prompt: int | None = None, split: str | None = None
) -> list[dict[str, Any]]:
    """Conversations that a run of a language task wrote down, as ``unified-rl samples`` shows them.

    Args:
        run: its folder.
        order: ``latest`` (of the last update that wrote any), ``best`` and ``worst`` by reward, or ``random``.
        count: how many; None gives all.
        prompt: those of one ``prompt_id`` alone, in the order of their updates unless ``order`` says otherwise.
        split: ``train`` or ``eval``; None takes both.

    Returns:
        Mappings with ``update``, ``steps``, ``split``, ``prompt_id``, ``prompt``, ``answer``, ``reference``,
        ``reward``, ``rewards`` (by name), ``advantage`` (of rows that were trained on), ``truncated``, ``tokens``,
        ``policy_version`` and ``source``.

    Raises:
        CheckpointError: no such run, or it wrote none.
        ConfigError: an unknown order or split, or nothing is left.
    """
    from unified_rl.training.samples import read_samples, select

    return select(read_samples(Path(run)), order, count=count, prompt=prompt, split=split)


def data(
    action: str,
    *words: str | os.PathLike[str],
    steps: int | None = None,
    policy: RunLike | None = None,
    checkpoint: Checkpoint | None = None,
    parts: Mapping[str, float] | None = None,
    out: str | os.PathLike[str] | None = None,
    allow: Sequence[str] = (),
    config_dirs: Sequence[str] = (),
    **overrides: Any,
) -> dict[str, Any]:
    """Imports, checks, shows and makes data sets of robots, as ``unified-rl data`` does.

    ``ur.data("import", "npz", "demos.npz", "my_rows", env="hopper")``, ``ur.data("check", "my_rows", env="hopper")``,
    ``ur.data("show", "my_rows")``, ``ur.data("make", "hopper", "random", "hopper_random", steps=10_000)``.

    Args:
        action: ``import``, ``check``, ``show`` or ``make``.
        words: as on the command line.
        steps: of ``make``: how many rows.
        policy: of ``make``: the run whose policy acts.
        checkpoint: of it: the number of updates behind it, its folder or ``best``.
        parts: of ``make``, ``mixed``: folders of rows with their shares.
        out: of ``show``: a PNG of the returns.
        allow: packages beside this one that configuration may build.
        config_dirs: folders with options of your own.
        overrides: ``env="hopper"``, ``**{"env.KEY": VALUE}``, ``seed``, and how a file is read (``observation``,
            ``dones="truncated"``, ...).

    Returns:
        Of ``import``: ``rows``, ``folder``, ``notes`` and ``findings``; of ``check``: ``fits`` and ``findings``
        (``level`` and ``text``); of ``show`` and ``make``: ``rows``, ``episodes``, ``returns``, ``lengths``,
        ``success``, ``entries``.

    Raises:
        DataError: a file that cannot be read, would need pickle, or holds numbers that are not finite.
        ConfigError: words or options that do not go together, rows that do not fit ``env`` on import, or a package
            that is not installed.
        CheckpointError: a folder of rows, or a run, is missing or damaged.
    """
    from unified_rl.recordings.command import Asked, carried_out

    paths = {"policy": policy, "out": out}
    options = {key: None if value is None else os.fspath(value) for key, value in paths.items()}
    given = {**options, "steps": steps, "checkpoint": _chosen(checkpoint), "parts": parts}
    said = [action, *(os.fspath(word) for word in words)]
    return carried_out(Asked.of(said, given, allow, flatten(overrides), config_dirs))


def load_policy(run: RunLike, checkpoint: Checkpoint | None = None, *, allow: Sequence[str] = ()) -> Any:
    """The policy of a run of either domain, in evaluation mode on the CPU.

    One of control acts when it is called, ``action = policy(observation)``: an observation ``[d]`` or a batch
    ``[K, d]``, NumPy or torch, of any real dtype, to an action of the same kind in shape, dtype, bounds and numbering
    of the environment's action space; a chunk of ``h`` actions is ``[h, a]``, first action first. It has its own
    observation moments, and no environment is made for it. Calls are deterministic;
    ``policy(observation, deterministic=False)`` samples from its seeded stream.

    Args:
        run: its folder.
        checkpoint: the number of updates behind it, its folder, or ``best``; by default the newest intact one.
        allow: packages beside this one that its configuration names.

    Returns:
        Anything with ``sample`` and ``log_prob``; a :class:`~unified_rl.policies.causal_lm.CausalLM` also generates.

    Raises:
        CheckpointError: no such run, no such checkpoint, or a run that only a script can build again.
    """
    from unified_rl.training.loading import policy_of

    return policy_of(os.fspath(run), _chosen(checkpoint), allow)


def export(
    run: RunLike,
    folder: str | os.PathLike[str],
    *,
    checkpoint: Checkpoint | None = None,
    merge: bool = False,
    dtype: str | None = None,
    allow: Sequence[str] = (),
) -> Path:
    """Writes the policy of a run as other programs load it.

    A control policy becomes one file: ``policy.pt2`` (``torch.export.load``) or ``policy.onnx`` (extra ``onnx``), with
    the input ``observation [K, d]`` float32 for any ``K`` and the output ``action``, in shape, dtype, bounds and
    numbering of the environment's action space. It holds the observation moments and acts as
    ``load_policy(run)(observation)`` does, to 1e-5.

    A language model becomes a folder that transformers, TRL and vLLM load. It holds the weights in the dtype of the
    folder that the model came from (tied ones once), its configuration, the tokenizer with its chat template, and the
    generation configuration that it came with. A run that trained adapters gives an adapter folder that names its base
    model, or with ``merge`` the whole model.

    Args:
        run: its folder.
        folder: is made; it may exist if it is empty. Of a control policy the file, which does not exist yet.
        checkpoint: the number of updates behind it, or its folder; by default the newest intact one.
        merge: write the whole model where adapters were trained.
        dtype: ``float32``, ``bfloat16`` or ``float16``; by default as above, and float32 for adapters.
        allow: packages beside this one that its configuration names.

    Returns:
        The folder, or the file.

    Raises:
        ConfigError: a name that is of the other domain, the folder holds something, there is nothing to merge, or a
            control policy that cannot be exported.
        CheckpointError: no such run, no such checkpoint, or none that is intact.
    """
    from unified_rl.training.export import export as write

    at = _chosen(checkpoint)
    return write(os.fspath(run), os.fspath(folder), at, merge=merge, dtype=dtype, allow=allow)


def _chosen(checkpoint: Checkpoint | None) -> str | int | None:
    return checkpoint if checkpoint is None or isinstance(checkpoint, int) else os.fspath(checkpoint)


def compare(
    overrides: str | Overrides,
    *,
    allow: Sequence[str] = (),
    config_dirs: Sequence[str] = (),
    progress: bool = True,
) -> Path:
    """Trains a grid of runs and writes tables, figures and a report, as ``unified-rl compare`` does.

    Args:
        overrides: the name of a study, ``["study=quickstart", "study.seeds=[1,2]"]``, a mapping of the same, or a
            composed configuration.
        allow: packages beside this one that configuration may build.
        config_dirs: folders with studies of your own.
        progress: show progress bars.

    Returns:
        The study's folder: ``results.csv``, ``training.csv``, ``summary.csv``, ``report.html`` and pictures.

    Raises:
        ConfigError: a study that cannot be composed; nothing has run then.
        StudyError: some runs failed; the others are finished and in the report.
    """
    from unified_rl.study.compare import compare as run

    given = [f"study={overrides}"] if isinstance(overrides, str) else overrides
    cfg = _composed(given, "compare", allow, config_dirs)
    return run(cfg, allow, config_dirs=config_dirs, progress=progress)


def sweep(
    overrides: Sequence[str],
    *,
    workers: int = 2,
    allow: Sequence[str] = (),
    config_dirs: Sequence[str] = (),
    progress: bool = True,
) -> Path:
    """Trains every combination of ``key=a,b`` as a study, as ``unified-rl train -m`` does.

    Args:
        overrides: those of a run, ``["env=hopper,walker2d", "agent=ppo", "seed=1,2,3"]``; the same ones again train
            what is missing.
        workers: runs at a time; 0 trains in this process.
        allow, config_dirs, progress: as of :func:`compare`.

    Returns:
        The study's folder, as of :func:`compare`: ``run_dir``, or one of a name that follows from the overrides.

    Raises:
        ConfigError: no key has several values, or a combination cannot be composed; nothing has run then.
        StudyError: some runs failed; the others are finished and in the report.
    """
    from unified_rl.study.compare import compare as run
    from unified_rl.study.sweep import sweep_study

    return run(sweep_study(overrides, workers), allow, config_dirs=config_dirs, progress=progress)


def lab(
    corrections: Sequence[str] = (),
    *,
    out: str | os.PathLike[str] = "lab",
    train: bool = False,
    seeds: int = 4,
    progress: bool = True,
) -> Path:
    """Bias and variance of corrections, summed exactly over small problems, as ``unified-rl lab`` does.

    Args:
        corrections: presets; none means all.
        out: folder of the CSVs and pictures.
        train: train every correction on stale data, not a shortlist.
        seeds: of a training run.
        progress: show progress bars.

    Returns:
        The folder.

    Raises:
        ConfigError: an unknown preset (names the nearest), or a count below 1.
    """
    from unified_rl.study.lab.run import lab as run

    return run(corrections, out=os.fspath(out), train=train, seeds=seeds, shown=progress)


def corrections(name: str | None = None, *, allow: Sequence[str] = (), **overrides: Any) -> Any:
    """The corrections that ship, or one of them in full, as ``unified-rl corrections [show NAME]`` prints them.

    Args:
        name: a preset; None lists all.
        allow: prefixes beside ``unified_rl.`` in which its rules may lie.
        overrides: changed fields of that preset, dotted where nested: ``**{"kernel.clip_high": 0.3}``.

    Returns:
        A list of mappings (``name``, ``family``, ``level``, ``kernel``, ``summary``, ...), or one mapping (``rule``,
        ``formula``, ``needs``, ``curves``, ...).

    Raises:
        ConfigError: an unknown preset or field (names the nearest).
    """
    from unified_rl.study.gallery import catalogue

    if name is None:
        return catalogue.listed()
    catalogue.entry(name)
    from unified_rl.study.gallery.described import described

    with allowing(allow):
        return described(name, overrides).for_machines()


def recipes(name: str | None = None) -> Any:
    """The recipes that ship, or one of them, as ``unified-rl recipes [show NAME]`` prints them.

    Args:
        name: a recipe; None lists all.

    Returns:
        A list of mappings (``name``, ``summary``, ``source``, ``confidence``, ``family``, ``domains``, ``limit``), or
        one of them.

    Raises:
        ConfigError: an unknown recipe (names the nearest).
    """
    from unified_rl.study.recipes import listed, recipe

    if name is None:
        return listed()
    recipe(name)
    return next(entry for entry in listed() if entry["name"] == name)


def verify(folder: RunLike, *, accept: bool = False) -> list[str]:
    """Checks every file of a run, a study, a saved replay or a dataset against the digests written with it.

    Args:
        folder: a run's, a study's, a checkpoint's, a replay's or a dataset's.
        accept: first take a run's configuration, ``meta.json`` and metrics as they are, after a change on purpose;
            checkpoints and replays are never accepted.

    Returns:
        A line for each thing that was checked.

    Raises:
        DamageError: files are missing or altered; a line of the message names each.
        CheckpointError: something is in use, or of another version.
        ConfigError: the folder holds nothing to verify.
    """
    from unified_rl.training.verify import verify_folder

    return verify_folder(os.fspath(folder), accept)


def doctor() -> dict[str, Any]:
    """What this machine has, and whether the identities that every run rests on hold here.

    Returns:
        ``facts`` (versions, devices, threads), ``checks`` (a list of mappings with ``check``, ``domain``, ``holds``
        and ``detail``) and ``healthy``, whether all of them hold.
    """
    from unified_rl.training.doctor import checks, facts

    found = checks()
    return {"facts": facts(), "checks": found, "healthy": all(check["holds"] for check in found)}


def _by_name(overrides: Overrides, allow: Sequence[str]) -> tuple[Overrides, Sequence[str]]:
    """Reward functions themselves as ``module:function``, which a run's folder can hold, and their modules allowed.

    Raises:
        ConfigError: one that no other process can import: a lambda, or a function of a script or of another function.
    """
    given = overrides.get("reward") if isinstance(overrides, Mapping) else None
    if given is None:
        return overrides, allow
    modules: list[str] = []

    def named(entry: Any) -> Any:
        if isinstance(entry, Mapping):
            return {**entry, "name": named(entry.get("name"))}
        if not callable(entry):
            return entry
        module, name = getattr(entry, "__module__", ""), getattr(entry, "__qualname__", "")
        if module in ("", "__main__") or not name or not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(
                f"reward: {module}.{name} is no function of a module that a resumed run could import; move it to a "
                "file of its own, or use ur.assemble, which takes any function"
            )
        modules.append(module)
        return f"{module}:{name}"

    entries = [named(entry) for entry in given] if isinstance(given, list | tuple) else named(given)
    return {**overrides, "reward": entries}, [*allow, *modules]  # type: ignore[dict-item]


def _composed(overrides: Overrides, primary: str, allow: Sequence[str], config_dirs: Sequence[str]) -> dict[str, Any]:
    if isinstance(overrides, Mapping):
        if CHOICES in overrides:
            return resolve_defaults(overrides, primary=primary, allow=allow)
        overrides = flatten(overrides)
    elif isinstance(overrides, str):
        raise ConfigError(f"{overrides!r} is one text; give a list of key=value texts")
    cfg = compose(overrides, primary=primary, config_dirs=config_dirs, allow=allow)
    return resolve_defaults(cfg, primary=primary, allow=allow)
