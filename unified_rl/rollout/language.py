"""Language rollouts: a batch of prompts, several samples each, as many turns as the task has."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.errors import NonFiniteError
from unified_rl.rollout.protocols import LanguageEnv
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

    def add_reply(self, row: int, ids: list[int]) -> None:
        """Appends the environment's text, masked out."""
        start = int(self.length[row])
        self.tokens[row, start : start + len(ids)] = torch.tensor(ids, dtype=torch.int64)
        self.length[row] += len(ids)


class LanguageRollout:
    """Samples ``prompts * group_size`` conversations with the current policy.

    Args:
        env: a :class:`~unified_rl.rollout.protocols.LanguageEnv`.
        policy: anything with ``generate(prompts, ...)`` as :class:`unified_rl.policies.causal_lm.CausalLM` has.
        gamma: unused discount of a turn (language records carry discount ``gamma``; agents default to 1).
        generator: the stream that tokens are drawn from.
        problem_generator: the stream that problems are drawn from.
        prompts: problems of one call of :meth:`collect`.
        group_size: samples of each problem; they share a ``group``.
        staleness: as in :class:`~unified_rl.rollout.control.ControlRollout`.
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
        device: str = "cpu",
    ) -> None:
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
        self._check_finite("the policy's log-prob of a sampled token", talk.log_prob, repeated)
        self._check_finite("the environment's reward", talk.reward, repeated)
        rows = self._rows(talk, version)
        self.steps += len(repeated)
        return rows, _summary(talk, info)

    def _check_finite(self, name: str, value: Tensor, problems: list[dict[str, Any]]) -> None:
        bad = ~torch.isfinite(value).all(-1)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise NonFiniteError(
                f"{name} is not finite (prompt {problems[row]['prompt_id']}, conversation {self.steps + row})"
            )

    def _rows(self, talk: Conversations, version: int) -> TensorDict:
        count, turns = talk.reward.shape
        width = talk.tokens.shape[1]
        groups = torch.arange(self._next_group, self._next_group + self.prompts)
        episodes = torch.arange(self._next_episode, self._next_episode + count)
        self._next_group += self.prompts
        self._next_episode += count
        return TensorDict(
            {
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
                "group": groups.repeat_interleave(self.group_size),
                "source": torch.full((count,), int(Source.ONLINE)),
                "prompt_id": torch.tensor([p["prompt_id"] for p in talk.problems], dtype=torch.int64),
            },
            batch_size=[count],
        )

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
) -> tuple[Conversations, dict[str, Tensor]]:
    """Runs every conversation to its end.

    Args:
        env: the task.
        policy: the language model.
        problems: ``B`` problems; runs of ``group_size`` equal ones let the first turn share the prompt's encoding.
        generator: stream of the sampler; unused when ``greedy``.
        greedy: take the most likely token.
        group_size: equal consecutive problems.

    Returns:
        The conversations and the environment's last ``info`` of each, every entry ``[B]``.
    """
    talk = Conversations(problems, env.max_length, env.max_turns, env.tokenizer.pad_token_id)
    active = torch.arange(len(problems))
    info: dict[str, Tensor] = {}
    for turn in range(env.max_turns):
        shared = group_size if turn == 0 else 1
        out = policy.generate(
            talk.contexts(active[::shared]),
            max_new_tokens=env.max_turn_tokens,
            stop_ids=env.stop_ids,
            generator=generator,
            greedy=greedy,
            samples_per_prompt=shared,
        )
        tokens, log_prob = out.tokens.to("cpu"), out.log_prob.to("cpu")
        length, finished = out.length.to("cpu"), out.finished.to("cpu")
        talk.add_turn(active, turn, tokens, log_prob, length)
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


def _summary(talk: Conversations, info: dict[str, Tensor]) -> dict[str, float]:
    out = {
        "rollout/reward": talk.reward.sum(-1).mean(),
        "rollout/length": talk.mask.sum(-1).float().mean(),
        "rollout/turns": talk.step_mask.sum(-1).float().mean(),
        "rollout/truncated": talk.truncated.any(-1).float().mean(),
    }
    out |= {f"rollout/{key}": value.mean() for key, value in info.items()}
    return {key: float(value) for key, value in out.items()}
