"""``--focalpo.balanced_batches``: each optimizer step has the pairs that it has without, in OpenRLHF's
own sampler, loader and training loop, and in whole runs.

Expected values derived by hand
-------------------------------
Two ranks, two pairs each, two micro-steps: rows 0 to 7 with 1, 8, 2, 7, 3, 6, 4, 5 tokens, not
shuffled.  OpenRLHF gives rows 0, 2, 4, 6 to the first rank, and 1, 3, 5, 7 to the second; the step is
drawn as 0 2 | 1 3 and then 4 6 | 5 7.  By length the rows are 1, 3, 5, 7, 6, 4, 2, 0.  The first micro-step gets {1, 3} and
{5, 7}, the second {6, 4} and {2, 0}.  In each the batch with the row that was drawn first comes
first: {1, 3} and {2, 0}.  So the first rank has 1, 3, 2, 0, and the second 5, 7, 6, 4.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from focalpo_plugins import focalpo_loss
from focalpo_plugins.balanced import Geometry, critical_path
from focalpo_plugins.compute.shared_prompts import layout_of_batch
from focalpo_plugins.registry import PairwiseLoss

in_one_process = pytest.mark.xdist_group("in one process")
shares_runs = pytest.mark.xdist_group("balanced")

OURS = ("--loss", "focalpo")
BALANCED = "--focalpo.balanced_batches"


# OpenRLHF's sampler, loader and training loop, in one process and without a model.


@dataclass(frozen=True)
class Case:
    """A run's sizes; ``tokens`` are those of each row, ``resumed`` is the number of steps done
    before."""

    geometry: Geometry
    tokens: tuple[int, ...]
    cost: str = "padded"
    epochs: int = 1
    resumed: int = 0
    seed: int = 42
    shuffle: bool = True
    workers: int = 0

    @property
    def rows(self) -> int:
        return len(self.tokens)


class Numbers(torch.utils.data.Dataset):
    """Rows that are their own numbers, in the shape of OpenRLHF's batches."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> int:
        return row

    @staticmethod
    def collate(rows: list[int]) -> tuple[Any, ...]:
        ids = torch.tensor(rows)[:, None, None]  # pairs, 1, tokens
        return ids, ids, ids, ids, rows


def loader_of(case: Case, rank: int, balanced: bool, trained: Callable[[], int]) -> Any:
    """The loader that OpenRLHF's ``setup_dataloader`` makes for one of several ranks."""
    from openrlhf.utils.distributed_sampler import DistributedSampler
    from torchdata.stateful_dataloader import StatefulDataLoader

    from focalpo_plugins.openrlhf import batches

    data, geometry = Numbers(case.rows), case.geometry
    sampler = DistributedSampler(
        data,
        num_replicas=geometry.ranks,
        rank=rank,
        shuffle=case.shuffle,
        seed=case.seed,
        drop_last=True,
    )
    loader = StatefulDataLoader(
        data,
        batch_size=geometry.each,
        sampler=sampler,
        drop_last=True,
        collate_fn=data.collate,
        num_workers=case.workers,
        persistent_workers=case.workers > 0,
    )
    if balanced:
        batches.check_loader(loader, BALANCED)
        batches.balance(loader, case.tokens, geometry.accumulation, case.cost, trained)
    return loader


def arguments(case: Case) -> SimpleNamespace:
    """The arguments that OpenRLHF's loop reads, flat and nested."""
    batch, never, none = case.geometry.step, -1, 0.0
    return SimpleNamespace(
        train=SimpleNamespace(batch_size=batch), train_batch_size=batch,
        eval=SimpleNamespace(steps=never), eval_steps=never,
        ckpt=SimpleNamespace(save_steps=never), save_steps=never,
        model=SimpleNamespace(aux_loss_coef=none, nll_loss_coef=none),
        aux_loss_coef=none, nll_loss_coef=none,
    )  # fmt: skip


