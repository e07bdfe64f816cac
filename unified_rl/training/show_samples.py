"""``unified-rl samples RUN``: conversations of a run in the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unified_rl.errors import ConfigError
from unified_rl.training.growing import Row
from unified_rl.training.sample_text import plain_text
from unified_rl.training.samples import read_samples, select

if TYPE_CHECKING:
    from rich.panel import Panel


def show(
    run: str | Path,
    order: str = "latest",
    count: int = 5,
    prompt: int | None = None,
    split: str | None = None,
    as_json: bool = False,
) -> None:
    """Prints some of a run's conversations, see :func:`~unified_rl.training.samples.select`.

    Raises:
        CheckpointError: no such run, or it wrote none.
        ConfigError: ``count`` below 1, or nothing is left.
    """
    if count < 1:
        raise ConfigError(f"-n {count} must be at least 1")
    rows = select(read_samples(Path(run)), order, count=count, prompt=prompt, split=split)
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    from rich.console import Console

    console = Console(markup=False, highlight=False, emoji=False)
    for row in rows:
        console.print(panel(row))


def panel(row: Row) -> Panel:
    """One conversation in a frame. Every text goes through :func:`~unified_rl.training.sample_text.plain_text`."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    parts = [Text(_plain(row.get("prompt")), style="dim"), Text(_plain(row.get("answer")))]
    if row.get("reference") is not None:
        parts.append(Text(f"reference: {_plain(row['reference'])}", style="cyan"))
    rewards = row.get("rewards")
    if isinstance(rewards, dict) and rewards:
        parts.append(
            Text("  ".join(f"{_plain(key)} {_number(value)}" for key, value in rewards.items()), style="magenta")
        )
    told = [
        f"reward {_number(row.get('reward'))}",
        f"{row.get('tokens')} tokens",
        f"policy {row.get('policy_version')}",
    ]
    if row.get("advantage") is not None:
        told.insert(1, f"advantage {_number(row['advantage'])}")
    if row.get("truncated"):
        told.append("truncated")
    title = f"update {row.get('update')} | {row.get('split')} | prompt {row.get('prompt_id')}"
    return Panel(Group(*parts), title=Text(_plain(title)), subtitle=Text(_plain(", ".join(told))), title_align="left")


def _plain(value: Any) -> str:
    return "" if value is None else str(plain_text(str(value)))


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "none" if value is None else _plain(value)
