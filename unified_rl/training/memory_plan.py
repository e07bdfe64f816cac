"""What a run of a language model will take in memory, before its first step: printed, refused, or cut into chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from unified_rl.errors import ConfigError
from unified_rl.machine import available, memory, readable
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.policies.model_memory import Activations, Shape, activations_of, logits, module_bytes
from unified_rl.policies.packed_weights import packed_bytes
from unified_rl.training.evaluation import AT_ONCE

CHUNK = 8e9
"""Bytes of the activations of a micro-batch, or of a cache, below which nothing is cut where nobody says how."""
SHARE = 4
"""And at most ``1 / SHARE`` of the memory; of all memory, so that a run does not depend on its neighbours."""
PIECES = 1.15
"""What allocators keep in pieces between passes of different sizes."""
MOMENTS = {"AdamW": 2, "Adam": 2, "NAdam": 2, "RAdam": 2, "Adamax": 2, "Adadelta": 2, "Adagrad": 1, "RMSprop": 1,
           "Adafactor": 0, "SGD": 0}  # fmt: skip
"""Numbers that an optimiser keeps for every weight; two where it is another's."""


@dataclass(frozen=True)
class Part:
    """One line of a plan.

    Attributes:
        name: what it is.
        size: bytes at the most.
        why: how they come about.
        there: they are allocated already.
    """

    name: str
    size: float
    why: str
    there: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """The estimated peak: what is always there, and the largest of what comes in turn.

    Attributes:
        device: where the model lives.
        held: there from the first update on.
        phases: in turn; only one at a time.
        free: bytes that were free when the plan was made; None where nobody knows.
        advice: settings that make the largest phases smaller.
    """

    device: str
    held: tuple[Part, ...]
    phases: tuple[Part, ...]
    free: int | None
    advice: str

    @property
    def peak(self) -> float:
        """Bytes of model, optimiser and data at the most, without Python and its libraries."""
        return sum(part.size for part in self.held) + max((part.size for part in self.phases), default=0.0)

    @property
    def needed(self) -> float:
        """Bytes that are still to be allocated."""
        return self.peak - sum(part.size for part in self.held if part.there)

    def require(self) -> None:
        """Refuses a run that does not fit.

        Raises:
            ConfigError: more is needed than is free; names the largest parts and the keys to change.
        """
        if self.free is None or self.needed <= self.free:
            return
        phase = max(self.phases, key=lambda part: part.size)
        parts = sorted((*self.held, phase), key=lambda part: -part.size)[:4]
        named = ", ".join(f"{part.name} {readable(part.size)}" for part in parts)
        raise ConfigError(
            f"this run would take about {readable(self.needed)} more memory and {self.device} has "
            f"{readable(self.free)} free (at most {named}): {self.advice}"
        )

    def __str__(self) -> str:
        """A table, one line a part."""
        rows = [(part.name, part.size, part.why) for part in self.held]
        rows += [(f"or {part.name}" if number else part.name, part.size, part.why)
                 for number, part in enumerate(self.phases)]  # fmt: skip
        lines = [f"{name:24s} {readable(size):>10s}   {why}" for name, size, why in rows]
        free = "" if self.free is None else f"   {readable(self.free)} free on {self.device}"
        lines += [f"{'peak, at the most':24s} {readable(self.peak):>10s}   still to come {readable(self.needed)}{free}"]
        return "\n".join(lines)


def budget(device: torch.device) -> float:
    """Bytes that a chunk may take where nobody says how large it is."""
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else memory()
    return min(CHUNK, total / SHARE)


def micro_batch_for(policy: CausalLM, rows: int, length: int, room: float | None = None) -> int | None:
    """Rows of a forward pass whose activations stay within ``room``; None where all of them do.

    Args:
        policy: that is trained.
        rows: of an optimiser batch.
        length: tokens of a row at the most.
        room: bytes; :func:`budget` by default.
    """
    room, found = budget(policy.device) if room is None else room, activations_of(policy)
    return _fitting(rows, lambda n: _update(policy, found, n, length), room)


