"""Weights of earlier versions: each unit is scored by those that sampled it, in whole runs, whoever resumes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from agent_cases import filled
from run_cases import CONTROL, LANGUAGE, merged
from term_cases import agent_of, joined
from ticket_cases import differences, job_of, made

from unified_rl.config import compose
from unified_rl.correction import load_correction
from unified_rl.errors import ConfigError, RecordError
from unified_rl.training.checkpoint import checkpoints

RUN = ("updates=5", "eval_episodes=4", "progress=false", "log_every=1", "eval_every=0", "logger=[]", "agent.lr=0.02",
       "keep_checkpoints=9")  # fmt: skip
SHORT = {
    "language": (*LANGUAGE, *RUN, "correction=decoupled_snapshot", "checkpoint_every=32"),
    "control": (*CONTROL, *RUN, "agent=ppo", "correction=decoupled_snapshot", "policy.normalize_observation=true",
                "checkpoint_every=256"),
}  # fmt: skip
ALLOW = ["run_cases", "ray_cases"]


def composed(domain: str, *more: str) -> dict[str, Any]:
    return compose(merged(SHORT[domain], more), allow=ALLOW)


class Scored:
    """Per update: how old units are, and the most that their proximal log-prob is off the sampler's."""

    def __init__(self) -> None:
        self.ages: list[set[int]] = []
        self.gaps: list[float] = []

    def on_run_begin(self, trainer: Any) -> None:
        annotate = trainer.agent.anchors.annotate

        def watched(record: Any, version: int) -> None:
            annotate(record, version)
            mask = record["mask"]
            self.ages.append(set((version - record["policy_version"])[mask].tolist()))
            self.gaps.append(float((record["proximal_log_prob"] - record["behavior_log_prob"])[mask].abs().max()))

        trainer.agent.anchors.annotate = watched


@pytest.mark.parametrize("engine", [("engine=local",), ("engine=ray", "engine.workers=2")])
@pytest.mark.parametrize("domain", SHORT)
def test_in_a_run_the_proximal_policy_is_the_one_that_sampled_and_resuming_changes_nothing(
    domain: str, engine: tuple[str, ...], tmp_path: Path
) -> None:
    seen, plain = Scored(), Scored()
    given = ("rollout.staleness=2", *engine)
    whole, rows = made(composed(domain, *given), tmp_path / "a", callbacks=[seen])
    assert seen.ages == [{0}, {1}, {2}, {2}, {2}]
    assert max(seen.gaps) < 2e-5, "the weights that sampled a unit give it the log-prob that it was drawn with"
    made(composed(domain, *given, "correction=decoupled_ppo"), tmp_path / "b", callbacks=[plain])
    assert min(plain.gaps[1:]) > 1e-2, "the policy at the start of an update does not"

    found = checkpoints(tmp_path / "a" / "checkpoints")[0]
    again, rest = made(composed(domain, *given), tmp_path / "c", found)
    assert differences(whole.agent.state_dict(), again.agent.state_dict()) == []
    assert rest == rows[-len(rest) :] and len(rest) == 3 and set(again.agent.anchors.versions.kept) == {2, 3, 4}


def aged() -> tuple[Any, Any, list[Any]]:
    """An agent behind three updates that keeps three older versions, rows, and their log-probs under versions 0 to 3.

    The rows' behavior log-probs are off those of version 0, as those of a sampler with other arithmetic are.
    """
    policy, rows = joined()
    agent = agent_of(policy, rows, correction=load_correction("decoupled_snapshot"), lr=2e-2)
    agent.keep_versions(3)
    agent.checked = True
    scores = []
    for _ in range(3):
        scores.append(agent.anchors.chunked(policy, rows))
        agent.update(filled(rows, 1))
    noise = 0.1 * torch.randn(rows["mask"].shape, generator=torch.Generator().manual_seed(5))
    rows["behavior_log_prob"] = torch.where(rows["mask"], scores[0] + noise, 0.0)
    return agent, rows, [*scores, agent.anchors.chunked(policy, rows)]


