"""The report and its figures: self-contained, honest about seeds, the same colours everywhere, bounded in size."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from unified_rl.errors import ConfigError
from unified_rl.study import figures
from unified_rl.study.curves import join
from unified_rl.study.grid import Study
from unified_rl.study.plot import main, plot_runs
from unified_rl.study.report import LIMIT, score_table, write_report
from unified_rl.study.results import RunData, read_results, summarise, write_results


def make_run(domain: str, correction: str, staleness: int, seed: int, points: int = 12, lift: float = 0.0) -> RunData:
    rows = [
        {"update": u, "steps": 10 * u, "wall_seconds": u, "eval/score": u / points + lift + 0.01 * seed}
        | ({"ess/unit": 1 / (1 + 0.1 * staleness), "kl/k3": 0.01 * staleness} if u else {})
        for u in range(points + 1)
    ]
    labels = {"domain": domain, "correction": correction, "staleness": staleness, "seed": seed}
    return RunData(labels, rows)


def make_runs(seeds: tuple[int, ...], staleness: tuple[int, ...] = (0, 8)) -> list[RunData]:
    cells = [(d, c, s) for d in ("language", "control") for c in ("ppo", "tis") for s in staleness]
    return [make_run(*cell, seed, lift=0.5 * (cell[1] == "tis")) for cell in cells for seed in seeds]


def study(folder: Path) -> Study:
    node = {"name": "demo", "folder": str(folder), "domains": {"language": ["a=<b>"]}, "corrections": ["ppo"]}
    return Study.from_config({"study": node})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    runs = make_runs((1, 2))
    run = folder / "run"
    run.mkdir()
    meta = {"unified_rl": "0.1.0", "versions": {"torch": "2.13.0"}, "git_revision": "abc123"}
    (run / "meta.json").write_text(json.dumps(meta))
    runs[0] = RunData(runs[0].labels, runs[0].rows, run)
    write_report(study(folder), runs, command="unified-rl compare study=demo", failed={"x": "<went> wrong"})
    return folder


def test_the_report_needs_nothing_outside_itself(written: Path) -> None:
    page = (written / "report.html").read_text()
    assert len(page.encode()) < LIMIT / 5
    assert "<script" not in page and "<link" not in page and "url(" not in page
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 6 and all(s.startswith("data:image/svg+xml;base64,") for s in sources)
    for source in sources:
        svg = base64.b64decode(source.split(",", 1)[1]).decode()
        assert svg.count("<svg") == 1 and not re.findall(r'href="(?!#|data:)', svg)


def test_the_report_says_what_ran_and_escapes_it(written: Path) -> None:
    page = (written / "report.html").read_text()
    for text in (
        "unified-rl compare study=demo",
        "torch 2.13.0",
        "unified_rl 0.1.0",
        "abc123",
        "a=&lt;b&gt;",
        "&lt;went&gt; wrong",
    ):
        assert text in page
    for heading in ("Learning curves", "Effective sample size", "KL divergence", "Probability of improvement"):
        assert heading in page


def test_pngs_lie_beside_it(written: Path) -> None:
    names = {p.stem for p in written.glob("*.png")}
    assert names == {"learning_curves", "ess", "kl", "score_staleness", "improvement", "profiles", "overview"}
    assert all(p.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for p in written.glob("*.png"))


@pytest.mark.parametrize("draw", [figures.improvement_figure, figures.profile_figure, figures.score_against_staleness])
def test_titles_of_many_domains_do_not_overlap(draw: Any) -> None:
    names = ["half_cheetah", "inverted_pendulum", "walker2d", "ant", "hopper", "pendulum", "reacher"]
    figure = draw([make_run(name, c, 0, 1) for name in names for c in ("ppo", "tis")])
    figure.draw_without_rendering()
    assert [ax.get_title().split("\n")[0] for ax in figure.axes] == names
    boxes = [ax.title.get_window_extent() for ax in figure.axes]
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


def test_the_table_gives_iqm_and_interval_and_marks_the_best() -> None:
    cells = summarise(make_runs((1, 3), staleness=(0,)))
    table = score_table(cells)
    assert "<td class=n>1.02</td><td class=n>1.01 to 1.03</td>" in table  # ppo: (1.01 + 1.03) / 2
    assert "<b>1.52</b>" in table and "<b>1.02</b>" not in table
    assert "no interval" not in table


def test_one_seed_has_no_interval_no_band_and_says_so() -> None:
    runs = make_runs((1,))
    cells = summarise(runs)
    assert not any(cell.final.known for cell in cells)
    assert "One seed: no interval" in score_table(cells)
    curve = join(runs[:1], "eval/score")
    assert curve is not None and not curve.banded
    figure = figures.curves_figure(runs, "eval/score")
    assert figure is not None and not any(ax.collections for ax in figure.axes)


def test_seeds_logged_at_different_steps_share_a_grid_within_their_common_range() -> None:
    first = RunData({}, [{"steps": s, "m": float(s)} for s in (0, 10, 20)])
    second = RunData({}, [{"steps": s, "m": s + 2.0} for s in (5, 15)])
    curve = join([first, second], "m")
    assert curve is not None
    np.testing.assert_allclose(curve.x, [5, 10, 15])
    np.testing.assert_allclose(curve.centre, [6, 11, 16])
    np.testing.assert_allclose([curve.low, curve.high], [[5, 10, 15], [7, 12, 17]])


def test_long_curves_are_averaged_down_to_the_limit() -> None:
    """A line keeps its slope, and alternating noise averages out instead of being picked."""
    run = RunData({}, [{"steps": s, "m": s + 5.0 * (-1) ** s} for s in range(10_000)])
    curve = join([run], "m", points=100)
    assert curve is not None and curve.x.size == 100
    np.testing.assert_allclose(curve.centre, curve.x, atol=1.0)


def test_missing_and_non_finite_values_are_left_out() -> None:
    rows = [
        {"steps": 0, "m": 1.0},
        {"steps": 1, "m": None},
        {"steps": 2},
        {"steps": 3, "m": float("nan")},
        {"steps": 4, "m": 3.0},
    ]
    x, y = RunData({}, rows).series("m")
    assert x.tolist() == [0, 4] and y.tolist() == [1, 3]
    assert join([RunData({}, rows)], "absent") is None


def line_colours(figure: Figure) -> set[str]:
    return {to_hex(line.get_color()) for ax in figure.axes for line in ax.lines} - {"#8a8f98"}


def test_a_correction_keeps_its_colour_in_every_figure() -> None:
    runs = make_runs((1, 2))
    expected = {c.lower() for c in figures.COLOURS[:2]}
    drawn = [
        figures.curves_figure(runs, "eval/score"),
        figures.score_against_staleness(runs),
        figures.profile_figure(runs),
    ]
    assert all(figure is not None and line_colours(figure) == expected for figure in drawn)
    assert len(set(figures.COLOURS)) == len(figures.COLOURS)


def test_a_crowded_figure_is_split_by_staleness() -> None:
    few, many = make_runs((1,)), make_runs((1,), staleness=(0, 1, 2, 4, 8))
    drawn_few, drawn_many = figures.curves_figure(few, "eval/score"), figures.curves_figure(many, "eval/score")
    assert drawn_few is not None and drawn_many is not None
    assert (len(drawn_few.axes), len(drawn_many.axes)) == (2, 10)
    assert drawn_many.axes[-1].get_title() == "control, staleness 8"


def test_results_csv_reads_back_as_the_runs_that_it_was_written_from(tmp_path: Path) -> None:
    runs = make_runs((1, 2))
    write_results(tmp_path / "results.csv", runs)
    back = read_results(tmp_path / "results.csv")
    assert [r.labels for r in back] == [r.labels for r in runs]
    for a, b in zip(runs, back, strict=True):
        np.testing.assert_allclose(a.series("eval/score"), b.series("eval/score"), rtol=1e-5)


def write_run(folder: Path, agent: str, seed: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"choices: {{agent: {agent}}}\nseed: {seed}\nagent: {{lr: 0.1}}\n")
    rows = [{"update": u, "steps": u, "eval/score": float(u + seed)} for u in range(4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_runs_are_plotted_by_any_configuration_key(tmp_path: Path, capsys: Any) -> None:
    folders = [write_run(tmp_path / f"{agent}{seed}", agent, seed) for agent in ("sac", "ppo") for seed in (1, 2)]
    out = plot_runs(folders, tmp_path / "pictures" / "curves.svg")
    svg = out.read_text()
    assert "sac (2 seeds)" in re.sub(r"<!--\s*(.*?)\s*-->", r"\1", svg)
    assert main([*map(str, folders), "--by", "agent.lr", "--out", str(tmp_path / "x.png")]) == 0
    assert main([*map(str, folders), "--by", "agent.ls", "--out", str(tmp_path / "y.png")]) == 1
    assert "has no key agent.ls" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no run logged eval/scor against steps; logged were eval/score"):
        plot_runs(folders, tmp_path / "z.png", "eval/scor")
    with pytest.raises(ConfigError, match="not a run folder"):
        plot_runs([tmp_path], tmp_path / "z.png")


def test_drawing_leaves_matplotlibs_settings_alone() -> None:
    import matplotlib

    before = {key: matplotlib.rcParams[key] for key in figures.STYLE}
    with figures.drawing():
        figures.curves_figure(make_runs((1,)), "eval/score")
    assert {key: matplotlib.rcParams[key] for key in figures.STYLE} == before
    assert any(before[key] != value for key, value in figures.STYLE.items())
