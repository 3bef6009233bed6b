"""``focalpo check`` on Axolotl YAMLs: its output against values worked out by hand."""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
import subprocess
from itertools import product
from os.path import commonprefix
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
from harness import EXAMPLES, ON_CPU, Axolotl, ManyFocalpo, zero3_on_cpu
from planned import check_trained
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from focalpo_plugins.balanced import Geometry
from focalpo_plugins.cli.check.counts import count
from focalpo_plugins.cli.check.warnings import warnings
from focalpo_plugins.plan import Pair, Tokens, epoch_steps, windows
from focalpo_plugins.registry import get_loss

shares_answers = pytest.mark.xdist_group("answers")  # one worker makes all runs


# 12 pairs, four at a time and two accumulated, are three batches and two steps an epoch. Two and a
# half epochs are ceil(12 * 2.5 / 8) steps, as Axolotl counts them.
EPOCHS = {"num_epochs": 2.5, "max_steps": None}

Answer = tuple[int, str, str]


def text(role: str, content: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"


class ByHand:
    """The tokens of the rows of a file, from the template as written out here."""

    def __init__(self, tiny: Path, data: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(tiny / "model" / "tokenizer.json"))
        self.pairs = []
        for line in data.read_text().splitlines():
            row = json.loads(line)
            prompt = self.prompt(row["chosen"][0]["content"])
            sides = {}
            for side in ("chosen", "rejected"):
                answer = row[side][1]["content"] + "<|eot_id|>"
                sides[side] = (self.ids(prompt), self.ids(answer))
            self.pairs.append(sides)

    def prompt(self, question: str) -> str:
        begin = "<|begin_of_text|>" + text("user", question)
        return begin + "<|start_header_id|>assistant<|end_header_id|>\n\n"

    def ids(self, written: str) -> list[int]:
        return self.tokenizer.encode(written, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def data(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven pairs, including one with equal answers and one with an empty answer, and one that is
    too long."""
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
    """The model with a tokenizer that puts a BOS before every text; the template does so too."""
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
def capped(without_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with a config that caps its logits."""
    folder = tmp_path_factory.mktemp("capped") / "model"
    shutil.copytree(without_weights, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "final_logit_softcapping": 30.0}))
    return folder


@pytest.fixture(scope="module")
def answers(
    once: Axolotl,
    focalpo: ManyFocalpo,
    data: Path,
    without_weights: Path,
    doubling: Path,
    capped: Path,
) -> dict[str, Answer]:
    zero3 = once.folder / "zero3.json"
    zero3.write_text(
        json.dumps({"zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"},
                    "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"})
    )  # fmt: skip

    def config(**changes: Any) -> Path:
        base = {
            "base_model": str(without_weights),
            "output_dir": str(once.folder / "checked"),
            "datasets": [{"path": str(data), "ds_type": "json", "split": "train",
                          "type": "chat_template.argilla_chat"}],
        }  # fmt: skip
        return once.config(**{**base, **changes})

    broken = once.folder / "broken.yml"
    broken.write_text("rl: [focalpo\n")
    lora = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16}
    lora["lora_target_modules"] = ["q_proj", "v_proj"]
    # Axolotl caches prepared data by a hash that doesn't include how long rows were treated.
    truncate = {"excess_length_strategy": "truncate"}
    truncate["dataset_prepared_path"] = str(once.folder / "prepared_truncated")
    plain_dpo = {"rl": "dpo", "focalpo_gamma": None, "focalpo_variant": None}
    cases = {
        "plain": ["--json", config()],
        "cut by TRL": ["--json", config(skip_prepare_dataset=True, sequence_len=40)],
        "lora": ["--json", config(**truncate, **lora, num_epochs=2, max_steps=None)],
        "dpo": ["--json", "--gpus", "8", config(bf16=True, deepspeed=str(zero3), **plain_dpo)],
        "two BOS": ["--json", config(base_model=str(doubling), **plain_dpo)],
        "steps": ["--json", config(**EPOCHS)],
        "steps of two ranks": ["--json", "--gpus", "2", config(**EPOCHS)],
        "traps": ["--strict", config(base_model=str(doubling), rl_beta=1.0, fp16=True)],
        "fused": ["--json", config(focalpo_fused=True, micro_batch_size=4096, bf16=True)],
        "fused, without data": [
            "--json",
            "--model-config",
            str(without_weights / "config.json"),
            config(focalpo_fused=True, micro_batch_size=4096),
        ],
        "shared": [
            "--json",
            "--gpus",
            "2",
            config(focalpo_shared_prompts=True, micro_batch_size=1, focalpo_fused=True),
        ],
        "batches of all ranks": [
            "--json",
            "--gpus",
            "2",
            config(accelerator_config={"split_batches": True}),
        ],
        "no seed": [
            config(accelerator_config={"use_seedable_sampler": False}),
        ],
        "ignored": [config(group_by_length=True)],
        "simpo": ["--json", config(focalpo_margin="simpo", rl_beta=2.0, simpo_gamma=0.5)],
        "simpo, as text": [config(focalpo_margin="simpo", rl_beta=2.0, simpo_gamma=0.5)],
        "simpo, cut by TRL": [
            "--json",
            config(
                focalpo_margin="simpo",
                rl_beta=2.0,
                simpo_gamma=0.5,
                sequence_len=40,
                skip_prepare_dataset=True,
            ),
        ],
        "ipo": ["--json", config(**{**plain_dpo, "rl": "ipo", "rl_beta": 0.1})],
        "ipo, without data": [
            "--model-config",
            "llama-3-8b",
            config(**{**plain_dpo, "rl": "ipo", "rl_beta": 0.5}),
        ],
        "orpo, without data": [
            "--json",
            "--model-config",
            "llama-3-8b",
            config(focalpo_margin="orpo", rl_beta=None, orpo_alpha=0.2),
        ],
        "hinge": ["--json", config(**plain_dpo, dpo_loss_type=["hinge"])],
        "of two": [
            "--json",
            config(
                **{**plain_dpo, "rl_beta": 0.25},
                dpo_loss_type=["sigmoid", "ipo"],
                dpo_loss_weights=[0.5, 0.25],
            ),
        ],
        "apo": [config(**plain_dpo, dpo_loss_type=["apo_down"])],
        "with sft": ["--json", config(dpo_loss_type=["sigmoid", "sft"])],
        "moving": [config(focalpo_gamma=0.5, focalpo_gamma_end=0.0)],
        "fused, capped": [config(base_model=str(capped), focalpo_fused=True)],
        "unknown key": [config(focalpo_gama=0.1)],
        "gamma": [config(focalpo_gamma=1.5)],
        "sft": [config(**{**plain_dpo, "rl": None})],
        "no file": [once.folder / "no.yml"],
        "no yaml": [broken],
        "tiny": [once.config(whole=True)],
    }
    return {name: focalpo("check", *map(str, words)) for name, words in cases.items()}


