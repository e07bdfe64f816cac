"""Several teachers: each of the rows that a column says are its own, or one policy of their mean weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from agent_cases import TINY, close, filled, gaussian, nudge, transitions
from term_cases import agent_of, both_splits, dense, joined, want

from unified_rl.agents.providers import Routed
from unified_rl.errors import ConfigError, RecordError
from unified_rl.policies.causal_lm import CausalLM

DISTILL: dict[str, Any] = {"name": "divergence", "kind": "reverse_kl", "anchor": "base"}


def saved(policy: CausalLM, folder: Path, scale: float) -> CausalLM:
    other = copy.deepcopy(policy)
    nudge(other, scale)
    other.save(str(folder))
    return other


def test_each_row_is_compared_with_its_own_teacher_whatever_their_sizes(tmp_path: Path) -> None:
    policy, rows = joined()
    wide = CausalLM(
        policy.tokenizer, policy.max_length, config={**TINY, "hidden_size": 2 * TINY["hidden_size"]}, seed=5
    )
    wide.save(str(tmp_path / "b"))
    teachers = [saved(policy, tmp_path / "a", 0.2), wide]
    rows["domain"] = torch.tensor([0, 1, 1, 0] * 3)
    node = {"folders": [str(tmp_path / "a"), str(tmp_path / "b")], "by": "domain"}
    got = both_splits(
        policy, rows, "reinforce", objectives={"policy": None, "distill": DISTILL}, anchors={"base": node}
    )
    s, _ = dense(policy, rows)
    with torch.no_grad():
        both = [dense(teacher, rows) for teacher in teachers]
    own = rows["domain"][:, None, None] == 0
    t = torch.where(own, both[0][0], both[1][0])
    kl = (s.exp() * (s - t)).sum(-1)
    close(got, want(agent_of(policy, rows), (kl * rows["mask"]).sum() / rows["mask"].sum()))

    agent = agent_of(policy, rows, maps=[{"name": "taught", "outcome": 0.5}], anchors={"teacher": node})
    agent.checked, agent.version = True, 1
    record = agent._annotate(agent._draw(filled(rows, 1)), {})
    with torch.no_grad():
        signal = torch.where(own[..., 0], both[0][1], both[1][1]) - dense(policy, rows)[1]
    plain = agent_of(copy.deepcopy(policy), rows)
    plain.version = 1
    before = plain._annotate(plain._draw(filled(rows, 1)), {})["advantage"]
    mask = record["mask"]
    wanted = 0.5 * before + signal[:, : mask.shape[1]]
    torch.testing.assert_close(record["advantage"][mask], wanted[mask], atol=1e-4, rtol=1e-4)
    assert [id(p) for p in agent.anchors.models()] == [id(p) for p in agent.anchors["teacher"].policies]

    record["domain"][3] = 2
    with pytest.raises(RecordError, match="a row's domain is 2, and there are teachers 0 to 1"):
        agent.anchors["teacher"].log_prob(record)
    with pytest.raises(
        ConfigError, match=r"teacher\.by=domain reads the column domain, .* set rollout\.columns\.domain"
    ):
        agent.check_written([0], 4, ["reward", "group"])
    written = agent_of(
        policy, rows, maps=[{"name": "taught", "outcome": 0.5}], anchors={"teacher": node},
        columns={"domain": "bent"},
    )  # fmt: skip
    written.check_written([0], 4, ["reward", "group"])  # a column of the agent's is read by its teachers


def test_logits_of_no_unit_are_those_of_a_teacher_that_has_rows() -> None:
    policy, rows = joined()
    config = {**TINY, "hidden_size": 2 * TINY["hidden_size"]}
    wide = CausalLM(policy.tokenizer, policy.max_length, config=config, seed=5)
    rows["domain"] = torch.ones(len(rows), dtype=torch.int64)
    teacher = Routed([wide, policy], "domain")
    states = teacher.states(rows)[0]
    assert teacher.logits(states[:0]).shape == (0, teacher.logits(states).shape[1])


def test_teachers_of_robots_are_routed_too() -> None:
    policies = [gaussian(), gaussian()]
    nudge(policies[1], 0.3)
    rows = transitions(policies[0]).reshape(-1)
    rows["domain"] = torch.arange(len(rows)) % 2
    teacher = Routed(policies, "domain")
    mean, log_std = teacher.normals(rows)
    for number, policy in enumerate(policies):
        own = rows["domain"] == number
        for found, wanted in zip((mean, log_std), policy.normals(rows[own]), strict=True):
            torch.testing.assert_close(found[own], wanted)


@pytest.mark.parametrize("given", [None, [3.0, 1.0]])
def test_merged_teachers_are_one_policy_of_their_mean_weights(given: list[float] | None, tmp_path: Path) -> None:
    policy, rows = joined()
    a, b = saved(policy, tmp_path / "a", 0.2), saved(policy, tmp_path / "b", 0.1)
    node = {"folders": [str(tmp_path / "a"), str(tmp_path / "b")], **({} if given is None else {"weights": given})}
    agent = agent_of(policy, rows, objectives={"distill": DISTILL}, anchors={"base": node})
    share = 0.5 if given is None else 0.75
    for got, x, y in zip(agent.anchors["base"].policy.parameters(), a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(got, share * x + (1 - share) * y)
    assert agent.anchors.state_dict()["anchors"] == {"base": {}}


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"folders": []}, r"base\.folders"),
        ({"by": "domain"}, r"base\.by is of several teachers: set agent\.anchors\.base\.folders"),
        ({"folder": "x", "weights": [1.0]}, r"base\.weights is of several teachers"),
        ({"folders": ["x"], "by": "d", "weights": [1.0]}, "set one of them"),
        ({"folders": ["x"], "folder": "x"}, "one of folder, sync_every, ema and folders"),
    ],
)
def test_settings_of_several_teachers_that_exclude_each_other_are_refused(node: dict[str, Any], words: str) -> None:
    policy, rows = joined()
    with pytest.raises(ConfigError, match=words):
        agent_of(policy, rows, objectives={"distill": DISTILL}, anchors={"base": node})


def test_teachers_that_cannot_be_merged_are_refused(tmp_path: Path) -> None:
    policy, rows = joined()
    policy.save(str(tmp_path / "a"))
    config = {**TINY, "hidden_size": 2 * TINY["hidden_size"]}
    CausalLM(policy.tokenizer, policy.max_length, config=config).save(str(tmp_path / "b"))
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    for node, words in (
        ({"folders": folders}, r"differ in their weights: set agent\.anchors\.base\.by"),
        ({"folders": folders[:1], "weights": [0.0]}, r"base\.weights needs one number for each of 1 folders"),
    ):
        with pytest.raises(ConfigError, match=words):
            agent_of(policy, rows, objectives={"distill": DISTILL}, anchors={"base": node})
