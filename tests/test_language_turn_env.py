"""The TorchRL view of token tasks."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.envs.utils import check_env_specs

from unified_rl.envs.language import Calculator, ChainMod, Countdown, GuessNumber, LanguageTurnEnv


@pytest.mark.parametrize("task", [ChainMod, Countdown, Calculator, GuessNumber])
def test_specs_hold(task: type) -> None:
    check_env_specs(LanguageTurnEnv(task(), 3))


def answer(env: LanguageTurnEnv, texts: list[str]) -> torch.Tensor:
    """An action that says each text, then end of text, then garbage."""
    action = torch.full((len(texts), env.task.max_turn_tokens), 5)
    for row, ids in enumerate(env.task.codec.encode(texts)):  # type: ignore[attr-defined]
        action[row, : len(ids) + 1] = torch.tensor([*ids, env.task.tokenizer.eos_token_id])
    return action


def text(env: LanguageTurnEnv, td: TensorDictBase, row: int) -> str:
    return env.task.codec.decode(td["tokens"][row][td["token_mask"][row]].tolist())  # type: ignore[attr-defined]


def test_a_right_answer_ends_with_a_reward_and_garbage_after_it_is_ignored() -> None:
    env = LanguageTurnEnv(ChainMod(), 3, seed=1)
    td = env.reset()
    totals = [problem["totals"][-1] for problem in env._problems]
    td["action"] = answer(env, [f">{totals[0]}", f">{totals[1] + 10}", f">{totals[2]}"])
    td["action"][2] = 5  # no end of text: out of budget
    out = env.step(td)["next"]
    assert out["reward"].squeeze(-1).tolist() == [1.0, 0.0, 0.0]
    assert out["terminated"].squeeze(-1).tolist() == [True, True, False]
    assert out["truncated"].squeeze(-1).tolist() == [False, False, True]
    assert text(env, out, 0) == env._problems[0]["text"] + f">{totals[0]}"


def test_turns_go_on_with_the_environments_text_until_the_last() -> None:
    env = LanguageTurnEnv(Calculator(terms=2, spare_turns=0), 2, seed=0)
    td = env.reset()
    first, second = (text(env, td, row) for row in range(2))
    td["action"] = answer(env, ["C:3+8;", f"A:{env._problems[1]['value']};"])
    td = env.step(td)["next"]
    assert (text(env, td, 0), text(env, td, 1)) == (f"{first}C:3+8;R:11;", f"{second}A:{env._problems[1]['value']};")
    assert td["done"].squeeze(-1).tolist() == [False, True]
    td["_reset"] = td["done"]
    td = env.reset(td)
    assert text(env, td, 0) == f"{first}C:3+8;R:11;" and text(env, td, 1) == env._problems[1]["text"]
    td["action"] = answer(env, ["C:3+8;", "C:3+8;"])
    out = env.step(td)["next"]
    assert out["truncated"].squeeze(-1).tolist() == [True, False]


def test_seeds_repeat_problems() -> None:
    env = LanguageTurnEnv(ChainMod(), 4)
    env.set_seed(3)
    first = env.reset()["tokens"]
    second = env.reset()["tokens"]
    env.set_seed(3)
    assert torch.equal(env.reset()["tokens"], first) and not torch.equal(first, second)


def test_a_collector_runs_whole_conversations() -> None:
    env = LanguageTurnEnv(GuessNumber(size=4, limit=9), 4)
    stop, seven = env.task.stop_ids[-1], env.task.codec.encode(["7"])[0][0]  # type: ignore[attr-defined]

    def always_seven(tokens: torch.Tensor) -> torch.Tensor:
        return torch.tensor([seven] + [stop] * (env.task.max_turn_tokens - 1)).expand(len(tokens), -1)

    policy = TensorDictModule(always_seven, in_keys=["tokens"], out_keys=["action"])
    collector = Collector(env, policy, frames_per_batch=120, total_frames=240, auto_register_policy_transforms=False)
    batches = [batch.clone() for batch in collector]
    collector.shutdown()
    assert [tuple(batch.batch_size) for batch in batches] == [(4, 30)] * 2
    done = torch.cat([batch["next", "done"] for batch in batches], 1)
    reward = torch.cat([batch["next", "reward"] for batch in batches], 1)
    assert int(done.sum()) > 20 and bool((reward > 0).any())
    assert not bool((reward[~done] != 0).any())
