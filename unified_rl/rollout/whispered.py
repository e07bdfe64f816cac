"""A policy that is shown more than its rows hold: tokens between a prompt and what is said to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.errors import ConfigError
from unified_rl.policies.generation import Generation
from unified_rl.protocols import Generates, LanguageEnv, require_solutions
from unified_rl.rollout.conversation import Problems, Told


class Whispered:
    """Shows each conversation some tokens behind its prompt, which nobody writes down.

    They count towards the budget of the answer, so that prompt, shown tokens and answer fit where prompt and answer do.

    Args:
        policy: who speaks.
        shown: token ids for each conversation, in their order; one turn each.
        prompts: tokens of each prompt, behind which they stand.
        left: tokens that each may still say.
    """

    def __init__(
        self, policy: Generates, shown: Sequence[Sequence[int]], prompts: Sequence[int], left: Sequence[int]
    ) -> None:
        self.policy, self.shown, self.prompts, self.left = policy, shown, prompts, left
        self.end_ids: tuple[int, ...] = getattr(policy, "end_ids", ())
        self._at = 0

    def generate(self, prompts: Sequence[Tensor], *, max_new_tokens: int, **options: Any) -> Generation:
        """As of the policy; an answer that is over its budget is cut, and not finished."""
        rows = slice(self._at, self._at + len(prompts))
        self._at = rows.stop
        asked = [
            torch.cat([ids[:end], ids.new_tensor(list(shown)), ids[end:]])
            for ids, shown, end in zip(prompts, self.shown[rows], self.prompts[rows], strict=True)
        ]
        left = torch.tensor(self.left[rows])
        out: Generation = self.policy.generate(asked, max_new_tokens=min(max_new_tokens, int(left.max())), **options)
        length = out.length.to("cpu")
        return replace(out, length=torch.minimum(length, left), finished=out.finished.to("cpu") & (length <= left))


def whisper(
    converse: Callable[..., Told],
    env: LanguageEnv,
    policy: Generates,
    problems: Problems,
    shown: Sequence[Sequence[int]],
    prefixes: Sequence[list[int]],
    score: Callable[[TensorDict], Tensor] | None,
) -> Told:
    """Conversations of one turn that saw something which their rows do not hold.

    Args:
        converse: ``(policy, problems, prefixes=) -> told``.
        env: the task.
        policy: who speaks.
        problems: ``B``.
        shown: to each.
        prefixes: what each answer begins with.
        score: log-probs ``[n, N]`` of rows under the policy that saw nothing, which stand in the place of those that
            were sampled with; None keeps the latter.
    """
    left = [env.max_turn_tokens - len(s) - len(b) for s, b in zip(shown, prefixes, strict=True)]
    seen = Whispered(policy, shown, [len(problem["prompt"]) for problem in problems], left)
    told = converse(seen, problems, prefixes=list(prefixes))
    talk = told[0]
    if score is not None:
        talk.log_prob = torch.where(talk.mask, score(talk.scored_again()).to(talk.log_prob.dtype), 0.0)
    return told


class Advice:
    """What is shown aside: the begin of a problem's solution, or the same text to all.

    Args:
        share: of the solution.
        style: of the solution.
        text: in its place, such as a written policy.
    """

    def __init__(self, share: float, style: str | None, text: str | None) -> None:
        self.share, self.style, self.text = share, style, text

    def check(self, env: LanguageEnv, setting: str, key: str = "text") -> None:
        """Refuses a task without solutions, and a text, the setting ``key``, that leaves nothing to say.

        Raises:
            ConfigError: either.
        """
        if self.text is None:
            require_solutions(env, setting, self.style)
            return
        ids = _encoded(env, self.text)
        if not 0 < len(ids) < env.max_turn_tokens:
            raise ConfigError(
                f"{setting}.{key} is {len(ids)} tokens, which count towards env.max_turn_tokens={env.max_turn_tokens}: "
                "raise it, so that something is left to say, or give a text of some tokens"
            )

    def of(self, env: LanguageEnv, problems: Problems) -> list[list[int]]:
        """For each problem; an answer of one token at least is left."""
        if self.text is not None:
            ids = _encoded(env, self.text)
            return [ids for _ in problems]
        solutions = require_solutions(env, "rollout", self.style).solve(problems, self.style)
        return [part_of(ids, self.share, env) for ids in solutions]


def part_of(ids: list[int], share: float, env: LanguageEnv) -> list[int]:
    """The first ``share`` of an answer, its end never among it, so that something is left to say."""
    return ids[: max(0, min(int(share * (len(ids) - 1)), env.max_turn_tokens - 1))]


def unended(ids: list[int], env: LanguageEnv) -> list[int]:
    """An answer without the token that ended it."""
    return ids[:-1] if ids and ids[-1] in env.stop_ids else ids


def followed(ids: list[int], asked: list[int], room: int) -> list[int]:
    """What is shown and a request behind it, in ``room`` tokens: the former makes room for the latter."""
    return (ids[: max(0, room - len(asked))] + asked)[:room]


def _encoded(env: LanguageEnv, text: str) -> list[int]:
    ids: list[int] = env.tokenizer.encode(text, add_special_tokens=False)
    return ids
