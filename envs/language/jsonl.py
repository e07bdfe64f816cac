"""Problems and answers from files: prompts and conversations, with a numeric or a free-form verifier."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, overload

from unified_rl.configurable import configurable
from unified_rl.envs.language.answers import marked_answer
from unified_rl.envs.language.chat import Chat, check_options, day_of
from unified_rl.envs.language.codec import Segment
from unified_rl.envs.language.judging import Truncated
from unified_rl.envs.language.pool import PooledTask
from unified_rl.envs.language.tokenizer import load_tokenizer, train_bpe
from unified_rl.envs.language.tool_formats import FORMS, ToolFormat, form_of, own_form
from unified_rl.envs.language.tools import Asked, Tools
from unified_rl.envs.language.verdict import Verdict
from unified_rl.envs.language.verifiers import (
    MathVerifier,
    Verifier,
    last,
    numeric,
    parse_number,
    strip_calculations,
)
from unified_rl.envs.language.votes import ballot
from unified_rl.errors import ConfigError, DataError
from unified_rl.prompts import (
    ANSWERS,
    Message,
    Prompt,
    field,
    find_completion,
    find_prompt,
    first_of,
    messages_of,
    other_columns,
)
from unified_rl.ranges import Count, Float32, HeldOut, Positive, Seed, Some, Texts, ranged
from unified_rl.records import Record, Records, open_records

BPE_SAMPLE = 2000
"""Problems that an encoding is trained on: enough for a few thousand tokens."""

TOOL_TURNS = 4
"""Turns of a conversation with tools, where nobody says how many."""
SHORTEST_RESULT = 8
"""Tokens of a tool's result that must fit."""
SEAM = 2
"""Tokens that a text and what surrounds it may have more together than apart."""
CUT = " ... (cut)"
"""Ends a result that did not fit."""
VERIFIERS = ("numeric", "last", "math")
BY_TEXT = "for text set reward=exact, for formulas env.verifier=math"
"""What compares a reference that is no number."""
TEMPLATE = "Question: {question}\nAnswer:"
"""The default prompt without a chat template. It ends without a blank: the blank belongs to an answer's first token."""
_PLAIN = re.compile(r"-?[0-9]{1,15}(?:\.[0-9]{1,15})?")
MARKED = {"math": "\\boxed{{{}}}", "numeric": "#### {}", "last": "#### {}"}
"""How a reference is written so that each verifier reads it."""


