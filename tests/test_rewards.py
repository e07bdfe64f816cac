"""Reward functions of a run: what they are given, what they may return, what is logged of them, and what is refused."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import unified_rl as ur
from unified_rl.config import compose, resolve_defaults
from unified_rl.envs.language import Calculator, ChainMod, GuessNumber, JsonlProblems
from unified_rl.envs.language.rewards import Rewards
from unified_rl.errors import ConfigError, DataError, RolloutError
from unified_rl.instantiate import allowing
from unified_rl.training.checkpoint import checkpoints
from unified_rl.training.metrics import read_metrics
from unified_rl.training.run import Job, train

SOURCE = """
import asyncio, os, time

SEEN = []

def accuracy(prompts, completions, reference=None, **columns):
    SEEN.append({"prompts": prompts, "completions": completions, "columns": sorted(columns)})
    reference = reference or ["?"] * len(completions)
    return [float(r in c) for c, r in zip(completions, reference)]

def length(completion_ids):
    return [0.5 * len(ids) for ids in completion_ids]

def nothing(completions):
    return [None] * len(completions)

def some(completions):
    return [1.0 if at % 2 else None for at in range(len(completions))]

async def slow_one(completions):
    await asyncio.sleep(0.2)
    return [1.0] * len(completions)

async def slow_two(completions):
    await asyncio.sleep(0.2)
    return [2.0] * len(completions)

def bad(completions):
    if any("x" in c for c in completions):
        raise ValueError("no x,\\nplease")
    return [1.0] * len(completions)

async def never(completions):
    await asyncio.sleep(60)

def flaky(completions):
    SEEN.append(len(completions))
    if len(SEEN) == 1:
        raise OSError("busy")
    return [1.0] * len(completions)

def hangs(completions):
    if any("x" in c for c in completions):
        time.sleep(60)
    return [1.0] * len(completions)

def dies(completions):
    if any("x" in c for c in completions):
        os._exit(3)
    return [float(os.getpid())] * len(completions)

def pids(completions):
    return [float(os.getpid()) for _ in completions]

def wrong(completions):
    return [1.0]

def word(completions):
    return ["yes"] * len(completions)

def nan(completions):
    return [float("nan")] * len(completions)

def needs(completions, colour):
    return [1.0] * len(completions)

