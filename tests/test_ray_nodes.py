"""Nodes of a Ray cluster that join, leave and die while a run goes on (``make scale``): the run stays the same."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_ray import DOMAINS, assert_equal, trained
from ticket_cases import ALLOW, made, read_rows

from unified_rl.config import compose

pytestmark = pytest.mark.skipif(
    not os.environ.get("UNIFIED_RL_SCALE") or importlib.util.find_spec("ray") is None,
    reason="starts Ray, which is slow: make scale",
)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head that runs no workers, as a machine of the learner's own."""
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield found
    found.shutdown()


class Moves:
    """One worker's node leaves after an update, as if told to, the other's dies later; another one joins between."""

    def __init__(self, cluster: Any) -> None:
        self.cluster = cluster
        self.nodes = [self.join() for _ in range(3)]

    def join(self) -> Any:
        return self.cluster.add_node(num_cpus=1, object_store_memory=10**8)

    def on_update_end(self, trainer: Any, metrics: Any) -> None:
        if trainer.updates == 2:
            self.nodes.append(self.join())
        elif trainer.updates in (1, 3):
            above = int(
                Path(f"/proc/{trainer.feed.cluster.told[trainer.updates // 2]['pid']}/stat").read_text().split()[3]
            )
            (node,) = [node for node in self.nodes if above in self.raylets(node)]
            self.nodes.remove(node)
            self.cluster.remove_node(node, allow_graceful=trainer.updates == 1)

    @staticmethod
    def raylets(node: Any) -> list[int]:
        return [one.process.pid for one in node.all_processes["raylet"]]


def test_nodes_that_join_leave_and_die_change_nothing(cluster: Any, tmp_path: Path) -> None:
    given = ("rollout.staleness=2", "engine=ray", "engine.workers=2")
    slow = "engine.env_vars={RAY_CASES_DELAY: '0.2'}"  # so that every worker has something to do whenever
    calm = tmp_path / "calm"
    made(compose([*DOMAINS["control"], *given], allow=ALLOW), calm)  # by workers that live in this process
    moves = Moves(cluster)
    address = f"engine.address='{cluster.address}'"
    run = trained("control", tmp_path / "run", *given, slow, address, "checkpoint_every=1000000", callbacks=[moves])
    assert_equal(calm, run)
    assert read_rows(run / "metrics.jsonl")[-1]["engine/lost_workers"] >= 2
    assert len(moves.nodes) == 2
