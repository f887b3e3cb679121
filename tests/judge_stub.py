"""A small OpenAI-compatible server, a process of its own: what a judge or a model may do is chosen by the URL.

http://HOST:PORT/MODE/TEST/v1 behaves as MODE says; TEST keeps the counts of tests apart, which GET .../v1/counts tells.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import requests

KEY = "sk-right"
_lock = threading.Lock()
_counts: dict[str, Counter[str]] = defaultdict(Counter)
_seen: dict[str, set[str]] = defaultdict(set)
_starts: dict[str, list[float]] = defaultdict(list)
_running: Counter[str] = Counter()


def rating_of(prompt: str) -> int:
    """The rating the stub gives a prompt: any, but always the same."""
    return 1 + hashlib.sha256(prompt.encode()).digest()[0] % 10


def preference_of(prompt: str) -> float:
    """The probability of `m` that the stub gives a prompt."""
    return (1 + hashlib.sha256(prompt.encode()).digest()[0]) / 258


def _reply(text: str, request: dict[str, Any], prompt: str) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    if request.get("logprobs"):
        m = preference_of(prompt)
        top = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in (("m", m), ("M", 1 - m))]
        choice["message"]["content"] = "m" if m > 0.5 else "M"
        choice["logprobs"] = {"content": [{"token": choice["message"]["content"], "logprob": 0, "top_logprobs": top}]}
    return {"object": "chat.completion", "choices": [choice], "usage": {"total_tokens": 7}}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def _send(self, status: int, body: Any, kind: str = "application/json", **headers: str) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        with contextlib.suppress(OSError):  # a client that went away
            self.wfile.write(data)

    def do_GET(self) -> None:
        _, mode, test, *_ = self.path.split("/")
        place = f"{mode}/{test}"
        if self.path.endswith("/counts"):
            with _lock:
                self._send(200, {**_counts[place], "starts": _starts[place]})
        elif mode == "key" and self.headers.get("Authorization") != f"Bearer {KEY}":
            self._send(401, {"error": {"message": f"Incorrect API key: {self.headers.get('Authorization')}"}})
        else:
            self._send(200, {"object": "list", "data": []})

    def do_POST(self) -> None:
        _, mode, test, *rest = self.path.split("/")
        place = f"{mode}/{test}"
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = json.dumps(request["messages"], sort_keys=True)
        with _lock:
            _counts[place]["requests"] += 1
            _starts[place].append(time.monotonic())
            first = prompt not in _seen[place]
            _seen[place].add(prompt)
            nth = _counts[place]["requests"]
            _running[place] += 1
            _counts[place]["most_at_a_time"] = max(_counts[place]["most_at_a_time"], _running[place])
        try:
            self._answer(mode, "/".join(rest), request, prompt, first, nth)
        finally:
            with _lock:
                _running[place] -= 1

    def _answer(self, mode: str, path: str, request: dict[str, Any], prompt: str, first: bool, nth: int) -> None:
        rated = f"Well said. Rating: [[{rating_of(request['messages'][-1]['content'])}]]"
        if path != "v1/chat/completions":
            return self._send(404, {"detail": "Not Found"})
        match mode:
            case "slow":
                time.sleep(1.5)
            case "wide":
                time.sleep(0.05)
            case "limited" if first:
                return self._send(429, {"error": {"message": "slow down"}})
            case "closed":
                return self._send(429, {"error": {"message": "quota used up"}}, Retry_After="0")
            case "flaky" if first:
                return self._send(503, "overloaded", "text/plain")
            case "html":
                return self._send(200, "<html><body>Welcome to nginx!</body></html>", "text/html")
            case "junk":
                return self._send(200, {"choices": [{"message": {"content": None}}]})
            case "sometimes" if nth % 5 == 0:
                return self._send(400, {"error": {"message": "the prompt is too long"}})
            case "revoked" if nth > 5:
                return self._send(401, {"error": {"message": "the key was revoked"}})
            case "mute":
                rated = "I would rather not say."
            case "high":
                rated = "Rating: [[11]]"
            case "bare":
                request["logprobs"] = False
            case "echo":
                asked = [m["content"] for m in request["messages"]]
                rated = f"{len(asked)} {asked[-1][:20]} t={request.get('temperature')}"
            case "modern" if "max_tokens" in request or request.get("max_completion_tokens") != 9:
                return self._send(400, {"error": {"message": "Unsupported parameter: 'max_tokens'"}})
            case "unknown":
                return self._send(404, {"error": {"message": f"The model `{request['model']}` does not exist."}})
        self._send(200, _reply(rated, request, prompt))


class Judge:
    """The running stub, for tests."""

    def __init__(self, root: str) -> None:
        self.root = root

    def url(self, mode: str, test: str) -> str:
        return f"{self.root}/{mode}/{test}/v1"

    def counts(self, mode: str, test: str) -> dict[str, Any]:
        return dict(requests.get(f"{self.url(mode, test)}/counts", timeout=10).json())


@contextlib.contextmanager
def judge_process() -> Iterator[Judge]:
    """Run the stub as a process and stop it at the end."""
    process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Judge(f"http://127.0.0.1:{int(process.stdout.readline())}")
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
