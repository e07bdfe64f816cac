"""Presets by name: ``configs/correction/NAME.yaml`` with dotted overrides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unified_rl.config import preset, preset_names
from unified_rl.correction.correction import FIELDS, Correction
from unified_rl.correction.lookup import check_keys
from unified_rl.errors import ConfigError

NESTED = {"level", "kernel", "pre", "thin", "mismatch", "reject", "penalty", "advantage", "proximal", "wrapper"}
"""Fields that hold rules with settings of their own."""


def correction_names() -> list[str]:
    """The names of the presets, sorted; ``none`` (no correction, for agents without one) is not among them."""
    return preset_names("correction")


def preset_config(name: str) -> dict[str, Any]:
    """The fields of a preset, with those of the preset it extends filled in.

    Raises:
        ConfigError: no such preset (names the nearest), or a file that is no correction.
    """
    return preset("correction", name)


def load_correction(name: str, **overrides: Any) -> Correction:
    """A preset as an object.

    Args:
        name: a file of ``configs/correction``.
        overrides: fields to change, dotted where nested: ``**{"kernel.clip_high": 0.3, "reduce": "token-mean"}``;
            numbers index into lists (``mismatch.0.high``). Rules of other packages are named by dotted paths within
            :func:`unified_rl.instantiate.allowing`; a kernel may also be given as an object.

    Raises:
        ConfigError: an unknown preset or field (names the nearest).
    """
    return Correction.from_config(overridden(preset_config(name), overrides))


def overridden(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A preset's fields with dotted ones changed, as :func:`load_correction` takes them; ``config`` stays as it is.

    Raises:
        ConfigError: a field that does not exist (names the nearest).
    """
    changed = dict(config)
    for path, value in overrides.items():
        _set(changed, path, value)
    return changed


def _set(config: dict[str, Any], path: str, value: Any) -> None:
    first, *rest = path.split(".")
    check_keys([first], FIELDS, "a correction")
    if rest and first not in NESTED:
        raise ConfigError(f"{path}: {first} is a plain value and has no fields")
    keys, node = [first, *rest], config
    for key in keys[:-1]:
        child = node[_position(node, key, path)] if isinstance(node, list) else node.get(key)
        if isinstance(child, str):
            child = {"name": child}
        elif child is None:
            child = {}
        if not isinstance(child, (dict, list)):
            raise ConfigError(f"{path}: {key} holds {child!r} and has no fields")
        child = dict(child) if isinstance(child, dict) else list(child)
        node[int(key) if isinstance(node, list) else key] = child
        node = child  # type: ignore[assignment]
    last = keys[-1]
    if isinstance(node, list):
        node[_position(node, last, path)] = value
    else:
        node[last] = value


def _position(rules: list[Any], key: str, path: str) -> int:
    if not key.isdigit() or int(key) >= len(rules):
        raise ConfigError(f"{path}: there is a list of {len(rules)} rules; index it with a number below that")
    return int(key)