def parameters(tiny: Path) -> int:
    """Embedding (tied) vocabulary x 128, four layers of attention (q and o 128 x 128, k and v
    128 x 64), MLP 3 x 128 x 352 and two norms, and the last norm."""
    vocabulary = json.loads((tiny / "model" / "config.json").read_text())["vocab_size"]
    layer = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 352 + 2 * 128
    return vocabulary * 128 + 4 * layer + 128


def read(answer: Answer) -> dict[str, Any]:
    assert answer[0] == 0, answer[2][-3000:]
    return json.loads(answer[1])


@shares_answers
def test_the_pair_is_the_one_that_is_trained_on(answers, tiny: Path, data: Path):
    """Its tokens are those of one row of the file; Axolotl shuffles them."""
    shown = read(answers["plain"])["pair"]
    expected = [
        {
            side: (prompt + answer, [False] * len(prompt) + [True] * len(answer))
            for side, (prompt, answer) in pair.items()
        }
        for pair in ByHand(tiny, data).pairs
    ]
    assert {side: (s["ids"], s["trained"]) for side, s in shown.items()} in expected
    assert shown["chosen"]["tokens"][0] == "<|begin_of_text|>"
    assert shown["chosen"]["tokens"][-1] == "<|eot_id|>"


@shares_answers
def test_what_is_counted(answers, tiny: Path, data: Path):
    """13 rows: Axolotl drops the long one, and one pair has equal answers. For an empty answer
    Axolotl trains on a whole conversation, with its own dummy message as the prompt. At gamma 0.05,
    z* is ``logit(exp(-20))`` and the first loss is ``2^-0.05 ln 2``."""
    found = read(answers["plain"])
    assert (found["rows"], found["dropped"]) == (13, 1)
    counts = found["counts"]
    assert {k: counts[k] for k in ("pairs", "truncated", "identical", "empty", "doubled_bos")} == {
        "pairs": 12, "truncated": 0, "identical": 1, "empty": 0, "doubled_bos": 0,
    }  # fmt: skip
    assert (counts["bos"], counts["bos_in_answer"]) == ({"1": 23, "2": 1}, 1)
    assert any(w.startswith("BOS in 4.17 % of the answers") for w in found["warnings"])
    trained, tokens = [], ByHand(tiny, data)
    for number, pair in enumerate(tokens.pairs[:12]):
        for side, (prompt, answer) in pair.items():
            dummy = tokens.ids(tokens.prompt("[[dummy_message]]"))
            before = dummy if (number, side) == (11, "chosen") else []
            trained.append((len(prompt), len(before) + len(answer)))
    for key, values in (
        ("lengths", [p + a for p, a in trained]),
        ("trained", [a for _, a in trained]),
    ):
        expected = {"min": min(values), "median": statistics.median(values), "max": max(values)}
        assert counts[key] == expected
    assert (found["loss"], found["beta"]) == ("focalpo", 0.1)
    assert found["z_star"] == pytest.approx(-20, abs=1e-6)
    assert found["first_loss"] == pytest.approx(2**-0.05 * math.log(2))
    # micro_batch_size 4, two accumulated, one rank.
    assert (found["batch"], found["ranks"]) == (8, 1)
    assert any("8.33 % of the pairs are identical" in warning for warning in found["warnings"])


