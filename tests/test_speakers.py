"""Teachers that have a say in what is sampled: who said what, with which probability, and what else is learnt from."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from agent_cases import TINY, filled, nudge, stream
from run_cases import CONTROL, composed, merged, teacher
from tensordict import TensorDict
from term_cases import agent_of, dense
from test_derived_rows import aligned

from unified_rl.agents import speakers
from unified_rl.envs.language import ChainMod
from unified_rl.errors import ConfigError
from unified_rl.policies import choosers
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.policies.generation import Beside, Generation
from unified_rl.rollout import LanguageRollout
from unified_rl.rollout.beginnings import Guided
from unified_rl.rollout.context import Refill
from unified_rl.rollout.curriculum import Curriculum
from unified_rl.rollout.forks import Forks
from unified_rl.training.run import Job

OWN = torch.tensor([0.5, 0.3, 0.15, 0.05])
OTHER = torch.tensor([0.1, 0.2, 0.3, 0.4])
DRAWS = 40_000


def drawn(make: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shares of the four tokens among many draws, the probability that each was said to have, and shares of marks."""
    chosen = make(stream(1))(OWN.log().expand(DRAWS, 4), OTHER.log().expand(DRAWS, 4), stream(2))
    shares = torch.bincount(chosen.token, minlength=4) / DRAWS
    said = torch.stack([chosen.log_prob[chosen.token == token].exp().mean() for token in range(4)])
    assert float(chosen.log_prob.exp().std()) > 0 and all(
        float(chosen.log_prob[chosen.token == token].std()) < 1e-5 for token in range(4)
    )
    return shares, said, torch.stack([(chosen.mark == mark).float().mean() for mark in (0, -2, -3)])


CHOOSERS: dict[str, tuple[Any, torch.Tensor, list[float]]] = {
    # tokens 2 and 3 are the other's two likeliest: proposals 0 and 1 (0.8) are drawn again
    "outside top k": (lambda g: choosers.OutsideTopK(2, g), torch.tensor([0.08, 0.16, 0.39, 0.37]), [0.0, 0.2, 0.8]),
    "nothing stays": (lambda g: choosers.OutsideTopK(0, g), OTHER, [0.0, 0.0, 1.0]),
    "everything stays": (lambda g: choosers.OutsideTopK(4, g), OWN, [1.0, 0.0, 0.0]),
    # accepted with min(1, other / own): 0.1 + 0.2 + 0.15 + 0.05
    "verified": (choosers.Verified, OTHER, [0.0, 0.5, 0.5]),
    "drawn": (lambda g: choosers.Drawn(0.25, g), 0.25 * OWN + 0.75 * OTHER, [0.0, 1.0, 0.0]),
}


