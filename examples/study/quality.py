"""Which loss gives the better policy if the true reward is known?

A contextual bandit stands in for preference training: a prompt is a vector, an answer is one of 24
arms, and a policy's win rate against the reference and its KL to it are exact sums on each prompt.
DPO, FocalPO and others are trained on the same pairs over a grid of learning rates and betas, with
several shares of flipped labels, and compared by three protocols.

    python examples/study/quality.py --out outputs/quality

README.md in this folder has the results and their limits.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from focalpo_plugins.loss import focalpo_loss

INPUTS, HIDDEN, ARMS = 12, 64, 24
TRAIN_PAIRS, PROMPTS, BATCH = 2048, 1000, 64
NOISE = (0.0, 0.1, 0.2, 0.4)
BETAS = (0.03, 0.1, 0.3, 1.0, 3.0)
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
BUDGETS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0)  # nats of KL(policy || reference)
SHOWN_BUDGET = 0.5
METRICS = ("win_rate", "kl", "reward")
# Settings are chosen on the first set of prompts; all numbers in tables are for the second.
SETS = ("tuning", "reported")
PROTOCOLS = {
    "shared": "the base's settings",
    "own": "own settings",
    "equal_kl": f"KL of {SHOWN_BUDGET} at most",
}
KEY = ("noise", "loss", "protocol", "beta", "budget")  # of a row


@dataclass(frozen=True)
class Loss:
    """A loss on the margin ``z = beta * (log pi(w) - log pi(l) - offset)``.

    The offset is the reference's ``log ref(w) - log ref(l)``, as in DPO.  If ``target`` is given,
    it is the offset, as in SimPO, whose own gamma is then ``beta * target``.  An arm is an
    answer of length 1: SimPO's division by the length changes nothing here.
    """

    name: str
    variant: str = "correct"
    gamma: float = 0.0  # at the first step
    last_gamma: float | None = None  # at the last one, reached in a straight line
    target: float | None = None
    base: str = "DPO"  # what it is compared with, seed by seed

    def gamma_at(self, step: int, steps: int) -> float:
        """Gamma at a step, from 0 to ``steps - 1``."""
        if self.last_gamma is None:
            return self.gamma
        return self.gamma + (self.last_gamma - self.gamma) * step / max(1, steps - 1)


LOSSES = (
    Loss("DPO"),
    Loss("FocalPO 0.05", gamma=0.05),
    Loss("FocalPO 0.25", gamma=0.25),
    Loss("FocalPO 1", gamma=1.0),
    Loss("exact 0.05", "correct_exact", 0.05),
    Loss("incorrect 1", "incorrect", 1.0),
    Loss("FocalPO 0.25 to 0.05", gamma=0.25, last_gamma=0.05),
    Loss("FocalPO 0.05 to 0.25", gamma=0.05, last_gamma=0.25),
    # SimPO's authors start their search for gamma / beta at 0.5.
    Loss("SimPO", target=0.5),
    Loss("SimPO, FocalPO 0.05", gamma=0.05, target=0.5, base="SimPO"),
)


# ---- the bandit


def logits(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """(runs, N, ARMS) on the prompts (N, INPUTS), for all runs at once."""
    first, bias, second = weights
    return torch.tanh(torch.matmul(x, first) + bias) @ second


def beats(reward: Tensor, ref: Tensor) -> Tensor:
    """(..., ARMS): the probability that an arm beats one drawn from ``ref``; a tie counts half."""
    gap = reward[..., :, None] - reward[..., None, :]
    wins = (gap > 0).to(ref.dtype) + 0.5 * (gap == 0).to(ref.dtype)
    return (wins * ref[..., None, :]).sum(-1)


def measure(log_pi: Tensor, log_ref: Tensor, reward: Tensor, wins: Tensor) -> Tensor:
    """(..., 3): the METRICS of policies, each a sum over arms and a mean over prompts.

    Args:
        log_pi: log-probabilities of the policies, (..., N, ARMS).
        log_ref: the reference's, (N, ARMS).
        reward: true reward, (N, ARMS); the result has its mean less the reference's.
        wins: what :func:`beats` gives, (N, ARMS).
    """
    pi = log_pi.exp()
    each = (
        (pi * wins).sum(-1),
        (pi * (log_pi - log_ref)).sum(-1),
        ((pi - log_ref.exp()) * reward).sum(-1),
    )
    return torch.stack([values.mean(-1) for values in each], -1)


class World:
    """One seed: a true reward, a reference that knows half of it, pairs, and held-out prompts.

    The reference is a network of the policy's form, fitted to the softmax of half the true reward
    and half of another one: it prefers good arms, and is often wrong.
    """

    def __init__(self, seed: int, pairs: int = TRAIN_PAIRS, prompts: int = PROMPTS) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        truth, other = self.random_reward(), self.random_reward()
        self.reference = self.fit(lambda x: torch.softmax(0.5 * (truth(x) + other(x)), -1))
        self.x = self.normal(pairs, INPUTS)
        self.log_ref = torch.log_softmax(logits(self.reference, self.x)[0], -1)
        both = torch.multinomial(self.log_ref.exp(), 2, generator=self.draw)  # never the same arm
        rewards = truth(self.x).gather(1, both)
        self.better = torch.where(rewards[:, 0] > rewards[:, 1], both[:, 0], both[:, 1])
        self.worse = both.sum(1) - self.better
        # One draw for all shares of noise: more noise flips the same labels and further ones.
        self.luck = torch.rand(pairs, generator=self.draw)
        self.order = int(torch.randint(2**31, (), generator=self.draw))
        unit = truth(self.normal(4096, INPUTS)).std()
        self.held_out = {}
        for name in SETS:
            x = self.normal(prompts, INPUTS)
            log_ref, reward = torch.log_softmax(logits(self.reference, x)[0], -1), truth(x)
            self.held_out[name] = x, log_ref, reward / unit, beats(reward, log_ref.exp())

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.draw)

    def random_reward(self) -> Callable[[Tensor], Tensor]:
        first = self.normal(INPUTS, 48) * 1.5 / INPUTS**0.5
        second = self.normal(48, ARMS) * 2 / 48**0.5
        return lambda x: torch.tanh(x @ first) @ second

    def fit(self, target: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Weights (1, INPUTS, HIDDEN), (1, 1, HIDDEN) and (1, HIDDEN, ARMS)."""
        weights = [self.normal(1, INPUTS, HIDDEN) / INPUTS**0.5]
        weights += [torch.zeros(1, 1, HIDDEN), torch.zeros(1, HIDDEN, ARMS)]
        weights = [weight.requires_grad_() for weight in weights]
        adam = torch.optim.Adam(weights, lr=1e-2)
        for _ in range(300):
            x = self.normal(256, INPUTS)
            log_pi = torch.log_softmax(logits(weights, x)[0], -1)
            loss = -(target(x) * log_pi).sum(-1).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
        return [weight.detach() for weight in weights]

    def labelled(self, noise: float) -> tuple[Tensor, Tensor]:
        """Chosen and rejected arms, (pairs,), with that share of the labels flipped."""
        chosen = torch.where(self.luck < noise, self.worse, self.better)
        return chosen, self.worse + self.better - chosen


