"""One optimiser step that refuses NaN: AdamW or another, clipped gradients, a check before the parameters move."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unified_rl.errors import ConfigError, NonFiniteError
from unified_rl.flat_weights import FlatWeights
from unified_rl.instantiate import allowed, locate, nearest
from unified_rl.protocols import HasWeights
from unified_rl.ranges import shown
from unified_rl.shard import in_pieces, local

NAMES = ("AdamW", "Adam", "NAdam", "RAdam", "Adamax", "Adafactor", "Adagrad", "Adadelta", "RMSprop", "SGD")
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {name.lower(): getattr(torch.optim, name) for name in NAMES}
"""Optimisers of torch by name; those that need a closure, sparse gradients or matrices alone are left out."""
FUSED = ("adamw", "adam", "sgd")
"""Those whose one kernel for all weights is used unless ``fused: false`` is set."""
TORCH = "torch.optim."

Node = str | Mapping[str, Any]


def first_non_finite(named: Iterable[tuple[str, Tensor | None]]) -> str | None:
    """The name of the first tensor with a NaN or infinity."""
    for name, value in named:
        if value is not None and not bool(torch.isfinite(value).all()):
            return name
    return None


def decays(name: str, weight: Tensor) -> bool:
    """Whether weight decay is meant for a weight: for matrices and embeddings, not for biases and gains of norms.

    As in the Trainer of transformers, embeddings decay, and biases and norms do not; neither does any other vector,
    such as a standard deviation.
    """
    return weight.ndim >= 2 and not name.endswith("bias")


def optimizer_class(node: Node, where: str = "agent.optimizer") -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The optimiser that a setting names, and its options.

    Args:
        node: a name of :data:`OPTIMIZERS`, a dotted path (``torch.optim:SGD``; others under ``--allow``), or a mapping
            with ``name`` and the optimiser's own options.
        where: the full name of the setting, for errors.

    Raises:
        ConfigError: an unknown optimiser or option (names the nearest), or one that the agent sets itself.
    """
    options = {"name": node} if isinstance(node, str) else dict(node)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"{where} needs a name, got {shown(node)}; known: {', '.join(OPTIMIZERS)}")
    found = _optimizer_named(name.replace(":", "."), where)
    known = [key for key in inspect.signature(found).parameters if key != "params"]
    for key in options:
        if key in ("lr", "weight_decay", "capturable", "differentiable"):
            agents = f"set {where.split('.')[0]}.{key} instead" if key in ("lr", "weight_decay") else "leave it out"
            raise ConfigError(f"{where} {name!r}: {key} is not set here; {agents}")
        if key not in known:
            raise ConfigError(f"{where} {name!r} has no option {key!r}; {nearest(key, known)}")
    return found, {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}


def _optimizer_named(name: str, where: str) -> type[torch.optim.Optimizer]:
    short = name.removeprefix(TORCH).lower()
    if short in OPTIMIZERS and (name.startswith(TORCH) or "." not in name):
        return OPTIMIZERS[short]
    if "." not in name or name.startswith(TORCH):
        raise ConfigError(f"{where} {shown(name)} is unknown; {nearest(short, OPTIMIZERS)}")
    found = locate(name, allowed(), where, key="")
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ConfigError(f"{where} {shown(name)} is no torch.optim.Optimizer; derive it from that class")
    return found


def make_optimizer(
    parameters: Sequence[Any], lr: float, kind: Node = "adam", capturable: bool = False, **given: Any
) -> torch.optim.Optimizer:
    """An optimiser of torch with one kernel for all weights where it has one.

    Args:
        parameters: what it moves, tensors or groups of them.
        lr: learning rate.
        kind: see :func:`optimizer_class`; the mapping's own options win.
        capturable: needed inside a captured CUDA graph.
        given: further options, for those that take them.

    Raises:
        ConfigError: it refuses its options.
    """
    found, options = optimizer_class(kind)
    taken = inspect.signature(found).parameters
    own: dict[str, Any] = {"lr": lr, "fused": found.__name__.lower() in FUSED or None, **given}
    if isinstance(getattr(taken.get("eps"), "default", None), tuple):
        own.pop("eps", None)
    if capturable:
        own["capturable"] = True
    try:
        return found(parameters, **{k: v for k, v in {**own, **options}.items() if k in taken})
    except (TypeError, ValueError, RuntimeError) as error:  # each checks its options with errors of its own
        raise ConfigError(f"agent.optimizer {found.__name__}: {str(error).splitlines()[0][:200]}") from error


