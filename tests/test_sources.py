"""Rows of others: judged, joined to the right groups, drawn from streams of their own, and resumed with the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from agent_cases import TINY, stream
from tensordict import TensorDict

from unified_rl.config import compose, resolve_defaults
from unified_rl.envs.language import ChainMod, GuessNumber, JsonlProblems
from unified_rl.envs.language.base import LanguageTask
from unified_rl.envs.language.rewards import Rewards
from unified_rl.envs.language.verdict import Verdict
from unified_rl.errors import ConfigError, DataError
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.policies.generation import Generation
from unified_rl.replay import Replay, Uniform
from unified_rl.rollout import LanguageRollout, converse
from unified_rl.rollout.context import Hints, Refill
from unified_rl.rollout.sources import Demonstrations, ExpertFile, Model, Pool, Recorded
from unified_rl.training.checkpoint import checkpoints, read_checkpoint
from unified_rl.training.run import Job, resume, train
from unified_rl.units import Source

PROMPTS, GROUP = 3, 4


class Repeating(ChainMod):
    """Six prompts only, so that they come again."""

    def _candidates(self, count: int, generator: torch.Generator) -> list[dict[str, Any]]:
        pool = super()._candidates(6, torch.Generator().manual_seed(0))
        return [dict(pool[i]) for i in torch.randint(6, (count,), generator=generator).tolist()]

    def _judge(self, problem: dict[str, Any], text: str, turn: int) -> Verdict:
        right = text.count("1") > 0  # an untrained policy often says a 1, and often does not
        return Verdict(reward=float(right), correct=right)

    def respond(self, problems: Any, turns: Any, finished: Any) -> Any:
        return super().respond(problems, turns, torch.ones_like(finished))


class Bare(LanguageTask):
    """A task that knows no answers."""

    def __init__(self) -> None:
        super().__init__(ChainMod().tokenizer, max_prompt_length=4, max_turn_tokens=4)


def chain() -> ChainMod:
    return ChainMod(modulus=5, terms=3)


def rollout(env: Any = None, seed: int = 0, **options: Any) -> LanguageRollout:
    env = env or chain()
    policy = CausalLM(**env.policy_inputs(), config=TINY, seed=1)
    sizes = {"prompts": PROMPTS, "group_size": GROUP, **options}
    return LanguageRollout(env, policy, 1.0, stream(seed), stream(seed + 1), **sizes)


def own(rows: TensorDict) -> TensorDict:
    return rows[rows["source"] == int(Source.ONLINE)]


def others(rows: TensorDict) -> TensorDict:
    return rows[rows["source"] != int(Source.ONLINE)]


def file_of(folder: Path, lines: list[dict[str, Any]], name: str = "answers.jsonl") -> str:
    path = folder / name
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def sums(folder: Path) -> JsonlProblems:
    """Sums of two numbers, half of them held out."""
    lines = [{"question": f"{a}+{b}", "answer": f"#### {a + b}"} for a in range(5) for b in range(4)]
    path = file_of(folder, lines, "problems.jsonl")
    return JsonlProblems(path, template="Q {question} A ", max_turn_tokens=12, vocabulary_size=280, held_out=0.5)


# ------------------------------------------------------------------------------------------------ streams


def test_a_source_never_changes_which_prompts_are_drawn_nor_what_the_policy_says(tmp_path: Path) -> None:
    plain = rollout()
    joined = rollout(sources={"batch": Demonstrations(rows=5), "group": Demonstrations(per_group=2), "pool": Pool()})
    for version in range(3):
        a, _ = plain.collect(version)
        b, metrics = joined.collect(version)
        for key in ("tokens", "mask", "behavior_log_prob", "reward", "prompt_id"):
            assert torch.equal(a[key], own(b)[key]), key
        assert metrics["rollout/joined/batch"] == 5 and metrics["rollout/joined/group"] == 2 * PROMPTS


def test_each_source_has_the_stream_of_its_name(tmp_path: Path) -> None:
    one = rollout(sources={"a": Demonstrations(rows=8)}).collect(0)[0]
    both = rollout(sources={"b": Demonstrations(rows=8), "a": Demonstrations(rows=8)}).collect(0)[0]
    first, second = others(both)[:8], others(both)[8:]
    assert torch.equal(second["tokens"], others(one)["tokens"])
    assert not torch.equal(first["tokens"], second["tokens"])
    overrides = ["env=chain_mod", "policy=causal_lm_tiny", "rollout.prompts=2", "rollout.group_size=2", "recipe=chord"]
    streams = [Job(compose([*overrides, f"seed={seed}"])).make_rollout()._streams for seed in (0, 1)]
    name = "sources/demonstrations"
    assert not torch.equal(streams[0][name].get_state(), streams[1][name].get_state())


def test_refill_draws_from_a_stream_of_its_own() -> None:
    plain, refilled = rollout(Repeating()), rollout(Repeating(), context=Refill(tries=1))
    drawn: list[list[int]] = [[], []]
    for number, one in enumerate((plain, refilled)):
        problems = one.env.problems

        def noted(count: int, generator: Any, split: str = "train", *, p: Any = problems, n: int = number) -> Any:
            found = p(count, generator, split)
            if generator is not (plain, refilled)[n]._streams["context"]:
                drawn[n].extend(problem["prompt_id"] for problem in found)
            return found

        one.env.problems = noted  # type: ignore[method-assign]
        metrics = [one.collect(version)[1] for version in range(4)]
    assert drawn[0] == drawn[1] and sum(m["rollout/resampled"] for m in metrics) > 0


# ------------------------------------------------------------------------------------------------ kinds


def test_demonstrations_are_judged_and_stand_in_the_group_of_their_prompt() -> None:
    rows, _ = rollout(sources={"shown": Demonstrations(per_group=1, style="chain")}).collect(0)
    shown = others(rows)
    assert bool((shown["reward"].sum(-1) == 1).all()) and bool((shown["source"] == int(Source.DEMONSTRATION)).all())
    assert torch.equal(shown["group"], own(rows)["group"][::GROUP])
    assert torch.equal(shown["prompt_id"], own(rows)["prompt_id"][::GROUP])
    assert bool((shown["behavior_log_prob"] == 0).all()) and bool(shown["mask"].any(-1).all())


def test_a_files_answers_join_the_prompts_they_belong_to(tmp_path: Path) -> None:
    env = sums(tmp_path)
    known = list(env._pools["train"])
    asked = known[0]["text"].removeprefix("Q ").removesuffix(" A ")
    total = sum(map(int, asked.split("+")))
    lines = [
        {"prompt": asked, "answer": f"#### {total}"},
        {"messages": [{"role": "user", "content": known[1]["text"]}, {"role": "assistant", "content": "#### 99"}]},
    ]
    path = file_of(tmp_path, lines)
    rows, metrics = rollout(env, prompts=len(known), sources={"expert": ExpertFile(path, per_group=3)}).collect(0)
    shown = others(rows)
    assert metrics["rollout/joined/expert"] == len(shown) == 2
    assert sorted(shown["reward"].sum(-1).tolist()) == [0.0, 1.0]  # judged: the second answer is wrong
    assert bool((shown["source"] == int(Source.EXPERT)).all())
    group = dict(zip(own(rows)["prompt_id"].tolist(), own(rows)["group"].tolist(), strict=True))
    assert [group[p] for p in shown["prompt_id"].tolist()] == shown["group"].tolist()
    right = shown[shown["reward"].sum(-1) == 1]
    words = env.codec.decode(right["tokens"][0][right["mask"][0]].tolist())
    assert words == f"#### {total}"


def test_a_files_log_probs_are_the_behaviours_and_its_rewards_replace_the_environments(tmp_path: Path) -> None:
    env = sums(tmp_path)
    known = [problem["record"] for problem in env._pools["train"]]
    ids = env.encode_completions([" 7"])[0]
    lines: list[dict[str, Any]] = [
        {"prompt": known[0], "completion": " 7", "log_probs": [-0.5] * (len(ids) - 1), "r": 0.25},
        {"question": known[1], "completion": " 7", "log_probs": [-0.5] * (len(ids) - 1) + [-2.0], "r": 3},
        {"prompt": known[2], "completion": " 7", "completion_ids": ids[:1], "log_probs": [-4.0], "r": 0},
        {"prompt": known[3], "completion": " 7", "r": 1},
    ]
    path = file_of(tmp_path, lines)
    made = rollout(env, prompts=len(known), sources={"x": ExpertFile(path, per_group=1, reward_key="r")})
    shown = others(made.collect(0)[0])
    of = dict(zip(shown["prompt_id"].tolist(), range(len(shown)), strict=True))
    rows = [shown[of[problem["prompt_id"]]] for problem in env.find_problems(known[:4])]  # type: ignore[index]
    found = [row["behavior_log_prob"][row["mask"]].tolist() for row in rows]
    short = [-0.5] * (len(ids) - 1)
    assert found == [[*short, 0.0], [*short, -2.0], [-4.0, 0.0], [0.0] * len(ids)]
    assert rows[2]["tokens"][rows[2]["mask"]].tolist() == [ids[0], ids[-1]]
    assert [float(row["reward"].sum()) for row in rows] == [0.25, 3.0, 0.0, 1.0]
    lines[0]["log_probs"] = [-0.5] * (len(ids) + 3)
    with pytest.raises(DataError, match=rf"line 1: {len(ids) + 3} log-probs, .* makes {len(ids)} tokens"):
        rollout(env, sources={"x": ExpertFile(file_of(tmp_path, lines), rows=2)})
    lines[0] |= {"log_probs": [-0.5], "completion_ids": [10**6]}
    with pytest.raises(DataError, match=r"line 1: token 1000000 is beyond the \d+ of the tokenizer"):
        rollout(env, sources={"x": ExpertFile(file_of(tmp_path, lines), rows=2)})


def none_for_long(completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
    """No opinion on anything that a file says."""
    return [None for _ in completion_ids]


def test_the_reward_of_a_file_stands_for_the_environments_everywhere(tmp_path: Path) -> None:
    env = sums(tmp_path)
    env.reward_with(Rewards([none_for_long], weights=[0.5]))
    known = [problem["text"] for problem in env._pools["train"]]
    path = file_of(tmp_path, [{"prompt": one, "completion": " 7", "r": n / 8} for n, one in enumerate(known)])
    made = rollout(env, prompts=len(known), sources={"x": ExpertFile(path, per_group=1, reward_key="r")})
    rows = made.collect(0)[0]
    own, shown = rows[rows["source"] == Source.ONLINE], others(rows)
    assert not bool(own["counted"].any()) and bool(own["rewards"].isnan().all())  # the function has no opinion
    assert bool(shown["counted"].all()) and len(shown) == len(known)
    assert sorted(shown["reward"].sum(-1).tolist()) == [n / 8 for n in range(len(known))]
    assert torch.equal(0.5 * shown["rewards"], shown["reward"])
    env.reward_with(Rewards([none_for_long, "task"]))
    with pytest.raises(
        ConfigError, match=r"rollout.sources.x.reward_key=r is one .* as rewards \(rewards/none_for_long, "
    ):
        rollout(env, sources={"x": ExpertFile(path, rows=2, reward_key="r")})
    with pytest.raises(ConfigError, match=r"as scores \(correct, truncated\); .* leave out rollout.columns.scores"):
        rollout(
            sums(tmp_path),
            sources={"x": ExpertFile(path, rows=2, reward_key="r")},
            columns={"scores": ["correct", "truncated"]},
        )


def test_a_batch_of_a_file_takes_each_answer_once_before_any_again(tmp_path: Path) -> None:
    env = sums(tmp_path)
    known = [problem["text"] for problem in env._pools["train"]][:5]
    path = file_of(tmp_path, [{"prompt": one, "completion": f" {n}"} for n, one in enumerate(known)])
    made = rollout(env, sources={"x": ExpertFile(path, rows=4)})
    seen = [p for version in range(5) for p in others(made.collect(version)[0])["prompt_id"].tolist()]
    assert all(len(set(seen[start : start + 5])) == 5 for start in (0, 5, 10, 15))
    state = made.state_dict()
    want = made.collect(5)[0]
    again = rollout(env, sources={"x": ExpertFile(path, rows=4)})
    again.load_state_dict(state)
    assert torch.equal(again.collect(5)[0]["tokens"], want["tokens"])


def test_luffy_learns_a_teachers_answers_that_nobody_else_teaches(tmp_path: Path) -> None:
    """Eight updates towards one answer to every question, and the same without the teacher's rows."""
    questions = [f"{number} + 1" for number in range(24)]
    (tmp_path / "data.jsonl").write_text("".join(f'{{"question": "{q}", "answer": "#### 7"}}\n' for q in questions))
    teacher = file_of(tmp_path, [{"prompt": question, "completion": "#### 7"} for question in questions])
    source = f"{{_target_: unified_rl.rollout.sources.ExpertFile, path: {teacher}, per_group: 1, partial: true}}"
    shared = [
        "env=jsonl", f"env.path={tmp_path / 'data.jsonl'}", "env.template='Q {question} A '", "env.held_out=0.3",
        "env.max_turn_tokens=12", "env.vocabulary_size=280", "policy=causal_lm_tiny", "rollout.prompts=4",
        "rollout.group_size=3", "agent.lr=0.01", "correction.horizon=12", "steps=96", "eval_episodes=2",
        "progress=false",
    ]  # fmt: skip
    alone = ["correction=dr_grpo", "correction.kernel.clip_low=1.0", "correction.kernel.clip_high=1e6"]
    left = {}
    for name, own in (
        ("luffy", ["recipe=luffy", f"rollout.sources={{demonstrations: null, teacher: {source}}}"]),
        ("control", alone),
    ):
        job = Job(resolve_defaults(compose([*shared, *own])))
        trainer = job.make_trainer(tmp_path / name)
        taught = job.env.demonstrations(8, stream())
        before = job.policy.nll(taught).sum().item()
        for _ in range(8):
            trainer.update()
            assert trainer.means.pop().get("rollout/joined/teacher", 0.0) == (4.0 if name == "luffy" else 0.0)
        left[name] = job.policy.nll(taught).sum().item() / before
    assert left["luffy"] < 0.6 and left["control"] > 0.9, left


