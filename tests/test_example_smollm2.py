"""The example that makes a model folder of a GGUF file, on a tiny file of the same kind."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from unified_rl.envs.language.tokenizer import load_tokenizer
from unified_rl.policies.causal_lm import CausalLM

gguf = pytest.importorskip("gguf")
WIDTH, HEADS, INNER = 32, 4, 64
TEMPLATE = "{% for m in messages %}<|im_start|>{{m.role}}\n{{m.content}}<|im_end|>\n{% endfor %}"


def tiny_file(path: Path) -> None:
    """A llama of one layer with tied embeddings, on bytes and the special tokens of SmolLM2."""
    from tokenizers.pre_tokenizers import ByteLevel

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *sorted(ByteLevel.alphabet()), "12"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100_000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(special) + [1] * (len(tokens) - len(special)))
    writer.add_token_merges(["1 2"])  # never made: digits stay single
    for name, number in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_chat_template(TEMPLATE)
    stream = np.random.default_rng(0)
    shapes = {"token_embd.weight": (len(tokens), WIDTH), "output_norm.weight": (WIDTH,),
              "blk.0.attn_norm.weight": (WIDTH,), "blk.0.ffn_norm.weight": (WIDTH,),
              **{f"blk.0.attn_{name}.weight": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")},
              "blk.0.ffn_gate.weight": (INNER, WIDTH), "blk.0.ffn_up.weight": (INNER, WIDTH),
              "blk.0.ffn_down.weight": (WIDTH, INNER)}  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(name, stream.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_a_model_folder(tmp_path: Path, source: Path) -> None:
    tiny_file(tmp_path / "tiny.gguf")
    convert = runpy.run_path(str(source / "examples" / "smollm2.py"), run_name="example")["convert"]
    convert(tmp_path / "tiny.gguf", tmp_path / "folder")
    weights = load_file(tmp_path / "folder" / "model.safetensors")
    assert {str(w.dtype) for w in weights.values()} == {"torch.bfloat16"} and "lm_head.weight" not in weights
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert "quantization_config" not in config and config["rms_norm_eps"] == 1e-5 and config["tie_word_embeddings"]
    tokenizer = load_tokenizer(tmp_path / "folder")
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template == TEMPLATE
    assert tokenizer.convert_ids_to_tokens(tokenizer("a 12")["input_ids"]) == ["a", "Ġ", "1", "2"]
    policy = CausalLM(tokenizer, 32, path=str(tmp_path / "folder"))
    assert policy.end_ids == (2,) and len(policy.generate([[5, 6]], max_new_tokens=3, greedy=True).rows()[0]) > 0
