"""What a method adds to its rows or its scoring: filtered proxies, noise, teachers, schedules; and that it resumes."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from agent_cases import (
    LANES,
    close,
    control_agent,
    filled,
    gaussian,
    gradients,
    language,
    language_agent,
    nudge,
    stream,
    transitions,
)
from tensordict import TensorDict
from torch import Tensor

from unified_rl.agents.policy_gradient import PolicyGradient
from unified_rl.config import compose
from unified_rl.correction import load_correction
from unified_rl.errors import CheckpointError, ConfigError
from unified_rl.interventions.noise import LayerNoise
from unified_rl.interventions.proxy import MinPProxy
from unified_rl.policies.flow import FlowPolicy
from unified_rl.policies.sampling import keep_min_p, token_log_prob
from unified_rl.training.checkpoint import checkpoints, read_checkpoint
from unified_rl.training.run import Job, resume, train


def agent_of(correction: str, policy: Any, rows: TensorDict, **overrides: Any) -> PolicyGradient:
    options = {key: overrides.pop(key) for key in ("teacher", "lr", "micro_batch", "epochs") if key in overrides}
    made = load_correction(correction, **overrides)
    agent = PolicyGradient(copy.deepcopy(policy), made, stream(), rows=len(rows), max_grad_norm=None, **options)
    agent.checked = True
    return agent


# ------------------------------------------------------------------------------------------- Lp-Reg


def test_the_proxy_drops_improbable_tokens_and_renormalises() -> None:
    logits = torch.tensor([0.5, 0.3, 0.19, 0.01]).log().expand(4, 4)
    token = torch.arange(4)
    relative = token_log_prob(keep_min_p(logits, 0.1), token)  # drops what is below 0.05
    torch.testing.assert_close(relative, torch.tensor([0.5 / 0.99, 0.3 / 0.99, 0.19 / 0.99, 0.0]).log())
    fixed = token_log_prob(keep_min_p(logits, 0.2, relative=False), token)
    torch.testing.assert_close(fixed, torch.tensor([0.5 / 0.8, 0.3 / 0.8, 0.0, 0.0]).log())
    best = token_log_prob(keep_min_p(logits, 0.9, relative=False), token)
    torch.testing.assert_close(best, torch.tensor([1.0, 0.0, 0.0, 0.0]).log())


def test_without_a_threshold_the_proxy_is_the_old_policy() -> None:
    policy, rows = language()
    wrapper = MinPProxy(policy, load_correction("lp_reg"), p_min=0.0)
    with torch.no_grad():
        found = wrapper.annotate(rows)
    mask = rows["mask"]
    torch.testing.assert_close(found["proxy_log_prob"][mask], rows["behavior_log_prob"][mask], atol=1e-5, rtol=0.0)
    torch.testing.assert_close(found["proximal_log_prob"], policy.log_prob(rows).log_prob.detach())


def test_with_no_unit_chosen_lp_reg_is_ppo_with_its_wide_clip() -> None:
    policy, rows = language()
    nudge(policy, 0.3)
    lp_reg = gradients(agent_of("lp_reg", policy, rows, **{"kernel.fraction": 0.0}), filled(rows, 1))
    wide = {"kernel.clip_low": 1.0, "kernel.clip_high": 9.0, "advantage": {"baseline": "mean", "scale": "std"}}
    close(lp_reg, gradients(agent_of("ppo", policy, rows, **wide), filled(rows, 1)))


def test_the_penalty_acts_on_chosen_tokens_alone_and_never_on_filtered_ones() -> None:
    policy, rows = language()
    agent = agent_of("lp_reg", policy, rows, **{"kernel.fraction": 0.3, "wrapper.p_min": 0.2}, epochs=2, lr=5e-3)
    stats: list[Any] = []
    prepare = agent.correction.prepare
    agent.correction.prepare = lambda lp, b: (stats.append((prepare(lp, b), b)), stats[-1][0])[1]  # type: ignore
    agent.update(filled(rows, 1))
    found, batch = stats[-1]  # at the second step tokens have moved away from their proxy
    chosen = found["select_0"]
    assert bool(chosen.any()) and bool((chosen & (batch["advantage"] < 0) == chosen).all())
    assert bool(torch.isinf(batch["proxy_log_prob"]).any())
    assert bool(torch.isfinite(batch["proxy_log_prob"][chosen]).all())


# ------------------------------------------------------------------------------------------- ALP


def test_noise_of_size_zero_is_ppo() -> None:
    policy, rows = language()
    nudge(policy, 0.05)
    silent = gradients(agent_of("alp", policy, rows, **{"wrapper.initial": 0.0}), filled(rows, 1))
    close(silent, gradients(agent_of("alp", policy, rows, wrapper=None), filled(rows, 1)))


@pytest.mark.parametrize("kind", ["language", "flow", "gaussian"])
def test_the_numerator_alone_is_perturbed_and_the_gradient_reaches_the_scales(kind: str) -> None:
    if kind == "language":
        policy, record = language()
    else:
        bounds: dict[str, Any] = {"action_low": [-1.0] * 2, "action_high": [1.0] * 2}
        policy = gaussian() if kind == "gaussian" else FlowPolicy(3, 2, **bounds, hidden=(8, 8), steps=3)
        record = control_agent(policy, "gspo")._draw(filled(transitions(policy), LANES))
    plain = policy.log_prob(record).log_prob.detach()
    wrapper = LayerNoise(policy, load_correction("alp"), initial=0.1)
    assert torch.equal(policy.log_prob(record).log_prob, plain)  # outside an update nothing is perturbed

    def score() -> Tensor:
        return wrapper.perturbed(record, lambda part: policy.log_prob(part).log_prob)

    first, again = score(), score()
    assert torch.equal(first, again) and not torch.allclose(first, plain, atol=1e-3)
    wrapper.count += 1
    assert not torch.allclose(score(), first, atol=1e-4)
    first[record["mask"]].sum().backward()
    gradient = wrapper.scales.log_scale.grad
    assert gradient is not None and bool((gradient != 0).all())
    assert torch.equal(policy.log_prob(record).log_prob, plain)


def test_recomputed_layers_meet_the_same_noise() -> None:
    found = []
    for recompute in (False, True):
        policy, rows = language()
        if recompute:
            policy.model.gradient_checkpointing_enable({"use_reentrant": False})
            policy.model.train()
        policy.share_prompts = False
        agent = language_agent(policy, rows, "alp")
        assert isinstance(agent.wrapper, LayerNoise)
        with torch.no_grad():
            agent.wrapper.scales.log_scale.fill_(-1.0)
        found.append(gradients(agent, filled(rows, 1)))
    assert "layer_noise.log_scale" in found[0]
    close(found[1], found[0])


def test_the_scales_have_their_own_learning_rate() -> None:
    policy, rows = language()
    agent = agent_of("alp", policy, rows, lr=0.0, **{"wrapper.initial": 1e-2})
    before = agent.wrapper.scales.log_scale.detach().clone()
    nudge(agent.policy, 0.02)
    agent.update(filled(rows, 1))
    moved = (agent.wrapper.scales.log_scale.detach() - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 5e-4), rtol=1e-2, atol=0.0)  # Adam's first step
    agent.optimizer.set_lr(0.3)
    assert [group["lr"] for group in agent.optimizer.adam.param_groups] == [0.3, 5e-4]


# ------------------------------------------------------------------------------------------- Hölder


def test_half_way_through_the_run_the_mean_is_geometric() -> None:
    policy, rows = language()
    nudge(policy, 0.02)
    agent = agent_of("hoelder", policy, rows)
    annealed: dict[str, Tensor] = {}
    step = agent.optimizer.step

    def spy(loss: Tensor) -> Tensor:
        annealed.update({name: p.grad.clone() for name, p in agent.optimizer.named if p.grad is not None})
        return step(loss)

    agent.optimizer.step = spy  # type: ignore[method-assign]
    agent.update(filled(rows, 1), progress=0.5)
    constant = {"wrapper": None}
    geometric = gradients(agent_of("hoelder", policy, rows, **constant, level="geometric"), filled(rows, 1))
    close(annealed, geometric)
    start = gradients(agent_of("hoelder", policy, rows), filled(rows, 1))
    close(start, gradients(agent_of("hoelder", policy, rows, **constant), filled(rows, 1)))  # p = 2
    assert not torch.allclose(start["policy.model.lm_head.weight"], geometric["policy.model.lm_head.weight"], atol=1e-5)


# ------------------------------------------------------------------------------------------- Humanline


def test_the_reference_follows_the_policy_every_few_updates() -> None:
    policy, rows = language()
    agent = agent_of("humanline", policy, rows, **{"wrapper.every": 2}, lr=1e-2)
    first = agent.policy.model.lm_head.weight.detach().clone()

    def reference() -> Tensor:
        assert agent.anchors.reference is not None
        return agent.anchors.reference.model.lm_head.weight

    agent.update(filled(rows, 1))
    assert torch.equal(reference(), first) and not torch.equal(agent.policy.model.lm_head.weight, first)
    agent.update(filled(rows, 1))
    assert torch.equal(reference(), agent.policy.model.lm_head.weight)


# ------------------------------------------------------------------------------------------- ERPD

TINY = {
    "language": ["env=chain_mod", "policy=causal_lm_tiny", "rollout.prompts=2", "rollout.group_size=4", "steps=16"],
    "control": [
        "env=two_route",
        "policy=flow",
        "policy.normalize_observation=false",
        "rollout.num_envs=4",
        "rollout.horizon=8",
        "steps=256",
    ],
}
QUIET = ["progress=false", "eval_every=0", "eval_episodes=2", "agent=policy_gradient"]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs whose policy never moved (lr 0), seed 0."""
    folder = tmp_path_factory.mktemp("teachers")
    overrides = [*QUIET, "correction=reinforce", "agent.lr=0"]
    return {name: train(compose([*given, *overrides, f"run_dir={folder / name}"])) for name, given in TINY.items()}


