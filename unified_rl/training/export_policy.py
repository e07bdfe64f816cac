"""A trained control policy as one file: ``observation [K, d]`` float32 to the action that the environment takes."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unified_rl import __version__
from unified_rl.errors import ConfigError
from unified_rl.files import replacing
from unified_rl.interop.words import one_line
from unified_rl.observations import layout_of
from unified_rl.policies.acting import InSpace
from unified_rl.policies.base import Policy
from unified_rl.policies.normalizer import RunningNormalizer
from unified_rl.spaces import Space

FORMATS = (".pt2", ".onnx")
TOLERANCE = 1e-5
"""How far a file's action may lie from the policy's; relative to its size where that is above 1."""
TRIED = 16
"""Random observations on which a written file is compared with the policy."""
ABOUT = "unified_rl"
"""Name of the description inside a file: JSON with ``version``, ``policy`` and ``space``."""


class FixedNormalizer(nn.Module):
    """The moments in use of a :class:`~unified_rl.policies.normalizer.RunningNormalizer`, and no others."""

    mean: Tensor
    scale: Tensor

    def __init__(self, running: RunningNormalizer) -> None:
        super().__init__()
        used = int(running.used)
        self.limit = running.limit
        self.register_buffer("mean", running.means[used].clone())
        self.register_buffer("scale", running.scales[used].clone())

    def forward(self, observation: Tensor, moments: None = None) -> Tensor:
        """``[..., d]`` to the same."""
        return ((observation - self.mean) * self.scale).clamp(-self.limit, self.limit)


class Deployed(nn.Module):
    """What a file holds: normaliser, network, bounds, and the environment's numbering, shape and dtype.

    Args:
        policy: becomes a part of it: its moments are fixed.
        space: of the environment.
    """

    def __init__(self, policy: Policy, space: Space) -> None:
        super().__init__()
        self.policy = policy.eval().requires_grad_(False)
        if isinstance(policy.normalizer, RunningNormalizer):
            policy.normalizer = FixedNormalizer(policy.normalizer)
        self.in_space = InSpace(space.action)
        _settle_switches(policy)

    def forward(self, observation: Tensor) -> Tensor:
        """``[K, d]`` float32 to ``[K, *shape]`` in the action space's dtype."""
        action: Tensor = self.in_space(self.policy.deterministic_action(observation))
        return action


def _settle_switches(policy: nn.Module) -> None:
    """Makes plain attributes of single booleans that travel with the weights: a graph takes one branch for good."""
    for module in policy.modules():
        for name, value in list(module.named_buffers(recurse=False)):
            if value.dtype == torch.bool and value.ndim == 0:
                delattr(module, name)
                setattr(module, name, bool(value))


def export_policy(policy: Any, target: Path, run: str = "the run") -> Path:
    """Writes the deterministic policy as ``.pt2`` (``torch.export.load``) or ``.onnx``, and compares it with itself.

    Input ``observation [K, d]`` float32 with any ``K``, output ``action [K, *shape]`` as
    :meth:`~unified_rl.policies.base.Policy.forward` gives it. Both hold a description (:data:`ABOUT`).

    Args:
        policy: as ``load_policy`` gives it; it is used up.
        target: the file; its ending says which format.
        run: what errors call its run.

    Raises:
        ConfigError: a policy that cannot be exported, a missing package, or a file that says something else.
        CheckpointError: the file cannot be written.
    """
    if not isinstance(policy, Policy):
        name = type(getattr(policy, "policy", policy)).__name__
        raise ConfigError(
            f"{run} trained a {name}, which cannot be exported: classes derived from unified_rl.Policy can, whose "
            f"deterministic action is one graph; act with unified_rl.load_policy({run!r}) instead"
        )
    if target.suffix == ".onnx":
        _require_onnx(target)
    shape = layout_of(policy.acts_in.observation).plain or ()
    if len(shape) != 1:
        raise ConfigError(
            f"{run} sees {policy.acts_in.observation.describe()}, and files are written of policies that see one "
            f"vector: act with unified_rl.load_policy({run!r}) instead, or train with env.flatten=true"
        )
    space, about = policy.acts_in, {"version": __version__, "policy": type(policy).__name__}
    rows = _rows(policy, space)
    expected = policy(rows)
    module = Deployed(policy, space)
    text = json.dumps({**about, "space": space.plain()})
    write = _write_onnx if target.suffix == ".onnx" else _write_torch
    with quiet(), replacing(target) as aside:
        try:
            write(module, rows[:2], aside, text)
        except OSError:
            raise
        except Exception as error:  # whatever a policy of somebody else does that no graph holds
            raise ConfigError(f"{run}: {about['policy']} cannot be exported: {one_line(error)[:300]}") from error
        for name, found in _answers(aside, target.suffix, rows):
            _compare(found, expected, f"{target} ({name})")
    return target


def _rows(policy: Policy, space: Space) -> Tensor:
    """Observations ``[TRIED, d]`` around what the policy has seen."""
    noise = torch.randn(TRIED, space.observation_dim, generator=torch.Generator().manual_seed(0))
    if isinstance(policy.normalizer, RunningNormalizer):
        return (noise * policy.normalizer.var.sqrt() + policy.normalizer.mean).float()
    return noise


def _compare(found: Tensor, expected: Tensor, what: str) -> None:
    error = (found.double() - expected.double()).abs() / expected.double().abs().clamp(min=1.0)
    if found.dtype != expected.dtype or found.shape != expected.shape or not bool((error < TOLERANCE).all()):
        raise ConfigError(f"{what} does not act as the policy does: an action is off by {float(error.max()):.1e}")


def _write_torch(module: nn.Module, rows: Tensor, path: Path, about: str) -> None:
    program = torch.export.export(module, (rows,), dynamic_shapes=({0: torch.export.Dim("K")},))
    with open(path, "wb") as handle:
        torch.export.save(program, handle, extra_files={ABOUT: about})


def _write_onnx(module: nn.Module, rows: Tensor, path: Path, about: str) -> None:
    written = torch.onnx.export(
        module,
        (rows,),
        dynamo=True,
        dynamic_shapes=({0: "K"},),
        input_names=["observation"],
        output_names=["action"],
        verbose=False,
    )
    assert written is not None
    written.model.metadata_props[ABOUT] = about
    written.save(str(path), external_data=False)


def _answers(path: Path, suffix: str, rows: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What the file says, to all rows and to the first alone."""
    if suffix == ".pt2":
        with open(path, "rb") as handle:
            run = torch.export.load(handle).module()
        yield "torch.export", torch.cat([run(rows[:1]), run(rows[1:])])
        return
    try:
        import onnxruntime
    except ImportError:
        return
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    parts = [session.run(None, {"observation": part.numpy()})[0] for part in (rows[:1], rows[1:])]
    yield "onnxruntime", torch.from_numpy(np.concatenate(parts))


def _require_onnx(target: Path) -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{target} needs the package {error.name!r}: pip install 'unified-rl[onnx]'") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the exporters' own remarks away from the command line."""
    names = ("torch.export", "torch.onnx", "onnxscript", "onnx_ir")
    levels: Mapping[str, int] = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
