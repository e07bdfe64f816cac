"""Answers that fork: some of a group go on from uncertain tokens of the others."""

from __future__ import annotations

import torch

from unified_rl.configurable import configurable
from unified_rl.protocols import LanguageEnv
from unified_rl.ranges import Count, ranged
from unified_rl.rollout.context import Draw, Generate, put_some
from unified_rl.rollout.conversation import Problems, Told
from unified_rl.rollout.sources.base import require_one_turn


@configurable
@ranged()
class Forks:
    """A group is a forest: its first answers are chains, the others fork from these at their least likely tokens.

    A fork begins with what its chain said before such a token, with the log-probs that the chain said it with, which is
    learnt, and goes on by itself. Every chain forks about as often. TreeRL, 2506.11902.

    Args:
        chains: of a group; as many as it has answers, or more, leave no fork.
    """

    metrics = ("forked",)
    """As of :class:`~unified_rl.rollout.context.Hints`."""

    def __init__(self, chains: Count = 2) -> None:
        self.chains = chains

    def check(self, env: LanguageEnv, setting: str) -> None:
        """Refuses a task of several turns."""
        require_one_turn(env, setting)

    def __call__(
        self, env: LanguageEnv, problems: Problems, group_size: int, told: Told, generate: Generate, draw: Draw
    ) -> dict[str, float]:
        """As of :class:`~unified_rl.rollout.context.Context`."""
        talk = told[0]
        at, chains, begins, log_probs = [], [], [], []
        for row in range(len(problems)):
            fork = row % group_size - self.chains
            if fork < 0:
                continue
            chain = row - row % group_size + fork % self.chains
            said = talk.said[chain][0]
            known = talk.log_prob[chain, len(problems[chain]["prompt"]) :][: len(said)]
            places = known[1 : env.max_turn_tokens].argsort(stable=True) + 1  # a fork shares one token at least
            if len(places):
                place = int(places[(fork // self.chains) % len(places)])
                at.append(row)
                chains.append(chain)
                begins.append(said[:place])
                log_probs.append(known[:place].tolist())
        if at:
            found = generate([problems[row] for row in at], begins)
            for row, (chain, known_then) in enumerate(zip(chains, log_probs, strict=True)):
                columns = found[0].claim(row, known_then)
                found[0].version[row, columns] = talk.version[chain, columns]  # a teacher's tokens stay a teacher's
            put_some(told, torch.tensor(at), found)
        return {"rollout/forked": len(at) / len(problems)}