@shares_answers
def test_what_is_cut_is_counted(answers, tiny: Path, data: Path):
    """At 40 tokens, without Axolotl's preparation: TRL drops prompts of 40 tokens and more,
    including the pair with the empty answer and the dummy, and cuts the rest. At 128 with
    `truncate`, Axolotl cuts the one long answer."""
    kept = [pair for pair in ByHand(tiny, data).pairs if len(pair["chosen"][0]) < 40]
    empty = [len(pair["chosen"][1]) == 1 for pair in kept]
    assert sum(empty) == 1
    cut = [
        is_empty or any(len(p) + len(a) > 40 for p, a in pair.values())
        for pair, is_empty in zip(kept, empty, strict=True)
    ]
    assert 0 < sum(cut) < len(kept)
    found = read(answers["cut by TRL"])
    assert found["rows"] - found["dropped"] == len(kept)
    assert found["counts"]["truncated"] == sum(cut)
    assert found["counts"]["lengths"]["max"] == 40
    found = read(answers["lora"])
    assert (found["rows"], found["dropped"], found["counts"]["truncated"]) == (13, 0, 1)


@shares_answers
def test_steps(answers):
    """12 pairs, four at a time, are three batches, and with two accumulated they are two steps, the
    second of one batch. On two ranks that is one step, and ceil(12 * 2.5 / 16) in all. 13 pairs of
    two epochs are ceil(26 / 8). On eight ranks five get no pairs of their own, and there is one
    step."""
    cases = ("plain", "steps", "steps of two ranks", "lora", "dpo")
    found = [read(answers[name]) for name in cases]
    steps = [(each["epoch_steps"], each["steps"]) for each in found]
    assert steps == [(2, 6), (2, 4), (1, 2), (2, 4), (1, 6)]
    assert "pairs a step\n         2 steps an epoch, 6 steps in the run\n" in answers["traps"][1]


@shares_answers
def test_a_run_has_the_steps_that_were_said(answers, once: Axolotl, data: Path):
    pairs = {"path": str(data), "ds_type": "json", "split": "train"}
    pairs["type"] = "chat_template.argilla_chat"
    folder = str(once.folder / "steps")
    run = once.train(**EPOCHS, datasets=[pairs], save_steps=50, output_dir=folder)
    state = json.loads((run.checkpoints[-1] / "trainer_state.json").read_text())
    assert state["global_step"] == read(answers["steps"])["steps"]


