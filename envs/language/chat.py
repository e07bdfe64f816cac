"""Conversations as a tokenizer's chat template renders them: on a fixed day, behind a system prompt."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from unified_rl.envs.language.codec import Codec
from unified_rl.envs.language.tool_formats import PROBE
from unified_rl.envs.language.tools import Asked
from unified_rl.errors import ConfigError, DataError
from unified_rl.prompts import Message

_CLOCK = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""Begins what the assistant says, in a template that marks it."""
_OWN = frozenset(
    ("conversation", "messages", "tools", "chat_template", "tokenize", "add_generation_prompt",
     "continue_final_message", "return_dict", "return_tensors", "return_assistant_tokens_mask",
     "padding", "truncation", "max_length")
)  # fmt: skip
"""Arguments of a chat template that the task gives itself."""

ONE_TURN = (
    "env.assistant_only_loss=false imitates the last turn alone; a template with {% generation %} marks every turn"
)


class Chat:
    """Renders conversations.

    Args:
        codec: of the task; its tokenizer has the template, and what ends an answer is set to what ends a turn.
        date: ``YYYY-MM-DD`` that a template which prints the day is given.
        system: put before conversations that have no system message of their own; None puts nothing there.
        options: further arguments of the template, such as ``enable_thinking``.
        tools: JSON schemas of functions that the model may call.

    Raises:
        ConfigError: a date that is none, an option that the task gives itself, no chat template, or one that shows no
            tools.
    """

    def __init__(
        self,
        codec: Codec,
        date: str,
        system: str | None,
        options: Mapping[str, Any] | None,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> None:
        self.codec, self.tokenizer, self.system = codec, codec.tokenizer, system
        self.options = check_options(options)
        template = getattr(self.tokenizer, "chat_template", None)
        if not isinstance(template, str):
            raise ConfigError(
                "env.chat=true, but the tokenizer has no chat template; give a chat model's tokenizer folder (messages "
                "and env.system_prompt need a template too)"
            )
        self.template = dated(template, day_of(date))
        codec.end_id = self._end_of_turn()
        self.end = str(self.tokenizer.convert_ids_to_tokens(codec.end_id))
        if tools is not None:
            self._show(list(tools))

    def _show(self, tools: list[dict[str, Any]]) -> None:
        """Puts the tools into every prompt."""
        asked: list[Message] = [{"role": "user", "content": "?"}]
        before = self.prompt(asked)
        self.options = {**self.options, "tools": tools}
        try:
            shows = self.prompt(asked) != before and "zqz" in self.reply(["zqz"], True)
        except DataError as error:
            raise ConfigError(f"env.tools: this folder's chat template has no tools ({error})") from error
        if not shows:
            raise ConfigError(
                "env.tools: this folder's chat template has no tools: it does not show their schemas and their "
                "results; use a folder whose template does (Qwen, Hermes), or leave env.tools out"
            )

    def written_call(self) -> str | None:
        """What the template makes of a turn that calls a tool; None where it refuses one."""
        asked: list[Message] = [{"role": "user", "content": "?"}]
        call = {"id": call_id("", 0), "type": "function", "function": PROBE}
        try:
            whole = self._render([*asked, {"role": "assistant", "content": "", "tool_calls": [call]}], "")
            before = self._render(asked, "", add_generation_prompt=True)
        except DataError:
            return None
        written = whole[len(before) :] if whole.startswith(before) else whole.rpartition("?")[2]
        return written.rstrip().removesuffix(self.end)

    def reply(self, results: Sequence[str], ended: bool, calls: Sequence[Asked] = ()) -> str:
        """What the template puts between a turn that called tools and the next one: their results, one message each.

        Args:
            results: of the calls of the turn.
            ended: the turn ends with the end-of-turn token already.
            calls: the calls, for templates that show a result with the name or the number of its call.
        """
        asked = [*calls, *(Asked("", {}) for _ in range(len(results) - len(calls)))]
        called: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "qzq"}]
        told: list[Message] = [
            {"role": "tool", "name": call.name, "tool_call_id": call_id(call.id, at), "content": text}
            for at, (call, text) in enumerate(zip(asked, results, strict=True))
        ]
        whole = self._render([*called, *told], "env.tools", add_generation_prompt=True)
        _, _, after = whole.partition("qzq")
        return after.removeprefix(self.end) if ended else after

    def prompt(self, messages: Sequence[Message], where: str = "") -> str:
        """The text that an answer follows, without the begin-of-text token that the codec puts before it.

        Messages that end with the assistant's are gone on with.
        """
        going_on = messages[-1]["role"] == "assistant"
        text = self._render(
            self._led(messages), where, add_generation_prompt=not going_on, continue_final_message=going_on
        )
        return self._bare(text)

    def completion(self, messages: Sequence[Message], said: Sequence[Message], where: str = "") -> str:
        """What the template makes of ``said`` behind :meth:`prompt`, without the end of the turn."""
        before = self.prompt(messages, where)
        whole = self._bare(self._render(self._led([*messages, *said]), where, add_generation_prompt=False))
        if not whole.startswith(before):  # a template that writes a prompt otherwise once it is answered
            return str(said[-1]["content"])
        text = whole[len(before) :]
        head, end, rest = text.rpartition(self.end)
        return head if end and not rest.strip() else text

    def pieces(self, messages: Sequence[Message], since: int, where: str = "") -> list[tuple[str, bool]]:
        """A conversation in pieces, in their order: text, and whether the assistant says it.

        A piece of the assistant's ends with the end of its turn, and the last one, which ends the conversation, before
        that. Where the template marks what the assistant says (``{% generation %}``), this is it; else it is found
        between what the template makes of the messages before, and the end of the turn.

        Args:
            messages: the conversation, an assistant's message last.
            since: number of the first message that counts as the assistant's.
            where: place of the record, for errors.

        Raises:
            DataError: the template refuses the conversation, or writes messages otherwise once others follow.
        """
        led = self._led(messages)
        since += len(led) - len(messages)
        whole = self._render(led, where, add_generation_prompt=False)
        marks = _GENERATION.search(self.template) is not None
        spans = self._marked(led, since, where) if marks else self._between(led, since, whole, where)
        out: list[tuple[str, bool]] = []
        at = 0
        for start, end in spans:
            out += [(whole[at:start], False), (whole[start:end], True)]
            at = end
        if not out:
            raise DataError(f"{where}: the chat template marks nothing as the assistant's ({ONE_TURN})")
        out[0] = (self._bare(out[0][0]), False)
        out[-1] = (out[-1][0].removesuffix(self.end), True)
        return [piece for piece in out if piece[0]]

    def _marked(self, led: list[Message], since: int, where: str) -> list[tuple[int, int]]:
        """Where in the text the template's own marks stand, with the end of the turn behind each."""
        options = {**self.tokenizer.special_tokens_map, **self.options}
        rendered: Any = render_jinja_template(
            [led], chat_template=self.template, return_assistant_tokens_mask=True, **options
        )
        (whole,), (spans,) = rendered
        first = len(self._render(led[:since], where, add_generation_prompt=False)) if since else 0
        ends = [end + len(self.end) * whole.startswith(self.end, end) for _, end in spans]
        return [(start, end) for (start, _), end in zip(spans, ends, strict=True) if start >= first]

    def _between(self, led: list[Message], since: int, whole: str, where: str) -> list[tuple[int, int]]:
        """Where the assistant's messages stand in the text, by what the template makes of those before each."""
        spans: list[tuple[int, int]] = []
        for number, message in enumerate(led):
            if message["role"] != "assistant" or number < since:
                continue
            before = self._render(led[:number], where, add_generation_prompt=True) if number else ""
            end = whole.find(self.end, len(before)) + len(self.end)
            if end < len(self.end):  # turns without an end of their own
                end = len(self._render(led[: number + 1], where, add_generation_prompt=False).rstrip())
            if not number or not whole.startswith(before) or (spans and len(before) < spans[-1][1]):
                raise DataError(
                    f"{where}: the chat template writes what comes before message {number + 1} otherwise once the "
                    f"conversation goes on, so what the assistant says cannot be told apart ({ONE_TURN})"
                )
            spans.append((len(before), end))
        return spans

    def _led(self, messages: Sequence[Message]) -> list[Message]:
        own = any(message["role"] == "system" for message in messages)
        lead = [] if own or self.system is None else [{"role": "system", "content": self.system}]
        return [*lead, *messages]

    def _render(self, messages: Sequence[Message], where: str, **options: Any) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.template, tokenize=False, **options, **self.options
            )
        except Exception as error:  # jinja's own kinds, and raise_exception of the template
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise DataError(f"{where or 'env.chat'}: the chat template refuses the conversation ({reason})") from error
        return str(text)

    def _bare(self, text: str) -> str:
        begin = self.tokenizer.bos_token if self.codec.prefix else None
        return text.removeprefix(begin) if begin else text

    def _end_of_turn(self) -> int:
        """The id that the template puts behind what the assistant said; the end of text where it is no end id."""
        said = "zqz"
        text = self._render([{"role": "user", "content": "?"}, {"role": "assistant", "content": said}], "")
        ids = self.codec.encode([text.rpartition(said)[2].strip()])[0]
        return ids[0] if ids and ids[0] in self.codec.end_ids else self.codec.eos_id