def test_a_files_answers_are_a_batch_of_their_own(tmp_path: Path) -> None:
    env = sums(tmp_path)
    path = file_of(tmp_path, [{"prompt": env._pools["train"][0]["text"], "answer": "#### 1"}])
    rows, _ = rollout(env, sources={"expert": ExpertFile(path, rows=5)}).collect(0)
    shown = others(rows)
    assert len(shown) == 5 == len(set(shown["group"].tolist()) - set(own(rows)["group"].tolist()))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "answers.jsonl, line 1: not JSON"),
        ('{"prompt": "a"}', "line 1: no field 'completion'; the record has 'prompt'; expected a"),
        ('{"prompt": "a", "answer": "b", "log_probs": ["x"]}', "line 1: field 'log_probs' is no list of numbers"),
        ('{"prompt": "a", "answer": "b", "log_probs": [0.1]}', "line 1: field 'log_probs' holds 0.1, and a log-prob"),
        ('{"prompt": "a", "answer": "b", "completion_ids": [1.5]}', "field 'completion_ids' is no list of token ids"),
        (
            '{"prompt": "a", "answer": "b", "r": "high"}',
            "line 1: field 'r' is no reward: expected a number, got 'high'",
        ),
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 1: .*expected a prompt"),
        ("", "holds no record"),
    ],
)
def test_a_line_that_is_no_answer_is_named(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(line)
    with pytest.raises(DataError, match=words):
        rollout(sums(tmp_path), sources={"x": ExpertFile(str(path), rows=1, reward_key="r" if '"r"' in line else None)})


def test_prompts_of_no_training_problem_are_counted_and_passed_over_only_on_request(tmp_path: Path) -> None:
    env = sums(tmp_path)
    held_out = env._pools["eval"][0]["text"]
    lines = [{"prompt": held_out, "answer": "#### 1"}, {"prompt": env._pools["train"][0]["text"], "answer": "#### 2"}]
    path = file_of(tmp_path, lines)
    with pytest.raises(ConfigError, match=r"rollout.sources.expert: 1 of 2 prompts .*line 1; set .*partial=true"):
        rollout(env, sources={"expert": ExpertFile(path, rows=4)})
    rows, _ = rollout(env, sources={"expert": ExpertFile(path, rows=4, partial=True)}).collect(0)
    held = {problem["prompt_id"] for problem in env.problems(20, stream(), "eval")}
    assert not held & set(others(rows)["prompt_id"].tolist())
    with pytest.raises(ConfigError, match="the file is of another task"):
        rollout(env, sources={"expert": ExpertFile(file_of(tmp_path, lines[:1]), rows=4, partial=True)})


def test_a_pool_gives_back_the_best_answers_to_prompts_that_come_again() -> None:
    made = rollout(Repeating(modulus=5, terms=3), prompts=6, sources={"pool": Pool(per_group=2, size=2, at_least=1.0)})
    seen: dict[int, list[TensorDict]] = {}
    again = 0
    for version in range(4):
        rows, metrics = made.collect(version)
        back = others(rows)
        again += len(back)
        assert metrics["rollout/joined/pool"] == len(back)
        for at in range(len(back)):
            row = back[at]
            assert int(row["source"]) == int(Source.OFFLINE) and float(row["reward"].sum()) == 1.0
            twins = [one for one in seen[int(row["prompt_id"])] if torch.equal(one["tokens"], row["tokens"])]
            assert any(
                torch.equal(one["behavior_log_prob"], row["behavior_log_prob"])
                and torch.equal(one["policy_version"], row["policy_version"])
                for one in twins
            )
            assert int(row["policy_version"].max()) < version
            mine = own(rows)[own(rows)["prompt_id"] == row["prompt_id"]]
            assert int(row["group"]) in mine["group"].tolist()
        for at in range(len(own(rows))):
            seen.setdefault(int(own(rows)["prompt_id"][at]), []).append(own(rows)[at].clone())
    assert again > 0


def test_a_pool_keeps_the_best_or_the_newest_and_forgets_the_prompt_longest_unseen() -> None:
    def row(prompt: int, reward: float, mark: int) -> TensorDict:
        columns = {"prompt_id": [prompt], "reward": [[reward]], "source": [0], "group": [0], "mark": [mark]}
        return TensorDict({k: torch.tensor(v) for k, v in columns.items()}, batch_size=[1])

    def marks(pool: Pool) -> dict[int, list[int]]:
        return {prompt: [int(one["mark"]) for one in kept] for prompt, kept in pool._answers.items()}

    answers = [row(1, 1.0, 0), row(1, 0.0, 1), row(1, 1.0, 2), row(1, 0.5, 3)]
    found = {}
    for keep in ("best", "newest"):
        pool = Pool(size=2, keep=keep, prompts=2)
        for one in answers:
            pool.observe(one)
        found[keep] = marks(pool)[1]
    assert found == {"best": [2, 0], "newest": [3, 2]}
    pool.observe(row(2, 0.0, 4))
    pool.observe(row(1, 0.0, 5))
    pool.observe(row(3, 0.0, 6))
    assert marks(pool) == {1: [5, 3], 3: [6]}
    other = Pool(size=2, keep="newest", prompts=2)
    other.load_state_dict(pool.state_dict())
    assert marks(other) == marks(pool)


def test_a_pool_may_wait_until_every_answer_failed() -> None:
    made = rollout(
        Repeating(modulus=5, terms=3), prompts=6, group_size=1, sources={"pool": Pool(at_least=1.0, when="failed")}
    )
    joined = 0
    for version in range(5):
        rows, _ = made.collect(version)
        won = {int(g) for g, r in zip(own(rows)["group"], own(rows)["reward"].sum(-1), strict=True) if r > 0}
        assert not won & set(others(rows)["group"].tolist())
        joined += len(others(rows))
    assert joined > 0


def recorded(folder: Path, env: Any, collections: int = 2) -> str:
    made = rollout(env, seed=7)
    replay = Replay(PROMPTS * GROUP * collections, sampler=Uniform())
    for _ in range(collections):
        replay.extend(made.collect(5)[0])
    replay.dumps(folder / "rows")
    return str(folder / "rows")


def test_recorded_rows_join_by_prompt_or_come_in_whole_groups(tmp_path: Path) -> None:
    data = recorded(tmp_path, Repeating(modulus=5, terms=3))
    options = {"joined": Recorded(data, per_group=2), "batch": Recorded(data, rows=2 * GROUP)}
    rows, metrics = rollout(Repeating(modulus=5, terms=3), prompts=6, sources=options).collect(0)
    count = int(metrics["rollout/joined/joined"])
    joined, batch = others(rows)[:count], others(rows)[count:]
    assert count > 0 and len(batch) == 2 * GROUP
    for row, prompt in zip(joined["group"].tolist(), joined["prompt_id"].tolist(), strict=True):
        assert prompt in own(rows)["prompt_id"][own(rows)["group"] == row].tolist()
    sizes = torch.unique(batch["group"], return_counts=True)[1].tolist()
    assert sizes == [GROUP, GROUP] and not set(batch["group"].tolist()) & set(own(rows)["group"].tolist())
    assert bool((batch["policy_version"] == 0).all()) and bool((batch["source"] == int(Source.OFFLINE)).all())
    assert bool((batch["behavior_log_prob"][batch["mask"]] != 0).any())
    with pytest.raises(ConfigError, match=r"rollout.sources.x.data=.* holds rows of .* tokens; the task's records"):
        rollout(ChainMod(modulus=5, terms=4), sources={"x": Recorded(data, rows=8)})
    with pytest.raises(ConfigError, match=r"rollout.sources.x.rows=3 is less than one recorded group of 4 rows"):
        rollout(sources={"x": Recorded(data, rows=3)})
    with pytest.raises(ConfigError, match=r"the rows of rollout.sources.x lack scores"):
        rollout(columns={"scores": ["correct"]}, sources={"x": Recorded(data, rows=8)}).collect(0)


def test_answers_of_another_model_end_where_its_folder_says(tmp_path: Path) -> None:
    env = chain()
    ends = [env.tokenizer.eos_token_id, env.tokenizer.convert_tokens_to_ids(">")]
    model = CausalLM(**env.policy_inputs(), config=TINY, seed=9).model
    model.generation_config.eos_token_id = ends
    model.save_pretrained(tmp_path / "model")
    rows, _ = rollout(sources={"teacher": Model(str(tmp_path / "model"), per_group=4)}).collect(0)
    said = others(rows)
    count = torch.isin(said["tokens"], torch.tensor(ends)) & said["mask"]
    assert bool((count.sum(-1) <= 1).all()) and bool(count.any())


def test_another_language_model_answers_the_same_prompts(tmp_path: Path) -> None:
    env = chain()
    CausalLM(**env.policy_inputs(), config=TINY, seed=9).model.save_pretrained(tmp_path / "model")
    folder = str(tmp_path / "model")
    made = rollout(sources={"teacher": Model(folder, per_group=2), "bare": Model(folder, rows=3)})
    rows, _ = made.collect(0)
    taught, bare = others(rows)[: 2 * PROMPTS], others(rows)[2 * PROMPTS :]
    assert torch.equal(taught["prompt_id"][::2], own(rows)["prompt_id"][::GROUP])
    assert bool((taught["source"] == int(Source.EXPERT)).all())
    assert len(bare) == 3 and bool((others(rows)["behavior_log_prob"] == 0).all())
    cold = rollout(sources={"teacher": Model(folder, per_group=2, temperature=1e-4)})
    answers = others(cold.collect(0)[0])
    with torch.no_grad():  # at next to no temperature it says what it finds likeliest
        sure = CausalLM(**env.policy_inputs(), path=folder, temperature=1e-4).log_prob(answers).log_prob
    assert float((sure * answers["mask"]).abs().max()) < 1e-2
    assert torch.equal(own(rows)["tokens"], rollout().collect(0)[0]["tokens"])
    for settings in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 0.999}):  # each leaves the likeliest token alone
        sharp = rollout(sources={"teacher": Model(folder, per_group=2, **settings)})
        assert torch.equal(others(sharp.collect(0)[0])["tokens"], answers["tokens"])
    half = Model(folder, per_group=2, top_k=1, dtype="bfloat16", autocast=True, repetition_penalty=30.0)
    said = others(rollout(sources={"teacher": half}).collect(0)[0])
    assert half.model.model.dtype == torch.bfloat16 and half.model.autocast
    spoken = [row["tokens"][row["mask"]].tolist() for row in said]
    assert all(len(set(ids)) == len(ids) for ids in spoken) and not torch.equal(said["tokens"], answers["tokens"])


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sources": {"x": Demonstrations(rows=1)}}, r"rollout.sources.x: Bare has no solutions; .*env=chain_mod"),
        ({"context": Hints()}, r"rollout.context: Bare has no solutions"),
        ({"privileged": "chain"}, r"rollout.privileged: Bare has no solutions"),
        ({"columns": {"scores": ["corect"]}}, r"rollout.columns.scores names 'corect'.*did you mean 'correct'"),
    ],
)
def test_what_a_task_lacks_is_refused_by_name_before_the_first_step(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        rollout(Bare(), **options)


def test_a_task_that_offers_no_capability_at_all_is_refused_by_name(tmp_path: Path) -> None:
    class Foreign:
        """The bare protocol, nothing more."""

        tokenizer = chain().tokenizer
        max_length, max_turns, max_turn_tokens = 20, 1, 8

    path = file_of(tmp_path, [{"prompt": "a", "answer": "b"}])
    for source, words in ((Demonstrations(rows=1), "no solve"), (ExpertFile(path, rows=1), "no find_problems")):
        with pytest.raises(ConfigError, match=rf"rollout.sources.x .*Foreign has {words}\(\)"):
            source.check(Foreign(), None, "rollout.sources.x")


def test_recited_answers_serve_tasks_of_one_turn_and_styles_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"rollout.sources.x recites one answer .*GuessNumber has up to \d+ turns"):
        rollout(GuessNumber(), sources={"x": Demonstrations(rows=1)})
    with pytest.raises(ConfigError, match=r"rollout.sources.x: demonstration style 'long' is unknown"):
        rollout(sources={"x": Demonstrations(rows=1, style="long")})
    for kind in (Demonstrations, lambda **o: Recorded("x", **o)):
        with pytest.raises(ConfigError, match="exactly one of per_group and rows"):
            kind(per_group=1, rows=1)


