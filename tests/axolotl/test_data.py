"""Data formats in Axolotl, and the messages for data that Axolotl can't read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness import Axolotl, ManyFocalpo
from row_formats import ARGILLA, FORMATS, OF_PROMPT, TEMPLATE, USER

from focalpo_plugins.cli.check.shapes import SHAPES

shares_answers = pytest.mark.xdist_group("data answers")  # one worker makes all runs

STRINGS = FORMATS["strings"][0]
WHOLE = FORMATS["whole conversations"][0]
# Formats that each type fails on; the others read such a row in their own way.
FAILS = [
    ("strings", {"type": ARGILLA}),
    ("prompt and answers as message lists", {"type": ARGILLA}),
    ("prompt and answers as message lists", {"type": TEMPLATE}),
    ("whole conversations", {"type": TEMPLATE}),
    ("a prompt beside whole conversations", {"type": "passthrough"}),
    ("messages, and one message an answer", {"type": ARGILLA}),
    ("two texts without a prompt", {"type": TEMPLATE}),
    ("two texts without a prompt", {"type": "passthrough"}),  # for its top-level key
]
# Released sizes: parameters of the models that the recipes train.
PARAMETERS = {"llama-3-8b": 8_030_261_248, "mistral-7b": 7_241_732_096, "qwen3-8b": 8_190_735_360}
Answer = tuple[int, str, str]


def written(folder: Path, name: str, rows: list[dict]) -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def says(row: dict, side: str, answer: str) -> dict:
    return {**row, side: [*row[side][:-1], {"role": "assistant", "content": answer}]}


def thinks(number: int) -> dict:
    return says(WHOLE, "chosen", f"<think>\nHm, {number}.\n</think>\n\ngood")


def varied(row: dict) -> list[dict]:
    """Four rows of one format with different words."""
    return [json.loads(json.dumps(row).replace("one word", f"word {i}")) for i in range(4)]


@pytest.fixture(scope="module")
def answers(once: Axolotl, focalpo: ManyFocalpo) -> dict[Any, Answer]:
    def config(name: str, rows: list[dict], **changes: Any) -> Path:
        of_data = changes.pop("dataset")
        data = {"path": written(once.folder, name, rows), "ds_type": "json", "split": "train"}
        # Axolotl knows prepared data by its path.
        changes |= {"dataset_prepared_path": str(once.folder / f"prepared {name}")}
        return once.config(datasets=[{**data, **of_data}], **changes)

    words: dict[Any, list] = {}
    for number, (name, (row, of_data, _)) in enumerate(FORMATS.items()):
        more = {"skip_prepare_dataset": True} if of_data["type"] == "passthrough" else {}
        made = config(f"good{number}", varied(row), dataset=of_data, **more)
        words[name] = ["--json", made]
    for number, (name, of_data) in enumerate(FAILS):
        rows = varied(FORMATS[name][0])
        words[name, number] = [config(f"bad{number}", rows, dataset=of_data)]
    for name, cell in (("odd", ["a"]), ("empty", None)):
        rows = [*varied(STRINGS)[:2], {**STRINGS, "prompt": cell}]
        words[name] = [config(name, rows, dataset=OF_PROMPT)]
    other = [{"role_": "user", "text": "a"}]
    other_keys = {"chosen": other, "rejected": other}
    words["other keys"] = [config("keys", [other_keys], dataset={"type": ARGILLA})]
    words["no template"] = [
        "--json",
        config("plain", varied(STRINGS), dataset={"type": "passthrough"}),
    ]
    orpo = {"focalpo_margin": "orpo", "rl_beta": None, "orpo_alpha": 0.5}
    for name, kind, row in (
        ("orpo", "chat_template.argilla", FORMATS["whole conversations"][0]),
        ("orpo, chat", ARGILLA, FORMATS["whole conversations"][0]),
        ("orpo, strings", "chat_template.argilla", STRINGS),
    ):
        made = config(name, varied(row), dataset={"type": kind}, **orpo)
        words[name] = ["--json", made] if name == "orpo" else [made]
    whole = {"dataset": {"type": ARGILLA}}
    words["a second thought"] = [
        config("thought", [thinks(i) for i in range(4)], **whole, chat_template="qwen3_5")
    ]
    # The tiny model's template trims.
    spaced = [*varied(WHOLE)[:3], says(WHOLE, "chosen", "good\n")]
    words["spaced"] = ["--json", config("spaced", spaced, **whole)]
    ignored = {"neftune_noise_alpha": 5.0, "train_on_inputs": True, "load_best_model_at_end": False}
    words["ignored"] = ["--json", config("ignored", varied(WHOLE), **whole, **ignored)]
    lora = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}
    words["adapter"] = [
        config("adapter", varied(WHOLE), **whole, **lora, lora_model_dir="./nowhere")
    ]
    table = {"path": str(once.folder / "pairs.csv"), "ds_type": "csv", "type": "passthrough"}
    Path(table["path"]).write_text("prompt,chosen,rejected\na,b,c\nd,None,f\n")
    words["csv"] = [config("csv", [], dataset=table)]
    from_hub = {"base_model": "meta-llama/Meta-Llama-3-8B-Instruct"}
    words["hub"] = [hub := config("hub", varied(STRINGS), dataset=OF_PROMPT, **from_hub)]
    for shape in SHAPES:
        words[shape] = ["--json", "--model-config", shape, hub]
    words["shape as text"] = ["--model-config", "llama-3-8b", hub]
    words["file"] = ["--json", "--model-config", once.tiny / "model" / "config.json", hub]
    words["no shape"] = ["--model-config", "llama-4", hub]
    words["no model"] = ["--model-config", once.tiny / "model" / "tokenizer.json", hub]
    return {name: focalpo("check", *map(str, argv)) for name, argv in words.items()}


def error_of(answer: Answer) -> str:
    code, output, errors = answer
    assert (code, output) == (2, ""), errors[-3000:]
    return errors.splitlines()[-1]


@shares_answers
@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_named_with_what_reads_it(answers: dict, name: str):
    code, output, errors = answers[name]
    assert code == 0, errors[-3000:]
    found = json.loads(output)
    of_data = " and ".join(f"{key}: {value}" for key, value in FORMATS[name][1].items())
    of_data += " and skip_prepare_dataset: true" * (of_data == "type: passthrough")
    plain = ", or type: passthrough for a model without a chat template"
    (said, *_) = found["formats"]
    assert said.startswith("datasets[0].path '") and ".jsonl' has " in said
    assert said.endswith(f": {name}; to read them, set {of_data}{plain * (name == 'strings')}")
    assert found["pair"]["chosen"]["tokens"][-1] == "<|eot_id|>"


@shares_answers
@pytest.mark.parametrize(("name", "number"), [(name, i) for i, (name, _) in enumerate(FAILS)])
def test_a_type_that_fails(answers: dict, name: str, number: int):
    """The host's error, then the file, its first row, the current type and the fitting one."""
    said = error_of(answers[name, number])
    needed = " and ".join(f"{key}: {value}" for key, value in FORMATS[name][1].items())
    assert ". datasets[0].path " in said and f"bad{number}.jsonl': its first row has " in said
    assert f", and type is {FAILS[number][1]['type']}: these are {name}: set {needed}" in said


