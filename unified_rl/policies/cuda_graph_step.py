"""Decoding by replaying one CUDA graph a token: small batches wait for the launch of kernels, not for their work."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(token [b, 1], position [b, 1], visible [b, 1, 1, capacity]) -> logits [b, V]``, writing the cache."""


class ReplayedStep:
    """One decoding step on memory of its own: the first call runs it, the second captures it, later ones replay it.

    On a CPU every call runs it. Weights, and what autocast made of them, must stay where they are meanwhile.

    Args:
        forward: the model with its cache.
        position: ``[b, 1]`` int64, where the next token of each row stands.
        visible: ``[b, 1, 1, capacity]`` bool, the columns of the prompts; overwritten.
        column: ``[1]`` int64, the cache's next column; moves on with every step.
    """

    def __init__(self, forward: Forward, position: Tensor, visible: Tensor, column: Tensor) -> None:
        self.forward, self.position, self.visible, self.column = forward, position.clone(), visible, column
        self.token = torch.zeros_like(self.position)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None
        self.calls = 0

    def __call__(self, token: Tensor) -> Tensor:
        """Logits ``[b, V]`` after ``token [b]``; the next call may overwrite them."""
        self.token.copy_(token[:, None])
        self.calls += 1
        if not token.is_cuda:
            return self._step()
        if self.calls == 1:
            return self._warm_up()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self._step()
        self.graph.replay()
        assert self.logits is not None
        return self.logits

    def _step(self) -> Tensor:
        self.visible.index_fill_(-1, self.column, True)
        logits = self.forward(self.token, self.position, self.visible)
        self.position += 1
        self.column += 1
        return logits

    def _warm_up(self) -> Tensor:
        """A step on a stream of its own, as capture wants: libraries allocate their work space here."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            logits = self._step()
        torch.cuda.current_stream().wait_stream(stream)
        return logits
