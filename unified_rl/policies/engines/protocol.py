"""What samples a rollout's answers: three calls, token ids in and out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from unified_rl.errors import RolloutError
from unified_rl.policies.generation import Generation
from unified_rl.policies.sampling import Sampling
from unified_rl.policies.stop_strings import StopStrings


@dataclass(frozen=True)
class Call:
    """What an engine is asked for.

    Attributes:
        prompts: ids of each prompt, none empty.
        max_new_tokens: of an answer.
        stop_ids: ids that end an answer; the id is part of it.
        pad_id: fills what lies behind the end of an answer.
        sampling: the distribution that tokens come from, and whose log-probs are wanted.
        generator: everything random is drawn from it.
        samples_per_prompt: answers to each prompt, one behind the other.
        stop_strings: texts that end an answer too.
    """

    prompts: list[list[int]]
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    pad_id: int
    sampling: Sampling
    generator: torch.Generator
    samples_per_prompt: int = 1
    stop_strings: StopStrings | None = None

    @property
    def rows(self) -> list[list[int]]:
        """The prompt of each answer."""
        return [prompt for prompt in self.prompts for _ in range(self.samples_per_prompt)]

    def seeds(self) -> list[int]:
        """One number below 2**31 for each answer, drawn from the generator."""
        source = self.generator
        drawn = torch.randint(2**31, (len(self.rows),), generator=source, device=source.device)
        found: list[int] = drawn.tolist()
        return found


@dataclass(frozen=True)
class Answer:
    """One sampled answer, as an engine outside this process reports it.

    Attributes:
        tokens: ids, the stop id included.
        log_probs: of each, under the sampling distribution.
        stopped: whether the engine says that it ended by itself.
        versions: of the weights of each token; empty where nobody says.
    """

    tokens: list[int]
    log_probs: list[float]
    stopped: bool
    versions: tuple[int, ...] = ()


class Engine(Protocol):
    """Samples continuations with weights that are given to it."""

    name: str

    def open(self) -> None:
        """Looks whether it is there, before anything is spent.

        Raises:
            ConfigError: it is not, or cannot do what the run needs.
        """
        ...

    def push(self, policy: Any, version: int) -> None:
        """Gives it the policy's weights, those of ``version``; behind it, tokens come from them.

        Raises:
            RolloutError: it does not take them.
        """
        ...

    def generate(self, call: Call) -> Generation:
        """Samples; row ``i * samples_per_prompt + j`` is answer ``j`` to prompt ``i``.

        Raises:
            RolloutError: it does not answer, or answers what cannot be meant.
        """
        ...

    def close(self) -> None:
        """Frees what it holds."""
        ...


def joined(answers: Sequence[Answer], call: Call, who: str) -> Generation:
    """Answers as tensors, each looked at.

    A stop text is found here, so an engine may have gone on behind it; what is cut off changes no distribution.

    Args:
        answers: one for each of ``call.rows``.
        call: that they answer.
        who: names the engine in errors.

    Raises:
        RolloutError: ids that no tokenizer has, more tokens than asked for, as many log-probs as there are no tokens,
            one that is not finite, or an end that is none.
    """
    shape = (len(answers), call.max_new_tokens)
    tokens = torch.full(shape, call.pad_id, dtype=torch.int64)
    log_prob, version = torch.zeros(shape), torch.full(shape, -1, dtype=torch.int64)
    length = torch.tensor([len(answer.tokens) for answer in answers])
    finished = torch.zeros(len(answers), dtype=torch.bool)
    for row, answer in enumerate(answers):
        _check(answer, call, f"{who}, answer {row}")
        count = len(answer.tokens)
        tokens[row, :count] = torch.tensor(answer.tokens)
        log_prob[row, :count] = torch.tensor(answer.log_probs)
        if answer.versions:
            version[row, :count] = torch.tensor(answer.versions)
        finished[row] = answer.tokens[-1] in call.stop_ids
    if call.stop_strings is not None:
        cut = call.stop_strings.find(tokens)
        earlier = cut <= length
        length, finished = torch.where(earlier, cut, length), finished | earlier
        over = torch.arange(call.max_new_tokens) >= length[:, None]
        tokens, log_prob = tokens.masked_fill(over, call.pad_id), log_prob.masked_fill(over, 0.0)
    return Generation(tokens, log_prob, length, finished, version)


def _check(answer: Answer, call: Call, who: str) -> None:
    count = len(answer.tokens)
    if not 0 < count <= call.max_new_tokens:
        raise RolloutError(f"{who} has {count} tokens, and 1 to {call.max_new_tokens} were asked for")
    if len(answer.log_probs) != count:
        raise RolloutError(f"{who} has {len(answer.log_probs)} log-probs for {count} tokens")
    if answer.versions and len(answer.versions) != count:
        raise RolloutError(f"{who} tells the weights of {len(answer.versions)} tokens, and has {count}")
    words = call.sampling.vocabulary
    wrong = [token for token in answer.tokens if not 0 <= token < (words or token + 1)]
    if wrong:
        raise RolloutError(
            f"{who} holds the id {wrong[0]}, and the policy's tokenizer has {words} ids: it runs another model, or "
            "samples from the padding of the output layer"
        )
    for token, value in zip(answer.tokens, answer.log_probs, strict=True):
        if not float("-inf") < value <= 1e-6:
            raise RolloutError(f"{who}: the log-prob of the sampled id {token} is {value}")
    stops = [place for place, token in enumerate(answer.tokens) if token in call.stop_ids]
    if stops and stops[0] < count - 1:
        raise RolloutError(f"{who} goes on behind the stop id {answer.tokens[stops[0]]}: it ignores stop ids")
    if answer.stopped and not stops:
        raise RolloutError(
            f"{who} ended with the id {answer.tokens[-1]}, which is no stop id of this run: a generation configuration "
            "of the model's folder is in force (vLLM: --generation-config vllm), or the server has another tokenizer"
        )
