"""What the policy is shown aside, and what it says again: who sees what, what rows hold, and what is learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import EasyChain
from tensordict import TensorDict
from test_beginnings import answer, width_of
from test_sources import Bare, file_of, rollout
from torch import Tensor

from unified_rl.envs.language import ChainMod, GuessNumber, JsonlProblems
from unified_rl.envs.language.arithmetic import evaluate
from unified_rl.errors import ConfigError
from unified_rl.rollout import LanguageRollout
from unified_rl.rollout.beginnings import Advised, Knowledge
from unified_rl.rollout.context import Hints
from unified_rl.rollout.retries import Rephrased, Retried, SelfHints

LONG: dict[str, Any] = {"modulus": 5, "terms": 3, "max_turn_tokens": 10}


def made_with(**options: Any) -> LanguageRollout:
    return rollout(EasyChain(**LONG), prompts=6, **options)


def solutions_of(rows: TensorDict, made: LanguageRollout) -> list[list[int]]:
    """The chain of each row's prompt, its end left out."""
    width, tokenizer = width_of(made), made.env.tokenizer
    out = []
    for row in rows:
        text = tokenizer.decode(row["tokens"][:width].tolist())
        totals = [int(evaluate(text[: 2 * n + 1]).value) % 5 for n in (1, 2)]
        out.append(tokenizer.encode(f"{totals[0]},{totals[1]}>{totals[1]}", add_special_tokens=False))
    return out


def _noting(generate: Any, seen: list[Any]) -> Any:
    def noted(prompts: Any, **options: Any) -> Any:
        seen.append([ids.tolist() for ids in prompts])
        return generate(prompts, **options)

    return noted


def present(made: LanguageRollout, rows: TensorDict) -> Tensor:
    with torch.no_grad():
        return made.policy.log_prob(rows).log_prob * rows["mask"]


# ------------------------------------------------------------------------------------------------ beginnings


def test_answers_begin_with_the_hint_of_their_problem_which_is_not_learnt() -> None:
    made = made_with(beginning=Knowledge(of=1.0))
    rows, metrics = made.collect(0)
    width = width_of(made)
    for row, whole in zip(rows, solutions_of(rows, made), strict=True):
        assert answer(row, width)[:2] == whole[:2]  # the running total before the last step
        assert not bool(row["mask"][width : width + 2].any()) and bool(row["mask"][width + 2])
    assert metrics["rollout/begun"] == 1.0
    torch.testing.assert_close(present(made, rows), rows["behavior_log_prob"], atol=1e-4, rtol=0.0)


def test_hints_stand_in_a_column_of_the_file(tmp_path: Path) -> None:
    lines = [{"question": f"{a}+1", "answer": f"#### {a + 1}", "help": ["count", f"from {a}"]} for a in range(8)]
    made = JsonlProblems(file_of(tmp_path, lines), max_turn_tokens=8, vocabulary_size=280, held_out=0.1)
    problems = made.problems(3, torch.Generator().manual_seed(0), "train")
    texts = [made.tokenizer.decode(ids) for ids in made.hints(problems, "help")]
    assert texts == [f"count\nfrom {problem['record'][0]}" for problem in problems]
    with pytest.raises(ConfigError, match=r"rollout\.beginning: a problem of JsonlProblems has no column 'hint'"):
        rollout(made, beginning=Knowledge())


def test_half_of_a_group_is_said_with_the_solution_in_view_and_rows_hold_the_bare_prompt() -> None:
    seen: list[Any] = []
    made = made_with(beginning=Advised(of=0.5, share=1.0))
    made.policy.generate = _noting(made.policy.generate, seen)  # type: ignore[method-assign]
    rows, metrics = made.collect(0)
    aside = torch.arange(len(rows)) % 4 < 2
    assert metrics["rollout/begun"] == 0.5 and bool(rows["mask"][:, width_of(made)].all())
    torch.testing.assert_close(present(made, rows), rows["behavior_log_prob"], atol=1e-4, rtol=0.0)
    width = width_of(made)
    shown = [ids[width:] for ids in seen[1]]
    assert shown == [ids for ids, one in zip(solutions_of(rows, made), aside.tolist(), strict=True) if one]
    assert bool((rows["mask"][aside].sum(-1) <= LONG["max_turn_tokens"] - 5).all())  # and counts towards the budget


