"""``report.html``: one file that opens anywhere, with every figure inside it, and PNGs beside it."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from unified_rl.errors import UnifiedRLError
from unified_rl.files import check_listed, replacing, write_atomically
from unified_rl.study import figures
from unified_rl.study.clips import clips
from unified_rl.study.curves import POINTS
from unified_rl.study.grid import Study
from unified_rl.study.page import PAGE
from unified_rl.study.results import SCORE, Cell, RunData, summarise, unique

LIMIT = 5 * 2**20
"""Largest report in bytes; curves are thinned until it fits."""

CURVES = (
    ("learning_curves", SCORE, "Learning curves", "Score on held-out problems or seeds during training."),
    (
        "training",
        "train/reward",
        "Reward in training",
        "Mean reward of the rows that each update trained on; with staleness, of an earlier policy's.",
    ),
    (
        "ess",
        "ess/unit",
        "Effective sample size",
        "Share of the batch that the importance weights leave; 1 where the data is on-policy.",
    ),
    ("kl", "kl/k3", "KL divergence", "Estimated divergence of the policy from the one that sampled the data."),
    ("clip_fraction", "clip/fraction", "Clip fraction", "Share of units on which the correction acts."),
    (
        "clip_positive",
        "clip/fraction_positive",
        "Clip fraction, good actions",
        "Share of the units with a positive advantage whose weight the correction bounds or zeroes.",
    ),
    (
        "clip_negative",
        "clip/fraction_negative",
        "Clip fraction, bad actions",
        "Share of the units with a negative advantage whose weight the correction bounds or zeroes.",
    ),
)


def write_report(
    study: Study,
    runs: Sequence[RunData],
    *,
    command: str,
    failed: Mapping[str, str] | None = None,
    allow: Sequence[str] = (),
) -> Path:
    """Writes ``report.html`` and a PNG of every figure into the study's folder.

    Of every domain of control it shows an episode of the best run, where the environment can be drawn here.

    Args:
        study: what was run.
        runs: the metrics of the runs that finished.
        command: the command line that made them.
        failed: slug to error message of runs that failed.
        allow: prefixes that configuration may build, for the environments that are shown.

    Returns:
        The path of the report.

    Raises:
        UnifiedRLError: the report cannot be made smaller than 5 MB.
    """
    episodes = clips(runs, study.path, allow)
    for points in (POINTS, 100, 50):
        drawn = draw_figures(runs, points)
        page = render(study, runs, drawn, command, failed or {}, episodes)
        if len(page.encode()) <= LIMIT:
            break
    else:
        raise UnifiedRLError(f"the report of {study.name} exceeds {LIMIT} bytes; split the study into smaller ones")
    for name, (figure, _, _) in drawn.items():
        save_png(figure, study.path / f"{name}.png")
    with figures.drawing():
        overview = figures.overview_figure(runs)
    save_png(overview, study.path / "overview.png")
    path = study.path / "report.html"
    write_atomically(path, page)
    return path


Drawn = dict[str, tuple[Figure, str, str]]
"""File stem to (figure, heading, caption)."""


def draw_figures(runs: Sequence[RunData], points: int = POINTS) -> Drawn:
    """The report's figures in order; those without data are left out."""
    found: Drawn = {}
    band = "Lines: interquartile mean over seeds; bands: 95 % bootstrap intervals." if _seeds(runs) > 1 else ONE_SEED
    with figures.drawing():
        for name, metric, heading, caption in CURVES:
            figure = figures.curves_figure(runs, metric, points)
            if figure is not None:
                found[name] = (figure, heading, f"{caption} {band}")
        caption = f"Final score by how many updates old the sampling policy was; dotted: before training. {band}"
        found["score_staleness"] = (figures.score_against_staleness(runs), "Score against staleness", caption)
        if _seeds(runs) > 1 and len(unique(runs, "correction")) > 1:
            caption = "Probability that a run of the row ends above a run of the column, averaged over staleness; ties "
            caption += "count one half; below it the 95 % stratified bootstrap interval."
            figure = figures.improvement_figure(runs)
            found["improvement"] = (figure, "Probability of improvement", caption)
            caption = "Share of runs that end above a score, every degree of staleness counting the same."
            found["profiles"] = (figures.profile_figure(runs), "Performance profiles", caption)
        for figure, _, _ in found.values():
            figures.settle(figure)
    return found


ONE_SEED = "One seed: no interval."


def _seeds(runs: Sequence[RunData]) -> int:
    return len(unique(runs, "seed"))


