"""Which server a process of a run samples with."""

from __future__ import annotations

from typing import Any

from unified_rl.errors import ConfigError
from unified_rl.policies.engines import EngineSettings
from unified_rl.rollout import LanguageRollout
from unified_rl.training.engine import RayEngine


def check_servers(settings: EngineSettings, engine: RayEngine | None, worker: int) -> int:
    """The number of this process's server.

    Two workers sample with weights of two versions at a time, and a server holds one: so each has a server of its own.
    A run's own process samples with none where workers do.

    Args:
        settings: of the policy.
        engine: of the run; None in a worker, and in a run without workers.
        worker: which one this process is.

    Raises:
        ConfigError: another number of servers than of workers.
    """
    servers = len(settings.servers)
    if not servers:
        return 0
    if engine is not None and engine.workers != servers:
        raise ConfigError(
            f"policy.server names {servers} server(s), and engine.workers={engine.workers}: workers sample with "
            "weights of different versions at the same time, so give each a server of its own, "
            "policy.server=[http://HOST:PORT,...]"
        )
    return worker


def check_sampling(settings: EngineSettings, engine: RayEngine | None, rollout: Any) -> None:
    """Refuses engines that would have nothing to do.

    Args:
        settings: of the policy.
        engine: of the run.
        rollout: of the run; None where it has none.

    Raises:
        ConfigError: several servers where one process samples, weights in flight, or an engine where the policy's rows
            are there already.
    """
    if engine is None and len(settings.servers) > 1:
        raise ConfigError(
            f"policy.server names {len(settings.servers)} servers, and a run without workers samples with one: name "
            "one, or set engine=ray engine.workers=N rollout.staleness=N"
        )
    if settings.plain:
        return
    name = "engine_dtype" if settings.engine == "own" else "engine"
    if engine is not None and engine.in_flight:
        raise ConfigError(
            f"engine.in_flight=true changes weights inside the own decoding loop, and policy.{name}="
            f"{getattr(settings, name)} samples with a copy of them: set engine.in_flight=false, or leave that out"
        )
    if not isinstance(rollout, LanguageRollout):
        raise ConfigError(
            f"policy.{name}={getattr(settings, name)} would be of no effect: it is of rollouts that the policy samples "
            "(rollout=language), and this run has none; leave it out"
        )