# ------------------------------------------------------------------------------------------------ whole runs


def test_a_run_with_every_source_resumes_bit_for_bit(tmp_path: Path) -> None:
    from test_resume import COMMON, LANGUAGE, cut_run, equal, rows_of, same_files

    sources = "unified_rl.rollout.sources"
    added = [
        "rollout.columns={scores: [correct, truncated]}",
        f"rollout.sources.pool._target_={sources}.Pool",
        "rollout.sources.pool.keep=newest",
        f"rollout.sources.shown._target_={sources}.Demonstrations",
        "rollout.sources.shown.rows=3",
        "rollout.context._target_=unified_rl.rollout.context.Refill",
        "agent.objectives={policy: {rows: own}, imitate: {name: nll, rows: demonstration}}",
        "env.modulus=2",
        "env.terms=2",
    ]
    kept = [o for o in LANGUAGE if not o.startswith("env.")]
    overrides = [*COMMON, *kept, *added, "steps=96", "checkpoint_every=16", f"run_dir={tmp_path / 'whole'}"]
    whole = train(resolve_defaults(compose(overrides)))
    assert max(row.get("rollout/joined/pool", 0) for row in rows_of(whole)) > 0
    assert {row["rollout/joined/shown"] for row in rows_of(whole) if "rollout/joined/shown" in row} == {3.0}
    saves = checkpoints(whole / "checkpoints")
    final = read_checkpoint(saves[-1])
    for save in saves[1:-1:2]:
        part = tmp_path / save.name
        cut_run(whole, part, save)
        resume(str(part))
        equal(final, read_checkpoint(checkpoints(part / "checkpoints")[-1]))
        same_files(saves[-1] / "replay", checkpoints(part / "checkpoints")[-1] / "replay")
        assert rows_of(part) == rows_of(whole)
    assert rows_of(whole)[-1]["steps"] == 96  # budgets count own conversations


