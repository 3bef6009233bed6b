"""What README and docs/ contain that needs no host: numbers, names, commands, links and snippets.

No sentence is tested, so anybody can better one.  Numbers and tables that the code makes stand
between markers, which ``docs/write_numbers.py`` fills in.
"""

from __future__ import annotations

import ast
import importlib
import json
import math
import re
import sys
from argparse import ArgumentParser
from email import message_from_string
from importlib.metadata import metadata
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from harness import EXAMPLES, run_python

import focalpo_plugins
from focalpo_plugins import (
    focalpo_loss,
    focalpo_weight,
    releases,
)
from focalpo_plugins.cli.arguments import parser_of
from focalpo_plugins.diagnostics import margin_sums, means, of_ranks
from focalpo_plugins.loss import VARIANTS, check_gamma
from focalpo_plugins.openrlhf import flags
from focalpo_plugins.registry import get_loss

ROOT = EXAMPLES.parent
README = (ROOT / "README.md").read_text()
DOCS = {path.stem: path.read_text() for path in (ROOT / "docs").glob("*.md")}
# Everything a user reads, in one text.
ALL = "\n".join([README, *DOCS.values()])
NOXFILE = (ROOT / "noxfile.py").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *EXAMPLES.rglob("*.md"), *(ROOT / "docs").glob("*.md")])


# The scripts there import each other by name.
sys.path.append(str(ROOT / "docs"))
picture_of_steps = importlib.import_module("picture_of_steps")
write_numbers = importlib.import_module("write_numbers")
table = write_numbers.cells


def code(text: str) -> list[str]:
    """The lines of the code blocks, indented and fenced."""
    fenced = re.findall(r"^```\w+\n(.*?)^```$", text, re.M | re.S)
    indented = [line for line in text.splitlines() if line.startswith("    ")]
    return [line.strip() for line in [*indented, *"".join(fenced).splitlines()]]


def prose(page: str) -> str:
    """Without generated parts and code blocks."""
    page = re.sub(r"^```.*?^```$", "", write_numbers.MARKED.sub("", page), flags=re.M | re.S)
    return "\n".join(line for line in page.splitlines() if not line.startswith("    "))


def test_what_the_code_makes():
    """`nox -s numbers` writes it."""
    assert not write_numbers.outdated()


def test_the_markers():
    """Each marker has its end; a marker at the start of a line would end the paragraph on the site,
    unless it is a table's; and everything that can be written is written somewhere."""
    used = set()
    for page in PAGES:
        text = page.read_text()
        found = list(write_numbers.MARKED.finditer(text))
        assert len(found) == text.count("<!--") / 2, page
        for each in found:
            used.add(each[2].split()[0])
            starts_a_line = text[: each.start()].endswith("\n")
            assert starts_a_line == (each[3][:1] == "\n") == (each[3][-1:] == "\n"), each[0]
    assert used == {*write_numbers.WRITERS}


@pytest.mark.parametrize(
    "marker, expected",
    [
        ("first_loss 0.05", f"{2**-0.05 * math.log(2):.4f}"),
        ("first_loss 0.05 correct_exact", f"{2**0.05 * math.log(2):.4f}"),
        ("first_loss 0", f"{math.log(2):.4f}"),
        ("weight 0", "0.93"),
        ("weight 50", "1"),
        ("weight -20", "0"),
        ("reversal 0.05", "-20"),
        ("reversal 1", f"{-math.log(math.e - 1):.2f}"),
        ("seeds", "2.48"),
        ("standard_error 50 805", "1.8"),
        ("standard_error 20 500", "1.8"),
        ("leads", "0.7 to 6.5"),
    ],
)
def test_what_is_written(marker: str, expected: str):
    """By hand: the weight at margin 0 is 2**-0.05 * (1 - 0.05 * ln 2), and at -20, where it changes
    sign, 0; z* at gamma 1 is the logit of 1/e; Student's t with two degrees of freedom is 4.303,
    over sqrt(3); sqrt(0.25 / 805) and sqrt(0.16 / 500) in percent.  FocalPO leads by 17.1 - 16.4 on
    Mistral's Arena-Hard and by 54.7 - 48.2 on Llama-3's length-controlled AlpacaEval."""
    name, *words = marker.split()
    assert write_numbers.WRITERS[name](*words) == expected


