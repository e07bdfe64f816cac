"""Everything the gallery knows about one preset."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unified_rl.correction.correction import Correction
from unified_rl.correction.presets import overridden, preset_config
from unified_rl.study.gallery import catalogue
from unified_rl.study.gallery.curves import SPAN, Curves, curves
from unified_rl.study.gallery.expand import expanded, needs
from unified_rl.study.gallery.formula import formula


@dataclass(frozen=True)
class Described:
    """A preset in full.

    Attributes:
        name: of the preset.
        rule: every field with the defaults of its parts.
        formula: the rule as lines of plain mathematics.
        needs: what a batch and a policy must offer.
        twins: presets with the same gradient on the same data, and how those are related that need a word.
        trap: what to beware of, or None.
        curves: its weights.
    """

    name: str
    rule: dict[str, Any]
    formula: list[str]
    needs: dict[str, Any]
    twins: list[str]
    trap: str | None
    curves: Curves

    def text(self) -> str:
        """For a terminal."""
        import yaml

        mark = "  [experimental: no reproduction is claimed]" if self.rule["experimental"] else ""
        about = ("name", "summary", "source", "confidence", "experimental")
        fields = {key: value for key, value in self.rule.items() if key not in about}
        blocks = [
            f"{self.name}: {self.rule['summary']}{mark}",
            f"source:     {self.rule['source']}\nconfidence: {self.rule['confidence']}",
            "\n".join(f"    {line}" for line in self.formula),
            yaml.safe_dump(fields, sort_keys=False, width=110).rstrip(),
            "needs: " + "; ".join(self.wants()),
            *[f"same gradient: {line}" for line in self.twins],
            *([] if self.trap is None else [textwrap.fill(f"trap: {self.trap}", 110)]),
        ]
        return "\n\n".join(blocks)

    def wants(self) -> list[str]:
        """What a batch and a policy must offer, in words."""
        found = [", ".join(self.needs["log_probs"]) or "no log-probs but the current policy's"]
        if self.needs["discrete"]:
            found.append("probabilities of discrete units")
        if self.needs["binary_rewards"]:
            found.append("rewards of 0 or 1")
        if self.needs["full_pass"]:
            found.append("a pass over the whole batch before its micro-batches")
        if self.needs["wrapper"]:
            found.append(f"a trainer that does {self.needs['wrapper']}")
        return found

    def for_machines(self) -> dict[str, Any]:
        """The same as plain values, curves included."""
        lines = {"log_ratio": self.curves.log_ratio, **self.curves.lines()}
        return {
            "rule": self.rule,
            "formula": self.formula,
            "needs": self.needs,
            "same_gradient": self.twins,
            "trap": self.trap,
            "curves": {key: [round(v, 6) for v in line.tolist()] for key, line in lines.items()},
        }


def described(name: str, overrides: Mapping[str, Any] | None = None) -> Described:
    """A preset in full, perhaps with dotted fields changed.

    Raises:
        ConfigError: an unknown preset, field or setting.
    """
    config = overridden(preset_config(name), overrides or {})
    rule = expanded(config)
    notes = catalogue.data("notes")
    return Described(
        name=name,
        rule=rule,
        formula=formula(rule),
        needs=needs(Correction.from_config(config)),
        twins=[] if overrides else twins(name),
        trap=notes["traps"].get(name),
        curves=curves(config, notes["spans"].get(name, SPAN)),
    )


RELATIONS = {
    "equal": "",
    "scaled": "up to a positive factor, ",
    "given": "with the settings that docs/corrections.md names, ",
}


def twins(name: str) -> list[str]:
    """What the classes of coinciding presets say about one, a line for each class it is in."""
    found = []
    for relation, words in RELATIONS.items():
        for group in catalogue.data("classes")[relation]:
            others = [other for other in group["presets"] if other != name]
            if len(others) < len(group["presets"]):
                found.append(f"{words}{', '.join(others)} ({group['because']})")
    return found
