"""Text cut into passages to be stored."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

WINDOW = 2**13  # tokens that are stored by one call, at most


BATCH = 1024  # sentences encoded at a time


_PROGRESS = 2.0  # seconds after which a progress bar appears


# Where a text may be cut without other tokens on either side: after a sentence or before a new line.
SENTENCE = re.compile(r"(?<=[.!?])(?=\s)|(?<=\S)(?=\n)")


def progress_bar(parts: Iterable[Any], what: str) -> Iterable[Any]:
    """``parts`` with a progress bar on a terminal, if it takes long."""
    from tqdm import tqdm

    return tqdm(parts, desc=what, disable=None, delay=_PROGRESS, leave=False)
