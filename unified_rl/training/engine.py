"""Where a run collects: settings of ``engine=ray``, and what cannot be collected outside the run's own process."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from unified_rl.configurable import configurable
from unified_rl.errors import ConfigError
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.policies.generation import has_plain_cache
from unified_rl.protocols import NumbersRows
from unified_rl.ranges import Count, Devices, Whole, ranged, shown
from unified_rl.replay import HindsightReplay
from unified_rl.rollout import DemonstrationRollout, LanguageRollout
from unified_rl.rollout.tickets import LOST, WAITED, Cluster, TicketFeed
from unified_rl.rollout.weights import Flat, pack

ELSEWHERE = ("callbacks", "engine", "keep_best", "early_stopping", "warm_start", "logger")
"""Of a run's configuration: what workers have no part in."""


@configurable
@ranged("engine")
class RayEngine:
    """Rollouts in Ray actors, each built from the run's own configuration, here or on machines of a cluster.

    Args:
        workers: actors, at most ``rollout.staleness + 1``, which is how many batches are under way; in periodic order
            as many as there are prompts.
        order: ``ticket`` takes batches in the order in which they were begun: rows are at most ``rollout.staleness``
            updates old, and a run is the same twice. ``completion`` takes whichever is done first, and promises
            neither: a slow batch is overtaken without end. ``periodic`` lets every worker answer its part of each
            batch's prompts, all by one version, while the update waits (language, ``rollout.staleness=0``).
        in_flight: new weights are also given to batches under way, between two tokens of a language model, which keeps
            what it has read. Each token is stored with the version that sampled it. Then no run is the same twice.
        restarts: lost workers that are replaced, in one run of the command.
        num_cpus: of an actor, as Ray counts them.
        num_gpus: of an actor; with 0 it samples on the CPU, whatever ``device`` the run has.
        address: ``HOST:PORT`` of a Ray cluster, or ``auto`` for the one that this machine belongs to. Null starts one
            on this machine, and ends it with the run.
        env_vars: environment variables of the actors' processes.

    Attributes:
        metrics: names of what a run with it logs beside the rollout's own.
    """

    def __init__(
        self,
        workers: Count = 1,
        order: Literal["ticket", "completion", "periodic"] = "ticket",
        in_flight: bool = False,
        restarts: Whole = 10,
        num_cpus: Devices = 1.0,
        num_gpus: Devices = 0.0,
        address: str | None = None,
        env_vars: dict[str, str] | None = None,
    ) -> None:
        self.workers, self.order, self.in_flight, self.restarts = workers, order, in_flight, restarts
        self.num_cpus, self.num_gpus, self.address = num_cpus, num_gpus, address
        self.env_vars = dict(env_vars or {})
        self.check_settings({"num_cpus": num_cpus, "num_gpus": num_gpus, "address": address})
        apart = {f"{WAITED}/{worker}" for worker in range(workers)} if workers > 1 else set()
        self.metrics = frozenset({WAITED, LOST, *apart})

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> None:
        """Refuses, when a run is composed, what Ray would refuse later.

        Raises:
            ConfigError: a part beside whole devices, or an address that is none.
        """
        for name in ("num_cpus", "num_gpus"):
            each = settings.get(name) or 0.0
            if each > 1 and each != int(each):
                raise ConfigError(f"engine.{name}={each} must be a part of one, or a whole number")
        address = settings.get("address")
        if address is None or address == "auto":
            return
        if "://" in address:
            raise ConfigError(
                f"engine.address={address}: the run must be started on a machine of the cluster; set HOST:PORT, or "
                "auto there"
            )
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ConfigError(
                f"engine.address={shown(address)} is no HOST:PORT; write that of 'ray start --head', or auto"
            )

    def check_installed(self) -> None:
        """Raises ConfigError where Ray is not."""
        if importlib.util.find_spec("ray") is None:
            raise ConfigError("engine=ray needs Ray: pip install 'unified-rl[ray]', or use engine=local")

    def make_feed(self, cfg: Mapping[str, Any], allow: Sequence[str], policy: Any, rollout: Any) -> TicketFeed:
        """The feed of a run; nothing is started before it is opened.

        Args:
            cfg, allow: of the run's :class:`~unified_rl.training.build.Job`.
            policy: whose weights the workers sample with.
            rollout: like theirs; it collects nothing.
        """
        settings = worker_settings(cfg, allow, rollout, self.workers, on_gpu=self.num_gpus > 0)
        settings |= {"in_flight": self.in_flight, "parts": self.order == "periodic"}
        cluster = self.make_cluster(settings, partial(pack, policy))
        sizes = (self.workers, int(rollout.steps_per_collect), int(rollout.staleness))
        return TicketFeed(cluster, *sizes, order=self.order, restarts=self.restarts, seed=int(cfg.get("seed") or 0),
                          in_flight=self.in_flight)  # fmt: skip

    def make_cluster(self, settings: Mapping[str, Any], pack: Callable[[], Flat]) -> Cluster:
        """The workers, not yet started."""
        from unified_rl.training.ray_cluster import RayCluster

        return RayCluster(self, settings, pack)


