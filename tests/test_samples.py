"""Conversations of a run: what is written, that a resumed run writes each once, and that showing them is safe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import ALLOW, LANGUAGE, composed

import unified_rl as ur
from unified_rl import cli
from unified_rl.errors import CheckpointError, ConfigError, DamageError
from unified_rl.training.checkpoint import checkpoints
from unified_rl.training.run import Job, resume, train
from unified_rl.training.sample_text import markdown, plain_text
from unified_rl.training.samples import LONGEST, SampleBook, read_samples, select

RUN = (*LANGUAGE, "correction=grpo", "steps=96", "eval_every=32", "samples_every=16", "log_every=16", "eval_episodes=8",
       "samples_rows=3", "checkpoint_every=16", "keep_checkpoints=9", "rollout.staleness=1")  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples") / "run"
    return train(composed([*RUN, f"run_dir={folder}"]), ALLOW)


def test_every_evaluation_and_every_nth_update_writes_bounded_rows(run: Path) -> None:
    rows = read_samples(run)
    updates = {split: [row["update"] for row in rows if row["split"] == split] for split in ("train", "eval")}
    assert updates == {
        "train": [u for u in range(1, 7) for _ in range(3)],
        "eval": [u for u in (0, 2, 4, 6) for _ in range(3)],
    }
    assert {row["steps"] for row in rows} == {16 * row["update"] for row in rows}
    first = rows[0]
    assert first["split"] == "eval" and first["policy_version"] == 0 and first["advantage"] is None
    asked = [[row["prompt"] for row in rows if row["split"] == "eval" and row["update"] == u] for u in (0, 6)]
    assert asked[0] == asked[1]  # the same prompts over time


def test_a_row_of_training_says_what_the_update_trained_on(tmp_path: Path) -> None:
    job = Job(composed([*RUN, f"run_dir={tmp_path}"]), ALLOW)
    trainer = job.make_trainer(None)  # type: ignore[arg-type]
    seen: list[Any] = []
    trainer.agent._optimize = _noting(trainer.agent._optimize, seen)
    trainer.run()
    rows = [row for row in trainer.log.samples if row["split"] == "train"]
    assert len(rows) == 18 and len(seen) == 6
    advantages = set()
    for row in rows:
        record = seen[row["update"] - 1]
        texts = [job.env.tokenizer.decode(t[m]) for t, m in zip(record["tokens"], record["mask"], strict=True)]
        prompts = record["prompt_id"].tolist()
        (at, *_) = [i for i, text in enumerate(texts) if text == row["answer"] and prompts[i] == row["prompt_id"]]
        assert row["reward"] == float(record["reward"][at].sum()) == row["rewards"]["correct"]
        assert row["advantage"] == pytest.approx(float(record["advantage"][at].max()))
        assert row["tokens"] == int(record["mask"][at].sum())
        assert row["policy_version"] == int(record["policy_version"][at][0]) == max(row["update"] - 2, 0)
        assert row["truncated"] == bool(record["truncated"][at].any())
        assert row["reference"] is not None and row["prompt"].endswith("=")
        advantages.add(row["advantage"])
    assert len(advantages) > 1


def _noting(optimize: Any, seen: list[Any]) -> Any:
    def noting(rows: Any) -> Any:
        seen.append(rows.clone())
        return optimize(rows)

    return noting


def test_a_resumed_run_writes_every_row_once_and_as_it_was(run: Path, tmp_path: Path) -> None:
    whole = (run / "samples.jsonl").read_bytes()
    for save in checkpoints(run / "checkpoints")[1:-1:2]:
        part = tmp_path / save.name
        shutil.copytree(run, part)
        for later in checkpoints(part / "checkpoints"):
            if later.name > save.name:
                shutil.rmtree(later)
        resume(str(part), allow=ALLOW)
        assert (part / "samples.jsonl").read_bytes() == whole


def test_an_extended_run_has_the_samples_of_the_whole_one(run: Path, tmp_path: Path) -> None:
    words = [*(word for word in RUN if not word.startswith("steps=")), "steps=48", f"run_dir={tmp_path / 'part'}"]
    part = train(composed(words), ALLOW)
    assert read_samples(part)[-1]["update"] == 3 and read_samples(part)[-1]["split"] == "eval"
    resume(str(part), steps=96, allow=ALLOW)
    assert (part / "samples.jsonl").read_bytes() == (run / "samples.jsonl").read_bytes()


def test_samples_are_part_of_what_damage_is_found_in(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    text = (copy / "samples.jsonl").read_text()
    (copy / "samples.jsonl").write_text(text.replace('"reward": 0', '"reward": 9', 1))
    with pytest.raises(DamageError, match=r"samples\.jsonl"):
        read_samples(copy)
    assert cli.main(["verify", str(copy)]) == 2
    assert cli.main(["verify", str(copy), "--accept"]) == 0


def test_what_waits_for_its_row_survives_an_end_in_between(tmp_path: Path) -> None:
    cfg = composed([*RUN, f"run_dir={tmp_path / 'run'}"])

    class Stops:
        def on_update_end(self, trainer: Any, metrics: Any) -> None:
            if trainer.updates == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(cfg, ALLOW, callbacks=[Stops])
    assert [row["update"] for row in read_samples(tmp_path / "run")][-1] == 2
    resume(str(tmp_path / "run"), allow=ALLOW)
    updates = [row["update"] for row in read_samples(tmp_path / "run") if row["split"] == "train"]
    assert updates == [u for u in range(1, 7) for _ in range(3)]


def test_tensorboard_shows_samples_as_text(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    found = events.Tensors("samples/eval/text_summary")
    assert [event.step for event in found] == [0, 32, 64, 96]
    text = found[0].tensor_proto.string_val[0].decode()
    assert text.startswith("| prompt | answer |") and text.count("\n") == 4


def test_none_are_written_of_control_or_where_nobody_wants_any(tmp_path: Path) -> None:
    words = [*(word for word in RUN if "samples" not in word), "samples_rows=0", f"run_dir={tmp_path / 'run'}"]
    folder = train(composed(words), ALLOW)
    assert not (folder / "samples.jsonl").exists()
    with pytest.raises(CheckpointError, match="samples_rows=0"):
        read_samples(folder)


def test_rows_of_a_replay_that_draws_others_are_shown(tmp_path: Path) -> None:
    words = [*RUN, "replay=uniform", "replay.capacity=64", "correction=tis", "agent.advantage=group"]
    words = [w for w in words if w not in ("correction=grpo", "rollout.staleness=1")]
    trainer = Job(composed([*words, f"run_dir={tmp_path}"]), ALLOW).make_trainer(None)  # type: ignore[arg-type]
    trainer.run()
    rows = [row for row in trainer.log.samples if row["split"] == "train"]
    assert len(rows) == 18 and any(row["advantage"] is not None for row in rows)


# ------------------------------------------------------------------------------------------------- showing them

EVIL = "\x1b[2J\x1b]0;owned\x07 \u202eabc\r\ud800 | <b>*x*</b>\nend"


def evil(folder: Path) -> Path:
    rows = [
        {"update": 2, "steps": 2, "split": "eval", "prompt_id": 7, "prompt": EVIL, "answer": EVIL, "reference": EVIL,
         "reward": 1.0, "rewards": {EVIL: 1.0}, "advantage": None, "truncated": True, "tokens": 3, "policy_version": 2}
    ]  # fmt: skip
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_control_characters_of_an_answer_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ([], ["--json"]):
        assert cli.main(["samples", str(evil(tmp_path)), *words]) == 0
        out = capsys.readouterr().out
        assert not set(out) & {"\x1b", "\x07", "\r", "\u202e", "\ud800"} and "owned" in out
    assert "\\x1b[2J" in plain_text(EVIL) and "\nend" in plain_text(EVIL)


def test_a_table_of_samples_holds_no_marks_of_its_own(tmp_path: Path) -> None:
    table = markdown(read_samples(evil(tmp_path)))
    assert table.count("\n") == 2 and "<b>" not in table and "\x1b" not in table and "&#92;x1b&#91;2J" in table
    assert [line.count("|") for line in table.splitlines()] == [9, 9, 9]


def test_a_long_answer_loses_its_middle() -> None:
    class Plain:
        tokenizer: Any = None

    env = Plain()
    env.tokenizer = Plain()
    env.tokenizer.decode = lambda ids, **options: "ab" * LONGEST  # type: ignore[attr-defined]
    text = SampleBook(env, 1, 0).spell([1])  # type: ignore[arg-type]
    assert len(text) < LONGEST + 60 and f"{LONGEST} characters left out" in text


def made(update: int, reward: float, prompt: int = 1, split: str = "eval") -> dict[str, Any]:
    return {"update": update, "reward": reward, "prompt_id": prompt, "split": split}


ROWS = [made(1, 0.0), made(1, 1.0, 2), made(2, 0.5, 1, "train"), made(3, 1.0), made(3, 0.0, 2)]


@pytest.mark.parametrize(
    ("options", "places"),
    [
        ({}, [3, 4]),
        ({"order": "best"}, [3, 1, 2, 4, 0]),
        ({"order": "worst", "count": 2}, [4, 0]),
        ({"prompt": 1}, [0, 2, 3]),
        ({"prompt": 1, "split": "eval", "order": "best"}, [3, 0]),
        ({"split": "train"}, [2]),
    ],
)
def test_samples_are_chosen(options: dict[str, Any], places: list[int]) -> None:
    assert select(ROWS, **options) == [ROWS[place] for place in places]


def test_random_samples_are_some_of_all() -> None:
    found = select(ROWS, "random", count=3, seed=1)
    assert len(found) == 3 and all(row in ROWS for row in found) and found == select(ROWS, "random", count=3, seed=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": 9}, "no conversation of prompt 9"),
        ({"order": "beste"}, "order='beste'"),
        ({"split": "test"}, "split='test'"),
    ],
)
def test_what_is_not_there_is_one_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        select(ROWS, **options)


def test_the_command_and_the_function_show_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["samples", str(run), "--split", "train", "-n", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("update 6 | train") == 2 and "advantage" in out and "reference" in out
    best = ur.samples(run, "best", count=None)
    assert len(best) == 30 and best[0]["reward"] == max(row["reward"] for row in best)
    one = best[0]["prompt_id"]
    assert {row["prompt_id"] for row in ur.Run(run).samples(prompt=one)} == {one}
    assert cli.main(["samples", str(run), "-n", "0"]) == 2
    assert "-n 0" in capsys.readouterr().err


def test_collections_say_nothing_of_samples_unless_asked(tmp_path: Path) -> None:
    job = Job(composed([*RUN, f"run_dir={tmp_path}"]), ALLOW)
    rows, metrics = job.make_rollout().collect(0)
    assert "samples" not in metrics and all(isinstance(value, float) for value in metrics.values())
    reward = rows["reward"].sum(-1)
    shares = [metrics[f"rollout/reward_p{p}"] for p in (10, 50, 90)]
    assert shares == pytest.approx(reward.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist())
    own = -rows["behavior_log_prob"][rows["mask"]].mean()
    assert metrics["rollout/entropy_estimate"] == pytest.approx(float(own), rel=1e-5)
