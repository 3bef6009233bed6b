"""A stand-in for vLLM's server and for the judge's."""

from __future__ import annotations

import json
import math
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# Each made-up text says how good it is; the stand-in judge prefers it in that proportion.
QUALITY = re.compile(r"worth (\d+)")
PROPER = 0.6  # of the judge's probability, what goes to the two names it may answer with


class StandIn(ThreadingHTTPServer):
    """OpenAI's two endpoints on a free port of this machine, and what was asked of them."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.completions: list[dict] = []
        self.judgments: list[dict] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/completions":
            self.server.completions.append(asked)
            choices = [
                {"index": i, "text": f" answer worth {QUALITY.search(prompt)[1]}\n", **ENDED}
                for i, prompt in enumerate(asked["prompt"])
            ]
        else:
            assert self.path == "/v1/chat/completions"
            self.server.judgments.append(asked)
            choices = [judgment(asked["messages"][-1]["content"])]
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        answer = {"id": "1", "object": "x", "created": 0, "model": asked["model"], "usage": usage}
        body = json.dumps(answer | {"choices": choices}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


ENDED = {"finish_reason": "stop", "logprobs": None}


def judgment(prompt: str) -> dict:
    """The first text is named m, the second M; 40 % of the probability goes to other words."""
    first, second = (int(worth) for worth in QUALITY.findall(prompt)[-2:])
    shares = {"m": PROPER * first / (first + second), "M": PROPER * second / (first + second)}
    shares |= {"Both": 0.25, "The": 0.1, "I": 0.05}
    top = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in shares.items()]
    top.sort(key=lambda entry: -entry["logprob"])
    return {
        "index": 0,
        "finish_reason": "length",
        "message": {"role": "assistant", "content": top[0]["token"]},
        "logprobs": {"content": [top[0] | {"top_logprobs": top}]},
    }
