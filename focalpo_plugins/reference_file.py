"""The file of a reference's log-probabilities: its key, its space on the disk, its checksum."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import InvalidValue
from .guards.folders import write_whole
from .guards.messages import say

#: Stands for a log-probability that isn't known.
MISSING = -torch.inf


class ReferenceFile:
    """The file of one reference and one set of pairs, under a name that its key gives it.

    Args:
        folder: where it is, or will be.
        option: the key or flag by which the user named ``folder``.
        digests: digests of the pairs, ``(N, 16)``, bytes.
        settings: what else the log-probabilities depend on, as values for JSON.
    """

    def __init__(
        self, folder: Path, option: str, digests: Tensor, settings: Mapping[str, Any]
    ) -> None:
        pairs = hashlib.sha256(digests.numpy().data).hexdigest()
        self._about = json.dumps({**settings, "pairs": pairs}, sort_keys=True)
        self._key = hashlib.sha256(self._about.encode()).hexdigest()
        self._option, self._digests = option, digests
        self._nothing = torch.full((len(digests), 2), MISSING)
        self.path = folder / f"reference_logps-{self._key[:16]}.cache"

    def read(self) -> Tensor:
        """The log-probabilities ``(N, 2)``; all are missing if there is no whole file of them."""
        if not os.path.exists(self.path):
            return self._nothing
        try:
            with safe_open(self.path, "pt") as file:
                metadata, digests = file.metadata(), file.get_tensor("digests")
                logps: Tensor = file.get_tensor("logps")
            if metadata["key"] != self._key or not torch.equal(digests, self._digests):
                raise ValueError("it belongs to another reference or other pairs")
            if metadata["sha256"] != _checksum(logps):
                raise ValueError("its checksum is wrong")
        except Exception as error:  # any error, because the other ranks wait
            say(f"{self.path} is damaged ({error}); recreating it.")
            return self._nothing
        return logps

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Inside, the file's size is reserved: a full disk fails now, and not an hour later."""
        with ExitStack() as held:
            with self._writing():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                temporary = held.enter_context(
                    NamedTemporaryFile(dir=self.path.parent, prefix=self.path.name, suffix=".tmp")
                )
                os.posix_fallocate(temporary.fileno(), 0, self._size)
            yield

    def write(self, logps: Tensor) -> None:
        with self._writing():
            write_whole(self.path, self._content(logps))

    @property
    def _size(self) -> int:
        return len(self._content(self._nothing))

    def _content(self, logps: Tensor) -> bytes:
        metadata = {"about": self._about, "key": self._key, "sha256": _checksum(logps)}
        content: bytes = save({"digests": self._digests, "logps": logps}, metadata)
        return content

    @contextmanager
    def _writing(self) -> Iterator[None]:
        folder = str(self.path.parent)
        try:
            yield
        except IsADirectoryError as error:
            raise InvalidValue(
                f"{self._option} must be a folder in which the file {self.path.name} can be "
                f"written, got {folder!r}: {error}. Remove the folder of that name, or choose "
                "another."
            ) from None
        except OSError as error:
            raise InvalidValue(
                f"{self._option} must be a writable folder with {self._size / 2**20:.1f} MiB of "
                f"free space, got {folder!r}: {error}. Choose another."
            ) from None


def _checksum(logps: Tensor) -> str:
    return hashlib.sha256(logps.numpy().data).hexdigest()
