"""Passes divided among processes give the gradient, the metrics and the weights of one process, whatever is trained."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from shard_cases import Told, on_ranks
from tensordict import TensorDict
from test_presets_train import REFUSED, WRAPPED, teacher_run, with_demonstrations

from unified_rl.agents.behavior_cloning import BehaviorCloning
from unified_rl.agents.policy_gradient import PolicyGradient
from unified_rl.config import compose
from unified_rl.correction import correction_names, load_correction
from unified_rl.errors import ConfigError
from unified_rl.interventions import Wrapper
from unified_rl.objectives.entropy import SelectiveEntropyTerm
from unified_rl.replay import Fresh, Replay
from unified_rl.shard import Shard
from unified_rl.training.run import Job

SMALL = ("hidden_size=16", "num_attention_heads=2", "num_hidden_layers=1", "intermediate_size=32")
DOMAINS = {
    "language": ["env=chain_mod", "policy=causal_lm_tiny", "env.max_turn_tokens=6", "rollout.prompts=2",
                 "rollout.group_size=4", *(f"policy.config.{size}" for size in SMALL)],
    "control": ["env=two_route", "policy=flow", "policy.hidden=[8]", "rollout.num_envs=4", "rollout.horizon=8"],
    "normal": ["env=two_route", "policy=gaussian", "policy.hidden=[8]", "rollout.num_envs=4", "rollout.horizon=8"],
}  # fmt: skip


@pytest.fixture(scope="module")
def stale() -> dict[str, tuple[Any, TensorDict]]:
    """For each domain a policy, and rows that an older version of it sampled."""
    found = {}
    for domain, overrides in DOMAINS.items():
        job = Job(compose([*overrides, "agent=policy_gradient", "correction=reinforce"]))
        trainer = job.make_trainer(Path())
        rows, _ = trainer.rollout.collect(0)
        if domain == "language":
            rows["reward"] = torch.tensor([1.0, 0, 0, 1, 0, 1, 0, 0])[:, None]
            rows = rows[:7]  # shares of 3 and 4: the first group is cut
        else:
            rows["reward"] = (rows["reward"] > rows["reward"].median()).float()
        with torch.no_grad():
            generator = torch.Generator().manual_seed(1)
            for p in trainer.agent.policy.parameters():
                p += 0.02 * torch.randn(p.shape, generator=generator)
        found[domain] = (trainer.agent.policy, rows)
    return found


NOISY = {"alp": 5e-6}
"""Hidden states get noise of the size 1e-6, which is drawn pass by pass."""


def agree(found: Told, one: Told, bound: float = 1e-6) -> None:
    """As one process: the gradient at equal weights to 1e-6 of its largest entry, those after it where rounding leads.

    Weights are compared to 1e-6, metrics to 1e-5.
    """
    assert len(found.gradients) == len(one.gradients) > 0 and found.metrics.keys() == one.metrics.keys()
    for number, (got, want) in enumerate(zip(found.gradients, one.gradients, strict=True)):
        assert float((got - want).abs().max()) <= (5e-6 if number else bound) * float(want.abs().max()), number
    assert float((found.weights - one.weights).abs().max()) <= 1e-6
    assert torch.equal(found.order, one.order)
    for key, want in one.metrics.items():
        assert found.metrics[key] == pytest.approx(want, rel=10 * bound, abs=bound), key


def replay_of(rows: TensorDict, language: bool) -> Replay:
    replay = Replay(1024, lanes=1 if language else rows.batch_size[1], sampler=Fresh(), cut=False)
    replay.extend(rows)
    return replay


def agent_of(policy: Any, rows: TensorDict, preset: str, **options: Any) -> PolicyGradient:
    language = hasattr(policy, "generate")
    count, length = (len(rows), None) if language else (rows.batch_size[1], rows.batch_size[0])
    made = load_correction(preset)
    options = {
        "optimizer": "sgd",
        "lr": 0.01,
        **options,
    }  # Adam divides small gradients by themselves, rounding and all
    agent = PolicyGradient(copy.deepcopy(policy), made, torch.Generator().manual_seed(0), count, length, **options)
    agent.keep_versions(1)
    agent.anchors.begin(0)  # the weights of the rows' version, for the preset that keeps them
    agent.version = 1
    elsewhere(agent)
    return agent


def elsewhere(agent: PolicyGradient) -> None:
    """As updates later: another reference than the policy, and an entropy that was seen at first."""
    if agent.anchors.reference is not None:
        generator, shared = torch.Generator().manual_seed(4), {id(p) for p in agent.policy.parameters()}
        with torch.no_grad():
            for p in (p for p in agent.anchors.reference.parameters() if id(p) not in shared):
                p += 0.05 * torch.randn(p.shape, generator=generator)
    for term in agent.objective.terms.values():
        if isinstance(term, SelectiveEntropyTerm):
            term.level = 1.0


def compared(make: Callable[[], Any], rows: TensorDict, language: bool, world: int) -> tuple[Told, list[Told]]:
    """An update of one process, and of several."""

    def work(shard: Shard) -> Told:
        agent = agents[shard.rank]
        agent.share(shard)
        return Told(agent, replay_of(rows, language))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one, agents = make(), [make() for _ in range(world)]
        return Told(one, replay_of(rows, language)), on_ranks(world, work)


CASES = [(preset, "language") for preset in correction_names()]
CASES += [(preset, "control") for preset in (*WRAPPED, "ppo", "m2po", "bapo") if preset not in REFUSED["control"]]


@pytest.mark.parametrize(("preset", "domain"), CASES)
def test_every_preset_has_the_gradient_of_one_process(
    preset: str, domain: str, stale: dict[str, tuple[Any, TensorDict]], tmp_path: Path
) -> None:
    policy, rows = stale[domain]
    rows = with_demonstrations(rows) if preset == "luffy" else rows
    options: dict[str, Any] = {"epochs": 2 if preset in WRAPPED else 1}
    if preset == "erpd":
        options["teacher"] = teacher_run(policy, DOMAINS[domain], tmp_path)
    one, found = compared(lambda: agent_of(policy, rows, preset, **options), rows, domain == "language", 2)
    for told in found:
        agree(told, one, NOISY.get(preset, 1e-6))
        assert torch.equal(told.weights, found[0].weights)


CRITIC = {"advantage": "critic", "epochs": 2, "minibatch": 5}
TERMS: dict[str, tuple[str, dict[str, Any]]] = {
    "likelihood": ("language", {"objectives": {"imitate": {"name": "nll", "coefficient": 0.3, "rows": None}}}),
    "entropy": ("language", {"entropy_coef": 0.1, "minibatch": 5, "epochs": 2}),
    "divergence": ("language", {"objectives": {"distill": {"name": "divergence", "anchor": "reference"}}}),
    "preference": ("language", {"objectives": {"prefer": {"name": "preference", "nll": 0.2, "pairs": "best_deviant"}}}),
    "sets": ("language", {"objectives": {"prefer": {"name": "set_preference", "negatives": 1}}}),
    "equal scores": ("language", {"objectives": {"equal": {"name": "equivalence"}}}),
    "good and bad rows": ("language", {"objectives": {"prefer": {"name": "kto"}}}),
    "an older judgement": ("language", {"objectives": {"prefer": {
        "name": "triage", "old": "prompt_id", "pairs": "every_pair", "within": "batch"}}}),
    "sampled divergence": ("language", {"objectives": {
        "near": {"name": "sampled_divergence", "anchor": "reference", "drawn": "policy", "tilt": 0.5}}}),
    "selected likelihood": ("language", {"objectives": {
        "policy": {"rows": "own"}, "imitate": {"name": "selective_nll", "portion": 0.4}}}),
    "rewards of rivals": ("language", {"objectives": {
        "policy": {"rows": "own"}, "imitate": {"name": "rank_aware", "near": 0.2}}}),
    "soft Q": ("language", {"objectives": {"policy": {"rows": "own"}, "imitate": {"name": "soft_q"}}}),
    "selected entropy": ("language", {"objectives": {"spread": {"name": "selective_entropy", "coefficient": 1.0}},
                                      "minibatch": 4, "epochs": 2}),
    "weighed entropy": ("language", {"columns": {"share": "distinct_share"}, "objectives": {
        "spread": {"name": "weighed_entropy", "weight": "share", "coefficient": 1.0}}}),
    "disturbed views": ("language", {"objectives": {"views": {"name": "other_views", "coefficient": 1.0}}}),
    "noisy views": ("normal", {"objectives": {"views": {"name": "other_views", "coefficient": 1.0}}}),
    "margin": ("language", {"objectives": {"policy": {"rows": "own"}, "calibrate": {"name": "margin"}}}),
    "maps that read": ("language", {"maps": [{"name": "retempered"}, "overconfident"]}),
    "maps of hidden states": ("language", {"maps": [{"name": "residual", "fewest": 2}]}),
    "filtered rows": ("language", {"filters": ["largest_advantage"]}),
    "filtered over the batch": ("language", {"filters": [{"name": "widest_spread", "over": "batch"}]}),
    "filtered units": ("language", {"filters": ["uncertain_units"]}),
    "reference KL in the reward": ("language", {"kl": 0.1, "kl_in": "reward"}),
    "a learnt reward": ("language", {"reward_model": {"name": "learnt", "lr": 0.1}}),
    "equal groups dropped": ("language", {"drop_equal_groups": True}),
    "a critic of tokens": ("language", CRITIC),
    "its own transformer": ("language", {**CRITIC, "critic_config": {"model_type": "llama", **{
        key: int(value) for key, value in (size.split("=") for size in SMALL)}}}),
    "steps, shuffled": ("normal", {"epochs": 3, "minibatch": 7, "entropy_coef": 0.01}),
    "whole rows": ("normal", {"epochs": 2, "minibatch": 3, "shuffle_steps": False, "value_clip": 0.2}),
    "V-trace": ("normal", {"epochs": 2, "off_policy_targets": True}),
    "scaled returns": ("normal", {"epochs": 2, "normalize_return": True, "normalize_reward": True}),
    "a bound of the KL": ("normal", {"epochs": 8, "target_kl": 1e-4, "lr": 0.1}),
}  # fmt: skip
SHOWN = ("selected likelihood", "rewards of rivals", "soft Q", "margin")
"""Of demonstrations too."""


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("name", TERMS)
def test_every_term_has_the_gradient_of_one_process(
    name: str, micro_batch: int | None, stale: dict[str, tuple[Any, TensorDict]]
) -> None:
    domain, options = TERMS[name]
    policy, rows = stale[domain]
    rows = with_demonstrations(rows) if name in SHOWN else rows
    preset = "grpo" if domain == "language" else "ppo"
    make = lambda: agent_of(policy, rows, preset, micro_batch=micro_batch, **options)  # noqa: E731
    one, found = compared(make, rows, domain == "language", 2)
    assert all(abs(one.metrics[f"loss/{term}"]) > 1e-3 for term in options.get("objectives", {})), one.metrics
    assert one.metrics["train/kept"] < 1.0 if "filters" in options else "train/kept" not in one.metrics
    if name == "a bound of the KL":
        assert len(one.gradients) < 8, "the bound was never met"
    for told in found:
        agree(told, one)
        assert torch.equal(told.weights, found[0].weights)


@pytest.mark.parametrize("preset", ["fixpo", "s_ppo"])
def test_what_an_intervention_sums_up_is_of_all_rows(preset: str, stale: dict[str, tuple[Any, TensorDict]]) -> None:
    """Far from the sampler, where units are clipped and the KL is beyond its bound: in one process's rows more."""
    policy, rows = copy.deepcopy(stale["language"][0]), stale["language"][1]
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    one, found = compared(lambda: agent_of(policy, rows, preset, epochs=3, lr=0.02), rows, True, 2)
    name, plain = {"fixpo": ("wrapper/beta", 1.0), "s_ppo": ("wrapper/gradient_scale", 1.0)}[preset]
    assert one.metrics[name] != plain
    for told in found:
        assert told.metrics[name] == pytest.approx(one.metrics[name], rel=1e-5)
        assert float((told.weights - one.weights).abs().max()) <= 1e-5


