"""Every recipe trains by its name, is not its absence, and is the method that it names in the limits that it names."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from run_cases import ALLOW, CONTROL, cached, composed, merged, model, recorded, teacher
from run_cases import LANGUAGE as SHORT
from test_resume import COMMON, cut_run, equal, rows_of

from unified_rl import cli
from unified_rl.config import compose, config_root
from unified_rl.errors import ConfigError
from unified_rl.study import recipe_parts, recipes
from unified_rl.training.checkpoint import checkpoints, read_checkpoint
from unified_rl.training.run import resume, train

LANGUAGE = tuple(merged(SHORT, ["env.max_turn_tokens=8"]))
NEEDED = {
    "luffy", "chord", "hpt", "gkd", "opsd", "dpo", "ghpo", "gdpo", "kdrl", "exopd", "nsr", "psr", "w_reinforce",
    "vla_opd", "iql", "td3_bc", "rlpd", "ipo", "f_dpo", "kto", "rpo_regularised", "humanline_dpo", "humanline_kto",
    "sweet_spot", "inpo", "mpo", "ampo", "trajectory_dpo", "opd", "opd_topk", "opcd", "sdft", "veto_kd", "offline_kd",
    "ca_opd", "paced", "rlad", "karl", "f_dpg", "kl_rl", "rapo", "dph_rl", "tr_dpo", "hypo", "pear", "eksft",
    "rank_aware_sft", "dypo", "gepo", "reason_maxxer", "dpg", "mopd", "skd", "mixsd", "dagger", "draft_opd", "dp_opd",
    "sinkd",
    "otr", "iql_lm", "ps_kd", "siren",
}  # fmt: skip
OFFLINE = ("iql", "td3_bc", "rlpd")
"""Value-based recipes, which have a test file of their own."""
ASYNCHRONOUS = ("areal", "echo_pull", "echo_push", "llama_rl", "periodic_asynchrony", "pipeline_rl")
"""Recipes whose workers are Ray's, likewise."""
NAMES = [name for name in recipes.recipe_names() if name not in (*OFFLINE, *ASYNCHRONOUS)]
BINS = ("policy=autoregressive", "policy.bins=5", "policy.hidden=[8]", "rollout.num_envs=4", "rollout.horizon=8")
SMALL = {  # what makes the run of a recipe small, or lets two updates tell something
    "chord": ["rollout.sources.demonstrations.rows=8"],
    "skd": ["rollout.speaker.top_k=3"],
    "dp_opd": ["rollout.sources.demonstrations.rows=4"],
    "gkd": ["rollout.sources.demonstrations.rows=4"],
    "sinkd": ["rollout.sources.demonstrations.rows=8"],
    "offline_kd": ["rollout.sources.demonstrations.rows=8"],
    **{name: ["rollout.sources.demonstrations.rows=8"] for name in ("eksft", "otr", "iql_lm", "ps_kd")},
    "rank_aware_sft": ["rollout.sources.demonstrations.rows=8"],
    "pear": ["rollout.sources.recorded.rows=8"],
    "reason_maxxer": ["rollout.sources.recorded.rows=8"],
    "hypo": ["rollout.sources.recorded.rows=8"],
    "tr_dpo": ["agent.anchors.reference.every=1"],
    "dph_rl": ["rollout.sources.rehearsed.rows=8"],
    "ink_grpo": ["rollout.sources.demonstrations.rows=4"],
    "ghpo": ["rollout.group_size=3"],
    "view_apo": ["agent.maps.0.base=2.0"],  # lengths of eight tokens hardly differ
    "kepo": ["rollout.group_size=2"],
    "rephrasing_po": ["rollout.context.below=1.0", "rollout.context.rows=2"],
    "fission_grpo": ["rollout.sources.recoveries.errors=2", "rollout.sources.recoveries.recoveries=4"],
    "agent_r": ["rollout.sources.revised.separators='0123456789+-=,>'"],
    "bepa": ["rollout.group_size=2"],
    "rgr_grpo": ["rollout.sources.guided.below=1.0"],
    "expert_iteration": ["agent.filters.0.high=2.8"],
    "tba": ["rollout.sources.kept.recent=0.5"],
    "sage": ["rollout.group_size=2"],
    "adora": ["agent.maps.0.threshold=2.0"],  # answers of eight tokens are hardly ever longer than others
    "safe": ["agent.objectives.near.coefficient.base=0.0", "agent.objectives.near.coefficient.low=0.0",
             "agent.objectives.near.coefficient.scale=1.0e+6"],
    "fg_expo": ["agent.objectives.near.coefficient.high=1.0e+3"],
}  # fmt: skip
TASKS = {
    "vla_opd": ("env=two_route", *BINS),
    "a_parl": CONTROL,
    "action_kto": ("env=two_route", *BINS),
    "occupancy_chi2": CONTROL,
    "trajectory_dpo": CONTROL,
}
FEW_DEMONSTRATIONS = ["warm_start.stages=[{updates: 2, lr: 3.0e-3}]", "warm_start.dataset=32"]
TEACHERS = {
    "dgrpo",
    "dagger",
    "dp_opd",
    "draft_opd",
    "exopd",
    "gkd",
    "kdrl",
    "kepo",
    "offline_kd",
    "opd",
    "opd_topk",
    "paced",
    "rlad",
    "sinkd",
    "skd",
    "verbal_distillation",
    "veto_kd",
    "vla_opd",
    "vold_text",
}
NARROW = ["agent.objectives.prefer.low=-1.0e-4", "agent.objectives.prefer.high=1.0e-4"]
APART = {"safe": ["agent.anchors.reference.folder=RUN"], "tr_dpo": ["agent.anchors.reference.ema=0.5"],
         "otr": ["agent.objectives.imitate.coefficient=1.0e-5"],  # Adam's steps hardly see a factor near 1
         "reason_maxxer": ["agent.filters.0.above=2.55"],  # an untrained policy is uncertain everywhere
         "stratified_grpo": ["rollout.columns.stratum=length"],  # answers of one turn are one stratum
         "humanline_dpo": NARROW, "humanline_kto": NARROW}  # fmt: skip
