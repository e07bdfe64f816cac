"""What somebody else's files may do: nothing. Each ends in one line that says what is wrong, and nothing has run.

A canary is a file that every attack here would make. It never appears.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tensordict import NonTensorData

from unified_rl import cli
from unified_rl import config as configuration
from unified_rl.errors import CheckpointError, ConfigError, UnifiedRLError
from unified_rl.files import MANIFEST, Manifest
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.replay import Replay, Uniform, read_rows
from unified_rl.replay.files import read_meta, write_meta

CANARY = "canary"
SECRET = "sEcReT-0123456789"
SECONDS = 30
"""Of one case on a busy machine."""

SMALL = [
    "env=two_route",
    "policy=gaussian",
    "policy.hidden=[4]",
    "agent=policy_gradient",
    "agent.critic_hidden=[4]",
    "correction=reinforce",
    "rollout.num_envs=2",
    "rollout.horizon=4",
    "steps=16",
    "checkpoint_every=8",
    "eval_every=0",
    "eval_episodes=1",
    "progress=false",
]
GYM = ["--cfg", "env=gymnasium", "env.id=Pendulum-v1", "agent=ppo"]
TEXT = ["--cfg", "env=chain_mod", "policy=causal_lm_tiny", "correction=grpo"]


class Attack:
    """Makes the canary when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return os.mkdir, (os.path.abspath(CANARY),)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two checkpoints, whose files each case changes in a copy."""
    folder = tmp_path_factory.mktemp("hostile")
    assert cli.main(["train", *SMALL, f"run_dir={folder / 'run'}"]) == 0
    return folder / "run"


_compose_groups = configuration._compose_groups
_composed: dict[str, Any] = {}


def composed_once(chosen: Any, primary: str, config_dirs: Any, groups: Any) -> dict[str, Any]:
    """Hydra's part of composing, done once for the same options of the library: it takes most of a case's time."""
    if config_dirs:
        return _compose_groups(chosen, primary, config_dirs, groups)
    key = repr((chosen, primary))
    if key not in _composed:
        _composed[key] = _compose_groups(chosen, primary, config_dirs, groups)
    return deepcopy(_composed[key])


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder with a module that makes the canary when it is imported, and a secret in the environment."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "canary_module.py").write_text("import os\nos.mkdir('canary')\n\nclass Env: ...\n")
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setenv("HOSTILE_SECRET", SECRET)
    monkeypatch.setattr(configuration, "_compose_groups", composed_once)
    monkeypatch.delenv(cli.DEBUG, raising=False)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    with at_most(SECONDS):
        yield
    sys.modules.pop("canary_module", None)
    assert not Path(CANARY).exists(), "something ran"


class Late(BaseException):
    """No error that anybody mends."""


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Ends what waits for a pipe that nobody writes to, or unfolds without end."""

    def late(*unused: object) -> None:
        signal.alarm(1)  # once more, where somebody catches it
        raise Late(f"not refused within {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line with which a command refuses."""
    capsys.readouterr()
    code = cli.main(list(argv))
    out, err = capsys.readouterr()
    assert code == 2, f"ended with {code}: {out}{err}"
    lines = [line for line in err.splitlines() if line.startswith("unified-rl: ")]
    assert len(lines) == 1 and "Traceback" not in err + out and len(lines[0]) < 1500, err
    assert SECRET not in out + err
    for file in (file for file in Path().rglob("*") if file.is_file() and not file.is_symlink()):
        assert SECRET.encode() not in file.read_bytes(), file
    return lines[0]


# ------------------------------------------------------------------------------------------- what a node may name

RUNS = [
    "os.system",
    "os.mkdir",
    "posix.mkdir",
    "builtins.eval",
    "builtins.exec",
    "subprocess.getoutput",
    "shutil.rmtree",
    "importlib.import_module",
    "functools.partial",
    "pickle.loads",
    "torch.load",
    "torch.hub.load",
    "numpy.load",
    "yaml.unsafe_load",
    "canary_module.Env",
    "unified_rl.train",
    "unified_rl.resume",
    "unified_rl.compare",
    "unified_rl.load_policy",
    "unified_rl.training.run.resume",
    "unified_rl.training.run.record_dataset",
    "unified_rl.training.provenance.write_run",
    "unified_rl.study.compare.compare",
    "unified_rl.study.workers.run_jobs",
    "unified_rl.study.lab.run.lab",
    "unified_rl.replay.persist.save",
    "unified_rl.instantiate.importlib.import_module",
    "unified_rl.cli.os.mkdir",
    "unified_rl.envs.language.scoring_worker.main",
    "unified_rl.policies.causal_lm.CausalLM.save",
]
"""Targets that run, load or write something."""


@pytest.mark.parametrize("target", RUNS)
def test_no_node_names_what_runs(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    node = f"{{_target_: {target}, path: canary, run: x, allow: [os]}}"
    line = refused(capsys, "train", *GYM, f"env.make_kwargs={{x: {node}}}")
    assert "env.make_kwargs.x._target_" in line and target in line


DEEP = "{_target_: os.mkdir, path: canary}"
VERB = "{_target_: unified_rl.training.run.resume, run: x, allow: [os]}"
PLACES = {
    "a part itself": [*GYM, "env._target_=unified_rl.training.run.resume"],
    "in a list": [*GYM, f"env.make_kwargs={{x: [1, [{DEEP}]]}}"],
    "in a mapping of mappings": [*GYM, f"env.make_kwargs={{x: {{y: {{z: {VERB}}}}}}}"],
    "inside a harmless part": [*GYM, f"env.make_kwargs={{x: {{_target_: unified_rl.replay.Uniform, y: {DEEP}}}}}"],
    "a sampler": [*GYM, f"replay.sampler={VERB}"],
    "a mixture's sampler": [*GYM, "replay=mixture", f"+replay.sampler.samplers={{online: {VERB}}}".lstrip("+")],
    "options of another library": ["--cfg", "env=pendulum", "agent=sb3_sac", f"agent.options={{x: {VERB}}}"],
    "sizes of a model": [*TEXT, f"policy.config.x={DEEP}"],
    "a source of rows": [*TEXT, f"rollout.sources={{x: {VERB}}}"],
    "a context of prompts": [*TEXT, f"rollout.context={VERB}"],
    "a kernel": [*GYM, "correction.kernel=unified_rl.training.run.resume"],
    "a kernel's setting": [*GYM, f"correction.kernel={{name: ppo, clip_low: {VERB}}}"],
    "a kernel of another package": [*GYM, "correction.kernel={name: canary_module.Env}"],
    "a level": [*GYM, "correction.level=os.mkdir"],
    "a transform": [*GYM, "correction.pre=unified_rl.replay.persist.save"],
    "a rule of thinning": [*GYM, "correction.thin=canary_module.Env"],
    "a mismatch": [*GYM, "correction.mismatch=[os.mkdir]"],
    "a rejection's level": [*GYM, "correction.reject=[{name: band, low: 0.5, high: 2.0, level: os.mkdir}]"],
    "a penalty": [*GYM, "correction.penalty=[{name: os.mkdir}]"],
    "a penalty's selection": [*GYM, "correction.penalty=[{name: k3, anchor: behavior, select: os.mkdir}]"],
    "a wrapper": [*GYM, "correction.wrapper={name: unified_rl.training.run.resume}"],
    "a term": [*SMALL, "agent.objectives={x: {name: canary_module.Env}}"],
    "a term's kind": [*SMALL, "agent.objectives={x: {name: divergence, anchor: old, kind: os.mkdir}}"],
    "a coefficient": [*SMALL, "agent.objectives={x: {name: entropy, coefficient: {name: os.mkdir}}}"],
    "a gate": [*SMALL, "agent.gates={x: os.mkdir}"],
    "a map": [*SMALL, "agent.maps=[canary_module.Env]"],
    "an anchor": [*SMALL, f"agent.anchors={{x: {VERB}}}"],
    "a warm start": [*SMALL, "warm_start.stages=[]", "warm_start._target_=unified_rl.training.run.resume"],
    "an id that names a module": ["env=gymnasium", "env.id=canary_module:Env-v0", "agent=ppo", "progress=false"],
}


@pytest.mark.parametrize("place", PLACES)
def test_nothing_runs_from_anywhere_in_a_configuration(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, "train", *PLACES[place])


@pytest.mark.parametrize(
    "argv",
    [
        [*GYM, "allow=[os]"],
        [*GYM, "env.allow=[os]", f"env.make_kwargs={{x: {DEEP}}}"],
        [*GYM, "agent.allow=[os]"],
        [*GYM, "correction.allow=[os]"],
        [*GYM, "replay.allow=[os]"],
        [*GYM, "replay.sampler.allow=[os]"],
        [*GYM, f"env.make_kwargs={{allow: [os], x: {DEEP}}}"],
        [*GYM, "choices.allow=[os]"],
        [*GYM, f"env.make_kwargs={{x: {VERB}}}", "--allow", "unified_rl"],
        [*GYM, f"env.make_kwargs={{x: {VERB}}}", "--allow", "unified_rl.training"],
        [*GYM, f"env.make_kwargs={{x: {DEEP}}}", "--allow", "o"],
        [*GYM, f"env.make_kwargs={{x: {DEEP}}}", "--allow", ""],
    ],
)
def test_no_configuration_allows_anything(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, "train", *argv)


# ------------------------------------------------------------------------------------------- files of options

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40))
REFERENCES = "env:\n  _target_: unified_rl.envs.control.TwoRouteEnv\n  make: {a0: lol lol lol\n" + "".join(
    f", a{n}: '${{env.make.a{n - 1}}}${{env.make.a{n - 1}}}'\n" for n in range(1, 40)
)
FILES = {
    "a verb": f"env: {{_target_: unified_rl.envs.control.GymnasiumEnv, id: Pendulum-v1, make_kwargs: {{x: {VERB}}}}}",
    "a study of its own": "env: {_target_: unified_rl.study.compare.compare, cfg: {study: {name: x}}, allow: [os]}",
    "allow beside the groups": "allow: [canary_module]\nenv: {_target_: canary_module.Env}",
    "a python tag": "env: !!python/object/apply:os.mkdir [canary]",
    "a python name": "env: {_target_: !!python/name:os.mkdir ''}",
    "settings of Hydra": "hydra: {job: {env_copy: [HOSTILE_SECRET]}}\nenv: {_target_: unified_rl.envs.TwoRouteEnv}",
    "callbacks of Hydra": f"hydra: {{callbacks: {{x: {DEEP}}}}}",
    "a default outside the folder": "defaults: [../../secret]\nenv: {}",
    "a default by path": "defaults: [override /env: ../../secret]",
    "a default of Hydra": "defaults: [override /hydra/launcher: joblib]",
    "a default from the environment": "defaults: ['override /policy: ${oc.env:HOSTILE_SECRET}']",
    "a default that is a mapping of lists": "defaults: {a: {b: c}}",
    "a secret": "env: {_target_: unified_rl.envs.TwoRouteEnv}\nname: ${oc.env:HOSTILE_SECRET}",
    "a secret in a text": "env: {_target_: unified_rl.envs.TwoRouteEnv}\nrun_dir: x/${oc.env:HOSTILE_SECRET}/y",
    "a decoded secret": "env: {_target_: unified_rl.envs.TwoRouteEnv}\nname: ${oc.decode:${oc.env:HOSTILE_SECRET}}",
    "a created node": "env: ${oc.create:{_target_:os.mkdir}}",
    "a secret of Hydra's": "env: {_target_: unified_rl.envs.TwoRouteEnv}\nname: ${hydra:runtime.cwd}",
    "a resolver by reference": "env: {_target_: unified_rl.envs.TwoRouteEnv}\nname: '${${runs}:HOSTILE_SECRET}'",
    "laughs": LAUGHS,
    "laughs of merges": MERGES,
    "laughs of references": REFERENCES + "  }\n",
    "an alias of itself": "env: &a {_target_: unified_rl.envs.TwoRouteEnv, x: *a}",
    "references in a circle": "env: {_target_: unified_rl.envs.TwoRouteEnv, a: '${env.b}', b: '${env.a}'}",
    "references through each other": "env: {_target_: unified_rl.envs.TwoRouteEnv, a: '${env.b.x}', b: '${env.a.x}'}",
    "depth": "env: " + "[" * 1000,
    "even depth": "env: " + "{x: " * 300 + "1" + "}" * 300,
    "size": "env: [" + "1, " * 200_000 + "1]",
    "a long number": "seed: " + "9" * 5000,
    "no text": "\0\1\2",
    "a list": "[1, 2]",
    "a date": "env: {_target_: unified_rl.envs.TwoRouteEnv}\nname: 2020-01-01",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_options_runs_nothing_and_reads_nothing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("mine/env", "secret"):
        Path(folder).mkdir(parents=True)
    Path("secret.yaml").write_text("# @package _global_\nenv: {_target_: unified_rl.envs.TwoRouteEnv}\n")
    Path("mine/env/own.yaml").write_text(f"# @package _global_\n# Mine\n{FILES[name]}\n")
    line = refused(capsys, "train", "--config-dir", "mine", "env=own", *SMALL[1:])
    assert not FILES[name].startswith("hydra:") or "has the key 'hydra'" in line


def test_a_file_of_options_that_is_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine/env").mkdir(parents=True)
    os.mkfifo("mine/env/own.yaml")
    assert "no regular file" in refused(capsys, "train", "--config-dir", "mine", "env=own", *SMALL[1:])


@pytest.mark.parametrize("text", ["${oc.env:HOSTILE_SECRET}", "a${oc.env:HOSTILE_SECRET}b", "${oc.env:NONE,x}"])
def test_the_command_line_resolves_no_secret_into_files(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for key in ("name", "env.gamma", "policy.activation"):
        assert key in refused(capsys, "train", *SMALL, f"{key}='{text}'")


def test_references_between_keys_still_work(capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        "agent.lam=${.gamma}",
        "agent.gamma=0.75",
        "policy.hidden=[4,${rollout.horizon}]",
        "seed=3",
        "name=s${seed}-\\${x}",
    ]
    assert (
        cli.main(["train", "--cfg", *[o for o in SMALL if "hidden=[4]" not in o], *given, "agent.critic_hidden=[4]"])
        == 0
    )
    found = yaml.safe_load(capsys.readouterr().out)
    assert found["agent"]["lam"] == 0.75 and found["policy"]["hidden"] == [4, 4] and found["name"] == "s3-${x}"


# ------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name",
    [
        "../../esc",
        "..",
        ".",
        "/abs/olute",
        "a/b",
        "a\\\\b",
        ".hidden",
        "a\x00b",
        "a\nb",
        "\x1b[2J",
        "x" * 300,
        "é" * 150,
        " ",
    ],
)
def test_a_name_stays_in_its_folder(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load(_printed(capsys, "train", "--cfg", *SMALL))
    for cfg in ({**config, "name": name}, {**config, "choices": {"env": f"../../{name}"}, "name": name}):
        with pytest.raises(UnifiedRLError, match="name"):
            _train(cfg)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["modules", "work"] and not Path("runs").exists()


def test_a_name_that_is_made_from_a_file_stays_in_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    from unified_rl.training.run import run_folder

    folder = run_folder({"choices": {"env": "../../esc", "agent": "x" * 1000}})
    assert folder.parent == Path("runs") and folder.is_dir()


@pytest.mark.parametrize("key", ["run_dir", "runs"])
def test_a_path_with_a_nul_is_refused(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = {**yaml.safe_load(_printed(capsys, "train", "--cfg", *SMALL)), key: "a\0b"}
    with pytest.raises(UnifiedRLError, match="NUL"):
        _train(cfg)


def _printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert cli.main(list(argv)) == 0
    return capsys.readouterr().out


def _train(cfg: dict[str, Any]) -> None:
    from unified_rl.training.run import train

    train(cfg)


# ------------------------------------------------------------------------------------------- studies

STUDIES: dict[str, dict[str, Any]] = {
    "a name that leaves": {"name": "../../esc"},
    "a hidden name": {"name": ".."},
    "a long name": {"name": "x" * 300},
    "an override that allows": {"overrides": ["allow=[os]"]},
    "an override that runs": {"overrides": [f"env.x={VERB}"]},
    "an override of a kernel": {"overrides": ["correction.kernel=canary_module.Env"]},
    "an override with a secret": {"overrides": ["name='\\${oc.env:HOSTILE_SECRET}'"]},
    "a secret": {"description": "${oc.env:HOSTILE_SECRET}"},
    "a correction that runs": {"corrections": [{"x": ["correction.kernel=os.mkdir"]}]},
    "a correction that is none": {"corrections": [{"x": 5}]},
    "an option outside": {"corrections": ["../../secret"]},
    "a domain that allows": {"domains": {"d": ["env=two_route", "agent.allow=[os]"]}},
    "a domain of a long name": {"domains": {"d" * 300: [o for o in SMALL if not o.startswith("correction")]}},
    "domains that are none": {"domains": ["env=two_route"]},
    "seeds that are none": {"seeds": [{"a": 1}]},
    "another target": {"_target_": "unified_rl.study.compare.compare"},
    "a key more": {"allow": ["os"]},
    "a folder with a NUL": {"folder": "a\0b"},
}


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_runs_nothing_and_stays_in_its_folder(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = {
        "_target_": "unified_rl.study.Study",
        "name": "small",
        "domains": {"d": [o for o in SMALL if not o.startswith("correction")]},
        "corrections": ["reinforce"],
        "workers": 0,
        **STUDIES[name],
    }
    Path("mine/study").mkdir(parents=True)
    Path("mine/study/own.yaml").write_text(f"# @package _global_\n# Mine\n{yaml.safe_dump({'study': study})}")
    refused(capsys, "compare", "--config-dir", "mine", "study=own")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["modules", "work"] and not Path("runs").exists()


# ------------------------------------------------------------------------------------------- run folders


def changed(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    found = change(config)
    (run / "config.yaml").write_text(yaml.safe_dump(config if found is None else found, sort_keys=False))


def in_env(node: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    return lambda cfg: cfg.update(
        env={"_target_": "unified_rl.envs.control.GymnasiumEnv", "id": "Pendulum-v1", "make_kwargs": {"x": node}}
    )


def under(group: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda cfg: cfg[group].update(values)


def raw(text: str | bytes) -> Callable[[Path], Any]:
    data = text.encode() if isinstance(text, str) else text
    return lambda run: (run / "config.yaml").write_bytes(data)


def a_fifo(run: Path) -> None:
    (run / "config.yaml").unlink()
    os.mkfifo(run / "config.yaml")


def a_device(run: Path) -> None:
    (run / "config.yaml").unlink()
    (run / "config.yaml").symlink_to("/dev/zero")


CONFIGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a command": in_env({"_target_": "os.mkdir", "path": CANARY}),
    "another run that runs": in_env({"_target_": "unified_rl.training.run.resume", "run": "h/inner", "allow": ["os"]}),
    "a study": in_env({"_target_": "unified_rl.study.compare.compare", "cfg": {}, "allow": ["os"]}),
    "a job": in_env({"_target_": "unified_rl.training.run.Job", "cfg": {}, "allow": ["os"]}),
    "a package of its own": lambda cfg: cfg.update(allow=["canary_module"], env={"_target_": "canary_module.Env"}),
    "a private name": in_env({"_target_": "unified_rl.config._imported", "path": "os.mkdir"}),
    "a target that is a number": lambda cfg: cfg.update(env={"_target_": 5}),
    "a target that is a list": lambda cfg: cfg.update(env={"_target_": ["os.mkdir"]}),
    "a part that is a text": lambda cfg: cfg.update(policy="os.mkdir"),
    "a part that is a list": lambda cfg: cfg.update(rollout=[1]),
    "a part without a target": lambda cfg: cfg.update(agent={"lr": 1}),
    "a setting of another type": lambda cfg: cfg.update(steps="ten"),
    "a device that is none": lambda cfg: cfg.update(device="canary"),
    "choices that are none": lambda cfg: cfg.update(choices=[1]),
    "a kernel": under("correction", kernel={"name": "canary_module.Env"}),
    "a reference": under("policy", activation="${oc.env:HOSTILE_SECRET}"),
    "a list": lambda cfg: [cfg],
    "nothing": lambda cfg: {},
}
TEXTS: dict[str, Callable[[Path], Any]] = {
    "laughs": raw(LAUGHS),
    "laughs of merges": raw(MERGES),
    "a circle": raw("&a {env: *a}"),
    "depth": raw("[" * 1000),
    "size": raw("x: " + "a" * 1_000_000),
    "a python tag": raw("env: !!python/object/apply:os.mkdir [canary]"),
    "no text": raw(b"\xff\xfe\0\0"),
    "empty": raw(""),
    "a fifo": a_fifo,
    "a device": a_device,
}
VERBS = (["train", "resume=run"], ["evaluate", "run"])


@pytest.mark.parametrize("name", [*CONFIGS, *TEXTS])
def test_a_run_folder_runs_nothing(name: str, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(trained, "run")
    if name in CONFIGS:
        changed(Path("run"), CONFIGS[name])
        shutil.copytree(trained, "h/inner")
        changed(Path("h/inner"), in_env({"_target_": "os.mkdir", "path": CANARY}))
    else:
        TEXTS[name](Path("run"))
    accept("run")
    for verb in VERBS:
        refused(capsys, *verb)


def accept(run: str) -> None:
    """Whoever changes files also changes the digests that list them: those do not say who wrote a file."""
    for path in sorted(Path(run).rglob(MANIFEST), reverse=True):
        found = Manifest.read(path.parent)
        there = [name for name in found.files if os.path.isfile(path.parent / name) and no_device(path.parent / name)]
        Manifest.of(path.parent, there, found.notes).write()


def no_device(path: Path) -> bool:
    return not str(path.resolve()).startswith("/dev/")


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["warm_start=from_run", "warm_start.run=run"], "checkpoint"),
        (["correction=erpd", "agent.teacher=run"], "no part that a configuration may build"),
        (["agent.objectives={x: {name: divergence, anchor: far}}", "agent.anchors={far: {folder: run}}"], "no part"),
    ],
)
def test_a_run_that_another_one_names_runs_nothing(
    argv: list[str], word: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, "run")
    changed(Path("run"), under("policy", _target_="unified_rl.training.run.resume"))
    if "checkpoint" in word:
        shutil.rmtree("run/checkpoints")
    accept("run")
    kept = [o for o in SMALL if not (o.startswith("correction") and argv[0].startswith("correction"))]
    assert word in refused(capsys, "train", *kept, *argv)


# ------------------------------------------------------------------------------------------- links in a run folder


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "metrics.csv", "meta.json", "config.yaml", ".lock", "checkpoints", "new"]
)
def test_nothing_is_written_through_a_link_in_a_run_folder(
    name: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, "run")
    outside = tmp_path / "outside"
    place = Path("run") / name
    if place.is_dir():
        shutil.move(place, outside)
    elif place.exists():
        shutil.copy(place, outside)
        place.unlink()
    else:
        outside.write_text("mine")
    before = outside.read_bytes() if outside.is_file() else sorted(p.name for p in outside.iterdir())
    place.symlink_to(outside)
    assert f"run/{name} is a link out of its folder" in refused(capsys, "train", "resume=run", "steps=32")
    assert before == (outside.read_bytes() if outside.is_file() else sorted(p.name for p in outside.iterdir()))


def test_a_run_folder_that_is_a_link_itself_goes_on(trained: Path) -> None:
    shutil.copytree(trained, "far/run")
    Path("run").symlink_to("far/run")
    assert cli.main(["train", "resume=run", "steps=24"]) == 0


# ------------------------------------------------------------------------------------------- checkpoints


def state(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        packed = json.loads((folder / "state.json").read_text())
        found = change(packed)
        (folder / "state.json").write_text(json.dumps(packed if found is None else found))

    return apply


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = {key: value.clone() for key, value in load_file(folder / "state.safetensors").items()}
        change(tensors)
        save_file(tensors, folder / "state.safetensors")

    return apply


def bytes_of(name: str, data: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(data)


def header(**entry: Any) -> bytes:
    text = json.dumps({"/agent/policy/x": entry}).encode()
    return struct.pack("<Q", len(text)) + text


def linked(name: str, target: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return apply


def first_weight(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return next(
        value for key, value in sorted(tensors.items()) if "/agent/policy/" in key and value.is_floating_point()
    )


def policy(packed: Any) -> dict[str, Any]:
    found: dict[str, Any] = packed["agent"]["policy"]
    return found


CHECKPOINTS: dict[str, Callable[[Path], Any]] = {
    "a pickle": bytes_of("state.safetensors", b"PICKLE"),
    "depth": bytes_of("state.json", b'{"agent": ' + b"[" * 200_000),
    "depth that is closed": bytes_of("state.json", b"[" * 100_000 + b"]" * 100_000),
    "a list": state(lambda packed: [packed]),
    "a text": bytes_of("state.json", b'"x"'),
    "an agent that is a number": state(lambda packed: packed.update(agent=5)),
    "a policy that is a number": state(lambda packed: packed["agent"].update(policy=5)),
    "no policy": state(lambda packed: packed["agent"].pop("policy")),
    "a weight that is a text": state(lambda packed: policy(packed).update({next(iter(policy(packed))): "os.mkdir"})),
    "a tensor of no name": state(lambda packed: policy(packed).update(x={"__tensor__": ["x"]})),
    "a tensor that is not there": state(lambda packed: policy(packed).update(x={"__tensor__": "/absent"})),
    "keys that are no numbers": state(lambda packed: packed["agent"].update(x={"__int_keys__": {"a": 1}})),
    "keys of nothing": state(lambda packed: packed["agent"].update(x={"__int_keys__": 5})),
    "a tuple of nothing": state(lambda packed: packed["agent"].update(x={"__tuple__": 5})),
    "another weight": state(lambda packed: policy(packed).update(evil=policy(packed)[next(iter(policy(packed)))])),
    "another format": state(lambda packed: packed.update(format={"a": 1})),
    "weights of another shape": weights(lambda tensors: first_weight(tensors).resize_(1)),
    "NaN": weights(lambda tensors: first_weight(tensors).fill_(float("nan"))),
    "infinity": weights(lambda tensors: first_weight(tensors).view(-1)[0].fill_(float("inf"))),
    "a header of 2^62 bytes": bytes_of("state.safetensors", struct.pack("<Q", 2**62) + b"{}"),
    "a header that is no JSON": bytes_of("state.safetensors", struct.pack("<Q", 4) + b"pick"),
    "a tensor of 2^60 rows": bytes_of(
        "state.safetensors", header(dtype="F32", shape=[2**60], data_offsets=[0, 2**62]) + b"\0" * 8
    ),
    "a tensor outside the file": bytes_of(
        "state.safetensors", header(dtype="F32", shape=[2], data_offsets=[2**40, 2**40 + 8]) + b"\0" * 8
    ),
    "a device in the place of weights": linked("state.safetensors", "/dev/null"),
    "a device in the place of the state": linked("state.json", "/dev/zero"),
}
RESUMED: dict[str, Callable[[Path], Any]] = {
    "updates that are a text": state(lambda packed: packed.update(updates="many")),
    "updates without end": state(lambda packed: packed.update(updates=1e999)),
    "no feed": state(lambda packed: packed.update(feed=None)),
    "a feed that is a list": state(lambda packed: packed.update(feed=[1])),
    "means that are none": state(lambda packed: packed.update(means=3)),
    "an optimiser that is none": state(lambda packed: packed["agent"].update(optimizer=[])),
}


@pytest.mark.parametrize("name", [*CHECKPOINTS, *RESUMED])
def test_a_checkpoint_runs_nothing_and_is_refused_in_one_line(
    name: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, "run")
    for folder in sorted(Path("run/checkpoints").glob("step_*")):
        {**CHECKPOINTS, **RESUMED}[name](folder)
    accept("run")
    for verb in VERBS if name in CHECKPOINTS else VERBS[:1]:
        refused(capsys, *verb)


# ------------------------------------------------------------------------------------------- replays


def rows(folder: Path, **meta: Any) -> None:
    write_meta(folder / "replay.json", {**read_meta(folder / "replay.json"), **meta})


REPLAYS: dict[str, Callable[[Path], Any]] = {
    "rows by a path": lambda folder: rows(folder, rows="../../x.safetensors"),
    "rows by an absolute path": lambda folder: rows(folder, rows="/etc/passwd"),
    "rows that are a list": lambda folder: rows(folder, rows=["x"]),
    "rows that are a device": lambda folder: rows(folder, rows="/dev/zero"),
    "no lanes": lambda folder: rows(folder, lanes=0),
    "negative lanes": lambda folder: rows(folder, lanes=-2),
    "lanes that are a text": lambda folder: rows(folder, lanes="two"),
    "negative rows": lambda folder: rows(folder, written=-5),
    "more rows than there are": lambda folder: rows(folder, written=10**18, capacity=10**18),
    "a capacity that is none": lambda folder: rows(folder, capacity=None),
    "no meta": lambda folder: (folder / "replay.json").write_text("[1]"),
    "depth": lambda folder: (folder / "replay.json").write_text("[" * 100_000),
    "no text": lambda folder: (folder / "replay.json").write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("name", REPLAYS)
def test_recorded_rows_of_somebody_else_are_refused(name: str) -> None:
    replay = Replay(8, sampler=Uniform())
    replay.extend({"a": torch.zeros(4, 2)})
    replay.dumps("saved")
    assert len(read_rows("saved")) == 4
    REPLAYS[name](Path("saved"))
    for read in (read_rows, lambda path: Replay(8, sampler=Uniform()).loads(path)):
        with pytest.raises(CheckpointError):
            read("saved")


def test_a_memory_mapped_replay_unpickles_nothing() -> None:
    replay = Replay(100, sampler=Uniform(), storage="memmap", path="mapped")
    replay.extend({"a": torch.zeros(10, 2)})
    replay.close()
    del replay
    shape = {"device": "cpu", "shape": [2], "_type": "<class 'tensordict._td.TensorDict'>"}  # as tensordict writes it
    Path("mapped/rows/meta.json").write_text(json.dumps({**shape, "e": {"type": "NonTensorData"}}))
    Path("mapped/rows/e").mkdir()
    Path("mapped/rows/e/meta.json").write_text(json.dumps({"_type": str(NonTensorData), "data": 1}))
    Path("mapped/rows/e/other.pickle").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(CheckpointError, match=r"rows/meta\.json is damaged"):  # nothing reads it, but it was altered
        Replay(100, sampler=Uniform(), storage="memmap", path="mapped")


def test_a_replay_removes_nothing_of_somebody_elses() -> None:
    Path("project/rows/of").mkdir(parents=True)
    Path("project/rows/thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="no file of a replay"):
        Replay(8, sampler=Uniform(), storage="memmap", path="project")
    assert Path("project/rows/thesis.txt").read_text() == "mine"


def test_a_baseline_writes_no_log_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    options = "agent.options={tensorboard_log: ../elsewhere}"
    given = [*SMALL[:3], "agent=sb3_ppo", options, "steps=16", "progress=false", "run_dir=baseline"]
    assert "tensorboard_log" in refused(capsys, "train", *given)
    assert not Path("../elsewhere").exists()


# ------------------------------------------------------------------------------------------- model folders


@dataclass
class Model:
    """A small language model's folder, and what a case does to it."""

    folder: Path

    def config(self, **values: Any) -> None:
        found = json.loads((self.folder / "config.json").read_text())
        (self.folder / "config.json").write_text(json.dumps({**found, **values}))

    def index(self, name: str) -> None:
        keys = load_file(self.folder / "model.safetensors")
        weight_map = dict.fromkeys(keys, name)
        (self.folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )

    def code(self) -> None:
        for name in ("modeling_evil.py", "configuration_evil.py", "generate.py", "custom_generate/generate.py"):
            (self.folder / name).parent.mkdir(exist_ok=True)
            (self.folder / name).write_text("import os\nos.mkdir('canary')\nclass Evil: ...\n")

    def auto_map(self, model_type: str) -> None:
        self.code()
        names = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
        self.config(model_type=model_type, auto_map=names, architectures=["Evil"])

    def pickled(self, keep: bool) -> None:
        (self.folder / "pytorch_model.bin").write_bytes(pickle.dumps(Attack()))
        if not keep:
            (self.folder / "model.safetensors").unlink()

    def linked(self, name: str, target: str) -> None:
        (self.folder / name).unlink(missing_ok=True)
        (self.folder / name).symlink_to(target)

    def fifo(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)
        os.mkfifo(self.folder / name)

    def weights(self, value: float) -> None:
        tensors = {key: tensor.clone() for key, tensor in load_file(self.folder / "model.safetensors").items()}
        sorted(tensors.items())[0][1].view(-1)[0] = value
        save_file(tensors, self.folder / "model.safetensors", metadata={"format": "pt"})


MODELS: dict[str, Callable[[Model], Any]] = {
    "code of its own": lambda model: model.auto_map("evil"),
    "a pickle alone": lambda model: model.pickled(keep=False),
    "an index with a path": lambda model: model.index("../../../etc/passwd"),
    "an index with an absolute path": lambda model: model.index("/etc/passwd"),
    "an index that is a list": lambda model: (model.folder / "model.safetensors.index.json").write_text("[1]"),
    "a kernel of a hub": lambda model: model.config(attn_implementation="kernels-community/flash-attn"),
    "an inner kernel of a hub": lambda model: model.config(text_config={"_attn_implementation": "a/b"}),
    "kernels by part": lambda model: model.config(attn_implementation={"": "someone/kernel"}),
    "weights that are a device": lambda model: model.linked("model.safetensors", "/dev/null"),
    "weights that are a fifo": lambda model: model.fifo("model.safetensors"),
    "a config that is a fifo": lambda model: model.fifo("config.json"),
    "a config without end": lambda model: model.linked("config.json", "/dev/zero"),
    "a config that is a list": lambda model: (model.folder / "config.json").write_text("[]"),
    "a config of depth": lambda model: (model.folder / "config.json").write_text("[" * 100_000),
    "a size that is a text": lambda model: model.config(hidden_size="canary"),
    "a giant size": lambda model: model.config(hidden_size=2**40),
    "NaN": lambda model: model.weights(float("nan")),
    "infinity": lambda model: model.weights(float("-inf")),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model's folder."""
    from unified_rl.envs.language import ChainMod

    folder = tmp_path_factory.mktemp("model") / "model"
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    task = ChainMod()
    CausalLM(task.tokenizer, task.max_length, config={"model_type": "llama", **sizes}).save(str(folder))
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_a_model_folder_runs_nothing(name: str, tiny: Path) -> None:
    tokenizer = load(tiny)
    shutil.copytree(tiny, "model")
    MODELS[name](Model(Path("model")))
    with pytest.raises(UnifiedRLError) as caught:
        CausalLM(tokenizer, 8, path="model")
    assert "model" in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert "kernel" not in name or "code of a hub" in str(caught.value)


def load(folder: Path) -> Any:
    from unified_rl.envs.language.tokenizer import load_tokenizer

    return load_tokenizer(folder)


@pytest.mark.parametrize("model_type", ["llama"])
def test_code_and_pickles_beside_sound_weights_are_not_looked_at(model_type: str, tiny: Path) -> None:
    tokenizer = load(tiny)
    shutil.copytree(tiny, "model")
    model = Model(Path("model"))
    model.auto_map(model_type)
    model.pickled(keep=True)
    CausalLM(tokenizer, 8, path="model")
    shutil.move("model", "far")
    Path("model").symlink_to("far")  # a linked folder is an ordinary one
    CausalLM(tokenizer, 8, path="model")


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "tokenizer.json").write_text("[" * 100_000),
        lambda folder: (folder / "tokenizer.json").write_text('{"model": 5}'),
        lambda folder: (folder / "tokenizer_config.json").write_text("[1]"),
    ],
)
def test_a_tokenizer_folder_runs_nothing(change: Callable[[Path], Any], tiny: Path) -> None:
    shutil.copytree(tiny, "model")
    Model(Path("model")).code()
    change(Path("model"))
    with pytest.raises(UnifiedRLError, match="tokenizer"):
        load(Path("model"))


def test_a_tokenizers_own_code_is_not_run(tiny: Path) -> None:
    shutil.copytree(tiny, "model")
    Model(Path("model")).code()
    config = json.loads(Path("model/tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["modeling_evil.Evil", "modeling_evil.Evil"]}, "tokenizer_class": "Evil"}
    Path("model/tokenizer_config.json").write_text(json.dumps(config))
    with suppress(UnifiedRLError):
        load(Path("model"))