# ---- training: one seed and one share of noise; all losses, betas and learning rates at once


def train(
    world: World,
    noise: float,
    losses: Sequence[Loss] = LOSSES,
    betas: Sequence[float] = BETAS,
    rates: Sequence[float] = RATES,
    epochs: int = 10,
) -> list[Tensor]:
    """Weights of ``len(losses) * len(betas) * len(rates)`` runs, in that order.

    Adam, a warm-up over a tenth of the steps and a cosine to 0; every run sees the same batches.
    """
    chosen, rejected = world.labelled(noise)
    rows = torch.arange(len(chosen))
    ref = world.log_ref[rows, chosen] - world.log_ref[rows, rejected]
    # The softmax's normaliser cancels: +1 and -1 on the logits give the policy's difference.
    signs = torch.zeros(len(chosen), ARMS)
    signs[rows, chosen], signs[rows, rejected] = 1.0, -1.0

    grid = torch.cartesian_prod(torch.tensor(betas), torch.tensor(rates))
    beta, rate = grid[:, :1], grid[:, 1].repeat(len(losses)).view(-1, 1, 1)
    weights = [
        part.expand(len(rate), *part.shape[1:]).clone().requires_grad_() for part in world.reference
    ]
    moments = [(torch.zeros_like(part), torch.zeros_like(part)) for part in weights]
    batches = len(chosen) // BATCH
    steps, step = epochs * batches, 0
    warm_up = max(1, steps // 10)
    order = torch.Generator().manual_seed(world.order)
    for _ in range(epochs):
        for batch in torch.randperm(len(chosen), generator=order).split(BATCH)[:batches]:
            policy = (logits(weights, world.x[batch]) * signs[batch]).sum(-1)
            total = torch.zeros(())
            for loss, part in zip(losses, policy.split(len(grid)), strict=True):
                z = beta * (part - (ref[batch] if loss.target is None else loss.target))
                gamma = loss.gamma_at(step, steps)
                total = total + focalpo_loss(z, gamma, loss.variant).mean(-1).sum()
            gradients = torch.autograd.grad(total, weights)
            step += 1
            share = min(step / warm_up, 1.0)
            share *= 0.5 + 0.5 * math.cos(math.pi * max(0, step - warm_up) / (steps - warm_up + 1))
            adam_step(weights, gradients, moments, rate * share, step)
    return [weight.detach() for weight in weights]


@torch.no_grad()
def adam_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    moments: Sequence[tuple[Tensor, Tensor]],
    rate: Tensor,
    step: int,
) -> None:
    """Adam with its usual constants and a rate for each run, (runs, 1, 1); ``step`` from 1."""
    for weight, gradient, (first, second) in zip(weights, gradients, moments, strict=True):
        first.lerp_(gradient, 0.1)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        scale = (second / (1 - 0.999**step)).sqrt_().add_(1e-8)
        weight.sub_(rate * (first / (1 - 0.9**step)) / scale)


