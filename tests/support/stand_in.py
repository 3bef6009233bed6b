"""A stand-in for vLLM's server and for the judge's; as a script, for the command `vllm serve`."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# Each made-up text says how good it is; the stand-in judge prefers it in that proportion.
QUALITY = re.compile(r"worth (\d+)")
PROPER = 0.6  # of the judge's probability, what goes to the two names it may answer with


class StandIn(ThreadingHTTPServer):
    """OpenAI's endpoints on a port of this machine, with a record of the requests; its answers are
    worth ``better`` more than what the request asks for."""

    daemon_threads = True

    def __init__(self, port: int = 0, model: str = "", better: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.model, self.better = model, better
        self.completions: list[dict] = []
        self.judgments: list[dict] = []
        self.chats: list[dict] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self.reply({"object": "list", "data": [{"id": self.server.model, "object": "model"}]})

    def answer(self, prompt: str) -> str:
        return f"answer worth {int(QUALITY.search(prompt)[1]) + self.server.better}"

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/completions":
            self.server.completions.append(asked)
            choices = [
                {"index": i, "text": f" {self.answer(prompt)}\n", **ENDED}
                for i, prompt in enumerate(asked["prompt"])
            ]
        else:
            assert self.path == "/v1/chat/completions"
            prompt = asked["messages"][-1]["content"]
            if asked.get("logprobs"):
                self.server.judgments.append(asked)
                choices = [judgment(prompt)]
            else:
                self.server.chats.append(asked)
                judges = asked["messages"][0]["role"] == "system"
                text = verdict(prompt) if judges else self.answer(prompt)
                choices = [{"index": 0, "message": {"role": "assistant", "content": text}, **ENDED}]
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        answer = {"id": "1", "object": "x", "created": 0, "model": asked["model"], "usage": usage}
        self.reply(answer | {"choices": choices})

    def reply(self, content: dict) -> None:
        body = json.dumps(content).encode()
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


def verdict(prompt: str) -> str:
    """Arena-Hard's: three times as good, or more, is much better."""
    first, second = (int(worth) for worth in QUALITY.findall(prompt)[-2:])
    better = "=" if first == second else ">" if first > second else "<"
    if max(first, second) >= 3 * min(first, second):
        better *= 2
    label = f"B{'>' * len(better)}A" if "<" in better else f"A{better}B"
    return f"So it is. My final verdict is [[{label}]]."


def vllm(arguments: list[str]) -> None:
    """`vllm serve MODEL`, until it is told to end; STAND_IN says how much better each model is, and
    where to record the requests."""
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    for option in ("--served-model-name", "--port", "--max-model-len"):
        parser.add_argument(option, required=True)
    for option in ("--dtype", "--chat-template", "--tensor-parallel-size", "--generation-config"):
        parser.add_argument(option)
    given = parser.parse_args(arguments)
    told = json.loads(os.environ["STAND_IN"])
    name = given.served_model_name
    better = told["better"].get(name.rpartition("-")[0], 0)  # without the mark of the run
    with StandIn(int(given.port), name, better) as server:

        def end(*_: object) -> None:
            asked = {"completions": server.completions, "judgments": server.judgments}
            line = {"arguments": vars(given), **asked, "chats": server.chats}
            with open(told["log"], "a") as file:
                file.write(json.dumps(line) + "\n")
            os._exit(0)

        signal.signal(signal.SIGTERM, end)
        server.serve_forever()


if __name__ == "__main__":
    vllm(sys.argv[1:])
