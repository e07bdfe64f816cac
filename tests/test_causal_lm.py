"""The language-model policy: re-scoring, chunking, loading, and the token critic."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tensordict import TensorDict
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from unified_rl.errors import CheckpointError, ConfigError, RecordError
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.policies.shared_prompt import find_shared
from unified_rl.policies.token_critic import TokenCritic

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}


def letter_tokenizer(pad: bool = True) -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<bos>", *"0123456789abcdef"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    extra = {"pad_token": "<pad>"} if pad else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", **extra)


def make(**kwargs) -> CausalLM:
    return CausalLM(letter_tokenizer(), 40, **({"config": CONFIG} | kwargs))


def sampled_record(policy: CausalLM, seed: int = 0, width: int = 30) -> TensorDict:
    """Rows of ragged prompts and ragged answers, as a language rollout lays them out."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(3, 19, (n,), generator=generator) for n in (3, 7, 1, 5)]
    out = policy.generate(prompts, max_new_tokens=15, stop_ids=[4, 9], samples_per_prompt=3, generator=generator)
    rows = len(out.tokens)
    record = {
        "tokens": torch.full((rows, width), policy.pad_id),
        "token_mask": torch.zeros(rows, width, dtype=torch.bool),
        "mask": torch.zeros(rows, width, dtype=torch.bool),
        "behavior_log_prob": torch.zeros(rows, width),
    }
    for i, ids in enumerate(out.rows()):
        start = len(prompts[i // 3])
        end = start + len(ids)
        record["tokens"][i, :end] = torch.tensor([*prompts[i // 3].tolist(), *ids])
        record["token_mask"][i, :end] = True
        record["mask"][i, start:end] = True
        record["behavior_log_prob"][i, start:end] = out.log_prob[i, : end - start]
    return TensorDict(record, batch_size=[rows])


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("transform", [{}, {"temperature": 0.7, "top_p": 0.8}, {"temperature": 0.7, "top_k": 5}])
def test_rescoring_a_fresh_sample_returns_its_log_prob(model_type, transform):
    config = CONFIG | {"model_type": model_type}
    if model_type == "gpt_neox":
        del config["num_key_value_heads"]
    policy = make(config=config, **transform)
    record = sampled_record(policy)
    scored = policy.log_prob(record)
    assert scored.exact and torch.equal(scored.mask, record["mask"])
    torch.testing.assert_close(scored.log_prob, record["behavior_log_prob"], atol=1e-4, rtol=0)
    assert (scored.log_prob[record["mask"]] < 0).any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("autocast", [False, True])
def test_a_policy_on_a_gpu_rescores_its_own_samples(autocast):
    policy = make(temperature=0.8, autocast=autocast).to("cuda")
    record = sampled_record(policy).to("cuda")  # drawn with a generator of the CPU
    scored = policy.log_prob(record)
    torch.testing.assert_close(scored.log_prob, record["behavior_log_prob"], atol=0.2 if autocast else 1e-3, rtol=0)
    policy.nll(record).sum().backward()


def test_padding_and_text_to_the_right_change_nothing():
    policy = make()
    record = sampled_record(policy)
    short = policy.log_prob(record).log_prob
    longer = TensorDict(
        {k: torch.nn.functional.pad(v, (0, 9), value=0) for k, v in record.items()}, batch_size=record.batch_size
    )
    longer["tokens"][:, 30:] = 7
    longer["tokens"][~longer["token_mask"]] = 11
    torch.testing.assert_close(policy.log_prob(longer).log_prob[:, :30], short, atol=1e-6, rtol=0)
    one = record[4:5]
    torch.testing.assert_close(policy.log_prob(one).log_prob, short[4:5], atol=1e-5, rtol=0)


@pytest.mark.parametrize("transform", [{}, {"temperature": 0.6, "top_k": 7, "top_p": 0.9}])
def test_chunked_log_probs_and_gradients_equal_those_of_the_whole(transform):
    whole, chunked = make(**transform), make(logit_chunk=7, gradient_checkpointing=True, **transform)
    record = sampled_record(whole)
    weight = torch.randn(record["mask"].shape, generator=torch.Generator().manual_seed(1))
    gradients = []
    for policy in (whole, chunked):
        policy.train()
        scored, entropy = policy.log_prob_and_entropy(record)
        ((scored.log_prob + 0.3 * entropy) * weight)[record["mask"]].sum().backward()
        gradients.append([p.grad for p in policy.parameters()] + [scored.log_prob.detach(), entropy.detach()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_only_a_chunk_of_logits_is_held():
    policy = make(logit_chunk=5)
    record = sampled_record(policy)
    sizes = []
    policy.model.get_output_embeddings().register_forward_hook(lambda m, i, o: sizes.append(len(o)))
    policy.log_prob(record).log_prob.sum().backward()
    assert max(sizes) == 5 and sum(sizes) == 2 * int(record["mask"].sum())


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2"])
def test_prompts_encoded_once_give_the_same_log_probs_and_gradients(model_type):
    config = CONFIG | {"model_type": model_type}
    if model_type == "gpt2":
        config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2}
    shared, plain = make(config=config), make(config=config, share_prompts=False)
    long = TensorDict(
        {
            "tokens": torch.randint(3, 19, (3, 12), generator=torch.Generator().manual_seed(0)).repeat_interleave(4, 0),
            "mask": torch.zeros(12, 12, dtype=torch.bool),
        },
        batch_size=[12],
    )
    for row in range(12):  # prompts of 8, 6 and 7 tokens, answers of up to 5 tokens, one row without any
        start = (8, 6, 7)[row // 4]
        long["mask"][row, start : start + row % 6] = True
        long["tokens"][row, start:] = torch.randint(3, 19, (12 - start,), generator=torch.Generator().manual_seed(row))
    assert find_shared(long["tokens"], long["mask"], 11) is not None
    gradients = []
    for policy in (shared, plain):
        out = policy.log_prob(long).log_prob
        (out * torch.arange(12)).sum().backward()
        gradients.append([out.detach()] + [p.grad for p in policy.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_nll_and_entropy_match_the_textbook_and_ignore_the_transform():
    policy = make(temperature=0.5, top_k=3)
    plain = make()
    record = sampled_record(plain)
    with torch.no_grad():
        log_probs = policy.model(record["tokens"]).logits.log_softmax(-1)[:, :-1]
    expected = -log_probs.gather(-1, record["tokens"][:, 1:, None])[..., 0]
    mask = record["mask"]
    torch.testing.assert_close(policy.nll(record)[:, 1:][mask[:, 1:]], expected[mask[:, 1:]], atol=1e-4, rtol=0)
    assert (policy.nll(record)[~mask] == 0).all()
    entropy = plain.log_prob_and_entropy(record)[1]
    full = -(log_probs.exp() * log_probs).sum(-1)
    torch.testing.assert_close(entropy[:, 1:][mask[:, 1:]], full[mask[:, 1:]], atol=1e-4, rtol=0)


def test_a_token_outside_the_support_scores_minus_infinity():
    policy = make(top_k=1)
    record = sampled_record(make())
    log_prob = policy.log_prob(record).log_prob[record["mask"]]
    assert torch.isneginf(log_prob).any() and not torch.isnan(log_prob).any()


def test_no_unit_gives_zero_with_a_graph():
    policy = make()
    record = sampled_record(policy)
    record["mask"] = torch.zeros_like(record["mask"])
    out = policy.log_prob(record).log_prob
    out.sum().backward()
    assert (out == 0).all()


def test_records_that_cannot_be_scored_are_refused():
    policy = make()
    record = sampled_record(policy)
    with pytest.raises(RecordError, match="lacks 'mask'"):
        policy.log_prob(record.exclude("mask"))
    record["mask"][0, 0] = True
    with pytest.raises(RecordError, match="column 0"):
        policy.log_prob(record)


def test_forward_samples_a_turn_for_collectors():
    policy = make(max_new_tokens=4)
    record = sampled_record(policy)
    out = policy(TensorDict({"tokens": record["tokens"], "token_mask": record["token_mask"]}, batch_size=[12]))
    assert out["action"].shape == (12, 4) and out["behavior_log_prob"].shape == (12, 4)
    assert (out["behavior_log_prob"][~out["action_mask"]] == 0).all()
    again = make(max_new_tokens=4)
    assert torch.equal(again(record.select("tokens", "token_mask"))["action"], out["action"])  # its own seeded stream


def test_weights_follow_the_seed_and_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    first, same, other = make(seed=1), make(seed=1), make(seed=2)
    assert torch.equal(before, torch.random.get_rng_state())
    pairs = list(zip(first.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs) and not all(torch.equal(a, c) for a, _, c in pairs)
    weight = first.model.model.layers[0].mlp.up_proj.weight
    assert abs(float(weight.detach().std()) - 32**-0.5) < 0.02


def test_a_copy_is_independent_and_scores_the_same():
    policy = make()
    record = sampled_record(policy)
    twin = copy.deepcopy(policy)
    torch.testing.assert_close(twin.log_prob(record).log_prob, policy.log_prob(record).log_prob)
    with torch.no_grad():
        next(policy.parameters()).add_(1.0)
    assert not torch.allclose(twin.log_prob(record).log_prob, policy.log_prob(record).log_prob)


def test_training_mode_has_no_dropout():
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2}  # gpt2's default rate is 0.1
    policy = make(config=config)
    record = sampled_record(policy)
    policy.train()
    torch.testing.assert_close(policy.log_prob(record).log_prob, record["behavior_log_prob"], atol=1e-4, rtol=0)


def test_a_saved_folder_loads_to_the_same_policy(tmp_path):
    policy = make()
    policy.save(str(tmp_path / "model"))
    record = sampled_record(policy)
    loaded = CausalLM(PreTrainedTokenizerFast.from_pretrained(tmp_path / "model"), 40, path=str(tmp_path / "model"))
    torch.testing.assert_close(loaded.log_prob(record).log_prob, policy.log_prob(record).log_prob)


def test_hub_names_are_refused_and_missing_folders_named(tmp_path):
    with pytest.raises(ConfigError, match="allow_hub"):
        make(config=None, path="someone/some-model")
    with pytest.raises(CheckpointError, match="does not exist"):
        make(config=None, path=str(tmp_path / "nowhere"))


def test_damaged_folders_give_one_clear_error(tmp_path):
    folder = tmp_path / "model"
    policy = make()
    policy.save(str(folder))
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        make(config=None, path=str(folder))
    weights.unlink()
    with pytest.raises(CheckpointError, match="safetensors weights"):
        make(config=None, path=str(folder))
    state = policy.model.state_dict()
    state.pop("model.norm.weight")
    policy.model.save_pretrained(folder, state_dict=state)
    with pytest.raises(CheckpointError, match="lacks 1 weights"):
        make(config=None, path=str(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": "unheard_of", "auto_map": {"AutoConfig": "x.Y"}}))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        make(config=None, path=str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="has no config"):
        make(config=None, path=str(folder))


def test_a_tokenizer_without_a_pad_token_pads_with_eos():
    policy = CausalLM(letter_tokenizer(pad=False), 40, config=CONFIG)
    assert policy.pad_id == policy.eos_id == 1
    record = sampled_record(policy)
    torch.testing.assert_close(policy.log_prob(record).log_prob, record["behavior_log_prob"], atol=1e-4, rtol=0)
    policy.nll(record).sum().backward()
    assert policy.model.get_input_embeddings().padding_idx is None  # eos keeps its gradient


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"config": CONFIG, "path": "x"}, "exactly one"),
        ({"config": None}, "exactly one"),
        ({"config": {"hidden_size": 32}}, "model_type"),
        ({"config": {"model_type": "lama"}}, "lama"),
        ({"config": CONFIG | {"hiden_size": 3}}, "hiden_size"),
        ({"config": CONFIG | {"vocab_size": 4}}, "vocabulary"),
        ({"config": CONFIG | {"max_position_embeddings": 4}}, "positions"),
        ({"dtype": "float31"}, "float31"),
    ],
)
def test_bad_settings_are_refused(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        make(**kwargs)


def test_autocast_scores_close_to_float32():
    policy = make(autocast=True)
    record = sampled_record(policy)
    full = make()
    out = policy.log_prob(record).log_prob
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, full.log_prob(record).log_prob, atol=0.15, rtol=0)
    torch.testing.assert_close(out, record["behavior_log_prob"], atol=0.15, rtol=0)


def test_token_values_read_only_what_precedes_the_token():
    critic = TokenCritic(letter_tokenizer(), 40, config=CONFIG)
    torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(0))
    record = sampled_record(make())
    value = critic.values(record)
    assert (
        value.shape == record["mask"].shape and (value[~record["token_mask"]] == 0).all() and (value[:, 0] == 0).all()
    )
    changed = record.clone()
    changed["tokens"][:, 3:] = 5
    other = critic.values(changed)
    torch.testing.assert_close(other[:, :4], value[:, :4])
    assert not torch.allclose(other[:, 4:6], value[:, 4:6])
    assert torch.equal(critic(record)["value"], value)


@pytest.mark.parametrize("detach", [True, False])
def test_a_shared_trunk_gets_gradients_only_where_asked(detach):
    policy = make()
    critic = TokenCritic(policy.tokenizer, 40, trunk=policy, detach=detach)
    torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(0))
    assert len(list(critic.parameters())) == 2
    critic.values(sampled_record(policy)).sum().backward()
    reached = policy.model.model.layers[0].mlp.up_proj.weight.grad
    assert (reached is None) == detach
    with pytest.raises(ConfigError, match="exactly one"):
        TokenCritic(policy.tokenizer, 40, trunk=policy, config=CONFIG)