"""Recipes that do nothing until the policy has left its reference, which two updates hardly do."""
FAR = {
    "hpt": ["rollout.group_size=2"],  # of four rows one is right in every group
    "short_cot_rft": ["rollout.prompts=32"],  # hardly ever does an answer end early
    "trajectory_dpo": ["agent.lr=0.03", "agent.epochs=4"],
}
"""What lets a recipe and its limit part within two updates; set in both."""
RECORDED = {
    "dph_rl": "rollout.sources.rehearsed.data=FOLDER",
    "occupancy_chi2": "agent.reward_model.base=FOLDER",
    "hypo": "rollout.sources.recorded.data=FOLDER",
    "reason_maxxer": "rollout.sources.recorded.data=FOLDER",
    "pear": "rollout.sources.recorded.data=FOLDER",
    "infalign": "rollout.sources.reference.folder=MODEL",
    "sophia_text": "rollout.sources.described.folder=MODEL",
}
"""What names the recorded rows, or the other model, of recipes that learn from such."""
TOLD = {
    "mixsd": ["rollout.speaker.folder=RUN"],
    "sso": ["rollout.beginning.text='>,'", "rollout.beginning.opposite='+'"],
    "mopd": ["agent.anchors.teacher.folders=[RUN, RUN]", "rollout.columns.domain=truncated"],
}
"""What users must give to other recipes."""
FEW = tuple(merged(LANGUAGE, ["env.modulus=2", "env.terms=2", "env.held_out=0.0"]))
"""Eight prompts, so that they come again in the second update."""
TASKS["edit_grpo"] = tuple(merged(LANGUAGE, ["env._target_=run_cases.CommaChain"]))
SURE = ["env._target_=run_cases.SureChain", "env.confidence=true", "env.max_turn_tokens=12"]
TASKS["ca_opd"] = tuple(merged(LANGUAGE, SURE))
TASKS |= dict.fromkeys(["prefix_rl", "soup", "spec_rl"], FEW)
GROUP_SIZE = next(word for word in LANGUAGE if word.startswith("rollout.group_size"))
ELSEWHERE = [(name, d) for name in NAMES for d in recipes.recipe(name).domains[1:]]
"""Recipes and the domains that they claim beside the one that the other tests run them in."""
ROWS, STEPS, OTHER = ("rows",), ("steps",), ("model",)
EXPERIMENTAL = {name for name in NAMES if recipes.recipe(name).confidence.startswith("experimental")}
LIMITS = [
    pytest.param(name, number, marks=[pytest.mark.thorough] if number or name in EXPERIMENTAL else [])
    for name in NAMES
    for number in range(len(recipes.recipe(name).limits))
]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], str]:
    """Runs that can teach, by task, recorded rows, and a language model."""
    found = {task: teacher(tmp_path_factory.mktemp("teacher"), task) for task in (LANGUAGE, TASKS["vla_opd"], CONTROL)}
    other = model(tmp_path_factory.mktemp("model"), LANGUAGE)
    rows = {key: recorded(tmp_path_factory.mktemp("rows"), task) for key, task in ((ROWS, LANGUAGE), (STEPS, CONTROL))}
    return {**found, **rows, OTHER: other}


