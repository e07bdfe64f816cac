"""What a recipe is made of: read from its file, for pages and listings. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from unified_rl.config import config_root, preset

ROOMS = ("correction", "rows", "prompts and answers", "advantages", "terms of the loss", "other policies")
"""The columns of the table of parts."""
LETTERS = {
    "Demonstrations": ("D", "a demonstration"),
    "Experience": ("E", "a stored right answer"),
    "Recorded": ("R", "a recorded answer"),
    "Model": ("M", "another model's answer"),
    "Pool": ("P", "an own earlier answer"),
    "Judgements": ("J", "the policy's judgement of answers, whose truth is known"),
    "Described": ("D", "an own beginning that another model goes on from"),
    "Coached": ("C", "an own answer with a part of the solution in view"),
    "Assimilated": ("A", "an own right answer of before, where all fail"),
    "Recoveries": ("R", "how a failed answer, and a word of what was wrong, goes on"),
    "Edited": ("E", "the worst answer with sentences of the solution"),
    "Calibrated": ("c", "each answer again, as sure as its group is right"),
    "Revised": ("R", "the worst answer up to its error, then a better one"),
    "Shortened": ("S", "the shortest right answer, cut where the policy needs no more"),
    "Steps": ("S", "the first step of an answer, worth the mean of several tries"),
    "Replays": ("K", "a kept answer to one prompt, good ones first"),
    "Windows": ("W", "a row of a group of the last collections"),
}
"""How a picture draws rows of a source; others take their initial."""
JOINING = {"Calibrated", "Experience", "Steps", "Assimilated", "Coached", "Edited"}
"""Sources whose rows are of a group of fresh answers, whatever their settings."""
GIVEN = {
    "Guided": "a part of the solution",
    "Knowledge": "what is known of the problem",
    "Advised": "advice that was sampled for it",
    "Drafts": "a draft of another problem",
    "Forced": "a forced token",
    "OwnSuccess": "a part of an own right answer",
    "Continued": "a part of an older answer",
    "Verified": "what the policy would still say of its last answer",
}
"""What answers begin with, by the class of ``rollout.beginning``."""
AGAIN = {
    "Hints": "sampled again behind a part of the solution",
    "Refill": "replaced by other prompts",
    "SelfHints": "sampled again behind the policy's own hints",
    "Rephrased": "replaced by the policy's own words for the solution",
    "Retried": "sampled again behind the failed try",
    "Forks": "forked at uncertain tokens, and sampled on from there",
    "SelfJudged": "rewarded by the policy's own yes or no",
}
"""What becomes of groups, by the class of ``rollout.context``."""

SPEAKERS = {
    "Alternating": "o o o o t t t t      turns, or steps, of the policy (o) and of the teacher (t)",
    "Draft": "o o o x t            the policy's draft to its first rejected token (x), on from the teacher's (t)",
    "TwoContexts": "b b s b b s s b      a frozen model's tokens: b without the solution in sight, s with it",
    "Interleaved": "o o t o o o t o      tokens of the policy (o), the teacher's (t) where those are unlikely to it",
}
"""How a picture draws an answer, by the class of ``rollout.speaker``."""


def read(name: str) -> tuple[dict[str, str], dict[str, Any]]:
    """The options that a recipe chooses by group, and the keys that it sets itself."""
    import yaml

    content = yaml.safe_load((config_root() / "recipe" / f"{name}.yaml").read_text(encoding="utf-8")) or {}
    entries = [entry for entry in content.pop("defaults", []) if isinstance(entry, Mapping)]
    chosen = {str(key).split("/")[-1]: str(value) for entry in entries for key, value in entry.items()}
    content.pop("recipe", None)
    return chosen, content


def parts(name: str) -> dict[str, list[str]]:
    """The names of a recipe's parts, by the room of :data:`ROOMS` that they stand in; empty rooms are left out."""
    chosen, own = read(name)
    rollout, agent, correction = (_node(own.get(key)) for key in ("rollout", "agent", "correction"))
    found = {
        "correction": [chosen.get("correction", ""), *_settings(correction, ("kernel", "wrapper", "penalty"))],
        "rows": [
            *_classes(_node(rollout.get("sources"))),
            *(f"{group} {chosen[group]}" for group in ("replay", "warm_start") if group in chosen),
            *_of_engine(chosen, own),
        ],
        "prompts and answers": [
            *(f"score {one}" for one in _names(_node(rollout.get("curriculum")).get("score"))),
            *(_class(rollout.get(key)) for key in ("curriculum", "beginning", "context", "speaker")),
            *("the solution in sight" for _ in ["privileged"] if rollout.get("privileged")),
        ],
        "advantages": [
            *_settings(agent, ("advantage", "credit", "reward_model", "columns", "maps", "filters", "gates")),
            *(f"KL in the {agent['kl_in']}" for _ in ["kl"] if agent.get("kl_in")),
        ],
        "terms of the loss": [
            *_terms(_node(agent.get("objectives"))),
            *_settings(agent, ("actor", "value", "aggregate", "target")),
        ],
        "other policies": [*_node(agent.get("anchors")), *_anchors(own)],
    }
    tidy = {room: list(dict.fromkeys(filter(None, names))) for room, names in found.items()}
    return {room: names for room, names in tidy.items() if names}


