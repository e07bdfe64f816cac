"""Chain arithmetic: values by hand, the verifier's cases, the two styles of demonstration."""

from __future__ import annotations

import pytest
import torch

from unified_rl.envs.language import ChainMod
from unified_rl.errors import ConfigError


def verdict(env: ChainMod, totals: list[int], text: str) -> float:
    problem = {"text": "", "split": "train", "totals": totals}
    turn = [*env.codec.encode([text])[0], env.tokenizer.eos_token_id]
    return float(env.respond([problem], [[turn]], torch.tensor([True])).reward)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (">5", 1.0),
        ("4,5,5>5", 1.0),
        (">3>5", 1.0),  # the last one counts
        ("9,9,9>5", 1.0),  # only the answer is checked
        (">05", 1.0),
        ("5", 0.0),
        (">", 0.0),
        ("", 0.0),
        (">4", 0.0),
        (">15", 0.0),  # equal modulo 10, but not the value
        (">5>", 0.0),
        (">5,", 0.0),
        (">-5", 0.0),
        (">+5", 0.0),
        (">5>3", 0.0),
        (">55555555555555555555555", 0.0),
    ],
)
def test_the_number_after_the_last_arrow_decides(text: str, reward: float) -> None:
    assert verdict(ChainMod(terms=4), [4, 5, 5], text) == reward


def test_running_totals_are_those_worked_out_term_by_term() -> None:
    for modulus, terms in ((5, 4), (10, 5), (12, 3)):
        env = ChainMod(modulus=modulus, terms=terms)
        for problem in env.problems(50, torch.Generator().manual_seed(1)):
            expression = problem["text"].removesuffix("=").replace("+", " + ").replace("-", " - ").split()
            value, totals = int(expression[0]), []
            for sign, number in zip(expression[1::2], expression[2::2], strict=True):
                value = (value + int(number)) % modulus if sign == "+" else (value - int(number)) % modulus
                totals.append(value)
            assert problem["totals"] == totals and len(totals) == terms - 1


def target(env: ChainMod, style: str, count: int, seed: int = 0) -> list[str]:
    rows = env.demonstrations(count, torch.Generator().manual_seed(seed), style)
    return [env.codec.decode(t[m].tolist()) for t, m in zip(rows["tokens"], rows["mask"], strict=True)]


def test_styles_are_running_totals_or_the_bare_answer() -> None:
    env = ChainMod(terms=4)
    problems = env.problems(20, torch.Generator().manual_seed(0))
    totals = [problem["totals"] for problem in problems]
    assert target(env, "chain", 20) == [f"{a},{b},{c}>{c}" for a, b, c in totals]
    assert target(env, "direct", 20) == [f">{c}" for _, _, c in totals]


def test_a_mixture_holds_its_share_of_direct_answers() -> None:
    texts = target(ChainMod(direct_share=0.8), "mixture", 2000)
    share = sum(text.startswith(">") for text in texts) / 2000
    assert abs(share - 0.8) < 0.04  # 4.5 standard deviations


def test_the_default_budget_holds_the_longest_chain_and_four_more() -> None:
    env = ChainMod(modulus=10, terms=5)
    assert len("6,3,6,9>9") + 1 + 4 == env.max_turn_tokens
    assert env.max_length == len("9+7-3-7+3=") + env.max_turn_tokens


def test_sizes_out_of_range_are_refused() -> None:
    for arguments in ({"modulus": 1}, {"terms": 1}, {"direct_share": 1.5}, {"max_turn_tokens": 0}):
        with pytest.raises(ConfigError, match=next(iter(arguments))):
            ChainMod(**arguments)
