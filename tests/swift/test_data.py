"""Which rows, files and models ms-swift reads, and what is said of the others."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from swift.dataset import load_dataset
from swift.utils import safe_snapshot_download

from focalpo_plugins.guards import pairs
from focalpo_plugins.swift import data
from focalpo_plugins.swift.conversations import text_faults
from focalpo_plugins.swift.dry_run import _terms
from focalpo_plugins.swift.keys import starts_as_reference
from focalpo_plugins.swift.pairs import EncodedPairs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder and the home, in which nothing is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def args_of(**given: Any) -> Any:
    return SimpleNamespace(**{"columns": None, "max_length": 8, **given})


def written(rows: list[dict[str, Any]], columns: dict[str, str] | None = None) -> Any:
    """Arguments with these rows in a file of the current folder."""
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return args_of(dataset=["rows.jsonl"], columns=columns)


def wrong(args: Any) -> str | None:
    return next(data.listed(args)).wrong()


@pytest.mark.releases
@pytest.mark.parametrize(
    "row, columns",
    [
        ({"query": "Q", "response": "good", "rejected_response": "bad"}, None),
        ({"instruction": "Q", "input": "", "output": "good", "rejected_response": "bad"}, None),
        ({"Question": "Q", "Answer": "good", "rejected_response": "bad"}, None),
        ({"q": "Q", "a": "good", "b": "bad"}, {"q": "query", "a": "answer", "b": "rejected_response"}),
        (
            {
                "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "good"}],
                "rejected_response": "bad",
            },
            None,
        ),
    ],
)  # fmt: skip
def test_columns_that_ms_swift_reads(folder: Path, row: dict[str, Any],
                                     columns: dict[str, str] | None):  # fmt: skip
    """They are not what is wrong if every pair is too long."""
    args = written([row] * 4, columns)
    read = load_dataset(["rows.jsonl"], columns=columns)[0]
    assert [turn["content"] for turn in read[0]["messages"]] == ["Q", "good"]
    assert (len(read), read[0]["rejected_response"]) == (4, "bad")
    assert wrong(args) is None
    with pytest.raises(
        ValueError, match="dataset must hold a pair that fits into max_length, got 4"
    ):
        data.reading(args, lambda: ([], None), read)


def test_columns_that_ms_swift_does_not_read(folder: Path):
    """A text of the whole beside two answers is no third one."""
    two = {"prompt": "Q", "chosen": "good", "rejected": "bad"}
    for row, words in (
        ({"query": "Q", "response": "good"}, "its first row has no rejected answer, got the columns"),
        ({"query": "Q", "rejected_response": "bad"}, "it has no 'chosen' and no 'rejected'"),
        (two, "these are strings: set columns to"),
        ({**two, "text": "Q good"}, "these are strings: set columns to"),
    ):  # fmt: skip
        args = written([row])
        assert words in str(wrong(args))
        with pytest.raises(ValueError, match=words):
            data.reading(args, lambda: ([], None), [{}])


@pytest.mark.releases
def test_only_errors_in_reading_are_explained(folder: Path):
    args = written([{"prompt": "Q", "chosen": "good", "rejected": "bad"}])

    def fails() -> Any:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="^no memory$"):
        data.reading(args, fails, None)
    with pytest.raises(ValueError, match="these are strings: set columns to"):
        data.reading(args, lambda: load_dataset([5]), None)
    found = EncodedPairs([], None).tokenized()
    cutting = pairs.Cutting("max_length", 8)
    with pytest.raises(ValueError, match="it has no pair.*these are strings: set columns to"):
        data.reading(args, lambda: pairs.find(found, Words(), cutting), None)


@pytest.mark.releases
def test_models_that_ms_swift_finds(folder: Path):
    """A home's ``~``, and a folder in a model or in a repository, after a colon."""
    (folder / "models" / "x" / "step:1").mkdir(parents=True)
    there = [
        "~/models/x",
        f"{folder}/models/x",
        "./models:x",
        "~/models/x:step:1",
        "models/x:step:1",
    ]
    for name in there:
        assert Path(safe_snapshot_download(name)).is_dir()
    for name in (*there, "owner/name", "owner/name:a/b"):
        data.check_files(args_of(model=name, ref_model=name))


