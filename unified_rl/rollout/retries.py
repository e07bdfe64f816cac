"""What is said again inside one collection: behind hints of one's own, as a rephrasing, from where a try went wrong."""

from __future__ import annotations

from unified_rl.configurable import configurable
from unified_rl.errors import ConfigError
from unified_rl.protocols import LanguageEnv, require_solutions
from unified_rl.ranges import Count, Fraction, OpenUnit, UnitInterval, ranged
from unified_rl.rollout.context import Draw, Generate, put_some, until_solved
from unified_rl.rollout.conversation import Problems, Told
from unified_rl.rollout.sources.base import require_one_turn
from unified_rl.rollout.whispered import Advice, followed, part_of, unended


@configurable
@ranged()
class SelfHints:
    """Where every answer failed, the policy words a hint and answers again behind it, longer hints last. SAGE.

    For its hint the policy sees the solution; the hint is cut to a share of the solution's length and begins the
    answers of its group, as context that is masked out. 2602.03143.

    Args:
        shares: of the solution's length, tried in this order until an answer succeeds.
        ask: text behind the solution that asks for a hint.
        style: of the solution.
    """

    metrics = ("hinted", "unsolved")
    """As of :class:`~unified_rl.rollout.context.Hints`."""

    def __init__(
        self, shares: tuple[OpenUnit, ...] = (0.25, 0.5, 0.75), ask: str = "", style: str | None = None
    ) -> None:
        self.shares, self.ask, self.style = shares, ask, style

    def check(self, env: LanguageEnv, setting: str) -> None:
        """Refuses a task without solutions, or of several turns."""
        require_solutions(env, setting, self.style)
        require_one_turn(env, setting)

    def __call__(
        self, env: LanguageEnv, problems: Problems, group_size: int, told: Told, generate: Generate, draw: Draw
    ) -> dict[str, float]:
        """As of :class:`~unified_rl.rollout.context.Context`."""

        def again(chosen: Problems, share: float) -> Told:
            hints = self._hints(env, chosen[::group_size], share, generate)
            return generate(chosen, [hint for hint in hints for _ in range(group_size)])

        return until_solved(self.shares, problems, group_size, told, again)

    def _hints(self, env: LanguageEnv, problems: Problems, share: float, generate: Generate) -> list[list[int]]:
        """What the policy says of each solution, without its end."""
        solutions = require_solutions(env, "rollout.context", self.style).solve(problems, self.style)
        asked = env.tokenizer.encode(self.ask, add_special_tokens=False)
        shown = [followed(part_of(ids, 1.0, env), asked, env.max_turn_tokens - 1) for ids in solutions]
        talk = generate(problems, [[] for _ in problems], shown, scored=False)[0]
        bare = [unended(turns[0], env) for turns in talk.said]
        return [ids[: len(part_of(whole, share, env))] for ids, whole in zip(bare, solutions, strict=True)]


@configurable
@ranged()
class Rephrased:
    """The worst answers of weak groups make room for what the policy says with the solution in view. RePO, 2602.10819.

    Rows hold the bare prompt, and the log-probs of the policy that saw nothing. A rephrasing that earns no more than
    the answer whose place it would take is left.

    Args:
        rows: replaced of a group at most, its lowest returns.
        below: mean return of a group under which it is weak.
        share: of the solution that is shown.
        style: of the solution.
    """

    metrics = ("rephrased",)
    """As of :class:`~unified_rl.rollout.context.Hints`."""

    def __init__(
        self, rows: Count = 1, below: UnitInterval = 0.5, share: Fraction = 1.0, style: str | None = None
    ) -> None:
        self.rows, self.below = rows, below
        self.advice = Advice(share, style, None)

    def check(self, env: LanguageEnv, setting: str) -> None:
        """Refuses a task without solutions, or of several turns."""
        require_one_turn(env, setting)
        self.advice.check(env, setting)

    def __call__(
        self, env: LanguageEnv, problems: Problems, group_size: int, told: Told, generate: Generate, draw: Draw
    ) -> dict[str, float]:
        """As of :class:`~unified_rl.rollout.context.Context`."""
        total = told[0].reward.sum(-1)
        grouped = total.reshape(-1, group_size)
        weak = (grouped.mean(-1) < self.below).nonzero().squeeze(-1)
        if not len(weak):
            return {"rollout/rephrased": 0.0}
        worst = grouped[weak].argsort(dim=-1, stable=True)[:, : self.rows]
        at = (weak[:, None] * group_size + worst).flatten()
        chosen = [problems[row] for row in at.tolist()]
        found = generate(chosen, [[] for _ in chosen], self.advice.of(env, chosen))
        better = found[0].reward.sum(-1) > total[at]
        put_some(told, at, found, better)
        return {"rollout/rephrased": float(better.sum()) / len(problems)}


@configurable
@ranged()
class Retried:
    """Half of each group are second tries: a failed first one, in view, goes on again from where it went wrong. R3L.

    The first tries are the first half of a group as it was sampled. The second try to a failed one begins with a part
    of it, masked out, so that the loss is over what differs, and the row leaves out what the policy had in view: its
    log-probs are those of the policy that saw nothing. 2601.03715.

    Args:
        share: of the failed answer that a second try keeps; its rest is what went wrong.
        ask: text behind the failed answer that asks for a better one.
        threshold: return above which a first try needs no second.
    """

    metrics = ("retried",)
    """As of :class:`~unified_rl.rollout.context.Hints`."""

    def __init__(self, share: UnitInterval = 0.5, ask: str = "", threshold: float = 0.5) -> None:
        self.share, self.ask, self.threshold = share, ask, threshold

    def check(self, env: LanguageEnv, setting: str) -> None:
        """Refuses a task of several turns."""
        require_one_turn(env, setting)

    def check_group(self, group_size: int, setting: str) -> None:
        """Refuses groups of one, which have no second half.

        Raises:
            ConfigError: names the setting that makes groups.
        """
        if group_size < 2:
            raise ConfigError(f"{setting} splits groups in halves; set rollout.group_size to 2 or more")

    def __call__(
        self, env: LanguageEnv, problems: Problems, group_size: int, told: Told, generate: Generate, draw: Draw
    ) -> dict[str, float]:
        """As of :class:`~unified_rl.rollout.context.Context`."""
        half = group_size // 2
        failed = told[0].reward.sum(-1).reshape(-1, group_size)[:, :half] <= self.threshold
        group, number = failed.nonzero(as_tuple=True)
        if not len(group):
            return {"rollout/retried": 0.0}
        first = group * group_size + number
        asked = env.tokenizer.encode(self.ask, add_special_tokens=False)
        bare = [unended(told[0].said[row][0], env) for row in first.tolist()]
        kept = [part_of([*ids, 0], self.share, env) for ids in bare]
        room = [env.max_turn_tokens - 1 - len(own) for own in kept]
        seen = [followed(ids, asked, left) for ids, left in zip(bare, room, strict=True)]
        chosen = [problems[row] for row in first.tolist()]
        put_some(told, first + half, generate(chosen, kept, seen))
        return {"rollout/retried": len(first) / len(problems)}
