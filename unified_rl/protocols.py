"""The contracts between rooms: what an environment, a policy, an agent and a rollout offer to each other.

Each is a ``Protocol`` that a class satisfies by having its methods; nobody needs to inherit from it. Those of policies
are abilities, asked for one by one: ``isinstance(policy, HasEntropy)``. Which domain a policy or an environment
belongs to is its attribute ``domain``, never guessed from what it can do.

Shapes: ``B`` rows, ``T`` steps, ``N`` units in a row, ``U`` units in an action, ``d`` and ``a`` widths of observation
and action, ``V`` choices of a unit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, TypeGuard, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from unified_rl.errors import ConfigError
from unified_rl.spaces import Space
from unified_rl.units import UnitLogProb

Domain: TypeAlias = Literal["control", "language"]
"""``control``: rows of steps with ``observation`` and ``action``. ``language``: rows of tokens."""
DOMAINS: tuple[Domain, ...] = ("control", "language")
Reader: TypeAlias = Callable[..., tuple[Tensor, ...]]
"""``(logits [n, V], chosen [n], *extras [n, ...]) -> tensors [n, ...]``; it sees some units at a time."""


def domain_of(part: Any) -> Domain:
    """The ``domain`` of a policy, environment or rollout.

    Raises:
        ConfigError: it has none, or one that is not known.
    """
    domain = getattr(part, "domain", None)
    for known in DOMAINS:
        if domain == known:
            return known
    raise ConfigError(f"{type(part).__name__}.domain is {domain!r}; set it to 'control' or 'language'")


def is_language(policy: object) -> TypeGuard[LanguagePolicy]:
    """Whether a policy's domain is language, as a narrowing of its type.

    Raises:
        ConfigError: the policy has no domain.
    """
    return domain_of(policy) == "language"


def is_discrete(policy: object) -> bool:
    """Whether the log-probs of a policy's units are those of choices, at most 0, rather than densities.

    Raises:
        ConfigError: the policy has no domain.
    """
    return is_language(policy) or (isinstance(policy, MayChoose) and policy.supports_discrete)


def standardises(policy: object) -> bool:
    """Whether a policy was told to standardise observations by running moments: it has a module ``normalizer``."""
    return getattr(policy, "normalizer", None) is not None  # no protocol: those do not see a module's submodules


def averages_dims(policy: object) -> bool:
    """Whether log-probs of a policy's Normals are means over their dimensions, not sums."""
    return isinstance(policy, MayAverage) and policy.mean_over_dims


def layout_of(record: TensorDictBase) -> Domain:
    """Which domain's columns a record has: ``tokens [B, N]``, or ``observation [B, (T,) d]``."""
    return "language" if "tokens" in record.keys() else "control"


# ----------------------------------------------------------------------------------------------------- environments


class StepResult(NamedTuple):
    """One step of ``K`` simulations. The environment does not write to these tensors again.

    Attributes:
        observation: ``[K, d]`` float32, what the policy sees next; of the new episode where one ended (auto-reset).
        reward: ``[K]`` float32 (for a chunk of actions: the discounted sum of its rewards).
        terminated: ``[K]`` bool, the episode reached a terminal state.
        truncated: ``[K]`` bool, the episode was cut by a time limit.
        next_observation: ``[K, d]`` float32, the true successor, also where the episode ended.
        executed: ``[K]`` int64, inner control steps executed (1, or at most h for a chunk of h).
        info: named ``[K]`` tensors, for example ``success``; read where an episode ended, NaN where it has none.
        undiscounted: ``[K]`` float32, for a chunk of actions the plain sum of its rewards; None where that is
            ``reward``. Returns that a run reports are sums of it.
    """

    observation: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    next_observation: Tensor
    executed: Tensor
    info: dict[str, Tensor]
    undiscounted: Tensor | None = None

    @property
    def plain_reward(self) -> Tensor:
        """Rewards of the executed environment steps without a discount between them, ``[K]`` float32."""
        return self.reward if self.undiscounted is None else self.undiscounted


