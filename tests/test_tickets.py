"""Tickets to workers: how old rows are, that each is taken once, and that neither deaths nor resuming changes them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from run_cases import CONTROL, LANGUAGE
from ticket_cases import ALLOW, Counting, Flying, differences, made, read_rows, step
from torch import nn

from unified_rl.config import compose
from unified_rl.errors import CheckpointError, ConfigError, RolloutError
from unified_rl.rollout.feed import Feed, LocalFeed
from unified_rl.rollout.tickets import TicketFeed, join
from unified_rl.rollout.weights import pack, unpack_into
from unified_rl.training.checkpoint import checkpoints, read_checkpoint
from unified_rl.training.collector import pack_state, unpack_state


def expected(workers: int, bound: int, updates: int) -> list[tuple[int, int]]:
    """Version and content of each batch, from the rule alone."""
    states, out = list(range(workers)), []
    for number in range(updates):
        worker, version = number % workers, max(0, number - bound)
        states[worker] = step(states[worker], version)
        out.append((version, states[worker]))
    return out


def played(
    workers: int, bound: int, updates: int, chance: random.Random, dies: float, saves: float
) -> tuple[list[Any], int]:
    """A run with deaths and with checkpoints that another process goes on from; what it took, and deaths."""

    def cluster() -> Counting:
        return Counting(workers, dies=lambda: chance.random() < dies)

    feed, taken, deaths, update = TicketFeed(cluster(), workers, 1, bound, restarts=10**6), [], 0, 0
    while update < updates:
        feed.publish(update)
        feed.admit(min(updates, update + 1 + bound))
        assert feed.admitted == min(updates, update + 1 + bound)
        if chance.random() < 0.3:
            assert feed.peek() == feed.peek()
        taken.append(feed.take()[0])
        update += 1
        if chance.random() < saves:
            feed.publish(update)
            state = feed.state_dict()
            saved = json.loads(json.dumps({**state, "waiting": []})) | {"waiting": state["waiting"]}
            deaths += feed.cluster.deaths  # type: ignore[attr-defined]
            feed = TicketFeed(cluster(), workers, 1, bound, restarts=10**6)
            feed.load_state_dict(saved)
    return taken, deaths + feed.cluster.deaths  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _plain_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counting workers bring pairs of numbers, which a checkpoint holds as they are."""
    from unified_rl.rollout import feed, tickets

    def joined(parts: Any) -> Any:
        return ([rows for rows, _ in parts], {}) if isinstance(parts[0][0], tuple) else join(parts)

    monkeypatch.setattr(tickets, "join", joined)
    ours = feed.pack_rows, feed.unpack_rows
    monkeypatch.setattr(feed, "pack_rows", lambda rows: rows if isinstance(rows, tuple) else ours[0](rows))
    monkeypatch.setattr(feed, "unpack_rows", lambda rows: rows if isinstance(rows, tuple) else ours[1](rows))


@settings(max_examples=400, deadline=None)
@given(
    workers=st.integers(1, 5),
    spare=st.integers(0, 4),
    updates=st.integers(1, 14),
    seed=st.integers(0, 2**32),
    dies=st.sampled_from([0.0, 0.1, 0.4]),
    saves=st.sampled_from([0.0, 0.3]),
)
def test_every_schedule_brings_the_same_rows_within_the_bound(
    workers: int, spare: int, updates: int, seed: int, dies: float, saves: float
) -> None:
    bound = workers - 1 + spare
    rule = expected(workers, bound, updates)
    assert max(update - version for update, (version, _) in enumerate(rule)) == min(bound, updates - 1)
    for schedule in range(10):
        taken, _ = played(workers, bound, updates, random.Random(seed + schedule), dies, saves)
        assert taken == rule


def test_in_flight_every_newer_version_goes_to_the_workers_that_collect() -> None:
    cluster = Counting(2)
    feed = TicketFeed(cluster, 2, 1, 2, in_flight=True)
    for update in range(3):
        feed.publish(update)
        feed.admit(update + 3)
        feed.take()
    assert cluster.swapped == [(0, 1), (1, 1), (0, 2), (1, 2)]


