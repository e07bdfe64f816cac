"""Files and names that somebody else may have written: read within bounds, refused in one line, never followed outside.

A configuration is small. A file that is not, or that unfolds into something that is not, was made to stop the reader.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unified_rl.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import yaml

MAX_BYTES = 256 * 1024
"""Of one YAML file; the largest that a run writes has about 8 kB."""
MAX_VALUES = 20_000
"""Values in one configuration, those that an alias or a reference repeats counted each time."""
MAX_DEPTH = 64
"""Mappings and lists inside each other."""
MAX_NAME = 200
"""Bytes in the name of a folder; file systems take 255, and checkpoints of it are written beside under longer names."""

LARGE = f"more than {MAX_VALUES} values (with aliases written out), or {MAX_DEPTH} levels: no configuration is so large"


def read_yaml(path: Path, error: type[Exception] = ConfigError) -> Any:
    """The content of a YAML file, which builds nothing and is bounded in size, depth and what its aliases unfold to.

    Args:
        path: the file.
        error: the kind to raise.

    Raises:
        ConfigError: or ``error``; no such file, no YAML, or beyond the bounds. The message names the file.
    """
    import yaml

    text = _read_text(path, MAX_BYTES, error)
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _unfolded(node) > MAX_VALUES:
            raise error(f"{path} holds {LARGE}")
        return loader.construct_document(node)
    except RecursionError:
        raise error(f"{path} holds {LARGE}") from None
    except (yaml.YAMLError, ValueError, TypeError) as problem:
        if isinstance(problem, error):
            raise
        raise error(f"{path} is no YAML that can be read: {' '.join(str(problem).split())[:200]}") from problem


def _unfolded(root: yaml.Node) -> int:
    """Values that a YAML document stands for; more than :data:`MAX_VALUES` where it is deeper than allowed, or cyclic.

    An alias is the node that it names, so each node is counted once and its count reused.
    """
    import yaml

    counts: dict[int, int] = {}

    def count(node: yaml.Node, depth: int) -> int:
        if depth > MAX_DEPTH:
            return MAX_VALUES + 1
        if id(node) not in counts:
            inner: list[yaml.Node] = []
            if isinstance(node, yaml.SequenceNode):
                inner = node.value
            elif isinstance(node, yaml.MappingNode):
                inner = [part for pair in node.value for part in pair]
            counts[id(node)] = MAX_VALUES + 1  # what an alias inside it to itself stands for
            counts[id(node)] = 1 + sum(count(part, depth + 1) for part in inner)
        return counts[id(node)]

    return count(root, 0)


def read_json(path: Path, max_bytes: int = 16 * 1024 * 1024) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        CheckpointError: no such file, not an object, too large or too deep; the message names the file.
    """
    text = _read_text(path, max_bytes, CheckpointError)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise CheckpointError(f"{path} is damaged: {' '.join(str(problem).split())}") from problem
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it holds no object of names and values")
    return value


def _read_text(path: Path, limit: int, error: type[Exception]) -> str:
    if not path.is_file():
        raise error(f"{path} is no regular file" if os.path.lexists(path) else f"there is no file {path}")
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise error(f"{path} has more than {limit} bytes, which no file of its kind needs")
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise error(f"{path} cannot be read: {problem}") from problem


def check_size(value: Any, where: str) -> None:
    """Refuses a value that is larger or deeper than any configuration.

    Raises:
        ConfigError: names ``where``.
    """
    for number, depth in enumerate(_depths(value)):
        if number > MAX_VALUES or depth > MAX_DEPTH:
            raise ConfigError(f"{where} holds {LARGE}")


def _depths(value: Any) -> Iterator[int]:
    """The depth of every value inside ``value``, without recursion."""
    waiting = [(value, 0)]
    while waiting:
        one, depth = waiting.pop()
        yield depth
        inner = one.values() if isinstance(one, Mapping) else one if isinstance(one, list | tuple) else ()
        waiting.extend((part, depth + 1) for part in inner)


def check_name(name: object, where: str) -> str:
    """``name``, which is to be that of one folder: no path, nothing hidden, nothing that a terminal acts on.

    Raises:
        ConfigError: it is not; names ``where``.
    """
    if not isinstance(name, str) or not name.strip():
        raise ConfigError(f"{where} is {name!r}; it must be the name of a folder")
    shown = f"{where} is {name[:60]!r}{'...' if len(name) > 60 else ''}"
    if "/" in name or "\\" in name or name.startswith(".") or not name.isprintable():
        raise ConfigError(
            f"{shown}; a name has no '/' or '\\', no control characters and no leading '.': it stays in its folder"
        )
    if len(name.encode()) > MAX_NAME:
        raise ConfigError(f"{shown}, {len(name.encode())} bytes; a name has at most {MAX_NAME}")
    return name


def refuse_links(folder: Path) -> None:
    """Refuses to write into a folder in which something stands for a place outside it.

    What is appended to or replaced through such a link is a file of somebody else's choice. The folder itself may be a
    link: its owner made it.

    Raises:
        CheckpointError: names the entry.
    """
    root = folder.resolve()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(root):
                raise CheckpointError(
                    f"{entry.path} is a link out of its folder, and nothing is written through it; put the file itself "
                    "there, or link the whole folder"
                )
            if not (entry.is_symlink() or entry.is_dir() or entry.is_file()) and os.path.lexists(entry.path):
                raise CheckpointError(f"{entry.path} is neither a file nor a folder; remove it")
