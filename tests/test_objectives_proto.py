"""Prototype: terms against written-out losses, their limits, and every split of a batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agent_cases import TINY, close, filled, gradients, nudge, stream
from tensordict import TensorDict
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unified_rl.agents.policy_gradient import PolicyGradient
from unified_rl.correction import load_correction
from unified_rl.envs.language import ChainMod
from unified_rl.envs.language.base import Verdict
from unified_rl.errors import ConfigError
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.rollout import LanguageRollout
from unified_rl.rollout.context import Hints, Refill
from unified_rl.rollout.sources import Demonstrations

FULL = {"imitate": {"name": "nll"}}


class Easy(ChainMod):
    """Any answer with two different digits among its last three letters counts: some groups fail, some do not."""

    def _judge(self, problem: dict[str, Any], text: str, turn: int) -> Verdict:
        right = len({c for c in text[-3:] if c.isdigit()}) >= 2
        return Verdict(reward=float(right), correct=right)

    def respond(self, problems: Any, turns: Any, finished: Any) -> Any:
        return super().respond(problems, turns, torch.ones_like(finished))


def joined(seed: int = 0, **sources: Any) -> tuple[CausalLM, TensorDict]:
    env = ChainMod(modulus=5, terms=3)
    policy = CausalLM(**env.policy_inputs(), config=TINY, seed=1)
    rollout = LanguageRollout(
        env, policy, 1.0, stream(seed), stream(seed + 1), prompts=3, group_size=4, sources=sources
    )
    rows, _ = rollout.collect(0)
    own = rows["source"] == 0
    rows["reward"][own] = torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0])[:, None]
    return policy, rows


def dense(policy: CausalLM, rows: TensorDict) -> tuple[Tensor, Tensor]:
    """Log-probs of the whole vocabulary ``[B, N, V]``, shifted to the token they predict, and of the tokens."""
    logits = policy.model(input_ids=rows["tokens"]).logits.float()
    full = F.pad(logits.log_softmax(-1)[:, :-1], (0, 0, 1, 0))
    return full, full.gather(-1, rows["tokens"].unsqueeze(-1)).squeeze(-1)


def want(agent: PolicyGradient, loss: Tensor) -> dict[str, Tensor]:
    names = [name for name, _ in agent.optimizer.named]
    return dict(zip(names, torch.autograd.grad(loss, agent.optimizer.parameters), strict=True))


def agent_of(policy: Any, rows: TensorDict, correction: Any = "grpo", **options: Any) -> PolicyGradient:
    made = load_correction(correction) if isinstance(correction, str) else correction
    return PolicyGradient(policy, made, stream(), rows=len(rows), max_grad_norm=None, **options)


def both_splits(policy: Any, rows: TensorDict, correction: str = "grpo", prepare: Any = None, **options: Any) -> Any:
    """The gradient of the whole batch, checked against micro-batches of 5 rows."""
    found = []
    for micro_batch in (None, 5):
        agent = agent_of(copy.deepcopy(policy), rows, correction, micro_batch=micro_batch, **options)
        if prepare is not None:
            prepare(agent)
        found.append(gradients(agent, filled(rows, 1)))
    close(found[1], found[0])
    return found[0]


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


@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize(("kind", "beta"), [("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.3)])
def test_distillation_has_the_gradient_of_the_dense_divergence(kind: str, beta: float, chunk: int) -> None:
    policy, rows = joined()
    teacher = copy.deepcopy(policy).requires_grad_(False)
    nudge(policy, 0.1)
    policy.logit_chunk = teacher.logit_chunk = chunk
    node = {"name": "jsd", "beta": beta} if kind == "jsd" else kind
    objectives = {"policy": None, "distill": {"name": "divergence", "kind": node, "anchor": "reference"}}

    def with_teacher(agent: PolicyGradient) -> None:
        assert agent.anchors.reference is not None
        agent.anchors.reference.load_state_dict(teacher.state_dict())

    got = both_splits(policy, rows, "reinforce", with_teacher, objectives=objectives)
    agent = agent_of(policy, rows)
    s, _ = dense(policy, rows)
    with torch.no_grad():
        t, _ = dense(teacher, rows)
    if kind == "forward_kl":
        value = (t.exp() * (t - s)).sum(-1)
    elif kind == "reverse_kl":
        value = (s.exp() * (s - t)).sum(-1)
    else:
        m = ((1 - beta) * s.exp() + beta * t.exp()).log()
        value = beta * (t.exp() * (t - m)).sum(-1) + (1 - beta) * (s.exp() * (s - m)).sum(-1)
    close(got, want(agent, (value * rows["mask"]).sum() / rows["mask"].sum()))


def test_a_policy_that_is_its_teacher_does_not_move() -> None:
    policy, rows = joined()
    objectives = {"policy": None, "distill": {"name": "divergence", "kind": "reverse_kl", "anchor": "reference"}}
    got = gradients(agent_of(policy, rows, "reinforce", objectives=objectives), filled(rows, 1))
    assert max(float(g.abs().max()) for g in got.values()) < 1e-6


class Shapes(TorchDispatchMode):
    """Leading sizes of every tensor whose last dimension is the vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.seen = vocabulary, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor) and x.ndim >= 2 and x.shape[-1] == self.vocabulary:
                self.seen.add(x.numel() // self.vocabulary)
        return out


@pytest.mark.parametrize("chunk", [8, 0])
def test_no_more_than_a_chunk_of_logits_of_either_policy_ever_lives(chunk: int) -> None:
    policy, rows = joined()
    policy.logit_chunk = chunk
    head = policy.model.get_output_embeddings().weight
    objectives = {"policy": None, "distill": {"name": "divergence", "kind": "reverse_kl", "anchor": "reference"}}
    agent = agent_of(policy, rows, "reinforce", objectives=objectives)
    agent.checked = True
    replay = filled(rows, 1)
    with Shapes(head.shape[0]) as shapes:
        agent.update(replay)
    units = int(rows["mask"].sum())
    logits = shapes.seen - {head.shape[1]}  # the transposed head itself
    assert units > 64 and (max(logits) <= 8 if chunk else units in logits)


def test_dpo_has_the_textbook_gradient_for_every_split() -> None:
    policy, rows = joined()
    reference = copy.deepcopy(policy)
    nudge(policy, 0.05)
    objectives = {"policy": None, "prefer": {"name": "preference", "link": {"name": "dpo", "beta": 0.7}}}

    def with_reference(agent: PolicyGradient) -> None:
        assert agent.anchors.reference is not None
        agent.anchors.reference.load_state_dict(reference.state_dict())

    got = both_splits(policy, rows, "reinforce", with_reference, objectives=objectives)
    agent = agent_of(policy, rows)
    _, lp = dense(policy, rows)
    with torch.no_grad():
        _, ref = dense(reference, rows)
    h = ((lp - ref) * rows["mask"]).sum(-1)
    pairs = [(0, 1), (4, 6)]  # the third group has no winner
    loss = -torch.stack([F.logsigmoid(0.7 * (h[w] - h[l])) for w, l in pairs]).mean()
    close(got, want(agent, loss))


def test_dpo_at_the_reference_costs_log_2() -> None:
    policy, rows = joined()
    objectives = {"policy": None, "prefer": {"name": "preference"}}
    metrics = agent_of(policy, rows, "reinforce", objectives=objectives, micro_batch=5).update(filled(rows, 1))
    assert float(metrics["loss/total"]) == pytest.approx(0.693147, abs=1e-5)


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


def test_a_teacher_of_equal_weights_and_an_empty_context_teaches_nothing_and_a_solution_does() -> None:
    policy, rows = joined()
    found = {}
    for style in ("same", "shifted"):
        pad = 0 if style == "same" else 3
        seen = {
            "privileged_tokens": F.pad(rows["tokens"], (pad, 0), value=5),
            "privileged_mask": F.pad(rows["mask"], (pad, 0)),
        }
        objectives = {"policy": None, "distill": {"name": "divergence", "anchor": "self", "view": "privileged"}}
        both = rows.copy().update(seen)
        got = gradients(agent_of(copy.deepcopy(policy), both, "reinforce", objectives=objectives), filled(both, 1))
        found[style] = max(float(g.abs().max()) for g in got.values())
    assert found["same"] < 1e-6 < 1e-3 < found["shifted"]


def test_a_controller_moves_its_coefficient_and_survives_a_checkpoint() -> None:
    policy, rows = joined()
    node = {"name": "proportional_integral", "metric": "train/reward", "target": 1.0, "gain": 0.1, "integral": 0.05}
    objectives = {"policy": {"coefficient": node}}
    agent = agent_of(policy, rows, objectives=objectives)
    agent.update(filled(rows, 1))
    error = 1.0 - float(rows["reward"].sum(-1).mean())
    again = agent_of(copy.deepcopy(policy), rows, objectives=objectives)
    again.load_state_dict(agent.state_dict())
    for one in (agent, again):
        one.objective.start(0.0, 1)
        assert one.objective.terms["policy"].coefficient == pytest.approx(0.15 * error)


def test_maps_reach_the_gradient() -> None:
    policy, rows = joined()
    plain = gradients(agent_of(copy.deepcopy(policy), rows), filled(rows, 1))
    maps = [{"name": "sign", "positive": 0.5, "negative": 0.5}]
    half = gradients(agent_of(copy.deepcopy(policy), rows, maps=maps), filled(rows, 1))
    close(half, {name: 0.5 * g for name, g in plain.items()})


@pytest.mark.parametrize(
    "name",
    [
        "grpo",
        "gspo",
        "gvpo",
        "copg",
        "tba",
        "red_drop",
        "m2po",
        "p3o",
        "nft",
        "icepop",
        "k1_mean_reject",
        "opmd",
        "asymre",
        "topr",
        "dr_grpo",
    ],
)
def test_a_term_over_own_rows_does_not_see_the_others_whatever_the_correction(name: str) -> None:
    policy, rows = joined(demonstrations=Demonstrations(per_group=1))
    nudge(policy, 0.02)
    own = rows[rows["source"] == 0]
    settings = {**load_correction(name).advantage, "rows": "own"}
    made = load_correction(name, advantage=settings)
    for micro_batch in (None, 5):
        options = {
            "objectives": {"policy": {"rows": "own"}, "hold": {"name": "nll", "coefficient": 1e-30}},
            "micro_batch": micro_batch,
        }
        got = gradients(agent_of(copy.deepcopy(policy), rows, made, **options), filled(rows, 1))
        close(got, gradients(agent_of(copy.deepcopy(policy), own, name), filled(own, 1)))


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


def test_a_privileged_teacher_is_aligned_by_unit() -> None:
    policy, rows = joined()
    teacher = copy.deepcopy(policy).requires_grad_(False)
    nudge(policy, 0.1)
    shift = torch.arange(len(rows)) % 4  # every row sees another number of tokens in front
    seen = rows.clone()
    wide = rows["tokens"].shape[1] + 4
    tokens, mask = torch.full((len(rows), wide), 5), torch.zeros(len(rows), wide, dtype=torch.bool)
    for row, by in enumerate(shift.tolist()):
        tokens[row, by : by + wide - 4], mask[row, by : by + wide - 4] = rows["tokens"][row], rows["mask"][row]
    seen["privileged_tokens"], seen["privileged_mask"] = tokens, mask
    objectives = {"policy": None, "distill": {"name": "divergence", "anchor": "reference", "view": "privileged"}}

    def with_teacher(agent: PolicyGradient) -> None:
        assert agent.anchors.reference is not None
        agent.anchors.reference.load_state_dict(teacher.state_dict())

    got = both_splits(policy, seen, "reinforce", with_teacher, objectives=objectives)
    agent = agent_of(policy, rows)
    s, _ = dense(policy, rows)
    full = F.pad(teacher.model(input_ids=tokens).logits.float().log_softmax(-1)[:, :-1], (0, 0, 1, 0))
    t = torch.stack([full[row, by : by + wide - 4] for row, by in enumerate(shift.tolist())])
    value = (s.exp() * (s - t)).sum(-1)
    close(got, want(agent, (value * rows["mask"]).sum() / rows["mask"].sum()))
