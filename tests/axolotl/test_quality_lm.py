"""The quality study with a language model: its truth, its sums, and DPO in it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import EXAMPLES, loaded
from transformers import AutoTokenizer, LlamaForCausalLM


@pytest.fixture(scope="module")
def lm() -> ModuleType:
    return loaded(EXAMPLES / "study" / "quality_lm.py")


@pytest.fixture(scope="module")
def world(lm: ModuleType, tiny: Path):
    """The tiny assets instead of a seed's own; pairs of the training file, none flipped."""
    made = lm.World.__new__(lm.World)
    made.seed, made.tokenizer = 1, AutoTokenizer.from_pretrained(tiny / "model")
    made.reference = LlamaForCausalLM.from_pretrained(tiny / "model").eval()
    rows = [json.loads(line) for line in (tiny / "train.jsonl").read_text().splitlines()[:72]]
    made.pairs = [
        tuple(
            made.encode(row[side][0]["content"], row[side][1]["content"])
            for side in ("chosen", "rejected")
        )
        for row in rows
    ]
    made.unseen = ["Count the words in this list: pea, owl.", "How many words are here: a, b, c?"]
    answers = [sorted(lm.right_answers(text)) for text in made.unseen]
    made.right_of = [place for place, of in enumerate(answers) for _ in of]
    made.right = [
        made.encode(text, answer)
        for text, of in zip(made.unseen, answers, strict=True)
        for answer in of
    ]
    made.reference_right = lm.share_right(made, made.reference).mean()
    return made


def test_the_truth(lm: ModuleType):
    """In every pair of a counting task one answer is right: the chosen one, unless the labels were swapped, which
    the scores show."""
    rng, swapped, asked = random.Random(11), 0, 0
    while asked < 1000:
        pair = lm.make_tiny.make_pair(rng)
        prompt = pair["chosen"][0]["content"]
        if lm.listed(prompt):
            right = lm.right_answers(prompt)
            found = [pair[side][1]["content"] in right for side in ("chosen", "rejected")]
            was_swapped = pair["score_chosen"] == 6.0
            assert found == [not was_swapped, was_swapped], pair
            swapped += was_swapped
            asked += 1
    assert 0.05 < swapped / asked < 0.11


def test_right_answers_by_hand(lm: ModuleType):
    long = "Count them one by one and you will come to three as well."
    assert lm.right_answers("For a quiz. Count the words in this list: owl, pea, saw.") == {
        "There are three words in the list.",
        f"There are three words in the list. {long}",
    }
    with pytest.raises(ValueError, match="must ask to count a list, got 'What colour"):
        lm.right_answers("What colour is a lemon?")


@torch.no_grad()
def test_log_probs_are_the_models_own(lm: ModuleType, world):
    """A padded batch against each answer alone, and against the model's loss."""
    rows = [one for pair in world.pairs[:6] for one in pair]
    found = lm.sequence_log_probs(world.reference, rows)
    means = lm.sequence_log_probs(world.reference, rows, mean=True)
    for (prompt, answer), whole, mean in zip(rows, found, means, strict=True):
        ids = torch.tensor([prompt + answer])
        labels = torch.tensor([[-100] * len(prompt) + answer])
        loss = world.reference(input_ids=ids, labels=labels).loss.item()
        assert mean.item() == pytest.approx(-loss, rel=1e-4)
        assert whole.item() == pytest.approx(-loss * len(answer), rel=1e-4)
        assert answer[-1] == world.tokenizer.eos_token_id


def test_the_reference_against_itself(lm: ModuleType, world):
    found = lm.judge(world, world.reference)
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["win_rate"] == 0.5
    by_prompt = lm.share_right(world, world.reference)
    each = lm.sequence_log_probs(world.reference, world.right).exp().detach()
    assert by_prompt.tolist() == pytest.approx([each[:2].sum().item(), each[2:].sum().item()])
    assert found["right"] == pytest.approx(by_prompt.mean())


def test_gamma_0_is_dpo(lm: ModuleType, world, monkeypatch: pytest.MonkeyPatch):
    """Equal to the last bit, and training moves the margins the right way."""
    zero, other = lm.Loss("FocalPO 0", "incorrect"), lm.LOSSES[2]
    ours, margins = lm.train(world, zero, 0.5, 1e-3, 2)
    focal, _ = lm.train(world, other, 0.5, 1e-3, 2)
    monkeypatch.setattr(lm, "focalpo_loss", lambda z, gamma, variant: -F.logsigmoid(z))
    dpo, _ = lm.train(world, zero, 0.5, 1e-3, 2)
    assert np.isfinite(margins).sum() == 72  # 64 in each of the two epochs
    assert np.nanmean(margins) > 0.01
    same, differs = [], []
    for a, b, c in zip(ours.parameters(), dpo.parameters(), focal.parameters(), strict=True):
        same.append(torch.equal(a, b))
        differs.append(not torch.equal(a, c))
    assert all(same) and any(differs)


