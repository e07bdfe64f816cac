"""What an environment offers to the rollout loops. Environments implement these; the core never imports them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.errors import ConfigError


class StepResult(NamedTuple):
    """One step of ``K`` simulations. The environment does not write to these tensors again.

    Attributes:
        observation: ``[K, d]`` float32, what the policy sees next; of the new episode where one ended (auto-reset).
        reward: ``[K]`` float32 (for a chunk of actions: the discounted sum of its rewards).
        terminated: ``[K]`` bool, the episode reached a terminal state.
        truncated: ``[K]`` bool, the episode was cut by a time limit.
        next_observation: ``[K, d]`` float32, the true successor, also where the episode ended.
        executed: ``[K]`` int64, inner control steps executed (1, or at most h for a chunk of h).
        info: named ``[K]`` tensors, for example ``success``.
    """

    observation: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    next_observation: Tensor
    executed: Tensor
    info: dict[str, Tensor]


@runtime_checkable
class ControlEnv(Protocol):
    """K simulations stepped together."""

    domain: str
    num_envs: int
    max_steps: int

    def policy_inputs(self) -> dict[str, Any]:
        """Sizes and bounds that a policy's constructor takes."""
        ...

    def reset_batch(self, seed: int | None = None) -> Tensor:
        """Resets every simulation; ``[K, d]`` float32."""
        ...

    def step_batch(self, action: Tensor) -> StepResult:
        """Steps every simulation with ``action [K, a]`` and resets those that ended."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-exact continuation needs."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`; recomputes nothing."""
        ...


class TurnResult(NamedTuple):
    """The environment's answer to one turn of each of ``B`` conversations.

    Attributes:
        reply: one list of token ids a conversation: what the environment appends (tool output); empty where done.
        reward: ``[B]`` float32, this turn's reward.
        done: ``[B]`` bool, the conversation is over (terminated).
        info: named ``[B]`` float tensors, for example ``correct``.
    """

    reply: list[list[int]]
    reward: Tensor
    done: Tensor
    info: dict[str, Tensor]


@runtime_checkable
class LanguageEnv(Protocol):
    """A token task: prompts, turns, verifiers. Answers of a model are data and are never evaluated as code.

    A conversation is identified by a plain-Python ``state`` that the environment made (JSON-able, so that pending
    conversations can be checkpointed).
    """

    domain: str
    tokenizer: Any
    max_prompt_length: int
    max_turn_tokens: int
    """Budget of sampled tokens in one turn."""
    max_turns: int
    max_length: int
    """Width of a record: prompt, all turns and all replies always fit."""
    stop_ids: list[int]
    """Token ids that end a turn (the end-of-text id among them)."""

    def policy_inputs(self) -> dict[str, Any]:
        """``tokenizer`` and ``max_length``."""
        ...

    def problems(self, count: int, generator: torch.Generator, split: str = "train") -> list[dict[str, Any]]:
        """Draws ``count`` problems. Each is a JSON-able dict with at least ``prompt`` (token ids) and ``prompt_id``.

        ``split="eval"`` draws from the held-out set, which training never sees, the same for the same generator state.
        """
        ...

    def respond(self, problems: list[dict[str, Any]], turns: list[list[list[int]]], finished: Tensor) -> TurnResult:
        """Answers the latest turn of each conversation.

        Args:
            problems: ``B`` problems from :meth:`problems` (the environment may not change them).
            turns: for each conversation the sampled token ids of every turn so far (stop token included); the last
                one is to be answered.
            finished: ``[B]`` bool, False where the last turn ran out of its budget without a stop token; such a turn
                is truncated, which the caller records.
        """
        ...


# What an environment may offer beside; whoever needs one of these asks for it by name.


@runtime_checkable
class Demonstrates(Protocol):
    """An environment with an expert of its own, in either domain."""

    def demonstrations(self, count: int, generator: torch.Generator, /) -> TensorDict:
        """``[count]`` supervised rows.

        Control: ``observation``, ``action``. Language: ``tokens``, ``token_mask``, ``mask`` as in the record, mask on
        target tokens; a language task also takes ``style``.
        """
        ...


@runtime_checkable
class Solves(Protocol):
    """A token task that knows correct answers."""

    def solve(self, problems: Sequence[dict[str, Any]], style: str | None = None) -> list[list[int]]:
        """Token ids of a correct first answer to each problem, end of text included; empty where there is none.

        Raises:
            ConfigError: an unknown style, or a task without solutions (also for no problems at all).
        """
        ...


@runtime_checkable
class MatchesPrompts(Protocol):
    """A token task that finds its problems by the text of their prompts, so that answers can come from elsewhere."""

    def find_problems(self, prompts: Sequence[str]) -> list[dict[str, Any] | None]:
        """The training problem with each prompt, as :meth:`LanguageEnv.problems` gives it; None where there is none."""
        ...

    def encode_answers(self, answers: Sequence[str]) -> list[list[int]]:
        """Token ids of each answer, end of text included."""
        ...


@runtime_checkable
class ReportsColumns(Protocol):
    """A token task that tells beforehand what its ``TurnResult.info`` holds."""

    columns: tuple[str, ...]


def require_solutions(env: Any, setting: str, style: str | None = None) -> None:
    """Checks that a task can show correct answers.

    Args:
        env: the task.
        setting: who asks, for the message.
        style: of the answers.

    Raises:
        ConfigError: it cannot, or not in this style.
    """
    works = "use an environment with solutions, such as env=chain_mod, or leave the setting out"
    if not isinstance(env, Solves):
        raise ConfigError(f"{setting} needs correct answers, and {type(env).__name__} has no solve(); {works}")
    try:
        env.solve([], style)
    except ConfigError as error:
        raise ConfigError(f"{setting}: {error}") from error
