"""Weights in pieces give the gradient and the runs of one process, and checkpoints that any number of them reads."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fsdp_cases import in_processes
from run_cases import ALLOW, LANGUAGE, composed, remembered
from safetensors.torch import load_file, save_file
from shard_cases import Told, full
from test_presets_train import WRAPPED, teacher_run, with_demonstrations
from test_ranks import (
    WORDS,
    _fails_in_its_third_update,
    _loses_its_loss,
    _sleeps_in_its_third_update,
    alone,
    processes,
    said,
    same,
    together,
    wait_for_rows,
)
from test_shard import DOMAINS, NOISY, SHOWN, TERMS, agent_of, agree, replay_of
from torch.distributed.checkpoint import load as load_checkpoint
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from unified_rl.agents.behavior_cloning import BehaviorCloning
from unified_rl.config import compose
from unified_rl.correction import correction_names
from unified_rl.errors import CheckpointError, ConfigError
from unified_rl.files import Manifest
from unified_rl.training.checkpoint import FOLDER, checkpoints, read_checkpoint
from unified_rl.training.restoring import restoring
from unified_rl.training.run import Job
from unified_rl.training.state import load_state, save_state

LAYERS = [word.replace("num_hidden_layers=1", "num_hidden_layers=2") for word in DOMAINS["language"]]
REFUSED = ("fixpo", "s_ppo", "st_ppo", "decoupled_snapshot")


@pytest.fixture(scope="module")
def stale() -> tuple[Any, Any]:
    """A policy of two layers, and rows that an older version of it sampled."""
    trainer = Job(compose([*LAYERS, "agent=policy_gradient", "correction=reinforce"])).make_trainer(Path())
    rows, _ = trainer.rollout.collect(0)
    rows["reward"] = torch.tensor([1.0, 0, 0, 1, 0, 1, 0, 0])[:, None]
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for p in trainer.agent.policy.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator)
    return trainer.agent.policy, rows[:7]


CHOSEN = {"dapo", "ppo_ewma", "luffy", "erpd", "alp", "sfpo", "troll", "vcpo"}
"""One of every kind; UNIFIED_RL_SCALE=1 goes through all."""
WHOLE = bool(os.environ.get("UNIFIED_RL_SCALE"))


def failures(ranks: Any, policy: Any, cases: dict[str, tuple[Any, Any, float]], seen: dict[str, Told]) -> list[str]:
    """The cases whose update differs from that of one process."""
    found = []
    for name, (make, rows, bound) in cases.items():
        agent = make()
        ranks.enlist(agent, "policy_gradient")
        ranks.place(agent, copy.deepcopy(policy))
        try:
            agree(Told(agent, replay_of(rows, True)), seen[name], bound)
        except AssertionError as error:
            found.append(f"{name}: {str(error)[:300]}")
    return found


def test_every_preset_and_term_has_the_gradient_of_one_process(stale: tuple[Any, Any], tmp_path: Path) -> None:
    policy, rows = stale
    cases: dict[str, tuple[Any, Any, float]] = {}
    for preset in correction_names():
        if preset in REFUSED or not (WHOLE or preset in CHOSEN):
            continue
        options: dict[str, Any] = {"epochs": 2 if preset in WRAPPED else 1}
        if preset == "erpd":
            options["teacher"] = teacher_run(policy, LAYERS, tmp_path)
        own = with_demonstrations(rows) if preset == "luffy" else rows
        cases[preset] = (
            lambda p=preset, o=options, r=own: agent_of(policy, r, p, **o),
            own,
            2 * NOISY.get(preset, 5e-7),
        )
    for name, (domain, given) in TERMS.items():
        if domain == "language" and "reward_model" not in given:  # refused: a whole model in every process
            own = with_demonstrations(rows) if name in SHOWN else rows
            for size in (None, 1, 2) if WHOLE else (2,):
                case = lambda g=given, s=size, r=own: agent_of(policy, r, "grpo", micro_batch=s, **g)  # noqa: E731
                cases[f"{name} {size}"] = (case, own, 1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen = {name: Told(make(), replay_of(own, True)) for name, (make, own, _) in cases.items()}
    for told in in_processes(2, tmp_path / "told", lambda ranks: failures(ranks, policy, cases, seen)):
        assert told == []


def model(words: list[str]) -> Any:
    """A policy, moved away from where it began."""
    policy = Job(compose([*words, "agent=policy_gradient", "correction=reinforce"])).policy
    with torch.no_grad():
        generator = torch.Generator().manual_seed(2)
        for p in (x for x in policy.parameters() if x.requires_grad):
            p += 0.05 * torch.randn(p.shape, generator=generator)
    return policy


def adapted(folder: Path, *words: str) -> list[str]:
    """Settings of adapters of the model in a folder."""
    own = [word for word in LAYERS if not word.startswith("policy")]
    return [*own, "policy=causal_lm_path", f"policy.path={folder}", "policy.lora={r: 4}", *words]


def test_kinds_of_models_have_the_gradient_of_one_process(stale: tuple[Any, Any], tmp_path: Path) -> None:
    """Tied weights, adapters of a float32 and of a bfloat16 base, recomputed layers, demonstrations, missing rows."""
    policy, rows = stale
    policy.save(str(tmp_path / "base"))
    models = {
        "tied": model([*LAYERS, "policy.config.tie_word_embeddings=true"]),
        "adapters": model(adapted(tmp_path / "base")),
        "adapters of bfloat16": model(adapted(tmp_path / "base", "policy.dtype=bfloat16")),
        "recomputed": model([*LAYERS, "policy.gradient_checkpointing=true"]),
    }
    models = models if WHOLE else {name: models[name] for name in ("tied", "adapters")}
    given: dict[str, Any] = {"kl": 0.1, "minibatch": 4, "micro_batch": 1}
    cases = {
        name: (lambda m=m: agent_of(m, rows, "grpo", **given), rows, 1e-2 if "bfloat16" in name else 1e-6)
        for name, m in models.items()
    }

    def imitation() -> BehaviorCloning:
        options: dict[str, Any] = {"optimizer": "sgd", "lr": 0.01, "updates": 2, "batch_size": 2, "micro_batch": 1}
        return BehaviorCloning(copy.deepcopy(policy), torch.Generator().manual_seed(0), rows=7, **options)

    cases["imitation"] = (imitation, rows, 1e-6)
    seen = {name: Told(make(), replay_of(own, True)) for name, (make, own, _) in cases.items()}
    for told in in_processes(3, tmp_path / "told", lambda ranks: failures(ranks, policy, cases, seen)):
        assert told == []


RUNS = {
    **{preset: [f"correction={preset}"] for preset in ("dapo", "vespo", "m2po", "bapo", "p3o", "normalized_tis")},
    "a coarse sampler": ["correction=tis", "policy.engine_dtype=int8"],
    "filters": ["correction=grpo", "agent.filters=[largest_advantage,uncertain_units]"],
    "maps and terms": ["correction=grpo", "agent.maps=[retempered]",
                       "agent.objectives={spread: {name: selective_entropy}, prefer: {name: kto}}"],
}  # fmt: skip


def made(words: list[str], ranks: Any = None) -> Any:
    """The agent of a run of three updates."""
    with remembered():
        job = Job(composed(words), ALLOW)
        if ranks is not None:
            job = Job(ranks.own(job.cfg), ALLOW)
            job.ranks = ranks
        trainer = job.make_trainer(None)
        if ranks is not None:
            ranks.start(trainer, None)
        trainer.run()
    weights = torch.cat([full(p).flatten() for p in trainer.agent.optimizer.parameters])
    whole = ranks is None or ranks.leads  # others have no policy that samples
    return weights, torch.cat([p.detach().flatten() for p in job.policy.parameters()]) if whole else weights


def test_runs_are_those_of_one_process(tmp_path: Path) -> None:
    """And the policy that samples has the weights that are trained."""
    words = [*LANGUAGE, "logger=[]", "eval_every=0", "log_every=1", "agent=policy_gradient", "agent.epochs=2",
             "agent.minibatch=6", "agent.micro_batch=4", "rollout.staleness=1", "eval_episodes=0",
             "updates=3"]  # fmt: skip
    runs = RUNS if WHOLE else {"dapo": RUNS["dapo"]}
    one = {name: made([*words, *own])[0] for name, own in runs.items()}

    def work(ranks: Any) -> list[list[float]]:
        found = {name: made([*words, *own], ranks) for name, own in runs.items()}
        gaps = [float((found[name][0] - one[name]).abs().max()) for name in runs]
        return [gaps, [float((a - b).abs().max()) for a, b in found.values()] if ranks.leads else []]

    (gaps, sampled), (others, _) = in_processes(2, tmp_path / "told", work)
    assert max(*gaps, *others) <= 1e-6 and max(sampled) == 0.0


def reads_like_torch(checkpoint: Path) -> None:
    """``torch.distributed.checkpoint`` finds in the pieces what the run reads from them."""
    state = load_state(checkpoint)["agent"]
    weights = {f"/agent/policy/{key}": torch.zeros_like(x) for key, x in state["policy"].items()}
    moments = {
        f"/agent/optimizer/adam/state/{i}/{key}": torch.zeros_like(x)
        for i, held in state["optimizer"]["adam"]["state"].items()
        for key, x in held.items()
        if x.ndim
    }
    found = {**weights, **moments}
    load_checkpoint(found, storage_reader=HuggingFaceStorageReader(str(checkpoint / "pieces")), no_dist=True)
    assert all(torch.equal(found[f"/agent/policy/{key}"], x) for key, x in state["policy"].items())
    held = state["optimizer"]["adam"]["state"]
    assert all(
        torch.equal(x, held[int(key.split("/")[5])][key.split("/")[6]]) for key, x in found.items() if key in moments
    )
    assert not list(checkpoint.rglob("*.metadata"))


def sealed(folder: Path) -> None:
    """Somebody who changes a file may write its digest too."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    Manifest.of(folder, [name for name in names if name != "MANIFEST.json"]).write()


