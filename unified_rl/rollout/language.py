"""Language rollouts: a batch of prompts, several samples each, as many turns as the task has."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.errors import ConfigError, NonFiniteError
from unified_rl.protocols import LanguageEnv
from unified_rl.rollout.sources import Recited
from unified_rl.units import Source


class Conversations:
    """Records of ``B`` conversations under construction: right-padded tensors filled turn by turn."""

    def __init__(self, problems: list[dict[str, Any]], width: int, turns: int, pad_id: int) -> None:
        rows = len(problems)
        self.problems = problems
        self.tokens = torch.full((rows, width), pad_id, dtype=torch.int64)
        self.mask = torch.zeros(rows, width, dtype=torch.bool)
        self.log_prob = torch.zeros(rows, width)
        self.step_index = torch.zeros(rows, width, dtype=torch.int64)
        self.reward = torch.zeros(rows, turns)
        self.step_mask = torch.zeros(rows, turns, dtype=torch.bool)
        self.terminated = torch.zeros(rows, turns, dtype=torch.bool)
        self.truncated = torch.zeros(rows, turns, dtype=torch.bool)
        self.length = torch.tensor([len(p["prompt"]) for p in problems])
        self.said: list[list[list[int]]] = [[] for _ in problems]
        for row, problem in enumerate(problems):
            self.tokens[row, : len(problem["prompt"])] = torch.tensor(problem["prompt"])

    def contexts(self, rows: Tensor) -> list[Tensor]:
        """The token ids so far of some rows."""
        return [self.tokens[row, : self.length[row]] for row in rows.tolist()]

    def add_turn(self, rows: Tensor, turn: int, tokens: Tensor, log_prob: Tensor, length: Tensor) -> None:
        """Appends sampled turns ``tokens [b, m]`` of true ``length [b]`` to ``rows``."""
        steps = torch.arange(tokens.shape[1])
        real = steps < length[:, None]
        where_row = rows[:, None].expand_as(tokens)[real]
        where_column = (self.length[rows][:, None] + steps)[real]
        self.tokens[where_row, where_column] = tokens[real]
        self.mask[where_row, where_column] = True
        self.log_prob[where_row, where_column] = log_prob[real]
        beyond = torch.arange(self.tokens.shape[1]) >= self.length[rows][:, None]
        self.step_index[rows] = torch.where(beyond, turn, self.step_index[rows])
        self.length[rows] += length
        for row, ids, count in zip(rows.tolist(), tokens.tolist(), length.tolist(), strict=True):
            self.said[row].append(ids[:count])

    def begin_answers(self, prefixes: list[list[int]]) -> None:
        """Puts what each first answer begins with behind its prompt, masked out."""
        for row, ids in enumerate(prefixes):
            self.add_reply(row, ids)
            if ids:
                self.step_index[row] = 0

    def replace(self, rows: Tensor, others: Conversations) -> None:
        """Puts other conversations in the place of ``rows``."""
        for name in ("tokens", "mask", "log_prob", "step_index", "reward", "step_mask", "terminated", "truncated"):
            getattr(self, name)[rows] = getattr(others, name)
        self.length[rows] = others.length
        for row, said in zip(rows.tolist(), others.said, strict=True):
            self.said[row] = said

    def add_reply(self, row: int, ids: list[int]) -> None:
        """Appends the environment's text, masked out."""
        start = int(self.length[row])
        self.tokens[row, start : start + len(ids)] = torch.tensor(ids, dtype=torch.int64)
        self.length[row] += len(ids)


Told = tuple[Conversations, dict[str, Tensor]]
"""Conversations and the environment's last numbers of each."""


