"""The stand-in server."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from stand_in import StandIn


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    with StandIn() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
