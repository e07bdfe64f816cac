"""No pickle, and no call that runs what it reads: every loader is used in its safe form, everywhere in the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOMS = ("unified_rl", "envs", "agents", "benchmarks", "examples", "docs")
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
"""Not to be imported."""
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "torch.save",
    "torch.hub.load",
    "torch.jit.load",
    "torch.package.PackageImporter",
    "yaml.unsafe_load",
    "yaml.full_load",
    "yaml.load_all",
    "numpy.fromregex",
    "pandas.read_pickle",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "tempfile.mktemp",
}
"""Not to be called."""
NEEDS = {
    "numpy.load": {"allow_pickle": False},
    "tensordict.TensorDict.load_memmap": {"allow_pickle": False},
    "tensordict.load_memmap": {"allow_pickle": False},
    "from_pretrained": {"trust_remote_code": False},
}
"""Calls that are safe with these arguments alone; a name without a module is a method of anything."""
TRUE = ("shell", "trust_remote_code", "allow_pickle")
"""Arguments that are never true."""
OWN_PROCESSES = {"unified_rl/study/workers.py"}
"""Files that may use pipes between processes, which unpickle: both ends are started there."""
SAFE_LOADERS = ("SafeLoader", "CSafeLoader", "loader")


def sources(root: Path) -> Iterator[tuple[str, ast.Module]]:
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            yield path.relative_to(root).as_posix(), ast.parse(path.read_text())


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def names(tree: ast.AST) -> dict[str, str]:
    """What each name at the top of a call stands for: ``np`` is ``numpy``."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                found[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def called(node: ast.Call, known: dict[str, str]) -> str:
    parts: list[str] = []
    function: ast.AST = node.func
    while isinstance(function, ast.Attribute):
        parts.insert(0, function.attr)
        function = function.value
    if isinstance(function, ast.Name):
        return ".".join([known.get(function.id, function.id), *parts])
    return ".".join(["?", *parts])


def keyword(node: ast.Call, name: str) -> object:
    for given in node.keywords:
        if given.arg == name:
            return given.value.value if isinstance(given.value, ast.Constant) else ast.dump(given.value)
    return None


def complaints(path: str, tree: ast.Module) -> Iterator[str]:
    for name in imported(tree):
        if name.split(".")[0] in MODULES:
            yield f"{path} imports {name}"
        if name.startswith("multiprocessing") and path not in OWN_PROCESSES:
            yield f"{path} imports {name}, whose pipes unpickle"
    known = names(tree)
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = called(node, known)
        if name in CALLS:
            yield f"{path}:{node.lineno} calls {name}"
        if name == "yaml.load" and not any(word in ast.dump(node) for word in SAFE_LOADERS):
            yield f"{path}:{node.lineno} calls yaml.load without a safe loader"
        wanted = NEEDS.get(name, NEEDS.get(name.rpartition(".")[2], {}) if "." in name else {})
        spread = any(given.arg is None for given in node.keywords)  # **local holds them: looked at below
        for argument, value in wanted.items():
            if keyword(node, argument) is not value and not (spread and f"'{argument}'" in ast.dump(tree)):
                yield f"{path}:{node.lineno} calls {name} without {argument}={value}"
        for argument in TRUE:
            if keyword(node, argument) not in (None, False):
                yield f"{path}:{node.lineno} calls {name} with {argument}={keyword(node, argument)}"


def test_nothing_in_the_source_unpickles_or_runs_what_it_reads(source: Path) -> None:
    found = list(sources(source))
    assert len(found) > 150, "the walk has lost the source"
    assert not [line for path, tree in found for line in complaints(path, tree)]


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("import pickle", "imports pickle"),
        ("from joblib import load", "imports joblib.load"),
        ("import torch\ntorch.load('x', weights_only=True)", "calls torch.load"),
        ("from torch import load as read\nread('x')", "calls torch.load"),
        ("import numpy as np\nnp.load('x')", "without allow_pickle=False"),
        ("import numpy as np\nnp.load('x', allow_pickle=True)", "with allow_pickle=True"),
        ("from tensordict import TensorDict\nTensorDict.load_memmap('x')", "without allow_pickle=False"),
        ("from transformers import AutoModel\nAutoModel.from_pretrained('x')", "without trust_remote_code=False"),
        ("import yaml\nyaml.load(x, yaml.Loader)", "without a safe loader"),
        ("import yaml\nyaml.unsafe_load(x)", "calls yaml.unsafe_load"),
        ("import subprocess\nsubprocess.run('x', shell=True)", "with shell=True"),
        ("import os\nos.system('x')", "calls os.system"),
        ("eval('x')", "calls eval"),
        ("import multiprocessing", "whose pipes unpickle"),
    ],
)
def test_each_kind_is_found(code: str, word: str) -> None:
    assert any(word in line for line in complaints("x.py", ast.parse(code)))