def tampered(checkpoint: Path, other: Path) -> None:
    """What was changed, is missing, or stands there without having been written, is one error; nothing is executed."""
    file = "pieces/00001.safetensors"

    def moved(at: int) -> None:
        header = json.dumps(
            {name: {"saved_offsets": [at] + [0] * (x.ndim - 1)} for name, x in load_file(other / file).items()}
        )
        save_file(load_file(other / file), other / file, metadata={"DCP_SHARDING_INFO": header})

    def spoiled(text: str) -> None:
        save_file(load_file(other / file), other / file, metadata={"DCP_SHARDING_INFO": text})

    changes: list[tuple[Callable[[], Any], bool, str]] = [
        (lambda: (other / file).write_bytes((other / file).read_bytes()[:-8]), False, "00001.safetensors"),
        (lambda: (other / file).unlink(), False, "is missing"),
        (lambda: (other / "pieces" / ".metadata").write_bytes(pickle.dumps(Boom())), False, "is none of its files"),
        (lambda: (other / file).write_bytes(pickle.dumps(Boom())), True, "00001.safetensors is damaged"),
        (lambda: (other / file).unlink(), True, "fit"),
        (lambda: moved(10**9), True, "does not fit the others"),
        (lambda: moved(-1), True, "does not fit the others"),
        (lambda: spoiled("[" * 100_000), True, "00001.safetensors is damaged"),
        (lambda: spoiled('{"x": 1}'), True, "00001.safetensors is damaged"),
    ]
    for change, seals, told in changes:
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(checkpoint, other)
        change()
        if seals:
            sealed(other)
        with pytest.raises(CheckpointError, match=told):
            state = read_checkpoint(other)
            with restoring(other):
                model(LAYERS).load_state_dict(state["agent"]["policy"])
    assert not Path(BOOM).exists()


