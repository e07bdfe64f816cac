"""The cost of every correction against a bare PPO loss: ``python benchmarks/correction.py [--csv FILE]``.

Prepare, loss and backward of each preset, in turn with the PPO loss in plain torch (ratio, clip, mask, mean,
backward; no guards) on the same tensors. A ratio is the median of the rounds' ratios of CPU time. ``--language-model``
also times a training step of a causal language model of about 5M parameters at the first shape, and gives each preset's
share of it. ``peak`` and ``largest`` are all temporaries that live at once, and the largest of them, in float32 tensors
of the batch's shape.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.correction import correction_names, load_correction

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from memory_meter import Meter

SHAPES = ((64, 512), (256, 2048))
LABEL = str(list(SHAPES[0]))


def record(rows: int, width: int) -> tuple[Tensor, TensorDict]:
    """Log-probs with a little drift, answers of different lengths, groups of 8, two in three rows wrong; float32."""
    g = torch.Generator().manual_seed(0)
    current = -3 - torch.rand(rows, width, generator=g)
    items = {
        f"{name}_log_prob": current + 0.05 * torch.randn(rows, width, generator=g)
        for name in ("behavior", "proximal", "reference", "proxy", "teacher")
    }
    length = torch.randint(width // 2, width + 1, (rows, 1), generator=g)
    items["mask"] = torch.arange(width).expand(rows, width) < length
    items["step_index"] = (torch.arange(width) * 4 // width).expand(rows, width).contiguous()
    items["reward"] = torch.zeros(rows, 4)
    items["reward"][:, -1] = (torch.rand(rows, generator=g) < 0.33).float()
    items["advantage"] = torch.randn(rows, generator=g)
    items["group"] = torch.arange(rows) // 8
    items["source"] = torch.arange(rows) % 2
    items["policy_version"] = torch.zeros(rows, width, dtype=torch.int64)
    return current.requires_grad_(), TensorDict(items, batch_size=[rows])


def bare_ppo(log_prob: Tensor, behavior: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    """PPO as one writes it in ten lines."""
    ratio = (log_prob - behavior).exp()
    loss = torch.max(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
    return (loss * mask).sum() / mask.sum()


def seconds(f: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    f()
    return time.process_time() - start


def measure(rows: int, width: int, rounds: int, names: list[str]) -> list[dict[str, object]]:
    """One line a preset: milliseconds, and the ratio to the bare loss."""
    log_prob, batch = record(rows, width)
    mask, behavior = batch["mask"].float(), batch["behavior_log_prob"]
    advantage = batch["advantage"].unsqueeze(-1).expand(rows, width)

    def plain() -> None:
        log_prob.grad = None
        bare_ppo(log_prob, behavior, advantage, mask).backward()

    out: list[dict[str, object]] = []
    for name in names:
        correction = load_correction(name)

        def ours(correction=correction) -> None:  # type: ignore[no-untyped-def]
            log_prob.grad = None
            correction(log_prob, batch).loss.backward()

        ours()
        plain()
        both = [(seconds(ours), seconds(plain)) for _ in range(rounds)]
        ratio = statistics.median(a / b for a, b in both)
        took = statistics.median(a for a, _ in both)
        line = {"preset": name, "shape": f"[{rows}, {width}]", "ms": round(1e3 * took, 2), "ratio": round(ratio, 2)}
        out.append({**line, **memory(ours, 4 * rows * width)})
    return out


def memory(f: Callable[[], object], one: int) -> dict[str, float]:
    """What a call allocates, in units of ``one`` bytes."""
    with Meter() as meter:
        f()
    return {"peak": round(meter.peak / one, 2), "largest": round(meter.largest / one, 2)}


def language_model_step(rows: int, width: int, sample: int = 4) -> tuple[float, int]:
    """CPU seconds of forward, backward and optimiser step of a causal language model at this shape; its parameters.

    ``sample`` rows are timed and scaled up, because the whole takes minutes.
    """
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(
        vocab_size=1000, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=width,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(0, 1000, (sample, width), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        logits = model(input_ids=tokens).logits
        logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).sum().backward()

    step()
    passes = statistics.median(seconds(step) for _ in range(3))
    optimizer.step()
    return passes * rows / sample + seconds(optimizer.step), sum(p.numel() for p in model.parameters())


def add_shares(lines: list[dict[str, object]]) -> None:
    """Writes each preset's share of a language model's training step, in percent, and prints the summary."""
    step, size = language_model_step(*SHAPES[0])
    for line in lines:
        line["percent_of_lm_step"] = round(float(str(line["ms"])) / 10 / step, 4) if line["shape"] == LABEL else ""
    shares = sorted(float(str(x["percent_of_lm_step"])) for x in lines if x["shape"] == LABEL)
    print(
        f"share of a training step ({step:.0f} CPU seconds) of a language model of {size / 1e6:.1f}M parameters: "
        f"median {statistics.median(shares):.3f} %, largest {shares[-1]:.3f} % (target 2 %)"
    )


def main() -> None:
    """Prints the table and its summary; writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--names", nargs="*", default=None)
    parser.add_argument("--shapes", nargs="*", metavar="ROWSxTOKENS", help="for example 32x16384, rows that are long")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--language-model", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    names = args.names or correction_names()
    table: list[dict[str, object]] = []
    shapes = [tuple(map(int, text.split("x"))) for text in args.shapes] if args.shapes else SHAPES
    for rows, width in shapes:
        lines = measure(rows, width, args.rounds if rows < 100 else max(3, args.rounds // 3), names)
        table += lines
        ratios = sorted((float(str(x["ratio"])), str(x["preset"])) for x in lines)
        for line in lines:
            print("  ".join(f"{key}={value}" for key, value in line.items()))
        median = statistics.median(r for r, _ in ratios)
        worst = ", ".join(f"{name} {ratio}" for ratio, name in ratios[-5:])
        peak = max(float(str(line["peak"])) for line in lines)
        print(f"[{rows}, {width}]: median {median:.2f} (target 1.5), largest: {worst} (target 3); memory {peak} (16)")
    if args.language_model:
        add_shares(table)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
