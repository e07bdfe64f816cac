"""Architectures: what they do to their logits, derived sizes, and scores that nothing random or cut enters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from unified_rl.envs.language import ChainMod
from unified_rl.errors import ConfigError
from unified_rl.policies import heads
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.policies.heads import LogitShape, logit_shape

INPUTS = ChainMod().policy_inputs()
SIZE = len(INPUTS["tokenizer"])
S = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
G = {"n_embd": 32, "n_layer": 2, "n_head": 4}
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma2": {**S, "final_logit_softcapping": 2.0},
    "gemma3_text": {**S, "final_logit_softcapping": 2.0},
    "vaultgemma": {**S, "final_logit_softcapping": 2.0},
    "recurrent_gemma": {**S, "num_hidden_layers": 3, "lru_width": 32, "logits_soft_cap": 3.0},
    "granite": {**S, "logits_scaling": 5.0},
    "granitemoe": {**S, "logits_scaling": 5.0, "num_local_experts": 2, "num_experts_per_tok": 1},
    "cohere": {**S, "logit_scale": 0.3},
    "cohere2": {**S, "logit_scale": 0.3},
    "falcon_h1": {**S, "lm_head_multiplier": 2.5, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_ssm": 32},
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma", "phi", "phi3", "phimoe", "olmo2", "glm"), S),
    **dict.fromkeys(("stablelm", "starcoder2", "smollm3", "mixtral", "gpt_neox", "persimmon", "nemotron"), S),
    "gpt2": G,
    "openai-gpt": G,
    "codegen": {**G, "rotary_dim": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64,
            "word_embed_proj_dim": 16},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4},
    "mamba2": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "num_heads": 8, "head_dim": 8,
               "n_groups": 1},
    "deepseek_v3": {**S, **MLA, **ROUTED, "n_group": 2, "topk_group": 1},
    "qwen3_moe": {**S, **MOE, "head_dim": 16},
}  # fmt: skip


def made(model_type: str, **options: Any) -> CausalLM:
    """A tiny model, its biases and norms stirred."""
    policy = CausalLM(**INPUTS, config={"model_type": model_type, **CONFIGS[model_type]}, seed=1, **options)
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.dim() == 1:
                weight.add_(0.1 * torch.randn(weight.shape, generator=stream))
    return policy


def rows() -> TensorDict:
    tokens = torch.randint(4, SIZE, (3, 12), generator=torch.Generator().manual_seed(0))
    return TensorDict({"tokens": tokens, "mask": torch.arange(12).expand(3, 12) >= 3}, [3])


def truth(policy: CausalLM, tokens: torch.Tensor, start: int) -> torch.Tensor:
    logits = policy.model(tokens).logits.float()[:, start - 1 : -1, :SIZE]
    return logits.log_softmax(-1).gather(-1, tokens[:, start:, None])[..., 0]


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
@torch.no_grad()
def test_scores_are_those_of_the_whole_model(model_type: str) -> None:
    policy, batch = made(model_type), rows()
    right = truth(policy, batch["tokens"], 3)
    shape = policy.model.logit_shape
    assert shape is not None and (shape.kind != "plain") == (model_type in heads.SHAPED)
    assert shape.kind == "plain" or abs(shape.strength - 1) > 0.1, "a strength that would be seen if it were lost"
    scored = policy.log_prob(batch).log_prob
    torch.testing.assert_close(scored[:, 3:], right, atol=2e-5, rtol=0)
    assert torch.equal(policy.train().log_prob(batch).log_prob, scored)
    states = policy.unit_states(batch)[batch["mask"]]
    shown = policy.logits_of(states).log_softmax(-1).gather(-1, batch["tokens"][batch["mask"]][:, None])[:, 0]
    torch.testing.assert_close(shown, right.flatten(), atol=2e-5, rtol=0)
    stream = torch.Generator().manual_seed(0)
    out = policy.generate([[5, 6, 7]], max_new_tokens=5, generator=stream, samples_per_prompt=2, stop_ids=[])
    whole = torch.cat([torch.tensor([[5, 6, 7]]).expand(2, 3), out.tokens], 1)
    torch.testing.assert_close(out.log_prob, truth(policy, whole, 3), atol=2e-5, rtol=0)


@pytest.mark.parametrize("model_type", ["recurrent_gemma", "mamba2", "gemma2"])
@torch.no_grad()
def test_prompts_of_different_lengths_do_not_see_each_others_padding(model_type: str) -> None:
    policy = made(model_type)
    prompts = [[5, 6, 7, 8, 9], [10], [11, 12, 13, 14, 15], [4, 5]]
    stream = torch.Generator().manual_seed(0)
    out = policy.generate(prompts, max_new_tokens=5, generator=stream, samples_per_prompt=2, stop_ids=[])
    for row, drawn in enumerate(out.tokens):
        prompt = prompts[row // 2]
        right = truth(policy, torch.cat([torch.tensor(prompt), drawn])[None], len(prompt))[0]
        torch.testing.assert_close(out.log_prob[row], right, atol=2e-5, rtol=0)


@torch.no_grad()
def test_an_architecture_that_is_not_known_is_run_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    known, batch = made("llama"), rows()
    monkeypatch.setattr(heads, "PLAIN", heads.PLAIN - {"llama"})
    policy = made("llama")
    assert policy.model.logit_shape is None and not policy.share_prompts
    torch.testing.assert_close(policy.log_prob(batch).log_prob, known.log_prob(batch).log_prob)
    mask = batch["mask"]
    given = [p.logits_of(p.unit_states(batch)[mask]) for p in (policy, known)]
    torch.testing.assert_close(given[0], given[1])
    streams = [torch.Generator().manual_seed(0) for _ in range(2)]
    drawn = [p.generate([[5, 6]], max_new_tokens=4, generator=s) for p, s in zip((policy, known), streams, strict=True)]
    torch.testing.assert_close(drawn[0].log_prob, drawn[1].log_prob)


def test_the_shape_is_read_and_not_probed() -> None:
    model = made("gemma2").model
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()  # a probe would see no difference between its logits with and without the cap
    assert logit_shape(model) == LogitShape("cap", 2.0)
    model.config.final_logit_softcapping = None
    assert logit_shape(model) == LogitShape()
    llama = made("llama").model
    assert logit_shape(llama) == LogitShape()
    llama.config.final_logit_softcapping = 30.0  # a setting that this architecture is not known to have
    assert logit_shape(llama) is None


def test_architectures_of_the_tables_are_there() -> None:
    names = {*heads.PLAIN, *heads.SHAPED}
    assert not heads.PLAIN & heads.SHAPED.keys()
    assert len(names & MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()) > 0.6 * len(names), "older versions have fewer"


def test_sizes_that_fit_no_model_are_one_line() -> None:
    for config, message in (
        ({"model_type": "falcon", "intermediate_size": 3}, "falcon has no setting intermediate_size; did you mean"),
        ({"model_type": "falcon", "head_dim": 8}, "falcon has no setting head_dim"),
        ({"model_type": "opt", "head_dim": 8}, "opt has no setting head_dim"),
        ({"model_type": "deepseek_v3", **S, **MLA, "moe_intermediate_size": -1}, "must be at least 1"),
        ({"model_type": "lfm2_moe", **S, "layer_types": ["conv"]}, "policy.config: "),
    ):
        with pytest.raises(ConfigError) as caught:
            CausalLM(**INPUTS, config=config)
        assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_derived_widths_of_heads_are_those_of_the_architecture() -> None:
    config = made("deepseek_v3").model.config
    assert config.qk_rope_head_dim == 4 and config.head_dim == 4, "the rotary part alone, not hidden_size / heads"
    attention = made("qwen3_moe").model.model.layers[0].self_attn
    assert attention.head_dim == 16 and attention.q_proj.out_features == 64


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "falcon", "qwen3_moe", "mamba2", "gemma2", "cohere"])
def test_recomputed_layers_keep_less_and_give_the_same_gradient(model_type: str) -> None:
    batch = rows()

    def kept(**options: Any) -> tuple[int, torch.Tensor]:
        policy, size = made(model_type, share_prompts=False, **options), 0

        def pack(x: torch.Tensor) -> torch.Tensor:
            nonlocal size
            size += x.numel() * x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            total = policy.log_prob(batch).log_prob.sum()
        total.backward()
        return size, torch.cat([w.grad.flatten() for w in policy.parameters() if w.grad is not None])

    (plain, exact), (less, got) = kept(), kept(gradient_checkpointing=True)
    assert less < 0.7 * plain
    torch.testing.assert_close(got, exact, atol=1e-4, rtol=1e-4)
