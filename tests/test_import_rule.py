"""Who may import whom: the core reaches neither envs nor agents, and its rooms import downwards only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ORDER = (
    "cli",
    "commands",
    "recordings",
    "study",
    "training",
    "rollout",
    "interop",
    "replay",
    "objectives",
    "interventions",
    "learning_rate",
    "optimizer",
    "flat_weights",
    "quick_adam",
    "correction",
    "returns",
    "policies",
    "config",
    "settling",
    "interpolation",
    "instantiate",
    "protocols",
    "observations",
    "spaces",
    "units",
    "prompts",
    "records",
    "files",
    "untrusted",
    "devices",
    "machine",
    "shard",
    "launching",
    "wrapping",
    "ranges",
    "errors",
    "stopping",
    "configurable",
    "lazy",
    "peer_names",
)
"""Rooms of the core from the top floor to the ground; a room imports itself and those after it."""
MAPPED = ("envs", "agents", "configs")


def imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Dotted names that a module imports, relative ones resolved, wherever in the file they stand."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{name}.{alias.name}" for alias in node.names)


def room_of(name: str) -> str | None:
    """The room of a dotted name, or None outside the package; ``unified_rl`` itself holds the version only."""
    parts = name.split(".")
    if parts[0] != "unified_rl" or len(parts) == 1 or parts[1].startswith("__"):
        return None
    return parts[1]


def may_import(room: str, other: str) -> bool:
    if room == other:
        return True
    if room in MAPPED:
        return other not in MAPPED
    return other in ORDER and ORDER.index(other) > ORDER.index(room)


def violations(module: str, text: str, is_package: bool = False) -> list[str]:
    room = room_of(module)
    others = {room_of(name) for name in imported(ast.parse(text), module, is_package)} - {None}
    return [f"{module} imports {other}" for other in sorted(map(str, others)) if room and not may_import(room, other)]


def modules(source: Path) -> Iterator[tuple[str, Path]]:
    for root, prefix in (("unified_rl", "unified_rl"), *((name, f"unified_rl.{name}") for name in MAPPED)):
        for path in sorted((source / root).rglob("*.py")):
            parts = path.relative_to(source / root).with_suffix("").parts
            yield ".".join([prefix, *(p for p in parts if p != "__init__")]), path


def test_every_module_imports_downwards_only(source: Path) -> None:
    found = [v for name, p in modules(source) for v in violations(name, p.read_text(), p.name == "__init__.py")]
    assert found == []


def test_every_room_has_its_place_in_the_order(source: Path) -> None:
    rooms = {room_of(name) for name, _ in modules(source)} - {None}
    assert rooms <= {*ORDER, *MAPPED}


@pytest.mark.parametrize(
    ("module", "text", "good"),
    [
        ("unified_rl.replay.store", "from unified_rl.units import Steps", True),
        ("unified_rl.replay.store", "from unified_rl import units, __version__", True),
        ("unified_rl.replay.store", "from unified_rl import training", False),
        ("unified_rl.replay.store", "from ..training import run", False),
        ("unified_rl.replay.store", "from . import ring", True),
        ("unified_rl.replay.store", "def f():\n    import unified_rl.rollout.control", False),
        ("unified_rl.training.run", "import unified_rl.envs.control", False),
        ("unified_rl.cli", "from unified_rl.agents import actor_critic", False),
        ("unified_rl.envs.control.base", "from unified_rl.protocols import StepResult", True),
        ("unified_rl.envs.control.base", "from unified_rl.agents.actor_critic import ActorCritic", False),
        ("unified_rl.agents.actor_critic", "from unified_rl.envs import control", False),
        ("unified_rl.units", "from unified_rl.errors import RecordError", True),
        ("unified_rl.errors", "from unified_rl.units import Steps", False),
    ],
)
def test_the_rule_tells_good_from_bad(module: str, text: str, good: bool) -> None:
    assert (violations(module, text) == []) is good


def test_the_light_modules_import_no_torch() -> None:
    code = (
        "import sys, unified_rl, unified_rl.cli, unified_rl.config, unified_rl.instantiate, unified_rl.errors, "
        "unified_rl.configs; sys.exit('torch' in sys.modules or 'hydra' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
