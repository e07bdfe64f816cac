"""A study's grid: which runs it has, what they share, and what makes a run the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from unified_rl.config import compose, resolve_defaults
from unified_rl.errors import ConfigError
from unified_rl.study.grid import Study, identity, make_jobs, merge_overrides
from unified_rl.training.build import DISCOUNTS


def fake_compose(overrides: list[str]) -> dict[str, Any]:
    values = dict(o.split("=", 1) for o in overrides)
    if "typo" in values:
        raise ConfigError("there is no key 'typo'")
    start = {"stages": []} if values.get("warm_start") == "yes" else None
    return {"steps": int(values.pop("steps", 100)), "seed": int(values["seed"]), "all": values, "warm_start": start}


def study(**changes: Any) -> Study:
    node = {
        "name": "demo",
        "domains": {"language": ["env=chain", "warm_start=yes"], "control": ["env=route"]},
        "corrections": ["ppo", "tis"],
        "staleness": [0, 4],
        "seeds": [1, 2],
        **changes,
    }
    return Study.from_config({"study": node})


def test_every_cell_of_the_grid_is_one_run_with_its_overrides() -> None:
    runs = make_jobs(study(), fake_compose)[1]
    assert len(runs) == len({job.slug for job in runs}) == 2 * 2 * 2 * 2
    job = next(j for j in runs if j.labels == {"domain": "control", "correction": "tis", "staleness": 4, "seed": 2})
    assert job.cfg["all"] == {"env": "route", "correction": "tis", "rollout.staleness": "4", "seed": "2"}
    assert job.cfg["run_dir"] == str(job.folder) and job.cfg["resume_existing"] and not job.cfg["progress"]


def test_a_warm_start_is_made_once_for_each_domain_and_seed_and_shared() -> None:
    warm, runs = make_jobs(study(), fake_compose)
    assert [job.labels for job in warm] == [{"domain": "language", "seed": 1}, {"domain": "language", "seed": 2}]
    assert all(job.cfg["steps"] == 0 for job in warm)
    for job in runs:
        if job.labels["domain"] == "language":
            start = next(w for w in warm if w.labels["seed"] == job.labels["seed"])
            assert job.needs == start.slug and job.cfg["warm_start"]["run"] == str(start.folder)
        else:
            assert job.needs is None and job.cfg["warm_start"] is None


def test_lists_may_differ_by_domain_and_corrections_may_be_tuned() -> None:
    tuned = {"language": ["ppo", {"ppo_slow": ["correction=ppo", "agent.lr=1e-5"]}], "control": ["tis"]}
    runs = make_jobs(study(corrections=tuned, seeds={"language": [1], "control": [5]}), fake_compose)[1]
    assert {(j.labels["domain"], j.labels["correction"], j.labels["seed"]) for j in runs} == {
        ("language", "ppo", 1),
        ("language", "ppo_slow", 1),
        ("control", "tis", 5),
    }
    slow = next(j for j in runs if j.labels["correction"] == "ppo_slow")
    assert slow.cfg["all"]["correction"] == "ppo" and slow.cfg["all"]["agent.lr"] == "1e-5"


def test_a_domains_override_wins_over_the_common_one() -> None:
    assert merge_overrides(["steps=5", "agent=sac"], ["steps=9"]) == ["agent=sac", "steps=9"]
    with pytest.raises(ConfigError, match="not key=value"):
        merge_overrides(["steps"])


def test_identity_ignores_where_a_run_lives_and_nothing_else() -> None:
    cfg = {"steps": 5, "run_dir": "a", "warm_start": {"run": "here/start-1", "lr": 1}}
    assert identity(cfg) == identity({**cfg, "run_dir": "b", "progress": False})
    assert identity(cfg) == identity({**cfg, "warm_start": {"run": "/there/start-1", "lr": 1}})
    assert identity(cfg) != identity({**cfg, "warm_start": {"run": "here/start-2", "lr": 1}})
    assert identity(cfg) != identity({**cfg, "steps": 6})
    assert cfg["warm_start"]["run"] == "here/start-1"  # not changed by asking


def test_a_run_that_collects_by_itself_is_the_one_of_before_there_were_workers() -> None:
    cfg = {"steps": 5, "choices": {"env": "chain_mod"}}
    local = {**cfg, "engine": None, "learner": None}
    local |= {"choices": {"env": "chain_mod", "engine": "local", "learner": "single"}}
    workers = {**cfg, "engine": {"workers": 2}, "choices": {"env": "chain_mod", "engine": "ray"}}
    assert identity(cfg) == identity(local) != identity(workers)


def test_a_changed_setting_gets_new_folders_and_an_equal_one_the_same() -> None:
    first, again = make_jobs(study(), fake_compose)[1], make_jobs(study(), fake_compose)[1]
    changed = make_jobs(study(overrides=["steps=7"]), fake_compose)[1]
    assert [j.folder for j in first] == [j.folder for j in again]
    assert not {j.folder for j in first} & {j.folder for j in changed}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stalenes": [0]}, "did you mean staleness"),
        ({"corrections": []}, "corrections is missing or empty"),
        ({"corrections": ["ppo", "ppo"]}, "twice"),
        ({"staleness": {"language": [0]}}, "staleness must be a non-empty list .for domain control"),
        ({"seeds": "12"}, "seeds is .12.; it must be a list"),
        ({"workers": -1}, "workers"),
        ({"name": "../up"}, "name"),
        ({"domains": {"language": ["typo=1"]}}, "warm start of language: there is no key 'typo'"),
    ],
)
def test_a_bad_study_is_refused_before_anything_runs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_jobs(study(**changes), fake_compose)


def test_a_study_of_runs_without_evaluation_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^control-ppo-staleness0-seed1: eval_episodes=0, but a study compares"):
        make_jobs(study(domains={"control": ["env=route"]}), lambda o: {**fake_compose(o), "eval_episodes": 0})


def test_the_shipped_quickstart_composes() -> None:
    cfg = resolve_defaults(compose(["study=quickstart"], primary="compare"), primary="compare")
    found = Study.from_config(cfg)
    assert set(found.domains) == {"language", "control"}
    assert len(found.corrections) >= 3 and len(found.staleness) == 2 and found.path == Path("runs/quickstart")


def test_agents_are_compared_also_with_those_that_collect_by_themselves() -> None:
    agents = [{"ours": ["agent=ppo"]}, {"theirs": ["agent=sb3_ppo"]}, {"late": ["agent=ppo", "rollout.staleness=3"]}]
    told = study(domains={"pole": ["env=inverted_pendulum"]}, corrections=agents, staleness=[0], seeds=[1])
    ours, theirs, late = make_jobs(told, lambda words: resolve_defaults(compose(words)))[1]
    assert theirs.cfg["rollout"] is None and ours.cfg["rollout"]["staleness"] == late.cfg["rollout"]["staleness"] == 0
    stale = study(domains={"pole": ["env=inverted_pendulum"]}, corrections=agents[1:2], staleness=[2], seeds=[1])
    with pytest.raises(ConfigError, match="rollout has no keys here"):
        make_jobs(stale, lambda words: resolve_defaults(compose(words)))


def test_the_study_of_control_compares_what_it_says_and_has_a_null_control() -> None:
    found = Study.from_config(resolve_defaults(compose(["study=control"], primary="compare"), primary="compare"))
    domains = list(found.domains)
    assert len(domains) == 6
    one = Study.from_config({"study": {**vars(found), "seeds": [1]}})
    runs = make_jobs(one, lambda words: resolve_defaults(compose(words)))[1]
    for domain in domains:
        cells = {job.labels["correction"]: job.cfg for job in runs if job.labels["domain"] == domain}
        others = {"ppo", "frozen", "sb3"} | ({"zoo"} if domain != "inverted_pendulum" else set())
        assert set(cells) == others | ({"tuned"} if domain in ("hopper", "pendulum") else set())
        own, frozen = cells["ppo"]["agent"], cells["frozen"]["agent"]
        # a rate that is set is of the critic, too
        assert frozen["lr"] == 0 and frozen["critic_lr"] is None
        assert {**frozen, "lr": own["lr"], "critic_lr": own["critic_lr"]} == own
        assert len({cfg["steps"] for cfg in cells.values()}) == 1 and cells["sb3"]["agent"]["options"] is None
        defaults = [cfg["agent"]["gamma"] for name, cfg in cells.items() if name not in ("zoo", "tuned")]
        gammas = {gamma or DISCOUNTS["control"] for gamma in defaults}
        assert gammas == {0.9 if domain == "pendulum" else 0.99}


def test_the_study_of_sac_compares_equal_numbers_of_steps_and_has_a_null_control() -> None:
    found = Study.from_config(resolve_defaults(compose(["study=control_sac"], primary="compare"), primary="compare"))
    runs = make_jobs(found, lambda words: resolve_defaults(compose(words)))[1]
    assert {job.labels["domain"] for job in runs} == {"half_cheetah", "hopper", "pendulum"}
    for domain in found.domains:
        cells = {job.labels["correction"]: job.cfg for job in runs if job.labels["domain"] == domain}
        assert {"sac", "sb3"} <= set(cells) and len({cfg["steps"] for cfg in cells.values()}) == 1
        assert cells["sac"]["agent"]["updates_per_step"] == 1 and cells["sb3"]["agent"]["options"] is None
    frozen = next(job.cfg for job in runs if job.labels["correction"] == "frozen")["agent"]
    assert frozen["lr"] == 0


def test_the_study_of_classes_differs_in_the_policy_alone_and_has_a_null_control() -> None:
    found = Study.from_config(
        resolve_defaults(compose(["study=control_classes"], primary="compare"), primary="compare")
    )
    one = Study.from_config({"study": {**vars(found), "seeds": [1]}})
    cells = {job.labels["correction"]: job.cfg for job in make_jobs(one, lambda w: resolve_defaults(compose(w)))[1]}
    agents = {name: cfg["agent"] for name, cfg in cells.items() if name != "frozen"}
    assert all(agent == agents["gaussian"] for agent in agents.values()) and len(agents) == 6
    assert cells["frozen"]["agent"]["lr"] == 0 and cells["frozen"]["policy"] == cells["flow"]["policy"]
    noise = {"flow": {"std_min": 0.2, "std_max": 0.5}, "diffusion": {"std_min": 0.2}}
    for name, more in noise.items():
        assert cells[f"{name}_noisy"]["policy"] == {**cells[name]["policy"], **more} != cells[name]["policy"]
    kinds = [cells[name]["policy"]["_target_"] for name in ("gaussian", "flow", "diffusion", "tokens")]
    assert len(set(kinds)) == 4


def test_the_study_of_precision_differs_in_the_sampler_alone_and_has_two_null_controls() -> None:
    found = Study.from_config(resolve_defaults(compose(["study=precision"], primary="compare"), primary="compare"))
    one = Study.from_config({"study": {**vars(found), "seeds": [1]}})
    starts, runs = make_jobs(one, lambda words: resolve_defaults(compose(words)))
    cells = {job.labels["correction"]: job.cfg for job in runs}
    assert len(starts) == 1 and starts[0].cfg["policy"]["engine_dtype"] is None  # one policy for all to begin with
    full = cells["full"]
    assert cells["same"]["policy"] == {**full["policy"], "engine_dtype": "float32"}
    assert cells["frozen"]["agent"]["lr"] == 0 and cells["frozen"]["policy"] == full["policy"]
    for dtype in ("bfloat16", "int8", "float8", "int4"):
        weighed, plain = cells[dtype], cells[f"{dtype}_unweighed"]
        assert weighed["policy"] == plain["policy"] == {**full["policy"], "engine_dtype": dtype}
        assert weighed["correction"] == full["correction"] and weighed["correction"]["mismatch"]
        assert plain["correction"] == {**full["correction"], "mismatch": []}
    assert len(cells) == 11 and all(cfg["steps"] == full["steps"] for cfg in cells.values())
