"""What a policy does, to look at: a grid of episodes as a film, and their returns over time as a plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unified_rl.errors import ConfigError, EnvError, UnifiedRLError
from unified_rl.files import replacing
from unified_rl.instantiate import locate, parameters
from unified_rl.interop.guard import name_of
from unified_rl.interop.words import describe, one_line
from unified_rl.protocols import ControlEnv, Renders, StepResult
from unified_rl.training.build import Job
from unified_rl.training.evaluation import evaluate_control
from unified_rl.training.seeding import generator

Picture: TypeAlias = NDArray[np.uint8]
"""``[H, W, 3]``."""
TILES = 9
"""Episodes that are shown at most, of those that are evaluated."""
WIDEST = 320
"""Pixels that a tile is wide at most."""
NARROWEST = 160
"""Pixels that it is wide at least, for the words over it."""
FASTEST = {".mp4": 30.0, ".gif": 15.0}
"""Pictures a second at most: of an environment that makes more steps a second, every second or third is shown."""
LONGEST_GIF = 600
"""Pictures of a GIF at most, all of which are held in memory."""
HOLD = 1.0
"""Seconds that the last picture stays."""
GREEN, RED, GREY = (70, 190, 90), (220, 70, 60), (150, 150, 150)


def check_pictures(job: Job, video: str | None, plot: str | None) -> None:
    """Refuses what cannot be drawn, before anything is played.

    Raises:
        ConfigError: a name of another kind, a package that is missing, or a run of language.
    """
    for option, name, kinds in (("--video", video, tuple(FASTEST)), ("--plot", plot, (".png", ".svg", ".pdf"))):
        if name is None:
            continue
        if Path(name).suffix not in kinds:
            raise ConfigError(f"{option} {name} must end in {' or '.join(kinds)}")
        if job.language:
            raise ConfigError(f"{option} shows episodes of control; of language, read them: unified-rl samples RUN")
    if video is not None and Path(video).suffix == ".mp4":
        try:
            import imageio_ffmpeg  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"--video {video} needs imageio-ffmpeg: pip install 'unified-rl[video]', or name it .gif"
            ) from error


def show(job: Job, video: str | None = None, plot: str | None = None) -> int:
    """Plays the episodes that the run's evaluation plays first, and draws :data:`TILES` of them at most.

    Args:
        job: a run with its policy.
        video: ``.mp4`` or ``.gif`` to write.
        plot: ``.png``, ``.svg`` or ``.pdf`` of returns over time to write.

    Returns:
        How many episodes.

    Raises:
        ConfigError: as :func:`check_pictures`, an environment that draws nothing, or no renderer on this machine.
        EnvError: an environment that draws something else than a picture.
        CheckpointError: a file cannot be written.
    """
    check_pictures(job, video, plot)
    watch = _played(job, TILES, lambda stage: _film(stage, video), pictures=video is not None)
    if plot is not None:
        plot_returns(watch, Path(plot), str(job.cfg.get("name") or name_of(watch.stage)))
    return len(watch.alive)


def strip(job: Job, count: int = 6) -> tuple[list[Picture], Watch]:
    """Pictures of the first episode of the run's evaluation, evenly over it, and how it went.

    Args:
        job: a run of control with its policy.
        count: pictures at most; the first is of the start and the last of the end.

    Raises:
        ConfigError: an environment that draws nothing, or no renderer on this machine.
        EnvError: an environment that draws something else than a picture.
    """

    def film(stage: Any) -> AbstractContextManager[Film]:
        if not isinstance(stage, Renders):
            raise ConfigError(f"{name_of(stage)} draws no pictures")
        return nullcontext(Strip(stage, count))

    watch = _played(job, 1, film, pictures=True)
    assert isinstance(watch.film, Strip)
    return watch.film.pictures(), watch


def _played(job: Job, most: int, film: Callable[[Any], AbstractContextManager[Film]], *, pictures: bool) -> Watch:
    """Plays what the run's evaluation plays first, in as many simulations, and follows ``most`` of these episodes."""
    env = _environment(job, pictures)
    count, stage = min(env.num_envs, job.episodes), innermost(env)
    seed, stream = job._integer("evaluation"), generator(job.seed, "evaluation", job.device)
    greedy, device = job.settings.eval_deterministic, str(job.device)
    try:
        with film(stage) as taken:
            watch = Watch(stage, taken, min(most, count))
            with watch.watching(), torch.random.fork_rng(devices=[]):
                evaluate_control(env, job.policy, seed, stream, greedy, device, count)
    finally:
        if hasattr(env, "close"):
            env.close()
    return watch


def _environment(job: Job, pictures: bool) -> Any:
    """An environment of its own, like the evaluation's, whose copies draw."""
    own = job.cfg
    node = dict(own["env"])
    taken = parameters(locate(node["_target_"], job.allow), job.allow)[0]
    if pictures and "make_kwargs" in taken:
        node["make_kwargs"] = {**(node.get("make_kwargs") or {}), "render_mode": "rgb_array"}
    elif pictures and "render_mode" in taken:  # a factory of the user's
        node["render_mode"] = "rgb_array"
    job.cfg = {**own, "env": node}
    try:
        return job.evaluation_env()
    finally:
        job.cfg = own


