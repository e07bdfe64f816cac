"""Code of the user's own at five moments of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from unified_rl.errors import ConfigError
from unified_rl.instantiate import build, is_node, locate
from unified_rl.protocols import Stateful
from unified_rl.training.failures import foreign

if TYPE_CHECKING:
    from tensordict import TensorDict

    from unified_rl.training.trainer import Trainer

HOOKS = ("on_run_begin", "on_rollout_end", "on_update_end", "on_evaluation_end", "on_run_end")


class Callback:
    """Base of callbacks; each hook does nothing here, and a class of another base needs only those that it wants.

    A hook that returns False asks for a stop, as ``trainer.stop("why")`` does: the run ends after the update under way
    with an evaluation and a checkpoint. What a callback keeps between updates goes into ``state_dict`` and
    ``load_state_dict`` (plain values and tensors), so that a resumed run goes on with it.

    Attributes:
        metrics: names of metrics of its own, which it hands to
            :meth:`~unified_rl.training.trainer.Trainer.add_metrics` in ``on_update_end``, so that ``keep_best`` and
            ``early_stopping`` may watch them.
    """

    metrics: Sequence[str] = ()

    def on_run_begin(self, trainer: Trainer) -> bool | None:
        """Before the first update, also where a run goes on: ``trainer.updates`` says from where."""

    def on_rollout_end(self, trainer: Trainer, rows: TensorDict, metrics: dict[str, float]) -> bool | None:
        """After rows were collected and taken for the next update (not of agents that collect by themselves)."""

    def on_update_end(self, trainer: Trainer, metrics: dict[str, Any]) -> bool | None:
        """After an update; ``metrics`` are its own, scalar tensors or floats."""

    def on_evaluation_end(self, trainer: Trainer, metrics: dict[str, float]) -> bool | None:
        """After an evaluation was logged; ``metrics`` are those of the logged row."""

    def on_run_end(self, trainer: Trainer) -> bool | None:
        """After the last checkpoint of a run that ended by its budget or by a stop; not after an error or a signal."""


class Callbacks:
    """The callbacks of a run, called in order.

    Args:
        members: objects with any of the hooks.
        names: what each is called in errors and checkpoints; by default their classes' names.

    Raises:
        ConfigError: an object without any hook.
    """

    def __init__(self, members: Sequence[Any] = (), names: Sequence[str] = ()) -> None:
        self.members = list(members)
        self.names = list(names) or [f"{type(m).__module__}.{type(m).__qualname__}" for m in self.members]
        for name, member in zip(self.names, self.members, strict=True):
            if not any(callable(getattr(member, hook, None)) for hook in HOOKS):
                raise ConfigError(f"the callback {name} has none of the hooks {', '.join(HOOKS)}")

    def __call__(self, hook: str, trainer: Trainer, *given: Any) -> None:
        """Calls a hook of all of them.

        Raises:
            RolloutError: one raised; names the callback, the hook and the place.
        """
        for name, member in zip(self.names, self.members, strict=True):
            function = getattr(member, hook, None)
            if function is None:
                continue
            with foreign(f"the callback {name}.{hook}"):
                goes_on = function(trainer, *given)
            if goes_on is False:
                trainer.stop(f"the callback {name}.{hook} asked for it")

    def state_dict(self) -> dict[str, Any]:
        """Of those that have one, by their place in the list."""
        with foreign("a callback's state_dict"):
            return {str(i): m.state_dict() for i, m in enumerate(self.members) if isinstance(m, Stateful)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`; a callback that the state does not know begins anew."""
        for place, own in state.items():
            if int(place) < len(self.members) and isinstance(self.members[int(place)], Stateful):
                with foreign("a callback's load_state_dict"):
                    self.members[int(place)].load_state_dict(own)


def make_callbacks(
    nodes: Sequence[Any] | str | Mapping[str, Any], objects: Sequence[Any] = (), allow: Sequence[str] = ()
) -> Callbacks:
    """The callbacks that a configuration names, and behind them those given as objects.

    Args:
        nodes: dotted paths (``my.module:MyCallback``), or mappings with ``_target_`` and arguments; or one of them.
        objects: from Python; a class is made without arguments.
        allow: packages that paths may name.

    Raises:
        ConfigError: a path that is not allowed or not found, or what has no hook.
    """
    members, names = [], []
    for number, node in enumerate([nodes] if isinstance(nodes, str | Mapping) else nodes):
        where = f"callbacks[{number}]"
        if is_node(node):
            members.append(build({**node, "_target_": _dotted(node["_target_"])}, allow=allow, setting=where))
            names.append(str(node["_target_"]))
            continue
        target = locate(_dotted(node), allow, where, "")
        with foreign(f"{where}, {node}"):
            members.append(target() if isinstance(target, type) else target)
        names.append(str(node))
    for given in objects:
        member = given() if isinstance(given, type) else given
        members.append(member)
        names.append(f"{type(member).__module__}.{type(member).__qualname__}")
    return Callbacks(members, names)


def check_nodes(nodes: Sequence[Any], allow: Sequence[str]) -> None:
    """Finds every class that the configuration names, without making one.

    Raises:
        ConfigError: a path that is not allowed or not found.
    """
    for number, node in enumerate(nodes):
        if not isinstance(node, str) and not is_node(node):
            raise ConfigError(
                f"callbacks[{number}] is {node!r}; it must be a dotted path such as my.module:MyCallback, or a mapping "
                "with _target_"
            )
        locate(_dotted(node if isinstance(node, str) else node["_target_"]), allow, f"callbacks[{number}]", "")


def _dotted(path: Any) -> Any:
    return path.replace(":", ".", 1) if isinstance(path, str) else path
