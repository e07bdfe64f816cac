"""Answers of experts: the task's own solutions, a file, another language model."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import islice
from typing import Any, Literal

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.configurable import configurable
from unified_rl.errors import CheckpointError, ConfigError, DataError
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.policies.generation import Generation
from unified_rl.protocols import (
    EncodesCompletions,
    Generates,
    KnowsItsEnds,
    LanguageEnv,
    LanguagePolicy,
    MatchesPrompts,
    Solves,
    require_solutions,
)
from unified_rl.ranges import Fraction, Positive, Share, Whole, ranged
from unified_rl.rollout.conversation import Problems
from unified_rl.rollout.epochs import Epochs
from unified_rl.rollout.sources.answers import Answer, Answers
from unified_rl.rollout.sources.base import Joining, Request, earning, require_one_turn
from unified_rl.units import Source

AT_ONCE = 1024
"""Answers that are matched together while a file is gone through."""


@configurable
@ranged()
class Demonstrations(Joining):
    """The environment's own solutions, source :attr:`~unified_rl.units.Source.DEMONSTRATION`.

    Args:
        per_group: of each prompt of the collection; they join its group.
        rows: instead: of problems drawn for them, as a batch of their own.
        style: passed to the task.

    Raises:
        ConfigError: not exactly one of ``per_group`` and ``rows``.
    """

    def __init__(self, per_group: Whole = 0, rows: Whole = 0, style: str | None = None) -> None:
        super().__init__(per_group, rows)
        self.style = style

    def check(self, env: LanguageEnv, policy: LanguagePolicy, setting: str) -> None:
        """Refuses a task without solutions, or of several turns."""
        require_solutions(env, setting, self.style)
        require_one_turn(env, setting)

    def rows(self, request: Request) -> TensorDict | None:
        """Solutions of the collection's problems, or of problems from a stream of their own."""
        solver = request.env
        assert isinstance(solver, Solves)  # seen to in check
        if self.joins:
            problems, groups = self.repeated(request)
            return request.recite(problems, solver.solve(problems, self.style), groups, Source.DEMONSTRATION)
        problems = request.env.problems(self.batch, request.generator, "train")
        return request.recite(problems, solver.solve(problems, self.style), None, Source.DEMONSTRATION)


