"""Min-p and repetition penalty: sampled, re-scored and differentiated as the distribution that really sampled."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from agent_cases import TINY, filled, gradients, language_agent, stream
from run_cases import LANGUAGE, composed, merged, run
from tensordict import TensorDict
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from unified_rl.envs.language import ChainMod, GuessNumber
from unified_rl.errors import ConfigError
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.policies.generation import generate
from unified_rl.policies.sampling import Sampling, seen_before
from unified_rl.rollout import LanguageRollout
from unified_rl.training.run import Job

PENALISED = {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.7}
KINDS = [{"min_p": 0.3}, {"repetition_penalty": 1.7}, {"repetition_penalty": 0.6, "temperature": 1.5}, PENALISED]


def processors(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
               repetition_penalty: float = 1.0) -> LogitsProcessorList:  # fmt: skip
    """What ``generate`` of transformers makes of the same settings, in its order."""
    found: list[Any] = [RepetitionPenaltyLogitsProcessor(repetition_penalty), TemperatureLogitsWarper(temperature)]
    found += [TopKLogitsWarper(top_k)] if top_k else []
    found += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    found += [MinPLogitsWarper(min_p)] if min_p else []
    return LogitsProcessorList(found)


def policy_of(**options: Any) -> CausalLM:
    env = ChainMod(modulus=5, terms=3)
    policy = CausalLM(**env.policy_inputs(), config={**TINY, "num_hidden_layers": 2}, seed=1, **options)
    with torch.no_grad():
        policy.model.lm_head.weight *= 3  # far from uniform
    return policy


def prompts(policy: CausalLM) -> list[list[int]]:
    words = len(policy.tokenizer)
    return [[(7 * i + j) % (words - 4) + 4 for j in range(3 + i)] for i in range(4)]


def rows_of(policy: CausalLM, samples: int = 3, **options: Any) -> TensorDict:
    """Sampled rows as a rollout stores them."""
    given = prompts(policy)
    out = policy.generate(
        given, max_new_tokens=10, stop_ids=[1], samples_per_prompt=samples, generator=stream(), **options
    )
    width = max(map(len, given)) + 10
    rows = TensorDict(
        {
            "tokens": torch.zeros(len(out.tokens), width, dtype=torch.int64),
            "mask": torch.zeros(len(out.tokens), width, dtype=torch.bool),
            "log_prob": torch.zeros(len(out.tokens), width),
        },
        [len(out.tokens)],
    )
    for number, said in enumerate(out.rows()):
        prompt = given[number // samples]
        rows["tokens"][number, : len(prompt) + len(said)] = torch.tensor(prompt + said)
        rows["mask"][number, len(prompt) : len(prompt) + len(said)] = True
        rows["log_prob"][number, len(prompt) : len(prompt) + len(said)] = out.log_prob[number, : len(said)]
    return rows


@torch.no_grad()
def truth(policy: CausalLM, rows: TensorDict, settings: dict[str, Any]) -> Tensor:
    """Log-probs by transformers' processors, one token at a time, without padding."""
    found = torch.zeros(rows["mask"].shape)
    for row, column in rows["mask"].nonzero().tolist():
        before = rows["tokens"][row : row + 1, :column]
        logits = policy.model(input_ids=before).logits[:, -1].float()
        scores = processors(**settings)(before, logits).log_softmax(-1)
        found[row, column] = scores[0, rows["tokens"][row, column]]
    return found


@pytest.mark.parametrize("settings", KINDS)
def test_transformed_logits_are_those_of_transformers(settings: dict[str, Any]) -> None:
    logits = 4 * torch.randn(6, 23, generator=stream(3))
    ids = torch.randint(0, 23, (6, 9), generator=stream(4))
    seen = seen_before(ids, torch.arange(6), torch.full((6,), 9), 23)
    got = Sampling(**settings).logits(logits, seen)
    want = processors(**settings)(ids, logits.clone())
    assert torch.equal(got == -torch.inf, want == -torch.inf)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    if "min_p" in settings:
        assert bool((got == -torch.inf).any())


