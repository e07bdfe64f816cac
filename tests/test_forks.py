"""Forks: where answers go on from one another, what rows hold of it, and what each part is worth."""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest
import torch
from run_cases import EasyChain
from tensordict import TensorDict
from test_beginnings import answer, width_of
from test_sources import rollout

from unified_rl.envs.language import GuessNumber
from unified_rl.errors import ConfigError, RecordError
from unified_rl.returns.tree import tree
from unified_rl.rollout.forks import Forks


def forest(begun: tuple[int, ...] = (0, 1, 0, 0)) -> TensorDict:
    """Two chains of which the first has a fork, and a chain of another group that says the same."""
    tokens = torch.tensor([[9, 1, 2, 3], [9, 1, 5, 0], [9, 7, 8, 6], [9, 1, 2, 3]])
    mask = torch.tensor([[False, True, True, True], [False, True, True, False], [False, True, True, True],
                         [False, True, True, True]])  # fmt: skip
    rows = {
        "tokens": tokens, "mask": mask, "begun": torch.tensor(begun), "group": torch.tensor([0, 0, 0, 1]),
        "reward": torch.zeros(4, 1), "step_index": torch.zeros(4, 4, dtype=torch.int64),
    }  # fmt: skip
    return TensorDict(rows, batch_size=[4])


def test_a_part_is_worth_the_mean_of_its_leaves_and_what_it_adds() -> None:
    leaf = torch.tensor([[1.0], [-0.5], [-0.5], [2.0]])
    found = tree(forest(), leaf)
    both = (0.25 - 0.0 + 0.25) / sqrt(2)  # the mean of 1 and -0.5; nothing is before it
    want = [[0, both, 1.75, 1.75], [0, both, -1.25, 0], [0, -1.0, -1.0, -1.0], [0, 4.0, 4.0, 4.0]]
    torch.testing.assert_close(found, torch.tensor(want))  # 1 - 0.25 + 1; -0.5 - 0.25 - 0.5
    added = tree(forest(), leaf, overall=0.0, shared=False)
    torch.testing.assert_close(added[0], torch.tensor([0, 0.25, 0.75, 0.75]))


def test_answers_that_say_the_same_by_chance_have_nothing_in_common() -> None:
    leaf = torch.tensor([[1.0], [-0.5], [-0.5], [2.0]])
    found = tree(forest((0, 0, 0, 0)), leaf, local=0.0)
    assert torch.equal(found, leaf * forest()["mask"])
    with pytest.raises(RecordError, match=r"rollout\.columns\.begun=begun"):
        tree(forest().exclude("begun"), leaf)


def test_forks_leave_their_chain_before_its_least_likely_tokens_and_learn_what_they_share() -> None:
    made = rollout(EasyChain(modulus=5, terms=3, max_turn_tokens=10), prompts=4, group_size=6,
                   context=Forks(chains=2), columns={"begun": "begun"})  # fmt: skip
    rows, metrics = made.collect(0)
    width = width_of(made)
    forked = 0
    for at in range(24):
        chain = at - at % 6 + (at % 6 - 2) % 2
        if at % 6 < 2:
            assert int(rows["begun"][at]) == 0
            continue
        said = answer(rows[chain], width)
        known = rows["behavior_log_prob"][chain, width : width + len(said)]
        place = int((known[1:10].argsort(stable=True) + 1)[(at % 6 - 2) // 2]) if len(said) > 1 else 0
        assert int(rows["begun"][at]) == place and answer(rows[at], width)[:place] == said[:place]
        assert torch.equal(rows["behavior_log_prob"][at, width : width + place], known[:place])
        forked += place > 0
    assert metrics["rollout/forked"] == forked / 24 > 0.5
    assert bool(rows["mask"][:, width].all())
    with torch.no_grad():
        again = made.policy.log_prob(rows).log_prob * rows["mask"]
    torch.testing.assert_close(again, rows["behavior_log_prob"], atol=1e-4, rtol=0.0)


def test_a_task_of_turns_does_not_fork() -> None:
    options: dict[str, Any] = {"context": Forks()}
    with pytest.raises(ConfigError, match=r"rollout\.context recites one answer"):
        rollout(GuessNumber(), **options)
