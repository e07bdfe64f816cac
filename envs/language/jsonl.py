"""Word problems from a file, with a numeric or a free-form verifier."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from typing import Any

from unified_rl.configurable import configurable
from unified_rl.envs.language.answers import marked_answer
from unified_rl.envs.language.base import Verdict
from unified_rl.envs.language.pool import PooledTask
from unified_rl.envs.language.records import field, read_records
from unified_rl.envs.language.tokenizer import load_tokenizer, train_bpe
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
from unified_rl.ranges import Count, Float32, HeldOut, Positive, Seed, ranged

BPE_SAMPLE = 2000
"""Problems that an encoding is trained on: enough for a few thousand tokens."""

VERIFIERS = ("numeric", "last", "math")
TEMPLATE = "Question: {question}\nAnswer:"
"""The default prompt without a chat template. It ends without a blank: the blank belongs to an answer's first token."""
_CLOCK = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
MARKED = {"math": "\\boxed{{{}}}", "numeric": "#### {}", "last": "#### {}"}
"""How a reference is written so that each verifier reads it."""


@configurable
@ranged("env")
class JsonlProblems(PooledTask):
    """Problems of a JSON-lines file (or one JSON array), such as GSM8K (arXiv 2110.14168), SVAMP or MATH.

    Args:
        path: the file.
        eval_path: a file of held-out problems; without it a share of ``path`` is held out. A training problem that is
            also in this file is not trained on. Both go by the question alone, whatever the template.
        question_key: field of the question; several, separated by commas, are joined.
        answer_key: field of the reference; where it holds ``####``, what follows it.
        solution_key: field of what demonstrations say, word for word; by default the reference field without
            calculation marks, to which the reference is added in the form that the verifier reads where it lacks it (a
            bare number becomes ``#### 42``, or a box for ``math``; several words stay as they are).
        verifier: how an answer is compared: ``numeric`` (the last box, answer tag or ``####`` line of the text holds
            the number), ``last`` (as that; without a mark, the last number of the text) or ``math`` (math-verify, free
            form).
        template: the prompt; ``{question}`` is replaced. By default the question alone with ``chat``, else
            :data:`TEMPLATE`.
        chat: wrap the prompt as one user message with the tokenizer's chat template.
        date: ``YYYY-MM-DD`` that a chat template which prints the day is given, so that prompts stay as they are.
        max_prompt_length: tokens; longer prompts are left out, with a warning that counts them.
        max_turn_tokens: budget of an answer; a longer one is truncated and counted as ``truncated``.
        truncated_reward: of a truncated answer; null lets the verifier judge what there is of it.
        score_seconds: CPU time of one free-form comparison, after which it is given up (``scorer_error``).
        batch_seconds: CPU time that the slow comparisons of one batch of answers may take together.
        tokenizer: a local folder; by default byte-pair encoding trained on the start of this file.
        vocabulary_size: of that encoding.
        held_out: share of prompts kept for evaluation where there is no ``eval_path``.
        shuffle_rewards: the negative control of :class:`~unified_rl.envs.language.base.LanguageTask`.
        seed: of that control.

    Raises:
        DataError: a file that cannot be read, or a record without a usable question or reference (file and line).
        ConfigError: an unknown verifier, a template without ``{question}``, ``chat`` without a chat template, a date
            that is none.
    """

    info_names = ("scorer_error",)

    def __init__(
        self,
        path: str,
        eval_path: str | None = None,
        question_key: str = "question",
        answer_key: str = "answer",
        solution_key: str | None = None,
        verifier: str = "numeric",
        template: str | None = None,
        chat: bool = False,
        date: str = "2024-07-26",
        max_prompt_length: Count = 256,
        max_turn_tokens: Count = 256,
        truncated_reward: Float32 | None = 0.0,
        score_seconds: Positive = 5.0,
        batch_seconds: Positive = 10.0,
        tokenizer: str | None = None,
        vocabulary_size: Count = 2048,
        held_out: HeldOut = 0.1,
        shuffle_rewards: bool = False,
        seed: Seed = 0,
    ) -> None:
        if verifier not in VERIFIERS:
            raise ConfigError(f"env.verifier={verifier} is none of {', '.join(VERIFIERS)}")
        if template is None:
            template = "{question}" if chat else TEMPLATE
        if "{question}" not in template:
            raise ConfigError("env.template must contain {question}")
        self.verifier = verifier
        self._keys = (question_key, answer_key, solution_key)
        self._template, self._chat, self._date = template, chat, _day(date)
        problems = self._read(path, template)
        own = load_tokenizer(tokenizer) if tokenizer else train_bpe(_texts(problems[:BPE_SAMPLE]), vocabulary_size)
        super().__init__(
            own,
            max_prompt_length=max_prompt_length,
            max_turn_tokens=max_turn_tokens,
            held_out=held_out,
            truncated_reward=truncated_reward,
            shuffle_rewards=shuffle_rewards,
            seed=seed,
        )
        evaluation = None if eval_path is None else self._read(eval_path, template)
        if chat:
            self._wrap([*problems, *(evaluation or [])])
        self._fill(problems, evaluation)
        self._math = MathVerifier(score_seconds, batch_seconds) if verifier == "math" else None
        self._verify: Verifier = self._math or (last if verifier == "last" else numeric)

    def close(self) -> None:
        """Ends the verifier's process, where there is one."""
        if self._math is not None:
            self._math.close()

    def _read(self, path: str, template: str) -> list[dict[str, Any]]:
        out = []
        for where, record in read_records(path):
            question = field(record, self._keys[0], where)
            answer = field(record, self._keys[1], where)
            reference = answer.rpartition("####")[2].strip()
            if not reference or (self.verifier != "math" and parse_number(reference) is None):
                wanted = "an answer" if self.verifier == "math" else "a number"
                raise DataError(
                    f"{where}: field {self._keys[1]!r} holds no reference: expected {wanted}, got {answer!r:.80}"
                )
            given = None if self._keys[2] is None else field(record, self._keys[2], where, strip=False)
            solution = self._solution(answer, reference) if given is None else given
            text = template.replace("{question}", question)
            if given is None:
                solution = self._led(solution)
            out.append({"text": text, "record": question, "reference": reference, "solution": solution})
        return out

    def _led(self, answer: str) -> str:
        """An answer with the blank that parts it from a prompt which ends without one."""
        return answer if self._chat or self._template[-1:].isspace() else f" {answer.lstrip(' ')}"

    def encode_answers(self, answers: Sequence[str]) -> list[list[int]]:
        """As of every task, led by a blank where the prompt ends without one."""
        return super().encode_answers([self._led(answer) for answer in answers])

    def _texts_of(self, prompt: str) -> tuple[str, ...]:
        return (prompt, self._template.replace("{question}", prompt))

    def _solution(self, worked: str, reference: str) -> str:
        """``worked`` without calculation marks, ending in the form that the verifier reads."""
        text = strip_calculations(worked)
        marked = marked_answer(text)
        if marked is not None and (self.verifier == "math" or parse_number(marked) == parse_number(reference)):
            return text
        ending = MARKED[self.verifier].format(reference)
        if text == reference:
            return text if len(text.split()) > 2 and "\\" not in text else ending
        return f"{text}\n{ending}"

    def _wrap(self, problems: list[dict[str, Any]]) -> None:
        if not isinstance(getattr(self.tokenizer, "chat_template", None), str):
            raise ConfigError(
                "env.chat=true, but the tokenizer has no chat template; give a chat model's tokenizer folder"
            )
        self.codec.end_id = self._end_of_turn()
        for problem in problems:
            text = self._render([{"role": "user", "content": problem["text"]}], add_generation_prompt=True)
            begin = self.tokenizer.bos_token if self.codec.prefix else None
            problem["asked"] = problem["text"]  # what files of answers call it
            problem["text"] = text.removeprefix(begin) if begin else text

    def _render(self, messages: list[dict[str, str]], **options: Any) -> str:
        """The chat template's text on the task's own day, whatever day it is."""
        template = dated(str(self.tokenizer.chat_template), self._date)
        return str(self.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options))

    def _end_of_turn(self) -> int:
        """The id that the chat template puts behind what the assistant said; the end of text where it is no end id."""
        said = "zqz"
        text = self._render([{"role": "user", "content": "?"}, {"role": "assistant", "content": said}])
        ids = self.codec.encode([text.rpartition(said)[2].strip()])[0]
        return ids[0] if ids and ids[0] in self.codec.end_ids else self.codec.eos_id

    def _begin_batch(self) -> None:
        if self._math is not None:
            self._math.renew()

    def vote(self, problem: dict[str, Any], turns: list[list[int]]) -> str | None:
        """The number or formula that an answer gives, see :func:`~unified_rl.envs.language.votes.ballot`."""
        return ballot(self._turn_text(turns[-1]), self.verifier)

    def _judge(self, problem: dict[str, Any], text: str, turn: int) -> Verdict:
        score, failed = self._verify(problem["reference"], text)
        right = score >= 1.0
        return Verdict(float(right), correct=right, info={"scorer_error": float(failed)})


def _texts(problems: list[dict[str, Any]]) -> list[str]:
    return [problem["text"] + problem["solution"] for problem in problems]


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


def _day(date: str) -> datetime.datetime:
    try:
        return datetime.datetime.strptime(date, "%Y-%m-%d")
    except ValueError as error:
        raise ConfigError(f"env.date={date!r} is no day; write it as YYYY-MM-DD") from error
