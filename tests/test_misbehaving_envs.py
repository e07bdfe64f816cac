"""Environments of the user's that raise or return nonsense: one error names them, the step, and what is expected."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from unified_rl.envs.control import ActionChunk, GymnasiumEnv
from unified_rl.errors import ConfigError, EnvError, NonFiniteError, UnifiedRLError
from unified_rl.interop.deadline import deadline, seconds_of
from unified_rl.protocols import StepResult
from unified_rl.rollout import ControlRollout, TorchRLControlEnv, as_environment
from unified_rl.spaces import PolicyInputs, Space
from unified_rl.training.evaluation import evaluate_control

OBSERVATION = np.zeros(2, np.float32)


class Rogue(gymnasium.Env):
    """Behaves for two steps, then answers with what it was given; ``at=0`` answers so in reset."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, answer: Any, at: int = 3) -> None:
        self.answer, self.at, self.count = answer, at, 0

    def _bad(self) -> Any:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    def reset(self, *, seed=None, options=None):  # type: ignore[no-untyped-def]
        self.count = 0
        return (OBSERVATION, {}) if self.at else self._bad()

    def step(self, action):  # type: ignore[no-untyped-def]
        self.count += 1
        return self._bad() if self.count == self.at else (OBSERVATION, 1.0, False, False, {})


class Still:
    """Acts with zeros."""

    domain, device = "control", torch.device("cpu")

    def sample(self, observation: Any, generator: Any = None, deterministic: bool = False) -> TensorDict:
        rows = len(observation)
        return TensorDict({"action": torch.zeros(rows, 1), "behavior_log_prob": torch.zeros(rows, 1)}, [rows])


if "Rogue-v0" not in gymnasium.registry:
    gymnasium.register("Rogue-v0", entry_point=Rogue, max_episode_steps=6)


def answer(**changed: Any) -> tuple[Any, ...]:
    """A proper step, but for some of it."""
    proper = {"observation": OBSERVATION, "reward": 1.0, "terminated": False, "truncated": False, "info": {}}
    return tuple({**proper, **changed}.values())


STEPS: dict[str, tuple[Any, str]] = {
    "raises": (ValueError("joint 3\nis broken"), r"raised in step 3: ValueError: joint 3 is broken"),
    "asserts": (AssertionError(), r"raised in step 3: AssertionError"),
    "leaves": (SystemExit(3), r"raised in step 3: SystemExit: 3"),
    "returns nothing": (None, r"returned None \(NoneType\) from step 3; five are expected"),
    "four values": ((OBSERVATION, 1.0, False, {}), r"returned 4 values.* from step 3; five are expected: observation"),
    "six values": ((*answer(), 0), r"returned 6 values.* from step 3; five are expected"),
    "no observation": (answer(observation=None), r"observation=None .*array of shape 2 of real numbers is expected"),
    "text as observation": (answer(observation="north"), r"observation='north' \(str\) from step 3; an array of shape"),
    "a longer observation": (answer(observation=np.zeros(3)), r"observation=.*\(shape 3, float64\).*shape 2 of real"),
    "a matrix as observation": (answer(observation=np.zeros((2, 2))), r"shape 2x2, float64.*array of shape 2"),
    "a ragged observation": (answer(observation=[[1.0], [1.0, 2.0]]), r"observation=\[\[1.0\].*array of shape 2"),
    "complex observation": (answer(observation=np.zeros(2, complex)), r"complex128.*real numbers"),
    "objects as observation": (answer(observation=np.array([None, 1])), r"object.*real numbers"),
    "no reward": (answer(reward=None), r"reward=None \(NoneType\) from step 3; a number is expected.*without a reward"),
    "text as reward": (answer(reward="1"), r"reward='1' \(str\) from step 3; a number is expected"),
    "rewards": (answer(reward=np.ones(2)), r"reward=\[1.0, 1.0\] \(shape 2, float64\) from step 3; a number"),
    "a dict as reward": (answer(reward={"r": 1.0}), r"reward=.*a number is expected"),
    "no end": (answer(terminated=None), r"terminated=None .*from step 3; True or False is expected"),
    "text as end": (answer(truncated="no"), r"truncated='no' .*True or False is expected"),
    "a number as end": (answer(terminated=0.5), r"terminated=0.5 .*True or False is expected"),
    "info swapped with truncated": (answer(truncated={}, info=False), r"truncated=\{\} .*True or False is expected"),
    "no info": (answer(info=None), r"info=None .*a dict is expected"),
}
NAN = {
    "NaN observation": (answer(observation=np.full(2, np.nan)), r"Rogue-v0: the observation of simulation 0 .*step 3"),
    "infinite reward": (answer(reward=np.inf), r"Rogue-v0: the reward of simulation 0 .*step 3"),
    "NaN reward": (answer(reward=np.nan), r"Rogue-v0: the reward of simulation 0 .*step 3 of.*mend the environment"),
}
RESETS: dict[str, tuple[Any, str]] = {
    "raises": (OSError("no such port"), r"raised in reset: OSError: no such port"),
    "returns nothing": (None, r"returned None .*from reset; a tuple of an observation and a dict of infos"),
    "the observation alone": (OBSERVATION, r"returned \[0.0, 0.0\] \(shape 2, float32\) from reset; a tuple"),
    "no observation": ((None, {}), r"observation=None .*from reset; an array of shape 2"),
    "a longer observation": ((np.zeros(3), {}), r"observation=.*from reset; an array of shape 2"),
    "text": (("start", {}), r"observation='start' .*from reset"),
    "no info": ((OBSERVATION, None), r"info=None .*from reset; a dict is expected"),
}


