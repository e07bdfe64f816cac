"""Every way in which a server that samples can be wrong, busy or gone: one error that says so, or the right answers."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
from engine_cases import PROMPTS, SERVERS, moved, policy_of, speak
from engine_server import EngineServer
from run_cases import ALLOW, LANGUAGE, composed

from unified_rl.errors import ConfigError, RolloutError
from unified_rl.policies.engines import http
from unified_rl.training.run import Job

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