def run_seed(
    seed: int,
    noises: Sequence[float] = NOISE,
    losses: Sequence[Loss] = LOSSES,
    betas: Sequence[float] = BETAS,
    rates: Sequence[float] = RATES,
    epochs: int = 10,
    pairs: int = TRAIN_PAIRS,
    prompts: int = PROMPTS,
) -> np.ndarray:
    """(noises, losses, betas, rates, SETS, METRICS) of one seed."""
    torch.set_num_threads(1)
    world = World(seed, pairs, prompts)
    shape = (len(losses), len(betas), len(rates), len(METRICS))
    found = []
    for noise in noises:
        weights = train(world, noise, losses, betas, rates, epochs)
        of_sets = [
            measure(torch.log_softmax(logits(weights, x), -1), *known).view(shape)
            for x, *known in world.held_out.values()
        ]
        found.append(torch.stack(of_sets, -2).double().numpy())
    return np.stack(found)


def end_with_parent() -> None:
    """For a worker: a pool's workers would outlive a killed parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def run_all(
    seeds: Sequence[int], jobs: int, say: Callable[[str], None], **settings: Any
) -> np.ndarray:
    """(seeds, noises, losses, betas, rates, SETS, METRICS), one process for each of ``jobs``."""
    clock, done = time.perf_counter(), {}
    # A process that is forked off one with torch's threads can hang.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=end_with_parent) as pool:
        asked = {pool.submit(run_seed, seed, **settings): seed for seed in seeds}
        for future in as_completed(asked):
            found = done[asked[future]] = future.result()
            if not np.isfinite(found).all():
                pool.shutdown(cancel_futures=True)
                raise SystemExit(
                    f"quality: error: the numbers of seed {asked[future]} are not finite; give "
                    "smaller --rates."
                )
            say(f"{len(done)} of {len(seeds)} seeds, {time.perf_counter() - clock:.0f} s")
    return np.stack([done[seed] for seed in seeds])


# ---- the three protocols: runs (seeds, settings, SETS, METRICS) in, (seeds, METRICS) out


def other_half(tuning: np.ndarray, seed: int) -> np.ndarray:
    """Means of ``tuning`` (seeds, settings) over the half that ``seed`` is not in, (settings,)."""
    return tuning[np.arange(len(tuning)) % 2 != seed % 2].mean(0)


def choose(runs: np.ndarray) -> np.ndarray:
    """Each seed's settings, (seeds,): the best win rate of the other half on the tuning prompts."""
    return np.array([other_half(runs[:, :, 0, 0], seed).argmax() for seed in range(len(runs))])


def at_settings(runs: np.ndarray, settings: np.ndarray) -> np.ndarray:
    """On the reported prompts, each seed at its settings."""
    return runs[np.arange(len(runs)), settings, 1]


