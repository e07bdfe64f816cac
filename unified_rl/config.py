"""Configuration: Hydra composes YAML groups, Python signatures say what is allowed, an allow-list says what is built.

A default lives in a Python signature only; YAML states what differs. Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast

from unified_rl.errors import ConfigError
from unified_rl.instantiate import (
    PACKAGE,
    Parameter,
    allowing,
    build,
    check_type,
    check_value,
    is_node,
    is_plain,
    locate,
    nearest,
    nearest_setting,
    parameters,
    plain,
    with_defaults,
)
from unified_rl.interpolation import resolved
from unified_rl.settling import BUDGETS, keep_one_budget, keep_one_way, suggest_rates
from unified_rl.untrusted import LARGE, MAX_DEPTH, check_size, read_yaml

__all__ = [
    "build",
    "compose",
    "flatten",
    "group_options",
    "parse_overrides",
    "preset",
    "preset_names",
    "reading_once",
    "resolve_defaults",
]

SETTINGS = {"train": "unified_rl.training.settings.TrainSettings"}
IMPLIED = {
    "study": "unified_rl.study.grid.Study",
    "correction": "unified_rl.correction.Correction",
    "recipe": "unified_rl.study.recipes.Recipe",
}
"""What a group's node describes where it has no ``_target_``."""

DESCRIBED = ("correction",)
"""Groups whose ``name`` and ``summary`` are those of the option's file (its stem and first comment) if not given."""

CHECKS = {
    "correction": "unified_rl.objectives.correction_settings.check_correction",
    **{
        key: f"unified_rl.training.settings.check_{key}"
        for key in ("logger", "callbacks", "keep_best", "early_stopping", "eval_sampling")
    },
}
"""Functions that check a node for what its own class, further down, cannot know, and settings that hold several."""

CHOICES = "choices"
BY_DOMAIN = "by_domain"
"""Settings by group for rollouts of a domain, where nothing else sets them: ``{control: {agent: {...}}}``."""
REQUIRED_GROUPS = ("policy", "agent")
"""Groups without which nothing can be made of a run."""
GROUP = re.compile(r"((override|optional) +)*/?[\w-]+")
OPTION = re.compile(r"[\w-][\w.-]*")
"""What a file's ``defaults`` may name: options of groups, and no path."""
HEADER = "# @package _global_"

_READ: ContextVar[dict[tuple[str, ...], Any] | None] = ContextVar("read", default=None)
"""What the innermost :func:`reading_once` has read and composed."""


# ---------------------------------------------------------------------------------------------- groups and their files


def config_root() -> Path:
    """The folder of the built-in YAML groups."""
    return Path(importlib.import_module(f"{PACKAGE}.configs").__path__[0])


def primary_groups(primary: str) -> list[str]:
    """Groups of ``configs/<primary>.yaml``, in the order in which they are composed."""
    import yaml

    entries = yaml.safe_load((config_root() / f"{primary}.yaml").read_text())["defaults"]
    return [key for entry in entries if isinstance(entry, dict) for key in entry]


def comment_of(path: Path) -> str:
    """The first comment of a YAML file that is not Hydra's package header, without the ``#``."""
    with path.open() as file:
        for line in file:
            if not line.startswith("#"):
                break
            if "@package" not in line:
                return line.lstrip("# ").strip()
    return ""


def _check_headers(folders: Iterable[str | Path], groups: Iterable[str]) -> None:
    """Hydra reads the package header only at the very top of a file, and silently ignores it elsewhere."""
    for path in (
        path for f, group in itertools.product(folders, groups) for path in sorted(Path(f, group).glob("*.yaml"))
    ):
        with path.open() as file:
            if file.readline().strip() != HEADER:
                raise ConfigError(f"{path}: its first line must be '{HEADER}'; comments follow it")


def _check_files(folder: Path) -> None:
    """Refuses files of options that are no configuration, however they are reached: by name or from another's defaults.

    Raises:
        ConfigError: too large, unreadable, settings of Hydra itself, or a default that is no option of a group.
    """
    for path in sorted([*folder.glob("*.yaml"), *folder.glob("*/*.yaml")]):
        content = read_yaml(path)
        if not isinstance(content, dict | None):
            raise ConfigError(f"{path} holds a {type(content).__name__}; it must hold groups and their settings")
        if content and "hydra" in content:
            raise ConfigError(f"{path} has the key 'hydra', which is none of a file of options; take it out")
        _check_defaults(path, (content or {}).get("defaults") or [])