def test_the_first_losses():
    """No table is written by hand, and the formulas in it are the loss."""
    for page in PAGES:
        assert not {"0.6695", "0.6931"} & {*re.findall(r"\d\.\d+", prose(page.read_text()))}, page
    formulas = {"correct": "2**-gamma * ln 2", "correct_exact": "2**gamma * ln 2"}
    for variant, formula in formulas.items():
        value = eval(formula.replace("ln 2", "ln2"), {"gamma": 0.05, "ln2": math.log(2)})
        loss = focalpo_loss(torch.zeros(1, dtype=torch.float64), 0.05, variant).item()
        assert loss == pytest.approx(value, rel=1e-12)
        for page in (README, DOCS["run"]):
            assert f"`{formula}`" in page


def test_the_first_page():
    """Its length as a reader sees it, the two commands, and the paper's numbers."""
    assert len([line for line in README.splitlines() if not line.startswith("<!--")]) < 150
    train, *others = [line for line in code(README) if line.startswith("python3 -m venv ")]
    assert "axolotl train" in train
    assert [line.endswith("/nox") for line in others].count(True) == 1
    assert '".[plots]"' in train, "a run's last line names focalpo report, which draws"
    papers = write_numbers.papers()
    assert len(papers) == 2
    ours = {score for of in papers.values() for name in ("FocalPO", "DPO") for score in of[name]}
    every = {score for of in papers.values() for row in of.values() for score in row}
    text = "\n".join(line for line in README.splitlines() if not line.startswith("    "))
    assert ours <= {*re.findall(r"(?<![\d.])\d\d\.\d(?!\d|\.\d)", text)} <= every


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
    """Each factor as written there, times -log p, and each range of gamma."""
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
    tokens = of_ranks(torch.tensor([1, 2]), torch.tensor(4))
    logged = means(margin_sums(torch.tensor([1.0, -1.0]), loss), loss, 1, tokens)
    moving = {f"focalpo/{name}" for name in get_loss("focalpo").bind(gamma_end=0.0).moving()}
    assert {row[0].strip("`") for row in table(DOCS["run"], "name")} == {*logged}
    assert all(f"`{name}`" in DOCS["run"] for name in {*logged} | moving)
    formula = "p**gamma * (1 + gamma * log p)"
    assert f"`{formula}`" in DOCS["run"]
    given = {"p": 1 / (1 + math.exp(2)), "gamma": 0.05, "log": math.log}
    weight = focalpo_weight(torch.tensor([-2.0], dtype=torch.float64)).item()
    assert eval(formula.replace("log p", "log(p)"), given) == pytest.approx(weight, rel=1e-12)


def test_the_startup_line():
    """It contains a bound loss's own description, and releases that were tested together."""
    (line,) = [line for line in code(README) if line.startswith("focalpo_plugins: active. ")]
    assert f" {get_loss('focalpo').bind().describe()} " in line
    versions = dict(word.split("=") for word in line.split() if re.search(r"=\d+\.\d+\.\d", word))
    assert versions.keys() == {"focalpo_plugins", "axolotl", "trl", "torch"}
    tested = [row[1] for row in table(DOCS["compatibility"], "host")]
    assert f"{versions['axolotl']} (TRL {versions['trl']})" in tested


def test_keys_and_flags():
    """Every key and flag is there, and no other."""
    keys = {key for of_host in write_numbers.OF_YAMLS.values() for key in of_host.all()}
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