class LanguageRollout:
    """Samples ``prompts * group_size`` conversations with the current policy.

    Args:
        env: a :class:`~unified_rl.protocols.LanguageEnv`.
        policy: anything with ``generate(prompts, ...)`` as :class:`unified_rl.policies.causal_lm.CausalLM` has.
        gamma: unused discount of a turn (language records carry discount ``gamma``; agents default to 1).
        generator: the stream that tokens are drawn from.
        problem_generator: the stream that problems are drawn from.
        prompts: problems of one call of :meth:`collect`.
        group_size: samples of each problem; they share a ``group``.
        staleness: as in :class:`~unified_rl.rollout.control.ControlRollout`.
        sources: rows of others by name, see :mod:`unified_rl.rollout.sources`; budgets do not count them.
        columns: further entries of the record, made of the environment's own numbers: a name gives ``[B]`` int64, a
            list of names ``[B, K]`` float32 (several rewards, strata).
        privileged: style of the solution that a teacher sees behind the prompt (``privileged_tokens``, ``_mask``).
        guide: what is sampled again, and after which tokens, see :class:`unified_rl.rollout.sources.Hints`.
    """

    domain = "language"

    def __init__(
        self,
        env: LanguageEnv,
        policy: Any,
        gamma: float,
        generator: torch.Generator,
        problem_generator: torch.Generator,
        prompts: int = 32,
        group_size: int = 8,
        staleness: int = 0,
        sources: dict[str, Any] | None = None,
        guide: Any = None,
        columns: dict[str, str | list[str]] | None = None,
        privileged: str | None = None,
        device: str = "cpu",
    ) -> None:
        self.columns, self.privileged = dict(columns or {}), privileged
        self.sources, self.guide = dict(sources or {}), guide
        self.env, self.policy, self.gamma = env, policy, gamma
        self.generator, self.problem_generator = generator, problem_generator
        self.prompts, self.group_size, self.staleness = prompts, group_size, staleness
        self.device = torch.device(device)
        self.steps_per_collect = prompts * group_size
        self.steps = 0
        self._next_group = 0
        self._next_episode = 0

    @torch.no_grad()
    def collect(self, version: int) -> tuple[TensorDict, dict[str, float]]:
        """Samples one batch of conversations.

        Returns:
            Rows of batch size ``[prompts * group_size]`` and means such as ``rollout/reward``, ``rollout/length``,
            ``rollout/truncated`` and the environment's own (``rollout/correct``).

        Raises:
            NonFiniteError: a log-prob or reward that is not finite; names the prompt and the conversation.
        """
        problems = self.env.problems(self.prompts, self.problem_generator, "train")
        repeated = [problem for problem in problems for _ in range(self.group_size)]
        talk, info = converse(self.env, self.policy, repeated, self.generator, group_size=self.group_size)
        metrics = _summary(talk, info)
        if self.guide is not None:
            draw = partial(self.env.problems, generator=self.problem_generator)
            metrics |= self.guide(self.env, repeated, self.group_size, (talk, info), self._generate, draw)
            problems = repeated[:: self.group_size]
        self._check_finite("the policy's log-prob of a sampled token", talk.log_prob, repeated)
        self._check_finite("the environment's reward", talk.reward, repeated)
        groups = self._new_groups(self.prompts)
        rows = self._rows((talk, info), version, groups.repeat_interleave(self.group_size), Source.ONLINE)
        joined = [self._joined(source, problems, groups, version) for source in self.sources.values()]
        self.steps += len(repeated)
        return (torch.cat([rows, *joined]) if joined else rows), metrics

    def _generate(self, problems: list[dict[str, Any]], prefixes: list[list[int]]) -> Any:
        return converse(self.env, self.policy, problems, self.generator, prefixes=prefixes)

    def _joined(self, source: Any, problems: list[dict[str, Any]], groups: Tensor, version: int) -> TensorDict:
        """The rows of another source, judged by the environment."""
        own, answers = source.rows(self.env, problems, self.problem_generator)
        reciter = Recited(answers, self.env.tokenizer.pad_token_id)
        talk, info = converse(self.env, reciter, own, None)
        count = len(own)
        group = groups.repeat_interleave(count // len(groups)) if source.joins else self._new_groups(count)
        return self._rows((talk, info), version, group, source.source)

    def _new_groups(self, count: int) -> Tensor:
        self._next_group += count
        return torch.arange(self._next_group - count, self._next_group)

    def _check_finite(self, name: str, value: Tensor, problems: list[dict[str, Any]]) -> None:
        bad = ~torch.isfinite(value).all(-1)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise NonFiniteError(
                f"{name} is not finite (prompt {problems[row]['prompt_id']}, conversation {self.steps + row})"
            )

    def _rows(self, told: Told, version: int, group: Tensor, source: Source) -> TensorDict:
        talk, info = told
        count, turns = talk.reward.shape
        width = talk.tokens.shape[1]
        episodes = torch.arange(self._next_episode, self._next_episode + count)
        self._next_episode += count
        extra = {name: _column(info, wanted) for name, wanted in self.columns.items()}
        if self.privileged is not None:
            extra |= self._privileged(talk)
        return TensorDict(
            {
                **extra,
                "tokens": talk.tokens,
                "token_mask": torch.arange(width) < talk.length[:, None],
                "mask": talk.mask,
                "behavior_log_prob": talk.log_prob,
                "step_index": talk.step_index,
                "policy_version": torch.full((count, width), version),
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

    def _privileged(self, talk: Conversations) -> dict[str, Tensor]:
        """Every row again with a solution between prompt and answer; as many tokens masked in, in the same order."""
        solutions = self.env.solve(talk.problems, self.privileged)
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
        """Streams, counters and the environment."""
        return {
            "generator": self.generator.get_state(),
            "problem_generator": self.problem_generator.get_state(),
            "steps": self.steps,
            "next_group": self._next_group,
            "next_episode": self._next_episode,
            "env": self.env.state_dict(),  # type: ignore[attr-defined]
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.generator.set_state(state["generator"])
        self.problem_generator.set_state(state["problem_generator"])
        self.steps, self._next_group = state["steps"], state["next_group"]
        self._next_episode = state["next_episode"]
        self.env.load_state_dict(state["env"])  # type: ignore[attr-defined]


@torch.no_grad()
def converse(
    env: LanguageEnv,
    policy: Any,
    problems: list[dict[str, Any]],
    generator: torch.Generator | None,
    *,
    greedy: bool = False,
    group_size: int = 1,
    prefixes: list[list[int]] | None = None,
) -> tuple[Conversations, dict[str, Tensor]]:
    """Runs every conversation to its end.

    Args:
        env: the task.
        policy: the language model.
        problems: ``B`` problems; runs of ``group_size`` equal ones let the first turn share the prompt's encoding.
        generator: stream of the sampler; unused when ``greedy``.
        greedy: take the most likely token.
        group_size: equal consecutive problems.
        prefixes: what each first answer begins with; it is judged with the rest, and its tokens are masked out.

    Returns:
        The conversations and the environment's last ``info`` of each, every entry ``[B]``.
    """
    talk = Conversations(problems, env.max_length, env.max_turns, env.tokenizer.pad_token_id)
    active = torch.arange(len(problems))
    info: dict[str, Tensor] = {}
    longest = max(map(len, prefixes or [[]]))
    if prefixes is not None:
        talk.begin_answers(prefixes)
    for turn in range(env.max_turns):
        shared = group_size if turn == 0 else 1
        out = policy.generate(
            talk.contexts(active[::shared]),
            max_new_tokens=env.max_turn_tokens - (longest if turn == 0 else 0),
            stop_ids=env.stop_ids,
            generator=generator,
            greedy=greedy,
            samples_per_prompt=shared,
        )
        tokens, log_prob = out.tokens.to("cpu"), out.log_prob.to("cpu")
        length, finished = out.length.to("cpu"), out.finished.to("cpu")
        talk.add_turn(active, turn, tokens, log_prob, length)
        if prefixes is not None and turn == 0:
            talk.said = [[prefix + said[0]] for prefix, said in zip(prefixes, talk.said, strict=True)]
        rows = active.tolist()
        result = env.respond([problems[r] for r in rows], [talk.said[r] for r in rows], finished)
        talk.reward[active, turn] = result.reward
        talk.step_mask[active, turn] = True
        last = turn + 1 == env.max_turns
        over = result.done | ~finished
        talk.terminated[active, turn] = result.done & finished
        talk.truncated[active, turn] = ~finished | (~result.done if last else torch.zeros_like(finished))
        for key, value in result.info.items():
            info.setdefault(key, torch.zeros(len(problems)))[active] = value.float()
        for row, ids, stop in zip(rows, result.reply, over.tolist(), strict=True):
            if not stop and not last:
                talk.add_reply(row, ids)
        active = active[~over]
        if last or not len(active):
            break
    return talk, info


def _column(info: dict[str, Tensor], wanted: str | list[str]) -> Tensor:
    """One of the environment's numbers as an index ``[B]``, or several as ``[B, K]``.

    Raises:
        ConfigError: it has no such number.
    """
    for name in [wanted] if isinstance(wanted, str) else wanted:
        if name not in info:
            raise ConfigError(f"rollout.columns names {name!r}, and the environment reports {', '.join(info)}")
    return info[wanted].long() if isinstance(wanted, str) else torch.stack([info[name] for name in wanted], -1)


def _summary(talk: Conversations, info: dict[str, Tensor]) -> dict[str, float]:
    out = {
        "rollout/reward": talk.reward.sum(-1).mean(),
        "rollout/length": talk.mask.sum(-1).float().mean(),
        "rollout/turns": talk.step_mask.sum(-1).float().mean(),
        "rollout/truncated": talk.truncated.any(-1).float().mean(),
    }
    out |= {f"rollout/{key}": value.mean() for key, value in info.items()}
    return {key: float(value) for key, value in out.items()}
