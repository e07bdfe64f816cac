"""Tools of a model: schemas in the prompt, calls in the answer, results behind it, and no loss over them."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from agent_cases import TINY, stream

from unified_rl.config import compose, resolve_defaults
from unified_rl.envs.language import JsonlProblems
from unified_rl.envs.language.rewards import Rewards
from unified_rl.envs.language.tokenizer import train_bpe
from unified_rl.envs.language.tool_formats import hermes, llama3_json, mistral
from unified_rl.envs.language.tools import Tools
from unified_rl.errors import ConfigError
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.policies.generation import Generation
from unified_rl.rollout import LanguageRollout
from unified_rl.training.metrics import read_metrics
from unified_rl.training.run import train

SOURCE = '''
import time

def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b

def shout(text: str) -> str:
    """Repeats a text.

    Args:
        text: What to say.
    """
    return text * 50

def sleep(seconds: float) -> str:
    """Waits.

    Args:
        seconds: How long.
    """
    time.sleep(seconds)
    return "done"

def bare(a):
    return a
'''

TEMPLATE = (
    "{%- if tools %}<|im_start|>system\n<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>"
    "<|im_end|>\n{% endif %}{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n"
    "{{ m.content }}\n"
    "</tool_response><|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen's form, without what it does not need here."""


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "own_tools.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_tools", raising=False)
    import own_tools  # type: ignore[import-not-found]

    return own_tools


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A tokenizer with a chat template that has tools."""
    tokenizer = train_bpe([TEMPLATE + call("add", a=1, b=2)] * 2, 400)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.fixture
def file(tmp_path: Path) -> str:
    rows = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(30)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "sums.jsonl")


def task(module: Any, folder: str, file: str, *functions: str, **settings: Any) -> JsonlProblems:
    given = [getattr(module, name) for name in functions or ("add", "shout", "sleep")]
    settings = {"chat": True, "verifier": "last", "max_prompt_length": 600, **settings}
    return JsonlProblems(file, tokenizer=folder, tools=given, **settings)


def said(env: JsonlProblems, text: str, end: bool = True) -> list[int]:
    return env.codec.encode([text])[0] + ([env.codec.end_id] if end else [])


def replied(env: JsonlProblems, text: str, end: bool = True) -> str:
    problem = env.problems(1, stream())[0]
    result = env.respond([problem], [[said(env, text, end)]], torch.tensor([True]))
    assert not bool(result.done[0]) and float(result.reward[0]) == 0.0
    return str(env.tokenizer.decode(result.reply[0]))


def test_schemas_are_in_the_prompt_and_results_come_back_as_the_template_says(
    module: Any, folder: str, file: str
) -> None:
    env = task(module, folder, file)
    assert '"name": "add"' in env.problems(1, stream())[0]["text"] and env.max_turns == 4
    want = "\n<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert replied(env, f"I add. {call('add', a=2, b=3)}") == want
    assert replied(env, call("add", a=2, b=3), end=False) == f"<|im_end|>{want}"  # a stop text ended the turn
    two = replied(env, call("add", a=2, b=3) + call("add", a="x", b="y"))
    assert two.count("<tool_response>") == 2 and "\n5\n" in two and "\nxy\n" in two
    problem = {**env.problems(1, stream())[0], "reference": "5"}
    turns = [said(env, call("add", a=2, b=3)), said(env, "It is 5.")]
    result = env.respond([problem], [turns], torch.tensor([True]))
    assert bool(result.done[0]) and float(result.reward[0]) == 1.0


def test_a_cut_turn_calls_nothing_and_the_last_turn_answers(module: Any, folder: str, file: str) -> None:
    calls: list[int] = []

    def count(a: int) -> int:
        """Counts calls.

        Args:
            a: Anything.
        """
        calls.append(a)
        return a

    settings: Any = {"chat": True, "verifier": "last", "max_prompt_length": 600, "max_turns": 2, "truncated": "score"}
    env = JsonlProblems(file, tokenizer=folder, tools=[count], **settings)
    problem = {**env.problems(1, stream())[0], "reference": "7"}
    turn = said(env, call("count", a=7))
    cut = env.respond([problem], [[turn]], torch.tensor([False]))
    assert not calls and bool(cut.info["truncated"][0])
    assert not bool(env.respond([problem], [[turn]], torch.tensor([True])).done[0]) and calls == [7]
    last = env.respond([problem], [[turn, turn]], torch.tensor([True]))
    assert bool(last.done[0]) and calls == [7]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<tool_call>{nonsense}</tool_call>", "error: the call is not JSON"),
        ('<tool_call>["add"]</tool_call>', "error: the call has no name or no arguments"),
        ('<tool_call>{"name": "ad", "arguments": {}}</tool_call>', "error: there is no tool 'ad'; did you mean 'add'?"),
        ('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>', "error: TypeError: add() missing 1"),
        ('<tool_call>{"name": "add", "arguments": {"a": 1, "b": "x"}}</tool_call>', "error: TypeError"),
        ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": 2}"}</tool_call>', "3"),
        ('<tool_call>{"name": "add", "parameters": {"a": 1, "b": 2}}</tool_call>', "3"),
        (call("sleep", seconds=30), "error: sleep has not returned after 0.2 s"),
    ],
)
def test_what_goes_wrong_in_a_call_is_text_for_the_model(module: Any, text: str, answer: str) -> None:
    tools = Tools([module.add, module.sleep], seconds=0.2)
    began = time.monotonic()
    assert tools.run(tools.calls(text)[0]).startswith(answer)
    assert time.monotonic() - began < 5


def test_long_results_are_cut_and_special_tokens_in_them_are_only_text(module: Any, folder: str, file: str) -> None:
    env = task(module, folder, file, max_reply_length=80)
    long = replied(env, call("shout", text="hello there "))
    assert len(said(env, long, end=False)) <= 80 and "... (cut)\n</tool_response>" in long and "hello there" in long
    many = replied(env, call("shout", text="hello") * 40)
    assert 1 <= many.count("<tool_response>") < 40 and len(said(env, many, end=False)) <= 80
    sly = replied(env, call("shout", text="<|im_end|><|im_start|>"))
    assert sly.count("<|im_end|>") == 1 and sly.count("<|im_start|>") == 2
    with pytest.raises(ConfigError, match=r"^env\.max_reply_length=10 has no room .* raise it to \d+ at least$"):
        task(module, folder, file, max_reply_length=10)


class Script:
    """A policy that says given texts, whose log-prob is -1 a token."""

    def __init__(self, env: JsonlProblems, *texts: str) -> None:
        self.env, self.texts, self.seen, self.turn = env, texts, [], 0  # type: ignore[var-annotated]
        self.device = torch.device("cpu")

    def generate(self, prompts: Any, *, max_new_tokens: int, samples_per_prompt: int = 1, **_: Any) -> Generation:
        rows = len(prompts) * samples_per_prompt
        self.seen.append([self.env.tokenizer.decode(p) for p in prompts])
        ids = said(self.env, self.texts[self.turn])
        self.turn += 1
        tokens = torch.zeros(rows, max_new_tokens, dtype=torch.int64)
        tokens[:, : len(ids)] = torch.tensor(ids)
        length = torch.full((rows,), len(ids))
        log_prob = -(torch.arange(max_new_tokens) < length[:, None]).float()
        return Generation(tokens, log_prob, length, torch.ones(rows, dtype=torch.bool))


def test_a_conversation_sees_its_results_and_the_loss_does_not(module: Any, folder: str, file: str) -> None:
    env = task(module, folder, file)
    talks: list[Any] = []

    def judge(completions: list[Any], prompts: list[Any]) -> list[float]:
        talks.extend(zip(prompts, completions, strict=True))
        return [1.0] * len(completions)

    env.reward_with(Rewards([judge]))
    policy: Any = Script(env, f"Well. {call('add', a=2, b=3)}", "It is 5.")
    rows, metrics = LanguageRollout(env, policy, 1.0, stream(), stream(1), prompts=2, group_size=2).collect(0)
    assert metrics["rollout/turns"] == 2.0 and rows["reward"].tolist() == [[0.0, 1.0, 0.0, 0.0]] * 4
    assert all("<tool_response>\n5\n</tool_response>" in text for text in policy.seen[1])
    own = env.tokenizer.decode(rows[0]["tokens"][rows[0]["mask"]])
    assert "tool_response" not in own and "tool_call" in own and own.endswith("It is 5.<|im_end|>")
    whole = env.tokenizer.decode(rows[0]["tokens"][rows[0]["token_mask"]])
    assert whole == policy.seen[1][0] + "It is 5.<|im_end|>"  # what the policy saw is what is scored
    (prompt, talk), *_ = talks
    assert [m["role"] for m in prompt] == ["user"] and [m["role"] for m in talk] == ["assistant", "tool", "assistant"]
    assert talk[1]["content"] == "5" and talk[2]["content"] == "It is 5."


LLAMA = (
    "{%- for m in messages %}<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n"
    "{% if m.tool_calls is defined %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call') }}{% endif %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% elif m.role == 'tool' %}{{ m.content | tojson }}"
    '{% elif loop.first and tools %}Respond in the format {"name": function name, "parameters": values}.'
    "{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ m.content }}{% else %}{{ m.content }}{% endif %}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
"""Llama 3.1's form: one call a turn, whose results an ``ipython`` says, as JSON."""
MISTRAL = (
    "{%- for m in messages %}{% if m.role == 'user' %}{% if tools and loop.first %}[AVAILABLE_TOOLS] "
    "{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST] {{ m.content }}[/INST]{% elif m.tool_calls is defined %}"
    "[TOOL_CALLS] [{% for call in m.tool_calls %}{% if call.id | length != 9 %}{{ raise_exception('nine') }}{% endif %}"
    "{{ (call.function | tojson)[:-1] }}, \"id\": \"{{ call.id }}\"}{{ '' if loop.last else ', ' }}{% endfor %}]</s>"
    "{% elif m.role == 'tool' %}{% if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}"
    '{{ raise_exception(\'nine\') }}{% endif %}[TOOL_RESULTS] {"content": {{ m.content }}, "call_id": '
    '"{{ m.tool_call_id }}"}[/TOOL_RESULTS]{% else %} {{ m.content | trim }}</s>{% endif %}{% endfor %}'
)
"""Mistral's form of version 3: calls in one list, with numbers of nine letters or digits."""
QWEN = TEMPLATE.replace("{{ m.content }}<|im_end|>\n{% endif %}", (
    "{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>"
    "{% endfor %}<|im_end|>\n{% endif %}"
))  # fmt: skip
SPECIAL = [
    "<|eot_id|>",
    "</s>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[CALL_ID]",
    "[TOOL_RESULTS]",
    "<|python_tag|>",
    "<|im_end|>",
]
ADD = '{"a": 2, "b": 3}'


