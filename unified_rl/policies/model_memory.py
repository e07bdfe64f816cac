"""What a language model takes in memory: cache, activations, logits. Estimates, made before anything is spent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from unified_rl.policies.sampling import Sampling

PROBES = (1, 3)
"""Rows of the two passes that :func:`activations_of` looks at."""
WIDTH = 8
"""Tokens of each at the most."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder that memory depends on.

    Attributes:
        layers: of the decoder.
        cached: width of one layer's keys (and of its values) a token: key-value heads times their width.
        words: ids of the output layer.
        item: bytes of a number in the cache.
    """

    layers: int
    cached: int
    words: int
    item: int

    @classmethod
    def of(cls, model: Any, autocast: bool = False) -> Shape:
        """Those of a transformers model; a cache under autocast holds what its layers compute, bfloat16."""
        config = model.config.get_text_config(decoder=True)
        heads = int(getattr(config, "num_attention_heads", None) or 1)
        shared = int(getattr(config, "num_key_value_heads", None) or heads)
        width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        item = 2 if autocast else torch.empty((), dtype=model.dtype).element_size()
        return cls(int(config.num_hidden_layers), shared * width, int(config.vocab_size), item)

    def cache(self, rows: int, length: int) -> int:
        """Bytes of the key-value cache: 2 x layers x key-value heads x head width x rows x length x bytes."""
        return 2 * self.layers * self.cached * rows * length * self.item


@dataclass(frozen=True)
class Activations:
    """What a forward pass keeps for its backward pass, in bytes.

    Attributes:
        token: of every token.
        fixed: whatever the number of tokens.
        layer: of a token in one layer: what a pass without gradient holds for a moment.
        recomputed: a backward pass makes a layer's anew when it comes to it.
    """

    token: float
    fixed: float
    layer: float
    recomputed: bool = False

    def training(self, tokens: int) -> float:
        """Bytes at the peak of forward and backward pass: what is kept, and gradients on their way through a layer."""
        return self.fixed + tokens * (self.token + self.layer * (2 if self.recomputed else 1))

    def scoring(self, tokens: int) -> float:
        """Bytes at the peak of a pass without gradient."""
        return tokens * self.layer


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of the distinct storages behind tensors, by address."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def module_bytes(modules: Iterable[nn.Module], without: Iterable[nn.Module] = ()) -> int:
    """Bytes of weights and buffers, each once, that are not those of the modules ``without``."""
    known = storages(t for m in without for t in (*m.parameters(), *m.buffers()))
    found = storages(t for m in modules for t in (*m.parameters(), *m.buffers()))
    return sum(size for address, size in found.items() if address not in known)


def activations_of(policy: Any) -> Activations:
    """Measured on two tiny passes, once a policy, so that it holds for any architecture, precision and adapter.

    Args:
        policy: a :class:`~unified_rl.policies.causal_lm.CausalLM`.
    """
    if policy not in _MEASURED:
        _MEASURED[policy] = _measured(policy)
    return _MEASURED[policy]


_MEASURED: WeakKeyDictionary[Any, Activations] = WeakKeyDictionary()


def _measured(policy: Any) -> Activations:
    token, fixed = _line(policy)
    layers = max(1, Shape.of(policy.model).layers)
    if not policy._recomputed:
        return Activations(token, fixed, token / layers)
    with _with(policy, _recomputed=[]):
        return Activations(token, fixed, _line(policy)[0] / layers, recomputed=True)


@contextmanager
def _with(policy: Any, **settings: Any) -> Iterator[None]:
    """The policy with other settings, for a moment."""
    before = {name: getattr(policy, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(policy, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(policy, name, value)


def _line(policy: Any) -> tuple[float, float]:
    """Bytes a token, and those that are always there."""
    width = max(1, min(WIDTH, policy.max_length - 1))
    with _with(policy, share_prompts=False):
        few, more = (_saved(policy, rows, width) for rows in PROBES)
    slope = max(0.0, (more - few) / ((PROBES[1] - PROBES[0]) * width))
    return slope, max(0.0, few - slope * PROBES[0] * width)


@torch.enable_grad()
def _saved(policy: Any, rows: int, width: int) -> int:
    """Bytes that a pass over rows of so many tokens saves for its backward pass, weights not counted."""
    ids = torch.arange(width + 1, device=policy.device).expand(rows, -1) % min(64, policy.sampling.vocabulary or 64)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    batch = TensorDict({"tokens": ids, "mask": mask}, [rows])
    own = storages((*policy.parameters(), *policy.buffers()))
    kept: list[Tensor] = []

    def pack(saved: Tensor) -> Tensor:
        kept.append(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        (policy.unit_states if policy.model.logit_shape else policy.log_prob)(batch)
    return sum(size for address, size in storages(kept).items() if address not in own)


def bytes_a_logit(sampling: Sampling, training: bool) -> int:
    """Bytes held at once for every logit that is looked at: itself, what its transform makes, a draw or a gradient.

    A gradient comes after the transform's own tensors are gone; a draw, beside them.
    """
    made = (8 if sampling.top_k else 0) + (20 if sampling.top_p < 1 else 0) + (9 if sampling.remembers else 0)
    return max(12, 4 + made) if training else 12 + made


def logits(policy: Any, units: int, training: bool) -> int:
    """Bytes of the logits of so many units: of a chunk of them where the policy reads them in chunks."""
    from unified_rl.policies.causal_lm import LOGITS_AT_ONCE

    words = Shape.of(policy.model).words
    chunk = policy.logit_chunk or max(1, LOGITS_AT_ONCE // words)
    held = min(units, chunk) if training and policy.model.logit_shape else units
    return held * words * bytes_a_logit(policy.sampling, training)
