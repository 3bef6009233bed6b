"""Write into the pages what the code can make: `nox -s numbers`, or with `-- --check` only compare.

It also draws the picture of whole steps, from the table that docs/speed.md has of them.

A page marks such a number or table with two comments, which no reader of the page sees::

    The first loss is <!--= first_loss 0.05 -->0.6695<!-- end -->.

The first comment names a function of ``WRITERS`` below and its arguments.  The session replaces
what stands between the comments by what the function returns.  A comment at the start of a line
would end the paragraph on the site; so a number's never is, and a table's is a line of its own.
"""

from __future__ import annotations

import ast
import math
import re
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import picture_of_steps
import torch

import focalpo_plugins
from focalpo_plugins import diagnostics, focalpo_loss, focalpo_weight, reversal_margin
from focalpo_plugins.axolotl import MARGINS
from focalpo_plugins.axolotl.keys import KEYS as AXOLOTL
from focalpo_plugins.llamafactory.arguments import KEYS as LLAMA_FACTORY
from focalpo_plugins.openrlhf import flags
from focalpo_plugins.registry import get_loss
from focalpo_plugins.swift.keys import KEYS as SWIFT
from focalpo_plugins.yaml_keys import Keys

ROOT = Path(__file__).resolve().parents[1]
NOXFILE = ast.parse((ROOT / "noxfile.py").read_text())
MARKED = re.compile(r"(<!--= (.*?) -->)(.*?)(<!-- end -->)", re.S)
GAMMA = get_loss("focalpo").options["gamma"]
# The hosts whose keys are in a YAML.
OF_YAMLS: dict[str, Keys] = {"axolotl": AXOLOTL, "llamafactory": LLAMA_FACTORY, "swift": SWIFT}
# Of options that aren't off by default, nor among a loss's own.
OTHER_DEFAULTS = {"margin": "dpo", "precompute_dir": "output_dir"}
# The sections that explain an option.
SECTIONS = {
    "gamma": "loss.md#gamma",
    "gamma_end": "loss.md#a-gamma-that-moves",
    "gamma_schedule": "loss.md#a-gamma-that-moves",
    "variant": "loss.md#variants",
    "margin": "loss.md#other-margins",
    "fused": "loss.md#fused-loss",
    "shared_prompts": "loss.md#shared-prompts",
    "balanced_batches": "loss.md#balanced-batches",
    "precompute_ref": "loss.md#precomputed-reference",
    "precompute_dir": "loss.md#precomputed-reference",
    "allow_reversed": "loss.md#gamma",
    "allow_changed": "stopped.md#resume-a-run",
    "allow_data": "refused.md#data",
    "loss": "another-loss.md",
}


def pages() -> list[Path]:
    folders = (ROOT.glob("*.md"), (ROOT / "docs").glob("*.md"), (ROOT / "examples").rglob("*.md"))
    return sorted(path for found in folders for path in found)


def plain(number: float, digits: int = 2) -> str:
    """Without zeros at its end, nor a sign before 0: ``0.58``, ``1``, ``-20``."""
    return f"{round(number, digits) + 0.0:.{digits}f}".rstrip("0").rstrip(".")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines)


