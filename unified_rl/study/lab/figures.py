"""The lab's pictures, drawn from the rows of its tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from unified_rl.study.figures import COLOURS, MARKERS, panels
from unified_rl.study.lab.measure import BATCHES
from unified_rl.study.lab.plan import GROUP, ROW
from unified_rl.study.lab.train import SHORTLIST

Row = dict[str, Any]

FLOOR = 1e-4
"""Smaller biases are drawn here, at the left edge of the plane."""

INTENDED = {"": ("o", "#0072B2"), "trust region": ("D", "#D55E00"), "regulariser": ("^", "#009E73")} | {
    "other objective": ("s", "#CC79A7")
}
"""Marker and colour by what the bias is for."""


def setting_name(row: Row) -> str:
    """What a panel is called."""
    return f"{row['problem']}, {row['policy']} policy, {row['advantage']} advantage"


def drift_name(row: Row) -> str:
    """A drift in a few letters."""
    return {"none": "none", "noise": f"KL {row['amount']:g}", "lag": f"lag {row['amount']:g}"}[row["drift"]]


def measured(rows: Sequence[Row]) -> list[Row]:
    """The rows that hold numbers."""
    return [row for row in rows if "cosine" in row]


def groups(rows: Sequence[Row], key: Any) -> dict[Any, list[Row]]:
    """Rows by a function of them, in order of appearance."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


# --------------------------------------------------------------------------------------------- bias-variance plane


def plane_figure(rows: Sequence[Row], drifts: Sequence[str] = ("KL 0.1", "KL 1", "lag 16", "lag 64")) -> Figure | None:
    """Bias against variance of every correction in one setting, a panel for each drift; None where there is nothing.

    Lines join estimators of equal error. Whoever nothing beats in both is named, and the shortlist.
    """
    held = groups(measured(rows), drift_name)
    shown = [name for name in drifts if name in held]
    if not shown:
        return None
    figure, axes = panels(1, len(shown), width=4.4, height=4.4, share_y="row")
    heights = [row["variance_best_rate"] for name in shown for row in held[name] if row["variance_best_rate"] > 0]
    axes[0, 0].set_yscale("log")
    axes[0, 0].set_ylim(*np.quantile(heights, [0.0, 0.98]) * np.array([0.7, 1.5]))
    for ax, name in zip(axes[0], shown, strict=True):
        draw_plane(ax, held[name])
        ax.set_title(name if name.startswith("KL") else f"{name} (KL {held[name][0]['kl']:.2g})")
        ax.set_xlabel("squared bias left at any learning rate")
    axes[0, 0].set_ylabel("variance of one row, relative to the squared gradient")
    note = (
        f"lines: equal error of 256 rows; biases below {FLOOR:g} stand at the left edge, cosines below 0 are left out"
    )
    figure.suptitle(f"{setting_name(rows[0])}\n{note}", fontsize=9)
    marks = [Line2D([], [], linestyle="", marker=m, color=c, markersize=5) for m, c in INTENDED.values()]
    labels = ["not intended", *(f"intended: {name}" for name in INTENDED if name)]
    figure.legend(marks, labels, loc="outside right upper", title="bias")
    return figure


def draw_plane(ax: Axes, rows: Sequence[Row]) -> None:
    """One panel of :func:`plane_figure`."""
    useful = [row for row in rows if row["cosine"] > 0 and row["variance_best_rate"] > 0]
    x = np.array([max(row["bias2_any_rate"], FLOOR) for row in useful])
    y = np.array([row["variance_best_rate"] for row in useful])
    ax.set_xscale("log")
    for intent, (marker, colour) in INTENDED.items():
        chosen = np.array([row["intended_bias"] == intent for row in useful], dtype=bool)
        look: dict[str, Any] = {"marker": marker, "color": colour, "s": 22, "linewidths": 0, "alpha": 0.75}
        ax.scatter(x[chosen], y[chosen], **look)
    ax.set_xlim(FLOOR / 1.5, 1.3)
    _contours(ax)
    for label, places in _labels(useful, x, y).items():
        ax.annotate(label, places, fontsize=6.5, xytext=(4, 3), textcoords="offset points", color="#30343b")


