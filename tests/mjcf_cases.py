"""A cart on a rail as an MJCF file, and rules of it that configurations name."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

CART = """
<mujoco>
  <option timestep="0.02" {options}/>
  <worldbody>
    <body name="cart">
      <joint name="x" type="slide" axis="1 0 0" damping="0.1"/>
      <geom size="0.1"/>
      <site name="mark" pos="0.5 0 0"/>
    </body>
    <body name="pole" pos="0 1 0"><joint name="hinge" axis="0 0 1"/><geom size="0.1" pos="0.3 0 0"/></body>
  </worldbody>
  <actuator><motor joint="x" {ctrl}/></actuator>
  <sensor><framelinvel name="speed" objtype="site" objname="mark"/></sensor>
</mujoco>
"""
ROBOT = CART.format(options="", ctrl='ctrlrange="-2 2"')


def weak_pendulum() -> Any:
    """A Gymnasium environment by a factory."""
    return gymnasium.make("Pendulum-v1", g=3.0)


def observation(state: Any) -> Any:
    """Place and speed."""
    return np.concatenate([state.joint("x"), state.sensor("speed"), state.site("mark")], axis=1)


def reward(state: Any, action: Any, before: Any) -> Any:
    """Metres to the right, less effort."""
    return (state.qpos - before.qpos)[:, 0] - 0.1 * action[:, 0] ** 2


def other_reward(state: Any) -> Any:
    """Place."""
    return state.qpos[:, 0]


def ended(state: Any) -> Any:
    """Where the cart has moved."""
    return np.abs(state.qpos[:, 0]) > 0.02


def metrics(state: Any) -> Any:
    """Told at the ends."""
    return {"success": ended(state)}


def initial(model: Any, rng: np.random.Generator, count: int) -> Any:
    """One place for all."""
    return np.tile([[0.015, 0.5]], (count, 1)), np.zeros((count, 2))
