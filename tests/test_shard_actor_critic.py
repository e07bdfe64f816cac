"""Value-based agents whose batches are divided among processes: gradients, priorities and weights of one process."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_cases import composed, recorded, remembered
from shard_cases import on_ranks
from torch import Tensor

from unified_rl.errors import ConfigError
from unified_rl.objectives import offline_value
from unified_rl.objectives.transitions import Transitions
from unified_rl.shard import Shard
from unified_rl.training.run import Job

SIZES = ["env=two_route", "policy.hidden=[8]", "agent.critic_hidden=[8]", "updates=3", "replay.capacity=256"]
ONLINE = [*SIZES, "rollout.num_envs=4", "rollout.horizon=8", "agent.learning_starts=32", "agent.updates_per_step=0.1",
          "rollout.random_steps=32"]  # fmt: skip
FREE = ["agent.tune_alpha=false"]
TD3 = ["agent=actor_critic", *FREE, "agent.target=smoothed", "agent.policy_delay=2",
       "agent.actor={improve: {name: pathwise, entropy: false, noisy: false}}"]  # fmt: skip
AWAC = ["agent=actor_critic", *FREE, "agent.actor={policy: {name: weighted}}"]
CASES: dict[str, list[str]] = {
    "sac": ["agent=sac"],
    "redq": ["agent=sac", "agent.critics=4", "agent.aggregate={name: least_of, members: 2}", "agent.layer_norm=true",
             "agent.actor.policy.mean=true"],
    "td3": TD3,
    "awac": AWAC,
    "cql": ["agent=sac", "agent.critic.pull={name: conservative, coefficient: 0.5}"],
    "three steps": ["agent=sac", "agent.n_step=3"],
    "priorities": ["agent=sac", "replay=priority"],
    "moments": ["agent=sac", "policy.normalize_observation=true"],
    "a schedule": ["agent=sac", "agent.lr_schedule=linear"],
}  # fmt: skip
STORED = {"iql": ["recipe=iql"], "td3_bc": ["recipe=td3_bc"], "flow": ["recipe=iql", "policy=flow"]}


class Steps:
    """Updates of an agent, with the gradient of every phase's every step."""

    def __init__(self, words: list[str], shard: Shard | None = None, updates: int = 3) -> None:
        with remembered(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.trainer = Job(composed(words)).make_trainer(Path())
        self.agent: Any = self.trainer.agent
        self.gradients: list[tuple[str, Tensor]] = []
        for name, phase in self.agent.phases.items():
            self._spy(name, phase)
        if shard is not None:
            self.agent.share(shard)
        self.updates = updates

    def _spy(self, name: str, phase: Any) -> None:
        step = phase.move.step

        def spied() -> None:
            found = [torch.zeros_like(p) if p.grad is None else p.grad for p in phase.parameters]
            self.gradients.append((name, torch.cat([x.flatten().clone() for x in found])))
            step()

        phase.move.step = spied

    def made(self) -> Steps:
        for number in range(self.updates):
            self.trainer.collect()
            self.trainer.updates += 1
            self.metrics = {k: float(v) for k, v in self.agent.update(self.trainer.replay, number / 3).items()}
        self.weights = torch.cat([x.detach().double().flatten() for x in self.agent.weights()])
        self.priorities = getattr(self.trainer.replay.sampler, "tree", None)
        return self


def compared(words: list[str], world: int = 2, rows: int = 7) -> tuple[Steps, list[Steps]]:
    words = [*words, f"agent.batch_size={rows}"]
    one = Steps(words).made()
    ready = [Steps(words) for _ in range(world)]

    def work(shard: Shard) -> Steps:
        ready[shard.rank].agent.share(shard)
        return ready[shard.rank].made()

    return one, on_ranks(world, work)


def agree(one: Steps, found: list[Steps]) -> None:
    """The first gradient of each phase to 1e-6 of its largest entry, the weights at the end to 1e-6."""
    for told in found:
        assert [name for name, _ in told.gradients] == [name for name, _ in one.gradients]
        seen: set[str] = set()
        for (name, got), (_, want) in zip(told.gradients, one.gradients, strict=True):
            bound = 1e-4 if name in seen else 1e-6  # those after it are of weights that Adam's rounding has moved
            assert float((got - want).abs().max()) <= bound * float(want.abs().max()), name
            seen.add(name)
        assert seen == set(one.agent.phases)
        assert float((told.weights - one.weights).abs().max()) <= 1e-6
        assert torch.equal(told.weights, found[0].weights)
        assert told.metrics == {key: pytest.approx(x, rel=1e-5, abs=1e-6) for key, x in one.metrics.items()}
        assert torch.equal(told.agent.generator.get_state(), one.agent.generator.get_state())
        if one.priorities is not None:
            np.testing.assert_allclose(told.priorities.weights, one.priorities.weights, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_an_online_agent_of_two_processes_is_that_of_one(name: str) -> None:
    agree(*compared([*CASES[name], *ONLINE]))


def test_a_process_without_a_transition_takes_part() -> None:
    agree(*compared([*CASES["redq"], *ONLINE], world=3, rows=2))


@pytest.mark.parametrize("name", STORED)
def test_an_offline_agent_of_two_processes_is_that_of_one(name: str, tmp_path: Path) -> None:
    """A flow policy's supervised loss draws noise in each process: there value and critic alone are one process's."""
    data = recorded(tmp_path / "rows", ["env=two_route", "policy=gaussian", "agent=ppo", "rollout.num_envs=4",
                                        "rollout.horizon=32", "steps=128"])  # fmt: skip
    words = [*STORED[name], *SIZES, f"rollout.data={data}", "rollout.rows=32", "agent.learning_starts=32"]
    one, found = compared([*words, "agent.updates_per_step=0.1"])
    if name != "flow":
        agree(one, found)
        return
    for told in found:
        for (phase, got), (_, want) in zip(told.gradients, one.gradients, strict=True):
            if phase != "actor":
                assert float((got - want).abs().max()) <= 1e-4 * float(want.abs().max())
        assert torch.equal(told.weights, found[0].weights)


def of_mine(t: Transitions) -> torch.Tensor:
    """Somebody's own loss."""
    return t.q.mean(-1).sum()


def test_a_part_of_the_users_own_says_that_it_may_see_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    of_mine.__module__ = "somebody.elses"
    monkeypatch.setitem(offline_value.CRITICS, "mine", of_mine)
    made = Steps(["agent=sac", *ONLINE, "agent.critic.more={name: mine}"])
    with pytest.raises(ConfigError, match=r"more is of_mine, which does not say .* shares=True .*learner=single"):
        made.agent.share(Shard(0, 2))
    of_mine.shares = True  # type: ignore[attr-defined]
    made.agent.share(Shard(0, 2))