def test_a_column_says_who_saw_which_advice() -> None:
    seen: list[Any] = []
    made = made_with(beginning=Advised(of=0.25, text="1,1>1", opposite="0"), columns={"told": "advised"})
    told, against = (made.env.tokenizer.encode(text, add_special_tokens=False) for text in ("1,1>1", "0"))
    made.policy.generate = _noting(made.policy.generate, seen)  # type: ignore[method-assign]
    rows, _ = made.collect(0)
    width, size = width_of(made), made.group_size
    assert rows["told"].tolist() == ([1] + [-1] * (size - 1)) * 6
    asked = [tuple(ids) for call in seen for ids in call]
    for row in rows:
        prompt = row["tokens"][:width].tolist()
        assert (*prompt, *(told if int(row["told"]) > 0 else against)) in asked
    torch.testing.assert_close(present(made, rows), rows["behavior_log_prob"], atol=1e-4, rtol=0.0)
    plain = made_with(beginning=Advised(of=0.5), columns={"told": "advised"}).collect(0)[0]
    assert plain["told"].tolist() == ([1] * (size // 2) + [0] * (size // 2)) * 6


def test_an_empty_hint_changes_nothing_so_who_is_called_hinted_is_chance() -> None:
    rows = made_with(beginning=Advised(of=0.5, share=0.0), columns={"told": "advised"}).collect(0)[0]
    bare = made_with().collect(0)[0]
    assert torch.equal(rows["tokens"], bare["tokens"]) and torch.equal(rows["reward"], bare["reward"])
    assert rows["told"].float().mean() == 0.5


def test_a_written_policy_is_shown_in_place_of_solutions() -> None:
    seen: list[Any] = []
    made = made_with(beginning=Advised(of=1.0, text="1,1>1"))
    made.policy.generate = _noting(made.policy.generate, seen)  # type: ignore[method-assign]
    made.collect(0)
    ids = made.env.tokenizer.encode("1,1>1", add_special_tokens=False)
    assert [one[width_of(made) :] for one in seen[0]] == [ids] * 24


# ------------------------------------------------------------------------------------------------ said again


def test_right_hinted_answers_alone_are_kept_where_that_is_wanted() -> None:
    plain, _ = made_with(group_size=1).collect(0)
    rows, metrics = made_with(group_size=1, context=Hints((0.9,), keep="solved")).collect(0)
    every, _ = made_with(group_size=1, context=Hints((0.9,))).collect(0)
    failed, won = plain["reward"].sum(-1) <= 0, every["reward"].sum(-1) > 0
    assert metrics["rollout/hinted"] > 0 and bool((failed & won).any()) and bool((failed & ~won).any())
    for key in ("tokens", "mask", "behavior_log_prob", "reward"):
        assert torch.equal(rows[key][failed & won], every[key][failed & won]), key
        assert torch.equal(rows[key][~failed | ~won], plain[key][~failed | ~won]), key


def test_hints_are_worded_by_the_policy_and_leave_solved_prompts_alone() -> None:
    plain, _ = made_with(group_size=1).collect(0)
    made = made_with(group_size=1, context=SelfHints((0.5,)))
    made.policy.log_prob = None  # type: ignore[method-assign,assignment]  # a hint is no row: nobody scores it again
    rows, metrics = made.collect(0)
    del made.policy.log_prob
    failed, width = plain["reward"].sum(-1) <= 0, width_of(made)
    assert metrics["rollout/hinted"] == int(failed.sum()) / len(rows) and 0 < int(failed.sum()) < len(rows)
    assert metrics["rollout/resampled"] == 2 * int(failed.sum())  # a hint and an answer each
    for key in rows.keys():
        assert torch.equal(plain[key][~failed], rows[key][~failed]), key
    shown = (rows["token_mask"] & ~rows["mask"]).sum(-1) - width
    assert bool((shown[failed] <= 2).all()) and int(shown[failed].max()) == 2  # half of five tokens
    torch.testing.assert_close(present(made, rows), rows["behavior_log_prob"], atol=1e-4, rtol=0.0)


def test_rephrasings_take_the_place_of_the_worst_answers_where_they_earn_more() -> None:
    plain, _ = made_with().collect(0)
    made = made_with(context=Rephrased(rows=1, below=0.9))
    rows, metrics = made.collect(0)
    before, after = (x["reward"].sum(-1).reshape(6, 4) for x in (plain, rows))
    changed = (plain["tokens"] != rows["tokens"]).any(-1).reshape(6, 4)
    assert 0 < int(changed.sum()) == round(metrics["rollout/rephrased"] * 24)
    assert bool((changed.sum(-1) <= 1).all()) and bool((after[changed] > before[changed]).all())
    assert not bool(changed[before.mean(-1) >= 0.9].any())
    first_failed = (before == before.amin(-1, keepdim=True)).int().argmax(-1)
    assert all(bool(changed[g, first_failed[g]]) for g in changed.any(-1).nonzero().flatten().tolist())
    torch.testing.assert_close(present(made, rows), rows["behavior_log_prob"], atol=1e-4, rtol=0.0)


def test_second_tries_go_on_from_the_middle_of_failed_first_ones() -> None:
    plain, _ = made_with().collect(0)
    made = made_with(context=Retried(share=0.5, ask="-"))
    seen: list[Any] = []
    made.policy.generate = _noting(made.policy.generate, seen)  # type: ignore[method-assign]
    rows, metrics = made.collect(0)
    width, ends = width_of(made), set(made.env.stop_ids)
    (dash,) = made.env.tokenizer.encode("-", add_special_tokens=False)
    retried = 0
    for at in range(24):
        first = at - 2
        if at % 4 < 2 or float(plain["reward"][first].sum()) > 0.5:
            assert torch.equal(rows["tokens"][at], plain["tokens"][at])
            continue
        ids = answer(plain[first], width)
        ids = ids[:-1] if ids[-1] in ends else ids
        kept = min(len(ids) // 2, 9)
        assert answer(rows[at], width)[:kept] == ids[:kept]
        shown = [*ids[: 8 - kept], dash]  # the failed answer and the question, as far as there is room
        assert seen[1][retried] == [*plain[first]["tokens"][:width].tolist(), *shown, *ids[:kept]]
        assert not bool(rows["mask"][at, width : width + kept].any()) and bool(rows["mask"][at, width + kept])
        retried += 1
    assert 0 < retried == round(metrics["rollout/retried"] * 24)
    torch.testing.assert_close(present(made, rows), rows["behavior_log_prob"], atol=1e-4, rtol=0.0)


@pytest.mark.parametrize(
    ("env", "options", "words"),
    [
        (Bare(), {"beginning": Advised()}, r"rollout\.beginning: Bare has no solutions"),
        (ChainMod(**LONG), {"beginning": Knowledge("help")}, r"rollout\.beginning: .* no column .help."),
        (ChainMod(**LONG), {"beginning": Advised(text="1" * 10)}, r"rollout\.beginning\.text is 10 tokens"),
        (ChainMod(**LONG), {"beginning": Advised(text="")}, r"rollout\.beginning\.text is 0 tokens"),
        (GuessNumber(), {"beginning": Advised(text="1")}, r"rollout\.beginning recites one answer"),
        (Bare(), {"context": SelfHints()}, r"rollout\.context: Bare has no solutions"),
        (Bare(), {"context": Rephrased()}, r"rollout\.context: Bare has no solutions"),
        (GuessNumber(), {"context": Retried()}, r"rollout\.context recites one answer"),
        (None, {"context": Retried(), "group_size": 1}, r"rollout\.context splits groups in halves"),
    ],
)
def test_what_cannot_be_shown_is_refused_by_name(env: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        rollout(env, **options)
