"""Engines that sample rollouts: one contract for all of them, and every way in which a server can be wrong.

The servers are real ones, over HTTP, with a real model behind them (engine_server.py); vLLM and SGLang themselves
are not run here.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_server import EngineServer, transformed
from run_cases import ALLOW, LANGUAGE, cached, composed, merged, remembered
from run_cases import run as trained
from test_generation import letter_tokenizer, teacher_forced
from ticket_cases import made, read_rows

from unified_rl.agents.scoring import identity_check
from unified_rl.config import compose
from unified_rl.errors import ConfigError, RolloutError
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.policies.engines import http
from unified_rl.policies.engines.precision import in_precision, rounded
from unified_rl.policies.generation import Generation
from unified_rl.rollout.rows import RowBuilder
from unified_rl.training.run import Job
from unified_rl.training.run import resume as resume_run
from unified_rl.training.run import train as train_run

SERVERS = ("vllm", "sglang")
ENGINES = ("own", "copy", "transformers", *SERVERS)
TINY = {
    "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
PROMPTS = [[2, 5, 6, 7], [2, 9], [2, 4, 4, 11, 3]]
EOS = 1


def policy_of(engine: str = "own", server: EngineServer | None = None, folder: Path | None = None, **options: Any):
    """A tiny policy whose rollouts an engine samples; ``copy`` is the own loop on a copy of the same precision."""
    options = {"temperature": 0.7, **options}
    if engine in SERVERS:
        assert server is not None and folder is not None
        shared = {"server": server.url, "server_folder": str(folder / "shared"), "server_retries": 2}
        options = {"engine": engine, **shared, **options}
    elif engine == "copy":
        options = {"engine_dtype": "float32", **options}
    elif engine != "own":
        options = {"engine": engine, **options}
    if "config" not in options and "path" not in options:
        options["config"] = TINY
    return CausalLM(letter_tokenizer(), 64, seed=0, **options)


def speak(policy: CausalLM, version: int = 0, seed: int = 0, samples: int = 4, **options: Any) -> Generation:
    """Answers of whatever samples the policy's rollouts."""
    speaker: Any = policy if policy.sampler is None else policy.sampler.at(version)
    options = {"max_new_tokens": 6, "stop_ids": [EOS, 4], "prompts": PROMPTS, **options}
    stream = torch.Generator().manual_seed(seed)
    return speaker.generate(options.pop("prompts"), generator=stream, samples_per_prompt=samples, **options)