@pytest.mark.parametrize("name", CHOOSERS)
def test_tokens_are_drawn_with_the_probability_that_they_are_said_to_have(name: str) -> None:
    make, wanted, marks = CHOOSERS[name]
    shares, said, marked = drawn(make)
    torch.testing.assert_close(said, wanted, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(shares, wanted, atol=5 * 0.5 / DRAWS**0.5, rtol=0.0)
    torch.testing.assert_close(marked, torch.tensor(marks), atol=5 * 0.5 / DRAWS**0.5, rtol=0.0)


def test_a_drafter_that_is_its_own_judge_is_never_corrected() -> None:
    logits = torch.randn(2000, 9, generator=stream())
    chosen = choosers.Verified(stream(1))(logits, logits.clone(), stream(2))
    assert bool((chosen.mark == choosers.FOREIGN).all())


@pytest.fixture(scope="module")
def task() -> tuple[ChainMod, CausalLM, CausalLM]:
    env = ChainMod(modulus=5, terms=3, max_turn_tokens=6)
    policy = CausalLM(**env.policy_inputs(), config=TINY, seed=1)
    other = copy.deepcopy(policy)
    nudge(other, 0.3)
    return env, policy, other


def test_two_models_are_read_at_every_token_whatever_the_lengths_of_prompts_and_answers(task: Any) -> None:
    """Of prompts of different lengths, seen differently by both, rows that end at different times among them."""
    _, policy, other = task
    prompts = [[3, 4, 5], [5, 6], [7, 3, 4, 8, 9]]
    shown = [[*ids, 4, 4] if n else ids for n, ids in enumerate(prompts)]
    beside = Beside(other.model, choosers.OutsideTopK(3, stream(5)), other.sampling, prompts=shown)
    ends = (1, 8, 4)
    said = policy.generate(
        prompts, max_new_tokens=5, stop_ids=ends, generator=stream(4), samples_per_prompt=6, beside=beside
    )
    assert len(set(said.length.tolist())) > 2 and said.version is not None
    for row, (ids, length) in enumerate(zip(said.tokens, said.length.tolist(), strict=True)):
        answer, whole = ids[:length], []
        for model, context in ((policy, prompts), (other, shown)):
            start = context[row // 6]
            tokens = torch.cat([torch.tensor(start), answer])[None]
            with torch.no_grad():
                logits = model.model(input_ids=tokens).logits[0, len(start) - 1 : -1]
            whole.append(model.sampling.logits(logits).log_softmax(-1))
        s, t = whole
        likely = torch.zeros_like(t, dtype=torch.bool).scatter(-1, t.topk(3, -1).indices, True)
        mixed = torch.where(likely, s.exp(), 0.0) + torch.where(likely, 0.0, s.exp()).sum(-1, keepdim=True) * t.exp()
        torch.testing.assert_close(mixed.sum(-1), torch.ones(length))
        wanted = mixed.gather(-1, answer[:, None])[:, 0].log()
        torch.testing.assert_close(said.log_prob[row, :length], wanted, atol=1e-4, rtol=1e-4)
        assert bool((said.version[row, :length] <= choosers.FOREIGN).all())


def made(env: Any, policy: Any, speaker: Any, **options: Any) -> LanguageRollout:
    return LanguageRollout(
        env, policy, 1.0, stream(0), stream(1), prompts=3, group_size=4, speaker=speaker,
        streams=lambda name: stream(len(name) + 7), **options,
    )  # fmt: skip


SPEAKERS: dict[str, Any] = {
    "interleaved": lambda folder: speakers.Interleaved(folder, top_k=2),
    "draft": lambda folder: speakers.Draft(folder, replay=3),
    "two contexts": lambda folder: speakers.TwoContexts(folder, share=0.5, style="chain"),
    "alternating": lambda folder: speakers.Alternating(folder, probability=0.5),
}


@pytest.mark.parametrize("name", SPEAKERS)
def test_rows_go_on_bit_for_bit_and_have_no_version_where_somebody_else_spoke(
    name: str, task: Any, tmp_path: Path
) -> None:
    env, policy, other = task
    other.save(str(tmp_path))
    one, again = (made(env, policy, SPEAKERS[name](str(tmp_path))) for _ in range(2))
    one.collect(0)
    again.load_state_dict(copy.deepcopy(one.state_dict()))
    rows, metrics = one.collect(1)
    resumed, _ = again.collect(1)
    assert all(torch.equal(rows[key], resumed[key]) for key in rows.keys())
    versions = rows["policy_version"][:12][rows["mask"][:12]]
    assert set(versions.tolist()) == ({-1, 1} if name == "alternating" else {-1})
    assert metrics["rollout/foreign"] == pytest.approx(float((versions == -1).float().mean()))
    agent = agent_of(policy, rows, "reinforce", objectives={"policy": None, "imitate": {"name": "nll", "rows": "own"}})
    rows["policy_version"] = rows["policy_version"].clamp(max=0)
    agent.update(filled(rows, 1))  # the check of fresh samples knows whose they are


def test_who_speaks_in_a_turn_is_who_its_log_probs_are_of(task: Any, tmp_path: Path) -> None:
    env, policy, other = task
    other.save(str(tmp_path))
    rows, _ = made(env, policy, speakers.Alternating(str(tmp_path), probability=0.5)).collect(0)
    with torch.no_grad():
        mine, theirs = dense(policy, rows)[1], dense(other, rows)[1]
    foreign = rows["policy_version"] < 0
    taught = (foreign & rows["mask"]).any(-1)
    assert 0 < int(taught.sum()) < len(rows)
    assert torch.equal(foreign & rows["mask"], taught[:, None] & rows["mask"])  # whole turns
    wanted = torch.where(taught[:, None], theirs, mine)
    torch.testing.assert_close(rows["behavior_log_prob"][rows["mask"]], wanted[rows["mask"]], atol=1e-4, rtol=1e-4)
    alone, _ = made(env, policy, speakers.Alternating(str(tmp_path), probability=0.0)).collect(0)
    plain, _ = made(env, policy, None).collect(0)
    assert all(torch.equal(alone[key], plain[key]) for key in plain.keys())
    assert speakers.Alternating("x", probability=0.8, decay=0.5).chance(2) == pytest.approx(0.2)


def test_a_drafter_drafts_again_where_it_was_corrected(task: Any, tmp_path: Path) -> None:
    env, policy, other = task
    other.save(str(tmp_path / "other"))
    policy.save(str(tmp_path / "same"))
    rollout = made(env, policy, speakers.Draft(str(tmp_path / "other"), replay=3))
    rows, metrics = rollout.collect(0)
    own, more = rows[:12], rows[12:]
    assert len(more) == metrics["rollout/joined/speaker"] > 0 and rollout.rows == 24
    assert not set(more["group"].tolist()) & set(own["group"].tolist()) and bool((more["reward"] == 0).all())
    with torch.no_grad():
        mine = dense(policy, more)[1]
    torch.testing.assert_close(more["behavior_log_prob"][more["mask"]], mine[more["mask"]], atol=1e-4, rtol=1e-4)
    assert int(more["mask"].sum(-1).max()) <= 3 and bool((more["policy_version"][more["mask"]] == 0).all())
    prefixes = Counter(tuple(row["tokens"][: int(row["mask"].int().argmax())].tolist()) for row in more)
    said = [tuple(row["tokens"].tolist()) for row in own]
    assert all(any(row[: len(prefix)] == prefix for row in said) for prefix in prefixes)
    rows, metrics = made(env, policy, speakers.Draft(str(tmp_path / "same"))).collect(0)
    assert len(rows) == 12 and metrics["rollout/corrected"] == 0.0  # nothing is refused, and nothing added
    assert len(made(env, policy, speakers.Draft(str(tmp_path / "other"), replay=0)).collect(0)[0]) == 12


def test_a_draft_ends_its_row_in_the_turn_in_which_it_begins() -> None:
    rows = TensorDict({
        "tokens": torch.arange(10, 18)[None], "mask": torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0]]).bool(),
        "step_index": torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]]), "policy_version": torch.full((1, 8), -1),
        "behavior_log_prob": torch.zeros(1, 8), "reward": torch.ones(1, 3),
        "step_mask": torch.tensor([[1, 1, 0]]).bool(),
        "terminated": torch.tensor([[0, 1, 0]]).bool(), "truncated": torch.zeros(1, 3).bool(),
    }, batch_size=[1])  # fmt: skip
    log_prob = torch.tensor([[-1.0, -2.0, -3.0, -9.0]])
    said = Generation(torch.tensor([[1, 2, 3, 9]]), log_prob, torch.tensor([3]), torch.tensor([False]))
    found = speakers._drafted(rows, torch.tensor([2]), said, 0, 5)
    assert found["tokens"].tolist() == [[10, 11, 1, 2, 3, 0, 0, 0]]
    assert found["mask"].tolist() == [[n in (2, 3, 4) for n in range(8)]]
    assert found["behavior_log_prob"].tolist() == [[0, 0, -1, -2, -3, 0, 0, 0]]
    assert found["policy_version"].tolist() == [[-1, -1, 5, 5, 5, -1, -1, -1]]
    assert not bool(found["step_index"].any()) and not bool(found["terminated"].any())
    assert found["step_mask"].tolist() == found["truncated"].tolist() == [[True, False, False]]