def tagged(completions, *, tag="t", scale: float = 1.0):
    return [scale * (tag in c) for c in completions]
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of one's own, ``own_rewards``, that Python can import."""
    (tmp_path / "own_rewards.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    import own_rewards  # type: ignore[import-not-found]

    return own_rewards


def own(*names: Any, **settings: Any) -> Rewards:
    named = [f"own_rewards:{name}" if isinstance(name, str) and name.islower() else name for name in names]
    with allowing(["own_rewards"]):
        return Rewards(named, **settings)


def task(rewards: Rewards | None = None, **settings: Any) -> ChainMod:
    env = ChainMod(max_turn_tokens=16, **settings)
    if rewards is not None:
        env.reward_with(rewards)
    return env


def problem(env: ChainMod, **more: Any) -> dict[str, Any]:
    drawn = env.problems(1, torch.Generator().manual_seed(0))[0]
    return {**drawn, **more}


def answer(env: Any, texts: Sequence[str], problems: Any = None, cut: Sequence[int] = ()) -> Any:
    """The task's answer to one turn of each conversation; those of ``cut`` ran out of their budget."""
    ids = [own + ([] if at in cut else [env.codec.end_id]) for at, own in enumerate(env.codec.encode(texts))]
    finished = torch.tensor([at not in cut for at in range(len(texts))])
    return env.respond(list(problems or [problem(env)] * len(texts)), [[one] for one in ids], finished)


def told(env: Any, result: Any, name: str) -> list[float]:
    return [round(v, 4) for v in result.info[f"rewards/{name}"].tolist()]


# ---------------------------------------------------------------------------------------------- what they see and give


def test_functions_get_what_their_signature_takes_and_are_added_up_by_weight(module: Any) -> None:
    env = task(own("accuracy", "length", weights=[2.0, 0.1]))
    rows = [problem(env, reference="5", columns={"level": 3}), problem(env, reference="7", columns={})]
    result = answer(env, ["1,2>5", ">5"], rows)
    assert told(env, result, "accuracy") == [1.0, 0.0] and told(env, result, "length") == [3.0, 1.5]
    assert result.reward.tolist() == pytest.approx([2.3, 0.15])
    seen = module.SEEN[-1]
    assert seen["prompts"] == [row["text"] for row in rows] and seen["completions"] == ["1,2>5", ">5"]
    assert seen["columns"] == ["completion_ids", "level", "max_completion_length", "prompt_ids", "totals", "truncated"]
    assert result.done.tolist() == [True, True] and env.reward_names == ("rewards/accuracy", "rewards/length")


def test_the_tasks_own_verifier_is_one_of_them_by_name(module: Any) -> None:
    env = task(own({"name": "task", "weight": 3.0}, "length"))
    row = problem(env)
    right = f">{env._spelled[row['totals'][-1]]}"
    result = answer(env, [right, ">"], [row, row])
    assert told(env, result, "task") == [1.0, 0.0] and result.reward.tolist() == [3.0 + 1.5, 1.0]
    assert result.info["correct"].tolist() == [1.0, 0.0]


def test_none_is_left_out_of_the_sum_and_a_row_without_any_score_out_of_the_update(module: Any) -> None:
    env = task(own("some", "length"))
    result = answer(env, [">1", ">12"])
    assert result.reward.tolist() == [1.5, 3.0] and result.info["counted"].tolist() == [1.0, 1.0]
    assert result.info["rewards/some"].isnan().tolist() == [True, False]
    assert result.info["rewards/some_none"].tolist() == [1.0, 0.0]
    none = answer(task(own("nothing")), [">1", ">2"])
    assert none.reward.tolist() == [0.0, 0.0] and none.info["counted"].tolist() == [0.0, 0.0]


def test_completions_of_records_with_messages_are_messages(module: Any) -> None:
    env = task(own("accuracy", "pids"))
    asked = [{"role": "user", "content": "2+3?"}]
    module.SEEN.clear()
    answer(env, [">5"], [problem(env, messages=asked, reference=">5")])
    assert module.SEEN[-1]["prompts"] == [asked]
    assert module.SEEN[-1]["completions"] == [[{"role": "assistant", "content": ">5"}]]


def test_special_tokens_are_seen_on_request(module: Any) -> None:
    ids = {"name": "own_rewards:tagged", "tag": "</s>", "skip_special_tokens": False, "label": "with"}
    env = task()
    ids["tag"] = env.tokenizer.eos_token
    env.reward_with(own(ids, {**ids, "skip_special_tokens": True, "label": "without"}))
    result = answer(env, [">1", ">2"], cut=[1])
    assert told(env, result, "with") == [1.0, 0.0] and told(env, result, "without") == [0.0, 0.0]


def test_asynchronous_functions_run_together(module: Any) -> None:
    env = task(own("slow_one", "slow_two"))
    began = time.monotonic()
    assert answer(env, [">1"]).reward.tolist() == [3.0]
    assert time.monotonic() - began < 0.38


def test_conversations_of_several_turns_are_scored_when_they_end_with_what_was_said_in_all(module: Any) -> None:
    env = Calculator()
    env.reward_with(own("accuracy", {"name": "task", "weight": 1.0}))
    row = {**env.problems(1, torch.Generator().manual_seed(0))[0], "expression": "1+2", "value": 3, "reference": "R:3;"}
    first, last = env.codec.encode(["C:1+2;", "A:3;"])
    result = env.respond([row], [[first]], torch.tensor([True]))
    assert result.reward.tolist() == [0.0] and not bool(result.done[0])
    result = env.respond([row], [[first, last]], torch.tensor([True]))
    assert module.SEEN[-1]["completions"] == ["C:1+2;R:3;A:3;"]
    assert result.reward.tolist() == [2.0] and bool(result.done[0])


def test_references_that_the_verifier_cannot_read_are_for_functions(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"question": f"q{i}", "answer": f"town {i}"}) + "\n" for i in range(20)))
    env = JsonlProblems(str(file), vocabulary_size=270)
    with pytest.raises(DataError, match=r"got 'town \d+' \(for text set reward=exact, .*verifier=math\)"):
        env.problems(1, torch.Generator())
    env.reward_with(Rewards(["exact", "numeric"]))
    row = env.problems(1, torch.Generator().manual_seed(0))[0]
    result = answer(env, [str(row["columns"]["answer"]), "town x"], [row, row])
    assert told(env, result, "exact") == [1.0, 0.0] and bool(result.info["rewards/numeric"].isnan().all())
    assert result.reward.tolist() == [1.0, 0.0] and result.info["correct"].tolist() == [0.0, 0.0]


