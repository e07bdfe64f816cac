"""One thread a process, and one clear message where the package is not installed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

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
