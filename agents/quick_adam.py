"""Steps of torch's fused Adam without the bookkeeping around them, which costs a small network more than its kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam


class QuickAdam:
    """``optimizer.step()``, bit for bit, for an Adam of one group whose kernel is fused.

    Moments are looked up once and used until the optimiser holds others. Any other optimiser, a parameter without a
    gradient, hooks, and the first step go to ``step`` itself.

    Args:
        optimizer: keeps the state; it may be saved, restored, and given another learning rate at any time.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._parameters: list[Tensor] = []
        self._means: list[Tensor] = []
        self._squares: list[Tensor] = []
        self._steps: list[Tensor] = []

    def step(self) -> None:
        """One step from the gradients of the parameters."""
        optimizer, gradients = self.optimizer, [parameter.grad for parameter in self._parameters]
        if not self._current() or any(gradient is None for gradient in gradients):
            optimizer.step()
            self._look_up()
            return
        group = optimizer.param_groups[0]
        beta1, beta2 = group["betas"]
        with torch.no_grad():
            adam(
                self._parameters,
                gradients,  # type: ignore[arg-type]
                self._means,
                self._squares,
                [],
                self._steps,
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def _current(self) -> bool:
        """Whether what was looked up is what the optimiser would use."""
        optimizer, known = self.optimizer, self._parameters
        if not known or len(optimizer.param_groups) != 1 or len(optimizer.param_groups[0]["params"]) != len(known):
            return False
        if "step" in vars(optimizer) or optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            return False
        state: Any = optimizer.state.get(known[-1], {})
        return state.get("exp_avg") is self._means[-1] and state.get("step") is self._steps[-1]

    def _look_up(self) -> None:
        self._parameters = []
        group, kind = self.optimizer.param_groups[0], type(self.optimizer)
        others = ("amsgrad", "maximize", "capturable", "differentiable")
        if kind is not torch.optim.Adam or not group["fused"] or any(group[key] for key in others):
            return
        states = [self.optimizer.state.get(parameter, {}) for parameter in group["params"]]
        if not all("exp_avg" in state for state in states):
            return
        self._parameters = list(group["params"])
        self._means, self._squares = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq"))
        self._steps = [state["step"] for state in states]
