"""A study's grid: domains x corrections x staleness x seeds, each cell one training run."""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from unified_rl.configurable import configurable
from unified_rl.errors import ConfigError
from unified_rl.instantiate import check_type, parameters
from unified_rl.ranges import Seed, Whole
from unified_rl.untrusted import check_name

Compose = Callable[[list[str]], dict[str, Any]]
"""Turns the overrides of ``unified-rl train`` into a resolved configuration."""

PLACE_KEYS = ("run_dir", "runs", "name", "resume_existing", "progress")
"""Keys that say where a run lives or how it is shown, and so are no part of its identity."""


@configurable
@dataclass(frozen=True)
class Study:
    """What ``configs/study/NAME.yaml`` says under ``study:``.

    Attributes:
        name: names the output folder ``runs/name``.
        domains: label to the ``train`` overrides that make the domain's runs.
        corrections: preset names, or ``{label: [overrides]}`` for a tuned one; or a mapping domain to such a list.
        staleness: updates between the policy that samples and the one that learns; or a mapping domain to a list.
        seeds: seeds of every cell; or a mapping domain to a list.
        overrides: ``train`` overrides for all runs; a domain's own win over them.
        workers: processes; 0 trains in this one.
        folder: output folder, by default ``runs/name``.
        description: one paragraph for the report.
    """

    name: str
    domains: dict[str, list[str]]
    corrections: Any
    staleness: list[Whole] | dict[str, list[Whole]] = field(default_factory=lambda: [0])
    seeds: list[Seed] | dict[str, list[Seed]] = field(default_factory=lambda: [1])
    overrides: list[str] = field(default_factory=list)
    workers: Whole = 2
    folder: str | None = None
    description: str = ""

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> Study:
        """Reads and checks ``cfg["study"]``.

        Raises:
            ConfigError: no such node, a key that a study lacks, a missing key, an empty list.
        """
        node = {key: value for key, value in (cfg.get("study") or {}).items() if key != "_target_"}
        if not node:
            raise ConfigError("this configuration has no study; choose one with study=NAME")
        known = [f.name for f in fields(cls)]
        for key in node:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
                raise ConfigError(f"study.{key} is not a key of a study{hint}")
        for key in ("name", "domains", "corrections"):
            if not node.get(key):
                raise ConfigError(f"study.{key} is missing or empty")
        if not re.fullmatch(r"[\w.-]+", check_name(str(node["name"]), "study.name")):
            raise ConfigError(f"study.name is {node['name']!r}; use letters, digits, '.', '_' and '-'")
        known_types = parameters(cls)[0]
        study = cls(**{key: check_type(value, known_types[key].hint, f"study.{key}") for key, value in node.items()})
        if "\0" in str(study.folder):
            raise ConfigError(f"study.folder is {study.folder!r}; a path has no NUL character")
        for domain in study.domains:
            for key in ("corrections", "staleness", "seeds"):
                study.choices(key, domain)
        return study

    @property
    def path(self) -> Path:
        """The output folder."""
        return Path(self.folder or Path("runs") / self.name)

    def choices(self, key: str, domain: str) -> list[Any]:
        """The list under ``key`` for one domain (a mapping names domains, a list serves them all).

        Raises:
            ConfigError: the list is missing, empty, or names something twice.
        """
        value = getattr(self, key)
        value = value.get(domain) if isinstance(value, Mapping) else value
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            raise ConfigError(f"study.{key} must be a non-empty list (for domain {domain}), got {value!r}")
        labels = [_correction(v)[0] for v in value] if key == "corrections" else [str(v) for v in value]
        if len(set(labels)) < len(labels):
            raise ConfigError(f"study.{key} names something twice: {labels}")
        return list(value)


@dataclass(frozen=True)
class Job:
    """One training run of a study.

    Attributes:
        slug: folder name; ends with a hash of the resolved configuration, so that a changed one gets a new folder.
        folder: the run folder.
        cfg: resolved configuration, with ``run_dir``.
        labels: domain, correction, staleness and seed (a warm start has domain and seed alone).
        needs: slug of the warm start that must finish first.
    """

    slug: str
    folder: Path
    cfg: dict[str, Any]
    labels: dict[str, Any]
    needs: str | None = None