BOOM = "boom"


class Boom:
    """Executes something where it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path(BOOM),)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_run_goes_on_in_any_number_of_processes_and_with_any_learner(tmp_path: Path) -> None:
    """In two, three, and two that hold everything (and one, and two again): the run that one process makes at once."""
    one, run, allow = tmp_path / "one", tmp_path / "run", ["--allow", "run_cases"]
    alone(["train", *WORDS, f"updates={6 if WHOLE else 4}", f"run_dir={one}"])
    pieces = ["train", *WORDS, "keep_checkpoints=9", "updates=2", "learner=fsdp", f"run_dir={run}"]
    assert together(pieces, tmp_path / "a") == [0, 0] and said(tmp_path / "a") == ""
    newest = checkpoints(run / FOLDER)[-1]
    assert sorted(path.name for path in (newest / "pieces").iterdir()) == ["00000.safetensors", "00001.safetensors"]
    reads_like_torch(newest)
    tampered(newest, tmp_path / "other")
    assert together(["train", f"resume={run}", "updates=3", *allow], tmp_path / "b", world=3) == [0, 0, 0]
    words = ["train", f"resume={run}", "updates=4", "learner=data_parallel", *allow]
    assert together(words, tmp_path / "c") == [0, 0]
    if WHOLE:
        alone(["train", f"resume={run}", "updates=5", *allow])
        assert together(["train", f"resume={run}", "updates=6", *allow], tmp_path / "d") == [0, 0]
    same(one, run)
    alone(["export", str(run), str(tmp_path / "model"), "--checkpoint", "2", *allow])
    exported = load_file(tmp_path / "model" / "model.safetensors")
    kept = load_state(run / FOLDER / newest.name)["agent"]["policy"] if newest.exists() else {}
    assert all(
        torch.equal(exported[name.removeprefix("model.")], x) for name, x in kept.items() if "lm_head" not in name
    )
    assert exported and kept


def _sees_no_folder(rank: int) -> None:
    from unified_rl.training.fully_sharded import FullySharded

    seen = FullySharded._seen
    if rank == 1:
        FullySharded._seen = staticmethod(lambda path: seen(Path("/nowhere")))  # type: ignore[method-assign]


FAILING: dict[str, tuple[Callable[[int], None], str, list[int]]] = {
    "a NaN": (_loses_its_loss, "the loss is nan at optimiser step", [1]),
    "an error": (_fails_in_its_third_update, "process 1 of this run failed: RuntimeError: out of luck", [1, 2]),
    "no answer": (_sleeps_in_its_third_update, "did not answer within learner.timeout=1 seconds", [1, 2]),
    "another disk": (_sees_no_folder, "process 1 could not write its pieces: this process does not see", []),
}


@pytest.mark.parametrize("name", FAILING if WHOLE else ["an error", "another disk"])
def test_what_befalls_one_process_ends_all_with_one_line(name: str, tmp_path: Path) -> None:
    before, told, saved = FAILING[name]
    run = tmp_path / "run"
    words = ["train", *WORDS[:-3], "updates=9", "checkpoint_every=16", "rollout.staleness=0", "learner=fsdp",
             f"run_dir={run}", "--allow", "run_cases"]  # fmt: skip
    words = [word for word in words if word != "rollout.staleness=1"]
    codes = together([*words, "learner.timeout=1"] if name == "no answer" else words, tmp_path / "told", before)
    assert codes[0] == 2 and codes[1] != 0
    lines = (tmp_path / "told" / "err0").read_text().splitlines()
    assert len(lines) == 1 and told in lines[0], lines
    kept = [int(path.name[-3:]) for path in checkpoints(run / FOLDER)]
    assert kept == saved, kept
    if kept:
        read_checkpoint(checkpoints(run / FOLDER)[-1])


def test_a_signal_for_one_process_ends_all_behind_one_checkpoint_in_pieces(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["train", *WORDS, "updates=100000", "learner=fsdp", f"run_dir={run}"]
    with processes(2, words, tmp_path / "told") as children:
        wait_for_rows(run, 3)
        os.kill(children[1].pid, signal.SIGTERM)
    assert [child.exitcode for child in children] == [143, 143]
    assert said(tmp_path / "told") == "unified-rl: interrupted\n" and len(checkpoints(run / FOLDER)) == 1
    assert len(list((checkpoints(run / FOLDER)[0] / "pieces").iterdir())) == 2
    read_checkpoint(checkpoints(run / FOLDER)[0])


REFUSALS = {
    "correction fixpo reads whole weights .* set learner=data_parallel": ["correction=fixpo"],
    "correction.proximal.provider=versions keeps whole weights .* set learner=data_parallel": [
        "correction=decoupled_snapshot"
    ],
    "correction s_ppo reads whole weights .* set learner=data_parallel": ["correction=s_ppo"],
    "correction reinforce reads whole weights .* set learner=data_parallel": [
        "correction=reinforce",
        "correction.advantage={baseline: weighted}",
        "correction.wrapper={name: snr_learning_rate}",
    ],
    "agent.optimizer=adafactor looks at whole matrices.* use adamw": ["agent.optimizer=adafactor"],
    "agent.reward_model is a whole model .* set learner=data_parallel": ["agent.reward_model=learnt"],
    "agent.compile .* learner=data_parallel": ["agent.compile=true"],
    "agent=ppo trains a GaussianPolicy: set learner=data_parallel": ["env=two_route", "agent=ppo", "policy=gaussian"],
}


def refusals(ranks: Any) -> list[str]:
    """What differs from what is to be said."""
    found = []
    for told, words in REFUSALS.items():
        base = [] if "agent=ppo" in words else [*LANGUAGE, "agent=policy_gradient"]
        given = {word.partition("=")[0]: word for word in [*base, "correction=grpo", "updates=2", *words]}
        if not base:
            del given["correction"]
        with remembered():
            job = Job(composed(list(given.values())), ALLOW)
            job.ranks = ranks
            try:
                job.make_trainer(None)
                found.append(f"not refused: {words}")
            except ConfigError as error:
                found += [] if re.search(told, str(error)) else [str(error)]
    return found


def test_what_cannot_be_in_pieces_is_refused_by_name(tmp_path: Path) -> None:
    assert in_processes(1, tmp_path / "told", refusals) == [[]]


def test_what_an_agent_holds_may_stay_in_its_files(tmp_path: Path) -> None:
    held = {"weight": torch.arange(6.0).view(3, 2), "seen": np.arange(3), "rate": torch.tensor(0.5)}
    state = {"agent": held, "updates": 1}
    save_state(tmp_path, state)
    found = load_state(tmp_path, whole=False)["agent"]
    assert found["weight"].part(1, 3).tolist() == [[2.0, 3.0], [4.0, 5.0]] and len(found["weight"].part(3, 3)) == 0
    assert found["seen"].tolist() == [0, 1, 2] and float(found["rate"].whole()) == 0.5