def worker_settings(
    cfg: Mapping[str, Any], allow: Sequence[str], rollout: Any, workers: int, on_gpu: bool = False
) -> dict[str, Any]:
    """What :class:`~unified_rl.training.collector.Collector` begins with, but for the worker's number.

    Random steps at the start of a run are shared out, and how many conversations are sampled together, which follows
    from the memory of this machine, is settled for all.
    """
    mine = {key: value for key, value in cfg.items() if key not in ELSEWHERE}
    if not on_gpu:
        mine["device"] = "cpu"
    if random_steps := getattr(rollout, "random_steps", 0):
        mine["rollout"] = {**mine["rollout"], "random_steps": -(-random_steps // workers)}
    together = [rollout.generation_batch] if hasattr(rollout, "generation_batch") else None
    places = {"folder": os.getcwd(), "path": list(sys.path)}
    settled = {"workers": workers, "generation_batch": together, "in_flight": False, "parts": False}
    return {"cfg": mine, "allow": list(allow), **settled, **places}


def check_engine(engine: RayEngine | None, agent: str, rollout: Any, replay: Any, cfg: Mapping[str, Any]) -> None:
    """Refuses what cannot be collected by workers.

    Args:
        engine: None collects in this process.
        agent: its name.
        rollout: None where the agent steps an environment itself.
        replay: the run's.
        cfg: the run's configuration.

    Raises:
        ConfigError: says what does not work, and what does.
    """
    if engine is None:
        return
    name = (cfg.get("choices") or {}).get("rollout")
    if rollout is None:
        raise ConfigError(
            f"engine=ray would be of no effect: agent={agent} steps its environment itself; use engine=local, or an "
            "agent with a rollout (agent=ppo, agent=sac, agent=policy_gradient)"
        )
    if isinstance(rollout, DemonstrationRollout):
        raise ConfigError(
            f"engine=ray collects with the policy, and rollout={name} hands out rows that are there already: use "
            "engine=local (rollout=control and rollout=language can be collected by workers)"
        )
    if engine.order == "periodic":
        check_parts(engine.workers, rollout)
    else:
        check_bound(engine.workers, int(rollout.staleness))
    proximal = (cfg.get("correction") or {}).get("proximal") or {}
    if engine.order == "completion" and proximal.get("provider") == "versions":
        raise ConfigError(
            "engine.order=completion bounds no row's age, and correction.proximal.provider=versions keeps the weights "
            "of rollout.staleness versions alone: use engine.order=ticket, or correction=decoupled_ppo"
        )
    if engine.in_flight:
        check_in_flight(rollout)
    if engine.workers == 1:
        return
    if isinstance(replay, HindsightReplay):
        raise ConfigError(
            f"engine.workers={engine.workers}: replay=her looks for later steps of an episode behind it, where rows of "
            "several workers alternate; set engine.workers=1, or use replay=uniform"
        )
    if not isinstance(rollout, NumbersRows):
        raise ConfigError(
            f"engine.workers={engine.workers}: episodes of several workers must have numbers of their own, and "
            f"{type(rollout).__name__} has no number_from(first): give it one, or set engine.workers=1"
        )


def check_parts(workers: int, rollout: Any) -> None:
    """Refuses batches that cannot be shared out.

    Raises:
        ConfigError: says what it needs.
    """
    where = "engine.order=periodic"
    if not isinstance(rollout, LanguageRollout):
        raise ConfigError(
            f"{where} shares out the prompts of a batch, and this run collects by {type(rollout).__name__}: use "
            "engine.order=ticket with rollout.staleness=1 or more"
        )
    if rollout.staleness:
        raise ConfigError(
            f"{where} collects every batch within its update, so rollout.staleness={rollout.staleness} would be of no "
            "effect: set rollout.staleness=0, or engine.order=ticket"
        )
    if workers > rollout.prompts:
        raise ConfigError(
            f"engine.workers={workers} cannot share out rollout.prompts={rollout.prompts}: lower the one or raise the "
            "other"
        )
    if workers > 1 and rollout.curriculum is not None:
        raise ConfigError(
            f"{where} with engine.workers={workers}: rollout.curriculum draws prompts by the answers that it has seen, "
            "and each worker sees its own; set engine.workers=1, or engine.order=ticket"
        )
    if workers > 1 and rollout.sources:
        raise ConfigError(
            f"{where} with engine.workers={workers}: each worker would join the rows of rollout.sources "
            f"({', '.join(rollout.sources)}); set engine.workers=1, or engine.order=ticket"
        )


def check_in_flight(rollout: Any) -> None:
    """Refuses weights that would change under a rollout that cannot take them, or that would never change.

    Raises:
        ConfigError: says what it needs.
    """
    policy = getattr(rollout, "policy", None)
    if not isinstance(policy, CausalLM) or not has_plain_cache(policy.model):
        raise ConfigError(
            "engine.in_flight=true changes weights between two tokens of a language model with a plain key-value "
            f"cache, and this run samples with {type(policy).__name__}: leave it out"
        )
    if rollout.staleness == 0:
        raise ConfigError(
            "engine.in_flight=true would be of no effect with rollout.staleness=0, where no batch is under way during "
            "an update: set rollout.staleness=1 or more"
        )


def check_bound(workers: int, staleness: int) -> None:
    """Refuses workers that would never have anything to do.

    Raises:
        ConfigError: names both settings.
    """
    if workers > staleness + 1:
        raise ConfigError(
            f"engine.workers={workers} with rollout.staleness={staleness}: at most {staleness + 1} batch(es) are under "
            f"way, so {workers - staleness - 1} worker(s) would always wait; set rollout.staleness={workers - 1} or "
            f"more, or engine.workers={staleness + 1}"
        )