def _labels(rows: Sequence[Row], x: Any, y: Any) -> dict[str, tuple[float, float]]:
    """One label a point for those on the frontier or in the shortlist; coinciding corrections share one."""
    frontier = [not bool(np.any((x <= a) & (y <= b) & ((x < a) | (y < b)))) for a, b in zip(x, y, strict=True)]
    spots: dict[tuple[str, str], list[int]] = {}
    for index, (a, b) in enumerate(zip(x, y, strict=True)):
        spots.setdefault((f"{a:.3g}", f"{b:.3g}"), []).append(index)
    found: dict[str, tuple[float, float]] = {}
    for members in spots.values():
        names = sorted((rows[i]["correction"] for i in members), key=lambda n: (n not in SHORTLIST, len(n), n))
        if any(frontier[i] for i in members) or names[0] in SHORTLIST:
            label = names[0] + (f" +{len(names) - 1}" if len(names) > 1 else "")
            found[label] = (float(x[members[0]]), float(y[members[0]]))
    return found


def _contours(ax: Axes) -> None:
    """Lines of equal error at N = 256: 0.1, 0.3 and 0.6."""
    low, high = ax.get_ylim()
    bias = np.geomspace(FLOOR / 1.5, 1.0, 200)
    for error in (0.1, 0.3, 0.6):
        kept = 1 - bias
        variance = 256 * kept * (kept / (1 - error) - 1)
        inside = variance > 0
        ax.plot(bias[inside], variance[inside], color="#b8bcc4", linewidth=1.0, zorder=0)
        ax.annotate(f"error {error:g}", (FLOOR, variance[0]), fontsize=6, color="#8a8f98", va="bottom")
    ax.set_ylim(low, high)


# ------------------------------------------------------------------------------------------------------ winner map


def winners(rows: Sequence[Row]) -> list[Row]:
    """The correction of least error for each setting, drift and batch size, among those that are exact."""
    exact = [row for row in measured(rows) if row["how"] in (ROW, GROUP)]
    found = []
    for (setting, drift), members in groups(exact, lambda r: (setting_name(r), drift_name(r))).items():
        for n in BATCHES:
            errors = np.array([row[f"error_{n}"] for row in members])
            best = float(errors.min())
            tied = [r["correction"] for r, e in zip(members, errors, strict=True) if e <= best * (1 + 1e-6) + 1e-12]
            name = min(tied, key=lambda t: (t not in SHORTLIST, len(t), t))
            first = members[0]
            found.append(
                {
                    "setting": setting, "problem": first["problem"], "policy": first["policy"],
                    "advantage": first["advantage"], "drift": drift, "kl": first["kl"], "rows": n,
                    "winner": name, "error": best, "tied": " ".join(t for t in tied if t != name),
                }
            )  # fmt: skip
    return found


