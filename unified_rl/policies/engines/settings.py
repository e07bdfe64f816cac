"""Settings of a policy's engine: what goes together, known when a run is composed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args
from urllib.parse import SplitResult, urlsplit

from unified_rl.errors import ConfigError
from unified_rl.ranges import shown

Name = Literal["own", "transformers", "vllm", "sglang"]
Precision = Literal["float32", "bfloat16", "float8", "int8", "int4"]
Sync = Literal["disk", "nccl"]
SERVERS = ("vllm", "sglang")
COMMANDS = {
    "vllm": "VLLM_SERVER_DEV_MODE=1 vllm serve FOLDER --logprobs-mode processed_logprobs --generation-config vllm",
    "sglang": "python -m sglang.launch_server --model-path FOLDER (with SGLANG_RETURN_ORIGINAL_LOGPROB unset)",
}
"""How each server is started."""


@dataclass(frozen=True)
class EngineSettings:
    """As :class:`~unified_rl.policies.causal_lm.CausalLM` has them."""

    engine: Name = "own"
    engine_dtype: Precision | None = None
    server: str | list[str] | None = None
    server_folder: str | None = None
    server_sync: Sync = "disk"
    server_timeout: float = 600.0
    server_retries: int = 5
    server_requests: int = 64

    @property
    def servers(self) -> tuple[str, ...]:
        """Addresses, one for each worker."""
        given = self.server or ()
        return (given,) if isinstance(given, str) else tuple(given)

    @property
    def plain(self) -> bool:
        """Whether the policy itself samples."""
        return self.engine == "own" and self.engine_dtype is None


def check_engine_settings(settings: Mapping[str, Any]) -> None:
    """Refuses what does not go together.

    Args:
        settings: of the policy: those of :class:`EngineSettings`, and of sampling.

    Raises:
        ConfigError: names the setting and what works.
    """
    plain = EngineSettings()
    given = {field.name: settings.get(field.name, getattr(plain, field.name)) for field in fields(EngineSettings)}
    engine = given["engine"]
    if engine not in get_args(Name):
        return  # of a wrong type or value, which its type refuses
    if engine not in SERVERS:
        for name, value in given.items():
            if name.startswith("server") and value != getattr(plain, name):
                raise ConfigError(
                    f"policy.{name}={shown(value)} would be of no effect with policy.engine={engine}, which samples in "
                    "the run's own process: leave it out, or set policy.engine=vllm or policy.engine=sglang"
                )
    else:
        _check_server(given)
    _check_sampling(engine, settings)


def _check_server(given: Mapping[str, Any]) -> None:
    engine, server = given["engine"], given["server"]
    urls = [server] if isinstance(server, str) else list(server or [])
    if not urls:
        raise ConfigError(
            f"policy.engine={engine} samples in a server of its own: start one ({COMMANDS[engine]}) and set "
            "policy.server=http://HOST:PORT"
        )
    for url in urls:
        split_url(url)
    if len({url.rstrip("/") for url in urls}) < len(urls):
        raise ConfigError(f"policy.server={shown(server)} names one server twice: each worker needs one of its own")
    if given["server_sync"] == "nccl":
        raise ConfigError(
            "policy.server_sync=nccl: sending weights over NCCL is not there; use policy.server_sync=disk and a folder "
            "that the server's machine sees too"
        )
    if given["server_folder"] is None:
        raise ConfigError(
            f"policy.engine={engine} sends weights through a folder: set policy.server_folder=DIR, an absolute path "
            "that this machine and the server's have in common"
        )
    if not os.path.isabs(given["server_folder"]):
        raise ConfigError(
            f"policy.server_folder={shown(given['server_folder'])} is told to the server, which has another working "
            "directory: give an absolute path"
        )
    if given["engine_dtype"] in ("float8", "int8", "int4"):
        raise ConfigError(
            f"policy.engine_dtype={given['engine_dtype']} is of policy.engine=own and transformers: a server rounds "
            "weights by itself; set policy.engine_dtype=bfloat16 for one that computes in it"
        )


def split_url(url: Any) -> SplitResult:
    """The parts of a server's address.

    Raises:
        ConfigError: it is none.
    """
    try:
        parts: SplitResult = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except (ValueError, AttributeError, TypeError):
        good = False
    if not good or parts.query or parts.fragment:
        raise ConfigError(f"policy.server={shown(url)} is no http://HOST:PORT")
    if "@" in parts.netloc:
        raise ConfigError(
            "policy.server holds a password, which the run's configuration would keep: put a key into the environment "
            "variable UNIFIED_RL_SERVER_KEY"
        )
    return parts


def _check_sampling(engine: str, settings: Mapping[str, Any]) -> None:
    """Refuses transforms whose log-probs an engine does not report, or reports of another distribution."""
    top_k, top_p = settings.get("top_k") or 0, settings.get("top_p", 1.0)
    min_p, penalty = settings.get("min_p") or 0.0, settings.get("repetition_penalty", 1.0)
    other = "use policy.engine=own, or policy.engine=vllm"
    if engine == "sglang":
        for name, value, none in (("top_p", top_p, 1.0), ("top_k", top_k, 0), ("min_p", min_p, 0.0)):
            if value != none:
                raise ConfigError(
                    f"policy.{name}={value} with policy.engine=sglang: SGLang reports log-probs of before it cuts "
                    f"tokens off, which are not those of the sampling distribution; set policy.{name}={none}, {other}"
                )
    if engine in ("sglang", "transformers") and penalty != 1:
        raise ConfigError(
            f"policy.repetition_penalty={penalty} with policy.engine={engine}: its log-probs do not hold under a "
            f"penalty; set policy.repetition_penalty=1, {other}"
        )
    if engine == "transformers" and min_p:
        raise ConfigError(
            f"policy.min_p={min_p} with policy.engine=transformers: continuous batching drops it; set policy.min_p=0, "
            f"{other}"
        )
    if engine == "vllm" and min_p and top_p != 1:
        raise ConfigError(
            f"policy.min_p={min_p} and policy.top_p={top_p} with policy.engine=vllm: vLLM applies them in the other "
            "order, which is another distribution; set one of them alone, or policy.engine=own"
        )
