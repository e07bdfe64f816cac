"""One optimiser step that refuses NaN: fused AdamW, clipped gradients, a check before the parameters move."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unified_rl.errors import ConfigError, NonFiniteError
from unified_rl.protocols import HasWeights


def first_non_finite(named: Iterable[tuple[str, Tensor | None]]) -> str | None:
    """The name of the first tensor with a NaN or infinity."""
    for name, value in named:
        if value is not None and not bool(torch.isfinite(value).all()):
            return name
    return None


class Optimizer:
    """AdamW over named modules, with a global gradient-norm bound and a finiteness check before every step.

    Args:
        modules: modules by name; names appear in errors.
        lr: learning rate.
        weight_decay: decoupled weight decay.
        betas: Adam's decay rates.
        eps: Adam's denominator offset.
        max_grad_norm: bound of the global gradient norm; None for no bound.
        capturable: needed inside a captured CUDA graph.
        extra: further modules by name, each with a learning rate of its own, which :meth:`set_lr` leaves alone.

    Attributes:
        after_clip: called between the bound on the gradient's norm and the step, with the factor that it applied.

    Raises:
        ConfigError: half-precision parameters: a step of the usual size is below their last digit.
    """

    def __init__(
        self,
        modules: Mapping[str, HasWeights],
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_grad_norm: float | None = None,
        capturable: bool = False,
        extra: Mapping[str, tuple[HasWeights, float]] | None = None,
    ) -> None:
        self.named = [
            (f"{prefix}.{name}", parameter)
            for prefix, module in modules.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        ]
        self.parameters = [parameter for _, parameter in self.named]
        self.lr, self.max_grad_norm = lr, max_grad_norm
        self.adam = torch.optim.AdamW(
            self.parameters, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, fused=True, capturable=capturable
        )
        for name, (module, own_lr) in (extra or {}).items():
            added = [(f"{name}.{key}", parameter) for key, parameter in module.named_parameters()]
            self.named += added
            group = [parameter for _, parameter in added]
            self.parameters = [*self.parameters, *group]
            self.adam.add_param_group({"params": group, "lr": own_lr, "weight_decay": 0.0, "fixed_lr": True})
        self._refuse_half()
        self.after_clip: Callable[[float], None] | None = None
        self.steps = 0

    def _refuse_half(self) -> None:
        for name, parameter in self.named:
            if parameter.dtype in (torch.bfloat16, torch.float16):
                short = str(parameter.dtype).removeprefix("torch.")
                raise ConfigError(
                    f"the weights that are trained are {short} ({name}), which rounds small steps away: set "
                    f"policy.dtype=float32, and policy.autocast=true for matrix products in bfloat16"
                )

    def zero_grad(self) -> None:
        """Drops the gradients."""
        self.adam.zero_grad(set_to_none=True)

    def step(self, loss: Tensor) -> Tensor:
        """Clips, checks and steps; gradients must have been computed.

        Args:
            loss: the loss they came from, for the check.

        Returns:
            The gradient norm before clipping, a scalar tensor.

        Raises:
            NonFiniteError: the loss or a gradient is not finite; names it and the step; nothing was changed.
        """
        bound = self.max_grad_norm if self.max_grad_norm is not None else float("inf")
        norm = nn.utils.clip_grad_norm_(self.parameters, bound)
        if not bool(torch.isfinite(loss.detach() + norm)):
            self._refuse(loss)
        if self.after_clip is not None:
            self.after_clip(min(1.0, bound / (float(norm) + 1e-6)))
        self.adam.step()
        self.steps += 1
        return norm

    def set_lr(self, lr: float) -> None:
        """Sets the learning rate of every group."""
        for group in self.adam.param_groups:
            if not group.get("fixed_lr", False):
                group["lr"] = lr

    @contextmanager
    def scaled_lr(self, scale: float) -> Iterator[None]:
        """Multiplies every learning rate inside the block, and restores it."""
        before = [group["lr"] for group in self.adam.param_groups]
        try:
            for group, lr in zip(self.adam.param_groups, before, strict=True):
                group["lr"] = lr * scale
            yield
        finally:
            for group, lr in zip(self.adam.param_groups, before, strict=True):
                group["lr"] = lr

    def moments(self) -> dict[Tensor, dict[str, Tensor]]:
        """A copy of the moments and step counts of every parameter that has taken a step."""
        return {p: {key: x.clone() for key, x in state.items()} for p, state in self.adam.state.items()}

    @torch.no_grad()
    def mix_moments(self, before: dict[Tensor, dict[str, Tensor]], share: float) -> None:
        """Moves moments and step counts to ``before + share * (now - before)``; what was not there before was 0."""
        for p, state in self.adam.state.items():
            for key, now in state.items():
                old = before[p][key] if p in before else torch.zeros_like(now)
                now.copy_(torch.lerp(old, now, share))

    def state_dict(self) -> dict[str, Any]:
        """Moments and step counts, by parameter position."""
        return {"adam": self.adam.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.adam.load_state_dict(state["adam"])
        self.steps = state["steps"]

    def _refuse(self, loss: Tensor) -> None:
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(f"the loss is {float(loss)} at optimiser step {self.steps}; the step was not taken")
        name = first_non_finite((n, p.grad) for n, p in self.named)
        raise NonFiniteError(
            f"the gradient of {name or 'the parameters (its norm overflows)'} is not finite at optimiser step "
            f"{self.steps}; the step was not taken"
        )
