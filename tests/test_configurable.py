"""What a configuration may build of this package: the parts that are marked, all of them, and nothing else."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import unified_rl
from unified_rl.agents.loss import TERMS
from unified_rl.config import IMPLIED
from unified_rl.configurable import is_configurable, marked
from unified_rl.correction import Correction
from unified_rl.correction.kernels import KERNELS
from unified_rl.correction.levels import LEVELS
from unified_rl.correction.lookup import find
from unified_rl.correction.penalties.penalty import PENALTIES
from unified_rl.envs.language.rewards import Rewards
from unified_rl.errors import ConfigError
from unified_rl.instantiate import locate, parameters
from unified_rl.objectives.coefficients import COEFFICIENTS
from unified_rl.replay import Replay, Sampler
from unified_rl.returns.columns import COLUMNS
from unified_rl.returns.difficulty import DIFFICULTIES
from unified_rl.returns.gates import GATES
from unified_rl.returns.maps import MAPS
from unified_rl.returns.trackers import TRACKERS
from unified_rl.study.grid import Study
from unified_rl.study.recipes import Recipe
from unified_rl.training.engine import RayEngine
from unified_rl.training.learner import DataParallel, FullyShard
from unified_rl.training.warm_start import WarmStart

FACTORIES = {"make_mjcf", "make_mujoco"}
"""The functions among the parts: each returns one new object and does nothing else. Everything else is a class."""

KINDS: dict[str, Callable[[Any], bool]] = {
    "environment": lambda part: hasattr(part, "domain") and (hasattr(part, "step_batch") or hasattr(part, "problems")),
    "policy": lambda part: hasattr(part, "log_prob") and hasattr(part, "nll"),
    "agent": lambda part: hasattr(part, "update") and "version" in inspect.getsource(part),
    "sampler": lambda part: issubclass(part, Sampler),
    "replay": lambda part: issubclass(part, Replay),
    "rollout": lambda part: hasattr(part, "collect"),
    "source of rows": lambda part: hasattr(part, "rows") and hasattr(part, "check"),
    "context of prompts": lambda part: hasattr(part, "check") and "__call__" in vars(part),
    "beginning of answers": lambda part: hasattr(part, "begin") and hasattr(part, "check"),
    "speaker of rollouts": lambda part: hasattr(part, "speaks") and hasattr(part, "check"),
    "starts of episodes": lambda part: hasattr(part, "number") and hasattr(part, "attach"),
    "curriculum of prompts": lambda part: hasattr(part, "choose") and hasattr(part, "told"),
    "reward functions": lambda part: part is Rewards,
    "learner": lambda part: part in (DataParallel, FullyShard),
    "plain settings": lambda part: part in (Correction, Study, Recipe, WarmStart, RayEngine),
}
"""What a part may be. A class of none of these kinds has no place in a file; a loader or a verb least of all."""


@cache
def modules() -> list[Any]:
    """Every module of the package, the mapped rooms ``envs``, ``agents`` and ``configs`` included."""
    rooms = [unified_rl, *(importlib.import_module(f"unified_rl.{name}") for name in ("envs", "agents", "configs"))]
    found = [
        importlib.import_module(info.name)
        for room in rooms
        for info in pkgutil.walk_packages(room.__path__, f"{room.__name__}.")
        if not info.name.rpartition(".")[2].startswith("_")
    ]
    return list({module.__name__: module for module in [*rooms, *found]}.values())


def named(holder: Any) -> Iterator[tuple[str, Any]]:
    for name in dir(holder):
        if not name.startswith("_"):
            yield name, getattr(holder, name, None)


def callables() -> Iterator[tuple[str, Any]]:
    """Every public path of the package to something that can be called, two levels deep into classes."""
    for module in modules():
        for name, value in named(module):
            if not callable(value):
                continue
            yield f"{module.__name__}.{name}", value
            if isinstance(value, type) and value.__module__ == module.__name__:
                for inner, method in named(value):
                    if callable(method):
                        yield f"{module.__name__}.{name}.{inner}", method


def accepted(path: str) -> bool:
    try:
        locate(path)
    except ConfigError:
        return False
    return True


def test_what_is_accepted_is_exactly_what_is_marked() -> None:
    paths = dict(callables())
    assert len(paths) > 2000, "the walk has lost the package"
    wrong = [path for path, value in paths.items() if accepted(path) != is_configurable(value)]
    assert not wrong
    assert {id(part) for part in marked()} <= {id(value) for value in paths.values()}, "a part that no path reaches"


@pytest.mark.parametrize(
    "path",
    [
        "unified_rl.train",
        "unified_rl.resume",
        "unified_rl.Run",
        "unified_rl.load_policy",
        "unified_rl.assemble",
        "unified_rl.read_rows",
        "unified_rl.training.run.Job",
        "unified_rl.training.run.resume",
        "unified_rl.training.run.record_dataset",
        "unified_rl.training.provenance.write_run",
        "unified_rl.training.settings.TrainSettings",
        "unified_rl.study.compare.compare",
        "unified_rl.study.workers.run_jobs",
        "unified_rl.study.lab.run.lab",
        "unified_rl.study.Study.from_config",
        "unified_rl.replay.persist.save",
        "unified_rl.replay.persist.Saved",
        "unified_rl.files.write_atomically",
        "unified_rl.replay.store.MemmapStore",
        "unified_rl.policies.pretrained.load_folder",
        "unified_rl.envs.language.scoring.GuardedScorer",
        "unified_rl.envs.language.scoring_worker.main",
        "unified_rl.agents.teacher.load_teacher",
        "unified_rl.instantiate.allowing",
        "unified_rl.config.build",
        "unified_rl.configurable.configurable",
        "unified_rl.cli.main",
        "unified_rl.policies.causal_lm.CausalLM.save",
        "unified_rl.replay.Replay.dumps",
    ],
)
def test_no_verb_no_loader_and_nothing_that_writes_can_be_named(path: str) -> None:
    with pytest.raises(ConfigError, match="no part that a configuration may build"):
        locate(path, ["mine", "unified_rl"])  # nor where somebody allows the whole package
    with pytest.raises(ConfigError):
        find(path, LEVELS, "correction.level")


def test_every_part_is_of_a_kind_that_a_file_may_hold() -> None:
    modules()
    functions = {part.__name__ for part in marked() if not isinstance(part, type)}
    assert functions == FACTORIES
    classes = [part for part in marked() if isinstance(part, type)]
    kinds = {part: {kind for kind, is_one in KINDS.items() if is_one(part)} for part in classes}
    assert not [part for part, fits in kinds.items() if not fits]
    assert set.union(*kinds.values()) == set(KINDS), "a kind that no part is of"


def test_every_target_that_ships_is_marked(source: Path) -> None:
    texts = {path: path.read_text() for path in sorted((source / "configs").rglob("*.yaml"))}
    targets = {found for text in texts.values() for found in re.findall(r"_target_: *([\w.]+)", text)}
    assert len(targets) > 20 and all(is_configurable(locate(target)) for target in targets | set(IMPLIED.values()))


def test_no_part_takes_what_only_the_command_line_may_say() -> None:
    modules()
    for part in marked():
        known, is_open = parameters(part)
        assert "allow" not in known and not is_open, f"{part}: a node could say anything to it"


def test_a_mark_is_the_objects_own() -> None:
    class Inner(Replay):
        """A subclass that nobody marked."""

    assert is_configurable(Replay) and not is_configurable(Inner) and not is_configurable(Replay.extend)


@pytest.mark.parametrize(
    "table", [KERNELS, LEVELS, PENALTIES, COEFFICIENTS, TERMS, GATES, COLUMNS, MAPS, TRACKERS, DIFFICULTIES]
)
def test_a_rule_of_this_package_is_one_of_its_table(table: dict[str, Any]) -> None:
    for path in ("unified_rl.training.run.resume", "unified_rl.replay.Replay", "unified_rl.train"):
        with pytest.raises(ConfigError, match="is none of what can stand there"):
            find(path, table, "setting")
    rule = next(rule for rule in table.values() if hasattr(rule, "__qualname__"))
    assert find(f"{rule.__module__}.{rule.__qualname__}", table, "setting") is rule