def changes(name: str) -> list[str]:
    """A line for each key that a recipe sets: the value, and in brackets what it is in the option chosen beside it."""
    chosen, own = read(name)
    lines = [f"{group}={option}" for group, option in chosen.items()]
    for key, value in _leaves(own):
        group, _, rest = key.partition(".")
        before = _lookup(preset(group, chosen[group]), rest) if group in chosen and chosen[group] != "none" else None
        was = "" if before is None or before == value else f"   [{group}={chosen[group]}: {_spelled(before)}]"
        lines.append(f"{key}={_spelled(value)}{was}")
    return lines


def picture(name: str) -> list[str]:
    """Lines that draw the rows of an update, for recipes that have others than the policy's own; else none."""
    own = read(name)[1]
    rollout = _node(own.get("rollout"))
    lines = list(_beside(rollout))
    beginning, context = _class(rollout.get("beginning")), _class(rollout.get("context"))
    if beginning:
        share = _node(rollout["beginning"]).get("share", 1.0)
        of = "some answers" if share != 1.0 else "answers"
        lines.append(f"{of + ':':15}> > > > o o o o o o      > {GIVEN.get(beginning, beginning)}, o sampled behind it")
    if context:
        which = "groups:" if context in ("SelfJudged", "Forks") else "failed groups:"
        lines += [f"{which:15} x x x x x x x x", f"                | {AGAIN.get(context, context)}"]
        lines += ["                v", "                o o o o o o o o"]
    speaker = _class(rollout.get("speaker"))
    lines += [f"{'an answer:':15} {SPEAKERS.get(speaker, speaker)}"] if speaker else []
    return lines


def _beside(rollout: Mapping[str, Any]) -> Iterator[str]:
    size, sources = int(rollout.get("group_size") or 8), _node(rollout.get("sources"))
    for node in sources.values():
        letter, words = LETTERS.get(_class(node), (_class(node)[:1], _class(node)))
        count = node.get("per_group") or (1 if _class(node) in JOINING else 0)
        if count:
            drawn = " ".join(["o"] * size + [letter] * int(count))
            yield f"{'a group:':15} {drawn}      o the policy's own answer, {letter} {words}"
        else:
            many = f"{node['rows']} rows, " if "rows" in node else ""
            yield f"{'beside groups:':15} {' '.join([letter] * 4)} ...      {many}each {words}"


def _node(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _class(node: Any) -> str:
    return str(_node(node).get("_target_", "")).rpartition(".")[2]


def _classes(nodes: Mapping[str, Any]) -> list[str]:
    return [_class(node) for node in nodes.values()]


def _settings(node: Mapping[str, Any], keys: tuple[str, ...]) -> Iterator[str]:
    """``key: name`` of each of some keys that name parts."""
    for key in keys:
        for one in _names(node.get(key)):
            yield f"{key if key == 'advantage' else key.rstrip('s')} {one}"


def _names(value: Any) -> list[str]:
    """The names of parts in a name, a mapping with one, a list of such, or a mapping of such."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [name for one in value for name in _names(one)]
    if isinstance(value, Mapping):
        return [str(value["name"])] if "name" in value else [n for v in value.values() for n in _names(v)]
    return []


def _terms(objectives: Mapping[str, Any]) -> Iterator[str]:
    for key, node in objectives.items():
        if node is None:
            yield f"no {key} term"
            continue
        inner = _node(node)
        detail = next((n for word in ("kind", "link", "generator", "weight") for n in _names(inner.get(word))), "")
        moving = _node(inner.get("coefficient")).get("name", "")
        name = str(node if isinstance(node, str) else inner.get("name", key))
        yield f"{name}{f' ({detail})' if detail else ''}{f', {moving}' if moving else ''}"


def _anchors(own: Any) -> Iterator[str]:
    """Policies that terms and penalties compare with, by name."""
    if isinstance(own, Mapping):
        for key, value in own.items():
            if key == "anchor":
                yield from [value] if isinstance(value, str) else _node(value)
            else:
                yield from _anchors(value)
    elif isinstance(own, list):
        for value in own:
            yield from _anchors(value)


def _of_engine(chosen: Mapping[str, str], own: Mapping[str, Any]) -> list[str]:
    order = _node(own.get("engine")).get("order")
    return [f"engine {chosen['engine']}{f', {order}' if order else ''}"] if "engine" in chosen else []


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; what names its own kind stays whole."""
    if isinstance(node, Mapping) and node and not ({"name", "_target_"} & set(node)):
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node


def _lookup(node: Any, path: str) -> Any:
    for part in path.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _spelled(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_spelled(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_spelled, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
