"""Each trained or evaluated pair is counted once, and a margin that is not finite stops the run
before the weights change, wherever it occurs in the data."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_trl import FUSED, WORDS, margins_of, model, on_two_ranks, trainer
from transformers import TrainerCallback

from focalpo_plugins import FocalPOTrainer

pytestmark = pytest.mark.releases

PATHS = [
    pytest.param({}, id="plain"),
    pytest.param(FUSED["focalpo_fused"], id="fused", marks=pytest.mark.fused),
]
# Pairs, batch and accumulation: an epoch whose last update, batch or both are cut short, or neither.
SIZES = [
    (pairs, batch, accumulated)
    for pairs, batch, accumulated in itertools.product((5, 8, 11), (2, 4), (1, 2, 3))
]


def rows(count: int, first: int = 0) -> list[dict[str, str]]:
    """Pairs whose margins all differ."""
    return [
        {
            "prompt": f"{WORDS[i]} {WORDS[i + 1]}",
            "chosen": f" {WORDS[i + 2]} {WORDS[i + 5]}",
            "rejected": f" {WORDS[i + 9]}" * (1 + i % 3),
        }
        for i in range(first, first + count)
    ]


class Collated:
    """A collator that notes, by the prompts, which rows are in a batch."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate
        self.prompts: list[tuple[int, ...]] = []

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        self.prompts += [tuple(example["prompt_ids"]) for example in examples]
        return self.collate(examples)


def one_epoch(
    words: Any, folder: Path, size: tuple[int, int, int], **more: Any
) -> tuple[FocalPOTrainer, dict[tuple[int, ...], float]]:
    """A trainer for one epoch that leaves the weights unchanged and logs once, and each pair's
    margin in float64, by its prompt."""
    count, batch, accumulated = size
    host = trainer(
        FocalPOTrainer,
        words,
        folder,
        pairs=Dataset.from_list(rows(count)),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        gradient_accumulation_steps=accumulated,
        learning_rate=0.0,
        max_steps=-1,
        num_train_epochs=1,
        logging_strategy="epoch",
        focalpo_gamma=0.5,
        **more,
    )
    host.data_collator = Collated(host.data_collator)
    sets = [host.train_dataset]
    if host.eval_dataset is not None:
        sets.append(host.eval_dataset)
    margins = {}
    for row in itertools.chain(*sets):
        inputs = host.data_collator.collate([row])
        margins[tuple(row["prompt_ids"])] = margins_of(host, inputs).item()
    assert len({round(z, 4) for z in margins.values()}) == len(margins)
    return host, margins


def expected(margins: list[float]) -> dict[str, float]:
    """By their definitions; each margin counts as often as it occurs."""
    p = [1 / (1 + math.exp(-z)) for z in margins]
    weight = [q**0.5 * (1 + 0.5 * math.log(q)) for q in p]
    groups = {
        "margin_correct": [z for z in margins if z > 0],
        "margin_incorrect": [z for z in margins if z <= 0],
    }
    found = {"p": sum(p) / len(p), "weight": sum(weight) / len(weight)}
    found["reversed"] = sum(w < 0 for w in weight) / len(weight)
    return found | {name: sum(zs) / len(zs) for name, zs in groups.items() if zs}


def logged(log: list[dict[str, float]], prefix: str) -> dict[str, float]:
    (entry,) = [entry for entry in log if f"{prefix}p" in entry]
    return {k.removeprefix(prefix): v for k, v in entry.items() if k.startswith(prefix)}


@pytest.mark.parametrize("path", PATHS)
def test_each_pair_once(tokenizer, tmp_path, path):
    """In training and in evaluation, for sizes that divide and sizes that don't."""
    for size in SIZES:
        host, margins = one_epoch(
            tokenizer, tmp_path, size, eval_dataset=Dataset.from_list(rows(7, first=15)), **path
        )
        host.train()
        assert sorted(host.data_collator.prompts) == sorted(margins)[: size[0]]
        host.evaluate()
        for prefix, data in (
            ("focalpo/", host.train_dataset),
            ("eval_focalpo/", host.eval_dataset),
        ):
            of_pairs = [margins[tuple(row["prompt_ids"])] for row in data]
            found = logged(host.state.log_history, prefix)
            assert found == pytest.approx(expected(of_pairs), rel=1e-4, abs=1e-6), (size, prefix)


