"""benchmarks/gpu.py's whole steps of a host with fewer rows and ways, each of which loads the host."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from harness import EXAMPLES, SUPPORT, run_python

BENCHMARKS = EXAMPLES.parent / "benchmarks"


def check(host: str, way: str, folder: Path) -> None:
    """Run it for the plain way and another one, and check what it prints."""
    path = f"{BENCHMARKS}:{SUPPORT}"
    run = run_python(str(Path(__file__)), host, way, path=path, cwd=folder)
    assert run.returncode == 0, run.stderr[-3000:]
    assert f"{host}: 2 layers, accumulation 8" in run.stdout
    title, _, row = [line for line in run.stdout.splitlines() if line.startswith("|")]
    assert title == f"| pairs | plain | {way} |"
    assert re.fullmatch(r"\| 4 \| \d+ ms, \d\.\d\d GiB \| \d+\.\d\d, \d\.\d\d \|", row)


def main() -> int:
    import gpu
    import gpu_steps

    host, way = sys.argv[1:]
    way_of, ways, copies = gpu_steps.OF_HOST[host]
    gpu_steps.OF_HOST[host] = way_of, {name: ways[name] for name in ("plain", way)}, copies
    gpu_steps.EACH = (4,)
    sys.argv = ["gpu.py", host, "--device", "cpu", "--tiny", "--rounds", "1"]
    return gpu.main()


if __name__ == "__main__":
    sys.exit(main())
