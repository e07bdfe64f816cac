"""Data as people have it: kinds of files, the columns of TRL's data sets, conversations, epochs, held-out answers."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import pickle
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from unified_rl import records as reading
from unified_rl.config import compose, resolve_defaults
from unified_rl.envs.language import JsonlProblems, character_tokenizer
from unified_rl.envs.language.tokenizer import load_tokenizer
from unified_rl.errors import CheckpointError, ConfigError, DataError
from unified_rl.records import open_records
from unified_rl.training.checkpoint import checkpoints, read_checkpoint
from unified_rl.training.metrics import read_metrics
from unified_rl.training.run import resume, train

LETTERS = "".join(map(chr, range(32, 127))) + "\n"
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if not think|default(true) %}<no>{% endif %}{% endif %}"
)
TINY = [
    "policy=causal_lm_tiny", "policy.config.hidden_size=16", "policy.config.num_attention_heads=2",
    "policy.config.num_hidden_layers=1", "policy.config.intermediate_size=32", "progress=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A character tokenizer with a chat template, whose turns end with a token of their own."""
    path = tmp_path_factory.mktemp("letters")
    tokenizer = character_tokenizer(LETTERS)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    end = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end>")]
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    return str(path)


def lines(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def make(path: str, letters: str, **settings: Any) -> JsonlProblems:
    return JsonlProblems(path, tokenizer=letters, **{"held_out": 0.0, **settings})


def shown(env: JsonlProblems) -> tuple[str, str]:
    """Prompt and target of the only demonstration, special tokens and all."""
    row = env.demonstrations(1, torch.Generator())[0]
    parts = [row["tokens"][row["token_mask"] & ~row["mask"]], row["tokens"][row["mask"]]]
    prompt, target = (env.tokenizer.decode(part, skip_special_tokens=False) for part in parts)
    return prompt, target


RECORDS = [
    {"prompt": f"What, \"exactly\", is\n{n} + {n}?", "answer": f"#### {2 * n}", "level": n, "tags": f"t{n}"}
    for n in range(40)
]  # fmt: skip


def write_all(folder: Path) -> dict[str, Path]:
    """The same records as every kind of file."""
    import datasets
    import pyarrow
    import pyarrow.parquet as parquet

    files = {name: folder / name for name in ("a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz")}
    text = "".join(json.dumps(record) + "\n\n" for record in RECORDS)
    files["a.jsonl"].write_text(text)
    with gzip.open(files["a.jsonl.gz"], "wt") as packed:
        packed.write(text)
    files["a.json"].write_text(json.dumps(RECORDS, indent=1))
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with files[name].open("w", newline="") as file:
            table = csv.DictWriter(file, list(RECORDS[0]), delimiter=delimiter)
            table.writeheader()
            table.writerows(RECORDS)
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), files["a.parquet"], row_group_size=7)
    files["b.data"] = folder / "b.data"  # by its content
    files["b.data"].write_bytes(files["a.parquet"].read_bytes())
    data = datasets.Dataset.from_list(RECORDS)
    data.save_to_disk(str(folder / "one"))
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(str(folder / "splits"))
    return {**files, "one": folder / "one", "splits": folder / "splits"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("datasets")
    return write_all(tmp_path_factory.mktemp("files"))


def test_every_kind_of_file_holds_the_same_problems(files: dict[str, Path], letters: str) -> None:
    want = [(record["prompt"], str(2 * record["level"]), record["tags"]) for record in RECORDS]
    for name, path in files.items():
        env = make(str(path), letters, held_out=0.3)
        drawn = [p for split in ("train", "eval") for p in env._pools[split]]
        found = sorted(drawn, key=lambda p: int(p["columns"]["level"]))
        assert [(p["text"], p["reference"], p["columns"]["tags"]) for p in found] == want, name
        level = found[3]["columns"]["level"]
        assert level == ("3" if name.endswith(("csv", "tsv")) else 3) and 4 < env.pool_sizes()["eval"] < 22
        assert json.loads(json.dumps(found[3]["columns"])) == found[3]["columns"]
        again = env.problems(30, torch.Generator().manual_seed(1))
        assert [p["text"] for p in again] == [p["text"] for p in env.problems(30, torch.Generator().manual_seed(1))]


def test_records_are_read_again_in_any_order_and_say_where_they_stand(files: dict[str, Path]) -> None:
    order = [5, 39, 0, 5, 17]
    for name, path in files.items():
        records = open_records(path)
        there = list(records)
        assert len(records) == 40 and records.read(order) == [there[n] for n in order], name
    assert open_records(files["a.jsonl"]).__class__ is open_records(files["a.jsonl.gz"]).__class__
    assert list(open_records(files["a.jsonl"]))[5][0].endswith("line 11")  # every second line is blank
    assert list(open_records(files["a.csv"]))[5][0].endswith("line 12")  # a record takes two lines
    assert list(open_records(files["a.parquet"]))[5][0].endswith("row 6")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b'prompt,answer\n"a\nb",1\nb\n', "a.csv, line 4: 1 values under a header of 2"),
        ("a.csv", b"prompt,prompt\n", "line 1: the column 'prompt' is named twice"),
        ("a.csv", b'prompt,answer\n"a"b,1\n', "line 2: not CSV"),
        ("a.csv", b"prompt,answer\na,\xff\n", "line 2: not UTF-8"),
        ("a.csv", b"prompt,answer\n", "a.csv holds no record"),
        ("a.parquet", b"PAR1" + b"x" * 50, "a.parquet: not Parquet that can be read"),
        ("a.jsonl", b'{"prompt": [{"role": "user"}], "answer": "1"}', "message 0 has content NoneType, expected text"),
        ("a.jsonl", b'{"prompt": [{"content": "a"}]}', "line 1: field 'prompt': message 0 is no mapping with role"),
        ("a.jsonl", b'{"prompt": [], "answer": "1"}', "line 1: field 'prompt' is empty, expected messages"),
        ("a.jsonl", b'{"prompt": "a", "completion": ""}', "line 1: field 'completion' is empty"),
        ("a.jsonl", b'{"prompt": " ", "completion": "b"}', "line 1: field 'prompt' is empty"),
        ("a.jsonl", b'{"messages": [{"role": "assistant", "content": "b"}]}', "nothing that was asked"),
        (
            "a.jsonl",
            b'{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}',
            "message 0 has parts that are no text",
        ),
    ],
)
def test_a_malformed_record_names_file_and_line(
    tmp_path: Path, letters: str, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        make(str(tmp_path / name), letters)
    assert words in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_written_to_while_it_is_used_is_refused(tmp_path: Path, letters: str) -> None:
    path = lines(tmp_path / "a.jsonl", *RECORDS)
    env = make(path, letters)
    lines(tmp_path / "a.jsonl", *RECORDS[:20])
    with pytest.raises(DataError, match=r"a\.jsonl was written to since"):
        env.problems(1, torch.Generator())
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(DataError, match=r"cannot read .*a\.jsonl"):
        env.problems(1, torch.Generator())


def test_folders_say_which_file_or_split_to_name(tmp_path: Path, letters: str, files: dict[str, Path]) -> None:
    with pytest.raises(DataError, match=r"no regular file; name a file of it, such as \S+a\.csv"):
        make(str(files["a.csv"].parent), letters)
    import datasets

    datasets.DatasetDict({"dev": datasets.Dataset.from_list(RECORDS[:2])}).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(DataError, match="has no split 'train'; name one of dev as its own folder"):
        make(str(tmp_path / "d"), letters)
    env = make(str(files["one"]), letters, eval_path=str(files["splits"] / "test"))
    assert env.pool_sizes() == {"train": 39, "eval": 1, "demonstration": 39}


# --------------------------------------------------------------------------------------------------------- columns

USER = {"role": "user", "content": "Sky?"}
BLUE = {"role": "assistant", "content": "Blue, mostly."}


@pytest.mark.parametrize(
    ("record", "settings", "prompt", "target"),
    [
        ({"prompt": "Sky:", "completion": " Blue."}, {}, "Sky:", " Blue.<end>"),
        ({"prompt": "Sky:", "completion": " 4", "answer": "5"}, {}, "Sky:", " 4<end>"),
        ({"question": "Sky?", "completion": "Blue."}, {}, "Question: Sky?\nAnswer:", "Blue.<end>"),
        ({"question": "Sky?", "answer": "Blue."}, {}, "Question: Sky?\nAnswer:", " Blue.<end>"),
        ({"problem": "1+1", "solution": "so 2", "answer": "2"}, {}, "Question: 1+1\nAnswer:", " so 2\n#### 2<end>"),
        ({"problem": "1+1", "solution": r"so \boxed{2}"}, {}, "Question: 1+1\nAnswer:", " so \\boxed{2}<end>"),
        ({"messages": [USER, BLUE]}, {}, "<|user|>Sky?<end>\n<|assistant|>", "Blue, mostly.<end>"),
        ({"prompt": [USER], "completion": [BLUE]}, {}, "<|user|>Sky?<end>\n<|assistant|>", "Blue, mostly.<end>"),
        ({"prompt": [USER], "completion": "Blue"}, {}, "<|user|>Sky?<end>\n<|assistant|>", "Blue<end>"),
        (
            {"prompt": [USER, BLUE, USER], "completion": [BLUE]},
            {"system_prompt": "Be brief."},
            "<|system|>Be brief.<end>\n<|user|>Sky?<end>\n<|assistant|>Blue, mostly.<end>\n<|user|>Sky?<end>\n"
            "<|assistant|>",
            "Blue, mostly.<end>",
        ),
        (
            {"prompt": [{"role": "system", "content": "Own."}, USER], "completion": [BLUE]},
            {"system_prompt": "Be brief."},
            "<|system|>Own.<end>\n<|user|>Sky?<end>\n<|assistant|>",
            "Blue, mostly.<end>",
        ),
        (
            {"question": "Sky?", "completion": "Blue"},
            {"system_prompt": "Be brief.", "chat_template_kwargs": {"think": False}},
            "<|system|>Be brief.<end>\n<|user|>Sky?<end>\n<|assistant|><no>",
            "Blue<end>",
        ),
        (
            {"q": {"text": "1+1"}, "a": 2, "prompt": "unused"},
            {"question_key": "q.text", "answer_key": "a"},
            "Question: 1+1\nAnswer:",
            " #### 2<end>",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Sky"}, {"type": "text", "text": "?"}]}],
             "completion": [BLUE]},
            {}, "<|user|>Sky?<end>\n<|assistant|>", "Blue, mostly.<end>",
        ),
    ],
)  # fmt: skip
def test_prompts_and_completions_are_found_by_their_usual_names(
    tmp_path: Path, letters: str, record: Any, settings: Any, prompt: str, target: str
) -> None:
    env = make(lines(tmp_path / "a.jsonl", record), letters, **settings)
    eos = env.tokenizer.eos_token
    found = shown(env)
    ends = "<end>" if env._chat else eos  # without a template an answer ends as the tokenizer says
    assert found == (prompt, target.replace("<end>", ends))


