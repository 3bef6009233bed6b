"""A stand-in for vLLM's server and for the judge's, and the tokenizers of both chat formats."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

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


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    with StandIn() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def with_bos(tokenizer: Tokenizer, bos: str, **names: str) -> PreTrainedTokenizerFast:
    """As both models' tokenizers do: the post-processor puts the BOS in front."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, **names)


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    """Llama 3's kind: bytes, and the header tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = "begin_of_text end_of_text start_header_id end_header_id eot_id".split()
    tokenizer.add_special_tokens([f"<|{name}|>" for name in names])
    return with_bos(tokenizer, "<|begin_of_text|>", eos_token="<|eot_id|>")


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """Mistral 7B's kind: pieces in which a space is an underline, one more in front of the text and
    of what follows a special token; Zephyr's role names are plain text."""
    specials = ["<unk>", "<s>", "</s>"]
    tokens = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.add_special_tokens(specials)
    return with_bos(tokenizer, "<s>", eos_token="</s>", unk_token="<unk>")
