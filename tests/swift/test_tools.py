"""`focalpo check` on what ms-swift would train, `report` and `score` on what it has trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import harness
import pytest
import yaml
from contract import FIRST
from forked import SUPPORT
from harness import EXAMPLES, ManyFocalpo
from planned import computed
from swift_command import TINY, train, words

FOCALPO = {"loss_type": "focalpo", "focalpo_gamma": 0.05}


@pytest.fixture(scope="module")
def focalpo(tmp_path_factory: pytest.TempPathFactory) -> ManyFocalpo:
    folder = tmp_path_factory.mktemp("tools")
    return ManyFocalpo(folder, MODELSCOPE_CACHE=str(folder / "cache"))


@pytest.fixture
def check(focalpo: ManyFocalpo, tiny: Path, few: Path, tmp_path: Path) -> Callable[..., tuple]:
    """Exit code, stdout and stderr of `focalpo check` on a YAML with these keys."""

    def of(*argv: str, **given: Any) -> tuple[int, str, str]:
        data = {"model": str(tiny / "model"), "dataset": str(few / "train.jsonl")}
        written = {**TINY, **FOCALPO, **data, "output_dir": str(tmp_path / "out"), **given}
        written = {key: value for key, value in written.items() if value is not None}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(written))
        return focalpo("check", tmp_path / "run.yaml", *argv)

    return of


@pytest.mark.releases
def test_check(check: Callable[..., tuple], tmp_path: Path):
    """40 pairs in steps of 2 x 4 x 2 ranks: 20 a rank are 5 batches, so 3 steps an epoch."""
    code, out, err = check(
        "--json", "--gpus", "2", num_train_epochs=2, bf16=True, deepspeed="zero3"
    )
    assert code == 0, err
    found = json.loads(out)
    assert found["first_loss"] == pytest.approx(FIRST)
    assert (found["epoch_steps"], found["steps"], found["batch"]) == (3, 6, 16)
    assert (found["rows"], found["dropped"], found["zero_stage"]) == (40, 0, 3)
    assert (found["precision"], found["options"]["gamma"]) == ("bf16", 0.05)
    sides = found["pair"]["chosen"], found["pair"]["rejected"]
    assert all(side["tokens"][-1] == "<|eot_id|>" and side["trained"][-1] for side in sides)
    assert not (tmp_path / "out").exists()


@pytest.mark.releases
def test_check_counts_the_steps_that_are_trained(check: Callable[..., tuple], tiny: Path,
                                                 few: Path, tmp_path: Path):  # fmt: skip
    """The plan of an epoch whose last batch and last step are not full, on 29 of the pairs."""
    lines = (few / "train.jsonl").read_text().splitlines(keepends=True)[:29]
    (tmp_path / "29.jsonl").write_text("".join(lines))
    given = {"dataset": str(tmp_path / "29.jsonl"), "num_train_epochs": 2}
    code, out, err = check("--json", **given)
    assert code == 0, err
    folder = tmp_path / "trained"
    folder.mkdir()
    code, output = train(folder, {**FOCALPO, **given, "model": tiny / "model"})
    assert code == 0, output[-4000:]
    last = [
        json.loads(line) for line in (folder / "out" / "logging.jsonl").read_text().splitlines()
    ]
    trained = next(entry["global_step"] for entry in last if "log_history" in entry)
    assert json.loads(out)["steps"] == trained


@pytest.mark.releases
@pytest.mark.parametrize(
    "ranks, given",
    [
        (1, {}),
        (1, {"group_by_length": True, "dataloader_drop_last": True}),
        (2, {"data_seed": 7}),
        (2, {"focalpo_balanced_batches": True}),
    ],
)
def test_a_run_has_the_batches_that_were_planned(
    tiny: Path, few: Path, tmp_path: Path, ranks: int, given: dict[str, Any]
):
    """In both epochs, whose orders differ.  Of 29 pairs, one rank trains on seven batches of four and
    one of one pair; two ranks on three of four and one of two each, and one pair is left out.  With
    dataloader_drop_last the smaller batches are left out too."""
    lines = (few / "train.jsonl").read_text().splitlines(keepends=True)[:29]
    (tmp_path / "29.jsonl").write_text("".join(lines))
    given = {**TINY, **FOCALPO, **given, "model": tiny / "model", "dataset": tmp_path / "29.jsonl",
             "num_train_epochs": 2}  # fmt: skip
    argv = [ranks, "--", "swift", "rlhf", *words(given), "--output_dir", tmp_path / "out"]
    code, said, errors = forked.run("planned:main", argv, tmp_path)
    assert code == 0, errors[-3000:]
    plan = json.loads(said.splitlines()[-1])
    watched = {"external_plugins": SUPPORT / "swift_batches.py"}
    code, output = train(tmp_path, {**given, **watched}, ranks)
    assert code == 0, output[-4000:]
    files = sorted((tmp_path / "out").glob("batches*.jsonl"))
    trained = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    of_epoch = ([4] * 7 + [1]) if ranks == 1 else [4, 4, 4, 2]
    if "dataloader_drop_last" in given:
        of_epoch = of_epoch[:-1]
    assert [[*map(len, of_rank)] for of_rank in trained] == [of_epoch * 2] * ranks
    assert trained[0][0] != trained[0][len(of_epoch)]  # the second epoch's
    assert (plan["batches"] == trained) is ("focalpo_balanced_batches" not in given)
    found = plan["tokens_per_step"], plan["largest"]["tokens"], plan["largest"]["pairs"]
    assert found == pytest.approx(computed(trained, 2))


@pytest.mark.releases
def test_check_of_a_command_line(focalpo: ManyFocalpo, tiny: Path, few: Path, tmp_path: Path):
    given = {**TINY, **FOCALPO, "model": tiny / "model", "dataset": few / "train.jsonl"}
    # Both are read out of the words, which count in every form.
    more = ["--deepspeed=zero3", "--gradient-accumulation-steps=5"]
    code, out, err = focalpo("check", "--", "swift", "rlhf", *words(given), *more)
    assert code == 0, err
    assert "ZeRO stage 3" in out and "4 pairs x 5 accumulated" in out
    assert "focalpo gamma=0.05" in out and "40 pairs, 0 dropped by the host" in out
    assert "to read them, set columns to" in out


@pytest.mark.releases
@pytest.mark.parametrize(
    "given, message",
    [
        ({"focalpo_gama": 0.1}, "unknown key focalpo_gama"),
        ({"focalpo_gamma": None}, "focalpo_gamma must be given with loss_type focalpo"),
        ({"rlhf_type": "kto", "loss_type": "kto", "focalpo_gamma": None}, "rlhf_type must be dpo"),
        ({"columns": None}, "set columns to '"),
        ({"columns": json.dumps({"chosen": "messages"})}, "has no rejected answer"),
        ({"max_length": 8}, "dataset must hold a pair that fits into max_length, got 40 pairs"),
        ({"dataset": "no such.jsonl"}, "dataset must be a file or folder that exists"),
        (
            {"streaming": True, "max_steps": 4},
            "streaming must be false for focalpo check, got true",
        ),
    ],
)
def test_check_says_what_is_wrong(check: Callable[..., tuple], given: dict, message: str):
    code, out, err = check(**given)
    assert code == 2, out
    assert message in err.strip().splitlines()[-1], err[-3000:]


def test_prompts_that_ms_swift_would_not_read(check: Callable[..., tuple], tmp_path: Path):
    """Answers without their prompt's turns: ms-swift puts an empty user turn before them."""
    turn = {"role": "assistant", "content": "good"}
    row = {"prompt": "Q", "chosen": [turn], "rejected": [{**turn, "content": "bad"}]}
    (tmp_path / "bare.jsonl").write_text((json.dumps(row) + "\n") * 16)
    code, out, _ = check("--strict", dataset=str(tmp_path / "bare.jsonl"))
    assert code == 1 and "a run refuses these data: 16 of 16 rows have no prompt" in out