def call_id(given: str, number: int) -> str:
    """The number of a call in a turn, of nine letters and digits, which Mistral's templates ask for."""
    return given if len(given) == 9 and given.isalnum() else f"{number:09d}"


def check_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """``env.chat_template_kwargs``.

    Raises:
        ConfigError: a name that the task gives itself.
    """
    taken = sorted(_OWN & set(options or {}))
    if taken:
        raise ConfigError(f"env.chat_template_kwargs.{taken[0]} is the task's own to give; leave it out")
    return dict(options or {})


def dated(template: str, day: datetime.datetime) -> str:
    """A chat template with ``day`` in place of the clock.

    Raises:
        ConfigError: it reads the clock in another way than ``strftime_now("FORMAT")``.
    """
    text = _CLOCK.sub(lambda found: repr(day.strftime(found[2])), template)
    if "strftime_now(" in text:
        raise ConfigError(
            "env.chat=true, but the chat template prints the day in a way that cannot be fixed, so prompts change "
            "from day to day; write the day into the template of the tokenizer's folder"
        )
    return text


def day_of(date: str) -> datetime.datetime:
    """A day.

    Raises:
        ConfigError: it is none.
    """
    try:
        return datetime.datetime.strptime(date, "%Y-%m-%d")
    except ValueError as error:
        raise ConfigError(f"env.date={date!r} is no day; write it as YYYY-MM-DD") from error