def mixture(win: np.ndarray, kl: np.ndarray, budget: float) -> np.ndarray:
    """Weights (settings,) of the best win rate whose KL is at most ``budget``.

    At most two of the settings and the reference (KL 0, win rate 1/2) share the prompts: one
    answers some of them and the other the rest, so win rate and KL are the weighted means.
    """
    win, kl = np.append(win, 0.5), np.append(kl, 0.0)
    inside = kl <= budget
    crosses = inside[:, None] & ~inside
    width = np.where(crosses, kl - kl[:, None], 1.0)
    reach = np.where(crosses, (budget - kl[:, None]) / width, 0.0)
    value = np.where(inside[:, None], win[:, None] + reach * (win - win[:, None]), -np.inf)
    first, second = np.unravel_index(value.argmax(), value.shape)
    weights = np.zeros(len(win))
    weights[first] += 1 - reach[first, second]
    weights[second] += reach[first, second]
    return weights[:-1]


def at_budget(runs: np.ndarray, budget: float) -> np.ndarray:
    """On the reported prompts, with the mixture for ``budget`` on the tuning prompts.

    The win rates that choose it are of the other half of the seeds.  The KL is the seed's own: it
    takes no label to measure, and a difference of 0.01 nats would be worth 0.2 points.
    """
    found = []
    for seed, run in enumerate(runs):
        weights = mixture(other_half(runs[:, :, 0, 0], seed), run[:, 0, 1], budget)
        values = weights @ run[:, 1]
        values[0] += 0.5 * (1 - weights.sum())  # the reference's own share
        found.append(values)
    return np.array(found)


def half_width(values: np.ndarray) -> float:
    """Half of the 95 % interval of the mean of ``values`` (n,), n at least 4, by Student's t.

    The quantile is Fisher's expansion in 1 / (n - 1); it is off by less than 1 % from n = 4 on.
    """
    n, z = len(values) - 1, NormalDist().inv_cdf(0.975)
    t = z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    return t * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def summarise(
    runs: np.ndarray,
    noises: Sequence[float] = NOISE,
    losses: Sequence[Loss] = LOSSES,
    betas: Sequence[float] = BETAS,
    rates: Sequence[float] = RATES,
) -> list[dict[str, Any]]:
    """The rows of all tables: one for a share of noise, a protocol and a loss.

    Args:
        runs: what :func:`run_all` gives.

    Returns:
        Rows with ``win_rate`` in per cent and ``kl`` in nats on the reported prompts, and with
        ``difference``, the win rate less the base's in points; ``..._95`` is half of the 95 %
        interval over the seeds.  ``beta`` is None if beta is chosen with the learning rate.
    """
    rows: list[dict[str, Any]] = []
    for n, noise in enumerate(noises):
        for beta in (None, *betas):
            at = slice(None) if beta is None else slice(betas.index(beta), betas.index(beta) + 1)
            # (seeds, settings, SETS, METRICS); of one beta or of all
            of = {
                loss.name: runs[:, n, k, at].reshape(len(runs), -1, *runs.shape[-2:])
                for k, loss in enumerate(losses)
            }
            own = {name: choose(part) for name, part in of.items()}
            shared = {loss.name: own[loss.base] for loss in losses}
            grid = betas if beta is None else (beta,)
            key = {"noise": noise, "beta": beta, "budget": None}
            for protocol, settings in (("shared", shared), ("own", own)):
                values = {name: at_settings(of[name], settings[name]) for name in of}
                for row in compared(losses, values):
                    words = described(settings[row["loss"]], grid, rates)
                    rows.append({**key, "protocol": protocol, **row, "settings": words})
            for budget in BUDGETS if beta is None else ():
                values = {name: at_budget(part, budget) for name, part in of.items()}
                key["budget"] = budget
                rows += [{**key, "protocol": "equal_kl", **row} for row in compared(losses, values)]
    return rows


