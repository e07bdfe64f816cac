"""The adapter of reasoning-gym, where it is installed: rewards that can be trusted."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from unified_rl.envs.language import ReasoningGym
from unified_rl.envs.language.gym_tasks import _items, is_plain
from unified_rl.errors import ConfigError

installed = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="the extra 'tasks' is not installed"
)


@pytest.fixture(scope="module")
def countdown() -> Iterator[ReasoningGym]:
    env = ReasoningGym(
        "countdown", size=12, max_prompt_length=1000, max_turn_tokens=64, held_out=0.3, score_seconds=0.5
    )
    yield env
    env.close()


def scores(env: ReasoningGym, *texts: str) -> list[tuple[float, float, float]]:
    """Reward, the scorer's own score and whether it failed, of answers to the first training problem."""
    problem: dict[str, Any] = {"split": "train", **env._pools["train"][0]}
    turns = [[[*ids, env.tokenizer.eos_token_id]] for ids in env.codec.encode(texts)]
    result = env.respond([problem] * len(texts), turns, torch.ones(len(texts), dtype=torch.bool))
    columns = (result.reward, result.info["score"], result.info["scorer_error"])
    return list(zip(*(column.tolist() for column in columns), strict=True))


@installed
def test_partial_credit_for_wrong_answers_is_no_reward(countdown: ReasoningGym) -> None:
    right, wrong, empty = scores(countdown, countdown._pools["train"][0]["solution"], "1", "")
    assert right == (1.0, 1.0, 0.0)
    assert wrong[0] == 0.0 and 0.0 < wrong[1] < 0.1  # the trap: a wrong answer has a positive score
    assert empty == (0.0, 0.0, 0.0)
    countdown.threshold = None
    assert scores(countdown, "1")[0][0] == wrong[1]
    countdown.threshold = 1.0


@installed
def test_code_does_not_reach_a_scorer_that_evaluates(countdown: ReasoningGym, tmp_path: Path) -> None:
    assert countdown.evaluates
    name = str(tmp_path / "made")
    assert scores(countdown, f"open('{name}','w')", "9**9**9**9**9") == [(0.0, 0.0, 1.0)] * 2
    assert not Path(name).exists()


@installed
def test_items_split_and_repeat(countdown: ReasoningGym) -> None:
    again = ReasoningGym("countdown", size=12, max_prompt_length=1000, max_turn_tokens=64, held_out=0.3, seed=5)
    assert again._pools == countdown._pools
    sizes = again.pool_sizes()
    assert sizes["train"] + sizes["eval"] == 12 and min(sizes.values()) > 0
    rows = again.demonstrations(3, torch.Generator().manual_seed(0))
    assert bool(rows["mask"].any(-1).all())
    again.close()


@installed
def test_bad_names_and_options_are_refused(countdown: ReasoningGym) -> None:
    def ask(name: str, prompt_key: str | None = None, **options: Any) -> None:
        _items(countdown._scorer, {"dataset": name, "options": {"size": 2, "seed": 0, **options}}, prompt_key)

    with pytest.raises(ConfigError, match="did you mean 'chain_sum'"):
        ask("chain_sums")
    with pytest.raises(ConfigError, match=r"env\.options.*min_termz"):
        ask("chain_sum", min_termz=2)
    with pytest.raises(ConfigError, match="expression"):
        ask("chain_sum", prompt_key="expresion")
    ask("chain_sum", prompt_key="expression")


@installed
def test_a_scorer_that_rewards_nonsense_is_refused() -> None:
    with pytest.raises(ConfigError, match="zzz"):
        ReasoningGym("game_of_life_halting", size=4, data_seed=1, max_prompt_length=5000, held_out=0.0)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"unified-rl\[tasks\]"):
        ReasoningGym()


@pytest.mark.parametrize(
    "text", ["3*(4+5)", "x**2 + C", "exp(x)*sin(x)", "[[1, 0], [0, 1]]", "['a']", "_ Q _\nQ _ _", "ABBA", "-1.5"]
)
def test_arithmetic_literals_and_plain_words_are_plain(text: str) -> None:
    assert is_plain(text)


@pytest.mark.parametrize(
    "text",
    [
        "open('x')",
        "__import__('os')",
        "exit()",
        "().__class__",
        "a.b",
        "[x for x in y]",
        'f"{1}"',
        "lambda: 1",
        "x" * 501,
        "a[0]",
    ],
)
def test_what_could_act_is_not_plain(text: str) -> None:
    assert not is_plain(text)
