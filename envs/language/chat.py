"""Conversations as a tokenizer's chat template renders them: on a fixed day, behind a system prompt."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any

from unified_rl.envs.language.codec import Codec
from unified_rl.errors import ConfigError, DataError
from unified_rl.prompts import Message

_CLOCK = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_OWN = frozenset(
    ("conversation", "messages", "tools", "chat_template", "tokenize", "add_generation_prompt",
     "continue_final_message", "return_dict", "return_tensors", "return_assistant_tokens_mask",
     "padding", "truncation", "max_length")
)  # fmt: skip
"""Arguments of a chat template that the task gives itself."""


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

    def reply(self, results: Sequence[str], ended: bool) -> str:
        """What the template puts between a turn that called tools and the next one: their results, one message each.

        Args:
            results: of the calls of the turn.
            ended: the turn ends with the end-of-turn token already.
        """
        called: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "qzq"}]
        told: list[Message] = [{"role": "tool", "content": text} for text in results]
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

    def _led(self, messages: Sequence[Message]) -> list[Message]:
        own = any(message["role"] == "system" for message in messages)
        lead = [] if own or self.system is None else [{"role": "system", "content": self.system}]
        return [*lead, *messages]

    def _render(self, messages: list[Message], where: str, **options: Any) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, **options, **self.options
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