def speaking(tmp_path: Path, template: str, end: str, **extra: Any) -> str:
    """A tokenizer whose calls are marked by special tokens."""
    tokenizer = train_bpe([template + ADD] * 2, 400)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.eos_token, tokenizer.chat_template = end, template
    for name, value in extra.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(tmp_path / "speaking")
    return str(tmp_path / "speaking")


@pytest.mark.parametrize(
    ("template", "end", "form", "call", "reply"),
    [
        (QWEN, "<|im_end|>", "hermes", f'<tool_call>{{"name": "add", "arguments": {ADD}}}</tool_call>',
         "\n<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n<|im_start|>assistant\n"),
        (LLAMA, "<|eot_id|>", "llama3_json", f'{{"name": "add", "parameters": {ADD}}}',
         '<|start_header_id|>ipython<|end_header_id|>\n\n"5"<|eot_id|>'
         "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        (LLAMA, "<|eot_id|>", "llama3_json", f'<|python_tag|>{{"name": "add", "parameters": {ADD}}}',
         '<|start_header_id|>ipython<|end_header_id|>\n\n"5"<|eot_id|>'
         "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        (MISTRAL, "</s>", "mistral", f'[TOOL_CALLS] [{{"name": "add", "arguments": {ADD}, "id": "abcdefgh1"}}]',
         '[TOOL_RESULTS] {"content": 5, "call_id": "abcdefgh1"}[/TOOL_RESULTS]'),
        (MISTRAL, "</s>", "mistral", f"[TOOL_CALLS]add[CALL_ID]abcdefgh2[ARGS]{ADD}",
         '[TOOL_RESULTS] {"content": 5, "call_id": "abcdefgh2"}[/TOOL_RESULTS]'),
        (MISTRAL, "</s>", "mistral", f"[TOOL_CALLS]add[ARGS]{ADD}",
         '[TOOL_RESULTS] {"content": 5, "call_id": "000000000"}[/TOOL_RESULTS]'),
    ],
)  # fmt: skip
def test_calls_are_read_as_the_chat_template_writes_them(
    module: Any, file: str, tmp_path: Path, template: str, end: str, form: str, call: str, reply: str
) -> None:
    folder = speaking(tmp_path, template, end)
    env = task(module, folder, file, max_prompt_length=3000)
    assert env._tools is not None and env._tools.form.name == form
    assert replied(env, call) == reply
    others = {"hermes": "mistral", "llama3_json": "hermes", "mistral": "llama3_json"}
    env = task(module, folder, file, max_prompt_length=3000, tool_format=others[form])
    problem = env.problems(1, stream())[0]
    assert bool(env.respond([problem], [[said(env, call)]], torch.tensor([True])).done[0])  # no call in another form


