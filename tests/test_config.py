"""Composition, the checks against signatures, and the allow-list."""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from unified_rl import config as configuration
from unified_rl import instantiate
from unified_rl.config import build, compose, group_options, reading_once, resolve_defaults
from unified_rl.errors import ConfigError
from unified_rl.interpolation import resolved
from unified_rl.peer_names import PEER_NAMES

TOYS = '''
from __future__ import annotations
import os
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Literal

class Brake:
    def __init__(self, force: float = 2.0) -> None:
        self.force = force

class Car:
    """A target with one parameter of every kind."""
    def __init__(self, wheels: int = 4, speed: float = 1.0, name: str = "car", fast: bool = False,
                 color: Literal["red", "blue"] = "red", sizes: tuple[int, ...] = (1, 2), tags: list[str] | None = None,
                 extra: dict[str, float] | None = None, brake: Brake | None = None, seed: int = 0,
                 pair: tuple[int, float] = (1, 2.0), parts: Sequence[Brake] = ()) -> None:
        self.__dict__.update({k: v for k, v in locals().items() if k != "self"})

class Truck(Car):
    def __init__(self, load: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.load = load

class Wrapped(type):
    def __call__(cls, *args, **kwargs):
        return super().__call__(*args, **kwargs)

class Metal(metaclass=Wrapped):
    def __init__(self, grade: int) -> None:
        self.grade = grade

class Unresolvable:
    def __init__(self, x: Missing = 1) -> None: ...

def open_function(**kwargs: Any) -> dict[str, Any]:
    return kwargs

def small(size: int = 1) -> tuple[str, int]:
    return ("small", size)
'''

