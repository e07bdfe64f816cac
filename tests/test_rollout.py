"""Collected experience: stamps, discounts, final observations and episode ids; masks and rewards of conversations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.envs.control import TASKS, ActionChunk, BatchedMujocoEnv, TwoRouteEnv, make_mujoco
from unified_rl.envs.language import Calculator, ChainMod, GuessNumber
from unified_rl.envs.language.calculator import reductions
from unified_rl.errors import EnvError, NonFiniteError
from unified_rl.interop.guard import is_vouched
from unified_rl.policies.drawing import Draws, GaussianDraws, draws_of
from unified_rl.policies.gaussian import GaussianPolicy
from unified_rl.policies.generation import Generation
from unified_rl.rollout import ControlRollout, LanguageRollout, StepResult, converse

ENDS = (3, 5)  # lane 0 terminates after 3 steps, lane 1 is truncated after 5


class Counters:
    """Two simulations whose observation is (lane, time in the episode, number of the episode)."""

    domain = "control"
    num_envs = 2
    max_steps = 5

    def __init__(self, executed: int = 1) -> None:
        self.time, self.number, self.executed = torch.zeros(2), torch.zeros(2), executed

    def policy_inputs(self) -> dict[str, Any]:
        return {"observation_dim": 3, "action_dim": 2, "action_low": [-1.0, -3.0], "action_high": [1.0, 5.0]}

    def observe(self) -> Tensor:
        return torch.stack([torch.arange(2.0), self.time, self.number], -1)

    def reset_batch(self, seed: int | None = None) -> Tensor:
        return self.observe()

    def step_batch(self, action: Tensor) -> StepResult:
        self.time = self.time + 1
        after, ended = self.observe(), self.time == torch.tensor(ENDS)
        reward = self.time.clone()
        self.time = torch.where(ended, 0.0, self.time)
        self.number = self.number + ended
        lane = torch.arange(2)
        executed = torch.full((2,), self.executed)
        return StepResult(self.observe(), reward, ended & (lane == 0), ended & (lane == 1), after, executed, {})


class Still:
    """A policy that does nothing."""

    def sample(self, observation: Tensor, generator: Any = None, deterministic: bool = False) -> TensorDict:
        rows = len(observation)
        items = {"action": torch.zeros(rows, 2), "behavior_log_prob": torch.zeros(rows, 1)}
        return TensorDict(items, batch_size=[rows])


def control(env: Any, policy: Any, **options: Any) -> ControlRollout:
    return ControlRollout(env, policy, 0.9, torch.Generator().manual_seed(1), **options)


def test_transitions_keep_the_true_successor_across_resets() -> None:
    rows, metrics = control(Counters(), Still(), horizon=12).collect(version=7)
    assert rows.batch_size == (12, 2) and bool((rows["policy_version"] == 7).all())
    for lane, (length, flag) in enumerate(zip(ENDS, ("terminated", "truncated"), strict=True)):
        other = "truncated" if flag == "terminated" else "terminated"
        for t in range(12):
            row = rows[t, lane]
            assert row["observation"].tolist() == [lane, t % length, t // length]
            assert row["next_observation"].tolist() == [lane, t % length + 1, t // length]
            assert bool(row[flag]) == (t % length == length - 1) and not bool(row[other])
    # six episodes ended: four of return 1 + 2 + 3, two of return 1 + ... + 5
    assert metrics["rollout/return"] == pytest.approx((4 * 6 + 2 * 15) / 6)
    assert metrics["rollout/length"] == pytest.approx((4 * 3 + 2 * 5) / 6)


def test_episode_ids_are_unique_and_go_on_over_collections() -> None:
    rollout = control(Counters(), Still(), horizon=4)
    seen: dict[int, tuple[int, int]] = {}
    for version in range(6):
        rows, _ = rollout.collect(version)
        assert torch.equal(rows["group"], rows["episode"])
        assert bool((rows["policy_version"] == version).all())
        for episode, observation in zip(rows["episode"].flatten(), rows["observation"].flatten(0, 1), strict=True):
            place = (int(observation[0]), int(observation[2]))
            assert seen.setdefault(int(episode), place) == place
    assert len(seen) == len(set(seen.values())) == 8 + 5


def test_discount_is_gamma_to_the_executed_steps() -> None:
    rows, _ = control(Counters(executed=3), Still(), horizon=4).collect(0)
    torch.testing.assert_close(rows["discount"], torch.full((4, 2), 0.9**3))


def test_chunks_of_the_two_route_task_carry_the_discount_of_what_they_executed() -> None:
    env = TwoRouteEnv(num_envs=4, seed=0, chunk=4, max_steps=10)
    policy = GaussianPolicy(**env.policy_inputs())
    rows, _ = control(env, policy, horizon=6).collect(0)
    ended = rows["truncated"]
    assert bool(ended[2].all())  # ten inner steps: chunks of 4, 4 and 2
    torch.testing.assert_close(rows["discount"][2], torch.full((4,), 0.9**2))
    torch.testing.assert_close(rows["discount"][[0, 1]], torch.full((2, 4), 0.9**4))
    assert not bool((rows["next_observation"][2] == rows["observation"][3]).all())


def test_warm_up_actions_are_uniform_over_the_box_with_its_density() -> None:
    rollout = control(Counters(), Still(), horizon=600, random_steps=1000)
    rows, _ = rollout.collect(0)
    action, log_prob = rows["action"][:500], rows["behavior_log_prob"]
    torch.testing.assert_close(log_prob[:500], torch.full((500, 2, 1), -math.log(2.0 * 8.0)))
    flat = action.reshape(-1, 2)
    assert bool((flat >= torch.tensor([-1.0, -3.0])).all()) and bool((flat <= torch.tensor([1.0, 5.0])).all())
    torch.testing.assert_close(flat.mean(0), torch.tensor([0.0, 1.0]), atol=0.25, rtol=0.0)
    torch.testing.assert_close(flat.std(0), torch.tensor([2.0, 8.0]) / math.sqrt(12.0), atol=0.15, rtol=0.0)
    assert bool((rows["action"][500:] == 0).all()) and bool((log_prob[500:] == 0).all())


@pytest.mark.parametrize("name", ["observation", "reward", "action"])
def test_nan_names_the_tensor_the_simulation_and_the_step(name: str) -> None:
    env, policy = Counters(), Still()
    step, sample = env.step_batch, policy.sample

    def broken_step(action: Tensor) -> StepResult:
        result = step(action)
        if env.time[1] == 4 and name == "reward":
            result.reward[1] = math.nan
        if env.time[1] == 4 and name == "observation":
            result.next_observation[1, 2] = math.inf
        return result

    def broken_sample(observation: Tensor, generator: Any = None, deterministic: bool = False) -> TensorDict:
        out = sample(observation)
        if env.time[1] == 3 and name == "action":
            out["action"][1, 0] = math.nan
        return out

    env.step_batch, policy.sample = broken_step, broken_sample  # type: ignore[method-assign]
    where = "simulation 1, environment step 6" if name == "action" else "from step 4, simulation 1"
    with pytest.raises(NonFiniteError, match=rf"{name}.*{where}"):
        control(env, policy, horizon=12).collect(0)


# ---------------------------------------------------------------------------------------------------- conversations


class Scripted:
    """Says ``script(context text, sample number)``; the log-prob of the token in column n is ``-(n + 1) / 1000``."""

    device = torch.device("cpu")

    def __init__(self, env: Any, script: Callable[[str, int], str]) -> None:
        self.env, self.script = env, script

    def generate(
        self,
        prompts: Any,
        *,
        max_new_tokens: int,
        stop_ids: list[int],
        generator: Any,
        greedy: bool,
        samples_per_prompt: int,
    ) -> Generation:
        codec = self.env.codec
        said, starts = [], []
        for prompt in prompts:
            for number in range(samples_per_prompt):
                text = self.script(codec.decode(prompt.tolist()), number)
                end = [codec.eos_id] if text.endswith("$") else []
                said.append((codec.encode([text.rstrip("$")])[0] + end)[:max_new_tokens])
                starts.append(len(prompt))
        tokens = torch.full((len(said), max_new_tokens), codec.pad_id)
        log_prob = torch.zeros(len(said), max_new_tokens)
        for row, (ids, start) in enumerate(zip(said, starts, strict=True)):
            tokens[row, : len(ids)] = torch.tensor(ids)
            log_prob[row, : len(ids)] = -(torch.arange(len(ids)) + start + 1) / 1000
        finished = torch.tensor([ids[-1] in stop_ids for ids in said])
        return Generation(tokens, log_prob, torch.tensor([len(ids) for ids in said]), finished)


def text_of(env: Any, ids: Tensor) -> str:
    return env.codec.decode(ids.tolist())


def aligned(rows: TensorDict) -> None:
    """What every record owes: log-probs sit on sampled tokens only, in their own columns."""
    column = (torch.arange(rows["tokens"].shape[1]) + 1) / 1000
    torch.testing.assert_close(rows["behavior_log_prob"], torch.where(rows["mask"], -column, 0.0))
    assert not bool(rows["mask"][:, 0].any()) and not bool((rows["mask"] & ~rows["token_mask"]).any())
    assert bool((rows["step_index"].diff(dim=-1) >= 0).all())


def test_groups_of_one_turn_share_a_prompt_and_only_answers_are_masked_in() -> None:
    env = ChainMod(modulus=5, terms=3)
    value: dict[str, int] = {}

    def script(context: str, number: int) -> str:
        answer = value.setdefault(context, eval(context.rstrip("=")) % 5)
        return [f">{answer}$", f">{(answer + 1) % 5}$", "," * 99][number]

    streams = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    rollout = LanguageRollout(env, Scripted(env, script), 1.0, *streams, prompts=4, group_size=3)
    first, metrics = rollout.collect(version=5)
    second, _ = rollout.collect(version=6)
    aligned(first)
    assert first["reward"].squeeze(-1).tolist() == [1.0, 0.0, 0.0] * 4
    assert first["terminated"].squeeze(-1).tolist() == [True, True, False] * 4
    assert first["truncated"].squeeze(-1).tolist() == [False, False, True] * 4
    assert first["group"].tolist() == [g for g in range(4) for _ in range(3)]
    assert second["group"].tolist() == [g for g in range(4, 8) for _ in range(3)]
    assert len({*first["episode"].flatten().tolist(), *second["episode"].flatten().tolist()}) == 24
    assert bool((first["policy_version"] == 5).all()) and bool((second["policy_version"] == 6).all())
    for row in first:
        prompt = text_of(env, row["tokens"][~row["mask"] & row["token_mask"]])
        assert prompt in value  # the whole prompt and nothing else is masked out
    assert first["mask"].sum(-1).tolist() == [3, 3, env.max_turn_tokens] * 4
    assert metrics["rollout/truncated"] == pytest.approx(1 / 3)
    assert metrics["rollout/reward"] == metrics["rollout/correct"] == pytest.approx(1 / 3)
    assert metrics["rollout/length"] == pytest.approx((3 + 3 + env.max_turn_tokens) / 3)


def test_tool_replies_are_masked_out_and_rewards_land_on_the_turn_that_answers() -> None:
    env = Calculator(terms=3, max_number=9)
    problem = env.problems(1, torch.Generator().manual_seed(0))[0]
    calls = [f"C:{call};" for call, _ in reductions(problem["expression"])]
    replies = [f"R:{result};" for _, result in reductions(problem["expression"])]
    plans = [[*calls, f"A:{problem['value']};"], ["A:999;"], ["QQ;"] * 9, [calls[0], "C:1+1" * 9]]
    copies = [dict(problem, number=n) for n in range(4)]
    turns = [iter(plan) for plan in plans]

    class Planned(Scripted):
        """Conversations come in the order of the active rows; each goes on with its own plan."""

        def __init__(self) -> None:
            super().__init__(env, lambda context, number: "")
            self.active = list(range(4))

        def generate(self, prompts: Any, **options: Any) -> Generation:
            lines = iter([next(turns[row]) for row in self.active])
            self.script = lambda context, number: next(lines)
            out = super().generate(prompts, **options)
            self.active = [
                r for r, f, line in zip(self.active, out.finished, out.rows(), strict=True) if f and line[0] != answer
            ]
            return out

    answer = env.codec.encode(["A"])[0][0]
    talk, info = converse(env, Planned(), copies, None)
    width = env.max_turns
    assert info["correct"].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert talk.reward.tolist() == [[0, 0, 1.0] + [0] * (width - 3)] + [[0.0] * width] * 3
    assert talk.step_mask.sum(-1).tolist() == [3, 1, width, 2]
    assert talk.terminated.nonzero().tolist() == [[0, 2], [1, 0]]
    assert talk.truncated.nonzero().tolist() == [[2, width - 1], [3, 1]]
    prompt = problem["text"]
    for row, plan in enumerate(plans[:1]):
        tokens, mask = talk.tokens[row, : talk.length[row]], talk.mask[row, : talk.length[row]]
        assert text_of(env, tokens) == prompt + plan[0] + replies[0] + plan[1] + replies[1] + plan[2]
        assert text_of(env, tokens[mask]) == "".join(plan)
    assert text_of(env, talk.tokens[2, : talk.length[2]]) == prompt + "QQ;R:?;" * (width - 1) + "QQ;"
    for row in range(4):
        for turn, said in enumerate(talk.said[row]):
            here = talk.mask[row] & (talk.step_index[row] == turn)
            assert talk.tokens[row][here].tolist() == said
    torch.testing.assert_close(
        talk.log_prob, torch.where(talk.mask, -(torch.arange(talk.tokens.shape[1]) + 1) / 1000, 0.0)
    )


def test_a_late_hit_is_paid_on_its_turn_and_costs_what_the_task_says() -> None:
    env = GuessNumber(size=8, limit=20, turn_cost=0.1)

    def bisect(context: str, number: int) -> str:
        low, high = map(int, context.split(";")[0].split("-"))
        for guess, reply in zip(context.split(";")[1::2], context.split(";")[2::2], strict=False):
            low, high = (int(guess) + 1, high) if reply == "H" else (low, int(guess) - 1)
        return f"{(low + high) // 2};"

    streams = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    rollout = LanguageRollout(env, Scripted(env, bisect), 1.0, *streams, prompts=8, group_size=1)
    rows, metrics = rollout.collect(0)
    aligned(rows)
    used = rows["step_mask"].sum(-1)
    assert metrics["rollout/correct"] == 1.0 and int(used.max()) > 1
    for row, count in zip(rows, used.tolist(), strict=True):
        want = torch.zeros(env.max_turns)
        want[count - 1] = 1.0 - 0.1 * (count - 1)
        torch.testing.assert_close(row["reward"], want)
        assert row["terminated"].nonzero().flatten().tolist() == [count - 1] and not bool(row["truncated"].any())


KINDS: dict[str, dict[str, Any]] = {
    "free std": {},
    "standardised": {"normalize_observation": True},
    "tanh": {"squash": True, "state_dependent_std": True, "activation": "relu"},
    "per dimension": {"per_dimension": True, "activation": "silu"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_rollout_has_the_numbers_of_sample(kind: str) -> None:
    """Log-probs of a whole collection at once are the same bits."""
    env = make_mujoco("Pusher-v5", 3, seed=2)
    policy = GaussianPolicy(**env.policy_inputs(), **KINDS[kind])
    policy.update_normalizer(torch.randn(50, policy.observation_dim))
    assert type(draws_of(policy, torch.Generator())) is GaussianDraws
    collected_as_sampled(env, policy)


def collected_as_sampled(env: BatchedMujocoEnv, policy: GaussianPolicy) -> None:
    rows, _ = ControlRollout(env, policy, 0.9, torch.Generator().manual_seed(1), horizon=7).collect(0)
    stream = torch.Generator().manual_seed(1)
    for step in rows:
        told = policy.sample(step["observation"].clone(), generator=stream)  # products round by alignment
        assert set(told.keys()) <= set(rows.keys())
        assert all(torch.equal(step[key], told[key]) for key in told.keys())


def test_a_policy_that_samples_in_its_own_way_is_asked() -> None:
    class Timid(GaussianPolicy):
        def to_env(self, normalized: Tensor) -> Tensor:
            return 0.5 * super().to_env(normalized)

    class Twice(GaussianPolicy):
        def _drawn(self, mean: Tensor, log_std: Tensor, unit: Tensor) -> dict[str, Tensor]:
            return super()._drawn(mean, log_std, 2.0 * unit)

    env = make_mujoco("Pusher-v5", 2, seed=2)
    timid, twice, usual = (kind(**env.policy_inputs()) for kind in (Timid, Twice, GaussianPolicy))
    stream = torch.Generator()
    assert all(type(draws_of(one, stream)) is Draws for one in (timid, twice))
    assert type(draws_of(usual, stream)) is GaussianDraws
    usual.sample = timid.sample  # type: ignore[method-assign]
    assert type(draws_of(usual, stream)) is Draws
    for policy in (timid, twice, usual):
        collected_as_sampled(make_mujoco("Pusher-v5", 3, seed=2), policy)


def test_a_hook_on_a_layer_is_called_while_collecting() -> None:
    env, calls = make_mujoco("Pusher-v5", 2), []
    policy = GaussianPolicy(**env.policy_inputs())
    policy.head.register_forward_hook(lambda *_: calls.append(0))
    ControlRollout(env, policy, 0.9, torch.Generator(), horizon=3).collect(0)
    assert len(calls) == 3


def test_only_environments_without_foreign_code_are_vouched_for() -> None:
    class Mine(BatchedMujocoEnv):
        """Somebody's changes."""

    env = make_mujoco("Pusher-v5", 2)
    assert isinstance(env, BatchedMujocoEnv) and is_vouched(env)
    assert not is_vouched(Mine(env.task, 2)) and not is_vouched(Counters()) and not is_vouched(ActionChunk(env, 2))
    env.step_batch = env.step_batch  # type: ignore[method-assign]
    assert not is_vouched(env)


def test_an_action_of_the_wrong_width_is_one_error_of_a_vouched_environment_too() -> None:
    env = make_mujoco("Pusher-v5", 2)
    with pytest.raises(EnvError, match="BatchedMujocoEnv raised in step 1: ValueError"):
        ControlRollout(env, Still(), 0.9, torch.Generator(), horizon=2).collect(0)


def test_who_changes_how_simulations_advance_is_asked_in_every_step() -> None:
    class Slow(BatchedMujocoEnv):
        def advance(self, action: Tensor, running: Tensor | None = None) -> StepResult:
            return super().advance(0.0 * action, running)

    still, moved, watched = (
        kind(TASKS["HalfCheetah-v5"](), 2, seed=3) for kind in (Slow, BatchedMujocoEnv, BatchedMujocoEnv)
    )
    seen: list[Tensor] = []
    plain = watched.advance
    watched.advance = lambda action, running=None: (seen.append(action), plain(action, running))[1]  # type: ignore[method-assign]
    results = [env.step_batch(torch.ones(2, 6)) for env in (still, moved, watched)]
    assert not torch.equal(results[0].next_observation, results[1].next_observation)
    assert torch.equal(results[1].next_observation, results[2].next_observation) and len(seen) == 1
