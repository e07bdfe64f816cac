"""Figures of a study: one colour a correction, one line style a staleness, legends outside the panels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from unified_rl.study.curves import POINTS, Curve, join
from unified_rl.study.results import SCORE, RunData, group_runs, scores_by_task, strata, unique
from unified_rl.study.statistics import performance_profile, probability_of_improvement, stratified_bootstrap

COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A", "#4D4D4D",
    "#8C6D31", "#B2182B", "#66A61E", "#1F968B", "#F28E8E", "#3B528B", "#A6A6A6", "#7F5539",
)  # fmt: skip
"""The first eight are told apart under the common colour deficiencies."""

DASHES: tuple[Any, ...] = ("-", (0, (4, 1.4)), (0, (1.3, 1.1)), (0, (5, 1.3, 1.2, 1.3)), (0, (7, 2)), (0, (1, 2.2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
CROWDED = 8
"""A panel with more curves than this is split by staleness."""
ACROSS = 3
"""Panels of domains beside one another; more go below."""

NAMES = {
    "eval/score": "held-out score",
    "eval/return": "held-out return",
    "eval/accuracy": "held-out accuracy",
    "ess/unit": "effective sample size (units)",
    "ess/sequence": "effective sample size (sequences)",
    "kl/k3": "KL to the sampler (k3)",
    "clip/fraction": "clipped share of units",
    "clip/fraction_positive": "clipped share, advantage above 0",
    "clip/fraction_negative": "clipped share, advantage below 0",
    "train/reward": "training reward",
}

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.labelcolor": "#30343b",
    "axes.titlecolor": "#1d2026",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8ec",
    "grid.linewidth": 0.8,
    "xtick.color": "#5b616b",
    "ytick.color": "#5b616b",
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.title_fontsize": 9.5,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "savefig.facecolor": "white",
    "svg.hashsalt": "unified-rl",
}


@contextmanager
def drawing() -> Iterator[None]:
    """The project's look, without touching matplotlib's global settings."""
    with matplotlib.rc_context(STYLE):
        yield


@dataclass(frozen=True)
class Palette:
    """The same colour for a correction, and the same line style and marker for a staleness, in every figure."""

    corrections: tuple[Any, ...]
    staleness: tuple[Any, ...]

    @classmethod
    def of(cls, runs: Sequence[RunData]) -> Palette:
        """Assigned in the order of the study."""
        return cls(tuple(unique(runs, "correction")), tuple(sorted(unique(runs, "staleness"))))

    def colour(self, correction: Any) -> str:
        """Colour of a correction."""
        return COLOURS[self.corrections.index(correction) % len(COLOURS)]

    def dash(self, staleness: Any) -> Any:
        """Line style of a staleness."""
        return DASHES[self.staleness.index(staleness) % len(DASHES)]

    def marker(self, correction: Any) -> str:
        """Marker of a correction, so that colour is not the only sign."""
        return MARKERS[self.corrections.index(correction) % len(MARKERS)]


def draw_curve(ax: Axes, curve: Curve, colour: str, dash: Any = "-", label: str | None = None) -> None:
    """A line with its band."""
    few: dict[str, Any] = {"marker": "o", "markersize": 3.2} if curve.x.size <= 15 else {}
    ax.plot(curve.x, curve.centre, color=colour, linestyle=dash, label=label, **few)
    if curve.banded:
        ax.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)


def curves_figure(runs: Sequence[RunData], metric: str, points: int = POINTS) -> Figure | None:
    """A metric over training: a panel for each domain, split by staleness where it would be crowded.

    Returns None where no run logged the metric.
    """
    if not any(run.series(metric)[0].size for run in runs):
        return None
    palette, domains = Palette.of(runs), unique(runs, "domain")
    split = len(group_runs(runs, ("correction", "staleness"))) > CROWDED and len(palette.staleness) > 1
    columns = palette.staleness if split else ("all",)
    if split:
        figure, axes = panels(len(domains), len(columns), share_y="row")
    else:
        figure, axes = wrapped(len(domains))
    for d, domain in enumerate(domains):
        for c, staleness in enumerate(columns):
            ax = axes[d, c] if split else axes[d]
            held = [
                r for r in runs if r.labels["domain"] == domain and (not split or r.labels["staleness"] == staleness)
            ]
            ax.set_title(f"{domain}, staleness {staleness}" if split else str(domain))
            draw_metric(ax, held, metric, palette, split, points)
    for first in axes[:, 0] if split else axes[::ACROSS]:
        first.set_ylabel(NAMES.get(metric, metric))
    add_legend(figure, palette, dashes=not split)
    return figure


def draw_metric(
    ax: Axes, runs: Sequence[RunData], metric: str, palette: Palette, solid: bool = False, points: int = POINTS
) -> None:
    """All curves of one panel."""
    centres = []
    for (correction, staleness), members in group_runs(runs, ("correction", "staleness")).items():
        curve = join(members, metric, points=points)
        if curve is not None:
            draw_curve(ax, curve, palette.colour(correction), "-" if solid else palette.dash(staleness))
            centres.append(curve.centre)
    ax.set_xlabel("steps")
    ax.xaxis.set_major_formatter(FuncFormatter(thousands))
    ax.xaxis.set_major_locator(MaxNLocator(5))
    _scale(ax, metric, centres)


def score_against_staleness(runs: Sequence[RunData]) -> Figure:
    """Final score (IQM, 95 % interval) against staleness, a panel for each domain; the start as a dotted line."""
    palette, domains = Palette.of(runs), unique(runs, "domain")
    figure, axes = wrapped(len(domains))
    for ax, domain in zip(axes, domains, strict=True):
        draw_staleness(ax, [r for r in runs if r.labels["domain"] == domain], palette)
        ax.set_title(str(domain))
    for first in axes[::ACROSS]:
        first.set_ylabel("final held-out score (IQM)")
    add_legend(figure, palette, dashes=False, markers=True)
    return figure


def draw_staleness(ax: Axes, runs: Sequence[RunData], palette: Palette) -> None:
    """One panel of :func:`score_against_staleness`."""
    levels = sorted(unique(runs, "staleness"))
    corrections = unique(runs, "correction")
    ax.axhline(float(np.mean([r.first() for r in runs])), color="#8a8f98", linestyle=":", linewidth=1.2, zorder=1)
    for index, correction in enumerate(corrections):
        shift = (index - (len(corrections) - 1) / 2) * min(0.09, 0.5 / len(corrections))
        held = group_runs([r for r in runs if r.labels["correction"] == correction], ("staleness",))
        found = [stratified_bootstrap([[r.last() for r in held[(s,)]]]) for s in levels if (s,) in held]
        x = np.array([levels.index(s) for s in levels if (s,) in held]) + shift
        y = np.array([f.estimate for f in found])
        error = np.nan_to_num([[f.estimate - f.low, f.high - f.estimate] for f in found]).T
        look: dict[str, Any] = {"color": palette.colour(correction), "marker": palette.marker(correction)}
        ax.errorbar(x, y, yerror(error), markersize=5.5, markeredgecolor="white", elinewidth=1.2, **look)
    ax.set_xticks(range(len(levels)), [str(s) for s in levels])
    ax.set_xlim(-0.5, len(levels) - 0.5)
    ax.set_xlabel("staleness (updates)")
    ax.grid(axis="x", visible=False)


def yerror(error: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
    """Error bars ``[2, n]``, or None where every one is 0 (no interval)."""
    return np.maximum(error, 0) if np.any(error > 0) else None


def improvement_figure(runs: Sequence[RunData]) -> Figure:
    """Pairwise probability that the row beats the column, tasks of a domain being its degrees of staleness."""
    palette, domains = Palette.of(runs), unique(runs, "domain")
    side = 1.3 + 0.62 * max(4, len(palette.corrections))
    figure, axes = wrapped(len(domains), width=side, height=side - 0.4)
    for ax, domain in zip(axes, domains, strict=True):
        held = [r for r in runs if r.labels["domain"] == domain]
        _draw_improvement(ax, held)
        ax.set_title(f"{domain}\nP(row beats column)")
    return figure


def _draw_improvement(ax: Axes, runs: Sequence[RunData]) -> None:
    names = unique(runs, "correction")
    scores = {name: scores_by_task(r for r in runs if r.labels["correction"] == name) for name in names}
    grid = np.full((len(names), len(names)), np.nan)
    for i, x in enumerate(names):
        for j, y in enumerate(names):
            tasks = [task for task in scores[x] if task in scores[y]]
            if i == j or not tasks:
                continue
            found = probability_of_improvement(strata(scores[x], tasks), strata(scores[y], tasks))
            grid[i, j] = found.estimate
            interval = f"\n{found.low:.2f}-{found.high:.2f}" if found.known else ""
            dark = abs(found.estimate - 0.5) > 0.4
            style: dict[str, Any] = {"ha": "center", "va": "center", "color": "white" if dark else "#1d2026"}
            ax.text(j, i, f"{found.estimate:.2f}{interval}", fontsize=8, linespacing=1.25, **style)
    ax.imshow(grid, cmap=matplotlib.colormaps["RdBu"], vmin=-0.2, vmax=1.2, aspect="equal")
    ax.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(length=0)
    ax.grid(visible=False)
    for spine in ax.spines.values():
        spine.set_visible(False)


def profile_figure(runs: Sequence[RunData]) -> Figure:
    """Performance profiles: the share of runs of each correction that end above a score."""
    palette, domains = Palette.of(runs), unique(runs, "domain")
    figure, axes = wrapped(len(domains))
    for ax, domain in zip(axes, domains, strict=True):
        held = [r for r in runs if r.labels["domain"] == domain]
        finals = [r.last() for r in held]
        margin = 0.03 * (max(finals) - min(finals) or 1.0)
        tau = np.linspace(min(finals) - margin, max(finals) + margin, POINTS)
        for (correction,), members in group_runs(held, ("correction",)).items():
            share = performance_profile([list(s.values()) for s in scores_by_task(members).values()], tau)
            ax.plot(tau, share, color=palette.colour(correction), drawstyle="steps-post")
        ax.set_title(str(domain))
        ax.set_xlabel("score")
        ax.set_ylim(-0.03, 1.05)
    for first in axes[::ACROSS]:
        first.set_ylabel("share of runs above it")
    add_legend(figure, palette, dashes=False)
    return figure


def overview_figure(runs: Sequence[RunData]) -> Figure:
    """The study on one page: a row for each domain with learning curves, effective sample size, KL and staleness.

    With more curves than a panel holds, those of the largest staleness are drawn.
    """
    palette, domains = Palette.of(runs), unique(runs, "domain")
    columns = [m for m in (SCORE, "ess/unit", "kl/k3") if any(r.series(m)[0].size for r in runs)]
    many, worst = len(palette.staleness) > 1, palette.staleness[-1]
    crowded = len(group_runs(runs, ("correction", "staleness"))) > CROWDED and many
    figure, axes = panels(len(domains), len(columns) + many, width=3.5, height=2.75)
    for row, domain in zip(axes, domains, strict=True):
        held = [r for r in runs if r.labels["domain"] == domain]
        drawn = [r for r in held if r.labels["staleness"] == worst] if crowded else held
        for ax, metric in zip(row, columns, strict=False):
            draw_metric(ax, drawn, metric, palette, solid=crowded)
            where = f" at staleness {worst}" if crowded else ""
            ax.set_title(f"{domain}: {NAMES[metric].split(' (')[0]}{where}", fontsize=9.5)
        if many:
            draw_staleness(row[-1], held, palette)
            row[-1].set_title(f"{domain}: final score", fontsize=9.5)
    add_legend(figure, palette, dashes=not crowded)
    return figure


def settle(figure: Figure) -> Figure:
    """Computes the layout once, so that saving in two formats does not do it twice."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def panels(
    rows: int, cols: int, *, width: float = 4.6, height: float = 3.3, share_y: Any = False
) -> tuple[Figure, Any]:
    """A figure with ``rows x cols`` axes, always returned as a 2-D array."""
    width = min(width, 15 / cols)
    figure = Figure(figsize=(width * cols + 1.7, height * rows), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.09, h_pad=0.09)  # type: ignore[union-attr, call-arg]
    return figure, figure.subplots(rows, cols, squeeze=False, sharey=share_y)