def test_text_is_compared_in_whatever_column_it_stands(tmp_path: Path) -> None:
    for column, options in (("completion", {}), ("worked", {"answer_key": "worked"})):
        file = tmp_path / f"{column}.jsonl"
        file.write_text("".join(json.dumps({"question": f"q{i}", column: f" town {i}"}) + "\n" for i in range(20)))
        env = JsonlProblems(str(file), vocabulary_size=270, **options)
        env.reward_with(Rewards(["exact"]))
        row = env.problems(1, torch.Generator().manual_seed(0))[0]
        assert answer(env, [row["solution"], " town x"], [row, row]).reward.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("name", ["exact", "numeric", "math"])
def test_readers_of_answers_are_refused_where_these_stand_behind_a_mark_of_the_tasks_own(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^reward \({name}\) finds .* behind '>', .*; use reward=task"):
        task(Rewards([name]))


def test_rows_of_sources_are_rewarded_too(module: Any) -> None:
    shown = "rollout.sources={shown: {_target_: unified_rl.rollout.sources.Demonstrations, per_group: 1}}"
    given = [*settings("reward=[task, own_rewards:length]", shown, "env.truncated=mask")]
    job = Job(resolve_defaults(compose(given, allow=["own_rewards"]), allow=["own_rewards"]), ["own_rewards"])
    rows, _ = job.make_rollout().collect(0)
    joined = rows[rows["source"] != 0]
    assert len(joined) == 4 and bool(joined["counted"].all()) and joined["rewards"][:, 0].tolist() == [1.0] * 4
    assert torch.allclose(joined["rewards"].sum(-1), joined["reward"].sum(-1))


# ---------------------------------------------------------------------------------------------- cut answers


@pytest.mark.parametrize(
    ("settings", "reward", "task_part", "counted"),
    [
        ({}, 1.0, 0.0, 1.0),  # functions see it; the verifier's own default stays
        ({"truncated": "score"}, 2.0, 1.0, 1.0),
        ({"truncated": "zero"}, 0.0, 0.0, 1.0),
        ({"truncated": "mask"}, 0.0, 0.0, 0.0),
    ],
)
def test_what_becomes_of_cut_answers(
    module: Any, settings: Any, reward: float, task_part: float, counted: float
) -> None:
    with allowing(["own_rewards"]):
        env = task(Rewards(["task", "own_rewards:accuracy"]), **settings)
    row = problem(env, reference=">")
    said = f">{env._spelled[row['totals'][-1]]}"
    result = answer(env, [said, said], [row, row], cut=[0])
    assert result.reward.tolist() == [reward, 2.0] and result.info["counted"].tolist() == [counted, 1.0]
    assert result.info["rewards/task"].tolist() == [task_part, 1.0]
    assert result.info["truncated"].tolist() == [1.0, 0.0]


def test_a_reward_of_cut_answers_holds_with_functions_too(module: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"question": f"q{i}", "answer": str(i)}) + "\n" for i in range(20)))
    env = JsonlProblems(str(file), vocabulary_size=270, truncated_reward=-1.0)
    env.reward_with(own("length"))
    row = env.problems(1, torch.Generator().manual_seed(0))[0]
    assert answer(env, ["12", "12"], [row, row], cut=[1]).reward.tolist()[1] == -1.0
    for truncated, worth in (("zero", None), ("zero", -1.0), ("mask", -1.0), ("score", 0.5), ("mask", None)):
        with pytest.raises(ConfigError, match=rf"^env\.truncated={truncated} and env\.truncated_reward=.* contradict"):
            JsonlProblems(str(file), vocabulary_size=270, truncated=truncated, truncated_reward=worth)  # type: ignore[arg-type]


