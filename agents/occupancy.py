"""A penalty for going where another policy does not: a discriminator of how often both come to every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from unified_rl.agents.modelled_reward import Fitted
from unified_rl.correction.generators import GENERATORS, Generator
from unified_rl.correction.levels import CLAMP
from unified_rl.correction.lookup import bind
from unified_rl.errors import ConfigError, NonFiniteError
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.policies.reward_model import RewardModel, hidden_of
from unified_rl.protocols import ControlPolicy, Trainable, is_language
from unified_rl.ranges import Count, Name, NonNegative
from unified_rl.replay.persist import read_rows
from unified_rl.rollout.recorded import fitted
from unified_rl.training.seeding import generator

SMALLEST = 1e-6
"""A divergence below which its root is taken of this."""
LARGEST = 1e15
"""A row that loses more is an error: squares of such rewards come near the largest float32."""
AT_ONCE = 16384
"""Recorded steps whose observations are on the policy's device together, when the moments of all are taken."""
BASE = "agent.reward_model.base"


class Occupancy(Fitted):
    """Takes from the rewards where the policy comes more often than another one did.

    A discriminator learns by the logistic loss to tell steps of the policy (in simulations an observation and an
    action; of a language model the whole answer) from recorded ones of the other policy, as many of both. Its logit is
    then ``log t``, ``t = mu / mu_base`` the ratio of how often both come there, and every step's reward loses
    ``coefficient * (f'(t) - f'(1))``. The policy gradient of that is the gradient of ``coefficient * D_f(mu ||
    mu_base)``. Every valid step counts alike, whatever its discount. Correlated Proxies (ORPO), 2403.03185.

    Args:
        base: folder of the other policy's rows (``unified-rl evaluate RUN --record FOLDER``).
        generator: ``f``, a name of :data:`~unified_rl.correction.generators.GENERATORS` or a mapping.
        coefficient: of the penalty; the paper's factor of ``t - 1`` is twice that of ``pearson_chi2``.
        root: of the square root of the divergence instead: the penalty is divided by ``2 sqrt(D_f)``.
        hidden: widths of the discriminator's layers (simulations); None is 64 and 64.
        rows, steps, every, lr: see :class:`~unified_rl.agents.modelled_reward.Fitted`; ``rows`` are those that stand
            for the policy.
    """

    penalty = True
    reports = frozenset({
        "reward_model/reward", "reward_model/loss", "reward_model/accuracy", "reward_model/divergence"
    })  # fmt: skip

    def __init__(
        self,
        *,
        base: Name,
        generator: str | dict[str, Any] = "pearson_chi2",
        coefficient: NonNegative = 0.1,
        root: bool = False,
        hidden: tuple[Count, ...] | None = None,
        rows: Any = "own",
        steps: Count = 40,
        every: Count = 1,
        lr: NonNegative = 3e-3,
    ) -> None:
        super().__init__(rows=rows, steps=steps, every=every, lr=lr)
        self.base, self.coefficient, self.root, self.hidden = base, coefficient, root, hidden
        self.generator: Generator = bind(generator, GENERATORS, "agent.reward_model.generator")[0]()

    def attach(self, policy: Trainable, seed: int) -> None:
        """Reads the other policy's rows, and makes a discriminator to which both are the same.

        Raises:
            CheckpointError: the folder is missing or damaged.
            ConfigError: its rows are of another task.
        """
        hidden = hidden_of(policy, self.hidden)
        self.recorded = _recorded(read_rows(self.base, BASE), policy, f"{BASE}={self.base}")
        self.stream = generator(seed, "occupancy")
        self.train(RewardModel(policy, hidden, seed=seed, bias=True), policy)
        if not is_language(policy):
            for part in self.recorded.select("observation").split(AT_ONCE):
                self.model.observe(_as_windows(part, (1, len(part))).to(policy.device))

    @property
    def model(self) -> RewardModel:
        """The discriminator: a step's reward, and the score of an answer, are its logit."""
        assert isinstance(self.module, RewardModel)
        return self.module

    def look(self, rows: TensorDict) -> None:
        """Takes in what observations are like."""
        self.model.observe(rows)

    def logits(self, rows: TensorDictBase) -> Tensor:
        """``log t`` of every step that counts, or of every answer, ``[n]``."""
        if self.model.language:
            return self.model.scores(rows)
        out: Tensor = self.model(rows)[rows["step_mask"]]
        return out

    def drawn(self, rows: TensorDict) -> TensorDict:
        """As many recorded steps or answers as there are rows, with replacement."""
        shape = rows.batch_size if self.model.language else rows["step_mask"].shape
        at = torch.randint(len(self.recorded), (int(shape.numel()),), generator=self.stream)
        chosen = self.recorded[at]
        return (chosen if self.model.language else _as_windows(chosen, tuple(shape))).to(rows["mask"].device)

    def backward(self, rows: TensorDict) -> dict[str, Tensor]:
        """Of the mean logistic loss of both sides, each of which weighs a half."""
        loss, right = torch.zeros((), device=rows["mask"].device), torch.zeros((), device=rows["mask"].device)
        for side, sign in ((rows, 1.0), (self.drawn(rows), -1.0)):
            count = len(side) if self.model.language else side["step_mask"].sum().clamp(min=1)
            for part in self._parts(side):
                logit = sign * self.logits(part)
                mean = F.softplus(-logit).sum() / (2 * count)
                mean.backward()
                told = (logit > 0).sum() + 0.5 * (logit == 0).sum()  # what is undecided is right every second time
                loss, right = loss + mean.detach(), right + told / (2 * count)
        return {"reward_model/loss": loss, "reward_model/accuracy": right}

    @torch.no_grad()
    def __call__(self, record: TensorDict, version: int, metrics: dict[str, Any]) -> None:
        """Learns where it is time, and takes the penalty from ``reward [B, T]``.

        Args:
            record: the rows of an update.
            version: of the present weights.
            metrics: of the update; ``reward_model/divergence`` is ``D_f`` over recorded rows, ``reward_model/reward``
                what the penalties of a row come to.

        Raises:
            NonFiniteError: the discriminator's loss is not finite, or a penalty too large to learn from.
        """
        with torch.enable_grad():
            self.learn(record, version, metrics)
        logit = torch.cat([self.rewards(part) for part in self._parts(record)])
        recorded = torch.cat([self.logits(part) for part in self._parts(self.drawn(record))])
        divergence = self.divergence(recorded)
        cost = self.generator.slope(logit) - self.generator.slope(torch.zeros_like(logit))
        if self.root:
            cost = cost / (2 * divergence.clamp(min=SMALLEST).sqrt())
        taken = torch.where(record["step_mask"], self.coefficient * cost, 0.0)
        lost = taken.sum(-1)
        if not bool((lost.abs() < LARGEST).all()):
            raise NonFiniteError(
                f"agent.reward_model takes up to {float(taken.abs().max()):.3g} from the reward of a step, with which "
                f"nothing can be learnt: lower agent.reward_model.coefficient={self.coefficient:g} or "
                f"agent.reward_model.lr={self.lr:g}, or take agent.reward_model.generator=tv, whose slope is bounded"
            )
        metrics |= {"reward_model/divergence": divergence, "reward_model/reward": -lost.mean()}
        record["reward"] = record["reward"] - taken

    def divergence(self, recorded: Tensor) -> Tensor:
        """``D_f`` by the logits of recorded steps or answers ``[n]``, a scalar that is never negative.

        The mean of ``f(t) - f'(1) (t - 1)``. Of the exact ``t``, whose mean is 1, it is that of ``f(t)``, which can be
        negative of an estimate.
        """
        flat = self.generator.slope(torch.zeros_like(recorded))
        return (self.generator.value(recorded) - flat * recorded.clamp(-CLAMP, CLAMP).expm1()).mean()

    def state_dict(self) -> dict[str, Any]:
        """Weights, moments and the stream by which recorded rows are drawn."""
        return {**super().state_dict(), "stream": self.stream.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores them."""
        super().load_state_dict(state)
        self.stream.set_state(state["stream"])


def _recorded(rows: TensorDict, policy: Trainable, setting: str) -> TensorDict:
    """The columns that a discriminator reads of recorded rows, ``[n]``.

    Raises:
        ConfigError: they are of another task.
    """
    rows = rows.reshape(rows.numel())
    wanted = ("tokens", "token_mask") if is_language(policy) else ("observation", "action")
    lacking = [key for key in wanted if key not in rows.keys()]
    if lacking:
        raise ConfigError(f"{setting} holds no {lacking[0]}: its rows are of another kind of task than the run's")
    rows = rows.select(*wanted)
    if not isinstance(policy, CausalLM):
        return fitted(rows, cast(ControlPolicy, policy).space, setting)
    width = int(rows["token_mask"].sum(-1).max())
    known = policy.model.get_input_embeddings().num_embeddings
    if width > policy.max_length or int(rows["tokens"].max()) >= known:
        raise ConfigError(
            f"{setting} holds rows of up to {width} tokens with numbers up to {int(rows['tokens'].max())}, and the "
            f"policy reads {policy.max_length} tokens of {known}: record rows of this task by a policy with this "
            "tokenizer"
        )
    return rows


def _as_windows(rows: TensorDict, shape: tuple[int, int]) -> TensorDict:
    """Recorded steps ``[B * T]`` as windows ``[B]`` of T steps, all of which count."""
    items = {key: value.reshape(*shape, *value.shape[1:]) for key, value in rows.items()}
    return TensorDict({**items, "step_mask": torch.ones(shape, dtype=torch.bool)}, batch_size=[shape[0]])
