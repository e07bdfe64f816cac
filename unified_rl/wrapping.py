"""Settings that every control environment takes beside its own: what is put around one before a run uses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

from unified_rl.errors import ConfigError
from unified_rl.ranges import Count

PLACE = "unified_rl.envs.control"


@dataclass(frozen=True)
class Wrapping:
    """Of the group ``env``, for any control environment; in this order from the inside out.

    Attributes:
        action_repeat: steps that one action is executed for.
        frame_stack: newest observations that the policy sees, oldest first; the first of an episode stands for those
            before it.
        chunk: actions of one decision, which are executed open loop.
    """

    action_repeat: Count = 1
    frame_stack: Count = 1
    chunk: Count = 1


class Parameter(Protocol):
    """A keyword of a target."""

    @property
    def default(self) -> Any:
        """Its default."""
        ...


NAMES = tuple(field.name for field in fields(Wrapping))


def wraps(group: str, target: Callable[..., Any]) -> bool:
    """Whether a node of a group takes :class:`Wrapping`'s settings."""
    return group == "env" and getattr(target, "domain", "control") != "language"


def split(node: Mapping[str, Any], own: Mapping[str, Parameter]) -> tuple[Wrapping, dict[str, Any]]:
    """What is put around an environment, and the node of the environment itself.

    Args:
        node: of the group ``env``, checked.
        own: settings of its target, which keep their meaning there; but a history is one of steps, and not of chunks.
    """
    given = {name: node[name] for name in NAMES if name in node and name not in own}
    plain = "chunk" in own and own["chunk"].default == 1  # the target puts its chunks around what has none
    if plain and node.get("chunk", 1) > 1 and max(given.values(), default=1) > 1:
        given["chunk"] = node["chunk"]
    return Wrapping(**given), {key: value for key, value in node.items() if key not in given}


def wrap(env: Any, wrapping: Wrapping, build: Callable[..., Any], gamma: float | None) -> Any:
    """The environment with what is put around it.

    Args:
        env: a :class:`~unified_rl.protocols.ControlEnv`.
        wrapping: what is.
        build: ``(node, **given)`` to an object.
        gamma: discount of a step, within what is executed at once.

    Raises:
        ConfigError: an environment that cannot step some of its simulations.
    """
    wanted = [name for name, value in asdict(wrapping).items() if value > 1]
    if wanted and not hasattr(env, "advance"):
        raise ConfigError(
            f"env.{wanted[0]} needs an environment whose simulations can be stepped apart, and {type(env).__name__} "
            f"is none: {_instead(env)}"
        )
    discount = {} if gamma is None else {"gamma": gamma}
    if wrapping.action_repeat > 1:
        env = build({"_target_": f"{PLACE}.ActionRepeat"}, env=env, times=wrapping.action_repeat, **discount)
    if wrapping.frame_stack > 1:
        env = build({"_target_": f"{PLACE}.FrameStack"}, env=env, frames=wrapping.frame_stack)
    if wrapping.chunk > 1:
        env = build({"_target_": f"{PLACE}.ActionChunk"}, env=env, horizon=wrapping.chunk, **discount)
        vars(env).pop("demonstrations", None)  # an expert of single actions gives no plans
    return env


def _instead(env: Any) -> str:
    """What to do with an environment that others step."""
    if hasattr(getattr(env, "env", None), "single_observation_space"):  # a gymnasium.vector.VectorEnv
        return (
            "give one environment with env=gymnasium env.make=module:function, of which copies are made, or let "
            f"{env.name} put Gymnasium's own wrappers around each of its copies"
        )
    return "TorchRL's own are made by its transforms (CatFrames, FrameSkipTransform)"
