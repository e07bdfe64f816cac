"""Engines that sample a rollout's answers: our own loop, transformers, servers of vLLM and SGLang."""

from unified_rl.policies.engines.protocol import Answer, Call, Engine
from unified_rl.policies.engines.sampler import Sampler, make_engine
from unified_rl.policies.engines.settings import EngineSettings, check_engine_settings

__all__ = ["Answer", "Call", "Engine", "EngineSettings", "Sampler", "check_engine_settings", "make_engine"]
