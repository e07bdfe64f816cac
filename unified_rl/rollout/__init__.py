"""Where experience comes from: batched control rollouts and language-model rollouts."""

from unified_rl.interop.torchrl_env import TorchRLControlEnv, as_environment
from unified_rl.protocols import ControlEnv, LanguageEnv, StepResult, TurnResult
from unified_rl.rollout.control import ControlRollout
from unified_rl.rollout.conversation import converse
from unified_rl.rollout.demonstrations import DemonstrationRollout, StoredRollout
from unified_rl.rollout.language import LanguageRollout

__all__ = [
    "ControlEnv",
    "ControlRollout",
    "DemonstrationRollout",
    "LanguageEnv",
    "LanguageRollout",
    "StepResult",
    "StoredRollout",
    "TorchRLControlEnv",
    "TurnResult",
    "as_environment",
    "converse",
]
