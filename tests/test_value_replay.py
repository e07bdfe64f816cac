"""Priorities, n-step windows and mixtures reach the agents that can use them; the others refuse them by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from value_cases import BOUNDS, filled, make, transitions, weights

from unified_rl.agents.behavior_cloning import BehaviorCloning
from unified_rl.config import compose
from unified_rl.errors import ConfigError
from unified_rl.policies.gaussian import GaussianPolicy
from unified_rl.replay import (
    Buckets,
    Fresh,
    Mixture,
    Priority,
    Replay,
    Segment,
    Softmax,
    Uniform,
    WithDataset,
    nstep_transitions,
)  # fmt: skip
from unified_rl.training.run import Job
from unified_rl.units import Source

# ---------------------------------------------------------------------------------------------- priorities


def test_priorities_are_the_mean_size_of_the_members_td_errors() -> None:
    agent = make(rows=1, batch_size=32)
    replay = filled(sampler=Priority(alpha=1.0, eps=0.0))
    told: dict[int, float] = {}
    keep = replay.update_priority
    replay.update_priority = lambda i, p: (told.update(zip(i.tolist(), p.tolist(), strict=True)), keep(i, p))[1]  # type: ignore[method-assign]
    start, noise = filled(sampler=Priority(alpha=1.0, eps=0.0)), torch.Generator().manual_seed(0)
    drawn = torch.randn(2, 32, 2, generator=noise)
    index = start.sample(32)["index"]
    rows = transitions()[index]
    with torch.no_grad():  # before the step, by hand
        action, log_prob = agent.policy.rsample(rows["next_observation"], noise=drawn[0])
        q = agent.nets.target(rows["next_observation"], action).amin(0) - log_prob
        target = rows["reward"] + 0.9 * (~rows["terminated"]).float() * q
        error = (agent.nets.critic(rows["observation"], rows["action"]) - target).abs().mean(0)
    agent.update(replay)
    torch.testing.assert_close(torch.tensor([told[i] for i in index.tolist()]), error)
    stored = replay.sampler.columns["weight"][index.numpy()]  # type: ignore[attr-defined]
    np.testing.assert_allclose(stored, error.numpy(), rtol=1e-5)


def test_importance_weights_change_the_step_and_uniform_priorities_do_not() -> None:
    after = []
    for sampler in (Priority(alpha=0.0, beta=1.0), Priority(alpha=1.0, beta=1.0), Priority(alpha=1.0, beta=0.0)):
        agent, replay = make(), filled(sampler=sampler, seed=3)
        replay.update_priority(torch.arange(32), torch.linspace(0.5, 2.0, 32))
        agent.update(replay)
        after.append(weights(agent.nets.critic))
    assert not torch.equal(after[1], after[2]) and not torch.equal(after[0], after[1])


def test_softmax_scores_are_renewed_only_where_asked() -> None:
    for renew in (False, True):
        agent, replay = make(), filled(sampler=Softmax(renew=renew))
        before = replay.sampler.columns["score"].copy()  # type: ignore[attr-defined]
        agent.update(replay)
        assert (before[:32] != replay.sampler.columns["score"][:32]).any() == renew  # type: ignore[attr-defined]


@pytest.mark.parametrize("sampler", [Priority(alpha=1.0, beta=1.0, eps=0.0), Softmax("x")])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_late_priority_does_not_reach_the_row_that_took_the_place(sampler: Any, mixed: bool) -> None:
    parts = {"all": Uniform(), "some": sampler}
    used = Mixture({"all": 1.0, "some": 0.0}, parts) if mixed else sampler  # another part draws, this one is told
    replay = Replay(4, sampler=used, seed=0)
    replay.extend(TensorDict({"x": torch.arange(4.0)}, [4]))
    late = replay.sample(4)["index"]
    replay.extend(TensorDict({"x": torch.arange(4.0)}, [4]))
    column = "weight" if isinstance(sampler, Priority) else "score"
    before = sampler.columns[column].copy()
    replay.update_priority(late, torch.full((4,), 7.0))
    assert (sampler.columns[column] == before).all()
    again = replay.sample(4)["index"]
    replay.update_priority(again, torch.full((4,), 7.0))
    assert (sampler.columns[column][again.numpy()] == 7.0).all()


# ---------------------------------------------------------------------------------------------- n steps


def walk(slots: int = 12, length: int = 5, **more: Any) -> TensorDict:
    """``[slots, 2]`` steps in time order; lane 0 terminates every ``length`` steps, lane 1 is truncated."""
    t = torch.arange(slots)[:, None].expand(slots, 2)
    at, lane = t % length, torch.arange(2).expand(slots, 2)
    end = at == length - 1
    observation = torch.stack([at, t // length, lane], -1).float()
    return TensorDict(
        {
            "observation": observation,
            "action": torch.zeros(slots, 2, 2),
            "reward": 10.0 ** (at % 3).float(),
            "discount": torch.full((slots, 2), 0.5),
            "terminated": end & (lane == 0),
            "truncated": end & (lane == 1),
            "next_observation": torch.stack([at + 1, t // length, lane], -1).float(),
            **more,
        },
        [slots, 2],
    )


@pytest.mark.parametrize("cut", [True, False])
def test_n_step_rows_stop_at_the_end_of_an_episode_and_bootstrap_unless_it_terminated(cut: bool) -> None:
    replay = Replay(24, lanes=2, sampler=Uniform(), cut=cut)
    replay.extend(walk())
    agent = make(n_step=3, batch_size=64, learning_starts=1)
    rows = agent._draw(replay)
    at, lane = rows["observation"][:, 0], rows["observation"][:, 2]
    steps = torch.minimum(torch.tensor(3.0), 5 - at)
    assert torch.equal(rows["steps"].float(), steps) and set(steps.tolist()) == {1.0, 2.0, 3.0}
    for i in range(64):
        want = sum(0.5**k * 10.0 ** (int(at[i] + k) % 3) for k in range(int(steps[i])))
        assert float(rows["reward"][i]) == pytest.approx(want)
    assert torch.equal(rows["next_observation"][:, 0], at + steps)
    torch.testing.assert_close(rows["discount"], 0.5**steps)
    ends = at + steps == 5
    assert torch.equal(rows["terminated"], ends & (lane == 0)) and torch.equal(rows["truncated"], ends & (lane == 1))


def test_n_step_changes_the_weights_and_one_step_is_the_plain_agent() -> None:
    after = []
    for options in ({}, {"n_step": 1}, {"n_step": 3}):
        replay = Replay(24, lanes=2, sampler=Uniform(), cut=False)
        replay.extend(walk())
        agent = make(**options)
        agent.update(replay)
        after.append(weights(agent.nets.critic))
    assert torch.equal(after[0], after[1]) and not torch.equal(after[0], after[2])


def test_n_steps_with_priorities_of_the_first_row() -> None:
    replay = Replay(24, lanes=2, sampler=Priority(), cut=False)
    replay.extend(walk())
    make(n_step=3).update(replay)
    weight = replay.sampler.columns["weight"]  # type: ignore[attr-defined]
    assert len(np.unique(weight[:20])) > 2 and len(np.unique(weight[20:])) == 1  # no window starts at the last slots


def test_rows_out_of_order_are_refused_for_n_steps() -> None:
    rows = walk()[torch.randperm(12, generator=torch.Generator().manual_seed(0))]
    replay = Replay(24, lanes=2, sampler=Uniform(), cut=False)
    replay.extend(rows)
    with pytest.raises(ConfigError, match=r"agent\.n_step needs rows in the order of time"):
        make(n_step=3).update(replay)


def test_rows_without_the_flag_that_ends_windows_are_refused_for_n_steps() -> None:
    with pytest.raises(ConfigError, match="learns from truncated"):
        make(n_step=2).update(filled())


def test_nstep_transitions_of_an_uncut_window_are_those_of_a_cut_one() -> None:
    windows = []
    for cut in (True, False):
        replay = Replay(24, lanes=2, sampler=Uniform(), cut=cut, seed=2)
        replay.extend(walk())
        windows.append(nstep_transitions(replay.sample(32, length=4), 4).exclude("index"))
    assert bool((windows[0] == windows[1]).all())


# ---------------------------------------------------------------------------------------------- who can use what


def clone(rows: int = 16) -> BehaviorCloning:
    return BehaviorCloning(GaussianPolicy(**BOUNDS, hidden=(8,)), torch.Generator().manual_seed(0), rows=rows)


@pytest.mark.parametrize(
    ("agent", "sampler", "message"),
    [
        (clone(), Priority(), "replay=priority .*agent=behavior_cloning.*use replay=uniform"),
        (clone(), Softmax(renew=True), "agent=behavior_cloning"),
        (clone(), Segment(4), "replay=segment draws windows of 4 steps.*use replay=uniform"),
        (make(), Segment(4), r"replay=segment.*replay=uniform with agent\.n_step"),
        (make(), Fresh(), "replay=fresh hands every row out once.*replay=uniform"),
    ],
)
def test_an_agent_refuses_a_sampler_that_it_cannot_use(agent: Any, sampler: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        agent.update(filled(sampler=sampler))


def test_windows_of_n_steps_may_come_from_the_segment_sampler() -> None:
    after = []
    for sampler in (Segment(3), Uniform()):
        replay = Replay(24, lanes=2, sampler=sampler, cut=False)
        replay.extend(walk())
        agent = make(n_step=3)
        agent.update(replay)
        after.append(weights(agent.nets.critic))
    assert torch.equal(*after)


def test_a_data_set_beside_the_replay_has_no_windows_and_no_priorities(tmp_path: Path) -> None:
    filled().dumps(tmp_path / "rows")
    rows = transitions()
    rows["truncated"] = torch.zeros_like(rows["terminated"])
    for options, sampler in (({"n_step": 2}, Uniform()), ({}, Priority())):
        replay = WithDataset(64, data=str(tmp_path / "rows"), sampler=sampler)
        replay.extend(rows)
        with pytest.raises(ConfigError, match=r"replay\.data adds single rows"):
            make(**options).update(replay)


def test_buckets_decide_which_rows_a_value_based_agent_learns_from() -> None:
    agent, seen = make(rows=1), []
    step = agent.gradient_step
    agent.gradient_step = lambda batch, *rest: (seen.append(batch["reward"]), step(batch, *rest))[1]  # type: ignore[method-assign]
    agent.update(filled(sampler=Buckets("reward", [0.0], [0.0, 1.0])))
    assert bool((seen[0] >= 0).all()) and bool((transitions()["reward"] < 0).any())


def sourced(*sources: Source) -> TensorDict:
    rows = transitions()
    rows["source"] = torch.tensor([int(source) for source in sources] * (32 // len(sources)))
    return rows


def test_a_mixture_needs_rows_of_its_sources() -> None:
    quotas = {"online": 0.5, "demonstration": 0.5}
    with pytest.raises(ConfigError, match="source 'demonstration', and this run's rollout writes none"):
        make().update(filled(sourced(Source.ONLINE), Mixture(quotas)))
    agent = make(rows=1)
    agent.update(filled(sourced(Source.ONLINE, Source.DEMONSTRATION), Mixture(quotas)))
    assert agent.gradient_steps == 1
    shared = make(rows=1)
    shared.update(filled(sourced(Source.ONLINE), Mixture(quotas, share_missing=True)))
    assert shared.gradient_steps == 1


REFUSED = {
    "priority": (["env=chain_mod", "policy=causal_lm_tiny", "replay=priority"], "replay=priority.*policy_gradient"),
    "mixture": (["env=chain_mod", "policy=causal_lm_tiny", "replay=mixture"], "writes none"),
    "windows": (["env=chain_mod", "policy=causal_lm_tiny", "replay=segment"], "replay=segment"),
    "control": (["env=inverted_pendulum", "agent=ppo", "replay=priority"], "replay=priority.*agent=ppo"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_run_is_refused_before_its_first_step(name: str, tmp_path: Path) -> None:
    overrides, message = REFUSED[name]
    job = Job(compose([*overrides, "steps=16"]))
    before = weights(job.policy)
    with pytest.raises(ConfigError, match=message):
        job.make_trainer(tmp_path).update()
    assert torch.equal(before, weights(job.policy))


def test_a_sampler_that_does_not_fit_is_refused_before_rows_are_collected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="replay=priority"):
        Job(compose([*REFUSED["control"][0], "steps=16"])).make_trainer(tmp_path)