@runtime_checkable
class ControlEnv(Protocol):
    """K simulations stepped together."""

    domain: str
    num_envs: int
    max_steps: int

    def policy_inputs(self) -> dict[str, Any]:
        """What a policy's constructor takes: ``space``, or the arguments of :meth:`unified_rl.spaces.Space.flat`."""
        ...

    def reset_batch(self, seed: int | None = None) -> Tensor:
        """Resets every simulation; ``[K, d]`` float32."""
        ...

    def step_batch(self, action: Tensor) -> StepResult:
        """Steps every simulation with ``action [K, a]`` and resets those that ended."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-exact continuation needs."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`; recomputes nothing."""
        ...


class TurnResult(NamedTuple):
    """The environment's answer to one turn of each of ``B`` conversations.

    Attributes:
        reply: one list of token ids a conversation: what the environment appends (tool output); empty where done.
        reward: ``[B]`` float32, this turn's reward.
        done: ``[B]`` bool, the conversation is over (terminated).
        info: named ``[B]`` float tensors, for example ``correct``.
    """

    reply: list[list[int]]
    reward: Tensor
    done: Tensor
    info: dict[str, Tensor]


@runtime_checkable
class LanguageEnv(Protocol):
    """A token task: prompts, turns, verifiers. Answers of a model are data and are never evaluated as code.

    A conversation is identified by a plain-Python ``state`` that the environment made (JSON-able, so that pending
    conversations can be checkpointed).
    """

    domain: str
    tokenizer: Any
    max_prompt_length: int
    max_turn_tokens: int
    """Budget of sampled tokens in one turn."""
    max_turns: int
    max_length: int
    """Width of a record: prompt, all turns and all replies always fit."""
    stop_ids: list[int]
    """Token ids that end a turn (the end-of-text id among them)."""

    def policy_inputs(self) -> dict[str, Any]:
        """``tokenizer`` and ``max_length``."""
        ...

    def problems(self, count: int, generator: torch.Generator, split: str = "train") -> list[dict[str, Any]]:
        """Draws ``count`` problems. Each is a JSON-able dict with at least ``prompt`` (token ids) and ``prompt_id``.

        ``split="eval"`` draws from the held-out set, which training never sees, the same for the same generator state.
        """
        ...

    def respond(self, problems: list[dict[str, Any]], turns: list[list[list[int]]], finished: Tensor) -> TurnResult:
        """Answers the latest turn of each conversation.

        Args:
            problems: ``B`` problems from :meth:`problems` (the environment may not change them).
            turns: for each conversation the sampled token ids of every turn so far (stop token included); the last
                one is to be answered.
            finished: ``[B]`` bool, False where the last turn ran out of its budget without a stop token; such a turn
                is truncated, which the caller records.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-exact continuation needs."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`; recomputes nothing."""
        ...


# What an environment may offer beside; whoever needs one of these asks for it by name.


@runtime_checkable
class Demonstrates(Protocol):
    """An environment with an expert of its own, in either domain."""

    def demonstrations(self, count: int, generator: torch.Generator, /) -> TensorDict:
        """``[count]`` supervised rows.

        Control: ``observation``, ``action``. Language: ``tokens``, ``token_mask``, ``mask`` as in the record, mask on
        target tokens; a language task also takes ``style``.
        """
        ...


@runtime_checkable
class Solves(Protocol):
    """A token task that knows correct answers."""

    def solve(self, problems: Sequence[dict[str, Any]], style: str | None = None) -> list[list[int]]:
        """Token ids of a correct first answer to each problem, end of text included; empty where there is none.

        Raises:
            ConfigError: an unknown style, or a task without solutions (also for no problems at all).
        """
        ...


@runtime_checkable
class Hints(Protocol):
    """A token task whose problems come with hints."""

    def hints(self, problems: Sequence[dict[str, Any]], column: str) -> list[list[int]]:
        """Token ids of each problem's hint; empty where a record has an empty one.

        Raises:
            ConfigError: records have no such column.
        """
        ...