def of(name: str, runs: dict[tuple[str, ...], str], *overrides: Sequence[str]) -> list[str]:
    """Overrides of a run in the small setting of a recipe; a group size that a recipe has of its own is kept."""
    task = TASKS.get(name, LANGUAGE)
    words = [re.sub(r"(?<=[=\[ ])RUN\b", runs.get(task, ""), word) for part in overrides for word in part]
    rows = runs.get(STEPS if task is CONTROL else ROWS, "")
    words = [word.replace("=FOLDER", f"={rows}").replace(" FOLDER", f" {rows}") for word in words]
    words = [re.sub(r"(?<=folder[=:])( ?)MODEL", rf"\g<1>{runs.get(OTHER, '')}", word) for word in words]
    words = [word.replace("rows: 64", "rows: 8").replace("rows=64", "rows=8") for word in merged(task, words)]
    chosen = next((word.partition("=")[2] for word in words if word.startswith("recipe=")), "none")
    content = yaml.safe_load((config_root() / "recipe" / f"{chosen}.yaml").read_text()) or {}
    own = content.get("rollout", {})
    if "override /warm_start" in str(content) or any(word.startswith("warm_start=") for word in words):
        words += FEW_DEMONSTRATIONS
    return [word for word in words if "group_size" not in own or word != GROUP_SIZE]


def with_recipe(name: str, runs: dict[tuple[str, ...], str], *overrides: Sequence[str]) -> list[str]:
    taught = ["agent.teacher=RUN"] if name in TEACHERS else [RECORDED[name]] if name in RECORDED else TOLD.get(name, [])
    return of(name, runs, [f"recipe={name}", *SMALL.get(name, []), *APART.get(name, []), *taught], *overrides)


def sizes_of(name: str) -> list[str]:
    return [word for word in SMALL.get(name, []) if word.startswith("rollout.group_size")]


def test_the_recipes_that_were_promised_are_there() -> None:
    assert set(recipes.recipe_names()) >= NEEDED


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_it_is_and_where_it_comes_from(name: str) -> None:
    known = recipes.recipe(name)
    assert recipes.summary(name) and known.source and known.confidence and known.limits
    assert known.source.rpartition(" ")[2].replace(".", "").isdigit(), "the source ends with an arXiv id"
    assert all(limit.because and limit.equals for limit in known.limits)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_and_is_not_its_absence(name: str, runs: dict[tuple[str, ...], str]) -> None:
    with_it = cached(*with_recipe(name, runs))
    without = cached(*of(name, runs, sizes_of(name)))
    start = cached(*of(name, runs, ["agent.lr=1e-30", *sizes_of(name)]))
    for other in (without, start):
        assert moved(with_it, other) > 1e-5