def trained_rows(case: Case, rank: int, balanced: bool) -> list[list[int]]:
    """The rows of each micro-batch that OpenRLHF's own ``fit`` trains on a rank; our trainer names
    the same rows."""
    from openrlhf.models import DPOLoss
    from openrlhf.trainer.dpo_trainer import DPOTrainer

    from focalpo_plugins.openrlhf.trainer import PairwiseDPOTrainer

    found: list[list[int]] = []

    class Walks(PairwiseDPOTrainer):
        def concatenated_forward(self, model: Any, ids: torch.Tensor, *_: Any) -> tuple[Any, ...]:
            if model is self.model:
                rows = ids[:, 0].tolist()
                self._note_epoch()
                assert self._rows() == rows
                found.append(rows)
                self._batches += 1
            return *torch.zeros(2, len(ids)), None, None

        def save_logs_and_checkpoints(self, *_: Any, **__: Any) -> None:
            pass

    walks: Any = object.__new__(Walks)
    walks.args = arguments(case)
    walks._batches, walks._epoch = case.resumed * case.geometry.accumulation, None
    walks.model, walks.ref_model = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    walks.train_dataloader = loader_of(case, rank, balanced, lambda: walks._batches)
    walks.eval_dataloader = walks._wandb = walks._tensorboard = walks.optimizer = None
    walks.scheduler = SimpleNamespace(get_last_lr=lambda: [0.0])
    walks.epochs, walks.aux_loss, walks.nll_loss = case.epochs, False, False
    walks.loss_fn = DPOLoss(0.1)
    walks.strategy = SimpleNamespace(
        accumulated_gradient=case.geometry.accumulation,
        is_rank_0=lambda: False,
        backward=lambda *_: None,
        optimizer_step=lambda *_: None,
        get_grad_norm=lambda _: 0.0,
        all_reduce=lambda values: values,
    )
    batch = case.geometry.step
    DPOTrainer.fit(walks, walks.args, case.resumed * batch, case.rows // batch)
    return found


def micro_steps(case: Case, balanced: bool) -> list[list[int]]:
    """The rows that all ranks train at a time, the first rank's first."""
    ranks = [trained_rows(case, rank, balanced) for rank in range(case.geometry.ranks)]
    assert all(len(rows) == case.geometry.each for of_rank in ranks for rows in of_rank)
    return [sum(at_a_time, []) for at_a_time in zip(*ranks, strict=True)]


def optimizer_steps(case: Case, found: list[list[int]]) -> list[list[int]]:
    """The rows of each optimizer step; the last one may be incomplete."""
    of_step = case.geometry.accumulation
    return [sum(found[at : at + of_step], []) for at in range(0, len(found), of_step)]


@in_one_process
@pytest.mark.releases
def test_by_hand(openrlhf: SimpleNamespace):
    case = Case(Geometry(2, 2, 2), (1, 8, 2, 7, 3, 6, 4, 5), shuffle=False)
    assert trained_rows(case, 0, balanced=False) == [[0, 2], [4, 6]]
    assert trained_rows(case, 0, balanced=True) == [[1, 3], [2, 0]]
    assert trained_rows(case, 1, balanced=True) == [[5, 7], [6, 4]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    geometry = Geometry(*(draw(st.integers(1, most)) for most in (4, 3, 4)))
    rows = geometry.step + draw(st.integers(0, 2 * geometry.step + 5))
    epochs = draw(st.integers(1, 3))
    seed = draw(st.integers(0, 1000))
    drawn = torch.randint(1, 100, (rows,), generator=torch.Generator().manual_seed(seed))
    cost = draw(st.sampled_from(["padded", "unpadded_backbone", "unpadded"]))
    resumed = draw(st.integers(0, epochs * (rows // geometry.step)))
    return Case(geometry, tuple(drawn.tolist()), cost, epochs, resumed, seed)


@in_one_process
@pytest.mark.releases
@settings(deadline=None, max_examples=300)
@given(case=cases())
def test_each_step_has_the_pairs_that_it_has_without(openrlhf: SimpleNamespace, case: Case):
    """Several epochs that don't divide evenly, so that steps continue over the end of an epoch;
    also resumed after any step, including inside an epoch."""
    plain, balanced = micro_steps(case, balanced=False), micro_steps(case, balanced=True)
    for without, dealt in zip(
        optimizer_steps(case, plain), optimizer_steps(case, balanced), strict=True
    ):
        assert Counter(dealt) == Counter(without)
        paths = [
            critical_path(rows, case.tokens, case.geometry, case.cost) for rows in (dealt, without)
        ]
        assert case.cost != "padded" or paths[0] <= paths[1]


@in_one_process
@pytest.mark.releases
def test_resuming_goes_on_as_if_it_had_not_stopped(openrlhf: SimpleNamespace):
    """Each step has the same micro-batches on the same ranks; the first step after resuming begins
    with the largest. Seven micro-batches an epoch and two in a step: the fourth step has pairs of
    both epochs. 29 pairs aren't a whole number of steps, so OpenRLHF resumes at the right pairs
    only inside the first epoch."""
    lengths = torch.randint(1, 100, (29,), generator=torch.Generator().manual_seed(1)).tolist()
    case = Case(Geometry(2, 2, 2), tuple(lengths), epochs=2)
    whole = micro_steps(case, balanced=True)
    assert len(whole) == 14
    for step in (1, 2):
        rest = Case(case.geometry, case.tokens, epochs=2, resumed=step)
        goes_on = micro_steps(rest, balanced=True)
        assert sorted(goes_on[:2]) == sorted(whole[2 * step : 2 * step + 2])
        assert goes_on[2:] == whole[2 * step + 2 :]


@in_one_process
def test_worker_processes(openrlhf: SimpleNamespace):
    """The workers fetch batches ahead, and live on from epoch to epoch."""
    lengths = tuple(range(1, 30))
    alone, ahead = (
        Case(Geometry(2, 2, 2), lengths, epochs=2, resumed=1, workers=workers) for workers in (0, 2)
    )
    assert trained_rows(ahead, 1, balanced=True) == trained_rows(alone, 1, balanced=True)


def in_standard_errors(of_steps: torch.Tensor, of_all: torch.Tensor) -> float:
    """The mean distance of the steps' numbers ``(N,)`` from others."""
    apart = of_steps - of_all
    return (apart.mean() / apart.std() * len(apart) ** 0.5).item()


@in_one_process
@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("cost", ["padded", "unpadded_backbone", "unpadded"])
def test_what_is_logged_is_a_fair_sample(openrlhf: SimpleNamespace, each: int, cost: str):
    """OpenRLHF's ``loss_mean`` and ``acc_mean`` cover the first rank's pairs; its ``loss``, ``acc``
    and rewards cover the last micro-step of all ranks. The lengths of these pairs are on average
    those of all pairs of the steps; sorted by length they would not be."""
    geometry = Geometry(ranks=8, each=each, accumulation=4)
    drawn = torch.randn(geometry.step * 200, generator=torch.Generator().manual_seed(0))
    case = Case(geometry, tuple((200 * drawn.mul(0.6).exp()).int().tolist()), cost)
    ranks = [list(loader_of(case, rank, True, lambda: 0).sampler) for rank in range(8)]
    tokens = torch.tensor(case.tokens).double()
    lengths = tokens[torch.tensor(ranks)].view(8, 200, 4, each)  # by rank, step and micro-step
    of_all = lengths.mean((0, 2, 3))
    assert abs(in_standard_errors(lengths[0].mean((1, 2)), of_all)) < 4
    assert abs(in_standard_errors(lengths[:, :, -1].mean((0, 2)), of_all)) < 4
    by_length = lengths.transpose(0, 1).flatten(1).sort(1).values
    assert in_standard_errors(by_length[:, -8 * each :].mean(1), of_all) > 20


@in_one_process
@pytest.mark.releases
def test_loaders_that_are_not_understood(openrlhf: SimpleNamespace):
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler

    from focalpo_plugins.openrlhf import batches

    case = Case(Geometry(1, 2, 1), (1,) * 8)
    sampler = loader_of(case, 0, False, lambda: 0).sampler
    data = Numbers(8)
    grouped = DataLoader(data, batch_sampler=BatchSampler(sampler, 2, drop_last=True))
    for loader, kind in (
        (DataLoader(data, batch_size=2, sampler=RandomSampler(data)), "a sampler, got 'RandomSampler'"),
        (grouped, "a sampler, got 'SequentialSampler'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{BALANCED} can't be combined with {kind}: "):
            batches.check_loader(loader, BALANCED)
        assert batches.rows_of_batch(loader, 0) is None


# Lengths, from the data set's own tokenization.


class ThreadRanks:
    """Ranks as threads."""

    def __init__(self, rank: int, count: int, found: list, barrier: threading.Barrier) -> None:
        self.rank, self.count, self._found, self._barrier = rank, count, found, barrier

    def gather(self, thing: Any) -> list[Any]:
        self._found[self.rank] = thing
        self._barrier.wait()
        everything = list(self._found)
        self._barrier.wait()
        return everything


def on_ranks(count: int, do: Callable[[Any], Any]) -> list[Any]:
    """The result of ``do`` on each of so many ranks, or the error that it raises."""
    found, results, barrier = [None] * count, [None] * count, threading.Barrier(count)

    def run(rank: int) -> None:
        try:
            results[rank] = do(ThreadRanks(rank, count, found, barrier))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture(scope="module")
def pairs(openrlhf: SimpleNamespace, tiny: Path) -> Any:
    """OpenRLHF's data set of the first pairs, some of which are cut at 40 tokens."""
    return data_set(openrlhf, tiny, 29, max_len=40)


def data_set(openrlhf: SimpleNamespace, tiny: Path, rows: int, max_len: int) -> Any:
    from datasets import load_dataset
    from transformers import AutoTokenizer

    asked = {"prompt_key": None, "chosen_key": "chosen", "rejected_key": "rejected"}
    asked["apply_chat_template"] = True
    return openrlhf.RewardDataset(
        load_dataset("json", data_files=str(tiny / "train.jsonl"), split=f"train[:{rows}]"),
        AutoTokenizer.from_pretrained(tiny / "model"),
        max_len,
        SimpleNamespace(args=SimpleNamespace(data=SimpleNamespace(**asked), **asked)),
        is_dpo=True,
        num_processors=None,
    )


@in_one_process
@pytest.mark.releases
@pytest.mark.parametrize("cost, shared", [
    ("padded", False), ("unpadded_backbone", True), ("unpadded", False), ("unpadded", True),
])  # fmt: skip
def test_lengths_are_those_of_the_batch(pairs: Any, cost: str, shared: bool):
    """For each pair in its own batch, as OpenRLHF collates it: its longer sequence, its tokens, or
    the tokens of its row of shared prompts."""
    from focalpo_plugins.openrlhf import batches

    expected, cut = [], 0
    for row in range(len(pairs)):
        chosen, chosen_mask, rejected, rejected_mask, _ = pairs.collate_fn([pairs[row]])
        width = max(chosen.shape[-1], rejected.shape[-1])
        masks = [
            torch.nn.functional.pad(mask.flatten(), (0, width - mask.shape[-1]))
            for mask in (chosen_mask, rejected_mask)
        ]
        ids = [
            torch.nn.functional.pad(ids.flatten(), (0, width - ids.shape[-1]))
            for ids in (chosen, rejected)
        ]
        cut += width == 40
        if shared:
            expected.append(layout_of_batch(torch.stack(ids), torch.stack(masks)).tokens)
        else:
            lengths = [int(mask.sum()) for mask in masks]
            expected.append(max(lengths) if cost == "padded" else sum(lengths))
    assert len(set(expected)) > 5 and 0 < cut < len(pairs)
    assert batches.cost_of(packed=cost == "unpadded", shared=shared) == cost
    for count in (1, 3):
        found = on_ranks(count, lambda ranks: batches.read_tokens(pairs, cost, shared, ranks))
        assert found == [expected] * count


@in_one_process
def test_a_long_reading_is_said_once(pairs: Any, monkeypatch: Any, capsys: Any):
    from focalpo_plugins.openrlhf import batches

    monkeypatch.setattr(batches, "_LONG", 0.0)
    on_ranks(2, lambda ranks: batches.read_tokens(pairs, "padded", False, ranks))
    said = "focalpo_plugins: balanced batches: reading the lengths of 29 pairs took 0 s.\n"
    assert capsys.readouterr().err.count(said) == 1


@in_one_process
def test_a_row_that_one_rank_can_not_read_ends_all(pairs: Any):
    from focalpo_plugins.openrlhf import batches

    class Broken:
        def __len__(self) -> int:
            return 9

        def __getitem__(self, row: int) -> Any:
            return pairs[row if row != 4 else 10**9]

    errors = on_ranks(3, lambda ranks: batches.read_tokens(Broken(), "padded", False, ranks))
    assert all(str(error).startswith("on rank 1: IndexError") for error in errors), errors


@in_one_process
def test_computed_tokens():
    """Two pairs of 3 and 5 tokens against 4 and 2: four sequences of five places, or 14 tokens; the two
    ranks of a ring have half of them each."""
    from focalpo_plugins.openrlhf.batches import computed_tokens

    chosen = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    rejected = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    assert computed_tokens(chosen, rejected, packed=False, ranks=1) == 20
    assert computed_tokens(chosen, rejected, packed=True, ranks=1) == 14
    assert computed_tokens(chosen, rejected, packed=True, ranks=2) == 7


# Refusals.


def command_line(**given: Any) -> Namespace:
    from focalpo_plugins.openrlhf.names import FLAT

    values: dict[str, Any] = dict.fromkeys(FLAT)
    values |= {"model.beta": 0.1, "model.label_smoothing": 0.0, "model.ipo_enable": False}
    values |= {
        "model.aux_loss_coef": 0.0,
        "model.nll_loss_coef": 0.0,
        "centred.balanced_batches": True,
    }
    return Namespace(**values | given)


@in_one_process
@pytest.mark.releases
def test_a_loss_that_depends_on_its_batch(openrlhf: SimpleNamespace):
    from focalpo_plugins.openrlhf import refusals

    centred = PairwiseLoss("centred", lambda z: -torch.nn.functional.logsigmoid(z - z.mean()))
    by_pair = PairwiseLoss("centred", lambda z: -torch.nn.functional.logsigmoid(z))
    refusals.check(command_line(), by_pair.bind())
    refusals.check(command_line(**{"centred.balanced_batches": False}), centred.bind())
    with pytest.raises(ValueError, match="^--centred.balanced_batches can't be .* 'centred'"):
        refusals.check(command_line(), centred.bind())


ROPES = {
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, 64),
    "longrope": (
        {
            "rope_type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 32,
        },
        32,
    ),
}


@in_one_process
@pytest.mark.releases
@pytest.mark.parametrize("kind", ROPES)
def test_a_rope_that_depends_on_the_longest_sequence(openrlhf: SimpleNamespace, kind: str):
    """It is refused exactly if a sequence can be longer than the frequencies support: 64 tokens, or
    32 at first. A batch with a sequence of twice that length changes what the model computes for
    the other one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from focalpo_plugins.openrlhf import batches

    rope, longest = ROPES[kind]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    config = LlamaConfig(
        **sizes, num_attention_heads=2, max_position_embeddings=64,
        rope_parameters={"rope_theta": 10000.0, **rope},
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).double().eval()

    def last(*lengths: int) -> torch.Tensor:
        """The logits at the end of the first of several sequences, padded together."""
        width = max(lengths)
        mask = torch.arange(width) < torch.tensor(lengths)[:, None]
        ids = torch.arange(width).remainder(31).add(1).expand(len(lengths), -1) * mask
        places = (mask.long().cumsum(-1) - 1).masked_fill(~mask, 1)  # as OpenRLHF counts them
        with torch.no_grad():
            logits = model(ids, attention_mask=mask.long(), position_ids=places).logits
        return logits[0, lengths[0] - 1]

    alone = last(20)
    torch.testing.assert_close(last(20, longest), alone, rtol=0, atol=1e-9)
    batches.check_model(model, longest, BALANCED, "--data.max_len")
    assert (last(20, 2 * longest) - alone).abs().max() > 1e-5
    with pytest.raises(ValueError, match=f"^{BALANCED} can't be combined with --data.max_len, got"):
        batches.check_model(model, longest + 1, BALANCED, "--data.max_len")


def test_such_a_model_is_refused_before_training(train: Callable, tiny: Path, tmp_path: Path):
    shutil.copytree(tiny / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["max_position_embeddings"] = 127
    config["rope_parameters"] |= {"rope_type": "dynamic", "factor": 2.0}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    run = train(*OURS, BALANCED, "--model.model_name_or_path", str(tmp_path / "model"))
    assert run.returncode == 1 and not run.steps()
    (line,) = run.said(f"{BALANCED} can't be combined with --data.max_len, got 128: the RoPE of")
    assert line.endswith(f"Lower --data.max_len, or remove {BALANCED}.")


# Whole runs: two ranks under ZeRO-3, in float32, so that what they round differently is small.

TRAINED = 29  # seven micro-batches a rank and epoch, two in a step: seven steps in two epochs
STEPS, ACCUMULATED = 7, 2
PLACE = {"mode": "train", "batch": 9, "rank": 1, "row": 1, "side": 0, "value": "nan"}


@pytest.fixture(scope="module")
def runs(
    train: Callable, tiny: Path, another: Path, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """Plain and balanced; each is also resumed from its step 2, inside an epoch, the plain one with
    balanced batches and shared prompts, and with a NaN in its last step."""
    data = tmp_path_factory.mktemp("data") / "train.jsonl"
    lines = (tiny / "train.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join(lines[:TRAINED]))
    flags = {
        "--data.dataset": data, "--ref.model_name_or_path": another, "--model.beta": 1,
        "--ds.zero_stage": 3, "--train.max_epochs": 2, "--lr_scheduler": "constant",
        "--adam.lr": 1e-4, "--ckpt.save_steps": 2,
    }  # fmt: skip
    common = [str(word) for flag in flags.items() for word in flag]

    def run(*more: str, resume: Any = None, fault: str = "{}") -> Any:
        folder = tmp_path_factory.mktemp("run")
        (folder / "faults.json").write_text(fault)
        if resume is not None:
            shutil.copytree(
                resume.folder / "checkpoints" / "global_step2",
                folder / "checkpoints" / "global_step2",
            )
            (folder / "checkpoints" / "latest").write_text("global_step2")
            more = *more, "--ckpt.load_enable"
        first = ["float32_openrlhf", "watched_openrlhf"]
        return train(*OURS, *common, *more, ranks=2, folder=folder, first=first)

    plain, balanced = run(), run(BALANCED)
    return {
        "plain": plain,
        "balanced": balanced,
        "switched off": run(resume=balanced),
        "switched on": run(
            BALANCED, "--focalpo.shared_prompts", resume=plain, fault=json.dumps(PLACE)
        ),
    }


def batches_of(run: Any) -> list[list[list]]:
    """For each rank, the pairs and margins of each micro-batch."""
    return [[event[1:] for event in seen if event[0] == "train"] for seen in run.seen()]


def steps_of(run: Any) -> Iterator[list[tuple[str, float]]]:
    """The pairs of each optimizer step on all ranks, and their margins, by pair."""
    ranks = batches_of(run)
    for at in range(0, len(ranks[0]), ACCUMULATED):
        step = [batch for of_rank in ranks for batch in of_rank[at : at + ACCUMULATED]]
        yield sorted(row for pairs, margins in step for row in zip(pairs, margins, strict=True))


def loss_of(step: list[tuple[str, float]]) -> float:
    return focalpo_loss(torch.tensor([margin for _, margin in step])).mean().item()


@shares_runs
@pytest.mark.releases
@pytest.mark.parametrize("name, begin", [("balanced", 0), ("switched off", 2), ("switched on", 2)])
def test_whole_runs_train_the_same(runs: Any, name: str, begin: int):
    """Each step has the same pairs with the same margins and the same mean loss, but in different
    batches."""
    plain, found = list(steps_of(runs["plain"]))[begin:], list(steps_of(runs[name]))
    assert len(plain) == len(found) == STEPS - begin, runs[name].output
    if name == "switched on":
        plain, found = plain[:-1], found[:-1]  # the last one has the NaN
    losses = [loss_of(step) for step in plain]
    assert max(losses) - min(losses) > 0.05
    for without, dealt in zip(plain, found, strict=True):
        assert [pair for pair, _ in dealt] == [pair for pair, _ in without]
        assert [margin for _, margin in dealt] == pytest.approx(
            [margin for _, margin in without], abs=5e-5
        )
        assert loss_of(dealt) == pytest.approx(loss_of(without), abs=1e-5)
    alike = batches_of(runs[name])[0] == batches_of(runs["plain"])[0][begin * ACCUMULATED :]
    assert not alike


@shares_runs
@pytest.mark.releases
@pytest.mark.parametrize("name", ["balanced", "switched off"])
def test_gradient_norms_and_weights(runs: Any, name: str):
    from safetensors.torch import load_file

    assert runs[name].returncode == 0, runs[name].output
    plain, found = runs["plain"].steps("train/"), runs[name].steps("train/")
    assert sorted(found) == list(range(1 if name == "balanced" else 3, STEPS + 1))
    for step, values in found.items():
        for tag in ("grad_norm", "focalpo/p", "focalpo/margin_incorrect"):
            assert values[tag] == pytest.approx(plain[step][tag], rel=2e-5), (step, tag)
    ends = [load_file(runs[of].folder / "out" / "model.safetensors") for of in ("plain", name)]
    assert ends[0].keys() == ends[1].keys()
    for weight, value in ends[0].items():
        torch.testing.assert_close(ends[1][weight], value, rtol=0, atol=2e-5)


@shares_runs
@pytest.mark.releases
def test_what_is_said_and_logged(runs: Any):
    """The tokens of a step are the places of its batches: pairs padded to two sequences of the longest
    of their batch."""
    for name, run in runs.items():
        (line,) = run.said("focalpo_plugins: active")
        assert (" batches=balanced trainer=" in line) == (name in ("balanced", "switched on"))
        assert not run.said("reading the lengths")  # of so few pairs
    logged = runs["balanced"].steps("train/focalpo/")
    assert all("tokens_saved" not in values for values in logged.values())
    assert all(0 <= values["idle"] < 0.2 for values in logged.values())
    assert not {"tokens", "idle"} & runs["plain"].steps("train/focalpo/")[1].keys()


def digest(pair: Any) -> str:
    """A pair as ``watched_openrlhf`` records it."""
    sequences = [ids[mask.bool()].tolist() for ids, mask in (pair[:2], pair[2:4])]
    return hashlib.sha256(str(sequences).encode()).hexdigest()[:16]


@shares_runs
@pytest.mark.releases
def test_the_row_of_a_nan(openrlhf: SimpleNamespace, tiny: Path, runs: Any):
    """On the rank that holds it, by its row in OpenRLHF's data set."""
    run = runs["switched on"]
    assert run.returncode == 1
    pair = batches_of(run)[PLACE["rank"]][PLACE["batch"]][0][PLACE["row"]]
    data = data_set(openrlhf, tiny, TRAINED, max_len=128)
    (row,) = (row for row in range(TRAINED) if digest(data[row]) == pair)
    assert f"not finite, step 7: rank 1, row {row} of the data (nan, float32)" in run.stderr


@shares_runs
@pytest.mark.releases
def test_tokens(openrlhf: SimpleNamespace, tiny: Path, runs: Any):
    """The logged numbers of each step, from the lengths of the pairs seen in its batches: two
    sequences a pair, as long as the longest of the batch; and the share of these that a rank waits
    for the other."""
    data = data_set(openrlhf, tiny, TRAINED, max_len=128)
    longer = {
        digest(pair): max(pair[0].numel(), pair[2].numel())
        for pair in (data[i] for i in range(TRAINED))
    }
    ranks = batches_of(runs["balanced"])
    places = [
        [2 * len(pairs) * max(longer[pair] for pair in pairs) for pairs, _ in of_rank]
        for of_rank in ranks
    ]
    logged = runs["balanced"].steps("train/focalpo/")
    for step, values in logged.items():
        window = slice((step - 1) * ACCUMULATED, step * ACCUMULATED)
        computed = sum(sum(of_rank[window]) for of_rank in places)
        path = sum(
            2 * max(both) for both in zip(*(of_rank[window] for of_rank in places), strict=True)
        )
        assert values["tokens"] == computed
        assert values["idle"] == pytest.approx(1 - computed / path, abs=1e-6)
