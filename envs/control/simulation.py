"""K MuJoCo simulations of one model, stepped natively and read with one gather."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import mujoco
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Frame = dict[str, Array]
"""Named ``[n, size]`` float64 columns of a gather; views of one buffer, valid until the next gather."""


class Simulations:
    """K copies of a model's state, stepped together.

    Each simulation keeps its own ``MjData`` for life, and with it the solver's warm start, so a trajectory is the one
    that a single simulation would have taken. A diverged simulation is left as NaN rather than silently reset.

    Args:
        model: the compiled model; its auto-reset on divergence is switched off.
        count: K.
        views: maps one ``MjData`` to named one-dimensional views of its arrays; these are what a gather reads.
        frame_skip: physics steps in one control step.
        contact_forces: also compute contact forces (``cfrc_ext``) after each control step.
        threads: worker threads; more than one pays only from some 64 simulations up.
        synchronous: after each control step, also compute what derives from the new positions and velocities. The next
            step goes on from there, so that the physics is the same and costs the same.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        count: int,
        views: Callable[[mujoco.MjData], Frame],
        frame_skip: int,
        contact_forces: bool = False,
        threads: int = 1,
        synchronous: bool = False,
    ) -> None:
        model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_AUTORESET)
        self.model, self.count, self.frame_skip = model, count, frame_skip
        self.data = [mujoco.MjData(model) for _ in range(count)]
        self._contact_forces = contact_forces
        self._derives = synchronous
        self._ahead = synchronous and model.opt.integrator != mujoco.mjtIntegrator.mjINT_RK4
        self._ctrl = [data.ctrl for data in self.data]
        named = [views(data) for data in self.data]
        self._parts = [part for frame in named for part in frame.values()]
        self._parts_each = len(named[0])
        sizes = {name: part.size for name, part in named[0].items()}
        self._buffer = np.zeros((count, sum(sizes.values())))
        self._flat = self._buffer.reshape(-1)
        ends = np.cumsum(list(sizes.values()))
        self._columns = {name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}
        self._frame = self._named(self._buffer)
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        self._blocks = [block.tolist() for block in np.array_split(np.arange(count), threads) if block.size]

    @property
    def dt(self) -> float:
        """Seconds of simulated time in one control step."""
        return float(self.model.opt.timestep) * self.frame_skip

    def step(self, action: Array, lanes: NDArray[np.int64] | None = None) -> Frame:
        """Applies ``action [K, nu]`` for ``frame_skip`` physics steps and gathers, ``[K, size]`` a name.

        Only simulations ``lanes`` move (default: all); the others are gathered as they stand.
        """
        if lanes is not None or self._pool is None:
            self._advance(action, range(self.count) if lanes is None else lanes.tolist())
        else:
            list(self._pool.map(lambda block: self._advance(action, block), self._blocks))
        np.concatenate(self._parts, out=self._flat)
        return self._frame

    def _advance(self, action: Array, lanes: Iterable[int]) -> None:
        model, skip, physics, all_data, all_ctrl = self.model, self.frame_skip, mujoco.mj_step, self.data, self._ctrl
        for lane in lanes:
            data = all_data[lane]
            all_ctrl[lane][:] = action[lane]
            if self._ahead:  # the first half of this step was made at the end of the last one
                mujoco.mj_step2(model, data)
                physics(model, data, skip - 1)
            else:
                physics(model, data, skip)
            if self._derives:
                mujoco.mj_step1(model, data)
            if self._contact_forces:
                mujoco.mj_rnePostConstraint(model, data)

    def reset(self, lanes: NDArray[np.int64], qpos: Array, qvel: Array) -> Frame:
        """Puts simulations ``lanes [n]`` into ``qpos [n, nq]``, ``qvel [n, nv]`` and gathers those, ``[n, size]``."""
        for lane, position, velocity in zip(lanes, qpos, qvel, strict=True):
            data = self.data[lane]
            mujoco.mj_resetData(self.model, data)
            data.qpos[:] = position
            data.qvel[:] = velocity
            mujoco.mj_forward(self.model, data)
        return self.read(lanes)

    def read(self, lanes: NDArray[np.int64]) -> Frame:
        """Gathers simulations ``lanes [n]`` as they stand, ``[n, size]`` a name."""
        each = self._parts_each
        rows = np.stack([np.concatenate(self._parts[lane * each : (lane + 1) * each]) for lane in lanes])
        return self._named(rows)

    def _named(self, rows: Array) -> Frame:
        return {name: rows[:, columns] for name, columns in self._columns.items()}

    def state(self) -> Array:
        """Everything that integration depends on, warm starts included, ``[K, size]`` float64."""
        spec = mujoco.mjtState.mjSTATE_INTEGRATION
        out = np.empty((self.count, mujoco.mj_stateSize(self.model, spec)))
        for data, row in zip(self.data, out, strict=True):
            mujoco.mj_getState(self.model, data, row, spec)
        return out

    def load(self, state: Array) -> None:
        """Restores :meth:`state`; derived quantities are left for the next step to compute, where it does."""
        for data, row in zip(self.data, np.ascontiguousarray(state), strict=True):
            mujoco.mj_setState(self.model, data, row, mujoco.mjtState.mjSTATE_INTEGRATION)
            if self._derives:
                mujoco.mj_step1(self.model, data)

    def close(self) -> None:
        """Stops the worker threads."""
        if self._pool is not None:
            self._pool.shutdown()
