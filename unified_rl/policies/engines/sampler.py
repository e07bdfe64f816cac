"""What a rollout samples with: an engine that is kept at the policy's weights, and whose log-probs are looked at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.errors import ConfigError
from unified_rl.policies.engines.protocol import Call, Engine
from unified_rl.policies.engines.settings import SERVERS, EngineSettings
from unified_rl.policies.generation import Generation, pad_prompts
from unified_rl.policies.stop_strings import StopStrings

LOOKED_AT = 4
"""Answers that are scored again behind every push; of an engine's first batch all are."""
AT_ONCE = 16
"""Answers that are scored together."""
MEAN_GAP = 0.1
"""Nats a token by which a sampler of declared lower precision may differ from the policy, in the mean."""


def make_engine(settings: EngineSettings, worker: int = 0) -> Engine | None:
    """The engine of a policy; None where the policy itself samples. Only the chosen one is imported."""
    if settings.engine == "vllm":
        from unified_rl.policies.engines.vllm import Vllm

        return Vllm(settings, worker)
    if settings.engine == "sglang":
        from unified_rl.policies.engines.sglang import Sglang

        return Sglang(settings, worker)
    if settings.engine == "transformers":
        from unified_rl.policies.engines.continuous import Transformers

        return Transformers(settings.engine_dtype)
    if settings.engine_dtype is not None:
        from unified_rl.policies.engines.own import Own

        return Own(settings.engine_dtype)
    return None


class Sampler:
    """Samples for a rollout. Weights are pushed when the rollout says that they have another version.

    The log-probs of an engine are compared with the policy's own: of its first batch all, before anything is trained,
    and of the first answers behind every push some, which finds a server that acknowledges weights and serves others.

    Args:
        policy: a :class:`~unified_rl.policies.causal_lm.CausalLM`.
        engine: that samples.
        settings: of the policy.
    """

    def __init__(self, policy: Any, engine: Engine, settings: EngineSettings) -> None:
        self.policy, self.engine, self.settings = policy, engine, settings
        self.version: int | None = None
        self.gap = 0.0
        self._unchecked: int | None = None  # answers to look at; None: all of the next call

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Of the policy."""
        ends: tuple[int, ...] = self.policy.end_ids
        return ends

    def open(self) -> None:
        """Looks whether the engine is there.

        Raises:
            ConfigError: it is not.
        """
        self.engine.open()

    def at(self, version: int) -> Sampler:
        """Itself, with the policy's present weights, which are those of ``version``."""
        if version != self.version:
            if self.version is None:
                self.engine.open()
            self.engine.push(self.policy, version)
            if self.version is not None and self._unchecked == 0:
                self._unchecked = LOOKED_AT
            self.version = version
        return self

    def generate(
        self,
        prompts: Sequence[Tensor | Sequence[int]],
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        generator: torch.Generator | None = None,
        greedy: bool = False,
        samples_per_prompt: int = 1,
        stop_strings: StopStrings | None = None,
    ) -> Generation:
        """Samples continuations, as :func:`unified_rl.policies.generation.generate` does.

        Raises:
            ConfigError: greedy, or no generator: the policy itself does that; or log-probs that are not those of the
                sampling distribution.
            RolloutError: the engine fails.
        """
        if greedy or generator is None:
            raise ConfigError("an engine samples, from a generator; ask the policy itself for the most likely answer")
        call = Call(
            [prompt.tolist() if isinstance(prompt, Tensor) else list(prompt) for prompt in prompts],
            max_new_tokens,
            tuple(stop_ids),
            self.policy.pad_id,
            self.policy.sampling,
            generator,
            samples_per_prompt,
            stop_strings,
        )
        out = self.engine.generate(call)
        if self.settings.engine != "own" and self._unchecked != 0:
            self._check(call, out)
        return out

    def close(self) -> None:
        """Lets the engine go; it is given the weights again when it is used again."""
        self.engine.close()
        self.version = None

    # ------------------------------------------------------------------ looking at log-probs

    def _check(self, call: Call, out: Generation) -> None:
        rows = call.rows[: self._unchecked]
        gap = self._gaps(rows, out)
        lower = self.policy.coarsely_sampled
        self.gap = float(gap.mean() if lower else gap.max())
        bound = MEAN_GAP if lower else self.policy.log_ratio_tolerance
        if not self.gap <= bound:
            raise ConfigError(self._complaint(lower, first=self._unchecked is None))
        self._unchecked = 0

    def _complaint(self, lower: bool, first: bool) -> str:
        engine = self.settings.engine
        where = f"policy.engine={engine}"
        if engine in SERVERS:
            where += f" at {self.engine.server.url}"  # type: ignore[attr-defined]
        said = (
            f"{where}: log-probs of {'its first answers' if first else 'answers behind new weights'} differ from the "
            f"policy's by {self.gap:.3g} {'in the mean' if lower else 'at most'}"
        )
        ways = {
            "vllm": (
                "start vLLM with --logprobs-mode processed_logprobs (by default they are those of before temperature "
                "and truncation) and --generation-config vllm (by default the model folder's top_p, top_k and penalty "
                "apply silently)"
            ),
            "sglang": (
                "SGLANG_RETURN_ORIGINAL_LOGPROB must be unset (it takes the temperature out), and so must "
                "--preferred-sampling-params"
            ),
        }.get(engine, "its transform is another one; use policy.engine=own")
        if not first:
            return f"{said}: it serves other weights than it was sent, or a prefix cache of the ones before"
        if engine in SERVERS and not lower:
            ways += (
                ". Or it runs another model than the policy, or computes in another precision: give it --dtype as "
                "policy.dtype, or say so with policy.engine_dtype=bfloat16"
            )
        return f"{said}: they are not those of the sampling distribution. {ways[0].upper()}{ways[1:]}"

    @torch.no_grad()
    def _gaps(self, prompts: list[list[int]], out: Generation) -> Tensor:
        """Absolute differences ``[n]`` of the sampled tokens' log-probs."""
        policy, width = self.policy, out.tokens.shape[1]
        sampled = torch.arange(width, device=out.length.device) < out.length[:, None]
        texts = [[*prompt, *said] for prompt, said in zip(prompts, out.rows(), strict=False)]
        found = []
        for start in range(0, len(texts), AT_ONCE):
            part = slice(start, min(start + AT_ONCE, len(texts)))
            tokens, length = pad_prompts(texts[part], policy.pad_id, policy.device)
            begin = torch.tensor([len(prompt) for prompt in prompts[part]], device=policy.device)
            column = torch.arange(tokens.shape[1], device=policy.device)
            mask = (column >= begin[:, None]) & (column < length[:, None])
            batch = TensorDict({"tokens": tokens, "mask": mask}, batch_size=[len(tokens)])
            said = out.log_prob[part][sampled[part]].to(policy.device)
            found.append((policy.log_prob(batch).log_prob[mask] - said).abs())
        return torch.cat(found)
