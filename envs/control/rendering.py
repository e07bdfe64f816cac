"""Pictures of a MuJoCo model without a window."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from unified_rl.errors import ConfigError
from unified_rl.interop.words import one_line

SIZE = (240, 320)
"""Height and width of a picture."""
BACKENDS = ("egl", "osmesa")
"""What is tried where neither MUJOCO_GL nor a display says how to draw."""


class Camera:
    """Draws one simulation at a time: by the model's first camera, else by MuJoCo's free one.

    Args:
        model: the compiled model.
        size: height and width in pixels.

    Raises:
        ConfigError: this machine has no offscreen renderer.
    """

    def __init__(self, model: mujoco.MjModel, size: tuple[int, int] = SIZE) -> None:
        self._renderer = _renderer(model, *size)
        self._camera = 0 if model.ncam else -1

    def picture(self, data: mujoco.MjData) -> NDArray[np.uint8]:
        """``[H, W, 3]``."""
        self._renderer.update_scene(data, camera=self._camera)
        drawn: NDArray[np.uint8] = self._renderer.render().copy()
        return drawn

    def close(self) -> None:
        """Gives the graphics context back."""
        self._renderer.close()


def _renderer(model: mujoco.MjModel, height: int, width: int) -> Any:
    said = []
    chosen = os.environ.get("MUJOCO_GL")
    shown = chosen or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY") or sys.platform != "linux"
    tried: Sequence[str | None] = (None,) if shown else BACKENDS
    for backend in tried:
        try:
            if backend is not None:
                _contexts().GLContext = importlib.import_module(f"mujoco.{backend}").GLContext
            return mujoco.Renderer(model, height, width)
        except Exception as error:  # whatever a graphics library raises
            said.append(f"{backend or chosen or 'the display'}: {one_line(error)[:120]}")
    raise ConfigError(
        f"this machine has no offscreen renderer for MuJoCo ({'; '.join(said)}): install Mesa's EGL (libegl1, "
        "libgl1-mesa-dri) or OSMesa (libosmesa6) and set MUJOCO_GL=egl or MUJOCO_GL=osmesa"
    )


def _contexts() -> Any:
    """Where MuJoCo's renderer looks for its graphics context."""
    for name in ("mujoco.rendering.classic.gl_context", "mujoco.gl_context"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ConfigError("this version of MuJoCo has no renderer")
