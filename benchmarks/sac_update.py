"""One SAC gradient update against Stable-Baselines3's ``train(1)`` and the same arithmetic in plain torch.

    python benchmarks/sac_update.py [--csv FILE] [--rounds 40] [--calls 5]

HalfCheetah's shapes, batch 256, two hidden layers of 256, a replay sample in every contestant's update. The three take
turns in short rounds within one process; a ratio is the median of the rounds' ratios of CPU time. The plain version is
eager torch with foreach Adam as one writes it in a script, and samples by ``index_select`` from six tensors.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from stable_baselines3 import SAC as PeerSAC
from stable_baselines3.common.logger import configure
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn import functional as F

from unified_rl.agents.actor_critic import ActorCritic
from unified_rl.agents.sb3 import make_vec_env
from unified_rl.envs.control import make_mujoco
from unified_rl.policies.gaussian import GaussianPolicy
from unified_rl.replay import Replay, Uniform

OBSERVATION, ACTION, BATCH, WIDTH, ROWS = 17, 6, 256, 256, 100_000
TARGET = 1.25
Update = Callable[[], object]


def transitions(count: int) -> dict[str, Tensor]:
    """Random rows of HalfCheetah's shapes."""
    g = torch.Generator().manual_seed(0)
    return {
        "observation": torch.randn(count, OBSERVATION, generator=g),
        "action": torch.rand(count, ACTION, generator=g) * 2 - 1,
        "reward": torch.randn(count, generator=g),
        "discount": torch.full((count,), 0.99),
        "terminated": torch.rand(count, generator=g) < 0.01,
        "next_observation": torch.randn(count, OBSERVATION, generator=g),
    }


def ours(rows: dict[str, Tensor]) -> Update:
    """The agent's own update, called as the trainer calls it (one collected row, one gradient step)."""
    bounds = {"action_low": [-1.0] * ACTION, "action_high": [1.0] * ACTION}
    policy = GaussianPolicy(
        OBSERVATION, ACTION, **bounds, squash=True, state_dependent_std=True, hidden=(WIDTH, WIDTH), activation="relu",
        orthogonal=False,
    )  # fmt: skip
    replay = Replay(ROWS, sampler=Uniform())
    replay.extend(TensorDict(rows, batch_size=[ROWS]))
    agent = ActorCritic(policy, torch.Generator().manual_seed(0), rows=1, batch_size=BATCH)
    return lambda: agent.update(replay)


def peer(rows: dict[str, Tensor]) -> Update:
    """Stable-Baselines3 at its defaults, its replay full of the same rows."""
    env = make_vec_env(make_mujoco("HalfCheetah-v5"))
    model = PeerSAC("MlpPolicy", env, buffer_size=ROWS, batch_size=BATCH, device="cpu", seed=0)
    model.set_logger(configure(None, []))
    buffer, array = model.replay_buffer, {key: value.numpy() for key, value in rows.items()}
    assert buffer is not None
    buffer.observations[:, 0], buffer.next_observations[:, 0] = array["observation"], array["next_observation"]
    buffer.actions[:, 0], buffer.rewards[:, 0], buffer.dones[:, 0] = (
        array["action"], array["reward"], array["terminated"],
    )  # fmt: skip
    buffer.full, buffer.pos = True, 0
    return lambda: model.train(1, BATCH)