def collect(env: Any) -> None:
    ControlRollout(env, Still(), 0.99, torch.Generator(), horizon=8).collect(0)


def evaluate(env: Any) -> None:
    evaluate_control(env, Still(), 0, torch.Generator())


@pytest.mark.filterwarnings("ignore")  # Gymnasium's own checker warns as well
@pytest.mark.parametrize("play", [collect, evaluate])
@pytest.mark.parametrize("kind", [*STEPS, *NAN])
def test_a_bad_step_is_one_line(kind: str, play: Any) -> None:
    given, words = {**STEPS, **NAN}[kind]
    env = GymnasiumEnv("Rogue-v0", num_envs=1, make_kwargs={"answer": given})
    with pytest.raises(EnvError if kind in STEPS else NonFiniteError, match=words) as caught:
        play(env)
    assert "Rogue-v0" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", RESETS)
def test_a_bad_reset_is_one_line(kind: str) -> None:
    given, words = RESETS[kind]
    with pytest.raises(EnvError, match=words) as caught:
        GymnasiumEnv("Rogue-v0", num_envs=1, make_kwargs={"answer": given, "at": 0})
    assert str(caught.value).startswith("Rogue-v0 (simulation 0) ") and "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_odd_but_meant_answers_are_taken() -> None:
    meant = answer(observation=[0, 1], reward=np.array([2]), terminated=np.bool_(True), truncated=0, info={"x": "y"})
    env = GymnasiumEnv("Rogue-v0", num_envs=1, make_kwargs={"answer": meant})
    for _ in range(2):
        env.step_batch(torch.zeros(1, 1))
    step = env.step_batch(torch.zeros(1, 1))
    assert step.next_observation.tolist() == [[0.0, 1.0]] and step.reward.tolist() == [2.0]
    assert step.terminated.tolist() == [True] and step.truncated.tolist() == [False] and step.info == {}


@pytest.mark.parametrize("error", [RuntimeError("no licence"), KeyError("mass"), SystemExit("bye"), AttributeError()])
def test_a_constructor_that_fails_is_one_line(error: BaseException) -> None:
    def fail() -> None:
        raise error

    gymnasium.register("Stillborn-v0", entry_point=fail, max_episode_steps=3)
    try:
        with pytest.raises(ConfigError, match=rf"^Stillborn-v0 could not be made: {type(error).__name__}"):
            GymnasiumEnv("Stillborn-v0")
    finally:
        del gymnasium.registry["Stillborn-v0"]


# ------------------------------------------------------------------------------------------------------- TorchRL