@configurable
@ranged()
class ExpertFile(Joining):
    """Answers of somebody else by prompt, source :attr:`~unified_rl.units.Source.EXPERT`.

    Args:
        path: JSON lines, CSV, Parquet, or a folder that ``datasets`` wrote. A record has a prompt (``prompt``,
            ``question``, or ``messages`` up to the assistant's last) and what was said (``completion`` word for word,
            ``answer``, or that last message). ``log_probs`` are those of its tokens under whoever said it, with or
            without that of the end of the turn, which is written as 0 where it is missing; without them all are 0, as
            if nothing else could have been said. ``completion_ids`` are its tokens, where they are not to be guessed.
        per_group: answers for each prompt of the collection that the file knows; they join its group.
        rows: instead: records as a batch of their own, each once before any comes again.
        partial: pass over records whose prompt is no training problem of the task (held-out ones, for example); they
            are refused otherwise.
        reward_key: a column of rewards that stand in the place of the environment's, also where the run's reward
            function is read by name (``rewards``); rows that it scores count in the update. Several rewards, which one
            number cannot stand for, are refused.

    Raises:
        ConfigError: not exactly one of ``per_group`` and ``rows``.
        DataError: a file that cannot be read.
    """

    def __init__(
        self,
        path: str,
        per_group: Whole = 0,
        rows: Whole = 0,
        partial: bool = False,
        reward_key: str | None = None,
    ) -> None:
        super().__init__(per_group, rows)
        self.path, self.partial, self.reward_key = path, partial, reward_key
        self.answers = Answers(path, reward_key)

    def check(self, env: LanguageEnv, policy: LanguagePolicy, setting: str) -> None:
        """Finds every record's problem in the task, in one pass over the file; only numbers are kept.

        Raises:
            ConfigError: the task cannot match prompts, a prompt is no training problem, or no answer fits.
            DataError: a record that cannot be read, or log-probs of another tokenizer.
        """
        self._task = _require_matching(env, setting)
        require_one_turn(env, setting)
        self._known: array[int] = array("q")
        self._by_prompt: dict[int, array[int]] = {}
        self._named_otherwise: dict[int, dict[str, Any]] = {}
        count, lost, first = 0, 0, ""
        waiting = iter(self.answers)
        while batch := list(islice(waiting, AT_ONCE)):
            spoken = self._spoken(batch)
            for answer, problem, (ids, _) in zip(batch, self._problems(batch), spoken, strict=True):
                if problem is None:
                    lost, first = lost + 1, first or answer.where
                elif len(ids) <= env.max_turn_tokens:
                    self._known.append(count)
                    self._by_prompt.setdefault(problem["prompt_id"], array("q")).append(count)
                    if problem.get("record") != answer.prompt.strip():
                        self._named_otherwise[count] = problem
                count += 1
        if lost and (lost == count or not self.partial):
            fix = "the file is of another task" if lost == count else f"set {setting}.partial=true"
            raise ConfigError(
                f"{setting}: {lost} of {count} prompts are no training problems of the task, the first in {first}; "
                f"{fix}"
            )
        if not self._known:
            raise ConfigError(f"{setting}: no answer of {self.path} fits env.max_turn_tokens={env.max_turn_tokens}")
        self._epochs = Epochs(len(self._known))

    def _problems(self, answers: Sequence[Answer]) -> list[dict[str, Any] | None]:
        return self._task.find_problems([answer.prompt for answer in answers])

    def _spoken(self, answers: Sequence[Answer]) -> list[tuple[list[int], list[float]]]:
        """Tokens and log-probs of each answer, the end of the turn included."""
        task = self._task
        given = [answer.answer for answer in answers]
        exact = task.encode_completions(given) if isinstance(task, EncodesCompletions) else task.encode_answers(given)
        led = task.encode_answers(given)
        encoded = [one if answer.verbatim else two for answer, one, two in zip(answers, exact, led, strict=True)]
        return [self._measured(answer, ids) for answer, ids in zip(answers, encoded, strict=True)]

    def _measured(self, answer: Answer, encoded: list[int]) -> tuple[list[int], list[float]]:
        ids = encoded
        if answer.ids is not None:
            size = len(self._task.tokenizer)
            if max(answer.ids) >= size:
                raise DataError(f"{answer.where}: token {max(answer.ids)} is beyond the {size} of the tokenizer")
            ends = set(self._task.stop_ids)
            ids = [*answer.ids] if answer.ids[-1] in ends else [*answer.ids, encoded[-1]]
        if answer.log_probs is None:
            return ids, [0.0] * len(ids)
        missing = len(ids) - len(answer.log_probs)
        if missing not in (0, 1):
            raise DataError(
                f"{answer.where}: {len(answer.log_probs)} log-probs, and the task's tokenizer makes {len(ids)} tokens "
                "of the answer, the end of the turn included; give its tokens too, as completion_ids"
            )
        return ids, [*answer.log_probs, *([0.0] * missing)]

    def rows(self, request: Request) -> TensorDict | None:
        """Answers to the collection's prompts, or records in a shuffled order."""
        if not self.joins:
            numbers = [self._known[place] for place in self._epochs.draw(self.batch, request.generator)]
            answers = self.answers.read(numbers)
            found = self._problems(answers)
            known = [self._named_otherwise.get(n, problem) for n, problem in zip(numbers, found, strict=True)]
            return self._recited(request, [p for p in known if p is not None], answers, None)
        problems, wanted, groups = [], [], []
        for problem, group in zip(request.problems, request.groups.tolist(), strict=True):
            for number in self._by_prompt.get(problem["prompt_id"], array("q"))[: self.per_group]:
                problems.append(problem)
                wanted.append(number)
                groups.append(group)
        return self._recited(request, problems, self.answers.read(wanted), torch.tensor(groups, dtype=torch.int64))

    def _recited(
        self, request: Request, problems: Problems, answers: Sequence[Answer], groups: Tensor | None
    ) -> TensorDict | None:
        spoken = self._spoken(answers)
        ids, log_probs = [ids for ids, _ in spoken], [log_probs for _, log_probs in spoken]
        rows = request.recite(problems, ids, groups, Source.EXPERT, log_probs)
        if rows is not None and self.reward_key is not None:
            earning(rows, torch.tensor([answer.reward for answer in answers], dtype=torch.float32), request.env)
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Where the order of a batch's records stands."""
        return {"epochs": self._epochs.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`.

        Raises:
            CheckpointError: the file holds another number of answers than it did.
        """
        if "epochs" not in state:  # of a version that drew with replacement
            return
        if state["epochs"]["size"] != len(self._known):
            raise CheckpointError(
                f"{self.path} holds {len(self._known)} answers that can be used, and held {state['epochs']['size']} "
                "when the run began: put the file back"
            )
        self._epochs = Epochs.restored(state["epochs"], drop_last=False)


@configurable
@ranged()
class Model(Joining):
    """Answers of another language model to the same prompts, source :attr:`~unified_rl.units.Source.EXPERT`.

    Args:
        folder: with ``config.json`` and safetensors; no code from it is run. It must share the policy's tokenizer.
        per_group: of each prompt of the collection; they join its group.
        rows: instead: of problems drawn for them, as a batch of their own.
        temperature, top_k, top_p, min_p, repetition_penalty: of its sampling, as the policy's. Log-probs are written as
            0, as those of every expert: no correction weighs rows by how probable they were to somebody else's policy.
        adapter: folder of a LoRA adapter for ``folder``.
        dtype: of its weights, which nobody trains.
        autocast: run its matrix products in bfloat16.

    Raises:
        ConfigError: not exactly one of ``per_group`` and ``rows``, or no model there.
    """

    def __init__(
        self,
        folder: str,
        per_group: Whole = 0,
        rows: Whole = 0,
        temperature: Positive = 1.0,
        top_k: Whole = 0,
        top_p: Fraction = 1.0,
        min_p: Share = 0.0,
        repetition_penalty: Positive = 1.0,
        adapter: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        autocast: bool = False,
    ) -> None:
        super().__init__(per_group, rows)
        self.folder = folder
        self.options: dict[str, Any] = {
            "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
            "repetition_penalty": repetition_penalty, "adapter": adapter, "dtype": dtype, "autocast": autocast,
        }  # fmt: skip

    def check(self, env: LanguageEnv, policy: LanguagePolicy, setting: str) -> None:
        """Loads the model, and asks for one that knows every token of the policy's.

        Raises:
            ConfigError: no model of a fitting vocabulary.
        """
        self.model = CausalLM(env.tokenizer, env.max_length, path=self.folder, **self.options)
        self.model.to(policy.device).requires_grad_(False)
        known, needed = self.model.model.get_input_embeddings().weight.shape[0], len(env.tokenizer)
        if known < needed:
            raise ConfigError(f"{setting}.folder={self.folder} knows {known} tokens, the task's tokenizer {needed}")

    def rows(self, request: Request) -> TensorDict:
        """Sampled answers."""
        if self.joins:
            problems, groups = self.repeated(request)
            rows = request.judge(self.speaker(request), problems, groups, Source.EXPERT)
        else:
            problems = request.env.problems(self.batch, request.generator, "train")
            rows = request.judge(self.speaker(request), problems, None, Source.EXPERT)
        return rows.set("behavior_log_prob", torch.zeros_like(rows["behavior_log_prob"]))

    def speaker(self, request: Request) -> Generates:
        """The model with a stream on its own device, drawn from the source's."""
        seed = int(torch.randint(2**62, (1,), generator=request.generator))
        return _Speaker(self.model, torch.Generator(device=self.model.device).manual_seed(seed))


class _Speaker:
    """A model that samples from its own stream, whatever stream the caller has."""

    def __init__(self, model: Generates, generator: torch.Generator) -> None:
        self.model, self.generator = model, generator
        self.end_ids: tuple[int, ...] = model.end_ids if isinstance(model, KnowsItsEnds) else ()

    def generate(self, prompts: Any, *, max_new_tokens: int, **options: Any) -> Generation:
        """As of the model."""
        options["generator"] = self.generator
        found: Generation = self.model.generate(prompts, max_new_tokens=max_new_tokens, **options)
        return found


def _require_matching(env: object, setting: str) -> MatchesPrompts:
    """The task, which can find its problems by their prompts.

    Raises:
        ConfigError: it cannot.
    """
    if not isinstance(env, MatchesPrompts):
        raise ConfigError(
            f"{setting} matches prompts to problems, and {type(env).__name__} has no find_problems(); use env=jsonl"
        )
    return env
