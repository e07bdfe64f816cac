"""Rows of a trained policy as a folder that other runs can train on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from tensordict import TensorDict

from unified_rl.errors import ConfigError
from unified_rl.replay import Replay, Uniform
from unified_rl.rollout import ControlRollout, LanguageRollout
from unified_rl.training.build import Job
from unified_rl.training.seeding import generator

HORIZON = 256
"""Steps of one collection."""


def record_dataset(
    job: Job, folder: Path, batches: int = 8, *, rows: int | None = None, episodes: int | None = None
) -> int:
    """Rolls the job's policy out as it samples, and writes the rows as a replay folder.

    Rows carry the discount of the job's agent.

    Args:
        job: with the policy.
        folder: that is written.
        batches: collections, of :data:`HORIZON` steps of every simulation, where nobody says how much is wanted.
        rows: how many; steps of all simulations together, or conversations.
        episodes: without ``rows``: how many whole episodes, one behind another; or conversations.

    Returns:
        The number of rows.

    Raises:
        ConfigError: ``rows`` that the simulations cannot share equally, or episodes that do not end.
    """
    check_rows(job, rows)
    stream, device = generator(job.seed, "record", job.device), str(job.device)
    if job.language:
        problems = generator(job.seed, "record_problems")
        talk = LanguageRollout(job.env, job.policy, job.gamma, stream, problems, device=device)
        wanted = rows if rows is not None else episodes
        batch = _conversations(talk, batches * talk.steps_per_collect if wanted is None else wanted)
    else:
        rollout = ControlRollout(job.env, job.policy, job.gamma, stream, horizon=HORIZON, device=device)
        rollout.noise = None  # off-policy evaluation multiplies ratios of steps, whose noise must then be their own
        lanes = job.env.num_envs
        whole = rows is None and episodes is not None
        batch = _episodes(rollout, episodes or 0) if whole else _steps(rollout, rows or batches * HORIZON * lanes)
    replay = Replay(batch.numel(), lanes=batch.shape[1] if batch.ndim > 1 else 1, sampler=Uniform())
    replay.extend(batch)
    replay.dumps(folder)
    return len(replay)


def check_rows(job: Job, rows: int | None) -> None:
    """Raises ConfigError for a number of rows that cannot be recorded."""
    lanes = 1 if job.language else job.env.num_envs
    if rows is not None and (rows < 1 or rows % lanes):
        below = rows // lanes * lanes
        near = f"{below} or {below + lanes}" if below > 0 else str(lanes)
        raise ConfigError(
            f"--rows {rows} must be a multiple of the {lanes} simulations that are stepped together: {near}"
        )


def _conversations(rollout: LanguageRollout, count: int) -> TensorDict:
    found: list[TensorDict] = []
    while sum(map(len, found)) < count:
        found.append(rollout.collect(version=0)[0])
    return torch.cat(found)[:count]


def _batches(rollout: ControlRollout, steps: int) -> Iterator[TensorDict]:
    for done in range(0, steps, HORIZON):
        rollout.horizon = min(HORIZON, steps - done)
        yield rollout.collect(version=0)[0]


def _steps(rollout: ControlRollout, rows: int) -> TensorDict:
    """``[rows / K, K]`` steps."""
    return torch.cat(list(_batches(rollout, rows // rollout.num_envs)))


def _episodes(rollout: ControlRollout, count: int) -> TensorDict:
    """Steps ``[N]`` of whole episodes, as many of each simulation, so that none are there because they were short."""
    lanes = rollout.num_envs
    quota = torch.tensor([count // lanes + (lane < count % lanes) for lane in range(lanes)])
    most = int(quota.max()) * rollout.env.max_steps
    found: list[TensorDict] = []
    for batch in _batches(rollout, most):
        found.append(batch)
        rows: TensorDict = torch.cat(found)  # type: ignore[assignment]
        ends = (rows["terminated"] | rows["truncated"]).long().cumsum(0)
        if bool((ends[-1] >= quota).all()):
            before = torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])
            return torch.cat([rows[:, lane][before[:, lane] < quota[lane]] for lane in range(lanes)])
    raise ConfigError(
        f"--episodes {count}: an episode did not end within the environment's {rollout.env.max_steps} steps; say how "
        "much to record by --rows"
    )