class Wild(EnvBase):
    """Answers its third step, or its reset (``at=0``), with changed entries; an exception is raised."""

    def __init__(self, changed: Any, at: int = 3) -> None:
        super().__init__(device="cpu", batch_size=[])
        self.observation_spec = Composite(observation=Unbounded((2,)))
        self.action_spec = Bounded(-1, 1, (1,))
        self.reward_spec = Unbounded((1,))
        flags = {key: Categorical(2, shape=(1,), dtype=torch.bool) for key in ("done", "terminated", "truncated")}
        self.done_spec = Composite(flags)
        self.changed, self.at, self.count = changed, at, 0

    def _answer(self, proper: dict[str, Any]) -> Any:
        if self.count != self.at:
            return TensorDict(proper, [])
        if isinstance(self.changed, BaseException):
            raise self.changed
        if not isinstance(self.changed, dict):
            return self.changed
        return TensorDict({k: v for k, v in {**proper, **self.changed}.items() if v is not None}, [])

    def _reset(self, tensordict: Any = None, **kwargs: Any) -> Any:
        self.count = 0
        return self._answer({"observation": torch.zeros(2)})

    def _step(self, tensordict: Any) -> Any:
        self.count += 1
        no = torch.zeros(1, dtype=torch.bool)
        proper = {"observation": torch.zeros(2), "reward": torch.ones(1), "terminated": no, "truncated": no}
        return self._answer({**proper, "done": torch.tensor([self.count >= 6])})

    def _set_seed(self, seed: int | None) -> None:
        """No streams."""


WILD: dict[str, Any] = {
    "raises": ValueError("gripper\nlost"),
    "leaves": SystemExit(1),
    "nothing": None,
    "text": "north",
    "no reward": {"reward": None},
    "rewards": {"reward": torch.ones(3)},
    "complex reward": {"reward": torch.ones(1, dtype=torch.complex64)},
    "no observation": {"observation": None},
    "a longer observation": {"observation": torch.zeros(3)},
    "flags": {"terminated": torch.zeros(2, dtype=torch.bool)},
    "NaN reward": {"reward": torch.tensor([torch.nan])},
    "infinite observation": {"observation": torch.tensor([0.0, torch.inf])},
}


@pytest.mark.parametrize("play", [collect, evaluate])
@pytest.mark.parametrize("kind", WILD)
def test_a_torchrl_environment_is_named_with_its_step(kind: str, play: Any) -> None:
    with pytest.raises((EnvError, NonFiniteError), match=r"^Wild (raised in|returned).*step 3") as caught:
        play(TorchRLControlEnv(Wild(WILD[kind])))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["raises", "nothing", "no observation", "a longer observation"])
def test_a_torchrl_reset_is_named(kind: str) -> None:
    with pytest.raises(EnvError, match=r"^Wild (raised in|returned).*reset"):
        collect(TorchRLControlEnv(Wild(WILD[kind], at=0)))


def test_steps_of_a_torchrl_environment_count_from_its_reset() -> None:
    env = TorchRLControlEnv(Wild(ValueError("slip")))
    env.reset_batch()
    env.step_batch(torch.zeros(1, 1))
    with pytest.raises(EnvError, match=r"^Wild raised in step 3: ValueError: slip"):
        evaluate(env)


# ---------------------------------------------------------------------------------------------- our own protocol


class Loose:
    """A control environment of the user's, each of whose steps has one entry replaced."""

    domain, num_envs, max_steps = "control", 2, 5

    def __init__(self, **changed: Any) -> None:
        self.changed = changed

    def policy_inputs(self) -> dict[str, Any]:
        return PolicyInputs(Space.flat(2, 1, [-1.0], [1.0]))

    def reset_batch(self, seed: int | None = None) -> Any:
        return self.changed.get("reset", torch.zeros(2, 2))

    def step_batch(self, action: Any) -> Any:
        no = torch.zeros(2, dtype=torch.bool)
        proper = StepResult(
            torch.zeros(2, 2), torch.ones(2), no, no, torch.zeros(2, 2), torch.ones(2, dtype=torch.int64), {}
        )
        fields = {key: value for key, value in self.changed.items() if key not in ("reset", "step")}
        return self.changed.get("step", proper._replace(**fields))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


