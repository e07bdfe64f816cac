"""What an environment offers to the rollout loops. Environments implement these; the core never imports them."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from tensordict import TensorDict
from torch import Tensor


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

    def demonstrations(self, count: int, generator: torch.Generator, style: str | None = None) -> TensorDict:
        """``[count]`` supervised rows: ``tokens``, ``token_mask``, ``mask`` as in the record, mask on target tokens."""
        ...
