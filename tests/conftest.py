"""One thread a process, and one clear message where the package is not installed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _installed() -> bool:
    try:
        return importlib.util.find_spec("unified_rl.envs") is not None
    except ImportError:
        return False


if not _installed():
    pytest.exit("unified-rl is not installed: run 'make install' first", returncode=3)


def pytest_configure(config: pytest.Config) -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def source() -> Path:
    """The root of the source tree; a test that needs it is skipped where there is none."""
    root = Path(os.environ.get("UNIFIED_RL_SOURCE") or Path(__file__).parents[1])
    if not (root / "setup.py").is_file():
        pytest.skip("needs the source tree")
    return root


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """``cpu``, and ``cuda`` where there is one."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that a server of answers begins with: not the weights of the policy that asks it."""
    from engine_cases import TINY
    from test_generation import letter_tokenizer

    from unified_rl.policies.causal_lm import CausalLM

    folder = tmp_path_factory.mktemp("model")
    CausalLM(letter_tokenizer(), 64, config=TINY, seed=5).save(str(folder))
    return folder


@pytest.fixture
def server(base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A server that samples (:class:`engine_server.EngineServer`), asked again without a pause."""
    from engine_server import EngineServer

    from unified_rl.policies.engines import http

    monkeypatch.setattr(http, "PAUSE", 0.01)
    with EngineServer(base) as found:
        yield found
