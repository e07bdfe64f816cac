"""Word problems from a file, with a numeric or a free-form verifier."""

from __future__ import annotations

from typing import Any

from unified_rl.configurable import configurable
from unified_rl.envs.language.base import Verdict
from unified_rl.envs.language.pool import PooledTask
from unified_rl.envs.language.records import field, read_records
from unified_rl.envs.language.tokenizer import load_tokenizer, train_bpe
from unified_rl.envs.language.verifiers import (
    MathVerifier,
    Verifier,
    last,
    marked_number,
    numeric,
    parse_number,
    strip_calculations,
)
from unified_rl.errors import ConfigError, DataError

BPE_SAMPLE = 2000
"""Problems that an encoding is trained on: enough for a few thousand tokens."""

VERIFIERS = ("numeric", "last", "math")


@configurable
class JsonlProblems(PooledTask):
    """Problems of a JSON-lines file (or one JSON array), such as GSM8K (arXiv 2110.14168), SVAMP or MATH.

    Args:
        path: the file.
        eval_path: a file of held-out problems; without it a share of ``path`` is held out. A training problem that is
            also in this file is not trained on.
        question_key: field of the question; several, separated by commas, are joined.
        answer_key: field of the reference; where it holds ``####``, what follows it.
        solution_key: field of a worked solution for demonstrations; by default the reference field.
        verifier: ``numeric`` (number after the last ``####``), ``last`` (last number of the text) or ``math``
            (math-verify, free form).
        template: the prompt; ``{question}`` is replaced.
        chat: wrap the prompt as one user message with the tokenizer's chat template.
        max_prompt_length: tokens; longer prompts are left out, with a warning that counts them.
        max_turn_tokens: budget of an answer; a longer one is truncated and counted as ``truncated``.
        score_seconds: CPU time of one free-form comparison, after which it is given up (``scorer_error``).
        tokenizer: a local folder; by default byte-pair encoding trained on the start of this file.
        vocabulary_size: of that encoding.
        held_out: share of prompts kept for evaluation where there is no ``eval_path``.
        shuffle_rewards: the negative control of :class:`~unified_rl.envs.language.base.LanguageTask`.
        seed: of that control.

    Raises:
        DataError: a file that cannot be read, or a record without a usable question or reference (file and line).
        ConfigError: an unknown verifier, a template without ``{question}``, ``chat`` without a chat template.
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
        template: str = "Question: {question}\nAnswer: ",
        chat: bool = False,
        max_prompt_length: int = 256,
        max_turn_tokens: int = 256,
        score_seconds: float = 5.0,
        tokenizer: str | None = None,
        vocabulary_size: int = 2048,
        held_out: float = 0.1,
        shuffle_rewards: bool = False,
        seed: int = 0,
    ) -> None:
        if verifier not in VERIFIERS:
            raise ConfigError(f"env.verifier={verifier} is none of {', '.join(VERIFIERS)}")
        if "{question}" not in template:
            raise ConfigError("env.template must contain {question}")
        self.verifier = verifier
        self._keys = (question_key, answer_key, solution_key)
        self._template = template
        problems = self._read(path, template)
        own = load_tokenizer(tokenizer) if tokenizer else train_bpe(_texts(problems[:BPE_SAMPLE]), vocabulary_size)
        super().__init__(
            own,
            max_prompt_length=max_prompt_length,
            max_turn_tokens=max_turn_tokens,
            held_out=held_out,
            shuffle_rewards=shuffle_rewards,
            seed=seed,
        )
        evaluation = None if eval_path is None else self._read(eval_path, template)
        if chat:
            self._wrap([*problems, *(evaluation or [])])
        self._fill(problems, evaluation)
        self._math = MathVerifier(score_seconds) if verifier == "math" else None
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
            worked = answer if self._keys[2] is None else field(record, self._keys[2], where)
            text = template.replace("{question}", question)
            out.append({"text": text, "reference": reference, "solution": self._solution(worked, reference)})
        return out

    def _texts_of(self, prompt: str) -> tuple[str, ...]:
        return (prompt, self._template.replace("{question}", prompt))

    def _solution(self, worked: str, reference: str) -> str:
        """``worked`` without calculation marks, ending in the form that the verifier reads."""
        text = strip_calculations(worked)
        if self.verifier == "math":
            ready, ending = "\\boxed" in text, f"\\boxed{{{reference}}}"
        else:
            ready, ending = marked_number(text) == parse_number(reference), f"#### {reference}"
        if ready:
            return text
        return ending if text == reference else f"{text}\n{ending}"

    def _wrap(self, problems: list[dict[str, Any]]) -> None:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError(
                "env.chat=true, but the tokenizer has no chat template; give a chat model's tokenizer folder"
            )
        for problem in problems:
            message = [{"role": "user", "content": problem["text"]}]
            text = str(self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
            begin = self.tokenizer.bos_token if self.codec.prefix else None
            problem["asked"] = problem["text"]  # what files of answers call it
            problem["text"] = text.removeprefix(begin) if begin else text

    def _judge(self, problem: dict[str, Any], text: str, turn: int) -> Verdict:
        score, failed = self._verify(problem["reference"], text)
        right = score >= 1.0
        return Verdict(float(right), correct=right, info={"scorer_error": float(failed)})


def _texts(problems: list[dict[str, Any]]) -> list[str]:
    return [problem["text"] + problem["solution"] for problem in problems]
