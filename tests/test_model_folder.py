"""A model folder is the source of truth: tokenizer, end ids, generation configuration, and nothing random in scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from docs_cases import blocks, commands
from tensordict import TensorDict
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from unified_rl.agents.behavior_cloning import BehaviorCloning
from unified_rl.config import compose, resolve_defaults
from unified_rl.envs.language import ChainMod, JsonlProblems, character_tokenizer
from unified_rl.envs.language.tokenizer import train_bpe
from unified_rl.errors import CheckpointError, ConfigError
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.rollout import LanguageRollout
from unified_rl.training.assemble import assemble
from unified_rl.training.run import Job, train

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY = {"model_type": "llama", **SHAPE, "intermediate_size": 64}


def model_folder(path: Path, tokenizer: Any, ends: list[int], **config: Any) -> str:
    """A tiny Llama, its tokenizer and a generation configuration with ``ends``."""
    shape = {**TINY, "vocab_size": len(tokenizer), "max_position_embeddings": 1024, **config}
    del shape["model_type"]
    model = LlamaForCausalLM(LlamaConfig(**shape, eos_token_id=tokenizer.eos_token_id))
    model.generation_config = GenerationConfig(eos_token_id=ends, temperature=0.6, do_sample=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def rows(vocabulary: int, width: int = 24) -> TensorDict:
    tokens = torch.randint(4, vocabulary, (6, width), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(6, width, dtype=torch.bool)
    mask[:, :3] = False
    return TensorDict({"tokens": tokens, "mask": mask}, [6])


def problems(path: Path, count: int = 40) -> str:
    path.write_text(
        "".join(json.dumps({"question": f"What is {i}+1?", "answer": str(i + 1)}) + "\n" for i in range(count))
    )
    return str(path)


def test_every_end_id_of_the_folder_ends_an_answer_and_is_no_part_of_its_text(tmp_path: Path) -> None:
    tokenizer = train_bpe(["What is 1+1? 2"], 270)
    extra = tokenizer("!", add_special_tokens=False)["input_ids"][0]
    folder = model_folder(tmp_path / "m", tokenizer, [tokenizer.eos_token_id, extra, 10**6])
    env = JsonlProblems(problems(tmp_path / "a.jsonl"), tokenizer=folder, held_out=0.0)
    assert env.stop_ids == sorted({tokenizer.eos_token_id, extra})
    turn = [*env.codec.encode(["#### 1"])[0], extra]
    problem = {"split": "train", "reference": "1"}
    assert float(env.respond([problem], [[turn]], torch.tensor([True])).reward) == 1.0
    plain = JsonlProblems(problems(tmp_path / "a.jsonl"), tokenizer=_without(tmp_path, tokenizer), held_out=0.0)
    policy = CausalLM(**plain.policy_inputs(), path=folder)
    assert plain.stop_ids == [tokenizer.eos_token_id] and policy.end_ids == (tokenizer.eos_token_id, extra)
    with torch.no_grad():
        policy.model.lm_head.weight[extra] = 50 * policy.model.lm_head.weight.std()
    streams = (torch.Generator().manual_seed(0), torch.Generator().manual_seed(1))
    got, _ = LanguageRollout(plain, policy, 1.0, *streams, prompts=4, group_size=4).collect(0)
    ended = (got["tokens"] == extra) & got["mask"]
    assert bool(ended.any()) and bool(got["terminated"][ended.any(-1)].all())  # the model's own id ends the row


@pytest.mark.parametrize("ends", ["abc", [1e9, -4], -4, [True], {"a": 1}])
def test_an_end_id_that_is_no_token_id_is_refused_by_the_name_of_its_file(tmp_path: Path, ends: Any) -> None:
    tokenizer = train_bpe(["What is 1+1? 2"], 270)
    folder = model_folder(tmp_path / "m", tokenizer, [tokenizer.eos_token_id])
    file = tmp_path / "m" / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": ends}))
    with pytest.raises(CheckpointError, match=r"^\S*generation_config\.json: eos_token_id holds .* no token id$"):
        JsonlProblems(problems(tmp_path / "a.jsonl"), tokenizer=folder, held_out=0.0)


def _without(tmp_path: Path, tokenizer: Any) -> str:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def test_a_supervised_answer_ends_as_the_chat_template_ends_it(tmp_path: Path) -> None:
    tokenizer = train_bpe(["What is 1+1? 2"], 270)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}[{{m.role}}] {{m.content}}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    folder = model_folder(tmp_path / "m", tokenizer, [tokenizer.eos_token_id, end])
    env = JsonlProblems(problems(tmp_path / "a.jsonl"), tokenizer=folder, chat=True, held_out=0.0)
    row = env.demonstrations(1, torch.Generator().manual_seed(0))[0]
    assert row["tokens"][row["mask"]].tolist()[-1] == end
    assert env.solve(env.problems(1, torch.Generator()))[0][-1] == end


def test_a_tokenizer_that_is_not_the_models_is_refused_also_at_equal_size(tmp_path: Path) -> None:
    letters = "".join(map(chr, range(32, 127)))
    own = character_tokenizer(letters)
    folder = model_folder(tmp_path / "m", own, [own.eos_token_id])
    CausalLM(character_tokenizer(letters), 64, path=folder)  # an equal one, made anew
    other = character_tokenizer(letters[::-1])
    assert len(other) == len(own)
    with pytest.raises(ConfigError, match=r"is not that of the model folder .*set env\.tokenizer="):
        CausalLM(other, 64, path=folder)
    begun = character_tokenizer(letters)
    begun.eos_token = "<bos>"
    with pytest.raises(ConfigError, match="end-of-text id"):
        CausalLM(begun, 64, path=folder)


def test_a_vocabulary_below_the_tokenizers_says_how_to_save_the_model_again(tmp_path: Path) -> None:
    own = character_tokenizer("".join(map(chr, range(32, 127))))
    folder = model_folder(tmp_path / "m", own, [own.eos_token_id], vocab_size=len(own) - 1)
    with pytest.raises(ConfigError, match=rf"model\.resize_token_embeddings\({len(own)}\)"):
        CausalLM(own, 64, path=folder)


def test_a_run_takes_the_tokenizer_of_the_model_folder(tmp_path: Path) -> None:
    tokenizer = train_bpe(["What is 1+1? 2"], 270)
    folder = model_folder(tmp_path / "m", tokenizer, [tokenizer.eos_token_id])
    data = problems(tmp_path / "a.jsonl")
    for option in ("causal_lm", "causal_lm_path"):
        words = ["env=jsonl", f"env.path={data}", f"policy={option}", f"policy.path={folder}"]
        job = Job(resolve_defaults(compose(words)))
        assert job.env.tokenizer.name_or_path == folder
        assert job.policy.model.config.vocab_size == len(job.env.tokenizer)
        assert job.cfg["policy"]["config"] is None


def test_path_and_config_are_two_ways_of_one_option() -> None:
    def policy_of(*words: str) -> dict[str, Any]:
        return compose(["policy=causal_lm", *words])["policy"]

    assert policy_of("policy.path=x") == {"_target_": "unified_rl.policies.causal_lm.CausalLM", "path": "x"}
    assert policy_of("policy.config.hidden_size=64")["config"]["hidden_size"] == 64
    assert "config" in policy_of("policy.path=null")
    fresh = compose(["policy=causal_lm_path", "policy.config={model_type: llama, hidden_size: 64}"])["policy"]
    assert fresh["config"]["hidden_size"] == 64 and "path" not in fresh
    assert "config" not in compose({"policy": "causal_lm_tiny", "policy.path": "x"})["policy"]
    for config in ("policy.config.hidden_size=64", "policy.config={model_type: llama}"):
        with pytest.raises(ConfigError, match=r"^policy\.path and policy\.config are two ways .*give one of them$"):
            policy_of("policy.path=x", config)


def test_the_learning_rate_of_a_model_folder_is_that_of_a_pretrained_model() -> None:
    def rates(*words: str) -> tuple[float | None, float | None, list[float | None]]:
        cfg = resolve_defaults(compose([*words]))
        stage = cfg["warm_start"] or {}
        return cfg["agent"]["lr"], stage.get("lr"), [one.get("lr") for one in stage.get("stages", [])]

    folder = "policy.path=x"
    assert rates() == (3e-4, None, []) and rates(folder) == (1e-6, None, [])
    assert rates(folder, "agent.lr=0.1") == (0.1, None, [])
    assert rates(folder, "agent=sft") == (1e-5, None, []) and rates("agent=sft") == (1e-3, None, [])
    assert rates(folder, "policy.lora.r=4") == (1e-5, None, [])
    assert rates(folder, "policy.lora.r=4", "agent=sft")[0] == 1e-4
    warm = "warm_start=demonstrations"
    assert rates(warm) == (3e-4, 1e-3, [3e-3]) and rates(folder, warm) == (1e-6, 1e-5, [None])
    assert rates(folder, warm, "warm_start.lr=0.5") == (1e-6, 0.5, [None])
    assert rates(folder, warm, "warm_start.stages.0.lr=0.5")[2] == [0.5]
    assert rates(folder, warm, "warm_start.stages=[{updates: 1, lr: 0.5}]")[2] == [0.5]


def test_a_policy_object_of_a_model_folder_brings_its_learning_rate_along(tmp_path: Path) -> None:
    env = ChainMod()
    CausalLM(**env.policy_inputs(), config=TINY).save(str(tmp_path))
    policy = CausalLM(**env.policy_inputs(), path=str(tmp_path))
    assert assemble(env, policy, steps=8).config["agent"]["lr"] == 1e-6
    assert assemble(env, policy, steps=8, **{"agent.lr": 0.1}).config["agent"]["lr"] == 0.1
    assert assemble(env, CausalLM(**env.policy_inputs(), config=TINY), steps=8).config["agent"]["lr"] == 3e-4


@pytest.mark.parametrize("backend", ["own", "hf"])
def test_ids_without_a_token_are_never_sampled_and_take_no_probability(backend: str) -> None:
    env = ChainMod()
    policy = CausalLM(**env.policy_inputs(), config={**TINY, "vocab_size": 64}, seed=1)
    size = len(env.tokenizer)
    with torch.no_grad():  # would be sampled nearly always
        policy.model.get_output_embeddings().weight[size:] = 5 * policy.model.get_output_embeddings().weight[5]
    stream = torch.Generator().manual_seed(0)
    out = policy.generate(
        [[5, 6, 7]], max_new_tokens=8, generator=stream, samples_per_prompt=32, stop_ids=[], backend=backend
    )
    assert int(out.tokens.max()) < size
    tokens = torch.cat([torch.tensor([[5, 6, 7]]).expand(32, 3), out.tokens], 1)
    mask = torch.arange(11).expand(32, 11) >= 3
    batch = TensorDict({"tokens": tokens, "mask": mask}, [32])
    scored = policy.log_prob(batch).log_prob[:, 3:]
    torch.testing.assert_close(scored, out.log_prob, atol=1e-4, rtol=0)
    logits = policy.model(tokens).logits[:, 2:-1, :size]
    truth = logits.log_softmax(-1).gather(-1, out.tokens[..., None])[..., 0]
    torch.testing.assert_close(scored, truth, atol=1e-4, rtol=0)
    torch.testing.assert_close(policy.nll(batch)[:, 3:], -truth, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "config",
    [
        {**SHAPE, "model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32, "layerdrop": 0.5, "dropout": 0.5},
        {**TINY, "model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1, "router_jitter_noise": 0.5},
    ],
    ids=["opt", "mixtral"],
)  # fmt: skip
def test_nothing_random_enters_a_score_in_either_mode(config: dict[str, Any]) -> None:
    env = ChainMod()
    policy = CausalLM(**env.policy_inputs(), config=config, seed=1)
    batch = rows(len(env.tokenizer), 12)
    policy.train()
    scores = [policy.log_prob(batch).log_prob for _ in range(3)]
    scores.append(policy.eval().log_prob(batch).log_prob)
    for score in scores[1:]:
        assert torch.equal(score, scores[0])


@pytest.mark.parametrize("fresh", [True, False])
def test_checkpointed_layers_are_not_kept_whatever_came_before(tmp_path: Path, fresh: bool) -> None:
    inputs = {**ChainMod().policy_inputs(), "max_length": 64}
    if not fresh:
        CausalLM(**inputs, config=TINY).save(str(tmp_path))
    how: dict[str, Any] = {"config": TINY} if fresh else {"path": str(tmp_path)}
    batch = rows(len(inputs["tokenizer"]), 64)

    def kept(**options: Any) -> tuple[int, torch.Tensor]:
        policy = CausalLM(**inputs, **how, share_prompts=False, **options)
        policy.generate([[5, 6]], max_new_tokens=2, generator=torch.Generator().manual_seed(0))
        size = 0

        def pack(x: torch.Tensor) -> torch.Tensor:
            nonlocal size
            size += x.numel() * x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            total = policy.log_prob(batch).log_prob.sum()
        total.backward()
        return size, policy.model.get_input_embeddings().weight.grad

    (plain, exact), (less, got) = kept(), kept(gradient_checkpointing=True)
    assert less < plain / 2
    torch.testing.assert_close(got, exact, atol=1e-5, rtol=1e-5)


def test_a_saved_folder_keeps_the_generation_configuration_that_it_came_with(tmp_path: Path) -> None:
    tokenizer = train_bpe(["What is 1+1? 2"], 270)
    folder = model_folder(tmp_path / "m", tokenizer, [tokenizer.eos_token_id, 7])
    policy = CausalLM(tokenizer, 64, path=folder)
    assert policy.model.generation_config.temperature in (None, 1.0)  # neutral while it trains
    policy.save(str(tmp_path / "saved"))
    kept = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert kept.eos_token_id == [tokenizer.eos_token_id, 7] and kept.temperature == 0.6
    CausalLM(tokenizer, 64, config=TINY).save(str(tmp_path / "fresh"))
    assert GenerationConfig.from_pretrained(tmp_path / "fresh").eos_token_id == tokenizer.eos_token_id


def test_half_precision_weights_are_not_trained() -> None:
    policy = CausalLM(**ChainMod().policy_inputs(), config=TINY, dtype="bfloat16")
    with pytest.raises(ConfigError, match=r"policy\.dtype=float32.*policy\.autocast=true"):
        BehaviorCloning(policy=policy, generator=torch.Generator(), rows=4, lr=1e-5)


def test_the_command_of_the_readme_for_a_model_of_your_own_trains(tmp_path: Path, source: Path) -> None:
    page = [block for block in blocks(source / "README.md") if block.language == "bash"]
    found = [words for block in page for words in commands(block.text)]
    (command,) = [words for words in found if any("policy.path=" in word for word in words)]
    tokenizer = train_bpe(["What is 1+1? 2"], 270)
    folder = model_folder(tmp_path / "m", tokenizer, [tokenizer.eos_token_id])
    given = {"env.path": problems(tmp_path / "a.jsonl"), "policy.path": folder, "device": "cpu"}
    given |= {"rollout.prompts": "2", "rollout.group_size": "2"}
    words = [f"{key}={given.get(key, value)}" for key, value in (word.split("=", 1) for word in command[1:])]
    small = ["env.max_turn_tokens=4", "steps=4", "eval_episodes=2", "progress=false", f"run_dir={tmp_path / 'run'}"]
    train(resolve_defaults(compose([*words, *small])))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"rollout/reward", "eval/accuracy"} <= {key for row in rows for key in row}