def test_the_messages_of_the_page_on_stopped_runs():
    """Each of this package's messages that it lists is in the package, as far as its words are fixed."""
    written = [
        node.value
        for path in (ROOT / "focalpo_plugins").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    # What it puts together of two texts.
    written += [f"belongs to {of_host.asks}" for of_host in write_numbers.OF_YAMLS.values()]
    head = "| the message contains |"
    _, *tables = DOCS["stopped"].split(head)
    rows = [row for each in tables for row in table(f"\n{head}{each}", head.strip("| "))]
    keys = [key for row in rows for key in re.findall(r"`([^`]+)`", row[0])]
    of_others = {"torch.backends", "import torch"}
    for key in {*keys} - of_others:
        for words in key.split("…"):
            assert any(words.strip() in text for text in written), key
    assert len(keys) > 40 and of_others <= {*keys}


def test_the_table_of_commands():
    """Each command of `focalpo` is on its page; tests/test_commands.py runs them as written."""
    of_page = {line.split()[1] for line in code(DOCS["run"]) if line.startswith("focalpo ")}
    (commands,) = (action.choices for action in parser_of("focalpo")._actions if action.choices)
    assert of_page == {*commands} == {"check", "curves", "report", "score"}


def test_another_loss(tmp_path: Path):
    """The page's package as written there: pip installs it, and its own test passes."""
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
    """It contains each bar's ratio and both sides, and the machine; without a file one line reports
    it."""
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
    assert not (tmp_path / "ranks.svg").exists(), "there are no results of it"
    run = run_python(script, str(tmp_path / "none.json"))
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith(
        "picture.py: error: FILE must be what run.py writes"
    )


def test_the_picture_of_ranks(tmp_path: Path):
    """A panel for each set of lengths, and each ratio above its bar."""
    ratios = {"balanced": 0.61, "shared": 0.82, "both": 0.484, "ideal": 0.45}
    rows = [
        {"benchmark": "ranks", "case": f"8 x 1, {name}", "quantity": what, "ratio": ratio}
        for name in ("some pairs", "made-up lengths")
        for what, ratio in ratios.items()
    ]
    file = tmp_path / "bench.json"
    script = str(ROOT / "benchmarks" / "picture.py")
    for count, message in ((8, ""), (7, "FILE must have the ideal of each case, got none of")):
        file.write_text(json.dumps({"machine": {}, "results": rows[:count]}))
        run = run_python(script, str(file), "--out", str(tmp_path))
        assert run.returncode == bool(message) and message in run.stderr, run.stderr
    drawn = (tmp_path / "ranks.svg").read_text()
    for text in ("some pairs", "made-up lengths", ".61", ".82", ".48", "8 x 1"):
        assert f">{text}<" in drawn
    assert not (tmp_path / "shared.svg").exists()


def test_the_picture_of_whole_steps():
    """It has the ratio of both ways in each host, a bar of that length and its interval.  A ratio of 1
    is SCALE wide: 0.5 of 258 is 129."""
    rows = [
        ("Ours", "two ranks, ZeRO-3", "0.75 [0.70, 0.80]", "0.66", "0.50 [0.45, 0.55]; more 0.47"),
        ("Yours", "one rank", "0.60 [0.55, 0.70]", "not measured", "0.40 [0.35, 0.45]"),
    ]
    hosts = picture_of_steps.of_table(rows)
    assert [(of.host, of.ranks) for of in hosts] == [("Ours", "two ranks"), ("Yours", "one rank")]
    assert hosts[1].ways == {"balanced": (0.6, 0.55, 0.7), "both": (0.4, 0.35, 0.45)}
    assert picture_of_steps.ends(hosts, "balanced") == "0.60 to 0.75"
    drawn = ElementTree.fromstring(picture_of_steps.drawn(hosts))
    name = "{http://www.w3.org/2000/svg}"
    texts = [each.text for each in drawn.iter(f"{name}text")]
    ratios = [text for text in texts if re.fullmatch(r"0\.\d\d", text)]
    assert ratios == ["0.75", "0.50", "0.60", "0.40"]
    widths = {each.get("width") for each in drawn.iter(f"{name}rect")}
    assert picture_of_steps.SCALE == 258 and "129" in widths
    assert [drawn.findtext(f"{name}{part}") for part in ("title", "desc")] == [
        picture_of_steps.TITLE,
        picture_of_steps.described(hosts),
    ]
    measured = picture_of_steps.of_table(table(DOCS["speed"], "host | run"))
    assert len(measured) == 5 and all({*picture_of_steps.BARS} <= {*of.ways} for of in measured)


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
    """Each entry exists, and everything in the folder is in the table or named elsewhere."""
    rows = table(DOCS["reproduction"], "files")
    named = re.findall(r"`([^`]+)`", " ".join(row[0] for row in rows))
    found = [path for name in named for path in EXAMPLES.glob(name)]
    assert all(list(EXAMPLES.glob(name)) for name in named)
    listed = {path.relative_to(EXAMPLES).parts[0] for path in found}
    above = {"llama3_focalpo.yml", "mistral_focalpo.yml", "eval", "RESULTS.md"}
    tiny = {"make_tiny.py", "tiny", "tiny_focalpo.yml", "tiny_dpo.yml"}
    of_kto = {"make_kto_data.py"}  # which the recipes of KTO name
    # The index, Python's, the scripts', and what a host's own page names.
    others = {"README.md", "__pycache__", "children.py", "llamafactory", "swift"}
    assert {path.name for path in EXAMPLES.iterdir()} <= listed | above | tiny | of_kto | others


def test_the_index_of_examples():
    """It links every file of the folder, in a row that describes it, and nothing else."""
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
    assert len(pins(README) | pins(DOCS["openrlhf"])) >= 5
    assert pins(ALL) <= pins(NOXFILE)


def test_the_table_of_releases():
    """It has the releases that nox runs the tests in, and no other except the refused one."""
    sessions = (
        "trl_releases", "axolotl_releases", "openrlhf_releases", "llamafactory_releases",
        "swift_releases", "old_torch",
    )  # fmt: skip
    ran = {release for name in sessions for release in write_numbers.session(name)}
    ran |= {*write_numbers.session("core_pythons")}
    hosts = ("AXOLOTL", "OPENRLHF", "LLAMA_FACTORY", "SWIFT")
    ran |= {release for host in hosts for release in write_numbers.constant(host)}
    rows = table(DOCS["compatibility"], "host")
    cells = [row[1].partition("(")[0] for row in rows]
    listed = {version for cell in cells for version in re.findall(r"\d+\.[\d.]*\d", cell)}
    assert listed == ran - {"0.28.0"}
    assert write_numbers.refused() == "0.28.0"
    # README has the ends of each host's.
    ends: dict[str, list[str]] = {}
    host = ""
    for row, cell in zip(rows, cells, strict=True):
        host = row[0] or host
        ends.setdefault(host.split()[0], []).extend(re.findall(r"\d+\.\d+\.\d+", cell))
    for host in ("Axolotl", "TRL", "OpenRLHF"):
        of_host = sorted(ends[host], key=lambda release: [*map(int, release.split("."))])
        # The oldest and the newest TRL are those that are tested without another host.
        assert write_numbers.releases(host) == f"{of_host[0]} to {of_host[-1]}"
        assert f"<!--= releases {host} -->" in README


def test_the_releases_in_messages(monkeypatch: pytest.MonkeyPatch):
    """They are the releases that nox runs the tests in; the pages are named once setup.cfg names
    them."""
    swift = [*write_numbers.session("swift_releases"), *write_numbers.constant("SWIFT")]
    llamafactory = [
        *write_numbers.session("llamafactory_releases"),
        *write_numbers.constant("LLAMA_FACTORY"),
    ]
    assert {
        **{host.lower(): write_numbers.releases(host) for host in ("Axolotl", "OpenRLHF", "TRL")},
        "llamafactory": f"{llamafactory[0]} to {llamafactory[-1]}",
        "ms-swift": f"{swift[0]} to {swift[-1]}",
    } == releases.TESTED
    paper = "Project-URL: Paper, https://arxiv.org/abs/2501.06645\n"
    assert metadata("focalpo_plugins").get_all("Project-URL") == [paper.partition(": ")[2].strip()]
    supported = releases.TESTED["llamafactory"]
    assert releases.install("llamafactory") == f"Install llamafactory {supported}."
    pages = "Project-URL: Documentation, https://pages.example/focalpo\n"
    monkeypatch.setattr(releases, "metadata", lambda name: message_from_string(paper + pages))
    assert releases.install("llamafactory") == (
        f"Install llamafactory {supported}, or see https://pages.example/focalpo for newer releases."
    )


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
sys.meta_path[0].find_spec("another.module")
print({*events} - {"sys._getframe"}, read, type(sys.meta_path[0]).__name__)
"""


def test_the_autoload_opens_nothing():
    """Python's audit events, which opening, connecting, starting and importing raise: none but that
    it looks at its callers.  Of the environment it reads one name."""
    run = run_python("-c", AUTOLOAD)
    assert run.stdout == "set() ['FOCALPO_AUTOLOAD'] _Waiting\n", run.stdout + run.stderr
    assert not run.stderr


def test_torch_stops_where_an_entry_point_is_left_alone(tmp_path: Path):
    """The state after a module was deleted by hand but its metadata were not."""
    info = tmp_path / "gone-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gone\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ngone = gone_module:autoload\n")
    run = run_python("-c", "import torch; print('imported')", path=tmp_path)
    assert run.returncode != 0 and "imported" not in run.stdout
    assert "gone_module" in run.stderr
