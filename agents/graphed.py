"""A gradient step captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Batch = dict[str, Tensor]
GradientStep = Callable[[Batch, Tensor, bool], Batch]


class GraphedStep:
    """One gradient step captured in a CUDA graph: inputs are copied into fixed buffers and the graph is replayed.

    Args:
        step: ``(batch, noise, update_actor) -> metrics``; draws nothing and allocates no state after its first calls.
        period: one in so many steps has ``update_actor``.
    """

    WARMUP = 3

    def __init__(self, step: GradientStep, period: int = 1) -> None:
        self.step, self.warm_calls = step, self.WARMUP * period
        self.inputs: tuple[Batch, Tensor] | None = None
        self.graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Batch]] = {}
        self.calls = 0

    def __call__(self, batch: Batch, noise: Tensor, update_actor: bool) -> Batch:
        """Runs eagerly on a side stream for the first calls, then captures, then replays."""
        self.calls += 1
        if self.calls <= self.warm_calls:
            return self._warm(batch, noise, update_actor)
        if self.inputs is None:
            self.inputs = ({k: v.clone() for k, v in batch.items()}, noise.clone())
        for key, value in batch.items():
            self.inputs[0][key].copy_(value)
        self.inputs[1].copy_(noise)
        if update_actor not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                metrics = self.step(*self.inputs, update_actor)
            self.graphs[update_actor] = (graph, metrics)
        graph, metrics = self.graphs[update_actor]
        graph.replay()
        return metrics

    def _warm(self, batch: Batch, noise: Tensor, update_actor: bool) -> Batch:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            metrics = self.step(batch, noise, update_actor)
        torch.cuda.current_stream().wait_stream(stream)
        return metrics
