"""Training with the network closed: nothing of it is asked for."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from harness import SUPPORT, Axolotl, run_python

CLOSED = SUPPORT / "no_network"


def test_it_is_closed(tmp_path: Path):
    asked = tmp_path / "asked"
    for line in (
        "import socket; socket.create_connection(('example.invalid', 80))",
        "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'', ('192.0.2.1', 9))",
        "import socket; socket.socket().connect(('192.0.2.1', 80))",
        "import subprocess, sys; subprocess.run([sys.executable, '-c', "
        "'import socket; socket.gethostbyname(\"example.invalid\")'], check=True)",
    ):
        asked.unlink(missing_ok=True)
        run = run_python("-c", line, path=CLOSED, NETWORK_ASKED=str(asked))
        assert run.returncode != 0 and "the network is closed" in run.stderr
        assert "socket." in asked.read_text()


def test_a_step_needs_no_network(axolotl: Axolotl, tmp_path: Path):
    asked = tmp_path / "asked"
    run = axolotl.train(
        max_steps=1,
        how={"path": [CLOSED], "NETWORK_ASKED": str(asked), "fresh": True},
    )
    assert run.log[0]["loss"] == pytest.approx(2**-0.05 * math.log(2), abs=1e-4)
    assert not asked.exists(), asked.read_text()[-4000:]
