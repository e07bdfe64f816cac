"""Writing a model as a folder that transformers, TRL and vLLM load: weights, configuration, tokenizer, generation."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig
from transformers.utils import logging

from unified_rl.errors import ConfigError
from unified_rl.policies.adapters import merged
from unified_rl.untrusted import read_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float32"}
"""Names that safetensors gives to the same."""
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
)  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """How a model was before this library took it up.

    Attributes:
        dtype: of most of its weights.
        dtypes: of each weight by name, where a folder says it.
        generation: the content of its ``generation_config.json``.
        rates: settings of its configuration that were set to 0.
    """

    dtype: str = "float32"
    dtypes: Mapping[str, str] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)


def stored_dtypes(folder: Path) -> dict[str, str]:
    """The dtype of each floating-point weight in a folder's safetensors files, by name."""
    found: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_slice(name).get_dtype() for name in opened.keys()}
    return {name: STORED[dtype] for name, dtype in found.items() if dtype in STORED}


def dtype_of_folder(folder: Path, dtypes: Mapping[str, str]) -> str:
    """The dtype that a folder's configuration names, else that of most of its weights."""
    config = read_json(folder / "config.json")
    named = config.get("dtype") or config.get("torch_dtype")
    if isinstance(named, str) and named.removeprefix("torch.") in DTYPES:
        return named.removeprefix("torch.")
    return Counter(dtypes.values()).most_common(1)[0][0] if dtypes else "float32"


def save_model(model: Any, tokenizer: Any, folder: Path, *, merge: bool = False, dtype: str | None = None) -> None:
    """Writes a model, its tokenizer and its generation configuration; the model stays as it is.

    Args:
        model: with an ``origin``, as :func:`~unified_rl.policies.pretrained.build_model` returns it.
        tokenizer: goes with it; the files of an unchanged one are copied as they are.
        folder: is made.
        merge: write a whole model where it has adapters, and not these alone.
        dtype: of all weights; by default as they were in the model's own folder, and float32 for adapters.

    Raises:
        ConfigError: an unknown dtype, nothing to merge, or an adapter of a model that is in no folder.
    """
    adapted = getattr(model, "_hf_peft_config_loaded", False)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    if merge and not adapted:
        raise ConfigError("there is no adapter to merge: the whole model was trained, and is written without merge too")
    origin: Origin = model.origin
    alone = adapted and not merge
    if alone and model.peft_config["default"].base_model_name_or_path is None:
        raise ConfigError("the adapter's base model is in no folder (policy.config made it): write both with merge")
    whole = merged(model) if adapted and merge else model
    default = dtype or ("float32" if alone else origin.dtype)
    weights = _cast(whole.state_dict(), default, {} if dtype or alone else origin.dtypes)
    with _original(whole.config, origin.rates), quiet():
        whole.save_pretrained(folder, state_dict=weights)
    generation = folder / "generation_config.json"
    if alone:
        generation.unlink(missing_ok=True)  # of the base model, beside which it stays
    else:
        _write_json(folder / "config.json", {**read_json(folder / "config.json"), "dtype": default})
        _write_json(generation, _ending(origin.generation, tokenizer))
    save_tokenizer(tokenizer, folder)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes a tokenizer: the files of the folder that it was read from where it is still the same, else anew."""
    from unified_rl.policies.pretrained import same_tokenizer

    source = Path(getattr(tokenizer, "name_or_path", "") or "")
    if source.is_dir() and same_tokenizer(source, tokenizer):
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        return
    tokenizer.save_pretrained(folder)


def _ending(generation: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The generation configuration, with the tokenizer's end of text among the ids that end an answer.

    Answers of a run end there, so they must end there afterwards.
    """
    given = generation.get("eos_token_id")
    ids = list(given) if isinstance(given, list) else [] if given is None else [given]
    if tokenizer.eos_token_id is None or tokenizer.eos_token_id in ids:
        return dict(generation)
    ids.append(tokenizer.eos_token_id)
    return {**generation, "eos_token_id": ids if len(ids) > 1 else ids[0]}


def _cast(weights: Mapping[str, Tensor], default: str, named: Mapping[str, str]) -> dict[str, Tensor]:
    """The weights in their dtypes; those that share memory still do, so that tied ones are stored once."""
    made: dict[Any, Tensor] = {}
    out = {}
    for name, value in weights.items():
        if value.is_floating_point():
            dtype = DTYPES[named.get(name, default)]
            key = (value.data_ptr(), value.shape, value.stride(), dtype)
            value = made.setdefault(key, value.detach().to(dtype)) if value.dtype != dtype else value
        out[name] = value
    return out


@contextmanager
def quiet() -> Iterator[None]:
    """Within it, transformers shows no progress bars."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _original(config: PretrainedConfig, rates: Mapping[str, float]) -> Iterator[None]:
    """Within it, a configuration has the rates of dropout that it came with."""
    now = {name: getattr(config, name) for name in rates}
    for name, rate in rates.items():
        setattr(config, name, rate)
    try:
        yield
    finally:
        for name, rate in now.items():
            setattr(config, name, rate)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
