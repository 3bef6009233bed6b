"""`nox` runs everything: each host in its own environment, the plug-in from its wheel."""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = True

# The releases that the suite was last seen to pass with; users keep what their stack has.
TORCH = "torch==2.13.0"
AXOLOTL = "axolotl[deepspeed]==0.19.0"
TEST_TOOLS = ("pytest", "pytest-xdist", "setuptools")


def wheel(session: nox.Session) -> str:
    """Build sdist and wheel, and return the wheel's path."""
    out = Path(session.create_tmp()).resolve() / "dist"
    shutil.rmtree(out, ignore_errors=True)
    session.install("build")
    session.run("python", "-m", "build", "--outdir", str(out), silent=True)
    assert list(out.glob("*.tar.gz"))
    return str(next(out.glob("*.whl")))


def test(session: nox.Session, *paths: str) -> None:
    """Run the tests against the installed wheel, from a folder without the sources."""
    tests = [str(Path(path).resolve()) for path in paths]
    config = str(Path("setup.cfg").resolve())
    session.cd(session.create_tmp())
    session.run("pytest", "-c", config, *tests, *session.posargs, external=False)


@nox.session
def lint(session: nox.Session) -> None:
    """Format, lint and types."""
    session.install(TORCH, "pluggy", "ruff", "mypy")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("mypy")


@nox.session
def core(session: nox.Session) -> None:
    """What needs torch and pluggy alone."""
    session.install(TORCH)
    session.install(wheel(session))
    session.install(*TEST_TOOLS, "hypothesis", "mpmath")
    test(session, *sorted(str(path) for path in Path("tests").glob("test_*.py")))


@nox.session
def axolotl(session: nox.Session) -> None:
    """TRL's and Axolotl's rooms, with the real Axolotl."""
    session.install(TORCH)
    session.install(AXOLOTL)
    session.install(*TEST_TOOLS)
    built = wheel(session)
    before = packages(session)
    session.install(built)
    added = packages(session) ^ before
    if not {line.partition("==")[0].partition(" ")[0] for line in added} <= {
        "focalpo_plugins",
        "pluggy",
    }:
        session.error(f"installing focalpo_plugins changed the host's environment: {added}")
    session.env["TORCH_EXTENSIONS_DIR"] = str(Path(session.virtualenv.location) / "extensions")
    session.run("python", "examples/make_tiny.py")
    test(session, "tests/trl", "tests/axolotl")


def packages(session: nox.Session) -> set[str]:
    """What is installed, a line each."""
    frozen = session.run("python", "-m", "pip", "freeze", "--all", silent=True)
    return set(str(frozen).splitlines())
