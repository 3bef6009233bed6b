"""The reference's log-probabilities in a file: what is found in it, and when it is read again.

``tests/openrlhf/test_precompute.py`` has whole runs, on two ranks.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from focalpo_plugins.errors import InvalidValue
from focalpo_plugins.reference import (
    Pairs,
    ReferenceLogps,
    describe_model,
    pair_digests,
    precompute,
)
from focalpo_plugins.trl.stand_in import stand_in

pytestmark = pytest.mark.releases


def batch(pairs: list[tuple[list[int], list[int], int]]) -> tuple:
    """Token ids of both sides and the prompt's length, padded with token 9 on the right."""
    sides = []
    for side in (0, 1):
        width = max(len(pair[side]) for pair in pairs)
        sides += [
            torch.tensor([pair[side] + [9] * (width - len(pair[side])) for pair in pairs]),
            torch.tensor([[1] * len(p[side]) + [0] * (width - len(p[side])) for p in pairs]),
        ]
    return (*sides, [pair[2] for pair in pairs])


KNOWN = [([1, 2, 3], [1, 2, 4, 5], 2), ([1, 2], [1, 6], 1), ([1, 2, 3, 9], [1, 6], 1)]


@pytest.fixture(scope="module")
def lookup() -> ReferenceLogps:
    digests = [list(digest) for digest in pair_digests(Pairs(*batch(KNOWN)))]
    values = torch.tensor([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]])
    return ReferenceLogps(torch.tensor(digests, dtype=torch.uint8), values)


def test_found_in_any_order_and_padding(lookup):
    chosen, rejected = lookup(*batch([KNOWN[2], KNOWN[0]]))
    assert (chosen.tolist(), rejected.tolist()) == ([-5.0, -1.0], [-6.0, -2.0])
    chosen, rejected = lookup(*batch([KNOWN[1]]))
    assert (chosen.tolist(), rejected.tolist()) == ([-3.0], [-4.0])


@pytest.mark.parametrize(
    "pair",
    [
        ([1, 2, 4, 5], [1, 2, 3], 2),  # sides swapped
        ([1, 2, 3], [1, 2, 4, 5], 1),  # another start of the answer
        ([1, 2, 3], [1, 2, 4], 2),  # cut
        ([1, 2, 3, 1], [2, 4, 5], 2),  # the same tokens in a row, divided elsewhere
        ([1, 2, 3, 9], [1, 2, 4, 5], 2),  # the token that is also padding, at the end
    ],
    ids=str,
)
def test_a_pair_that_was_not_precomputed(lookup, pair: tuple):
    """Its log-probabilities are NaN, which stops every rank; the other pair's are found."""
    lookup.unknown = ""
    chosen, rejected = (side.tolist() for side in lookup(*batch([KNOWN[0], pair])))
    assert (chosen[0], rejected[0]) == (-1.0, -2.0)
    assert math.isnan(chosen[1]) and math.isnan(rejected[1])
    assert "of pair 1 of a batch were not precomputed" in lookup.unknown


class OneRank:
    rank = 0

    def reduce(self, values: torch.Tensor, how: str) -> torch.Tensor:
        return values

    def gather(self, thing: Any) -> list[Any]:
        return [thing]


class Tiny:
    """Pairs under a model of one layer, which gets two pairs at a time."""

    batch_size, share = 2, (0, 1)

    def __init__(self, model: torch.nn.Module, pairs: list[tuple]) -> None:
        self.model, self.rows, self.pairs = model, pairs, len(pairs)
        self.forwards = 0

    def batch(self, numbers: list[int]) -> Pairs:
        return Pairs(*batch([self.rows[number] for number in numbers]))

    def logps(self, pairs: Pairs) -> tuple[torch.Tensor, ...]:
        self.forwards += 1
        sides = zip(pairs[:4:2], pairs[1:4:2], strict=True)
        return tuple(self.side(ids, mask, pairs.prompt_lengths) for ids, mask in sides)

    def side(self, ids: torch.Tensor, mask: torch.Tensor, starts: list[int]) -> torch.Tensor:
        logps = self.model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        taken = logps.gather(-1, ids[:, 1:, None]).squeeze(-1)
        answers = torch.arange(1, ids.shape[1]) >= torch.tensor(starts)[:, None]
        return (taken * (answers & mask[:, 1:].bool())).sum(1)

    def name(self, number: int) -> str:
        return f"pair {number}"

    def text(self, number: int) -> str:
        return str(self.rows[number][0])

    def free(self) -> int:
        return 0


@pytest.fixture
def model() -> torch.nn.Module:
    return stand_in(10).eval()


def run(model: torch.nn.Module, folder: Path, rows: list[tuple] = KNOWN, **settings: Any) -> tuple:
    source = Tiny(model, rows)
    about = {**describe_model(model, OneRank(), lambda weight: nullcontext()), **settings}
    return source, precompute(source, OneRank(), about, folder, "the_folder")


def test_computed_once_and_read_again(model, tmp_path: Path):
    """Three pairs are two batches.  Each pair's log-probabilities are those that the model gives it
    by itself; pairs in another order, one of them twice, are the same set."""
    source, logps = run(model, tmp_path)
    assert source.forwards == 2
    for pair in KNOWN:
        found = torch.cat(logps(*batch([pair])))
        assert torch.allclose(found, torch.cat(source.logps(Pairs(*batch([pair])))), atol=1e-5)
    again, read = run(model, tmp_path, [*reversed(KNOWN), KNOWN[0]])
    assert again.forwards == 0
    assert torch.equal(torch.cat(read(*batch(KNOWN))), torch.cat(logps(*batch(KNOWN))))
    assert len(list(tmp_path.iterdir())) == 1


def test_anything_else_is_computed_again(model, tmp_path: Path):
    """A different pair, host setting, attention, dtype or weight."""
    run(model, tmp_path)
    assert run(model, tmp_path, KNOWN[:2])[0].forwards == 1
    assert run(model, tmp_path, packing=True)[0].forwards == 2
    model.set_attn_implementation("eager")
    assert run(model, tmp_path)[0].forwards == 2
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert run(model, tmp_path)[0].forwards == 2
    assert run(model.double(), tmp_path)[0].forwards == 2
    assert len(list(tmp_path.iterdir())) == 6


def test_a_pair_with_a_log_probability_that_is_not_finite(model, tmp_path: Path):
    """Token 5 is in the first pair only. The file isn't written, and the reserved space is
    freed."""
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = torch.nan
    rows = [KNOWN[1], ([1, 5, 3], [1, 2], 1)]
    with pytest.raises(
        InvalidValue,
        match=r"log-probabilities are not finite for 1 of 2 pairs\. The first is pair 1: ",
    ):
        run(model, tmp_path, rows)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to(model, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidValue, match="^the_folder must be a writable folder with 0.0 MiB"):
        run(model, tmp_path / "file" / "folder")
