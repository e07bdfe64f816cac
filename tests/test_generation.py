"""Generation: the own loop against transformers' generate, and its log-probs against a teacher-forced pass."""

from __future__ import annotations

import copy

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast

from unified_rl.errors import ConfigError
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.policies.generation import generate
from unified_rl.policies.sampling import Sampling

LETTERS = "0123456789abcdef"


def letter_tokenizer(pad: bool = True) -> PreTrainedTokenizerFast:
    special = ["<pad>", "<eos>", "<bos>"]
    vocab = {token: i for i, token in enumerate([*special, *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    extra = {"pad_token": "<pad>"} if pad else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", **extra)


def small(model_type: str, **kwargs) -> CausalLM:
    config = {
        "model_type": model_type,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
    }
    return CausalLM(letter_tokenizer(), 64, config=config, **kwargs)


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ragged_prompts(count: int = 6) -> list[torch.Tensor]:
    sizes = torch.randint(1, 9, (count,), generator=stream(3)).tolist()
    return [torch.randint(3, 19, (n,), generator=stream(n)) for n in sizes]


def teacher_forced(policy: CausalLM, prompt: torch.Tensor, row: list[int], sampling: Sampling) -> torch.Tensor:
    """Log-probs of a sampled row from the plain model, one row at a time, in the textbook way."""
    ids = torch.tensor([*prompt.tolist(), *row])
    with torch.no_grad():
        logits = policy.model(ids[None]).logits[0, len(prompt) - 1 : -1]
    out = []
    for scores, token in zip(logits / sampling.temperature, row, strict=True):
        order = scores.argsort(descending=True).tolist()
        keep = order[: sampling.top_k or len(order)]
        probability = torch.softmax(scores[keep], -1)
        total, nucleus = 0.0, []
        for index, p in zip(keep, probability.tolist(), strict=True):
            nucleus.append(index)
            total += p
            if total >= sampling.top_p:
                break
        out.append(torch.log_softmax(scores[nucleus], -1)[nucleus.index(token)])
    return torch.stack(out)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2"])
def test_greedy_tokens_equal_those_of_transformers_generate(model_type):
    if model_type == "gpt2":
        policy = CausalLM(
            letter_tokenizer(), 64, config={"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2}
        )
    else:
        policy = small(model_type)
    prompts = ragged_prompts()
    ours = policy.generate(prompts, max_new_tokens=24, greedy=True, stop_ids=[4, 7])
    theirs = policy.generate(prompts, max_new_tokens=24, greedy=True, stop_ids=[4, 7], backend="hf")
    assert ours.finished.any()
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(ours.length, theirs.length)
    assert torch.equal(ours.finished, theirs.finished)
    torch.testing.assert_close(ours.log_prob, theirs.log_prob, atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", ["own", "hf"])
@pytest.mark.parametrize("transform", [Sampling(), Sampling(0.7, 5, 1.0), Sampling(0.7, 0, 0.8), Sampling(1.3, 9, 0.7)])
def test_log_probs_are_those_of_the_true_sampling_distribution(transform, backend):
    policy = small("llama")
    prompts = ragged_prompts()
    out = generate(
        policy.model, prompts, max_new_tokens=12, stop_ids=[5], sampling=transform, generator=stream(), backend=backend
    )
    for prompt, row, log_prob in zip(prompts, out.rows(), out.log_prob, strict=True):
        expected = teacher_forced(policy, prompt, row, transform)
        torch.testing.assert_close(log_prob[: len(row)], expected, atol=1e-4, rtol=0)
        assert (log_prob[len(row) :] == 0).all()


def test_drawn_frequencies_match_the_reported_log_probs():
    policy = small("qwen3")
    out = generate(
        policy.model, [[5, 9]], max_new_tokens=1, stop_ids=[], samples_per_prompt=20_000, generator=stream(),
        sampling=Sampling(0.5, 6),
    )  # fmt: skip
    tokens, counts = out.tokens[:, 0].unique(return_counts=True)
    assert len(tokens) == 6
    for token, count in zip(tokens, counts, strict=True):
        p = float(out.log_prob[out.tokens == token][0].exp())
        assert abs(float(count) / 20_000 - p) < 4 * (p * (1 - p) / 20_000) ** 0.5 + 1e-9


def test_samples_of_a_prompt_equal_separate_rows_with_that_prompt():
    policy = small("llama")
    prompts = ragged_prompts(3)
    shared = policy.generate(prompts, max_new_tokens=16, stop_ids=[4], samples_per_prompt=4, generator=stream())
    repeated = [p for p in prompts for _ in range(4)]
    separate = policy.generate(repeated, max_new_tokens=16, stop_ids=[4], generator=stream())
    assert torch.equal(shared.tokens, separate.tokens)
    torch.testing.assert_close(shared.log_prob, separate.log_prob, atol=1e-5, rtol=0)


def test_rows_do_not_depend_on_their_neighbours_as_others_finish():
    policy = small("qwen3")
    prompts = ragged_prompts(12)
    together = policy.generate(prompts, max_new_tokens=24, stop_ids=[4, 7, 11], greedy=True)
    assert together.length.min() < 6 and together.length.max() > 6  # rows do leave the cache on the way
    order = torch.randperm(12, generator=stream(1))
    shuffled = policy.generate([prompts[i] for i in order], max_new_tokens=24, stop_ids=[4, 7, 11], greedy=True)
    assert torch.equal(shuffled.tokens, together.tokens[order])
    alone = [policy.generate([p], max_new_tokens=24, stop_ids=[4, 7, 11], greedy=True).rows()[0] for p in prompts]
    assert together.rows() == alone


def test_the_stop_token_is_part_of_the_row_and_carries_a_log_prob():
    policy = small("llama")
    first = policy.generate([[3, 4, 5]], max_new_tokens=8, stop_ids=[], greedy=True).rows()[0]
    stop = first[3]
    out = policy.generate([[3, 4, 5]], max_new_tokens=8, stop_ids=[stop], greedy=True)
    end = first.index(stop) + 1
    assert out.rows() == [first[:end]]
    assert bool(out.finished[0]) and float(out.log_prob[0, end - 1]) < 0
    assert (out.tokens[0, end:] == policy.pad_id).all()


def test_a_row_that_runs_out_of_budget_is_not_finished():
    policy = small("llama")
    out = policy.generate([[3, 4]], max_new_tokens=5, stop_ids=[], generator=stream())
    assert out.length.tolist() == [5] and not bool(out.finished[0])
    assert policy.generate([[3, 4]], max_new_tokens=1, stop_ids=[], generator=stream()).tokens.shape == (1, 1)


def test_the_generator_alone_decides_the_draw():
    policy = small("llama")
    torch.manual_seed(0)
    first = policy.generate([[3, 4]], max_new_tokens=9, samples_per_prompt=3, generator=stream(5))
    before = torch.random.get_rng_state()
    torch.manual_seed(1)
    again = policy.generate([[3, 4]], max_new_tokens=9, samples_per_prompt=3, generator=stream(5))
    assert torch.equal(first.tokens, again.tokens)
    torch.random.set_rng_state(before)
    policy.generate([[3, 4]], max_new_tokens=3, generator=stream(5), backend="hf")
    assert torch.equal(before, torch.random.get_rng_state())


def test_padded_tensor_prompts_equal_lists_of_prompts():
    policy = small("llama")
    prompts = ragged_prompts()
    lengths = torch.tensor([len(p) for p in prompts])
    padded = torch.full((len(prompts), 11), 17)
    for row, p in zip(padded, prompts, strict=True):
        row[: len(p)] = p
    ours = policy.generate(padded, lengths=lengths, max_new_tokens=6, greedy=True)
    assert torch.equal(ours.tokens, policy.generate(prompts, max_new_tokens=6, greedy=True).tokens)


def test_sliding_window_models_fall_back_to_transformers():
    config = {
        "model_type": "mistral", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "sliding_window": 4,
    }  # fmt: skip
    policy = CausalLM(letter_tokenizer(), 64, config=config)
    prompts = ragged_prompts()
    ours = policy.generate(prompts, max_new_tokens=8, greedy=True)
    assert torch.equal(ours.tokens, policy.generate(prompts, max_new_tokens=8, greedy=True, backend="hf").tokens)


@pytest.mark.parametrize(
    "arguments",
    [{"prompts": [[]]}, {"prompts": []}, {"backend": "magic"}, {"generator": None}, {"lengths": torch.tensor([0])}],
)
def test_bad_requests_are_refused(arguments):
    given = {"prompts": torch.tensor([[3]]), "max_new_tokens": 2, "stop_ids": [], "generator": stream()} | arguments
    with pytest.raises(ConfigError):
        generate(small("llama").model, given.pop("prompts"), **given)


@pytest.mark.parametrize("bad", [{"temperature": 0.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_bad_transforms_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Sampling(**bad)


def test_the_transform_of_a_worked_example():
    # probabilities 0.5, 0.3, 0.2: top_k=2 renormalises to 5/8 and 3/8; top_p=0.7 keeps the same two; 0.5 keeps one
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log()
    expected = torch.tensor([[0.0, 0.625, 0.375]])
    torch.testing.assert_close(Sampling(top_k=2).logits(logits).softmax(-1), expected)
    torch.testing.assert_close(Sampling(top_p=0.7).logits(logits).softmax(-1), expected)
    torch.testing.assert_close(Sampling(top_p=0.4).logits(logits).softmax(-1), torch.tensor([[0.0, 1.0, 0.0]]))
    torch.testing.assert_close(
        Sampling(temperature=0.5).logits(logits).softmax(-1), torch.tensor([[0.04, 0.25, 0.09]]) / 0.38
    )


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("prompts", [ragged_prompts(), [[5, 9, 4, 8], [7, 3, 3, 6]]], ids=["ragged", "equal"])
def test_steps_on_fixed_memory_give_what_the_growing_cache_gives(model_type, prompts, device, monkeypatch, request):
    """On a CUDA device the steps are replayed from a graph."""
    sizes = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2} if model_type == "gpt2" else None
    policy = CausalLM(letter_tokenizer(), 64, config=sizes) if sizes else small(model_type)
    policy = policy.to(device)
    rows = [torch.as_tensor(p, dtype=torch.int64) for p in prompts]
    if device == "cpu":  # memory that nothing was written to holds NaN then
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        torch.use_deterministic_algorithms(True, warn_only=True)
        request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    for greedy, stops in ((True, [4, 7]), (False, [])):  # sampled rows that leave the batch would change later draws
        settings = {"max_new_tokens": 40, "samples_per_prompt": 3, "greedy": greedy, "stop_ids": stops}
        plain, fixed = (
            generate(policy.model, prompts, generator=torch.Generator(device).manual_seed(1), replay=r, **settings)
            for r in (False, True)
        )
        assert torch.equal(plain.tokens, fixed.tokens)
        reference = copy.deepcopy(policy).to("cpu")
        for index, (row, log_prob) in enumerate(zip(fixed.rows(), fixed.log_prob.cpu(), strict=True)):
            expected = teacher_forced(reference, rows[index // 3], row, Sampling())
            torch.testing.assert_close(log_prob[: len(row)], expected, atol=1e-4, rtol=0)


def test_replay_is_refused_where_the_own_loop_cannot_run():
    with pytest.raises(ConfigError, match="cuda_graph=false"):
        generate(small("llama").model, [[5]], max_new_tokens=2, stop_ids=[], greedy=True, backend="hf", replay=True)


def test_graphs_of_decoding_without_cuda_are_refused():
    with pytest.raises(ConfigError, match="device=cuda"):
        small("llama", cuda_graph=True).generate([[5]], max_new_tokens=2)


# ------------------------------------------------------------------------------------------- weights that change


def test_weights_that_change_between_tokens_are_used_from_the_next_one_and_what_was_read_stays():
    policy, newer = small("qwen3", seed=0), small("qwen3", seed=1)
    prompts, asked = [torch.tensor([5, 6, 7]), torch.tensor([8, 9, 3])], []
    options = {"max_new_tokens": 6, "stop_ids": [], "generator": stream(1)}

    def refresh() -> int:
        asked.append(len(asked))
        if len(asked) == 4:
            policy.model.load_state_dict(newer.model.state_dict())
        return 10 + (len(asked) >= 4)

    before = copy.deepcopy(policy)
    policy.refresh = refresh
    out = policy.generate(prompts, **options)
    assert out.version.tolist() == [[10, 10, 10, 11, 11, 11]] * 2 and len(asked) == 6
    for row, prompt in enumerate(prompts):  # by hand, keys and values of either model
        cache = DynamicCache()
        ids, expected = prompt[None], []
        for step in range(6):
            model = (before if step < 3 else newer).model
            with torch.no_grad():
                logits = model(ids, past_key_values=cache, use_cache=True).logits[0, -1].log_softmax(-1)
            token = int(out.tokens[row, step])
            expected.append(logits[token])
            ids = torch.tensor([[token]])
        torch.testing.assert_close(out.log_prob[row], torch.stack(expected), atol=1e-5, rtol=0)


def test_asking_for_newer_weights_changes_nothing_where_there_are_none_and_needs_the_own_loop():
    policy = small("llama")
    plain = policy.generate(ragged_prompts(), max_new_tokens=12, stop_ids=[4], generator=stream())
    policy.refresh = lambda: 7
    asked = policy.generate(ragged_prompts(), max_new_tokens=12, stop_ids=[4], generator=stream())
    assert plain.version is None and bool((asked.version[asked.tokens != 0] == 7).all())
    assert torch.equal(plain.tokens, asked.tokens)
    torch.testing.assert_close(plain.log_prob, asked.log_prob, atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match=r"engine.in_flight=false"):
        policy.generate(ragged_prompts(), max_new_tokens=2, stop_ids=[4], generator=stream(), backend="hf")