@settings(max_examples=100, deadline=None)
@given(workers=st.integers(1, 4), updates=st.integers(1, 8), seed=st.integers(0, 2**32))
def test_parts_of_a_batch_have_one_version_and_one_order_whoever_dies(workers: int, updates: int, seed: int) -> None:
    for dies, saves in ((0.0, 0.0), (0.3, 0.0), (0.3, 0.3)):
        states, chance = list(range(workers)), random.Random(seed)
        feed = periodic(workers, chance, dies)
        for update in range(updates):
            states = [step(state, update) for state in states]
            feed.publish(update)
            feed.admit(update + 1)
            assert feed.admitted == update + 1
            taken = feed.take()[0]
            assert (taken if workers > 1 else [taken]) == [(update, state) for state in states]
            if chance.random() < saves:
                feed.publish(update + 1)
                state = feed.state_dict()
                feed = periodic(workers, chance, dies)
                feed.load_state_dict(state)


def periodic(workers: int, chance: random.Random, dies: float) -> TicketFeed:
    cluster = Counting(workers, dies=lambda: chance.random() < dies)
    return TicketFeed(cluster, workers, 1, 0, order="periodic", restarts=10**6)


def test_workers_do_die_in_these_schedules() -> None:
    assert sum(played(3, 2, 12, random.Random(seed), 0.4, 0.3)[1] for seed in range(20)) > 50


def test_by_completion_a_slow_batch_is_overtaken_without_end_and_every_batch_is_taken_once() -> None:
    patient = Counting(2, pick=lambda workers: len(workers) - 1 if workers[0] == 0 else 0)  # worker 0 hangs
    feed = TicketFeed(patient, 2, 1, 1, order="completion")
    versions = []
    for update in range(20):
        feed.publish(update)
        feed.admit(update + 2)
        versions.append(feed.take()[0][0])
    assert versions == [0, *range(1, 20)]
    assert feed._now.open[0].number == 0  # begun at version 0, and 20 updates old by now
    patient.pick = lambda workers: 0
    assert feed.take()[0] == (0, step(0, 0))


def test_more_deaths_than_are_allowed_end_the_run_with_one_line() -> None:
    feed = TicketFeed(Counting(1, dies=lambda: True), 1, 1, 0, restarts=3)
    feed.publish(0)
    feed.admit(1)
    with pytest.raises(
        RolloutError, match=r"worker 0 was lost \(it died\).*4 in this run.*engine.restarts=3 allows no"
    ):
        feed.take()


def test_a_failed_collection_is_saved_where_its_weights_are_the_present_ones_and_refused_elsewhere() -> None:
    class Failing(Counting):
        def result(self, pending: Any, ticket: int, worker: int) -> Any:
            if ticket == 2:
                raise RolloutError(f"worker {worker}, batch {ticket}: no")
            return super().result(pending, ticket, worker)

    for bound, saves in ((0, True), (1, False)):
        feed = TicketFeed(Failing(1), 1, 1, bound)
        for update in range(2):
            feed.publish(update)
            feed.admit(update + 1 + bound)
            feed.take()
        feed.publish(2)
        feed.admit(3 + bound)
        with pytest.raises(RolloutError, match="worker 0, batch 2: no"):
            feed.peek()
        if saves:
            state = feed.state_dict()
            assert state["admitted"] == 2 and state["workers"][0][0] == {"x": expected(1, 0, 2)[-1][1]}
        else:
            with pytest.raises(CheckpointError, match=r"older weights are under way.*worker 0, batch 2"):
                feed.state_dict()