@shares_answers
def test_a_row_that_differs(answers: dict):
    said = error_of(answers["odd"])
    assert "and type is chat_template.default, which fits, but row 2 has chosen (text)" in said
    assert said.endswith("prompt (list). Fix or remove that row.")


@shares_answers
@pytest.mark.parametrize(
    ("case", "file", "row", "column"),
    [("empty", "empty.jsonl", 2, "prompt"), ("csv", "pairs.csv", 1, "chosen")],
)
def test_an_empty_cell(answers: dict, case: str, file: str, row: int, column: str):
    said = error_of(answers[case])
    assert "datasets[0].path must have prompt and answers in every row, got " in said
    assert f"got row {row} (the first is 0) of '" in said and f"/{file}' with an empty" in said
    assert f"an empty cell in the column '{column}'. Fill it, or remove the row." in said
    of_csv = "In a CSV, words such as None, NA and null are read as an empty cell."
    assert said.endswith(of_csv) == (case == "csv")


@shares_answers
def test_a_second_thought(answers: dict):
    """Axolotl's qwen3_5 opens a thought in each generation prompt; the answer opens another."""
    said = error_of(answers["a second thought"])
    assert (
        "refused: 4 of 4 rows have an answer that repeats the end of the prompt, such as a second"
        in said
    )
    assert "<think>\\n\\n<think>\\nHm, 0.\\n" in said


@shares_answers
def test_rows_that_are_trained_as_other_text(answers: dict):
    """The template trims, and Axolotl looks for "good" with its line end: it takes a `>`."""
    code, output, errors = answers["spaced"]
    assert code == 0, errors[-3000:]
    (warning,) = (said for said in json.loads(output)["warnings"] if "as the chat template" in said)
    assert warning.startswith("1 of 4 rows have an answer that isn't trained as the chat template")
    assert "The first is row 3 of datasets[0].path " in warning


@shares_answers
def test_keys_that_axolotl_ignores(answers: dict):
    """Each key is given a value that has an effect; Axolotl reads them only for supervised
    fine-tuning."""
    code, output, errors = answers["ignored"]
    assert code == 0, errors[-3000:]
    (warning,) = (said for said in json.loads(output)["warnings"] if "ignores" in said)
    assert warning.startswith("Axolotl ignores neftune_noise_alpha, train_on_inputs when it trains")


