"""Word problems from files: what is read, what is refused, and how answers are judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from unified_rl.envs.language import JsonlProblems, character_tokenizer
from unified_rl.envs.language.verifiers import strip_calculations
from unified_rl.errors import ConfigError, DataError

GSM = {"question": "Ann has 48 clips and sells half. How many are left?", "answer": "48/2 = <<48/2=24>>24.\n#### 24"}


def write(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def many(count: int) -> list[dict[str, Any]]:
    return [
        {"question": f"What is {n} plus 1?", "answer": f"It is <<{n}+1={n + 1}>>{n + 1}.\n#### {n + 1}"}
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A character tokenizer, so that budgets count characters."""
    path = tmp_path_factory.mktemp("tokenizer")
    character_tokenizer("".join(map(chr, range(32, 127))) + "\n").save_pretrained(path)
    return path


def make(file: str, folder: Path, **arguments: Any) -> JsonlProblems:
    return JsonlProblems(file, tokenizer=str(folder), **{"held_out": 0.0, **arguments})


def reward(env: JsonlProblems, reference: str, text: str) -> float:
    turn = [*env.codec.encode([text])[0], env.tokenizer.eos_token_id]
    problem = {"split": "train", "reference": reference}
    return float(env.respond([problem], [[turn]], torch.tensor([True])).reward)


def test_calculation_marks_are_taken_out() -> None:
    assert strip_calculations("48/2 = <<48/2=24>>24, a<<b") == "48/2 = 24, a<<b"


def test_the_numeric_verifier_wants_its_mark(tmp_path: Path, folder: Path) -> None:
    env = make(write(tmp_path / "a.jsonl", GSM), folder)
    assert reward(env, "1000", "so\n#### 1,000") == 1.0
    assert reward(env, "0.5", "#### .50") == 1.0
    for wrong in ("", "1000", "#### 1001", "#### 1000 or 1", "####", "#### __import__('os')", "#### 10**3"):
        assert reward(env, "1000", wrong) == 0.0
    lenient = make(write(tmp_path / "a.jsonl", GSM), folder, verifier="last")
    assert reward(lenient, "1000", "it is 1000.") == 1.0 and reward(lenient, "1000", "1000 is not 7") == 0.0


def test_demonstrations_are_the_worked_answers_without_marks(tmp_path: Path, folder: Path) -> None:
    env = make(write(tmp_path / "a.jsonl", GSM), folder)
    row = env.demonstrations(1, torch.Generator().manual_seed(0))[0]
    assert env.codec.decode(row["tokens"][row["mask"]].tolist()) == " 48/2 = 24.\n#### 24"
    assert (
        env.codec.decode(row["tokens"][row["token_mask"] & ~row["mask"]].tolist())
        == f"Question: {GSM['question']}\nAnswer:"
    )
    problem = env.problems(1, torch.Generator())[0]
    turn = row["tokens"][row["mask"]].tolist()
    assert env.respond([problem], [[turn]], torch.tensor([True])).reward.tolist() == [1.0]


def test_an_answer_over_the_budget_counts_as_truncated(tmp_path: Path, folder: Path) -> None:
    env = make(write(tmp_path / "a.jsonl", GSM), folder)
    turn = env.codec.encode(["#### 24"])[0]
    result = env.respond(env.problems(1, torch.Generator()), [[turn]], torch.tensor([False]))
    assert (result.reward.tolist(), result.done.tolist(), result.info["truncated"].tolist()) == ([0.0], [False], [1.0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"question": "a", "answer": "1"}\n\n{"question": \n', "line 3: not JSON"),
        (
            b'{"question": "a", "answer": "1"}\n{"question": "b"}\n',
            "line 2: no field 'answer'; the record has 'question'",
        ),
        (b'{"question": "a", "answer": "1"}\n[1]\n', "line 2: expected a JSON object, found list"),
        (b'{"question": "a", "answer": "one"}\n', "line 1: field 'answer' holds no reference"),
        (b'{"question": "a", "answer": "x #### "}\n', "line 1: field 'answer' holds no reference"),
        (b'{"question": ["a"], "answer": "1"}\n', "line 1: field 'question' is list"),
        (b'{"question": "a", "answer": "1"}\n{"question": "\xff", "answer": "1"}\n', "line 2: not UTF-8"),
        (b"\n \n", "holds no record"),
        (b'[{"question": "a", "answer": 1}, {"answer": 1}]', "item 2: no field 'question'"),
        (b'[{"question": "a",\n "answer" 1}]', "line 2: not JSON"),
    ],
)
def test_a_bad_file_is_named_with_the_line(tmp_path: Path, folder: Path, content: bytes, message: str) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.jsonl") as caught:
        make(str(file), folder)
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.jsonl: No such file"):
        make(str(tmp_path / "nowhere.jsonl"), folder)