def _check_defaults(path: Path, entries: Any) -> None:
    for entry in entries if isinstance(entries, list) else [entries]:
        pairs = entry.items() if isinstance(entry, dict) else [("/group", entry)]
        for key, option in pairs:
            options = option if isinstance(option, list) else [option]
            if not GROUP.fullmatch(str(key)) or not all(o is None or OPTION.fullmatch(str(o)) for o in options):
                raise ConfigError(f"{path}: {entry!r} in its defaults must be an option or 'override /group: option'")


def group_options(primary: str = "train", config_dirs: Sequence[str] = ()) -> dict[str, dict[str, str]]:
    """Every group of a primary config with its options and their first comments.

    Args:
        primary: ``train`` or ``compare``.
        config_dirs: the user's own folders, laid out like ``configs/``; they may add groups and options.

    Raises:
        ConfigError: a folder is missing, or an option hides a built-in one.
    """
    groups: dict[str, dict[str, str]] = {group: {} for group in primary_groups(primary)}
    others = {path.name for path in config_root().iterdir() if path.is_dir()} - set(groups)
    for folder in (config_root(), *map(Path, config_dirs)):
        if not folder.is_dir():
            raise ConfigError(f"--config-dir {folder}: there is no such folder")
        if folder != config_root():
            _check_files(folder)
        for path in sorted(folder.glob("*/*.yaml")):
            if path.parent.name in others:
                continue
            options = groups.setdefault(path.parent.name, {})
            if path.stem in options:
                raise ConfigError(f"{path} has the name of another option of {path.parent.name}; rename it")
            options[path.stem] = comment_of(path)
    return groups


def preset_names(group: str) -> list[str]:
    """The built-in options of a group, sorted; ``none``, which is the absence of one, is not among them."""
    return sorted({path.stem for path in (config_root() / group).glob("*.yaml")} - {"none"})


def preset(group: str, name: str) -> dict[str, Any]:
    """The fields of a built-in option's own node, those of the options it extends filled in, read without Hydra.

    Raises:
        ConfigError: no such option (names the nearest), or a file without that node.
    """
    if name not in preset_names(group):
        raise ConfigError(f"unknown {group} {name!r}; {nearest(name, preset_names(group))}")
    node = _read_option(group, name).get(group)
    if not isinstance(node, dict):
        raise ConfigError(f"configs/{group}/{name}.yaml holds no '{group}:' section")
    described = {"name": name, "summary": comment_of(config_root() / group / f"{name}.yaml")}
    return {**described, **{key: value for key, value in node.items() if key != "_target_"}}


def _read_option(group: str, name: str) -> dict[str, Any]:
    """The content of a file, with that of the files it extends merged in: mappings key by key, else replaced."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    content = yaml.load((config_root() / group / f"{name}.yaml").read_text(encoding="utf-8"), loader) or {}
    merged: dict[str, Any] = {}
    for parent in content.pop("defaults", []):
        if isinstance(parent, str) and parent != "_self_":
            merged = _merge(merged, _read_option(group, parent))
    return _merge(merged, content)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


# ---------------------------------------------------------------------------------------------- composing


@dataclasses.dataclass(frozen=True)
class Override:
    """One ``key=value`` of the command line: the text, and what it parses to."""

    text: str
    key: str
    value: Any


def flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides by key from settings by group.

    ``{"agent": {"name": "ppo", "lr": 1e-3}, "seed": 1}`` becomes ``{"agent": "ppo", "agent.lr": 1e-3, "seed": 1}``;
    a mapping without a ``name`` changes the group's default option.
    """
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and "." not in key:
            flat |= {key: value["name"]} if "name" in value else {}
            flat |= {f"{key}.{inner}": item for inner, item in value.items() if inner != "name"}
        else:
            flat[key] = value
    return flat


