"""Every pair of options of env, policy, agent, replay and correction: it trains two updates, or is refused by name.

``python tests/pairs.py --out docs/results/pairs.csv`` tries all of them and writes what became of each;
``tests/test_pairs.py`` runs a covering part.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gymnasium
import numpy as np
from run_cases import remembered

from unified_rl.config import compose, group_options, resolve_defaults
from unified_rl.errors import UnifiedRLError
from unified_rl.instantiate import locate, parameters
from unified_rl.training.run import Job

GROUPS = ("env", "policy", "agent", "replay", "correction")
LANGUAGE_ENVS = ("calculator", "chain_mod", "countdown", "guess_number", "jsonl", "reasoning_gym")
CONTROL_AGENTS = ("actor_critic", "behavior_cloning", "ppo", "sac", "sb3_ppo", "sb3_sac")
WIDTHS = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
SMALL: dict[str, dict[str, Any]] = {
    "policy": {"hidden": [4], "steps": 2, "bins": 3, "config": {"model_type": "llama", **WIDTHS}},
    "agent": {"critic_hidden": [4], "batch_size": 4, "learning_starts": 4, "slice_steps": 8, "epochs": 1},
    "rollout": {"num_envs": 2, "horizon": 4, "prompts": 2, "group_size": 2, "rows": 4, "random_steps": 0},
    "replay": {"capacity": 64},
    "env": {"max_turn_tokens": 4, "size": 20, "vocabulary_size": 300},
}
"""Sizes that a group's target takes, in place of its own."""
SAMPLERS = {"size": 2, "length": 4}
OPTIONS = {"sb3_ppo": {"n_steps": 8, "batch_size": 8}, "sb3_sac": {"learning_starts": 4, "batch_size": 4}}
ALLOW = ("pairs",)
"""This module, by the name under which a configuration finds it."""
COMPLETED = {
    "gymnasium": {"id": "Pendulum-v1"},
    "jsonl": {"path": "FILE"},
    "custom": {"_target_": "pairs.pendulum"},
    "mjcf": {"path": "BODY", "reward": "pairs:upright", "max_steps": 5},
}
"""Settings that a user must give."""
BODY = """<mujoco><worldbody><body><joint name="hinge" axis="0 1 0"/><geom size="0.1" pos="0 0 0.5"/></body></worldbody>
<actuator><motor joint="hinge" ctrlrange="-1 1"/></actuator></mujoco>"""
KINDS = {
    "env": ("two_route", "chain_mod"),
    "policy": ("flow", "autoregressive"),
    "agent": ("actor_critic",),
    "replay": ("uniform",),
}
"""Options that a correction can tell apart from one another: domains, kinds of units, ages of rows."""
UPDATES = 2


def pendulum() -> Any:
    """An environment of a user's own."""
    return gymnasium.make("Pendulum-v1")


def upright(state: Any) -> Any:
    """The reward of a user's own robot, ``[K]``."""
    return np.cos(state.qpos[:, 0])


@dataclass(frozen=True)
class Outcome:
    """What became of a pair.

    Attributes:
        verdict: ``trained``, ``refused`` (before the first step), ``late`` (after it) or ``crashed``.
        message: of the refusal, or of what was raised.
    """

    verdict: str
    message: str = ""


def pairs(whole: bool = False) -> Iterator[dict[str, str]]:
    """Two options each, by their groups; unless ``whole``, corrections meet only options of which each is of a kind."""
    options = group_options()
    for one, other in itertools.combinations(GROUPS, 2):
        for first, second in itertools.product(options[one], options[other]):
            if whole or other != "correction" or first in KINDS.get(one, (first,)):
                yield {one: first, other: second}


def domain(choice: Mapping[str, str]) -> str:
    """The domain that a pair is of; language where it is of either."""
    if "env" in choice:
        return "language" if choice["env"] in LANGUAGE_ENVS else "control"
    if "policy" in choice:
        return "language" if choice["policy"].startswith("causal_lm") else "control"
    return "control" if choice.get("agent") in CONTROL_AGENTS else "language"


def chosen(choice: Mapping[str, str], files: Mapping[str, str]) -> dict[str, Any]:
    """The overrides of a pair, with the least beside it that its domain needs."""
    language = domain(choice) == "language"
    base = {"env": "chain_mod", "policy": "causal_lm_tiny"} if language else {"env": "two_route", "policy": "gaussian"}
    if choice.get("agent") in ("sac", "actor_critic"):
        base.pop("policy")
    elif "agent" not in choice:
        base["agent"] = "policy_gradient" if language else "ppo"
    whole = {**base, **choice}
    given = {f"env.{key}": files.get(value, value) for key, value in COMPLETED.get(whole["env"], {}).items()}
    if whole.get("policy") == "causal_lm_path":
        given["policy.path"] = files.get("MODEL", "MODEL")
    return {**whole, **given, "progress": False, "steps": 100, "eval_episodes": 1}


