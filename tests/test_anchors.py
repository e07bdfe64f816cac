"""Other policies by name: what each kind gives, how it follows, that it resumes, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agent_cases import LANES, close, control_agent, filled, gaussian, gradients, nudge, transitions
from term_cases import DISTILL, agent_of, both_splits, dense, joined, want

from unified_rl.correction import load_correction
from unified_rl.errors import CheckpointError, ConfigError
from unified_rl.rollout.sources import Demonstrations

KL = {"name": "k2", "anchor": "base", "coefficient": 1.0}
"""A penalty whose gradient is ``log_prob - base_log_prob`` times the score."""


def compared(name: str) -> dict[str, Any]:
    return {"distill": {**DISTILL, "anchor": name, "coefficient": 1e-3}}


def weights(policy: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in policy.parameters()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def three(agent: Any, rows: Any) -> list[list[torch.Tensor]]:
    """The policy's weights before and after each of three updates."""
    agent.checked = True
    found = [weights(agent.policy)]
    for _ in range(3):
        agent.update(filled(rows, 1))
        found.append(weights(agent.policy))
    return found


@pytest.mark.parametrize(
    ("name", "node", "members"),
    [("base", {}, 0), ("base", {"sync_every": 2}, 2), ("old", {}, 3), ("base", {"sync_every": 1}, 3), ("self", {}, 3)],
)
def test_a_provider_holds_the_weights_of_its_kind(name: str, node: dict[str, Any], members: int) -> None:
    policy, rows = joined()
    agent = agent_of(policy, rows, objectives=compared(name), anchors={name: node}, lr=1e-2)
    path = three(agent, rows)
    assert not equal(path[0], path[2]) and not equal(path[2], path[3])
    assert equal(weights(agent.anchors[name].policy), path[members])