def test_recorded_rows_may_be_those_of_another_policy(runs: dict[tuple[str, ...], str]) -> None:
    found = cached(*merged(with_recipe("pear", runs), ["seed=3"])).metrics  # they were recorded by that of seed 0
    assert found["rollout/joined/recorded"] > 0


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_resumes_bit_for_bit(name: str, runs: dict[tuple[str, ...], str], tmp_path: Path) -> None:
    words = merged(with_recipe(name, runs), COMMON[1:], ["updates=3", "checkpoint_every=1"])
    words += ["eval_episodes=0"] if "env.held_out=0.0" in words else []
    words = merged(words, [f"run_dir={tmp_path / 'whole'}"])
    whole = train(composed(words), allow=ALLOW)
    saves = checkpoints(whole / "checkpoints")
    assert len(saves) == 3
    cut_run(whole, tmp_path / "part", saves[0])
    resume(str(tmp_path / "part"), allow=ALLOW)
    equal(read_checkpoint(saves[-1]), read_checkpoint(checkpoints(tmp_path / "part" / "checkpoints")[-1]))
    assert rows_of(tmp_path / "part") == rows_of(whole)


@pytest.mark.parametrize(("name", "domain"), ELSEWHERE)
def test_a_recipe_trains_in_every_domain_that_it_claims(
    name: str, domain: str, runs: dict[tuple[str, ...], str]
) -> None:
    plain = {"language": LANGUAGE, "control": CONTROL}[domain]
    task = merged(plain, ["agent.epochs=2"])  # it leaves its start
    few = FEW_DEMONSTRATIONS if name == "demo_regularised" else []
    taught = [f"agent.teacher={runs[plain]}"] if name in TEACHERS else []
    if name in RECORDED:
        taught = [RECORDED[name].replace("FOLDER", runs[ROWS if plain is LANGUAGE else STEPS])]
    with_it = cached(*merged(task, [f"recipe={name}", *SMALL.get(name, []), *few, *taught]))
    assert moved(with_it, cached(*merged(task, ["agent.lr=1e-30"]))) > 1e-5
    assert moved(with_it, cached(*task)) > 1e-6


def moved(one: Any, other: Any) -> float:
    """The largest difference of two policies in what gradients move; moments of observations move by themselves."""
    learnt = [name for name in other.weights if "normalizer." not in name]
    return max(float((one.weights[name] - other.weights[name]).abs().max()) for name in learnt)


@pytest.mark.parametrize(("name", "number"), LIMITS)
def test_a_recipe_is_the_other_method_in_its_limit(name: str, number: int, runs: dict[tuple[str, ...], str]) -> None:
    limit = recipes.recipe(name).limits[number]
    one = cached(*of(name, runs, [f"recipe={name}", *SMALL.get(name, [])], limit.when))
    other = cached(*of(name, runs, limit.equals))
    start = cached(*of(name, runs, ["agent.lr=1e-30"]))
    for key, weight in other.weights.items():
        torch.testing.assert_close(one.weights[key], weight, atol=1e-6, rtol=0.0)
    assert moved(start, other) > 1e-5, "neither run moved, so they would agree whatever the recipe says"
    shared = [word for word in limit.when if word in limit.equals and not word.startswith("agent.teacher")]
    by_itself = [word for word in limit.when if word not in shared and not word.startswith("agent.teacher")]
    if by_itself:  # settings that both have do not tell the recipe from its limit
        far = FAR.get(name, [])
        near = [cached(*with_recipe(name, runs, words, far)) for words in (shared, limit.when)]
        assert moved(*near) > 1e-6, "the recipe is its limit, whatever is set"
    elif shared:  # what both have is the limit
        plain = [word for word in limit.equals if word not in shared]
        assert moved(cached(*with_recipe(name, runs)), cached(*of(name, runs, sizes_of(name), plain))) > 1e-6


def test_hints_are_given_to_the_prompts_that_nobody_solves_alone(runs: dict[tuple[str, ...], str]) -> None:
    """Else both tests of the recipe would be about a task without such prompts, or with nothing else."""
    small = cached(*with_recipe("ghpo", runs)).metrics
    limit = recipes.recipe("ghpo").limits[0]
    assert small["rollout/hinted"] > 0.0
    assert cached(*of("ghpo", runs, ["recipe=ghpo"], limit.when)).metrics["rollout/hinted"] == 0.0


