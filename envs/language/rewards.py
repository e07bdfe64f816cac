"""Rewards of a run as plain functions: ``f(prompts, completions, **columns) -> list[float | None]``, as TRL calls them.

``reward=[my_rewards:accuracy, {name: overlong, cache: 64}]`` names them; :class:`Rewards` calls them for the
conversations that end, once for all of them, and adds their values up. Imports no torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from unified_rl.configurable import configurable
from unified_rl.envs.language.reward_calls import RESERVED, TASK, Failure, Function, Spec, Values, run_here
from unified_rl.envs.language.reward_calls import Task as Call
from unified_rl.envs.language.reward_pool import RewardPool
from unified_rl.errors import ConfigError, RolloutError
from unified_rl.instantiate import allowed, check_type, nearest
from unified_rl.ranges import Float32, Name, Positive, Whole, ranged

GIVEN = ("prompts", "completions", "completion_ids", "prompt_ids", "truncated", "max_completion_length")
"""What every function can take beside the columns of the records."""
READERS = ("exact", "numeric", "math")
"""Shipped rewards that look for the answer in the text, to compare it with ``reference``."""
MAX_HUNG = 3
"""Rows whose calls may hang before the rest of a failed call is given up too."""


@runtime_checkable
class Budgeted(Protocol):
    """A reward whose settings must go with the budget of sampled tokens."""

    def check_budget(self, budget: int) -> None:
        """Raises ConfigError where they do not."""
        ...


class Ended(NamedTuple):
    """The conversations of one call, ``n`` of them.

    Attributes:
        prompts: texts, or lists of messages.
        completions: the texts (or messages) without special tokens, and with them where asked for.
        completion_ids: sampled token ids of each, the stop token included.
        prompt_ids: token ids of each prompt.
        truncated: whether its budget of tokens or turns ran out.
        max_completion_length: the tokens that each could have had, over all its turns.
        columns: further columns of the records.
        task: the task's own reward of each.
        places: a number of its prompt, by which rows of a group are kept together.
        texts: the prompts, for messages.
    """

    prompts: list[Any]
    completions: dict[bool, list[Any]]
    completion_ids: list[list[int]]
    prompt_ids: list[list[int]]
    truncated: list[bool]
    max_completion_length: list[int]
    columns: dict[str, list[Any]]
    task: list[float]
    places: list[int]
    texts: list[str]


class Scored(NamedTuple):
    """What the functions say of ``n`` conversations.

    Attributes:
        values: of each function, in order, ``n`` numbers or None.
        total: the weighted sum over those that are not None; 0 where all are.
        scored: whether a function scored the row, and none failed on it.
        failed: whether a function failed on it.
    """

    values: list[Values]
    total: list[float]
    scored: list[bool]
    failed: list[bool]


@configurable
@ranged("reward")
class Rewards:
    """The reward functions of a run.

    Args:
        functions: names of shipped rewards, ``module:function`` of one's own, ``task`` (the task's own verifier), or
            mappings with ``name``, the settings of the function and, of any reward, ``weight``, ``label`` (its name in
            metrics) and ``skip_special_tokens``.
        weights: of each in the sum; 1 by default.
        workers: processes that call the functions; 0 calls them in this one. The rows of a call are then split between
            the processes, those of a prompt kept together.
        seconds: wall time of one call. In this process, a call that a signal cannot interrupt (one long computation
            in C) is waited for; a worker is ended.
        retries: further tries of a call that raised, hung or returned no list of numbers.
        errors: what then becomes of the rows on which a function fails alone: ``stop`` ends the run with the function,
            the row and its prompt in the message, ``skip`` leaves the row out of the update.

    Attributes:
        labels: of the functions, in order: :data:`~.reward_calls.TASK` for the task's own.
        weights: of each.

    Raises:
        ConfigError: a function that cannot be found or is not allowed, an unknown setting, weights of another number.
    """

    def __init__(
        self,
        functions: Sequence[Any],
        weights: Sequence[Float32] | None = None,
        workers: Whole = 0,
        seconds: Positive = 600.0,
        retries: Whole = 1,
        errors: Literal["stop", "skip"] = "stop",
    ) -> None:
        allow = allowed()
        self.specs = specs_of(functions, weights)
        self.labels, self.weights = [s.label for s in self.specs], [s.weight for s in self.specs]
        self.seconds, self.retries, self.errors, self.allow = seconds, retries, errors, list(allow)
        self.functions = [None if s.path == TASK else Function(s, allow) for s in self.specs]
        self._called = [at for at, function in enumerate(self.functions) if function is not None]
        self._workers = workers
        self._pool: RewardPool | None = None
        if workers:
            self._check_remote()

    @property
    def uses_task(self) -> bool:
        """Whether the task's own verifier is one of the rewards."""
        return TASK in [spec.path for spec in self.specs]

    @property
    def task_weight(self) -> float:
        """The weight of the task's own verifier; 0 where it is none of the rewards."""
        return sum(spec.weight for spec in self.specs if spec.path == TASK)

    @property
    def special(self) -> set[bool]:
        """Which completions the functions want: without special tokens (True), with them (False)."""
        return {self.specs[at].skip_special_tokens for at in self._called}

    def column_names(self, known: Mapping[str, Any]) -> list[str]:
        """Those of the ``known`` columns that some function takes."""
        functions = [self.functions[at] for at in self._called]
        return [n for n in known if any(f is not None and (f.open or n in f.takes) for f in functions)]

    def check(self, columns: Sequence[str], budget: int, mark: str = "") -> None:
        """Looks at a task before the first step.

        Args:
            columns: of its records.
            budget: of sampled tokens.
            mark: what its answers stand behind, where that is a mark of its own.

        Raises:
            ConfigError: a function needs what the records do not have, or does not go with the budget or the mark.
        """
        for at in self._called:
            function = self.functions[at]
            assert function is not None
            missing = [name for name in function.required if name not in (*GIVEN, *columns)]
            if missing:
                raise ConfigError(
                    f"{self.specs[at].where} ({self.specs[at].path}) takes {missing[0]!r}, which is no column of this "
                    f"task's records; {nearest(missing[0], [*GIVEN, *columns])}"
                )
            if mark and self.specs[at].path in READERS:
                raise ConfigError(
                    f"{self.specs[at].where} ({self.specs[at].path}) finds answers as people mark them, and this "
                    f"task's stand behind {mark!r}, so all would be wrong; use reward=task, the task's own verifier"
                )
            if isinstance(function.object, Budgeted):
                function.object.check_budget(budget)

    def _check_remote(self) -> None:
        for at in self._called:
            if self.specs[at].target is not None:
                target = self.specs[at].target
                module, name = target.__module__, target.__qualname__  # type: ignore[union-attr]
                if module == "__main__" or not all(part.isidentifier() for part in name.split(".")):
                    raise ConfigError(
                        f"{self.specs[at].where} is {module}.{name}, which a worker process cannot import; put it into "
                        "a module of its own, or set reward_workers=0"
                    )
                self.specs[at] = self.specs[at]._replace(path=f"{module}:{name}", target=None)
                self.allow.append(module)

    # ------------------------------------------------------------------ scoring

    def score(self, ended: Ended) -> Scored:
        """The values of every function for conversations that have ended.

        Raises:
            RolloutError: a function fails on a row and ``errors`` is ``stop``; names function, row and prompt.
        """
        rows = len(ended.task)
        values: list[Values] = [[None] * rows for _ in self.specs]
        failed = [False] * rows
        for at, function in enumerate(self.functions):
            if function is None:
                values[at] = list(ended.task)
        calls = [(at, part) for at in self._called for part in self._parts(ended)] if rows else []
        for (at, part), outcome in zip(calls, self._tried(ended, calls), strict=True):
            found: Mapping[int, float | None]
            if isinstance(outcome, Failure):
                found = self._one_by_one(ended, at, part, outcome)
            else:
                found = dict(zip(part, outcome, strict=True))
            for row in part:
                values[at][row] = found.get(row)
                failed[row] |= row not in found
        total, scored = [], []
        for row in range(rows):
            said = [(w, v[row]) for w, v in zip(self.weights, values, strict=True) if v[row] is not None]
            scored.append(bool(said) and not failed[row])
            total.append(sum(w * v for w, v in said if v is not None) if scored[-1] else 0.0)
        return Scored(values, total, scored, failed)

    def _parts(self, ended: Ended) -> list[list[int]]:
        """The rows of each call: all, or in workers an even share of them each, cut between prompts."""
        rows = range(len(ended.places))
        if not self._workers:
            return [list(rows)]
        groups = [list(group) for _, group in itertools.groupby(rows, lambda row: ended.places[row])]
        out: list[list[int]] = []
        share = -(-len(rows) // self._workers)
        for group in groups:
            if out and len(out[-1]) + len(group) <= share:
                out[-1] += group
            else:
                out.append(group)
        return out

    def _tried(self, ended: Ended, calls: Sequence[tuple[int, list[int]]]) -> list[Values | Failure]:
        """The outcome of each call, failed ones tried again."""
        out = self._run(ended, calls)
        for _ in range(self.retries):
            again = [at for at, outcome in enumerate(out) if isinstance(outcome, Failure)]
            if not again:
                break
            for at, outcome in zip(again, self._run(ended, [calls[at] for at in again]), strict=True):
                out[at] = outcome
        return out

    def _run(self, ended: Ended, calls: Sequence[tuple[int, list[int]]]) -> list[Values | Failure]:
        tasks = []
        for at, part in calls:
            function = self.functions[at]
            assert function is not None
            offered = {**ended.columns, "completions": ended.completions[self.specs[at].skip_special_tokens]}
            offered |= {name: getattr(ended, name) for name in GIVEN if name != "completions"}
            taken = function.arguments(offered)
            tasks.append(Call(at, {name: [column[row] for row in part] for name, column in taken.items()}, len(part)))
        if self._workers:
            return self._remote(tasks)
        return run_here([f or _NOBODY for f in self.functions], tasks, self.seconds)

    def _remote(self, tasks: Sequence[Call]) -> list[Values | Failure]:
        places = {at: number for number, at in enumerate(self._called)}
        if self._pool is None:
            self._pool = RewardPool([self.specs[at] for at in self._called], self.allow, self._workers)
        return self._pool.run([task._replace(function=places[task.function]) for task in tasks], self.seconds)

    def _one_by_one(self, ended: Ended, at: int, part: Sequence[int], whole: Failure) -> dict[int, float | None]:
        """The values of the rows of a failed call, each asked for alone; those on which it fails are missing.

        Raises:
            RolloutError: the first of these, unless ``errors`` is ``skip``.
        """
        found: dict[int, float | None] = {}
        hung, bad = 0, False
        for row in part:
            if hung >= MAX_HUNG:
                break
            outcome = whole if len(part) == 1 else self._run(ended, [(at, [row])])[0]
            if not isinstance(outcome, Failure):
                found[row] = outcome[0]
                continue
            bad, hung = True, hung + outcome.hung
            if self.errors == "stop":
                raise RolloutError(self._place(at, outcome, f"row {row} (prompt {ended.texts[row]!r:.80})"))
        if not bad and self.errors == "stop":
            raise RolloutError(self._place(at, whole, f"{len(part)} rows together, and on none of them alone"))
        return found

    def _place(self, at: int, failure: Failure, rows: str) -> str:
        spec = self.specs[at]
        tries = f", in {self.retries + 1} tries" if self.retries else ""
        if failure.hung:
            fix = "raise reward_seconds if it may take so long, or leave such rows out with reward_errors=skip"
        else:
            fix = "mend it, or leave such rows out with reward_errors=skip"
        return f"{spec.where} ({spec.path}) {failure.reason} on {rows}{tries}; {fix}"

    def close(self) -> None:
        """Ends the worker processes, and what the functions keep open."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        for function in self.functions:
            if function is not None:
                function.close()


class _Nobody:
    """Stands in the place of the task's own verifier, which is not called here."""

    is_async = False


_NOBODY: Any = _Nobody()


def specs_of(functions: Sequence[Any], weights: Sequence[float] | None = None) -> list[Spec]:
    """The entries of ``reward=[...]``.

    Raises:
        ConfigError: an entry that is none, or weights of another number; under its full name.
    """
    if not functions:
        raise ConfigError("reward is an empty list; name at least one, or leave it out for the task's own verifier")
    if weights is not None and len(weights) != len(functions):
        raise ConfigError(f"reward_weights has {len(weights)} entries, but reward has {len(functions)}; give one each")
    one = len(functions) == 1
    specs = [_spec(entry, "reward" if one else f"reward[{at}]") for at, entry in enumerate(functions)]
    if weights is not None:
        for spec, entry in zip(specs, functions, strict=True):
            if isinstance(entry, Mapping) and "weight" in entry:
                raise ConfigError(f"{spec.where}.weight and reward_weights say the same twice; give one of them")
        specs = [spec._replace(weight=float(weight)) for spec, weight in zip(specs, weights, strict=True)]
    labels = [spec.label for spec in specs]
    twice = {label for label in labels if labels.count(label) > 1}
    out = [spec._replace(label=spec.path.replace(":", ".")) if spec.label in twice else spec for spec in specs]
    labels = [spec.label for spec in out]
    for spec in out:
        if labels.count(spec.label) > 1:
            raise ConfigError(f"{spec.where} and another reward are both called {spec.label!r}; give them a label each")
    return out


def _spec(entry: Any, where: str) -> Spec:
    node = dict(entry) if isinstance(entry, Mapping) else {"name": entry}
    name = node.get("name")
    target = name if callable(name) else None
    if target is not None:
        name = f"{getattr(target, '__module__', '')}:{getattr(target, '__qualname__', type(target).__name__)}"
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where} is {entry!r:.80}; it must be a reward's name, module:function, or {{name: ...}}")
    label = check_type(node.get("label", name.replace(":", ".").rpartition(".")[2]), Name, f"{where}.label")
    weight = check_type(node.get("weight", 1.0), Float32, f"{where}.weight")
    skip = check_type(node.get("skip_special_tokens", True), bool, f"{where}.skip_special_tokens")
    options = {key: value for key, value in node.items() if key not in RESERVED}
    if name == TASK and (options or "skip_special_tokens" in node):
        key = next(iter(options), "skip_special_tokens")
        raise ConfigError(f"{where}: the task's own verifier has no setting {key!r}; its settings are those of env")
    return Spec(label, name, weight, skip, options, where, target)


def plain_value(value: Any) -> Any:
    """A column's value as JSON holds it: numbers as int or float, tensors and tuples as lists; other things as text."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, Mapping):
        return {str(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(item) for item in value]
    to_list: Callable[[], Any] | None = getattr(value, "tolist", None)
    return str(value) if to_list is None else to_list()
