"""Answers of experts: the task's own solutions, a file, another language model."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict

from unified_rl.configurable import configurable
from unified_rl.errors import ConfigError
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.policies.generation import Generation
from unified_rl.protocols import Generates, LanguageEnv, LanguagePolicy, MatchesPrompts, Solves, require_solutions
from unified_rl.ranges import Positive, Whole, ranged
from unified_rl.rollout.sources.answers import read_answers
from unified_rl.rollout.sources.base import Joining, Request, require_one_turn
from unified_rl.units import Source


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
    """Answers by prompt from a JSON-lines file, source :attr:`~unified_rl.units.Source.EXPERT`.

    Args:
        path: the file; each line an object with ``prompt`` and ``answer``, or with ``messages``, whose last two are of
            roles ``user`` and ``assistant``.
        per_group: answers for each prompt of the collection that the file knows; they join its group.
        rows: instead: lines drawn at random, as a batch of their own.
        partial: pass over lines whose prompt is no training problem of the task (held-out ones, for example); they
            are refused otherwise.

    Raises:
        ConfigError: not exactly one of ``per_group`` and ``rows``.
        DataError: a line that cannot be read.
    """

    def __init__(self, path: str, per_group: Whole = 0, rows: Whole = 0, partial: bool = False) -> None:
        super().__init__(per_group, rows)
        self.path, self.partial = path, partial
        self.lines = read_answers(path)

    def check(self, env: LanguageEnv, policy: LanguagePolicy, setting: str) -> None:
        """Finds every line's problem in the task.

        Raises:
            ConfigError: the task cannot match prompts, a prompt is no training problem, or no answer fits.
        """
        task = _require_matching(env, setting)
        require_one_turn(env, setting)
        found = task.find_problems([line.prompt for line in self.lines])
        lost = [line for line, problem in zip(self.lines, found, strict=True) if problem is None]
        if lost and (len(lost) == len(self.lines) or not self.partial):
            fix = "the file is of another task" if len(lost) == len(self.lines) else f"set {setting}.partial=true"
            raise ConfigError(
                f"{setting}: {len(lost)} of {len(self.lines)} prompts are no training problems of the task, the first "
                f"in {lost[0].where}; {fix}"
            )
        answers = task.encode_answers([line.answer for line in self.lines])
        known = [(problem, ids) for problem, ids in zip(found, answers, strict=True) if problem is not None]
        self._known = [pair for pair in known if len(pair[1]) <= env.max_turn_tokens]
        if not self._known:
            raise ConfigError(f"{setting}: no answer of {self.path} fits env.max_turn_tokens={env.max_turn_tokens}")
        self._by_prompt: dict[int, list[list[int]]] = {}
        for problem, ids in self._known:
            self._by_prompt.setdefault(problem["prompt_id"], []).append(ids)

    def rows(self, request: Request) -> TensorDict | None:
        """Answers to the collection's prompts, or lines drawn at random."""
        if not self.joins:
            chosen = torch.randint(len(self._known), (self.batch,), generator=request.generator).tolist()
            pairs = [self._known[row] for row in chosen]
            return request.recite([p for p, _ in pairs], [ids for _, ids in pairs], None, Source.EXPERT)
        problems, answers, groups = [], [], []
        for problem, group in zip(request.problems, request.groups.tolist(), strict=True):
            for ids in self._by_prompt.get(problem["prompt_id"], [])[: self.per_group]:
                problems.append(problem)
                answers.append(ids)
                groups.append(group)
        return request.recite(problems, answers, torch.tensor(groups, dtype=torch.int64), Source.EXPERT)


@configurable
@ranged()
class Model(Joining):
    """Answers of another language model to the same prompts, source :attr:`~unified_rl.units.Source.EXPERT`.

    Args:
        folder: with ``config.json`` and safetensors; no code from it is run. It must share the policy's tokenizer.
        per_group: of each prompt of the collection; they join its group.
        rows: instead: of problems drawn for them, as a batch of their own.
        temperature: of its sampling. Log-probs are written as 0, as those of every expert: no correction weighs rows by
            how probable they were to somebody else's policy.

    Raises:
        ConfigError: not exactly one of ``per_group`` and ``rows``, or no model there.
    """

    def __init__(self, folder: str, per_group: Whole = 0, rows: Whole = 0, temperature: Positive = 1.0) -> None:
        super().__init__(per_group, rows)
        self.folder, self.temperature = folder, temperature

    def check(self, env: LanguageEnv, policy: LanguagePolicy, setting: str) -> None:
        """Loads the model, and asks for one that knows every token of the policy's.

        Raises:
            ConfigError: no model of a fitting vocabulary.
        """
        self.model = CausalLM(env.tokenizer, env.max_length, path=self.folder, temperature=self.temperature)
        self.model.to(policy.device).requires_grad_(False)
        known, needed = self.model.model.get_input_embeddings().weight.shape[0], len(env.tokenizer)
        if known < needed:
            raise ConfigError(f"{setting}.folder={self.folder} knows {known} tokens, the task's tokenizer {needed}")

    def rows(self, request: Request) -> TensorDict:
        """Sampled answers."""
        if self.joins:
            problems, groups = self.repeated(request)
            rows = request.judge(self._speaker(request), problems, groups, Source.EXPERT)
        else:
            problems = request.env.problems(self.batch, request.generator, "train")
            rows = request.judge(self._speaker(request), problems, None, Source.EXPERT)
        return rows.set("behavior_log_prob", torch.zeros_like(rows["behavior_log_prob"]))

    def _speaker(self, request: Request) -> Generates:
        """The model with a stream on its own device, drawn from the source's."""
        seed = int(torch.randint(2**62, (1,), generator=request.generator))
        return _Speaker(self.model, torch.Generator(device=self.model.device).manual_seed(seed))


class _Speaker:
    """A model that samples from its own stream, whatever stream the caller has."""

    def __init__(self, model: Generates, generator: torch.Generator) -> None:
        self.model, self.generator = model, generator

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
