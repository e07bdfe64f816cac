"""vLLM as a server, by its endpoint of token ids. Written against the source of vLLM 0.33, which was not run."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unified_rl.errors import RolloutError
from unified_rl.policies.engines.http import MissingError, listed, numbers
from unified_rl.policies.engines.protocol import Answer, Call
from unified_rl.policies.engines.remote import Remote, token_ids

GENERATE = "/inference/v1/generate"
FLAG = "start vLLM with --logprobs-mode processed_logprobs"


class Vllm(Remote):
    """Weights go by ``pause``, ``collective_rpc reload_weights``, ``reset_prefix_cache``, a name, ``resume``."""

    name = "vllm"

    def served(self) -> str:
        """As of :class:`~.remote.Remote`.

        Raises:
            RolloutError: the server lacks the endpoints of development mode.
        """
        try:
            return str(self.server.get("/weight_info").get("weight_version", ""))
        except MissingError as error:
            raise RolloutError(f"{error}: it was started without VLLM_SERVER_DEV_MODE=1, or is too old") from error

    def load(self, folder: Path, label: str) -> None:
        """As of :class:`~.remote.Remote`."""
        self.server.post("/pause?mode=wait")
        try:
            asked = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            try:
                self.server.post("/collective_rpc", asked)
            except RolloutError as error:
                raise RolloutError(
                    f"{error}. The server must see {folder} under the same path (policy.server_folder), and run the "
                    "model of policy.path"
                ) from error
            self.server.post("/reset_prefix_cache")
            self.server.post("/update_weight_version", {"new_version": label})
        finally:
            self.server.post("/resume")

    def ask(self, prompt: Sequence[int], call: Call, seed: int) -> Answer:
        """As of :class:`~.remote.Remote`."""
        sampling = call.sampling
        body = {
            "token_ids": list(prompt),
            "sampling_params": {
                "max_tokens": call.max_new_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "min_p": sampling.min_p,
                "repetition_penalty": sampling.repetition_penalty,
                "n": 1,
                "seed": seed,
                "logprobs": 0,
                "stop_token_ids": list(call.stop_ids),
                "ignore_eos": True,  # an end of the model's own that is no stop id of this run
            },
        }
        told = self.server.post(GENERATE, lambda: {**body, "request_id": uuid.uuid4().hex})  # an id is taken for good
        choices = listed(told, "choices", self.who)
        if len(choices) != 1 or not isinstance(choices[0], dict):
            raise RolloutError(f"{self.who} gives {len(choices)} answers to a prompt, and one was asked for")
        return self._answer(choices[0])

    def _answer(self, choice: Mapping[str, Any]) -> Answer:
        tokens = numbers(token_ids(choice, "token_ids", self.who), int, f"{self.who}: token")
        told = choice.get("logprobs")
        if not isinstance(told, dict):
            raise RolloutError(f"{self.who} answers without log-probs: {FLAG}")
        content = listed(told, "content", self.who)
        found = [entry.get("logprob") if isinstance(entry, dict) else entry for entry in content]
        log_probs = numbers(found, float, f"{self.who}: the log-prob of token")
        versions = self.versions(choice.get("weight_versions"), len(tokens))
        return Answer(tokens, log_probs, choice.get("finish_reason") == "stop", versions)