def generation_batch_for(
    policy: CausalLM, rows: int, length: int, group: int = 1, room: float | None = None, prompt: int | None = None
) -> int | None:
    """Conversations that are sampled together within ``room``, whole groups; None where all of them are.

    Args:
        policy: that samples.
        rows: of a collection.
        length: tokens of a row at the most.
        group: samples of a prompt.
        room: bytes; :func:`budget` by default.
        prompt: tokens that are read at once before anything is sampled, at the most; ``length`` by default.
    """
    room, found = budget(policy.device) if room is None else room, activations_of(policy)
    groups = _fitting(rows // group, lambda n: _generation(policy, found, n * group, length, n, prompt), room)
    return None if groups is None else groups * group


def _fitting(most: int, size: Any, room: float) -> int | None:
    """The largest power of 2 below ``most`` whose size fits, at least 1; None where ``most`` does."""
    if size(most) <= room:
        return None
    count = 1
    while 2 * count < most and size(2 * count) <= room:
        count *= 2
    return count


def _update(policy: CausalLM, found: Activations, rows: int, length: int) -> float:
    return PIECES * (found.training(rows * length) + logits(policy, rows * length, training=True))


def _generation(
    policy: CausalLM, found: Activations, rows: int, length: int, prompts: int, prompt: int | None = None
) -> float:
    """Cache, a copy of one layer of it as it grows, packed weights, and the larger of prefill and draw.

    The prefill reads ``prompts`` prompts alone, and not the room for answers to them.
    """
    read = length if prompt is None else min(prompt, length)
    shape = Shape.of(policy.model, policy.autocast)
    cache = shape.cache(rows, length) * (1 + 1 / shape.layers)
    packed = packed_bytes(policy.model, rows, length, policy.device.type, policy.autocast)
    return packed + PIECES * (cache + found.scoring(prompts * read) + logits(policy, rows, training=False))


def memory_plan(
    policy: Any, agent: Any, rollout: Any, env: Any, evaluated: int, row_size: int = 0
) -> MemoryPlan | None:
    """The plan of a run, or None for a policy that is no language model: those are small.

    Args:
        policy, agent, rollout, env: its parts, as they were built.
        evaluated: conversations of an evaluation that are sampled together.
        row_size: bytes of a stored row.
    """
    if not isinstance(policy, CausalLM):
        return None
    found, length, read = activations_of(policy), env.max_length, prefill_of(env)
    phases = []
    if hasattr(rollout, "group_size"):
        rows = rollout.generation_batch or rollout.prompts * rollout.group_size
        size = _generation(policy, found, rows, length, -(-rows // rollout.group_size), read)
        phases.append(Part("generation", size, f"cache and draws of {rows} rows of {length} tokens"))
    if evaluated:
        size = _generation(policy, found, evaluated, length, evaluated, read)
        phases.append(Part("evaluation", size, f"cache and draws of {evaluated} rows of {length} tokens"))
    rows = _rows_at_once(agent, rollout.rows)
    phases.append(
        Part(
            "update", _update(policy, found, rows, length), f"activations and logits of {rows} rows of {length} tokens"
        )
    )
    held = (
        *_held(policy, agent),
        Part("rows", 3.0 * rollout.rows * row_size, f"{rollout.rows} rows, and in the replay"),
    )
    return MemoryPlan(str(policy.device), held, tuple(phases), available(policy.device), _advice(policy, phases))


def prefill_of(env: Any) -> int:
    """Tokens of a row that a model reads at once: those of a prompt, and of tasks of several turns what came before."""
    longest = env.max_length if env.max_turns > 1 else getattr(env, "max_prompt_length", env.max_length)
    return int(longest)


def _rows_at_once(agent: Any, rows: int) -> int:
    batches = getattr(agent, "batches", None)
    batch = getattr(agent, "batch_size", None) or getattr(batches, "minibatch", None) or rows
    return min(getattr(agent, "micro_batch", None) or batch, batch)


def _held(policy: CausalLM, agent: Any) -> list[Part]:
    optimizer = agent.optimizer
    trained = sum(p.numel() * p.element_size() for p in optimizer.parameters)
    moments = MOMENTS.get(type(optimizer.adam).__name__, 2) + bool(optimizer.adam.defaults.get("momentum"))
    estimates = int(moments * trained)
    baseline, anchors = getattr(agent, "baseline", None), getattr(agent, "anchors", None)
    critic: list[nn.Module] = [] if baseline is None else [baseline.module]
    others: list[Any] = [] if anchors is None else [policy for one in anchors.values() for policy in one.policies]
    average = None if anchors is None else anchors.average
    others += [] if average is None else [average.module]
    versions = None if anchors is None else anchors.versions
    others += [] if versions is None else [versions.module]
    rewarding = getattr(agent, "reward_model", None)
    judge: list[nn.Module] = [] if rewarding is None else [rewarding.module]
    learns = sum(p.numel() * p.element_size() for module in judge for p in module.parameters() if p.requires_grad)
    kept = 0 if versions is None or policy.device.type != "cpu" else (versions.keep + 1) * trained
    parts = [
        Part("weights", module_bytes([policy]), "of the policy", there=True),
        Part("critic", module_bytes(critic, [policy]), "its weights", there=True),
        Part("other policies", module_bytes(others, [policy]), "reference, teachers, averages", there=True),
        Part("reward model", module_bytes(judge, [policy]), "its weights", there=True),
        Part("its training", 3.0 * learns, "gradients and moments of the reward model"),
        Part("earlier weights", kept, "of versions that rows may be of"),
        Part("gradients", trained, f"{trained // 4:,} weights that are trained"),
        Part("optimiser", estimates, f"{type(optimizer.adam).__name__}, {moments} numbers a weight"),
    ]
    return [part for part in parts if part.size]


def _advice(policy: CausalLM, phases: Sequence[Part]) -> str:
    largest = max(phases, key=lambda part: part.size).name
    chunk = "agent.micro_batch" if largest == "update" else "rollout.generation_batch"
    keys = [f"set {chunk} to fewer rows"]
    if largest == "update" and not policy._recomputed:
        keys.append("policy.gradient_checkpointing=true")
    keys += ["shorten env.max_turn_tokens", "or train a smaller model"]
    return ", ".join(keys)


def plan_run(cfg: dict[str, Any], allow: Sequence[str] = ()) -> MemoryPlan | str:
    """The plan of a composed run; its parts are built, and nothing is trained or refused for its size.

    Returns:
        The plan, or a line that says why there is none.

    Raises:
        ConfigError: parts that do not fit together.
    """
    from unified_rl.training.build import Job

    job = Job(cfg, allow)
    job.fits = lambda plan: None
    job.make_trainer(None)  # type: ignore[arg-type]
    return job.memory or f"no plan: policies of {job.env.domain} such as this one are small"


def evaluated_rows(answers: int, at_once: int | None) -> int:
    """Conversations of an evaluation of so many answers that are sampled together."""
    return min(answers, AT_ONCE if at_once is None else at_once)
