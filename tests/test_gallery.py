"""The gallery: every preset is listed once, shown in full, drawn from its own gradient, and the page is not stale."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from unified_rl import cli
from unified_rl.correction import Correction, correction_names, load_correction, preset_config
from unified_rl.correction.penalties.penalty import PENALTIES
from unified_rl.correction.penalties.selection import SELECTIONS
from unified_rl.correction.view import ANCHORS
from unified_rl.correction.weights.mismatch import MISMATCHES
from unified_rl.correction.weights.rejection import REJECTS
from unified_rl.correction.weights.thinning import THINS
from unified_rl.study.gallery import catalogue, formula, page
from unified_rl.study.gallery.curves import Curves, curves
from unified_rl.study.gallery.described import Described, described
from unified_rl.study.gallery.draw import digest_of, draw_family
from unified_rl.study.gallery.expand import expanded, needs


@cache
def shown() -> dict[str, Described]:
    return page.all_described()


def at(curve: Curves, values: torch.Tensor, x: float) -> tuple[float, float]:
    """A curve's value at the grid point closest to ``x``, and the ratio there."""
    i = int((curve.log_ratio - x).abs().argmin())
    return float(values[i]), math.exp(float(curve.log_ratio[i]))


# --------------------------------------------------------------------------------------------- listing


def test_every_preset_is_in_one_family_and_notes_name_only_presets() -> None:
    listed = [name for family in catalogue.families() for name in family.presets]
    assert sorted(listed) == catalogue.names() == correction_names()
    assert "Other" not in [family.title for family in catalogue.families()]
    notes = catalogue.data("notes")
    assert {*notes["traps"], *notes["spans"]} <= set(correction_names())
    assert all(set(f["presets"]) <= set(correction_names()) for f in notes["families"])


def test_the_listing_is_one_line_a_preset_and_imports_no_torch() -> None:
    code = "import sys; from unified_rl.cli import main; rc = main(['corrections']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={**os.environ})
    assert done.returncode == 0, done.stderr
    *lines, torch_loaded = done.stdout.splitlines()
    assert torch_loaded == "False"
    for name in correction_names():
        (line,) = [text for text in lines if text.startswith(f"  {name} ")]
        config = preset_config(name)
        kernel = config.get("kernel", "constant")
        assert config["summary"] in line and (kernel if isinstance(kernel, str) else kernel["name"]) in line
        assert ("* " in line) == config.get("experimental", False), line


def test_the_listing_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["corrections", "--json"]) == 0
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert set(listed) == set(correction_names())
    assert listed["gspo"]["level"] == "geometric" and listed["gspo"]["kernel"] == "ppo"
    assert listed["copg"]["experimental"] is True and listed["gvpo"]["experimental"] is False


# --------------------------------------------------------------------------------------------- showing one