@pytest.mark.parametrize("play", [collect, evaluate])
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"reset": None}, r"observation=None .*from reset; a tensor \[2, d\] of float32"),
        ({"reset": torch.zeros(3, 2)}, r"shape 3x2, float32.*from reset"),
        ({"step": (1, 2)}, r"returned \(1, 2\) \(tuple\) from step 1; a StepResult"),
        ({"reward": None}, r"reward=None .*from step 1; a tensor \[2\] of float32"),
        ({"reward": torch.ones(2, 1)}, r"shape 2x1, float32"),
        ({"terminated": torch.zeros(2)}, r"terminated=.*a tensor \[2\] of bool"),
        ({"observation": np.zeros((2, 2))}, r"observation=.*tensor \[2, d\]"),
        ({"info": None}, r"info=None"),
        ({"reward": torch.tensor([0.0, torch.nan])}, r"reward=nan .*simulation 1"),
    ],
)
def test_an_environment_of_ones_own_protocol_is_checked(changed: Any, words: str, play: Any) -> None:
    with pytest.raises(UnifiedRLError, match=rf"^Loose .*{words}"):
        play(Loose(**changed))


# ------------------------------------------------------------------------------------------------------------- hangs


class Sleeper(Rogue):
    """Never returns from its third step."""

    def _bad(self) -> Any:
        time.sleep(60)


class WildSleeper(Wild):
    """Likewise, as TorchRL has it."""

    step_seconds = 0.2

    def _answer(self, proper: dict[str, Any]) -> Any:
        if self.count == self.at:
            time.sleep(60)
        return super()._answer(proper)


class LooseSleeper(Loose):
    """Likewise, in the library's own protocol."""

    def __init__(self, step_seconds: float | None) -> None:
        super().__init__()
        self.step_seconds, self.count = step_seconds, 0

    def step_batch(self, action: Any) -> Any:
        self.count += 1
        time.sleep(60 if self.count == 3 else 0)
        return super().step_batch(action)


if "Sleeper-v0" not in gymnasium.registry:
    gymnasium.register("Sleeper-v0", entry_point=Sleeper, max_episode_steps=6)
SLEEPERS: dict[str, Any] = {
    "Sleeper-v0": lambda: GymnasiumEnv("Sleeper-v0", make_kwargs={"answer": None}, step_seconds=0.2),
    "WildSleeper": lambda: TorchRLControlEnv(WildSleeper({})),
    "LooseSleeper": lambda: LooseSleeper(0.2),
    "ActionChunk": lambda: ActionChunk(SLEEPERS["Sleeper-v0"](), horizon=2),
}


@pytest.mark.parametrize("name", SLEEPERS)
@pytest.mark.parametrize("play", [collect, evaluate])
def test_a_step_that_does_not_return_is_given_up(name: str, play: Any) -> None:
    env, wide = SLEEPERS[name](), Still()
    if name == "ActionChunk":
        assert env.step_seconds == 0.4
        zeros = {"action": torch.zeros(1, 2), "behavior_log_prob": torch.zeros(1, 1)}
        wide.sample = lambda *_, **__: TensorDict(zeros, [1])  # type: ignore[method-assign, assignment]
    with pytest.raises(EnvError, match=r"raised in step \d.*TimeoutError: it has not returned after 0\.[24] s"):
        if play is evaluate:
            evaluate_control(env, wide, 0, torch.Generator())
        else:
            ControlRollout(env, wide, 0.99, torch.Generator(), horizon=8).collect(0)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_time_limits_can_be_off_and_leave_other_timers_alone() -> None:
    assert seconds_of(Loose()) == 600 and seconds_of(LooseSleeper(None)) is None
    with deadline(None):
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    before = signal.getsignal(signal.SIGALRM)
    signal.setitimer(signal.ITIMER_REAL, 50)
    try:
        with deadline(0.01):
            time.sleep(0.05)
        assert 40 < signal.getitimer(signal.ITIMER_REAL)[0] < 50 and signal.getsignal(signal.SIGALRM) is before
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    with ThreadPoolExecutor(1) as pool, deadline(5):
        pool.submit(lambda: deadline(0.01).__enter__()).result()


