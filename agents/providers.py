"""Other policies that a batch is compared with: who they are, how each follows, what it says of the rows."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from annotated_types import MinLen
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from unified_rl.agents.teacher import load_teacher
from unified_rl.correction.lookup import check_keys
from unified_rl.errors import ConfigError, RecordError
from unified_rl.instantiate import check_type
from unified_rl.policies.normalizer import MOMENTS
from unified_rl.protocols import (
    RestsAdapters,
    ShowsLogits,
    ShowsNormals,
    Trainable,
    UnitStates,
    standardises,
)
from unified_rl.ranges import Count, Name, NonNegative, Positive, Share

RECORDED = ("behavior", "proximal", "proxy")
"""Anchors that no entry of ``agent.anchors`` makes: the sampler, the start of the update, a wrapper."""
BUILT_IN = ("reference", "self", "old")
"""Anchors that are made where something asks for them; every other one must be given."""
OF_FOLDER: dict[str, Any] = {
    "temperature": Positive,
    "dtype": Literal["float32", "bfloat16", "float16"],
    "autocast": bool,
    "adapter": Name,
}
"""Settings of a language model that is read from a folder, named as the policy's own."""
SETTINGS: dict[str, Any] = {
    "folders": Annotated[list[Name], MinLen(1)], "by": Name, "weights": Annotated[list[NonNegative], MinLen(1)],
    "folder": Name, "sync_every": Count, "ema": Share, "every": Count, "view": Name, **OF_FOLDER
}  # fmt: skip


