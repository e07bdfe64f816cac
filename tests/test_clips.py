"""Pictures of an episode inside a study's report: of the best run of each domain, small, and never in the way."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_report import make_run, study

import unified_rl as ur
from unified_rl.errors import ConfigError
from unified_rl.study import clips
from unified_rl.study.report import write_report
from unified_rl.study.results import RunData
from unified_rl.training import video
from unified_rl.training.run import train

SMALL = ["policy=gaussian", "policy.hidden=[8]", "agent=ppo", "agent.critic_hidden=[8]", "rollout.num_envs=2",
         "rollout.horizon=8", "steps=32", "eval_episodes=2", "progress=false", "env.max_steps=10"]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunData]:
    """Three runs of a domain of control, of which the second ends best and the third left nothing."""
    folder = train(ur.compose(["env=two_route", *SMALL, f"run_dir={tmp_path_factory.mktemp('clips') / 'run'}"]))
    made = [make_run("point", "ppo", 0, 1), make_run("point", "tis", 0, 2, lift=1.0), make_run("point", "tis", 0, 3)]
    gone, best = (RunData(one.labels, one.rows, at) for one, at in zip(made, (folder / "gone", folder), strict=False))
    return [gone, best, made[2], make_run("language", "ppo", 0, 1)]


def test_the_report_shows_an_episode_of_the_best_run(runs: list[RunData], tmp_path: Path) -> None:
    page = write_report(study(tmp_path), runs, command="unified-rl compare").read_text()
    (uri,) = re.findall(r'src="data:image/jpeg;base64,([^"]*)"', page)
    assert len(uri) < 100_000 and "correction tis, staleness 0, seed 2" in page and ": 10 steps, return" in page
    shown = Image.open(io.BytesIO(base64.b64decode(uri)))
    assert shown.size == (3 * clips.WIDTH, 2 * 180) and np.asarray(shown).std() > 10
    assert (tmp_path / "clip-point.jpg").read_bytes() == base64.b64decode(uri)
    assert page.index("An episode: point") < page.index("How it was made")


def test_where_nothing_can_be_drawn_the_report_says_why(
    runs: list[RunData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (ConfigError("no renderer here"), RuntimeError("a driver\nfell over")):

        def failing(*given: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(video, "strip", failing)
        page = write_report(study(tmp_path), runs, command="unified-rl compare").read_text()
        assert "data:image/jpeg" not in page
        assert (
            f"No pictures of point: {'no renderer here' if isinstance(error, ConfigError) else 'RuntimeError: a dr'}"
            in page
        )


def test_a_long_episode_needs_few_pictures() -> None:
    class Stage:
        num_envs, frames_per_second, drawn = 1, 20.0, 0

        def render_lane(self, lane: int) -> np.ndarray:
            self.drawn += 1
            return np.full((16, 20, 3), step % 256, np.uint8)

    stage = Stage()
    film = video.Strip(stage, 6)
    watch = video.Watch(stage, film)
    for step in range(1001):
        watch.history[0] = [0.0] * (step + 1)
        film.shoot(watch, step == 1000)
    shown = [int(picture[-1, -1, 0]) for picture in film.pictures()]
    assert len(shown) == 6 and shown[0] == 0 and shown[-1] == 1000 % 256 and stage.drawn < 80


def test_pictures_that_compress_badly_stay_small() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 240, 320, 3), dtype=np.uint8)
    assert len(clips.page(noise)) <= clips.LARGEST