def test_drafts_stand_behind_the_solution_too_and_forks_of_a_teachers_tokens_have_no_version(
    task: Any, tmp_path: Path
) -> None:
    env, policy, other = task
    other.save(str(tmp_path))
    columns = {"marks": "marks"}
    rows, _ = made(env, policy, speakers.Draft(str(tmp_path), 3), privileged="chain", columns=columns).collect(0)
    aligned(rows)
    assert len(rows) > 12 and not bool(rows["marks"][12:].any())
    begins = [rows[key].int().argmax(-1) for key in ("mask", "privileged_mask")]
    seen = rows["privileged_tokens"].tolist()
    for n, (bare, shown) in enumerate(zip(begins[0].tolist(), begins[1].tolist(), strict=True)):
        whole = [m for m in range(12) if seen[m][:shown] == seen[n][:shown]]  # the same solution and begin
        assert any(shown - bare == int(begins[1][m] - begins[0][m]) for m in whole)
    said = made(env, policy, speakers.Interleaved(str(tmp_path), 2), context=Forks(1), columns={"begun": "begun"})
    rows, metrics = said.collect(7)
    assert bool((rows["begun"] > 0).any()) and bool((rows["policy_version"][rows["mask"]] == -1).all())
    assert metrics["rollout/foreign"] == 1.0


