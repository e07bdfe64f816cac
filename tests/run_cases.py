"""Whole runs of two updates, small enough to be made by the hundred."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from unified_rl import config as configuration
from unified_rl import instantiate
from unified_rl.config import compose, resolve_defaults
from unified_rl.envs.language import ChainMod
from unified_rl.envs.language.verdict import Verdict
from unified_rl.training.checkpoint import write_checkpoint
from unified_rl.training.run import Job, record_dataset

ALLOW = ("run_cases", "mjcf_cases")
UPDATES = 2


class EasyChain(ChainMod):
    """A task that random policies solve about every second time: two different digits among the last three letters."""

    def _judge(self, problem: dict[str, Any], text: str, turn: int) -> Verdict:
        right = len({c for c in text[-3:] if c.isdigit()}) >= 2
        return Verdict(reward=float(right), correct=right)

    def respond(self, problems: Any, turns: Any, finished: Any) -> Any:
        answer = super().respond(problems, turns, torch.ones_like(finished))
        answer.info["truncated"] = (~finished).float()  # judged all the same: an untrained policy never stops
        return answer


class CommaChain(EasyChain):
    """A task whose solutions are right and random answers sometimes: there is a comma."""

    def _judge(self, problem: dict[str, Any], text: str, turn: int) -> Verdict:
        return Verdict(reward=float("," in text), correct="," in text)


class SureChain(EasyChain):
    """A task in whose answers an untrained policy states a confidence now and then: the last digit, in ninths."""

    def restate(self, turn: Sequence[int], confidence: float) -> list[int] | None:
        digits = self.codec.encode(list("0123456789"))
        at = next((n for n in range(len(turn) - 1, -1, -1) if [turn[n]] in digits), None)
        return None if at is None else [*turn[:at], *digits[round(9 * confidence)], *turn[at + 1 :]]


LANGUAGE = (
    "env=chain_mod",
    "env._target_=run_cases.EasyChain",
    "env.modulus=5",
    "env.terms=3",
    "env.max_turn_tokens=6",
    "policy=causal_lm_tiny",
    "policy.config.hidden_size=16",
    "policy.config.num_attention_heads=2",
    "policy.config.num_hidden_layers=1",
    "policy.config.intermediate_size=32",
    "rollout.prompts=4",
    "rollout.group_size=4",
)
CONTROL = (
    "env=two_route",
    "policy=gaussian",
    "policy.hidden=[8]",
    "agent.critic_hidden=[8]",
    "rollout.num_envs=4",
    "rollout.horizon=8",
)


@dataclass(frozen=True)
class Outcome:
    """What a run left behind.

    Attributes:
        weights: of the policy by name, after :data:`UPDATES` updates.
        metrics: the last logged row, and the evaluation.
    """

    weights: dict[str, Tensor]
    metrics: dict[str, float]

    def differs(self, other: Outcome) -> bool:
        """Whether any weight or any metric is not exactly that of the other."""
        if self.weights.keys() != other.weights.keys() or self.metrics.keys() != other.metrics.keys():
            return True
        moved = any(not torch.equal(w, other.weights[name]) for name, w in self.weights.items())
        return moved or any(str(v) != str(other.metrics[name]) for name, v in self.metrics.items())


def merged(*parts: Sequence[str]) -> list[str]:
    """Overrides of which a later one replaces an earlier one of the same key, and settings of a key that is null."""
    found: dict[str, str] = {}
    for override in (o for part in parts for o in part):
        key = override.partition("=")[0]
        for inner in [k for k in found if k == key or (k.startswith(f"{key}.") and "." in key)]:
            del found[inner]
        found[key] = override
    return list(found.values())


_compose_groups = configuration._compose_groups
_parse = cache(configuration._parse)
_group_options = cache(configuration.group_options)
_own_parameters = cache(instantiate._own_parameters)


@cache
def _groups(chosen: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """Hydra's part of composing."""
    taken = [configuration.Override(f"{key}={value}", key, value) for key, value in chosen]
    return _compose_groups(taken, "train", (), configuration.group_options())


@contextmanager
def remembered() -> Iterator[None]:
    """Composes and builds as ever, but reads the same file, text and signature once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configuration, "_parse", lambda text: deepcopy(_parse(text)))  # composing writes into values
        patch.setattr(configuration, "group_options", lambda *unused: _group_options())
        patch.setattr(configuration, "_check_headers", lambda *unused: None)
        patch.setattr(
            configuration, "_compose_groups", lambda o, *unused: deepcopy(_groups(tuple((x.key, x.value) for x in o)))
        )
        patch.setattr(instantiate, "_own_parameters", _own_parameters)
        yield


def composed(overrides: Sequence[str]) -> dict[str, Any]:
    """A resolved configuration."""
    return resolve_defaults(compose(["progress=false", *overrides], allow=ALLOW), allow=ALLOW)


def run(overrides: Sequence[str], evaluated: bool = False) -> Outcome:
    """Composes a run, makes its updates, and reads the policy's weights and the metrics."""
    with TemporaryDirectory() as folder, remembered():
        job = Job(composed(overrides), ALLOW)
        job.warm_start(lambda *unused: None)
        return trained(job, job.make_trainer(Path(folder)), evaluated)


def trained(job: Any, trainer: Any, evaluated: bool) -> Outcome:
    """The outcome of the first updates of a trainer; nothing is saved."""
    trainer.planned, trainer.save = UPDATES, lambda: None
    logged: dict[str, float] = {}
    trainer.display = lambda steps, metrics: logged.update(metrics)
    if not evaluated:
        trainer.evaluate = dict
    trainer.run()
    weights = {name: w.clone() for name, w in trainer.agent.policy.state_dict().items() if torch.is_tensor(w)}
    return Outcome(weights, {k: float(v) for k, v in logged.items() if not k.startswith(("time/", "speed/"))})


@cache
def cached(*overrides: str, evaluated: bool = False) -> Outcome:
    """As :func:`run`, once for each list of overrides."""
    return run(overrides, evaluated)


def teacher(folder: Path, overrides: Sequence[str]) -> str:
    """The folder of a run whose policy has other weights than the runs of this file begin with."""
    cfg = compose([*overrides, "seed=7"], allow=ALLOW)
    policy = Job(cfg, ALLOW).policy
    (folder / "config.yaml").write_text(yaml.safe_dump(cfg))
    write_checkpoint(folder / "checkpoints", 0, {"agent": {"policy": dict(policy.state_dict())}})
    return str(folder)


def rewarder(folder: Path, overrides: Sequence[str]) -> str:
    """The folder of a run with a reward model, after one update of it."""
    cfg = compose([*overrides, "agent.reward_model={name: learnt, lr: 0.1}"], allow=ALLOW)
    (folder / "config.yaml").write_text(yaml.safe_dump(cfg))
    trainer = Job(resolve_defaults(cfg, allow=ALLOW), ALLOW).make_trainer(folder)
    trainer.update()
    write_checkpoint(folder / "checkpoints", 0, {"agent": trainer.agent.state_dict()})
    return str(folder)


def model(folder: Path, overrides: Sequence[str]) -> str:
    """A folder with a language model of the runs of this file, as its own library writes it."""
    Job(composed(overrides), ALLOW).policy.model.save_pretrained(folder)
    return str(folder)


def recorded(folder: Path, overrides: Sequence[str]) -> str:
    """A folder of rows that the first policy of a run made."""
    record_dataset(Job(composed(overrides), ALLOW), folder, batches=1)
    return str(folder)
