"""Rows made of a collection's own answers, and groups of before: what they hold, who judged them, and how likely."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_cases import CommaChain, EasyChain
from tensordict import TensorDict
from test_answer_pool import answers as marked
from test_beginnings import SMALL, answer, width_of
from test_guidance import solutions_of
from test_recipes import FEW
from test_sources import Bare, others, own, rollout

from unified_rl.envs.language import GuessNumber
from unified_rl.errors import ConfigError
from unified_rl.replay.pool import AnswerPool
from unified_rl.returns.filters import likelihood_band
from unified_rl.rollout import LanguageRollout, sources
from unified_rl.rollout.beginnings import Guided
from unified_rl.rollout.sources import (
    Assimilated,
    Coached,
    Described,
    Edited,
    Judgements,
    Recoveries,
    Replays,
    Request,
    Revised,
    Shortened,
    Steps,
    Windows,
)
from unified_rl.rollout.sources.mended import Sentences
from unified_rl.training.written import WRITES, written
from unified_rl.units import COUNTED, Source

ANY = "0123456789+-=,>"
NO_SOURCES = {sources.Recited, sources.Request, sources.RowSource}


def made_with(source: Any, env: Any = None, **options: Any) -> LanguageRollout:
    env = env or EasyChain(modulus=5, terms=3, max_turn_tokens=10)
    return rollout(env, prompts=6, sources={"x": source}, **options)


def few(source: Any, **options: Any) -> LanguageRollout:
    return made_with(source, EasyChain(**SMALL), **options)


def present(made: LanguageRollout, rows: TensorDict) -> torch.Tensor:
    with torch.no_grad():
        return made.policy.log_prob(rows).log_prob * rows["mask"]


def unended(made: LanguageRollout, ids: list[int]) -> list[int]:
    return ids[:-1] if ids and ids[-1] in made.env.stop_ids else ids


# ----------------------------------------------------------------------------------------- known before


MADE: dict[str, Any] = {
    "Assimilated": lambda: Assimilated(tries=2, share=1.0),
    "Coached": lambda: Coached(per_group=2, below=1.0),
    "Judgements": lambda: Judgements(answers=4, verdicts=9, ask="=", yes="+", no="-"),
    "Recoveries": lambda: Recoveries(errors=2, recoveries=7),
    "Replays": lambda: Replays(recent=0.5),
    "Shortened": Shortened,
    "Steps": Steps,
    "Windows": Windows,
}


@pytest.mark.parametrize("name", MADE)
def test_what_a_source_writes_is_known_before_it_is_asked(name: str) -> None:
    made = few(MADE[name]())
    known = written(made)
    assert known is not None and set(WRITES) == {getattr(sources, name) for name in sources.__all__} - NO_SOURCES
    for version in range(3):
        rows, _ = made.collect(version)
        assert set(rows["source"].tolist()) <= known.sources and set(rows.keys()) == set(known.columns)
        assert int(rows["group"].unique(return_counts=True)[1].max()) <= known.group_size
        before = (rows["policy_version"] != version) & (rows["policy_version"] >= 0) & rows["mask"]
        assert not bool(before.any()) or known.stored
    assert known.stored == (name in ("Assimilated", "Replays", "Windows"))


# ----------------------------------------------------------------------------------------- first steps


def test_a_step_is_worth_the_mean_of_what_is_said_behind_it() -> None:
    tried: list[TensorDict] = []
    source = Steps(branches=3, share=0.5)
    made = made_with(source)
    rows_of = source.rows

    def noted(request: Any) -> Any:
        def say(*given: Any, **options: Any) -> TensorDict:
            tried.append(request.say(*given, **options))
            return tried[-1]

        return rows_of(request._replace(say=say))

    source.rows = noted  # type: ignore[method-assign]
    rows, _ = made.collect(0)
    whole, steps, width = own(rows), others(rows), width_of(made)
    assert len(steps) == len(whole) == 24 and bool((steps["source"] == int(Source.OFFLINE)).all())
    assert steps["group"].tolist() == whole["group"].tolist()
    (tries,) = tried
    at = 0
    for row in range(24):
        said = int(whole["mask"][row].sum())
        size = max(1, said // 2)
        assert int(steps["mask"][row].sum()) == size and int(steps["token_mask"][row].sum()) == width + size
        assert torch.equal(steps["tokens"][row, : width + size], whole["tokens"][row, : width + size])
        earned = [float(whole["reward"][row].sum())]
        for _ in range(2 if size < said else 0):
            assert tries["tokens"][at, : width + size].tolist() == whole["tokens"][row, : width + size].tolist()
            assert not bool(tries["mask"][at, : width + size].any())
            earned.append(float(tries["reward"][at].sum()))
            at += 1
        assert float(steps["reward"][row].sum()) == pytest.approx(sum(earned) / len(earned))
    assert at == len(tries) > 24 and len(set(steps["reward"].flatten().tolist())) > 2
    torch.testing.assert_close(present(made, steps), steps["behavior_log_prob"], atol=1e-4, rtol=0.0)


def test_whole_answers_are_worth_their_outcome() -> None:
    rows, _ = made_with(Steps(branches=4, share=1.0)).collect(0)
    for key in ("tokens", "mask", "token_mask", "reward", "behavior_log_prob"):
        assert torch.equal(others(rows)[key], own(rows)[key]), key


def test_steps_are_tried_again_behind_what_their_answers_began_with() -> None:
    begins: list[list[int]] = []
    source = Steps(branches=2, share=0.5)
    made = made_with(source, beginning=Guided(), columns={"begun": "begun"}, privileged="chain")
    rows_of = source.rows

    def noted(request: Any) -> Any:
        def say(*given: Any, prefixes: Any, **options: Any) -> TensorDict:
            begins.extend(prefixes)
            return request.say(*given, prefixes=prefixes, **options)

        return rows_of(request._replace(say=say))

    source.rows = noted  # type: ignore[method-assign]
    rows, _ = made.collect(0)
    whole, steps, width = own(rows), others(rows), width_of(made)
    length = whole["mask"].sum(-1)
    again = (length > 1).nonzero().flatten().tolist()
    wanted = [answer(whole[row], width)[: int(whole["begun"][row]) + int(length[row]) // 2] for row in again]
    assert begins == wanted and bool((whole["begun"] > 0).any())
    aligned(steps)


def aligned(rows: TensorDict) -> None:
    """Whoever looks at rows with the solution in view finds the same units, row by row."""
    seen, mask = rows["privileged_mask"], rows["mask"]
    assert torch.equal(seen.sum(-1), mask.sum(-1)) and bool(mask.any())
    assert torch.equal(rows["privileged_tokens"][seen], rows["tokens"][mask])


# ----------------------------------------------------------------------------------------- with a solution in view


def test_weak_prompts_get_an_answer_that_saw_the_solution_and_is_weighed_as_that() -> None:
    made = made_with(Coached(per_group=2, below=0.6, share=1.0))
    rows, _ = made.collect(0)
    mean = own(rows)["reward"].sum(-1).reshape(6, 4).mean(-1)
    weak = own(rows)["group"][::4][mean < 0.6]
    found = others(rows)
    assert 0 < len(weak) < 6 and found["group"].tolist() == weak.repeat_interleave(2).tolist()
    assert bool((found["source"] == int(Source.OFFLINE)).all()) and bool(
        (found["policy_version"][found["mask"]] == -1).all()
    )
    assert bool(found["mask"][:, width_of(made)].all())  # nothing of what was shown is there
    gap = (present(made, found) - found["behavior_log_prob"]).abs()
    assert float(gap.max()) > 1e-2 and bool((found["behavior_log_prob"] <= 0).all())
    assert solutions_of(found, made)  # the prompts are those of the groups


def test_a_prompt_that_nobody_solves_gets_the_latest_right_answer_to_it() -> None:
    source = Assimilated(tries=4, share=0.5)
    made = few(source, group_size=1)
    kept: dict[int, torch.Tensor] = {}
    joined = 0
    for version in range(4):
        rows, _ = made.collect(version)
        mine, found = own(rows), others(rows)
        failed = (mine["reward"].sum(-1) <= 0).tolist()
        for row in found:
            at = mine["group"].tolist().index(int(row["group"]))
            assert failed[at] and float(row["reward"].sum()) > 0 and int(row["prompt_id"]) == int(mine["prompt_id"][at])
            known = kept.get(int(row["prompt_id"]))
            assert known is None or torch.equal(row["tokens"], known)
            kept[int(row["prompt_id"])] = row["tokens"]
            joined += 1
        for row in mine:
            if float(row["reward"].sum()) > 0:
                kept[int(row["prompt_id"])] = row["tokens"]
    assert joined > 2
    assert {n: held[0]["tokens"][0].tolist() for n, held in source._answers.items()} == {
        n: tokens.tolist() for n, tokens in kept.items()
    }


# ------------------------------------------------------------------------------------------------ of own answers


def test_failed_answers_become_prompts_behind_which_the_policy_recovers_in_groups_of_their_own() -> None:
    made = made_with(Recoveries(errors=2, recoveries=3, share=0.5, diagnosis="-"))
    rows, _ = made.collect(0)
    mine, found, width = own(rows), others(rows), width_of(made)
    failed = mine[mine["reward"].sum(-1) <= 0]
    begins = {
        tuple(unended(made, ids)[: len(unended(made, ids)) // 2][:8]) for ids in (answer(r, width) for r in failed)
    }
    dash = made.env.tokenizer.encode("-", add_special_tokens=False)
    assert len(found) == 6 and len(set(found["group"].tolist())) == 2
    assert not set(found["group"].tolist()) & set(mine["group"].tolist())
    for row in found:
        count = int((row["token_mask"] & ~row["mask"]).sum()) - width
        begin = answer(row, width)[:count]
        assert begin[-1:] == dash and tuple(begin[:-1]) in begins and bool(row["mask"][width + count])
    torch.testing.assert_close(present(made, found), found["behavior_log_prob"], atol=1e-4, rtol=0.0)


def test_sentences_end_with_their_mark() -> None:
    tokenizer = EasyChain().tokenizer
    ids = tokenizer.encode("41,5>2", add_special_tokens=False)
    cut = Sentences(",>", tokenizer).of(ids)
    assert [tokenizer.decode(list(one)) for one in cut] == ["41,", "5>", "2"]


def test_an_edit_replaces_the_first_stretch_that_differs_and_the_next_only_where_it_may() -> None:
    made = made_with(Edited(edits=1, separators=ANY))
    source, encode = made.sources["x"], made.env.tokenizer.encode
    ids = [encode(text, add_special_tokens=False) for text in ("14,2>3", "4,5>5")]
    stop = made.env.stop_ids[:1]
    once = source._edited(ids[0], ids[1] + stop)  # type: ignore[attr-defined]
    assert made.env.tokenizer.decode(once) == "4,2>3"
    source.edits = 2  # type: ignore[attr-defined]
    assert made.env.tokenizer.decode(source._edited(ids[0], ids[1] + stop)) == "4,5>3"  # type: ignore[attr-defined]
    assert source._edited(ids[1], ids[1] + stop) is None  # type: ignore[attr-defined]


def test_edited_answers_join_where_they_earn_more_at_the_present_probability() -> None:
    made = made_with(Edited(edits=1), CommaChain(modulus=5, terms=3, max_turn_tokens=10))
    rows, _ = made.collect(0)
    mine, found = own(rows), others(rows)
    total = mine["reward"].sum(-1).reshape(6, 4)
    assert 0 < len(found) <= int((total.amin(-1) <= 0).sum()) and bool((found["reward"].sum(-1) > 0).all())
    assert set(found["group"].tolist()) <= set(mine["group"][::4][total.amin(-1) <= 0].tolist())
    torch.testing.assert_close(present(made, found), found["behavior_log_prob"], atol=1e-4, rtol=0.0)


def test_a_revision_goes_from_what_was_wrong_through_a_thought_to_the_right_answer() -> None:
    made = made_with(
        Revised(thought="-", separators=ANY), CommaChain(modulus=5, terms=3, max_turn_tokens=12), group_size=16
    )
    rows, _ = made.collect(0)
    mine, found, width = own(rows), others(rows), width_of(made)
    dash = made.env.tokenizer.encode("-", add_special_tokens=False)
    assert len(found) > 0 and bool((found["source"] == int(Source.EXPERT)).all())
    for row in found:
        group = mine[mine["group"] == row["group"]]
        said, total = [answer(one, width) for one in group], group["reward"].sum(-1)
        good = min((ids for ids, right in zip(said, (total > 0).tolist(), strict=True) if right), key=len)
        bad = unended(made, said[int(total.argmin())])
        same = next(n for n, (a, b) in enumerate(zip(good, bad, strict=False)) if a != b)
        whole, masked = answer(row, width), row["mask"][width : int(row["token_mask"].sum())]
        assert whole == bad[: same + 1] + dash + good[same:]
        assert masked.tolist() == [False] * (same + 1) + [True] * (len(whole) - same - 1)


def test_the_shortest_right_answer_is_cut_where_the_policy_gets_on() -> None:
    def shortest(shares: tuple[float, ...]) -> tuple[dict[int, int], dict[int, int]]:
        made = made_with(Shortened(shares))
        rows, _ = made.collect(0)
        width, mine, found = width_of(made), own(rows), others(rows)
        right = mine[mine["reward"].sum(-1) > 0.5]
        best = {int(g): min(len(answer(r, width)) for r in right[right["group"] == g]) for g in right["group"].unique()}
        assert bool((found["reward"].sum(-1) > 0.5).all()) and bool(found["mask"][:, width].all())
        assert sorted(found["group"].tolist()) == sorted(best)
        return best, {int(row["group"]): len(answer(row, width)) for row in found}

    best, whole = shortest(())
    assert whole == best
    _, cut = shortest((0.3, 0.6))
    assert all(cut[g] <= best[g] for g in best) and any(cut[g] < best[g] for g in best)


# ------------------------------------------------------------------------------------------------ groups of before


def test_answers_are_drawn_in_proportion_to_the_exponential_of_their_score() -> None:
    pool, rng = AnswerPool(2, 3, 1), np.random.default_rng(0)
    pool.put(5, None, 0, marked(0, 1))
    score = np.array([0.0, 1.0, np.inf])  # the third slot holds nothing
    first = [int(pool.likely(0, 1, score, 0.5, rng)[0]) for _ in range(4000)]
    assert np.mean(first) == pytest.approx(1 / (1 + np.exp(-2.0)), abs=0.02) and set(first) == {0, 1}
    assert sorted(pool.likely(0, 5, score, 0.5, rng).tolist()) == [0, 1]


def test_kept_answers_come_as_groups_of_one_prompt_beside_as_many_fresh_ones_as_wanted() -> None:
    source = Replays(recent=0.5)
    made = few(source)
    assert len(others(made.collect(0)[0])) == 0
    rows, _ = made.collect(1)
    found, mine = others(rows), own(rows)
    groups = found["group"].unique()
    assert 1 <= len(groups) <= 6 and not set(groups.tolist()) & set(mine["group"].tolist())
    for group in groups:
        one = found[found["group"] == group]
        assert len(one["prompt_id"].unique()) == 1 and 2 <= len(one) <= 4
        assert len({tuple(ids) for ids in one["tokens"].tolist()}) == len(one)
    assert bool((found["policy_version"][found["mask"]] == 0).all())
    torch.testing.assert_close(present(made, found), found["behavior_log_prob"], atol=1e-4, rtol=0.0)


def test_whole_groups_of_the_last_collections_are_the_share_of_an_update_until_it_ends() -> None:
    made = few(Windows(share=0.5, windows=2, until=4))
    before: list[TensorDict] = []
    for version in range(6):
        rows, _ = made.collect(version)
        found, mine = others(rows), own(rows)
        groups = found["group"].unique()
        assert len(groups) == (6 if 0 < version < 4 else 0)
        known = {
            tuple(map(tuple, o["tokens"][o["group"] == g].tolist())) for o in before[-2:] for g in o["group"].unique()
        }
        for group in groups:
            assert tuple(map(tuple, found["tokens"][found["group"] == group].tolist())) in known
        assert not set(groups.tolist()) & set(mine["group"].tolist())
        before.append(mine)


def test_collections_that_count_for_nothing_leave_no_group_to_replay() -> None:
    source = Windows(share=0.5)
    source.check_group(4, "rollout.sources.x")
    rows, _ = few(Windows()).collect(0)
    source.observe(rows.set(COUNTED, torch.zeros(len(rows), dtype=torch.bool)))
    told = (None, [{}] * 6, None, None, 1, torch.Generator(), None, torch.arange, rows, None, None)
    assert source.rows(Request(*told)) is None  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------- the band, refusals, runs


def test_turns_are_kept_whose_mean_is_within_the_band() -> None:
    record = TensorDict(
        {
            "behavior_log_prob": torch.tensor([[-0.1, -0.3, -3.0, -1.0], [-9.0, -0.5, -0.5, -9.0]]),
            "mask": torch.tensor([[True, True, True, True], [False, True, True, False]]),
            "step_index": torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]]),
            "reward": torch.zeros(2, 2),
        },
        batch_size=[2],
    )
    kept = likelihood_band(record, torch.zeros(2, 2), low=0.25, high=1.9)
    assert kept.tolist() == [[False, False, False, False], [False, True, True, False]]  # means 0.2, 2 | 0.5, 0.5
    assert torch.equal(likelihood_band(record, torch.zeros(2, 2)), record["mask"])


@pytest.mark.parametrize(
    ("env", "source", "words"),
    [
        (Bare(), Coached(), r"rollout\.sources\.x: Bare has no solutions"),
        (Bare(), Assimilated(), r"rollout\.sources\.x: Bare has no solutions"),
        (Bare(), Edited(), r"rollout\.sources\.x: Bare has no solutions"),
        (GuessNumber(), Recoveries(), r"rollout\.sources\.x recites one answer"),
        (GuessNumber(), Revised(), r"rollout\.sources\.x recites one answer"),
        (GuessNumber(), Shortened(), r"rollout\.sources\.x recites one answer"),
    ],
)
def test_what_cannot_be_made_is_refused_by_name(env: Any, source: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        rollout(env, sources={"x": source})


@pytest.mark.parametrize("source", [Replays(), Windows()])
def test_groups_of_one_are_refused(source: Any) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.sources\.x brings groups .* rollout\.group_size=1 has none"):
        rollout(sources={"x": source}, group_size=1)


@pytest.mark.parametrize("name", ["bepa", "tba", "remix"])
def test_a_run_with_answers_of_before_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    from run_cases import ALLOW
    from test_resume import COMMON, cut_run, equal, rows_of

    from unified_rl.config import compose, resolve_defaults
    from unified_rl.training.checkpoint import checkpoints, read_checkpoint
    from unified_rl.training.run import resume, train

    kept = [word for word in FEW if not word.startswith("env.held_out")]
    kept = [word for word in kept if name != "bepa" or not word.startswith(("rollout.group_size", "rollout.prompts"))]
    small = {"bepa": ["rollout.group_size=2", "rollout.prompts=8"], "tba": ["rollout.sources.kept.recent=0.5"]}
    words = [*COMMON, *kept, f"recipe={name}", *small.get(name, []), "steps=48", "checkpoint_every=16"]
    overrides = [*words, f"run_dir={tmp_path / 'whole'}"]
    whole = train(resolve_defaults(compose(overrides, allow=ALLOW), allow=ALLOW), allow=ALLOW)
    saves = checkpoints(whole / "checkpoints")
    cut_run(whole, tmp_path / "part", saves[1])
    resume(str(tmp_path / "part"), allow=ALLOW)
    equal(read_checkpoint(saves[-1]), read_checkpoint(checkpoints(tmp_path / "part" / "checkpoints")[-1]))
    assert rows_of(tmp_path / "part") == rows_of(whole)
    (joined,) = {key for key in rows_of(whole)[-1] if key.startswith("rollout/joined/")}
    assert any(row[joined] > 0 for row in rows_of(whole)[1:])


def test_a_description_earns_the_mean_of_the_chains_behind_it(tmp_path: Path) -> None:
    from run_cases import LANGUAGE, merged, model

    folder = model(tmp_path, merged(LANGUAGE, ["env.max_turn_tokens=10"]))
    made = made_with(Described(folder, chains=8, share=0.5))
    seen: list[Any] = []
    source, judge = made.sources["x"], made._judged
    made._judged = lambda *given, **named: seen.append(judge(*given, **named)) or seen[-1]  # type: ignore[method-assign]
    rows, _ = made.collect(0)
    mine, found, width = own(rows), others(rows), width_of(made)
    (chains,) = seen
    described, right = found[found["source"] == int(Source.OFFLINE)], found[found["source"] == int(Source.EXPERT)]
    total = chains["reward"].sum(-1)
    assert len(chains) == 24 * 8 and len(right) == int((total > 0.5).sum()) > 0
    worth = total.reshape(24, 8).mean(-1)
    at = 0
    for row, mean in zip(mine, worth.tolist(), strict=True):
        half = len(unended(made, answer(row, width))) // 2
        if not half:
            continue
        assert answer(described[at], width) == answer(row, width)[:half] and bool(described["mask"][at, width])
        assert float(described["reward"][at].sum()) == pytest.approx(mean)
        at += 1
    assert (
        at == len(described) and len(described["group"].unique()) == 6 and 0 < float(worth.max()) > float(worth.min())
    )
    torch.testing.assert_close(present(made, described), described["behavior_log_prob"], atol=1e-4, rtol=0.0)
    assert source.most(6) == 24 * 9
