"""Conversations of a policy with a task: sampled turn by turn, answered and judged by the environment."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.errors import NonFiniteError, RolloutError, UnifiedRLError
from unified_rl.interop.words import one_line
from unified_rl.protocols import Generates, KnowsItsEnds, LanguageEnv, StopsAtStrings, TurnResult

Problems = list[dict[str, Any]]
SCORES = "rewards/"
"""Begins the names of what single reward functions gave: added up over turns, NaN where one gave nothing."""
UNKNOWN = -1
"""In place of the version of weights that did not change while they sampled."""
COLUMNS = ("tokens", "mask", "log_prob", "version", "step_index", "reward", "step_mask", "terminated", "truncated")
NUMBERS = ("length", "begun", "advised")


class Conversations:
    """Records of ``B`` conversations under construction: right-padded tensors filled turn by turn."""

    def __init__(self, problems: list[dict[str, Any]], width: int, turns: int, pad_id: int) -> None:
        rows = len(problems)
        self.problems = problems
        self.tokens = torch.full((rows, width), pad_id, dtype=torch.int64)
        self.mask = torch.zeros(rows, width, dtype=torch.bool)
        self.log_prob = torch.zeros(rows, width)
        self.version = torch.full((rows, width), UNKNOWN, dtype=torch.int64)
        self.step_index = torch.zeros(rows, width, dtype=torch.int64)
        self.reward = torch.zeros(rows, turns)
        self.step_mask = torch.zeros(rows, turns, dtype=torch.bool)
        self.terminated = torch.zeros(rows, turns, dtype=torch.bool)
        self.truncated = torch.zeros(rows, turns, dtype=torch.bool)
        self.length = torch.tensor([len(p["prompt"]) for p in problems])
        self.begun = torch.zeros(rows)
        self.advised = torch.zeros(rows)
        self.said: list[list[list[int]]] = [[] for _ in problems]
        for row, problem in enumerate(problems):
            self.tokens[row, : len(problem["prompt"])] = torch.tensor(problem["prompt"])

    def contexts(self, rows: Tensor) -> list[Tensor]:
        """The token ids so far of some rows."""
        return [self.tokens[row, : self.length[row]] for row in rows.tolist()]

    def add_turn(
        self, rows: Tensor, turn: int, tokens: Tensor, log_prob: Tensor, length: Tensor, version: Tensor | None = None
    ) -> None:
        """Appends sampled turns ``tokens [b, m]`` of true ``length [b]`` to ``rows``; ``version [b, m]`` where told."""
        steps = torch.arange(tokens.shape[1])
        real = steps < length[:, None]
        where_row = rows[:, None].expand_as(tokens)[real]
        where_column = (self.length[rows][:, None] + steps)[real]
        self.tokens[where_row, where_column] = tokens[real]
        self.mask[where_row, where_column] = True
        self.log_prob[where_row, where_column] = log_prob[real]
        if version is not None:
            self.version[where_row, where_column] = version[real]
        beyond = torch.arange(self.tokens.shape[1]) >= self.length[rows][:, None]
        self.step_index[rows] = torch.where(beyond, turn, self.step_index[rows])
        self.length[rows] += length
        for row, ids, count in zip(rows.tolist(), tokens.tolist(), length.tolist(), strict=True):
            self.said[row].append(ids[:count])

    def begin_answers(self, prefixes: list[list[int]]) -> None:
        """Puts what each first answer begins with behind its prompt, masked out."""
        for row, ids in enumerate(prefixes):
            self.add_reply(row, ids)
            self.begun[row] = len(ids)
            if ids:
                self.step_index[row] = 0

    def claim(self, row: int, log_probs: Sequence[float]) -> slice:
        """Makes what a first answer begins with part of what was said, with these log-probs; returns its columns."""
        start = len(self.problems[row]["prompt"])
        columns = slice(start, start + len(log_probs))
        self.begun[row] = len(log_probs)
        self.mask[row, columns] = True
        self.log_prob[row, columns] = torch.tensor(log_probs)
        return columns

    def replace(self, rows: Tensor, others: Conversations) -> None:
        """Puts other conversations in the place of ``rows``."""
        for name in (*COLUMNS, *NUMBERS):
            getattr(self, name)[rows] = getattr(others, name)
        for row, said in zip(rows.tolist(), others.said, strict=True):
            self.said[row] = said

    def scored_again(self, every: int = 1) -> TensorDict:
        """Copies of every n-th row, as much of the record as scoring needs: tokens, masks, log-probs."""
        width = torch.arange(self.tokens.shape[1])
        found = {
            "tokens": self.tokens,
            "token_mask": width < self.length[:, None],
            "mask": self.mask,
            "behavior_log_prob": self.log_prob,
        }
        rows = {name: value[::every].clone() for name, value in found.items()}
        return TensorDict(rows, batch_size=[len(rows["tokens"])])

    def add_reply(self, row: int, ids: list[int]) -> None:
        """Appends the environment's text, masked out."""
        start = int(self.length[row])
        self.tokens[row, start : start + len(ids)] = torch.tensor(ids, dtype=torch.int64)
        self.length[row] += len(ids)


