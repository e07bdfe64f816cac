"""A teacher that has a say in what is sampled: token by token, or turn by turn and step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from unified_rl.agents.teacher import load_teacher
from unified_rl.configurable import configurable
from unified_rl.errors import ConfigError
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.policies.choosers import FOREIGN, Chooser, Drawn, OutsideTopK, Verified
from unified_rl.policies.generation import Beside, Generation
from unified_rl.protocols import (
    ControlEnv,
    Generates,
    HasSampler,
    LanguageEnv,
    LanguagePolicy,
    Samples,
    Trainable,
    require_solutions,
)
from unified_rl.ranges import UnitInterval, Whole, ranged
from unified_rl.rollout.rows import REWARDS
from unified_rl.rollout.sources.base import require_one_turn
from unified_rl.rollout.speakers import ACTED, Acts, Spoken
from unified_rl.units import MARKS


class _Two:
    """Speaks with one model while another has a say in every token."""

    def __init__(self, model: CausalLM, chooser: Chooser, other: CausalLM, shown: dict[Any, list[int]] | None = None):
        self.model, self.shown, self.end_ids = model, shown, model.end_ids
        self.beside = Beside(other.model, chooser, other.sampling)

    def generate(self, prompts: Sequence[Tensor], *, max_new_tokens: int, **options: Any) -> Generation:
        """As of the model."""
        beside = self.beside
        if self.shown is not None:
            asked = _lists(prompts)
            beside = replace(beside, prompts=[[*ids, *self.shown[tuple(ids)]] for ids in asked])
        return self.model.generate(prompts, max_new_tokens=max_new_tokens, beside=beside, **options)


class _Taught:
    """Loads the teacher.

    Args:
        folder: of a run, or of a language model.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.teacher: Any = None

    def check(self, env: LanguageEnv, policy: LanguagePolicy, setting: str) -> None:
        """Loads the teacher of a language model.

        Raises:
            ConfigError: it does not fit, or an engine samples that only this library's own loop could share.
        """
        if not isinstance(policy, CausalLM):
            raise ConfigError(f"{setting} chooses tokens, and {type(policy).__name__} shows none: use policy=causal_lm")
        if isinstance(policy, HasSampler) and policy.sampler is not None:
            raise ConfigError(
                f"{setting} chooses every token beside the policy, and policy.engine or engine_dtype samples "
                "elsewhere: set policy.engine=own and policy.engine_dtype=null"
            )
        self._load(policy, setting)

    def _load(self, policy: Trainable, setting: str) -> None:
        self.teacher = load_teacher(self.folder, policy, f"{setting}.folder")


@configurable
@ranged()
class Interleaved(_Taught):
    """The policy proposes tokens; those outside the teacher's ``top_k`` are drawn by the teacher. SKD, 2410.11325.

    Args:
        folder: of the teacher, a run or a language model.
        top_k: all tokens of the vocabulary leave the policy alone, 0 leaves the teacher alone.
    """

    def __init__(self, folder: str, top_k: Whole = 25) -> None:
        super().__init__(folder)
        self.top_k = top_k

    def speaks(self, policy: Generates, spoken: Spoken) -> Generates:
        """Both."""
        assert isinstance(policy, CausalLM)  # seen to in check
        return _Two(policy, OutsideTopK(self.top_k, _on(policy, spoken.generator)), self.teacher)


@configurable
@ranged()
class Draft(_Taught):
    """The policy drafts; the teacher accepts or replaces every token, so the rows are distributed as the teacher's.

    Where the policy was corrected it drafts once more, in a row of its own: up to ``replay`` tokens from one such
    place of every conversation, drawn. These rows have no reward. Draft-OPD, 2605.29343.

    Args:
        folder: of the teacher.
        replay: tokens that are drafted again; 0 drafts none.
    """

    def __init__(self, folder: str, replay: Whole = 8) -> None:
        super().__init__(folder)
        self.replay = replay

    def speaks(self, policy: Generates, spoken: Spoken) -> Generates:
        """Both."""
        assert isinstance(policy, CausalLM)
        return _Two(policy, Verified(_on(policy, spoken.generator)), self.teacher)

    def most(self, rows: int) -> int:
        """One of every conversation."""
        return rows if self.replay else 0

    def more(self, rows: TensorDict, corrected: Tensor, policy: Generates, spoken: Spoken) -> TensorDict | None:
        """What the policy drafts where it was corrected."""
        at = corrected.any(-1).nonzero()[:, 0]
        if not len(at) or not self.replay:
            return None
        places = torch.multinomial(corrected[at].float(), 1, generator=spoken.generator)[:, 0]
        prefixes = [rows["tokens"][row, :n] for row, n in zip(at.tolist(), places.tolist(), strict=True)]
        room = min(self.replay, spoken.env.max_turn_tokens)
        stops = sorted({*spoken.env.stop_ids, *getattr(policy, "end_ids", ())})
        said = policy.generate(prefixes, max_new_tokens=room, generator=spoken.generator, stop_ids=stops)
        return _drafted(rows[at], places, said, spoken.env.tokenizer.pad_token_id, spoken.version)