@runtime_checkable
class MatchesPrompts(Protocol):
    """A token task that finds its problems by the text of their prompts, so that answers can come from elsewhere."""

    tokenizer: Any
    stop_ids: list[int]

    def find_problems(self, prompts: Sequence[str]) -> list[dict[str, Any] | None]:
        """The training problem with each prompt, as :meth:`LanguageEnv.problems` gives it; None where there is none."""
        ...

    def encode_answers(self, answers: Sequence[str]) -> list[list[int]]:
        """Token ids of each answer, end of text included."""
        ...


@runtime_checkable
class HoldsOutAnswers(Protocol):
    """A token task with answers to imitate for problems that training never sees."""

    def held_out_demonstrations(self, count: int, /) -> TensorDict | None:
        """``[count]`` supervised rows at most, the same at every call; None where there are none."""
        ...


@runtime_checkable
class EncodesCompletions(Protocol):
    """A token task that knows what nothing may be put before."""

    def encode_completions(self, completions: Sequence[str]) -> list[list[int]]:
        """Token ids of each completion as it stands, end of text included."""
        ...


@runtime_checkable
class HasSplits(Protocol):
    """A token task whose splits are finite, and may be empty or hold problems that cannot be judged."""

    def twin(self) -> Any:
        """The same task with streams of its own."""
        ...

    def require(self, split: str, /, judged: bool) -> None:
        """Refuses a split without problems, and where answers are judged one with a problem that has no reference.

        Raises:
            ConfigError: there is no problem.
            DataError: names the first that cannot be judged.
        """
        ...


@runtime_checkable
class MarksTokens(Protocol):
    """A task that can tell which parts of an answer are right."""

    def marks(self, problem: dict[str, Any], turns: list[list[int]]) -> list[list[int]]:
        """1 for every token of a right part, -1 of a wrong one, 0 where there is nothing to judge; turn by turn."""
        ...


@runtime_checkable
class StatesConfidence(Protocol):
    """A token task whose answers may state how sure they are."""

    states_confidence: bool
    """Whether they do, in this run."""

    def restate(self, turn: Sequence[int], confidence: float) -> list[int] | None:
        """A turn with another confidence, as many tokens, the others untouched; None where it states none.

        Args:
            turn: token ids, with or without what ended it.
            confidence: in [0, 1].
        """
        ...


@runtime_checkable
class Votes(Protocol):
    """A token task that knows what an answer says, for majority votes."""

    def vote(self, problem: dict[str, Any], turns: list[list[int]]) -> str | None:
        """What a conversation's answer says: equal texts for equal answers, None where it says nothing.

        Args:
            problem: as :meth:`LanguageEnv.problems` made it.
            turns: the sampled token ids of every turn.
        """
        ...


@runtime_checkable
class CountsEpochs(Protocol):
    """A token task with a finite set of problems, each of which is drawn once before any comes again."""

    def epoch(self, generator: torch.Generator, /) -> float | None:
        """How often each was drawn with this stream, the epoch under way as the share that was visited."""
        ...


@runtime_checkable
class HasPools(Protocol):
    """A token task with a finite set of problems."""

    def pool_sizes(self) -> dict[str, int]:
        """How many problems there are by name: ``train``, ``eval``, and ``demonstration`` (to imitate)."""
        ...


@runtime_checkable
class ReportsColumns(Protocol):
    """A token task that tells beforehand what its ``TurnResult.info`` holds."""

    columns: tuple[str, ...]


@runtime_checkable
class Rewarded(Protocol):
    """A token task that takes reward functions of the run."""

    reward_names: tuple[str, ...]
    """Names in its ``TurnResult.info`` of what each function gave; empty without functions."""

    def reward_with(self, rewards: Any) -> None:
        """Gives conversations the reward of these functions, see :mod:`unified_rl.envs.language.rewards`.

        Raises:
            ConfigError: a function takes what the task's records do not have.
        """
        ...


