"""Low-rank adapters (LoRA, arXiv:2106.09685) on a transformers model, through ``peft``.

Only the adapters train. They are read from and written to peft's own folders (``adapter_config.json`` and
``adapter_model.safetensors``); of somebody else's configuration only the settings below are read, since peft would also
import modules that such a file names.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from unified_rl.errors import CheckpointError, ConfigError
from unified_rl.instantiate import check_type, nearest
from unified_rl.policies.model_sizes import one_line
from unified_rl.ranges import Count, Name, shown
from unified_rl.untrusted import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SETTINGS: dict[str, Any] = {
    "r": Count,
    "lora_alpha": Count,
    "target_modules": Name | list[Name],
    "use_rslora": bool,
}
"""What ``policy.lora`` takes, under peft's names."""
DEFAULTS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "use_rslora": False}
HARMLESS = {
    "peft_type", "task_type", "base_model_name_or_path", "inference_mode", "revision", "auto_mapping", "peft_version",
    "lora_dropout", "init_lora_weights", "layers_to_transform", "layers_pattern", "exclude_modules", "megatron_core",
    "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
"""Settings of an adapter folder that say nothing that its weights do not say."""
LORA = "lora_"
"""In the name of every weight of an adapter."""
PREFIX = "base_model.model."
MISFIT = re.compile(r"size mismatch for (\S+): copying a param with shape torch\.Size\((.*?)\) .* torch\.Size\((.*?)\)")
PLAIN = re.compile(r"[\w.]+")


def check_lora(settings: Mapping[str, Any], where: str = "policy.lora") -> dict[str, Any]:
    """The settings of fresh adapters, defaults filled in.

    Raises:
        ConfigError: an unknown setting (names the nearest), or one of the wrong type or range.
    """
    for key in settings:
        if key == "lora_dropout":
            raise ConfigError(f"{where}.lora_dropout would make scores random: a policy's ratio to itself must be 1")
        if key not in SETTINGS:
            raise ConfigError(f"{where} has no setting {key!r}; {nearest(key, SETTINGS)}")
    given = {key: check_type(value, SETTINGS[key], f"{where}.{key}") for key, value in settings.items()}
    return {**DEFAULTS, **given}


def is_adapter_folder(folder: str | Path) -> bool:
    """Whether a folder holds an adapter (and not a whole model)."""
    return os.path.isfile(os.path.join(folder, CONFIG))  # where pathlib refuses a name that is too long


def base_folder(folder: str | Path) -> str:
    """The model folder that an adapter folder is for: as named, inside it, or beside it.

    Raises:
        CheckpointError: there is no such folder here.
    """
    name = read_json(Path(folder) / CONFIG).get("base_model_name_or_path")
    if isinstance(name, str) and name:
        for place in (Path(name), Path(folder) / name, Path(folder).resolve().parent / Path(name).name):
            if os.path.isfile(place / "config.json") and not is_adapter_folder(place):
                return str(place)
    raise CheckpointError(
        f"the adapter folder {folder} names the base model {shown(name)}, which is no model folder here: give both, "
        f"policy.path=BASE policy.adapter={folder}"
    )


def model_and_adapter(path: str | None, adapter: str | None) -> tuple[str | None, str | None]:
    """The folders of the base model and of the adapter that ``policy.path`` and ``policy.adapter`` mean.

    Raises:
        ConfigError: an adapter without a base model.
        CheckpointError: a folder that holds no adapter, or an adapter where the base should be.
    """
    if path is not None and is_adapter_folder(path):
        if adapter is not None:
            raise CheckpointError(f"policy.path={path} is an adapter folder itself; give the folder of the whole model")
        return base_folder(path), path
    if adapter is not None and path is None:
        raise ConfigError("policy.adapter needs the model that it is for: set policy.path")
    if adapter is not None and not is_adapter_folder(adapter):
        raise CheckpointError(f"policy.adapter={adapter} is no adapter folder: it holds no {CONFIG}")
    return path, adapter


def add_adapters(model: PreTrainedModel, settings: Mapping[str, Any], seed: int, base: str | None) -> None:
    """Puts fresh adapters into ``model``, in place; they change nothing until they are trained.

    Args:
        model: its weights are frozen.
        settings: as :func:`check_lora` returns them.
        seed: of the random half of each adapter; the global generator is left as it was.
        base: the model's folder, which a saved adapter names.

    Raises:
        ConfigError: ``peft`` is missing, or no part of the model fits ``target_modules``.
    """
    _inject(model, settings, seed, base, "policy.lora")


def load_adapters(model: PreTrainedModel, folder: str, base: str | None) -> None:
    """Puts the adapters of a folder into ``model``, in place, ready to be trained further.

    Raises:
        ConfigError: ``peft`` is missing.
        CheckpointError: a kind of adapter that is not supported, or a missing, damaged or unfitting file.
    """
    settings = _folder_settings(Path(folder))
    weights = _read_weights(Path(folder))
    modules = sorted({name.removeprefix(PREFIX).split(f".{LORA}")[0] for name in weights})
    targets = settings.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(x, str) and PLAIN.fullmatch(x) for x in targets):
        settings["target_modules"] = modules  # a pattern of others is not run: the weights' names say the same
    _inject(model, settings, 0, base, f"the adapter folder {folder}")
    peft = _peft("policy.adapter")
    try:
        report = peft.set_peft_model_state_dict(model, weights)
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"the adapter folder {folder} does not fit the model: {_misfit(error)}") from error
    lacking = sorted(key for key in report.missing_keys if LORA in key)
    for names, what in ((lacking, "lacks"), (sorted(report.unexpected_keys), "holds for parts the model has not:")):
        if names:
            raise CheckpointError(f"the adapter folder {folder} {what} {len(names)} weights, the first {names[0]}")


