"""What to do if reading from a model hub, or from a broken file, fails."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Mapping
from pathlib import Path

from ..errors import InvalidValue
from .jsonl import SUFFIXES, broken_file
from .messages import modules_of

_LIBRARIES = ("huggingface_hub", "datasets.", "transformers.utils.hub", "axolotl.utils.data")
# Functions that read a model or a tokenizer, whatever module they are in.
_READERS = ("from_pretrained", "load_tokenizer", "load_model_config", "get_model_tokenizer")
# Errors of this machine's disk, whatever was being read.
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE)
_DATA = (*SUFFIXES, ".parquet", ".csv", ".arrow", ".txt")


def explain(error: BaseException, names: Mapping[str, str]) -> str | None:
    """What to do about an error in reading from a hub, from a broken file, or from a missing one.

    None for other errors, and if everything that is named is there.

    Args:
        names: the models and data that the run names, by the user's key or flag.
    """
    broken = broken_file(error)
    if broken is not None:
        return broken
    # An error of the system has a number; a library that finds nothing raises one without.
    reading = (isinstance(error, OSError) and error.errno is None) or any(
        module.startswith(_LIBRARIES) or function in _READERS
        for module, function in modules_of(error)
    )
    missing = {key: name for key, name in names.items() if not Path(name).exists()}
    if not reading or not missing or _of_disk(error):
        return None
    paths = [f"{key} {name!r}{_near(name)}" for key, name in missing.items() if is_path(name)]
    if paths:
        return f"There is no such file or folder: {', '.join(paths)}. Correct the path."
    listed = ", ".join(f"{key} {name!r}{_near(name)}" for key, name in missing.items())
    gated = any("meta-llama/" in name for name in missing.values())
    return (
        f"Not found on this machine, so looked up on a hub: {listed}. Config, tokenizer and data "
        "come from there. Check the names and the connection; on the Hugging Face hub, log in with "
        f"`hf auth login`{' once you have access to Llama 3, which is gated' * gated}; or name "
        "local folders. `focalpo check --model-config` estimates the memory without them."
    )


def check_there(key: str, name: str) -> None:
    """Refuse a path that doesn't exist, before a host looks for it on a hub.

    Raises:
        ValueError: the message names key and path, and what has a similar name.
    """
    if is_path(name) and not Path(name).exists():
        raise InvalidValue(
            f"{key} must be a file or folder that exists, or a name on a hub, got {name!r}"
            f"{_near(name)}: nothing is there. Correct the path."
        )


def is_path(name: str) -> bool:
    """Whether this can't be the name of a model or of data on a hub, which is ``OWNER/NAME``."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith(_DATA)


def _near(name: str) -> str:
    """What has a similar name in the same folder, in brackets; empty if nothing has."""
    path = Path(name)
    try:
        beside = [each.name for each in path.parent.iterdir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, beside, n=1)
    return f" ({near[0]!r} is beside it)" if near else ""


def _of_disk(error: BaseException) -> bool:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _LOCAL:
            return True
        cause = cause.__cause__
    return False
