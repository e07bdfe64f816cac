"""The doctor: healthy here, and not where sampling and scoring disagree."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from unified_rl import cli
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.policies.gaussian import GaussianPolicy
from unified_rl.training.doctor import COMMON, SMALL_CONTROL, facts, identity_ratio, identity_update
from unified_rl.units import UnitLogProb


def test_the_identities_hold_and_are_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.count("holds") == 4 and "fails" not in out
    for word in ("ratio 1 on fresh data", "learning rate 0 changes nothing", "torch", "threads", "renderer"):
        assert word in out


@pytest.mark.parametrize("cls", [GaussianPolicy, CausalLM])
def test_a_policy_that_scores_other_than_it_samples_fails(
    cls: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = cls.log_prob

    def wrong(self: Any, batch: Any) -> UnitLogProb:
        out = right(self, batch)
        return UnitLogProb(out.log_prob + 0.1, out.mask, out.exact)

    monkeypatch.setattr(cls, "log_prob", wrong)
    assert cli.main(["doctor"]) == 1
    assert "fails" in capsys.readouterr().out


def test_an_update_that_moves_the_weights_at_learning_rate_zero_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from unified_rl.optimizer import Optimizer

    step = Optimizer.step

    def drifting(self: Any, loss: Any) -> Any:
        with torch.no_grad():
            self.parameters[0].add_(1e-3)
        return step(self, loss)

    monkeypatch.setattr(Optimizer, "step", drifting)
    assert not identity_update([*SMALL_CONTROL, *COMMON])[0]
    assert identity_ratio([*SMALL_CONTROL, *COMMON])[0]


def test_facts_name_versions_devices_and_threads() -> None:
    found = facts()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "mujoco", "CUDA devices", "cores, torch threads", "OMP_WAIT_POLICY", "renderer"} <= found.keys()
