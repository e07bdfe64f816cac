"""Subgoals that answers set by markers: where they are cut, three levels of credit by hand, and limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from agent_cases import TINY, close, control_agent, filled, gaussian, gradients, language, language_agent, nudge
from tensordict import TensorDict
from torch import Tensor, nn

from unified_rl.agents.baselines import TokenBaseline, standardise
from unified_rl.agents.credits import hierarchical_advantage
from unified_rl.errors import ConfigError
from unified_rl.objectives.terms import ValueTerm
from unified_rl.returns import Segments, gae
from unified_rl.returns.subgoals import Markers, Pieces, subgoal_gae

SWITCH, KEEP, ACT, END = 1, 2, 3, 4
CREDIT = {"name": "hierarchical", "switch": ",", "keep": "-", "act": ">"}


class Letters:
    """Writes one token for each of four characters, and nothing else."""

    unk_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [",->.".find(character) + 1 for character in text]}


class Fixed(TokenBaseline):
    """Three values of every token that are given."""

    def __init__(self, value: Tensor) -> None:
        self.module: Any = nn.Identity()
        self.module.values = lambda record: value
        self.tokenizer = Letters()


def record(*rows: list[int], turn: list[int] | None = None, finished: bool = True) -> TensorDict:
    """Rows of sampled tokens behind a token of a prompt, with one unread token at the end."""
    tokens = torch.tensor([[9, *row, 9] for row in rows])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = mask[:, -1] = False
    steps = torch.zeros_like(tokens) if turn is None else torch.tensor([[0, *turn, turn[-1]]]).expand_as(tokens)
    turns = int(steps.max()) + 1
    reward = torch.arange(1.0, turns + 1).expand(len(rows), turns)
    ends = torch.zeros(len(rows), turns, dtype=torch.bool)
    ends[:, -1] = finished
    items = {"tokens": tokens, "mask": mask, "step_index": steps, "reward": reward, "terminated": ends}
    return TensorDict({**items, "discount": torch.full_like(reward, 0.5)}, batch_size=[len(rows)])


def test_answers_are_cut_before_markers_and_where_turns_begin() -> None:
    row, turn = [5, ACT, 5, SWITCH, 6, ACT, 7, KEEP, 6, ACT, SWITCH, 5], [0] * 7 + [1] * 5
    rows = record(row, turn=turn)
    pieces = Pieces.of(rows, Markers([SWITCH], [KEEP], [ACT]))
    assert pieces.piece[0, 1:-1].tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 3]
    assert pieces.starts.tolist() == [[True, True, False, True]]
    kinds = {"d": pieces.decision, "w": pieces.wording, "a": pieces.action}
    told = "".join(next((k for k, x in kinds.items() if x[0, n]), ".") for n in range(14))
    assert told == ".waadwaadwada."
    read, owning = pieces.heads(rows)
    assert [read[0, :, head].nonzero().flatten().tolist() for head in range(3)] == [
        [2, 6, 10, 12],
        [1, 5, 11],
        [4, 8, 11],
    ]
    assert owning[0].tolist() == [[True, True, False], [True, True, True], [True, False, True], [True, False, True]]


def test_a_turn_without_markers_is_a_piece_and_a_marker_of_two_tokens_is_found_within_a_turn() -> None:
    rows = record([5, SWITCH, SWITCH, KEEP, 6], turn=[0, 0, 1, 1, 1])
    pieces = Pieces.of(rows, Markers(switch=[SWITCH, KEEP]))
    assert pieces.piece.tolist() == [[0, 0, 0, 1, 1, 1, 1]] and pieces.starts.tolist() == [[True, True]]
    assert pieces.decision.nonzero()[:, 1].tolist() == [3, 4]
    apart = Pieces.of(rows, Markers(switch=[SWITCH, SWITCH]))  # the turns' border lies between the two
    assert apart.starts.tolist() == [[True, False]] and not bool(apart.decision.any())


def test_three_levels_by_hand() -> None:
    """Two turns of reward 1 and 2, discount 1/2 behind the first: a subgoal, the same kept, and another."""
    rows = record([6, ACT, 7, KEEP, 7, SWITCH, 6, ACT], turn=[0, 0, 0, 1, 1, 1, 1, 1])
    value = torch.full((1, 10, 3), float("nan"))  # what no level reads
    value[0, 2, 0], value[0, 5, 0], value[0, 8, 0] = 1.0, 2.0, 3.0
    value[0, 1, 1], value[0, 7, 1] = 10.0, 20.0
    value[0, 4, 2], value[0, 6, 2] = 5.0, 6.0
    settings = {"switch": ",", "keep": "-", "act": ">"}
    hierarchical_advantage(rows, Fixed(value), 0.5, False, False, **settings)
    last, kept = 2 - 3.0, 20 - 2.0
    first = 1 + 0.5 * 2 - 1 + 0.5 * 0.5 * kept
    second, begun = 2 - 20.0, 1 + 0.5 * 20 - 10 + 0.5 * 0.5 * (2 - 20.0)
    keeps, leaves = 20 - 5.0, 2 - 6.0
    wanted = [0, begun, first, first, keeps, kept, leaves, second, last, 0]
    assert rows["advantage"][0].tolist() == pytest.approx(wanted)
    read = rows["value_mask"]
    assert rows["value_target"][0][read[0]].tolist() == pytest.approx(
        [begun + 10, first + 1, keeps + 5, kept + 2, leaves + 6, second + 20, last + 3]
    )
    cut = record([6, ACT, 7, KEEP, 7, SWITCH, 6, ACT], turn=[0, 0, 0, 1, 1, 1, 1, 1], finished=False)
    hierarchical_advantage(cut, Fixed(value), 0.5, False, False, **settings)
    ahead = [2 + 0.5 * 3 - 6, 2 + 0.5 * 20 - 20, 2 + 0.5 * 3 - 3]  # its own value stands for what was not seen
    assert cut["advantage"][0, 6:9].tolist() == pytest.approx(ahead)


def test_a_decision_earns_what_comes_up_to_the_next_subgoal_whatever_is_kept_between() -> None:
    rows = record([6, ACT, 7, KEEP, 7, KEEP, 7, SWITCH, 6])
    value = torch.full((1, 11, 3), 100.0)  # of what is done for a subgoal: no part of it
    value[0, 4, 2], value[0, 6, 2], value[0, 8, 1] = 5.0, 6.0, 20.0
    hierarchical_advantage(rows, Fixed(value), 0.5, False, False, switch=",", keep="-", act=">")
    assert rows["advantage"][0, [4, 6]].tolist() == pytest.approx([20 - 5, 20 - 6])


def test_levels_are_standardised_over_their_own_pieces() -> None:
    rows = record([6, ACT, 7, SWITCH, 6, ACT], [6, ACT, SWITCH, 6, ACT, 7])
    rows["reward"] = torch.tensor([[1.0], [3.0]])
    value = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))
    plain, scaled = rows.clone(), rows.clone()
    for one, normalize in ((plain, False), (scaled, True)):
        hierarchical_advantage(one, Fixed(value), 0.9, False, normalize, switch=",", act=">")
    places = {"low": ([0, 0, 1, 1], [2, 6, 2, 5]), "high": ([0, 0, 1, 1], [1, 5, 1, 4]), "term": ([0, 1], [4, 3])}
    for at in places.values():
        every = plain["advantage"][at]
        torch.testing.assert_close(scaled["advantage"][at], standardise(every, torch.ones_like(every).bool()))


def scanned(markers: Markers, value: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Advantages over pieces of rows of which every token is a marker of one kind, and the scan of their tokens."""
    rows = record(*[[SWITCH] * 5] * 3)
    mask, end = rows["mask"], torch.zeros_like(rows["mask"])
    end[:, 5] = True
    reward = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    scan = {"reward": reward, "terminated": end, "done": end, "gamma": torch.full((3, 7), 0.9), "mask": mask}
    pieces = Pieces.of(rows, markers)
    one = value[..., 0]
    scan |= {"value": one, "next_value": one}
    units = Segments.of(**scan, segment=pieces.piece, number=pieces.number)
    out, _ = subgoal_gae(pieces, value, pieces.heads(rows)[0], units, 0.7)
    scan["next_value"] = torch.cat([one[:, 1:], one[:, -1:]], 1)
    return out, gae(**scan, lam=0.7)[0][:, 1:6], scan


