"""The replaced log-sigmoid belongs to one trainer, while its loss method runs."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_trl import batch, loss_and_grads, trainer
from trl import DPOTrainer
from trl.trainer import dpo_trainer

from focalpo_plugins import FocalPOTrainer

pytestmark = pytest.mark.releases


class Slow:
    """A loss that waits inside TRL's loss method until it is released."""

    def __init__(self, loss) -> None:
        self.loss, self.name = loss, loss.name
        self.inside, self.go = threading.Event(), threading.Event()
        self.weight, self.source = loss.weight, loss.source

    def __call__(self, *args):
        self.inside.set()
        assert self.go.wait(60)
        return self.loss(*args)

    def at(self, progress):
        return self

    def moving(self):
        return {}


def test_a_plain_trainer_in_another_thread(tokenizer, tmp_path):
    """The other trainer keeps its own loss while ours is in place, and afterwards."""
    ours = trainer(FocalPOTrainer, tokenizer, tmp_path, focalpo_gamma=0.5)
    plain = trainer(DPOTrainer, tokenizer, tmp_path)
    inputs = batch(ours)
    alone = [loss_and_grads(host, inputs)[0].item() for host in (ours, plain)]
    ours._run.asked = slow = Slow(ours.pairwise_loss)
    with ThreadPoolExecutor() as threads:
        running = threads.submit(loss_and_grads, ours, inputs)
        assert slow.inside.wait(60)
        assert loss_and_grads(plain, inputs)[0].item() == alone[1]
        slow.go.set()
        assert running.result()[0].item() == alone[0]
    assert dpo_trainer.F is torch.nn.functional
    assert loss_and_grads(plain, inputs)[0].item() == alone[1] != alone[0]


def test_two_of_ours_in_two_threads(tokenizer, tmp_path):
    """One trainer is inside at a time, each trains its own loss, and afterwards the name is torch's
    again."""
    hosts = [
        trainer(FocalPOTrainer, tokenizer, tmp_path, focalpo_gamma=gamma) for gamma in (0.1, 1.0)
    ]
    inputs = batch(hosts[0])
    alone = [loss_and_grads(host, inputs)[0].item() for host in hosts]
    for host in hosts:
        host._run.asked = Slow(host.pairwise_loss)
    first, second = (host.pairwise_loss for host in hosts)
    with ThreadPoolExecutor() as threads:
        running = [threads.submit(loss_and_grads, hosts[0], inputs)]
        assert first.inside.wait(60)
        running.append(threads.submit(loss_and_grads, hosts[1], inputs))
        assert not second.inside.wait(0.5)
        first.go.set()
        second.go.set()
        assert [each.result()[0].item() for each in running] == alone
    assert dpo_trainer.F is torch.nn.functional


def test_many_threads(tokenizer, tmp_path):
    """The losses of three trainers, computed repeatedly in three threads at once."""
    hosts = [trainer(FocalPOTrainer, tokenizer, tmp_path, focalpo_gamma=g) for g in (0.1, 1.0)]
    hosts.append(trainer(DPOTrainer, tokenizer, tmp_path))
    inputs = batch(hosts[0])
    alone = [loss_and_grads(host, inputs)[0].item() for host in hosts]

    def losses(host):
        return {loss_and_grads(host, inputs)[0].item() for _ in range(20)}

    with ThreadPoolExecutor() as threads:
        assert list(threads.map(losses, hosts)) == [{loss} for loss in alone]


def test_a_name_that_another_package_has_exchanged(tokenizer, tmp_path, monkeypatch):
    """Refused, and left unchanged."""
    host = trainer(FocalPOTrainer, tokenizer, tmp_path)
    inputs = batch(host)
    other = type("Other", (), {"logsigmoid": torch.nn.functional.logsigmoid})()
    monkeypatch.setattr(dpo_trainer, "F", other)
    with pytest.raises(
        RuntimeError, match=r"^trl\..*\.F must be torch.nn.functional, got <.*Other"
    ):
        host.compute_loss(host.model, inputs)
    assert dpo_trainer.F is other
