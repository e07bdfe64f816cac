"""A signal while a study writes its report: one line, no half report, and the same command writes it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from faults.scenarios import litter

from unified_rl import cli
from unified_rl.study import report

RUN = ["env=two_route", "policy=gaussian", "policy.hidden=[8]", "agent=policy_gradient", "agent.critic_hidden=[8]"]
RUN += ["rollout.num_envs=2", "rollout.horizon=4", "steps=32", "eval_episodes=1", "correction=ppo"]


@pytest.mark.parametrize("place", ["draw_figures", "render"])
def test_a_signal_while_a_report_is_written_is_one_line_and_the_same_command_writes_it(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = {
        "_target_": "unified_rl.study.Study",
        "name": "tiny",
        "domains": {"control": RUN},
        "corrections": ["ppo"],
        "seeds": [1],
        "workers": 0,
    }
    (tmp_path / "configs" / "study").mkdir(parents=True)
    (tmp_path / "configs" / "study" / "tiny.yaml").write_text(
        "# @package _global_\n" + yaml.safe_dump({"study": study})
    )
    words = ["compare", "study=tiny", "--config-dir", str(tmp_path / "configs"), f"study.folder={tmp_path / 'out'}"]
    real = getattr(report, place)

    def noisy(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(report, place, noisy)
        assert cli.main(words) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "unified-rl: interrupted"
    assert not (tmp_path / "out" / "report.html").exists() and not litter(tmp_path / "out")
    assert cli.main(words) == 0
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
