"""Schedules count gradient steps and resume exactly; optimisers by name; decay spares norms and biases."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import value_cases as values
from agent_cases import LANES, control_agent, filled, gaussian, language, language_agent, stream, transitions
from run_cases import CONTROL, composed
from tensordict import TensorDict
from torch import Tensor, nn
from transformers import get_scheduler

from unified_rl.agents.actor_critic import ActorCritic
from unified_rl.agents.behavior_cloning import BehaviorCloning
from unified_rl.config import compose
from unified_rl.errors import ConfigError
from unified_rl.learning_rate import SCHEDULES, LearningRate
from unified_rl.optimizer import Optimizer
from unified_rl.training.run import Job

SETTINGS: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 5},
    "polynomial": {"power": 2.0},
}


def rates(agent: Any) -> list[float]:
    """The learning rates of the optimiser's steps, as they are taken."""
    found: list[float] = []
    step = agent.optimizer.adam.step
    agent.optimizer.adam.step = lambda: (found.append(agent.optimizer.rate), step())[1]
    return found


def expected(name: str, lr: float, warm: int, total: int, **settings: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    more = {"scheduler_specific_kwargs": settings} if settings else {}
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warm, num_training_steps=total, **more)
    found = []
    for _ in range(total):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_are_those_of_transformers_at_every_step(name: str) -> None:
    settings = SETTINGS.get(name, {})
    warm = 0 if name == "constant" else 4
    rate = LearningRate(0.1, {"name": name, **settings}, warmup_steps=warm)
    rate.plan(10, 2)
    want = expected(name, 0.1, warm, 20, **settings)
    assert [rate(k) for k in range(20)] == want
    assert rate(3) == want[3]  # going back is possible: a state that is restored


def test_a_warm_up_of_a_constant_rate_and_its_share_of_the_run() -> None:
    rate = LearningRate(0.1, "constant", warmup_ratio=0.25)
    rate.plan(4, 5)
    assert [round(rate(k), 9) for k in range(7)] == [0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.1]


def test_a_schedule_of_torch_by_dotted_path_knows_the_length_of_the_run() -> None:
    steps = LearningRate(1.0, {"name": "torch.optim.lr_scheduler:StepLR", "step_size": 2, "gamma": 0.5})
    steps.plan(6)
    assert [steps(k) for k in range(6)] == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    cosine = LearningRate(1.0, "torch.optim.lr_scheduler.CosineAnnealingLR")
    cosine.plan(10)
    assert cosine(5) == pytest.approx(0.5) and cosine(10) == pytest.approx(0.0)


def test_the_gradient_steps_of_an_update_have_rates_of_their_own_and_the_last_is_logged() -> None:
    policy = gaussian()
    agent = control_agent(policy, lr=0.1, lr_schedule="linear", warmup_steps=3, epochs=2, minibatch=16)
    agent.plan_updates(3)  # 4 lanes x 8 steps in minibatches of 16, twice: 4 steps an update
    found, logged = rates(agent), []
    for version in range(3):
        rows = transitions(policy, version)
        rows["policy_version"] += version
        logged.append(agent.update(filled(rows, LANES))["agent/lr"])
    assert found == expected("linear", 0.1, 3, 12)
    assert logged == found[3::4]


def test_an_update_that_ends_early_does_not_shift_the_schedule() -> None:
    policy = gaussian()
    agent = control_agent(policy, lr=0.1, lr_schedule="linear", epochs=6, minibatch=16, target_kl=1e-9)
    agent.plan_updates(2)
    found = rates(agent)
    for version in range(2):
        rows = transitions(policy, version)
        rows["policy_version"] += version
        agent.update(filled(rows, LANES))
    want = expected("linear", 0.1, 0, 24)
    assert found == [want[0], want[1], want[12], want[13]]