def save_png(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Writes a figure as PNG, in the project's look."""
    with figures.drawing(), replacing(path) as aside:
        figure.savefig(aside, format="png", dpi=dpi)


def svg_uri(figure: Figure) -> str:
    """A figure as an SVG data URI (inlined twice in a page, the ids of two SVGs would collide)."""
    buffer = io.BytesIO()
    with figures.drawing():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


# ---------------------------------------------------------------------- page


def render(
    study: Study,
    runs: Sequence[RunData],
    drawn: Drawn,
    command: str,
    failed: Mapping[str, str],
    episodes: tuple[Sequence[str], Sequence[str]] = ((), ()),
) -> str:
    """The whole page as text; ``episodes`` are sections that show some, and lines on those that could not be shown."""
    cells = summarise(runs)
    notes = "".join(f"<p class=note>{_escape(note)}</p>" for note in episodes[1])
    parts = [
        f"<section><h2>Final scores</h2>{score_table(cells)}</section>",
        *(_figure(name, *entry) for name, entry in drawn.items()),
        *episodes[0],
        f"<section><h2>How it was made</h2>{provenance(study, runs, command)}{notes}</section>",
    ]
    if failed:
        items = "".join(f"<li><code>{_escape(slug)}</code>: {_escape(error)}</li>" for slug, error in failed.items())
        parts.insert(0, f'<section class="failed"><h2>{len(failed)} runs failed</h2><ul>{items}</ul></section>')
    description = f"<p>{_escape(study.description)}</p>" if study.description else ""
    fields = {"TITLE": _escape(study.name), "LEAD": _lead(runs), "DESCRIPTION": description, "BODY": "\n".join(parts)}
    page = PAGE
    for key, value in fields.items():
        page = page.replace(f"@{key}@", value)
    return page


def _lead(runs: Sequence[RunData]) -> str:
    counts = {key: unique(runs, key) for key in ("domain", "correction", "staleness", "seed")}
    names = {"domain": "domains", "correction": "corrections", "staleness": "degrees of staleness", "seed": "seeds"}
    chips = [f"<b>{len(runs)}</b> runs"]
    chips += [
        f"<b>{len(v)}</b> {names[k] if len(v) > 1 else names[k].rstrip('s')}"
        for k, v in counts.items()
        if k != "staleness"
    ]
    chips.append("staleness <b>" + ", ".join(map(str, sorted(counts["staleness"]))) + "</b>")
    return "".join(f"<span>{chip}</span>" for chip in chips)


def _figure(name: str, figure: Figure, heading: str, caption: str) -> str:
    return (
        f"<section><h2>{_escape(heading)}</h2><figure>"
        f'<img src="{svg_uri(figure)}" alt="{_escape(heading)}"><figcaption>{_escape(caption)} '
        f"<code>{name}.png</code></figcaption></figure></section>"
    )


def score_table(cells: Sequence[Cell]) -> str:
    """The table of final scores, the best of each domain and staleness in bold."""
    head = "".join(
        f"<th{' class=n' if numeric else ''}>{name}</th>"
        for name, numeric in (
            ("domain", 0), ("correction", 0), ("staleness", 1), ("seeds", 1), ("start", 1), ("final (IQM)", 1),
            ("95 % interval", 1), ("ESS", 1), ("KL", 1), ("clipped", 1), ("measured staleness", 1),
        )
    )  # fmt: skip
    best: dict[tuple[str, int], float] = {}
    for cell in cells:
        key = (cell.domain, cell.staleness)
        best[key] = max(best.get(key, -math.inf), cell.final.estimate)
    rows, previous = [], None
    for cell in cells:
        key = (cell.domain, cell.staleness)
        rows.append(_row(cell, cell.final.estimate == best[key], previous not in (None, key)))
        previous = key
    note = "" if all(c.final.known for c in cells) else f"<p class=note>{ONE_SEED}</p>"
    note += "<p class=note>ESS, KL, clipped share and staleness are means over training. Start: before reinforcement "
    note += "learning, after any warm start.</p>"
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{note}"


def _row(cell: Cell, best: bool, first: bool) -> str:
    interval = f"{_number(cell.final.low)} to {_number(cell.final.high)}" if cell.final.known else "–"
    final = f"<b>{_number(cell.final.estimate)}</b>" if best else _number(cell.final.estimate)
    numbers = [str(cell.staleness), str(cell.seeds), _number(cell.start), final, interval]
    numbers += [_number(value) for value in cell.diagnostics.values()]
    names = f"<td>{_escape(cell.domain)}</td><td>{_escape(cell.correction)}</td>"
    return f"<tr{' class=first' if first else ''}>{names}{''.join(f'<td class=n>{n}</td>' for n in numbers)}</tr>"


def provenance(study: Study, runs: Sequence[RunData], command: str) -> str:
    """Command, versions, the study's configuration and every run."""
    meta = next((m for m in (_meta(run) for run in runs) if m), {})
    versions = {"unified_rl": meta.get("unified_rl"), "python": meta.get("python"), **(meta.get("versions") or {})}
    shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    facts = [f"<p>Command</p><pre>{_escape(command)}</pre>"]
    if shown:
        facts.append(f"<p>Versions</p><p class=note>{_escape(shown)}</p>")
    if meta.get("git_revision"):
        facts.append(f"<p>Revision</p><p class=note><code>{_escape(meta['git_revision'])}</code></p>")
    node = {k: v for k, v in vars(study).items() if v not in (None, "", [])}
    text = yaml.safe_dump({"study": node}, sort_keys=False, width=110)
    facts.append(f"<details><summary>Configuration of the study</summary><pre>{_escape(text)}</pre></details>")
    facts.append(f"<details><summary>Every run</summary>{_run_table(runs)}</details>")
    return "".join(facts)


def _run_table(runs: Sequence[RunData]) -> str:
    head = "<th>domain</th><th>correction</th><th class=n>staleness</th><th class=n>seed</th><th class=n>steps</th>"
    head += "<th class=n>start</th><th class=n>final</th><th class=n>seconds</th>"
    rows = []
    for run in runs:
        names = "".join(f"<td>{_escape(run.labels[key])}</td>" for key in ("domain", "correction"))
        numbers = [str(run.labels["staleness"]), str(run.labels["seed"]), f"{run.last('steps'):,.0f}"]
        numbers += [_number(run.first()), _number(run.last()), _number(run.last("wall_seconds"))]
        rows.append(f"<tr>{names}{''.join(f'<td class=n>{n}</td>' for n in numbers)}</tr>")
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _meta(run: RunData) -> dict[str, Any]:
    if run.folder is None:
        return {}
    check_listed(run.folder / "meta.json")
    try:
        return dict(json.loads((run.folder / "meta.json").read_text()))
    except (OSError, ValueError):
        return {}


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _escape(value: Any) -> str:
    return html.escape(str(value))
