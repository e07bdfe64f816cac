"""The policy as a judge: what it is asked, what its verdicts earn, and which answers earn them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from run_cases import EasyChain
from test_beginnings import answer, width_of
from test_derived_rows import unended
from test_sources import others, own, rollout

from unified_rl.envs.language import ChainMod, GuessNumber
from unified_rl.envs.language.rewards import Rewards
from unified_rl.errors import ConfigError
from unified_rl.rollout import LanguageRollout
from unified_rl.rollout.rows import GREEDY
from unified_rl.rollout.sources import Demonstrations, Judgements, Pool, Replays, Windows
from unified_rl.rollout.verdicts import Question, SelfJudged

WORDS = {"ask": "=", "yes": "+", "no": "-"}


def made_with(group_size: int = 8, **options: Any) -> LanguageRollout:
    env = EasyChain(modulus=5, terms=3, max_turn_tokens=10)
    return rollout(env, prompts=6, group_size=group_size, **options)


def test_a_verdict_is_what_an_answer_begins_with() -> None:
    env, question = EasyChain(), Question(**WORDS)
    said = [env.tokenizer.encode(text, add_special_tokens=False) for text in ("+1", "-", "1+", "")]
    assert [question.verdict(env, ids) for ids in said] == [True, False, None, None]
    room = EasyChain(max_turn_tokens=8)
    ids = room.tokenizer.encode("123456789", add_special_tokens=False)
    assert room.tokenizer.decode(question.about(room, [ids])) == "456789="
    assert room.tokenizer.decode(question.about(room, [ids, ids[:2]])) == "89=12="


@pytest.mark.parametrize("kind", ["point", "pair"])
def test_verdicts_earn_where_they_agree_with_the_verifier(kind: str) -> None:
    made = made_with(sources={"x": Judgements(answers=4, verdicts=32, kind=kind, **WORDS)})  # type: ignore[arg-type]
    labels = [label for _ in range(3) for label in verdicts_of(made, kind)]
    assert set(labels) == {True, False}


def verdicts_of(made: LanguageRollout, kind: str) -> list[bool]:
    """The right verdict on everything that a collection asks about, whose rewards are compared with it."""
    rows, _ = made.collect(0)
    mine, found, width, decode = own(rows), others(rows), width_of(made), made.env.tokenizer.decode
    right = {int(g): mine["reward"].sum(-1)[mine["group"] == g] > 0.5 for g in mine["group"].unique()}
    bare = [unended(made, answer(row, width)) for row in mine]
    room = 8 if kind == "point" else 3
    ends = {tuple(ids[-room:]): bool(r) for ids, r in zip(bare, mine["reward"].sum(-1) > 0.5, strict=True)}
    assert 32 <= len(found) <= 4 * 32 and bool((found["reward"].sum(-1) > 0).any())
    labels, asked_with = [], made.env.tokenizer.encode("=", add_special_tokens=False)
    for row in found:
        count = int((row["token_mask"] & ~row["mask"]).sum()) - width
        asked, said = answer(row, width)[: count - (kind == "point")], decode(answer(row, width)[count:])
        if kind == "point":
            label = ends[tuple(asked)]
        else:
            prompt = mine["prompt_id"] == row["prompt_id"]
            halves = [ids[-3:] + asked_with for ids, one in zip(bare, prompt.tolist(), strict=True) if one]
            of_prompt = right[int(mine["group"][prompt][0])].int()
            good, bad = halves[int(of_prompt.argmax())], halves[int(of_prompt.argmin())]
            assert asked in (good + bad, bad + good)
            label = asked == good + bad
        labels.append(label)
        assert float(row["reward"].sum()) == float(said.startswith("+") if label else said.startswith("-"))
    with torch.no_grad():
        again = made.policy.log_prob(found).log_prob * found["mask"]
    torch.testing.assert_close(again, found["behavior_log_prob"], atol=1e-4, rtol=0.0)
    return labels


def test_groups_that_agree_give_no_pair() -> None:
    made = made_with(group_size=1, sources={"x": Judgements(kind="pair", **WORDS)})  # type: ignore[arg-type]
    rows, metrics = made.collect(0)
    assert metrics["rollout/joined/x"] == 0.0 and len(others(rows)) == 0


def test_answers_to_half_of_the_prompts_earn_the_policys_own_verdicts_and_teach_nobody_to_judge() -> None:
    plain, _ = made_with().collect(0)
    judged = SelfJudged(of=0.5, verdicts=8, **WORDS)
    made = made_with(context=judged, sources={"x": Judgements(answers=100, verdicts=1, **WORDS)})  # type: ignore[arg-type]
    rows, metrics = made.collect(0)
    mine = own(rows)
    assert torch.equal(mine["tokens"], plain["tokens"]) and torch.equal(mine["reward"][24:], plain["reward"][24:])
    reward = mine["reward"][:24].sum(-1)
    assert metrics["rollout/self_judged"] == 0.5 and metrics["rollout/self_reward"] == pytest.approx(
        float(reward.mean())
    )
    assert bool(((reward * 8) % 1 == 0).all()) and 0 < float(reward.mean()) < 0.5  # a token of 17 is a yes
    assert metrics["rollout/resampled"] == 24 * 8
    assert set(others(rows)["prompt_id"].tolist()) == set(mine["prompt_id"][24:].tolist()) and len(others(rows)) == 24


def test_a_cut_answer_counts_where_the_policy_judged_it() -> None:
    env = ChainMod(modulus=5, terms=3, truncated="mask", max_turn_tokens=10)
    rows, _ = rollout(env, prompts=6, group_size=4, context=SelfJudged(of=0.5, **WORDS)).collect(0)
    assert bool(rows["counted"][:12].all()) and not bool(rows["counted"][12:].all())


def content(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Any answer is worth 2, which is 1 of the weighted sum."""
    return [2.0 for _ in completion_ids]


