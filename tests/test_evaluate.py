"""``evaluate`` of runs, checkpoints and model folders: pass@k, majority votes, intervals, chunks, other tasks."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_cases import ALLOW, CONTROL, LANGUAGE, composed
from test_language_evaluation import Shaped, policy_of
from test_model_folder import model_folder, problems

import unified_rl as ur
from unified_rl import cli
from unified_rl.envs.language import JsonlProblems
from unified_rl.envs.language.tokenizer import train_bpe
from unified_rl.envs.language.votes import ballot
from unified_rl.errors import ConfigError, RolloutError
from unified_rl.policies.sampling import Sampling
from unified_rl.training import build
from unified_rl.training.evaluating import write_scores
from unified_rl.training.evaluation import (
    Scores,
    Tally,
    add_intervals,
    evaluate_language,
    interval,
    majority,
    metrics_of,
    once,
    pass_at_k,
)
from unified_rl.training.run import Job, train

# ------------------------------------------------------------------------------------------------- numbers


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_answer() -> None:
    for n, c, k in [(5, 2, 1), (5, 2, 3), (6, 1, 4), (4, 0, 2), (4, 4, 2), (5, 3, 3)]:
        answers = [1] * c + [0] * (n - c)
        subsets = list(itertools.combinations(answers, k))
        assert pass_at_k(n, [c], k)[0] == pytest.approx(sum(map(any, subsets)) / len(subsets))
    assert pass_at_k(5, [2], 3)[0] == pytest.approx(1 - 1 / 10)  # one of ten triples has neither


@pytest.mark.parametrize(
    ("votes", "correct", "found"),
    [
        (["3", "3", "4"], [1, 1, 0], (1.0, False)),
        (["3", "4", "4"], [1, 0, 0], (0.0, False)),
        (["3", "4", None, None], [1, 0, 0, 0], (0.5, True)),
        ([None, None], [0, 0], (0.0, False)),
        (["3", "3", "4"], [1, 0, 0], (0.5, False)),  # one of two that say the same was cut off
    ],
)
def test_what_most_answers_say_is_the_vote(votes: Any, correct: Any, found: Any) -> None:
    assert majority(votes, correct) == found


def test_intervals_are_wilsons_for_shares_and_a_bootstrap_for_means() -> None:
    low, high = interval(np.array([1.0] * 7 + [0.0] * 3))
    p, n, z = 0.7, 10, 1.959964
    centre, half = (p + z * z / (2 * n)) / (1 + z * z / n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (low, high) == pytest.approx((centre - half / (1 + z * z / n), centre + half / (1 + z * z / n)), abs=1e-6)
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    low, high = interval(values)
    error = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.1 * error)
    assert interval(values) == (low, high)


def test_a_prompt_that_is_asked_twice_is_one_prompt() -> None:
    assert once(np.array([1.0, 0.0, 1.0]), [7, 8, 7]).tolist() == [1.0, 0.0]
    assert once(np.array([1.0, 0.0, 0.0]), [7, 8, 7]).tolist() == [0.5, 0.0]


@pytest.mark.parametrize(
    ("text", "verifier", "says"),
    [
        ("so #### 1/2", "numeric", "1/2"),
        ("so \\boxed{0.50}", "numeric", "1/2"),
        ("it is 42.", "numeric", None),
        ("it is 42.", "last", "42"),
        ("The answer is \\boxed{x + 1}.", "math", "x + 1"),
        ("The answer is \\boxed{x + 1}.", "numeric", None),
        ("", "last", None),
    ],
)
def test_equal_answers_are_equal_ballots(text: str, verifier: str, says: str | None) -> None:
    assert ballot(text, verifier) == says


# ------------------------------------------------------------------------------------------------- of a policy


def test_several_samples_are_told_apart_from_the_answers_themselves() -> None:
    env = Shaped()
    policy = policy_of(env)
    got = evaluate_language(env, policy, 8, seed=0, samples=6, intervals=True)
    assert policy.calls == [48, 8]
    right = torch.tensor([float(any(map(str.isdigit, env.codec.decode(t.tolist())))) for t in policy.tokens[0]])
    count = right.view(8, 6).sum(1)
    assert got["eval/accuracy"] == pytest.approx(float(right.mean()))
    assert got["eval/pass_at_1"] == pytest.approx(float(right.mean()), abs=1e-6)
    assert got["eval/pass_at_6"] == pytest.approx(float((count > 0).float().mean()))
    assert got["eval/reward"] == -0.25 and got.samples == 6 and [p["correct"] for p in got.problems] == count.tolist()
    said = [env.vote({}, [t.tolist()]) for t in policy.tokens[0]]
    truth = [majority(said[6 * i : 6 * i + 6], right[6 * i : 6 * i + 6].tolist())[0] for i in range(8)]
    assert got["eval/maj_at_6"] == pytest.approx(np.mean(truth))
    assert got.intervals["eval/accuracy"][0] < got["eval/accuracy"] < got.intervals["eval/accuracy"][1]
    assert "bootstrap" in got.method


def test_groups_larger_than_what_fits_are_asked_in_parts() -> None:
    env = Shaped()
    policy = policy_of(env)
    got = evaluate_language(env, policy, 3, seed=0, at_once=4, samples=6)
    assert policy.calls == [4, 4, 4, 6 - 4 + 2, 2, 3] and got.samples == 6  # 3 x 4 answers, then 3 x 2, then greedy
    again = evaluate_language(env, policy, 3, seed=0, at_once=4, samples=6)
    assert dict(got) == dict(again) and got.problems == again.problems


def test_the_sampling_of_an_evaluation_is_its_own_and_ends_with_it() -> None:
    env = Shaped()
    policy = policy_of(env)
    cold = evaluate_language(env, policy, 6, seed=0, samples=3, sampling={"temperature": 1e-4})
    assert cold["eval/accuracy"] == cold["eval/accuracy_greedy"] and cold["eval/maj_ties"] == 0.0
    assert policy.sampling == Sampling(vocabulary=len(env.tokenizer))


def test_kept_conversations_are_those_of_their_prompts() -> None:
    env = Shaped()
    policy = policy_of(env)
    got = evaluate_language(env, policy, 6, seed=0, at_once=2, samples=2, keep=[1, 4])
    assert got.shown is not None
    talk, info = got.shown
    asked = env.problems(6, torch.Generator().manual_seed(0), "eval")
    assert [p["prompt_id"] for p in talk.problems] == [asked[1]["prompt_id"], asked[4]["prompt_id"]]
    assert talk.said[1][0] == policy.tokens[4][0].tolist()[: len(talk.said[1][0])] and len(info["correct"]) == 2


def test_answers_without_a_reward_are_in_no_mean_and_no_interval() -> None:
    tally, best = Tally(3, 2, votes=False), Tally(3, 1, votes=False)
    tally.reward = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 3.0]])
    tally.info = {"scored": torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])}
    assert metrics_of(tally, best)["eval/reward"] == 2.0  # of 1 and 3
    scores = Scores(metrics_of(tally, best))
    add_intervals(scores, tally, best, [7, 8, 9])
    assert scores.intervals["eval/reward"] == interval(np.array([1.0, 3.0]))
    assert scores.intervals["eval/length"] == interval(np.zeros(3))
    lines = tally.by_problem([{"prompt_id": n} for n in (7, 8, 9)])
    assert lines[0]["reward"] == 1.0 and math.isnan(lines[1]["reward"]) and lines[2]["reward"] == 3.0


def test_what_json_has_no_number_for_is_null(tmp_path: Path) -> None:
    scores = Scores({"eval/reward": 1.0, "eval/known": math.nan})
    scores.problems = [{"prompt_id": 7, "reward": math.nan}]
    write_scores(tmp_path / "a.json", scores, {})
    told = json.loads((tmp_path / "a.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert told["metrics"] == {"eval/reward": 1.0, "eval/known": None} and told["problems"][0]["reward"] is None


def free_text(folder: Path) -> list[str]:
    """A task that reward functions alone can judge."""
    records = [json.dumps({"prompt": f"Capital {n}?", "completion": f" City {n}."}) for n in range(30)]
    (folder / "a.jsonl").write_text("\n".join(records) + "\n")
    return [
        "env=jsonl",
        f"env.path={folder / 'a.jsonl'}",
        "env.vocabulary_size=270",
        "env.held_out=0.3",
        "env.max_turn_tokens=24",
        "policy=causal_lm_tiny",
        "eval_episodes=4",
        "reward={name: length, cost: 0.5}",
    ]


def test_what_only_reward_functions_judge_has_rewards_and_no_accuracy(tmp_path: Path) -> None:
    job = Job(composed([*free_text(tmp_path), "eval_sampling={samples: 2}", "rollout.prompts=2"]), ALLOW)
    told = job.make_rollout().collect(0)[1]
    assert told["rollout/rewards/length"] == told["rollout/reward"] < 0 and "rollout/correct" not in told
    got = job.evaluate(intervals=True)
    assert got["eval/rewards/length"] == got["eval/score"] < 0
    assert not any("accuracy" in key or "pass_at" in key or "maj_at" in key for key in got)
    assert all("correct" not in line for line in got.problems) and "correct" not in got.shown[1]  # type: ignore[index]


def test_imitated_free_text_is_judged_by_reward_functions_where_there_are_any(tmp_path: Path) -> None:
    got = Job(composed([*free_text(tmp_path), "agent=sft"]), ALLOW).evaluate()
    assert got["eval/score"] == got["eval/rewards/length"] and got["eval/nll"] > 0 and got.samples == 1


# ------------------------------------------------------------------------------------------------- the verb


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder, two files of problems, and a run of the model."""
    folder = tmp_path_factory.mktemp("evaluate")
    tokenizer = train_bpe(["What is 1+1? 2 3 4 5 6 7 8 9 0 ####"], 280)
    model = model_folder(folder / "model", tokenizer, [tokenizer.eos_token_id])
    for name, count in (("a", 60), ("b", 80)):
        problems(folder / f"{name}.jsonl", count)
    words = ["env=jsonl", f"env.path={folder / 'a.jsonl'}", "policy=causal_lm_path", f"policy.path={model}"]
    small = ["env.max_turn_tokens=6", "env.verifier=last", "rollout.prompts=2", "rollout.group_size=2", "steps=8",
             "eval_episodes=4", "progress=false", f"run_dir={folder / 'run'}", "checkpoint_every=4"]  # fmt: skip
    train(ur.compose([*words, *small]))
    return folder


