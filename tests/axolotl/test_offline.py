"""The network is really closed for the hosts that train without it in the contract."""

from __future__ import annotations

from pathlib import Path

from harness import SUPPORT, run_python

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