@pytest.mark.parametrize("bound", [0, 1])
def test_a_second_signal_is_not_kept_waiting_by_a_worker_that_hangs(bound: int) -> None:
    class Hanging(Counting):
        def result(self, pending: Any, ticket: int, worker: int) -> Any:
            if ticket == 2:
                raise KeyboardInterrupt
            return super().result(pending, ticket, worker)

        def is_done(self, pending: Any) -> bool:
            return False

    feed = TicketFeed(Hanging(1), 1, 1, bound)
    for update in range(2):
        feed.publish(update)
        feed.admit(update + 1 + bound)
        feed.take()
    feed.publish(2)
    feed.admit(3 + bound)
    with pytest.raises(KeyboardInterrupt):
        feed.peek()
    if bound == 0:
        assert feed.state_dict()["admitted"] == 2
    else:
        with pytest.raises(CheckpointError, match=r"older weights are under way .*\(interrupted\)"):
            feed.state_dict()


def test_an_environment_that_cannot_be_put_back_begins_new_episodes_and_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    deaths = iter([False, True])
    feed = TicketFeed(Counting(1, dies=lambda: next(deaths, False), exact=False), 1, 1, 0, seed=7)
    for update in range(3):
        feed.publish(update)
        feed.admit(update + 1)
        feed.take()
    assert "worker 0 goes on with new episodes, not bit for bit" in capsys.readouterr().err
    assert feed.lost == 1


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"rollout": {}, "admitted": 3, "waiting": []}, "made with engine=local.*resume it with engine=local"),
        (
            {"workers": [[None, None]] * 3, "admitted": 3, "waiting": []},
            "engine.workers=3, and cannot go on with engine",
        ),
        (
            {"workers": [[None, None]] * 2, "admitted": 3, "waiting": [], "order": "periodic"},
            "made with engine.order=periodic, and cannot go on with engine.order=ticket",
        ),
    ],
)
def test_another_engine_or_number_of_workers_is_refused_before_any_is_started(state: Any, words: str) -> None:
    cluster = Counting(2)
    with pytest.raises(CheckpointError, match=words):
        TicketFeed(cluster, 2, 1, 1).load_state_dict(state)
    assert not cluster.opened
    feed = LocalFeed.__new__(LocalFeed)
    with pytest.raises(CheckpointError, match=r"engine=ray engine.workers=2, and cannot go on with engine=local"):
        feed.load_state_dict(TicketFeed(cluster, 2, 1, 1).state_dict())
    assert isinstance(TicketFeed(cluster, 2, 1, 1), Feed)


# ------------------------------------------------------------------------------------------- weights and state


def test_weights_travel_with_buffers_that_grow_and_ties_are_sent_once() -> None:
    from unified_rl.policies.gaussian import GaussianPolicy
    from unified_rl.spaces import Space

    space = Space.flat(3, 2, [-1.0] * 2, [1.0] * 2)
    one, other = (GaussianPolicy(space, normalize_observation=True, seed=seed) for seed in (0, 1))
    for seed in range(3):  # makes room for more sets of moments than a fresh policy has
        one.update_normalizer(torch.randn(64 * 4**seed, 3, generator=torch.Generator().manual_seed(seed)) * 3 + 1)
    flat = pack(one)
    for array in flat.arrays.values():
        array.flags.writeable = False
    unpack_into(other, flat)
    assert differences(one.state_dict(), other.state_dict()) == []
    seen = torch.ones(4, 3)
    assert torch.equal(one.normalize(seen), other.normalize(seen))  # through buffers that no state holds

    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    sent = pack(tied.to(torch.bfloat16))
    assert sent.arrays["bfloat16"].nbytes == 2 * 16 and len(sent.layout) == 2
    again = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).to(torch.bfloat16)
    unpack_into(again, sent)
    assert torch.equal(again[1].weight, tied[0].weight)


def test_a_policy_with_state_that_is_no_tensor_is_refused() -> None:
    class Counted(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"calls": 3}

    with pytest.raises(ConfigError, match=r"Counted keeps _extra_state as a dict.*engine=local"):
        pack(Counted(2, 2))