@shares_answers
def test_the_largest_micro_batch(answers, tiny: Path, data: Path):
    """Without shared prompts it has four pairs, padded to the longest sequence of all. With shared
    prompts and one pair at a time, it is the pair with the most tokens, counting the common start
    once; before an empty answer Axolotl puts its own dummy message."""
    found = read(answers["plain"])
    largest = found["largest_micro_batch"]["plain"]
    assert found["way"] == "plain"
    assert (largest["tokens"], largest["pairs"]) == (2 * 4 * found["counts"]["lengths"]["max"], 4)
    tokens, rows = ByHand(tiny, data), []
    dummy = tokens.ids(tokens.prompt("[[dummy_message]]"))
    for number, sides in enumerate(tokens.pairs[:12]):
        chosen, rejected = (prompt + answer for prompt, answer in sides.values())
        if number == 11:
            prompt, answer = sides["chosen"]
            chosen = prompt + dummy + answer
        rows.append(len(chosen) + len(rejected) - len(commonprefix([chosen, rejected])))
    found = read(answers["shared"])
    assert found["way"] == "shared"
    largest = found["largest_micro_batch"]["shared"]
    assert (largest["tokens"], largest["pairs"]) == (max(rows), 1)
    assert found["memory_bytes"]["logits"] % max(rows) == 0
    # Two ranks wait for each other, so it exceeds half of all rows' tokens, in steps of 4 pairs.
    path = found["tokens_per_step"]
    assert sum(rows) / 2 <= 3 * path["both"] <= 3 * path["shared"] <= 3 * path["plain"]


@shares_answers
def test_batches_that_are_split_over_the_ranks(answers):
    """With four pairs at a time, each of two ranks computes two."""
    found = read(answers["batches of all ranks"])
    assert (found["micro_batch"], found["batch"]) == (2, 8)
    assert found["largest_micro_batch"]["plain"]["pairs"] == 2


@shares_answers
def test_an_order_without_a_seed_is_said_to_be_unknown(answers):
    said = "this run draws its pairs without a fixed seed (accelerator_config.use_seedable_sampler)"
    assert said in answers["no seed"][1]
    assert said not in answers["traps"][1]


@shares_answers
def test_a_key_for_the_order_that_axolotl_ignores_is_said(answers):
    said = "WARNING  Axolotl ignores group_by_length when it trains preference pairs"
    assert said in answers["ignored"][1]


