"""How figures look, and the controls that they show."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.rcsetup import cycler

PALETTE = {
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "black": "#000000",
    "yellow": "#F0E442",  # last: hard to see on white
}


"""The Okabe-Ito colours (Okabe and Ito, "Color Universal Design", 2008), told apart by colour-blind readers."""


Theme = Literal["light", "dark"]


SURFACES: dict[Theme, dict[str, str]] = {
    "light": {
        "paper": "#FFFFFF",
        "ink": "#1F2328",
        "soft": "#59636E",
        "line": "#D1D9E0",
        "first": PALETTE["blue"],
        "second": PALETTE["vermillion"],
    },
    "dark": {
        "paper": "#0D1117",
        "ink": "#F0F6FC",
        "soft": "#9198A1",
        "line": "#3D444D",
        "first": PALETTE["sky"],
        "second": PALETTE["orange"],
    },
}
"""Colours of pictures in pages, for readers who prefer a light or a dark screen."""


CONTROLS = {
    "off": "reads off",
    "wiped": "memory wiped",
    "swapped": "another document's memory",
    "unseen": "fact never shown",
}


"""The controls of a recall rate: what follows `recall/` in a column name, and how a figure calls it."""


_RC: dict[Any, Any] = {
    "text.parse_math": False,  # a label is not a formula, whatever is in it
    "figure.figsize": (7.0, 4.2),
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.08,
    "savefig.dpi": 150,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": 11,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.8,
    "lines.linewidth": 2.0,
    "lines.markersize": 5,
    "image.cmap": "cividis",
    "axes.prop_cycle": cycler(color=list(PALETTE.values())),
}


@contextmanager
def style(theme: Theme = "light") -> Iterator[None]:
    """Draws every figure made inside the block in the project's style.

    Okabe-Ito colours, legible type, a light horizontal grid, no top and right spines. Settings go back to what they
    were when the block ends.

    Args:
        theme: Of the page that the figure is for.
    """
    with mpl.rc_context(_RC if theme == "light" else _RC | _dark()):
        yield


def _dark() -> dict[Any, Any]:
    """What is other on a dark page."""
    paper, ink, line = (SURFACES["dark"][name] for name in ("paper", "ink", "line"))
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return dict.fromkeys(inked, ink) | {"figure.facecolor": paper, "axes.facecolor": paper, "grid.color": line}
