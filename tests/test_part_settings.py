"""Settings of terms, anchors and sources that cannot work: refused before the first step, under their full names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from agent_cases import TINY, filled, stream
from run_cases import ALLOW, LANGUAGE
from term_cases import agent_of, joined

from unified_rl.config import compose
from unified_rl.envs.language import ChainMod
from unified_rl.errors import ConfigError, DataError
from unified_rl.objectives.coefficients import coefficient
from unified_rl.objectives.kinds import jsd
from unified_rl.objectives.rows import Rows
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.rollout import LanguageRollout
from unified_rl.rollout.sources import Demonstrations
from unified_rl.training.run import train
from unified_rl.units import Source

SHOWN = "{_target_: unified_rl.rollout.sources.Demonstrations, per_group: 1}"


@pytest.mark.parametrize("node", [3, {"when": 3}, {"unless": [1]}, {"source": True}])
def test_rows_are_names(node: Any) -> None:
    with pytest.raises(ConfigError, match=r"agent\.objectives\.imitate\.rows\.\w+ .*(a name, or a list of names)"):
        Rows.of(node, "agent.objectives.imitate.rows")


def test_complement_is_a_bool() -> None:
    with pytest.raises(ConfigError, match=r"x\.coefficient\.complement is 'maybe'"):
        coefficient({"name": "linear", "start": 1.0, "complement": "maybe"}, "x.coefficient")
    assert coefficient({"name": "linear", "start": 0.25, "complement": True})(0.0, 0) == 0.75


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ({"name": "divergence", "anchor": "old", "kind": {"name": "jsd", "beta": 1.5}}, r"kind\.beta=1\.5 must lie in"),
        ({"name": "preference", "link": {"name": "dpo", "beta": -0.1}}, r"link\.beta=\S+ must be above 0"),
        ({"name": "preference", "link": {"name": "ipo", "beta": 0.0}}, r"link\.beta=\S+ must be above 0"),
        ({"name": "preference", "link": {"name": "dpo", "smoothing": 2.0}}, r"link\.smoothing=2\.0 must lie in"),
        ({"name": "divergence", "anchor": "behavior"}, r"anchor=old"),
    ],
)
def test_settings_of_links_and_kinds_are_tried_at_once(term: dict[str, Any], message: str) -> None:
    policy, rows = joined()
    with pytest.raises(ConfigError, match=rf"agent\.objectives\.extra.*{message}"):
        agent_of(policy, rows, objectives={"extra": term})


def test_limits_of_the_jensen_shannon_divergence_still_work() -> None:
    s, t = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert jsd(s, t, beta=0.0) > 0 and jsd(s, t, beta=1.0) > 0


def test_an_unused_anchor_is_named_as_it_was_given() -> None:
    policy, rows = joined()
    with pytest.raises(ConfigError, match=r"^agent\.anchors\.reference is set.*: take it out"):
        agent_of(policy, rows, anchors={"reference": {"ema": 0.9}})
    with pytest.raises(ConfigError, match=r"^agent\.anchors\.teacher is set"):
        agent_of(policy, rows, anchors={"teacher": {"ema": 0.9}})
    with pytest.raises(ConfigError, match=r"^agent\.teacher is set"):
        agent_of(policy, rows, teacher="nowhere")


@pytest.mark.parametrize("part", [{"sources": {"shown": {"per_group": 1}}}, {"context": "Hints"}])
def test_plain_settings_are_no_source_and_no_context(part: dict[str, Any]) -> None:
    env = ChainMod(modulus=5, terms=3)
    policy = CausalLM(**env.policy_inputs(), config=TINY, seed=1)
    with pytest.raises(ConfigError, match=r"rollout\.(sources\.shown|context) is .*_target_: unified_rl"):
        LanguageRollout(env, policy, 1.0, stream(0), stream(1), **part)


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        (f"rollout.sources.shown={SHOWN.replace('per_group: 1', 'rows: 0')}", ConfigError, "rollout.sources.shown: "),
        (
            "rollout.sources.file={_target_: unified_rl.rollout.sources.ExpertFile, path: nowhere.jsonl, rows: 2}",
            DataError,
            "rollout.sources.file: cannot read nowhere.jsonl",
        ),
        (
            "rollout.context={_target_: unified_rl.rollout.context.Hints, shares: [2.0]}",
            ConfigError,
            "rollout.context.shares",
        ),
        ("agent.objectives.imitate=nll", ConfigError, r"agent.objectives.imitate.rows=demonstration reads"),
        ("agent.objectives.policy.rows=expert", ConfigError, r"agent.objectives.policy.rows=expert reads"),
    ],
)
def test_a_run_refuses_under_the_full_name(override: str, error: Any, message: str, tmp_path: Path) -> None:
    overrides = [*LANGUAGE, override, "steps=16", "progress=false", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(error, match=f"^{message}"):
        train(compose(overrides, allow=ALLOW), ALLOW)


def test_the_training_reward_is_of_own_rows() -> None:
    policy, rows = joined(shown=Demonstrations(rows=6))
    own = rows["source"] == Source.ONLINE
    rows["reward"][~own] = 100.0
    agent = agent_of(policy, rows, objectives={"policy": {"rows": "own"}, "imitate": {"name": "nll"}})
    found = agent.update(filled(rows, 1))["train/reward"]
    assert float(found) == pytest.approx(float(rows["reward"][own].sum(-1).mean()))