def parse_overrides(texts: Iterable[str] | Mapping[str, Any]) -> list[Override]:
    """Parses ``key=value`` texts with Hydra's grammar; a mapping's values are taken as they are.

    Raises:
        ConfigError: a text without ``=``, with a sweep, with an unquoted ``=`` in its value, or a key given twice.
    """
    if isinstance(texts, Mapping):
        for key, value in texts.items():
            check_size(value, str(key))
        return [Override(f"{key}={value}", _key(key), plain(value)) for key, value in texts.items()]
    overrides: list[Override] = []
    for text in texts:
        override = _parse(text)
        if override.key in {other.key for other in overrides}:
            raise ConfigError(f"{override.key} is given twice; give it once")
        overrides.append(override)
    return overrides


def _parse(text: str) -> Override:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"{text!r} is not of the form key=value")
    _key(key)
    try:
        parsed = OverridesParser.create().parse_override(text)
    except HydraException as error:
        quote = f"quote it: {key}=\"'{value}'\"" + (" (a list: quote each item)" if value.startswith("[") else "")
        why = "the value holds an unquoted '='" if "=" in value else f"the value cannot be parsed ({_line(error)})"
        raise ConfigError(f"{text!r}: {why}; {quote}") from error
    except RecursionError:
        raise ConfigError(f"{key} holds {LARGE}") from None
    if parsed.is_sweep_override():
        raise ConfigError(
            f"{text!r} asks for several values in one run; 'unified-rl train -m' runs all of them as 'unified-rl "
            "compare' does, or quote it: "
            f"{key}=\"'{value}'\""
        )
    found = parsed.value()
    check_size(found, key)
    return Override(text, key, found)


def _key(key: str) -> str:
    parts = key.split(".")
    if len(parts) > MAX_DEPTH or not all(part.replace("-", "_").isidentifier() or part.isdigit() for part in parts):
        shown = key if len(key) <= 80 else f"{key[:80]}..."
        raise ConfigError(f"{shown!r} is not a key; write group=option or group.key=value (group=null drops a group)")
    return key


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def compose(
    overrides: Sequence[str] | Mapping[str, Any],
    *,
    primary: str = "train",
    config_dirs: Sequence[str] = (),
    allow: Sequence[str] = (),
) -> dict[str, Any]:
    """Composes a configuration and checks every key and type against the signatures that will receive them.

    Args:
        overrides: ``group=option`` and ``key=value`` texts, or a mapping of such keys to values; keys need not be in
            any YAML file.
        primary: the primary config, ``train`` or ``compare``.
        config_dirs: further folders with groups.
        allow: prefixes beside ``unified_rl`` that ``_target_`` may name.

    Returns:
        Plain nested dicts and lists; ``choices`` names the option of every group.

    Raises:
        ConfigError: a misspelt key, group or option (names the nearest), a wrong type, a target that is not allowed.
    """
    parsed = parse_overrides(overrides)
    place = (primary, *map(str, config_dirs))
    groups = _once(place, lambda: _read_options(primary, config_dirs))
    _check_top(parsed, groups, primary)
    chosen = [o for o in parsed if o.key in groups]
    said = (*place, *(f"{o.key}={o.value!r}" for o in chosen))
    config = _once(said, lambda: _compose_groups(chosen, primary, config_dirs, groups))
    for override in parsed:
        if override.key not in groups:
            _set(config, override)
    _fill_by_domain(config, allow)
    check_size(config, "the configuration")
    given = {override.key for override in parsed if override.value is not None}
    keep_one_way(config, given, allow)
    keep_one_budget(config, given)
    config = resolved(config)
    suggest_rates(config, given, shipped_choices(config), allow)
    try:
        return _check_config(config, groups, primary, allow)
    except ConfigError as error:
        raise ConfigError(f"{_elsewhere(config, allow)}{error}") from error


def _elsewhere(config: Mapping[str, Any], allow: Sequence[str]) -> str:
    """A word on a recipe that is not made for the domain of the run, whose settings may be unknown there."""
    name, rollout = (config.get(CHOICES) or {}).get("recipe"), config.get("rollout") or {}
    domains = (config.get("recipe") or {}).get("domains", ["language"])
    if name not in preset_names("recipe") or "_target_" not in rollout:
        return ""
    domain = getattr(locate(rollout["_target_"], allow, "rollout"), "domain", None)
    if domain is None or domain in domains:
        return ""
    known = preset_names("recipe")
    others = ", ".join(one for one in known if domain in preset("recipe", one).get("domains", ["language"]))
    return f"recipe={name} trains in {' and '.join(domains)}, and this run in {domain}, where these do: {others}; "