def shrunk(cfg: dict[str, Any]) -> dict[str, Any]:
    """A resolved configuration with small sizes wherever a target takes them."""
    cfg = deepcopy(cfg)
    for group, sizes in SMALL.items():
        node = cfg.get(group)
        if node:
            known = parameters(locate(node["_target_"], ALLOW), ALLOW)[0]
            node.update({key: value for key, value in sizes.items() if key in known and node.get(key) is not None})
    if cfg.get("replay"):
        sampler = cfg["replay"]["sampler"]
        sampler.update({key: value for key, value in SAMPLERS.items() if key in sampler})
    if cfg["choices"]["agent"] in OPTIONS:
        cfg["agent"]["options"] = OPTIONS[cfg["choices"]["agent"]]
    return cfg


@cache
def _resolved(overrides: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    return resolve_defaults(compose(dict(overrides), allow=ALLOW), allow=ALLOW)


def tried(choice: Mapping[str, str], files: Mapping[str, str]) -> Outcome:
    """Trains two updates of a pair; says whether a refusal came before the environment was stepped or asked."""
    collected = 0
    try:
        cfg = shrunk(_resolved(tuple(chosen(choice, files).items())))
        with TemporaryDirectory() as folder:
            job = Job(cfg, ALLOW)
            trainer = job.make_trainer(Path(folder))
            trainer.planned, trainer.save, trainer.evaluate = UPDATES, lambda: None, dict  # type: ignore[assignment]
            if trainer.rollout is not None:
                inner = trainer.rollout.collect

                def collect(version: int) -> Any:
                    nonlocal collected
                    collected += 1
                    return inner(version)

                trainer.rollout.collect = collect
            trainer.run()
    except UnifiedRLError as error:
        text = str(error)
        return Outcome("late" if collected else "refused" if "\n" not in text else "crashed", text)
    except Exception as error:
        return Outcome("crashed", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return Outcome("trained")


def covering(least: int = 1) -> list[dict[str, str]]:
    """Pairs, the same ones always, among which every option occurs at least so often."""
    left = {(group, name): least for group in GROUPS for name in group_options()[group]}
    kept = []
    for pair in sorted(pairs(), key=lambda pair: sha256(repr(pair).encode()).hexdigest()):
        if all(left[option] > 0 for option in pair.items()):
            kept.append(pair)
            for option in pair.items():
                left[option] -= 1
    for pair in sorted(pairs(), key=lambda pair: sha256(repr(pair).encode()).hexdigest()):  # what found no such partner
        if any(left[option] > 0 for option in pair.items()):
            kept.append(pair)
            for option in pair.items():
                left[option] -= 1
    return kept


def make_files(folder: Path) -> dict[str, str]:
    """A problem file, a robot and a model folder, for the options that read one."""
    (folder / "body.xml").write_text(BODY)
    lines = [json.dumps({"question": f"What is {i}+{i + 1}?", "answer": f"#### {2 * i + 1}"}) for i in range(40)]
    (folder / "problems.jsonl").write_text("\n".join(lines))
    pair = {"env": "chain_mod"}
    (folder / "model").mkdir()
    cfg = shrunk(_resolved(tuple(chosen(pair, {}).items())))
    Job(cfg).policy.save(str(folder / "model"))
    names = {"FILE": "problems.jsonl", "BODY": "body.xml", "MODEL": "model"}
    return {name: str(folder / file) for name, file in names.items()}


def main() -> int:
    """Tries every pair and writes a table of what became of each; 1 where one crashed or was refused late."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the CSV to write")
    parser.add_argument("--all", action="store_true", help="corrections with every option, not one of each kind")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th pair from the i-th")
    args = parser.parse_args()
    out, counts = args.out, Counter[str]()
    start, step = map(int, args.part.split("/"))
    warnings.simplefilter("ignore")
    with TemporaryDirectory() as folder, remembered(), out.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["group", "option", "with_group", "with_option", "verdict", "message"])
        files = make_files(Path(folder))
        for pair in itertools.islice(pairs(args.all), start, None, step):
            found = tried(pair, files)
            counts[found.verdict] += 1
            message = found.message.replace(folder, "FOLDER").replace(str(Path.cwd()), ".")
            table.writerow([*itertools.chain.from_iterable(pair.items()), found.verdict, message])
            file.flush()
    print(", ".join(f"{verdict} {count}" for verdict, count in sorted(counts.items())))
    return int(bool(counts["late"] + counts["crashed"]))


if __name__ == "__main__":
    sys.exit(main())
