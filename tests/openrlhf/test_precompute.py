"""``--focalpo.precompute_ref``: the same training without the reference, in whole runs.

Losses may differ by 0.01 from those with OpenRLHF's own reference: it sees a pair padded with a
different pair each time, the precomputed one only once, and bf16 rounds differently by the padding.  The
log-probabilities of another pair would be off by whole nats.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import SUPPORT

# One worker makes the runs that several tests share.
shares_runs = pytest.mark.xdist_group("on two ranks")
shares_turn = pytest.mark.xdist_group("in turn")

OURS = ("--loss", "focalpo")
PRECOMPUTE = (*OURS, "--focalpo.precompute_ref")
ROUNDING = 0.01


def finished(run):
    assert run.returncode == 0, run.output
    return run


def said(output: str) -> str:
    """The one line about the log-probabilities."""
    start = "focalpo_plugins: reference log-probs of "
    # The text before it is another process's, such as a progress bar.
    (line,) = (part for part in output.splitlines() if start in part)
    return line.partition(start)[2]


def cached(folder: Path) -> Path:
    """The one file in a folder of them."""
    (path,) = folder.glob("reference_logps-*")
    return path


def logps(path: Path) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.get_tensor("logps")


@pytest.fixture(scope="module")
def data(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pairs to train on and 11 to evaluate on; neither divides by ranks and batch."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copy(few / "train.jsonl", folder)
    lines = (few / "test.jsonl").read_text().splitlines(keepends=True)
    (folder / "test.jsonl").write_text("".join(lines[:11]))
    return folder


@pytest.fixture(scope="module")
def on_two_ranks(data: Path) -> tuple[str, ...]:
    """ZeRO-3, two epochs with an evaluation after each, accumulating over two batches of two."""
    return (
        "--eval.dataset", str(data / "test.jsonl"), "--eval.split", "train", "--ds.zero_stage", "3",
        "--train.max_epochs", "2", "--lr_scheduler", "constant",
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(train_many: Callable, on_two_ranks) -> tuple:
    """OpenRLHF's own way, and with the log-probabilities precomputed, with a checkpoint at step 3."""
    flags = {"own": OURS, "precomputed": (*PRECOMPUTE, "--ckpt.save_steps", "3")}
    found = train_many(
        {name: (*on_two_ranks, *more) for name, more in flags.items()},
        ranks=2, first=["counted_forwards"],
    )  # fmt: skip
    return tuple(map(finished, found.values()))