def innermost(env: Any) -> Any:
    """The environment inside chunks and other wrappers, which makes one step at a time."""
    while isinstance(getattr(env, "inner", None), ControlEnv):
        env = env.inner
    return env


class Film(Protocol):
    """Takes pictures in."""

    def shoot(self, watch: Watch, last: bool) -> None:
        """Is told after every step, and before the first."""
        ...


class NoFilm:
    """Takes nothing in."""

    def shoot(self, watch: Watch, last: bool) -> None:
        """Does nothing."""


class Watch:
    """Follows the first episode of the first ``K`` simulations, step by step, also inside a chunk.

    Args:
        stage: the environment that makes the steps.
        film: is told after each of them.
        count: K; all of them by default.

    Attributes:
        alive: ``[K]`` bool, whose first episode goes on.
        moved: ``[K]`` bool, who made the last step of it.
        returns: ``[K]`` undiscounted so far.
        success: ``[K]``; NaN where nobody said.
        history: of each simulation, its return after every step.
    """

    def __init__(self, stage: Any, film: Film, count: int | None = None) -> None:
        self.stage, self.film = stage, film
        count = stage.num_envs if count is None else count
        self.alive = np.ones(count, dtype=bool)
        self.moved = np.ones(count, dtype=bool)
        self.returns = np.zeros(count)
        self.success = np.full(count, np.nan)
        self.history: list[list[float]] = [[0.0] for _ in range(count)]
        self._begun = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it, the environment's steps are followed."""
        name = "advance" if hasattr(self.stage, "advance") else "step_batch"
        step: Callable[..., StepResult] = getattr(self.stage, name)

        def watched(action: Tensor, *running: Tensor | None) -> StepResult:
            if not self._begun:
                self.film.shoot(self, False)
                self._begun = True
            result = step(action, *running)
            self._follow(result, running[0] if running else None)
            return result

        setattr(self.stage, name, watched)
        try:
            yield
        finally:
            delattr(self.stage, name)

    def _follow(self, result: StepResult, running: Tensor | None) -> None:
        if not self.alive.any():
            return
        first = slice(len(self.alive))
        self.moved = self.alive & (True if running is None else running[first].numpy())
        self.returns += np.where(self.moved, result.plain_reward[first].double().numpy(), 0.0)
        ended = self.moved & (result.terminated | result.truncated)[first].numpy()
        if "success" in result.info:
            self.success = np.where(ended, result.info["success"][first].double().numpy(), self.success)
        for lane in np.flatnonzero(self.moved).tolist():
            self.history[lane].append(float(self.returns[lane]))
        self.alive = self.alive & ~ended
        self.film.shoot(self, not self.alive.any())