Told = tuple[Conversations, dict[str, Tensor]]
"""Conversations and the environment's last numbers ``[B]`` of each."""


def put(told: Told, rows: Tensor, others: Told) -> None:
    """Puts other conversations, and the environment's numbers of them, in the place of ``rows``."""
    told[0].replace(rows, others[0])
    for key, value in others[1].items():
        told[1][key][rows] = value


def ordered(told: Told, order: Tensor) -> Told:
    """Conversations in another order, ``[B]``; their problems stay with them."""
    talk, info = told
    out = copy(talk)
    for name in (*COLUMNS, *NUMBERS):
        setattr(out, name, getattr(talk, name)[order])
    out.problems = [talk.problems[row] for row in order.tolist()]
    out.said = [talk.said[row] for row in order.tolist()]
    return out, {key: value[order] for key, value in info.items()}


def converse(
    env: LanguageEnv,
    policy: Generates,
    problems: list[dict[str, Any]],
    generator: torch.Generator | None,
    *,
    greedy: bool = False,
    group_size: int = 1,
    prefixes: list[list[int]] | None = None,
    at_once: int | None = None,
) -> Told:
    """Runs every conversation to its end.

    Args:
        env: the task.
        policy: the language model.
        problems: ``B`` problems; runs of ``group_size`` equal ones let the first turn share the prompt's encoding.
        generator: stream of the sampler; unused when ``greedy``.
        greedy: take the most likely token.
        group_size: equal consecutive problems.
        prefixes: what each first answer begins with; it is judged with the rest, and its tokens are masked out.
        at_once: conversations that are sampled together, so many whole groups as fit and at least one; all by default.

    Returns:
        The conversations and the environment's last ``info`` of each, every entry ``[B]``.
    """
    size = len(problems) if at_once is None else max(1, at_once // group_size) * group_size
    told = [
        _converse(
            env,
            policy,
            problems[start : start + size],
            generator,
            greedy=greedy,
            group_size=group_size,
            prefixes=None if prefixes is None else prefixes[start : start + size],
        )
        for start in range(0, len(problems), max(1, size))
    ]
    out = told[0] if len(told) == 1 else joined(told)
    out[0].problems = problems  # the caller's list: whoever replaces conversations replaces their problems in it
    return out


def joined(told: Sequence[Told]) -> Told:
    """Conversations of several calls as one."""
    talks = [talk for talk, _ in told]
    out = copy(talks[0])
    for name in (*COLUMNS, *NUMBERS):
        setattr(out, name, torch.cat([getattr(talk, name) for talk in talks]))
    out.problems = [problem for talk in talks for problem in talk.problems]
    out.said = [said for talk in talks for said in talk.said]
    keys = dict.fromkeys(key for _, info in told for key in info)
    missing = [torch.zeros(len(talk.problems)) for talk in talks]
    return out, {k: torch.cat([i.get(k, z) for (_, i), z in zip(told, missing, strict=True)]) for k in keys}


@torch.no_grad()
def _converse(
    env: LanguageEnv,
    policy: Generates,
    problems: list[dict[str, Any]],
    generator: torch.Generator | None,
    *,
    greedy: bool,
    group_size: int,
    prefixes: list[list[int]] | None,
) -> Told:
    """One call of :func:`converse` for conversations that are sampled together."""
    talk = Conversations(problems, env.max_length, env.max_turns, env.tokenizer.pad_token_id)
    active = torch.arange(len(problems))
    info: dict[str, Tensor] = {}
    begun = torch.tensor([len(prefix) for prefix in prefixes or [[]] * len(problems)], dtype=torch.int64)
    if prefixes is not None:
        talk.begin_answers(prefixes)
    ends = _ends(env, policy)
    for turn in range(env.max_turns):
        shared = group_size if turn == 0 else 1
        out = policy.generate(
            talk.contexts(active[::shared]),
            max_new_tokens=env.max_turn_tokens - (int(begun.min()) if turn == 0 else 0),
            generator=generator,
            greedy=greedy,
            samples_per_prompt=shared,
            **ends,
        )
        tokens, log_prob = out.tokens.to("cpu"), out.log_prob.to("cpu")
        length, finished = out.length.to("cpu"), out.finished.to("cpu")
        if turn == 0:  # what an answer begins with counts towards its own budget alone
            left = env.max_turn_tokens - begun
            length, finished = torch.minimum(length, left), finished & (length <= left)
        version: Tensor | None = getattr(out, "version", None)
        talk.add_turn(active, turn, tokens, log_prob, length, None if version is None else version.to("cpu"))
        if prefixes is not None and turn == 0:
            talk.said = [[prefix + said[0]] for prefix, said in zip(prefixes, talk.said, strict=True)]
        rows = active.tolist()
        result = answered(env, [problems[r] for r in rows], [talk.said[r] for r in rows], finished)
        talk.reward[active, turn] = result.reward
        talk.step_mask[active, turn] = True
        last = turn + 1 == env.max_turns
        over = result.done | ~finished
        talk.terminated[active, turn] = result.done & finished
        talk.truncated[active, turn] = ~finished | (~result.done if last else torch.zeros_like(finished))
        for key, value in result.info.items():
            told = info.setdefault(key, torch.zeros(len(problems)))
            told[active] = told[active] + value.float() if key.startswith(SCORES) else value.float()
        for row, ids, stop in zip(rows, result.reply, over.tolist(), strict=True):
            if not stop and not last:
                talk.add_reply(row, ids)
        active = active[~over]
        if last or not len(active):
            break
    return talk, info


def _ends(env: LanguageEnv, policy: Generates) -> dict[str, Any]:
    """What ends a turn: ids of the task and of the policy, and the task's texts where it has some."""
    own = policy.end_ids if isinstance(policy, KnowsItsEnds) else ()
    texts = env.stop_strings if isinstance(env, StopsAtStrings) else None
    return {"stop_ids": sorted({*env.stop_ids, *own})} | ({} if texts is None else {"stop_strings": texts})


def answered(env: LanguageEnv, problems: Problems, turns: list[list[list[int]]], finished: Tensor) -> TurnResult:
    """The environment's answer to the latest turns, checked.

    Raises:
        RolloutError: it raised, or is no :class:`~unified_rl.protocols.TurnResult` of these conversations.
        NonFiniteError: a reward that is not finite.
    """
    name = f"{type(env).__name__}.respond"
    try:
        result: Any = env.respond(problems, turns, finished)
    except UnifiedRLError:
        raise
    except (Exception, SystemExit) as error:
        raise RolloutError(f"{name} raised {one_line(error)[:300]}") from error
    fault = _fault(result, len(problems))
    if fault:
        raise RolloutError(f"{name}: {fault}")
    bad = ~torch.isfinite(result.reward)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        value, prompt = float(result.reward[row]), problems[row].get("prompt_id")
        raise NonFiniteError(f"{name}: reward {value} in conversation {row} of this turn (prompt {prompt})")
    out: TurnResult = result
    return out


def _fault(result: Any, rows: int) -> str:
    """What is wrong with an environment's answer to ``rows`` conversations; empty where nothing is."""
    if not isinstance(result, TurnResult):
        return f"returned {result!r:.60}, not a TurnResult"
    info = {f"info[{key!r}]": value for key, value in result.info.items()}
    for name, value in {"reward": result.reward, "done": result.done, **info}.items():
        if not isinstance(value, Tensor):
            return f"{name} is {type(value).__name__}, expected a tensor"
        if value.shape != (rows,):
            return f"{name} has shape {list(value.shape)}, expected {[rows]}"
    if result.done.dtype != torch.bool:
        return f"done is {str(result.done.dtype).removeprefix('torch.')}, expected bool"
    if len(result.reply) != rows:
        return f"reply has {len(result.reply)} entries, expected {rows}"
    for row, reply in enumerate(result.reply):
        if not isinstance(reply, list):
            return f"reply {row} is {type(reply).__name__}, expected a list of token ids"
    return ""


def summary(talk: Conversations, info: dict[str, Tensor]) -> dict[str, float]:
    """Means over the conversations, ``rollout/reward`` and so on, and quantiles of their rewards.

    ``rollout/entropy_estimate`` is the mean of minus the log-prob of every sampled token: an unbiased estimate, in nats
    a token, of the entropy of the distribution that sampled them, for which no logits are read again.
    """
    reward = scored_rewards(talk, info)
    low, middle, high = reward.quantile(torch.tensor([0.1, 0.5, 0.9])) if len(reward) else torch.zeros(3)
    out = {
        "rollout/reward": reward.mean() if len(reward) else torch.zeros(()),
        "rollout/reward_p10": low,
        "rollout/reward_p50": middle,
        "rollout/reward_p90": high,
        "rollout/entropy_estimate": -talk.log_prob.sum() / talk.mask.sum().clamp(min=1),
        "rollout/length": talk.mask.sum(-1).float().mean(),
        "rollout/turns": talk.step_mask.sum(-1).float().mean(),
        "rollout/truncated": talk.truncated.any(-1).float().mean(),
    }
    out |= {f"rollout/{key}": value for key, value in means(info).items()}
    return {key: float(value) for key, value in out.items()}


def scored_rewards(talk: Conversations, info: dict[str, Tensor]) -> Tensor:
    """The returns of the conversations that have one, ``[n]``."""
    total = talk.reward.sum(-1)
    return total if "scored" not in info else total[info["scored"] > 0]


def means(info: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean of each of the environment's numbers, scalars; of reward functions also the spread (``NAME_std``).

    Each is over the conversations of which it is known, and left out where there is none: NaN is what nobody knows.
    """
    out: dict[str, Tensor] = {}
    for key, value in info.items():
        given = value[~value.isnan()]
        if len(given) or not (len(value) or key.startswith(SCORES)):
            out[key] = given.mean()
            if key.startswith(SCORES) and not key.endswith("_none"):
                out[f"{key}_std"] = given.std(correction=0)
    return out