def test_strata_of_another_number_change_the_update(runs: dict[tuple[str, ...], str]) -> None:
    """Every answer of the small task has one turn; how long it is tells them apart."""
    stratified, whole = (
        cached(*of("x", runs, ["recipe=stratified_grpo", "rollout.columns.stratum=length", *more]))
        for more in ([], ["correction.advantage.blend=0.0"])
    )
    assert moved(stratified, whole) > 1e-5


def test_the_advantages_of_negative_reinforcement_are_those_of_the_paper() -> None:
    from tensordict import TensorDict

    from unified_rl.returns import record_advantage
    from unified_rl.returns.maps import MAPS

    record = TensorDict(
        {
            "reward": torch.tensor([[1.0], [0.0]]),
            "step_mask": torch.ones(2, 1, dtype=torch.bool),
            "mask": torch.ones(2, 1, dtype=torch.bool),
            "group": torch.zeros(2, dtype=torch.int64),
        },
        batch_size=[2],
    )
    for name, wanted in {"nsr": [0.0, -1.0], "psr": [1.0, 0.0], "w_reinforce": [0.1, -1.0]}.items():
        cfg = compose([f"recipe={name}"])
        advantage = record_advantage(record, cfg["correction"]["advantage"])
        for node in cfg["agent"]["maps"]:
            advantage = MAPS[node["name"]](record, advantage, **{k: v for k, v in node.items() if k != "name"})
        assert advantage.tolist() == pytest.approx(wanted)


def test_the_page_of_recipes_is_up_to_date(source: Path) -> None:
    path = source / "docs" / recipes.PAGE
    assert path.read_text() == recipes.page(), f"run: {recipes.COMMAND}"


