"""An environment of a configuration, with what its settings put around it: for runs and for sets of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from unified_rl.config import build
from unified_rl.errors import ConfigError, UnifiedRLError
from unified_rl.interop.torchrl_env import TorchRLControlEnv, as_environment
from unified_rl.interop.words import one_line
from unified_rl.wrapping import Parameter, split, wrap


def make_environment(
    node: Mapping[str, Any],
    taken: Mapping[str, Parameter],
    build_node: Callable[[dict[str, Any]], Any],
    *,
    num_envs: int,
    seed: int,
    gamma: float | None,
    allow: Sequence[str] = (),
) -> Any:
    """An environment of either domain.

    Args:
        node: of the group ``env``.
        taken: keywords of its target.
        build_node: makes one of the node that is left without the wrappers' settings; of a single environment of
            somebody else's it is called once a copy.
        num_envs: simulations.
        seed: of them.
        gamma: discount of a step, within what is executed at once; None is the wrappers' default.
        allow: packages that configuration may build.

    Raises:
        ConfigError: it cannot be made, or not be wrapped.
    """
    wrapping, own = split(node, taken)

    def make() -> Any:
        return build_node(own)

    make.__name__ = own["_target_"] if isinstance(own["_target_"], str) else make.__name__
    try:
        env = as_environment(make(), make, num_envs, seed)
    except UnifiedRLError:
        raise
    except (Exception, SystemExit) as error:  # somebody else's constructor
        raise ConfigError(f"env: {own['_target_']} could not be made: {one_line(error)}") from error
    if isinstance(env, TorchRLControlEnv):
        env.seed(seed)
    return wrap(env, wrapping, partial(build, allow=allow, setting="env"), gamma) if env.domain == "control" else env
