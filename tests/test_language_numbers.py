"""One reader of numbers, one picker of answers: many spellings, what is accepted and what is not."""

from __future__ import annotations

from fractions import Fraction

import pytest

from unified_rl.envs.language.answers import marked_answer, spoken_formula, spoken_number
from unified_rl.envs.language.numbers import parse_number, read_number, same_number
from unified_rl.envs.language.scoring import Score
from unified_rl.envs.language.verifiers import Verifier, last, numeric

WHOLE = {
    "72": "72", " 72. ": "72", "$1,234.50": "1234.5", "-.5": "-0.5", "12%": "12", "007": "7", "0.10": "0.1",
    "1e5": "100000", "1.5e3": "1500", "1e-5": "0.00001", "1 234": "1234", "1,234,567": "1234567", "1\\,234": "1234",
    "1{,}234": "1234", "1\u202f234": "1234", "1'234": "1234", "\u22123": "-3", "\uff0d5": "-5", "\u20135": "-5",
    "$-5": "-5", "-$5": "-5", "+5": "5", "2 2/3": "8/3", "-2 1/2": "-5/2", "3/4": "3/4", "3 / 4": "3/4", "½": "1/2",
    "2½": "5/2", "1\\frac{1}{4}": "5/4", "\\frac{1}{2}": "1/2", "-\\dfrac{1}{2}": "-1/2", "\\tfrac{-3}{4}": "-3/4",
    "\\frac12": "1/2", "1.5 \\times 10^{3}": "1500", "1.5×10³": "1500", "**42**": "42", "`42`": "42", "(42)": "42",
    "\\boxed{42}": "42", "$42$": "42", "\\(42\\)": "42", "\\text{42}": "42", "5 million": "5000000", "5k": "5000",
    "US$ 5": "5", "Rs. 5,000": "5000", "28\\%": "28", "42\\!": "42",
    "10^3": "1000", "10^{-2}": "1/100", "-10^2": "-100", "2 \\times 10^3": "2000", "_42_": "42", "４２": "42",
    "－１．５％": "-1.5", "_-4.5_": "-4.5",
}  # fmt: skip
NO_NUMBER = [
    *("", "x", "nan", "inf", "1 2", "1,23", "--1", "1.2.3", "٣", "9" * 40, "24 clips", "5x", "5!", "2^3", "5\\pi"),
    *("\\sqrt{2}", "1/0", "5:30", "1/2/3", "3,4", "1,0003", "5M", "1e999999", "> 5", "0x10", "5e", "x2", "10**3"),
    *(
        "10²",
        "110^3",
        "10^3^2",
        "10^3x",
        "10^2.5",
        "3 10^2",
        "3 x  10^2",
        "10^3000",
        "10^x",
        "4_2",
        "x_4_",
        "４²",
        "10^2½",
    ),
    *("1" + ",000" * 21, "1\\frac{-1}{2}"),
    *("\\frac{1}{0}", "1/2 3", "5-3", "2–3", "3 4 5", "1e5e5", "3x4", "7²", "(3, 4)", "not 5", "1234,567.8.9", "#"),
]


@pytest.mark.parametrize(("text", "value"), WHOLE.items())
def test_a_number_is_read_exactly_however_it_is_spelled(text: str, value: str) -> None:
    assert parse_number(text) == Fraction(value)


@pytest.mark.parametrize("text", NO_NUMBER)
def test_what_is_no_number_or_an_unclear_one_reads_as_none(text: str) -> None:
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10-5=5 and then 1,200.", "1200"),
        ("it is -7", "-7"),
        ("the balance is \u22123", "-3"),
        ("the value is 1.5, not 3", "3"),
        ("the value is not 2, so 3", "3"),
        ("it is 42 on the 3rd day", "42"),
        ("one 1/4th", "1/4"),
        ("that makes 1e5", "100000"),
        ("The share is 3/4.", "3/4"),
        ("The answer is 2 2/3", "8/3"),
        ("The answer is 42. (7 apples were left over)", "42"),
        ("Final answer: **42** of 50", "42"),
        ("<think>it may be 3</think> so 5 then", "5"),
        ("<think>it is 3</think> done", "3"),
        ("Step 3: **42**", "42"),
        ("* 42", "42"),
        ("it costs Rs5000", "5000"),
        ("a 5-year plan", "5"),
        ("72kg", "72"),
        ("so x = 42!", "42"),
        ("=> 5", "5"),
        ("<b>5</b>", "5"),
        ("COVID-19 was 5 then, not x2", "5"),
        ("1, 2 or 3, 4", "4"),
        ("5 had COVID-19", "5"),
    ],
)
def test_the_number_that_a_text_ends_with(text: str, value: str) -> None:
    said = spoken_number(text)
    assert said is not None and said.value == Fraction(value)


