"""Decoding rate of the own loop against transformers' ``generate``: same model, same prompts, interleaved, in one run.

    python benchmarks/generation.py [--csv FILE] [--batches 1 16 64 256] [--repeats 5] [--threads 1]

Prints tokens per CPU-second of each and the median of the pairwise ratios. Every row of a pair generates all its
tokens (no stop token), from prompts of 16 tokens, except in the last two tables: there the own loop gets 8 samples of
each prompt, and rows end early at random.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from unified_rl.policies.generation import Generation, generate
from unified_rl.policies.heads import logit_shape

SHAPES = {
    "0.8M": {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 512},
    "5M": {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 768},
}
VOCABULARY, PROMPT = 256, 16


def make_model(name: str) -> PreTrainedModel:
    """A random Qwen3 model of a named size."""
    shape = SHAPES[name]
    width, heads = shape["hidden_size"], shape["num_attention_heads"]
    config = AutoConfig.for_model(
        "qwen3", vocab_size=VOCABULARY, num_key_value_heads=heads, head_dim=width // heads,
        initializer_range=width**-0.5, max_position_embeddings=512, **shape,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    model.logit_shape = logit_shape(model)
    return model


def measure(call: Callable[[], Generation]) -> tuple[float, float, int]:
    """CPU seconds, wall seconds and sampled tokens of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    out = call()
    return time.process_time() - cpu, time.perf_counter() - wall, int(out.length.sum())


def compare(
    model: PreTrainedModel, batch: int, new: int, stops: list[int], group: int, repeats: int
) -> dict[str, float]:
    """Interleaved pairs of the two backends; medians over the pairs."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, VOCABULARY, (max(1, batch // group), PROMPT), generator=generator)

    def run(backend: str) -> tuple[float, float, int]:
        stream = torch.Generator().manual_seed(1)
        return measure(
            lambda: generate(
                model, prompts, max_new_tokens=new, stop_ids=stops, samples_per_prompt=group, generator=stream,
                backend=backend,
            )
        )  # fmt: skip

    run("own"), run("hf")
    pairs = [(run("own"), run("hf")) for _ in range(repeats)]
    rate = {i: statistics.median(pair[i][2] / pair[i][0] for pair in pairs) for i in (0, 1)}
    ratio = [(own[2] / own[0]) / (hf[2] / hf[0]) for own, hf in pairs]
    wall = [(own[2] / own[1]) / (hf[2] / hf[1]) for own, hf in pairs]
    return {
        "own_tokens_per_cpu_s": rate[0],
        "hf_tokens_per_cpu_s": rate[1],
        "ratio_cpu": statistics.median(ratio),
        "ratio_cpu_min": min(ratio),
        "ratio_cpu_max": max(ratio),
        "ratio_wall": statistics.median(wall),
    }


def main() -> None:
    """Runs every setting and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings: list[tuple[int, list[int], int, str]] = [(b, [], 1, "every row full length") for b in args.batches]
    big = max(args.batches)
    if big >= 8:
        settings += [
            (big, [], 8, "8 samples a prompt"),
            (big, list(range(16)), 8, "8 samples a prompt, rows end early"),
        ]
    rows = []
    print(
        f"{'model':>6} {'batch':>6} {'own tok/cpu-s':>14} {'hf tok/cpu-s':>14} {'ratio':>6} {'range':>12} {'wall':>6}"
    )
    for name in args.models:
        model = make_model(name)
        for batch, stops, group, note in settings:
            row = compare(model, batch, args.new, stops, group, args.repeats)
            rows.append({"model": name, "batch": batch, "note": note, "threads": args.threads, **row})
            span = f"{row['ratio_cpu_min']:.2f}-{row['ratio_cpu_max']:.2f}"
            print(
                f"{name:>6} {batch:>6} {row['own_tokens_per_cpu_s']:>14,.0f} {row['hf_tokens_per_cpu_s']:>14,.0f} "
                f"{row['ratio_cpu']:>6.2f} {span:>12} {row['ratio_wall']:>6.2f}  {note}",
                flush=True,
            )
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