def test_a_moving_average_lags_behind_by_its_decay() -> None:
    policy, rows = joined()
    agent = agent_of(policy, rows, objectives=compared("self"), anchors={"self": {"ema": 0.9}}, lr=1e-2)
    path = three(agent, rows)
    mean = path[0]
    for newest in path[1:]:
        mean = [0.9 * m + 0.1 * n for m, n in zip(mean, newest, strict=True)]
    for a, b in zip(weights(agent.anchors["self"].policy), mean, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("node", [{}, {"sync_every": 4}, {"ema": 0.9}, {"ema": 0.9, "every": 4}])
def test_a_provider_resumes_bit_for_bit(node: dict[str, Any]) -> None:
    policy, rows = joined()

    def make() -> Any:
        return agent_of(copy.deepcopy(policy), rows, objectives=compared("base"), anchors={"base": node}, lr=1e-2)

    agent, again = make(), make()
    three(agent, rows)
    again.load_state_dict(copy.deepcopy(agent.state_dict()))
    three(agent, rows), three(again, rows)
    assert equal(weights(agent.policy), weights(again.policy))
    assert equal(weights(agent.anchors["base"].policy), weights(again.anchors["base"].policy))
    assert not equal(weights(agent.anchors["base"].policy), weights(agent.policy))


def test_an_average_may_move_after_every_so_many_updates() -> None:
    policy, rows = joined()
    agent = agent_of(policy, rows, objectives=compared("base"), anchors={"base": {"ema": 0.4, "every": 2}}, lr=1e-2)
    path = three(agent, rows)
    wanted = [0.4 * m + 0.6 * n for m, n in zip(path[0], path[2], strict=True)]
    for a, b in zip(weights(agent.anchors["base"].policy), wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_a_folder_is_read_again_and_not_saved(tmp_path: Path) -> None:
    policy, rows = joined()
    other = copy.deepcopy(policy)
    nudge(other, 0.1)
    other.save(str(tmp_path))
    agent = agent_of(policy, rows, objectives=compared("base"), anchors={"base": {"folder": str(tmp_path)}})
    assert agent.anchors.state_dict()["anchors"] == {"base": {}}
    assert equal(weights(agent.anchors["base"].policy), weights(other))


def test_the_flat_setting_is_the_provider_named_teacher(tmp_path: Path) -> None:
    policy, rows = joined()
    other = copy.deepcopy(policy)
    nudge(other, 0.1)
    other.save(str(tmp_path))
    flat = gradients(agent_of(copy.deepcopy(policy), rows, "erpd", teacher=str(tmp_path)), filled(rows, 1))
    named = agent_of(copy.deepcopy(policy), rows, "erpd", anchors={"teacher": {"folder": str(tmp_path)}})
    got = gradients(named, filled(rows, 1))
    assert all(torch.equal(got[key], value) for key, value in flat.items())
    with pytest.raises(ConfigError, match=r"agent\.teacher and agent\.anchors\.teacher name the same anchor"):
        agent_of(policy, rows, "erpd", teacher=str(tmp_path), anchors={"teacher": {"folder": str(tmp_path)}})


def test_a_teacher_from_a_folder_takes_the_settings_of_a_model(tmp_path: Path) -> None:
    policy, rows = joined()
    other = copy.deepcopy(policy)
    nudge(other, 0.1)
    other.save(str(tmp_path / "model"))
    base = {"folder": str(tmp_path / "model")}

    def shown(**settings: Any) -> tuple[Any, torch.Tensor]:
        agent = agent_of(policy, rows, objectives=compared("base"), anchors={"base": {**base, **settings}})
        provider = agent.anchors["base"]
        return provider.policy, provider.log_prob(rows) * rows["mask"]

    teacher, plain = shown()
    with torch.no_grad():
        hot = type(policy)(policy.tokenizer, policy.max_length, path=base["folder"], temperature=2.0).log_prob(rows)
    torch.testing.assert_close(shown(temperature=2.0)[1], hot.log_prob, atol=1e-6, rtol=0.0)
    half, rounded = shown(dtype="bfloat16")
    assert teacher.model.dtype == torch.float32 and half.model.dtype == torch.bfloat16
    apart = [(value - plain).abs().max() for value in (rounded, shown(autocast=True)[1])]
    assert all(1e-5 < float(one) < 0.3 for one in apart)
    gradients(agent_of(policy, rows, objectives=compared("base"), anchors={"base": {**base, "dtype": "bfloat16"}}),
              filled(rows, 1))  # fmt: skip


def test_a_teacher_may_be_an_adapter_on_a_model(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    policy, rows = joined()
    policy.save(str(tmp_path / "model"))
    adapted = type(policy)(policy.tokenizer, policy.max_length, path=str(tmp_path / "model"), lora={"r": 2})
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(0.1)
    adapted.save(str(tmp_path / "adapter"))
    node = {"folder": str(tmp_path / "model"), "adapter": str(tmp_path / "adapter")}
    agent = agent_of(policy, rows, objectives=compared("base"), anchors={"base": node})
    with torch.no_grad():
        want, plain = adapted.log_prob(rows).log_prob, policy.log_prob(rows).log_prob
    torch.testing.assert_close(agent.anchors["base"].log_prob(rows), want, atol=1e-5, rtol=0.0)
    assert float((want - plain).abs().max()) > 1e-2


@pytest.mark.parametrize("lam", [0.0, 1.0, 1.25])
def test_a_penalty_may_compare_with_any_provider(lam: float) -> None:
    """Reward extrapolation, ``lam (teacher - base) - (policy - base)`` a token; G-OPD and ExOPD.

    At ``lam`` 1 the base cancels, at 0 it is the divergence from the base.
    """
    policy, rows = joined()
    base, teacher = copy.deepcopy(policy), copy.deepcopy(policy)
    nudge(teacher, 0.1)
    nudge(policy, 0.05)
    penalties = [{**KL, "anchor": "teacher", "coefficient": lam}, {**KL, "coefficient": 1.0 - lam}]
    correction = load_correction("reinforce", anchors=["base"], penalty=penalties)
    silent = [{"name": "sign", "positive": 0.0, "negative": 0.0}]  # no reward beside the two policies

    def prepare(agent: Any) -> None:
        agent.anchors["base"].policy.load_state_dict(base.state_dict())
        agent.anchors["teacher"].policy.load_state_dict(teacher.state_dict())

    got = both_splits(policy, rows, correction, prepare, anchors={"base": {}, "teacher": {}}, maps=silent)
    agent = agent_of(policy, rows)
    _, lp = dense(policy, rows)
    with torch.no_grad():
        b, t = dense(base, rows)[1], dense(teacher, rows)[1]
    reward = (lam * (t - b) - (lp - b)).detach()
    close(got, want(agent, -(reward * lp * rows["mask"]).sum() / rows["mask"].sum()))


def test_a_view_scores_the_same_units_at_other_columns() -> None:
    policy, rows = joined()
    wide = rows.clone()
    wide["privileged_tokens"] = F.pad(rows["tokens"], (3, 0), value=5)
    wide["privileged_mask"] = F.pad(rows["mask"], (3, 0))
    correction = load_correction("reinforce", anchors=["base"], penalty=[KL])
    agent = agent_of(policy, wide, correction, anchors={"base": {"view": "privileged"}})
    record = agent._draw(filled(wide, 1))
    agent.anchors.annotate(record, 0)
    full = policy.model(input_ids=wide["privileged_tokens"]).logits.float().log_softmax(-1)[:, 2:-1]
    expected = full.gather(-1, rows["tokens"].unsqueeze(-1)).squeeze(-1) * rows["mask"]
    width = record["mask"].shape[1]
    torch.testing.assert_close(record["base_log_prob"], expected[:, :width], atol=1e-5, rtol=1e-4)
    assert float((expected - policy.log_prob(rows).log_prob).abs().max()) > 1e-3  # the context changes them


def test_a_map_gets_the_anchors_that_it_asks_for() -> None:
    policy, rows = joined()
    reference = copy.deepcopy(policy)
    nudge(policy, 0.05)
    agent = agent_of(policy, rows, maps=[{"name": "overconfident", "alpha": 2.0}])
    agent.anchors["reference"].policy.load_state_dict(reference.state_dict())
    agent.checked, agent.version = True, 1
    record = agent._annotate(agent._draw(filled(rows, 1)), {})
    plain = agent_of(copy.deepcopy(policy), rows)
    plain.version = 1
    before = plain._annotate(plain._draw(filled(rows, 1)), {})["advantage"]
    with torch.no_grad():
        gap = (dense(policy, rows)[1] - dense(reference, rows)[1]) * rows["mask"]
    expected = before * torch.where(before < 0, 1 + 2.0 * F.softplus(gap.sum(-1, keepdim=True)), 1.0)
    torch.testing.assert_close(record["advantage"], expected, atol=1e-4, rtol=1e-4)


def test_a_control_policy_has_providers_too() -> None:
    policy = gaussian(normalize_observation=True)
    policy.update_normalizer(torch.randn(64, 3))
    rows = transitions(policy)
    agent = control_agent(policy, objectives=compared("base"), anchors={"base": {"ema": 0.9}}, lr=1e-2)
    assert agent.anchors["base"].policy.normalizer is policy.normalizer  # only its weights are older
    agent.update(filled(rows, LANES))
    agent.version = 0
    assert float(agent.update(filled(rows, LANES))["loss/distill"]) > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"objectives": compared("bsae"), "anchors": {"base": {}}},
            r"distill compares with the policy 'bsae', which nobody",
        ),
        ({"objectives": compared("teacher")}, r"agent\.objectives\.distill learns from a teacher: set agent\.teacher"),
        ({"anchors": {"base": {}}}, r"agent\.anchors\.base is set, but nothing compares with it"),
        (
            {"objectives": compared("base"), "anchors": {"base": {"foldr": "x"}}},
            r"agent\.anchors\.base has no field 'foldr'; did",
        ),
        (
            {"objectives": compared("base"), "anchors": {"base": {"ema": 1.0}}},
            r"agent\.anchors\.base\.ema=1\.0 must lie in \[0, 1\)",
        ),
        (
            {"objectives": compared("base"), "anchors": {"base": {"sync_every": 0}}},
            r"sync_every=0 must be at least 1",
        ),
        (
            {"objectives": compared("base"), "anchors": {"base": {"ema": "slow"}}},
            r"base\.ema is 'slow'; it must be a number in \[0, 1\)",
        ),
        (
            {"objectives": compared("base"), "anchors": {"base": {"ema": 0.5, "sync_every": 2}}},
            "one of folder, sync_every",
        ),
        (
            {"objectives": compared("base"), "anchors": {"base": {"ema": 0.5, "dtype": "bfloat16"}}},
            r"base\.dtype would be of no effect: .* agent\.anchors\.base\.folder",
        ),
        (
            {"objectives": compared("base"), "anchors": {"base": {"every": 2}}},
            r"base\.every says how often a moving average moves: set .*base\.ema too, or .*base\.sync_every alone",
        ),
        (
            {"objectives": compared("base"), "anchors": {"base": "runs/x"}},
            r"agent\.anchors\.base is 'runs/x'; it must be a",
        ),
        (
            {"objectives": compared("behavior"), "anchors": {"behavior": {}}},
            r"agent\.anchors\.behavior: the record holds",
        ),
    ],
)
def test_an_anchor_that_does_not_fit_is_refused_before_the_first_step(options: Any, words: str) -> None:
    policy, rows = joined()
    with pytest.raises(ConfigError, match=words):
        agent_of(policy, rows, **options)


