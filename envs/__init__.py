"""Environments: control (MuJoCo, Gymnasium) and language (tokens, verifiers, turns)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if not __name__.startswith("unified_rl."):
    raise ImportError(f"import this package as unified_rl.{__name__}, not as {__name__}; run 'make install' first")

from unified_rl.lazy import lazy

if TYPE_CHECKING:
    from unified_rl.envs.control import ActionChunk, BatchedMujocoEnv, ControlEnvBase, GymnasiumEnv, TwoRouteEnv
    from unified_rl.envs.language import (
        Calculator,
        ChainMod,
        Countdown,
        GuessNumber,
        JsonlProblems,
        LanguageTask,
        ReasoningGym,
        Verdict,
    )

_CONTROL = ("ActionChunk", "BatchedMujocoEnv", "ControlEnvBase", "GymnasiumEnv", "TwoRouteEnv")
_LANGUAGE = (
    "Calculator",
    "ChainMod",
    "Countdown",
    "GuessNumber",
    "JsonlProblems",
    "LanguageTask",
    "ReasoningGym",
    "Verdict",
)

__all__ = [
    "ActionChunk",
    "BatchedMujocoEnv",
    "Calculator",
    "ChainMod",
    "ControlEnvBase",
    "Countdown",
    "GuessNumber",
    "GymnasiumEnv",
    "JsonlProblems",
    "LanguageTask",
    "ReasoningGym",
    "TwoRouteEnv",
    "Verdict",
]

__getattr__, __dir__ = lazy(
    __name__,
    {**dict.fromkeys(_CONTROL, f"{__name__}.control"), **dict.fromkeys(_LANGUAGE, f"{__name__}.language")},
)