def test_state_comes_back_as_it_was() -> None:
    state = {
        "a": {"b": torch.arange(3), "c": (1, None, "x")},
        "d": [torch.tensor(2.5, dtype=torch.float64)],
        "n": 2**60,
    }
    packed = pack_state(state)
    assert isinstance(packed["plain"], str)
    assert differences(unpack_state(packed), state) == []


# ------------------------------------------------------------------------------------------- whole runs

RUN = ("updates=5", "eval_episodes=4", "progress=false", "log_every=1", "eval_every=0", "logger=[]", "samples_every=1")
NEVER = "checkpoint_every=1000000"
DOMAINS = {
    "control": (*CONTROL, "agent=ppo", "agent.epochs=2", "policy.normalize_observation=true", *RUN),
    "language": (*LANGUAGE, "correction=dapo", *RUN),
}


def composed(domain: str, *more: str) -> dict[str, Any]:
    return compose([*DOMAINS[domain], *more], allow=["run_cases"])


@pytest.mark.parametrize(("domain", "bound"), [("control", 0), ("control", 2), ("language", 2)])
def test_one_worker_is_the_run_without_bit_for_bit(domain: str, bound: int, tmp_path: Path) -> None:
    given = (f"rollout.staleness={bound}", NEVER)
    here, rows = made(composed(domain, *given), tmp_path / "a")
    there, others = made(composed(domain, *given, "engine=ray"), tmp_path / "b")
    assert isinstance(here.feed, LocalFeed) and isinstance(there.feed, TicketFeed)
    assert differences(here.agent.state_dict(), there.agent.state_dict()) == []
    state = unpack_state(there.feed._now.origins[0].state)
    assert differences(here.rollout.state_dict(), state) == []
    assert rows == others and len(rows) == 6
    if domain == "language":
        assert read_rows(tmp_path / "a" / "samples.jsonl") == read_rows(tmp_path / "b" / "samples.jsonl") != []


