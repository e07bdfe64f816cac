"""Metrics: means, growing columns, and rows that a resumed run makes again."""

import csv
import json
from pathlib import Path

import pytest
import torch

from unified_rl.files import Manifest
from unified_rl.training.metrics import Means, MetricLog


def test_means_average_tensors_and_floats_per_key() -> None:
    means = Means()
    means.add({"a": torch.tensor(1.0), "b": 4.0})
    means.add({"a": torch.tensor(2.0)})
    assert means.pop() == {"a": 1.5, "b": 4.0}
    assert means.pop() == {}


def test_means_of_collections_count_every_episode_once() -> None:
    means = Means()
    means.add({"rollout/return": 20.0, "rollout/episodes": 1.0, "loss/total": 1.0})
    means.add({"loss/total": 3.0})  # no episode ended
    means.add({"rollout/return": torch.tensor(2.0), "rollout/episodes": 8.0})
    assert means.pop() == {"rollout/return": 4.0, "rollout/episodes": 9.0, "loss/total": 2.0}


def test_the_means_that_wait_in_a_checkpoint_keep_their_weights() -> None:
    means, other = Means(), Means()
    means.add({"rollout/return": 20.0, "rollout/episodes": 1.0})
    other.load_state_dict(json.loads(json.dumps(means.state_dict())))
    other.add({"rollout/return": 2.0, "rollout/episodes": 8.0})
    assert other.pop() == {"rollout/return": 4.0, "rollout/episodes": 9.0}


@pytest.mark.parametrize("kept", [0, 2])
def test_tensorboard_holds_one_value_a_step_after_a_resume(tmp_path: Path, kept: int) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for until, sign, updates in ((None, 1.0, range(1, 5)), (kept, -1.0, range(kept + 1, 6))):
        log = MetricLog(tmp_path, keep_until=until)
        for update in updates:
            log.write(update, 10 * update, 0.0, {"loss": sign * update})
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    values = [(event.step, event.value) for event in events.Scalars("loss")]
    assert values == [(10 * update, update if update <= kept else -update) for update in range(1, 6)]


def test_columns_grow_and_rows_behind_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    log = MetricLog(tmp_path)
    log.write(0, 0, 0.0, {"eval/score": 0.25})
    log.write(1, 8, 0.5, {"loss": 2.0})
    log.write(2, 16, 1.0, {"loss": 1.0})
    log.close()
    log = MetricLog(tmp_path, keep_until=1)
    log.write(2, 16, 1.5, {"loss": 0.5})
    log.close()
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [row["loss"] for row in rows] == ["", "2.0", "0.5"]
    assert rows[0]["eval/score"] == "0.25"
    assert [json.loads(line)["update"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2]


def test_a_last_line_cut_by_a_crash_is_dropped(tmp_path: Path) -> None:
    log = MetricLog(tmp_path)
    log.write(0, 0, 0.0, {"x": 1.0})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as handle:
        handle.write('{"update": 1, "st')
    assert len(MetricLog(tmp_path).rows) == 1


def test_the_record_is_there_before_the_manifest_lists_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Manifest(tmp_path).write()
    write, missing = Manifest.write, []

    def watched(self: Manifest) -> None:
        missing.extend(name for name in self.files if not (tmp_path / name).exists())
        write(self)

    monkeypatch.setattr(Manifest, "write", watched)
    MetricLog(tmp_path).close()
    assert "metrics.jsonl" in Manifest.read(tmp_path).files and not missing  # a kill here would leave a damaged run