def make_jobs(study: Study, compose: Compose) -> tuple[list[Job], list[Job]]:
    """The warm starts (one a domain and seed, shared by its runs) and the runs of the grid.

    Everything is composed before anything runs, so that a bad key anywhere costs no training.

    Raises:
        ConfigError: an override that cannot be composed; the message names the cell.
    """
    warm: list[Job] = []
    runs: list[Job] = []
    for domain, own in study.domains.items():
        shared = merge_overrides(study.overrides, own)
        for seed in study.choices("seeds", domain):
            start = _warm_start(study, domain, shared, seed, compose)
            warm += [start] if start else []
            for staleness in study.choices("staleness", domain):
                for choice in study.choices("corrections", domain):
                    runs.append(_run(study, domain, shared, choice, staleness, seed, start, compose))
    return warm, runs


def merge_overrides(*lists: Sequence[str]) -> list[str]:
    """One list of overrides in which the last word on a key wins.

    Raises:
        ConfigError: an entry that is not ``key=value``.
    """
    merged: dict[str, str] = {}
    for entry in (e for entries in lists for e in entries):
        key, equals, _ = str(entry).partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"study override {entry!r} is not key=value")
        merged.pop(key.strip(), None)
        merged[key.strip()] = str(entry)
    return list(merged.values())


def identity(cfg: Mapping[str, Any]) -> str:
    """Hash of what a resolved configuration trains, apart from where it lives (8 hex digits)."""
    kept = copy.deepcopy({k: v for k, v in cfg.items() if k not in PLACE_KEYS})
    for group in ("engine", "learner"):  # what was made before there were workers and launches is the same run
        if not kept.get(group):
            kept.pop(group, None)
            (kept.get("choices") or {}).pop(group, None)
    start = kept.get("warm_start") or {}
    if start.get("run"):
        start["run"] = Path(start["run"]).name
    text = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _correction(choice: Any) -> tuple[str, list[str]]:
    """Label and overrides of one entry of ``corrections``."""
    if isinstance(choice, Mapping):
        if len(choice) != 1:
            raise ConfigError(f"an entry of study.corrections is a name or {{label: [overrides]}}, got {dict(choice)}")
        label, overrides = next(iter(choice.items()))
        if not isinstance(overrides, Sequence) or isinstance(overrides, str):
            raise ConfigError(f"study.corrections: {label} is {overrides!r}; it must be a list of overrides")
        return str(label), [str(o) for o in overrides]
    return str(choice), [f"correction={choice}"]


def _warm_start(study: Study, domain: str, shared: list[str], seed: int, compose: Compose) -> Job | None:
    overrides = merge_overrides(shared, ["steps=0", f"seed={seed}"])
    cfg = _compose(compose, overrides, f"the warm start of {domain}")
    node = cfg.get("warm_start")
    if not node or node.get("run"):
        return None
    return _job(study, cfg, f"{domain}-start-seed{seed}", {"domain": domain, "seed": seed})


def _run(
    study: Study,
    domain: str,
    shared: list[str],
    choice: Any,
    staleness: int,
    seed: int,
    start: Job | None,
    compose: Compose,
) -> Job:
    label, own = _correction(choice)
    cell = f"{domain}-{label}-staleness{staleness}-seed{seed}"
    overrides = merge_overrides(shared, own, [f"seed={seed}"])
    cfg = _compose(compose, overrides, cell)
    if (cfg.get("rollout") or {}).get("staleness", 0) != staleness:  # who collects by itself has none
        cfg = _compose(compose, merge_overrides(overrides, [f"rollout.staleness={staleness}"]), cell)
    if cfg.get("eval_episodes") == 0:
        raise ConfigError(f"{cell}: eval_episodes=0, but a study compares held-out scores; set it to at least 1")
    if start is not None:
        cfg["warm_start"] = {**cfg["warm_start"], "run": str(start.folder)}
    labels = {"domain": domain, "correction": label, "staleness": int(staleness), "seed": int(seed)}
    return _job(study, cfg, cell, labels, start.slug if start else None)


def _compose(compose: Compose, overrides: list[str], cell: str) -> dict[str, Any]:
    try:
        return compose(overrides)
    except ConfigError as error:
        raise ConfigError(f"{cell}: {error}") from error


def _job(study: Study, cfg: dict[str, Any], cell: str, labels: dict[str, Any], needs: str | None = None) -> Job:
    slug = check_name(re.sub(r"[^\w.-]+", "_", f"{cell}-{identity(cfg)}"), f"the folder of the study's run {cell[:60]}")
    folder = study.path / "runs" / slug
    cfg = {**cfg, "run_dir": str(folder), "resume_existing": True, "progress": False}
    return Job(slug, folder, cfg, labels, needs)