@pytest.mark.parametrize("domain", DOMAINS)
def test_deaths_and_resuming_change_nothing_and_workers_have_streams_and_numbers_of_their_own(
    domain: str, tmp_path: Path
) -> None:
    given = ("rollout.staleness=2", "engine=ray", "engine.workers=3")
    every = 256 if domain == "control" else 32  # two updates
    calm, rows = made(composed(domain, *given, f"checkpoint_every={every}", "keep_checkpoints=9"), tmp_path / "a")
    cfg = composed(domain, *given, NEVER)
    asked: list[int] = []

    def dies(worker: int) -> bool:
        asked.append(worker)
        return len(asked) % 3 == 2

    found = checkpoints(tmp_path / "a" / "checkpoints")[0]
    waiting = read_checkpoint(found)["feed"]["waiting"]
    assert len(waiting) == 2 and not any(name.startswith("engine/") for name in waiting[0]["metrics"])
    rough, others = made(cfg, tmp_path / "b", dies=dies)
    again, rest = made(cfg, tmp_path / "c", found, dies=dies)
    assert rough.feed.lost >= 2 and again.feed.lost >= 1
    for other in (rough, again):
        assert differences(calm.agent.state_dict(), other.agent.state_dict()) == []
        assert differences(calm.feed.state_dict(), other.feed.state_dict()) == []
    assert rows == others and rest == rows[-len(rest) :] and len(rest) == 3
    numbers = [unpack_state(one.state)["next_episode"] for one in calm.feed._now.origins]
    assert [number // 2**40 for number in numbers] == [0, 1, 2]
    streams = [tuple(unpack_state(one.state)["generator"].tolist()) for one in calm.feed._now.origins]
    assert len(set(streams)) == 3


class Versions:
    """The versions of every answer's tokens, and the update that took it."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, list[int]]] = []

    def on_rollout_end(self, trainer: Any, rows: Any, metrics: Any) -> None:
        told = zip(rows["policy_version"], rows["mask"], strict=True)
        self.answers += [(trainer.updates, version[mask].tolist()) for version, mask in told]

    @property
    def lag(self) -> float:
        tokens = [update - version for update, row in self.answers for version in row]
        return sum(tokens) / len(tokens)


def test_in_flight_an_answer_has_the_versions_of_its_tokens_and_rows_are_younger(tmp_path: Path) -> None:
    given = (NEVER, "rollout.staleness=2", "engine=ray", "engine.workers=2")
    flying, still = Versions(), Versions()
    made(composed("language", *given, "engine.in_flight=true"), tmp_path / "a", kind=Flying, callbacks=[flying])
    made(composed("language", *given), tmp_path / "b", kind=Flying, callbacks=[still])
    for update, row in flying.answers:
        assert row == sorted(row) and update - 2 <= row[0] and row[-1] <= update
    late = [row for update, row in flying.answers if update >= 2]
    assert sum(len(set(row)) == 3 for row in late) > len(late) // 4  # two swaps came in six tokens
    assert all(len(set(row)) == 1 for _, row in still.answers)
    assert flying.lag < still.lag - 0.2


# ------------------------------------------------------------------------------------------- parts of a batch


def of(*more: str) -> dict[str, Any]:
    return compose([*DOMAINS["language"], *more], allow=ALLOW)


class Prompts:
    """Of every update, the prompts of its rows in order, and their versions."""

    def __init__(self) -> None:
        self.prompts: list[list[list[int]]] = []
        self.versions: list[set[int]] = []

    def on_rollout_end(self, trainer: Any, rows: Any, metrics: Any) -> None:
        first = rows["mask"].long().argmax(-1)
        self.prompts.append([row[:n].tolist() for row, n in zip(rows["tokens"], first, strict=True)])
        self.versions.append(set(rows["policy_version"][rows["mask"]].tolist()))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_that_share_out_every_batch_make_the_run_without_them_but_for_the_noise_of_sampling(
    workers: int, tmp_path: Path
) -> None:
    parts = ("engine=ray", "engine.order=periodic", f"engine.workers={workers}", NEVER)
    one, other = Prompts(), Prompts()
    still = "policy._target_=ray_cases.StillLM" if workers > 1 else "seed=0"
    here, rows = made(of(NEVER, still), tmp_path / "a", callbacks=[one])
    there, others = made(of(*parts, still), tmp_path / "b", callbacks=[other])
    assert one.prompts == other.prompts and len(one.prompts) == 5
    assert one.versions == other.versions == [{0}, {1}, {2}, {3}, {4}]
    assert differences(here.agent.state_dict(), there.agent.state_dict()) == []
    for row, its in zip(rows, others, strict=True):
        whole = [key for key in row if workers == 1 or "reward_p" not in key]  # quantiles are those of the parts
        assert row.keys() == its.keys() and {k: its[k] for k in whole} == pytest.approx({k: row[k] for k in whole})


def test_parts_are_collected_again_when_workers_die_and_a_run_is_resumed(tmp_path: Path) -> None:
    given = ("engine=ray", "engine.order=periodic", "engine.workers=3")
    calm, rows = made(composed("language", *given, "checkpoint_every=32", "keep_checkpoints=9"), tmp_path / "a")
    found = checkpoints(tmp_path / "a" / "checkpoints")[0]
    asked: list[int] = []

    def dies(worker: int) -> bool:
        asked.append(worker)
        return len(asked) % 4 == 2

    rough, others = made(composed("language", *given, NEVER), tmp_path / "b", dies=dies)
    again, rest = made(composed("language", *given, NEVER), tmp_path / "c", found, dies=dies)
    assert rough.feed.lost >= 2 and again.feed.lost >= 1
    for other in (rough, again):
        assert differences(calm.agent.state_dict(), other.agent.state_dict()) == []
        assert differences(calm.feed.state_dict(), other.feed.state_dict()) == []
    assert rows == others and rest == rows[-len(rest) :] and len(rest) == 3
