"""The shipped rewards, by values worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from unified_rl.envs.language import ChainMod
from unified_rl.envs.language.reward_functions import SHIPPED, THINK, text_of
from unified_rl.envs.language.rewards import Rewards, plain_value
from unified_rl.errors import ConfigError


def made(name: str, **settings: Any) -> Any:
    return SHIPPED[name](**settings)


def test_overlong_is_equation_13_of_dapo() -> None:
    ids = [[0] * n for n in (0, 60, 80, 85, 90, 100, 101, 500)]
    assert made("overlong", cache=20, max_length=100)(completion_ids=ids) == [0, 0, 0, -0.25, -0.5, -1, -1, -1]
    say = made("overlong", cache=4)
    budgets = [16, 16, 16, 8]
    assert say([[0] * 12, [0] * 14, [0] * 16, [0] * 6], budgets) == [0.0, -0.5, -1.0, -0.5]
    with pytest.raises(ConfigError, match="no max_length, and no budget"):
        say([[0]])


@pytest.mark.parametrize("workers", [0, 1])
def test_overlong_reads_the_budget_of_the_task_that_it_judges_in(workers: int) -> None:
    rewards = Rewards([{"name": "overlong", "cache": 4}], workers=workers)
    told = []
    for budget in (16, 8, 16):
        env = ChainMod(max_turn_tokens=budget)
        env.reward_with(rewards)
        said = [[env.codec.encode(["1" * 6])[0]]]
        told.append(float(env.respond(env.problems(1, torch.Generator()), said, torch.tensor([True])).reward))
    rewards.close()
    assert told == [0.0, -0.5, 0.0]
    with pytest.raises(ConfigError, match="cache=4 must be at most max_length=3"):
        ChainMod(max_turn_tokens=3).reward_with(rewards)


def test_length_charges_for_every_token_beyond_the_free_ones() -> None:
    ids = [[0] * n for n in (0, 10, 12, 20, 1000)]
    assert made("length", cost=0.1, free=10, most=2.0)(completion_ids=ids) == pytest.approx([0, 0, -0.2, -1.0, -2.0])


def test_repetition_charges_for_the_share_of_repeated_word_n_grams() -> None:
    say = made("repetition", ngram=3, max_penalty=-2.0)
    texts = ["a b", "a b c", "A b c a B c", "x x x x x", ""]  # of 4: abc bca cab abc; of 3: all xxx
    assert say(completions=texts) == pytest.approx([0.0, 0.0, -2.0 * 1 / 4, -2.0 * 2 / 3, 0.0])


def test_format_matches_the_whole_completion_unless_told_otherwise() -> None:
    good = "<think>\nhm\n</think>\n<answer>5</answer>"
    assert made("format")(completions=[f" {good}\n", f"{good} so", "5"]) == [1.0, 0.0, 0.0]
    assert made("format", match="start")(completions=[f"{good} so", f"so {good}"]) == [1.0, 0.0]
    assert made("format", match="search", pattern=r"\d")(completions=["a 5", "b"]) == [1.0, 0.0]
    assert "<think>" in THINK


def test_exact_match_reads_the_marked_answer_or_all_of_it() -> None:
    texts, wanted = ["So \\boxed{Paris}.", "Paris", " paris \n", "in Paris", "<answer>the  Seine</answer>"], "Paris"
    assert made("exact")(completions=texts[:4], reference=[wanted] * 4) == [1.0, 1.0, 0.0, 0.0]
    assert made("exact", ignore_case=True)(completions=texts[2:3], reference=[wanted]) == [1.0]
    assert made("exact", whole=True)(completions=texts[:1], reference=[wanted]) == [0.0]
    assert made("exact")(completions=[texts[4], "x"], reference=["the Seine", None]) == [1.0, None]


def test_numeric_compares_exactly_and_has_no_opinion_without_a_number() -> None:
    texts = ["#### 1/2", "it is 0.50", "it is 0.51", "4"]
    references = ["0.5", "1/2", "1/2", "four"]
    assert made("numeric")(completions=texts, reference=references) == [1.0, 1.0, 0.0, None]
    assert made("numeric", unmarked=False)(completions=texts[:2], reference=references[:2]) == [1.0, 0.0]


def test_math_compares_free_form_and_closes_its_process() -> None:
    reward = made("math")
    said = ["thus \\boxed{x^2+2x+1}", "\\boxed{\\frac{1}{3}}", "I do not know", "7"]
    assert reward(completions=said, reference=["(x+1)^2", "2/6", "5", None]) == [1.0, 1.0, 0.0, None]
    process = reward._verify.scorer._process
    reward.close()
    assert process is None or process.poll() is not None


def test_completions_may_be_messages() -> None:
    talk = [{"role": "assistant", "content": "let me see"}, {"role": "tool", "content": "\\boxed{9}"},
            {"role": "assistant", "content": "\\boxed{5}"}]  # fmt: skip
    assert text_of(talk) == "let me see\n\\boxed{5}"
    assert made("numeric")(completions=[talk], reference=["5"]) == [1.0]


def test_columns_are_plain_data() -> None:
    from decimal import Decimal

    import torch

    value = {"a": Decimal("3.0"), "b": (Decimal("0.5"), None), "c": torch.tensor([1, 2]), "d": {1: True}}
    assert plain_value(value) == {"a": 3, "b": [0.5, None], "c": [1, 2], "d": {"1": True}}
    assert type(plain_value(Decimal("3.0"))) is int