def test_a_resumed_agent_goes_on_in_its_schedule_bit_for_bit() -> None:
    policy, rows = language()
    options = {"lr": 0.05, "lr_schedule": "cosine", "warmup_steps": 2, "optimizer": {"name": "sgd", "momentum": 0.9}}

    def train(agent: Any, first: int, last: int) -> Any:
        agent.plan_updates(4)
        for version in range(first, last):
            rows["policy_version"][:] = version
            agent.checked = True
            agent.update(filled(rows, 1))
        return agent

    whole = train(language_agent(copy.deepcopy(policy), rows, **options), 0, 4)
    half = train(language_agent(copy.deepcopy(policy), rows, **options), 0, 2)
    other = language_agent(copy.deepcopy(policy), rows, **options)
    other.load_state_dict(copy.deepcopy(half.state_dict()))
    train(other, 2, 4)
    assert other.optimizer.rate == whole.optimizer.rate != 0.05
    for name, weight in whole.policy.state_dict().items():
        assert torch.equal(weight, other.policy.state_dict()[name]), name


def test_supervised_steps_follow_the_schedule_too() -> None:
    policy, rows = language()
    agent = BehaviorCloning(policy, stream(), rows=len(rows), lr=0.01, lr_schedule="linear", updates=2)
    agent.plan_updates(3)
    found = rates(agent)
    for _ in range(6):
        agent.step(rows)
    assert found == expected("linear", 0.01, 0, 6)


def test_a_schedule_without_a_length_is_refused_and_a_constant_rate_needs_none() -> None:
    policy = gaussian()
    with pytest.raises(ConfigError, match=r"agent\.lr_schedule=cosine .* call plan_updates\(updates\)"):
        control_agent(policy, lr_schedule="cosine").update(filled(transitions(policy), LANES))
    agent = control_agent(policy, lr=0.3)
    assert agent.update(filled(transitions(policy), LANES))["agent/lr"] == 0.3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("agent.lr_schedule=linaer", r"agent\.lr_schedule 'linaer' is unknown; did you mean 'linear'\?"),
        ("agent.lr_schedule={name: cosine, cycles: 3}", r"agent\.lr_schedule: cosine: .* 'cycles'"),
        (
            "agent.lr_schedule={name: constant, power: 3}",
            r"lr_schedule=constant has no settings; take out power",
        ),
        ("agent.lr_schedule=my_rates.wave", r"agent\.lr_schedule 'my_rates\.wave' is outside .* --allow my_rates"),
        ("agent.lr_schedule=torch.optim.lr_scheduler.ReduceLROnPlateau", r"whose step\(\) takes nothing"),
        ("agent.lr_schedule=torch.optim.lr_scheduler.Stepp", r"no schedule of torch; did you mean 'StepLR'\?"),
        ("agent.anneal_lr=true agent.lr_schedule=linear", r"agent\.anneal_lr and agent\.lr_schedule=linear are two"),
        ("agent.warmup_steps=3 agent.warmup_ratio=0.1", r"agent\.warmup_steps=3 and agent\.warmup_ratio=0\.1 both"),
        ("agent.optimizer=adamx", r"agent\.optimizer 'adamx' is unknown; did you mean 'adamax'\?"),
        ("agent.optimizer=torch.optim.LBFGS", r"agent\.optimizer 'torch\.optim\.LBFGS' is unknown; known: adad"),
        ("agent.optimizer={name: sgd, momentun: 0.9}", r"has no option 'momentun'; did you mean 'momentum'\?"),
        ("agent.optimizer={name: adamw, lr: 0.1}", r"lr is not set here; set agent\.lr instead"),
        ("agent.optimizer=my_steps.Own", r"agent\.optimizer 'my_steps\.Own' is outside .* --allow my_steps"),
    ],
)
@pytest.mark.parametrize("agent", ["policy_gradient", "sft"])
def test_what_cannot_be_is_refused_when_a_run_is_composed(agent: str, settings: str, message: str) -> None:
    if agent == "sft" and "anneal" in settings:
        return
    first, *rest = settings.replace(" agent.", "\nagent.").split("\n")
    with pytest.raises(ConfigError, match=message) as error:
        compose([f"agent={agent}", first, *rest])
    assert "\n" not in str(error.value)


def test_a_warm_up_that_is_longer_than_the_run_is_refused_before_it() -> None:
    agent = control_agent(gaussian(), lr_schedule="linear", warmup_steps=50)
    with pytest.raises(ConfigError, match=r"agent\.warmup_steps=50 is more than the 12 gradient steps of the run"):
        agent.plan_updates(12)


