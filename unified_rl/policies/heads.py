"""What an architecture does to its output layer's logits, read from its configuration.

Knowing it lets a policy apply the output layer to the few positions that it scores, a piece at a time. An architecture
that is not in these tables is run as a whole instead, whatever its output layer looks like.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

PLAIN = frozenset({
    "afmoe", "apertus", "arcee", "aria_text", "bamba", "biogpt", "bitnet", "bloom", "codegen", "ctrl", "cwm", "dbrx",
    "deepseek_v2", "deepseek_v3", "diffllama", "doge", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe",
    "falcon", "falcon_mamba", "flex_olmo", "gemma", "glm", "glm4", "glm4_moe", "gpt-sw3", "gpt2", "gpt_bigcode",
    "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "jamba", "jetmoe",
    "lfm2", "lfm2_moe", "llama", "mamba", "mamba2", "minimax", "minimax_m2", "ministral", "ministral3",
    "mistral", "mixtral", "mpt", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "openai-gpt", "opt", "persimmon",
    "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "seed_oss", "smollm3",
    "solar_open", "stablelm", "starcoder2", "xglm", "zamba", "zamba2",
})  # fmt: skip
"""Architectures whose logits are the output layer of the last hidden state, and nothing else."""

Kind = Literal["plain", "cap", "divide", "multiply"]
SHAPED: dict[str, tuple[Kind, str]] = {
    **dict.fromkeys(
        ("gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "vaultgemma", "nanochat"),
        ("cap", "final_logit_softcapping"),
    ),
    "recurrent_gemma": ("cap", "logits_soft_cap"),
    **dict.fromkeys(
        ("granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "minicpm3"),
        ("divide", "logits_scaling"),
    ),
    **dict.fromkeys(("cohere", "cohere2", "cohere2_moe"), ("multiply", "logit_scale")),
    "hyperclovax": ("multiply", "logits_scaling"),
    "falcon_h1": ("multiply", "lm_head_multiplier"),
}
"""Architectures that do one more thing to them, and the setting that says how strongly."""
STRENGTHS = {setting for _, setting in SHAPED.values()} | {"output_logit_soft_cap", "logit_softcapping"}


@dataclass(frozen=True)
class LogitShape:
    """From the output layer's logits to the model's.

    Attributes:
        kind: ``plain``, ``cap`` (a soft cap, ``c * tanh(logits / c)``), ``divide`` or ``multiply``.
        strength: of it.
    """

    kind: Kind = "plain"
    strength: float = 1.0

    def __call__(self, logits: Tensor) -> Tensor:
        """The model's logits, of the same shape."""
        if self.kind == "cap":
            return torch.tanh(logits / self.strength) * self.strength
        if self.kind == "divide":
            return logits / self.strength
        return logits * self.strength if self.kind == "multiply" else logits


def logit_shape(model: PreTrainedModel) -> LogitShape | None:
    """How a model's logits follow from its output layer, or None where only the whole model can say."""
    config: Any = model.config
    if not isinstance(model.get_output_embeddings(), nn.Module) or model.base_model is model:
        return None
    kind, setting = SHAPED.get(config.model_type, ("plain", ""))
    others = [name for name in STRENGTHS - {setting} if getattr(config, name, None) not in (None, 0, 1)]
    if others or (kind == "plain" and config.model_type not in PLAIN):
        return None
    strength = getattr(config, setting, None) if setting else None
    return LogitShape() if strength is None else LogitShape(kind, float(strength))


def read_head(model: Any, states: Tensor) -> Tensor:
    """The model's logits ``[..., V]`` of its last hidden states ``[..., d]``; its ``logit_shape`` must be known."""
    logits: Tensor = model.logit_shape(model.get_output_embeddings()(states))
    return logits