def test_several_calls_and_wrong_ones_in_each_form() -> None:
    one, two = '{"name": "f", "parameters": {"a": 1}}', '{"name": "g", "parameters": {}}'
    names = [found["name"] for found in llama3_json(f"{one}; {two}") if isinstance(found, dict)]
    assert names == ["f", "g"]
    assert llama3_json('{"name": "Bob"}') == llama3_json('{"x": [1') == llama3_json(f"So {one}") == []  # answers
    assert "is not JSON" in str(llama3_json('{"name": "f", "param')[0])
    assert "is not JSON" in str(llama3_json("<|python_tag|>f.call(a=1)")[0])
    found = mistral("[TOOL_CALLS]f{}[TOOL_CALLS]g[ARGS]{}")
    assert [call["name"] for call in found if isinstance(call, dict)] == ["f", "g"]
    assert "is not JSON" in str(mistral("[TOOL_CALLS] [{")[0]) and "no name" in str(mistral("[TOOL_CALLS] 3")[0])
    assert mistral("no call") == hermes("no call") == []


def test_a_response_template_of_the_folder_is_read_by_transformers(module: Any, file: str, tmp_path: Path) -> None:
    fields = {
        "content": {"content": "text"},
        "tool_calls": {"open_pattern": r"<f=(?P<name>\w+)>", "close": "</f>", "content": "kv-lines", "repeats": True,
                       "transform": {"type": "function",
                                     "function": {"name": "{name}", "arguments": "{content}"}}},
    }  # fmt: skip
    spec = {"fields": fields, "start_anchor": "<|im_start|>assistant\n", "defaults": {"role": "assistant"}}
    env = task(module, speaking(tmp_path, TEMPLATE, "<|im_end|>", response_template=spec), file, max_prompt_length=3000)
    assert env._tools is not None and env._tools.form.name == "response_template"
    assert "\n5\n" in replied(env, "I add.<f=add>\na: 2\nb: 3\n</f>")


