"""What the columns of robot data are called by the libraries that write them, and rows made of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict

from unified_rl.errors import ConfigError, DataError
from unified_rl.instantiate import nearest
from unified_rl.units import Source

Array: TypeAlias = NDArray[Any]
NUMBERS = "biuf"
"""Kinds of NumPy dtypes that are real numbers."""

ALIASES: dict[str, tuple[str, ...]] = {
    "observation": ("observations", "observation", "obs"),
    "action": ("actions", "action", "acts"),
    "reward": ("rewards", "reward", "rews", "next.reward"),
    "next_observation": ("next_observations", "next_observation", "next_obs"),
    "terminated": ("terminals", "terminations", "terminated", "terminal"),
    "truncated": ("timeouts", "truncations", "truncated", "next.truncated"),
    "done": ("dones", "done", "next.done"),
    "start": ("episode_starts", "is_first"),
    "last": ("is_last",),
    "episode": ("episode_ids", "episode_id", "episode_index", "episode", "traj_ids"),
    "split": ("indices",),
    "length": ("episode_lengths", "traj_lengths"),
    "behavior_log_prob": ("behavior_log_prob", "log_probs", "log_prob", "infos/action_log_probs"),
    "success": ("success", "is_success", "infos/success", "infos/is_success", "next.success"),
}
"""What a column is called in the rows, and its names in files: of D4RL, Stable-Baselines3, imitation, Gymnasium's API,
LeRobot; the first that is there counts."""
DONES = ("terminated", "truncated")
JOINED = ("observation", "next_observation", "action")
"""Columns that may be several of a file, side by side."""
MARKS = ("terminated", "truncated", "done", "start", "last")
"""Columns of flags."""
COUNTS = ("episode", "success")
"""Further columns in which a NaN means nothing."""


@dataclass
class Options:
    """How a file is read.

    Attributes:
        names: of columns, by what they are in the rows; only where a file calls them something else. Those of
            :data:`JOINED` may be several.
        observation: the columns or entries that are the observation, joined in this order; None takes the usual ones.
        dones: what ``dones`` mean where no other column tells: ``terminated`` (nothing is gained behind them) or
            ``truncated`` (a time limit).
        mask: of an HDF5 file, the name of a list of its demonstrations.
    """

    names: dict[str, list[str]] = field(default_factory=dict)
    observation: list[str] | None = None
    dones: str = "terminated"
    mask: str | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """From ``observation=[a,b] action=NAME reward=NAME dones=truncated mask=NAME``.

        Raises:
            ConfigError: another key (names the one that was meant), or a value that is none.
        """
        out, named = cls(), [name for name in ALIASES if name != "observation"]
        for key, value in given.items():
            words = [str(one) for one in value] if isinstance(value, list | tuple) else [str(value)]
            if key == "observation":
                out.observation = words
            elif key in named:
                if len(words) != 1 and key not in JOINED:
                    raise ConfigError(f"{key}={words} must be one column; {', '.join(JOINED)} may be several")
                out.names[key] = words
            elif key == "dones":
                if value not in DONES:
                    raise ConfigError(f"dones={value} must be terminated or truncated")
                out.dones = words[0]
            elif key == "mask" and len(words) == 1:
                out.mask = words[0]
            else:
                meant = next((name for name, known in ALIASES.items() if key in known), None)
                hint = f"did you mean {meant!r}?" if meant else nearest(key, ["observation", *named, "dones", "mask"])
                raise ConfigError(f"data import takes no {key}=; {hint}")
        return out


@dataclass
class Raw:
    """Columns of ``N`` steps one behind another, as a file had them.

    Attributes:
        columns: by the names of :data:`ALIASES`; ``observation`` may have one row more an episode, the last one seen.
        notes: what was left out or taken for something, a line each.
    """

    columns: dict[str, Array]
    notes: list[str] = field(default_factory=list)


def picked(where: str, names: Collection[str], read: Callable[[str], Array], options: Options) -> Raw:
    """The columns that matter among those of a file.

    Args:
        where: the file, for errors.
        names: of its columns.
        read: one of them.
        options: names that the user gives.

    Raises:
        DataError: observations or actions are missing, or a named column is.
    """
    columns: dict[str, Array] = {}
    used: set[str] = set()
    for key, known in ALIASES.items():
        wanted = options.names.get(key, list(known))
        if key == "observation" and options.observation is not None:
            wanted = options.observation
        found = [name for name in wanted if name in names]
        named = key in options.names or (key == "observation" and options.observation is not None)
        if named and len(found) < len(wanted):
            lacking = next(name for name in wanted if name not in names)
            raise DataError(f"{where} has no column {lacking!r} for {key}; {nearest(lacking, sorted(names))}")
        if not found and key in ("observation", "action"):
            raise DataError(
                f"{where} holds {_some(sorted(names))}, and none of {', '.join(known)}: say which column is the "
                f"{key} with {key}=NAME"
            )
        if found:
            taken = found if named else found[:1]
            used |= set(taken)
            columns[key] = joined([numbers(where, name, read(name)) for name in taken])
    left = sorted(set(names) - used)
    return Raw(columns, [f"left out: {_some(left)}"] if left else [])


def _some(words: Sequence[str], most: int = 12) -> str:
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more if words else "nothing"


def is_image(values: Array) -> bool:
    """Whether a column holds pictures, whose bytes rows keep in the order of the file."""
    return values.dtype == np.uint8 and values.ndim >= 3


def joined(parts: Sequence[Array]) -> Array:
    """Columns side by side, flat where there are several.

    With images it is what a row of :class:`~unified_rl.observations.Layout` is, ``[N, 1, bytes]``: first the bytes of
    all numbers as float32, then the images'.

    Raises:
        DataError: columns of different lengths, or a number beside images that is not finite.
    """
    if len(parts) == 1:
        return parts[0]
    counts = {len(part) for part in parts}
    if len(counts) > 1:
        raise DataError(f"columns of {' and '.join(map(str, sorted(counts)))} rows cannot be joined to one observation")
    flat = [part.reshape(len(part), -1) for part in parts]
    if not any(map(is_image, parts)):
        return np.concatenate(flat, axis=1)
    vectors = [one.astype(np.float32) for one, part in zip(flat, parts, strict=True) if not is_image(part)]
    wrong = ~np.all([np.isfinite(one).all(1) for one in vectors], axis=0) if vectors else np.zeros(1, bool)
    if wrong.any():
        raise DataError(
            f"a number beside images is not finite in row {int(wrong.argmax())} ({int(wrong.sum())} in all)"
        )
    vector = [np.concatenate(vectors, axis=1).view(np.uint8)] if vectors else []
    images = [one for one, part in zip(flat, parts, strict=True) if is_image(part)]
    return np.concatenate([*vector, *images], axis=1)[:, None]


def numbers(where: str, name: str, values: Array) -> Array:
    """Refuses a column that is not of real numbers.

    Raises:
        DataError: names the column.
    """
    if values.dtype.kind not in NUMBERS:
        raise DataError(f"{where}: column {name!r} holds {values.dtype}, which are no numbers")
    if values.ndim == 0:
        raise DataError(f"{where}: column {name!r} is a single number; a row a step is needed")
    return values


def of_episodes(episodes: Iterable[Mapping[str, Array]], notes: Iterable[str] = ()) -> Raw:
    """Episodes one behind another; observations of one row more than actions give the next observation of every step.

    Raises:
        DataError: there is none, or they have other columns than one another.
    """
    found = [dict(one) for one in episodes]
    if not found:
        raise DataError("the data set holds no episodes")
    for number, one in enumerate(found):
        steps = len(one["action"])
        if len(one["observation"]) == steps + 1:
            one["next_observation"] = one["observation"][1:]
            one["observation"] = one["observation"][:-1]
        one["episode"] = np.full(steps, number)
        if one.keys() != found[0].keys():
            raise DataError(f"episode {number} holds {_some(sorted(one))}, and episode 0 {_some(sorted(found[0]))}")
        for key, values in one.items():
            if values.shape[1:] != found[0][key].shape[1:]:
                ours, first = (list(part.shape[1:]) for part in (values, found[0][key]))
                raise DataError(f"{key} is of shape {ours} in episode {number}, and of shape {first} in episode 0")
    return Raw({key: np.concatenate([one[key] for one in found]) for key in found[0]}, list(notes))


# ---------------------------------------------------------------------------------------------------- rows


def transitions(raw: Raw, where: str, dones: str = "terminated") -> tuple[TensorDict, list[str]]:
    """Rows of a replay from the columns of a file.

    Where the file does not hold them, the next observation of a step is the observation of the next one. The last step
    of an episode that was cut has none, so it is left out where rows have rewards. Behind a step that terminated
    nothing is read, and the step's own observation stands there.

    Args:
        raw: columns; they are used up.
        where: the file, for errors.
        dones: see :class:`Options`.

    Returns:
        ``[N]`` rows, and notes: ``observation [N, d]`` and, where known, ``next_observation`` float32 (images: bytes),
        ``action [N, a]`` float32 or int64, ``reward [N]`` float32, ``behavior_log_prob [N, U]``, ``success`` bool,
        ``terminated`` and ``truncated`` bool, ``episode``, ``step``, ``group``, ``policy_version`` and ``source``
        int64.

    Raises:
        DataError: columns whose lengths do not fit together.
    """
    columns, notes = dict(raw.columns), list(raw.notes)
    lanes = _unlaned(columns)
    _split(columns, where)
    count = len(columns["action"])
    if count == 0:
        raise DataError(f"{where} holds no steps")
    for key, values in columns.items():
        if len(values) != count and not (key == "observation" and len(values) > count):
            raise DataError(f"{where}: {key} has {len(values)} rows, and action {count}")
    _check_columns(columns, where)
    if lanes is None:
        notes += _put_in_order(columns, count, where)
    terminated, truncated, note = _flags(columns, count, dones)
    notes += note
    last, closed, note = _ends(columns, count, terminated | truncated, lanes)
    notes += note
    _take_final(columns, last, where)
    truncated = truncated | (last & closed & ~terminated)
    first = np.roll(last, 1)
    episode = np.cumsum(first) - 1
    step = np.arange(count) - np.flatnonzero(first)[episode]
    keep = np.ones(count, dtype=bool)
    if "next_observation" not in columns and "reward" in columns:
        after = np.roll(columns["observation"], -1, axis=0)
        after[last] = columns["observation"][last]
        columns["next_observation"] = after
        keep = ~last | terminated
        before = np.roll(~keep & truncated, -1) & ~last  # the step before one that goes: now the last of its episode
        truncated = truncated | (before & ~terminated)
        if not keep.all():
            gone = int((~keep).sum())
            notes.append(f"left out {gone} last step(s) of episodes that were cut: their next observation is not there")
    flags = {"terminated": terminated, "truncated": truncated, "episode": episode, "step": step}
    if not keep.any():
        raise DataError(f"{where} holds only episodes of one step that were cut: no step has a next observation")
    if 2 * keep.sum() < count:  # only episodes of one step can be so many
        raise DataError(
            f"{where}: {int((~keep).sum())} of {count} steps are cut off alone, so that their next observations are "
            "not there: are the ends or the numbers of the episodes right?"
        )
    return _tensors(columns, flags, keep), notes


def _check_columns(columns: Mapping[str, Array], where: str) -> None:
    """What each column is looked at for: flags are 0 or 1, and a step has one reward.

    Raises:
        DataError: one that is not so; names its rows.
    """
    for key in (*MARKS, *COUNTS):
        values = columns.get(key)
        if values is None:
            continue
        each = values.reshape(len(values), -1)
        wrong = ~np.isfinite(each).all(1) if key in COUNTS else ~((each == 0) | (each == 1)).all(1)
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise DataError(
                f"{where}: {key} is {each[row].tolist()} in row {row} ({int(wrong.sum())} of {len(values)} are so): "
                f"{'a number' if key in COUNTS else '0 or 1'} is needed"
            )
    if "reward" in columns and columns["reward"].size != len(columns["reward"]):
        raise DataError(
            f"{where}: reward has {columns['reward'][0].size} entries a step; add them up or choose one, for there is "
            "one reward a step"
        )
    after = columns.get("next_observation")
    if after is not None and after[0].size != columns["observation"][0].size:
        raise DataError(
            f"{where}: next_observation has {after[0].size} entries, and observation {columns['observation'][0].size}"
        )


def _put_in_order(columns: dict[str, Array], count: int, where: str) -> list[str]:
    """Sorts steps by episode where the numbers of episodes come back; says so.

    Simulations that were recorded side by side lie so. Where an episode has ended before its number comes back, the
    number means another one, and the order stays.

    Raises:
        DataError: they come back, and no end says which it is.
    """
    if "episode" not in columns:
        return []
    ids = columns["episode"].reshape(count)
    begins = np.append(True, ids[1:] != ids[:-1])
    if int(begins.sum()) == len(np.unique(ids)):
        return []
    flagged = np.zeros(count, dtype=bool)
    for key in ("terminated", "truncated", "done", "last"):
        if key in columns:
            flagged |= _any(columns[key], count)
    order = np.argsort(ids, kind="stable")
    inside = np.append(ids[order][1:] == ids[order][:-1], False)
    if bool((flagged[order] & inside).any()):
        return []
    if not flagged.any() or len(columns["observation"]) != count:
        starts = np.flatnonzero(begins)
        new = np.unique(ids[starts], return_index=True)[1]
        back = int(np.delete(starts, new)[0])
        raise DataError(
            f"{where}: the numbers of episodes come back after others (row {back}), and no ends say whether that is "
            "the same episode: put the steps in order, or number every episode anew"
        )
    for key in columns:
        columns[key] = columns[key][order]
    return [f"the steps of {len(np.unique(ids))} episodes lay between one another, and were put in order"]


def _unlaned(columns: dict[str, Array]) -> Array | None:
    """Columns ``[T, K, ...]`` of K simulations one behind another; the last steps of each, where there were several."""
    observation, action = columns["observation"], columns["action"]
    lead = observation.shape[:2]
    reward = columns.get("reward", columns.get("done", columns.get("terminated")))
    if is_image(observation) and action.ndim < 3:
        return None
    if observation.ndim < 3 or action.shape[:2] != lead or reward is None or reward.shape[:2] != lead:
        return None
    for key, values in columns.items():
        if values.shape[:2] == lead:
            columns[key] = values.swapaxes(0, 1).reshape(-1, *values.shape[2:])
    last = np.zeros(lead[::-1], dtype=bool)
    last[:, -1] = True
    return last.reshape(-1)


def _split(columns: dict[str, Array], where: str) -> None:
    """Episodes' lengths or places of their ends, as ``episode`` ids of the steps."""
    count = len(columns["action"])
    cuts = columns.pop("split", None)
    lengths = columns.pop("length", None)
    if cuts is None and lengths is None:
        return
    ends = np.append(cuts.reshape(-1), count) if cuts is not None else np.cumsum(lengths)  # type: ignore[arg-type]
    ends = ends.astype(np.int64)
    if ends[-1] != count or bool((np.diff(ends, prepend=0) < 0).any()):
        raise DataError(f"{where}: episodes end at step {int(ends[-1])}, and there are {count} actions")
    columns["episode"] = np.searchsorted(ends, np.arange(count), side="right")
    alone = columns.get("terminated")
    if alone is not None and len(alone) == len(ends) != count:  # one flag an episode, as imitation writes them
        flags = np.zeros(count, dtype=bool)
        flags[ends - 1] = alone.astype(bool)
        columns["terminated"] = flags