def winner_figure(found: Sequence[Row], title: str) -> Figure | None:
    """Drift by batch size, a panel for each setting: who has the least error. None where nothing was measured."""
    if not found:
        return None
    by_setting = groups(found, lambda r: r["setting"])
    palette = {name: i for i, name in enumerate(dict.fromkeys(r["winner"] for r in found))}
    columns = min(2, len(by_setting))
    figure, axes = panels(-(-len(by_setting) // columns), columns, width=6.4, height=3.9)
    for ax in axes.flat[len(by_setting) :]:
        ax.set_axis_off()
    for ax, (setting, rows) in zip(axes.flat, by_setting.items(), strict=False):
        _draw_winners(ax, rows, palette)
        ax.set_title(setting)
    figure.suptitle(title, fontsize=11)
    return figure


def _draw_winners(ax: Axes, rows: Sequence[Row], palette: dict[str, int]) -> None:
    drifts, cells = list(dict.fromkeys(row["drift"] for row in rows)), {(r["drift"], r["rows"]): r for r in rows}
    colours = colormaps["tab20"]
    image = np.ones((len(BATCHES), len(drifts), 4))
    for i, n in enumerate(BATCHES):
        for j, drift in enumerate(drifts):
            row = cells[drift, n]
            image[i, j] = colours(palette[row["winner"]] % 20)
            image[i, j, 3] = 0.55
            more = f" +{len(row['tied'].split())}" if row["tied"] else ""
            text = row["winner"].replace("_", "\n") + more + f"\n{row['error']:.2g}"
            ax.text(j, i, text, ha="center", va="center", fontsize=5.4, linespacing=1.0, color="#1d2026")
    ax.imshow(image, aspect="auto", origin="lower")
    ax.set_xticks(range(len(drifts)), drifts, rotation=30, ha="right", fontsize=8)
    ax.set_yticks(range(len(BATCHES)), [str(n) for n in BATCHES], fontsize=8)
    ax.set_ylabel("rows in a batch")
    ax.grid(visible=False)
    ax.tick_params(length=0)


# ----------------------------------------------------------------------------------------------- errors and returns


def error_figure(rows: Sequence[Row], batch: int = 256) -> Figure | None:
    """Error of the shortlist (or of the first ten asked for) against drift, a panel for each setting and kind."""
    held = measured(rows)
    names = list(dict.fromkeys(row["correction"] for row in held))
    names = [name for name in SHORTLIST if name in names] or names[:10]
    held = [row for row in held if row["correction"] in names and row["drift"] != "none"]
    lines = groups(held, lambda r: f"{r['problem']}, {r['advantage']} advantage")
    columns = list(groups(held, lambda r: (r["policy"], r["drift"])))
    if not held:
        return None
    figure, axes = panels(len(lines), len(columns), width=4.0, height=2.3, share_y=True)
    for row_axes, (title, members) in zip(axes, lines.items(), strict=True):
        cells = groups(members, lambda r: (r["policy"], r["drift"]))
        for ax, (policy, kind) in zip(row_axes, columns, strict=True):
            _draw_errors(ax, cells.get((policy, kind), []), names, batch)
            ax.set_title(f"{title}\n{policy} policy, {kind}", fontsize=8)
        row_axes[0].set_ylabel(f"error, {batch} rows")
    for ax in axes[-1]:
        ax.set_xlabel("KL(behavior || current)")
    _legend(figure, names)
    return figure


def _draw_errors(ax: Axes, rows: Sequence[Row], names: Sequence[str], batch: int) -> None:
    for index, name in enumerate(names):
        line = [r for r in rows if r["correction"] == name]
        look: dict[str, Any] = {"color": COLOURS[index], "marker": MARKERS[index % len(MARKERS)], "markersize": 3.5}
        ax.plot([r["kl"] for r in line], [r[f"error_{batch}"] for r in line], **look)
    ax.set_xscale("log")
    ax.set_ylim(-0.02, 1.02)


def return_figure(rows: Sequence[Row]) -> Figure | None:
    """Exact return after training against lag, and against the one-step error at the largest lag."""
    if not rows:
        return None
    names = list(dict.fromkeys(row["correction"] for row in rows))
    lags = sorted({row["lag"] for row in rows})
    figure, (pair,) = panels(1, 2, width=5.4, height=4.0, share_y="row")
    cells = groups(rows, lambda r: (r["correction"], r["lag"]))
    shown = names[: len(COLOURS)]
    for index, name in enumerate(shown):
        held = [np.array([r["return_after"] for r in cells[name, lag]]) for lag in lags]
        look: dict[str, Any] = {"color": COLOURS[index], "marker": MARKERS[index % len(MARKERS)], "markersize": 5}
        shift = (index - (len(shown) - 1) / 2) * 0.5 / len(shown)
        spread = [h.std(ddof=1) / len(h) ** 0.5 if len(h) > 1 else 0.0 for h in held]
        pair[0].errorbar(np.arange(len(lags)) + shift, [h.mean() for h in held], spread, elinewidth=1.0, **look)
        last = cells[name, lags[-1]]
        pair[1].errorbar([last[0]["one_step_error"]], [held[-1].mean()], [spread[-1]], elinewidth=1.0, **look)
        pair[1].annotate(name, (last[0]["one_step_error"], held[-1].mean()), fontsize=7, xytext=(5, 3),
                         textcoords="offset points")  # fmt: skip
    for ax in pair:
        ax.axhline(rows[0]["return_before"], color="#8a8f98", linestyle=":", linewidth=1.2)
    pair[0].set_xticks(range(len(lags)), [str(lag) for lag in lags])
    pair[0].set_xlabel("lag (updates)")
    pair[0].set_ylabel("exact return after training")
    pair[1].set_xlabel(f"error of one step at lag {lags[-1]}, 256 rows")
    _legend(figure, shown)
    return figure


def _legend(figure: Figure, names: Sequence[str]) -> None:
    lines = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], markersize=5)
        for i in range(len(names))
    ]
    figure.legend(lines, list(names), loc="outside right upper")
