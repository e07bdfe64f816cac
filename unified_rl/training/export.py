"""A run's policy as other programs load it: a language model as a folder, one of control as a file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from unified_rl.config import build
from unified_rl.errors import CheckpointError, ConfigError
from unified_rl.instantiate import nearest
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.policies.model_folder import DTYPES
from unified_rl.policies.pretrained import read_tokenizer, tokenizer_folder
from unified_rl.training.checkpoint import intact_checkpoint
from unified_rl.training.export_policy import FORMATS, export_policy
from unified_rl.training.loading import policy_of
from unified_rl.training.provenance import read_config
from unified_rl.training.restoring import policy_state, restoring

OWN = f"{CausalLM.__module__}.{CausalLM.__qualname__}"
"""The policy that is exported, as a configuration names it."""
ASIDE = ".writing_"
"""Begins the name of a folder that is half written."""


def export(
    run: str,
    folder: str,
    checkpoint: str | int | None = None,
    *,
    merge: bool = False,
    dtype: str | None = None,
    allow: Sequence[str] = (),
) -> Path:
    """Writes the policy of a run as others load it.

    A language model becomes a Hugging Face model folder, or an adapter folder where adapters were trained; a control
    policy one file, see :func:`~unified_rl.training.export_policy.export_policy`.

    Args:
        run: the run folder.
        folder: is made; it may exist if it is empty. A file that ends in ``.pt2`` or ``.onnx`` for a control policy.
        checkpoint: the number of updates behind it, its name, or its folder; by default the newest intact one.
        merge: write the whole model where adapters were trained.
        dtype: of the weights; by default that of the folder that the model came from, and float32 for adapters.
        allow: prefixes that configuration may build.

    Returns:
        The folder, or the file.

    Raises:
        ConfigError: the name is of the other domain, the folder holds something, there is nothing to merge, or a
            control policy that cannot be exported.
        CheckpointError: no such run or checkpoint, a damaged one, or a folder that cannot be written.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r} is none that is written; {nearest(dtype, DTYPES)}")
    target = Path(folder)
    if target.suffix in FORMATS:
        return _export_file(run, target, checkpoint, allow, merge or dtype is not None)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{folder} exists and is not empty: export writes a new folder, so choose another name")
    policy = _of_model_folder(run, checkpoint, allow) or policy_of(run, checkpoint, allow)
    if not isinstance(policy, CausalLM):
        raise ConfigError(
            f"{run} trained a {type(policy).__name__}, which is exported as one file: name it FILE.pt2 (torch.export) "
            "or FILE.onnx"
        )
    if merge and not policy.adapted:
        raise ConfigError(f"{run} trained the whole model, so there is no adapter to merge; leave --merge out")
    aside = target.with_name(f"{ASIDE}{target.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        policy.save(str(aside), merge=merge, dtype=dtype)
        os.replace(aside, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _export_file(run: str, target: Path, checkpoint: str | int | None, allow: Sequence[str], options: bool) -> Path:
    if target.exists():
        raise ConfigError(f"{target} exists: export writes a new file, so choose another name")
    policy = policy_of(run, checkpoint, allow)
    if isinstance(policy, CausalLM):
        raise ConfigError(
            f"{run} trained a language model, which is exported as a folder that transformers loads: give a name that "
            f"does not end in {target.suffix}"
        )
    if options:
        raise ConfigError("--merge and --dtype are of language models; leave them out for a control policy")
    return export_policy(policy, target, run)


def _of_model_folder(run: str, checkpoint: str | int | None, allow: Sequence[str]) -> Any:
    """The policy of a run that began from a model folder: of this and the checkpoint alone, since data may have moved.

    None for a fresh model, and beside a task of somebody else, which may have a tokenizer of its own.
    """
    cfg = read_config(Path(run))
    node, env = cfg.get("policy") or {}, cfg.get("env") or {}
    path = node.get("path")
    known = str(env.get("_target_", "")).startswith("unified_rl.envs.language.")
    if not known or not isinstance(path, str) or node.get("_target_") != OWN or not Path(path).is_dir():
        return None
    place = env.get("tokenizer") or tokenizer_folder(path)
    if place is None or not Path(place).is_dir():
        return None
    where, state = intact_checkpoint(Path(run), checkpoint, replay=False)
    policy = build(node, allow=allow, seed=0, tokenizer=read_tokenizer(place), max_length=1)
    with restoring(where):
        policy.load_state_dict(policy_state(state, where))
    return policy
