"""The numbers of docs/results/control.md are those of its CSV files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from unified_rl.study.results import RunData, group_runs, read_results, summarise
from unified_rl.study.statistics import probability_of_improvement

FILES = {"PPO after": "results.csv", "SAC": "sac_results.csv", "Classes of policy": "classes_results.csv"}
"""Beginnings of the page's sections, and the files in which their runs are."""


@pytest.fixture(scope="module")
def sections(source: Path) -> dict[str, str]:
    text = (source / "docs" / "results" / "control.md").read_text()
    parts = text.split("\n## ")[1:]
    return {name: part for name in FILES for part in parts if part.startswith(name)}


def cells(source: Path, name: str) -> dict[tuple[str, str], list[RunData]]:
    found = group_runs(read_results(source / "docs" / "results" / "control" / FILES[name]), ["domain", "correction"])
    return {(str(domain), str(arm)): runs for (domain, arm), runs in found.items()}


def whole(x: float) -> str:
    return f"{x:.0f}".replace("-0", "0") if abs(x) < 1 else f"{x:.0f}"


def test_the_tables_are_those_of_the_files(source: Path, sections: dict[str, str]) -> None:
    for name, section in sections.items():
        told = {}
        for line in re.findall(r"^\| \w+ \| `\w+` \|.*$", section, flags=re.MULTILINE):
            domain, arm, *numbers = [word.strip(" `") for word in line.strip("|").split("|")]
            told[domain, arm] = numbers
        found = {}
        for key, runs in cells(source, name).items():
            final = summarise(runs)[0].final
            found[key] = [
                " ".join(whole(run.last()) for run in runs),
                whole(final.estimate),
                f"[{whole(final.low)}, {whole(final.high)}]",
            ]
        assert told == found, name
        assert any(arm == "frozen" for _, arm in found), "no null control"


def test_the_probabilities_of_improvement_are_those_of_the_file(source: Path, sections: dict[str, str]) -> None:
    found = cells(source, "PPO after")
    domains = list(dict.fromkeys(domain for domain, _ in found))
    lines = re.findall(r"^\| (`ppo` against `sb3`|`ppo` against `zoo`|`tuned` .*?) \|(.*)\|$", sections["PPO after"],
                       flags=re.MULTILINE)  # fmt: skip
    assert len(lines) == 3
    for words, numbers in lines:
        other = "sb3" if "sb3" in words else "zoo"

        def own(domain: str, words: str = words) -> str:
            return "tuned" if words.startswith("`tuned") and (domain, "tuned") in found else "ppo"

        def told(places: list[str], other: str = other) -> str:
            ours = [[run.last() for run in found[domain, own(domain)]] for domain in places]
            theirs = [[run.last() for run in found[domain, other]] for domain in places]
            p = probability_of_improvement(ours, theirs)
            return f"{p.estimate:.2f} [{p.low:.2f}, {p.high:.2f}]"

        shared = [domain for domain in domains if (domain, other) in found]
        expected = [told([domain]) if domain in shared else "" for domain in domains]
        assert [number.strip() for number in numbers.split("|")] == [*expected, told(shared)], words