@configurable
@ranged()
class TwoContexts(_Taught):
    """A frozen model writes the answers, and sees the solution in its prompt at some tokens. MixSD, 2605.16865.

    Args:
        folder: of the model, usually the one that the run begins with.
        share: probability of a token from the bare prompt; 0 always sees the solution.
        style: of the solution.
    """

    whole_prompts = True
    """It knows the prompts of a collection, and nothing that answers begin with."""

    def __init__(self, folder: str, share: UnitInterval = 0.4, style: str | None = None) -> None:
        super().__init__(folder)
        self.share, self.style = share, style

    def check(self, env: LanguageEnv, policy: LanguagePolicy, setting: str) -> None:
        """Also refuses a task without solutions, or of several turns."""
        self.solver = require_solutions(env, setting, self.style)
        require_one_turn(env, setting)
        super().check(env, policy, setting)

    def speaks(self, policy: Generates, spoken: Spoken) -> Generates:
        """The frozen model, twice."""
        solutions = self.solver.solve(spoken.problems, self.style)
        prompts = [tuple(problem["prompt"]) for problem in spoken.problems]
        shown = dict(zip(prompts, solutions, strict=True))
        return _Two(self.teacher, Drawn(self.share, _on(self.teacher, spoken.generator)), self.teacher, shown)


@configurable
@ranged()
class Alternating(_Taught):
    """In every turn of a conversation, and step of a simulation, the teacher acts with some probability. DAgger.

    The probability is ``probability * decay^n`` after ``n`` updates. A reduction of imitation learning and structured
    prediction to no-regret online learning, 1011.0686; of agents of several turns, 2605.12913.

    Args:
        folder: of the teacher.
        probability: at first; 1 is the teacher alone, 0 the policy alone.
        decay: of it from update to update.
    """

    def __init__(self, folder: str, probability: UnitInterval = 1.0, decay: UnitInterval = 0.9) -> None:
        super().__init__(folder)
        self.probability, self.decay = probability, decay

    def check(self, env: LanguageEnv, policy: LanguagePolicy, setting: str) -> None:
        """Loads the teacher; any engine may sample the policy's turns."""
        if not isinstance(policy, CausalLM):
            raise ConfigError(f"{setting} says tokens, and {type(policy).__name__} has none: use policy=causal_lm")
        self._load(policy, setting)

    def check_control(self, env: ControlEnv, policy: Samples, setting: str) -> None:
        """Loads the teacher, and asks for the same kind of policy.

        Raises:
            ConfigError: it stores other things of an action than the policy.
        """
        self._load(cast(Trainable, policy), setting)
        keys = [getattr(one, "rescoring_keys", ()) for one in (policy, self.teacher)]
        if keys[0] != keys[1]:
            raise ConfigError(
                f"{setting}.folder={self.folder} holds a {type(self.teacher).__name__}, whose actions a "
                f"{type(policy).__name__} cannot score: use a teacher of the same class"
            )

    def chance(self, version: int) -> float:
        """That the teacher acts, after so many updates."""
        return self.probability * self.decay**version

    def speaks(self, policy: Generates, spoken: Spoken) -> Generates:
        """Both in turns."""
        chance = self.chance(spoken.version)
        return policy if chance == 0.0 else _InTurns(policy, self.teacher, chance, spoken.generator)

    def acts(self, policy: Samples, version: int, generator: torch.Generator) -> Acts | None:
        """Both in turns."""
        chance = self.chance(version)
        if chance == 0.0:
            return None

        def sample(observation: Tensor, noise: torch.Generator) -> TensorDictBase:
            mine = policy.sample(observation, noise)
            stream = _on(self.teacher, generator)
            other = self.teacher.sample(observation.to(self.teacher.device), stream).to(observation.device)
            taught = (torch.rand(len(observation), generator=generator) < chance).to(observation.device)
            for key in ("action", "behavior_log_prob", *self.teacher.rescoring_keys):
                wide = taught.reshape(-1, *(1 for _ in mine[key].shape[1:]))
                mine[key] = torch.where(wide, other[key], mine[key])
            mine[ACTED] = taught
            return mine

        return sample


