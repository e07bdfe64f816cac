"""A penalty on the divergence of occupancies: its formula by hand, a closed form, what it learns and refuses."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from agent_cases import control_agent, filled, gaussian, stream, transitions
from run_cases import CONTROL, LANGUAGE, cached, merged, recorded
from tensordict import TensorDict
from term_cases import agent_of, joined
from torch import Tensor

from unified_rl.agents.reward_model import make_reward_model
from unified_rl.errors import ConfigError, NonFiniteError, UnifiedRLError
from unified_rl.replay import Replay, Uniform
from unified_rl.units import record_from_steps

MEAN = 0.6
"""Of the policy's occupancy, of deviation 1; that of the other is at 0."""


def saved(rows: TensorDict, folder: Path) -> str:
    """A folder of rows ``[n]``."""
    replay = Replay(len(rows), lanes=1, sampler=Uniform())
    replay.extend(rows)
    replay.dumps(folder)
    return str(folder)


def steps(observation: Tensor) -> TensorDict:
    """Steps ``[n]`` with these observations ``[n, 3]``, whatever else."""
    policy = gaussian(normalize_observation=False)
    one = transitions(policy)[0, :1].expand(len(observation)).clone()
    one["observation"], one["action"] = observation, torch.zeros_like(one["action"])
    return one


def record(observation: Tensor) -> TensorDict:
    """One step a row."""
    return record_from_steps(steps(observation)[:, None])


def penalised(folder: Path, base: Tensor, **node: Any) -> Any:
    made = make_reward_model({"name": "occupancy", "base": saved(steps(base), folder), **node})
    made.attach(gaussian(normalize_observation=False), 0)
    return made


def normal(mean: float, seed: int, count: int = 4096) -> Tensor:
    x = torch.zeros(count, 3)
    x[:, 0] = mean + torch.randn(count, generator=stream(seed))
    return x


def test_two_gaussians_differ_by_what_is_known(tmp_path: Path) -> None:
    made = penalised(tmp_path / "rows", normal(0.0, 1), steps=100, lr=0.02, coefficient=1.0, hidden=(16,))
    rows, found = record(normal(MEAN, 2)), {}
    made(rows.clone(), 0, found)
    chi2 = math.exp(MEAN**2) - 1
    assert float(found["reward_model/divergence"]) == pytest.approx(chi2, rel=0.2)
    assert -float(found["reward_model/reward"]) == pytest.approx(2 * chi2, rel=0.2)  # of the slope, 2 (t - 1)
    place = torch.linspace(-1.0, 1.5, 6)
    seen = record(torch.nn.functional.pad(place[:, None], (0, 2)))
    torch.testing.assert_close(made.logits(seen), MEAN * place - MEAN**2 / 2, atol=0.15, rtol=0.0)


