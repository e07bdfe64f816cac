"""A loss as a list of named terms over one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from unified_rl.correction import Correction
from unified_rl.interventions.base import Wrapper
from unified_rl.objectives.coefficients import Observed, coefficient
from unified_rl.objectives.forward import Forward, Reader, Score
from unified_rl.objectives.metrics import Mean, Metrics, Sums
from unified_rl.objectives.rows import Rows
from unified_rl.policies.sampling import HasSampling
from unified_rl.protocols import Scores, Trainable
from unified_rl.ranges import enforce
from unified_rl.returns.groups import lone
from unified_rl.returns.readings import Read
from unified_rl.shard import ALONE, Shard


class Other(Protocol):
    """Another policy that the rows are compared with."""

    @property
    def policy(self) -> Scores:
        """The policy itself."""
        ...

    @property
    def view(self) -> str | None:
        """The rows as it sees them, where that is not as they are."""
        ...

    def states(self, rows: TensorDictBase, view: str | None = None) -> Tensor:
        """From which :meth:`logits` makes each unit's distribution, ``[B, N, h]``."""
        ...

    def logits(self, states: Tensor) -> Tensor:
        """Logits ``[n, V]`` of states ``[n, h]``."""
        ...

    def normals(self, rows: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of each unit's Normal, ``[B, N, D]``."""
        ...


class Others(Protocol):
    """The other policies by name, and the proximal one."""

    provider: str
    """How the proximal policy is made."""

    def __getitem__(self, name: str, /) -> Other:
        """One of them."""
        ...

    def annotate(self, record: TensorDict, version: int) -> None:
        """Writes their log-probs ``[B, N]`` into the record."""
        ...

    def chunked(self, policy: Scores, record: TensorDict) -> Tensor:
        """Log-probs ``[B, N]`` of a policy without gradient, a micro-batch at a time."""
        ...

    def read(self, record: TensorDict, columns: Mapping[str, Read]) -> dict[str, Tensor]:
        """Columns ``[B, N]`` from every unit's distribution under the present weights, without gradient."""
        ...

    def states(self, record: TensorDict) -> Tensor:
        """Last hidden states ``[B, N, h]`` of every unit under the present weights, without gradient."""
        ...

    def interpolate(self, batch: TensorDictBase, log_prob: Tensor, version: int) -> None:
        """Sets the proximal policy between behavior and current, where the correction wants that."""
        ...


class Critic(Protocol):
    """A learnt baseline."""

    def values(self, record: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Values with gradient and the mask of those that count, ``[B, T]`` or ``[B, N]``."""
        ...


class Parts(NamedTuple):
    """What an agent gives to its terms.

    Attributes:
        policy: the policy that is trained.
        correction: its correction.
        wrapper: its intervention.
        anchors: the other policies by name.
        baseline: a critic; None without one.
    """

    policy: Trainable
    correction: Correction
    wrapper: Wrapper
    anchors: Others
    baseline: Critic | None = None


class Term:
    """One summand of a loss.

    ``prepare`` looks at the whole optimiser batch, without gradient, and owns the denominator; ``loss`` is of a
    micro-batch; those of all micro-batches add up, so every split gives the same gradient. A class of the user's own
    takes ``name`` and keyword arguments, and gets the agent's parts in :meth:`attach`.

    Args:
        name: in the configuration, ``agent.objectives.NAME``.
        rows: which rows it reads, see :class:`~unified_rl.objectives.rows.Rows`.
        coefficient_: a number, a schedule or a controller, see :mod:`unified_rl.objectives.coefficients`.

    Attributes:
        readers: what it takes from the shared pass beside log-probs.
        anchors: names of the policies whose log-probs ``{name}_log_prob [B, N]`` rows must hold.
        distributions: names of the policies whose whole distributions it compares with.
        whole_groups: optimiser batches must hold whole groups.
        whole_rows: they must hold whole rows, not single steps.
        scores: its loss has a gradient through the log-probs of the shared pass, or through its supervised loss.
        couples_rows: what it makes of a row may depend on other rows, beside its denominator.
        reports: names of metrics of :meth:`loss` that others may rely on.
        followed: names of metrics that controllers elsewhere in the run follow.
        columns: names of further entries ``[B]`` that rows must hold.
    """

    readers: tuple[Reader, ...] = ()
    anchors: frozenset[str] = frozenset()
    distributions: frozenset[str] = frozenset()
    whole_groups = False
    whole_rows = False
    couples_rows = True
    scores = True
    reports: frozenset[str] = frozenset()
    followed: frozenset[str] = frozenset()
    columns: frozenset[str] = frozenset()

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        enforce(cls, "agent.objectives")

    def __init__(self, name: str, rows: Any = None, coefficient_: float | Mapping[str, Any] = 1.0) -> None:
        self.name, self.where = name, f"agent.objectives.{name}"
        self.rows = Rows.of(rows, f"{self.where}.rows")
        self.schedule = coefficient(coefficient_, f"{self.where}.coefficient")
        self.coefficient = 1.0

    @property
    def metric_names(self) -> frozenset[str]:
        """Every metric that it may report."""
        return self.reports

    def attach(self, parts: Parts) -> None:
        """Gives the term what it works on.

        Raises:
            ConfigError: the policy cannot give what the term needs; names what works.
        """

    def start(self, progress: float, update: int) -> None:
        """At the start of an update: sets the coefficient."""
        self.coefficient = self.schedule(progress, update)

    @property
    def active(self) -> bool:
        """Whether it costs anything in this update: at 0 only a term of which a controller follows a metric does."""
        own = self.schedule.metrics if isinstance(self.schedule, Observed) else ()
        return self.coefficient != 0.0 or not self.reports.isdisjoint({*own, *self.followed})

    def check_columns(self, columns: Collection[str]) -> None:
        """Looks at the names of what rows will hold, before any are collected.

        Raises:
            ConfigError: one that it reads is missing; says what to set.
        """

    def check_groups(self, record: TensorDictBase) -> None:
        """Looks at who shares a group in an update, before any row is left out and before gates open.

        Raises:
            ConfigError: as :meth:`refuse_lone`, where every row is alone in its group.
        """
        if lone(record["group"]):
            self.refuse_lone()

    def refuse_lone(self) -> None:
        """Where every row is, or will be, alone in its group.

        Raises:
            ConfigError: it compares rows of one group; says what to set.
        """

    def check(self, record: TensorDictBase) -> None:
        """Looks at the rows of an update that are left, before its first optimiser step.

        Raises:
            ConfigError: rows that it cannot learn from; says what to set.
        """

    def prepare(self, batch: TensorDict, scored: Scored) -> TensorDictBase | None:
        """Statistics of batch size ``[B]`` that slice with the batch, or None where the term needs none."""
        return None

    def loss(self, forward: Forward, rows: TensorDict, stats: Any) -> tuple[Tensor, Metrics]:
        """The micro-batch's share of the term, a scalar, and metrics (see :class:`~.metrics.Sums` for their kinds)."""
        raise NotImplementedError

    def summary(self) -> Metrics:
        """Further metrics of the update, scalars."""
        return {}

    def finish(self, metrics: Metrics, reported: frozenset[str] = frozenset()) -> None:
        """At the end of an update: a controlled coefficient sees its metrics."""
        if isinstance(self.schedule, Observed):
            self.schedule.observe(metrics, reported)

    def state_dict(self) -> dict[str, Any]:
        """What a bit-exact continuation needs: a controller's state."""
        return self.schedule.state_dict() if isinstance(self.schedule, Observed) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        if isinstance(self.schedule, Observed):
            self.schedule.load_state_dict(state)


class Scored:
    """The present log-probs of a whole optimiser batch ``[B, N]``, without gradient, computed if anything asks.

    Attributes:
        free: the batch is not split, so they come from the pass that the loss needs anyway.
    """

    def __init__(self, score: Callable[[], Tensor], free: bool) -> None:
        self._score, self.free = score, free

    @cached_property
    def log_prob(self) -> Tensor:
        """``[B, N]`` float32."""
        return self._score()


class Records(Protocol):
    """Joins the gradients of single rows."""

    def start(self) -> None:
        """Before the first row of a batch."""
        ...

    def take(self) -> None:
        """Takes in the gradients of one row, and drops them from the weights."""
        ...

    def finish(self) -> Metrics:
        """Writes the joined gradients; returns metrics."""
        ...


class Objective:
    """The terms of one loss.

    Args:
        policy: the policy that is trained.
        terms: by name, in order.
        score: ``rows -> (log_prob, penalty)``, the policy's own or a wrapper's.
        generator: for supervised losses that draw noise.

    Attributes:
        shard: of the processes that divide the passes among them; see :meth:`share`.
        records: takes the gradient of each row by itself; None takes that of the batch.
    """

    shard: Shard = ALONE
    records: Records | None = None

    def __init__(
        self, policy: Trainable, terms: Mapping[str, Term], score: Score, generator: torch.Generator | None = None
    ) -> None:
        self.policy, self.terms, self.score, self.generator = policy, dict(terms), score, generator
        self._shared: torch.Generator | None = None
        self.sampling = policy.sampling if isinstance(policy, HasSampling) else None
        self.reported = frozenset().union(*(term.reports for term in self.terms.values()))
        self.start(0.0, 0)

    def start(self, progress: float, update: int) -> None:
        """At the start of an update: coefficients, and which terms count."""
        if self._shared is not None:
            self.generator = self.shard.stream(self._shared, update)
        for term in self.terms.values():
            term.start(progress, update)
        self.active = {name: term for name, term in self.terms.items() if term.active}
        self.readers = [reader for term in self.active.values() for reader in term.readers]
        self.scored = any(term.scores for term in self.active.values())

    def follow(self, metrics: Collection[str]) -> None:
        """Terms that report what controllers follow, their own or others', are watched where they count for nothing."""
        own = (s.metrics for t in self.terms.values() if isinstance(s := t.schedule, Observed))
        followed = frozenset(metrics).union(*own)
        for term in self.terms.values():
            term.followed = followed

    def share(self, shard: Shard) -> None:
        """Passes its share of the rows alone; noise of supervised losses is then drawn from a stream of the process's.

        The stream that it was given also orders minibatches, and must go on alike everywhere.
        """
        self.shard, self._shared = shard, self.generator

    @property
    def whole_groups(self) -> bool:
        """Whether optimiser batches must hold whole groups in this update."""
        return any(term.whole_groups for term in self.active.values())

    def check_groups(self, record: TensorDictBase) -> None:
        """Every term that counts looks for groups."""
        for term in self.active.values():
            term.check_groups(record)

    def check(self, record: TensorDictBase) -> None:
        """Every term that counts looks at the rows of the update."""
        for term in self.active.values():
            term.check(record)

    def backward(self, batch: TensorDict, micro_batch: int | None) -> tuple[Tensor, Metrics]:
        """Accumulates the gradient of the whole optimiser batch; of several processes, that of its share of the rows.

        Args:
            batch: annotated rows.
            micro_batch: rows of one forward pass; None takes all.

        Returns:
            The loss, detached, and one scalar a metric; neither depends on ``micro_batch`` or on the processes.
        """
        if self.records is not None:
            return self._each(batch, self.records)
        if self.shard.world > 1:
            return self._divided(batch, micro_batch)
        size, sums = min(micro_batch or len(batch), len(batch)), Sums()
        if size == len(batch):
            forward = self._forward(batch)
            stats = self.prepare(batch, Scored(lambda: forward.log_prob.detach(), free=True))
            whole = self._micro_batch(forward, batch, stats, sums)
            return torch.as_tensor(whole, device=batch["mask"].device), sums.values()
        total = torch.zeros((), device=batch["mask"].device)
        stats = self.prepare(batch, Scored(lambda: self._scored(batch.split(size)), free=False))
        split = {name: None if s is None else s.split(size) for name, s in stats.items()}
        for index, rows in enumerate(batch.split(size)):
            here = {name: None if s is None else s[index] for name, s in split.items()}
            total = total + self._micro_batch(self._forward(rows), rows, here, sums)
        return total, sums.values()

    def _each(self, batch: TensorDict, records: Records) -> tuple[Tensor, Metrics]:
        """As :meth:`backward`, where every row is a batch of its own; losses and metrics are means over rows."""
        total, sums = torch.zeros((), device=batch["mask"].device), Sums()
        records.start()
        for row in batch.split(1):
            own = Sums()
            forward = self._forward(row)
            stats = self.prepare(row, Scored(lambda forward=forward: forward.log_prob.detach(), free=True))  # type: ignore[misc]
            total = total + self._micro_batch(forward, row, stats, own)
            records.take()
            sums.add({key: Mean(value, 1) for key, value in own.values().items()})
        return total / len(batch), {**sums.values(), **records.finish()}

    def _divided(self, batch: TensorDict, micro_batch: int | None) -> tuple[Tensor, Metrics]:
        """As :meth:`backward`: terms prepare on the whole batch everywhere, and each process passes its own rows."""
        shard, device, sums = self.shard, batch["mask"].device, Sums()
        mine, own = shard.mine(len(batch)), shard.own(batch)
        rows, passes = mine.stop - mine.start, shard.passes(len(batch), micro_batch)
        once = self._forward(own) if (rows or shard.in_step) and passes == 1 else None

        def score() -> Tensor:
            parts = shard.parts(own, len(batch), micro_batch)
            found = self._scored(parts, passes) if once is None else once.log_prob.detach()
            return shard.gather(found, len(batch))

        stats = self.prepare(batch, Scored(score, free=False))
        cut: Callable[[Any], Any] = lambda x: shard.parts(x[mine], len(batch), micro_batch)  # noqa: E731
        parts = cut(batch) if rows else []  # only now: terms may have written into the batch
        split = {name: None if s is None or not rows else cut(s) for name, s in stats.items()}
        total = torch.zeros((), device=device)
        for index, part in enumerate(parts):
            here = {name: None if s is None else s[index] for name, s in split.items()}
            total = total + self._micro_batch(once or self._forward(part), part, here, sums)
        for _ in range(passes - len(parts) if shard.in_step else 0):
            here = {name: None if s is None else shard.own(s)[:1] for name, s in stats.items()}
            others = shard.own(batch)[:1]
            self._micro_batch(once or self._forward(others), others, here, Sums(), counts=False)
        sums.add({"loss/total": total})
        sums.over(shard, device)
        found = sums.values()
        return found.pop("loss/total"), found

    def prepare(self, batch: TensorDict, scored: Scored) -> dict[str, Any]:
        """Every term's statistics of the whole optimiser batch."""
        with torch.no_grad():
            return {name: term.prepare(batch, scored) for name, term in self.active.items()}

    def _forward(self, rows: TensorDict) -> Forward:
        return Forward(self.policy, rows, self.score, self.readers, self.generator, self.sampling, self.scored)

    @torch.no_grad()
    def _scored(self, parts: Sequence[TensorDict], passes: int = 0) -> Tensor:
        """Log-probs of the rows of all parts; a process that has fewer than it makes passes repeats the first."""
        for _ in range(passes - len(parts) if self.shard.in_step else 0):
            self.score(parts[0])
        return torch.cat([self.score(rows)[0] for rows in parts])

    def _micro_batch(
        self, forward: Forward, rows: TensorDict, stats: dict[str, Any], sums: Sums, counts: bool = True
    ) -> Tensor | float:
        """Accumulates the gradient; rows that do not count are another's, and passed to keep step with it."""
        loss: Any = None
        for name, term in self.active.items():
            value, found = term.loss(forward, rows, stats[name])
            sums.add(found)
            if term.coefficient == 0.0:  # it is only watched
                continue
            value = value if term.coefficient == 1.0 else term.coefficient * value
            loss = value if loss is None else loss + value
        if loss is None:
            return 0.0
        (loss if counts else 0.0 * loss).backward()
        out: Tensor | float = loss.detach()
        return out

    def summary(self) -> Metrics:
        """Further metrics of the update that the terms know."""
        return {key: value for term in self.active.values() for key, value in term.summary().items()}

    def finish(self, metrics: Metrics) -> None:
        """At the end of an update."""
        for term in self.terms.values():
            term.finish(metrics, self.reported)

    def state_dict(self) -> dict[str, Any]:
        """The state of every term that has one."""
        return {name: state for name, term in self.terms.items() if (state := term.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        for name, own in state.items():
            self.terms[name].load_state_dict(own)
