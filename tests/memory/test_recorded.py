"""Memories give what they gave when `recorded.json` was written: bit for bit on such a machine, nearly on others."""

import json
from typing import Any

import pytest

from memlm.models.segments import SegmentModel
from tests.memory import recorder

pytestmark = pytest.mark.slow

RECORDED = json.loads(recorder.FILE.read_text())


@pytest.mark.parametrize(
    ("case", "name", "settings", "model_class"), list(recorder.models()), ids=[case for case, *_ in recorder.models()]
)
def test_a_memory_gives_what_it_gave(
    case: str, name: str, settings: dict[str, Any], model_class: type[SegmentModel]
) -> None:
    found = recorder.record(case, name, settings, model_class)
    expected = RECORDED["cases"][case]
    assert [part[0] for part in found] == [part[0] for part in expected]
    same_bits = RECORDED["surroundings"] == recorder.surroundings()
    for (what, bits, total), (_, bits_before, total_before) in zip(found, expected, strict=True):
        if same_bits:
            assert bits == bits_before, f"{what} differs: magnitudes {total}, not {total_before}"
        elif what.split()[1] not in ("greedy", "sampled"):  # one token that differs changes all that follow
            assert total == pytest.approx(total_before, rel=1e-5, abs=1e-6), what
