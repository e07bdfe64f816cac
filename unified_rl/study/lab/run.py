"""``unified-rl lab``: the sweep, the training runs, their CSVs and pictures."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from unified_rl.correction import correction_names, preset_config
from unified_rl.errors import ConfigError
from unified_rl.files import replacing
from unified_rl.study.figures import drawing
from unified_rl.study.lab.figures import (
    error_figure,
    groups,
    plane_figure,
    return_figure,
    setting_name,
    winner_figure,
    winners,
)
from unified_rl.study.lab.sweep import sweep, write_csv
from unified_rl.study.lab.train import SHORTLIST, Schedule
from unified_rl.study.lab.train import train as train_all


def lab(
    corrections: Sequence[str] = (), *, out: str | Path = "lab", train: bool = False, seeds: int = 4, shown: bool = True
) -> Path:
    """Computes bias and variance of corrections on enumerable problems and writes CSVs and pictures.

    Args:
        corrections: presets; none means all.
        out: the folder to write to.
        train: train every correction; else those of a shortlist where more than its length are asked for.
        seeds: of the training runs that are reported; as many again tune the learning rate.
        shown: draw progress bars.

    Returns:
        The folder.

    Raises:
        ConfigError: an unknown preset (names the nearest), or a count below 1.
    """
    names = list(dict.fromkeys(corrections)) or correction_names()
    for name in names:
        preset_config(name)
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds}: at least one seed is needed")
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ConfigError(f"--out {folder}: there is a file of that name; choose another folder") from error
    started = time.perf_counter()
    with _progress(shown) as bar:
        task = bar.add_task("bias and variance", total=None, note="")

        def watch(note: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, note=note)

        rows = sweep(names, watch=watch)
        returns = _trained(names, train, seeds, bar)
    found = winners(rows)
    for name, table in (("estimators", rows), ("winners", found), ("training", returns)):
        if table:
            write_csv(folder / f"{name}.csv", table)
    for name, figure in _figures(rows, found, returns):
        if figure is not None:
            with replacing(folder / f"{name}.png") as aside:
                figure.savefig(aside, dpi=100)
    Console().print(f"{folder}: {len(rows)} rows in {time.perf_counter() - started:.0f} s")
    return folder


def _trained(names: Sequence[str], everything: bool, seeds: int, bar: Progress) -> list[dict[str, Any]]:
    """Training runs of all of ``names``, or of those in the shortlist where that bounds the time."""
    few = len(names) <= len(SHORTLIST)
    picked = list(names) if everything or few else [name for name in SHORTLIST if name in names]
    task = bar.add_task("training on stale data", total=None, note="")

    def watch(note: str, done: int, total: int) -> None:
        bar.update(task, completed=done, total=total, note=note)

    return train_all(picked, schedule=Schedule(seeds=seeds), watch=watch)


def _figures(
    rows: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]], returns: Sequence[dict[str, Any]]
) -> Iterator[tuple[str, Figure | None]]:
    """Every picture by name."""
    with drawing():
        for held in groups(rows, setting_name).values():
            first = held[0]
            yield f"plane_{first['problem']}_{first['policy']}_{first['advantage']}", plane_figure(held)
        for policy, cells in groups(found, lambda row: row["policy"]).items():
            yield f"winners_{policy}", winner_figure(cells, f"least error, {policy} policy (exact corrections)")
        yield "error_against_drift", error_figure(rows)
        yield "return_against_lag", return_figure(returns)


@contextmanager
def _progress(shown: bool) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, disable=not shown) as bar:
        yield bar