def shipped_choices(config: Mapping[str, Any]) -> set[str]:
    """The groups whose option is one of the built-in files."""
    choices = config.get(CHOICES) or {}
    return {group for group, name in choices.items() if name is not None and name in preset_names(group)}


def _fill_by_domain(config: dict[str, Any], allow: Sequence[str]) -> None:
    """Takes over what :data:`BY_DOMAIN` says of the rollout's domain, where nobody has set it."""
    settings, rollout = config.pop(BY_DOMAIN, None), config.get("rollout")
    if not isinstance(settings, dict) or not isinstance(rollout, dict) or "_target_" not in rollout:
        return
    domain = getattr(locate(rollout["_target_"], allow, "rollout"), "domain", None)
    for group, node in (settings.get(domain) or {}).items():
        if isinstance(config.get(group), dict):
            config[group] |= {key: value for key, value in node.items() if _is_open(key, config[group])}


def _is_open(key: str, node: Mapping[str, Any]) -> bool:
    """Whether a suggested value of ``key`` is wanted: nobody set it, and a critic's rate neither by setting ``lr``."""
    if key == "critic_lr" and ("lr" in node or node.get("advantage") == "group"):
        return False
    return key not in node


@contextmanager
def reading_once() -> Iterator[None]:
    """Within it, files of options are read once, and the same choice of options is composed once: for grids of runs."""
    token = _READ.set({})
    try:
        yield
    finally:
        _READ.reset(token)


def _once(key: tuple[str, ...], make: Callable[[], Any]) -> Any:
    read = _READ.get()
    if read is None:
        return make()
    if key not in read:
        read[key] = make()
    return copy.deepcopy(read[key])


def _read_options(primary: str, config_dirs: Sequence[str]) -> dict[str, dict[str, str]]:
    groups = group_options(primary, config_dirs)
    _check_headers([config_root(), *config_dirs], groups)
    return groups


