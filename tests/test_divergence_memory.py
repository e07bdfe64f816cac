"""A divergence holds the logits of a chunk of units, whatever the batch: counted below autograd, backward included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from memory_meter import Meter
from tensordict import TensorDict
from term_cases import agent_of
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from unified_rl.policies.causal_lm import CausalLM

WORDS, UNITS, CHUNK = 4000, 32, 8
TINY = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "intermediate_size": 16}  # fmt: skip


@pytest.fixture(scope="module")
def policy() -> CausalLM:
    words = {"<pad>": 0, "<eos>": 1, **{f"w{n}": n for n in range(2, WORDS)}}
    model = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<eos>")
    return CausalLM(tokenizer, UNITS + 1, config=TINY, logit_chunk=CHUNK, seed=1)


def rows(count: int) -> TensorDict:
    shape = (count, UNITS + 1)
    return TensorDict(
        {
            "tokens": torch.randint(2, WORDS, shape, generator=torch.Generator().manual_seed(count)),
            "mask": (torch.arange(shape[1]) > 0).expand(shape).clone(),
            "source": torch.zeros(count, dtype=torch.int64),
        },
        batch_size=[count],
    )


def peak(policy: CausalLM, count: int, terms: dict[str, Any]) -> int:
    data = rows(count)
    agent = agent_of(policy, data, "reinforce", objectives={"policy": None, **terms})
    agent.optimizer.zero_grad()
    with Meter() as meter:
        agent.objective.backward(data, None)
    assert any(float(weight.grad.abs().max()) > 0 for weight in policy.parameters() if weight.grad is not None)
    return meter.peak


TERMS: dict[str, dict[str, Any]] = {
    "reverse_kl": {"d": {"name": "divergence", "kind": "reverse_kl", "anchor": "reference"}},
    "jsd": {"d": {"name": "divergence", "kind": "jsd", "anchor": "reference"}},
    "top k": {"d": {"name": "divergence", "kind": "reverse_kl", "anchor": "reference", "top_k": 4}},
    "rewards of rivals": {"d": {"name": "rank_aware", "near": 0.1, "rows": "own"}},
    "entropy": {"d": {"name": "entropy", "coefficient": 0.1}},
    "likelihood beside": {
        "d": {"name": "divergence", "kind": "forward_kl", "anchor": "reference"},
        "n": {"name": "nll", "rows": "own"},
    },
}


@pytest.mark.parametrize("name", TERMS)
def test_what_is_held_does_not_grow_with_the_batch(name: str, policy: CausalLM) -> None:
    reference = policy.model.get_output_embeddings().weight
    with torch.no_grad():
        reference.add_(torch.randn(reference.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    few, many = peak(policy, 2, TERMS[name]), peak(policy, 8, TERMS[name])
    more = 4 * WORDS * 6 * UNITS  # of six rows' logits
    assert many - few < 0.1 * more, f"{many} and {few} bytes; six further rows' logits are {more}"
    assert many < few + 0.1 * more < 4 * WORDS * 8 * UNITS, "less than one [rows, tokens, vocabulary] tensor in all"
