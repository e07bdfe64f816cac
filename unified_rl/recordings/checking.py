"""``unified-rl data check FOLDER env=NAME``: rows against the environment that they are to be used in."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.interop.guard import reset_env, step_env
from unified_rl.observations import Layout, layout_of
from unified_rl.recordings.files import (
    ABOUT,
    Episodes,
    env_names,
    env_of_set,
    make_control_env,
    read_robot_set,
    unlike,
)
from unified_rl.rollout.recorded import bounds, faults, named
from unified_rl.spaces import Space

LEARNERS = ("reward", "next_observation", "terminated")
"""Columns that critics need; imitation does without."""
PROBED = 256
"""Random steps of each simulation that the rows are compared with."""
SPREAD = 30.0
"""Times that an entry may spread wider than in random steps, or narrower, without a word; a radian is 57 degrees."""
HALF = 0.5
"""Share of rows that must not go on as they say for the set to be refused."""


@dataclass(frozen=True)
class Finding:
    """One thing that was seen.

    Attributes:
        level: ``error`` (a run refuses the rows, or learns something else from them than was meant), ``warning``
            (look at it), or ``note``.
        text: one line, with the numbers of the first rows, and what to do.
    """

    level: str
    text: str

    def __str__(self) -> str:
        """``level: text``."""
        return f"{self.level}: {self.text}"


def check_data(
    folder: str | os.PathLike[str],
    env: Mapping[str, Any],
    allow: Sequence[str] = (),
    config_dirs: Sequence[str] = (),
) -> list[Finding]:
    """What speaks against using a folder's rows in an environment.

    Args:
        folder: of rows.
        env: ``{"env": "hopper", "env.KEY": VALUE}``.
        allow: packages that configuration may build.
        config_dirs: folders with options of your own.

    Returns:
        Errors first. None of level ``error`` means that every agent takes the rows that has the columns it needs.

    Raises:
        CheckpointError: the folder is missing or damaged.
        ConfigError: an environment that cannot be made, or rows of a language task.
    """
    rows = read_robot_set(folder)
    found = check_rows(rows, make_control_env(env, allow, 4, 0, "data check", config_dirs), os.fspath(folder))
    return in_order([*found, *_elsewhere(folder, env_names(env, allow, config_dirs))])


def _elsewhere(folder: str | os.PathLike[str], wanted: Mapping[str, str]) -> Iterator[Finding]:
    """What the set itself says: numbers of equal width do not tell one maze, or one robot, from another."""
    recorded = env_of_set(folder)
    apart = None if recorded is None else unlike(recorded, wanted)
    if apart is not None:
        yield Finding(
            "warning",
            f"the rows were recorded with {apart[0]} ({os.path.join(folder, ABOUT)}), and this environment has "
            f"{apart[1]}: what they show of its steps may not be so here",
        )


def check_rows(rows: TensorDict, env: Any, where: str) -> list[Finding]:
    """As :func:`check_data`, of rows ``[N]`` and an environment."""
    space, rows = Space.of(env.policy_inputs()), rows.copy()
    lost = [key for key in ("observation", "action") if key not in rows.keys()]
    found = [Finding("error", f"{where} has no column {key}: no agent learns from it") for key in lost]
    lacking = [key for key in LEARNERS if key not in rows.keys()]
    if lacking:
        found.append(
            Finding("note", f"there is no {', '.join(lacking)}: the rows are for agent=behavior_cloning alone")
        )
    for key in ("observation", "next_observation", "reward"):
        if key in rows.keys() and rows[key].dtype != torch.float32:
            dtype = str(rows[key].dtype).removeprefix("torch.")
            found.append(Finding("note", f"{key} is {dtype} and is used as float32"))
    wrong = [Finding("error", text) for text in faults(rows, space, where)]
    found += wrong
    episodes = Episodes.of(rows)
    found += _ends(rows, episodes, env.max_steps)
    if not wrong and {"observation", "action"} <= set(rows.keys()):
        found += _actions(rows["action"], space)
        found += _continuity(rows, episodes)
        found += _scales(rows, layout_of(space.observation), *_probe(env, space))
    found += _rewards(rows)
    return in_order(found)


def in_order(found: Sequence[Finding]) -> list[Finding]:
    """Errors first, notes last."""
    order = {"error": 0, "warning": 1, "note": 2}
    return sorted(found, key=lambda one: order[one.level])


def flaws(rows: TensorDict, where: str) -> list[str]:
    """What no environment would take: numbers that are not finite."""
    shape = Space.flat(rows["observation"].shape[1], rows["action"].shape[1], *_unbounded(rows["action"].shape[1]))
    return list(faults(rows.copy(), shape, where))


def _unbounded(width: int) -> tuple[list[float], list[float]]:
    return [-torch.inf] * width, [torch.inf] * width


def _actions(action: Tensor, space: Space) -> Iterator[Finding]:
    """Entries that never move, and actions a little outside the bounds."""
    if space.action.choices is None:
        low, high = bounds(space)
        slack = 1e-4 * torch.where(torch.isfinite(high - low), high - low, torch.ones_like(low))
        beyond = (action < low - slack) | (action > high + slack)
        if bool(beyond.any()):
            worst = int(beyond.float().mean(0).argmax())
            column = action[:, worst]
            yield Finding(
                "warning",
                f"{100 * float(beyond.any(-1).float().mean()):.3g} % of the actions lie outside the environment's "
                f"bounds, which executes others: entry {worst} is between {float(column.min()):g} and "
                f"{float(column.max()):g}, its bounds are {float(low[worst]):g} and {float(high[worst]):g}: "
                f"{named(beyond.any(-1))}; clip or scale them",
            )
    still = [k for k in range(action.shape[1]) if len(action) > 1 and bool((action[:, k] == action[0, k]).all())]
    if still:
        yield Finding("warning", f"the same action in every row, in entries {', '.join(map(str, still[:8]))}")


def _ends(rows: TensorDict, episodes: Episodes, limit: int) -> Iterator[Finding]:
    """Where episodes end, and how."""
    count = len(rows)
    flags = {key: rows[key].reshape(count).bool() for key in ("terminated", "truncated") if key in rows.keys()}
    if not flags:
        yield Finding("note", f"no ends of episodes are marked in {count} rows")
        return
    none = torch.zeros(count, dtype=torch.bool)
    terminated, truncated = (flags.get(key, none) for key in ("terminated", "truncated"))
    last = none.clone()
    last[episodes.last] = True
    inside = (terminated | truncated) & ~last
    if bool(inside.any()):
        yield Finding("warning", f"an end is marked inside an episode: {named(inside)}; critics take it for the end")
    cut = int((~(terminated | truncated)[episodes.last]).sum())
    if cut:
        yield Finding(
            "note", f"{cut} of {len(episodes.last)} episodes stop without an end: the recording was cut there"
        )
    longer = torch.zeros(count, dtype=torch.bool)
    longer[episodes.first[episodes.length > limit]] = True
    if bool(longer.any()):
        yield Finding("warning", f"episodes of more than the environment's {limit} steps begin at {named(longer)}")
    at_limit = (episodes.length == limit) & terminated[episodes.last]
    if bool(at_limit.any()) and bool((episodes.length[terminated[episodes.last]] == limit).all()):
        marked = none.clone()
        marked[episodes.last[at_limit]] = True
        yield Finding(
            "warning",
            f"every episode that terminates does so at the time limit of {limit} steps ({named(marked)}), behind which "
            "critics then see nothing; where it was only the limit, import again with dones=truncated",
        )


def _continuity(rows: TensorDict, episodes: Episodes) -> Iterator[Finding]:
    """Whether a step's next observation is the next step's observation."""
    if "next_observation" not in rows.keys() or len(rows) < 2:
        return
    inside = torch.ones(len(rows), dtype=torch.bool)
    inside[episodes.last] = False
    if not bool(inside.any()):
        return
    after = torch.roll(rows["observation"], -1, 0)
    if after.dtype == torch.uint8:  # with images
        apart = inside & (rows["next_observation"] != after).any(-1)
    else:
        scale = rows["observation"].std(0).clamp(min=1e-6)
        apart = inside & ((rows["next_observation"] - after).abs() > 1e-3 * scale).any(-1)
    share = float(apart.sum() / inside.sum())
    if share > 0:
        yield Finding(
            "error" if share > HALF else "warning",
            f"in {100 * share:.3g} % of the steps inside episodes the next observation is not that of the next row: "
            f"{named(apart)}; is it shifted, or are the rows out of order?",
        )


def _rewards(rows: TensorDict) -> Iterator[Finding]:
    reward = rows.get("reward", None)
    if reward is not None and len(reward) > 1 and bool((reward == reward[0]).all()):
        value = float(reward.reshape(-1)[0])
        if value != 0 and "terminated" in rows.keys() and bool(rows["terminated"].any()):
            return  # a reward for every step until it falls
        yield Finding("warning", f"every reward is {value:g}: nothing tells a good action from a bad one")


def _probe(env: Any, space: Space) -> tuple[Tensor, Tensor]:
    """Observations ``[M, d]`` and rewards ``[M]`` of random steps."""
    stream, seen = torch.Generator().manual_seed(0), [reset_env(env, 0)]
    rewards = []
    for number in range(PROBED):
        result = step_env(env, random_action(space, env.num_envs, stream)["action"], number + 1)
        seen.append(result.next_observation)
        rewards.append(result.reward)
    return torch.cat(seen), torch.cat(rewards)


def random_action(space: Space, count: int, stream: torch.Generator) -> dict[str, Tensor]:
    """``action [count, a]`` uniform over the bounds or choices, and its ``behavior_log_prob [count, 1]``.

    Where an entry has no bounds, it is standard normal.
    """
    choices = space.action.choices
    if choices is not None:
        draws = [torch.randint(n, (count,), generator=stream) for n in choices]
        density = -torch.tensor(choices, dtype=torch.float32).log().sum()
        return {"action": torch.stack(draws, -1), "behavior_log_prob": density.expand(count, 1).clone()}
    low, high = bounds(space)
    bounded = torch.isfinite(high - low)
    uniform = torch.rand(count, len(low), generator=stream)
    normal = torch.randn(count, len(low), generator=stream) if not bool(bounded.all()) else uniform
    width = torch.where(bounded, high - low, torch.ones_like(low))
    action = torch.where(bounded, torch.where(bounded, low, torch.zeros_like(low)) + uniform * width, normal)
    action = torch.maximum(torch.minimum(action, high), low)
    each = torch.where(bounded, -width.log(), -0.5 * (normal**2 + torch.log(torch.tensor(2 * torch.pi))))
    return {"action": action, "behavior_log_prob": each.sum(-1, keepdim=True)}


def _scales(rows: TensorDict, layout: Layout, seen: Tensor, rewards: Tensor) -> Iterator[Finding]:
    """Entries of quite another size than in the environment; pixels have one size everywhere."""
    seen, recorded = layout.unpack(seen)[0], layout.unpack(rows["observation"])[0]
    ours, theirs = (x.std(0) if layout.vector else x.new_zeros(0) for x in (seen, recorded))
    for ratio, word in ((theirs / ours.clamp(min=1e-6), "wider"), (ours / theirs.clamp(min=1e-6), "narrower")):
        far = ((ratio > SPREAD) & (ours > 1e-6)).nonzero().flatten().tolist()
        for k in far[:4]:
            low, high = (float(recorded[:, k].aminmax()[i]) for i in (0, 1))
            yield Finding(
                "warning",
                f"observation entry {k} spreads {float(ratio[k]):.0f} times {word} than in random steps of the "
                f"environment: {low:g} to {high:g}, there {float(seen[:, k].min()):g} to "
                f"{float(seen[:, k].max()):g}; other units or another order of the entries?",
            )
    if "reward" in rows.keys():
        most, there = float(rows["reward"].abs().max()), float(rewards.abs().max())
        if there > 0 and most > SPREAD * there:
            yield Finding(
                "warning", f"rewards reach {most:g}, in random steps of the environment {there:g}: another reward?"
            )


def for_machines(found: Sequence[Finding]) -> list[dict[str, str]]:
    """The findings as plain mappings."""
    return [asdict(one) for one in found]
