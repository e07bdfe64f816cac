"""Nothing is lost on the way from the source tree to an installation."""

from __future__ import annotations

import fnmatch
import re
import runpy
import subprocess
import sys
import tomllib
from importlib import import_module, metadata, resources
from pathlib import Path
from typing import Any

import pytest

MAPPED = ("envs", "agents", "configs")


def tree(source: Path) -> dict[str, Path]:
    """Files of the package by their place below ``unified_rl``, as they must be installed."""
    roots = {"": source / "unified_rl", **{f"{name}/": source / name for name in MAPPED}}
    return {
        f"{prefix}{path.relative_to(root).as_posix()}": path
        for prefix, root in roots.items()
        for path in root.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


@pytest.fixture
def arguments(source: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py hands to setuptools."""
    setuptools = pytest.importorskip("setuptools")
    caught: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **given: caught.update(given))
    monkeypatch.chdir(source)
    runpy.run_path("setup.py")
    return caught


def test_the_package_list_holds_every_module(source: Path, arguments: dict[str, Any]) -> None:
    folders = {f"unified_rl/{place}".rsplit("/", 1)[0] for place in tree(source) if place.endswith(".py")}
    assert {folder.replace("/", ".") for folder in folders} == set(arguments["packages"])
    assert len(arguments["packages"]) == len(set(arguments["packages"]))


def test_package_data_holds_every_file_that_is_not_python(source: Path, arguments: dict[str, Any]) -> None:
    patterns = arguments["package_data"]
    for place in tree(source):
        if not place.endswith(".py"):
            owners = [p for p in patterns if f"unified_rl/{place}".startswith(p.replace(".", "/") + "/")]
            rest = [(f"unified_rl/{place}".removeprefix(p.replace(".", "/") + "/"), patterns[p]) for p in owners]
            assert any(fnmatch.fnmatch(name, pattern) for name, given in rest for pattern in given), place


def test_the_installation_holds_every_file(source: Path) -> None:
    installed = {"": Path(import_module("unified_rl").__path__[0])}
    installed |= {f"{name}/": Path(import_module(f"unified_rl.{name}").__path__[0]) for name in MAPPED}
    for place, path in tree(source).items():
        prefix = next((p for p in installed if p and place.startswith(p)), "")
        found = installed[prefix] / place.removeprefix(prefix)
        assert found.is_file(), f"{place} is not installed"
        assert found.read_bytes() == path.read_bytes(), f"{place} is installed in another version"


def test_configuration_files_are_readable_as_resources() -> None:
    root = resources.files("unified_rl.configs")
    assert "defaults" in root.joinpath("train.yaml").read_text()
    assert root.joinpath("env", "half_cheetah.yaml").read_text().startswith("# @package _global_")


def test_mapped_packages_are_not_importable_under_their_short_names(source: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.util, sys; sys.exit(any(importlib.util.find_spec(n) for n in ('envs', 'agents', 'configs')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=60).returncode == 0
    done = subprocess.run([sys.executable, "-c", "import envs"], cwd=source, capture_output=True, text=True, timeout=60)
    assert done.returncode and "import this package as unified_rl.envs" in done.stderr


def test_the_version_is_one() -> None:
    assert metadata.version("unified-rl") == import_module("unified_rl").__version__


def plain_name(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def test_pins_are_what_is_wanted_by_what_is_installed(source: Path) -> None:
    """``pip install -c constraints.txt`` takes the extras: no pin is outside a range that a package declares."""
    requirements = pytest.importorskip("packaging.requirements")
    found = re.findall(r"^([\w.-]+)==(\S+)$", (source / "constraints.txt").read_text(), re.MULTILINE)
    pins = {plain_name(key): value for key, value in found}
    extras = tomllib.loads((source / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in ("datasets", "lora", "wandb", "trackio", "mlflow"):
        assert {plain_name(re.split("[<>=]", text)[0]) for text in extras[extra]} <= pins.keys()
    for owner in metadata.distributions():
        if plain_name(owner.metadata["Name"]) not in pins:
            continue
        for line in owner.requires or []:
            wanted = requirements.Requirement(line)
            pinned = pins.get(plain_name(wanted.name))
            if pinned is not None and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
                assert wanted.specifier.contains(pinned, prereleases=True), f"{owner.metadata['Name']} wants {line}"


def test_constraints_pin_every_declared_dependency(source: Path) -> None:
    project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (source / "constraints.txt").read_text(), re.MULTILINE))
    pinned = set(map(plain_name, pins))
    declared = {re.match(r"[\w.-]+", text)[0] for text in project["dependencies"]}  # type: ignore[index]
    assert set(map(plain_name, declared)) <= pinned
    assert pins["torch"].startswith("2.")
