"""LUFFY, CHORD, HPT and retries as lists of terms: written-out gradients, limits, exact resuming."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from agent_cases import TINY, close, filled, gradients, nudge, stream
from term_cases import Easy, agent_of, both_splits, dense, joined, want
from torch import Tensor

from unified_rl.correction import load_correction
from unified_rl.errors import ConfigError
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.rollout import LanguageRollout
from unified_rl.rollout.context import Hints, Refill
from unified_rl.rollout.sources import Demonstrations


def test_luffy_has_the_written_out_gradient_on_own_and_shown_rows() -> None:
    policy, rows = joined(demonstrations=Demonstrations(per_group=1))
    nudge(policy, 0.05)
    correction = load_correction("luffy", advantage={"baseline": "mean", "scale": "none"})
    agent = agent_of(policy, rows, correction)
    _, lp = dense(policy, rows)
    reward, mask = rows["reward"].sum(-1), rows["mask"]
    mean = torch.stack([reward[rows["group"] == g].mean() for g in rows["group"]])
    a = (reward - mean)[:, None]
    ratio = torch.where(mask, lp - rows["behavior_log_prob"], 0.0).exp()
    ppo = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
    p = lp.exp()
    shown = (rows["source"] == 2)[:, None]
    loss = -(torch.where(shown, p / (p + 0.1) * a, ppo) * mask).sum() / mask.sum()
    written = want(agent, loss)
    for micro_batch in (None, 5):
        agent = agent_of(copy.deepcopy(policy), rows, correction, micro_batch=micro_batch)
        close(gradients(agent, filled(rows, 1)), written)


def test_luffy_without_demonstrations_is_grpo_without_scale() -> None:
    policy, rows = joined()
    nudge(policy, 0.02)
    settings = {"advantage": {"baseline": "mean", "scale": "none"}}
    agent = agent_of(copy.deepcopy(policy), rows, load_correction("luffy", **settings))
    with pytest.raises(ConfigError, match="recipe=luffy"):
        agent.update(filled(rows, 1))
    agent.checked = True  # later updates may hold none
    a = gradients(agent, filled(rows, 1))
    b = gradients(agent_of(copy.deepcopy(policy), rows, load_correction("ppo", **settings)), filled(rows, 1))
    close(a, b)


def test_demonstrations_under_a_plain_ratio_are_refused() -> None:
    policy, rows = joined(demonstrations=Demonstrations(per_group=1))
    with pytest.raises(ConfigError, match="rows=own"):
        agent_of(policy, rows).update(filled(rows, 1))


@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0])
def test_chord_runs_from_grpo_to_weighted_likelihood(mu: float) -> None:
    policy, rows = joined(demonstrations=Demonstrations(rows=6))
    nudge(policy, 0.02)
    own = rows[rows["source"] == 0]
    shown = rows[rows["source"] == 2]
    objectives = {
        "policy": {"rows": "own", "coefficient": 1 - mu},
        "imitate": {"name": "nll", "weight": "uncertain", "coefficient": mu},
    }
    got = both_splits(policy, rows, objectives=objectives)
    grpo = gradients(agent_of(copy.deepcopy(policy), own), filled(own, 1))
    agent = agent_of(policy, shown)
    _, lp = dense(policy, shown)
    phi = (lp.exp() * (1 - lp.exp())).detach()
    sft = want(agent, -(lp * phi * shown["mask"]).sum() / shown["mask"].sum())
    close(got, {name: (1 - mu) * grpo[name] + mu * sft[name] for name in grpo})


def test_hpt_routes_groups_and_its_gate_reaches_grpo_and_sft() -> None:
    policy, rows = joined(demonstrations=Demonstrations(per_group=1))
    nudge(policy, 0.02)
    own, shown = rows[rows["source"] == 0], rows[rows["source"] == 2]
    correction = {"baseline": "mean", "scale": "std", "rows": "own"}

    def run(count: int) -> dict[str, Tensor]:
        objectives = {
            "policy": {"rows": {"source": "own", "unless": "failed"}},
            "imitate": {"name": "nll", "rows": {"source": "demonstration", "when": "failed"}},
        }
        gates = {"failed": {"name": "success_at_most", "count": count}}
        made = load_correction("grpo", advantage=correction)
        options = {"objectives": objectives, "gates": gates}
        found = [
            gradients(agent_of(copy.deepcopy(policy), rows, made, micro_batch=m, **options), filled(rows, 1))
            for m in (None, 5)
        ]
        close(found[1], found[0])
        return found[0]

    close(run(-1), gradients(agent_of(copy.deepcopy(policy), own), filled(own, 1)))
    agent = agent_of(policy, shown)
    _, lp = dense(policy, shown)
    close(run(4), want(agent, -(lp * shown["mask"]).sum() / shown["mask"].sum()))
    mixed = run(0)  # the third group fails: its demonstration alone; the first two: GRPO
    solved, one = own[:8], shown[2:]
    grpo = gradients(agent_of(copy.deepcopy(policy), solved), filled(solved, 1))
    _, lp = dense(policy, one)
    sft = want(agent, -(lp * one["mask"]).sum() / one["mask"].sum())
    close(mixed, {name: grpo[name] + sft[name] for name in grpo})


def test_hints_leave_solved_prompts_alone_and_are_never_trained_on() -> None:
    env = Easy(modulus=5, terms=3)
    policy = CausalLM(**env.policy_inputs(), config=TINY, seed=1)

    def rollout(context: Any) -> LanguageRollout:
        return LanguageRollout(env, policy, 1.0, stream(0), stream(1), prompts=24, group_size=1, context=context)

    plain, _ = rollout(None).collect(0)
    guided, metrics = rollout(Hints((0.5, 0.9))).collect(0)
    solved = (plain["reward"].sum(-1).reshape(24, 1) > 0).any(-1).repeat_interleave(1)
    assert metrics["rollout/hinted"] == float((~solved).float().mean()) > 0
    assert bool(solved.any())
    for key in plain.keys():
        assert torch.equal(plain[key][solved], guided[key][solved]), key
    shown = (
        guided["token_mask"].sum(-1) - guided["mask"].sum(-1) - (plain["token_mask"].sum(-1) - plain["mask"].sum(-1))
    )
    assert bool((shown[~solved] > 0).all()) and bool((shown[solved] == 0).all())
    with torch.no_grad():
        gap = (policy.log_prob(guided).log_prob - guided["behavior_log_prob"]) * guided["mask"]
    assert float(gap.abs().max()) < 1e-4  # the continuation was sampled behind the hint


def test_refill_replaces_equal_groups_alone_and_keeps_their_demonstrations_with_their_prompts() -> None:
    env = Easy(modulus=5, terms=3)
    policy = CausalLM(**env.policy_inputs(), config=TINY, seed=1)

    def rollout(context: Any) -> LanguageRollout:
        own = Demonstrations(per_group=1)
        options = {"context": context, "sources": {"demonstrations": own}}
        return LanguageRollout(env, policy, 1.0, stream(0), stream(1), prompts=12, group_size=4, **options)

    plain, _ = rollout(None).collect(0)
    rows, metrics = rollout(Refill(tries=4)).collect(0)
    own, shown = rows[:48], rows[48:]
    total = plain["reward"][:48].sum(-1).reshape(12, 4)
    mixed = (total.amax(-1) > total.amin(-1)).repeat_interleave(4)
    now = own["reward"].sum(-1).reshape(12, 4)
    assert int(mixed.sum()) > 0 and metrics["rollout/refilled"] > 0
    assert torch.equal(plain["tokens"][:48][mixed], own["tokens"][mixed])
    assert int((now.amax(-1) > now.amin(-1)).sum()) > int(mixed.sum()) // 4
    assert torch.equal(own["prompt_id"].reshape(12, 4)[:, 0], shown["prompt_id"])
    assert bool((shown["source"] == 2).all())


def test_a_run_that_adds_terms_and_schedules_resumes_bit_for_bit(tmp_path: Any) -> None:
    from test_resume import COMMON, LANGUAGE, cut_run, equal, rows_of, same_files

    from unified_rl.config import compose
    from unified_rl.training.checkpoint import checkpoints, read_checkpoint
    from unified_rl.training.run import resume, train

    chord = [
        "recipe=chord",
        "rollout.sources.demonstrations.rows=4",
        "correction=decoupled_ppo",
        "rollout.context._target_=unified_rl.rollout.context.Hints",
    ]
    kept = [o for o in LANGUAGE if not o.startswith("correction")]
    whole = train(compose([*COMMON, *kept, *chord, "steps=96", "checkpoint_every=16", f"run_dir={tmp_path / 'whole'}"]))
    saves = checkpoints(whole / "checkpoints")
    final = read_checkpoint(saves[-1])
    for save in saves[1:-1:2]:
        part = tmp_path / save.name
        cut_run(whole, part, save)
        resume(str(part))
        equal(final, read_checkpoint(checkpoints(part / "checkpoints")[-1]))
        same_files(saves[-1] / "replay", checkpoints(part / "checkpoints")[-1] / "replay")
        assert rows_of(part) == rows_of(whole)
