"""Recipes: whole methods as one word, what each is, where it comes from, and the case in which it is another.

Nothing here imports torch, so that the command line can list them at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from unified_rl.config import comment_of, config_root, preset_names
from unified_rl.configurable import configurable
from unified_rl.errors import ConfigError
from unified_rl.files import write_atomically
from unified_rl.instantiate import nearest
from unified_rl.study.recipe_parts import ROOMS, changes, parts, picture

USAGE = "unified-rl recipes [show NAME]"
PAGE = "recipes.md"
COMMAND = "unified-rl recipes --write docs"
FAMILIES = {
    "guidance": "answers that come from, or are helped by, somebody else",
    "replay": "answers that are used again",
    "curriculum": "which prompts are drawn",
    "rewards": "what an answer earns",
    "credit": "how much of it each row and token gets",
    "filters": "which rows are learnt from",
    "controllers": "coefficients and learning rates that follow a signal",
    "distillation": "a teacher's distribution",
    "divergence": "the distance from a target distribution",
    "preference": "pairs and sets of answers in order",
    "supervised": "the likelihood of given answers",
    "offline": "recorded transitions",
    "asynchronous": "rollouts that go on while the run trains",
    "other": "none of these",
}
"""What a recipe is about: the heading that it is listed under, in this order, and what the heading means."""
DOMAINS = ("language", "control")


@dataclass(frozen=True)
class Limit:
    """A case in which two configurations train to the same weights.

    Attributes:
        when: overrides beside ``recipe=NAME``; ``RUN`` stands for the folder of a run, ``FOLDER`` for recorded rows,
            ``MODEL`` for the folder of a language model.
        equals: overrides of the other configuration.
        because: in words.
    """

    when: list[str] = field(default_factory=list)
    equals: list[str] = field(default_factory=list)
    because: str = ""


@configurable
@dataclass(frozen=True)
class Recipe:
    """What a file of ``configs/recipe`` says about itself, under ``recipe:``.

    Attributes:
        source: title, arXiv id.
        confidence: what of it was read in released code or in the paper, and what was not.
        limit: each a mapping with the fields of :class:`Limit`.
        family: one of :data:`FAMILIES`, under which it is listed.
        domains: some of :data:`DOMAINS`: where it trains; a test runs it in each.
        trap: what goes wrong with it, or is easily taken for something else.

    Raises:
        ConfigError: a limit with an unknown field, an unknown family, no domain or an unknown one.
    """

    source: str = ""
    confidence: str = ""
    limit: list[dict[str, Any]] | dict[str, Any] | None = None
    family: str = "other"
    domains: list[str] = field(default_factory=lambda: ["language"])
    trap: str = ""

    def __post_init__(self) -> None:
        """Checks the limits, the family and the domains."""
        _ = self.limits
        if self.family not in FAMILIES:
            raise ConfigError(f"there is no recipe.family {self.family!r}; {nearest(self.family, list(FAMILIES))}")
        for domain in self.domains:
            if domain not in DOMAINS:
                raise ConfigError(f"recipe.domains has no {domain!r}; {nearest(domain, list(DOMAINS))}")
        if not self.domains or isinstance(self.domains, str):
            raise ConfigError(f"recipe.domains is a list of some of {', '.join(DOMAINS)}, not {self.domains!r}")

    @property
    def limits(self) -> list[Limit]:
        """The limits, as objects."""
        given = [self.limit] if isinstance(self.limit, Mapping) else list(self.limit or [])
        known = list(Limit.__dataclass_fields__)
        for key in (key for one in given for key in one):
            if key not in known:
                raise ConfigError(f"recipe.limit has no field {key!r}; {nearest(key, known)}")
        return [Limit(**one) for one in given]


def recipe_names() -> list[str]:
    """The built-in recipes, sorted."""
    return preset_names("recipe")


def recipe(name: str) -> Recipe:
    """What a recipe says about itself.

    Raises:
        ConfigError: no such recipe (names the nearest).
    """
    if name not in recipe_names():
        raise ConfigError(f"there is no recipe {name!r}; {nearest(name, recipe_names())}")
    import yaml

    node = (yaml.safe_load(_file(name).read_text(encoding="utf-8")) or {}).get("recipe") or {}
    return Recipe(**node)


def summary(name: str) -> str:
    """The one line that says what a recipe is."""
    return comment_of(_file(name))


def families() -> dict[str, list[str]]:
    """The recipes of each family that has any, sorted."""
    of = {name: recipe(name).family for name in recipe_names()}
    found = {family: [name for name in of if of[name] == family] for family in FAMILIES}
    return {family: names for family, names in found.items() if names}


def _file(name: str) -> Path:
    return config_root() / "recipe" / f"{name}.yaml"


# ---------------------------------------------------------------------------------------------- listing and page


def listed() -> list[dict[str, Any]]:
    """Every recipe as plain values, for machines."""
    return [_plain(name) for name in recipe_names()]


def _plain(name: str) -> dict[str, Any]:
    known = recipe(name)
    limits = [asdict(limit) for limit in known.limits]
    values = {"name": name, "summary": summary(name), "source": known.source, "confidence": known.confidence}
    told = {"trap": known.trap, "parts": parts(name), "changes": changes(name)}
    return {**values, "family": known.family, "domains": known.domains, "limit": limits, **told}


def listing() -> str:
    """One line a recipe, by family."""
    width = max(map(len, recipe_names()))
    lines = []
    for family, names in families().items():
        lines += [f"{family}: {FAMILIES[family]}"]
        lines += [f"  {name:{width}}  {summary(name)} ({', '.join(recipe(name).domains)})" for name in names] + [""]
    hint = f"{USAGE} tells where one comes from and when it is another; unified-rl train recipe=NAME uses it."
    return "\n".join([*lines, hint])


def shown(name: str) -> str:
    """A recipe in full: source, confidence, parts, limits, and every key that it sets."""
    known = recipe(name)
    lines = [f"{name}: {summary(name)}", f"source: {known.source}", f"confidence: {known.confidence}"]
    lines += [f"family: {known.family}", f"domains: {', '.join(known.domains)}"]
    lines += [f"trap: {known.trap}" for _ in ["trap"] if known.trap]
    lines += [f"{room}: {', '.join(names)}" for room, names in parts(name).items()]
    for limit in known.limits:
        lines += [f"limit: {limit.because}", *(f"    {line}" for line in commands(name, limit))]
    drawn = picture(name)
    lines += ["", *drawn] if drawn else []
    return "\n".join([*lines, "", "sets, in brackets what the option of its group has:", *changes(name)])


def commands(name: str, limit: Limit) -> tuple[str, str]:
    """The two runs of a limit, as words of a command line."""
    return " ".join([f"recipe={name}", *map(_quoted, limit.when)]), "= " + " ".join(map(_quoted, limit.equals))


def _quoted(override: str) -> str:
    return f"'{override}'" if any(c in override for c in " {}[]") else override


def page() -> str:
    """The page ``docs/recipes.md``."""
    tables = [line for family, names in families().items() for line in _table(family, names)]
    told = [line for family, names in families().items() for line in _family(family, names)]
    return "\n".join([*_HEAD, *tables, *_EACH, *told]) + "\n"


def _table(family: str, names: list[str]) -> list[str]:
    return [f"### {family.capitalize()}: {FAMILIES[family]}", "", *_COLUMNS, *map(_row, names), ""]


def _row(name: str) -> str:
    found = parts(name)
    cells = ["<br>".join(found.get(room, [])).replace("|", "\\|") for room in ROOMS]
    return f"| [`{name}`](#{name}) | {' | '.join(cells)} |"


_HEAD = [
    "# Recipes",
    "",
    f"Made by `{COMMAND}`; a test fails where it is out of date.",
    "",
    "A recipe is a whole method as one word: it sets correction, replay, rollout, agent and the terms of the loss.",
    "The command line still overrides all of it. A recipe with a teacher wants `agent.teacher=RUN`, one with recorded",
    "rows a `FOLDER` that `unified-rl evaluate RUN --record FOLDER` wrote.",
    "",
    "    unified-rl train env=chain_mod recipe=chord",
    "    unified-rl train env=chain_mod recipe=kdrl agent.teacher=runs/EARLIER correction.penalty.0.coefficient=0.01",
    "    unified-rl recipes show chord",
    "",
    "What some of them are worth, measured: [results/recipes.md](results/recipes.md).",
    "",
    "## What each is made of",
    "",
    "Parts that a recipe does not name are the defaults of [configuration.md](configuration.md).",
    "",
]
_COLUMNS = [f"| recipe | {' | '.join(ROOMS)} |", "|" + "---|" * (len(ROOMS) + 1)]
_EACH = [
    "## Each by itself",
    "",
    "Each pair of lines under *limit* is trained by `tests/test_recipes.py`, with workers by",
    "`tests/test_recipes_asynchronous.py`, on recorded transitions by `tests/test_value_recipes.py`: after two",
    "updates, or three, both have the same weights.",
    "`unified-rl recipes show NAME` adds every key that a recipe sets.",
    "",
]


def _family(family: str, names: list[str]) -> list[str]:
    return [f"### {family.capitalize()}", "", *(line for name in names for line in _section(name))]


def _section(name: str) -> list[str]:
    known = recipe(name)
    lines = [f"#### {name}", "", f"{summary(name)}. Trains in {' and '.join(known.domains)}.", ""]
    lines += [f"- source: {known.source}", f"- how sure: {known.confidence}"]
    lines += [f"- trap: {known.trap}" for _ in ["trap"] if known.trap]
    drawn = picture(name)
    lines += ["", *(f"    {line}" for line in drawn)] if drawn else []
    for limit in known.limits:
        lines += ["", f"*Limit*: {limit.because}:", "", *(f"    {line}" for line in commands(name, limit))]
    return [*lines, ""]


def run(words: Sequence[str], as_json: bool, write: str | None) -> None:
    """What ``unified-rl recipes`` does: lists, shows one, or writes the page.

    Raises:
        ConfigError: words that are no command, or an unknown recipe.
    """
    if write is not None:
        if words or as_json:
            raise ConfigError("--write takes a folder and nothing else")
        path = Path(write) / PAGE
        write_atomically(path, page())
        print(path)
    elif not words:
        print(json.dumps(listed(), indent=1) if as_json else listing())
    elif words[0] != "show" or len(words) != 2:
        hint = f"unified-rl recipes show {words[0]}" if words[0] in recipe_names() else USAGE
        raise ConfigError(f"cannot read {' '.join(words)!r}; write {hint}")
    else:
        print(json.dumps(_plain(words[1]), indent=1) if as_json else shown(words[1]))
