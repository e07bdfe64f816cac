"""Nonsense in every setting of every option: one clear error that names it, or a value that is meant, listed here."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from run_cases import CONTROL, LANGUAGE, composed, merged, remembered, run

from unified_rl.config import _check_config, compose, group_options, resolve_defaults
from unified_rl.errors import ConfigError, UnifiedRLError
from unified_rl.training.run import Job

pytestmark = pytest.mark.thorough

LONG = "x" * 5000
VALUES: dict[str, Any] = {
    "-1": -1, "0": 0, "1e30": 1e30, "nan": math.nan, "inf": math.inf, "-inf": -math.inf, "true": True, "abc": "abc",
    "null": None, "[]": [], "{}": {}, "long": LONG, "2**63": 2**63,
}  # fmt: skip
"""What is tried in every setting."""
TOLD_APART_BY_NUMBERS = ("0", "1e30", "inf", "-inf", "2**63")
COMPLETED = {
    ("env", "gymnasium"): ["env.id=Pendulum-v1"],
    ("env", "custom"): ["env._target_=unified_rl.envs.control.GymnasiumEnv", "env.id=Pendulum-v1"],
    ("env", "mjcf"): ["env.path=x", "env.reward=unified_rl.replay.Uniform"],
    ("env", "jsonl"): ["env.path=x"],
    ("policy", "causal_lm_path"): ["policy.path=x"],
    ("warm_start", "from_run"): ["warm_start.run=x"],
    ("rollout", "stored"): ["rollout.data=x"],
    ("recipe", "pear"): ["rollout.sources.recorded.data=x"],
    ("recipe", "occupancy_chi2"): ["agent.reward_model.base=x"],
    **{("recipe", name): ["agent.teacher=x"] for name in ("skd", "dagger", "draft_opd")},
    ("recipe", "mixsd"): ["rollout.speaker.folder=x"],
    ("recipe", "sso"): ["rollout.beginning.text=x", "rollout.beginning.opposite=x"],
    ("recipe", "mopd"): ["agent.anchors.teacher.folders=[x]", "rollout.columns.domain=truncated"],
    ("recipe", "reason_maxxer"): ["rollout.sources.recorded.data=x"],
    ("recipe", "sophia_text"): ["rollout.sources.described.folder=x"],
    ("recipe", "hypo"): ["rollout.sources.recorded.data=x"],
    ("recipe", "dph_rl"): ["rollout.sources.rehearsed.data=x"],
    ("recipe", "infalign"): ["rollout.sources.reference.folder=x"],
}
MEANT: list[tuple[str, str, str]] = [
    # values, why they are meant, and the settings (those that YAML leaves at null stand for what sets them)
    ("-1 0", "a logarithm or a count below which no group falls; sizes of the environment are overwritten by the run",
     "agent.gates.failed.count policy.initial_log_std policy.log_std_high policy.log_std_low policy.action_dim "
     "policy.num_actions policy.observation_dim policy.space agent.budget"),
    ("-1 0 1e30 inf -inf 2**63", "a bound of a log-ratio may be off", "correction.pre.low"),
    ("-1 0 1e30 inf 2**63", "a bound of a log-ratio may be off, and lies above the other", "correction.pre.high"),
    ("-1 0 -inf", "a bound of a covariance may be off", "correction.kernel.cov_low"),
    ("-1 0", "a bound of a log-ratio that lies below the other", "agent.objectives.prefer.low"),
    ("-1 0", "an exponent of either sign", "agent.columns.rank.tilt"),
    ("-1 0 1e30 2**63", "a bound of a log-ratio that lies above the other", "agent.objectives.prefer.high"),
    ("-1 0 1e30 2**63", "a number that may have either sign: a coefficient, a reward, an exponent, an entropy in nats",
     "agent.objectives.calibrate.coefficient agent.objectives.inject.coefficient.value "
     "agent.actor.improve.coefficient agent.objectives.distill.coefficient agent.objectives.entropy.coefficient "
     "agent.objectives.carry.coefficient "
     "agent.objectives.align.coefficient agent.objectives.policy.coefficient correction.kernel.moment "
     "agent.objectives.imitate.beta agent.objectives.imitate.far agent.objectives.imitate.near "
     "agent.objectives.near.coefficient.high "
     "agent.columns.cost.false_alarm agent.columns.cost.hit agent.columns.cost.miss agent.columns.soft.turn "
     "agent.objectives.spread.coefficient agent.objectives.views.coefficient "
     "agent.objectives.near.coefficient.middle agent.entropy_coef agent.objectives.imitate.coefficient.peak "
     "agent.objectives.cover.coefficient agent.objectives.hold.coefficient agent.objectives.imitate.coefficient "
     "agent.objectives.policy.coefficient "
     "agent.objectives.base.coefficient.end agent.objectives.base.coefficient.start "
     "agent.objectives.recent.coefficient.end agent.objectives.recent.coefficient.start "
     "agent.objectives.imitate.coefficient.end agent.objectives.imitate.coefficient.start "
     "agent.objectives.refine.coefficient.end agent.objectives.refine.coefficient.start "
     "agent.objectives.rehearse.coefficient "
     "agent.objectives.imitate.coefficient.valley agent.objectives.policy.coefficient.peak "
     "agent.objectives.policy.coefficient.valley agent.objectives.prefer.anchor.old "
     "agent.objectives.prefer.anchor.reference agent.objectives.prefer.pairs.deviations "
     "agent.target_entropy correction.advantage.shift correction.level.p "
     "correction.wrapper.p_end correction.wrapper.p_start env.left_bonus env.threshold "
     "env.truncated_reward"),
    ("0", "0 turns it off, is the first seed, or is one end of the range",
     "agent.objectives.hold.peaks agent.objectives.imitate.gamma agent.objectives.imitate.portion "
     "agent.columns.brief.at agent.columns.solved.at agent.objectives.views.strength "
     "rollout.sources.reference.min_p rollout.sources.reference.top_k "
     "rollout.sources.reference.per_group rollout.sources.reference.rows "
     "agent.objectives.imitate.weight.gamma correction.kernel.share "
     "rollout.sources.rehearsed.per_group rollout.sources.rehearsed.rows "
     "rollout.sources.recorded.per_group rollout.sources.recorded.rows "
     "rollout.sources.wanted.per_group rollout.sources.wanted.rows "
     "env.workers agent.gamma agent.lam agent.learning_starts agent.objectives.distill.kind.beta "
     "agent.objectives.imitate.coefficient.warmup agent.objectives.policy.coefficient.warmup "
     "agent.objectives.prefer.negatives agent.seed "
     "correction.kernel.fraction correction.kernel.low_negative correction.kernel.low_positive "
     "correction.kernel.normalize correction.kernel.outer_low correction.proximal.decay correction.thin.least "
     "correction.wrapper.alpha correction.wrapper.decay agent.objectives.inject.coefficient.probability "
     "correction.wrapper.p_min correction.wrapper.steps env.data_seed env.direct_share "
     "env.gamma env.held_out env.partial_credit env.seed env.spare_turns env.turn_cost policy.logit_chunk policy.seed "
     "policy.top_k replay.discount replay.sampler.beta replay.sampler.beta_draws replay.sampler.max_lag replay.seed "
     "replay.share correction.advantage.blend correction.advantage.ddof "
     "rollout.beginning.of rollout.beginning.share rollout.curriculum.score.target "
     "rollout.context.below rollout.context.share rollout.context.of "
     "rollout.sources.pairs.answers rollout.sources.points.answers rollout.sources.described.share "
     "rollout.sources.measured.of "
     "rollout.sources.earlier.share rollout.sources.edited.edits rollout.sources.guided.below "
     "rollout.sources.recoveries.share "
     "rollout.curriculum.tracker.fresh rollout.curriculum.tracker.rest "
     "rollout.speaker.decay rollout.speaker.probability rollout.speaker.replay rollout.speaker.share "
     "rollout.speaker.top_k "
     "rollout.random_steps rollout.sources.demonstrations.per_group "
     "rollout.sources.demonstrations.rows rollout.sources.experience.share rollout.sources.experience.start "
     "rollout.staleness warm_start.smoothing engine.num_cpus engine.num_gpus "
     "engine.restarts"),
    ("-1 0 1e30 2**63", "a return above which an answer is right",
     "rollout.sources.pairs.threshold rollout.sources.points.threshold rollout.sources.described.threshold "
     "rollout.context.threshold rollout.sources.assimilated.at_least rollout.sources.kept.at_least "
     "rollout.sources.measured.threshold "
     "rollout.sources.recoveries.threshold rollout.sources.revised.gap rollout.sources.short.threshold "
     "rollout.beginning.threshold rollout.sources.experience.threshold"),
    ("-1 0 1e30 inf -inf 2**63", "all or nothing of an answer may be kept", "rollout.beginning.lenience"),
    ("0 1e30 inf 2**63", "a bound of a ratio or of a mean square; large is none",
     "correction.kernel.budget correction.kernel.low"),
    ("0 1e30 2**63", "a factor: 0 turns it off, and a large one is finite (what becomes infinite ends the run)",
     "agent.actor.policy.beta agent.adam_eps agent.alpha agent.critic_lr agent.kl agent.lr agent.value_coef "
     "agent.columns.reward_distinct.bonus agent.columns.soft.rise agent.objectives.views.gradient "
     "agent.objectives.imitate.entropy_coef agent.objectives.imitate.kl_coef agent.objectives.imitate.td_coef "
     "agent.objectives.distill.target.beta agent.objectives.early.pass_rate.alpha "
     "agent.objectives.early.pass_rate.beta agent.objectives.late.pass_rate.alpha "
     "agent.objectives.late.pass_rate.beta "
     "agent.objectives.prefer.deviation agent.objectives.prefer.nll "
     "agent.reward_model.dependence agent.reward_model.pessimism agent.reward_model.coefficient agent.reward_model.lr "
     "agent.per_record.noise "
     "agent.weight_decay env.reset_noise_scale "
     "correction.advantage.eps correction.kernel.beta correction.kernel.k_negative correction.kernel.k_positive "
     "correction.kernel.lam_negative correction.kernel.lam_positive correction.kernel.power correction.kernel.target "
     "correction.kernel.tau_negative correction.kernel.tau_positive correction.thin.surplus correction.wrapper.end "
     "correction.wrapper.initial correction.wrapper.learning_rate correction.wrapper.margin correction.wrapper.power "
     "correction.wrapper.regression correction.wrapper.start policy.output_gain replay.sampler.alpha "
     "replay.sampler.eps replay.sampler.quotas.demonstration replay.sampler.quotas.online "
     "rollout.curriculum.tracker.lr warm_start.lr"),
    ("1e30 inf 2**63", "a bound that is so large is none; 0 would leave nothing and is refused",
     "agent.objectives.imitate.weight.cap "
     "agent.objectives.cover.tilt agent.objectives.distill.importance_cap correction.kernel.soft "
     "agent.max_grad_norm agent.target_kl agent.value_clip correction.kernel.cap correction.kernel.clip "
     "correction.kernel.clip_high correction.kernel.clip_low correction.kernel.cov_high correction.kernel.dual "
     "correction.kernel.dual_clip correction.kernel.high correction.kernel.high_max correction.kernel.high_negative "
     "correction.kernel.high_positive correction.kernel.importance_cap correction.kernel.low_max "
     "correction.kernel.outer_high policy.clip_prediction"),
    ("1e30 inf 2**63", "a temperature; infinity draws any alike", "rollout.sources.kept.temperature"),
    ("1e30 2**63", "a positive number of any size",
     "agent.per_record.clip "
     "agent.objectives.align.link.beta agent.objectives.contrast.link.beta agent.objectives.equal.beta "
     "agent.objectives.near.coefficient.width agent.objectives.prefer.beta "
     "agent.columns.mark.worst agent.columns.share.temperature "
     "rollout.sources.reference.repetition_penalty rollout.sources.reference.temperature "
     "agent.objectives.prefer.error_rate "
     "agent.objectives.prefer.link.beta agent.updates_per_step correction.horizon correction.kernel.floor "
     "env.batch_seconds env.step_seconds "
     "correction.kernel.gamma correction.kernel.scale correction.kernel.step correction.kernel.temperature "
     "correction.wrapper.bound correction.wrapper.target env.score_seconds env.tool_seconds policy.std_max "
     "policy.repetition_penalty rollout.sources.experience.deviation "
     "rollout.curriculum.score.sigma "
     "rollout.sources.described.temperature "
     "policy.std_min policy.temperature"),
    ("0", "none",
     "agent.anchors.reference.ema agent.ema agent.warmup_ratio agent.warmup_steps policy.min_p "
     "rollout.validation warm_start.ema"),
    ("true", "null decides by itself", "agent.normalize_advantage agent.shuffle_steps env.chat"),
    ("abc long", "a file, a name or a style: looked up when the run is built, before its first step",
     "env.answer_key env.question_key env.stop env.system_prompt env.template "
     "agent.teacher env.eval_path env.prompt_key env.solution_key env.tokenizer policy.adapter "
     "rollout.beginning.text rollout.sources.assimilated.style rollout.sources.edited.style "
     "rollout.sources.guided.style rollout.sources.guided.text "
     "rollout.beginning.opposite "
     "policy.path replay.path replay.trim_key rollout.beginning.style rollout.context.style rollout.data "
     "rollout.sources.reference.adapter "
     "rollout.sources.demonstrations.style rollout.style warm_start.run rollout.speaker.style "
     "rollout.sources.wanted.style"),
    ("abc long true", "a style, or the task's own", "rollout.privileged"),
    ("[]", "a list may be empty",
     "agent.objectives.align.rows.source agent.objectives.align.rows.unless "
     "agent.filters rollout.columns.domain rollout.columns.stratum "
     "rollout.columns.answer rollout.columns.label rollout.columns.greedy rollout.columns.old rollout.columns.begun "
     "rollout.columns.marks "
     "rollout.columns.hinted rollout.columns.principle "
     "agent.objectives.distill.rows.source agent.objectives.distill.rows.when rollout.columns.solved "
     "agent.objectives.policy.rows.when correction.advantage.rows.when "
     "agent.maps agent.objectives.imitate.rows.source agent.objectives.imitate.rows.when "
     "agent.objectives.policy.rows.source agent.objectives.policy.rows.unless correction.anchors correction.mismatch "
     "correction.penalty correction.reject policy.action_high policy.action_low warm_start.stages"),
    ("[] {}", "every row", "agent.objectives.carry.rows "
     "agent.objectives.contrast.rows "
     "agent.objectives.distill.rows agent.objectives.policy.rows agent.objectives.prefer.rows "
     "agent.objectives.imitate.rows agent.objectives.refine.rows agent.objectives.rehearse.rows "
     "correction.advantage.rows"),
    ("{}", "a mapping may be empty",
     "agent.actor agent.anchors agent.critic agent.gates agent.lr_schedule agent.per_record "
     "agent.objectives agent.objectives.policy "
     "agent.columns "
     "agent.optimizer agent.options env.chat_template_kwargs "
     "correction.advantage correction.proximal correction.wrapper env.make_kwargs env.options policy.lora "
     "engine.env_vars replay.sampler.samplers "
     "rollout.columns rollout.sources"),
]  # fmt: skip
"""All nonsense values that composing takes, and why; everything else is refused by name."""


def leaves(node: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every setting of a node that is no mapping and no list, with its value."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from leaves(value, (*path, key))
        elif not key.startswith("_") and not isinstance(value, list):
            yield (*path, key), value


def changed(node: Mapping[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A copy of a group's node with one setting replaced."""
    out = copy.deepcopy(dict(node))
    inner = out
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return out


