"""A small server with a real model behind it, that speaks as vLLM and as SGLang do, and can be wrong in every way.

Sampling is written out here as in a textbook, apart from the library's own transform.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


def transformed(logits: Tensor, seen: list[int], asked: dict[str, Any]) -> Tensor:
    """Log-probs ``[V]`` of the sampling distribution: penalty, temperature, top-k, top-p or min-p."""
    logits = logits.clone()
    penalty = asked.get("repetition_penalty", 1.0)
    for token in set(seen):
        logits[token] = logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
    probability = (logits / asked["temperature"]).softmax(-1)
    order = probability.argsort(descending=True).tolist()
    top_k = asked.get("top_k", 0)
    order = order[:top_k] if top_k > 0 else order
    whole, mass, kept = float(probability[order].sum()), 0.0, []
    for token in order:
        if mass >= asked.get("top_p", 1.0) * whole:
            break
        kept.append(token)
        mass += float(probability[token])
    least = asked.get("min_p", 0.0) * float(probability.max())
    kept = [token for token in kept if float(probability[token]) >= least]
    out = torch.full_like(probability, float("-inf"))
    out[kept] = (probability[kept] / probability[kept].sum()).log()
    return out


class EngineServer:
    """Serves the model of a folder until the block ends.

    Attributes:
        mode: in which way it is wrong; "" is right.
        busy: requests that are answered with 503 before any other is.
        seen: how often each address was asked for.
        asked: bodies of the generation requests.
        version: what it calls its weights.
    """

    def __init__(self, folder: Path, mode: str = "", busy: int = 0, port: int = 0) -> None:
        self.mode, self.busy, self.version = mode, busy, "from-the-folder"
        self.seen: Counter[str] = Counter()
        self.asked: list[dict[str, Any]] = []
        self.ids: set[str] = set()
        self.key: str | None = None
        self.before = ""
        self.released = threading.Event()
        self._lock = threading.Lock()
        self.model: Any = None
        self.folder = folder
        handler = type("Handler", (Handler,), {"owner": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> EngineServer:
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *unused: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.released.set()
        self.http.shutdown()
        self.http.server_close()

    def load(self, folder: Path) -> None:
        self.folder, self.model = folder, None  # read when it is first sampled from

    @torch.no_grad()
    def sample(self, prompt: list[int], asked: dict[str, Any], count: int, seed: int) -> tuple[list[int], list[float]]:
        """Ids and log-probs, up to and with a stop id."""
        asked = dict(asked)
        if self.mode == "no_temperature":
            asked["temperature"] = 1.0
        if self.mode == "generation_config":
            asked["top_p"] = 0.5
        stream = torch.Generator().manual_seed(seed)
        ids, log_probs = list(prompt), []
        with self._lock:
            if self.model is None:
                self.model = AutoModelForCausalLM.from_pretrained(str(self.folder)).eval()
            while len(log_probs) < count:
                logits = self.model(torch.tensor([ids])).logits[0, -1].float()
                out = transformed(logits, ids, asked)
                token = int(torch.multinomial(out.exp(), 1, generator=stream))
                log_probs.append(float((logits.log_softmax(-1) if self.mode == "raw" else out)[token]))
                ids.append(token)
                if token in asked["stop_token_ids"] and self.mode != "ignores_stops":
                    break
        return ids[len(prompt) :], log_probs

    def answer(self, prompt: list[int], asked: dict[str, Any], count: int, seed: int) -> dict[str, Any]:
        """What both kinds of server tell in their own form."""
        with self._lock:
            self.asked.append(asked)
            number = len(self.asked)
        if self.mode == "half":
            count = min(count, 2)
        tokens, log_probs = self.sample(prompt, asked, count, seed)
        reason = "stop" if tokens[-1] in asked["stop_token_ids"] else "abort" if self.mode == "half" else "length"
        if self.mode == "nothing_first" and number == 1:
            tokens, log_probs, reason = [], [], "abort"
        if self.mode == "miscount":
            log_probs.append(-1.0)
        if self.mode in ("nan", "inf", "none", "word"):
            log_probs[-1] = {"nan": float("nan"), "inf": float("-inf"), "none": None, "word": "x"}[self.mode]  # type: ignore
        if self.mode == "foreign":
            tokens[-1] = 10**6
        if self.mode == "own_end":
            reason = "stop"
        spans = [{"version": self.version, "start": 0, "end": len(tokens)}]
        if self.mode == "mixed" and len(tokens) > 1:
            spans = [
                {"version": self.before, "start": 0, "end": 1},
                {"version": self.version, "start": 1, "end": len(tokens)},
            ]
        if self.mode == "another_run":
            spans[-1]["version"] = "unified-rl-of-somebody-else"
        if self.mode == "old_span":
            spans[-1]["version"] = self.before
        if self.mode == "short_span":
            spans[-1]["end"] = len(tokens) - 1
        return {"tokens": tokens, "log_probs": log_probs, "reason": reason, "spans": spans}


class Handler(BaseHTTPRequestHandler):
    """The endpoints."""

    owner: EngineServer
    protocol_version = "HTTP/1.1"
    wbufsize = 2**16  # headers and body in one packet

    def log_message(self, *unused: object) -> None:
        pass

    def _send(self, value: Any, status: int = 200) -> None:
        data = b"" if value is None else value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self._handle({})

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._handle(json.loads(data) if data else {})

    def _handle(self, body: dict[str, Any]) -> None:
        owner, path = self.owner, urlsplit(self.path).path
        with owner._lock:
            owner.seen[path] += 1
            owner.key = self.headers.get("Authorization")
            busy, owner.busy = owner.busy > 0, max(0, owner.busy - 1)
        with suppress(BrokenPipeError, ConnectionResetError):
            if busy:
                return self._send({"error": "loading"}, 503)
            route = getattr(self, f"_{path.strip('/').replace('/', '_')}", None)
            if route is None or (owner.mode == "no_dev" and path == "/weight_info"):
                return self._send({"error": "not found"}, 404)
            generates = path in ("/inference/v1/generate", "/generate")
            if generates and owner.mode == "hang":
                owner.released.wait(20)
            if generates and owner.mode == "dies" and owner.seen[path] > 3:
                threading.Thread(target=owner.stop, daemon=True).start()
                time.sleep(0.05)
                self.close_connection = True
                return None
            if generates and owner.mode == "no_json":
                return self._send(b"<html>")
            route(body)

    # ------------------------------------------------------------------ vLLM

    def _weight_info(self, body: dict[str, Any]) -> None:
        self._send({"weight_version": self.owner.version})

    def _pause(self, body: dict[str, Any]) -> None:
        self._send({"status": "paused"})

    def _resume(self, body: dict[str, Any]) -> None:
        self._send({"status": "resumed"})

    def _reset_prefix_cache(self, body: dict[str, Any]) -> None:
        self._send(None)

    def _collective_rpc(self, body: dict[str, Any]) -> None:
        assert body["method"] == "reload_weights"
        folder = Path(body["kwargs"]["weights_path"])
        if not (folder / "model.safetensors").is_file() or self.owner.mode == "cannot_load":
            return self._send({"error": f"no weights in {folder}"}, 500)
        if self.owner.mode != "stale":
            self.owner.load(folder)
        self._send({"results": [None]})

    def _update_weight_version(self, body: dict[str, Any]) -> None:
        self.owner.before, self.owner.version = self.owner.version, body["new_version"]
        self._send({"success": True})

    def _inference_v1_generate(self, body: dict[str, Any]) -> None:
        asked = body["sampling_params"]
        assert (asked["n"], asked["logprobs"]) == (1, 0)
        if body["request_id"] in self.owner.ids:
            return self._send({"error": "this request id is in use"}, 400)
        self.owner.ids.add(body["request_id"])
        told = self.owner.answer(body["token_ids"], asked, asked["max_tokens"], asked["seed"])
        pairs = zip(told["tokens"] + [0], told["log_probs"], strict=False)
        choice = {
            "index": 0,
            "token_ids": told["tokens"],
            "logprobs": {"content": [{"token": f"token_id:{token}", "logprob": value} for token, value in pairs]},
            "weight_versions": told["spans"],
            "finish_reason": told["reason"],
        }
        if self.owner.mode == "no_log_probs":
            choice["logprobs"] = None
        if self.owner.mode == "text":
            choice = {"index": 0, "text": "hello", "finish_reason": "stop"}
        self._send({"request_id": body["request_id"], "choices": [choice]})

    # ------------------------------------------------------------------ SGLang

    def _model_info(self, body: dict[str, Any]) -> None:
        self._send({"weight_version": self.owner.version})

    def _update_weights_from_disk(self, body: dict[str, Any]) -> None:
        folder = Path(body["model_path"])
        if not (folder / "model.safetensors").is_file() or self.owner.mode == "cannot_load":
            return self._send({"success": False, "message": f"no weights in {folder}"}, 400)
        if self.owner.mode != "stale":
            self.owner.load(folder)
        self.owner.before, self.owner.version = self.owner.version, body["weight_version"]
        self._send({"success": True, "message": "Succeeded to update model weights."})

    def _generate(self, body: dict[str, Any]) -> None:
        asked = body["sampling_params"]
        assert body["return_logprob"] and asked["top_p"] == 1 and asked["top_k"] == -1
        told = self.owner.answer(body["input_ids"], asked, asked["max_new_tokens"], asked["sampling_seed"])
        pairs = zip(told["log_probs"], told["tokens"] + [0], strict=False)
        meta = {
            "output_token_logprobs": [[value, token, None] for value, token in pairs],
            "finish_reason": {"type": told["reason"]},
            "weight_version": self.owner.version,
            "weight_versions": told["spans"],
        }
        if self.owner.mode == "no_log_probs":
            del meta["output_token_logprobs"]
        answer: dict[str, Any] = {"output_ids": told["tokens"], "meta_info": meta}
        if self.owner.mode == "text":
            answer = {"text": "hello", "meta_info": meta}
        self._send(answer)
