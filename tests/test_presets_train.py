"""Every correction takes real updates on stale rows in every domain that can support it, and is refused elsewhere.

The best-known ones go through the whole trainer; all of them through the real agent on rows that a real rollout made.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensordict import TensorDict

from unified_rl.agents.policy_gradient import PolicyGradient
from unified_rl.config import compose
from unified_rl.correction import correction_names, load_correction
from unified_rl.errors import ConfigError
from unified_rl.replay import Fresh, Replay
from unified_rl.training.checkpoint import write_checkpoint
from unified_rl.training.run import Job
from unified_rl.units import Source

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
OTHERS = {
    "turns": ["env=calculator", "policy=causal_lm_tiny", "rollout.prompts=2", "rollout.group_size=4"],
    "bins": ["env=two_route", "policy=autoregressive", "rollout.num_envs=4", "rollout.horizon=8"],
}
DENSITIES = {  # what is defined for probabilities alone, and the preset that each refusal names
    "dppo_kl": "ppo",
    "dppo_tv": "ppo",
    "lp_reg": "ppo",
    "luffy": "ppo",
    "troll": "fixpo",
}
NO_GROUPS = {
    "vcpo": "sequence_tis",
    "copg": "dro",
    "gvpo": "dro",
    "tba": "dro",
    "flowrl": "dro",
    "nft": "topr",
    "red_drop": "reinforce",
}
NO_CUTS = {"t_ppo": "ppo"}
REFUSED = {
    "language": {},
    "turns": {},
    "control": {**DENSITIES, **NO_GROUPS, **NO_CUTS},
    "bins": {**NO_GROUPS, **NO_CUTS},
}
WRAPPED = ("alp", "fixpo", "hoelder", "lp_reg", "mdpo", "s_ppo", "sfpo", "st_ppo", "steppo", "t_ppo", "troll", "vcpo")


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


@pytest.fixture(scope="module")
def stale() -> dict[str, tuple[Any, TensorDict]]:
    """For each domain a policy, and rows that an older version of it sampled through the real rollout."""
    found = {}
    for domain, overrides in {**DOMAINS, **OTHERS}.items():
        job = Job(compose([*overrides, "agent=policy_gradient", "correction=reinforce", "agent.micro_batch=4"]))
        trainer = job.make_trainer(Path())
        rows, _ = trainer.rollout.collect(0)
        if trainer.agent.language:
            rows["reward"][:] = 0.0
            rows["reward"][:, -1] = torch.arange(8.0) % 2
            rows["step_mask"][:, -1] = True
        else:
            rows["reward"] = (rows["reward"] > rows["reward"].median()).float()
        with torch.no_grad():
            generator = torch.Generator().manual_seed(1)
            for p in trainer.agent.policy.parameters():
                p += 0.02 * torch.randn(p.shape, generator=generator)
        found[domain] = (trainer.agent.policy, rows)
    return found


def agent_for(
    preset: str, policy: Any, rows: TensorDict, teacher: Any = None, device: str = "cpu"
) -> tuple[PolicyGradient, Replay]:
    language = hasattr(policy, "generate")
    lanes, length = (1, None) if language else (rows.batch_size[1], rows.batch_size[0])
    replay = Replay(1024, lanes=lanes, sampler=Fresh(), cut=False)
    count = len(rows) if language else lanes
    generator = torch.Generator().manual_seed(0)
    trained, epochs = copy.deepcopy(policy), 2 if preset in WRAPPED else 1
    agent = PolicyGradient(
        trained, load_correction(preset), generator, count, length, epochs=epochs, micro_batch=5, teacher=teacher
    )
    agent.keep_versions(1)
    agent.anchors.begin(0)  # the weights of the rows' version, for the preset that keeps them
    agent.version = 1
    replay.extend(rows)
    return agent, replay


def with_demonstrations(rows: TensorDict) -> TensorDict:
    """Every fourth row as one that somebody else wrote."""
    shown = rows["source"].clone()
    shown[::4] = int(Source.DEMONSTRATION)
    return rows.clone().set("source", shown)


def teacher_run(policy: Any, overrides: list[str], folder: Path) -> str:
    """The folder of a run whose policy is ``policy`` with other weights."""
    (folder / "config.yaml").write_text(yaml.safe_dump({"policy": compose(overrides)["policy"]}))
    generator = torch.Generator().manual_seed(2)
    weights = {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in policy.state_dict().items()}
    write_checkpoint(folder / "checkpoints", 0, {"agent": {"policy": weights}})
    return str(folder)


CASES = [(preset, domain) for preset in correction_names() for domain in DOMAINS]
CASES += [(preset, domain) for preset in sorted({*WRAPPED, "erpd", "nft", "dppo_tv"}) for domain in OTHERS]


@pytest.mark.parametrize(("preset", "domain"), CASES)
def test_every_preset_trains_or_names_the_nearest_that_does(
    preset: str, domain: str, stale: dict[str, tuple[Any, TensorDict]], tmp_path: Path
) -> None:
    policy, rows = stale[domain]
    rows = with_demonstrations(rows) if preset == "luffy" else rows
    if preset in REFUSED[domain]:
        with pytest.raises(ConfigError, match=rf"correction {preset}\b") as error:
            agent, replay = agent_for(preset, policy, rows)
            agent.update(replay)
        assert f"correction={REFUSED[domain][preset]}" in str(error.value)
        return
    teacher = teacher_run(policy, {**DOMAINS, **OTHERS}[domain], tmp_path) if preset == "erpd" else None
    agent, replay = agent_for(preset, policy, rows, teacher)
    before = [p.detach().clone() for p in agent.policy.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a rule that rejects everything says so
        metrics = agent.update(replay, 0.25)
    assert all(bool(torch.isfinite(torch.as_tensor(float(value)))) for value in metrics.values()), metrics
    moved = any(not torch.equal(a, b) for a, b in zip(before, agent.policy.parameters(), strict=True))
    assert moved or float(metrics.get("reject/fraction", 0.0)) == 1.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("domain", list(REFUSED))
def test_every_preset_learns_the_numbers_of_the_cpu_on_a_gpu(
    domain: str, stale: dict[str, tuple[Any, TensorDict]], tmp_path: Path
) -> None:
    policy, rows = stale[domain]
    teacher = teacher_run(policy, {**DOMAINS, **OTHERS}[domain], tmp_path)
    wrong = {}
    for preset in (name for name, at in CASES if at == domain and name not in REFUSED[domain]):
        found = {}
        for device in ("cpu", "cuda"):
            try:
                held = with_demonstrations(rows) if preset == "luffy" else rows
                agent, replay = agent_for(preset, policy, held, teacher if preset == "erpd" else None, device)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    metrics = agent.update(replay, 0.25)
                found[device] = float(metrics["loss/policy"]), float(metrics["grad/norm"])
            except Exception as error:
                found[device] = f"{type(error).__name__}: {error}"
        if isinstance(found["cuda"], str) or found["cuda"] != pytest.approx(found["cpu"], rel=2e-2, abs=2e-4):
            wrong[preset] = found
    assert set(wrong) <= {"alp"}, wrong  # its noise is drawn on the device


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
