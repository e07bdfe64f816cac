"""The other policies of an agent by name, and what is computed from them before the first optimiser step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from unified_rl.agents.providers import (
    BUILT_IN,
    RECORDED,
    Copied,
    Provider,
    make_provider,
    provider_settings,
    same_inputs,
)
from unified_rl.correction import Correction
from unified_rl.correction.proximal import MovingAverage, Versions, interpolated
from unified_rl.correction.view import ANCHORS
from unified_rl.errors import ConfigError
from unified_rl.instantiate import nearest
from unified_rl.interventions import Wrapper
from unified_rl.objectives.terms import EXPERT_ROWS
from unified_rl.protocols import (
    RestsAdapters,
    SampledApart,
    Scores,
    ShowsLogits,
    Trainable,
    UnitStates,
)
from unified_rl.ranges import shown
from unified_rl.returns.readings import Read
from unified_rl.shard import ALONE, Shard

PROVIDERS = ("snapshot", "average", "interpolated", "versions")
"""Where the proximal policy of a decoupled correction comes from."""


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
        given: providers by name, ``agent.anchors``; see
            :func:`~unified_rl.agents.providers.make_provider`.
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
            same_inputs(self.average.module, policy)
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

    def check_columns(self, columns: Collection[str]) -> None:
        """Looks at the names of what rows will hold, before any are collected.

        Raises:
            ConfigError: one that says whose teacher a row has is missing.
        """
        for name, provider in self.providers.items():
            provider.check_columns(columns, f"agent.anchors.{name}")

    def check_shard(self, shard: Shard) -> None:
        """Refuses what processes that pass every policy in step cannot ask.

        Raises:
            ConfigError: several teachers, of which each is asked of some rows alone.
        """
        routed = [name for name, provider in self.providers.items() if len(provider.policies) > 1]
        if shard.in_step and routed:
            raise ConfigError(
                f"agent.anchors.{routed[0]}.by asks each teacher of its own rows alone, and learner=fsdp passes every "
                "policy in step: use learner=data_parallel or single, or merge the teachers (leave by out)"
            )

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

    def states(self, record: TensorDict) -> Tensor:
        """Last hidden states ``[B, N, h]`` of every unit under the present weights, a micro-batch at a time."""
        shown = cast(UnitStates, self.policy)  # likewise
        return self._scored(record, lambda part: shown.unit_states(part).detach())

    def interpolate(self, batch: TensorDictBase, log_prob: Tensor, version: int) -> None:
        """Sets the proximal policy between behavior and current by age, where the correction wants that."""
        if self.provider == "interpolated":
            batch["proximal_log_prob"] = interpolated(
                log_prob, batch["behavior_log_prob"], batch["policy_version"], version
            )

    def models(self) -> list[Any]:
        """The other policies, each once."""
        average = [] if self.average is None else [self.average.module]
        others = (policy for provider in self.providers.values() for policy in provider.policies)
        found = {id(x): x for x in (*others, *average) if x is not self.policy}
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
