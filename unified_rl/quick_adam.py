"""Steps of torch's fused Adam without the bookkeeping around them, which costs a small network more than its kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw

KERNELS: dict[type[torch.optim.Optimizer], Callable[..., None]] = {torch.optim.Adam: adam, torch.optim.AdamW: adamw}


class QuickAdam:
    """``optimizer.step()``, bit for bit, for an Adam or AdamW whose kernel is fused.

    Moments are looked up once and used until the optimiser holds others. Any other optimiser, a parameter without a
    gradient, hooks, and the first step go to ``step`` itself.

    Args:
        optimizer: keeps the state; it may be saved, restored, and given another learning rate at any time.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._known: list[tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]] = []
        """Of each group: parameters, means, squares, step counts."""

    def step(self) -> None:
        """One step from the gradients of the parameters."""
        gradients = [[parameter.grad for parameter in known[0]] for known in self._known]
        if not self._current() or any(gradient is None for group in gradients for gradient in group):
            self.optimizer.step()
            self._known = self._look_up()
            return
        kernel = KERNELS[type(self.optimizer)]
        with torch.no_grad():
            for group, (parameters, means, squares, steps), found in zip(
                self.optimizer.param_groups, self._known, gradients, strict=True
            ):
                kernel(
                    parameters,
                    found,
                    means,
                    squares,
                    [],
                    steps,
                    fused=True,
                    amsgrad=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )

    def _current(self) -> bool:
        """Whether what was looked up is what the optimiser would use."""
        optimizer = self.optimizer
        if not self._known or len(self._known) != len(optimizer.param_groups):
            return False
        if "step" in vars(optimizer) or optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            return False
        for group, (parameters, means, _, steps) in zip(optimizer.param_groups, self._known, strict=True):
            state: Any = optimizer.state.get(parameters[-1], {})
            same = len(group["params"]) == len(parameters) and group["params"][-1] is parameters[-1]
            if not (same and state.get("exp_avg") is means[-1] and state.get("step") is steps[-1]):
                return False
        return True

    def _look_up(self) -> list[tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]]:
        others, found = ("amsgrad", "maximize", "capturable", "differentiable"), []
        for group in self.optimizer.param_groups:
            states = [self.optimizer.state.get(parameter, {}) for parameter in group["params"]]
            if type(self.optimizer) not in KERNELS or not group["fused"] or any(group[key] for key in others):
                return []
            if not all("exp_avg" in state for state in states):
                return []
            means, squares, steps = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
            found.append((list(group["params"]), means, squares, steps))
        return found