@runtime_checkable
class StopsAtStrings(Protocol):
    """A token task whose turns end with certain texts too."""

    stop_strings: Any
    """A :class:`~unified_rl.policies.stop_strings.StopStrings`, or None."""


@runtime_checkable
class HasSpace(Protocol):
    """Knows the space it acts in: control environments and policies."""

    space: Space


@dataclass(frozen=True)
class Goals:
    """What a control environment is asked to reach, in its observation ``[d]``.

    Attributes:
        achieved, desired: entries of the observation that say what is reached and what is wanted, ``[g]`` int64.
        reward: ``(achieved [N, g], desired [N, g]) -> [N]`` float32, that of a step whose next observation achieved it.
        terminated: likewise ``[N]`` bool, whether the episode ends there; None where goals end none.
    """

    achieved: Tensor
    desired: Tensor
    reward: Callable[[Tensor, Tensor], Tensor]
    terminated: Callable[[Tensor, Tensor], Tensor] | None = None


@runtime_checkable
class HasGoals(Protocol):
    """A control environment that may be asked to reach something."""

    @property
    def goals(self) -> Goals | None:
        """None where its observation holds none."""
        ...


@runtime_checkable
class Renders(Protocol):
    """A control environment that draws its simulations."""

    frames_per_second: float
    """Steps in a second of the simulated time."""

    def render_lane(self, lane: int) -> NDArray[np.uint8]:
        """A picture ``[H, W, 3]`` of a simulation as it stands.

        Raises:
            ConfigError: this machine cannot draw; says what is missing.
        """
        ...


# --------------------------------------------------------------------------------------------- abilities of policies


@runtime_checkable
class Samples(Protocol):
    """Acts in control environments."""

    def sample(
        self, observation: Tensor, generator: torch.Generator | None = None, deterministic: bool = False
    ) -> TensorDict:
        """``action [..., a]``, what scoring needs and ``behavior_log_prob [..., U]``, for ``observation [..., d]``.

        Deterministic samples have no density: their ``behavior_log_prob`` is NaN.
        """
        ...


@runtime_checkable
class HoldsNoise(Samples, Protocol):
    """Can explore with noise that stays the same for several steps, and is the rollout's to keep."""

    @property
    def hold_steps(self) -> float:
        """Steps for which noise is held at most; infinity for as long as an episode lasts, 0 where none is held."""
        ...

    def draw_noise(self, count: int, generator: torch.Generator) -> Tensor:
        """Noise ``[count, ...]`` of so many simulations."""
        ...

    def sample_held(self, observation: Tensor, noise: Tensor) -> TensorDict:
        """As :meth:`sample` for ``observation [K, d]``, under the noise ``[K, ...]`` that each simulation holds."""
        ...


@runtime_checkable
class Generates(Protocol):
    """Continues prompts of tokens."""

    def generate(self, prompts: Any, *, max_new_tokens: int, **options: Any) -> Any:
        """A :class:`~unified_rl.policies.generation.Generation`: tokens, log-probs and lengths of every answer."""
        ...


@runtime_checkable
class KnowsItsEnds(Protocol):
    """A language model whose folder says which ids end an answer, beside those that the task knows."""

    end_ids: tuple[int, ...]


class EngineSampler(Generates, Protocol):
    """Samples with weights that are sent to it."""

    def open(self) -> None:
        """Looks whether it is there.

        Raises:
            ConfigError: it is not.
        """
        ...

    def at(self, version: int) -> EngineSampler:
        """Itself, with the policy's present weights, which are those of ``version``."""
        ...


@runtime_checkable
class HasSampler(Protocol):
    """A language model whose rollouts may be sampled by something else than itself."""

    @property
    def sampler(self) -> EngineSampler | None:
        """None where it samples itself."""
        ...


@runtime_checkable
class SampledApart(Protocol):
    """A policy whose rows may come from something that gives tokens other log-probs at the same weights."""

    @property
    def sampled_apart(self) -> bool:
        """Whether they do: fresh rows are then not those of the policy itself."""
        ...


