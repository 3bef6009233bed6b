"""`nox` runs everything: each host in its own environment, the plug-in from its wheel."""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = True
nox.options.sessions = ["lint", "core", "axolotl", "openrlhf", "evaluation"]

# The releases that the suite was last seen to pass with; users keep what their stack has.
TORCH = "torch==2.13.0"
AXOLOTL = "axolotl[deepspeed]==0.19.0"
OPENRLHF = "openrlhf==0.11.2"
# What Axolotl's extra `ray` brings.
RAY = "ray[train]>=2.52.1"
# What OpenRLHF pins and has no wheel for, built without the parts that need CUDA's compiler.
FLASH_ATTN, DEEPSPEED = "flash-attn==2.8.3", "deepspeed==0.19.6"
TWO_AT_A_TIME = ("-n", "2", "--dist", "loadgroup")
# pytest-xdist 3.8.0 no longer keeps a group on one worker under pytest 9.2, and says nothing.
TEST_TOOLS = ("pytest<9.2", "pytest-xdist", "setuptools", "pyyaml")
# examples/eval/README.md installs the same; alpaca-eval needs the upper bounds.
EVALUATION = ("lm-eval[hf]==0.4.13", "alpaca-eval==0.6.2", "setuptools<82", "datasets<4")
# What the extras `plots` and `tensorboard` bring.
PICTURES = ("matplotlib", "tensorboard")


def wheel(session: nox.Session) -> str:
    """Build sdist and wheel, and return the wheel's path."""
    out = Path(session.create_tmp()).resolve() / "dist"
    shutil.rmtree(out, ignore_errors=True)
    session.install("build")
    session.run("python", "-m", "build", "--outdir", str(out), silent=True)
    assert list(out.glob("*.tar.gz"))
    return str(next(out.glob("*.whl")))


def test(session: nox.Session, paths: list[str], *options: str) -> None:
    """Run the tests against the installed wheel, from a folder without the sources."""
    session.env["OMP_NUM_THREADS"] = "1"
    tests = [str(Path(path).resolve()) for path in paths]
    config = str(Path("setup.cfg").resolve())
    with session.chdir(session.create_tmp()):
        session.run("pytest", "-c", config, *tests, *options, *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Format, lint and types."""
    session.install(TORCH, "pluggy", "ruff", "mypy")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("mypy")


@nox.session
def core(session: nox.Session) -> None:
    """What needs no host."""
    session.install(TORCH)
    session.install(wheel(session))
    session.install(*TEST_TOOLS, "hypothesis", "mpmath", *PICTURES)
    test(session, sorted(map(str, Path("tests").glob("test_*.py"))), *TWO_AT_A_TIME)


@nox.session
def axolotl(session: nox.Session) -> None:
    """TRL's and Axolotl's rooms, with the real Axolotl."""
    install_axolotl(session)
    test(session, ["tests/trl", "tests/axolotl"], *TWO_AT_A_TIME)


@nox.session
def openrlhf(session: nox.Session) -> None:
    """OpenRLHF's room, with the real OpenRLHF."""
    install_openrlhf(session)
    test(session, ["tests/openrlhf"])


@nox.session
def evaluation(session: nox.Session) -> None:
    """The files of examples/eval, in the tools that read them."""
    session.install(TORCH)
    session.install(*EVALUATION, *(tool for tool in TEST_TOOLS if tool != "setuptools"))
    test(session, ["tests/eval"], *TWO_AT_A_TIME)


@nox.session
@nox.parametrize("host", ["axolotl", "openrlhf"])
def bench(session: nox.Session, host: str) -> None:
    """What the plug-in costs, as ratios; `-- NAME ...` measures single benchmarks."""
    of_host = {"axolotl": ["loss", "start", "trl", "axolotl"], "openrlhf": ["openrlhf"]}
    asked = [word for word in session.posargs if word in sum(of_host.values(), [])]
    names = [name for name in of_host[host] if name in asked or not asked]
    if not names:
        session.skip("none of the names is this host's")
    {"axolotl": install_axolotl, "openrlhf": install_openrlhf}[host](session)
    options = [word for word in session.posargs if word not in asked]
    out = f"outputs/bench_{host}.json"
    session.run("python", "benchmarks/run.py", *names, *options, "--out", out)


def install_axolotl(session: nox.Session) -> None:
    session.install(TORCH)
    session.install(AXOLOTL, RAY, "matplotlib")
    beside_the_host(session)


def install_openrlhf(session: nox.Session) -> None:
    session.install(TORCH, "wheel", "setuptools", "ninja", "packaging", "psutil")
    no_cuda = {"FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE", "FLASH_ATTENTION_FORCE_BUILD": "TRUE"}
    session.install(FLASH_ATTN, "--no-build-isolation", env=no_cuda)
    session.install(DEEPSPEED, "--no-build-isolation", env={"DS_BUILD_OPS": "0"})
    session.install(OPENRLHF)
    beside_the_host(session)


def beside_the_host(session: nox.Session) -> None:
    """Install the wheel, which must change nothing of the host's environment, and the assets."""
    session.install(*TEST_TOOLS)
    built = wheel(session)
    before = packages(session)
    session.install(built)
    changed = {line.replace("==", " ").split()[0] for line in packages(session) ^ before}
    if not changed <= {"focalpo_plugins", "focalpo-plugins", "pluggy"}:
        session.error(f"installing focalpo_plugins changed the host's environment: {changed}")
    session.env["TORCH_EXTENSIONS_DIR"] = str(Path(session.virtualenv.location) / "extensions")
    session.run("python", "examples/make_tiny.py")


def packages(session: nox.Session) -> set[str]:
    """What is installed, a line each."""
    frozen = session.run("python", "-m", "pip", "freeze", "--all", silent=True)
    return set(str(frozen).splitlines())
