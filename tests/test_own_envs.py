"""Environments of the user's by dotted path: made, seeded and evaluated, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unified_rl.config import compose, resolve_defaults
from unified_rl.errors import ConfigError
from unified_rl.rollout import ControlRollout
from unified_rl.training.run import Job, train

ZOO = '''
import gymnasium, torch
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

class Dice(EnvBase):
    """Observes a number of its own stream, which set_seed alone sets, and pays it; four steps long."""
    made = 0
    def __init__(self):
        super().__init__(device="cpu", batch_size=[])
        type(self).made += 1
        self.observation_spec = Composite(observation=Unbounded((1,)))
        self.action_spec, self.reward_spec = Bounded(-1, 1, (1,)), Unbounded((1,))
        flags = {key: Categorical(2, shape=(1,), dtype=torch.bool) for key in ("done", "terminated", "truncated")}
        self.done_spec = Composite(flags)
        self.stream = torch.Generator()
        self.stream.seed()
    def _reset(self, tensordict=None, **kwargs):
        self.count, self.number = 0, torch.randn(1, generator=self.stream)
        return TensorDict({"observation": self.number.clone()}, [])
    def _step(self, tensordict):
        self.count += 1
        end = torch.tensor([self.count >= 4])
        out = {"observation": self.number.clone(), "reward": self.number.clone(), "done": end, "terminated": end}
        return TensorDict({**out, "truncated": torch.zeros(1, dtype=torch.bool)}, [])
    def _set_seed(self, seed):
        self.stream.manual_seed(seed)

def copy(): return gymnasium.make("Pendulum-v1")
def vector(): return gymnasium.make_vec("Pendulum-v1", 2)
def nothing(): return None
def broken(): raise MemoryError("no room\\nfor it")
def left(): raise SystemExit(4)
'''


@pytest.fixture(autouse=True)
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zoo_of_envs.py").write_text(ZOO)
    monkeypatch.syspath_prepend(tmp_path)


def job(name: str, *overrides: str, **more: object) -> Job:
    words = ["env=pendulum", "agent=ppo", "rollout.num_envs=1", "rollout.horizon=8", "progress=false", *overrides]
    return Job({**compose(words), "env": {"_target_": name, **more}}, allow=["zoo_of_envs", "torchrl"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("copy", "TimeLimit is a Gymnasium environment.*env=gymnasium"),
        ("vector", "SyncVectorEnv is a Gymnasium environment"),
        ("nothing", "NoneType is neither a ControlEnv"),
        ("broken", r"env: zoo_of_envs\.broken could not be made: MemoryError: no room for it$"),
        ("left", r"env: zoo_of_envs\.left could not be made: SystemExit: 4$"),
    ],
)
def test_what_is_no_environment_is_refused_in_one_line(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        job(f"zoo_of_envs.{name}")
    assert "\n" not in str(caught.value)


def test_a_torchrl_environment_has_the_runs_streams_and_as_many_episodes_as_asked() -> None:
    import zoo_of_envs  # type: ignore[import-not-found]

    first, again, other = (job("zoo_of_envs.Dice", f"seed={seed}", "eval_episodes=20") for seed in (3, 3, 4))
    rows = [
        ControlRollout(each.env, each.policy, 0.99, torch.Generator(), horizon=9).collect(0)[0]["observation"]
        for each in (first, again, other)
    ]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
    made, state = zoo_of_envs.Dice.made, torch.random.get_rng_state()
    scores = [each.evaluate() for each in (first, again, other)]
    assert zoo_of_envs.Dice.made == made + 3, "one environment plays all episodes"
    assert torch.equal(torch.random.get_rng_state(), state)
    assert scores[0] == scores[1] != scores[2] and scores[0]["eval/length"] == 4.0
    stream = torch.Generator().manual_seed(first._integer("evaluation"))
    returns = 4 * torch.cat([torch.randn(1, generator=stream) for _ in range(20)]).double()
    assert scores[0]["eval/return"] == pytest.approx(float(returns.mean()), rel=1e-5)
    assert scores[0]["eval/return_std"] == pytest.approx(float(returns.std(correction=0)), rel=1e-5)


@pytest.mark.parametrize(("id", "policy"), [("Pendulum-v1", "gaussian"), ("CartPole-v1", "autoregressive")])
def test_torchrls_own_gym_environment_trains(id: str, policy: str, tmp_path: Path) -> None:
    words = ["env=pendulum", f"policy={policy}", "agent=ppo", "rollout.num_envs=1", "rollout.horizon=8", "steps=8"]
    sizes = ["agent.minibatch=8", "agent.epochs=1", "eval_episodes=1", "progress=false", f"run_dir={tmp_path / 'run'}"]
    cfg = {**compose([*words, *sizes]), "env": {"_target_": "torchrl.envs.GymEnv", "env_name": id}}
    assert (train(resolve_defaults(cfg, allow=["torchrl"]), ["torchrl"]) / "checkpoints").is_dir()


def test_chunked_runs_count_the_environment_steps_that_they_make(tmp_path: Path) -> None:
    """Episodes of 10 steps are chunks of 4, 4 and 2: six decisions in two copies are 40 steps of at most 48."""
    words = ["env=two_route", "env.max_steps=10", "agent=ppo", "rollout.num_envs=2", "rollout.horizon=6", "steps=96"]
    sizes = ["agent.minibatch=12", "agent.epochs=1", "eval_episodes=2", "progress=false", "log_every=1"]
    made = Job(compose([*words, *sizes]))
    (tmp_path / "run").mkdir()
    trainer = made.make_trainer(tmp_path / "run")
    trainer.run()
    rows = trainer.log.rows  # type: ignore[union-attr]
    assert [row["steps"] for row in rows] == [0, 40, 80] and trainer.updates == trainer.planned == 2
    assert all(row["rollout/length"] == 10.0 and row["rollout/episodes"] == 4.0 for row in rows[1:])
    assert "rollout/steps" not in rows[-1]
    state = trainer.state_dict()
    other = Job(compose([*words, *sizes])).make_trainer(tmp_path / "other")
    other.load_state_dict({**state, "has_replay": False}, tmp_path)
    assert other.steps == 80
