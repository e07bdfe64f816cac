"""What episodes begin with: numbers of starts, groups and success trackers over them in simulations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from agent_cases import control_agent, filled, gaussian, language, language_agent, stream
from tensordict import TensorDict
from torch import Tensor

import unified_rl as ur
from unified_rl.agents.baselines import GroupBaseline
from unified_rl.config import compose
from unified_rl.correction import load_correction
from unified_rl.envs.control import PointMazeEnv
from unified_rl.errors import ConfigError, RecordError
from unified_rl.returns import SuccessTracker, group_advantage
from unified_rl.returns.columns import success
from unified_rl.rollout import ControlRollout, StepResult
from unified_rl.rollout.starts import Starts
from unified_rl.spaces import Box, DictSpace, Image, PolicyInputs, Space
from unified_rl.training.checkpoint import checkpoints, read_checkpoint
from unified_rl.training.run import resume, train
from unified_rl.units import record_from_steps, row_return, split_episodes

LENGTHS = torch.tensor([2, 3, 5])
NODE = {"_target_": "unified_rl.rollout.starts.Starts"}


class Cups:
    """Lanes whose n-th episode is about cup ``(lane + n) % 3``; observes (cup, time, a jitter)."""

    domain, num_envs, max_steps = "control", 4, 5

    def __init__(self) -> None:
        self.time, self.number = torch.zeros(4), torch.zeros(4, dtype=torch.int64)

    def policy_inputs(self) -> dict[str, Any]:
        return {"observation_dim": 3, "action_dim": 2, "action_low": [-1.0] * 2, "action_high": [1.0] * 2}

    @property
    def cup(self) -> Tensor:
        return (torch.arange(4) + self.number) % 3

    def observe(self) -> Tensor:
        return torch.stack([self.cup.float(), self.time, 0.01 * torch.sin(3.0 * self.number + torch.arange(4))], -1)

    def reset_batch(self, seed: int | None = None) -> Tensor:
        self.time, self.number = torch.zeros(4), torch.full((4,), 0 if seed is None else seed)
        return self.observe()

    def step_batch(self, action: Tensor) -> StepResult:
        self.time = self.time + 1
        after, ended = self.observe(), self.time == LENGTHS[self.cup]
        reward = (ended & (action[:, 0] > 0)).float()
        self.time, self.number = torch.where(ended, 0.0, self.time), self.number + ended
        lane = torch.arange(4) % 2 == 0
        return StepResult(
            self.observe(), reward, ended & lane, ended & ~lane, after, torch.ones(4, dtype=torch.int64), {}
        )

    def state_dict(self) -> dict[str, Any]:
        return {"time": self.time, "number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.time, self.number = state["time"], state["number"]


def cups(policy: Any, horizon: int = 4, starts: Starts | None = None, seed: int = 1) -> ControlRollout:
    return ControlRollout(Cups(), policy, 0.9, stream(seed), horizon=horizon, starts=starts)


NUMBERS = Starts(grid=0.5).number(torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 0, 0]]))
"""Of the three cups."""


# ------------------------------------------------------------------------------------------------ numbers


def test_a_number_is_that_of_the_cell_everywhere_and_always() -> None:
    number = Starts(grid=0.5).number
    near = number(torch.tensor([[0.24, -0.0], [-0.24, 0.0], [0.26, 0.0], [0.0, 0.26]]))
    assert near[0] == near[1] and len(near.unique()) == 3 and near.dtype == torch.int64
    assert NUMBERS.tolist() == [hashed([0, 0, 0]), hashed([2, 0, 0]), hashed([4, 0, 0])]
    assert number(torch.tensor([[-1.0, 3.0]])).tolist() == [hashed([-2, 6])]
    assert hashed([0, 0, 0]) == 4092290837424300158


def hashed(cells: list[int]) -> int:
    """SplitMix64's finaliser in whole numbers, of the sum of those of the cells at their places."""

    def mixed(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    return mixed(sum(mixed((cell + mixed(at)) % 2**64) for at, cell in enumerate(cells, 1)) % 2**64) >> 1


def test_many_cells_have_many_numbers_that_are_not_negative() -> None:
    grid = torch.from_numpy(np.stack(np.meshgrid(*[np.arange(-30, 31)] * 3), -1).reshape(-1, 3)).float()
    found = Starts(grid=1.0).number(grid)
    assert len(found.unique()) == len(grid) == 61**3 and int(found.min()) >= 0
    assert abs(float((found % 2).float().mean()) - 0.5) < 0.01 and abs(found.double().mean() / 2**63 - 0.5) < 0.01
    far = Starts(grid=1e-30).number(torch.tensor([[1e30], [2e30], [-1e30]]))
    assert far[0] == far[1] != far[2]


def test_of_looks_at_some_entries_alone() -> None:
    seen = torch.tensor([[0.0, 1, 5], [0, 1, 6], [0, 2, 5]])
    one, two, three = Starts(of=[1]).number(seen).tolist()
    assert one == two != three and len(Starts().number(seen).unique()) == 3
    maze = PointMazeEnv(num_envs=8, reward="sparse")
    goal = Starts(of="goal", grid=1.0)
    goal.attach(maze)
    seen = maze.reset_batch(0)
    assert torch.equal(goal.number(seen), Starts(of=[4, 5], grid=1.0).number(seen))


def test_bytes_of_images_and_numbers_beside_them() -> None:
    pixels = torch.tensor([[0, 255], [0, 254], [0, 255]], dtype=torch.uint8)
    a, b, c = Starts().number(pixels).tolist()
    assert a == c != b

    class Seeing:
        def policy_inputs(self) -> dict[str, Any]:
            parts = (("camera", Image((8, 8))), ("place", Box((2,))))
            return PolicyInputs(Space(DictSpace(parts), Box((1,), low=-1.0, high=1.0)))

    rows = torch.zeros(4, 8 + 64, dtype=torch.uint8)
    places = torch.tensor([[0.0, 1.0], [-0.0, 1.02], [0.0, 1.2], [0.0, 1.0]])
    rows[:, :8] = places.view(torch.uint8)
    rows[3, 70] = 9
    both, camera = Starts(), Starts(of=[2 + 62])
    for starts in (both, camera):
        starts.attach(Seeing())  # type: ignore[arg-type]
    first, near, moved, lit = both.number(rows).tolist()
    assert first == near and len({first, moved, lit}) == 3
    assert len(camera.number(rows).unique()) == 2
    with pytest.raises(ConfigError, match="names entry 66 of the observation, whose entries are 0 to 65"):
        Starts(of=[66]).attach(Seeing())  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ rows


def test_steps_carry_the_start_of_their_episode_across_collections() -> None:
    plain, told = cups(gaussian(), 7), cups(gaussian(), 7, Starts(grid=0.5))
    for collection in range(3):
        rows, metrics = told.collect(0)
        without, fewer = plain.collect(0)
        assert torch.equal(rows["prompt_id"], NUMBERS[rows["observation"][..., 0].long()])
        assert torch.equal(rows["group"], rows["prompt_id"]) and not torch.equal(rows["group"], rows["episode"])
        assert metrics.pop("rollout/starts") == 3.0 and metrics == fewer
        assert torch.equal(without["group"], without["episode"]) and "prompt_id" not in without.keys()
        same = without.exclude("group")
        assert bool((rows.select(*same.keys()) == same).all()), collection


def test_the_start_goes_on_from_a_state_and_anew_after_a_restart() -> None:
    whole, again = cups(gaussian(), 4, Starts(grid=0.5)), cups(gaussian(), 4, Starts(grid=0.5), seed=2)
    whole.collect(0)  # cup 2 is in the middle of an episode
    again.load_state_dict(whole.state_dict())
    assert bool((again.collect(0)[0] == whole.collect(0)[0]).all())
    again.restart(whole.state_dict(), seed=1)
    assert torch.equal(again.collect(0)[0]["prompt_id"][0], NUMBERS[[1, 2, 0, 1]])


def test_a_record_has_one_start_a_row() -> None:
    rows, _ = cups(gaussian(), 7, Starts(grid=0.5)).collect(0)
    record = record_from_steps(split_episodes(rows.transpose(0, 1)))
    assert torch.equal(record["prompt_id"], NUMBERS[record["observation"][:, 0, 0].long()])
    assert torch.equal(record["prompt_id"], record["group"]) and record["prompt_id"].shape == record.batch_size


# ------------------------------------------------------------------------------------------------ advantages


def updates(agent: Any, collected: list[TensorDict]) -> list[TensorDict]:
    """The annotated rows of an update on each collection."""
    found: list[TensorDict] = []
    agent.watch = lambda record: found.append(record.clone())
    for rows in collected:
        agent.update(filled(rows, 4))
    return found


def collections(policy: Any, count: int, horizon: int = 8) -> list[TensorDict]:
    rollout = cups(policy, horizon, Starts(grid=0.5))
    return [rollout.collect(0)[0] for _ in range(count)]


def test_grpo_compares_rows_of_one_start() -> None:
    policy = gaussian()
    agent = control_agent(policy, "grpo", advantage="group")
    (record,) = updates(agent, collections(policy, 1))
    total, cup = row_return(record), record["observation"][:, 0, 0].long()
    want = torch.zeros(len(record))
    for one in range(3):
        own = total[cup == one]
        want[cup == one] = (own - own.mean()) / (own.std() + 1e-6) if own.std() > 0 else 0.0
    assert want.unique().numel() > 3
    torch.testing.assert_close(record["advantage"][:, 0], want, atol=1e-5, rtol=0)
    torch.testing.assert_close(want, group_advantage(total, cup, scale="std"), atol=1e-5, rtol=0)


def test_pieces_without_an_end_may_be_left_out_of_groups() -> None:
    policy = gaussian()
    correction = load_correction("grpo", advantage={"scale": "std", "rows": {"when": "whole"}})
    agent = control_agent(policy, correction, advantage="group", gates={"whole": "ended"})
    agent.check_written([0], 9, ["reward", "group"])
    (record,) = updates(agent, collections(policy, 1))
    over = ((record["terminated"] | record["truncated"]) & record["step_mask"]).any(-1)
    assert 0 < int(over.sum()) < len(record) and torch.equal(record["whole"], over)
    assert not record["advantage"][~over].any()
    want = group_advantage(row_return(record)[over], record["group"][over], scale="std")
    torch.testing.assert_close(record["advantage"][over][:, 0], want, atol=1e-5, rtol=0)
    assert want.any()


def test_a_tracker_follows_starts_and_counts_pieces_in_which_an_episode_ends() -> None:
    policy = gaussian()
    agent = control_agent(policy, "grpo", advantage="group", lr=0.0)
    agent.estimate.groups = GroupBaseline({"baseline": "tracker"})
    known: dict[int, tuple[float, float]] = {}
    for record in updates(agent, collections(policy, 2)):
        total, start = row_return(record), record["prompt_id"].tolist()
        over = ((record["terminated"] | record["truncated"]) & record["step_mask"]).any(-1)
        assert 0 < int(over.sum()) < len(record)
        rate = [s / (s + f) for s, f in (known.get(i, (0.5, 0.5)) for i in start)]
        want = torch.where(over, total - torch.tensor(rate), 0.0)
        torch.testing.assert_close(record["advantage"], want[:, None].expand_as(record["reward"]), atol=1e-5, rtol=0)
        for i, won, ended in zip(start, total.tolist(), over.tolist(), strict=True):
            if ended:  # fresh rows: nothing has drifted, so 0.96 is kept
                s, f = known.get(i, (0.5, 0.5))
                known[i] = 0.96 * s + won, 0.96 * f + 1 - won
    counts = agent.estimate.groups.tracker.counts
    assert counts.keys() == known.keys() == set(NUMBERS.tolist())
    for i, pair in known.items():
        assert counts[i] == pytest.approx(pair, abs=1e-5)


def test_a_collection_in_which_no_episode_ends_moves_nothing() -> None:
    policy = gaussian()
    rows = cups(policy, 1, Starts(grid=0.5)).collect(0)[0]
    groups = GroupBaseline({"baseline": "tracker", "scale": "whiten"})
    record = record_from_steps(rows.transpose(0, 1))
    assert not groups(record, lambda: record["behavior_log_prob"], None).any() and not groups.tracker.counts  # type: ignore[union-attr]


def test_a_tracker_counts_what_it_compares() -> None:
    policy, rows = language()
    rows["prompt_id"] = torch.arange(len(rows))
    rows["reward"][:] = 7.0  # no success rate
    rows["won"] = (torch.arange(len(rows)) % 3 == 0).float()
    agent = language_agent(policy, rows, "grpo", lr=0.0)
    agent.estimate.groups = GroupBaseline({"baseline": "tracker", "reward": "won"})
    agent.update(filled(rows, 1))
    want = SuccessTracker()
    want.update(rows["prompt_id"], rows["won"], torch.zeros(len(rows)))
    for number, pair in agent.estimate.groups.tracker.counts.items():  # type: ignore[union-attr]
        assert pair == pytest.approx(want.counts[number])
    rows["parts"] = torch.stack([rows["won"], 1 - rows["won"], torch.full_like(rows["won"], torch.nan)], -1)
    agent.estimate.groups = GroupBaseline({"baseline": "tracker", "reward": "parts", "reward_weights": [0.5, 0.25, 9]})
    agent.update(filled(rows, 1))
    counts = [agent.estimate.groups.tracker.counts[i][0] for i in range(2)]  # type: ignore[union-attr]
    assert counts == pytest.approx([0.48 + 0.5, 0.48 + 0.25])


def test_success_is_a_return_that_is_large_enough() -> None:
    record = TensorDict({"reward": torch.tensor([[0.25, 0.25], [0.5, 0.5], [2.0, 9.0]])}, batch_size=[3])
    record["step_mask"] = torch.tensor([[True, True], [True, True], [True, False]])
    assert success(record).tolist() == [0.0, 1.0, 1.0]
    assert success(record, threshold=0.5).tolist() == [1.0, 1.0, 1.0]
    assert success(record, threshold=2.5).tolist() == [0.0, 0.0, 0.0]


# ------------------------------------------------------------------------------------------------ runs

RUN: dict[str, Any] = {
    "env": "two_route",
    "policy": "gaussian",
    "policy.hidden": [8],
    "correction": "grpo",
    "agent.advantage": "group",
    "rollout.num_envs": 4,
    "rollout.horizon": 8,
    "eval_every": 0,
    "eval_episodes": 2,
}
TRACKED = {
    "correction.advantage": {"baseline": "tracker", "reward": "won", "scale": "whiten"},
    "agent.columns": {"won": {"name": "success", "threshold": 0.0}},
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, r"every row is alone.*\(rollout\.starts\)"),
        (TRACKED, r"rows of this run have none.*rollout\.starts="),
        (
            {**TRACKED, "rollout.starts": NODE, "agent.advantage": "critic"},
            r"baseline=tracker.*come from a critic: set agent\.advantage=group",
        ),
        ({"rollout.starts": NODE, "correction": "ppo", "agent.advantage": "critic"}, "nothing compares any: a critic"),
        ({"rollout.starts": {**NODE, "of": "goal"}}, r"of=goal.*TwoRouteEnv shows no goals"),
        ({"rollout.starts": {**NODE, "of": [4]}}, r"names entry 4 of the observation, whose entries are 0 to 3"),
        ({"rollout.starts": {**NODE, "of": []}}, r"of=\[\] looks at nothing"),
        ({"rollout.starts": {**NODE, "grid": 0.0}}, r"rollout\.starts\.grid=0\.0 must be above 0"),
        ({"rollout.starts": NODE, "replay": "group", "replay.sampler.size": 4}, "replay=group.*are steps"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_collected(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ur.assemble(**{**RUN, **changed}, updates=2)


@pytest.mark.parametrize("replay", ["uniform", "her"])
def test_agents_that_compare_no_rows_and_rows_of_other_goals_are_refused(replay: str) -> None:
    given = {"env": "point_maze", "env.reward": "sparse", "agent": "sac", "replay": replay, "replay.capacity": 512}
    with pytest.raises(ConfigError, match="replay=her exchanges" if replay == "her" else "agent=sac compares none"):
        ur.assemble(**given, **{"rollout.starts": NODE}, updates=2)


def test_returns_that_are_no_success_rate_are_refused_with_the_column_that_makes_one() -> None:
    made = {**RUN, "rollout.starts": NODE, "rollout.horizon": 32, "correction.advantage": {"baseline": "tracker"}}
    with pytest.raises(RecordError, match="name: success"):
        ur.assemble(**made, updates=1).run()


def test_a_run_with_a_tracker_resumes_bit_for_bit(tmp_path: Path) -> None:
    from test_resume import COMMON, cut_run, equal, rows_of

    words = [f"{key}={value}" for key, value in RUN.items() if key not in ("eval_every", "eval_episodes")]
    words += [
        "rollout.starts={_target_: unified_rl.rollout.starts.Starts, grid: 0.02}",
        "correction.advantage={baseline: tracker, reward: won, scale: whiten}",
        "agent.columns={won: {name: success, threshold: -1.28}}",
        "steps=1280",
        "checkpoint_every=128",
    ]
    whole = train(compose([*COMMON, *words, f"run_dir={tmp_path / 'whole'}"]))
    saves = checkpoints(whole / "checkpoints")
    last = read_checkpoint(saves[-1])
    assert len(last["agent"]["groups"]["prompt"]) > 1
    part = tmp_path / "part"
    cut_run(whole, part, saves[len(saves) // 2])
    resume(str(part))
    equal(last, read_checkpoint(checkpoints(part / "checkpoints")[-1]))
    assert rows_of(part) == rows_of(whole) and "rollout/starts" in rows_of(whole)[-1]
