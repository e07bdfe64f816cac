"""Images, dictionaries and tuples as observations: rows that lose nothing, and policies and critics that read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

import unified_rl as ur
from unified_rl.agents.actor_critic import make_networks
from unified_rl.agents.baselines import StateBaseline
from unified_rl.config import compose
from unified_rl.envs.control import ControlEnvBase, FrameStack, GymnasiumEnv
from unified_rl.errors import ConfigError, RecordError
from unified_rl.observations import MisfitError, layout_of
from unified_rl.policies.critics import QEnsemble, ValueCritic
from unified_rl.spaces import Image, Space, part_from_gymnasium
from unified_rl.training.build import Job

PICTURE = spaces.Box(0, 255, (12, 10, 3), np.uint8)
KINDS = {
    "image": PICTURE,
    "first": spaces.Box(0, 255, (3, 40, 44), np.uint8),
    "gray": spaces.Box(0, 255, (12, 10), np.uint8),
    "dict": spaces.Dict(b=spaces.Box(-1, 1, (2, 2)), a=spaces.Tuple([PICTURE, spaces.Discrete(3, start=4)])),
    "goal": spaces.Dict(
        achieved_goal=spaces.Box(-1, 1, (2,)), desired_goal=spaces.Box(-1, 1, (2,)), observation=spaces.Box(-9, 9, (3,))
    ),
    "choice": spaces.Discrete(5),
}


class Gallery(gymnasium.Env):  # type: ignore[type-arg]
    """Shows what its space draws: pictures are dark or bright, and the action of the same sign pays."""

    action_space = spaces.Box(-1, 1, (2,))

    def __init__(self, kind: str = "image") -> None:
        self.observation_space = KINDS[kind]

    def _seen(self) -> Any:
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        return self.observation_space.sample()

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.count = 0
        return self._seen(), {}

    def step(self, action: Any) -> Any:
        self.count += 1
        return self._seen(), float(action.sum()), False, self.count == 5, {}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_hold_observations_without_loss(kind: str) -> None:
    space, layout = KINDS[kind], layout_of(part_from_gymnasium(KINDS[kind]))
    space.seed(0)
    values = [space.sample() for _ in range(4)]
    rows = torch.from_numpy(np.stack([layout.pack(value) for value in values]))
    assert rows.dtype == layout.dtype and rows.shape == (4, layout.width)
    numbers, images = layout.unpack(rows.reshape(2, 2, -1))
    assert numbers.shape == (2, 2, layout.vector)
    flat = np.stack([spaces.flatten(space, value) for value in values])
    if kind == "dict":
        pictures = np.stack([value["a"][0] for value in values])
        assert np.array_equal(images[0].reshape(4, 3, 12, 10), np.moveaxis(pictures, -1, 1))
        assert layout.row_bytes == 4 * 7 + 360 < flat[0].nbytes
        assert numbers.reshape(4, -1)[:, 4:].argmax(-1).tolist() == [value["a"][1] - 4 for value in values]
        assert np.array_equal(numbers.reshape(4, -1)[:, :4], np.stack([value["b"].ravel() for value in values]))
        batch = {"a": (pictures, np.array([v["a"][1] for v in values])), "b": np.stack([v["b"] for v in values])}
        assert layout.lead_of(batch) == (4,) and np.array_equal(layout.pack(batch, (4,)), rows)
    elif layout.images:
        raw = np.stack(values)
        planes = raw if kind == "first" else raw[:, None] if kind == "gray" else np.moveaxis(raw, -1, 1)
        assert np.array_equal(images[0].flatten(0, 1), planes) and layout.row_bytes == raw[0].nbytes
    else:
        assert np.array_equal(rows, flat.astype(np.float32))


def test_histories_of_images_are_channels() -> None:
    env = FrameStack(GymnasiumEnv(make=Gallery, num_envs=2), 3)
    assert env.space.observation == Image((3, 12, 10, 3)) and env.space.observation.planes == (9, 12, 10)
    first = env.current_observation()
    after = env.step_batch(torch.zeros(2, 2)).observation
    (before,), (now,) = (env_planes(env, rows) for rows in (first, after))
    assert torch.equal(before[:, :3], before[:, 3:6]) and torch.equal(now[:, :6], before[:, 3:])
    assert not torch.equal(now[:, 6:], now[:, 3:6])
    flat = FrameStack(GymnasiumEnv(make=Gallery, make_kwargs={"kind": "goal"}), 2)
    assert flat.current_observation().shape == (1, 14) and flat.space.observation_dim == 14


def env_planes(env: ControlEnvBase, rows: torch.Tensor) -> list[torch.Tensor]:
    return layout_of(env.space.observation).unpack(rows)[1]


SMALL = ["env.id=Gallery-v0", "progress=false", "eval_episodes=2", "checkpoint_every=16", "policy.image_features=6"]
PPO = ["agent=ppo", "agent.minibatch=8", "agent.epochs=2", "agent.critic_hidden=[8]", "rollout.num_envs=2",
       "rollout.horizon=8", "steps=32"]  # fmt: skip
SAC = ["agent=sac", "agent.batch_size=8", "agent.learning_starts=8", "rollout.random_steps=8", "steps=32",
       "agent.critic_hidden=[8]", "replay.capacity=64", "policy.hidden=[8]"]  # fmt: skip


@pytest.fixture(autouse=True)
def gallery() -> None:
    if "Gallery-v0" not in gymnasium.registry:
        gymnasium.register("Gallery-v0", entry_point=Gallery, max_episode_steps=9)


def composed(*words: str, kind: str = "dict") -> list[str]:
    return ["env=gymnasium", *SMALL, f"env.make_kwargs={{kind: {kind}}}", *words]


@pytest.mark.parametrize(
    "words",
    [
        [*PPO, "policy=gaussian", "policy.hidden=[8]"],
        [*PPO, "policy=flow", "policy.steps=2", "policy.hidden=[8]"],
        [*PPO, "policy=diffusion", "policy.steps=2", "policy.hidden=[8]"],
        [*PPO, "policy=autoregressive", "policy.bins=3", "policy.hidden=[8]", "correction=tis", "rollout.staleness=1"],
        SAC,
    ],
    ids=["gaussian", "flow", "diffusion", "autoregressive", "sac"],
)
def test_every_policy_learns_from_images_in_its_own_rows(words: list[str], tmp_path: Path) -> None:
    job = Job(compose(composed(*words)))
    (tmp_path / "run").mkdir()
    trainer = job.make_trainer(tmp_path / "run")
    agent: Any = trainer.agent
    assert job.policy.encoder.width == job.policy.observation_dim == 4 + 3 + 6
    own = dict(job.policy.encoder.named_parameters())
    critic = agent.nets.critic if hasattr(agent, "nets") else agent.baseline.module
    others = dict(critic.encoder.named_parameters())
    before = {id(w): w.detach().clone() for w in (*own.values(), *others.values())}
    trainer.run()
    for weights in (own, others):
        assert any(not torch.equal(before[id(w)], w) for w in weights.values()), "the encoder learns"
    rows = trainer.replay.sample(4, keys=["observation"]) if "agent=sac" in words else None
    assert rows is None or rows["observation"].dtype == torch.uint8
    observation = job.env.current_observation()
    sample = job.policy.sample(observation, torch.Generator().manual_seed(0))
    changed = observation.clone()
    changed[:, -1] = 255 - changed[:, -1]
    record = sample.clone()
    record["observation"] = observation
    assert torch.allclose(job.policy.log_prob(record).log_prob, sample["behavior_log_prob"], atol=1e-5)
    record["observation"] = changed
    assert not torch.equal(job.policy.log_prob(record).log_prob, sample["behavior_log_prob"]), "one pixel counts"


def test_a_run_goes_on_bit_for_bit_and_its_policy_takes_what_the_environment_shows(tmp_path: Path) -> None:
    words = composed(*PPO, "policy.hidden=[8]")
    whole = ur.train([*words[:-1], *words[-1:], f"run_dir={tmp_path / 'whole'}"])
    part = ur.train([*(w.replace("steps=32", "steps=16") for w in words), f"run_dir={tmp_path / 'part'}"])
    ur.resume(part, steps=32)
    one, other = (ur.load_policy(str(run)) for run in (whole, part))
    weights = one.state_dict()
    assert any(name.startswith("encoder.images.0") for name in weights)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in weights.items())
    space = KINDS["dict"]
    space.seed(1)
    values = [space.sample() for _ in range(3)]
    single = np.stack([one(value) for value in values])
    batch = {"a": tuple(np.stack([v["a"][i] for v in values]) for i in (0, 1)), "b": np.stack([v["b"] for v in values])}
    np.testing.assert_allclose(one(batch), single, atol=1e-6)
    tensors = {"a": tuple(map(torch.from_numpy, batch["a"])), "b": torch.from_numpy(batch["b"]).double()}
    np.testing.assert_allclose(one(tensors).numpy(), single, atol=1e-6)
    rows = torch.from_numpy(np.stack([one.layout.pack(value) for value in values]))
    np.testing.assert_allclose(one.deterministic_action(rows).detach(), single, atol=1e-6)
    with pytest.raises(
        RecordError, match=r"entry a\[0\] does not fit what this policy sees, a dictionary of .*an image"
    ):
        one({**values[0], "a": (np.zeros((12, 10, 3)), 4)})
    with pytest.raises(RecordError, match=r"a dictionary with 'b' is expected"):
        one({"a": values[0]["a"]})
    with pytest.raises(
        ConfigError, match=r"files are written of policies that see one vector: act with unified_rl.load"
    ):
        ur.export(str(whole), str(tmp_path / "policy.pt2"))


def test_what_cannot_read_images_is_refused_by_name() -> None:
    with pytest.raises(
        ConfigError, match=r"vectors alone can be seen here, and these are a dictionary.*env.flatten=true"
    ):
        Job(compose(composed("agent=sb3_ppo"))).collecting_agent()
    frozen = [*PPO, "policy=diffusion", "policy.steps=3", "policy.trained_steps=1"]
    with pytest.raises(ConfigError, match=r"policy\.trained_steps freezes the first steps, and the encoder of images"):
        Job(compose(composed(*frozen)))
    for bad, where in (
        ({"a": 1, "b": np.zeros((2, 2))}, "a[1]"),
        ({"a": (np.zeros((12, 10, 3), np.uint8), 9), "b": np.zeros((2, 2))}, "a[1]"),
    ):
        with pytest.raises(MisfitError) as caught:
            layout_of(part_from_gymnasium(KINDS["dict"])).pack(bad)
        assert caught.value.where == where
    flat = Job(compose(composed(*PPO, "env.flatten=true", kind="first")))
    assert flat.policy.encoder is None and flat.env.current_observation().dtype == torch.float32


def test_critics_encode_with_weights_of_their_own() -> None:
    space = Space(part_from_gymnasium(KINDS["dict"]), part_from_gymnasium(Gallery.action_space))
    layout = layout_of(space.observation)
    KINDS["dict"].seed(0)
    rows = torch.from_numpy(np.stack([layout.pack(KINDS["dict"].sample()) for _ in range(6)])).reshape(2, 3, -1)
    value = ValueCritic(space, (4,), normalize_observation=True, image_features=5)
    value.update_normalizer(rows)
    assert value.width == 7 + 5 and value(rows).shape == (2, 3) and float(value.normalizer.count) == 6.0  # type: ignore[union-attr, arg-type]
    pictures = ValueCritic(Space(part_from_gymnasium(PICTURE), space.action), normalize_observation=True)
    assert pictures.normalizer is None, "pixels have a scale of their own"
    for stacked in (False, True):
        critic = QEnsemble(space, hidden=(4,), stacked=stacked, image_features=5)
        critic(rows[0], torch.zeros(3, 2)).sum().backward()
        assert all(weight.grad is not None for weight in critic.encoder.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("agent", ["ppo", "sac"])
def test_critics_give_images_the_width_that_the_policy_gives_them(agent: str) -> None:
    kind = "policy=gaussian" if agent == "ppo" else "policy=tanh_gaussian"
    policy = Job(compose(composed(f"agent={agent}", kind))).policy
    if agent == "ppo":
        critics: list[torch.nn.Module | None] = [StateBaseline(policy, (4,), seed=0).module]  # type: ignore[arg-type]
    else:
        alpha, cpu = torch.zeros(()), torch.device("cpu")
        nets = make_networks(policy, alpha, cpu, True, critics=2, hidden=(4,), layer_norm=False, seed=0)  # type: ignore[arg-type]
        critics = [nets.critic, nets.target, nets.value]
    assert all(critic is not None and critic.encoder.features == 6 for critic in critics)  # type: ignore[union-attr]