def test_ld_dpo_has_no_first_loss_to_expect(check: Callable[..., tuple]):
    """It weighs the policy's tokens only, so the margins aren't 0."""
    code, out, err = check("--json", ld_alpha=0.5)
    assert code == 0, err
    assert json.loads(out)["first_loss"] is None


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "has a message with the content None in the column 'chosen'"),
        (5, "has a message with the content 5 in the column 'chosen'"),
    ],
)
def test_content_that_is_not_text(check: Callable[..., tuple], few: Path, tmp_path: Path,
                                  content: Any, message: str):  # fmt: skip
    """ms-swift leaves such rows out, and fails with no word about them if none is left."""
    rows = [json.loads(line) for line in (few / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row["chosen"][-1]["content"] = content
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, _, err = check(dataset=str(tmp_path / "rows.jsonl"))
    assert code == 2
    assert err.strip().splitlines()[-1].count(message) == 1, err[-3000:]


def test_rows_without_a_rejected_answer(check: Callable[..., tuple], few: Path, tmp_path: Path):
    """Twenty of 40, in which ms-swift trains the chosen answer as both."""
    rows = [json.loads(line) for line in (few / "train.jsonl").read_text().splitlines()]
    for row in rows[::2]:
        row["rejected"] = None
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, err = check(dataset=str(tmp_path / "rows.jsonl"))
    assert code == 0, err
    assert "20 of 40 rows have no rejected answer: ms-swift trains the chosen one" in out


def test_the_memory_alone(tmp_path: Path):
    """In the repository root, where a recipe finds its template."""
    recipe = EXAMPLES / "swift" / "llama3_focalpo.yaml"
    focalpo = ManyFocalpo(EXAMPLES.parent, MODELSCOPE_CACHE=str(tmp_path))
    code, out, err = focalpo("check", recipe, "--model-config", "llama-3-8b", "--gpus", "8")
    assert code == 0, err
    assert "ZeRO stage 3" in out and "1 pair x 16 accumulated x 8 ranks (--gpus) = 128" in out


@pytest.mark.releases
def test_report_and_score(focalpo: ManyFocalpo, tiny: Path, few: Path, tmp_path: Path):
    """The log of a run with adapters, and the margins of its checkpoint with the run's beta."""
    given = {**FOCALPO, "model": tiny / "model", "dataset": few / "train.jsonl", "beta": 0.3,
             "tuner_type": "lora", "max_steps": 3, "save_strategy": "steps", "save_steps": 3,
             "val_dataset": few / "test.jsonl", "eval_strategy": "steps", "eval_steps": 3}  # fmt: skip
    code, output = train(tmp_path, given)
    assert code == 0, output[-6000:]
    out = tmp_path / "out"
    code, shown, err = focalpo("report", out, "--out", tmp_path / "report", "--format", "csv")
    assert code == 0, err
    assert "0.6695" in shown and "eval" in shown
    # Trained on, with the model without them as the reference: the margins aren't 0.
    again = words({**TINY, **given, "adapters": out / "checkpoint-3", "eval_strategy": "no"})
    code, shown, err = focalpo("check", "--json", "--", "swift", "rlhf", *again)
    assert code == 0, err
    assert json.loads(shown)["first_loss"] is None
    # In a process of its own: ms-swift takes the constructor off TRL's trainer where it is imported.
    done = harness.focalpo(
        "score", out / "checkpoint-3", few / "test.jsonl", "--ref", tiny / "model",
        "--out", tmp_path / "scores", "--format", "csv", HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "0.3" in done.stdout, done.stdout
