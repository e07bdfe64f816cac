"""``unified-rl VERB``: parses the command line and hands over; imports nothing heavy before the work starts."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from unified_rl import __version__
from unified_rl.errors import ConfigError, UnifiedRLError
from unified_rl.stopping import raising, say, stopping

DEBUG = "UNIFIED_RL_DEBUG"
DISK = (errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT)
"""What a full, read-only or broken disk raises, whoever meets it: one line is enough."""


def train(arguments: argparse.Namespace) -> int:
    """Trains one run, or goes on with one."""
    from unified_rl.config import compose, resolve_defaults
    from unified_rl.launching import speaks_first
    from unified_rl.settling import BUDGETS

    speaks_first()
    if arguments.multirun:
        return _sweep(arguments)
    resumed = _resumed(arguments.overrides)
    if resumed is not None:
        if arguments.cfg:
            raise ConfigError(f"--cfg shows a new run's configuration; that of this run is {resumed[0]}/config.yaml")
        if arguments.plan:
            raise ConfigError("--plan is of a new run; leave out resume=")
        from unified_rl.training.run import resume

        folder, steps, options = resumed
        print(f"run folder: {resume(folder, steps, arguments.allow, **_chosen(arguments), **options)}")
        return 0
    if arguments.checkpoint is not None:
        raise ConfigError("--checkpoint chooses where a run goes on: unified-rl train resume=RUN --checkpoint STEP")
    config = compose(arguments.overrides, config_dirs=arguments.config_dir, allow=arguments.allow)
    config = resolve_defaults(config, allow=arguments.allow)
    if arguments.cfg:
        if any(config.get(name) is not None for name in BUDGETS):
            from unified_rl.training.run import with_steps

            config = with_steps(config, arguments.allow)
        return _print_yaml(config)
    if arguments.plan:
        from unified_rl.training.memory_plan import plan_run

        print(plan_run(config, arguments.allow))
        return 0
    from unified_rl.training.run import train as run

    print(f"run folder: {run(config, arguments.allow)}")
    return 0


def launch(arguments: argparse.Namespace) -> int:
    """Trains one run in several processes, which divide the passes over the model."""
    from unified_rl.launching import launch as run

    return run(arguments.processes, arguments.words)


def _sweep(arguments: argparse.Namespace) -> int:
    """All combinations of the values on the command line, as a study."""
    from unified_rl.study.compare import compare as run
    from unified_rl.study.sweep import sweep_study

    if arguments.plan or arguments.checkpoint is not None or any(o.startswith("resume=") for o in arguments.overrides):
        raise ConfigError("-m makes new runs; the same command again goes on with them: leave out resume, --plan and "
                          "--checkpoint")  # fmt: skip
    config = sweep_study(arguments.overrides, arguments.workers)
    if arguments.cfg:
        return _print_yaml(config)
    with raising():
        print(f"study folder: {run(config, arguments.allow, config_dirs=arguments.config_dir)}")
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """Trains a grid of runs and writes tables, figures and a report."""
    from unified_rl.config import compose, resolve_defaults

    config = compose(arguments.overrides, primary="compare", config_dirs=arguments.config_dir, allow=arguments.allow)
    config = resolve_defaults(config, primary="compare", allow=arguments.allow)
    if arguments.cfg:
        return _print_yaml(config)
    from unified_rl.study.compare import compare as run

    with raising():
        run(config, arguments.allow, config_dirs=arguments.config_dir)
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    """Evaluates a run, one of its checkpoints, or a model's folder on held-out problems or seeds."""
    from unified_rl.training.run import evaluate_run

    given = (arguments.episodes, arguments.allow, arguments.record)
    more = {key: getattr(arguments, key) for key in ("words", "out", "video", "plot") if getattr(arguments, key)}
    evaluate_run(arguments.run, *given, checkpoint=arguments.checkpoint, rows=arguments.rows, **more)
    return 0


def samples(arguments: argparse.Namespace) -> int:
    """Shows conversations that a run wrote down: the latest, the best, the worst, some, or one prompt over time."""
    from unified_rl.training.show_samples import show

    order = arguments.order or "latest"
    show(arguments.run, order, arguments.count, arguments.prompt, arguments.split, as_json=arguments.json)
    return 0


