"""A causal language model as a policy: one unit is one token."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from unified_rl.configurable import configurable
from unified_rl.errors import CheckpointError, ConfigError, RecordError
from unified_rl.policies.adapters import check_lora, frozen_names, model_and_adapter, rest_adapters
from unified_rl.policies.engines import EngineSettings, Sampler, check_engine_settings, make_engine
from unified_rl.policies.engines.settings import Name, Precision, Sync
from unified_rl.policies.fused_layers import fused_layers, recomputing
from unified_rl.policies.generation import Beside, Generation, generate, has_plain_cache
from unified_rl.policies.heads import logit_shape, read_head
from unified_rl.policies.model_folder import save_model
from unified_rl.policies.model_sizes import check_model_config
from unified_rl.policies.pretrained import (
    build_model,
    end_ids_of_folder,
    folder_digest,
    special_ids,
    trunk_states,
)
from unified_rl.policies.sampling import Sampling, entropy_of, seen_before, token_log_prob
from unified_rl.policies.shared_prompt import find_shared, shared_states
from unified_rl.policies.stop_strings import StopStrings
from unified_rl.protocols import Domain, Reader
from unified_rl.ranges import Count, Fraction, Positive, Seconds, Seed, Share, Texts, Whole, ranged
from unified_rl.units import UnitLogProb

LOGITS_AT_ONCE = 2**25
"""Logits held at a time where ``logit_chunk`` is 0 (128 MiB in float32)."""
EXTRAS_HOLD = 4
"""Readers with extras are shown so many times fewer at once."""


@configurable
@ranged("policy")
class CausalLM(TensorDictModuleBase):
    """Any Hugging Face causal language model, from a configuration or a local folder.

    ``forward`` samples one turn for TorchRL collectors: it reads ``tokens [B, N]`` and ``token_mask [B, N]`` and writes
    ``action``, ``action_mask`` and ``behavior_log_prob``, each ``[B, max_new_tokens]``.

    Args:
        tokenizer: vocabulary and special tokens.
        max_length: longest row.
        path: folder of a model (``config.json`` and safetensors), or of a LoRA adapter that names one.
        adapter: folder of a LoRA adapter for ``path``.
        config: instead of ``path``: ``model_type`` and sizes of a fresh model, see
            :func:`~unified_rl.policies.pretrained.build_model`.
        lora: train fresh low-rank adapters instead of the weights: ``r`` (16), ``lora_alpha`` (32), ``target_modules``
            (``all-linear``) and ``use_rslora`` (false), named as in peft. The adapters are float32 whatever ``dtype``.
        allow_hub: fetch ``path`` from the hub where it is no folder.
        temperature: of sampling and of every log-prob.
        top_k: keep the most likely tokens only; 0 keeps all.
        top_p: keep the nucleus of this probability only; 1 keeps all. A stored token that has left the support of the
            present weights scores ``-inf``; the correction rejects and counts it.
        min_p: drop tokens below this share of the most probable one's probability; 0 keeps all.
        repetition_penalty: of tokens that came before, in prompt or answer (CTRL, as in transformers); 1 is none.
            Scoring then looks up what came before every token, which costs some passes over the logits more.
        dtype: of the weights. Only float32 weights are trained: half precision rounds small steps away. Under adapters
            the weights are not trained, and may be bfloat16.
        autocast: run matrix products in bfloat16.
        logit_chunk: positions whose logits are held at a time; the rest is recomputed in the backward pass. 0 chooses
            so that about 128 MiB are held.
        gradient_checkpointing: recompute the layers in the backward pass.
        share_prompts: encode a prompt once for all rows of a batch that begin with it, when scoring too (not together
            with ``gradient_checkpointing``).
        max_new_tokens: of ``forward``.
        cuda_graph: replay decoding steps from a CUDA graph, for few rows, where the device waits for the launch of
            kernels. Finished rows then stay in the batch until all are.
        engine: what samples the rollouts: ``own`` is the loop of this library, ``transformers`` its continuous
            batching, ``vllm`` and ``sglang`` are servers. See docs/engines.md.
        engine_dtype: what rollouts are sampled in, where it is not the policy's ``dtype``: a copy in ``float32`` or
            ``bfloat16``, or with linear layers rounded to ``float8``, ``int8`` or ``int4``; of a server, what it
            computes in. Rows hold the log-probs of the sampler.
        server: ``http://HOST:PORT`` of the server, or one for each worker of ``engine=ray``.
        server_folder: absolute path of a folder that this machine and the server's have in common.
        server_sync: how weights reach the server.
        server_timeout: seconds without a sign of life after which a request counts as lost.
        server_retries: further tries of a request.
        server_requests: requests under way.
        seed: of fresh weights, and of the policy's own :attr:`generator`.

    Attributes:
        end_ids: ids that end an answer by the folder's generation and model configuration.
        rates: :meth:`learning_rates` of its weights.
        refresh: of :func:`unified_rl.policies.generation.generate`, for whoever writes weights while it samples.

    Raises:
        ConfigError, CheckpointError: as :func:`~unified_rl.policies.pretrained.build_model`, and for a bad transform.
    """

    domain: ClassVar[Domain] = "language"
    exact = True
    supports_discrete = True
    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (("path", "config"), ("adapter", "lora"))
    """Ways of one thing: who gives one drops what an option's file says of the other."""

    def __init__(
        self,
        tokenizer: Any,
        max_length: Count,
        *,
        path: str | None = None,
        adapter: str | None = None,
        config: dict[str, Any] | None = None,
        lora: dict[str, Any] | None = None,
        allow_hub: bool = False,
        temperature: Positive = 1.0,
        top_k: Whole = 0,
        top_p: Fraction = 1.0,
        min_p: Share = 0.0,
        repetition_penalty: Positive = 1.0,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        autocast: bool = False,
        logit_chunk: Whole = 0,
        gradient_checkpointing: bool = False,
        share_prompts: bool = True,
        max_new_tokens: Count = 16,
        cuda_graph: bool = False,
        engine: Name = "own",
        engine_dtype: Precision | None = None,
        server: Texts | None = None,
        server_folder: str | None = None,
        server_sync: Sync = "disk",
        server_timeout: Seconds = 600.0,
        server_retries: Whole = 5,
        server_requests: Count = 64,
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        self.engine = EngineSettings(
            engine, engine_dtype, server, server_folder, server_sync, server_timeout, server_retries, server_requests
        )
        transform = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty}
        check_engine_settings({**dataclasses.asdict(self.engine), **transform})
        self._sampler: Sampler | None = None
        self._worker = 0
        self.in_keys = ["tokens", "token_mask"]
        self.out_keys = ["action", "action_mask", "behavior_log_prob"]
        self.sampling = Sampling(temperature, top_k, top_p, len(tokenizer), min_p, repetition_penalty)
        self.tokenizer, self.max_length, self.max_new_tokens = tokenizer, max_length, max_new_tokens
        self.pad_id, self.eos_id = special_ids(tokenizer)
        self.autocast, self.logit_chunk, self.cuda_graph, self.seed = autocast, logit_chunk, cuda_graph, seed
        model: Any = build_model(
            AutoModelForCausalLM,
            tokenizer,
            max_length,
            path=path,
            adapter=adapter,
            config=config,
            lora=None if lora is None else check_lora(lora),
            allow_hub=allow_hub,
            dtype=dtype,
            seed=seed,
        )
        model.logit_shape = logit_shape(model)
        self.end_ids = tuple(sorted(i for i in end_ids_of_folder(path or "") if i < len(tokenizer)))
        self._recomputed = _recompute_layers(model) if gradient_checkpointing else []
        known = model.logit_shape is not None and has_plain_cache(model)
        self.share_prompts = share_prompts and not gradient_checkpointing and known
        self.model: Any = model
        self._generator: torch.Generator | None = None
        self.refresh: Callable[[], int] | None = None
        self.rates = self.learning_rates({"path": path, "adapter": adapter, "lora": lora})
        self._keep_base_out(model_and_adapter(path, adapter)[0])

    def train(self, mode: bool = True) -> CausalLM:
        """Notes the mode; the model itself stays in evaluation mode, so that nothing random enters its scores."""
        super().train(mode)
        self.model.eval()
        return self

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> None:
        """Refuses a model that cannot be made, when a run is composed.

        Raises:
            ConfigError: a setting of ``config`` or ``lora`` that is unknown, of the wrong type or out of its range, or
                settings of an engine that do not go together.
        """
        check_model_config(settings.get("config"), "policy.config")
        check_engine_settings(settings)
        if settings.get("lora") is not None:
            check_lora(settings["lora"])

    @classmethod
    def learning_rates(cls, settings: Mapping[str, Any]) -> dict[str, float] | None:
        """The usual rates for what ``settings`` describe, where nobody gives one; None for fresh weights.

        A pretrained model takes 1e-6 by reinforcement and 1e-5 by imitation, and adapters ten times as much ("LoRA
        Without Regret", Thinking Machines Lab 2025). ``fresh`` is for weights beside it that begin anew, such as a
        critic's.
        """
        if settings.get("path") is None:
            return None
        adapted = settings.get("lora") is not None or model_and_adapter(settings["path"], settings.get("adapter"))[1]
        reinforcement, supervised = (1e-5, 1e-4) if adapted else (1e-6, 1e-5)
        return {"reinforcement": reinforcement, "supervised": supervised, "fresh": 3e-4}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.device
        return device

    @property
    def log_ratio_tolerance(self) -> float:
        """How far a token's log-prob may lie from its sampler's at equal weights.

        Sampling with a cache and scoring whole rows round differently: a few 1e-5 in float32, and in bfloat16, with its
        8 bits of precision, hundredths on most tokens and tenths on improbable ones. There is no bound where another
        precision samples than is trained: the correction weighs what differs.
        """
        if self.coarsely_sampled:
            return float("inf")
        return 0.5 if self.autocast or self.model.dtype in (torch.bfloat16, torch.float16) else 1e-2

    @property
    def generator(self) -> torch.Generator:
        """The stream that ``forward`` draws from; settable. Its state is the owner's to checkpoint."""
        if self._generator is None:
            self._generator = torch.Generator(self.device).manual_seed(self.seed)
        return self._generator

    @generator.setter
    def generator(self, value: torch.Generator) -> None:
        self._generator = value

    @property
    def coarsely_sampled(self) -> bool:
        """Whether rollouts are sampled in another precision than is trained."""
        return self.engine.engine_dtype not in (None, str(self.model.dtype).removeprefix("torch."))

    @property
    def sampled_apart(self) -> bool:
        """Whether rows come from a sampler with other log-probs: another precision, or the kernels of a server."""
        return self.coarsely_sampled or bool(self.engine.servers)

    @property
    def sampler(self) -> Sampler | None:
        """What rollouts are sampled with where it is not the policy itself; made when it is first asked for."""
        if self._sampler is None:
            engine = make_engine(self.engine, self._worker)
            self._sampler = None if engine is None else Sampler(self, engine, self.engine)
        return self._sampler

    def sample_as(self, worker: int) -> None:
        """Gives rollouts the server of one of the run's workers, before the first of them."""
        self._worker, self._sampler = worker, None

    @property
    def adapted(self) -> bool:
        """Whether adapters are trained and the model's own weights stay as they are."""
        return bool(self._frozen)

    def save(self, folder: str, *, merge: bool = False, dtype: str | None = None) -> None:
        """Writes a folder that ``path`` takes: model or adapter, tokenizer and the generation configuration it had.

        Args:
            folder: is made.
            merge: write a whole model where an adapter was trained.
            dtype: of the weights; by default that of the folder that the model came from, and float32 for adapters.
        """
        save_model(self.model, self.tokenizer, Path(folder), merge=merge, dtype=dtype)

    def rest_adapters(self) -> None:
        """Switches adapters off where they change nothing, which fresh ones do: the model is then its base."""
        if self._frozen:
            rest_adapters(self.model)

    def __deepcopy__(self, memo: dict[int, Any]) -> CausalLM:
        """A copy; under adapters it has adapters of its own, and shares the weights that nobody trains."""
        for name, weight in self.model.named_parameters():
            if name in self._frozen:
                memo[id(weight)] = weight
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        memo[id(self._sampler)] = None  # a copy has weights of its own, and makes its own where it samples
        made.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        return made

    def _keep_base_out(self, folder: str | None) -> None:
        """Under adapters, the state holds a digest of the base model's folder instead of its weights."""
        self._frozen = frozen_names(self.model)
        if self._frozen and folder is not None and Path(folder).is_dir():
            self.register_buffer("base_digest", folder_digest(folder))
            self.register_state_dict_post_hook(_drop_base)
            self.register_load_state_dict_pre_hook(_check_base)
            self.register_load_state_dict_post_hook(_allow_base)

    # --- sampling ------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Tensor | Sequence[int]] | Tensor,
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        greedy: bool = False,
        samples_per_prompt: int = 1,
        backend: str = "own",
        lengths: Tensor | None = None,
        stop_strings: StopStrings | None = None,
        sampling: Sampling | None = None,
        beside: Beside | None = None,
    ) -> Generation:
        """Samples continuations; see :func:`unified_rl.policies.generation.generate`.

        ``stop_ids`` defaults to the tokenizer's end-of-text id and :attr:`end_ids`, ``sampling`` to the policy's own;
        another one is for evaluation, since rows of it are scored under the policy's. Ids beyond the tokenizer are
        never sampled.
        """
        sampling = dataclasses.replace(sampling or self.sampling, vocabulary=self.sampling.vocabulary)
        if stop_ids is None:
            stop_ids = sorted({*self.end_ids, *([] if self.eos_id is None else [self.eos_id])})
        if generator is None and not greedy:
            generator = self.generator
        if self.cuda_graph and self.device.type != "cuda":
            raise ConfigError("policy.cuda_graph=true needs a CUDA device: set device=cuda, or leave it false")
        with self._precision():
            return generate(
                self.model,
                prompts,
                max_new_tokens=max_new_tokens,
                stop_ids=stop_ids,
                pad_id=self.pad_id,
                lengths=lengths,
                sampling=sampling,
                samples_per_prompt=samples_per_prompt,
                greedy=greedy,
                generator=generator,
                backend=backend,
                replay=self.cuda_graph,
                stop_strings=stop_strings,
                refresh=self.refresh,
                beside=beside,
            )

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Samples one turn after ``tokens [B, N]`` (right-padded, ``token_mask [B, N]``) and writes the out keys."""
        lengths = tensordict["token_mask"].sum(-1)
        out = self.generate(tensordict["tokens"], lengths=lengths, max_new_tokens=self.max_new_tokens)
        tensordict["action"] = out.tokens
        tensordict["action_mask"] = torch.arange(self.max_new_tokens, device=self.device) < out.length[:, None]
        tensordict["behavior_log_prob"] = out.log_prob
        return tensordict

    # --- scoring -------------------------------------------------------------------------------------------------

    def log_prob(self, batch: TensorDictBase) -> UnitLogProb:
        """Log-probs of the masked-in tokens under the sampling transform.

        Args:
            batch: ``tokens [B, N]`` int64, right-padded, and ``mask [B, N]`` bool, never True in column 0.

        Returns:
            ``[B, N]`` float32: entry ``n`` is ``log p(tokens[:, n] | tokens[:, :n])``, 0 where the mask is False,
            ``-inf`` where the token lies outside the truncated support.

        Raises:
            RecordError: ``tokens`` or ``mask`` is missing, or the mask holds column 0.
        """
        return UnitLogProb(self._score(batch, self.sampling)[0], batch["mask"], self.exact)

    def log_prob_and_entropy(self, batch: TensorDictBase) -> tuple[UnitLogProb, Tensor]:
        """As :meth:`log_prob`, with the entropy ``[B, N]`` in nats of each unit's distribution, 0 outside the mask."""
        log_prob, entropy = self._score(batch, self.sampling, entropy=True)
        return UnitLogProb(log_prob, batch["mask"], self.exact), entropy

    def nll(self, batch: TensorDictBase, generator: torch.Generator | None = None) -> Tensor:
        """Supervised loss ``[B, N]`` in nats at temperature 1 without truncation, 0 outside the mask."""
        return -self._score(batch, Sampling(vocabulary=self.sampling.vocabulary))[0]

    def read_logits(self, batch: TensorDictBase, reader: Reader, *extras: Tensor) -> tuple[Tensor, ...]:
        """What ``reader`` makes of every unit's distribution; logits are never held for a whole batch.

        Args:
            batch: as for :meth:`log_prob`.
            reader: ``(logits [n, V], token [n], *extras [n, ...]) -> tensors [n, ...]``; the logits are transformed.
            extras: ``[B, N, ...]``, handed to the reader unit by unit.

        Returns:
            The reader's tensors as ``[B, N, ...]``, 0 outside the mask.
        """
        return self._read(batch, self.sampling, reader, *extras)

    def _score(self, batch: TensorDictBase, sampling: Sampling, entropy: bool = False) -> tuple[Tensor, ...]:
        return self._read(batch, sampling, _log_prob_and_entropy if entropy else _log_prob)

    def _read(self, batch: TensorDictBase, sampling: Sampling, reader: Reader, *extras: Tensor) -> tuple[Tensor, ...]:
        tokens, mask = _tokens_and_mask(batch)
        rows, width = tokens.shape
        row, column = mask.nonzero(as_tuple=True)
        picked = [extra[row, column] for extra in extras]

        def read(logits: Tensor, target: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
            seen = None
            if sampling.remembers:
                *more_, at_row, at_column = more
                more, seen = tuple(more_), seen_before(tokens, at_row, at_column, sampling.words(logits))
            return reader(sampling.logits(logits, seen), target, *more)

        if sampling.remembers:
            picked += [row, column]

        with self._precision(), self._recomputing():
            found = self._read_at(tokens, mask, row, column, read, picked)
        unit = row * width + column
        return tuple(
            x.new_zeros(rows * width, *x.shape[1:]).index_put((unit,), x).view(rows, width, *x.shape[1:]) for x in found
        )

    def _read_at(
        self, tokens: Tensor, mask: Tensor, row: Tensor, column: Tensor, read: Reader, extras: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """What ``read`` makes of the logits, ``[n, ...]``, at ``(row, column)``."""
        target = tokens[row, column]
        hidden = self._hidden(tokens, mask, row, column)
        if self.model.logit_shape is None:
            return read(hidden, target, *extras)

        def score(states: Tensor, *wanted: Tensor) -> tuple[Tensor, ...]:
            return read(read_head(self.model, states), *wanted)

        held = len(extras) and EXTRAS_HOLD  # who compares with another distribution holds several more of that size
        words = self.model.get_output_embeddings().weight.shape[0] * max(1, held)
        size = self.logit_chunk or max(1, LOGITS_AT_ONCE // words)
        if len(target) <= size:
            return score(hidden, target, *extras)
        recompute = torch.is_grad_enabled()
        parts = [
            checkpoint(score, *piece, use_reentrant=False, preserve_rng_state=False) if recompute else score(*piece)
            for piece in zip(*(torch.split(x, size) for x in (hidden, target, *extras)), strict=True)
        ]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def _hidden(self, tokens: Tensor, mask: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """Last hidden states ``[n, d]`` that predict the tokens at ``(row, column)``.

        Logits ``[n, V]`` where only the whole model can say how they follow from its states.
        """
        used = int(column.max()) if len(column) else 1  # nothing to the right of the last unit is needed
        with fused_layers(self.model, tokens.shape[0] * used):
            return self._encoded(tokens, mask, row, column, used)

    def _encoded(self, tokens: Tensor, mask: Tensor, row: Tensor, column: Tensor, used: int) -> Tensor:
        """:meth:`_hidden` from the first ``used`` columns."""
        if self.model.logit_shape is None:
            logits: Tensor = self.model(input_ids=tokens[:, :used], use_cache=False).logits
            return logits[row, column - 1]
        shared = find_shared(tokens, mask, used) if self.share_prompts else None
        if shared is not None:
            return shared_states(self.model, shared).index_select(0, shared.locate(row, column - 1))
        states = trunk_states(self.model, tokens[:, :used]).flatten(0, 1)
        return states.index_select(0, row * used + column - 1)

    def unit_states(self, batch: TensorDictBase) -> Tensor:
        """Last hidden states ``[B, N, d]`` from which :meth:`logits_of` makes each unit's distribution."""
        tokens, mask = _tokens_and_mask(batch)
        row, column = mask.nonzero(as_tuple=True)
        with self._precision(), self._recomputing():
            hidden = self._hidden(tokens, mask, row, column)
        return hidden.new_zeros(*tokens.shape, hidden.shape[-1]).index_put((row, column), hidden)

    def logits_of(self, states: Tensor) -> Tensor:
        """Transformed logits ``[n, V]`` of states ``[n, d]``."""
        with self._precision():
            known = self.model.logit_shape is not None
            return self.sampling.logits(read_head(self.model, states) if known else states)

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Layers recompute in the backward pass only where they believe that they train."""
        for layer in self._recomputed:
            layer.training = True
        try:
            yield
        finally:
            for layer in self._recomputed:
                layer.training = False

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)


def _recompute_layers(model: Any) -> list[Any]:
    """Switches on gradient checkpointing, under the name that this version of transformers gives it.

    Returns:
        The modules that recompute while ``training`` is set.
    """
    how = recomputing(model)
    try:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(how)
    except ValueError as error:
        kind = model.config.model_type
        raise ConfigError(f"policy.gradient_checkpointing: {kind} cannot recompute its layers; leave it out") from error
    return [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]


def _drop_base(policy: CausalLM, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in policy._frozen:
        state.pop(f"{prefix}model.{name}", None)


def _check_base(policy: CausalLM, state: Mapping[str, Any], prefix: str, *arguments: Any) -> None:
    found = state.get(f"{prefix}base_digest")
    if found is not None and not torch.equal(found.cpu(), policy.base_digest.cpu()):
        raise CheckpointError(
            "these adapters were trained on another base model than the one in policy.path: its files have changed"
        )


def _allow_base(policy: CausalLM, incompatible: Any) -> None:
    left_out = {f"model.{name}" for name in policy._frozen}
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not key.endswith(tuple(left_out))]


def _log_prob(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    return (token_log_prob(logits, target),)


def _log_prob_and_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    return token_log_prob(logits, target), entropy_of(logits)


def _tokens_and_mask(batch: TensorDictBase | Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    for key in ("tokens", "mask"):
        if key not in batch.keys():
            raise RecordError(f"a language model cannot score this batch: it lacks {key!r}")
    mask = batch["mask"]
    if bool(mask[:, 0].any()):
        raise RecordError("mask is True in column 0: the first token of a row has no context to be sampled from")
    return batch["tokens"], mask
