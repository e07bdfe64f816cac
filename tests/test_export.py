"""A run's model as a folder that plain transformers loads: same text, same end, dtype and files as it came."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from docs_cases import blocks, commands
from safetensors import safe_open
from safetensors.torch import load_file
from test_model_folder import model_folder, problems
from transformers import AutoModelForCausalLM, AutoTokenizer

import unified_rl as ur
from unified_rl.cli import main
from unified_rl.envs.language.tokenizer import train_bpe
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.training.run import train

TEMPLATE = (
    "{% for m in messages %}[{{m.role}}] {{m.content}}<|end|>{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)
SMALL = ["rollout.prompts=2", "rollout.group_size=4", "env.max_turn_tokens=4", "steps=16", "checkpoint_every=1",
         "keep_checkpoints=9", "eval_every=0", "eval_episodes=2", "progress=false", "correction=reinforce",
         "correction.advantage={baseline: none, shift: 0.5}"]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A bfloat16 model folder with a chat template and two ends, and runs of it: whole, and with adapters."""
    root = tmp_path_factory.mktemp("export")
    tokenizer = train_bpe(["What is 1+1? 2"], 270)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = TEMPLATE
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    torch.manual_seed(0)
    folder = model_folder(root / "m", tokenizer, [tokenizer.eos_token_id, end], tie_word_embeddings=True,
                          attention_dropout=0.25, initializer_range=0.3)  # fmt: skip
    whole = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        whole.lm_head.weight[end] = 2.5 * whole.lm_head.weight[end]  # often, and soon
    generation = (root / "m" / "generation_config.json").read_text()
    whole.to(torch.bfloat16).save_pretrained(folder)
    (root / "m" / "generation_config.json").write_text(generation)
    base = ["env=jsonl", f"env.path={problems(root / 'a.jsonl')}", "policy=causal_lm", f"policy.path={folder}"]
    runs = {}
    for name, more in (("whole", ["agent.lr=1e-2"]), ("lora", ["policy.lora.r=4", "agent.lr=3e-1"])):
        cfg = ur.compose([*base, *SMALL, *more, f"run_dir={root / name}"])
        runs[name] = str(train(cfg))
    return {"folder": folder, "end": end, "root": root, **runs}


def greedy(policy: CausalLM, text: str, count: int = 24) -> list[int]:
    ids = policy.tokenizer(text)["input_ids"]
    return policy.generate([ids], max_new_tokens=count, greedy=True).rows()[0]


def theirs(folder: Path, text: str, count: int = 24) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(text, return_tensors="pt")
    out: list[int] = model.generate(**ids, do_sample=False, max_new_tokens=count)[
        0, ids["input_ids"].shape[1] :
    ].tolist()
    return out


QUESTIONS = ["What is 1+1?", "What is 7+1?", "12", "is", "?", "a b c"]


def test_plain_transformers_says_the_same_and_stops_at_the_same_token(made: dict[str, Any], tmp_path: Path) -> None:
    folder = ur.export(made["whole"], tmp_path / "out", dtype="float32")
    policy = ur.load_policy(made["whole"])
    answers = [greedy(policy, text) for text in QUESTIONS]
    assert [theirs(folder, text) for text in QUESTIONS] == answers
    assert made["end"] in {answer[-1] for answer in answers if len(answer) < 24}, "some end by the model's second id"
    start = [greedy(CausalLM(policy.tokenizer, 64, path=made["folder"]), text) for text in QUESTIONS]
    assert start != answers, "the run changed what it says"


def test_a_folder_has_the_dtype_the_configuration_and_the_files_that_it_came_with(
    made: dict[str, Any], tmp_path: Path
) -> None:
    assert main(["export", made["whole"], str(tmp_path / "out")]) == 0
    source, out = Path(made["folder"]), tmp_path / "out"
    first, last = json.loads((source / "config.json").read_text()), json.loads((out / "config.json").read_text())
    assert last == first and last["dtype"] == "bfloat16" and last["attention_dropout"] == 0.25
    weights, before = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")
    assert weights.keys() == before.keys() and "lm_head.weight" not in weights, "tied weights once"
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    policy = ur.load_policy(made["whole"])
    for name, weight in policy.model.state_dict().items():
        if name in weights:
            assert torch.equal(weights[name], weight.to(torch.bfloat16)), name
    assert any(not torch.equal(weights[name], before[name]) for name in weights)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((out / "generation_config.json").read_text()) == json.loads(
        (source / "generation_config.json").read_text()
    )
    with safe_open(out / "model.safetensors", "pt") as opened:
        assert opened.metadata()["format"] == "pt"  # without it transformers refuses the file
    again = CausalLM(policy.tokenizer, 64, path=str(out))
    assert again.tokenizer.chat_template == TEMPLATE and again.end_ids == policy.end_ids
    assert not list(tmp_path.glob(".writing*"))


@pytest.mark.parametrize("name", ["whole", "lora"])
def test_an_export_needs_the_checkpoint_and_the_model_folder_alone(
    made: dict[str, Any], tmp_path: Path, name: str
) -> None:
    data, away = made["root"] / "a.jsonl", made["root"] / "away.jsonl"
    before = ur.export(made[name], tmp_path / "before")
    data.rename(away)
    try:
        after = ur.export(made[name], tmp_path / "after")
    finally:
        away.rename(data)
    assert {f.name for f in before.iterdir()} == {f.name for f in after.iterdir()}
    assert all((after / f.name).read_bytes() == f.read_bytes() for f in before.iterdir())
    policy = ur.load_policy(made[name])
    merged = {"merge": True} if name == "lora" else {}
    whole = ur.export(made[name], tmp_path / "whole", dtype="float32", **merged)
    assert [theirs(whole, text) for text in QUESTIONS] == [greedy(policy, text) for text in QUESTIONS]


