"""Language environments: token tasks, verifiers, multi-turn tasks, data files. Parts are imported when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unified_rl.lazy import lazy

if TYPE_CHECKING:
    from unified_rl.envs.language.base import LanguageTask
    from unified_rl.envs.language.calculator import Calculator
    from unified_rl.envs.language.chain_mod import ChainMod
    from unified_rl.envs.language.codec import Codec, Segment
    from unified_rl.envs.language.countdown import Countdown
    from unified_rl.envs.language.guess_number import GuessNumber
    from unified_rl.envs.language.gym_tasks import ReasoningGym
    from unified_rl.envs.language.jsonl import JsonlProblems
    from unified_rl.envs.language.tokenizer import (
        character_tokenizer,
        choose_tokenizer,
        load_tokenizer,
        train_bpe,
        with_padding,
    )
    from unified_rl.envs.language.turn_env import LanguageTurnEnv
    from unified_rl.envs.language.verdict import Verdict

_PLACES = {
    "Calculator": "calculator",
    "ChainMod": "chain_mod",
    "Codec": "codec",
    "Countdown": "countdown",
    "GuessNumber": "guess_number",
    "JsonlProblems": "jsonl",
    "LanguageTask": "base",
    "LanguageTurnEnv": "turn_env",
    "ReasoningGym": "gym_tasks",
    "Segment": "codec",
    "Verdict": "verdict",
    "character_tokenizer": "tokenizer",
    "choose_tokenizer": "tokenizer",
    "load_tokenizer": "tokenizer",
    "train_bpe": "tokenizer",
    "with_padding": "tokenizer",
}
"""The module of each public name."""

__all__ = [
    "Calculator",
    "ChainMod",
    "Codec",
    "Countdown",
    "GuessNumber",
    "JsonlProblems",
    "LanguageTask",
    "LanguageTurnEnv",
    "ReasoningGym",
    "Segment",
    "Verdict",
    "character_tokenizer",
    "choose_tokenizer",
    "load_tokenizer",
    "train_bpe",
    "with_padding",
]

__getattr__, __dir__ = lazy(__name__, {name: f"{__name__}.{module}" for name, module in _PLACES.items()})