class Grid:
    """Pictures of all episodes beside one another, to a writer.

    Args:
        stage: draws simulations.
        write: takes one picture.
        stride: steps between two pictures.
    """

    def __init__(self, stage: Renders, write: Callable[[Picture], None], stride: int) -> None:
        self.stage, self.write, self.stride = stage, write, stride
        self.tiles: dict[int, Any] = {}
        self._steps = 0

    def shoot(self, watch: Watch, last: bool) -> None:
        """Draws who moved, in every ``stride``-th step, and who ended."""
        due = self._steps % self.stride == 0 or last
        self._steps += 1
        resets_itself = not hasattr(self.stage, "advance")  # then what stands there is the next episode
        for lane in np.flatnonzero(watch.moved & (due | ~watch.alive)).tolist():
            drawn = self.tiles.get(lane) if resets_itself and not watch.alive[lane] else None
            self.tiles[lane] = self._picture(lane) if drawn is None else drawn
        if due:
            self.write(self._together(watch))

    def _picture(self, lane: int) -> Any:
        from PIL import Image

        try:
            drawn = self.stage.render_lane(lane)
        except UnifiedRLError:
            raise
        except Exception as error:
            raise EnvError(f"{name_of(self.stage)} raised while it drew: {one_line(error)}") from error
        if not isinstance(drawn, np.ndarray) or drawn.dtype != np.uint8 or drawn.ndim != 3 or drawn.shape[2] != 3:
            raise EnvError(f"{name_of(self.stage)} drew {describe(drawn)}; a picture [H, W, 3] of uint8 is expected")
        tile = Image.fromarray(drawn)
        if tile.width > WIDEST:
            return tile.resize((WIDEST, round(tile.height * WIDEST / tile.width)))
        times = -(-NARROWEST // tile.width)  # whole pixels, so that small drawings stay sharp
        return tile.resize((times * tile.width, times * tile.height), Image.Resampling.NEAREST)

    def _together(self, watch: Watch) -> Picture:
        from PIL import Image

        count = len(watch.alive)
        columns = math.ceil(math.sqrt(count))
        width, height = self.tiles[0].size
        size = (columns * width, -(-count // columns) * height)
        page = Image.new("RGB", (size[0] + size[0] % 2, size[1] + size[1] % 2))  # video codecs want even numbers
        for lane, tile in self.tiles.items():
            page.paste(labelled(tile, watch, lane), (lane % columns * width, lane // columns * height))
        return np.asarray(page)


class Strip(Grid):
    """A few pictures of the first simulation, however long its episode gets: every second goes when there are many."""

    def __init__(self, stage: Renders, count: int) -> None:
        self._kept: list[Picture] = []
        self.count = count
        super().__init__(stage, self._kept.append, 1)

    def shoot(self, watch: Watch, last: bool) -> None:
        """As :meth:`Grid.shoot`."""
        super().shoot(watch, last)
        if len(self._kept) > 2 * self.count and not last:
            del self._kept[1::2]
            self.stride *= 2

    def pictures(self) -> list[Picture]:
        """``count`` at most, evenly."""
        at = np.linspace(0, len(self._kept) - 1, min(self.count, len(self._kept)))
        return [self._kept[round(float(place))] for place in at]


def labelled(tile: Any, watch: Watch, lane: int) -> Any:
    """A tile with the episode's number, step and return over it, and how it ended."""
    from PIL import ImageDraw, ImageFont

    out = tile.copy()
    pen, font = ImageDraw.Draw(out), ImageFont.load_default(12)
    success = watch.success[lane]
    lines = [f"episode {lane + 1}", f"step {len(watch.history[lane]) - 1}", f"return {watch.returns[lane]:.2f}"]
    if not watch.alive[lane]:
        lines.append("ended" if math.isnan(success) else "success" if success > 0 else "failure")
        color = GREY if math.isnan(success) else GREEN if success > 0 else RED
        pen.rectangle((0, 0, out.width - 1, out.height - 1), outline=color, width=3)
    text = "   ".join(lines) if out.width >= 220 else "\n".join(lines)
    box = pen.multiline_textbbox((6, 5), text, font=font)
    pen.rectangle((box[0] - 3, box[1] - 2, box[2] + 3, box[3] + 2), fill=(0, 0, 0))
    pen.multiline_text((6, 5), text, font=font, fill=(255, 255, 255))
    return out


@contextmanager
def _film(stage: Any, video: str | None) -> Iterator[Film]:
    if video is None:
        yield NoFilm()
        return
    if not isinstance(stage, Renders):
        raise ConfigError(
            f"--video: {name_of(stage)} draws no pictures; Gymnasium environments and MuJoCo models do, and one of "
            "your own with frames_per_second and render_lane(lane) -> [H, W, 3] uint8"
        )
    path, speed = Path(video), float(stage.frames_per_second)
    stride = max(1, math.ceil(speed / FASTEST[path.suffix] - 1e-6))
    writer = _mp4 if path.suffix == ".mp4" else _gif
    with writer(path, speed / stride) as write:
        yield Grid(stage, write, stride)


@contextmanager
def _mp4(path: Path, speed: float) -> Iterator[Callable[[Picture], None]]:
    import imageio.v2 as imageio

    with replacing(path) as aside:
        last: list[Picture] = []

        def write(picture: Picture) -> None:
            last[:] = [picture]
            film.append_data(picture)

        film = imageio.get_writer(str(aside), fps=speed, macro_block_size=2)
        try:
            yield write
            for _ in range(round(HOLD * speed)):
                film.append_data(last[0])
        finally:
            film.close()


@contextmanager
def _gif(path: Path, speed: float) -> Iterator[Callable[[Picture], None]]:
    from PIL import Image

    pictures: list[Any] = []

    def write(picture: Picture) -> None:
        if len(pictures) >= LONGEST_GIF:
            del pictures[1::2]  # a long film goes by faster
        pictures.append(Image.fromarray(picture).quantize(128))

    yield write
    with replacing(path) as aside:
        durations = [round(1000 / speed)] * (len(pictures) - 1) + [round(1000 * HOLD)]
        pictures[0].save(aside, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def plot_returns(watch: Watch, path: Path, title: str) -> None:
    """Draws the undiscounted return of every episode over its steps, by how it ended."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    colors: Mapping[bool | None, str] = {None: "0.4", True: "tab:green", False: "tab:red"}
    shown: set[bool | None] = set()
    for lane, history in enumerate(watch.history):
        success = None if math.isnan(watch.success[lane]) else bool(watch.success[lane] > 0)
        label = {None: None, True: "success", False: "failure"}[success] if success not in shown else None
        shown.add(success)
        axes.plot(history, color=colors[success], linewidth=1.2, alpha=0.8, label=label)
        axes.annotate(
            str(lane + 1), (len(history) - 1, history[-1]), textcoords="offset points", xytext=(5, 0), fontsize=8
        )
    axes.set_xlabel("environment step")
    axes.set_ylabel("return so far")
    axes.set_title(f"{title}: {len(watch.history)} episodes")
    if shown - {None}:
        axes.legend(frameon=False)
    with replacing(path) as aside:
        figure.savefig(aside, dpi=150)