def test_a_groups_answers_share_what_is_noted_of_their_problem_and_one_reward_function_gave_the_verdict() -> None:
    env = EasyChain(modulus=5, terms=3, max_turn_tokens=10)
    env.reward_with(Rewards([content], weights=[0.5]))
    judged = SelfJudged(of=0.5, verdicts=4, **WORDS)
    sources: Any = {"x": Judgements(answers=3, verdicts=2, **WORDS)}
    made = rollout(env, prompts=6, group_size=4, context=judged, sources=sources, columns={"most": GREEDY})
    rows, metrics = made.collect(0)
    mine = own(rows)
    assert torch.equal(rows["rewards"], 2.0 * rows["reward"]) and bool((mine["reward"][:12] > 0).any())
    most = mine["most"].reshape(6, 4)
    assert torch.equal(most, most[:, :1].expand(6, 4)) and bool(most.any())
    assert metrics["rollout/greedy"] == pytest.approx(float(most.float().mean()))


@pytest.mark.parametrize(
    ("env", "options", "words"),
    [
        (GuessNumber(), {"context": SelfJudged(**WORDS)}, r"rollout\.context recites one answer"),  # type: ignore[arg-type]
        (None, {"context": SelfJudged(ask="=")}, r"rollout\.context\.yes='yes' is no text"),
        (
            None,
            {"sources": {"x": Judgements(ask="=", yes="+", no="+-")}},
            r"rollout\.sources\.x\.yes='\+' and no='\+-'",
        ),
        (
            None,
            {"context": SelfJudged(**WORDS), "columns": {"scores": ["correct"]}},
            r"rollout\.context rewards its rows",
        ),
        (ChainMod(max_turn_tokens=3), {"context": SelfJudged(ask="==", yes="+", no="-")}, r"ask is 2 tokens"),
        (None, {"context": SelfJudged(**WORDS), "sources": {"x": Pool()}}, r"rollout\.sources\.x puts others"),
        (None, {"context": SelfJudged(**WORDS), "sources": {"x": Replays()}}, r"rollout\.sources\.x puts others"),
        (
            None,
            {"context": SelfJudged(**WORDS), "sources": {"w": Windows(), "x": Demonstrations(per_group=1)}},
            r"rollout\.sources\.x puts others",
        ),
        (
            None,
            {"sources": {"x": Judgements(**WORDS)}, "columns": {"scores": ["correct"]}},  # type: ignore[arg-type]
            r"rollout\.sources\.x rewards its rows itself, .* scores \(correct\)",
        ),
    ],
)
def test_what_cannot_be_judged_is_refused_by_name(env: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        rollout(env, **options)
