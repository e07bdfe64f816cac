"""A device by its name, where this machine has it."""

from __future__ import annotations

import torch

from unified_rl.errors import ConfigError


def device_of(name: str, setting: str = "device") -> torch.device:
    """The device that a setting names.

    Raises:
        ConfigError: no device that rows or weights can live on, or one that this machine lacks.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"{setting}={name} is not a device; use cpu, cuda or cuda:N") from error
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if found == 0:
            raise ConfigError(f"{setting}={name}, but torch {torch.__version__} sees no CUDA device; use {setting}=cpu")
        if (device.index or 0) >= found:
            raise ConfigError(f"{setting}={name}, but there are {found} CUDA devices; use cuda:0 to cuda:{found - 1}")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"{setting}={name}, but torch {torch.__version__} sees no Apple GPU; use {setting}=cpu")
    elif device.type not in ("cpu", "mps"):
        raise ConfigError(f"{setting}={name} holds no rows or weights; use cpu, cuda or cuda:N")
    return device
