"""A control policy as a file: loaded by torch.export or onnxruntime it acts as the policy does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from test_acting import SPACES, made
from torch import Tensor, nn

import unified_rl as ur
from unified_rl.cli import main
from unified_rl.policies.acting import Actor
from unified_rl.policies.base import Policy
from unified_rl.policies.gaussian import GaussianPolicy
from unified_rl.spaces import Space
from unified_rl.training import export_policy as exporting
from unified_rl.training.export_policy import export_policy
from unified_rl.training.run import train

FLOATS, CHOICES, CHUNK = SPACES[0], SPACES[2], SPACES[5]
KINDS = {"autoregressive": (FLOATS, 0), "gaussian": (FLOATS, 1), "tanh_gaussian": (FLOATS, 2), "flow": (CHUNK, 3),
         "diffusion": (FLOATS, 4), "choices": (CHOICES, 0)}  # fmt: skip
ROWS = 5 + 4 * np.random.default_rng(5).normal(size=(33, 3)).astype(np.float32)


@pytest.mark.parametrize("kind", ["autoregressive", "gaussian", "flow", "diffusion"])
def test_torch_export_gives_the_same_actions_for_any_number_of_rows(kind: str, tmp_path: Path) -> None:
    space, number = KINDS[kind]
    path = export_policy(made(space)[number], tmp_path / "policy.pt2")
    held = {exporting.ABOUT: ""}
    loaded = torch.export.load(path, extra_files=held).module()
    expected = made(space)[number](ROWS)
    for count in (1, 2, 33):
        found = loaded(torch.from_numpy(ROWS[:count])).numpy()
        assert found.dtype == expected.dtype and found.shape == (count, *space.action.shape)
        np.testing.assert_allclose(found, expected[:count], rtol=1e-5, atol=1e-5)
    assert len(np.unique(expected, axis=0)) > 1
    assert Space.from_plain(json.loads(held[exporting.ABOUT])["space"]) == space


@pytest.mark.parametrize("kind", ["choices", "tanh_gaussian", "flow", "diffusion"])
def test_onnxruntime_gives_the_same_actions_for_any_number_of_rows(kind: str, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs the extra onnx: pip install 'unified-rl[onnx]'")
    import onnxruntime

    space, number = KINDS[kind]
    path = export_policy(made(space)[number], tmp_path / "policy.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["observation"] and session.get_inputs()[0].shape == ["K", 3]
    assert [o.name for o in session.get_outputs()] == ["action"]
    expected = made(space)[number](ROWS)
    for count in (1, 2, 33):
        found = session.run(None, {"observation": ROWS[:count]})[0]
        assert found.dtype == expected.dtype and found.shape == (count, *space.action.shape)
        np.testing.assert_allclose(found, expected[:count], rtol=1e-5, atol=1e-5)
    held = session.get_modelmeta().custom_metadata_map[exporting.ABOUT]
    assert Space.from_plain(json.loads(held)["space"]) == space
    assert [p.name for p in tmp_path.iterdir()] == ["policy.onnx"], "weights are inside"


class Stubborn(Policy):
    """Its action depends on a Python branch over values."""

    def __init__(self, space: Space, **options: Any) -> None:
        super().__init__(space, **options)
        self.weight = nn.Parameter(torch.ones(1))

    def _deterministic_action(self, observation: Tensor) -> Tensor:
        return observation[:, :2] * (self.weight if observation.sum() > 0 else 2)


def test_what_cannot_be_exported_is_refused_by_name_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mine:
        domain = "control"

        def sample(self, observation: Any, **options: Any) -> Any:
            return TensorDict({"action": observation}, batch_size=[len(observation)])

    with pytest.raises(ur.ConfigError, match="trained a Mine, which cannot be exported"):
        export_policy(Actor(Mine(), FLOATS), tmp_path / "a.pt2")
    with pytest.raises(ur.ConfigError, match="Stubborn cannot be exported"):
        export_policy(Stubborn(FLOATS), tmp_path / "a.pt2")
    monkeypatch.setattr(exporting.FixedNormalizer, "forward", lambda self, observation, moments=None: observation)
    with pytest.raises(ur.ConfigError, match="does not act as the policy does: an action is off by"):
        export_policy(made(FLOATS)[1], tmp_path / "a.pt2")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ur.ConfigError, match=r"pip install 'unified-rl\[onnx\]'"):
        export_policy(GaussianPolicy(FLOATS), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_a_run_is_exported_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(train(ur.compose(["env=two_route", "policy=gaussian", "policy.hidden=[8]", "agent=ppo", "steps=64",
                                "agent.critic_hidden=[8]", "rollout.num_envs=2", "rollout.horizon=8", "eval_episodes=1",
                                "progress=false", f"run_dir={tmp_path / 'run'}"])))  # fmt: skip
    target = tmp_path / "policy.pt2"
    capsys.readouterr()
    assert main(["export", run, str(target)]) == 0
    assert capsys.readouterr().out.strip() == f"policy file: {target}"
    rows = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    found = torch.export.load(target).module()(torch.from_numpy(rows)).numpy()
    np.testing.assert_allclose(found, ur.load_policy(run)(rows), atol=1e-5)
    for words, message in (
        ([run, str(target)], "exists: export writes a new file"),
        ([run, str(tmp_path / "b.pt2"), "--merge"], "--merge and --dtype are of language models"),
        ([run, str(tmp_path / "folder")], "name it FILE.pt2 (torch.export) or FILE.onnx"),
        ([run, str(tmp_path / "b.onnx"), "--checkpoint", "77"], "has no checkpoint 77"),
    ):
        assert main(["export", *words]) == 2
        line = capsys.readouterr().err.strip()
        assert message in line and "\n" not in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["env.make_kwargs={shown: dictionary}"], "or train with env.flatten=true"),
        (["env.make_kwargs={shown: dictionary}", "env.frame_stack=2"], "or train with env.flatten=true"),
    ],
)
def test_a_run_that_sees_no_vector_is_told_what_does(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make = ["env.make=test_env_wrappers:Seen", "env.max_episode_steps=8"]
    cfg = ur.compose(["env=gymnasium", "env.id=null", *make, *options, "policy.hidden=[8]", "agent=ppo", "updates=1",
                      "agent.critic_hidden=[8]", "rollout.num_envs=2", "rollout.horizon=8", "eval_episodes=1",
                      "progress=false", f"run_dir={tmp_path / 'run'}"], allow=["test_env_wrappers"])  # fmt: skip
    run = str(train(cfg, allow=["test_env_wrappers"]))
    capsys.readouterr()
    assert main(["export", run, str(tmp_path / "a.pt2"), "--allow", "test_env_wrappers"]) == 2
    line = capsys.readouterr().err.strip()
    assert line.endswith(words) and "\n" not in line
