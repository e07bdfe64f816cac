"""Runs whose rollouts an engine samples: their settings, with and without workers, and in another precision."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch
from engine_cases import SERVERS, largest_gap, policy_of, speak
from engine_server import EngineServer
from run_cases import ALLOW, LANGUAGE, cached, composed, merged, remembered
from run_cases import run as trained
from tensordict import TensorDict
from ticket_cases import made, read_rows

from unified_rl.agents.scoring import identity_check
from unified_rl.config import compose
from unified_rl.errors import ConfigError, RolloutError
from unified_rl.policies.engines import http
from unified_rl.policies.engines.precision import in_precision, rounded
from unified_rl.training.checkpoint import checkpoints, read_checkpoint
from unified_rl.training.run import Job
from unified_rl.training.run import resume as resume_run
from unified_rl.training.run import train as train_run


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "PAUSE", 0.01)


# ------------------------------------------------------------------------------------------------ settings

URL, PLACE = "policy.server=http://127.0.0.1:1", "policy.server_folder=/shared"
REFUSED: list[tuple[list[str], str]] = [
    (["policy.engine=vllm"], "set policy.server=http://HOST:PORT"),
    (["policy.engine=sglang", URL], "set policy.server_folder=DIR"),
    (["policy.engine=vllm", URL, "policy.server_folder=shared"], "give an absolute path"),
    (["policy.engine=vllm", "policy.server=localhost:1", PLACE], "is no http://HOST:PORT"),
    (["policy.engine=vllm", "policy.server=http://me:word@host:1", PLACE], "UNIFIED_RL_SERVER_KEY"),
    (["policy.engine=vllm", URL, PLACE, "policy.server_sync=nccl"], "NCCL is not there; use policy.server_sync=disk"),
    (
        ["policy.engine=vllm", URL, PLACE, "policy.engine_dtype=int8"],
        "policy.engine_dtype=int8 is of policy.engine=own",
    ),
    (["policy.engine=vllm", URL, PLACE, "policy.min_p=0.1", "policy.top_p=0.9"], "applies them in the other order"),
    (["policy.engine=sglang", URL, PLACE, "policy.top_p=0.9"], "policy.top_p=0.9 with policy.engine=sglang"),
    (["policy.engine=sglang", URL, PLACE, "policy.top_k=5"], "policy.top_k=5 with policy.engine=sglang"),
    (["policy.engine=sglang", URL, PLACE, "policy.min_p=0.1"], "policy.min_p=0.1 with policy.engine=sglang"),
    (["policy.engine=sglang", URL, PLACE, "policy.repetition_penalty=1.1"], "do not hold under a penalty"),
    (["policy.engine=transformers", "policy.repetition_penalty=1.1"], "do not hold under a penalty"),
    (["policy.engine=transformers", "policy.min_p=0.1"], "continuous batching drops it"),
    ([URL], "would be of no effect with policy.engine=own"),
    (["policy.engine=transformers", PLACE], "would be of no effect with policy.engine=transformers"),
    (["policy.server_timeout=5"], "policy.server_timeout=5.0 would be of no effect"),
    (["policy.engine=vlm"], "policy.engine"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_settings_that_do_not_go_together_are_refused_when_a_run_is_composed(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose([*LANGUAGE, *overrides], allow=ALLOW)


def test_every_worker_needs_a_server_of_its_own_and_takes_it(tmp_path):
    with remembered():
        two = [*LANGUAGE, "policy.engine=vllm", PLACE, "policy.server=[http://h:1,http://h:2]"]
        with pytest.raises(ConfigError, match="a run without workers samples with one"):
            Job(composed(two), ALLOW).make_trainer(None)
        ray = ["engine=ray", "rollout.staleness=2", "engine.workers=3"]
        with pytest.raises(ConfigError, match=r"names 2 server\(s\), and engine.workers=3"):
            Job(composed([*two, *ray]), ALLOW)
        cfg = composed([*two, *ray[:2], "engine.workers=2"])
        Job(cfg, ALLOW)
        mine = {key: value for key, value in cfg.items() if key != "engine"}
        found = [Job(mine, ALLOW, worker=worker).policy.sampler.engine for worker in (0, 1)]
    assert [engine.server.url for engine in found] == ["http://h:1", "http://h:2"]
    assert [engine.folder.name for engine in found] == ["h-1", "h-2"]


def test_workers_sample_each_from_its_own_server_and_a_lost_one_changes_nothing(tmp_path):
    overrides = [*RUN, "policy.engine=vllm", "engine=ray", "engine.workers=2", "rollout.staleness=2", "updates=4"]
    deaths = iter([False, True, False, True])
    states = []
    with remembered(), served(overrides, tmp_path) as (first, more), EngineServer(tmp_path / "start") as second:
        cfg = compose(["progress=false", *overrides, f"policy.server=[{first.url},{second.url}]", more[1]], allow=ALLOW)
        for run, dies in (("calm", lambda worker: False), ("shaken", lambda worker: next(deaths, False))):
            made(cfg, tmp_path / run, dies=dies)
            states.append(_last(tmp_path / run))
    assert next(deaths, None) is None
    assert all(torch.equal(states[0][name], weight) for name, weight in states[1].items())
    lags = [row["staleness/max"] for row in read_rows(tmp_path / "calm" / "metrics.jsonl") if "staleness/max" in row]
    assert max(lags) == 2.0
    assert first.asked and second.seen["/collective_rpc"] >= 2


def test_a_worker_looks_at_the_first_log_probs_of_its_own_server(tmp_path):
    """The learner never meets a worker's server."""
    overrides = [*RUN, "policy.engine=vllm", "policy.temperature=0.5", "engine=ray", "engine.workers=2",
                 "rollout.staleness=1", "updates=3"]  # fmt: skip
    with remembered(), served(overrides, tmp_path) as (first, more), EngineServer(tmp_path / "start", "raw") as second:
        cfg = compose(["progress=false", *overrides, f"policy.server=[{first.url},{second.url}]", more[1]], allow=ALLOW)
        with pytest.raises(ConfigError, match=r"^worker 1, batch 1: .*--logprobs-mode processed_logprobs"):
            made(cfg, tmp_path / "run")