FILES = {
    "train.yaml": "defaults: [_self_, {rollout: plain}, {policy: gaussian}, {env: road}, {agent: driver}]",
    "rollout/plain.yaml": "# Plain\nrollout: {_target_: toy_parts.Brake}",
    "rollout/other.yaml": "# Other\nrollout: {_target_: toy_parts.Brake, force: 3}",
    "policy/gaussian.yaml": "# Gaussian\npolicy: {_target_: toy_parts.Car}",
    "policy/flow.yaml": "# Flow\npolicy: {_target_: toy_parts.Truck, load: 5}",
    "policy/squashed.yaml": "# Squashed\npolicy: {_target_: toy_parts.Car, speed: 7}",
    "env/road.yaml": "# Road\nenv: {_target_: toy_parts.Car, brake: {_target_: toy_parts.Brake, force: 1}}\nsteps: 50",
    "env/route.yaml": "# Route\ndefaults: [{override /rollout: other}, {override /policy: flow}]\nenv: {lanes: 2}",
    "env/needs.yaml": "# Needs\nenv:\n  _target_: toy_parts.Car\n  name: ???",
    "agent/driver.yaml": "# Driver\nagent: {_target_: toy_parts.Car, wheels: 3}",
    "agent/sac.yaml": "# SAC\ndefaults: [{override /policy: squashed}]\nagent: {_target_: toy_parts.Car}",
}
ALLOW = ["toy_parts"]


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# @package _global_\n{text}\n" if "/" in name else text)
    return root


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of targets and a folder of groups that stand in for the built-in ones."""
    (tmp_path / "module").mkdir()
    (tmp_path / "module" / "toy_parts.py").write_text(textwrap.dedent(TOYS))
    monkeypatch.syspath_prepend(str(tmp_path / "module"))
    monkeypatch.delitem(sys.modules, "toy_parts", raising=False)
    root = write(tmp_path / "configs", FILES)
    monkeypatch.setattr(configuration, "config_root", lambda: root)
    return root


def composed(*overrides: str, **options: Any) -> dict[str, Any]:
    return compose(list(overrides), allow=ALLOW, **options)


def error_of(*overrides: str, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        composed(*overrides, **options)
    return str(caught.value)


def part(toys: Path, target: str, **values: Any) -> Any:
    return build({"_target_": f"toy_parts.{target}", **values}, allow=ALLOW)


# ---------------------------------------------------------------------------------------------- composing


def test_groups_land_under_their_keys_in_order(toys: Path) -> None:
    cfg = composed()
    assert cfg["agent"] == {"_target_": "toy_parts.Car", "wheels": 3}
    assert cfg["choices"] == {"rollout": "plain", "policy": "gaussian", "env": "road", "agent": "driver"}
    assert cfg["steps"] == 50


def test_a_later_group_overrides_the_choice_of_an_earlier_one(toys: Path) -> None:
    cfg = composed("env=route")
    assert cfg["choices"]["policy"] == "flow" and cfg["choices"]["rollout"] == "other"
    assert cfg["policy"]["load"] == 5.0 and cfg["rollout"]["force"] == 3.0


def test_of_two_overriding_groups_the_later_wins(toys: Path) -> None:
    assert composed("env=route", "agent=sac")["choices"]["policy"] == "squashed"


@pytest.mark.parametrize(
    "order", [["policy=gaussian", "env=route", "agent=sac"], ["env=route", "agent=sac", "policy=gaussian"]]
)
def test_a_choice_on_the_command_line_beats_every_file(toys: Path, order: list[str]) -> None:
    cfg = composed(*order)
    assert cfg["choices"]["policy"] == "gaussian" and cfg["policy"] == {"_target_": "toy_parts.Car"}


def test_a_key_that_no_yaml_holds_is_accepted_if_the_signature_has_it(toys: Path) -> None:
    cfg = composed("policy.speed=3", "env.brake.force=2", "policy.brake={_target_: toy_parts.Brake}")
    assert cfg["policy"]["speed"] == 3.0 and cfg["env"]["brake"]["force"] == 2.0
    assert cfg["policy"]["brake"] == {"_target_": "toy_parts.Brake"}


def test_null_drops_a_group_even_where_a_file_chooses_one(toys: Path) -> None:
    cfg = composed("policy=null", "agent=sac")
    assert cfg["policy"] is None and cfg["choices"]["policy"] is None


def test_an_integral_float_is_an_int(toys: Path) -> None:
    steps = composed("steps=1e5")["steps"]
    assert steps == 100_000 and type(steps) is int


def test_quoted_values_may_hold_equal_signs_and_commas(toys: Path) -> None:
    assert composed("agent.name='a=b,c'")["agent"]["name"] == "a=b,c"


def test_list_items_are_set_by_index(toys: Path) -> None:
    assert composed("agent.sizes=[5,6]")["agent"]["sizes"] == [5, 6]
    write(toys, {"agent/lists.yaml": "agent: {_target_: toy_parts.Car, sizes: [5, 6]}"})
    assert composed("agent=lists", "agent.sizes.1=9")["agent"]["sizes"] == [5, 9]
    assert "list of 2" in error_of("agent=lists", "agent.sizes.2=9")


def test_the_result_is_plain_yaml(toys: Path) -> None:
    cfg = resolve_defaults(composed("agent.pair=[1,2]"), allow=ALLOW)
    assert yaml.safe_load(yaml.safe_dump(cfg)) == cfg


def test_users_folder_adds_options_and_groups(toys: Path, tmp_path: Path) -> None:
    mine = write(tmp_path / "it's mine", {"env/lane.yaml": "# My lane\nenv: {_target_: toy_parts.Truck}"})
    assert composed("env=lane", config_dirs=[str(mine)])["env"] == {"_target_": "toy_parts.Truck"}
    assert group_options("train", [str(mine)])["env"]["lane"] == "My lane"
    assert "did you mean 'lane'" in error_of("env=lame", config_dirs=[str(mine)])


def test_users_folder_may_add_a_group_that_fills_a_known_node(toys: Path, tmp_path: Path) -> None:
    mine = write(tmp_path / "mine", {"speed/high.yaml": "# High\npolicy: {speed: 99}"})
    cfg = composed("speed=high", config_dirs=[str(mine)])
    assert cfg["policy"]["speed"] == 99.0 and cfg["choices"]["speed"] == "high"


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["agnt=sac"], ["'agnt'", "did you mean 'agent'"]),
        (["stpes=3"], ["'stpes'", "did you mean 'steps'"]),
        (["agent=sacc"], ["agent has no option 'sacc'", "did you mean 'sac'"]),
        (["agent.whels=3"], ["agent (toy_parts.Car)", "'whels'", "did you mean 'wheels'"]),
        (["env.brake.forc=3"], ["env.brake", "did you mean 'force'"]),
        (["env=route", "env.lans=3"], ["env has no key 'lans'", "did you mean 'lanes'"]),
        (["policy.load=3"], ["policy", "'load'"]),
        (["agent.wheels=four"], ["agent.wheels is 'four'", "a whole number"]),
        (["agent.wheels=1.5"], ["agent.wheels is 1.5", "a whole number"]),
        (["agent.wheels=true"], ["agent.wheels is True", "a whole number"]),
        (["agent.fast=1"], ["agent.fast is 1", "true or false"]),
        (["agent.name=3"], ["agent.name is 3", "quote it"]),
        (["agent.color=green"], ["agent.color is 'green'", "red"]),
        (["agent.sizes=[1,a]"], ["agent.sizes"]),
        (["agent.pair=[1,2,3]"], ["agent.pair"]),
        (["agent.extra={a: x}"], ["agent.extra.a is 'x'; it must be a number"]),
        (["agent.extra={a: 1, b: null}"], ["agent.extra.b is None; it must be a number"]),
        (["agent.brake=3"], ["agent.brake is 3"]),
        (["steps=ten"], ["steps is 'ten'", "a whole number"]),
        (["seed=1", "agent=sac", "seed=2"], ["seed is given twice"]),
        (["agent=sac", "agent=driver"], ["agent is given twice"]),
        (["seed=1,2"], ["compare"]),
        (["agent.name=a,b"], ["""agent.name="'a,b'\""""]),
        (["seed=range(3)"], ["compare"]),
        (["agent.name=a=b"], ["unquoted '='", "quote it: agent.name=\"'a=b'\""]),
        (["agent.tags=[a=b]"], ["unquoted '='", "quote"]),
        (["agent.name=f(x)"], ["cannot be parsed", "quote it"]),
        (["steps"], ["key=value"]),
        (["+agent.wheels=3"], ["not a key"]),
        (["~agent"], ["key=value"]),
        (["env@agent=road"], ["not a key"]),
        (["policy=null", "policy.speed=2"], ["policy has no keys here", "policy=..."]),
        (["agent.name.first=x"], ["agent.name"]),
        (["env=needs"], ["env.name has no default; set it: env.name=..."]),
        (["agent._partial_=true"], ["'_partial_'"]),
        (["agent._target_=os.system"], ["outside the allowed packages", "--allow os"]),
        (["hydra.run.dir=x"], ["'hydra'"]),
        (["agent.name=${nowhere}"], ["nowhere"]),
    ],
)
def test_bad_input_names_the_thing_and_the_fix(toys: Path, overrides: list[str], words: list[str]) -> None:
    message = error_of(*overrides)
    for word in words:
        assert word in message
    assert "\n" not in message


