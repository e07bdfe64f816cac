"""The rule of a preset as a few lines of plain mathematics, made from its expanded fields.

``r`` is the ratio at the chosen level, ``d`` its logarithm, ``g`` the weight of ``A grad log pi``, ``u`` the ratio that
an outer rule looks at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from unified_rl.correction.kernels.tables import RATIO_FREE

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

KERNELS: dict[str, Callable[[Settings], str]] = {
    "one": lambda s: "1",
    "is": lambda s: "r",
    "ppo": lambda s: _clipped(1 - s["clip_low"], 1 + s["clip_high"], s["dual_clip"]),
    "clamp": lambda s: f"clip(r, {_n(s['low'])}, {_n(s['high'])})",
    "band": lambda s: f"{_inside(s)} where {_n(s['low'])} <= r <= {_n(s['high'])}, else 0",
    "ring": lambda s: (
        f"{_inside(s)} where {_n(s['low'])} <= r <= {_n(s['high'])}, or A >= 0 and r <= {_n(s['outer_low'])}, "
        f"or A <= 0 and r >= {_n(s['outer_high'])}; else 0"
    ),
    "sign_clamp": lambda s: (
        f"clip(r, {_n(s['low_positive'])}, {_n(s['high_positive'])}) for A > 0, "
        f"clip(r, {_n(s['low_negative'])}, {_n(s['high_negative'])}) otherwise"
    ),
    "taper": lambda s: f"1 for A > 0, clip(r, {_n(s['low'])}, {_n(s['high'])}) otherwise",
    "gate": lambda s: (
        f"4 r s (1 - s), s = sigmoid(tau (r - 1)), tau = {_n(s['tau_positive'])} for A > 0, "
        f"{_n(s['tau_negative'])} otherwise"
    ),
    "gamma": lambda s: (
        f"r^k exp(lam - lam r), (k, lam) = ({_n(s['k_positive'])}, {_n(s['lam_positive'])}) for A >= 0, "
        f"({_n(s['k_negative'])}, {_n(s['lam_negative'])}) otherwise"
    ),
    "tv_mask": lambda s: (
        f"min(r, {_n(s['cap'])}), but 0 where A > 0 and p - q > {_n(s['high'])}, or A < 0 and q - p > {_n(s['low'])} "
        "(p, q: the unit's probability now and under the anchor)"
    ),
    "kl_mask": lambda s: (
        f"min(r, {_n(s['cap'])}), but 0 where A > 0, p > q and KL > {_n(s['high'])}, or A < 0, p < q and "
        f"KL > {_n(s['low'])} (KL between the two-outcome distributions q and p)"
    ),
    "log_clip": lambda s: (
        f"r, but 0 where A > 0 and d > {_n(s['high'])} t^{_n(s['power'])}, or A < 0 and d < -{_n(s['low'])} "
        f"t^{_n(s['power'])}"
        + ("" if s["dual"] is None else f" or d > {_n(s['dual'])} t^{_n(s['power'])}")
        + " (t: position in the row)"
    ),
    "exp_advantage": lambda s: "exp(A)" if s["temperature"] == 1 else f"exp(A / {_n(s['temperature'])})",
    "shape": lambda s: f"c r / (r + c)^2, c = {_n(s['gamma'])}",
    "demonstration_shape": lambda s: (
        f"c p / (p + c)^2, c = {_n(s['gamma'])}, p = pi, on demonstrations; elsewhere "
        + _clipped(1 - s["clip_low"], 1 + s["clip_high"], None)
    ),
    "centered_ppo": lambda s: (
        f"r, but 0 where A > 0 and r > m + {_n(s['clip'])}, or A < 0 and r < m - {_n(s['clip'])}, "
        "m = proximal / behavior"
    ),
    "ess_cap": lambda s: "min(r, ESS), ESS = (sum r)^2 / (n sum r^2) over the batch",
    "ess_cap_mixed": lambda s: "min(r, e), e the smaller ESS of pi / behavior and pi / proximal",
    "m2_mask": lambda s: (
        f"{_inside(s)}, but 0 on the units of largest d^2 among those with A d > 0, until their mean "
        f"d^2 <= {_n(s['budget'])}"
    ),
    "searched_ppo": lambda s: (
        "r, but 0 where A > 0 and r > hi, or A < 0 and r < lo"
        + ("" if s["dual_clip"] is None else f" or r > {_n(s['dual_clip'])}")
        + f"; lo from {_n(s['low'])} to {_n(s['low_max'])}, then hi from {_n(s['high'])} to {_n(s['high_max'])}, in "
        f"steps of {_n(s['step'])}, until positives weigh {_n(s['target'])} times the negatives"
    ),
    "clip_cov": lambda s: (
        _clipped(1 - s["clip_low"], 1 + s["clip_high"], None)
        + f"; and 0 on a random share {_n(s['fraction'])} of the units, drawn where "
        f"{_n(s['cov_low'])} < (A - mean A)(log pi - mean log pi) < {_n(s['cov_high'])}"
    ),
    "spared_ppo": lambda s: (
        _clipped(1 - s["clip_low"], 1 + s["clip_high"], None)
        + f"; r on selected units (A < 0, log pi in the lowest {100 * s['fraction']:g} %, below the proxy's)"
    ),
    "residual": lambda s: (
        "1, with A = "
        + ("" if s["scale"] == 1.0 else f"{_n(s['scale'])} * ")
        + ("(delta - group mean of delta)" if s["centred"] else "delta")
        + {"none": "", "group": " / (group size - 1)", "pairs": " * group size"}[s["divide"]]
        + ("" if s["importance_cap"] is None else f" * min(row ratio to behavior, {_n(s['importance_cap'])})")
        + f", delta = R - {_n(s['beta'])} * {'mean' if s['length_normalized'] else 'sum'} over the row of d"
    ),
    "likelihood_pair": lambda s: (
        f"1 if right; q r / ((1 - q) max(x, {_n(s['floor'])})), x = (1 - q r) / (1 - q), if wrong; |A| = "
        + {0: "1", 1: "1 - q", 2: "sqrt((1 - q) / q)"}[s["normalize"]]
        + " (q: success rate of the group)"
    ),
    "teacher_ppo": lambda s: (
        _clipped(1 - s["clip_low"], 1 + s["clip_high"], None)
        + f"; A = {'' if s['scale'] == 1.0 else _n(s['scale']) + ' * '}centred log(teacher / reference)"
    ),
}

MISMATCHES: dict[str, Callable[[Settings], str]] = {
    "exact": lambda s: "u",
    "truncate": lambda s: f"min(u, {_n(s['high'])})",
    "clip": lambda s: f"clip(u, {_n(s['low'])}, {_n(s['high'])})",
    "mask": lambda s: f"u where {_n(s['low'])} <= u <= {_n(s['high'])}, else 0",
}

REJECTS: dict[str, Callable[[Settings], str]] = {
    "band": lambda s: f"keep where {_n(s['low'])} <= u <= {_n(s['high'])}, u the {LEVEL_NOUN[s['level']]} of",
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
        + (", then A less its mean over what is left" if s["recentre"] else "")
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
    level, kernel = full["level"], full["kernel"]
    lines = []
    if full["pre"] is not None:
        lines.append(f"d = {PRES[full['pre']['name']](full['pre'])}, of each unit's log-ratio")
    if kernel["name"] not in RATIO_FREE:
        lines.append(f"r = {LEVELS[level['name']](level)}, {_over(full['anchor'])}")
    elif kernel["name"] == "residual":
        lines.append(f"d = log-ratio of each unit, {_over(full['anchor'])}")
    attached = " (the level itself is differentiated)" if full["attached"] else ""
    lines.append(f"g = {KERNELS[kernel['name']](kernel)}{attached}")
    lines += [_mismatch(rule) for rule in full["mismatch"]]
    lines += [f"{REJECTS[r['name']](r)} {_u(r)}" for r in full["reject"]]
    lines += [_penalty(p) for p in full["penalty"]]
    if full["thin"] is not None:
        lines.append(f"train on {THINS[full['thin']['name']](full['thin'])}")
    lines.append(_reduction(full))
    return lines


def _mismatch(rule: Settings) -> str:
    level = rule["level"] if isinstance(rule["level"], str) else rule["level"]["name"]
    scaled = ", divided by its mean over the batch" if rule["normalize"] else ""
    return f"w = {MISMATCHES[rule['name']](rule)}{scaled}, u the {LEVEL_NOUN[level]} of {_u(rule)}"


def _penalty(rule: Settings) -> str:
    against = "log pi" if rule["anchor"] == "none" else f"log(pi / {rule['anchor']})"
    parts = [] if rule["coefficient"] == 1.0 else [_n(rule["coefficient"])]
    parts += [] if rule["statistic"] is None else [str(rule["statistic"]).replace("one_minus_ess", "(1 - ESS)")]
    parts += ["(pi / behavior)"] if rule["importance"] else []
    where = "" if rule["select"] is None else f" on {SELECTIONS[rule['select']['name']](rule['select'])}"
    value = PENALTIES[rule["name"]]
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


def _clipped(low: float, high: float, dual: float | None) -> str:
    below = f", or A < 0 and r < {_n(low)}" if low > 0 else ""
    above = "" if dual is None else f", or A < 0 and r > {_n(dual)}"
    return f"r, but 0 where A > 0 and r > {_n(high)}{below}{above}"


def _inside(s: Settings) -> str:
    return "r" if s["weighted"] else "1"


def _n(x: float) -> str:
    """A number as one writes it."""
    return "inf" if math.isinf(x) else f"{x:g}"