class Optimizer:
    """AdamW, or another, over named modules: a global gradient-norm bound, and a finiteness check before every step.

    Args:
        modules: modules by name; names appear in errors.
        lr: learning rate.
        weight_decay: decay of the weights that :func:`decays` names; decoupled with AdamW.
        betas: Adam's decay rates.
        eps: Adam's denominator offset.
        max_grad_norm: bound of the global gradient norm; None for no bound.
        capturable: needed inside a captured CUDA graph.
        rates: learning rates of some of ``modules``, in place of ``lr``; :meth:`set_lr` moves them where it is told to.
        extra: further modules by name, each with a learning rate of its own, which :meth:`set_lr` leaves alone.
        kind: the optimiser, see :func:`optimizer_class`; ``betas`` and ``eps`` are for those that take them, and the
            mapping's own win.

    Attributes:
        adam: the optimiser of torch, whichever it is. From the first step on its groups may hold a module's weights
            joined into one (:class:`~unified_rl.flat_weights.FlatWeights`); :meth:`state_dict` has each by itself.
        clip: bounds the norm of the gradient, and says what it was.
        after_clip: called between the bound on the gradient's norm and the step, with the factor that it applied.

    Raises:
        ConfigError: half-precision parameters (a step of the usual size is below their last digit), or an optimiser
            that refuses its options.
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
        kind: Node = "adamw",
        rates: Mapping[str, float] | None = None,
    ) -> None:
        self.named = [
            (f"{prefix}.{name}", parameter)
            for prefix, module in modules.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        ]
        self.parameters = [parameter for _, parameter in self.named]
        self.lr, self.max_grad_norm = lr, max_grad_norm
        found = optimizer_class(kind)[0]
        if weight_decay and "weight_decay" not in inspect.signature(found).parameters:
            raise ConfigError(f"agent.weight_decay={weight_decay}, but {found.__name__} has none; set it to 0")
        options: dict[str, Any] = {"weight_decay": weight_decay, "betas": betas, "eps": eps}
        self.adam = make_optimizer(self._groups(weight_decay, rates or {}), lr, kind, capturable, **options)
        for name, (module, own_lr) in (extra or {}).items():
            added = [(f"{name}.{key}", parameter) for key, parameter in module.named_parameters()]
            self.named += added
            group = [parameter for _, parameter in added]
            self.parameters = [*self.parameters, *group]
            self.adam.add_param_group({"params": group, "lr": own_lr, "weight_decay": 0.0, "fixed_lr": True})
        self._refuse_half()
        self.after_clip: Callable[[float], None] | None = None
        self.clip: Callable[[Sequence[Tensor], float], Tensor] = nn.utils.clip_grad_norm_
        self.steps = 0
        self._flat: FlatWeights | None = None
        self._parted: FlatWeights | None = None
        self._joins = True
        self._pieces: dict[nn.Parameter, Any] = {}
        """The rows that this process holds, and the weights that they are of."""

    def _groups(self, weight_decay: float, rates: Mapping[str, float]) -> Any:
        """The weights, in groups by their learning rate, and with and without decay where there is any."""
        if not weight_decay and not rates:
            return self.parameters
        groups: list[dict[str, Any]] = []
        for role in (None, *rates):
            own = [(n, p) for n, p in self.named if (r if (r := n.split(".")[0]) in rates else None) == role]
            rate = {} if role is None else {"lr": rates[role], "role": role}
            if not weight_decay:
                groups.append({"params": [p for _, p in own], **rate})
                continue
            groups.append({"params": [p for n, p in own if decays(n, p)], **rate})
            groups.append({"params": [p for n, p in own if not decays(n, p)], "weight_decay": 0.0, **rate})
        return [group for group in groups if group["params"]]

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
        for weight in self.parameters:
            weight.grad = None

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
        flat = self._joined()
        norm = self.clip(self.parameters, bound) if flat is None else flat.clip(bound)
        if not math.isfinite(float(loss.detach() + norm)):
            self._refuse(loss)
        if self.after_clip is not None:
            self.after_clip(min(1.0, bound / (float(norm) + 1e-6)))
        if flat is None:
            self._step()
        else:
            flat.step()
        self.steps += 1
        return norm

    def _joined(self) -> FlatWeights | None:
        """The weights in one piece with their gradients, where that is the same step for less; else None."""
        self._join()
        if self._flat is not None and not (self.after_clip is None and self._flat.gather()):
            self._part()
            self._joins = False
        return self._flat

    def _join(self) -> None:
        if self._flat is None and self._joins and self.after_clip is None:
            self._joins = FlatWeights.possible(self.adam)
            self._flat = FlatWeights(self.adam, self.named) if self._joins else None

    def _part(self) -> None:
        """Every weight has a place of its own in the optimiser."""
        if self._flat is not None:
            self._flat.part()
            self._parted, self._flat = self._flat, None

    def exchange(self, found: Mapping[int, Any], place: Callable[[Tensor, Any], Any]) -> None:
        """Moves this process's pieces in place of whole weights, before the first step.

        Args:
            found: by ``id`` of the weight that is replaced, the ``DTensor`` in its place.
            place: ``(rows, weight)`` makes one of a moment's rows, cut as a weight is.
        """
        self.named = [(name, found.get(id(weight), weight)) for name, weight in self.named]
        self.parameters = [found.get(id(weight), weight) for weight in self.parameters]
        for group in self.adam.param_groups:
            for number, weight in enumerate(group["params"]):
                if id(weight) in found:
                    own = nn.Parameter(found[id(weight)].detach().to_local())
                    self._pieces[own] = found[id(weight)]
                    group["params"][number] = own
        self._place, self._joins = place, False

    @property
    def placed(self) -> list[Any]:
        """Its weights in the order of :meth:`state_dict`."""
        return [self._pieces.get(w, w) for group in self.adam.param_groups for w in group["params"]]

    def _step(self) -> None:
        """A step of the optimiser of torch, on this process's rows where weights are in pieces."""
        for own, weight in self._pieces.items():
            own.data = weight.detach().to_local()
            own.grad = None if weight.grad is None else weight.grad.to_local()
        self.adam.step()
        for own in self._pieces:
            own.grad = None

    @property
    def rate(self) -> float:
        """The present learning rate of the weights that :meth:`set_lr` moves."""
        return float(self.adam.param_groups[0]["lr"])

    def set_lr(self, lr: float, rates: Mapping[str, float] | None = None) -> None:
        """Sets the learning rate of every group; of modules with a rate of their own that of ``rates``."""
        for group in self.adam.param_groups:
            if not group.get("fixed_lr", False):
                group["lr"] = lr if group.get("role") is None else (rates or {}).get(group["role"], group["lr"])

    def rate_of(self, role: str) -> float | None:
        """The present learning rate of a module that has one of its own; None without."""
        return next((float(g["lr"]) for g in self.adam.param_groups if g.get("role") == role), None)

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
        """A copy of the moments and step counts of every parameter that has taken a step, for :meth:`mix_moments`.

        Those of joined weights are one entry.
        """
        self._join()
        return {
            p: {key: x.clone() for key, x in state.items() if isinstance(x, Tensor)}
            for p, state in self.adam.state.items()
        }

    @torch.no_grad()
    def mix_moments(self, before: dict[Tensor, dict[str, Tensor]], share: float) -> None:
        """Moves moments and step counts to ``before + share * (now - before)``; what was not there before was 0."""
        if self._parted is not None:  # since then
            before = self._parted.parted(before)
        for p, state in self.adam.state.items():
            for key, now in state.items():
                if not isinstance(now, Tensor):
                    continue
                old = before[p][key] if p in before else torch.zeros_like(now)
                now.copy_(torch.lerp(old, now, share))

    def state_dict(self) -> dict[str, Any]:
        """Moments and step counts, by parameter position."""
        self._part()
        found = self.adam.state_dict()
        if self._pieces:
            found["state"] = {
                number: {
                    key: self._place(x, weight) if isinstance(x, Tensor) and x.ndim and in_pieces(weight) else x
                    for key, x in found["state"][number].items()
                }
                for number, weight in enumerate(self.placed)
                if number in found["state"]
            }
        return {"adam": found, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self._part()
        found = dict(state["adam"])
        if self._pieces:
            found["state"] = {
                number: {key: local(x) for key, x in held.items()} for number, held in found["state"].items()
            }
        self.adam.load_state_dict(found)
        self.steps = state["steps"]

    def _refuse(self, loss: Tensor) -> None:
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(f"the loss is {float(loss)} at optimiser step {self.steps}; the step was not taken")
        name = first_non_finite((n, p.grad) for n, p in self.named)
        raise NonFiniteError(
            f"the gradient of {name or 'the parameters (its norm overflows)'} is not finite at optimiser step "
            f"{self.steps}; the step was not taken"
        )
