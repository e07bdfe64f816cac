"""unified-rl: one off-policy correction and one replay for language models and robots.

Everything that a script needs is here by name and is imported when it is first used::

    import unified_rl as ur

    run = ur.train(["env=two_route", "policy=flow", "correction=tis"])
    trainer = ur.assemble("half_cheetah", "gaussian", agent="ppo", steps=100_000)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unified_rl.lazy import lazy

__version__ = "0.1.0"

if TYPE_CHECKING:
    from unified_rl.agents.actor_critic import ActorCritic
    from unified_rl.agents.behavior_cloning import BehaviorCloning
    from unified_rl.agents.policy_gradient import PolicyGradient
    from unified_rl.commands import (
        Run,
        compare,
        corrections,
        data,
        doctor,
        evaluate,
        export,
        lab,
        launch,
        load_policy,
        memory_plan,
        recipes,
        resume,
        samples,
        sweep,
        train,
        verify,
    )
    from unified_rl.config import compose
    from unified_rl.correction import Correction, correction_names, effective_sample_size, load_correction
    from unified_rl.envs.control import ActionChunk, ControlEnvBase, GymnasiumEnv
    from unified_rl.envs.language import LanguageTask, Verdict
    from unified_rl.errors import (
        CheckpointError,
        ConfigError,
        DamageError,
        DataError,
        EnvError,
        NonFiniteError,
        PeerError,
        RecordError,
        UnifiedRLError,
    )
    from unified_rl.policies.autoregressive import AutoregressivePolicy
    from unified_rl.policies.base import Policy
    from unified_rl.policies.causal_lm import CausalLM
    from unified_rl.policies.critics import QEnsemble, ValueCritic
    from unified_rl.policies.diffusion import DiffusionPolicy
    from unified_rl.policies.flow import FlowPolicy
    from unified_rl.policies.gaussian import GaussianPolicy
    from unified_rl.protocols import StepResult
    from unified_rl.replay import (
        Buckets,
        Fresh,
        Group,
        Mixture,
        Priority,
        Recency,
        Replay,
        Sampler,
        Segment,
        Softmax,
        StalenessBounded,
        Uniform,
        WithoutReplacement,
        read_rows,
    )
    from unified_rl.returns import gae, group_advantage, monte_carlo, n_step, q_lambda, retrace, td_lambda, vtrace
    from unified_rl.rollout import ControlRollout, LanguageRollout
    from unified_rl.spaces import Space
    from unified_rl.training.assemble import Assembled, assemble, make_env
    from unified_rl.training.callbacks import Callback
    from unified_rl.units import Source, Steps, UnitLogProb, validate_record

PUBLIC: dict[str, tuple[str, ...]] = {
    "unified_rl.commands": (
        "train",
        "launch",
        "resume",
        "evaluate",
        "export",
        "samples",
        "data",
        "compare",
        "sweep",
        "lab",
        "corrections",
        "recipes",
        "verify",
        "doctor",
        "load_policy",
        "memory_plan",
        "Run",
    ),
    "unified_rl.training.callbacks": ("Callback",),
    "unified_rl.training.assemble": ("assemble", "Assembled", "make_env"),
    "unified_rl.config": ("compose",),
    "unified_rl.correction": ("Correction", "load_correction", "correction_names", "effective_sample_size"),
    "unified_rl.replay": (
        "Replay",
        "Sampler",
        "Fresh",
        "Uniform",
        "WithoutReplacement",
        "Recency",
        "Segment",
        "Group",
        "Buckets",
        "Priority",
        "Softmax",
        "StalenessBounded",
        "Mixture",
        "read_rows",
    ),
    "unified_rl.policies.base": ("Policy",),
    "unified_rl.policies.gaussian": ("GaussianPolicy",),
    "unified_rl.policies.autoregressive": ("AutoregressivePolicy",),
    "unified_rl.policies.flow": ("FlowPolicy",),
    "unified_rl.policies.diffusion": ("DiffusionPolicy",),
    "unified_rl.policies.causal_lm": ("CausalLM",),
    "unified_rl.policies.critics": ("ValueCritic", "QEnsemble"),
    "unified_rl.agents.policy_gradient": ("PolicyGradient",),
    "unified_rl.agents.actor_critic": ("ActorCritic",),
    "unified_rl.agents.behavior_cloning": ("BehaviorCloning",),
    "unified_rl.envs.control": ("ControlEnvBase", "ActionChunk", "GymnasiumEnv"),
    "unified_rl.envs.language": ("LanguageTask", "Verdict"),
    "unified_rl.protocols": ("StepResult",),
    "unified_rl.rollout": ("ControlRollout", "LanguageRollout"),
    "unified_rl.returns": (
        "gae",
        "td_lambda",
        "n_step",
        "monte_carlo",
        "vtrace",
        "retrace",
        "q_lambda",
        "group_advantage",
    ),
    "unified_rl.spaces": ("Space",),
    "unified_rl.units": ("Steps", "UnitLogProb", "Source", "validate_record"),
    "unified_rl.errors": (
        "UnifiedRLError",
        "ConfigError",
        "RecordError",
        "CheckpointError",
        "DamageError",
        "NonFiniteError",
        "PeerError",
        "DataError",
        "EnvError",
    ),
}
"""Public names by the module that holds them, in the order of ``docs/api.md``."""

__all__ = [
    "ActionChunk",
    "ActorCritic",
    "Assembled",
    "AutoregressivePolicy",
    "BehaviorCloning",
    "Buckets",
    "Callback",
    "CausalLM",
    "CheckpointError",
    "ConfigError",
    "ControlEnvBase",
    "ControlRollout",
    "Correction",
    "DamageError",
    "DataError",
    "DiffusionPolicy",
    "EnvError",
    "FlowPolicy",
    "Fresh",
    "GaussianPolicy",
    "Group",
    "GymnasiumEnv",
    "LanguageRollout",
    "LanguageTask",
    "Mixture",
    "NonFiniteError",
    "PeerError",
    "Policy",
    "PolicyGradient",
    "Priority",
    "QEnsemble",
    "Recency",
    "RecordError",
    "Replay",
    "Run",
    "Sampler",
    "Segment",
    "Softmax",
    "Source",
    "Space",
    "StalenessBounded",
    "StepResult",
    "Steps",
    "UnifiedRLError",
    "Uniform",
    "UnitLogProb",
    "ValueCritic",
    "Verdict",
    "WithoutReplacement",
    "__version__",
    "assemble",
    "compare",
    "compose",
    "correction_names",
    "corrections",
    "data",
    "doctor",
    "effective_sample_size",
    "evaluate",
    "export",
    "gae",
    "group_advantage",
    "lab",
    "launch",
    "load_correction",
    "load_policy",
    "make_env",
    "memory_plan",
    "monte_carlo",
    "n_step",
    "q_lambda",
    "read_rows",
    "recipes",
    "resume",
    "retrace",
    "samples",
    "sweep",
    "td_lambda",
    "train",
    "validate_record",
    "verify",
    "vtrace",
]

__getattr__, __dir__ = lazy(__name__, {name: place for place, names in PUBLIC.items() for name in names})
