"""``docs/corrections.md``: the whole gallery as one page, with a picture for each family."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unified_rl.files import write_atomically
from unified_rl.study.gallery import catalogue
from unified_rl.study.gallery.catalogue import Family
from unified_rl.study.gallery.described import Described, described

PAGE, PICTURES = "corrections.md", "corrections"
COMMAND = "unified-rl corrections --write docs"


def write_page(folder: Path) -> Path:
    """Writes the page and its pictures into a folder; pictures whose curves have not changed are left alone."""
    from unified_rl.study.gallery.draw import digest_of, draw_family

    shown = all_described()
    for family in catalogue.families():
        members = {name: shown[name].curves for name in family.presets}
        path, digest = picture(folder, family), family_digest(family, shown)
        if digest_of(path) != digest:
            draw_family(members, digest, path)
    page = folder / PAGE
    write_atomically(page, render(shown))
    return page


def all_described() -> dict[str, Described]:
    """Every preset in full."""
    return {name: described(name) for name in catalogue.names()}


def picture(folder: Path, family: Family) -> Path:
    """Where a family's picture lies."""
    return folder / PICTURES / f"{family.slug}.png"


def family_digest(family: Family, shown: Mapping[str, Described]) -> str:
    """A hash of everything that a family's picture is drawn from."""
    text = ";".join(f"{name}={shown[name].curves.digest()}" for name in family.presets)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def render(shown: Mapping[str, Described]) -> str:
    """The page as Markdown."""
    families = catalogue.families()
    lines = [*_head(families, shown), *_classes(), "## All presets", "", *_table(families, shown), ""]
    for family in families:
        lines += _family(family, shown)
    return "\n".join(lines).rstrip() + "\n"


def _head(families: Sequence[Family], shown: Mapping[str, Described]) -> Iterator[str]:
    notes = catalogue.data("notes")
    unsure = sum(d.rule["experimental"] for d in shown.values())
    yield f"<!-- Written by `{COMMAND}` from configs/correction/ and unified_rl/study/gallery/; do not edit. -->"
    yield from ("# Corrections", "")
    yield f"{len(shown)} presets, {unsure} of them experimental. `correction=NAME` chooses one on the command line,"
    yield '`load_correction("NAME", **{"kernel.clip_high": 0.3})` in Python; `unified-rl corrections show NAME` prints'
    yield from ("every field of it and draws it.", "")
    yield from notes["introduction"].rstrip().splitlines()
    yield ""
    for family in families:
        yield f"- [{family.title}](#{_anchor(family.title)}): {', '.join(f'[{p}](#{p})' for p in family.presets)}"
    yield ""


def _classes() -> Iterator[str]:
    data = catalogue.data("classes")
    yield from ("## Presets that coincide", "")
    yield from catalogue.data("notes")["coincide"].rstrip().splitlines()
    yield from ("", "| presets | relation | how they differ |", "|---|---|---|")
    for relation, word in (("equal", "equal"), ("scaled", "equal up to a positive factor"), ("given", None)):
        for group in data[relation]:
            names = ", ".join(f"[{p}](#{p})" for p in group["presets"])
            differ = f" ({', '.join(group['differ'])})" if group.get("differ") else ""
            yield f"| {names} | {word or _given(group)} | {group['because']}{differ} |"
    yield ""


def _given(group: Mapping[str, Any]) -> str:
    settings = ", ".join(
        f"{name} `{key}={'null' if value is None else value}`"
        for name, changed in group["given"].items()
        for key, value in changed.items()
    )
    kind = "equal up to a positive factor" if group["relation"] == "scaled" else "equal"
    return f"{kind}, given {settings}" + (" and groups of one size" if group.get("equal_groups") else "")


def _table(families: Sequence[Family], shown: Mapping[str, Described]) -> Iterator[str]:
    yield "| preset | level | kernel | anchor | mismatch and rejection | penalty | reduce |"
    yield "|---|---|---|---|---|---|---|"
    for family in families:
        for name in family.presets:
            rule = shown[name].rule
            mark = " \\*" if rule["experimental"] else ""
            outer = [f"{_named(r)} ({r['level']})" for r in rule["mismatch"]] + [_reject(r) for r in rule["reject"]]
            penalty = [f"{p['name']} to {p['anchor']}" for p in rule["penalty"]]
            cells = [f"[{name}](#{name}){mark}", _named(rule["level"]), _named(rule["kernel"]), rule["anchor"]]
            cells += [", ".join(outer) or "-", ", ".join(penalty) or "-", rule["reduce"]]
            yield "| " + " | ".join(cells) + " |"
    yield from ("", "\\* experimental")


def _named(node: Mapping[str, Any]) -> str:
    return str(node["name"])


def _reject(rule: Mapping[str, Any]) -> str:
    if rule["name"] == "divergence":
        return f"reject {rule['estimator']} ({rule['over']})"
    return f"reject {rule['name']}" + (f" ({rule['level']})" if "level" in rule else "")


def _family(family: Family, shown: Mapping[str, Described]) -> Iterator[str]:
    digest = family_digest(family, shown)
    yield from (f"## {family.title}", "", family.text, "")
    yield f"![Weights against the log-ratio: {', '.join(family.presets)}]({PICTURES}/{family.slug}.png)"
    yield from (f"<!-- curves {digest} -->", "")
    for name in family.presets:
        yield from _preset(shown[name])


def _preset(shown: Described) -> Iterator[str]:
    rule = shown.rule
    yield from (f"### {shown.name}", "")
    yield from (f"{rule['summary']}." + (" **Experimental.**" if rule["experimental"] else ""), "")
    yield from (f"    {line}" for line in shown.formula)
    yield ""
    yield f"- Source: {rule['source']}. Confidence: {rule['confidence']}."
    if rule["advantage"]:
        yield f"- Advantage: {_settings('advantage', shown)}."
    if rule["proximal"] != {"provider": "snapshot"}:
        yield f"- Proximal policy: {_settings('proximal', shown)}."
    if rule["wrapper"]:
        yield f"- Outside the loss: {_settings('wrapper', shown)}."
    yield f"- Needs: {'; '.join(shown.wants())}."
    for line in shown.twins:
        yield f"- Same gradient: {line}."
    if shown.trap is not None:
        yield f"- Trap: {shown.trap}"
    yield ""


def _settings(field: str, shown: Described) -> str:
    """What the preset's file says about a field; defaults are left to ``show``."""
    given = catalogue.entry(shown.name).config[field]
    return ", ".join(str(value) if key == "name" else f"{key} {value}" for key, value in given.items())


def _anchor(title: str) -> str:
    """The anchor that Markdown viewers give to a heading."""
    return title.lower().replace(" ", "-")