def test_units_of_a_row_are_scored_by_the_versions_of_each_and_both_factors_give_the_ratio() -> None:
    agent, rows, scores = aged()
    mask = rows["mask"]
    rows["policy_version"] = (mask.cumsum(-1) - 1).clamp(0, 3)
    agent.anchors.begin(3)
    agent.anchors.annotate(rows, 3)
    for version, score in enumerate(scores):
        chosen = mask & (rows["policy_version"] == version)
        assert int(chosen.sum()) > 3
        assert torch.equal(rows["proximal_log_prob"][chosen], score[chosen])
    ratio, mismatch = scores[3] - rows["proximal_log_prob"], rows["proximal_log_prob"] - rows["behavior_log_prob"]
    whole = (scores[3] - rows["behavior_log_prob"])[mask].exp()
    torch.testing.assert_close(ratio[mask].exp() * mismatch[mask].exp(), whole, atol=1e-6, rtol=1e-5)
    rows["advantage"] = torch.randn(mask.shape[0], generator=torch.Generator().manual_seed(1))
    wide = {"kernel.clip_low": 1.0, "kernel.clip_high": 1e6, "mismatch": [{"name": "truncate", "high": 1e6}]}
    exact = load_correction("decoupled_snapshot", **wide)(scores[3], rows).weight
    plain = load_correction("importance_sampling")(scores[3], rows).weight
    torch.testing.assert_close(exact, plain, rtol=1e-4, atol=1e-6)


def test_with_the_present_policy_in_its_place_nothing_is_clipped_while_the_sample_gets_smaller() -> None:
    """The pair of metrics that tells a lost proximal policy: clip/fraction is 0 and ess/unit falls."""
    _, rows, scores = aged()
    rows["policy_version"] = torch.zeros_like(rows["policy_version"])
    rows["advantage"] = torch.randn(len(rows), generator=torch.Generator().manual_seed(1))
    told: dict[str, list[tuple[float, float]]] = {"lost": [], "kept": []}
    correction = load_correction("decoupled_snapshot")
    for current in scores:
        for name, proximal in (("lost", current), ("kept", scores[0])):
            record = rows.clone().set("proximal_log_prob", proximal)
            metrics = correction.diagnostics(current, record)
            told[name].append((float(metrics["clip/fraction"]), float(metrics["ess/unit"])))
    lost, kept = told["lost"], told["kept"]
    assert all(clipped == 0.0 for clipped, _ in lost)
    assert lost[3][1] < lost[0][1] - 0.05 and lost[3][1] < 0.95
    assert kept[0][0] == 0.0 and kept[3][0] > 0.1 and kept[3][1] == lost[3][1]


def test_weights_that_are_not_kept_are_refused_by_the_version_and_with_what_works() -> None:
    agent, rows, _ = aged()
    agent.keep_versions(1)
    agent.anchors.begin(3)
    rows["policy_version"] = torch.zeros_like(rows["policy_version"])
    with pytest.raises(RecordError, match=r"policy version 0, and .* versions 2 to 3 .*correction=decoupled_ppo"):
        agent.anchors.annotate(rows, 3)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["rollout.sources={experience: {_target_: unified_rl.rollout.sources.Experience, share: 0.5}}"],
            "stored rows .* are not kept: take out their source, or use correction=decoupled_ppo",
        ),
        (["replay=uniform"], "rows of any age.*replay=fresh or replay=staleness"),
        (["engine=ray", "engine.order=completion", "rollout.staleness=1"], "order=completion.*order=ticket"),
        (["agent.advantage=critic", "agent.off_policy_targets=true"], "off_policy_targets=true.*leave one of them out"),
    ],
)
def test_runs_whose_rows_may_be_of_any_age_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        job_of(composed("language", *overrides), allow=ALLOW).make_trainer(Path("nowhere"))


def test_a_replay_with_a_bound_keeps_as_many(tmp_path: Path) -> None:
    trainer, _ = made(composed("language", "replay=staleness", "replay.sampler.max_lag=3"), tmp_path / "a")
    assert set(trainer.agent.anchors.versions.kept) == {1, 2, 3, 4}
