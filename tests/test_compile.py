"""``compile=true`` gives the numbers of eager updates (on the CPU; on a GPU see the tests marked ``gpu``)."""

import shutil
from pathlib import Path

import pytest
import torch

from unified_rl.config import compose
from unified_rl.training.run import Job

SMALL = {
    "sac": [
        "agent=sac",
        "agent.learning_starts=32",
        "agent.batch_size=32",
        "agent.critic_hidden=[16]",
        "policy.hidden=[16]",
    ],
    "ppo": ["agent=ppo", "agent.minibatch=16", "agent.epochs=2", "policy.hidden=[16]"],
}


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.parametrize("agent", list(SMALL))
def test_compiled_updates_give_the_eager_numbers(agent: str, tmp_path: Path) -> None:
    weights = []
    for mode in ("false", "true"):
        overrides = ["env=inverted_pendulum", *SMALL[agent], "rollout.num_envs=4", "rollout.horizon=8", "steps=64"]
        trainer = Job(compose([*overrides, f"agent.compile={mode}"])).make_trainer(tmp_path)
        for _ in range(2):
            rows, _ = trainer.rollout.collect(trainer.agent.version)
            trainer.replay.extend(rows)
            trainer.agent.update(trainer.replay)
        weights.append(torch.cat([p.detach().flatten() for p in trainer.agent.policy.parameters()]))
    assert bool(torch.isfinite(weights[0]).all())
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=1e-4)
