"""Rules found by name or by dotted path, their settings typed, everything refused with its full name."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import torch
from correction_cases import drifted, weights

from unified_rl import cli
from unified_rl.agents.loss import TERMS
from unified_rl.agents.reward_model import REWARD_MODELS
from unified_rl.config import compose
from unified_rl.correction import Correction, Kernel, Traits, correction_names, load_correction
from unified_rl.correction.kernels import KERNELS
from unified_rl.correction.levels import LEVELS
from unified_rl.correction.lookup import bind, settings_of
from unified_rl.correction.penalties.penalty import PENALTIES, TYPES
from unified_rl.correction.penalties.selection import SELECTIONS
from unified_rl.correction.transforms import PRES
from unified_rl.correction.weights.mismatch import MISMATCHES
from unified_rl.correction.weights.rejection import REJECTS
from unified_rl.correction.weights.thinning import THINS
from unified_rl.errors import ConfigError
from unified_rl.instantiate import allowed, allowing, build
from unified_rl.interventions import WRAPPERS
from unified_rl.objectives.coefficients import COEFFICIENTS
from unified_rl.objectives.divergence import KINDS
from unified_rl.objectives.offline_value import ACTORS, AGGREGATES, TARGETS, VALUES
from unified_rl.objectives.preference import LINKS, PAIRS
from unified_rl.objectives.reward_losses import REWARD_LOSSES
from unified_rl.ranges import bare
from unified_rl.returns.columns import COLUMNS
from unified_rl.returns.filters import FILTERS
from unified_rl.returns.gates import GATES
from unified_rl.returns.maps import MAPS

TABLES: dict[str, Mapping[str, Callable[..., Any]]] = {
    "correction.kernel": KERNELS,
    "correction.level": LEVELS,
    "correction.pre": PRES,
    "correction.thin": THINS,
    "correction.mismatch.0": MISMATCHES,
    "correction.reject.0": REJECTS,
    "correction.penalty.0": PENALTIES,
    "correction.penalty.0.select": SELECTIONS,
    "correction.wrapper": WRAPPERS,
    "agent.objectives.mine": TERMS,
    "agent.objectives.mine.coefficient": COEFFICIENTS,
    "agent.objectives.mine.link": LINKS,
    "agent.objectives.mine.pairs": PAIRS,
    "agent.objectives.mine.kind": KINDS,
    "agent.gates.mine": GATES,
    "agent.columns.mine": COLUMNS,
    "agent.maps.0": MAPS,
    "agent.filters.0": FILTERS,
    "agent.reward_model": REWARD_MODELS,
    "agent.reward_model.loss": REWARD_LOSSES,
    "agent.aggregate": AGGREGATES,
    "agent.target": TARGETS,
    "agent.value": VALUES,
    "agent.actor.mine": ACTORS,
}

PACKAGE = '''"""A user's own rules."""

import torch
from torch import Tensor

from unified_rl.correction import Kernel, Traits


class Halved(Kernel):
    """``share * r``: a ratio that is trusted less."""

    traits = Traits(truncates=False)
    share: float = 0.5

    def weight(self, view):
        return self.share * view.ratio


def last(d: Tensor, layout, *, factor: float = 1.0) -> Tensor:
    """The log-ratio of the row's last unit."""
    return factor * d[..., -1:].expand_as(d)


def doubled(d, advantage):
    return 2 * d


def every_other(batch, layout, advantage, total=None):
    return (layout.position % 2).to(advantage.dtype) * 2


def squashed(u, *, high: float = 2.0):
    return high * torch.tanh(u / high)


def nothing(d, layout, advantage):
    return torch.ones_like(d, dtype=torch.bool)


def quartic(x):
    return 0.25 * x**4, x**3


def longest(view, total):
    return view.mask