def test_a_folder_that_a_recipe_leaves_open_is_asked_for_by_what_it_holds() -> None:
    held = {"teacher": "the folder of a run", "data": "'unified-rl evaluate RUN --record ROWS' wrote"}
    for key, words in held.items():
        with pytest.raises(ConfigError, match=rf"agent\.{key} has no default; set it: agent\.{key}=R.*{words}"):
            resolved({"agent": {key: "???"}})


def test_a_group_file_with_a_misspelt_key_is_refused(toys: Path) -> None:
    write(toys, {"agent/typo.yaml": "agent: {_target_: toy_parts.Car, sped: 1}"})
    assert "did you mean 'speed'" in error_of("agent=typo")


def test_a_group_file_with_a_stray_top_level_key_is_refused(toys: Path) -> None:
    write(toys, {"agent/stray.yaml": "agent: {_target_: toy_parts.Car}\nsede: 1"})
    assert "did you mean 'seed'" in error_of("agent=stray")


def test_a_file_that_is_not_yaml_is_named(toys: Path) -> None:
    write(toys, {"agent/broken.yaml": "agent: {_target_: [}"})
    assert "broken.yaml" in error_of("agent=broken")


def test_a_package_header_that_hydra_would_ignore_is_refused(toys: Path) -> None:
    (toys / "agent" / "late.yaml").write_text("# Comment first\n# @package _global_\nagent: null\n")
    assert "late.yaml" in error_of() and "first line" in error_of()


def test_a_users_option_may_not_hide_a_built_in_one(toys: Path, tmp_path: Path) -> None:
    mine = write(tmp_path / "mine", {"env/road.yaml": "env: null"})
    assert "rename it" in error_of(config_dirs=[str(mine)])
    assert "no such folder" in error_of(config_dirs=[str(tmp_path / "absent")])


# ---------------------------------------------------------------------------------------------- signatures and building


def test_resolved_defaults_are_those_of_the_signatures(toys: Path) -> None:
    cfg = resolve_defaults(composed("policy=flow"), allow=ALLOW)
    assert cfg["policy"]["load"] == 5.0 and cfg["policy"]["wheels"] == 4 and cfg["policy"]["sizes"] == [1, 2]
    assert cfg["env"]["brake"] == {"_target_": "toy_parts.Brake", "force": 1.0}
    assert cfg["steps"] == 50 and cfg["seed"] == 0 and cfg["device"] == "cpu"


