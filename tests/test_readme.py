"""What README says that needs no host: its numbers, names, commands, links and snippets."""

from __future__ import annotations

import ast
import math
import re
import shlex
import sys
from argparse import ArgumentParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import EXAMPLES, run_python

import focalpo_plugins
from focalpo_plugins import axolotl, cli, focalpo_loss, focalpo_weight, reversal_margin
from focalpo_plugins.diagnostics import margin_sums, means
from focalpo_plugins.loss import VARIANTS, check_gamma
from focalpo_plugins.openrlhf import flags
from focalpo_plugins.registry import get_loss

ROOT = EXAMPLES.parent
README = (ROOT / "README.md").read_text()
WORDS = " ".join(README.split())
NOXFILE = (ROOT / "noxfile.py").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *EXAMPLES.rglob("*.md")])


def indented(text: str) -> list[str]:
    """The lines of the code blocks."""
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


def table(head: str) -> list[list[str]]:
    """The cells of the table whose first line begins with ``head``."""
    lines = README[README.index(f"\n| {head} |") :].splitlines()[3:]
    rows = lines[: next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def weight(z: float) -> float:
    return focalpo_weight(torch.tensor([z], dtype=torch.float64)).item()


def test_numbers():
    """By the loss: what it is at margin 0, its weights, and where they change sign."""
    first, of_dpo = (focalpo_loss(torch.zeros(1), gamma).item() for gamma in (0.05, 0))
    assert f"The first loss is {first:.4f}, not {of_dpo:.4f}." in WORDS
    assert f"`2**-gamma * ln 2`, {first:.4f} at gamma 0.05, where DPO's is {of_dpo:.4f}" in WORDS
    exact = focalpo_loss(torch.zeros(1), 0.05, "correct_exact").item()
    assert "(with `correct_exact` it is `2**gamma * ln 2`)" in WORDS
    assert exact == pytest.approx(2**0.05 * math.log(2), rel=1e-6)
    assert first == pytest.approx(2**-0.05 * math.log(2), rel=1e-6)
    assert f"`focalpo/weight` hardly moves from {weight(0):.2f}.**" in WORDS
    assert (
        f"{weight(0):.2f} of DPO's gradient at margin 0, {weight(50):.0f} for pairs ranked right "
        f"with certainty, {weight(-5):.2f} at margin -5, {abs(weight(-20)):.0f} at -20."
    ) in WORDS
    stars = reversal_margin(0.05), reversal_margin(1)
    assert f"{stars[0]:.0f} at gamma 0.05, {stars[1]:.2f} at gamma 1." in WORDS


def test_the_table_of_variants():
    """Each factor as it is written there, times -log p; and each range of gamma."""
    rows = table("variant")
    assert tuple(row[0].strip("`") for row in rows) == VARIANTS
    gamma = 0.5
    for (name, factor, _, accepted), z in ((row, z) for row in rows for z in (-2.0, 0.3)):
        p = 1 / (1 + math.exp(-z))
        expected = eval(factor.strip("`"), {"p": p, "gamma": gamma}) * -math.log(p)
        loss = focalpo_loss(torch.tensor([z], dtype=torch.float64), gamma, name.strip("`"))
        assert loss.item() == pytest.approx(expected, rel=1e-12)
        assert accepted.startswith("0 ")
        top = re.match(r"0 to below ([\d.]+)", accepted)
        check_gamma(0, name.strip("`"))
        check_gamma(float(top[1]) - 1e-4 if top else 1e3, name.strip("`"))
        if top:
            with pytest.raises(ValueError, match="^gamma must be below"):
                check_gamma(float(top[1]) + 1e-4, name.strip("`"))


def test_the_table_of_what_is_logged():
    loss = get_loss("focalpo").bind()
    logged = means(margin_sums(torch.tensor([1.0, -1.0]), loss, tokens=(3, 4)), loss)
    moving = {f"focalpo/{name}" for name in get_loss("focalpo").bind(gamma_end=0.0).moving()}
    assert {row[0].strip("`") for row in table("name")} == {*logged} | moving
    formula = "p**gamma * (1 + gamma * log p)"
    assert f"`{formula}` for `correct`" in README
    given = {"p": 1 / (1 + math.exp(2)), "gamma": 0.05, "log": math.log}
    assert eval(formula.replace("log p", "log(p)"), given) == pytest.approx(weight(-2), rel=1e-12)


def test_the_startup_line():
    """As it is put together, with the releases that the tests run with."""
    (line,) = re.findall(r"^    focalpo_plugins: active\. (.*)$", README, re.M)
    described = get_loss("focalpo").bind().describe()
    versions = dict(word.split("=") for word in line.removeprefix(described).split())
    assert line.startswith(f"{described} beta=0.1 trainer=AxolotlPairwiseTrainer ")
    assert versions["focalpo_plugins"] == focalpo_plugins.__version__
    assert {f"torch=={versions['torch']}", f"axolotl=={versions['axolotl']}"} <= pins(NOXFILE)
    assert f"{versions['axolotl']} (TRL {versions['trl']})" in README


def test_keys_and_flags():
    """Every key and flag there is, and none that there isn't."""
    options = get_loss("focalpo").options
    constants = {value for value in vars(axolotl).values() if isinstance(value, str)}
    constants.discard(axolotl.REQUESTED)  # no user writes it
    keys = {f"focalpo_{option}" for option in options}
    keys |= {value for value in constants if re.fullmatch(r"focalpo_\w+", value)}
    functions = {name for name in focalpo_plugins.__all__ if name.startswith("focalpo_")}
    named = {*re.findall(r"\bfocalpo_\w+", README)} - {"focalpo_plugins", *functions}
    # The names of files, such as `llama3_focalpo_lora.yml`, begin with something else.
    assert named == keys

    parser = ArgumentParser()
    flags.parse(parser.parse_args, parser, ["--loss", "dpo"])
    known = {name for action in parser._actions for name in action.option_strings}
    assert {*re.findall(r"--focalpo\.[a-z_]+", README)} == {
        flag for flag in known if flag.startswith("--focalpo.")
    }
    assert "--loss" in known


def test_commands_of_ours(monkeypatch: pytest.MonkeyPatch):
    """``focalpo ...`` as it stands there is taken, and each command is there."""
    lines = [line for line in indented(README) if line.startswith("focalpo ")]
    run: list[str] = []
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        stand_in = SimpleNamespace(run=lambda args: run.append(args.command) or 0)
        monkeypatch.setitem(sys.modules, f"focalpo_plugins.cli.{words[0]}", stand_in)
        assert cli.main(words) == 0
    assert sorted(run) == ["check", "curves", "report", "score"]


def test_another_loss():
    """The snippet as it stands: ``relu(offset - z)`` at z = 0.25 is 0.75, and with the option at 2
    it is 1.75."""
    code = README[README.index("\n## Another loss\n") : README.index("\n## What is refused")]
    head, *hooks = "\n".join(line[4:] for line in code.splitlines() if line[:4] == "    ").split(
        "@hook"
    )
    found = {}
    for hook in hooks:
        module: dict = {}
        exec(f"{head}@hook{hook}", module)
        module["register_losses"](lambda name, loss, **parts: found.update({name: (loss, parts)}))
    z = torch.tensor([0.25])
    loss, parts = found["hinge"]
    assert loss(z, **parts["options"]).item() == 0.75
    assert loss(z, offset=2.0).item() == 1.75
    # Half-way from 2 to 1 the offset is 1.5.
    loss, parts = found["closing"]
    assert loss(z, **parts["at"](0.5, **parts["options"])).item() == 1.25
    for written in ("`rl: hinge`", "`hinge_offset`", "`--loss hinge`", "`--hinge.offset`"):
        assert written in code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page: Path):
    """Links, their headings, and the paths that commands have from the repository's root."""
    text = page.read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.M)
            assert anchor in {heading.lower().replace(" ", "-") for heading in headings}
    for path in re.findall(r"(?<![\w/.-])(?:examples|benchmarks|tests)/[\w./*-]*\w", text):
        if not path.startswith("examples/tiny/"):  # which make_tiny.py makes
            assert (ROOT / path).exists() or list(ROOT.glob(path)), path


