"""The scalar settings of a run. Imports no torch, so that the command line can check keys at once."""

from __future__ import annotations

from dataclasses import dataclass

from unified_rl.ranges import Count, Name, Seed, Whole, ranged


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