def test_a_resolved_configuration_builds_the_same_object(toys: Path) -> None:
    cfg = composed("env.sizes=[3]")
    short, full = build(cfg["env"], allow=ALLOW), build(resolve_defaults(cfg, allow=ALLOW)["env"], allow=ALLOW)
    assert short.sizes == full.sizes == (3,) and short.pair == full.pair == (1, 2.0)
    assert vars(short).keys() == vars(full).keys()


def test_building_is_recursive_through_mappings_and_lists(toys: Path) -> None:
    brake = {"_target_": "toy_parts.Brake", "force": 9}
    car = part(toys, "Car", brake=brake, parts=[brake, {"_target_": "toy_parts.Brake"}])
    assert car.brake.force == 9.0 and [b.force for b in car.parts] == [9.0, 2.0]
    assert part(toys, "open_function", a={"b": brake})["a"]["b"].force == 9


def test_functions_are_targets_too(toys: Path) -> None:
    assert part(toys, "small", size=3) == ("small", 3)


def test_kwargs_are_followed_to_the_parent_and_no_further(toys: Path) -> None:
    assert part(toys, "Truck", load=2, wheels=6).wheels == 6
    with pytest.raises(ConfigError, match="did you mean 'wheels'"):
        part(toys, "Truck", wheel=6)


def test_a_metaclass_does_not_hide_the_signature(toys: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'grade'"):
        part(toys, "Metal", grad=1)
    with pytest.raises(ConfigError, match="needs grade"):
        part(toys, "Metal")


def test_the_callers_arguments_win_over_defaults_but_not_over_a_users_value(toys: Path) -> None:
    node = {"_target_": "toy_parts.Car", "seed": 0}
    assert build(node, allow=ALLOW, seed=7).seed == 7
    assert build({**node, "seed": 7}, allow=ALLOW, seed=7).seed == 7
    with pytest.raises(ConfigError, match="seed=3"):
        build({**node, "seed": 3}, allow=ALLOW, seed=7)


def test_an_argument_of_the_caller_that_the_target_lacks_is_named(toys: Path) -> None:
    with pytest.raises(ConfigError, match="does not take horn"):
        build({"_target_": "toy_parts.Car"}, allow=ALLOW, horn=1)


def test_annotations_that_do_not_resolve_are_an_error(toys: Path) -> None:
    with pytest.raises(ConfigError, match="Missing"):
        part(toys, "Unresolvable")


@pytest.mark.parametrize("node", [None, {}, {"force": 1}, "toy_parts.Brake"])
def test_only_nodes_are_built(toys: Path, node: Any) -> None:
    with pytest.raises(ConfigError, match="no _target_"):
        build(node, allow=ALLOW)


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "subprocess.run",
        "unified_rl.cli.os.system",
        "unified_rl.cli.main",
        "unified_rl.config.build",
        "unified_rl.instantiate.importlib.import_module",
        "unified_rl.config._parse",
        "unified_rl.__init__.__version__",
        "unified_rl.training.settings.dataclass",
        "unified_rl_evil.System",
        "unified_rl",
        "toy_parts.os.system",
        "toy_parts.wraps",
        "",
        3,
    ],
)
def test_the_allow_list_holds(toys: Path, path: Any) -> None:
    with pytest.raises(ConfigError, match="_target_"):
        build({"_target_": path}, allow=ALLOW)


def test_nodes_inside_nodes_obey_the_allow_list(toys: Path) -> None:
    with pytest.raises(ConfigError, match="--allow os"):
        part(toys, "open_function", x=[{"y": {"_target_": "os.getcwd"}}])


def test_without_allow_the_users_package_is_refused(toys: Path) -> None:
    with pytest.raises(ConfigError, match="--allow toy_parts"):
        build({"_target_": "toy_parts.Brake"})
    with pytest.raises(ConfigError, match="--allow toy_parts"):
        build({"_target_": "toy_parts.Brake"}, allow=["toy"])


