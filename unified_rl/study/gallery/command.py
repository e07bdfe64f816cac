"""What ``unified-rl corrections`` does."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unified_rl.errors import ConfigError
from unified_rl.study.gallery import catalogue

USAGE = "unified-rl corrections [show NAME [KEY=VALUE ...]]"


def run(words: Sequence[str], out: str | None, as_json: bool, write: str | None) -> None:
    """Lists the presets, shows one, or writes the page.

    Args:
        words: nothing, or ``show``, a name and overrides such as ``kernel.clip_high=0.3``.
        out: the PNG of ``show``; by default ``NAME.png`` here, and with ``as_json`` none.
        as_json: print JSON instead of text.
        write: a folder for the page and its pictures.

    Raises:
        ConfigError: words that are no command, an unknown preset or field, or an option that does not go with them.
    """
    if write is not None:
        if words or out or as_json:
            raise ConfigError("--write takes a folder and nothing else")
        from unified_rl.study.gallery.page import write_page

        print(write_page(Path(write)))
    elif not words:
        if out:
            raise ConfigError(f"--out needs a preset to draw: {USAGE} --out FILE.png")
        print(json.dumps(catalogue.listed(), indent=1) if as_json else catalogue.listing())
    elif words[0] != "show" or len(words) < 2:
        hint = f"unified-rl corrections show {words[0]}" if words[0] in catalogue.names() else USAGE
        raise ConfigError(f"cannot read {' '.join(words)!r}; write {hint}")
    else:
        _show(words[1], words[2:], out, as_json)


def _show(name: str, overrides: Sequence[str], out: str | None, as_json: bool) -> None:
    catalogue.entry(name)
    from unified_rl.config import parse_overrides
    from unified_rl.study.gallery.described import described

    changed = {override.key: override.value for override in parse_overrides(overrides)}
    shown = described(name, changed)
    path = None
    if out or not as_json:
        from unified_rl.study.gallery.draw import draw_one

        path = draw_one(name, shown.curves, Path(out or f"{name}.png"))
    if as_json:
        print(json.dumps(_plain(shown.for_machines()), indent=1, allow_nan=False))
    else:
        print(shown.text() + f"\n\nweight curve: {path}")


def _plain(value: Any) -> Any:
    """Values that JSON has; infinities as text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
