"""The other policies that a batch is compared with: who they are, how they follow, what they say of the rows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from unified_rl.agents.teacher import load_teacher
from unified_rl.correction import Correction
from unified_rl.correction.lookup import check_keys
from unified_rl.correction.proximal import MovingAverage, Versions, interpolated
from unified_rl.correction.view import ANCHORS
from unified_rl.errors import ConfigError, RecordError
from unified_rl.instantiate import check_type, nearest
from unified_rl.interventions import Wrapper
from unified_rl.objectives.terms import EXPERT_ROWS
from unified_rl.policies.normalizer import MOMENTS
from unified_rl.protocols import (
    RestsAdapters,
    SampledApart,
    Scores,
    ShowsLogits,
    ShowsNormals,
    Trainable,
    UnitStates,
    standardises,
)
from unified_rl.ranges import Count, Name, Positive, Share, shown
from unified_rl.returns.readings import Read
from unified_rl.shard import ALONE, Shard

PROVIDERS = ("snapshot", "average", "interpolated", "versions")
"""Where the proximal policy of a decoupled correction comes from."""
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

    def update(self, policy: Trainable, version: int) -> None:
        """After an update, whose number is ``version``."""

    def state_dict(self) -> dict[str, Any]:
        """What a bit-exact continuation needs beside the configuration."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`."""


class Copied(Provider):
    """The policy as it was at the start of the run, or after every ``every`` updates; 1 is the start of the update.

    Under adapters the copy has adapters of its own, and shares the weights that are not trained. Fresh adapters are
    switched off in it: it is then the base model.
    """

    def __init__(self, policy: Trainable, view: str | None = None, every: int | None = None) -> None:
        older = copy.deepcopy(policy)
        older.requires_grad_(False)
        _same_inputs(older, policy)
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
    makers = [key for key in given if key in ("folder", "sync_every", "ema")]
    if len(makers) > 1:
        raise ConfigError(f"{where} is made by one of folder, sync_every and ema, got {', '.join(makers)}")
    if "every" in given and "ema" not in given:
        raise ConfigError(
            f"{where}.every says how often a moving average moves: set {where}.ema too, or {where}.sync_every alone"
        )
    idle = next((key for key in given if key in OF_FOLDER), None)
    if idle is not None and "folder" not in given:
        raise ConfigError(f"{where}.{idle} would be of no effect: it is of a model that is read from {where}.folder")
    return given


