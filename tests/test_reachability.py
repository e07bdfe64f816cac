"""Nothing is offered that no run reaches: every name and every setting shows in two updates, or is refused by name.

A case is a run (its absence) and the same run with one thing changed. Weights, metrics or the evaluation must differ,
or the change must be refused with one line that names it.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from mjcf_cases import CART
from run_cases import CONTROL, LANGUAGE, cached, merged, model, recorded, rewarder, teacher

from unified_rl import returns
from unified_rl.agents.credits import CREDITS
from unified_rl.agents.loss import TERMS
from unified_rl.agents.reward_model import REWARD_MODELS
from unified_rl.config import group_options, preset
from unified_rl.correction import lookup
from unified_rl.correction.generators import GENERATORS
from unified_rl.correction.levels import LEVELS
from unified_rl.correction.penalties.penalty import PENALTIES
from unified_rl.correction.penalties.selection import SELECTIONS
from unified_rl.correction.reduction import REDUCTIONS
from unified_rl.correction.transforms import PRES
from unified_rl.correction.weights.mismatch import MISMATCHES
from unified_rl.correction.weights.rejection import REJECTS
from unified_rl.correction.weights.thinning import THINS
from unified_rl.errors import UnifiedRLError
from unified_rl.instantiate import REQUIRED, locate, parameters
from unified_rl.interventions import WRAPPERS
from unified_rl.objectives.coefficients import COEFFICIENTS
from unified_rl.objectives.kinds import KINDS
from unified_rl.objectives.kinds import TARGETS as BETWEEN
from unified_rl.objectives.offline_value import ACTORS, AGGREGATES, TARGETS, VALUES
from unified_rl.objectives.preference import LINKS, PAIRS
from unified_rl.objectives.reward_losses import REWARD_LOSSES
from unified_rl.objectives.terms import NLL_WEIGHTS
from unified_rl.returns.columns import COLUMNS as WRITTEN
from unified_rl.returns.difficulty import DIFFICULTIES
from unified_rl.returns.filters import FILTERS
from unified_rl.returns.gates import GATES
from unified_rl.returns.maps import MAPS
from unified_rl.returns.record import NAMED, PLAIN
from unified_rl.returns.trackers import TRACKERS
from unified_rl.training.settings import TrainSettings

pytestmark = pytest.mark.thorough

try:
    from unified_rl.correction.kernels import KERNELS  # type: ignore[attr-defined]
except ImportError:
    from unified_rl.correction.kernels.tables import KERNELS

# ---------------------------------------------------------------------------------------------- the runs

FAST = ("agent.lr=0.05", "agent.epochs=3")
"""Far steps: ratios leave every band."""
STALE = (*LANGUAGE, *FAST, "rollout.staleness=1", "correction=reinforce")
STALE_CONTROL = (*CONTROL, *FAST, "rollout.staleness=1", "correction=ppo")
BINS = (*STALE_CONTROL, "policy=autoregressive", "policy.bins=5")
SHOWN = "rollout.sources={demonstrations: {_target_: unified_rl.rollout.sources.Demonstrations, per_group: 1}}"
REPLAYED = (
    "rollout.staleness=0",
    "rollout.sources={experience: {_target_: unified_rl.rollout.sources.Experience, start: 0.0}}",
)
VALUED = (
    "env=inverted_pendulum",
    "agent=actor_critic",
    "policy.hidden=[8]",
    "agent.critic_hidden=[8]",
    "agent.batch_size=8",
    "agent.learning_starts=8",
    "agent.updates_per_step=0.5",
    "rollout.num_envs=2",
    "rollout.horizon=4",
    "rollout.random_steps=0",
    "replay.capacity=4096",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A run, and what is changed in it."""

    name: str
    base: tuple[str, ...]
    change: tuple[str, ...]
    evaluated: bool = False


def verdict(case: Case, folders: Mapping[str, str]) -> str:
    """``effect``, ``nothing``, or the line with which the change is refused."""

    def filled(words: Sequence[str]) -> list[str]:
        for name, folder in folders.items():
            words = [word.replace(name, folder) for word in words]
        return list(words)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a rule that rejects everything says so
        try:
            absent = cached(*filled(merged(case.base)), evaluated=case.evaluated)
        except Exception as error:
            return f"absence: {type(error).__name__}: {error}"
        try:
            present = cached(*filled(merged(case.base, case.change)), evaluated=case.evaluated)
        except UnifiedRLError as error:
            return f"refused: {error}"
        except Exception as error:  # what is refused too late, and by nobody who knows the setting
            return f"crash: {type(error).__name__}: {error}"
    return "effect" if present.differs(absent) else "nothing"


# ---------------------------------------------------------------------------------------------- changed values


def settings(rule: Callable[..., Any]) -> dict[str, Any]:
    """A rule's settings and their defaults."""
    found = inspect.signature(rule).parameters.values()
    return {p.name: p.default for p in found if p.name in lookup.settings_of(rule)}


def other(default: Any) -> Any:
    """A value that is not the default, of its type.

    Raises:
        KeyError: there is no telling one; add it to the samples.
    """
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return default + 1
    if isinstance(default, float):
        return 0.5 if default == 0.0 or math.isinf(default) else default / 2
    raise KeyError(default)


