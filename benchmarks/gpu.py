"""What a GPU does with this package, in one call of under ten minutes.

    python benchmarks/gpu.py [--only NAME ...] [--csv FILE]      on a machine with a CUDA device
    python benchmarks/gpu.py --only language --profile FOLDER    also which kernels and calls take the time
    python benchmarks/gpu.py --smoke                             tiny sizes on the CPU: shows that everything runs

Parts: ``language`` (a GRPO step of a 0.5B-class Qwen3 configuration in bf16), ``sac`` and ``replay``.
Every figure is a line ``part, setting, quantity, value, unit``. The update's share of the device's arithmetic is 6
floating point operations a weight and token (output layer included, attention and recomputation not) over the rate of a
large bf16 product measured on the same device.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedTokenizerFast

from unified_rl.agents.actor_critic import ActorCritic
from unified_rl.correction import load_correction
from unified_rl.objectives.transitions import KEYS, prepare_batch
from unified_rl.optimizer import Optimizer
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.policies.gaussian import GaussianPolicy
from unified_rl.replay import Replay, Uniform


class Figure(NamedTuple):
    """One measured number."""

    part: str
    setting: str
    quantity: str
    value: float
    unit: str


@dataclass(frozen=True)
class LanguageSize:
    """Sizes of the language part."""

    vocabulary: int = 151_936
    width: int = 896
    layers: int = 24
    heads: int = 14
    key_value_heads: int = 2
    mlp: int = 4864
    prompts: int = 8
    group: int = 8
    prompt: int = 256
    new: int = 256
    repeats: int = 3


SMOKE = LanguageSize(512, 32, 2, 4, 2, 48, 2, 2, 8, 6, 1)


def wait(device: torch.device) -> None:
    """Waits for the device's queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of a call, the device's queue emptied before and after, and what it returned."""
    wait(device)
    start = time.perf_counter()
    out = call()
    wait(device)
    return time.perf_counter() - start, out


def peak_memory(device: torch.device) -> float:
    """Largest memory allocated since the last call, in GiB (0 on the CPU); starts a new count."""
    if device.type != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return peak


# ---------------------------------------------------------------------------------------------------- language


def numbered_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A vocabulary of ``size`` made-up tokens; the first two are pad and eos."""
    tokenizer = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(size)}, unk_token="<0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<0>", eos_token="<1>")


def language_policy(size: LanguageSize, device: torch.device, **settings: Any) -> CausalLM:
    """A random Qwen3 policy with float32 weights and bf16 matrix products."""
    config = {
        "model_type": "qwen3",
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.key_value_heads,
        "intermediate_size": size.mlp,
        "tie_word_embeddings": True,
    }
    tokenizer = numbered_tokenizer(size.vocabulary)
    return CausalLM(tokenizer, size.prompt + size.new, config=config, autocast=True, **settings).to(device)


def language_record(policy: CausalLM, size: LanguageSize, generator: torch.Generator) -> TensorDict:
    """Sampled rows with random rewards and group advantages."""
    device = policy.device
    prompts = torch.randint(2, size.vocabulary, (size.prompts, size.prompt), generator=generator, device=device)
    out = policy.generate(
        prompts, max_new_tokens=size.new, stop_ids=[], samples_per_prompt=size.group, generator=generator
    )
    rows, width = size.prompts * size.group, size.prompt + size.new
    mask = torch.zeros(rows, width, dtype=torch.bool, device=device)
    mask[:, size.prompt :] = True
    behavior = torch.zeros(rows, width, device=device)
    behavior[:, size.prompt :] = out.log_prob
    reward = torch.rand(rows, 1, generator=generator, device=device)
    step = torch.zeros(rows, width, dtype=torch.int64, device=device)
    items = {
        "tokens": torch.cat([prompts.repeat_interleave(size.group, 0), out.tokens], 1),
        "token_mask": torch.ones_like(mask),
        "mask": mask,
        "behavior_log_prob": behavior,
        "step_index": step,
        "policy_version": step,
        "reward": reward,
        "advantage": reward - reward.mean(),
        "group": torch.arange(size.prompts, device=device).repeat_interleave(size.group),
    }
    return TensorDict(items, batch_size=[rows])