def test_what_came_before_is_read_row_by_row_and_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.tensor([[3, 5, 3, 6, 0, 0], [7, 7, 2, 1, 4, 0]])
    row, column = torch.tensor([0, 0, 1, 1]), torch.tensor([1, 4, 2, 5])
    for size in (2**22, 5, 1):
        monkeypatch.setattr("unified_rl.policies.sampling.SEEN_AT_ONCE", size)
        seen = seen_before(tokens, row, column, 8)
        assert [set(x.nonzero()[:, 0].tolist()) for x in seen] == [{3}, {3, 5, 6}, {7}, {7, 2, 1, 4}]


@pytest.mark.parametrize("settings", KINDS)
@pytest.mark.parametrize("backend", ["own", "hf"])
def test_sampled_log_probs_are_the_truth_and_scoring_finds_them_again(settings: dict[str, Any], backend: str) -> None:
    policy = policy_of(**settings)
    rows = rows_of(policy, backend=backend)
    torch.testing.assert_close(rows["log_prob"], truth(policy, rows, settings), atol=2e-5, rtol=0)
    with torch.no_grad():
        scored = policy.log_prob(rows).log_prob
        torch.testing.assert_close(scored, rows["log_prob"], atol=1e-5, rtol=0)
        policy.share_prompts, policy.logit_chunk = False, 3
        torch.testing.assert_close(policy.log_prob(rows).log_prob, scored, atol=1e-5, rtol=0)
        policy.model.logit_shape = None
        torch.testing.assert_close(policy.log_prob(rows).log_prob, scored, atol=1e-5, rtol=0)
    plain = policy_of()
    assert float((plain.log_prob(rows).log_prob.detach() - scored).abs().max()) > 0.1
    torch.testing.assert_close(policy.nll(rows), -plain.log_prob(rows).log_prob)  # imitation is of the model itself


