"""Rows of a trained policy as a folder that other runs can train on."""

from __future__ import annotations

from pathlib import Path

from unified_rl.replay import Replay, Uniform
from unified_rl.rollout import ControlRollout, LanguageRollout
from unified_rl.training.build import Job
from unified_rl.training.seeding import generator

HORIZON = 256


def record_dataset(job: Job, folder: Path, batches: int = 8) -> int:
    """Rolls the job's policy out and writes the rows as a replay folder; returns how many.

    Rows carry the discount of the job's agent.
    """
    stream, device = generator(job.seed, "record", job.device), str(job.device)
    if job.language:
        problems = generator(job.seed, "record_problems")
        rollout: LanguageRollout | ControlRollout = LanguageRollout(
            job.env, job.policy, job.gamma, stream, problems, device=device
        )
    else:
        rollout = ControlRollout(job.env, job.policy, job.gamma, stream, horizon=HORIZON, device=device)
    lanes = 1 if job.language else job.env.num_envs
    replay = Replay(rollout.steps_per_collect * batches, lanes=lanes, sampler=Uniform())
    for _ in range(batches):
        replay.extend(rollout.collect(version=0)[0])
    replay.dumps(folder)
    return len(replay)
