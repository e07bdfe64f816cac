"""The policy as a judge: what it is asked about answers, and rewards that are its own verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from unified_rl.configurable import configurable
from unified_rl.errors import ConfigError
from unified_rl.protocols import LanguageEnv
from unified_rl.ranges import Count, UnitInterval, ranged
from unified_rl.rollout.context import Draw, Generate
from unified_rl.rollout.conversation import Problems, Told
from unified_rl.rollout.sources.base import RowSource, require_one_turn
from unified_rl.rollout.whispered import unended
from unified_rl.units import COUNTED

ASK = "\nIs this answer right? Say yes or no: "
YES, NO = "yes", "no"
SELF_JUDGED = "self_judged"
"""Entry of problems whose answers nobody but the policy judged in this collection."""


class Question:
    """What is asked behind an answer, and how a verdict is read.

    Args:
        ask: text behind the answer; of several answers, behind each.
        yes, no: what a verdict begins with.
    """

    def __init__(self, ask: str, yes: str, no: str) -> None:
        self.ask, self.yes, self.no = ask, yes, no

    def check(self, env: LanguageEnv, setting: str, answers: int = 1) -> None:
        """Refuses several turns, verdicts that the tokenizer cannot say or tell apart, and questions without room.

        Args:
            env: the task.
            setting: whose question it is.
            answers: that are asked about together.

        Raises:
            ConfigError: names the setting.
        """
        require_one_turn(env, setting)
        for name, text in (("yes", self.yes), ("no", self.no)):
            if not text.strip() or env.tokenizer.decode(self._ids(env, text)).strip() != text.strip():
                raise ConfigError(
                    f"{setting}.{name}={text!r} is no text that the task's tokenizer can say; choose another"
                )
        if self.yes.startswith(self.no) or self.no.startswith(self.yes):
            raise ConfigError(f"{setting}.yes={self.yes!r} and no={self.no!r} begin alike; choose others")
        asked = len(self._ids(env, self.ask))
        if answers * (asked + 1) + 1 > env.max_turn_tokens:
            raise ConfigError(
                f"{setting}.ask is {asked} tokens, which leave no room for {answers} answer(s) and a verdict in "
                f"env.max_turn_tokens={env.max_turn_tokens}: raise it"
            )

    def about(self, env: LanguageEnv, answers: Sequence[Sequence[int]]) -> list[int]:
        """The end of each answer, as much as there is room for, and the question: what a verdict begins with."""
        asked = self._ids(env, self.ask)
        room = (env.max_turn_tokens - 1) // len(answers) - len(asked)
        return [token for ids in answers for token in (*ids[-room:], *asked)]

    def verdict(self, env: LanguageEnv, said: Sequence[int]) -> bool | None:
        """Yes, no, or None of neither."""
        text = env.tokenizer.decode(list(said)).strip()
        return True if text.startswith(self.yes) else False if text.startswith(self.no) else None

    @staticmethod
    def _ids(env: LanguageEnv, text: str) -> list[int]:
        ids: list[int] = env.tokenizer.encode(text, add_special_tokens=False)
        return ids


@configurable
@ranged()
class SelfJudged:
    """Answers to some prompts earn what the policy itself says of them, as if nobody else knew. URPO, 2507.17515.

    Args:
        of: share of the groups, whose answers the task's own verifier does not reward.
        verdicts: on each answer; it earns the share of them that is a yes.
        ask, yes, no: see :class:`Question`.
    """

    judges_itself = True
    """Its rewards are one number, which is not the environment's."""
    metrics = ("self_judged", "self_reward")
    """As of :class:`~unified_rl.rollout.context.Hints`."""

    def __init__(
        self, of: UnitInterval = 0.5, verdicts: Count = 1, ask: str = ASK, yes: str = YES, no: str = NO
    ) -> None:
        self.of, self.verdicts, self.question = of, verdicts, Question(ask, yes, no)

    def check(self, env: LanguageEnv, setting: str) -> None:
        """As of :meth:`Question.check`."""
        self.question.check(env, setting)

    def check_sources(self, sources: Mapping[str, RowSource]) -> None:
        """Refuses sources whose rows are compared with answers that another judged.

        Raises:
            ConfigError: names the source, and what works.
        """
        for name, source in sources.items():
            if getattr(source, "joins", True) or getattr(source, "judged_apart", False):
                raise ConfigError(
                    f"rollout.context lets the policy judge answers to some prompts, and rollout.sources.{name} puts "
                    "others, which the task's verifier judged, into one group with such: leave one of them out, or use "
                    "a source of groups of its own, such as unified_rl.rollout.sources.Judgements or Windows"
                )

    def __call__(
        self, env: LanguageEnv, problems: Problems, group_size: int, told: Told, generate: Generate, draw: Draw
    ) -> dict[str, float]:
        """As of :class:`~unified_rl.rollout.context.Context`; problems are drawn, so the first groups are any."""
        rows = round(self.of * len(problems) / group_size) * group_size
        if not rows:
            return {"rollout/self_judged": 0.0, "rollout/self_reward": 0.0}
        talk = told[0]
        bare = [unended(said[0], env) for said in talk.said[:rows]]
        asked = [self.question.about(env, [ids]) for ids in bare for _ in range(self.verdicts)]
        said = generate([problem for problem in problems[:rows] for _ in range(self.verdicts)], asked)[0].said
        yes = [self.question.verdict(env, one[0][len(begin) :]) is True for one, begin in zip(said, asked, strict=True)]
        firsts = range(0, len(problems), group_size)
        known = [{**problems[row], SELF_JUDGED: row < rows} for row in firsts]
        problems[:] = [problem for problem in known for _ in range(group_size)]  # a group has one problem
        earned = talk.reward.new_tensor(yes).reshape(rows, self.verdicts).mean(-1)
        self._earns(env, told, earned)
        return {"rollout/self_judged": rows / len(problems), "rollout/self_reward": float(earned.mean())}

    @staticmethod
    def _earns(env: LanguageEnv, told: Told, earned: Tensor) -> None:
        """Gives the first conversations what they ``earned [n]``, also as the number of the one reward function."""
        talk, info = told
        rows = len(earned)
        talk.reward[:rows] = earned.unsqueeze(-1)  # one turn
        for name, weight in zip(getattr(env, "reward_names", ()), getattr(env, "reward_weights", (1.0,)), strict=False):
            info[name][:rows] = earned / (weight or 1.0)
        if COUNTED in info:
            info[COUNTED][:rows] = 1.0
