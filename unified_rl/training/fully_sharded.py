"""A run in processes of which each holds a piece of the weights, as one of them sees it: ``learner=fsdp``."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from unified_rl.errors import CheckpointError, ConfigError, NonFiniteError, PeerError, UnifiedRLError
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.policies.token_critic import TokenCritic
from unified_rl.protocols import HoldsModels
from unified_rl.shard import in_pieces
from unified_rl.stopping import Interrupted, StopSignal
from unified_rl.training import pieces
from unified_rl.training.memory_plan import MemoryPlan
from unified_rl.training.ranks import Launched, ProcessShard, digest
from unified_rl.training.state import load_state, pack
from unified_rl.training.stored import write_pieces


class PieceShard(ProcessShard):
    """A process whose passes gather weights from the others, so that all must make equally many."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.in_step = True

    def sum_gradients(self, parameters: Any) -> None:
        """Those of weights in pieces are summed in the backward pass already."""
        super().sum_gradients([x for x in parameters if not in_pieces(x)])


class FullySharded(Launched):
    """As :class:`Launched`, but weights, gradients and moments of models are in pieces.

    Process 0 keeps the policy that samples beside its pieces, whole. Where it reads or writes a checkpoint by itself,
    it says so to the others, which wait for a word of it, and each reads or writes what it holds.
    """

    shard_class = PieceShard
    reads_pieces = True

    def __init__(self, timeout: float, device: str) -> None:
        super().__init__(timeout, device)
        self.mesh = init_device_mesh("cuda" if device == "cuda" else "cpu", (self.shard.world,))
        self.agent: Any = None
        self.whole: Any = None
        self.modules: list[CausalLM | TokenCritic] = []
        self._served = False

    # ------------------------------------------------------------------ building

    def enlist(self, agent: Any, name: str) -> None:
        """As of :class:`Launched`.

        Raises:
            ConfigError: it holds models that are not cut.
        """
        if not isinstance(agent, HoldsModels) or not isinstance(agent.policy, CausalLM):
            raise ConfigError(
                f"learner=fsdp cuts language models in pieces, and agent={name} trains a "
                f"{type(getattr(agent, 'policy', None)).__name__}: set learner=data_parallel"
            )
        wrapper = getattr(agent, "wrapper", None)
        if wrapper is not None and wrapper.reads_weights:
            raise ConfigError(
                f"correction {wrapper.correction.name} reads whole weights or their gradients, and learner=fsdp holds "
                "pieces of them: set learner=data_parallel, or another correction"
            )
        if getattr(getattr(agent, "anchors", None), "versions", None) is not None:
            raise ConfigError(
                "correction.proximal.provider=versions keeps whole weights of several versions, and learner=fsdp holds "
                "pieces of them: set learner=data_parallel, or correction=decoupled_ppo, which keeps none"
            )
        if getattr(agent, "reward_model", None) is not None:
            raise ConfigError(
                "agent.reward_model is a whole model in every process, and learner=fsdp holds pieces: "
                "set learner=data_parallel, or agent.reward_model=null"
            )
        if getattr(agent, "compiled", False):
            raise ConfigError(
                "agent.compile and agent.cuda_graph take a pass as one piece, and learner=fsdp gathers weights inside "
                "it: set both to false, or learner=data_parallel"
            )
        found = type(agent.optimizer.adam).__name__
        if found not in ELEMENTWISE:
            raise ConfigError(
                f"agent.optimizer={found.lower()} looks at whole matrices, or is not known not to, and learner=fsdp "
                f"holds pieces of them: use {', '.join(x.lower() for x in ELEMENTWISE)}, or learner=data_parallel"
            )
        super().enlist(agent, name)

    def part_of(self, plan: MemoryPlan) -> MemoryPlan:
        """As of :class:`Launched`, with what is in pieces; process 0 has its pieces of the policy beside it."""
        plan, world = super().part_of(plan), self.shard.world
        held = []
        for part in plan.held:
            why = f"{part.why}; one of {world} pieces"
            if part.name in CUT:
                part = dataclasses.replace(part, size=part.size / world, why=why)
            held.append(part)
            if part.name == "weights" and self.leads:
                held.append(dataclasses.replace(part, name="their pieces", size=part.size / world, why=why))
        return dataclasses.replace(plan, held=tuple(held))

    def trained(self, policy: Any) -> Any:
        """What becomes the policy in pieces: beside the whole one where rows are sampled, else in its place."""
        return copy.deepcopy(policy) if self.leads else policy

    def place(self, agent: Any, policy: Any) -> None:
        """Cuts the models of an agent, whose weights become those of process 0.

        Args:
            agent: that nothing has been loaded into yet.
            policy: that samples.
        """
        self.agent, self.whole = agent, policy if self.leads else None
        models = agent.models()
        self.modules = [x for x in models if isinstance(x, CausalLM | TokenCritic)]
        before = [(module, dict(module.named_parameters())) for module in self.modules]
        for module in self.modules:
            for x in (*module.parameters(), *module.buffers()):
                self.shard.broadcast(x.detach())
        for module in self.modules:
            pieces.cut(module, self.mesh)
        exchanged = {
            id(old): new
            for module, olds in before
            for (name, new) in module.named_parameters()
            if (old := olds[name]) is not new
        }
        agent.optimizer.exchange(exchanged, pieces.placed)
        agent.optimizer.clip = pieces.clip
        agent.optimizer.adam.register_step_post_hook(lambda *unused: pieces.release(self.modules))
        for module in self.modules:
            pieces.put_together(module, agent.policy)

    # ------------------------------------------------------------------ the policy that samples

    @torch.no_grad()
    def updated(self, agent: Any) -> None:
        """Gives process 0 the newest weights whole, one tensor at a time."""
        pieces.release(self.modules)
        whole = dict(self.whole.named_parameters()) if self.leads else {}
        with self.shard.sending():
            for name, x in agent.policy.named_parameters():
                if x.requires_grad:
                    found = x.full_tensor() if isinstance(x, DTensor) else x
                    if self.leads:
                        whole[name].copy_(found)

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Within it, a message that fails inside a pass says who is gone."""
        try:
            yield
        except UnifiedRLError:
            raise
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and not any(word in str(error) for word in LOST):
                raise
            raise self.lost(error) from error

    # ------------------------------------------------------------------ checkpoints

    def heard(self, told: str) -> bool:
        """As of :class:`Launched`."""
        job = json.loads(told)
        if "done" in job:
            self._served = True
        elif "save" in job:
            self._write(Path(job["save"]), {"agent": self.agent.state_dict()})
        else:
            with self._alike("read the checkpoint"):
                self._read(self.agent, load_state(self._seen(Path(job["load"])), whole=False)["agent"])
        return not self._served

    @staticmethod
    def _seen(path: Path) -> Path:
        if not path.is_dir():
            raise CheckpointError(
                f"this process does not see {path}: the run's folder must be on a disk that all processes share"
            )
        return path

    def write(self, aside: Path, state: dict[str, Any]) -> None:
        """Process 0 writes a checkpoint: every process its pieces.

        Raises:
            CheckpointError: one of them could not; names it.
        """
        self.ask({"save": str(aside.resolve())})
        self._write(aside, {"agent": state["agent"]})

    def _write(self, aside: Path, state: dict[str, Any]) -> None:
        with self._alike("write its pieces"):
            tensors: dict[str, Tensor] = {}
            pack(state, tensors)
            held = {name: pieces.own_piece(x) for name, x in tensors.items() if isinstance(x, DTensor)}
            write_pieces(self._seen(aside), self.shard.rank, held)

    @contextmanager
    def _alike(self, what: str) -> Iterator[None]:
        """What all processes do by themselves; where one of them fails, process 0 says which, and all know."""
        failed, raised = "", None
        try:
            yield
        except Exception as error:
            failed, raised = " ".join(str(error).split())[:500] or type(error).__name__, error
        told = [json.loads(text) for text in self.shard.texts(json.dumps(failed))]
        if raised is not None and (self.leads or not isinstance(raised, UnifiedRLError)):
            raise raised
        for rank, reason in enumerate(told):
            if reason and self.leads:
                raise CheckpointError(f"process {rank} could not {what}: {reason}")

    def load(self, agent: Any, state: Any, folder: Path) -> None:
        """Process 0 goes on from a checkpoint: every process reads its pieces."""
        self.ask({"load": str(folder.resolve())})
        with self._alike("read the checkpoint"):
            self._read(agent, state)

    def _read(self, agent: Any, state: Any) -> None:
        pieces.release(self.modules)
        agent.load_state_dict(pieces.fitted(state, agent.state_dict(), agent.optimizer.placed))

    def state_for(self, agent: Any) -> Any:
        """The agent's state without its pieces."""
        pieces.release(self.modules)
        return pieces.plain(agent.state_dict())

    def take_over(self, agent: Any, state: Any) -> None:
        """Takes over process 0's state, but for the pieces."""
        pieces.release(self.modules)
        agent.load_state_dict(pieces.merged(state, agent.state_dict()))

    def digest(self, agent: Any) -> int:
        """Of what all processes hold whole."""
        pieces.release(self.modules)
        return digest([x for x in agent.weights() if not in_pieces(x)])

    # ------------------------------------------------------------------ how it ends

    def agree(self, stop: StopSignal, trainer: Any) -> None:
        """As of :class:`Launched`; the state that an interrupted run goes on from is saved while all are there."""
        try:
            super().agree(stop, trainer)
        except Interrupted:
            if self.leads:
                trainer.save_if_new()
            self.serve()
            raise

    def serve(self, error: BaseException | None = None) -> None:
        """Others than process 0 do what it asks for until it has nothing more: behind the last update, or a NaN.

        A loss that is not finite is met by all alike; behind any other error they do not stand where process 0 does.
        """
        if self.leads:
            if error is None:
                self.ask({"done": True})
            return
        if error is None or isinstance(error, NonFiniteError):
            self._served = False
            try:
                while not self._served and self.announced():
                    pass
            except (PeerError, Interrupted):
                if error is None:
                    raise


CUT = ("critic", "other policies", "gradients", "optimiser")
"""Parts of a plan of memory."""
ELEMENTWISE = ("AdamW", "Adam", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "SGD")
"""Optimisers whose step of a number depends on that number's gradients alone."""
LOST = ("onnection", "gloo", "NCCL", "imed out", "Socket")
"""Words in the errors of a message that another process did not answer."""
