"""A token task as a TorchRL environment: one step is one turn of each of K conversations."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from unified_rl.protocols import LanguageEnv, StopsAtStrings


class LanguageTurnEnv(EnvBase):
    """K conversations of a task, stepped together.

    Observations are ``tokens [K, max_length]`` int64 (the conversation so far, right-padded) and ``token_mask`` of the
    same shape, bool. An action is a turn, ``[K, max_turn_tokens]`` int64: it ends with the first stop id or stop text,
    and what follows is ignored; a turn without one ran out of its budget, which truncates the conversation. ``reward``
    is ``[K, 1]`` float32.

    Args:
        task: any token task of :mod:`unified_rl.envs.language`.
        num_envs: K.
        split: ``train`` or ``eval``.
        seed: of the stream that problems are drawn from.
    """

    def __init__(self, task: LanguageEnv, num_envs: int, split: str = "train", seed: int = 0) -> None:
        super().__init__(device="cpu", batch_size=torch.Size([num_envs]))
        self.task, self.split = task, split
        self._problem_generator = torch.Generator().manual_seed(seed)
        self._stops = torch.tensor(task.stop_ids)
        pad, size = task.tokenizer.pad_token_id, len(task.tokenizer)
        self._problems: list[dict[str, Any]] = [{} for _ in range(num_envs)]
        self._turns: list[list[list[int]]] = [[] for _ in range(num_envs)]
        self._pad_id = pad
        self._tokens = torch.full((num_envs, task.max_length), pad)
        self._length = torch.zeros(num_envs, dtype=torch.int64)
        wide, turn, one = (num_envs, task.max_length), (num_envs, task.max_turn_tokens), (num_envs, 1)
        self.observation_spec = Composite(
            tokens=Categorical(size, shape=wide, dtype=torch.int64),
            token_mask=Binary(shape=wide, dtype=torch.bool),
            shape=(num_envs,),
        )
        self.action_spec = Categorical(size, shape=turn, dtype=torch.int64)
        self.reward_spec = Unbounded(shape=one, dtype=torch.float32)
        flags = {name: Binary(shape=one, dtype=torch.bool) for name in ("done", "terminated", "truncated")}
        self.full_done_spec = Composite(flags, shape=(num_envs,))

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDict:
        rows = torch.ones(self.batch_size, dtype=torch.bool)
        if tensordict is not None and "_reset" in tensordict.keys():
            rows = tensordict["_reset"].reshape(-1)
        chosen = rows.nonzero().squeeze(-1).tolist()
        problems = self.task.problems(len(chosen), self._problem_generator, self.split) if chosen else []
        for row, problem in zip(chosen, problems, strict=True):
            self._problems[row], self._turns[row] = problem, []
            self._tokens[row] = self._pad_id
            self._length[row] = 0
            self._append(row, problem["prompt"])
        none = torch.zeros(*self.batch_size, 1, dtype=torch.bool)
        flags = {name: none.clone() for name in ("done", "terminated", "truncated")}
        return TensorDict({**self._observation(), **flags}, batch_size=self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        action = tensordict["action"]
        stop = torch.isin(action, self._stops)
        finished = stop.any(-1)
        length = torch.where(finished, stop.int().argmax(-1) + 1, action.shape[-1])
        if isinstance(self.task, StopsAtStrings) and self.task.stop_strings is not None:
            cut = self.task.stop_strings.find(action)
            length, finished = torch.minimum(length, cut), finished | (cut <= length)
        for row, (ids, count) in enumerate(zip(action.tolist(), length.tolist(), strict=True)):
            self._turns[row].append(ids[:count])
            self._append(row, ids[:count])
        result = self.task.respond(self._problems, self._turns, finished)
        last = torch.tensor([len(turns) >= self.task.max_turns for turns in self._turns])
        terminated = result.done & finished
        truncated = ~terminated & (~finished | last)
        for row, over in enumerate((terminated | truncated).tolist()):
            if not over:
                self._append(row, result.reply[row])
        flags = {"done": terminated | truncated, "terminated": terminated, "truncated": truncated}
        out = {**self._observation(), "reward": result.reward[:, None]}
        return TensorDict(out | {k: v[:, None] for k, v in flags.items()}, batch_size=self.batch_size)

    def _append(self, row: int, ids: list[int]) -> None:
        start = int(self._length[row])
        self._tokens[row, start : start + len(ids)] = torch.tensor(ids, dtype=torch.int64)
        self._length[row] += len(ids)

    def _observation(self) -> dict[str, Tensor]:
        mask = torch.arange(self._tokens.shape[-1]) < self._length[:, None]
        return {"tokens": self._tokens.clone(), "token_mask": mask}

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self._problem_generator.manual_seed(seed)
