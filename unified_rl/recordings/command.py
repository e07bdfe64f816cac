"""What ``unified-rl data`` does, for the command line and for :func:`unified_rl.data`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unified_rl.config import Override, parse_overrides
from unified_rl.errors import ConfigError
from unified_rl.instantiate import nearest

USAGE = {
    "import": "unified-rl data import FORMAT PATH FOLDER [env=NAME] [KEY=VALUE]",
    "check": "unified-rl data check FOLDER env=NAME",
    "show": "unified-rl data show FOLDER [--out FILE.png]",
    "make": "unified-rl data make ENV random|medium|expert|mixed FOLDER [--steps N] [--policy RUN] "
    "[--part FOLDER=SHARE]",
}
PLACES = {"import": 3, "check": 1, "show": 1, "make": 3}
"""Words without an equals sign behind the verb."""
TAKES = {"import": (), "check": (), "show": ("out",), "make": ("steps", "policy", "checkpoint", "parts")}
KEY = re.compile(r"[A-Za-z_][\w.]*=")


@dataclass
class Asked:
    """A command line behind ``unified-rl data``.

    Attributes:
        action: ``import``, ``check``, ``show`` or ``make``.
        places: the words without an equals sign.
        given: the others.
        options: ``out``, ``steps``, ``policy``, ``checkpoint`` and ``parts``, where they were given.
        allow: packages that configuration may build.
        config_dirs: folders with options of your own.
    """

    action: str
    places: list[str]
    given: list[Override]
    options: dict[str, Any] = field(default_factory=dict)
    allow: Sequence[str] = ()
    config_dirs: Sequence[str] = ()

    @classmethod
    def of(
        cls,
        words: Sequence[str],
        options: Mapping[str, Any],
        allow: Sequence[str] = (),
        overrides: Mapping[str, Any] | None = None,
        config_dirs: Sequence[str] = (),
    ) -> Asked:
        """Sorts the words; ``overrides`` are further ones with an equals sign.

        Raises:
            ConfigError: an unknown action, too few or too many words, or an option of another action.
        """
        if not words or words[0] not in USAGE:
            found = f"no {words[0]!r}; {nearest(words[0], USAGE)}" if words else "nothing"
            raise ConfigError(f"data does {found}: {'; '.join(USAGE.values())}" if not words else f"data does {found}")
        action, rest = words[0], list(words[1:])
        places = [word for word in rest if not KEY.match(word)]
        if len(places) != PLACES[action]:
            raise ConfigError(f"data {action} got {len(places)} of {PLACES[action]} words: {USAGE[action]}")
        kept = {key: value for key, value in options.items() if value not in (None, (), [], {})}
        wrong = [key for key in kept if key not in TAKES[action]]
        if wrong:
            raise ConfigError(
                f"data {action} takes no --{'part' if wrong[0] == 'parts' else wrong[0]}: {USAGE[action]}"
            )
        given = parse_overrides([word for word in rest if KEY.match(word)]) + parse_overrides(overrides or {})
        return cls(action, places, given, kept, allow, config_dirs)

    def env(self) -> dict[str, Any]:
        """Those of the environment."""
        return {word.key: word.value for word in self.given if word.key.split(".")[0] == "env"}

    def others(self, *known: str) -> dict[str, Any]:
        """The other words; all of ``known``, where any are.

        Raises:
            ConfigError: one that is not.
        """
        found = {word.key: word.value for word in self.given if word.key.split(".")[0] != "env"}
        wrong = [key for key in found if known and key not in known]
        if wrong:
            raise ConfigError(f"data {self.action} takes no {wrong[0]}=; {nearest(wrong[0], known)}")
        return found


def carried_out(asked: Asked) -> dict[str, Any]:
    """Does what is asked for.

    Returns:
        Of ``import``: ``rows`` (their number), ``notes`` and ``findings``; of ``check``: ``fits`` and ``findings``; of
        ``show`` and ``make``: what :func:`~unified_rl.recordings.showing.describe_data` says, and ``picture``.
    """
    return ACTIONS[asked.action](asked)


def _import(asked: Asked) -> dict[str, Any]:
    from unified_rl.recordings.checking import for_machines
    from unified_rl.recordings.importing import import_data

    format, path, folder = asked.places
    rows, notes, found = import_data(format, path, folder, asked.others(), asked.env(), asked.allow, asked.config_dirs)
    return {"rows": len(rows), "folder": folder, "notes": notes, "findings": for_machines(found)}


def _check(asked: Asked) -> dict[str, Any]:
    from unified_rl.recordings.checking import check_data, for_machines

    asked.others("env")
    found = check_data(asked.places[0], asked.env(), asked.allow, asked.config_dirs)
    return {"fits": all(one.level != "error" for one in found), "findings": for_machines(found)}


def _show(asked: Asked) -> dict[str, Any]:
    from unified_rl.recordings.showing import describe_data, draw_returns

    if asked.given:
        raise ConfigError(f"data show takes no {asked.given[0].key}=: {USAGE['show']}")
    out = asked.options.get("out")
    if out is not None and Path(out).suffix != ".png":
        raise ConfigError(f"--out {out} must end in .png")
    told = describe_data(asked.places[0])
    return told if out is None else {**told, "picture": str(draw_returns(asked.places[0], Path(out)))}


def _make(asked: Asked) -> dict[str, Any]:
    from unified_rl.recordings.making import make_data
    from unified_rl.recordings.showing import describe_data

    seed = asked.others("seed").get("seed", 0)
    if not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"seed={seed} must be a whole number from 0 on")
    settings = asked.env()
    if "env" in settings:
        raise ConfigError(f"data make takes the environment as its first word: {USAGE['make']}")
    make_data(
        *asked.places,
        **asked.options,
        settings=settings,
        seed=seed,
        allow=asked.allow,
        config_dirs=asked.config_dirs,
    )
    return describe_data(asked.places[2])


ACTIONS: dict[str, Callable[[Asked], dict[str, Any]]] = {
    "import": _import,
    "check": _check,
    "show": _show,
    "make": _make,
}


def run(
    words: Sequence[str],
    options: Mapping[str, Any],
    allow: Sequence[str],
    as_json: bool,
    config_dirs: Sequence[str] = (),
) -> int:
    """Does it and prints it; 1 where a check found errors."""
    told = carried_out(Asked.of(words, options, allow, config_dirs=config_dirs))
    print(json.dumps(told, indent=1) if as_json else _text(words[0], told))
    return int(told.get("fits") is False)


def _text(action: str, told: Mapping[str, Any]) -> str:
    from unified_rl.recordings.showing import shown

    if action in ("show", "make"):
        return "\n".join([shown(told), *([f"picture: {told['picture']}"] if "picture" in told else [])])
    lines = [f"{one['level']}: {one['text']}" for one in told["findings"]]
    if action == "check":
        return "\n".join([*lines, "the rows fit" if told["fits"] else "the rows do not fit"])
    return "\n".join([*(f"note: {note}" for note in told["notes"]), *lines, f"{told['rows']} rows: {told['folder']}"])


def parts_of(words: Sequence[str]) -> dict[str, float]:
    """Folders and shares of ``--part FOLDER=SHARE``.

    Raises:
        ConfigError: no share, or a folder twice.
    """
    out: dict[str, float] = {}
    for word in words:
        name, _, share = word.rpartition("=")
        try:
            value = float(share)
        except ValueError:
            value = 0.0
        if not name or not value > 0 or name in out:
            raise ConfigError(f"--part {word} must be FOLDER=SHARE, with a share above 0 and each folder once")
        out[name] = value
    return out
