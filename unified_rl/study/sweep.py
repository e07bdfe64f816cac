"""``unified-rl train -m``: one command line with several values of some keys, as the study of their product."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from itertools import product
from typing import Any

from unified_rl.config import parse_overrides
from unified_rl.errors import ConfigError

OWN = ("run_dir", "runs", "name")
"""Keys that say where the study's folder is."""


def sweep_study(texts: Sequence[str], workers: int = 2) -> dict[str, Any]:
    """The ``study`` of a sweep: seeds, corrections and staleness are its own axes, all other keys make its domains.

    Args:
        texts: overrides of ``unified-rl train``; ``key=a,b``, ``key=range(1,4)`` and ``key=choice(a,b)`` are swept.
        workers: processes.

    Returns:
        What :func:`~unified_rl.study.compare.compare` takes. Its folder is ``run_dir``, or ``runs/NAME`` with a name
        that follows from the texts, so that the same command goes on where it stopped.

    Raises:
        ConfigError: a text that is none of these, or none that is swept.
    """
    axes = _axes(texts)
    swept = [key for key, values in axes.items() if len(values) > 1]
    if not swept:
        raise ConfigError("-m runs every combination of several values, and no key has any: write key=a,b")
    for key in OWN:
        if key in swept:
            raise ConfigError(f"{key} says where the whole sweep goes: give it one value")
    place = {key: axes.pop(key)[0].partition("=")[2] for key in OWN if key in axes}
    seeds = _numbers(axes.pop("seed", ["seed=0"]), "seed")
    staleness = _numbers(axes.pop("rollout.staleness", ["rollout.staleness=0"]), "rollout.staleness")
    given = [text.partition("=")[2] for text in axes.pop("correction", [])]
    corrections = [{name: [f"correction={name}"]} for name in given] or [{"default": []}]
    fixed = [values[0] for key, values in axes.items() if key not in swept]
    named = [key for key in swept if key in axes]
    short = _short(named)
    domains = {}
    for chosen in product(*(axes[key] for key in named)):
        label = " ".join(f"{short[key]}={text.partition('=')[2]}" for key, text in zip(named, chosen, strict=True))
        domains[label or "all"] = list(chosen)
    name = place.get("name") or _name(swept, texts)
    study = {"name": name, "domains": domains, "corrections": corrections, "staleness": staleness, "seeds": seeds}
    told = f"Every combination of {', '.join(swept)}."
    out = {**study, "overrides": fixed, "workers": workers, "description": told}
    if "run_dir" in place or "runs" in place:
        out["folder"] = place.get("run_dir") or f"{place['runs']}/{name}"
    return {"study": out}


def _axes(texts: Sequence[str]) -> dict[str, list[str]]:
    """The values of every key, as overrides of one run, in the order of the command line."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import RangeSweep
    from hydra.errors import HydraException

    axes: dict[str, list[str]] = {}
    for text in texts:
        key = text.partition("=")[0]
        if key in axes:
            raise ConfigError(f"{key} is given twice; give it once")
        try:
            parsed = OverridesParser.create().parse_override(text)
        except (HydraException, RecursionError):
            parsed = None  # said in full below
        if parsed is None or not parsed.is_sweep_override():
            axes[key] = [override.text for override in parse_overrides([text])]
            continue
        if not parsed.is_discrete_sweep() and not isinstance(parsed.value(), RangeSweep):
            raise ConfigError(f"{text!r} names no list of values; write {key}=a,b")
        axes[key] = list(dict.fromkeys(f"{key}={value}" for value in parsed.sweep_string_iterator()))
        parse_overrides([axes[key][0]])
    return axes


def _numbers(texts: Sequence[str], key: str) -> list[int]:
    try:
        return [int(text.partition("=")[2]) for text in texts]
    except ValueError:
        raise ConfigError(f"{key} must be whole numbers, got {', '.join(texts)}") from None


def _short(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key, where that tells it from the others."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: part if last.count(part) == 1 else key for key, part in zip(keys, last, strict=True)}


def _name(swept: Sequence[str], texts: Sequence[str]) -> str:
    digest = hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()[:8]
    keys = re.sub(r"[^\w.-]+", "_", "-".join(swept))[:60]
    return f"sweep-{keys}-{digest}"