class FileProblems(Sequence[dict[str, Any]]):
    """The problems of a file, made of its records when they are asked for.

    Args:
        task: makes them.
        records: of the file.
    """

    def __init__(self, task: JsonlProblems, records: Records) -> None:
        self.task, self.records, self.place = task, records, str(records.path)

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for where, record in self.records:
            yield self.task.problem_of(record, where)

    def outlines(self) -> Iterator[dict[str, Any]]:
        """Every problem without its solution and further columns, which a split does not need."""
        for where, record in self.records:
            yield self.task.outline_of(record, where)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return self.take(range(len(self))[index])
        return self.take([range(len(self))[index]])[0]

    def take(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Some of them, in the order of ``numbers``."""
        return [self.task.problem_of(record, where) for where, record in self.records.read(numbers)]


@configurable
@ranged("env")
class JsonlProblems(PooledTask):
    """Problems of a JSON-lines, JSON, CSV or Parquet file (also ``.gz``), or of a folder that ``datasets`` wrote.

    Columns are found by the names of TRL's data sets. The prompt is the first of ``prompt`` (as it is), ``messages``,
    ``question`` and ``problem`` (in the template); a list of messages is rendered by the chat template. The reference
    is the first of ``answer``, ``solution`` and ``completion``. What is imitated is ``completion``, or what the
    assistant says at the end of ``messages``, word for word; else the ``solution`` beside an ``answer``, else the
    answer, as ``solution_key`` tells. Further columns are kept in the problem, as ``columns``.

    Such are GSM8K (arXiv 2110.14168), SVAMP, MATH, and whatever TRL or verl train on.

    Args:
        path: the file.
        eval_path: a file of held-out problems; without it a share of ``path`` is held out. A training problem that is
            also in this file is not trained on. Both go by the question alone, whatever the template.
        question_key: field of the question; several, separated by commas, are joined, and a dotted one leads into a
            mapping. By default as above.
        answer_key: field of the reference; where it holds ``####``, what follows it. A reference that the verifier
            cannot read is an error only where answers are judged: rollouts and evaluation.
        solution_key: field of what demonstrations say, word for word; by default as above, where an answer or solution
            loses its calculation marks and gets the reference, in the form that the verifier reads, where it lacks it
            (a bare number becomes ``#### 42``, or a box for ``math``; several words stay as they are).
        assistant_only_loss: imitate every turn of the assistant in ``messages`` (and in a ``completion`` of several)
            and nothing else; false imitates the last one alone, in a ``completion`` all of it. Prompts stay prompts.
        verifier: how an answer is compared: ``numeric`` (the last box, answer tag or ``####`` line of the text holds
            the number), ``last`` (as that; without a mark, the last number of the text) or ``math`` (math-verify, free
            form).
        template: the prompt; ``{question}`` is replaced. By default the question alone for the column ``prompt`` and
            with ``chat``, else :data:`TEMPLATE`.
        chat: wrap a prompt that is text as one user message with the tokenizer's chat template; by default where there
            is a system prompt. Conversations are always rendered by the template.
        system_prompt: what the system says first, where a conversation has no system message of its own.
        chat_template_kwargs: further arguments of the chat template, such as ``{enable_thinking: false}``.
        tools: functions that the model may call (``[my_tools:add]``), see :mod:`unified_rl.envs.language.tools`; their
            schemas go into the chat template, and their results are messages that no loss is over.
        tool_format: how the model writes calls: ``hermes`` (Qwen too), ``llama3_json``, ``mistral``, or
            ``response_template`` of the tokenizer's folder; by default as the chat template writes them.
        max_turns: turns of a conversation, the last of which answers; with tools 4 by default, else 1.
        max_reply_length: tokens of the results of one turn, with the template's marks; longer ones are cut.
        tool_seconds: wall time of one call.
        date: ``YYYY-MM-DD`` that a chat template which prints the day is given, so that prompts stay as they are.
        max_prompt_length: tokens; longer prompts are left out, with a warning that counts them.
        max_turn_tokens: budget of an answer; a longer one is truncated and counted as ``truncated``.
        truncated_reward: of a truncated answer; null lets the verifier judge what there is of it.
        truncated: ``score``, ``zero`` or ``mask``, see :class:`~unified_rl.envs.language.base.LanguageTask`.
        stop: texts that end a turn too, of any length.
        score_seconds: CPU time of one free-form comparison, after which it is given up (``scorer_error``).
        batch_seconds: CPU time that the slow comparisons of one batch of answers may take together.
        tokenizer: a local folder; by default byte-pair encoding trained on the start of this file.
        vocabulary_size: of that encoding.
        held_out: share of prompts kept for evaluation where there is no ``eval_path``.
        drop_last: end an epoch with its last whole batch; else its rest and the start of the next make one.
        shuffle_rewards: the negative control of :class:`~unified_rl.envs.language.base.LanguageTask`.
        seed: of that control.

    Raises:
        DataError: a file that cannot be read, or a record without a usable prompt or completion (file and line).
        ConfigError: an unknown verifier, a template without ``{question}``, ``chat`` without a chat template, a date
            that is none.
    """

    info_names = ("scorer_error",)

    _chat: Chat | None = None
    _rendering = False
    """Prompts are rendered; not yet while an encoding is trained on what will be."""

    def __init__(
        self,
        path: str,
        eval_path: str | None = None,
        question_key: str | None = None,
        answer_key: str | None = None,
        solution_key: str | None = None,
        assistant_only_loss: bool = True,
        verifier: str = "numeric",
        template: str | None = None,
        chat: bool | None = None,
        system_prompt: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        tools: Some | None = None,
        tool_format: ToolFormat | None = None,
        max_turns: Count | None = None,
        max_reply_length: Count = 256,
        tool_seconds: Positive = 10.0,
        date: str = "2024-07-26",
        max_prompt_length: Count = 256,
        max_turn_tokens: Count = 256,
        truncated_reward: Float32 | None = 0.0,
        truncated: Truncated | None = None,
        stop: Texts | None = None,
        score_seconds: Positive = 5.0,
        batch_seconds: Positive = 10.0,
        tokenizer: str | None = None,
        vocabulary_size: Count = 2048,
        held_out: HeldOut = 0.1,
        drop_last: bool = False,
        shuffle_rewards: bool = False,
        seed: Seed = 0,
    ) -> None:
        _check_choices(verifier, template)
        self.verifier = verifier
        self.assistant_only_loss = assistant_only_loss
        self._keys = (question_key, answer_key, solution_key)
        self._template, self._wraps = template, system_prompt is not None if chat is None else chat
        if tools is None:
            _refuse_idle_tools(tool_format, max_turns)
        self._tools, self._tool_format = None if tools is None else Tools(tools, tool_seconds), tool_format
        schemas = None if self._tools is None else self._tools.schemas
        self._chat_settings = (date, system_prompt, check_options(chat_template_kwargs), schemas)
        day_of(date)
        problems = FileProblems(self, open_records(path))
        own = load_tokenizer(tokenizer) if tokenizer else train_bpe(_texts(problems), vocabulary_size)
        super().__init__(
            own,
            max_prompt_length=max_prompt_length,
            max_turn_tokens=max_turn_tokens,
            max_turns=1 if tools is None else max_turns or TOOL_TURNS,
            max_reply_length=0 if tools is None else max_reply_length,
            held_out=held_out,
            truncated_reward=truncated_reward,
            truncated=truncated,
            stop=stop,
            shuffle_rewards=shuffle_rewards,
            seed=seed,
        )
        self.drop_last = drop_last
        self._rendering = True
        if self._wraps:
            self._chat = Chat(self.codec, *self._chat_settings)
        self._fill(problems, None if eval_path is None else FileProblems(self, open_records(eval_path)))
        self._refuse_idle_chat()
        self._choose_form()
        self._check_room()
        self._math = MathVerifier(score_seconds, batch_seconds) if verifier == "math" else None
        self._verify: Verifier = self._math or (last if verifier == "last" else numeric)

    def _refuse_idle_chat(self) -> None:
        """Raises ConfigError for settings of a chat template that renders nothing."""
        _, system, options, tools = self._chat_settings
        for name, value in (("system_prompt", system), ("chat_template_kwargs", options), ("tools", tools)):
            if value and self._chat is None:
                raise ConfigError(
                    f"env.{name} would be of no effect: prompts are text and env.chat is off; set env.chat=true"
                )

    def _choose_form(self) -> None:
        """How calls are read, as somebody says or the folder does."""
        if self._tools is None or self._chat is None:
            return
        name = self._tool_format
        if name is None and getattr(self.tokenizer, "response_template", None) is not None:
            name = "response_template"
        if name is None:
            self._tools.form = form_of(self._chat.written_call())
        elif name == "response_template":
            self._tools.form = own_form(
                self.tokenizer, self._tools.schemas, self._chat.prompt([{"role": "user", "content": "?"}])
            )
        else:
            self._tools.form = FORMS[name]

    def _check_room(self) -> None:
        """Raises ConfigError where not even a short result of a tool fits."""
        if self._chat is not None and self._tools is not None and self._room(self._chat, 1) < SHORTEST_RESULT:
            need = self.max_reply_length - self._room(self._chat, 1) + SHORTEST_RESULT
            raise ConfigError(
                f"env.max_reply_length={self.max_reply_length} has no room for a result of {SHORTEST_RESULT} tokens "
                f"and the chat template's marks; raise it to {need} at least"
            )

    def _room(self, chat: Chat, calls: int) -> int:
        """Tokens that each of so many results may have."""
        marks = len(self.codec.encode([chat.reply([""] * calls, False)])[0])
        return (self.max_reply_length - marks) // calls - SEAM

    def close(self) -> None:
        """Ends the verifier's process, where there is one."""
        if self._math is not None:
            self._math.close()

    # From a record to a problem

    def problem_of(self, record: Record, where: str) -> dict[str, Any]:
        """The problem that a record holds; its ``fault`` says why answers to it cannot be judged, where that is so."""
        prompt = find_prompt(record, self._keys[0], where)
        problem = self._outline(record, prompt, where)
        said = self._said(record, prompt, problem, where)
        problem["columns"] = other_columns(record)
        if said is None:
            return problem
        pieces = self._pieces(record, prompt, problem, where) if self.assistant_only_loss else None
        return {**problem, "solution": said, **({} if pieces is None else {"pieces": pieces})}

    def outline_of(self, record: Record, where: str) -> dict[str, Any]:
        """As :meth:`problem_of`, without what is imitated and the further columns."""
        find_completion(record, self._keys[2], where)
        return self._outline(record, find_prompt(record, self._keys[0], where), where)

    def _outline(self, record: Record, prompt: Prompt, where: str) -> dict[str, Any]:
        messages = self._messages(prompt)
        text = self._question(prompt) if messages is None else self._rendered(messages, where)
        reference, fault, unread = self._reference(record, prompt, where)
        problem: dict[str, Any] = {"text": text, "record": prompt.identity, "reference": reference}
        if messages is not None:
            problem["messages"] = messages
        if fault is not None:
            problem |= {"fault": fault, "unread": unread}
        return problem

    def _question(self, prompt: Prompt) -> str:
        own = "{question}" if prompt.column == "prompt" or self._wraps else TEMPLATE
        return (own if self._template is None else self._template).replace("{question}", prompt.text)

    def _messages(self, prompt: Prompt) -> list[Message] | None:
        """The conversation that a prompt is, or becomes with ``chat``; None for plain text."""
        if prompt.messages:
            return list(prompt.messages)
        return [{"role": "user", "content": self._question(prompt)}] if self._wraps else None

    def _rendered(self, messages: list[Message], where: str) -> str:
        if not self._rendering:  # an encoding is being trained on what will be rendered
            return "\n".join(str(message["content"]) for message in messages)
        return self._template_for(where).prompt(messages, where)

    def _template_for(self, where: str) -> Chat:
        if self._chat is None:
            try:
                self._chat = Chat(self.codec, *self._chat_settings)
            except ConfigError as error:
                raise ConfigError(f"{where} holds a conversation: {error}") from error
        return self._chat

    def _reference(self, record: Record, prompt: Prompt, where: str) -> tuple[str | None, str | None, str]:
        """What answers are compared with, or None, what is wrong with it and the text that it is all the same."""
        reference = ""
        try:
            key = self._keys[1] or first_of(record, ANSWERS)
            worked = self._worked(record, key, prompt, where)
            reference = worked.rpartition("####")[2].strip()
            if "####" not in worked and key not in ("answer", self._keys[1]):
                reference = marked_answer(worked) or reference
            if not reference or (self.verifier != "math" and not _is_number(reference)):
                wanted = "an answer" if self.verifier == "math" else "a number"
                way = f" ({BY_TEXT})" if reference else ""
                raise DataError(
                    f"{where}: field {key or prompt.column!r} holds no reference: expected {wanted}, got "
                    f"{worked!r:.80}{way}"
                )
        except DataError as error:
            return None, str(error), reference
        return reference, None, reference

    @staticmethod
    def _worked(record: Record, key: str | None, prompt: Prompt, where: str) -> str:
        """The text that holds the reference."""
        if key is None and prompt.said:
            return str(prompt.said[-1]["content"])
        if key == "completion" and isinstance(record[key], list):
            return str(messages_of(record[key], f"{where}: field {key!r}")[-1]["content"])
        return field(record, key or ANSWERS[0], where)

    def _said(self, record: Record, prompt: Prompt, problem: dict[str, Any], where: str) -> str | None:
        """What a demonstration says behind the prompt; None where the record does not tell."""
        messages = problem.get("messages")
        found = find_completion(record, self._keys[2], where)
        if found is None and prompt.said:
            found = list(prompt.said)
        if isinstance(found, list):
            if messages is None or not self._rendering:
                return str(found[-1]["content"])
            return self._template_for(where).completion(messages, found, where)
        if found is not None:
            return found
        names = ("solution", "answer") if self._keys[1] is None else (self._keys[1],)
        name = next((one for one in names if record.get(one) is not None or "." in one or "," in one), None)
        if name is None:
            return None
        try:
            worked = field(record, name, where)
        except DataError:
            return None
        if not worked:
            return None
        solution = self._solution(worked, problem["reference"])
        return solution if messages is not None else _led(solution, problem["text"])

    def _pieces(
        self, record: Record, prompt: Prompt, problem: dict[str, Any], where: str
    ) -> list[tuple[str, bool]] | None:
        """What is imitated of a conversation in which the assistant speaks more than once; None for other records."""
        messages = problem.get("messages")
        if messages is None or not self._rendering:
            return None
        found = find_completion(record, self._keys[2], where)
        said = list(prompt.said) if found is None else found
        if not isinstance(said, list) or not said or said[-1]["role"] != "assistant":
            return None
        since = 0 if found is None else len(messages)
        if sum(one["role"] == "assistant" for one in [*messages, *said][since:]) < 2 and len(said) == 1:
            return None
        return self._template_for(where).pieces([*messages, *said], since, where)

    def _imitated(self, problem: dict[str, Any], style: str | None) -> list[Segment]:
        """As of every task; of a conversation with every turn of the assistant's."""
        if "pieces" not in problem:
            return super()._imitated(problem, style)
        *before, (last, _) = problem["pieces"]
        return [*(Segment(text, trained=own) for text, own in before), Segment(last, trained=True, end=True)]

    def _solution(self, worked: str, reference: str | None) -> str:
        """``worked`` without calculation marks, ending in the form that the verifier reads."""
        text = strip_calculations(worked)
        if reference is None:
            return text
        marked = marked_answer(text)
        if marked is not None and (self.verifier == "math" or parse_number(marked) == parse_number(reference)):
            return text
        ending = MARKED[self.verifier].format(reference)
        if text == reference:
            return text if len(text.split()) > 2 and "\\" not in text else ending
        return f"{text}\n{ending}"

    def encode_answers(self, answers: Sequence[str]) -> list[list[int]]:
        """As of every task, led by a blank where the prompt ends without one."""
        template = TEMPLATE if self._template is None else self._template
        return super().encode_answers(answers if self._chat else [_led(answer, template) for answer in answers])

    def _records_of(self, prompt: str) -> tuple[str, ...]:
        """The questions that a prompt which others give may be: itself, or what the template holds in it."""
        before, _, after = (TEMPLATE if self._template is None else self._template).partition("{question}")
        inside = prompt.startswith(before) and prompt.endswith(after) and len(prompt) > len(before) + len(after)
        bare = prompt.strip()
        return (bare, prompt[len(before) : len(prompt) - len(after)].strip()) if inside else (bare,)

    # Judging

    reply_role = "tool"
    _cut = False
    """Whether the turn that is being judged ran out of its budget: no tool is called from it."""
    _said_last: Sequence[int] = ()
    """Its tokens."""

    def _verdict(self, problem: dict[str, Any], said: list[list[int]], complete: bool, row: int) -> Verdict:
        self._cut, self._said_last = not complete, said[-1]
        return super()._verdict(problem, said, complete, row)

    def _called(self, calls: list[Asked]) -> Verdict:
        """The results of a turn's calls; those for which there is no room are not made."""
        chat, tools = self._chat, self._tools
        assert chat is not None and tools is not None
        made = len(calls)
        while made > 1 and self._room(chat, made) < SHORTEST_RESULT:
            made -= 1
        room = self._room(chat, made)
        results = [self._fitted(tools.run(call), room) for call in calls[:made]]
        return Verdict(done=False, reply=chat.reply(results, True, calls[:made]), shown="\n".join(results))

    def _fitted(self, text: str, room: int) -> str:
        """A result in ``room`` tokens at most, without special tokens, which only the template may put."""
        for token in self.tokenizer.all_special_tokens:
            text = text.replace(token, "")
        ids = self.codec.encode([text])[0]
        size = room - len(self.codec.encode([CUT])[0])
        while len(self.codec.encode([text])[0]) > room and size >= 0:
            text = self.codec.decode(ids[:size]) + CUT if size else ""
            size -= 1
        return text

    def _reply_after(self, reply: str, turn: Sequence[int]) -> str:
        """The reply, behind the end of a turn that a stop text ended."""
        if self._chat is None or (len(turn) and turn[-1] in self.codec.end_ids):
            return reply
        return self._chat.end + reply

    def _whole_turn(self) -> str:
        """The turn that is being judged with its special tokens, which may mark calls, but for the end of the turn."""
        ids = self._said_last
        return self.turn_texts([ids[:-1] if len(ids) and ids[-1] in self.codec.end_ids else ids], False)[0]

    def _begin_batch(self) -> None:
        if self._math is not None:
            self._math.renew()

    def vote(self, problem: dict[str, Any], turns: list[list[int]]) -> str | None:
        """The number or formula that an answer gives, see :func:`~unified_rl.envs.language.votes.ballot`."""
        return ballot(self._turn_text(turns[-1]), self.verifier)

    def _judge(self, problem: dict[str, Any], text: str, turn: int) -> Verdict:
        goes_on = turn < self.max_turns and not self._cut
        if self._tools is not None and goes_on and (calls := self._tools.calls(self._whole_turn())):
            return self._called(calls)
        if problem["reference"] is None:  # reward functions judge, and what is correct is unknown
            return Verdict(info={"scorer_error": 0.0})
        score, failed = self._verify(problem["reference"], text)
        right = score >= 1.0
        return Verdict(float(right), correct=right, info={"scorer_error": float(failed)})


def _check_choices(verifier: str, template: str | None) -> None:
    """Raises ConfigError for an unknown verifier, and a template without a place for the question."""
    if verifier not in VERIFIERS:
        raise ConfigError(f"env.verifier={verifier} is none of {', '.join(VERIFIERS)}")
    if template is not None and "{question}" not in template:
        raise ConfigError("env.template must contain {question}")


def _refuse_idle_tools(tool_format: str | None, max_turns: int | None) -> None:
    """Raises ConfigError for settings of tools where there are none."""
    if tool_format is not None:
        raise ConfigError(f"env.tool_format={tool_format} would be of no effect: there are no env.tools")
    if max_turns not in (None, 1):
        raise ConfigError(f"env.max_turns={max_turns} would be of no effect: without env.tools an answer is one turn")


def _is_number(text: str) -> bool:
    return _PLAIN.fullmatch(text) is not None or parse_number(text) is not None


def _led(answer: str, prompt: str) -> str:
    """An answer with the blank that parts it from a prompt which ends without one."""
    return answer if prompt[-1:].isspace() else f" {answer.lstrip(' ')}"


def _texts(problems: FileProblems) -> list[str]:
    return [problem["text"] + problem.get("solution", "") for problem in islice(problems, BPE_SAMPLE)]
