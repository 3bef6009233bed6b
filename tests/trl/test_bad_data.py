"""Useless data in TRL's trainer: it is refused before anything is computed."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset, load_dataset
from json_files import FILES
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from trl.trainer import dpo_trainer

from focalpo_plugins import FocalPOConfig, FocalPOTrainer
from focalpo_plugins.guards import hub
from focalpo_plugins.guards.jsonl import broken_file, check_file

pytestmark = pytest.mark.releases

SPECIAL = ["<pad>", "<s>", "</s>", "<|end|>", "<unk>"]
WORDS = ["user", "assistant", "one", "two", *(f"w{i}" for i in range(20))]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }} {{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
Row = dict[str, Any]


def row(i: int, chosen: str, rejected: str) -> Row:
    return {"prompt": f"user w{i} assistant", "chosen": f" {chosen}", "rejected": f" {rejected}"}


def good(i: int) -> Row:
    return row(i, f"one w{i}", f"two w{i}")


def alike(i: int) -> Row:
    return row(i, f"one w{i}", f"one w{i}")


def without_answer(i: int) -> Row:
    return row(i, "", f"two w{i}")


def silent(i: int) -> Row:
    """The template ends the turn of an empty answer with a token other than the EOS."""
    said = {"prompt": [("user", f"w{i}")], "chosen": [("assistant", "")],
            "rejected": [("assistant", f"w{i}")]}  # fmt: skip
    return {
        side: [{"role": role, "content": content} for role, content in turns]
        for side, turns in said.items()
    }


def late(i: int) -> Row:
    """A BOS and three tokens of the prompt, twelve equal tokens, one that differs, and the EOS."""
    return row(i, "one " * 12 + f"w{i}", "one " * 12 + "two")


def early(i: int) -> Row:
    return row(i, f"w{i}" + " one" * 12, "two" + " one" * 12)


def texts(i: int) -> Row:
    """Without a column prompt; the rejected answer continues where the chosen one ends."""
    return {"chosen": f"user w{i} assistant one", "rejected": f"user w{i} assistant one w{i}"}


def asks(i: int, *more: tuple[str, str], chosen: str = "one", rejected: str = "two") -> Row:
    """Whole conversations; ``more`` has the turns before the last, of both sides or of each."""
    turns = {side: [{"role": "user", "content": f"w{i}"}] for side in ("chosen", "rejected")}
    for both in more:
        for side, content in zip(turns, both, strict=True):
            role = "assistant" if len(turns[side]) % 2 else "user"
            turns[side].append({"role": role, "content": content})
    for side, content in (("chosen", chosen), ("rejected", rejected)):
        turns[side].append({"role": "assistant", "content": content})
    return turns


EQUAL = "8 of 8 pairs have identical answers"
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "alike": (alike, {}, EQUAL + ", so their margin stays 0"),
    "alike once cut": (
        late, {"max_length": 16},
        EQUAL + " (8 of them only once cut to max_length=16), so their margin"),
    "alike once their start is cut": (
        early, {"max_length": 12, "truncation_mode": "keep_end"},
        EQUAL + " (8 of them only once cut to max_length=12), so their margin"),
    "empty answers": (without_answer, {}, "8 of 8 pairs have an empty answer"),
    "empty turns": (silent, {}, "8 of 8 pairs have an empty answer"),
    "five of eight": (lambda i: (alike if i < 5 else good)(i), {}, "5 of 8 pairs have identical"),
}  # fmt: skip
PASS: dict[str, tuple[Any, dict[str, Any]]] = {
    "good": (good, {}),
    "cut one token later": (late, {"max_length": 17}),
    "their start cut one token earlier": (
        early, {"max_length": 14, "truncation_mode": "keep_end"}),
}  # fmt: skip


# The generation prompt has one word more than the rendering of a row.
THINKING = TEMPLATE.replace("assistant {% endif %}", "assistant w1 w2 {% endif %}")
OTHER = "refused: 8 of 8 rows have an answer that isn't trained as the chat template renders it"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", additional_special_tokens=["<|end|>"])  # fmt: skip
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def build(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Any:
    """A function that gives a trainer for the rows; computing anything before it is built is a
    failure."""

    def trainer(rows: Any, **changes: Any) -> FocalPOTrainer:
        if isinstance(rows, list):
            # TRL up to 1.8 can't precompute for data in memory.
            Dataset.from_list(rows).save_to_disk(tmp_path / "pairs")
            rows = Dataset.load_from_disk(tmp_path / "pairs")
        size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        llama = LlamaConfig(vocab_size=len(tokenizer), intermediate_size=8, **size)
        torch.manual_seed(0)
        policy, reference = LlamaForCausalLM(llama), LlamaForCausalLM(llama)
        if changes.get("precompute_ref_log_probs"):
            reference.forward = policy.forward = None
        evaluation = changes.pop("eval_dataset", None)
        config = FocalPOConfig(
            str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", max_steps=1,
            save_strategy="no", logging_steps=1, gradient_checkpointing=False, **changes)  # fmt: skip
        return FocalPOTrainer(
            policy, reference, config, train_dataset=rows, eval_dataset=evaluation,
            processing_class=tokenizer)  # fmt: skip

    return trainer


def warnings(capsys: Any) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if "focalpo_plugins: w" in line]


def stream(rows: list[Row]) -> IterableDataset:
    return Dataset.from_list(rows).to_iterable_dataset()


@pytest.mark.parametrize("case", REFUSED)
def test_refused(build: Any, case: str, capsys: Any):
    """Refused before the reference, which has no forward here, computes log-probabilities."""
    make, changes, why = REFUSED[case]
    rows = [make(i) for i in range(8)]
    with pytest.raises(ValueError) as refused:
        build(rows, precompute_ref_log_probs=True, **changes)
    assert f"training data refused: {why}" in str(refused.value)
    assert "To train anyway, set focalpo_allow_data=True. " in str(refused.value)
    assert not warnings(capsys)
    build(stream(rows), focalpo_allow_data=True, **changes)
    (warning,) = warnings(capsys)
    assert why in warning


def test_a_stream_is_refused_and_allowed(build: Any):
    rows = [alike(i) for i in range(8)]
    with pytest.raises(ValueError, match="training data refused: " + EQUAL):
        build(stream(rows))
    trainer = build(stream(rows), focalpo_allow_data=True)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("case", PASS)
def test_passes(build: Any, case: str, capsys: Any):
    make, changes = PASS[case]
    build([make(i) for i in range(8)], **changes)
    assert not warnings(capsys)


def test_a_common_start_that_became_the_prompt(build: Any, capsys: Any):
    """The place of the EOS can be learnt, so the first step has a gradient.  TRL 1.15 and later move
    the last word that both answers share out of the prompt and into the answers.  Older releases
    cut within a word and warn of each of the 16 answers; this package says it once, in one line."""
    trainer = build([texts(i) for i in range(8)])
    said = warnings(capsys)
    counted = [line for line in said if "16 answers change the tokens at the end of their" in line]
    said = [line for line in said if line not in counted]
    if hasattr(dpo_trainer, "common_prefix_length"):
        assert not said and not counted
    else:
        assert len(counted) == 1
        assert len(said) == 1 and "8 of 8 pairs have one answer that is the start of" in said[0]
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0.01


def test_a_few_are_warned_of(build: Any, capsys: Any):
    """In the evaluation data, any number of faults only causes a warning."""
    rows = [*map(alike, range(3)), *map(good, range(3, 8))]
    build(rows, eval_dataset={"train": stream([*map(alike, range(8))])})
    ours = "focalpo_plugins: warning: "
    training, evaluation = warnings(capsys)
    assert training.startswith(ours + "3 of 8 pairs have identical answers")
    assert evaluation.startswith(
        ours + "8 of 8 pairs of the evaluation data have identical answers"
    )


def test_the_first_rows_of_a_stream(build: Any, capsys: Any):
    """64 rows are checked, the last 30 of them bad, and training then begins with the first."""
    read: list[int] = []

    def rows() -> Iterator[Row]:
        for i in range(10**6):
            read.append(i)
            yield (good if i < 34 else alike)(i % 20)

    trainer = build(IterableDataset.from_generator(rows), per_device_train_batch_size=4)
    (warning,) = warnings(capsys)
    assert "30 of 64 pairs have identical answers" in warning and "is row 34 of" in warning
    assert max(read) <= 64
    batch = next(iter(trainer.get_train_dataloader()))
    ids = trainer.processing_class.convert_tokens_to_ids(["w0", "w1", "w2", "w3"])
    assert batch["input_ids"][:4, 2].tolist() == ids


def test_an_empty_stream(build: Any):
    with pytest.raises(ValueError, match="train_dataset must hold a pair, got none"):
        build(IterableDataset.from_generator(lambda: iter(())))


@pytest.mark.parametrize("case", FILES)
def test_files_are_refused_that_hosts_cannot_read(case: str, tmp_path: Path):
    """The table's own expectations, against the hosts' reader of files."""
    content, line, _ = FILES[case]
    (tmp_path / "pairs.jsonl").write_bytes(content.encode())
    file = {"data_files": str(tmp_path / "pairs.jsonl"), "cache_dir": str(tmp_path / "cache")}
    if line is None:
        assert len(load_dataset("json", split="train", **file))
    else:
        with pytest.raises(Exception):  # noqa: B017  (of pyarrow, pandas or datasets)
            load_dataset("json", split="train", **file)


GOOD = '{"a": "x", "b": 1.0}\n'
DEEP = "[" * 3000 + "]" * 3000
# Text in the second line of a file that Python's reader accepts and the hosts' doesn't.
REFUSED_BY_HOSTS = {
    "a key twice": '{"a": "x", "a": "y"}',
    "a key twice, further in": '{"a": "x", "c": [{"d": 1, "d": 2}]}',
    "a number too big": '{"a": "x", "b": 1e400}',
    "a number too big, further in": '{"a": "x", "c": {"d": [-1E999]}}',
    "brackets, too deep for both": f'{{"a": "x", "c": {DEEP}}}',
    "brackets, too deep for hosts": f'{{"a": "x", "c": {"[" * 100}{"]" * 100}}}',
}


@pytest.mark.parametrize("case", REFUSED_BY_HOSTS)
@pytest.mark.parametrize("before", ["", "\ufeff", "\n"], ids=["plain", "BOM", "blank line"])
def test_the_line_is_named_that_only_hosts_refuse(case: str, before: str, tmp_path: Path):
    file = tmp_path / "pairs.jsonl"
    lines = [before + GOOD, REFUSED_BY_HOSTS[case] + "\n", GOOD]
    file.write_text("".join(lines))
    with pytest.raises(Exception):  # noqa: B017  (of pyarrow, pandas or datasets)
        load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "c"))
    with pytest.raises(ValueError) as refused:
        check_file(file, "data")
    line = 3 if before == "\n" else 2
    assert f"got {str(file)!r}: line {line} can't be used: " in str(refused.value)
    file.write_text("".join([lines[0], *lines[2:]]))
    check_file(file, "data")


def test_an_entry_of_an_array_that_only_hosts_refuse(tmp_path: Path):
    file = tmp_path / "pairs.json"
    file.write_text(f'[{GOOD}, {{"a": "x", "c": {"[" * 100}{"]" * 100}}}]')
    with pytest.raises(ValueError, match=": an entry can't be used: "):
        check_file(file, "data")
    # In an array the last one counts: the hosts read it.
    file.write_text('[{"a": "x", "a": "y"}]')
    assert load_dataset("json", data_files=str(file), split="train")["a"] == ["y"]
    check_file(file, "data")


# The content of a file, and why it can't be read.
BROKEN = {
    "open.csv": ('a,b\n1,2\n"3\n,4\n', "in the row that begins in line 3: Error tokenizing data"),
    "wide.csv": ("a,b\n1,2\n3,4,5\n", "Expected 2 fields in line 3, saw 3. Fix that file."),
    "short.parquet": ("x", "Parquet file size is 1 bytes, smaller than"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_and_not_looked_for_on_a_hub(name: str, tmp_path: Path):
    content, why = BROKEN[name]
    (tmp_path / "whole.csv").write_text("a,b\n1,2\n")
    (tmp_path / name).write_text(content)
    kind, cache = name.split(".")[1], str(tmp_path / "cache")
    files = [str(tmp_path / each) for each in ("whole.csv", name)[kind == "parquet" :]]
    with pytest.raises(Exception) as error:
        load_dataset(kind, data_files=files, split="train", cache_dir=cache)
    names = {"base_model": "nobody/model"}  # it is not on this machine, and no hub was asked
    for said in (hub.explain(error.value, names), broken_file(error.value)):
        assert said is not None and said.startswith(f"{str(tmp_path / name)!r} can't be read")
        assert why in said


def test_a_path_that_is_not_there_is_named_with_what_is_near(tmp_path: Path):
    """Data, a model, and a name that may be on a hub."""
    (tmp_path / "pairs.jsonl").write_text("{}")
    (tmp_path / "model").mkdir()
    data, model = str(tmp_path / "pars.jsonl"), str(tmp_path / "modle")
    with pytest.raises(Exception) as error:
        load_dataset("json", data_files=data, split="train", cache_dir=str(tmp_path / "cache"))
    said = hub.explain(error.value, {"datasets[0].path": data, "base_model": "nobody/model"})
    assert said == (
        f"There is no such file or folder: datasets[0].path {data!r} ('pairs.jsonl' is beside it). "
        "Correct the path."
    )
    with pytest.raises(Exception) as error:
        AutoTokenizer.from_pretrained(model)
    said = hub.explain(error.value, {"base_model": model})
    assert said is not None and f"base_model {model!r} ('model' is beside it)." in said
    assert hub.explain(error.value, {"base_model": str(tmp_path / "model")}) is None
    with pytest.raises(
        ValueError, match=r"^model must be .*modle' \('model' is beside it\): nothing"
    ):
        hub.check_there("model", model)
    hub.check_there("model", "nobody/model")
    hub.check_there("model", str(tmp_path / "model"))


def test_a_full_disk_is_not_a_hub_s_fault():
    def reading(error: Exception):
        try:
            raise error
        except Exception as raised:
            return hub.explain(raised, {"base_model": "nobody/model"})

    assert reading(OSError(errno.ENOSPC, "No space left on device")) is None
    assert "base_model 'nobody/model'" in str(reading(OSError("We couldn't connect to")))


def test_a_prompt_that_the_whole_row_does_not_begin_with(
    build: Any, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
):
    """TRL drops as many tokens of the row as the prompt has: of `user w0 <|end|> assistant one w5
    w8 <|end|>` the six of `user w0 <|end|> assistant w1 w2` leave `w8 <|end|>`.  Newer releases cut
    the prompt to what both have in common: then the tokens are the row's, and nothing is refused."""
    rows = [asks(i, chosen="one w5 w8", rejected="two w6 w7") for i in range(8)]
    build(rows)
    monkeypatch.setattr(tokenizer, "chat_template", THINKING)
    pair = build(rows, focalpo_allow_data=True).train_dataset[0]
    trained = tokenizer.decode([*pair["prompt_ids"], *pair["chosen_ids"]]).split()
    if trained == ["<s>", *["user", "w0", "<|end|>", "assistant", "one", "w5", "w8", "<|end|>"]]:
        build(rows)
        return
    assert trained[-4:] == ["w1", "w2", "w8", "<|end|>"]
    with pytest.raises(ValueError, match=OTHER):
        build(rows)


def test_sides_that_differ_before_their_last_turn(build: Any, capsys: Any):
    """TRL also trains the user's second turn; turns that are the same cause no message."""
    same, other = ("w3", "w3"), ("w3", "w4")
    build([asks(i, same, ("w9", "w9")) for i in range(8)])
    assert not warnings(capsys)
    build([asks(i, other if i < 2 else same, ("w9", "w9")) for i in range(8)])
    (warning,) = warnings(capsys)
    assert "2 of 8 rows have sides that differ before their last turn" in warning


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_an_empty_cell(build: Any, column: str, tmp_path: Path):
    """As a CSV gives it: TRL stops with `'NoneType' object has no attribute 'endswith'`."""
    names = ("prompt", "chosen", "rejected")
    cells = [[good(i)[name] for name in names] for i in range(4)]
    cells[2][names.index(column)] = "None"
    lines = [",".join(row) for row in [names, *cells]]
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    found = load_dataset("csv", data_files=str(tmp_path / "pairs.csv"), split="train")
    with pytest.raises(ValueError, match=f"train_dataset must .* got row 2 .* column '{column}'"):
        build(found)
    build(found.select([0, 1, 3]))