def test_a_misspelt_target_names_the_nearest(toys: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'Brake'"):
        part(toys, "Brak")
    with pytest.raises(ConfigError, match="no package 'absent_package'"):
        build({"_target_": "absent_package.Thing"}, allow=["absent_package"])


def test_a_missing_optional_package_is_named(toys: Path) -> None:
    (toys.parent / "module" / "toy_needs.py").write_text("import absent_package\n")
    with pytest.raises(ConfigError, match="needs the package 'absent_package'"):
        build({"_target_": "toy_needs.Thing"}, allow=["toy_needs"])


def test_unions_keep_the_type_that_fits() -> None:
    assert instantiate.coerce(1, int | float) == 1 and type(instantiate.coerce(2.0, float | int)) is float
    assert instantiate.coerce(None, int | None) is None
    assert instantiate.coerce([1, 2], list[float] | None) == [1.0, 2.0]
    with pytest.raises(TypeError):
        instantiate.coerce("x", int | None)


# ---------------------------------------------------------------------------------------------- the built-in files

REAL = {
    (group, option) for primary in ("train", "compare") for group, o in group_options(primary).items() for option in o
}


@pytest.mark.parametrize(("group", "option"), sorted(REAL))
def test_every_built_in_file_has_a_comment_and_valid_keys(group: str, option: str) -> None:
    path = configuration.config_root() / group / f"{option}.yaml"
    lines = path.read_text().splitlines()
    assert lines[0] == configuration.HEADER and configuration.comment_of(path)
    content = yaml.safe_load(path.read_text()) or {}
    content.pop("defaults", None)
    assert group in content or option == "none"
    for key, node in content.items():
        missing = {name for name, value in (node or {}).items() if value == "???"} if isinstance(node, dict) else set()
        node = {k: v for k, v in node.items() if k not in missing} if isinstance(node, dict) else node
        instantiate.check_value(node, key, [])


@pytest.mark.parametrize(
    "overrides",
    [
        "env=chain_mod policy=causal_lm agent=policy_gradient correction=dapo replay=fresh seed=1",
        "env=half_cheetah agent=sac",
        "env=two_route policy=flow agent=policy_gradient correction=tis rollout.staleness=8",
        "env=half_cheetah agent=ppo",
    ],
)
def test_the_documented_commands_compose(overrides: str) -> None:
    cfg = resolve_defaults(compose(overrides.split()))
    for word in overrides.split():
        key, value = word.split("=")
        if key in cfg["choices"]:
            assert cfg["choices"][key] == value
    assert cfg["env"]["_target_"] and cfg["agent"]["_target_"]


def test_a_grid_reads_files_once_and_composes_the_same(tmp_path: Path) -> None:
    option = tmp_path / "env" / "mine.yaml"
    option.parent.mkdir()
    text = "# @package _global_\n# Mine\nenv:\n  _target_: unified_rl.envs.control.GymnasiumEnv\n  id: Pendulum-v1\n"
    option.write_text(text)
    base = ["env=mine", "agent=sac", "policy=tanh_gaussian"]
    grid = [[*base, f"seed={seed}", *more] for seed in (1, 2) for more in ([], ["agent.lr=1e-3", "replay.capacity=64"])]
    alone = [compose(cell, config_dirs=[str(tmp_path)]) for cell in grid]
    with reading_once():
        together = [compose(cell, config_dirs=[str(tmp_path)]) for cell in grid]
        option.write_text(text.replace("Pendulum-v1", "Hopper-v5"))
        assert compose(grid[0], config_dirs=[str(tmp_path)]) == alone[0]
    assert together == alone
    assert compose(grid[0], config_dirs=[str(tmp_path)])["env"]["id"] == "Hopper-v5"


def test_a_name_of_another_library_is_told_what_it_is_called_here() -> None:
    cfg = compose(
        ["env=jsonl", "env.path=a.jsonl", "policy=causal_lm_path", "policy.path=m", "policy.lora={r: 8, lora_alpha: 8}"]
    )
    cfg, robot = resolve_defaults(cfg), resolve_defaults(compose(["env=half_cheetah", "agent=ppo"]))
    for name, here in PEER_NAMES.items():
        node: Any = robot if "sde" in name else cfg
        for part in here.split("."):
            assert part in node, (name, here)
            node = node[part]
    for given, said in (
        ("num_generations=8", "no group or key 'num_generations'; here it is called rollout.group_size"),
        ("env.max_completion_length=8", "no key 'max_completion_length'; here it is called env.max_turn_tokens"),
        ("agent=dpo", "agent has no option 'dpo'; there is recipe=dpo"),
        ("recipe=dapo", "recipe has no option 'dapo'; there is correction=dapo"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            resolve_defaults(compose(["env=jsonl", "env.path=a.jsonl", given]))
