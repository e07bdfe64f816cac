"""Episodes as a film and as a plot: what is drawn is what was played, without a display."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from PIL import Image

import unified_rl as ur
from unified_rl.cli import main
from unified_rl.envs.control import rendering
from unified_rl.envs.control.two_route import SCALE, TwoRoute
from unified_rl.training import evaluation, video
from unified_rl.training.run import train

SMALL = ["policy.hidden=[8]", "agent=ppo", "agent.critic_hidden=[8]", "rollout.num_envs=2", "rollout.horizon=8",
         "steps=32", "eval_episodes=3", "progress=false"]  # fmt: skip


class Lamp(gymnasium.Env[Any, Any]):
    """Glows brighter with every step, ends by itself after 4 to 6, and draws without a graphics library."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.step_count, self.last = 0, int(self.np_random.integers(4, 7))
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> Any:
        self.step_count += 1
        over = self.step_count == self.last
        return np.ones(2, np.float32) * 0.1, 1.0, over, False, {"is_success": self.last == 4} if over else {}

    def render(self) -> Any:
        return np.full((48, 64, 3), 40 * self.step_count, np.uint8)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    gymnasium.register("Lamp-v0", entry_point=Lamp, max_episode_steps=20)
    root = tmp_path_factory.mktemp("video")
    tasks = {
        "lamp": ["env=gymnasium", "env.id=Lamp-v0", "policy=gaussian"],
        "route": ["env=two_route", "policy=gaussian", "env.max_steps=10"],
        "pole": ["env=inverted_pendulum", "policy=gaussian", "env.options={max_steps: 6}"],
    }
    return {name: str(train(ur.compose([*SMALL, *task, f"run_dir={root / name}"]))) for name, task in tasks.items()}


def pictures(path: Path) -> list[np.ndarray]:
    with Image.open(path) as film:
        found = []
        for index in range(film.n_frames):
            film.seek(index)
            found.append(np.asarray(film.convert("RGB")))
        return found


def test_a_gif_shows_every_step_of_every_episode_until_its_end(
    runs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["evaluate", runs["lamp"], "--video", str(tmp_path / "a.gif"), "--plot", str(tmp_path / "a.png")]) == 0
    out = capsys.readouterr().out
    assert f"video                        {tmp_path / 'a.gif'}" in out and "eval/score" in out
    found = pictures(tmp_path / "a.gif")
    assert found[0].shape == (2 * 144, 2 * 192, 3), "three tiles, three times as large, in a grid of two by two"
    corners = np.array([[f[130, 100, 0], f[130, 292, 0], f[274, 100, 0]] for f in found]).astype(float)
    lasts = corners.max(0) / 40
    assert len(found) == round(lasts.max()) + 1 and np.all(corners[0] < 10)
    assert set(np.round(lasts).astype(int).tolist()) <= {4, 5, 6}
    for lane, last in enumerate(np.round(lasts).astype(int).tolist()):
        expected = 40 * np.minimum(np.arange(len(found)), last)
        assert np.abs(corners[:, lane] - expected).max() < 8, "it stands still behind its end"
    assert Image.open(tmp_path / "a.png").size[0] > 300
    scores = ur.Run(runs["lamp"]).evaluate()
    assert scores["eval/length"] == pytest.approx(np.round(lasts).mean()), "the episodes of the evaluation"


