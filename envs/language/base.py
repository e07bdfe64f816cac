"""What every token task shares: drawing and splitting problems, budgets, answering, the shuffled-reward control."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from unified_rl.envs.language.codec import Codec, Segment
from unified_rl.envs.language.judging import Judge, Truncated
from unified_rl.envs.language.rewards import Rewards
from unified_rl.envs.language.verdict import Verdict, fault_of, within
from unified_rl.errors import ConfigError, RolloutError, UnifiedRLError
from unified_rl.policies.stop_strings import StopStrings
from unified_rl.protocols import TurnResult
from unified_rl.ranges import Count, Float32, HeldOut, Seed, Texts, Whole, ranged

SPLITS = ("train", "eval")
MAX_ROUNDS = 200


@ranged("env")
class LanguageTask:
    """Base of the token tasks; see :class:`unified_rl.protocols.LanguageEnv` for the protocol.

    Training never sees a held-out prompt: a prompt belongs to the held-out set by the hash of its text, whatever the
    seed, so the split is the same in every run. Model text is data: no verifier evaluates it as code.

    Args:
        tokenizer: of prompts and answers.
        max_prompt_length: tokens of the longest prompt, what the tokenizer puts before it not counted.
        max_turn_tokens: budget of sampled tokens in one turn, the stop token included.
        max_turns: turns of a conversation.
        max_reply_length: tokens of the longest reply.
        stop_text: also ends a turn, beside the end-of-text token: every token that ends with it.
        stop: one text or several, of any length, that end a turn too, whatever tokens make them up. They are part of
            the turn that is trained on, with the rest of the token that completes them; what judges or counts an
            answer reads it up to there, and with the stop text where that closes a tag or a bracket (``</answer>``).
            ``\\n`` and ``\\t``, as the command line writes them, are a line end and a tab.
        held_out: share of prompts kept for evaluation.
        truncated_reward: of a turn that ran out of its budget; null lets the task judge what there is of it, as it
            would judge a finished turn.
        truncated: what becomes of such a turn, by name. ``score`` judges what there is of it (as
            ``truncated_reward=null`` does), and reward functions see it with a flag. ``zero`` gives it nothing.
            ``mask`` leaves the whole conversation out of updates, that is out of losses, groups and denominators
            (overlong filtering of DAPO, arXiv 2503.14476); it earns 0. Null goes by ``truncated_reward``, but the
            reward functions of a run (``reward=``) see cut turns, unless that is a number other than 0, which such
            turns then get.
        shuffle_rewards: negative control: rewards of finished training conversations are permuted over the batch, so
            nothing can be learned from them; ``info["correct"]`` and evaluation stay true.
        seed: of the permutation.

    Raises:
        ConfigError: a budget below 1, ``held_out`` outside [0, 1), or a ``truncated_reward`` that contradicts
            ``truncated``.
    """

    domain = "language"
    styles: tuple[str, ...] = ()
    """Demonstration styles, the default first; empty where there is only one."""
    info_names: tuple[str, ...] = ()
    """Names beyond ``correct`` and ``truncated`` in ``TurnResult.info``."""
    compares = True
    """Answers are compared with references by the task's own verifier; not so under reward functions without it."""
    answer_mark = ""
    """What the answer stands behind in a turn, where that is a mark of the task's own."""
    reply_role = "user"
    """Who speaks in its replies, for reward functions that see messages."""
    judge_seconds = 600.0
    """Wall time after which :meth:`_judge` of a task from outside the package is given up, in one call for a batch."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_prompt_length: Count,
        max_turn_tokens: Count,
        max_turns: Count = 1,
        max_reply_length: Whole = 0,
        stop_text: str = "",
        stop: Texts | None = None,
        held_out: HeldOut = 0.1,
        truncated_reward: Float32 | None = 0.0,
        truncated: Truncated | None = None,
        shuffle_rewards: bool = False,
        seed: Seed = 0,
    ) -> None:
        self.codec = Codec(tokenizer)
        self.tokenizer = tokenizer
        self.max_prompt_length = max_prompt_length + len(self.codec.prefix)
        self.max_turn_tokens, self.max_turns = max_turn_tokens, max_turns
        self.max_reply_length = max_reply_length
        self.max_length = self.max_prompt_length + max_turns * max_turn_tokens + (max_turns - 1) * max_reply_length
        self.stop_text, self.stop_ids = stop_text, self.codec.stop_ids(stop_text)
        texts = [stop] if isinstance(stop, str) else stop
        self.stop_strings = None if texts is None else StopStrings(tokenizer, [_unescaped(text) for text in texts])
        self.held_out, self.shuffle_rewards = held_out, shuffle_rewards
        self.truncated, self.truncated_reward = truncated, _of_cut_turns(truncated, truncated_reward)
        self._judge_rewards: Judge | None = None
        self._shuffler = torch.Generator().manual_seed(seed)

    def policy_inputs(self) -> dict[str, Any]:
        """What a language policy's constructor takes."""
        return {"tokenizer": self.tokenizer, "max_length": self.max_length}

    def problems(self, count: int, generator: torch.Generator, split: str = "train") -> list[dict[str, Any]]:
        """Draws ``count`` problems: ``prompt`` (ids), ``prompt_id``, ``text``, ``split`` and the task's own entries.

        Raises:
            ConfigError: an unknown split, one without prompts, or a prompt that does not fit.
        """
        return self._prompted(self._draw(count, generator, split), split)

    def _prompted(self, drawn: list[dict[str, Any]], split: str) -> list[dict[str, Any]]:
        """Problems with what every task adds: token ids, a number and the split."""
        prompts = self.codec.encode([problem["text"] for problem in drawn])
        out = []
        for problem, ids in zip(drawn, prompts, strict=True):
            prompt = self.codec.prefix + ids
            if len(prompt) > self.max_prompt_length:
                raise ConfigError(
                    f"a prompt has {len(prompt)} tokens, more than {self.max_prompt_length}; raise the limit"
                )
            key = problem.get("record", problem["text"]) + "\0" + str(problem.get("key", ""))
            out.append({"prompt": prompt, "prompt_id": _hash(key) >> 1, "split": split, **problem})
        return out

    def respond(self, problems: list[dict[str, Any]], turns: list[list[list[int]]], finished: Tensor) -> TurnResult:
        """Answers the latest turn of each conversation; an unfinished turn is truncated.

        Raises:
            RolloutError: the task's own judgement raised, took too long or is not a :class:`Verdict`; names the row.
        """
        verdicts = self._verdicts(problems, turns, finished.tolist())
        done = torch.tensor([verdict.done for verdict in verdicts], dtype=torch.bool)
        reward = torch.tensor([verdict.reward for verdict in verdicts], dtype=torch.float32)
        last = torch.tensor([len(said) >= self.max_turns for said in turns], dtype=torch.bool)
        truncated = ~finished.cpu() | (last & ~done)
        info = {
            "correct": torch.tensor([float(verdict.correct) for verdict in verdicts]),
            "truncated": truncated.float(),
        }
        for name in self.info_names:
            info[name] = torch.tensor([float((verdict.info or {}).get(name, 0.0)) for verdict in verdicts])
        ending = done | truncated
        if self._judge_rewards is not None:
            said = [verdict.reply if verdict.shown is None else verdict.shown for verdict in verdicts]
            reward, scores = self._judge_rewards(problems, turns, reward, ending, ~finished.cpu(), truncated, said)
            info |= scores
        if self.truncated == "mask":
            info["counted"] = info.get("counted", torch.ones(len(problems))) * (~truncated).float()
        if self.shuffle_rewards:
            reward = self._shuffled(reward, problems, ending, info)
        return TurnResult(self._replies(problems, verdicts, (done | last).tolist(), turns), reward, done, info)

    def reward_with(self, rewards: Rewards) -> None:
        """Gives conversations the reward of these functions, in place of (or beside) the task's own verifier.

        Raises:
            ConfigError: a function takes a column that the task's records do not have.
        """
        judge = Judge(self, rewards)
        judge.check(self._draw(1, torch.Generator().manual_seed(0), "train")[0])
        self._judge_rewards, self.compares = judge, rewards.uses_task

    @property
    def reward_names(self) -> tuple[str, ...]:
        """Names in ``TurnResult.info`` of what each function of :meth:`reward_with` gave."""
        return () if self._judge_rewards is None else self._judge_rewards.names

    @property
    def reward_weights(self) -> tuple[float, ...]:
        """The weight of each function of :attr:`reward_names` in the reward."""
        return () if self._judge_rewards is None else tuple(self._judge_rewards.rewards.weights)

    def _replies(
        self,
        problems: list[dict[str, Any]],
        verdicts: list[Verdict],
        over: list[bool],
        turns: Sequence[Sequence[Sequence[int]]],
    ) -> list[list[int]]:
        """Token ids of what is said next; those of conversations that go on must fit."""
        texts = [v.reply and self._reply_after(v.reply, said[-1]) for v, said in zip(verdicts, turns, strict=True)]
        encoded = iter(self.codec.encode([text for text in texts if text]))
        replies = [next(encoded) if text else [] for text in texts]
        for row, ids in enumerate(replies):
            if len(ids) > self.max_reply_length and not over[row]:
                raise RolloutError(
                    f"{self._place(problems[row], row)} replies {len(ids)} tokens, more than its "
                    f"max_reply_length={self.max_reply_length}"
                )
        return replies

    def _reply_after(self, reply: str, turn: Sequence[int]) -> str:
        """The text that follows a turn, which may not have ended with an end-of-turn token."""
        return reply

    def _verdicts(
        self, problems: list[dict[str, Any]], turns: list[list[list[int]]], finished: list[bool]
    ) -> list[Verdict]:
        """The verdict on the latest turn of each conversation."""
        self._begin_batch()
        out: list[Verdict] = []

        def judge() -> None:
            for problem, said, complete in zip(problems, turns, finished, strict=True):
                out.append(self._verdict(problem, said, complete, len(out)))

        if type(self).__module__.startswith("unified_rl."):
            judge()
        else:
            within(self.judge_seconds, judge, lambda: f"{self._place(problems[len(out)], len(out))} has not returned")
        return out

    def _verdict(self, problem: dict[str, Any], said: list[list[int]], complete: bool, row: int) -> Verdict:
        if not complete and self.truncated_reward is not None:
            return Verdict(self.truncated_reward, done=False)
        try:
            verdict = self._judge(problem, self._turn_text(said[-1]), len(said))
        except UnifiedRLError:
            raise
        except (Exception, SystemExit) as error:
            reason = " ".join(str(error).split())[:300]
            raise RolloutError(f"{self._place(problem, row)} raised {type(error).__name__}: {reason}") from error
        fault = fault_of(verdict, self.info_names)
        if fault:
            raise RolloutError(f"{self._place(problem, row)} returned {fault}; it must return a Verdict")
        reward = float(verdict.reward)
        return verdict._replace(reward=reward) if complete else verdict._replace(reward=reward, done=False, reply="")

    def _place(self, problem: dict[str, Any], row: int) -> str:
        return f"{type(self).__name__}'s judgement of row {row} (prompt {problem.get('text', '')!r:.80})"

    def _begin_batch(self) -> None:
        """Called before the verdicts of a batch."""

    def demonstrations(self, count: int, generator: torch.Generator, style: str | None = None) -> TensorDict:
        """``[count]`` supervised rows of correct conversations on training prompts.

        Args:
            count: rows.
            generator: the stream that problems (and styles) are drawn from.
            style: one of :attr:`styles`; None is the first.

        Returns:
            ``tokens [count, max_length]`` int64, ``token_mask`` and ``mask`` of the same shape, bool; ``mask`` is True
            on what the policy is to say and False on prompts and replies.

        Raises:
            ConfigError: an unknown style, or a task without demonstrations.
        """
        if style is not None and style not in self.styles:
            known = ", ".join(self.styles) or "none to choose from"
            raise ConfigError(f"demonstration style {style!r} is unknown; this task has {known}")
        problems = self._draw_demonstrated(count, generator)
        chosen = self._styles_of(count, style, generator)
        parts = [self._imitated(problem, one) for problem, one in zip(problems, chosen, strict=True)]
        return self.codec.rows(parts, self.max_length)

    def solve(self, problems: Sequence[dict[str, Any]], style: str | None = None) -> list[list[int]]:
        """Token ids of a correct first answer to each problem, the end of text included.

        Raises:
            ConfigError: an unknown style, or a task without solutions, also where there is no problem.
        """
        if type(self)._demonstrate is LanguageTask._demonstrate:
            raise ConfigError(f"{type(self).__name__} has no solutions; use a task that has, such as env=chain_mod")
        if style is not None and style not in self.styles:
            known = ", ".join(self.styles) or "none to choose from"
            raise ConfigError(f"demonstration style {style!r} is unknown; this task has {known}")
        style = style or (self.styles[0] if self.styles else None)
        said = [next(s for s in self._demonstrate(problem, style) if s.trained) for problem in problems]
        ids = self.codec.encode([segment.text for segment in said])
        return [[*own, self.codec.end_id] if s.end else own for own, s in zip(ids, said, strict=True)]

    def hints(self, problems: Sequence[dict[str, Any]], column: str) -> list[list[int]]:
        """Token ids of each problem's hint, the text (or the lines) that its record holds as ``column``.

        Raises:
            ConfigError: a record has no such column, or something else than texts in it.
        """
        return self.codec.encode([self._hint(problem, column) for problem in problems])

    def turn_texts(self, turns: Sequence[Sequence[int]], skip_special_tokens: bool = True) -> list[str]:
        """The texts of turns as everything that judges or counts reads them: each ends before what ended it.

        That is the end-of-turn token (which stays with ``skip_special_tokens=False``), or a text of ``stop``; one that
        closes a tag or a bracket is part of the answer. What comes behind it in its last token is left out too.
        """
        ends = self.codec.end_ids
        ended = [bool(len(turn)) and turn[-1] in ends for turn in turns]
        bare = [t[:-1] if over and skip_special_tokens else t for t, over in zip(turns, ended, strict=True)]
        texts = self.codec.decode_all(bare, skip_special_tokens)
        if self.stop_strings is not None:
            rows = [row for row, over in enumerate(ended) if not over and len(turns[row])]
            unended = self.codec.decode_all([turns[row][:-1] for row in rows], skip_special_tokens)
            for row, without in zip(rows, unended, strict=True):
                texts[row] = self.stop_strings.before(texts[row], without)
        return texts

    def encode_answers(self, answers: Sequence[str]) -> list[list[int]]:
        """Token ids of each answer, the end of text included."""
        return self.encode_completions(answers)

    def encode_completions(self, completions: Sequence[str]) -> list[list[int]]:
        """Token ids of each completion as it stands, the end of text included."""
        return [[*ids, self.codec.end_id] for ids in self.codec.encode(completions)]

    @property
    def columns(self) -> tuple[str, ...]:
        """Names in ``TurnResult.info``."""
        scores = () if self._judge_rewards is None else self._judge_rewards.columns
        counted = ("counted",) if scores or self.truncated == "mask" else ()
        return ("correct", "truncated", *self.info_names, *scores, *counted)

    def is_held_out(self, text: str) -> bool:
        """Whether the prompt ``text`` is kept for evaluation."""
        return _hash(text) < self.held_out * 2.0**64

    def state_dict(self) -> dict[str, Any]:
        """The stream of the shuffled-reward control; everything else is a function of the arguments."""
        return {"shuffler": self._shuffler.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self._shuffler.set_state(state["shuffler"])

    def close(self) -> None:
        """Nothing to close."""

    # What a task defines

    def _candidates(self, count: int, generator: torch.Generator) -> list[dict[str, Any]]:
        """``count`` JSON-able problems of either split with ``text`` and whatever :meth:`_judge` needs.

        An entry ``key`` tells problems of equal text apart.
        """
        raise NotImplementedError

    def _judge(self, problem: dict[str, Any], text: str, turn: int) -> Verdict:
        """The verdict on turn number ``turn`` (from 1), which said ``text``."""
        raise NotImplementedError

    def _demonstrate(self, problem: dict[str, Any], style: str | None) -> list[Segment]:
        """What follows the prompt in a correct conversation."""
        raise ConfigError(f"{type(self).__name__} has no demonstrations; set warm_start=none")

    def _hint(self, problem: dict[str, Any], column: str) -> str:
        """The hint of a problem."""
        found = problem.get("columns", {}).get(column)
        lines = [found] if isinstance(found, str) else found
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            held = "no column" if found is None else "no text in column"
            raise ConfigError(
                f"a problem of {type(self).__name__} has {held} {column!r}, where its hint is looked for; name the "
                "column that holds a text or a list of texts"
            )
        return "\n".join(lines)

    def _imitated(self, problem: dict[str, Any], style: str | None) -> list[Segment]:
        """A whole supervised conversation, the prompt first."""
        return [Segment(problem["text"]), *self._demonstrate(problem, style)]

    def _styles_of(self, count: int, style: str | None, generator: torch.Generator) -> Sequence[str | None]:
        return [style or (self.styles[0] if self.styles else None)] * count

    def _draw(self, count: int, generator: torch.Generator, split: str) -> list[dict[str, Any]]:
        self._check_split(split)
        share = self.held_out if split == "eval" else 1.0 - self.held_out
        kept: list[dict[str, Any]] = []
        for _ in range(MAX_ROUNDS if share > 0 else 0):
            drawn = self._candidates(int((count - len(kept)) / share * 1.1) + 8, generator)
            kept += [problem for problem in drawn if self._belongs(problem) == (split == "eval")]
            if len(kept) >= count:
                return kept[:count]
        raise ConfigError(
            f"found {len(kept)} of {count} {split} problems with env.held_out={self.held_out}; change it, or make the "
            "task larger so that both splits hold prompts"
        )

    def _belongs(self, problem: dict[str, Any]) -> bool:
        """Whether a problem is held out: by its record where it has one, so that no template changes the split."""
        return self.is_held_out(problem.get("record", problem["text"]))

    def _draw_demonstrated(self, count: int, generator: torch.Generator) -> list[dict[str, Any]]:
        return self._draw(count, generator, "train")

    @staticmethod
    def _check_split(split: str) -> None:
        if split not in SPLITS:
            raise ConfigError(f"split {split!r} is neither of {', '.join(SPLITS)}")

    def _turn_text(self, ids: Sequence[int]) -> str:
        text = self.turn_texts([ids])[0].strip()
        return text.removesuffix(self.stop_text) if self.stop_text else text

    def _shuffled(
        self, reward: Tensor, problems: Sequence[dict[str, Any]], ending: Tensor, info: dict[str, Tensor]
    ) -> Tensor:
        """The same rewards, permuted over the training conversations that end with this turn and count.

        The values of several reward functions move along, in ``info``.
        """
        train = torch.tensor([problem["split"] == "train" for problem in problems], dtype=torch.bool)
        counted = info["counted"] > 0 if "counted" in info else torch.ones_like(train)
        rows = (train & ending & counted).nonzero().squeeze(-1)
        moved = rows[torch.randperm(len(rows), generator=self._shuffler)]
        for name in self.reward_names:
            info[name] = info[name].clone()
            info[name][rows] = info[name][moved]
        out = reward.clone()
        out[rows] = reward[moved]
        return out


def _unescaped(text: str) -> str:
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _of_cut_turns(truncated: Truncated | None, reward: float | None) -> float | None:
    """The task's own reward of a turn that ran out of its budget; None where the turn is judged.

    Raises:
        ConfigError: the two settings contradict each other.
    """
    if truncated is None:
        return reward
    if reward != 0.0 and (reward is not None or truncated != "score"):
        worth = "null" if reward is None else f"{reward:g}"
        raise ConfigError(
            f"env.truncated={truncated} and env.truncated_reward={worth} contradict each other; leave one of them out "
            "(truncated_reward alone gives cut answers a reward of your own)"
        )
    return None if truncated == "score" else 0.0


def _hash(text: str) -> int:
    """An unsigned 64-bit hash of ``text``, the same on every machine and in every process."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
