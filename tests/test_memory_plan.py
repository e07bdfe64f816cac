"""The memory plan: its arithmetic, what it chooses, what it refuses, and that a run keeps what was chosen."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from agent_cases import TINY, language, stream
from memory_meter import Meter
from run_cases import LANGUAGE, composed, merged
from tensordict import TensorDict

import unified_rl as ur
from unified_rl import cli, machine
from unified_rl.agents.behavior_cloning import BehaviorCloning
from unified_rl.envs.language import ChainMod
from unified_rl.errors import ConfigError
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.policies.model_memory import Activations, Shape, activations_of, bytes_a_logit, logits, module_bytes
from unified_rl.policies.sampling import Sampling
from unified_rl.training import memory_plan as planning
from unified_rl.training.memory_plan import MemoryPlan, Part, generation_batch_for, micro_batch_for
from unified_rl.training.run import Job

ALLOW = ("run_cases",)


def policy_of(config: dict[str, Any] | None = None, **options: Any) -> CausalLM:
    env = ChainMod(modulus=5, terms=3)
    return CausalLM(**env.policy_inputs(), config={**TINY, "num_hidden_layers": 3, **(config or {})}, **options)


def test_the_cache_is_layers_times_heads_times_width_times_rows_times_length() -> None:
    policy = policy_of({"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32})
    shape = Shape.of(policy.model)
    assert (shape.layers, shape.cached, shape.item) == (3, 2 * 8, 4)
    assert shape.cache(rows=5, length=7) == 2 * 3 * 16 * 5 * 7 * 4
    assert Shape.of(policy.model, autocast=True).item == 2
    out = policy.model(torch.ones(5, 7, dtype=torch.int64), use_cache=True).past_key_values
    held = sum(x.nbytes for layer in out.layers for x in (layer.keys, layer.values))
    assert held == shape.cache(5, 7)


def saved(policy: CausalLM, rows: int, width: int) -> int:
    """Bytes that a scoring pass really keeps."""
    tokens = torch.randint(4, 12, (rows, width), generator=stream())
    mask = torch.ones(rows, width, dtype=torch.bool)
    mask[:, 0] = False
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        policy.unit_states(TensorDict({"tokens": tokens, "mask": mask}, [rows]))
    return sum(x.untyped_storage().nbytes() for address, x in kept.items() if address not in own)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"autocast": True}])
def test_activations_grow_by_the_token_as_two_tiny_passes_say(kind: str, options: dict[str, Any]) -> None:
    config = {"model_type": kind} if kind != "gpt2" else None
    policy = policy_of(config, **options)
    if kind == "gpt2":
        sizes = {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 2}
        policy = CausalLM(policy.tokenizer, policy.max_length, config=sizes, **options)
    policy.share_prompts = False
    before = copy.deepcopy(policy.state_dict())
    found = activations_of(policy)
    rows, width = 6, min(policy.max_length, 20)
    want = saved(policy, rows, width)
    assert found.fixed + found.token * rows * (width - 1) == pytest.approx(want, rel=0.12)
    assert bool(policy._recomputed) == found.recomputed == ("gradient_checkpointing" in options)
    assert all(torch.equal(x, policy.state_dict()[name]) for name, x in before.items())
    assert all(p.grad is None for p in policy.parameters())


def test_recomputing_layers_keeps_less_and_holds_one_layer_for_a_moment() -> None:
    plain, spared = activations_of(policy_of()), activations_of(policy_of(gradient_checkpointing=True))
    assert spared.token < 0.3 * plain.token and spared.layer == pytest.approx(plain.layer, rel=0.05)
    assert Activations(token=10, fixed=3, layer=2).training(5) == 3 + 5 * 12
    assert Activations(token=10, fixed=3, layer=2, recomputed=True).training(5) == 3 + 5 * 14


def test_logits_are_those_of_a_chunk() -> None:
    policy = policy_of({"vocab_size": 1000}, logit_chunk=16)
    assert logits(policy, 10, training=True) == 10 * 1000 * 12
    assert logits(policy, 100, training=True) == 16 * 1000 * 12
    assert logits(policy, 100, training=False) == 100 * 1000 * 12
    assert bytes_a_logit(Sampling(top_p=0.9), training=True) == 24


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.9}, {"repetition_penalty": 1.5}, {"min_p": 0.1}])
def test_what_a_draw_takes_is_counted(settings: dict[str, Any]) -> None:
    """Measured below autograd, within a factor of 1.6."""
    from unified_rl.policies.sampling import draw, token_log_prob

    sampling = Sampling(temperature=0.7, **settings)
    raw = torch.randn(64, 2000, generator=stream())
    seen = torch.rand(64, 2000) < 0.1 if sampling.remembers else None
    with Meter() as meter, torch.no_grad():
        read = sampling.logits(raw, seen)
        token_log_prob(read, draw(read, stream()))
    counted = bytes_a_logit(sampling, training=False) - 4  # the raw ones were there
    assert meter.peak / raw.numel() / 1.6 <= counted <= 1.6 * meter.peak / raw.numel()


def test_the_parts_of_a_plan_and_its_peak() -> None:
    def plan(*more: str) -> MemoryPlan:
        job = Job(composed(merged(LANGUAGE, more)), ALLOW)
        job.make_trainer(None)  # type: ignore[arg-type]
        assert job.memory is not None
        return job.memory

    base = plan()
    weights = sum(p.numel() for p in Job(composed(LANGUAGE), ALLOW).policy.parameters())
    sizes = {part.name: part.size for part in base.held}
    assert sizes["weights"] >= 4 * weights and sizes["gradients"] == 4 * weights and sizes["optimiser"] == 8 * weights
    assert "other policies" not in sizes and "critic" not in sizes
    assert base.peak == sum(sizes.values()) + max(part.size for part in base.phases)
    assert base.needed == pytest.approx(base.peak - sizes["weights"])
    assert base.free is not None and 0 < base.free < machine.memory()
    more = {part.name: part.size for part in plan("agent.kl=0.1", "agent.optimizer={name: sgd, momentum: 0.9}").held}
    assert more["other policies"] == sizes["weights"] and more["optimiser"] == 4 * weights
    critic = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = "{" + ", ".join(f"{k}: {v}" for k, v in critic.items()) + "}"
    assert {p.name for p in plan("agent=ppo", f"agent.critic_config={text}").held} > {"critic"}
    (small,) = (p.size for p in plan("agent.micro_batch=2").phases if p.name == "update")
    (large,) = (p.size for p in base.phases if p.name == "update")
    assert small < large / 3
    (few,) = (p.size for p in plan("rollout.generation_batch=4").phases if p.name == "generation")
    (all_,) = (p.size for p in base.phases if p.name == "generation")
    assert few < all_ / 2


def test_a_plan_that_does_not_fit_is_refused_with_the_keys_to_change() -> None:
    held = (Part("weights", 4e9, "", there=True), Part("optimiser", 8e9, ""))
    phases = (Part("generation", 3e9, ""), Part("update", 30e9, ""))
    plan = MemoryPlan("cpu", held, phases, int(16e9), "set agent.micro_batch to fewer rows")
    assert (plan.peak, plan.needed) == (42e9, 38e9)
    with pytest.raises(ConfigError, match=r"about 38 GB more memory and cpu has 16 GB free \(at most update 30 GB, "
                       r"optimiser 8 GB, weights 4 GB\): set agent\.micro_batch to fewer rows$"):  # fmt: skip
        plan.require()
    MemoryPlan("cpu", held, phases, int(39e9), "").require()
    MemoryPlan("mps", held, phases, None, "").require()


def test_a_run_that_does_not_fit_is_refused_before_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "available", lambda device: 100_000)
    with pytest.raises(ConfigError, match=r"set agent\.micro_batch to fewer rows, policy\.gradient_checkpointing=true"):
        Job(composed(merged(LANGUAGE, ("eval_episodes=1",))), ALLOW).make_trainer(None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"set rollout\.generation_batch to fewer rows"):
        Job(composed(merged(LANGUAGE, ("agent.micro_batch=1", "rollout.prompts=64"))), ALLOW).make_trainer(None)  # type: ignore[arg-type]
    assert isinstance(ur.memory_plan(composed(LANGUAGE), allow=ALLOW), MemoryPlan)  # planned all the same


# ---------------------------------------------------------------------------------------------- what is chosen


def test_chunks_are_chosen_where_they_are_needed_and_nowhere_else() -> None:
    policy = policy_of()
    whole = planning._update(policy, activations_of(policy), 64, 20)
    assert micro_batch_for(policy, 64, 20, whole) is None
    assert micro_batch_for(policy, 64, 20, whole / 3) == 16
    assert micro_batch_for(policy, 64, 20, 1.0) == 1
    cached = planning._generation(policy, activations_of(policy), 64, 20, 16)
    assert generation_batch_for(policy, 64, 20, 4, cached) is None
    assert generation_batch_for(policy, 64, 20, 4, cached / 3) == 16
    assert generation_batch_for(policy, 64, 20, 4, 1.0) == 4  # whole groups


def test_a_prefill_reads_prompts_and_not_the_room_for_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "PIECES", 1)  # bytes are then whole numbers, without rounding
    policy = policy_of()
    found = activations_of(policy)
    whole, short = (planning._generation(policy, found, 64, 40, 64, read) for read in (None, 8))
    assert whole - short == found.scoring(64 * 32)
    job = Job(composed(merged(LANGUAGE, ["eval_episodes=64", "env.max_turn_tokens=60"])), ALLOW)
    assert planning.prefill_of(job.env) == job.env.max_length - 60 < 30
    job.make_trainer(None)
    rows = planning._generation(
        job.policy, activations_of(job.policy), 64, job.env.max_length, 64, job.env.max_length - 60
    )
    part = next(part for part in job.memory.phases if part.name == "evaluation")
    assert part.size == rows
    job.env.max_turns = 2  # a second turn is read behind what the first one said
    assert planning.prefill_of(job.env) == job.env.max_length


def chunked(monkeypatch: pytest.MonkeyPatch, room: float) -> None:
    monkeypatch.setattr(planning, "budget", lambda device: room)


def test_a_run_cuts_its_batches_and_trains_to_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model = [text for text in LANGUAGE if not text.startswith("rollout.")]
    overrides = composed([*model, "agent=sft", "rollout.rows=32", "steps=64"])

    def first_loss(room: float) -> tuple[int | None, float]:
        chunked(monkeypatch, room)
        trainer = Job(copy.deepcopy(overrides), ALLOW).make_trainer(None)  # type: ignore[arg-type]
        trainer.update()
        return trainer.agent.micro_batch, float(trainer.means.pop()["grad/norm"])  # type: ignore[attr-defined]

    whole, cut = first_loss(1e12), first_loss(2e5)
    assert whole[0] is None and cut[0] is not None and cut[0] < 32
    assert cut[1] == pytest.approx(whole[1], rel=1e-4)


def test_generation_and_evaluation_stay_within_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    chunked(monkeypatch, 5e4)
    job = Job(composed(merged(LANGUAGE, ("eval_episodes=24", "rollout.prompts=8"))), ALLOW)
    trainer = job.make_trainer(None)  # type: ignore[arg-type]
    rows: list[int] = []
    generate = job.policy.generate
    job.policy.generate = lambda given, **o: (rows.append(len(given) * o["samples_per_prompt"]), generate(given, **o))[
        1
    ]
    trainer.collect()
    chosen = trainer.rollout.generation_batch  # type: ignore[union-attr]
    assert chosen < 32 and chosen % 4 == 0 and max(rows) <= chosen
    rows.clear()
    trainer.evaluate()
    assert max(rows) < 24


def test_a_resumed_run_keeps_the_chunks_of_the_machine_that_it_began_on(monkeypatch: pytest.MonkeyPatch) -> None:
    chunked(monkeypatch, 2e5)
    cfg = composed(merged(LANGUAGE, ("rollout.prompts=8",)))
    first = Job(copy.deepcopy(cfg), ALLOW).make_trainer(None)  # type: ignore[arg-type]
    first.update()
    chunked(monkeypatch, 1e12)
    other = Job(copy.deepcopy(cfg), ALLOW).make_trainer(None)  # type: ignore[arg-type]
    assert other.agent.micro_batch is None and other.rollout.generation_batch is None
    other.load_state_dict({**first.state_dict(), "has_replay": False}, Path())
    assert other.agent.micro_batch == other.agent.anchors.micro_batch == first.agent.micro_batch != None  # noqa: E711
    assert other.rollout.generation_batch == first.rollout.generation_batch
    policy, rows = language()
    agent = BehaviorCloning(policy, stream(), rows=len(rows), micro_batch=5)
    again = BehaviorCloning(policy, stream(), rows=len(rows))
    again.load_state_dict(agent.state_dict())
    assert again.micro_batch == 5


def test_weights_are_counted_once() -> None:
    policy = policy_of({"tie_word_embeddings": True})
    assert module_bytes([policy, policy]) == module_bytes([policy])
    assert module_bytes([policy], without=[policy]) == 0


# ---------------------------------------------------------------------------------------------- how one asks


def test_the_command_prints_the_plan_and_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "env=chain_mod", "policy=causal_lm_tiny", "--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("weights") and lines[-1].startswith("peak, at the most")
    assert any(line.startswith("generation") and "256 rows" in line for line in lines)
    assert cli.main(["train", "env=two_route", "agent=ppo", "--plan"]) == 0
    assert "no plan" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert cli.main(["train", "resume=x", "--plan"]) == 2


def test_a_folder_larger_than_the_memory_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unified_rl.training.limits import check_model_folder

    (tmp_path / "model.safetensors").write_bytes(b"0" * 2000)
    check_model_folder(str(tmp_path))
    monkeypatch.setattr(machine, "memory", lambda: 1000)
    with pytest.raises(ConfigError, match=r"^the weights in policy\.path=.* would take 2 kB at least"):
        check_model_folder(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    (adapter / "adapter_model.safetensors").write_bytes(b"0")
    with pytest.raises(ConfigError, match=r"would take 2 kB at least"):
        check_model_folder(str(adapter))


def test_what_a_container_leaves(tmp_path: Path) -> None:
    assert machine._left_in_container(tmp_path) == []
    for name, text in {
        "memory.max": "1000",
        "memory.current": "700",
        "memory.stat": "anon 5\ninactive_file 200\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert machine._left_in_container(tmp_path) == [500]
    (tmp_path / "memory.max").write_text("max")
    assert machine._left_in_container(tmp_path) == []
