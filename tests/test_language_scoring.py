"""Free-form mathematics in a guarded process: right, wrong, hostile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from unified_rl.envs.language.scoring import GuardedScorer, Score
from unified_rl.envs.language.verifiers import MathVerifier
from unified_rl.errors import ConfigError


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    made = MathVerifier(limit=0.6)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("reference", "text", "value"),
    [
        ("72", "The answer is 72.", 1.0),
        ("72", "The answer is 73.", 0.0),
        ("\\frac{1}{2}", "so \\boxed{0.5}", 1.0),
        ("x^2+2x+1", "$(x+1)^2$", 1.0),
        ("72", "$\\boxed{71}$ no, so $\\boxed{72}$", 1.0),  # the last one counts
        ("72", "\\boxed{71} or \\boxed{72}", 0.0),  # two answers are a set, not a choice
        ("72", "\\boxed{", 0.0),
        ("72", "", 0.0),
        ("72", "   ", 0.0),
        ("72", "seventy-two", 0.0),
    ],
)
def test_free_form_answers_by_hand(verifier: MathVerifier, reference: str, text: str, value: float) -> None:
    assert verifier(reference, text) == Score(value, False)


def test_text_is_never_run_as_code(verifier: MathVerifier, tmp_path: Path) -> None:
    for template in (
        "__import__('os').system('touch {}')",
        "\\boxed{{open('{}','w')}}",
        "$[open('{}', 'w')]$",
        "answer: 1+open('{}','w')",
    ):
        verifier("72", template.format(tmp_path / "made"))
    assert not (tmp_path / "made").exists()


def test_an_endless_computation_scores_zero_counts_as_failed_and_stops_nobody_else(verifier: MathVerifier) -> None:
    before = verifier.scorer.restarts
    assert verifier("72", "answer: 9**9**9**9") == Score(0.0, True)
    assert verifier.scorer.restarts == before + 1
    assert verifier("72", "$72$") == Score(1.0, False)


def test_many_threads_share_one_process(verifier: MathVerifier) -> None:
    out: dict[int, Score] = {}
    threads = [
        threading.Thread(target=lambda n=n: out.__setitem__(n, verifier(str(n), f"it is {n - n % 2}")))
        for n in range(2, 22)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert out == {n: Score(float(n % 2 == 0), False) for n in range(2, 22)}


def test_a_worker_that_cannot_start_is_an_error_and_not_a_zero() -> None:
    starved = GuardedScorer({"kind": "math", "reference": "1", "text": "1"}, memory=0.001)
    with pytest.raises(ConfigError, match="did not start"):
        starved.score(kind="math", reference="1", text="1")
