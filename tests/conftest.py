"""Fixtures for all tests: the tiny assets, and third-party packages, whole and broken."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import distribution, version
from importlib.util import find_spec
from pathlib import Path

import pytest
from filelock import FileLock
from harness import EXAMPLES, SUPPORT

pytest.register_assert_rewrite("contract")
os.environ["HF_HUB_OFFLINE"] = "1"
gc.set_threshold(100_000, 20, 20)  # for what the tests import


def pytest_collection_finish() -> None:
    """Trainers collect garbage, half a second each time, in everything that the tests have
    imported."""
    gc.freeze()


def pytest_runtest_setup() -> None:
    """A test's random numbers don't depend on the tests that its worker ran before."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny assets, built once; the builder does nothing if they exist."""
    folder, of_all = EXAMPLES / "tiny", tmp_path_factory.getbasetemp().parent
    if find_spec("transformers") and version("transformers").startswith("4."):
        folder = of_all / "tiny"  # it can't read a tokenizer that transformers 5 has saved
    with FileLock(of_all / "tiny.lock"):
        make = [sys.executable, str(EXAMPLES / "make_tiny.py"), "--out", str(folder)]
        subprocess.run(make, check=True)
    return folder


@pytest.fixture(scope="session")
def few(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the first 40 pairs to train on, five steps of 8, and 12 to evaluate on."""
    folder = tmp_path_factory.mktemp("few")
    for name, count in (("train", 40), ("test", 12)):
        lines = (tiny / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:count]))
    return folder


@pytest.fixture(scope="session")
def another(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with its last norm times 1.1: a reference that differs from the policy."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("another")
    model = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight *= 1.1
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def hinge_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the third party's package, built and installed by pip."""
    target = tmp_path_factory.mktemp("hinge")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps"]
    # A copy: building in the source folder leaves files there.
    source = tmp_path_factory.mktemp("source")
    for file in (SUPPORT / "hinge_package").iterdir():
        if file.is_file():
            (source / file.name).write_bytes(file.read_bytes())
    subprocess.run([*pip, "--target", str(target), str(source)], check=True)
    return target


@pytest.fixture
def package_copy(tmp_path: Path) -> Path:
    """A folder with the installed package once more, for a test to break."""
    dist = distribution("focalpo_plugins")
    for file in dist.files:
        if file.suffix != ".pyc" and ".." not in file.parts:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(dist.locate_file(file), tmp_path / file)
    return tmp_path


@pytest.fixture
def add_package() -> Iterator[Callable[[Callable], None]]:
    """Registers what a package's ``register_losses`` gives, in this process; undone after the test."""
    from focalpo_plugins import hookimpl, registry

    registry.losses()  # those of installed packages
    before = dict(registry._losses)

    def add(register_losses: Callable) -> None:
        hook = staticmethod(hookimpl(register_losses))
        registry.add("mine", type("Package", (), {"register_losses": hook}))

    yield add
    if registry.manager.has_plugin("mine"):
        registry.manager.unregister(name="mine")
    registry._losses.clear()
    registry._losses.update(before)


@pytest.fixture
def add_loss(add_package) -> Callable[..., None]:
    """Registers one loss; takes what ``register`` takes."""
    return lambda *args, **parts: add_package(lambda register: register(*args, **parts))


@pytest.fixture
def broken_third_party(tmp_path: Path) -> Path:
    """A folder that looks like an installed package whose module raises."""
    (tmp_path / "bad_losses.py").write_text("raise RuntimeError('raises at import')\n")
    info = tmp_path / "bad_losses-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad-losses\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[focalpo_plugins]\nbad = bad_losses\n")
    return tmp_path
