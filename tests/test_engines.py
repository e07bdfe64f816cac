"""Engines that sample rollouts: one contract for all of them, and how weights reach servers.

The servers are real ones, over HTTP, with a real model behind them (engine_server.py); vLLM and SGLang themselves
are not run here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from engine_cases import ENGINES, EOS, PROMPTS, SERVERS, TINY, largest_gap, moved, policy_of, speak
from engine_server import transformed
from run_cases import ALLOW, LANGUAGE, composed
from test_generation import letter_tokenizer

from unified_rl.policies.causal_lm import CausalLM
from unified_rl.policies.generation import Generation
from unified_rl.policies.stop_strings import StopStrings
from unified_rl.rollout.rows import RowBuilder
from unified_rl.training.run import Job

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


def test_rows_hold_the_version_of_each_token():
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
