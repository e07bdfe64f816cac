"""The best-known corrections take a real update on stale rows in both domains, through the real trainer."""

from pathlib import Path

import pytest
import torch

from unified_rl.config import compose
from unified_rl.errors import ConfigError
from unified_rl.training.run import Job

PRESETS = (
    "reinforce",
    "importance_sampling",
    "ppo",
    "grpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "cispo",
    "tis",
    "icepop",
    "decoupled_ppo",
    "ppo_ewma",
    "a3po",
    "opo",
)
DOMAINS = {
    "language": ["env=chain_mod", "policy=causal_lm_tiny", "rollout.prompts=2", "rollout.group_size=4"],
    "control": ["env=two_route", "policy=flow", "rollout.num_envs=4", "rollout.horizon=8"],
}


@pytest.mark.parametrize("domain", list(DOMAINS))
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_moves_the_policy_and_reports_its_staleness(preset: str, domain: str, tmp_path: Path) -> None:
    overrides = [*DOMAINS[domain], "agent=policy_gradient", f"correction={preset}", "steps=96", "rollout.staleness=1"]
    trainer = Job(compose(overrides)).make_trainer(tmp_path)
    metrics = {}
    before = [p.detach().clone() for p in trainer.agent.policy.parameters()]
    for _ in range(2):
        rows, _ = trainer.rollout.collect(0)
        if domain == "language":
            rows["reward"] = torch.arange(8.0)[:, None] % 2
        trainer.replay.extend(rows)
    for _ in range(2):
        metrics = trainer.agent.update(trainer.replay)
    assert float(metrics["staleness/max"]) == 1.0
    assert 0.0 < float(metrics["ess/unit"]) <= 1.0 and float(metrics["kl/k3"]) > 0.0
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.agent.policy.parameters(), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("domain", list(DOMAINS))
@pytest.mark.parametrize("mode", ["compile=false", "compile=true", "cuda_graph=true"])
def test_a_whole_run_on_the_gpu_learns_the_numbers_of_the_cpu(domain: str, mode: str, tmp_path: Path) -> None:
    weights = []
    for device, how in (("cpu", "compile=false"), ("cuda", mode)):
        overrides = [*DOMAINS[domain], "agent=policy_gradient", "correction=ppo", "steps=64", f"device={device}"]
        trainer = Job(compose([*overrides, f"agent.{how}"])).make_trainer(tmp_path / device)
        reference = Job(compose(overrides[:-1])).make_trainer(tmp_path)
        rows, _ = reference.rollout.collect(0)  # the same rows for both: random numbers differ between devices
        trainer.replay.extend(rows)
        trainer.agent.update(trainer.replay)
        weights.append(torch.cat([p.detach().flatten().cpu() for p in trainer.agent.policy.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-4, rtol=1e-3)


def test_cuda_graphs_without_cuda_are_refused(tmp_path: Path) -> None:
    overrides = [*DOMAINS["control"], "agent=policy_gradient", "correction=ppo", "agent.cuda_graph=true"]
    with pytest.raises(ConfigError, match="device=cuda"):
        Job(compose(overrides)).make_trainer(tmp_path)
