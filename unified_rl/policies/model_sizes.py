"""The sizes of a fresh transformer, checked before one is made: types, ranges, and what must divide what."""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig

from unified_rl.errors import ConfigError
from unified_rl.instantiate import check_type, nearest
from unified_rl.machine import require_memory
from unified_rl.ranges import Count, Name, shown

COUNTED = re.compile(r"size$|^num_|layers?$|heads?$|_dim$|^n_(embd|layer|head|positions|inner)$")
"""Names of whole numbers that are at least 1, whatever the architecture."""


def known_settings(model_type: Any, where: str) -> PretrainedConfig:
    """The configuration of an architecture at its defaults.

    Raises:
        ConfigError: transformers knows no such architecture; names the nearest.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if model_type is None:
        raise ConfigError(f"{where} needs model_type, for example llama or qwen3")
    check_type(model_type, Name, f"{where}.model_type")
    if model_type not in CONFIG_MAPPING_NAMES:
        near = nearest(model_type, CONFIG_MAPPING_NAMES)
        hint = near if near.startswith("did") else "llama and qwen3 are two that it has"
        raise ConfigError(f"{where}.model_type {shown(model_type)} is unknown to transformers; {hint}")
    try:
        known: PretrainedConfig = AutoConfig.for_model(model_type)
    except Exception as error:  # an architecture without defaults, with an error of its own
        raise ConfigError(
            f"{where}.model_type {model_type} has no defaults to start from: {one_line(error)}"
        ) from error
    return known


def one_line(error: Exception) -> str:
    """The text of somebody else's error, cut; its type where it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def check_model_config(config: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    """The settings of a model with their types made right; refuses those that no model can be made of.

    Args:
        config: ``model_type`` and settings of that architecture; None is checked elsewhere.
        where: the full name of the setting.

    Raises:
        ConfigError: an unknown setting (names the nearest), one of the wrong type or range, or heads that do not
            divide the width.
    """
    if config is None:
        return {}
    known = known_settings(config.get("model_type"), where)
    sizes: dict[str, Any] = {}
    for key, value in config.items():
        if key.startswith("_") or not (has_setting(known, key) or _read_anyway(known, key)):
            names = vars(known).keys() - vars(PretrainedConfig()).keys()
            raise ConfigError(f"{where}: {config['model_type']} has no setting {key}; {nearest(key, names)}")
        sizes[key] = check_type(value, _hint(key, setting_of(known, key)), f"{where}.{key}")
    rotary = hasattr(known, "rope_parameters") or hasattr(known, "rope_theta")
    defaults = {key: setting_of(known, key) for key in _HEADS[:2]}
    _check_heads({**defaults, **sizes}, "head_dim" in sizes, rotary, where)
    return sizes


def setting_of(config: PretrainedConfig, name: str) -> Any:
    """A setting of an architecture; None where it has none, or one for each layer."""
    try:
        return getattr(config, name, None)
    except Exception:  # architectures whose layers differ refuse the question with errors of their own
        return None


def has_setting(config: PretrainedConfig, name: str) -> bool:
    """Whether a name of an architecture can be set: it exists, and is not worked out from others."""
    found = getattr(type(config), name, None)
    if isinstance(found, property) and found.fset is None:
        return False
    try:
        return hasattr(config, name)
    except Exception:  # as above
        return True


def _read_anyway(known: PretrainedConfig, name: str) -> bool:
    """Whether an architecture reads a width of its heads that its configuration does not declare, as Qwen3-MoE does."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    made = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(known.model_type)
    if name != "head_dim" or hasattr(type(known), name) or not isinstance(made, str):
        return False
    source = inspect.getsource(sys.modules[getattr(transformers, made).__module__])
    return 'getattr(config, "head_dim"' in source


_HEADS = ("hidden_size", "num_attention_heads", "num_key_value_heads")


def _hint(key: str, default: Any) -> Any:
    if isinstance(default, bool):
        return bool
    if isinstance(default, int) or (default is None and COUNTED.search(key)):
        hint: Any = Count if COUNTED.search(key) else int
        return hint | None if default is None or key == "num_key_value_heads" else hint
    return float | int if isinstance(default, float) else Any


def _check_heads(sizes: Mapping[str, Any], own_width: bool, own_rotation: bool, where: str) -> None:
    width, heads, shared = (sizes.get(key) for key in _HEADS)
    if width is not None and heads is not None and not own_width:
        if width % heads:
            raise ConfigError(f"{where}.num_attention_heads={heads} must divide {where}.hidden_size={width}")
        if own_rotation and (width // heads) % 2:
            raise ConfigError(
                f"{where}.num_attention_heads={heads} makes heads of {width // heads} of {where}.hidden_size={width}, "
                "and rotary positions need an even number"
            )
    if heads is not None and shared is not None and heads % shared:
        raise ConfigError(f"{where}.num_key_value_heads={shared} must divide {where}.num_attention_heads={heads}")


def check_model_memory(config: PretrainedConfig, where: str) -> None:
    """Refuses weights that this machine cannot hold: of a transformer with these widths, 4 bytes each.

    Raises:
        ConfigError: gives the estimate and what the machine has.
    """
    names = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
    found = (setting_of(config, name) for name in names)
    width, layers, inner, words = (x if isinstance(x, int) and x else 1 for x in found)
    count = math.prod((words, width)) + layers * (2 * width * width + 2 * width * inner)
    require_memory(4 * count, f"{where} (hidden_size={width}, num_hidden_layers={layers}, intermediate_size={inner})")