def test_the_table_by_hand(lm: ModuleType):
    """Two losses on four seeds: FocalPO 1 is right 2, 3, 4 and 5 points more often than DPO."""
    losses = [loss for loss in lm.LOSSES if loss.name in ("DPO", "FocalPO 1")]
    runs = []
    for seed in range(4):
        about = {"seed": seed, "win_rate": 0.5, "kl": 0.1, "flipped_learnt": 0.25}
        runs.append({**about, "loss": "reference", "right": 0.2})
        runs.append({**about, "loss": "DPO", "right": 0.3 + 0.1 * seed})
        runs.append({**about, "loss": "FocalPO 1", "right": 0.32 + 0.11 * seed})
    rows = lm.summarise(runs, losses)
    assert [row["loss"] for row in rows] == ["reference", "DPO", "FocalPO 1"]
    assert rows[2]["difference"] == pytest.approx(3.5)
    # The standard deviation of 2, 3, 4, 5 is 1.29; t is 3.182.
    assert rows[2]["difference_95"] == pytest.approx(3.182 * 1.29099 / 2, rel=0.01)
    lines = lm.table(rows).splitlines()
    assert {line.count("|") for line in lines} == {8}
    assert "| +3.50 ± 2.0" in lines[4] and "| +2.00 +3.00 +4.00 +5.00 |" in lines[4]
    # (3.182 + 0.978) / 2 of the spread
    assert lm.power(1.0, 4) == pytest.approx(2.08, rel=0.01)


def test_no_flipped_labels(lm: ModuleType):
    """If no label was learnt, there is a dash; if only one seed has some, its value is shown."""
    runs = []
    for seed in range(4):
        about = {"seed": seed, "right": 0.2, "win_rate": 0.5, "kl": 0.1, "flipped_learnt": None}
        runs += [{**about, "loss": "reference"}, {**about, "loss": "DPO"}]
    rows = lm.summarise(runs, lm.LOSSES[:1])
    assert rows[1]["flipped_learnt"] is None
    reference, dpo = lm.table(rows).splitlines()[2:]
    assert reference.endswith("|  |") and dpo.endswith("| - |")
    runs[3]["flipped_learnt"] = 0.25
    assert lm.table(lm.summarise(runs, lm.LOSSES[:1])).endswith("| 25 |\n")


def test_a_losss_base_is_there(lm: ModuleType):
    """SimPO with FocalPO's factor is compared with SimPO; without SimPO there is no difference."""
    names = [loss.name for loss in lm.asked_losses(["SimPO, FocalPO 0.05"])]
    assert names == ["DPO", "SimPO", "SimPO, FocalPO 0.05"]
    runs = []
    for seed in range(4):
        about = {"seed": seed, "win_rate": 0.5, "kl": 0.1, "flipped_learnt": 0.25}
        for loss, right in zip(("reference", *names), (0.2, 0.3, 0.4, 0.45), strict=True):
            runs.append({**about, "loss": loss, "right": right + 0.01 * seed})
    row = lm.summarise(runs, lm.asked_losses(names))[-1]
    assert (row["base"], row["difference"]) == ("SimPO", pytest.approx(5))
    left = [run for run in runs if run["loss"] != "SimPO"]
    losses = [loss for loss in lm.LOSSES if loss.name in ("DPO", names[2])]
    line = lm.table(lm.summarise(left, losses)).splitlines()[-1]
    assert line.startswith(f"| {names[2]} | 46.50 ± ") and "|  |  | 50.00 |" in line


def test_a_rate_that_breaks_the_model_is_not_chosen(lm: ModuleType):
    rows = [{"rate": None, "right": 0.9}]
    rows += [{"rate": r, "right": v} for r, v in ((1, np.nan), (2, 0.4), (3, 0.5), (4, np.nan))]
    assert lm.best_rate(rows) == 3
    with pytest.raises(ValueError, match="each of --rates breaks DPO's model"):
        lm.best_rate(rows[:2])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--seeds 3", "--seeds must be at least 4, got 3"),
        ("--noise nan", "--noise must be at least 0 and below 0.5, got nan"),
        ("--beta 0", "--beta must be above 0, got 0"),
        ("--rates 1e-4 -1", "--rates must be above 0, got -1"),
        ("--losses IPO", "invalid choice: 'IPO'"),
    ],
)
def test_errors(lm: ModuleType, words: str, message: str, tmp_path: Path, capsys):
    with pytest.raises(SystemExit) as ended:
        lm.main([*words.split(), "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
