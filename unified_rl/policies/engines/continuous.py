"""Continuous batching of transformers, in the run's own process."""

from __future__ import annotations

from typing import Any

import torch

from unified_rl.errors import ConfigError, RolloutError
from unified_rl.policies.engines.precision import in_precision
from unified_rl.policies.engines.protocol import Answer, Call, joined
from unified_rl.policies.generation import Generation


class Transformers:
    """``generate_batch`` of transformers: paged cache, answers join and leave the batch as they begin and end.

    Args:
        dtype: of a copy that samples, as :func:`in_precision` takes it; None samples with the model itself.
    """

    name = "transformers"

    def __init__(self, dtype: str | None = None) -> None:
        self.dtype = dtype
        self.model: Any = None

    def open(self) -> None:
        """Raises ConfigError where transformers is too old."""
        import transformers

        if not hasattr(transformers, "ContinuousBatchingConfig"):
            raise ConfigError("policy.engine=transformers needs generate_batch: upgrade transformers, or engine=own")

    def push(self, policy: Any, version: int) -> None:
        """Takes the model, or a copy of it.

        Raises:
            ConfigError: its output layer has more ids than the tokenizer, which continuous batching would sample.
        """
        words = policy.model.config.get_text_config(decoder=True).vocab_size
        if words > policy.sampling.vocabulary:
            raise ConfigError(
                f"policy.engine=transformers would sample ids that the tokenizer lacks: the model's output layer has "
                f"{words}, the tokenizer {policy.sampling.vocabulary}; use policy.engine=own"
            )
        self.model = policy.model if self.dtype is None else in_precision(policy.model, self.dtype, policy.adapted)

    def generate(self, call: Call) -> Generation:
        """As of the protocol.

        Raises:
            RolloutError: an answer is missing.
        """
        from transformers import ContinuousBatchingConfig, GenerationConfig

        sampling = call.sampling
        config = GenerationConfig(
            do_sample=True,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            max_new_tokens=call.max_new_tokens,
            eos_token_id=list(call.stop_ids) or None,
            pad_token_id=call.pad_id,
        )
        rows = call.rows
        page = 32
        each = max(map(len, rows)) + call.max_new_tokens
        pages = -(-each // page) + 1
        batching = ContinuousBatchingConfig(
            return_logprobs=True,
            seed=call.seeds()[0],
            page_size=page,
            num_blocks=pages * min(len(rows), 256) if self.model.device.type == "cpu" else None,
            max_batch_tokens=max(512, each) if self.model.device.type == "cpu" else None,
            use_cuda_graph=False,
        )
        with torch.random.fork_rng(devices=[self.model.device] if self.model.device.type == "cuda" else []):
            found = self.model.generate_batch(
                rows, generation_config=config, continuous_batching_config=batching, warmup=False
            )
        outputs = list(found.values())  # in the order of the prompts
        who = "policy.engine=transformers"
        if len(outputs) != len(rows) or any(out.error for out in outputs):
            error = next((out.error for out in outputs if out.error), "no reason given")
            raise RolloutError(f"{who} answered {len(outputs)} of {len(rows)} prompts ({error})")
        answers = [Answer(list(out.generated_tokens), list(out.logprobs), stopped=False) for out in outputs]
        out = joined(answers, call, who)
        device = self.model.device
        parts = (out.tokens, out.log_prob, out.length, out.finished)
        return Generation(*(part.to(device) for part in parts))

    def close(self) -> None:
        """Lets the model go."""
        self.model = None