@pytest.mark.parametrize("preset", ["grpo", "m2po", "troll", "alp", "st_ppo", "vcpo"])
def test_a_process_without_a_row_takes_part(preset: str, stale: dict[str, tuple[Any, TensorDict]]) -> None:
    policy, rows = stale["language"]
    one, found = compared(lambda: agent_of(policy, rows, preset, minibatch=4), rows, True, 6)
    for told in found:
        agree(told, one, NOISY.get(preset, 1e-6))


@pytest.mark.parametrize("domain", ["language", "normal"])
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_imitation_has_the_gradient_of_one_process(
    domain: str, micro_batch: int | None, stale: dict[str, tuple[Any, TensorDict]]
) -> None:
    policy, rows = stale[domain]
    flat = rows if domain == "language" else rows.reshape(-1)

    def make() -> BehaviorCloning:
        generator = torch.Generator().manual_seed(0)
        options: dict[str, Any] = {"optimizer": "sgd", "lr": 0.01, "updates": 2, "batch_size": 7}
        return BehaviorCloning(copy.deepcopy(policy), generator, rows=14, micro_batch=micro_batch, **options)

    rows = torch.cat([flat, flat])[:14] if domain == "language" else flat[:14]
    one, found = compared(make, rows, True, 3)
    for told in found:
        agree(told, one)


