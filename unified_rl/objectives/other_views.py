"""The policy on disturbed inputs: how far what it did there is from what it did, and the same advantages there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from unified_rl.correction.internal.hashing import place_noise
from unified_rl.correction.levels import CLAMP, Layout
from unified_rl.correction.view import share
from unified_rl.errors import ConfigError
from unified_rl.objectives.forward import Forward
from unified_rl.objectives.metrics import Metrics
from unified_rl.objectives.objective import Parts, Scored, Term
from unified_rl.objectives.terms import reduction
from unified_rl.protocols import domain_of
from unified_rl.ranges import Count, NonNegative, Seed, UnitInterval
from unified_rl.units import of_units, row_return


class OtherViewsTerm(Term):
    """``1[right] max_k KL(clean || view k) - gradient A log pi(view)``: the same units behind disturbed inputs. ROMA.

    Rows are sampled on clean inputs alone; a view changes what stands before and between the sampled units. In language
    it replaces a share of the tokens that were not sampled by others of the row; in control it adds normal noise to
    observations. The KL of a unit is estimated at what was sampled, ``exp(x) - 1 - x`` of the log-ratio ``x`` of the
    view to the clean input, which has no gradient; the worst view counts. The policy gradient is of one view, in turn.
    2605.09262. Every view costs a forward pass.

    Args:
        name, rows, coefficient: see :class:`Term`.
        views: disturbed inputs.
        strength: share of the tokens, or noise in standard deviations of an observation's entries over the batch.
        gradient: weight of the policy gradient beside the KL.
        threshold: of the return, above which a row is right and held to its clean input.
        reduce: over units, as a correction's.
        seed: of the disturbances, which also depend on the row and the update.
    """

    whole_rows = True

    def __init__(
        self,
        name: str,
        *,
        views: Count = 2,
        strength: UnitInterval = 0.1,
        gradient: NonNegative = 1.0,
        threshold: float = 0.5,
        reduce: str = "sequence-mean-token-mean",
        seed: Seed = 0,
        rows: Any = "own",
        coefficient: float | Mapping[str, Any] = 0.1,
    ) -> None:
        super().__init__(name, rows, coefficient)
        self.views, self.strength, self.gradient, self.threshold = views, strength, gradient, threshold
        self.reduce, self.seed, self.update = reduction(reduce, self.where), seed, 0
        self.reports = frozenset({f"loss/{name}", f"{name}/kl"})

    def attach(self, parts: Parts) -> None:
        """Finds out what a view changes."""
        self.language = domain_of(parts.policy) == "language"

    def start(self, progress: float, update: int) -> None:
        """Other disturbances in every update."""
        super().start(progress, update)
        self.update = update

    def check(self, record: TensorDictBase) -> None:
        """Looks for observations that noise can be added to.

        Raises:
            ConfigError: images, or several parts.
        """
        seen = None if self.language else record.get("observation", None)
        if not self.language and (not isinstance(seen, Tensor) or not seen.dtype.is_floating_point):
            raise ConfigError(
                f"{self.where} adds noise to observations, and these are no vector of numbers: take the term out"
            )

    def prepare(self, batch: TensorDict, scored: Scored) -> TensorDictBase:
        """``coefficient [B]``, and in control ``spread [B, d]`` of the observations."""
        items = {"coefficient": self.reduce(self.rows.within(batch)["mask"])}
        if not self.language:
            real = batch["observation"][batch["step_mask"]]
            items["spread"] = real.std(0, correction=0).expand(len(batch), -1)
        return TensorDict(items, batch_size=[len(batch)])

    def loss(self, forward: Forward, rows: TensorDict, stats: TensorDictBase) -> tuple[Tensor, Metrics]:
        """The micro-batch's share; one more pass for each view."""
        mask, clean = self.rows.within(rows)["mask"], forward.log_prob.detach()
        scale = share(mask, clean.dtype) * stats["coefficient"].unsqueeze(-1)
        worst, moved = torch.zeros_like(clean), clean
        for number in range(self.views):
            log_prob = forward.policy.log_prob(self._disturbed(rows, stats, number)).log_prob
            x = torch.where(mask, log_prob - clean, 0.0).clamp(-CLAMP, CLAMP)
            worst = torch.maximum(worst, x.expm1() - x)
            if number == self.update % self.views:
                moved = torch.where(mask, log_prob, 0.0)
        right = (row_return(rows) > self.threshold).unsqueeze(-1)
        held = (worst * right * scale).sum()
        learnt = (torch.where(mask, of_units(rows, rows["advantage"]), 0.0) * moved * scale).sum()
        value = held - self.gradient * learnt
        return value, {f"loss/{self.name}": value.detach(), f"{self.name}/kl": held.detach()}

    def _disturbed(self, rows: TensorDict, stats: TensorDictBase, number: int) -> TensorDict:
        layout, seed = Layout(rows["mask"], rows), (self.seed * 65_537 + self.update) * self.views + number
        out = TensorDict({k: v for k, v in rows.items() if not k.startswith("seen_by_")}, rows.batch_size)
        if self.language:
            out["tokens"] = _replaced(rows, layout, seed, self.strength)
            return out
        seen = rows["observation"]
        places = seen[0].numel()
        one, two = (place_noise(rows, layout, 2 * seed + k, places).reshape(seen.shape) for k in (0, 1))
        normal = (-2 * (1 - one).log()).sqrt() * (2 * math.pi * two).cos()  # Box and Muller
        out["observation"] = seen + self.strength * stats["spread"].unsqueeze(1) * normal
        return out


def _replaced(rows: TensorDictBase, layout: Layout, seed: int, strength: float) -> Tensor:
    """Tokens ``[B, N]``, of which some that nobody sampled have made room for others of the same row."""
    tokens, context = rows["tokens"], rows["token_mask"] & ~rows["mask"]
    chosen, which = (place_noise(rows, layout, 2 * seed + k, tokens.shape[1]) for k in (0, 1))
    places = (~context).to(torch.uint8).argsort(dim=-1, stable=True)  # those of the context first
    other = places.gather(1, (which * context.sum(-1, keepdim=True)).long().clamp(max=tokens.shape[1] - 1))
    return torch.where(context & (chosen < strength), tokens.gather(1, other), tokens)