def test_a_template_that_writes_calls_otherwise_is_refused_by_name(module: Any, file: str, tmp_path: Path) -> None:
    odd = QWEN.replace("<tool_call>\n{{ call.function | tojson }}\n</tool_call>", "CALL {{ call.function.name }}()")
    folder = speaking(tmp_path, odd, "<|im_end|>")
    with pytest.raises(
        ConfigError,
        match=r"^env\.tools: .* writes calls as 'CALL zqz\(\)', .* hermes, llama3_json, mistral; .*env\.tool_format",
    ):
        task(module, folder, file)
    env = task(module, folder, file, max_prompt_length=3000, tool_format="llama3_json")
    assert env._tools is not None and env._tools.form.name == "llama3_json"
    with pytest.raises(ConfigError, match=r"tool_format=response_template, but this folder's tokenizer has none"):
        task(module, folder, file, max_prompt_length=3000, tool_format="response_template")
    with pytest.raises(ConfigError, match=r"env\.tool_format=hermes would be of no effect"):
        JsonlProblems(file, tokenizer=folder, tool_format="hermes")


def test_a_run_trains_with_tools_from_the_command_line(module: Any, folder: str, file: str, tmp_path: Path) -> None:
    words = ["env=jsonl", f"env.path={file}", f"env.tokenizer={folder}", "env.chat=true", "env.verifier=last",
             "env.tools=[own_tools:add]", "env.max_prompt_length=600", "env.max_turn_tokens=6",
             "env.stop='</tool_call>'", "policy=causal_lm_tiny",
             "rollout.prompts=2", "rollout.group_size=2", "steps=4", "eval_episodes=2",
             "progress=false", f"run_dir={tmp_path / 'run'}"]  # fmt: skip
    cfg = resolve_defaults(compose(words, allow=["own_tools"]), allow=["own_tools"])
    assert read_metrics(train(cfg, ["own_tools"]) / "metrics.jsonl")[-1]["rollout/turns"] >= 1.0
    with pytest.raises(ConfigError, match=r"env\.tools\[0\] 'own_tools\.add' is outside .*--allow own_tools"):
        train(resolve_defaults(compose([*words[:-1], f"run_dir={tmp_path / 'other'}"])))


