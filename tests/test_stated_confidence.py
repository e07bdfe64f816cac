"""Answers that state how sure they are, and the share of a group that is right in place of what they state."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sources import others, own, rollout, stream

from unified_rl.envs.language import ChainMod, Countdown, GuessNumber
from unified_rl.envs.language.tokenizer import character_tokenizer
from unified_rl.errors import ConfigError
from unified_rl.rollout import LanguageRollout
from unified_rl.rollout.sources import Calibrated, Recited
from unified_rl.units import Source

SAID = (
    (">{right}@0.10", "1>{right}@0.99", ">{right}@1.00", ">{right}"),
    (">{right}@0.50", ">{right}@1.00", ">{wrong}@1.00", ",>{right}@0.00"),
    (">{wrong}@1.00", ">{wrong}@1.37", ">{right}@0.33", "@0.80"),
)
"""What is said to three prompts, four times each: 4, 3 and 1 of 4 are right."""
WANTED = (
    (">{right}@1.00", "1>{right}@1.00", ">{right}@1.00", ">{right}"),
    (">{right}@0.75", ">{right}@0.75", ">{wrong}@0.75", ",>{right}@0.75"),
    (">{wrong}@0.25", ">{wrong}@1.37", ">{right}@0.25", "@0.25"),
)


def sure(**options: Any) -> ChainMod:
    return ChainMod(modulus=5, terms=3, confidence=True, **options)


def filled(texts: Any, problems: list[dict[str, Any]]) -> list[str]:
    return [
        text.format(right=int(problem["totals"][-1]), wrong=(int(problem["totals"][-1]) + 1) % 5)
        for group, problem in zip(texts, problems, strict=True)
        for text in group
    ]


def said(**options: Any) -> tuple[LanguageRollout, list[dict[str, Any]]]:
    env = sure()
    made = rollout(env, prompts=3, group_size=4, sources={"x": Calibrated(**options)}, privileged=True)
    problems = env.problems(3, stream(1), "train")
    answers = env.encode_completions(filled(SAID, problems))
    spoken = Recited(answers, env.tokenizer.pad_token_id)
    made.policy.generate = lambda prompts, **how: spoken.generate(prompts * 4, **how)  # type: ignore[method-assign]
    return made, problems


def texts(made: LanguageRollout, rows: Any) -> list[str]:
    return made.env.turn_texts([row["tokens"][row["mask"]].tolist() for row in rows])


def test_the_share_of_a_group_that_is_right_takes_the_place_of_what_its_answers_state() -> None:
    made, problems = said()
    rows, metrics = made.collect(0)
    mine, found = own(rows), others(rows)
    assert texts(made, mine) == filled(SAID, problems), "own rows are as they were said"
    assert texts(made, found) == filled(WANTED, problems)
    assert found["group"].tolist() == mine["group"].tolist() and metrics["rollout/joined/x"] == 12.0
    assert bool((found["source"] == int(Source.EXPERT)).all()) and not bool(found["behavior_log_prob"].any())
    for key in ("mask", "token_mask", "reward", "step_index", "privileged_mask"):
        assert torch.equal(found[key], mine[key]), key
    changed = (found["tokens"] != mine["tokens"]).sum(-1).tolist()
    assert changed == [2, 3, 0, 0, 2, 3, 3, 2, 3, 0, 2, 2]


def test_the_solution_that_a_teacher_sees_states_the_same_share() -> None:
    made, problems = said()
    rows, _ = made.collect(0)
    for part, shares in ((own(rows), ["1.00"] * 3), (others(rows), ["1.00", "0.75", "0.25"])):
        width = len(problems[0]["prompt"])
        seen = made.env.codec.decode_all([row["privileged_tokens"][width:].tolist() for row in part])
        for n, (text, problem) in enumerate(zip(seen, [p for p in problems for _ in range(4)], strict=True)):
            first, last = problem["totals"]
            assert text.startswith(f"{first},{last}>{last}@{shares[n // 4]}")
        told = [row["privileged_tokens"][row["privileged_mask"]].tolist() for row in part]
        assert told == [row["tokens"][row["mask"]].tolist() for row in part]


def test_groups_that_are_not_drawn_are_left_as_they_are() -> None:
    made, _ = said(of=0.0)
    rows, _ = made.collect(0)
    for key in ("tokens", "privileged_tokens"):
        assert torch.equal(others(rows)[key], own(rows)[key])
    made, problems = said(of=0.34)
    rows, _ = made.collect(0)
    before, after, wanted = (filled(t, problems) for t in (SAID, SAID, WANTED))
    now = texts(made, others(rows))
    changed = [n for n in range(3) if now[4 * n : 4 * n + 4] != before[4 * n : 4 * n + 4]]
    (one,) = changed
    after[4 * one : 4 * one + 4] = wanted[4 * one : 4 * one + 4]
    assert now == after


def test_where_every_answer_counts_as_right_all_state_1() -> None:
    made, _ = said(threshold=-1.0)
    rows, _ = made.collect(0)
    stated = [text for text in texts(made, others(rows)) if "@" in text and "1.37" not in text]
    assert len(stated) == 10 and all(text.endswith("@1.00") for text in stated)


def test_conversations_that_are_left_out_of_updates_are_left_out_here() -> None:
    made = rollout(sure(truncated="mask", max_turn_tokens=13), prompts=6, sources={"x": Calibrated()})
    rows, _ = made.collect(0)
    kept = own(rows)["counted"]
    assert 0 < int(kept.sum()) < len(kept) and len(others(rows)) == int(kept.sum())


def test_stated_confidence_is_read_and_reported() -> None:
    made, _ = said()
    _, metrics = made.collect(0)
    assert metrics["rollout/stated"] == pytest.approx(10 / 12)
    stated = [(0.1, 1), (0.99, 1), (1.0, 1), (0.5, 1), (1.0, 1), (1.0, 0), (0.0, 1), (1.0, 0), (0.33, 1), (0.8, 0)]
    assert metrics["rollout/confidence"] == pytest.approx(sum(c for c, _ in stated) / 10)
    assert metrics["rollout/overconfidence"] == pytest.approx(sum(c - right for c, right in stated) / 10)
    assert metrics["rollout/brier"] == pytest.approx(sum((c - right) ** 2 for c, right in stated) / 10)
    assert metrics["rollout/correct"] == pytest.approx(8 / 12)


def test_a_cut_answer_states_nothing_and_nobody_knows_how_sure_it_is() -> None:
    env = sure()
    (problem,) = env.problems(1, stream(0))
    info = env.respond([problem], [[env.encode_answers([">1@0.50"])[0][:-1]]], torch.tensor([False])).info
    assert float(info["stated"]) == 0.0 and all(math.isnan(float(info[k])) for k in ("confidence", "brier"))


def test_a_confidence_is_restated_token_for_token() -> None:
    env = sure()
    whole = env.encode_answers([",3>2@0.07"])[0]
    for turn in (whole, whole[:-1]):
        again = env.restate(turn, 2 / 3)
        assert again is not None and len(again) == len(turn) and again[:5] == turn[:5]
        assert env.turn_texts([again]) == [",3>2@0.67"] and again[9:] == turn[9:]
    assert env.restate(env.encode_answers([">2"])[0], 0.5) is None
    assert env.restate(env.encode_answers([">2@0.5"])[0], 0.5) is None
    assert env.restate([], 0.5) is None


def test_the_confidence_is_no_part_of_what_is_answered() -> None:
    env = sure()
    (problem,) = env.problems(1, stream(0))
    first, last = (int(total) for total in problem["totals"])
    (turn,) = env.encode_answers([f"{first},{last}>{last}@{last}.00"])
    (plain,) = env.encode_answers([f"{first},{last}>{last}@0.50"])
    assert env.vote(problem, [plain]) == str(last)
    for ids in (turn, plain):
        assert env.marks(problem, [ids])[0][-5:] == [0] * 5
    solution = env.solve([problem])[0]
    result = env.respond([problem], [[solution]], torch.tensor([True]))
    assert (
        env.turn_texts([solution])[0].endswith("@1.00") and float(result.reward) == float(result.info["stated"]) == 1.0
    )
    assert not hasattr(ChainMod(), "_sure") and ChainMod().columns == ("correct", "truncated")


def test_what_states_no_confidence_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"those of ChainMod state none: set env\.confidence=true"):
        rollout(ChainMod(modulus=5, terms=3), sources={"x": Calibrated()})
    with pytest.raises(ConfigError, match=r"Countdown knows of none: use"):
        rollout(Countdown(), sources={"x": Calibrated()})
    with pytest.raises(ConfigError, match=r"GuessNumber has up to .* turns"):
        rollout(GuessNumber(), sources={"x": Calibrated()})
    with pytest.raises(ConfigError, match=r"rollout\.group_size=1 shows 0 or 1 alone"):
        rollout(sure(), sources={"x": Calibrated()}, group_size=1)
    character_tokenizer("0123456789+-=,>@").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"set env\.tokenizer=null"):
        sure(tokenizer=str(tmp_path))