TASK = ("env=jsonl", "env.max_turn_tokens=6", "env.verifier=last")


def test_a_model_folder_is_evaluated_on_a_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "scores.json"
    words = [*TASK, f"env.path={place / 'a.jsonl'}", "samples=4", "temperature=0.7", "top_p=0.9", "seed=3"]
    assert cli.main(["evaluate", str(place / "model"), *words, "--episodes", "5", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "eval/accuracy (avg@4)" in shown and "pass@4" in shown and "maj@4" in shown and "95 % interval" in shown
    told = json.loads(out.read_text())
    assert told["samples"] == 4 and len(told["problems"]) == 5 and told["words"]["temperature"] == 0.7
    assert told["intervals"]["eval/length"][0] <= told["metrics"]["eval/length"] <= told["intervals"]["eval/length"][1]
    words = {"env": {"name": "jsonl", "path": str(place / "a.jsonl"), "max_turn_tokens": 6, "verifier": "last"}}
    same = ur.evaluate(place / "model", episodes=5, samples=4, temperature=0.7, top_p=0.9, seed=3, **words)
    assert dict(same) == told["metrics"]
    other = ur.evaluate(place / "model", episodes=5, seed=4, **words)
    assert [p["prompt_id"] for p in other.problems] != [p["prompt_id"] for p in same.problems]


def test_a_run_is_evaluated_as_it_logged_itself_and_on_other_files(place: Path) -> None:
    run = ur.Run(place / "run")
    logged = {key: value for key, value in run.metrics()[-1].items() if key.startswith("eval/")}
    assert dict(run.evaluate()) == logged
    other = run.evaluate(**{"env.path": str(place / "b.jsonl")}, episodes=6, samples=2)
    assert other.samples == 2 and {p["prompt_id"] for p in other.problems} != {
        p["prompt_id"] for p in run.evaluate(episodes=6).problems
    }
    chunks = run.evaluate(**{"rollout.generation_batch": 1})
    assert chunks["eval/length"] > 0 and chunks["eval/accuracy_greedy"] == logged["eval/accuracy_greedy"]


def test_a_file_named_for_an_evaluation_is_asked_whole(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = {"env.path": str(place / "b.jsonl")}
    whole = ur.evaluate(place / "run", episodes=80, **file)
    assert len({p["prompt_id"] for p in whole.problems}) == 80  # not the tenth that training would hold out
    model = {"env": "jsonl", "env.max_turn_tokens": 4, "env.verifier": "last", **file}
    assert len({p["prompt_id"] for p in ur.evaluate(place / "model", episodes=80, **model).problems}) == 80
    some = ur.evaluate(place / "model", episodes=80, **model, **{"env.held_out": 0.1})
    assert len({p["prompt_id"] for p in some.problems}) < 40
    words = [*TASK, f"env.path={file['env.path']}", "--episodes", "160"]
    assert cli.main(["evaluate", str(place / "model"), *words]) == 0
    assert "160 prompts (80 different ones), " in capsys.readouterr().out
    same = [*TASK, f"env.path={file['env.path']}", f"env.eval_path={file['env.path']}", "policy=causal_lm_path"]
    with pytest.raises(ConfigError, match=r"no training problem is left: every one .* is in env\.eval_path too"):
        train(ur.compose([*same, f"policy.path={place / 'model'}", f"run_dir={place / 'none'}", "progress=false"]))


def test_every_held_out_prompt_is_asked_once_and_the_result_says_of_how_many(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def asked(*words: str) -> dict[int, int]:
        out = place / "asked.json"
        assert cli.main(["evaluate", *words, "--out", str(out)]) == 0
        return Counter(problem["prompt_id"] for problem in json.loads(out.read_text())["problems"])

    file = f"env.path={place / 'b.jsonl'}"
    found = asked(str(place / "model"), *TASK, file)
    assert len(found) == 80 and set(found.values()) == {1}
    assert "80 of 80 held-out prompts, 1 sampled" in capsys.readouterr().out
    asked(str(place / "run"), file, "--episodes", "5")
    assert "5 of 80 held-out prompts" in capsys.readouterr().out
    whole = asked(str(place / "run"), "--episodes", "all")
    assert whole == asked(str(place / "run"), file.replace("b.", "a."), "env.held_out=0.1")
    capsys.readouterr()
    asked(str(place / "run"))
    assert f"asked 4 of {len(whole)} held-out prompts" in capsys.readouterr().err


def test_a_number_above_what_is_held_out_asks_each_equally_often(place: Path) -> None:
    run = ur.Run(place / "run")
    there = run.evaluate(episodes="all").held_out
    assert 1 < there < 20
    found = Counter(problem["prompt_id"] for problem in run.evaluate(episodes=2 * there + 1).problems)
    assert len(found) == there and set(found.values()) == {2}
    assert len(run.evaluate(episodes=there - 1).problems) == there - 1


def test_a_run_may_ask_all_at_every_evaluation_and_who_has_no_end_refuses(place: Path, tmp_path: Path) -> None:
    words = [*TASK, f"env.path={place / 'a.jsonl'}", "policy=causal_lm_path", f"policy.path={place / 'model'}"]
    small = ["rollout.prompts=2", "rollout.group_size=2", "steps=4", f"run_dir={tmp_path / 'run'}", "progress=false"]
    run = ur.train([*words, *small, "eval_episodes=all"])
    assert run.config["eval_episodes"] == "all" and len(run.evaluate().problems) == run.evaluate().held_out
    with pytest.raises(ConfigError, match="eval_episodes=all asks every held-out prompt, and EasyChain makes new ones"):
        Job(composed([*LANGUAGE, "eval_episodes=all"]), ALLOW).make_trainer(tmp_path)
    with pytest.raises(ConfigError, match="eval_episodes=all asks every held-out prompt, and control has none"):
        Job(composed([*CONTROL, "eval_episodes=all"]), ALLOW)
    with pytest.raises(ConfigError, match=r"^eval_episodes"):
        composed([*CONTROL, "eval_episodes=every"])


def test_errors_of_scorers_are_shown_where_there_are_any_and_files_hold_them_always(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*words: str) -> str:
        assert cli.main(["evaluate", str(place / "run"), *words]) == 0
        return capsys.readouterr().out

    assert "scorer_error" not in said() and "scorer_error" not in said("samples=2")
    said("--out", str(place / "errors.csv"))
    assert "eval/scorer_error,0.0" in (place / "errors.csv").read_text()
    respond = JsonlProblems.respond

    def failing(self: JsonlProblems, *given: Any) -> Any:
        result = respond(self, *given)
        result.info["scorer_error"] = torch.ones(len(result.reward))
        return result

    monkeypatch.setattr(JsonlProblems, "respond", failing)
    assert re.search(r"eval/scorer_error +1\.0000", said()) and "eval/scorer_error" in said("samples=2")


def test_a_checkpoint_is_evaluated_by_its_folder(place: Path) -> None:
    save = place / "run" / "checkpoints" / "step_000000000001"
    assert dict(ur.evaluate(save)) == dict(ur.evaluate(place / "run", checkpoint=1))


def test_a_table_of_numbers_is_written(place: Path) -> None:
    found = ur.evaluate(place / "run", out=place / "scores.csv")
    with open(place / "scores.csv", newline="") as handle:
        rows = {row["metric"]: row for row in csv.DictReader(handle)}
    assert {key: float(row["value"]) for key, row in rows.items()} == dict(found)
    assert float(rows["eval/length"]["low"]) <= found["eval/length"] and rows["eval/scorer_error"]["low"] == ""


@pytest.mark.parametrize(
    ("where", "words", "said"),
    [
        ("model", [], "add one, for example env=jsonl env.path=FILE"),
        ("model", ["env=half_cheetah"], "is of control"),
        ("model", [*TASK, "env.path={place}/a.jsonl", "--checkpoint", "4"], "is a model's folder"),
        ("run", ["sampels=4"], "did you mean 'samples'?"),
        ("run", ["agent.lr=1"], "evaluate takes no agent.lr="),
        ("run", ["temperature=-1"], "temperature=-1"),
        ("run", ["samples=0"], "samples=0 must be at least 1"),
        ("run", ["temperature=0"], "eval/accuracy_greedy"),
        ("run", ["env.pth=x"], "did you mean 'path'?"),
        ("run", ["env=half_cheetah"], "the run is of language"),
        ("run", ["policy.dtype=bfloat16"], "is of a model's folder"),
        ("run", ["env.max_prompt_length=5000"], "the run's model takes 1024"),
        ("run", [*TASK, "env.path={place}/a.jsonl", "env.tokenizer={place}/other"], "set env.tokenizer to it"),
        ("run", ["--out", "scores.txt"], ".json or .csv"),
        (".", [], "is not a run folder"),
        ("run", ["--checkpoint", "best"], "keep_best="),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_one_line(
    place: Path, where: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (place / "other").exists():
        train_bpe(["abc 123"], 265).save_pretrained(place / "other")
    assert cli.main(["evaluate", str(place / where), *(word.format(place=place) for word in words)]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("unified-rl: ")]
    assert len(error) == 1 and said in error[0]


# ------------------------------------------------------------------------------------------------- in runs


def test_a_run_evaluates_with_a_sampling_of_its_own(tmp_path: Path) -> None:
    words = (*LANGUAGE, "eval_episodes=4", "eval_sampling={samples: 4, temperature: 0.5}", f"run_dir={tmp_path / 'r'}")
    job = Job(composed(words), ALLOW)
    first = job.evaluate()
    assert {"eval/pass_at_2", "eval/pass_at_4", "eval/maj_at_4"} <= first.keys() and dict(job.evaluate()) == dict(first)
    assert job.policy.sampling.temperature == 1.0


def test_all_answers_of_a_few_prompts_are_sampled_together(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(
        build,
        "evaluate_language",
        lambda env, policy, count, seed, at_once, **options: (sizes.append(at_once), Scores())[1],
    )
    job = Job(composed([*LANGUAGE, "eval_episodes=4", "eval_sampling={samples: 8}"]), ALLOW)
    job.evaluate()
    Job(composed([*LANGUAGE, "eval_episodes=4", "rollout.generation_batch=6"]), ALLOW).evaluate()
    assert sizes == [32, 4]


def test_workers_of_rewards_end_with_an_evaluation(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[Job] = []
    monkeypatch.setattr(Job, "close", lambda self: closed.append(self))
    ur.evaluate(place / "run", episodes=1)
    assert len(closed) == 1

    def broken(self: Job, intervals: bool = False) -> Scores:
        raise RolloutError("the judge is down")

    monkeypatch.setattr(Job, "evaluate", broken)
    with pytest.raises(RolloutError):
        ur.evaluate(place / "run", episodes=1)
    assert len(closed) == 2


def test_words_change_a_runs_own_sampling_and_leave_the_rest_of_it(tmp_path: Path) -> None:
    words = [*LANGUAGE, "steps=16", "eval_episodes=2", "eval_sampling={samples: 3, top_k: 1}"]
    run = train(composed([*words, f"run_dir={tmp_path / 'run'}"]), ALLOW)
    got = ur.evaluate(run, allow=ALLOW, temperature=0.5)
    assert got.samples == 3 and got["eval/accuracy"] == got["eval/accuracy_greedy"]  # still the most likely tokens
    assert ur.evaluate(run, allow=ALLOW, samples=2).samples == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*LANGUAGE, "eval_sampling={sample: 4}"], "did you mean 'samples'"),
        ([*LANGUAGE, "eval_sampling={samples: 1.5}"], "eval_sampling.samples is 1.5"),
        ([*LANGUAGE, "eval_sampling={top_p: 2}"], "eval_sampling.top_p=2"),
    ],
)
def test_a_wrong_sampling_is_refused_when_a_run_is_composed(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        composed(words)


def test_a_run_of_control_has_no_sampling_of_answers() -> None:
    with pytest.raises(ConfigError, match="eval_sampling is of language"):
        Job(composed([*CONTROL, "eval_sampling={samples: 2}"]))


def test_a_control_run_is_evaluated_in_its_environment_with_other_settings(tmp_path: Path) -> None:
    words = [*CONTROL, "steps=128", "eval_episodes=8", f"run_dir={tmp_path / 'run'}"]
    run = ur.Run(train(composed(words)))
    own = run.evaluate()
    assert dict(own) == dict(run.evaluate(**{"env.chunk": 4})) and own.samples == 0 and not own.intervals
    assert run.evaluate(**{"env.max_steps": 8})["eval/length"] <= 8 < own["eval/length"]
    assert dict(run.evaluate(seed=9)) != dict(own)
    with pytest.raises(ConfigError, match=r"the run's policy has .* observations"):
        run.evaluate(env="pendulum")
