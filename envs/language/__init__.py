"""Language environments: token tasks, verifiers, multi-turn tasks, data files."""

from unified_rl.envs.language.base import LanguageTask, Verdict
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
