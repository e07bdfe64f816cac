"""What every control policy shares: sampling, re-scoring and supervised losses around three small hooks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from numpy.typing import ArrayLike
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchrl.envs.utils import ExplorationType, exploration_type

from unified_rl.errors import ConfigError, RecordError
from unified_rl.observations import layout_of
from unified_rl.policies.acting import act
from unified_rl.policies.encoder import USUAL_FEATURES, ObservationEncoder
from unified_rl.policies.normalizer import MOMENTS, RunningNormalizer, seen_by
from unified_rl.protocols import Domain
from unified_rl.ranges import Count, Seed
from unified_rl.spaces import Box, Space, as_space
from unified_rl.units import UnitLogProb

HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)
DETERMINISTIC = (ExplorationType.DETERMINISTIC, ExplorationType.MODE, ExplorationType.MEAN, ExplorationType.MEDIAN)
"""TorchRL exploration types under which ``forward`` adds no noise."""


def normal_log_prob(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Elementwise log-density of a Normal; all arguments broadcast."""
    return -0.5 * ((x - mean) * torch.exp(-log_std)).square() - log_std - HALF_LOG_TWO_PI


class NormalLogProb(torch.autograd.Function):
    """:func:`normal_log_prob` summed over the last axis, with the derivatives by mean and log deviation written out.

    ``NormalLogProb.apply(x, mean, log_std)``: ``x, mean [M, a]``, ``log_std [M, a]`` or ``[a]``, to ``[M, 1]``. No
    derivative by ``x``.
    """

    if TYPE_CHECKING:  # torch declares it without types

        @classmethod
        def apply(cls, x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
            """Log-densities ``[M, 1]``."""
            raise NotImplementedError

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
        inverse, apart = torch.exp(-log_std), x - mean
        z = apart * inverse
        ctx.save_for_backward(apart, z, inverse)
        return (-0.5 * z.square() - log_std - HALF_LOG_TWO_PI).sum(-1, keepdim=True)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor]:
        apart, z, inverse = ctx.saved_tensors
        slope = z * gradient
        by_inverse, directly = slope * apart, gradient.expand_as(z).neg()
        if inverse.ndim < z.ndim:  # in torch's own order, to the last digit
            by_inverse, directly = by_inverse.sum(0), directly.sum(0)
        return None, slope * inverse, by_inverse * inverse + directly


def draw_normal(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers of ``like``'s dtype and device, drawn where the generator lives."""
    device = like.device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=device, dtype=like.dtype).to(like.device)


