"""Environments of the user's by dotted path: made, seeded and evaluated, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import gymnasium
import pytest
import torch

from unified_rl.config import compose, resolve_defaults
from unified_rl.envs.control import GymnasiumEnv
from unified_rl.errors import ConfigError, EnvError
from unified_rl.interop.gymnasium_vector import from_gymnasium
from unified_rl.rollout import ControlRollout
from unified_rl.training.run import Job, train

ZOO = '''
import gymnasium, torch
import numpy as np
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

class Count(gymnasium.Env):
    """Observes how many steps it has made and what its seed drew, pays 1 a step, is cut off after the third."""
    observation_space = gymnasium.spaces.Box(-9, 9, (2,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))
    metadata = {"render_modes": ["rgb_array"]}
    made = 0
    def __init__(self, offset: int = 0, render_mode: str | None = None):
        type(self).made += 1
        self.offset, self.render_mode = offset, render_mode
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        self.drawn = self.np_random.random()
        return self.seen(), {}
    def seen(self):
        return np.array([self.count + self.offset, self.drawn], np.float32)
    def step(self, action):
        self.count += 1
        end = self.count == 3
        return self.seen(), 1.0, False, end, {"is_success": self.drawn > 0.5, "depth": 2.0 * self.count}
    def render(self):
        return np.full((4, 6, 3), self.count, np.uint8)

def copy(): return gymnasium.make("Pendulum-v1")
def wrapped(offset: int = 0): return gymnasium.wrappers.TimeLimit(Count(offset), 2)
def vector(num_envs: int, mode: str = "NEXT_STEP", several: bool = False):
    kind = gymnasium.vector.AsyncVectorEnv if several else gymnasium.vector.SyncVectorEnv
    return kind([Count] * num_envs, autoreset_mode=gymnasium.vector.AutoresetMode[mode])
class Lockstep(gymnasium.vector.VectorEnv):
    """Cut off every third step, all copies at once; reset by itself in the same step."""
    metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    num_envs = 2
    single_observation_space = gymnasium.spaces.Box(-9, 9, (1,))
    single_action_space = gymnasium.spaces.Discrete(2, start=1)
    def __init__(self, tells: bool = True, wrong: bool = False): self.tells, self.wrong = tells, wrong
    def seen(self): return np.full((2, 1), float(self.count), np.float32)
    def reset(self, *, seed=None, options=None):
        self.count = 0
        return self.seen(), {}
    def step(self, actions):
        assert (actions >= 1).all()
        self.count += 1
        if self.wrong: return self.seen()
        last, end, infos = self.seen(), np.full(2, self.count == 3), {}
        if end.all():
            self.count = 0
            infos = {"final_obs": last, "final_info": {"is_success": np.array([1.0, 0.0])}} if self.tells else {}
        return self.seen(), np.ones(2), np.zeros(2, bool), end, infos
class Late(Lockstep):
    metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.NEXT_STEP}
def alone(): return Lockstep(tells=False)
def wrong(): return Lockstep(wrong=True)
def nothing(): return None
def broken(): raise MemoryError("no room\\nfor it")
def left(): raise SystemExit(4)
'''


@pytest.fixture(autouse=True)
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zoo_of_envs.py").write_text(ZOO)
    monkeypatch.syspath_prepend(tmp_path)


def job(name: str, *overrides: str, copies: int = 1, **more: object) -> Job:
    words = ["env=pendulum", "agent=ppo", f"rollout.num_envs={copies}", "rollout.horizon=8", "progress=false"]
    words += overrides
    return Job({**compose(words), "env": {"_target_": name, **more}}, allow=["zoo_of_envs", "torchrl"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Late", "Late resets ended copies in the next step, which makes a row of a step that never happened"),
        ("nothing", "NoneType is neither a ControlEnv, .* nor an environment of Gymnasium"),
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


@pytest.mark.parametrize(("name", "more", "length"), [("Count", {"offset": 4}, 3), ("wrapped", {"offset": 4}, 2)])
def test_a_factory_of_one_gymnasium_environment_makes_as_many_as_are_asked_for(
    name: str, more: dict[str, object], length: int
) -> None:
    import zoo_of_envs

    before = zoo_of_envs.Count.made
    made = job(f"zoo_of_envs.{name}", "eval_episodes=40", copies=3, **more)
    assert (zoo_of_envs.Count.made, made.env.num_envs) == (before + 3, 3)
    rollout = ControlRollout(made.env, made.policy, 0.99, torch.Generator(), horizon=7)
    rows, told = rollout.collect(0)
    assert rows["observation"][:, :, 0].tolist() == [[4 + t % length] * 3 for t in range(7)]
    assert rows["next_observation"][:, :, 0].tolist() == [[5 + t % length] * 3 for t in range(7)]
    assert rows["truncated"].tolist() == [[t % length == length - 1] * 3 for t in range(7)]
    assert len(rows["observation"][0, :, 1].unique()) == 3 and told["rollout/depth"] == 2 * length
    scores, copies = made.evaluate(), zoo_of_envs.Count.made
    assert scores["eval/length"] == length and 0 < scores["eval/success"] < 1
    assert copies == before + 3 + 16, "evaluation uses its copies again"
    assert made.env.resumable() is True


def test_one_environment_that_nobody_can_make_again_is_refused() -> None:
    import gymnasium

    from unified_rl.rollout import as_environment

    with pytest.raises(ConfigError, match=r"is a Gymnasium environment.*GymnasiumEnv\(make=function, num_envs=K\)"):
        as_environment(gymnasium.make("Pendulum-v1"))


@pytest.mark.parametrize(
    "more",
    [{"mode": "NEXT_STEP"}, {"mode": "SAME_STEP"}, {"mode": "DISABLED"}, {"mode": "NEXT_STEP", "several": True}],
    ids=str,
)
def test_vector_environments_keep_true_final_observations_in_every_mode(more: dict[str, object]) -> None:
    made = job("zoo_of_envs.vector", "eval_episodes=9", copies=3, **more)
    try:
        rollout = ControlRollout(made.env, made.policy, 0.99, torch.Generator(), horizon=7)
        rows, told = rollout.collect(0)
        assert rows["observation"][:, :, 0].tolist() == [[t % 3] * 3 for t in range(7)]
        assert rows["next_observation"][:, :, 0].tolist() == [[1 + t % 3] * 3 for t in range(7)]
        assert rows["truncated"].tolist() == [[t % 3 == 2] * 3 for t in range(7)]
        assert rows["reward"].eq(1.0).all() and rows["episode"].unique().numel() == 9
        drawn = rows["observation"][:, :, 1]
        assert torch.equal(drawn[:3], rows["next_observation"][:3, :, 1]) and not torch.equal(drawn[0], drawn[3])
        assert told["rollout/depth"] == 6.0 and told["rollout/length"] == 3.0 and "rollout/success" in told
        assert "no way to put it back" in made.env.resumable()
        if "several" not in more:  # it forks, which a process with threads does at its own risk
            assert made.evaluate()["eval/length"] == 3.0
    finally:
        for env in filter(None, (made.env, made.eval_env)):
            env.close()


def test_a_vector_environment_begins_with_the_runs_seed() -> None:
    def begun(seed: int) -> torch.Tensor:
        return from_gymnasium(gymnasium.make_vec("Pendulum-v1", 2), None, 2, seed).reset_batch()  # type: ignore[union-attr]

    assert torch.equal(begun(7), begun(7)) and not torch.equal(begun(7), begun(8))
    env = from_gymnasium(gymnasium.make_vec("Pendulum-v1", 2), None, 2, 7)
    assert env is not None and not torch.equal(env.reset_batch(), env.reset_batch())


@pytest.mark.parametrize("more", [{}, {"max_episode_steps": 5}])
def test_a_time_limit_may_stand_among_the_arguments_of_make(more: dict[str, int]) -> None:
    assert GymnasiumEnv("Pendulum-v1", make_kwargs={"max_episode_steps": 7}, **more).max_steps == more.get(
        "max_episode_steps", 7
    )


def test_vector_environments_of_ones_own_reset_themselves_or_are_refused() -> None:
    made = job("zoo_of_envs.Lockstep", "policy=autoregressive", copies=2)
    rows, told = ControlRollout(made.env, made.policy, 0.99, torch.Generator(), horizon=4).collect(0)
    assert rows["next_observation"][:, 0, 0].tolist() == [1, 2, 3, 1] and told["rollout/success"] == 0.5
    with pytest.raises(ConfigError, match=r"rollout.num_envs=3, but the environment has 2 simulations"):
        job("zoo_of_envs.Lockstep", "policy=autoregressive", copies=3).make_rollout()
    for name, words in (
        ("alone", "hold no final_obs"),
        ("wrong", r"returned .* from step 1; five values are expected"),
    ):
        made = job(f"zoo_of_envs.{name}", "policy=autoregressive", copies=2)
        with pytest.raises(EnvError, match=words):
            ControlRollout(made.env, made.policy, 0.99, torch.Generator(), horizon=4).collect(0)


def test_a_factory_is_a_setting_of_gymnasium_environments_too(tmp_path: Path) -> None:
    words = ["env=gymnasium", "env.make=zoo_of_envs:Count", "env.make_kwargs={offset: 2}", "env.max_episode_steps=2"]
    words += ["env.chunk=2", "agent=ppo", "rollout.num_envs=2", "progress=false"]
    made = Job(compose(words, allow=["zoo_of_envs"]), allow=["zoo_of_envs"])
    assert made.env.current_observation()[:, 0].tolist() == [2.0, 2.0] and made.env.space.action_dim == 2
    step = made.env.step_batch(torch.zeros(2, 2))
    assert step.truncated.all() and step.executed.tolist() == [2, 2]
    with pytest.raises(ConfigError, match=r"env.make 'zoo_of_envs.Count' is outside the allowed packages"):
        compose(words)
    with pytest.raises(ConfigError, match=r"zoo_of_envs has no 'Cuont'; did you mean 'Count'"):
        compose([words[0], "env.make=zoo_of_envs:Cuont"], allow=["zoo_of_envs"])
    with pytest.raises(ConfigError, match=r"env.make=zoo_of_envs:vector returned .* one gymnasium.Env is expected"):
        Job(compose([words[0], "env.make=zoo_of_envs:vector", "env.make_kwargs={num_envs: 1}", "agent=ppo"],
                    allow=["zoo_of_envs"]), allow=["zoo_of_envs"])  # fmt: skip
    with pytest.raises(ConfigError, match=r"env.id and env.make are two ways"):
        compose([*words, "env.id=Pendulum-v1"], allow=["zoo_of_envs"])