def test_equal_occupancies_cost_nothing(tmp_path: Path) -> None:
    made = penalised(tmp_path / "rows", normal(0.0, 1), steps=60, lr=0.02, coefficient=1.0, hidden=(16,))
    rows, found = record(normal(0.0, 2)), {}
    first = rows["reward"].clone()
    untold = penalised(tmp_path / "again", normal(0.0, 1), steps=1, lr=0.0, coefficient=1.0)
    untold(rows, 0, found)
    assert torch.equal(rows["reward"], first) and float(found["reward_model/divergence"]) == 0.0
    assert float(found["reward_model/loss"]) == pytest.approx(math.log(2.0))
    assert float(found["reward_model/accuracy"]) == pytest.approx(0.5)  # it has not decided
    made(rows, 0, found)
    assert float(found["reward_model/divergence"]) < 0.03 and abs(float(found["reward_model/reward"])) < 0.1


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize(
    ("generator", "value", "slope"),
    [
        ("pearson_chi2", lambda t: (t - 1) ** 2, lambda t: 2 * (t - 1)),
        ("reverse_kl", lambda t: t * math.log(t) - (t - 1), math.log),
        ("tv", lambda t: abs(t - 1) / 2, lambda t: 0.5 if t > 1 else -0.5),
        ("hellinger", lambda t: (t**0.5 - 1) ** 2 / 2, lambda t: (1 - t**-0.5) / 2),
    ],
)
def test_the_penalty_by_hand(root: bool, generator: str, value: Any, slope: Any, tmp_path: Path) -> None:
    made = penalised(tmp_path / "rows", normal(0.0, 1, 8), lr=0.0, coefficient=0.3, generator=generator, root=root)
    with torch.no_grad():
        made.model.head.bias.fill_(0.7)
    policy = gaussian(normalize_observation=False)
    rows = record_from_steps(transitions(policy).transpose(0, 1).contiguous())
    rows["step_mask"][0, -3:] = False
    first, found, t = rows["reward"].clone(), {}, math.exp(0.7)
    made(rows, 0, found)
    taken = 0.3 * slope(t) / (2 * math.sqrt(value(t)) if root else 1.0)
    want = torch.where(rows["step_mask"], first - taken, first)
    torch.testing.assert_close(rows["reward"], want)
    assert float(found["reward_model/divergence"]) == pytest.approx(value(t), rel=1e-5)
    steps_a_row = rows["step_mask"].sum() / len(rows)
    assert float(found["reward_model/reward"]) == pytest.approx(float(-taken * steps_a_row), rel=1e-5)


@pytest.mark.parametrize("generator", ["reverse_kl", "forward_kl"])
def test_a_root_of_a_divergence_near_zero_is_no_large_penalty(generator: str, tmp_path: Path) -> None:
    made = penalised(tmp_path / "rows", normal(0.0, 1), coefficient=1.0, generator=generator, root=True, hidden=(16,))
    for seed in range(6):
        rows, found = record(normal(0.0, 10 + seed, 512)), {}
        first = rows["reward"].clone()
        made(rows, 0, found)
        assert 0 < float(found["reward_model/divergence"]) < 0.02
        assert float((rows["reward"] - first).std()) < 2.0  # sqrt(1/2) where t is near 1 and log t has mean 0


@pytest.mark.parametrize("changed", [{"coefficient": 1e30}, {"coefficient": 1e38}, {"lr": 1e8}, {"lr": 1e30}])
def test_penalties_that_nothing_is_learnt_from_are_one_error(changed: dict[str, float], tmp_path: Path) -> None:
    node = {"coefficient": 1.0, "generator": "neyman_chi2", **changed}
    made = penalised(tmp_path / "rows", normal(2.0, 1), **node)
    rows = record(normal(-2.0, 2, 256))
    first = rows["reward"].clone()
    with pytest.raises(NonFiniteError, match=r"agent\.reward_model .* lower agent\.reward_model\.(coefficient|lr)="):
        made(rows, 0, {})
    assert torch.equal(rows["reward"], first)


def test_no_layers_is_a_linear_discriminator(tmp_path: Path) -> None:
    made = penalised(tmp_path / "rows", normal(0.0, 1, 8), hidden=())
    assert sum(p.numel() for p in made.module.parameters()) == 3 + 2 + 1


def test_an_answer_is_one_step_whose_penalty_stands_at_its_last_turn(tmp_path: Path) -> None:
    policy, rows = joined()
    rows["step_mask"] = torch.ones(len(rows), 2, dtype=torch.bool)
    rows["reward"] = rows["reward"].expand(-1, 2).contiguous()
    base = saved(rows, tmp_path / "rows")
    made = make_reward_model({"name": "occupancy", "base": base, "lr": 0.0, "coefficient": 1.0})
    made.attach(policy, 0)
    with torch.no_grad():
        made.model.head.bias.fill_(math.log(3.0))
    first = rows["reward"].clone()
    made(rows, 0, {})
    torch.testing.assert_close(first - rows["reward"], torch.tensor([0.0, 4.0]).expand(len(rows), 2))