class Endless:
    """Says 1s without end, and notes how many it was asked for."""

    def generate(self, prompts: Any, *, max_new_tokens: int, **options: Any) -> Generation:
        self.asked, rows = max_new_tokens, len(prompts)
        tokens = torch.full((rows, max_new_tokens), 1)
        length = torch.full((rows,), max_new_tokens)
        return Generation(tokens, torch.zeros(tokens.shape), length, torch.ones(rows, dtype=torch.bool))


def test_what_an_answer_begins_with_counts_towards_its_own_budget_alone() -> None:
    env, speaker = chain(), Endless()
    problems = env.problems(3, stream(0), "train")
    budget = env.max_turn_tokens
    talk, _ = converse(env, speaker, problems, None, prefixes=[[], [1, 1], [1] * (budget - 1)])
    assert speaker.asked == budget and talk.mask.sum(-1).tolist() == [budget, budget - 2, 1]
    assert talk.truncated[:, 0].tolist() == [False, True, True]  # the others' ends lie beyond their budgets
    alone, _ = converse(env, Endless(), problems[1:2], None, prefixes=[[1, 1]])
    assert torch.equal(alone.tokens[0], talk.tokens[1])  # whoever stands beside it


def test_solutions_that_rows_have_no_room_for_are_refused() -> None:
    class Verbose(ChainMod):
        def solve(self, problems: Any, style: str | None = None) -> list[list[int]]:
            return [[1] * (self.max_turn_tokens + 1) for _ in problems]

    with pytest.raises(ConfigError, match=r"rollout.privileged shows solutions of up to \d+ tokens, more than fit"):
        rollout(Verbose(modulus=5, terms=3), privileged="chain").collect(0)
