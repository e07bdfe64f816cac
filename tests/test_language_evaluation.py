"""Evaluation of language models: accuracy apart from reward, every problem as often, in batches that fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from unified_rl.envs.language import ChainMod
from unified_rl.envs.language.verdict import Verdict
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.rollout import LanguageRollout
from unified_rl.training import evaluation
from unified_rl.training.evaluation import evaluate_language

TINY = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


class Shaped(ChainMod):
    """Every answer earns -0.25; those with a digit are called correct."""

    info_names = ("words",)

    def __init__(self) -> None:
        super().__init__()
        self.truncated_reward = None

    def _judge(self, problem: dict[str, Any], text: str, turn: int) -> Verdict:
        return Verdict(-0.25, correct=any(map(str.isdigit, text)), info={"words": 3.0})


class Counted(CausalLM):
    """Notes how many conversations each call samples, and what."""

    def generate(self, prompts: Any, **options: Any) -> Any:
        out = super().generate(prompts, **options)
        self.calls.append(len(out.tokens))
        self.tokens.append(out.tokens)
        return out


def policy_of(env: Any) -> Counted:
    policy = Counted(**env.policy_inputs(), config=TINY, seed=1)
    policy.calls, policy.tokens = [], []
    return policy


def test_accuracy_is_the_share_of_correct_answers_and_not_their_reward() -> None:
    env = Shaped()
    policy = policy_of(env)
    got = evaluate_language(env, policy, 40, seed=0)
    truth = [any(map(str.isdigit, env.codec.decode(row.tolist()))) for row in policy.tokens[0]]
    assert got["eval/accuracy"] == pytest.approx(sum(truth) / 40) and 0 < sum(truth) < 40
    assert got["eval/score"] == got["eval/reward"] == got["eval/reward_greedy"] == -0.25
    assert (got["eval/words"] == 3.0 and got["eval/accuracy_greedy"] in (0.0, 1.0)) or got["eval/accuracy_greedy"] > 0


def test_a_task_that_does_not_say_what_is_correct_has_no_accuracy() -> None:
    class Silent(Shaped):
        def respond(self, problems: Any, turns: Any, finished: Any) -> Any:
            return super().respond(problems, turns, finished)._replace(info={})

    env = Silent()
    got = evaluate_language(env, policy_of(env), 4, seed=0)
    assert "eval/accuracy" not in got and got["eval/score"] == -0.25


def test_evaluation_is_sampled_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    env = Shaped()
    policy = policy_of(env)
    parts = evaluate_language(env, policy, 10, seed=0, at_once=4)
    assert policy.calls == [4, 4, 2] * 2
    whole = evaluate_language(env, policy, 10, seed=0)
    assert policy.calls[6:] == [10, 10] and parts["eval/accuracy_greedy"] == whole["eval/accuracy_greedy"]
    monkeypatch.setattr(evaluation, "AT_ONCE", 3)
    evaluate_language(env, policy, 4, seed=0)
    assert policy.calls[8:] == [3, 1] * 2


def test_a_collection_is_sampled_in_whole_groups() -> None:
    env = Shaped()
    policy = policy_of(env)
    streams = (torch.Generator().manual_seed(0), torch.Generator().manual_seed(1))
    rollout = LanguageRollout(env, policy, 1.0, *streams, prompts=5, group_size=2, generation_batch=5)
    rows, metrics = rollout.collect(0)
    assert policy.calls == [4, 4, 2] and len(rows) == 10 and metrics["rollout/words"] == 3.0
    assert torch.equal(rows["group"], torch.arange(5).repeat_interleave(2))
    with torch.no_grad():
        gap = (policy.log_prob(rows).log_prob - rows["behavior_log_prob"]).abs().max()
    assert float(gap) < 1e-4 and rows["reward"].shape == (10, 1)
