"""``focalpo check`` on Axolotl YAMLs: what it says against what is worked out here by hand."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest
from harness import Axolotl, ManyFocalpo
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

# The tiny model: embedding (tied) 1024 x 128, four layers of attention (q and o 128 x 128, k and v
# 128 x 64), MLP 3 x 128 x 352 and two norms, and the last norm.
PARAMETERS = 1024 * 128 + 4 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 352 + 2 * 128) + 128
MODULES = ("axolotl.cli.config", "axolotl.common.datasets", "axolotl.utils.trainer")
MODULES += ("axolotl.core.builders", "focalpo_plugins.axolotl.trainer", "peft", "tqdm")

Answer = tuple[int, str, str]


def text(role: str, content: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"


class ByHand:
    """The tokens of the rows of a file, from the template as it is written out here."""

    def __init__(self, tiny: Path, data: Path, bos: str = "<|begin_of_text|>") -> None:
        self.tokenizer = Tokenizer.from_file(str(tiny / "model" / "tokenizer.json"))
        self.pairs = []
        for line in data.read_text().splitlines():
            row = json.loads(line)
            prompt = bos + text("user", row["chosen"][0]["content"])
            prompt += "<|start_header_id|>assistant<|end_header_id|>\n\n"
            sides = {}
            for side in ("chosen", "rejected"):
                answer = row[side][1]["content"] + "<|eot_id|>"
                sides[side] = (self.ids(prompt), self.ids(answer))
            self.pairs.append(sides)

    def ids(self, written: str) -> list[int]:
        return self.tokenizer.encode(written, add_special_tokens=False).ids

    def lengths(self) -> list[int]:
        return [
            len(prompt) + len(answer) for pair in self.pairs for prompt, answer in pair.values()
        ]

    def fitting(self, limit: int) -> list[dict[str, tuple[list[int], list[int]]]]:
        return [
            pair for pair in self.pairs if all(len(p) + len(a) <= limit for p, a in pair.values())
        ]


@pytest.fixture(scope="module")
def data(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pairs, one with equal answers, one with an empty answer, one too long."""
    rows = [json.loads(line) for line in (tiny / "test.jsonl").read_text().splitlines()[:13]]
    rows[10]["rejected"] = rows[10]["chosen"]
    rows[11]["chosen"][1]["content"] = ""
    rows[12]["rejected"][1]["content"] = " ".join(["word"] * 200)
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def without_weights(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(tiny / "model", folder)
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture(scope="module")
def doubling(without_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with a tokenizer that puts a BOS before every text, which the template does too."""
    folder = tmp_path_factory.mktemp("doubling") / "model"
    shutil.copytree(without_weights, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos = "<|begin_of_text|>"
    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def answers(once: Axolotl, data: Path, without_weights: Path, doubling: Path) -> dict[str, Answer]:
    zero3 = once.folder / "zero3.json"
    zero3.write_text(
        json.dumps({"zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"},
                    "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"})
    )  # fmt: skip

    def config(**changes: Any) -> Path:
        base = {
            "base_model": str(without_weights),
            "datasets": [{"path": str(data), "ds_type": "json", "split": "train",
                          "type": "chat_template.argilla_chat"}],
        }  # fmt: skip
        return once.config(**{**base, **changes})

    broken = once.folder / "broken.yml"
    broken.write_text("rl: [focalpo\n")
    lora = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16}
    lora["lora_target_modules"] = ["q_proj", "v_proj"]
    cases = {
        "plain": ["--json", config()],
        "printed": [config(), "--strict"],
        "cut by TRL": ["--json", config(skip_prepare_dataset=True, sequence_len=40)],
        "cut by Axolotl": ["--json", config(excess_length_strategy="truncate")],
        "zero 3": ["--json", "--gpus", "8", config(bf16=True, deepspeed=str(zero3))],
        "lora": ["--json", config(**lora)],
        "traps": ["--json", "--strict", config(base_model=str(doubling), rl_beta=1.0, fp16=True)],
        "dpo": ["--json", config(rl="dpo", focalpo_gamma=None, focalpo_variant=None)],
        "unknown key": [config(focalpo_gama=0.1)],
        "gamma": [config(focalpo_gamma=1.5)],
        "sft": [config(rl=None, focalpo_gamma=None, focalpo_variant=None)],
        "no file": [once.folder / "no.yml"],
        "no yaml": [broken],
        "no such pair": ["--pair", "99", config()],
    }  # fmt: skip
    # A data set's worker processes would be forked off a fork of a process that has threads.
    no_workers = {"AXOLOTL_DATASET_NUM_PROC": "0"}
    with ManyFocalpo(*MODULES, cwd=once.folder, **no_workers) as focalpo:
        return {name: focalpo("check", *map(str, words)) for name, words in cases.items()}


def read(answer: Answer) -> dict[str, Any]:
    assert answer[0] == 0, answer[2][-3000:]
    return json.loads(answer[1])


def test_the_pair_is_the_one_that_is_trained_on(answers, tiny: Path, data: Path):
    """Its tokens are those of one of the file's rows: Axolotl shuffles them."""
    shown = read(answers["plain"])["pair"]
    expected = [
        {
            side: (prompt + answer, [False] * len(prompt) + [True] * len(answer))
            for side, (prompt, answer) in pair.items()
        }
        for pair in ByHand(tiny, data).fitting(128)
    ]
    assert {side: (s["ids"], s["trained"]) for side, s in shown.items()} in expected
    assert shown["chosen"]["tokens"][0] == "<|begin_of_text|>"
    assert shown["chosen"]["tokens"][-1] == "<|eot_id|>"


def test_what_is_counted(answers, tiny: Path, data: Path):
    """13 rows, of which Axolotl drops the long one; one pair has equal answers, one an empty one.
    gamma 0.05: z* is ``logit(exp(-20))``, the first loss ``2^-0.05 ln 2``."""
    found = read(answers["plain"])
    assert (found["rows"], found["dropped"]) == (13, 1)
    counts = found["counts"]
    assert {k: counts[k] for k in ("pairs", "truncated", "identical", "empty", "doubled_bos")} == {
        "pairs": 12, "truncated": 0, "identical": 1, "empty": 1, "doubled_bos": 0,
    }  # fmt: skip
    assert counts["bos"] == counts["eos"] == {"1": 24}
    kept = ByHand(tiny, data).fitting(128)
    lengths = [len(p) + len(a) for pair in kept for p, a in pair.values()]
    trained = [len(a) for pair in kept for _, a in pair.values()]
    for key, values in (("lengths", lengths), ("trained", trained)):
        expected = {"min": min(values), "median": statistics.median(values), "max": max(values)}
        assert counts[key] == expected
    assert (found["loss"], found["beta"]) == ("focalpo", 0.1)
    assert found["z_star"] == pytest.approx(-20, abs=1e-6)
    assert found["first_loss"] == pytest.approx(2**-0.05 * math.log(2))
    # micro_batch_size 4, two accumulated, one rank.
    assert (found["batch"], found["ranks"]) == (8, 1)
    assert any("8.33 % of the pairs are identical" in warning for warning in found["warnings"])
    assert any("8.33 % of the pairs are empty" in warning for warning in found["warnings"])


def test_it_is_printed_and_strict_counts_warnings(answers):
    code, said, _ = answers["printed"]
    assert code == 1
    assert "predicted first loss 0.6695 (DPO: 0.6931)" in said
    assert "13 pairs, 1 dropped by the host (7.69 %)" in said
    assert "[<|begin_of_text|>|<|start_header_id|>|user|<|end_header_id|>|\\n\\n|" in said
    assert said.splitlines()[-1] == "2 warnings, no errors"


def test_what_is_cut_is_counted(answers, tiny: Path, data: Path):
    """At 40 tokens, without Axolotl's preparation: TRL drops prompts of 40 tokens and more, and
    cuts the rest.  At 128 with `truncate`, Axolotl cuts the one long answer."""
    by_hand = ByHand(tiny, data).pairs
    kept = [pair for pair in by_hand if len(pair["chosen"][0]) < 40]
    cut = [pair for pair in kept if any(len(p) + len(a) > 40 for p, a in pair.values())]
    assert 0 < len(cut) < len(kept)
    found = read(answers["cut by TRL"])
    assert found["rows"] - found["dropped"] == len(kept)
    assert found["counts"]["truncated"] == len(cut)
    assert found["counts"]["lengths"]["max"] == 40
    found = read(answers["cut by Axolotl"])
    assert (found["rows"], found["dropped"], found["counts"]["truncated"]) == (13, 0, 1)


def test_memory(answers):
    """Float32, one rank: 4 bytes each for weights, gradients and reference, 8 for Adam.  bf16 under
    ZeRO 3 on eight ranks: 2, 2 and 2, and 12 for Adam with its master copy, each divided by 8.
    LoRA of rank 8 on q (128 to 128) and v (128 to 64) of four layers, no reference."""
    plain = read(answers["plain"])["memory_bytes"]
    assert plain["parameters"] == plain["trained"] == PARAMETERS
    assert plain["state"] == PARAMETERS * (4 + 4 + 8 + 4)
    longest = read(answers["plain"])["counts"]["lengths"]["max"]
    assert plain["logits"] == 2 * 4 * longest * 1024 * 4
    zero3 = read(answers["zero 3"])
    assert (zero3["precision"], zero3["zero_stage"], zero3["batch"]) == ("bf16", 3, 64)
    assert zero3["memory_bytes"]["state"] == PARAMETERS * (2 + 2 + 12 + 2) / 8
    lora = read(answers["lora"])["memory_bytes"]
    trained = 4 * 8 * ((128 + 128) + (128 + 64))
    assert lora["trained"] == trained
    assert lora["reference"] == 0
    assert lora["state"] == (PARAMETERS + trained) * 4 + trained * (4 + 8)


def test_traps_are_named(answers):
    """At beta 1 a pair passes z* = -20 where its log-ratios differ by 20 nats."""
    code, said, errors = answers["traps"]
    assert code == 1, errors[-3000:]
    found = json.loads(said)
    assert found["counts"]["doubled_bos"] == 24
    assert found["counts"]["bos"] == {"2": 24}
    starts = [warning.split(":")[0] for warning in found["warnings"]]
    assert starts[0] == "fp16"
    assert "beta 1 is large for this gamma" in starts
    assert "differ by 20 nats" in found["warnings"][1]
    assert "BOS doubled at the start of 100 % of the sequences" in starts


def test_dpo_is_said_to_be_dpo(answers):
    found = read(answers["dpo"])
    assert (found["loss"], found["z_star"]) == ("dpo", None)
    assert found["first_loss"] == pytest.approx(math.log(2))
    assert found["warnings"][0].startswith("the loss is the host's own, dpo")


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("unknown key", "focalpo_gama is no key of focalpo_plugins, got 0.1; did you mean"),
        ("gamma", "focalpo_gamma must be below 1/ln 2 = 1.4427 for variant 'correct', got 1.5"),
        ("sft", "rl must be focalpo, or another loss of preference pairs, got None"),
        ("no file", "CONFIG must be a YAML file, got"),
        ("no yaml", "broken.yml"),
        ("no such pair", "--pair must be from 0 to 11, got 99."),
    ],
)
def test_errors(answers, case: str, said: str):
    code, output, errors = answers[case]
    assert (code, output) == (2, "")
    last = errors.splitlines()[-1]
    assert last.startswith("focalpo check: error: ")
    assert said in last
    assert "Traceback" not in errors


def test_nothing_is_left_behind(once: Axolotl, answers):
    """The config's output folder isn't made, whose place a scratch folder takes."""
    assert not (once.folder / "out").exists()


def test_it_is_one_of_axolotl_s_commands():
    done = subprocess.run(["axolotl", "focalpo", "check", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: axolotl focalpo check" in done.stdout
    assert "example:\n  axolotl focalpo check examples/tiny_focalpo.yml" in done.stdout