def text(value: Any) -> str:
    """A value as the command line takes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(text, value)) + "]"
    return "1.0e9" if value == math.inf else str(value)


def of_table(
    label: str,
    table: Mapping[str, Callable[..., Any]],
    base: Sequence[str],
    place: Callable[[dict[str, Any]], str],
    *,
    samples: Mapping[str, Any] | None = None,
    extra: Mapping[str, Sequence[str]] | None = None,
    first: Mapping[str, Mapping[str, Any]] | None = None,
    along: Mapping[str, Sequence[str]] | None = None,
    default: str | None = None,
    against: str | None = None,
) -> Iterator[Case]:
    """Cases of every name of a table, against its absence, and of every setting of it, against its default.

    Args:
        label: of the cases.
        table: from names to rules.
        base: the run.
        place: the override that puts a rule (a mapping with ``name``) in its place.
        samples: changed values by ``name.setting``.
        extra: what a name needs beside itself, also in its absence.
        first: settings that a name needs always, or needs so that its others show.
        along: what a name needs beside itself, and what nothing else may have.
        default: the name that stands there without an override.
        against: what that one is compared with; by default the first other.
    """
    samples, extra, first, along = samples or {}, extra or {}, first or {}, along or {}
    for name, rule in table.items():
        run = (*base, *extra.get(name, ()))
        node = {"name": name, **first.get(name, {})}
        absence = run
        if name == default:
            absence = (*run, place({"name": against or next(n for n in table if n != default)}))
        yield Case(f"{label}.{name}", tuple(absence), (place(node), *along.get(name, ())))
        run = (*run, *along.get(name, ()))
        for setting, value in settings(rule).items():
            key = f"{name}.{setting}"
            changed = samples[key] if key in samples else other(node.get(setting, value))
            yield Case(f"{label}.{key}", (*run, place(node)), (place({**node, setting: changed}),))


# ---------------------------------------------------------------------------------------------- correction

PLAIN_KERNEL = preset("correction", "reinforce")["kernel"]["name"]
TAUGHT = ("agent.teacher=TEACHER",)
PROXY = "correction.wrapper={name: min_p_proxy, p_min: 0.5}"
WRAPPED = {
    "anneal_level": "hoelder",
    "anneal_penalty": "mdpo",
    "clip_bias_scale": "s_ppo",
    "ess_learning_rate": "vcpo",
    "fix_up": "fixpo",
    "layer_noise": "alp",
    "min_p_proxy": "ppo",
    "project_categorical": "troll",
    "reposition": "sfpo",
    "snr_learning_rate": "vcpo",
    "sync_reference": "humanline",
}
"""A preset that acts outside its loss in each way."""


def correction_cases() -> Iterator[Case]:
    yield from of_table(
        "kernel",
        KERNELS,
        STALE,
        lambda node: f"correction.kernel={text(node)}",
        default=PLAIN_KERNEL,
        extra={
            "demonstration_shape": [SHOWN],
            "demonstration_mixture": [SHOWN],
            "spared_ppo": [PROXY],
            "replay_shape": REPLAYED,
        },
        along={"teacher_ppo": TAUGHT, "teacher_ratio": TAUGHT},
        first={
            "clip_cov": {"fraction": 0.5, "cov_low": -10.0, "cov_high": 10.0},
            "spared_ppo": {"fraction": 0.9, "clip_low": 0.1, "clip_high": 0.1},
            "searched_ppo": {"low": 0.5, "low_max": 0.98, "high": 1.02, "high_max": 3.0, "target": 3.0},
        },
        samples={
            "ppo.dual_clip": 1.1,
            "residual.divide": "group",
            "residual.soft": 0.5,
            "f_divergence.generator": "js",
            "f_divergence.moment": 0.9,
            "residual.importance_cap": 0.9,
            "kl_mask.cap": 0.01,
            "log_clip.low": 3.0,
            "log_clip.dual": 3.0,
            "searched_ppo.step": 0.3,
            "searched_ppo.low_max": 0.6,
            "searched_ppo.low": 0.7,
            "searched_ppo.high_max": 1.5,
            "searched_ppo.target": 2.2,
            "clip_cov.clip_high": 0.001,
            "clip_cov.cov_low": 0.0,
            "clip_cov.cov_high": 0.0,
        },
    )
    yield from of_table(
        "level", LEVELS, (*BINS, "correction=importance_sampling"), lambda node: f"correction.level={text(node)}",
        default="unit",
    )  # fmt: skip
    yield from of_table(
        "pre", PRES, (*STALE, "correction=importance_sampling"), lambda node: f"correction.pre={text(node)}",
        samples={"clamp.low": -0.01, "clamp.high": 0.01, "pessimistic_clip.low": 0.01, "pessimistic_clip.high": 0.01},
    )  # fmt: skip
    yield from of_table(
        "mismatch", MISMATCHES, (*STALE, "correction=decoupled_ppo", "correction.mismatch=[]"),
        lambda node: f"correction.mismatch=[{text(node)}]",
        first={"truncate": {"high": 1.01}, "clip": {"low": 0.99, "high": 1.01}, "mask": {"low": 0.9, "high": 1.1}},
    )  # fmt: skip
    yield from of_table(
        "reject", REJECTS, (*STALE, "correction=ppo"), lambda node: f"correction.reject=[{text(node)}]",
        first={"band": {"low": 0.99, "high": 1.01}, "veto": {"low": 0.5, "high": 2.0}, "divergence": {"high": 0.1}},
        samples={
            "band.level": "unit",
            "divergence.estimator": "k1",
            "divergence.over": "unit",
            "divergence.high": 10.0,
            "off_policy_sequence.delta": 10.0,
        },
    )  # fmt: skip
    yield from of_table("penalty", PENALTIES, STALE, lambda node: f"correction.penalty=[{text(node)}]")
    selecting = "correction.penalty=[{name: k2, anchor: behavior}]"
    yield from of_table(
        "select", SELECTIONS, (*STALE, selecting),
        lambda node: f"correction.penalty=[{{name: k2, anchor: behavior, select: {text(node)}}}]",
        extra={"selected": ["correction.kernel={name: spared_ppo}", PROXY]},
        samples={"top_covariance.fraction": 0.5},
    )  # fmt: skip
    for name, rule in THINS.items():
        # of few mixed groups two seeds may drop the same rows
        base = merged(STALE, ["rollout.prompts=16"]) if name == "drop_negatives" else STALE
        yield from of_table(
            "thin",
            {name: rule},
            base,
            lambda node: f"correction.thin={text(node)}",
            first={"drop_negatives": {"surplus": 0.5}},
            samples={"drop_negatives.surplus": 2.0, "drop_negatives.seed": 2},
        )
    yield from of_table(
        "wrapper", WRAPPERS, STALE, lambda node: f"correction.wrapper={text(node)}",
        along={"min_p_proxy": [
            "correction.kernel={name: spared_ppo, fraction: 0.9, clip_low: 0.1, clip_high: 0.1}",
            "correction.penalty=[{name: k3, anchor: proxy, select: selected}]",
        ]},
        extra={name: [f"correction={preset}", "correction.wrapper=null"] for name, preset in WRAPPED.items()},
        first={
            "anneal_level": {"p_start": 1.5, "p_end": -1.5},
            "min_p_proxy": {"p_min": 0.5},
            "sync_reference": {"every": 1},
            "reposition": {"window": 2},
            "layer_noise": {"initial": 0.1},
            "fix_up": {"bound": 0.001, "max_steps": 2},
        },
        samples={
            "min_p_proxy.p_min": 0.9,
            "snr_learning_rate.least": 0.9,
            "reposition.threshold": None,
            "reposition.window": 7,
            "anneal_penalty.floor": 0.9,
            "anneal_penalty.top_k": 2,
            "fix_up.max_steps": 1,
            "fix_up.top_k": 2,
            "project_categorical.top_k": 2,
            "project_categorical.bound": 0.001,
            "sync_reference.every": 5,
        },
    )  # fmt: skip
    for name in REDUCTIONS:
        absence = "token-sum" if name != "token-sum" else "token-mean"
        base = (*STALE, "correction.horizon=4", f"correction.reduce={absence}")
        yield Case(f"reduce.{name}", base, (f"correction.reduce={name}",))
    reject = "correction.reject=[{name: band, low: 0.5, high: 2.0}]"
    yield Case("denominator.kept", (*STALE, reject), ("correction.denominator=kept",))
    penalty = "correction.penalty=[{name: k2, anchor: behavior}]"
    yield Case("rejected.keep", (*STALE, reject, penalty), ("correction.rejected=keep",))
    yield Case("rejected.drop", (*STALE, "correction=nat_uniform", penalty), ("correction.rejected=drop",))
    yield Case("correction.horizon", (*STALE, "correction.reduce=token-sum"), ("correction.horizon=4",))
    yield Case("correction.attached", (*STALE, "correction=importance_sampling", "correction.level=geometric"),
               ("correction.attached=true",))  # fmt: skip
    for anchor in ("behavior", "proximal", "reference", "none"):
        wanted = "behavior" if anchor != "behavior" else "proximal"
        base = (*STALE, "correction=importance_sampling", f"correction.anchor={wanted}")
        yield Case(f"anchor.{anchor}", base, (f"correction.anchor={anchor}",))
    for key, value in {"anchor": "behavior", "coefficient": 2.0, "statistic": "original", "importance": True,
                       "weight": "group"}.items():  # fmt: skip
        base = (*STALE, "correction.penalty=[{name: k2}]")
        yield Case(f"penalty.k2.{key}", base, (f"correction.penalty=[{text({'name': 'k2', key: value})}]",))
    for key, value in {"level": "sequence", "normalize": True, "numerator": "current"}.items():
        node = {"name": "truncate", "high": 1.01}
        base = (*STALE, "correction=decoupled_ppo", f"correction.mismatch=[{text(node)}]")
        yield Case(f"mismatch.truncate.{key}", base, (f"correction.mismatch=[{text({**node, key: value})}]",))
    for provider in ("average", "interpolated", "versions"):
        base = (*STALE, "correction=decoupled_ppo")
        yield Case(f"proximal.{provider}", base, (f"correction.proximal={{provider: {provider}}}",))
    yield Case("proximal.average.decay", (*STALE, "correction=ppo_ewma"), ("correction.proximal.decay=0.1",))


ALONE_ROWS = "correction.advantage={baseline: none}"
COLUMNS = "rollout.columns={scores: [correct, truncated], stratum: correct}"
ALONE = "rollout.sources={demonstrations: {_target_: unified_rl.rollout.sources.Demonstrations, rows: 4}}"
ADVANTAGE: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "scale": ("std", {}, ()),
    "ddof": (0, {"scale": "std"}, ()),
    "eps": (0.1, {"scale": "std"}, ()),
    "singleton": (None, {}, (ALONE, "env.modulus=30", "env.max_turn_tokens=12")),
    "min_spread": (2.0, {"scale": "std"}, ()),
    "shift": (0.1, {}, ()),
    "temperature": (2.0, {"baseline": "soft"}, ()),
    "reward_weights": ([2.0], {}, ()),
    "combine": ("normalize_first", {"reward": "scores", "scale": "std"}, (COLUMNS,)),
    "reward": ("scores", {}, (COLUMNS,)),
    "group": ("stratum", {}, (COLUMNS,)),
    "weight": ("stratum", {"baseline": "weighted"}, (COLUMNS,)),
    "given": ("prompt_id", {"baseline": "given", "given": "stratum"}, (COLUMNS,)),
    "stratum": ("stratum", {}, ("rollout.columns={stratum: truncated}",)),
    "blend": (0.1, {"stratum": "stratum"}, ("rollout.columns={stratum: truncated}",)),
    "whiten_over": ("units", {"scale": "whiten"}, ()),
    "rows": ("own", {}, (SHOWN,)),
}
"""Settings of an advantage: a changed value, what they go with, and what the run needs."""


def advantage_cases() -> Iterator[Case]:
    for baseline in ("mean", "leave_one_out", "max", "none", "soft", "weighted", "tracker", "given"):
        absence = "none" if baseline != "none" else "mean"
        node = {"baseline": baseline, **({"given": "stratum"} if baseline == "given" else {})}
        base = (*STALE, COLUMNS, f"correction.advantage={{baseline: {absence}}}")
        yield Case(f"advantage.baseline.{baseline}", base, (f"correction.advantage={text(node)}",))
    for scale in ("std", "batch", "whiten"):
        change = (f"correction.advantage={{baseline: mean, scale: {scale}}}",)
        yield Case(f"advantage.scale.{scale}", STALE, change)
    for key in (*PLAIN, *NAMED, "rows"):
        if key != "baseline":
            value, node, extra = ADVANTAGE[key]
            base = (*STALE, *extra, f"correction.advantage={text(node)}")
            change = f"correction.advantage={text({**node, key: value})}"
            yield Case(f"advantage.{key}", base, (change,))
    for credit in CREDITS:
        absence = "unit" if credit != "unit" else "step"
        base = (*STALE, "agent.advantage=critic", f"agent.credit={absence}")
        if credit != "hierarchical":
            yield Case(f"credit.{credit}", base, (f"agent.credit={credit}",))
    markers = {"name": "hierarchical", "switch": "','", "keep": "'-'", "act": "'>'"}
    base = (*STALE, "agent.advantage=critic")
    yield Case("credit.hierarchical", (*base, "agent.credit=step"), (f"agent.credit={text(markers)}",))
    for key in ("switch", "keep", "act"):
        changed = {**markers, key: "'+'"}
        yield Case(f"credit.{key}", (*base, f"agent.credit={text(markers)}"), (f"agent.credit={text(changed)}",))


TURNS = (*(word for word in LANGUAGE if not word.startswith("env")), "env=calculator")


# ---------------------------------------------------------------------------------------------- terms

REFERENCE = "{name: divergence, anchor: reference}"


NUMBERS = "rollout.columns={scores: [correct, truncated], answer: answer, label: label, length: length}"
REFERENCES = "rollout.sources={other: {_target_: unified_rl.rollout.sources.Model, folder: MODEL, per_group: 2}}"


def term_cases() -> Iterator[Case]:
    def term(node: Mapping[str, Any]) -> str:
        return f"agent.objectives.more={text(node)}"

    yield from of_table(
        "term", TERMS, STALE, term,
        extra={**dict.fromkeys(("nll", "margin", "rank_aware", "selective_nll", "soft_q"), (SHOWN,)),
               "value": ["agent.advantage=critic"],
               "weighed_entropy": (NUMBERS,),
               "triage": ["rollout.columns={scores: correct}"]},
        along={"divergence": TAUGHT},
        first={
            "weighed_entropy": {"weight": "length", "coefficient": 0.1},
            "entropy": {"coefficient": 1.0},
            "divergence": {"anchor": "teacher", "top_k": 3},
            "sampled_divergence": {"coefficient": 10.0},
            "equivalence": {"coefficient": 10.0},
            "transport": {"anchor": "reference", "coefficient": 10.0},
            "rank_aware": {"near": 0.3, "top_k": 2},
            "selective_nll": {"portion": 0.4},
            "selective_entropy": {"coefficient": 10.0},
            "triage": {"old": "prompt_id", "pairs": "every_pair", "within": "batch"},
        },
        samples={
            "policy_gradient.rows": "demonstration",
            "value.rows": "demonstration",
            "value.clip": 0.01,
            "entropy.rows": "demonstration",
            "margin.rows": "own",
            "margin.threshold": 2.0,
            "margin.reduce": "token-sum",
            "nll.rows": "own",
            "nll.weight": "probability",
            "selective_nll.portion": 0.5,
            "selective_nll.by": "intersection",
            "selective_nll.anchor": "nowhere",
            "selective_nll.reduce": "token-sum",
            "selective_nll.rows": "own",
            "transport.block": 2,
            "transport.anchor": "nowhere",
            "transport.reduce": "token-sum",
            "transport.rows": "demonstration",
            "rank_aware.reduce": "token-sum",
            "rank_aware.rows": "own",
            "soft_q.reduce": "token-sum",
            "soft_q.rows": "own",
            "weighed_entropy.rows": "demonstration",
            "other_views.rows": "demonstration",
            "other_views.threshold": 2.0,
            "other_views.reduce": "token-sum",
            "weighed_entropy.weight": "answer",
            "selective_entropy.rows": "demonstration",
            "selective_entropy.peaks": 0.9,
            "nll.reduce": "token-sum",
            "divergence.rows": "demonstration",
            "divergence.kind": "forward_kl",
            "divergence.top_k": 2,
            "divergence.target": "veto",
            "divergence.support": "student",
            "divergence.rest": "drop",
            "divergence.importance_cap": 0.9,
            "divergence.pass_rate": {"alpha": 2.0},
            "sampled_divergence.rows": "demonstration",
            "sampled_divergence.generator": "js",
            "sampled_divergence.anchor": "nowhere",
            "sampled_divergence.drawn": "policy",
            "sampled_divergence.tilt": 0.5,
            "sampled_divergence.reduce": "token-sum",
            "divergence.view": "privileged",
            "divergence.anchor": "nowhere",
            "divergence.reduce": "token-sum",
            "preference.rows": "demonstration",
            "preference.link": "ipo",
            "preference.pairs": "every_pair",
            "preference.anchor": "nowhere",
            "preference.low": -0.01,
            "preference.high": 0.01,
            "preference.generator": "js",
            "preference.score": "mean",
            "preference.order": "nowhere",
            "preference.within": "batch",
            "set_preference.rows": "demonstration",
            "set_preference.chosen": "best",
            "set_preference.anchor": "nowhere",
            "set_preference.low": -0.01,
            "set_preference.high": 0.01,
            "set_preference.score": "mean",
            "set_preference.within": "batch",
            "equivalence.rows": "demonstration",
            "equivalence.threshold": 2.0,
            "equivalence.anchor": "nowhere",
            "equivalence.low": -0.01,
            "equivalence.high": 0.01,
            "equivalence.score": "mean",
            "equivalence.within": "batch",
            "triage.old": "scores",
            "triage.lowest": True,
            "triage.pairs": "best_worst",
            "triage.link": "ipo",
            "triage.anchor": "nowhere",
            "triage.rows": "demonstration",
            "triage.low": -0.01,
            "triage.high": 0.01,
            "triage.score": "mean",
            "triage.within": "group",
            "triage.threshold": 2.0,
            "kto.rows": "demonstration",
            "kto.threshold": -1.0,
            "kto.error_rate": 1.0,
            "kto.anchor": "nowhere",
            "kto.low": -0.01,
            "kto.high": 0.01,
            "kto.score": "mean",
        },
    )  # fmt: skip
    yield from of_table(
        "nll.weight", NLL_WEIGHTS, STALE,
        lambda node: term({"name": "nll", "weight": node, "rows": "own"}), default="none",
        samples={"suffix_ratio.cap": 0.9},
    )  # fmt: skip
    yield from of_table(
        "divergence.kind", KINDS, STALE, lambda node: term({"name": "divergence", "kind": node}),
        along=dict.fromkeys(KINDS, TAUGHT), samples={"jsd.beta": 0.2},
    )  # fmt: skip
    yield from of_table(
        "divergence.target", BETWEEN, STALE, lambda node: term({"name": "divergence", "target": node}),
        along=dict.fromkeys(BETWEEN, TAUGHT),
    )  # fmt: skip
    yield from of_table(
        "sampled_divergence.generator", GENERATORS, STALE,
        lambda node: term({"name": "sampled_divergence", "generator": node, "coefficient": 10.0}), default="forward_kl",
    )  # fmt: skip
    for kind, table, default in (("link", LINKS, "dpo"), ("pairs", PAIRS, "best_worst")):
        yield from of_table(
            f"preference.{kind}", table, STALE, lambda node, kind=kind: term({"name": "preference", kind: node}),
            default=default,
            samples={"dpo.smoothing": 0.2, "best_worst.least_gap": 2.0, "best_deviant.deviations": 9.0},
            against={"pairs": "every_pair"}.get(kind),
        )  # fmt: skip
    yield from of_table(
        "preference.generator", GENERATORS, STALE, lambda node: term({"name": "preference", "generator": node}),
        default="reverse_kl",
    )  # fmt: skip
    shown = "agent.objectives.more={name: nll, rows: {source: demonstration, when: failed}}"
    yield from of_table(
        "gate", GATES, (*STALE, SHOWN, shown, "agent.gates={failed: {name: success_at_most, count: -1}}"),
        lambda node: f"agent.gates={{failed: {text(node)}}}",
        samples={"success_at_most.threshold": -1.0, "own_or_unsolved.threshold": -1.0},
        first={"success_at_most": {"count": 2}, "own_or_unsolved": {"threshold": 2.0}},
    )  # fmt: skip
    yield from of_table(
        "map", {n: f for n, f in MAPS.items() if n != "tree"}, STALE, lambda node: f"agent.maps=[{text(node)}]",
        along={"taught": TAUGHT},
        first={
            "sign": {"positive": 0.3, "negative": 0.2},
            "long_success": {"threshold": 2.0},
            "overlong_failure": {"base": 2.0},
            "retempered": {"target": 3.0},
            "taught": {"outcome": 0.5},
            "tilted": {"share": 0.5},
            "by_difficulty": {"label": 2.0},
            "residual": {"rank": 2},
        },
        extra={**dict.fromkeys(["by_difficulty", "consistent"], ("rollout.columns={answer: answer, label: label}",)),
               "matched": ("rollout.privileged=true",), "thoughts": ("rollout.columns={marks: marks}",)},
        samples={
            "long_success.threshold": 0.5,
            "overlong_failure.threshold": 2.0,
            "retempered.cold": 0.2,
            "retempered.hot": 3.0,
            "retempered.threshold": 2.0,
            "tilted.probability": 0.06,
            "forgiven_failure.threshold": 2.0,
            "by_difficulty.threshold": -1.0,
            "thoughts.threshold": -1.0,
            "residual.low": 0.0,
            "residual.high": 1.0,
            "residual.fewest": 1000,
            "residual.most": 4,
            "by_difficulty.label_column": "answer",
            "consistent.threshold": -1.0,
            "consistent.answer_column": "label",
        },
    )  # fmt: skip
    forks = "rollout.context={_target_: unified_rl.rollout.forks.Forks}"
    forest = (*LANGUAGE, "correction=reinforce", "rollout.columns={begun: begun}", forks)
    yield from of_table("map", {"tree": MAPS["tree"]}, forest, lambda node: f"agent.maps=[{text(node)}]")
    earned = "correction.advantage={baseline: mean, reward: made}"
    yield from of_table(
        "column", WRITTEN, (*STALE, NUMBERS), lambda node: f"agent.columns={{made: {text(node)}}}",
        extra={"calibrated": (REFERENCES,), "likeness": (SHOWN,)},
        along={**dict.fromkeys(WRITTEN, (earned,)), "spoken": (earned, *TAUGHT)},
        first={"rubric": {"weights": [1.0, -0.5]}, "class_costs": {"alarm": ["3"]}, "criterion": {"at": 0}},
        samples={
            "rubric.of": "nowhere",
            "rubric.weights": [1.0, -0.1],
            "criterion.of": "nowhere",
            "success.threshold": 2.0,
            "bent.turn": 0.5,
            "spoken.levels": 100,
            "spoken.worst": 3.0,
            "loosened.threshold": -1.0,
            "class_costs.alarm": ["0", "1"],
            "class_costs.label_column": "answer",
            "class_costs.answer_column": "nowhere",
            "class_costs.threshold": 2.0,
            "distinct.threshold": -1.0,
            "distinct_share.threshold": -1.0,
        },
    )  # fmt: skip
    yield from of_table(
        "filter",
        FILTERS,
        (*STALE, NUMBERS),
        lambda node: f"agent.filters=[{text(node)}]",
        first={
            "distinct_pairs": {"score": "answer", "least": 1.0},
            "entropy_above": {"above": 2.55},
        },
        samples={
            "largest_advantage.over": "batch",
            "widest_spread.over": "batch",
            "likelihood_band.low": 2.8,
            "likelihood_band.high": 2.8,
            "seamless.least": 0.9,
            "distinct_pairs.score": "nowhere",
            "distinct_pairs.least": 0.0,
            "distinct_pairs.threshold": 2.0,
        },
    )
    yield from of_table(
        "reward_model", REWARD_MODELS, STALE, lambda node: f"agent.reward_model={text(node)}",
        first={"stored": {"folder": "REWARDER"}, "occupancy": {"base": "ANSWERS", "lr": 0.1}},
        samples={
            "occupancy.base": "nowhere",
            "occupancy.generator": "reverse_kl",
            "occupancy.root": True,
            "occupancy.hidden": [4],
            "occupancy.rows": "demonstration",
            "learnt.loss": "plackett_luce",
            "learnt.order": "nowhere",
            "learnt.hidden": [4],
            "learnt.pessimism": 1.0,
            "learnt.dependence": 100.0,
            "learnt.ridge": 1.0e-3,
            "learnt.form": "pairwise",
            "learnt.within": "batch",
            "learnt.rows": "demonstration",
            "reversed.form": "pairwise",
            "reversed.within": "batch",
            "reversed.rows": "demonstration",
            "stored.folder": "TEACHER",
            "stored.form": "pairwise",
            "stored.within": "batch",
        },
    )  # fmt: skip
    learnt = "agent.reward_model={name: learnt, frozen: true, pessimism: 1.0}"
    yield Case("reward_model.ridge of pessimism", (*STALE, learnt), (learnt.replace("1.0}", "1.0, ridge: 0.001}"),))
    yield Case("reward_model.within of pairs", (*STALE, learnt.replace("1.0}", "1.0, form: pairwise}")),
               (learnt.replace("1.0}", "1.0, form: pairwise, within: batch}"),))  # fmt: skip
    yield Case("reward_model.hidden of steps", (*STALE_CONTROL, "agent.reward_model={name: learnt, within: batch}"),
               ("agent.reward_model={name: learnt, within: batch, hidden: [4]}",))  # fmt: skip
    yield from of_table(
        "reward_loss", REWARD_LOSSES, STALE, lambda node: f"agent.reward_model={{name: learnt, loss: {text(node)}}}",
        default="bradley_terry", samples={"bradley_terry.pairs": "every_pair", "west_of_n.labelled": 1.0},
        first={"west_of_n": {"labelled": 0.5, "confidence": 0.5}},
    )  # fmt: skip
    yield from of_table(
        "coefficient", COEFFICIENTS, (*STALE, SHOWN),
        lambda node: term({"name": "nll", "coefficient": node}),
        first={
            "linear": {"start": 0.5, "end": 0.1},
            "cosine": {"start": 0.5, "end": 0.1},
            "exponential": {"start": 0.5, "decay": 0.5},
            "steps": {"at": [1], "values": [0.5, 0.1]},
            "sometimes": {"value": 0.5, "probability": 0.9},
            "dual": {"metric": "loss/more", "limit": 1.0},
            "warmup_cosine": {"peak": 0.5, "valley": 0.1, "warmup": 0, "decay": 2},
            "proportional_integral": {"metric": "loss/more", "target": 3.0, "base": 0.3, "gain": 0.1, "integral": 0.05},
            "logistic": {"metric": "loss/more", "high": 0.5, "middle": 2.0, "width": 1.0},
            "unsettled": {"metric": "loss/more", "window": 2, "temperature": 4.0},
            "kl_threshold": {"metric": "loss/more", "entropy": "loss/more", "base": 0.2, "low": 0.01, "scale": 1.0,
                             "wanted_rise": 0.5, "warmup": 2, "floor": 0.1, "entropy_scale": 1.0},
        },
        samples={
            "exponential.floor": 0.4,
            "sometimes.probability": 0.0,
            "steps.at": [2],
            "steps.values": [0.5, 0.2],
            "dual.metric": "train/reward",
            "dual.limit": 1.0e3,
            "dual.slack": 1.0e3,
            "warmup_cosine.warmup": 4,
            "warmup_cosine.decay": 1,
            "warmup_cosine.valley": 0.4,
            "proportional_integral.metric": "grad/norm",
            "proportional_integral.low": 0.9,
            "proportional_integral.high": 0.2,
            "proportional_integral.base": 0.4,
            "proportional_integral.windup": 0.1,
            "logistic.metric": "grad/norm",
            "unsettled.metric": "grad/norm",
            "kl_threshold.metric": "grad/norm",
            "kl_threshold.entropy": "grad/norm",
            "kl_threshold.reward": "nowhere",
            "kl_threshold.low": 0.25,
            "kl_threshold.high": 0.02,
            "kl_threshold.warmup": 0,
            "kl_threshold.floor": 9.0,
            "kl_threshold.windup": 0.1,
        },
    )  # fmt: skip
    node = {"name": "nll", "coefficient": {"name": "linear", "start": 0.3}}
    change = {**node, "coefficient": {"name": "linear", "start": 0.3, "complement": True}}
    yield Case("coefficient.complement", (*STALE, SHOWN, term(node)), (term(change),))
    for key, value in {"source": "own", "when": "failed", "unless": "failed"}.items():
        gates = "agent.gates={failed: {name: success_at_most, count: 2}}"
        node = {"name": "nll", "rows": {"source": ["own", "demonstration"]}}
        change = {"name": "nll", "rows": {**node["rows"], key: value}}  # type: ignore[dict-item]
        gate = (gates,) if value == "failed" else ()  # a gate that nothing reads is refused, so absence has none
        yield Case(f"rows.{key}", (*STALE, SHOWN, term(node)), (term(change), *gate))


# ---------------------------------------------------------------------------------------------- value-based parts


def valued_cases() -> Iterator[Case]:
    three = (*VALUED, "agent.critics=3")
    state = (*VALUED, "agent.tune_alpha=false", "agent.value={name: expectile}", "agent.target=state_value")
    yield from of_table(
        "target", TARGETS, VALUED, lambda node: f"agent.target={text(node)}", default="soft", against="smoothed",
        along={"state_value": ["agent.value={name: expectile}"]},
    )  # fmt: skip
    yield from of_table("aggregate", AGGREGATES, three, lambda node: f"agent.aggregate={text(node)}", default="least")
    yield from of_table("value", VALUES, VALUED, lambda node: f"agent.value={text(node)}",
                        along={"expectile": ["agent.target=state_value"]})  # fmt: skip
    yield from of_table(
        "actor", ACTORS, state, lambda node: f"agent.actor={{policy: {text(node)}}}",
        default="pathwise", samples={"weighted.largest": 0.5},
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- groups of options

CONTROL_ENVS = ("ant", "custom", "gymnasium", "half_cheetah", "hopper", "humanoid", "inverted_double_pendulum",
                "inverted_pendulum", "mjcf", "pendulum", "point_maze", "pusher", "reacher", "swimmer", "two_route",
                "walker2d")  # fmt: skip
PLAIN_LANGUAGE = tuple(word for word in LANGUAGE if not word.startswith("env."))
NEEDS_VALUE = {"gymnasium": ["env.id=Pendulum-v1"], "jsonl": ["env.path=FILE"],
               "custom": ["env._target_=mjcf_cases.weak_pendulum"],
               "mjcf": ["env.path=ROBOT", "env.reward=mjcf_cases:reward"]}  # fmt: skip
"""Options that a user must complete."""


def env_cases() -> Iterator[Case]:
    for name in group_options()["env"]:
        base = CONTROL if name in CONTROL_ENVS else PLAIN_LANGUAGE
        absence = base if name not in ("two_route", "chain_mod") else (*base, f"env={ELSE[name]}")
        yield Case(f"env={name}", absence, (f"env={name}", *NEEDS_VALUE.get(name, [])))


ELSE = {"two_route": "pendulum", "chain_mod": "countdown"}


def policy_cases() -> Iterator[Case]:
    words = [w for w in CONTROL if not w.startswith("policy")]
    for name in group_options()["policy"]:
        if name.startswith("causal_lm"):
            absence = [w for w in LANGUAGE if not w.startswith("policy")]
            used = "causal_lm" if name == "causal_lm_tiny" else "causal_lm_tiny"
            extra = ["policy.path=MODEL"] if name == "causal_lm_path" else []
            yield Case(f"policy={name}", (*absence, f"policy={used}"), (f"policy={name}", *extra))
        else:
            used = "gaussian" if name != "gaussian" else "flow"
            yield Case(f"policy={name}", (*words, f"policy={used}"), (f"policy={name}",))


def agent_cases() -> Iterator[Case]:
    control = ("env=inverted_pendulum", "rollout.num_envs=4", "rollout.horizon=8")
    valued = ("agent.learning_starts=16", "agent.batch_size=8", "rollout.random_steps=0", "agent.critic_hidden=[8]")
    baselines = ("agent.slice_steps=64",)
    extra = {
        "sac": valued,
        "actor_critic": valued,
        "sb3_ppo": ("agent.options={n_steps: 32}", *baselines),
        "sb3_sac": ("agent.options={learning_starts: 16}", *baselines),
        "ppo": ("agent.minibatch=8",),
    }
    for name in group_options()["agent"]:
        absence = (*control, "agent=ppo") if name == "policy_gradient" else control
        if name in ("behavior_cloning", "sft"):
            base = ("env=two_route", "rollout.rows=8") if name == "behavior_cloning" else LANGUAGE[:5]
            yield Case(f"agent={name}", (*base[:1],), (f"agent={name}", "rollout.rows=8"))
            continue
        words = absence if not name.startswith("sb3") else control[:1]
        yield Case(f"agent={name}", words, (f"agent={name}", *extra.get(name, ())))


def correction_options() -> Iterator[Case]:
    for name in group_options()["correction"]:
        absence = "reinforce" if name != "reinforce" else "ppo"
        run = (*(w for w in STALE if not w.startswith("correction")), f"correction={absence}")
        yield Case(f"correction={name}", run, (f"correction={name}", *(TAUGHT if name == "erpd" else ())))


def replay_options() -> Iterator[Case]:
    for name in group_options()["replay"]:
        language = (*STALE, "replay=fresh" if name != "fresh" else "replay=uniform")
        yield Case(f"replay={name} for groups", language, (f"replay={name}",))
        valued = (
            *VALUED,
            "replay=uniform" if name != "uniform" else "replay=staleness",
            f"rollout.horizon={32 if name == 'segment' else 8}",
        )
        yield Case(f"replay={name} for values", valued, (f"replay={name}",))


def option_cases() -> Iterator[Case]:
    yield from env_cases()
    yield from policy_cases()
    yield from agent_cases()
    yield from correction_options()
    yield from replay_options()
    for name in group_options()["rollout"]:
        yield Case(f"rollout={name}", *ROLLOUTS[name])
    warm = {
        "demonstrations": ("warm_start.dataset=16", "warm_start.batch_size=4", "warm_start.stages=[{updates: 1}]"),
        "chain_of_thought": ("warm_start.batch_size=4", "warm_start.stages=[{style: chain, updates: 1}]"),
        "from_run": ("warm_start.run=TEACHER",),
        "none": (),
    }
    for name in group_options()["warm_start"]:
        base = CONTROL if name == "demonstrations" else LANGUAGE
        if name != "none":
            yield Case(f"warm_start={name}", base, (f"warm_start={name}", *warm[name]))
    for name in ("data_parallel", "fsdp"):
        yield Case(f"learner={name}", CONTROL, (f"learner={name}",))  # one process, which it is refused for


SUPERVISED = ("env=two_route", "agent=behavior_cloning", "rollout.rows=8")
UNROLLED = tuple(word for word in VALUED if not word.startswith("rollout"))
OFFLINE = (
    *(w for w in VALUED if not w.startswith("rollout")),
    "rollout=stored",
    "rollout.data=ROWS",
    "rollout.rows=32",
)
ROLLOUTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "language": (("env=chain_mod", "agent=sft", "rollout.rows=8"), ("rollout=language", "agent=policy_gradient")),
    "control": (UNROLLED, ("rollout=control", "rollout.num_envs=2", "rollout.horizon=16")),
    "single_steps": (
        (*UNROLLED, "rollout=control", "rollout.horizon=4"),
        ("rollout=single_steps", "rollout.horizon=1"),
    ),
    "demonstrations": (("env=two_route",), SUPERVISED[1:]),
    "stored": (VALUED, tuple(w for w in OFFLINE if w.startswith("rollout"))),
    "none": (LANGUAGE, ("rollout=none",)),
}
"""A run, and the words that put an option in its place."""
COVERED = {
    "recipe": "test_recipes.py trains each",
    "study": "of compare, not of a run",
    "learner": "test_ranks.py and test_fsdp.py train in several processes",
    "engine": "who collects is of no effect by design: test_tickets.py, test_ray.py",
}
"""Groups that are walked elsewhere."""


def test_what_no_run_reaches_is_named_on_its_page(source: Path) -> None:
    page = (source / "docs" / "returns.md").read_text()
    files = [*(source / "agents").glob("*.py"), *(source / "unified_rl").rglob("*.py")]
    used = "".join(path.read_text() for path in files if path.parent.name != "returns")
    for name in returns.__all__:
        assert re.search(rf"\b{name}\b", used) or re.search(rf"\b{name}\b", page), name


def test_every_group_is_walked() -> None:
    walked = {"env", "policy", "agent", "correction", "replay", "rollout", "warm_start"}
    assert set(group_options()) == walked | (COVERED.keys() - {"study"})


# ---------------------------------------------------------------------------------------------- parameters of classes

LM = tuple(LANGUAGE)
SUPERVISED_LM = ("agent=sft", "rollout.rows=8", *(w for w in LANGUAGE if not w.startswith("rollout")))
TAUGHT_LM = ("agent=sft", "rollout.rows=8", *(w for w in LANGUAGE if w.startswith("policy")))
CLONED = (*SUPERVISED, "replay=uniform")
WINDOWS = ("replay=segment", "replay.sampler.length=2")
SB3 = ("env=pendulum", "agent=sb3_ppo", "agent.slice_steps=16", "agent.options={n_steps: 16}")
CLASSES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    # label: (group, class, run)
    "policy_gradient": ("agent", "unified_rl.agents.policy_gradient.PolicyGradient", STALE_CONTROL),
    "actor_critic": ("agent", "unified_rl.agents.actor_critic.ActorCritic", VALUED),
    "behavior_cloning": ("agent", "unified_rl.agents.behavior_cloning.BehaviorCloning", CLONED),
    "control": ("rollout", "unified_rl.rollout.ControlRollout", CONTROL),
    "language": ("rollout", "unified_rl.rollout.LanguageRollout", STALE),
    "demonstrations": ("rollout", "unified_rl.rollout.DemonstrationRollout", SUPERVISED),
    "gaussian": ("policy", "unified_rl.policies.gaussian.GaussianPolicy", CONTROL),
    "flow": ("policy", "unified_rl.policies.flow.FlowPolicy", (*CONTROL, "policy=flow")),
    "diffusion": (
        "policy", "unified_rl.policies.diffusion.DiffusionPolicy", (*CONTROL, "policy=diffusion", "policy.steps=3"),
    ),
    "autoregressive": (
        "policy", "unified_rl.policies.autoregressive.AutoregressivePolicy",
        (*CONTROL, "policy=autoregressive", "policy.bins=5"),
    ),
    "causal_lm": ("policy", "unified_rl.policies.causal_lm.CausalLM", LM),
    "two_route": ("env", "unified_rl.envs.control.TwoRouteEnv", (*CONTROL, "rollout.horizon=24")),
    "gymnasium": ("env", "unified_rl.envs.control.GymnasiumEnv", (*CONTROL, "env=pendulum")),
    "mujoco": ("env", "unified_rl.envs.control.make_mujoco", (*CONTROL, "env=inverted_pendulum", "env.chunk=2")),
    "mjcf": (
        "env", "unified_rl.envs.control.make_mjcf",
        (*CONTROL, "rollout.horizon=16", "env=mjcf", "env.path=ROBOT", "env.reward=mjcf_cases:reward", "env.chunk=2",
         "env.max_steps=9"),
    ),
    "chain_mod": ("env", "unified_rl.envs.language.ChainMod", (*LM, "rollout.prompts=8")),
    "calculator": ("env", "unified_rl.envs.language.Calculator", (*TAUGHT_LM, "env=calculator")),
    "countdown": ("env", "unified_rl.envs.language.Countdown", (*TAUGHT_LM, "env=countdown")),
    "guess_number": ("env", "unified_rl.envs.language.GuessNumber", (*TAUGHT_LM, "env=guess_number")),
    "replay": ("replay", "unified_rl.replay.Replay", VALUED),
    "priority": ("replay.sampler", "unified_rl.replay.Priority", (*VALUED, "replay=priority")),
    "segment": ("replay.sampler", "unified_rl.replay.Segment", (*VALUED, "agent.n_step=2", *WINDOWS)),
    "group": ("replay.sampler", "unified_rl.replay.Group", (*STALE, "replay=group", "replay.sampler.size=4")),
    "staleness": ("replay.sampler", "unified_rl.replay.StalenessBounded", (*VALUED, "replay=staleness")),
    "fresh": ("replay.sampler", "unified_rl.replay.Fresh", LM),
    "with_dataset": (
        "replay", "unified_rl.replay.WithDataset",
        (*VALUED, "replay._target_=unified_rl.replay.WithDataset", "replay.data=ROWS"),
    ),
    "warm_start": (
        "warm_start", "unified_rl.training.warm_start.WarmStart",
        (*CONTROL, "warm_start=demonstrations", "warm_start.dataset=16", "warm_start.batch_size=4",
         "warm_start.stages=[{updates: 2}]"),
    ),
    "jsonl": (
        "env", "unified_rl.envs.language.JsonlProblems",
        (*TAUGHT_LM, "env=jsonl", "env.path=FILE", "env.vocabulary_size=300"),
    ),
    "sb3": ("agent", "unified_rl.agents.sb3.SB3Agent", SB3),
    "experience": ("rollout.sources.experience", "unified_rl.rollout.sources.Experience", (*LM, *FAST, *REPLAYED)),
    "demonstrated": (
        "rollout.sources.demonstrations", "unified_rl.rollout.sources.Demonstrations",
        (*STALE, SHOWN.replace("per_group: 1", "per_group: 1, style: chain")),
    ),
}  # fmt: skip
"""Classes that configuration builds: the node, the class, and a run with it."""

VALUES_OF: dict[str, Any] = {
    **{f"{task}.truncated": "mask" for task in ("calculator", "chain_mod", "countdown", "guess_number", "jsonl")},
    "jsonl.tools": ["own_tools:add"],
    "jsonl.tool_format": "mistral",
    "jsonl.max_turns": 2,
    **{f"{task}.stop": "1" for task in ("calculator", "chain_mod", "countdown", "guess_number", "jsonl")},
    # what no rule gives, by class and parameter
    **dict.fromkeys(["policy_gradient.length", "actor_critic.length", "behavior_cloning.length"], 3),
    "policy_gradient.minibatch": 8,
    "policy_gradient.micro_batch": 2,
    "policy_gradient.advantage": "group",
    "policy_gradient.credit": "nowhere",
    "policy_gradient.lr_schedule": "linear",
    "policy_gradient.critic_lr": 0.01,
    "policy_gradient.optimizer": "sgd",
    "policy_gradient.kl_in": "reward",
    "policy_gradient.kl_estimator": "k1",
    "policy_gradient.teacher": "TEACHER",
    "policy_gradient.anchors": {"other": {"ema": 0.9}},
    "policy_gradient.gamma": 0.5,
    "policy_gradient.value_clip": 0.001,
    "policy_gradient.critic_hidden": [4],
    "policy_gradient.critic_config": {"model_type": "llama"},
    "policy_gradient.normalize_advantage": False,
    "policy_gradient.max_grad_norm": 0.01,
    "policy_gradient.target_kl": 1.0e-9,
    "policy_gradient.shuffle_steps": False,
    "policy_gradient.device": "nowhere",
    "policy_gradient.objectives": {"value": None},
    "policy_gradient.per_record": {"clip": 1.0},
    "policy_gradient.gates": {"failed": "success_at_most"},
    "policy_gradient.columns": {"made": "bent"},
    "policy_gradient.maps": [{"name": "sign", "negative": 0.1}],
    "policy_gradient.filters": ["uncertain_units"],
    "policy_gradient.reward_model": "learnt",
    "policy_gradient.drop_equal_groups": True,
    "actor_critic.critic": {"extra": "nowhere"},
    "actor_critic.updates_per_step": 1.0,
    "actor_critic.correction": 3,
    "actor_critic.target": "smoothed",
    "actor_critic.aggregate": "mean",
    "actor_critic.value": "expectile",
    "actor_critic.actor": {"policy": {"name": "imitate"}},
    "actor_critic.critic_hidden": [4],
    "actor_critic.target_entropy": -3.0,
    "actor_critic.device": "nowhere",
    "actor_critic.learning_starts": 16,
    "actor_critic.lr_schedule": "linear",
    "actor_critic.optimizer": "sgd",
    "behavior_cloning.correction": 3,
    "behavior_cloning.batch_size": 4,
    "behavior_cloning.ema": 0.5,
    "behavior_cloning.micro_batch": 3,
    "behavior_cloning.lr_schedule": "linear",
    "behavior_cloning.optimizer": "sgd",
    "behavior_cloning.max_grad_norm": 0.01,
    "behavior_cloning.device": "nowhere",
    "control.num_envs": 3,
    "control.device": "nowhere",
    "control.random_steps": 16,
    "language.sources": {"demonstrations": {"_target_": "unified_rl.rollout.sources.Demonstrations", "per_group": 1}},
    "language.guide": {"_target_": "unified_rl.rollout.sources.Hints"},
    "language.context": {"_target_": "unified_rl.rollout.context.Hints"},
    "language.curriculum": {"_target_": "unified_rl.rollout.curriculum.Curriculum"},
    "language.beginning": {"_target_": "unified_rl.rollout.beginnings.Guided"},
    "language.speaker": {"_target_": "unified_rl.agents.speakers.Interleaved", "folder": "TEACHER", "top_k": 3},
    "control.speaker": {"_target_": "unified_rl.agents.speakers.Alternating", "folder": "nowhere"},
    "control.starts": {"_target_": "unified_rl.rollout.starts.Starts"},
    "control.streams": "nowhere",
    "language.staleness": 0,
    "language.generation_batch": 4,
    "language.columns": {"scores": ["correct"]},
    "language.privileged": "chain",
    "language.streams": "nowhere",
    "language.device": "nowhere",
    "demonstrations.problem_generator": 3,
    "demonstrations.data": "ROWS",
    "demonstrations.style": "chain",
    "demonstrations.streams": "nowhere",
    "demonstrations.device": "nowhere",
    "gaussian.num_actions": 3,
    "gaussian.normalize_observation": False,
    "flow.normalize_observation": False,
    "diffusion.normalize_observation": False,
    "autoregressive.normalize_observation": False,
    "gaussian.hidden": [4],
    "gaussian.activation": "relu",
    "gaussian.gsde_every": 2,
    "gaussian.log_std_low": 0.5,
    "gaussian.log_std_high": -0.75,
    "flow.num_actions": 3,
    "flow.trained_steps": 2,
    "flow.hidden": [4],
    "flow.activation": "tanh",
    "flow.std_max": 0.4,
    "diffusion.num_actions": 3,
    "diffusion.trained_steps": 2,
    "diffusion.hidden": [4],
    "diffusion.activation": "tanh",
    "autoregressive.num_actions": 3,
    "autoregressive.hidden": [4],
    "autoregressive.activation": "tanh",
    "autoregressive.bins": 7,
    "causal_lm.path": "MODEL",
    "causal_lm.adapter": "nowhere",
    "causal_lm.lora": {"r": 2},
    "causal_lm.config": {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2},
    "causal_lm.dtype": "bfloat16",
    "causal_lm.engine": "transformers",
    "causal_lm.engine_dtype": "int8",
    "causal_lm.server": "http://127.0.0.1:1",
    "causal_lm.server_folder": "/nowhere",
    "causal_lm.server_sync": "nccl",
    "two_route.gamma": 0.5,
    "mujoco.gamma": 0.5,
    "gymnasium.id": "MountainCarContinuous-v0",
    "gymnasium.max_episode_steps": 3,
    "gymnasium.make_kwargs": {"g": 5.0},
    "mujoco.name": "InvertedDoublePendulum-v5",
    "mujoco.chunk": 3,
    "mujoco.options": {"reset_noise_scale": 0.3},
    "gymnasium.make": "mjcf_cases:weak_pendulum",
    "mjcf.path": "OTHER_BOT",
    "mjcf.reward": "mjcf_cases:other_reward",
    "mjcf.observation": "mjcf_cases:observation",
    "mjcf.termination": "mjcf_cases:ended",
    "mjcf.metrics": "mjcf_cases:metrics",
    "mjcf.initial": "mjcf_cases:initial",
    "chain_mod.max_turn_tokens": 5,
    "chain_mod.tokenizer": "nowhere",
    "chain_mod.held_out": 0.5,
    "calculator.operators": "'*'",
    "calculator.tokenizer": "nowhere",
    "countdown.tokenizer": "nowhere",
    "countdown.operators": "'+'",
    "countdown.max_turn_tokens": 40,
    "guess_number.tokenizer": "nowhere",
    "jsonl.path": "OTHER",
    "jsonl.eval_path": "OTHER",
    "jsonl.question_key": "asked",
    "jsonl.answer_key": "worked",
    "jsonl.solution_key": "worked",
    "jsonl.verifier": "math",
    "jsonl.date": "2025-01-01",
    "jsonl.chat": True,
    "jsonl.system_prompt": "brief",
    "jsonl.chat_template_kwargs": {"think": False},
    "jsonl.template": "'Q {question} A '",
    "jsonl.max_prompt_length": 8,
    "jsonl.tokenizer": "nowhere",
    "jsonl.vocabulary_size": 262,
    "sb3.algorithm": "a2c",
    "sb3.options": {"n_steps": 8},
    "sb3.env": 3,
    "sb3.budget": 8,
    "sb3.slice_steps": 32,
    "sb3.num_envs": 2,
    "sb3.gamma": 0.5,
    "sb3.device": "nowhere",
    "replay.capacity": 8,
    "replay.lanes": 3,
    "replay.sampler": {"_target_": "unified_rl.replay.Recency", "half_life": 2.0},
    "replay.storage": "nowhere",
    "replay.path": "nowhere",
    "replay.device": "nowhere",
    "replay.trim_key": "mask",
    "with_dataset.capacity": 8,
    "with_dataset.lanes": 3,
    "with_dataset.sampler": {"_target_": "unified_rl.replay.Recency", "half_life": 2.0},
    "with_dataset.storage": "nowhere",
    "with_dataset.path": "nowhere",
    "with_dataset.device": "nowhere",
    "with_dataset.trim_key": "mask",
    "with_dataset.data": "nowhere",
    "group.size": 8,
    "priority.eps": 0.5,
    "staleness.max_lag": 0,
    "warm_start.stages": [{"updates": 3}],
    "warm_start.dataset": 32,
    "warm_start.ema": 0.5,
    "warm_start.run": "TEACHER",
    "experience.share": 0.25,
    "experience.answers": 1,
    "experience.prompts": 1,
    "experience.deviation": 0.01,
    "experience.start": 1.0,
    "experience.pick": "newest",
    "experience.threshold": 1.0,
    "demonstrated.style": "direct",
    "demonstrated.per_group": 2,
}
EVALUATED = ("zero_start", "held_out")
"""Parameters that only a held-out evaluation shows."""


def parameter_cases() -> Iterator[Case]:
    for label, (group, path, run) in CLASSES.items():
        for name, parameter in parameters(locate(path))[0].items():
            key = f"{label}.{name}"
            value = VALUES_OF[key] if key in VALUES_OF else 3 if given(name, parameter) else other_of(key, parameter)
            shown = name in EVALUATED
            yield Case(f"{label}({name})", run, (f"{group}.{name}={text(value)}",), evaluated=shown)


SPACES = ("space", "observation_dim", "action_dim", "action_low", "action_high")


def given(name: str, parameter: Any) -> bool:
    """Whether the run gives a parameter, which a user may not set."""
    return parameter.default is REQUIRED or name in SPACES


def other_of(key: str, parameter: Any) -> Any:
    """A changed value of a parameter.

    Raises:
        KeyError: its default tells none; add one to :data:`VALUES_OF`.
    """
    try:
        return other(parameter.default)
    except KeyError as error:
        raise KeyError(f"{key} needs an entry in VALUES_OF, its default is {parameter.default!r}") from error


SETTINGS: dict[str, Any] = {
    "seed": 1, "eval_episodes": 3, "eval_deterministic": False, "device": "nowhere", "reward": ["length"],
    "reward_weights": [2.0], "reward_errors": "skip", "eval_sampling": {"samples": 2},
}  # fmt: skip
"""Settings of a run that change what comes out, and a changed value."""

HOW = {
    "epochs": "how long a run is; test_budget.py",
    "updates": "how long a run is; test_budget.py",
    "steps": "how long a run is; these cases make two updates whatever it says",
    "threads": "torch's threads",
    "runs": "where run folders are",
    "name": "of the run folder",
    "run_dir": "the run folder",
    "resume_existing": "what happens where the folder holds a run; test_resume.py",
    "eval_every": "how often",
    "log_every": "how often",
    "checkpoint_every": "how often",
    "keep_checkpoints": "how many files stay",
    "checkpoint_replay": "what a checkpoint holds; test_damage.py",
    "progress": "a display",
    "samples_rows": "how much is written; test_samples.py",
    "samples_every": "how often; test_samples.py",
    "logger": "where metrics go; test_loggers.py",
    "callbacks": "code of the user's own; test_callbacks.py",
    "keep_best": "which checkpoint is kept; test_best.py",
    "early_stopping": "when a run ends; test_best.py",
}
"""Settings of a run that change how it is made, and not its results."""


def settings_cases() -> Iterator[Case]:
    for field in dataclasses.fields(TrainSettings):
        if field.name not in HOW:
            value = SETTINGS[field.name] if field.name in SETTINGS else other(field.default)
            base = LANGUAGE if field.name == "eval_sampling" else CONTROL
            yield Case(field.name, (*base, "eval_episodes=2"), (f"{field.name}={text(value)}",), evaluated=True)


SAMPLERS = {
    "Uniform": {},
    "WithoutReplacement": {},
    "Recency": {"half_life": 4.0},
    "Softmax": {"temperature": 0.1},
    "Buckets": {"key": "reward", "edges": [0.5], "weights": [0.0, 1.0]},
    "BySource": {"source": "online"},
    "Priority": {},
    "Segment": {},
    "Group": {},
    "StalenessBounded": {"max_lag": 1},
    "Fresh": {},
    "Mixture": {"quotas": {"online": 1.0}},
}
"""Every sampler, with what a user must say."""


SAMPLER_SETTINGS: dict[str, dict[str, tuple[Any, dict[str, Any]]]] = {
    # a changed value, and what it needs beside itself
    "Recency": {"half_life": (1.0, {})},
    "Softmax": {"key": ("discount", {}), "temperature": (1.0e3, {"key": "episode"}),
                "renew": (True, {"key": "policy_version"})},
    "Buckets": {"key": ("episode", {}),
                "edges": ([1.5], {"key": "episode"}), "weights": ([1.0, 0.0], {"key": "episode"})},
    "BySource": {"source": ("demonstration", {})},
    "Mixture": {
        "quotas": ({"demonstration": 1.0}, {}),
        "share_missing": (False, {"quotas": {"online": 0.5, "demonstration": 0.5}, "share_missing": True}),
        "samplers": ({"online": {"_target_": "unified_rl.replay.Recency", "half_life": 1.0}}, {}),
    },
}  # fmt: skip
"""Settings of the samplers that no option of the group names (the others are among :data:`CLASSES`)."""


def sampler_cases() -> Iterator[Case]:
    for name, given in SAMPLERS.items():
        absence = "Uniform" if name not in ("Uniform", "BySource", "Mixture") else "Recency"
        base = (*VALUED, f"replay.sampler={{_target_: unified_rl.replay.{absence}}}")
        node = {"_target_": f"unified_rl.replay.{name}", **given}
        yield Case(f"sampler.{name}", base, (f"replay.sampler={text(node)}",))
        for key, (value, more) in SAMPLER_SETTINGS.get(name, {}).items():
            used = (*VALUED, f"replay.sampler={text({**node, **more})}")
            yield Case(f"sampler.{name}.{key}", used, (f"replay.sampler={text({**node, **more, key: value})}",))


def further_cases() -> Iterator[Case]:
    """What the walk through the classes meets in a run where it is refused, in one where it acts."""
    node = "correction.advantage={baseline: mean, scale: std}"
    plain = (*STALE, "correction.kernel={name: ppo, clip_low: 0.2, clip_high: 0.2}", node)
    shaped = "correction.kernel={name: demonstration_shape}"
    yield Case("demonstration_shape without demonstrations", plain, (shaped,))
    yield Case("drop_equal_groups of groups", STALE, ("agent.drop_equal_groups=true",))
    yield Case("random_steps for values", VALUED, ("rollout.random_steps=4",))
    mixed = ("env=chain_mod", "agent=sft", "rollout.rows=8", "rollout.style=mixture")
    yield Case("reward of answers", STALE, ("reward=[length]",))
    yield Case("reward_weights of rewards", (*STALE, "reward=[task, length]"), ("reward_weights=[1.0, 9.0]",))
    yield Case("direct_share of mixture", mixed, ("env.direct_share=0.1",))
    yield Case("style for language", SUPERVISED_LM, ("rollout.style=direct",))
    for key, value in {"kl_in": "reward", "kl_estimator": "k1"}.items():
        yield Case(f"{key} of kl", (*STALE, "agent.kl=0.5"), (f"agent.{key}={value}",))
    for key in ("frame_stack", "action_repeat", "chunk"):
        yield Case(f"{key} of any robot", (*CONTROL, "env=pendulum"), (f"env.{key}=2",))
    yield Case(
        "validation of a data set",
        ("env=inverted_pendulum", *SUPERVISED[1:], "rollout.data=ROWS"),
        ("rollout.validation=0.5",),
    )
    held = (*CONTROL, "policy.gsde=true")
    yield Case("gsde_every of gsde", held, ("policy.gsde_every=2",))
    yield Case("gsde_learn_features of gsde", held, ("policy.gsde_learn_features=true",))
    yield Case("gsde of a squashed policy", (*CONTROL, "policy=tanh_gaussian", "policy.state_dependent_std=false"),
               ("policy.gsde=true",))  # fmt: skip
    judged = "agent.objectives={policy: null, prefer: {name: kto}}"
    yield Case("error_rate of actions", (*BINS, "correction=reinforce", "agent.advantage=group", judged),
               (judged.replace("kto}", "kto, error_rate: 1.0}"),))  # fmt: skip
    yield Case("critic_config for language", (*LM, "agent.advantage=critic"), (f"agent.critic_config={text(TINY)}",))


TINY = {
    "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip


def test_every_sampler_is_walked() -> None:
    from unified_rl.replay import samplers

    abstract = {"Draw", "Sampler"}
    assert set(SAMPLERS) == set(samplers.__all__) - abstract


def context_cases() -> Iterator[Case]:
    """What is sampled again; the name of the setting is read from the rollout, since it is to change."""
    known = parameters(locate("unified_rl.rollout.LanguageRollout"))[0]
    place, room = ("context", "rollout.context") if "context" in known else ("guide", "rollout.sources")
    base = (*LANGUAGE, "rollout.group_size=1", "rollout.prompts=8", "correction=reinforce", ALONE_ROWS)
    again = "unified_rl.rollout.retries"
    pairs = (*LANGUAGE, "rollout.group_size=2", "rollout.prompts=8", "env.max_turn_tokens=8")
    kinds: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
        "Hints": (f"unified_rl.{room}", {}, {"shares": [0.9], "style": "direct", "keep": "solved"}),
        "Refill": (f"unified_rl.{room}", {}, {"tries": 1}),
        "SelfHints": (again, {}, {"shares": [0.9], "style": "direct", "ask": "'1'"}),
        "Rephrased": (again, {"below": 1.0}, {"rows": 3, "below": 0.0, "share": 0.5, "style": "direct"}),
        "SelfJudged": (
            "unified_rl.rollout.verdicts", {"ask": "'='", "yes": "'+'", "no": "'-'"},
            {"of": 1.0, "verdicts": 3, "ask": "'=='", "yes": "'1'", "no": "'yes'"},
        ),
        "Forks": ("unified_rl.rollout.forks", {}, {"chains": 1}),
        "Retried": (again, {}, {"share": 0.9, "ask": "'1'", "threshold": 1.0}),
    }  # fmt: skip
    for name, (folder, given, changes) in kinds.items():
        own = base if name == "Refill" else (*pairs, "correction=reinforce")
        node = {"_target_": f"{folder}.{name}", **given}
        yield Case(f"context.{name}", own, (f"rollout.{place}={text(node)}",))
        for key, value in changes.items():
            used = (*own, f"rollout.{place}={text(node)}")
            yield Case(f"context.{name}.{key}", used, (f"rollout.{place}={text({**node, key: value})}",))


def beginning_cases() -> Iterator[Case]:
    """What answers begin with, on few prompts that come again."""
    base = (*LANGUAGE, "env.modulus=2", "env.terms=2", "env.held_out=0.0", "correction=reinforce")
    parts: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "Guided": ({}, {"share": 0.9, "of": 1.0, "style": "direct"}),
        "Drafts": ({}, {"of": 0.5, "style": "direct"}),
        "Knowledge": ({}, {"of": 0.5, "column": "nowhere"}),
        "Advised": ({}, {"of": 0.25, "text": "'1+'", "share": 1.0, "style": "direct", "opposite": "'0'"}),
        "Forced": ({"token": "'>'"}, {"token": "'1'", "share": 0.25}),
        "OwnSuccess": ({"of": 1.0}, {"share": 0.9, "of": 0.25, "prompts": 1, "threshold": 1.0}),
        "Continued": ({}, {"share": 0.9, "of": 0.25, "prompts": 1}),
        "Verified": ({}, {"lenience": -3.0, "prompts": 1}),
    }
    for name, (given, changes) in parts.items():
        node = {"_target_": f"unified_rl.rollout.beginnings.{name}", **given}
        own = (*base, "env.terms=3") if name == "Knowledge" else base  # one of two numbers is no step by itself
        yield Case(f"beginning.{name}", own, (f"rollout.beginning={text(node)}",))
        for key, value in changes.items():
            used = (*own, f"rollout.beginning={text(node)}")
            yield Case(f"beginning.{name}.{key}", used, (f"rollout.beginning={text({**node, key: value})}",))


def speaker_cases() -> Iterator[Case]:
    """Who speaks beside the policy."""
    base = (*LANGUAGE, "correction=reinforce")
    parts: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "Interleaved": ({"top_k": 3}, {"top_k": 1}),
        "Draft": ({}, {"replay": 1}),
        "TwoContexts": ({}, {"share": 0.0, "style": "direct"}),
        "Alternating": ({"probability": 0.5}, {"probability": 0.9, "decay": 0.1}),
    }
    for name, (given, changes) in parts.items():
        node = {"_target_": f"unified_rl.agents.speakers.{name}", "folder": "TEACHER", **given}
        yield Case(f"speaker.{name}", base, (f"rollout.speaker={text(node)}",))
        for key, value in {**changes, "folder": "MODEL"}.items():
            used = (*base, f"rollout.speaker={text(node)}")
            yield Case(f"speaker.{name}.{key}", used, (f"rollout.speaker={text({**node, key: value})}",))


def start_cases() -> Iterator[Case]:
    """Which rows of a simulation are compared with each other."""
    base = (*CONTROL, "agent.advantage=group", "agent.epochs=3", "rollout.num_envs=16")
    node = {"_target_": "unified_rl.rollout.starts.Starts", "grid": 0.02}
    alone = (*base, "correction=reinforce", "correction.advantage={baseline: none}")
    yield Case("starts", alone, (f"rollout.starts={text(node)}",))
    grouped = (*base, "correction=grpo", f"rollout.starts={text(node)}")
    for key, value in {"grid": 0.05, "of": [0]}.items():
        yield Case(f"starts.{key}", grouped, (f"rollout.starts={text({**node, key: value})}",))
    won = "agent.columns={won: {name: success, threshold: -1.0}}"
    tracked = "correction.advantage={baseline: tracker, reward: won, scale: whiten}"
    yield Case("starts.tracker", (*grouped, "rollout.horizon=24"), (tracked, won))
    yield Case("starts.goal", grouped, (f"rollout.starts={text({**node, 'of': 'goal'})}",))


def derived_cases() -> Iterator[Case]:
    """Rows made of own answers, and groups of before, on few prompts that come again."""
    base = (*LANGUAGE, "env.modulus=2", "env.terms=2", "env.held_out=0.0", "env.max_turn_tokens=8", "correction=tis")
    chain = (*base, "env._target_=run_cases.CommaChain", "env.terms=3")
    taught = (
        *chain,
        "env.max_turn_tokens=12",
        "rollout.group_size=16",
        "agent.objectives={policy: null, imitate: {name: nll, rows: [own, expert]}}",
    )
    every = "'0123456789+-=,>'"
    parts: dict[str, tuple[tuple[str, ...], dict[str, Any], dict[str, Any]]] = {
        "Coached": (
            base, {"below": 1.0}, {"per_group": 2, "below": 0.0, "share": 1.0, "style": "direct", "text": "'1+'"},
        ),
        "Assimilated": (
            (*base, "rollout.group_size=2", "rollout.prompts=16"), {},
            {"tries": 3, "share": 1.0, "style": "direct", "prompts": 1, "at_least": 2.0},
        ),
        "Recoveries": (
            base, {"errors": 2, "recoveries": 2},
            {"errors": 1, "recoveries": 3, "share": 0.9, "diagnosis": "'-'", "threshold": -1.0},
        ),
        "Edited": (chain, {}, {"edits": 0, "separators": every, "style": "direct"}),
        "Revised": (taught, {"separators": every}, {"thought": "'-'", "gap": 2.0, "separators": "'?'"}),
        "Calibrated": (
            (*base, "env._target_=run_cases.SureChain", "env.confidence=true", *taught[-1:]), {},
            {"of": 0.0, "threshold": 1.0},
        ),
        "Shortened": ((*taught, "rollout.group_size=4"), {}, {"shares": [], "threshold": 2.0}),
        "Described": (
            (*base, "env.max_turn_tokens=6", "agent.objectives.policy.rows=own", "correction.advantage.rows=own"),
            {"folder": "MODEL"},
            {"chains": 2, "share": 0.2, "temperature": 0.5, "threshold": 2.0},
        ),
        "Judgements": (
            base, {"ask": "'='", "yes": "'+'", "no": "'-'"},
            {"answers": 2, "verdicts": 2, "kind": "pair", "ask": "'=='", "yes": "'1'", "no": "'2'", "threshold": 2.0},
        ),
        "Steps": ((*base, "env.terms=3"), {}, {"branches": 1, "share": 0.9}),
        "Replays": ((*base, "rollout.prompts=16"), {"recent": 0.5},
                    {"recent": 1.0, "temperature": 0.01, "answers": 2, "prompts": 1}),
        "Windows": (base, {}, {"share": 0.2, "windows": 1, "until": 1}),
    }  # fmt: skip
    for name, (run, given, changes) in parts.items():
        node = {"_target_": f"unified_rl.rollout.sources.{name}", **given}
        yield Case(f"derived.{name}", run, (f"rollout.sources.x={text(node)}",))
        for key, value in changes.items():
            used = (*run, f"rollout.sources.x={text(node)}")
            yield Case(f"derived.{name}.{key}", used, (f"rollout.sources.x={text({**node, key: value})}",))


def curriculum_cases() -> Iterator[Case]:
    """Trackers and what their estimates are worth, on few prompts that come again."""
    target = "unified_rl.rollout.curriculum.Curriculum"
    base = (*LANGUAGE, "env.modulus=2", "env.terms=2", "env.held_out=0.0", "correction=reinforce")
    choice: dict[str, Any] = {"_target_": target, "candidates": 2}

    def placed(key: str) -> Callable[[dict[str, Any]], str]:
        return lambda node: f"rollout.curriculum={text({**choice, key: node})}"

    yield from of_table(
        "tracker", TRACKERS, base, placed("tracker"), samples={"network.seed": 3, "neighbours.pairs": 2}
    )
    changed = {"deviation.eps": 5.0, "gaussian.target": 1.0, "gaussian.sigma": 1.0e3}
    yield from of_table("difficulty", DIFFICULTIES, base, placed("score"), samples=changed)
    for key, value in {"candidates": 3, "pick": "top", "thompson": True}.items():
        used = (*base, f"rollout.curriculum={text(choice)}")
        yield Case(f"curriculum.{key}", used, (f"rollout.curriculum={text({**choice, key: value})}",))


# ---------------------------------------------------------------------------------------------- the test

KNOWN: dict[str, str] = {}
"""Cases without effect or proper refusal today: what is missing. One that is reachable must leave the list."""

RANDOM = "supervised rows hold no reward, and random policies never earn one; chain_mod shows it"
ASIDE: dict[str, str] = {
    "map.retempered.cold": "of an entropy above the target; test_row_rules.py",
    **{
        f"coefficient.kl_threshold.{name}": "of a reward that moves, in the third update; test_coefficients.py"
        for name in ("derivative", "reward_decay")
    },
    "column.class_costs.false_alarm": "of answers that random policies do not give; test_row_columns.py",
    "coefficient.unsettled.window": "of the updates before the last two; test_row_columns.py",
    "select.top_covariance.seed": "decides between equal covariances only",
    "policy_gradient(columns)": "a column that nothing reads; the column cases read one",
    "policy_gradient(gates)": "a column that nothing reads; the gate cases read one",
    "language(columns)": "columns that nothing reads; the advantage cases read them",
    "language(privileged)": "a column that nothing reads; recipe=opsd reads it",
    **{
        f"tracker.{name}": "of what was counted twice, so from a third collection on; test_curriculum.py"
        for name in ("drift.low", "drift.high", "drift.half_life", "decayed.fresh", "decayed.rest")
    },
    "calculator(spare_turns)": "turns that supervised rows do not have",
    "guess_number(spare_turns)": "turns that supervised rows do not have",
    "countdown(max_turn_tokens)": "a budget of sampled answers; chain_mod shows it",
    "countdown(max_target)": "larger targets, of which eight supervised rows hold none",
    "warm_start(smoothing)": "decides when a stage with until_loss ends",
    "behavior_cloning(gamma)": "the discount of rows that are recorded; test_refused_early.py",
    "jsonl(eval_path)": "held-out problems; test_language_jsonl.py",
    "gymnasium(step_seconds)": "a limit; test_misbehaving_envs.py",
    "jsonl(score_seconds)": "of verifier=math; test_language_jsonl.py",
    "jsonl(batch_seconds)": "of verifier=math; test_language_scoring.py",
    "jsonl(truncated_reward)": "of sampled answers; test_language_jsonl.py",
    **{
        f"{task}({name})": "of sampled answers; chain_mod shows it"
        for task in ("calculator", "countdown", "guess_number", "jsonl")
        for name in ("truncated", "stop")
    },
    "jsonl(max_reply_length)": "of env.tools; test_tools.py",
    "jsonl(tool_seconds)": "of env.tools; test_tools.py",
    "jsonl(tool_format)": "of env.tools; test_tools.py",
    "jsonl(assistant_only_loss)": "of conversations; test_language_data.py",
    "jsonl(drop_last)": "at an epoch's end; test_language_data.py",
    "jsonl(date)": "of a chat template that prints the day; test_language_jsonl.py",
    "jsonl(max_turn_tokens)": "a budget of sampled answers; chain_mod shows it",
    "jsonl(shuffle_rewards)": RANDOM,
    "jsonl(verifier)": RANDOM,
    "warm_start(run)": "warm_start=from_run is a case",
    "derived.Windows.windows": "of a third collection; test_derived_rows.py",
    "policy_gradient(compile)": "how fast; test_compile.py",
    "actor_critic(compile)": "how fast; test_compile.py",
    "causal_lm(allow_hub)": "a permission",
    "causal_lm(max_new_tokens)": "of policy.sample, which Python users call; in a run the task's budget rules",
    "two_route(threads)": "how fast",
    "mujoco(threads)": "how fast",
    "mjcf(threads)": "how fast",
    "two_route(left_bonus)": "paid at the goal, which the first policies do not reach; test_two_route.py",
    "chain_mod(direct_share)": "of demonstrations of style mixture; its own case below",
    "gymnasium(flatten)": "for observations with images; test_image_observations.py",
    "gymnasium(several_choices)": "for actions of several choices; test_gym_adapter.py",
    "gymnasium(workers)": "how copies are stepped; test_gymnasium_workers.py",
    **{
        f"{policy}(image_features)": "for observations with images; test_image_observations.py"
        for policy in ("gaussian", "flow", "diffusion", "autoregressive")
    },
    **{f"{task}(shuffle_rewards)": RANDOM for task in ("calculator", "countdown", "guess_number")},
    "countdown(partial_credit)": RANDOM,
    "guess_number(turn_cost)": RANDOM,
    **{f"{task}(held_out)": RANDOM for task in ("countdown", "guess_number")},
    **{f"{replay}(count_uses)": "a counter that Python users read" for replay in ("replay", "with_dataset")},
    "fresh(drop)": "for writers that outrun the reader; a run's queue holds all that waits",
}
"""Cases that change how a run is made and not what comes out, with the reason."""

CASES = [
    *correction_cases(),
    *advantage_cases(),
    *term_cases(),
    *valued_cases(),
    *option_cases(),
    *parameter_cases(),
    *settings_cases(),
    *sampler_cases(),
    *context_cases(),
    *curriculum_cases(),
    *beginning_cases(),
    *speaker_cases(),
    *start_cases(),
    *derived_cases(),
    *further_cases(),
]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What overrides name in capitals: a run that teaches, a model, recorded rows, problems."""
    file = tmp_path_factory.mktemp("problems") / "some.jsonl"
    other = file.with_name("other.jsonl")
    robots = [file.with_name(name) for name in ("robot.xml", "weaker.xml")]
    for robot, force in zip(robots, ("-2 2", "-1 1"), strict=True):
        robot.write_text(CART.format(options="", ctrl=f'ctrlrange="{force}"'))
    for path, more in ((file, 1), (other, 2)):
        rows = [
            {"question": f"{i} plus {more}?", "asked": f"{i} and {more}?", "answer": f"#### {i + more}",
             "worked": f"{i} + {more} = {i + more}\n#### {i + more}"}
            for i in range(64)
        ]  # fmt: skip
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "TEACHER": teacher(tmp_path_factory.mktemp("teacher"), LANGUAGE),
        "REWARDER": rewarder(tmp_path_factory.mktemp("rewarder"), LANGUAGE),
        "MODEL": model(tmp_path_factory.mktemp("model"), LANGUAGE),
        "ROWS": recorded(tmp_path_factory.mktemp("rows"), VALUED),
        "ANSWERS": recorded(tmp_path_factory.mktemp("answers"), LANGUAGE),
        "FILE": str(file),
        "OTHER_BOT": str(robots[1]),
        "OTHER": str(other),
        "ROBOT": str(robots[0]),
    }


def reachable(found: str, name: str) -> bool:
    """Whether a case shows, or is refused with a line that names it."""
    words = [w.lower() for w in re.split(r"[.=() ]+", name) if w and w not in ("for", "groups", "values")]
    named = found.startswith("refused") and "\n" not in found and any(word in found.lower() for word in words)
    return found == "effect" or named


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in ASIDE], ids=lambda case: case.name)
def test_what_is_offered_has_an_effect_or_is_refused_by_name(case: Case, folders: dict[str, str]) -> None:
    found = verdict(case, folders)
    if case.name in KNOWN:
        assert not reachable(found, case.name), f"{case.name} is reachable now ({found}): take it out of the list"
    else:
        assert reachable(found, case.name), f"{found}: {' '.join(case.change)} in: {' '.join(case.base)}"


def test_the_lists_of_exceptions_name_cases() -> None:
    names = {case.name for case in CASES}
    assert len(names) == len(CASES), "two cases of one name"
    assert set(KNOWN) | set(ASIDE) <= names and not set(KNOWN) & set(ASIDE)
    assert all({**KNOWN, **ASIDE}.values()), "every exception has its reason"