def settings_of_all_options() -> Iterator[tuple[str, tuple[str, ...], Any, dict[str, Any]]]:
    """Group, path, default and node of every setting that any option of any group has, each once."""
    seen = set()
    for group, options in group_options().items():
        for name in options:
            cfg = resolve_defaults(compose([f"{group}={name}", *COMPLETED.get((group, name), [])]))
            for top, node in cfg.items():
                if top == "choices" or not isinstance(node, Mapping):
                    continue
                for path, default in leaves(node, ()):
                    inner, known = node, [str(node.get("_target_"))]
                    for key in path[:-1]:
                        inner = inner[key]
                        known += [str(inner.get("_target_")), str(inner.get("name"))]
                    mark = (top, path, tuple(known))
                    if mark not in seen:
                        seen.add(mark)
                        yield top, path, default, dict(node)


@cache
def accepted() -> tuple[dict[tuple[str, str], set[str]], list[str], int]:
    """The values that composing takes for each kind of setting, what was refused badly, and how many were tried."""
    taken: dict[tuple[str, str], set[str]] = defaultdict(set)
    bad, count = [], 0
    with remembered():
        options = group_options()
        for top, path, default, node in settings_of_all_options():
            name = ".".join((top, *path))
            for label, value in VALUES.items():
                if isinstance(default, bool | str) and label in TOLD_APART_BY_NUMBERS:
                    continue
                count += 1
                try:
                    _check_config({top: changed(node, path, value)}, options, "train", ())
                    if type(value) is not type(default) or not isinstance(value, bool | str) or default is None:
                        taken[name].add(label)
                except ConfigError as error:
                    if path[-1] not in str(error) or "\n" in str(error) or len(str(error)) > 1500:
                        bad.append(f"{name}={label}: {error}"[:300])
                except Exception as error:
                    bad.append(f"{name}={label}: {type(error).__name__}: {error}"[:300])
    return taken, bad, count


