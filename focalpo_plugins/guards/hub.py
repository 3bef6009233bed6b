"""What to do if reading from a model hub, or from a broken file, fails."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path

from .jsonl import broken_file
from .messages import modules_of

_LIBRARIES = ("huggingface_hub", "datasets.load", "transformers.utils.hub", "axolotl.utils.data")
# Errors of this machine's disk, whatever was being read.
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE)


def explain(error: BaseException, names: Mapping[str, str]) -> str | None:
    """What to do about an error in reading from a hub or from a broken file.

    None for other errors, and if everything is local.

    Args:
        names: the models and data that the run names, by the user's key or flag.
    """
    broken = broken_file(error)
    if broken is not None:
        return broken
    remote = {key: name for key, name in names.items() if not Path(name).exists()}
    reading = any(module.startswith(_LIBRARIES) for module, _ in modules_of(error))
    if not remote or not (isinstance(error, OSError) or reading) or _of_disk(error):
        return None
    listed = ", ".join(f"{key} {name!r}" for key, name in remote.items())
    gated = any("meta-llama/" in name for name in remote.values())
    return (
        f"Not found on this machine, so looked up on the Hugging Face hub: {listed}. Config, "
        "tokenizer and data come from there. Check the names and the connection; log in with `hf "
        f"auth login`{' once you have access to Llama 3, which is gated' * gated}; or name local "
        "folders. `focalpo check --model-config` estimates the memory without them."
    )


def _of_disk(error: BaseException) -> bool:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _LOCAL:
            return True
        cause = cause.__cause__
    return False