def test_every_level_is_plain_gae_in_its_limit() -> None:
    value = torch.randn(3, 7, 1, generator=torch.Generator().manual_seed(2)).expand(3, 7, 3)
    switches, plain, _ = scanned(Markers(switch=[SWITCH]), value)
    torch.testing.assert_close(switches[..., 1], plain)  # every piece a subgoal: the high level
    keeps, plain, _ = scanned(Markers(keep=[SWITCH]), value)
    torch.testing.assert_close(keeps[..., 0], plain)  # one subgoal: the low level
    assert float((switches[..., 0] - plain).abs().max()) > 0.1 < float((keeps[..., 1] - plain).abs().max())


# ------------------------------------------------------------------------------------------------- the agent


@pytest.mark.parametrize("critic", [None, TINY])
def test_micro_batches_of_a_critic_of_three_heads_have_the_same_gradient(critic: dict[str, Any] | None) -> None:
    policy, rows = language()
    found = []
    for micro_batch in (None, 5):
        agent = language_agent(policy, rows, "ppo", advantage="critic", credit=CREDIT, critic_config=critic, seed=0)
        agent.micro_batch = agent.anchors.micro_batch = micro_batch
        nudge(agent.baseline.module)  # type: ignore[union-attr]
        before = {name: x.clone() for name, x in policy.state_dict().items()}
        found.append(gradients(agent, filled(rows.clone(), 1)))
        policy.load_state_dict(before)
    close(found[1], found[0])
    head = found[0]["critic.head.weight"]
    assert head.shape[0] == 3 and bool((head.abs().amax(-1) > 1e-4).all()), "every head learns"


