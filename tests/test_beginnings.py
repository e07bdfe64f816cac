"""What answers begin with: who said it, whether it is learnt, how likely it was, and what a run keeps of it."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import EasyChain, cached
from tensordict import TensorDict
from test_recipes import FEW, of
from test_sources import Bare, own, rollout

from unified_rl.envs.language import ChainMod, GuessNumber
from unified_rl.errors import ConfigError
from unified_rl.returns.trackers import Prompts
from unified_rl.rollout import LanguageRollout
from unified_rl.rollout.beginnings import Continued, Drafts, Forced, Guided, OwnSuccess, Verified
from unified_rl.rollout.context import Refill
from unified_rl.rollout.curriculum import Curriculum

SMALL: dict[str, Any] = {"modulus": 2, "terms": 2, "max_turn_tokens": 6, "held_out": 0.0}


def few(beginning: Any, prompts: int = 6, **options: Any) -> LanguageRollout:
    """Eight prompts, answered in about half of all tries."""
    return rollout(EasyChain(**SMALL), prompts=prompts, beginning=beginning, **options)


def answer(row: TensorDict, width: int) -> list[int]:
    """What stands behind the prompt."""
    ids: list[int] = row["tokens"][width : int(row["token_mask"].sum())].tolist()
    return ids


def width_of(made: LanguageRollout) -> int:
    return len(made.env.problems(1, torch.Generator().manual_seed(0), "train")[0]["prompt"])


# ------------------------------------------------------------------------------------------------ from solutions


def test_half_of_the_groups_begin_with_half_of_a_solution_that_is_not_learnt() -> None:
    made = rollout(prompts=4, beginning=Guided(share=0.5, of=0.5, style="chain"))
    solve, width = made.env.solve, width_of(made)  # type: ignore[attr-defined]
    seen: list[Any] = []
    made.env.problems = _noting(made.env.problems, seen)  # type: ignore[method-assign]
    rows, metrics = made.collect(0)
    solutions = [ids for ids in solve(seen[0], "chain") for _ in range(4)]
    begun = [row for row in range(16) if not bool(rows["mask"][row, width])]
    assert len(begun) == 8 and len({row // 4 for row in begun}) == 2 and metrics["rollout/begun"] == 0.5
    for row in range(16):
        count = (len(solutions[row]) - 1) // 2 if row in begun else 0
        assert answer(rows[row], width)[:count] == solutions[row][:count]
        assert rows["mask"][row, width : width + count].sum() == 0 and bool(rows["mask"][row, width + count])
    with torch.no_grad():
        again = made.policy.log_prob(rows).log_prob
    torch.testing.assert_close(again * rows["mask"], rows["behavior_log_prob"], atol=1e-4, rtol=0.0)


def _noting(draw: Any, seen: list[Any]) -> Any:
    def problems(count: int, generator: Any, split: str = "train") -> Any:
        seen.append(draw(count, generator, split))
        return seen[-1]

    return problems


def test_no_prompt_gets_its_own_draft() -> None:
    made = rollout(ChainMod(modulus=5, terms=3), prompts=5, beginning=Drafts())
    width, seen = width_of(made), []  # type: ignore[var-annotated]
    made.env.problems = _noting(made.env.problems, seen)  # type: ignore[method-assign]
    rows, metrics = made.collect(0)
    drafts = [ids[:-1] for ids in made.env.solve(seen[0])]  # type: ignore[attr-defined]
    given = [answer(rows[4 * group], width)[: len(drafts[0])] for group in range(5)]
    assert metrics["rollout/begun"] == 1.0 and sorted(given) == sorted(drafts)
    assert all(mine != draft or drafts.count(draft) > 1 for mine, draft in zip(given, drafts, strict=True))
    same = few(Drafts(), prompts=1)
    assert same.collect(0)[1]["rollout/begun"] == 0.0  # nobody else's draft is there


# ------------------------------------------------------------------------------------------------ a forced token


def test_a_forced_token_is_learnt_at_the_probability_of_the_coin() -> None:
    made = few(Forced(">"), columns={"scores": ["correct", "begun"]})
    rows, _ = made.collect(0)
    width, token = width_of(made), made.env.tokenizer.encode(">", add_special_tokens=False)[0]
    forced = (torch.arange(len(rows)) % 4) < 2
    assert bool((rows["tokens"][forced, width] == token).all()) and bool(rows["mask"][:, width].all())
    assert rows["behavior_log_prob"][forced, width].tolist() == pytest.approx([math.log(0.5)] * 12)
    assert rows["policy_version"][:, width].tolist() == [-1 if f else 0 for f in forced.tolist()]
    assert torch.equal(rows["scores"][:, 1], forced.float())
    ratio = (made.policy.log_prob(rows).log_prob - rows["behavior_log_prob"]).exp()
    first = made.policy.log_prob(rows).log_prob[forced, width].exp()
    torch.testing.assert_close(ratio[forced, width], 2 * first)  # 2 pi
    rest = rows["mask"].clone()
    rest[forced, width] = False
    torch.testing.assert_close(ratio[rest], torch.ones(int(rest.sum())), atol=1e-4, rtol=0.0)


# ------------------------------------------------------------------------------------------------ answers of before


def test_a_prompt_that_was_solved_begins_with_a_part_of_that_answer() -> None:
    made = few(OwnSuccess(share=0.5, of=1.0))
    width, known = width_of(made), {}  # type: ignore[var-annotated]
    for version in range(3):
        rows, metrics = made.collect(version)
        begun = 0
        for row in rows:
            number, said = int(row["prompt_id"]), answer(row, width)
            count = (len(known[number]) - 1) // 2 if number in known else 0
            assert said[:count] == known.get(number, [])[:count]
            assert int(row["mask"][width : width + count].sum()) == 0 and bool(row["mask"][width + count])
            begun += count > 0
        assert metrics["rollout/begun"] == begun / len(rows)
        for row in rows:
            if float(row["reward"].sum()) > 0:
                known[int(row["prompt_id"])] = answer(row, width)
    assert begun > 0


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_continued_answer_keeps_who_said_its_begin_and_how_likely_that_was(share: float) -> None:
    made = few(Continued(share=share, of=0.5))
    width, known = width_of(made), {}  # type: ignore[var-annotated]
    for version in range(3):
        rows, _ = made.collect(version)
        begun = 0
        for at, row in enumerate(rows):
            before = known.get(int(row["prompt_id"]))
            if before is None or at % 4 >= 2:
                assert bool((row["policy_version"][row["mask"]] == version).all())
                continue
            count = min(int(share * (len(answer(before, width)) - 1)), 5)
            piece = slice(width, width + count)
            for key in ("tokens", "behavior_log_prob", "policy_version"):
                assert torch.equal(row[key][piece], before[key][piece]), key
            assert bool(row["mask"][piece].all())
            assert bool((row["policy_version"][width + count :][row["mask"][width + count :]] == version).all())
            begun += 1
        for row in rows:
            known[int(row["prompt_id"])] = row
        with torch.no_grad():  # the weights never moved, so every unit has ratio 1, whoever is said to have said it
            again = made.policy.log_prob(rows).log_prob
        torch.testing.assert_close(again * rows["mask"], rows["behavior_log_prob"], atol=1e-4, rtol=0.0)
    assert begun > 0


def stored_answers(made: LanguageRollout) -> dict[int, list[list[int]]]:
    pool, width = made.beginning.pool, width_of(made)  # type: ignore[union-attr]
    found = {}
    for number, place in pool.place.items():
        first, count = place * pool.answers, min(int(pool.written[place]), pool.answers)
        found[number] = [answer(row, width) for row in pool.rows[first : first + count]]
    return found


def test_the_same_policy_keeps_its_answers_whole_and_minus_infinity_keeps_none() -> None:
    made, none = few(Verified(lenience=1e-3)), few(Verified(lenience=-math.inf))
    for one in (made, none):
        one.collect(0)
    before = stored_answers(made)
    rows, metrics = made.collect(1)
    width, ends = width_of(made), set(made.env.stop_ids)
    whole = 0
    for at, row in enumerate(rows):
        kept = before.get(int(row["prompt_id"]), [])
        if at % 4 < len(kept):
            want = kept[at % 4]
            size = len(want) if want[-1] in ends else len(want) - 1  # a cut answer says its last token again
            assert answer(row, width)[:size] == want[:size]
            assert want[-1] not in ends or len(answer(row, width)) == size
            whole += want[-1] in ends
    assert whole > 0 and metrics["rollout/begun"] > 0.2 and none.collect(1)[1]["rollout/begun"] == 0.0
    with torch.no_grad():
        again = made.policy.log_prob(rows).log_prob
    torch.testing.assert_close(again * rows["mask"], rows["behavior_log_prob"], atol=1e-4, rtol=0.0)


def test_answers_are_kept_under_their_numbers_with_what_was_said_last() -> None:
    made = few(Verified(lenience=1e-3))
    rows, _ = made.collect(0)
    for key in Verified.KEPT:
        rows[key][1::4] = rows[key][::4]  # two of a group say the same, and say it again later
    for change in (0.0, -1.0):
        rows["behavior_log_prob"] += change * rows["mask"]
        made.beginning.observe(rows, [{}] * 6)  # type: ignore[union-attr]
    pool = made.beginning.pool  # type: ignore[union-attr]
    for number in rows["prompt_id"].unique().tolist():
        first, own_rows = pool.place[number] * 4, rows[rows["prompt_id"] == number][-4:]
        for key in Verified.KEPT:
            assert torch.equal(pool.rows[key][first : first + 4], own_rows[key]), key


@pytest.mark.parametrize(("beginning", "counts"), [(Guided(of=1.0), 0), (Guided(of=0.5), 12), (Forced(">"), 24)])
def test_a_curriculum_counts_what_is_said_without_the_begin_of_others(beginning: Any, counts: int) -> None:
    tracker = {"name": "decayed", "fresh": 1.0, "rest": 1.0}
    made = few(beginning, curriculum=Curriculum(tracker, candidates=1))
    made.collect(0)
    assert float(made.curriculum.tracker.table.sum()) == counts  # type: ignore[union-attr]


def test_what_is_expected_is_of_the_prompt_whatever_it_begins_with() -> None:
    made = few(Guided(of=0.5), prompts=8, curriculum=Curriculum({"name": "neighbours", "width": 0.3}, candidates=1))
    made.collect(0)
    tracker = deepcopy(made.curriculum.tracker)  # type: ignore[union-attr]
    rows, metrics = made.collect(1)
    width = width_of(made)
    want = tracker.value(Prompts(rows["prompt_id"], [row["tokens"][:width].tolist() for row in rows]))
    torch.testing.assert_close(rows["expected"], want.float())
    assert metrics["rollout/begun"] == 0.5 and len(want.unique()) > 1


def test_a_token_stays_with_the_ratio_of_the_two_policies() -> None:
    """Every token's stored probability is four times the present one, so a quarter of the first tokens stay."""
    made = few(Verified(lenience=0.0), prompts=8, group_size=64)
    made.collect(0)
    pool = made.beginning.pool  # type: ignore[union-attr]
    pool.rows["behavior_log_prob"] += math.log(4)
    stored = sum(map(len, stored_answers(made).values()))
    kept = total = 0
    for version in range(1, 4):
        before = {n: len(v) for n, v in stored_answers(made).items()}
        state = made.state_dict()
        rows, metrics = made.collect(version)
        numbers = own(rows)["prompt_id"][::64].tolist()
        total += sum(min(64, before[n]) for n in numbers if n in before)
        kept += round(metrics["rollout/begun"] * len(rows))
        made.beginning.load_state_dict(state["beginning"])  # type: ignore[union-attr]
        made.load_state_dict({**state, "generator": made.generator.get_state(),
                              "problem_generator": made.problem_generator.get_state(),
                              "streams": {n: s.get_state() for n, s in made._streams.items()}})  # fmt: skip
    assert stored > 100 and kept / total == pytest.approx(0.25, abs=0.05)