def test_a_folder_without_a_policy_is_named(tmp_path: Path) -> None:
    policy, rows = joined()
    with pytest.raises(CheckpointError, match=r"agent\.anchors\.base\.folder=.* no config\.yaml"):
        agent_of(policy, rows, objectives=compared("base"), anchors={"base": {"folder": str(tmp_path)}})


def test_a_penalty_names_only_declared_anchors() -> None:
    with pytest.raises(ConfigError, match=r"penalty\.0\.anchor 'bsae' is unknown; did you mean 'base'"):
        load_correction("reinforce", anchors=["base"], penalty=[{**KL, "anchor": "bsae"}])
    policy, rows = joined()
    with pytest.raises(
        ConfigError, match=r"correction reinforce compares with the policy 'base', .*agent\.anchors\.base="
    ):
        agent_of(policy, rows, load_correction("reinforce", anchors=["base"], penalty=[KL]))


def test_a_policy_that_is_only_diverged_from_is_not_scored_beforehand() -> None:
    policy, rows = joined()
    agent = agent_of(policy, rows, objectives=compared("base"), anchors={"base": {}})
    record = agent._annotate(agent._draw(filled(rows, 1)), {})
    assert "base_log_prob" not in record.keys() and "proximal_log_prob" not in record.keys()


def test_rows_that_no_term_reads_leave_before_other_policies_score_them() -> None:
    policy, rows = joined(demonstrations=Demonstrations(per_group=1))
    correction = load_correction("reinforce", anchors=["base"], penalty=[KL])
    agent = agent_of(policy, rows, correction, objectives={"policy": {"rows": "own"}}, anchors={"base": {}})
    scored: list[int] = []
    provider = agent.anchors["base"]
    log_prob = provider.log_prob
    provider.log_prob = lambda part: scored.append(len(part)) or log_prob(part)  # type: ignore[method-assign,func-returns-value]
    record = agent._annotate(agent._draw(filled(rows, 1)), {})
    assert len(rows) == 15 and scored == [12] and len(record) == 12