def counted(folder: Path) -> list[dict[str, int]]:
    return [json.loads((folder / f"counted{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def same_policy(train: Callable, on_two_ranks, variants) -> tuple:
    """OpenRLHF's own way and ours, with a reference other than the policy, and without learning: in
    bf16, two runs that learn drift apart with any rounding."""
    flags = (*on_two_ranks, "--ref.model_name_or_path", str(variants.folder / "other"))
    stays = ("--adam.lr", "1e-12", "--model.beta", "1")
    return tuple(finished(train(*flags, *stays, *more, ranks=2)) for more in (OURS, PRECOMPUTE))


@shares_turn
def test_same_losses(same_policy):
    """Every logged number, in training and in evaluation, at every step."""
    own, precomputed = (run.steps() for run in same_policy)
    assert sorted(own) == list(range(1, 11))
    assert {len(own[step]) for step in (5, 10)} == {len(precomputed[step]) for step in (5, 10)}
    for step, values in own.items():
        for tag in ("train/loss", "train/chosen_reward", "train/reject_reward", "train/focalpo/p"):
            assert precomputed[step][tag] == pytest.approx(values[tag], abs=ROUNDING), (step, tag)
    for step in (5, 10):
        for tag in ("eval/eval_loss", "eval/focalpo/p"):
            assert precomputed[step][tag] == pytest.approx(own[step][tag], abs=ROUNDING)
    rewards = [values["train/chosen_reward"] for values in own.values()]
    assert max(rewards) - min(rewards) > 10 * ROUNDING


@shares_runs
def test_no_forward_of_the_reference(runs):
    """A rank's epoch is ten batches of two, for its twenty pairs, and its evaluation is three, for
    six pairs, as 11 are filled up to 12. OpenRLHF's own way runs the reference at each of them;
    ours runs it once on 51 pairs before training: 26 batches, 13 for each rank."""
    trained, evaluated = 2 * 10, 2 * 3
    for own, precomputed in zip(*(counted(run.folder) for run in runs), strict=True):
        assert own["with gradients"] == precomputed["with gradients"] == trained
        assert own["without"] == trained + evaluated + evaluated
        assert precomputed["without"] == 13 + evaluated


@shares_runs
def test_the_reference_is_freed(runs):
    """By the first step, the reference's memory is free: at least half of its weights of two bytes,
    on each of two ranks."""
    from safetensors.torch import load_file

    weights = load_file(runs[0].folder / "out" / "model.safetensors").values()
    half = sum(weight.numel() for weight in weights) * 2 / 2
    for own, precomputed in zip(*(counted(run.folder) for run in runs), strict=True):
        assert own["held"] - precomputed["held"] >= half
        # The policy is held as the reference was.
        assert precomputed["held"] == own["held"] / 2
    line = said(runs[1].stderr)
    path = cached(runs[1].folder / "out")
    assert line.startswith(f"51 pairs computed and kept in {path} in ")
    assert "the reference is freed, " in line
    assert "precomputed" not in runs[0].stderr and "Reference log-probs" not in runs[0].stderr


@shares_runs
def test_resume_on_nodes_that_share_no_folder(
    runs, ranks_apart: Callable, on_two_ranks, few: Path, tmp_path: Path
):
    """From the checkpoint of step 3 to the same end, with the log-probabilities that the first rank
    reads; the second rank is given a folder that can't exist."""
    whole = runs[1]
    shutil.copytree(
        whole.folder / "checkpoints" / "global_step3", tmp_path / "checkpoints" / "global_step3"
    )
    (tmp_path / "checkpoints" / "latest").write_text("global_step3")
    flags = (*on_two_ranks, *PRECOMPUTE, "--ckpt.load_enable", "--focalpo.precompute_dir")
    folders = (whole.folder / "out", few / "train.jsonl" / "no folder")
    first, second = ranks_apart(
        tmp_path, *((*flags, str(folder)) for folder in folders),
        module="counted_forwards", path=[SUPPORT],
    )  # fmt: skip
    finished(first), finished(second)
    assert said(first.stderr).startswith("51 pairs read from ")
    assert "consumed_samples: 24" in first.stderr
    rest, before = first.steps("train/"), whole.steps("train/")
    assert sorted(rest) == list(range(4, 11))
    for step, values in rest.items():
        for tag in ("loss", "focalpo/p", "chosen_reward"):
            assert values[tag] == pytest.approx(before[step][tag], rel=1e-6), (step, tag)
    for rank in counted(tmp_path):
        # 14 of the 20 batches are left, and both evaluations.
        assert (rank["with gradients"], rank["without"]) == (14, 2 * 3)


@pytest.fixture(scope="module")
def variants(tiny: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """References and data sets: 27 pairs, of which each epoch drops three different ones."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("variants")
    lines = (few / "train.jsonl").read_text().splitlines()[:27]
    (folder / "train.jsonl").write_text("\n".join(lines))
    last = json.loads(lines[-1])
    last["chosen"][-1]["content"] += " Yes."
    (folder / "edited.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]))

    model = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    for name in ("same", "other", "nan"):
        if name == "other":
            with torch.no_grad():
                model.model.norm.weight *= 1.1
        if name == "nan":
            bad = only_in_pair(3, [json.loads(line) for line in lines], tokenizer)
            output = model.lm_head.weight.detach().clone()
            model.config.tie_word_embeddings = False
            model.lm_head.weight = torch.nn.Parameter(output)
            with torch.no_grad():
                model.model.embed_tokens.weight[bad] = torch.nan
        # In several files, where the model has one.
        model.save_pretrained(folder / name, max_shard_size="500KB")
        tokenizer.save_pretrained(folder / name)
    template = (tiny / "model" / "chat_template.jinja").read_text()
    return SimpleNamespace(folder=folder, template=template.replace("\n\n", "\n"))


def only_in_pair(number: int, rows: list[dict], tokenizer) -> int:
    """A token that occurs in only one pair."""
    tokens = [
        set(tokenizer(" ".join(m["content"] for m in row["chosen"] + row["rejected"])).input_ids)
        for row in rows
    ]
    others = set().union(*tokens[:number], *tokens[number + 1 :])
    return min(tokens[number] - others - set(tokenizer.all_special_ids))


@pytest.fixture(scope="module")
def flags(variants) -> tuple[str, ...]:
    return ("--data.dataset", str(variants.folder / "train.jsonl"))


@pytest.fixture(scope="module")
def in_turn(
    train_many: Callable, variants, flags, hinge_package: Path, tmp_path_factory
) -> tuple[dict, Path]:
    """Runs that share a folder for the log-probabilities, one after the other."""
    shared = tmp_path_factory.mktemp("shared")
    folder = variants.folder
    adapter = ("--ds.lora.rank", "4", "--ds.lora.dropout", "0.1", "--train.max_epochs", "2")
    adapter += ("--adam.lr", "1e-4")  # the more a run learns, the more rounding makes it drift
    precompute = (*flags, *PRECOMPUTE, "--focalpo.precompute_dir", str(shared))
    hinge = (*flags, "--loss", "hinge", "--hinge.precompute_ref", "--hinge.precompute_dir")
    reference = "--ref.model_name_or_path"
    runs = {
        "own way": (*flags, *OURS, *adapter),
        "first": (*precompute, *adapter),
        "second": (*precompute, *adapter),
        "another loss": (*hinge, str(shared)),
        "weights elsewhere": (*precompute, reference, str(folder / "same")),
        "other weights": (*precompute, reference, str(folder / "other")),
        "other data": (*precompute, "--data.dataset", str(folder / "edited.jsonl")),
        "other template": (*precompute, "--data.tokenizer_chat_template", variants.template),
        "other max_len": (*precompute, "--data.max_len", "40"),
        "other attention": (*precompute, "--ds.attn_implementation", "sdpa"),
    }
    found = train_many(runs, hinge_package)
    return {name: finished(run) for name, run in found.items()}, shared


@shares_turn
def test_same_losses_with_an_adapter(in_turn):
    """Its dropout draws the same numbers, and the epochs, which drop different pairs, are
    complete."""
    own, first = (in_turn[0][name].steps() for name in ("own way", "first"))
    assert sorted(own) == list(range(1, 7))
    for step, values in own.items():
        assert first[step]["train/loss"] == pytest.approx(values["train/loss"], abs=ROUNDING)
        assert first[step]["train/grad_norm"] == pytest.approx(values["train/grad_norm"], rel=0.1)
    assert own[6]["train/chosen_reward"] != own[1]["train/chosen_reward"]


@shares_turn
def test_read_again_to_the_last_bit(in_turn):
    first, second = (in_turn[0][name] for name in ("first", "second"))
    assert said(first.stderr).startswith("27 pairs computed and kept in ")
    assert said(second.stderr).startswith("27 pairs read from ")
    assert first.steps() == second.steps()
    adapters = [
        (run.folder / "out" / "adapter_model.safetensors").read_bytes() for run in (first, second)
    ]
    assert adapters[0] == adapters[1]


@shares_turn
@pytest.mark.parametrize("name", ("another loss", "weights elsewhere"))
def test_read(in_turn, name: str):
    assert said(in_turn[0][name].stderr).startswith("27 pairs read from ")


OTHERS = ("weights", "data", "template", "max_len", "attention")


@shares_turn
def test_computed_again(in_turn):
    """One file for each changed setting, and one for all others."""
    runs, shared = in_turn
    for name in OTHERS:
        assert " pairs computed and kept in " in said(runs[f"other {name}"].stderr), name
    files = {path.name for path in shared.iterdir()}
    assert len(files) == 1 + len(OTHERS)
    assert all(name.endswith(".cache") for name in files)


def file_of(run) -> Path:
    return Path(said(run.stderr).split(" kept in ")[1].split(" in ")[0])


@pytest.fixture(scope="module")
def in_trouble(train_many: Callable, variants, flags, in_turn, tmp_path_factory) -> tuple:
    """Runs that find a damaged file, half a file, or a file of other pairs under its name; runs
    that can't write; and a run whose reference gives NaN."""
    runs, _ = in_turn
    whole, others = (file_of(runs[name]) for name in ("first", "other data"))
    content = whole.read_bytes()
    place = content.index(logps(whole).numpy().tobytes())
    contents = {
        # One bit of one log-probability.
        "damaged": content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :],
        "half": content[: len(content) // 2],
        "of others": others.read_bytes(),
    }
    folders = {name: tmp_path_factory.mktemp("cache") for name in (*contents, "nan")}
    for name, damaged in contents.items():
        (folders[name] / whole.name).write_bytes(damaged)
    folders["no folder"] = variants.folder / "train.jsonl" / "in a file"
    nan = ("--ref.model_name_or_path", str(variants.folder / "nan"))
    found = train_many(
        {
            name: (*flags, *PRECOMPUTE, "--focalpo.precompute_dir", str(folder))
            + (nan if name == "nan" else ())
            for name, folder in folders.items()
        }
    )
    return found, folders, whole


@shares_turn
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("damaged", "its checksum is wrong"),
        ("half", ""),
        ("of others", "it belongs to another reference or other pairs"),
    ],
)
def test_a_damaged_file_is_recreated(in_trouble, name: str, why: str):
    runs, folders, whole = in_trouble
    run = finished(runs[name])
    path = folders[name] / whole.name
    (line,) = run.said("is damaged")
    assert line.startswith(f"focalpo_plugins: {path} is damaged ({why}")
    assert line.endswith("); recreating it.")
    assert said(run.stderr).startswith(f"27 pairs computed and kept in {path} in ")
    assert torch.equal(logps(cached(folders[name])), logps(whole))


def stopped(run) -> str:
    """Its only line; nothing was trained after it."""
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert (
        "Train step" not in run.stderr and not (run.folder / "out" / "model.safetensors").exists()
    )
    return run.said("focalpo_plugins:")[-1]


@shares_turn
def test_a_folder_that_cannot_be_written_to(in_trouble):
    runs, folders, _ = in_trouble
    line = stopped(runs["no folder"])
    start = "focalpo_plugins: --focalpo.precompute_dir must be a writable folder with 0.0 MiB of "
    assert line.startswith(f"{start}free space, got {str(folders['no folder'])!r}: ")
    assert line.endswith(f"Not a directory: {str(folders['no folder'])!r}. Choose another.")
    assert "Reference log-probs" not in runs["no folder"].stderr


@shares_turn
def test_a_full_disk_and_a_kill(train: Callable, flags, in_turn, tmp_path: Path):
    """Neither leaves a file that passes for a complete one; the next run computes it again."""
    whole = file_of(in_turn[0]["first"])
    asked = (*flags, *PRECOMPUTE, "--focalpo.precompute_dir", str(tmp_path / "cache"))
    faults = {"first": ["disk_faults.sitecustomize"]}
    full = train(*asked, **faults, FULL_AT="reference_logps")
    line = stopped(full)
    assert "must be a writable folder with 0.0 MiB of free space" in line
    assert line.endswith("[Errno 27] File too large. Choose another.")
    assert not list((tmp_path / "cache").iterdir())
    killed = train(*asked, **faults, KILLED_AT_NAMING="reference_logps")
    assert killed.returncode == -9, killed.output
    (left,) = (tmp_path / "cache").iterdir()
    assert left.name.endswith(".tmp") and left.stat().st_size == whole.stat().st_size
    again = finished(train(*asked))
    assert said(again.stderr).startswith("27 pairs computed and kept in ")
    assert torch.equal(logps(tmp_path / "cache" / whole.name), logps(whole))


@shares_turn
def test_a_log_probability_that_is_not_finite(in_trouble, variants):
    """NaN in the embedding of a token that occurs in only one pair; pairs count from 0."""
    runs, folders, _ = in_trouble
    line = stopped(runs["nan"])
    assert "the reference's log-probabilities are not finite for 1 of 27 pairs. " in line
    assert "The first is pair 3 of the training data that OpenRLHF kept, counted from 0: " in line
    assert "0: '<|begin_of_text|>" in line
    assert list(folders["nan"].iterdir()) == []


def test_pairs_that_one_rank_alone_does_not_know(watched: Callable):
    """The second rank's training pairs changed after training began: both ranks end, each with the
    second rank's problem, and no step is logged."""
    flags = (*PRECOMPUTE, "--ds.zero_stage", "3")
    run = watched(flags, 2, {"rank": 1, "edited": True})
    assert run.returncode == 1, run.output
    error = (
        "RunError: on rank 1, the reference's log-probabilities of pair 0 of "
        "a batch were not precomputed: the pair was in neither data set when training began."
    )
    assert run.stderr.count(error) == 2
    assert not run.steps("train/")


@shares_turn
def test_a_name_that_is_taken(train: Callable, flags, in_turn, tmp_path: Path):
    """A folder has the file's name, which rank 0 notices only after everything is computed: both
    ranks end. The name is that of a run on one rank, with another ZeRO stage."""
    name, cache = file_of(in_turn[0]["first"]).name, tmp_path / "cache"
    (cache / name).mkdir(parents=True)
    asked = (*flags, *PRECOMPUTE, "--focalpo.precompute_dir", str(cache), "--ds.zero_stage", "3")
    run = train(*asked, ranks=2)
    line = stopped(run)
    start = "focalpo_plugins: --focalpo.precompute_dir must be a folder in which the file "
    assert line.startswith(f"{start}{name} can be written, got {str(cache)!r}: ")
    assert "Is a directory" in line
    assert [path.name for path in cache.iterdir()] == [name]
