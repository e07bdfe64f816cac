"""One update against an older revision: ``python benchmarks/update_path.py [--base REVISION] [--check] [--csv FILE]``.

The other revision is taken from this repository with ``git archive`` and imported beside the present code in one
process. Updates of both, and of a second instance of the old code (the noise), are timed in turn in random order; a
ratio is the median of the rounds' ratios of CPU time. ``--check`` instead compares weights bit by bit after two updates
over a grid of corrections, domains and settings, with the model's own layers, a plain cache and each weight by itself
in place of what is quicker and rounds, or adds gradients up, otherwise.
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict

PACKAGE = "unified_rl"
TARGET = 1.02
TINY = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip
BOUNDS: dict[str, Any] = {"observation_dim": 3, "action_dim": 2, "action_low": [-1.0] * 2, "action_high": [1.0] * 2}

CORRECTIONS = (
    "reinforce", "ppo", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "tis", "icepop", "decoupled_ppo", "ppo_ewma",
    "a3po", "opo", "m2po", "p3o", "topr", "vespo", "kl_cov", "gmpo", "k1_mean_reject",
)  # fmt: skip
WRAPPED = ("fixpo", "mdpo", "sfpo", "s_ppo", "alp", "humanline")
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "language": [
        {},
        {"micro_batch": 5},
        {"epochs": 2, "minibatch": 4},
        {"epochs": 2, "minibatch": 6, "micro_batch": 4, "drop_equal_groups": True},
        {"advantage": "critic", "value_clip": 0.2, "epochs": 2, "minibatch": 6, "micro_batch": 4},
    ],
    "control": [
        {},
        {"epochs": 2, "minibatch": 8},
        {"micro_batch": 5, "entropy_coef": 0.1},
        {"value_clip": 0.2, "epochs": 2, "minibatch": 8, "micro_batch": 3},
        {"shuffle_steps": False, "entropy_coef": 0.01, "off_policy_targets": True},
    ],
}


class Side:
    """A revision of the package, with its modules kept apart from the other's.

    Args:
        folder: where ``unified_rl`` lies; None is the installed one.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.modules: dict[str, Any] = {}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Makes ``import unified_rl`` mean this revision."""
        before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == PACKAGE}
        for name in before:
            del sys.modules[name]
        sys.modules.update(self.modules)
        if self.folder is not None:
            sys.path.insert(0, str(self.folder))
        try:
            yield
        finally:
            if self.folder is not None:
                sys.path.remove(str(self.folder))
            ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] == PACKAGE}
            self.modules.update(ours)
            for name in ours:
                del sys.modules[name]
            sys.modules.update(before)

    def get(self, name: str) -> Any:
        """An object of the package, by its dotted name below it."""
        module, _, item = name.rpartition(".")
        found = importlib.import_module(f"{PACKAGE}.{module}")
        inside = self.folder is not None and self.folder in Path(str(found.__file__)).parents
        if inside != (self.folder is not None):
            raise RuntimeError(f"{found.__name__} was imported from {found.__file__}, not from {self.folder}")
        return getattr(found, item)


def revision(base: str, folder: Path) -> Side:
    """The code of another revision, laid out as an installed package."""
    root = Path(__file__).resolve().parents[1]
    data = subprocess.run(["git", "archive", base], cwd=root, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=BytesIO(data)) as archive:
        archive.extractall(folder, filter="data")
    for name in ("envs", "agents", "configs"):
        (folder / PACKAGE / name).symlink_to(folder / name)
    return Side(folder)


# ------------------------------------------------------------------------------------------- what is updated


def stream(seed: int = 0) -> torch.Generator:
    """A stream of its own."""
    return torch.Generator().manual_seed(seed)


def language(side: Side, prompts: int, group_size: int) -> tuple[Any, TensorDict]:
    """A tiny model and the rows that it sampled, with rewards that differ within groups."""
    env = side.get("envs.language.ChainMod")(modulus=5, terms=3)
    policy = side.get("policies.causal_lm.CausalLM")(**env.policy_inputs(), config=TINY, seed=1)
    make = side.get("rollout.LanguageRollout")
    rollout = make(env, policy, 1.0, stream(0), stream(1), prompts=prompts, group_size=group_size)
    rows, _ = rollout.collect(0)
    rows["reward"] = (torch.rand(len(rows), 1, generator=stream(2)) < 0.4).float()
    return policy, rows


def control(side: Side, horizon: int, lanes: int, normalize: bool = False) -> tuple[Any, TensorDict]:
    """A small Gaussian policy and transitions ``[horizon, lanes]`` with an episode end inside every lane."""
    policy = side.get("policies.gaussian.GaussianPolicy")(
        **BOUNDS, hidden=(16,), normalize_observation=normalize, seed=3
    )
    g = stream(0)
    observation = torch.randn(horizon + 1, lanes, 3, generator=g)
    if normalize:
        policy.update_normalizer(observation)
    sample = policy.sample(observation[:-1].reshape(-1, 3), generator=g)
    last = torch.arange(lanes) % (horizon - 1)
    ended = torch.zeros(horizon, lanes, dtype=torch.bool)
    ended[last, torch.arange(lanes)] = True
    even = torch.arange(lanes) % 2 == 0
    episode = torch.arange(lanes) + lanes * (torch.arange(horizon)[:, None] > last).long()
    items = {
        "observation": observation[:-1],
        **{key: value.reshape(horizon, lanes, *value.shape[1:]) for key, value in sample.items()},
        "reward": torch.randn(horizon, lanes, generator=g),
        "terminated": ended & even,
        "truncated": ended & ~even,
        "next_observation": observation[1:].clone(),
        "discount": torch.full((horizon, lanes), 0.9),
        "policy_version": torch.zeros(horizon, lanes, dtype=torch.int64),
        "episode": episode,
        "group": episode,
        "source": torch.zeros(horizon, lanes, dtype=torch.int64),
    }
    return policy, TensorDict(items, batch_size=[horizon, lanes])


class Updates:
    """An agent of one revision, and the rows that it is updated on again and again."""

    def __init__(self, side: Side, made: tuple[Any, TensorDict], correction: str, **settings: Any) -> None:
        self.side, self.policy, self.rows = side, copy.deepcopy(made[0]), made[1]
        self.language = hasattr(self.policy, "generate")
        count, length = (len(self.rows), None) if self.language else (self.rows.shape[1], self.rows.shape[0])
        extra = {} if self.language else {"critic_hidden": (16,)}
        load = side.get("correction.load_correction")(correction)
        make = side.get("agents.policy_gradient.PolicyGradient")
        self.agent = make(self.policy, load, stream(), rows=count, length=length, **extra, **settings)
        self.lanes = 1 if self.language else count
        self.queue = side.get("replay.Replay"), side.get("replay.Fresh")

    def __call__(self, version: int = 0) -> float:
        """CPU seconds of one update on the same rows."""
        make, sampler = self.queue
        replay = make(self.rows.numel(), lanes=self.lanes, sampler=sampler(), cut=False)
        replay.extend(self.rows.clone())
        self.agent.version, self.agent.checked = version, True
        start = time.process_time()
        self.agent.update(replay)
        return time.process_time() - start

    def weights(self) -> list[torch.Tensor]:
        """Of everything that the optimiser moves."""
        return [p.detach().clone() for p in self.agent.optimizer.parameters]


# ------------------------------------------------------------------------------------------- time

CASES: dict[str, tuple[Callable[[Side], tuple[Any, TensorDict]], str, dict[str, Any]]] = {
    "GRPO, tiny language model, 64 rows": (lambda side: language(side, 8, 8), "grpo", {}),
    "the same, micro-batches of 16": (lambda side: language(side, 8, 8), "grpo", {"micro_batch": 16}),
    "the same, 2 epochs of 16": (lambda side: language(side, 8, 8), "grpo", {"epochs": 2, "minibatch": 16}),
    "PPO, control, 32 steps of 32": (lambda side: control(side, 64, 16), "ppo", {"minibatch": 32}),
    "the same, observations standardised": (lambda side: control(side, 64, 16, True), "ppo", {"minibatch": 32}),
}


def timed(new: Side, old: Side, case: str, rounds: int) -> dict[str, Any]:
    """Median ratios of new/old and of old/old."""
    make, correction, settings = CASES[case]
    runs: dict[str, Updates] = {}
    for name, side in (("new", new), ("old", old), ("again", old)):
        with side.active():
            runs[name] = Updates(side, make(side), correction, **settings)
            runs[name]()
    order, found = random.Random(0), {name: [] for name in runs}  # type: ignore[var-annotated]
    for _ in range(rounds):
        for name in order.sample(list(runs), len(runs)):
            with runs[name].side.active():
                found[name].append(runs[name]())
    ratio = {
        name: statistics.median(a / b for a, b in zip(found[name], found["old"], strict=True))
        for name in ("new", "again")
    }
    ms = round(1e3 * statistics.median(found["new"]), 2)
    return {"case": case, "ms": ms, "ratio": round(ratio["new"], 3), "noise": round(ratio["again"], 3)}


# ------------------------------------------------------------------------------------------- bits


def after_two(side: Side, domain: str, correction: str, settings: dict[str, Any]) -> list[torch.Tensor] | str:
    """Weights after an update on fresh rows and one on stale rows, or the refusal."""
    with side.active():
        made = language(side, 3, 4) if domain == "language" else control(side, 8, 4)
        try:
            updates = Updates(side, made, correction, lr=1e-2, **settings)
            for version in (0, 1):
                updates(version)
        except Exception as error:  # both revisions must refuse the same
            return f"{type(error).__name__}: {error}"
        return updates.weights()


def check(new: Side, old: Side, corrections: list[str]) -> int:
    """Prints every case in which the two differ; returns how many do."""
    wrong = total = refused = 0
    for correction in corrections:
        for domain, settings in SETTINGS.items():
            for setting in settings:
                a, b = (after_two(side, domain, correction, setting) for side in (new, old))
                total += 1
                if isinstance(a, str) or isinstance(b, str):
                    refused += 1
                    same = a == b if isinstance(a, str) and isinstance(b, str) else False
                else:
                    same = len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
                if not same:
                    wrong += 1
                    gap = ""
                    if not isinstance(a, str) and not isinstance(b, str):
                        gap = f"largest difference {max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))}"
                    print(f"{correction} {domain} {setting}: {gap or (a if isinstance(a, str) else b)}", flush=True)
    print(f"{total} updates of both revisions: {total - wrong - refused} bit-equal, {refused} refused, {wrong} differ")
    return wrong


def main() -> None:
    """Prints the ratios, or what differs; exits with 1 where weights differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="3a26c9a", help="revision to compare with")
    parser.add_argument("--rounds", type=int, default=61)
    parser.add_argument("--check", action="store_true", help="compare weights bit by bit")
    parser.add_argument("--names", nargs="*", default=None, help="corrections of --check")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        new, old = Side(None), revision(args.base, Path(folder))
        if args.check:
            with new.active():
                causal_lm = importlib.import_module(f"{PACKAGE}.policies.causal_lm")
                causal_lm.fused_layers = lambda *given: nullcontext()
                decoding = importlib.import_module(f"{PACKAGE}.policies.generation")
                decoding.CPU_CACHE = decoding.SlabCache
                optimizer = importlib.import_module(f"{PACKAGE}.optimizer")
                optimizer.FlatWeights.possible = lambda optimizer: False  # norms are summed in another order
                base = importlib.import_module(f"{PACKAGE}.policies.base")
                base.NormalLogProb.apply = lambda x, *moments: base.normal_log_prob(x, *moments).sum(-1, keepdim=True)
                decoding.lean_step, decoding.packed_weights = lambda *args: None, lambda *args: nullcontext()
            sys.exit(int(check(new, old, args.names or [*CORRECTIONS, *WRAPPED]) > 0))
        table = []
        for case in CASES:
            line = timed(new, old, case, args.rounds)
            table.append(line)
            ratio, noise = (f"{line[key]:.3f}" for key in ("ratio", "noise"))
            print(f"{case}: {ratio} of {args.base} (target {TARGET}, noise {noise}), {line['ms']} ms", flush=True)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