@pytest.mark.parametrize("engine", ["policy.engine=transformers", "policy.engine_dtype=int8"])
def test_weights_in_flight_are_refused_where_an_engine_samples(engine):
    overrides = [*LANGUAGE, "engine=ray", "engine.in_flight=true", "rollout.staleness=1", engine]
    with pytest.raises(ConfigError, match=f"engine.in_flight=true .* {engine}"), remembered():
        Job(composed(overrides), ALLOW).make_trainer(None)


def test_agents_that_nothing_samples_for_refuse_engines():
    overrides = [*LANGUAGE[:-2], "agent=sft", "rollout.rows=6", "updates=2", "policy.engine=transformers"]
    with pytest.raises(ConfigError, match=r"policy.engine=transformers would be of no effect"), remembered():
        Job(composed(overrides), ALLOW).make_trainer(None)


def test_nothing_of_an_engine_is_imported_unless_it_is_chosen(source):
    folder = source / "unified_rl" / "policies" / "engines"
    found = set()
    for name in ("__init__", "protocol", "sampler", "settings"):  # what a policy imports
        for node in ast.parse((folder / f"{name}.py").read_text()).body:
            found |= {node.module} if isinstance(node, ast.ImportFrom) else set()
    found = {name.rpartition(".")[2] for name in found if name.startswith("unified_rl.policies.engines")}
    assert found == {"protocol", "sampler", "settings"}


# ------------------------------------------------------------------------------------------------ whole runs


class served:
    """A server that begins with the model of a run, and the overrides that name it."""

    def __init__(self, overrides: list[str], folder: Path, mode: str = "") -> None:
        plain = [one for one in overrides if not one.startswith(("policy.engine", "policy.server", "engine"))]
        Job(composed(merged(plain, ["seed=77"])), ALLOW).policy.save(str(folder / "start"))
        self.server, self.folder = EngineServer(folder / "start", mode), folder / "shared"

    def __enter__(self) -> tuple[EngineServer, list[str]]:
        return self.server.__enter__(), [f"policy.server={self.server.url}", f"policy.server_folder={self.folder}"]

    def __exit__(self, *error: object) -> None:
        self.server.__exit__(*error)


RUN = merged(LANGUAGE, ["agent.lr=0.02", "rollout.prompts=2", "seed=3", "eval_episodes=2", "eval_every=0"])


def _last(folder: Path, place: int = -1) -> dict[str, torch.Tensor]:
    return read_checkpoint(checkpoints(folder / "checkpoints")[place])["agent"]["policy"]


@pytest.mark.parametrize("engine", ["transformers", *SERVERS])
def test_a_run_trains_and_goes_on_as_if_it_had_not_stopped(engine, tmp_path):
    overrides = [*RUN, f"policy.engine={engine}", "checkpoint_every=8"]
    with remembered():
        if engine == "transformers":
            _trains_and_goes_on(overrides, tmp_path)
            return
        with served(overrides, tmp_path) as (server, more):
            _trains_and_goes_on([*overrides, *more, "policy.server_retries=1"], tmp_path)
            assert server.version.startswith("unified-rl-")


def _trains_and_goes_on(overrides: list[str], folder: Path) -> None:
    run = folder / "run"
    train_run(compose(["progress=false", *overrides, f"run_dir={run}", "steps=16"], allow=ALLOW), allow=ALLOW)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert next(row["identity/max_log_ratio"] for row in logged if "identity/max_log_ratio" in row) < 1e-3
    whole, half = _last(run), _last(run, -2)
    assert any(not torch.equal(half[name], weight) for name, weight in whole.items())
    resume_run(run, allow=ALLOW, checkpoint=1)
    assert all(torch.equal(whole[name], weight) for name, weight in _last(run).items())