class Weights(TrainerCallback):
    """The weights as each step left them."""

    def __init__(self, policy: torch.nn.Module) -> None:
        self.after = [copy.deepcopy(policy.state_dict())]

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.after.append(copy.deepcopy(given["model"].state_dict()))


def losing(policy: torch.nn.Module, token: int) -> None:
    """Make the model's states NaN at each ``token``, which occurs in only one pair."""

    def lose(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        output.last_hidden_state[kwargs["input_ids"] == token] *= math.nan

    policy.base_model.register_forward_hook(lose, with_kwargs=True)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_margin_that_is_not_finite_anywhere(tokenizer, tmp_path, path, accumulated):
    """In each pair in turn, and so at each place of each step, including the last and shortest."""
    steps = set()
    for bad in range(11):
        pairs = rows(11)
        pairs[bad]["chosen"] += " w39"
        policy = model(0)
        losing(policy, tokenizer.vocab["w39"])
        host = trainer(
            FocalPOTrainer,
            tokenizer,
            tmp_path,
            policy=policy,
            pairs=Dataset.from_list(pairs),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=accumulated,
            max_steps=-1,
            num_train_epochs=1,
            **path,
        )
        host.add_callback(weights := Weights(policy))
        with pytest.raises(
            FloatingPointError, match=r"focalpo: reward margins are not finite, ste"
        ):
            host.train()
        steps.add(host.state.global_step)
        for name, weight in policy.state_dict().items():
            assert torch.equal(weight, weights.after[-1][name]), (bad, name)
    # Three batches of 4, 4 and 3 pairs: three steps, or one.
    assert steps == set(range(3 // accumulated))


# Two ranks at once: what each size's epoch counted, and where a bad pair stopped both.
ON_TWO_RANKS = """
import json, sys
from pathlib import Path
folder, here, sizes, bad_pairs = Path(sys.argv[1]), *map(json.loads, sys.argv[2:])
sys.path.insert(0, here)
import torch
import tiny_trl
import test_counting as t
from datasets import Dataset
from trl import DPOTrainer

words = tiny_trl.tokenizer()
paths = {"plain": {}}
if not hasattr(DPOTrainer, "_truncate_inputs"):
    paths["fused"] = {"focalpo_fused": True}


def write(*found):
    sys.stdout.write("FOUND " + json.dumps(found) + chr(10))
    sys.stdout.flush()


def count(path, size):
    host, margins = t.one_epoch(
        words, folder, size, ddp_backend="gloo",
        eval_dataset=Dataset.from_list(t.rows(7, first=15)), **paths[path],
    )
    host.train()
    trained = [None, None]
    torch.distributed.all_gather_object(trained, host.data_collator.prompts)
    host.evaluate()
    log = host.state.log_history
    found = [t.logged(log, prefix) for prefix in ("focalpo/", "eval_focalpo/")]
    zs = [margins[prompt] for of_rank in trained for prompt in of_rank]
    evaluated = [margins[tuple(row["prompt_ids"])] for row in host.eval_dataset]
    if host.is_world_process_zero():
        write("counted", path, size, len(zs), found, [t.expected(zs), t.expected(evaluated)])


def stop(path, bad):
    pairs = t.rows(11)
    pairs[bad]["chosen"] += " w39"
    policy = tiny_trl.model(0)
    t.losing(policy, words.vocab["w39"])
    host = tiny_trl.trainer(
        t.FocalPOTrainer, words, folder, policy=policy, pairs=Dataset.from_list(pairs),
        per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=-1,
        num_train_epochs=1, ddp_backend="gloo", eval_dataset=Dataset.from_list(pairs[bad:bad + 1]),
        per_device_eval_batch_size=2, **paths[path],
    )
    host.add_callback(weights := t.Weights(policy))
    for start in (host.evaluate, host.train):
        try:
            start()
        except FloatingPointError as error:
            same = all(
                torch.equal(weight, weights.after[-1][name])
                for name, weight in policy.state_dict().items()
            )
            write("stopped", path, bad, start.__name__, same, str(error))


for path in paths:
    for size in sizes:
        count(path, size)
    for bad in bad_pairs:
        stop(path, bad)
"""
OVER_RANKS = [[5, 2, 2], [8, 2, 1], [11, 2, 3]]
BAD_PAIRS = [0, 2, 5, 7, 10]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    words = (str(Path(__file__).parent), OVER_RANKS, BAD_PAIRS)
    folder = tmp_path_factory.mktemp("two_ranks")
    said = on_two_ranks(ON_TWO_RANKS, folder, *map(json.dumps, words)).splitlines()
    return [json.loads(line.partition("FOUND ")[2]) for line in said if "FOUND " in line]


NAMES = [
    pytest.param("plain", id="plain"),
    pytest.param("fused", id="fused", marks=pytest.mark.fused),
]


@pytest.mark.xdist_group("forked")
@pytest.mark.parametrize("path", NAMES)
def test_each_pair_once_on_two_ranks(two_ranks, path):
    """A rank that would run out of pairs gets the first ones again, which are then trained again:
    of 11 pairs in batches of 2, rank 1 gets one more. In evaluation they don't count."""
    found = [rest for what, of, *rest in two_ranks if (what, of) == ("counted", path)]
    assert [size for size, *_ in found] == OVER_RANKS
    for size, trained, ours, truth in found:
        assert trained == math.ceil(size[0] / (2 * size[1])) * 2 * size[1]
        for means, expected_means in zip(ours, truth, strict=True):
            assert means == pytest.approx(expected_means, rel=1e-4, abs=1e-6), size


@pytest.mark.xdist_group("forked")
@pytest.mark.parametrize("path", NAMES)
def test_all_ranks_stop(two_ranks, path):
    """Whichever of the two has the pair, in training and in evaluation, with the same message."""
    found = [rest for what, of, *rest in two_ranks if (what, of) == ("stopped", path)]
    ranks = set()
    for bad, start in itertools.product(BAD_PAIRS, ("evaluate", "train")):
        first, second = [rest for at, name, *rest in found if (at, name) == (bad, start)]
        assert first == second and first[0], (bad, start)
        ranks |= {rank for rank in (0, 1) if f"rank {rank}, row" in first[1]}
    assert ranks == {0, 1}


def test_predict_leaves_nothing_behind(tokenizer, tmp_path):
    """Its pairs count in its own metrics, and in no evaluation's."""
    host, margins = one_epoch(
        tokenizer, tmp_path, (5, 2, 1), eval_dataset=Dataset.from_list(rows(7, first=15))
    )
    predicted = host.predict(host.train_dataset).metrics
    evaluated = host.evaluate()
    for metrics, prefix, data in (
        (predicted, "test_focalpo/", host.train_dataset),
        (evaluated, "eval_focalpo/", host.eval_dataset),
    ):
        zs = [margins[tuple(row["prompt_ids"])] for row in data]
        assert logged([metrics], prefix) == pytest.approx(expected(zs), rel=1e-4, abs=1e-6)


def test_an_evaluation_that_was_interrupted_leaves_nothing_behind(tokenizer, tmp_path, monkeypatch):
    host, margins = one_epoch(
        tokenizer, tmp_path, (5, 2, 1), eval_dataset=Dataset.from_list(rows(7, first=15))
    )
    step = host.prediction_step
    calls = iter(range(2))
    monkeypatch.setattr(
        host, "prediction_step", lambda *args, **more: (next(calls), step(*args, **more))[1]
    )
    with pytest.raises(StopIteration):
        host.evaluate()
    monkeypatch.undo()
    zs = [margins[tuple(row["prompt_ids"])] for row in host.eval_dataset]
    found = logged([host.evaluate()], "eval_focalpo/")
    assert found == pytest.approx(expected(zs), rel=1e-4, abs=1e-6)


def test_named_evaluation_sets(tokenizer, tmp_path):
    """Each set has its own prefix, as transformers logs their losses."""
    sets = {"easy": Dataset.from_list(rows(3, first=15)), "hard": Dataset.from_list(rows(4, 20))}
    host = trainer(
        FocalPOTrainer, tokenizer, tmp_path, eval_dataset=sets, focalpo_gamma=0.5, max_steps=1,
        learning_rate=0.0, eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    host.train()
    for name, data in host.eval_dataset.items():
        zs = [margins_of(host, host.data_collator([row])).item() for row in data]
        found = logged(host.state.log_history, f"eval_{name}_focalpo/")
        assert found == pytest.approx(expected(zs), rel=1e-4, abs=1e-6)
    assert not any("eval_focalpo/p" in entry for entry in host.state.log_history)
