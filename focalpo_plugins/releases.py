"""The releases of the hosts that are tested, and where this project's pages are."""

from __future__ import annotations

from importlib.metadata import metadata

#: By package, the oldest and the newest release that the tests run in.
TESTED = {
    "axolotl": "0.16.1 to 0.21.0",
    "llamafactory": "0.9.4 to 0.9.5",
    "ms-swift": "4.5.3 to 4.6.0",
    "openrlhf": "0.9.10 to 0.11.2",
    "trl": "0.29.0 to 1.16.0",
}


def install(package: str) -> str:
    """What to do about a release that isn't supported, for a message."""
    pages = address()
    newer = f", or see {pages} for newer releases" if pages else ""
    return f"Install {package} {TESTED[package]}{newer}."


def address() -> str:
    """The address of the pages: the ``Documentation`` of setup.cfg's project_urls, or empty."""
    urls: list[str] = metadata("focalpo_plugins").get_all("Project-URL") or []
    return dict(url.split(", ", 1) for url in urls).get("Documentation", "")
