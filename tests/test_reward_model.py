"""Reward models: their losses by hand, what they learn, how they reward, and what they do not take."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from agent_cases import HORIZON, LANES, control_agent, filled, gaussian, transitions
from run_cases import ALLOW, CONTROL, LANGUAGE, cached, composed, merged, trained
from tensordict import TensorDict
from term_cases import agent_of, joined

from unified_rl.agents.learnt_reward import Learnt, inner_products
from unified_rl.agents.modelled_reward import preferred
from unified_rl.agents.policy_gradient import PolicyGradient
from unified_rl.agents.reward_model import make_reward_model
from unified_rl.errors import ConfigError, UnifiedRLError
from unified_rl.objectives.reward_losses import BradleyTerry, Fit, PlackettLuce, WestOfN
from unified_rl.policies.reward_model import Coverage, ReversedModel, RewardModel, placed, reversed_rows
from unified_rl.training.checkpoint import intact_checkpoint
from unified_rl.training.run import Job, train
from unified_rl.units import record_from_steps

GROUP = torch.tensor([0, 0, 0, 1, 1, 2, 2])
ORDER = torch.tensor([3.0, 1.0, 2.0, 0.0, 1.0, 5.0, 5.0])
SCORE = torch.tensor([0.5, 0.1, -0.3, 0.2, 0.9, 1.0, 2.0])


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def control_rows(policy: Any) -> TensorDict:
    """``[LANES]`` windows of :func:`transitions`."""
    rows = record_from_steps(transitions(policy).transpose(0, 1).contiguous())
    rows["step_mask"][0, -3:] = False
    return rows


# ---------------------------------------------------------------------------------------------- losses


def test_bradley_terry_by_hand() -> None:
    found = BradleyTerry(margin=0.25)(SCORE, ORDER, GROUP)
    assert [found.better.tolist(), found.worse.tolist()] == [[0, 4], [1, 3]]  # the third group holds no better row
    torch.testing.assert_close(found.value, torch.tensor([softplus(-0.4 + 0.25), softplus(-0.7 + 0.25)]))
    assert BradleyTerry(pairs="every_pair")(SCORE, ORDER, GROUP).better.tolist() == [0, 0, 2, 4]


def test_a_ranking_is_chosen_from_the_best_on() -> None:
    found = PlackettLuce()(SCORE, ORDER, GROUP)
    e = [math.exp(float(s)) for s in SCORE]
    first = math.log(e[0] + e[1] + e[2]) - 0.5 + math.log(e[2] + e[1]) + 0.3
    torch.testing.assert_close(found.value, torch.tensor([first, softplus(0.2 - 0.9)]))
    assert found.better.tolist() == [0, 0, 2, 4] and found.at.tolist() == [0, 0, 0, 1]


def test_a_ranking_of_two_is_a_pair_and_what_all_share_says_nothing() -> None:
    two = slice(3, None)
    ranked, paired = (loss(SCORE[two], ORDER[two], GROUP[two]).value for loss in (PlackettLuce(), BradleyTerry()))
    torch.testing.assert_close(ranked, paired)
    torch.testing.assert_close(
        PlackettLuce()(SCORE + 7.0, ORDER, GROUP).value, PlackettLuce()(SCORE, ORDER, GROUP).value
    )


def test_equally_good_rows_are_not_ranked_against_each_other() -> None:
    found = PlackettLuce()(torch.tensor([1.0, 2.0, 0.5]), torch.tensor([1.0, 1.0, 0.0]), torch.zeros(3).long())
    torch.testing.assert_close(found.value, torch.tensor([softplus(-0.5) + softplus(-1.5)]))


def test_unjudged_groups_are_labelled_by_the_model_where_it_is_sure() -> None:
    rows = slice(0, 5)
    order = -ORDER[rows]  # whoever judges thinks the opposite of the model
    found = WestOfN(labelled=0.5, confidence=0.6)(SCORE[rows], order, GROUP[rows])
    assert [found.better.tolist(), found.worse.tolist()] == [[1, 4], [0, 3]]  # sigmoid(0.7) = 0.67
    unsure = WestOfN(labelled=0.5, confidence=0.7)(SCORE[rows], order, GROUP[rows])
    assert unsure.better.tolist() == [1]
    one = WestOfN(labelled=0.5)(SCORE[rows] * 0, order, GROUP[rows] * 0)  # of a single group
    assert len(one.better) == 1
    least = WestOfN(labelled=0.01, confidence=0.5)(SCORE[rows], order, GROUP[rows])  # one group is judged all the same
    assert [least.better.tolist(), least.worse.tolist()] == [[1, 4], [0, 3]]


def test_two_equal_policies_cost_log_2() -> None:
    found = BradleyTerry(pairs="every_pair")(torch.zeros(4), torch.tensor([2.0, 0, 0, 2]), torch.zeros(4).long())
    torch.testing.assert_close(found.value, torch.full((4,), math.log(2.0)))


def test_a_row_is_preferred_to_the_others_of_its_group() -> None:
    score, group = torch.tensor([1.0, 0.0, 3.0, 2.0]), torch.tensor([0, 0, 1, 2])
    win = 1 / (1 + math.exp(-1.0))
    torch.testing.assert_close(preferred(score, group), torch.tensor([win, 1 - win, 0.5, 0.5]))
    assert preferred(torch.zeros(3), torch.zeros(3).long()).tolist() == [0.5, 0.5, 0.5]
    three = preferred(torch.tensor([0.3, -1.0, 0.8]), torch.zeros(3).long()) - 0.5
    assert float(three.sum()) == pytest.approx(0.0, abs=1e-6)


def test_an_episodes_score_stands_in_equal_parts_at_its_steps_and_an_answers_at_its_last_turn() -> None:
    rows = TensorDict({"step_mask": torch.tensor([[True, True, False], [True, True, True]])}, batch_size=[2])
    score = torch.tensor([6.0, 3.0])
    assert placed(score, rows).tolist() == [[3.0, 3.0, 0.0], [1.0, 1.0, 1.0]]
    assert placed(score, rows.set("tokens", torch.zeros(2, 5))).tolist() == [[0.0, 6.0, 0.0], [0.0, 0.0, 3.0]]


def test_the_radius_of_what_is_known_by_hand() -> None:
    known = Coverage(2, ridge=0.5)
    known.observe(torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.0]]))
    # mean gap outer product (4 + 1) / 2 in the first direction, mean feature (0.75, 0), two comparisons
    found = known.radius(torch.tensor([[1.75, 0.0], [0.75, 1.0], [0.75, 0.0]]))
    wanted = [math.sqrt(1 / 3.0 / 2), math.sqrt(1 / 0.5 / 2), 0.0]
    torch.testing.assert_close(found, torch.tensor(wanted))
    for _ in range(99):
        known.observe(torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(known.radius(torch.tensor([[0.75, 1.0]])), torch.tensor([math.sqrt(1 / 0.5 / 200)]))


def test_what_a_row_does_to_the_next_comparisons_is_a_product_of_gradients() -> None:
    policy = gaussian().double()
    rows = control_rows(gaussian()).apply(lambda x: x.double() if x.is_floating_point() else x)
    share = torch.tensor([0.3, -1.0, 0.2, 0.5]).double()
    weights = list(policy.parameters())
    before = [w.detach().clone() for w in weights]

    def score(some: TensorDict) -> torch.Tensor:
        return torch.where(some["mask"], policy.log_prob(some).log_prob, 0.0).sum(-1)

    found = inner_products(score, [rows], weights, share, step=1e-4)
    torch.testing.assert_close(inner_products(score, rows.split(3), weights, share, step=1e-4), found)
    each = [
        torch.cat([g.flatten() for g in torch.autograd.grad(s, weights, retain_graph=True)])
        for s in score(rows).unbind()
    ]
    along = sum(x * g for x, g in zip(share, each, strict=True))
    torch.testing.assert_close(found, torch.stack([g @ along for g in each]), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


def test_a_row_of_a_ranking_takes_part_in_its_loss_once() -> None:
    policy, rows = joined()
    few = rows[:3]
    model = make_reward_model({"name": "learnt", "loss": "plackett_luce", "dependence": 1.0})
    model.attach(policy, 0)
    assert isinstance(model, Learnt)
    value = torch.tensor([3.0])  # of one group, in which the first two are better than the last, as three pairs say
    pairs = Fit(value, torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2]), torch.zeros(3, dtype=torch.int64))
    assert float(model.lookahead(few, pairs).abs().max()) < 1e-5  # all take part in the same: nothing to prefer
    some = Fit(value, torch.tensor([0]), torch.tensor([1]), torch.zeros(1, dtype=torch.int64))
    assert float(model.lookahead(few, some).abs().max()) > 1e-3
    ranked = Fit(value, torch.tensor([0, 0]), torch.tensor([1, 2]), torch.zeros(2, dtype=torch.int64))
    assert float(model.lookahead(few, ranked).abs().max()) < 1e-5  # the best row is in two pairs, and one loss


def test_looking_ahead_takes_a_micro_batch_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, rows = joined()
    model = make_reward_model({"name": "learnt", "dependence": 1.0})
    model.attach(policy, 0)
    assert isinstance(model, Learnt)
    pairs = Fit(torch.tensor([3.0, 1.0]), torch.tensor([0, 7]), torch.tensor([1, 9]), torch.arange(2))
    whole, widths, plain = model.lookahead(rows, pairs), [], policy.log_prob
    monkeypatch.setattr(policy, "log_prob", lambda part: (widths.append(len(part)), plain(part))[1])
    model.micro_batch = 5
    torch.testing.assert_close(model.lookahead(rows, pairs), whole, atol=1e-3, rtol=1e-3)
    assert widths == [5, 5, 2] * 3 and float(whole.abs().max()) > 1e-3


# ---------------------------------------------------------------------------------------------- models


def test_rewards_stand_where_an_answer_ends_and_on_every_step_of_an_episode() -> None:
    policy, rows = joined()
    model = RewardModel(policy)
    torch.nn.init.ones_(model.head.weight)
    with torch.no_grad():
        reward = model(rows)
    torch.testing.assert_close(reward.sum(-1), model.scores(rows))
    cut = rows.clone()  # what lies behind a row's end is not read
    cut["tokens"] = torch.where(cut["token_mask"], cut["tokens"], 3)
    torch.testing.assert_close(model(cut), reward)
    two = TensorDict({"tokens": torch.zeros(2, 4), "step_mask": torch.tensor([[True, True, False], [True] * 3])})
    assert placed(torch.tensor([1.0, 2.0]), two).tolist() == [[0, 1, 0], [0, 0, 2]]
    acts = gaussian()
    rows = control_rows(acts)
    model = RewardModel(acts, (8,), seed=1)
    torch.nn.init.ones_(model.head.weight)
    torch.testing.assert_close(model(rows).sum(-1), model.scores(rows))
    reward = model(rows).detach()
    assert float(reward[0, -3:].abs().max()) == 0.0 and float(reward[:, :5].abs().min()) > 0.0


def test_reversing_twice_is_the_identity_and_the_prompt_comes_last() -> None:
    _, rows = joined()
    back = reversed_rows(rows)
    length, prompt = rows["token_mask"].sum(-1), (rows["mask"].cumsum(-1) == 0).sum(-1)
    for row, (n, p) in enumerate(zip(length.tolist(), prompt.tolist(), strict=True)):
        assert back["tokens"][row, :n].tolist() == rows["tokens"][row, :n].tolist()[::-1]
        assert back["mask"][row].nonzero().squeeze(-1).tolist() == list(range(n - p, n))
    again = reversed_rows(TensorDict({**back, "mask": torch.zeros_like(back["mask"])}, batch_size=back.batch_size))
    assert torch.equal(again["tokens"], rows["tokens"])


def test_reading_backwards_scores_a_prompt_given_its_answer() -> None:
    policy, rows = joined()
    model = ReversedModel(policy)
    row = rows[:1]
    n, p = int(row["token_mask"].sum()), int((row["mask"].cumsum(-1) == 0).sum())
    ids = row["tokens"][:, :n].flip(-1)
    log_prob = policy.model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).squeeze(-1)
    torch.testing.assert_close(model.scores(row)[0], log_prob[-p:].mean())
    torch.testing.assert_close(model.losses(row).sum(), -log_prob.sum())


# ---------------------------------------------------------------------------------------------- learning


def learner(node: Any, rows: TensorDict, policy: Any, **options: Any) -> PolicyGradient:
    return agent_of(policy, rows, "reinforce", reward_model=node, **options)


@pytest.mark.parametrize("loss", ["bradley_terry", "plackett_luce", {"name": "west_of_n", "labelled": 0.7}])
def test_micro_batches_learn_the_same(loss: Any) -> None:
    policy, rows = joined()
    found = []
    for micro_batch in (None, 5):
        agent = learner({"name": "learnt", "loss": loss}, rows, copy.deepcopy(policy), micro_batch=micro_batch)
        agent.update(filled(rows, 1))
        found.append(agent.reward_model.module.state_dict())
    assert float(found[0]["head.weight"].abs().max()) > 1e-4
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, atol=1e-5, rtol=1e-3)


def test_micro_batches_read_backwards_the_same() -> None:
    policy, rows = joined()
    found = []
    for micro_batch in (None, 5):
        agent = learner("reversed", rows, copy.deepcopy(policy), micro_batch=micro_batch)
        metrics = agent.update(filled(rows, 1))
        found.append(float(metrics["reward_model/loss"]))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_model_learns_which_answers_are_better_and_rewards_them() -> None:
    policy, rows = joined()
    node = {"name": "learnt", "loss": {"name": "bradley_terry", "pairs": "every_pair"}, "steps": 60, "lr": 0.003}
    agent = learner(node, rows, policy)
    seen: list[TensorDict] = []
    agent.watch = seen.append
    metrics = agent.update(filled(rows, 1))
    assert float(metrics["reward_model/accuracy"]) == 1.0 and float(metrics["reward_model/loss"]) < 0.1
    learnt, group = seen[0]["reward"].sum(-1), rows["group"]
    true = rows["reward"].sum(-1)
    assert float(metrics["train/reward"]) == pytest.approx(float(true.mean()))  # the environment's, as ever
    for i in range(len(true)):
        for j in range(len(true)):
            if group[i] == group[j] and true[i] > true[j]:
                assert learnt[i] > learnt[j]


def test_a_model_of_steps_learns_where_the_reward_is() -> None:
    """From returns of windows alone it finds that single steps are worth their first action."""
    policy = gaussian()
    rows = torch.cat([control_rows(policy) for _ in range(16)])
    g = torch.Generator().manual_seed(0)
    rows["observation"] = torch.randn(rows["observation"].shape, generator=g)
    rows["action"] = torch.rand(rows["action"].shape, generator=g) * 2 - 1
    rows["reward"] = rows["action"][..., 0].contiguous()
    loss = {"name": "bradley_terry", "pairs": "every_pair"}
    model = Learnt(loss=loss, within="batch", steps=150, lr=0.01, hidden=(16,))
    model.attach(policy, 0)
    metrics: dict[str, Any] = {}
    true = rows["reward"].clone()
    with torch.no_grad():
        model(rows, 0, metrics)
    valid = rows["step_mask"]
    assert float(metrics["reward_model/accuracy"]) > 0.98
    together = torch.corrcoef(torch.stack([true[valid], rows["reward"][valid]]))[0, 1]
    assert float(together) > 0.9


def test_a_model_is_fitted_every_few_updates_to_the_rows_it_is_given() -> None:
    policy, rows = joined()
    agent = learner({"name": "learnt", "every": 2}, rows, policy)
    weights, losses = [], []
    for _ in range(3):
        losses.append("reward_model/loss" in agent.update(filled(rows, 1)))
        weights.append(agent.reward_model.module.head.weight.clone())
    assert losses == [True, False, True]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    policy, rows = joined()
    agent = learner({"name": "learnt", "rows": "demonstration"}, rows, policy)  # of which there are none
    agent.update(filled(rows, 1))
    assert float(agent.reward_model.module.head.weight.detach().abs().max()) == 0.0


@pytest.mark.parametrize("node", ["learnt", "reversed", {"name": "learnt", "frozen": True, "pessimism": 0.5}])
def test_a_run_with_a_reward_model_goes_on_bit_for_bit(node: Any) -> None:
    policy, rows = joined()
    through, stopped, resumed = (learner(node, rows, copy.deepcopy(policy)) for _ in range(3))
    for _ in range(2):
        through.update(filled(rows, 1))
    stopped.update(filled(rows, 1))
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    resumed.update(filled(rows, 1))
    for one, other in ((through.policy, resumed.policy), (through.reward_model.module, resumed.reward_model.module)):
        for name, weight in one.state_dict().items():
            assert torch.equal(weight, other.state_dict()[name]), name


def test_a_steps_model_goes_on_bit_for_bit_with_its_moments() -> None:
    policy = gaussian(normalize_observation=True)
    rows, node = transitions(policy), {"name": "learnt", "within": "batch", "dependence": 1.0}
    through, stopped, resumed = (control_agent(copy.deepcopy(policy), reward_model=node) for _ in range(3))
    for _ in range(2):
        through.update(filled(rows, LANES))
    stopped.update(filled(rows, LANES))
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    resumed.update(filled(rows, LANES))
    for name, weight in through.reward_model.module.state_dict().items():
        assert torch.equal(weight, resumed.reward_model.module.state_dict()[name]), name
    assert float(through.reward_model.module.body.normalizer.count) == 2 * LANES * HORIZON


# ---------------------------------------------------------------------------------------------- from a folder


@pytest.mark.parametrize("task", [LANGUAGE, CONTROL], ids=["language", "control"])
def test_a_model_of_an_earlier_run_rewards_another_and_stays_as_it_is(task: tuple[str, ...], tmp_path: Path) -> None:
    within = "group" if task is LANGUAGE else "batch"
    budget = 16 if task is LANGUAGE else 32
    common = [f"steps={2 * budget}", "eval_episodes=4", "eval_every=0", "checkpoint_every=0"]
    alone = ["agent.objectives={policy: {coefficient: 0.0}, value: null}"]  # the model learns, the policy does not
    node = f"agent.reward_model={{name: learnt, within: {within}, lr: 0.1}}"
    run = train(composed(merged(task, common, alone, [node, f"run_dir={tmp_path / 'one'}"])), ALLOW)
    state = intact_checkpoint(run)[1]["agent"]
    learnt = state["reward_model"]["model"]
    start = Job(composed(task), ALLOW).policy.state_dict()
    assert all(torch.equal(weight, start[name]) for name, weight in state["policy"].items() if "normal" not in name)
    assert float(learnt["head.weight"].abs().max()) > 0.0
    job = Job(composed(merged(task, [f"agent.reward_model={{name: stored, folder: {run}}}"])), ALLOW)
    (tmp_path / "two").mkdir()
    trainer = job.make_trainer(tmp_path / "two")
    assert trained(job, trainer, False).metrics["reward_model/reward"] != 0.0
    kept = trainer.agent.reward_model.module.state_dict()
    assert all(torch.equal(weight, learnt[name]) for name, weight in kept.items())


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    policy, rows = joined()
    with pytest.raises(ConfigError, match="no folder of a run: train one with recipe=bt_rm"):
        learner({"name": "stored", "folder": str(tmp_path)}, rows, policy)
    (tmp_path / "config.yaml").write_text("agent: {}\n")
    with pytest.raises(ConfigError, match="had no reward model"):
        learner({"name": "stored", "folder": str(tmp_path)}, rows, policy)


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([*LANGUAGE, "agent.reward_model=lernt"], "agent.reward_model 'lernt' is unknown; did you mean 'learnt'"),
        ([*LANGUAGE, "agent.reward_model={name: learnt, loss: bradley}"], "did you mean 'bradley_terry'"),
        ([*LANGUAGE, "agent.reward_model={name: learnt, pessimism: 1.0}"], "set agent.reward_model.frozen=true"),
        (
            [*LANGUAGE, "agent.reward_model={name: learnt, loss: {name: west_of_n, labelled: 0.0}}"],
            "agent.reward_model.loss.labelled",
        ),
        ([*LANGUAGE, "agent.reward_model={name: stored}"], "needs folder"),
        ([*LANGUAGE, "agent.reward_model={name: stored, folder: x, lr: 1.0}"], "has no field 'lr'"),
        ([*LANGUAGE, "agent.reward_model={name: learnt, order: lenght}"], "define rollout.columns.lenght"),
        (
            [*LANGUAGE, "agent.reward_model={name: learnt, rows: {when: hard}}", "agent.gates={hard: success_at_most}",
             "agent.objectives={policy: {rows: {when: hard}}}"],
            "agent.reward_model.rows names 'hard'",
        ),
        ([*LANGUAGE, "agent.reward_model={name: learnt, ridge: 2.0}"], "set agent.reward_model.pessimism"),
        ([*LANGUAGE, "agent.reward_model={name: learnt, hidden: [4]}"], "head on its own transformer"),
        ([*LANGUAGE, "agent.reward_model={name: reversed, within: batch}"], "set agent.reward_model.form=pairwise"),
        (merged(CONTROL, ["agent.reward_model=learnt"]), "agent.reward_model.within=batch"),
        (merged(CONTROL, ["agent.reward_model=reversed"]), "agent.reward_model.name=learnt"),
        (
            merged(CONTROL, ["agent.reward_model={name: learnt, within: batch}", "agent.normalize_reward=true"]),
            "agent.normalize_reward scales by what the environment gives",
        ),
        (
            [*LANGUAGE, "recipe=gdpo", "agent.reward_model=learnt"],
            "correction.advantage.reward=",
        ),
    ],
)  # fmt: skip
def test_what_a_reward_model_does_not_take_is_refused_by_name(words: list[str], told: str) -> None:
    with pytest.raises(UnifiedRLError, match=re.escape(told)):
        cached(*words)


def test_a_name_is_enough() -> None:
    assert isinstance(make_reward_model("learnt"), Learnt)