def draw_uniform(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers in [0, 1) of ``like``'s dtype and device, drawn where the generator lives."""
    device = like.device if generator is None else generator.device
    return torch.rand(tuple(shape), generator=generator, device=device, dtype=like.dtype).to(like.device)


def finite_ranges(low: Tensor, high: Tensor) -> Tensor:
    """Which entries ``[a]`` have two bounds that a scale can be made of."""
    return torch.isfinite(high - low)


def action_bounds(space: Space) -> dict[str, Tensor]:
    """``low`` and ``high`` of a real action, and ``middle`` and ``half`` of its range, each ``[a]`` float32.

    Entries without two finite bounds have middle 0 and half 1, so that they are scaled by nothing.

    Raises:
        ConfigError: actions that are no vector.
    """
    sizes = space.sizes()
    low, high = torch.tensor(sizes["action_low"]), torch.tensor(sizes["action_high"])
    bounded = finite_ranges(low, high)
    middle = torch.where(bounded, 0.5 * (low + high), torch.zeros_like(high))
    half = torch.where(bounded, 0.5 * (high - low), torch.ones_like(high))
    return {"low": low, "high": high, "middle": middle, "half": half}


class Policy(TensorDictModuleBase):
    """A control policy: samples actions, scores stored samples again, and has a supervised loss.

    Subclasses set ``rescoring_keys`` and ``num_units`` and implement :meth:`_sample`, :meth:`_log_prob` and
    :meth:`_nll` on flat batches ``[M, ...]``; everything about batch layouts is here. It is a TensorDict module:
    ``forward`` samples, so that it can be the policy of a TorchRL collector, and heeds TorchRL's exploration type.

    Args:
        space: observation and action of the environment. Instead of it, sizes and bounds can be given, by name or in
            this order, as of :meth:`unified_rl.spaces.Space.flat`:
        action_dim: width ``a`` of the action.
        action_low: ``a`` lower bounds of the action that the environment takes.
        action_high: ``a`` upper bounds.
        num_actions: number of actions of a discrete space; only some policies support it.
        observation_dim: width ``d`` of the observation, where it is not the first argument.
        normalize_observation: keep running moments of the observation and standardise by them; the owner calls
            :meth:`update_normalizer` between updates. Samples then hold the number of the moments they were made under
            (``moments [...]`` int64), and :meth:`log_prob` scores under those. Pixels are divided by 255 instead.
        image_features: width that the encoder gives each image of an observation
            (:class:`~unified_rl.policies.encoder.ObservationEncoder`), and those of critics beside it; of no effect
            without images.
        seed: of the initial weights, and of the policy's own :attr:`generator`.

    Attributes:
        space: the environment's; :attr:`action_dim` and :attr:`num_actions` are of it.
        observation_dim: width of what :meth:`normalize` makes of an observation: the space's own, or with images that
            of the encoder's result.
        layout: how an observation lies in a row; ``d`` is its width wherever observations are meant.

    Raises:
        ConfigError: sizes and bounds that do not fit together, or a space that this policy cannot take; says what can.
    """

    domain: ClassVar[Domain] = "control"
    rescoring_keys: tuple[str, ...] = ()
    """Keys beside ``action`` and ``behavior_log_prob`` that a sample holds and :meth:`log_prob` needs."""
    num_units: int = 1
    """``U``, units of one action."""
    exact: bool = True
    """Whether ratios of two log-probs are exact importance weights of the executed action."""
    supports_discrete: bool = False
    """Whether actions may be choices; log-probs are then those of categoricals, at most 0."""
    log_ratio_tolerance: float = 1e-2
    """How far a fresh sample's log-prob may lie from its sampler's at equal weights."""
    action_low: Tensor
    action_high: Tensor
    action_middle: Tensor
    action_half: Tensor

    def __init__(
        self,
        space: Space | int | None = None,
        action_dim: int | None = None,
        action_low: Sequence[float] | None = None,
        action_high: Sequence[float] | None = None,
        num_actions: int | None = None,
        *,
        observation_dim: int | None = None,
        normalize_observation: bool = False,
        image_features: Count = USUAL_FEATURES,
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        self.space = as_space(
            type(self).__name__,
            space,
            action_dim=action_dim,
            action_low=action_low,
            action_high=action_high,
            num_actions=num_actions,
            observation_dim=observation_dim,
        )
        self._check_space(self.space)
        self.rescoring_keys = self._keys()
        self.layout, self.action_dim = layout_of(self.space.observation), self.space.action_dim
        self.encoder: nn.Module | None = None
        self.observation_dim = self.layout.width
        if self.layout.images:
            self.encoder = ObservationEncoder(self.layout, image_features, seed)
            self.observation_dim = self.encoder.width
        self.num_actions = self.space.num_actions
        self.in_keys = ["observation"]
        extra = [key for key in self.rescoring_keys if key != "action"]
        self.out_keys = ["action", *extra, "behavior_log_prob"]
        self.seed = seed
        self.normalizer: nn.Module | None = None
        if normalize_observation and self.layout.vector:
            self.normalizer = RunningNormalizer(self.layout.vector)
            self.out_keys.append(MOMENTS)
        self._generator: torch.Generator | None = None
        self._acts_in: Space | None = None
        if self.space.action.choices is None:
            self._register_bounds()

    def _check_space(self, space: Space) -> None:
        """Refuses what the policy cannot take, and says what works."""
        name, action = type(self).__name__, space.action
        if action.choices is not None and not self.supports_discrete:
            raise ConfigError(
                f"{name} needs continuous actions, but the environment has discrete ones, {action.describe()}; use "
                "policy=autoregressive"
            )
        if action.choices is None and (not isinstance(action, Box) or action.integer):
            raise ConfigError(
                f"{name} cannot act in {action.describe()}: policies give one vector of floats, or choices "
                "(policy=autoregressive); make one of those of it in the environment"
            )

    def _register_bounds(self) -> None:
        bounds = action_bounds(self.space)
        if not bool((bounds["high"] > bounds["low"]).all()):
            entry = int((bounds["high"] <= bounds["low"]).nonzero()[0])
            low, high = (float(bounds[name][entry]) for name in ("low", "high"))
            raise ConfigError(
                f"action entry {entry} of {len(bounds['low'])} lies between {low:g} and {high:g}, which leaves no "
                "choice (action_low must lie below action_high): leave a locked joint out of the action space"
            )
        for name, value in bounds.items():
            self.register_buffer(f"action_{name}", value, persistent=False)
        self.bounded = bool(finite_ranges(bounds["low"], bounds["high"]).all())

    def _keys(self) -> tuple[str, ...]:
        """``rescoring_keys`` where they depend on the space."""
        return self.rescoring_keys

    # --- what a subclass implements, on flat batches -------------------------------------------------------------

    def _sample(self, observation: Tensor, generator: torch.Generator, deterministic: bool) -> dict[str, Tensor]:
        """Draws for ``observation [M, d]``: ``action [M, a]``, the re-scoring keys and ``behavior_log_prob [M, U]``."""
        raise NotImplementedError

    def _log_prob(self, observation: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        """Log-probs ``[M, U]`` of stored samples: ``observation [M, d]`` and each re-scoring key ``[M, ...]``."""
        raise NotImplementedError

    def _nll(self, observation: Tensor, action: Tensor, generator: torch.Generator) -> Tensor:
        """Supervised loss ``[M, L]`` of ``action [M, a]`` in the environment's coordinates."""
        raise NotImplementedError

    # --- the public face ----------------------------------------------------------------------------------------

    @property
    def generator(self) -> torch.Generator:
        """The stream used where no generator is passed; settable. Its state is the owner's to checkpoint."""
        if self._generator is None:
            self._generator = torch.Generator().manual_seed(self.seed)
        return self._generator

    @generator.setter
    def generator(self, value: torch.Generator) -> None:
        self._generator = value

    def forward(
        self,
        observation: ArrayLike | Tensor | TensorDictBase,
        *,
        deterministic: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        """The action for an observation, as the environment takes it; of a TensorDict, TorchRL's entry point.

        Args:
            observation: one ``[d]`` or a batch ``[..., d]``, raw: a tensor, or what NumPy makes an array of, of any
                real dtype. A TensorDict with ``observation [..., d]`` is sampled for, and gets the out keys.
            deterministic: leave sampling noise out: :meth:`deterministic_action`. By default so, and of a TensorDict as
                TorchRL's exploration type says.
            generator: stream of samples; :attr:`generator` if None.

        Returns:
            The action, of the kind that came (array or tensor), in shape, dtype, bounds and numbering of the action
            space: ``[*shape]``, or ``[..., *shape]`` of a batch. The TensorDict, where one came.

        Raises:
            RecordError: an observation of another width.
            NonFiniteError: a NaN or infinity in it.
        """
        if not isinstance(observation, TensorDictBase):
            return act(self, self.acts_in, observation, deterministic is not False, generator)
        best = exploration_type() in DETERMINISTIC if deterministic is None else deterministic
        return observation.update(self.sample(observation["observation"], generator, best))

    @property
    def acts_in(self) -> Space:
        """The environment's space, where the policy was made of less: of sizes and bounds alone."""
        return self._acts_in or self.space

    @acts_in.setter
    def acts_in(self, space: Space) -> None:
        self._acts_in = space

    def deterministic_action(self, observation: Tensor) -> Tensor:
        """The best single guess as a function of the observation alone, ``[M, d]`` raw to ``[M, a]`` as of a sample.

        No random stream moves, and a row's action does not depend on the others'. With gradients.
        """
        return self._deterministic_action(self.normalize(self._raw(observation)))

    def _deterministic_action(self, observation: Tensor) -> Tensor:
        """For normalised ``observation [M, d]``."""
        return self._sample(observation, torch.Generator().manual_seed(self.seed), True)["action"]

    @torch.no_grad()
    def sample(
        self, observation: Tensor, generator: torch.Generator | None = None, deterministic: bool = False
    ) -> TensorDict:
        """Samples an action for each observation.

        Args:
            observation: ``[..., d]`` float, raw.
            generator: random stream; :attr:`generator` if None.
            deterministic: the policy's best single guess. It has no density, so ``behavior_log_prob`` is NaN, which
                :func:`unified_rl.units.validate_record` refuses.

        Returns:
            Batch size ``[...]``: ``action [..., a]`` float32 in the environment's coordinates (int64 where discrete),
            the re-scoring keys, ``behavior_log_prob [..., U]``, and ``moments [...]`` where observations are
            standardised.
        """
        lead = observation.shape[:-1]
        flat = self.normalize(self._raw(observation.reshape(-1, observation.shape[-1])))
        out = self._sample(flat, self.generator if generator is None else generator, deterministic)
        return self._sampled(out, lead)

    def _sampled(self, out: dict[str, Tensor], lead: torch.Size) -> TensorDict:
        """What was drawn for ``[M]`` observations, of batch size ``lead``, with the moments in use."""
        if isinstance(self.normalizer, RunningNormalizer):
            out[MOMENTS] = self.normalizer.used.expand(len(out["action"])).clone()
        if len(lead) != 1:
            out = {key: value.reshape(*lead, *value.shape[1:]) for key, value in out.items()}
        return TensorDict(out, batch_size=lead)

    def log_prob(self, batch: TensorDictBase) -> UnitLogProb:
        """Scores stored samples under the present weights.

        Args:
            batch: a record with ``observation [B, T, d]`` or ``[B, d]`` and the re-scoring keys of the same leading
                shape. ``mask [B, N]`` is passed through; without it ``unit_mask [B, (T,) U]``; else all True.

        Raises:
            RecordError: a re-scoring key is missing.
        """
        log_prob = self._log_prob(*self._flatten(batch)).reshape(batch["observation"].shape[0], -1)
        return UnitLogProb(log_prob, self._mask(batch, log_prob), self.exact)

    def nll(self, batch: TensorDictBase, generator: torch.Generator | None = None) -> Tensor:
        """Supervised loss ``[B, N']`` of ``action [B, (T,) a]`` given ``observation [B, (T,) d]``.

        ``N'`` is ``T`` (1 without a time axis) times the entries a step of this policy has. ``generator`` feeds the
        noise of flow and diffusion losses; :attr:`generator` if None.
        """
        observation, action = batch["observation"], batch["action"]
        rows, steps = observation.shape[0], observation.ndim - 1
        flat = self.normalize(self._raw(observation.reshape(-1, observation.shape[-1])))
        action = action if self.space.action.choices else self._real(action)
        loss = self._nll(flat, action.flatten(0, steps - 1), self.generator if generator is None else generator)
        return loss.reshape(rows, -1)

    def _real(self, values: Tensor) -> Tensor:
        """NumPy's float64, and integers, in the dtype of the weights."""
        usual = values.is_floating_point() and values.dtype != torch.float64
        return values if usual else values.to(next(self.parameters()).dtype)

    def _raw(self, rows: Tensor) -> Tensor:
        """Observations as rows have them: bytes stay bytes."""
        return rows if self.encoder is not None else self._real(rows)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.parameters()).device
        return device

    def update_normalizer(self, observation: Tensor) -> None:
        """Adds raw ``observation [..., d]``, on any device, to the running moments; nothing to do without them."""
        if isinstance(self.normalizer, RunningNormalizer):
            self.normalizer.update(self.layout.unpack(observation.to(self.device))[0])

    def end_pretraining(self) -> None:
        """Fixes what pre-training made and reinforcement learning must not move; calling it again changes nothing.

        Moments that pre-trained weights were fitted under stay as they are, as dataset statistics do in "Diffusion
        Policy Policy Optimization" (arXiv:2409.00588): other moments would be another policy, unbounded by any clip.
        """
        self.freeze_moments()

    def freeze_moments(self) -> None:
        """Keeps the observation moments as they are from now on, if there are any and they have seen data."""
        if isinstance(self.normalizer, RunningNormalizer):
            self.normalizer.freeze()

    def normalize(self, observation: Tensor, moments: Tensor | None = None) -> Tensor:
        """The observation ``[..., d]`` as the network sees it, by the moments of those numbers, else those in use.

        With images it is the encoder's result, with gradients.
        """
        if self.encoder is None:
            return observation if self.normalizer is None else self.normalizer(observation, moments)
        numbers, images = self.layout.unpack(observation)
        numbers = numbers if self.normalizer is None else self.normalizer(numbers, moments)
        return self.encoder(numbers, images)  # type: ignore[no-any-return]

    def keep_seen(self, rows: TensorDictBase) -> None:
        """Writes what the network sees of ``rows`` into them, as no step of an update changes it; images aside.

        :meth:`log_prob` and the like then need not standardise the same observations at every optimiser step.
        """
        if self.normalizer is not None and self.encoder is None:
            seen = self._observed(rows)
            rows[seen_by(self)] = seen.reshape(*rows["observation"].shape[:-1], seen.shape[-1])

    def to_env(self, normalized: Tensor) -> Tensor:
        """From coordinates in which the bounds are -1 and 1 to the environment's, clipped to its bounds."""
        action = torch.addcmul(self.action_middle, self.action_half, normalized)
        return torch.minimum(torch.maximum(action, self.action_low), self.action_high)

    def from_env(self, action: Tensor) -> Tensor:
        """The inverse of :meth:`to_env` inside the bounds."""
        return (action - self.action_middle) / self.action_half

    def _flatten(self, batch: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """Normalised observations ``[M, d]`` and the stored keys ``[M, ...]`` of a batch with any leading shape."""
        if isinstance(batch, Tensor):
            raise RecordError(f"{type(self).__name__} needs the whole batch here, not its observations alone")
        observation = batch["observation"]
        lead = observation.ndim - 1
        stored = {key: self._stored(batch, key).flatten(0, lead - 1) for key in self.rescoring_keys}
        return self._observed(batch), stored

    def _observed(self, batch: TensorDictBase | Tensor) -> Tensor:
        """Observations ``[M, d]`` as the network saw them when it acted; those of a bare tensor as it sees them now."""
        if isinstance(batch, Tensor):
            return self.normalize(self._raw(batch.reshape(-1, batch.shape[-1])))
        seen: Tensor | None = batch.get(seen_by(self), None)
        if seen is not None:
            return seen.reshape(-1, seen.shape[-1])
        observation, moments = self._raw(batch["observation"]), batch.get(MOMENTS, None)
        return self.normalize(
            observation.reshape(-1, observation.shape[-1]), None if moments is None else moments.reshape(-1)
        )

    def _stored(self, batch: TensorDictBase, key: str) -> Tensor:
        value: Tensor | None = batch.get(key, None)
        if value is None:
            raise RecordError(
                f"{type(self).__name__} cannot score this batch: it lacks {key!r}; store all keys that sample() returns"
            )
        return value

    @staticmethod
    def _mask(batch: TensorDictBase, log_prob: Tensor) -> Tensor:
        for key in ("mask", "unit_mask"):
            mask: Tensor | None = batch.get(key, None)
            if mask is not None:
                return mask.reshape(log_prob.shape)
        return torch.ones_like(log_prob, dtype=torch.bool)
