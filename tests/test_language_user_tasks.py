"""A task of the user's own whose judgement raises, hangs or returns nonsense: one error that names task and row."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest
import torch

from unified_rl.envs.language import ChainMod
from unified_rl.envs.language.verdict import Verdict
from unified_rl.errors import RolloutError, UnifiedRLError
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.rollout import LanguageRollout

TINY = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


class Judged(ChainMod):
    """Answers every third turn with ``answer``."""

    info_names = ("words",)
    answer: Any = None

    def _judge(self, problem: dict[str, Any], text: str, turn: int) -> Verdict:
        self.seen = getattr(self, "seen", 0) + 1
        if self.seen % 3:
            return Verdict(1.0, correct=True)
        return self.answer() if callable(self.answer) else self.answer


def respond(answer: Any, count: int = 4) -> Any:
    env = Judged()
    env.answer, env.max_turns = answer, 2
    problems = env.problems(count, torch.Generator().manual_seed(0))
    return env.respond(problems, [[[5, 6]]] * count, torch.ones(count, dtype=torch.bool))


def fail() -> Verdict:
    raise KeyError("answer")


def fail_at_length() -> Verdict:
    raise ValueError("first\n  second" + "!" * 1000)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (fail, "raised KeyError: 'answer'"),
        (fail_at_length, "raised ValueError: first second!!"),
        (None, "returned None (NoneType)"),
        ("1", "returned '1' (str)"),
        (1.0, "returned 1.0 (float)"),
        ((1.0, True), "returned (1.0, True) (tuple)"),
        (Verdict(float("nan")), "returned reward=nan"),
        (Verdict(float("inf")), "returned reward=inf"),
        (Verdict(None), "returned reward=None (NoneType)"),  # type: ignore[arg-type]
        (Verdict("1"), "returned reward='1' (str)"),  # type: ignore[arg-type]
        (Verdict(torch.zeros(2)), "returned reward=tensor([0., 0.]) (Tensor)"),  # type: ignore[arg-type]
        (Verdict([1.0]), "returned reward=[1.0] (list)"),  # type: ignore[arg-type]
        (Verdict(1.0, done=None), "returned done=None (NoneType)"),  # type: ignore[arg-type]
        (Verdict(1.0, reply=3), "returned reply=3 (int)"),  # type: ignore[arg-type]
        (Verdict(1.0, info={"words": None}), "returned info['words']=None (NoneType)"),  # type: ignore[dict-item]
        (Verdict(1.0, info={"words": "3"}), "returned info['words']='3' (str)"),  # type: ignore[dict-item]
        (Verdict(1.0, info="words"), "returned info='words' (str)"),  # type: ignore[arg-type]
        (lambda: sys.exit(4), "raised SystemExit: 4"),
        (Verdict(0.0, done=False, reply="12345"), "replies 5 tokens, more than its max_reply_length=0"),
    ],
)
def test_nonsense_names_the_task_and_the_row(answer: Any, message: str) -> None:
    with pytest.raises(RolloutError) as caught:
        respond(answer)
    text = str(caught.value)
    assert text.startswith("Judged's judgement of row 2 (prompt ") and message in text and "\n" not in text


def test_numbers_of_any_kind_are_rewards() -> None:
    for reward in (torch.tensor(0.5), torch.tensor([0.5]), True, 1):
        assert respond(Verdict(reward)).reward.tolist()[2] == float(reward)


def test_a_judgement_that_hangs_is_given_up() -> None:
    env = Judged()
    env.answer, env.judge_seconds = (lambda: time.sleep(5)), 0.2
    problems = env.problems(4, torch.Generator().manual_seed(0))
    began = time.monotonic()
    with pytest.raises(RolloutError, match=r"Judged's judgement of row 2 .* has not returned after 0\.2 s"):
        env.respond(problems, [[[5, 6]]] * 4, torch.ones(4, dtype=torch.bool))
    assert time.monotonic() - began < 2


def test_a_truncated_turn_is_judged_where_the_task_wants_it() -> None:
    env = Judged()
    env.answer, env.truncated_reward = Verdict(0.25), None
    problems = env.problems(3, torch.Generator().manual_seed(0))
    result = env.respond(problems, [[[5, 6]]] * 3, torch.zeros(3, dtype=torch.bool))
    assert result.reward.tolist() == [1.0, 1.0, 0.25] and not result.done.any()
    assert result.info["truncated"].tolist() == [1.0] * 3


class Protocol(ChainMod):
    """A task that answers the protocol itself, with ``change`` of a right answer."""

    change: Any = None

    def respond(self, problems: Any, turns: Any, finished: Any) -> Any:
        return self.change(super().respond(problems, turns, finished))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: None, "returned None, not a TurnResult"),
        (lambda r: r._replace(reward=r.reward[:1]), r"reward has shape \[1\], expected \[4\]"),
        (lambda r: r._replace(reward=r.reward[:, None]), r"reward has shape \[4, 1\], expected \[4\]"),
        (lambda r: r._replace(reward=r.reward.tolist()), "reward is list, expected a tensor"),
        (lambda r: r._replace(done=r.done.float()), "done is float32, expected bool"),
        (lambda r: r._replace(reply=[]), "reply has 0 entries, expected 4"),
        (lambda r: r._replace(reply=["x"] * 4), "reply 0 is str, expected a list of token ids"),
        (lambda r: r._replace(reward=torch.tensor([0.0, 1.0, float("nan"), 0.0])), "reward nan in conversation 2"),
        (lambda r: r._replace(info={"correct": torch.zeros(2)}), r"info\['correct'\] has shape \[2\], expected \[4\]"),
        (lambda r: 1 / 0, "raised ZeroDivisionError: division by zero"),
    ],
)
def test_a_task_of_another_shape_gets_one_line(change: Any, message: str) -> None:
    env = Protocol()
    env.change = change
    policy = CausalLM(**env.policy_inputs(), config=TINY, seed=1)
    streams = (torch.Generator().manual_seed(0), torch.Generator().manual_seed(1))
    with pytest.raises(UnifiedRLError, match=message) as caught:
        LanguageRollout(env, policy, 1.0, *streams, prompts=2, group_size=2).collect(0)
    assert "Protocol.respond" in str(caught.value) and "\n" not in str(caught.value)
