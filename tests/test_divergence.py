"""Divergences over whole distributions: against dense autograd, in little memory, or refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agent_cases import BOUNDS, LANES, close, control_agent, filled, gaussian, gradients, nudge, transitions
from term_cases import DISTILL, agent_of, both_splits, dense, joined, want
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unified_rl.agents.policy_gradient import PolicyGradient
from unified_rl.errors import ConfigError
from unified_rl.policies.autoregressive import AutoregressivePolicy
from unified_rl.policies.gaussian import GaussianPolicy
from unified_rl.policies.sampling import Sampling


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
        agent.anchors["reference"].policy.load_state_dict(teacher.state_dict())

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
        agent.anchors["reference"].policy.load_state_dict(teacher.state_dict())

    got = both_splits(policy, seen, "reinforce", with_teacher, objectives=objectives)
    agent = agent_of(policy, rows)
    s, _ = dense(policy, rows)
    full = F.pad(teacher.model(input_ids=tokens).logits.float().log_softmax(-1)[:, :-1], (0, 0, 1, 0))
    t = torch.stack([full[row, by : by + wide - 4] for row, by in enumerate(shift.tolist())])
    value = (s.exp() * (s - t)).sum(-1)
    close(got, want(agent, (value * rows["mask"]).sum() / rows["mask"].sum()))


def test_entries_of_the_vocabulary_that_sampling_cuts_off_stay_finite() -> None:
    policy, rows = joined()
    policy.sampling = Sampling(temperature=0.7, top_k=3)
    agent = agent_of(policy, rows, "reinforce", objectives={"policy": None, "distill": DISTILL})
    agent.checked = True  # the rows were sampled without truncation, and some of their tokens are cut off now
    metrics = agent.update(filled(rows, 1))
    assert not bool(torch.isfinite(policy.log_prob(rows).log_prob).all())
    assert float(metrics["loss/distill"]) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", {"name": "jsd", "beta": 0.3}])
def test_action_tokens_are_distilled_from_every_bins_probability(kind: Any) -> None:
    policy = AutoregressivePolicy(**BOUNDS, hidden=(8,), bins=5, seed=3)
    rows = transitions(policy)
    other = copy.deepcopy(policy)
    nudge(other)
    node = {**DISTILL, "kind": kind}
    found = []
    for micro_batch in (None, 5):
        agent = control_agent(
            copy.deepcopy(policy), objectives={"policy": None, "value": None, "distill": node}, micro_batch=micro_batch
        )
        agent.anchors["reference"].policy.load_state_dict(other.state_dict())
        found.append(gradients(agent, filled(rows, LANES)))
    close(found[1], found[0])
    observation, bins = rows["observation"].reshape(-1, 3), rows["action_bins"].reshape(-1, 2)
    s = policy._logits(observation, bins).log_softmax(-1)
    with torch.no_grad():
        t = other._logits(observation, bins).log_softmax(-1)
    m = torch.log(0.7 * s.exp() + 0.3 * t.exp())
    value = {
        "forward_kl": (t.exp() * (t - s)).sum(-1),
        "reverse_kl": (s.exp() * (s - t)).sum(-1),
        "jsd": 0.3 * (t.exp() * (t - m)).sum(-1) + 0.7 * (s.exp() * (s - m)).sum(-1),
    }[kind if isinstance(kind, str) else kind["name"]]
    names = [name for name, _ in policy.named_parameters()]
    written = torch.autograd.grad(value.mean(), list(policy.parameters()))
    close(found[0], {f"policy.{name}": g for name, g in zip(names, written, strict=True)})


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_gaussians_are_distilled_in_closed_form(kind: str) -> None:
    policy = gaussian()
    rows = transitions(policy)
    other = copy.deepcopy(policy)
    nudge(other)
    agent = control_agent(copy.deepcopy(policy), objectives={"policy": None, "distill": {**DISTILL, "kind": kind}})
    agent.anchors["reference"].policy.load_state_dict(other.state_dict())
    got = gradients(agent, filled(rows, LANES))
    here, there = (
        torch.distributions.Normal(m, s.exp())
        for m, s in (p.mean_and_log_std(rows["observation"]) for p in (policy, other))
    )
    there = torch.distributions.Normal(there.loc.detach(), there.scale.detach())
    pair = (there, here) if kind == "forward_kl" else (here, there)
    value = torch.distributions.kl_divergence(*pair).sum(-1).mean()
    written = torch.autograd.grad(value, list(policy.parameters()))
    names = [name for name, _ in policy.named_parameters()]
    close(
        {k: g for k, g in got.items() if k.startswith("policy.")},
        {f"policy.{n}": g for n, g in zip(names, written, strict=True)},
    )


class Opaque(GaussianPolicy):
    """Shows its log-probs alone."""

    normals = None  # type: ignore[assignment]
    entropy = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda o: control_agent(Opaque(**BOUNDS), objectives=o),
            "Opaque shows neither logits nor normals: use",
        ),
        (
            lambda o: control_agent(gaussian(), objectives={"d": {**o["d"], "kind": {"name": "jsd", "beta": 0.3}}}),
            "kind is one of forward_kl, reverse_kl",
        ),
        (lambda o: control_agent(gaussian(), objectives={"d": {**o["d"], "top_k": 4}}), "top_k 0"),
        (
            lambda o: control_agent(gaussian(), objectives={"d": {**o["d"], "top_k": -1}}),
            r"d\.top_k=-1 must be at least 0",
        ),
    ],
)
def test_a_divergence_that_a_policy_cannot_give_is_refused(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make({"d": DISTILL})


def test_a_projection_and_readers_exclude_each_other() -> None:
    policy, rows = joined()
    with pytest.raises(ConfigError, match=r"agent\.objectives\.d reads whole .*troll.*project_categorical"):
        agent_of(policy, rows, "troll", objectives={"d": DISTILL})


def test_readers_and_compiled_scoring_exclude_each_other() -> None:
    policy, rows = joined()
    with pytest.raises(ConfigError, match=r"agent\.objectives\.d reads whole distributions.*agent\.compile"):
        agent_of(policy, rows, objectives={"d": DISTILL}, compile=True)


def test_a_view_that_the_rows_do_not_hold_is_named() -> None:
    policy, rows = joined()
    agent = agent_of(policy, rows, objectives={"d": {**DISTILL, "view": "privileged"}})
    with pytest.raises(ConfigError, match=r"reads privileged_tokens, which the rows lack; set rollout\.privileged"):
        agent.update(filled(rows, 1))
    assert agent.optimizer.steps == 0
