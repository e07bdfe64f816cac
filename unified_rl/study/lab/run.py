"""``unified-rl lab``: the sweep, its CSV and its pictures."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from unified_rl.correction import correction_names, preset_config
from unified_rl.errors import ConfigError
from unified_rl.study.lab.sweep import sweep, write_csv


def lab(
    corrections: Sequence[str] = (), *, out: str | Path = "lab", train: bool = False, seeds: int = 8, shown: bool = True
) -> Path:
    """Computes bias and variance of corrections on enumerable problems and writes CSVs and pictures.

    Args:
        corrections: presets; none means all.
        out: the folder to write to.
        train: train every correction, not the shortlist alone.
        seeds: of the training runs.
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
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with _progress(shown) as bar:
        task = bar.add_task("bias and variance", total=None, note="")

        def watch(note: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, note=note)

        rows = sweep(names, watch=watch)
    write_csv(folder / "estimators.csv", rows)
    Console().print(f"{folder}: {len(rows)} rows in {time.perf_counter() - started:.0f} s")
    return folder


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
