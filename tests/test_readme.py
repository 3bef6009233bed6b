"""What README and docs/ say that needs no host: numbers, names, commands, links and snippets."""

from __future__ import annotations

import ast
import json
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
DOCS = {path.stem: path.read_text() for path in (ROOT / "docs").glob("*.md")}
# What a user reads, in one text.
ALL = "\n".join([README, *DOCS.values()])
NOXFILE = (ROOT / "noxfile.py").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *EXAMPLES.rglob("*.md"), *(ROOT / "docs").glob("*.md")])


def words(text: str) -> str:
    """The text without its line ends."""
    return " ".join(text.split())


def code(text: str) -> list[str]:
    """The lines of the code blocks, indented and fenced."""
    fenced = re.findall(r"^```\w+\n(.*?)^```$", text, re.M | re.S)
    indented = [line for line in text.splitlines() if line.startswith("    ")]
    return [line.strip() for line in [*indented, *"".join(fenced).splitlines()]]


def table(page: str, head: str) -> list[list[str]]:
    """The cells of the page's table whose first line begins with ``head``."""
    lines = page[page.index(f"\n| {head} |") :].splitlines()[3:] + [""]
    rows = lines[: next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def weight(z: float) -> float:
    return focalpo_weight(torch.tensor([z], dtype=torch.float64)).item()


def test_numbers():
    """By the loss: what it is at margin 0, its weights, and where they change sign."""
    first, of_dpo = (focalpo_loss(torch.zeros(1), gamma).item() for gamma in (0.05, 0))
    questions = words(DOCS["questions"])
    assert f"The first loss is {first:.4f}, not {of_dpo:.4f}." in questions
    exact = focalpo_loss(torch.zeros(1), 0.05, "correct_exact").item()
    for page in (words(README), words(DOCS["run"])):
        assert f"`2**-gamma * ln 2`, {first:.4f} at gamma 0.05, where DPO's is {of_dpo:.4f}" in page
        assert "(with `correct_exact` it is `2**gamma * ln 2`)" in page
    assert exact == pytest.approx(2**0.05 * math.log(2), rel=1e-6)
    assert first == pytest.approx(2**-0.05 * math.log(2), rel=1e-6)
    assert f"`focalpo/weight` hardly moves from {weight(0):.2f}.**" in questions
    assert (
        f"{weight(0):.2f} of DPO's gradient at margin 0, {weight(50):.0f} for pairs ranked right "
        f"with certainty, {weight(-5):.2f} at margin -5, {abs(weight(-20)):.0f} at -20."
    ) in questions
    stars = reversal_margin(0.05), reversal_margin(1)
    assert f"{stars[0]:.0f} at gamma 0.05, {stars[1]:.2f} at gamma 1." in words(DOCS["loss"])


def test_the_peak_of_the_push():
    """Of DPO's gradient ``1 - p`` times the weight, on a grid of 0.01; and where it is 0."""
    z = torch.arange(-30, 10, 0.01, dtype=torch.float64)
    push = (1 - torch.sigmoid(z)) * focalpo_weight(z, 0.05)
    said = f"a peak at `z = {z[push.argmax()]:.2f}` and falls from there to 0 at `z = -20`"
    assert said in words(DOCS["index"])


def test_the_first_page():
    """Its length, the two commands, the paper's numbers, what shared prompts save."""
    lines = README.splitlines()
    assert len(lines) < 150
    commands = [line for line in lines[:20] if line.startswith("    python3 -m venv ")]
    assert ["axolotl train" in line for line in commands] == [True, False]
    assert commands[1].endswith("/nox")
    assert '".[plots]"' in commands[0], "a run's last line names focalpo report, which draws"
    # Of RESULTS.md the rows of the first table of each model.
    results = (EXAMPLES / "RESULTS.md").read_text().split("\n| method | WR |")[1:]
    rows = [dict(re.findall(r"^\| (DPO|SimPO|FocalPO) \|(.*)", each, re.M)[:3]) for each in results]
    assert len(rows) == 2
    scores = [{name: re.findall(r"\d+\.\d", row) for name, row in each.items()} for each in rows]
    for of_model in scores:
        for ours, dpo in zip(of_model["FocalPO"], of_model["DPO"], strict=True):
            assert f"{ours} over {dpo}" in words(README)
    order = ("DPO", "SimPO", "FocalPO")
    listed = [row[2:] for row in table(DOCS["index"], "model | benchmark")]
    assert listed == [
        [each[name][at] for name in order] for each in scores for at in range(len(each["DPO"]))
    ]
    rows = [row[2] for row in table(DOCS["speed"], "`NAME`") if row[0] == "`shared`"][:2]
    measured = [re.fullmatch(r"([\d.]+) \[.*\]; ([\d.]+)", row) for row in rows]
    for group, what in ((1, "the time"), (2, "its peak memory")):
        low, high = sorted(float(row[group]) for row in measured)
        assert (
            re.search(f"{low:.2f} to {high:.2f} of (the time|its peak memory)", words(README))[1]
            == what
        )


def test_the_site():
    """Each page is in the menu once; the API has every public name; each picture is there."""
    menu = re.findall(r"^ +- [^:\n]+: (\w.*)\.md$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(menu) == sorted(DOCS)
    named = re.findall(r"^::: focalpo_plugins\.(\w+)$", DOCS["api"], re.M)
    assert sorted(named) == sorted(focalpo_plugins.__all__)
    shown = {
        path
        for page in (README, *DOCS.values())
        for path in re.findall(r"pictures/(\w+\.svg)", page)
    }
    assert shown == {path.name for path in (ROOT / "docs" / "pictures").iterdir()}


def test_the_table_of_variants():
    """Each factor as it is written there, times -log p; and each range of gamma."""
    rows = table(DOCS["loss"], "variant")
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
    assert {row[0].strip("`") for row in table(DOCS["run"], "name")} == {*logged} | moving
    formula = "p**gamma * (1 + gamma * log p)"
    assert f"`{formula}` for `correct`" in DOCS["run"]
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
    assert f"{versions['axolotl']} (TRL {versions['trl']})" in DOCS["compatibility"]


def test_keys_and_flags():
    """Every key and flag there is, and none that there isn't."""
    options = get_loss("focalpo").options
    constants = {value for value in vars(axolotl).values() if isinstance(value, str)}
    constants.discard(axolotl.REQUESTED)  # no user writes it
    keys = {f"focalpo_{option}" for option in options}
    keys |= {value for value in constants if re.fullmatch(r"focalpo_\w+", value)}
    functions = {name for name in focalpo_plugins.__all__ if name.startswith("focalpo_")}
    named = {*re.findall(r"\bfocalpo_\w+", ALL)} - {"focalpo_plugins", *functions}
    # The names of files, such as `llama3_focalpo_lora.yml`, begin with something else.
    # A field of TRL's config alone.
    of_trl = "focalpo_pairwise_loss"
    assert f"    {of_trl}: str" in (ROOT / "focalpo_plugins" / "trl" / "config.py").read_text()
    assert named == keys | {of_trl}

    parser = ArgumentParser()
    flags.parse(parser.parse_args, parser, ["--loss", "dpo"])
    known = {name for action in parser._actions for name in action.option_strings}
    assert {*re.findall(r"--focalpo\.[a-z_]+", ALL)} == {
        flag for flag in known if flag.startswith("--focalpo.")
    }
    assert "--loss" in known
    # All of Axolotl's are in the table of its page, all of OpenRLHF's in that of its own.
    rows = " ".join(row[0] for row in table(DOCS["axolotl"], "key"))
    assert {*re.findall(r"\w+", rows)} == keys
    rows = " ".join(row[0] for row in table(DOCS["openrlhf"], "flag"))
    assert {*re.findall(r"--focalpo\.[a-z_]+", rows)} == {
        flag for flag in known if flag.startswith("--focalpo.")
    }


def test_commands_of_ours(monkeypatch: pytest.MonkeyPatch):
    """``focalpo ...`` as it stands there is taken, and each command is there."""
    lines = [line for line in code(ALL) if line.startswith("focalpo ")]
    run: list[str] = []
    for line in lines:
        given = shlex.split(line, comments=True)[1:]
        stand_in = SimpleNamespace(run=lambda args: run.append(args.command) or 0)
        monkeypatch.setitem(sys.modules, f"focalpo_plugins.cli.{given[0]}", stand_in)
        assert cli.main(given) == 0
    assert sorted({*run}) == ["check", "curves", "report", "score"]
    of_page = [line.split()[1] for line in code(DOCS["run"]) if line.startswith("focalpo ")]
    assert of_page[:4] == ["check", "curves", "score", "report"]


def test_another_loss(tmp_path: Path):
    """The package of the page as it stands: pip installs it, and its own test passes beside us."""
    page = DOCS["another-loss"]
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    files = re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```$", page, re.M | re.S)
    assert [name for name, _ in files] == ["pyproject.toml", "my_losses.py", "test_my_losses.py"]
    for name, content in files:
        (source / name).write_text(content)
    options = ("--quiet", "--no-build-isolation", "--no-deps", "--target", str(target))
    run = run_python("-m", "pip", "install", *options, str(source))
    assert run.returncode == 0, run.stderr
    test = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(source / "pyproject.toml"))
    run = run_python(*test, str(source / "test_my_losses.py"), path=target, cwd=tmp_path)
    assert "3 passed" in run.stdout, run.stdout + run.stderr
    for written in ("`rl: hinge`", "`hinge_offset`", "`--loss hinge`", "`--hinge.offset`"):
        assert written in page


def test_the_picture_of_a_benchmark(tmp_path: Path):
    """Ratio and both sides of each bar are in it, and the machine; without a file one line says so."""
    row = {
        "benchmark": "shared",
        "case": "10 M: some data, 4 pairs, shared",
        "low": 0.5,
        "high": 0.7,
    }
    rows = [
        {
            **row,
            "quantity": "step time",
            "unit": "ms",
            "ours": 1250.0,
            "theirs": 2000.0,
            "ratio": 0.625,
        },
        {
            **row,
            "quantity": "peak memory",
            "unit": "MiB",
            "ours": 30.0,
            "theirs": 60.0,
            "ratio": 0.5,
        },
    ]
    file = tmp_path / "bench.json"
    machine = {"cores": 2, "threads": 1, "torch": "9.9.9"}
    file.write_text(json.dumps({"machine": machine, "results": rows}))
    script = str(ROOT / "benchmarks" / "picture.py")
    run = run_python(script, str(file), "--out", str(tmp_path))
    assert run.returncode == 0, run.stderr
    drawn = (tmp_path / "shared.svg").read_text()
    for text in (
        "0.62  (1,250 of 2,000 ms)",
        "0.50  (30 of 60 MiB)",
        "1 of 2 CPU cores, torch 9.9.9",
    ):
        assert f">{text}<" in drawn
    run = run_python(script, str(tmp_path / "none.json"))
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith(
        "picture.py: error: FILE must be what run.py writes"
    )


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
            bare = {re.sub(r"[^\w\s-]", "", heading.lower()) for heading in headings}
            assert anchor in {heading.replace(" ", "-") for heading in bare}
    for path in re.findall(r"(?<![\w/.-])(?:examples|benchmarks|tests)/[\w./*-]*\w", text):
        if not f"{path}/".startswith("examples/tiny/"):  # which make_tiny.py makes
            assert (ROOT / path).exists() or list(ROOT.glob(path)), path


def test_the_table_of_examples():
    """Each entry is there; and what is in the folder is in the table, or named elsewhere."""
    rows = table(DOCS["reproduction"], "files")
    named = re.findall(r"`([^`]+)`", " ".join(row[0] for row in rows))
    found = [path for name in named for path in EXAMPLES.glob(name)]
    assert all(list(EXAMPLES.glob(name)) for name in named)
    listed = {path.relative_to(EXAMPLES).parts[0] for path in found}
    above = {"llama3_focalpo.yml", "mistral_focalpo.yml", "eval", "RESULTS.md"}
    tiny = {"make_tiny.py", "tiny", "tiny_focalpo.yml", "tiny_dpo.yml"}
    of_kto = {"make_kto_data.py"}  # which the recipes of KTO name
    others = {"README.md", "__pycache__", "children.py"}  # the index, Python's, and the scripts'
    assert {path.name for path in EXAMPLES.iterdir()} <= listed | above | tiny | of_kto | others


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
    assert pins(ALL) <= pins(NOXFILE)


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
    rows = table(DOCS["compatibility"], "host")
    cells = [row[1].partition("(")[0] for row in rows]
    listed = {version for cell in cells for version in re.findall(r"\d+\.[\d.]*\d", cell)}
    assert listed == ran - {"0.28.0"}
    assert "TRL 0.28.0 is refused in a test" in words(DOCS["compatibility"])
    # README has the ends of each host's: the messages of a refusal send a user there.
    ends, host = {}, ""
    for row, cell in zip(rows, cells, strict=True):
        host = row[0] or host
        ends.setdefault(host.split()[0], []).extend(re.findall(r"\d+\.\d+\.\d+", cell))
    for host in ("Axolotl", "TRL", "OpenRLHF"):
        of_host = sorted(ends[host], key=lambda release: [*map(int, release.split("."))])
        # The oldest and the newest TRL are those that are tested alone.
        assert f"{host} {of_host[0]} to {of_host[-1]}" in words(README)


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
    pages = ALL + (ROOT / "CONTRIBUTING.md").read_text()
    assert {*re.findall(r"nox -s (\w+)", pages)} <= {node.name for node in functions}
    assert {*re.findall(r"nox -t (\w+)", pages)} == tags


def test_benchmarks():
    source = ast.parse((ROOT / "benchmarks" / "run.py").read_text())
    (known,) = (
        ast.literal_eval(node.value)
        for node in source.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "BENCHMARKS"
    )
    assert {row[0].strip("`") for row in table(DOCS["speed"], "`NAME`")} == {*known}


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
    process that is no host and in one that is Axolotl's.  Of the environment it reads one name, and
    one more where a run's last line is to be shown."""
    script = tmp_path / ("axolotl" if host else "train.py")
    script.write_text(AUTOLOAD)
    run = run_python(str(script))
    names = ["FOCALPO_AUTOLOAD", *["FOCALPO_LAST_LINE"] * host]
    assert run.stdout.startswith(f"[] {names} "), run.stdout + run.stderr
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