def test_without_functions_the_three_words_say_what_truncated_reward_says() -> None:
    for truncated, reward in (("score", 1.0), ("zero", 0.0), ("mask", 0.0), (None, 0.0)):
        env = ChainMod(truncated=truncated)  # type: ignore[arg-type]
        row = problem(env)
        result = answer(env, [f">{env._spelled[row['totals'][-1]]}"], [row], cut=[0])
        assert result.reward.tolist() == [reward]
        assert ("counted" in result.info) == (truncated == "mask") == ("counted" in env.columns)


# ---------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("name", ["bad", "hangs"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_function_that_fails_is_named_with_its_row_or_the_row_is_left_out(
    module: Any, name: str, workers: int
) -> None:
    seconds = 0.3 if name == "hangs" else 30.0
    env = task(own(name, retries=0, seconds=seconds, workers=workers), tokenizer=None)
    env.codec.decode_all = lambda ids, skip=True: ["a", "x", "b"][: len(ids)]  # type: ignore[method-assign]
    rows = [problem(env, text=f"prompt {at}", prompt_id=at) for at in range(3)]
    reason = r"raised ValueError: no x, please" if name == "bad" else r"has not returned after 0\.3 s"
    with pytest.raises(
        RolloutError, match=rf"^reward \(own_rewards:{name}\) {reason} on row 1 \(prompt 'prompt 1'\); "
    ):
        answer(env, ["1", "2", "3"], rows)
    judge = env._judge_rewards
    assert judge is not None
    judge.rewards.errors = "skip"
    result = answer(env, ["1", "2", "3"], rows)
    assert result.reward.tolist() == [1.0, 0.0, 1.0]
    assert result.info["counted"].tolist() == [1.0, 0.0, 1.0] == result.info["scored"].tolist()
    assert result.info["reward_errors"].tolist() == [0.0, 1.0, 0.0]
    judge.rewards.close()


@pytest.mark.parametrize("name", ["hangs", "never"])
def test_a_call_that_hangs_is_given_up_in_other_threads_and_event_loops_too(module: Any, name: str) -> None:
    env = task(own(name, retries=0, seconds=0.3))
    env.codec.decode_all = lambda ids, skip=True: ["x"] * len(ids)  # type: ignore[method-assign]

    async def inside() -> Any:
        return answer(env, [">1"])

    for call in (lambda: answer(env, [">1"]), lambda: asyncio.run(inside())):
        with ThreadPoolExecutor(1) as threads:
            began = time.monotonic()
            with pytest.raises(RolloutError, match=r"has not returned after 0\.3 s on row 0"):
                threads.submit(call).result()
            assert time.monotonic() - began < 10


def test_closing_does_not_wait_for_a_call_that_hangs(module: Any) -> None:
    rewards = own("hangs", retries=0, seconds=100.0, workers=1)
    env = task(rewards)
    env.codec.decode_all = lambda ids, skip=True: ["x"] * len(ids)  # type: ignore[method-assign]
    row = problem(env)
    with ThreadPoolExecutor(1) as threads:
        under_way = threads.submit(answer, env, [">1"], [row])
        while rewards._pool is None or rewards._pool.workers[0]._process is None:
            time.sleep(0.01)
        time.sleep(0.5)
        began = time.monotonic()
        rewards.close()
        assert time.monotonic() - began < 10
        with pytest.raises(Exception, match=r"signal SIGKILL|cannot schedule"):
            under_way.result()