def test_nonsense_is_refused_by_name_or_meant() -> None:
    taken, bad, count = accepted()
    assert not bad, "\n".join(bad[:20])
    assert count > 4000, "all settings of all options"
    found = {name: values - {"null"} for name, values in taken.items() if values - {"null"}}
    meant = {name: set(values.split()) for values, _, names in MEANT for name in names.split()}
    assert found == meant, [(name, found.get(name), meant.get(name)) for name in found.keys() ^ meant.keys()] or [
        (name, found[name] ^ meant[name]) for name in found if found[name] != meant[name]
    ]


RUN = ("steps", "seed", "threads", "eval_every", "eval_episodes", "log_every", "checkpoint_every", "keep_checkpoints",
       "samples_rows", "samples_every")  # fmt: skip


@pytest.mark.parametrize("name", RUN)
def test_settings_of_the_run_are_whole_numbers_of_their_range(name: str) -> None:
    zero = {"steps", "seed", "eval_every", "eval_episodes", "checkpoint_every", "samples_rows", "samples_every"}
    null = {"eval_every", "log_every", "checkpoint_every", "samples_every"}
    with remembered():
        for label, value in VALUES.items():
            if (label == "0" and name in zero) or (label == "null" and name in null):
                compose({name: value})
                continue
            with pytest.raises(ConfigError) as error:
                compose({name: value})
            assert str(error.value).startswith(name), error.value


