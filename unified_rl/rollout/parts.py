"""The parts of a language rollout: each one's own check, and which of them do not go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from unified_rl.errors import ConfigError
from unified_rl.protocols import LanguageEnv, LanguagePolicy
from unified_rl.rollout.beginnings import Beginning
from unified_rl.rollout.context import Context
from unified_rl.rollout.curriculum import EXPECTED, Curriculum
from unified_rl.rollout.rows import REWARDS
from unified_rl.rollout.sources.base import ChecksGroup, ChecksSources, RowSource
from unified_rl.rollout.speakers import Speaker


class Parts(NamedTuple):
    """What a rollout is made of beside environment and policy; see there.

    Attributes:
        context: None where there is none, as of the others.
        beginning: likewise.
        curriculum: likewise.
        speaker: likewise.
        sources: by name.
    """

    context: Context | None
    beginning: Beginning | None
    curriculum: Curriculum | None
    speaker: Speaker | None
    sources: Mapping[str, RowSource]

    def check(
        self, env: LanguageEnv, policy: LanguagePolicy, group_size: int, columns: Mapping[str, str | list[str]]
    ) -> None:
        """Refuses what cannot serve, before the first step.

        Args:
            env: the task.
            policy: the policy that is trained.
            group_size: samples of each problem.
            columns: further entries of the record, reward functions among them.

        Raises:
            ConfigError: names the setting, and what works.
        """
        if self.context is not None:
            setting = "rollout.context"
            _require(self.context, setting, "unified_rl.rollout.context.Hints")
            self.context.check(env, setting)
            _refuse_one_reward(self.context, columns, setting)
            if isinstance(self.context, ChecksGroup):
                self.context.check_group(group_size, setting)
        if self.beginning is not None:
            _require(self.beginning, "rollout.beginning", "unified_rl.rollout.beginnings.Guided")
            self.beginning.check(env, policy, "rollout.beginning")
            if self.context is not None:
                raise ConfigError(
                    "rollout.beginning and rollout.context both decide what answers begin with; set one of them to null"
                )
        if self.curriculum is not None:
            _require(self.curriculum, "rollout.curriculum", "unified_rl.rollout.curriculum.Curriculum", "choose")
            if EXPECTED in columns:
                raise ConfigError(f"rollout.columns.{EXPECTED} is a column of rollout.curriculum; choose another name")
        if self.speaker is not None:
            self._check_speaker(self.speaker, env, policy)
        for name, source in self.sources.items():
            setting = f"rollout.sources.{name}"
            _require(source, setting, "unified_rl.rollout.sources.Demonstrations")
            source.check(env, policy, setting)
            if isinstance(source, ChecksGroup):
                source.check_group(group_size, setting)
            _refuse_one_reward(source, columns, setting)
        if isinstance(self.context, ChecksSources):
            self.context.check_sources(self.sources)

    def _check_speaker(self, speaker: Speaker, env: LanguageEnv, policy: LanguagePolicy) -> None:
        setting = "rollout.speaker"
        _require(speaker, setting, "unified_rl.agents.speakers.Interleaved", "speaks")
        if self.curriculum is not None:
            raise ConfigError(
                "rollout.curriculum learns how often the policy solves a prompt by itself, and rollout.speaker speaks "
                "in its place; set one of them to null"
            )
        begun = "beginning" if self.beginning is not None else "context" if self.context is not None else None
        if begun is not None and getattr(speaker, "whole_prompts", False):
            raise ConfigError(
                f"{setting} knows the solutions of whole prompts of a collection alone, and rollout.{begun} decides "
                f"what answers begin with, or draws others; set rollout.{begun}=null"
            )
        speaker.check(env, policy, setting)


def _refuse_one_reward(part: RowSource | Context, columns: Mapping[str, str | list[str]], setting: str) -> None:
    """Raises ConfigError where a part brings one reward, and rows hold several numbers of the environment's."""
    apart = [(n, w) for n, w in columns.items() if isinstance(w, list) and (n != REWARDS or len(w) > 1)]
    if not apart:
        return
    name, several = apart[0][0], ", ".join(apart[0][1])
    if getattr(part, "judges_itself", False):
        raise ConfigError(
            f"{setting} rewards its rows itself, by one number, which cannot stand for what rows hold as "
            f"{name} ({several}): leave one of them out"
        )
    key = getattr(part, "reward_key", None)
    if key is not None:
        raise ConfigError(
            f"{setting}.reward_key={key} is one number, which cannot stand for what rows hold as {name} "
            f"({several}); leave it out, so that the environment judges these rows too, or "
            + ("name one reward function" if name == REWARDS else f"leave out rollout.columns.{name}")
        )


def _require(part: object, setting: str, example: str, method: str = "check") -> None:
    """Raises ConfigError for plain settings where an object is wanted."""
    if not hasattr(part, method):
        raise ConfigError(f"{setting} is {part!r}; it must be a mapping with _target_, such as {{_target_: {example}}}")
