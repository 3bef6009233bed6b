"""``focalpo score``: rewards against log-probabilities computed by hand, and resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import ManyFocalpo
from transformers import AutoModelForCausalLM, AutoTokenizer

BETA = 0.2
PAIRS = 6


def header_of(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def by_hand(network: Any, tokenizer: Any, messages: list[dict[str, str]]) -> tuple[float, int]:
    """Summed log-probability of the answer in float64, and its tokens.  The sequence is written
    out here, template and all; the answer begins after the assistant's header."""
    user, assistant = (message["content"] for message in messages)
    prompt = f"<|begin_of_text|>{header_of('user')}{user}<|eot_id|>{header_of('assistant')}"
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = tokenizer(f"{assistant}<|eot_id|>", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([before + answer])
    with torch.no_grad():
        logps = network(ids).logits[0].log_softmax(-1)
    n = len(before)
    return sum(logps[n + i - 1, token].item() for i, token in enumerate(answer)), len(answer)


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
    (folder / "columns.jsonl").write_text('{"good": "a", "bad": "b"}\n')
    (folder / "broken.jsonl").write_text("{not json\n")
    (folder / "pairs.txt").write_text("")
    return {"folder": folder, "policy": folder / "policy", "ref": tiny / "model"}


@pytest.fixture(scope="module")
def ends(setting: dict[str, Path]) -> dict[str, tuple[int, str, str]]:
    folder = setting["folder"]

    def argv(out: str, *more: str, data: str = "pairs.jsonl", beta: float = BETA) -> list[str]:
        words = ["score", setting["policy"], "--ref", setting["ref"], folder / data]
        return [*map(str, words), "--beta", str(beta), "--out", str(folder / out), *more]

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
    # A disk that is full, and a folder where a file goes.
    (folder / "full").mkdir()
    (folder / "full" / "scores.jsonl").symlink_to("/dev/full")
    cases["full"] = argv("full", "--format", "csv")
    with ManyFocalpo("focalpo_plugins.trl.score", cwd=folder) as focalpo:
        found = {"whole": focalpo(*cases.pop("whole"))}
        # Stopped in the middle of the fourth pair, and after the last.
        content = (folder / "whole" / "scores.jsonl").read_text()
        lines = content.splitlines(keepends=True)
        for name, kept in (("resumed", "".join(lines[:4]) + lines[4][:30]), ("complete", content)):
            (folder / name).mkdir()
            (folder / name / "scores.jsonl").write_text(kept)
        return found | {name: focalpo(*words) for name, words in cases.items()}


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()[1:]]


def test_rewards_are_those_computed_by_hand(setting, ends):
    """``beta * (log p - log p_ref)`` in float64, the second pair's margin 0; to 1e-4 nats, what
    float32 leaves of sums of log-probabilities of about 20 nats."""
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


def test_goes_on_where_it_stopped(setting, ends):
    """The half-written line is scored again, the whole ones are kept, in any batches."""
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


def test_half_a_file_is_never_read_as_whole(setting, ends, tmp_path):
    """Cut anywhere: what is gone on with are the pairs whose lines are whole, and the file then ends
    with the last of these."""
    from focalpo_plugins.cli.score import _resume

    lines = (setting["folder"] / "whole" / "scores.jsonl").read_bytes().splitlines(keepends=True)
    content = b"".join(lines[:3])
    header, scores = json.loads(lines[0]), tmp_path / "scores.jsonl"
    for cut in range(len(content) + 1):
        scores.write_bytes(content[:cut])
        whole = content[:cut].count(b"\n")
        assert sorted(_resume(scores, header)) == list(range(max(0, whole - 1)))
        assert scores.read_bytes() == b"".join(lines[:whole])


def test_a_full_disk(setting, ends):
    code, _, errors = ends["full"]
    assert code == 2
    assert errors.splitlines()[-1] == (
        "focalpo score: error: --out must be a folder with room that can be written to, got "
        f"{str(setting['folder'] / 'full')!r}: scores.jsonl: No space left on device. Make room, or "
        "name another."
    )
    assert [path.name for path in (setting["folder"] / "full").iterdir()] == ["scores.jsonl"]


def test_another_run_s_scores_are_not_gone_on_with(ends):
    code, _, errors = ends["other beta"]
    assert code == 2
    assert "was made with another beta, 0.2 where this run has 0.5" in errors.splitlines()[-1]


def test_what_max_length_drops_is_counted(setting, ends):
    """TRL drops the pairs whose prompt has 24 tokens or more, counted here by hand."""
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


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("no columns", "DATA must have rows with chosen and rejected, got"),
        ("broken", "DATA must be a preference file, got"),
        ("format", "DATA must end in .jsonl, .json, .parquet, .csv, got"),
    ],
)
def test_bad_data(ends, case: str, said: str):
    code, _, errors = ends[case]
    assert code == 2
    assert errors.splitlines()[-1].startswith(f"focalpo score: error: {said}")
    assert "Traceback" not in errors