def language_update(policy: CausalLM, optimizer: Optimizer, batch: TensorDict, micro_batch: int) -> None:
    """One optimiser step with accumulated micro-batches."""
    correction = load_correction("dapo")
    stats = correction.prepare(batch["behavior_log_prob"], batch)
    optimizer.zero_grad()
    total = torch.zeros((), device=policy.device)
    for part, part_stats in zip(batch.split(micro_batch), stats.split(micro_batch), strict=True):
        loss = correction.loss(policy.log_prob(part).log_prob, part, part_stats).loss
        loss.backward()
        total = total + loss.detach()
    optimizer.step(total)


def product_rate(device: torch.device, size: int) -> float:
    """Floating point operations a second of a square bf16 matrix product."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    repeat(functools.partial(torch.mm, a, b), 3)
    spent = min(timed(functools.partial(repeat, functools.partial(torch.mm, a, b), 10), device)[0] for _ in range(3))
    return 10 * 2 * size**3 / spent


def write_profile(folder: Path | None, name: str, call: Callable[[], object], device: torch.device) -> None:
    """What one call spends on the device and on the host, by operation, as ``folder/name.txt``."""
    if folder is None:
        return
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=kinds) as found:
        timed(call, device)
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name.replace(' ', '_').replace(',', '')}.txt"
    file.write_text(found.key_averages().table(sort_by=order, row_limit=40))


def described(policy: CausalLM, size: LanguageSize, rows: int, how: str) -> str:
    """The setting column of a language figure."""
    count = sum(p.numel() for p in policy.parameters())
    return f"{count / 1e9:.2f}B bf16, {rows} rows of {size.prompt}+{size.new}, {how}"


def generation_figures(
    size: LanguageSize, device: torch.device, folder: Path | None
) -> Generator[Figure, None, TensorDict]:
    """Tokens a second and peak memory of generation, for a step's rows and four times as many; returns the rows."""
    step = None
    for how in ("launched one by one", "replayed from a CUDA graph") if device.type == "cuda" else ("on the CPU",):
        generator = torch.Generator(device).manual_seed(0)
        policy = language_policy(size, device, cuda_graph="graph" in how)
        for larger in (size, dataclasses.replace(size, group=4 * size.group)):
            peak_memory(device)
            spent = []
            for _ in range(size.repeats):
                seconds, batch = timed(functools.partial(language_record, policy, larger, generator), device)
                spent.append(seconds)
            step = batch if step is None else step
            rows = larger.prompts * larger.group
            setting = described(policy, size, rows, f"steps {how}")
            yield Figure("language", setting, "generation rate", rows * size.new / min(spent), "tokens/s")
            yield Figure("language", setting, "generation peak memory", peak_memory(device), "GiB")
            yield Figure("language", setting, "generation", min(spent), "s")
            yield Figure("language", setting, "decoding step, prefill shared out", 1e3 * min(spent) / size.new, "ms")
        brief = dataclasses.replace(size, new=max(2, size.new // 8))  # a whole one would fill the profile's memory
        record = functools.partial(language_record, policy, brief, generator)
        write_profile(folder, f"generation {how}", record, device)
    assert step is not None
    return step


def update_figures(
    name: str,
    size: LanguageSize,
    device: torch.device,
    batch: TensorDict,
    settings: dict[str, Any],
    peak: float,
    folder: Path | None,
) -> Iterator[Figure]:
    """Tokens a second, peak memory and seconds of the update of one variant, for two sizes of micro-batch."""
    policy = language_policy(size, device, **settings)
    optimizer = Optimizer({"policy": policy}, 1e-6, max_grad_norm=1.0)
    for micro_batch in (size.group, 4 * size.group):
        update = functools.partial(language_update, policy, optimizer, batch, micro_batch)
        update()  # the first one warms up
        peak_memory(device)
        spent = min(timed(update, device)[0] for _ in range(size.repeats))
        setting = described(policy, size, len(batch), f"{name}, micro-batches of {micro_batch}")
        yield Figure("language", setting, "update rate", batch["tokens"].numel() / spent, "tokens/s")
        yield Figure("language", setting, "update peak memory", peak_memory(device), "GiB")
        yield Figure("language", setting, "update", spent, "s")
        needed = 6 * sum(p.numel() for p in policy.parameters()) * batch["tokens"].numel()
        yield Figure("language", setting, "share of the rate of a large bf16 product", needed / spent / peak, "")
        write_profile(folder, f"update {name} {micro_batch}", update, device)


def bench_language(device: torch.device, smoke: bool, folder: Path | None = None) -> Iterator[Figure]:
    """A GRPO step, the logits of a few positions held at a time, in the ways that trade memory for time."""
    peak = product_rate(device, 256 if smoke else 8192)
    yield Figure("language", "bf16 product of large squares", "rate", peak / 1e12, "TFLOP/s")
    size = SMOKE if smoke else LanguageSize()
    chunk = {"logit_chunk": 5} if smoke else {}
    batch = yield from generation_figures(size, device, folder)
    ways: dict[str, dict[str, Any]] = {
        "prompts encoded once a group": {},
        "every row whole": {"share_prompts": False},
        "layers recomputed": {"gradient_checkpointing": True},
    }
    for name, settings in ways.items():
        yield from update_figures(name, size, device, batch, {**settings, **chunk}, peak, folder)


# ---------------------------------------------------------------------------------------------------- control


@dataclass(frozen=True)
class ControlSize:
    """Sizes of the SAC and replay parts."""

    rows: int = 1_000_000
    batch: int = 256
    width: int = 256
    observation: int = 17
    action: int = 6
    compared: int = 20
    updates: int = 500
    draws: int = 2000


CONTROL_SMOKE = ControlSize(2000, 32, 32, 17, 6, 4, 4, 10)
LOSS_TOLERANCE = 2e-3
"""Largest relative difference of a loss between the ways to run an update, over the compared updates."""


def control_rows(size: ControlSize, count: int, device: torch.device) -> TensorDict:
    """Random transitions of HalfCheetah's shapes, the same on every device."""
    g = torch.Generator().manual_seed(0)
    items = {
        "observation": torch.randn(count, size.observation, generator=g),
        "action": torch.rand(count, size.action, generator=g) * 2 - 1,
        "reward": torch.randn(count, generator=g),
        "discount": torch.full((count,), 0.99),
        "terminated": torch.rand(count, generator=g) < 0.01,
        "next_observation": torch.randn(count, size.observation, generator=g),
    }
    return TensorDict(items, batch_size=[count]).to(device)


def sac_agent(size: ControlSize, device: torch.device, **how: bool) -> ActorCritic:
    """A fresh agent; the same weights and noise at every call."""
    wide = (size.width, size.width)
    policy = GaussianPolicy(
        size.observation, size.action, [-1.0] * size.action, [1.0] * size.action, squash=True,
        state_dependent_std=True, hidden=wide, activation="relu", orthogonal=False,
    ).to(device)  # fmt: skip
    stream = torch.Generator(device).manual_seed(0)
    return ActorCritic(policy, stream, rows=1, batch_size=size.batch, critic_hidden=wide, device=str(device), **how)


def sac_losses(agent: ActorCritic, batches: Sequence[dict[str, Tensor]], noise: Tensor) -> Tensor:
    """Critic and actor losses ``[n, 2]`` of one gradient step on each batch."""
    step = agent.graph or agent.gradient_step
    found = []
    for batch, drawn in zip(batches, noise, strict=True):
        metrics = step(batch, drawn, True)
        found.append(torch.stack([metrics["loss/critic"], metrics["loss/policy"]]).clone())
    return torch.stack(found).cpu()


def bench_sac(device: torch.device, smoke: bool) -> Iterator[Figure]:
    """SAC updates a second, replay sample on the device included: eager, compiled, captured in a CUDA graph.

    Raises:
        RuntimeError: the losses of two ways differ by more than :data:`LOSS_TOLERANCE` on the same batches and noise.
    """
    size = CONTROL_SMOKE if smoke else ControlSize()
    ways: dict[str, dict[str, bool]] = {"eager": {}, "compiled": {"compile": True}, "graphed": {"cuda_graph": True}}
    if smoke:
        print("sac: compiled and graphed are left out: without a CUDA device there is no graph, and compiling takes")
        print("     minutes on a CPU for no gain")
        ways = {"eager": {}}
    replay = Replay(size.rows, sampler=Uniform(), device=str(device), seed=0)
    replay.extend(control_rows(size, size.rows, device))
    batches = [prepare_batch(replay.sample(size.batch, keys=KEYS), device) for _ in range(size.compared)]
    generator = torch.Generator(device).manual_seed(1)
    noise = torch.randn(size.compared, 2, size.batch, size.action, generator=generator, device=device)
    reference = torch.empty(0)
    for name, how in ways.items():
        agent = sac_agent(size, device, **how)
        losses = sac_losses(agent, batches, noise)
        reference = losses if name == "eager" else reference
        gap = float(((losses - reference).abs() / reference.abs().clamp(min=1e-2)).max())
        if not gap <= LOSS_TOLERANCE:
            raise RuntimeError(f"sac {name}: a loss differs from the eager one by {gap:.2g} (bound {LOSS_TOLERANCE})")
        train_repeatedly(agent, replay, 20)  # compiles what the first steps did not need
        spent, _ = timed(functools.partial(train_repeatedly, agent, replay, size.updates), device)
        setting = f"batch {size.batch}, 2x{size.width}, {name}"
        yield Figure("sac", setting, "update rate", size.updates / spent, "updates/s")
        yield Figure("sac", setting, "largest relative difference of a loss from eager", gap, "")


def train_repeatedly(agent: ActorCritic, replay: Replay, count: int) -> None:
    """``count`` gradient steps in one update, with one look at the losses at the end, as after a collection."""
    agent.draw.rows = count
    agent.update(replay)


def bench_replay(device: torch.device, smoke: bool) -> Iterator[Figure]:
    """Sampling to the device and writing rows made there, with the replay stored on the device and on the CPU."""
    size = CONTROL_SMOKE if smoke else ControlSize()
    batch = control_rows(size, size.batch, device)
    for name, place in (("stored on the device", device), ("stored on the CPU", torch.device("cpu"))):
        replay = Replay(size.rows, sampler=Uniform(), device=str(place), seed=0)
        replay.extend(control_rows(size, size.rows, place))
        calls: dict[str, Callable[[], object]] = {
            "sample": functools.partial(sample_to, replay, size.batch, device),
            "extend": functools.partial(extend_from, replay, batch, place),
        }
        for what, call in calls.items():
            timed(functools.partial(repeat, call, 10), device)
            spent, _ = timed(functools.partial(repeat, call, size.draws), device)
            setting = f"{size.rows:,} rows, {size.batch} a call, {name}"
            yield Figure("replay", setting, what, 1e6 * spent / size.draws, "us")


def sample_to(replay: Replay, count: int, device: torch.device) -> TensorDict:
    """A batch on the device that trains."""
    return replay.sample(count, keys=KEYS).to(device)


def extend_from(replay: Replay, batch: TensorDict, place: torch.device) -> None:
    """Writes rows that lie on the device that trains."""
    replay.extend(batch.to(place))


def repeat(call: Callable[[], object], count: int) -> None:
    """Calls ``count`` times."""
    for _ in range(count):
        call()


PARTS: dict[str, Callable[..., Iterator[Figure]]] = {
    "language": bench_language,
    "sac": bench_sac,
    "replay": bench_replay,
}


def run_part(name: str, device: torch.device, args: argparse.Namespace) -> Iterator[Figure]:
    """The figures of a part."""
    more = {"folder": args.profile} if name == "language" else {}
    return PARTS[name](device, args.smoke, **more)


def main() -> None:
    """Runs the parts and prints their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--profile", type=Path, help="folder for tables of what the language part spends")
    parser.add_argument("--csv")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        parser.error("no CUDA device here; --smoke runs tiny sizes on the CPU")
    device = torch.device("cpu" if args.smoke else "cuda")
    print("device:", "cpu (smoke run: the figures mean nothing)" if args.smoke else torch.cuda.get_device_name())
    with open(
        args.csv or os.devnull, "w", newline=""
    ) as file:  # written as it goes: a run that is cut off loses little
        writer = csv.writer(file)
        writer.writerow(Figure._fields)
        for figure in (figure for name in args.only for figure in run_part(name, device, args)):
            print(f"{figure.part}: {figure.setting}: {figure.quantity} {figure.value:,.3f} {figure.unit}", flush=True)
            writer.writerow(figure)
            file.flush()


if __name__ == "__main__":
    main()
