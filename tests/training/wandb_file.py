"""What W&B wrote into the file of an offline run: records in the log format of LevelDB."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def records(run: Path) -> list[Any]:
    """What W&B has written into its file, once it is whole: its own process may still be at it after `finish`."""
    for _ in range(100):
        found = list(parse(run))
        if any(record.HasField("exit") for record in found):
            break
        time.sleep(0.2)
    return found


def parse(run: Path) -> Iterator[Any]:
    """The records of a file up to one that is not whole yet: a header of 7 bytes, then blocks of 32 KiB with parts."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    data, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        if place + 7 + length > len(data):
            return
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def history(run: Path) -> list[dict[str, str]]:
    rows = [record.history.item for record in records(run) if record.HasField("history")]
    return [{item.key or "/".join(item.nested_key): item.value_json for item in row} for row in rows]
