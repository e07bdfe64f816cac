"""The policy on disturbed inputs: the written-out gradient, what a view changes, and its limit."""

from __future__ import annotations

import copy

import torch
from agent_cases import LANES, close, control_agent, filled, gaussian, gradients, nudge, transitions
from term_cases import agent_of, both_splits, dense, joined, want

from unified_rl.objectives.other_views import OtherViewsTerm
from unified_rl.units import split_episodes

TERM = {"name": "other_views", "views": 2, "strength": 0.3, "gradient": 0.5, "coefficient": 0.7}


def test_the_worst_view_holds_right_rows_and_one_view_learns_from_all() -> None:
    policy, rows = joined()
    nudge(policy, 0.02)
    options = {"objectives": {"policy": None, "views": TERM}}
    got = both_splits(policy, rows, **options)
    agent = agent_of(policy, rows, **options)
    drawn = agent.estimate(agent._draw(filled(rows, 1)), 0, {})
    term = agent.objective.terms["views"]
    assert isinstance(term, OtherViewsTerm)
    views = [term._disturbed(drawn, drawn, number) for number in (0, 1)]
    context = drawn["token_mask"] & ~drawn["mask"]
    for view in views:
        differs = view["tokens"] != drawn["tokens"]
        assert bool(differs.any()) and not bool((differs & ~context).any())
    assert not torch.equal(views[0]["tokens"], views[1]["tokens"])
    agent.objective.start(0.0, 3)  # other views in another update, and these again in this one
    assert not any(
        torch.equal(term._disturbed(drawn, drawn, number)["tokens"], views[0]["tokens"]) for number in (0, 1)
    )
    agent.objective.start(0.0, 0)
    assert torch.equal(term._disturbed(drawn, drawn, 1)["tokens"], views[1]["tokens"])
    _, lp = dense(policy, drawn)
    seen = [dense(policy, view)[1] for view in views]
    mask, right = drawn["mask"], (drawn["reward"].sum(-1) > 0.5)[:, None]
    k3 = [torch.where(mask, (one - lp.detach()).exp() - 1 - (one - lp.detach()), 0.0) for one in seen]
    each = right * torch.maximum(*k3) - 0.5 * torch.where(mask, drawn["advantage"] * seen[0], 0.0)
    close(got, want(agent, 0.7 * (each.sum(-1) / mask.sum(-1)).mean()))


def test_undisturbed_views_are_the_policy_gradient_itself_in_control_too() -> None:
    policy = gaussian()
    rows = transitions(policy)
    node = {**TERM, "strength": 0.0, "gradient": 1.0, "coefficient": 1.0, "reduce": "token-mean"}
    found = []
    for objectives in ({"policy": None, "views": node}, {}):
        agent = control_agent(copy.deepcopy(policy), "reinforce", objectives=objectives, shuffle_steps=False)
        found.append(gradients(agent, filled(rows, LANES)))
    close(*found)


def test_noise_is_of_the_size_that_was_asked_for_and_the_same_for_a_row_wherever_it_stands() -> None:
    policy = gaussian()
    agent = control_agent(policy, "reinforce", objectives={"views": TERM})
    drawn = agent._draw(filled(transitions(policy), LANES))
    assert len(drawn) == len(split_episodes(filled(transitions(policy), LANES).sample(LANES, length=8)))
    term = agent.objective.terms["views"]
    assert isinstance(term, OtherViewsTerm)
    stats = term.prepare(drawn, None)  # type: ignore[arg-type]
    moved = term._disturbed(drawn, stats, 0)["observation"] - drawn["observation"]
    real = drawn["observation"][drawn["step_mask"]].std(0, correction=0)
    size = (moved / real).std()
    assert 0.2 < float(size) < 0.4
    back = torch.arange(len(drawn)).flip(0)
    again = term._disturbed(drawn[back], stats[back], 0)["observation"] - drawn["observation"][back]
    torch.testing.assert_close(again, moved[back])