@pytest.mark.parametrize(("run", "episodes"), [("route", 12), ("lamp", 20)])
def test_what_is_shown_is_what_the_evaluation_plays_first(
    run: str, episodes: int, runs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched: list[video.Watch] = []
    played: list[list[float]] = []
    monkeypatch.setattr(video, "plot_returns", lambda watch, *more: watched.append(watch))
    plain = evaluation._play_round

    def noted(*given: Any) -> Any:
        out = plain(*given)
        played.append(out[0]["return"].tolist())
        return out

    monkeypatch.setattr(evaluation, "_play_round", noted)
    ur.evaluate(runs[run], plot=tmp_path / "a.png", episodes=episodes)
    assert len(watched[0].returns) == video.TILES < len(played[1]) and len(set(played[1])) > 1
    assert watched[0].returns.tolist() == pytest.approx(played[1][: video.TILES]), "those of the evaluation behind it"


def test_an_episode_s_end_return_and_success_are_over_its_tile() -> None:
    class Stage:
        num_envs = 1

    watch = video.Watch(Stage(), video.NoFilm())
    tile = Image.new("RGB", (192, 144), (10, 10, 10))
    running = np.asarray(video.labelled(tile, watch, 0))
    assert (running == 255).any(), "there is text"
    watch.alive[0] = False
    frames = {}
    for name, success in (("ended", np.nan), ("success", 1.0), ("failure", 0.0)):
        watch.success[0] = success
        frames[name] = tuple(np.asarray(video.labelled(tile, watch, 0))[143, 30].tolist())
    assert frames == {"ended": video.GREY, "success": video.GREEN, "failure": video.RED}
    assert np.asarray(tile).max() == 10, "the tile itself is as it was"


def test_chunks_are_filmed_step_by_step_and_drawn_without_a_graphics_library(
    runs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering.Camera, "__init__", lambda *unused: pytest.fail("no renderer is needed"))
    watched: list[video.Watch] = []
    plain = video.plot_returns
    monkeypatch.setattr(video, "plot_returns", lambda watch, *more: (watched.append(watch), plain(watch, *more))[1])
    film, plot = tmp_path / "route.gif", tmp_path / "route.svg"
    scores = ur.evaluate(runs["route"], video=film, plot=plot, episodes=2)
    assert [len(history) - 1 for history in watched[0].history] == [10, 10], "environment steps, not decisions"
    assert np.mean(watched[0].returns) == pytest.approx(scores["eval/return"], abs=1e-5)
    assert len(pictures(film)) == 6, "20 steps a second, 10 pictures a second"
    assert "<svg" in plot.read_text()[:600]
    data = type("Data", (), {"qpos": np.array([0.5, 0.3])})()
    drawn = TwoRoute().draw(data)
    x, y = round(160 + SCALE * 0.5), round(120 - SCALE * 0.3)
    assert drawn[y, x].tolist() == [50, 90, 220] and drawn[120, 160].tolist() == [205, 80, 80]


def test_mp4_has_the_length_that_the_steps_took(runs: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg", reason="needs the extra video: pip install 'unified-rl[video]'")
    import imageio.v2 as imageio

    ur.evaluate(runs["lamp"], video=tmp_path / "lamp.mp4", episodes=1)
    with imageio.get_reader(tmp_path / "lamp.mp4") as film:
        about = film.get_meta_data()
        shown = [np.asarray(picture) for picture in film]
    assert about["fps"] == 10 and shown[0].shape == (144, 192, 3)
    values = [picture[130, 100].mean() for picture in shown]
    assert len(shown) in (15, 16, 17) and values[0] < 15 and values[4] == pytest.approx(160, abs=12)


def test_many_steps_a_second_are_shown_in_strides(runs: dict[str, str]) -> None:
    written: list[np.ndarray] = []

    class Stage:
        num_envs, frames_per_second = 2, 60.0

        def advance(self, action: Any, running: Any = None) -> Any:
            raise AssertionError

        def render_lane(self, lane: int) -> Any:
            return np.zeros((10, 12, 3), np.uint8)

    stage = Stage()
    grid = video.Grid(stage, written.append, 3)
    watch = video.Watch(stage, grid)
    for step in range(7):
        grid.shoot(watch, step == 6)
    assert len(written) == 3 and written[0].shape == (140, 336, 3)
    grid.shoot(watch, True)
    assert len(written) == 4, "the last one is always shown"


def test_mujoco_s_own_pictures(runs: dict[str, str], tmp_path: Path) -> None:
    import mujoco

    try:
        rendering.Camera(mujoco.MjModel.from_xml_string("<mujoco/>"), (16, 16)).close()
    except ur.ConfigError as error:
        pytest.skip(str(error))
    ur.evaluate(runs["pole"], video=tmp_path / "pole.gif", episodes=2)
    found = pictures(tmp_path / "pole.gif")
    assert found[0].shape == (240, 640, 3) and found[0].std() > 5, "a picture of something"


def test_one_line_says_that_no_renderer_is_there(
    runs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import mujoco

    def broken(*unused: Any) -> None:
        raise RuntimeError("libEGL.so.1 is missing")

    monkeypatch.setattr(mujoco, "Renderer", broken)
    assert main(["evaluate", runs["pole"], "--video", str(tmp_path / "a.gif")]) == 2
    line = capsys.readouterr().err.strip()
    assert "no offscreen renderer for MuJoCo" in line and "MUJOCO_GL=osmesa" in line and "\n" not in line
    assert "libEGL.so.1 is missing" in line and not list(tmp_path.iterdir())


def test_what_cannot_be_drawn_is_refused_before_anything_is_played(
    runs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(video, "evaluate_control", lambda *unused: pytest.fail("something was played"))
        patch.setitem(sys.modules, "imageio_ffmpeg", None)
        for options, message in (
            (["--video", "a.avi"], "--video a.avi must end in .mp4 or .gif"),
            (["--plot", "a.jpg"], "--plot a.jpg must end in .png or .svg or .pdf"),
            (["--video", "a.mp4"], "pip install 'unified-rl[video]', or name it .gif"),
        ):
            assert main(["evaluate", runs["lamp"], *options]) == 2
            line = capsys.readouterr().err.strip()
            assert message in line and "\n" not in line
    with pytest.raises(ur.ConfigError, match="--plot shows episodes of control; of language, read them"):
        video.check_pictures(type("Job", (), {"language": True})(), None, "a.png")  # type: ignore[arg-type]
    monkeypatch.setattr(Lamp, "render", lambda self: None)
    assert main(["evaluate", runs["lamp"], "--video", str(tmp_path / "a.gif")]) == 2
    assert "Lamp-v0 drew None (NoneType); a picture [H, W, 3] of uint8 is expected" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_environment_of_one_s_own_draws_or_is_refused(tmp_path: Path) -> None:
    class Silent:
        domain, num_envs, max_steps = "control", 1, 3

    with (
        pytest.raises(ur.ConfigError, match=r"Silent draws no pictures; .*render_lane\(lane\)"),
        video._film(Silent(), str(tmp_path / "a.gif")),
    ):
        pass


def test_the_tensors_of_a_watched_step_go_on_unchanged() -> None:
    from unified_rl.envs.control import TwoRouteEnv

    plain, watched = TwoRouteEnv(2, seed=3), TwoRouteEnv(2, seed=3)
    action = torch.rand(2, 8, generator=torch.Generator().manual_seed(0))
    watch = video.Watch(video.innermost(watched), video.NoFilm())
    plain.reset_batch(1), watched.reset_batch(1)
    with watch.watching():
        for _ in range(3):
            one, other = plain.step_batch(action), watched.step_batch(action)
            assert torch.equal(one.observation, other.observation) and torch.equal(one.reward, other.reward)
    assert len(watch.history[0]) > 4 and "advance" not in vars(video.innermost(watched))