def test_recipes_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    assert sorted(listed) == recipes.recipe_names()
    of_family = lines[lines.index("distillation: a teacher's distribution") + 1 :]
    of_family = of_family[: of_family.index("")]
    assert next(line for line in of_family if line.split()[0] == "exopd").endswith(" (language)")
    assert next(line for line in lines if line.split()[:1] == ["vla_opd"]).endswith(" (control)")
    assert cli.main(["recipes", "show", "chord"]) == 0
    shown = capsys.readouterr().out
    assert "2508.11408" in shown and "warmup_cosine" in shown and "mu = 0" in shown and "source:" in shown
    assert cli.main(["recipes", "show", "chord", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["limit"][0]["when"] and told["family"] == "guidance" and told["domains"] == ["language"]
    assert told["parts"]["rows"] == ["Demonstrations"] and "agent.objectives.policy.rows=own" in told["changes"]


def test_a_recipe_tells_what_it_changes_and_draws_its_rows() -> None:
    found = recipe_parts.changes("luffy")
    assert found[0] == "correction=luffy" and "rollout.group_size=7" in found
    assert "correction.advantage.scale=none   [correction=luffy: std]" in found
    assert recipe_parts.picture("luffy")[0].split("      ")[1].split() == [*"oooooooD"]
    assert recipe_parts.picture("dpo") == []
    assert "solution" in recipe_parts.picture("pope")[0]
    assert recipe_parts.parts("dpo")["terms of the loss"] == ["no policy term", "preference (dpo)"]
    assert recipe_parts.parts("kdrl")["other policies"] == ["teacher"]


@pytest.mark.parametrize("name", recipes.recipe_names())
def test_every_part_of_a_recipe_has_words_in_pictures(name: str) -> None:
    rollout = recipe_parts.read(name)[1].get("rollout", {})
    for key in ("beginning", "context", "speaker"):
        known = {"beginning": recipe_parts.GIVEN, "context": recipe_parts.AGAIN, "speaker": recipe_parts.SPEAKERS}[key]
        assert not rollout.get(key) or rollout[key]["_target_"].rpartition(".")[2] in known
    for node in (rollout.get("sources") or {}).values():
        assert node["_target_"].rpartition(".")[2] in recipe_parts.LETTERS


PLAIN = ["env=jsonl", "env.path=FILE", *(word for word in LANGUAGE if not word.startswith("env")), "eval_episodes=0"]
REFUSED = {
    "no teacher": (LANGUAGE, ["recipe=gkd"], "set agent.teacher to the folder of a run"),
    "no teacher to speak": (LANGUAGE, ["recipe=skd"], "set it: agent.teacher="),
    "no recorded rows": (LANGUAGE, ["recipe=dph_rl"], "set it: rollout.sources.rehearsed.data="),
    "no model": (LANGUAGE, ["recipe=infalign"], "set rollout.sources.reference.folder="),
    "no groups": (LANGUAGE, ["recipe=dpo", "rollout.group_size=1"], "set agent.objectives.prefer.within=batch"),
    "no groups to measure by": (LANGUAGE, ["recipe=hpt", "rollout.group_size=1"], "several rows a prompt"),
    "no stated confidence": (LANGUAGE, ["recipe=ca_opd"], "set env.confidence=true"),
    "no groups to be sure by": (
        LANGUAGE,
        ["recipe=ca_opd", *SURE, "rollout.group_size=1"],
        "shows 0 or 1 alone: raise it",
    ),
    "no partly solved groups": (LANGUAGE, ["recipe=exgrpo", "rollout.group_size=1"], "rollout.sources.Pool"),
    "no groups to filter": (CONTROL, ["recipe=cppo"], "agent.filters.0. compares rows of one group.*over=batch"),
    "no groups to map": (CONTROL, ["recipe=adora"], "agent.maps.0. compares rows of one group"),
    "no hints": (PLAIN, ["recipe=know_rl"], "name the column that holds"),
    "no logits": (CONTROL, ["recipe=d3s"], "use a policy of tokens or of action bins"),
    "no prompts": (CONTROL, ["recipe=pcl"], "trains in language, and this run in control, where these do: .*entropic"),
    "no conversations": (CONTROL, ["recipe=luffy"], "trains in language, and this run in control"),
    "no actions": (LANGUAGE, ["recipe=action_kto"], "set it to null"),
}
"""What recipes cannot do without, by what is missing: the task, what is asked for, and what the refusal names."""


@pytest.mark.parametrize("missing", REFUSED)
def test_what_a_recipe_lacks_is_refused_with_what_works(missing: str, tmp_path: Path) -> None:
    task, words, hint = REFUSED[missing]
    rows = [{"question": f"{k}+1=", "answer": str(k + 1)} for k in range(20)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [word.replace("FILE", str(tmp_path / "p.jsonl")) for word in merged(task, words)]
    with pytest.raises(ConfigError, match=hint):
        cached(*words)


def test_groups_without_comparisons_teach_a_reward_model_nothing() -> None:
    hopeless = merged(LANGUAGE, ["env._target_=unified_rl.envs.language.ChainMod", "recipe=pessimistic_rm"])
    assert cached(*hopeless).metrics["reward_model/reward"] <= 0.0  # what is left is the width of ignorance


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["show", "chrod"], "did you mean 'chord'"),
        (["chord"], "recipes show chord"),
        (["show"], "recipes [show NAME]"),
        (["--write", "x", "--json"], "takes a folder"),
    ],
)
def test_bad_words_are_answered_with_what_works(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["recipes", *words]) == 2
    assert hint in capsys.readouterr().err


def test_a_misspelt_field_of_a_recipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    path = tmp_path / "recipe" / "mine.yaml"
    path.write_text("# @package _global_\n# Mine\nrecipe: {sauce: me}\n")
    with pytest.raises(ConfigError, match="did you mean 'source'"):
        compose(["recipe=mine"], config_dirs=[str(tmp_path)])
    with pytest.raises(ConfigError, match="did you mean 'when'"):
        recipes.Recipe(limit=[{"whn": []}])
    with pytest.raises(ConfigError, match="did you mean 'guidance'"):
        recipes.Recipe(family="guidence")
    with pytest.raises(ConfigError, match="did you mean 'control'"):
        recipes.Recipe(domains=["controls"])
    with pytest.raises(ConfigError, match="a list of some of language, control"):
        recipes.Recipe(domains=[])