@pytest.mark.parametrize(
    "text",
    [
        *("none", "x2", "f(3)", "(3, 4)", "[3,4]", "5 - 3", "10-3", "2*3", "2^3", "x^{2}", "\\sqrt{2}", "is - 3"),
        *("1:30", "1/2/2020", "2–3", "5x", "5\\pi", "72 + x", "3,4", "1,23", "12.5.3", "x > 5", "x != 5", "9" * 40),
        *("3x4", "5M", "5(3)", "2 \\cdot 3", "a/3", "x_2", "\\log_{3}", "7³", "±3", "-x+3"),
        *("forty 42nd", "the 1st", "3RD", "7th.", "The answer is not 42", "it isn't **42**"),
        *("it isn\u2019t 42", "never 42", "not equal to $42$", "it is not -42", "#### not 42"),
        *("it is 3 10^2", "1..5", "--$5", "\\sin{2}"),
    ],
)
def test_a_piece_of_something_else_is_no_number(text: str) -> None:
    said = spoken_number(text)
    assert said is None or said.value is None


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{12} " + "It holds. " * 400, "12"),
        (r"\boxed{3}, wait, that drops a term. \boxed{5}", "5"),
        (r"Fill in \boxed{}: the value is \boxed{7}.", "7"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox{42}", "42"),
        (r"\boxed 5", "5"),
        (r"$\boxed{1}$ and $\boxed{2}$", "1, 2"),
        (r"<answer>\boxed{42}</answer>", "42"),
        ("<answer>3</answer> no: <ANSWER> 5 </ANSWER>", "5"),
        ("#### 3\nso #### 4\nmore", "4"),
        ("#### 4\nso \\boxed{5}", "5"),
        ("\\boxed{4}\n#### 5", "5"),
        ("\\boxed{4}\n#### Checking the result\nIt holds.", "4"),
        (r"<think>\boxed{3}</think> <answer>4</answer>", "4"),
        (r"<think>\boxed{3}</think>", "3"),
        (r"\boxed{5} and then \boxed{6", "5"),
        ("#### ", ""),
        ("#### four", None),
        ("72", None),
        (r"\boxed{", None),
        (r"\boxed{}", None),
        ("<answer>5", None),
        (r"\boxedx{5}", None),
    ],
)
def test_the_last_mark_of_the_whole_text_is_the_answer(text: str, content: str | None) -> None:
    assert marked_answer(text) == content


def test_the_last_formula_is_the_answer_where_no_number_follows() -> None:
    assert spoken_formula("so $x+1$ or \\(x+2\\).") == "x+2"
    assert spoken_formula("so $x+1$, 5 times") is None and spoken_formula("$5 and $6") is None


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("5\\text{ km}", "5 kilometers", True),
        ("5\\text{ m}", "5\\text{ km}", False),
        ("5\\text{ m}^2", "5 square metres", True),
        ("5\\text{ m}^2", "5\\text{ m}^3", False),
        ("5", "5 apples", True),
        ("5", "5 million", False),
        ("5 million", "5,000,000", True),
        ("$5", "€5", False),
        ("$5", "5 dollars per day", True),
        ("28%", "28", True),
        ("28%", "0.28", True),
        ("0.28", "28\\%", True),
        ("28%", "28 apples", False),
        ("1/3", "0.333333", False),
        ("90^\\circ", "90", True),
        ("72", "72/hour", True),
    ],
)
def test_numbers_with_units_are_equal_where_nothing_was_thrown_away(one: str, other: str, same: bool) -> None:
    a, b = read_number(one), read_number(other)
    assert a is not None and b is not None and same_number(a, b) is same and same_number(b, a) is same