def _misfit(error: Exception) -> str:
    """What torch says of weights that do not fit, by the first of them."""
    found = MISFIT.search(str(error))
    if found is None:
        return one_line(error)
    return f"{found[1].replace('.default', '')} is {found[2]} in it and {found[3]} in the model, which is another one"


def _inject(model: PreTrainedModel, settings: Mapping[str, Any], seed: int, base: str | None, where: str) -> None:
    peft = _peft(where)
    widest = max(min(weight.shape) for weight in model.parameters() if weight.dim() == 2)
    ranks = [settings.get("r", DEFAULTS["r"]), *(settings.get("rank_pattern") or {}).values()]
    if max(ranks) > widest:
        raise ConfigError(f"{where}: r={max(ranks)} is more than {widest}, the rank of the model's largest matrices")
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model.add_adapter(config)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{where}: {one_line(error)}") from error
    config.base_model_name_or_path = None if base is None else str(Path(base).resolve())
    config.target_modules = _short_names(model)
    for name, weight in model.named_parameters():
        weight.requires_grad_(LORA in name)
        if LORA in name:
            weight.data = weight.data.float()
    model.eval()  # what was put in begins in training mode


def _short_names(model: PreTrainedModel) -> list[str]:
    """The adapted modules by the last part of their names where that says which, as other readers expect; else whole.

    peft writes out every name for ``all-linear``.
    """
    names = {name.split(f".{LORA}")[0] for name, _ in model.named_parameters() if f".{LORA}" in name}
    last = {name.rpartition(".")[2] for name in names}
    inside = (f".{LORA}", ".base_layer")
    alike = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last}
    return sorted(last if all(name in names or any(part in name for part in inside) for name in alike) else names)


def _folder_settings(folder: Path) -> dict[str, Any]:
    found = read_json(folder / CONFIG)
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        kind = found.get("peft_type") if isinstance(found, dict) else found
        raise CheckpointError(f"{folder / CONFIG}: peft_type is {shown(kind)}; only LORA adapters are read")
    if found.get("init_lora_weights", True) not in (True, False, None, "gaussian"):
        how = shown(found["init_lora_weights"])
        raise CheckpointError(
            f"{folder / CONFIG}: init_lora_weights={how} may change the base model; merge it with peft"
        )
    settings = {key: found[key] for key in SETTINGS if key in found}
    if found.get("layers_to_transform") or found.get("exclude_modules"):
        settings.pop("target_modules", None)
    for key in ("rank_pattern", "alpha_pattern"):
        if found.get(key):
            settings[key] = _patterns(found[key], f"{folder / CONFIG}: {key}")
    if found.get("fan_in_fan_out"):
        settings["fan_in_fan_out"] = True
    others = {k: v for k, v in found.items() if k not in settings and k not in HARMLESS and v not in (None, "none")}
    for key, value in others.items():
        if value:
            raise CheckpointError(
                f"{folder / CONFIG}: {key}={shown(value)} is not supported; merge this adapter into its model with peft"
            )
    plain = {key: value for key, value in settings.items() if key in SETTINGS and key != "target_modules"}
    try:
        return settings | {key: check_type(value, SETTINGS[key], key) for key, value in plain.items()}
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error


def _patterns(found: Any, where: str) -> dict[str, int]:
    if not isinstance(found, dict) or not all(PLAIN.fullmatch(str(key)) for key in found):
        raise CheckpointError(f"{where} is {shown(found)}; names of modules with whole numbers are read, no patterns")
    return {key: check_type(value, Count, where) for key, value in found.items()}


def _read_weights(folder: Path) -> dict[str, Tensor]:
    file = folder / WEIGHTS
    if not file.is_file():
        raise CheckpointError(f"the adapter folder {folder} has no {WEIGHTS} (other formats are not read)")
    try:
        weights = load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged ({error})") from error
    for name, value in weights.items():
        if LORA not in name:
            raise CheckpointError(
                f"{file} holds {name}, which is no low-rank adapter; merge it into its model with peft"
            )
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{file} holds a NaN or infinity in {name}; it is damaged")
    return weights


def frozen_names(model: PreTrainedModel) -> frozenset[str]:
    """Names of a model's weights and buffers that are not its adapters'; none where it has no adapters."""
    names = list(model.state_dict())
    return frozenset(name for name in names if LORA not in name) if any(LORA in name for name in names) else frozenset()


def rest_adapters(model: PreTrainedModel) -> bool:
    """Switches adapters off where all of them change nothing (as fresh ones do), else on; whether they are off."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    idle = not any(bool(value.any()) for name, value in model.named_parameters() if f"{LORA}B" in name)
    wanted = {name: value.requires_grad for name, value in model.named_parameters()}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(not idle)
    for name, value in model.named_parameters():  # peft switches gradients with the adapters
        value.requires_grad_(wanted[name])
    return idle


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A float32 model with the adapters added into its weights; the given one stays as it is.

    Raises:
        CheckpointError: the sum is not finite.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    whole: Any = copy.deepcopy(model).float()
    for name, module in list(whole.named_modules()):
        if isinstance(module, BaseTunerLayer):
            try:
                module.merge(safe_merge=True)
            except ValueError as error:
                raise CheckpointError(f"the adapter of {name} cannot be merged: {one_line(error)}") from error
            holder, _, last = name.rpartition(".")
            setattr(whole.get_submodule(holder), last, module.get_base_layer())
    whole._hf_peft_config_loaded = False
    del whole.peft_config
    plain: PreTrainedModel = whole
    return plain


def _peft(setting: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"{setting} needs peft: pip install 'unified-rl[lora]'") from error
    return peft
