"""Recorded rows: as many as asked for, and refused where they do not fit the environment that they are used in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from unified_rl import cli
from unified_rl.config import compose
from unified_rl.errors import ConfigError
from unified_rl.replay import Replay, Uniform, read_rows
from unified_rl.rollout.recorded import fitted
from unified_rl.spaces import Box, Discrete, Space
from unified_rl.training.run import Job, evaluate_run, train

ARM = Space.flat(3, 2, [-1.0, -2.0], [1.0, 2.0])
LEGS = Space(Box((3,)), Discrete(4, start=1))


def rows(n: int = 40, **changed: Any) -> TensorDict:
    stream = torch.Generator().manual_seed(0)
    proper = {"observation": torch.randn(n, 3, generator=stream), "action": torch.rand(n, 2, generator=stream) - 0.5}
    columns = {key: value for key, value in {**proper, **changed}.items() if value is not None}
    return TensorDict(columns, batch_size=[n])


def spoilt(tensor: torch.Tensor, *at: int, value: float = torch.nan) -> torch.Tensor:
    out = tensor.clone()
    out[list(at)] = value
    return out


def test_columns_arrive_as_policies_take_them() -> None:
    given = rows(observation=torch.ones(40, 3, dtype=torch.float64), action=torch.ones(40, 2, dtype=torch.int64))
    out = fitted(given, ARM, "rollout.data=x")
    assert out["observation"].dtype == out["action"].dtype == torch.float32
    assert given["observation"].dtype == torch.float64, "the caller's rows stay"
    for action in (torch.arange(40) % 4, (torch.arange(40) % 4).double().unsqueeze(-1)):
        chosen = fitted(rows(action=action), LEGS, "x")["action"]
        assert chosen.dtype == torch.int64 and chosen.flatten().tolist() == [k % 4 for k in range(40)]


@pytest.mark.parametrize(
    ("space", "given", "words"),
    [
        (ARM, rows(observation=torch.zeros(40, 4)), r"holds observations of 4 entries, but the environment's have 3"),
        (ARM, rows(action=torch.zeros(40, 1)), r"holds actions of 1 entries, but the environment's have 2"),
        (ARM, rows(action=torch.zeros(40, 4)), r"holds actions of 4 entries"),
        (ARM, rows(action=torch.zeros(40)), r"holds actions of 1 entries"),
        (ARM, rows(observation=torch.zeros(40, 3, dtype=torch.complex64)), r"3 complex entries"),
        (ARM, rows(observation=spoilt(torch.zeros(40, 3), 7)), r"observations of .* not finite: row 7 \(of 40\)"),
        (
            ARM,
            rows(observation=torch.full((40, 3), 1e300, dtype=torch.float64)),
            r"rows 0, 1, 2, 3, 4 \.\.\. \(40 of 40\)",
        ),
        (ARM, rows(action=spoilt(torch.zeros(40, 2), 3, 9, value=torch.inf)), r"actions of .* rows 3, 9 \(of 40\)"),
        (ARM, rows(reward=spoilt(torch.zeros(40), 5)), r"rewards of .* row 5"),
        (ARM, rows(next_observation=spoilt(torch.zeros(40, 3), 6)), r"next observations of .* row 6"),
        (
            ARM,
            rows(action=50 * rows()["action"]),
            r"\d\d % of the actions .*entry 0 is between -2\d.*bounds are -1 and 1",
        ),
        (
            LEGS,
            rows(action=torch.arange(40) % 5),
            r"no choices .*4 choices \(1 to 4\).*rows 4, 9, 14.* example \[4\.0\]",
        ),
        (LEGS, rows(action=torch.full((40,), 0.5)), r"no choices"),
        (LEGS, rows(action=torch.full((40,), -1)), r"no choices"),
    ],
)
def test_rows_of_another_robot_are_refused_with_their_numbers(space: Space, given: TensorDict, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        fitted(given, space, "rollout.data=demos")
    assert "rollout.data=demos" in str(caught.value)


def test_what_a_policy_really_samples_fits() -> None:
    wide = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2.0])  # std: the bound
    after = spoilt(torch.zeros(4000, 3), 8)
    over = torch.zeros(4000, dtype=torch.bool)
    over[8] = True
    out = fitted(rows(4000, action=wide, next_observation=after, terminated=over), ARM, "x")
    assert torch.equal(out["action"], wide)


def test_both_settings_check_their_rows_before_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = {"observation": torch.zeros(30, 3), "action": 100.0 * torch.ones(30, 1), "reward": torch.zeros(30)}
    flags = dict.fromkeys(("terminated", "truncated"), torch.zeros(30, dtype=torch.bool))
    saved = Replay(30, sampler=Uniform())
    columns |= {**flags, "next_observation": torch.zeros(30, 3), "discount": torch.full((30,), 0.99)}
    saved.extend(TensorDict(columns, batch_size=[30]))
    saved.dumps(tmp_path / "rows")
    run = ["env=pendulum", f"run_dir={tmp_path / 'run'}", "progress=false", "steps=64", "eval_episodes=1"]
    for choice in (["agent=behavior_cloning", "rollout.data={}"], ["recipe=rlpd", "replay.data={}"]):
        assert cli.main(["train", *run, *(word.format(tmp_path / "rows") for word in choice)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "100 % of the actions" in error and choice[1].split("=")[0] in error
        assert not (tmp_path / "run" / "metrics.jsonl").exists() or choice[0] != "agent=behavior_cloning"


@pytest.mark.parametrize("name", ["demos.npz", "demos.hdf5"])
def test_a_file_is_told_what_a_folder_of_rows_is(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_bytes(b"PK")
    run = ["env=pendulum", f"run_dir={tmp_path / 'run'}", "agent=behavior_cloning", f"rollout.data={tmp_path / name}"]
    assert cli.main(["train", *run]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is a file" in error and "--record" in error and "Replay(N, sampler" in error


# ---------------------------------------------------------------------------------------------------- recording


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["env=inverted_pendulum", "agent=ppo", "rollout.num_envs=4", "rollout.horizon=16", "agent.minibatch=64"]
    scalars = ["steps=64", "eval_episodes=2", "progress=false", "agent.gamma=0.9"]
    return train(compose([*words, *scalars, f"run_dir={tmp_path_factory.mktemp('trained') / 'run'}"]))


def test_as_many_rows_as_asked_for(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(trained), "--record", str(tmp_path / "a"), "--rows", "1200"]) == 0
    assert "1200" in capsys.readouterr().out
    found = read_rows(tmp_path / "a")
    assert found.shape == (300, 4) and bool((found["discount"] == 0.9).all())
    for count, near in ((1201, "1200 or 1204"), (3, "4"), (0, "4"), (-4, "4")):
        assert cli.main(["evaluate", str(trained), "--record", str(tmp_path / "b"), "--rows", str(count)]) == 2
        assert f"a multiple of the 4 simulations that are stepped together: {near}\n" in capsys.readouterr().err
    assert cli.main(["evaluate", str(trained), "--rows", "4"]) == 2
    assert "add --record FOLDER" in capsys.readouterr().err


def test_as_many_whole_episodes_as_asked_for(trained: Path, tmp_path: Path) -> None:
    evaluate_run(str(trained), 6, record=str(tmp_path / "rows"))
    found = read_rows(tmp_path / "rows")
    ends = found["terminated"] | found["truncated"]
    assert found.ndim == 1 and int(ends.sum()) == 6 and bool(ends[-1])
    starts = torch.cat([torch.tensor([0]), ends.nonzero().flatten()[:-1] + 1])
    assert len(found["episode"].unique()) == 6 and found["episode"][starts].unique().numel() == 6
    inside = ~ends
    inside[-1] = False
    after = torch.roll(found["observation"], -1, 0)
    assert torch.equal(found["next_observation"][inside], after[inside]), "one behind another"
    counts = [int((found["episode"][starts] % 4 == lane).sum()) for lane in range(4)]
    assert sum(counts) == 6 and max(found["episode"][starts].tolist()) >= 4


def test_evaluation_of_a_costly_environment_makes_few_copies() -> None:
    words = ["env=gymnasium", "env.id=Pendulum-v1", "agent=ppo", "eval_episodes=40", "rollout.num_envs=2"]
    job = Job(compose([*words, "env.max_episode_steps=3", "progress=false"]))
    metrics = job.evaluate()
    assert job.eval_env.num_envs == 16 and metrics["eval/length"] == 3.0
    assert Job(compose(["env=inverted_pendulum", "agent=ppo", "eval_episodes=40"]))._copies(40) == 40, (
        "one batch of our own"
    )
