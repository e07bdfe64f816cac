"""The calculator tool and guess the number: replies, rewards, and text that is not the policy's."""

from __future__ import annotations

import pytest
import torch

from unified_rl.envs.language import Calculator, GuessNumber, LanguageTask
from unified_rl.envs.language.calculator import reductions
from unified_rl.errors import ConfigError


def said(env: LanguageTask, problem: dict, *turns: str) -> tuple[str, float, bool, float]:
    """Reply, reward, done and correct of the last of some turns."""
    result = env.respond([{"split": "train", **problem}], [env.codec.encode(turns)], torch.tensor([True]))
    return (
        env.codec.decode(result.reply[0]),
        round(float(result.reward), 6),
        bool(result.done),
        float(result.info["correct"]),
    )


@pytest.mark.parametrize(
    ("turn", "reply"),
    [
        ("C:3+8;", "R:11;"),
        ("C:3-8;", "R:-5;"),
        ("C:-5-8;", "R:-13;"),
        ("C:12*11;", "R:132;"),
        ("C:3+8", "R:11;"),
        ("C:3;", "R:?;"),
        ("C:1+2+3;", "R:?;"),
        ("C:;", "R:?;"),
        ("C:9999+1;", "R:?;"),
        ("3+8;", "R:?;"),
        (";", "R:?;"),
        ("R:11;", "R:?;"),
        ("CC:3+8;", "R:?;"),
    ],
)
def test_the_tool_computes_one_operation_on_whole_numbers(turn: str, reply: str) -> None:
    env = Calculator(terms=3, max_number=99)  # values of up to 297: three digits
    assert said(env, {"value": 11}, turn) == (reply, 0.0, False, 0.0)
    assert len(env.codec.encode([reply])[0]) <= env.max_reply_length


def test_only_the_right_answer_ends_with_a_reward() -> None:
    env = Calculator()
    assert said(env, {"value": -7}, "A:-7;") == ("", 1.0, True, 1.0)
    assert said(env, {"value": -7}, "C:1-8;", "A:-7;") == ("", 1.0, True, 1.0)
    for wrong in ("A:7;", "A:;", "A:--7;", "A:1-8;", "A:-7A:-7;"):
        assert said(env, {"value": -7}, wrong) == ("", 0.0, True, 0.0)


def test_calls_take_products_first() -> None:
    assert reductions("27-31*34") == [("31*34", 1054), ("27-1054", -1027)]
    assert reductions("1-2-3*4+5") == [("3*4", 12), ("1-2", -1), ("-1-12", -13), ("-13+5", -8)]


def test_the_longest_reply_and_turn_fit() -> None:
    env = Calculator(terms=2, max_number=99, operators="*")  # four digits: 9801
    reply, _, _, _ = said(env, {"value": 0}, "C:-9999*9999;")
    assert reply == "R:-99980001;"
    assert len(reply) <= env.max_reply_length
    assert len("C:-9999*-9999;") <= env.max_turn_tokens


def test_running_out_of_turns_is_a_truncation() -> None:
    env = Calculator(terms=2, spare_turns=0)
    turns = [env.codec.encode(["C:1+1;", "C:1+1;"])]
    result = env.respond([{"split": "train", "value": 2}], turns, torch.tensor([True]))
    assert (result.done.tolist(), result.info["truncated"].tolist()) == ([False], [1.0])


RANGE = {"low": 17, "high": 32, "secret": 26}


@pytest.mark.parametrize(
    ("turn", "reply"),
    [("24;", "H;"), ("30;", "L;"), ("16;", "?;"), ("33;", "?;"), (";", "?;"), ("2-4;", "?;"), ("H;", "?;")],
)
def test_a_wrong_guess_is_answered(turn: str, reply: str) -> None:
    assert said(GuessNumber(), RANGE, turn) == (reply, 0.0, False, 0.0)


def test_a_hit_pays_less_the_later_it_comes() -> None:
    env = GuessNumber(size=16, turn_cost=0.1, spare_turns=0)
    assert said(env, RANGE, "26;") == ("", 1.0, True, 1.0)
    assert said(env, RANGE, "24;", "28;", "26;") == ("", 0.8, True, 1.0)


def test_binary_search_always_ends_within_the_turns() -> None:
    env = GuessNumber(size=16, spare_turns=0)
    assert env.max_turns == 5
    for secret in range(16):
        guesses = [s.text for s in env._demonstrate({"low": 0, "high": 15, "secret": secret}, None) if s.trained]
        assert len(guesses) <= 5 and guesses[-1] == f"{secret};"


def test_secrets_cover_their_ranges_evenly() -> None:
    problems = GuessNumber(size=4, limit=9).problems(3000, torch.Generator().manual_seed(0))
    place = torch.tensor(
        [(p["secret"] - p["low"]) / (p["high"] - p["low"] + 1) for p in problems if p["high"] - p["low"] == 3]
    )
    shares = torch.stack([(place == k / 4).float().mean() for k in range(4)])
    assert torch.allclose(shares, torch.full((4,), 0.25), atol=0.06)
    assert {p["low"] for p in problems} <= set(range(9)) and max(p["high"] for p in problems) == 9


def test_equal_prompts_with_other_secrets_are_other_problems() -> None:
    problems = GuessNumber(size=4, limit=9).problems(200, torch.Generator().manual_seed(0))
    assert len({p["prompt_id"] for p in problems}) == len({(p["text"], p["secret"]) for p in problems})
    assert len({p["prompt_id"] for p in problems}) > len({p["text"] for p in problems})


def test_settings_out_of_range_are_refused() -> None:
    for make in (
        lambda: Calculator(terms=1),
        lambda: Calculator(max_number=10**9, operators="*"),
        lambda: GuessNumber(size=1),
    ):
        with pytest.raises(ConfigError, match=r"env\."):
            make()
    with pytest.raises(ConfigError, match="turn_cost"):
        GuessNumber(turn_cost=0.5)
