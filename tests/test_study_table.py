"""The table of finished runs."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from unified_rl.errors import ConfigError
from unified_rl.study.plot import plot_runs
from unified_rl.study.table import export, main, summarize


def run(folder: Path, agent: str, scores: list[float]) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"choices": {"agent": agent}, "agent": {}}))
    rows = [
        {"update": i, "steps": 10 * i, "wall_seconds": 0.0, "eval/score": s, "x": 1.0} for i, s in enumerate(scores)
    ]
    rows.append({"update": 9, "steps": 90, "wall_seconds": 0.0, "x": 2.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (folder / "metrics.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, ["update", "steps", "wall_seconds", "eval/score", "x"])
        writer.writeheader()
        writer.writerows(rows)
    return folder


def test_table_shows_start_end_and_interval_by_agent(tmp_path: Path) -> None:
    runs = [run(tmp_path / "a1", "sac", [1.0, 4.0]), run(tmp_path / "a2", "sac", [3.0, 8.0])]
    runs.append(run(tmp_path / "b", "ppo", [0.0, 5.0]))
    rows = {row["agent"]: row for row in summarize(runs, "agent")}
    assert rows["sac"]["mean at the start"] == "2" and rows["sac"]["mean at the end"] == "6"
    assert rows["sac"]["IQM"] == "6" and rows["sac"]["95 % interval"] == "[4, 8]"
    assert rows["sac"]["each seed"] == "4 8" and rows["ppo"]["95 % interval"] == "one seed: none"
    export(runs, tmp_path / "out")
    written = list(csv.DictReader((tmp_path / "out" / "a1.csv").open()))
    assert [row["eval/score"] for row in written] == ["1.0", "4.0"] and "x" not in written[0]


def test_a_run_without_the_metric_and_a_folder_that_is_no_run_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a1 logged no eval/return"):
        summarize([run(tmp_path / "a1", "sac", [1.0])], "agent", "eval/return")
    assert main([str(tmp_path)]) == 2


def test_a_study_that_is_not_there_is_named_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "results.csv"), "--by", "correction"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("table: ") and "results.csv does not exist; 'unified-rl compare" in told
    assert told.count("\n") == 1


def test_curves_are_read_over_the_budget_that_all_have_and_over_tokens(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    lines = ["domain,correction,staleness,seed,update,steps,score,rollout/length"]
    for label, steps, length in (("short", 10, 2.0), ("long", 20, 4.0)):
        lines += [f"d,{label},0,1,{k},{k * steps},{0.5 * k},{length}" for k in range(3)]
    path.write_text("\n".join(lines))
    one = {row["correction"]: row for row in summarize([path], "correction", at="mean")}
    assert one["short"]["mean of steps"] == "0.5" and one["long"]["mean of steps"] == "0.25"  # both up to 20 answers
    spent = {row["correction"]: row for row in summarize([path], "correction", at="reach=0.75", over="tokens")}
    assert spent["short"]["each seed"] == "30" and spent["long"]["each seed"] == "120"
    assert len(summarize([path], "correction", where={"seed": "1"})) == 2
    with pytest.raises(ConfigError, match="no run has domain=e"):
        summarize([path], "correction", where={"domain": "e"})
    never = {row["correction"]: row for row in summarize([path], "correction", at="reach=2")}
    assert never["long"]["each seed"] == "never" and never["long"]["IQM"] == ""
    path.write_text(path.read_text() + "".join(f"\nd,short,0,2,{k},{10 * k},{0.1 * k},2" for k in range(3)))
    (some,) = summarize([path], "correction", at="reach=0.75", where={"correction": "short"})
    assert some["each seed"] == "15 never" and some["95 % interval"] == "1 of 2 seeds" and some["IQM"] == "15"
    path.write_text(path.read_text() + "".join(f"\ne,short,0,1,{k},{10 * k},{0.1 * k},2" for k in range(3)))
    for reads in (
        lambda: summarize([path], "correction"),
        lambda: plot_runs([path], tmp_path / "x.png", "score", "correction"),
    ):
        with pytest.raises(ConfigError, match=r"runs of correction short differ in domain \(d, e\).*--where domain=d"):
            reads()
    assert len(summarize([path], "correction", where={"domain": "d"})) == 2
    with pytest.raises(ConfigError, match="known: end, mean, reach=VALUE"):
        summarize([path], "correction", at="half", where={"domain": "d"})
    with pytest.raises(ConfigError, match="its labels are domain, correction, staleness, seed"):
        summarize([path], "agent")
    one = {"domain": "d"}
    drawn = plot_runs([path], tmp_path / "curve.png", "eval/score", "correction", only=["long"], where=one)
    assert drawn.is_file()
    with pytest.raises(ConfigError, match="no run logged"):
        plot_runs([path], tmp_path / "curve.png", "eval/score", "correction", only=["nobody"], where=one)
    with pytest.raises(ConfigError, match="known: steps, tokens"):
        summarize([path], "correction", over="seconds", where=one)
