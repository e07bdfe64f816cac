"""Metrics: means, growing columns, and rows that a resumed run makes again."""

import csv
import json
from pathlib import Path

import torch

from unified_rl.training.metrics import Means, MetricLog


def test_means_average_tensors_and_floats_per_key() -> None:
    means = Means()
    means.add({"a": torch.tensor(1.0), "b": 4.0})
    means.add({"a": torch.tensor(2.0)})
    assert means.pop() == {"a": 1.5, "b": 4.0}
    assert means.pop() == {}


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
