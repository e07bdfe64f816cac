"""Pictures of weight curves: one preset, or a family as small multiples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from unified_rl.errors import ConfigError
from unified_rl.files import replacing
from unified_rl.study.figures import drawing
from unified_rl.study.gallery.curves import Curves

COLUMNS = 4
LOW, HIGH = -0.6, 3.2
"""No panel shows more than this; what lies outside is a number to read, not a shape."""

LOOKS: dict[str, dict[str, Any]] = {
    "A > 0": {"color": "#0072B2", "linewidth": 1.8},
    "A < 0": {"color": "#D55E00", "linewidth": 1.8, "linestyle": (0, (5, 1.6))},
    "A > 0, with penalty": {"color": "#56B4E9", "linewidth": 1.2},
    "A < 0, with penalty": {"color": "#E69F00", "linewidth": 1.2, "linestyle": (0, (5, 1.6))},
    "mismatch weight": {"color": "#009E73", "linewidth": 1.4, "linestyle": (0, (1.3, 1.1))},
}
ORDER = ("mismatch weight", "A > 0, with penalty", "A < 0, with penalty", "A > 0", "A < 0")
"""From the back to the front: dashes over solid lines, so that equal curves are both seen."""
LABELS = {"mismatch weight": "outer weight, against log(proximal / behavior)"}


def draw_one(name: str, curves: Curves, path: Path) -> Path:
    """A preset's curves as a PNG.

    Raises:
        ConfigError: a name that does not end in ``.png``.
    """
    if path.suffix != ".png":
        raise ConfigError(f"cannot write {path}; use a name that ends in .png")
    with drawing():
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        ax = figure.subplots()
        _panel(ax, name, curves)
        ax.set_xlabel("log-ratio")
        ax.set_ylabel("weight of A grad log pi")
        _legend(figure, curves.lines())
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as aside:
            figure.savefig(aside, format="png", dpi=150)
    return path


def draw_family(members: Mapping[str, Curves], digest: str, path: Path) -> None:
    """Small multiples of a family as a PNG of few colours, with ``digest`` in its description."""
    rows = -(-len(members) // COLUMNS)
    with drawing():
        figure = Figure(figsize=(2.5 * COLUMNS, 1.85 * rows + 0.35), layout="constrained")
        axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
        for ax in axes[len(members) :]:
            ax.set_visible(False)
        for ax, (name, curves) in zip(axes, members.items(), strict=False):
            _panel(ax, name, curves)
            ax.tick_params(labelsize=7.5)
        _legend(figure, {line for curves in members.values() for line in curves.lines()})
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as aside:
            figure.savefig(aside, format="png", dpi=100, metadata={"Description": digest, "Software": ""})
    _shrink(path, digest)


def digest_of(path: Path) -> str | None:
    """What :func:`draw_family` left in a picture, or None where there is none."""
    if not path.is_file():
        return None
    with Image.open(path) as image:
        found = image.info.get("Description")
    return None if found is None else str(found)


def _panel(ax: Axes, name: str, curves: Curves) -> None:
    lines = curves.lines()
    for line in sorted(lines, key=ORDER.index):
        ax.plot(curves.log_ratio, lines[line], **LOOKS[line])
    low = min(float(y.min()) for y in lines.values())
    high = max(float(y.max()) for y in lines.values())
    margin = 0.05 * (min(high, HIGH) - max(low, LOW))
    ax.set_ylim(max(min(low, 0.0), LOW) - margin, max(min(high, HIGH), 1.2) + margin)
    span = float(curves.log_ratio.abs().max())
    ax.set_xlim(-span, span)
    ax.set_title(name, fontsize=9.5)


def _legend(figure: Figure, lines: Sequence[str] | set[str] | Mapping[str, Any]) -> None:
    shown = [line for line in LOOKS if line in lines]
    handles = [Line2D([], [], **LOOKS[line]) for line in shown]
    names = [LABELS.get(line, line) for line in shown]
    figure.legend(handles, names, loc="outside lower center", ncols=3 if len(shown) > 3 else len(shown), fontsize=8)


def _shrink(path: Path, digest: str) -> None:
    """Rewrites a PNG with a palette of 96 colours."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Description", digest)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(96, dither=Image.Dither.NONE)
    with replacing(path) as aside:
        small.save(aside, optimize=True, pnginfo=info)