def compared(losses: Sequence[Loss], values: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """A row for each loss, whose (seeds, METRICS) are set against its base's seed by seed."""
    rows = []
    for loss in losses:
        win, kl, reward = values[loss.name].T
        gap = 100 * (win - values[loss.base][:, 0])
        row: dict[str, Any] = {"loss": loss.name, "base": loss.base}
        row |= {"win_rate": 100 * win.mean(), "win_rate_95": half_width(100 * win)}
        row |= {"kl": kl.mean(), "reward": reward.mean()}
        row |= {"difference": gap.mean(), "difference_95": half_width(gap)}
        rows.append(row)
    return rows


def described(settings: np.ndarray, betas: Sequence[float], rates: Sequence[float]) -> str:
    """``rate at beta`` of both halves of the seeds; * marks a value at the end of its grid."""
    words = []
    for setting in dict.fromkeys(settings.tolist()):
        places = ((rates, setting % len(rates)), (betas, setting // len(rates)))
        parts = [
            f"{grid[at]:g}" + "*" * (len(grid) > 1 and at in (0, len(grid) - 1))
            for grid, at in places
        ]
        words.append(" at ".join(parts))
    return " / ".join(words)


# ---- the output


def cell(row: dict[str, Any]) -> str:
    """A base's win rate; for other losses the difference from their base's."""
    if row["loss"] == row["base"]:
        return f"{row['win_rate']:.2f} ± {row['win_rate_95']:.2f} %"
    return f"{round(row['difference'], 2) + 0.0:+.2f} ± {row['difference_95']:.2f}"


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: the three protocols and the settings by share of noise, then each beta's own."""
    by = {tuple(row[key] for key in KEY): row for row in rows}
    noises, names, betas = (
        [value for value in dict.fromkeys(row[key] for row in rows) if value is not None]
        for key in ("noise", "loss", "beta")
    )
    lines: list[str] = []

    def table(title: str, columns: Sequence[str], body: Sequence[Sequence[str]]) -> None:
        lines.extend([f"{title}\n", f"| loss | {' | '.join(columns)} |"])
        lines.append("| --- |" + " --- |" * len(columns))
        lines.extend(f"| {' | '.join(cells)} |" for cells in body)
        lines.append("")

    flipped = [f"{noise:.0%} flipped" for noise in noises]
    for protocol, title in PROTOCOLS.items():
        budget = SHOWN_BUDGET if protocol == "equal_kl" else None
        of = [[by[noise, name, protocol, None, budget] for noise in noises] for name in names]
        # All have the same KL in the last.
        texts = [
            [cell(row) + f", {row['kl']:.2f}" * (budget is None) for row in line] for line in of
        ]
        body = [[name, *cells] for name, cells in zip(names, texts, strict=True)]
        table(f"{title}: win rate{', and KL' * (budget is None)}", flipped, body)
    own = [[by[noise, name, "own", None, None]["settings"] for noise in noises] for name in names]
    body = [[name, *cells] for name, cells in zip(names, own, strict=True)]
    table("own settings: learning rate at beta", flipped, body)
    for noise, title in zip(noises, flipped, strict=True):
        of = [[by[noise, name, "shared", beta, None] for beta in betas] for name in names]
        body = [[name, *map(cell, line)] for name, line in zip(names, of, strict=True)]
        body.append([f"KL of {names[0]}", *(f"{row['kl']:.2f}" for row in of[0])])
        columns = [f"beta {beta:g}" for beta in betas]
        table(f"{title}, the base's learning rate at each beta: win rate", columns, body)
    return "\n".join(lines)


def pyplot() -> Any:
    """matplotlib's pyplot, drawing into files."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("error: the picture needs matplotlib: pip install matplotlib.")
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def draw(rows: Sequence[dict[str, Any]], title: str) -> Any:
    """By share of noise: the differences by protocol, those by beta, and win rate against KL."""
    plt = pyplot()
    noises, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("noise", "loss"))
    colours = dict(zip(names, plt.get_cmap("tab10").colors, strict=False))
    looks = {"shared": ("#D55E00", "o"), "own": ("#0072B2", "s"), "equal_kl": ("#009E73", "^")}
    figure, axes = plt.subplots(
        3, len(noises), figsize=(3.3 * len(noises) + 2.5, 12), sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for noise, (upper, middle, lower) in zip(noises, axes.T, strict=True):
        here = [row for row in rows if row["noise"] == noise]
        for place, (protocol, (colour, marker)) in enumerate(looks.items()):
            of = [r for r in here if r["protocol"] == protocol and r["beta"] is None]
            of = [r for r in of if r["budget"] in (None, SHOWN_BUDGET) and r["loss"] != r["base"]]
            upper.errorbar(
                [row["difference"] for row in of],
                [names.index(row["loss"]) + (place - 1) * 0.22 for row in of],
                xerr=[row["difference_95"] for row in of],
                color=colour, marker=marker, markersize=5, linestyle="", label=PROTOCOLS[protocol],
            )  # fmt: skip
        for name in names:
            of = [row for row in here if row["loss"] == name]
            by_beta = [r for r in of if r["protocol"] == "shared" and r["beta"] is not None]
            if by_beta[0]["base"] != name:
                middle.errorbar(
                    [row["beta"] for row in by_beta],
                    [row["difference"] for row in by_beta],
                    yerr=[row["difference_95"] for row in by_beta],
                    color=colours[name], marker="o", markersize=4, linewidth=1.2,
                )  # fmt: skip
            line = [row for row in of if row["protocol"] == "equal_kl"]
            x, y = [0.0, *(row["kl"] for row in line)], [50.0, *(row["win_rate"] for row in line)]
            lower.plot(x, y, color=colours[name], linewidth=1.2)
            (point,) = (r for r in of if r["protocol"] == "shared" and r["beta"] is None)
            lower.plot(point["kl"], point["win_rate"], "o", color=colours[name], label=name)
        upper.set_title(f"{noise:.0%} of the labels flipped")
        upper.set_xscale("symlog", linthresh=1)
        upper.xaxis.set_major_formatter("{x:g}")
        upper.set_xlabel("win rate less the base's (points)")
        upper.axvline(0, color="#888888", linewidth=1)
        middle.set_xscale("log")
        middle.set_yscale("symlog", linthresh=1)
        middle.xaxis.set_major_formatter("{x:g}")
        middle.yaxis.set_major_formatter("{x:g}")
        middle.set_xlabel("beta, with the base's learning rate there")
        middle.axhline(0, color="#888888", linewidth=1)
        lower.set_xlabel("KL to the reference (nats)")
    axes[0, 0].set_yticks(range(1, len(names)), names[1:])
    axes[0, 0].set_ylim(len(names) - 0.5, 0.5)
    axes[1, 0].set_ylabel("win rate less the base's (points)")
    axes[2, 0].set_ylabel("win rate against the reference (%)")
    for axis in axes.flat:
        axis.grid(color="#dddddd")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "frameon": False, "fontsize": 8}
    axes[0, -1].legend(**beside, title="95 % over seeds")
    axes[2, -1].legend(**beside, title="points: the base's settings\nlines: the best at each KL")
    figure.supxlabel(title, fontsize=9)
    return figure


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=32, metavar="N", help="4 at least")
    parser.add_argument("--noise", type=float, nargs="+", default=NOISE, metavar="SHARE",
                        help="of the labels flipped")  # fmt: skip
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--betas", type=float, nargs="+", default=BETAS, metavar="BETA")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, metavar="RATE")
    parser.add_argument("--pairs", type=int, default=TRAIN_PAIRS, help="to train on")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="of each held-out set")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0))
                        if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
                        help="processes (default: the cores)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("outputs/quality"))
    args = parser.parse_args(argv)
    for name, least in (("seeds", 4), ("epochs", 1), ("pairs", BATCH), ("prompts", 1), ("jobs", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}.")
    for share in args.noise:
        if not 0 <= share < 0.5:
            parser.error(f"--noise must be at least 0 and below 0.5, got {share:g}.")
    for name in ("betas", "rates"):
        for value in getattr(args, name):
            if not 0 < value < math.inf:
                parser.error(f"--{name} must be above 0, got {value:g}.")
    for name in ("noise", "betas", "rates"):
        values = getattr(args, name)
        if len({*values}) < len(values):
            shown = " ".join(f"{value:g}" for value in values)
            parser.error(f"--{name} must be different numbers, got {shown}.")
    check_out(parser, args.out)
    return args


def check_out(parser: argparse.ArgumentParser, out: Path) -> None:
    """Refuse a folder that can't be created, before hours of work."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out must be a folder, got {out}: {error}.")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    pyplot()
    clock = time.perf_counter()
    grid = {"noises": list(args.noise), "betas": list(args.betas), "rates": list(args.rates)}
    size = {"epochs": args.epochs, "pairs": args.pairs, "prompts": args.prompts}
    runs = run_all(range(args.seeds), args.jobs, print, **grid, **size)
    rows = summarise(runs, **grid)
    text = tables(rows)
    (args.out / "tables.md").write_text(text, encoding="utf-8")
    content = {"grid": grid, **size, "losses": [vars(loss) for loss in LOSSES]}
    content |= {"axes": ["seed", "noise", "loss", "beta", "rate", "set", "metric"]}
    content |= {"sets": SETS, "metrics": METRICS, "rows": rows, "runs": np.round(runs, 6).tolist()}
    (args.out / "quality.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
    title = f"{args.seeds} seeds, {args.pairs} pairs, {args.epochs} epochs; 95 % over seeds"
    draw(rows, title).savefig(args.out / "quality.png", dpi=150, bbox_inches="tight")
    print(text)
    names = ", ".join(str(args.out / name) for name in ("quality.png", "tables.md", "quality.json"))
    print(f"wrote {names} after {time.perf_counter() - clock:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