def export(arguments: argparse.Namespace) -> int:
    """Writes a run's control policy as one file (.pt2, .onnx), or its language model as a Hugging Face folder."""
    from unified_rl.training.export import export as write

    given = (arguments.run, arguments.folder, arguments.checkpoint)
    written = write(*given, merge=arguments.merge, dtype=arguments.dtype, allow=arguments.allow)
    print(f"{'model folder' if written.is_dir() else 'policy file'}: {written}")
    return 0


def data(arguments: argparse.Namespace) -> int:
    """Imports, checks, shows and makes data sets of robots."""
    from unified_rl.recordings.command import parts_of, run

    options = {name: getattr(arguments, name) for name in ("out", "steps", "policy", "checkpoint")}
    options["parts"] = parts_of(arguments.part)
    return run(arguments.words, options, arguments.allow, arguments.json, arguments.config_dir)


def corrections(arguments: argparse.Namespace) -> int:
    """Lists the corrections, or shows one in full with a picture of its weight."""
    from unified_rl.instantiate import allowing
    from unified_rl.study.gallery.command import run

    with allowing(arguments.allow):
        run(arguments.words, arguments.out, arguments.json, arguments.write)
    return 0


def recipes(arguments: argparse.Namespace) -> int:
    """Lists the recipes, or shows where one comes from and in which case it is another."""
    from unified_rl.study.recipes import run

    run(arguments.words, arguments.json, arguments.write)
    return 0


