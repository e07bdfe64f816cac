"""Presets by name, overrides, and errors that name the nearest."""

from __future__ import annotations

import re
from importlib import resources

import pytest
import torch
import yaml
from tensordict import TensorDict

from unified_rl.config import compose
from unified_rl.correction import Correction, correction_names, load_correction, preset_config
from unified_rl.errors import ConfigError, RecordError

PUBLISHED = set(
    """
    reinforce importance_sampling sequence_is prefix_is per_decision_is ppo dual_clip_ppo grpo dr_grpo dapo
    clip_cov kl_cov decoupled_ppo ppo_ewma a3po minirl tis cis icepop veto geo_reject geo_reject_token_tis
    k3_reject opsm dppo_tv dppo_kl gspo gmpo hoelder ctpo minpro turn_ppo s_ppo st_ppo steppo alp cispo dispo
    topr rec_one_side rec_two_side rec_ring opmd asymre red_weight red_drop sppo sapo vespo p3o p4o m2po bapo
    humanline luffy nft aipo lp_reg tba gvpo copg dro flowrl opo vcpo sfpo t_ppo nat_uniform nat_prefix remix
    erpd troll fixpo mdpo decoupled_snapshot
    """.split()  # noqa: SIM905
)


def make(width: int = 4) -> tuple[torch.Tensor, TensorDict]:
    g = torch.Generator().manual_seed(0)
    current = -3 - torch.rand(4, width, generator=g)
    noisy = {
        f"{name}_log_prob": current + 0.3 * torch.randn(4, width, generator=g)
        for name in ("behavior", "proximal", "reference", "proxy", "teacher")
    }
    rest = {
        "mask": torch.ones(4, width, dtype=torch.bool),
        "step_index": torch.zeros(4, width, dtype=torch.int64),
        "reward": torch.tensor([[0.0], [1.0], [1.0], [0.0]]),
        "advantage": torch.tensor([-1.0, 1.0, 0.5, -0.5]),
        "group": torch.tensor([0, 0, 1, 1]),
        "policy_version": torch.zeros(4, width, dtype=torch.int64),
    }
    return current, TensorDict({**noisy, **rest}, batch_size=[4])


def test_every_published_method_is_a_preset_with_a_source_and_honest_about_its_constants() -> None:
    assert set(correction_names()) >= PUBLISHED
    for name in correction_names():
        c = load_correction(name)
        assert c.name == name and c.summary and c.source and c.confidence, name
        guessed = any(word in c.confidence for word in ("abstract", "memory"))
        assert c.experimental or not guessed, name


def test_methods_whose_constants_were_not_read_are_experimental() -> None:
    unread = "s_ppo st_ppo minpro dispo remix erpd copg fixpo minirl nat_uniform nat_prefix sfpo t_ppo troll"
    assert all(load_correction(name).experimental for name in unread.split())


def test_sources_are_papers_with_an_arxiv_id_but_for_those_that_have_none() -> None:
    without = {n for n in correction_names() if not re.search(r"\b\d{4}\.\d{5}\b", load_correction(n).source)}
    assert without == {"reinforce", "importance_sampling", "sequence_is", "prefix_is", "per_decision_is", "cis"}


@pytest.mark.parametrize(
    ("name", "parent"),
    [
        ("dro", "opmd"),
        ("tba", "gvpo"),
        ("copg", "gvpo"),
        ("rec_one_side", "ppo"),
        ("ppo_ewma", "decoupled_ppo"),
        ("a3po", "decoupled_ppo"),
        ("decoupled_snapshot", "decoupled_ppo"),
        ("steppo", "ppo"),
        ("t_ppo", "ppo"),
        ("opo", "reinforce"),
    ],
)
def test_names_of_one_rule_are_short_files_that_extend_another_preset(name: str, parent: str) -> None:
    text = resources.files("unified_rl.configs").joinpath("correction", f"{name}.yaml").read_text()
    assert yaml.safe_load(text)["defaults"] == [parent, "_self_"]
    assert len(text.splitlines()) <= 16


@pytest.mark.parametrize("name", ["ppo", "icepop", "nat_prefix", "dro", "hoelder"])
def test_the_command_line_composes_what_load_correction_reads(name: str) -> None:
    node = compose([f"correction={name}", "env=half_cheetah", "agent=policy_gradient"])["correction"]
    assert node["_target_"] == "unified_rl.correction.Correction"
    composed = Correction.from_config(node)
    current, batch = make()
    torch.testing.assert_close(composed(current, batch).weight, load_correction(name)(current, batch).weight)
    assert composed.name == name


def test_overrides_reach_nested_fields_and_lists() -> None:
    current, batch = make()
    wide = load_correction("dapo", **{"kernel.clip_low": 100.0, "kernel.clip_high": 100.0})
    plain = load_correction("importance_sampling")
    torch.testing.assert_close(wide(current, batch).weight, plain(current, batch).weight)
    tight = load_correction("tis", **{"mismatch.0.high": 0.01})
    assert float(tight.prepare(current, batch)["weight"].max()) == pytest.approx(0.01)
    assert preset_config("tis")["mismatch"][0]["high"] == 2.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_correction("dappo"), "unknown correction 'dappo'; did you mean .*dapo"),
        (lambda: load_correction("ppo", **{"kernel.clip_hihg": 1}), "no field 'clip_hihg'; did you mean 'clip_high'"),
        (lambda: load_correction("ppo", **{"kernal.clip_high": 1}), "no field 'kernal'; did you mean 'kernel'"),
        (lambda: load_correction("tis", **{"mismatch.3.high": 1}), "list of 1 rules"),
        (lambda: load_correction("ppo", **{"reduce.x": 1}), "has no fields"),
        (lambda: Correction(kernel="pppo"), "correction.kernel 'pppo' is unknown; did you mean 'ppo'"),
        (lambda: Correction(level="sequnce"), "correction.level 'sequnce' is unknown; did you mean 'sequence'"),
        (lambda: Correction(anchor="behaviour"), "correction.anchor 'behaviour' is unknown; did you mean 'behavior'"),
        (lambda: Correction(reduce="mean"), "correction.reduce 'mean' is unknown"),
        (lambda: Correction(denominator="some"), "original or kept"),
        (lambda: Correction(reduce="sequence-mean-token-sum-norm"), "needs horizon"),
        (lambda: Correction(kernel="ppo", mismatch=["truncate"]), "would count it twice"),
        (lambda: Correction(mismatch="truncate"), "lists of rules"),
        (lambda: Correction(penalty=[{"name": "k3", "anchor": "ref"}]), "correction.penalty.0.anchor 'ref' is unknown"),
        (lambda: Correction.from_config({"levels": "unit"}), "no field 'levels'; did you mean 'level'"),
    ],
)
def test_configuration_errors_name_the_thing_and_the_nearest(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=message):
        call()


