"""What is counted over all pairs that are trained on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import Any

from ...guards.pairs import blank, faults_of_answers
from ...plan import Pair, Plan, Tokens
from .. import CommandError


@dataclass
class Counts:
    """What was counted over all pairs that are trained on."""

    pairs: int = 0
    truncated: int = 0
    identical: int = 0
    empty: int = 0
    doubled_bos: int = 0
    bos_in_answer: int = 0
    bos: Counter[int] = field(default_factory=Counter)
    eos: Counter[int] = field(default_factory=Counter)
    starts_with_bos: int = 0
    starts_as_template: int = 0
    uncut_without_eos: int = 0
    lengths: list[int] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)
    # Of each pair, the tokens of the start that both sequences have in common.
    in_common: list[int] = field(default_factory=list)


def count(plan: Plan, number: int) -> tuple[Counts, Pair]:
    """Count over all pairs, and pick the one that is shown."""
    from tqdm import tqdm

    if not 0 <= number < plan.kept:
        raise CommandError(f"--pair must be from 0 to {plan.kept - 1}, got {number}.")
    bos, eos = plan.tokenizer.bos_token_id, plan.tokenizer.eos_token_id
    is_blank = blank(plan.tokenizer)
    start = template_start(plan.tokenizer)
    counts, shown = Counts(), None
    for place, pair in enumerate(tqdm(plan.pairs, total=plan.kept, unit="pair", leave=False)):
        if place == number:
            shown = pair
        counts.pairs += 1
        counts.truncated += pair.truncated
        sides = (pair.chosen, pair.rejected)
        counts.in_common.append(in_common(pair.chosen.ids, pair.rejected.ids))
        answers = [_answer(side) for side in sides]
        wrong = faults_of_answers(answers[0], answers[1], is_blank)
        counts.identical += "identical" in wrong
        counts.empty += "empty" in wrong
        for side, answer in zip(sides, answers, strict=True):
            counts.lengths.append(len(side.ids))
            counts.trained.append(len(answer))
            counts.bos[side.ids.count(bos)] += 1
            counts.eos[answer.count(eos)] += 1
            counts.starts_with_bos += side.ids[:1] == [bos]
            begins = side.ids[side.ids[:1] == [bos] and bos != start :]
            counts.starts_as_template += begins[:1] == [start]
            counts.doubled_bos += bos != eos and side.ids[:2] == [bos, bos]
            counts.bos_in_answer += bos != eos and bos in answer
            counts.uncut_without_eos += not pair.truncated and eos not in answer
    assert shown is not None
    return counts, shown


def template_start(tokenizer: Any) -> int | None:
    """The first token that the chat template writes; None if there is no template or it fails."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        turn = {"role": "user", "content": "a"}
        written = tokenizer.apply_chat_template([turn], tokenize=False)
    except Exception:  # the template needs a system turn, or more
        return None
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    return ids[0] if ids else None


def in_common(chosen: list[int], rejected: list[int]) -> int:
    """The number of tokens that both sequences begin with."""
    return len(commonprefix([chosen, rejected]))


def _answer(side: Tokens) -> list[int]:
    return [token for token, trained in zip(side.ids, side.trained, strict=True) if trained]


def share(number: int, total: int) -> str:
    """``12.5 %``."""
    return f"{100 * number / max(total, 1):.3g} %"