# ------------------------------------------------------------------------------------------------ refusals, runs


@pytest.mark.parametrize(
    ("env", "options", "words"),
    [
        (Bare(), {"beginning": Guided()}, r"rollout\.beginning: Bare has no solutions"),
        (Bare(), {"beginning": Drafts()}, r"rollout\.beginning: Bare has no solutions"),
        (GuessNumber(), {"beginning": Continued()}, r"rollout\.beginning recites one answer .* up to \d+ turns"),
        (None, {"beginning": Forced("12")}, r"rollout\.beginning\.token='12' is 2 tokens"),
        (None, {"beginning": Guided(), "context": Refill()}, r"rollout\.beginning and rollout\.context both"),
        (None, {"columns": {"n": "begun"}}, r"rollout\.columns\.n names 'begun'"),
        (Bare(), {"columns": {"said": "answer"}}, r"Bare does not say what an answer is"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(env: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        rollout(env, **options)


def test_numbers_that_every_task_has_are_columns() -> None:
    rows, _ = few(None, columns={"turns": "turns", "said": "answer", "sizes": ["length", "correct"]}).collect(0)
    assert rows["turns"].tolist() == [1] * len(rows)
    assert torch.equal(rows["sizes"][:, 0], rows["mask"].sum(-1).float())
    made = few(None, columns={"said": "answer"})
    width = width_of(made)
    rows, _ = made.collect(0)
    texts = [made.env.vote({}, [answer(row, width)]) for row in rows]  # type: ignore[attr-defined]
    assert [n == -1 for n in rows["said"].tolist()] == [text is None for text in texts]
    assert len(set(rows["said"].tolist()) - {-1}) == len(set(texts) - {None})


@pytest.mark.parametrize("name", ["prefix_rl", "soup", "spec_rl"])
def test_the_recipes_begin_with_answers_of_before(name: str) -> None:
    assert cached(*of(name, {FEW: ""}, [f"recipe={name}"])).metrics["rollout/begun"] > 0


@pytest.mark.parametrize("name", ["soup", "spec_rl"])
def test_a_run_with_answers_of_before_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    from run_cases import ALLOW
    from test_resume import COMMON, cut_run, equal, rows_of

    from unified_rl.config import compose, resolve_defaults
    from unified_rl.training.checkpoint import checkpoints, read_checkpoint
    from unified_rl.training.run import resume, train

    kept = [word for word in FEW if not word.startswith("env.held_out")]
    overrides = [*COMMON, *kept, f"recipe={name}", "steps=48", "checkpoint_every=16", f"run_dir={tmp_path / 'whole'}"]
    whole = train(resolve_defaults(compose(overrides, allow=ALLOW), allow=ALLOW), allow=ALLOW)
    saves = checkpoints(whole / "checkpoints")
    cut_run(whole, tmp_path / "part", saves[1])
    resume(str(tmp_path / "part"), allow=ALLOW)
    equal(read_checkpoint(saves[-1]), read_checkpoint(checkpoints(tmp_path / "part" / "checkpoints")[-1]))
    assert rows_of(tmp_path / "part") == rows_of(whole) and rows_of(whole)[-1]["rollout/begun"] > 0