'''


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package of somebody who uses the library."""
    name = f"mine_{abs(hash(tmp_path)) % 10**8}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / name / "rules.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    for module in [m for m in sys.modules if m.startswith(name)]:
        del sys.modules[module]


def message(call: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------ types

FLOATS = [
    (where, name, key)
    for where, table in TABLES.items()
    for name, rule in table.items()
    for key, parameter in settings_of(rule).items()
    if float in map(bare, (parameter.hint, *get_args(parameter.hint))) and get_origin(parameter.hint) is not tuple
]


@pytest.mark.parametrize(("where", "name", "key"), FLOATS, ids=str)
def test_a_text_where_a_rule_of_any_table_wants_a_number_is_refused_by_its_full_name(
    where: str, name: str, key: str
) -> None:
    found = message(lambda: bind({"name": name, key: "abc"}, TABLES[where], where))
    assert found.startswith(f"{where}.{key} is 'abc'; it must be a number")


def test_the_numbers_of_the_tables_are_nearly_all_of_their_settings_and_none_is_without_a_type() -> None:
    untyped = {
        (where, name, key)
        for where, table in TABLES.items()
        for name, rule in table.items()
        for key, parameter in settings_of(rule).items()
        if parameter.hint is Any and key != "rows"
    }
    assert not untyped and len(FLOATS) > 90


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("correction.kernel.clip_high=abc", "correction.kernel.clip_high is 'abc'; it must be a number"),
        ("correction.kernel.clip_high=[1]", "correction.kernel.clip_high is [1]; it must be a number"),
        ("correction.kernel.clip_high=null", "correction.kernel.clip_high is None; it must be a number"),
        ("correction.kernel.clip_hihg=1", "correction.kernel 'ppo' has no field 'clip_hihg'; did you mean 'clip_high'"),
        ("correction.kernel.name=pppo", "correction.kernel.name 'pppo' is unknown; did you mean 'ppo'"),
        ("correction.kernel=pppo", "correction.kernel 'pppo' is unknown; did you mean 'ppo'"),
        ("correction.kernel=3", "correction.kernel is 3; it must be a text or a mapping"),
        ("correction.mismatch.0.high=abc", "correction.mismatch.0.high is 'abc'; it must be a number"),
        ("correction.mismatch.0.normalize=3", "correction.mismatch.0.normalize is 3; it must be true or false"),
        (
            "correction.mismatch.0.numerator=now",
            "correction.mismatch.0.numerator is 'now'; it must be one of 'proxi",
        ),
        ("correction.mismatch.0.level={name: hoelder, p: abc}", "correction.mismatch.0.level.p is 'abc'"),
        ("correction.reject=[{name: divergence, over: rows}]", "correction.reject.0.over is 'rows'; it must be"),
        ("correction.reject=[{name: band, level: unti}]", "correction.reject.0.level 'unti' is unknown; did you mean"),
        ("correction.reject=[veto, {name: band, low: x}]", "correction.reject.1.low is 'x'; it must be a number"),
        ("correction.penalty=[{name: k3, coefficient: x}]", "correction.penalty.0.coefficient is 'x'; it must be"),
        ("correction.penalty=[{name: k3, select: topp}]", "correction.penalty.0.select 'topp' is unknown"),
        ("correction.pre={name: clamp, low: x}", "correction.pre.low is 'x'; it must be a number"),
        ("correction.thin={name: uniform, keep: x}", "correction.thin.keep is 'x'; it must be a number"),
        (
            "correction.wrapper={name: reposition, alpha: x}",
            "correction.wrapper.alpha is 'x'; it must be a number in",
        ),
        ("correction.attached=3", "correction.attached is 3; it must be true or false"),
        ("correction.kernel.name=one", "correction.kernel.name 'one' is unknown; did you mean 'constant'"),
    ],
)
def test_what_does_not_fit_is_refused_when_the_run_is_composed(override: str, words: str) -> None:
    run = ["env=two_route", "policy=flow", "agent=policy_gradient", "correction=tis"]
    assert words in message(lambda: compose([*run, override]))


def test_python_and_the_command_line_refuse_the_same() -> None:
    words = "correction.mismatch.0.high is 'abc'; it must be a number"
    assert words in message(lambda: load_correction("tis", **{"mismatch.0.high": "abc"}))
    assert words in message(lambda: Correction(anchor="proximal", mismatch=[{"name": "truncate", "high": "abc"}]))
    assert "correction.horizon is 'far'" in message(lambda: load_correction("dr_grpo", horizon="far"))


def test_whole_numbers_stand_for_floats_and_no_bool_for_a_number() -> None:
    assert load_correction("ppo", **{"kernel.clip_high": 1}).kernel.clip_high == 1.0  # type: ignore[attr-defined]
    assert type(load_correction("clip_cov", **{"kernel.seed": 3.0}).kernel.seed) is int  # type: ignore[attr-defined]
    assert "clip_high is True" in message(lambda: load_correction("ppo", **{"kernel.clip_high": True}))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("one", "constant"),
        ("is", "ratio"),
        ("clamp", "clipped"),
        ("taper", "tapered"),
        ("gate", "soft_gate"),
        ("gamma", "gamma_density"),
        ("shape", "shaped"),
    ],
)
def test_a_kernels_old_name_is_refused_with_the_new_one(old: str, new: str) -> None:
    assert f"correction.kernel {old!r} is unknown; did you mean {new!r}?" == message(lambda: Correction(kernel=old))


# ------------------------------------------------------------------------------------------------ from outside


def test_rules_of_a_users_package_act_in_every_place(user: str) -> None:
    rules = f"{user}.rules"
    current, batch = drifted()
    with allowing([user]):
        halved = Correction(kernel={"name": f"{rules}.Halved", "share": 0.25}, level=f"{rules}.last")
        whole = Correction(
            kernel="ppo",
            anchor="proximal",
            pre=f"{rules}.doubled",
            thin=f"{rules}.every_other",
            mismatch=[{"name": f"{rules}.squashed", "high": 1, "level": f"{rules}.last"}],
            reject=[f"{rules}.nothing", {"name": "band", "level": f"{rules}.last", "low": 0.0, "high": 9.0}],
            penalty=[{"name": f"{rules}.quartic", "anchor": "behavior", "select": f"{rules}.longest"}],
        )
    last = (current - batch["behavior_log_prob"])[:, -1:].exp()
    count = batch["mask"].sum()
    expected = 0.25 * last * batch["advantage"][:, None] / count
    torch.testing.assert_close(halved(current, batch).weight, expected.expand_as(current))
    out = whole(current.clone().requires_grad_(), batch)  # outside the block: everything was found when it was made
    assert out.weight[:, 1::2].abs().sum() == 0 and out.weight[:, 0::2].abs().sum() > 0
    d = current - batch["behavior_log_prob"]
    assert float(out.metrics["loss/penalty"].detach()) == pytest.approx(float((0.25 * d**4).sum() / count))


@pytest.mark.parametrize(
    ("field", "name", "words"),
    [
        ("kernel", "last", "is no Kernel; derive it from unified_rl.correction.kernels.kernel.Kernel"),
        ("level", "Halved", "takes 0 positional arguments, and is called with 2: (d, layout, *, settings)"),
        ("level", "nothing", "takes 3 positional arguments, and is called with 2"),
        ("pre", "quartic", "takes 1 positional arguments, and is called with 2"),
        ("kernel", "Halfed", "has no 'Halfed'; did you mean 'Halved'"),
    ],
)
def test_an_object_of_another_kind_is_one_clear_error(user: str, field: str, name: str, words: str) -> None:
    path = f"{user}.rules.{name}"
    with allowing([user]):
        found = message(lambda: Correction(**{field: path}))
    assert found.startswith(f"correction.{field} '{path}'") and words in found


def test_a_dotted_path_is_refused_without_the_allow_list_and_inside_the_library_where_it_is_no_rule(user: str) -> None:
    words = f"'{user}.rules.Halved' is outside the allowed packages; start with --allow {user} to build it"
    assert message(lambda: Correction(kernel=f"{user}.rules.Halved")) == f"correction.kernel {words}"
    node = {"_target_": "unified_rl.correction.Correction", "kernel": f"{user}.rules.Halved"}
    assert words in message(lambda: build(node))
    assert isinstance(build(node, allow=[user]), Correction) and allowed() == ()
    assert Correction(level="unified_rl.correction.levels.step").level_name == "unified_rl.correction.levels.step"
    for path in ("unified_rl.correction.view.difference", "unified_rl.instantiate.allowing", "os.path.join"):
        assert message(lambda p=path: Correction(level=p)).startswith(f"correction.level '{path}' is ")


def test_no_configuration_can_allow_a_package(user: str) -> None:
    kernel = f"correction.kernel={user}.rules.Halved"
    run = ["env=two_route", "policy=flow", "agent=policy_gradient", "correction=reinforce", kernel]
    assert f"--allow {user}" in message(lambda: compose(run))
    assert "no group or key 'allow'" in message(lambda: compose([*run, f"allow=[{user}]"]))
    for key in ("correction.allow", "agent.allow", "correction.kernel.allow"):
        assert message(lambda k=key: compose([*run[:-1], f"{k}=[{user}]"]))
    sealed = {"_target_": "unified_rl.instantiate.allowing", "allow": [user]}
    assert "is no part that a configuration may build" in message(lambda: build(sealed))


def test_a_users_kernel_trains_from_the_command_line(
    user: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By name alone, and as a preset of the user's own that says neither what it builds nor its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(cli.DEBUG, raising=False)
    folder = tmp_path / "groups" / "correction"
    folder.mkdir(parents=True)
    (folder / "halved.yaml").write_text(
        f"# @package _global_\n# Half the ratio\ncorrection:\n  kernel: {{name: {user}.rules.Halved, share: 0.3}}\n"
    )
    (folder / "third.yaml").write_text(
        "# @package _global_\n# A third of it\ndefaults:\n  - halved\n  - _self_\ncorrection: {kernel: {share: 0.33}}\n"
    )
    run = ["train", "env=pendulum", "policy=gaussian", "agent=policy_gradient", "rollout=control", "progress=false"]
    run += ["rollout.num_envs=2", "rollout.horizon=8", "steps=32", "eval_episodes=1", "agent.critic_hidden=[8]"]
    named = [*run, "correction=reinforce", f"correction.kernel.name={user}.rules.Halved", "run_dir=named"]
    assert cli.main(named) == 2
    assert f"correction.kernel.name '{user}.rules.Halved' is outside the allowed packages" in capsys.readouterr().err
    assert cli.main([*named, "--allow", user]) == 0
    preset = [*run, "correction=third", "run_dir=preset", "--config-dir", "groups", "--allow", user]
    assert cli.main(preset) == 0
    composed = compose(["correction=third", "env=pendulum"], config_dirs=["groups"], allow=[user])["correction"]
    assert composed == {
        "_target_": "unified_rl.correction.Correction",
        "name": "third",
        "summary": "A third of it",
        "kernel": {"name": f"{user}.rules.Halved", "share": 0.33},
    }
    error = message(
        lambda: compose(["correction=third", "correction.kernel.share=x"], config_dirs=["groups"], allow=[user])
    )
    assert "correction.kernel.share is 'x'; it must be a number" in error


def test_the_gallery_shows_and_draws_rules_of_a_users_package(
    user: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(cli.DEBUG, raising=False)
    show = ["corrections", "show", "opmd", f"kernel={user}.rules.Halved", f"level={user}.rules.last"]
    show += [f"penalty=[{{name: {user}.rules.quartic, anchor: behavior}}]", "--json"]
    assert cli.main(show) == 2
    assert f"start with --allow {user}" in capsys.readouterr().err
    assert cli.main([*show, "--allow", user]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["rule"]["kernel"] == {"name": f"{user}.rules.Halved", "share": 0.5}
    assert shown["rule"]["level"] == {"name": f"{user}.rules.last", "factor": 1.0}
    assert "g = share * r: a ratio that is trusted less." in shown["formula"]
    pairs = zip(shown["curves"]["log_ratio"], shown["curves"]["A > 0"], strict=True)
    assert all(y == pytest.approx(0.5 * math.exp(x), abs=1e-5) for x, y in pairs)


# ------------------------------------------------------------------------------------------------ one object


def test_a_kernel_is_a_frozen_object_with_everything_that_is_known_about_it() -> None:
    class Bounded(Kernel):
        """``min(r, most)``."""

        traits = Traits(truncates=True)
        most: float = 2.0

        def weight(self, view: Any) -> torch.Tensor:
            return view.ratio.clamp(max=self.most)

    correction = Correction(kernel=Bounded(most=1.5))
    assert correction.kernel_name == "Bounded" and correction.kernel.formula() == "min(r, most)."
    ratios = torch.tensor([[1.0, 3.0]], dtype=torch.float64).log()
    assert weights(correction, ratios) == pytest.approx([1.0, 1.5])
    current, batch = drifted(size=1.0)
    clipped = correction.diagnostics(current, batch)["clip/fraction"]
    assert float(clipped) == pytest.approx(float(((current - batch["behavior_log_prob"]).exp() > 1.5).double().mean()))
    with pytest.raises(FrozenInstanceError):
        correction.kernel.most = 3.0  # type: ignore[attr-defined]
    assert load_correction("cispo", kernel=Bounded()).kernel == Bounded()
    assert all(kernel().formula() and "\n" not in kernel().formula() for kernel in KERNELS.values())


def test_changed_parts_are_methods_and_leave_the_rest() -> None:
    ppo = load_correction("opmd")
    other = ppo.with_kernel({"name": "clipped", "high": 3})
    assert (ppo.kernel_name, other.kernel_name, other.penalties) == ("constant", "clipped", ppo.penalties)
    ppo.set_penalty_coefficients([2.0])
    assert ppo.penalty_coefficients == [2.0]
    hoelder = load_correction("hoelder")
    current, batch = drifted(size=1.0)
    hoelder.set_level(p=0.0)
    expected = load_correction("hoelder", level="geometric")(current, batch).weight
    torch.testing.assert_close(hoelder(current, batch).weight, expected)
    assert "correction.level 'hoelder' has no field 'q'" in message(lambda: hoelder.set_level(q=1.0))
    assert "correction.level.p is 'x'" in message(lambda: hoelder.set_level(p="x"))


def test_a_correction_about_demonstrations_is_refused_where_there_are_none() -> None:
    assert [n for n in correction_names() if load_correction(n).kernel.traits.demonstrations] == ["luffy"]
    _, batch = drifted()
    luffy, dapo = load_correction("luffy"), load_correction("dapo")
    for record in (batch, batch.clone().set("source", torch.zeros(4, dtype=torch.int64))):
        found = message(lambda r=record: luffy.check_sources(r))
        assert "correction luffy learns from demonstrations" in found
        assert "recipe=luffy" in found and "correction=dapo" in found
        dapo.check_sources(record)
    luffy.check_sources(batch.clone().set("source", torch.tensor([0, 2, 0, 0])))


def test_luffy_alone_is_refused_before_the_first_step_and_its_recipe_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(cli.DEBUG, raising=False)
    run = ["train", "env=chain_mod", "policy=causal_lm_tiny", "rollout.prompts=2", "steps=8", "eval_episodes=1"]
    run += ["progress=false"]
    assert cli.main([*run, "correction=luffy", "rollout.group_size=4", "run_dir=alone"]) == 2
    assert "recipe=luffy" in capsys.readouterr().err
    assert cli.main([*run, "recipe=luffy", "rollout.group_size=3", "run_dir=recipe"]) == 0


def test_penalty_types_name_every_setting_that_all_penalties_share() -> None:
    from unified_rl.correction.penalties.penalty import DEFAULTS

    assert TYPES.keys() == DEFAULTS.keys()
