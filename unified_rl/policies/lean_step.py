"""A decoding step of the usual decoders with as few calls as their arithmetic needs, for small steps on a CPU.

A step of a few rows through the modules of transformers spends more time between the products than in them: some sixty
calls a layer, most of which say how wide a tensor is or normalise a few numbers. Here queries, keys and values are one
product, so are the two halves of the gate, and what lies between is written out. Only architectures whose every part is
known are taken, by the exact classes of their modules; all others are run as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers.activations import SiLUActivation

from unified_rl.policies.group_cache import GroupCache, GroupLayer
from unified_rl.policies.packed_weights import pack, packed_bytes, product

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
"""Decoders of one shape, and how transformers begins the names of their classes."""
Product = Callable[[Tensor], Tensor]


def lean_step(model: Any, cache: Any, rows: int, tokens: int) -> LeanStep | None:
    """The step of ``model`` over a cache that holds the prompts, or None where the model must be run as it is.

    Args:
        model: in evaluation mode.
        cache: filled by the model with the prompts; only a :class:`GroupCache` will do.
        rows: of a step.
        tokens: steps to come.
    """
    worth = packed_bytes(model, rows, tokens, model.device.type) > 0 and not torch.is_autocast_enabled("cpu")
    return LeanStep(model, cache, rows) if worth and isinstance(cache, GroupCache) and is_known(model) else None


def is_known(model: Any) -> bool:
    """Whether every module is one whose arithmetic stands here, in float32 and without hooks."""
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        return False
    parts = ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")
    names = {family + part for part in parts}
    home = f"transformers.models.{model.config.model_type}.modeling_{model.config.model_type}"
    plain = (nn.Linear, nn.Embedding, nn.ModuleList, nn.SiLU, SiLUActivation)
    for module in model.modules():
        ours = type(module).__name__ in names and type(module).__module__ == home
        if not ours and type(module) not in plain:
            return False
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return False
    return all(weight.dtype == torch.float32 for weight in model.parameters())


class LeanStep:
    """Logits ``[B, V]`` after one more token a row, whose keys and values join the cache.

    Args:
        model: one that :func:`is_known`.
        cache: what it read so far.
        rows: the layout of packed weights is made for.
    """

    def __init__(self, model: Any, cache: GroupCache, rows: int) -> None:
        inner = model.model
        self.embed, self.rotary = inner.embed_tokens, inner.rotary_emb
        pairs = zip(inner.layers, cache.group_layers, strict=True)
        self.layers = [_Layer(layer, kept, rows) for layer, kept in pairs]
        self.norm = inner.norm
        self.head = _product([model.lm_head], rows)

    def __call__(self, token: Tensor, position: Tensor, shown: Tensor | None) -> Tensor:
        """One step.

        Args:
            token: ``[B]`` ids.
            position: ``[B, 1]`` of them.
            shown: ``[B, 1, 1, columns]`` bool, with the new column; None for all.
        """
        states = self.embed(token)
        cos, sin = self.rotary(states[:, None], position)
        half = sin.shape[-1] // 2
        turned = torch.cat((-sin[..., :half], sin[..., half:]), -1)
        for layer in self.layers:
            states = layer(states, cos, turned, shown)
        return self.head(_norm(self.norm, states))


class _Layer:
    """One decoder layer; ``states [B, hidden]``."""

    def __init__(self, layer: Any, kept: GroupLayer, rows: int) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.before, self.between, self.kept = layer.input_layernorm, layer.post_attention_layernorm, kept
        self.width, self.scaling = attention.head_dim, attention.scaling
        self.keys = attention.k_proj.out_features // self.width
        self.queries = attention.q_proj.out_features // self.width
        self.project = _product([attention.q_proj, attention.k_proj, attention.v_proj], rows)
        self.out, self.down = _product([attention.o_proj], rows), _product([mlp.down_proj], rows)
        self.gate, self.act = _product([mlp.gate_proj, mlp.up_proj], rows), mlp.act_fn
        self.by_head: Tensor | None = None
        if hasattr(attention, "q_norm"):
            weights = (attention.q_norm.weight, attention.k_norm.weight)
            self.by_head = torch.cat([w.expand(n, -1) for w, n in zip(weights, (self.queries, self.keys), strict=True)])
            self.eps = attention.q_norm.variance_epsilon

    def __call__(self, states: Tensor, cos: Tensor, sin: Tensor, shown: Tensor | None) -> Tensor:
        heads = self.project(_norm(self.before, states)).view(len(states), -1, self.width)
        turning, values = heads.split((self.queries + self.keys, self.keys), 1)
        if self.by_head is not None:
            turning = rms_norm(turning, (self.width,), None, self.eps) * self.by_head
        turning = torch.addcmul(turning * cos, turning.roll(self.width // 2, -1), sin)
        query, key = turning[:, :, None].split((self.queries, self.keys), 1)
        self.kept.update(key, values[:, :, None])
        states = states + self.out(self.kept.attend(query, shown, self.scaling).flatten(1))
        gate, up = self.gate(_norm(self.between, states)).chunk(2, -1)
        return states + self.down(self.act(gate).mul_(up))


def _norm(norm: Any, states: Tensor) -> Tensor:
    return rms_norm(states, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _product(layers: list[nn.Linear], rows: int) -> Product:
    """The layers' outputs beside one another, from one product with packed weights."""
    weight = layers[0].weight if len(layers) == 1 else torch.cat(tuple(layer.weight for layer in layers))
    biases = [layer.bias for layer in layers]
    bias = None if biases[0] is None else torch.cat(tuple(biases))
    packed = pack(weight, rows)
    return lambda states: product(states, packed, bias)
