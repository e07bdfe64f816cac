"""Learning curves of any run folders: ``python -m unified_rl.study.plot RUN... --by agent --out curves.png``.

In place of run folders it takes the ``results.csv`` of a study (``--by correction``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from unified_rl.errors import ConfigError, UnifiedRLError
from unified_rl.files import check_listed, replacing
from unified_rl.study import figures
from unified_rl.study.curves import join
from unified_rl.study.report import save_png
from unified_rl.study.results import LABELS, SCORE, RunData, group_runs, read_results, read_rows, unique
from unified_rl.untrusted import read_yaml


def plot_runs(
    folders: Sequence[str | Path],
    out: str | Path,
    metric: str = SCORE,
    group_by: str = "agent",
    *,
    x: str = "steps",
    title: str | None = None,
    labels: Mapping[str, str] | None = None,
    only: Sequence[str] | None = None,
    where: Mapping[str, str] | None = None,
) -> Path:
    """Draws one curve for each value of a configuration key, with a band over the runs that share it.

    Args:
        folders: run folders (with ``config.yaml`` and ``metrics.jsonl``), or files ``results.csv`` of studies.
        out: a ``.png`` or ``.svg`` file.
        metric: the metric to draw.
        group_by: a dotted key of the configuration, or a group, whose chosen option then names the curve.
        x: ``steps``, ``update`` or ``wall_seconds``.
        title: title of the figure.
        labels: value of the key to its name in the legend.
        only: the values that are drawn, in this order; None draws all.
        where: labels that runs of a study's file must have, such as ``{"domain": "language"}``.

    Returns:
        ``out``.

    Raises:
        ConfigError: a folder without a run, no run that logged the metric, or a curve of several tasks.
    """
    runs = chosen_runs(folders, group_by, where)
    if only is not None:
        runs = [run for value in only for run in runs if str(run.labels[group_by]) == value]
    if not any(run.series(metric, x)[0].size for run in runs):
        known = sorted({key for run in runs for row in run.rows for key in row})
        raise ConfigError(f"no run logged {metric} against {x}; logged were {', '.join(known) or 'nothing'}")
    groups = group_runs(runs, (group_by,))
    with figures.drawing():
        figure, axes = figures.panels(1, 1, width=6.4, height=4)
        lines, names = [], []
        for index, ((value,), members) in enumerate(groups.items()):
            curve = join(members, metric, x=x)
            if curve is None:
                continue
            colour = figures.COLOURS[index % len(figures.COLOURS)]
            figures.draw_curve(axes[0, 0], curve, colour)
            lines.append(Line2D([], [], color=colour, linewidth=2.4))
            seeds = f" ({curve.seeds} seeds)" if curve.seeds > 1 else " (1 seed)"
            names.append((labels or {}).get(str(value), str(value)) + seeds)
        _finish(axes[0, 0], metric, x, title)
        figure.legend(lines, names, loc="outside right upper", title=group_by, alignment="left")
    return _save(figure, Path(out))


def chosen_runs(folders: Sequence[str | Path], group_by: str, where: Mapping[str, str] | None = None) -> list[RunData]:
    """The runs of some folders and files that have the labels ``where``.

    Raises:
        ConfigError: a folder without a run, none that is left, or runs of one value of ``group_by`` that are not
            repetitions of each other: they differ in more than their seed.
    """
    runs = [run for folder in folders for run in load_runs(Path(folder), group_by)]
    runs = [run for run in runs if all(str(run.labels.get(key)) == value for key, value in (where or {}).items())]
    if not runs:
        raise ConfigError(f"no run has {', '.join(f'{key}={value}' for key, value in (where or {}).items())}")
    for (value,), members in group_runs(runs, (group_by,)).items():
        for key in (key for key in LABELS if key not in ("seed", group_by)):
            found = unique(members, key)
            if len(found) > 1:
                raise ConfigError(
                    f"runs of {group_by} {value} differ in {key} ({', '.join(map(str, found))}), so they are no "
                    f"repetitions of one another: choose, --where {key}={found[0]}"
                )
    return runs


def load_runs(path: Path, group_by: str) -> list[RunData]:
    """The run of a folder, or those of a study's ``results.csv``, whose labels are its first columns.

    Raises:
        ConfigError: no run, or no such label.
    """
    if path.suffix != ".csv":
        return [load_run(path, group_by)]
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; 'unified-rl compare study=NAME' writes a results.csv")
    runs = read_results(path)
    if not runs or group_by not in runs[0].labels:
        raise ConfigError(f"{path} holds no runs by {group_by}; its labels are {', '.join(LABELS)}")
    return runs


def load_run(folder: Path, group_by: str) -> RunData:
    """A run with its value of a configuration key as its label.

    Raises:
        ConfigError: no ``config.yaml``, or the key is not in it.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{folder} is not a run folder: it holds no config.yaml")
    check_listed(path)
    return RunData({group_by: config_value(read_yaml(path) or {}, group_by, folder)}, read_rows(folder), folder)


def config_value(cfg: Mapping[str, Any], key: str, folder: Path) -> str:
    """A dotted key of a configuration; for a group the option chosen for it."""
    if key in (cfg.get("choices") or {}):
        return str(cfg["choices"][key])
    node: Any = cfg
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            raise ConfigError(f"the configuration of {folder} has no key {key}")
        node = node[part]
    return str(node["_target_"]).rsplit(".", 1)[-1] if isinstance(node, Mapping) and "_target_" in node else str(node)


def _finish(ax: Any, metric: str, x: str, title: str | None) -> None:
    ax.set_xlabel(x.replace("_", " "))
    ax.set_ylabel(figures.NAMES.get(metric, metric))
    ax.xaxis.set_major_formatter(FuncFormatter(figures.thousands))
    ax.xaxis.set_major_locator(MaxNLocator(6))
    if title:
        ax.set_title(title)


def _save(figure: Any, out: Path) -> Path:
    if out.suffix not in (".png", ".svg"):
        raise ConfigError(f"cannot write {out}; use a name that ends in .png or .svg")
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".png":
        save_png(figure, out)
    else:
        with figures.drawing(), replacing(out) as aside:
            figure.savefig(aside, format="svg", metadata={"Date": None})
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m unified_rl.study.plot``."""
    parser = argparse.ArgumentParser(prog="python -m unified_rl.study.plot", description=__doc__)
    parser.add_argument("runs", nargs="+", help="run folders, or results.csv of studies")
    parser.add_argument("--metric", default=SCORE)
    parser.add_argument("--by", default="agent", help="configuration key that names the curves")
    parser.add_argument("--x", default="steps", choices=("steps", "update", "wall_seconds"))
    parser.add_argument("--only", help="values that are drawn, with commas")
    parser.add_argument("--where", action="append", default=[], metavar="LABEL=VALUE", help="of a study's runs")
    parser.add_argument("--title")
    parser.add_argument("--out", required=True, help="a .png or .svg file")
    given = parser.parse_args(arguments)
    try:
        only = None if given.only is None else given.only.split(",")
        where = dict(one.partition("=")[::2] for one in given.where)
        drawn = {"x": given.x, "title": given.title, "only": only, "where": where}
        print(plot_runs(given.runs, given.out, given.metric, given.by, **drawn))
    except UnifiedRLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