def test_gradients_do_not_depend_on_the_chunks() -> None:
    found = []
    for chunk in (0, 4):
        policy = policy_of(repetition_penalty=1.7, logit_chunk=chunk)
        rows = rows_of(policy)
        policy.log_prob(rows).log_prob.sum().backward()
        found.append([p.grad.clone() for p in policy.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    weight = policy.model.lm_head.weight
    direction = torch.randn(weight.shape, generator=stream(5))
    with torch.no_grad():
        slope = [0.0, 0.0]
        for at, sign in enumerate((1, -1)):
            weight += sign * 1e-3 * direction
            slope[at] = float(policy.log_prob(rows).log_prob.double().sum())
            weight -= sign * 1e-3 * direction
    want = (slope[0] - slope[1]) / 2e-3
    assert float((weight.grad * direction).sum()) == pytest.approx(want, rel=2e-2)


def test_the_most_likely_tokens_are_those_of_transformers() -> None:
    policy = policy_of(repetition_penalty=1.7)
    (prompt,) = prompts(policy)[3:]
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": 12, "do_sample": False, "repetition_penalty": 1.7, "pad_token_id": 0}
    want = policy.model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=None, **options)[
        0, len(prompt) :
    ]
    for backend in ("own", "hf"):
        got = policy.generate([prompt], max_new_tokens=12, greedy=True, stop_ids=[], backend=backend)
        assert got.tokens[0].tolist() == want.tolist()
    assert (
        policy_of().generate([prompt], max_new_tokens=12, greedy=True, stop_ids=[]).tokens[0].tolist() != want.tolist()
    )


def test_padding_is_nothing_that_was_said_and_rows_leave_with_their_memory() -> None:
    policy = policy_of(repetition_penalty=3.0)
    given = prompts(policy)
    together = policy.generate(given, max_new_tokens=24, stop_ids=[4, 7], greedy=True)
    theirs = policy.generate(given, max_new_tokens=24, stop_ids=[4, 7], greedy=True, backend="hf")
    assert torch.equal(together.tokens, theirs.tokens) and len(set(together.length.tolist())) > 1
    for number, prompt in enumerate(given):
        alone = policy.generate([prompt], max_new_tokens=24, stop_ids=[4, 7], greedy=True)
        assert alone.rows()[0] == together.rows()[number]


def test_steps_on_fixed_memory_remember_too() -> None:
    policy = policy_of(repetition_penalty=1.7, min_p=0.05)
    settings = {"max_new_tokens": 12, "stop_ids": [], "samples_per_prompt": 2, "sampling": policy.sampling}
    plain, fixed = (
        generate(policy.model, prompts(policy), generator=stream(1), replay=r, **settings) for r in (False, True)
    )
    assert torch.equal(plain.tokens, fixed.tokens)
    torch.testing.assert_close(plain.log_prob, fixed.log_prob, atol=1e-5, rtol=0)


def test_fresh_rows_of_several_turns_have_ratio_1() -> None:
    """What the task says between the turns has been seen as well."""
    env = GuessNumber()
    policy = CausalLM(**env.policy_inputs(), config=TINY, seed=1, repetition_penalty=1.5, min_p=0.02)
    rows, _ = LanguageRollout(env, policy, 1.0, stream(0), stream(1), prompts=3, group_size=2).collect(0)
    assert int(rows["step_index"].max()) >= 1
    scored = policy.log_prob(rows).log_prob
    torch.testing.assert_close(scored, rows["behavior_log_prob"], atol=1e-5, rtol=0)


def test_a_run_samples_and_scores_by_the_same_settings() -> None:
    outcome = run(merged(LANGUAGE, ("policy.repetition_penalty=1.5", "policy.min_p=0.02")))
    plain = run(LANGUAGE)
    assert outcome.differs(plain)
    trainer = Job(composed([*LANGUAGE, "policy.repetition_penalty=1.5", "policy.min_p=0.02"]), ("run_cases",))
    agent = trainer.make_trainer(None)  # type: ignore[arg-type]
    agent.update()
    assert agent.means.pop()["identity/max_log_ratio"] < 1e-5


def test_an_nll_term_is_of_the_model_itself() -> None:
    """Not of the penalised distribution, although its log-probs are at hand."""
    policy = policy_of(repetition_penalty=2.0)
    rows, _ = LanguageRollout(
        ChainMod(modulus=5, terms=3), policy, 1.0, stream(), stream(1), prompts=3, group_size=2
    ).collect(0)
    objectives = {"policy": None, "nll": {"name": "nll", "rows": None}}
    got = gradients(language_agent(copy.deepcopy(policy), rows, "reinforce", objectives=objectives), filled(rows, 1))
    nll = policy.nll(rows)
    (nll.sum() / rows["mask"].sum()).backward()
    want = policy.model.lm_head.weight.grad
    torch.testing.assert_close(got["policy.model.lm_head.weight"], want, atol=1e-6, rtol=1e-4)


def test_whole_distributions_are_refused_by_name() -> None:
    term = "agent.objectives={pull: {name: divergence, anchor: reference}}"
    with pytest.raises(
        ConfigError, match=r"agent\.objectives\.pull compares whole .* set policy\.repetition_penalty=1"
    ):
        run([*LANGUAGE, "policy.repetition_penalty=1.5", term])
    policy = policy_of(repetition_penalty=1.5)
    with pytest.raises(ConfigError, match=r"policy\.repetition_penalty=1\.5 needs the tokens before each unit"):
        policy.logits_of(torch.zeros(2, 32))


def test_another_sampling_may_be_given_for_once() -> None:
    policy = policy_of(temperature=1.0)
    cold = Sampling(temperature=1e-3)
    got = policy.generate(prompts(policy), max_new_tokens=8, stop_ids=[], generator=stream(), sampling=cold)
    greedy = policy.generate(prompts(policy), max_new_tokens=8, stop_ids=[], greedy=True)
    assert torch.equal(got.tokens, greedy.tokens)
    own = policy.generate(prompts(policy), max_new_tokens=8, stop_ids=[], generator=stream())
    assert not torch.equal(own.tokens, greedy.tokens) and policy.sampling.temperature == 1.0


def test_another_sampling_draws_no_id_beyond_the_tokenizer() -> None:
    env = ChainMod(modulus=5, terms=3)
    words = len(env.tokenizer)
    policy = CausalLM(**env.policy_inputs(), config={**TINY, "vocab_size": words + 40}, seed=1)
    out = policy.generate(
        [[5, 6]], max_new_tokens=8, samples_per_prompt=50, stop_ids=[], generator=stream(), sampling=Sampling(2.0)
    )
    assert int(out.tokens.max()) < words


@pytest.mark.parametrize("bad", [{"min_p": 1.0}, {"min_p": -0.1}, {"repetition_penalty": 0.0}])
def test_values_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        policy_of(**bad)
