"""Language rollouts: a batch of prompts, several samples each, as many turns as the task has."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.configurable import configurable
from unified_rl.errors import NonFiniteError
from unified_rl.policies.choosers import CORRECTED, FOREIGN
from unified_rl.protocols import CountsEpochs, EngineSampler, Generates, HasSampler, LanguageEnv, LanguagePolicy
from unified_rl.ranges import Count, UnitInterval, Whole, ranged
from unified_rl.rollout.beginnings import Asked, Beginning, Start
from unified_rl.rollout.context import Context
from unified_rl.rollout.conversation import Conversations, Problems, Told, converse, joined, ordered, summary
from unified_rl.rollout.curriculum import Curriculum
from unified_rl.rollout.parts import Parts
from unified_rl.rollout.rows import GREEDY, MOST_LIKELY, RowBuilder
from unified_rl.rollout.sources.base import ChoosesPrompts, Recited, Request, RowSource, check_rows
from unified_rl.rollout.speakers import AddsRows, Speaker, Spoken
from unified_rl.rollout.whispered import whisper
from unified_rl.units import COUNTED, NOBODY, Source


def fixed_stream(name: str) -> torch.Generator:
    """A stream that depends on its name alone, for rollouts made outside a run, which has a seed."""
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def epoch_of(env: object, stream: torch.Generator) -> dict[str, float]:
    """``rollout/epoch``, of a task that goes through its problems in epochs."""
    passed = env.epoch(stream) if isinstance(env, CountsEpochs) else None
    return {} if passed is None else {"rollout/epoch": passed}


@configurable
@ranged("rollout")
class LanguageRollout:
    """Samples ``prompts * group_size`` conversations with the current policy, and joins the rows of its sources.

    Args:
        env: a :class:`~unified_rl.protocols.LanguageEnv`.
        policy: a language model, such as :class:`unified_rl.policies.causal_lm.CausalLM`.
        gamma: discount of a turn, written to the rows.
        generator: the stream that tokens are drawn from.
        problem_generator: the stream that problems are drawn from.
        prompts: problems of one call of :meth:`collect`.
        group_size: samples of each problem; they share a ``group``.
        staleness: as in :class:`~unified_rl.rollout.control.ControlRollout`.
        sources: rows of others by name, see :mod:`unified_rl.rollout.sources`; budgets do not count them, and null
            takes one of a recipe's out.
        beginning: what answers begin with, see :mod:`unified_rl.rollout.beginnings`.
        context: what is sampled again, and after which tokens, see :mod:`unified_rl.rollout.context`; budgets do not
            count what it samples.
        speaker: who speaks in the policy's place, see :mod:`unified_rl.rollout.speakers`.
        curriculum: which prompts are drawn, see :mod:`unified_rl.rollout.curriculum`.
        columns: further entries of the record, made of the environment's own numbers: a name gives ``[B]`` int64, a
            list of names ``[B, K]`` float32 (several rewards, strata).
        privileged: style of the solution that a teacher sees behind the prompt (``privileged_tokens``, ``_mask``); true
            is the task's own.
        generation_batch: conversations that are sampled together, in whole groups. It bounds the memory of the
            key-value cache, in evaluation too. Null samples all of a collection at once; a run chooses fewer where
            their cache would take more than a quarter of the memory, or 8 GB.
        device: where the policy samples.
        streams: ``name -> stream``, one for each source (``sources/NAME``), one for the context, one for
            the curriculum and one for the beginnings.

    Attributes:
        rows: rows of one collection at most.
        length: None; a row is a whole conversation.
        share: which part of the problems of a collection this one samples, and of how many: workers that share out
            each batch draw the same problems, and each takes its own.
        shows: ``(conversations, episode of the first) -> what is written of them``, which :meth:`collect` then adds to
            its metrics as ``samples``; None by default.

    Raises:
        ConfigError: a size below 1, or the task lacks what a source, the context or a column needs.
    """

    domain = "language"
    length = None

    def __init__(
        self,
        env: LanguageEnv,
        policy: LanguagePolicy,
        gamma: UnitInterval,
        generator: torch.Generator,
        problem_generator: torch.Generator,
        prompts: Count = 32,
        group_size: Count = 8,
        staleness: Whole = 0,
        sources: dict[str, RowSource | None] | None = None,
        context: Context | None = None,
        curriculum: Curriculum | None = None,
        beginning: Beginning | None = None,
        speaker: Speaker | None = None,
        columns: dict[str, str | list[str]] | None = None,
        privileged: bool | str | None = None,
        generation_batch: Count | None = None,
        device: str = "cpu",
        streams: Callable[[str], torch.Generator] = fixed_stream,
    ) -> None:
        self.env, self.policy = env, policy
        self.generator, self.problem_generator = generator, problem_generator
        self.prompts, self.group_size, self.staleness = prompts, group_size, staleness
        self.device = torch.device(device)
        self.generation_batch = generation_batch
        self.builder = RowBuilder(env, gamma, columns, privileged or None, (beginning or context) is not None)
        self.context, self.beginning, self.curriculum, self.speaker = context, beginning, curriculum, speaker
        self.sources = {name: source for name, source in (sources or {}).items() if source is not None}
        parts = Parts(context, beginning, curriculum, speaker, self.sources)
        parts.check(env, policy, group_size, self.builder.columns)
        own = ("context", *(f"sources/{name}" for name in self.sources), "curriculum", "beginning", "speaker")
        self._streams = {name: streams(name) for name in own}
        self.shows: Callable[[Told, int], list[list[Any]]] | None = None
        self.share: tuple[int, int] = (0, 1)
        self.steps_per_collect = prompts * group_size
        self.rows = self.steps_per_collect + sum(source.most(prompts) for source in self.sources.values())
        self.rows += speaker.most(self.steps_per_collect) if isinstance(speaker, AddsRows) else 0
        self.steps = 0

    def number_from(self, first: int) -> None:
        """Numbers groups and episodes from ``first`` on, before the first: workers of one run have their own."""
        self.builder.load_state_dict({"next_group": first, "next_episode": first})

    def open(self) -> None:
        """Looks whether what samples is there, before anything is spent.

        Raises:
            ConfigError: it is not.
        """
        sampler = self._sampler()
        if sampler is not None:
            sampler.open()

    def _sampler(self) -> EngineSampler | None:
        """What samples, where it is not the policy itself."""
        return self.policy.sampler if isinstance(self.policy, HasSampler) else None

    @torch.no_grad()
    def collect(self, version: int) -> tuple[TensorDict, dict[str, float]]:
        """Samples one batch of conversations.

        Returns:
            Rows of batch size ``[prompts * group_size]``, behind them those of the sources, and means such as
            ``rollout/reward``, ``rollout/length``, ``rollout/truncated`` and the environment's own
            (``rollout/correct``); of a finite set of problems ``rollout/epoch`` (visits of each); with a context
            ``rollout/resampled`` (conversations), with sources ``rollout/joined/NAME`` (rows), with a column ``greedy``
            ``rollout/greedy``, the mean return of the most likely answers.

        Raises:
            NonFiniteError: a log-prob or reward that is not finite; names the prompt and the conversation.
            ConfigError: a source's rows do not fit the rollout's own, or an engine's log-probs are wrong.
            RolloutError: an engine fails.
        """
        sampler = self._sampler()
        policy: Generates = self.policy if sampler is None else sampler.at(version)
        problems = self._problems()
        spoken = Spoken(self.env, problems, version, self._streams["speaker"])
        speaker = policy if self.speaker is None else self.speaker.speaks(policy, spoken)
        repeated = [problem for problem in problems for _ in range(self.group_size)]
        told, starts = self._first(speaker, repeated)
        metrics = summary(*told) | epoch_of(self.env, self.problem_generator)
        if "train" in getattr(self.env, "unjudged", {}):  # reward functions judge: nobody knows what is correct
            metrics.pop("rollout/correct", None)
        unaided = None if self.curriculum is None else self._outcomes(problems, told, starts)
        if self.context is not None:
            metrics |= self._again(self.context, repeated, told, speaker)
            problems = repeated[:: self.group_size]
        if GREEDY in self.builder.wanted:
            metrics |= self._most_likely(problems)
        talk = told[0]
        self._check_finite("the policy's log-prob of a sampled token", talk.log_prob, repeated)
        self._check_finite("the environment's reward", talk.reward, repeated)
        groups = self.builder.groups(len(problems))
        rows = self.builder.rows(told, version, groups.repeat_interleave(self.group_size), Source.ONLINE)
        metrics |= self._begun(starts, rows, repeated)
        self.steps += len(repeated)
        if self.curriculum is not None:
            self.curriculum.expect(rows, problems)
        if self.shows is not None:
            metrics["samples"] = self.shows(told, int(rows["episode"][0, 0]))  # type: ignore[assignment]
        if self.beginning is not None:
            self.beginning.observe(rows, problems)
        if self.speaker is not None:
            metrics |= _shares(talk)
        more = None
        if isinstance(self.speaker, AddsRows):
            more = self.speaker.more(rows, talk.version == CORRECTED, policy, spoken)
            metrics["rollout/joined/speaker"] = 0.0 if more is None else float(len(more))
        out = self._joined(rows, problems, groups, version, policy, metrics)
        if more is not None:
            more["group"] = self.builder.groups(len(more))
            out = torch.cat([out, check_rows(more, rows, "rollout.speaker")])
        if self.curriculum is not None and unaided is not None:
            metrics |= self.curriculum.told(*unaided, self._scored)
        return out, metrics

    def _problems(self) -> Problems:
        """Fresh ones, and behind them those that sources bring."""
        again: Problems = []
        for name, source in self.sources.items():
            if isinstance(source, ChoosesPrompts):
                again += source.problems(self.prompts - len(again), self._streams[f"sources/{name}"])
        fresh = self.prompts - len(again)
        if self.curriculum is None:
            return [*self._shared(self.env.problems(fresh, self.problem_generator, "train")), *again]
        draw = partial(self.env.problems, generator=self.problem_generator)
        return [*self.curriculum.choose(draw, fresh, self._streams["curriculum"]), *again]

    def _outcomes(
        self, problems: Problems, told: Told, starts: list[Start]
    ) -> tuple[Problems, Tensor, Tensor, TensorDict]:
        """What came of the prompts before a context changes it, as :meth:`Curriculum.told` takes it."""
        talk, info = told
        reward = talk.reward.sum(-1)
        counted = info[COUNTED] > 0 if COUNTED in info else torch.ones_like(reward, dtype=torch.bool)
        if starts:
            counted = counted & torch.tensor([not start.helps for start in starts])
        grouped = (self.prompts, self.group_size)
        return problems, reward.reshape(grouped), counted.reshape(grouped), talk.scored_again(self.group_size)

    def _scored(self, rows: TensorDict) -> Tensor:
        """Log-probs ``[n, N]`` of rows under the present policy, so many at once as are sampled together."""
        parts = rows.split(self.generation_batch or len(rows))
        return torch.cat([self.policy.log_prob(part.to(self.policy.device)).log_prob.cpu() for part in parts])

    def _shared(self, problems: Problems) -> Problems:
        """This rollout's part of them."""
        part, parts = self.share
        return problems[len(problems) * part // parts : len(problems) * (part + 1) // parts]

    def _first(self, speaker: Generates, repeated: Problems) -> tuple[Told, list[Start]]:
        """The conversations, and what each began with."""
        starts: list[Start] = []
        if self.beginning is not None:
            asked = Asked(self.env, repeated, self.group_size, self._streams["beginning"], self._scored)
            starts = self.beginning.begin(asked)
        if not any(start.tokens or start.shown for start in starts):
            told = self._converse(speaker, repeated, self.generator, group_size=self.group_size)
            return _advised(told, starts), starts
        whole = [row for row, start in enumerate(starts) if start.over]
        rest = [row for row, start in enumerate(starts) if not (start.over or start.shown)]
        parts = []
        if rest:
            prefixes = [starts[row].tokens for row in rest]
            parts.append(self._converse(speaker, [repeated[r] for r in rest], self.generator, prefixes=prefixes))
        aside = [row for row, start in enumerate(starts) if start.shown]
        if aside:
            said, seen = [starts[row].tokens for row in aside], [starts[row].shown for row in aside]
            parts.append(self._aside(speaker, [repeated[r] for r in aside], said, seen))
        if whole:
            recited = Recited([starts[row].tokens for row in whole], self.env.tokenizer.pad_token_id)
            parts.append(self._converse(recited, [repeated[row] for row in whole], None))
        told = ordered(joined(parts), torch.tensor([*rest, *aside, *whole]).argsort())
        told[0].problems = repeated
        for row, start in enumerate(starts):
            if start.log_probs:
                told[0].claim(row, start.log_probs)
        return _advised(told, starts), starts

    def _begun(self, starts: list[Start], rows: TensorDict, problems: Problems) -> dict[str, float]:
        """Writes who said what rows begin with; returns metrics."""
        if self.beginning is None:
            return {}
        for row, start in enumerate(starts):
            if start.versions:
                first = len(problems[row]["prompt"])
                rows["policy_version"][row, first : first + len(start.versions)] = torch.tensor(start.versions)
        lengths = torch.tensor([len(start.tokens) + len(start.shown) for start in starts], dtype=torch.float32)
        answers = rows["mask"].sum(-1).clamp(min=1)
        return {
            "rollout/begun": float((lengths > 0).float().mean()),
            "rollout/begun_tokens": float(lengths.sum() / torch.maximum(answers, lengths).sum()),
        }

    def _most_likely(self, problems: Problems) -> dict[str, float]:
        """Notes in every problem what the policy's most likely answer earns; returns their mean."""
        told, _ = converse(self.env, self.policy, problems, None, greedy=True, at_once=self.generation_batch)
        reward = told.reward.sum(-1)
        for problem, earned in zip(problems, reward.tolist(), strict=True):
            problem[MOST_LIKELY] = earned
        return {"rollout/greedy": float(reward.mean())}

    def _again(self, context: Context, repeated: Problems, told: Told, speaker: Generates) -> dict[str, float]:
        """Lets the context replace conversations; counts what it samples."""
        sampled = 0

        def generate(
            problems: Problems,
            prefixes: list[list[int]],
            shown: Sequence[Sequence[int]] | None = None,
            scored: bool = True,
        ) -> Told:
            nonlocal sampled
            sampled += len(problems)
            if shown is not None:
                return self._aside(speaker, problems, prefixes, shown, scored)
            return self._converse(speaker, problems, self.generator, prefixes=prefixes)

        draw = partial(self.env.problems, generator=self._streams["context"])
        metrics = context(self.env, repeated, self.group_size, told, generate, draw)
        return {**metrics, "rollout/resampled": float(sampled)}

    def _joined(
        self,
        rows: TensorDict,
        problems: Problems,
        groups: Tensor,
        version: int,
        speaker: Generates,
        metrics: dict[str, float],
    ) -> TensorDict:
        """The rows, and behind them those of every source."""
        reward = rows["reward"].sum(-1).reshape(len(problems), self.group_size)
        parts = [rows]
        for name, source in self.sources.items():
            stream = self._streams[f"sources/{name}"]
            judge = partial(self._judged, version=version)
            say = partial(self._said, speaker, stream, version)
            known = (self.env, problems, groups, reward, version, stream, judge, self.builder.groups)
            found = source.rows(Request(*known, rows, say, self._scored))
            metrics[f"rollout/joined/{name}"] = 0.0 if found is None else float(len(found))
            if found is not None:
                if self.curriculum is not None:
                    self.curriculum.expect(found)
                parts.append(check_rows(found, rows, f"rollout.sources.{name}"))
        out = torch.cat(parts) if len(parts) > 1 else rows
        for source in self.sources.values():
            source.observe(out)
        return out

    def _judged(
        self,
        policy: Generates,
        problems: Problems,
        groups: Tensor | None,
        source: Source,
        version: int,
        prefixes: Sequence[list[int]] | None = None,
    ) -> TensorDict:
        """What another policy says, judged by the environment."""
        told = self._converse(policy, problems, None, prefixes=None if prefixes is None else list(prefixes))
        return self._rows(told, groups, source, version)

    def _said(
        self,
        speaker: Generates,
        stream: torch.Generator,
        version: int,
        problems: Problems,
        groups: Tensor | None,
        source: Source,
        prefixes: Sequence[list[int]] | None = None,
        shown: Sequence[Sequence[int]] | None = None,
    ) -> TensorDict:
        """What the policy says to a source, see :class:`~unified_rl.rollout.sources.base.Say`."""
        seed = int(torch.randint(2**62, (), generator=stream))
        own = torch.Generator(device=self.generator.device).manual_seed(seed)
        begun = [[] for _ in problems] if prefixes is None else list(prefixes)
        converse = partial(self._converse, stream=own)
        if shown is None:
            return self._rows(converse(speaker, problems, prefixes=begun), groups, source, version)
        told = whisper(converse, self.env, speaker, problems, shown, begun, None)
        rows = self._rows(told, groups, source, version)
        return rows.set("policy_version", torch.where(rows["mask"], NOBODY, rows["policy_version"]))

    def _rows(self, told: Told, groups: Tensor | None, source: Source, version: int) -> TensorDict:
        groups = self.builder.groups(len(told[0].problems)) if groups is None else groups
        rows = self.builder.rows(told, version, groups, source)
        return rows if self.curriculum is None else self.curriculum.expect(rows)

    def _aside(
        self,
        speaker: Generates,
        problems: Problems,
        prefixes: list[list[int]],
        shown: Sequence[Sequence[int]],
        scored: bool = True,
    ) -> Told:
        """Conversations that saw something which their rows do not hold."""
        converse = partial(self._converse, stream=self.generator)
        return whisper(converse, self.env, speaker, problems, shown, prefixes, self._scored if scored else None)

    def _converse(self, policy: Generates, problems: Problems, stream: torch.Generator | None, **options: Any) -> Told:
        return converse(self.env, policy, problems, stream, at_once=self.generation_batch, **options)

    def _check_finite(self, name: str, value: Tensor, problems: Problems) -> None:
        bad = ~torch.isfinite(value).all(-1)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise NonFiniteError(
                f"{name} is not finite (prompt {problems[row]['prompt_id']}, conversation {self.steps + row})"
            )

    def state_dict(self) -> dict[str, Any]:
        """Streams, counters, the environment and what the sources keep."""
        return {
            "generator": self.generator.get_state(),
            "problem_generator": self.problem_generator.get_state(),
            "streams": {name: stream.get_state() for name, stream in self._streams.items()},
            "sources": {name: source.state_dict() for name, source in self.sources.items()},
            "beginning": None if self.beginning is None else self.beginning.state_dict(),
            "curriculum": None if self.curriculum is None else self.curriculum.state_dict(),
            "steps": self.steps,
            "generation_batch": self.generation_batch,
            **self.builder.state_dict(),
            "env": self.env.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.generator.set_state(state["generator"])
        self.problem_generator.set_state(state["problem_generator"])
        for name, stream in self._streams.items():
            if name in state["streams"]:  # a run of a version without it has none
                stream.set_state(state["streams"][name])
        self._load_learnt(state)
        self.steps = state["steps"]
        self.generation_batch = state.get("generation_batch", self.generation_batch)
        self.builder.load_state_dict(state)
        self.env.load_state_dict(state["env"])

    def restart(self, state: dict[str, Any], seed: int) -> None:
        """Goes on behind :meth:`state_dict` with other problems and tokens, from ``seed``; the task stays new."""
        streams = [self.generator, self.problem_generator, *self._streams.values()]
        for number, stream in enumerate(streams):
            stream.manual_seed(seed + number)
        self._load_learnt(state)
        self.steps = state["steps"]
        self.builder.load_state_dict(state)

    def _load_learnt(self, state: dict[str, Any]) -> None:
        """What sources, beginning and curriculum keep."""
        if self.beginning is not None:
            self.beginning.load_state_dict(state["beginning"])
        for name, source in self.sources.items():
            source.load_state_dict(state["sources"][name])
        if self.curriculum is not None:
            self.curriculum.load_state_dict(state["curriculum"])


def _shares(talk: Conversations) -> dict[str, float]:
    """Which part of the tokens the policy did not sample by itself, and which took the place of its proposals."""
    count = talk.mask.sum().clamp(min=1)
    return {
        "rollout/foreign": float((talk.version <= FOREIGN).sum() / count),
        "rollout/corrected": float((talk.version == CORRECTED).sum() / count),
    }


def _advised(told: Told, starts: list[Start]) -> Told:
    """Notes which conversations had something in view."""
    if starts:
        told[0].advised = torch.tensor([float(start.advised) for start in starts])
    return told
