"""Sampling from a causal language model, with the log-prob of every token under its true sampling distribution.

:func:`generate` is an own loop over the model's key-value cache. A prompt is encoded once for all of its samples,
right-padded and without an attention mask (a causal model needs none), finished rows leave the cache, and tokens are
drawn in one Gumbel pass. ``backend="hf"`` runs the ``generate`` of transformers instead: the reference of the tests,
and the way for models whose cache is not plain attention over every position.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)

from unified_rl.errors import ConfigError
from unified_rl.policies.choosers import Chooser
from unified_rl.policies.cuda_graph_step import ReplayedStep
from unified_rl.policies.group_cache import GroupCache, group_attention
from unified_rl.policies.heads import read_head
from unified_rl.policies.kv_cache import FixedCache, SlabCache, count_layers, visible_columns
from unified_rl.policies.lean_step import LeanStep, lean_step
from unified_rl.policies.packed_weights import packed_weights
from unified_rl.policies.sampling import Sampling, draw, seen_before, token_log_prob
from unified_rl.policies.stop_strings import StopStrings

COMPACT_BELOW = 0.8
"""Finished rows leave the cache when the share of live rows falls below this."""

UNMASKED = ("recurrent_gemma", "rwkv", "xlstm")
"""Architectures whose state takes in padding, whatever the attention mask says."""

CHECK_EVERY_ON_DEVICE = 8
"""On an accelerator, how many tokens pass between two looks at how many rows are still alive (each look waits)."""


CPU_CACHE: type[GroupCache | SlabCache] = GroupCache
"""The cache of the own loop on a CPU; on a device attention kernels want one tensor a layer."""


@dataclass(frozen=True)
class Generation:
    """What was sampled.

    Attributes:
        tokens: ``[B, max_new_tokens]`` int64, the stop token included, ``pad_id`` after the end.
        log_prob: ``[B, max_new_tokens]`` float32, under the sampling distribution; 0 after the end.
        length: ``[B]`` int64, sampled tokens of each row.
        finished: ``[B]`` bool, False where the row ran out of its budget without a stop token.
        version: ``[B, max_new_tokens]`` int64, of the weights that sampled each token; -1 where they are those that
            whoever asked knows of, below that a mark of :mod:`~unified_rl.policies.choosers`; None where it is -1
            everywhere.
    """

    tokens: Tensor
    log_prob: Tensor
    length: Tensor
    finished: Tensor
    version: Tensor | None = None

    def rows(self) -> list[list[int]]:
        """The sampled ids of each row, without padding."""
        return [row[:n] for row, n in zip(self.tokens.tolist(), self.length.tolist(), strict=True)]


@dataclass(frozen=True)
class Beside:
    """Another model that reads along, and has a say in every token.

    Attributes:
        model: any ``AutoModelForCausalLM`` with the same vocabulary, also the one that generates.
        choose: makes the next token of what both expect, see :mod:`~unified_rl.policies.choosers`.
        sampling: how its logits become probabilities.
        prompts: what it sees in the place of each prompt; None is the same.
    """

    model: PreTrainedModel
    choose: Chooser
    sampling: Sampling
    prompts: Sequence[Tensor | Sequence[int]] | None = None


def pad_prompts(
    prompts: Sequence[Tensor | Sequence[int]] | Tensor, pad_id: int, device: torch.device, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Right-padded prompts ``[P, L]`` int64 and their lengths ``[P]`` int64.

    Args:
        prompts: ids of each prompt, or a right-padded ``[P, L]`` tensor.
        pad_id: fills the padding.
        device: where the result lies.
        lengths: ``[P]``, real tokens of a padded tensor; all of them where absent.

    Raises:
        ConfigError: no prompt, or an empty one.
    """
    if isinstance(prompts, Tensor):
        if lengths is None:
            lengths = torch.full((prompts.shape[0],), prompts.shape[1], dtype=torch.int64)
        tokens = prompts
    else:
        rows = [torch.as_tensor(p, dtype=torch.int64) for p in prompts]
        lengths = torch.tensor([len(r) for r in rows], dtype=torch.int64)
        tokens = torch.full((len(rows), int(lengths.max()) if rows else 0), pad_id, dtype=torch.int64)
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids)] = ids
    if not len(tokens) or int(lengths.min()) < 1:
        raise ConfigError("generation needs at least one prompt, and every prompt at least one token (for example bos)")
    return tokens[:, : int(lengths.max())].to(device), lengths.to(device)


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Tensor | Sequence[int]] | Tensor,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int = 0,
    lengths: Tensor | None = None,
    sampling: Sampling | None = None,
    samples_per_prompt: int = 1,
    greedy: bool = False,
    generator: torch.Generator | None = None,
    backend: str = "own",
    replay: bool = False,
    stop_strings: StopStrings | None = None,
    refresh: Callable[[], int] | None = None,
    beside: Beside | None = None,
) -> Generation:
    """Samples continuations; row ``i * samples_per_prompt + j`` is sample ``j`` of prompt ``i``.

    Args:
        model: any ``AutoModelForCausalLM`` on any device.
        prompts: token ids of each prompt, or a right-padded ``[P, L]`` tensor with ``lengths``.
        max_new_tokens: width of the result.
        stop_ids: ids that end a row; the id is part of the row and carries its log-prob.
        pad_id: fills what lies after the end of a row.
        lengths: ``[P]`` real tokens of a padded prompt tensor.
        sampling: temperature, truncations and repetition penalty. Log-probs are those of this distribution.
        samples_per_prompt: each prompt is encoded once and sampled this often.
        greedy: takes the most likely token; ``log_prob`` is still the token's under ``sampling``.
        generator: of the model's device, or of the CPU (then one number seeds a stream on the device). Needed unless
            ``greedy``.
        backend: ``own`` or ``hf``. Models with a sliding window or a recurrent state always take ``hf``.
        replay: on a CUDA device, replay the own loop's steps from a CUDA graph. Finished rows then stay in the batch
            until all are.
        stop_strings: texts that end a row too; the tokens that made one up are kept as sampled.
        refresh: called before the prompts are read and before every further token; it may write other weights into the
            model, and returns their version. What the cache holds stays as older weights made it.
        beside: another model that has a say in every token; log-probs are then those of the mixture.

    Raises:
        ConfigError: an empty prompt, no generator, an unknown backend, or ``replay``, ``refresh`` or ``beside`` where
            the own loop cannot run.
    """
    if backend not in ("own", "hf"):
        raise ConfigError(f"generation backend '{backend}' is unknown; use 'own' or 'hf'")
    if generator is None and not greedy:
        raise ConfigError("generation needs a generator, unless greedy=True")
    tokens, lengths = pad_prompts(prompts, pad_id, model.device, lengths)
    job = _Job(max_new_tokens, tuple(stop_ids), pad_id, sampling or Sampling(), samples_per_prompt, greedy, replay)
    job = dataclasses.replace(job, stop_strings=stop_strings, refresh=refresh, beside=beside)
    was_training = model.training
    model.eval()  # in training mode gradient checkpointing would switch the cache off
    try:
        own = backend == "own" and has_plain_cache(model)
        if replay and not own:
            raise ConfigError(
                "decoding cannot be replayed from a CUDA graph for this model or backend (it takes the own loop over a "
                "plain key-value cache); set policy.cuda_graph=false"
            )
        if refresh is not None and not own:
            raise ConfigError(
                "weights cannot change while this model samples (that takes the own loop over a plain key-value "
                "cache); set engine.in_flight=false"
            )
        if beside is not None:
            _check_beside(job, beside, own)
        if own:
            return _Loop(model, tokens, lengths, job, _on_device(generator, model.device)).run()
        if model.config.model_type in UNMASKED and len(lengths.unique()) > 1:
            return _by_length(model, tokens, lengths, job, generator)
        return _generate_hf(model, tokens, lengths, job, generator)
    finally:
        model.train(was_training)