def test_every_head_has_a_mean_of_its_own() -> None:
    policy, rows = language()
    agent = language_agent(policy, rows, "ppo", advantage="critic", credit=CREDIT)
    record = agent.estimate(rows.clone(), 0, {})
    mask, target = record["value_mask"], record["value_target"]
    assert bool((mask.sum(-1) <= 3).all()) and len({int(x) for x in mask.sum((0, 1))}) > 1
    wanted = sum(0.5 * target[..., head][mask[..., head]].square().mean() for head in range(3))  # values begin at 0
    term = agent.objective.terms["value"]
    assert isinstance(term, ValueTerm)
    torch.testing.assert_close(term.loss(None, record, None)[0], wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"credit": "hierarchical"}, r"without a marker(.|\n)*agent\.credit\.switch(.|\n)*agent\.credit=step"),
        ({"credit": {**CREDIT, "keep": "?"}}, r"agent\.credit\.keep='\?' cannot be written"),
        ({"credit": {**CREDIT, "act": ""}}, r"agent\.credit\.act='' cannot be written"),
        ({"credit": {**CREDIT, "keep": ","}}, r"agent\.credit\.switch and agent\.credit\.keep are the same marker"),
        ({"credit": {**CREDIT, "sweetch": ","}}, "did you mean 'switch'"),
        ({"credit": CREDIT, "off_policy_targets": True}, r"agent\.off_policy_targets takes V-trace"),
        ({"credit": CREDIT, "advantage": "group"}, r"agent\.advantage=critic"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], words: str) -> None:
    policy, rows = language()
    with pytest.raises(ConfigError, match=words):
        language_agent(policy, rows, "ppo", **{"advantage": "critic", **options})


def test_actions_have_no_markers() -> None:
    with pytest.raises(ConfigError, match=r"actions have none: use agent\.credit=unit"):
        control_agent(gaussian(), credit=CREDIT)


def test_a_run_with_three_heads_resumes_bit_for_bit(tmp_path: Path) -> None:
    from run_cases import ALLOW, LANGUAGE
    from test_resume import COMMON, cut_run, equal, rows_of

    from unified_rl.config import compose, resolve_defaults
    from unified_rl.training.checkpoint import checkpoints, read_checkpoint
    from unified_rl.training.run import resume, train

    overrides = [*COMMON, *LANGUAGE, "recipe=hiper", "steps=48", "checkpoint_every=16", f"run_dir={tmp_path / 'whole'}"]
    whole = train(resolve_defaults(compose(overrides, allow=ALLOW), allow=ALLOW), allow=ALLOW)
    saves = checkpoints(whole / "checkpoints")
    cut_run(whole, tmp_path / "part", saves[1])
    resume(str(tmp_path / "part"), allow=ALLOW)
    end = read_checkpoint(saves[-1])
    equal(end, read_checkpoint(checkpoints(tmp_path / "part" / "checkpoints")[-1]))
    assert rows_of(tmp_path / "part") == rows_of(whole)
