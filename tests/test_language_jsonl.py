"""Word problems from files: what is read, what is refused, and how answers are judged."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from unified_rl.envs.language import JsonlProblems, character_tokenizer
from unified_rl.envs.language.verifiers import strip_calculations
from unified_rl.errors import ConfigError, DataError
from unified_rl.rollout.sources.answers import read_answers

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


def used(file: str, folder: Path, **arguments: Any) -> JsonlProblems:
    """A task whose answers are to be judged."""
    env = make(file, folder, **arguments)
    env.problems(1, torch.Generator())
    return env


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
        (b'[{"question": "a", "answer": 1}, {"answer": 1}]', "item 2: no field 'prompt' or 'messages' or 'question'"),
        (b'[{"question": "a",\n "answer" 1}]', "line 2: not JSON"),
    ],
)
def test_a_bad_file_is_named_with_the_line(tmp_path: Path, folder: Path, content: bytes, message: str) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.jsonl") as caught:
        used(str(file), folder)
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
    assert "1 of 4 prompts of" in caplog.text and len(caplog.records) == 1
    caplog.clear()
    other = write(tmp_path / "b.jsonl", *records[1:])
    for held_out, warnings in ((str(tmp_path / "." / "a.jsonl"), 1), (other, 2)):  # one for each file
        make(str(tmp_path / "a.jsonl"), folder, max_prompt_length=60, eval_path=held_out)
        assert len(caplog.records) == warnings
        caplog.clear()
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


def sides(env: JsonlProblems) -> dict[str, set[str]]:
    return {name: {problem["record"] for problem in env._pools[name]} for name in ("train", "eval")}


def test_the_split_and_the_ids_go_by_the_question_and_not_by_the_template(tmp_path: Path) -> None:
    tokenizer = character_tokenizer("".join(map(chr, range(32, 127))) + "\n")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    tokenizer.save_pretrained(tmp_path / "chat")
    file = write(tmp_path / "a.jsonl", *many(80))
    one, two, three = (
        make(file, tmp_path / "chat", held_out=0.3, **options)
        for options in ({}, {"chat": True}, {"template": "Q {question} A "})
    )
    assert sides(one) == sides(two) == sides(three) and 10 < len(sides(one)["eval"]) < 40
    drawn = [env.problems(5, torch.Generator().manual_seed(0)) for env in (one, two)]
    assert [p["prompt_id"] for p in drawn[0]] == [p["prompt_id"] for p in drawn[1]]
    assert drawn[0][0]["text"] != drawn[1][0]["text"]
    held = make(file, tmp_path / "chat", chat=True, eval_path=write(tmp_path / "b.jsonl", *many(5)))
    assert held.pool_sizes()["train"] == 75


def test_a_template_that_prints_the_day_gets_the_tasks_own(tmp_path: Path) -> None:
    tokenizer = character_tokenizer("".join(map(chr, range(32, 127))) + "\n")
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}|{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "dated")
    file = write(tmp_path / "a.jsonl", GSM)
    env = make(file, tmp_path / "dated", chat=True)
    assert env.problems(1, torch.Generator())[0]["text"] == f"26 Jul 2024|{GSM['question']}"
    other = make(file, tmp_path / "dated", chat=True, date="2026-01-02")
    assert other.problems(1, torch.Generator())[0]["text"].startswith("02 Jan 2026|")
    with pytest.raises(ConfigError, match=r"env\.date='soon'"):
        make(file, tmp_path / "dated", chat=True, date="soon")


@pytest.mark.parametrize(
    ("record", "options", "target"),
    [
        ({"question": "q", "answer": "42"}, {}, " #### 42"),
        ({"question": "q", "answer": "42"}, {"verifier": "math"}, " \\boxed{42}"),
        ({"question": "q", "answer": "City 1 is the capital."}, {"verifier": "math"}, " City 1 is the capital."),
        ({"question": "q", "answer": "42", "said": " it is\n42 "}, {"solution_key": "said"}, " it is\n42 "),
        ({"question": "q", "answer": "so \\boxed{42}#### 42"}, {}, " so \\boxed{42}#### 42"),
    ],
)
def test_what_demonstrations_say(
    tmp_path: Path, folder: Path, record: dict[str, Any], options: dict[str, Any], target: str
) -> None:
    env = make(write(tmp_path / "a.jsonl", record), folder, **options)
    try:
        row = env.demonstrations(1, torch.Generator().manual_seed(0))[0]
        assert env.codec.decode(row["tokens"][row["mask"]].tolist()) == target
    finally:
        env.close()


def test_a_truncated_answer_earns_what_is_set_or_what_there_is_of_it(tmp_path: Path, folder: Path) -> None:
    file = write(tmp_path / "a.jsonl", GSM)
    for setting, reward, correct in ((0.0, 0.0, 0.0), (-1.0, -1.0, 0.0), (None, 1.0, 1.0)):
        env = make(file, folder, truncated_reward=setting)
        turn = env.codec.encode(["#### 24 and on and"])[0]
        result = env.respond(env.problems(1, torch.Generator()), [[turn]], torch.tensor([False]))
        assert (result.reward.tolist(), result.done.tolist()) == ([reward], [False])
        assert (result.info["correct"].tolist(), result.info["truncated"].tolist()) == ([correct], [1.0])


def test_every_problem_of_a_small_pool_is_drawn_equally_often(tmp_path: Path, folder: Path) -> None:
    env = make(write(tmp_path / "a.jsonl", *many(7)), folder)
    counts = Counter(p["record"] for p in env.problems(24, torch.Generator().manual_seed(0)))
    assert len(counts) == 7 and set(counts.values()) == {3, 4}


LINE = b'{"question": "a", "answer": "1"}\n'


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + LINE,
        b"\xef\xbb\xbf[" + LINE.strip() + b"]",
        LINE.replace(b"\n", b"\r\n") + b"\r\n",
        b"\n\n  \n" + LINE + b"\n",
        LINE.strip(),
        b'{"question": "a", "answer": 0.00001}',
        b'{"question": "a", "answer": "1e-5"}',
        b'{"question": "a", "answer": 1e2}',
        b'{"question": "a", "answer": 12345678901234567890}',
        b'{"question": "a", "answer": "1", "score": NaN, "rank": 1e999, "more": {"deep": [null, true]}}',
        b'{"question": "a", "answer": "1", "id": ' + b"9" * 5000 + b"}",
        b'{"question": "\\ud83d\\ude00", "answer": "1"}',
        b'{"question": "a\xe2\x80\xa8b", "answer": "1"}\n' + LINE,
    ],
)
def test_common_files_are_read(tmp_path: Path, folder: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    assert make(str(tmp_path / "a.jsonl"), folder).pool_sizes()["train"] >= 1
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as file:
        file.write(content)
    assert make(str(tmp_path / "b.jsonl.gz"), folder).pool_sizes()["train"] >= 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LINE + b'{"question": "a", "answer": NaN}', "line 2: field 'answer' is NaN, expected a number in range"),
        (b'{"question": "a", "answer": 1e999}', "line 1: field 'answer' is 1E+999, expected a number in range"),
        (b'{"question": "a", "answer": 1e99999999999999999999}', "line 1: not usable JSON (the number"),
        (b'{"question": "a", "answer": ' + b"9" * 5000 + b"}", "expected a number in range"),
        (
            b'{"question": "a", "answer": "1", "answer": "2"}',
            "line 1: not usable JSON (the key 'answer' is given twice)",
        ),
        (b'{"question": "\\ud800", "answer": "1"}', "line 1: field 'question' holds half a character"),
        (b'{"question": "a", "answer": ' + b"[" * 100_000, "line 1: not usable JSON (nested too deeply)"),
        (b'{"question": "a", "answer": null}', "line 1: field 'answer' is NoneType, expected text or a number"),
        (b'{"question": "a", "answer": true}', "line 1: field 'answer' is bool"),
        (b'{"question": "a", "answer": ""}', "line 1: field 'answer' holds no reference"),
        (b'"text"\n', "line 1: expected a JSON object, found str"),
        (b"[1, 2]", "item 1: expected a JSON object, found Decimal"),
        (b"[]", "holds no record"),
        (b"", "holds no record"),
        (
            b'{"text": "a", "label": "1"}',
            "env.question_key, env.answer_key and env.solution_key name the fields",
        ),
        (LINE.decode().encode("utf-16"), "line 1: not UTF-8"),
        (b"\x1f\x8b\x08\x00", "line 1: not UTF-8"),
    ],
)
def test_odd_files_get_one_line_that_names_the_place(
    tmp_path: Path, folder: Path, content: bytes, message: str
) -> None:
    (tmp_path / "odd.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"odd\.jsonl") as caught:
        used(str(tmp_path / "odd.jsonl"), folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_archives_and_folders_are_named(tmp_path: Path, folder: Path) -> None:
    whole = gzip.compress(LINE * 100)
    for name, content in (("short.gz", whole[:-9]), ("no.gz", b"plain"), ("bad.gz", whole[:30] + b"\0" * 20)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"cannot (unpack|read) .*{name}"):
            make(str(tmp_path / name), folder)
    for path in (str(tmp_path), "a\0b"):
        with pytest.raises(DataError, match="cannot read"):
            make(path, folder)


def test_pipes_and_devices_are_not_waited_for(tmp_path: Path, folder: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), "/dev/zero"):
        with pytest.raises(DataError, match=f"cannot read {path}: it is no regular file"):
            make(path, folder)
        with pytest.raises(DataError, match=f"cannot read {path}: it is no regular file"):
            read_answers(path)


def test_answers_that_are_nested_without_end_are_named(tmp_path: Path) -> None:
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"deep\.jsonl, item 1: not usable JSON"):
        read_answers(tmp_path / "deep.jsonl")