# -------------------------------------------------------------------------------- what trained without a word once

SAC = ("env=inverted_pendulum", "agent=sac", "policy.hidden=[8]", "agent.critic_hidden=[8]", "agent.batch_size=8",
       "agent.learning_starts=8", "rollout.random_steps=0", "replay.capacity=256", "rollout.horizon=8")  # fmt: skip
PPO = (*CONTROL, "agent=ppo", "agent.minibatch=8", "agent.epochs=1")
REFUSED: list[tuple[tuple[str, ...], str]] = [
    (PPO, "steps=-5"), (PPO, "seed=1e30"), (PPO, "eval_every=-1"), (PPO, "log_every=-1"), (PPO, "checkpoint_every=-1"),
    (PPO, "keep_checkpoints=-3"), (PPO, "rollout.random_steps=-1"), (LANGUAGE, "agent.gamma=-1"),
    (LANGUAGE, "agent.gamma=1.5"), (LANGUAGE, "agent.gamma=1e30"), (PPO, "agent.lam=2"), (PPO, "agent.lam=1.5"),
    (SAC, "agent.tau=2"), (SAC, "agent.tau=-1"), (PPO, "agent.max_grad_norm=-1"), (PPO, "agent.max_grad_norm=0"),
    (PPO, "agent.epochs=0"), (PPO, "agent.target_kl=nan"), (PPO, "agent.target_kl=-1"), (PPO, "agent.value_coef=-1"),
    (SAC, "replay.discount=-1"), (SAC, "replay.discount=inf"), (PPO, "correction.kernel.clip_low=-5"),
    (PPO, "correction.kernel.clip_high=nan"), (PPO, "correction.kernel.clip_high=0"),
    (PPO, "correction.kernel.clip_high=-1e30"), (PPO, "correction.kernel.clip_high=true"),
    (PPO, "correction.kernel.clip_low=abc"), (PPO, "correction.horizon=0"), (PPO, "correction.horizon=-1"),
    (PPO, "correction.horizon=inf"), (PPO, "policy.initial_log_std=1e30"),
    (LANGUAGE, "policy.config.num_hidden_layers=0"), (LANGUAGE, "policy.config.num_hidden_layers=-1"),
    (LANGUAGE, "policy.config.hidden_size=0"), (LANGUAGE, "policy.config.hidden_size=7"),
    (LANGUAGE, "policy.config.hidden_size=true"), (LANGUAGE, "policy.config.hidden_size=1e9"),
    (LANGUAGE, "policy.config.num_attention_heads=3"), (PPO, "rollout.staleness=-1"), (PPO, "rollout.staleness=1e30"),
    (PPO, "rollout.staleness=1e15"),
    # these ended in a traceback, a segmentation fault or the kernel's killing
    (PPO, "agent.lr=nan"), (PPO, "agent.lr=-1"), (PPO, "agent.adam_eps=-1"), (PPO, "agent.weight_decay=-1"),
    (SAC, "agent.alpha=0"), (SAC, "agent.alpha=-1"), (PPO, "rollout.horizon=0"), (PPO, "rollout.horizon=1e13"),
    (PPO, "threads=0"), (PPO, "threads=-1"), (PPO, "threads=1e30"), (PPO, "threads=100000"), (PPO, "eval_episodes=-2"),
    (SAC, "replay.capacity=1e15"), (SAC, "replay.capacity=1e30"), (SAC, "agent.batch_size=1e30"),
    (SAC, "agent.batch_size=1e15"), (PPO, "env.chunk=1e30"), (PPO, "env.threads=1e30"), (PPO, "env.threads=-1"),
    (PPO, "env.threads=100000"), (PPO, "policy.hidden=[-4]"), (PPO, "policy.hidden=[1e9]"),
    (PPO, "agent.critic_hidden=[1e9]"), (PPO, "rollout.num_envs=1e9"), (PPO, "device=meta"), (PPO, "device=mps"),
    (PPO, "device=cuda"), (PPO, "replay.device=cuda"), (PPO, "replay.device=meta"), (PPO, "replay=null"),
    (("env=pendulum", "agent=ppo", *PPO[2:3]), "env.max_episode_steps=0"), (SAC, "agent.batch_size=-1"),
    (SAC, "agent.batch_size=0"), (PPO, "correction=null"), (LANGUAGE, "correction=null"),
    (("env=two_route", "agent=behavior_cloning", "rollout.rows=8"), "replay=null"), (LANGUAGE, "agent.lam=nan"),
    (PPO, "env.chunk=0"), (PPO, "agent.max_grad_norm=nan"),
    (("env=jsonl", "env.path=x", *LANGUAGE[6:]), "env.truncated_reward=1e300"),
]  # fmt: skip
ACCEPTED: list[tuple[tuple[str, ...], str, str]] = [
    (
        PPO,
        "rollout.staleness=1000",
        "updates learn from rows of so many updates ago; few see nothing else",
    ),
    (PPO, "agent.minibatch=1000", "more than there are takes all of them, whatever filters leave"),
    (PPO, "correction.kernel.clip_low=inf", "no lower bound"),
    (PPO, "correction.kernel.clip_low=1e30", "no lower bound"),
    (PPO, "correction.kernel.clip_high=inf", "no upper bound"),
    (PPO, "correction.confidence=nonsense", "free text"),
    (PPO, "correction.source=nonsense", "free text"),
    (PPO, "correction.summary=nonsense", "free text"),
    (PPO, "agent.gamma=0", "the reward of the step alone"),
    (PPO, "agent.lr=0", "nothing moves: every ratio is 1"),
    (PPO, "agent.max_grad_norm=null", "no bound"),
    (PPO, "eval_every=0", "evaluates at the end alone"),
    (LANGUAGE, "agent.entropy_coef=-0.01", "pulls entropy down"),
    (LANGUAGE, "correction.horizon=1e30", "a constant denominator of any size; read by some reductions alone"),
]
"""What trains, and why it is meant."""


def stage(overrides: tuple[str, ...], change: str, folder: Path) -> str:
    """The line with which a run is refused before its first step; empty where it could train."""
    allow = ("run_cases",)
    try:
        with remembered():
            Job(composed(merged(overrides, [change])), allow).make_trainer(folder)
    except UnifiedRLError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("overrides", "change"), REFUSED, ids=lambda v: v if isinstance(v, str) else v[0])
def test_what_trained_or_crashed_once_is_refused_before_a_step(
    overrides: tuple[str, ...], change: str, tmp_path: Path
) -> None:
    found = stage(overrides, change, tmp_path)
    key = change.partition("=")[0]
    assert found and "\n" not in found, change
    assert key.split(".")[-1] in found, found


@pytest.mark.parametrize(("overrides", "change", "why"), ACCEPTED, ids=lambda v: v if isinstance(v, str) else v[0])
def test_what_looks_like_nonsense_and_is_meant_trains(overrides: tuple[str, ...], change: str, why: str) -> None:
    outcome = run(merged(overrides, [change]))
    assert all(bool(w.isfinite().all()) for w in outcome.weights.values()), why
