"""Learned baselines: token-level traces by hand, and a language model that trains with a critic."""

from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from unified_rl.agents.baselines import TokenBaseline, critic_advantage, last_units
from unified_rl.config import compose
from unified_rl.training.run import Job


class Fixed:
    """A token baseline whose values are given."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self.module = nn.Identity()
        self.module.values = lambda record: self.value  # type: ignore[assignment]

    shard = TokenBaseline.shard
    values = TokenBaseline.values
    scan_inputs = TokenBaseline.scan_inputs


def record(terminated: bool) -> TensorDict:
    # prompt, two tokens of turn 0, one token of tool text, one token of turn 1, padding
    return TensorDict(
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


def test_last_units_find_the_end_of_every_turn() -> None:
    assert last_units(record(True)).tolist() == [[2, 4]]


def test_token_gae_is_the_hand_computed_trace_across_tool_text() -> None:
    value = torch.tensor([[9.0, 0.1, 0.2, 7.0, 0.3, float("nan")]])
    rows = record(terminated=True)
    critic_advantage(rows, Fixed(value), lam=0.5, off_policy=False, normalize=False)
    last = 1.0 - 0.3
    middle = (0.5 + 0.9 * 0.3 - 0.2) + 0.9 * 0.5 * last  # a turn ends: discounted, the next token follows the tool
    first = (0.2 - 0.1) + 0.5 * middle  # inside a turn the discount is 1
    torch.testing.assert_close(rows["advantage"], torch.tensor([[0.0, first, middle, 0.0, last, 0.0]]))
    torch.testing.assert_close(rows["value_target"][0, 4], torch.tensor(1.0))


def test_an_answer_cut_by_its_budget_bootstraps_from_its_last_value() -> None:
    value = torch.tensor([[9.0, 0.1, 0.2, 7.0, 0.3, 0.0]])
    rows = record(terminated=False)
    critic_advantage(rows, Fixed(value), lam=0.5, off_policy=False, normalize=False)
    torch.testing.assert_close(rows["advantage"][0, 4], torch.tensor(1.0 + 0.9 * 0.3 - 0.3))


@pytest.mark.parametrize(
    "critic", ["null", "{model_type: llama, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2}"]
)
def test_a_language_model_trains_with_a_token_critic(critic: str, tmp_path: Path) -> None:
    overrides = ["env=chain_mod", "policy=causal_lm_tiny", "correction=ppo", "agent.advantage=critic", "progress=false"]
    overrides += ["rollout.prompts=4", "rollout.group_size=2", "steps=16"]
    trainer = Job(compose([*overrides, f"agent.critic_config={critic}"])).make_trainer(tmp_path)
    rows, _ = trainer.rollout.collect(0)
    rows["reward"] = torch.arange(8.0)[:, None]
    trainer.replay.extend(rows)
    policy, head = trainer.agent.policy, trainer.agent.baseline.module.head
    before = [p.detach().clone() for p in policy.parameters()]
    metrics = trainer.agent.update(trainer.replay)
    assert bool(head.weight.abs().sum() > 0) and float(metrics["loss/value"]) > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
