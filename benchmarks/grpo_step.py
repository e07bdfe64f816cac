"""A GRPO step against TRL's ``GRPOTrainer``: same model, same batch, interleaved step by step in one process.

    python benchmarks/grpo_step.py [--steps 12] [--threads 1] [--csv FILE]       (needs trl, datasets, accelerate)
    python benchmarks/grpo_step.py --model FOLDER --steps 4 --warm-up 1          a real model, such as SmolLM2-135M

Qwen3 of 5M parameters (6 layers, width 256, 4 heads of 64, MLP 768, 256 tokens), 4 prompts of 16 tokens x 8 completions
forced to 64 tokens, float32, DAPO loss, no reference model, one AdamW update a batch. A step is generation, reward,
group advantages, log-probs, loss, backward, clipping and update. Ours reuses the sampler's log-probs as those of the
behaviour policy; TRL needs no second forward pass on policy either. Both start from the same weights.

With ``--model`` the prompts are questions of about 40 tokens in the model's chat template, of different lengths, and
completions are forced to 24 tokens. ``--bf16`` gives both bfloat16 matrix products over float32 weights (autocast).
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast, TrainerCallback

from unified_rl.correction import load_correction
from unified_rl.optimizer import Optimizer
from unified_rl.policies.causal_lm import CausalLM

VOCABULARY, PROMPT, PROMPTS, GROUP = 256, 16, 4, 8
SHAPE = {
    "model_type": "qwen3",
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 768,
}


@dataclass(frozen=True)
class Task:
    """What both sides train on.

    Attributes:
        policy: settings of :class:`CausalLM`.
        tokenizer: of both.
        new: tokens of every completion.
        lr: learning rate.
        question: the text of a random prompt.
        low: ids below it are rewarded.
        bf16: matrix products in bfloat16.
    """

    policy: dict[str, Any]
    tokenizer: Any
    new: int
    lr: float
    question: Callable[[random.Random], str]
    low: int
    bf16: bool

    def make(self) -> CausalLM:
        """A policy with the weights that both start from."""
        return CausalLM(self.tokenizer, 128, autocast=self.bf16, **self.policy)

    def prompts(self, count: int, stream: random.Random) -> list[str]:
        """``count`` prompts."""
        return [self.question(stream) for _ in range(count)]

    def reward(self, tokens: Tensor) -> Tensor:
        """Share of completion tokens ``[B, new]`` below ``low``."""
        return (tokens < self.low).float().mean(-1)


def small_task(bf16: bool) -> Task:
    """The 5M model on random letters."""
    tokenizer = make_tokenizer()

    def question(stream: random.Random) -> str:
        return str(tokenizer.decode([stream.randrange(2, VOCABULARY) for _ in range(PROMPT)]))

    return Task({"config": SHAPE}, tokenizer, 64, 3e-4, question, VOCABULARY // 2, bf16)


def model_task(folder: str, bf16: bool) -> Task:
    """A model folder on sums in its chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")

    def question(stream: random.Random) -> str:
        terms = [str(stream.randrange(10, 1000)) for _ in range(stream.randrange(2, 5))]
        said = f"What is {' + '.join(terms)}? Answer with only the number."
        turn = [{"role": "system", "content": "You are good at sums."}, {"role": "user", "content": said}]
        return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))

    return Task({"path": folder}, tokenizer, 24, 1e-6, question, len(tokenizer) // 50, bf16)


@dataclass
class Timer:
    """CPU and wall seconds of each measured step, and its mean reward."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)

    def start(self) -> None:
        """Begins a step."""
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def stop(self) -> None:
        """Ends a step."""
        self.cpu.append(time.process_time() - self._cpu)
        self.wall.append(time.perf_counter() - self._wall)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """256 single characters; the first two are pad and eos."""
    vocab = {chr(0x4E00 + i): i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=chr(0x4E00)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=chr(0x4E00), eos_token=chr(0x4E01), padding_side="left"
    )


class Ours:
    """One GRPO step with this package's parts."""

    def __init__(self, task: Task) -> None:
        self.task, self.policy, self.timer = task, task.make(), Timer()
        self.correction = load_correction("dapo")
        self.optimizer = Optimizer({"policy": self.policy}, task.lr, max_grad_norm=1.0)
        self.generator, self.stream = torch.Generator().manual_seed(0), random.Random(0)
        self.group = torch.arange(PROMPTS).repeat_interleave(GROUP)

    def collect(self) -> TensorDict:
        """A record of sampled rows with rewards and group advantages."""
        new, texts = self.task.new, self.task.prompts(PROMPTS, self.stream)
        prompts = [torch.tensor(ids) for ids in self.task.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        out = self.policy.generate(
            prompts, max_new_tokens=new, stop_ids=[], samples_per_prompt=GROUP, generator=self.generator
        )
        reward = self.task.reward(out.tokens)
        self.timer.reward.append(float(reward.mean()))
        grouped = reward.view(PROMPTS, GROUP)
        advantage = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
        length = torch.tensor([len(prompt) for prompt in prompts]).repeat_interleave(GROUP)
        columns = torch.arange(int(length.max()) + new)
        real, asked = columns < length[:, None] + new, columns < length[:, None]
        mask = real & ~asked
        tokens = torch.full(mask.shape, self.policy.pad_id)
        behavior, step = torch.zeros(mask.shape), torch.zeros(mask.shape, dtype=torch.int64)
        tokens[asked] = torch.cat([p for p in prompts for _ in range(GROUP)])
        tokens[mask], behavior[mask] = out.tokens.flatten(), out.log_prob.flatten()
        items = {
            "tokens": tokens,
            "token_mask": real,
            "mask": mask,
            "behavior_log_prob": behavior,
            "step_index": step,
            "policy_version": step,
            "reward": reward[:, None],
            "advantage": advantage.view(-1, 1),
            "group": self.group,
        }
        return TensorDict(items, batch_size=[len(mask)])

    def step(self) -> None:
        """Collects and updates once."""
        self.timer.start()
        batch = self.collect()
        self.optimizer.zero_grad()
        loss = self.correction(self.policy.log_prob(batch).log_prob, batch).loss
        loss.backward()
        self.optimizer.step(loss)
        self.timer.stop()


class Interleave(TrainerCallback):
    """Times each step of TRL and runs one of ours after it."""

    def __init__(self, ours: Ours) -> None:
        self.ours, self.timer = ours, Timer()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Starts TRL's clock: its step generates, scores and updates."""
        self.timer.start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stops TRL's clock, then runs our step."""
        self.timer.stop()
        self.ours.step()


def run(task: Task, steps: int, warm_up: int) -> tuple[Timer, Timer]:
    """Both trainers for ``warm_up + steps`` steps; returns our timer and TRL's."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    interleave = Interleave(Ours(task))
    twin = task.make().model
    total = warm_up + steps

    def reward(completion_ids: list[list[int]], **unused: Any) -> list[float]:
        values = task.reward(torch.tensor(completion_ids))
        interleave.timer.reward.append(float(values.mean()))
        return list(values.tolist())

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, max_steps=total, per_device_train_batch_size=PROMPTS * GROUP, num_generations=GROUP,
            max_completion_length=task.new, generation_kwargs={"min_new_tokens": task.new}, temperature=1.0, beta=0.0,
            loss_type="dapo", learning_rate=task.lr, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0,
            optim="adamw_torch_fused", bf16=task.bf16, use_cpu=True, gradient_checkpointing=False, report_to="none",
            save_strategy="no", logging_steps=10_000, disable_tqdm=True, seed=0,
        )  # fmt: skip
        data = Dataset.from_dict({"prompt": task.prompts(total * PROMPTS, random.Random(1))})
        trainer = GRPOTrainer(
            model=twin, reward_funcs=reward, args=config, train_dataset=data, processing_class=task.tokenizer,
            callbacks=[interleave],
        )  # fmt: skip
        trainer.train()
    return interleave.ours.timer, interleave.timer


def main() -> None:
    """Prints seconds a step of both, and the ratios of each pair of neighbouring steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", help="folder of a model; the 5M one where absent")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 matrix products on both sides")
    parser.add_argument("--csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    task = model_task(args.model, args.bf16) if args.model else small_task(args.bf16)
    ours, trl = run(task, args.steps, args.warm_up)
    rows = [
        {"step": i, "ours_cpu_s": oc, "trl_cpu_s": tc, "ours_wall_s": ow, "trl_wall_s": tw, "threads": args.threads}
        for i, (oc, tc, ow, tw) in enumerate(zip(ours.cpu, trl.cpu, ours.wall, trl.wall, strict=True))
    ][args.warm_up :]
    for clock in ("cpu", "wall"):
        pairs = [(row[f"ours_{clock}_s"], row[f"trl_{clock}_s"]) for row in rows]
        mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = sorted(b / a for a, b in pairs)
        print(
            f"{clock:>4}: ours {mine:.3f} s/step, TRL {theirs:.3f} s/step; "
            f"TRL/ours median {statistics.median(ratio):.2f} ({ratio[0]:.2f}-{ratio[-1]:.2f})"
        )
    print(f"reward, first and last step: ours {ours.reward[0]:.3f} {ours.reward[-1]:.3f}, ", end="")
    print(f"TRL {trl.reward[0]:.3f} {trl.reward[-1]:.3f}")
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
