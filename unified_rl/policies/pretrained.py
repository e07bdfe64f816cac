"""Builds transformers models from a configuration or a local folder; never from a hub unless asked to.

No code from a model folder is ever run, and only safetensors weights are read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedModel

from unified_rl.errors import CheckpointError, ConfigError
from unified_rl.policies.adapters import add_adapters, base_folder, is_adapter_folder, load_adapters, model_and_adapter
from unified_rl.policies.model_folder import DTYPES, Origin, dtype_of_folder, quiet, stored_dtypes
from unified_rl.policies.model_sizes import check_model_config, check_model_memory, has_setting, one_line, setting_of
from unified_rl.ranges import shown
from unified_rl.untrusted import read_json


def build_model(
    auto_class: Any,
    tokenizer: Any,
    max_length: int,
    *,
    path: str | None = None,
    adapter: str | None = None,
    config: Mapping[str, Any] | None = None,
    lora: Mapping[str, Any] | None = None,
    allow_hub: bool = False,
    dtype: str = "float32",
    seed: int = 0,
    setting: str = "policy.config",
) -> PreTrainedModel:
    """A model from exactly one of ``path`` and ``config``, dropout off, frozen where it has adapters.

    Args:
        auto_class: ``AutoModelForCausalLM`` (or ``AutoModel`` for a trunk without a head).
        tokenizer: gives the vocabulary and the special tokens.
        max_length: longest row.
        path: folder with ``config.json`` and safetensors, or of an adapter that names such a folder; a hub name only
            with ``allow_hub``.
        adapter: folder of an adapter for ``path``.
        config: ``model_type`` (``llama``, ``qwen3``, ...) and that architecture's own settings. ``initializer_range``
            is ``hidden_size ** -0.5`` unless given: small models hardly learn with the usual 0.02.
        lora: fresh adapters, see :func:`~unified_rl.policies.adapters.check_lora`.
        allow_hub: look on the hub for a ``path`` that is no folder.
        dtype: of the weights: float32, bfloat16 or float16.
        seed: of random initial weights; the global generator is left as it was.
        setting: the full name of ``config``, for errors.

    Raises:
        ConfigError: both or neither of path and config, an unknown setting, a hub name without ``allow_hub``, or a
            vocabulary or width that is too small.
        CheckpointError: a folder that is missing, incomplete or damaged.
    """
    if (path is None) == (config is None):
        raise ConfigError(
            "give exactly one of path (a model folder) and config (model_type and sizes): policy=causal_lm "
            "policy.path=FOLDER, or policy=causal_lm policy.config.hidden_size=256"
        )
    if dtype not in DTYPES:
        raise ConfigError(f"dtype '{dtype}' is unknown; use one of {', '.join(DTYPES)}")
    path, adapter = model_and_adapter(path, adapter)
    if adapter is not None and lora is not None:
        raise ConfigError(f"policy.lora makes fresh adapters, and {adapter} holds trained ones: give one of them")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if path is not None:
            model = load_folder(auto_class, path, allow_hub, dtype)
        else:
            settings = make_config(config or {}, tokenizer, max_length, setting)
            check_model_memory(settings, setting)
            try:
                model = auto_class.from_config(settings, dtype=DTYPES[dtype])
            except Exception as error:  # each architecture fails in its own way on sizes that do not fit together
                kind = settings.model_type
                raise ConfigError(f"{setting}: no {kind} can be made of these settings: {one_line(error)}") from error
    if path is not None and Path(path).is_dir():
        check_tokenizer(path, tokenizer)
    _check_fit(model.config, tokenizer, max_length)
    if path is None:
        pad, eos = special_ids(tokenizer)
        model.generation_config = GenerationConfig(
            eos_token_id=eos, pad_token_id=pad, bos_token_id=tokenizer.bos_token_id
        )
    made: Any = model
    made.origin = origin_of(model, path, dtype)
    model.generation_config = GenerationConfig()  # a folder's sampling defaults must not leak into generation
    if adapter is not None:
        load_adapters(model, adapter, path)
    elif lora is not None:
        add_adapters(model, lora, seed + 1, path)
    model.eval()  # dropout, layerdrop and router noise off, in a fresh model as in one from a folder
    return model


PROBES = ("12 + 345 = 357.\n", " two  blanks, ein Wort: \u00fc\u4e2d <b>", "def f(x):\n\treturn x['y']\n\n")
"""Texts that two tokenizers of one vocabulary would cut or begin differently."""


def check_tokenizer(path: str, tokenizer: Any) -> None:
    """Raises ConfigError where a model folder holds a tokenizer that is not ``tokenizer``.

    A folder without a tokenizer passes. Vocabulary, the end-of-text token and the encoding of some texts are compared.
    """
    folder = Path(path).resolve()
    given = getattr(tokenizer, "name_or_path", "") or ""
    if given and Path(given).is_dir() and Path(given).resolve() == folder:
        return
    own = _tokenizer_of(folder)
    if own is None:
        return
    reason = _difference(own, tokenizer)
    if reason:
        raise ConfigError(
            f"the tokenizer of the task is not that of the model folder {path}: {reason}; set env.tokenizer={path}"
        )


def tokenizer_folder(path: str) -> str | None:
    """The model folder ``path`` where it holds a tokenizer too, or the base model's for an adapter folder; else None.

    Raises:
        CheckpointError: a folder whose model is refused.
    """
    holders = [path, base_folder(path)] if is_adapter_folder(path) else [path]
    found = next((folder for folder in holders if _has_tokenizer(Path(folder))), None)
    if found is not None:
        _check_folder(holders[-1], False)
    return found


def _has_tokenizer(folder: Path) -> bool:
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
    return any((folder / name).is_file() for name in names)


def _tokenizer_of(folder: Path) -> Any:
    if not _has_tokenizer(folder):
        return None
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers, tokenizers and json each raise their own kinds
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"the tokenizer of the model folder {folder} cannot be read ({first})") from error


def read_tokenizer(path: str) -> Any:
    """The tokenizer of a folder as the token tasks read it, padded with its end of text where it has nothing else.

    Raises:
        CheckpointError: the folder holds none that can be read.
    """
    found = _tokenizer_of(Path(path))
    if found is None:
        raise CheckpointError(f"{path} holds no tokenizer")
    if found.pad_token_id is None:
        found.pad_token = found.eos_token
    return found


def same_tokenizer(folder: Path, tokenizer: Any) -> bool:
    """Whether a folder holds this tokenizer, its chat template too."""
    own = _tokenizer_of(folder)
    return own is not None and not _difference(own, tokenizer) and own.chat_template == tokenizer.chat_template


def _difference(own: Any, given: Any) -> str:
    if len(own) != len(given):
        return f"it has {len(given)} tokens, the model's {len(own)}"
    if own.eos_token_id != given.eos_token_id:
        return f"its end-of-text id is {given.eos_token_id}, the model's {own.eos_token_id}"
    mine, theirs = own.get_vocab(), given.get_vocab()
    if mine != theirs:
        token = next(t for t in mine if theirs.get(t) != mine[t])
        return f"its id of {token!r} is {theirs.get(token)}, the model's {mine[token]}"
    for text in PROBES:
        if own(text)["input_ids"] != given(text)["input_ids"]:
            ids, right = given(text)["input_ids"][:4], own(text)["input_ids"][:4]
            return f"it encodes {text!r} as {ids}..., the model's as {right}..."
    return ""


def special_ids(tokenizer: Any) -> tuple[int, int | None]:
    """The pad and end-of-text ids; a tokenizer without a pad token pads with its end-of-text token.

    Raises:
        ConfigError: neither exists.
    """
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is None and eos is None:
        raise ConfigError("the tokenizer has neither a pad nor an eos token; set tokenizer.eos_token")
    return (eos if pad is None else pad), eos


def make_config(
    settings: Mapping[str, Any], tokenizer: Any, max_length: int, setting: str = "policy.config"
) -> PretrainedConfig:
    """A transformers configuration from ``model_type`` and its settings, with sizes taken from the tokenizer."""
    given = check_model_config(settings, setting)
    model_type = given.pop("model_type")
    known = AutoConfig.for_model(model_type)
    pad, eos = special_ids(tokenizer)
    derived: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": eos,
        "pad_token_id": None if pad == eos else pad,  # the pad row of the embedding gets no gradient
    }
    plain = _made(setting, model_type, given)  # resolves an architecture's own names, such as n_embd
    hidden, heads = setting_of(plain, "hidden_size"), setting_of(plain, "num_attention_heads")
    if hidden is not None:
        derived["initializer_range"] = hidden**-0.5
    if heads is not None and has_setting(known, "num_key_value_heads"):
        derived["num_key_value_heads"] = heads
    split = hasattr(known, "qk_rope_head_dim")  # DeepSeek's attention: its head_dim is the rotary part alone
    if hidden is not None and heads is not None and has_setting(known, "head_dim") and not split:
        derived["head_dim"] = hidden // heads
    return without_dropout(_made(setting, model_type, {**derived, **given}))


def _made(setting: str, model_type: str, values: Mapping[str, Any]) -> PretrainedConfig:
    try:
        made: PretrainedConfig = AutoConfig.for_model(model_type, **values)
    except Exception as error:  # each architecture checks its own settings, with errors of its own
        raise ConfigError(f"{setting}: {one_line(error)}") from error
    return made


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """Sets every rate of dropout, layerdrop and router noise to 0: the ratio of a policy to itself must be 1."""
    for name in rates_of(config):
        setattr(config, name, 0.0)
    return config


def rates_of(config: PretrainedConfig) -> dict[str, float]:
    """The rates of dropout, layerdrop and router noise in a configuration that are not 0."""
    parts = ("dropout", "layerdrop", "jitter", "_pdrop", "drop_path")
    named = {name: value for name, value in vars(config).items() if any(part in name for part in parts)}
    return {name: value for name, value in named.items() if isinstance(value, float) and value != 0}


def origin_of(model: PreTrainedModel, path: str | None, dtype: str) -> Origin:
    """How a model was in its folder: what a copy of it is written with."""
    generation = (model.generation_config or GenerationConfig()).to_json_string()
    if path is None or not Path(path).is_dir():
        return Origin(dtype, generation=json.loads(generation))
    folder, file = Path(path), Path(path) / "generation_config.json"
    dtypes = stored_dtypes(folder)
    rates = rates_of(AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False))
    said = read_json(file) if file.is_file() else json.loads(generation)
    return Origin(dtype_of_folder(folder, dtypes), dtypes, said, rates)


def folder_digest(folder: str) -> Tensor:
    """SHA-256 ``[32]`` uint8 of the sizes, and of a sample of the content, of a folder's configuration and weights."""
    found = hashlib.sha256()
    for file in [Path(folder) / "config.json", *sorted(Path(folder).glob("*.safetensors"))]:
        size = file.stat().st_size
        found.update(f"{file.name} {size} ".encode())
        with file.open("rb") as opened:
            for part in range(min(SAMPLES, size // BLOCK + 1)):
                opened.seek(part * size // SAMPLES if size > SAMPLES * BLOCK else part * BLOCK)
                found.update(opened.read(BLOCK))
    return torch.tensor(list(found.digest()), dtype=torch.uint8)


SAMPLES, BLOCK = 512, 4096
"""How many blocks of how many bytes of a file :func:`folder_digest` reads: a second training changes all of them."""


def load_folder(auto_class: Any, path: str, allow_hub: bool, dtype: str) -> PreTrainedModel:
    """Loads a model folder; see :func:`build_model`."""
    _check_folder(path, allow_hub)
    local = {"local_files_only": not allow_hub, "trust_remote_code": False}
    try:
        config = without_dropout(AutoConfig.from_pretrained(path, **local))
        with quiet():
            model, report = auto_class.from_pretrained(
                path, config=config, dtype=DTYPES[dtype], use_safetensors=True, output_loading_info=True, **local
            )
    except Exception as error:  # transformers, safetensors and json each raise their own kinds
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"the model folder {path} cannot be loaded ({first}); is it complete?") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(f"the model folder {path} lacks {len(missing)} weights, the first {missing[0]}")
    bad = next((name for name, weight in model.named_parameters() if not bool(torch.isfinite(weight).all())), None)
    if bad is not None:
        raise CheckpointError(f"the model folder {path} holds a NaN or infinity in {bad}; it is damaged")
    loaded: PreTrainedModel = model
    return loaded


def _check_folder(path: str, allow_hub: bool) -> None:
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            run = next((str(f) for f in (folder, *folder.resolve().parents[:2]) if (f / "config.yaml").is_file()), None)
            hint = (
                "" if run is None else f"; {run} is a run: unified-rl export {run} FOLDER writes its model to a folder"
            )
            raise CheckpointError(f"the model folder {path} has no config.json{hint}")
        if not any(folder.glob("*.safetensors")):
            raise CheckpointError(f"the model folder {path} has no *.safetensors weights (other formats are not read)")
        for file in (*folder.glob("*.safetensors"), *folder.glob("*.json")):
            if not file.is_file():
                raise CheckpointError(f"{file} is no regular file, so the model folder is not read")
        _refuse_hub_code(read_json(folder / "config.json"), folder / "config.json")
        _check_shards(folder)
        return
    looks_like_name = not folder.is_absolute() and not path.startswith((".", "~")) and path.count("/") <= 1
    if not looks_like_name:
        raise CheckpointError(f"the model folder {path} does not exist")
    if not allow_hub:
        raise ConfigError(
            f"policy.path: '{path}' is not a folder here; models are never fetched from a hub unless "
            "policy.allow_hub=true is set"
        )


def _refuse_hub_code(config: Any, file: Path, where: str = "") -> None:
    """Refuses a model whose attention, or another part, is a kernel that transformers would fetch from a hub."""
    inner = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, value in inner:
        place = str(key) if isinstance(config, dict) and not where.endswith("_implementation") else where
        if isinstance(value, str) and place.endswith(("_implementation", "_internal")) and "/" in value:
            raise CheckpointError(f"{file}: {place} is {value[:80]!r}, code of a hub, which is not run; take it out")
        _refuse_hub_code(value, file, place)


def _check_shards(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        names = set(map(str, read_json(index)["weight_map"].values()))
    except (KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged ({error})") from error
    for name in sorted(names):
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {name[:80]!r}, which is no file of this folder")
    lacking = sorted(name for name in names if not (folder / name).is_file())
    if lacking:
        raise CheckpointError(f"the model folder {folder} lacks {', '.join(lacking)}")


def _check_fit(config: PretrainedConfig, tokenizer: Any, max_length: int) -> None:
    text = config.get_text_config(decoder=True)
    if text.vocab_size < len(tokenizer):
        raise ConfigError(
            f"the model's vocabulary of {text.vocab_size} is below the tokenizer's {len(tokenizer)} (transformers "
            f"reads it as {type(tokenizer).__name__}, which may add tokens of its own): save the model again after "
            f"model.resize_token_embeddings({len(tokenizer)})"
        )
    longest = getattr(text, "max_position_embeddings", None)
    if longest is not None and longest < max_length:
        raise ConfigError(
            f"the model takes {longest} positions, but rows are up to {max_length} tokens (max_length); lower "
            "env.max_turn_tokens or env.max_prompt_length"
        )


def trunk_states(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Last hidden states ``[B, N, d]`` of right-padded ``tokens [B, N]``.

    A causal model never looks to the right, so right padding needs no attention mask, and without one attention takes
    its fastest path.
    """
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    trunk = model.base_model
    states: Tensor = trunk(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state
    return states


def end_ids_of_folder(folder: str) -> set[int]:
    """The end-of-text ids that a model folder's generation and model configuration name; empty without a folder.

    Raises:
        CheckpointError: one is no whole number of at least 0.
    """
    found: set[int] = set()
    if folder and is_adapter_folder(folder):
        folder = base_folder(folder)
    for name in ("generation_config.json", "config.json"):
        file = Path(folder) / name
        if folder and file.is_file():
            given = read_json(file).get("eos_token_id")
            ids = given if isinstance(given, list) else [] if given is None else [given]
            for i in ids:
                if type(i) is not int or i < 0:
                    raise CheckpointError(f"{file}: eos_token_id holds {shown(i)}, which is no token id")
            found.update(ids)
    return found
