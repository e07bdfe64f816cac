"""Countdown: always solvable, and a verifier that counts the numbers."""

from __future__ import annotations

from fractions import Fraction
from itertools import permutations

import pytest
import torch

from unified_rl.envs.language import Countdown
from unified_rl.envs.language.countdown import fold
from unified_rl.errors import ConfigError


def reachable(numbers: list[Fraction], operators: str) -> set[Fraction]:
    """Every value of every expression that uses all numbers once, by combining pairs."""
    if len(numbers) == 1:
        return {numbers[0]}
    out: set[Fraction] = set()
    for i, j in permutations(range(len(numbers)), 2):
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        a, b = numbers[i], numbers[j]
        values = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}
        for operator in operators:
            if (value := values[operator]) is not None:
                out |= reachable([*rest, value], operators)
    return out


@pytest.mark.parametrize(("numbers", "operators"), [(3, "+-*"), (3, "+-*/"), (2, "+")])
def test_every_problem_has_a_solution_by_brute_force(numbers: int, operators: str) -> None:
    env = Countdown(numbers=numbers, operators=operators)
    for split in ("train", "eval"):
        for problem in env.problems(60, torch.Generator().manual_seed(0), split):
            assert 0 <= problem["target"] <= env.max_target
            assert problem["target"] in reachable([Fraction(n) for n in problem["numbers"]], operators)
            assert problem["text"] == f"{','.join(map(str, problem['numbers']))}={problem['target']}="


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("5*8-3", 1.0),
        ("(8*5)-3", 1.0),
        ("8 * 5 - 3", 1.0),
        ("3+5*8", 0.25),  # right numbers, wrong value
        ("5*8", 0.0),  # a number left out
        ("5*8-3+0", 0.0),  # one too many
        ("37", 0.0),
        ("5*8-3*1", 0.0),
        ("5*8-3=37", 0.0),
        ("8*5--3", 0.0),
        ("5*8-3;", 0.0),
        ("", 0.0),
        ("37 if 5*8-3 else 3", 0.0),
        ("__import__('os').system('false')", 0.0),
        ("(" * 30 + "5*8-3" + ")" * 30, 0.0),
    ],
)
def test_value_and_numbers_both_count(text: str, reward: float) -> None:
    env = Countdown(partial_credit=0.25)
    problem = {"split": "train", "numbers": [3, 5, 8], "target": 37}
    verdict = env._judge(problem, text, 1)
    assert (verdict.reward, verdict.correct, verdict.done) == (reward, reward == 1.0, True)


def test_wrong_answers_earn_nothing_by_default() -> None:
    verdict = Countdown()._judge({"numbers": [3, 5, 8], "target": 37}, "3+5*8", 1)
    assert verdict.reward == 0.0


def test_division_is_only_for_those_that_allow_it() -> None:
    problem = {"numbers": [2, 4], "target": 2}
    assert Countdown(numbers=2, operators="/")._judge(problem, "4/2", 1).reward == 1.0
    assert Countdown(numbers=2, operators="-")._judge(problem, "4/2", 1).reward == 0.0


def test_folding_spells_what_it_computes() -> None:
    assert fold([7, 5, 2], ["-", "*"]) == (4, "(7-5)*2")
    assert fold([7, 5, 2], ["*", "-"]) == (33, "7*5-2")
    assert fold([1, 2, 3], ["+", "/"]) == (1, "(1+2)/3")


def test_settings_out_of_range_are_refused() -> None:
    for arguments in ({"numbers": 7}, {"operators": "^"}, {"operators": ""}, {"partial_credit": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(arguments))):
            Countdown(**arguments)
