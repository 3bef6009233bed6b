"""The picture of whole steps in the hosts, from the table of docs/speed.md; `nox -s numbers` writes
it.

It is written as text, so that it needs no drawing package and is small. It has a background of its
own, which stays light on a dark page, and letters that can be read on a phone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

FILE = Path(__file__).with_name("pictures") / "steps.svg"
# What is drawn of each host, as the table names it, with its name in the picture and its colour.
# Blue and orange differ without colour vision, and are light and dark in grey.
BARS = {"balanced": ("balanced batches", "#0072B2"), "both": ("with shared prompts too", "#E69F00")}
TITLE = "CPU time of a whole training step"
BELOW = "as a share of the same step without the switches"
NOTE = "pairs of real instructions; thin lines: 95 % intervals"

WIDTH, LEFT, SCALE = 440, 126, 258  # a ratio of 1 is SCALE wide
TOP, BAR, HOST = 92, 15, 44  # the first bar's place, a bar's height, and a host's


@dataclass
class Steps:
    """A host's row: the ratios with the two ends of their intervals."""

    host: str
    ranks: str
    ways: dict[str, tuple[float, float, float]] = field(default_factory=dict)


def of_table(rows: Sequence[Sequence[str]]) -> list[Steps]:
    """The hosts' whole steps, from the cells of the table that begins with them."""
    found = []
    for host, run, balanced, _, both in rows:
        steps = Steps(host, run.partition(",")[0])
        for way, cell in (("balanced", balanced), ("both", both)):
            ratio, low, high = map(float, re.findall(r"\d\.\d+", cell)[:3])
            steps.ways[way] = (ratio, low, high)
        found.append(steps)
    return found


def ends(hosts: Sequence[Steps], way: str) -> str:
    """The least and the greatest ratio of a way over the hosts."""
    found = sorted(of.ways[way][0] for of in hosts)
    return f"{found[0]:.2f} to {found[-1]:.2f}"


def described(hosts: Sequence[Steps]) -> str:
    """The picture in words."""
    return (
        f"CPU time of whole training steps in {', '.join(of.host for of in hosts[:-1])} and "
        f"{hosts[-1].host}, as shares of the same steps without the switches: "
        f"{ends(hosts, 'balanced')} with balanced batches, {ends(hosts, 'both')} with shared "
        "prompts too"
    )


def drawn(hosts: Sequence[Steps]) -> str:
    height = TOP + HOST * len(hosts) + 44
    lines = [*head(hosts, height), *axis(height)]
    for at, of in enumerate(hosts):
        lines += host(of, TOP + HOST * at)
    return "\n".join([*lines, text(14, height - 12, NOTE, 13, "#57606a"), "</svg>", ""])


def text(x: float, y: float, words: str, size: int = 14, colour: str = "#1f2328") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, colour: str) -> str:
    sides = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'<rect {sides} fill="{colour}"/>'


def line(x1: float, y1: float, x2: float, y2: float, *, dashes: str = "none") -> str:
    ends = f'x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"'
    return f'<line {ends} stroke="#1f2328" stroke-dasharray="{dashes}"/>'


def head(hosts: Sequence[Steps], height: int) -> Iterator[str]:
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" role="img" '
        'aria-labelledby="title described">'
    )
    yield f'<title id="title">{TITLE}</title>'
    yield f'<desc id="described">{escape(described(hosts))}</desc>'
    yield (
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="6" fill="#ffffff" '
        'stroke="#d0d7de"/>'
    )
    yield text(14, 25, TITLE, 17)
    yield text(14, 44, BELOW, 13, "#57606a")
    for place, (name, colour) in enumerate(BARS.values()):
        yield box(14 + 160 * place, 57, 12, 12, colour)
        yield text(31 + 160 * place, 68, name)


def axis(height: int) -> Iterator[str]:
    """The step without the switches is the dashed line."""
    x = LEFT + SCALE
    yield line(LEFT, TOP - 6, LEFT, height - 40)
    yield line(x, TOP - 6, x, height - 40, dashes="5 3")
    yield text(x - 8, TOP - 12, "1.00")


def host(of: Steps, y: int) -> Iterator[str]:
    yield text(14, y + 13, of.host)
    yield text(14, y + 29, of.ranks, 13, "#57606a")
    for place, (way, (_, colour)) in enumerate(BARS.items()):
        ratio, low, high = (LEFT + SCALE * value for value in of.ways[way])
        top = y + (BAR + 1) * place
        yield box(LEFT, top, ratio - LEFT, BAR, colour)
        yield line(low, top + BAR / 2, high, top + BAR / 2)
        yield text(high + 6, top + 12, f"{of.ways[way][0]:.2f}")