class Norms(nn.Module):
    """A layer with bias, an embedding, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer, self.norm = nn.Embedding(4, 3), nn.Linear(3, 3), nn.LayerNorm(3)
        self.expert_bias = nn.Parameter(torch.ones(2, 3))


def test_weight_decay_is_of_matrices_and_embeddings_alone() -> None:
    module = Norms()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = Optimizer({"policy": module}, 0.1, weight_decay=0.5)
    loss = torch.stack([(0.0 * p).sum() for p in module.parameters()]).sum()
    loss.backward()
    optimizer.step(loss)
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"words.weight", "layer.weight"}
    torch.testing.assert_close(module.layer.weight, before["layer.weight"] * 0.95)
    assert len(Optimizer({"policy": module}, 0.1).adam.param_groups) == 1  # as ever, where nothing decays


@pytest.mark.parametrize("name", ["sgd", "torch.optim:SGD", "torch.optim.SGD", {"name": "sgd", "momentum": 0.0}])
def test_an_optimiser_by_name_takes_its_own_step(name: Any) -> None:
    module = nn.Linear(2, 1)
    before = module.weight.detach().clone()
    optimizer = Optimizer({"policy": module}, 0.1, kind=name)
    loss = module(torch.ones(1, 2)).sum()
    loss.backward()
    optimizer.step(loss)
    assert isinstance(optimizer.adam, torch.optim.SGD)
    torch.testing.assert_close(module.weight, before - 0.1)


def test_options_reach_the_optimiser_and_those_it_refuses_are_one_line() -> None:
    module = nn.Linear(2, 1)
    adam = Optimizer({"policy": module}, 0.1, kind={"name": "adamw", "betas": [0.8, 0.9]}).adam
    assert adam.defaults["betas"] == (0.8, 0.9) and adam.defaults["fused"]
    with pytest.raises(ConfigError, match=r"^agent\.optimizer SGD: Nesterov momentum requires"):
        Optimizer({"policy": module}, 0.1, kind={"name": "sgd", "nesterov": True})


# ------------------------------------------------------------------------------------- accumulation


def uneven(rows: TensorDict) -> TensorDict:
    """Rows of which each has another number of supervised tokens."""
    rows = rows.clone()
    for number in range(len(rows)):
        rows["mask"][number, -number or len(rows["mask"][0]) :] = False
    return rows


@pytest.mark.parametrize("size", [1, 5, 7, 12, 100])
def test_supervised_micro_batches_add_up_to_the_gradient_of_the_whole_batch(size: int) -> None:
    policy, rows = language()
    rows = uneven(rows)
    whole, loss = supervised(copy.deepcopy(policy), rows, None)
    split, same = supervised(copy.deepcopy(policy), rows, size)
    torch.testing.assert_close(same, loss)
    assert max(float(g.abs().max()) for g in whole) > 1e-3
    for got, want in zip(split, whole, strict=True):
        torch.testing.assert_close(got, want, atol=1e-7, rtol=1e-4)
    assert supervised_width(policy, rows, 1) < supervised_width(policy, rows, None)


def supervised_width(policy: Any, rows: TensorDict, size: int | None) -> int:
    """Token positions of the largest forward pass."""
    seen: list[int] = []
    nll = policy.nll
    policy.nll = lambda batch, *more: (seen.append(batch["tokens"].numel()), nll(batch, *more))[1]
    try:
        supervised(policy, rows, size)
    finally:
        policy.nll = nll
    return max(seen)


def supervised(policy: Any, rows: TensorDict, size: int | None) -> tuple[list[Tensor], Tensor]:
    agent = BehaviorCloning(policy, stream(), rows=len(rows), lr=0.0, micro_batch=size, max_grad_norm=None)
    loss = agent.step(rows)["loss/nll"]
    return [p.grad.clone() for p in agent.optimizer.parameters if p.grad is not None], loss


def test_control_rows_accumulate_too() -> None:
    policy = gaussian()
    rows = transitions(policy).reshape(-1).select("observation", "action")
    whole, loss = supervised(copy.deepcopy(policy), rows, None)
    split, same = supervised(copy.deepcopy(policy), rows, 5)
    torch.testing.assert_close(same, loss)
    for got, want in zip(split, whole, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)


# ------------------------------------------------------------------ a critic's rate, and value-based agents


def test_a_critic_has_a_rate_of_its_own_that_follows_the_same_schedule() -> None:
    policy = gaussian()
    agent = control_agent(policy, lr=0.1, critic_lr=0.03, lr_schedule="linear", weight_decay=0.1, epochs=2)
    agent.plan_updates(2)
    groups = agent.optimizer.adam.param_groups
    found: list[list[float]] = []
    step = agent.optimizer.adam.step
    agent.optimizer.adam.step = lambda: (found.append([group["lr"] for group in groups]), step())[1]
    critic = {id(p) for p in agent.baseline.module.parameters()}
    owned = [{id(p) in critic for p in group["params"]} for group in groups]
    metrics = agent.update(filled(transitions(policy), LANES))
    assert owned == [{False}, {False}, {True}, {True}]  # with and without decay
    assert found == [pytest.approx([0.1 * s, 0.1 * s, 0.03 * s, 0.03 * s]) for s in (1.0, 0.75)]
    assert (metrics["agent/lr"], metrics["agent/critic_lr"]) == pytest.approx((0.075, 0.0225))
    other = control_agent(gaussian(), lr=0.1, critic_lr=0.03, lr_schedule="linear", weight_decay=0.1, epochs=2)
    other.load_state_dict(copy.deepcopy(agent.state_dict()))
    assert other.optimizer.rate_of("critic") == pytest.approx(0.0225) and other.optimizer.rate == agent.optimizer.rate


def test_annealing_moves_the_critic_too_and_a_rate_of_0_leaves_the_policy_alone() -> None:
    policy = gaussian()
    agent = control_agent(policy, lr=0.0, critic_lr=0.2, anneal_lr=True)
    before = [p.clone() for p in policy.parameters()]
    value = [p.clone() for p in agent.baseline.module.parameters()]
    agent.update(filled(transitions(policy), LANES), 0.25)
    assert all(torch.equal(p, q) for p, q in zip(before, policy.parameters(), strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(value, agent.baseline.module.parameters(), strict=True))
    assert agent.optimizer.rate_of("critic") == pytest.approx(0.15)


def test_a_critic_without_a_rate_of_its_own_takes_the_same_steps_as_ever() -> None:
    one, other = (control_agent(gaussian(), lr=0.1, **more) for more in ({}, {"critic_lr": 0.1}))
    assert len(one.optimizer.adam.param_groups) == 1 and one.critic_rate is None
    for agent in (one, other):
        agent.update(filled(transitions(gaussian()), LANES))
    assert all(torch.equal(p, q) for p, q in zip(one.policy.parameters(), other.policy.parameters(), strict=True))
    critics = [agent.baseline.module.parameters() for agent in (one, other)]
    assert all(torch.equal(p, q) for p, q in zip(*critics, strict=True))


@pytest.mark.parametrize(
    ("words", "lr", "critic"),
    [
        (["agent=ppo"], 1e-6, 3e-4),
        (["agent=ppo", "agent.critic_lr=2e-5"], 1e-6, 2e-5),
        (["agent=ppo", "agent.critic_lr=null"], 1e-6, None),
        (["agent=ppo", "policy.lora.r=4", "agent.lr=3e-5"], 3e-5, 3e-4),
        (["correction=steppo"], 1e-6, 3e-4),  # it wants a critic by itself
        (["correction=grpo"], 1e-6, None),
    ],
)
def test_the_fresh_critic_of_a_model_folder_has_the_rate_of_fresh_weights(
    words: list[str], lr: float, critic: float | None
) -> None:
    node = compose(["env=chain_mod", "policy=causal_lm", "policy.path=some/folder", *words])["agent"]
    assert (node["lr"], node.get("critic_lr")) == (lr, critic)
    fresh = compose(["env=chain_mod", "policy=causal_lm_tiny", *words[:1]])["agent"]
    assert "critic_lr" not in fresh


@pytest.mark.parametrize(
    ("words", "lr", "critic"),
    [
        ([], 1e-3, 3e-3),
        (["agent.lr=1e-4"], 1e-4, None),  # a rate that is set is of both
        (["agent.lr=0"], 0, None),  # so that a frozen run is frozen
        (["agent.lr=1e-4", "agent.critic_lr=2e-4"], 1e-4, 2e-4),
        (["agent.advantage=group"], 1e-3, None),  # no critic
    ],
)
def test_a_learning_rate_of_a_robot_that_is_set_is_of_policy_and_critic(
    words: list[str], lr: float, critic: float | None
) -> None:
    node = compose(["env=hopper", "agent=ppo", *words])["agent"]
    assert (node["lr"], node.get("critic_lr")) == (lr, critic)


def test_a_rate_of_a_critic_that_is_not_there_is_refused() -> None:
    policy, rows = language()
    with pytest.raises(ConfigError, match=r"agent\.critic_lr is of a critic, and there is none"):
        language_agent(policy, rows, critic_lr=1e-3)
    with pytest.raises(ConfigError, match=r"here it is called agent\.critic_lr"):
        compose(["critic.optim.lr=1e-5"])


def test_value_based_agents_follow_a_schedule_at_every_gradient_step_and_resume_in_it() -> None:
    options = {"lr": 0.01, "lr_schedule": "cosine", "warmup_steps": 4, "optimizer": "adamw", "learning_starts": 0}

    def trained(agent: ActorCritic, first: int, last: int) -> list[float]:
        agent.plan_updates(4)
        logged = []
        for _ in range(first, last):
            logged.append(agent.update(values.filled())["agent/lr"])
        return logged

    whole, half, other = (values.make(**options) for _ in range(3))
    seen = trained(whole, 0, 4)
    per_update = whole.gradient_steps // 4
    assert seen == pytest.approx(expected("cosine", 0.01, 4, 4 * per_update)[per_update - 1 :: per_update])
    assert isinstance(whole.phases["actor"].adam, torch.optim.AdamW) and isinstance(whole.alpha_adam, torch.optim.AdamW)
    assert whole.update(values.filled())["agent/lr"] == seen[-1]  # behind the end of the plan
    trained(half, 0, 2)
    other.load_state_dict(copy.deepcopy(half.state_dict()))
    assert trained(other, 2, 4) == seen[2:]


def test_value_based_agents_refuse_what_they_cannot_follow() -> None:
    with pytest.raises(ConfigError, match=r"agent\.lr_schedule=linear follows the length of the run.*plan_updates"):
        values.make(lr_schedule="linear").update(values.filled())
    with pytest.raises(ConfigError, match=r"agent.optimizer 'adm' is unknown; did you mean 'adam'"):
        compose(["env=pendulum", "agent=sac", "agent.optimizer=adm"])
    with pytest.raises(ConfigError, match=r"agent\.warmup_steps=9000 is more than the"):
        agent = values.make(lr_schedule="linear", warmup_steps=9000)
        agent.plan_updates(4)


# ------------------------------------------------------------------ stages of a warm start


def test_a_stage_of_a_warm_start_has_a_schedule_over_its_own_updates(tmp_path: Path) -> None:
    stages = "[{updates: 4, lr: 0.1, lr_schedule: linear, warmup_steps: 2}, {updates: 2, lr: 0.3}, "
    stages += "{updates: 3, lr: 0.2, lr_schedule: cosine}]"
    words = [*CONTROL, "warm_start=demonstrations", "warm_start.dataset=8", f"warm_start.stages={stages}", "steps=0"]
    seen: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        step = BehaviorCloning.step

        def spy(self: BehaviorCloning, batch: Any) -> Any:
            found = step(self, batch)
            seen.append(self.optimizer.rate)
            return found

        patch.setattr(BehaviorCloning, "step", spy)
        Job(composed([*words, "eval_episodes=2"])).warm_start(lambda *given: None)
    assert seen == [*expected("linear", 0.1, 2, 4), 0.3, 0.3, *expected("cosine", 0.2, 0, 3)]


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        (
            "until_loss: 0.1, lr_schedule: linear",
            r"lr_schedule follows the length of the stage: set warm_start\.stages\[0\]",
        ),
        (
            "updates: 3, lr_schedule: linaer",
            r"warm_start\.stages\[0\]\.lr_schedule 'linaer' is unknown; did you mean 'linear'",
        ),
        ("updates: 3, warmup_steps: 9", r"warm_start\.stages\[0\]\.warmup_steps=9 is more than the 3 gradient steps"),
        ("updates: 3, warmup_ratio: 2", r"warm_start\.stages\[0\]\.warmup_ratio=2"),
    ],
)
def test_a_schedule_of_a_stage_that_cannot_be_is_refused_when_a_run_is_composed(stage: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose([*CONTROL, "warm_start=demonstrations", f"warm_start.stages=[{{{stage}}}]"])
