"""Low-rank adapters: what trains, what is kept, what the reference is, and folders that others read and write."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensordict import TensorDict
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import unified_rl as ur
from unified_rl.agents.providers import make_provider
from unified_rl.config import compose, resolve_defaults
from unified_rl.envs.language import ChainMod
from unified_rl.errors import CheckpointError, ConfigError
from unified_rl.optimizer import Optimizer
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.training.checkpoint import intact_checkpoint
from unified_rl.training.run import Job, resume, train

peft = pytest.importorskip("peft")
TINY = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "tie_word_embeddings": True}  # fmt: skip
ENV = ChainMod()
INPUTS = ENV.policy_inputs()


@pytest.fixture
def base(tmp_path: Path) -> str:
    CausalLM(**INPUTS, config=TINY, seed=3).save(str(tmp_path / "base"))
    return str(tmp_path / "base")


def adapted(base: str, seed: int = 0, **options: Any) -> CausalLM:
    return CausalLM(**INPUTS, path=base, lora={"r": 4}, seed=seed, **options)


def stirred(policy: CausalLM, seed: int = 0) -> CausalLM:
    """The policy with adapters that are no longer fresh."""
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in trained(policy).values():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=stream))
    return policy


def trained(policy: CausalLM) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}


def rows(count: int = 6, width: int = 20, prompt: int = 6) -> TensorDict:
    size = len(INPUTS["tokenizer"])
    tokens = torch.randint(4, size, (count, width), generator=torch.Generator().manual_seed(0))
    tokens[:, :prompt] = tokens[:1, :prompt]
    mask = torch.arange(width).expand(count, width) >= prompt
    return TensorDict({"tokens": tokens, "mask": mask}, [count])


def scores(policy: CausalLM) -> torch.Tensor:
    with torch.no_grad():
        return policy.log_prob(rows()).log_prob


def test_only_adapters_train_and_fresh_ones_change_nothing(base: str) -> None:
    plain, policy = CausalLM(**INPUTS, path=base), adapted(base)
    assert torch.equal(scores(plain), scores(policy))
    assert trained(policy) and all("lora_" in name for name in trained(policy))
    adam = Optimizer({"policy": policy}, lr=0.1)
    assert {name for name, _ in adam.named} == {f"policy.{name}" for name in trained(policy)}
    before = {name: weight.clone() for name, weight in policy.named_parameters()}
    for _ in range(2):  # the first step moves B alone, since A meets a B of 0
        adam.zero_grad()
        loss = policy.nll(rows()).sum()
        loss.backward()
        adam.step(loss)
    moved = {name for name, weight in policy.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == set(trained(policy))


def test_fresh_adapters_come_from_the_seed_alone(base: str) -> None:
    torch.manual_seed(1)
    first, state = adapted(base, seed=5), torch.get_rng_state()
    torch.manual_seed(2)
    again, other = adapted(base, seed=5), adapted(base, seed=6)
    for name, weight in trained(first).items():
        assert torch.equal(weight, trained(again)[name])
        assert torch.equal(weight, trained(other)[name]) == ("lora_B" in name)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "the global stream is left alone"


def test_the_reference_is_the_base_and_shares_its_weights(base: str) -> None:
    policy = adapted(base)
    reference = make_provider("reference", {}, policy)
    stirred(policy)
    plain = CausalLM(**INPUTS, path=base)
    batch = rows()
    assert torch.equal(reference.log_prob(batch), scores(plain)) and not torch.equal(scores(policy), scores(plain))
    states = reference.states(batch)[batch["mask"]]
    assert torch.equal(reference.logits(states), plain.logits_of(plain.unit_states(batch)[batch["mask"]]))
    own = {p.data_ptr(): p.numel() for p in policy.parameters()}
    both = own | {p.data_ptr(): p.numel() for p in reference.policy.parameters()}
    assert sum(both.values()) - sum(own.values()) == sum(p.numel() for p in trained(policy).values())
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in reference.policy.modules() if isinstance(m, BaseTunerLayer)]
    assert layers and all(layer.disable_adapters for layer in layers)
    assert all(p.requires_grad for p in trained(policy).values()) and len(trained(policy)) == 28


def test_the_reference_of_a_trained_adapter_is_that_adapter(base: str) -> None:
    policy = stirred(adapted(base))
    begun = scores(policy)
    reference, average = make_provider("reference", {}, policy), make_provider("slow", {"ema": 0.5}, policy)
    first = {name: p.clone() for name, p in trained(policy).items()}
    stirred(policy, 1)
    assert torch.equal(reference.log_prob(rows()), begun) and not torch.equal(scores(policy), begun)
    average.update(policy, 1)
    for name, weight in average.policy.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(weight, 0.5 * first[name] + 0.5 * trained(policy)[name])
    fresh = make_provider("reference", {}, adapted(base))
    fresh.load_state_dict(reference.state_dict())  # as a resumed run does
    assert torch.equal(fresh.log_prob(rows()), begun)
    follows = make_provider("old", {}, adapted(base))
    follows.update(policy, 1)
    assert torch.equal(follows.log_prob(rows()), scores(policy))


def test_ratio_is_one_with_shared_prompts_and_with_checkpointed_layers(base: str) -> None:
    policy = stirred(adapted(base))
    assert policy.share_prompts
    stream = torch.Generator().manual_seed(0)
    out = policy.generate([[5, 6, 7], [8, 9]], max_new_tokens=8, generator=stream, samples_per_prompt=3, stop_ids=[])
    truth = policy.model(torch.cat([torch.tensor([[5, 6, 7]]).expand(3, 3), out.tokens[:3]], 1)).logits[:, 2:-1]
    truth = truth[..., : len(INPUTS["tokenizer"])].log_softmax(-1).gather(-1, out.tokens[:3, :, None])[..., 0]
    torch.testing.assert_close(out.log_prob[:3], truth, atol=1e-4, rtol=0)
    gradients, kept = [], []
    for options in ({}, {"share_prompts": False}, {"gradient_checkpointing": True}):
        other = adapted(base, **options)
        other.load_state_dict(policy.state_dict())
        torch.testing.assert_close(scores(other), scores(policy), atol=1e-5, rtol=0)
        other.double()  # single precision rounds small sums of large gradients as it likes
        size = 0

        def pack(x: torch.Tensor) -> torch.Tensor:
            nonlocal size
            size += x.numel() * x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            total = other.log_prob(rows()).log_prob.sum()
        total.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trained(other).values()]))
        kept.append(size)
    assert float(gradients[0].abs().max()) > 0 and kept[2] < kept[1] / 2
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-5, rtol=0)


def test_half_precision_weights_may_carry_adapters_in_full_precision(base: str) -> None:
    policy = adapted(base, dtype="bfloat16")
    assert policy.model.dtype == torch.bfloat16 and {p.dtype for p in trained(policy).values()} == {torch.float32}
    adam, loss = Optimizer({"policy": policy}, lr=1e-2), policy.nll(rows()).sum()
    loss.backward()
    assert float(adam.step(loss)) > 0


def words(base: str, folder: Path, *more: str, steps: int = 48) -> dict[str, Any]:
    small = ["rollout.prompts=2", "rollout.group_size=4", "eval_every=0", "eval_episodes=2", "progress=false"]
    given = ["env=chain_mod", "policy=causal_lm", f"policy.path={base}", "policy.lora.r=4", "agent.lr=1e-2"]
    loss = ["correction=reinforce", "correction.advantage={baseline: none, shift: 0.5}"]
    loss += ["correction.penalty=[{name: k3, anchor: reference, coefficient: 0.1}]"]
    return resolve_defaults(compose([*given, *loss, *small, *more, f"steps={steps}", f"run_dir={folder}"]))


def test_a_run_with_adapters_resumes_bit_for_bit_and_keeps_no_copy_of_the_base(base: str, tmp_path: Path) -> None:
    warm = "warm_start=demonstrations", "warm_start.dataset=8", "warm_start.stages=[{updates: 2, lr: 1e-2}]"
    whole = train(words(base, tmp_path / "whole", *warm))
    half = train(words(base, tmp_path / "half", *warm, steps=24))
    resume(str(half), 48)
    states = [intact_checkpoint(run)[1]["agent"] for run in (whole, half)]
    for one, other in ((state["policy"], states[1]["policy"]) for state in states[:1]):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    first = states[0]["policy"]
    assert all("lora_" in name or name == "base_digest" for name in first) and len(first) == 29
    reference = states[0]["anchors"]["reference"]["policy"]
    assert reference.keys() == first.keys()
    moved = [name for name in first if not torch.equal(first[name], reference[name])]
    assert moved and any(bool(reference[name].any()) for name in reference if "lora_B" in name), "warm-started"


KL = "correction.penalty=[{name: k3, anchor: reference, coefficient: 0.1}]"


@pytest.mark.parametrize(
    "more",
    [
        ("correction=ppo", "agent.advantage=critic"),
        ("correction=ppo_ewma",),
        ("correction=reinforce", KL, "agent.anchors.reference.sync_every=1"),
        ("correction=reinforce", KL, "agent.anchors.reference.ema=0.5"),
        ("recipe=opsd",),
        ("policy.gradient_checkpointing=true", "agent.micro_batch=2", "rollout.staleness=1", "agent.epochs=2"),
    ],
    ids=lambda more: more[-1],
)
def test_the_base_stays_as_it_is_under_every_kind_of_agent(base: str, more: tuple[str, ...]) -> None:
    small = ["rollout.prompts=2", "rollout.group_size=2", "eval_every=0", "eval_episodes=1", "progress=false"]
    given = ["env=chain_mod", "policy=causal_lm", f"policy.path={base}", "policy.lora.r=2", "agent.lr=1e-2", "steps=8"]
    job = Job(ur.compose([*given, *small, *more]))
    trainer = job.make_trainer(None)  # type: ignore[arg-type]
    trainer.run()
    plain = dict(CausalLM(**INPUTS, path=base).model.named_parameters())
    for name, weight in job.policy.model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(weight, plain[name.replace(".base_layer.", ".")]), name
    assert trainer.updates == 2


def test_a_teacher_may_be_an_adapter_folder_and_a_run_may_warm_start_from_adapters(base: str, tmp_path: Path) -> None:
    stirred(adapted(base)).save(str(tmp_path / "a"))
    student = CausalLM(**INPUTS, path=base)
    teacher = make_provider("teacher", {"folder": str(tmp_path / "a")}, student)
    assert torch.equal(teacher.log_prob(rows()), scores(stirred(adapted(base))))
    sft = [
        f"policy.path={base}",
        "policy.lora.r=2",
        "env=chain_mod",
        "eval_episodes=1",
        "eval_every=0",
        "progress=false",
    ]
    run = train(
        ur.compose([*sft, "agent=sft", "rollout.rows=4", "steps=8", "agent.lr=1e-2", f"run_dir={tmp_path / 'sft'}"])
    )
    job = Job(ur.compose([*sft, "warm_start=from_run", f"warm_start.run={run}"]))
    job.warm_start(lambda *progress: None)
    wanted = intact_checkpoint(run)[1]["agent"]["policy"]
    assert all(torch.equal(value, wanted[name]) for name, value in job.policy.state_dict().items())
    with pytest.raises(ConfigError, match="does not fit this one"):
        job = Job(ur.compose([*sft[:1], *sft[2:], "warm_start=from_run", f"warm_start.run={run}"]))
        job.warm_start(lambda *progress: None)


def test_adapters_are_refused_on_another_base_model(base: str, tmp_path: Path) -> None:
    state = adapted(base).state_dict()
    CausalLM(**INPUTS, config=TINY, seed=4).save(str(tmp_path / "other"))
    other = adapted(str(tmp_path / "other"))
    with pytest.raises(CheckpointError, match="trained on another base model"):
        other.load_state_dict(state)
    copy.deepcopy(other).load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="lora_A"):
        adapted(base).load_state_dict({k: v for k, v in state.items() if "layers.0" not in k})


def test_an_adapter_folder_is_read_by_peft_and_by_policy_path(base: str, tmp_path: Path) -> None:
    policy = stirred(adapted(base))
    policy.save(str(tmp_path / "adapter"))
    files = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files
    assert "model.safetensors" not in files and "config.json" not in files
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))
    batch = rows()
    logits = theirs(batch["tokens"][:, :-1]).logits[..., : len(INPUTS["tokenizer"])]
    truth = logits.log_softmax(-1).gather(-1, batch["tokens"][:, 1:, None])[..., 0]
    torch.testing.assert_close(scores(policy)[:, 6:], truth[:, 5:], atol=1e-5, rtol=0)
    for how in ({"path": str(tmp_path / "adapter")}, {"path": base, "adapter": str(tmp_path / "adapter")}):
        again = CausalLM(**INPUTS, **how)
        assert torch.equal(scores(again), scores(policy)) and trained(again).keys() == trained(policy).keys()
        assert again.end_ids == policy.end_ids
    config["base_model_name_or_path"] = "/elsewhere/base"  # moved here, beside its base
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert torch.equal(scores(CausalLM(**INPUTS, path=str(tmp_path / "adapter"))), scores(policy))
    job = Job(resolve_defaults(compose(["env=chain_mod", "policy=causal_lm", f"policy.path={tmp_path / 'adapter'}"])))
    assert job.policy.adapted and job.env.tokenizer.name_or_path == str(tmp_path / "adapter")
    assert job.cfg["agent"]["lr"] == 1e-5


def test_a_merged_folder_scores_as_the_adapters_do(base: str, tmp_path: Path) -> None:
    policy = stirred(adapted(base))
    before = {name: p.clone() for name, p in policy.state_dict().items()}
    policy.save(str(tmp_path / "whole"), merge=True)
    assert all(torch.equal(p, before[name]) for name, p in policy.state_dict().items()) and policy.adapted
    again = CausalLM(**INPUTS, path=str(tmp_path / "whole"))
    torch.testing.assert_close(scores(again), scores(policy), atol=1e-4, rtol=0)
    assert not again.adapted and "lm_head.weight" not in load_file(tmp_path / "whole" / "model.safetensors")
    with pytest.raises(ConfigError, match="no adapter to merge"):
        again.save(str(tmp_path / "twice"), merge=True)


def test_an_adapter_of_a_fresh_model_is_kept_with_it(tmp_path: Path) -> None:
    policy = stirred(CausalLM(**INPUTS, config=TINY, lora={"r": 2}, seed=1))
    again = CausalLM(**INPUTS, config=TINY, lora={"r": 2}, seed=2)
    again.load_state_dict(policy.state_dict())  # no folder holds the base, so the state does
    assert torch.equal(scores(again), scores(policy))
    with pytest.raises(ConfigError, match="write both with merge"):
        policy.save(str(tmp_path / "a"))
    policy.save(str(tmp_path / "m"), merge=True)
    torch.testing.assert_close(scores(CausalLM(**INPUTS, path=str(tmp_path / "m"))), scores(policy), atol=1e-4, rtol=0)


def test_an_adapter_made_by_peft_loads(base: str, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=r".*layers\.1.*\.[qv]_proj", use_rslora=True,
                             rank_pattern={"v_proj": 3}, init_lora_weights=False, lora_dropout=0.1)  # fmt: skip
    model = peft.get_peft_model(model, config).eval()
    model.save_pretrained(tmp_path / "theirs")
    policy = CausalLM(**INPUTS, path=str(tmp_path / "theirs"))
    batch = rows()
    truth = model(batch["tokens"][:, :-1]).logits[..., : len(INPUTS["tokenizer"])].log_softmax(-1)
    truth = truth.gather(-1, batch["tokens"][:, 1:, None])[..., 0]
    torch.testing.assert_close(scores(policy)[:, 6:], truth[:, 5:].detach(), atol=1e-5, rtol=0)
    assert len(trained(policy)) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "only LORA adapters are read"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.* is not supported"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_config=.* is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "no patterns"),
        ({"r": -1}, "r=-1 must be at least 1"),
        (
            {"r": 3},
            r"does not fit the model: .*lora_A.weight is \[4, 32\] in it and \[3, 32\] in the model, which is another",
        ),
        ({"r": 10**9}, "r=1000000000 is more than 32"),
        ({"target_modules": ["q_proj"]}, "holds for parts the model has not"),
        ({"base_model_name_or_path": "meta/x"}, r"policy\.path=BASE policy\.adapter="),
    ],
)
def test_an_adapter_folder_that_is_not_understood_is_refused(
    base: str, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    adapted(base).save(str(tmp_path / "a"))
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises((CheckpointError, ConfigError), match=message):
        CausalLM(**INPUTS, path=str(tmp_path / "a"))


def test_adapter_weights_are_safetensors_and_finite(base: str, tmp_path: Path) -> None:
    adapted(base).save(str(tmp_path / "a"))
    file = tmp_path / "a" / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    save_file({**weights, name: weights[name] * float("nan")}, file)
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        CausalLM(**INPUTS, path=str(tmp_path / "a"))
    file.rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="other formats are not read"):
        CausalLM(**INPUTS, path=str(tmp_path / "a"))


def test_settings_of_adapters_are_checked_when_a_run_is_composed(base: str, tmp_path: Path) -> None:
    for words_, message in (
        (["policy.lora.rank=4"], "policy.lora has no setting 'rank'"),
        (["policy.lora.alpha=4"], "did you mean 'lora_alpha'"),
        (["policy.lora.r=0"], r"policy\.lora\.r=0 must be at least 1"),
        (["policy.lora.lora_dropout=0.1"], "would make scores random"),
        ([f"policy.path={base}", f"policy.adapter={base}"], "is no adapter folder"),
        (["policy.lora.r=4", "policy.adapter=x"], r"policy\.adapter and policy\.lora are two ways"),
    ):
        with pytest.raises((ConfigError, CheckpointError), match=message):
            compose(["policy=causal_lm", *words_])
    with pytest.raises(ConfigError, match=r"policy\.lora: Target modules"):
        CausalLM(**INPUTS, path=base, lora={"target_modules": ["nothing"]})
    with pytest.raises(ConfigError, match=r"set policy\.path"):
        CausalLM(**INPUTS, config=TINY, adapter=base)


def test_no_package_no_adapters(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ConfigError, match=r"policy\.lora needs peft: pip install 'unified-rl\[lora\]'"):
        adapted(base)


def test_the_models_own_generation_configuration_stays_beside_the_base(base: str, tmp_path: Path) -> None:
    config = LlamaConfig(**{k: v for k, v in TINY.items() if k != "model_type"}, vocab_size=len(INPUTS["tokenizer"]))
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=[2, 7])
    model.save_pretrained(tmp_path / "two")
    INPUTS["tokenizer"].save_pretrained(tmp_path / "two")
    policy = adapted(str(tmp_path / "two"))
    policy.save(str(tmp_path / "a"))
    assert CausalLM(**INPUTS, path=str(tmp_path / "a")).end_ids == (2, 7)
    policy.save(str(tmp_path / "whole"), merge=True)
    assert GenerationConfig.from_pretrained(tmp_path / "whole").eos_token_id == [2, 7]