def test_a_server_that_dies_ends_the_run_with_one_line_and_another_one_takes_over(tmp_path):
    overrides = [*RUN, "policy.engine=vllm", "checkpoint_every=8", "policy.server_retries=1"]
    with remembered():
        with served(overrides, tmp_path) as (server, more):
            train_run(
                compose(["progress=false", *overrides, *more, f"run_dir={tmp_path / 'run'}", "steps=16"], allow=ALLOW),
                allow=ALLOW,
            )
            server.mode = "dies"
            server.seen.clear()
            with pytest.raises(RolloutError, match=r"does not answer .*update 2 is saved, go on with .*resume="):
                resume_run(tmp_path / "run", 24, allow=ALLOW)
        with EngineServer(tmp_path / "start", port=int(server.url.rpartition(":")[2])) as other:  # it knows nothing
            resume_run(tmp_path / "run", 24, allow=ALLOW)
            assert other.seen["/collective_rpc"] == 1


# ------------------------------------------------------------------------------------------------ precision


def test_weights_are_rounded_as_they_would_be_stored():
    weight = torch.tensor([[1.0, -0.5, 0.1, 0.0], [254.0, 3.0, -254.0, 0.9]])
    assert torch.allclose(
        rounded(weight, "int8"), torch.tensor([[1.0, -64 / 127, 13 / 127, 0.0], [254.0, 4.0, -254.0, 0.0]])
    )
    steps = rounded(torch.tensor([[448.0, 17.0, 18.9, 1.0]]), "float8")  # e4m3: between 16 and 32 in steps of 2
    assert steps.tolist() == [[448.0, 16.0, 18.0, 1.0]]
    assert rounded(torch.tensor([[7.0, 3.4, -1.6]]), "int4").tolist() == [[7.0, 3.0, -2.0]]
    assert torch.equal(rounded(torch.zeros(2, 3), "int8"), torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8", "int8"])
def test_a_coarse_sampler_records_its_own_log_probs(dtype):
    policy = policy_of(engine_dtype=dtype)
    out = speak(policy)
    assert 1e-4 < largest_gap(policy, out) < 0.5
    coarse = policy_of()
    coarse.model = in_precision(policy.model, dtype)
    if dtype != "bfloat16":
        assert largest_gap(coarse, out) < 1e-4
    assert all(weight.dtype == torch.float32 for weight in policy.model.parameters())


def test_the_same_precision_on_both_sides_is_the_run_without_the_setting():
    base = [*LANGUAGE, "correction=decoupled_ppo", "agent.lr=0.05", "agent.epochs=2"]
    plain, same = cached(*base), trained([*base, "policy.engine_dtype=float32"])
    assert not plain.differs(same)
    assert same.metrics["drift"] < 1e-6 and same.metrics["weight/max"] == same.metrics["weight/mean"] == 1.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_a_coarse_sampler_trains_and_its_mismatch_is_weighed_and_logged(dtype):
    base = [*LANGUAGE, "correction=decoupled_ppo", "agent.lr=0.05"]
    found = trained([*base, f"policy.engine_dtype={dtype}"])
    assert found.metrics["identity/max_log_ratio"] > 1e-3  # and no error: it is meant
    assert found.metrics["drift"] > 1e-3 and found.metrics["ess/unit"] < 1.0
    assert found.metrics["weight/max"] > 1.001  # of proximal/behavior, in the loss
    ignored = trained([*base, f"policy.engine_dtype={dtype}", "correction.mismatch=[]"])
    assert any(not torch.equal(weight, ignored.weights[name]) for name, weight in found.weights.items())
    assert found.metrics["clip/fraction"] == 0.0  # the mismatch is none of the policy's own way, which is clipped


def test_a_server_of_declared_precision_may_differ_and_one_of_wrong_log_probs_may_not(server, tmp_path):
    policy = policy_of("vllm", server, tmp_path, engine_dtype="bfloat16", temperature=0.3)
    out = speak(policy)
    assert 1e-4 < largest_gap(policy, out) < 0.5
    assert policy.log_ratio_tolerance == float("inf")
    server.mode = "raw"
    with pytest.raises(ConfigError, match=r"in the mean.*processed_logprobs"):
        speak(policy_of("vllm", server, tmp_path, engine_dtype="bfloat16", temperature=0.3))


def test_a_nan_is_no_gap_that_is_meant():
    policy = policy_of(engine_dtype="int8")
    rows = {
        "mask": torch.ones(1, 1, dtype=torch.bool),
        "policy_version": torch.zeros(1, 1, dtype=torch.int64),
        "behavior_log_prob": torch.zeros(1, 1),
        "source": torch.zeros(1, dtype=torch.int64),
    }
    with pytest.raises(ConfigError, match="fresh data"):
        identity_check(policy, TensorDict(rows, batch_size=[1]), 0, lambda: torch.full((1, 1), float("nan")))
