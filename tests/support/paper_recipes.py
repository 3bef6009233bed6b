"""What the paper's recipes have in common in every host that has YAMLs of its own: the paper's
values, and what the files' headers and comments contain."""

from __future__ import annotations

import math
import re
from pathlib import Path

from formats import PAIRS, llama3_prompt, zephyr_prompt

# The paper, section 4 and appendix C: model, data, learning rate; scores of Table 1: AlpacaEval 2.0
# WR and LC, Arena-Hard WR. Then the length, which the paper leaves to SimPO's and Zephyr's settings.
PAPER = {
    "llama3": ("meta-llama/Meta-Llama-3-8B-Instruct", "princeton-nlp/llama3-ultrafeedback-armorm",
               6e-7, ["49.8", "54.7", "34.6"], 2048),
    "mistral": ("HuggingFaceH4/mistral-7b-sft-beta", "trl-lib/ultrafeedback_binarized",
                5e-7, ["20.4", "23.9", "17.1"], 1024),
}  # fmt: skip
# By the formats' rules, how a prompt of one turn begins, and what ends an answer.
WRITE = {"llama3": (llama3_prompt, "<|eot_id|>"), "mistral": (zephyr_prompt, "</s>")}
# The files, without their suffix.
OF_THE_PAPER = ["llama3_focalpo", "llama3_focalpo_lora", "mistral_focalpo", "mistral_focalpo_lora"]
LORA_RANK = 128
# Billions of weights; layers, size of hidden states, of the MLP's, and of all keys (config.json).
_SIZES = {"llama3": (8.030, 32, 4096, 14336, 1024), "mistral": (7.242, 32, 4096, 14336, 1024)}


def model_of(name: str) -> str:
    return name.split("_")[0]


def header(recipe: Path) -> str:
    lines = recipe.read_text().split("\n\n")[0].splitlines()
    return " ".join(" ".join(line.lstrip("#") for line in lines).split())


def check_header(recipe: Path) -> None:
    """The licence, the first loss, the steps of an epoch, the scores; the sizes in GB, by the weights
    in bf16 and by AdamW's state with a master copy, or with an adapter's gradients."""
    text, name, lora = header(recipe), recipe.stem, recipe.stem.endswith("lora")
    assert ("Meta Llama 3 Community License" in text) == name.startswith("llama3")
    assert f"{2**-0.05 * math.log(2):.4f}" in text
    assert f"about {PAIRS[PAPER[model_of(name)][1]] / 128:.0f} steps" in text
    assert re.findall(r"(?:WR|LC) (\d+\.\d)", text) == ([] if lora else PAPER[model_of(name)][3])
    weights, layers, hidden, inner, keys = _SIZES[model_of(name)]
    pairs = [(hidden, hidden)] * 2 + [(hidden, keys)] * 2 + [(hidden, inner)] * 3
    adapter = layers * LORA_RANK * sum(a + b for a, b in pairs) / 1e9
    of_lora = {f"{2 * weights:.1f}", f"{16 * adapter:.1f}", f"{12 * adapter:.0f}"}
    sizes = {*re.findall(r"([\d.]+) GB", text)} - {"40", "80"}  # of the GPUs
    assert sizes == (of_lora if lora else {f"{14 * weights:.0f}"})


def check_sources(recipe: Path, without: set[str]) -> None:
    """Every value has its source beside it, but those of the keys ``without``; and every source is
    explained in the header."""
    top, *body = recipe.read_text().split("\n\n")
    used = set()
    for line in "\n".join(body).splitlines():
        sources = re.findall(r"\[([\w, ]+)\]", line.partition("#")[2])
        used |= {source for group in sources for source in group.split(", ")}
        key = re.match(r"(\w+): \S", line)
        assert not key or sources or key[1] in without, f"no source beside {line!r}"
    assert used == {*re.findall(r"\[(\w+)\]", top)}
