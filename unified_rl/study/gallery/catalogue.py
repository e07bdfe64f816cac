"""The presets as they stand in their files, by family; nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from unified_rl.config import preset, preset_names


@dataclass(frozen=True)
class Entry:
    """One preset: its name and the fields of its file, those of the preset it extends filled in."""

    name: str
    config: dict[str, Any]

    @property
    def summary(self) -> str:
        """What it does, in one line."""
        return str(self.config.get("summary", ""))

    @property
    def experimental(self) -> bool:
        """Whether constants or the formula were not read in a full source."""
        return bool(self.config.get("experimental", False))

    @property
    def level(self) -> str:
        """Name of the level."""
        return part_name(self.config.get("level", "unit"))

    @property
    def kernel(self) -> str:
        """Name of the kernel."""
        return part_name(self.config.get("kernel", "constant"))


@dataclass(frozen=True)
class Family:
    """Presets that belong together: a title, a file name, a few sentences, and the presets in reading order."""

    title: str
    slug: str
    text: str
    presets: tuple[str, ...]


def part_name(node: Any) -> str:
    """The name of a part that is given as a bare name or as a mapping."""
    return str(node["name"] if isinstance(node, dict) else node)


def names() -> list[str]:
    """The presets, sorted."""
    return preset_names("correction")


def entry(name: str) -> Entry:
    """A preset by name.

    Raises:
        ConfigError: there is none (names the nearest).
    """
    return Entry(name, preset("correction", name))


@cache
def data(name: str) -> Any:
    """The content of one of the gallery's data files, ``notes`` or ``classes``."""
    import yaml

    return yaml.safe_load(resources.files(__package__).joinpath(f"{name}.yaml").read_text(encoding="utf-8"))


def families() -> list[Family]:
    """The families in reading order; presets that none lists come last, under ``Other``."""
    listed = [Family(f["title"], f["slug"], f["text"], tuple(f["presets"])) for f in data("notes")["families"]]
    known = set(names())
    listed = [Family(f.title, f.slug, f.text, tuple(p for p in f.presets if p in known)) for f in listed]
    rest = sorted(known - {preset for family in listed for preset in family.presets})
    return [*listed, *([Family("Other", "other", "", tuple(rest))] if rest else [])]


def listing() -> str:
    """Every preset on one line, by family: name, level / kernel, a star where experimental, summary."""
    lines = []
    for family in families():
        lines.append(f"\n{family.title}")
        for e in map(entry, family.presets):
            mark = "*" if e.experimental else " "
            lines.append(f"  {e.name:20s} {e.level + ' / ' + e.kernel:27s}{mark} {e.summary}")
    lines.append(
        "\n* experimental: constants or the formula were not read in a full source; no reproduction is claimed"
        "\nunified-rl corrections show NAME prints one in full and draws its weight."
    )
    return "\n".join(lines).lstrip("\n")


def listed() -> list[dict[str, Any]]:
    """The same for machines."""
    return [
        {
            "name": e.name,
            "family": family.title,
            "level": e.level,
            "kernel": e.kernel,
            "experimental": e.experimental,
            "summary": e.summary,
        }
        for family in families()
        for e in map(entry, family.presets)
    ]