class Plain:
    """SAC in one class: twin critics, tanh-Gaussian actor, tuned entropy weight."""

    def __init__(self, rows: dict[str, Tensor]) -> None:
        self.rows = {**rows, "bootstrap": rows["discount"] * (~rows["terminated"]).float()}
        del self.rows["discount"], self.rows["terminated"]
        self.actor = self.network(OBSERVATION, 2 * ACTION)
        self.critics = nn.ModuleList(self.network(OBSERVATION + ACTION, 1) for _ in range(2))
        self.targets = nn.ModuleList(self.network(OBSERVATION + ACTION, 1) for _ in range(2))
        self.targets.load_state_dict(self.critics.state_dict())
        self.targets.requires_grad_(False)
        self.log_alpha = torch.zeros((), requires_grad=True)
        self.actor_adam = torch.optim.Adam(self.actor.parameters(), 3e-4)
        self.critic_adam = torch.optim.Adam(self.critics.parameters(), 3e-4)
        self.alpha_adam = torch.optim.Adam([self.log_alpha], 3e-4)

    @staticmethod
    def network(inputs: int, outputs: int) -> nn.Sequential:
        """Two hidden layers."""
        return nn.Sequential(
            nn.Linear(inputs, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, outputs)
        )

    def act(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Reparameterised action and its log-prob."""
        mean, log_std = self.actor(observation).chunk(2, -1)
        log_std = log_std.clamp(-20, 2)
        noise = torch.randn_like(mean)
        raw = mean + log_std.exp() * noise
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        log_prob = log_prob - 2 * (math.log(2) - raw - F.softplus(-2 * raw))
        return raw.tanh(), log_prob.sum(-1)

    @staticmethod
    def value(critics: nn.ModuleList, observation: Tensor, action: Tensor) -> Tensor:
        """Both critics' estimates, ``[2, B]``."""
        x = torch.cat([observation, action], -1)
        return torch.stack([critic(x) for critic in critics]).squeeze(-1)

    def update(self) -> None:
        """One gradient step of everything."""
        index = torch.randint(0, ROWS, (BATCH,))
        batch = {key: value.index_select(0, index) for key, value in self.rows.items()}
        alpha = self.log_alpha.detach().exp()
        with torch.no_grad():
            action, log_prob = self.act(batch["next_observation"])
            following = self.value(self.targets, batch["next_observation"], action).amin(0) - alpha * log_prob
            target = batch["reward"] + batch["bootstrap"] * following
        error = self.value(self.critics, batch["observation"], batch["action"]) - target
        self.critic_adam.zero_grad()
        (0.5 * error.square().mean(-1).sum()).backward()
        self.critic_adam.step()
        action, log_prob = self.act(batch["observation"])
        loss = (alpha * log_prob - self.value(self.critics, batch["observation"], action).amin(0)).mean()
        self.actor_adam.zero_grad()
        loss.backward()
        self.actor_adam.step()
        self.alpha_adam.zero_grad()
        (-self.log_alpha * (log_prob.detach() - ACTION).mean()).backward()
        self.alpha_adam.step()
        with torch.no_grad():
            for old, new in zip(self.targets.parameters(), self.critics.parameters(), strict=True):
                old.lerp_(new, 0.005)


def measure(updates: dict[str, Update], rounds: int, calls: int) -> list[dict[str, float]]:
    """CPU milliseconds an update in each round, in rotating order."""
    rows, names = [], list(updates)
    for index in range(rounds + 1):
        row = {}
        for name in names[index % 3 :] + names[: index % 3]:
            start = time.process_time()
            for _ in range(calls):
                updates[name]()
            row[name] = 1e3 * (time.process_time() - start) / calls
        if index:  # the first round warms up
            rows.append(row)
    return rows


def main() -> None:
    """Prints the ratios; writes every round to ``--csv``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--csv", type=Path, help="where to write every round")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = transitions(ROWS)
    updates = {"ours": ours(data), "sb3": peer(data), "plain": Plain(data).update}
    rows = measure(updates, args.rounds, args.calls)
    for name in updates:
        print(f"{name:6s} {statistics.median(row[name] for row in rows):7.2f} CPU ms an update")
    ratio = statistics.median(row["sb3"] / row["ours"] for row in rows)
    print(f"times faster than sb3   {ratio:.2f}  target {TARGET}  {'met' if ratio >= TARGET else 'MISSED'}")
    print(f"times faster than plain {statistics.median(row['plain'] / row['ours'] for row in rows):.2f}")
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["round", *(f"{name}_cpu_ms" for name in updates)])
            writer.writerows([i, *(round(row[name], 3) for name in updates)] for i, row in enumerate(rows))


if __name__ == "__main__":
    main()
