"""A tiny policy whose rollouts an engine samples, and its answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from engine_server import EngineServer
from test_generation import letter_tokenizer, teacher_forced

from unified_rl.policies.causal_lm import CausalLM
from unified_rl.policies.generation import Generation

SERVERS = ("vllm", "sglang")
ENGINES = ("own", "copy", "transformers", *SERVERS)
TINY = {
    "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
PROMPTS = [[2, 5, 6, 7], [2, 9], [2, 4, 4, 11, 3]]
EOS = 1


def policy_of(engine: str = "own", server: EngineServer | None = None, folder: Path | None = None, **options: Any):
    """A tiny policy whose rollouts an engine samples; ``copy`` is the own loop on a copy of the same precision."""
    options = {"temperature": 0.7, **options}
    if engine in SERVERS:
        assert server is not None and folder is not None
        shared = {"server": server.url, "server_folder": str(folder / "shared"), "server_retries": 2}
        options = {"engine": engine, **shared, **options}
    elif engine == "copy":
        options = {"engine_dtype": "float32", **options}
    elif engine != "own":
        options = {"engine": engine, **options}
    if "config" not in options and "path" not in options:
        options["config"] = TINY
    return CausalLM(letter_tokenizer(), 64, seed=0, **options)


def speak(policy: CausalLM, version: int = 0, seed: int = 0, samples: int = 4, **options: Any) -> Generation:
    """Answers of whatever samples the policy's rollouts."""
    speaker: Any = policy if policy.sampler is None else policy.sampler.at(version)
    options = {"max_new_tokens": 6, "stop_ids": [EOS, 4], "prompts": PROMPTS, **options}
    stream = torch.Generator().manual_seed(seed)
    return speaker.generate(options.pop("prompts"), generator=stream, samples_per_prompt=samples, **options)


def largest_gap(policy: CausalLM, out: Generation, samples: int = 4) -> float:
    """Between the log-probs of an engine and those of the plain model, read in the textbook way."""
    gap = 0.0
    for row, said in enumerate(out.rows()):
        wanted = teacher_forced(policy, torch.tensor(PROMPTS[row // samples]), said, policy.sampling)
        gap = max(gap, float((wanted - out.log_prob[row, : len(said)]).abs().max()))
    return gap


def moved(policy: CausalLM) -> None:
    """Other weights."""
    stream = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.add_(torch.randn(weight.shape, generator=stream) * 0.3)
