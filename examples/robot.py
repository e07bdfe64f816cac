"""A robot task of your own: carts on a rail learn to stop at its middle, with PPO and with stale data.

Run it with ``python examples/robot.py``; it takes seconds on one core.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import unified_rl as ur


class Rail(ur.ControlEnvBase):
    """K carts: the policy sees place and speed, pushes with a force in [-1, 1], and is paid for being near the middle.

    Args:
        num_envs: K.
        seed: of the start places.
    """

    def __init__(self, num_envs: int = 16, seed: int = 0) -> None:
        super().__init__(num_envs, ur.Space.flat(2, 1, [-1.0], [1.0]), max_steps=32)
        self.carts, self.elapsed = torch.zeros(num_envs, 2), torch.zeros(num_envs, dtype=torch.int64)
        self.seed_streams(seed)
        self.reset_batch()

    def seed_streams(self, seed: int) -> None:
        """Restarts the stream of start places."""
        self.stream = torch.Generator().manual_seed(seed)

    def restart(self, ended: Tensor) -> Tensor:
        """New carts at rest where ``ended [K]``."""
        place = 2.0 * torch.rand(int(ended.sum()), generator=self.stream) - 1.0
        self.carts[ended] = torch.stack((place, torch.zeros_like(place)), -1)
        self.elapsed[ended] = 0
        return self.carts[ended]

    def advance(self, action: Tensor, running: Tensor | None = None) -> ur.StepResult:
        """One step of a tenth of a second; episodes end by their time limit alone."""
        speed = 0.9 * self.carts[:, 1] + 0.3 * action[:, 0].clamp(-1.0, 1.0)
        self.carts = torch.stack((self.carts[:, 0] + 0.1 * speed, speed), -1)
        self.elapsed = self.elapsed + 1
        never = torch.zeros(self.num_envs, dtype=torch.bool)
        reward, late = 1.0 - self.carts[:, 0].abs(), self.elapsed >= self.max_steps
        return ur.StepResult(self.carts, reward, never, late, self.carts, torch.ones_like(self.elapsed), {})

    def current_observation(self) -> Tensor:
        """Place and speed, ``[K, 2]``."""
        return self.carts

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """All that a bit-exact continuation needs."""
        return {"carts": self.carts.clone(), "elapsed": self.elapsed.clone(), "stream": self.stream.get_state()}

    def load_state_dict(self, state: dict[str, Any], *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Restores :meth:`state_dict`."""
        self.carts, self.elapsed = state["carts"].clone(), state["elapsed"].clone()
        self.stream.set_state(state["stream"])


def main(steps: int = 30_000) -> dict[str, tuple[float, float]]:
    """The held-out return before and after training, on fresh rows and on rows that are four updates old."""
    scores = {}
    for name, correction, staleness in (("fresh", "ppo", 0), ("stale", "tis", 4)):
        run = ur.assemble(
            Rail(num_envs=16),
            "gaussian",
            agent={"name": "ppo", "lr": 1e-3},
            correction=correction,
            rollout={"horizon": 32, "staleness": staleness},
            steps=steps,
            seed=1,
            eval_every=0,
        )
        rows = run.run()
        scores[name] = (rows[0]["eval/score"], rows[-1]["eval/score"])
        print(f"{name}: return {scores[name][0]:.2f} before, {scores[name][1]:.2f} after {run.steps} steps")
    return scores


if __name__ == "__main__":
    main()
