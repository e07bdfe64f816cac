"""TorchRL's collectors write into the replay, and what they wrote is what happened."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.data import Bounded, Composite, LazyTensorStorage, Unbounded
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.envs.llm.transforms.policy_version import PolicyVersion

from unified_rl.errors import RecordError
from unified_rl.replay import Fresh, Replay, Segment, Uniform, from_collector


class Counter(EnvBase):
    """K lanes that add their action to a counter; lane k ends after 3 + k steps."""

    def __init__(self, lanes: int) -> None:
        super().__init__(batch_size=torch.Size([lanes] if lanes else []))
        shape = (*self.batch_size, 1)
        self.observation_spec = Composite(observation=Unbounded(shape=shape), shape=self.batch_size)
        self.action_spec = Bounded(low=-1.0, high=1.0, shape=shape)
        self.reward_spec = Unbounded(shape=shape)
        self.full_done_spec = self.full_done_spec
        self._horizon = torch.arange(3, 3 + max(1, lanes)).reshape(shape)
        self._count = torch.zeros(shape)
        self._age = torch.zeros(shape, dtype=torch.int64)

    def _reset(self, tensordict: TensorDictBase | None = None) -> TensorDict:
        which = torch.ones_like(self._age, dtype=torch.bool)
        if tensordict is not None and "_reset" in tensordict.keys():
            which = tensordict["_reset"].reshape(self._age.shape)
        self._count = self._count.masked_fill(which, 0.0)
        self._age = self._age.masked_fill(which, 0)
        return TensorDict({"observation": self._count.clone()}, batch_size=self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        self._count = self._count + tensordict["action"]
        self._age = self._age + 1
        done = self._age >= self._horizon
        out = {"observation": self._count.clone(), "reward": -tensordict["action"], "done": done, "terminated": done}
        return TensorDict(out, batch_size=self.batch_size)

    def _set_seed(self, seed: int | None) -> None:
        return None


class Chooser(torch.nn.Module):
    """Chooses a constant that says which weights acted, and two log-probs a step."""

    def __init__(self) -> None:
        super().__init__()
        self.choice = torch.nn.Parameter(torch.tensor(0.0))

    def forward(self, observation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        action = self.choice.detach().expand_as(observation).clone()
        return action, torch.cat([action - 1, action - 2], -1)


def collect(lanes: int, replay: Replay, rounds: int, frames: int, change_weights: bool = False) -> Collector:
    versions = PolicyVersion(version_type="int")
    env = TransformedEnv(Counter(lanes), versions)
    policy = Chooser()
    module = TensorDictModule(policy, in_keys=["observation"], out_keys=["action", "behavior_log_prob"])
    collector = Collector(env, module, frames_per_batch=frames, total_frames=rounds * frames, replay_buffer=replay)
    for round_, _ in enumerate(collector):
        if change_weights:
            policy.choice.data.fill_((round_ + 1) / 8)
            versions.increment_version()
    return collector


@pytest.mark.parametrize("lanes", [0, 1, 3])
def test_a_collector_fills_the_replay_with_the_transitions_that_happened(lanes: int) -> None:
    width = max(1, lanes)
    replay = Replay(60 * width, lanes=width, sampler=Fresh(), discount=0.9)
    collect(lanes, replay, rounds=4, frames=6 * width, change_weights=True)
    assert replay.write_count == 24 * width
    batch = replay.sample(width, length=24)
    horizon = torch.arange(3, 3 + width)[:, None]
    time = torch.arange(24).expand(width, 24)
    version = time // 6
    assert torch.equal(batch["policy_version"], version)  # the weights that acted, not the ones before
    torch.testing.assert_close(batch["action"][..., 0], version / 8)
    torch.testing.assert_close(batch["reward"], -version / 8)
    assert torch.equal(batch["terminated"], time % horizon == horizon - 1)
    assert not bool(batch["truncated"].any())
    ended = batch["terminated"]
    torch.testing.assert_close(
        batch["next_observation"][..., 0], batch["observation"][..., 0] + version / 8
    )  # the true successor, also where the episode ended
    assert bool((batch["observation"][:, 1:][ended[:, :-1]] == 0).all())
    assert torch.equal(batch["episode"].diff(dim=1) != 0, ended[:, :-1])
    assert batch["behavior_log_prob"].shape == (width, 24, 2)
    assert bool((batch["discount"] == 0.9).all()) and batch["source"].dtype == torch.int64


def test_a_collector_that_writes_step_by_step_fills_it_as_well() -> None:
    replay = Replay(60, lanes=2, sampler=Segment(3))
    env = TransformedEnv(Counter(2), PolicyVersion(version_type="int"))
    module = TensorDictModule(Chooser(), in_keys=["observation"], out_keys=["action", "behavior_log_prob"])
    collector = Collector(env, module, frames_per_batch=8, total_frames=16, replay_buffer=replay, extend_buffer=False)
    for _ in collector:
        pass
    assert replay.write_count == 16
    assert replay.sample(5).batch_size == (5, 3)


def test_late_versions_and_incomplete_batches_are_refused() -> None:
    following = TensorDict(
        {
            "observation": torch.zeros(4, 2),
            "reward": torch.zeros(4, 1),
            "done": torch.zeros(4, 1, dtype=torch.bool),
            "terminated": torch.zeros(4, 1, dtype=torch.bool),
        },
        batch_size=[4],
    )
    batch = TensorDict(
        {"observation": torch.zeros(4, 2), "action": torch.zeros(4, 1), "next": following}, batch_size=[4]
    )
    assert from_collector(batch)["policy_version"].tolist() == [0] * 4
    with pytest.raises(RecordError, match="lags one step"):
        from_collector(batch.clone().set("policy_version", torch.zeros(4, 1, dtype=torch.int64)))
    with pytest.raises(RecordError, match="lacks 'reward' under 'next'"):
        from_collector(batch.exclude(("next", "reward")))
    with pytest.raises(RecordError, match="lacks 'terminated'"):
        from_collector(batch.exclude(("next", "terminated")))
    with pytest.raises(RecordError, match="no such key"):
        from_collector(batch.exclude("next"))


def test_the_rows_live_in_a_torchrl_storage() -> None:
    replay = Replay(8, sampler=Uniform())
    replay.extend({"x": torch.arange(5)})
    assert isinstance(replay.storage, LazyTensorStorage) and len(replay.storage) == 5
    assert replay.storage.get(slice(0, 5))["x"].tolist() == [0, 1, 2, 3, 4]
