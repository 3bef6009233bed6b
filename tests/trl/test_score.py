"""``focalpo score``: rewards against log-probabilities computed by hand, and resuming."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_dataset
from harness import ManyFocalpo
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import extract_prompt

from focalpo_plugins import FocalPOConfig, FocalPOTrainer
from focalpo_plugins.cli import CommandError, main
from focalpo_plugins.cli.score.beta import beta_of
from focalpo_plugins.cli.score.scores_file import read_scores
from focalpo_plugins.trl.score import prepared_by_trl
from focalpo_plugins.trl.score_data import read_pairs
from focalpo_plugins.trl.score_models import (
    Source,
    _with_adapter,
    load_model,
    resolve,
    tokenizer_of,
)
from focalpo_plugins.trl.score_rows import Collator, by_template, trl_has_it

shares_ends = pytest.mark.xdist_group("ends")  # one worker makes the runs

BETA = 0.2
PAIRS = 6


def header_of(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def by_hand(network: Any, tokenizer: Any, messages: list[dict[str, str]]) -> tuple[float, int]:
    """Summed log-probability of the answer in float64, and its tokens. The sequence, including the
    template, is written out here; the answer begins after the assistant's header."""
    user, assistant = (message["content"] for message in messages)
    prompt = f"<|begin_of_text|>{header_of('user')}{user}<|eot_id|>{header_of('assistant')}"
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = tokenizer(f"{assistant}<|eot_id|>", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([before + answer])
    with torch.no_grad():
        logps = network(ids).logits[0].log_softmax(-1)
    n = len(before)
    return sum(logps[n + i - 1, token].item() for i, token in enumerate(answer)), len(answer)


def save_adapter(base: Path, folder: Path) -> None:
    """A trained LoRA over ``base``, in a folder as Axolotl leaves it: with the adapter a
    config.json, and a model.safetensors under PEFT's names."""
    model = AutoModelForCausalLM.from_pretrained(base)
    lora = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], modules_to_save=["norm"])
    lora.base_model_name_or_path = str(base)
    torch.manual_seed(1)
    model = get_peft_model(model, lora)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.05 * torch.randn(weight.shape)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    shutil.copy(base / "config.json", folder)
    weights = {key: weight.contiguous().clone() for key, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def mend_models(folder: Path) -> None:
    """Copies of the adapter and of the policy, each with one fault."""

    def copy(source: str, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
        shutil.copytree(folder / source, folder / name)
        file = "adapter_model.safetensors" if source == "adapter" else "model.safetensors"
        weights = load_file(folder / name / file)
        change(weights)
        save_file(weights, folder / name / file, {"format": "pt"})

    def renamed(weights: dict[str, Any]) -> None:
        key = next(key for key in sorted(weights) if "lora_A" in key)
        weights["base_model.model.elsewhere.lora_A.weight"] = weights.pop(key)

    q = "model.layers.0.self_attn.q_proj.weight"
    copy("adapter", "adapter, renamed", renamed)
    copy("adapter", "adapter, no norm", lambda w: w.pop("base_model.model.model.norm.weight"))
    copy("policy", "without", lambda w: w.pop(q))
    copy("policy", "with more", lambda w: w.update({"v_head.weight": torch.zeros(3)}))
    copy("policy", "another shape", lambda w: w.update({q: torch.zeros(3, 3)}))
    copy("policy", "not a number", lambda w: w[q].fill_(float("nan")))
    for name in ("adapter, no base", "adapter, base is one", "files beside an adapter"):
        copy("adapter", name, lambda w: None)
    changed = {"adapter, no base": "./moved", "adapter, base is one": str(folder / "adapter")}
    for name, base in changed.items():
        config = folder / name / "adapter_config.json"
        found = json.loads(config.read_text())
        config.write_text(json.dumps({**found, "base_model_name_or_path": base}))
    (folder / "files beside an adapter" / "adapter_config.json").unlink()
    (folder / "files beside an adapter" / "adapter_model.safetensors").unlink()
    shutil.copytree(folder / "policy", folder / "half")
    (folder / "half" / "model.safetensors").write_bytes(b"half")
    (folder / "adapter" / "checkpoint-6").mkdir()
    write_record(folder / "adapter" / "checkpoint-6" / "trainer_state.json", 0.5)


def write_record(file: Path, beta: float | None) -> None:
    """The trainer's record in a checkpoint, in transformers' file; none if DPO has trained it."""
    record = {"args": {"record": {"loss": "focalpo", "beta": beta}}, "attributes": {}}
    callbacks = {} if beta is None else {"_Record": record}
    file.write_text(json.dumps({"global_step": 6, "stateful_callbacks": callbacks}))


@pytest.fixture(scope="module")
def setting(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A policy that differs from the tiny model, and a few pairs, the second with equal answers."""
    folder = tmp_path_factory.mktemp("score")
    lines = (tiny / "test.jsonl").read_text().splitlines()[:PAIRS]
    same = json.loads(lines[1])
    lines[1] = json.dumps({**same, "rejected": same["chosen"]})
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    network = AutoModelForCausalLM.from_pretrained(tiny / "model")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    network.save_pretrained(folder / "policy")
    AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(folder / "policy")
    save_adapter(tiny / "model", folder / "adapter")
    mend_models(folder)
    (folder / "null.csv").write_text("prompt,chosen,rejected\nIs it there?,yes,no\nWhich?,None,b\n")
    (folder / "columns.jsonl").write_text('{"good": "a", "bad": "b"}\n')
    (folder / "broken.jsonl").write_text("{not json\n")
    (folder / "pairs.txt").write_text("")
    return {"folder": folder, "policy": folder / "policy", "ref": tiny / "model"}


@pytest.fixture(scope="module")
def ends(setting: dict[str, Path]) -> dict[str, tuple[int, str, str]]:
    folder = setting["folder"]

    def argv(
        out: str,
        *more: str,
        data: str = "pairs.jsonl",
        beta: float | None = BETA,
        model: str | Path = "policy",
        ref: str | Path = setting["ref"],
    ) -> list[str]:
        words = ["score", folder / model, "--ref", folder / ref, folder / data]
        words += ["--out", folder / out, *([] if beta is None else ["--beta", beta]), *more]
        return [*map(str, words)]

    cases = {
        "whole": argv("whole", "--batch-size", "4", "--format", "csv", "png"),
        "resumed": argv("resumed", "--batch-size", "4", "--format", "csv"),
        "complete": argv("complete", "--format", "csv"),
        "other beta": argv("resumed", "--format", "csv", beta=0.5),
        "cut": argv("cut", "--max-length", "24", "--format", "csv"),
        "no columns": argv("a", "--format", "csv", data="columns.jsonl"),
        "broken": argv("b", "--format", "csv", data="broken.jsonl"),
        "format": argv("c", "--format", "csv", data="pairs.txt"),
    }
    csv = ("--format", "csv")
    cases["null cell"] = argv("d", *csv, data="null.csv")
    cases["max length"] = argv("d", "--max-length", "0")
    shutil.copy(folder / "pairs.jsonl", folder / "pairs[0].jsonl")
    shutil.copy(folder / "columns.jsonl", folder / "pairs0.jsonl")
    cases["pattern"] = argv("pattern", "--batch-size", "4", *csv, data="pairs[0].jsonl")
    for case, file in (("own summary", "summary.json"), ("own histogram", "histogram.csv")):
        (folder / case).mkdir()
        (folder / case / file).write_text("{}\n")
        cases[case] = argv(case, *csv)
    cases["adapter"] = argv("adapted", *csv, model="adapter", beta=None)
    cases["adapter as reference"] = argv("reversed", *csv, model=setting["ref"], ref="adapter")
    cases["adapter, no base"] = argv("over", *csv, model="adapter, no base")
    cases["reference without base"] = argv("e", *csv, ref="adapter, no base")
    for model in ("files beside an adapter", "not a number"):
        cases[model] = argv("f", *csv, model=model)
    # A full disk, and a folder where a file should go.
    (folder / "full").mkdir()
    (folder / "full" / "scores.jsonl").symlink_to("/dev/full")
    cases["full"] = argv("full", "--format", "csv")
    focalpo = ManyFocalpo(folder)
    found = {"whole": focalpo(*cases.pop("whole"))}
    # Stopped in the middle of the fourth pair, and after the last.
    content = (folder / "whole" / "scores.jsonl").read_text()
    lines = content.splitlines(keepends=True)
    for name, kept in (("resumed", "".join(lines[:4]) + lines[4][:30]), ("complete", content)):
        (folder / name).mkdir()
        (folder / name / "scores.jsonl").write_text(kept)
    return found | {name: focalpo(*words) for name, words in cases.items()}


# Folder of the model, and the message about it.
WRONG_MODELS = {
    "adapter, renamed": "must have exactly the weights of its adapter, got '{}': its files lack 1 (base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight) and also have 1 (base_model.model.elsewhere.lora_A.default.weight). Missing",
    "adapter, no norm": "base_model.model.model.norm.weight",  # PEFT's own error
    "adapter, base is one": "must be an adapter of a whole model, got '{}': its base",
    "files beside an adapter": "must have exactly the weights of its LlamaForCausalLM, got '{}': its files lack ",
    "without": "its files lack 1 (model.layers.0.self_attn.q_proj.weight). Missing weights would be random",
    "with more": "its files also have 1 (v_head.weight). Missing",
    "another shape": "its files have in another shape 1 (model.layers.0.self_attn.q_proj.weight). Missing",
    "half": "must be a model that can be loaded, got '{}': SafetensorError: ",
}  # fmt: skip


@pytest.mark.parametrize("model", WRONG_MODELS)
def test_a_model_with_other_weights_than_its_own_is_refused(setting, model: str):
    """transformers fills weights that a file lacks with random numbers, and continues."""
    folder = str(setting["folder"] / model)
    with pytest.raises(ValueError) as error:
        load_model(resolve(folder, str(setting["ref"]))[0], "MODEL", "auto")
    assert str(error.value).startswith("MODEL must ")
    assert WRONG_MODELS[model].format(folder) in str(error.value)
    assert "\n" not in str(error.value)


@shares_ends
def test_a_model_that_cannot_score_is_one_line(ends):
    said = {
        "files beside an adapter": "must have exactly the weights of its LlamaForCausalLM, got",
        "not a number": "must give finite log-probabilities, got nan for the chosen answer of row 0: ",
    }
    for case, words in said.items():
        code, _, errors = ends[case]
        assert code == 2
        assert errors.splitlines()[-1].startswith(f"focalpo score: error: MODEL {words}")
        assert "Traceback" not in errors


@shares_ends
def test_an_adapter_is_loaded_over_its_base(setting, ends):
    """Its log-probabilities are those of the model that it is merged into; as the reference it
    swaps places; if its base is missing, --ref is its base. beta 0.5 is its checkpoint's."""
    folder = setting["folder"]
    base = AutoModelForCausalLM.from_pretrained(setting["ref"])
    from peft import PeftModel

    merged = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload().double()
    tokenizer = AutoTokenizer.from_pretrained(setting["ref"])
    lines = (folder / "pairs.jsonl").read_text().splitlines()
    logps = [by_hand(merged, tokenizer, json.loads(line)["chosen"])[0] for line in lines]
    for case in ("adapter", "adapter as reference", "adapter, no base"):
        assert ends[case][0] == 0, ends[case][2][-3000:]
    adapted, turned, over = (records(folder / out) for out in ("adapted", "reversed", "over"))
    assert [r["chosen_logp"] for r in adapted] == pytest.approx(logps, abs=1e-4)
    assert [r["ref_chosen_logp"] for r in turned] == pytest.approx(logps, abs=1e-4)
    assert [r["chosen_logp"] for r in over] == pytest.approx(logps, abs=1e-4)
    assert max(abs(r["margin"]) for r in adapted) > 0.01  # the adapter has an effect
    for ours, theirs in zip(adapted, turned, strict=True):
        assert ours["margin"] / 0.5 == pytest.approx(-theirs["margin"] / BETA, abs=1e-3)
    assert (
        f"MODEL is an adapter, loaded over {setting['ref']}, which it names" in ends["adapter"][1]
    )
    assert "beta 0.5, which MODEL was trained with (" in ends["adapter"][1]
    said = ends["adapter, no base"][1]
    assert (
        f"loaded over --ref {setting['ref']}: the base that it names, ./moved, wasn't found" in said
    )
    code, _, errors = ends["reference without base"]
    assert (code, "--ref must be a model, or an adapter whose base can be found" in errors) == (
        2,
        True,
    )
    header = json.loads((folder / "adapted" / "scores.jsonl").read_text().splitlines()[0])
    plain = json.loads((folder / "whole" / "scores.jsonl").read_text().splitlines()[0])
    assert header["policy_base"] == plain["reference"] == header["reference"]
    assert not {"policy_base", "reference_base"} & set(plain)


def test_without_peft_an_adapter_is_refused(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(
        ValueError, match="it is an adapter, which needs the package peft. Install it"
    ):
        _with_adapter(None, "folder")


def write_openrlhf(file: Path, beta: float) -> None:
    file.write_text(json.dumps({"loss": "focalpo", "focalpo.gamma": 0.05, "beta": beta}))


# Files in the model's folder `out` or next to it, with the beta that each records; the model; what
# is used. None is a run of DPO's, a text one that isn't complete.
RECORDED = [
    ({}, "out", 0.1),
    ({"out/trainer_state.json": 0.3}, "out", 0.3),
    ({"out/checkpoint-9/trainer_state.json": 0.3, "out/checkpoint-10/trainer_state.json": 0.4}, "out", 0.4),
    ({"out/checkpoint-9/trainer_state.json": 0.3, "out/checkpoint-10/trainer_state.json": "{"}, "out", 0.3),
    ({"out/checkpoint-9/trainer_state.json": None}, "out", 0.1),
    ({"out/trainer_state.json": -1.0}, "out", 0.1),
    # Written one after the other: by a shorter run in the folder of a longer one, and by one of
    # DPO's.
    ({"out/checkpoint-60/trainer_state.json": 0.3, "out/checkpoint-30/trainer_state.json": 0.4}, "out", 0.4),
    ({"out/trainer_state.json": 0.3, "out/checkpoint-30/trainer_state.json": 0.4}, "out", 0.4),
    ({"out/ckpt/global_step60/focalpo_plugins.json": 0.3, "out/ckpt/global_step30/focalpo_plugins.json": 0.4}, "out", 0.4),
    ({"out/checkpoint-60/trainer_state.json": 0.3, "out/checkpoint-30/trainer_state.json": None}, "out", 0.1),
    ({"out/checkpoint-9/trainer_state.json": 0.3}, "out/merged", 0.3),
    ({"out/checkpoint-9/trainer_state.json": 0.3}, "out/checkpoint-9", 0.3),
    ({"out/ckpt/global_step9/focalpo_plugins.json": 0.3}, "out", 0.3),
    ({"out/global_step9/focalpo_plugins.json": 0.3}, "out/global_step9_hf", 0.3),
]  # fmt: skip


@pytest.mark.parametrize(("files", "model", "beta"), RECORDED)
def test_beta_is_what_the_model_was_trained_with(tmp_path: Path, files, model: str, beta: float):
    for hours, (name, recorded) in enumerate(files.items(), 1):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(recorded, str):
            file.write_text(recorded)
        else:
            write = write_record if file.name == "trainer_state.json" else write_openrlhf
            write(file, recorded)
        os.utime(file, (hours * 3600, hours * 3600))
    (tmp_path / model).mkdir(parents=True, exist_ok=True)
    known = beta != 0.1
    found, said = beta_of(None, tmp_path / model)
    assert found == beta
    assert ("MODEL was trained with (" in said) is known
    given, said = beta_of(2.0, tmp_path / model)
    assert given == 2.0
    expected = f"warning: beta 2, from --beta, but MODEL was trained with {beta:g} ("
    assert said.startswith(expected if known else "beta 2, from --beta")
    assert beta_of(beta, tmp_path / model)[1].startswith(f"beta {beta:g}, from --beta")


def test_a_beta_of_another_run_in_the_folder_is_named(tmp_path: Path):
    """The newest file counts, and equal betas cause no message."""
    for step, beta, hour in ((60, 0.3, 1), (50, 0.4, 2), (30, 0.4, 3)):
        file = tmp_path / f"checkpoint-{step}" / "trainer_state.json"
        file.parent.mkdir()
        write_record(file, beta)
        os.utime(file, (hour * 3600, hour * 3600))
    older = f"{tmp_path / 'checkpoint-60' / 'trainer_state.json'}, which is older, says 0.3"
    beta, said = beta_of(None, tmp_path)
    assert (beta, said) == (0.4, f"beta 0.4, which MODEL was trained with ({file}; {older})")
    write_record(file, None)  # a run of DPO's
    beta, said = beta_of(None, tmp_path)
    assert beta == 0.1
    assert said.startswith(
        f"beta 0.1, the default: MODEL does not say what it was trained with ({file}; "
    )
    assert older in said


def test_beta_of_a_trainer_that_was_given_its_loss_twice(tmp_path: Path):
    write_record(tmp_path / "trainer_state.json", 0.3)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    first = {"args": {"record": {"beta": 0.7}}}
    state["stateful_callbacks"]["_Record"] = [first, state["stateful_callbacks"]["_Record"]]
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert beta_of(None, tmp_path)[0] == 0.3


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


WHOLE = {"chosen": [user("q"), answer("a")], "rejected": [user("q"), answer("b")]}
ALONE = {"chosen": [answer("a")], "rejected": [answer("b")]}
PARTS = ([user("q")], [answer("a")], [answer("b")])
TEXTS = {"chosen": "a", "rejected": "b"}

# Rows of a file, and prompt, chosen and rejected as a host reads them.
FORMS = {
    "texts": ({"prompt": "q", **TEXTS}, ("q", "a", "b")),
    "messages": ({"prompt": [user("q")], **ALONE}, PARTS),
    # HuggingFaceH4/ultrafeedback_binarized, in Axolotl and OpenRLHF.
    "text prompt, whole conversations": ({"prompt": "q", "prompt_id": "1", "messages": WHOLE["chosen"], "score_chosen": 1.0, **WHOLE}, PARTS),
    "no text prompt, whole conversations": ({"prompt": None, **WHOLE}, PARTS),
    # Axolotl's chat_template.default.
    "text prompt, answers": ({"prompt": "q", **ALONE}, PARTS),
    "one message each": ({"prompt": "q", "chosen": answer("a"), "rejected": answer("b")}, PARTS),
    "list of a prompt, texts": ({"prompt": [user("q")], **TEXTS}, PARTS),
    "messages, one message each": ({"messages": [user("q")], "chosen": answer("a"), "rejected": answer("b")}, PARTS),
    "several turns": (
        {"prompt": "q", "chosen": [user("q"), answer("x"), user("r"), answer("a")], "rejected": [user("q"), answer("x"), user("r"), answer("b")]},
        ([user("q"), answer("x"), user("r")], [answer("a")], [answer("b")]),
    ),
    "equal": ({"prompt": "q", "chosen": WHOLE["chosen"], "rejected": WHOLE["chosen"]}, (PARTS[0], PARTS[1], PARTS[1])),
}  # fmt: skip


def write_rows(folder: Path, *rows: dict[str, Any]) -> Path:
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(("row", "expected"), FORMS.values(), ids=FORMS)
def test_what_a_host_trains_on_can_be_scored(tmp_path: Path, row, expected):
    pairs, _ = read_pairs(write_rows(tmp_path, row, row))
    for found in pairs:
        assert tuple(found[key] for key in ("prompt", "chosen", "rejected")) == expected
    # Only the pair's columns decide whether it is a conversation.
    assert "messages" not in pairs.column_names


def test_a_prompt_that_is_the_start_of_both(tmp_path: Path):
    """Conversations as TRL divides them, also if a table adds None for keys that only the other
    message has. Texts are left to TRL."""
    file = write_rows(tmp_path, WHOLE, WHOLE)
    assert list(read_pairs(file)[0]) == [extract_prompt(WHOLE)] * 2
    file = write_rows(tmp_path, {"chosen": "q a", "rejected": "q b"})
    assert "prompt" not in read_pairs(file)[0].column_names
    called = {**answer("b"), "tool_calls": [{"name": "f"}]}
    filled = Dataset.from_list([{**WHOLE, "rejected": [{**user("q"), "tool_calls": None}, called]}])
    filled.to_parquet(tmp_path / "pairs.parquet")
    row = read_pairs(tmp_path / "pairs.parquet")[0][0]
    assert [message["content"] for message in row["prompt"]] == ["q"]
    assert [row[side][0]["content"] for side in ("chosen", "rejected")] == ["a", "b"]


def test_digits_in_a_csv_are_text(tmp_path: Path):
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\n1,2,007\n3,4.0,5\n")
    rows = list(read_pairs(tmp_path / "pairs.csv")[0])
    assert rows[0] == {"prompt": "1", "chosen": "2", "rejected": "007"}
    assert rows[1] == {"prompt": "3", "chosen": "4.0", "rejected": "5"}


GOOD = {"prompt": "q", **TEXTS}
# Rows of a file, and the message about the first bad row, or about the columns.
BAD_ROWS = {
    "null": ([GOOD, {**GOOD, "chosen": None}], "row 1 (the first is 0) has nothing in chosen"),
    "no column": ([GOOD, TEXTS], "row 1 (the first is 0) has nothing in prompt"),
    "number": ([{**GOOD, "rejected": 1}], "row 0 (the first is 0) has 1 in rejected, which is neither a text nor"),
    "numbers among texts": ([GOOD, {**GOOD, "rejected": 1}], "row 1 (the first is 0) has 1 in rejected"),
    "no message": ([{**WHOLE, "rejected": []}], "row 0 (the first is 0) has no message in rejected"),
    "null message": ([{**WHOLE, "chosen": [user("q"), None]}], "row 0 (the first is 0) has None in chosen, which isn't a message"),
    "no content": ([{**WHOLE, "chosen": [user("q"), {"role": "assistant", "content": None}]}], "which isn't a message with a role and a content"),
    "ShareGPT": ([{"prompt": "q", "chosen": [{"from": "gpt", "value": "a"}], "rejected": [{"from": "gpt", "value": "b"}]}], "which isn't a message with a role and a content"),
    "texts of a list": ([{"prompt": "q", "chosen": ["a"], "rejected": ["b"]}], "row 0 (the first is 0) has 'a' in chosen, which isn't a message"),
    "text and messages": ([{**GOOD, "rejected": [answer("b")]}], "row 0 (the first is 0) has a text as one answer and messages as the other"),
    "another form": ([GOOD, {"prompt": [user("q")], **ALONE}], "row 1 (the first is 0) has texts where row 0 has messages, or"),
    "no prompt": ([ALONE], "row 0 (the first is 0) has no prompt: its two conversations begin with different"),
    "empty text": ([{"chosen": "", "rejected": "b"}], "row 0 (the first is 0) has an empty text as an answer, and no prompt"),
    "Intel's": ([{"system": "", "question": "q", **TEXTS}], "DATA must have a prompt, got {} with question instead, which Axolotl puts"),
    "images": ([{**GOOD, "images": ["x.png"]}], "DATA must be pairs of texts, got {} with the column images"),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "said"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_row_that_is_no_pair_is_named(tmp_path: Path, rows, said: str):
    file = write_rows(tmp_path, *rows)
    with pytest.raises(ValueError) as error:
        read_pairs(file)
    assert said.format(repr(str(file))) in str(error.value)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


TEMPLATE = (
    "{{ bos_token }}{% if tools %}[{{ tools | tojson }}]{% endif %}{{ tone }}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_it_prepares_what_a_run_trains_on(tiny: Path, tmp_path: Path):
    """Everything that TRL puts into a prompt: tools, as JSON, and arguments of the template, with
    columns that it ignores, one of which has the name that the rows' numbers would have."""
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    tokenizer.chat_template = TEMPLATE
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    more = {"tools": json.dumps([tool]), "chat_template_kwargs": {"tone": "kind"}, "row": "r"}
    lines = (tiny / "test.jsonl").read_text().splitlines()[:2]
    file = write_rows(tmp_path, *({**json.loads(line), **more} for line in lines))
    rows = load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "c"))
    config = FocalPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    model = AutoModelForCausalLM.from_pretrained(tiny / "model")
    run = FocalPOTrainer(model, args=config, processing_class=tokenizer, train_dataset=rows)
    scored = prepared_by_trl(read_pairs(file)[0], tokenizer, None, str(file)).train_dataset
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert scored[name][:] == run.train_dataset[name][:]
        assert by_template(read_pairs(file)[0], tokenizer, None)[name][:] == scored[name][:]
    prompt = tokenizer.decode(scored[0]["prompt_ids"])
    assert "look" in prompt
    assert "kind" in prompt


@pytest.mark.parametrize("max_length", [None, 30])
@pytest.mark.parametrize("form", ["conversations", "texts", "texts without a prompt"])
def test_without_trl_the_pairs_are_the_same(tiny: Path, tmp_path: Path, form: str, max_length):
    """If TRL is too old: token by token, and as a batch.  The first prompt fills 30 tokens."""
    assert trl_has_it()
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    ends = {"chosen": "It was good.<|eot_id|>", "rejected": "It was long, it was bad"}
    lines = [json.loads(line) for line in (tiny / "test.jsonl").read_text().splitlines()[:3]]
    rows = [
        {"prompt": f"What is {'very ' * 40 * (not number)}new? ", **ends} for number in range(3)
    ]
    if form == "texts without a prompt":
        rows = [{side: row["prompt"] + row[side] for side in ends} for row in rows]
    pairs = read_pairs(write_rows(tmp_path, *(lines if form == "conversations" else rows)))[0]
    trainer = prepared_by_trl(pairs, tokenizer, max_length, "pairs.jsonl")
    theirs, ours = trainer.train_dataset, by_template(pairs, tokenizer, max_length)
    assert 0 < len(ours) == len(theirs)
    assert len(ours) < 3 or max_length is None or form == "conversations"
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert ours[name][:] == theirs[name][:]
    of_trl = trainer.data_collator([*theirs])
    batch = Collator(tokenizer.pad_token_id, max_length)([*ours])
    for name, values in batch.items():
        assert values.equal(of_trl[name]), name


def test_one_vocabulary_may_have_more(tiny: Path, tmp_path: Path):
    """As the tokenizer that LLaMA-Factory saves, to which it adds what may end a turn."""
    for name, token in (("more", "<|eom_id|>"), ("other", "<|other|>")):
        tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
        tokenizer.add_special_tokens({"additional_special_tokens": [token]})
        tokenizer.save_pretrained(tmp_path / name)
    model, more, other = (
        Source(str(each)) for each in (tiny / "model", tmp_path / "more", tmp_path / "other")
    )
    assert len(tokenizer_of(more, model)) == len(tokenizer_of(model, more)) + 1
    with pytest.raises(ValueError, match="MODEL and --ref must have the same vocabulary, got"):
        tokenizer_of(more, other)


def test_what_trl_cannot_prepare_is_one_line(tiny: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    tokenizer.chat_template = "{{ raise_exception('the roles must\n alternate') }}"
    file = write_rows(tmp_path, WHOLE)
    with pytest.raises(ValueError) as error:
        prepared_by_trl(read_pairs(file)[0], tokenizer, None, "pairs.jsonl")
    assert "DATA must be pairs that TRL" in str(error.value)
    assert str(error.value).endswith("the roles must alternate")


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()[1:]]


@shares_ends
def test_rewards_are_those_computed_by_hand(setting, ends):
    """``beta * (log p - log p_ref)`` in float64, the second pair's margin 0; to 1e-4 nats,
    float32's rounding of sums of log-probabilities of about 20 nats."""
    assert ends["whole"][0] == 0, ends["whole"][2][-3000:]
    tokenizer = AutoTokenizer.from_pretrained(setting["ref"])
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(setting[name], dtype=torch.float64)
        for name in ("policy", "ref")
    )
    pairs = map(json.loads, (setting["folder"] / "pairs.jsonl").read_text().splitlines())
    margins = []
    for record, pair in zip(records(setting["folder"] / "whole"), pairs, strict=True):
        rewards = []
        for side in ("chosen", "rejected"):
            logp, tokens = by_hand(policy, tokenizer, pair[side])
            ref_logp, _ = by_hand(reference, tokenizer, pair[side])
            assert record[f"{side}_tokens"] == tokens
            assert record[f"{side}_logp"] == pytest.approx(logp, abs=1e-4)
            assert record[f"ref_{side}_logp"] == pytest.approx(ref_logp, abs=1e-4)
            rewards.append(BETA * (logp - ref_logp))
            assert record[f"{side}_reward"] == pytest.approx(rewards[-1], abs=1e-4)
        margins.append(rewards[0] - rewards[1])
        assert record["margin"] == pytest.approx(margins[-1], abs=1e-4)
        assert record["ref_right"] == (record["ref_chosen_logp"] > record["ref_rejected_logp"])
    assert margins[1] == 0
    assert max(map(abs, margins)) > 0.05  # the two models do differ

    summary = json.loads((setting["folder"] / "whole" / "summary.json").read_text())
    groups = summary["groups"]
    assert groups["all pairs"]["pairs"] == PAIRS
    assert groups["all pairs"]["margin"] == pytest.approx(sum(margins) / PAIRS, abs=1e-4)
    assert groups["all pairs"]["accuracy"] == sum(m > 0 for m in margins) / PAIRS
    right, wrong = groups["reference ranks right"], groups["reference ranks wrong"]
    assert right["pairs"] + wrong["pairs"] == PAIRS
    assert 0 < right["pairs"] < PAIRS
    assert (setting["folder"] / "whole" / "histogram.png").stat().st_size > 0
    bins = (setting["folder"] / "whole" / "histogram.csv").read_text().splitlines()[1:]
    assert sum(int(n) for line in bins for n in line.split(",")[2:]) == PAIRS


@shares_ends
def test_goes_on_where_it_stopped(setting, ends):
    """The half-written line is scored again, the complete ones are kept, in any batches."""
    code, said, errors = ends["resumed"]
    assert code == 0, errors[-3000:]
    assert "has 3 pairs already" in said
    whole, resumed = records(setting["folder"] / "whole"), records(setting["folder"] / "resumed")
    assert resumed[:3] == whole[:3]
    for ours, theirs in zip(resumed, whole, strict=True):
        assert ours["row"] == theirs["row"]
        assert ours["margin"] == pytest.approx(theirs["margin"], abs=1e-4)
    assert ends["complete"][0] == 0, ends["complete"][2]
    assert records(setting["folder"] / "complete") == whole


@shares_ends
def test_half_a_file_is_never_read_as_whole(setting, ends, tmp_path):
    """Cut anywhere: pairs with complete lines are kept, and the file then ends with the last of
    them."""
    lines = (setting["folder"] / "whole" / "scores.jsonl").read_bytes().splitlines(keepends=True)
    content = b"".join(lines[:3])
    header, scores = json.loads(lines[0]), tmp_path / "scores.jsonl"
    for cut in range(len(content) + 1):
        scores.write_bytes(content[:cut])
        whole = content[:cut].count(b"\n")
        assert sorted(read_scores(scores, header)) == list(range(max(0, whole - 1)))
        assert scores.read_bytes() == b"".join(lines[:whole])


# One line of a user's file, whole lines of one, and a possible start of our own file.
FOREIGN = [
    '{"my": "results"}',
    '{"my": 1}\n{"my": 2}\n',
    '{"my": 1}\nhalf',
    "x",
    '{"focalpo_score": 2}',
    "\n",
]


@pytest.mark.parametrize("content", FOREIGN)
def test_a_scores_file_of_the_user_is_never_touched(tmp_path: Path, content: str):
    scores = tmp_path / "scores.jsonl"
    scores.write_text(content)
    with pytest.raises(CommandError) as error:
        read_scores(scores, {"focalpo_score": 1})
    assert str(error.value).startswith(f"{scores} is there already, is not a file of")
    assert scores.read_text() == content


@shares_ends
def test_other_files_of_the_user_are_never_touched(setting, ends):
    for case, file in (("own summary", "summary.json"), ("own histogram", "histogram.csv")):
        code, _, errors = ends[case]
        assert (code, f"holds a {file} that this command did not write" in errors) == (2, True)
        folder = setting["folder"] / case
        assert [(path.name, path.read_text()) for path in folder.iterdir()] == [(file, "{}\n")]


@shares_ends
def test_a_path_is_no_pattern(setting, ends):
    """The named file is scored, not the files that its name would match."""
    assert ends["pattern"][0] == 0, ends["pattern"][2][-3000:]
    assert records(setting["folder"] / "pattern") == records(setting["folder"] / "whole")


def score_with(monkeypatch, tmp_path: Path, error: Exception, *words: str) -> int:
    """``focalpo score`` with a scorer that fails on its third pair, after scoring two."""

    class Scorer:
        rows, total, form = [0, 1, 2], 3, "texts"

        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def score(self, places: list[int]) -> list[dict[str, Any]]:
            if 2 in places:
                raise error
            names = ("chosen_logp", "rejected_logp", "ref_chosen_logp", "ref_rejected_logp")
            return [{"row": place, **dict.fromkeys(names, -1.0)} for place in places]

    monkeypatch.setattr("focalpo_plugins.trl.score.PairScorer", Scorer)
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    given = [tmp_path / "pairs.jsonl", "--ref", tmp_path / "model", "--out", tmp_path / "out"]
    argv = ["score", tmp_path / "model", *given, "--format", "csv", "--batch-size", 1, *words]
    return main([*map(str, argv)])


@pytest.mark.parametrize(
    "error",
    [ConnectionResetError(104, "Connection reset by peer"), KeyError("logits"), ValueError("of\na library"),
     OSError(28, "No space left on device"), RuntimeError("CUDA error")],
    ids=repr,
)  # fmt: skip
def test_a_library_s_error_has_its_type_and_blames_nobody(monkeypatch, tmp_path, capsys, error):
    """The pairs before it are kept."""
    assert score_with(monkeypatch, tmp_path, error) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    kind = type(error).__name__
    text = " ".join(str(error).split())
    assert said.startswith(
        f"focalpo score: error: {kind}: {text}. A library raised it while rows 2 "
    )
    assert "--out must be" not in said and "must be" not in said
    assert [record["row"] for record in records(tmp_path / "out")] == [0, 1]
    with pytest.raises(type(error)):
        score_with(monkeypatch, tmp_path, error, "--debug")


@shares_ends
def test_a_full_disk(setting, ends):
    code, _, errors = ends["full"]
    assert code == 2
    assert errors.splitlines()[-1] == (
        "focalpo score: error: --out must be a folder with room that can be written to, got "
        f"{str(setting['folder'] / 'full')!r}: scores.jsonl: No space left on device. Make room, or "
        "name another."
    )
    assert [path.name for path in (setting["folder"] / "full").iterdir()] == ["scores.jsonl"]


@shares_ends
def test_another_run_s_scores_are_not_gone_on_with(ends):
    code, _, errors = ends["other beta"]
    assert code == 2
    assert (
        "belongs to another run: beta was 0.2, got 0.5. Give another --out"
        in errors.splitlines()[-1]
    )


def test_it_says_which_run_the_scores_are_of(tmp_path: Path):
    """Another folder by its name; the same folder with other weights as such."""
    (tmp_path / "scores.jsonl").write_text(
        '{"focalpo_score": 1, "policy": "sha256:a", "data": "d", '
        '"given": {"policy": ["MODEL", "outputs/a"], "data": ["DATA", "x.jsonl"]}}\n'
    )
    asked = {"focalpo_score": 1, "policy": "sha256:b", "data": "d"}
    for path, said in (
        ("outputs/b", "MODEL was 'outputs/a', got 'outputs/b'. "),
        ("outputs/a", "the files of MODEL 'outputs/a' have changed. "),
    ):
        given = {"policy": ["MODEL", path], "data": ["DATA", "y.jsonl"]}
        with pytest.raises(CommandError) as error:
            read_scores(tmp_path / "scores.jsonl", {**asked, "given": given})
        assert f"scores.jsonl belongs to another run: {said}Give another --out" in str(error.value)
    assert read_scores(tmp_path / "scores.jsonl", {**asked, "policy": "sha256:a"}) == {}


@shares_ends
def test_what_max_length_drops_is_counted(setting, ends):
    """TRL drops pairs whose prompt has 24 tokens or more, counted here by hand."""
    assert ends["cut"][0] == 0, ends["cut"][2][-3000:]
    tokenizer = AutoTokenizer.from_pretrained(setting["ref"])
    lengths = []
    for line in (setting["folder"] / "pairs.jsonl").read_text().splitlines():
        user = json.loads(line)["chosen"][0]["content"]
        text = f"<|begin_of_text|>{header_of('user')}{user}<|eot_id|>{header_of('assistant')}"
        lengths.append(len(tokenizer(text, add_special_tokens=False)["input_ids"]))
    kept = [row for row, length in enumerate(lengths) if length < 24]
    assert 0 < len(kept) < PAIRS, lengths
    assert [record["row"] for record in records(setting["folder"] / "cut")] == kept
    assert f"{PAIRS - len(kept)} of {PAIRS} rows were dropped" in ends["cut"][1]


@shares_ends
@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("no columns", "DATA must have rows with chosen and rejected, got"),
        ("broken", "DATA must be a preference file, got"),
        ("format", "DATA must end in .jsonl, .json, .parquet, .csv, got"),
        ("null cell", "DATA must hold a pair in each row, got"),
        ("max length", "--max-length must be at least 1, got 0."),
    ],
)
def test_bad_data(ends, case: str, said: str):
    code, _, errors = ends[case]
    assert code == 2
    assert errors.splitlines()[-1].startswith(f"focalpo score: error: {said}")
    assert "Traceback" not in errors