class _InTurns:
    """Speaks as the policy, or with some probability as the teacher."""

    def __init__(self, policy: Generates, teacher: CausalLM, chance: float, generator: torch.Generator) -> None:
        self.policy, self.teacher, self.chance, self.generator = policy, teacher, chance, generator
        self.end_ids = tuple(sorted({*getattr(policy, "end_ids", ()), *teacher.end_ids}))

    def generate(
        self, prompts: Sequence[Tensor], *, max_new_tokens: int, samples_per_prompt: int = 1, **options: Any
    ) -> Generation:
        """As of both; rows are those of one model each."""
        taught = torch.rand(len(prompts) * samples_per_prompt, generator=self.generator) < self.chance
        asked = [prompts[row // samples_per_prompt] for row in range(len(taught))]
        parts, order = [], []
        for own in (True, False):
            at = (taught != own).nonzero()[:, 0]
            if not len(at):
                continue
            who: Generates = self.policy if own else self.teacher
            given = options if own else {**options, "generator": _on(self.teacher, self.generator)}
            said = who.generate([asked[row] for row in at.tolist()], max_new_tokens=max_new_tokens, **given)
            parts.append(_marked(said, None if own else FOREIGN))
            order.append(at)
        where = torch.cat(order).argsort()
        names = ("tokens", "log_prob", "length", "finished", "version")
        return Generation(*(torch.cat([getattr(part, name).cpu() for part in parts])[where] for name in names))


def _marked(said: Generation, mark: int | None) -> Generation:
    version = said.version if said.version is not None else torch.full_like(said.tokens, -1)
    return replace(said, version=version if mark is None else torch.full_like(said.tokens, mark))


def _on(model: Any, generator: torch.Generator) -> torch.Generator:
    """A stream on a model's device, which one on the CPU seeds."""
    if model.device.type == generator.device.type:
        return generator
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.Generator(model.device).manual_seed(seed)


def _lists(prompts: Sequence[Tensor]) -> list[list[int]]:
    return [torch.as_tensor(prompt).tolist() for prompt in prompts]


def _ended(tokens: Tensor, places: Tensor, said: Tensor, length: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """``tokens [n, N]`` that end with the first ``length [n]`` of ``said [n, m]`` at ``places [n]``, and where."""
    offset = torch.arange(tokens.shape[1]) - places[:, None]
    new = (offset >= 0) & (offset < length[:, None])
    found = torch.where(new, said.gather(1, offset.clamp(0, said.shape[1] - 1)), tokens)
    return found.masked_fill(offset >= length[:, None], pad_id), new


def _drafted(rows: TensorDict, places: Tensor, said: Generation, pad_id: int, version: int) -> TensorDict:
    """Copies of rows that end with what was said at column ``places [n]``, the only units that are masked in."""
    out, width = rows.clone(), rows["tokens"].shape[1]
    columns = torch.arange(width)
    offset = columns - places[:, None]
    length = torch.minimum(said.length.cpu(), width - places)
    tokens, log_prob = said.tokens.cpu(), said.log_prob.cpu()
    out["tokens"], drafted = _ended(rows["tokens"], places, tokens, length, pad_id)
    out["mask"], out["token_mask"] = drafted, columns < (places + length)[:, None]
    out["behavior_log_prob"] = torch.zeros_like(rows["behavior_log_prob"])
    out["behavior_log_prob"][drafted] = log_prob[torch.arange(log_prob.shape[1]) < length[:, None]]
    if "privileged_mask" in rows.keys():  # the same units, behind the solution
        shift = rows["privileged_mask"].int().argmax(-1) - rows["mask"].int().argmax(-1)
        seen = _ended(rows["privileged_tokens"], places + shift, tokens, length, pad_id)
        out["privileged_tokens"], out["privileged_mask"] = seen
    for key in (REWARDS, MARKS):  # nobody judged a draft
        if key in rows.keys():
            out[key] = torch.zeros_like(rows[key])
    out["policy_version"] = torch.where(drafted, version, rows["policy_version"])
    last = rows["step_index"].gather(1, places[:, None])
    out["step_index"] = torch.where(offset >= 0, last, rows["step_index"])
    step = torch.arange(rows["reward"].shape[1])
    out["step_mask"] = step <= last
    out["reward"] = torch.zeros_like(rows["reward"])
    out["terminated"] = torch.zeros_like(rows["terminated"])
    out["truncated"] = step == last
    return out
