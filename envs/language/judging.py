"""Reward functions at work in a task: which conversations they see, as what, and what is told of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from unified_rl.envs.language.rewards import Ended, Rewards, plain_value
from unified_rl.rollout.conversation import SCORES

OWN = frozenset(
    ("prompt", "prompt_id", "text", "split", "key", "record", "columns", "asked", "messages", "completions", "fault",
     "pieces", "unread")
)  # fmt: skip
"""Entries of a problem that are no column of its record."""
REMEMBERED = 65536
"""Replies of the environment that are kept for the transcripts of conversations that go on."""
Truncated: TypeAlias = Literal["score", "zero", "mask"]
"""What becomes of a turn that ran out of its budget."""


class TakesRewards(Protocol):
    """What a judge asks of a task."""

    max_turn_tokens: int
    max_turns: int
    truncated: Truncated | None
    truncated_reward: float | None
    reply_role: str
    answer_mark: str

    def turn_texts(self, turns: Sequence[Sequence[int]], skip_special_tokens: bool = True) -> list[str]:
        """The texts of turns as they are judged."""
        ...


class Judge:
    """Scores the conversations of a task that end, with the functions of a run.

    Args:
        task: the task.
        rewards: the functions.

    Attributes:
        names: ``rewards/LABEL`` of each function, in order.
        columns: every name in what it tells.
    """

    def __init__(self, task: TakesRewards, rewards: Rewards) -> None:
        self.task, self.rewards = task, rewards
        self.names = tuple(SCORES + label for label in rewards.labels)
        self.columns = (*self.names, *(f"{name}_none" for name in self.names), "scored", "reward_errors")
        self._replies: OrderedDict[tuple[Any, ...], str] = OrderedDict()
        given = task.truncated_reward
        self._cut: float | None = None
        """What every cut turn gets; None asks the functions."""
        if task.truncated == "zero" or (task.truncated is None and given is not None and given != 0.0):
            self._cut = given

    def check(self, problem: dict[str, Any]) -> None:
        """Looks at one problem of the task, before the first step.

        Raises:
            ConfigError: a function takes what the records do not have.
        """
        self.rewards.check(list(_columns([problem])), self._budget, self.task.answer_mark)

    @property
    def _budget(self) -> int:
        """Tokens that a conversation may have sampled."""
        return self.task.max_turn_tokens * self.task.max_turns

    def __call__(
        self,
        problems: Sequence[dict[str, Any]],
        turns: Sequence[Sequence[Sequence[int]]],
        reward: Tensor,
        ending: Tensor,
        cut: Tensor,
        truncated: Tensor,
        replies: Sequence[str],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The reward of the latest turn of ``B`` conversations, and numbers ``[B]`` by name.

        Args:
            problems: of each.
            turns: sampled ids of every turn so far.
            reward: ``[B]``, the task's own, of the latest turn.
            ending: ``[B]`` bool, the conversation is over.
            cut: ``[B]`` bool, the latest turn ran out of its budget.
            truncated: ``[B]`` bool, that, or the conversation ran out of turns.
            replies: what the task says next.
        """
        rows, rewards = len(problems), self.rewards
        asked = ending & ~(truncated if self.task.truncated == "mask" else cut & torch.tensor(self._cut is not None))
        at = asked.nonzero().squeeze(-1)
        found = rewards.score(self._ended(at.tolist(), problems, turns, reward, truncated))
        values = torch.zeros(len(rewards.labels), rows)
        own = torch.tensor([function is None for function in rewards.functions])
        values[own] = reward  # turns that go on have the task's own reward alone
        unasked = ending & ~asked
        values[:, unasked] = 0.0 if self._cut is None else self._cut
        told = torch.tensor([[torch.nan if v is None else v for v in column] for column in found.values])
        values[:, at] = told.reshape(len(rewards.labels), len(at))
        none = values.isnan().float()
        none[:, unasked] = torch.nan
        total = rewards.task_weight * reward
        total[unasked] = 0.0 if self._cut is None else self._cut
        total[at] = torch.tensor(found.total, dtype=torch.float32)
        scored, failed = torch.ones(rows), torch.zeros(rows)
        scored[at] = torch.tensor(found.scored, dtype=torch.float32)
        failed[at] = torch.tensor(found.failed, dtype=torch.float32)
        info = dict(zip(self.names, values, strict=True))
        info |= {f"{name}_none": value for name, value in zip(self.names, none, strict=True)}
        self._remember(problems, turns, replies, ending)
        return total, {**info, "scored": scored, "reward_errors": failed, "counted": scored.clone()}

    # ------------------------------------------------------------------ what the functions see

    def _ended(
        self,
        rows: list[int],
        problems: Sequence[dict[str, Any]],
        turns: Sequence[Sequence[Sequence[int]]],
        reward: Tensor,
        truncated: Tensor,
    ) -> Ended:
        chosen, said = [problems[row] for row in rows], [turns[row] for row in rows]
        columns = _columns(chosen, self.rewards)
        own, flags = reward.tolist(), truncated.tolist()
        return Ended(
            prompts=[problem.get("messages") or _text(problem) for problem in chosen],
            completions={skip: self._completions(chosen, said, skip) for skip in self.rewards.special},
            completion_ids=[[token for turn in own for token in turn] for own in said],
            prompt_ids=[list(problem.get("prompt", ())) for problem in chosen],
            truncated=[bool(flags[row]) for row in rows],
            max_completion_length=[self._budget] * len(rows),
            columns=columns,
            task=[own[row] for row in rows],
            places=[int(problem.get("prompt_id", at)) for at, problem in enumerate(chosen)],
            texts=[_text(problem) for problem in chosen],
        )

    def _completions(
        self, problems: Sequence[dict[str, Any]], turns: Sequence[Sequence[Sequence[int]]], skip: bool
    ) -> list[Any]:
        """Texts; of problems that came as messages, messages."""
        texts = iter(self.task.turn_texts([turn for said in turns for turn in said], skip))
        out: list[Any] = []
        for problem, said in zip(problems, turns, strict=True):
            spoken = [next(texts) for _ in said]
            replies = [self._replies.get(_key(problem, said[: at + 1]), "") for at in range(len(said) - 1)]
            if problem.get("messages"):
                out.append(self._messages(spoken, replies))
            else:
                out.append("".join(part for pair in zip(spoken, [*replies, ""], strict=True) for part in pair))
        return out

    def _messages(self, spoken: Sequence[str], replies: Sequence[str]) -> list[dict[str, str]]:
        out = [{"role": "assistant", "content": spoken[0]}]
        for reply, text in zip(replies, spoken[1:], strict=True):
            out += [{"role": self.task.reply_role, "content": reply}, {"role": "assistant", "content": text}]
        return out

    def _remember(
        self,
        problems: Sequence[dict[str, Any]],
        turns: Sequence[Sequence[Sequence[int]]],
        replies: Sequence[str],
        ending: Tensor,
    ) -> None:
        if self.task.max_turns == 1:
            return
        for problem, said, reply, over in zip(problems, turns, replies, ending.tolist(), strict=True):
            if not over:
                self._replies[_key(problem, said)] = reply
        while len(self._replies) > REMEMBERED:
            self._replies.popitem(last=False)


def _key(problem: dict[str, Any], said: Sequence[Sequence[int]]) -> tuple[Any, ...]:
    return (problem.get("prompt_id"), *(tuple(turn) for turn in said))


def _text(problem: dict[str, Any]) -> str:
    return str(problem.get("asked", problem.get("text", "")))


def _referred(problem: dict[str, Any]) -> dict[str, Any]:
    """The reference of a record whose answer the task's own verifier cannot read."""
    return {"reference": problem["unread"]} if problem.get("unread") else {}


def _columns(problems: Sequence[dict[str, Any]], rewards: Rewards | None = None) -> dict[str, list[Any]]:
    """The columns of the records by name, those that ``rewards`` takes; None where a record lacks one."""
    records = [
        {**_referred(problem), **{k: v for k, v in problem.items() if k not in OWN and v is not None},
         **(problem.get("columns") or {})}
        for problem in problems
    ]  # fmt: skip
    names: Sequence[str] = list(dict.fromkeys(name for record in records for name in record))
    if rewards is not None:
        names = rewards.column_names(dict.fromkeys(names))
    return {name: [plain_value(record.get(name)) for record in records] for name in names}
