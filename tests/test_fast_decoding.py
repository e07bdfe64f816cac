"""Decoding on a CPU: the cache that holds a prompt once, and packed weights that no change of the weights outlives."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_generation import letter_tokenizer, ragged_prompts, small, stream, teacher_forced
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from unified_rl.policies import generation, group_cache, packed_weights
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.policies.group_cache import RECENT, GroupCache, GroupLayer, group_attention
from unified_rl.policies.kv_cache import SlabCache
from unified_rl.policies.sampling import Sampling

NEW = 2 * RECENT + 8


@pytest.fixture
def packs(monkeypatch):
    """Packs small weights too, and counts the products of packed ones."""
    calls = []
    product = packed_weights._product
    monkeypatch.setattr(packed_weights, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(generation, "lean_step", lambda *args: None)  # which packs by itself
    monkeypatch.setattr(packed_weights, "_product", lambda *args: calls.append(args[0]) or product(*args))
    if not packed_weights.can_pack():
        pytest.skip("this build of torch has no packed products")
    return calls


def architecture(name: str) -> CausalLM:
    own = {"gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2}, "falcon": {"hidden_size": 32, "num_hidden_layers": 2}}
    if name not in own:
        return small(name)
    heads = {"num_attention_heads": 2} if name == "falcon" else {}
    return CausalLM(letter_tokenizer(), 64, config={"model_type": name, **own[name], **heads})


def sample(policy: CausalLM, samples: int = 3, **kwargs):
    stops = kwargs.pop("stop_ids", [4])
    return policy.generate(
        ragged_prompts(4), max_new_tokens=NEW, stop_ids=stops, samples_per_prompt=samples, generator=stream(), **kwargs
    )


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "phi"])
def test_a_cache_with_each_prompt_once_gives_the_same_rows(name, monkeypatch):
    policy = architecture(name)
    seen = []
    attend = GroupLayer.attend
    monkeypatch.setattr(
        GroupLayer, "attend", lambda layer, *a: seen.append((len(layer.prompt[0]), len(a[0]))) or attend(layer, *a)
    )
    once = sample(policy)
    assert seen[0] == (4, 12)  # 12 rows read 4 prompts
    assert len({rows for _, rows in seen}) > 2  # rows left on the way
    monkeypatch.setattr(generation, "CPU_CACHE", SlabCache)
    count = len(seen)
    whole = sample(policy)
    assert len(seen) == count
    assert torch.equal(once.tokens, whole.tokens) and torch.equal(once.length, whole.length)
    torch.testing.assert_close(once.log_prob, whole.log_prob, atol=1e-5, rtol=0)


def test_rows_of_one_prompt_and_prompts_of_one_length_are_cases_of_it(monkeypatch):
    policy = small("llama")
    prompts = [[3, 5, 7], [8, 9, 4], [6, 6, 6]]
    found = []
    for cache in (GroupCache, SlabCache):
        monkeypatch.setattr(generation, "CPU_CACHE", cache)
        for samples in (1, 5):
            found.append(
                policy.generate(
                    prompts, max_new_tokens=NEW, stop_ids=[4], samples_per_prompt=samples, generator=stream()
                )
            )
    for once, whole in zip(found[:2], found[2:], strict=True):
        assert torch.equal(once.tokens, whole.tokens)
        torch.testing.assert_close(once.log_prob, whole.log_prob, atol=1e-5, rtol=0)


def test_an_architecture_with_attention_of_its_own_gets_the_plain_cache(monkeypatch):
    policy = architecture("falcon")
    monkeypatch.setattr(GroupLayer, "attend", None)  # would fail
    ours = sample(policy)
    monkeypatch.setattr(generation, "CPU_CACHE", SlabCache)
    plain = sample(policy)
    assert torch.equal(ours.tokens, plain.tokens) and torch.equal(ours.log_prob, plain.log_prob)


def test_bfloat16_keeps_the_plain_cache_whose_attention_does_not_round_scores(monkeypatch):
    policy = small("llama", autocast=True)
    monkeypatch.setattr(GroupLayer, "attend", None)
    assert sample(policy).length.min() >= 1


def test_scoring_after_generation_and_after_an_error_is_as_before(monkeypatch):
    policy = small("llama")
    batch = {"tokens": torch.arange(3, 15).view(2, 6), "mask": torch.arange(6).expand(2, 6) > 1}
    before = policy.log_prob(batch).log_prob
    monkeypatch.setattr(generation._Job, "pick", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(policy)
    monkeypatch.undo()
    sample(policy)
    assert torch.equal(policy.log_prob(batch).log_prob, before)
    assert not any("forward" in vars(module) for module in policy.model.modules())


def test_threads_that_decode_at_once_do_not_meet():
    policies = [small("llama", seed=seed) for seed in (0, 1)]
    alone = [sample(policy) for policy in policies]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(sample, policies * 3))
    for i, found in enumerate(together):
        assert torch.equal(found.tokens, alone[i % 2].tokens)


def test_attention_that_somebody_else_put_there_is_still_called(monkeypatch):
    calls = []

    def theirs(*args, **options):
        calls.append(len(args))
        return sdpa_attention_forward(*args, **options)

    policy = small("llama")
    monkeypatch.setattr(group_cache, "_other", group_cache._other)  # put back afterwards
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", theirs)
    sample(policy)
    prefills = len(calls)
    assert prefills == 2  # layers; steps are the cache's
    policy.log_prob({"tokens": torch.arange(3, 15).view(2, 6), "mask": torch.arange(6).expand(2, 6) > 1})
    assert len(calls) > prefills


def test_attention_that_somebody_put_around_ours_does_not_go_round_in_circles(monkeypatch):
    policy = small("llama")
    first = sample(policy)
    ours, calls = ALL_ATTENTION_FUNCTIONS["sdpa"], []
    monkeypatch.setattr(group_cache, "_other", group_cache._other)  # put back afterwards
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", lambda *a, **k: calls.append(1) or ours(*a, **k))
    again = sample(policy)
    assert calls and torch.equal(first.tokens, again.tokens) and torch.equal(first.log_prob, again.log_prob)


def test_attention_that_reads_something_else_than_the_cache_gave_is_an_error():
    policy = small("llama")
    cache = GroupCache(2, 1)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad(), group_attention(cache):
        policy.model(ids, past_key_values=cache, use_cache=True)
        assert cache.usable
        for layer in cache.group_layers:
            take_in = layer.update
            layer.update = lambda k, v, *a, f=take_in: tuple(x.clone() for x in f(k, v))
        with pytest.raises(RuntimeError, match="does not attend"):
            policy.model(ids[:, :1], past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("adapted", [False, True])
def test_packed_weights_give_the_rows_of_plain_ones(adapted, packs, monkeypatch):
    policy = small("qwen3", **({"lora": {"r": 2}} if adapted else {}))
    packed = sample(policy)
    assert len(set(map(id, packs))) > 10
    monkeypatch.setattr(packed_weights, "LEAST_TOKENS", 10**9)
    packs.clear()
    plain = sample(policy)
    assert not packs
    assert torch.equal(packed.tokens, plain.tokens)
    torch.testing.assert_close(packed.log_prob, plain.log_prob, atol=1e-5, rtol=0)


def by_optimizer(policy: CausalLM) -> None:
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.05)
    ids = torch.arange(3, 15).view(2, 6)
    policy.log_prob({"tokens": ids, "mask": torch.arange(6).expand(2, 6) > 1}).log_prob.sum().backward()
    optimizer.step()


def by_state(policy: CausalLM) -> None:
    policy.load_state_dict({name: x * 1.5 if x.is_floating_point() else x for name, x in policy.state_dict().items()})


def by_data(policy: CausalLM) -> None:
    for parameter in policy.parameters():
        parameter.data.mul_(1.5)  # leaves no trace in the version counter


def by_replacement(policy: CausalLM) -> None:
    for module in policy.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(module.weight.detach() * 1.5, module.weight.requires_grad)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("change", [by_optimizer, by_state, by_data, by_replacement])
def test_a_changed_weight_is_the_next_generations_weight(change, adapted, packs):
    policy = small("llama", **({"lora": {"r": 2}} if adapted else {}))
    before = sample(policy, greedy=True)
    change(policy)
    packs.clear()
    after = sample(policy, greedy=True)
    assert packs and not torch.equal(before.log_prob, after.log_prob)
    asked = [p for p in ragged_prompts(4) for _ in range(3)]
    for prompt, row, log_prob in zip(asked, after.rows(), after.log_prob, strict=True):
        torch.testing.assert_close(
            log_prob[: len(row)], teacher_forced(policy, prompt, row, Sampling()), atol=1e-4, rtol=0
        )


def test_gradients_inside_the_block_are_those_of_the_plain_layers(packs):
    policy = small("llama")
    ids = torch.arange(3, 15).view(2, 6)

    def gradient() -> torch.Tensor:
        policy.zero_grad()
        policy.model(ids).logits.logsumexp(-1).sum().backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters()])

    plain = gradient()
    with packed_weights.packed_weights(policy.model, 2, 99):
        inside = gradient()
        assert packs
    assert torch.equal(plain, inside)


def test_a_copy_of_a_policy_that_has_generated_generates_the_same(packs):
    policy = small("llama")
    first = sample(policy)
    again = sample(copy.deepcopy(policy))
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.log_prob, again.log_prob)


def test_short_generations_and_many_rows_go_without_packing(packs):
    policy = small("llama")
    size = packed_weights.packed_bytes(policy.model, 12, NEW)
    assert size == sum(m.weight.nbytes for m in policy.model.modules() if type(m) is torch.nn.Linear)
    assert packed_weights.packed_bytes(policy.model, 12, packed_weights.LEAST_TOKENS - 1) == 0
    assert packed_weights.packed_bytes(policy.model, packed_weights.MOST_ROWS + 1, NEW) == 0
    assert packed_weights.packed_bytes(policy.model, 12, NEW, "cuda") == 0
    policy.generate([[3, 4]], max_new_tokens=4, stop_ids=[], samples_per_prompt=4, generator=stream())
    assert not packs
