"""``focalpo check`` on OpenRLHF command lines: its output against values worked out by hand."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from os.path import commonprefix
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from harness import ManyFocalpo
from openrlhf_flags import of_host
from planned import computed
from tokenizers import Tokenizer

pytestmark = pytest.mark.xdist_group("check")


# Of 11 pairs, two at a time: five batches an epoch, two to a step, in three epochs.
STEPS = ("--train.batch_size", "4", "--train.max_epochs", "3")

Answer = tuple[int, str, str]


def by_hand(tokenizer: Tokenizer, row: dict[str, Any], side: str) -> tuple[list[int], list[int]]:
    """Prompt and answer, from the template as written out here."""
    user, assistant = (message["content"] for message in row[side])
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    prompt = f"<|begin_of_text|>{header.format('user')}{user}<|eot_id|>{header.format('assistant')}"
    texts = (prompt, f"{assistant}<|eot_id|>")
    return tuple(tokenizer.encode(text, add_special_tokens=False).ids for text in texts)


@pytest.fixture(scope="module")
def rows(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Twelve pairs, one with equal answers, one with an empty one, and one whose prompt is too long
    for an answer."""
    rows = [json.loads(line) for line in (tiny / "test.jsonl").read_text().splitlines()[:12]]
    rows[9]["chosen"][1]["content"] = ""
    rows[10]["rejected"] = rows[10]["chosen"]
    for side in ("chosen", "rejected"):
        rows[11][side][0]["content"] = " ".join(["word"] * 100)
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, rows