def lab(arguments: argparse.Namespace) -> int:
    """Computes bias and variance of corrections exactly, on problems small enough to list every trajectory."""
    from unified_rl.study.lab.run import lab as run

    names = [name for name in (arguments.corrections or "").split(",") if name]
    if arguments.corrections is not None and not names:
        raise ConfigError("--corrections is empty: give presets such as ppo,tis, or leave it out for all")
    run(names, out=arguments.out, train=arguments.train, seeds=arguments.seeds)
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Checks every file of a run, a study, a saved replay or a dataset against what was written."""
    from unified_rl.training.verify import verify_folder

    for line in verify_folder(arguments.folder, accept=arguments.accept):
        print(line)
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    """Prints versions, devices and threads, and checks that fresh data have ratio 1."""
    from unified_rl.training.doctor import doctor as run

    return int(run() or 0)


VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": train,
    "launch": launch,
    "compare": compare,
    "evaluate": evaluate,
    "export": export,
    "samples": samples,
    "data": data,
    "lab": lab,
    "corrections": corrections,
    "recipes": recipes,
    "verify": verify,
    "doctor": doctor,
}
COMPOSED = ("train", "compare")
EXAMPLES = {
    "train": """examples:
  unified-rl train env=chain_mod policy=causal_lm agent=policy_gradient correction=dapo seed=1
  unified-rl train env=half_cheetah agent=sac steps=1e5 agent.lr=1e-3
  unified-rl train env=two_route policy=flow agent=policy_gradient correction=tis rollout.staleness=8
  unified-rl train env=chain_mod --plan        prints the memory that the run will take
  unified-rl train env=jsonl env.path=train.jsonl policy.path=MODEL epochs=2
  unified-rl train -m env=hopper,walker2d agent=ppo agent.lr=3e-4,1e-3 seed=1,2,3 steps=1e5
  unified-rl train resume=RUN [steps=N]        continues a run; resume_env=restart begins new episodes
  unified-rl train resume=RUN --checkpoint 400 goes back to the checkpoint after 400 updates""",
    "launch": """examples:
  unified-rl launch --processes 2 train env=chain_mod learner=data_parallel
  unified-rl launch --processes 4 train resume=RUN
  torchrun --nnodes 2 --nproc-per-node 8 ... -m unified_rl.cli train learner=data_parallel ...   on several machines""",
    "compare": """examples:
  unified-rl compare study=quickstart
  unified-rl compare study=quickstart study.seeds=[1,2,3]""",
    "evaluate": """examples:
  unified-rl evaluate runs/NAME --episodes 256
  unified-rl evaluate runs/NAME --checkpoint 400        or best, where the run has keep_best=METRIC
  unified-rl evaluate runs/NAME --video out.mp4 --plot out.png
  unified-rl evaluate runs/NAME samples=16 temperature=0.6 top_p=0.95 --out scores.json
  unified-rl evaluate runs/NAME env.path=other.jsonl    another file of problems; env=NAME another task
  unified-rl evaluate MODEL_FOLDER env=jsonl env.path=problems.jsonl samples=4""",
    "export": """examples:
  unified-rl export runs/NAME policy.onnx      a control policy; or policy.pt2, for torch.export.load
  unified-rl export runs/NAME my_model
  unified-rl export runs/NAME my_model --checkpoint 400 --merge --dtype bfloat16""",
    "samples": """examples:
  unified-rl samples runs/NAME
  unified-rl samples runs/NAME --worst -n 10 --split eval
  unified-rl samples runs/NAME --prompt 1234567890      one prompt over time""",
    "data": """examples:
  unified-rl data import npz demos.npz my_rows env=hopper       npz, minari, hdf5 (robomimic, D4RL) or lerobot
  unified-rl data check my_rows env=hopper                      exit code 1 where the rows do not fit
  unified-rl data show my_rows --out returns.png
  unified-rl data make hopper random hopper_random --steps 10000
  unified-rl data make hopper expert hopper_expert --policy runs/NAME --checkpoint best
  unified-rl data make hopper mixed hopper_mixed --part hopper_random=0.5 --part hopper_expert=0.5""",
    "lab": """examples:
  unified-rl lab
  unified-rl lab --corrections ppo,tis,sequence_is --out my_lab
  unified-rl lab --train --seeds 16""",
    "corrections": """examples:
  unified-rl corrections
  unified-rl corrections show dapo --out dapo.png
  unified-rl corrections show dapo kernel.clip_high=0.4 --json""",
    "recipes": """examples:
  unified-rl recipes
  unified-rl recipes show chord
  unified-rl train env=chain_mod recipe=chord""",
    "verify": """examples:
  unified-rl verify runs/NAME
  unified-rl verify runs/NAME --accept         after a file was changed on purpose""",
    "doctor": "",
}


def _resumed(overrides: Sequence[str]) -> tuple[str, int | None, dict[str, Any]] | None:
    """Run, ``steps`` and other options of ``resume=RUN steps=N``, or None where nothing is resumed."""
    pairs = [text.partition("=")[::2] for text in overrides]
    if "resume" not in [key for key, _ in pairs]:
        return None
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ConfigError("a key is given twice; give it once")
    other = sorted(set(values) - {"resume", "steps", "epochs", "updates", "resume_env", "learner"})
    if other:
        raise ConfigError(
            "resume=RUN takes resume_env, learner, epochs or updates, and no other key but steps; remove "
            f"{', '.join(other)}"
        )
    if not values["resume"]:
        raise ConfigError("resume= needs a run folder, for example resume=runs/NAME")
    counts: dict[str, Any] = {name: _count(name, values[name]) for name in ("steps", "updates") if name in values}
    if "epochs" in values:
        counts["epochs"] = _positive("epochs", values["epochs"])
    counts |= {name: values[name] for name in ("resume_env", "learner") if name in values}
    return values["resume"], counts.pop("steps", None), counts


def _chosen(arguments: argparse.Namespace) -> dict[str, Any]:
    """The argument that ``--checkpoint`` stands for, where it was given."""
    return {} if arguments.checkpoint is None else {"checkpoint": arguments.checkpoint}


def _count(name: str, text: str) -> int:
    try:
        value = float(text)
        if value == int(value) and value > 0:
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise ConfigError(f"{name}={text} is not a positive whole number")


def _episodes(text: str) -> int | str:
    return text if text == "all" else int(text)


def _positive(name: str, text: str) -> float:
    with suppress(ValueError):
        if 0 < (value := float(text)) < float("inf"):
            return value
    raise ConfigError(f"{name}={text} is not a positive number")


def _print_yaml(config: dict[str, Any]) -> int:
    import yaml

    print(yaml.safe_dump(config, sort_keys=False), end="")
    return 0


# ---------------------------------------------------------------------------------------------- help and parsing


def _parser(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"unified-rl {verb}",
        description=VERBS[verb].__doc__,
        epilog=EXAMPLES[verb],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this; with overrides, all keys they resolve to")
    if verb in COMPOSED:
        parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="group=option, or group.key=value")
        parser.add_argument("--cfg", action="store_true", help="print the resolved configuration and stop")
    if verb in COMPOSED or verb == "data":
        parser.add_argument(
            "--config-dir", action="append", default=[], metavar="DIR", help="a folder of your own groups"
        )
    if verb == "train":
        parser.add_argument("--plan", action="store_true", help="print what it will take in memory and stop")
        parser.add_argument("-m", "--multirun", action="store_true", help="run all combinations of key=a,b, as compare")
        parser.add_argument("--workers", type=int, default=2, metavar="N", help="of -m: runs at a time; by default 2")
    if verb == "launch":
        parser.add_argument("--processes", type=int, default=2, metavar="N", help="how many; by default 2")
        parser.add_argument("words", nargs="*", metavar="train KEY=VALUE ...", help="as of unified-rl train")
    if verb == "evaluate":
        parser.add_argument("run", metavar="RUN", nargs="?", help="a run's folder, or a model's")
        parser.add_argument(
            "words",
            nargs="*",
            metavar="KEY=VALUE",
            help="another task (env=, env.KEY=), sampling (samples, temperature, top_p, ...), "
            "rollout.generation_batch, seed, device, threads",
        )
        parser.add_argument("--out", metavar="FILE", help="also write the result there, as .json or .csv")
        parser.add_argument("--video", metavar="FILE", help="film the first episodes, as .mp4 or .gif")
        parser.add_argument("--plot", metavar="FILE", help="draw their returns over time, as .png, .svg or .pdf")
        parser.add_argument(
            "--episodes",
            type=_episodes,
            metavar="N",
            help="episodes or prompts, or all held-out prompts; by default as in the run, and all of a file named here",
        )
        parser.add_argument("--record", metavar="DIR", help="also write the policy's rows there, as a replay")
        parser.add_argument("--rows", type=int, metavar="N", help="how many to record; else whole --episodes, if given")
    if verb == "export":
        parser.add_argument("run", metavar="RUN", nargs="?", help="a run folder")
        parser.add_argument(
            "folder", metavar="FOLDER", nargs="?", help="where it goes: FILE.pt2, FILE.onnx, or a folder"
        )
        parser.add_argument("--merge", action="store_true", help="write a whole model where adapters were trained")
        parser.add_argument("--dtype", metavar="DTYPE", help="float32, bfloat16 or float16; by default as it came")
    if verb == "samples":
        parser.add_argument("run", metavar="RUN", nargs="?", help="a run folder")
        which = parser.add_mutually_exclusive_group()
        for name, told in (("best", "of the highest reward"), ("worst", "of the lowest reward"), ("random", "any")):
            which.add_argument(f"--{name}", action="store_const", dest="order", const=name, help=told)
        parser.add_argument("--prompt", type=int, metavar="ID", help="of one prompt alone, over time")
        parser.add_argument("-n", dest="count", type=int, default=5, metavar="N", help="how many; by default 5")
        parser.add_argument("--split", choices=("train", "eval"), help="of training, or of evaluations, alone")
        parser.add_argument("--json", action="store_true", help="print JSON lines")
    if verb in ("train", "evaluate", "export", "data"):
        parser.add_argument(
            "--checkpoint", metavar="STEP", help="number of updates, folder or best; by default the newest intact one"
        )
    if verb == "verify":
        parser.add_argument("folder", metavar="FOLDER", nargs="?", help="a run, a study, a saved replay or a dataset")
        parser.add_argument("--accept", action="store_true", help="take a run's files as they are from now on")
    if verb == "data":
        parser.add_argument(
            "words", nargs="*", metavar="import|check|show|make ...", help="what, and of what; see below"
        )
        parser.add_argument("--out", metavar="FILE.png", help="of show: draw the returns there")
        parser.add_argument("--steps", type=int, metavar="N", help="of make: rows; by default 100000")
        parser.add_argument("--policy", metavar="RUN", help="of make medium and expert: the run whose policy acts")
        parser.add_argument("--part", action="append", default=[], metavar="FOLDER=SHARE", help="of make mixed")
        parser.add_argument("--json", action="store_true", help="print JSON")
    if verb == "lab":
        parser.add_argument("--corrections", metavar="A,B,...", help="presets to compare; by default all")
        parser.add_argument("--out", metavar="FOLDER", default="lab", help="where CSVs and pictures go; by default lab")
        parser.add_argument("--train", action="store_true", help="train all of them on stale data, not a shortlist")
        parser.add_argument("--seeds", type=int, default=4, metavar="N", help="seeds of a training run; by default 4")
    if verb == "corrections":
        parser.add_argument("words", nargs="*", metavar="show NAME [KEY=VALUE]", help="show one; without it, list all")
        parser.add_argument("--out", metavar="FILE.png", help="where to draw its weight; by default NAME.png")
        parser.add_argument("--json", action="store_true", help="print JSON")
        parser.add_argument("--write", metavar="DIR", help="write the gallery's page and pictures there")
    if verb == "recipes":
        parser.add_argument("words", nargs="*", metavar="show NAME", help="show one; without it, list all")
        parser.add_argument("--json", action="store_true", help="print JSON")
        parser.add_argument("--write", metavar="DIR", help="write the page of recipes there")
    if verb not in ("launch", "samples", "lab", "recipes", "verify", "doctor"):
        parser.add_argument(
            "--allow",
            action="append",
            default=[],
            metavar="PREFIX",
            help="let configuration build this package",
        )
    return parser


def _groups_text(verb: str, config_dirs: Sequence[str]) -> str:
    from unified_rl.config import group_options

    lines = []
    for group, options in group_options(verb, config_dirs).items():
        lines.append(f"\n{group}=")
        lines += [f"  {name:26s} {comment}".rstrip() for name, comment in options.items()]
    return "\n".join(lines)


def _show_help(verb: str, arguments: argparse.Namespace) -> int:
    if verb in COMPOSED and arguments.overrides:
        arguments.cfg = True
        return VERBS[verb](arguments)
    print(_parser(verb).format_help())
    if verb in COMPOSED:
        print("groups and their options:" + _groups_text(verb, arguments.config_dir))
    return 0


def _overview() -> str:
    verbs = "\n".join(f"  {name:11s} {(function.__doc__ or '').strip()}" for name, function in VERBS.items())
    return (
        f"unified-rl {__version__}\nusage: unified-rl VERB [KEY=VALUE ...] [options]\n\n{verbs}\n\n"
        "unified-rl VERB --help lists what a verb takes."
    )


def _split(words: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """The words of ``launch`` itself, and those that it hands on."""
    at = next((i for i, word in enumerate(words) if word in VERBS), len(words))
    return words[:at], words[at:]


def _dispatch(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    verb = argv[0]
    if verb not in VERBS:
        from unified_rl.instantiate import nearest

        raise ConfigError(f"there is no verb {verb!r}; {nearest(verb, VERBS)}")
    own, handed_on = (argv[1:], []) if verb != "launch" else _split(argv[1:])
    arguments = _parser(verb).parse_intermixed_args(own)
    if verb == "launch":
        arguments.words = [*arguments.words, *handed_on]
    if arguments.help:
        return _show_help(verb, arguments)
    if verb == "evaluate" and arguments.run is None:
        raise ConfigError("evaluate needs a run folder: unified-rl evaluate RUN")
    if verb == "export" and arguments.folder is None:
        raise ConfigError(
            "export needs a run folder and a new name: unified-rl export RUN FOLDER, or FILE.pt2, or FILE.onnx"
        )
    if verb == "samples" and arguments.run is None:
        raise ConfigError("samples needs a run folder: unified-rl samples RUN")
    if verb == "verify" and arguments.folder is None:
        raise ConfigError("verify needs a folder: unified-rl verify RUN")
    if getattr(arguments, "allow", None):
        sys.path.append(os.getcwd())
    return VERBS[verb](arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0 on success, 2 for an error that is the user's to mend, 128 plus the signal's number after a signal (130 after
        Ctrl-C).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with stopping(leaves=argv is None):
        return _main(sys.argv[1:] if argv is None else argv)


def _main(argv: Sequence[str]) -> int:
    try:
        return _dispatch(argv)
    except UnifiedRLError as error:
        if os.environ.get(DEBUG):
            raise
        say(str(error))
        return 2
    except KeyboardInterrupt as error:
        if getattr(error, "saved", ""):
            with suppress(OSError):
                print(error.saved, flush=True)  # type: ignore[attr-defined]
        say("interrupted")
        return 128 + getattr(error, "number", 2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if os.environ.get(DEBUG) or error.errno not in DISK:
            raise
        say(f"{error.strerror}: {error.filename or 'a file could not be written'}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
