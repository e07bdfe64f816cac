"""What the best policies of a study do: a few pictures of an episode for every domain of control, inside the report."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unified_rl.errors import UnifiedRLError
from unified_rl.files import replacing
from unified_rl.instantiate import locate
from unified_rl.interop.guard import one_line
from unified_rl.study.results import RunData

MOST = 4
"""Domains of which pictures are shown."""
PICTURES = 6
COLUMNS = 3
WIDTH = 240
"""Pixels of a picture."""
LARGEST = 72_000
"""Bytes of the pictures of a domain; a third more in the page."""
QUALITIES = (80, 60, 40, 20)


def clips(runs: Sequence[RunData], folder: Path, allow: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Sections with pictures of a held-out episode of the best run of every domain of control.

    Args:
        runs: of the study.
        folder: of the study, where ``clip-DOMAIN.jpg`` is written too.
        allow: prefixes that configuration may build.

    Returns:
        HTML, and for every domain that could not be drawn a line that says why. A report never fails for them.
    """
    sections, notes = [], []
    for run in _best(runs, allow)[:MOST]:
        name = str(run.labels["domain"])
        try:
            sections.append(_section(run, name, folder, allow))
        except UnifiedRLError as error:
            notes.append(f"No pictures of {name}: {error}")
        except Exception as error:  # a renderer's or a simulator's own
            notes.append(f"No pictures of {name}: {one_line(error)}")
    return sections, notes


def _best(runs: Sequence[RunData], allow: Sequence[str]) -> list[RunData]:
    """The run of the highest final score of each domain of control that left a folder."""
    found: dict[str, RunData] = {}
    for run in runs:
        name = str(run.labels["domain"])
        if run.folder is not None and math.isfinite(run.last()) and _of_control(run.folder, allow):
            found[name] = max(found.get(name, run), run, key=lambda one: one.last())
    return list(found.values())


def _of_control(folder: Path, allow: Sequence[str]) -> bool:
    from unified_rl.training.provenance import read_config

    try:
        target = locate(read_config(folder)["env"]["_target_"], allow, "env")
    except (UnifiedRLError, KeyError, TypeError):
        return False
    return getattr(target, "domain", "control") == "control"


def _section(run: RunData, name: str, folder: Path, allow: Sequence[str]) -> str:
    from unified_rl.training.verbs import restored
    from unified_rl.training.video import strip

    job = restored(str(run.folder), None, allow, {"device": "cpu"})
    pictures, watch = strip(job, PICTURES)
    picture = page(pictures)
    stem = "".join(letter if letter.isalnum() else "-" for letter in name)
    with replacing(folder / f"clip-{stem}.jpg") as aside:
        aside.write_bytes(picture)
    steps, success = len(watch.history[0]) - 1, float(watch.success[0])
    end = "" if math.isnan(success) else ", a success" if success > 0 else ", a failure"
    labels = ", ".join(f"{key} {run.labels[key]}" for key in ("correction", "staleness", "seed"))
    caption = (
        f"The run that ended best ({labels}) in a held-out episode: {steps} steps, return "
        f"{watch.returns[0]:.4g}{end}. More: unified-rl evaluate {run.folder} --video out.gif."
    )
    uri = "data:image/jpeg;base64," + base64.b64encode(picture).decode()
    heading = f"An episode: {name}"
    return (
        f'<section><h2>{html.escape(heading)}</h2><figure><img src="{uri}" alt="{html.escape(heading)}">'
        f"<figcaption>{html.escape(caption)} <code>clip-{html.escape(stem)}.jpg</code></figcaption></figure></section>"
    )


def page(pictures: Sequence[Any]) -> bytes:
    """Pictures ``[H, W, 3]`` side by side as a JPEG of at most :data:`LARGEST` bytes."""
    from PIL import Image

    tiles = [Image.fromarray(np.asarray(picture)) for picture in pictures]
    height = max(1, round(tiles[0].height * WIDTH / tiles[0].width))
    columns = min(COLUMNS, len(tiles))
    out = Image.new("RGB", (columns * WIDTH, -(-len(tiles) // columns) * height), (255, 255, 255))
    for at, tile in enumerate(tiles):
        out.paste(tile.resize((WIDTH, height)), (at % columns * WIDTH, at // columns * height))
    for quality in QUALITIES:
        buffer = io.BytesIO()
        out.save(buffer, "JPEG", quality=quality, optimize=True)
        if buffer.tell() <= LARGEST:
            break
    return buffer.getvalue()
