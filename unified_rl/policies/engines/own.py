"""The decoding loop of this library on a copy of the policy in another precision."""

from __future__ import annotations

from typing import Any

from unified_rl.policies.engines.precision import in_precision
from unified_rl.policies.engines.protocol import Call
from unified_rl.policies.generation import Generation, generate


class Own:
    """The decoding loop of :mod:`unified_rl.policies.generation` on a copy of the model in another precision.

    Args:
        dtype: as :func:`in_precision` takes it.
    """

    name = "own"

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.model: Any = None

    def open(self) -> None:
        """Nothing to look for."""

    def push(self, policy: Any, version: int) -> None:
        """Makes the copy anew."""
        self.model = in_precision(policy.model, self.dtype, policy.adapted)

    def generate(self, call: Call) -> Generation:
        """As of the protocol; the log-probs are those of the copy."""
        return generate(
            self.model,
            call.prompts,
            max_new_tokens=call.max_new_tokens,
            stop_ids=call.stop_ids,
            pad_id=call.pad_id,
            sampling=call.sampling,
            samples_per_prompt=call.samples_per_prompt,
            generator=call.generator,
            stop_strings=call.stop_strings,
        )

    def close(self) -> None:
        """Lets the copy go."""
        self.model = None