def test_new_episodes_of_a_continued_rollout_are_checked_and_counted_anew() -> None:
    state, rollout = (
        {"next_episode": 2, "steps": 9},
        ControlRollout(Loose(reward=None), Still(), 0.99, torch.Generator()),
    )
    for _ in range(2):
        with pytest.raises(EnvError, match=r"reward=None .*from step 1;"):
            rollout.collect(0)
        rollout.restart(state, 5)
    rollout.env.changed["reset"] = None
    with pytest.raises(EnvError, match=r"^Loose returned observation=None .*from reset"):
        rollout.restart(state, 5)


def test_a_gymnasium_object_is_told_how_it_is_named() -> None:
    with pytest.raises(ConfigError, match=r"Rogue is a Gymnasium environment.*env=gymnasium.*--allow"):
        as_environment(Rogue(None))


# --------------------------------------------------------------------------------------- stepping some, and infos


class Told(gymnasium.Env):
    """Reward 1; terminates after the number of steps that its seed gives, and tells it."""

    observation_space = gymnasium.spaces.Box(-1, 100, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):  # type: ignore[no-untyped-def]
        super().reset(seed=seed)
        self.length, self.count = int(self.np_random.integers(1, 8)), 0
        return np.array([self.length], np.float32), {}

    def step(self, action):  # type: ignore[no-untyped-def]
        self.count += 1
        over = self.count >= self.length
        info = {"is_success": self.length > 3, "distance": np.float64(self.length), "note": "text", "return": -5.0}
        return np.array([self.length], np.float32), 1.0, over, False, {**info, "count": np.array([self.count])}


if "Told-v0" not in gymnasium.registry:
    gymnasium.register("Told-v0", entry_point=Told, max_episode_steps=20)


def test_copies_that_stand_still_are_not_stepped() -> None:
    env = GymnasiumEnv("Told-v0", num_envs=3, seed=3)
    before = env.reset_batch(0)
    step = env.advance(torch.zeros(3, 1), torch.tensor([True, False, True]))
    assert step.executed.tolist() == step.reward.tolist() == [1, 0, 1] == [len(played) for played in env._played]
    assert torch.equal(step.observation, before) and not bool(step.terminated[1])


class Scribbler(gymnasium.Env):
    """Observes the sum of its actions, and writes to them."""

    observation_space = gymnasium.spaces.Box(-9, 9, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):  # type: ignore[no-untyped-def]
        self.total = np.zeros(1, np.float32)
        return self.total.copy(), {}

    def step(self, action):  # type: ignore[no-untyped-def]
        self.total += action
        action *= 0
        return self.total.copy(), 0.0, False, False, {}


def test_an_environment_that_writes_to_its_action_is_still_put_back() -> None:
    gymnasium.register("Scribbler-v0", entry_point=Scribbler, max_episode_steps=9)
    first, second = GymnasiumEnv("Scribbler-v0"), GymnasiumEnv("Scribbler-v0")
    del gymnasium.registry["Scribbler-v0"]
    first.reset_batch(0)
    first.step_batch(torch.full((1, 1), 0.5))
    second.load_state_dict(first.state_dict())
    assert second.current_observation().tolist() == [[0.5]]


@pytest.mark.parametrize("horizon", [2, 3, 10])
def test_chunks_of_any_length_over_copies_that_end_apart(horizon: int) -> None:
    env = ActionChunk(GymnasiumEnv("Told-v0", num_envs=8, seed=3), horizon, gamma=0.5)
    for _ in range(6):
        left = env.inner.current_observation()[:, 0] - torch.tensor([len(p) for p in env.inner._played])
        step = env.step_batch(torch.zeros(8, horizon))
        executed = left.clamp(max=horizon)
        assert step.executed.tolist() == executed.tolist() == step.plain_reward.tolist()
        assert step.reward.tolist() == [2 - 2 * 0.5**h for h in executed.tolist()], "1 + 1/2 + 1/4 ..."
        assert step.terminated.tolist() == (left <= horizon).tolist()


