"""Advantages of whole turns and of cut answers: hand numbers, limiting cases, and the agent's choice of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agent_cases import control_agent, filled, gaussian, language, language_agent, stream
from tensordict import TensorDict
from torch import Tensor, nn

from unified_rl.agents.baselines import (
    TokenBaseline,
    critic_advantage,
    cut_advantage,
    step_advantage,
)
from unified_rl.agents.policy_gradient import PolicyGradient
from unified_rl.correction import load_correction
from unified_rl.correction.requirements import needs_whole_rows
from unified_rl.errors import ConfigError
from unified_rl.objectives import value_loss


class Fixed(TokenBaseline):
    """A token baseline whose values are given."""

    def __init__(self, value: Tensor) -> None:
        self.module: Any = nn.Identity()
        self.module.values = lambda record: value


def record(terminated: bool = True, width: int = 1) -> TensorDict:
    # prompt, two tokens of turn 0, one token of tool text, one token of turn 1, padding
    made = TensorDict(
        {
            "mask": torch.tensor([[False, True, True, False, True, False]]),
            "step_index": torch.tensor([[0, 0, 0, 1, 1, 1]]),
            "reward": torch.tensor([[0.5, 1.0]]),
            "discount": torch.tensor([[0.9, 0.9]]),
            "terminated": torch.tensor([[False, terminated]]),
            "behavior_log_prob": torch.zeros(1, 6),
        },
        batch_size=[1],
    )
    return made.expand(width).clone() if width > 1 else made


VALUE = torch.tensor([[9.0, 0.1, 0.2, 7.0, 0.3, float("nan")]])


def test_turns_are_the_steps_of_the_scan() -> None:
    """A turn's value is that of the context it begins in; every token of the turn gets the turn's advantage."""
    rows = record()
    step_advantage(rows, Fixed(VALUE), lam=0.5, off_policy=False, normalize=False)
    last = 1.0 - 0.3
    first = 0.5 + 0.9 * 0.3 - 0.1 + 0.9 * 0.5 * last
    torch.testing.assert_close(rows["advantage"], torch.tensor([[first, last]]))
    assert rows["value_mask"].tolist() == [[False, True, False, False, True, False]]
    torch.testing.assert_close(rows["value_target"][rows["value_mask"]], torch.tensor([first + 0.1, last + 0.3]))


def test_one_turn_without_discount_is_return_minus_value() -> None:
    rows = record()
    rows["step_index"][:] = 0
    rows["reward"], rows["discount"] = torch.tensor([[2.0, 0.0]]), torch.ones(1, 2)
    rows["terminated"] = torch.tensor([[True, False]])
    step_advantage(rows, Fixed(VALUE), lam=1.0, off_policy=False, normalize=False)
    torch.testing.assert_close(rows["advantage"][:, :1], torch.tensor([[2.0 - 0.1]]))
    assert rows["value_mask"].tolist() == [[False, True, False, False, False, False]]


def test_turns_of_one_token_are_tokens() -> None:
    by_turn, by_token = record(), record()
    for rows in (by_turn, by_token):
        rows["mask"][0, 2] = False
    step_advantage(by_turn, Fixed(VALUE), lam=0.7, off_policy=False, normalize=False)
    critic_advantage(by_token, Fixed(VALUE), lam=0.7, off_policy=False, normalize=False)
    torch.testing.assert_close(by_turn["advantage"], by_token["advantage"][:, [1, 4]])


def test_standardising_counts_every_turn_once() -> None:
    rows = record(width=3)
    rows["reward"] = torch.tensor([[0.0, 1.0], [0.3, 0.0], [1.0, -1.0]])
    value = VALUE.expand(3, 6)
    plain = rows.clone()
    step_advantage(plain, Fixed(value), lam=0.5, off_policy=False, normalize=False)
    step_advantage(rows, Fixed(value), lam=0.5, off_policy=False, normalize=True)
    a = plain["advantage"]
    torch.testing.assert_close(rows["advantage"], (a - a.mean()) / (a.std() + 1e-8))


def test_an_answer_that_stopped_after_its_first_turn_ends_there() -> None:
    rows = record()
    rows["mask"][0, 4] = False
    rows["terminated"] = torch.tensor([[True, False]])
    step_advantage(rows, Fixed(VALUE), lam=0.5, off_policy=False, normalize=False)
    torch.testing.assert_close(rows["advantage"], torch.tensor([[0.5 - 0.1, 0.0]]))


def test_cut_answers_train_the_policy_and_not_the_value() -> None:
    for terminated in (True, False):
        cut, plain = record(terminated), record(terminated)
        cut_advantage(cut, Fixed(VALUE), lam=0.5, off_policy=False, normalize=False)
        critic_advantage(plain, Fixed(VALUE), lam=0.5, off_policy=False, normalize=False)
        torch.testing.assert_close(cut["advantage"], plain["advantage"])  # a finished answer: plain GAE
        assert torch.equal(cut["value_mask"], plain["value_mask"] & terminated)
        value = VALUE.nan_to_num().requires_grad_()
        loss = value_loss(value, cut["value_target"], cut["value_mask"], cut["value"])
        assert bool(loss > 0) == terminated
    last_error = 1.0 + (0.9 - 1.0) * 0.3  # the value before the cut stands for the one after it
    torch.testing.assert_close(cut["advantage"][0, 4], torch.tensor(last_error))


def test_presets_choose_their_credit_and_the_agent_may_choose_another() -> None:
    policy, rows = language()
    assert language_agent(policy, rows, "steppo").credit == "step"
    assert language_agent(policy, rows, "t_ppo").credit == "cut"
    by_turn = language_agent(policy, rows, "turn_ppo", credit="step")
    assert by_turn.use_critic and by_turn.credit == "step"
    assert not language_agent(policy, rows, "turn_ppo").use_critic
    assert control_agent(gaussian(), "steppo").credit == "step"


@pytest.mark.parametrize(
    ("correction", "options", "words"),
    [
        ("steppo", {"advantage": "group"}, r"from a critic(.|\n)*agent\.advantage=critic"),
        ("ppo", {"credit": "turn"}, "unit, step, cut"),
        ("ppo", {"credit": "step", "advantage": "group"}, "from a critic"),
    ],
)
def test_credit_without_a_critic_is_refused(correction: str, options: dict[str, Any], words: str) -> None:
    policy, rows = language()
    with pytest.raises(ConfigError, match=words):
        language_agent(policy, rows, correction, **options)


def test_in_control_no_answer_is_cut() -> None:
    with pytest.raises(ConfigError, match=r"t_ppo is about answers(.|\n)*correction=ppo"):
        control_agent(gaussian(), "t_ppo")


def test_groups_of_one_row_are_refused_where_advantages_are_relative_to_the_group() -> None:
    policy, rows = language()
    rows["group"] = torch.arange(len(rows))
    for correction, words in (("grpo", r"agent\.advantage=critic"), ("gvpo", "correction=dro")):
        with pytest.raises(ConfigError, match=rf"alone in its own(.|\n)*{words}"):
            language_agent(policy, rows, correction).update(filled(rows, 1))
    kept = load_correction("grpo", advantage={"baseline": "mean", "singleton": None})
    agent = PolicyGradient(policy, kept, stream(), rows=len(rows))
    assert float(agent.update(filled(rows, 1))["train/zero_advantage"]) < 1.0
    policy, _ = language()
    assert language_agent(policy, rows, "ppo", advantage="critic").update(filled(rows, 1))


@pytest.mark.parametrize(
    ("correction", "overrides", "whole"),
    [
        ("ppo", {}, False),
        ("tis", {}, False),
        ("icepop", {}, False),
        ("turn_ppo", {}, False),
        ("k3_unit_reject", {}, False),
        ("sequence_tis", {}, True),
        ("geo_reject", {}, True),
        ("k3_reject", {}, True),
        ("veto", {}, True),
        ("opsm", {}, True),
        ("red_drop", {}, True),
        ("gvpo", {}, True),
        ("nat_uniform", {}, False),
        ("geo_reject", {"reject.0.level": "unit"}, False),
    ],
)
def test_rows_are_cut_into_steps_only_where_no_rule_looks_at_whole_rows(
    correction: str, overrides: dict[str, Any], whole: bool
) -> None:
    assert needs_whole_rows(load_correction(correction, **overrides)) == whole
    if not overrides:
        assert control_agent(gaussian(), correction).shuffle_steps != whole
