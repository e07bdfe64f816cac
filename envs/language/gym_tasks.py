"""Tasks of reasoning-gym by name, with its scorers' exceptions, hangs and partial credits handled."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import re
from typing import Any

from unified_rl.configurable import configurable
from unified_rl.envs.language.judging import Truncated
from unified_rl.envs.language.pool import PooledTask
from unified_rl.envs.language.scoring import FAILED, GuardedScorer, Score
from unified_rl.envs.language.tokenizer import choose_tokenizer
from unified_rl.envs.language.verdict import Verdict
from unified_rl.errors import ConfigError
from unified_rl.ranges import Count, Float32, HeldOut, Positive, Seed, Texts, ranged

MAX_EVALUATED = 500
"""Characters of a text that a scorer may hand to Python's parser."""

NONSENSE = "zzz"
GENERATION_LIMIT = 600.0
"""CPU seconds in which all items have to be generated."""

_NAME = re.compile(r"[^\W\d]\w+")
_DANGEROUS = re.compile(r"""["'`\\\[\]{}@:;=#]|\.\s*[^\W\d]""")
_FUNCTIONS = frozenset(
    ("sin", "cos", "tan", "exp", "log", "ln", "sqrt", "asin", "acos", "atan", "sinh", "cosh", "tanh", "pi")
)


@configurable
@ranged("env")
class ReasoningGym(PooledTask):
    """A data set of reasoning-gym (arXiv 2505.24760), scored by its own scorer in a process of its own.

    Some scorers evaluate the answer with Python's parser; there, only literals and plain arithmetic get through, and
    everything else scores 0. Several give a little credit to any wrong answer, so rewards are 0 or 1 by default.

    Args:
        dataset: its name, for example ``chain_sum``.
        size: items, generated at once.
        data_seed: of the items; separate from ``seed``, so that runs differ in their sampling and not in their data.
        options: further settings of the data set.
        threshold: scores from here on are rewarded with 1 and others with 0; null rewards the score itself.
        prompt_key: an entry of the item's metadata to use as the prompt (``expression``) instead of the question.
        template: the prompt; ``{question}`` is replaced.
        max_prompt_length: tokens; longer prompts are left out, with a warning that counts them.
        max_turn_tokens: budget of an answer.
        score_seconds: CPU time of one scoring, after which it is given up (counted as ``scorer_error``).
        batch_seconds: CPU time that the slow scorings of one batch of answers may take together.
        truncated_reward: of a truncated answer; null lets the scorer judge what there is of it.
        truncated: ``score``, ``zero`` or ``mask``, see :class:`~unified_rl.envs.language.base.LanguageTask`.
        stop: texts that end a turn too, of any length.
        tokenizer: a local folder; by default the characters of the items.
        held_out: share of prompts kept for evaluation.
        shuffle_rewards: the negative control of :class:`~unified_rl.envs.language.base.LanguageTask`.
        seed: of that control.

    Raises:
        ConfigError: the package is missing, an unknown name (the nearest is given) or option, or a scorer that rewards
            nonsense.
    """

    info_names = ("score", "scorer_error")

    def __init__(
        self,
        dataset: str = "chain_sum",
        size: Count = 1000,
        data_seed: Seed = 0,
        options: dict[str, Any] | None = None,
        threshold: float | None = 1.0,
        prompt_key: str | None = None,
        template: str = "{question}\n",
        max_prompt_length: Count = 256,
        max_turn_tokens: Count = 32,
        score_seconds: Positive = 5.0,
        batch_seconds: Positive = 10.0,
        truncated_reward: Float32 | None = 0.0,
        truncated: Truncated | None = None,
        stop: Texts | None = None,
        tokenizer: str | None = None,
        held_out: HeldOut = 0.1,
        shuffle_rewards: bool = False,
        seed: Seed = 0,
    ) -> None:
        self.threshold = threshold
        settings = {**(options or {}), "size": size, "seed": data_seed}
        self._request: dict[str, Any] = {"kind": "gym", "dataset": dataset, "options": settings}
        self._scorer = GuardedScorer({"kind": "gym_load"}, score_seconds, budget=batch_seconds)
        try:
            items, self.evaluates = _items(self._scorer, self._request, prompt_key)
        except ConfigError:
            self.close()
            raise
        problems = [
            {"text": template.replace("{question}", prompt), "index": index, "key": index, "solution": answer}
            for index, (prompt, answer) in enumerate(items)
        ]
        alphabet = "".join(
            sorted(set("".join(p["text"] + (p["solution"] or "") for p in problems)) | set("0123456789-"))
        )
        super().__init__(
            choose_tokenizer(tokenizer, alphabet),
            max_prompt_length=max_prompt_length,
            max_turn_tokens=max_turn_tokens,
            held_out=held_out,
            truncated_reward=truncated_reward,
            truncated=truncated,
            stop=stop,
            shuffle_rewards=shuffle_rewards,
            seed=seed,
        )
        self._fill(problems)
        self._refuse_unsound(dataset)

    def close(self) -> None:
        """Ends the scorer's process."""
        self._scorer.close()

    def _begin_batch(self) -> None:
        self._scorer.renew()

    def _judge(self, problem: dict[str, Any], text: str, turn: int) -> Verdict:
        value, failed = self._score(problem["index"], text)
        right = value >= (1.0 if self.threshold is None else self.threshold)
        reward = value if self.threshold is None else float(right)
        return Verdict(reward, correct=right, info={"score": value, "scorer_error": float(failed)})

    def _score(self, index: int, text: str) -> Score:
        if not text:
            return Score(0.0, False)  # some scorers credit an empty answer
        if self.evaluates and not is_plain(text):
            return FAILED
        return self._scorer.score(**self._request, index=index, text=text)

    def _refuse_unsound(self, dataset: str) -> None:
        for problem in self._pools["train"][:4]:
            if self._score(problem["index"], NONSENSE).value >= (self.threshold or 1.0):
                self.close()
                raise ConfigError(
                    f"the scorer of {dataset} rewards the answer {NONSENSE!r}: choose another env.dataset"
                )


def is_plain(text: str) -> bool:
    """Whether ``text`` may reach a scorer that evaluates it: a Python literal, or an expression that can call nothing.

    Quotes, brackets, attributes and assignments keep a text out; so do names beside parentheses, but for single letters
    and common functions.
    """
    if len(text) > MAX_EVALUATED:
        return False
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        calls = "(" in text and not set(_NAME.findall(text)) <= _FUNCTIONS
        return not calls and not _DANGEROUS.search(text)
    return True


def _items(scorer: GuardedScorer, settings: dict[str, Any], prompt_key: str | None) -> tuple[list[list[Any]], bool]:
    """Prompt and answer of every item, and whether the scorer evaluates."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ConfigError("env=reasoning_gym needs reasoning-gym: pip install 'unified-rl[tasks]'")
    name = settings["dataset"]
    made = scorer.ask(GENERATION_LIMIT, **{**settings, "kind": "gym_items"}, prompt_key=prompt_key, keep=True)
    if "items" in made:
        return made["items"], made["evaluates"]
    if "names" in made:
        near = difflib.get_close_matches(name, made["names"], 1, 0.0)
        raise ConfigError(f"reasoning-gym has no data set {name!r}; did you mean {near[0]!r}?")
    if "metadata" in made:
        held = ", ".join(made["metadata"])
        raise ConfigError(f"items of {name} have no metadata {prompt_key!r} for env.prompt_key; they have {held}")
    reason = made.get("refused") or made.get("error")
    raise ConfigError(f"reasoning-gym cannot generate {name}; check env.options and env.size ({reason})")
