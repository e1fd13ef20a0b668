"""Drawn figures as SVG, by matplotlib, which the extra ``plots`` installs.

Text stays text, so that a figure can be searched and read aloud; areas of many cells are images inside. The same data
give the same bytes on one version of matplotlib.
"""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from pytest_qvl.releases import install_extra

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# What a figure is laid out in: its units are those of the browser that shows it.
PIXELS_PER_INCH = 96
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pytest-qvl",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 9,
}


def require_matplotlib(option: str) -> None:
    """Refuse to begin what could not be drawn in the end.

    Args:
        option: Of the command line, for the message.

    Raises:
        ValueError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ValueError(f"{option} draws a figure, and matplotlib is not installed: {install_extra('plots')}")


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Any]:
    """A ``matplotlib.figure.Figure`` in this package's style; draw on it and save it inside the block.

    Args:
        width: In pixels.
        height: In pixels.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        yield Figure((width / PIXELS_PER_INCH, height / PIXELS_PER_INCH), dpi=PIXELS_PER_INCH, facecolor="white")


def digest_of(data: Any) -> str:
    """Hash of what is drawn, plain data; stands in the figure, so that an old one is told without drawing it again."""
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]


def drawn_digest(svg: str) -> str:
    """The digest that stands in a figure; empty where none does."""
    found = re.search(r"<dc:description>data ([0-9a-f]{16})</dc:description>", svg)
    return found[1] if found else ""


def write_svg(figure: Any, file: Path, *, title: str, data: Any, image_scale: float = 1.0) -> None:
    """Write a figure of :func:`new_figure`.

    Args:
        figure: The figure.
        file: Where to write.
        title: What it shows, in its metadata.
        data: What was drawn; its :func:`digest_of` stands in the metadata.
        image_scale: Pixels per pixel of the page, of what is drawn as an image.
    """
    metadata = {"Title": title, "Description": f"data {digest_of(data)}", "Creator": "pytest-qvl", "Date": None}
    figure.savefig(file, format="svg", metadata=metadata, dpi=PIXELS_PER_INCH * image_scale)
