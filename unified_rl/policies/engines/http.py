"""Questions to a server in JSON: many at once, tried again where it was busy, and answers that are only data."""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, TypeVar

from unified_rl.errors import RolloutError
from unified_rl.policies.engines.settings import split_url

KEY = "UNIFIED_RL_SERVER_KEY"
"""Environment variable of an API key, sent as a bearer token."""
BUSY = (408, 425, 429, 502, 503, 504)
"""Answers after which a question is asked again."""
MOST = 64 * 2**20
"""Bytes of an answer."""
PAUSE = 0.5
"""Seconds before the second try, twice as many before each further one, at most :data:`LONGEST`."""
LONGEST = 30.0
CONNECTS = 10.0
"""Seconds until a server takes a connection."""
T = TypeVar("T")


class MissingError(RolloutError):
    """The server has no such address."""


class Server:
    """A server by its address.

    Args:
        url: ``http://HOST:PORT``, perhaps with a path before that of the endpoints.
        timeout: seconds without a sign of life after which a question counts as lost.
        retries: further tries of a question.
        at_once: questions under way.
    """

    def __init__(self, url: str, timeout: float, retries: int, at_once: int) -> None:
        self.url, self.timeout, self.retries, self.at_once = url.rstrip("/"), timeout, retries, at_once
        parts = split_url(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connect: Callable[..., http.client.HTTPConnection] = kind
        self._host, self._port, self._path = str(parts.hostname), parts.port, parts.path.rstrip("/")
        self._open: set[http.client.HTTPConnection] = set()
        self._stop = threading.Event()

    def get(self, path: str) -> dict[str, Any]:
        """The object at an address of the server; errors as of :meth:`post`."""
        return self._ask("GET", path, None)

    def post(self, path: str, body: Any = None) -> dict[str, Any]:
        """The object that the server answers with; of a question that is asked again, one answer is used.

        Args:
            path: of the endpoint.
            body: what is sent as JSON, or a function that makes it for each try.

        Raises:
            MissingError: the server does not know the address.
            RolloutError: it does not answer after all tries, refuses, or answers no JSON object.
        """
        return self._ask("POST", path, body)

    def each(self, ask: Callable[[int], T], count: int) -> list[T]:
        """``ask(0)`` to ``ask(count - 1)``, some at a time, in the order of their numbers.

        Whatever ends it early, nothing is left under way.
        """
        self._stop.clear()
        pool = ThreadPoolExecutor(min(count, self.at_once), thread_name_prefix="server")
        try:
            futures = [pool.submit(ask, number) for number in range(count)]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            failed = [future for future in futures if future in done and future.exception() is not None]
            if failed:
                failed[0].result()
            return [future.result() for future in futures]
        finally:
            self._stop.set()
            for connection in list(self._open):
                _hang_up(connection)
            pool.shutdown(wait=True, cancel_futures=True)
            self._stop.clear()

    def _ask(self, method: str, path: str, body: Any) -> dict[str, Any]:
        why = ""
        for number in range(self.retries + 1):
            if number and self._stop.wait(min(LONGEST, PAUSE * 2 ** (number - 1))):
                break
            try:
                status, data = self._once(method, path, body)
            except (OSError, http.client.HTTPException) as error:
                late = isinstance(error, TimeoutError)
                why = f"nothing within {self.timeout:g} s (policy.server_timeout)" if late else _said(error)
                continue
            if status in BUSY:
                why = f"it answered {status}: {_text(data)}"
                continue
            return self._read(status, data, path)
        raise RolloutError(
            f"the server {self.url}{path} does not answer ({why}), tried {number + 1} times "
            "(policy.server_retries): look whether it runs, and resume the run once it does"
        )

    def _once(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        connection = self._connect(self._host, self._port, timeout=min(CONNECTS, self.timeout))
        self._open.add(connection)
        try:
            sent = None if body is None else json.dumps(body() if callable(body) else body)
            connection.connect()
            connection.sock.settimeout(self.timeout)
            deadline = time.monotonic() + self.timeout
            connection.request(method, self._path + path, sent, headers)
            answer = connection.getresponse()
            data = bytearray()
            while piece := answer.read1(2**16):
                data += piece
                if len(data) > MOST:
                    raise RolloutError(f"the server {self.url}{path} answers more than {MOST // 2**20} MiB")
                if time.monotonic() > deadline:
                    raise TimeoutError
            return answer.status, bytes(data)
        finally:
            self._open.discard(connection)
            connection.close()

    def _read(self, status: int, data: bytes, path: str) -> dict[str, Any]:
        if status == 404:
            raise MissingError(f"the server {self.url} has no {path}")
        if status >= 300:
            raise RolloutError(f"the server {self.url}{path} refuses ({status}): {_text(data)}")
        if not data.strip():
            return {}
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise RolloutError(f"the server {self.url}{path} answers no JSON: {_text(data)}") from error
        if not isinstance(value, dict):
            return {"value": value}
        return value


def _hang_up(connection: http.client.HTTPConnection) -> None:
    """Wakes whoever waits for an answer."""
    with suppress(OSError, AttributeError):
        connection.sock.shutdown(socket.SHUT_RDWR)


def _text(data: bytes) -> str:
    return " ".join(data[:300].decode("utf-8", "replace").split())


def _said(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def listed(value: Any, key: str, who: str) -> Sequence[Any]:
    """A list in an answer.

    Raises:
        RolloutError: there is none.
    """
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, list):
        raise RolloutError(f"{who} lacks the list {key!r}")
    return found


def numbers(values: Sequence[Any], kind: type, what: str) -> list[Any]:
    """Numbers in an answer, all of one kind; a whole one stands for a float too.

    Raises:
        RolloutError: one is something else.
    """
    for place, value in enumerate(values):
        good = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
        if not good:
            raise RolloutError(f"{what} {place} is {json.dumps(value)[:60]}, not a number")
    return [kind(value) for value in values]