def largest_gap(policy: CausalLM, out: Generation, samples: int = 4) -> float:
    """Between the log-probs of an engine and those of the plain model, read in the textbook way."""
    gap = 0.0
    for row, said in enumerate(out.rows()):
        wanted = teacher_forced(policy, torch.tensor(PROMPTS[row // samples]), said, policy.sampling)
        gap = max(gap, float((wanted - out.log_prob[row, : len(said)]).abs().max()))
    return gap


def moved(policy: CausalLM) -> None:
    """Other weights."""
    stream = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.add_(torch.randn(weight.shape, generator=stream) * 0.3)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "PAUSE", 0.01)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that a server begins with: not the policy's weights."""
    folder = tmp_path_factory.mktemp("model")
    CausalLM(letter_tokenizer(), 64, config=TINY, seed=5).save(str(folder))
    return folder


@pytest.fixture
def server(base: Path) -> Iterator[EngineServer]:
    with EngineServer(base) as found:
        yield found


# ------------------------------------------------------------------------------------- one contract for all engines

TRANSFORMS: list[tuple[str, dict[str, Any]]] = [
    *((engine, {}) for engine in ("own", "copy", *SERVERS)),
    ("copy", {"top_p": 0.8}),
    ("transformers", {"top_p": 0.8, "top_k": 9}),
    ("vllm", {"top_p": 0.8, "top_k": 9}),
    ("vllm", {"min_p": 0.1, "repetition_penalty": 1.3}),
]


@pytest.mark.parametrize(("engine", "transform"), TRANSFORMS)
def test_log_probs_are_those_of_the_sampling_distribution(engine, transform, server, tmp_path):
    policy = policy_of(engine, server, tmp_path, **transform)
    out = speak(policy)
    assert out.tokens.shape == out.log_prob.shape == (12, 6)
    assert out.tokens.dtype == out.length.dtype == torch.int64 and out.log_prob.dtype == torch.float32
    assert out.finished.dtype == torch.bool
    for row, said in enumerate(out.rows()):
        stops = [token for token in said if token in (EOS, 4)]
        assert bool(out.finished[row]) == bool(stops) and said[-1:] == (stops or said[-1:])
        assert stops or len(said) == 6
    behind = torch.arange(6) >= out.length[:, None]
    assert (out.tokens[behind] == policy.pad_id).all() and (out.log_prob[behind] == 0).all()
    if "repetition_penalty" not in transform:
        assert largest_gap(policy, out) < 1e-4
    else:
        for row, said in enumerate(out.rows()):
            ids = list(PROMPTS[row // 4])
            asked = {"temperature": 0.7, **transform}
            for column, token in enumerate(said):
                logits = policy.model(torch.tensor([ids])).logits[0, -1].detach()
                assert float(out.log_prob[row, column]) == pytest.approx(
                    float(transformed(logits, ids, asked)[token]), abs=1e-4
                )
                ids.append(token)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_seed_gives_the_same_answers_and_another_one_others(engine, server, tmp_path):
    policy = policy_of(engine, server, tmp_path)
    first, again, other = (speak(policy, seed=seed, samples=2).tokens for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(("engine", "samples"), [("own", 4000), ("copy", 4000), ("transformers", 400), ("vllm", 300)])
def test_tokens_come_from_that_distribution(engine, samples, server, tmp_path):
    policy = policy_of(engine, server, tmp_path)
    out = speak(policy, prompts=[PROMPTS[0]], samples=samples, max_new_tokens=1, stop_ids=[EOS])
    logits = policy.model(torch.tensor([PROMPTS[0]])).logits[0, -1].detach()
    expected = samples * (logits / 0.7).softmax(-1).double()
    found = torch.bincount(out.tokens[:, 0], minlength=len(expected)).double()
    assert int(expected.argmax()) != int((samples * logits.softmax(-1)).argmin())
    chi2 = float(((found - expected) ** 2 / expected).sum())
    assert chi2 < 42.3, chi2  # 18 degrees of freedom, 1 in 1,000
    flat = torch.full_like(expected, samples / len(expected))
    assert float(((found - flat) ** 2 / flat).sum()) > 100  # and the test tells distributions apart


@pytest.mark.parametrize("engine", ENGINES)
def test_answers_behind_a_push_come_from_the_new_weights(engine, server, tmp_path):
    policy = policy_of(engine, server, tmp_path)
    before = speak(policy, version=0)
    moved(policy)
    after = speak(policy, version=1)
    assert largest_gap(policy, after) < 1e-4
    assert largest_gap(policy, before) > 0.1
    if engine in SERVERS:
        said = [torch.arange(6) < out.length[:, None] for out in (before, after)]
        assert (before.version[said[0]] == 0).all() and (after.version[said[1]] == 1).all()


def test_stop_texts_end_answers(server, tmp_path):
    from unified_rl.policies.stop_strings import StopStrings

    texts = StopStrings(letter_tokenizer(), ["3", "7"])
    ends = set(letter_tokenizer().convert_tokens_to_ids(["3", "7"]))
    for engine in ("copy", *SERVERS):  # what transformers brings is looked at by the same function
        policy = policy_of(engine, server, tmp_path)
        out = speak(policy, stop_strings=texts, stop_ids=[EOS])
        assert largest_gap(policy, out) < 1e-4
        rows = out.rows()
        assert any(row[-1] in ends for row in rows)
        for row, finished in zip(rows, out.finished.tolist(), strict=True):
            assert not ends & set(row[:-1]) and finished == (row[-1] in {*ends, EOS})


@pytest.mark.parametrize("engine", ENGINES)
def test_the_model_is_trained_and_scored_as_before(engine, server, tmp_path):
    policy = policy_of(engine, server, tmp_path)
    plain = policy_of()
    assert policy.state_dict().keys() == plain.state_dict().keys()
    speak(policy)
    for name, weight in policy.model.named_parameters():
        assert weight.requires_grad and torch.equal(weight, plain.model.get_parameter(name))
    assert policy.model.config._attn_implementation == plain.model.config._attn_implementation
    greedy = [model.generate(PROMPTS, max_new_tokens=6, greedy=True).tokens for model in (policy, plain)]
    assert torch.equal(*greedy)


# ------------------------------------------------------------------------------------------------ weights of a server


@pytest.mark.parametrize("engine", SERVERS)
def test_weights_are_sent_when_they_changed_and_to_a_server_that_lacks_them(engine, server, tmp_path):
    policy = policy_of(engine, server, tmp_path)
    loads = "/collective_rpc" if engine == "vllm" else "/update_weights_from_disk"
    for version in (0, 0, 1):  # no update between
        speak(policy, version=version)
    assert server.seen[loads] == 1
    other = policy_of(engine, server, tmp_path)  # of a run that goes on
    assert largest_gap(other, speak(other, version=7)) < 1e-4
    assert server.seen[loads] == 1
    moved(other)
    speak(other, version=8)
    assert server.seen[loads] == 2
    folders = [path.name for path in policy.sampler.engine.folder.iterdir()]
    assert folders == [server.version]  # of before nothing is left, and nothing half written


def test_vllm_is_paused_while_it_loads_and_forgets_its_prefixes(server, tmp_path):
    speak(policy_of("vllm", server, tmp_path))
    order = [path for path in server.seen if path in ("/pause", "/collective_rpc", "/reset_prefix_cache", "/resume")]
    assert order == ["/pause", "/collective_rpc", "/reset_prefix_cache", "/resume"]


def test_adapters_are_sent_merged(server, base, tmp_path):
    policy = policy_of("sglang", server, tmp_path, path=str(base), lora={"r": 2}, config=None)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                weight.add_(0.3)
    out = speak(policy)
    assert largest_gap(policy, out) < 1e-4
    assert largest_gap(policy_of(path=str(base), config=None), out) > 0.02  # without them


def test_weights_go_out_as_they_are_trained_and_not_as_their_folder_stored_them(server, tmp_path):
    """A bfloat16 folder that is trained in float32 would otherwise be sampled from rounded weights."""
    CausalLM(letter_tokenizer(), 64, config=TINY, seed=5).save(str(tmp_path / "half"), dtype="bfloat16")
    policy = policy_of("vllm", server, tmp_path, path=str(tmp_path / "half"))
    moved(policy)
    assert largest_gap(policy, speak(policy)) < 1e-4


def test_tokens_of_older_weights_inside_an_answer_keep_their_version(server, tmp_path):
    policy = policy_of("vllm", server, tmp_path)
    speak(policy, version=3)
    moved(policy)
    server.mode = "mixed"
    out = speak(policy, version=4, stop_ids=[])
    assert out.version.tolist() == [[3, 4, 4, 4, 4, 4]] * 12


def test_rows_hold_the_version_of_each_token(server, tmp_path):
    job = Job(composed([*LANGUAGE, "agent.lr=0.1"]), ALLOW)
    rollout = job.make_rollout()
    sampler = Stamped(job.policy)
    job.policy._sampler = sampler  # type: ignore[assignment]
    rows, _ = rollout.collect(5)
    mask = rows["mask"]
    first = mask.int().argmax(-1)
    at = torch.arange(len(mask))
    assert (rows["policy_version"][at, first] == 4).all()
    rest = mask.clone()
    rest[at, first] = False
    assert (rows["policy_version"][rest] == 5).all()
    assert isinstance(rollout.builder, RowBuilder)


class Stamped:
    """Samples as the policy, and says that first tokens are of version 4."""

    def __init__(self, policy: CausalLM) -> None:
        self.policy, self.end_ids = policy, policy.end_ids

    def at(self, version: int) -> Stamped:
        return self

    def generate(self, *args: Any, **options: Any) -> Generation:
        out = self.policy.generate(*args, **options)
        version = torch.full_like(out.tokens, -1)
        version[:, 0] = 4
        return dataclasses.replace(out, version=version)


# ------------------------------------------------------------------------------------------------ what can be wrong

WRONG: list[tuple[str, str, type[Exception], str]] = [
    ("raw", "vllm", ConfigError, "--logprobs-mode processed_logprobs"),
    ("raw", "sglang", ConfigError, "SGLANG_RETURN_ORIGINAL_LOGPROB must be unset"),
    ("no_temperature", "vllm", ConfigError, "--logprobs-mode processed_logprobs"),
    ("no_temperature", "sglang", ConfigError, "not those of the sampling distribution"),
    ("generation_config", "vllm", ConfigError, "--generation-config vllm"),
    ("no_log_probs", "vllm", RolloutError, "without log-probs"),
    ("no_log_probs", "sglang", RolloutError, "without log-probs"),
    ("text", "vllm", RolloutError, "without token ids"),
    ("text", "sglang", RolloutError, "without token ids"),
    ("miscount", "vllm", RolloutError, "has 7 log-probs for 6 tokens"),
    ("miscount", "sglang", RolloutError, "has 7 log-probs for 6 tokens"),
    ("nan", "vllm", RolloutError, "the log-prob of the sampled id .* is nan"),
    ("inf", "sglang", RolloutError, "the log-prob of the sampled id .* is -inf"),
    ("none", "vllm", RolloutError, "the log-prob of token 5 is null"),
    ("word", "sglang", RolloutError, 'the log-prob of token 5 is "x"'),
    ("foreign", "vllm", RolloutError, "holds the id 1000000, and the policy's tokenizer has 19 ids"),
    ("own_end", "vllm", RolloutError, "no stop id of this run.*--generation-config vllm"),
    ("another_run", "vllm", RolloutError, "which this run did not send: another program uses the server"),
    ("old_span", "sglang", RolloutError, "which this run did not send"),
    ("short_span", "vllm", RolloutError, "which weights made 5 of 6 tokens"),
    ("no_json", "vllm", RolloutError, "answers no JSON: <html>"),
    ("cannot_load", "vllm", RolloutError, "no weights in .*policy.server_folder"),
    ("cannot_load", "sglang", RolloutError, "no weights in"),
    ("no_dev", "vllm", ConfigError, "VLLM_SERVER_DEV_MODE=1"),
]


@pytest.mark.parametrize(("mode", "engine", "kind", "message"), WRONG)
def test_what_a_server_does_wrong_is_one_error_that_says_so(mode, engine, kind, message, server, tmp_path):
    server.mode = mode
    policy = policy_of(engine, server, tmp_path)
    with pytest.raises(kind, match=message) as found:
        speak(policy, stop_ids=[])
    assert server.url in str(found.value)
    assert "\n" not in str(found.value)


def test_answers_that_go_on_behind_a_stop_id_are_refused(server, tmp_path):
    server.mode = "ignores_stops"
    with pytest.raises(RolloutError, match="goes on behind the stop id"):
        speak(policy_of("vllm", server, tmp_path), stop_ids=list(range(3, 12)))


@pytest.mark.parametrize("engine", SERVERS)
def test_a_server_that_acknowledges_weights_and_keeps_its_own_is_found_out(engine, server, tmp_path):
    policy = policy_of(engine, server, tmp_path)
    speak(policy)
    moved(policy)
    server.mode = "stale"
    with pytest.raises(ConfigError, match=r"behind new weights differ .*: it serves other weights than it was sent"):
        speak(policy, version=1)


def test_a_server_with_another_model_is_found_out_before_anything_is_trained(server, tmp_path):
    server.mode = "stale"
    with pytest.raises(ConfigError, match="it runs another model than the policy"):
        speak(policy_of("vllm", server, tmp_path))


def test_later_batches_are_not_scored_again(server, tmp_path):
    policy = policy_of("sglang", server, tmp_path)
    speak(policy)
    server.mode = "no_temperature"
    speak(policy)  # the same weights: what was right stays right


@pytest.mark.parametrize("engine", SERVERS)
def test_a_busy_server_is_asked_again_and_no_answer_counts_twice(engine, server, tmp_path):
    policy = policy_of(engine, server, tmp_path)
    quiet = speak(policy)
    server.busy, before = 2, len(server.asked)
    again = speak(policy)
    assert torch.equal(quiet.tokens, again.tokens) and torch.equal(quiet.log_prob, again.log_prob)
    assert len(server.asked) - before == 12


def test_a_server_that_hangs_ends_the_call_in_time(server, tmp_path):
    policy = policy_of("vllm", server, tmp_path, server_timeout=0.2, server_retries=1)
    speaker = policy.sampler.at(0)
    server.mode = "hang"
    begun = time.monotonic()
    with pytest.raises(RolloutError, match=r"nothing within 0.2 s \(policy.server_timeout\)\), tried 2 times"):
        speaker.generate(PROMPTS, max_new_tokens=2, stop_ids=[], generator=torch.Generator())
    assert time.monotonic() - begun < 5
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("server")]


def test_an_interrupt_waits_for_no_server(server, tmp_path):
    policy = policy_of("vllm", server, tmp_path)
    speaker = policy.sampler.at(0)
    server.mode = "hang"
    begun, before = time.monotonic(), signal.signal(signal.SIGINT, signal.default_int_handler)  # a job has it ignored
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        speaker.generate(PROMPTS, max_new_tokens=2, stop_ids=[], generator=torch.Generator())
    signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begun < 5


def test_half_answers_are_not_finished_and_empty_ones_are_asked_again(server, tmp_path):
    policy = policy_of("sglang", server, tmp_path)
    whole = speak(policy, stop_ids=[])
    server.mode = "half"
    half = speak(policy, stop_ids=[])
    assert half.length.tolist() == [2] * 12 and not half.finished.any()
    assert torch.equal(half.log_prob[:, :2], whole.log_prob[:, :2]) and (half.log_prob[:, 2:] == 0).all()
    server.mode = "nothing_first"
    server.asked.clear()
    assert torch.equal(speak(policy, stop_ids=[]).tokens, whole.tokens)
    assert len(server.asked) == 13


def test_a_key_goes_from_the_environment_to_the_server_and_nowhere_else(server, tmp_path, monkeypatch):
    monkeypatch.setenv(http.KEY, "secret")
    policy = policy_of("vllm", server, tmp_path)
    speak(policy)
    assert server.key == "Bearer secret"
    assert "secret" not in repr(policy.engine)


def test_a_server_that_is_not_there_is_told_before_anything_is_spent(base, tmp_path):
    with EngineServer(base) as gone:
        pass
    overrides = [*LANGUAGE, "policy.engine=vllm", f"policy.server={gone.url}", f"policy.server_folder={tmp_path}"]
    job = Job(composed([*overrides, "policy.server_retries=1"]), ALLOW)
    with pytest.raises(ConfigError, match=f"{gone.url} cannot be used: .*refused.*Start it with: .*processed_logprobs"):
        job.make_trainer(None).feed.open()


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
    from unified_rl.training.checkpoint import checkpoints, read_checkpoint

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
    from tensordict import TensorDict

    policy = policy_of(engine_dtype="int8")
    rows = {
        "mask": torch.ones(1, 1, dtype=torch.bool),
        "policy_version": torch.zeros(1, 1, dtype=torch.int64),
        "behavior_log_prob": torch.zeros(1, 1),
        "source": torch.zeros(1, dtype=torch.int64),
    }
    with pytest.raises(ConfigError, match="fresh data"):
        identity_check(policy, TensorDict(rows, batch_size=[1]), 0, lambda: torch.full((1, 1), float("nan")))