def test_an_earlier_checkpoint_is_another_model(made: dict[str, Any], tmp_path: Path) -> None:
    first = load_file(ur.export(made["whole"], tmp_path / "1", checkpoint=1) / "model.safetensors")
    last = load_file(ur.Run(made["whole"]).export(tmp_path / "2") / "model.safetensors")
    assert any(not torch.equal(first[name], last[name]) for name in first)


def test_adapters_are_exported_alone_or_merged(made: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    alone = ur.export(made["lora"], tmp_path / "adapter")
    assert {f.name for f in alone.glob("*.safetensors")} == {"adapter_model.safetensors"}
    assert not (alone / "config.json").exists() and (alone / "chat_template.jinja").exists()
    assert {w.dtype for w in load_file(alone / "adapter_model.safetensors").values()} == {torch.float32}
    half = load_file(ur.export(made["lora"], tmp_path / "half", dtype="bfloat16") / "adapter_model.safetensors")
    assert {w.dtype for w in half.values()} == {torch.bfloat16}
    policy = ur.load_policy(made["lora"])
    model = peft.AutoPeftModelForCausalLM.from_pretrained(alone, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(alone)
    merged = ur.export(made["lora"], tmp_path / "whole", merge=True, dtype="float32")
    start = CausalLM(policy.tokenizer, 64, path=made["folder"])
    for text in QUESTIONS:
        ids = tokenizer(text, return_tensors="pt")
        out = model.generate(**ids, do_sample=False, max_new_tokens=24)[0, ids["input_ids"].shape[1] :].tolist()
        assert out == greedy(policy, text) == theirs(merged, text)
    assert any(greedy(start, text) != greedy(policy, text) for text in QUESTIONS)
    stored = load_file(ur.export(made["lora"], tmp_path / "bf16", merge=True) / "model.safetensors")
    assert {w.dtype for w in stored.values()} == {torch.bfloat16} and "lm_head.weight" not in stored


def test_the_end_that_the_run_stops_at_is_in_the_generation_configuration(tmp_path: Path) -> None:
    tokenizer = train_bpe(["What is 1+1? 2"], 270)
    folder = model_folder(tmp_path / "m", tokenizer, [7])
    CausalLM(tokenizer, 64, path=folder).save(str(tmp_path / "out"))
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [7, tokenizer.eos_token_id] and generation["temperature"] == 0.6


def test_a_folder_that_cannot_be_written_leaves_nothing(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(policy: CausalLM, folder: str, **options: Any) -> None:
        (Path(folder) / "half.safetensors").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CausalLM, "save", full)
    with pytest.raises(ur.CheckpointError, match=r"cannot be written: .*No space left"):
        ur.export(made["whole"], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_refused_before_anything_is_written(
    made: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    robot = str(train(ur.compose(["env=two_route", "steps=256", "rollout.horizon=16", "rollout.num_envs=16",
                                  "eval_episodes=1", "progress=false", f"run_dir={tmp_path / 'robot'}"])))  # fmt: skip
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    capsys.readouterr()
    new = str(tmp_path / "new")
    for words, message in (
        ([robot, new], "load it in Python with unified_rl.load_policy("),
        ([made["whole"], str(tmp_path / "full")], "exists and is not empty"),
        ([made["whole"], new, "--merge"], "no adapter to merge; leave --merge out"),
        ([made["whole"], new, "--dtype", "bf16"], "did you mean 'bfloat16'?"),
        ([made["whole"], new, "--checkpoint", "77"], "has no checkpoint 77"),
        ([str(tmp_path / "none"), new], "none"),
        ([made["whole"]], "unified-rl export RUN FOLDER"),
    ):
        assert main(["export", *words]) == 2
        line = capsys.readouterr().err.strip()
        assert message in line and "\n" not in line
    for path in (made["whole"], f"{made['whole']}/checkpoints/step_000000000001"):
        assert main(["train", "env=chain_mod", f"policy.path={path}", f"run_dir={tmp_path / 'again'}"]) == 2
        assert f"unified-rl export {made['whole']} FOLDER" in capsys.readouterr().err
    assert not Path(new).exists() and (tmp_path / "full" / "mine.txt").read_text() == "mine"


SECTIONS = ("The model folder", "Adapters", "Export")


def test_the_commands_of_the_guide_run_in_their_order(
    made: dict[str, Any], tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    page = [b for b in blocks(source / "docs" / "reasoner.md") if b.language == "bash" and b.section in SECTIONS]
    found = [words for block in page for words in commands(block.text)]
    assert [words[0] for words in found] == ["train", "train", "export", "train", "export", "export"]
    monkeypatch.chdir(tmp_path)
    given = {"train.jsonl": problems(tmp_path / "train.jsonl"), "/path/to/model": made["folder"]}
    for number, words in enumerate(found):
        pairs = [word.rpartition("=") for word in words]
        words = [f"{key}{eq}{given.get(value, value)}" for key, eq, value in pairs]
        small = [*SMALL, f"name=run{number}"] if words[0] == "train" else []
        assert main([*words, *small]) == 0, words
        given |= {"runs/NAME": f"runs/run{number}"} if words[0] == "train" else {}
    for name in ("my_adapter", "my_model"):
        assert (tmp_path / name / "adapter_model.safetensors").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "my_merged_model").dtype == torch.float32
