"""What the engines behind HTTP share: answers asked for side by side, weights sent through a folder."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from unified_rl.errors import CheckpointError, ConfigError, RolloutError
from unified_rl.policies.engines.http import Server
from unified_rl.policies.engines.protocol import Answer, Call, joined
from unified_rl.policies.engines.settings import COMMANDS, EngineSettings
from unified_rl.policies.generation import Generation
from unified_rl.policies.model_folder import save_model


class Remote(ABC):
    """A server that samples.

    Weights are told apart by their content: the server calls them by :func:`digest_of`, so one that serves
    them already is not sent them again, and one that somebody else sent weights to is found out.

    Args:
        settings: of the policy.
        worker: which of its servers.

    Attributes:
        pushes: weights that were sent, since it was made.
    """

    name: str

    def __init__(self, settings: EngineSettings, worker: int = 0) -> None:
        self.settings = settings
        url = settings.servers[worker]
        self.server = Server(url, settings.server_timeout, settings.server_retries, settings.server_requests)
        # a server has one run, and a folder of its own
        place = re.sub(r"[^\w.]+", "-", url.partition("://")[2]).strip("-")
        self.folder = Path(str(settings.server_folder)) / place
        self.label = ""
        self.pushes = 0
        self._versions: dict[str, int] = {}

    @property
    def who(self) -> str:
        """Names it in errors."""
        return f"policy.engine={self.name} at {self.server.url}"

    # ------------------------------------------------------------------ what differs

    @abstractmethod
    def served(self) -> str:
        """What the server calls the weights that it has."""

    @abstractmethod
    def load(self, folder: Path, label: str) -> None:
        """Lets it load a model folder, whose weights it calls ``label`` from then on."""

    @abstractmethod
    def ask(self, prompt: Sequence[int], call: Call, seed: int) -> Answer:
        """One answer."""

    # ------------------------------------------------------------------ the protocol

    def open(self) -> None:
        """Asks the server what it serves, and makes the folder.

        Raises:
            ConfigError: it is not there, lacks an endpoint, or the folder cannot be written.
        """
        try:
            self.served()
        except RolloutError as error:
            raise ConfigError(f"{self.who} cannot be used: {error}. Start it with: {COMMANDS[self.name]}") from error
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK):
                raise PermissionError("not writable")
        except OSError as error:
            raise ConfigError(f"policy.server_folder={self.settings.server_folder} cannot be used: {error}") from error

    def push(self, policy: Any, version: int) -> None:
        """Writes the weights as safetensors and lets the server load them, unless it serves them already."""
        label = f"unified-rl-{digest_of(policy)}"
        self._versions[label] = version
        if label == self.label:
            return
        if self.served() != label:
            folder = self._write(policy, label)
            self.load(folder, label)
            self.pushes += 1
            found = self.served()
            if found != label:
                raise RolloutError(f"{self.who} was sent the weights {label} and says that it serves {found or 'none'}")
        self.label = label
        self._forget(label)

    def generate(self, call: Call) -> Generation:
        """As of the protocol; every answer is a request of its own, with a seed of its own."""
        rows, seeds = call.rows, call.seeds()

        def ask(number: int) -> Answer:
            for _ in range(self.settings.server_retries + 1):
                answer = self.ask(rows[number], call, seeds[number])
                if answer.tokens:  # one that was given up before its first token is no answer
                    break
            return answer

        return joined(self.server.each(ask, len(rows)), call, self.who)

    def close(self) -> None:
        """Forgets what the server serves."""
        self.label = ""

    # ------------------------------------------------------------------ weights

    def _write(self, policy: Any, label: str) -> Path:
        """A model folder, there as a whole or not at all."""
        target, aside = self.folder / label, self.folder / f".writing-{os.getpid()}-{label}"
        if target.is_dir():
            return target
        dtype = self.settings.engine_dtype or str(policy.model.dtype).removeprefix("torch.")
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            save_model(policy.model, policy.tokenizer, aside, merge=policy.adapted, dtype=dtype)
            os.replace(aside, target)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise CheckpointError(f"policy.server_folder: {target} could not be written: {error}") from error
        return target

    def _forget(self, label: str) -> None:
        """Removes weights of before, which no server needs any more."""
        for other in [*self.folder.glob("unified-rl-*"), *self.folder.glob(".writing-*")]:
            if other.name != label:
                with suppress(OSError):
                    shutil.rmtree(other)

    def versions(self, spans: Any, count: int) -> tuple[int, ...]:
        """The version of each of ``count`` tokens, from ``[{version, start, end}, ...]``; empty where there is none.

        Raises:
            RolloutError: the spans leave tokens out, or name weights that this run did not send.
        """
        if not spans:
            return ()
        found: list[int] = []
        try:
            for span in spans:
                if int(span["start"]) != len(found) or int(span["end"]) > count:
                    break
                found += [self._version_of(str(span["version"]))] * (int(span["end"]) - int(span["start"]))
        except (TypeError, KeyError, ValueError) as error:
            raise RolloutError(f"{self.who} answers with spans of weights that cannot be read: {spans}") from error
        if len(found) != count:
            raise RolloutError(f"{self.who} says which weights made {len(found)} of {count} tokens: {spans}")
        if str(spans[-1]["version"]) != self.label:
            raise RolloutError(
                f"{self.who} ended an answer with the weights {spans[-1]['version']}, and was sent {self.label} before "
                "it began: it acknowledges weights that it does not load"
            )
        return tuple(found)

    def _version_of(self, label: str) -> int:
        """The run's number of weights that the server names.

        Raises:
            RolloutError: this run did not send them.
        """
        if label not in self._versions:
            raise RolloutError(
                f"{self.who} answers with the weights {label}, which this run did not send: another program uses the "
                "server, or it was started anew; give every run, and every worker, a server of its own"
            )
        return self._versions[label]


def token_ids(choice: Mapping[str, Any], key: str, who: str) -> Sequence[Any]:
    """The token ids of an answer.

    Raises:
        RolloutError: there are none.
    """
    found = choice.get(key)
    if not isinstance(found, list):
        raise RolloutError(f"{who} answers without token ids ({key!r} is missing), so nothing can be trained on it")
    return found


@torch.no_grad()
def digest_of(policy: Any) -> str:
    """Sixteen letters that two policies have in common where every weight of theirs is the same, bit for bit."""
    whole = hashlib.blake2b(digest_size=8)
    for name, weight in policy.model.state_dict().items():
        whole.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        whole.update(weight.cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    return whole.hexdigest()
