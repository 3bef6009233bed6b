"""The text of a row that a host trains, against the chat template's rendering: what is refused,
what causes a warning, what passes."""

from __future__ import annotations

from typing import Any

import pytest

from focalpo_plugins.guards import texts
from focalpo_plugins.guards.faults import Fault, Policy
from focalpo_plugins.guards.texts import Row, Side

# A template of this kind renders `<user>Q</s><assistant>`, the answer and `</s>`.
ASKED = "<user>Q</s><assistant>"
THOUGHT = "<think>\n\n</think>\n\n"

# The trained texts, the last message, and the template's rendering.
SAME: dict[str, tuple[str, str, str, str]] = {
    "equal": (ASKED, "good</s>", "good", f"{ASKED}good</s>"),
    "but for a line end": (ASKED, "good</s>", "good", f"{ASKED}good</s>\n"),
    # As Llama-2's and Mistral's templates write a space before an answer.
    "but for a space before the answer": (ASKED, "good</s>", "good", f"{ASKED} good</s>"),
    "trimmed by the template, and found": (ASKED, "good</s>", " good\n", f"{ASKED}good</s>"),
    # As Qwen3's template does for an answer without reasoning.
    "a thought without a word, left out": (ASKED, "good</s>", "good", f"{ASKED}{THOUGHT}good</s>"),
    # As Gemma's newest template does: the generation prompt has it, the rendering of a row doesn't.
    "a thought without a word, in the prompt": (
        f"{ASKED}<|channel>thought\n<channel|>", "good</s>", "good", f"{ASKED}good</s>"
    ),
    # As Qwen3's template does in earlier turns; prompt and row are rendered alike.
    "earlier reasoning taken out": (
        f"{ASKED}old</s>{ASKED}", "good</s>", "good", f"{ASKED}old</s>{ASKED}good</s>"
    ),
    "the answer's reasoning rendered otherwise": (
        ASKED, "<think>hm</think>good</s>", "<think>\nhm\n</think>\n\ngood",
        f"{ASKED}<think>hm</think>good</s>",
    ),
}  # fmt: skip
OTHER: dict[str, tuple[str, tuple[str, str, str, str]]] = {
    # `find` gives -1 for what the template trimmed, so that the last character is taken.
    "the last character": ("cut", (ASKED, ">", "good\n", f"{ASKED}good</s>")),
    "nothing": ("cut", (ASKED, "", "good\n", f"{ASKED}good</s>")),
    # "user" is a word of the template.
    "found in the template": ("cut", (ASKED, "user>x</s>user</s>", "user", f"{ASKED}user</s>")),
    # "assistant" is a word of the header before the answer.
    "found in the header": (
        "twice", (ASKED, "assistant>assistant</s>", "assistant", f"{ASKED}assistant</s>")
    ),
    "its start lost": ("cut", (ASKED, "od</s>", "good", f"{ASKED}good</s>")),
    "its reasoning lost": (
        "cut", (ASKED, "od</s>", "<think>\nhm\n</think>\n\ngood, and a long word more than that",
                f"{ASKED}good, and a long word more than that</s>"),
    ),
    "after another history": ("cut", (f"x{ASKED}", "good</s>", "good", f"y{ASKED}good</s>")),
    "a second <think>": (
        "twice", (f"{ASKED}<think>\n", "<think>\nhm\n</think>\n\ngood</s>",
                  "<think>\nhm\n</think>\n\ngood", f"{ASKED}<think>\nhm\n</think>\n\ngood</s>"),
    ),
    "a thought after one without a word": (
        "twice", (f"{ASKED}{THOUGHT}", "<think>\nhm\n</think>\n\ngood</s>",
                  "<think>\nhm\n</think>\n\ngood", f"{ASKED}<think>\nhm\n</think>\n\ngood</s>"),
    ),
    "a thought that isn't closed": (
        "lacks", (f"{ASKED}<think>\n", "good</s>", "good", f"{ASKED}{THOUGHT}good</s>")
    ),
    "a thought that the rendering lacks": (
        "lacks", (f"{ASKED}<think>\n", "good</s>", "good", f"{ASKED}good</s>")
    ),
    "a channel that isn't named": (
        "lacks", (ASKED, "good</s>", "good", f"{ASKED}<|channel|>final<|message|>good</s>")
    ),
}  # fmt: skip
GOOD = Side(*SAME["equal"])
CUT = Side(*OTHER["the last character"][1])
LACKS = Side(*OTHER["a thought that isn't closed"][1])


