"""What a divergence over a vocabulary of 150,000 holds in memory: ``python benchmarks/divergences.py [--csv FILE]``.

One gradient of a distillation term between two small models is computed for batches of several sizes, and the bytes of
every storage that it creates are counted from below autograd, in the backward pass too. The largest storage and the
most that is alive at once are told in units of one ``[rows, tokens, vocabulary]`` tensor of float32. Written out with
both log-probs whole, the same loss holds several of these.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from unified_rl.agents.policy_gradient import PolicyGradient
from unified_rl.correction import load_correction
from unified_rl.policies.causal_lm import CausalLM

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from memory_meter import Meter

WORDS, TOKENS, PROMPT = 150_000, 128, 8
MODEL = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 32}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "forward_kl": {"kind": "forward_kl"},
    "reverse_kl": {"kind": "reverse_kl"},
    "jsd": {"kind": {"name": "jsd", "beta": 0.5}},
    "reverse_kl, top 64": {"kind": "reverse_kl", "top_k": 64},
}
AT_MOST = 2.0
"""Tensors ``[rows, tokens, vocabulary]``: fewer than so many may be alive at once, whatever the batch."""


def policy() -> CausalLM:
    """A small model over a large vocabulary."""
    words = {"<pad>": 0, "<eos>": 1, **{f"w{n}": n for n in range(2, WORDS)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="<eos>"
    )
    return CausalLM(tokenizer, PROMPT + TOKENS, config=MODEL, seed=1)


def batch(rows: int) -> TensorDict:
    """Answers of random tokens."""
    g = torch.Generator().manual_seed(0)
    shape = (rows, PROMPT + TOKENS)
    mask = (torch.arange(shape[1]) >= PROMPT).expand(shape).clone()
    return TensorDict(
        {
            "tokens": torch.randint(2, WORDS, shape, generator=g),
            "token_mask": torch.ones(shape, dtype=torch.bool),
            "mask": mask,
            "behavior_log_prob": torch.zeros(shape),
            "step_index": torch.zeros(shape, dtype=torch.int64),
            "source": torch.zeros(rows, dtype=torch.int64),
            "group": torch.arange(rows),
        },
        batch_size=[rows],
    )


def agent(student: CausalLM, rows: int, node: dict[str, Any]) -> PolicyGradient:
    """Distills from the student's first weights, moved."""
    term = {"name": "divergence", "anchor": "reference", **node}
    made = PolicyGradient(
        student,
        load_correction("reinforce"),
        torch.Generator().manual_seed(0),
        rows=rows,
        objectives={"policy": None, "distill": term},
    )
    with torch.no_grad():
        for weight in made.anchors["reference"].policy.parameters():  # type: ignore[attr-defined]
            weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    return made


def measured(student: CausalLM, rows: int, node: dict[str, Any], micro_batch: int | None) -> tuple[int, int]:
    """Bytes of the largest storage, and of the most alive at once, over one gradient."""
    made, data = agent(student, rows, node), batch(rows)
    made.optimizer.zero_grad()
    with Meter() as meter:
        made.objective.backward(data, micro_batch)
    return meter.largest, meter.peak


def written_out(student: CausalLM, rows: int) -> tuple[int, int]:
    """As :func:`measured`, of the reverse KL with both log-probs whole."""
    data, teacher = batch(rows), agent(student, rows, {}).anchors["reference"].policy
    with Meter() as meter:
        s = student.model(input_ids=data["tokens"]).logits[:, PROMPT - 1 : -1].log_softmax(-1)  # type: ignore[operator]
        with torch.no_grad():
            t = teacher.model(input_ids=data["tokens"]).logits[:, PROMPT - 1 : -1].log_softmax(-1)  # type: ignore[attr-defined]
        ((s.exp() * (s - t)).sum(-1).mean()).backward()
    return meter.largest, meter.peak


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 8], help="rows of a batch, 128 tokens each")
    parser.add_argument("--csv", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    student, found = policy(), []
    for rows in args.rows:
        whole = 4 * rows * TOKENS * WORDS
        cases = [(name, node, None) for name, node in KINDS.items()] + [("jsd, micro-batches of 1", KINDS["jsd"], 1)]
        for name, node, micro_batch in cases:
            largest, peak = measured(student, rows, node, micro_batch)
            found.append([name, rows, rows * TOKENS, WORDS, largest, peak, f"{peak / whole:.3f}"])
            print(f"{name:28} {rows:3} rows: largest {largest / 2**20:7.0f} MiB, alive {peak / 2**20:7.0f} MiB, "
                  f"{peak / whole:.2f} tensors", flush=True)  # fmt: skip
        if rows == min(args.rows):
            largest, peak = written_out(student, rows)
            found.append(["written out", rows, rows * TOKENS, WORDS, largest, peak, f"{peak / whole:.3f}"])
            print(f"{'written out':28} {rows:3} rows: alive {peak / 2**20:7.0f} MiB, {peak / whole:.2f} tensors")
    if args.csv is not None:
        with args.csv.open("w", newline="") as file:
            csv.writer(file).writerows(
                [["loss", "rows", "units", "vocabulary", "largest_bytes", "peak_bytes", "peak_tensors"], *found]
            )
    worst = max(float(line[-1]) for line in found if line[1] == max(args.rows))
    print(f"at {max(args.rows)} rows at most {worst:.2f} tensors [rows, tokens, vocabulary] (below {AT_MOST:g} wanted)")
    raise SystemExit(worst >= AT_MOST)


if __name__ == "__main__":
    main()