SEA, GREEN = {"role": "user", "content": "Sea?"}, {"role": "assistant", "content": "Green."}
MARKING = TEMPLATE.replace(
    "{{ m.content }}<end>", "{% if m.role == 'assistant' %}({% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}<end>"
)  # fmt: skip


def trained(env: JsonlProblems) -> list[str]:
    """The runs of trained tokens of the only demonstration."""
    row = env.demonstrations(1, torch.Generator())[0]
    mask, ids = row["mask"].tolist(), row["tokens"].tolist()
    runs = [list(group) for own, group in itertools.groupby(range(len(ids)), mask.__getitem__) if own]
    return [env.tokenizer.decode([ids[at] for at in run], skip_special_tokens=False) for run in runs]


def test_every_turn_of_the_assistant_is_imitated_and_nothing_else(tmp_path: Path, letters: str) -> None:
    talk = [{"role": "system", "content": "Own."}, USER, BLUE, SEA, {"role": "tool", "content": "x"}, GREEN]
    path = lines(tmp_path / "a.jsonl", {"messages": talk})
    env = make(path, letters)
    assert trained(env) == ["Blue, mostly.<end>", "Green.<end>"]
    whole = "".join(f"<|{one['role']}|>{one['content']}<end>\n" for one in talk)
    row = env.demonstrations(1, torch.Generator())[0]
    assert env.tokenizer.decode(row["tokens"][row["token_mask"]], skip_special_tokens=False) == whole.rstrip()
    assert trained(make(path, letters, assistant_only_loss=False)) == ["Green.<end>"]
    # a prompt stays a prompt, and what a tool says in a completion is not imitated
    path = lines(tmp_path / "b.jsonl", {"prompt": [USER, BLUE, USER], "completion": [BLUE, talk[-2], GREEN]})
    assert trained(make(path, letters)) == ["Blue, mostly.<end>", "Green.<end>"]
    env.tokenizer.chat_template = MARKING  # the template says itself what is the assistant's: not the bracket
    env.tokenizer.save_pretrained(tmp_path / "marking")
    (tmp_path / "marking/generation_config.json").write_text((Path(letters) / "generation_config.json").read_text())
    path = lines(tmp_path / "a.jsonl", {"messages": talk})
    assert trained(make(path, str(tmp_path / "marking"))) == ["Blue, mostly.<end>", "Green.<end>"]


