"""References between the values of a configuration: ``${agent.lr}``, and nothing that is computed.

OmegaConf's own interpolation calls functions (``${oc.env:NAME}`` would put a secret of whoever runs a shared file into
the ``config.yaml`` of the run) and unfolds references without a bound. Here a reference is a key, and the whole is
bounded.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

from unified_rl.errors import ConfigError
from unified_rl.untrusted import LARGE, MAX_DEPTH, MAX_VALUES

MISSING = "???"
"""What a file writes where the user has to give a value."""
WANTED: dict[str | int, str] = {
    "teacher": "RUN, the folder of a run or of a language model",
    "folder": "FOLDER, of a language model; a teacher may be the folder of a run too",
    "folders": "[RUN,RUN], folders of runs or of language models",
    "data": "ROWS, a folder that 'unified-rl evaluate RUN --record ROWS' wrote",
    "base": "ROWS, of another policy, a folder that 'unified-rl evaluate RUN --record ROWS' wrote",
}
"""What to give for such values by the last part of their key, which the files of this library leave open."""
MAX_CHARACTERS = 1_000_000
"""In all texts that references make."""

_KEY = re.compile(r"(?P<up>\.*)(?P<path>[\w-]+(?:\.[\w-]+|\[\d+\])*)")
_OPENING = re.compile(r"(?P<escapes>\\*)\$\{")
Place = tuple[str | int, ...]


def resolved(config: Any) -> Any:
    """A copy of a configuration in which every reference is replaced by the value of its key.

    A text that is one reference takes that value as it is, a mapping included; inside a longer text it is written out.
    ``${.lr}`` is a key beside the one that holds it, ``${..lr}`` one level up, ``\\${`` the characters themselves.

    Raises:
        ConfigError: a value that is missing, a key that does not exist, a function (``${oc.env:HOME}``), a cycle, or
            references that unfold without end. The message names the key.
    """
    try:
        return _References(config).value(())
    except RecursionError:
        raise ConfigError("references of this configuration lead to each other without end") from None


class _References:
    """Replaces the references of one configuration; each key is worked out once."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.known: dict[Place, Any] = {}
        self.active: list[Place] = []
        self.values, self.characters = MAX_VALUES, MAX_CHARACTERS

    def value(self, place: Place) -> Any:
        """What stands at ``place``, references replaced."""
        if place not in self.known:
            if place in self.active:
                raise ConfigError(f"{_text(place)} refers to itself: {' -> '.join(map(_text, [*self.active, place]))}")
            if len(self.active) > 2 * MAX_DEPTH:
                raise ConfigError(f"{_text(self.active[0])} holds {LARGE}")
            self.active.append(place)
            self.known[place] = self._replaced(self._raw(place), place)
            self.active.pop()
        return self.known[place]

    def _replaced(self, value: Any, place: Place) -> Any:
        if isinstance(value, dict):
            return {key: self.value((*place, key)) for key in value}
        if isinstance(value, list | tuple):
            return [self.value((*place, at)) for at in range(len(value))]
        if value == MISSING and isinstance(value, str):
            wanted = WANTED.get(place[-1])
            raise ConfigError(f"{_text(place)} has no default; set it: {_text(place)}={wanted or '...'}")
        if not isinstance(value, bool | int | float | str | None):
            raise ConfigError(
                f"{_text(place)} is a {type(value).__name__}, which no file can say; quote it if it is a text"
            )
        return self._replaced_text(value, place) if isinstance(value, str) and "${" in value else value

    def _replaced_text(self, text: str, place: Place) -> Any:
        pieces = list(_pieces(text, place))
        if len(pieces) == 1 and isinstance(pieces[0], tuple):
            return self._copied(pieces[0][0], place)
        return "".join(
            piece if isinstance(piece, str) else _written(self._copied(piece[0], place), place) for piece in pieces
        )

    def _copied(self, key: str, place: Place) -> Any:
        found = self.value(self._target(key, place))
        for part in _inside(found):
            self.values -= 1
            self.characters -= len(part) if isinstance(part, str) else 0
        if self.values < 0 or self.characters < 0:
            raise ConfigError(f"{_text(place)}: references make of this configuration {LARGE}")
        return copy.deepcopy(found)

    def _target(self, key: str, place: Place) -> Place:
        match = _KEY.fullmatch(key)
        assert match is not None
        start = place[: len(place) - len(match["up"])] if match["up"] else ()
        found: Place = start
        for part in re.findall(r"[\w-]+", match["path"]):
            found = self._followed(found)
            holder = self._raw(found)
            at = int(part) if isinstance(holder, list | tuple) and part.isdigit() else part
            inside = isinstance(holder, dict) or (isinstance(holder, list | tuple) and isinstance(at, int))
            if not inside or (at not in holder if isinstance(holder, dict) else int(at) >= len(holder)):
                raise ConfigError(f"{_text(place)} refers to {_text((*found, at))}, which does not exist")
            found = (*found, at)
        return found

    def _followed(self, place: Place) -> Place:
        """Where the value of ``place`` stands, if that is a reference as a whole."""
        for _ in range(MAX_DEPTH):
            raw = self._raw(place)
            pieces = list(_pieces(raw, place)) if isinstance(raw, str) else []
            if len(pieces) != 1 or not isinstance(pieces[0], tuple):
                return place
            place = self._target(pieces[0][0], place)
        raise ConfigError(f"{_text(place)} refers to itself")

    def _raw(self, place: Place) -> Any:
        value = self.config
        for part in place:
            value = value[part]
        return value


def _pieces(text: str, place: Place) -> Iterator[str | tuple[str]]:
    """A text cut into what stands there and, as 1-tuples, the keys that it refers to."""
    at = 0
    for opening in _OPENING.finditer(text):
        if opening.start() < at:
            raise ConfigError(f"{_text(place)} is {text[:80]!r}: a reference inside a reference is not followed")
        count = len(opening["escapes"])
        before = text[at : opening.start()] + "\\" * (count // 2)
        if count % 2:
            yield before + "${"
            at = opening.end()
            continue
        end = text.find("}", opening.end())
        key = text[opening.end() : end].strip() if end >= 0 else ""
        if not _KEY.fullmatch(key):
            raise ConfigError(_refusal(text, key, place))
        if before:
            yield before
        yield (key,)
        at = end + 1
    if at < len(text):
        yield text[at:]


def _refusal(text: str, key: str, place: Place) -> str:
    if ":" in key:
        return (
            f"{_text(place)} is {text[:80]!r}: only keys of the configuration are referred to, as in ${{agent.lr}}; "
            f"functions such as {key.partition(':')[0]} are not called, so write the value itself (in a shell: $NAME)"
        )
    return f"{_text(place)} is {text[:80]!r}, and what stands in its ${{...}} is no key; \\${{ means the characters"


def _inside(value: Any) -> Iterator[Any]:
    yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in inner:
        yield from _inside(part)


def _written(value: Any, place: Place) -> str:
    if isinstance(value, dict | list):
        raise ConfigError(f"{_text(place)} writes a {type(value).__name__} into a text; refer to a single value")
    return str(value)


def _text(place: Place) -> str:
    return ".".join(map(str, place)) or "the configuration"