def _flags(columns: dict[str, Array], count: int, dones: str) -> tuple[Array, Array, list[str]]:
    """``terminated`` and ``truncated [N]``; of ``done`` alone nobody knows which it was."""
    none: Array = np.zeros(count, dtype=bool)
    given = [columns.pop(key, None) for key in ("terminated", "truncated", "done")]
    terminated, truncated, done = (None if one is None else _any(one, count) for one in given)
    if done is not None and terminated is None and truncated is None:
        other = "truncated" if dones == "terminated" else "terminated"
        note = f"dones were taken as {dones} in {int(done.sum())} step(s); dones={other} takes them as {other}"
        notes = [note] if done.any() else []
        return (done, none, notes) if dones == "terminated" else (none, done, notes)
    if done is not None and truncated is not None and terminated is None:
        terminated = done & ~truncated
    elif done is not None and terminated is not None and truncated is None:
        truncated = done & ~terminated
    return none if terminated is None else terminated, none if truncated is None else truncated, []


def _any(values: Array, count: int) -> Array:
    """``[N]`` bool."""
    flags: Array = np.asarray(values.reshape(count, -1).astype(bool).any(axis=1))
    return flags


def _ends(columns: dict[str, Array], count: int, flagged: Array, lanes: Array | None) -> tuple[Array, Array, list[str]]:
    """The last steps of the episodes ``[N]``, whether the episode ended there, and notes."""
    episode, start, mark = (columns.pop(key, None) for key in ("episode", "start", "last"))
    final = np.zeros(count, dtype=bool) if lanes is None else lanes.copy()
    final[-1] = True
    last, notes = np.zeros(count, dtype=bool), list[str]()
    if episode is not None:
        ids = episode.reshape(count)
        last[:-1] = ids[1:] != ids[:-1]
        return last | final, np.ones(count, dtype=bool), notes
    if start is not None:
        last[:-1] = start.reshape(count)[1:].astype(bool)
    if mark is not None:
        last |= mark.reshape(count).astype(bool)
    if start is None and mark is None:
        last |= flagged
        if not bool(flagged.any()) and "next_observation" in columns:
            after, observation = columns["next_observation"], columns["observation"]
            last[:-1] = (after[:-1] != observation[1:count]).reshape(count - 1, -1).any(1)
            notes.append(
                f"no ends are marked: {int(last.sum())} were found where a next observation is not the next step's"
            )
        elif not bool(flagged.any()):
            notes.append("no ends are marked: all steps were taken as one episode that goes on")
    return last | final, last | flagged, notes