def test_a_template_that_writes_earlier_turns_otherwise_is_refused_by_name(tmp_path: Path, letters: str) -> None:
    tokenizer = load_tokenizer(letters)
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    tokenizer.save_pretrained(tmp_path / "counting")
    (tmp_path / "counting/generation_config.json").write_text((Path(letters) / "generation_config.json").read_text())
    path = lines(tmp_path / "a.jsonl", {"messages": [USER, BLUE, SEA, GREEN]})
    with pytest.raises(DataError, match=r"a.jsonl, line 1: .* comes before message 2 .*env.assistant_only_loss=false"):
        make(path, str(tmp_path / "counting")).demonstrations(1, torch.Generator())


def test_conversations_that_nobody_answers_are_told_by_name(tmp_path: Path, letters: str) -> None:
    env = make(lines(tmp_path / "a.jsonl", {"messages": [USER, BLUE, SEA]}), letters)
    with pytest.raises(ConfigError, match=r"ends with role 'user'.*end each with a message of role 'assistant'"):
        env.demonstrations(1, torch.Generator())
    env = make(lines(tmp_path / "a.jsonl", {"prompt": "Sea?"}), letters)
    with pytest.raises(ConfigError, match=r"name its column with env.solution_key"):
        env.demonstrations(1, torch.Generator())