@shares_answers
def test_an_adapter_that_axolotl_does_not_load(answers: dict):
    said = error_of(answers["adapter"])
    assert (
        "lora_model_dir must be unset under rl: focalpo, got './nowhere': Axolotl doesn't" in said
    )
    assert "`axolotl merge-lora SFT.yml --lora-model-dir ./nowhere --output-dir OUT`" in said


@shares_answers
def test_messages_with_other_keys(answers: dict):
    said = error_of(answers["other keys"])
    assert "chosen (messages with the keys role_, text)" in said
    assert "its messages have other keys than role and content: rename them" in said


@shares_answers
def test_the_one_type_of_orpo(answers: dict):
    code, output, errors = answers["orpo"]
    assert code == 0, errors[-3000:]
    (said, *_) = json.loads(output)["formats"]
    assert said.endswith("; to read them, set type: chat_template.argilla")
    said = error_of(answers["orpo, chat"])
    assert said.endswith("these are whole conversations: set type: chat_template.argilla.")
    assert "make them whole conversations, and set type: chat_template.argilla" in error_of(
        answers["orpo, strings"]
    )


@shares_answers
def test_a_chat_model_without_its_template(answers: dict):
    (warning,) = json.loads(answers["no template"][1])["warnings"]
    assert warning.startswith(
        "none of the sequences begins as the tokenizer's chat template does, "
    )
    assert "'<|begin_of_text|>'" in warning


@shares_answers
def test_what_comes_from_a_hub(answers: dict):
    """Offline: the message names what is missing, with what to do, and no local files."""
    said = error_of(answers["hub"])
    assert "base_model 'meta-llama/Meta-Llama-3-8B-Instruct'. Config, tokenizer and data" in said
    assert "Llama 3, which is gated" in said and "`focalpo check --model-config`" in said
    assert "datasets[0]" not in said


@shares_answers
@pytest.mark.parametrize("shape", SHAPES)
def test_the_memory_without_the_model(answers: dict, shape: str):
    """In float32 with Adam: weights, gradients, two moments and a reference, 4 bytes each."""
    code, output, errors = answers[shape]
    assert code == 0, errors[-3000:]
    found = json.loads(output)
    parameters = PARAMETERS[shape]
    assert found["memory_bytes"]["parameters"] == parameters
    assert found["memory_bytes"]["state"] == parameters * (4 + 4 + 8 + 4)
    assert found["first_loss"] == pytest.approx(0.6695, abs=1e-4)
    assert "counts" not in found and "pair" not in found


@shares_answers
def test_the_memory_of_a_config_file(answers: dict):
    found = json.loads(answers["file"][1])
    assert found["memory_bytes"]["parameters"] == 851_456
    code, said, _ = answers["shape as text"]
    assert code == 0
    assert "data     not read; sequences taken as 128 tokens long, the limit" in said
    assert "8,030,261,248 parameters" in said and said.endswith("0 warnings, no errors\n")


@shares_answers
@pytest.mark.parametrize(
    ("case", "why"), [("no shape", "No such file or directory."), ("no model", "no model_type.")]
)
def test_no_model_config(answers: dict, case: str, why: str):
    said = error_of(answers[case])
    known = ", ".join(SHAPES)
    assert f"--model-config must be a model's config.json or one of {known}, got " in said
    assert said.endswith(why)


@pytest.mark.xdist_group("autoload off")
@pytest.mark.parametrize("off", ["FOCALPO_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
def test_without_autoload_the_missing_line_is_named(once: Axolotl, off: str):
    """With the line, the config is read. Either way of turning the autoload off shows it."""
    configs = [once.config()]
    if off == "FOCALPO_AUTOLOAD":
        configs.append(once.config(plugins=["focalpo_plugins.axolotl.FocalPOPlugin"]))
    focalpo = ManyFocalpo(once.folder, **{off: "0"})
    code, _, errors = focalpo("check", configs[0])
    last = errors.splitlines()[-1]
    assert code == 2
    assert "plugins must list focalpo_plugins.axolotl.FocalPOPlugin if " in last
    assert f"{off}=0 turns the autoload off, got []. Add the lines `plugins:`" in last
    for config in configs[1:]:
        code, _, errors = focalpo("check", config)
        assert code == 0, errors[-3000:]


def test_the_last_line_of_a_launched_run(axolotl: Axolotl):
    """The line after the launcher's own traceback. Errors in the config itself are refused before
    the launcher starts, as test_flags.py tests."""
    path = written(axolotl.folder, "strings", varied(STRINGS))
    data = {"path": path, "ds_type": "json", "split": "train", "type": ARGILLA}
    config = axolotl.config(datasets=[data])
    said = f"focalpo_plugins: datasets[0].path {path!r}: its first row has prompt (text), "
    run = axolotl("train", config, "--launcher", "accelerate")
    assert run.code != 0
    *_, before, last = run.output.splitlines()
    assert before.startswith("subprocess.CalledProcessError: ")
    assert last.startswith(said), run.output[-3000:]
    assert USER["content"] not in last