def test_the_table_of_examples():
    """Each entry is there; and what is in the folder is in the table, or named elsewhere."""
    named = re.findall(r"`([^`]+)`", " ".join(row[0] for row in table("files")))
    found = [path for name in named for path in EXAMPLES.glob(name)]
    assert all(list(EXAMPLES.glob(name)) for name in named)
    listed = {path.relative_to(EXAMPLES).parts[0] for path in found}
    above = {"llama3_focalpo.yml", "mistral_focalpo.yml", "eval", "RESULTS.md"}
    tiny = {"make_tiny.py", "tiny", "tiny_focalpo.yml", "tiny_dpo.yml"}
    of_kto = {"make_kto_data.py"}  # which the recipes of KTO name
    of_index = {"README.md"}
    assert {path.name for path in EXAMPLES.iterdir()} <= listed | above | tiny | of_kto | of_index


def test_the_index_of_examples():
    """It links every file of the folder, in a row that says what it is, and nothing else."""
    rows = [
        line.strip("|").split("|")
        for line in (EXAMPLES / "README.md").read_text().splitlines()
        if line.startswith("| [")
    ]
    links = [re.findall(r"\[([^]]+)\]\(([^)]+)\)", row[0]) for row in rows]
    assert all(row[1].strip() for row in rows)
    named = [name for each in links for name, target in each if name == target]
    made = ("tiny", "__pycache__")  # of make_tiny.py, and of Python
    files = {
        str(path.relative_to(EXAMPLES))
        for path in EXAMPLES.rglob("*")
        if path.is_file() and not {*made} & {*path.relative_to(EXAMPLES).parts}
    }
    assert sorted(named) == sorted(files - {"README.md"})


