"""What holds for every generated token task: splits, demonstrations, budgets, the shuffled-reward control."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from unified_rl.envs.language import Calculator, ChainMod, Countdown, GuessNumber, LanguageTask
from unified_rl.errors import ConfigError
from unified_rl.protocols import LanguageEnv

MAKE: dict[str, Any] = {
    "chain_mod": ChainMod,
    "chain_mod_12": lambda **kw: ChainMod(modulus=12, terms=3, **kw),
    "countdown": Countdown,
    "countdown_4": lambda **kw: Countdown(numbers=4, operators="+-*/", **kw),
    "calculator": Calculator,
    "calculator_times": lambda **kw: Calculator(operators="+-*", **kw),
    "guess_number": GuessNumber,
}


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=MAKE)
def env(request: pytest.FixtureRequest) -> LanguageTask:
    return MAKE[request.param](seed=3)


def spoken(env: LanguageTask, rows: TensorDict, row: int) -> list[tuple[bool, list[int]]]:
    """The row after its prompt as runs of (the policy's, ids); the policy's runs end at stop ids."""
    ids = rows["tokens"][row][rows["token_mask"][row]].tolist()
    mine = rows["mask"][row].tolist()
    start = mine.index(True)
    runs: list[tuple[bool, list[int]]] = []
    for position in range(start, len(ids)):
        if runs and runs[-1][0] == mine[position] and not (mine[position] and runs[-1][1][-1] in env.stop_ids):
            runs[-1][1].append(ids[position])
        else:
            runs.append((mine[position], [ids[position]]))
    return runs


def test_follows_the_protocol(env: LanguageTask) -> None:
    assert isinstance(env, LanguageEnv)
    assert env.domain == "language"
    assert env.tokenizer.eos_token_id in env.stop_ids
    assert env.policy_inputs() == {"tokenizer": env.tokenizer, "max_length": env.max_length}


def test_train_and_eval_prompts_never_meet_and_both_are_drawn(env: LanguageTask) -> None:
    train = {p["text"] for p in env.problems(2000, stream(), "train")}
    held = {p["text"] for p in env.problems(200, stream(1), "eval")}
    assert len(train) > 100 and len(held) > 10
    assert not train & held
    shown = env.demonstrations(500, stream(2))
    prompts = {
        env.codec.decode(t[: m.int().argmax()].tolist()) for t, m in zip(shown["tokens"], shown["mask"], strict=True)
    }
    assert not prompts & held


def test_the_split_does_not_depend_on_the_seed(env: LanguageTask) -> None:
    texts = [p["text"] for p in env.problems(50, stream(), "eval")]
    assert all(type(env)(seed=99).is_held_out(text) == env.is_held_out(text) for text in texts)


def test_equal_streams_draw_equal_problems_which_are_plain_json(env: LanguageTask) -> None:
    first, second = env.problems(20, stream(5)), env.problems(20, stream(5))
    assert first == second == json.loads(json.dumps(first))
    assert first != env.problems(20, stream(6))
    assert all(1 <= len(p["prompt"]) <= env.max_prompt_length for p in first)
    assert all(0 <= p["prompt_id"] < 2**63 for p in first)


def test_demonstrations_are_correct_conversations_within_the_budgets(env: LanguageTask) -> None:
    """Replays each demonstration through the task: it answers as written, and ends solved."""
    rows = env.demonstrations(64, stream(7))
    problems = env.problems(64, stream(7))  # equal streams, equal problems
    assert rows["tokens"].shape == (64, env.max_length)
    assert not bool((rows["mask"] & ~rows["token_mask"]).any())
    for row, problem in enumerate(problems):
        assert rows["tokens"][row, : len(problem["prompt"])].tolist() == problem["prompt"]
        assert int(rows["mask"][row].int().argmax()) == len(problem["prompt"])
        runs = spoken(env, rows, row)
        turns: list[list[int]] = []
        for number, (mine, ids) in enumerate(runs):
            if not mine:
                continue
            assert ids[-1] in env.stop_ids and len(ids) <= env.max_turn_tokens
            turns.append(ids)
            result = env.respond([problem], [turns], torch.tensor([True]))
            last = number == len(runs) - 1
            assert bool(result.done) == last
            assert bool(result.info["correct"]) == last
            assert result.reply[0] == ([] if last else runs[number + 1][1])
            assert len(result.reply[0]) <= env.max_reply_length
        assert len(turns) <= env.max_turns


def test_an_unfinished_turn_is_truncated_and_never_rewarded(env: LanguageTask) -> None:
    rows, problems = env.demonstrations(1, stream(7)), env.problems(1, stream(7))
    turns = [ids for mine, ids in spoken(env, rows, 0) if mine]
    result = env.respond(problems, [turns], torch.tensor([False]))
    assert (result.reward.tolist(), result.done.tolist()) == ([0.0], [False])
    assert result.info["truncated"].tolist() == [1.0] and result.info["correct"].tolist() == [0.0]
    assert result.reply == [[]]


def test_nonsense_earns_nothing(env: LanguageTask) -> None:
    problem = env.problems(1, stream())[0]
    for text in ("", "?", ">", "A:", "1", "__import__('os')", "eval(1)", "((((", "9" * 50, "1e9", "\u0663"):
        turn = [*env.codec.encode([text])[0], env.tokenizer.eos_token_id]
        result = env.respond([problem], [[turn]], torch.tensor([True]))
        right = str(problem.get("secret", "")) == text or (text == "1" and problem.get("target") == 1)
        assert right or (float(result.reward) == 0.0 and float(result.info["correct"]) == 0.0)


def test_unknown_styles_and_splits_are_refused(env: LanguageTask) -> None:
    with pytest.raises(ConfigError, match="'sideways'"):
        env.demonstrations(2, stream(), "sideways")
    with pytest.raises(ConfigError, match="'test'"):
        env.problems(2, stream(), "test")


def test_a_split_without_prompts_is_an_error_that_names_the_setting() -> None:
    with pytest.raises(ConfigError, match="held_out=0"):
        ChainMod(held_out=0.0).problems(1, stream(), "eval")
    with pytest.raises(ConfigError, match="held_out"):
        ChainMod(held_out=1.0)


def answered(env: LanguageTask, split: str, count: int = 64) -> tuple[list[dict[str, Any]], list[list[list[int]]]]:
    """Problems of which every other one is answered directly and rightly, the rest wrongly."""
    problems = env.problems(count, stream(), split)
    eos = env.tokenizer.eos_token_id
    said = [str(p["totals"][-1]) if i % 2 else "x" for i, p in enumerate(problems)]
    return problems, [[[*ids, eos]] for ids in env.codec.encode([f">{text}" for text in said])]


def test_shuffling_keeps_the_rewards_of_a_batch_but_not_their_owners() -> None:
    env = ChainMod(shuffle_rewards=True, seed=0)
    problems, turns = answered(env, "train")
    results = [env.respond(problems, turns, torch.ones(64, dtype=torch.bool)) for _ in range(50)]
    truth = torch.tensor([0.0, 1.0] * 32)
    for result in results:
        assert result.reward.sum() == 32
        assert result.info["correct"].tolist() == truth.tolist()
    share = torch.stack([r.reward for r in results])[:, truth > 0].mean()  # of 1600 right answers; sd 0.5/sqrt(3200)
    assert abs(float(share) - 0.5) < 0.05


def test_shuffling_never_touches_evaluation_or_turns_that_go_on() -> None:
    env = ChainMod(shuffle_rewards=True, seed=0)
    problems, turns = answered(env, "eval")
    result = env.respond(problems, turns, torch.ones(64, dtype=torch.bool))
    assert result.reward.tolist() == [0.0, 1.0] * 32
    guess = GuessNumber(shuffle_rewards=True, turn_cost=0.0)
    drawn = guess.problems(40, stream())
    said = [[guess.codec.encode([f"{p['secret'] if i % 2 else 'x'};"])[0]] for i, p in enumerate(drawn)]
    assert guess.respond(drawn, said, torch.ones(40, dtype=torch.bool)).reward.tolist() == [0.0, 1.0] * 20


def test_the_shuffle_continues_exactly_after_a_restore() -> None:
    env, other = ChainMod(shuffle_rewards=True, seed=0), ChainMod(shuffle_rewards=True, seed=1)
    problems, turns = answered(env, "train")
    done = torch.ones(64, dtype=torch.bool)
    env.respond(problems, turns, done)
    other.load_state_dict(env.state_dict())
    assert torch.equal(env.respond(problems, turns, done).reward, other.respond(problems, turns, done).reward)