@pytest.mark.releases
@pytest.mark.parametrize("ranks, balanced", [(1, False), (2, False), (2, True)])
def test_a_run_has_the_batches_that_were_planned(
    once: Axolotl, data: Path, ranks: int, balanced: bool
):
    """The pairs of all epochs, whose orders differ. One rank trains on 5, 5 and 2 of 12 pairs an
    epoch, with two batches to a step, in ceil(2.5 * 12 / 10) = 3 steps. Two ranks train on 5 each,
    twice an epoch, which is a step; the second time, accelerate adds the epoch's first pairs; in
    ceil(2.5 * 12 / 20) = 2 steps."""
    pairs = {"path": str(data), "ds_type": "json", "split": "train"}
    pairs["type"] = "chat_template.argilla_chat"
    folder = str(once.folder / f"batches{ranks}{balanced}")
    more: dict[str, Any] = {"datasets": [pairs], "output_dir": folder, "micro_batch_size": 5}
    if ranks == 2:
        more["deepspeed"] = zero3_on_cpu(once.folder)
    if balanced:
        more["focalpo_balanced_batches"] = True
    given = [ranks, once.config(**EPOCHS, **more)]
    code, said, errors = forked.run("planned:main", given, once.folder)
    assert code == 0, errors[-3000:]
    plan = json.loads(said.splitlines()[-1])
    plugins = ["test_only_plugins.GlooOnCPU", "test_only_plugins.Batches"]
    how = ON_CPU if ranks == 2 else {}
    run = once.train(
        **EPOCHS, **more, plugins=plugins[2 - ranks :], save_steps=50, ranks=ranks, how=how
    )
    files = sorted(run.folder.glob("batches*.jsonl"))
    check_trained(plan, files, ranks, balanced)


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_pairs_of_each_rank_are_those_of_accelerate(drop_last: bool):
    """For any numbers of pairs, ranks and micro-batches, over two epochs in the same order."""
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    for pairs, each, accumulation, ranks in product(range(1, 30), (1, 4), (1, 3), (1, 2, 3, 9)):
        expected = []
        for rank in range(ranks):
            batches = BatchSampler(range(pairs), each, drop_last)
            shard = BatchSamplerShard(batches, ranks, rank) if ranks > 1 else batches
            expected.append(list(shard) * 2)
        steps = 2 * -(-len(expected[0]) // 2 // accumulation)
        geometry = Geometry(ranks, each, accumulation)
        found: list[list[list[int]]] = [[] for _ in range(ranks)]
        for window in windows(range(pairs), geometry, drop_last, steps):
            for place, start in enumerate(range(0, len(window.pairs), each)):
                found[place % ranks].append(list(window.pairs[start : start + each]))
        assert found == expected


@pytest.mark.parametrize("drop_last", [False, True])
def test_steps_of_an_epoch_are_those_of_accelerate(drop_last: bool):
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    for pairs, micro, accumulation, ranks in product(range(1, 30), (1, 4), (1, 3), (1, 2, 3)):
        batches = BatchSampler(range(pairs), micro, drop_last)
        of_rank = len(BatchSamplerShard(batches, ranks, 0)) if ranks > 1 else len(batches)
        expected = max(1, math.ceil(of_rank / accumulation))
        assert epoch_steps(pairs, micro, accumulation, ranks, drop_last) == expected


@shares_answers
def test_it_does_not_say_that_a_loss_is_active(answers):
    """It builds a trainer, but trains nothing."""
    for case in ("plain", "traps", "fused"):
        assert "active" not in answers[case][1] + answers[case][2]


@shares_answers
def test_memory(answers, tiny: Path):
    """Float32, one rank: 4 bytes each for weights, gradients and reference, 8 for Adam.  bf16 under
    ZeRO 3 on eight ranks: 2, 2 and 2, and 12 for Adam with its master copy, each divided by 8.
    LoRA of rank 8 on q (128 to 128) and v (128 to 64) of four layers, no reference."""
    n = parameters(tiny)
    plain = read(answers["plain"])["memory_bytes"]
    assert plain["parameters"] == plain["trained"] == n
    assert plain["state"] == n * (4 + 4 + 8 + 4)
    longest = read(answers["plain"])["counts"]["lengths"]["max"]
    vocabulary = json.loads((tiny / "model" / "config.json").read_text())["vocab_size"]
    assert plain["logits"] == 2 * 4 * longest * vocabulary * 4
    zero3 = read(answers["dpo"])
    assert (zero3["precision"], zero3["zero_stage"], zero3["batch"]) == ("bf16", 3, 64)
    assert zero3["memory_bytes"]["state"] == n * (2 + 2 + 12 + 2) / 8
    # 2 x 4096 sequences have more logits than the fused path holds at a time, 2^25 in float32.
    fused = read(answers["fused, without data"])["memory_bytes"]
    assert fused["logits"] == 2**25 * 4
    # There are only 12 pairs, which fill one batch.
    fused = read(answers["fused"])["memory_bytes"]
    assert fused["logits"] == 2 * 12 * longest * vocabulary * 4
    # bf16 without DeepSpeed: Axolotl holds the embedding, which is the output layer too, and nine
    # norms in float32, and Adam's states are of each weight's dtype.
    wide = (vocabulary + 9) * 128
    assert fused["state"] == n * (2 + 2 + 4 + 2) + wide * (2 + 2 + 4 + 2)
    lora = read(answers["lora"])["memory_bytes"]
    trained = 4 * 8 * ((128 + 128) + (128 + 64))
    assert lora["trained"] == trained
    assert lora["reference"] == 0
    assert lora["state"] == (n + trained) * 4 + trained * (4 + 8)


@shares_answers
def test_the_pages_show_the_tiny_run(answers):
    """docs/run.md has every line except the first, which names the file; README has some. The
    folder is the sources' root, where the pages' commands are run."""
    code, output, errors = answers["tiny"]
    assert code == 0, errors[-3000:]
    output = output.replace(str(EXAMPLES.parent), ".")
    printed = [line.strip() for line in output.splitlines()][1:]
    page, readme = ((EXAMPLES.parent / name).read_text() for name in ("docs/run.md", "README.md"))
    (shown,) = re.findall(r"^```text\n.*?\n(.*?)^```$", page, re.M | re.S)
    assert [line.strip() for line in shown.splitlines()] == printed
    (some,) = re.findall(r"^    loss     .*?(?=\n\n)", readme, re.M | re.S)
    assert {line.strip() for line in some.splitlines()} <= {*printed}


@shares_answers
def test_it_is_printed_with_the_traps(answers):
    """At beta 1 a pair passes z* = -20 if its log-ratios differ by 20 nats. The tokenizer puts a
    BOS before the template's, and FocalPO's trainer removes it."""
    code, said, errors = answers["traps"]
    assert code == 1, errors[-3000:]
    assert "predicted first loss 0.6695 (DPO: 0.6931)" in said
    assert "13 pairs, 1 dropped by the host (7.69 %)" in said
    assert "[<|begin_of_text|>|<|start_header_id|>|user|<|end_header_id|>|\\n\\n|" in said
    warnings = [line[9:] for line in said.splitlines() if line.startswith("WARNING  ")]
    assert said.splitlines()[-1] == f"{len(warnings)} warnings, no errors"
    assert warnings[0].startswith("fp16: ")
    assert warnings[1].startswith("beta 1 is large for this gamma: z* = -20.00 is reached if")
    assert "differ by 20 nats" in warnings[1]
    assert not any("BOS doubled" in warning for warning in warnings)


@shares_answers
def test_axolotls_own_dpo_has_two(answers):
    warnings = read(answers["two BOS"])["warnings"]
    assert any(w.startswith("BOS doubled at the start of 100 % of the sequences") for w in warnings)


@shares_answers
def test_dpo_is_said_to_be_dpo(answers):
    found = read(answers["dpo"])
    assert (found["loss"], found["z_star"]) == ("dpo", None)
    assert found["first_loss"] == pytest.approx(math.log(2))
    assert found["warnings"][0].startswith("the loss is the host's own, dpo")


@shares_answers
@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("unknown key", "unknown key focalpo_gama, got 0.1; did you mean"),
        ("gamma", "focalpo_gamma must be below 1/ln 2 = 1.4427 for variant 'correct', got 1.5"),
        (
            "fused, capped",
            "focalpo_fused can't be combined with a model whose final_logit_softcapping is set",
        ),
        ("sft", "rl must be focalpo or another loss of preference pairs, got None"),
        ("no file", "CONFIG must be a YAML file, got"),
        ("no yaml", "broken.yml"),
    ],
)
def test_errors(answers, case: str, said: str):
    code, output, errors = answers[case]
    assert (code, output) == (2, "")
    last = errors.splitlines()[-1]
    assert last.startswith("focalpo check: error: ")
    assert said in last
    assert "Traceback" not in errors


