"""A figure of a record, for light and dark pages, with its numbers as text in the files."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import matplotlib as mpl
from matplotlib.figure import Figure

from memlm.analysis.style import SURFACES, Theme, style


def files(name: str) -> dict[str, Theme]:
    """The files of a figure, each with its theme."""
    return {f"{name}-{theme}.svg": theme for theme in SURFACES}


def drawn(name: str, told: str, draw: Callable[[Theme], Figure]) -> dict[str, bytes]:
    """The figure by the name of its file; the same numbers give the same bytes.

    Args:
        name: What the files are called.
        told: The numbers as text. It is put into the files, so that a check can hold them to the record.
        draw: Makes the figure in a theme.
    """
    images: dict[str, bytes] = {}
    for file, theme in files(name).items():
        image = io.BytesIO()
        with style(theme), mpl.rc_context({"svg.hashsalt": name}):
            draw(theme).savefig(image, format="svg", metadata={"Date": None, "Creator": None, "Description": told})
        images[file] = re.sub(rb" +\n", b"\n", image.getvalue())
    return images