def trained_on(teacher: Path, domain: str, seed: int, folder: Path) -> tuple[dict[str, Any], bool]:
    """Metrics of one update towards the teacher, and whether the policy moved."""
    overrides = [*TINY[domain], *QUIET, "correction=erpd", f"agent.teacher={teacher}", f"seed={seed}"]
    trainer = Job(compose(overrides)).make_trainer(folder)
    before = [p.detach().clone() for p in trainer.agent.policy.parameters()]
    trainer.replay.extend(trainer.rollout.collect(0)[0])
    metrics = trainer.agent.update(trainer.replay)
    moved = any(not torch.equal(a, b) for a, b in zip(before, trainer.agent.policy.parameters(), strict=True))
    return metrics, moved


@pytest.mark.parametrize("domain", list(TINY))
def test_a_teacher_that_is_the_reference_teaches_nothing_and_another_does(
    domain: str, teachers: dict[str, Path], tmp_path: Path
) -> None:
    metrics, moved = trained_on(teachers[domain], domain, 0, tmp_path)
    assert float(metrics["loss/policy"]) == pytest.approx(0.0, abs=1e-6)
    _, moved = trained_on(teachers[domain], domain, 1, tmp_path)
    assert moved


def test_a_language_models_folder_can_teach(tmp_path: Path) -> None:
    policy, rows = language()
    policy.save(str(tmp_path / "model"))
    same = gradients(agent_of("erpd", policy, rows, teacher=str(tmp_path / "model")), filled(rows, 1))
    assert all(float(g.abs().max()) < 1e-6 for g in same.values())
    nudge(policy, 0.1)
    policy.save(str(tmp_path / "other"))
    agent = agent_of("erpd", policy, rows, teacher=str(tmp_path / "model"))
    assert any(float(g.abs().max()) > 1e-3 for g in gradients(agent, filled(rows, 1)).values())


