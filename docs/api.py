"""Writes docs/api.md from the docstrings of the public names: ``python docs/api.py``."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import unified_rl as ur

PAGE = Path(__file__).with_name("api.md")
INTRODUCTION = """\
# Python API

`import unified_rl as ur` offers these names and imports each when it is first used. The page is written from the
docstrings by `python docs/api.py`; a test fails where it is out of date. Shapes: `B` rows, `T` steps, `N` units of a
row, `K` simulations, `d` and `a` widths of observation and action.
"""
GROUPS: dict[str, tuple[str, ...]] = {
    "Runs": ("unified_rl.commands", "unified_rl.training.callbacks"),
    "Assembling a run in a script": ("unified_rl.training.assemble", "unified_rl.config"),
    "Corrections": ("unified_rl.correction",),
    "Replay and its samplers": ("unified_rl.replay",),
    "Policies and critics": ("unified_rl.policies",),
    "Agents": ("unified_rl.agents",),
    "Environments and rollouts": ("unified_rl.envs", "unified_rl.protocols", "unified_rl.rollout"),
    "Advantages and value targets": ("unified_rl.returns",),
    "The record": (
        "unified_rl.spaces",
        "unified_rl.units",
    ),
    "Errors": ("unified_rl.errors",),
}
SECTION = re.compile(r"^(Args|Returns|Raises|Attributes|Yields):$")
ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`~?([^`]+)`")


def page() -> str:
    """The whole page."""
    groups = {
        title: [name for place, found in ur.PUBLIC.items() if place.startswith(prefixes) for name in found]
        for title, prefixes in GROUPS.items()
    }
    links = {title: ", ".join(f"[{name}](#{name.lower()})" for name in names) for title, names in groups.items()}
    parts = [INTRODUCTION, "\n".join(f"- {title}: {listed}" for title, listed in links.items()) + "\n"]
    for title, names in groups.items():
        parts.append(f"## {title}\n")
        parts += [entry(name, getattr(ur, name)) for name in names]
    return "\n".join(parts).rstrip() + "\n"


def entry(name: str, thing: Any) -> str:
    """A public name: signature, docstring, and the methods that its class defines itself."""
    lines = [f"### {name}\n", f"```python\n{signature(name, thing)}\n```\n", *prose(thing)]
    lines += ["**Methods**\n"] if any(methods(thing)) else []
    for method, function in methods(thing):
        first = documented(function).split("\n\n")[0]
        lines.append(f"- `{method}{arguments(function)}`: {plain(' '.join(first.split()))}")
    return "\n".join(lines).rstrip() + "\n"


def signature(name: str, thing: Any) -> str:
    """``name(...) -> ...``, one parameter a line where it would be long."""
    if isinstance(thing, type) and issubclass(thing, BaseException):
        return f"class {name}({', '.join(base.__name__ for base in thing.__bases__)})"
    if isinstance(thing, type) and issubclass(thing, Enum):
        return f"class {name}: " + ", ".join(f"{member.name} = {member.value}" for member in thing)
    found = inspect.signature(thing)
    if isinstance(thing, type):
        found = found.replace(return_annotation=inspect.Signature.empty)
    whole = f"{name}{shown(found)}"
    if len(whole) <= 100:
        return whole
    ending = whole[whole.rindex(")") + 1 :]
    listed, star = [], False
    for parameter in found.parameters.values():
        keyword = parameter.kind is inspect.Parameter.KEYWORD_ONLY
        listed += ["*"] if keyword and not star else []
        star = star or keyword or parameter.kind is inspect.Parameter.VAR_POSITIONAL
        listed.append(shown(inspect.Signature([parameter.replace(kind=_alone(parameter))]))[1:-1])
    return f"{name}(\n" + "".join(f"    {text},\n" for text in listed) + f"){ending}"


def _alone(parameter: inspect.Parameter) -> Any:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return parameter.kind if parameter.kind in kinds else inspect.Parameter.POSITIONAL_OR_KEYWORD


def shown(found: inspect.Signature) -> str:
    """A signature as text, without quotes around annotations."""
    kept = [p.replace(annotation=_bare(p.annotation), default=_default(p.default)) for p in found.parameters.values()]
    return str(found.replace(parameters=kept, return_annotation=_bare(found.return_annotation)))


class _Text:
    """Prints as it is written in the source."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _bare(annotation: Any) -> Any:
    annotation = getattr(annotation, "__forward_arg__", annotation)
    return _Text(annotation) if isinstance(annotation, str) else annotation


def _default(value: Any) -> Any:
    named = inspect.isfunction(value) or (isinstance(value, type) and value is not inspect.Parameter.empty)
    return _Text(value.__name__) if named else value


def arguments(function: Callable[..., Any]) -> str:
    """The names that a method takes, without ``self``."""
    return "(" + ", ".join(name for name in inspect.signature(function).parameters if name != "self") + ")"


def methods(thing: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Public methods that a class defines itself and that have a docstring; none for a function or an exception."""
    if not isinstance(thing, type) or issubclass(thing, BaseException):
        return
    for name, value in vars(thing).items():
        function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if not name.startswith("_") and inspect.isfunction(function) and function.__doc__:
            yield name, function


def documented(thing: Any) -> str:
    """The docstring of the thing itself, never an inherited one."""
    return inspect.cleandoc(thing.__doc__ or "")


def prose(thing: Any) -> list[str]:
    """A docstring as Markdown: the text, then each section as a list."""
    lines: list[str] = []
    for line in documented(thing).splitlines():
        heading, item = SECTION.match(line), re.match(r"^    (\*{0,2}\w[\w, ]*): (.*)$", line)
        if heading:
            lines += [f"**{heading[1]}**", ""]
        elif item:
            lines.append(f"- `{item[1]}`: {plain(item[2])}")
        else:
            lines.append(("  " if line.startswith("        ") else "") + plain(line.strip()))
    return [*lines, ""]


def plain(text: str) -> str:
    """Cross references and double backquotes as code."""
    return ROLE.sub(lambda m: f"`{m[1].rsplit('.', 1)[-1]}`", text).replace("``", "`")


def main() -> None:
    """Writes the page, or with ``--check`` fails where it is out of date."""
    text = page()
    if "--check" in sys.argv[1:]:
        sys.exit(0 if PAGE.read_text() == text else f"{PAGE} is out of date; run python docs/api.py")
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