def pins(text: str) -> set[str]:
    """``package==version``, without extras."""
    return {re.sub(r"\[.*\]", "", pin) for pin in re.findall(r"[\w-]+(?:\[\w+\])?==[\d.]*\d", text)}


def test_what_is_installed_is_what_the_tests_run_with():
    assert len(pins(README)) >= 5
    assert pins(README) <= pins(NOXFILE)


def test_the_table_of_releases():
    """It has those that nox runs the tests in, and no other; 0.28.0 is the refused one."""
    functions = [node for node in ast.parse(NOXFILE).body if isinstance(node, ast.FunctionDef)]
    above = [each for function in functions for each in function.decorator_list]
    lists = [node for each in above for node in ast.walk(each) if isinstance(node, ast.List)]
    firsts = [element for each in lists for element in each.elts]
    # A release alone, first of a tuple, or first argument of `ends`.
    firsts = [
        (getattr(first, "args", None) or getattr(first, "elts", None) or [first])[0]
        for first in firsts
    ]
    ran = {ast.literal_eval(first) for first in firsts}
    ran = {value for value in ran if re.fullmatch(r"[\d.]+", value)}
    ran |= {
        pin.partition("==")[2] for pin in pins(NOXFILE) if pin.startswith(("axolotl", "openrlhf"))
    }
    cells = [row[1].partition("(")[0] for row in table("host")]
    listed = {version for cell in cells for version in re.findall(r"\d+\.[\d.]*\d", cell)}
    assert listed == ran - {"0.28.0"}
    assert "0.28.0 was seen to be refused" in WORDS


def test_sessions():
    functions = [node for node in ast.parse(NOXFILE).body if isinstance(node, ast.FunctionDef)]
    tags = {
        tag
        for each in ast.walk(ast.parse(NOXFILE))
        if isinstance(each, ast.Call)
        for named in each.keywords
        if named.arg == "tags"
        for tag in ast.literal_eval(named.value)
    }
    pages = README + (ROOT / "CONTRIBUTING.md").read_text()
    assert {*re.findall(r"nox -s (\w+)", pages)} <= {node.name for node in functions}
    assert {*re.findall(r"nox -t (\w+)", pages)} == tags


def test_benchmarks():
    source = ast.parse((ROOT / "benchmarks" / "run.py").read_text())
    (known,) = (
        ast.literal_eval(node.value)
        for node in source.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "BENCHMARKS"
    )
    assert {row[0].strip("`") for row in table("`NAME`")} == {*known}


AUTOLOAD = """
import os, sys
import _focalpo_plugins_autoload

read, events = [], []

class Environment(dict):
    def get(self, key, default=None):
        read.append(key)
        return super().get(key, default)

    def __getitem__(self, key):
        read.append(key)
        return super().__getitem__(key)

os.environ = Environment(os.environ)
sys.addaudithook(lambda event, arguments: events.append(event))
_focalpo_plugins_autoload.autoload()
print(list(events), read, [type(finder).__name__ for finder in sys.meta_path][:1])
"""


@pytest.mark.parametrize("host", [False, True])
def test_the_autoload_opens_nothing(tmp_path: Path, host: bool):
    """Python's audit events, which opening, connecting, starting and importing raise: none, in a
    process that is no host and in one that is Axolotl's.  Of the environment it reads one name."""
    script = tmp_path / ("axolotl" if host else "train.py")
    script.write_text(AUTOLOAD)
    run = run_python(str(script))
    assert run.stdout.startswith("[] ['FOCALPO_AUTOLOAD'] "), run.stdout + run.stderr
    assert ("_Awaiting" in run.stdout) is host
    assert not run.stderr


def test_torch_stops_where_an_entry_point_is_left_alone(tmp_path: Path):
    """What is left where a module was deleted by hand and its metadata were not."""
    info = tmp_path / "gone-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gone\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ngone = gone_module:autoload\n")
    run = run_python("-c", "import torch; print('imported')", path=tmp_path)
    assert run.returncode != 0 and "imported" not in run.stdout
    assert "gone_module" in run.stderr