class Provider:
    """Another policy, as it is; here the one that is trained, under its present weights.

    Args:
        policy: the policy.
        view: of the rows, as it sees them: ``privileged`` reads ``privileged_tokens`` and ``privileged_mask``.
        foreign: it standardises observations by moments of its own.
    """

    def __init__(self, policy: Trainable, view: str | None = None, foreign: bool = False) -> None:
        self.policy, self.view, self.foreign = policy, view, foreign
        self._hidden = policy if isinstance(policy, UnitStates) else None
        self._shown = policy if isinstance(policy, ShowsLogits) else None
        self._normal = policy if isinstance(policy, ShowsNormals) else None

    def log_prob(self, rows: TensorDictBase) -> Tensor:
        """Log-probs ``[B, N]`` of the rows' units, without gradient."""
        seen = self._seen(rows, self.view)
        found = self.policy.log_prob(seen).log_prob.detach()
        return found if self.view is None else _in_place(found, seen, rows)

    def states(self, rows: TensorDictBase, view: str | None = None) -> Tensor:
        """From which :meth:`logits` makes each unit's distribution, ``[B, N, d]``.

        Last hidden states where the policy gives them, else its logits themselves (of small action spaces).
        """
        view = view or self.view
        seen = self._seen(rows, view)
        if self._hidden is not None:
            found = self._hidden.unit_states(seen)
        else:
            assert self._shown is not None  # the term that asks has seen to it
            (found,) = self._shown.read_logits(seen, lambda logits, token: (logits,))
        return found if view is None else _in_place(found, seen, rows)

    def logits(self, states: Tensor) -> Tensor:
        """Transformed logits ``[n, V]`` of states ``[n, d]``."""
        return states if self._hidden is None else self._hidden.logits_of(states)

    def normals(self, rows: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of each unit's Normal, ``[B, N, D]``."""
        assert self._normal is not None  # likewise
        return self._normal.normals(self._seen(rows, None))

    def _seen(self, rows: TensorDictBase, view: str | None) -> TensorDictBase:
        if view is None:
            return rows.exclude(MOMENTS) if self.foreign and MOMENTS in rows.keys() else rows
        if f"{view}_tokens" not in rows.keys():
            raise RecordError(
                f"an anchor looks at the rows with view={view}, and they hold no {view}_tokens: set rollout.{view} to "
                "the style of demonstrations that goes into its prompt, or view=null"
            )
        return TensorDict({"tokens": rows[f"{view}_tokens"], "mask": rows[f"{view}_mask"]}, rows.batch_size)

    @property
    def policies(self) -> Sequence[Trainable]:
        """All that it asks."""
        return [self.policy]

    def check_columns(self, columns: Collection[str], where: str) -> None:
        """Looks at the names of what rows will hold, before any are collected.

        Raises:
            ConfigError: one that it reads is missing.
        """

    def update(self, policy: Trainable, version: int) -> None:
        """After an update, whose number is ``version``."""

    def state_dict(self) -> dict[str, Any]:
        """What a bit-exact continuation needs beside the configuration."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`."""


class Routed(Provider):
    """Several teachers, of which a column of the rows says whose a row is. MOPD, 2601.02780.

    Args:
        policies: the teachers, which may differ in size.
        by: column ``[B]`` of numbers from 0 on.
        view: see :class:`Provider`.
    """

    def __init__(self, policies: Sequence[Trainable], by: str, view: str | None = None) -> None:
        super().__init__(policies[0], view, foreign=True)
        self.by, self.teachers = by, [Provider(policy, view, foreign=True) for policy in policies]
        self._widths: dict[int, int] = {}

    @property
    def policies(self) -> Sequence[Trainable]:
        """All teachers."""
        return [teacher.policy for teacher in self.teachers]

    def check_columns(self, columns: Collection[str], where: str) -> None:
        """Looks for the column.

        Raises:
            ConfigError: rows have none.
        """
        if self.by not in columns:
            raise ConfigError(
                f"{where}.by={self.by} reads the column {self.by}, which the rows lack: set rollout.columns.{self.by} "
                "to a number of the task's that tells the teacher of a row"
            )

    def _routes(self, route: Tensor) -> list[tuple[int, Tensor]]:
        """Every teacher with work, and the entries of ``route [n]`` that are its own."""
        beyond = (route < 0) | (route >= len(self.teachers))
        if bool(beyond.any()):
            raise RecordError(
                f"a row's {self.by} is {int(route[beyond][0])}, and there are teachers 0 to {len(self.teachers) - 1}: "
                "give agent.anchors one folder for each number"
            )
        found = [(number, (route == number).nonzero().squeeze(-1)) for number in range(len(self.teachers))]
        return [(number, at) for number, at in found if len(at)]

    def log_prob(self, rows: TensorDictBase) -> Tensor:
        """Each row's by its teacher, ``[B, N]``."""
        out = torch.zeros(rows["mask"].shape, device=rows["mask"].device)
        for number, at in self._routes(rows[self.by]):
            out[at] = self.teachers[number].log_prob(rows[at])
        return out

    def states(self, rows: TensorDictBase, view: str | None = None) -> Tensor:
        """Each row's by its teacher, padded to the widest, and behind them the teacher's number, ``[B, N, d + 1]``."""
        parts = [(n, at, self.teachers[n].states(rows[at], view)) for n, at in self._routes(rows[self.by])]
        self._widths |= {number: found.shape[-1] for number, _, found in parts}
        first = parts[0][2]
        out = first.new_zeros(*rows["mask"].shape, max(self._widths.values()) + 1)
        for number, at, found in parts:
            out[at, :, : found.shape[-1]] = found.to(out.dtype)
            out[at, :, -1] = number
        return out

    def logits(self, states: Tensor) -> Tensor:
        """Transformed logits ``[n, V]`` of :meth:`states`."""
        if not len(states):  # of no unit: as any teacher that was asked
            number = next(iter(self._widths))
            return self.teachers[number].logits(states[:, : self._widths[number]])
        parts = self._routes(states[:, -1].round().long())
        found = [self.teachers[number].logits(states[at, : self._widths[number]]) for number, at in parts]
        order = torch.cat([at for _, at in parts]).argsort()
        return torch.cat(found)[order]

    def normals(self, rows: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Each row's by its teacher, ``[B, N, D]``."""
        parts = [(at, self.teachers[number].normals(rows[at])) for number, at in self._routes(rows[self.by])]
        order = torch.cat([at for at, _ in parts]).argsort()
        mean, log_std = (torch.cat([found[i] for _, found in parts])[order] for i in (0, 1))
        return mean, log_std


@torch.no_grad()
def merged(policies: Sequence[Trainable], weights: Sequence[float] | None, where: str) -> Trainable:
    """The first policy with the weighted mean of the weights of all; its buffers stay.

    Raises:
        ConfigError: they differ in shape, or not one weight of each, or none above 0.
    """
    given = list(weights or [1.0] * len(policies))
    if len(given) != len(policies) or not sum(given) > 0:
        raise ConfigError(f"{where}.weights needs one number for each of {len(policies)} folders, not all 0: {given}")
    shapes = [[(name, p.shape) for name, p in policy.named_parameters()] for policy in policies]
    if any(other != shapes[0] for other in shapes):
        raise ConfigError(f"{where}.folders are merged, and differ in their weights: set {where}.by to route rows")
    for mine, *others in zip(*(policy.parameters() for policy in policies), strict=True):
        mean = sum(w * x.double() for w, x in zip(given, (mine, *others), strict=True)) / sum(given)
        mine.copy_(mean)
    return policies[0]


class Copied(Provider):
    """The policy as it was at the start of the run, or after every ``every`` updates; 1 is the start of the update.

    Under adapters the copy has adapters of its own, and shares the weights that are not trained. Fresh adapters are
    switched off in it: it is then the base model.
    """

    def __init__(self, policy: Trainable, view: str | None = None, every: int | None = None) -> None:
        older = copy.deepcopy(policy)
        older.requires_grad_(False)
        same_inputs(older, policy)
        super().__init__(older, view)
        self.every = every
        self._rest()

    def _rest(self) -> None:
        if isinstance(self.policy, RestsAdapters):
            self.policy.rest_adapters()

    def update(self, policy: Trainable, version: int) -> None:
        """Takes over the policy's weights where it is time to."""
        if self.every is not None and version % self.every == 0:
            self.policy.load_state_dict(policy.state_dict())
            self._rest()

    def state_dict(self) -> dict[str, Any]:
        """The weights."""
        return {"policy": dict(self.policy.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores them."""
        self.policy.load_state_dict(state["policy"])
        self._rest()


class Averaged(Copied):
    """A moving average of the policy's weights, moved after every ``each`` updates; buffers are copied."""

    def __init__(self, policy: Trainable, view: str | None, decay: float, each: int = 1) -> None:
        super().__init__(policy, view)
        self.decay, self.each = decay, each

    @torch.no_grad()
    def update(self, policy: Trainable, version: int) -> None:
        """Takes in the newest weights where it is time to."""
        if version % self.each:
            return
        for mine, newest in zip(self.policy.parameters(), policy.parameters(), strict=True):
            if mine is not newest:  # a weight that nobody trains is shared
                mine.lerp_(newest, 1.0 - self.decay)
        self._rest()
        for kept, other in zip(self.policy.buffers(), policy.buffers(), strict=True):
            kept.copy_(other)


def provider_settings(name: str, node: Any) -> dict[str, Any]:
    """What ``agent.anchors.NAME`` says, checked without a policy.

    Raises:
        ConfigError: a name that is made elsewhere, an unknown or a wrong setting, or two that exclude each other.
    """
    where = f"agent.anchors.{name}"
    if name in (*RECORDED, "none", "mixture"):
        instead = "correction.proximal" if name == "proximal" else f"agent.anchors.{BUILT_IN[0]}"
        raise ConfigError(f"{where}: the record holds this anchor already; set {instead}, or choose another name")
    if not isinstance(node, Mapping):
        raise ConfigError(f"{where} is {node!r}; it must be a mapping, such as {{folder: RUN}} or {{ema: 0.999}}")
    check_keys(node, SETTINGS, where)
    given = {
        key: check_type(value, SETTINGS[key], f"{where}.{key}") for key, value in node.items() if value is not None
    }
    makers = [key for key in given if key in ("folder", "folders", "sync_every", "ema")]
    if len(makers) > 1:
        raise ConfigError(f"{where} is made by one of folder, sync_every, ema and folders, got {', '.join(makers)}")
    if "every" in given and "ema" not in given:
        raise ConfigError(
            f"{where}.every says how often a moving average moves: set {where}.ema too, or {where}.sync_every alone"
        )
    if "by" in given and "weights" in given:
        raise ConfigError(f"{where}.weights merge teachers into one, and {where}.by keeps them apart: set one of them")
    several = next((key for key in ("by", "weights") if key in given), None)
    if several is not None and "folders" not in given:
        raise ConfigError(f"{where}.{several} is of several teachers: set {where}.folders")
    idle = next((key for key in given if key in OF_FOLDER), None)
    if idle is not None and not {"folder", "folders"} & given.keys():
        raise ConfigError(f"{where}.{idle} would be of no effect: it is of a model that is read from {where}.folder")
    return given


def make_provider(name: str, node: Any, policy: Any) -> Provider:
    """The provider that ``agent.anchors.NAME`` describes.

    Args:
        name: of the anchor; ``self`` is by default the policy as it is, ``old`` as it was at the start of the update.
        node: ``{folder: RUN}``, ``{sync_every: N}``, ``{ema: DECAY}`` (``every: N`` moves it after every N updates),
            ``{folders: [RUN, RUN], by: COLUMN}`` (a column of the rows says which) or ``{folders: [RUN, RUN], weights:
            [W, W]}`` (one policy with the mean of their weights), or
            ``{}`` (as at the start of the run), each with an optional ``view``; a language model's folder also with
            ``temperature``, ``dtype``, ``autocast`` and ``adapter``.
        policy: the policy that is trained.

    Raises:
        ConfigError: see :func:`provider_settings`.
        CheckpointError: the folder holds no policy.
    """
    given = provider_settings(name, node)
    view = given.pop("view", None)
    if "folder" in given:
        options = {key: value for key, value in given.items() if key in OF_FOLDER}
        made = load_teacher(given["folder"], policy, f"agent.anchors.{name}.folder", options)
        return Provider(made, view, foreign=True)
    if "folders" in given:
        return _of_folders(name, given, policy, view)
    if "ema" in given:
        return Averaged(policy, view, given["ema"], given.get("every", 1))
    if name == "self" and not given:
        return Provider(policy, view)
    return Copied(policy, view, given.get("sync_every", 1 if name == "old" else None))


def _of_folders(name: str, given: Mapping[str, Any], policy: Any, view: str | None) -> Provider:
    where = f"agent.anchors.{name}"
    options = {key: value for key, value in given.items() if key in OF_FOLDER}
    folders = given["folders"]
    made = [load_teacher(folder, policy, f"{where}.folders[{n}]", options) for n, folder in enumerate(folders)]
    if "by" in given:
        return Routed(made, given["by"], view)
    return Provider(merged(made, given.get("weights"), where), view, foreign=True)


def _in_place(found: Tensor, seen: TensorDictBase, rows: TensorDictBase) -> Tensor:
    """``found [B, N', ...]`` of the units of ``seen`` at the columns that the same units have in the rows."""
    mask, rest = rows["mask"], found.shape[2:]
    wide = mask.reshape(*mask.shape, *(1 for _ in rest))
    return found.new_zeros(*mask.shape, *rest).masked_scatter(wide, found[seen["mask"]])


def same_inputs(older: Any, policy: Any) -> None:
    """Makes an older version of a policy standardise observations as the policy does: only its weights are older."""
    if standardises(policy):
        older.normalizer = policy.normalizer