def test_noise_inside_a_pass_is_drawn_by_each_process_and_leaves_the_order_of_rows_alone(
    stale: dict[str, tuple[Any, TensorDict]],
) -> None:
    """A flow policy's supervised loss draws noise: the gradient is one process's up to that, the minibatches the same.

    The share of the noise that both have alike is none: the two halves of equal rows get gradients of their own.
    """
    policy, rows = stale["control"]
    objectives = {"imitate": {"name": "nll", "rows": None}, "policy": None}
    options: dict[str, Any] = {"objectives": objectives, "epochs": 2, "minibatch": 3, "shuffle_steps": False}
    one, found = compared(lambda: agent_of(policy, rows, "reinforce", **options), rows, False, 2)
    assert torch.equal(found[0].order, found[1].order) and torch.equal(found[0].weights, found[1].weights)
    assert len(found[0].gradients) == len(one.gradients)
    streams = [Shard(rank, 2).stream(torch.Generator().manual_seed(3), 5) for rank in (0, 1)]
    assert not torch.equal(torch.randn(4, generator=streams[0]), torch.randn(4, generator=streams[1]))


class Watching(Wrapper):
    """Somebody's own, which adds up what it sees."""


def test_an_intervention_of_the_users_own_says_that_it_may_see_a_share(
    stale: dict[str, tuple[Any, TensorDict]],
) -> None:
    policy, rows = stale["language"]
    agent = agent_of(policy, rows, "grpo")
    agent.wrapper = Watching(agent.policy, agent.correction)
    with pytest.raises(ConfigError, match=r"Watching, which does not say .* shares=True .* learner=single"):
        agent.share(Shard(0, 2))
    agent.wrapper.shares = True
    agent.share(Shard(0, 2))