def wrapped(count: int, **sizes: float) -> tuple[Figure, Sequence[Axes]]:
    """A figure with so many axes, :data:`ACROSS` of them beside one another, and the axes in order."""
    figure, axes = panels(-(-count // ACROSS), min(count, ACROSS), **sizes)
    for unused in axes.flat[count:]:
        unused.remove()
    return figure, list(axes.flat)[:count]


def add_legend(figure: Figure, palette: Palette, dashes: bool = True, markers: bool = False) -> None:
    """Legend to the right of all panels: colours for corrections, then line styles for staleness."""
    entries: list[tuple[str, Mapping[str, Any]]] = [("correction", {"linestyle": ""})]
    for name in palette.corrections:
        mark = {"marker": palette.marker(name), "markersize": 5.5} if markers else {}
        entries.append((str(name), {"color": palette.colour(name), "linewidth": 2.4, **mark}))
    if dashes and len(palette.staleness) > 1:
        entries += [("", {"linestyle": ""}), ("staleness", {"linestyle": ""})]
        entries += [(str(s), {"color": "#5b616b", "linestyle": palette.dash(s)}) for s in palette.staleness]
    lines = [Line2D([], [], **look) for _, look in entries]
    legend = figure.legend(lines, [name for name, _ in entries], loc="outside right upper", handlelength=2.4)
    for text in legend.get_texts():
        if text.get_text() in ("correction", "staleness"):
            text.set_fontweight("bold")


def _scale(ax: Axes, metric: str, centres: Sequence[np.ndarray[Any, Any]]) -> None:
    """Fractions from 0 to 1; divergences on a logarithmic scale where curves lie decades apart."""
    if metric.startswith("ess/"):
        ax.set_ylim(-0.02, 1.05)
    means = [float(np.mean(np.abs(c))) for c in centres]
    small = [m for m in means if m > 1e-9]
    if metric.startswith("kl/") and small and max(small) > 30 * min(small):
        ax.set_yscale("symlog", linthresh=10 ** math.floor(math.log10(min(small))))


def thousands(value: float, _: Any = None) -> str:
    """Tick labels such as 20k and 1.5M."""
    for size, sign in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{sign}"
    return f"{value:g}"