@pytest.mark.parametrize("task", ["language", "control"])
def test_micro_batches_learn_the_same(task: str, tmp_path: Path) -> None:
    policy, rows = joined() if task == "language" else (gaussian(), transitions(gaussian()))
    other = joined(5)[1] if task == "language" else transitions(gaussian(), 7).reshape(-1)
    node = {"name": "occupancy", "base": saved(other, tmp_path / "rows"), "lr": 0.01}
    found = []
    for micro_batch in (None, 3):
        made = copy.deepcopy(policy)
        options = {"reward_model": node, "micro_batch": micro_batch}
        language = task == "language"
        agent = agent_of(made, rows, "reinforce", **options) if language else control_agent(made, "ppo", **options)
        found.append((agent.update(filled(rows, 1 if language else 4)), agent.reward_model.module.state_dict()))
    assert float(found[0][1]["head.weight"].abs().max()) > 1e-3
    for name, weight in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], weight, atol=1e-5, rtol=1e-3)
    for name in ("reward_model/loss", "reward_model/accuracy", "reward_model/divergence", "reward_model/reward"):
        assert float(found[0][0][name]) == pytest.approx(float(found[1][0][name]), rel=1e-3, abs=1e-6)


def test_rows_of_others_do_not_stand_for_the_policy(tmp_path: Path) -> None:
    from unified_rl.rollout.sources import Demonstrations

    policy, rows = joined(demonstrations=Demonstrations(rows=4))
    made = make_reward_model({"name": "occupancy", "base": saved(rows, tmp_path / "rows"), "lr": 0.0})
    made.attach(policy, 0)
    seen: list[int] = []
    made.look = lambda chosen: seen.append(len(chosen))
    made(rows, 0, {})
    assert seen == [12] and len(rows) == 16


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([*LANGUAGE, "agent.reward_model=occupancy"], "needs base"),
        ([*LANGUAGE, "agent.reward_model={name: occupancy, base: nowhere}"], "agent.reward_model.base=nowhere"),
        ([*LANGUAGE, "agent.reward_model={name: occupancy, base: ROWS}"], "holds no tokens"),
        ([*LANGUAGE, "agent.reward_model={name: occupancy, base: ROWS, hidden: [4]}"], "head on its own transformer"),
        ([*CONTROL, "agent.reward_model={name: occupancy, base: ROWS, generator: chi}"], "reward_model.generator"),
        ([*CONTROL, "agent.reward_model={name: occupancy, base: TEXTS}"], "holds no observation"),
        (["env=hopper", *CONTROL[1:], "agent.reward_model={name: occupancy, base: ROWS}"],
         "the rows are of another environment"),
        ([*LANGUAGE, "env.max_turn_tokens=2", "agent.reward_model={name: occupancy, base: TEXTS}"],
         "record rows of this task"),
        ([*CONTROL, "agent.reward_model={name: occupancy, base: ROWS, weight: 0.5}"], "weight"),
        ([*CONTROL, "agent.reward_model={name: occupancy, base: ROWS, rows: expert}"],
         "agent.reward_model.rows=expert would learn nothing: rows of this run are of source online"),
        ([*LANGUAGE, "correction=grpo", "correction.advantage={baseline: tracker, scale: whiten}",
          "agent.reward_model={name: occupancy, base: TEXTS}"],
         "rewards of agent.reward_model are none: set correction.advantage.baseline=mean"),
    ],
)  # fmt: skip
def test_what_it_does_not_take_is_refused_by_name(words: list[str], told: str, folders: dict[str, str]) -> None:
    made = [word.replace("ROWS", folders["control"]).replace("TEXTS", folders["language"]) for word in words]
    with pytest.raises(UnifiedRLError, match=re.escape(told)):
        cached(*merged(made))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    tasks = {"control": CONTROL, "language": LANGUAGE}
    return {name: recorded(tmp_path_factory.mktemp(name), task) for name, task in tasks.items()}


def test_a_penalty_is_no_reward_of_a_later_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("agent: {reward_model: {name: occupancy, base: x}}\n")
    made = make_reward_model({"name": "stored", "folder": str(tmp_path)})
    with pytest.raises(ConfigError, match="had a penalty, which is no reward by itself"):
        made.attach(gaussian(), 0)
