"""What the paper's recipes have in common in every host that has YAMLs of its own: the paper's
values, and what the files' headers and comments contain."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import NamedTuple

from formats import PAIRS, llama3_prompt, zephyr_prompt


class OfPaper(NamedTuple):
    """The paper, section 4 and appendix C; the scores are Table 1's: AlpacaEval 2.0 WR and LC,
    Arena-Hard WR.  It leaves the length to SimPO's and Zephyr's settings."""

    model: str
    data: str
    rate: float
    scores: list[str]
    length: int


PAPER = {
    "llama3": OfPaper(
        "meta-llama/Meta-Llama-3-8B-Instruct", "princeton-nlp/llama3-ultrafeedback-armorm",
        6e-7, ["49.8", "54.7", "34.6"], 2048,
    ),
    "mistral": OfPaper(
        "HuggingFaceH4/mistral-7b-sft-beta", "trl-lib/ultrafeedback_binarized",
        5e-7, ["20.4", "23.9", "17.1"], 1024,
    ),
}  # fmt: skip
# By the formats' rules, how a prompt of one turn begins, and what ends an answer.
WRITE = {"llama3": (llama3_prompt, "<|eot_id|>"), "mistral": (zephyr_prompt, "</s>")}
# The files, without their suffix.
OF_THE_PAPER = ["llama3_focalpo", "llama3_focalpo_lora", "mistral_focalpo", "mistral_focalpo_lora"]
LORA_RANK = 128
# What the config.json of each model has: layers; sizes of the hidden states, of the MLP's, and of all
# keys; vocabulary. None ties its embeddings.
SHAPES = {
    "llama3": (32, 4096, 14336, 1024, 128_256),
    "mistral": (32, 4096, 14336, 1024, 32_000),
    "qwen3": (36, 4096, 12288, 1024, 151_936),
}


def model_of(name: str) -> str:
    return name.split("_")[0]


class Weights(NamedTuple):
    """Numbers of a model's weights."""

    linear: int
    embeddings: int
    adapter_of_rank_1: int

    @property
    def all(self) -> int:
        return self.linear + self.embeddings


def weights_of(model: str) -> Weights:
    layers, hidden, inner, keys, vocabulary = SHAPES[model]
    shapes = [(hidden, hidden)] * 2 + [(hidden, keys)] * 2 + [(hidden, inner)] * 3
    return Weights(
        layers * sum(a * b for a, b in shapes),
        2 * vocabulary * hidden,
        layers * sum(a + b for a, b in shapes),
    )


def header(recipe: Path) -> str:
    lines = recipe.read_text().split("\n\n")[0].splitlines()
    return " ".join(" ".join(line.lstrip("#") for line in lines).split())


def check_header(recipe: Path) -> None:
    """The licence, the first loss, the steps of an epoch, the scores; the sizes in GB, by the weights
    in bf16 and by AdamW's state with a master copy, or with an adapter's gradients."""
    text, name, lora = header(recipe), recipe.stem, recipe.stem.endswith("lora")
    assert ("Meta Llama 3 Community License" in text) == name.startswith("llama3")
    assert f"{2**-0.05 * math.log(2):.4f}" in text
    paper, weights = PAPER[model_of(name)], weights_of(model_of(name))
    assert f"about {PAIRS[paper.data] / 128:.0f} steps" in text
    assert re.findall(r"(?:WR|LC) (\d+\.\d)", text) == ([] if lora else paper.scores)
    whole, adapter = weights.all / 1e9, LORA_RANK * weights.adapter_of_rank_1 / 1e9
    of_lora = {f"{2 * whole:.1f}", f"{16 * adapter:.1f}", f"{12 * adapter:.0f}"}
    sizes = {*re.findall(r"([\d.]+) GB", text)} - {"40", "80"}  # of the GPUs
    assert sizes == (of_lora if lora else {f"{14 * whole:.0f}"})


def check_sources(recipe: Path, without: set[str]) -> None:
    """Every value has its source beside it, but those of the keys ``without``; and every source is
    explained in the header."""
    top, *body = recipe.read_text().split("\n\n")
    used = set()
    for line in "\n".join(body).splitlines():
        sources = re.findall(r"\[([\w, ]+)\]", line.partition("#")[2])
        used |= {source for group in sources for source in group.split(", ")}
        key = re.match(r"[ -]*(\w+): \S", line)
        assert not key or sources or key[1] in without, f"no source beside {line!r}"
    assert used == {*re.findall(r"\[(\w+)\]", top)}