def _take_final(columns: dict[str, Array], last: Array, where: str) -> None:
    """Observations of one row more an episode become the next observations of its steps."""
    observation, count = columns["observation"], len(last)
    surplus, episodes = len(observation) - count, int(last.sum())
    if not surplus:
        return
    if surplus != episodes:
        raise DataError(
            f"{where}: observation has {len(observation)} rows, and action {count} in {episodes} episode(s); as many "
            "are needed, or one more an episode"
        )
    at = np.arange(count) + np.cumsum(np.roll(last, 1)) - 1
    columns["observation"], columns["next_observation"] = observation[at], observation[at + 1]


def _tensors(columns: Mapping[str, Array], flags: Mapping[str, Array], keep: Array) -> TensorDict:
    rows = {}
    for key, values in columns.items():
        flat = values[keep].reshape(int(keep.sum()), -1)
        if key in ("observation", "next_observation") and is_image(values):
            rows[key] = torch.from_numpy(np.ascontiguousarray(flat))
        elif key in ("observation", "next_observation", "behavior_log_prob"):
            rows[key] = _float(flat)
        elif key == "reward":
            rows[key] = _float(flat.sum(1))
        elif key == "success":
            rows[key] = torch.from_numpy((flat > 0).any(1))
        else:
            rows[key] = _float(flat) if flat.dtype.kind == "f" else torch.from_numpy(flat.astype(np.int64))
    rows |= {key: torch.from_numpy(np.ascontiguousarray(values[keep])) for key, values in flags.items()}
    rows["group"] = rows["episode"].clone()
    rows["policy_version"] = torch.zeros(int(keep.sum()), dtype=torch.int64)
    rows["source"] = torch.full((int(keep.sum()),), int(Source.OFFLINE))
    return TensorDict(rows, batch_size=[int(keep.sum())])


def _float(values: Array) -> torch.Tensor:
    with np.errstate(over="ignore"):  # what float32 does not hold is an infinity, which every check tells
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