@pytest.mark.parametrize(
    "name, got",
    [
        ("~/models/lama", "{}/models/lama' ('llama' is beside it)"),
        ("{}/models/llama:step", "{}/models/llama/step'"),
        ("./models/x:step", "./models/x/step'"),
    ],
)
def test_models_that_are_not_there(folder: Path, name: str, got: str):
    (folder / "models" / "llama").mkdir(parents=True)
    for key in ("model", "ref_model"):
        with pytest.raises(ValueError) as caught:
            data.check_files(args_of(**{key: name.format(folder)}))
        words = f"{key} must be a file or folder that exists, or a name on a hub, got '"
        assert str(caught.value).startswith(words + got.format(folder))


@pytest.mark.releases
@pytest.mark.parametrize("entry", ["rows.jsonl#2", "rows.jsonl:part#2", "ms::rows.jsonl#2"])
def test_files_with_a_number_of_rows(folder: Path, entry: str):
    """ms-swift would ask ModelScope for a file that isn't there, and for the start of an address."""
    args = written([{"query": "Q", "response": "good", "rejected_response": "bad"}] * 4)
    args.dataset = [entry, "owner/name", "hf::owner/name:part#500"]
    data.check_files(args)
    assert [source.path for source in data.listed(args)] == ["rows.jsonl"]
    assert len(load_dataset([entry])[0]) == 2
    beside = "'row.jsonl' ('rows.jsonl' is beside it)"
    for name, got in (
        (entry.replace("rows", "row"), beside),
        ("https://host/rows.jsonl", "'https://host/rows.jsonl'"),
    ):
        args.dataset = [name]
        with pytest.raises(ValueError) as caught:
            data.check_files(args)
        assert f"got {got}: nothing is there" in str(caught.value)


class Words:
    """A tokenizer for the template below."""

    bos_token_id, eos_token_id, all_special_ids = None, 0, (0,)

    def decode(self, ids: list[int]) -> str:
        return str(ids)


class Template:
    """Encodes words as their lengths, and notes the rows."""

    def __init__(self) -> None:
        self.encoded: list[dict[str, Any]] = []
        self.tokenizer = Words()

    def encode(self, row: dict[str, Any], **_: Any) -> dict[str, list[int]]:
        self.encoded.append(row)
        assert row["rejected_response"] != "too long"
        ids = [*map(len, row["messages"][-1]["content"].split())]
        names = (
            f"{side}_{what}" for side in ("chosen", "rejected") for what in ("input_ids", "labels")
        )
        return dict.fromkeys(names, ids)


def test_only_rows_with_a_fault_are_encoded_again():
    """The tokens of all rows are checked elsewhere; a row that ms-swift can't encode has no fault."""

    def row(asked: str, rejected: str | None) -> dict[str, Any]:
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": "so it is"}]
        return {"messages": turns, "rejected_response": rejected}

    rows = [row("Q", "bad"), row("", "bad"), row("Q", None), row("", "too long"), row("Q", "bad")]
    template = Template()
    faults = {fault.words[:31]: fault.first for fault in text_faults(EncodedPairs(rows, template))}
    assert faults == {
        "1 of 4 rows have no prompt: ms-": "row 1 of the tokenized data, rejected: '[2, 2, 2]'",
        "1 of 4 rows have no rejected an": "row 2 of the tokenized data, rejected: '[2, 2, 2]'",
    }
    assert template.encoded == rows[1:4]


@pytest.mark.parametrize(
    "given, starts",
    [
        ({"tuner_type": "full", "ref_model": "x"}, True),
        ({"tuner_type": "full", "ref_model": "y"}, False),
        ({"tuner_type": "full", "ref_model": "x", "ld_alpha": 0.5}, False),
        ({"tuner_type": "lora"}, True),
        ({"tuner_type": "lora", "adapters": ["a"]}, False),
        ({"tuner_type": "lora", "adapters": ["a"], "ref_adapters": ["a"]}, True),
    ],
)
def test_the_plan_expects_a_first_loss_if_the_policy_starts_as_its_reference(
    given: dict[str, Any], starts: bool
):
    empty = {"model": "x", "ref_model": None, "ld_alpha": None, "adapters": [], "ref_adapters": []}
    args = args_of(**{**empty, "rpo_alpha": None, "loss_weights": None, **given})
    args.loss_type = "focalpo"
    assert starts_as_reference(args) is starts
    assert _terms(args, ["focalpo"]) == ([("sigmoid", 1.0)] if starts else None)