@shares_answers
def test_nothing_is_left_behind(once: Axolotl, answers):
    """The config's output folder isn't created: a scratch folder replaces it."""
    assert not (once.folder / "checked").exists()


def test_it_is_one_of_axolotl_s_commands():
    done = subprocess.run(["axolotl", "focalpo", "check", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: axolotl focalpo check" in done.stdout
    assert "example:\n  axolotl focalpo check examples/tiny_focalpo.yml" in done.stdout


class Words:
    """A tokenizer that puts a BOS, 0, before a text; 1 is its EOS."""

    bos_token_id, eos_token_id, eos_token = 0, 1, "</s>"

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [0, 7]}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, ids))


# Token ids of the prompt and of both answers, whether they were cut, and the warnings.
SEQUENCES = [
    ([0, 5], [6, 1], [7, 1], False, []),
    ([5], [6, 1], [7, 1], False, ["no BOS at the start of 100 % of the sequences, though"]),
    ([0, 5], [6], [7, 1], False, ["no EOS (</s>) in 50 % of the answers, uncut ones"]),
    ([0, 5], [6], [7], True, ["100 % of the pairs are truncated to 2 tokens."]),
    ([0, 0, 5], [6, 1], [7, 1], False, ["BOS doubled at the start of 100 % of the sequences"]),
    ([0, 5], [0, 6, 1], [7, 1], False, ["BOS in 50 % of the answers"]),
    ([0, 5], [1], [7, 1], False, ["100 % of the pairs are empty"]),
    ([0, 5], [7, 1], [7, 1], False, ["100 % of the pairs are identical"]),
]


@pytest.mark.parametrize(("prompt", "chosen", "rejected", "cut", "said"), SEQUENCES)
def test_what_check_warns_of_in_the_tokens(prompt, chosen, rejected, cut, said):
    """One pair, two sequences; a cut answer has lost its EOS for another reason."""
    sides = [
        Tokens([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))
        for answer in (chosen, rejected)
    ]
    loss = get_loss("focalpo").bind()
    plan = SimpleNamespace(
        loss=loss, reversal=loss.reversal, warnings=[], beta=0.01, precision="bf16", tokenizer=Words(),
        rows=1, kept=1, pairs=[Pair(*sides, truncated=cut)], max_length=2, margin="dpo",
    )  # fmt: skip
    counts, _ = count(plan, 0)
    found = warnings(plan, counts, None, None)
    assert len(found) == len(said)
    for warning, beginning in zip(found, said, strict=True):
        assert warning.startswith(beginning)