@pytest.mark.parametrize("case", SAME)
def test_the_same(case: str):
    assert texts.difference(Side(*SAME[case])) is None


@pytest.mark.parametrize("case", OTHER)
def test_another_text(case: str):
    name, given = OTHER[case]
    assert texts.difference(Side(*given)) == name


@pytest.mark.parametrize(("answer", "name"), [("good<|im_end|>", None), ("bad<|im_end|>", "cut")])
def test_a_format_without_a_template(answer: str, name: str | None):
    """The only requirement then is that the answer contains the row's last message."""
    assert texts.difference(Side(ASKED, answer, "good", None)) == name


def found(*rows: Row, **given: Any) -> list[Fault]:
    words = {"host": "Host", "of_sides": "it mixes them", "of_cut": "it cuts"}
    return texts.find(rows, **words, **given)


def test_most_rows_are_refused():
    (fault,) = found(*[Row("row 0", GOOD, CUT)] * 2, Row("row 2", GOOD, GOOD))
    assert fault.refused
    assert fault.words.startswith("2 of 3 rows have an answer that isn't trained as the chat ")
    assert str(fault).startswith(f"{fault.words}. The first is row 0: ")
    assert "'<user>Q</s><assistant>>' is trained, but the template renders " in str(fault)
    with pytest.raises(
        ValueError,
        match="training data refused: 2 of 3 rows have .*"
        "To train anyway, set KEY. The first is row 0: ",
    ):
        Policy("KEY", allowed=False, say=True).check([fault])


@pytest.mark.parametrize(("allowed", "evaluation"), [(True, False), (False, True)])
def test_or_warned_of(capfd: pytest.CaptureFixture, allowed: bool, evaluation: bool):
    faults = found(*[Row("row 0", CUT, GOOD)] * 2, evaluation=evaluation)
    Policy("KEY", allowed, say=False).check(faults)
    assert "warning" not in capfd.readouterr().err
    Policy("KEY", allowed, say=True).check(faults)
    of_data = " of the evaluation data" * evaluation
    said = capfd.readouterr().err
    assert f"2 of 2 rows{of_data} have an answer" in said and "KEY" not in said


def test_half_of_the_rows_are_not_refused():
    (fault,) = found(Row("row 0", GOOD, GOOD), Row("row 1", CUT, GOOD))
    assert not fault.refused
    assert fault.words.startswith("1 of 2 rows") and "KEY" not in fault.words


def test_answers_trained_in_full_are_not_refused():
    (fault,) = found(Row("row 0", LACKS, LACKS))
    assert not fault.refused
    assert "1 of 1 rows have a prompt and an answer that together differ" in fault.words


def test_sides_whose_earlier_turns_differ():
    """One fault, named by its cause; none if the template renders the turns alike."""
    (fault,) = found(Row("row 0", GOOD, CUT, turns_differ=True))
    assert fault.refused and "sides whose earlier turns differ: it mixes them." in fault.words
    assert not found(Row("row 0", GOOD, GOOD, turns_differ=True))
    (fault,) = found(Row("row 0", GOOD, GOOD, in_answers=True))
    assert not fault.refused and "including the user's" in fault.words


def test_what_the_check_of_tokens_names_is_left_to_it():
    empty = Side(ASKED, "<user>Q</s><assistant></s>", "", f"{ASKED}</s>")
    marked = Side(ASKED, "user>[[dummy]]</s>user</s>", "user", f"{ASKED}user</s>")
    assert not found(Row("row 0", GOOD, empty))
    assert not found(Row("row 0", GOOD, marked), marker="[[dummy]]")