def test_a_prompt_that_is_begun_by_the_assistant_is_gone_on_with(tmp_path: Path, letters: str) -> None:
    begun = {"role": "assistant", "content": "It is"}
    env = make(lines(tmp_path / "a.jsonl", {"prompt": [USER, begun], "answer": "1"}), letters)
    assert env.problems(1, torch.Generator())[0]["text"] == "<|user|>Sky?<end>\n<|assistant|>It is"


def test_other_columns_and_messages_stay_with_the_problem(tmp_path: Path, letters: str) -> None:
    record = {
        "prompt": [USER], "answer": "7", "solution": "because", "tests": [{"in": 1.5, "out": None}],
        "big": 12345678901234567890, "odd": float("nan"), "completion": "kept out",
    }  # fmt: skip
    (problem,) = make(lines(tmp_path / "a.jsonl", record), letters).problems(1, torch.Generator())
    assert problem["columns"] == {
        "answer": "7", "solution": "because", "tests": [{"in": 1.5, "out": None}],
        "big": 12345678901234567890, "odd": None,
    }  # fmt: skip
    assert problem["messages"] == [USER] and problem["reference"] == "7"


def test_the_same_question_is_on_the_same_side_in_every_shape(tmp_path: Path, letters: str) -> None:
    asked = [f"What is {n}?" for n in range(60)]
    shapes = [
        [{"prompt": q, "answer": "1"} for q in asked],
        [{"question": f" {q} ", "answer": "1"} for q in asked],
        [{"messages": [{"role": "user", "content": q}, BLUE], "answer": "1"} for q in asked],
        [{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": q}], "answer": 1} for q in asked],
    ]  # fmt: skip
    sides = []
    for number, records in enumerate(shapes):
        env = make(lines(tmp_path / f"{number}.jsonl", *records), letters, held_out=0.4)
        sides.append({problem["record"] for problem in env._pools["eval"]})
    assert sides[0] and sides.count(sides[0]) == 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"chat_template_kwargs": {"tokenize": True}}, "env.chat_template_kwargs.tokenize is the task's own to give"),
        ({"chat_template_kwargs": {"think": False}}, "env.chat_template_kwargs would be of no effect"),
        ({"system_prompt": "s", "chat": False}, "env.system_prompt would be of no effect"),
    ],
)
def test_settings_of_a_chat_template_that_do_nothing_are_refused(
    tmp_path: Path, letters: str, settings: Any, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        make(lines(tmp_path / "a.jsonl", {"prompt": "a", "answer": "1"}), letters, **settings)


def test_a_conversation_needs_a_template_and_what_the_template_refuses_is_named(tmp_path: Path) -> None:
    tokenizer = character_tokenizer(LETTERS)
    tokenizer.save_pretrained(tmp_path / "bare")
    path = lines(tmp_path / "a.jsonl", {"prompt": "a", "answer": "1"}, {"prompt": [USER], "answer": "1"})
    with pytest.raises(ConfigError, match=r"a\.jsonl, line 2 holds a conversation: .*no chat template"):
        make(path, str(tmp_path / "bare"))
    tokenizer.chat_template = "{% if messages[0].content == 'Sky?' %}{{ raise_exception('no skies') }}{% endif %}"
    tokenizer.save_pretrained(tmp_path / "picky")
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: the chat template refuses .*no skies"):
        make(path, str(tmp_path / "picky"))


# ---------------------------------------------------------------------------------------------- free text, held out


def capitals(path: Path, count: int = 40) -> str:
    return lines(path, *({"prompt": f"Capital {n}?", "completion": f" City {n}."} for n in range(count)))


def test_free_text_is_imitated_and_evaluated_by_its_likelihood(tmp_path: Path) -> None:
    run = ["env=jsonl", f"env.path={capitals(tmp_path / 'a.jsonl')}", "env.vocabulary_size=270", *TINY]
    imitate = [*run, "agent=sft", "rollout.rows=8", "agent.lr=0.02", "steps=160", "log_every=8", "env.held_out=0.3"]
    rows = read_metrics(train(resolve_defaults(compose([*imitate, f"run_dir={tmp_path / 'r'}"]))) / "metrics.jsonl")
    told = [row for row in rows if "eval/nll" in row]
    assert told[-1]["eval/nll"] < told[0]["eval/nll"] - 0.5 and told[-1]["eval/score"] == -told[-1]["eval/nll"]
    assert not any("accuracy" in key for row in rows for key in row)
    epochs = [row["rollout/epoch"] for row in rows if "rollout/epoch" in row]
    assert epochs == sorted(epochs) and epochs[-1] > 4
    with pytest.raises(DataError, match=r"a\.jsonl, line \d+: field 'completion' holds no reference: expected"):
        train(resolve_defaults(compose([*run, "steps=8", "rollout.prompts=2", f"run_dir={tmp_path / 'rl'}"])))


def test_evaluation_can_be_off_and_then_nothing_need_be_held_out(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *({"prompt": f"{n}+1=", "answer": n + 1} for n in range(6)))
    run = ["env=jsonl", f"env.path={path}", "env.vocabulary_size=270", "env.held_out=0", "env.max_turn_tokens=4",
           "rollout.prompts=2", "rollout.group_size=2", "steps=8", *TINY]  # fmt: skip
    with pytest.raises(ConfigError, match=r"the pool of eval problems is empty; .*set eval_episodes=0"):
        train(resolve_defaults(compose([*run, f"run_dir={tmp_path / 'on'}"])))
    folder = train(resolve_defaults(compose([*run, "eval_episodes=0", f"run_dir={tmp_path / 'off'}"])))
    rows = read_metrics(folder / "metrics.jsonl")
    assert rows[-1]["update"] == 2 and not any(key.startswith("eval/") for row in rows for key in row)


# ---------------------------------------------------------------------------------------------------------- epochs


def numbers(path: Path, count: int, **more: Any) -> str:
    return lines(path, *({"prompt": f"{n}+1=", "answer": n + 1, **more} for n in range(count)))


def test_every_problem_comes_once_an_epoch_across_calls(tmp_path: Path, letters: str) -> None:
    env = make(numbers(tmp_path / "a.jsonl", 23), letters)
    stream, other = torch.Generator().manual_seed(3), torch.Generator().manual_seed(4)
    drawn: list[str] = []
    for _ in range(3 * 23):  # calls of 3: three epochs are 69
        drawn += [p["text"] for p in env.problems(3, stream)] if len(drawn) < 69 else []
        env.problems(2, other)  # whoever else draws changes nothing
    epochs = [drawn[start : start + 23] for start in (0, 23, 46)]
    assert all(len(set(epoch)) == 23 for epoch in epochs) and epochs[0] != epochs[1]
    assert env.epoch(stream) == 3.0 and env.epoch(torch.Generator()) is None
    again = make(str(tmp_path / "a.jsonl"), letters)
    fresh = torch.Generator().manual_seed(3)
    assert [p["text"] for _ in range(23) for p in again.problems(3, fresh)] == drawn


def test_an_epoch_ends_with_its_last_whole_draw_if_the_rest_is_dropped(tmp_path: Path, letters: str) -> None:
    env = make(numbers(tmp_path / "a.jsonl", 10), letters, drop_last=True)
    stream = torch.Generator().manual_seed(0)
    calls = [[p["text"] for p in env.problems(4, stream)] for _ in range(6)]
    for one, two in zip(calls[::2], calls[1::2], strict=True):
        assert len({*one, *two}) == 8
    assert len({text for call in calls for text in call}) > 8  # what was dropped comes in another epoch
    assert 2.0 < (env.epoch(stream) or 0) < 3.0
    with pytest.raises(ConfigError, match=r"env\.drop_last=true, but 11 problems are drawn at once and there are 10"):
        env.problems(11, stream)


def test_held_out_problems_are_drawn_alike_whatever_was_drawn_before(tmp_path: Path, letters: str) -> None:
    env = make(numbers(tmp_path / "a.jsonl", 40), letters, held_out=0.3)
    draws = [[p["text"] for p in env.problems(30, torch.Generator().manual_seed(0), "eval")] for _ in range(2)]
    counts = Counter(draws[0])
    assert draws[0] == draws[1] and len(counts) == env.pool_sizes()["eval"]
    assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("agent", ["policy_gradient", "sft"])
def test_a_resumed_run_goes_on_in_the_middle_of_an_epoch(tmp_path: Path, agent: str) -> None:
    from test_resume import cut_run, equal, rows_of

    path = numbers(tmp_path / "a.jsonl", 15)
    kind = ["rollout.prompts=4", "rollout.group_size=2", "rollout.staleness=2", "correction=tis"]
    run = ["env=jsonl", f"env.path={path}", "env.vocabulary_size=270", "env.held_out=0.2", "env.max_turn_tokens=4",
           "steps=80", "checkpoint_every=8", "keep_checkpoints=20", "log_every=8", "eval_episodes=2", *TINY,
           *(kind if agent == "policy_gradient" else ["agent=sft", "rollout.rows=8"])]  # fmt: skip
    whole = train(resolve_defaults(compose([*run, f"run_dir={tmp_path / 'whole'}"])))
    saves = checkpoints(whole / "checkpoints")
    part = tmp_path / "part"
    cut_run(whole, part, saves[3])
    resume(str(part))
    assert rows_of(part) == rows_of(whole) and rows_of(whole)[-1]["rollout/epoch"] > 2
    equal(read_checkpoint(saves[-1]), read_checkpoint(checkpoints(part / "checkpoints")[-1]))
    if agent == "sft":
        numbers(tmp_path / "a.jsonl", 16)
        cut_run(whole, tmp_path / "changed", saves[3])
        with pytest.raises(CheckpointError, match=r"the file of env\.path has changed; put it back"):
            resume(str(tmp_path / "changed"))


# ----------------------------------------------------------------------------------------------------- large files


def test_what_stays_in_memory_of_a_file_are_numbers(tmp_path: Path, letters: str) -> None:
    filler = "x" * 4000
    path = lines(tmp_path / "a.jsonl", *({"prompt": f"{n}+1=", "answer": n, "filler": filler} for n in range(4000)))
    env = make(path, letters, held_out=0.2, max_prompt_length=8)
    kept = sum(len(pickle.dumps(side.numbers)) for side in env._pools.values()) + len(pickle.dumps(env._hashes))
    assert kept < 100_000 < 16e6 < Path(path).stat().st_size
    tracemalloc.start()
    try:
        JsonlProblems(path, vocabulary_size=270).problems(32, torch.Generator())
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()


ARRAY = (
    '\ufeff [\n {"prompt": "ä \\" ] [ \\ud83d\\ude00", "answer": "1"},\n\n'
    '{"prompt": "x\\n}", "answer": 22}  , {"a": {"b": [1, null,  true, -1.5e3]}} ]\n'
)


@pytest.mark.parametrize("piece", [1, 2, 7, 2**20])
def test_an_array_is_read_item_by_item_wherever_its_pieces_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(reading, "PIECE", piece)
    (tmp_path / "a.json").write_text(ARRAY, encoding="utf-8")
    found = open_records(tmp_path / "a.json")
    values = [value for _, value in found]
    assert values == json.loads(ARRAY.removeprefix("\ufeff")) and len(found) == 3
    assert [value for _, value in found.read([2, 0])] == [values[2], values[0]]
    assert found.read([1])[0][0].endswith("a.json, item 2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n {"a": tru}]', r"item 2, line 2: not JSON \(Expecting value at column 8\)"),
        ('[{"a": 1}\n {"a": 2}]', r"a\.json, line 2: not JSON \(Expecting ',' delimiter at column 2\)"),
        ('[{"a": 1},]', r"item 2, line 1: not JSON \(Expecting value at column 11\)"),
        ('[{"a": 1}', r"line 1: not JSON \(Expecting ',' delimiter at column 10\)"),
        ('[{"a": 1}] x', r"line 1: not JSON \(Extra data at column 12\)"),
        ('[{"a": "x', r"item 1, line 1: not JSON \(Unterminated string starting at at column 8\)"),
        ('[{"a": 1, "a": 2}]', r"item 1: not usable JSON \(the key 'a' is given twice\)"),
    ],
)
def test_a_fault_in_an_array_is_named_with_item_line_and_column(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=message):
        list(open_records(tmp_path / "a.json"))


