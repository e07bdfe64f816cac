"""Free-form mathematics in a guarded process: right, wrong, hostile."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from unified_rl.envs.language import JsonlProblems
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
        ("72", "The answer is not 72.", 0.0),
        ("72", "The answer is not $72$.", 0.0),
        ("72", "it isn't 72", 0.0),
        ("72", "#### not 72", 0.0),
        ("72", "the 72nd", 0.0),
        ("72", "\\boxed{72nd}", 0.0),
    ],
)
def test_free_form_answers_by_hand(verifier: MathVerifier, reference: str, text: str, value: float) -> None:
    assert verifier(reference, text) == Score(value, False)


@pytest.mark.parametrize(
    ("reference", "text", "value"),
    [
        ("5 \\text{ m}", "\\boxed{5\\text{ km}}", 0.0),
        ("5 \\text{ m}^2", "\\boxed{5 \\text{ m}^3}", 0.0),
        ("x+1 \\text{ m}", "\\boxed{x+1 \\text{ km}}", 0.0),
        ("5", "\\boxed{5\\text{ million}}", 0.0),
        ("x", "\\boxed{x\\text{ million}}", 0.0),
        ("5 \\text{ m}", "\\boxed{5}", 1.0),
        ("ABC", "\\boxed{CBA}", 0.0),
        ("Evelyn", "\\boxed{\\text{Evelyn}}", 1.0),
        ("\\text{east}", "\\boxed{\\text{west}}", 0.0),
        ("1,2", "\\boxed{2} and \\boxed{1}", 1.0),
        ("(3,4)", "\\boxed{(3, 4)}", 1.0),
        ("3", "\\boxed{3\\sqrt{2}}", 0.0),
        ("3", "\\boxed{3x}", 0.0),
        ("8", "\\boxed{2^3}", 1.0),
        ("120", "\\boxed{5!}", 1.0),
        ("5", "\\boxed{5!}", 0.0),
        ("4", "it is 3,4", 0.0),
        ("3", "it is 1,003", 0.0),
        ("3", "\\boxed{13}", 0.0),
        ("x+1", "\\boxed{}", 0.0),
        ("\\frac{1}{3}", "\\boxed{0.333333}", 0.0),
        ("12", "\\boxed{12} " + "It holds. " * 300, 1.0),
        ("101_2", "\\boxed{101_3}", 0.0),
        ("42", "\\boxed{42_{8}}", 0.0),
        ("42", "\\boxed{42_{10}}", 1.0),
        ("101_2", "\\boxed{101}", 1.0),
        ("f'(x)", "\\boxed{f(x)}", 0.0),
        ("f'(x)+1", "\\boxed{1 + f'(x)}", 1.0),
        ("1", "\\boxed{\\text{the answer is not } 1}", 0.0),
        ("1", "\\boxed{1\\text{ or more}}", 0.0),
        ("5", "\\boxed{\\neg 5}", 0.0),
        ("2", "\\boxed{1=2}", 0.0),
        ("1", "\\boxed{0=1}", 0.0),
        ("2", "\\boxed{x=1=2}", 0.0),
        ("2", "\\boxed{x=2}", 1.0),
        ("42", "\\boxed{6\\times 7=42}", 1.0),
        ("0.5", "\\boxed{\\frac{1}{2}=0.5}", 1.0),
        ("2021", "\\boxed{2024-01-02}", 0.0),
        ("2024-01-02", "\\boxed{2021}", 0.0),
        ("2024-01-02", "it is 2021", 0.0),
        ("2024-01-02", "it is 2024-01-02.", 1.0),
        ("2024-01-02", "\\boxed{2024/1/2}", 1.0),
        ("2024-01-02", "\\boxed{2024-01-03}", 0.0),
        ("1012", "\\boxed{2024/01/02}", 0.0),
        ("1012", "it is 2024/01/02.", 0.0),
    ],
)
def test_nothing_that_was_thrown_away_is_equal(verifier: MathVerifier, reference: str, text: str, value: float) -> None:
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


def test_a_death_costs_a_fork_and_the_same_text_is_not_tried_again(verifier: MathVerifier) -> None:
    assert verifier("x+1", "\\boxed{1+x}") == Score(1.0, False)  # a process is there
    hostile, before = "\\boxed{9^{9^{9^{9}}}}", verifier.scorer.restarts
    process = verifier.scorer._process
    assert verifier("72", hostile) == Score(0.0, True)
    began = time.monotonic()
    assert [verifier("72", hostile) for _ in range(255)] == [Score(0.0, True)] * 255
    assert time.monotonic() - began < 1.0 and verifier.scorer.restarts == before + 1
    assert verifier("x+1", "\\boxed{1+x}") == Score(1.0, False) and verifier.scorer._process is process


def test_a_batch_of_different_hostile_answers_has_a_budget_and_honest_ones_still_count() -> None:
    small = MathVerifier(limit=0.6, budget=0.6)
    texts = [f"\\boxed{{{n}+9^{{9^{{9^{{9}}}}}}}}" for n in range(6)]
    try:
        assert [small("72", text) for text in texts] == [Score(0.0, True)] * 6
        assert small.scorer.left == 0.0 and small("x+1", "\\boxed{1+x}") == Score(1.0, False)
        small.renew()
        assert small.scorer.left == 0.6
    finally:
        small.close()


def test_a_closed_scorer_leaves_no_process_behind() -> None:
    made = MathVerifier()
    assert made("x+1", "\\boxed{1+x}") == Score(1.0, False)
    process = made.scorer._process
    assert process is not None
    made.close()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


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


def test_a_task_renews_the_budget_with_every_batch(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "x+1"}\n')
    env = JsonlProblems(str(tmp_path / "a.jsonl"), verifier="math", held_out=0.0, score_seconds=0.3, batch_seconds=0.3)
    try:
        problem = env.problems(1, torch.Generator())[0]
        hostile, right = (env.codec.encode([text])[0] for text in ("\\boxed{9^{9^{9^{9}}}}", "\\boxed{1+x}"))
        done = torch.ones(2, dtype=torch.bool)
        first = env.respond([problem, problem], [[hostile], [right]], done)
        assert first.reward.tolist() == [0.0, 1.0] and first.info["scorer_error"].tolist() == [1.0, 0.0]
        assert env._math is not None and env._math.scorer.left == 0.0
        assert env.respond([problem, problem], [[hostile], [right]], done).reward.tolist() == [0.0, 1.0]
        assert env._math.scorer.left == 0.3
    finally:
        env.close()