def test_show_prints_the_rule_in_full_and_draws_a_png(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "made" / "remix.png"
    assert cli.main(["corrections", "show", "remix", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    for words in (
        "experimental",
        "2507.06892",
        "confidence: abstract and note",
        "proximal_log_prob, reference_log_prob",
        "clip: 0.2",
        "importance: false",  # the default of a penalty
        "ddof: 1",  # the default of an advantage
        "denominator: original",
        str(out),
    ):
        assert words in text, words
    with Image.open(out) as image:
        assert image.format == "PNG" and min(image.size) > 300
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 10  # something is drawn


def test_show_takes_overrides_and_prints_json_with_curves(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["corrections", "show", "aipo", "kernel.high=inf", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rule"]["kernel"]["high"] == "inf"
    assert cli.main(["corrections", "show", "dapo", "kernel.clip_high=0.5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rule"]["kernel"] == {"name": "ppo", "clip_low": 0.2, "clip_high": 0.5, "dual_clip": None}
    pairs = zip(found["curves"]["log_ratio"], found["curves"]["A > 0"], strict=True)
    assert all(math.isclose(y, math.exp(x) if math.exp(x) <= 1.5 else 0.0, abs_tol=1e-5) for x, y in pairs)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["show", "dappo"], "unknown correction 'dappo'; did you mean 'dapo'"),
        (["dapo"], "unified-rl corrections show dapo"),
        (["show"], "show NAME"),
        (["list", "dapo"], "show NAME"),
        (["--out", "x.png"], "--out needs a preset"),
        (["show", "dapo", "--out", "x.jpg"], "ends in .png"),
        (["show", "dapo", "kernel.clip_hihg=1"], "did you mean 'clip_high'"),
        (["show", "dapo", "clip"], "not of the form key=value"),
        (["show", "dapo", "kernel.clip_high=wide"], "correction.kernel.clip_high is 'wide'; it must be a number"),
        (["show", "dapo", "--write", "docs"], "--write takes a folder"),
    ],
)
def test_bad_requests_are_one_line_with_the_nearest_name(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(cli.DEBUG, raising=False)
    assert cli.main(["corrections", *argv]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


# --------------------------------------------------------------------------------------------- expanding


@pytest.mark.parametrize("name", correction_names())
def test_an_expanded_rule_is_the_same_rule(name: str) -> None:
    """Built from its expanded fields a preset gives the same curves, and expanding changes nothing more."""
    rule = expanded(preset_config(name))
    fields = {key: value for key, value in rule.items() if key != "proximal"}
    again = Correction.from_config(fields)
    assert expanded(rule) == rule
    assert needs(again) == needs(load_correction(name))
    assert yaml.safe_load(yaml.safe_dump(rule)) == rule


def test_defaults_come_from_the_signatures() -> None:
    rule = expanded({"kernel": "ppo", "mismatch": ["truncate"], "anchor": "proximal", "penalty": ["k3"]})
    assert rule["kernel"] == {"name": "ppo", "clip_low": 0.2, "clip_high": 0.2, "dual_clip": None}
    assert rule["mismatch"] == [
        {"name": "truncate", "high": 2.0, "level": "unit", "normalize": False, "numerator": "proximal"}
    ]
    assert rule["penalty"][0]["anchor"] == "reference" and rule["penalty"][0]["coefficient"] == 1.0


def test_needs_name_the_log_probs_and_the_domain() -> None:
    assert needs(load_correction("ppo"))["log_probs"] == ["behavior_log_prob"]
    assert needs(load_correction("erpd"))["log_probs"] == [ANCHORS[a] for a in ("behavior", "reference", "teacher")]
    assert [n for n in correction_names() if needs(load_correction(n))["discrete"]] == [
        "dppo_kl",
        "dppo_tv",
        "lp_reg",
        "luffy",
        "troll",
    ]
    assert [n for n in correction_names() if needs(load_correction(n))["binary_rewards"]] == ["nft"]


def test_every_part_has_a_formula_and_every_preset_a_finished_one() -> None:
    from unified_rl.correction.levels import LEVELS
    from unified_rl.correction.reduction import REDUCTIONS
    from unified_rl.correction.transforms import PRES

    for ours, theirs in (
        (formula.LEVELS, LEVELS),
        (formula.LEVEL_NOUN, LEVELS),
        (formula.MISMATCHES, MISMATCHES),
        (formula.REJECTS, REJECTS),
        (formula.PENALTIES, PENALTIES),
        (formula.SELECTIONS, SELECTIONS),
        (formula.PRES, PRES),
        (formula.THINS, THINS),
        (formula.REDUCTIONS, REDUCTIONS),
    ):
        assert set(ours) == set(theirs)
    assert described("icepop").formula == [
        "r = the unit's own ratio, pi / proximal",
        "g = r, but 0 where A > 0 and r > 1.2, or A < 0 and r < 0.8",
        "w = u where 0.5 <= u <= 5, else 0, u the unit's own of proximal / behavior",
        "sum over units / units of the batch",
    ]
    assert (
        "keep where |mean over the row of log u| <= 0.01, u = proximal / behavior"
        in described("k1_mean_reject").formula
    )
    assert "penalty 0.1 * (x^2 / 2), x = log(pi / behavior)" in described("opmd").formula
    assert all("None" not in line and "{" not in line for d in shown().values() for line in d.formula)


# --------------------------------------------------------------------------------------------- curves


def test_curves_of_known_kernels_are_their_formulas() -> None:
    """Measured from the gradient of the loss, against the published weights."""
    x = shown()["ppo"].curves.log_ratio
    r, zero = x.exp(), torch.zeros_like(x)
    s = torch.sigmoid(r - 1)
    shaped = 0.1 * 0.04 * r / (0.04 * r + 0.1).square()
    expected = {
        "ppo": (torch.where(r > 1.2, zero, r), torch.where(r < 0.8, zero, r)),
        "dual_clip_ppo": (torch.where(r > 1.2, zero, r), torch.where((r < 0.8) | (r > 3), zero, r)),
        "cispo": (r.clamp(max=1.2), r.clamp(max=1.2)),
        "topr": (torch.ones_like(r), r.clamp(max=1.0)),
        "sapo": (4 * r * s * (1 - s), None),
        "vespo": (r**2 * (3 - 3 * r).exp(), r**3 * (2 - 2 * r).exp()),
        "gmpo": (torch.where(x > 0.4, zero, r), torch.where(x < -0.4, zero, r)),
        "humanline": (
            torch.where((r > 1.2) | (x < -1), zero, r),
            torch.where((r < 0.8) | (x > 1.5), zero, r),
        ),
        "luffy": (shaped, shaped),
        "nft": (torch.ones_like(r), 0.5 * r / (0.5 * (2 - r).clamp(min=1.0))),
    }
    for name, sides in expected.items():
        found = shown()[name].curves
        for value, side in zip((found.positive, found.negative), sides, strict=True):
            if side is not None:
                torch.testing.assert_close(value, side, atol=1e-9, rtol=1e-9, msg=name)


def test_a_residuals_curve_is_a_line_through_one() -> None:
    """In a group of four with half the answers right, only one's own drift d: delta - mean = 1/2 - beta d 3/4."""
    found = shown()["gvpo"].curves
    torch.testing.assert_close(found.positive, 1 - 0.1 * 1.5 * found.log_ratio)
    torch.testing.assert_close(found.negative, 1 + 0.1 * 1.5 * found.log_ratio)


def test_penalties_and_outer_weights_have_lines_of_their_own() -> None:
    opmd, tis, mask = (shown()[name].curves for name in ("opmd", "tis", "sequence_mask"))
    assert opmd.positive_total is not None and opmd.negative_total is not None and opmd.outer is None
    torch.testing.assert_close(opmd.positive_total, 1 - 0.1 * opmd.log_ratio)
    torch.testing.assert_close(opmd.negative_total, 1 + 0.1 * opmd.log_ratio)
    assert tis.positive_total is None and tis.outer is not None and mask.outer is not None
    torch.testing.assert_close(tis.outer, tis.log_ratio.exp().clamp(max=2.0))
    u = mask.log_ratio.exp()
    torch.testing.assert_close(mask.outer, torch.where(u > 3, torch.zeros_like(u), u))


def test_batch_statistics_act_in_the_curve() -> None:
    """P3O is the ratio while small and one number, below 1, while the unit itself hardly moves the statistic."""
    p3o, m2po = shown()["p3o"].curves, shown()["m2po"].curves
    low, ratio = at(p3o, p3o.positive, -1.0)
    cap, _ = at(p3o, p3o.positive, 0.6)
    assert math.isclose(low, ratio, rel_tol=1e-9) and 0.9 < cap < 1.0
    harmful, _ = at(m2po, m2po.positive, 2.0)
    harmless, ratio = at(m2po, m2po.negative, 2.0)
    assert harmful == 0.0 and math.isclose(harmless, ratio, rel_tol=1e-9)


def test_curves_agree_with_the_kernels_own_where_nothing_else_acts() -> None:
    names = [n for n in correction_names() if not (c := load_correction(n)).needs_full_pass and not c.attached]
    assert len(names) > 20
    grid = shown()["ppo"].curves.log_ratio
    checked = 0
    for name in names:
        found, kernel = shown()[name].curves, load_correction(name, thin=None, mismatch=None, reject=None)
        if name in ("luffy", "dppo_tv", "dppo_kl") or not torch.equal(found.log_ratio, grid):
            continue  # these look at probabilities, or are drawn over another grid
        torch.testing.assert_close(found.positive, kernel.weight_curve(grid, 1.0), msg=name)
        torch.testing.assert_close(found.negative, kernel.weight_curve(grid, -1.0), msg=name)
        checked += 1
    assert checked > 15


def test_the_hash_of_a_curve_follows_its_values_and_not_their_last_digits() -> None:
    ppo = shown()["ppo"].curves
    nudged = Curves(ppo.log_ratio, ppo.positive + 1e-13, ppo.negative, None, None, None)
    other = curves({"kernel": {"name": "ppo", "clip_low": 0.2, "clip_high": 0.3}})
    assert ppo.digest() == nudged.digest() != other.digest()


# --------------------------------------------------------------------------------------------- the page


def test_the_page_is_not_stale(source: Path) -> None:
    written = (source / "docs" / page.PAGE).read_text(encoding="utf-8")
    assert page.render(shown()) == written, f"docs/{page.PAGE} is stale: run {page.COMMAND}"


def test_the_pictures_were_drawn_from_the_curves_of_today_and_are_small(source: Path) -> None:
    total = 0
    for family in catalogue.families():
        path = page.picture(source / "docs", family)
        assert digest_of(path) == page.family_digest(family, shown()), f"{path.name} is stale: run {page.COMMAND}"
        total += path.stat().st_size
    assert total < 2e6
    stray = {p.stem for p in (source / "docs" / page.PICTURES).iterdir()} - {f.slug for f in catalogue.families()}
    assert not stray


def test_a_changed_curve_makes_the_picture_stale(tmp_path: Path) -> None:
    path = tmp_path / "family.png"
    draw_family({"ppo": shown()["ppo"].curves}, "abc", path)
    assert digest_of(path) == "abc" and digest_of(tmp_path / "none.png") is None


def test_links_of_the_page_lead_somewhere(source: Path) -> None:
    text = page.render(shown())
    headings = {h.lower().replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings
    for target in re.findall(r"\]\(([^#)]+)\)", text):
        assert (source / "docs" / target).is_file(), target


def test_classes_on_the_page_name_what_a_preset_coincides_with() -> None:
    assert any("a3po" in line for line in shown()["decoupled_ppo"].twins)
    assert any(line.startswith("up to a positive factor") for line in shown()["dr_grpo"].twins)
    assert shown()["sapo"].twins == []
