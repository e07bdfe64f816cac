"""Rows of the record, made of finished conversations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.errors import ConfigError
from unified_rl.instantiate import nearest
from unified_rl.protocols import LanguageEnv, MarksTokens, ReportsColumns, Rewarded, Solves, Votes, require_solutions
from unified_rl.rollout.conversation import UNKNOWN, Conversations, Told
from unified_rl.units import COUNTED, MARKS, NOBODY, Source, numbered

REWARDS = "rewards"
"""Entry ``[B, K]`` float32 of the record: what each reward function of the run gave, NaN where one gave nothing."""


GREEDY = "greedy"
"""The return of the policy's most likely answer to a conversation's prompt; 0 for prompts that others brought."""
MOST_LIKELY = "most likely answer earns"
"""Where a problem holds it."""
OWN = ("turns", "length", "answer", "label", GREEDY, MARKS)
"""Numbers of a conversation that every task has: its turns, its sampled tokens, what it answered (equal numbers for
equal answers, of a task that says what an answer is), the reference that this is compared with (likewise),
:data:`GREEDY`, and :data:`~unified_rl.units.MARKS` of a task that marks the parts of an answer."""
BEGUN = "begun"
"""Number of a conversation, with ``rollout.beginning`` or ``context``: how many tokens it began with."""

ADVISED = "advised"
"""Likewise: 1 where it had something in view that its row does not hold, -1 where it had the opposite, else 0."""


class RowBuilder:
    """Turns conversations into rows of the record, and numbers groups and episodes.

    Args:
        env: the task.
        gamma: discount of a turn.
        columns: further entries of the record, made of the environment's own numbers and of :data:`OWN`: a name gives
            ``[B]`` int64, a list of names ``[B, K]`` float32. Reward functions of the run add :data:`REWARDS`, and a
            task that leaves conversations out of updates adds ``counted``.
        privileged: style of the solution in ``privileged_tokens`` and ``privileged_mask``, True for the task's own;
            None leaves them out.
        begins: whether conversations begin with given tokens, so that :data:`BEGUN` and
            :data:`ADVISED` are known.

    Raises:
        ConfigError: a number that the environment does not report, or a task without solutions.
    """

    def __init__(
        self,
        env: LanguageEnv,
        gamma: float,
        columns: Mapping[str, str | list[str]] | None,
        privileged: bool | str | None,
        begins: bool = False,
    ) -> None:
        self.env, self.gamma = env, gamma
        self.columns, self.privileged = dict(columns or {}), privileged
        if isinstance(env, Rewarded) and env.reward_names:
            self.columns = {REWARDS: list(env.reward_names), **self.columns}
        self._next_group = self._next_episode = 0
        self.counts = False
        self.known = (*OWN, BEGUN, ADVISED) if begins else OWN
        self.wanted = {n for want in self.columns.values() for n in ([want] if isinstance(want, str) else want)}
        if "answer" in self.wanted and not isinstance(env, Votes):
            raise ConfigError(
                f"rollout.columns names 'answer', and {type(env).__name__} does not say what an answer is: it needs a "
                "method vote(), as env=chain_mod has"
            )
        if MARKS in self.wanted:
            self._check_marks()
        if isinstance(env, ReportsColumns):
            self._check(env.columns)
            self.counts = COUNTED in env.columns
        self.style = privileged if isinstance(privileged, str) else None
        self.solver = None if privileged is None else require_solutions(env, "rollout.privileged", self.style)

    def _check_marks(self) -> None:
        """Marks are of units, so they have a column of their own.

        Raises:
            ConfigError: another name, one of several numbers, or a task that marks nothing.
        """
        for name, want in self.columns.items():
            if MARKS in ([want] if isinstance(want, str) else want) and (name, want) != (MARKS, MARKS):
                raise ConfigError(
                    f"rollout.columns.{name} names {MARKS!r}, which are of tokens: set rollout.columns.{MARKS}={MARKS}"
                )
        if not isinstance(self.env, MarksTokens):
            raise ConfigError(
                f"rollout.columns.{MARKS}: {type(self.env).__name__} does not say which parts of an answer are right: "
                "it needs a method marks(), as env=chain_mod has"
            )

    def _check(self, known: Iterable[str]) -> None:
        for name, wanted in self.columns.items():
            for one in [wanted] if isinstance(wanted, str) else wanted:
                if one not in (all_known := (*known, *self.known)):
                    if one in (BEGUN, ADVISED):
                        raise ConfigError(
                            f"rollout.columns.{name} names {one!r}, which is known where answers begin with something: "
                            f"set rollout.beginning or rollout.context, or take it out of "
                            "rollout.columns (null takes out all)"
                        )
                    raise ConfigError(
                        f"rollout.columns.{name} names {one!r}, which neither {type(self.env).__name__} nor every task "
                        f"reports; {nearest(one, all_known)}"
                    )

    def groups(self, count: int) -> Tensor:
        """``[count]`` int64: new group ids."""
        self._next_group += count
        return torch.arange(self._next_group - count, self._next_group)

    def rows(self, told: Told, version: int, group: Tensor, source: Source) -> TensorDict:
        """Rows of batch size ``[B]``.

        Args:
            told: the conversations.
            version: of the policy that spoke, stamped on every unit that does not know its own.
            group: ``[B]`` int64.
            source: who spoke.
        """
        talk, info = told
        count, turns = talk.reward.shape
        width = talk.tokens.shape[1]
        episodes = torch.arange(self._next_episode, self._next_episode + count)
        self._next_episode += count
        return TensorDict(
            {
                **self._extra(talk, info),
                "tokens": talk.tokens,
                "token_mask": torch.arange(width) < talk.length[:, None],
                "mask": talk.mask,
                "behavior_log_prob": talk.log_prob,
                "step_index": talk.step_index,
                "policy_version": torch.where(talk.version == UNKNOWN, version, talk.version).clamp(min=NOBODY),
                "reward": talk.reward,
                "step_mask": talk.step_mask,
                "terminated": talk.terminated,
                "truncated": talk.truncated,
                "discount": torch.full((count, turns), self.gamma),
                "episode": episodes[:, None].expand(count, turns).contiguous(),
                "group": group,
                "source": torch.full((count,), int(source)),
                "prompt_id": torch.tensor([p["prompt_id"] for p in talk.problems], dtype=torch.int64),
            },
            batch_size=[count],
        )

    def _extra(self, talk: Conversations, info: dict[str, Tensor]) -> dict[str, Tensor]:
        self._check(info)
        given = {**info, **self._own(talk)}
        extra = {name: _column(given, wanted) for name, wanted in self.columns.items()}
        if self.counts:
            extra[COUNTED] = info[COUNTED] > 0
        return extra if self.solver is None else extra | self._privileged(talk, self.solver)

    def _own(self, talk: Conversations) -> dict[str, Tensor]:
        """What is wanted of :data:`OWN`, ``[B]``; also :data:`BEGUN` and :data:`ADVISED`, 0 of rows of others."""
        found = {
            "turns": talk.step_mask.sum(-1).float(),
            "length": talk.mask.sum(-1).float(),
            BEGUN: talk.begun,
            ADVISED: talk.advised,
            GREEDY: torch.tensor([float(problem.get(MOST_LIKELY, 0.0)) for problem in talk.problems]),
        }
        if "answer" in self.wanted and isinstance(self.env, Votes):
            votes = [self.env.vote(p, said) for p, said in zip(talk.problems, talk.said, strict=True)]
            found["answer"] = torch.tensor([-1 if vote is None else numbered(vote) for vote in votes])
        if MARKS in self.wanted and isinstance(self.env, MarksTokens):
            found[MARKS] = torch.zeros(talk.mask.shape)
            for row, (problem, said) in enumerate(zip(talk.problems, talk.said, strict=True)):
                told = [mark for turn in self.env.marks(problem, said) for mark in turn]
                sampled = talk.mask[row]  # what an answer began with was said by others, and comes first
                count = int(sampled.sum())
                told = [0] * (count - len(told)) + told[max(0, len(told) - count) :]
                found[MARKS][row, sampled] = torch.tensor(told, dtype=torch.float32)
        if "label" in self.wanted:
            found["label"] = torch.tensor([self._label(problem) for problem in talk.problems])
        return found

    def _label(self, problem: Mapping[str, Any]) -> int:
        if problem.get("reference") is None:
            raise ConfigError(
                f"rollout.columns names 'label', the number of a problem's reference, and the problem "
                f"{problem.get('text', '')!r:.60} of {type(self.env).__name__} has none"
            )
        return numbered(str(problem["reference"]))

    def _privileged(self, talk: Conversations, solver: Solves) -> dict[str, Tensor]:
        """Every row again with a solution between prompt and answer; as many tokens masked in, in the same order."""
        solutions = solver.solve(talk.problems, self.style)
        longest = max(map(len, solutions))
        if longest > self.env.max_turn_tokens:
            raise ConfigError(
                f"rollout.privileged shows solutions of up to {longest} tokens, more than fit into "
                f"env.max_turn_tokens={self.env.max_turn_tokens}; raise it"
            )
        width = talk.tokens.shape[1] + self.env.max_turn_tokens
        tokens = talk.tokens.new_full((len(solutions), width), self.env.tokenizer.pad_token_id)
        mask = torch.zeros(tokens.shape, dtype=torch.bool)
        for row, (problem, shown) in enumerate(zip(talk.problems, solutions, strict=True)):
            at, end = len(problem["prompt"]), int(talk.length[row])
            joined = torch.cat(
                [talk.tokens[row, :at], torch.tensor(shown, dtype=torch.int64), talk.tokens[row, at:end]]
            )
            tokens[row, : len(joined)] = joined
            mask[row, at + len(shown) : len(joined)] = talk.mask[row, at:end]
        return {"privileged_tokens": tokens, "privileged_mask": mask}

    def state_dict(self) -> dict[str, Any]:
        """The counters."""
        return {"next_group": self._next_group, "next_episode": self._next_episode}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self._next_group, self._next_episode = state["next_group"], state["next_episode"]


def _column(info: dict[str, Tensor], wanted: str | list[str]) -> Tensor:
    """One of the environment's numbers as an index ``[B]`` int64, or several as ``[B, K]`` float32."""
    return info[wanted].long() if isinstance(wanted, str) else torch.stack([info[name] for name in wanted], -1)
