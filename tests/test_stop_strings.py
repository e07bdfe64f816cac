"""Texts of any length end a turn: at the token that completes them, with tokens and log-probs as they were sampled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agent_cases import TINY, stream

from unified_rl.envs.language import ChainMod, JsonlProblems, LanguageTurnEnv
from unified_rl.envs.language.rewards import Rewards
from unified_rl.envs.language.tokenizer import train_bpe
from unified_rl.errors import ConfigError
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.policies.stop_strings import StopStrings
from unified_rl.rollout import LanguageRollout

TEXT = "so <answer>42</answer> and\n\nQuestion: naïve 7 → 8?"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_bpe([TEXT, "What is 1+1? answer"], 300)


def ids_of(tokenizer: Any, *texts: str) -> list[int]:
    return [i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize(
    ("pieces", "stop", "until"),
    [
        (["so <answer>42</ans", "wer", "> and"], ["</answer>"], "so <answer>42</answer>"),
        (["a\n", "\n", "b"], ["\n\n"], "a\n\n"),
        (["x \n\nQues", "tion: y"], ["Question:", "zzz"], "x \n\nQuestion:"),
        (["7 ", "→", " 8"], ["→"], "7 →"),
        (["na", "ï", "ve"], ["ïv"], "naïv"),
        (["12", "3 4"], ["3 "], "123 "),
        (["ab", "c"], ["abd"], None),
    ],
)
def test_the_token_that_completes_a_text_ends_the_answer(
    tokenizer: Any, pieces: list[str], stop: list[str], until: str | None
) -> None:
    ids = ids_of(tokenizer, *pieces)
    found = StopStrings(tokenizer, stop)
    length = int(found.find(torch.tensor([ids]))[0])
    if until is None:
        assert length == len(ids) + 1
        return
    text = tokenizer.decode(ids[:length])
    assert text.startswith(until) and not any(s in tokenizer.decode(ids[: length - 1]) for s in stop)
    for since in range(length):  # a look at the newest tokens finds the same
        assert int(found.find(torch.tensor([ids]), since)[0]) == length


def test_rows_are_found_apart_from_each_other(tokenizer: Any) -> None:
    found = StopStrings(tokenizer, ["42"])
    rows = [
        ids_of(tokenizer, text)[:6] for text in ("so 42 and more and more", "so so so so so so so", "42 42 42 42 42")
    ]
    got = found.find(torch.tensor([(row + [0] * 6)[:6] for row in rows])).tolist()
    for row, length in zip(rows, got, strict=True):
        want = next((n for n in range(1, 7) if "42" in tokenizer.decode(row[:n])), 7)
        assert length == want


def policy_of(env: Any, **options: Any) -> CausalLM:
    return CausalLM(**env.policy_inputs(), config=TINY, seed=1, **options)


@pytest.mark.parametrize("check_every", [1, 8])
@pytest.mark.parametrize("pad_is_end", [False, True])
def test_generation_stops_there_and_samples_the_same_until_then(
    monkeypatch: pytest.MonkeyPatch, check_every: int, pad_is_end: bool
) -> None:
    from unified_rl.policies import generation

    env = ChainMod(max_turn_tokens=24)
    policy = policy_of(env)
    if pad_is_end:
        policy.pad_id = env.codec.eos_id
    stop = StopStrings(env.tokenizer, ["-,", "9"])
    prompts = [p["prompt"] for p in env.problems(6, stream(3))]
    arguments: dict[str, Any] = {"max_new_tokens": 24, "stop_ids": env.stop_ids, "samples_per_prompt": 4}
    init = generation._Loop.__init__

    def slower(self: Any, *args: Any) -> None:
        init(self, *args)
        self.check_every = check_every

    monkeypatch.setattr(generation._Loop, "__init__", slower)
    monkeypatch.setattr(generation, "COMPACT_BELOW", 0.0)  # finished rows stay, so both draw from the same stream
    plain = policy.generate(prompts, generator=stream(5), **arguments)
    cut = policy.generate(prompts, generator=stream(5), stop_strings=stop, **arguments)
    lengths = torch.minimum(stop.find(plain.tokens), plain.length)
    assert torch.equal(cut.length, lengths) and int((lengths < plain.length).sum()) > 3
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(cut.tokens[row, :length], plain.tokens[row, :length])
        assert torch.equal(cut.log_prob[row, :length], plain.log_prob[row, :length])
        assert bool((cut.tokens[row, length:] == policy.pad_id).all()) and not bool(cut.log_prob[row, length:].any())
    ended = stop.find(plain.tokens) <= plain.length
    assert torch.equal(cut.finished, plain.finished | ended)
    monkeypatch.setattr(generation, "COMPACT_BELOW", 1.1)  # finished rows leave: another stream, the same rule
    left = policy.generate(prompts, generator=stream(5), stop_strings=stop, **arguments)
    assert bool((stop.find(left.tokens).clamp(max=24) >= left.length).all())


def test_the_generate_of_transformers_stops_at_the_same_token() -> None:
    env = ChainMod(max_turn_tokens=16)
    policy = policy_of(env)
    stop = StopStrings(env.tokenizer, ["9", "-,"])
    prompts = [p["prompt"] for p in env.problems(8, stream(3))]
    arguments: dict[str, Any] = {"max_new_tokens": 16, "stop_ids": env.stop_ids, "greedy": True, "stop_strings": stop}
    own, reference = (policy.generate(prompts, backend=name, **arguments) for name in ("own", "hf"))
    for name in ("tokens", "length", "finished"):
        assert torch.equal(getattr(own, name), getattr(reference, name))
    torch.testing.assert_close(own.log_prob, reference.log_prob, atol=1e-5, rtol=0.0)


def test_every_task_takes_them_and_its_rows_end_there() -> None:
    env = ChainMod(max_turn_tokens=24, stop="9")
    rows, metrics = LanguageRollout(env, policy_of(env), 1.0, stream(), stream(1), prompts=6, group_size=4).collect(0)
    texts = [env.codec.decode(row["tokens"][row["mask"]].tolist()) for row in rows.unbind(0)]
    ended = [text for text in texts if "9" in text]
    assert len(ended) > 3 and all(text.index("9") == len(text) - 1 for text in ended)
    over = torch.tensor(["9" in text for text in texts])
    assert bool(rows["terminated"][over].any(-1).all()) and metrics["rollout/truncated"] < 1.0


def test_turns_of_the_torchrl_environment_end_there_too() -> None:
    env = LanguageTurnEnv(ChainMod(max_turn_tokens=8, stop="9"), num_envs=1)
    state = env.reset()
    ids = env.task.codec.encode([">95"])[0]  # type: ignore[attr-defined]
    state["action"] = torch.tensor([(ids + [0] * 8)[:8]])
    out = env.step(state)["next"]
    assert int(out["token_mask"].sum() - state["token_mask"].sum()) == 2 and bool(out["terminated"])


def test_line_ends_are_written_as_the_command_line_can_and_nothing_is_refused_by_name(tmp_path: Any) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(f'{{"question": "q{i}", "answer": "{i}"}}\n' for i in range(20)))
    env = JsonlProblems(str(file), vocabulary_size=270, stop=["</answer>", "\\n\\n"])
    assert env.stop_strings is not None and env.stop_strings.texts == ("</answer>", "\n\n")
    for wrong in ([], [""], ""):
        with pytest.raises(ConfigError, match=r"^env\.stop( is |=)"):
            ChainMod(stop=wrong)  # type: ignore[arg-type]


def test_what_judges_and_counts_reads_an_answer_up_to_its_stop_text() -> None:
    seen: list[str] = []

    def spy(completions: list[str], **columns: Any) -> list[float]:
        seen.extend(completions)
        return [0.0] * len(completions)

    env = ChainMod(stop=["=", ","])
    problem = env.problems(1, stream())[0]
    right = str(problem["totals"][-1])
    said = env.codec.encode([f">{right}="])
    told = env.respond([problem], [said], torch.tensor([True]))
    assert float(told.reward) == float(told.info["correct"]) == 1.0
    assert env.vote(problem, said) == right
    env.reward_with(Rewards([spy]))
    env.respond([problem], [said], torch.tensor([True]))
    assert seen == [f">{right}"]
    shown = [env.codec.encode(["3,4"])[0] + env.codec.encode([f">{right}="])[0]]  # a comma that was shown, not sampled
    assert env.turn_texts(shown) == [f"3,4>{right}"]


def test_a_stop_text_that_closes_a_tag_is_part_of_the_answer_and_the_rest_of_its_token_is_not(tmp_path: Any) -> None:
    file = tmp_path / "a.jsonl"
    form = " <answer>{}</answer>.\\n\\n"
    lines = [f'{{"question": "q{i}", "answer": "{i}", "completion": "{form.format(i)}"}}\n' for i in range(60)]
    file.write_text("".join(lines))
    env = JsonlProblems(str(file), vocabulary_size=600, stop=["</answer>", "\n\n"])
    (said,) = env.codec.encode([" <answer>7</answer>."])
    assert len(env.codec.encode(["</answer>."])[0]) < 4  # the stop text's end and what follows are one token
    assert env.turn_texts([said]) == [" <answer>7</answer>"]
    assert env.turn_texts([[*said, env.codec.end_id]]) == [" <answer>7</answer>."]
    assert env.turn_texts(env.codec.encode([" 7\n\n"])) == [" 7"]
    assert env.vote({}, [said]) == "7"
