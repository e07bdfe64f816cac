"""What a critic's advantage is given to: units, steps, finished answers, or the three levels of subgoals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict

from unified_rl.agents.baselines import (
    Baseline,
    TokenBaseline,
    critic_advantage,
    cut_advantage,
    standardise,
    step_advantage,
    token_scan,
)
from unified_rl.errors import ConfigError
from unified_rl.returns import Segments
from unified_rl.returns.subgoals import Markers, Pieces, subgoal_gae


def hierarchical_advantage(
    record: TensorDict,
    baseline: Baseline,
    lam: float,
    off_policy: bool,
    normalize: bool,
    *,
    switch: str | None = None,
    keep: str | None = None,
    act: str | None = None,
) -> None:
    """Advantages of three levels, each for tokens of its own, by a critic of three heads. HiPER, 2602.16165.

    An answer is in pieces: one begins with every turn, and with every marker that leaves the subgoal or keeps it. What
    is decided gets the advantage of a termination value, the wording of a new subgoal that of the high level, and all
    else that of the low level; see :func:`~unified_rl.returns.subgoals.subgoal_gae`. A level is standardised over the
    pieces that have tokens of it. ``value``, ``value_target`` and ``value_mask`` are ``[B, N, 3]``.

    Args:
        record, baseline, lam, normalize: as of :func:`critic_advantage`.
        off_policy: refused by :func:`check_hierarchy`.
        switch: text of the marker with which a new subgoal begins.
        keep: of the one with which the subgoal stays.
        act: of the one that ends a subgoal's wording.
    """
    assert isinstance(baseline, TokenBaseline) and not off_policy
    pieces = Pieces.of(record, markers_of(baseline.tokenizer, switch, keep, act))
    value = baseline.shard.divided(record, baseline.module.values)
    read, owning = pieces.heads(record)
    scan = token_scan(record, value[..., 0])
    units = Segments.of(**scan, segment=pieces.piece, number=pieces.number)
    advantage, target = subgoal_gae(pieces, value, read, units, lam)
    if normalize:
        levels = zip(advantage.unbind(-1), owning.unbind(-1), strict=True)
        advantage = torch.stack([standardise(x, own) for x, own in levels], -1)
    record["advantage"] = pieces.spread(advantage)
    record["value"], record["value_mask"] = value, read
    record["value_target"] = target.gather(1, pieces.piece.unsqueeze(-1).expand_as(value))


hierarchical_advantage.heads = 3  # type: ignore[attr-defined]


def markers_of(tokenizer: Any, switch: str | None, keep: str | None, act: str | None) -> Markers:
    """The markers' tokens.

    Raises:
        ConfigError: no marker, two alike, or a text that the tokenizer cannot write.
    """
    texts = {"switch": switch, "keep": keep, "act": act}
    given = {name: text for name, text in texts.items() if text is not None}
    if not given:
        raise ConfigError(
            "agent.credit hierarchical without a marker has no subgoals: set agent.credit.switch to the text with "
            "which a new one begins, or agent.credit=step"
        )
    ids: dict[str, list[int]] = {}
    for name, text in given.items():
        ids[name] = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if not ids[name] or tokenizer.unk_token_id in ids[name]:
            raise ConfigError(f"agent.credit.{name}={text!r} cannot be written with the task's tokenizer; change it")
        for other in ids:
            if other != name and ids[other] == ids[name]:
                raise ConfigError(
                    f"agent.credit.{other} and agent.credit.{name} are the same marker {text!r}; change one"
                )
    return Markers(**ids)


def check_hierarchy(credit: Callable[..., None], baseline: Baseline, off_policy: bool) -> None:
    """Refuses what a credit of several heads cannot use.

    Raises:
        ConfigError: V-trace, or markers that do not fit the tokenizer.
    """
    rule, settings = getattr(credit, "func", credit), getattr(credit, "keywords", {})
    if rule is not hierarchical_advantage:
        return
    if off_policy:
        raise ConfigError(
            "agent.credit hierarchical is GAE at two levels, and agent.off_policy_targets takes V-trace: set it to "
            "false"
        )
    assert isinstance(baseline, TokenBaseline)
    markers_of(baseline.tokenizer, **{"switch": None, "keep": None, "act": None, **settings})


CREDITS: dict[str, Callable[..., None]] = {
    "unit": critic_advantage,
    "step": step_advantage,
    "cut": cut_advantage,
    "hierarchical": hierarchical_advantage,
}
"""What a critic's advantage is given to: every unit, a whole step, every unit with cut answers set apart, or the tokens
of three levels."""
