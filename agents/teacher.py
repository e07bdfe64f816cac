"""A teacher: the policy of an earlier run, or a language model's folder, frozen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unified_rl.config import build
from unified_rl.errors import CheckpointError, ConfigError
from unified_rl.instantiate import allowed
from unified_rl.policies.adapters import is_adapter_folder
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.protocols import CountsUnits, HasSpace, Trainable
from unified_rl.training.checkpoint import intact_checkpoint
from unified_rl.training.provenance import stored_config
from unified_rl.training.restoring import policy_state


def load_teacher(
    folder: str, student: Trainable, setting: str = "agent.teacher", options: Mapping[str, Any] | None = None
) -> Trainable:
    """A frozen policy whose log-probs are of the same units as the student's.

    Args:
        folder: a run folder of this library (its newest checkpoint is read), or for a language model a folder with
            ``config.json`` and safetensors, or of an adapter. No code from either is run.
        student: the policy that is trained; the teacher takes its tokenizer, or its space.
        setting: what named the folder, for errors.
        options: of a language model: ``temperature`` (the student's by default, so that both are compared at one),
            ``dtype`` of its weights (float32), ``autocast`` (off) and, beside a model's folder, an ``adapter``.

    Raises:
        CheckpointError: the folder is missing or incomplete.
        ConfigError: the teacher does not fit the student.
    """
    path = Path(folder)
    teacher: Trainable
    options, where = dict(options or {}), setting.removesuffix(".folder")
    if options and not isinstance(student, CausalLM):
        key = next(iter(options))
        raise ConfigError(f"{where}.{key} is of language models, and this policy is none")
    if (path / "config.yaml").is_file():
        if "adapter" in options:
            raise ConfigError(
                f"{setting.removesuffix('.folder')}.adapter is of a model's folder, and {folder} is a run"
            )
        teacher = _from_run(path, student, options)
    elif isinstance(student, CausalLM) and ((path / "config.json").is_file() or is_adapter_folder(path)):
        options = {"temperature": student.sampling.temperature, **options}
        teacher = CausalLM(student.tokenizer, student.max_length, path=folder, **options).to(student.device)
    else:
        raise CheckpointError(
            f"{setting}={folder} is no folder of a run (it has no config.yaml)"
            + (" and none of a language model (no config.json)" if isinstance(student, CausalLM) else "")
        )
    teacher.requires_grad_(False)
    return teacher


def _from_run(path: Path, student: Trainable, options: Mapping[str, Any]) -> Any:
    node = stored_config(path).get("policy")
    state = policy_state(*reversed(intact_checkpoint(path, replay=False)))
    if not state or not node:
        raise ConfigError(f"the run {path} holds no policy that could teach")
    try:
        teacher = build({**node, **options}, allow=allowed(), seed=0, **_inputs(student)).to(student.device)
        teacher.load_state_dict(state)
    except (RuntimeError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise ConfigError(f"the policy of {path} does not fit here: {str(error).splitlines()[0]}") from error
    if isinstance(student, CountsUnits) and teacher.num_units != student.num_units:
        raise ConfigError(
            f"the policy of {path} puts {teacher.num_units} log-probs on an action and the student {student.num_units}"
        )
    return teacher


def _inputs(student: Trainable) -> dict[str, Any]:
    """What the student's constructor was given by its environment."""
    if isinstance(student, CausalLM):
        return {"tokenizer": student.tokenizer, "max_length": student.max_length}
    assert isinstance(student, HasSpace)
    return {"space": student.space}
