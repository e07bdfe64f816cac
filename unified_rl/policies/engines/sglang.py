"""SGLang as a server, by its own endpoint. Written against the source of SGLang 0.5.23, which was not run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unified_rl.errors import RolloutError
from unified_rl.policies.engines.http import MissingError, listed, numbers
from unified_rl.policies.engines.protocol import Answer, Call
from unified_rl.policies.engines.remote import Remote, token_ids


class Sglang(Remote):
    """Weights go by ``update_weights_from_disk``, which empties the prefix cache."""

    name = "sglang"

    def served(self) -> str:
        """As of :class:`~.remote.Remote`."""
        try:
            found = self.server.get("/model_info")
        except MissingError:
            found = self.server.get("/get_model_info")
        return str(found.get("weight_version", ""))

    def load(self, folder: Path, label: str) -> None:
        """As of :class:`~.remote.Remote`.

        Raises:
            RolloutError: the server could not load the folder; it may hold a part of it then.
        """
        asked = {"model_path": str(folder), "weight_version": label, "flush_cache": True}
        told = self.server.post("/update_weights_from_disk", asked)
        if told.get("success") is not True:
            raise RolloutError(
                f"{self.who} did not load {folder} ({str(told.get('message'))[:200]}): it must see it under the same "
                "path (policy.server_folder), and run the model of policy.path"
            )

    def ask(self, prompt: Sequence[int], call: Call, seed: int) -> Answer:
        """As of :class:`~.remote.Remote`."""
        body = {
            "input_ids": list(prompt),
            "sampling_params": {
                "temperature": call.sampling.temperature,
                "top_p": 1.0,
                "top_k": -1,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "max_new_tokens": call.max_new_tokens,
                "stop_token_ids": list(call.stop_ids),
                "skip_special_tokens": False,
                "sampling_seed": seed,
                "n": 1,
            },
            "return_logprob": True,
        }
        return self._answer(self.server.post("/generate", body))

    def _answer(self, told: Mapping[str, Any]) -> Answer:
        meta = told.get("meta_info")
        if not isinstance(meta, dict):
            raise RolloutError(f"{self.who} answers without meta_info")
        tokens = numbers(token_ids(told, "output_ids", self.who), int, f"{self.who}: token")
        if not isinstance(meta.get("output_token_logprobs"), list):
            raise RolloutError(f"{self.who} answers without log-probs (output_token_logprobs)")
        pairs = listed(meta, "output_token_logprobs", self.who)
        if not all(isinstance(pair, list) and len(pair) >= 2 for pair in pairs):
            raise RolloutError(f"{self.who} answers with log-probs that name no token")
        log_probs = numbers([pair[0] for pair in pairs], float, f"{self.who}: the log-prob of token")
        if [pair[1] for pair in pairs] != tokens and len(pairs) == len(tokens):
            raise RolloutError(f"{self.who} gives the log-probs of other tokens than it sampled")
        reason = meta.get("finish_reason")
        stopped = isinstance(reason, dict) and reason.get("type") == "stop"
        return Answer(tokens, log_probs, stopped, self._spans(meta, len(tokens)))

    def _spans(self, meta: Mapping[str, Any], count: int) -> tuple[int, ...]:
        spans, label = meta.get("weight_versions"), meta.get("weight_version")
        if not spans and isinstance(label, str):
            spans = [{"version": label, "start": 0, "end": count}]
        return self.versions(spans, count)