def test_a_call_is_tried_again(module: Any) -> None:
    env = task(own("flaky", retries=1))
    assert answer(env, [">1", ">2"]).reward.tolist() == [1.0, 1.0] and module.SEEN == [2, 2]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("wrong", "returned 1 values for 2 completions"),
        ("word", r"returned 'yes' \(str\), not a number or None"),
        ("nan", "returned nan; return None where there is no score"),
    ],
)
def test_what_is_no_list_of_numbers_is_named(module: Any, name: str, why: str) -> None:
    with pytest.raises(RolloutError, match=why):
        answer(task(own(name, retries=0)), [">1", ">2"])


def test_worker_processes_give_the_same_in_the_same_order_and_one_that_dies_is_replaced(module: Any) -> None:
    inside, outside = task(own("accuracy", "length")), task(own("accuracy", "length", "pids", workers=2))
    rows = [problem(inside, reference=str(at), prompt_id=at) for at in range(5)]
    texts = [f">{at}" for at in (0, 1, 9, 3, 9)]
    one, other = answer(inside, texts, rows), answer(outside, texts, rows)
    for name in ("accuracy", "length"):
        assert told(inside, one, name) == told(outside, other, name)
    assert outside._judge_rewards is not None
    pool = outside._judge_rewards.rewards._pool
    workers = [worker._process for worker in pool.workers]  # type: ignore[attr-defined]
    assert set(told(outside, other, "pids")) <= {float(process.pid) for process in workers}
    outside._judge_rewards.rewards.close()
    assert all(process.poll() is not None for process in workers)
    with allowing(["own_rewards"]):
        foreign = Rewards(["own_rewards:length"], workers=1)
    foreign.allow = []  # the workers ask for themselves
    with pytest.raises(ConfigError, match="outside the allowed packages; start with --allow own_rewards"):
        answer(task(foreign), [">1"])
    env = task(own("dies", retries=0, workers=1))
    env.codec.decode_all = lambda ids, skip=True: ["a", "x"][: len(ids)]  # type: ignore[method-assign]
    rows = [problem(env, prompt_id=at) for at in range(2)]
    assert env._judge_rewards is not None
    with pytest.raises(RolloutError, match=r"ended its process \(exit code 3\) on row 1"):
        answer(env, ["1", "2"], rows)
    env._judge_rewards.rewards.errors = "skip"
    assert answer(env, ["1", "2"], rows).info["counted"].tolist() == [1.0, 0.0]
    env._judge_rewards.rewards.close()


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("functions", "settings", "message"),
    [
        (["own_rewards:accuracy"], {"allow": []}, r"reward 'own_rewards.accuracy' is outside .* --allow own_rewards"),
        (["own_rewards:acuracy"], {}, "did you mean 'accuracy'"),
        (["own_rewards:zzz"], {}, "has no 'zzz'; known: (?!.*(asyncio|SEEN|os|time))"),
        (["own_rewards:nosuch_w"], {}, "has no 'nosuch_w'; known: (nothing|slow_two|slow_one|word)"),
        (["exct"], {}, "reward 'exct' is no reward; did you mean 'exact'"),
        (["overlong"], {}, "needs cache"),
        ([{"name": "overlong", "cache": 0}], {}, "reward.cache=0 must be at least 1"),
        ([{"name": "overlong", "cache": 9, "max_length": 8}], {}, "cache=9 must be at most max_length=8"),
        ([{"name": "repetition", "max_penalty": 1.0}], {}, "max_penalty=1.0 must be at most 0"),
        ([{"name": "format", "pattern": "("}], {}, "does not compile"),
        ([{"name": "length", "costs": 1}], {}, "no setting 'costs'; did you mean 'cost'"),
        (["task", {"name": "length", "cost": "x"}], {}, r"reward\[1\].cost is 'x'; it must be a number"),
        ([], {}, "empty list"),
        (["exact", "exact"], {}, "give them a label each"),
        (["exact", "math"], {"weights": [1.0]}, "reward_weights has 1 entries, but reward has 2"),
        ([{"name": "exact", "weight": 1}], {"weights": [1.0]}, "say the same twice"),
        ([3], {}, "reward is 3; it must be a reward's name"),
        ([{"name": "task", "cache": 1}], {}, "no setting 'cache'"),
    ],
)
def test_what_cannot_be_had_is_refused_by_its_full_name(
    module: Any, functions: Any, settings: Any, message: str
) -> None:
    kept = {key: value for key, value in settings.items() if key != "allow"}
    with allowing(settings.get("allow", ["own_rewards"])), pytest.raises(ConfigError, match=message):
        Rewards(functions, **kept)