def test_in_simulations_each_action_is_of_who_acted(tmp_path: Path) -> None:
    folder = teacher(tmp_path, CONTROL)
    node = f"{{_target_: unified_rl.agents.speakers.Alternating, folder: {folder}, probability: 0.5}}"
    job = Job(composed(merged(CONTROL, [f"rollout.speaker={node}"])), ("run_cases",))
    rollout = job.make_rollout()
    rows, _ = rollout.collect(0)
    again = Job(composed(merged(CONTROL, [f"rollout.speaker={node}"])), ("run_cases",)).make_rollout()
    again.load_state_dict(copy.deepcopy(rollout.state_dict()))
    one, resumed = rollout.collect(1)[0], again.collect(1)[0]
    assert all(torch.equal(one[key], resumed[key]) for key in one.keys())
    plain = Job(composed(CONTROL), ("run_cases",)).make_rollout()
    again.load_state_dict(plain.state_dict())  # a speaker that joins a run later begins its own stream
    foreign = rows["policy_version"] == -1
    assert 0 < int(foreign.sum()) < foreign.numel() and "foreign" not in rows.keys()
    scored = [
        policy.log_prob(rows.reshape(-1)).log_prob.detach().reshape(rows["behavior_log_prob"].shape)
        for policy in (job.policy, rollout.speaker.teacher)
    ]
    wanted = torch.where(foreign[..., None], scored[1], scored[0])
    torch.testing.assert_close(rows["behavior_log_prob"], wanted, atol=1e-4, rtol=1e-4)
    assert float((scored[0] - scored[1]).abs().max()) > 1e-2


def test_what_no_speaker_can_do_is_refused_by_name(task: Any, tmp_path: Path) -> None:
    env, policy, other = task
    other.save(str(tmp_path))
    folder = str(tmp_path)
    apart = CausalLM(**env.policy_inputs(), config=TINY, engine_dtype="bfloat16")
    with pytest.raises(ConfigError, match=r"rollout\.speaker chooses every token .*policy\.engine_dtype=null"):
        made(env, apart, speakers.Interleaved(folder))
    hoarse = CausalLM(**env.policy_inputs(), config=TINY, repetition_penalty=1.2)
    with pytest.raises(ConfigError, match=r"without policy\.cuda_graph and policy\.repetition_penalty"):
        made(env, hoarse, speakers.Interleaved(folder)).collect(0)
    with pytest.raises(ConfigError, match=r"rollout\.speaker is .*must be a mapping with _target_"):
        made(env, policy, {"folder": folder})
    with pytest.raises(ConfigError, match="style"):
        made(env, policy, speakers.TwoContexts(folder, style="nowhere"))
    for name, part in {"beginning": Guided(style="chain"), "context": Refill()}.items():
        with pytest.raises(ConfigError, match=rf"whole prompts .* set rollout\.{name}=null"):
            made(env, policy, speakers.TwoContexts(folder, style="chain"), **{name: part})
    with pytest.raises(ConfigError, match=r"rollout\.curriculum learns .* rollout\.speaker speaks in its place"):
        made(env, policy, speakers.Alternating(folder), curriculum=Curriculum())
    node = f"{{_target_: unified_rl.agents.speakers.Interleaved, folder: {folder}}}"
    with pytest.raises(ConfigError, match=r"Interleaved, which chooses tokens; in simulations .*Alternating"):
        Job(composed(merged(CONTROL, [f"rollout.speaker={node}"])), ("run_cases",)).make_rollout()
    runs = teacher(tmp_path / "run", CONTROL) if (tmp_path / "run").mkdir() is None else ""
    node = f"{{_target_: unified_rl.agents.speakers.Alternating, folder: {runs}}}"
    held = [f"rollout.speaker={node}", "policy.gsde=true", "policy.gsde_every=2"]
    with pytest.raises(ConfigError, match=r"policy\.gsde has a say in it too"):
        Job(composed(merged(CONTROL, held)), ("run_cases",)).make_rollout()