def cells(text: str, head: str) -> list[list[str]]:
    """The cells below the first table of the text whose first line begins with ``head``."""
    lines = text[text.index(f"\n| {head} |") :].splitlines()[3:] + [""]
    rows = lines[: next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


# The loss.


def first_loss(gamma: str, variant: str = "correct") -> str:
    return f"{focalpo_loss(torch.zeros(1), float(gamma), variant).item():.4f}"


def weight(margin: str) -> str:
    """Share of DPO's gradient at gamma's default."""
    return plain(focalpo_weight(torch.tensor([float(margin)]).double(), GAMMA).item())


def reversal(gamma: str) -> str:
    return plain(reversal_margin(float(gamma)))


def peak(gamma: str) -> str:
    """The margin of the largest push: DPO's gradient ``1 - p`` times the weight, to 0.01."""
    margins = torch.arange(-30, 10, 0.01, dtype=torch.float64)
    push = (1 - margins.sigmoid()) * focalpo_weight(margins, float(gamma))
    return plain(margins[push.argmax()].item())


# Options and what is logged.


def option(name: str, spelled: str, default: str, text: str) -> list[str]:
    shown = {"None": "none", "False": "off"}.get(default, default)
    named = f"[`{spelled}`]({SECTIONS[name]})" if name in SECTIONS else f"`{spelled}`"
    return [named, f"`{shown}`" if default.isidentifier() and shown == default else shown, text]


def keys(host: str) -> str:
    """The table of a host's YAML keys: those of the loss, and those that every loss has there."""
    defaults = {**get_loss("focalpo").options, **OTHER_DEFAULTS}
    if host != "axolotl":
        defaults["gamma"] = "none, mandatory"
    rows = []
    for spelled, key in OF_YAMLS[host].all().items():
        name = spelled.removeprefix("focalpo_")
        rows.append(option(name, spelled, str(defaults.get(name, False)), key.help))
    return table(("key", "default", "what it does"), rows)


def command_line() -> str:
    """OpenRLHF's flags, as its parser is given them."""
    parser = ArgumentParser(add_help=False)
    flags.parse(parser.parse_args, parser, [])
    rows = []
    for action in parser._actions:
        (flag,) = action.option_strings
        text, _, default = str(action.help).removesuffix(")").rpartition(" (default: ")
        rows.append(option(flag.rpartition(".")[2].lstrip("-"), flag, default, text))
    return table(("flag", "default", "what it does"), rows)


def logged() -> str:
    """The table in the docstring of what makes the numbers."""
    rows = re.findall(r"^ *``NAME(/\w+)`` +(\S.*)$", str(diagnostics.means.__doc__), re.M)
    rows = [(f"`focalpo{name}`", text.replace("``", "`")) for name, text in rows]
    return table(("name", "what it is"), rows)


# Releases, as noxfile.py has them.


def constant(name: str) -> list[str]:
    """The releases in a constant of noxfile.py: ``AXOLOTL = "axolotl[deepspeed]==0.19.0"``."""
    (value,) = (
        ast.unparse(node.value)
        for node in NOXFILE.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
    )
    return re.findall(r"==([\d.]+)", value)


def session(name: str) -> list[str]:
    """The releases that a session is run in."""
    (found,) = (
        node for node in NOXFILE.body if isinstance(node, ast.FunctionDef) and node.name == name
    )
    lists = [
        each
        for above in found.decorator_list
        for each in ast.walk(above)
        if isinstance(each, ast.List)
    ]
    # A release only, first of a tuple, or first argument of `end`.
    first = [
        (getattr(each, "args", None) or getattr(each, "elts", None) or [each])[0]
        for of in lists
        for each in of.elts
    ]
    values = [ast.literal_eval(each) for each in first]
    return [value for value in values if re.fullmatch(r"[\d.]+", value)]


def refused() -> str:
    """The release of TRL that its session treats otherwise."""
    (found,) = {
        node.comparators[0].value
        for function in NOXFILE.body
        if isinstance(function, ast.FunctionDef) and function.name == "trl_releases"
        for node in ast.walk(function)
        if isinstance(node, ast.Compare) and isinstance(node.comparators[0], ast.Constant)
    }
    return str(found)


def releases(host: str) -> str:
    """The oldest and the newest that is supported."""
    of_all = constant(host.upper()) if host != "TRL" else []
    found = {*session(f"{host.lower()}_releases"), *of_all} - {refused()}
    ordered = sorted(found, key=lambda release: [*map(int, release.split("."))])
    return f"{ordered[0]} to {ordered[-1]}"


def active() -> str:
    """The line of a run with Axolotl, in the releases that all tests run in."""
    found = {
        "focalpo_plugins": focalpo_plugins.__version__,
        "axolotl": constant("AXOLOTL")[0],
        "trl": constant("TRL_OF_AXOLOTL")[0],
        "torch": constant("TORCH")[0],
    }
    trainer = MARGINS["dpo"][1].rpartition(".")[2]
    words = [get_loss("focalpo").bind().describe(), "beta=0.1", f"trainer={trainer}"]
    words += [f"{name}={version}" for name, version in found.items()]
    return f"    focalpo_plugins: active. {' '.join(words)}"


# The paper's results, and what was measured, from the pages that hold them.


def papers() -> dict[str, dict[str, list[str]]]:
    """Table 1: the scores by model and method."""
    text = (ROOT / "examples" / "RESULTS.md").read_text()
    found = {}
    for model, rest in re.findall(
        r"\n([\w-]+ \(\dB\)):\n(\n\| method \| WR \|.*?\n)(?=\n)", text, re.S
    ):
        found[model] = {row[0]: row[1::2] for row in cells(rest, "method | WR")}
    return found


def scores(*methods: str) -> str:
    benchmarks = ("AlpacaEval 2.0", "AlpacaEval 2.0, length-controlled", "Arena-Hard v0.1")
    rows = [
        [model * (at == 0), benchmark, *(of_method[method][at] for method in methods)]
        for model, of_method in papers().items()
        for at, benchmark in enumerate(benchmarks)
    ]
    return table(("model", "benchmark", *methods), rows)


def leads() -> str:
    """FocalPO's over DPO, in points: the least and the greatest."""
    found = [
        float(ours) - float(dpo)
        for of in papers().values()
        for ours, dpo in zip(of["FocalPO"], of["DPO"], strict=True)
    ]
    return f"{min(found):.1f} to {max(found):.1f}"


def shared(what: str) -> str:
    """The first two rows of the benchmark `shared`: of ``time`` or of ``memory``, the ends."""
    rows = cells((ROOT / "docs" / "speed.md").read_text(), "`NAME`")
    measured = [row[2].split(";") for row in rows if row[0] == "`shared`"][:2]
    at = ("time", "memory").index(what)
    found = sorted(float(row[at].split("[")[0]) for row in measured)
    return f"{found[0]:.2f} to {found[1]:.2f}"


def whole_steps() -> list[picture_of_steps.Steps]:
    return picture_of_steps.of_table(cells((ROOT / "docs" / "speed.md").read_text(), "host | run"))


def steps(way: str) -> str:
    """The ends over the hosts of a way's ratios."""
    return picture_of_steps.ends(whole_steps(), way)


def picture(folder: str) -> str:
    """The picture with its description, as a page shows it."""
    return f"![{picture_of_steps.described(whole_steps())}]({folder}/{picture_of_steps.FILE.name})"


# How sure a result is.


def seeds() -> str:
    """Half a 95 % interval in standard deviations: t / sqrt(n), for three seeds.

    With two degrees of freedom Student's t has a closed form.
    """
    text = (ROOT / "examples" / "sweeps" / "seeds.yml").read_text()
    count = len({*re.findall(r"\d+", text.partition("seed:")[2])})
    if count != 3:
        raise ValueError(f"the closed form of t is for three seeds, got {count} in seeds.yml.")
    level = 0.975
    t = (2 * level - 1) * math.sqrt(2 / (4 * level * (1 - level)))
    return f"{t / math.sqrt(count):.2f}"


def standard_error(percent: str, questions: str) -> str:
    """At most, in points: a preference is between 0 and 1, so its variance is at most p (1 - p)."""
    p = float(percent) / 100
    return f"{100 * math.sqrt(p * (1 - p) / float(questions)):.1f}"


WRITERS: dict[str, Callable[..., str]] = {
    each.__name__: each
    for each in (
        first_loss, weight, reversal, peak, keys, command_line, logged, refused,
        releases, active, scores, leads, shared, steps, picture, seeds,
        standard_error,
    )
}  # fmt: skip


def markers() -> Iterator[tuple[Path, re.Match[str]]]:
    for page in pages():
        for found in MARKED.finditer(page.read_text()):
            yield page, found


def written(found: re.Match[str]) -> str:
    name, *words = found[2].split()
    text = WRITERS[name](*words)
    # A table has lines of its own between the two comments.
    ends = "\n" if found[3].startswith("\n") else ""
    return f"{found[1]}{ends}{text}{ends}{found[4]}"


def outdated() -> list[str]:
    """What differs from what the code makes, a line each."""
    file = picture_of_steps.FILE
    differs = not file.is_file() or file.read_text() != picture_of_steps.drawn(whole_steps())
    return [f"{file.relative_to(ROOT)}: the picture"] * differs + [
        f"{page.relative_to(ROOT)}: {found[2]}: {found[3].strip()[:60]!r}"
        for page, found in markers()
        if written(found) != found[0]
    ]


def main() -> int:
    if sys.argv[1:] not in ([], ["--check"]):
        print(f"write_numbers.py takes --check or nothing, got {sys.argv[1:]}.", file=sys.stderr)
        return 2
    differ = outdated()
    for line in differ:
        print(line)
    if sys.argv[1:]:
        return len(differ) > 0
    picture_of_steps.FILE.write_text(picture_of_steps.drawn(whole_steps()))
    for page in pages():
        text = page.read_text()
        new = MARKED.sub(written, text)
        if new != text:
            page.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