@shares_answers
def test_a_margin_without_a_reference(answers: dict[str, Answer], tiny: Path, data: Path):
    """The same pairs, in the tokens that TRL's other trainer makes. The margin's z* = -20 implies
    nothing about log-ratios in nats, nor a first loss. If the prompt and the longer answer exceed
    the limit, that trainer cuts either answer to the limit minus the longer answer's length."""
    plain, simpo = (json.loads(answers[name][1]) for name in ("plain", "simpo"))
    assert simpo["pair"]["chosen"]["ids"] == plain["pair"]["chosen"]["ids"]
    assert simpo["pair"]["rejected"]["trained"] == plain["pair"]["rejected"]["trained"]
    assert simpo["counts"] == plain["counts"]
    assert (simpo["margin"], simpo["first_loss"]) == ("simpo", None)
    assert plain["margin"] == "dpo"
    memory = simpo["memory_bytes"]
    assert (memory["reference"], memory["reference_before"]) == (0, memory["weights"])
    text = answers["simpo, as text"][1]
    assert "margin simpo, without a reference: the first loss can't be predicted" in text
    assert "z* = -20.00: pairs with a lower margin are pushed further the wrong way" in text
    cut = json.loads(answers["simpo, cut by TRL"][1])
    expected = 1  # the empty answer: Axolotl takes a turn of the template instead
    for sides in ByHand(tiny, data).pairs:
        longer = max(len(answer) for _, answer in sides.values())
        if len(sides["chosen"][1]) == 1:
            continue
        expected += len(sides["chosen"][0]) + longer > 40 and 40 - longer < longer
    assert cut["counts"]["truncated"] == expected > 0


@shares_answers
def test_the_first_loss_of_other_losses(answers: dict[str, Answer]):
    """All at margin 0. IPO's is ``(0 - 1/(2 beta))^2``: 25 at beta 0.1, 1 at 0.5, 4 at 0.25; the
    hinge's is ``max(0, 1 - 0)``. For two losses it is .5 ln 2 + .25 * 4. An answer's own likelihood
    (sft) can't be known in advance, and it is also added to FocalPO."""
    assert read(answers["ipo"])["first_loss"] == pytest.approx(25)
    assert "predicted first loss 1.0000 (DPO: 0.6931)" in answers["ipo, without data"][1]
    assert read(answers["hinge"])["first_loss"] == 1
    assert read(answers["of two"])["first_loss"] == pytest.approx(0.5 * math.log(2) + 1)
    assert "the first loss can't be predicted: terms are added" in answers["apo"][1]
    assert read(answers["with sft"])["first_loss"] is None
    assert json.loads(answers["orpo, without data"][1])["beta"] == 0.2


@shares_answers
@pytest.mark.parametrize("case", ["ipo", "of two"])
def test_a_run_logs_the_first_loss_that_was_said(answers, once: Axolotl, data: Path, case: str):
    more: dict[str, Any] = {"rl": "ipo", "rl_beta": 0.1}
    if case == "of two":
        more = {"rl": "dpo", "rl_beta": 0.25, "dpo_loss_type": ["sigmoid", "ipo"]}
        more["dpo_loss_weights"] = [0.5, 0.25]
    pairs = {"path": str(data), "ds_type": "json", "split": "train"}
    pairs["type"] = "chat_template.argilla_chat"
    more |= {"focalpo_gamma": None, "focalpo_variant": None, "datasets": [pairs], "max_steps": 1}
    run = once.train(**more, output_dir=str(once.folder / f"first_{case}"))
    said = read(answers[case])["first_loss"]
    assert run.log[0]["loss"] == pytest.approx(said, abs=1e-3)


@shares_answers
def test_a_gamma_that_moves(answers: dict[str, Answer]):
    text = answers["moving"][1]
    assert "focalpo gamma=0.5 gamma_end=0.0 variant=correct, beta=0.1" in text
    assert "predicted first loss 0.4901 (DPO: 0.6931)" in text  # 2^-.5 ln 2
    assert "z* = -1.85" in text
