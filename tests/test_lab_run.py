"""The lab's command, tables, pictures and training runs."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from unified_rl import cli
from unified_rl.correction import load_correction
from unified_rl.errors import ConfigError
from unified_rl.returns import group_advantage
from unified_rl.study.lab import run, sweep, train
from unified_rl.study.lab.figures import winners
from unified_rl.study.lab.measure import BATCHES
from unified_rl.study.lab.plan import GROUP, ROW, SAMPLED_BATCH, SAMPLED_GROUP, Plan
from unified_rl.study.lab.policies import Policy, shared
from unified_rl.study.lab.problems import Problem, token_tree
from unified_rl.study.lab.train import Runs, Schedule, tuned
from unified_rl.study.lab.values import expected_return, row_probability, unit_log_prob


def one_run(problem: Problem, policy: Policy, plan: Plan, runs: Runs, index: int, lag: int, s: Schedule) -> float:
    """The same training of one run, a row at a time, by automatic differentiation through the parameters."""
    assert runs.rate is not None
    rate, column = float(runs.rate[index]), index % (2 * s.seeds)
    theta = policy.initial(0)
    past, ids = [theta], torch.arange(s.rows) // s.group
    for update in range(s.updates):
        behavior, proximal = policy.log_table(past[max(0, update - lag)]), policy.log_table(past[-1])
        edges = row_probability(problem, behavior).cumsum(0)
        rows = torch.tensor([int((edges < u).sum()) for u in runs.uniform[update, column]])
        batch = TensorDict(
            {
                "behavior_log_prob": unit_log_prob(problem, behavior)[rows],
                "proximal_log_prob": unit_log_prob(problem, proximal)[rows],
                "mask": problem.mask[rows],
                "step_index": torch.zeros_like(problem.action[rows]),
                "reward": problem.returns[rows, None],
                "advantage": group_advantage(problem.returns[rows], ids, **plan.correction.advantage),
                "group": ids,
            },
            batch_size=[s.rows],
        )
        for _ in range(s.inner):
            leaf = theta.clone().requires_grad_()
            log_prob = unit_log_prob(problem, policy.log_table(leaf))[rows]
            (gradient,) = torch.autograd.grad(plan.correction(log_prob, batch).loss, leaf)
            theta = theta - rate * gradient
        past.append(theta)
    return float(expected_return(problem, policy.log_table(theta)))


@pytest.mark.parametrize("route", [SAMPLED_GROUP, SAMPLED_BATCH])
@pytest.mark.parametrize("lag", [0, 2])
def test_runs_side_by_side_are_runs_one_by_one(lag: int, route: str) -> None:
    tree = token_tree(graded=True, vocabulary=3, horizon=3)
    policy, schedule = shared(tree), Schedule(updates=4, rows=16, group=4, seeds=1)
    correction = load_correction("decoupled_ppo", reduce="sequence-mean-token-sum")
    plan = Plan("decoupled_ppo", correction, "group", route, "")
    runs = Runs(plan, tree, policy, lag, schedule)
    found = runs.run().flatten()
    before = float(expected_return(tree, policy.log_table(policy.initial(0))))
    for index in (0, 5, 7):
        expected = one_run(tree, policy, plan, runs, index, lag, schedule)
        assert abs(expected - before) > 1e-3
        assert float(found[index]) == pytest.approx(expected, abs=1e-9)


def test_a_rate_is_chosen_on_half_of_the_seeds_and_reported_on_the_other() -> None:
    returns = torch.tensor([[0.1, 0.2, 0.9, 0.9], [0.5, 0.5, 0.3, 0.4], [0.4, 0.4, 0.8, 0.8]])
    best, reported = tuned(returns)
    assert best == 1 and reported.tolist() == pytest.approx([0.3, 0.4])


def test_the_rates_of_a_method_move_it_as_far_as_those_of_any_other() -> None:
    """GVPO is TBA over a constant, so with rates of their own the two train alike."""
    tree = token_tree(graded=True, vocabulary=3, horizon=3)
    policy, schedule, ends = shared(tree), Schedule(updates=3, rows=16, group=4, seeds=1), []
    for scale in (1.0, 50.0):
        correction = load_correction("gvpo", **{"kernel.scale": scale})
        ends.append(Runs(Plan("gvpo", correction, "own", SAMPLED_GROUP, ""), tree, policy, 1, schedule).run())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-12)


def test_equal_methods_train_equally_and_what_is_not_applicable_is_left_out() -> None:
    schedule = Schedule(updates=2, rows=16, seeds=1)
    found = train.train(["ppo", "rec_one_side", "troll"], schedule=schedule, lags=(1,))
    assert [row["correction"] for row in found] == ["ppo", "rec_one_side"]
    assert found[0]["return_after"] == found[1]["return_after"] != found[0]["return_before"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One setting, and training that ends soon."""
    monkeypatch.setattr(sweep, "SETTINGS", (("corridor", "critic"),))
    monkeypatch.setattr(train, "TRAIN_LAGS", (0, 1))
    monkeypatch.setattr(run, "Schedule", lambda seeds: Schedule(updates=2, rows=16, seeds=seeds))


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