def test_an_array_with_a_body_a_question_and_a_float(tmp_path: Path, folder: Path) -> None:
    file = tmp_path / "svamp.json"
    file.write_text(json.dumps([{"Body": "Dan had $ 4.", "Question": "How many?", "Answer": 51.0}]))
    env = make(str(file), folder, question_key="Body,Question", answer_key="Answer")
    problem = env.problems(1, torch.Generator())[0]
    assert (problem["text"], problem["reference"]) == ("Question: Dan had $ 4. How many?\nAnswer:", "51")
    assert problem["solution"] == " #### 51"


def test_a_held_out_file_keeps_its_questions_out_of_training(tmp_path: Path, folder: Path) -> None:
    problems = many(30)
    env = make(write(tmp_path / "a.jsonl", *problems), folder, eval_path=write(tmp_path / "b.jsonl", *problems[:5]))
    assert env.pool_sizes() == {"train": 25, "eval": 5, "demonstration": 25}
    train = {p["text"] for p in env.problems(25, torch.Generator())}
    assert len(train) == 25  # without replacement
    assert not train & {p["text"] for p in env.problems(5, torch.Generator(), "eval")}


def test_one_file_splits_by_the_hash_of_its_prompts(tmp_path: Path, folder: Path) -> None:
    env = make(write(tmp_path / "a.jsonl", *many(400), *many(400)), folder, held_out=0.25)
    sizes = env.pool_sizes()
    assert sizes["train"] + sizes["eval"] == 800 and 140 < sizes["eval"] < 260
    train = {p["text"] for p in env._pools["train"]}
    assert not train & {p["text"] for p in env._pools["eval"]}


def test_long_prompts_are_left_out_and_counted(tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [*many(3), {"question": "x" * 90, "answer": "1"}]
    env = make(write(tmp_path / "a.jsonl", *records), folder, max_prompt_length=60)
    assert env.pool_sizes()["train"] == 3
    assert "1 of 4 prompts" in caplog.text
    with pytest.raises(ConfigError, match="max_prompt_length"):
        make(write(tmp_path / "a.jsonl", *records), folder, max_prompt_length=10)


def test_solutions_over_the_budget_are_not_demonstrated(tmp_path: Path, folder: Path) -> None:
    env = make(write(tmp_path / "a.jsonl", *many(12)), folder, max_turn_tokens=len(" It is 7.\n#### 7") + 1)
    assert env.pool_sizes() == {"train": 12, "eval": 0, "demonstration": 9}  # 9+1 and on take two digits twice
    tiny = make(write(tmp_path / "a.jsonl", *many(12)), folder, max_turn_tokens=4)
    with pytest.raises(ConfigError, match="max_turn_tokens"):
        tiny.demonstrations(1, torch.Generator())


def test_without_a_tokenizer_one_is_trained_on_the_file(tmp_path: Path) -> None:
    env = JsonlProblems(write(tmp_path / "a.jsonl", *many(50)), vocabulary_size=300)
    problem = env.problems(1, torch.Generator().manual_seed(0))[0]
    assert env.codec.decode(problem["prompt"]) == problem["text"]
    assert len(problem["prompt"]) < len(problem["text"])


def test_a_chat_template_wraps_the_prompt(tmp_path: Path) -> None:
    tokenizer = character_tokenizer("".join(map(chr, range(32, 127))) + "\n")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    tokenizer.save_pretrained(tmp_path / "chat")
    env = make(write(tmp_path / "a.jsonl", GSM), tmp_path / "chat", chat=True, template="{question}")
    assert env.problems(1, torch.Generator())[0]["text"] == f"[user]{GSM['question']}[assistant]"


def test_unusable_settings_are_refused(tmp_path: Path, folder: Path) -> None:
    file = write(tmp_path / "a.jsonl", GSM)
    for arguments in ({"verifier": "exact"}, {"template": "no place"}, {"chat": True}):
        with pytest.raises(ConfigError, match=next(iter(arguments))):
            make(file, folder, **arguments)
