"""The plotting code that all commands share."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from typing import Any

#: What to do if matplotlib is missing.
HOW_TO_DRAW = "pictures need matplotlib: pip install 'focalpo_plugins[plots]'"
#: Stands in the metadata of every picture of this package.
MARK = "focalpo_plugins"

# Okabe and Ito's colours, from dark to light, can be told apart without colour vision.  Each has
# its own line style, so that lines can be told apart in grey print as well.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES: tuple[Any, ...] = (
    "-",
    (0, (6, 2)),
    (0, (2, 1.5)),
    (0, (7, 2, 1.5, 2)),
    (0, (1, 1)),
    (0, (9, 3)),
    (0, (4, 1.5, 1, 1.5, 1, 1.5)),
)


def pyplot() -> Any:
    """matplotlib's pyplot, drawing into files; None if matplotlib isn't installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#dddddd",
            "grid.linewidth": 0.6,
            "lines.linewidth": 1.8,
            "legend.frameon": False,
            "savefig.dpi": 150,
            # Text stays text, and the same curves give the same file.
            "svg.fonttype": "none",
            "svg.hashsalt": "focalpo",
        }
    )
    return pyplot


def line_looks() -> Iterator[dict[str, Any]]:
    """Colour and line style of the first line, the second, and so on."""
    while True:
        for colour, style in zip(COLOURS, STYLES, strict=True):
            yield {"color": colour, "linestyle": style}


def rendered(figure: Any, kind: str) -> bytes:
    """The figure as the content of a file; ``kind`` is ``png`` or ``svg``."""
    content = BytesIO()
    metadata = {"Source": MARK, **({"Date": None} if kind == "svg" else {})}
    figure.savefig(content, format=kind, bbox_inches="tight", metadata=metadata)
    return content.getvalue()