def _check_beside(job: _Job, beside: Beside, own: bool) -> None:
    """Refuses two models at once where the loop cannot run both.

    Raises:
        ConfigError: says which of the two, or which setting, is in the way.
    """
    if not own or not has_plain_cache(beside.model):
        kind = beside.model.config.model_type
        raise ConfigError(
            f"two models choose tokens together in the own loop over plain key-value caches alone, which this model or "
            f"the other ({kind}) does not have; leave rollout.speaker out"
        )
    if job.greedy or job.replay or job.sampling.remembers or beside.sampling.remembers:
        raise ConfigError(
            "two models choose tokens together by sampling, without policy.cuda_graph and policy.repetition_penalty"
        )


def has_plain_cache(model: PreTrainedModel) -> bool:
    """True where every layer attends to every earlier position (no sliding window, no recurrent state)."""
    config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    return (
        all(type(layer).__name__ == "DynamicLayer" for layer in layers) and model.config._attn_implementation == "sdpa"
    )


@dataclass(frozen=True)
class _Job:
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    pad_id: int
    sampling: Sampling
    repeats: int
    greedy: bool
    replay: bool = False
    stop_strings: StopStrings | None = None
    refresh: Callable[[], int] | None = None
    beside: Beside | None = None

    def empty(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Padded tokens and zero log-probs ``[rows, max_new_tokens]``."""
        tokens = torch.full((rows, self.max_new_tokens), self.pad_id, dtype=torch.int64, device=device)
        return tokens, torch.zeros(rows, self.max_new_tokens, device=device)

    def pick(
        self, logits: Tensor, generator: torch.Generator | None, seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The next token ``[b]`` and its log-prob ``[b]`` from the model's logits ``[b, V]``.

        ``seen [b, V]``, of a sampling that remembers, takes the token in.
        """
        logits = self.sampling.logits(logits, seen)
        token = logits.argmax(-1) if self.greedy else draw(logits, generator)
        if seen is not None:
            seen.scatter_(1, token[:, None], True)
        return token, token_log_prob(logits, token)

    def seen_in(self, prompts: Tensor, lengths: Tensor, logits: Tensor) -> Tensor | None:
        """Which ids stand in each row's prompt, ``[B, V]``; None where the sampling does not remember."""
        if not self.sampling.remembers:
            return None
        rows = torch.arange(len(prompts), device=prompts.device)
        seen = seen_before(prompts, rows, lengths, self.sampling.words(logits))
        return seen.repeat_interleave(self.repeats, 0)


class _Loop:
    """The own decoding loop. ``row`` maps the rows that are still in the cache to the rows of the result."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Tensor,
        lengths: Tensor,
        job: _Job,
        generator: torch.Generator | None,
        slabs: bool = False,
    ) -> None:
        self.model, self.job, self.generator, self.prompts, self.lengths = model, job, generator, prompts, lengths
        self.device = prompts.device
        rows = len(prompts) * job.repeats
        width = prompts.shape[1]
        self.tokens, self.log_prob = job.empty(rows, self.device)
        marked = job.refresh is not None or job.beside is not None
        self.version = torch.full_like(self.tokens, -1) if marked else None
        self.now = -1
        self.stops = torch.tensor(job.stop_ids, dtype=torch.int64, device=self.device)
        self.row: Tensor | None = None  # None: every row, in order
        self.alive = torch.ones(rows, dtype=torch.bool, device=self.device)
        self.position = lengths.repeat_interleave(job.repeats)[:, None]
        slabs = slabs or job.beside is not None  # grouped attention is of one model at a time
        kind = CPU_CACHE if self.device.type == "cpu" and not slabs else SlabCache
        self.cache: FixedCache | GroupCache | SlabCache = kind(count_layers(model.config), job.repeats)
        self.visible: Tensor | None = None
        self.seen: Tensor | None = None
        self.replayed: ReplayedStep | None = None
        self.lean: LeanStep | None = None
        if job.replay or bool((lengths < width).any()):
            self.visible = visible_columns(self.position[:, 0], width, width + job.max_new_tokens)
        if job.replay:
            assert self.visible is not None
            column = torch.full((1,), width, dtype=torch.int64, device=self.device)
            self.cache = FixedCache(count_layers(model.config), job.repeats, job.max_new_tokens, column)
            self.visible[..., width:] = False
            self.replayed = ReplayedStep(self._forward, self.position, self.visible, column)
        self.cut = torch.full((rows,), job.max_new_tokens + 1, device=self.device)
        self.watched, self.looked = self.alive, 0  # rows that were alive at the last look for stop texts, and when
        self.check_every = 1 if self.device.type == "cpu" else CHECK_EVERY_ON_DEVICE
        self.companion = None if job.beside is None else self._beside(job.beside)

    def _beside(self, beside: Beside) -> _Loop:
        """The loop of the other model, which this one takes along."""
        prompts, lengths = self.prompts, self.lengths
        if beside.prompts is not None:
            prompts, lengths = pad_prompts(beside.prompts, self.job.pad_id, self.device)
        job = dataclasses.replace(self.job, sampling=beside.sampling, beside=None, refresh=None, replay=False)
        return _Loop(beside.model, prompts, lengths, job, None, slabs=True)

    @torch.no_grad()
    def run(self) -> Generation:
        job = self.job
        with self._attention():
            self._refresh()
            logits = self._prefill()
            if isinstance(self.cache, GroupCache) and not self.cache.usable:
                self.cache = self.cache.slabs()
            self.seen = job.seen_in(self.prompts, self.lengths, logits)
            rows, steps = len(self.tokens), job.max_new_tokens - 1
            stays = job.refresh is None and job.beside is None  # packed copies of weights would not follow
            self.lean = lean_step(self.model, self.cache, rows, steps) if stays else None
            with packed_weights(self.model, rows, steps) if stays and self.lean is None else nullcontext():
                self._decode(logits)
        found = ends(self.tokens, job.stop_ids, job.max_new_tokens)
        out = Generation(self.tokens, self.log_prob, *found, self.version)
        return _shortened(out, self.cut, job)

    def _refresh(self) -> None:
        """Newer weights, if there are any."""
        if self.job.refresh is not None:
            self.now = self.job.refresh()

    def _attention(self) -> AbstractContextManager[None]:
        return group_attention(self.cache) if isinstance(self.cache, GroupCache) else nullcontext()

    def _decode(self, logits: Tensor) -> None:
        """Samples until every row has ended, from the first ``logits [B, V]`` on."""
        job, width, step, other = self.job, self.prompts.shape[1], -1, self.companion
        expected = None if other is None else other._prefill()
        for step in range(job.max_new_tokens):
            token = self._record(step, logits, expected)
            if step + 1 == job.max_new_tokens:
                break
            if (step + 1) % self.check_every == 0:
                self._cut_at_texts(step)
                kept = self._compact()
                if kept is not None:
                    if not len(kept):
                        break
                    token = token[kept]
            self._refresh()
            logits = self._next(token, width + step + 1)
            if other is not None:
                expected = other._next(token, other.prompts.shape[1] + step + 1)
        self._cut_at_texts(step)

    def _cut_at_texts(self, step: int) -> None:
        """Ends rows whose tokens since the last look made up a stop text."""
        if self.job.stop_strings is None:
            return
        rows = self.watched.nonzero()[:, 0]
        sampled = rows if self.row is None else self.row[rows]
        found = self.job.stop_strings.find(self.tokens[sampled, : step + 1], self.looked)
        self.cut[sampled] = torch.where(found <= step + 1, found, self.cut[sampled])
        self.alive = self.alive.index_put((rows,), self.alive[rows] & (found > step + 1))
        self.watched, self.looked = self.alive, step + 1

    def _next(self, token: Tensor, filled: int) -> Tensor:
        """The logits after ``token [b]``, which becomes the cache's last of ``filled`` columns."""
        if self.replayed is not None:
            return self.replayed(token)
        mask = None if self.visible is None else self.visible[..., :filled]
        if self.lean is not None:
            logits = self.lean(token, self.position, mask)
        else:
            logits = self._forward(token[:, None], self.position, mask)
        self.position = self.position + 1
        return logits

    def _prefill(self) -> Tensor:
        """Encodes each prompt once; the first logits of every row."""
        width = self.prompts.shape[1]
        positions = torch.arange(width, device=self.device)[None]
        logits = self._forward(self.prompts, positions, None, last=self.lengths - 1)
        return logits.repeat_interleave(self.job.repeats, 0)

    def _forward(self, tokens: Tensor, positions: Tensor, mask: Tensor | None, last: Tensor | None = None) -> Tensor:
        """Logits ``[b, V]`` at the last column, or at column ``last[b]`` of each row."""
        inputs = {"attention_mask": mask, "position_ids": positions, "past_key_values": self.cache, "use_cache": True}
        if getattr(self.model, "logit_shape", None) is None:
            logits: Tensor = self.model(tokens, **inputs).logits
            return logits[:, -1] if last is None else logits[torch.arange(len(tokens), device=self.device), last]
        hidden = self.model.base_model(tokens, **inputs).last_hidden_state
        at = hidden[:, -1] if last is None else hidden[torch.arange(len(tokens), device=self.device), last]
        return read_head(self.model, at)

    def _record(self, step: int, logits: Tensor, expected: Tensor | None = None) -> Tensor:
        """Draws a token for every row in the cache and writes those of live rows; ``expected`` are another's logits."""
        version: int | Tensor = self.now
        if expected is None or self.job.beside is None:
            token, log_prob = self.job.pick(logits, self.generator, self.seen)
        else:
            own, other = self.job.sampling.logits(logits), self.job.beside.sampling.logits(expected)
            token, log_prob, mark = self.job.beside.choose(own, other, self.generator)
            version = torch.where(mark < 0, mark, self.now)
        token = torch.where(self.alive, token, self.job.pad_id)
        log_prob = log_prob.masked_fill(~self.alive, 0.0)
        if self.version is not None:
            self.version[slice(None) if self.row is None else self.row, step] = version  # type: ignore[index]
        if self.row is None:
            self.tokens[:, step], self.log_prob[:, step] = token, log_prob
        else:
            self.tokens[self.row, step], self.log_prob[self.row, step] = token, log_prob
        self.alive = self.alive & ~torch.isin(token, self.stops)
        return token

    def _compact(self) -> Tensor | None:
        """Drops finished rows from the cache where enough are finished; the rows kept, or None for no change."""
        rows = len(self.alive)
        live = int(self.alive.sum())
        if live and (live >= COMPACT_BELOW * rows or self.replayed is not None):
            return None
        kept = self.alive.nonzero()[:, 0]
        self.row = kept if self.row is None else self.row[kept]
        self.alive = self.watched = self.alive[kept]
        if self.seen is not None:
            self.seen = self.seen[kept]
        for loop in (self, self.companion):
            if loop is not None:
                loop._keep(kept)
        return kept

    def _keep(self, kept: Tensor) -> None:
        """Drops all other rows from the cache."""
        self.position = self.position[kept]
        if self.visible is not None:
            self.visible = self.visible[kept]
        if len(kept):
            self.cache.batch_select_indices(kept)


def _on_device(generator: torch.Generator | None, device: torch.device) -> torch.Generator | None:
    if generator is None or generator.device.type == device.type:
        return generator
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return torch.Generator(device=device).manual_seed(seed)


@torch.no_grad()
def _generate_hf(
    model: Any, prompts: Tensor, lengths: Tensor, job: _Job, generator: torch.Generator | None
) -> Generation:
    """The reference: ``generate`` of transformers on left-padded prompts, log-probs from its processed scores."""
    width = prompts.shape[1]
    columns = torch.arange(width, device=prompts.device)
    shift = (width - lengths)[:, None]
    source = (columns - shift).clamp_min(0)
    real = columns >= shift
    ids = torch.where(real, prompts.gather(1, source), job.pad_id).repeat_interleave(job.repeats, 0)
    remembers = job.sampling.remembers
    config = GenerationConfig(
        max_new_tokens=job.max_new_tokens,
        do_sample=not job.greedy,
        eos_token_id=list(job.stop_ids) or None,
        pad_token_id=job.pad_id,
        return_dict_in_generate=True,
        output_logits=True,
        **({} if job.greedy or remembers else _warpers(job.sampling)),
    )
    padded = model.config.get_text_config(decoder=True).vocab_size
    if 0 < job.sampling.vocabulary < padded and not remembers:
        config.suppress_tokens = list(range(job.sampling.vocabulary, padded))
    criteria = StoppingCriteriaList()
    if (texts := job.stop_strings) is not None:
        criteria.append(_JustMade(texts, width))
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        if generator is not None:
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
        more = {"logits_processor": LogitsProcessorList([_Transform(prompts, lengths, job)])} if remembers else {}
        out: Any = model.generate(
            ids,
            attention_mask=real.repeat_interleave(job.repeats, 0).long(),
            generation_config=config,
            stopping_criteria=criteria,
            **more,
        )
    raw = torch.stack(out.logits, 1)
    seen = job.seen_in(prompts, lengths, raw[:, 0])
    return _pack(out.sequences[:, width:], raw, job, seen)


class _Transform(LogitsProcessor):
    """The whole sampling transform inside transformers' ``generate``, whose own penalty would count padding too."""

    def __init__(self, prompts: Tensor, lengths: Tensor, job: _Job) -> None:
        self.prompts, self.lengths, self.job = prompts, lengths, job
        self.seen: Tensor | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Transformed scores ``[B, V]``, whatever lies beyond the vocabulary out of reach."""
        if self.seen is None:
            self.seen = self.job.seen_in(self.prompts, self.lengths, scores)
        else:
            last = input_ids[:, -1:].clamp(max=self.job.sampling.words(scores) - 1)  # finished rows hold padding
            cast(Tensor, self.seen).scatter_(1, last, True)
        out = self.job.sampling.logits(scores, self.seen)
        return torch.nn.functional.pad(out, (0, scores.shape[-1] - out.shape[-1]), value=float("-inf"))


class _JustMade:
    """Which rows end because their newest token made up a stop text, for the ``generate`` of transformers."""

    def __init__(self, texts: StopStrings, prompt: int) -> None:
        self.texts, self.prompt = texts, prompt

    def __call__(self, ids: Tensor, scores: Any, **unused: Any) -> Tensor:
        sampled = ids[:, self.prompt :]
        return self.texts.find(sampled, sampled.shape[1] - 1) <= sampled.shape[1]


def _by_length(
    model: Any, prompts: Tensor, lengths: Tensor, job: _Job, generator: torch.Generator | None
) -> Generation:
    """:func:`_generate_hf` of the prompts of each length apart, so that none is padded."""
    rows = torch.arange(len(prompts) * job.repeats, device=prompts.device).view(len(prompts), job.repeats)
    taken, parts = [], []
    for length in lengths.unique().tolist():
        chosen = lengths == length
        taken.append(rows[chosen].flatten())
        parts.append(_generate_hf(model, prompts[chosen, :length], lengths[chosen], job, generator))
    order = torch.cat(taken).argsort()
    names = ("tokens", "log_prob", "length", "finished")
    return Generation(*(torch.cat([getattr(part, name) for part in parts])[order] for name in names))


def _warpers(sampling: Sampling) -> dict[str, Any]:
    least = {"min_p": sampling.min_p} if sampling.min_p > 0 else {}
    return {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p, **least}


def _pack(sampled: Tensor, logits: Tensor, job: _Job, seen: Tensor | None = None) -> Generation:
    """Pads ``sampled [B, m]`` to the full width and scores it from the raw ``logits [B, m, V]``.

    ``seen [B, V]``: ids in the prompts, of a sampling that remembers.
    """
    tokens, log_prob = job.empty(len(sampled), sampled.device)
    length, finished = ends(sampled, job.stop_ids, job.max_new_tokens)
    live = torch.arange(sampled.shape[1], device=sampled.device) < length[:, None]
    if seen is None:
        score = token_log_prob(job.sampling.logits(logits), sampled)
    else:
        scores = []
        for said, read in zip(sampled.unbind(1), logits.unbind(1), strict=True):
            scores.append(token_log_prob(job.sampling.logits(read, seen), said))
            seen.scatter_(1, said.clamp(max=seen.shape[1] - 1)[:, None], True)
        score = torch.stack(scores, 1)
    tokens[:, : sampled.shape[1]] = torch.where(live, sampled, job.pad_id)
    log_prob[:, : sampled.shape[1]] = score.masked_fill(~live, 0.0)
    cut = length + 1 if job.stop_strings is None else job.stop_strings.find(sampled)
    return _shortened(Generation(tokens, log_prob, length, finished), cut, job)


def _shortened(sampled: Generation, cut: Tensor, job: _Job) -> Generation:
    """Rows that end with a stop text after ``cut [B]`` tokens, where that is earlier than another end of theirs."""
    if job.stop_strings is None:
        return sampled
    earlier = cut <= sampled.length
    length = torch.where(earlier, cut, sampled.length)
    over = torch.arange(job.max_new_tokens, device=cut.device) >= length[:, None]
    tokens, log_prob = sampled.tokens.masked_fill(over, job.pad_id), sampled.log_prob.masked_fill(over, 0.0)
    return Generation(tokens, log_prob, length, sampled.finished | earlier, sampled.version)


def ends(tokens: Tensor, stop_ids: Sequence[int], budget: int) -> tuple[Tensor, Tensor]:
    """Length up to and with the first stop token (else ``budget``), and whether there was one; both ``[B]``."""
    is_stop = torch.isin(tokens, torch.tensor(list(stop_ids), dtype=tokens.dtype, device=tokens.device))
    finished = is_stop.any(-1)
    return torch.where(finished, is_stop.int().argmax(-1) + 1, budget), finished