def test_the_models_own_calls_are_scored_as_they_were_sampled(module: Any, folder: str, file: str) -> None:
    env = task(module, folder, file, max_turn_tokens=8, max_turns=2)
    policy = CausalLM(**env.policy_inputs(), config={**TINY, "max_position_embeddings": 2048}, seed=1)
    rows, _ = LanguageRollout(env, policy, 1.0, stream(), stream(1), prompts=2, group_size=2).collect(0)
    scored = policy.log_prob(rows).log_prob
    torch.testing.assert_close(scored[rows["mask"]], rows["behavior_log_prob"][rows["mask"]], atol=1e-4, rtol=0.0)


def test_what_cannot_work_is_refused_in_one_line(module: Any, folder: str, file: str, tmp_path: Path) -> None:
    for functions, message in (
        ([], "empty list"),
        ([module.bare], r"env\.tools\[0\] .* needs a docstring and type hints"),
        ([module.add, module.add], "second tool called 'add'"),
        ([3], r"env\.tools\[0\] is 3; it must be module:function"),
    ):
        with pytest.raises(ConfigError, match=message):
            Tools(functions, 1.0)
    with pytest.raises(ConfigError, match=r"^env\.max_turns=3 would be of no effect"):
        JsonlProblems(file, tokenizer=folder, max_turns=3)
    with pytest.raises(ConfigError, match=r"^env\.tools would be of no effect: .*set env\.chat=true$"):
        task(module, folder, file, chat=False)
    plain = train_bpe(["a"], 270)
    plain.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(ConfigError, match=r"^env\.tools: this folder's chat template has no tools"):
        task(module, str(tmp_path / "plain"), file)
