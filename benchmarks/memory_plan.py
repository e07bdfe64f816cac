"""The memory plan against what runs really take: ``python benchmarks/memory_plan.py [--csv FILE] [--only NAME]``.

Every run is a process of its own. It is built, its plan is made, the peak of its resident memory is set back, and two
updates and an evaluation are made; ``measured`` is by how much the peak rose, ``planned`` what the plan said is still
to come. The plan is an estimate of the most, for rows as long as the task allows; a ratio (planned / measured) within
0.7 and 2.2 holds.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

LOW, HIGH = 0.7, 2.2


def sizes(
    kind: str, hidden: int, layers: int, heads: int, inner: int, words: int, shared: int | None = None
) -> list[str]:
    """Overrides of a fresh model."""
    given = {"model_type": kind, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
             "intermediate_size": inner, "vocab_size": words}  # fmt: skip
    given |= {} if shared is None else {"num_key_value_heads": shared}
    return ["policy.config={" + ", ".join(f"{key}: {value}" for key, value in given.items()) + "}"]


LONG = ["env=chain_mod", "env.max_turn_tokens=118", "eval_episodes=8", "rollout.prompts=8", "rollout.group_size=8"]
SHORT = ["env=chain_mod", "env.max_turn_tokens=60", "eval_episodes=2", "rollout.prompts=2", "rollout.group_size=8"]
SMALL = sizes("llama", 192, 4, 4, 768, 512)
QWEN = sizes("qwen3", 256, 4, 8, 768, 32000, shared=2)
RUNS: dict[str, list[str]] = {
    "update of 64 rows, llama 2M": [*LONG, *SMALL],
    "micro-batches of 16 rows, llama 2M": [*LONG, *SMALL, "agent.micro_batch=16"],
    "recomputed layers, llama 2M": [*LONG, *SMALL, "policy.gradient_checkpointing=true"],
    "cache of 512 rows, llama 2M": [
        *LONG,
        *SMALL,
        "agent.micro_batch=8",
        "rollout.prompts=64",
        "env.max_turn_tokens=40",
    ],
    "evaluation of 256 rows, llama 2M": [
        *LONG,
        *SMALL,
        "agent.micro_batch=4",
        "rollout.prompts=1",
        "eval_episodes=256",
    ],
    "micro-batches and a reference, qwen3 19M": [*SHORT, *QWEN, "agent.micro_batch=8", "agent.kl=0.01"],
    "top-p, qwen3 19M": [*SHORT, *QWEN, "agent.micro_batch=8", "policy.top_p=0.9"],
    "fine-tuning, qwen3 19M": ["env=chain_mod", "agent=sft", *QWEN, "rollout.rows=64", "eval_episodes=1"],
}


def status(name: str) -> int:
    """A number of bytes that the kernel tells of this process."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def measure(overrides: list[str]) -> dict[str, Any]:
    """Plans and makes one run in this process."""
    import torch

    from unified_rl.config import compose, resolve_defaults
    from unified_rl.training.run import Job

    torch.set_num_threads(1)
    last = {text.partition("=")[0]: text for text in [*overrides, "progress=false"]}
    job = Job(resolve_defaults(compose(list(last.values()))))
    job.env.stop_ids, job.policy.end_ids = [], ()  # every answer as long as it may be
    trainer = job.make_trainer(None)  # type: ignore[arg-type]
    plan = job.memory
    assert plan is not None
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back
    before = status("VmRSS")
    for _ in range(2):  # from the second on, optimiser and gradients are there while rows are sampled
        trainer.update()
    trainer.evaluate()
    return {"planned": plan.needed, "measured": status("VmHWM") - before, "table": str(plan)}


def main() -> None:
    """Prints the table; exits with 1 where a ratio lies outside."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--show", action="store_true", help="print every plan")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(RUNS[arguments.child])))
        return
    rows = []
    for name in RUNS:
        if arguments.only not in name:
            continue
        done = subprocess.run([sys.executable, __file__, "--child", name], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        ratio = found["planned"] / found["measured"]
        planned, measured = (round(found[key] / 1e6) for key in ("planned", "measured"))
        rows.append({"run": name, "planned_mb": planned, "measured_mb": measured, "ratio": round(ratio, 2)})
        print(f"{name:36s} planned {planned:6d} MB   measured {measured:6d} MB   {ratio:.2f}", flush=True)
        if arguments.show:
            print(found["table"])
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    sys.exit(not all(LOW <= row["ratio"] <= HIGH for row in rows))


if __name__ == "__main__":
    main()