@pytest.mark.usefixtures("small")
def test_the_command_writes_tables_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["lab", "--corrections", "sequence_is,ppo,nft,p3o", "--out", str(tmp_path / "out"), "--seeds", "2"]
    assert cli.main(argv) == 0
    rows = table(tmp_path / "out" / "estimators.csv")
    assert len(rows) == 4 * 2 * (1 + len(sweep.NOISE) + len(sweep.LAGS))
    how = {row["correction"]: row["how"] for row in rows}
    assert how == {"sequence_is": ROW, "ppo": ROW, "nft": "not applicable", "p3o": SAMPLED_BATCH}
    assert "0 or 1" in next(row["note"] for row in rows if row["correction"] == "nft")
    exact = [row for row in rows if row["correction"] == "sequence_is"]
    assert all(float(row["cosine"]) == 1 and float(row["cosine_se"]) == 0 for row in exact)
    assert all(float(row["cosine_se"]) > 0 for row in rows if row["correction"] == "p3o")
    assert {row["intended_bias"] for row in rows if row["correction"] == "ppo"} == {"trust region"}
    assert {row["winner"] for row in table(tmp_path / "out" / "winners.csv")} <= {"sequence_is", "ppo"}
    trained = table(tmp_path / "out" / "training.csv")
    assert {row["correction"] for row in trained} == {"sequence_is", "ppo", "nft", "p3o"} - {"nft"}
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert pictures == {
        "plane_corridor_tabular_critic.png", "plane_corridor_shared_critic.png", "winners_tabular.png",
        "winners_shared.png", "error_against_drift.png", "return_against_lag.png",
    }  # fmt: skip
    assert str(tmp_path / "out") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--corrections", "pppo"], "did you mean"),
        (["--corrections", "ppo", "--seeds", "0"], "--seeds 0"),
        (["--corrections", ","], "--corrections"),
    ],
)
def test_bad_input_is_one_clear_error_before_anything_is_computed(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(cli.DEBUG, raising=False)
    assert cli.main(["lab", *argv, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("unified-rl: ") and error.count("\n") == 1 and words in error
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_way_of_the_folder_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="out"):
        run.lab(["ppo"], out=tmp_path / "out", shown=False)


def row(name: str, error: float, how: str = GROUP) -> dict[str, Any]:
    fixed = {"problem": "p", "policy": "q", "advantage": "group", "drift": "lag", "amount": 4, "kl": 0.1, "cosine": 1.0}
    return {**fixed, "correction": name, "how": how, **{f"error_{n}": error for n in BATCHES}}


def test_winners_are_exact_and_ties_are_told() -> None:
    found = winners([row("ppo", 0.5), row("aaa", 0.2), row("bb", 0.2), row("p3o", 0.1, SAMPLED_BATCH)])
    assert {(cell["winner"], cell["tied"]) for cell in found} == {("bb", "aaa")}
    assert [cell["rows"] for cell in found] == list(BATCHES)