def test_a_fault_in_a_large_array_is_found_without_reading_on(tmp_path: Path) -> None:
    rows = ",\n".join(json.dumps({"prompt": f"{n}", "filler": "x" * 4000}) for n in range(4000))
    (tmp_path / "a.json").write_text(f"[{rows}]")
    tracemalloc.start()
    try:
        found = open_records(tmp_path / "a.json")
        assert sum(1 for _ in found) == 4000 and found.read([3999])[0][1]["prompt"] == "3999"
        (tmp_path / "b.json").write_text(f'[{{"prompt": "x", "y": }},{rows}]')
        tracemalloc.reset_peak()
        with pytest.raises(DataError, match="item 1, line 1"):
            list(open_records(tmp_path / "b.json"))
        assert tracemalloc.get_traced_memory()[1] < 6e6 + len(rows)  # rows is held by this test
    finally:
        tracemalloc.stop()


def test_evaluation_does_not_go_through_the_file_again(tmp_path: Path, letters: str) -> None:
    env = make(numbers(tmp_path / "a.jsonl", 40), letters, held_out=0.3)
    drawn, stream = env.problems(3, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(0)
    other = env.twin()
    assert other._pools is env._pools and [p["text"] for p in other.problems(3, stream)] == [p["text"] for p in drawn]
    assert env.epoch(stream) is None and other.epoch(stream)


def test_nothing_to_imitate_and_nothing_that_fits_are_told_apart(tmp_path: Path) -> None:
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"prompt": f"Say {i}"}) + "\n" for i in range(30)))
    with pytest.raises(ConfigError, match=r"no record holds what is to be imitated.*env\.solution_key"):
        JsonlProblems(str(asked)).demonstrations(2, torch.Generator())
    said = tmp_path / "said.jsonl"
    said.write_text("".join(json.dumps({"prompt": f"Say {i}", "completion": "so it is"}) + "\n" for i in range(30)))
    with pytest.raises(ConfigError, match=r"no solution fits env\.max_turn_tokens=1; raise it"):
        JsonlProblems(str(said), max_turn_tokens=1).demonstrations(2, torch.Generator())
