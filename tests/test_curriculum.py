"""Which prompts are drawn: what trackers believe, what that is worth, who is chosen, and what a run keeps of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from agent_cases import stream
from tensordict import TensorDict
from test_sources import GROUP, PROMPTS, Repeating, others, own, rollout

from unified_rl.config import compose, resolve_defaults
from unified_rl.envs.language import ChainMod
from unified_rl.errors import CheckpointError, ConfigError, RecordError
from unified_rl.returns.difficulty import DIFFICULTIES, draw_top, draw_weighted
from unified_rl.returns.trackers import (
    TRACKERS,
    DecayedCounts,
    DriftCounts,
    Neighbours,
    Network,
    Outcomes,
    Prompts,
    prompt_features,
)
from unified_rl.rollout.context import Refill
from unified_rl.rollout.curriculum import Curriculum
from unified_rl.rollout.sources import Demonstrations, Pool
from unified_rl.training.checkpoint import checkpoints, read_checkpoint
from unified_rl.training.run import Job, resume, train

COUNTS = {"name": "decayed", "fresh": 1.0, "rest": 1.0}


def prompts(*numbers: int) -> Prompts:
    return Prompts(torch.tensor(numbers), [[n, n + 1, 7] for n in numbers])


def outcomes(won: list[float], lost: list[float], behavior: float = -1.0, now: float = -1.0) -> Outcomes:
    """Answers of two tokens, both of the given log-probs."""
    rows = TensorDict(
        {
            "tokens": torch.ones(len(won), 3, dtype=torch.int64),
            "token_mask": torch.ones(len(won), 3, dtype=torch.bool),
            "mask": torch.tensor([[False, True, True]] * len(won)),
            "behavior_log_prob": torch.full((len(won), 3), behavior),
        },
        batch_size=[len(won)],
    )
    of = torch.tensor([won, lost], dtype=torch.float64)
    return Outcomes(of[0], of[1], rows, lambda asked: torch.full(asked["tokens"].shape, now))


# ------------------------------------------------------------------------------------------------ trackers


def test_counts_are_forgotten_by_the_drift_on_the_last_answer() -> None:
    tracker = DriftCounts()
    tracker.learn(prompts(3), outcomes([1.0], [0.0]))
    assert tracker.counts(prompts(3)).tolist() == [[1.5, 0.5]]  # 0.5 + 1 and 0.5 + 0: nothing to forget yet
    tracker.learn(prompts(3), outcomes([0.0], [1.0], now=-1.0))  # no drift: 0.96 is kept
    assert tracker.counts(prompts(3)).tolist() == [pytest.approx([1.44, 1.48])]
    tracker.learn(prompts(3), outcomes([0.0], [1.0], now=-1.006))  # 2^(-0.006 / 0.06) = 0.93303
    assert tracker.counts(prompts(3)).tolist() == [pytest.approx([1.44 * 0.93303, 1.48 * 0.93303 + 1], abs=1e-4)]
    tracker.learn(prompts(3), outcomes([1.0], [0.0], now=9.0))  # far: 0.875 at least is kept
    want = [1.44 * 0.93303 * 0.875 + 1, (1.48 * 0.93303 + 1) * 0.875]
    assert tracker.counts(prompts(3)).tolist() == [pytest.approx(want, abs=1e-4)]
    assert tracker.counts(prompts(4)).tolist() == [[0.5, 0.5]] and tracker.known(prompts(3, 4)) == 0.5


def test_a_fixed_forgetting_has_a_memory_of_its_inverse_and_certain_prompts_no_advantage() -> None:
    tracker = DriftCounts(low=0.875, high=0.875)
    for _ in range(200):
        tracker.learn(prompts(3), outcomes([1.0], [0.0]))
    assert float(tracker.counts(prompts(3)).sum()) == pytest.approx(8.0)  # 1 / (1 - 0.875)
    assert float(tracker.value(prompts(3))) == pytest.approx(1.0)  # so 1 - value, the advantage, is 0


def test_two_speeds_of_forgetting() -> None:
    tracker = DecayedCounts(fresh=0.5, rest=0.9, prior=1.0)
    tracker.learn(prompts(1, 2), outcomes([3.0, 0.0], [1.0, 4.0]))
    tracker.learn(prompts(1), outcomes([0.0], [4.0]))
    assert tracker.counts(prompts(1, 2, 9)).tolist() == [[2.5, 5.5], [1.0, pytest.approx(4.6)], [1.0, 1.0]]
    everything, last = DecayedCounts(fresh=1.0, rest=1.0), DecayedCounts(fresh=0.0, rest=1.0)
    for won in (1.0, 0.0, 1.0):
        for one in (everything, last):
            one.learn(prompts(1), outcomes([won], [1 - won]))
    assert everything.counts(prompts(1)).tolist() == [[3.0, 2.0]] and last.counts(prompts(1)).tolist() == [[2.0, 1.0]]


def test_what_is_believed_is_drawn_from_a_beta_distribution() -> None:
    tracker = DecayedCounts(prior=1.0)
    tracker.learn(prompts(1), outcomes([2.0], [4.0]))  # Beta(3, 5): mean 3 / 8, variance 15 / (64 * 9)
    drawn = tracker.drawn(prompts(*([1] * 40_000)), stream(0))
    assert float(drawn.mean()) == pytest.approx(0.375, abs=0.004) and float(drawn.var()) == pytest.approx(
        15 / 576, abs=0.001
    )
    assert torch.equal(tracker.drawn(prompts(1, 2), stream(1)), tracker.drawn(prompts(1, 2), stream(1)))


def test_neighbours_of_no_width_count_and_wide_ones_average() -> None:
    narrow, wide = Neighbours(width=1e-4), Neighbours(width=1e6)
    for one in (narrow, wide):
        one.learn(prompts(10, 20), outcomes([3.0, 0.0], [1.0, 4.0]))
        one.learn(prompts(10), outcomes([1.0], [1.0]))
    assert narrow.value(prompts(10, 20, 30)).tolist() == pytest.approx([4.5 / 7, 0.5 / 5, 0.5])
    assert wide.value(prompts(10, 30)).tolist() == pytest.approx([4.5 / 11, 4.5 / 11], abs=1e-4)
    near = Neighbours(width=0.3)
    near.learn(prompts(10), outcomes([4.0], [0.0]))
    assert near.value(Prompts(torch.tensor([5]), [[10, 11, 8]]))[0] > near.value(prompts(90))[0] + 0.01
    assert prompt_features([[1, 2], [3]], 64).norm(dim=-1).tolist() == pytest.approx([1.0, 1.0])


def test_a_value_network_learns_the_rates_and_begins_where_it_knows_nothing() -> None:
    network = Network(lr=0.02, steps=20)
    both = prompts(10, 90)
    assert network.value(both).tolist() == [0.5, 0.5]
    for _ in range(20):
        network.learn(both, outcomes([4.0, 0.0], [0.0, 4.0]))
    assert network.value(both).tolist() == pytest.approx([1.0, 0.0], abs=0.1)
    still = Network(lr=0.0)
    still.learn(both, outcomes([4.0, 0.0], [0.0, 4.0]))
    assert still.value(both).tolist() == [0.5, 0.5]
    network.learn(both, outcomes([0.0, 0.0], [0.0, 0.0]))  # nothing that counts: nothing is learnt, nothing is NaN
    assert bool(network.value(both).isfinite().all())


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_goes_on_where_it_was(name: str) -> None:
    one, other = TRACKERS[name](), TRACKERS[name]()
    one.learn(prompts(1, 2), outcomes([1.0, 0.0], [1.0, 2.0]))
    other.load_state_dict(one.state_dict())
    for tracker in (one, other):
        tracker.learn(prompts(2, 3), outcomes([1.0, 0.0], [1.0, 2.0], now=-1.5))
    asked = prompts(1, 2, 3, 4)
    assert torch.equal(one.value(asked), other.value(asked)) and one.known(asked) == other.known(asked) == 0.75
    if name in ("neighbours", "network"):
        with pytest.raises(CheckpointError, match=r"rollout\.curriculum\.tracker"):
            TRACKERS[name](features=8).load_state_dict(one.state_dict())


# ------------------------------------------------------------------------------------------------ worth and choice


def test_what_a_rate_is_worth() -> None:
    rate = torch.tensor([0.0, 0.2, 0.5, 1.0], dtype=torch.float64)
    found = {name: score(rate).tolist() for name, score in DIFFICULTIES.items()}
    assert found["deviation"] == pytest.approx([0.05, 0.45, 0.55, 0.05])
    assert found["variance"] == pytest.approx([0.0, 0.16, 0.25, 0.0])
    assert found["nearest"] == pytest.approx([0.5, 0.7, 1.0, 0.5])
    assert found["gaussian"] == pytest.approx([0.04394, 0.32465, 1.0, 0.04394], abs=1e-5)  # exp(-3.125), exp(-1.125)
    assert DIFFICULTIES["gaussian"](rate, sigma=1e9).tolist() == [1.0] * 4


def test_drawing_is_in_proportion_and_without_replacement() -> None:
    weight, generator = torch.tensor([1.0, 2.0, 0.0, 1.0]), stream(0)
    first = [int(draw_weighted(weight, 1, generator)) for _ in range(8000)]
    share = torch.bincount(torch.tensor(first), minlength=4) / 8000
    assert share.tolist() == pytest.approx([0.25, 0.5, 0.0, 0.25], abs=0.02)
    pairs = [tuple(draw_weighted(weight, 2, generator).tolist()) for _ in range(8000)]
    # the two of weight 1: first one of them (1 / 2), then the other of 3 left (1 / 3)
    assert sum(pair == (0, 3) for pair in pairs) / 8000 == pytest.approx(1 / 6, abs=0.02)
    assert draw_weighted(weight, 4, generator).tolist() == [0, 1, 2, 3]  # what is worth nothing comes last, but comes
    assert draw_top(torch.tensor([1.0, 3.0, 3.0, 2.0]), 2).tolist() == [1, 2]
    assert draw_top(torch.ones(5), 2).tolist() == [0, 1]


def test_never_drawn_prompts_keep_mass() -> None:
    """A prompt that was failed again and again is worth less than one that was never seen, and something yet."""
    curriculum = Curriculum()
    for _ in range(50):
        curriculum.tracker.learn(prompts(1), outcomes([0.0], [1.0]))
    failed, unseen = curriculum.score(curriculum.tracker.value(prompts(1, 2))).tolist()
    assert unseen == pytest.approx(0.55) and 0.05 <= failed < 0.3


# ------------------------------------------------------------------------------------------------ rollouts


def test_rows_hold_what_was_expected_before_they_were_answered() -> None:
    made = rollout(
        Repeating(modulus=5, terms=3),
        curriculum=Curriculum(COUNTS),
        sources={"shown": Demonstrations(per_group=1), "pool": Pool()},
    )
    won: dict[int, list[float]] = {}
    for version in range(4):
        rows, metrics = made.collect(version)
        for row in rows:
            s, n = won.get(int(row["prompt_id"]), [0.0, 0.0])
            assert float(row["expected"]) == pytest.approx((s + 1) / (n + 2)), "also of rows that others made"
        assert len(others(rows)) >= PROMPTS and (version or metrics["rollout/known"] == 0.0)
        for row in own(rows):
            total = won.setdefault(int(row["prompt_id"]), [0.0, 0.0])
            total[0], total[1] = total[0] + float(row["reward"].sum()), total[1] + 1
    assert metrics["rollout/known"] > 0.5


def test_what_a_context_changes_is_not_counted() -> None:
    """Refilled groups are gone from the rows; what their prompts came to is known all the same."""
    plain, refilled = (
        rollout(Repeating(modulus=5, terms=3), curriculum=Curriculum(COUNTS, candidates=1), context=context)
        for context in (None, Refill(tries=1))
    )
    first, metrics = plain.collect(0)
    second, changed = refilled.collect(0)
    assert not torch.equal(first["prompt_id"], second["prompt_id"]) and changed["rollout/resampled"] > 0
    assert metrics["rollout/expected"] == changed["rollout/expected"]
    for key, value in plain.curriculum.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(value, refilled.curriculum.state_dict()[key])  # type: ignore[union-attr]


@pytest.mark.parametrize("tracker", ["drift", COUNTS])
def test_a_prompt_that_is_drawn_twice_is_counted_twice_and_what_does_not_count_is_not(tracker: Any) -> None:
    curriculum, started = Curriculum(tracker), {"drift": 0.5}.get(str(tracker), 1.0)
    problems = [{"prompt_id": n, "prompt": [n, 7]} for n in (4, 9, 4)]
    reward = torch.tensor([[1.0, 0.0], [1.0, 5.0], [1.0, 1.0]])
    counted = torch.tensor([[True, True], [True, False], [False, True]])
    told = outcomes([0.0] * 3, [0.0] * 3)
    curriculum.told(problems, reward, counted, told.rows, told.score)
    want = [[started + 2, started + 1], [started + 1, started]]
    assert curriculum.tracker.counts(prompts(4, 9)).tolist() == want  # type: ignore[attr-defined]


def test_hard_and_easy_prompts_make_room_for_half_solved_ones() -> None:
    class Known(Repeating):
        """The first prompt is never solved, the second always, the others every second time."""

        def respond(self, problems: Any, turns: Any, finished: Any) -> Any:
            found = super().respond(problems, turns, finished)
            for row, problem in enumerate(problems):
                alone = {hard: 0.0, easy: 1.0}
                found.reward[row] = alone.get(problem["text"], float(row % 2))
            return found

    six = ChainMod(modulus=5, terms=3)._candidates(6, torch.Generator().manual_seed(0))
    hard, easy = six[0]["text"], six[1]["text"]
    env = Known(modulus=5, terms=3, held_out=0.0)
    made = rollout(env, curriculum=Curriculum("decayed", "variance", candidates=3, pick="top"))
    decided = {p["prompt_id"] for p in env.problems(60, stream(0), "train") if p["text"] in (hard, easy)}
    seen = [int(n) for version in range(12) for n in own(made.collect(version)[0])["prompt_id"][::GROUP]]
    early, late = (sum(n in decided for n in part) for part in (seen[:6], seen[-18:]))
    assert len(decided) == 2 and early > 0 and late == 0


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ("{tracker: drift}", r"rollout\.curriculum .* must be a Curriculum or null"),
        ("{_target_: unified_rl.rollout.curriculum.Curriculum, tracker: drifts}", "did you mean 'drift'"),
        ("{_target_: unified_rl.rollout.curriculum.Curriculum, score: {name: gaussian, sgima: 1.0}}", "'sigma'"),
        ("{_target_: unified_rl.rollout.curriculum.Curriculum, candidates: 0}", r"rollout\.curriculum\.candidates"),
        (
            "{_target_: unified_rl.rollout.curriculum.Curriculum, tracker: network, thompson: true}",
            r"thompson=true .* Network has an estimate alone.*drift or decayed",
        ),
    ],
)
def test_a_misspelt_curriculum_is_refused(node: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Job(compose(["env=chain_mod", "policy=causal_lm_tiny", f"rollout.curriculum={node}"])).make_rollout()


def test_rewards_that_are_no_rates_are_refused_by_name() -> None:
    class Shaped(Repeating):
        def respond(self, problems: Any, turns: Any, finished: Any) -> Any:
            found = super().respond(problems, turns, finished)
            return found._replace(reward=found.reward - 1)

    made = rollout(Shaped(modulus=5, terms=3), curriculum=Curriculum())
    with pytest.raises(RecordError, match=r"rewards from 0 to 1.*rollout\.curriculum=null"):
        made.collect(0)
    with pytest.raises(ConfigError, match=r"rollout\.columns\.expected"):
        rollout(curriculum=Curriculum(), columns={"expected": "correct"})


@pytest.mark.parametrize("recipe", ["spo", "pcl"])
def test_a_run_with_a_curriculum_resumes_bit_for_bit(recipe: str, tmp_path: Path) -> None:
    from test_resume import COMMON, LANGUAGE, cut_run, equal, rows_of, same_files

    kept = [o for o in LANGUAGE if not o.startswith(("env.", "correction"))]
    overrides = [*COMMON, *kept, f"recipe={recipe}", "env.modulus=2", "env.terms=2", "steps=32", "checkpoint_every=8"]
    whole = train(resolve_defaults(compose([*overrides, f"run_dir={tmp_path / 'whole'}"])))
    saves = checkpoints(whole / "checkpoints")
    assert rows_of(whole)[-1]["rollout/known"] > 0
    save, part = saves[1], tmp_path / "part"
    cut_run(whole, part, save)
    resume(str(part))
    equal(read_checkpoint(saves[-1]), read_checkpoint(checkpoints(part / "checkpoints")[-1]))
    same_files(saves[-1] / "replay", checkpoints(part / "checkpoints")[-1] / "replay")
    assert rows_of(part) == rows_of(whole)
