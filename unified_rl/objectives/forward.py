"""One forward pass of a micro-batch, made when a term first reads from it and shared by all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple, TypeAlias, cast

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.policies.sampling import Sampling, token_log_prob
from unified_rl.protocols import ShowsLogits, Trainable

Score: TypeAlias = Callable[[TensorDictBase], tuple[Tensor, Tensor | None]]
"""``rows -> (log_prob [B, N], penalty [B, N] or None)``, with gradient."""


class Reader(NamedTuple):
    """What a term takes from every unit's distribution, in the pass that also gives the log-probs.

    Attributes:
        name: under which the term finds it.
        function: ``(logits [n, V], token [n], *extras [n, ...]) -> tensor [n]``; logits live for a chunk of units only.
        extras: what it needs beside the logits, ``[B, N, ...]`` each, computed from the micro-batch without gradient.
    """

    name: str
    function: Callable[..., Tensor]
    extras: Callable[[TensorDictBase], tuple[Tensor, ...]] = lambda rows: ()


class Forward:
    """Log-probs, readings and supervised losses of a micro-batch; each is computed once, and only if a term asks.

    Args:
        policy: the policy that is trained.
        rows: the micro-batch.
        score: ``rows -> (log_prob [B, N], penalty [B, N] or None)``, with gradient.
        readers: of all terms; with any, one ``policy.read_logits`` serves them and the log-probs.
        generator: for supervised losses that draw noise.
        sampling: how a categorical policy samples; None of others, whose supervised loss is their own.
        scored: log-probs have a gradient beside readings. Where no term follows it, it must not be recorded: what the
            logits' recomputation saves for it would stay, chunk by chunk, until the whole backward pass is over.
    """

    def __init__(
        self,
        policy: Trainable,
        rows: TensorDictBase,
        score: Score,
        readers: Sequence[Reader] = (),
        generator: torch.Generator | None = None,
        sampling: Sampling | None = None,
        scored: bool = True,
    ) -> None:
        self.scored = scored
        self.policy, self.rows, self.readers, self.generator = policy, rows, readers, generator
        self.sampling = sampling
        self._score, self._grad = score, torch.is_grad_enabled()

    @cached_property
    def _found(self) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        with torch.set_grad_enabled(self._grad):  # whoever asks first may stand inside no_grad
            return self._pass()

    def _pass(self) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        if not self.readers:
            return (*self._score(self.rows), {})
        with torch.no_grad():
            extras = [tuple(reader.extras(self.rows)) for reader in self.readers]
        counts = [len(extra) for extra in extras]

        def fused(logits: Tensor, token: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
            out, at = [token_log_prob(logits if self.scored else logits.detach(), token)], 0
            for reader, count in zip(self.readers, counts, strict=True):
                out.append(reader.function(logits, token, *flat[at : at + count]))
                at += count
            return tuple(out)

        shown = cast(ShowsLogits, self.policy)  # terms ask for readers where it is one
        log_prob, *read = shown.read_logits(self.rows, fused, *(x for extra in extras for x in extra))
        return log_prob, None, {r.name: x for r, x in zip(self.readers, read, strict=True)}

    @property
    def log_prob(self) -> Tensor:
        """``[B, N]`` float32, with gradient (see ``scored``)."""
        return self._found[0]

    @property
    def penalty(self) -> Tensor | None:
        """A wrapper's penalty of each unit, ``[B, N]``."""
        return self._found[1]

    def read(self, name: str) -> Tensor:
        """A reader's value of each unit, ``[B, N]``, with gradient."""
        return self._found[2][name]

    @cached_property
    def nll(self) -> Tensor:
        """Supervised loss ``[B, N']``: minus the log-probs where the policy is a plain categorical, else its own."""
        sampling = self.sampling
        if sampling is not None and sampling.plain:
            return -self.log_prob
        return self.policy.nll(self.rows, self.generator)
