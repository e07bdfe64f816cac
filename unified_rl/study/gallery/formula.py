"""The rule of a preset as a few lines of plain mathematics, made from its expanded fields.

``r`` is the ratio at the chosen level, ``d`` its logarithm, ``g`` the weight of ``A grad log pi``, ``u`` the ratio that
an outer rule looks at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from unified_rl.correction.kernels import KERNELS
from unified_rl.correction.kernels.kernel import number as _n
from unified_rl.correction.lookup import bind

Settings = Mapping[str, Any]

LEVELS: dict[str, Callable[[Settings], str]] = {
    "unit": lambda s: "the unit's own ratio",
    "step": lambda s: "geometric mean over the units of the step",
    "step_sum": lambda s: "product over the units of the step",
    "sequence": lambda s: "product over the row",
    "geometric": lambda s: "geometric mean over the row",
    "prefix": lambda s: "product of the units up to and including this one",
    "prefix_geometric": lambda s: "geometric mean of the units up to and including this one",
    "min_prefix": lambda s: "own ratio times the smallest ratio before it" + (", at most 1" if s["capped"] else ""),
    "hoelder": lambda s: f"power mean over the row with exponent p = {_n(s['p'])}",
}

LEVEL_NOUN: dict[str, str] = {
    "unit": "unit's own",
    "step": "step's geometric mean",
    "step_sum": "step's product",
    "sequence": "row's product",
    "geometric": "row's geometric mean",
    "prefix": "prefix product",
    "prefix_geometric": "prefix geometric mean",
    "min_prefix": "smallest-prefix product",
    "hoelder": "row's power mean",
}

MISMATCHES: dict[str, Callable[[Settings], str]] = {
    "exact": lambda s: "u",
    "truncate": lambda s: f"min(u, {_n(s['high'])})",
    "clip": lambda s: f"clip(u, {_n(s['low'])}, {_n(s['high'])})",
    "mask": lambda s: f"u where {_n(s['low'])} <= u <= {_n(s['high'])}, else 0",
}

REJECTS: dict[str, Callable[[Settings], str]] = {
    "band": lambda s: f"keep where {_n(s['low'])} <= u <= {_n(s['high'])}, u the {_noun(s['level'])} of",
    "divergence": lambda s: f"keep where {_statistic(s['estimator'], s['over'])} <= {_n(s['high'])}, u =",
    "veto": lambda s: (
        f"drop the row if any unit has u < {_n(s['low'])}"
        + ("" if math.isinf(s["high"]) else f" or u > {_n(s['high'])}")
        + ", u ="
    ),
    "off_policy_sequence": lambda s: f"drop rows with A < 0 whose mean log u < -{_n(s['delta'])}, u =",
}

PENALTIES = {"k1": "x", "k2": "x^2 / 2", "k3": "exp(-x) + x - 1", "k3_plus": "k3 (gradient of k2)", "abs": "|x|"}
SELECTIONS: dict[str, Callable[[Settings], str]] = {
    "negative": lambda s: "units with A < 0",
    "positive": lambda s: "units with A > 0",
    "selected": lambda s: "the selected units",
    "top_covariance": lambda s: f"the share {_n(s['fraction'])} of units with the largest covariance of A and log pi",
}
PRES: dict[str, Callable[[Settings], str]] = {
    "pessimistic_clip": lambda s: f"clip to [-{_n(s['low'])}, {_n(s['high'])}] on the side that A pushes to",
    "clamp": lambda s: f"clip to [{_n(s['low'])}, {_n(s['high'])}]",
}
THINS: dict[str, Callable[[Settings], str]] = {
    "uniform": lambda s: f"each unit with probability {_n(s['keep'])}, weighted to stay unbiased",
    "prefix": lambda s: f"a random prefix of at least {100 * s['least']:g} % of the row, weighted to stay unbiased",
    "drop_negatives": lambda s: (
        f"of each group, at most {_n(s['surplus'])} times as many rows with A < 0 as others"
        + (", then A less its mean over what is left" if s["recenter"] else "")
    ),
}
REDUCTIONS = {
    "token-mean": "sum over units / units of the batch",
    "sequence-mean-token-mean": "mean over rows of the mean over units",
    "sequence-mean-token-sum": "mean over rows of the sum over units",
    "sequence-mean-token-sum-norm": "mean over rows of the sum over units / horizon",
    "token-sum": "sum over units",
}


def formula(full: Mapping[str, Any]) -> list[str]:
    """Lines of the rule, from :func:`expanded` fields."""
    level, kernel = full["level"], bind(full["kernel"], KERNELS, "kernel")[0]()
    lines = []
    if full["pre"] is not None:
        lines.append(f"d = {_words(PRES, full['pre'])}, of each unit's log-ratio")
    if kernel.traits.holds_ratio:
        lines.append(f"r = {_words(LEVELS, level)}, {_over(full['anchor'])}")
    elif kernel.traits.own_advantage:
        lines.append(f"d = log-ratio of each unit, {_over(full['anchor'])}")
    attached = " (the level itself is differentiated)" if full["attached"] else ""
    lines.append(f"g = {kernel.formula()}{attached}")
    lines += [_mismatch(rule) for rule in full["mismatch"]]
    lines += [f"{_words(REJECTS, r)} {_u(r)}" for r in full["reject"]]
    lines += [_penalty(p) for p in full["penalty"]]
    if full["thin"] is not None:
        lines.append(f"train on {_words(THINS, full['thin'])}")
    lines += _penalties_of_rejected(full)
    lines.append(_reduction(full))
    return lines


def _penalties_of_rejected(full: Settings) -> list[str]:
    """What happens to the penalties of the units that rejection or thinning takes out."""
    lost = [("what is rejected", "drop")] if full["reject"] else []
    lost += [("what is not trained on", "keep")] if full["thin"] is not None else []
    words = {"drop": "has no penalties either", "keep": "keeps its penalties"}
    return [f"{what} {words[full['rejected'] or default]}" for what, default in lost]


def _words(table: Mapping[str, Callable[[Settings], str]], rule: Settings) -> str:
    """What a rule does; the name alone of one from elsewhere."""
    return table[rule["name"]](rule) if rule["name"] in table else str(rule["name"])


def _noun(level: str | Settings) -> str:
    name = level if isinstance(level, str) else level["name"]
    return LEVEL_NOUN.get(name, f"{name} ratio")


def _mismatch(rule: Settings) -> str:
    scaled = ", divided by its mean over the batch" if rule["normalize"] else ""
    return f"w = {_words(MISMATCHES, rule)}{scaled}, u the {_noun(rule['level'])} of {_u(rule)}"


def _penalty(rule: Settings) -> str:
    against = "log pi" if rule["anchor"] == "none" else f"log(pi / {rule['anchor']})"
    parts = [] if rule["coefficient"] == 1.0 else [_n(rule["coefficient"])]
    parts += [] if rule["statistic"] is None else [str(rule["statistic"]).replace("one_minus_ess", "(1 - ESS)")]
    parts += ["(pi / behavior)"] if rule["importance"] else []
    where = "" if rule["select"] is None else f" on {_words(SELECTIONS, rule['select'])}"
    value = PENALTIES.get(rule["name"], f"{rule['name']} of x")
    parts.append(value if value.isidentifier() else f"({value})")
    return f"penalty {' * '.join(parts)}, x = {against}{where}"


def _reduction(full: Settings) -> str:
    text = REDUCTIONS[full["reduce"]]
    if full["horizon"] is not None:
        text = text.replace("/ horizon", f"/ {_n(full['horizon'])}")
        text += f" / {_n(full['horizon'])}" if full["reduce"] == "token-sum" else ""
    return text + (", counting what rejection left" if full["denominator"] == "kept" else "")


def _over(anchor: str) -> str:
    return "pi itself (no denominator)" if anchor == "none" else f"pi / {anchor}"


def _u(rule: Settings) -> str:
    return f"{'proximal' if rule['numerator'] == 'proximal' else 'pi'} / behavior"


def _statistic(estimator: str, over: str) -> str:
    """What a divergence rule compares with its bound; k1 sums before it drops the sign."""
    term = {"k1": "log u", "k2": "(log u)^2 / 2", "k3": "(u - 1 - log u)"}[estimator]
    if estimator == "k1" and over in ("sequence_sum", "sequence_mean"):
        return f"|{over.split('_')[1]} over the row of {term}|"
    term = f"|{term}|" if estimator == "k1" else term
    return {"unit": term, "sequence_max": f"the largest {term} of the row"}.get(
        over, f"the {over.split('_')[-1]} over the row of {term}"
    )