def test_a_column_that_the_records_do_not_have_is_refused_before_the_first_step(module: Any) -> None:
    with pytest.raises(ConfigError, match=r"takes 'colour', which is no column of this task's records; known: "):
        task(own("needs"))
    with pytest.raises(ConfigError, match=r"takes 'reference'"):
        GuessNumber().reward_with(Rewards(["exact"]))


# ---------------------------------------------------------------------------------------------- whole runs


TINY = ["env=chain_mod", "policy=causal_lm_tiny", "rollout.prompts=4", "rollout.group_size=4", "eval_episodes=4",
        "progress=false"]  # fmt: skip


def settings(*more: str, steps: int = 32) -> list[str]:
    return [*TINY, f"steps={steps}", f"log_every={16}", *more]


def run(tmp_path: Path, *more: str, allow: Sequence[str] = ("own_rewards",), steps: int = 32) -> list[dict[str, Any]]:
    cfg = resolve_defaults(
        compose(settings(f"run_dir={tmp_path / 'run'}", *more, steps=steps), allow=allow), allow=allow
    )
    return list(read_metrics(train(cfg, allow) / "metrics.jsonl"))


def test_a_run_logs_each_function_by_name_and_evaluates_with_it(module: Any, tmp_path: Path) -> None:
    rows = run(tmp_path, "reward=[task, own_rewards:some, {name: length, cost: 0.5, label: short}]")
    last = rows[-1]
    for name in ("task", "some", "short"):
        assert {f"rollout/rewards/{name}", f"rollout/rewards/{name}_std", f"rollout/rewards/{name}_none"} <= last.keys()
        assert f"eval/rewards/{name}" in last
    assert last["rollout/rewards/some_none"] == 0.5 and last["rollout/rewards/some"] == 1.0
    assert last["rollout/rewards/short"] < 0 and last["rollout/counted"] == 1.0


def test_a_run_that_learns_nothing_for_want_of_scores_says_so_once(
    module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, "reward=own_rewards:nothing")
    assert capsys.readouterr().err.count("no answer took part (rollout/counted=0), so nothing is learnt") == 1
    run(tmp_path / "b", "reward=own_rewards:length")
    assert "took part" not in capsys.readouterr().err


def test_the_tasks_verifier_by_name_is_the_run_without_functions(tmp_path: Path) -> None:
    plain, named = (run(tmp_path / str(at), *more, allow=()) for at, more in enumerate(([], ["reward=task"])))
    for one, other in zip(plain, named, strict=True):
        assert {k: v for k, v in one.items() if k != "wall_seconds"}.items() <= other.items()
    shuffled = run(tmp_path / "shuffled", "reward=task", "env.shuffle_rewards=true", allow=())
    assert shuffled[-1]["rollout/rewards/task"] == shuffled[-1]["rollout/reward"]


def test_the_record_holds_every_reward_and_gdpo_normalises_each(module: Any, tmp_path: Path) -> None:
    more = ["recipe=gdpo", "reward=[own_rewards:length, own_rewards:some]", "reward_weights=[1.0, 0.5]",
            "correction.advantage.reward=rewards", "correction.advantage.reward_weights=[1.0, 0.5]"]  # fmt: skip
    allow = ["own_rewards"]
    job = Job(resolve_defaults(compose(settings(*more), allow=allow), allow=allow), allow)
    rows, _ = job.make_rollout().collect(0)
    assert rows["rewards"].shape == (16, 2) and rows["rewards"].dtype == torch.float32
    assert rows["rewards"][:, 1].isnan().tolist() == [True, False] * 8
    total = rows["rewards"][:, 0] + 0.5 * rows["rewards"][:, 1].nan_to_num(0.0)
    assert torch.allclose(rows["reward"].sum(-1), total) and bool(rows["counted"].all())
    found = run(tmp_path, *more)
    assert all(torch.isfinite(torch.tensor(row["grad/norm"])) for row in found if "grad/norm" in row)
    assert found[-1]["grad/norm"] > 0