ACCEPTED = [
    *("so 72\n#### 72 apples", "#### 72 dollars.", "#### **72**", "#### \\boxed{72}", "\\boxed{72}", "#### = 72"),
    *("<answer>72</answer>", "#### $72", "#### 72.", "#### 72.0", "####72", "#### The answer is 72", "#### x = 72"),
    *("#### _72_", "#### ７２", "#### _72 apples_", "\\boxed{７２}", "\\boxed{_72_}"),
    *("#### 7.2e1", "#### 144/2", "\\boxed{72} " + "Checked. " * 200, "\\boxed{71} no: \\boxed{72}", "#### 72/hour"),
    *("#### 72 (rounded)", "#### 72%", "$\\boxed{72}$", "\\boxed{72\\text{ km}}", "\\boxed{\\text{72}}", "#### 71 1/1"),
]
REFUSED = [
    *(
        "",
        "####",
        "#### ",
        "#### seventy-two",
        "#### 71 apples",
        "#### 72.5 apples",
        "#### 172",
        "#### 720",
        "#### -72",
    ),
    *(
        "#### 1,072",
        "#### 72,000 dollars",
        "#### 72 or 1",
        "#### 72 or more",
        "#### 72 million",
        "#### 72x",
        "#### 72^2",
        "#### 72 + x",
    ),
    *("#### 8*9", "#### > 72", "#### 72:30", "#### 0.72", "\\boxed{}", "\\boxed{172}", "\\boxed{72!}"),
    *(
        "\\boxed{72} then \\boxed{73}",
        "<answer>71</answer>",
        "#### 72\n#### 73",
        "#### __import__('os')",
        "#### 72\\pi",
    ),
    *("#### 72nd", "\\boxed{72nd}", "\\boxed{\\text{not }72}", "#### The answer is not 72", "The answer is not 72"),
    *("\\boxed{71} or \\boxed{72}", "#### 72-ish 3", "\\boxed{(71, 72)}", "#### 7 2", "#### \u221272"),
]


@pytest.mark.parametrize("verifier", [numeric, last])
def test_marked_answers_are_judged_the_same_by_both_number_verifiers(verifier: Verifier) -> None:
    assert [text for text in ACCEPTED if verifier("72", text) != Score(1.0, False)] == []
    assert [text for text in REFUSED if verifier("72", text) != Score(0.0, False)] == []


@pytest.mark.parametrize(
    "whole", ["13", "3.5", "-3", "1,003", "3e1", "3/4", "30", "0.3", "3 1/2", "\u22123", "33", "3k"]
)
def test_a_piece_of_a_number_earns_nothing(whole: str) -> None:
    for text in (f"#### {whole}", f"it is {whole}", f"\\boxed{{{whole}}}", f"The answer is {whole}."):
        assert last("3", text).value == 0.0 and numeric("3", text).value == 0.0
        assert last(whole, text).value == 1.0


def test_nothing_never_equals_nothing() -> None:
    for reference in ("", "x", "seventy"):
        for text in ("", "y", "#### ", "#### none", "\\boxed{}", "x"):
            assert numeric(reference, text).value == 0.0 and last(reference, text).value == 0.0


def test_without_a_mark_numeric_gives_nothing_and_last_reads_on() -> None:
    for text in ("#### not 72", "\\boxed{72", "<answer>72"):
        assert numeric("72", text) == Score(0.0, False)
    assert numeric("72", "it is 72") == Score(0.0, False) and last("72", "it is 72") == Score(1.0, False)
    assert last("72", "72 is not 7") == Score(0.0, False)


def test_a_long_text_of_digits_and_braces_is_read_in_time() -> None:
    import time

    began = time.process_time()
    for piece in (
        "1" * 5000,
        "1,",
        "\\boxed{",
        "<answer>",
        "#### ",
        "{",
        "$1",
        "9/",
        "1 ",
        "- ",
        "(",
        "*",
        "answer is ",
    ):
        last("3", piece * (20_000 // len(piece)))
    assert time.process_time() - began < 20