@pytest.mark.parametrize(
    ("name", "anchor", "how"),
    [
        ("tis", "proximal", "snapshot"),
        ("humanline", "reference", "frozen reference"),
        ("ppo", "behavior", "what the sampler reported"),
        ("lp_reg", "proxy", "filtered old policy"),
        ("erpd", "teacher", "teacher policy"),
        ("remix", "proximal", "snapshot"),
    ],
)
def test_missing_log_probs_say_which_anchor_and_how_to_get_them(name: str, anchor: str, how: str) -> None:
    correction = load_correction(name)
    assert correction.needs(anchor)
    current, batch = make()
    del batch[f"{anchor}_log_prob"]
    with pytest.raises(RecordError, match=f"{anchor} policy, but the batch has no {anchor}_log_prob: .*{how}"):
        correction(current, batch)


def test_wrong_shapes_and_a_missing_advantage_are_clear_errors() -> None:
    current, batch = make()
    with pytest.raises(RecordError, match=r"log_prob has shape \(4, 3\), but the mask is \(4, 4\)"):
        load_correction("ppo")(current[:, :3], batch)
    with pytest.raises(RecordError, match=r"advantage has shape \(4, 3\)"):
        load_correction("ppo")(current, batch.clone().set("advantage", torch.zeros(4, 3)))
    del batch["advantage"]
    with pytest.raises(RecordError, match="no advantage: set it with"):
        load_correction("ppo")(current, batch)
    assert torch.isfinite(load_correction("gvpo")(current, batch).loss)


def test_advantages_of_rows_steps_and_units_mean_the_same() -> None:
    current, batch = make(6)
    batch["step_index"] = torch.tensor([0, 0, 1, 1, 1, 2]).expand(4, -1).contiguous()
    batch["reward"] = torch.zeros(4, 3)
    row = load_correction("ppo")(current, batch).weight
    for shape in ((4, 3), (4, 6)):
        batch["advantage"] = torch.tensor([-1.0, 1.0, 0.5, -0.5])[:, None].expand(shape).contiguous()
        torch.testing.assert_close(load_correction("ppo")(current, batch).weight, row)


def test_graded_rewards_and_densities_are_refused_where_they_make_no_sense() -> None:
    current, batch = make()
    batch["reward"] = batch["reward"] * 0.7
    with pytest.raises(RecordError, match=r"needs rewards of 0 or 1(.|\n)*topr"):
        load_correction("nft")(current, batch)
    for name in ("dppo_tv", "dppo_kl", "lp_reg", "luffy"):
        with pytest.raises(ConfigError, match=f"correction {name} compares probabilities.*use correction="):
            load_correction(name).check_domain(discrete=False)
        load_correction(name).check_domain(discrete=True)
    with pytest.raises(ConfigError, match="projects a categorical"):
        load_correction("troll").check_domain(discrete=False)


def test_a_method_that_acts_outside_the_loss_is_refused_where_nobody_does_that_part() -> None:
    for name in ("fixpo", "vcpo", "sfpo", "st_ppo", "troll", "alp"):
        with pytest.raises(ConfigError, match=f"correction {name} is more than a loss"):
            load_correction(name).require_support()
    load_correction("vcpo").require_support(wrappers=["ess_learning_rate"])
    load_correction("fixpo", wrapper=None).require_support()
    with pytest.raises(ConfigError, match="a3po wants its proximal policy by 'interpolated'"):
        load_correction("a3po").require_support()
    load_correction("a3po").require_support(providers=["snapshot", "interpolated"])
    load_correction("dapo").require_support()


def test_a_pass_over_the_batch_is_asked_for_only_where_it_is_needed() -> None:
    cheap = {"reinforce", "ppo", "grpo", "dapo", "gspo", "cispo", "tis", "icepop", "decoupled_ppo", "sapo", "vespo"}
    assert not any(load_correction(name).needs_full_pass for name in cheap)
    assert all(load_correction(name).needs_full_pass for name in ("p3o", "m2po", "bapo", "clip_cov", "nft", "opsm"))
    _, batch = make()
    load_correction("tis").prepare(None, batch)
    with pytest.raises(RecordError, match="correction m2po needs the current log-probs"):
        load_correction("m2po").prepare(None, batch)


def test_preset_files_have_the_package_header_and_a_one_line_comment() -> None:
    folder = resources.files("unified_rl.configs").joinpath("correction")
    for name in correction_names():
        text = folder.joinpath(f"{name}.yaml").read_text()
        first, second, *_ = text.splitlines()
        assert first == "# @package _global_" and second.startswith("# ") and len(second) < 110, name
        assert set(yaml.safe_load(text)) <= {"correction", "defaults"}, name