def _compose_groups(
    chosen: Sequence[Override], primary: str, config_dirs: Sequence[str], groups: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    listed = primary_groups(primary)
    texts = [_group_text(override, groups, listed) for override in chosen]
    if config_dirs:
        paths = [str(Path(folder).resolve()).replace("'", "\\'") for folder in config_dirs]
        texts.append("hydra.searchpath=[" + ",".join(f"'file://{path}'" for path in paths) + "]")
    try:
        with initialize_config_dir(config_dir=str(config_root().resolve()), version_base="1.3"):
            composed = hydra_compose(primary, texts, return_hydra_config=True)
        found = {k: v for k, v in composed.hydra.runtime.choices.items() if k in groups}
        OmegaConf.set_struct(composed, False)
        composed.pop("hydra")
        config = OmegaConf.to_container(composed, resolve=False)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(_line(error)) from error
    assert isinstance(config, dict)
    config = cast(dict[str, Any], config)
    for group, target in IMPLIED.items():
        if isinstance(config.get(group), dict):
            config[group] = {"_target_": target, **_description(group, found.get(group), groups), **config[group]}
    dropped = {override.key: None for override in chosen if override.value is None}
    return {
        **dict.fromkeys(listed),
        **config,
        **dropped,
        CHOICES: {group: found.get(group) for group in listed} | found,
    }


def _description(group: str, option: str | None, groups: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    if group not in DESCRIBED or option is None:
        return {}
    return {"name": option, "summary": groups[group][option]}


def _group_text(override: Override, groups: Mapping[str, Mapping[str, str]], listed: Sequence[str]) -> str:
    group, option = override.key, override.value
    if option is not None and str(option) not in groups[group]:
        others = [f"{other}={option}" for other in sorted(groups) if str(option) in groups[other]]
        hint = f"there is {' and '.join(others)}" if others else nearest(option, groups[group])
        raise ConfigError(f"{group} has no option {str(option)!r}; {hint}")
    return f"~{group}" if option is None else f"{'' if group in listed else '+'}{group}={option}"


def _check_top(overrides: Iterable[Override], groups: Iterable[str], primary: str) -> None:
    """Every key must begin with a group, or be a setting of the run."""
    known = [*groups, *_settings(primary)]
    for override in overrides:
        top = override.key.split(".")[0]
        if top not in known:
            raise ConfigError(f"there is no group or key {top!r}; {nearest_setting(top, known)}")


def _set(config: dict[str, Any], override: Override) -> None:
    """Writes one value into the composed config; new keys only where a signature will check them."""
    *path, last = override.key.split(".")
    node: Any = config
    checked = not path
    for depth, part in enumerate(path):
        if isinstance(node, dict) and node.get(part) is None and checked and depth:
            node[part] = {}
        node = _child(node, part, override.key, path[:depth])
        if not isinstance(node, dict | list):
            hint = f"choose an option first: {part}=..." if node is None else f"it is {node!r}"
            raise ConfigError(f"{override.key}: {'.'.join(path[: depth + 1])} has no keys here; {hint}")
        checked = checked or "_target_" in node
    if isinstance(node, list):
        _child(node, last, override.key, path)
        node[int(last)] = override.value
    elif last not in node and not checked:
        raise ConfigError(f"{'.'.join(path)} has no key {last!r}; {nearest(last, node)}")
    else:
        node[last] = override.value


def _child(node: Any, part: str, key: str, path: Sequence[str]) -> Any:
    if isinstance(node, dict):
        return node.get(part)
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"{key}: {'.'.join(path)} is a list of {len(node)}; index it with a number below that")
    return node[int(part)]


def _settings(primary: str) -> dict[str, Parameter]:
    return parameters(_imported(SETTINGS[primary]))[0] if primary in SETTINGS else {}


def _imported(path: str) -> Any:
    """What a dotted path in this file names; what others write is looked up by :func:`locate`."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _check_config(
    config: dict[str, Any], groups: Mapping[str, Any], primary: str, allow: Sequence[str]
) -> dict[str, Any]:
    settings, checked = _settings(primary), {}
    for key, value in config.items():
        if key in settings:
            value = check_type(value, settings[key].hint, key)
        elif key not in groups and key != CHOICES and primary in SETTINGS:
            raise ConfigError(f"there is no key {key!r}; {nearest(key, [*groups, *settings])}")
        checked[key] = plain(check_value(value, key, allow))
        if key in CHECKS and checked[key] is not None:
            with allowing(allow):
                _imported(CHECKS[key])(checked[key])
    return checked


def check_run(config: Mapping[str, Any], allow: Sequence[str] = ()) -> dict[str, Any]:
    """A run's configuration, checked once more as it comes from a run's folder or from a script.

    Keys that are neither a setting nor a group of a run are left alone: nothing is built from them.

    Raises:
        ConfigError: what stands in the place of a setting or of a part is none, or a target that is not allowed.
    """
    check_size(config, "the configuration")
    settings, checked = _settings("train"), dict(config)
    for key in settings.keys() & config.keys():
        checked[key] = check_type(config[key], settings[key].hint, key)
    groups = primary_groups("train")
    for group in [*groups, CHOICES]:
        value = config.get(group)
        described = group not in groups or group in IMPLIED or is_node(value)
        if value is not None and not (isinstance(value, Mapping) and described):
            shown = str(value)[:80]
            raise ConfigError(f"{group} is {shown}; it must describe a part, with _target_ and its settings")
        if group in config:
            checked[group] = check_value(value, group, allow)
    for group in REQUIRED_GROUPS:
        if not config.get(group):
            raise ConfigError(f"this run has no {group}; choose one with {group}=NAME")
    return checked


def resolve_defaults(config: Mapping[str, Any], primary: str = "train", allow: Sequence[str] = ()) -> dict[str, Any]:
    """A composed configuration with the default of every signature written out, for the run's ``config.yaml``.

    Defaults that YAML cannot hold, and parameters that only the caller can give, are left out; so are ``steps`` where
    ``epochs`` or ``updates`` say how long the run is, which come to a number of them once the environment is known.
    """
    settings = {name: plain(p.default) for name, p in _settings(primary).items() if is_plain(p.default)}
    if any(config.get(name) is not None for name in BUDGETS):
        settings.pop("steps", None)
    return {**settings, **{key: plain(with_defaults(value, allow)) for key, value in config.items()}}
