"""The scalar settings of a run. Imports no torch, so that the command line can check keys at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from unified_rl.ranges import Count, Float32, Name, Positive, Seed, Whole, ranged


@ranged()
@dataclass
class TrainSettings:
    """Top-level keys of ``unified-rl train``.

    Attributes:
        steps: budget of environment steps (control; a chunk of actions counts as those it has) or sampled
            conversations (language); 0 makes the warm start alone.
        seed: the one seed; every random stream is derived from it.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        threads: intra-op threads of torch.
        runs: folder that holds run folders.
        name: name of the run folder; by default made of env, agent, correction, seed and time.
        run_dir: the run folder itself, overriding ``runs`` and ``name``.
        resume_existing: continue an unfinished run that ``run_dir`` holds instead of refusing it.
        eval_every: steps between evaluations; by default a twentieth of ``steps``; 0 evaluates at the end only.
        eval_episodes: held-out episodes (control) or prompts (language) of one evaluation; 0 (language)
            evaluates nothing.
        eval_deterministic: control: evaluate the policy without its sampling noise.
        log_every: steps between logged rows; by default a two-hundredth of ``steps``.
        checkpoint_every: steps between checkpoints; by default a fifth of ``steps``; 0 keeps the final one only.
        keep_checkpoints: how many checkpoints stay on disk.
        checkpoint_replay: store the replay in checkpoints (needed for a bit-exact resume).
        reward: token tasks: functions that reward answers, in place of the task's own verifier (or beside it, as
            ``task``): names of shipped ones, ``module:function``, or mappings ``{name: ..., weight: ...}``; see
            :class:`unified_rl.envs.language.rewards.Rewards`.
        reward_weights: of each of them in the sum; 1 by default.
        reward_workers: processes that call them; 0 calls them in the run's own.
        reward_seconds: wall time of one call.
        reward_retries: further tries of a call that raised or hung.
        reward_errors: what becomes of a row on which a function fails: ``stop`` ends the run, ``skip`` leaves the row
            out of the update.
        identity_check: verify on the first update that fresh data has ratio 1.
        progress: show a progress display.
    """

    steps: Whole = 100_000
    seed: Seed = 0
    device: str = "cpu"
    threads: Count = 1
    runs: Name = "runs"
    name: str | None = None
    run_dir: str | None = None
    resume_existing: bool = False
    eval_every: Whole | None = None
    eval_episodes: Whole = 64
    eval_deterministic: bool = True
    log_every: Count | None = None
    checkpoint_every: Whole | None = None
    keep_checkpoints: Count = 2
    checkpoint_replay: bool = True
    reward: list[Any] | str | dict[str, Any] | None = None
    reward_weights: list[Float32] | None = None
    reward_workers: Whole = 0
    reward_seconds: Positive = 600.0
    reward_retries: Whole = 1
    reward_errors: Literal["stop", "skip"] = "stop"
    identity_check: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        """Fills the intervals that follow from ``steps``."""
        if self.eval_every is None:
            self.eval_every = max(1, self.steps // 20)
        if self.log_every is None:
            self.log_every = max(1, self.steps // 200)
        if self.checkpoint_every is None:
            self.checkpoint_every = max(1, self.steps // 5)