@pytest.fixture(scope="module")
def answers(
    tiny: Path,
    focalpo: ManyFocalpo,
    rows: tuple[Path, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Answer]:
    folder = tmp_path_factory.mktemp("check")
    shutil.copytree(tiny / "model", folder / "model")
    (folder / "model" / "model.safetensors").unlink()  # no weights are needed

    def argv(*more: str, before: tuple[str, ...] = ("--json",)) -> list[str]:
        flags = ["--model.model_name_or_path", str(folder / "model"), "--data.apply_chat_template"]
        flags += ["--data.dataset", str(rows[0]), "--data.max_len", "64"]
        flags += ["--train.batch_size", "16", "--train.micro_batch_size", "2"]
        return ["check", *before, "--", *flags, *more]

    focal = ("--loss", "focalpo")
    lora = ("--ds.lora.rank", "8", "--ds.lora.target_modules", "q_proj", "v_proj", "--ref.offload")
    eight = ("--json", "--gpus", "8")
    flash = ("--ds.packing_samples", "--ds.attn_implementation", "flash_attention_2")
    cases = {
        "plain": argv(*focal),
        "cut": argv(*focal, "--data.max_len", "40"),
        "zero 3": argv(*focal, "--ds.zero_stage", "3", "--train.batch_size", "32", before=eight),
        "lora": argv(*focal, *lora),
        "precomputed": argv(*focal, "--focalpo.precompute_ref", before=()),
        "precomputed, json": argv(*focal, "--focalpo.precompute_ref"),
        "steps": argv(*focal, *STEPS),
        "one at a time": argv(
            *focal, "--focalpo.shared_prompts", "--train.micro_batch_size", "1", "--train.batch_size", "11"
        ),
        "parallel": argv(*focal, *flash, "--ds.ring_attn_size", "2", "--ds.tensor_parallel_size", "2", before=eight),
        "dpo": argv("--ds.param_dtype", "fp16"),
        "ipo": argv("--model.ipo_enable", "--model.beta", "0.5"),
        "reference": argv(*focal, "--ref.model_name_or_path", str(tiny / "model")),
        "flash": argv(*focal, *flash, before=("--strict",)),
        "no such pair": argv(*focal, before=("--pair", "99")),
        "gamma": argv(*focal, "--focalpo.gamma", "3"),
        "abbreviated": argv(*focal, "--focalpo.gam", "0.1"),
        "unknown": argv("--beta", "0.1"),
        "no data": ["check", "--", "--model.model_name_or_path", str(folder / "model")],
        "nothing": ["check"],
    }  # fmt: skip
    return {name: focalpo(*words) for name, words in cases.items()}


def parameters(tiny: Path) -> int:
    """Embedding (tied) vocabulary x 128, four layers of attention (q and o 128 x 128, k and v
    128 x 64), MLP 3 x 128 x 352 and two norms, and the last norm."""
    vocabulary = json.loads((tiny / "model" / "config.json").read_text())["vocab_size"]
    layer = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 352 + 2 * 128
    return vocabulary * 128 + 4 * layer + 128


def read(answer: Answer) -> dict[str, Any]:
    assert answer[0] == 0, answer[2][-3000:]
    return json.loads(answer[1])


def test_the_pair_is_the_one_that_is_trained_on(answers, tiny: Path, rows):
    tokenizer = Tokenizer.from_file(str(tiny / "model" / "tokenizer.json"))
    found = read(answers["plain"])
    for side in ("chosen", "rejected"):
        prompt, answer = by_hand(tokenizer, rows[1][0], side)
        assert found["pair"][side]["ids"] == prompt + answer
        assert found["pair"][side]["trained"] == [False] * len(prompt) + [True] * len(answer)


def test_openrlhf_sums_over_the_same_tokens(answers, openrlhf):
    """With its own mask and log-probabilities of 1 for every token, the sum is the count of
    tokens."""
    sequence = read(answers["plain"])["pair"]["chosen"]
    ones = torch.ones(1, len(sequence["ids"]) - 1)
    mask = torch.ones(1, len(sequence["ids"]), dtype=torch.long)
    prompt = sequence["trained"].index(True)
    sums, _ = openrlhf.DPOTrainer._get_batch_logps(None, ones, mask, [prompt])
    assert sums.item() == sum(sequence["trained"])


def test_the_first_loss(answers):
    """IPO's loss at margin 0 is ``(1/(2 beta))^2``, 1 at beta 0.5. With another model as the
    reference, no run starts there."""
    assert read(answers["ipo"])["first_loss"] == pytest.approx(1)
    assert read(answers["reference"])["first_loss"] is None


def test_what_is_counted(answers):
    """12 rows, one dropped; one pair has equal answers, and one an empty answer. Batch 16 with 2 on
    one rank: 8 micro-batches are accumulated."""
    found = read(answers["plain"])
    assert (found["rows"], found["dropped"], found["counts"]["pairs"]) == (12, 1, 11)
    assert (found["counts"]["identical"], found["counts"]["empty"]) == (1, 1)
    assert found["counts"]["bos"] == found["counts"]["eos"] == {"1": 22}
    assert (found["micro_batch"], found["accumulation"], found["batch"]) == (2, 8, 16)
    assert (found["loss"], found["beta"], found["precision"]) == ("focalpo", 0.1, "bf16")
    assert found["z_star"] == pytest.approx(-20, abs=1e-6)
    assert found["first_loss"] == pytest.approx(2**-0.05 * math.log(2))


def test_tokens_of_a_step(answers, tiny: Path, rows):
    """One pair at a time, all 11 in a step: plain, it has twice the tokens of each pair's longer
    sequence. With shared prompts it has the tokens of both sequences with their common start
    counted once, which is at least the prompt. On one rank there is nothing to balance."""
    tokenizer = Tokenizer.from_file(str(tiny / "model" / "tokenizer.json"))
    pairs = [
        [sum(by_hand(tokenizer, row, side), []) for side in ("chosen", "rejected")]
        for row in rows[1][:11]
    ]
    padded = [2 * max(map(len, pair)) for pair in pairs]
    shared = [sum(map(len, pair)) - len(commonprefix(pair)) for pair in pairs]
    found = read(answers["one at a time"])
    tokens = {
        "plain": sum(padded),
        "balanced": sum(padded),
        "shared": sum(shared),
        "both": sum(shared),
    }
    assert found["tokens_per_step"] == pytest.approx(tokens)
    assert found["way"] == "shared"
    for way, most in (("plain", max(padded)), ("shared", max(shared))):
        largest = {"tokens": most, "pairs": 1, "epoch": 1, "step": 1}
        assert found["largest_micro_batch"][way] == largest
    code, said, errors = answers["precomputed"]
    assert "critical path a step: plain 1.00 (" in said, errors
    assert "balanced" in said


def test_what_is_cut_is_counted(answers, tiny: Path, rows):
    """OpenRLHF keeps a prompt that leaves more than two tokens, and cuts its answers at 40."""
    tokenizer = Tokenizer.from_file(str(tiny / "model" / "tokenizer.json"))
    pairs = [[by_hand(tokenizer, row, side) for side in ("chosen", "rejected")] for row in rows[1]]
    kept = [pair for pair in pairs if len(pair[0][0]) < 38]
    cut = [pair for pair in kept if any(len(p) + len(a) > 40 for p, a in pair)]
    assert 0 < len(cut) < len(kept)
    found = read(answers["cut"])
    assert found["counts"]["pairs"] == len(kept)
    assert found["counts"]["truncated"] == len(cut)
    assert found["counts"]["lengths"]["max"] == 40


def test_steps(answers):
    """OpenRLHF drops pairs that don't fill a micro-batch, and a step continues in the next epoch:
    15 batches are seven steps. With fewer pairs than a batch it refuses to train."""
    found = read(answers["steps"])
    assert (found["epoch_steps"], found["steps"]) == (2.5, 7)
    assert not any("larger than the data" in warning for warning in found["warnings"])
    found = read(answers["plain"])
    assert found["steps"] == 0
    said = "--train.batch_size 16 is larger than the data, 11 pairs: OpenRLHF refuses to train."
    assert said in found["warnings"]


def test_a_run_has_the_steps_that_were_said(answers, rows, train):
    data = ("--data.dataset", str(rows[0]), "--data.max_len", "64")
    run = train("--loss", "focalpo", *data, *STEPS)
    assert run.returncode == 0, run.output
    assert max(run.steps("train/")) == read(answers["steps"])["steps"]


@pytest.mark.releases
@pytest.mark.parametrize("ranks, balanced", [(1, False), (2, False), (2, True)])
def test_a_run_has_the_batches_that_were_planned(
    tiny: Path, rows, watched, tmp_path: Path, ranks: int, balanced: bool
):
    """The pairs of all epochs, whose orders differ. One rank trains on five batches of two of the
    11 pairs an epoch, two ranks on two batches each; three epochs are 15 and 6. Two batches make a
    step."""
    flags = ["--loss", "focalpo", "--data.dataset", str(rows[0]), "--data.max_len", "64"]
    flags += ["--train.batch_size", str(4 * ranks), "--train.max_epochs", "3"]
    flags += ["--ds.zero_stage", "3"] * (ranks == 2)  # OpenRLHF 0.9.10 fails in ZeRO-2 on two CPUs
    flags += ["--focalpo.balanced_batches"] * balanced
    given = ["--model.model_name_or_path", str(tiny / "model"), "--data.apply_chat_template"]
    argv = of_host([*given, "--train.micro_batch_size", "2", *flags])
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    code, said, errors = forked.run("planned:main", [ranks, "--", *argv], tmp_path, **alone)
    assert code == 0, errors[-3000:]
    plan = json.loads(said.splitlines()[-1])
    by_digest = {
        hashlib.sha256(str(pair).encode()).hexdigest()[:16]: pair for pair in plan["pairs"]
    }
    run = watched(flags, ranks, {})
    assert run.returncode == 0, run.output
    trained = [
        [[by_digest[digest] for digest in what[1]] for what in seen if what[0] == "train"]
        for seen in run.seen()
    ]
    assert [len(batches) for batches in trained] == ([15] if ranks == 1 else [6, 6])
    assert trained[0][0] != trained[0][5 if ranks == 1 else 2]  # the second epoch's
    assert (plan["batches"] == trained) is not balanced
    said = plan["tokens_per_step"], plan["largest"]["tokens"], plan["largest"]["pairs"]
    assert said == pytest.approx(computed(trained, 2))


def test_ranks_that_share_their_pairs(answers):
    """Eight ranks, of which four share each sequence and its layers: two times two pairs, four
    times."""
    found = read(answers["parallel"])
    assert (found["ranks"], found["accumulation"], found["batch"]) == (8, 4, 16)


def test_memory(answers, tiny: Path):
    """2 bytes each for weights, gradients and reference, 12 for Adam with its master copy.  ZeRO 2
    on one rank divides nothing; ZeRO 3 on eight divides all.  LoRA of rank 8 on q (128 to 128)
    and v (128 to 64) of four layers; its reference is held by the CPU here."""
    n = parameters(tiny)
    plain = read(answers["plain"])["memory_bytes"]
    assert plain["parameters"] == plain["trained"] == n
    assert plain["state"] == n * (2 + 2 + 12 + 2)
    zero3 = read(answers["zero 3"])
    assert (zero3["zero_stage"], zero3["accumulation"], zero3["ranks"]) == (3, 2, 8)
    assert zero3["memory_bytes"]["state"] == n * (2 + 2 + 12 + 2) / 8
    lora = read(answers["lora"])["memory_bytes"]
    trained = 4 * 8 * ((128 + 128) + (128 + 64))
    assert (lora["trained"], lora["reference"]) == (trained, 0)
    assert lora["state"] == (n + trained) * 2 + trained * (2 + 12)


def test_memory_with_the_reference_precomputed(answers, tiny: Path):
    """It is held before the first step, with everything except the gradients, and then freed."""
    n = parameters(tiny)
    found = read(answers["precomputed, json"])["memory_bytes"]
    assert (found["reference"], found["reference_before"]) == (0, 2 * n)
    assert found["state"] == n * (2 + 2 + 12)
    assert read(answers["plain"])["memory_bytes"]["reference_before"] == 0
    code, said, errors = answers["precomputed"]
    assert code == 0, errors[-3000:]
    size = f"{2 * n / 2**20:.1f} MiB"
    assert f"also reference {size}, but only before the first step" in said


def test_dpo_and_fp16_are_said_to_be_that(answers):
    found = read(answers["dpo"])
    assert (found["loss"], found["z_star"]) == ("dpo", None)
    starts = [warning.split(":")[0] for warning in found["warnings"]]
    assert "fp16" in starts
    assert found["warnings"][0].startswith("the loss is the host's own, dpo")


def test_flags_that_need_cuda_are_checked_without_it(answers):
    """Training with these flags on a CPU is refused; checking them is not."""
    code, said, errors = answers["flash"]
    assert code == 1, errors[-3000:]  # --strict
    assert "predicted first loss 0.6695 (DPO: 0.6931)" in said
    assert "12 pairs, 1 dropped by the host (8.33 %)" in said
    assert "[<|begin_of_text|>|<|start_header_id|>|user|<|end_header_id|>|\\n\\n|" in said


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("gamma", "--focalpo.gamma must be below 1/ln 2 = 1.4427 for variant 'correct', got 3.0"),
        ("abbreviated", "unknown flag --focalpo.gam, got '--focalpo.gam'; did you mean"),
        ("unknown", "unrecognized arguments: --beta 0.1"),
        ("no such pair", "--pair must be from 0 to 10, got 99."),
        ("no data", "--data.dataset must be given: there is nothing to train on."),
        ("nothing", "give a YAML of Axolotl, LLaMA-Factory or ms-swift; or `--`"),
    ],
)
def test_errors(answers, case: str, said: str):
    code, output, errors = answers[case]
    assert (code, output) == (2, "")
    last = errors.splitlines()[-1]
    assert last.startswith("focalpo check: error: ")
    assert said in last
    assert "Traceback" not in errors