def test_infos_and_means_are_of_all_episodes() -> None:
    env = GymnasiumEnv("Told-v0", num_envs=3, seed=1)
    rows, metrics = ControlRollout(env, Still(), 0.99, torch.Generator(), horizon=60).collect(0)
    lengths = rows["observation"][..., 0][rows["terminated"]]
    assert metrics["rollout/episodes"] == len(lengths) > 20
    assert metrics["rollout/return"] == pytest.approx(float(lengths.mean()))
    assert metrics["rollout/length"] == metrics["rollout/distance"] == metrics["rollout/count"]
    assert (
        metrics["rollout/success"]
        == metrics["rollout/is_success"]
        == pytest.approx(float((lengths > 3).float().mean()))
    )
    assert "rollout/note" not in metrics


@pytest.mark.parametrize("copies", [1, 3, 16, 64])
def test_evaluation_plays_as_many_episodes_as_asked_whatever_the_copies(copies: int) -> None:
    env = GymnasiumEnv("Told-v0", num_envs=copies, seed=1)
    metrics = evaluate_control(env, Still(), 7, torch.Generator(), episodes=40)
    assert metrics["eval/return"] == metrics["eval/length"] == metrics["eval/score"] == metrics["eval/distance"]
    firsts = _first_episodes(copies, 40)
    assert metrics["eval/length"] == pytest.approx(sum(firsts) / 40)
    assert metrics["eval/success"] == pytest.approx(sum(n > 3 for n in firsts) / 40)


def test_evaluation_in_chunks_adds_plain_rewards_and_counts_environment_steps() -> None:
    class StillPlans(Still):
        def sample(self, observation: Any, generator: Any = None, deterministic: bool = False) -> TensorDict:
            return TensorDict({"action": torch.zeros(len(observation), 3)}, [len(observation)])

    env = ActionChunk(GymnasiumEnv("Told-v0", num_envs=16), 3, gamma=0.5)
    metrics = evaluate_control(env, StillPlans(), 7, torch.Generator())
    assert metrics["eval/return"] == metrics["eval/length"] == metrics["eval/distance"]
    assert metrics["eval/length"] == pytest.approx(sum(_first_episodes(16, 16)) / 16)


def test_an_episode_that_is_given_up_tells_what_it_told_last_and_others_nothing() -> None:
    """The first simulation ends at once and tells nothing; the second never ends, and tells from its third step on."""

    class Endless(Loose):
        count = 0

        def step_batch(self, action: Any) -> Any:
            self.count += 1
            over = torch.tensor([self.count == 1, False])
            told = {"level": torch.full((2,), float(self.count))} if self.count >= 3 else {}
            return super().step_batch(action)._replace(terminated=over, info=told)

    metrics = evaluate_control(Endless(), Still(), 0, torch.Generator())
    assert metrics["eval/level"] == 5.0 and metrics["eval/length"] == 3.0


def _first_episodes(copies: int, count: int) -> list[int]:
    """Lengths of the first episode of each copy and round, played by hand."""
    env = GymnasiumEnv("Told-v0", num_envs=copies)
    found: list[int] = []
    observation = env.reset_batch(7)
    while len(found) < count:
        found += observation[:, 0].int().tolist()
        for _ in range(int(observation.max())):
            step = env.step_batch(torch.zeros(copies, 1))
        observation = step.observation if copies == 1 else env.reset_batch()  # which has begun already
    return found[:count]


def test_a_torchrl_environment_without_a_batch_plays_every_episode_and_tells_its_success() -> None:
    class Goal(Wild):
        def _step(self, tensordict: Any) -> Any:
            out = super()._step(tensordict)
            out["return"] = torch.tensor([-9.0])
            return out.set("is_success", (torch.rand(1, generator=self.stream) < 0.5))

        def _set_seed(self, seed: int | None) -> None:
            self.stream = torch.Generator().manual_seed(int(seed or 0))

    metrics = evaluate_control(TorchRLControlEnv(Goal({}, at=-1)), Still(), 3, torch.Generator(), episodes=12)
    stream = torch.Generator().manual_seed(3)
    want = [float(torch.cat([torch.rand(1, generator=stream) for _ in range(6)])[-1] < 0.5) for _ in range(12)]
    assert metrics["eval/length"] == 6.0 and metrics["eval/return"] == 6.0
    assert metrics["eval/success"] == metrics["eval/is_success"] == pytest.approx(sum(want) / 12)
    assert 0 < sum(want) < 12 and "eval/done" not in metrics