def make_provider(name: str, node: Any, policy: Any) -> Provider:
    """The provider that ``agent.anchors.NAME`` describes.

    Args:
        name: of the anchor; ``self`` is by default the policy as it is, ``old`` as it was at the start of the update.
        node: ``{folder: RUN}``, ``{sync_every: N}``, ``{ema: DECAY}`` (``every: N`` moves it after every N updates) or
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
    if "ema" in given:
        return Averaged(policy, view, given["ema"], given.get("every", 1))
    if name == "self" and not given:
        return Provider(policy, view)
    return Copied(policy, view, given.get("sync_every", 1 if name == "old" else None))


def check_anchors(nodes: Mapping[str, Any], wanted: Mapping[str, str]) -> None:
    """Refuses anchors before there is a policy: settings that make no provider, and names that nobody provides.

    A missing teacher is refused later: a recipe names one, and the user says which.

    Args:
        nodes: ``agent.anchors``.
        wanted: names that something compares with, and the setting that does so.

    Raises:
        ConfigError: names the setting and the nearest name.
    """
    for name, node in nodes.items():
        provider_settings(name, node)
    for name, setting in wanted.items():
        if name not in (*nodes, *BUILT_IN, *RECORDED, "teacher"):
            raise ConfigError(_nobody_provides(name, setting, nodes))


def _nobody_provides(name: str, setting: str, nodes: Mapping[str, Any]) -> str:
    return (
        f"{setting} compares with the policy {shown(name)}, which nobody provides: set "
        f"agent.anchors.{name[:60]}={{folder: RUN}}; {nearest(name, [*nodes, *BUILT_IN, 'teacher'])}"
    )


class Anchors(Mapping[str, Provider]):
    """The other policies by name, and what is computed from them before the first optimiser step.

    Args:
        policy: the policy that is trained.
        correction: says which anchors it needs and how the proximal policy is made.
        wrapper: adds its own keys in the same pass.
        given: providers by name, ``agent.anchors``; see :func:`make_provider`.
        teacher: folder of the teacher, a shorthand for ``given``.
        micro_batch: rows of one forward pass; None takes all.
        log_probs: names whose log-probs are needed beside the correction's, and the setting that needs each.
        distributions: names whose whole distributions are needed, and the setting that needs each.
        proximal: store proximal log-probs although the correction does not ask for them.

    Attributes:
        shard: of the processes that divide the passes among them.

    Raises:
        ConfigError: an anchor is needed and nobody provides it, or the other way round.
    """

    shard: Shard = ALONE

    def __init__(
        self,
        policy: Trainable,
        correction: Correction,
        wrapper: Wrapper,
        given: Mapping[str, Any] | None = None,
        teacher: str | None = None,
        micro_batch: int | None = None,
        log_probs: Mapping[str, str] | None = None,
        distributions: Mapping[str, str] | None = None,
        proximal: bool = False,
    ) -> None:
        self.policy, self.wrapper, self.micro_batch = policy, wrapper, micro_batch
        who = f"correction {correction.name}"
        asked = [name for name in (*ANCHORS, *correction.anchors) if correction.needs(name) or name in wrapper.anchors]
        needs = dict.fromkeys(asked, who) | dict(log_probs or {})
        self.provider = correction.proximal.get("provider", "snapshot")
        self.needs_proximal = "proximal" in needs or proximal
        self.placeholder = self.provider == "interpolated" and not proximal  # set anew at every optimiser step
        self.scored = [name for name in needs if name not in RECORDED]
        nodes = {**({} if teacher is None else {"teacher": {"folder": teacher}}), **(given or {})}
        self.teacher_setting = "agent.teacher" if teacher is not None else "agent.anchors.teacher"
        if teacher is not None and "teacher" in (given or {}):
            raise ConfigError("agent.teacher and agent.anchors.teacher name the same anchor: set one of them")
        wanted = {name: setting for name, setting in needs.items() if name not in RECORDED} | dict(distributions or {})
        self._check(nodes, wanted, correction.name)
        if wrapper.sync_every is not None:
            nodes.setdefault("reference", {"sync_every": wrapper.sync_every})
        self.providers = {name: make_provider(name, nodes.get(name, {}), policy) for name in wanted}
        self.average: MovingAverage[Trainable] | None = None
        if self.provider == "average":
            self.average = MovingAverage(policy, float(correction.proximal.get("decay", 0.9)))
            _same_inputs(self.average.module, policy)
        self.versions: Versions[Trainable] | None = None
        if self.provider == "versions":
            if proximal:
                raise ConfigError(
                    "agent.off_policy_targets=true corrects to the policy at the start of the update, and "
                    f"{who} keeps the log-probs of the versions that sampled in its place: leave one of them out"
                )
            self.versions = Versions(Copied(policy).policy, policy)

    def _check(self, nodes: Mapping[str, Any], wanted: Mapping[str, str], correction: str) -> None:
        for name, setting in wanted.items():
            if name in nodes or name in BUILT_IN:
                continue
            if name in RECORDED:
                raise ConfigError(
                    f"{setting} compares whole distributions, and the record holds log-probs of {name!r} alone: use "
                    "anchor=old, the policy at the start of the update"
                )
            if name == "teacher":
                raise ConfigError(
                    f"{setting} learns from a teacher: set agent.teacher to the folder of a run of this library (or of "
                    "a language model)"
                )
            raise ConfigError(_nobody_provides(name, setting, nodes))
        for name in nodes:
            if name in wanted:
                continue
            if name == "teacher":
                raise ConfigError(
                    f"{self.teacher_setting} is set, but correction {correction} uses no teacher; try correction=erpd"
                )
            raise ConfigError(
                f"agent.anchors.{name} is set, but nothing compares with it (what is compared with: "
                f"{', '.join(wanted) or 'nothing'}): take it out, or give a term or a penalty anchor={name}"
            )

    def __getitem__(self, name: str) -> Provider:
        """The provider of a name that something needs."""
        return self.providers[name]

    def __iter__(self) -> Iterator[str]:
        """Their names."""
        return iter(self.providers)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.providers)

    @property
    def reference(self) -> Trainable | None:
        """The reference policy, if anything needs one."""
        return self.providers["reference"].policy if "reference" in self.providers else None

    def begin(self, version: int) -> None:
        """Before an update of the policy, whose weights are those of ``version``."""
        if self.versions is not None:
            self.versions.store(self.policy, version)

    def annotate(self, record: TensorDict, version: int) -> None:
        """Writes the log-probs ``[B, N]`` of the anchors, and the wrapper's keys, into the record."""
        extra = self._wrapper_keys(record)
        if self.needs_proximal:
            extra["proximal_log_prob"] = self._proximal(record, version, extra.get("proximal_log_prob"))
        else:
            extra.pop("proximal_log_prob", None)
        for name in self.scored:
            extra[f"{name}_log_prob"] = self._scored(record, self.providers[name].log_prob)
        record.update(extra)

    def _each(self, record: TensorDict, look: Callable[[TensorDict], Any]) -> list[Any]:
        """What ``look`` finds in this process's rows, a micro-batch at a time."""
        parts = self.shard.parts(self.shard.own(record), len(record), self.micro_batch)
        for _ in range(self.shard.passes(len(record), self.micro_batch) - len(parts) if self.shard.in_step else 0):
            look(parts[0])  # others have more
        return [look(part) for part in parts]

    def _wrapper_keys(self, record: TensorDict) -> dict[str, Tensor]:
        parts = self._each(record, self.wrapper.annotate)
        whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        return {key: self.shard.gather(found, len(record)) for key, found in whole.items()}

    def _scored(self, record: TensorDict, score: Callable[[TensorDict], Tensor]) -> Tensor:
        found = torch.cat(self._each(record, score))
        return self.shard.gather(found, len(record))

    def _proximal(self, record: TensorDict, version: int, scored: Tensor | None) -> Tensor:
        """Log-probs at the start of the update; of fresh rows of its own the behavior's, without a forward pass.

        By ``versions``, those of the weights that sampled each unit, computed anew.
        """
        if self.versions is not None:
            return self._by_version(self.versions, record, version)
        if self.average is not None:
            return self.chunked(self.average.module, record)
        itself = not (isinstance(self.policy, SampledApart) and self.policy.sampled_apart)
        if not (self.placeholder or (itself and not bool((record["policy_version"] != version).any()))):
            return self.chunked(self.policy, record) if scored is None else scored
        out: Tensor = record["behavior_log_prob"].clone()
        if not self.placeholder and "source" in record.keys():  # what experts wrote has no log-prob of theirs
            rows = EXPERT_ROWS.numbers(record)
            if len(rows):
                out[rows] = self.chunked(self.policy, record[rows]) if scored is None else scored[rows]
        return out

    def _by_version(self, versions: Versions[Trainable], record: TensorDict, version: int) -> Tensor:
        """Each unit's log-prob under the weights that sampled it; of units that no version sampled, the present."""
        units = torch.where(record["policy_version"] < 0, version, record["policy_version"])
        out = torch.zeros_like(record["behavior_log_prob"])
        for number in units[record["mask"]].unique().tolist():
            wanted = (units == number) & record["mask"]
            rows = wanted.any(-1).nonzero()[:, 0]
            policy = self.policy if number == version else self._older(versions, number)
            found = self.chunked(policy, record[rows])
            out[rows] = torch.where(wanted[rows], found, out[rows])
        return out

    def _older(self, versions: Versions[Trainable], number: int) -> Trainable:
        policy = versions.load(number)
        if isinstance(policy, RestsAdapters):
            policy.rest_adapters()
        return policy

    def chunked(self, policy: Scores, record: TensorDict) -> Tensor:
        """Log-probs ``[B, N]`` of a policy without gradient, a micro-batch at a time."""
        return self._scored(record, lambda part: policy.log_prob(part).log_prob.detach())

    def read(self, record: TensorDict, columns: Mapping[str, Read]) -> dict[str, Tensor]:
        """What functions make of every unit's distribution under the present weights, ``[B, N]`` each; no gradient.

        Args:
            record: the rows.
            columns: ``(logits [n, V], token [n]) -> [n]`` by name.
        """
        shown = cast(ShowsLogits, self.policy)  # whoever has columns to read has seen to it

        def reader(logits: Tensor, token: Tensor) -> tuple[Tensor, ...]:
            return (torch.stack([function(logits, token) for function in columns.values()], -1),)

        found = self._scored(record, lambda part: shown.read_logits(part, reader)[0].detach())
        return dict(zip(columns, found.unbind(-1), strict=True))

    def interpolate(self, batch: TensorDictBase, log_prob: Tensor, version: int) -> None:
        """Sets the proximal policy between behavior and current by age, where the correction wants that."""
        if self.provider == "interpolated":
            batch["proximal_log_prob"] = interpolated(
                log_prob, batch["behavior_log_prob"], batch["policy_version"], version
            )

    def models(self) -> list[Any]:
        """The other policies, each once."""
        average = [] if self.average is None else [self.average.module]
        found = {id(x): x for x in (*(p.policy for p in self.providers.values()), *average) if x is not self.policy}
        return list(found.values())

    def update(self, version: int) -> None:
        """After an update, whose number is ``version``: every policy follows where it should."""
        if self.average is not None:
            self.average.update(self.policy)
        for provider in self.providers.values():
            provider.update(self.policy, version)

    def state_dict(self) -> dict[str, Any]:
        """Weights of every policy that is not read again from its folder."""
        average = self.average
        return {
            "anchors": {name: provider.state_dict() for name, provider in self.providers.items()},
            "average": None
            if average is None
            else {"module": dict(average.module.state_dict()), "weight": average.weight},
            "versions": None if self.versions is None else self.versions.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        for name, provider in self.providers.items():
            provider.load_state_dict(state["anchors"][name])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"]["module"])
            self.average.weight = state["average"]["weight"]
        if self.versions is not None:
            self.versions.load_state_dict(state["versions"])


def _in_place(found: Tensor, seen: TensorDictBase, rows: TensorDictBase) -> Tensor:
    """``found [B, N', ...]`` of the units of ``seen`` at the columns that the same units have in the rows."""
    mask, rest = rows["mask"], found.shape[2:]
    wide = mask.reshape(*mask.shape, *(1 for _ in rest))
    return found.new_zeros(*mask.shape, *rest).masked_scatter(wide, found[seen["mask"]])


def _same_inputs(older: Any, policy: Any) -> None:
    """Makes an older version of a policy standardise observations as the policy does: only its weights are older."""
    if standardises(policy):
        older.normalizer = policy.normalizer
