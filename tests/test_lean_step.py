"""Decoding steps and scoring passes of known decoders, written out: the same rows, log-probs and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from test_fast_decoding import architecture, by_data, by_optimizer, by_replacement, by_state, sample
from test_generation import ragged_prompts, small, stream, teacher_forced

from unified_rl.policies import causal_lm, fused_layers, generation, packed_weights, sampling
from unified_rl.policies.lean_step import FAMILIES, LeanStep, is_known
from unified_rl.policies.sampling import BLOCK, NOISE_UP_TO, Sampling, draw

WIDE = {"hidden_size": 48, "head_dim": 16, "intermediate_size": 40, "sliding_window": None}


@pytest.fixture
def steps(monkeypatch):
    """Takes small models too, and lists the rows of lean steps."""
    if not packed_weights.can_pack():
        pytest.skip("this build of torch has no packed products")
    monkeypatch.setattr(packed_weights, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(fused_layers, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(fused_layers, "LEAST_ROWS", 1)
    taken = []
    step = LeanStep.__call__
    monkeypatch.setattr(LeanStep, "__call__", lambda self, *args: taken.append(len(args[0])) or step(self, *args))
    return taken


def known(kind: str, **more):
    """A small decoder of a family, with biases and grouped heads of a width that no other size suggests."""
    policy = small(kind)
    config = policy.model.config
    for name, value in {**WIDE, **more}.items():
        setattr(config, name, value)
    policy.model = type(policy.model)(config).eval()
    policy.model.logit_shape = causal_lm.logit_shape(policy.model)
    torch.manual_seed(1)
    for parameter in policy.model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return policy


@pytest.mark.parametrize("kind", FAMILIES)
def test_lean_steps_give_the_rows_of_the_models_own(kind, steps, monkeypatch):
    policy = known(kind)
    lean = sample(policy)
    assert 9 <= steps[0] <= 12 and len(set(steps)) > 2 and len(steps) > 20  # rows left on the way
    steps.clear()
    monkeypatch.setattr(generation, "lean_step", lambda *args: None)
    plain = sample(policy)
    assert not steps
    assert torch.equal(lean.tokens, plain.tokens) and torch.equal(lean.length, plain.length)
    torch.testing.assert_close(lean.log_prob, plain.log_prob, atol=1e-5, rtol=0)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("prompts", [[[5, 3, 9]], [[5, 3, 9], [4, 4, 8]]])
def test_one_prompt_and_every_grouping_of_heads_are_cases_of_it(prompts, heads, steps, monkeypatch):
    policy = known("llama", num_key_value_heads=heads)
    asked = {"max_new_tokens": 40, "stop_ids": [7], "samples_per_prompt": 6}
    lean = policy.generate(prompts, generator=stream(), **asked)
    assert steps
    monkeypatch.setattr(generation, "lean_step", lambda *args: None)
    plain = policy.generate(prompts, generator=stream(), **asked)
    assert torch.equal(lean.tokens, plain.tokens)
    torch.testing.assert_close(lean.log_prob, plain.log_prob, atol=1e-5, rtol=0)


@pytest.mark.parametrize("change", [by_optimizer, by_state, by_data, by_replacement])
def test_a_changed_weight_is_the_next_generations_weight(change, steps):
    policy = known("qwen3")
    before = sample(policy, greedy=True)
    change(policy)
    after = sample(policy, greedy=True)
    assert steps and not torch.equal(before.log_prob, after.log_prob)
    asked = [p for p in ragged_prompts(4) for _ in range(3)]
    for prompt, row, log_prob in zip(asked, after.rows(), after.log_prob, strict=True):
        expected = teacher_forced(policy, prompt, row, Sampling())
        torch.testing.assert_close(log_prob[: len(row)], expected, atol=1e-4, rtol=0)


def hooked(policy):
    policy.model.model.layers[0].register_forward_hook(lambda *args: None)


def of_another_class(policy):
    norm = policy.model.model.norm
    norm.__class__ = type("OwnNorm", (type(norm),), {})


def with_an_own_forward(policy):
    mlp = policy.model.model.layers[1].mlp
    mlp.forward = lambda states: type(mlp).forward(mlp, states) * 2


def in_half_precision(policy):
    policy.model.model.layers[0].mlp.to(torch.bfloat16)


@pytest.mark.parametrize("change", [hooked, of_another_class, with_an_own_forward, in_half_precision])
def test_a_model_that_is_more_than_its_classes_say_is_run_as_it_is(change):
    policy = known("llama")
    assert is_known(policy.model)
    change(policy)
    assert not is_known(policy.model)


@pytest.mark.parametrize("kind", ["gemma", "olmo2", "gpt2", "phi"])
def test_other_architectures_are_run_as_they_are(kind):
    assert not is_known(architecture(kind).model)


def test_adapters_are_run_as_they_are(steps):
    pytest.importorskip("peft")
    assert sample(small("llama", lora={"r": 2})).length.min() >= 1 and not steps


def gradients(policy, batch):
    policy.zero_grad()
    scored = policy.log_prob(batch).log_prob
    (scored * torch.arange(scored.numel()).view_as(scored).sin()).sum().backward()
    return [scored.detach(), *(p.grad.clone() for p in policy.parameters())]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", FAMILIES)
def test_written_out_backward_passes_give_the_gradients_of_autograd(kind, shared, steps, monkeypatch):
    policy = known(kind)
    policy.share_prompts = shared
    ids = torch.arange(3, 15).view(2, 6).repeat_interleave(3, 0)
    ids[:, 4:] = torch.randint(3, 15, (6, 2), generator=stream())
    batch = {"tokens": ids, "mask": torch.arange(6).expand(6, 6) > 3}
    calls = []
    own = fused_layers._own
    monkeypatch.setattr(fused_layers, "_own", lambda m: calls.append(type(m).__name__) or own(m))
    fused = gradients(policy, batch)
    assert sum(name.endswith("Norm") for name in calls) >= 5 and "Linear" in calls
    assert not any("forward" in vars(module) for module in policy.model.modules())
    monkeypatch.setattr(fused_layers, "_own", lambda module: None)
    plain = gradients(policy, batch)
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


def test_half_precision_and_foreign_checkpointing_keep_the_models_own_layers(steps):
    policy = known("llama")
    assert len(fused_layers._exchangeable(policy.model)) == 20
    with torch.autocast("cpu", torch.bfloat16):
        assert not fused_layers._exchangeable(policy.model)
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert not fused_layers._exchangeable(policy.model)


def test_recomputed_layers_are_the_exchanged_ones(steps, monkeypatch):
    plain = known("qwen3")
    batch = {"tokens": torch.randint(3, 15, (4, 9), generator=stream()), "mask": torch.arange(9).expand(4, 9) > 2}
    plain.share_prompts = False
    expected = gradients(plain, batch)
    recomputing = known("qwen3")
    recomputing.load_state_dict(plain.state_dict())
    recomputing.share_prompts = False
    recomputing._recomputed = causal_lm._recompute_layers(recomputing.model)
    applied = []
    norm = fused_layers._norm
    monkeypatch.setattr(fused_layers, "_norm", lambda module, states: applied.append(1) or norm(module, states))
    found = gradients(recomputing, batch)
    assert len(applied) == 9 + 8  # all norms forward, and those of both layers once more
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_frozen_weights_and_passes_without_gradients_give_the_same_log_probs(steps):
    policy = known("qwen2")
    batch = {"tokens": torch.arange(3, 15).view(2, 6), "mask": torch.arange(6).expand(2, 6) > 1}
    first = gradients(policy, batch)
    with torch.no_grad():
        assert torch.equal(policy.log_prob(batch).log_prob, first[0])
    for parameter in policy.model.model.layers[0].parameters():
        parameter.requires_grad_(False)
    policy.zero_grad()
    scored = policy.log_prob(batch).log_prob
    (scored * torch.arange(scored.numel()).view_as(scored).sin()).sum().backward()
    assert torch.equal(scored, first[0])
    for parameter, before in zip(policy.parameters(), first[1:], strict=True):
        assert parameter.grad is None or torch.equal(parameter.grad, before)
    assert policy.model.model.layers[0].mlp.up_proj.weight.grad is None


@pytest.mark.parametrize("words", [7, NOISE_UP_TO, NOISE_UP_TO + 3, 5 * BLOCK])
def test_drawn_tokens_have_their_probabilities(words):
    logits = torch.randn(words, generator=stream(1)) * 2
    logits[torch.randperm(words, generator=stream(2))[: words // 3]] = -math.inf
    many = 40_000
    found = torch.bincount(draw(logits.expand(many, words), stream(3)), minlength=words).double()
    expected = logits.double().softmax(-1) * many
    assert float(found[expected == 0].sum()) == 0
    seen = expected > 5
    chi2 = float(((found - expected)[seen] ** 2 / expected[seen]).sum())
    assert chi2 < int(seen.sum()) + 4 * math.sqrt(2 * int(seen.sum()))


@pytest.mark.parametrize("at", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("words", [3 * BLOCK, 3 * BLOCK + 1, 4 * BLOCK - 1])
def test_the_ends_of_the_unit_interval_are_tokens_that_have_mass(at, words, monkeypatch):
    logits = torch.full((2, words), -math.inf)
    logits[:, words // 2] = 0.3
    logits[:, words // 2 + 1] = -0.2
    monkeypatch.setattr(sampling.torch, "rand", lambda shape, **k: torch.full(shape, at, dtype=torch.float64))
    assert draw(logits, stream()).tolist() == [words // 2 + (at > 0)] * 2


def test_compiled_scoring_keeps_the_models_own_layers(steps):
    policy = known("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not fused_layers._exchangeable(policy.model)
    assert fused_layers._exchangeable(policy.model)


@pytest.mark.parametrize("words", [9, 3 * BLOCK + 1])
def test_logits_that_are_no_numbers_draw_a_token_that_exists(words):
    drawn = draw(torch.full((4, words), math.nan), stream())
    assert drawn.shape == (4,) and bool(((drawn >= 0) & (drawn < words)).all())