@runtime_checkable
class Opens(Protocol):
    """A rollout that needs something outside its process."""

    def open(self) -> None:
        """Looks whether it is there, before anything is spent.

        Raises:
            ConfigError: it is not.
        """
        ...


@runtime_checkable
class Scores(Protocol):
    """Gives stored samples their log-probs under the present weights."""

    def log_prob(self, batch: TensorDictBase) -> UnitLogProb:
        """``log_prob [B, N]`` float32 with gradient, ``mask [B, N]`` bool, and whether ratios of it are exact."""
        ...


@runtime_checkable
class Imitates(Protocol):
    """Has a supervised loss."""

    def nll(self, batch: TensorDictBase, generator: torch.Generator | None = None) -> Tensor:
        """``[B, N']``, lower for likelier actions; ``generator`` feeds the noise of flow and diffusion losses."""
        ...


@runtime_checkable
class ShowsLogits(Protocol):
    """Every unit is a categorical whose logits can be read."""

    def read_logits(self, batch: TensorDictBase, reader: Reader, *extras: Tensor) -> tuple[Tensor, ...]:
        """The reader's tensors ``[B, N, ...]``; ``extras [B, N, ...]`` are handed to it unit by unit."""
        ...


@runtime_checkable
class ShowsNormals(Protocol):
    """Every unit is a Normal of known mean and standard deviation."""

    def normals(self, batch: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of every unit, each ``[B, N, D]``."""
        ...


@runtime_checkable
class Reparameterised(Protocol):
    """Draws actions that carry a gradient."""

    def rsample(
        self, observation: Tensor, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``action [M, a]`` and its ``log_prob [M]`` for ``observation [M, d]``; ``noise [M, a]`` replaces drawing."""
        ...


@runtime_checkable
class HasEntropy(Protocol):
    """Knows the entropy of its units."""

    def entropy(self, batch: TensorDictBase) -> Tensor:
        """``[B, N]`` nats, with gradient."""
        ...


@runtime_checkable
class UnitStates(Protocol):
    """Can hand over small hidden states from which every unit's logits are made later, a few units at a time."""

    def unit_states(self, batch: TensorDictBase) -> Tensor:
        """``[B, N, h]``."""
        ...

    def logits_of(self, states: Tensor) -> Tensor:
        """Logits ``[n, V]`` of states ``[n, h]``."""
        ...


@runtime_checkable
class RestsAdapters(Protocol):
    """May train adapters beside weights that stay, and can switch off those that change nothing."""

    def rest_adapters(self) -> None:
        """Switches adapters off where they change nothing, else on."""
        ...


@runtime_checkable
class Normalizes(Protocol):
    """Standardises observations by running moments, if it was told to."""

    def update_normalizer(self, observation: Tensor) -> None:
        """Adds raw ``observation [..., d]`` to the moments."""
        ...


@runtime_checkable
class KeepsSeen(Protocol):
    """Standardises observations, and can do so once for all steps of an update."""

    def keep_seen(self, rows: TensorDictBase) -> None:
        """Writes what its network sees of ``rows`` into them."""
        ...


@runtime_checkable
class MayChoose(Protocol):
    """A control policy that says whether its actions may be choices."""

    @property
    def supports_discrete(self) -> bool:
        """Then log-probs are those of categoricals."""
        ...


@runtime_checkable
class MayAverage(Protocol):
    """A policy of Normals that says whether its log-probs are means over their dimensions."""

    mean_over_dims: bool


@runtime_checkable
class HasTolerance(Protocol):
    """A policy whose sampling and scoring round differently, and that says how far apart they may lie."""

    @property
    def log_ratio_tolerance(self) -> float:
        """Largest difference of a fresh sample's log-prob from its sampler's, at equal weights."""
        ...


@runtime_checkable
class CountsUnits(Protocol):
    """A control policy, whose actions all have the same number of units."""

    num_units: int


@runtime_checkable
class HasGenerator(Protocol):
    """Draws from a stream of its own where none is passed."""

    generator: torch.Generator


@runtime_checkable
class EndsPretraining(Protocol):
    """Has something to fix between imitation and reinforcement learning."""

    def end_pretraining(self) -> None:
        """Fixes it; calling it again changes nothing."""
        ...


# ------------------------------------------------------------------------------- policies, agents, replays and rollouts


@runtime_checkable
class Stateful(Protocol):
    """Part of a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-exact continuation needs."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Restores :meth:`state_dict`; recomputes nothing."""
        ...


class HasWeights(Stateful, Protocol):
    """What an optimiser and an average of weights ask of a ``torch.nn.Module``."""

    def modules(self) -> Iterator[nn.Module]:
        """Itself and all modules inside."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its weights."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Its weights by name."""
        ...

    def buffers(self) -> Iterator[Tensor]:
        """Its tensors that are no weights."""
        ...

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Freezes or thaws its weights; returns itself."""
        ...


class Trainable(Scores, Imitates, HasWeights, Protocol):
    """A policy of either domain, as agents train it: a ``torch.nn.Module`` with log-probs and a supervised loss."""

    @property
    def domain(self) -> str:
        """``control`` or ``language``."""
        ...

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        ...


class ControlPolicy(Trainable, Samples, HasSpace, Normalizes, EndsPretraining, Protocol):
    """A policy that acts in control environments, with the sizes of its space."""

    observation_dim: int
    action_dim: int


class BoxPolicy(ControlPolicy, Protocol):
    """A control policy whose action is a vector between bounds."""

    action_low: Tensor
    action_high: Tensor


class LanguagePolicy(Trainable, Generates, Protocol):
    """A language model of a token task."""

    tokenizer: Any
    max_length: int
    model: Any
    """The transformer."""


class Store(Protocol):
    """A replay as a trainer uses it: filled, saved and restored; agents say themselves how they draw from it."""

    def extend(self, rows: TensorDict) -> Any:
        """Takes in the rows of a collection."""
        ...

    def dumps(self, path: Path) -> Any:
        """Writes everything to a folder."""
        ...

    def loads(self, path: Path) -> Any:
        """Reads what :meth:`dumps` wrote."""
        ...


@runtime_checkable
class HasDiscount(Protocol):
    """An environment or agent that discounts."""

    gamma: float


@runtime_checkable
class ChecksReplay(Protocol):
    """An agent that refuses a replay which it cannot use, under the name that the user gave the agent."""

    option: str

    def check_replay(self, replay: Any) -> None:
        """Raises ConfigError where it does not fit."""
        ...


@runtime_checkable
class ChecksWritten(Protocol):
    """An agent that refuses rows from which it would learn nothing, before any are collected."""

    def check_written(
        self, sources: Collection[int], group_size: int, columns: Collection[str], stored: bool = True
    ) -> None:
        """Raises ConfigError for rows of these sources, of at most so many a group, and of these columns.

        ``stored`` says whether some of source OFFLINE were sampled by weights of before.
        """
        ...


@runtime_checkable
class ChecksIdentity(Protocol):
    """An agent that checks on its first update that fresh samples have ratio 1, unless it is told not to."""

    verify_identity: bool


@runtime_checkable
class SharesPasses(Protocol):
    """An agent whose passes over the model can be divided among processes that hold the same rows and weights."""

    policy: Any

    def weights(self) -> list[Any]:
        """Weights and buffers, which every process holds alike at the end of an update."""
        ...

    def share(self, shard: Any) -> None:
        """Does so, see :class:`unified_rl.shard.Shard`; raises ConfigError where it would not be the same gradient."""
        ...


@runtime_checkable
class HoldsModels(SharesPasses, Protocol):
    """An agent that tells every model that its passes go through."""

    optimizer: Any

    def models(self) -> list[Any]:
        """The policy, then critics and other policies, each once."""
        ...


@runtime_checkable
class PlansUpdates(Protocol):
    """An agent whose learning rate follows the length of the run."""

    def plan_updates(self, updates: int) -> None:
        """Says how many updates the run has; raises ConfigError where a schedule does not fit into it."""
        ...


@runtime_checkable
class KeepsVersions(Protocol):
    """An agent that scores rows by the very weights that sampled them."""

    def keep_versions(self, staleness: int) -> None:
        """Says how many updates old the rows of a collection may be."""
        ...


@runtime_checkable
class NamesMetrics(Protocol):
    """An agent that tells beforehand which metrics its updates have, for those who wait for one."""

    @property
    def metric_names(self) -> Collection[str] | None:
        """Names such as ``loss/policy``; None where a part of the user's own has metrics that nobody knows."""
        ...


@runtime_checkable
class ShowsRows(Protocol):
    """An agent that shows the rows of an update, advantages included, to whoever asks."""

    watch: Callable[[TensorDict], None] | None
    """Called in :meth:`Agent.update` with the rows that it trains on."""


@runtime_checkable
class Agent(Stateful, Protocol):
    """Improves a policy from a replay. ``gamma``, where it has one, is the discount that its rollout writes."""

    policy: Any
    version: int
    """Updates made so far; written to the rows that are collected next."""

    def update(self, replay: Any, progress: float = 0.0) -> dict[str, Any]:
        """One update from what the replay gives; metrics. ``progress`` is the share of the run that is done."""
        ...


@runtime_checkable
class Collects(Protocol):
    """An agent that collects by itself, without rollout and replay."""

    steps_per_update: int
    steps: int
    """Environment steps that it has made so far."""


@runtime_checkable
class Rollout(Stateful, Protocol):
    """Makes rows for a replay."""

    steps: int
    """Environment steps, or sampled units, so far."""
    steps_per_collect: int
    staleness: int
    """Updates that the policy of a row may be old."""
    rows: int
    """Rows of one collection at most."""

    @property
    def length(self) -> int | None:
        """Steps of a row; None where a row stands alone."""
        ...

    def collect(self, version: int) -> tuple[TensorDict, dict[str, float]]:
        """Rows of the record, sampled by the policy of that version, and metrics."""
        ...


@runtime_checkable
class TellsResumable(Protocol):
    """An environment that may be unable to continue its episodes bit for bit."""

    def resumable(self) -> str | bool:
        """True, or why it cannot; False where it cannot tell yet."""
        ...


@runtime_checkable
class Restarts(Protocol):
    """A rollout that can go on without the episodes that were under way."""

    def restart(self, state: dict[str, Any], seed: int) -> None:
        """Restores a stored state but for the environment, which begins new episodes from ``seed``."""
        ...


@runtime_checkable
class NumbersRows(Protocol):
    """A rollout whose episodes and groups can have numbers that those of other workers do not have."""

    def number_from(self, first: int) -> None:
        """Numbers episodes and groups from ``first`` on; called before the first collection."""
        ...


def require_hints(env: object, setting: str, column: str) -> Hints:
    """The task, whose problems come with hints.

    Raises:
        ConfigError: they do not, or not in this column.
    """
    if not isinstance(env, Hints):
        raise ConfigError(f"{setting} needs hints, and {type(env).__name__} has no hints(); use env=jsonl or chain_mod")
    try:
        env.hints(env.problems(1, torch.Generator().manual_seed(0), "train"), column)  # type: ignore[attr-defined]
    except ConfigError as error:
        raise ConfigError(f"{setting}: {error}") from error
    return env


def require_solutions(env: object, setting: str, style: str | None = None) -> Solves:
    """The task, which can show correct answers.

    Args:
        env: the task.
        setting: who asks, for the message.
        style: of the answers.

    Raises:
        ConfigError: it cannot, or not in this style.
    """
    works = "use an environment with solutions, such as env=chain_mod, or leave the setting out"
    if not isinstance(env, Solves):
        raise ConfigError(f"{setting} needs correct answers, and {type(env).__name__} has no solve(); {works}")
    try:
        env.solve([], style)
    except ConfigError as error:
        raise ConfigError(f"{setting}: {error}") from error
    return env