def test_shares_by_hand() -> None:
    """7 rows of 3 processes: 2, 2 and 3; 2 rows of 3: none, 1 and 1."""
    assert [Shard(rank, 3).mine(7) for rank in range(3)] == [slice(0, 2), slice(2, 4), slice(4, 7)]
    assert [Shard(rank, 3).mine(2) for rank in range(3)] == [slice(0, 0), slice(0, 1), slice(1, 2)]


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float32, torch.float64])
def test_what_is_gathered_is_bit_for_bit_what_each_found(rows: int, dtype: torch.dtype) -> None:
    whole = torch.tensor([[0.0, -1.0], [2.0, 0.0]] * rows)[:rows].to(dtype)
    if dtype.is_floating_point:
        whole[-1] = torch.tensor([-torch.inf, torch.nan])
    record = TensorDict({"x": whole}, batch_size=[rows])
    for found in on_ranks(3, lambda shard: shard.divided(record, lambda own: own["x"])):
        torch.testing.assert_close(found, whole, rtol=0, atol=0, equal_nan=True)


def test_sums_by_name_and_gradients_that_some_lack() -> None:
    """Rank r has the value r + 1 of every name that it knows: both 1 + 2, one alone 2, nobody's is absent."""

    def work(shard: Shard) -> Any:
        values = {"both": float(shard.rank + 1), **({"late": torch.tensor(2.0)} if shard.rank else {})}
        sums = [{key: float(x) for key, x in shard.sums(values).items()} for _ in range(2)]
        parameters = [torch.zeros(3, requires_grad=True) for _ in range(3)]
        parameters[0].grad = torch.full((3,), shard.rank + 1.0)
        if shard.rank:
            parameters[1].grad = torch.ones(3)
        shard.sum_gradients(parameters)
        gradients = [p.grad for p in parameters]
        for held in (
            (None, None, 1.0),
            (1.0, None, None),
        ):  # none had the last before
            for parameter, value in zip(parameters, held, strict=True):
                parameter.grad = None if value is None or shard.rank else torch.full((3,), value)
            shard.sum_gradients(parameters)
            wanted = [None if value is None else [value] * 3 for value in held]
            assert [None if p.grad is None else p.grad.tolist() for p in parameters] == wanted
        return sums, gradients, shard.first(float(shard.rank)), float(shard.largest(torch.tensor(float(shard.rank))))

    for sums, gradients, first, largest in on_ranks(2, work):
        assert sums == [{"both": 3.0, "late": 2.0}] * 2
        assert gradients[0].tolist() == [3.0] * 3 and gradients[1].tolist() == [1.0] * 3 and gradients[2] is None
        assert (first, largest) == (0.0, 1.0)
