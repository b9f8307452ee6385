"""A stand-in for an OpenAI-compatible server, on a port of this machine.

It checks requests as the real ones do and answers with what `brain` says of them, unless an act is
due: `acts` are used up one request at a time, in the order in which requests come.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Brain = Callable[[dict[str, Any]], str]


@dataclass(frozen=True)
class Act:
    """Something else than a good answer."""

    status: int = 200
    body: bytes | None = None  # None: a good answer
    headers: dict[str, str] = field(default_factory=dict)
    hang: bool = False  # say nothing until the server closes
    drip: bool = False  # one byte, then nothing


def error(status: int, message: str, code: str = "", **headers: str) -> Act:
    """An error in the form that OpenAI gives it."""
    body = {"error": {"message": message, "type": "error", "param": None, "code": code or None}}
    return Act(status, json.dumps(body).encode(), headers)


class JudgeServer(ThreadingHTTPServer):
    """Remembers what it was asked."""

    daemon_threads = True

    def __init__(self, brain: Brain, acts: list[Act], key: str, usage: bool) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.brain, self.acts, self.key, self.usage = brain, deque(acts), key, usage
        self.requests: list[dict[str, Any]] = []  # bodies, in the order in which they came
        self.most_at_once = 0
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self.now = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave in the middle are part of what is tested."""

    @property
    def url(self) -> str:
        """Base URL, as a spec names it."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: JudgeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *parts: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        """POST /v1/chat/completions."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server = self.server
        with server.lock:
            server.now += 1
            server.most_at_once = max(server.most_at_once, server.now)
            act = self.refusal(body) or (server.acts.popleft() if server.acts else Act())
            if act.body is None:
                server.requests.append(json.loads(body))
        try:
            self.play(act, body)
        finally:
            with server.lock:
                server.now -= 1

    def refusal(self, body: bytes) -> Act | None:
        """What a real server refuses before it thinks."""
        if self.path != "/v1/chat/completions":
            return error(404, f"Unknown request URL: POST {self.path}.")
        given = self.headers.get("Authorization", "")
        if self.server.key and given != f"Bearer {self.server.key}":
            return error(401, f"Incorrect API key provided: {given}.", "invalid_api_key")
        request = json.loads(body)
        roles = [message.get("role") for message in request.get("messages", ())]
        if not request.get("model") or not roles or request.get("stream") is not False:
            return error(400, "model, messages and stream=false are required")
        return None

    def play(self, act: Act, body: bytes) -> None:
        """Answer as the act says."""
        if act.hang:
            self.server.closing.wait(60)
            return
        content = json.dumps(self.good(json.loads(body))).encode() if act.body is None else act.body
        self.send_response(act.status)
        for name, value in act.headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if act.drip:
            self.wfile.write(content[:1])
            self.wfile.flush()
            self.server.closing.wait(60)
            return
        self.wfile.write(content)

    def good(self, request: dict[str, Any]) -> dict[str, Any]:
        """A chat completion."""
        text = self.server.brain(request)
        length = request.get("max_tokens") or request.get("max_completion_tokens")
        words = text.split(" ")
        cut = length is not None and len(words) > length
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": " ".join(words[:length]), "refusal": None},
            "finish_reason": "length" if cut else "stop",
            "logprobs": None,
        }
        if request.get("logprobs"):
            # One letter, nine tenths sure.
            sure = {"token": text[:1], "logprob": -0.10536051565782628, "bytes": None}
            other = {"token": "B" if text[:1] == "A" else "A", "logprob": -2.302585092994046}
            choice["logprobs"] = {"content": [{**sure, "top_logprobs": [sure, other]}]}
        said = sum(len(message["content"].split()) for message in request["messages"])
        counted = min(len(words), length or len(words))
        usage = {
            "prompt_tokens": said,
            "completion_tokens": counted,
            "total_tokens": said + counted,
        }
        return {
            "id": "chatcmpl-0",
            "object": "chat.completion",
            "created": 1700000000,
            "model": f"{request['model']}-2026-11-01",
            "choices": [choice],
            **({"usage": usage} if self.server.usage else {}),
        }


@contextmanager
def judge_server(
    brain: Brain | str = "Good. Rating: [[7]]",
    *,
    acts: list[Act] | None = None,
    key: str = "",
    usage: bool = True,
) -> Iterator[JudgeServer]:
    """A running server; `brain` is what it thinks of a request, or always says."""
    think = brain if callable(brain) else lambda request: str(brain)
    server = JudgeServer(think, acts or [], key, usage)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()
