"""The description of rows of preference data."""

from __future__ import annotations

import pytest
from row_formats import BAD, FORMATS, GOOD, USER

from focalpo_plugins.guards.rows import describe, not_text


@pytest.mark.parametrize("name", FORMATS)
def test_the_formats_of_the_docs(name: str):
    row = FORMATS[name][0]
    seen = describe([row, row])
    assert (seen.format, seen.problem, seen.odd) == (name, None, None)
    assert seen.prompt == next((key for key in row if key in ("prompt", "messages")), None)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            FORMATS["messages, and one message an answer"][0],
            "messages (1 message: user), chosen (one message), rejected (one message)",
        ),
        (
            {"chosen": [USER, GOOD, USER, GOOD], "rejected": "", "score": 1.0},
            "chosen (4 messages: user, assistant, user, ...), rejected (nothing), score (float)",
        ),
        (
            {"chosen": [{"from": "human", "value": "a"}], "rejected": ["a", "b"]},
            "chosen (messages with the keys from, value), rejected (list)",
        ),
        ({f"c{i}": "a" for i in range(10)}, ", ".join(f"c{i} (text)" for i in range(8)) + ", 2 more"),
        ({}, "no columns"),
    ],
)  # fmt: skip
def test_words(row: dict, words: str):
    assert describe([row]).words == words


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "a", "good": "b"}, "it has no 'chosen' and no 'rejected'"),
        ({"chosen": "a", "rejected": None}, "it has no 'rejected'"),
        ({"chosen": "a", "rejectd": "b"}, "it has no 'rejected'; did you mean 'rejectd'?"),
        ({"chosen": [USER, GOOD], "rejected": "bad"}, "chosen and rejected have different formats"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "its answers have no prompt"),
        ({"chosen": 1, "rejected": 2}, "chosen and rejected are neither text nor messages"),
        (
            {"chosen": [{"from": "gpt", "value": "a"}], "rejected": [{"from": "gpt", "value": "b"}]},
            "its messages have other keys than role and content",
        ),
        (
            {"prompt": [{"from": "human", "value": "a"}], "chosen": [GOOD], "rejected": [BAD]},
            "its messages have other keys than role and content",
        ),
    ],
)  # fmt: skip
def test_what_no_host_reads(row: dict, problem: str):
    seen = describe([row])
    assert seen.format is None and seen.problem.startswith(problem)


def test_named_columns():
    """The user's own names come before the usual ones."""
    row = {"question": "a", "prompt": "b", "good": "c", "bad": "d"}
    seen = describe([row], "good", "bad", "question")
    assert (seen.format, seen.prompt) == ("strings", "question")


def test_a_row_that_differs():
    """The first row that differs from the first one, however many follow."""
    row = FORMATS["strings"][0]
    seen = describe([row, row, {**row, "chosen": None}, {**row, "prompt": [USER]}])
    assert seen.odd == "row 2 has chosen (nothing), rejected (text), prompt (text)"


def test_no_rows():
    assert describe([]) is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "row 1 (the first is 0) has a message with the content None in the column 'chosen'"),
        (5, "row 1 (the first is 0) has a message with the content 5 in the column 'chosen'"),
        ([{"type": "text", "text": "a"}], None),
        ("", None),
    ],
)
def test_content_that_is_not_text(content: object, words: str | None):
    """In an answer of a row after the first; parts of a content are the host's business."""
    whole = {"chosen": [USER, GOOD], "rejected": BAD}
    found = not_text([whole, {**whole, "chosen": [{**GOOD, "content": content}]}], whole)
    assert found is None if words is None else found.startswith(words)


def test_a_call_of_a_tool_has_no_content():
    call = {"role": "assistant", "content": None, "tool_calls": []}
    assert not_text([{"chosen": [call]}], ["chosen"]) is None
