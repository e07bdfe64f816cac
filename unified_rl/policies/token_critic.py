"""Values for every token: linear heads on a transformer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from transformers import AutoModel

from unified_rl.errors import ConfigError
from unified_rl.policies.pretrained import build_model, trunk_states
from unified_rl.protocols import LanguagePolicy


class TokenCritic(TensorDictModuleBase):
    """Values of the states that tokens are sampled in; ``forward`` writes ``value [B, N]``, of several heads a
    ``[B, N, heads]``.

    Args:
        tokenizer: vocabulary and special tokens.
        max_length: longest row.
        path: folder of a checkpoint for the critic's own transformer.
        config: instead: ``model_type`` and sizes of a fresh one.
        trunk: instead: a policy whose transformer is shared.
        detach: whether gradients of the values stop at a shared trunk.
        allow_hub: as in :class:`~unified_rl.policies.causal_lm.CausalLM`.
        dtype: of the weights of an own transformer.
        seed: of fresh weights.
        heads: values of every state.

    Raises:
        ConfigError: not exactly one of ``path``, ``config`` and ``trunk``; else as ``CausalLM``.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        *,
        path: str | None = None,
        config: dict[str, Any] | None = None,
        trunk: LanguagePolicy | None = None,
        detach: bool = True,
        allow_hub: bool = False,
        dtype: str = "float32",
        seed: int = 0,
        heads: int = 1,
    ) -> None:
        super().__init__()
        self.in_keys, self.out_keys = ["tokens", "token_mask"], ["value"]
        if sum(x is not None for x in (path, config, trunk)) != 1:
            raise ConfigError("a token critic needs exactly one of path, config and trunk")
        self.detach = detach and trunk is not None
        if trunk is None:
            model = build_model(
                AutoModel, tokenizer, max_length, path=path, config=config, allow_hub=allow_hub, dtype=dtype, seed=seed
            )
        else:
            model = trunk.model
        self._trunk: tuple[Any, ...] = () if trunk is None else (model,)  # a shared trunk's weights stay the policy's
        self.model = model if trunk is None else None
        self.states: Callable[[Tensor], Tensor] | None = None
        """Gives the last hidden states ``[B, N, d]`` of a shared trunk whose weights are in pieces."""
        width = model.config.get_text_config(decoder=True).hidden_size
        self.head = nn.Linear(width, heads, device=model.device)
        nn.init.zeros_(self.head.weight)  # values start at 0, whatever the trunk
        nn.init.zeros_(self.head.bias)

    @property
    def device(self) -> torch.device:
        """Where the head is."""
        return self.head.weight.device

    def values(self, batch: TensorDictBase) -> Tensor:
        """Values ``[B, N]`` float32 of right-padded ``tokens [B, N]``; ``[B, N, heads]`` of several heads.

        Entry ``n`` is the value of the context ``tokens[:, :n]`` in which token ``n`` is sampled; 0 at ``n = 0`` and
        where ``token_mask`` is False.
        """
        tokens, real = batch["tokens"], batch["token_mask"]
        used = max(2, int(real.sum(-1).max()))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach):
            if self.states is not None:
                hidden = self.states(tokens[:, : used - 1])
            else:
                hidden = trunk_states(self.model if self.model is not None else self._trunk[0], tokens[:, : used - 1])
        value = self.head(hidden.float())
        value = nn.functional.pad(value, (0, 0, 1, tokens.shape[1] - used))
        return torch.where(real.unsqueeze(-1), value, torch.zeros_like(value)).squeeze(-1)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes ``value [B, N]``, or ``[B, N, heads]``."""
        return tensordict.set("value", self.values(tensordict))
