"""In how many processes a run trains: what the configuration says, against how this process was started."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unified_rl.configurable import configurable
from unified_rl.errors import ConfigError
from unified_rl.instantiate import nearest
from unified_rl.launching import launched, local
from unified_rl.ranges import Seconds, ranged

LAUNCH = "unified-rl launch --processes N train"


@configurable
@ranged("learner")
class DataParallel:
    """Every process holds the run's rows, weights and streams; they divide the passes over the model.

    How many there are follows from how the command was started, and is no part of the configuration.

    Args:
        timeout: seconds that one may wait for another inside an update. Process 0's own work, collecting, evaluating
            and saving, is waited for without a limit.
    """

    def __init__(self, timeout: Seconds = 120.0) -> None:
        self.timeout = timeout


@configurable
@ranged("learner")
class FullyShard(DataParallel):
    """As :class:`DataParallel`, and each process holds a piece of every model's weights, gradients and moments.

    Whole layers are gathered from the pieces while a pass goes through them (FSDP2). Process 0 also keeps the policy
    whole, to sample from.

    Args:
        timeout: see there.
    """

    def __init__(self, timeout: Seconds = 120.0) -> None:
        super().__init__(timeout)


NAMES: dict[str, type[DataParallel]] = {"data_parallel": DataParallel, "fsdp": FullyShard}
"""What ``learner=`` calls them."""


def name_of(cfg: Mapping[str, Any]) -> str:
    """What ``learner=`` calls the learner of a configuration."""
    target = str((cfg.get("learner") or {}).get("_target_", "")).rpartition(".")[2]
    return next((name for name, kind in NAMES.items() if kind.__name__ == target), "data_parallel")


def is_parallel(cfg: Mapping[str, Any]) -> bool:
    """Whether a configuration asks for several processes."""
    return bool(cfg.get("learner"))


def refuse_alone(cfg: Mapping[str, Any]) -> None:
    """Refuses a run that is made for several processes, where this one trains by itself.

    Raises:
        ConfigError: says how it is started, or what to set.
    """
    if is_parallel(cfg):
        raise ConfigError(
            f"learner={name_of(cfg)} trains in several processes, and this is one: start it with '{LAUNCH} ...', or "
            "set learner=single"
        )


def check_learner(cfg: Mapping[str, Any]) -> None:
    """Refuses a configuration that does not fit how this process was started, or that several processes cannot run.

    Raises:
        ConfigError: says what to set, or how to start.
    """
    found = launched()
    if found is None:
        refuse_alone(cfg)
        return
    if not is_parallel(cfg):
        raise ConfigError(
            f"this process was launched as one of {found[1]}, and learner=single trains in one: add "
            "learner=data_parallel (or fsdp), or call unified-rl train without launch"
        )
    if cfg.get("steps") == 0:
        raise ConfigError("steps=0 makes a warm start alone, which one process does: call unified-rl train for it")
    if (cfg.get("replay") or {}).get("storage") == "memmap":
        raise ConfigError(
            f"replay.storage=memmap is a folder of one process, and with learner={name_of(cfg)} each holds the rows "
            "itself: set replay.storage=memory"
        )
    device = str(cfg.get("device", "cpu"))
    if device.startswith("cuda:"):
        raise ConfigError(
            f"device={device} is one device, and each process of learner={name_of(cfg)} takes its own: set device=cuda"
        )


def as_launched(cfg: Mapping[str, Any], learner: str | None = None) -> dict[str, Any]:
    """The configuration of a run that goes on, with the learner that this process was started as.

    Args:
        cfg: of the run.
        learner: another one than the run's, a name of :data:`NAMES`.

    Raises:
        ConfigError: an unknown name, or one that does not fit how this process was started.
    """
    if learner is not None and learner not in (*NAMES, "single"):
        raise ConfigError(f"learner={learner[:60]} is unknown; {nearest(learner, [*NAMES, 'single'])}")
    if launched() is None:
        if learner in NAMES:
            refuse_alone({"learner": {"_target_": NAMES[learner].__name__}})
        return {**cfg, "learner": None}
    if learner == "single":
        return {**cfg, "learner": None}
    if learner is None and cfg.get("learner"):
        return dict(cfg)
    kind = NAMES[learner or "data_parallel"]
    own = {key: x for key, x in (cfg.get("learner") or {}).items() if key != "_target_"}
    return {**cfg, "learner": {"_target_": f"{kind.__module__}.{kind.__qualname__}", **own}}


def own_device(name: str) -> str:
    """The device of this process: of several on one machine each has its own."""
    return f"cuda:{local()[0]}" if name == "cuda" and launched() is not None else name
