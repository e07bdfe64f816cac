"""What an answer earns, kind by kind, through the verifiers that tasks and rewards use: one table."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import starmap
from typing import NamedTuple

import pytest

from unified_rl.envs.language.verifiers import MathVerifier, Verifier, last, numeric


class Case(NamedTuple):
    """An answer, its reference (as a GSM8K line or alone), which verifiers read it, and what it earns."""

    kind: str
    reference: str
    text: str
    worth: float
    by: str = "numeric last math"


TAIL = " Checked once more: it holds for every case." * 60
THIN, NARROW, HARD = "\u2009", "\u202f", "\u00a0"

CASES = list(
    starmap(
        Case,
        [
            # which part of the text is the answer
            ("last box", "5", r"\boxed{3}, wait, a sign was lost. \boxed{5}", 1),
            ("last box", "3", r"\boxed{3}, wait, a sign was lost. \boxed{5}", 0),
            ("balanced box", "1/2", r"so \boxed{\frac{1}{2}}", 1),
            ("empty box", "7", r"Fill in \boxed{}: the value is \boxed{7}.", 1),
            ("open box", "7", r"\boxed{7} and then \boxed{8", 1),
            ("fbox", "42", r"\fbox{42}", 1),
            ("long tail", "12", r"\boxed{12}." + TAIL, 1),
            ("long tail", "12", "<answer>12</answer>" + TAIL, 1),
            ("long tail", "12", "#### 12\n" + TAIL, 1),
            ("answer tag", "42", "<think>6 times 7</think><answer> 42 </answer>", 1),
            ("answer tag", "42", "<answer>41</answer> or <ANSWER>42</ANSWER>", 1),
            ("box in tag", "42", r"<answer>the value is \boxed{42}</answer>", 1),
            ("tag beats what follows", "42", "<answer>42</answer> (7 were left)", 1),
            ("marked line", "72", "so 72\n#### 72 apples", 1),
            ("marked line", "72", "#### **72**", 1),
            ("marked line", "72", r"#### \boxed{72}", 1),
            ("marked line", "72", "#### = 72", 1),
            ("marked line", "72", "#### 71\n#### 72", 1),
            ("marked line", "72", "#### ", 0),
            ("thought", "5", r"<think>\boxed{3}</think> \boxed{5}", 1),
            ("words", "42", "The answer is 42. (7 apples were left over)", 1, "last math"),
            ("words", "42", "Final answer: **42**", 1, "last math"),
            ("no mark", "42", "it is 42", 0, "numeric"),
            ("cut in two", "5", "The value is 12345." + TAIL, 0),
            ("cut in two", "12345", "The value is 12345." + TAIL, 1, "last math"),
            # how a number is spelled
            ("full stop", "42", r"\boxed{42.}", 1),
            ("signs", "-5", "#### \u22125", 1),
            ("signs", "-5", "#### $-5", 1),
            ("signs", "-5", "#### -$5", 1),
            ("signs", "5", "#### \u22125", 0),
            ("signs", "-3", "the balance is \u22123", 1, "last math"),
            ("signs", "-3", "\\boxed{\u22123}", 1),
            ("groups", "1234567", "#### 1,234,567", 1),
            ("groups", "1234", rf"\boxed{{1{THIN}234}}", 1),
            ("groups", "1234", rf"\boxed{{1{NARROW}234}}", 1),
            ("groups", "1234", rf"\boxed{{1{HARD}234}}", 1),
            ("groups", "1234", r"\boxed{1\,234}", 1),
            ("groups", "1234", r"\boxed{1\;234}", 1),
            ("groups", "1234", r"\boxed{1{,}234}", 1),
            ("groups", "234", r"\boxed{1\,234}", 0),
            ("groups", "5", "#### 5,000 dollars", 0),
            ("currency", "70000", "#### $70,000 profit", 1),
            ("currency", "12.5", "#### €12.50", 1),
            ("currency", "12.5", r"\boxed{\$12.50}", 1),
            ("currency", "5", "#### 5 USD", 1),
            ("currency", "$5", "#### €5", 0),
            ("percent", "28%", r"\boxed{28\%}", 1),
            ("percent", "28", "#### 28 percent", 1),
            ("percent", "0.28", "#### 28%", 1),
            ("percent", "28", "#### 0.28", 0),
            ("units", "5", r"\boxed{5\text{ km}}", 1),
            ("units", "5", r"\boxed{5~\mathrm{m}^2}", 1),
            ("units", "90", r"\boxed{90^\circ}", 1),
            ("units", "90", "#### 90°", 1),
            ("units", r"5\text{ m}", r"\boxed{5\text{ km}}", 0, "math"),
            ("exponents", "1500", "#### 1.5e3", 1),
            ("exponents", "1500", r"\boxed{1.5 \times 10^{3}}", 1),
            ("exponents", "0.00001", "#### 1e-5", 1),
            ("exponents", "1/1000", "#### 10^{-3}", 1),
            ("exponents", "0.0015", "#### 1.5 × 10⁻³", 1),
            ("exponents", "5", "that makes 1e5", 0),
            ("exponents", "100000", "that makes 1e5", 1, "last math"),
            ("mixed", "8/3", "The answer is 2 2/3", 1, "last math"),
            ("mixed", "2", "The answer is 2 2/3", 0),
            ("mixed", "5/4", r"\boxed{1\frac{1}{4}}", 1),
            ("mixed", "5/4", r"\boxed{1 \dfrac{1}{4}}", 1),
            ("mixed", "-5/2", "#### -2½", 1),
            ("mixed", "8/3", "#### 2⅔", 1),
            ("mixed", "5/4", "#### 1 1/4 cups", 1),
            ("fractions", "0.75", "the share is 3/4", 1, "last math"),
            ("fractions", "4", "the share is 3/4", 0),
            ("fractions", "3/4", "#### 6/8", 1),
            ("fractions", "0.75", r"\boxed{\tfrac{3}{4}}", 1),
            ("exact", "1/3", "#### 0.333333", 0),
            ("exact", "0.1", "#### 1/10", 1),
            ("exact", "2.50", "#### 2.5", 1),
            ("equation", "42", "#### x = 42", 1),
            ("equation", "42", r"\boxed{x=42}", 1),
            ("more than one", "72", "#### 72 or 73", 0),
            ("more than one", "72", "#### 72 to 73", 0),
            ("negated", "72", "#### not 72", 0),
            ("ordinal", "72", "#### the 72nd", 0),
            ("full width", "72", "#### ７２", 1),
        ],
    )
)


@pytest.fixture(scope="module")
def verifiers() -> Iterator[dict[str, Verifier]]:
    math = MathVerifier()
    yield {"numeric": numeric, "last": last, "math": math}
    math.close()


def test_every_kind_of_answer_earns_what_it_should(verifiers: dict[str, Verifier]) -> None:
    wrong = [
        (case.kind, name, case.reference, case.text[-60:], case.worth)
        for case in CASES
        for name in case.by.split()
        if verifiers[name](case.reference, case.text).value != case.worth
    ]
    assert wrong == []


def test_free_form_answers_are_compared_by_what_they_mean(verifiers: dict[str, Verifier]) -> None:
    same = [
        (r"(x+1)^2", r"\boxed{x^2+2x+1}"),
        ("(3, 4)", r"\boxed{(3,4)}"),
        (r"\frac{\sqrt{2}}{2}", r"\boxed{1/\sqrt2}"),
    ]
    other = [("x+1", r"\boxed{x+2}"), ("(3, 4)", r"\boxed{(4,3)}"), ("east", r"\boxed{\text{west}}")]
    assert [pair for pair in same if verifiers["math"](*pair).value != 1.0] == []
    assert [pair for pair in other if verifiers["math"](*pair).value != 0.0] == []