def test_teachers_that_are_missing_or_do_not_fit_are_named(teachers: dict[str, Path], tmp_path: Path) -> None:
    policy, rows = language()
    with pytest.raises(ConfigError, match=r"erpd learns from a teacher: set agent\.teacher"):
        agent_of("erpd", policy, rows)
    with pytest.raises(ConfigError, match="ppo uses no teacher"):
        agent_of("ppo", policy, rows, teacher=str(teachers["language"]))
    with pytest.raises(CheckpointError, match=r"no config\.yaml\) and none of a language model"):
        agent_of("erpd", policy, rows, teacher=str(tmp_path))
    with pytest.raises(ConfigError, match="does not fit here"):
        agent_of("erpd", policy, rows, teacher=str(teachers["control"]))


# ------------------------------------------------------------------------------------------- resuming

STATEFUL = {
    "sfpo": ("control", ["correction.wrapper.window=2", "correction.wrapper.threshold=0.5"]),
    "fixpo": ("control", ["correction.wrapper.bound=0.001", "agent.lr=1e-2"]),
    "s_ppo": ("control", ["agent.epochs=2"]),
    "alp": ("language", []),
    "hoelder": ("language", []),
}


@pytest.mark.parametrize("name", list(STATEFUL))
def test_a_wrapper_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    domain, extra = STATEFUL[name]
    given = [*TINY[domain][:-1], *QUIET, f"correction={name}", *extra, "rollout.staleness=1"]
    batch = 8 if domain == "language" else 4 * 32  # environment steps: chunks of four commands
    lengths = [f"checkpoint_every={batch}", "keep_checkpoints=9"]
    whole = train(compose([*given, *lengths, f"steps={4 * batch}", f"run_dir={tmp_path / 'whole'}"]))
    part = train(compose([*given, *lengths, f"steps={4 * batch}", f"run_dir={tmp_path / 'part'}"]))
    for later in checkpoints(part / "checkpoints")[2:]:
        shutil.rmtree(later)
    resume(str(part))
    states = [read_checkpoint(checkpoints(run / "checkpoints")[-1])["agent"] for run in (whole, part)]
    assert flat(states[0]["wrapper"]) == flat(states[1]["wrapper"])
    for key, value in states[0]["policy"].items():
        assert torch.equal(value, states[1]["policy"][key])
    start = read_checkpoint(checkpoints(whole / "checkpoints")[0])["agent"]["wrapper"]
    assert name == "hoelder" or flat(start) != flat(states[0]["wrapper"])  # there was something to restore


def flat(state: Any) -> Any:
    return (
        {k: flat(v) for k, v in state.items()} if isinstance(state, dict) else getattr(state, "tolist", lambda: state)()
    )
