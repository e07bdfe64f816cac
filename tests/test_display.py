"""The progress line of a run: one line, whose numbers are whole, and none before there is anything to show."""

from __future__ import annotations

import pytest

from unified_rl.training.display import Display

ROW = {"eval/score": 0.123, "eval/accuracy": 0.5, "rollout/reward": 0.25, "ess/unit": 0.998, "kl/k3": 1.4e-14}


def test_a_long_name_takes_no_room_from_the_numbers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with Display("jsonl-policy_gradient-grpo-seed0-20261128-081702-2", 100_000) as display:
        display.update(64, ROW)
    (line,) = capsys.readouterr().out.strip().splitlines()
    assert "64/100000 0:00:00" in line and "score" in line and len(line) <= 80


def test_a_run_that_is_refused_leaves_no_empty_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no"), Display("run", 8):
        raise ValueError("no")
    assert capsys.readouterr().out == ""
