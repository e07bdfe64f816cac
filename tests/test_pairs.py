"""Pairs of options: two updates, or one line before the first step (all: ``python tests/pairs.py --out FILE``)."""

from __future__ import annotations

import csv
import warnings
from collections import Counter
from pathlib import Path

import pytest
from pairs import GROUPS, covering, make_files, pairs, tried
from run_cases import remembered

from unified_rl.config import group_options

pytestmark = pytest.mark.thorough

CHUNKS = 8


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_files(tmp_path_factory.mktemp("pairs"))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_a_pair_trains_two_updates_or_is_refused_before_the_first_step(chunk: int, files: dict[str, str]) -> None:
    wrong, verdicts = [], Counter[str]()
    with warnings.catch_warnings(), remembered():
        warnings.simplefilter("ignore")  # a rule that rejects everything says so
        for pair in covering()[chunk::CHUNKS]:
            found = tried(pair, files)
            verdicts[found.verdict] += 1
            if found.verdict not in ("trained", "refused") or (found.verdict == "refused" and not found.message):
                wrong.append((pair, found))
    assert not wrong, wrong[:3]
    assert verdicts["trained"] > 0, "not all are refused"


def test_every_option_is_among_the_pairs() -> None:
    options = Counter(option for pair in covering() for option in pair.items())
    assert all(options[group, name] >= 1 for group in GROUPS for name in group_options()[group])


def test_the_committed_table_is_of_all_pairs(source: Path) -> None:
    with (source / "docs" / "results" / "pairs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["verdict"] for row in rows} == {"trained", "refused"}
    found = {(row["group"], row["option"], row["with_group"], row["with_option"]) for row in rows}
    wanted = {tuple(word for option in pair.items() for word in option) for pair in pairs()}
    assert found == wanted, "run python tests/pairs.py --out docs/results/pairs.csv"