def test_functions_are_given_in_python_too(module: Any, tmp_path: Path) -> None:
    trainer = ur.assemble("chain_mod", "causal_lm_tiny", reward=[module.length], steps=16, eval_episodes=2,
                          **{"rollout.prompts": 2, "rollout.group_size": 2})  # fmt: skip
    assert trainer.update()["rollout/rewards/length"] > 0
    given = {"env": "chain_mod", "policy": "causal_lm_tiny", "reward": [module.length, "task"], "steps": 4,
             "rollout.prompts": 2, "rollout.group_size": 2, "eval_episodes": 2, "progress": False,
             "run_dir": str(tmp_path / "r")}  # fmt: skip
    first = ur.train(given)
    assert "own_rewards:length" in (first.folder / "config.yaml").read_text()
    plan = ur.memory_plan(given)
    assert plan.peak > 0
    other = ur.evaluate(first, reward=[module.some], allow=["own_rewards"])
    assert "eval/rewards/some" in other and "eval/rewards/length" not in other
    with pytest.raises(ConfigError, match=r"reward.*lambda.* no function of a module"):
        ur.train({**given, "reward": [lambda completions: [0.0]]})


def test_an_evaluation_environment_of_ones_own_is_rewarded_too(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    env = ChainMod(max_turn_tokens=6)
    made = ur.assemble(env, "causal_lm_tiny", eval_env=ChainMod(max_turn_tokens=6), reward=[module.length], steps=4,
                       eval_episodes=2, **{"rollout.prompts": 2, "rollout.group_size": 2})  # fmt: skip
    assert made.evaluate()["eval/rewards/length"] > 0
    closed: list[Job] = []
    monkeypatch.setattr(Rewards, "close", lambda self: closed.append(self))
    made.run()
    assert len(closed) == 1


def test_a_function_that_raises_loses_nothing(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(completion_ids: Sequence[Sequence[int]]) -> list[float]:
        calls.append(len(completion_ids))
        if breaks and len(calls) > 4:
            raise ValueError("the judge is down")
        return [float(len(ids)) for ids in completion_ids]

    monkeypatch.setattr(module, "length", counted)
    counted.__module__, counted.__qualname__ = "own_rewards", "length"
    breaks = True
    with pytest.raises(RolloutError, match=r"the judge is down on row 0 .*go on with 'unified-rl train resume="):
        run(tmp_path, "reward=own_rewards:length", "reward_retries=0", steps=64)
    assert checkpoints(tmp_path / "run" / "checkpoints")
    breaks = False
    ur.resume(tmp_path / "run", allow=["own_rewards"])
    resumed = read_metrics(tmp_path / "run" / "metrics.jsonl")
    whole = run(tmp_path / "whole", "reward=own_rewards:length", steps=64)

    def same(rows: Any) -> Any:
        return [{k: v for k, v in row.items() if k != "wall_seconds"} for row in rows]

    assert same(resumed) == same(whole)


def test_settings_without_functions_and_functions_without_a_token_task_are_refused(module: Any) -> None:
    def job(*more: str) -> Job:
        return Job(resolve_defaults(compose([*more, "progress=false"], allow=["own_rewards"])), ["own_rewards"])

    with pytest.raises(ConfigError, match=r"^reward_workers would be of no effect: this run has no reward=\[\.\.\.\]$"):
        job(*TINY[:4], "reward_workers=2")
    with pytest.raises(ConfigError, match=r"token tasks.* and env=two_route \(TwoRouteEnv\) is none$"):
        job("env=two_route", "reward=own_rewards:length")
    with pytest.raises(ConfigError, match="outside the allowed packages; start with --allow own_rewards"):
        Job(resolve_defaults(compose([*TINY, "reward=own_rewards:length"])))
